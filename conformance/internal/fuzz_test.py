"""No gradient spoils a run: hostile streams over all methods, in both frameworks, and a start that waits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import cycle

import numpy as np
import pytest
import torch

import psgd_torch_backend
from conformance.drivers import Driver, JaxEager, NumpyOracle, TorchEager
from conformance.frameworks import double_precision
from conformance.internal import fuzz
from conformance.internal.fuzz import BOUND, STREAMS, FuzzCase, cases, drawn, judged
from conformance.internal.soak import settings
from conformance.internal.soak_runs import SoakRun, normal
from psgd.methods import METHODS

# One method for each kind of stream: there are twice as many kinds, so that each meets two of them, in one dtype.
MEETINGS = [
    pytest.param(stream, name, dtype, marks=pytest.mark.xdist_group(f"fuzz {name}"))
    for stream, name, dtype in zip(STREAMS, cycle(METHODS), cycle(fuzz.DTYPES), strict=False)
]


@pytest.mark.parametrize("framework", fuzz.RUNNERS)
@pytest.mark.parametrize(("stream", "name", "dtype"), MEETINGS)
def test_no_stream_spoils_a_run(framework: str, stream: str, name: str, dtype: str):
    assert not judged(framework, FuzzCase(name), dtype, stream, steps=100).complaints


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.title)
@pytest.mark.parametrize("stream", ["jump by 1e10", "fall by 1e10", "first one 1e4 too small", "1e-37, then 1e37"])
def test_a_jump_moves_no_further_than_a_bound_where_there_is_one(case: FuzzCase, stream: str):
    """After a jump of the gradient AdamW moves by 3 learning rates; what has no bound of its own has an option."""
    found = judged("torch", case, "float32", stream, steps=24)
    assert not found.complaints
    if case.bound:
        assert found.largest <= 1.001 / np.sqrt(np.prod(fuzz.SHAPE))  # a whole step of length 1
    elif case.limit() < np.inf:
        assert found.largest < 2.5 < BOUND


@pytest.mark.parametrize("framework", fuzz.RUNNERS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(f"fuzz {name}")) for name in METHODS]
)
def test_zeros_let_no_preconditioner_grow(framework: str, name: str):
    """They teach nothing: the gradient after them is preconditioned as if they had not been."""
    gradients, vectors = drawn("normal", 100), drawn("constant", 100)
    gradients[1:-1] = 0
    lengths = fuzz.RUNNERS[framework](FuzzCase(name), "float32", gradients, vectors).lengths
    assert lengths[-1] < 5 * lengths[0]


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name]().recipe().newton])
def test_one_flat_step_does_not_ruin_a_newton_method(name: str):
    p = torch.nn.Parameter(torch.zeros(4, 3))
    method = settings(METHODS[name], lr=0.1)
    optimizer = getattr(psgd_torch_backend, method.title)(
        [p], **{f.name: getattr(method, f.name) for f in fields(method)}
    )
    moves = []
    for t in range(60):
        before = p.detach().clone()
        optimizer.step(lambda t=t: (0 * p).sum() if t == 0 else ((p - 1) ** 2).sum())
        moves.append(float((p.detach() - before).abs().max()))
    assert moves[0] == 0 and 0.01 < max(moves) < 1
    assert float(((p.detach() - 1) ** 2).sum()) < 0.1


def test_every_method_without_bounds_has_an_option_that_gives_one():
    free = {c.method for c in cases() if not c.bound and c.limit() == np.inf}
    assert free == {c.method for c in cases() if c.bound}
    assert free == {"kron_newton", "lra_newton", "dense_newton", "affine", "xmat", "low_rank_approximation"}


@pytest.mark.parametrize("name", METHODS)
def test_what_is_planted_is_found(name: str, monkeypatch: pytest.MonkeyPatch):
    directions = fuzz.Directions(np.array([1.0, np.inf, *[1e-9] * (fuzz.STEPS - 2)]), finite=False)
    monkeypatch.setitem(fuzz.RUNNERS, "torch", lambda *_: directions)
    found = judged("torch", FuzzCase(name), "float32", "normal", fuzz.STEPS).complaints
    bounded = FuzzCase(name).limit() < np.inf
    expected = ["a direction is not finite", "state is not finite", "moves by more than 100", "does not move again"]
    assert found == [words for words in expected if bounded or "more than" not in words]


@pytest.mark.parametrize("flags", [[], ["--markdown"]])
def test_a_table_is_printed_and_failure_is_told(
    flags: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
):
    def planted(framework, case, dtype, stream, steps):
        bad = ["state is not finite"] if (dtype, stream) == ("bfloat16", "1e25") else []
        return fuzz.FuzzResult(framework, case.title, dtype, stream, 1.5, 0.5, bad)

    monkeypatch.setattr(fuzz, "judged", planted)
    path = tmp_path / "fuzz.json"
    with pytest.raises(SystemExit) as exit_:
        fuzz.main(["--method", "kron", "--json", str(path), *flags])
    out = capsys.readouterr().out
    assert exit_.value.code == 1 and out.count("kron") == 4
    assert ("FAIL: 1e25: state is not finite" in out) == bool(flags)
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 2 * 2 * len(STREAMS) and sum(bool(r["complaints"]) for r in rows) == 2


def test_streams_are_what_they_are_called():
    assert len(STREAMS) == 2 * len(METHODS)
    for stream in STREAMS:
        g = drawn(stream, 100)
        assert g.shape == (100, *fuzz.SHAPE) and np.array_equal(g, drawn(stream, 100), equal_nan=True)
        assert np.isfinite(g[50:]).all() and 0.5 < g[50:].std() < 1.5
        with np.errstate(over="raise"):
            assert np.isfinite(g.astype(np.float32)).all() or stream == "broken now and then"


# ---- a start that waits -------------------------------------------------------------------------
FLAT = SoakRun("flat", 5, (4, 3), lambda random, n: normal(random, n, 4, 3))


def ran(driver: type[Driver], name: str, flat: int) -> Driver:
    """A driver after so many flat steps, then three others."""
    method = settings(METHODS[name])
    if hasattr(method, "preconditioner_dtype"):
        method = replace(method, preconditioner_dtype=None)  # NumPy has no bfloat16
    run = driver(method, FLAT.problem(), {"w": np.ones((4, 3))}, "float64")
    newton = METHODS[name]().recipe().newton
    for t in range(flat + 3):
        random = np.random.default_rng(max(t - flat, 0))
        g, v = (random.standard_normal((4, 3)) for _ in range(2))
        g = 0 * g if t < flat else g
        run.step({"w": g}, {"w": (v, g)} if newton else None)
    return run


@pytest.mark.parametrize("name", METHODS)
def test_flat_steps_at_the_start_teach_nothing_in_any_framework(name: str):
    """The scale waits for the first signal, and all agree on what happens meanwhile."""
    makers: tuple[type[Driver], ...] = (NumpyOracle, TorchEager, JaxEager)
    with double_precision("jax"):
        first, *others = (ran(maker, name, flat=2) for maker in makers)
    for other in others:
        for mine, theirs in ((first.params(), other.params()), (first.state(), other.state())):
            assert mine.keys() == theirs.keys()
            for key, x in mine.items():
                assert theirs[key] == pytest.approx(x, rel=1e-11, abs=1e-12), key
    straight = ran(NumpyOracle, name, flat=0)
    waits = METHODS[name]().initial_scale() is None
    if waits and not METHODS[name]().recipe().newton:  # as if they had not been
        assert first.params()["w"] == pytest.approx(straight.params()["w"], rel=1e-12)
    step = np.sqrt(np.mean((first.params()["w"] - 1) ** 2)) / settings(METHODS[name]).lr
    assert 0.05 < step < 20
