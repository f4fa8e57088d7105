"""All take turns in processes of their own; who cannot run says why."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import peers, racing
from benchmarks.peers import PEERS, ROOT, SCALE, Entrant
from benchmarks.racing import CannotRun, Field, Worker, field_of
from benchmarks.sets import ParameterSet

SET = ParameterSet("one", ((2,),), "", pool=1)


class Fake:
    """A contender whose seconds are known, who leaves at some turn."""

    def __init__(self, name, seconds, order, leaves=()):
        self.name, self.seconds, self.order, self.leaves, self.closed = name, iter(seconds), order, leaves, False

    def laps(self, steps=1):
        self.order.append(f"{self.name}{steps}")
        if len(self.order) in self.leaves:
            raise CannotRun("too slow")
        return [next(self.seconds) for _ in range(steps)]

    def close(self):
        self.closed = True


@pytest.fixture
def field(tmp_path):
    return Field(SET, tmp_path)


@pytest.fixture
def worker():
    made = Worker(sys.executable)
    yield made
    made.close()


def test_all_take_turns_in_changing_order(field):
    order = []
    field.workers = {name: Fake(name, [0.02, 0.02, *seconds], order) for name, seconds in SECONDS.items()}
    field.workers["b"].seconds = iter(SECONDS["b"])
    seen = field.race(3)
    assert "".join(order) == "a2" + "a2b2" + "b2a2" + "a2b2"
    np.testing.assert_array_equal(seen["a"], [2, 6, 10])  # medians of two steps
    np.testing.assert_array_equal(seen["b"], [2, 4, 6])


SECONDS = {"a": [1, 3, 5, 7, 9, 11], "b": [2, 2, 4, 4, 6, 6]}


@pytest.mark.parametrize(("seconds", "steps"), [(1.0, 1), (0.02, 2), (1e-5, 8)])
def test_a_turn_has_as_many_steps_as_keep_the_first_contender_busy(field, seconds, steps):
    order = []
    field.workers = {"a": Fake("a", [seconds] * 99, order)}
    field.race(1)
    assert order == ["a2", f"a{steps}"]


def test_who_leaves_the_race_is_not_waited_for(field):
    order = []
    fakes = {name: Fake(name, [1.0] * 9, order, leaves=(4,)) for name in "abc"}
    field.workers = dict(fakes)
    seen = field.race(2)
    assert list(seen) == ["a", "b"] or list(seen) == ["a", "c"]
    (left,) = field.failures
    assert fakes[left].closed and field.failures == {left: "too slow"}
    assert all(len(x) == 2 for x in seen.values())


def test_a_worker_answers_by_json_and_needs_no_framework(worker):
    assert worker.ask("release", module="numpy.linalg") == f"numpy {np.__version__}"
    with pytest.raises(CannotRun, match="ValueError: nobody can fly"):
        worker.ask("fly")
    assert worker.ask("release", module="no_such") == "no-such"
    if hasattr(os, "sched_getaffinity"):
        assert os.sched_getaffinity(worker.process.pid) == {racing.one_core()}


def test_a_process_that_ends_says_so(worker):
    worker.process.kill()
    worker.process.wait()  # so that nobody reads what is asked
    for _ in range(2):
        with pytest.raises(CannotRun, match="its process ended with code -9"):
            worker.ask("release", module="numpy")
    for _ in range(2):
        worker.close()
    assert worker.process.stdin.closed and worker.process.stdout.closed


def test_a_process_that_ends_on_a_question_says_so(tmp_path):
    with pytest.raises(CannotRun, match="its process ended with code 3"):
        start_with_torch(tmp_path, "import os\nos._exit(3)\n")


def test_a_field_notes_who_cannot_start_and_ends_all_processes():
    with field_of(SET) as field:
        spec = {"kind": "optimizer", "framework": "torch", "place": "x:y"}
        field.enter("absent", Entrant("x:y", home=".venv-nobody"), spec)
        field.enter("broken", Entrant("x:y"), {"kind": "optimizer", "framework": "cobol"})
        assert field.failures == {
            "absent": ".venv-nobody is missing; `make peers` makes it",
            "broken": "KeyError: 'cobol'",
        }
        assert field.ask("absent", "bytes") is None and not field.workers
        field.workers["a"] = fake = Fake("a", [], [])
    assert fake.closed and not field.gradients.exists()


def test_what_an_optimizer_prints_is_no_answer(tmp_path):
    with pytest.raises(CannotRun, match=r"^ImportError: nobody \| home$"):
        start_with_torch(tmp_path, "print('hello')\nraise ImportError('nobody | home')\n")


def start_with_torch(folder, program):
    """Start a contender whose PyTorch is a program of a line or two."""
    (folder / "torch.py").write_text(program)
    worker = Worker(sys.executable, [str(folder)])
    try:
        worker.ask("start", kind="products", framework="torch")
    finally:
        worker.close()


def test_a_package_of_another_environment_needs_its_folder():
    with pytest.raises(CannotRun, match=r"^\.venv-no is missing"):
        Worker(sys.executable, [str(ROOT / ".venv-no")])


# ---- who races --------------------------------------------------------------------------------
def everyone():
    return [*(x for own in PEERS.values() for x in own), *(x for own in SCALE.values() for x in own)]


def test_ours_are_first_and_alone_of_this_project():
    for own in PEERS.values():
        assert [x.ours for x in own] == [True] + [False] * (len(own) - 1)
    assert {x.home for x in everyone() if x.ours or x.scale} == {peers.OURS_HOME}
    assert {x.home for x in everyone() if not (x.ours or x.scale)} == {peers.TORCH_HOME, peers.JAX_HOME}


def test_no_two_beside_each_other_have_one_name(monkeypatch):
    monkeypatch.setattr(racing, "_release", lambda python, path, module: f"{module} {len(path)}")
    for (framework, _), own in PEERS.items():
        names = racing.versioned([*own, *SCALE[framework]])
        assert len(set(names.values())) == len(own) + len(SCALE[framework])
        assert names[own[0]].startswith("ours, ")


def test_what_is_asked_for_is_set():
    ours, *others = PEERS["torch", "kron"]
    plain = ours.spec("torch", compiled=False, dtype="float32", probability=0.25)
    assert plain["settings"] == {
        **peers.COMMON["torch"],
        "b1": 0.9,
        "max_size_triangular": peers.LONGEST,
        "preconditioner_update_probability": 0.25,
    }
    compiled = ours.spec("torch", compiled=True, dtype="bfloat16", probability=1.0)
    assert compiled["settings"]["compile"] is True and compiled["settings"]["precond_dtype"] == "float32"
    assert all(
        0.25 in x.spec("torch", compiled=False, dtype="float32", probability=0.25)["settings"].values() for x in others
    )
    adamw = SCALE["torch"][0]
    wrapped = [adamw.spec("torch", compiled=c, dtype="float32", probability=1.0)["wrapped"] for c in (False, True)]
    assert wrapped == [False, True]
    assert all(json.dumps(x.spec("jax", compiled=True, dtype="bfloat16", probability=1.0)) for x in everyone())


def test_every_environment_is_made_by_the_makefile():
    text = (Path(ROOT) / "Makefile").read_text()
    for name in (peers.TORCH_HOME, peers.JAX_HOME, peers.LATEST_QUAD):
        assert f"\n{name}/.stamp:" in text
