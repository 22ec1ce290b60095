"""Chapter 3 of 5: the model, a function that predicts the next character.

At the end of this file you know every part of a GPT: how a position finds out what stands before it
(attention, and a short look at the three before), how it works on what it found (feed-forward),
and why a stack of such blocks can be trained at all. From chapter 2 it takes ids; it hands chapter
4 a function from ids to logits, a number for every character that could come next: the larger, the
likelier. Run it to see what a model looks at (untrained: by chance). Shapes have these letters:

    B  batch: sequences read side by side      C  n_embd: numbers that describe one position
    T  time: positions read at once            H  n_head: attention heads
    S  positions so far: T in training         D  C / H: numbers that one head works with
    V  vocabulary: different characters

The first step is an embedding. An id is a name, not an amount: 7 is not more than 3. So each id
looks up a vector of C numbers, which training finds. From there on a position is such a vector, a
batch has the shape (B, T, C), and every block takes one and gives one back. The simplest part is
Linear, a matrix of parameters: each number it gives is a weighted sum of those it is given (plus no
constant: bias=False). Parts are Modules: PyTorch finds their parameters; part(x) calls `forward`.
"""

import io
import math
import os
import sys
import warnings
import zipfile
from typing import Any, BinaryIO, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hyperparameters import LAPTOP, Hyperparameters, UserError, end_with_a_sentence

REACH = 3  # positions looked back in CausalConvolution, below
ATTENTION_SCALE = 3.0  # see attention_weights


# A vector knows only its own character, but what comes next depends on those before. So a position
# forms three vectors of D numbers from its own (read D as C for now): a query, what it looks for; a
# key, what it can be found by; and a value, what it has to tell. How well a query and a key fit is
# their score, the dot product: the sum of their products number by number. The position receives a
# mixture of all values up to its own, each in the share that its score earns, its attention weight.
# Softmax makes these shares: e to the power of each score, divided by the sum of all these.


def attention_weights(queries: Tensor, keys: Tensor) -> Tensor:
    """How much each position takes of those up to its own, softmax(3 QK^T / sqrt(D)): (B, H, T, S).

    Queries Q, (B, H, T, D), are those of the last T of the S positions of keys K, (B, H, S, D).
    """
    (T, D), S = queries.shape[-2:], keys.shape[-2]
    # Queries and keys have length sqrt(D) (see project). Say D = 32, 256 keys. Random ones have dot
    # products of about +-sqrt(D). Left as they are, the best key gets 0.6 of the mixture by mere
    # chance; divided by sqrt(D), 0.04 (Vaswani et al. 2017). But then no score is above sqrt(D):
    # even a perfect fit, all other scores being 0, gets only 0.5. Three times that is between: 0.3
    # by chance, nearly 1 for a perfect fit. Q @ K^T holds the dot products of queries with keys.
    scores = queries @ keys.transpose(-2, -1) * (ATTENTION_SCALE / math.sqrt(D))  # (B, H, T, S)
    # In training, the answer stands in the same sequence, one position later. A position must not
    # look there (triu: True right of a diagonal): minus infinity becomes a share of exactly 0.
    future = torch.ones(T, S, dtype=torch.bool, device=scores.device).triu(S - T + 1)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1)


# Shuffle the vectors before a position, and its mixture stays the same: a sum has no order. In
# attention, order gets in by turning. Take the D numbers of a query or key in pairs: D / 2 arrows
# in a plane. Every arrow has a fixed speed; at position m it is turned by m times its speed. A
# score is the sum of the dot products of a query's arrows (at m) with a key's (at n); each is both
# lengths times the cosine of the angle between, which turning changes by (m - n) * speed. So the
# score depends on what both positions hold and how far apart they are, not on where they stand:
# what is learned in one place holds in all. (RoPE: rotary position embedding, Su et al. 2021)


