"""Chapter 3: the model computes what it claims to, and a checkpoint is whole, or refused."""

import contextlib
import math
import os
import pickle
import random
import zipfile

import pytest
import torch
import torch.nn.functional as F

import hyperparameters
import model_architecture
from hyperparameters import GPU, Hyperparameters
from model_architecture import (
    FORMAT,
    CheckpointError,
    DeviceError,
    FeedForward,
    Linear,
    MultiHeadAttention,
    NeighbourMix,
    SaveError,
    TinyGPT,
    check_writable,
    choose_device,
    keep_previous,
    leaks_future,
    load_checkpoint,
    rotation_table,
    save_checkpoint,
    squared_relu,
    write_atomically,
)

posix_only = pytest.mark.skipif(os.name != "posix", reason="POSIX only")


def close(one, other, tolerance=1e-5):
    return torch.allclose(one, other, rtol=0, atol=tolerance)


# ---- Attention ---------------------------------------------------------------------------------


def attention_of(n_embd, n_head, T):
    """Random attention, a random batch of inputs for it, and the rotations it needs."""
    torch.manual_seed(0)
    attention = MultiHeadAttention(n_embd, n_head)
    return attention, torch.randn(3, T, n_embd), rotation_table(T, n_embd // n_head)


def test_attention_weights_equal_a_hand_computation():
    # D = 4, so scores are dot products divided by 2. The second query scores ln 3 and 0: weights
    # 3/4 and 1/4. The first sees itself alone, whatever the second key says.
    queries = torch.tensor([[[[5.0, 5, 5, 5], [2 * math.log(3), 0, 0, 0]]]])
    keys = torch.tensor([[[[1.0, 0, 0, 0], [0, 9, 9, 9]]]])
    expected = torch.tensor([[[[1, 0], [0.75, 0.25]]]])
    assert close(MultiHeadAttention.weights(queries, keys), expected)


def test_attention_weights_are_a_causal_triangle_whose_rows_sum_to_1():
    torch.manual_seed(0)
    weights = MultiHeadAttention.weights(*torch.randn(2, 3, 2, 7, 4))
    assert close(weights.sum(dim=-1), torch.ones(3, 2, 7))
    assert (weights.triu(diagonal=1) == 0).all()
    assert (weights + torch.ones(7, 7).triu(diagonal=1) > 0).all()


def test_the_written_out_formula_equals_pytorchs():
    torch.manual_seed(0)
    queries, keys, values = torch.randn(3, 2, 3, 9, 4)
    written_out = MultiHeadAttention.weights(queries, keys) @ values
    pytorch = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    assert close(written_out, pytorch)


@pytest.mark.parametrize("n_embd, n_head, T", [(16, 2, 8), (2, 1, 3), (24, 4, 1), (12, 3, 17)])
def test_attention_equals_the_written_out_formula(n_embd, n_head, T):
    attention, x, rotation = attention_of(n_embd, n_head, T)
    queries, keys, values = attention.project(x, rotation)
    collected = torch.zeros(3, T, n_head, n_embd // n_head)
    for t in range(T):  # one position at a time, in plain arithmetic
        scores = (queries[:, :, t, None] * keys[:, :, : t + 1]).sum(-1) / math.sqrt(
            n_embd // n_head
        )
        shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
        collected[:, t] = (shares[..., None] * values[:, :, : t + 1]).sum(-2)
    expected = attention.output(collected.flatten(2))
    assert close(attention(x, rotation), expected)


def test_attention_scores_depend_on_distance_alone():
    attention, x, rotation = attention_of(16, 2, 12)
    queries, keys, _ = attention.project(x[:, :1].expand(-1, 12, -1), rotation)
    scores = queries @ keys.transpose(-2, -1)  # the same character everywhere: only places differ
    assert close(scores[..., 1:, 1:], scores[..., :-1, :-1])
    distances = scores[..., 0, :]  # from the first position
    assert (distances[..., 1:] - distances[..., :-1]).abs().max() > 0.1


def test_queries_and_keys_are_normalised():
    attention, x, rotation = attention_of(16, 2, 5)
    small, large = attention.project(x, rotation), attention.project(1000 * x, rotation)
    assert close(small[0], large[0], 1e-3) and close(small[1], large[1], 1e-3)
    assert not close(small[2], large[2], 1)  # values keep their size


# ---- The other parts ---------------------------------------------------------------------------


def test_a_neighbour_mix_equals_a_naive_loop_and_pytorchs_convolution():
    torch.manual_seed(0)
    mix, x = NeighbourMix(5), torch.randn(2, 9, 5)
    assert torch.equal(mix(x), x)  # untrained, it changes nothing
    torch.nn.init.normal_(mix.weight)
    reach = len(mix.weight)

    expected = x.clone()
    for t in range(9):
        for back in range(1, min(reach, t) + 1):
            expected[:, t] += mix.weight.detach()[reach - back] * x[:, t - back]
    assert close(mix(x), expected)

    kernel = torch.cat((mix.weight, torch.ones(1, 5))).t()[:, None]  # (C, 1, reach + 1)
    padded = F.pad(x.transpose(1, 2), (reach, 0))
    assert close(mix(x), F.conv1d(padded, kernel, groups=5).transpose(1, 2))


def test_feed_forward_treats_every_position_on_its_own():
    torch.manual_seed(0)
    feed_forward, x = FeedForward(6), torch.randn(2, 4, 6)
    hidden = (x @ feed_forward.up.weight.t()).clamp(min=0) ** 2
    assert close(feed_forward(x), hidden @ feed_forward.down.weight.t())
    assert close(feed_forward(x)[:, 2:3], feed_forward(x[:, 2:3]))


def test_the_written_out_gradient_is_the_one_pytorch_finds():
    x = torch.randn(4, 6, requires_grad=True)
    arriving = torch.randn(4, 6)
    with torch.no_grad():
        without = squared_relu(x)
    assert torch.equal(without, squared_relu(x)) and torch.equal(without, x.clamp(min=0) ** 2)
    (ours,) = torch.autograd.grad(squared_relu(x), x, arriving)
    (theirs,) = torch.autograd.grad(x.clamp(min=0) ** 2, x, arriving)
    assert close(ours, theirs) and not close(ours, torch.zeros(4, 6))


def test_a_block_adds_what_its_parts_make_of_normalised_copies(tiny_model):
    block, rotation = tiny_model().blocks[0], rotation_table(8, 8)
    x = 3 + 5 * torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))

    def normalised(x):
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()

    with torch.no_grad():
        between = x + block.attention(normalised(x), rotation)
        after = between + block.feed_forward(block.mix(normalised(between)))
        assert close(block(x, rotation), after, 1e-4)


