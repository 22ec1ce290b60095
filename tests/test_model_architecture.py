"""Chapter 3: the model computes what it claims to, and a checkpoint is good, or refused."""

import contextlib
import io
import math
import os
import pickle
import random
import struct
import tarfile
import zipfile
import zlib

import pytest
import torch
import torch.nn.functional as F
from helpers import LETTERS, ROOT, call, close, refusal, tiny_model, write_checkpoint

import model_architecture as chapter
from generate_text import choose_device
from hyperparameters import UserError
from model_architecture import KVCache, TinyGPT, load_checkpoint, make_rope


def some(*shape, below=14):
    """Random ids."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("n_embd, n_head, T", [(16, 2, 8), (2, 1, 3), (24, 4, 1), (12, 3, 17)])
def test_attention_equals_plain_arithmetic_and_pytorchs(n_embd, n_head, T):
    torch.manual_seed(0)
    attention, D = chapter.MultiHeadAttention(n_embd, n_head), n_embd // n_head
    x, rope = torch.randn(3, T, n_embd), make_rope(T, D)
    queries, keys, values = attention.project(x, rope)
    heads = (x @ attention.queries_keys_values.weight.t()).view(3, T, 3 * n_head, D).transpose(1, 2)
    turned = chapter.apply_rope(F.layer_norm(heads, (D,)), rope).split(n_head, dim=1)
    assert (
        close(queries, turned[0]) and close(keys, turned[1]) and close(values, heads[:, -n_head:])
    )

    mixture, scale = torch.zeros_like(values), 3 / math.sqrt(D)
    for t in range(T):  # one position at a time
        scores = (queries[:, :, t, None] * keys[:, :, : t + 1]).sum(-1)
        shares = (scores * scale).exp()
        shares = shares / shares.sum(-1, keepdim=True)
        mixture[:, :, t] = (shares[..., None] * values[:, :, : t + 1]).sum(-2)
    assert close(chapter.attention_weights(queries, keys) @ values, mixture)
    # Fewer queries than keys are the last ones.
    assert close(chapter.attention_weights(queries[:, :, -2:], keys) @ values, mixture[:, :, -2:])
    how = {"is_causal": True, "scale": scale}
    assert close(F.scaled_dot_product_attention(queries, keys, values, **how), mixture)
    assert close(attention(x, rope), attention.output(mixture.transpose(1, 2).flatten(2)))


def test_rope_turns_every_arrow_so_that_scores_depend_on_the_distance_and_not_on_the_place():
    arrows = torch.tensor([3.0, 4, 1, 2]).expand(1, 1, 9, 4)  # (3, 1) and (4, 2) everywhere
    turned = chapter.apply_rope(arrows, make_rope(9, 4))
    a, b, c, d = turned.unbind(-1)
    t = torch.arange(9.0)[None, None]  # the first by t radians, the second by t / 100
    assert close(a, 3 * t.cos() - t.sin()) and close(c, t.cos() + 3 * t.sin())
    t = t / 100
    assert close(b, 4 * t.cos() - 2 * t.sin()) and close(d, 2 * t.cos() + 4 * t.sin())
    scores = turned @ turned.transpose(-2, -1)
    assert close(scores[..., 1:, 1:], scores[..., :-1, :-1])


def test_a_causal_convolution_equals_a_naive_loop_with_and_without_a_cache():
    torch.manual_seed(0)
    convolution, x = chapter.CausalConvolution(5), torch.randn(2, 9, 5)
    assert torch.equal(convolution(x), x)  # untrained, it changes nothing
    torch.nn.init.normal_(convolution.weight)
    expected = x.clone()
    for t in range(9):
        for back in range(1, min(3, t) + 1):
            expected[:, t] += convolution.weight.detach()[3 - back] * x[:, t - back]
    assert close(convolution(x), expected)
    for pieces in ([1] * 9, [2, 1, 4, 2], [9]):
        cache, found = KVCache(), []
        for piece in x.split(pieces, dim=1):
            found.append(convolution(piece, cache))
            cache.length += piece.shape[1]
        assert close(torch.cat(found, dim=1), expected), pieces


@torch.no_grad()
def test_every_part_adds_what_it_makes_of_a_normalised_copy():
    model, ids, rope = tiny_model(vocab_size=11), some(3, 8, below=11), make_rope(8, 8)
    model.embedding.weight.mul_(8).add_(3)  # far from normalised
    x = F.layer_norm(model.convolution(model.embedding.weight[ids]), (16,))
    for block in model.blocks:
        before, part = 10 * x, block.feed_forward
        between = before + block.attention(F.layer_norm(before, (16,)), rope)
        nearby = block.convolution(F.layer_norm(between, (16,)))
        gates, numbers = (nearby @ part.up.weight.t()).split(32, dim=-1)
        passed = gates / (1 + (-gates).exp()) * numbers
        assert close(block(before, rope), between + passed @ part.down.weight.t(), 1e-4)
        x = block(x, rope)
    x, (first, second) = F.layer_norm(x, (16,)), model(ids, both=True)
    assert close(first, x @ model.unembedding.weight.t(), 1e-4) and torch.equal(first, model(ids))
    assert close(second, x @ model.after_next.weight.t(), 1e-4)


@pytest.mark.parametrize("T, n_head, n_layer", [(8, 2, 2), (12, 4, 3)])
def test_neither_the_future_nor_another_row_of_the_batch_can_leak(T, n_head, n_layer):
    # Every position holds a character of its own, so the gradient of that character's vector
    # tells how much the position matters.
    model = tiny_model(2 * T, block_size=T, n_head=n_head, n_layer=n_layer)
    ids = torch.randperm(2 * T, generator=torch.Generator().manual_seed(0))
    for t in range(T):
        model.zero_grad()
        sum(x[0, t].square().sum() for x in model(ids.view(2, T), both=True)).backward()
        influence = model.embedding.weight.grad[ids].abs().amax(dim=-1)  # (2 T,)
        assert (influence[: t + 1] > 0).all() and (influence[t + 1 :] == 0).all()
    for name, parameter in model.named_parameters():  # after the last, every one takes part
        assert parameter.grad.abs().max() > 0, name


def test_learning_begins_at_the_loss_of_blind_guessing_with_blocks_that_add_nothing():
    torch.manual_seed(0)
    model, x = TinyGPT(10, block_size=16, n_embd=32, n_head=4, n_layer=1), torch.randn(1, 16, 32)
    assert torch.equal(model.blocks[0](x, model.rope), x)
    for logits in model(some(2, 16, below=10), both=True):
        assert torch.equal(logits, torch.zeros(2, 16, 10))


def test_dropout_acts_on_either_part_in_training_only():
    ids = torch.arange(8)[None]
    for silent in ("attention.output", "feed_forward.down"):
        model = tiny_model(dropout=0.5, n_layer=1)
        torch.nn.init.zeros_(model.blocks[0].get_submodule(silent).weight)
        assert torch.equal(model(ids), model(ids))
        model.train()
        assert not close(model(ids), model(ids), 1e-3)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_cached_logits_equal_uncached_ones_whatever_another_cache_holds(batch):
    model, ids = tiny_model(600, block_size=16), some(batch, 16, below=600)
    for pieces in ([1] * 16, [16], [5, 1, 1, 4, 3, 2], [1, 15], [2] * 8, [13, 1, 1, 1]):
        cache, another, cached = KVCache(), KVCache(), []
        for piece in ids.split(pieces, dim=1):
            cached.append(model(piece, cache))
            model(599 - piece, another)
        assert close(torch.cat(cached, dim=1), model(ids)), pieces
    for more, past in ((some(1, 17), None), (some(batch, 1), cache)):  # the window has an end
        with pytest.raises(ValueError, match="17 characters .* block_size 16"):
            model(more, past)


def test_auto_takes_the_cpu_where_no_gpu_works_and_others_are_refused(monkeypatch):
    def too_old(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available\nand much more")

    monkeypatch.setattr(torch, "ones", too_old)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for visible, problem in ((False, "no usable GPU"), (True, "no kernel image")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda visible=visible: visible)
        device, why = choose_device("auto")
        assert device == torch.device("cpu") and problem in why and "\n" not in why
        for wanted, why in (("cuda", problem), ("mps", "no usable GPU")):
            sentence = refusal(choose_device, wanted)
            assert f"--device {wanted} " in sentence and why in sentence
    monkeypatch.setenv("LOCAL_RANK", "1")  # the second process of a machine with one GPU
    assert "cuda:1 " in refusal(choose_device, "auto")


@torch.no_grad()
def test_the_script_shows_what_a_model_looks_at(checkpoint, monkeypatch):
    model, ids, seen = tiny_model(), some(2, 5), []
    for block in model.blocks:
        block.attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    found = chapter.attention_of(model, ids)
    model(ids)
    for block, inputs, weights in zip(model.blocks, seen[-2:], found):
        queries, keys, _ = block.attention.project(*inputs[:2])
        assert close(chapter.attention_weights(queries, keys), weights)
    monkeypatch.chdir(ROOT)  # where input.txt is
    shown = call(chapter.main, [str(checkpoint)])
    assert shown.status == 0 and shown.err == "" and shown.out.count("\n") < 50
    for idea in ("(B, H, T, S)", "(B, T, V)", "block 2, head 2", ascii(str(checkpoint))):
        assert idea in shown.out
    monkeypatch.chdir(checkpoint.parent)
    for text in (b"", b"\n\n", b"\xff\xfea"):
        (checkpoint.parent / "input.txt").write_bytes(text)
        assert [call(chapter.main, [n]).status for n in ("none", str(checkpoint))] == [0, 0]


def same_parameters(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_reloaded_model_gives_identical_logits_whatever_its_sizes(checkpoint):
    for name, value in {"dropout": 0.25, "n_head": 8, "block_size": 1, "n_embd": 24}.items():
        model, more = tiny_model(**{name: value}), {"training": {"step": 3}} if value == 8 else {}
        write_checkpoint(checkpoint, model, LETTERS, **more)
        (loaded, *rest), ids = load_checkpoint(str(checkpoint)), some(1, model.block_size)
        assert same_parameters(loaded, model) and torch.equal(loaded(ids), model(ids))
        assert rest == [LETTERS, more.get("training")] and not loaded.training
        assert loaded.blocks[0].dropout.p == model.blocks[0].dropout.p


def refuse(path, data=None):
    """The sentence with which a file, or such bytes in it, are refused; it names the file."""
    if data is not None:
        path.write_bytes(data)
    sentence = refusal(load_checkpoint, str(path))
    assert f"{ascii(str(path))} is not a usable checkpoint: " in sentence
    assert "memory" not in sentence and "train_model.py" in sentence  # how to get one
    return sentence


def saved(contents, **how):
    """The bytes of a file as PyTorch writes it."""
    file = io.BytesIO()
    torch.save(contents, file, **how)
    return file.getvalue()


def test_what_is_no_checkpoint_is_refused(tmp_path, checkpoint):
    for path in (tmp_path, tmp_path / "none", tmp_path / ("n" * 300), checkpoint / "below a file"):
        refuse(path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "not a file" in refuse(tmp_path / "pipe")  # and is not waited for
    good, empty_zip = torch.load(checkpoint, weights_only=True), b"PK\5\6" + bytes(18)
    for data in (b"", b"ROMEO:\nBut soft!\n" * 100, b"PK\x03\x04", b"\x80\x02}q\x00.", empty_zip):
        refuse(checkpoint, data)
    first, bare = {"format": 1, "model": {}, "vocabulary": "ab", "weights": {}}, good["parameters"]
    for other in (tiny_model(), [1, 2], None, torch.zeros(3), "text", {}, {1: 2}, first, bare):
        refuse(checkpoint, saved(other))
    refuse(checkpoint, saved(good, _use_new_zipfile_serialization=False))  # PyTorch's old format


def test_damage_anywhere_is_either_found_or_harmless(checkpoint):
    whole, *rest = load_checkpoint(str(checkpoint))
    data, seed, found = checkpoint.read_bytes(), random.Random(0), 0
    # Most of the bytes are parameters. What describes them stands at the beginning and the end.
    places = [*range(2000), *range(len(data) - 2500, len(data)), *range(0, len(data), 15)]
    for place in seed.sample(places, 150):
        flipped = bytes([data[place] ^ 1 << seed.randrange(8)])
        checkpoint.write_bytes(data[:place] + flipped + data[place + 1 :])
        try:
            model, *others = load_checkpoint(str(checkpoint))
            assert same_parameters(model, whole) and others == rest
        except UserError:
            found += 1
        refuse(checkpoint, data[:place])  # cut short
    assert found > 40


def repacked(file, compression=zipfile.ZIP_STORED, trick=lambda archive: None):
    target = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        trick(new)
    return target.getvalue()


def overlapping(count, data):
    """A zip of `count` parts, which all have the same bytes of the file for their contents."""
    heads, directory, common = b"", b"", struct.pack("<3L", zlib.crc32(data), len(data), len(data))
    for i in range(count):  # each head has those after it for a field that nobody reads
        name, rest = b"a/%03d" % i, 35 * (count - 1 - i)
        directory += struct.pack("<4s12x12s3H8xL", b"PK\1\2", common, 5, 0, 0, len(heads)) + name
        heads += struct.pack("<4s10x12s2H", b"PK\3\4", common, 5, rest) + name
    sizes = count, count, len(directory), len(heads + data)
    return heads + data + directory + struct.pack("<4s4x2H2L2x", b"PK\5\6", *sizes)


def tar_of(data):
    """A file as the first PyTorch wrote it, up to the pickle that it reads first."""
    file, part = io.BytesIO(), tarfile.TarInfo("storages")
    part.size = len(data)
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(part, io.BytesIO(data))
    return file.getvalue()


@pytest.mark.filterwarnings("ignore")  # of old formats
def test_a_checkpoint_runs_no_command(checkpoint, tmp_path):
    trap, good = tmp_path / "trap", checkpoint.read_bytes()
    command = type("Command", (), {"__reduce__": lambda self: (os.mkdir, (str(trap),))})()
    for bad in (saved(command), tar_of(pickle.dumps(command)) + good):
        refuse(checkpoint, bad)
        assert not trap.exists()
        with contextlib.suppress(TypeError):  # of what follows the command
            torch.load(checkpoint, weights_only=False)
        trap.rmdir()  # it is there: the attack was a real one


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_all_but_a_plain_zip_is_refused_before_pytorch_sees_it(checkpoint, monkeypatch):
    good, script = checkpoint.read_bytes(), io.BytesIO()
    checkpoint.write_bytes(repacked(checkpoint))
    load_checkpoint(str(checkpoint))  # so packing it again does no harm
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), script)
    bad = {
        "a tar in PyTorch's oldest format, then a zip": tar_of(b"I0\n.") + good,
        "a pickle, then a zip": b"I0\n." + good,
        "a zip, then a zip": good + good,
        "a zip, then junk": good + b"junk",
        "a zip with a comment": good[:-2] + b"\4\0junk",
        "a TorchScript program": repacked(script),  # without compression
        "parts that may become large": repacked(
            checkpoint, zipfile.ZIP_DEFLATED, lambda z: z.writestr("zeros", bytes(10**6))
        ),
        "parts that lie in one place": overlapping(100, b"0" * 10_000),
        "one name twice": repacked(checkpoint, trick=lambda z: z.writestr(z.namelist()[0], "2")),
    }
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail(f"seen: {name}"))
    for name, data in bad.items():
        refuse(checkpoint, data)
        assert zipfile.is_zipfile(checkpoint) or name == "a zip, then a zip"  # a careless look


def test_pytorch_reads_the_very_parts_that_were_checked(checkpoint):
    # At the end of a zip stand its directory, a 64-bit record of where that is, a pointer to this
    # record, and a 32-bit record. Should the pointer lead nowhere, PyTorch believes the 32-bit one,
    # Python's zipfile the other. So each can be shown a directory of its own.
    data, (model, *_) = checkpoint.read_bytes(), load_checkpoint(str(checkpoint))
    size, start = struct.unpack("<QQ", data[-58:-42])
    honest, end = data[start : start + size], bytearray(data[-98:])
    swapped = honest.replace(b"data/3", b"data/x").replace(b"data/8", b"data/3")  # two matrices
    swapped = swapped.replace(b"data/x", b"data/8")
    struct.pack_into("<Q", end, 48, start + size)  # in the 64-bit record: the honest one
    struct.pack_into("<Q", end, 64, 0)  # the pointer
    checkpoint.write_bytes(data[:start] + swapped + honest + end)
    careless, name = torch.load(checkpoint, weights_only=True), "blocks.0.attention.output.weight"
    assert not torch.equal(careless["parameters"][name], model.state_dict()[name])
    with contextlib.suppress(UserError):
        assert same_parameters(load_checkpoint(str(checkpoint))[0], model)
