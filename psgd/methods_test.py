"""Names, defaults and ranges of the registered methods, and what a wrong value says."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, fields, replace
from math import inf, nan

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from psgd.geometry import GEOMETRIES
from psgd.methods import METHODS, Method, documented
from psgd.pipeline import Recipe, Tempo, host_plan

QUAD_TORCH = {
    "lr": 0.001,
    "weight_decay": 0.1,
    "seed": 0,
    "lr_style": "adam",
    "momentum": 0.95,
    "max_size_dense": 16384,
    "max_skew_dense": 1.0,
    "preconditioner_lr": 0.7,
    "preconditioner_init_scale": None,
    "noise_scale": 1e-9,
    "dtype": None,
}
KRON_WHITEN = {  # psgd_torch calls lr lr_params, and has neither weight decay nor a seed
    "lr": 0.001,
    "weight_decay": 0.0,
    "seed": 0,
    "dQ": "Q0.5EQ1.5",
    "momentum": 0.0,
    "whiten_grad": True,
    "update_preconditioner_first": True,
    "preconditioner_update_probability": 1.0,
    "lr_preconditioner": 0.1,
    "betaL": 0.9,
    "damping": 1e-9,
    "preconditioner_max_size": inf,
    "preconditioner_max_skew": 1.0,
    "preconditioner_init_scale": None,
    "grad_clip_max_amps": (2.0, 10.0),
}
PUBLISHED = {"procrustes": QUAD_TORCH, "quad": QUAD_TORCH, "kron_whiten": KRON_WHITEN}


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_are_the_published_ones(name: str):
    assert {f.name: f.default for f in fields(METHODS[name])} == PUBLISHED[name]


def test_fixed_numbers_of_quad_torch():
    for name in ("procrustes", "quad"):
        recipe, timing = METHODS[name]().recipe(), METHODS[name]().tempo()
        assert (timing.memory, recipe.clip.rms, recipe.clip.entry, recipe.gain) == (0.95, 1.1, inf, 0.2)
        assert (recipe.bound.probes, recipe.bound.products, recipe.bound.offset) == (4, 6, 1e-9)
        assert [float(timing.rate(np, t)) for t in (30_000, 60_000)] == pytest.approx([0.35, 0.3])
        assert [t for t in range(1, 250) if timing.balance(t, None)] == [100, 200]
        assert METHODS[name](lr_style=None).recipe().gain == 1
        assert [recipe.dense(s) for s in ((5,), (1, 5), (4, 5))] == [(False,), (False, False), (True, False)]


def test_fixed_numbers_of_psgd_torch():
    recipe, timing = METHODS["kron_whiten"]().recipe(), METHODS["kron_whiten"]().tempo()
    assert (recipe.bound.probes, recipe.bound.products, recipe.bound.offset) == (32, 4, 0)
    assert [timing.balance(1, {"balance": u}.get) for u in (0.0, 0.00999, 0.01)] == [True, True, False]
    assert timing.fit(1, {"fit": 0.999}.get) is True
    assert METHODS["kron_whiten"](dQ="QEP").tempo().balance(1, {"balance": 0.0}.get) is False


# ---- wrong values ---------------------------------------------------------------------------
WRONG = [
    ("procrustes", "lr", -1.0, "[0, inf)"),
    ("procrustes", "lr", nan, "[0, inf)"),
    ("procrustes", "lr", inf, "[0, inf)"),
    ("procrustes", "lr", "fast", "number"),
    ("procrustes", "lr", True, "number"),
    ("procrustes", "lr", 1j, "number"),
    ("quad", "weight_decay", nan, "[0, inf)"),
    ("quad", "weight_decay", -0.1, "[0, inf)"),
    ("quad", "weight_decay", None, "number"),
    ("quad", "seed", -1, "[0, 4294967295]"),
    ("quad", "seed", 2**32, "[0, 4294967295]"),
    ("quad", "seed", 0.5, "whole number"),
    ("quad", "momentum", 1, "[0, 1)"),
    ("quad", "momentum", -0.1, "[0, 1)"),
    ("quad", "lr_style", "sgd", "'adam', None"),
    ("quad", "max_size_dense", 0, "[1, inf]"),
    ("quad", "max_size_dense", 2.5, "whole number"),
    ("quad", "max_size_dense", nan, "whole number"),
    ("quad", "max_size_dense", -inf, "whole number"),
    ("quad", "max_skew_dense", -1, "[0, inf]"),
    ("quad", "max_skew_dense", nan, "[0, inf]"),
    ("quad", "preconditioner_lr", 0, "(0, inf)"),
    ("quad", "preconditioner_init_scale", 0.0, "(0, inf)"),
    ("quad", "noise_scale", -1e-9, "[0, inf)"),
    ("quad", "dtype", "int8", "bfloat16, float16, float32, float64"),
    ("quad", "dtype", "complex64", "bfloat16, float16, float32, float64"),
    ("quad", "dtype", torch.int8, "bfloat16, float16, float32, float64"),
    ("kron_whiten", "dQ", "Q", "'QUAD4P'"),
    ("kron_whiten", "dQ", None, "'QUAD4P'"),
    ("kron_whiten", "momentum", 1.0, "[0, 1)"),
    ("kron_whiten", "whiten_grad", 1, "True or False"),
    ("kron_whiten", "update_preconditioner_first", None, "True or False"),
    ("kron_whiten", "preconditioner_update_probability", 0, "(0, 1]"),
    ("kron_whiten", "preconditioner_update_probability", 1.1, "(0, 1]"),
    ("kron_whiten", "lr_preconditioner", 0, "(0, 1)"),
    ("kron_whiten", "lr_preconditioner", 1, "(0, 1)"),
    ("kron_whiten", "betaL", 1, "[0, 1)"),
    ("kron_whiten", "damping", nan, "[0, inf)"),
    ("kron_whiten", "preconditioner_max_size", -1, "[0, inf]"),
    ("kron_whiten", "preconditioner_max_skew", -1, "[0, inf]"),
    ("kron_whiten", "preconditioner_init_scale", -1, "(0, inf)"),
    ("kron_whiten", "grad_clip_max_amps", (3.0, 2.0), "0 < first <= second"),
    ("kron_whiten", "grad_clip_max_amps", (0.0, 2.0), "0 < first <= second"),
    ("kron_whiten", "grad_clip_max_amps", (nan, 2.0), "0 < first <= second"),
    ("kron_whiten", "grad_clip_max_amps", 2.0, "0 < first <= second"),
    ("kron_whiten", "grad_clip_max_amps", ("a", "b"), "0 < first <= second"),
    ("procrustes", "lr", np.float64(-1), "[0, inf)"),
    ("procrustes", "lr", np.float32(nan), "[0, inf)"),
]


@pytest.mark.parametrize(("name", "argument", "value", "allowed"), WRONG)
def test_a_wrong_value_says_what_is_wrong(name: str, argument: str, value: object, allowed: str):
    with pytest.raises(ValueError, match=argument) as caught:
        METHODS[name].of(**{argument: value})
    shown = "'int8'" if value is torch.int8 else repr(value)
    assert f"{name}: {argument}={shown} " in str(caught.value) and allowed in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_float_is_a_seed():
    host_plan(METHODS["quad"](seed=1.0).tempo(), 1)


def test_an_unknown_name_lists_the_known_ones():
    for name, made in METHODS.items():
        with pytest.raises(ValueError, match=f"{name}: unknown hyperparameter 'learning_rat'; it has lr, ") as caught:
            made.of(learning_rat=0.1)
        assert all(f.name in str(caught.value) for f in fields(made))


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match=r"whiten_grad=False.*momentum"):
        METHODS["kron_whiten"](whiten_grad=False)
    assert METHODS["kron_whiten"](whiten_grad=False, momentum=0.5).recipe().whiten == "momentum"


def test_ends_of_ranges_are_accepted():
    METHODS["kron_whiten"](
        lr=0, preconditioner_update_probability=1, preconditioner_max_size=0, preconditioner_max_skew=inf, betaL=0
    )
    METHODS["quad"](max_size_dense=inf, max_skew_dense=0, seed=2**32 - 1, lr_style=None, momentum=0, noise_scale=0)


def test_values_under_a_tracer_are_not_looked_at():
    assert float(jax.jit(lambda lr: METHODS["quad"](lr=lr).lr * 2)(0.5)) == 1
    assert METHODS["quad"](momentum=jnp.asarray(0.9)).recipe().momentum is True


# ---- the record -----------------------------------------------------------------------------
@pytest.mark.parametrize("given", ["bfloat16", torch.bfloat16, jnp.bfloat16, jnp.dtype("bfloat16")])
def test_a_dtype_goes_by_its_name(given: object):
    assert METHODS["quad"](dtype=given).dtype == "bfloat16"


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_values(name: str):
    one, same, other = METHODS[name](lr=0.5), METHODS[name](lr=0.5), METHODS[name](lr=0.25)
    assert one == same and hash(one) == hash(same) and one != other and len({one, same, other}) == 2
    assert eval(repr(one), {type(one).__name__: type(one), "inf": inf}) == one
    assert pickle.loads(pickle.dumps(one)) == one and replace(other, lr=0.5) == one
    with pytest.raises(FrozenInstanceError):
        one.lr = 1.0


@pytest.mark.parametrize("name", METHODS)
def test_recipes_are_static(name: str):
    """One compiled step serves all learning rates: recipes compare by value and hold no number of the tempo."""
    made = METHODS[name]
    recipes = {made().recipe(), made().recipe(), made(lr=0.5, weight_decay=0.2, seed=3).recipe()}
    assert len(recipes) == 1 and isinstance(recipes.pop(), Recipe) and isinstance(made().tempo(), Tempo)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_describes_itself(name: str):
    made = METHODS[name]
    text = documented(made)
    assert issubclass(made, Method) and made.name == name and made.title.isidentifier()
    assert made.summary.endswith(".") and text.startswith(made.summary) and made.source in text
    for f in fields(made):
        assert f"    {f.name}: {f.metadata['doc']}" in text and f"(default {f.default!r})" in text


def test_every_geometry_can_be_chosen():
    for name, geometry in GEOMETRIES.items():
        assert METHODS["kron_whiten"](dQ=name).recipe().geometry is geometry


def test_start_scale():
    assert METHODS["quad"]().start_scale() is None
    assert METHODS["kron_whiten"](preconditioner_init_scale=0.1).start_scale() == 0.1


def test_the_base_is_abstract(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Method, "name", "base", raising=False)
    for ask in (Method().recipe, Method().tempo):
        with pytest.raises(NotImplementedError):
            ask()
