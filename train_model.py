"""Chapter 4 of 5: learning from a text.

At the end of this file you know how a model that guesses blindly becomes one that writes. It reads
a batch; its surprise at what came next is measured (the loss), and the slope of the loss along each
parameter (all slopes together: the gradient); each parameter takes a small step downhill; and so
on: that is `train`, and what stands before it explains its lines. From chapters 1 to 3 come
settings, batches, model; chapter 5 lends `generate`, and gets the file tiny_gpt_model.pth.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import math
import os
import signal
import sqlite3
import sys
import tempfile
import time
from dataclasses import asdict, fields, replace
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data_handling import get_batch, load_text, shuffled_sequences, split
from generate_text import choose_device, generate, picture, read_prompt, write_picture, write_whole
from hyperparameters import GPU, LAPTOP, Hyperparameters, Parser, UserError, end_with_a_sentence
from model_architecture import FORMAT, SIZES, TinyGPT, check_like, load_checkpoint, reason


def total_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The losses of all lessons, added up: logits (B, T, V) and targets (B, T).

    Softmax turns the logits into probabilities (cross_entropy does so inside). If the character
    that came had probability p, its loss is the surprise -ln p: 0 if the model was sure, ln(V) if
    it guessed blindly among V characters, more if it was sure of another. Its unit, from the
    natural logarithm, is the nat (1.44 bits); its mean is called the cross-entropy.
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


@torch.no_grad()
def evaluate(model: TinyGPT, ids: Tensor) -> float:
    """The mean loss of `model` over all whole sequences of `ids`, in nats a character.

    Random batches would give another figure every time; all sequences, side by side, the same.
    Dropout is off, and as nothing is learned here, PyTorch need not prepare for slopes (no_grad).
    """
    block_size, was_training, total = model.block_size, model.training, 0.0
    starts = torch.arange(0, len(ids) - block_size, block_size, device=ids.device)
    model.eval()
    for some in starts.split(max(1, 8_192 // block_size)):  # (B,): 8,192 characters or one sequence
        inputs, targets = get_batch(ids, some, block_size)  # (B, T) each
        logits = model(inputs)  # (B, T, V)
        total += total_loss(logits, targets).item()
    model.train(was_training)
    return total / (len(starts) * block_size)


def learning_rate_at(step: int, total_steps: int, settings: Hyperparameters) -> float:
    """The learning rate, the size of a step, at step number `step`, counted from 0.

    The first slopes point in no direction worth following far, and the averages in make_optimizer,
    below, rest on few of them: so for warmup_steps the rate climbs. (Without that, large models can
    break; ours did not in 500 steps.) Then it falls on a straight line to zero: large steps find
    the region, small ones settle in it.
    """
    warmup = min(settings.warmup_steps, total_steps // 10)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    return settings.learning_rate * (total_steps - step) / (total_steps - warmup)


def sequence_length_at(epoch: int, settings: Hyperparameters) -> int:
    """How many characters the sequences of epoch 0, 1, ... have: few at first, if epochs allow.

    A model learns letters and words before it learns how lines follow each other, and short
    sequences do for those, with less work in attention. So in the first half of the epochs they
    have block_size / 4 characters, four times as many in a batch; then block_size / 2; and the
    last quarter of the epochs shows the larger distances, too. (after Press et al. 2021)
    """
    done = (epoch + 1) / settings.epochs
    parts = 4 if done <= 1 / 2 else 2 if done <= 3 / 4 else 1
    return max(settings.block_size // parts, 1)


def make_optimizer(model: TinyGPT, settings: Hyperparameters) -> torch.optim.AdamW:
    """The optimizer, which makes steps of slopes: AdamW (Loshchilov & Hutter 2019).

    Simplest would be `parameter -= rate * slope`. But one slope can be a thousand times another;
    no rate suits both. In AdamW, `parameter -= rate * average / (usual + 1e-8)`. Each step,
    `average` is 0.9 of the old one + 0.1 of the new slope; `usual` the root of such an average of
    squares (beta2 for 0.9). Both begin at 0, and are enlarged to make up for it. If the slopes of
    many steps agree, the quotient is about 1 or -1, a step as large as the rate; if not, smaller.

    By weight decay, a number loses the share rate * weight_decay of itself at every step, so that
    only what many examples ask for stays. (What counts is the share lost in an epoch: for half as
    many steps, take twice the weight decay; Wang & Aitchison 2024.) Nearly all parameters are in
    the large matrices, the embedding's among them, and only these have room to learn a text by
    heart. The convolutions, with three factors for each of C numbers, have not, and are spared.
    """
    parameters = list(model.named_parameters())
    matrices = [p for name, p in parameters if "convolution" not in name]
    factors = [p for name, p in parameters if "convolution" in name]
    decayed = {"params": matrices, "weight_decay": settings.weight_decay}
    spared = {"params": factors, "weight_decay": 0.0}
    # `train` sets lr. fused: all at once; on CPUs since PyTorch 2.4 (versions compare as numbers).
    fused = matrices[0].device.type in (["cuda", "cpu"] if torch.__version__ >= "2.4" else ["cuda"])
    return torch.optim.AdamW([decayed, spared], lr=0.0, betas=(0.9, settings.beta2), fused=fused)


def train(run: "Trainer") -> None:
    """Learn, from where the run stands to the end of its last epoch.

    `run` is a Trainer, below. A comment like `# optimizer.step()` is what its line does at heart.
    """
    model, optimizer, settings = run.model, run.optimizer, run.settings
    for epoch in range(len(run.history), settings.epochs):
        T = sequence_length_at(epoch, settings)
        model.train()  # with dropout, which measuring and writing do without
        for starts in run.batches(epoch):  # (B,)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(run.step, run.total_steps, settings)
            share = starts[run.rank :: run.world_size]  # all, if there is one process, rank 0 of 1
            inputs, targets = get_batch(run.train_ids, share, T)  # (B, T) each
            logits, after_next = run.forward(inputs)  # model(inputs, both=True): (B, T, V) each
            loss = total_loss(logits, targets) / (len(starts) * T)  # the mean over B * T lessons
            # In training, each position also guesses the next character but one, the target of its
            # right neighbour (the last has none). No text is written by that guess: it is there to
            # improve the C numbers that both guesses are made from. (after Gloeckle et al. 2024)
            second_loss = total_loss(after_next[:, :-1], targets[:, 1:]) / (len(starts) * T)
            left = 1 - run.step / run.total_steps  # 1 to 0: the second loss counts 0.3, then less

            # Backward finds all slopes in one walk from the loss back to the ids, as the slopes of
            # nested functions multiply (chain rule). It adds to old slopes, so these are cleared.
            optimizer.zero_grad()
            run.backward(loss + 0.3 * left * second_loss)  # (...).backward()
            # The gradient, all slopes as one vector, can be far longer than usual for an odd batch,
            # and rule AdamW's averages for dozens of steps; so it is shortened to gradient_clip.
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
            run.optimizer_step()  # optimizer.step()
            run.finish_step(loss)

        val_loss = evaluate(model, run.val_ids)
        run.finish_epoch(val_loss)
        report(run)
        save(run)


def report(run: "Trainer") -> None:
    """One line for the epoch that just ended, and a sample of what the model writes by now.

    The training loss is the epoch's average, with dropout, in early epochs on short sequences; the
    validation loss, taken at its end, without dropout, at full length, may be the lower. While both
    fall, the model learns; when only the validation loss rises, it mostly learns by heart.
    """
    epoch, step, train_loss, val_loss, _ = run.history[-1]
    speed = epoch * len(run.train_ids) / run.seconds
    left = tqdm.format_interval((run.total_steps - step) * run.seconds / step)
    losses = f"step {step:,}  train loss {train_loss:.4f}  val loss {val_loss:.4f}"
    losses += f" ({val_loss / math.log(2):.3f} bits/char)  {speed:,.0f} chars/s  {left} left"
    say(run, f"epoch {epoch}/{run.settings.epochs}  {losses}")
    before = run.history[max(0, epoch - 2)]  # [2] is a training loss, [3] a validation loss
    if train_loss < before[2] and val_loss > before[3] == min(row[3] for row in run.history):
        hint = "more --weight_decay, --dropout or text helps; the best epoch is kept"
        say(run, f"over-fitting: it seems to learn its text by heart now, and no other; {hint}")
    for line in sample(run).splitlines():
        say(run, f"    {line}")


def sample(run: "Trainer") -> str:
    """What it writes after a line end: `sample_characters`, or as many as a second suffices for."""
    tokenizer, end = run.tokenizer, time.perf_counter() + 1.0
    count = run.settings.sample_characters if run.rank == 0 else 0
    prompt = torch.from_numpy(tokenizer.encode(read_prompt(None, tokenizer))).long()  # (1,)
    generator = torch.Generator().manual_seed(run.settings.seed)  # not the one that dropout uses
    drawn = generate(run.model, prompt[None], count, generator, temperature=0.8)
    return tokenizer.decode(itertools.takewhile(lambda _: time.perf_counter() < end, drawn))


class Trainer:
    """All that one run carries. Below finish_epoch (skip it): resuming, several GPUs, 16 bits."""

    def __init__(self, flags: Any, settings: Hyperparameters, device: torch.device) -> None:
        self.flags, self.settings = flags, settings
        self.tokenizer, ids = load_text(flags.input)
        self.text = hashlib.sha256(ids.numpy()).hexdigest()
        parts = split(ids.to(device), settings.block_size, settings.validation_fraction)
        self.train_ids, self.val_ids = parts
        sequences = len(shuffled_sequences(len(parts[0]), settings.block_size, 0, epoch=0))
        self.steps_per_epoch = math.ceil(sequences / settings.batch_size)
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.sizes = {name: getattr(settings, name) for name in SIZES}
        torch.manual_seed(settings.seed)  # for initialisation and dropout
        self.model = TinyGPT(self.tokenizer.vocab_size, **self.sizes).to(device)
        self.optimizer = make_optimizer(self.model, settings)

        self.step = 0  # optimizer steps taken, over all epochs
        self.history: List[List[float]] = []  # the finished epochs, a row each, as in the log
        self.seconds = 0.0  # spent on steps
        self.best_parameters: Optional[Dict[str, Tensor]] = None  # of the best epoch so far
        # Summed on the device, as fetching makes a GPU wait; exact in any order (MPS: no float64).
        kind = torch.float32 if device.type == "mps" else torch.float64
        self.loss_sum = torch.zeros((), dtype=kind, device=device)  # over this epoch's steps
        set_up_session(self, device)  # rank: number of this process, of world_size; scaler; ...

    def batches(self, epoch: int) -> Tuple[Tensor, ...]:
        """The batches of this epoch to come, (B,) starts each: B grows as sequences shrink."""
        self.clock, T = time.perf_counter() - self.seconds, sequence_length_at(epoch, self.settings)
        starts = shuffled_sequences(len(self.train_ids), T, self.settings.seed, epoch)
        batches = starts.to(self.train_ids.device).tensor_split(self.steps_per_epoch)
        return batches[self.step - epoch * self.steps_per_epoch :]

    def finish_step(self, loss: Tensor) -> None:
        self.loss_sum += loss.detach()
        self.step += 1
        self.seconds = time.perf_counter() - self.clock
        self.bar.update()
        save_or_stop_if_due(self)

    def finish_epoch(self, val_loss: float) -> None:
        train_loss = over_all(self, self.loss_sum) / self.steps_per_epoch
        refuse_divergence(self, train_loss + val_loss)
        if val_loss < min((row[3] for row in self.history), default=math.inf):
            self.best_parameters = {n: p.cpu().clone() for n, p in self.model.state_dict().items()}
        epoch = len(self.history) + 1
        self.history.append([epoch, self.step, train_loss, val_loss, round(self.seconds, 1)])
        self.loss_sum.zero_()

    def state_dict(self) -> Dict[str, Any]:
        """What an exact resume needs, in tensors and plain Python."""
        return {
            "settings": asdict(self.settings),  # a run goes on as it began, or not at all
            "text": self.text,  # a fingerprint of the ids, to refuse another text
            "step": self.step,  # from which rate and batch follow
            "history": self.history,  # the log so far; its length says which epoch it is
            "seconds": self.seconds,
            "loss_sum": over_all(self, self.loss_sum),  # of this epoch, to go on with
            "parameters": dict(self.model.state_dict()),  # the newest; the best stand beside this
            "optimizer": self.optimizer.state_dict()["state"],  # AdamW's averages
            "scaler": self.scaler.state_dict(),  # of float16, see below
            "random": torch.get_rng_state(),  # from which dropout draws
            "random_cuda": torch.cuda.get_rng_state() if self.train_ids.is_cuda else None,
        }

    def load_state_dict(self, state: Dict[str, Any], best: Dict[str, Tensor]) -> None:
        """Go back to where `state_dict` was called; `best` are the best parameters at that time."""
        self.step, self.history, self.seconds = state["step"], state["history"], state["seconds"]
        self.best_parameters = best if self.history else None
        self.loss_sum.fill_(state["loss_sum"] if self.rank == 0 else 0.0)
        self.model.load_state_dict(state["parameters"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state["optimizer"]})
        self.scaler.load_state_dict(state["scaler"] or self.scaler.state_dict())
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None and self.train_ids.is_cuda:
            torch.cuda.set_rng_state(state["random_cuda"])

    # Of several processes, each has a share of every batch. PyTorch averages their gradients, but
    # the loss is already divided by the whole batch: so it is multiplied by their number. GPUs
    # are quicker in 16 bits; but in float16 small slopes become 0: so the scaler enlarges the loss.

    def forward(self, inputs: Tensor) -> List[Tensor]:
        plain, device = self.number_format == torch.float32, inputs.device.type
        some = inputs if len(inputs) else inputs.new_zeros(1, inputs.shape[1])  # GPUs need B > 0
        if self.rank > 0:  # its dropout follows from the step: files keep that of rank 0 alone
            torch.manual_seed(self.settings.seed + self.step * self.world_size + self.rank)
        with contextlib.nullcontext() if plain else torch.autocast(device, self.number_format):
            return [logits.float()[: len(inputs)] for logits in self.network(some, both=True)]

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss * self.world_size).backward()
        self.scaler.unscale_(self.optimizer)

    def optimizer_step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()


# ---- The fold: a first reader goes on to generate_text.py here. What protects stands below. ------


def say(run: Trainer, line: str) -> None:
    """Print, in the first process, beside the progress bar. A broken stdout must not end a run."""
    try:
        if run.rank == 0:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def set_up_session(run: Trainer, device: torch.device) -> None:
    """Give a run what belongs to this process, on this device, and to no checkpoint."""
    run.rank, run.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    run.stop_signal, run.last_save = 0, time.monotonic()
    run.own_files = {run.flags.checkpoint} if run.flags.resume else set()  # others are kept
    run.network, run.number_format = run.model, torch.float32
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # what stays in 32 bits may use TF32
        recent = torch.cuda.get_device_capability(device) >= (8, 0)  # others emulate bfloat16
        run.number_format = torch.bfloat16 if recent else torch.float16
    amp = torch.amp if hasattr(torch.amp, "GradScaler") else torch.cuda.amp  # PyTorch 2.2: there
    run.scaler = amp.GradScaler(enabled=run.number_format == torch.float16)
    if run.flags.compile == "on" or (run.flags.compile == "auto" and device.type == "cuda"):
        try:
            run.network = torch.compile(run.model, dynamic=torch.__version__ >= "2.5")
            torch._dynamo.config.optimize_ddp = False  # or a share of one sequence ends the run
            rehearse(run)  # it compiles once for whole windows, once for what is shorter
        except Exception as error:
            run.network = run.model
            say(run, f"warning: the model cannot be compiled here: {reason(error)}")
    if run.world_size > 1:
        nccl = device.type == "cuda" and dist.is_nccl_available()  # Windows has none
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
        run.network = torch.nn.parallel.DistributedDataParallel(run.network)


def rehearse(run: Trainer) -> float:
    """The seconds that the run would take, from five steps of each length that change nothing."""
    ids, epochs, seconds = run.train_ids, range(len(run.history), run.settings.epochs), 0.0
    lengths = [sequence_length_at(epoch, run.settings) for epoch in epochs]
    for T in sorted(set(lengths)):
        starts, times = ids.new_zeros(round(len(ids) / T / run.steps_per_epoch)).long(), []
        inputs, _ = get_batch(ids, starts[run.rank :: run.world_size], T)
        with torch.random.fork_rng([ids.device] if ids.is_cuda else []):
            for _ in range(5):
                begin = time.perf_counter()
                sum(logits.sum() for logits in run.forward(inputs)).backward()
                run.loss_sum.item()  # waits for a GPU
                times.append(time.perf_counter() - begin)
        seconds += sorted(times)[2] * lengths.count(T) / len(lengths)
    # Measuring costs a third of learning, as nothing goes backward.
    return seconds * (run.total_steps - run.step) * (1 + len(run.val_ids) / len(ids) / 3)


def over_all(run: Trainer, value: Tensor, how: str = "SUM") -> Any:
    """The sum, or another combination, of the `value` that each process brings."""
    value = value.detach().cpu().clone()
    if run.world_size > 1:
        dist.all_reduce(value, op=getattr(dist.ReduceOp, how))
    return value.tolist()


def note_signals(run: Trainer, session: contextlib.ExitStack) -> None:
    """The first Ctrl-C or SIGTERM waits for the end of the step; a later one quits at once."""
    numbers = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
    if signal.getsignal(numbers[-1]) == signal.SIG_IGN:  # by nohup: to outlive its terminal
        numbers.pop()

    def note(number: int, _: Any) -> None:
        # One stop can send several: a closing terminal, timeout, uv and torchrun pass them on.
        if run.stop_signal and time.monotonic() > run.last_signal + 1 and number in numbers[:2]:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        run.stop_signal, run.last_signal = number, time.monotonic()

    for number in numbers:
        session.callback(signal.signal, number, signal.signal(number, note))


def save_or_stop_if_due(run: Trainer) -> None:
    """After a step: see that the loss is a number, save when it is time, stop when asked to."""
    due = time.monotonic() - run.last_save > 60 * run.settings.save_minutes
    # Of several processes, each has a vote, so that all of them stop after the same step.
    stop_signal, due = over_all(run, torch.tensor([run.stop_signal, due]), "MAX")
    if stop_signal or due or run.step % 50 == 0:
        refuse_divergence(run, run.loss_sum.item())
    if stop_signal or due:
        save(run, last=stop_signal > 0)
    if stop_signal:
        over_all(run, run.loss_sum)  # wait: as soon as one process ends, torchrun ends the others
        say(run, "stopped and saved; the same command with --resume behind it continues")
        raise SystemExit(128 + stop_signal)


def refuse_divergence(run: Trainer, loss: float) -> None:
    """Raise UserError when the loss or a parameter has become NaN or infinite."""
    if not math.isfinite(loss) or not all(torch.isfinite(p).all() for p in run.model.parameters()):
        hint = f"start anew with a learning_rate below {run.settings.learning_rate:g}"
        raise UserError(f"the loss is no longer a number at step {run.step:,}; {hint}")


def save(run: Trainer, last: bool = False) -> None:
    """Write log and checkpoint. What fails is said, and after the `last` chance put elsewhere."""
    run.last_save, problem = time.monotonic(), ""
    contents = {"format": FORMAT, "sizes": run.sizes, "vocabulary": run.tokenizer.characters}
    contents["parameters"] = run.best_parameters or dict(run.model.state_dict())
    if len(run.history) < run.settings.epochs:
        contents["training"] = run.state_dict()  # all processes take part in this
    last = last or "training" not in contents
    if run.rank > 0:
        return
    rows = ["epoch,step,train_loss,val_loss,seconds", *(str(r)[1:-1] for r in run.history), ""]
    log, checkpoint = "\n".join(rows).replace(" ", "").encode("ascii"), io.BytesIO()
    torch.save(contents, checkpoint)
    # The log first: a resumed run writes it again, a finished one could not.
    files = {run.flags.training_log: log} if run.history else {}
    for path, data in {**files, run.flags.checkpoint: checkpoint.getvalue()}.items():
        try:
            keep_older(run, path, data)
            write_whole(path, data)
            run.own_files.add(path)
        except OSError as error:
            problem = f"{path!a} was not saved at step {run.step:,}: {error}"
            if not last:
                say(run, f"warning: {problem}")
                continue
            with contextlib.suppress(OSError):
                elsewhere = os.path.join(tempfile.mkdtemp(), os.path.basename(path))
                write_whole(elsewhere, data)
                problem += f"; it is now {elsewhere!a}"
    if problem and last:
        raise UserError(problem)
    try:
        if run.flags.plot and run.history:
            write_picture(run.flags.plot, draw_losses, run)
    except Exception as error:  # whatever it is, a picture must not end a run
        say(run, f"warning: no picture at step {run.step:,}: {error}")


def keep_older(run: Trainer, path: str, new: bytes) -> None:
    """Keep another run's file as PATH.previous, .previous1, ...; not one that `new` continues."""
    if path in run.own_files or not os.path.exists(path):
        return
    with open(path, "rb") as file:
        older = file.read()
    if not new.startswith(older):
        stem, end = os.path.splitext(path)
        names = (f"{stem}.previous{n or ''}{end}" for n in itertools.count())
        name = next(name for name in names if not os.path.lexists(name))
        write_whole(name, older)
        say(run, f"kept what was there as {name!a}")
    run.own_files.add(path)


