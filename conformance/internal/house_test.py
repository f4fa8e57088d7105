"""The rules of the house, over the syntax trees of its packages; and that a new record is all that a newcomer takes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import psgd_jax_backend
import psgd_torch_backend
from conformance.internal import measures
from conformance.internal.measures import PACKAGES, ROOT, is_test_file
from psgd import METHODS
from psgd.geometry import GEOMETRIES
from psgd.hyperparameters import Method, method, setting
from psgd.kron import Kronecker
from psgd.recipe import Recipe, Schedule
from psgd.schedule import from_first
from psgd_jax_backend.named import named_function
from psgd_torch_backend.named import named_class

STANDARD = set(sys.stdlib_module_names)

# What each package may import beside the standard library and itself.
ALLOWED = {
    "psgd": {"numpy", "array_api_compat"},
    "psgd_torch_backend": {"psgd", "torch"},
    "psgd_jax_backend": {"psgd", "jax", "optax"},
}
# Packages that know which frameworks, and which of each other, they may import.
FORBIDDEN = {"conformance": {"benchmarks"}, "benchmarks": set()}
# A module of the core imports those before it.
ORDER = [
    *("arrays", "_xp", "shapes", "noise", "schedule", "thin", "spectral", "rotate", "structured", "axes"),
    *(
        "geometry",
        "criterion",
        "preconditioner",
        "kron",
        "lra",
        "xmat",
        "scaling",
        "recipe",
        "joint",
        "nonfinite",
        "pipeline",
    ),
    *("naming", "calls", "hyperparameters", "methods", "documentation", "cost", "summary", "__init__"),
]
# Where the names of methods and geometries belong: their own pages, and the replay of recorded runs, which maps the
# names that other programs gave to their recordings.
NAMING = {
    "benchmarks/peers.py",
    "conformance/internal/golden.py",
    "psgd/geometry.py",
    *(f"psgd/methods/{package}.py" for package in ("quad_torch", "psgd_torch", "psgd_jax")),
}
# The attribute of a node of the tree that is a name or a string in the code.
SAYING = {
    ast.Constant: "value",
    ast.Name: "id",
    ast.Attribute: "attr",
    ast.alias: "name",
    ast.keyword: "arg",
    ast.arg: "arg",
    ast.FunctionDef: "name",
    ast.ClassDef: "name",
}


def sources(*packages: str, tests: bool = False) -> list[Path]:
    return measures.sources(ROOT, *packages, tests=tests)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def where(path: Path, node: ast.AST | None = None) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Full dotted names of what is imported, also by `import_module` of a constant."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            constant = isinstance(node.args[0], ast.Constant)
            yield node.args[0].value if constant else "a variable", node


def describes_itself(path: Path, node: ast.stmt) -> bool:
    """Is this a function that says in its own line, or in ten lines of a tool, what it does?"""
    is_tool = name_of(path).split("/")[0] not in ALLOWED
    lines = (node.end_lineno or node.lineno) - node.lineno
    return isinstance(node, ast.FunctionDef) and (len(node.body) == 1 or (is_tool and lines <= 10))


def is_for_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def at_run_time(tree: ast.Module) -> ast.Module:
    """The module without what only type checkers read."""

    class Drop(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            return node.orelse if is_for_checkers(node) else self.generic_visit(node)

    return Drop().visit(tree)


def docstrings(tree: ast.Module) -> set[ast.AST]:
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, owners) and node.body]
    return {body[0].value for body in bodies if isinstance(body[0], ast.Expr)}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


# ---- who imports whom -----------------------------------------------------------------------
def test_the_walk_sees_the_packages():
    for package in PACKAGES:
        assert (ROOT / package / "__init__.py") in sources(package), package
    assert len(sources(*PACKAGES)) > 20


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_what_they_may(package: str):
    allowed = ALLOWED[package] | STANDARD | {package}
    for path in sources(package):
        for name, node in imports(at_run_time(parsed(path))):
            # The one file that knows frameworks asks for the parts of those that are loaded already.
            knows = path == ROOT / "psgd/_xp.py" and isinstance(node, ast.Call)
            assert name.split(".")[0] in allowed or (knows and name == "jax.scipy.linalg"), where(path, node)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_nobody_imports_upwards(package: str):
    for path in sources(package):
        for name, node in imports(parsed(path)):
            assert name.split(".")[0] not in FORBIDDEN[package], where(path, node)


def test_only_tools_are_imported_for_checkers():
    for path in sources("psgd"):
        for block in filter(is_for_checkers, ast.walk(parsed(path))):
            for name, node in imports(block):
                assert name.split(".")[0] in {"jaxtyping", "psgd"} | STANDARD, where(path, node)


def test_the_core_is_built_in_order():
    def room(path: Path) -> str:
        return "methods" if path.parent.name == "methods" else path.stem

    rooms = set(map(room, sources("psgd")))
    assert rooms == set(ORDER), f"without a place in ORDER, or only there: {sorted(rooms ^ set(ORDER))}"
    for path in sources("psgd"):
        rank = ORDER.index(room(path)) + (path.parent.name == "methods" and path.stem == "__init__")
        for name, node in imports(parsed(path)):
            parts = name.split(".")
            if parts[0] != "psgd":
                continue
            # `from psgd import kron` or `from psgd.kron import fit`
            assert parts[1] in ORDER[:rank], f"{where(path, node)} imports {name}"


def test_no_test_imports_another():
    """What several need is in `_testing.py` or a fixture of `conftest.py`, which nothing but tests import."""
    for path in sources(*PACKAGES, "docs", "examples", tests=True):
        for name, node in imports(parsed(path)):
            parts = name.split(".")
            if any(part.endswith("_test") or part == "conftest" for part in parts):
                raise AssertionError(f"{where(path, node)} imports {name}")
            assert "_testing" not in parts or is_test_file(path), f"{where(path, node)} imports {name}"


# ---- what the code may say --------------------------------------------------------------------
def test_names_of_methods_and_geometries_stay_on_their_pages():
    """So that adding one is adding one record: nothing else can depend on which there are."""
    names = {*METHODS, *GEOMETRIES, *(made.title for made in METHODS.values())} - set(ORDER)  # modules may be named
    seen = set()
    for path in sources(*PACKAGES):
        tree = parsed(path)
        prose = docstrings(tree)
        for node in ast.walk(tree):
            said = getattr(node, SAYING.get(type(node), ""), None)
            if node not in prose and isinstance(said, str) and said in names:
                seen.add(name_of(path))
                assert name_of(path) in NAMING, f"{where(path, node)} names {said}"
    assert NAMING - {"benchmarks/peers.py"} <= seen


def dotted(node: ast.AST) -> list[str]:
    """The parts of `a.b.c`, or nothing where it is not a chain of names."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts, node = [node.attr, *parts], node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else []


