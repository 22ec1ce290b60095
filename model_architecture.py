"""Chapter 3 of 5: the machine that predicts the next character.

At the end of this file you know every part of a GPT: how a character finds out what stands before
it (attention, a short look at its neighbours), how it thinks about what it found (the feed-forward
network), and why a stack of such blocks can be trained at all. It takes ids from chapter 2 and
hands chapter 4 a function from ids to a score for every possible next character. Run it to see the
shapes as a batch flows through:

    python model_architecture.py

Shapes are written in these letters, here and in the chapters after it:

    B  batch: windows read side by side          C  n_embd: numbers that describe one position
    T  time: positions in a window               H  n_head: attention heads
    V  vocabulary: different characters          D  C / H: numbers one head works with
"""

import contextlib
import io
import math
import os
import pickle
import shutil
import signal
import stat
import struct
import sys
import warnings
import zipfile
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

REACH = 3  # how many characters back a NeighbourMix looks

Rotation = Tuple[torch.Tensor, torch.Tensor]


# The heart of a GPT is attention, below: every position looks back at the others and takes from
# each what it needs. One thing it lacks comes first.
#
# Attention compares what stands at two positions, but by itself it cannot tell which of the two
# comes first, or how far apart they are. Turning the numbers at position t by an angle that grows
# with t mends that: the dot product of two turned vectors depends on the angle between them, so on
# their distance alone. Some pairs of numbers turn fast and tell neighbours apart, others turn
# slowly and measure long ways (rotary positions, Su et al. 2021).


def rotation_table(block_size: int, head_size: int) -> Rotation:
    """Cosines and sines of every position's angles, each (block_size, D)."""
    speeds = 10_000.0 ** (-torch.arange(0, head_size, 2).float() / head_size)  # (D / 2,)
    angles = torch.outer(torch.arange(block_size).float(), speeds)
    cosines = torch.cat((angles.cos(), angles.cos()), dim=-1)  # (block_size, D)
    sines = torch.cat((-angles.sin(), angles.sin()), dim=-1)
    return cosines, sines


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Turn each pair (i, i + D / 2) of the D numbers of `x`, (B, H, T, D), by its angle."""
    cosines, sines = rotation
    # A point (a, b) turned by an angle is (a cos - b sin, b cos + a sin); the minus stands in the
    # table of sines.
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cosines, torch.cat((b, a), dim=-1), sines)


class LayerNorm(nn.LayerNorm):
    """Shifts and scales the last n numbers to mean 0 and variance 1 (Ba et al. 2016).

    Sums grow from layer to layer; what reads them learns best from numbers of the same size. It has
    no learned scale, as the matrix that reads its output can learn that as well; looking for one is
    what makes PyTorch's own forward slow on a single position.
    """

    def __init__(self, n: int) -> None:
        super().__init__(n, elementwise_affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., n) to (..., n)."""
        return F.layer_norm(x, self.normalized_shape)