# ---- The model ---------------------------------------------------------------------------------


def test_logits_do_not_depend_on_the_size_of_the_embeddings(tiny_model):
    model, tokens = tiny_model(), torch.arange(8)[None]
    with torch.no_grad():
        before = model(tokens)
        model.embedding.weight *= 8  # the same vectors, only longer
        assert close(model(tokens), before, 1e-3)


def test_logits_have_one_score_per_position_and_character(tiny_model):
    model = tiny_model(vocab_size=11)
    assert model(torch.zeros(3, 5, dtype=torch.long)).shape == (3, 5, 11)


@pytest.mark.parametrize("block_size, n_head, n_layer", [(8, 2, 2), (12, 4, 3), (2, 1, 1)])
def test_the_future_cannot_leak_into_the_past(tiny_model, block_size, n_head, n_layer):
    # Every position holds a character of its own, so the gradient of that character's vector
    # tells how much the position matters.
    model = tiny_model(block_size, block_size=block_size, n_head=n_head, n_layer=n_layer)
    tokens = torch.randperm(block_size, generator=torch.Generator().manual_seed(0))
    for t in range(block_size):
        model.zero_grad()
        model(tokens[None])[0, t].square().sum().backward()
        influence = model.embedding.weight.grad[tokens].abs().amax(dim=-1)  # (T,)
        assert (influence[: t + 1] > 0).all()
        assert (influence[t + 1 :] == 0).all()


def test_the_rows_of_a_batch_do_not_see_each_other(tiny_model):
    model = tiny_model()
    tokens = torch.randint(0, 14, (4, 8), generator=torch.Generator().manual_seed(0))
    together = model(tokens)
    for row in range(4):
        assert close(model(tokens[row : row + 1]), together[row : row + 1])


