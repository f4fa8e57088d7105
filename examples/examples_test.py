"""The examples train, and their two frameworks print the same losses while rounding is small."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("examples")  # what they look at is made once

HERE = Path(__file__).parent
EXAMPLES = sorted(path.name for path in HERE.glob("*.py") if not path.name.endswith("_test.py"))


@pytest.fixture(scope="module")
def losses():
    """The printed losses of each example by step."""

    def ran(name):
        command = [sys.executable, "-W", "error", str(HERE / name)]
        # One thread: several would wait for each other where other tests keep the cores busy. And what users compile.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "XLA_FLAGS": ""}
        done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return {int(step): float(loss) for step, loss in re.findall(r"step +(\d+) +loss ([\d.]+)", done.stdout)}

    return {name: ran(name) for name in EXAMPLES}


@pytest.mark.parametrize("name", EXAMPLES)
def test_loss_falls(losses, name):
    first, *_, last = losses[name].values()
    assert last < 0.1 * first


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short(name):
    assert len((HERE / name).read_text().splitlines()) < 40


def test_both_frameworks_begin_alike(losses):
    one, other = losses["torch_digits.py"], losses["jax_digits.py"]
    assert one.keys() == other.keys()
    for step in (1, 50):
        assert one[step] == pytest.approx(other[step], rel=1e-3)
