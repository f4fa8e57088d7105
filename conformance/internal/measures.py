"""Counts of the house: how long functions and files are, what stands twice, what `Any` hides, who reads private names.

    python -m conformance.internal.measures [PATH] [--against PATH] [--json FILE]

PATH is a checkout, this one by default; `--against` puts another one beside it, as the column before. Tests are not
counted.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from conformance.terminal import Sheet, console, exits, refuse, writable, write_json

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("psgd", "psgd_torch_backend", "psgd_jax_backend", "conformance", "benchmarks")
TESTS = re.compile(r".*_test\.py|conftest\.py|_testing\.py")  # files that the wheel leaves out

# Limits of a file of the product.
FUNCTION_LINES = 40
FILE_LINES = 350
DUPLICATES = 0.001
ANY = {"psgd": 0.03, "psgd_torch_backend": 0.10, "psgd_jax_backend": 0.10}

WINDOW = 5  # statements in a row that make a duplicate
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# ---- files ------------------------------------------------------------------------------------
def is_test_file(path: Path) -> bool:
    """Is a file a test, or a helper of tests?"""
    return TESTS.fullmatch(path.name) is not None


def sources(root: Path, *packages: str, tests: bool = False) -> list[Path]:
    """The Python files of packages of a checkout, without tests unless told."""
    found = [path for package in packages for path in sorted((root / package).rglob("*.py"))]
    return [path for path in found if tests or not is_test_file(path)]


@dataclass(frozen=True)
class Source:
    """A file: its path in the checkout, its text and its syntax tree."""

    name: str
    text: str
    tree: ast.Module

    @classmethod
    def of(cls, name: str, text: str) -> Source:
        return cls(name, text, ast.parse(text, name))

    @property
    def package(self) -> str:
        """The top folder."""
        return self.name.split("/")[0]


def read(root: Path) -> list[Source]:
    """The product files of a checkout."""
    return [Source.of(str(path.relative_to(root)), path.read_text()) for path in sources(root, *PACKAGES)]


# ---- lengths ----------------------------------------------------------------------------------
def docstrings(tree: ast.AST) -> list[ast.Expr]:
    """The docstring statements of a module, of its classes and functions."""
    owners = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, *FUNCTIONS)) and n.body]
    return [n.body[0] for n in owners if ast.get_docstring(n, clean=False) is not None]  # type: ignore[misc]


def code_lines(source: Source) -> set[int]:
    """Numbers of the lines that hold code: no blank line, no comment, no docstring."""
    tokens = tokenize.generate_tokens(io.StringIO(source.text).readline)
    spans = [range(t.start[0], t.end[0] + 1) for t in tokens if t.type not in SILENT]
    prose = [range(d.lineno, (d.end_lineno or d.lineno) + 1) for d in docstrings(source.tree)]
    return set(chain.from_iterable(spans)) - set(chain.from_iterable(prose))


def named_functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Each function with its dotted name, those inside classes and functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, FUNCTIONS):
            yield prefix + node.name, node
        inner = f"{prefix}{node.name}." if isinstance(node, (ast.ClassDef, *FUNCTIONS)) else prefix
        yield from named_functions(node, inner)


def function_lines(source: Source) -> dict[str, int]:
    """Code lines of each function from its `def` to its end, with those of functions inside it; the larger of two of
    one name."""
    code, found = code_lines(source), Counter[str]()
    for name, node in named_functions(source.tree):
        length = len(code.intersection(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
        found[f"{source.name}: {name}"] = max(length, found[f"{source.name}: {name}"])
    return dict(found)


def file_lines(source: Source) -> int:
    """All lines of a file."""
    return len(source.text.splitlines())


# ---- duplicates -------------------------------------------------------------------------------
class Statement(NamedTuple):
    """One statement, of a compound one its head: its text, with a blank for each name, and the names in order."""

    text: str
    names: tuple[str, ...]


class Blanks(ast.NodeTransformer):
    """Takes the names of variables, arguments and functions out of a tree, and keeps them; attributes stay."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def visit_Name(self, node: ast.Name) -> ast.Name:
        self.names.append(node.id)
        node.id = "_"
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        self.names.append(node.arg)
        node.arg = "_"
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.names.append(node.name)
        node.name = "_"
        return self.generic_visit(node)