def make_rope(block_size: int, head_size: int) -> Tensor:
    """Cosines and signed sines, to turn D / 2 arrows at each position: (2, block_size, D)."""
    # The first arrow turns by 1 radian a position, which tells neighbours apart; slower ones tell
    # near from far; the slowest hardly turn, and compare what is there, wherever it is.
    speeds = 10_000.0 ** (-torch.arange(0, head_size, 2).float() / head_size)  # (D / 2,)
    angles = torch.outer(torch.arange(block_size).float(), speeds)
    cos, sin = angles.cos(), angles.sin()  # (block_size, D / 2) each
    return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Turn the arrows of `x`, (B, heads, T, D), each by its angle at its position."""
    cos, sin = rope  # (T, D) each; the first half of `sin` has a minus sign, because:
    # an arrow (a, b), turned, is (a cos - b sin, b cos + a sin). `x` has all a, then all b.
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # all b, then all a
    return torch.addcmul(x * cos, swapped, sin)  # x * cos + swapped * sin


def layer_norm(x: Tensor) -> Tensor:
    """Shift and scale the D or C numbers of each vector so that their mean is 0 and the mean of
    their squares 1: whatever grew on the way is of usual size again. (LayerNorm, Ba et al. 2016)
    """
    return F.layer_norm(x, x.shape[-1:])


class KVCache:
    """What later positions need of those read so far, wherever a part of the model looks back.

    Without it, each character written would mean reading all before it again. But no position sees
    a later one, so nothing changes at the old ones: their keys and values are kept, and the last
    three inputs of each convolution (below). Training has no cache: skip it until chapter 5.
    """

    def __init__(self) -> None:
        self.length = 0  # positions read so far
        self.kept: Dict[Tuple[nn.Module, str], Tensor] = {}

    def append(self, part: nn.Module, name: str, new: Tensor, keep: Any = None) -> Any:
        """`new`, (..., T, n), after what was kept. `keep` says how many stay (None: all)."""
        if (part, name) in self.kept:
            new = torch.cat((self.kept[part, name], new), dim=-2)
        self.kept[part, name] = new if keep is None else new[..., -keep:, :]
        return new


class MultiHeadAttention(nn.Module):
    """Lets every position collect what it needs from those up to its own.

    One softmax gives one set of shares, so one mixture. But a position has several questions at
    once: which letters does this word have so far, who speaks, does a line end here? The answers
    would blur. So each of H heads forms its own queries, keys and values, of D numbers, from all C
    of a position, and asks its own question; `output` makes their H answers into one vector of C.
    """

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.queries_keys_values = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.output = nn.Linear(n_embd, n_embd, bias=False)

    def project(self, x: Tensor, rope: Tensor) -> Tuple[Tensor, ...]:
        """The queries, keys and values of `x`, (B, T, C): three times (B, H, T, D)."""
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        # One large product makes all of them. The products to come take the last two axes for their
        # matrices; so the heads go to the front, where the batch is, and T stays with D.
        heads = self.queries_keys_values(x).view(B, T, 3 * H, D).transpose(1, 2)  # (B, 3H, T, D)
        queries_keys, values = heads.split((2 * H, H), dim=1)
        # The longer a query or key, the more the best key takes; they could grow without end. So
        # LayerNorm gives each the length sqrt(D), which turning keeps. (after Henry et al. 2020)
        queries_keys = apply_rope(layer_norm(queries_keys), rope)  # (B, 2H, T, D)
        return (*queries_keys.chunk(2, dim=1), values)

    def forward(self, x: Tensor, rope: Tensor, cache: Optional[KVCache] = None) -> Tensor:
        queries, keys, values = self.project(x, rope)
        if cache is not None:
            keys = cache.append(self, "keys", keys)  # (B, H, S, D)
            values = cache.append(self, "values", values)
        if cache is not None and x.shape[1] > 1:  # T > 1, perhaps below S: is_causal needs T = S
            mixture = attention_weights(queries, keys) @ values  # (B, H, T, D)
        else:  # Training, or one new position: PyTorch computes the same, but need not store
            # all shares at once. is_causal hides the future; one new position, the last, has none.
            how = {"is_causal": cache is None, "scale": ATTENTION_SCALE / queries.shape[-1] ** 0.5}
            mixture = F.scaled_dot_product_attention(queries, keys, values, **how)
        return self.output(mixture.transpose(1, 2).reshape(x.shape))  # heads side by side: H D = C


class CausalConvolution(nn.Module):
    """Mixes into every position a little of the three before it.

    The characters just before are the best hint at the next one. Attention can learn to look one
    back, but takes long to find out. Here each of the C numbers of a position gets those at its
    place in the vectors 1, 2 and 3 back added, times a learned factor each (0 at first): a causal
    depthwise convolution (after So et al. 2021, Primer). A laptop's model has five, one before its
    blocks and one in each: 15 back. Attention is for what is farther, or at no fixed distance.
    """

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(REACH, n_embd))  # the farthest first

    def forward(self, x: Tensor, cache: Optional[KVCache] = None) -> Tensor:
        T, is_first = x.shape[1], (cache is None or cache.length == 0)
        inputs = F.pad(x, (0, 0, REACH, 0)) if is_first else x  # zeros before the first position
        if cache is not None:
            inputs = cache.append(self, "inputs", inputs, keep=REACH)  # (B, REACH + T, C)
        for i, factors in enumerate(self.weight):  # (C,); `inputs` begins three before x
            x = torch.addcmul(x, inputs[:, i : i + T], factors)
        return x


class FeedForward(nn.Module):
    """Lets every position work on what it has collected, each on its own.

    Weighted sums of weighted sums are weighted sums: a stack of Linears alone can do no more than
    one. And no sum says "this, but only if that"; a product can. So `up` makes 4 C numbers: 2 C and
    for each of these a gate g. The number is multiplied by silu(g) = g / (1 + e^-g): near 0 for a
    g far below 0, which shuts it out; near g itself for one far above, which lets it in g-fold.
    `down` makes C weighted sums of the 2 C products. (SwiGLU: Shazeer 2020)
    """

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.up = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.down = nn.Linear(2 * n_embd, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gates, numbers = self.up(x).chunk(2, dim=-1)  # (B, T, 2 C) each
        return self.down(F.silu(gates) * numbers)  # (B, T, C)


class Block(nn.Module):
    """Attention, then, after a short look back, feed-forward; each adds to what is there.

    If every part replaced its input, little of the input would survive a deep stack, and little of
    what tells the first blocks how to improve (slopes, chapter 4). So both add what they find, and
    what was there passes through (residual connections, He et al. 2015). As such sums grow from
    block to block, both read a copy of usual size (LayerNorm in front: Xiong et al. 2020). Dropout,
    in training only, zeroes a random share of what is added, and enlarges the rest to make up:
    no number can be relied upon, and learning by heart is harder (Srivastava et al. 2014).
    """

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(n_embd, n_head)
        self.convolution = CausalConvolution(n_embd)
        self.feed_forward = FeedForward(n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: Tensor, cache: Optional[KVCache] = None) -> Tensor:
        x = x + self.dropout(self.attention(layer_norm(x), rope, cache))
        nearby = self.convolution(layer_norm(x), cache)
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
        self.unembedding = nn.Linear(n_embd, vocab_size, bias=False)
        self.after_next = nn.Linear(n_embd, vocab_size, bias=False)  # for chapter 4 alone
        rope = make_rope(block_size, n_embd // n_head)
        self.register_buffer("rope", rope, persistent=False)  # follows from the sizes: not saved
        self.initialise()

    def initialise(self) -> None:
        """Random, as parameters that start equal and are used alike stay equal. The last Linear of
        a part may be 0, as its inputs differ: so blocks add nothing at first, all logits are 0. In
        step 1 (chapter 4), only unembedding and after_next have slopes; from step 3 on, all have.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):  # std: root of their mean square
                nn.init.normal_(module.weight, std=0.05)  # a sum is ~0.05 sqrt(C) times as large
        nn.init.normal_(self.embedding.weight)
        nn.init.zeros_(self.unembedding.weight)
        nn.init.zeros_(self.after_next.weight)
        for block in self.blocks:
            nn.init.zeros_(block.attention.output.weight)
            nn.init.zeros_(block.feed_forward.down.weight)

    def forward(self, ids: Tensor, cache: Optional[KVCache] = None, both: bool = False) -> Any:
        """Ids (B, T) to logits (B, T, V): at each position, for the character that comes after it.

        With a cache, `ids` go on where it ends. With `both`, a second set comes with these logits:
        those for the next character but one. Raises ValueError beyond block_size positions.
        """
        past, T = 0 if cache is None else cache.length, ids.shape[1]
        refuse_too_long(past + T, self.block_size)
        rope = self.rope[:, past : past + T]  # (2, T, D)
        x = layer_norm(self.convolution(self.embedding(ids), cache))  # (B, T, C), of usual size
        for block in self.blocks:
            x = block(x, rope, cache)
        if cache is not None:
            cache.length += T
        x = layer_norm(x)
        logits = self.unembedding(x)  # (B, T, V)
        return (logits, self.after_next(x)) if both else logits


