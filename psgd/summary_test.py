"""The summary is what really is kept, to the byte, and what a step really multiplies, known from the shapes alone."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import psgd_jax_backend
import psgd_torch_backend
from psgd import structured
from psgd.geometry import GEOMETRIES
from psgd.methods import METHODS
from psgd.summary import (
    Parameter,
    ParameterCost,
    Summary,
    counters,
    in_bytes,
    in_flops,
    parameter_cost,
    parameter_costs,
    summary,
)

EXAMPLES = Path(__file__).parent.parent / "examples"
SHAPES = {
    "matrix": (4, 6),
    "twin": (4, 6),
    "vector": (5,),
    "scalar": (),
    "single": (1, 1),
    "empty": (0, 3),
    "kernel": (2, 3, 4),
    "stack": (3, 4, 4),
    "gains": (3,),
    "none": (0, 2, 2),
}
SCANNED = ("stack", "gains", "none")
ALL_METHODS = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
OF_EACH = {name: method for name, method in METHODS.items() if not method().recipe().joint}
WHOLE = {name: method for name, method in METHODS.items() if name not in OF_EACH}
METHODS_OF_EACH = pytest.mark.parametrize("method", OF_EACH.values(), ids=OF_EACH)
WHOLE_METHODS = pytest.mark.parametrize("method", WHOLE.values(), ids=WHOLE)


def variants() -> list:
    """Every method by default, and with every hyperparameter that says what is kept."""
    wanted = {"mu_dtype": "bfloat16", "precond_dtype": "bfloat16", "dtype": "bfloat16", "momentum": 0.5, "b1": 0.0}
    wanted |= {"max_size_triangular": 4, "memory_save_mode": "one_diag"}
    cases = []
    for name, method in METHODS.items():
        given = [{}, *({k: v} for k, v in wanted.items() if k in method.__dataclass_fields__)]
        cases += [pytest.param(method, h, id="-".join([name, *h])) for h in given]
    return cases


def torch_bytes(kept) -> int:
    return kept.nbytes if isinstance(kept, torch.Tensor) else sum(map(torch_bytes, kept.values()))


def jax_bytes(state) -> int:
    """Of those parts of a state that are PSGD's."""

    def ours(x):
        return isinstance(x, psgd_jax_backend.PSGDState)

    own = [x for x in jax.tree.leaves(state, is_leaf=ours) if ours(x)]
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(own))


def torch_face(method):
    return getattr(psgd_torch_backend, method.title)


def jax_face(method):
    return getattr(psgd_jax_backend, method.name)


def jax_shapes(shapes, dtype="float32"):
    return {name: jax.ShapeDtypeStruct(tuple(shape), dtype) for name, shape in shapes.items()}


def torch_params(shapes, dtype="float32", device="cpu"):
    kind = {"dtype": getattr(torch, dtype), "device": device}
    return {name: torch.nn.Parameter(torch.zeros(tuple(shape), **kind)) for name, shape in shapes.items()}