def test_the_initial_loss_is_exactly_that_of_guessing_blindly():
    torch.manual_seed(0)
    model = TinyGPT(vocab_size=37, block_size=16, n_embd=32, n_head=4, n_layer=3)
    logits = model(torch.randint(0, 37, (4, 16)))
    loss = F.cross_entropy(logits.flatten(0, 1), torch.randint(0, 37, (64,)))
    assert loss.item() == pytest.approx(math.log(37), abs=1e-5)


def test_every_parameter_takes_part(tiny_model):
    model = tiny_model()
    model(torch.arange(8)[None]).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_one_batch_is_learned_by_heart():
    torch.manual_seed(0)
    model = TinyGPT(vocab_size=10, block_size=16, n_embd=32, n_head=4, n_layer=2)
    inputs, targets = torch.randint(0, 10, (2, 4, 16))  # nothing to understand, only to remember
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_dropout_acts_in_training_only(tiny_model):
    model, tokens = tiny_model(dropout=0.5), torch.arange(8)[None]
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not close(model(tokens), model(tokens), 1e-3)


def test_too_long_an_input_is_refused_with_and_without_a_cache(tiny_model):
    model = tiny_model(block_size=8)
    with pytest.raises(ValueError, match="9 characters .* block_size 8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    cache = model.new_cache(1)
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.long), cache)
        with pytest.raises(ValueError, match="9 characters .* block_size 8"):
            model(torch.zeros(1, 1, dtype=torch.long), cache)


def test_impossible_heads_are_refused():
    with pytest.raises(ValueError, match="n_embd 12"):
        TinyGPT(vocab_size=5, block_size=4, n_embd=12, n_head=4, n_layer=1)


def test_the_gpu_set_makes_a_model_of_10_7_million_parameters():
    with torch.device("meta"):  # sizes without memory
        model = TinyGPT(65, GPU.block_size, GPU.n_embd, GPU.n_head, GPU.n_layer)
    assert 10.6e6 < sum(p.numel() for p in model.parameters()) <= 10.8e6


# ---- The cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pieces",
    [[1] * 16, [16], [5, 1, 1, 4, 3, 2], [1, 15], [2] * 8, [13, 1, 1, 1]],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 3])
