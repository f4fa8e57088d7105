"""Seeded faults: a suite that never fails proves nothing, so we break the code on purpose and see who notices.

A fault is one row of a table: a function, a piece of its source, and what stands there instead. Planting it
compiles the changed source and gives the function the new code for the time of a `with` block, so that it is changed
wherever it is already held: in a record, in a registry, as a default argument. `caught` then runs the catchers of the
conformance suite in their order and names the first that notices.

`python -m conformance.internal.faults` prints the table of what caught what.
"""

from __future__ import annotations
import __future__

import inspect
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest.mock import patch

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from conformance.compare import compare
from conformance.drivers import jax_alias, jax_derivatives, jax_optimizer, torch_class
from conformance.frameworks import FRAMEWORKS
from conformance.internal import golden
from conformance.problems import PROBLEMS, Problem
from psgd import (
    axes,
    criterion,
    geometry,
    joint,
    kron,
    lra,
    noise,
    pipeline,
    rotate,
    schedule,
    shapes,
    spectral,
    structured,
    thin,
    xmat,
)
from psgd._xp import namespace
from psgd.methods import METHODS
from psgd.methods.quad_torch import QuadTorch
from psgd.scaling import InitialScale, max_norm_factor
from psgd_jax_backend import _per_tensor as jax_per_tensor
from psgd_jax_backend import transform
from psgd_jax_backend.named import named_function
from psgd_jax_backend.transform import Scaling
from psgd_torch_backend import _joint, _state
from psgd_torch_backend._per_tensor import PerTensor, _scale

FOLDER = Path(__file__).with_name("golden")
NOISE, GOLDEN, LOCKED = "noise", "golden", "locked"  # the catchers, in their order


PARTS = ("__code__", "__defaults__", "__kwdefaults__")


# ---- planting ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Fault:
    """`place` has `old` exactly once in its source; planted, it has `new` there. catcher: the kind that must notice."""

    name: str
    place: Callable[..., Any]
    old: str
    new: str
    catcher: str

    @contextmanager
    def planted(self) -> Iterator[None]:
        """The fault is in the code inside this block.

        Raises ValueError where the source has changed so that the fault no longer fits.
        """
        place, broken = _function(self.place), self._compiled()
        kept = {part: getattr(place, part) for part in PARTS}
        try:
            for part in PARTS:
                setattr(place, part, getattr(broken, part))
            _forget(place)
            yield
        finally:
            for part, value in kept.items():
                setattr(place, part, value)
            _forget(place)

    def _compiled(self) -> FunctionType:
        place = _function(self.place)
        source = textwrap.dedent(inspect.getsource(place))
        if source.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: {place.__qualname__} has {self.old!r} {source.count(self.old)} times, not once; "
                "its source has changed, so adapt the fault"
            )
        flags = __future__.annotations.compiler_flag
        code = compile(source.replace(self.old, self.new), f"<fault: {self.name}>", "exec", flags, dont_inherit=True)
        made: dict[str, Any] = {}
        exec(code, place.__globals__, made)
        return _function(made[place.__name__])


def _forget(place: FunctionType) -> None:
    """Drop what was made by the code as it was: the optimizers and programs that drivers keep, and what catchers of
    the core alone saw, unless the place is in an adapter, whose code they do not run."""
    for kept in (torch_class, jax_alias, jax_optimizer, jax_derivatives):
        kept.cache_clear()
    if place.__module__.split(".")[0] == "psgd":
        for seen in (_noise_differs, _golden_differs):
            seen.cache_clear()


def _function(place: Any) -> FunctionType:
    """The plain function; of a bound or static method too."""
    function = getattr(place, "__func__", place)
    if not isinstance(function, FunctionType):
        raise TypeError(f"{place!r} has no source to plant a fault in; name a function")
    return function