def attention_of(model: TinyGPT, ids: Tensor) -> List[Tensor]:
    """The attention weights in every block, (B, H, T, T) each, as the model reads `ids`, (B, T)."""
    rope, weights = model.rope[:, : ids.shape[1]], []
    x = layer_norm(model.convolution(model.embedding(ids)))  # (B, T, C)
    for block in model.blocks:
        queries, keys, _ = block.attention.project(layer_norm(x), rope)  # (B, H, T, D)
        weights.append(attention_weights(queries, keys))
        x = block(x, rope)
    return weights


def main(argv: Optional[List[str]] = None) -> None:
    """Show the shapes, what the heads look at in a line of text, and what could come next."""
    path = (argv or sys.argv[1:] or ["tiny_gpt_model.pth"])[0]
    with open("input.txt", encoding="utf-8", errors="replace") as file:
        line = max(file.read(2_000).splitlines(), key=len, default="")[:55] or "nothing"
    if os.path.exists(path):
        model, vocabulary, _ = load_checkpoint(path)
        line = "".join(c for c in line if c in vocabulary)[: model.block_size] or vocabulary[0]
    else:
        path, vocabulary = f"untrained, as {path} is missing", "".join(sorted(set(line)))
        torch.manual_seed(LAPTOP.seed)
        model = TinyGPT(len(vocabulary), 64, LAPTOP.n_embd, LAPTOP.n_head, LAPTOP.n_layer)
    ids = torch.tensor([[vocabulary.index(c) for c in line]])  # (1, T)
    weights, logits = attention_of(model, ids), model(ids)
    print(f"model: {path!a}\nids (B, T) {tuple(ids.shape)} give in each block attention weights")
    print(f"(B, H, T, S) {tuple(weights[0].shape)}, and logits (B, T, V) {tuple(logits.shape)}\n")
    print("what the last position takes, by head: . 2 %  : 5 %  o 10 %  O 20 %  @ 40 % or more")
    print(" " * 17 + line.encode("ascii", "replace").decode())
    for block, heads in enumerate(weights[:4], start=1):
        for head, shares in enumerate(heads[0, :4, -1].tolist(), start=1):
            marks = [" .:oO@"[sum(x > y for y in (0.02, 0.05, 0.1, 0.2, 0.4))] for x in shares]
            print(f"block {block}, head {head}  {''.join(marks)}")
    likely = zip(*logits[0, -1].softmax(dim=-1).topk(min(8, len(vocabulary))))
    print("\nnext:", ", ".join(f"{vocabulary[i]!a} {100 * p:.1f} %" for p, i in likely))