def statements(body: Sequence[ast.stmt], prose: Collection[ast.AST]) -> Iterator[Statement]:
    """The statements of a body in order, those inside a compound one after its head; no imports and no docstrings."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)) or node in prose:
            continue
        fields = [value for _, value in ast.iter_fields(node) if isinstance(value, list) and value]
        blocks = [block for block in fields if isinstance(block[0], (ast.stmt, ast.ExceptHandler, ast.match_case))]
        head, blanks = _head(node) if blocks else node, Blanks()
        yield Statement(ast.unparse(blanks.visit(head)), tuple(blanks.names))
        for part in chain.from_iterable(blocks):
            yield from statements([part] if isinstance(part, ast.stmt) else part.body, prose)


def _head(node: ast.stmt) -> ast.stmt:
    """A compound statement without what is inside."""
    empty = {"body": [ast.Pass()], "orelse": [], "handlers": [], "cases": []}
    if isinstance(node, ast.Try):  # which needs one of its other parts to be written down
        empty["finalbody"] = [ast.Pass()]
    fields = dict(ast.iter_fields(node))
    return ast.copy_location(type(node)(**fields | {k: v for k, v in empty.items() if k in fields}), node)


Window = tuple[tuple[str, ...], tuple[int, ...]]  # texts; each name by the place where it comes first


FIELD = "_: _"  # of a record: without their names all records are alike


def windows(source: Source) -> list[Window]:
    """Every run of `WINDOW` statements of a file, but for how its variables are called, and for fields of records."""
    tree = ast.parse(source.text)  # one of its own: names are taken out of it
    every = list(statements(tree.body, set(docstrings(tree))))
    found = []
    for i in range(len(every) - WINDOW + 1):
        run = every[i : i + WINDOW]
        if all(statement.text == FIELD for statement in run):
            continue
        names = [name for statement in run for name in statement.names]
        found.append((tuple(statement.text for statement in run), tuple(map(names.index, names))))
    return found


def places(files: Sequence[Source]) -> dict[Window, list[str]]:
    """Of each window the files in which it stands, one as often as it does there."""
    found: dict[Window, list[str]] = {}
    for source in files:
        for window in windows(source):
            found.setdefault(window, []).append(source.name)
    return found


def duplicate_share(standing: dict[Window, list[str]]) -> float:
    """The windows that stand at two places or more, over all."""
    counts = [len(names) for names in standing.values()]
    return sum(n for n in counts if n > 1) / max(sum(counts), 1)


# ---- arguments --------------------------------------------------------------------------------
def arguments(tree: ast.AST) -> Iterator[ast.arg]:
    """The arguments of all functions, but for `self` and `cls`."""
    for _, node in named_functions(tree):
        a = node.args
        every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        yield from (x for x in every if x.arg not in ("self", "cls"))


def says_any(annotation: ast.expr | None) -> bool:
    """Is `Any` part of an annotation, quoted or not?"""
    for node in ast.walk(annotation) if annotation else ():
        quoted = isinstance(node, ast.Constant) and re.search(r"\bAny\b", str(node.value))
        if quoted or "Any" in (getattr(node, "id", None), getattr(node, "attr", None)):
            return True
    return False


def any_share(files: Sequence[Source]) -> float:
    """The arguments whose annotation contains `Any`, over all."""
    answers = [says_any(x.annotation) for source in files for x in arguments(source.tree)]
    return sum(answers) / max(len(answers), 1)


# ---- private names ----------------------------------------------------------------------------
def private_imports(source: Source) -> Iterator[str]:
    """What a file imports of another package of ours though its name, or its module's, begins with an underscore."""
    for node in ast.walk(source.tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name for name in names if is_private(name) and not name.startswith(f"{source.package}."))