def test_cached_logits_equal_uncached_ones(tiny_model, pieces, batch):
    model = tiny_model(block_size=16, n_layer=3)
    tokens = torch.randint(0, 14, (batch, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model.new_cache(batch)
        cached = torch.cat([model(piece, cache) for piece in tokens.split(pieces, dim=1)], dim=1)
        assert close(cached, model(tokens))


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_cached_logits_equal_uncached_ones_in_a_wide_model(tiny_model, batch):
    model = tiny_model(vocab_size=600, block_size=12, n_embd=192, n_head=6)
    tokens = torch.randint(0, 600, (batch, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model.new_cache(batch)
        cached = torch.cat([model(one, cache) for one in tokens.split(1, dim=1)], dim=1)
        assert close(cached, model(tokens))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 8), (3, 3), (0, 4)], ids=str)
def test_a_large_matrix_gives_few_rows_what_it_gives_many(shape):
    layer = Linear(300, 400)  # large enough to have its columns read by all cores
    x = torch.randn(*shape, 300, requires_grad=True)
    expected = F.linear(x, layer.weight)
    found = layer(x)
    assert found.shape == (*shape, 400) and close(found, expected)
    arriving = torch.randn(*shape, 400)
    ours = torch.autograd.grad(found, (x, layer.weight), arriving)
    theirs = torch.autograd.grad(expected, (x, layer.weight), arriving)
    assert all(close(one, other) for one, other in zip(ours, theirs))


def test_two_caches_of_one_model_do_not_disturb_each_other(tiny_model):
    model = tiny_model()
    one, other = torch.arange(8)[None], torch.arange(8).flip(0)[None]
    with torch.no_grad():
        first, second = model.new_cache(1), model.new_cache(1)
        for t in range(8):
            here = model(one[:, t : t + 1], first)
            there = model(other[:, t : t + 1], second)
        assert close(here[:, -1], model(one)[:, -1])
        assert close(there[:, -1], model(other)[:, -1])


# ---- Devices -----------------------------------------------------------------------------------


def test_attention_on_the_cpu_does_not_see_the_future():
    assert leaks_future(torch.device("cpu")) is False


def test_attention_that_forgets_its_mask_is_found_out(monkeypatch):
    honest = F.scaled_dot_product_attention

    def forgetful(*tensors, is_causal=False, **others):
        return honest(*tensors, **others)

    monkeypatch.setattr(F, "scaled_dot_product_attention", forgetful)
    assert leaks_future(torch.device("cpu")) is True


def test_attention_that_returns_nonsense_is_found_out(monkeypatch):
    def broken(queries, keys, values, **others):
        return values * math.nan

    monkeypatch.setattr(F, "scaled_dot_product_attention", broken)
    assert leaks_future(torch.device("cpu")) is True


def test_without_a_gpu_auto_takes_the_cpu_and_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto")[0] == choose_device("cpu")[0] == torch.device("cpu")
    with pytest.raises(DeviceError, match="no CUDA GPU is visible.*--device cpu"):
        choose_device("cuda")


def test_a_gpu_that_cannot_run_anything_is_passed_over_with_a_sentence(monkeypatch):
    def too_old(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available\nand much more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", too_old)
    device, why = choose_device("auto")
    assert device == torch.device("cpu") and "no kernel image" in why and "\n" not in why
    with pytest.raises(DeviceError, match="no kernel image is available"):
        choose_device("cuda")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="MPS is here")
def test_mps_is_refused_where_there_is_none():
    with pytest.raises(DeviceError, match="mps"):
        choose_device("mps")


# ---- Writing files -----------------------------------------------------------------------------


@contextlib.contextmanager
def files_of_at_most(size):
    """As on a full disk, the system refuses to let any file grow beyond `size` bytes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_is_replaced_and_nothing_stays_beside_it(tmp_path):
    path = tmp_path / "file"
    for data in (b"first", b"the second"):
        write_atomically(str(path), data)
        assert path.read_bytes() == data
        assert list(tmp_path.iterdir()) == [path]


@posix_only
def test_a_write_that_the_system_refuses_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with files_of_at_most(4096), pytest.raises(SaveError) as caught:
        write_atomically(str(path), b"x" * 100_000)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    assert str(caught.value).isascii() and "0.1 MB are needed" in str(caught.value)


def test_a_disk_that_fails_at_the_last_moment_costs_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SaveError, match="No space left on device"):
        write_atomically(str(path), b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_write_that_is_interrupted_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(str(path), b"new")
    assert path.read_bytes() == b"old"


def test_a_folder_that_has_vanished_is_said(tmp_path):
    with pytest.raises(SaveError, match="cannot write"):
        write_atomically(str(tmp_path / "gone" / "file"), b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(SaveError):
        write_atomically(str(folder), b"new")
    assert list(tmp_path.iterdir()) == [folder]


@posix_only
def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_atomically(str(link), b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"


def test_looking_whether_a_file_can_be_written_changes_nothing(tmp_path):
    path = tmp_path / "file"
    check_writable(str(path))
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"old")
    check_writable(str(path))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "path", [".", "gone/file", "n" * 300], ids=["folder", "in no folder", "too long"]
)
def test_what_cannot_be_written_in_the_end_is_refused_in_the_beginning(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SaveError):
        check_writable(path)


def test_an_older_file_is_kept_under_another_name(tmp_path):
    path = tmp_path / "model.pth"
    keep_previous(str(path))  # there is none yet
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"old")
    keep_previous(str(path))
    (kept,) = set(tmp_path.iterdir()) - {path}
    assert kept.read_bytes() == path.read_bytes() == b"old"


# ---- Checkpoints that are good -----------------------------------------------------------------


def same_weights(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_reloaded_model_gives_identical_logits_although_the_dials_changed(
    tmp_path, tiny_model, monkeypatch, letters
):
    model, path = tiny_model(n_embd=24, n_layer=3, dropout=0.25), str(tmp_path / "model.pth")
    save_checkpoint(path, model, letters)
    other = Hyperparameters(block_size=3, n_embd=4, n_head=1, n_layer=1, dropout=0.9)
    for name in ("LAPTOP", "GPU"):
        monkeypatch.setattr(hyperparameters, name, other)

    loaded, characters, training = load_checkpoint(path)
    tokens = torch.arange(8)[None]
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.arguments == model.arguments and not loaded.training
    assert characters == letters and training is None


def test_a_checkpoint_can_carry_other_weights_and_an_unfinished_run(tmp_path, tiny_model, letters):
    model, best, path = tiny_model(seed=1), tiny_model(seed=2), str(tmp_path / "model.pth")
    unfinished = {"step": 3, "rows": [[1, 2, 0.5, 0.25, 1.0]], "average": {"a": torch.arange(3.0)}}
    save_checkpoint(path, model, letters, best.state_dict(), unfinished)
    loaded, _, training = load_checkpoint(path)
    assert same_weights(loaded, best) and not same_weights(loaded, model)
    assert training["rows"] == unfinished["rows"]
    assert torch.equal(training["average"]["a"], unfinished["average"]["a"])


def test_a_checkpoint_holds_only_what_cannot_be_computed(checkpoint):
    contents = torch.load(checkpoint, weights_only=True)
    assert set(contents) == {"format", "model", "vocabulary", "weights"}
    assert not any("_orig_mod" in name or "module." in name for name in contents["weights"])
    assert not any("cos" in name or "sin" in name for name in contents["weights"])


def test_every_model_that_the_dials_allow_can_be_read_again(tmp_path, tiny_model, letters):
    for sizes in ({"dropout": 0}, {"dropout": 0.99}, {"n_head": 8}, {"block_size": 1}):
        Hyperparameters(**{"n_embd": 16, "n_head": 2, **sizes})  # raises if they do not allow it
        model, path = tiny_model(**sizes), str(tmp_path / "model.pth")
        save_checkpoint(path, model, letters)
        assert same_weights(load_checkpoint(path)[0], model), sizes


# ---- Checkpoints that are refused --------------------------------------------------------------


def refusal(path):
    """The sentence with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(path))
    sentence = str(caught.value)
    assert sentence.isascii() and "\n" not in sentence
    assert ascii(str(path)) in sentence
    return sentence


