"""Chapter 4 of 5: learning from a text.

At the end of this file you know how a model that guesses blindly becomes one that writes. It reads
a batch, is told how surprised it should be at what came next (the loss), finds out in which
direction each parameter would raise that surprise (the gradient), takes a small step the other way,
and repeats: that is `train`, and what stands before it explains its lines. From the chapters before
it takes settings, batches and the model; it hands chapter 5 the file tiny_gpt_model.pth.
"""

import argparse
import contextlib
import hashlib
import io
import math
import os
import signal
import sqlite3
import sys
import tempfile
import time
from dataclasses import asdict, fields
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data_handling import fingerprint, get_batch, load_text, shuffled_sequences, split
from generate_text import choose_device
from hyperparameters import GPU, LAPTOP, Hyperparameters, Parser, UserError, end_with_a_sentence
from model_architecture import (
    FORMAT,
    SIZES,
    UNREADABLE,
    CausalConvolution,
    TinyGPT,
    check_tensors,
    load_checkpoint,
    reason,
)


@torch.no_grad()
def evaluate(model: TinyGPT, ids: torch.Tensor) -> float:
    """The mean loss of `model` over all whole sequences of `ids`, in nats a character.

    The model gives every character a probability p to come next. Its loss is the surprise at the
    one that came, -ln p: 0 if it was sure of it, ln(V) if it guessed blindly among V characters,
    more if it was sure of another. Its unit, from the natural logarithm, is the nat; its mean is
    called the cross-entropy. Random batches would give another figure every time; all sequences,
    side by side, give one that repeats to the last digit. Dropout is off meanwhile.
    """
    block_size, was_training, total = model.block_size, model.training, 0.0
    starts = torch.arange(0, len(ids) - block_size, block_size, device=ids.device)
    model.eval()
    for some in starts.split(max(1, 8_192 // block_size)):  # (B,): 8,192 characters at once
        inputs, targets = get_batch(ids, some, block_size)  # (B, T) each
        logits = model(inputs)  # (B, T, V)
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    model.train(was_training)
    return total / (len(starts) * block_size)


def learning_rate_at(step: int, total_steps: int, settings: Hyperparameters) -> float:
    """The learning rate, the size of a step, at step number `step`, counted from 0.

    The first gradients point in no direction worth following far, and the optimizer's averages,
    below, are still empty: so the rate climbs during warm-up. From there it falls on a straight
    line to zero: large steps find the region, small ones settle in it.
    """
    warmup = min(settings.warmup_steps, total_steps // 10)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    return settings.learning_rate * (total_steps - step) / (total_steps - warmup)


def make_optimizer(model: TinyGPT, settings: Hyperparameters) -> torch.optim.AdamW:
    """AdamW, which gives every parameter a step size of its own (Loshchilov & Hutter 2019).

    Some parameters have gradients a thousand times those of others; one step size would be too
    large for these or too small for those. AdamW steps against the average of a parameter's recent
    gradients (PyTorch calls it exp_avg), divided by their usual size, the root of the average of
    their squares (exp_avg_sq, which forgets the more slowly the larger beta2 is).

    By weight decay, a number loses the share learning_rate * weight_decay of itself at every step,
    so that only what many examples ask for stays. Nearly all parameters are in the large matrices,
    and only these have room to learn a text by heart. The convolutions, with three factors for each
    of C numbers, have not, and are spared.
    """
    matrices = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    factors = [m.weight for m in model.modules() if isinstance(m, CausalConvolution)]
    decayed = {"params": matrices, "weight_decay": settings.weight_decay}
    spared = {"params": factors, "weight_decay": 0.0}
    # fused: one step for all parameters at once, which PyTorch has on a CPU since 2.4.
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    fused = {"cuda": True, "cpu": version >= (2, 4)}.get(matrices[0].device.type, False)
    return torch.optim.AdamW([decayed, spared], lr=0.0, betas=(0.9, settings.beta2), fused=fused)


def train(run: "Trainer") -> None:
    """Learn, from where the run stands to the end of its last epoch.

    The comment behind a call of `run` is the plain PyTorch for it; class Trainer has the rest.
    """
    model, optimizer, settings = run.model, run.optimizer, run.settings
    for epoch in range(len(run.history), settings.epochs):
        for starts in run.batches(epoch):  # (B,)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(run.step, run.total_steps, settings)
            inputs, targets = get_batch(run.train_ids, run.share(starts), settings.block_size)
            logits = run.forward(inputs)  # model(inputs): (B, T) to (B, T, V)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            loss = loss / (len(starts) * settings.block_size)  # the mean over B * T lessons

            # By the chain rule, backward finds how the loss would change with each parameter: its
            # gradient. PyTorch adds it to what is there, so the batch before is cleared first.
            optimizer.zero_grad(set_to_none=True)
            run.backward(loss)  # loss.backward()
            # One odd batch can have gradients a hundred times as long as usual, taken as one
            # vector, and would stay in AdamW's averages for long. It is cut to a usual length.
            nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
            run.optimizer_step()  # optimizer.step()
            run.finish_step(loss, len(starts))

        val_loss = evaluate(model, run.val_ids)
        run.finish_epoch(val_loss)
        report(run)
        save(run)


class Trainer:
    """All that one run carries: what it is made of, and how far it has come."""

    def __init__(self, settings: Hyperparameters, tokenizer: Any, ids: Any, device: Any) -> None:
        self.settings, self.vocabulary = settings, tokenizer.characters
        self.text = fingerprint(tokenizer, ids)
        train_ids, val_ids = split(ids, settings.block_size, settings.validation_fraction)
        self.train_ids, self.val_ids = train_ids.to(device), val_ids.to(device)
        self.sequences = len(self.shuffled(0))  # in every epoch
        self.steps_per_epoch = math.ceil(self.sequences / settings.batch_size)
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.sizes = {name: getattr(settings, name) for name in SIZES}
        self.model = TinyGPT(tokenizer.vocab_size, **self.sizes).to(device).train()
        self.optimizer = make_optimizer(self.model, settings)

        self.step = 0  # optimizer steps taken, over all epochs
        self.history: List[List[float]] = []  # the finished epochs, a row each, as in the log
        self.seconds = 0.0  # spent on steps
        self.best_loss, self.best_parameters = math.inf, None  # of the best epoch so far
        # Losses are added up where they are: fetching each would make a GPU wait. (No float64: MPS)
        kind = torch.float32 if device.type == "mps" else torch.float64
        self.loss_sum = torch.zeros((), dtype=kind, device=device)  # of this epoch's sequences
        set_up_session(self, device)  # rank, world_size, network, number_format, scaler

    def shuffled(self, epoch: int) -> torch.Tensor:
        length, block_size = len(self.train_ids), self.settings.block_size
        starts = shuffled_sequences(length, block_size, self.settings.seed, epoch)  # (sequences,)
        return starts.to(self.train_ids.device)

    def batches(self, epoch: int) -> Tuple[torch.Tensor, ...]:
        """Where the sequences begin, (B,) a batch, for the batches of this epoch still to come."""
        self.clock = time.perf_counter() - self.seconds
        batches = self.shuffled(epoch).split(self.settings.batch_size)
        return batches[self.step - epoch * self.steps_per_epoch :]

    def finish_step(self, loss: torch.Tensor, sequences: int) -> None:
        self.loss_sum += loss.detach() * sequences
        self.step += 1
        self.seconds = time.perf_counter() - self.clock
        self.bar.update()
        save_or_stop_if_due(self)

    def finish_epoch(self, val_loss: float) -> None:
        train_loss = over_all(self, self.loss_sum) / self.sequences
        refuse_divergence(self, train_loss + val_loss)
        if val_loss < self.best_loss:
            self.best_loss = val_loss
            self.best_parameters = {n: p.cpu().clone() for n, p in self.model.state_dict().items()}
        epoch = len(self.history) + 1
        self.history.append([epoch, self.step, train_loss, val_loss, self.seconds])
        self.loss_sum.zero_()

    def state_dict(self) -> Dict[str, Any]:
        """What an exact resume needs, in tensors and plain Python.

        The settings, and a fingerprint of the text to refuse another: a run goes on as it began, or
        not at all. The step, from which rate, epoch and batch follow; the log so far, its best loss
        and the sum of this epoch's losses, to go on with them. The parameters; those of the best
        epoch, to write with, stand beside this in the file, with the vocabulary. AdamW's averages,
        without which its first steps would be blind; the scale of float16; and the state of the
        random numbers, from which dropout draws.
        """
        on_cuda = self.train_ids.is_cuda
        return {
            "settings": asdict(self.settings),
            "text": self.text,
            "step": self.step,
            "history": self.history,
            "seconds": self.seconds,
            "loss_sum": over_all(self, self.loss_sum),
            "best_loss": self.best_loss,
            "parameters": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict()["state"],
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.train_ids.device) if on_cuda else None,
        }

    def load_state_dict(self, state: Dict[str, Any], best: Dict[str, torch.Tensor]) -> None:
        """Go back to where `state_dict` was called; `best` are the best parameters at that time."""
        self.step, self.history, self.seconds = state["step"], state["history"], state["seconds"]
        self.best_loss, self.best_parameters = state["best_loss"], best if self.history else None
        self.loss_sum.fill_(state["loss_sum"] if self.rank == 0 else 0.0)
        self.model.load_state_dict(state["parameters"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None and self.train_ids.is_cuda:
            torch.cuda.set_rng_state(state["random_cuda"], self.train_ids.device)

    # What differs with several processes, or in 16 bits. Each process has a share of every batch,
    # and their gradients are averaged: so each loss is multiplied by their number. Small gradients
    # would vanish in float16: the scaler enlarges the loss, and so them, for a while.

    def share(self, starts: torch.Tensor) -> torch.Tensor:
        return starts[self.rank :: self.world_size]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        plain, device = self.number_format == torch.float32, inputs.device.type
        with contextlib.nullcontext() if plain else torch.autocast(device, self.number_format):
            return self.network(inputs).float()

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss * self.world_size).backward()
        self.scaler.unscale_(self.optimizer)

    def optimizer_step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()


def report(run: Trainer) -> None:
    """One line for the epoch that just ended.

    While both losses fall, the model learns. When the validation loss rises and the training loss
    still falls, it begins to learn its text by heart (over-fitting): a longer text, more dropout or
    a smaller model helps, and the file keeps the best epoch. (Of an epoch, the training loss is the
    average, the validation loss that at its end: so at first it may be the lower one.)
    """
    epoch, step, train, val, seconds = run.history[-1]
    speed = epoch * run.sequences * run.settings.block_size / max(seconds, 1e-9)
    left = tqdm.format_interval((run.total_steps - step) * seconds / step)
    losses = f"train loss {train:.4f}  val loss {val:.4f} ({val / math.log(2):.3f} bits/char)"
    count = f"epoch {epoch}/{run.settings.epochs}  step {step:,}"
    say(run, f"{count}  {losses}  {speed:,.0f} chars/s  {left} left")


# ---- The fold: a first reader goes on to generate_text.py here. What protects stands below. ------


def say(run: Trainer, line: str) -> None:
    """Print, in the first process, beside the progress bar. A broken stdout must not end a run."""
    try:
        if run.rank == 0:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def set_up_session(run: Trainer, device: torch.device) -> None:
    """Give a run what belongs to this process, on this device, and to no checkpoint."""
    run.rank, run.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    run.stop_signal, run.last_save, run.unsaved = 0, time.monotonic(), ""
    run.network, run.number_format = run.model, torch.float32
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # what stays in 32 bits may use TF32
        # is_bf16_supported() would also say yes to a slow emulation.
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        run.number_format = torch.bfloat16 if has_bfloat16 else torch.float16
    old = torch.cuda.amp.GradScaler  # in PyTorch 2.2, the last on Intel Macs
    scaler = getattr(torch.amp, "GradScaler", lambda _, enabled: old(enabled=enabled))
    run.scaler = scaler(device.type, enabled=run.number_format == torch.float16)


def compile_and_spread(run: Trainer, wanted: str) -> None:
    """Compile the network, if wanted ("auto": on CUDA) and possible; spread it over processes."""
    ids, settings = run.train_ids, run.settings
    if wanted == "on" or (wanted == "auto" and ids.is_cuda):
        run.network = torch.compile(run.model, dynamic=False)
        starts = run.share(torch.zeros(settings.batch_size, dtype=torch.long, device=ids.device))
        try:
            with torch.random.fork_rng([ids.device] if ids.is_cuda else []):
                run.forward(get_batch(ids, starts, settings.block_size)[0]).sum().backward()
        except (OSError, ImportError, *UNREADABLE) as error:
            run.network = run.model
            say(run, f"warning: the model cannot be compiled here: {reason(error)}")
        run.model.zero_grad(set_to_none=True)
    if run.world_size > 1:
        dist.init_process_group("nccl" if ids.is_cuda else "gloo")
        run.group = dist.new_group(backend="gloo")  # for numbers that are not on a GPU
        run.network = nn.parallel.DistributedDataParallel(run.network)
        if run.rank > 0:  # the same dropout everywhere would waste the others' randomness
            torch.manual_seed(settings.seed + run.step + run.rank)


def over_all(run: Trainer, value: torch.Tensor, how: Any = dist.ReduceOp.SUM) -> Any:
    """The sum, or another combination, of the `value` that each process brings."""
    value = value.detach().cpu().clone()
    if run.world_size > 1:
        dist.all_reduce(value, op=how, group=run.group)
    return value.tolist()


def note_signals(run: Trainer, session: contextlib.ExitStack) -> None:
    """The first Ctrl-C or SIGTERM waits for the end of the step; a second quits at once."""
    numbers = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]

    def note(number: int, _: Any) -> None:
        run.stop_signal = number
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)

    for number in numbers:
        # A SIGHUP that is ignored is nohup's doing: the run is to outlive its terminal.
        if number in numbers[:2] or signal.getsignal(number) != signal.SIG_IGN:
            session.callback(signal.signal, number, signal.signal(number, note))


def save_or_stop_if_due(run: Trainer) -> None:
    """After a step: see that the loss is a number, save when it is time, stop when asked to."""
    due = time.monotonic() - run.last_save > 60 * run.settings.save_minutes
    votes = torch.tensor([run.stop_signal, due], dtype=torch.long)
    stop_signal, due = over_all(run, votes, dist.ReduceOp.MAX)  # all after the same step
    if stop_signal or due or run.step % 50 == 0:
        refuse_divergence(run, run.loss_sum.item())
    if stop_signal or due:
        save(run)
    if stop_signal:
        if run.unsaved:
            raise UserError(f"stopped at step {run.step:,}, but not saved: {run.unsaved}")
        say(run, "stopped and saved; the same command with --resume behind it continues")
        raise SystemExit(128 + stop_signal)


def refuse_divergence(run: Trainer, loss: float) -> None:
    """Raise UserError when the loss or a parameter has become NaN or infinite."""
    if not math.isfinite(loss) or not all(torch.isfinite(p).all() for p in run.model.parameters()):
        hint = f"start anew with a learning_rate below {run.settings.learning_rate:g}"
        raise UserError(f"the loss is no longer a number at step {run.step:,}; {hint}")


def save(run: Trainer) -> None:
    """Write log and checkpoint. A full disk must not end a night of training: it is only said."""
    run.last_save = time.monotonic()
    contents = {"format": FORMAT, "sizes": run.sizes, "vocabulary": run.vocabulary}
    contents["parameters"] = run.best_parameters or dict(run.model.state_dict())
    if len(run.history) < run.settings.epochs:
        contents["training"] = run.state_dict()  # all processes take part in this
    if run.rank > 0:
        return
    try:
        while run.older:  # files of another run
            with open(run.older[0], "rb") as file:
                write_whole(previous_name(run.older[0]), file.read())
            say(run, f"kept what was there as {previous_name(run.older.pop(0))!a}")
        if run.history:  # first: a resumed run writes it again, a finished one could not
            write_whole(run.training_log, log_text(run.history))
        file = io.BytesIO()
        torch.save(contents, file)
        write_whole(run.checkpoint, file.getbuffer())
        run.unsaved = ""
    except (OSError, UserError) as error:
        run.unsaved = reason(error)
        say(run, f"warning: not saved at step {run.step:,}: {run.unsaved}")


def log_text(history: List[List[float]]) -> bytes:
    """training_log.csv: a header and one row per finished epoch; losses in nats a character."""
    rows = [",".join(map(repr, row[:4])) + f",{row[4]:.1f}" for row in history]
    return "\n".join(["epoch,step,train_loss,val_loss,seconds", *rows, ""]).encode("ascii")


def previous_name(path: str) -> str:
    """The name beside `path` under which an older file of that name is kept."""
    return "{}.previous{}".format(*os.path.splitext(path))


def write_whole(path: str, data: Any) -> None:
    """Make `data` the file `path`, which is the old or the new one at any moment, even of a crash.

    Raises UserError when the system refuses; then nothing of the new one stays behind.
    """
    part = f"{os.path.realpath(path)}.part"
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name points to it
        os.replace(part, os.path.realpath(path))
    except OSError as error:
        needed = f"{len(data) / 1e6:.1f} MB are needed in its folder"
        raise UserError(f"cannot write {path!a}: {reason(error)}; {needed}") from error
    finally:
        with contextlib.suppress(OSError):  # it is gone if all went well
            os.remove(part)


def refuse_bad_names(paths: List[str], text: str, session: contextlib.ExitStack) -> None:
    """Raise UserError for files that cannot be written, or that something else would replace."""
    names = [text, *paths, *map(previous_name, paths), *map("{}.part".format, paths)]
    if len({os.path.realpath(name) for name in names}) < len(names):
        raise UserError("--input, --checkpoint and --training_log must have names of their own")
    for path in paths:
        if not path or (os.path.exists(path) and not os.path.isfile(path)):
            raise UserError(f"{path!a} is not a file and cannot be replaced by one; name another")
        refuse_a_second_run(path, session)
        write_whole(f"{path}.part", b"")  # raises UserError where nothing can be written
        os.remove(f"{path}.part")


def refuse_a_second_run(path: str, session: contextlib.ExitStack) -> None:
    """Raise UserError if another run writes to `path`. Where there are no locks, the run goes on.

    SQLite has locks for all systems, which end with the session or the process, however it ends.
    Ours is on an empty temporary file, so that the checkpoint can be read meanwhile.
    """
    name = hashlib.sha256(os.path.normcase(os.path.realpath(path)).encode("utf-8", "replace"))
    try:
        folder, name = tempfile.gettempdir(), f"tiny_gpt_{name.hexdigest()[:24]}.lock"
        lock = sqlite3.connect(os.path.join(folder, name), timeout=0)
        session.callback(lock.close)
        lock.execute("BEGIN EXCLUSIVE")
    except (OSError, sqlite3.OperationalError) as error:
        if "locked" in str(error):
            hint = "wait for it, or name other files with --checkpoint and --training_log"
            raise UserError(f"another run is writing {path!a}; {hint}") from error


def choose_settings(flags: Any, device: torch.device, saved: Any) -> Hyperparameters:
    """The preset, changed by the flags; on resume the saved settings, which no flag may change."""
    given = {name: value for name, value in vars(flags).items() if hasattr(LAPTOP, name)}
    gpu = flags.preset == "gpu" or (flags.preset == "auto" and device.type != "cpu")
    wanted = {**asdict(GPU if gpu else LAPTOP), **given}
    if saved is None:
        return Hyperparameters(**wanted)
    settings, asked = Hyperparameters(**saved), given if flags.preset == "auto" else wanted
    pairs = [(name, value, asked.get(name, value)) for name, value in asdict(settings).items()]
    different = [
        f"{name} is {value}, not {other}" for name, value, other in pairs if value != other
    ]
    if different:
        hint = "leave these flags out, or start anew without --resume"
        raise UserError(f"it has other settings ({', '.join(different)}); {hint}")
    return settings


def resume(run: Trainer, best: Dict[str, Any], vocabulary: str, state: Dict[str, Any]) -> None:
    """Continue the run that left `state` and the parameters `best`. Raises UserError if forged."""
    if state["text"] != run.text or vocabulary != run.vocabulary:
        raise UserError("it learns from another text; name that one with --input")
    expected, history = run.state_dict(), state["history"]
    fit = all(type(state[k]) is type(v) for k, v in expected.items() if k != "random_cuda")
    fit = fit and all(type(row) is list and len(row) == 5 for row in history)
    fit = fit and len(history) < run.settings.epochs and state["random"].numel() < 10_000
    numbers = [state["seconds"], state["loss_sum"], *state["scaler"].values()] if fit else [None]
    fit = all(type(x) in (int, float) and abs(x) < 1e15 for row in [numbers, *history] for x in row)
    if (
        not fit
        or not 0 <= state["step"] - len(history) * run.steps_per_epoch <= run.steps_per_epoch
    ):
        raise UserError("its parts do not fit together")
    check_tensors("best parameters", best, expected["parameters"])
    check_tensors("parameters", state["parameters"], best)
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    for index, one in enumerate(parameters if state["optimizer"] else []):
        like = {"step": torch.zeros(()), "exp_avg": one, "exp_avg_sq": one}
        check_tensors("optimizer", state["optimizer"][index], like)
    run.load_state_dict(state, best)


def prepare(flags: argparse.Namespace) -> Trainer:
    """Read text and checkpoint, check everything, build the run and say what it is."""
    best, vocabulary, state = load_checkpoint(flags.checkpoint) if flags.resume else [None] * 3
    if flags.resume and state is None:
        print(f"the run in {flags.checkpoint!a} is finished; there is nothing to resume")
        raise SystemExit(0)
    device, why = choose_device(flags.device)
    try:
        if flags.resume and type(state) is not dict:
            raise UserError("its unfinished run is damaged")
        settings = choose_settings(flags, device, state["settings"] if flags.resume else None)
        if flags.resume and best.sizes != {name: getattr(settings, name) for name in SIZES}:
            raise UserError("its settings are not those of its model")
        torch.manual_seed(settings.seed)  # for initialisation and dropout
        run = Trainer(settings, *load_text(flags.input), device)
        if flags.resume:
            resume(run, dict(best.state_dict()), vocabulary, state)
    except UNREADABLE as error:  # UserError is among them
        if not flags.resume:
            raise
        raise UserError(f"cannot resume {flags.checkpoint!a}: {reason(error)}") from error
    run.checkpoint, run.training_log = flags.checkpoint, flags.training_log
    # What a save would replace, except what this very run, if it is resumed, wrote.
    run.older = [path for path in (run.checkpoint, run.training_log) if os.path.exists(path)]
    if flags.resume:
        run.older.remove(run.checkpoint)
        with contextlib.suppress(OSError), open(run.training_log, "rb") as file:
            present, ours = file.read(), log_text(run.history)
            run.older = [] if present.startswith(ours) or ours.startswith(present) else run.older
    compile_and_spread(run, flags.compile)
    V, train, val = len(run.vocabulary), len(run.train_ids), len(run.val_ids)
    parameters = sum(p.numel() for p in run.model.parameters())
    say(run, f"device    {device} ({why}), {str(run.number_format)[6:]} matrix products")
    say(
        run, f"text      {V} different characters; blind guessing costs {math.log(V):.4f} nats each"
    )
    say(run, f"split     {train:,} characters to learn from, {val:,} to measure on")
    say(run, f"model     {parameters:,} parameters, from {run.step:,} steps of training")
    say(run, f"training  {settings.epochs} epochs of {run.steps_per_epoch:,} steps")
    return run


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The flags of `python train_model.py`, one for every setting among them."""
    parser = Parser("train_model.py", description="Train TinyGPT on a text.", allow_abbrev=False)
    add, file = parser.add_argument, {"metavar": "FILE"}
    add("--input", default="input.txt", help="the text (%(default)s)", **file)
    add("--checkpoint", default="tiny_gpt_model.pth", help="the model (%(default)s)", **file)
    add("--training_log", default="training_log.csv", help="the losses (%(default)s)", **file)
    devices, presets, modes = (
        ["auto", "cpu", "cuda", "mps"],
        ["auto", "laptop", "gpu"],
        ["on", "off"],
    )
    add("--device", default="auto", choices=devices, help="auto: a CUDA GPU if it works")
    add("--preset", default="auto", choices=presets, help="settings to begin with, by the device")
    how = {"nargs": "?", "const": "on", "default": "auto", "choices": ["auto", *modes]}
    add("--compile", help="compile the model; auto: on a GPU", **how)
    add("--resume", action="store_true", help="continue the run in the checkpoint")
    group = parser.add_argument_group("settings (laptop / GPU)", argument_default=argparse.SUPPRESS)
    for one in fields(Hyperparameters):
        text = f"{one.metadata['help']} ({one.default} / {one.metadata['gpu']})"
        group.add_argument(f"--{one.name}", type=one.type, metavar="X", help=text)
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> None:
    """Train as the flags say."""
    flags = parse(argv)
    with contextlib.ExitStack() as session:
        if os.environ.get("RANK", "0") == "0":
            refuse_bad_names([flags.checkpoint, flags.training_log], flags.input, session)
        run = prepare(flags)
        # One bar over the whole run: its time left says how long it takes. Where stderr is no
        # terminal there is none (None), and the line per epoch has to do.
        bar = tqdm(initial=run.step, total=run.total_steps, disable=True if run.rank else None)
        run.bar = session.enter_context(bar)
        note_signals(run, session)
        try:
            train(run)
        except RuntimeError as error:
            if run.world_size == 1 or "memory" in str(error):
                raise
            raise UserError(f"another process of this run has ended ({reason(error)})") from error
        if run.unsaved:
            raise UserError(f"training is done, but its result is not saved: {run.unsaved}")
        best = min(run.history, key=lambda row: row[3])
        say(run, f"done: {run.checkpoint!a} has epoch {best[0]}, validation loss {best[3]:.4f}")
        say(run, f"let it write:  python generate_text.py --checkpoint {run.checkpoint!a}")


if __name__ == "__main__":
    status = end_with_a_sentence(main, lower="batch_size, block_size, n_layer or n_embd")
    sys.stdout.flush()
    if dist.is_available() and dist.is_initialized():
        os._exit(status)  # PyTorch 2.4 can hang in parting
    sys.exit(status)