class MultiHeadAttention(nn.Module):
    """Lets every position collect what it needs from the positions before it.

    Each position asks a question (its query), advertises what it has (its key) and offers something
    (its value). It receives the average of all values up to its own, weighted by how well each key
    answers the query. Several heads do so side by side, each with questions of its own (Vaswani et
    al. 2017).
    """

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.queries_keys_values = Linear(n_embd, 3 * n_embd)
        self.output = Linear(n_embd, n_embd)

    def project(self, x: torch.Tensor, rotation: Rotation) -> Tuple[torch.Tensor, ...]:
        """Queries, keys and values of `x`, (B, T, C): three times (B, H, T, D)."""
        B, T, C = x.shape
        D = C // self.n_head
        projected = self.queries_keys_values(x).view(B, T, 3 * self.n_head, D).transpose(1, 2)
        queries_keys, values = projected.split((2 * self.n_head, self.n_head), dim=1)
        # Nothing but LayerNorm keeps queries and keys from growing until softmax picks a single
        # position and stops learning; normalised, they allow a higher learning rate (Henry et al.
        # 2020).
        queries_keys = rotate(F.layer_norm(queries_keys, (D,)), rotation)  # (B, 2H, T, D)
        queries, keys = queries_keys.chunk(2, dim=1)
        return queries, keys, values

    @staticmethod
    def weights(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """How much each position takes from each: (B, H, T, T), every row sums to 1.

        The score of two positions is the dot product of one's query and the other's key. Softmax
        turns a row of scores into shares: e to the power of each, divided by their sum. Together:
        softmax(QK^T / sqrt(D)), with the future masked out. `forward` leaves it to PyTorch, which
        gets the same result without storing this table.
        """
        T, D = queries.shape[-2:]
        # A dot product of D random terms has variance D, so raw scores grow with the head size and
        # softmax would start out nearly one-hot, where its gradient vanishes. Dividing by sqrt(D)
        # keeps them near 1 (Vaswani et al. 2017, section 3.2.1).
        scores = queries @ keys.transpose(-2, -1) / math.sqrt(D)  # (B, H, T, T)
        # In training the answer stands in the window, one position later. Minus infinity becomes a
        # weight of exactly zero: no position can look ahead.
        future = torch.ones(T, T, dtype=torch.bool, device=scores.device).triu(diagonal=1)
        return scores.masked_fill(future, -math.inf).softmax(dim=-1)

    def forward(
        self, x: torch.Tensor, rotation: Rotation, memory: Optional["Memory"] = None, past: int = 0
    ) -> torch.Tensor:
        """(B, T, C) to (B, T, C); with a memory, the T positions come after its `past` ones."""
        B, T, C = x.shape
        queries, keys, values = self.project(x, rotation)
        if memory is not None:
            keys, values = memory.add(keys, values, past)
        # Without a past PyTorch masks the future itself (is_causal). A single new position may see
        # everything; several after a past need a mask that is shifted by it.
        mask = None
        if past and T > 1:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(diagonal=past)
        collected = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=not past
        )  # (B, H, T, D)
        return self.output(collected.transpose(1, 2).reshape(B, T, C))


class NeighbourMix(nn.Module):
    """Lets every position see a little of the three before it.

    The characters just before are the best hint at the next one. Attention can learn to look one
    step back, but it needs long to find out; a sum with learned weights has it from the start. One
    weight per number and step back: a causal depthwise convolution (after So et al. 2021, Primer,
    who put one behind the projections of attention). The weights start at zero, so an untrained mix
    changes nothing.
    """

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(REACH, n_embd))  # oldest neighbour first

    def forward(
        self, x: torch.Tensor, memory: Union["Memory", "Cache", None] = None
    ) -> torch.Tensor:
        """(B, T, C) to (B, T, C); a Memory or Cache holds the neighbours from before `x`."""
        T = x.shape[1]
        if memory is None:
            window = F.pad(x, (0, 0, REACH, 0))  # (B, REACH + T, C)
        else:
            before, window = memory.neighbours, torch.cat((memory.neighbours, x), dim=1)
            memory.neighbours = window[:, T:]
            if T == 1:  # the same sum in one go
                return x + (before * self.weight).sum(dim=1, keepdim=True)
        for index, weight in enumerate(self.weight):
            x = torch.addcmul(x, window[:, index : index + T], weight)
        return x


