"""Chapter 3 of 5: the model, a function that predicts the next character.

At the end of this file you know every part of a GPT: how a position finds out what stands before it
(attention, and a short look at the three before), how it thinks about what it found (feed-forward),
and why a stack of such blocks can be trained at all. From chapter 2 it takes ids; it hands chapter
4 a function from ids to logits, a number for every character that could come next: the larger, the
likelier. Run it to see the shapes as a batch flows through, written in these letters:

    B  batch: sequences read side by side      C  n_embd: numbers that describe one position
    T  time: positions read at once            H  n_head: attention heads
    S  positions so far: T in training         D  C / H: numbers that one head works with
    V  vocabulary: different characters

The first step is an embedding. An id is a name, not an amount: 7 is not more than 3. So each id
looks up a vector of C numbers, which training finds. From there on a position is such a vector, a
batch has the shape (B, T, C), and every layer takes one and gives one back. The simplest layer is
Linear, a matrix of parameters: each number it gives is a weighted sum of those it is given. PyTorch
finds the parameters of a Module by itself, and calls its `forward` when it is called.
"""

import io
import math
import os
import pickle
import struct
import sys
import warnings
import zipfile
from typing import Any, BinaryIO, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from hyperparameters import LAPTOP, Hyperparameters, UserError, end_with_a_sentence

REACH = 3  # characters that the causal convolution looks back
Rope = Tuple[torch.Tensor, torch.Tensor]


# A vector knows its own character, and what comes next depends on those before. So each position
# forms three vectors of D numbers from its own (read D as C for now): a query, what it looks for; a
# key, what it can be found by; and a value, what it has to tell. Query and key fit if their dot
# product, the sum of their products number by number, is large. The position then receives a
# mixture of all values up to its own, each in the share that its key has earned. The shares are
# called attention weights.