def draw_losses(figure: Any, run: Trainer) -> None:
    """The losses, beside those of guessing blindly and of counting characters (their entropy)."""
    _, steps, train, val, _ = zip(*run.history)
    shares = torch.bincount(run.train_ids.cpu()).double() / len(run.train_ids)
    axes, blind = figure.subplots(), math.log(run.tokenizer.vocab_size)
    # The training loss is an average over its epoch, so its place is the middle of that.
    axes.plot([step - run.steps_per_epoch / 2 for step in steps], train, "o-", label="training")
    axes.plot(steps, val, "s-", label="validation")
    counting = torch.special.entr(shares).sum().item()
    for loss, name in ((blind, "guessing blindly"), (counting, "counting characters")):
        axes.axhline(loss, color="gray", linestyle=":")
        axes.text(run.total_steps, loss, f"{name}: {loss:.2f}", ha="right", va="bottom")
    limits = {"xlim": (0, 1.02 * run.total_steps), "ylim": (0, 1.1 * max(blind, *val) or 1)}
    axes.set(xlabel="step", ylabel="loss in nats per character", **limits)
    axes.legend(loc="lower left")


def claim_files(flags: Any, session: contextlib.ExitStack) -> None:
    """Raise UserError for files that cannot be written, or that something else needs.

    SQLite's locks work on all systems, and end with the process, however it ends. Ours is on an
    empty temporary file, so that the checkpoint can be read meanwhile.
    """
    paths = [flags.checkpoint, flags.training_log, *([flags.plot] if flags.plot else [])]
    names = [flags.input, *paths, *map("{}.part".format, paths)]
    if len(set(map(os.path.realpath, names))) < len(names):
        raise UserError("--input, --checkpoint, --training_log and --plot need different names")
    for path in paths:
        if not os.path.basename(path) or (os.path.exists(path) and not os.path.isfile(path)):
            raise UserError(f"{path!a} is not a file and cannot be replaced by one; name another")
        name = hashlib.sha256(os.fsencode(os.path.normcase(os.path.realpath(path)))).hexdigest()
        try:
            lock = sqlite3.connect(f"{tempfile.gettempdir()}/tiny_gpt_{name}.lock", timeout=0)
            session.callback(lock.close)
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:  # where there are no locks, the run goes on
            if "locked" in str(error):
                raise UserError(f"another run is writing {path!a}; wait, or name others") from error
        write_whole(f"{os.path.realpath(path)}.part", b"")  # OSError where nothing can be written
        os.remove(f"{os.path.realpath(path)}.part")