class FeedForward(nn.Module):
    """Lets every position think about what attention has brought, each on its own.

    Sums of sums are only sums: without a bend, a stack of layers could do no more than one. So the
    numbers go through a wide layer, negatives become 0, the rest are squared, and a second layer
    brings them back. The square learns faster than ReLU alone (So et al. 2021).
    """

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.up = Linear(n_embd, 4 * n_embd)
        self.down = Linear(4 * n_embd, n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) to (B, T, C)."""
        return self.down(squared_relu(self.up(x)))


class Block(nn.Module):
    """Attention, then feed-forward, each adding to what is already there.

    A deep stack is hard to train when every layer replaces its input: the signal fades on its way.
    Here each part reads a normalised copy and adds its result, so that the input itself passes
    through untouched (residual connections, He et al. 2015; LayerNorm in front, Xiong et al. 2020).
    """

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(n_embd)
        self.attention = MultiHeadAttention(n_embd, n_head)
        self.feed_forward_norm = LayerNorm(n_embd)
        self.mix = NeighbourMix(n_embd)
        self.feed_forward = FeedForward(n_embd)
        self.dropout = dropout

    def forward(
        self, x: torch.Tensor, rotation: Rotation, memory: Optional["Memory"] = None, past: int = 0
    ) -> torch.Tensor:
        """(B, T, C) to (B, T, C)."""
        attended = self.attention(self.attention_norm(x), rotation, memory, past)
        x = x + self.thin_out(attended)
        thought = self.feed_forward(self.mix(self.feed_forward_norm(x), memory))
        return x + self.thin_out(thought)

    def thin_out(self, x: torch.Tensor) -> torch.Tensor:
        """In training, zero a share of `x`, so that learning by heart is harder (dropout)."""
        return F.dropout(x, self.dropout) if self.training else x


class TinyGPT(nn.Module):
    """The whole model: ids in, a score (logit) for every possible next character out.

    Raises ValueError for sizes that no model can have.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        n_embd: int,
        n_head: int,
        n_layer: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if n_embd % (2 * n_head):
            raise ValueError(f"n_embd {n_embd} is not a multiple of 2 * n_head ({2 * n_head})")
        self.arguments = {
            "vocab_size": vocab_size,
            "block_size": block_size,
            "n_embd": n_embd,
            "n_head": n_head,
            "n_layer": n_layer,
            "dropout": float(dropout),
        }
        self.block_size = block_size
        # An id is a name, not an amount: 7 is not more than 3. So each id first looks up a vector
        # of C learned numbers, its embedding.
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.mix = NeighbourMix(n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout) for _ in range(n_layer))
        self.norm = LayerNorm(n_embd)
        self.head = Linear(n_embd, vocab_size)
        # Tables that follow from the sizes are not worth a place in the checkpoint.
        cosines, sines = rotation_table(block_size, n_embd // n_head)
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """Small random matrices, except that whatever writes a result starts at zero.

        So every block begins as "change nothing" and all characters are equally likely: the first
        loss is exactly ln(V), and learning starts from there instead of from random noise.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.embedding.weight)
        nn.init.zeros_(self.head.weight)
        for block in self.blocks:
            nn.init.zeros_(block.attention.output.weight)
            nn.init.zeros_(block.feed_forward.down.weight)

    def new_cache(self, batch: int) -> "Cache":
        """An empty cache for `batch` windows read side by side."""
        n_embd, n_head = self.arguments["n_embd"], self.arguments["n_head"]
        like = self.embedding.weight.detach()
        memories = [Memory(batch, n_head, self.block_size, n_embd, like) for _ in self.blocks]
        return Cache(memories, like.new_zeros(batch, REACH, n_embd))

    def forward(self, tokens: torch.Tensor, cache: Optional["Cache"] = None) -> torch.Tensor:
        """Ids (B, T) to logits (B, T, V): at every position, scores for the character after it.

        With a cache, the T ids come after those already read into it. Raises ValueError when all
        of them together are longer than the context window.
        """
        T = tokens.shape[1]
        past = cache.length if cache else 0
        if past + T > self.block_size:
            raise ValueError(f"{past + T} characters do not fit into block_size {self.block_size}")
        rotation = (self.cosines[past : past + T], self.sines[past : past + T])
        x = self.norm(self.mix(self.embedding(tokens), cache))  # (B, T, C)
        for index, block in enumerate(self.blocks):
            x = block(x, rotation, cache and cache.memories[index], past)
        if cache:
            cache.length += T
        return self.head(self.norm(x))  # (B, T, V)


def count_parameters(vocab_size: int, n_embd: int, n_layer: int) -> int:
    """The numbers that training finds: known before a model of that size takes up memory."""
    block = 12 * n_embd**2 + REACH * n_embd  # 4 C^2 in attention, 8 C^2 in feed-forward, and a mix
    return 2 * vocab_size * n_embd + REACH * n_embd + n_layer * block


# ---- What makes it fast -------------------------------------------------------------------------


class Memory:
    """What a block remembers of the positions it has read, so that a new one costs one position.

    Without it, writing one more character would mean reading the whole window again. Keys and
    values of the past never change, because no position sees what comes after it; so they are kept.
    """

    def __init__(self, batch: int, n_head: int, block_size: int, n_embd: int, like: torch.Tensor):
        shape = (batch, n_head, block_size, n_embd // n_head)
        self.keys = like.new_zeros(shape)  # (B, H, block_size, D)
        self.values = like.new_zeros(shape)
        self.neighbours = like.new_zeros(batch, REACH, n_embd)  # the last ones read, oldest first

    def add(self, keys: torch.Tensor, values: torch.Tensor, past: int) -> Tuple[torch.Tensor, ...]:
        """Keep T more keys and values, (B, H, T, D), after `past`; return all there are now."""
        T = keys.shape[2]
        self.keys.narrow(2, past, T).copy_(keys)
        self.values.narrow(2, past, T).copy_(values)
        return self.keys.narrow(2, 0, past + T), self.values.narrow(2, 0, past + T)


class Cache:
    """The memories of all blocks, and the neighbours of the model itself."""

    def __init__(self, memories: List[Memory], neighbours: torch.Tensor) -> None:
        self.memories, self.neighbours = memories, neighbours
        self.length = 0  # positions read so far


class Linear(nn.Linear):
    """A matrix product without bias, quick for few rows as well.

    In writing, a large matrix only streams past one row per sample. The usual product, rows times
    matrix, is made for many rows and has one core read it, slowly. Matrix times columns is the same
    with the roles exchanged, and all cores read; but only from two columns on, so a single one is
    doubled.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, n_in) to (B, T, n_out)."""
        weight, rows = self.weight, x.numel() // self.in_features
        if weight.numel() < 100_000 or not 1 <= rows <= 8 or x.device.type != "cpu":
            return F.linear(x, weight)
        flat = x.reshape(rows, -1)
        columns = (flat if rows > 1 else torch.cat((flat, flat))).t()  # (n_in, B * T), or 2 columns
        return torch.mm(weight, columns)[:, :rows].t().reshape(*x.shape[:-1], self.out_features)


class SquaredReLU(torch.autograd.Function):
    """max(x, 0)^2 with its gradient, 2 max(x, 0), written out.

    PyTorch would put the gradient together from those of two steps, in four passes over the widest
    numbers of the model. One pass does.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Any shape to the same shape."""
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the result to the gradient of `x`."""
        (positive,) = ctx.saved_tensors
        return torch.addcmul(positive.new_zeros(()), gradient, positive, value=2)


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2. Only a CPU needs help with its gradient: for a GPU it is compiled."""
    if torch.is_grad_enabled() and x.device.type == "cpu":
        return SquaredReLU.apply(x)
    positive = F.relu(x)
    return positive * positive


# ---- Where to compute ------------------------------------------------------------------------


class DeviceError(ValueError):
    """A device that was asked for and cannot be used. The message says why."""


def choose_device(wanted: str) -> Tuple[torch.device, str]:
    """The device for "auto", "cpu", "cuda" or "mps" and, in a few words, why this one.

    Raises DeviceError for a device that was asked for by name and does not work.
    """
    problem = "no CUDA GPU is visible"
    if wanted in ("auto", "cuda"):
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if "LOCAL_RANK" in os.environ:
                wanted = "cuda"  # one process on the CPU would keep those on GPUs waiting
            try:  # a GPU too old for this build of PyTorch is visible, yet cannot run anything
                torch.ones(8, 8, device=device).mm(torch.ones(8, 8, device=device)).sum().item()
                return device, torch.cuda.get_device_name(device)
            except RuntimeError as error:
                problem = f"the GPU is visible but cannot run a kernel: {reason(error)}"
        if wanted == "auto":
            return torch.device("cpu"), problem
        raise DeviceError(f"--device cuda cannot be used ({problem}); try --device cpu")
    if wanted == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError("--device mps cannot be used (no MPS here); try --device cpu")
        if leaks_future(torch.device("mps")):
            raise DeviceError("attention on this MPS device sees the future; try --device cpu")
    return torch.device(wanted), "as asked for"


def leaks_future(device: torch.device) -> bool:
    """Whether attention computed on `device` lets a position see a later one, as some Macs did."""
    attention = MultiHeadAttention(n_embd=64, n_head=4).to(device)
    rotation = tuple(table.to(device) for table in rotation_table(32, 16))
    one = torch.randn(2, 32, 64).to(device)
    other = torch.cat((one[:, :16], -one[:, 16:]), dim=1)  # differs in the second half only
    with torch.no_grad():
        difference = attention(one, rotation)[:, :16] - attention(other, rotation)[:, :16]
    return not difference.abs().max().item() < 1e-5


def reason(error: BaseException) -> str:
    """What an error says, in one line and in ASCII."""
    words = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return words.splitlines()[0].encode("unicode_escape").decode()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or Python ran out of memory, on any device and any system."""
    signs = (
        "out of memory",
        "can't allocate memory",
        "not enough memory",
        "bad alloc",
        "bad_alloc",
    )
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