def test_a_missing_checkpoint_says_how_to_get_one(tmp_path):
    assert "train_model.py" in refusal(tmp_path / "model.pth")


def test_a_directory_is_no_checkpoint(tmp_path):
    assert "not a file" in refusal(tmp_path)


@posix_only
def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in refusal(tmp_path / "pipe")


@posix_only
def test_a_path_that_the_system_refuses_is_no_checkpoint(checkpoint, tmp_path):
    refusal(checkpoint / "below a file")
    refusal(tmp_path / ("n" * 300))


@pytest.mark.parametrize(
    "data", [b"", b"ROMEO:\nBut soft!\n" * 100, b"PK\x03\x04", b"\x80\x02}q\x00."], ids=ascii
)
def test_a_file_of_another_kind_is_no_checkpoint(tmp_path, data):
    path = tmp_path / "model.pth"
    path.write_bytes(data)
    refusal(path)


def test_pytorchs_old_format_is_refused(checkpoint):
    contents = torch.load(checkpoint, weights_only=True)
    torch.save(contents, checkpoint, _use_new_zipfile_serialization=False)
    refusal(checkpoint)


def test_a_pickled_model_is_refused(checkpoint, tiny_model):
    torch.save(tiny_model(), checkpoint)
    refusal(checkpoint)


def test_bare_weights_are_recognised_and_explained(checkpoint, tiny_model):
    torch.save(tiny_model().state_dict(), checkpoint)
    assert "state_dict" in refusal(checkpoint) and "train" in refusal(checkpoint)


@pytest.mark.parametrize("contents", [[1, 2], None, torch.zeros(3), "text", {}, {1: 2}], ids=str)
def test_contents_of_another_kind_are_refused(checkpoint, contents):
    torch.save(contents, checkpoint)
    refusal(checkpoint)