def choose_settings(flags: Any, device: torch.device, saved: Any = None) -> Hyperparameters:
    """The preset, changed by the flags; on resume the saved settings, which no flag may change."""
    gpu = flags.preset == "gpu" or (flags.preset == "auto" and device.type != "cpu")
    preset = asdict(GPU if gpu else LAPTOP) if saved is None or flags.preset != "auto" else {}
    wanted = {**preset, **{k: v for k, v in vars(flags).items() if hasattr(LAPTOP, k)}}
    settings = Hyperparameters(**(wanted if saved is None else saved))
    old = asdict(settings)
    different = ", ".join(f"{k} is {old[k]}, not {v}" for k, v in wanted.items() if old[k] != v)
    if different:
        raise UserError(f"its settings differ ({different}); leave out these flags, or --resume")
    return settings


def resume(flags: Any, device: torch.device) -> Trainer:
    """The unfinished run in the checkpoint, as far as it had come. Raises UserError."""
    best, vocabulary, state = load_checkpoint(flags.checkpoint)
    if state is None:
        print(f"the run in {flags.checkpoint!a} is finished; there is nothing to resume")
        raise SystemExit(0)
    try:
        settings = choose_settings(flags, device, dict(state)["settings"])
        if replace(settings, **best.sizes) != settings:
            raise UserError("its settings are not those of its model")
        run = Trainer(flags, settings, device)
        if state["text"] != run.text or vocabulary != run.tokenizer.characters:
            raise UserError("it learns from another text; name that one with --input")
        finished, like = len(state["history"]), run.state_dict()
        like["history"] = [[1, 1, 1.0, 1.0, 1.0]] * finished
        like["random_cuda"] = state["random_cuda"]  # of a GPU, which need not be here
        like["scaler"] = {k: 1 if type(v) is int else 1.0 for k, v in state["scaler"].items()}
        parameters = [p.detach() for g in run.optimizer.param_groups for p in g["params"]]
        averages = [{"step": torch.ones(()), "exp_avg": p, "exp_avg_sq": p} for p in parameters]
        like["optimizer"] = dict(enumerate(averages)) if state["optimizer"] else {}
        check_like("unfinished run", state, like)
        epoch = state["step"] / run.steps_per_epoch
        if not finished <= epoch <= finished + 1 <= settings.epochs or state["seconds"] <= 0:
            raise UserError("its counts of steps, epochs and seconds do not fit together")
        run.load_state_dict(state, dict(best.state_dict()))
        return run
    except Exception as error:  # a forged run can raise anything
        raise UserError(f"cannot resume {flags.checkpoint!a}: {reason(error)}") from error


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The flags of `python train_model.py`, one for every setting among them."""
    parser = Parser("train_model.py", "%(prog)s [flags]", "Train TinyGPT.", allow_abbrev=False)
    parser.set_defaults(device="auto", preset="auto", compile="auto")
    add = parser.add_argument
    add("--input", default="input.txt", help="the text to learn (%(default)s)")
    add("--checkpoint", default="tiny_gpt_model.pth", help="the model (%(default)s)")
    add("--training_log", default="training_log.csv", help="losses by epoch (%(default)s)")
    add("--plot", type=picture, help="a picture of the losses, drawn after each epoch")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], help="auto: a CUDA GPU if it works")
    add("--preset", choices=["auto", "laptop", "gpu"], help="auto: by the device")
    add("--compile", choices=["auto", "on", "off"], nargs="?", const="on", help="auto: on a GPU")
    add("--resume", action="store_true", help="continue the run in the checkpoint")
    group = parser.add_argument_group("settings (laptop / GPU)", argument_default=argparse.SUPPRESS)
    for one in fields(Hyperparameters):
        text = f"{one.metadata['help']} ({one.default} / {one.metadata['gpu']})"
        group.add_argument(f"--{one.name}", type=one.type, metavar="X", help=text)
    return parser.parse_args(argv)


def prepare(flags: Any) -> Trainer:
    """The run that the flags ask for, new or resumed, ready to learn; says what it is."""
    device, why = choose_device(flags.device)
    settings = None if flags.resume else choose_settings(flags, device)
    run = Trainer(flags, settings, device) if settings else resume(flags, device)
    V, train, val = run.tokenizer.vocab_size, len(run.train_ids), len(run.val_ids)
    parameters = sum(p.numel() for p in run.model.parameters())
    say(run, f"device    {device} ({why}), {str(run.number_format)[6:]} matrix products")
    say(run, f"text      {V} different characters; guessing blindly costs {math.log(V):.4f} nats")
    say(run, f"split     {train:,} characters to learn from, {val:,} to measure on")
    say(run, f"model     {parameters:,} parameters, from {run.step:,} steps of training")
    say(run, f"training  {run.settings.epochs} epochs of {run.steps_per_epoch:,} steps")
    say(run, f"time      about {tqdm.format_interval(rehearse(run))}, as measured on a few steps")
    return run


def main(argv: Optional[List[str]] = None) -> None:
    """Train as the flags say."""
    flags = parse(argv)
    with contextlib.ExitStack() as session:
        if os.environ.get("RANK", "0") == "0":
            claim_files(flags, session)
        try:
            run = prepare(flags)
            note_signals(run, session)
            # One bar over the whole run. Where stderr is no terminal, there is none (None).
            with tqdm(initial=run.step, total=run.total_steps, disable=run.rank or None) as run.bar:
                train(run)
        except RuntimeError as error:
            if os.environ.get("WORLD_SIZE", "1") == "1" or "memory" in str(error):
                raise
            raise UserError(f"another process of this run has ended ({reason(error)})") from error
        best = min(run.history, key=lambda row: row[3])
        say(run, f"done: {flags.checkpoint!a} has epoch {best[0]}, validation loss {best[3]:.4f}")
        say(run, f'let it write:  python generate_text.py --checkpoint "{flags.checkpoint}"')


if __name__ == "__main__":
    status = end_with_a_sentence(main, lower="batch_size, block_size, n_layer or n_embd")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(status)  # PyTorch 2.4 can hang in parting
    sys.exit(status)
