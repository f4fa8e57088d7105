"""What tests of several modules share: the command in this process, and a comparison that nothing ran for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from typer.testing import CliRunner, Result

from conformance.compare import KINDS, Comparison, Pair
from conformance.problems import PROBLEMS
from conformance.tolerances import ENVELOPE, LOCKED
from psgd.methods import METHODS

METHOD = next(iter(METHODS))
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RECORDED = ROOT / "conformance/internal/golden"
QUICK = ["compare", "--method", METHOD, "--problem", "least-squares", "--steps", "2", "--drivers", "torch,numpy"]
STEPS = 6  # of an invented comparison


def psgd(*arguments: object) -> Result:
    """Run the command."""
    from conformance.cli import app

    return CliRunner().invoke(app, [str(a) for a in arguments])


def comparison(method: str, *, locked: bool = False, far: float = 1e-15) -> Comparison:
    """A comparison of two invented drivers that are `far` apart at every step."""
    problem = PROBLEMS["mlp-digits"]
    envelope = None if locked else np.full(STEPS, 1e-14)
    bound = LOCKED["float64"] if locked else ENVELOPE
    pair = Pair("<one>", "two", bound.per_step(STEPS, envelope), KINDS if locked else ("params",))
    pair.curves = {kind: [far] * STEPS for kind in KINDS}
    pair.worst = {kind: (STEPS, "w1/Q/0") for kind in KINDS}
    losses = {"<one>": list(np.linspace(2, 1, STEPS)), "two": list(np.linspace(2, 1, STEPS))}
    last = {name: problem.init(0) for name in losses}
    mode = "locked" if locked else "free"
    return Comparison(method, problem.name, STEPS, "float64", 0, mode, bound, [pair], losses, last, envelope)
