"""Misspelt names find what was meant, and others find nothing."""

from __future__ import annotations

import pytest

from psgd.naming import did_you_mean, nearest

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


def test_nothing_is_near_nothing():
    assert nearest("kron", ()) is None