# ---- Saving: one file, whole or not at all -----------------------------------------------------

FORMAT = 1  # grows when a file written today can no longer be read as it was


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message says what is wrong with it."""


class SaveError(Exception):
    """A file that could not be written. What stood there before is untouched."""


def save_checkpoint(
    path: str,
    model: TinyGPT,
    characters: str,
    weights: Optional[Dict[str, torch.Tensor]] = None,
    training: Optional[Dict[str, Any]] = None,
) -> None:
    """Write all that generation needs, and in `training` what an unfinished run needs, to `path`.

    `weights` are those to generate with, the model's present ones if absent. Raises SaveError.
    """
    contents = {
        "format": FORMAT,
        "model": model.arguments,
        "vocabulary": characters,
        "weights": to_cpu(model.state_dict() if weights is None else weights),
    }
    if training is not None:
        contents["training"] = training
    file = io.BytesIO()
    torch.save(contents, file)
    write_atomically(path, file.getbuffer())


def to_cpu(tensors: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Copies on the CPU, which later training steps do not change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def temporary_name(path: str) -> str:
    """Where `path` is written before it takes its place: hidden, and the same every time.

    So what a crash leaves behind is replaced by the next save, and never piles up.
    """
    folder, name = os.path.split(os.path.realpath(path))
    return os.path.join(folder, f".{name}.unfinished")


def previous_name(path: str) -> str:
    """The name beside `path` under which an older file of that name is kept."""
    stem, extension = os.path.splitext(path)
    return f"{stem}.previous{extension}"


def write_atomically(path: str, data: Any) -> None:
    """Replace the file `path` by `data`: at any moment, even of a crash, it is the old or the new.

    Raises SaveError when the system refuses; then nothing of the new file stays behind.
    """
    temporary = temporary_name(path)
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # on the disk before the name points to it
            os.replace(temporary, os.path.realpath(path))
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise
        sync_folder(os.path.dirname(temporary))
    except OSError as error:
        raise SaveError(
            f"cannot write {path!a}: {reason(error)}; {len(data) / 1e6:.1f} MB are needed in its "
            f"folder{free_space(temporary)}"
        ) from error


def sync_folder(folder: str) -> None:
    """Make a new name in `folder` survive a power cut, where the system can (Windows cannot)."""
    if os.name == "posix":
        with contextlib.suppress(OSError):  # some file systems cannot; the file is whole anyway
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def free_space(path: str) -> str:
    """The free space beside `path` as the end of a sentence, or nothing if nobody can tell."""
    try:
        return f", {shutil.disk_usage(os.path.dirname(path)).free / 1e6:.1f} MB are free"
    except OSError:
        return ""


def check_writable(path: str) -> None:
    """Raise SaveError unless a file can be written beside `path` and put in its place."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise SaveError(f"{path!a} is not a file and cannot be replaced by one; name another")
    try:
        with open(temporary_name(path), "wb"):
            pass
        os.remove(temporary_name(path))
    except OSError as error:
        raise SaveError(f"cannot write beside {path!a}: {reason(error)}") from error