# ---- The fold: a first reader goes on to train_model.py here. What protects stands below. --------


def refuse_too_long(length: int, block_size: int) -> None:
    """Raise ValueError for a sequence that does not fit into the context window."""
    if length > block_size:
        raise ValueError(f"{length} characters do not fit into block_size {block_size}")


def reason(error: BaseException) -> str:
    """What an error says, in one line."""
    words = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return words.splitlines()[0]


# A checkpoint may come from a stranger: nothing in it is executed, and nothing believed unchecked.
SIZES = ("block_size", "n_embd", "n_head", "n_layer", "dropout")
FORMAT = 2  # files of format 1 are the first TinyGPT's, and cannot be read; train again


def load_checkpoint(path: str) -> Tuple[TinyGPT, str, Optional[Dict[str, Any]]]:
    """The model on the CPU, its vocabulary, and what a run left to resume. Raises UserError."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError("it is not a file")
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about oddities that are refused anyway
            contents = torch.load(plain_zip(file.read()), map_location="cpu", weights_only=True)
        return build_model(contents), contents["vocabulary"], contents.get("training")
    except Exception as error:  # a damaged or forged file can make torch.load raise anything
        problem = f"{path!a} is not a usable checkpoint: {reason(error)}"
        raise UserError(f"{problem}; python train_model.py makes one") from error


def plain_zip(data: bytes) -> BinaryIO:
    """A copy of the zip, written here, as a zip can show Python one thing and PyTorch another.

    Raises UserError for anything but one whole, uncompressed zip: older formats, also in front of a
    zip, could run code in spite of `weights_only=True` (CVE-2025-32434).
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(copy, "w") as new:
        parts, names = archive.infolist(), archive.namelist()
        plain = parts[0].header_offset == 0 and data[-22:-18] + data[-2:] == b"PK\5\6\0\0"
        plain = plain and sum(max(one.file_size, one.compress_size) for one in parts) <= len(data)
        odd = len(set(names)) < len(names) or any(name.endswith("constants.pkl") for name in names)
        if odd or not plain:
            raise UserError("it is not one plain, whole zip, as PyTorch writes it")
        for name in names:
            new.writestr(name, archive.read(name))  # which compares it with its checksum
    return io.BytesIO(copy.getvalue())


