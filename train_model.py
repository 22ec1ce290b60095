"""Chapter 4 of 5: learning from a text.

At the end of this file you know how a model that guesses blindly becomes one that writes: it reads
a batch, is told how surprised it should be (the loss), asks in which direction each parameter would
lower that surprise (the gradient), takes a small step, and repeats. It takes the dials, the batches
and the model of the chapters before; it hands chapter 5 the file tiny_gpt_model.pth.

    python train_model.py                       learns from input.txt
    python train_model.py --n_layer 6           turns one dial, for this run
    python train_model.py --resume              continues a run that was interrupted

The order is that of understanding: measuring, the step size, the optimizer, one step, the run. What
protects the work (signals, saving, several processes) comes after it and is skipped at first.
"""

import argparse
import contextlib
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any, Dict, List, NamedTuple, Optional

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data_handling import (
    TextError,
    fingerprint,
    gather,
    load_text,
    shuffled_windows,
    split,
    windows_in,
)
from hyperparameters import (
    PRESETS,
    DialError,
    Hyperparameters,
    OneSentenceParser,
    add_dial_flags,
    dials_given,
    file_name,
    steady_output,
)
from model_architecture import (
    CheckpointError,
    DeviceError,
    NeighbourMix,
    SaveError,
    TinyGPT,
    check_tensors,
    check_writable,
    choose_device,
    count_parameters,
    is_out_of_memory,
    keep_previous,
    load_checkpoint,
    previous_name,
    reason,
    save_checkpoint,
    temporary_name,
    to_cpu,
    write_atomically,
)

EVALUATION_CHARACTERS = 8_192  # measured at once


