"""How fast TinyGPT is on this machine: `python tests/benchmark.py`, under five minutes.

Speeds depend on the machine and on what else it does, so every line that compares does so in one
run, as a ratio; times are medians. `--json` prints the same figures for another program.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import train_model  # noqa: E402
from generate_text import generate  # noqa: E402
from hyperparameters import GPU, LAPTOP, Hyperparameters  # noqa: E402
from model_architecture import TinyGPT  # noqa: E402


def matrix_product_peak() -> float:
    """FLOP per second of a 2048 x 2048 x 2048 float32 matrix product, the median of ten."""
    (a, b), times = torch.randn(2, 2048, 2048), []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / statistics.median(times)


class Timed(train_model.Trainer):
    """A run that takes the time after each of 60 steps, and neither draws a bar nor saves."""

    def finish_step(self, loss: torch.Tensor) -> None:
        self.times = [*getattr(self, "times", []), time.perf_counter()]
        if len(self.times) == 60:
            raise StopIteration


def training_speed() -> dict:
    """Characters a second of real training steps at the laptop setting, and the share of the peak.

    A parameter costs 6 FLOP a character: a product and a sum forward, twice that backward.
    """
    flags, peak = train_model.parse(["--input", str(ROOT / "input.txt")]), matrix_product_peak()
    run = Timed(flags, LAPTOP, torch.device("cpu"))
    with contextlib.suppress(StopIteration):
        train_model.train(run)
    peak = (peak + matrix_product_peak()) / 2
    steps = [after - before for before, after in zip(run.times[5:], run.times[6:])]
    speed = LAPTOP.batch_size * LAPTOP.block_size / statistics.median(steps)
    parameters = sum(p.numel() for p in run.model.parameters())
    start = time.perf_counter()
    train_model.evaluate(run.model, run.val_ids)
    return {
        "training, characters/s": speed,
        "matrix product, GFLOP/s": peak / 1e9,
        "training, share of the matrix product": 6 * parameters * speed / peak,
        "evaluation, characters/s": len(run.val_ids) / (time.perf_counter() - start),
    }


ENCODE = """
import sys, time
from data_handling import load_text
start = time.perf_counter()
load_text(sys.argv[1])
seconds = time.perf_counter() - start
try:
    from resource import RUSAGE_SELF, getrusage
    print(seconds, getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
except ImportError:
    print(seconds, 0)
"""


def encoding_speed() -> dict:
    """Seconds and peak memory, Python and PyTorch included, to read and encode 100 MB of text."""
    text = (ROOT / "input.txt").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "large.txt")
        path.write_bytes(text * (10**8 // len(text) + 1))
        size, command = path.stat().st_size, [sys.executable, "-c", ENCODE, str(path)]
        runs = [subprocess.check_output(command, text=True, cwd=ROOT).split() for _ in range(3)]
    return {
        "encoding 100 MB, MB/s": size / 1e6 / statistics.median(float(run[0]) for run in runs),
        "encoding 100 MB, peak memory in MB": max(float(run[1]) for run in runs) / 1e6,
    }


class PlainBlock(nn.Module):
    """A block of the usual GPT, with none of what chapter 3 adds to it."""

    def __init__(self, C: int, H: int) -> None:
        super().__init__()
        self.H, self.norm, self.norm_2 = H, nn.LayerNorm(C), nn.LayerNorm(C)
        self.queries_keys_values, self.output = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.feed_forward = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.queries_keys_values(self.norm(x)).unflatten(-1, (3, self.H, -1))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)
        mixture = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.output(mixture.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norm_2(x))


class PlainGPT(nn.Module):
    """The usual GPT: learned positions, LayerNorm, GELU, and no cache."""

    def __init__(self, V: int, block_size: int, C: int, H: int, n_layer: int) -> None:
        super().__init__()
        self.block_size, self.positions = block_size, nn.Parameter(torch.randn(block_size, C))
        self.embedding, blocks = nn.Embedding(V, C), [PlainBlock(C, H) for _ in range(n_layer)]
        self.rest = nn.Sequential(*blocks, nn.LayerNorm(C), nn.Linear(C, V))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.rest(self.embedding(ids) + self.positions[: ids.shape[1]])


@torch.inference_mode()
def write_uncached(model: nn.Module, count: int) -> None:
    """Write `count` characters the usual way: the whole window is read for every one."""
    context = torch.zeros(1, model.block_size, dtype=torch.long)
    for _ in range(count):
        logits = model(context[:, -model.block_size :])[:, -1]
        context = torch.cat((context, torch.multinomial(logits.softmax(dim=-1), 1)), dim=1)


def writing_speed(name: str, settings: Hyperparameters, count: int) -> dict:
    """Characters a second with the cache (1000 of them), without, and of a plain GPT.

    They take turns, so that whatever else the machine does slows all; the cache has half a window.
    """
    sizes = [settings.block_size, settings.n_embd, settings.n_head, settings.n_layer]
    torch.manual_seed(0)
    model, plain, half = TinyGPT(65, *sizes).eval(), PlainGPT(65, *sizes).eval(), sizes[0] // 2
    ids = generate(model, torch.zeros(1, 1, dtype=torch.long), 10**9, torch.Generator())
    kinds = {
        "cached": (half, lambda: [next(ids) for _ in range(half)]),
        "the whole window": (count, lambda: write_uncached(model, count)),
        "a plain GPT": (count, lambda: write_uncached(plain, count)),
    }
    speeds, figures = {kind: [] for kind in kinds}, {}
    for _ in range(-(-1000 // half)):
        for kind, (characters, write) in kinds.items():
            start = time.perf_counter()
            write()
            speeds[kind].append(characters / (time.perf_counter() - start))
    for kind, found in speeds.items():
        figures[f"writing, {name} model, {kind}, characters/s"] = statistics.median(found)
        if kind != "cached":
            ratios = [cached / other for cached, other in zip(speeds["cached"], found)]
            figures[f"writing, {name} model, against {kind}"] = statistics.median(ratios)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    as_json = parser.parse_args().json
    figures = {
        **encoding_speed(),  # first: a process inherits the peak memory of the one that started it
        **training_speed(),
        **writing_speed("laptop", LAPTOP, count=16),
        **writing_speed("GPU-sized", GPU, count=10),
    }
    rows = [f"| {name} | {x:,.{0 if x >= 100 else 2}f} |" for name, x in figures.items()]
    table = "\n".join(["| measured | figure |", "|---|---:|", *rows])
    print(json.dumps(figures, indent=2) if as_json else table)


if __name__ == "__main__":
    main()