# ---- the table -----------------------------------------------------------------------------
FAULTS: tuple[Fault, ...] = (
    # the core
    Fault("one shift of the noise is off by one", noise.mix, "shifted(x, 15)", "shifted(x, 14)", NOISE),
    Fault("noise forgets the step", noise.key, "t * GOLDEN", "0 * t", NOISE),
    Fault("noise forgets the step on the host", noise.host_key, "step * GOLDEN", "0 * step", NOISE),
    Fault("noise forgets its role", noise.words, "(step_key ^ role)", "step_key", NOISE),
    Fault("factor transposed", axes.along, "matmul(x, q.mT)", "matmul(x, q)", GOLDEN),
    Fault("Gram product without conjugate", structured.gram_of_rows, "adjoint(x[lo:, :])", "x[lo:, :].mT", GOLDEN),
    Fault("inverse of half the factor", axes.along_inverse_adjoint, "by_inverse(rows,", "by_inverse(2 * rows,", GOLDEN),
    Fault("wrong triangle", structured.triangle_by_triangle, "matmul(xp.triu(a)", "matmul(xp.tril(a)", GOLDEN),
    Fault("half step taken whole", geometry.two_sided_half, "m / 2", "m", GOLDEN),
    Fault("moved from one side", geometry.two_sided, "-m, matmul", "0 * m, matmul", GOLDEN),
    Fault("wrong order of a rotation", rotate.procrustes2, "a / 2", "a", GOLDEN),
    Fault("rotation may go twice as far", rotate.procrustes2, "= 1 / 8", "= 1 / 4", GOLDEN),
    Fault("balance turned round", rotate.balanced, "xp.exp(mean - r)", "xp.exp(r - mean)", GOLDEN),
    Fault("balance every 99 steps", QuadTorch.schedule, "periodic(100)", "periodic(99)", GOLDEN),
    Fault(
        "epsilon outside the bracket", criterion.relative, "(x, amount / unit, e)", "(x, amount * eps(x), e)", GOLDEN
    ),
    Fault("epsilon a millionth", spectral.norm_bound, "scale + small", "scale + 1e-6", GOLDEN),
    Fault("norm bound with one product less", spectral.norm_bound, "products - 1", "products - 2", GOLDEN),
    Fault("a thin difference is a sum", thin.Thin.__sub__, "-other.left", "other.left", GOLDEN),
    Fault("a thin triangle is summed from above", thin.triangle_from_left, "xp.triu", "xp.tril", GOLDEN),
    Fault("expectation of the wrong size", geometry.others, "if i != axis", "if i == axis", GOLDEN),
    Fault("inverse weighed by itself", geometry.inverse_gram, "if i == axis else", "if i != axis else", GOLDEN),
    Fault("probe where none is needed", geometry.mean_dear, "len(dense) > 1", "len(dense) > 0", GOLDEN),
    Fault("P formed transposed", structured.gram_of_triangle, "adjoint(q[:hi, lo:hi])", "q[:hi, lo:hi]", GOLDEN),
    Fault(
        "norm of a triangle from its rows alone", spectral.general_bound, "max(columns) >", "max(columns) < -", GOLDEN
    ),
    Fault("residual not cut to a triangle", kron.by_triangle, "xp.triu(d)", "d", GOLDEN),
    Fault("longest axis stays dense", kron.DenseRule.__call__, "i != longest and", "True and", GOLDEN),
    Fault("axes in their own order", shapes.matrix_order, "_most_square(tuple(shape))[0]", "in_order(shape)", GOLDEN),
    Fault("fits a step too soon", schedule.evenly, "info.since *", "(info.since + 1) *", GOLDEN),
    Fault("fits early, turned round", schedule.early, "<= steps", "> steps", GOLDEN),
    Fault("average not corrected", schedule.corrected, "1 / (1 - beta**t)", "1.0", GOLDEN),
    Fault("low rank moved from the other side", lra.LRA._directions, "x + matvec(v, wx)", "x", GOLDEN),
    Fault("low rank: M forgotten", lra.LRA._directions, "dot(m, wx)", "wx", GOLDEN),
    Fault("low rank kept alike by half", lra.aligned, "e + e2", "e - e2", GOLDEN),
    Fault("X: middle moves", xmat.XShaped._steps, "a.shape[0] % 2", "False", GOLDEN),
    Fault("X: not transposed", xmat.XShaped.precondition, "flipped(b * y)", "b * flipped(y)", GOLDEN),
    Fault("probes add nothing to the scale", InitialScale._boost, "** 0.5", "** 0.0", GOLDEN),
    Fault("Newton's v whitened", pipeline.fit, "pair[0]", "pair[1]", GOLDEN),
    Fault("whole step twice as long", max_norm_factor, "limit / xp", "2 * limit / xp", GOLDEN),
    Fault("bound decays without maximum", kron.fit, "* ell, ell)", "* ell, 0 * ell)", GOLDEN),
    Fault("scale of P not squared", kron.rescaled, "2 if geometry", "1 if geometry", GOLDEN),
    Fault("long axes stay dense", kron.DenseRule.__call__, "<= limit", "<= limit + 40", GOLDEN),
    Fault("rate falls below its floor", schedule.inverse_root, "xp.maximum(", "xp.minimum(", GOLDEN),
    Fault("shape merged at the last tie", shapes.merge, "range(1, len(shape))", "range(len(shape) - 1, 0, -1)", GOLDEN),
    Fault("average off by one step", schedule.capped_average, "(t - 1) / t", "t / (t + 1)", GOLDEN),
    Fault("average starts at zero", schedule.from_first, "t > 1", "t > 0", GOLDEN),
    Fault("momentum of the wrong sign", pipeline.average, "1 - past, g", "past - 1, g", GOLDEN),
    Fault("first scale by the smallest tensor", InitialScale.__call__, "xp.max(xp", "xp.min(xp", GOLDEN),
    Fault("clipped at 1.0", QuadTorch.recipe, "rms=1.1", "rms=1.0", GOLDEN),
    Fault("old factors precondition", pipeline.step, "new if recipe.fit", "new if not recipe.fit", GOLDEN),
    Fault(
        "direction decays",
        pipeline.displacement,
        "number(weight_decay, u), cast(p, u.dtype)",
        "number(weight_decay, u), u",
        GOLDEN,
    ),
    # one adapter
    Fault(
        "torch: noise of the next step",
        PerTensor.__call__,
        "job.plan_at(age, since)",
        "job.plan_at(age + 1, since)._replace(fit=True)",
        LOCKED,
    ),
    Fault("torch: decay forgotten", PerTensor._batch, "rates(group)", '[group["lr"], 0.0]', LOCKED),
    Fault(
        "torch: change of another tensor",
        PerTensor._batch,
        "change.unbind()",
        "change.unbind()[::-1]",
        LOCKED,
    ),
    Fault("torch: state of another tensor", _state.write, "unbind_copy(source,", "unbind_copy(source.flip(0),", LOCKED),
    Fault(
        "torch: a scale for each",
        _scale,
        "scales(recipe, job.schedule, sizes,",
        "scales(recipe, job.schedule, sizes[:1] * len(sizes),",
        LOCKED,
    ),
    Fault(
        "momentum of another parameter",
        joint.split_state,
        "split(state.momentum, shapes)",
        "[0 * m for m in split(state.momentum, shapes)]",
        LOCKED,
    ),
    Fault("torch: order of the group", _joint._members, "_by_part(named[0])", "0", LOCKED),
    Fault(
        "torch: never counts on",
        _state.count_step,
        'fill_(0 if fit else int(entry["since"]) + 1)',
        "fill_(0)",
        LOCKED,
    ),
    Fault(
        "torch: gradient of another layer",
        PerTensor._step,
        "gradients = [gradient_of(p)",
        "gradients = [gradient_of(p).flip(0)",
        LOCKED,
    ),
    Fault(
        "jax: noise of another step",
        jax_per_tensor.Stepper._one,
        "self.plan, g",
        "self.plan._replace(key=self.plan.key - 1), g",
        LOCKED,
    ),
    Fault("jax: step not counted", Scaling._step, "safe_increment(state.count)", "safe_increment(0)", LOCKED),
    Fault("jax: result of another leaf", jax_per_tensor.Stepper._parts, "places[:n]", "places[:n][::-1]", LOCKED),
    Fault("jax: probe and product swapped", transform._pair, "in (vector, hvp)", "in (hvp, vector)", LOCKED),
    Fault("jax: never counts on", Scaling._step, "optax.safe_increment(state.since)", "state.since", LOCKED),
    Fault("jax: a stack ascends", jax_per_tensor.Stepper._layers, "apart(g), State", "apart(-g), State", LOCKED),
    Fault(
        "jax: a scale for each",
        jax_per_tensor.Stepper.started,
        "scales, known = scales_of(self._sizes(gradients, scanned)",
        "scales, known = scales_of(self._sizes(gradients, scanned)[:1] * len(there)",
        LOCKED,
    ),
    Fault("jax: scaled at every step", Scaling._step, "first & go", "go", LOCKED),
    Fault("jax: ascends", named_function, "scale_by_learning_rate(learning_rate)", "scale(learning_rate)", LOCKED),
)