def test_frameworks_are_used_by_their_public_names():
    """Also in tests, where only the switches of torch.compile, and what looks on at operations, are excepted."""
    excepted = (["torch", "_dynamo"], ["torch", "utils", "_python_dispatch"], ["torch", "utils", "_pytree"])
    roots, private = {"torch", "jax", "jnp", "optax", "numpy", "np", "array_api_compat"}, re.compile(r"_(?!_)")
    for path in sources(*PACKAGES, tests=True):
        tree = parsed(path)
        chains = [(dotted(node), node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        for parts, node in [*chains, *((name.split("."), node) for name, node in imports(tree))]:
            if (
                parts
                and parts[0] in roots
                and not (is_test_file(path) and (parts[:2] in excepted or parts[:3] in excepted))
            ):
                assert not any(private.match(part) for part in parts), f"{where(path, node)}: {'.'.join(parts)}"


def test_nothing_prints():
    for path in sources(*PACKAGES[:4]):
        for node in ast.walk(parsed(path)):
            is_print = isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "pprint")
            assert not is_print, where(path, node)


def test_every_function_is_annotated():
    for path in sources(*PACKAGES):
        tree = parsed(path)
        methods = {f for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for f in c.body}
        for f in functions(tree):
            a = f.args
            given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            if f in methods and "staticmethod" not in map(ast.unparse, f.decorator_list):
                given = given[1:]
            missing = [x.arg for x in given if x.annotation is None] + ["return"] * (f.returns is None)
            assert not missing, f"{where(path, f)}: {f.name} lacks annotations of {missing}"


def test_every_public_function_and_class_says_what_it_does():
    for path in sources(*PACKAGES):
        tree = parsed(path)
        assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                told = describes_itself(path, node) or ast.get_docstring(node)
                assert told, f"{where(path, node)}: {node.name} has no docstring"


def test_the_core_has_no_variables_but_its_registries():
    for path in sources("psgd"):
        for node in parsed(path).body:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, (ast.Dict, ast.List, ast.Set)):
                target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
                assert target in ("GEOMETRIES", "METHODS", "__all__"), f"{where(path, node)}: {target}"


# ---- importing --------------------------------------------------------------------------------
def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("psgd, psgd.methods, psgd.pipeline", ["torch", "jax", "optax", "jaxtyping"]),
        ("psgd_torch_backend", ["jax", "optax", "jaxtyping"]),
        ("psgd_jax_backend", ["torch", "jaxtyping"]),
    ],
)
def test_importing_loads_no_more_than_it_needs(module: str, absent: list[str]):
    assert python(f"import sys, {module}; print(*set({absent!r}) & set(sys.modules))") == "\n"


