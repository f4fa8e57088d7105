"""Names, defaults and ranges of the registered methods, and what a wrong value says."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, fields, replace
from decimal import Decimal
from fractions import Fraction
from math import inf, nan

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from psgd import criterion, lra, xmat
from psgd.geometry import GEOMETRIES
from psgd.hyperparameters import Method
from psgd.kron import by_terms, by_triangle
from psgd.lra import LRA
from psgd.methods import METHODS
from psgd.pipeline import host_plan, init
from psgd.recipe import Recipe, Schedule
from psgd.scaling import Clip, InitialScale
from psgd.schedule import Annealed, StepInfo, corrected, nesterov
from psgd.spectral import NormBound, TraceBound

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
KRON = {  # psgd_jax calls lr learning_rate, and has a seed of its own
    "lr": 0.001,
    "weight_decay": 0.0,
    "seed": 0,
    "b1": 0.9,
    "preconditioner_update_probability": (1.0, 0.03, 0.001, 500),
    "max_size_triangular": 8192,
    "min_ndim_triangular": 2,
    "memory_save_mode": None,
    "momentum_into_precond_update": True,
    "preconditioner_lr": 0.1,
    "preconditioner_init_scale": 1.0,
    "mu_dtype": None,
    "precond_dtype": None,
    "precond_update_precision": "tensorfloat32",
    "precond_grads_precision": None,
}
PSGD_JAX = {
    "lr": 0.01,
    "weight_decay": 0.0,
    "seed": None,
    "preconditioner_update_probability": 1.0,
    "b1": 0.9,
    "nesterov": False,
    "precond_lr": 0.1,
    "precond_init_scale": None,
    "update_global_norm_clip": None,
    "step_normalizer_order": "2nd",
    "mu_dtype": None,
    "precision": "tensorfloat32",
}
NOT_OF_AXES = ("dQ", "preconditioner_max_size", "preconditioner_max_skew")
ONLY_WHITENING = ("whiten_grad", "update_preconditioner_first", "grad_clip_max_amps")


def without(defaults: dict, *names: str) -> dict:
    return {k: v for k, v in defaults.items() if k not in names}


KRON_NEWTON = without(KRON_WHITEN, *ONLY_WHITENING) | {
    "lr": 0.01,
    "grad_clip_max_norm": inf,
    "exact_hessian_vector_product": True,
}
RANK = {"rank_of_approximation": 10}
KWNS4 = without(KRON_WHITEN, "dQ") | {
    "lr": 2e-4,
    "weight_decay": 0.05,
    "decoupled_weight_decay": True,
    "lr_preconditioner": 0.5,
    "momentum": 0.9,
    "whiten_grad": False,
    "preconditioner_init_scale": 1.0,
    "preconditioner_dtype": "bfloat16",
    "resync_every": 1_000_000,
}
PUBLISHED = {
    "procrustes": QUAD_TORCH,
    "quad": QUAD_TORCH,
    "kron_whiten": KRON_WHITEN,
    "kron_newton": KRON_NEWTON,
    "lra_whiten": without(KRON_WHITEN, *NOT_OF_AXES) | RANK,
    "lra_newton": without(KRON_NEWTON, *NOT_OF_AXES) | RANK,
    "dense_newton": without(KRON_NEWTON, *NOT_OF_AXES[1:]),
    "kwns4": KWNS4,
    "kron": KRON,
    "affine": PSGD_JAX | {"max_size_triangular": 4096, "max_skew_triangular": 128},
    "xmat": PSGD_JAX,
    "low_rank_approximation": PSGD_JAX | {"uvd_rank_of_approximation": 10},
}


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_the_published_ones(name: str):
    defaults = {f.name: f.default for f in fields(METHODS[name])}
    assert defaults.pop("keep_p", False) is False  # which is of this package
    assert defaults == PUBLISHED[name]


# As quad_torch 0.4.5 and psgd_jax 0.2.9 take them. psgd_torch begins with its preconditioner: there the rate alone.
WITH_A_COIN = (
    "lr preconditioner_update_probability b1 nesterov weight_decay mask {} precond_lr precond_init_scale "
    "update_global_norm_clip step_normalizer_order seed mu_dtype precision"
)
QUAD_ORDER = "lr lr_style momentum weight_decay max_size_dense max_skew_dense preconditioner_lr noise_scale dtype"
ORDER = {
    "procrustes": QUAD_ORDER,
    "quad": QUAD_ORDER,
    "kron": "lr b1 weight_decay weight_decay_mask preconditioner_update_probability max_size_triangular "
    "min_ndim_triangular memory_save_mode momentum_into_precond_update preconditioner_lr preconditioner_init_scale "
    "mu_dtype precond_dtype precond_update_precision precond_grads_precision scanned_layers lax_map_scanned_layers "
    "lax_map_batch_size",
    "affine": WITH_A_COIN.format("max_size_triangular max_skew_triangular"),
    "xmat": WITH_A_COIN.format(""),
    "low_rank_approximation": WITH_A_COIN.format("uvd_rank_of_approximation"),
}


@pytest.mark.parametrize("name", METHODS)
def test_positions_are_the_published_ones(name: str):
    assert METHODS[name].positional == tuple(ORDER.get(name, "lr").split())


def balances(timing: Schedule, *tosses: float) -> list[bool]:
    """Whether factors are balanced, for each outcome of the toss."""
    return [bool(timing.balance(StepInfo(1, {"balance": u}.get))) for u in tosses]


def test_fixed_numbers_of_quad_torch():
    for name in ("procrustes", "quad"):
        recipe, timing = METHODS[name]().recipe(), METHODS[name]().schedule()
        assert (timing.beta_lipschitz, recipe.clip.rms, recipe.clip.entry, recipe.gain) == (0.95, 1.1, inf, 0.2)
        assert recipe.preconditioner.bound == NormBound(probes=4, products=6, offset=1e-9)
        assert not recipe.preconditioner.split
        assert [float(timing.rate(np, t)) for t in (30_000, 60_000)] == pytest.approx([0.35, 0.3])
        assert [t for t in range(1, 250) if timing.balance(StepInfo(t, None))] == [100, 200]
        assert METHODS[name](lr_style=None).recipe().gain == 1
        assert [recipe.preconditioner.dense(s) for s in ((5,), (1, 5), (4, 5))] == [
            (False,),
            (False, False),
            (True, False),
        ]


def test_fixed_numbers_of_psgd_torch():
    recipe, timing = METHODS["kron_whiten"]().recipe(), METHODS["kron_whiten"]().schedule()
    assert recipe.preconditioner.bound == NormBound(probes=32, products=4, offset=0)
    assert balances(timing, 0.0, 0.00999, 0.01) == [True, True, False]
    assert timing.fit(StepInfo(1, {"fit": 0.999}.get)) is True
    assert balances(METHODS["kron_whiten"](dQ="QEP").schedule(), 0.0) == [False]


def test_fixed_numbers_of_psgd_jax():
    for name, rms, damping in (("kron", 1.1, np.sqrt(np.finfo(np.float32).eps)), ("affine", inf, 0)):
        recipe, timing = METHODS[name]().recipe(), METHODS[name]().schedule()
        assert (timing.beta_lipschitz, recipe.clip.rms, recipe.clip.entry, recipe.gain) == (0, rms, inf, 1)
        assert recipe.preconditioner.bound == NormBound(probes=0, products=2) and recipe.preconditioner.split
        assert timing.damping == pytest.approx(damping, rel=1e-7, abs=0) and timing.rate(np, 5.0) == 0.1
        assert balances(timing, 0.0, 0.00999, 0.01) == [True, True, False]


def test_rules_of_kron():
    made = METHODS["kron"]
    recipe = made().recipe()
    assert recipe.preconditioner.normaliser is by_terms and recipe.damping is criterion.proportional
    assert recipe.whiten == "momentum" and not recipe.balance_last and not recipe.has_max_norm
    assert made(momentum_into_precond_update=False).recipe().whiten == "gradient" and not made(b1=0).recipe().momentum
    shapes = ((7,), (2, 9000), (3, 3))
    for mode, dense in ((None, (True, True)), ("one_diag", (True, False)), ("all_diag", (False, False))):
        rule = made(memory_save_mode=mode).recipe().preconditioner.dense
        assert [rule(s) for s in shapes] == [(False,), (mode != "all_diag", False), dense]
    assert made(min_ndim_triangular=1, max_size_triangular=7).recipe().preconditioner.dense((7,)) == (True,)
    assert made(mu_dtype="bfloat16", precond_dtype=jnp.float32).recipe().momentum_dtype == "bfloat16"
    assert made(precond_dtype=jnp.float32).recipe().factor_dtype == "float32"
    own = made(precond_update_precision="bfloat16", precond_grads_precision="float32").recipe()
    assert (own.fit_precision, own.apply_precision) == ("bfloat16", "float32")
    assert made().initial_scale() == 1 and made(preconditioner_init_scale=0.1).initial_scale() == 0.1


def test_rules_of_affine():
    made = METHODS["affine"]
    recipe, timing = made().recipe(), made().schedule()
    kind = recipe.preconditioner
    assert kind.normaliser is by_terms and recipe.whiten == "gradient" and recipe.damping is criterion.undamped
    assert made(step_normalizer_order="1st").recipe().preconditioner.normaliser is by_triangle
    assert [kind.dense(s) for s in ((2, 256), (2, 257), (1, 129), (5000, 5000))] == [
        (True, True),
        (True, False),
        (False, False),
        (False, False),
    ]
    rare = made(preconditioner_update_probability=0.5).schedule()
    assert [bool(rare.fit(StepInfo(t, {"fit": 0.5}.get))) for t in (1, 2, 3)] == [True, True, False]
    assert timing.averaging is corrected and made(nesterov=True).schedule().averaging is nesterov
    assert not recipe.has_max_norm and timing.max_norm == inf and made().initial_scale() is None
    bounded = made(update_global_norm_clip=2.0)
    assert bounded.recipe().has_max_norm and bounded.schedule().max_norm == 2
    own = made(precision="bfloat16").recipe()
    assert (own.fit_precision, own.apply_precision) == ("bfloat16", "bfloat16")


NEWTON = ("kron_newton", "lra_newton", "dense_newton")
WHOLE = ("lra_whiten", "lra_newton", "dense_newton", "xmat", "low_rank_approximation")


def test_axes_of_the_grid_that_few_methods_use():
    recipes = {name: made().recipe() for name, made in METHODS.items()}

    def those(has) -> tuple[str, ...]:
        return tuple(name for name in METHODS if has(name))

    assert those(lambda name: recipes[name].newton) == NEWTON
    assert those(lambda name: recipes[name].joint) == WHOLE
    assert those(lambda name: METHODS[name].complex_parameters) == ("kron_whiten", "kron_newton")
    assert those(lambda name: METHODS[name]().schedule().counts) == (*NEWTON, "kron", "affine", *WHOLE[3:])
    assert not METHODS["kwns4"](decoupled_weight_decay=False).recipe().decoupled
    assert all(recipe.decoupled for recipe in recipes.values())


@pytest.mark.parametrize("name", NEWTON)
def test_rules_of_the_newton_methods(name: str):
    made = METHODS[name]
    recipe, timing = made().recipe(), made().schedule()
    assert recipe.fit_first and not recipe.has_max_norm and timing.max_norm == inf and timing.beta_lipschitz == 0.9
    assert recipe.clip == Clip() and recipe.damping is criterion.relative and recipe.initial_scale.power == 4
    bounded = made(grad_clip_max_norm=2.0)
    assert bounded.recipe().has_max_norm and bounded.schedule().max_norm == 2
    rare = made(preconditioner_update_probability=0.5).schedule()  # an uninitialised preconditioner is always fitted
    fits = [bool(rare.fit(StepInfo(t, {"fit": 0.5}.get, since))) for t, since in ((1, 1), (2, 1), (9, 8))]
    assert fits == [True, False, False]


def test_rules_of_lra():
    for name in ("lra_whiten", "lra_newton"):
        recipe, timing = METHODS[name](rank_of_approximation=4).recipe(), METHODS[name]().schedule()
        assert recipe.preconditioner == LRA(4, lra.RUNNING, lra.aligned, None)
        assert balances(timing, 0.0) == [False]
    for order, normaliser in (("1st", lra.BY_RESIDUAL), ("2nd", lra.BY_TERMS)):
        given = {"step_normalizer_order": order, "uvd_rank_of_approximation": 4}
        recipe, timing = (
            METHODS["low_rank_approximation"](**given).recipe(),
            METHODS["low_rank_approximation"]().schedule(),
        )
        assert recipe.preconditioner == LRA(4, normaliser, lra.aligned_if_long, lra.spread_by_rank, capped=True)
        assert (
            recipe.initial_scale == InitialScale(2) and recipe.damping is criterion.undamped and not recipe.balance_last
        )
        assert balances(timing, 0.0, 0.00999, 0.01) == [True, True, False]
    for name in ("lra_whiten", "lra_newton", "low_rank_approximation"):
        tosses = [bool(METHODS[name]().schedule().side(StepInfo(1, {"side": u}.get))) for u in (0.0, 0.499, 0.5)]
        assert tosses == [True, True, False]
    assert METHODS["lra_whiten"]().recipe().clip == Clip(2.0, 10.0)


def test_rules_of_xmat():
    for order, normaliser in (("1st", xmat.by_difference), ("2nd", xmat.by_squares)):
        recipe = METHODS["xmat"](step_normalizer_order=order).recipe()
        assert recipe.preconditioner == xmat.XShaped(normaliser)
        assert recipe.initial_scale == InitialScale(2) and recipe.damping is criterion.undamped


def test_rules_of_dense_newton_and_kwns4():
    kind = METHODS["dense_newton"]().recipe().preconditioner
    assert kind.bound == TraceBound() and kind.dense((1000,)) == (True,)
    recipe, timing = METHODS["kwns4"]().recipe(), METHODS["kwns4"]().schedule()
    assert (recipe.dtype, recipe.whiten, recipe.clip) == ("bfloat16", "momentum", Clip(2.0, 10.0))
    assert recipe.preconditioner.geometry is GEOMETRIES["Q0.5EQ1.5"] and METHODS["kwns4"]().initial_scale() == 1
    assert balances(timing, 0.0, 0.00999, 0.01) == [True, True, False]
    assert METHODS["kwns4"](preconditioner_dtype=None).recipe().dtype is None


@pytest.mark.parametrize("shape", [(), (1,), (5,), (200,), (3, 4), (300, 2), (2, 300), (2, 3, 6), (0, 3)])
def test_affine_draws_a_probe_only_where_its_mean_is_dear(shape: tuple[int, ...]):
    recipe = METHODS["affine"]().recipe()
    probed = recipe.preconditioner.probed(init(recipe, np.zeros(shape)).factors)
    assert probed is (shape in [(5,), (3, 4), (2, 3, 6)])


# ---- schedules ------------------------------------------------------------------------------
SCHEDULED = [(m.name, f.name) for m in METHODS.values() for f in fields(m) if f.metadata["scheduled"]]


def test_what_may_be_a_schedule():
    both = ("preconditioner_update_probability", "precond_lr")
    others = [(name, argument) for name in ("affine", "xmat", "low_rank_approximation") for argument in both]
    assert [("kron", "preconditioner_update_probability"), *others] == SCHEDULED


@pytest.mark.parametrize(("name", "argument"), SCHEDULED)
def test_a_schedule_is_a_function_or_four_numbers(name: str, argument: str):
    def half(step: float) -> float:
        return 0.5

    made = METHODS[name]
    assert getattr(made(**{argument: half}), argument) is half
    for four in ((0.9, 0.1, 0.01, 50), [0.9, 0.1, 0.01, 50], Annealed(0.9, 0.1, 0.01, 50)):
        one = made(**{argument: four})
        assert isinstance(getattr(one, argument), Annealed) and one == made(**{argument: Annealed(0.9, 0.1, 0.01, 50)})
    for wrong in (
        (0.1, 0.5, 0.01, 50),
        (0.9, 0.1, -0.01, 50),
        ("a", 0.1, 0.1, 1),
        (None, 0.1, 0.1, 1),
        (-1.0, 0.1, 0, 0),
    ):
        with pytest.raises(ValueError, match=f"{name}: {argument}=.* must be four numbers"):
            made(**{argument: wrong})


def test_schedules_are_asked_at_each_step():
    at_tenth = METHODS["affine"](precond_lr=lambda step: 0.1 / step).schedule().rate(np, 10.0)
    assert at_tenth == 0.01
    fits = METHODS["kron"](preconditioner_update_probability=lambda step: 1 / step).schedule().fit
    assert [bool(fits(StepInfo(7, None, since))) for since in (6, 7, 8)] == [False, True, True]
    coins = METHODS["affine"](preconditioner_update_probability=lambda step: 1 / step).schedule().fit
    assert [bool(coins(StepInfo(t, {"fit": 0.2}.get))) for t in (4, 6)] == [True, False]


# ---- wrong values ---------------------------------------------------------------------------
# What float32 has to hold: steps, scales and noise of the factors.
BOUNDED = [
    (name, f)
    for name, made in METHODS.items()
    for f in fields(made)
    if f.name in ("damping", "noise_scale") or f.name.endswith(("init_scale", "preconditioner_lr", "precond_lr"))
]
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
    ("quad", "preconditioner_lr", 0, "(0, 10]"),
    ("quad", "preconditioner_init_scale", 0.0, "[1e-18, 1e18]"),
    ("quad", "noise_scale", -1e-9, "[0, 1e18]"),
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
    ("kron_whiten", "damping", nan, "[0, 1e18]"),
    ("kron_whiten", "preconditioner_max_size", -1, "[0, inf]"),
    ("kron_whiten", "preconditioner_max_skew", -1, "[0, inf]"),
    ("kron_whiten", "preconditioner_init_scale", -1, "[1e-18, 1e18]"),
    ("kron_whiten", "grad_clip_max_amps", (3.0, 2.0), "0 < first <= second"),
    ("kron_whiten", "grad_clip_max_amps", (0.0, 2.0), "0 < first <= second"),
    ("kron_whiten", "grad_clip_max_amps", (nan, 2.0), "0 < first <= second"),
    ("kron_whiten", "grad_clip_max_amps", 2.0, "0 < first <= second"),
    ("kron_whiten", "grad_clip_max_amps", ("a", "b"), "0 < first <= second"),
    ("kron", "b1", 1.0, "[0, 1)"),
    ("kron", "preconditioner_update_probability", 0.0, "(0, 1]"),
    ("kron", "preconditioner_update_probability", nan, "(0, 1]"),
    ("kron", "preconditioner_update_probability", None, "a number or a function of the step"),
    ("kron", "preconditioner_update_probability", "often", "a number or a function of the step"),
    ("kron", "preconditioner_update_probability", (1.0, 0.1, 0.01), "a number or a function of the step"),
    ("kron", "preconditioner_lr", lambda step: 0.1, "must be a number;"),
    ("kron", "max_size_triangular", -1, "[0, inf]"),
    ("kron", "min_ndim_triangular", 1.5, "whole number"),
    ("kron", "min_ndim_triangular", inf, "[0, inf)"),
    ("kron", "memory_save_mode", "diag", "None, 'one_diag', 'all_diag'"),
    ("kron", "momentum_into_precond_update", 1, "True or False"),
    ("kron", "preconditioner_init_scale", None, "number"),
    ("kron", "preconditioner_init_scale", 0, "[1e-18, 1e18]"),
    ("kron", "mu_dtype", "int8", "bfloat16, float16, float32, float64"),
    ("kron", "precond_dtype", "complex64", "bfloat16, float16, float32, float64"),
    ("kron", "precond_update_precision", "float64", "None, 'bfloat16', 'tensorfloat32', 'float32'"),
    ("kron", "precond_grads_precision", "high", "None, 'bfloat16', 'tensorfloat32', 'float32'"),
    ("affine", "b1", -0.1, "[0, 1)"),
    ("affine", "nesterov", 0, "True or False"),
    ("affine", "preconditioner_update_probability", 1.5, "(0, 1]"),
    ("affine", "precond_lr", 0, "(0, 10]"),
    ("affine", "precond_lr", "fast", "a number or a function of the step"),
    ("affine", "precond_init_scale", -1, "[1e-18, 1e18]"),
    ("affine", "update_global_norm_clip", 0.0, "(0, inf)"),
    ("affine", "step_normalizer_order", "3rd", "'1st', '2nd'"),
    ("affine", "step_normalizer_order", None, "'1st', '2nd'"),
    ("affine", "seed", -1, "[0, 4294967295]"),
    ("affine", "max_size_triangular", 0.5, "whole number"),
    ("affine", "max_skew_triangular", nan, "[0, inf]"),
    ("affine", "precision", "tf32", "None, 'bfloat16', 'tensorfloat32', 'float32'"),
    ("kron_newton", "dQ", "Q5", "'QUAD4P'"),
    ("kron_newton", "grad_clip_max_norm", 0.0, "(0, inf]"),
    ("kron_newton", "grad_clip_max_norm", None, "number"),
    ("dense_newton", "exact_hessian_vector_product", 1, "True or False"),
    ("lra_newton", "lr_preconditioner", 1, "(0, 1)"),
    ("lra_whiten", "rank_of_approximation", -1, "[0, 1000000]"),
    ("lra_whiten", "rank_of_approximation", 2.5, "whole number"),
    ("low_rank_approximation", "uvd_rank_of_approximation", inf, "[0, 1000000]"),
    ("kwns4", "decoupled_weight_decay", None, "True or False"),
    ("kwns4", "preconditioner_dtype", "int8", "bfloat16, float16, float32, float64"),
    ("kwns4", "preconditioner_init_scale", 0.0, "[1e-18, 1e18]"),
    ("kwns4", "preconditioner_init_scale", None, "number"),
    ("kwns4", "resync_every", 0, "[1, inf)"),
    ("xmat", "update_global_norm_clip", 0.0, "(0, inf)"),
    ("xmat", "step_normalizer_order", "3rd", "'1st', '2nd'"),
    *((name, f.name, 1e308, f.metadata["within"]) for name, f in BOUNDED),
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


HALVES = [Fraction(1, 2), Decimal("0.5"), np.float32(0.5), np.array([[0.5]]), torch.tensor(0.5)]
NO_FLOATS = [10**400, 10**5000, Fraction(10**400), Decimal("sNaN"), torch.ones((), device="meta")]


@pytest.mark.parametrize("value", HALVES, ids=lambda value: type(value).__name__)
def test_what_is_a_number_is_kept_as_one(value: object):
    kept = METHODS["quad"](momentum=value).momentum
    assert type(kept) is float and kept == 0.5


@pytest.mark.parametrize("value", NO_FLOATS, ids=lambda value: type(value).__name__)
def test_a_number_that_is_no_float_is_refused(value: object):
    with pytest.raises(ValueError, match=r"quad: lr=.* must ") as caught:
        METHODS["quad"](lr=value)
    assert len(str(caught.value)) < 200
    assert METHODS["quad"](max_size_dense=10**400).max_size_dense == inf


def test_a_whole_float_is_a_seed():
    host_plan(METHODS["quad"](seed=1.0).schedule(), 1)


def test_an_unknown_name_lists_the_known_ones():
    for name, made in METHODS.items():
        with pytest.raises(ValueError, match=f"{name}: unknown hyperparameter 'learning_rat'; it has lr, ") as caught:
            made.of(learning_rat=0.1)
        assert all(f.name in str(caught.value) for f in fields(made))


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match=r"whiten_grad=False.*momentum"):
        METHODS["kron_whiten"](whiten_grad=False)
    assert METHODS["kron_whiten"](whiten_grad=False, momentum=0.5).recipe().whiten == "momentum"
    for name in ("lra_whiten", "kwns4"):
        with pytest.raises(ValueError, match=rf"{name}: whiten_grad=False.*momentum"):
            METHODS[name](whiten_grad=False, momentum=0)


def test_ends_of_ranges_are_accepted():
    METHODS["kron_whiten"](
        lr=0, preconditioner_update_probability=1, preconditioner_max_size=0, preconditioner_max_skew=inf, betaL=0
    )
    METHODS["kron"](b1=0, preconditioner_update_probability=1, max_size_triangular=inf, min_ndim_triangular=0)
    METHODS["affine"](seed=0, max_skew_triangular=0, max_size_triangular=0, precision=None)
    METHODS["quad"](max_size_dense=inf, max_skew_dense=0, seed=2**32 - 1, lr_style=None, momentum=0, noise_scale=0)


def test_values_under_a_tracer_are_not_looked_at():
    assert float(jax.jit(lambda lr: METHODS["quad"](lr=lr).lr * 2)(0.5)) == 1
    assert METHODS["quad"](momentum=jnp.asarray(0.9)).recipe().momentum is True
    assert (
        float(
            jax.jit(
                lambda p: METHODS["kron"](preconditioner_update_probability=p).schedule().fit(StepInfo(1, None, 2))
            )(0.5)
        )
        == 1
    )


# ---- the record -----------------------------------------------------------------------------
@pytest.mark.parametrize("given", ["bfloat16", torch.bfloat16, jnp.bfloat16, jnp.dtype("bfloat16")])
def test_a_dtype_goes_by_its_name(given: object):
    assert METHODS["quad"](dtype=given).dtype == "bfloat16"


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_values(name: str):
    one, same, other = METHODS[name](lr=0.5), METHODS[name](lr=0.5), METHODS[name](lr=0.25)
    assert one == same and hash(one) == hash(same) and one != other and len({one, same, other}) == 2
    assert eval(repr(one), {type(one).__name__: type(one), "inf": inf, "Annealed": Annealed}) == one
    assert pickle.loads(pickle.dumps(one)) == one and replace(other, lr=0.5) == one
    with pytest.raises(FrozenInstanceError):
        one.lr = 1.0


@pytest.mark.parametrize("name", METHODS)
def test_recipes_are_static(name: str):
    """One compiled step serves all learning rates: recipes compare by value and hold no number of the schedule."""
    made = METHODS[name]
    recipes = {made().recipe(), made().recipe(), made(lr=0.5, weight_decay=0.2, seed=3).recipe()}
    assert len(recipes) == 1 and isinstance(recipes.pop(), Recipe) and isinstance(made().schedule(), Schedule)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is(name: str):
    made = METHODS[name]
    assert issubclass(made, Method) and made.name == name and made.title.isidentifier()
    assert made.summary.endswith(".") and made.source


@pytest.mark.parametrize("method", ["kron_whiten", "kron_newton", "dense_newton"])
def test_every_geometry_can_be_chosen(method: str):
    for name, geometry in GEOMETRIES.items():
        assert METHODS[method](dQ=name).recipe().preconditioner.geometry is geometry
    made = METHODS[method](dQ="Q0p5EQ1p5")
    assert made.dQ == "Q0.5EQ1.5" and made == METHODS[method]()


def test_start_scale():
    assert METHODS["quad"]().initial_scale() is None
    assert METHODS["kron_whiten"](preconditioner_init_scale=0.1).initial_scale() == 0.1
    assert METHODS["affine"](precond_init_scale=0.1).initial_scale() == 0.1


def test_the_base_is_abstract(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Method, "name", "base", raising=False)
    for ask in (Method().recipe, Method().schedule):
        with pytest.raises(NotImplementedError):
            ask()