# ---- the catchers --------------------------------------------------------------------------
KNOWN_WORDS = (
    # (seed, step, role, first words)
    (0, 1, "damping", (999448133, -763036171, 214457285, -1272501743)),
    (4294967295, 1000000, "bound/1", (-232965903, 1818904196, 2073269657, 1543208181)),
)


@cache
def _noise_differs() -> str | None:
    """Recorded words of the noise."""
    for seed, step, role, expected in KNOWN_WORDS:
        got = noise.words(noise.key(np, seed, step), noise.role_number(role), len(expected))
        if got.tolist() != list(expected):
            return f"words of {role!r}, seed {seed}, step {step}"
        if noise.host_key(seed, step) != noise.key(np, seed, step)[0]:
            return f"key on the host, seed {seed}, step {step}"
    return None


@cache
def _cases() -> tuple[golden.Case, ...]:
    """Recorded runs, the shortest first."""
    return tuple(sorted(golden.cases(FOLDER), key=lambda case: (FOLDER / case["file"]).stat().st_size))


@cache
def _golden_differs() -> str | None:
    """Recorded runs, in NumPy."""
    for case in _cases():
        try:
            result = golden.replay(case, FOLDER, FRAMEWORKS["numpy"])
        except (ValueError, IndexError) as error:  # other shapes, more draws than were recorded
            return f"{case['file'].removesuffix('.npz')}: {error}"
        if not result.passed:
            return f"{result.case}, {result.where} off by {result.error:.0e}"
    return None