def attention_weights(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """How much each position takes of those up to its own, softmax(QK^T / sqrt(D)): (B, H, T, S).

    The queries, (B, H, T, D), are those of the last T of the S positions of the keys, (B, H, S, D).
    (Vaswani et al. 2017)
    """
    (T, D), S = queries.shape[-2:], keys.shape[-2]
    # A sum of D products of independent numbers of mean 0 and variance 1 has variance D. Undivided,
    # the largest score would take nearly all, and a small change would change nothing: no way to
    # learn. Divided by sqrt(D), the variance is 1 (section 3.2.1 there). `@` is the matrix product.
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(D)  # (B, H, T, S)
    # In training, the answer stands in the same sequence, one position later. A position must not
    # look there: minus infinity becomes a share of exactly 0.
    future = torch.ones(T, S, dtype=torch.bool, device=scores.device).triu(S - T + 1)
    # Softmax turns scores into shares: e to the power of each, divided by the sum of these.
    return scores.masked_fill(future, -math.inf).softmax(dim=-1)


# Shuffle what stands before a position, and all this gives the same mixture: order is not in it
# yet. It gets in by turning. Take the D numbers of a query or key as D / 2 arrows in a plane, and
# turn each by an angle that grows with the position. Of two arrows, the dot product depends on
# their lengths and on the angle between them; turning one by t steps and the other by s changes
# that angle by t - s steps. So a score now depends on what both positions hold and on how far they
# are apart, but not on where in the sequence they stand: what is learned in one place holds in
# every place. (RoPE: rotary position embedding, Su et al. 2021)


def make_rope(block_size: int, head_size: int) -> Rope:
    """The cosine and the sine of each arrow's angle at each position, (block_size, D / 2) each."""
    # The first arrow turns by 1 radian a position, which tells neighbours apart; slower ones tell
    # near from far; the slowest hardly turn, and compare what is there, wherever it is.
    speeds = 10_000.0 ** (-torch.arange(0, head_size, 2).float() / head_size)  # (D / 2,)
    angles = torch.outer(torch.arange(block_size).float(), speeds)
    return angles.cos(), angles.sin()


def apply_rope(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Turn the arrows of `x`, (B, H, T, D), each by its angle at its position."""
    cos, sin = rope  # (T, D / 2) each
    a, b = x.chunk(2, dim=-1)  # the arrows point to (a, b): (B, H, T, D / 2) each
    # Turned, (a, b) is (a cos - b sin, b cos + a sin). torch.addcmul(p, q, r) is p + q * r.
    turned = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    return torch.cat(turned, dim=-1)


class KVCache:
    """What later positions need of those read so far: their keys and values in every block.

    In writing, each new character would mean reading the whole sequence again. But no position sees
    a later one, so nothing changes at the old ones when a new one arrives. So their keys, values
    and last inputs of convolutions are kept, and a new character costs the work of one position and
    a look at what is kept. Their queries have been answered. In training there is no cache.
    """

    def __init__(self) -> None:
        self.length = 0  # positions read so far
        self.kept: Dict[Tuple[nn.Module, str], torch.Tensor] = {}

    def append(self, part: nn.Module, name: str, new: torch.Tensor, keep: int = 0) -> torch.Tensor:
        """`new`, (..., T, n), behind what is kept of it: (..., S, n). If `keep` is not 0, only the
        last `keep` positions are kept for the next time.
        """
        if (part, name) in self.kept:
            new = torch.cat((self.kept[part, name], new), dim=-2)
        self.kept[part, name] = new[..., -keep:, :]
        return new


class MultiHeadAttention(nn.Module):
    """Lets every position collect what it needs from the positions before it.

    One softmax gives one set of shares, so one mixture. But a position has several questions at
    once: which letters does this word have so far, who speaks, does a line end here? The answers
    would blur. So the C numbers are dealt out to H heads of D each, and every head asks a question
    of its own, all of them for about the price of one.
    """

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.queries_keys_values = Linear(n_embd, 3 * n_embd)
        self.output = Linear(n_embd, n_embd)

    def project(self, x: torch.Tensor, rope: Rope) -> Tuple[torch.Tensor, ...]:
        """The queries, keys and values of `x`, (B, T, C): three times (B, H, T, D)."""
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        # One large product makes all of them. The products to come take the last two axes for their
        # matrices; so the heads go to the front, where the batch is, and T stays with D.
        heads = self.queries_keys_values(x).view(B, T, 3 * H, D).transpose(1, 2)  # (B, 3H, T, D)
        queries_keys, values = heads.split((2 * H, H), dim=1)
        # Longer queries and keys make all scores larger, and in training little stops them from
        # growing until softmax takes one position and no other. So the D numbers of each are
        # shifted and scaled to mean 0 and variance 1. (after Henry et al. 2020)
        queries_keys = apply_rope(F.layer_norm(queries_keys, (D,)), rope)  # (B, 2H, T, D)
        return (*queries_keys.chunk(2, dim=1), values)

    def forward(self, x: torch.Tensor, rope: Rope, cache: Optional[KVCache] = None) -> torch.Tensor:
        """(B, T, C) to (B, T, C)."""
        queries, keys, values = self.project(x, rope)
        if cache is not None:
            keys = cache.append(self, "keys", keys)  # (B, H, S, D)
            values = cache.append(self, "values", values)
        if cache is not None and x.shape[1] > 1:  # a prompt
            mixture = attention_weights(queries, keys) @ values  # (B, H, T, D)
        else:  # PyTorch's own way to the same, without storing the shares: in training they would
            # fill the memory. It hides the future too (is_causal); one new position has none.
            mixture = F.scaled_dot_product_attention(queries, keys, values, is_causal=cache is None)
        return self.output(mixture.transpose(1, 2).reshape(x.shape))


class CausalConvolution(nn.Module):
    """Adds to every position a little of the three before it.

    The characters just before are the best hint at the next one. Attention can learn to look one
    step back, but takes long to find out; a sum needs only to learn its factors. Each of the C
    numbers has three, one for each step back, which begin as 0, "add nothing": a causal depthwise
    convolution (after So et al. 2021, Primer).
    """

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(REACH, n_embd))  # the farthest step back first

    def forward(self, x: torch.Tensor, cache: Optional[KVCache] = None) -> torch.Tensor:
        """(B, T, C) to (B, T, C)."""
        T, is_first = x.shape[1], cache is None or cache.length == 0
        inputs = F.pad(x, (0, 0, REACH, 0)) if is_first else x  # zeros before the first position
        if cache is not None:
            inputs = cache.append(self, "inputs", inputs, keep=REACH)  # (B, REACH + T, C)
        if T == 1:  # in writing: the sum below at once, as its steps cost more than their work
            return x + (inputs[:, :REACH] * self.weight).sum(dim=1, keepdim=True)
        for step, factors in enumerate(self.weight):  # (C,)
            x = torch.addcmul(x, inputs[:, step : step + T], factors)
        return x


class FeedForward(nn.Module):
    """Lets every position think about what it has collected, each on its own.

    Sums of sums are only sums: without a bend in between, a stack of layers could do no more than
    one. So a first layer makes 4 C numbers, of these the negative ones become 0 and the others are
    squared, and a second layer makes C of them. (ReLU squared: So et al. 2021)
    """

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.up = Linear(n_embd, 4 * n_embd)
        self.down = Linear(4 * n_embd, n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) to (B, T, C)."""
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    """Attention, then feed-forward, each adding to what is already there.

    If every layer replaced its input, the input would be lost on its way through a deep stack, and
    so would be the signal that tells the first layers how to improve. Here each part adds what it
    found, and all that was there before passes through (residual connections, He et al. 2015). As
    such sums grow from block to block, each part reads a copy that is shifted and scaled to mean 0
    and variance 1 at every position (LayerNorm, Ba et al. 2016; in front, Xiong et al. 2020).
    Dropout zeroes a random share of what is added, in training only: so no number can be relied
    upon, and learning by heart is harder (Srivastava et al. 2014).
    """

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(n_embd, elementwise_affine=False)  # serves both: it learns nothing
        self.attention = MultiHeadAttention(n_embd, n_head)
        self.convolution = CausalConvolution(n_embd)
        self.feed_forward = FeedForward(n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, rope: Rope, cache: Optional[KVCache] = None) -> torch.Tensor:
        """(B, T, C) to (B, T, C)."""
        x = x + self.dropout(self.attention(self.norm(x), rope, cache))
        nearby = self.convolution(self.norm(x), cache)
        return x + self.dropout(self.feed_forward(nearby))


class TinyGPT(nn.Module):
    """The whole model: ids in, logits out."""

    def __init__(
        self, vocab_size: int, block_size: int, n_embd: int, n_head: int, n_layer: int, dropout=0.0
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.convolution = CausalConvolution(n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd, elementwise_affine=False)
        self.unembedding = Linear(n_embd, vocab_size)
        cos, sin = make_rope(block_size, n_embd // n_head)
        self.register_buffer("cos", cos, persistent=False)  # they follow from the sizes: no need
        self.register_buffer("sin", sin, persistent=False)  # to save them
        self.initialise()

    def initialise(self) -> None:
        """Random numbers, but zeros where a result is written: so a block begins as "add nothing",
        all characters as equally likely, the loss as that of blind guessing. The first step moves
        only the unembedding; then the others have a direction, too.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.embedding.weight)
        nn.init.zeros_(self.unembedding.weight)
        for block in self.blocks:
            nn.init.zeros_(block.attention.output.weight)
            nn.init.zeros_(block.feed_forward.down.weight)

    def forward(self, ids: torch.Tensor, cache: Optional[KVCache] = None) -> torch.Tensor:
        """Ids (B, T) to logits (B, T, V): at each position, for the character that comes after it.

        With a cache, they follow the ids read before. Raises ValueError for more than block_size.
        """
        past, T = cache.length if cache else 0, ids.shape[1]
        refuse_too_long(past + T, self.block_size)
        rope = self.cos[past : past + T], self.sin[past : past + T]
        x = self.norm(self.convolution(self.embedding(ids), cache))  # (B, T, C)
        for block in self.blocks:
            x = block(x, rope, cache)
        if cache:
            cache.length += T
        return self.unembedding(self.norm(x))  # (B, T, V)


def main(_: Optional[List[str]] = None) -> None:
    """Show shapes, parameters, what an untrained head looks at, and the untrained loss."""
    text = __doc__[: 4 * 64 + 1]  # any text will do: how this very file begins
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(c) for c in text])
    inputs, targets = ids[:-1].view(4, 64), ids[1:].view(4, 64)
    torch.manual_seed(LAPTOP.seed)
    model = TinyGPT(len(characters), 64, LAPTOP.n_embd, LAPTOP.n_head, LAPTOP.n_layer)
    block, logits = model.blocks[0], model(inputs)
    x = model.norm(model.convolution(model.embedding(inputs)))
    queries, keys, values = block.attention.project(block.norm(x), (model.cos, model.sin))
    weights = attention_weights(queries, keys)
    print("shapes, as a batch flows through:")
    print(f"  ids                          (B, T)        {tuple(inputs.shape)}")
    print(f"  what the blocks read         (B, T, C)     {tuple(x.shape)}")
    print(f"  queries, keys, values, each  (B, H, T, D)  {tuple(values.shape)}")
    print(f"  attention weights            (B, H, T, S)  {tuple(weights.shape)}")
    print(f"  logits                       (B, T, V)     {tuple(logits.shape)}\n\nparameters:")
    for name, part in [*model.named_children(), ("all", model)]:
        print(f"  {name:<29}{sum(p.numel() for p in part.parameters()):,}")
    print(f"\nattention weights of the first head over {text[:8]!a} in percent, a row a position:")
    for row in weights[0, 0, :8, :8].tolist():
        print("  " + "".join(f"{100 * weight:5.0f}" for weight in row))
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    print(
        f"\nuntrained loss (chapter 4) {loss:.4f}; blind guessing {math.log(len(characters)):.4f}"
    )


# ---- The fold: a first reader goes on to train_model.py here. What protects stands below. --------


def refuse_too_long(length: int, block_size: int) -> None:
    """Raise ValueError for a sequence that does not fit into the context window."""
    if length > block_size:
        raise ValueError(f"{length} characters do not fit into block_size {block_size}")


class Linear(nn.Linear):
    """A matrix product without bias. On a CPU, a row times a large matrix keeps one core busy, the
    matrix times two columns all of them: writing with the GPU set takes 0.6 of the time.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., n_in) to (..., n_out)."""
        if x.numel() != self.in_features or self.weight.numel() < 100_000 or x.is_cuda:
            return F.linear(x, self.weight)
        columns = x.reshape(1, -1).repeat(2, 1).t()  # (n_in, 2)
        return (self.weight @ columns)[:, 0].reshape(*x.shape[:-1], -1)


def reason(error: BaseException) -> str:
    """What an error says, in one line."""
    words = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return words.splitlines()[0]


# A checkpoint may come from a stranger: nothing in it is executed, and nothing believed unchecked.
SIZES = ("block_size", "n_embd", "n_head", "n_layer", "dropout")
FORMAT = 2  # files of format 1 are the first TinyGPT's, and cannot be read; train again
# What torch.load, given a damaged or forged file, has been seen to raise, beside OSError.
UNREADABLE = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, EOFError)
UNREADABLE += (AssertionError, ArithmeticError, MemoryError, pickle.UnpicklingError)
UNREADABLE += (struct.error, zipfile.BadZipFile)


def load_checkpoint(path: str) -> Tuple[TinyGPT, str, Optional[Dict[str, Any]]]:
    """The model, in eval mode on the CPU; its vocabulary; and what an unfinished run left behind,
    for chapter 4 to check. Raises UserError.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError("it is not a file")
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about oddities that are refused anyway
            plain = plain_zip(file, os.path.getsize(path))
            contents = torch.load(plain, map_location="cpu", weights_only=True)
        return build_model(contents).eval(), contents["vocabulary"], contents.get("training")
    except FileNotFoundError as error:
        raise UserError(f"no file {path!a}; train a model first: train_model.py") from error
    except (OSError, *UNREADABLE) as error:  # UserError is a ValueError
        raise UserError(f"{path!a} is not a usable checkpoint: {reason(error)}") from error


def plain_zip(file: BinaryIO, size: int) -> BinaryIO:
    """A copy of the zip, written here, as a zip can show Python one thing and PyTorch another.

    Raises UserError for a file that is not one whole, undamaged, uncompressed zip, and no more:
    older formats, also in front of a zip, could run code in spite of `weights_only=True`
    (CVE-2025-32434), and compressed parts could fill the memory.
    """
    with zipfile.ZipFile(file) as archive:
        parts, names = archive.infolist(), archive.namelist()
        file.seek(-22, os.SEEK_END)
        end = file.read()
        if parts[0].header_offset != 0 or end[:4] + end[20:] != b"PK\5\6\0\0":
            raise UserError("it is more than a zip")
        if len(set(names)) < len(names) or any(name.endswith("constants.pkl") for name in names):
            raise UserError("it has parts that no checkpoint has")
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise UserError("its parts are compressed, which PyTorch never does")
        if sum(max(part.file_size, part.compress_size) for part in parts) > size:
            raise UserError("it is damaged")
        copy = io.BytesIO()
        with zipfile.ZipFile(copy, "w") as plain:
            for name in names:
                plain.writestr(name, archive.read(name))  # which compares it with its checksum
    copy.seek(0)
    return copy


def build_model(contents: Any) -> TinyGPT:
    """The model that the checkpoint describes, each field checked before memory is spent on it."""
    version = contents.get("format") if isinstance(contents, dict) else None
    if type(version) is not int or version != FORMAT:
        kind = f"format {version}" if type(version) is int else "bare weights (a state_dict) or so"
        raise UserError(f"it holds {kind}, not format {FORMAT}; train again, or update TinyGPT")
    if set(contents) - {"training"} != {"format", "sizes", "vocabulary", "parameters"}:
        raise UserError("it should hold sizes, vocabulary and parameters, and nothing else")
    sizes, vocabulary = contents["sizes"], contents["vocabulary"]
    if not vocabulary or "".join(sorted(set(vocabulary))) != vocabulary:
        raise UserError("its vocabulary is not a sorted set of characters")
    Hyperparameters(**sizes)  # raises UserError for impossible ones
    with torch.device("meta"):  # shapes without memory
        expected = TinyGPT(len(vocabulary), **sizes).state_dict()
    check_tensors("parameters", contents["parameters"], expected)
    model = TinyGPT(len(vocabulary), **sizes)
    model.load_state_dict(contents["parameters"])
    model.sizes = sizes
    return model


def check_tensors(kind: str, found: Any, expected: Dict[str, torch.Tensor]) -> None:
    """Raise UserError unless `found` has the names and shapes of `expected`, plain and finite."""
    if not isinstance(found, dict) or set(found) != set(expected):
        raise UserError(f"its {kind} are not those of the model that it describes")
    for name, like in expected.items():
        one, shape = found[name], tuple(like.shape)
        plain = isinstance(one, torch.Tensor) and one.layout == torch.strided and not one.is_meta
        plain = plain and one.dtype == torch.float32 and one.shape == shape and one.is_contiguous()
        if not plain or not torch.isfinite(one).all():
            raise UserError(f"{name} in its {kind} is no finite float32 tensor of shape {shape}")
    if len({one.untyped_storage().data_ptr() for one in found.values()}) < len(found):
        raise UserError(f"its {kind} share their numbers")  # so they claim more than the file has


if __name__ == "__main__":
    sys.exit(end_with_a_sentence(main))
