"""Misspelt names find what was meant, and others find nothing."""

from __future__ import annotations

from dataclasses import fields

import pytest

from psgd.methods import METHODS
from psgd.naming import SYNONYMS, WITHOUT, did_you_mean, nearest, unknown

NAMES = ("kron", "kron_whiten", "quad", "procrustes", "betaL", "mlp-digits")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("krn", "kron"),
        ("KRON", "kron"),
        ("Kron_Whitn", "kron_whiten"),
        ("procrustus", "procrustes"),
        ("betal", "betaL"),
        ("mlp_digits", "mlp-digits"),
        ("adam", None),
        ("", None),
    ],
)
def test_the_nearest_name(given, meant):
    assert nearest(given, NAMES) == meant
    assert did_you_mean(given, NAMES) == ("" if meant is None else f"; did you mean {meant!r}?")


HYPERPARAMETERS = {name: [f.name for f in fields(made)] for name, made in METHODS.items()}
NAMED = [f for made in METHODS.values() for f in fields(made) if f.metadata["kind"] == "name"]
CHOICES = {x for f in NAMED for x in f.metadata["names"]() if x is not None}


@pytest.mark.parametrize("line", SYNONYMS, ids=lambda line: line[0])
def test_a_synonym_is_of_a_registered_name(line):
    """Every word finds what each method has of its line, and no word is in two lines, nor misspelt."""
    assert len(line) == len(set(line)) and all(sum(word in other for other in SYNONYMS) == 1 for word in line)
    own = [x for known in HYPERPARAMETERS.values() for x in known if x in line] + [x for x in line if x in CHOICES]
    assert own
    for known in (*HYPERPARAMETERS.values(), sorted(CHOICES)):
        for word in set(line) - set(known):
            meant = [x for x in line if x in known]
            assert nearest(word, known) in meant or not meant


@pytest.mark.parametrize("name", METHODS)
def test_a_name_of_another_package_finds_ours(name):
    """Those that several packages have, each by its own."""
    known = HYPERPARAMETERS[name]
    for words, ours in {
        ("learning_rate", "lr_params"): {"lr"},
        ("b1", "beta1", "betas", "momentum"): {"momentum", "b1"},
        ("precond_lr", "preconditioner_lr"): {"preconditioner_lr", "precond_lr", "lr_preconditioner"},
        ("precond_init_scale",): {"preconditioner_init_scale", "precond_init_scale"},
    }.items():
        for word in set(words) - set(known):
            assert nearest(word, known) in ours
            said = f"{name}: unknown hyperparameter {word!r}; did you mean {nearest(word, known)!r}?"
            assert unknown(name, word, known) == f"{said} It has {', '.join(known)}"


@pytest.mark.parametrize(("name", "why"), WITHOUT)
def test_what_has_no_counterpart_says_why(name, why):
    for known in HYPERPARAMETERS.values():
        assert name not in known and f"; {why}" in unknown("kron", name, known)
    assert why not in unknown("kron", "krn", HYPERPARAMETERS["kron"])


def test_nothing_is_near_nothing():
    assert nearest("kron", ()) is None