FORGERIES = {
    "a missing key": lambda c: c.pop("vocabulary"),
    "an extra key": lambda c: c.update(extra=1),
    "no format": lambda c: c.pop("format"),
    "a future format": lambda c: c.update(format=FORMAT + 1),
    "format 0": lambda c: c.update(format=0),
    "a text as format": lambda c: c.update(format=str(FORMAT)),
    "a tensor as format": lambda c: c.update(format=torch.tensor(FORMAT)),
    "a vector as format": lambda c: c.update(format=torch.tensor([FORMAT, FORMAT])),
    "True as format": lambda c: c.update(format=True),
    "a list as model": lambda c: c.update(model=[1, 2]),
    "a missing size": lambda c: c["model"].pop("n_head"),
    "an extra size": lambda c: c["model"].update(n_experts=2),
    "a billion layers": lambda c: c["model"].update(n_layer=10**9),
    "a thousand layers": lambda c: c["model"].update(n_layer=1000),
    "a layer too many": lambda c: c["model"].update(n_layer=3),
    "a layer too few": lambda c: c["model"].update(n_layer=1),
    "no layers": lambda c: c["model"].update(n_layer=0),
    "half a layer": lambda c: c["model"].update(n_layer=2.0),
    "a tensor of layers": lambda c: c["model"].update(n_layer=torch.tensor(2)),
    "a huge n_embd": lambda c: c["model"].update(n_embd=10**12),
    "a large n_embd": lambda c: c["model"].update(n_embd=65_536),
    "a huge block_size": lambda c: c["model"].update(block_size=10**12),
    "a huge vocab_size": lambda c: c["model"].update(vocab_size=10**12),
    "heads that do not fit": lambda c: c["model"].update(n_head=3),
    "no heads": lambda c: c["model"].update(n_head=0),
    "dropout NaN": lambda c: c["model"].update(dropout=math.nan),
    "dropout 1": lambda c: c["model"].update(dropout=1.0),
    "dropout as text": lambda c: c["model"].update(dropout="0"),
    "a short vocabulary": lambda c: c.update(vocabulary=c["vocabulary"][:-1]),
    "a long vocabulary": lambda c: c.update(vocabulary=c["vocabulary"] + "z"),
    "a repeated character": lambda c: c.update(vocabulary=c["vocabulary"][:-1] + "s"),
    "an unsorted vocabulary": lambda c: c.update(vocabulary=c["vocabulary"][::-1]),
    "a list as vocabulary": lambda c: c.update(vocabulary=list(c["vocabulary"])),
    "a list as weights": lambda c: c.update(weights=list(c["weights"].values())),
    "no weights": lambda c: c["weights"].clear(),
    "a missing weight": lambda c: c["weights"].pop("embedding.weight"),
    "an extra weight": lambda c: c["weights"].update(extra=torch.zeros(2)),
    "a number as weight": lambda c: c["weights"].update({"embedding.weight": 1.0}),
}