def is_private(name: str) -> bool:
    """Is a dotted name one of ours that only its own package should read?"""
    package, *parts = name.split(".")
    return package in PACKAGES and any(part.startswith("_") and not part.startswith("__") for part in parts)


# ---- all of them ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Measures:
    """The counts of a checkout. functions, files: lines of those over the limit. duplicates: a share, and `twins` the
    files of each duplicated window. any: a share in each package. private: of each package, what
    others import that is private, as "importing package: name".
    """

    longest: int
    functions: dict[str, int]
    files: dict[str, int]
    duplicates: float
    twins: list[list[str]]
    any: dict[str, float]
    private: dict[str, list[str]]


def measure(files: Sequence[Source]) -> Measures:
    """All counts of product files."""
    functions = {name: n for source in files for name, n in function_lines(source).items()}
    lengths = {source.name: file_lines(source) for source in files}
    standing = places(files)
    private = {f"{source.package}: {name}" for source in files for name in private_imports(source)}
    return Measures(
        longest=max(functions.values(), default=0),
        functions={name: n for name, n in functions.items() if n > FUNCTION_LINES},
        files={name: n for name, n in lengths.items() if n > FILE_LINES},
        duplicates=duplicate_share(standing),
        twins=[names for names in standing.values() if len(names) > 1],
        any={package: any_share([x for x in files if x.package == package]) for package in PACKAGES},
        private={package: sorted(x for x in private if f": {package}." in x) for package in PACKAGES},
    )


def rows(counts: Measures) -> dict[str, str]:
    """The counts as a column of the table."""
    return {
        "longest function, code lines": str(counts.longest),
        f"functions over {FUNCTION_LINES} code lines": str(len(counts.functions)),
        f"files over {FILE_LINES} lines": str(len(counts.files)),
        f"windows of {WINDOW} statements that stand twice": f"{100 * counts.duplicates:.2f} %",
        **{f"arguments with Any, {package}": f"{100 * share:.1f} %" for package, share in counts.any.items()},
        **{f"private names read by others, {package}": str(len(names)) for package, names in counts.private.items()},
    }


def details(counts: Measures) -> Iterator[tuple[str, str]]:
    """The functions and files over a limit with their lines, the files of duplicates with those of a window."""
    for over in (counts.functions, counts.files):
        yield from ((name, str(n)) for name, n in sorted(over.items(), key=lambda item: -item[1]))
    twins = Counter(" = ".join(names) for names in counts.twins)
    yield from ((names, f"{WINDOW - 1 + n}") for names, n in twins.items())


def show(columns: dict[str, Measures]) -> None:
    """The table of all columns, and of the last one what is over a limit."""
    out, cells = console(), {title: rows(counts) for title, counts in columns.items()}
    table = Sheet(["measure"], list(columns))
    for name in next(iter(cells.values())):
        table.add_row(name, *(column[name] for column in cells.values()))
    out.print(table)
    title, last = list(columns.items())[-1]
    over = Sheet([f"over a limit or twice, {title}"], ["lines"])
    for name, lines in details(last):
        over.add_row(name, lines)
    if over.rows:
        out.print("", over)


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(prog="python -m conformance.internal.measures", description="Counts of the code.")
    parser.add_argument("path", nargs="?", type=Path, default=ROOT, metavar="PATH", help="a checkout; this one else")
    parser.add_argument("--against", type=Path, metavar="PATH", help="the checkout of before")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all counts, with names, to this file")
    options = parser.parse_args(argv)
    with exits():
        writable(options.json)
        paths = {"before": options.against, "after": options.path} if options.against else {"now": options.path}
        for path in paths.values():
            if not (path / "psgd").is_dir():
                refuse(f"{path} holds no folder psgd, so it is no checkout of this repository")
        columns = {title: measure(read(path)) for title, path in paths.items()}
        show(columns)
        write_json(options.json, {title: asdict(counts) for title, counts in columns.items()})


if __name__ == "__main__":
    main()
