"""The counts of the code count what they say; this tree is within the limits, but for exceptions that only shrink."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conformance.internal.measures import (
    ANY,
    DUPLICATES,
    ROOT,
    Measures,
    Source,
    any_share,
    duplicate_share,
    file_lines,
    function_lines,
    main,
    measure,
    places,
    private_imports,
    read,
    sources,
)

# What is over a limit, with how far at most. The figures may only fall, and what no longer needs one has to go.
KNOWN_FUNCTIONS: dict[str, int] = {}
KNOWN_FILES = {"benchmarks/worker.py": 432}  # a program of its own, for environments that have nothing else of ours
KNOWN_ANY: dict[str, float] = {}
KNOWN_DUPLICATES: dict[str, float] = {}
# Of the core `_xp`, which is private to users and not to the adapters; of these what stubs and planted faults name.
KNOWN_PRIVATE = {"psgd": 21, "psgd_torch_backend": 7, "psgd_jax_backend": 2}


def source(text: str, name: str = "psgd/some.py") -> Source:
    return Source.of(name, text)


FUNCTIONS = '''
"""A module."""

def one(
    x,  # what
):
    """A docstring

    of three lines."""
    # a comment

    def two():
        return """a
        text"""

    return two


class Three:
    def four(self): return 4
'''


def test_lines_of_functions_are_those_of_code():
    names = {"one": 7, "one.two": 3, "Three.four": 1}
    assert function_lines(source(FUNCTIONS)) == {f"psgd/some.py: {name}": n for name, n in names.items()}


def test_lines_of_files_are_all():
    assert file_lines(source(FUNCTIONS)) == 20
    assert file_lines(source("")) == 0


FIVE = """
def f(x, y):
    a = x.first + 1
    for b in y:
        a += b
    return a
"""


@pytest.mark.parametrize(
    ("other", "share"),
    [
        (FIVE, 1),
        ('"""Prose."""\nimport math\n' + FIVE, 1),
        (FIVE.replace("a", "longer").replace("f(", "g("), 1),  # variables by other names
        (FIVE.replace("a +=", "x +="), 0),  # another variable
        (FIVE.replace("first", "second"), 0),  # attributes are not variables
        (FIVE.replace("1", "2"), 0),
        (FIVE.replace("    return a\n", ""), 0),  # four statements
        (FIVE + "\nb = f(1, [2])\n", 2 / 3),
    ],
)
def test_windows_of_five_statements_that_stand_twice(other: str, share: float):
    assert duplicate_share(places([source(FIVE), source(other, "psgd/other.py")])) == pytest.approx(share)


def test_every_kind_of_statement_has_a_head():
    """Its own text without what is inside, which follows; each once."""
    text = """
try:
    a = 1
except ValueError as e:
    b = 2
else:
    c = 3
finally:
    d = 4
match a:
    case 1:
        e = 5
with open(f) as g, h:
    while i:
        j = 6
if k:
    l = 7
elif m:
    n = 8
class O:
    p: int = 9
async def q(): await r
"""
    (first, *_, last) = (window for window, _ in places([source(text)]))
    assert first[1:] == ("_ = 1", "_ = 2", "_ = 3", "_ = 4")
    assert last[1:] == ("class O:\n    pass", "_: _ = 9", "async def q():\n    pass", "await _")


def test_arguments_that_say_any():
    text = """
class A:
    def f(self, a: Any, b: list[typing.Any], *args: Any, c: int, **kwargs: "dict[str, Any]") -> Any: ...
    def g(cls, Any: int, d: Anything = 1): ...
"""
    assert any_share([source(text)]) == 4 / 7
    assert any_share([]) == 0


def test_private_names_of_other_packages():
    text = """
from psgd._xp import namespace
from psgd.kron import _less, fit
from psgd_torch_backend import _state
import psgd_jax_backend._state
from numpy._core import multiarray
from psgd.__init__ import METHODS
"""
    private = ["psgd._xp.namespace", "psgd.kron._less", "psgd_torch_backend._state", "psgd_jax_backend._state"]
    assert list(private_imports(source(text, "conformance/some.py"))) == private
    assert list(private_imports(source(text))) == private[2:]


def made(root: Path, **files: str) -> Path:
    """A checkout with files of the core."""
    (root / "psgd").mkdir(parents=True)
    for name, text in files.items():
        (root / "psgd" / f"{name}.py").write_text(text)
    return root


def test_tests_are_not_counted(tmp_path: Path):
    made(tmp_path, kron="", kron_test="", conftest="", _testing="")
    assert [path.name for path in sources(tmp_path, "psgd")] == ["kron.py"]
    assert len(sources(tmp_path, "psgd", tests=True)) == 4


def test_the_command_puts_two_checkouts_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    long = "def f():\n" + "    x = 1\n" * 41
    before, after = made(tmp_path / "before", one=long), made(tmp_path / "after", one=FIVE)
    main([str(after), "--against", str(before), "--json", str(tmp_path / "counts.json")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["longest", "function,", "code", "lines", "42", "5"] in lines
    assert ["measure", "before", "after"] in lines
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["before"]["functions"] == {"psgd/one.py: f": 42} and counts["after"]["functions"] == {}
    main([str(before)])
    assert "psgd/one.py: f" in capsys.readouterr().out


def test_what_is_no_checkout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "holds no folder psgd" in capsys.readouterr().err


# ---- this tree --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def counts() -> Measures:
    return measure(read(ROOT))


def assert_known(over: dict[str, float], known: dict[str, float]) -> None:
    """What is over a limit is known, and what is known is over it."""
    worse = {name: n for name, n in over.items() if n > known.get(name, 0)}
    assert not worse, f"over the limit: {worse}"
    assert known.keys() <= over.keys(), f"within the limit, so not to be listed: {sorted(known.keys() - over.keys())}"


def test_functions_are_short(counts: Measures):
    assert_known(counts.functions, KNOWN_FUNCTIONS)


def test_files_are_short(counts: Measures):
    assert_known(counts.files, KNOWN_FILES)


def test_nothing_stands_twice(counts: Measures):
    over = {"all packages": counts.duplicates} if counts.duplicates > DUPLICATES else {}
    assert_known(over, KNOWN_DUPLICATES)


def test_arguments_have_types(counts: Measures):
    assert_known({name: counts.any[name] for name, limit in ANY.items() if counts.any[name] >= limit}, KNOWN_ANY)


def test_packages_read_no_private_names_of_others(counts: Measures):
    assert_known({name: len(names) for name, names in counts.private.items() if names}, KNOWN_PRIVATE)


def test_an_exception_may_only_shrink():
    assert_known({"a": 5}, {"a": 5})
    for over, known in (({"a": 6}, {"a": 5}), ({"a": 5}, {}), ({}, {"a": 5})):
        with pytest.raises(AssertionError):
            assert_known(over, known)