REFORGED_WEIGHTS = {
    "a wrong shape": lambda w: w[:, :-1].clone(),
    "a scalar": lambda w: w[0, 0].clone(),
    "doubles": lambda w: w.double(),
    "halves": lambda w: w.half(),
    "integers": lambda w: w.int(),
    "complex numbers": lambda w: w.cfloat(),
    "a sparse weight": lambda w: w.to_sparse(),
    "NaN": lambda w: w.index_fill(0, torch.tensor(3), math.nan),
    "infinity": lambda w: w.index_fill(0, torch.tensor(3), -math.inf),
    "one row for all": lambda w: w[:1].clone().expand_as(w),
    "one number for all": lambda w: torch.zeros(()).expand_as(w),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forged_field_is_refused(checkpoint, forge):
    contents = torch.load(checkpoint, weights_only=True)
    forge(contents)
    torch.save(contents, checkpoint)
    refusal(checkpoint)


@pytest.mark.parametrize("forge", REFORGED_WEIGHTS.values(), ids=REFORGED_WEIGHTS.keys())
def test_a_forged_weight_is_refused(checkpoint, forge):
    contents = torch.load(checkpoint, weights_only=True)
    contents["weights"]["embedding.weight"] = forge(contents["weights"]["embedding.weight"])
    torch.save(contents, checkpoint)
    refusal(checkpoint)


def test_a_future_format_is_told_to_update(checkpoint):
    contents = torch.load(checkpoint, weights_only=True)
    contents["format"] = FORMAT + 1
    contents["something new"] = 1
    torch.save(contents, checkpoint)
    assert "newer" in refusal(checkpoint)


def test_weights_that_share_their_numbers_cannot_claim_to_be_many(tmp_path, letters):
    model, path = TinyGPT(len(letters), 8, n_embd=64, n_head=2, n_layer=4), tmp_path / "model.pth"
    numbers = torch.zeros(4 * 64 * 64)  # as many as the largest weight has, and all use them
    shared = {n: numbers[: w.numel()].view(w.shape) for n, w in model.state_dict().items()}
    torch.save(
        {"format": FORMAT, "model": model.arguments, "vocabulary": letters, "weights": shared},
        path,
    )
    assert "larger than the file" in refusal(path)


# ---- Checkpoints that are damaged or malicious -------------------------------------------------


def repack(source, target, compression):
    """Write the members of the zip `source` again, with another compression."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))


def test_a_repacked_checkpoint_is_read_unless_it_is_compressed(checkpoint, tmp_path):
    path = tmp_path / "repacked.pth"
    repack(checkpoint, path, zipfile.ZIP_STORED)
    assert same_weights(load_checkpoint(str(path))[0], load_checkpoint(str(checkpoint))[0])
    repack(checkpoint, path, zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(path)


def test_zip_bombs_are_not_unpacked(checkpoint):
    with zipfile.ZipFile(checkpoint, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("archive/data.pkl", "archive/version"):
            archive.writestr(name, b"0" * 10_000_000)
    refusal(checkpoint)  # little becomes much

    with zipfile.ZipFile(checkpoint, "w") as archive:
        archive.writestr("archive/data.pkl", b"0" * 10_000)
        archive.filelist[0].file_size = archive.filelist[0].compress_size = 10**13
    refusal(checkpoint)  # a member says that it is larger than the file

    with zipfile.ZipFile(checkpoint, "w") as archive:
        archive.writestr("archive/data.pkl", b"0" * 10_000)
        archive.filelist *= 100
    refusal(checkpoint)  # a hundred members lie in the same place


def test_a_checkpoint_cut_short_anywhere_is_refused(checkpoint):
    data = checkpoint.read_bytes()
    seed = random.Random(0)
    for length in [1, 10, len(data) - 1, *(seed.randrange(len(data)) for _ in range(40))]:
        checkpoint.write_bytes(data[:length])
        refusal(checkpoint)


def test_a_flipped_bit_is_either_found_or_harmless(checkpoint):
    whole, letters, _ = load_checkpoint(str(checkpoint))
    data = checkpoint.read_bytes()
    seed = random.Random(0)
    # Most of the bytes are weights. What describes them stands at the beginning and the end.
    places = [seed.randrange(len(data)) for _ in range(60)]
    places += [seed.randrange(2000) for _ in range(60)]
    places += [len(data) - 1 - seed.randrange(2500) for _ in range(80)]
    found = 0
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << seed.randrange(8)
        checkpoint.write_bytes(damaged)
        try:
            model, characters, training = load_checkpoint(str(checkpoint))
        except CheckpointError as error:
            assert "\n" not in str(error) and str(error).isascii()
            found += 1
        else:
            assert same_weights(model, whole) and model.arguments == whole.arguments
            assert characters == letters and training is None
    assert found > 50


class Command:
    """What an attacker puts into a pickle: unpickled carelessly, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_runs_no_command(checkpoint, tmp_path):
    trap = tmp_path / "trap"
    with zipfile.ZipFile(checkpoint, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Command(str(trap)), protocol=2))
        archive.writestr("archive/version", "3\n")
    refusal(checkpoint)
    assert not trap.exists()
    torch.load(checkpoint, weights_only=False)  # and the attack was a real one
    assert trap.exists()


# ---- Run directly ------------------------------------------------------------------------------


def test_shapes_parameters_and_the_untrained_loss_are_shown_from_anywhere(start):
    process = start(model_architecture.__file__)
    out, errors = process.communicate()
    text = out.decode("ascii")
    assert process.returncode == 0 and errors == b""
    for idea in ("(B, H, T, D)", "(B, T, V)", "parameters:", "attention weights", "untrained loss"):
        assert idea in text
    assert len(text.splitlines()) < 50  # a screenful