def build_model(contents: Any) -> TinyGPT:
    """The model that the checkpoint describes, each field checked before memory is spent on it."""
    needed = {"format", "sizes", "vocabulary", "parameters"}
    plain = set(contents) - {"training"} == needed and type(contents["format"]) is int
    if not plain or contents["format"] != FORMAT:  # to compare a forged tensor could fill memory
        raise UserError(f"it is not a checkpoint of format {FORMAT}")
    sizes, vocabulary = contents["sizes"], contents["vocabulary"]
    if not vocabulary or "".join(sorted(set(vocabulary))) != vocabulary:
        raise UserError("its vocabulary is not a sorted set of characters")
    Hyperparameters(**sizes)  # raises UserError for impossible ones
    with torch.device("meta"):  # shapes without memory
        expected = dict(TinyGPT(len(vocabulary), **sizes).state_dict())
    check_like("parameters", contents["parameters"], expected)
    model = TinyGPT(len(vocabulary), **sizes)
    model.load_state_dict(contents["parameters"])
    model.sizes = sizes
    return model.eval()


def check_like(name: str, found: Any, like: Any) -> None:
    """Raise UserError unless `found` is built as `like` is, from plain and finite numbers."""
    if type(found) is type(like) is list:
        found, like = dict(enumerate(found)), dict(enumerate(like))
    fits = type(found) is type(like)
    if fits and isinstance(like, dict):
        fits = set(found) == set(like)
        for key in like if fits else ():
            check_like(f"{name}/{key}", found[key], like[key])
        tensors = [one for one in found.values() if isinstance(one, Tensor)]
        # None may share its numbers with another: so they could claim more than the file has.
        fits = fits and len({one.untyped_storage().data_ptr() for one in tensors}) == len(tensors)
    elif fits and isinstance(like, Tensor):
        fits = (found.layout, found.dtype, found.shape) == (like.layout, like.dtype, like.shape)
        fits = fits and not found.is_meta and found.is_contiguous() and found.isfinite().all()
    elif fits and isinstance(like, (int, float)):
        fits = abs(found) < 1e15 or found == like  # such as a large seed
    if not fits:
        raise UserError(f"what it holds as {name} does not fit the rest")


if __name__ == "__main__":
    sys.exit(end_with_a_sentence(main))