def step(optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    if not optimizer.method.of().recipe().newton:
        return optimizer.step()
    ones = [torch.ones_like(p) for group in optimizer.param_groups for p in group["params"]]
    return optimizer.step(Hvp=ones, vector=ones, update_preconditioner=True)


# ---- what is kept ----------------------------------------------------------------------------
@pytest.mark.parametrize(("method", "hyperparameters"), variants())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_in_torch_is_right_to_the_byte(method, hyperparameters, dtype):
    params = torch_params(SHAPES, dtype)
    whole = method.of().recipe().joint
    optimizer = torch_face(method)(params.items(), scanned_layers=False if whole else SCANNED, **hyperparameters)
    before = optimizer.summary()
    assert not optimizer.state
    step(optimizer)
    assert before.state == torch_bytes(optimizer.state)
    assert before == optimizer.summary()
    for one in before.rows:
        apart = ("step", "since", "L") if method.of().recipe().joint else ("step", "since")
        kept = {k: v for k, v in optimizer.state[params[one.name]].items() if k not in apart}
        assert one.state == torch_bytes(kept), one.name
        assert one.bytes == params[one.name].nbytes


@pytest.mark.parametrize(("method", "hyperparameters"), variants())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_in_jax_is_right_to_the_byte(method, hyperparameters, dtype):
    flags = {name: name in SCANNED for name in SHAPES}
    whole = method.of().recipe().joint
    tx = jax_face(method)(scanned_layers=None if whole else flags, **hyperparameters)
    state = tx.init({name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()})
    assert psgd_jax_backend.summary(tx, jax_shapes(SHAPES, dtype)).state == jax_bytes(state)


@ALL_METHODS
def test_gpt2_is_right_to_the_byte_in_both_frameworks(method):
    shapes = json.loads((EXAMPLES / "gpt2-124m.json").read_text())
    optimizer = torch_face(method)(torch_params(shapes, device="meta").items())
    tx, tree = jax_face(method)(), jax_shapes(shapes)
    in_torch, in_jax = optimizer.summary(), psgd_jax_backend.summary(tx, tree)
    step(optimizer)
    assert in_torch.state == torch_bytes(optimizer.state)
    assert in_jax.state == jax_bytes(jax.eval_shape(tx.init, tree))
    assert in_torch.bytes == in_jax.bytes == 4 * 124_439_808
    assert in_torch.rows == tuple(next(r for r in in_jax.rows if r.name == name) for name in shapes)


@METHODS_OF_EACH
def test_layers_are_as_many_parameters(method):
    made = method.of()
    for shape in ((4, 6), (5,), (), (2, 3, 4)):
        one, many = parameter_cost(made, "x", shape), parameter_cost(made, "x", (7, *shape), scanned=True)
        assert (many.state, many.apply, many.fit) == (7 * one.state, 7 * one.apply, 7 * one.fit)
        assert (many.factors, many.layers, many.shape) == (one.factors, 7, (7, *shape))
    none = parameter_cost(made, "x", (0, 4, 6), scanned=True)
    assert (none.state, none.apply, none.fit, none.bytes, none.layers) == (0, 0, 0, 0, 0)


def test_groups_with_hyperparameters_of_their_own():
    a, b, c = torch_params({"a": (4, 6), "b": (4, 6), "c": (3, 4, 6)}).values()
    groups = [
        {"params": [("a", a)]},
        {"params": [("b", b)], "momentum": 0.9, "preconditioner_max_size": 0, "dQ": "QUAD"},
        {"params": [("c", c)], "scanned_layers": True},
    ]
    optimizer = psgd_torch_backend.KronWhiten(groups)
    made = optimizer.summary()
    step(optimizer)
    assert made.state == torch_bytes(optimizer.state)
    assert [(r.name, r.factors, r.layers) for r in made.rows] == [
        ("a", ("4x4", "6"), None),
        ("b", ("4", "6"), None),
        ("c", ("4x4", "6"), 3),
    ]
    optimizer.param_groups[0]["preconditioner_max_size"] = 0
    assert optimizer.summary().rows[0].factors == ("4", "6")


def test_factors_are_named_by_their_shapes():
    assert parameter_cost(METHODS["kron"].of(), "x", (7, 3, 5)).factors == ("7x7", "3x3", "5x5")
    assert parameter_cost(METHODS["kron"].of(max_size_triangular=5), "x", (7, 3, 5)).factors == ("7", "3x3", "5x5")
    assert parameter_cost(METHODS["affine"].of(), "x", (5,)).factors == ("1", "5x5")
    assert parameter_cost(METHODS["quad"].of(), "x", ()).factors == ("1",)
    assert parameter_cost(METHODS["quad"].of(), "x", (0, 3)).factors == ()


# ---- what a step costs -------------------------------------------------------------------------
# Products of (n, n) matrices of one step for an (n, n) gradient, by hand; a triangular solve is half of one. With the
# factors already there: P g is q^H (q g) on either side, four products, or two where the factors are those of P. Four
# strips leave 5/8 of one with a triangle (TRI) or a Hermitian result (SYM), 15/32 of one of two triangles (BOTH).
TRI = SYM = 5 / 8
BOTH = 15 / 32
PRODUCTS = {
    "EQ": (4 * TRI, 2 * TRI + 2 / 2 + 2 * (SYM + SYM + BOTH)),  # Q h, Q^-H v; on either side: T1, T2, move
    "QEP": (4, 4 + 2 * (1 + SYM + SYM + 1)),  # P h; lift, T1, q q^H, move
    "QEQ": (4, 4 + 2 * (SYM + 1)),  # P h; T1, move
    "Q0.5EQ1.5": (4, 4 + 2 * (SYM + 1 + 2)),  # P h; T1, move, R q and R R q
    "QUAD": (4, 4 + 2 * (SYM + 1 + SYM)),  # P h; T1, move from both sides
    "PRO4P": (2, 2 + 2 * (SYM + 1 + 10 * 3)),  # P h; T1, move, ten sweeps of three
    "QUAD4P": (2, 2 + 2 * (SYM + 1 + SYM)),
}
assert structured.MOST == 4


def cubic(made, what: str, n: int = 1024) -> float:
    """How many products of (n, n) matrices a figure grows as: a n^3 + b n^2 + ..., by two sizes."""
    small, large = (getattr(parameter_cost(made, "x", (k, k)), what) for k in (n, 2 * n))
    return (large - 4 * small) / (4 * n**3) / 2


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_square_matrix_takes_the_products_that_its_geometry_says(geometry):
    made = METHODS["kron_whiten"].of(dQ=geometry)
    assert [cubic(made, "apply"), cubic(made, "fit")] == pytest.approx(PRODUCTS[geometry], rel=1e-3)


@WHOLE_METHODS
def test_a_whole_model_costs_what_its_vector_does(method):
    """Work grows with the number of parameters, of a matrix with its square and cube; rows share it out."""

    def made(k: int) -> Summary:
        parameters = [Parameter("a", (k, 10)), Parameter("b", (10 * k,), "bfloat16"), Parameter("c", (0, 3))]
        return summary((method.of(), line) for line in parameter_costs(method.of(), parameters))

    small, large = made(100), made(200)
    powers = (2, 3) if method.name == "dense_newton" else (1, 1)
    for what, power in zip(("apply", "fit"), powers, strict=True):
        assert getattr(large, what) / getattr(small, what) == pytest.approx(2**power, rel=0.02)
        a, b, c = (getattr(line, what) for line in large.rows)
        assert a == b > 0 == c
    alone = parameter_cost(method.of(), "x", (4000,))
    assert (alone.apply - large.apply, alone.fit - large.fit) < (3, 3)
    widths = {"xmat": ("", ""), "dense_newton": ("x4000",)}.get(method.name, ("x10", "x10", ""))
    assert [line.factors for line in large.rows] == [tuple(f"{n}{w}" for w in widths) for n in (2000, 2000, 0)]


@pytest.mark.parametrize(
    ("name", "given", "numbers", "bounds"),
    [
        ("low_rank_approximation", {}, 2 * 10 + 1 + 1, 0),
        ("low_rank_approximation", {"b1": 0.0}, 2 * 10 + 1, 0),
        ("xmat", {}, 3, 0),
        ("xmat", {"b1": 0.0}, 2, 0),
        ("lra_whiten", {}, 2 * 10 + 1, 3),
        ("lra_newton", {"momentum": 0.9, "rank_of_approximation": 3}, 2 * 3 + 1 + 1, 3),
        ("dense_newton", {}, 60_000, 1),
    ],
)
def test_what_sixty_thousand_parameters_take(name: str, given: dict, numbers: int, bounds: int):
    made, parameters = METHODS[name].of(**given), [Parameter("a", (100, 500)), Parameter("b", (10_000,))]
    assert [line.state for line in parameter_costs(made, parameters)] == [4 * numbers * 50_000, 4 * numbers * 10_000]
    count = 1 + made.schedule().counts
    assert counters(made, parameters, 4, each=False) == 4 * count + 4 * bounds
    assert counters(made, parameters, 8, each=True) == 2 * (8 * count + 4 * bounds)


@WHOLE_METHODS
def test_a_model_without_parameters_takes_nothing(method):
    (line,) = parameter_costs(method.of(), [Parameter("a", (0, 3))])
    assert (line.state, line.apply, line.fit, line.factors) == (0, 0, 0, ())
    assert parameter_costs(method.of(), []) == []


@METHODS_OF_EACH
def test_twice_the_size_is_eight_times_the_work(method):
    small, large = (parameter_cost(method.of(), "x", (n, n)) for n in (2048, 4096))
    assert 7.8 < large.apply / small.apply <= 8
    assert 7.5 < large.fit / small.fit <= 8


@ALL_METHODS
def test_products_are_those_that_torch_counts(method):
    """torch counts products alone, without solves; they are nearly all of the work on large matrices."""
    optimizer = torch_face(method)(torch_params({"a": (512, 512), "b": (256, 384)}, device="meta").items())
    made = optimizer.summary()
    with FlopCounterMode(display=False) as counter:
        step(optimizer)
    if method.name == "xmat":
        assert counter.get_total_flops() == 0 < made.apply
    else:
        least = 0.6 if method.name in WHOLE else 0.85  # few of the products of a whole model are of matrices
        assert least * (made.apply + made.fit) < counter.get_total_flops() <= made.apply + made.fit


def test_a_diagonal_costs_no_products():
    made = METHODS["kron_whiten"].of(preconditioner_max_size=0)
    small, large = (parameter_cost(made, "x", (n, n)) for n in (1000, 2000))
    assert large.apply / small.apply == pytest.approx(4, rel=0.01)
    assert large.fit / small.fit == pytest.approx(4, rel=0.01)


# ---- where it looks ----------------------------------------------------------------------------
TREE = {"a": jax.ShapeDtypeStruct((4, 6), np.float32), "b": {"c": jax.ShapeDtypeStruct((5,), np.float32)}}


@pytest.mark.parametrize(
    ("make", "methods", "names"),
    [
        (lambda j: optax.chain(optax.clip(1.0), j.kron(0.1), optax.scale(2.0)), ("Kron",), ["a", "b/c"]),
        (lambda j: j.scale_by_quad(), ("QUAD",), ["a", "b/c"]),
        (lambda j: optax.masked(j.quad(), {"a": True, "b": False}), ("QUAD",), ["a"]),
        (
            lambda j: optax.multi_transform({"x": j.kron(), "y": j.quad()}, {"a": "x", "b": "y"}),
            ("Kron", "QUAD"),
            ["a", "b/c"],
        ),
        (
            lambda j: optax.multi_transform({"x": optax.adam(0.1), "y": j.quad()}, {"a": "x", "b": "y"}),
            ("QUAD",),
            ["b/c"],
        ),
        (lambda j: optax.chain(j.scale_by_kron(), j.scale_by_kron()), ("Kron",), ["a", "b/c", "a", "b/c"]),
    ],
    ids=["chain", "alone", "masked", "two methods", "one of two", "twice"],
)
def test_methods_are_found_inside_other_transformations(make, methods, names):
    tx = make(psgd_jax_backend)
    made = psgd_jax_backend.summary(tx, TREE)
    assert (sorted(made.methods), sorted(r.name for r in made.rows)) == (sorted(methods), sorted(names))
    assert made.state == jax_bytes(jax.eval_shape(tx.init, TREE))


def test_a_single_array_has_a_name_too():
    made = psgd_jax_backend.summary(psgd_jax_backend.quad(), jnp.zeros((4, 6)))
    assert [r.name for r in made.rows] == ["parameter"]


def test_a_transformation_without_a_method_is_refused():
    for tx in (optax.adam(0.1), optax.masked(optax.adam(0.1), {"a": True, "b": False})):
        with pytest.raises(ValueError, match="no PSGD method"):
            psgd_jax_backend.summary(tx, TREE)


@pytest.mark.parametrize(
    ("params", "settings"),
    [
        ({"a": jax.ShapeDtypeStruct((2,), np.int32)}, {}),
        ({"a": jax.ShapeDtypeStruct((), np.float32)}, {"scanned_layers": True}),
        ({"a": jax.ShapeDtypeStruct((2, 2), np.complex64)}, {}),
        ({"a": jax.ShapeDtypeStruct((2, 2), np.float32)}, {"scanned_layers": {"b": True}}),
    ],
    ids=["integers", "scalar layers", "complex", "another tree"],
)
def test_what_init_refuses_the_summary_refuses_in_the_same_words(params, settings):
    tx = psgd_jax_backend.kron(**settings)
    with pytest.raises((TypeError, ValueError)) as told:
        jax.eval_shape(tx.init, params)
    with pytest.raises(type(told.value)) as again:
        psgd_jax_backend.summary(tx, params)
    assert str(again.value) == str(told.value)


def test_an_error_inside_leaves_no_listener_behind():
    heard = psgd_jax_backend.summary(psgd_jax_backend.quad(), TREE)
    with pytest.raises(TypeError):
        psgd_jax_backend.summary(psgd_jax_backend.quad(), {"a": jax.ShapeDtypeStruct((2, 2), np.complex64)})
    assert psgd_jax_backend.summary(psgd_jax_backend.quad(), TREE) == heard


# ---- how it looks ------------------------------------------------------------------------------
def test_nothing_is_printed(capfd):
    psgd_jax_backend.summary(psgd_jax_backend.kron(), TREE)
    text = str(psgd_torch_backend.Kron(torch_params(SHAPES).items()).summary())
    assert text and capfd.readouterr() == ("", "")


def test_the_text_has_a_line_for_each_parameter_and_one_for_all():
    made = psgd_torch_backend.Kron(torch_params(SHAPES).items(), scanned_layers=SCANNED).summary()
    title, head, rule, *lines, second, total = made.text(100).splitlines()
    assert title == "Kron"
    assert rule == second == "-" * max(map(len, (head, *lines)))
    assert [line.split()[0] for line in lines] == list(SHAPES)
    assert next(line for line in lines if line.startswith("scalar")).split()[1] == "scalar"
    assert next(line for line in lines if line.startswith("stack")).split()[1:7] == [
        *("3x4x4", "float32", "4x4", "4x4", "(3", "layers)")
    ]
    elements = sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert total.split()[:4] == ["total", str(elements), "in", str(len(SHAPES))]
    assert {len(line) for line in (head, *lines, total)} == {len(rule)}  # the last column is set right


@pytest.mark.parametrize("width", [80, 60, 45])
def test_a_table_that_is_too_wide_says_what_it_leaves_out(width):
    name = "a.name.that.is.much.longer.than.others"
    one = ParameterCost(name, (128, 256), "float32", ("128x128", "256x256"), None, state=100, apply=20, fit=3)
    whole = Summary(("A",), (one, replace(one, name="short")))
    title, head, *lines, size, gone = whole.text(width).splitlines()
    assert max(map(len, (title, head, *lines))) <= width
    assert gone.startswith(f"left out to fit {width} columns: ")
    left_out = gone.partition(": ")[2].split(", ")
    assert set(head.split()) | set(left_out) == set(whole.cells()[0]) and not set(head.split()) & set(left_out)
    assert size == "parameters: 65,536 in 2, 256 KiB" and lines[1] == name and lines[2].split()[-1] == "3"
    assert str(whole) == whole.text(80) and "left out" not in whole.text(200)


def test_totals_are_sums():
    one = ParameterCost("x", (2, 3), "float32", ("2x2", "3x3"), None, state=100, apply=20, fit=3)
    whole = Summary(("A", "B"), (one, replace(one, name="y", dtype="bfloat16")), counters=7)
    assert (whole.state, whole.bytes, whole.apply, whole.fit) == (207, 36, 40, 6)
    assert str(whole).splitlines()[0] == "A, B"
    made = METHODS["quad"].of()
    pairs = [(made, one), (METHODS["kron"].of(), one), (made, one)]
    assert summary(pairs, 5) == Summary(("QUAD", "Kron"), (one,) * 3, 5)


@pytest.mark.parametrize("name", METHODS)
def test_a_rotation_of_a_long_vector_is_told(name):
    """Where a geometry can be chosen, and one that does not rotate fits in less than a quarter of the operations."""
    method = METHODS[name]()
    notes = summary((method, r) for r in parameter_costs(method, [Parameter("w", (64, 8)), Parameter("b", (8,))])).notes
    choosable = [f.name for f in fields(method) if getattr(method, f.name) in tuple(GEOMETRIES)]
    dear = bool(choosable) and method.recipe().joint
    assert [note.startswith(f"{method.title}: {choosable[0]}=") for note in notes] == [True] * dear
    if dear:
        lines = str(summary((method, r) for r in parameter_costs(method, [Parameter("w", (64, 8))]))).splitlines()
        assert max(map(len, lines)) <= 80 and "rotates, which takes most of a fit's" in " ".join(lines)
        cheap = next(g for g, record in GEOMETRIES.items() if record.turn is None)
        still = replace(method, **{choosable[0]: cheap})
        assert not summary((still, r) for r in parameter_costs(still, [Parameter("w", (64, 8))])).notes


@pytest.mark.parametrize(
    ("n", "as_bytes", "as_flops"),
    [
        (0, "0 B", "0"),
        (999, "999 B", "999"),
        (2048, "2 KiB", "2.05 K"),
        (3 * 2**20 // 2, "1.5 MiB", "1.57 M"),
        (8 * 2**40, "8 TiB", "8.8 T"),
    ],
)
def test_figures_come_in_units(n, as_bytes, as_flops):
    assert (in_bytes(n), in_flops(n)) == (as_bytes, as_flops)


@pytest.mark.parametrize("n", [1000, 1023, 999_499, 999_999, 1000 * 1024, 1024**2 - 1, 1020 * 1024**3, 10**15 - 1])
def test_no_figure_has_an_exponent(n):
    assert "e" not in in_bytes(n) and "e" not in in_flops(n)
