"""Seeded faults: a suite that never fails proves nothing, so we break the code on purpose and see who notices.

A fault is one row of a table: a function, a piece of its source, and what stands there instead. Planting it
compiles the changed source and gives the function the new code for the time of a `with` block, so that it is changed
wherever it is already held: in a record, in a registry, as a default argument. `caught` then runs the catchers of the
conformance suite in their order and names the first that notices.

`python -m conformance.internal.faults` prints the table of what caught what.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.progress import track
from rich.table import Table

from conformance.internal.planting import (
    GOLDEN,
    LOCKED,
    NOISE,
    Fault,
    caught,
)
from psgd import (
    axes,
    criterion,
    geometry,
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
from psgd.methods.quad_torch import QuadTorch
from psgd.scaling import InitialScale, max_norm_factor
from psgd_jax_backend import _per_tensor as jax_per_tensor
from psgd_jax_backend._checks import check_pair
from psgd_jax_backend.named import named_function
from psgd_jax_backend.transform import Scaling
from psgd_torch_backend import _joint, _state
from psgd_torch_backend._per_tensor import PerTensor, _scale

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
        "torch: momentum of another parameter",
        _joint.Joint.__call__,
        "split_state(new, shapes)",
        "split_state(new._replace(momentum=None if new.momentum is None else 0 * new.momentum), shapes)",
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
    Fault("jax: step not counted", Scaling._plan, "safe_increment(state.count)", "safe_increment(0)", LOCKED),
    Fault("jax: result of another leaf", jax_per_tensor.Stepper._parts, "places[:n]", "places[:n][::-1]", LOCKED),
    Fault("jax: probe and product swapped", check_pair, "in (vector, hvp)", "in (hvp, vector)", LOCKED),
    Fault("jax: never counts on", Scaling._plan, "optax.safe_increment(state.since)", "state.since", LOCKED),
    Fault("jax: a stack ascends", jax_per_tensor.Stepper._layers, "apart(g), State", "apart(-g), State", LOCKED),
    Fault(
        "jax: a scale for each",
        jax_per_tensor.Stepper.started,
        "scales, known = scales_of(self._sizes(gradients, scanned)",
        "scales, known = scales_of(self._sizes(gradients, scanned)[:1] * len(filled)",
        LOCKED,
    ),
    Fault("jax: scaled at every step", Scaling._start, "due & go", "go", LOCKED),
    Fault("jax: ascends", named_function, "scale_by_learning_rate(learning_rate)", "scale(learning_rate)", LOCKED),
)


def table(results: Mapping[str, tuple[str, str] | None]) -> Table:
    """Faults by name, and what caught each."""
    grid = Table("fault", "caught by", "what it noticed", title="Seeded faults")
    for name, notice in results.items():
        grid.add_row(name, *(notice or ("nothing", "")))
    return grid


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