@pytest.mark.parametrize("module", ["psgd_torch_backend", "psgd_jax_backend", "conformance", "conformance.cli"])
@pytest.mark.parametrize("name", ["psgd.py", "psgd/__init__.py"])
def test_what_hides_the_core_is_named(tmp_path: Path, module: str, name: str):
    """Beside a script, or the script itself: nothing of it runs."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(f"print('ran')\nimport {module}\n")
    (tmp_path / "train.py").write_text(f"import {module}\n")
    done = subprocess.run([sys.executable, tmp_path / "train.py"], capture_output=True, text=True)
    said = f"ImportError: {tmp_path / name} hides the package psgd, of which {module.partition('.')[0]} is made: "
    assert done.stderr.splitlines()[-1] == f"{said}give it another name" and not done.stdout and done.returncode


def test_the_core_imports_in_no_time():
    """After NumPy it loads itself and next to nothing. What is counted: a clock tells of the machine and its load."""
    code = "import sys, numpy; there = set(sys.modules); import psgd; print(*sorted(set(sys.modules) - there))"
    others = [name for name in python(code).split() if name.split(".")[0] != "psgd"]
    assert len(others) < 10 and {name.split(".")[0] for name in others} <= sys.stdlib_module_names, others


# ---- newcomers --------------------------------------------------------------------------------
def torch_run(make, steps: int = 4) -> list[np.ndarray]:
    params = [torch.nn.Parameter(torch.as_tensor(x)) for x in start()]
    optimizer = make(params)
    for t in range(steps):
        for p, g in zip(params, start(seed=t + 1), strict=True):
            p.grad = torch.as_tensor(g)
        optimizer.step()
    return [p.detach().numpy() for p in params]


def jax_run(optimizer: optax.GradientTransformation, steps: int = 4) -> list[np.ndarray]:
    with jax.enable_x64(True):
        params = [jnp.asarray(x) for x in start()]
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for t in range(steps):
            updates, state = update([jnp.asarray(g) for g in start(seed=t + 1)], state, params)
            params = optax.apply_updates(params, updates)
        return [np.asarray(p) for p in params]


def start(seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape) for shape in ((4, 3), (5,))]


def assert_same_steps(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for x, y, first in zip(ours, theirs, start(), strict=True):
        assert np.abs(x - first).max() > 1e-3
        assert x == pytest.approx(y, rel=1e-12)


def test_a_new_geometry_is_one_record(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="dQ='toy' must be one of 'EQ'"):
        psgd_torch_backend.KronWhiten([torch.nn.Parameter(torch.ones(2))], dQ="toy")
    moves = []

    def move(q, d, m):
        moves.append(q.shape)
        return q - (m / 2) * (q @ d + d @ q)

    monkeypatch.setitem(GEOMETRIES, "toy", replace(GEOMETRIES["QUAD"], move=move))
    ours = torch_run(lambda params: psgd_torch_backend.KronWhiten(params, lr=0.1, dQ="toy"))
    seen = len(moves)
    theirs = jax_run(psgd_jax_backend.kron_whiten(0.1, dQ="toy"))
    assert 0 < seen < len(moves)
    assert_same_steps(ours, theirs)
    other = torch_run(lambda params: psgd_torch_backend.KronWhiten(params, lr=0.1, dQ="QUAD"))
    assert np.abs(other[0] - ours[0]).max() > 1e-6


def test_a_new_method_is_one_dataclass(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METHODS, "toy", None)  # so that it is gone after the test

    @method("toy", "Toy", "nowhere")
    class Toy(Method):
        """Gradients whitened a little."""

        boldness: float = setting(0.5, "how boldly factors move", "(0, 1)")

        def recipe(self) -> Recipe:
            return Recipe(preconditioner=Kronecker(GEOMETRIES["QEQ"]))

        def schedule(self) -> Schedule:
            return Schedule(
                averaging=from_first, momentum=0.5, rate=lambda xp, t: self.boldness, beta_lipschitz=0.9, damping=1e-9
            )

    assert METHODS["toy"] is Toy
    optimizer, transformation = named_class(Toy, "somewhere"), named_function(Toy, "somewhere")
    for made in (optimizer, transformation):
        assert "boldness: how boldly factors move (in (0, 1); default 0.5)" in made.__doc__
        assert made.__module__ == "somewhere"
    assert (optimizer.__name__, transformation.__name__) == ("Toy", "toy")
    ours = torch_run(lambda params: optimizer(params, lr=0.1, boldness=0.25))
    assert_same_steps(ours, jax_run(transformation(0.1, boldness=0.25)))
    assert np.abs(ours[0] - torch_run(lambda params: optimizer(params, lr=0.1))[0]).max() > 1e-6
    with pytest.raises(ValueError, match=r"toy: boldness=1\.0 must lie in \(0, 1\)"):
        transformation(boldness=1.0)