def _tiny_init(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes_of = {"bias": (3,), "b": (3, 3), "a": (3, 3), "stack": (2, 3, 3)}
    # Small, so that the hyperbolic tangents stay away from their ends, where gradients are differences of ones.
    return {name: random.standard_normal(shape) / 8 for name, shape in shapes_of.items()}


def _tiny_batch(seed: int, step: int) -> dict[str, np.ndarray]:
    # The gradients of the second tensor are larger, so that the first tensor does not set the first scale.
    return {"weight": np.random.default_rng([seed, step]).standard_normal(3) * 3}


def _tiny_loss(params: Any, batch: Any) -> Any:
    xp = namespace(params["a"])
    rows = xp.tanh(params["a"]) @ batch["weight"] + params["b"] @ (batch["weight"] ** 2)
    for layer in range(2):
        rows = xp.tanh(params["stack"][layer, ...] @ rows)
    return xp.sum((rows + params["bias"]) ** 2)


TINY = Problem(
    name="tiny",
    summary="Two matrices of one shape, which step together, a vector, and a stack of two matrices.",
    init=_tiny_init,
    batch=_tiny_batch,
    loss=_tiny_loss,
    lr=0.01,
    chaotic=True,
    scanned=frozenset(["stack"]),
)
OFTEN = {"preconditioner_update_probability": 0.5}  # of methods that have it: some steps fit, some do not


def _locked_differs() -> str | None:
    """Steps of each method in both adapters and in the core alone, each from the reference's state."""
    with patch.dict(PROBLEMS, {TINY.name: TINY}):
        # JAX operation by operation: a compiled step would have to be compiled again for each fault.
        for drivers in (("torch", "numpy"), ("torch", "jax-eager")):
            for method in METHODS:
                known = {f.name for f in fields(METHODS[method])}
                often: dict[str, Any] = {name: value for name, value in OFTEN.items() if name in known}
                (pair,) = compare(method, TINY.name, steps=4, locked=True, drivers=drivers, **often).pairs
                if not pair.passed:
                    return f"{method}, {pair.a} and {pair.b} apart at step {pair.first_step_over}"
    return None


CATCHERS: dict[str, Callable[[], str | None]] = {
    NOISE: _noise_differs,
    GOLDEN: _golden_differs,
    LOCKED: _locked_differs,
}


def caught() -> tuple[str, str] | None:
    """The first catcher that notices anything, and what it noticed; None where all is well."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # broken code overflows
        for kind, catcher in CATCHERS.items():
            noticed = catcher()
            if noticed is not None:
                return kind, noticed
    return None


def table(results: Mapping[str, tuple[str, str] | None]) -> Table:
    """Faults by name, and what caught each."""
    made = Table("fault", "caught by", "what it noticed", title="Seeded faults")
    for name, notice in results.items():
        made.add_row(name, *(notice or ("nothing", "")))
    return made


def main() -> int:
    """Plant every fault and print what caught it; 1 if one went unnoticed."""
    console = Console()
    results = {}
    for fault in track(FAULTS, "Planting faults", console=console, transient=True):
        with fault.planted():
            results[fault.name] = caught()
    console.print(table(results))
    return int(None in results.values())


if __name__ == "__main__":
    raise SystemExit(main())
