import math

import ablation
import pytest
import torch

IDS = torch.arange(400) * 7 % 11
OTHER = {  # which of the full model's parameters a variant lacks, renames or begins differently
    "no-attention": ("attention",),
    "no-feed-forward": ("blocks.0.convolution", "blocks.1.convolution", "feed_forward"),
    "no-residuals": ("attention.output", "feed_forward.down"),
    "no-convolution": ("convolution",),
    "no-gates": ("feed_forward",),
    "no-second-guess": ("after_next",),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    sizes = {"block_size": 16, "batch_size": 4, "n_embd": 32, "n_head": 2, "n_layer": 2}
    monkeypatch.setattr(ablation, "LAPTOP", ablation.replace(ablation.LAPTOP, **sizes))


@pytest.mark.parametrize("name", ablation.VARIANTS)
def test_a_variant_begins_as_the_full_model_and_learns_something_else(name):
    pairs = [ablation.build(one, 11, seed=1) for one in ("full", name)]
    full, left = (dict(model.state_dict()) for model, _ in pairs)
    other = {key for key in full if key not in left or not torch.equal(full[key], left[key])}
    assert other == {key for key in full if any(part in key for part in OTHER.get(name, ()))}
    losses = [ablation.learn(*pair, IDS, IDS[:100], steps=10) for pair in pairs]
    assert max(losses) < math.log(11), "it is no better than blind guessing"
    assert (losses[0] == losses[1]) == (name == "full")


def test_a_variant_lacks_what_its_name_says():
    x, model = torch.randn(1, 4, 32), ablation.build("no-residuals", 11, seed=1)[0]
    torch.nn.init.zeros_(model.blocks[0].feed_forward.down.weight)
    assert not model.blocks[0](x, model.rope[:, :4]).any()  # nothing is left of x
    assert ablation.build("one-head", 11, seed=1)[0].blocks[0].attention.n_head == 1
    part = ablation.build("no-gates", 11, seed=1)[0].blocks[0].feed_forward
    assert not part(x).any()  # it begins as the full model's: adds nothing
    torch.nn.init.normal_(part[2].weight)
    assert torch.equal(part(x), part[2](torch.nn.functional.gelu(x @ part[0].weight.T)))
    model = ablation.build("no-positions", 11, seed=1)[0]
    assert (model.rope[0] == 1).all() and not model.rope[1].any()


def test_counting_is_the_cross_entropy_of_counts_plus_one():
    train, val = torch.tensor([0, 1, 0, 1, 0, 0]), torch.arange(17) % 2
    # After the first: 0 three times, 1 twice. Pairs: 00 once, 01 twice, 10 twice, 11 never.
    for pairs, guess_0, guess_1 in ((False, 4 / 7, 3 / 7), (True, 3 / 4, 3 / 5)):
        loss = ablation.surprise_of_counts(train, val, 2, pairs)
        assert loss == pytest.approx(-(math.log(guess_0) + math.log(guess_1)) / 2)


def test_a_model_that_diverges_is_reported_in_words(monkeypatch, capsys):
    monkeypatch.setattr(ablation, "learning_rate_at", lambda *_: math.nan)
    ablation.main(["--input", __file__, "--steps", "2", "--seeds", "2", "no-gates"])
    assert capsys.readouterr().out.endswith("diverges in 2 of 2 runs | | |\n")
