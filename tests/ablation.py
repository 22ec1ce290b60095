"""What each ingredient buys: `python tests/ablation.py`, about half an hour on two slow CPU cores.

Whether a part earns its place shows only when the rest has to do without it. So each variant lacks
one part, or has a plainer one, and learns as the full model does: laptop settings, which were
chosen for that one, the same text, seeds, batches, numbers to begin with and number of steps. A
difference that changes its sign from seed to seed says nothing.

It prints a table in Markdown: the exact validation loss in nats, mean of the seeds; the spread,
largest minus smallest; and how much worse than the full model it is, seed by seed. To compare with:
blind guessing, and counting how often a character occurs, or follows another one. Names of
variants, if given, choose among them: `python tests/ablation.py full no-gates --seeds 1`.
"""

import argparse
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, List, Optional, Tuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data_handling import get_batch, load_text, shuffled_sequences, split  # noqa: E402
from hyperparameters import LAPTOP, Hyperparameters, end_with_a_sentence  # noqa: E402
from model_architecture import Block, TinyGPT, layer_norm  # noqa: E402
from train_model import evaluate, learning_rate_at, make_optimizer, total_loss  # noqa: E402

VARIANTS = ["full", "no-attention", "no-feed-forward", "no-residuals", "no-layer-norm"]
VARIANTS += ["no-positions", "no-convolution", "no-warm-up", "one-head", "no-gates"]
VARIANTS += ["no-second-guess"]


def times(factor: float) -> nn.Module:
    """In the place of a part: 0 times its input (adds nothing), or 1 times (changes nothing)."""
    part = nn.Module()
    part.forward = lambda x, *_: factor * x
    return part


class Chain(Block):
    """A block without residual connections: what a part finds replaces what was there."""

    def forward(self, x: torch.Tensor, rope: Any, cache: Any = None) -> torch.Tensor:
        x = self.dropout(self.attention(layer_norm(x), rope, cache))
        return self.dropout(self.feed_forward(self.convolution(layer_norm(x), cache)))


class Unscaled(TinyGPT):
    """No LayerNorm: not behind the embedding or the blocks, in a block, on queries and keys."""

    def forward(self, ids: torch.Tensor, cache: Any = None, both: bool = False) -> Any:
        with mock.patch("model_architecture.layer_norm", lambda x: x):
            return super().forward(ids, cache, both)


def build(name: str, vocab_size: int, seed: int) -> Tuple[TinyGPT, Hyperparameters]:
    """A variant, untrained, and its settings. What is left begins with the full model's numbers."""
    changes = {"no-warm-up": {"warmup_steps": 0}, "one-head": {"n_head": 1}}.get(name, {})
    s = replace(LAPTOP, seed=seed, **changes)
    torch.manual_seed(seed)
    kind = Unscaled if name == "no-layer-norm" else TinyGPT
    model = kind(vocab_size, s.block_size, s.n_embd, s.n_head, s.n_layer, s.dropout)
    if name == "no-positions":  # every arrow is turned by the angle 0, wherever it stands
        model.rope[0], model.rope[1] = 1.0, 0.0  # cosine and sine
    if name == "no-convolution":
        for part in (model, *model.blocks):
            part.convolution = times(1.0)
    if name == "no-second-guess":  # it is blind, and teaches nothing
        model.after_next = times(0.0)
    for block in model.blocks:
        if name == "no-attention":  # of the past, only what the convolutions reach is left
            block.attention = times(0.0)
        if name == "no-feed-forward":  # which alone reads the block's convolution
            block.convolution = block.feed_forward = times(0.0)
        if name == "no-residuals":  # and results begin at random: zeros have no way to learn here
            block.__class__ = Chain
            nn.init.normal_(block.attention.output.weight, std=0.05)
            nn.init.normal_(block.feed_forward.down.weight, std=0.05)
        if name == "no-gates":  # the usual feed-forward, of as many parameters, with its bend GELU
            part, C = block.feed_forward, s.n_embd  # (Hendrycks & Gimpel 2016)
            block.feed_forward = nn.Sequential(part.up, nn.GELU(), nn.Linear(3 * C, C, bias=False))
            part.up.weight = nn.Parameter(part.up.weight.detach()[: 3 * C].clone())
            nn.init.zeros_(block.feed_forward[2].weight)
    return model, s