def keep_previous(path: str) -> None:
    """Copy the file `path`, if there is one, to its previous name. Raises SaveError."""
    if os.path.exists(path):
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise SaveError(f"cannot read {path!a} to keep it: {reason(error)}") from error
        write_atomically(previous_name(path), data)


# ---- Loading: a checkpoint may come from a stranger --------------------------------------------

# The largest sizes that are believed, so that a forged header cannot ask for the whole memory.
LARGEST = {
    "vocab_size": sys.maxunicode + 1,
    "block_size": 65_536,
    "n_embd": 65_536,
    "n_head": 1_024,
    "n_layer": 1_000,
}

# What torch.load, given a damaged or forged file, has been seen to raise.
UNREADABLE = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    EOFError,
    OSError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)


def load_checkpoint(path: str) -> Tuple[TinyGPT, str, Optional[Dict[str, Any]]]:
    """The model on the CPU in eval mode, its vocabulary, and what an unfinished run left behind.

    Nothing in the file is executed, and no field is believed before it is checked. The third part
    (None for a finished run) is for chapter 4, which checks it. Raises CheckpointError.
    """
    try:
        contents = read_safely(path)
        model = build_checked(contents, os.path.getsize(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"no file {path!a}; train a model first: train_model.py") from error
    except OSError as error:
        raise CheckpointError(f"{path!a} cannot be read: {reason(error)}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path!a} is not a usable checkpoint: {error}") from error
    return model.eval(), contents["vocabulary"], contents.get("training")


def read_safely(path: str) -> Any:
    """What `torch.load` finds in the file, once its wrapping has proved harmless."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise CheckpointError("it is not a file")
    try:
        with open(path, "rb") as file:
            check_zip(file, os.path.getsize(path))
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about oddities that the checks refuse anyway
                return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except UNREADABLE as error:
        raise CheckpointError(f"it cannot be read ({reason(error)})") from error


def check_zip(file: Any, size: int) -> None:
    """Refuse a file that is not a plain, intact, uncompressed zip, before torch.load sees it.

    Older PyTorch formats could run code even with `weights_only=True` (CVE-2025-32434), and
    compressed members could unpack to more than the memory holds. Raises CheckpointError.
    """
    if not zipfile.is_zipfile(file):
        raise CheckpointError("not PyTorch's zip format")
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CheckpointError("its parts are compressed, which PyTorch never does")
        if sum(max(member.file_size, member.compress_size) for member in members) > size:
            raise CheckpointError("its parts claim to be larger than the file")
        damaged = archive.testzip()  # compares every part with its checksum
        if damaged is not None:
            raise CheckpointError(f"the part {damaged!a} is damaged")


def build_checked(contents: Any, file_size: int) -> TinyGPT:
    """The model that the checkpoint describes, each field checked before memory is spent on it."""
    if not isinstance(contents, dict):
        raise CheckpointError(f"it holds a {type(contents).__name__}, not a dict")
    if contents and all(isinstance(value, torch.Tensor) for value in contents.values()):
        raise CheckpointError(
            "it holds bare weights (a state_dict) without sizes and vocabulary, as older scripts "
            "saved them; train again with train_model.py"
        )
    version = contents.get("format")
    if type(version) is int and version > FORMAT:
        raise CheckpointError(f"format {version} is newer than this TinyGPT reads; update it")
    if type(version) is not int or version != FORMAT:
        raise CheckpointError("it names no known format")
    expected = {"format", "model", "vocabulary", "weights"}
    if set(contents) - {"training"} != expected:
        raise CheckpointError(f"it should hold {', '.join(sorted(expected))} and nothing else")
    if not isinstance(contents.get("training", {}), dict):
        raise CheckpointError("its unfinished run is damaged")
    arguments, characters, weights = (contents[k] for k in ("model", "vocabulary", "weights"))

    if not isinstance(arguments, dict) or set(arguments) != {*LARGEST, "dropout"}:
        raise CheckpointError(f"its model needs {', '.join(LARGEST)} and dropout")
    for name, largest in LARGEST.items():
        if type(arguments[name]) is not int or not 1 <= arguments[name] <= largest:
            raise CheckpointError(f"{name} is not a whole number from 1 to {largest:,}")
    if type(arguments["dropout"]) is not float or not 0 <= arguments["dropout"] < 1:
        raise CheckpointError("dropout is not a number from 0 to 1")
    if type(characters) is not str or len(characters) != arguments["vocab_size"]:
        raise CheckpointError("its vocabulary is not a text of vocab_size characters")
    if any(one >= next_one for one, next_one in zip(characters, characters[1:])):
        raise CheckpointError("its vocabulary has a character twice or is not in order")
    sizes = (arguments["vocab_size"], arguments["n_embd"], arguments["n_layer"])
    if 4 * count_parameters(*sizes) > file_size:
        raise CheckpointError("the model it describes is larger than the file")
    try:
        model = TinyGPT(**arguments)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    check_tensors("weights", weights, model.state_dict())
    model.load_state_dict(weights)
    return model


def check_tensors(kind: str, found: Any, expected: Dict[str, torch.Tensor]) -> None:
    """Raise CheckpointError unless `found` has the names, shapes and types expected, all finite."""
    if not isinstance(found, dict) or set(found) != set(expected):
        raise CheckpointError(f"its {kind} are not those of the model it describes")
    for name, tensor in expected.items():
        one = found[name]
        if not isinstance(one, torch.Tensor) or one.shape != tensor.shape:
            raise CheckpointError(f"{name} in its {kind} is not of shape {tuple(tensor.shape)}")
        dense = one.layout == torch.strided and one.device.type == "cpu" and one.is_contiguous()
        if one.dtype != torch.float32 or not dense:
            raise CheckpointError(f"{name} in its {kind} is not a plain float32 tensor")
        if not torch.isfinite(one).all():
            raise CheckpointError(f"{name} in its {kind} has values that are not finite")


def main() -> None:
    """Show shapes, parameters, one attention triangle and the untrained loss on a real text."""
    with open(__file__, encoding="utf-8") as file:  # any text will do: this very file
        text = file.read()
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(c) for c in text[: 4 * 64 + 1]])
    torch.manual_seed(1337)
    model = TinyGPT(len(characters), block_size=64, n_embd=128, n_head=4, n_layer=4)
    inputs, targets = ids[:-1].view(4, 64), ids[1:].view(4, 64)

    def show(name: str, tensor: torch.Tensor, letters: str) -> None:
        print(f"  {name:<28}{letters:<14}{tuple(tensor.shape)}")

    print("shapes, as a batch flows through:")
    rotation = (model.cosines, model.sines)
    x = model.norm(model.mix(model.embedding(inputs)))
    normalised = model.blocks[0].attention_norm(x)
    queries, keys, values = model.blocks[0].attention.project(normalised, rotation)
    show("ids", inputs, "(B, T)")
    show("what the blocks read", x, "(B, T, C)")
    show("queries, keys, values, each", queries, "(B, H, T, D)")
    weights = MultiHeadAttention.weights(queries, keys)
    show("attention weights", weights, "(B, H, T, T)")
    show("collected values", weights @ values, "(B, H, T, D)")
    show("after each block", model.blocks[0](x, rotation), "(B, T, C)")
    logits = model(inputs)
    show("logits", logits, "(B, T, V)")

    print("\nparameters:")
    for name, part in model.named_children():
        print(f"  {name:<28}{sum(p.numel() for p in part.parameters()):>10,}")
    print(f"  {'all':<28}{sum(p.numel() for p in model.parameters()):>10,}")

    print(
        f"\nattention weights of the first head over {text[:8]!a}, in percent; a row is a position:"
    )
    for row in weights[0, 0, :8, :8]:
        print("  " + "".join(f"{100 * weight:5.0f}" for weight in row.tolist()))

    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    blind = math.log(len(characters))
    print(f"\nuntrained loss {loss:.4f}, ln(V) = ln({len(characters)}) = {blind:.4f}")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # `| head` may close the pipe early
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