@torch.no_grad()
def evaluate(model: TinyGPT, ids: torch.Tensor) -> float:
    """Mean loss over all of `ids`, in nats a character, in windows side by side.

    The loss is the surprise, -ln p, at each character that really came: the cross-entropy. Random
    batches would give another figure every time; one exact pass repeats to the last digit. Only the
    rest at the end that does not fill a window is left out. Dropout is off, and no 16-bit numbers
    are used; the mode that the model was in is restored.
    """
    block_size, was_training = model.block_size, model.training
    starts = torch.arange(0, len(ids) - block_size, block_size, device=ids.device)
    total = 0.0
    model.eval()
    for some in starts.split(max(1, EVALUATION_CHARACTERS // block_size)):
        inputs, targets = gather(ids, some, block_size)
        logits = model(inputs)
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    model.train(was_training)
    return total / (len(starts) * block_size)


def learning_rate_at(step: int, total_steps: int, dials: Hyperparameters) -> float:
    """The step size for step number `step`, counted from 0.

    Fresh parameters point in no direction worth following far, and AdamW's averages are still
    empty, so the rate climbs during warm-up. From there it falls on a straight line to zero: big
    steps find the region, small ones settle in it. The last step still moves a little.
    """
    warmup = min(dials.warmup_steps, total_steps // 10)
    if step < warmup:
        return dials.learning_rate * (step + 1) / (warmup + 1)
    return dials.learning_rate * (total_steps - step) / (total_steps - warmup)


def make_optimizer(model: TinyGPT, dials: Hyperparameters) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019): every parameter gets a step size of its own.

    It steps along the average of recent gradients, divided by their usual size (an average of
    squares that beta2 makes longer or shorter), so rarely used parameters move as well. Weight
    decay pulls the matrices towards zero, so that none grows on the few examples it has seen; the
    small weights of the neighbour mixes are left alone.
    """
    matrices = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    mixes = [m.weight for m in model.modules() if isinstance(m, NeighbourMix)]
    groups = [
        {"params": matrices, "weight_decay": dials.weight_decay},
        {"params": mixes, "weight_decay": 0.0},
    ]
    # One fused kernel for all parameters; PyTorch has it on CUDA, and on a CPU since 2.4.
    newest = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 4)
    kind = model.embedding.weight.device.type
    fused = kind == "cuda" or (kind == "cpu" and newest)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, dials.beta2), fused=fused)


class Progress:
    """How far a run has come: all that a resumed run needs beside weights and optimizer."""

    def __init__(self, device: torch.device) -> None:
        self.step = 0  # optimizer steps taken, over all epochs
        # Summed where it is computed: reading it at every step would make a GPU wait for Python.
        kind = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.loss_sum = torch.zeros((), dtype=kind, device=device)  # of the windows of this epoch
        self.rows: List[List[float]] = []  # the finished epochs, as in the log file
        self.best_loss = math.inf
        self.best_weights: Optional[Dict[str, torch.Tensor]] = None
        self.seconds = 0.0  # spent on steps, in all sessions together


class Run(NamedTuple):
    """All that one training run works with, so that what follows takes one thing and not ten."""

    dials: Hyperparameters
    model: TinyGPT
    learner: torch.nn.Module  # the same model, perhaps compiled or spread over processes
    optimizer: torch.optim.AdamW
    precision: "Precision"
    train_ids: torch.Tensor
    held_out_ids: torch.Tensor
    progress: Progress
    processes: "Processes"
    files: "Files"

    @property
    def steps_per_epoch(self) -> int:
        windows = windows_in(len(self.train_ids), self.dials.block_size)
        return math.ceil(windows / self.dials.batch_size)

    @property
    def total_steps(self) -> int:
        return self.dials.epochs * self.steps_per_epoch


def take_step(run: Run, starts: torch.Tensor) -> None:
    """Learn from the windows that begin at `starts`, (B,)."""
    dials, progress = run.dials, run.progress
    optimizer, scaler = run.optimizer, run.precision.scaler
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(progress.step, run.total_steps, dials)

    mine = run.processes.share(starts)  # all of them, unless there are several processes
    inputs, targets = gather(run.train_ids, mine, dials.block_size)  # (B, T) each
    # A GPU multiplies faster in 16 bits; the scaler keeps small gradients from vanishing there. On
    # a CPU both do nothing.
    with run.precision.context():
        logits = run.learner(inputs)  # (B, T, V)
    # Gradients are averaged over processes; dividing by everybody's windows makes that their sum.
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    loss = loss / (len(starts) * dials.block_size)
    progress.loss_sum += loss.detach() * len(starts)

    scaler.scale(loss * run.processes.count).backward()  # the gradient of every parameter
    scaler.unscale_(optimizer)
    # A single odd batch can ask for a huge step; no step may be longer than a usual one.
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), dials.gradient_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    progress.step += 1


def train_epoch(run: Run, epoch: int, stop: "StopRequest", bar: tqdm) -> float:
    """What is left of one epoch; return its mean training loss in nats a character."""
    progress, dials = run.progress, run.dials
    starts = shuffled_windows(len(run.train_ids), dials.block_size, dials.seed, epoch)
    starts = starts.to(run.train_ids.device)
    clock = time.perf_counter() - progress.seconds
    for step in range(progress.step - epoch * run.steps_per_epoch, run.steps_per_epoch):
        take_step(run, starts[step * dials.batch_size : (step + 1) * dials.batch_size])
        progress.seconds = time.perf_counter() - clock
        bar.update()
        protect_progress(run, stop)
    loss = run.processes.total(progress.loss_sum) / len(starts)
    progress.seconds = time.perf_counter() - clock  # a GPU has finished its work only now
    return loss


def train(run: Run, stop: "StopRequest") -> None:
    """Every epoch from where `run.progress` stands.

    Raises Stopped once all is saved, SaveError if it cannot be, Diverged when the loss is none.
    """
    progress, dials = run.progress, run.dials
    with progress_bar(run) as bar:
        for epoch in range(len(progress.rows), dials.epochs):
            step, seconds = progress.step, progress.seconds
            train_loss = train_epoch(run, epoch, stop, bar)
            val_loss = evaluate(run.model, run.held_out_ids) if run.processes.is_first else 0.0
            check_finite(run, train_loss + val_loss)
            if val_loss < progress.best_loss:
                progress.best_loss, progress.best_weights = val_loss, to_cpu(run.model.state_dict())
            progress.rows.append([epoch + 1, progress.step, train_loss, val_loss, progress.seconds])
            progress.loss_sum.zero_()
            report_epoch(run, progress.step - step, progress.seconds - seconds)
            run.files.save(run)


# ---- What the reader sees ----------------------------------------------------------------------


def say(text: str) -> None:
    """Print a line on stdout without tearing the progress bar on stderr."""
    tqdm.write(text, file=sys.stdout)


def progress_bar(run: Run) -> tqdm:
    """One bar over the whole run, so that its time left answers how long this will take.

    Where stderr is no terminal (a log file), there is none: the line per epoch has to do.
    """
    return tqdm(
        total=run.total_steps,
        initial=run.progress.step,
        disable=None if run.processes.is_first else True,
        dynamic_ncols=True,
        desc="training",
        unit="step",
    )


def describe(run: Run, path: str, vocab_size: int, device: torch.device, why: str) -> None:
    """Say, before the waiting begins, what it is for."""
    dials, train_size, held_out_size = run.dials, len(run.train_ids), len(run.held_out_ids)
    parameters = sum(p.numel() for p in run.model.parameters())
    number = {None: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    say(f"device    {device} ({why}), {number[run.precision.autocast]} matrix products")
    say(f"text      {path!a}: {train_size + held_out_size:,} characters, {vocab_size} different")
    say(f"split     {train_size:,} characters to train on, {held_out_size:,} held out")
    say(
        f"model     {parameters:,} parameters: {dials.n_layer} blocks of {dials.n_head} heads, "
        f"width {dials.n_embd}, window {dials.block_size}"
    )
    say(
        f"training  {dials.epochs} epochs of {run.steps_per_epoch:,} steps, {dials.batch_size} "
        f"windows a step; guessing blindly costs {math.log(vocab_size):.4f} nats"
    )


def report_epoch(run: Run, steps: int, seconds: float) -> None:
    """One line for the epoch that just ended; `steps` and `seconds` are those of this session."""
    if not run.processes.is_first:
        return
    epoch, step, train_loss, val_loss, _ = run.progress.rows[-1]
    windows = windows_in(len(run.train_ids), run.dials.block_size)
    characters = min(steps * run.dials.batch_size, windows) * run.dials.block_size
    left = (run.total_steps - step) * seconds / max(steps, 1)
    say(
        f"epoch {epoch}/{run.dials.epochs}  step {step:,}  train loss {train_loss:.4f}  val loss "
        f"{val_loss:.4f} ({val_loss / math.log(2):.3f} bits/char)  "
        f"{characters / max(seconds, 1e-9):,.0f} chars/s  {tqdm.format_interval(left)} left"
    )


# What follows protects the work and spreads it over devices. A first reader can skip to main.

# ---- Protection: stopping, saving, resuming ----------------------------------------------------


class Diverged(Exception):
    """The loss is no longer a number. The message says what to do."""


class Stopped(Exception):
    """A signal asked to stop, and what there was is saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class StopRequest:
    """Remembers the first Ctrl-C or SIGTERM until the step is done; a second one quits at once."""

    def __init__(self) -> None:
        self.signal_number = 0
        self.handlers: Dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            # Ignored SIGHUP is nohup's doing: the run is meant to outlive its terminal.
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                self.handlers[number] = signal.signal(number, self.receive)
        return self

    def receive(self, number: int, _frame: Any) -> None:
        self.signal_number = number
        for each in self.handlers:
            signal.signal(each, signal.SIG_DFL)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def protect_progress(run: Run, stop: StopRequest) -> None:
    """After a step: see that the loss is a number, save when it is time, stop when asked to."""
    if run.progress.step % 50 == 0:
        check_finite(run, run.progress.loss_sum.item(), weights=False)
    signal_number, save = run.processes.agree(stop.signal_number, run.files.save_is_due(run.dials))
    if signal_number or save:
        check_finite(run, run.progress.loss_sum.item())
        saved = run.files.save(run)
        if signal_number and saved:
            raise Stopped(signal_number)
        if signal_number:
            raise SaveError(f"stopped at step {run.progress.step:,}, and nothing could be saved")


def check_finite(run: Run, loss: float, weights: bool = True) -> None:
    """Raise Diverged when the loss, or one of the weights, has become NaN or infinite."""
    parameters = run.model.parameters() if weights else ()
    if not math.isfinite(loss) or not all(torch.isfinite(p).all() for p in parameters):
        raise Diverged(
            f"training diverged before step {run.progress.step:,}: the loss is no longer a number; "
            f"start again with a lower learning_rate than {run.dials.learning_rate:g}. What was "
            "saved before stays as it is"
        )


class Files:
    """The two files of a run: the checkpoint, and the log that is written anew from its rows."""

    def __init__(self, checkpoint: str, log: str, vocabulary: str, text_id: str) -> None:
        self.checkpoint, self.log = checkpoint, log
        self.vocabulary, self.text_id = vocabulary, text_id  # what a resumed run must find again
        self.older: List[str] = []  # files of another run, which the first save replaces
        self.unsaved = ""  # what the last save, if it failed, said
        self.last_save = time.monotonic()

    def save_is_due(self, dials: Hyperparameters) -> bool:
        return time.monotonic() - self.last_save > 60 * dials.save_minutes

    def save(self, run: Run) -> bool:
        """Write both files; return whether it worked. A full disk must not end a night of training.

        All processes take part, and only the first one writes.
        """
        self.last_save = time.monotonic()
        finished = len(run.progress.rows) == run.dials.epochs
        training = None if finished else run_state(run, self.text_id)
        if not run.processes.is_first:
            return True
        try:
            while self.older:
                keep_previous(self.older[0])
                older = self.older.pop(0)
                say(f"{older!a} was there; it is kept as {previous_name(older)!a}")
            # The log first: a resumed run writes it again, a finished one has no later chance to.
            if run.progress.rows:
                write_atomically(self.log, log_text(run.progress.rows))
            best = run.progress.best_weights
            save_checkpoint(self.checkpoint, run.model, self.vocabulary, best, training)
            self.unsaved = ""
        except SaveError as error:
            self.unsaved = str(error)
            say(f"warning: not saved at step {run.progress.step:,}: {error}")
        return not self.unsaved

    def find_older(self, rows: Optional[List[List[float]]]) -> None:
        """Note what a save would replace, except what this very run, resumed with `rows`, wrote."""
        self.older = [p for p in (self.checkpoint, self.log) if os.path.exists(p)]
        if rows is not None:
            self.older.remove(self.checkpoint)
            with contextlib.suppress(OSError), open(self.log, "rb") as file:
                present, ours = file.read(), log_text(rows)
                if present.startswith(ours) or ours.startswith(present):
                    self.older = []


def log_text(rows: List[List[float]]) -> bytes:
    """training_log.csv: a header and one row per finished epoch; losses in nats a character."""
    lines = ["epoch,step,train_loss,val_loss,seconds"]
    for epoch, step, train_loss, val_loss, seconds in rows:
        lines.append(f"{epoch},{step},{train_loss!r},{val_loss!r},{seconds:.1f}")
    return "".join(line + "\n" for line in lines).encode("ascii")


def run_state(run: Run, text_id: str) -> Dict[str, Any]:
    """All that an exact resume needs, in tensors and plain Python, for `restore` to read."""
    progress, device = run.progress, run.train_ids.device
    adam = {name: run.optimizer.state[p] for name, p in run.model.named_parameters()}
    cuda = device.type == "cuda"
    return {
        "dials": asdict(run.dials),
        "text": text_id,
        "step": progress.step,
        "loss_sum": run.processes.total(progress.loss_sum),
        "rows": progress.rows,
        "best_loss": progress.best_loss,
        "seconds": progress.seconds,
        "weights": to_cpu(run.model.state_dict()),
        "average": to_cpu({name: state["exp_avg"] for name, state in adam.items()}),
        "square": to_cpu({name: state["exp_avg_sq"] for name, state in adam.items()}),
        "updates": int(adam["embedding.weight"]["step"]),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(device) if cuda else None,
    }


def restore(run: Run, training: Dict[str, Any]) -> None:
    """Put a run back to where `run_state` left it. Raises CheckpointError for forged values."""
    progress, model, device = run.progress, run.model, run.train_ids.device
    try:
        step, rows, updates = training["step"], training["rows"], training["updates"]
        numbers = [training["seconds"], training["loss_sum"], *(x for row in rows for x in row)]
        steps_before = len(rows) * run.steps_per_epoch
        if not (
            type(step) is type(updates) is int
            and type(rows) is list
            and all(type(row) is list and len(row) == 5 for row in rows)
            and all(type(x) in (int, float) and abs(x) < 1e15 for x in numbers)
            and type(training["best_loss"]) is float
            and steps_before <= step <= steps_before + run.steps_per_epoch <= run.total_steps
            and 0 <= updates <= step
        ):
            raise ValueError("step, losses and log do not fit together")
        for kind in ("weights", "average", "square"):
            check_tensors(kind, training[kind], model.state_dict())
        progress.step, progress.rows, progress.seconds = step, rows, training["seconds"]
        progress.best_loss = training["best_loss"]
        progress.best_weights = to_cpu(model.state_dict()) if rows else None
        model.load_state_dict(training["weights"])
        if run.processes.is_first:
            progress.loss_sum.fill_(training["loss_sum"])
        restore_optimizer(run.optimizer, model, training)
        torch.set_rng_state(training["random"])
        if training["random_cuda"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(training["random_cuda"], device)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{run.files.checkpoint!a}: its unfinished run is damaged ({reason(error)})"
        ) from error


def restore_optimizer(
    optimizer: torch.optim.AdamW, model: TinyGPT, training: Dict[str, Any]
) -> None:
    """Give AdamW its averages back, in the order in which it numbers the parameters."""
    state = optimizer.state_dict()
    if training["updates"]:
        name_of = {p: name for name, p in model.named_parameters()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state["state"] = {
            index: {
                "step": torch.tensor(float(training["updates"])),
                "exp_avg": training["average"][name_of[p]],
                "exp_avg_sq": training["square"][name_of[p]],
            }
            for index, p in enumerate(parameters)
        }
        optimizer.load_state_dict(state)


# ---- Speed: number formats, compilation, several processes ---------------------------------------


class Precision(NamedTuple):
    """In which number format matrix products run; None is plain float32."""

    device: str
    autocast: Optional[torch.dtype]
    scaler: Any  # float16 cannot hold small gradients: they are scaled up before, down after

    def context(self) -> Any:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=self.autocast)


def choose_precision(device: torch.device) -> Precision:
    """bfloat16 where the GPU has it in hardware, float16 on older ones, float32 elsewhere."""
    autocast = None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # what stays float32 may use TF32
        # is_bf16_supported() would also say yes to a slow emulation.
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        autocast = torch.bfloat16 if has_bfloat16 else torch.float16
    return Precision(device.type, autocast, make_scaler(device.type, autocast))


def make_scaler(device: str, autocast: Optional[torch.dtype]) -> Any:
    """A gradient scaler that works for float16 and lets everything pass otherwise."""
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device, enabled=autocast == torch.float16)
    return torch.cuda.amp.GradScaler(enabled=False)  # PyTorch 2.2, the last on Intel Macs


COMPILER_ERRORS = (RuntimeError, OSError, ImportError, AttributeError, subprocess.SubprocessError)


def compiled(
    model: TinyGPT, wanted: str, ids: torch.Tensor, precision: Precision, windows: int
) -> Any:
    """The model compiled, if `wanted` ("on", "off", "auto") says so and one real step succeeds.

    The compiler needs a C++ compiler or Triton, which many machines lack: then one warning, and the
    model as it is. "auto" compiles on CUDA only; on a CPU it takes longer than it saves in minutes.
    """
    if wanted == "off" or (wanted == "auto" and ids.device.type != "cuda"):
        return model
    starts = torch.zeros(windows, dtype=torch.long, device=ids.device)
    try:
        faster = torch.compile(model, dynamic=False)  # two sizes of batch, each worth its own code
        gpus = [ids.device] if ids.device.type == "cuda" else []
        with torch.random.fork_rng(gpus), precision.context():  # the trial must not change the run
            faster(gather(ids, starts, model.block_size)[0]).sum().backward()
        return faster
    except COMPILER_ERRORS as error:
        say(f"warning: the model cannot be compiled here, going on without: {reason(error)}")
        return model
    finally:
        model.zero_grad(set_to_none=True)


class Processes:
    """This process among those of one run. A run that torchrun did not start has one process."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.is_first = self.rank == 0  # the one that prints, measures and saves
        self.group: Any = None

    def join(self, device: torch.device) -> None:
        """Meet the other processes; afterwards gradients and sums can be shared."""
        if self.count > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            self.group = dist.new_group(backend="gloo")  # for numbers that are not on a GPU

    def spread(self, learner: torch.nn.Module) -> torch.nn.Module:
        """The same model, its gradients averaged over all processes at every step."""
        if self.count == 1:
            return learner
        return torch.nn.parallel.DistributedDataParallel(learner)

    def share(self, starts: torch.Tensor) -> torch.Tensor:
        """This process's windows of a batch: every n-th."""
        return starts[self.rank :: self.count]

    def agree(self, *wishes: int) -> List[int]:
        """The largest wish of any process: all must stop, or save, after the same step."""
        if self.count == 1:
            return list(wishes)
        votes = torch.tensor(wishes, dtype=torch.long)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group)
        return votes.tolist()

    def total(self, value: torch.Tensor) -> float:
        """The sum of `value` over all processes."""
        if self.count == 1:
            return value.item()
        value = value.detach().cpu().clone()
        dist.all_reduce(value, group=self.group)
        return value.item()

    def lost(self, error: BaseException) -> bool:
        """Whether `error` only says that another process is gone."""
        signs = ("connection", "peer", "gloo", "nccl", "timed out")
        return self.count > 1 and any(sign in str(error).lower() for sign in signs)

    def leave(self, status: int) -> int:
        """The exit status. Several processes end right here: PyTorch 2.4 can hang in parting."""
        if self.group is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status


