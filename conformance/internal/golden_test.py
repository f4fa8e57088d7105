"""The recorded runs replay in every namespace, and a replay that should fail does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from conformance.frameworks import FRAMEWORKS
from conformance.internal import golden, golden_cases, golden_optimizers, golden_player
from psgd import rotate
from psgd.geometry import GEOMETRIES

FOLDER = Path(__file__).with_name("golden")
CASES = {case["file"].removesuffix(".npz"): case for case in golden.cases(FOLDER)}
MOST_BYTES = 5_000_000


def arrays(case):
    with np.load(FOLDER / case["file"]) as data:
        return dict(data)


def elements(case):
    return sum(int(np.prod(shape)) for shape in case["shapes"])


def first_of(*fields, where=lambda case: True):
    """Names of the smallest case for each combination of values of some fields."""
    chosen = {}
    for name, case in sorted(CASES.items(), key=lambda item: elements(item[1])):
        if where(case):
            chosen.setdefault(tuple(case.get(f) for f in fields), name)
    return sorted(chosen.values())


def rank(case):
    """The rank of a low-rank case, nothing for 0: such a case has factors without elements."""
    return case["hyperparameters"].get("rank", case["hyperparameters"].get("uvd_rank_of_approximation", 1))


def draws_at_first(case):
    return any(not is_coin(kind) for kind in (case.get("draws") or {}).get("1") or [])


def is_coin(kind):
    return kind.startswith(("rand:", "uniform:"))


def is_matrix(case):
    """Has it two axes, both longer than one? A function whose notes say nothing of shapes counts too."""
    return case["family"] == "primitive" or any(len(s) == 2 and min(s) > 1 for s in case["shapes"])


def is_double(case):
    return case["dtype"] == "float64" and is_matrix(case)


def is_function(case):
    return case["family"].startswith(("kron", "dense"))


# JAX runs operation by operation here, and compiles each operation for each shape: a few shapes, all geometries.
OF_JAX = sorted(
    {
        *first_of("family", "geometry", where=lambda case: is_function(case) and is_double(case)),
        *first_of("dtype", where=is_function),
        *first_of("family", where=is_double),
        *first_of("function", where=lambda case: case["family"] == "primitive"),
    }
)
# One of each family and geometry, in which to plant errors; the primitives keep no state.
WITH_STATE = first_of("family", "geometry", where=lambda case: case["rtol"] < 1e-7 and "state" in case and rank(case))


# ---- what is in the folder -------------------------------------------------------------------
def test_folder_and_index_hold_the_same_files():
    assert {case["file"] for case in CASES.values()} == {path.name for path in FOLDER.glob("*.npz")}


def test_folder_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < MOST_BYTES


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_replayed(name):
    case = CASES[name]
    assert golden.supported(case)
    t = case["steps"]
    with np.load(FOLDER / case["file"]) as data:
        assert any(key.split("/")[1] == str(t) for key in data), "the last step left nothing"
        assert all(data[key].dtype != object for key in data)


def kinds_of_shape(case):
    """The kinds of shape that a tensor shows: its number of axes, and whether one of them has length one."""
    return {(len(shape), 1 in shape) for shape in case["shapes"]}


@pytest.mark.parametrize("family", ["kron_whiten", "kron_newton"])
def test_each_geometry_was_recorded_on_every_kind_of_shape_and_dtype(family):
    seen: dict[str, set] = {}
    for case in CASES.values():
        if case["family"] == family:
            kinds = {(*kind, case["dtype"].rstrip("0123456789")) for kind in kinds_of_shape(case)}
            seen[case["geometry"]] = seen.get(case["geometry"], set()) | kinds
    plain = {(n, False, "float") for n in range(5)} | {(2, True, "float"), (2, False, "complex")}
    assert len(seen) == 7
    assert all(plain <= kinds for kinds in seen.values())


def test_balancing_was_recorded():
    balanced = [
        name
        for name, case in CASES.items()
        if any(
            is_coin(kind) and arrays(case)[f"draw/{t}/{k}"] < 0.01
            for t, kinds in case["draws"].items()
            for k, kind in enumerate(kinds)
        )
    ]
    assert len(balanced) > 20


# ---- replays ---------------------------------------------------------------------------------
def assert_replays(name, framework, folder=FOLDER):
    result = golden.replay(CASES[name], folder, FRAMEWORKS[framework])
    assert result.passed, f"{result.where} is off by {result.error:.1e}, allowed {result.rtol:.1e}"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("framework", ["numpy", "torch", "strict"])
def test_replay(name, framework):
    assert_replays(name, framework)


@pytest.mark.xdist_group("golden in jax")  # JAX compiles each operation once in a process
@pytest.mark.parametrize("name", OF_JAX)
def test_replay_in_jax(name):
    assert_replays(name, "jax")


# ---- replays that must fail ------------------------------------------------------------------
def saved(case, data, folder):
    """A case with other arrays, in a folder of its own."""
    np.savez(folder / case["file"], **data)
    return case


def replayed(case, data, folder):
    return golden.replay(saved(case, data, folder), folder, FRAMEWORKS["numpy"])


def shifted(x, by):
    """x with its last entry off by a fraction of the largest."""
    x = np.array(x)
    x.reshape(-1)[-1] += by * np.max(np.abs(x))
    return x


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in WITH_STATE for k in ("Q", "L") if k in CASES[n]["state"]])
def test_one_entry_off_by_a_millionth_fails(name, kind, tmp_path):
    case = CASES[name]
    data = arrays(case)
    moved = (key for key in data if key.startswith(f"{kind}/") and np.any(data[key]))
    last = max(moved, key=lambda key: int(key.split("/")[1]))
    data[last] = shifted(data[last], 1e-6)
    result = replayed(case, data, tmp_path)
    assert not result.passed
    assert result.where == last
    assert result.error == pytest.approx(1e-6, rel=0.01)


@pytest.mark.parametrize("name", WITH_STATE)
def test_another_gradient_fails(name, tmp_path):
    case = CASES[name]
    data = arrays(case)
    data["grad/1/0"] = shifted(data["grad/1/0"], 1e-3)
    assert not replayed(case, data, tmp_path).passed


@pytest.mark.parametrize(
    "name", [n for n, c in CASES.items() if f"out/{c['steps']}/0" in arrays(c) and "state" not in c]
)
def test_another_result_of_a_primitive_fails(name, tmp_path):
    case = CASES[name]
    data = arrays(case)
    last = max(
        (key for key in data if key.startswith("out/") and np.any(data[key])), key=lambda key: int(key.split("/")[1])
    )
    data[last] = data[last] * 2
    result = replayed(case, data, tmp_path)
    assert not result.passed
    assert result.where == last


def results(case):
    """The names of recorded results: of each kind, at the first and at the last step that has it, the last array."""
    found = {}
    for name in sorted(arrays(case), key=lambda name: [int(x) if x.isdigit() else x for x in name.split("/")]):
        kind, step, *_ = name.split("/")
        if kind in golden_player.RESULTS:
            found.setdefault(kind, {})[int(step)] = name
    return [steps[t] for steps in found.values() for t in sorted({min(steps), max(steps)})]


def played(name, without):
    """A case replayed without some of its arrays, in memory."""
    data = golden_cases.Data({k: x for k, x in arrays(CASES[name]).items() if k not in without})
    golden.compared(golden_player.Player(CASES[name], data, FRAMEWORKS["numpy"]))


@pytest.mark.parametrize("name", first_of("family", "function", where=lambda case: case["steps"] < 10))
def test_a_result_that_is_missing_fails(name):
    missing = results(CASES[name])
    assert missing or CASES[name]["function"] == "hessian_helper"
    for result in missing:
        with pytest.raises(ValueError, match=f"the case lacks {result},"):
            played(name, {result})


@pytest.mark.parametrize("kind", ["grad", "v", "h", "pgrad", "flag", "draw", "param", "in", "out", "loss"])
def test_an_input_that_is_missing_fails(kind):
    """In a case of each family that has it; a loss is asked for in primitives alone."""
    for name in first_of("family", where=lambda case: kind != "loss" or case["family"] == "primitive"):
        gone = [x for x in arrays(CASES[name]) if x.split("/")[0] == kind]
        if gone:
            with pytest.raises(ValueError, match=r"the case lacks|v/0, but no recorded one is left"):
                played(name, gone)


def one_draw_more(case, data, kind, value):
    """The case with one more draw at its last step."""
    t = str(case["steps"])
    draws = case["draws"].get(t, [])
    data[f"draw/{t}/{len(draws)}"] = value
    return {**case, "draws": case["draws"] | {t: [*draws, kind]}}


@pytest.mark.parametrize(
    ("kind", "value"), [("randn:2,2", np.ones((2, 2))), ("rand:", np.asarray(0.5))], ids=["normal", "coin"]
)
@pytest.mark.parametrize("name", WITH_STATE)
def test_a_draw_that_is_not_asked_for_fails(name, kind, value, tmp_path):
    data = arrays(CASES[name])
    case = one_draw_more(CASES[name], data, kind, value)
    with pytest.raises(ValueError, match="were not asked for"):
        replayed(case, data, tmp_path)


@pytest.mark.parametrize(
    "name", first_of("family", where=lambda c: "state" in c and is_matrix(c) and draws_at_first(c))
)
def test_a_draw_of_another_size_fails(name, tmp_path):
    case = CASES[name]
    data = arrays(case)
    k = case["draws"]["1"].index(next(kind for kind in case["draws"]["1"] if not is_coin(kind)))
    data[f"draw/1/{k}"] = np.ones(data[f"draw/1/{k}"].size + 1)
    with pytest.raises(ValueError, match="the step asks for"):
        replayed(case, data, tmp_path)


def test_a_case_without_anything_to_compare_fails(tmp_path):
    case = CASES[WITH_STATE[0]]
    data = {k: x for k, x in arrays(case).items() if k.split("/")[0] not in ("Q", "L", "m", "out", "param")}
    with pytest.raises(ValueError, match="the case lacks"):
        replayed(case, data, tmp_path)


def test_a_result_that_nothing_was_computed_for_fails(tmp_path):
    case = CASES[WITH_STATE[0]]
    with pytest.raises(ValueError, match="Q/1/9 was recorded, but nothing was computed"):
        replayed(case, arrays(case) | {"Q/1/9": np.ones(2)}, tmp_path)


# ---- sweeps that were not needed -------------------------------------------------------------
class Counted(golden_player.Recording):
    """A recording that counts what is asked of it, by whether it was used."""

    used = masked = 0

    def normal(self, role, shape, like, skip=None):
        if skip is not None and bool(skip):
            Counted.masked += 1
        else:
            Counted.used += 1
        return super().normal(role, shape, like, skip)


SWEEPING = [
    name
    for name, case in CASES.items()
    if is_function(case) and GEOMETRIES[case["geometry"]].turn is rotate.polished and case["dtype"] != "float32"
]


def test_a_recording_shows_sweeps_that_go_on():
    """In one case at least, the number of sweeps differs between steps of the same work."""
    assert any(len({len(draws) for draws in CASES[name]["draws"].values()}) > 1 for name in SWEEPING)


@pytest.mark.parametrize("name", SWEEPING)
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_masked_sweeps_use_exactly_the_recorded_draws(name, framework, monkeypatch):
    for module in (golden, golden_optimizers):
        monkeypatch.setattr(module, "Recording", Counted)
    monkeypatch.setattr(Counted, "used", 0)
    monkeypatch.setattr(Counted, "masked", 0)
    assert_replays(name, framework)
    recorded = [kind for kinds in CASES[name]["draws"].values() for kind in kinds if not kind.startswith("rand:")]
    assert Counted.used == len(recorded)
    has_turned = is_matrix(CASES[name]) or CASES[name]["family"].startswith("dense")
    assert Counted.masked > 0 or not has_turned


# ---- the rules of comparing ------------------------------------------------------------------
@pytest.mark.parametrize(
    ("got", "want", "atol", "expected"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.0, 0.5),
        ([1.0, 2.0], [1.0, 4.0], 1.0, 0.25),
        ([1.0, np.nan], [1.0, 4.0], 0.0, np.inf),
        ([np.nan, np.nan], [0.0, 0.0], 0.0, np.inf),
        ([1.0], [1.0, 1.0], 0.0, np.inf),
        ([0.0], [0.0], 0.0, 0.0),
        ([1e-30], [0.0], 0.0, np.inf),
        ([], [], 0.0, 0.0),
        ([1.0 + 1j], [1.0 - 1j], 0.0, np.sqrt(2)),
    ],
)
def test_error(got, want, atol, expected):
    assert golden.error(np.array(got), np.array(want), atol) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "expected"), [("inf", np.inf), ([2.0, 10.0], (2.0, 10.0)), (0.5, 0.5), (None, None), ("adam", "adam")]
)
def test_recorded_options(value, expected):
    assert golden_player.number(value) == expected


# ---- what is not supported -------------------------------------------------------------------
@pytest.mark.parametrize(
    "case", [{"family": "no_such_family"}, {"family": "primitive", "function": "no_such_function"}]
)
def test_unknown_families_are_told_apart(case):
    assert not golden.supported(case)


WRONG = [
    ("file", None, "must name its"),
    ("file", "", "must name its"),
    ("file", "a\0b", "must name its"),
    ("file", 10**400, "must name its"),
    ("file", "../case.npz", "must be a file of this folder itself"),
    ("file", "/etc/case.npz", "must be a file of this folder itself"),
    ("file", "..", "must be a file of this folder itself"),
    ("file", "link.npz", "must be a file of this folder itself"),
    ("family", ["kron"], "must be a text"),
    ("rtol", "1e-9", "must be a number in"),
    ("rtol", None, "must be a number in"),
    ("rtol", True, "must be a number in"),
    ("rtol", float("nan"), "must be a number in"),
    ("rtol", 10**400, "must be a number in"),
    ("atol", "0", "must be a number in"),
    ("atol", float("inf"), "must be a number in"),
    ("steps", 10**400, "must be a whole number in"),
    ("steps", 0, "must be a whole number in"),
    ("steps", 1.5, "must be a whole number in"),
    ("shapes", [[10**400]], "must be a list of shapes"),
    ("shapes", "4, 3", "must be a list of shapes"),
    ("dtype", None, "must be the name of a dtype"),
    ("hyperparameters", [], "must be an object"),
    ("recorded_state_steps", 3, "must be a list of steps"),
    ("groups", {"params": 1}, "must be a list of groups"),
    ("draws", {"1": "randn"}, "must be lists of draws"),
]


@pytest.mark.parametrize(("field", "value", "text"), WRONG)
def test_a_case_that_is_none_is_refused(field, value, text, tmp_path):
    case = CASES[WITH_STATE[0]]
    (tmp_path / "link.npz").symlink_to(FOLDER / case["file"])
    (tmp_path / "index.json").write_text(json.dumps({"schema": 1, "cases": [case | {field: value}]}))
    with pytest.raises(ValueError, match=f"{field}=.* {text}") as caught:
        golden.cases(tmp_path)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ("[" * 100_000, "is no JSON"),
        ("1" * 5000, "is no JSON"),
        ("{", "is no JSON"),
        ("[]", r"has schema \[\]"),
        ('{"schema": 1}', "holds no cases"),
        ('{"schema": 1, "cases": []}', "holds no cases"),
        ('{"schema": 1, "cases": {"a": 1}}', "holds no cases"),
        ('{"schema": 1, "cases": [1]}', "case number 0: it is 1 and not an object"),
        ('{"schema": 1, "cases": [{}]}', "case number 0: file=None must name"),
    ],
    ids=str,
)
def test_an_index_that_is_none_is_refused(index, text, tmp_path):
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(ValueError, match=text):
        golden.cases(tmp_path)


@pytest.mark.parametrize("index", [{"schema": 2, "cases": []}, {"cases": []}])
def test_another_schema_is_refused(index, tmp_path):
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="schema"):
        golden.cases(tmp_path)


def test_a_folder_without_index_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no index\.json"):
        golden.cases(tmp_path)
