"""Long runs are looked at as they should be: what is planted in one is found, and a run without it passes."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf, nan

import numpy as np
import pytest
import torch

from conformance.internal import soak, soak_runs
from conformance.internal.soak import CHECKPOINTS, checkpoint, complaints, results
from conformance.internal.soak_runs import RUNS, JaxRunner, SoakRun, TorchRunner
from psgd.geometry import GEOMETRIES
from psgd.methods import METHODS

RUNNERS = pytest.mark.parametrize("runner", [JaxRunner, TorchRunner], ids=["jax", "torch"])
CHOSEN = ["xmat", "dense_newton"]
QUADRATIC, POOR = (replace(run, steps=3 * CHECKPOINTS) for run in (RUNS[0], RUNS[-1]))


def quick(*flags: str) -> list[str]:
    return ["--quick", *(f"--method={name}" for name in CHOSEN), *flags]


# ---- the program ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("soak") / "soak.json"
    soak.main(quick("--json", str(path)))
    return json.loads(path.read_text())


def test_every_method_walks_everywhere_in_both_frameworks(result: dict):
    expected = [(f, m, w.name) for f in ("jax", "torch") for m in CHOSEN for w in RUNS]
    assert [(r["framework"], r["method"], r["run"]) for r in result["rows"]] == expected
    for r in result["rows"]:
        assert r["steps"] == (200 if r["run"] == RUNS[0].name else 60)
        steps = [x["step"] for x in r["checkpoints"]]
        assert (
            steps
            == [x["count"] for x in r["checkpoints"]]
            == list(range(steps[0], r["steps"] + 1, r["steps"] // CHECKPOINTS))
        )
        assert not r["complaints"] and all(0 < x["norm"] < r["limit"] for x in r["checkpoints"])
        assert all((x["loss"] is None) == (r["run"] != RUNS[0].name) for x in r["checkpoints"])


def test_both_frameworks_are_given_the_same(result: dict):
    """So that they see the same; in float32, and a few steps only."""
    norms = {
        f: [x["norm"] for r in result["rows"] if r["framework"] == f for x in r["checkpoints"]] for f in soak.RUNNERS
    }
    assert norms["jax"] == pytest.approx(norms["torch"], rel=1e-2)


def test_the_loss_falls(result: dict):
    for r in result["rows"]:
        if r["run"] == RUNS[0].name:
            assert r["checkpoints"][-1]["loss"] < 0.5 * RUNS[0].loss(np.zeros((2, 2)))


@pytest.mark.parametrize("flags", [[], ["--markdown"]])
def test_a_table_is_printed_and_failure_is_told(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fine, failed = ([made(run.steps, run) for run in RUNS] for made in (row, lost))
    monkeypatch.setattr(soak, "results", lambda runner, name, runs: iter(fine if name == "xmat" else failed))
    soak.main(["--method=xmat", "--framework=jax", *flags])
    lines = capsys.readouterr().out.splitlines()
    assert sum("xmat" in line and "1,000,000" in line and "pass" in line for line in lines) == 1
    assert sum("xmat" in line and "20,000" in line and "pass" in line for line in lines) == 3
    with pytest.raises(SystemExit) as exit:
        soak.main(["--method=kron", "--framework=jax", *flags])
    assert exit.value.code == 1
    assert "FAIL" in (out := capsys.readouterr().out) and "7 steps skipped" in out and "pass" not in out


def test_the_registry_is_walked_by_jax_and_its_first_method_by_pytorch(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def noted(runner, name, runs):
        seen.append((runner.framework.name, name, [run.steps for run in runs]))
        return iter([row(runs[0].steps, runs[0])])

    monkeypatch.setattr(soak, "results", noted)
    soak.main(["--torch-steps=500"])
    assert seen == [
        *(("jax", name, [1_000_000, 20_000, 20_000, 20_000]) for name in METHODS),
        ("torch", next(iter(METHODS)), [500, 20_000, 20_000, 20_000]),
    ]


# ---- what is planted --------------------------------------------------------------------------
def sound(steps: int) -> list[soak.Checkpoint]:
    """A run in which all is well."""
    each = steps // CHECKPOINTS
    return [soak.Checkpoint((i + 1) * each, (i + 1) * each, 0, [], ["float32"], 2.0, 0.01) for i in range(CHECKPOINTS)]


def row(steps: int, run: SoakRun) -> soak.SoakResult:
    return soak.SoakResult("jax", "xmat", run.name, steps, 10.0, 0.0, [], sound(steps))


def lost(steps: int, run: SoakRun) -> soak.SoakResult:
    return replace(row(steps, run), complaints=["7 steps skipped at step 8"])


PLANTED = {
    "not finite": {"bad": ["w/Q/0"]},
    "SolverError: singular": {"raised": "SolverError: singular"},
    "14999 steps counted": {"count": 14_999},
    "1 steps skipped": {"skipped": 1},
    "other dtypes": {"dtypes": ["float64"]},
    "above 10": {"norm": 10.1},
    "is nan": {"norm": nan},
    "is inf": {"norm": inf},
    "f is 0.2": {"loss": 0.2},
    "f is nan": {"loss": nan},
    "grew 3 times": {"norm": 6.0},
}


@pytest.mark.parametrize(("said", "changes"), PLANTED.items(), ids=PLANTED)
def test_each_fault_of_a_single_look_is_found(said: str, changes: dict):
    run = sound(20_000)
    assert not complaints(run, 10.0)
    run[14] = replace(run[14], **changes)
    assert any(said in words and ("at step 15000" in words or "grew" in words) for words in complaints(run, 10.0))


def test_a_start_is_not_judged_by_its_loss_nor_by_its_growth():
    run = [replace(x, norm=2.0**i, loss=1.0) for i, x in enumerate(sound(400))]
    assert not complaints(run, inf)


@RUNNERS
def test_a_planted_nan_fails(runner: type):
    """It is skipped, which a run without one never does."""

    def draw(random: np.random.Generator, n: int) -> np.ndarray:
        noise = QUADRATIC.draw(random, n)
        noise[0, 0, 0] = nan
        return noise

    fine, failed = results(runner, "xmat", [QUADRATIC]), results(runner, "xmat", [replace(QUADRATIC, draw=draw)])
    assert not next(fine).complaints
    assert next(failed).complaints == ["2 steps counted at step 3", "1 steps skipped at step 3"]


def test_what_is_raised_ends_a_run_and_fails():
    """PyTorch raises after so many skipped steps in a row, at the very first look."""
    run = replace(QUADRATIC, steps=20 * CHECKPOINTS, draw=lambda random, n: np.full((n, 2, 2), nan, np.float32))
    (failed,) = results(TorchRunner, "xmat", [run])
    assert len(failed.checkpoints) == 1
    assert failed.complaints[0].startswith("FloatingPointError: XMat: 10 steps in a row")
    assert failed.complaints[0].endswith("at step 20") and "0 steps counted at step 20" in failed.complaints
    assert "FloatingPointError" in soak.markdown([failed])


@pytest.mark.parametrize("place", ["parameter", "momentum", "Q", "L"])
def test_a_nan_in_what_is_held_is_seen(place: str):
    driver = TorchRunner(soak.settings(METHODS["quad"]), POOR.problem(), POOR.start(), "float32")
    driver.run(POOR, POOR.drawn(0, 2))
    assert not checkpoint(driver, POOR, 2).bad
    (p,) = driver.tensors.values()
    state = driver.optimizer.state[p]
    held = {"parameter": p.detach(), "momentum": state["momentum"], "Q": state["Q"]["1"], "L": state["L"]["1"]}
    held[place].view(-1)[-1] = nan
    expected = {"parameter": "w", "momentum": "w/momentum", "Q": "w/Q/1", "L": "w/L/1"}
    seen = checkpoint(driver, POOR, 2)
    assert seen.bad == [expected[place]] and (place == "Q") == np.isnan(seen.norm)


@RUNNERS
def test_dtypes_of_parameter_and_state_are_seen(runner: type):
    driver = runner(
        replace(soak.settings(METHODS["xmat"]), mu_dtype="bfloat16"), POOR.problem(), POOR.start(), "float32"
    )
    driver.run(POOR, POOR.drawn(0, 1))
    seen = {name.removeprefix("torch.") for name in driver.dtypes()}
    assert {"float32", "bfloat16"} <= seen


@RUNNERS
def test_an_unbounded_factor_fails(runner: type, monkeypatch: pytest.MonkeyPatch):
    def grown(q, d, m):
        return 1.5 * q

    monkeypatch.setitem(GEOMETRIES, "EQ", replace(GEOMETRIES["EQ"], move=grown))
    (failed,) = results(runner, "kron", [POOR])
    assert any("‖Q‖ is" in words for words in failed.complaints)


def test_the_norm_is_that_of_the_kronecker_product():
    random = np.random.default_rng(0)
    state = {"w/Q/0": random.standard_normal((3, 3)), "w/Q/1": random.standard_normal((2, 2)), "w/L/0": np.array(1e9)}
    q = np.kron(state["w/Q/0"], state["w/Q/1"])
    assert soak.norm_of_q(state, whole=False) == pytest.approx(np.linalg.norm(q))
    assert np.isnan(soak.norm_of_q(state | {"w/Q/2": np.array([nan])}, whole=True))
    assert soak.norm_of_q(state, whole=True) == max(np.linalg.norm(state[f"w/Q/{i}"]) for i in (0, 1))


# ---- what is walked on ------------------------------------------------------------------------
def test_gradient_and_product_are_those_of_the_loss():
    """By PyTorch's derivatives of |A (W - W*) B|^2 / 2."""
    run = RUNS[0]
    known = {name: torch.from_numpy(x) for name, x in soak_runs.QUADRATIC.items()}
    a, b = torch.linalg.cholesky(known["left"]).mT, torch.linalg.cholesky(known["right"])
    w, v = torch.randn(2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(w: torch.Tensor) -> torch.Tensor:
        return ((a @ (w - known["optimum"]) @ b) ** 2).sum() / 2

    g, pair = soak_runs.gradient_and_pair(True, w, torch.zeros_like(w), v, known)
    torch.testing.assert_close(g["w"], torch.func.grad(loss)(w))
    torch.testing.assert_close(pair["w"], (v, torch.func.jvp(torch.func.grad(loss), (w,), (v,))[1]))
    assert run.loss(w.numpy()) == pytest.approx(float(loss(w)))


@pytest.mark.parametrize(("run", "filled"), [*zip(RUNS[1:], (24, 24, 4), strict=True)], ids=[w.name for w in RUNS[1:]])
def test_poor_gradients_are_poor(run: SoakRun, filled: int):
    gradients = run.drawn(0, 50)["g"]
    assert set(np.linalg.matrix_rank(gradients)) == {1}
    assert {np.count_nonzero(g) for g in gradients} == {filled}
    if run.name == "sparse":
        assert {int(np.flatnonzero(g.any(axis=1))[0]) for g in gradients} == set(range(6))