# ---- The command line ------------------------------------------------------------------------


FILES = {  # flag: its default and its meaning
    "input": ("input.txt", "the text to learn from"),
    "checkpoint": ("tiny_gpt_model.pth", "the file to save the model to"),
    "log": ("training_log.csv", "the table of losses to write"),
}


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The flags of `python train_model.py`, dials included."""
    parser = OneSentenceParser(
        prog="train_model.py", description="Train TinyGPT on a text.", allow_abbrev=False
    )
    for name, (default, meaning) in FILES.items():
        parser.add_argument(
            f"--{name}",
            type=file_name,
            default=default,
            help=f"{meaning} ({default})",
            metavar="FILE",
        )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda", "mps"],
        default="auto",
        help="where to compute; auto takes a CUDA GPU if there is one, else the CPU",
    )
    parser.add_argument(
        "--preset",
        choices=["auto", *PRESETS],
        default="auto",
        help="the set of dials to begin with; auto takes gpu on a GPU, else laptop",
    )
    parser.add_argument(
        "--compile",
        choices=["auto", "on", "off"],
        nargs="?",
        const="on",
        default="auto",
        help="compile the model first; auto does so on CUDA only",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the unfinished run in the checkpoint"
    )
    add_dial_flags(parser)
    return parser.parse_args(argv)


def choose_dials(
    arguments: argparse.Namespace, device: torch.device, training: Optional[Dict[str, Any]]
) -> Hyperparameters:
    """The preset, changed by the flags; on resume the checkpoint's, which no flag may change.

    Raises DialError and CheckpointError.
    """
    preset = arguments.preset
    if preset == "auto":
        preset = "laptop" if device.type == "cpu" else "gpu"
    wanted = {**asdict(PRESETS[preset]), **dials_given(arguments)}
    if training is None:
        return Hyperparameters(**wanted)
    try:
        dials = Hyperparameters(**{**asdict(PRESETS["laptop"]), **training["dials"]})
    except (TypeError, LookupError, ValueError) as error:
        raise CheckpointError(
            f"{arguments.checkpoint!a}: its unfinished run is damaged (dials)"
        ) from error
    asked = wanted if arguments.preset != "auto" else dials_given(arguments)
    differences = [
        f"{name} is {saved_value}, not {asked[name]}"
        for name, saved_value in asdict(dials).items()
        if name in asked and asked[name] != saved_value
    ]
    if differences:
        raise DialError(
            f"the run to resume in {arguments.checkpoint!a} has other dials: "
            f"{'; '.join(differences)}. Leave these flags out, or start a new run without --resume"
        )
    return dials


def check_paths(arguments: argparse.Namespace) -> None:
    """Refuse, before any work is done, files that cannot be written or would replace each other."""
    touched = [arguments.input]
    for path in (arguments.checkpoint, arguments.log):
        touched += [path, temporary_name(path), previous_name(path)]
    touched = [os.path.realpath(path) for path in touched]
    twice = [path for path in touched if touched.count(path) > 1]
    if twice:
        raise SaveError(
            f"--input, --checkpoint and --log would meet in {twice[0]!a}; name different files"
        )
    check_writable(arguments.checkpoint)
    check_writable(arguments.log)


def check_memory(dials: Hyperparameters, vocab_size: int, device: torch.device) -> None:
    """Raise MemoryError for a run that this machine cannot hold, before the system kills it.

    Weights, gradients, AdamW's two averages, and what one step keeps: a lower bound on a CPU.
    """
    if device.type == "cuda" or not hasattr(os, "sysconf"):
        return  # a GPU, and Windows, refuse by themselves what does not fit
    parameters = count_parameters(vocab_size, dials.n_embd, dials.n_layer)
    kept = 20 * dials.n_embd * dials.n_layer + 2 * vocab_size  # numbers per position
    positions = dials.batch_size * dials.block_size
    needed = 16 * parameters + 4 * kept * positions
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > installed:
        raise MemoryError(f"{needed / 1e9:,.0f} GB are needed, {installed / 1e9:,.0f} GB installed")


def command_line(script: str, arguments: argparse.Namespace, *names: str) -> str:
    """The command that runs `script` with those of the flags `names` that are not as usual."""
    words = ["python", script]
    for name in names:
        value = getattr(arguments, name)
        if value != (FILES[name][0] if name in FILES else "auto"):
            words.append(f"--{name}={value}")  # one word: the value may begin with a dash
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def prepare(arguments: argparse.Namespace, processes: Processes) -> Optional[Run]:
    """Read text and checkpoint, check everything, build the run; None if it is finished already."""
    if processes.is_first:
        check_paths(arguments)
    training = None
    if arguments.resume:
        model, vocabulary, training = load_checkpoint(arguments.checkpoint)
        if training is None:
            say(f"the run in {arguments.checkpoint!a} is finished; there is nothing to resume")
            return None
    device, why = choose_device(arguments.device)
    dials = choose_dials(arguments, device, training)
    tokenizer, ids = load_text(arguments.input)
    text_id = fingerprint(tokenizer, ids)
    if training is not None and training.get("text") != text_id:
        raise TextError(
            f"{arguments.input!a} is not the text that the run in {arguments.checkpoint!a} learns "
            "from; name that one with --input, or start a new run without --resume"
        )
    train_ids, held_out_ids = split(ids, dials.block_size, dials.validation_fraction)
    sizes = {
        "vocab_size": tokenizer.vocab_size,
        **{n: getattr(dials, n) for n in ("block_size", "n_embd", "n_head", "n_layer", "dropout")},
    }
    if training is None:
        check_memory(dials, tokenizer.vocab_size, device)
        torch.manual_seed(dials.seed)
        model = TinyGPT(**sizes)
    elif model.arguments != sizes or vocabulary != tokenizer.characters:
        raise CheckpointError(f"{arguments.checkpoint!a} is damaged: model and dials differ")
    model.to(device).train()
    processes.join(device)
    precision = choose_precision(device)
    train_ids, held_out_ids = train_ids.to(device), held_out_ids.to(device)
    windows = math.ceil(dials.batch_size / processes.count)
    learner = compiled(model, arguments.compile, train_ids, precision, windows)
    run = Run(
        dials=dials,
        model=model,
        learner=processes.spread(learner),
        optimizer=make_optimizer(model, dials),
        precision=precision,
        train_ids=train_ids,
        held_out_ids=held_out_ids,
        progress=Progress(device),
        processes=processes,
        files=Files(arguments.checkpoint, arguments.log, tokenizer.characters, text_id),
    )
    if training is not None:
        restore(run, training)
    if not processes.is_first:  # the same dropout in all would waste the others' randomness
        torch.manual_seed(dials.seed + run.progress.step + processes.rank)
    else:
        describe(run, arguments.input, tokenizer.vocab_size, device, why)
        if training is not None:
            say(f"resuming at step {run.progress.step:,} of {run.total_steps:,}")
        run.files.find_older(run.progress.rows if training is not None else None)
    return run


def main(argv: Optional[List[str]] = None) -> int:
    """Train; return the exit status: 0, 2 for what the user can mend, 128 + signal if stopped."""
    arguments = parse(argv)
    processes = Processes()
    try:
        run = prepare(arguments, processes)
        if run is None:
            return 0
        with StopRequest() as stop:
            train(run, stop)
        return processes.leave(finish(run, arguments))
    except Stopped as stopped:
        if processes.is_first:
            command = command_line("train_model.py", arguments, *FILES, "device", "compile")
            say(f"stopped and saved; continue with:  {command} --resume")
        return processes.leave(128 + stopped.signal_number)
    except KeyboardInterrupt:
        print("stopped before the first step; nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    except (DialError, TextError, CheckpointError, DeviceError, SaveError, Diverged) as mistake:
        message = str(mistake)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            message = (
                "out of memory; lower batch_size first, then block_size, n_layer or n_embd "
                f"({reason(error)})"
            )
        elif processes.lost(error):
            message = "another process of this run has ended; its message says why"
        else:
            raise
    who = f"process {processes.rank}: " if processes.count > 1 else ""
    print(f"error: {who}{message}", file=sys.stderr)
    return processes.leave(2)


def finish(run: Run, arguments: argparse.Namespace) -> int:
    """Say what came out of the run; return the exit status."""
    if not run.processes.is_first:
        return 0
    if run.files.unsaved:
        raise SaveError(f"training is done, but its result is not saved: {run.files.unsaved}")
    best = min(run.progress.rows, key=lambda row: row[3])
    say(
        f"done: {arguments.checkpoint!a} holds the weights of epoch {best[0]}, validation loss "
        f"{best[3]:.4f}. Let it write:"
    )
    say("  " + command_line("generate_text.py", arguments, "checkpoint"))
    return 0


if __name__ == "__main__":
    steady_output()
    sys.exit(main())
