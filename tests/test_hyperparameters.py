"""Chapter 1: no dial can stand at a value that cannot work, and each explains itself."""

import argparse
import ast
import sys
from dataclasses import FrozenInstanceError, asdict, fields, replace
from pathlib import Path

import pytest

import hyperparameters
from hyperparameters import (
    GPU,
    LAPTOP,
    PRESETS,
    DialError,
    Hyperparameters,
    OneSentenceParser,
    add_dial_flags,
    dials_given,
)

DIALS = [one.name for one in fields(Hyperparameters)]
WHOLE = [one.name for one in fields(Hyperparameters) if type(one.default) is int]
FRACTIONS = ["validation_fraction", "dropout", "beta2"]  # shares: 1 is already too much
NEVER_ZERO = [
    "block_size",
    "batch_size",
    "validation_fraction",
    "n_layer",
    "n_head",
    "n_embd",
    "epochs",
    "gradient_clip",
    "save_minutes",
]
ROOT = Path(hyperparameters.__file__).parent
MODULES = [
    "hyperparameters",
    "data_handling",
    "model_architecture",
    "train_model",
    "generate_text",
]


@pytest.fixture
def parser(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line of the help is folded
    monkeypatch.setenv("NO_COLOR", "1")
    parser = OneSentenceParser(prog="train_model.py", allow_abbrev=False)
    add_dial_flags(parser)
    return parser


def refusal(name, value):
    """The sentence with which a dial is refused, of which every one must be readable ASCII."""
    with pytest.raises(DialError) as caught:
        replace(LAPTOP, **{name: value})
    sentence = str(caught.value)
    assert sentence.isascii() and "\n" not in sentence
    return sentence


# ---- The two sets ------------------------------------------------------------------------------


def test_both_sets_are_valid_and_differ():
    for dials in (LAPTOP, GPU):
        assert Hyperparameters(**asdict(dials)) == dials
    assert Hyperparameters() == LAPTOP != GPU
    assert PRESETS == {"laptop": LAPTOP, "gpu": GPU}


def test_the_gpu_set_has_the_promised_size():
    assert (GPU.n_layer, GPU.n_head, GPU.n_embd) == (6, 6, 384)
    assert GPU.block_size == 256


def test_the_promised_dials_exist():
    promised = (
        "batch_size block_size n_embd n_head n_layer dropout epochs learning_rate weight_decay seed"
    )
    assert set(promised.split()) <= set(DIALS)


def test_head_size_is_each_heads_share_of_n_embd():
    assert replace(LAPTOP, n_embd=96, n_head=4).head_size == 24


def test_a_set_is_frozen():
    with pytest.raises(FrozenInstanceError):
        LAPTOP.n_layer = 5


# ---- Nonsense ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIALS)
@pytest.mark.parametrize(
    "value",
    [
        -1,
        -0.5,
        float("nan"),
        float("inf"),
        -float("inf"),
        "3",
        "\u0663\u20ac",
        None,
        True,
        [4],
        2 + 0j,
    ],
    ids=ascii,
)
def test_nonsense_is_refused_by_every_dial_with_its_name_and_the_value(name, value):
    sentence = refusal(name, value)
    assert name in sentence and ascii(value) in sentence


@pytest.mark.parametrize("name", [name for name in DIALS if name != "seed"])
def test_a_trillion_is_refused(name):
    sentence = refusal(name, 10**12)
    assert name in sentence and "1000000000000" in sentence


def test_any_seed_of_63_bits_will_do():
    assert replace(LAPTOP, seed=0).seed == 0
    assert replace(LAPTOP, seed=2**63 - 1).seed == 2**63 - 1
    assert str(2**63) in refusal("seed", 2**63)


@pytest.mark.parametrize("name", NEVER_ZERO)
def test_zero_is_refused_where_nothing_would_be_left(name):
    assert name in refusal(name, 0) and "not 0" in refusal(name, 0)


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_dial_refuses_a_fraction(name):
    assert "whole number" in refusal(name, 2.0)


@pytest.mark.parametrize("name", FRACTIONS)
def test_a_share_refuses_one(name):
    assert name in refusal(name, 1) and name in refusal(name, 1.0)


@pytest.mark.parametrize(
    "n_embd, n_head",
    [(128, 5), (4, 4), (6, 2)],
    ids=["no equal share", "head of one number", "head of three numbers"],
)
def test_every_head_needs_an_equal_and_even_share(n_embd, n_head):
    with pytest.raises(DialError, match=f"n_embd .*{2 * n_head}.* not {n_embd}"):
        replace(LAPTOP, n_embd=n_embd, n_head=n_head)


# ---- The command line --------------------------------------------------------------------------


def test_every_dial_appears_in_help_with_its_meaning_and_both_defaults(parser):
    text = " ".join(parser.format_help().split())
    for one in fields(Hyperparameters):
        defaults = f"({getattr(LAPTOP, one.name)} / {getattr(GPU, one.name)})"
        assert f"--{one.name} X {one.metadata['meaning']} {defaults}" in text


def test_only_the_dials_named_are_given(parser):
    assert dials_given(parser.parse_args([])) == {}
    given = dials_given(parser.parse_args(["--n_layer", "6", "--dropout", "0"]))
    assert given == {"n_layer": 6, "dropout": 0.0}


def test_every_default_survives_its_way_through_the_command_line(parser):
    for dials in (LAPTOP, GPU):
        words = [
            word for name, value in asdict(dials).items() for word in (f"--{name}", f"{value}")
        ]
        assert Hyperparameters(**dials_given(parser.parse_args(words))) == dials


@pytest.mark.parametrize(
    "words", [["--n_layer", "six"], ["--n_layer", "\u20ac"], ["--n_lay", "6"], ["--n_layer"]]
)
def test_a_wrong_flag_is_answered_with_one_ascii_sentence(parser, capsys, words):
    with pytest.raises(SystemExit) as end:
        parser.parse_args(words)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.isascii() and err.count("\n") == 1 and "--n_lay" in err


def test_one_line_a_dial_with_both_sets_side_by_side(start):
    out, err = start(str(ROOT / "hyperparameters.py")).communicate()
    rows = {line.split()[0]: line.split()[1:3] for line in out.decode("ascii").splitlines()}
    for name in DIALS:
        assert rows[name] == [str(getattr(LAPTOP, name)), str(getattr(GPU, name))]
    assert err == b""


# ---- The house ---------------------------------------------------------------------------------


def imports_of(module):
    """Everything that `module` imports, at the top or anywhere inside."""
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module.split(".")[0])
    return names


def test_imports_go_in_one_direction():
    for module in MODULES[:3]:
        assert not imports_of(module) & set(MODULES)
    assert "train_model" not in imports_of("generate_text")
    assert "." not in set().union(*map(imports_of, MODULES))


def test_the_dials_need_nothing_but_the_standard_library():
    standard = getattr(sys, "stdlib_module_names", None)  # since Python 3.10
    if standard is not None:
        assert imports_of("hyperparameters") <= set(standard)
    assert not imports_of("hyperparameters") & {"torch", "numpy", "tqdm"}


def test_importing_any_module_does_nothing(start, tmp_path):
    process = start("-c", "import " + ", ".join(MODULES))
    assert process.communicate() == (b"", b"")
    assert process.returncode == 0
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_dial_flags_are_spelled_exactly_as_the_dials():
    parser = argparse.ArgumentParser(add_help=False)
    add_dial_flags(parser)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    assert flags == [f"--{name}" for name in DIALS]
