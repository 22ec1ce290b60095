"""How fast TinyGPT is on this machine: `python tests/benchmark.py`, under five minutes.

Speeds depend on the machine and on what else it does, so every line that compares does so in one
run, as a ratio; times are medians. `--json` prints the same figures for another program.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import train_model  # noqa: E402
from data_handling import load_text, shuffled_windows, split  # noqa: E402
from generate_text import generate  # noqa: E402
from hyperparameters import GPU, LAPTOP  # noqa: E402
from model_architecture import TinyGPT  # noqa: E402


def matrix_product_peak() -> float:
    """FLOP per second of a 2048 x 2048 x 2048 float32 matrix product, the median of ten."""
    a, b = torch.randn(2, 2048, 2048)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / statistics.median(times)


def training_speed(steps: int = 60) -> dict:
    """Characters a second of real training steps at the laptop setting, and the share of the peak.

    A parameter costs 6 FLOP a character: a product and a sum forward, twice that backward.
    """
    tokenizer, ids = load_text(str(ROOT / "input.txt"))
    train_ids, held_out_ids = split(ids, LAPTOP.block_size, LAPTOP.validation_fraction)
    torch.manual_seed(LAPTOP.seed)
    sizes = {n: getattr(LAPTOP, n) for n in ("block_size", "n_embd", "n_head", "n_layer")}
    model, device = TinyGPT(tokenizer.vocab_size, **sizes), torch.device("cpu")
    run = train_model.Run(
        dials=LAPTOP,
        model=model,
        learner=model,
        optimizer=train_model.make_optimizer(model, LAPTOP),
        precision=train_model.choose_precision(device),
        train_ids=train_ids,
        held_out_ids=held_out_ids,
        progress=train_model.Progress(device),
        processes=train_model.Processes(),
        files=None,
    )
    starts = shuffled_windows(len(train_ids), LAPTOP.block_size, LAPTOP.seed, 0)
    peak, times = matrix_product_peak(), []
    for batch in starts.split(LAPTOP.batch_size)[:steps]:
        start = time.perf_counter()
        train_model.take_step(run, batch)
        times.append(time.perf_counter() - start)
    peak = (peak + matrix_product_peak()) / 2
    speed = LAPTOP.batch_size * LAPTOP.block_size / statistics.median(times[5:])
    parameters = sum(p.numel() for p in model.parameters())
    start = time.perf_counter()
    train_model.evaluate(model, held_out_ids)
    return {
        "training, characters/s": speed,
        "matrix product, GFLOP/s": peak / 1e9,
        "training, share of the matrix product": 6 * parameters * speed / peak,
        "evaluation, characters/s": len(held_out_ids) / (time.perf_counter() - start),
    }


ENCODE = """
import sys, time
sys.path.insert(0, sys.argv[1])
from data_handling import load_text
start = time.perf_counter()
load_text(sys.argv[2])
seconds = time.perf_counter() - start
try:
    import resource
    scale = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
except ImportError:
    memory = 0
print(seconds, memory)
"""


def encoding_speed() -> dict:
    """Seconds and peak memory, Python and PyTorch included, to read and encode 100 MB of text."""
    text = (ROOT / "input.txt").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "large.txt")
        with open(path, "wb") as file:
            for _ in range(10**8 // len(text) + 1):
                file.write(text)
        size = os.path.getsize(path)
        command = [sys.executable, "-c", ENCODE, str(ROOT), path]
        runs = [subprocess.check_output(command, text=True).split() for _ in range(3)]
    seconds = statistics.median(float(run[0]) for run in runs)
    return {
        "encoding 100 MB, MB/s": size / 1e6 / seconds,
        "encoding 100 MB, peak memory in MB": max(float(run[1]) for run in runs) / 1e6,
    }


def write_uncached(model: TinyGPT, count: int, generator: torch.Generator) -> None:
    """Write `count` characters the usual way: the whole window is read for every one."""
    context = torch.zeros(1, model.block_size, dtype=torch.long)
    with torch.inference_mode():
        for _ in range(count):
            probabilities = model(context[:, -model.block_size :])[:, -1].softmax(dim=-1)
            drawn = torch.multinomial(probabilities, 1, generator=generator)
            context = torch.cat((context, drawn), dim=1)


def generation_speed(name: str, dials, whole_windows: int) -> dict:
    """Characters a second with the cache (2000 of them) and without, single sample.

    They take turns, with the cache for half a window (in which it is read again once): so whatever
    else the machine does slows both.
    """
    sizes = {n: getattr(dials, n) for n in ("block_size", "n_embd", "n_head", "n_layer")}
    torch.manual_seed(0)
    model, generator = TinyGPT(65, **sizes).eval(), torch.Generator().manual_seed(0)
    count = dials.block_size // 2
    ids = generate(model, torch.zeros(1, 1, dtype=torch.long), 10**9, generator)
    with_cache, without = [], []
    for _ in range(-(-2000 // count)):
        start = time.perf_counter()
        for _ in range(count):
            next(ids)
        with_cache.append(count / (time.perf_counter() - start))
        start = time.perf_counter()
        write_uncached(model, whole_windows, generator)
        without.append(whole_windows / (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(with_cache, without)]
    return {
        f"writing, {name} model, cached, characters/s": statistics.median(with_cache),
        f"writing, {name} model, whole window, characters/s": statistics.median(without),
        f"writing, {name} model, ratio": statistics.median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    figures = {
        **encoding_speed(),  # first: a process inherits the peak memory of the one that started it
        **training_speed(),
        **generation_speed("laptop", LAPTOP, whole_windows=16),
        **generation_speed("GPU-sized", GPU, whole_windows=10),
    }
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    print("| measured | figure |\n|---|---:|")
    for name, value in figures.items():
        print(f"| {name} | {value:,.{0 if value >= 100 else 2}f} |")


if __name__ == "__main__":
    main()