def learn(
    model: TinyGPT, s: Hyperparameters, train: torch.Tensor, val: torch.Tensor, steps: int
) -> float:
    """The validation loss after `steps` steps, taken as in chapter 4; NaN if the model diverges."""
    optimizer = make_optimizer(model.train(), s)
    orders = (shuffled_sequences(len(train), s.block_size, s.seed, e) for e in itertools.count())
    # As in a run of one epoch in chapter 4, all sequences have the full block_size.
    batches = itertools.chain.from_iterable(order.split(s.batch_size) for order in orders)
    for step in tqdm(range(steps), f"seed {s.seed}", leave=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, s)
        inputs, targets = get_batch(train, next(batches), s.block_size)
        logits, after_next = model(inputs, both=True)
        loss = total_loss(logits, targets) / targets.numel()
        second_loss = total_loss(after_next[:, :-1], targets[:, 1:]) / targets.numel()
        if not math.isfinite(loss.item()):
            return math.nan
        optimizer.zero_grad()
        (loss + 0.3 * (1 - step / steps) * second_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), s.gradient_clip)
        optimizer.step()
    return evaluate(model, val)


def surprise_of_counts(train: torch.Tensor, val: torch.Tensor, V: int, pairs: bool) -> float:
    """The loss of guessing by counts, each one more than found, on the lessons of `evaluate`."""
    lessons = (len(val) - 1) // LAPTOP.block_size * LAPTOP.block_size
    places = [V * pairs * ids[:-1].long() + ids[1:].long() for ids in (train, val[: lessons + 1])]
    counts = torch.bincount(places[0], minlength=V * V).view(V, V) + 1.0
    return -(counts / counts.sum(dim=1, keepdim=True)).log().flatten()[places[1]].mean().item()


def main(argv: Optional[List[str]] = None) -> None:
    """Print the table; the progress goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("names", nargs="*", help=f"variants, of: {' '.join(VARIANTS)} (all)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (%(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="length of a run (%(default)s)")
    parser.add_argument("--input", default="input.txt", help="the text (%(default)s)")
    flags = parser.parse_args(argv)
    if not set(flags.names) <= set(VARIANTS) or min(flags.seeds, flags.steps) < 1:
        parser.error("no such variant, or no seeds or steps; --help lists what there is")
    tokenizer, ids = load_text(flags.input)
    train, val = split(ids, LAPTOP.block_size, LAPTOP.validation_fraction)
    V = tokenizer.vocab_size
    print(f"| {flags.steps} steps | parameters | validation loss | spread | worse by |")
    print("|---|---:|---:|---:|---:|")
    print(f"| blind guessing | 0 | {math.log(V):.4f} | | |")
    print(f"| counting characters | {V} | {surprise_of_counts(train, val, V, False):.4f} | | |")
    print(f"| counting pairs | {V * V:,} | {surprise_of_counts(train, val, V, True):.4f} | | |")
    full: List[float] = []
    for name in tqdm([name for name in VARIANTS if name in (flags.names or VARIANTS)]):
        models = (build(name, V, LAPTOP.seed + i) for i in range(flags.seeds))
        losses = [learn(model, s, train, val, flags.steps) for model, s in models]
        bad = sum(not math.isfinite(loss) for loss in losses)
        full = losses if name == "full" else full
        worse = [f"{loss - other:.3f}" for loss, other in zip(losses, full)]
        figures = f"{sum(losses) / flags.seeds:.4f} | {max(losses) - min(losses):.4f}"
        figures += f" | {' '.join(worse)}" if name != "full" else " |"
        figures = f"diverges in {bad} of {flags.seeds} runs | |" if bad else figures
        size = sum(p.numel() for p in build(name, V, LAPTOP.seed)[0].parameters())
        tqdm.write(f"| {name.replace('-', ' ', 1)} | {size:,} | {figures} |", file=sys.stdout)
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(end_with_a_sentence(main))
