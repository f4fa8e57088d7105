"""Nothing is caught where nothing is wrong, and every planted fault is caught. `-s` shows the table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from conformance.internal import planting
from conformance.internal.faults import FAULTS, table
from conformance.internal.planting import CATCHERS, GOLDEN, LOCKED, NOISE, Fault, caught
from psgd import axes, rotate

ROOT = Path(__file__).resolve().parents[2]

# What JAX compiles for one, operation by operation, serves the other.
catching = pytest.mark.xdist_group("faults")


@catching
def test_nothing_is_caught_where_nothing_is_wrong():
    assert caught() is None


@catching
def test_every_fault_is_caught_and_by_whom():
    results = {}
    for fault in FAULTS:
        with fault.planted():
            results[fault.name] = caught()
    Console(width=160).print(table(results))
    assert {name for name, notice in results.items() if notice is None} == set()
    assert {name: notice[0] for name, notice in results.items()} == {fault.name: fault.catcher for fault in FAULTS}


def test_catchers_of_the_core_run_no_adapter():
    """So that a fault in an adapter leaves them what they saw."""
    program = """if True:
        import sys
        from pathlib import Path
        from conformance.internal import golden
        from conformance.frameworks import FRAMEWORKS
        folder = Path(sys.argv[1])
        assert all(golden.replay(case, folder, FRAMEWORKS["numpy"]).passed for case in golden.cases(folder))
        assert not {"psgd_torch_backend", "psgd_jax_backend"} & sys.modules.keys()
    """
    done = subprocess.run([sys.executable, "-c", program, planting.FOLDER], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_faults_are_many_and_in_every_part():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 12
    assert {fault.catcher for fault in FAULTS} == set(CATCHERS) == {NOISE, GOLDEN, LOCKED}
    assert {fault.place.__module__.split(".")[0] for fault in FAULTS if fault.catcher != LOCKED} == {"psgd"}
    assert {fault.place.__module__.split(".")[0] for fault in FAULTS if fault.catcher == LOCKED} == {
        "psgd_torch_backend",
        "psgd_jax_backend",
    }


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_gone_after_its_block(fault):
    def parts():
        return [getattr(planting._function(fault.place), part) for part in planting.PARTS]

    before = parts()
    with fault.planted():
        assert parts() != before
    assert parts() == before
    with pytest.raises(RuntimeError, match="inside"), fault.planted():
        raise RuntimeError("inside")
    assert parts() == before


@pytest.mark.parametrize("old", ["not in the source", "q"])
def test_a_fault_that_no_longer_fits_says_so(old):
    fault = Fault("stale", axes.along, old, "x", GOLDEN)
    with pytest.raises(ValueError, match="adapt the fault"), fault.planted():
        raise AssertionError("planted nevertheless")


def test_a_default_is_changed_too():
    assert rotate.procrustes2.__defaults__ == (1 / 8,)
    with Fault("default", rotate.procrustes2, "= 1 / 8", "= 1 / 2", GOLDEN).planted():
        assert rotate.procrustes2.__defaults__ == (1 / 2,)
    assert rotate.procrustes2.__defaults__ == (1 / 8,)


def test_only_functions_can_be_broken():
    with pytest.raises(TypeError, match="name a function"), Fault("type", int, "a", "b", GOLDEN).planted():
        raise AssertionError("planted nevertheless")
