"""What the documents say of the code is so: names, files, commands, counts, and numbers that stand in the code."""

import ast
import importlib
import re
import shlex
import tomllib
from argparse import ArgumentParser
from dataclasses import fields
from functools import cache
from math import log

import numpy as np
import pytest
import torch
import typer
from _testing import CHANGELOG, DOCUMENTS, ROOT, TABLES, TELLERS, blocks, document, names, prose, with_tables

import psgd_jax_backend
import psgd_torch_backend
from benchmarks.cost import floor
from benchmarks.training import trainers
from benchmarks.training import valley as valley_runs
from conformance import cli, compare
from conformance.drivers import DRIVERS
from conformance.internal import faults, mesh_measures, mesh_runs, soak
from conformance.internal.contracts import CONTRACTS
from conformance.internal.stubs import STUBS
from conformance.problems import PROBLEMS
from psgd import structured
from psgd.geometry import GEOMETRIES
from psgd.methods import METHODS
from psgd.nonfinite import MAX_SKIPS
from psgd.summary import Parameter, parameter_costs
from psgd_jax_backend.named import named_function, scaling
from psgd_torch_backend import _compile, _fused
from psgd_torch_backend import _per_tensor as torch_per_tensor
from psgd_torch_backend.named import named_class

PACKAGES = ("psgd", "psgd_torch_backend", "psgd_jax_backend", "conformance", "benchmarks")
FOLDERS = (*PACKAGES, "docs", "examples")
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=names(DOCUMENTS))


@cache
def spans(path):
    """What stands in backticks in the prose and in the tables of a document."""
    return list(dict.fromkeys(re.findall(r"`([^`\n]+)`", prose(path))))


FILE = r"[\w-]+\.(py|toml|txt|md|yaml)"


# ---- files --------------------------------------------------------------------------------
@cache
def files():
    """Names of all files, without their folders."""
    return {path.name for folder in (".", *FOLDERS) for path in (ROOT / folder).glob("**/*" if folder != "." else "*")}


OF_USERS = {"psgd.py"}  # files of theirs that documents speak of


@each_document
def test_files_that_are_named_exist(path):
    for span in spans(path):
        if re.fullmatch(r"[a-z_]{2,}/|[a-z_]{2,}(/[\w.-]+)+/?", span):
            assert (ROOT / span).exists(), f"{span} is not there"
        elif re.fullmatch(FILE, span) and span not in OF_USERS:
            assert span in files(), f"no file is called {span}"


# ---- names --------------------------------------------------------------------------------
# What documents call by its last name alone.
BORROWED = (
    *(f"torch.optim.lr_scheduler.{name}" for name in ("CyclicLR", "LambdaLR", "OneCycleLR")),
    *("torch.amp.GradScaler", "torch.nn.parallel.DistributedDataParallel"),
    *(f"optax.{name}" for name in ("MultiSteps", "inject_hyperparams", "multi_transform")),
    *(f"jax.{name}" for name in ("jit", "shard_map", "value_and_grad", "vmap", "lax.optimization_barrier")),
    *("jax.experimental.shard_alike.shard_alike", "numpy.diag", "numpy.eye", "numpy.moveaxis"),
)
# Names of packages that are slow to load or not there, and what a published package has and ours does not.
STRANGERS = {
    *("PSGDKron", "Trainer", "ZeroRedundancyOptimizer", "unscale_", "backward", "capturable", "b2", "eps_root"),
    "DTensor",
    *(
        "no_weight_decay",
        "FullyShardedDataParallel",
        "zero_grad",
        "compiler_options",
        "max_consecutive_errors",
        "flax",
        "Partitioned",
        "Variable",
        "TrainState",
    ),
    *("create", "apply_gradients", "apply_fn", "Gram"),
}
SHORT = {"eqx": "equinox", "lax": "jax.lax"}  # as code calls them


@cache
def defined():
    """Every name that the code of the packages defines, takes as an argument or has as a word of its own."""
    found = {*PACKAGES, *METHODS, *GEOMETRIES, *DRIVERS, *PROBLEMS, *psgd_torch_backend.__all__}
    found |= {*psgd_jax_backend.__all__, *(f.name for method in METHODS.values() for f in fields(method))}
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        if path.name.endswith("_test.py"):
            continue
        found.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                found.add(node.id if isinstance(node, ast.Name) else node.attr)
            elif isinstance(node, (ast.arg, ast.keyword)) and node.arg:
                found.add(node.arg)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def resolved(dotted):
    """The object of a dotted name that begins with a module; None where there is none."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        for part in parts[n:]:
            if not hasattr(found, part):
                return None
            found = getattr(found, part)
        return found
    return None


def is_known(name):
    return (
        name == "None"
        or name in defined()
        or name in STRANGERS
        or name in {whole.rpartition(".")[2] for whole in BORROWED}
    )


def missing(span):
    """The name in a span of code that is nowhere; None where all is well, or where the span is no name."""
    call = re.fullmatch(r"([A-Za-z_][\w.]*?)(\[\w+\]|\(.*\)|=.*)?", span)
    if call is None or re.fullmatch(FILE, span):
        return None
    dotted, rest = call[1], call[2] or ""
    arguments = re.findall(r"(\w+)=(?!=)", rest) if rest.startswith("(") else []
    if "." not in dotted:
        own = [dotted] if is_word(dotted) else []
        return next((name for name in [*own, *arguments] if not is_known(name)), None)
    first, *more = dotted.split(".")
    inner = ["psgd"] if (ROOT / "psgd" / f"{first}.py").exists() else []
    whole = ".".join([*inner, SHORT.get(first, first), *more])
    if resolved(whole.split(".")[0]) is None:  # the attribute of a variable
        return next((name for name in [more[-1], *arguments] if not is_known(name)), None)
    return whole if resolved(whole) is None and whole not in ABSENT else None


def is_word(name):
    """Is it longer than a symbol of mathematics, and without its index?"""
    return len(name) > 2 and not re.search(r"_\w?$", name) and name != name.upper()


@pytest.mark.parametrize("name", [*sorted(STRANGERS), *BORROWED])
def test_names_of_others_are_said_and_theirs(name):
    assert name in STRANGERS or resolved(name) is not None
    last = name.rpartition(".")[2]
    assert any(last in span for path in DOCUMENTS for span in spans(path)), f"no document names {last} any more"


ABSENT = {"jax.tree_unflatten", "math.max"}  # said to be so, of others' calls


@each_document
def test_names_in_code_are_names_of_something(path):
    unknown = {span: name for span in spans(path) if (name := missing(span)) is not None}
    assert not unknown, "these are nowhere in the code"


@pytest.mark.parametrize("name", sorted(ABSENT))
def test_what_is_said_to_be_gone_is_gone(name):
    assert resolved(name) is None


# ---- commands -----------------------------------------------------------------------------
def commands(path):
    """Command lines of a document: those of consoles, indented ones, and spans that begin as one."""
    for fence, _, held in blocks(path):
        if fence == "console":
            yield from (line.strip().removeprefix("$ ") for line in held if line.strip().startswith("$ "))
    indented = re.findall(r"^ {4}((?:make|\.venv|XLA_FLAGS).*)$", prose(path), re.MULTILINE)
    yield from (re.split(r"\s{2,}#", line)[0] for line in indented)
    yield from (span for span in spans(path) if re.match(r"(make|psgd|python) [\w-]", span))


class Parsed(Exception):
    """A program has read its arguments."""


def read_by_program(module, arguments, monkeypatch):
    """Have a program of a package, or a file, read its arguments, and do nothing."""
    parse = ArgumentParser.parse_args

    def parse_only(parser, given=None, namespace=None):
        parse(parser, given, namespace)
        raise Parsed

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_only)
    if module == "conformance":
        return read_by_psgd(arguments, monkeypatch)
    main = importlib.import_module(module).main
    if main is faults.main:
        assert not arguments, "it takes none"
        return None
    with pytest.raises(Parsed):
        main(arguments)
    return None


def read_by_psgd(arguments, monkeypatch):
    """Have the command read its arguments; what they name is registered."""
    command, name = typer.main.get_command(cli.app), "psgd"
    while hasattr(command, "commands"):
        if not arguments:
            return
        name, *arguments = arguments
        if name.startswith("-"):
            assert any(name in option.opts for option in command.params), f"psgd has no option {name}"
            return
        command, before = command.get_command(None, name), command
        assert command is not None, f"{before.name} has no command {name}"
    needed = [p for p in command.params if p.required]
    if not arguments and needed:  # the name of a command, no call of it
        return
    given = command.make_context(name, list(arguments)).params
    registries = {"method": METHODS, "problem": PROBLEMS}
    for what, registry in registries.items():
        chosen = given.get(what) or ()
        assert set([chosen] if isinstance(chosen, str) else chosen) <= set(registry), f"{chosen} is no {what}"


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if list(commands(path))], ids=lambda path: path.name)
def test_commands_are_understood(path, monkeypatch):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in commands(path):
        words = [w for w in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", w)]
        program, *rest = [words[0].removeprefix(".venv/bin/"), *words[1:]]
        if program == "make":
            assert set(rest) <= targets, f"{line}: no such target"
        elif program == "psgd":
            read_by_psgd(rest, monkeypatch)
        elif program == "python" and rest[0] == "-m" and rest[1].split(".")[0] in PACKAGES:
            read_by_program(rest[1], rest[2:], monkeypatch)
        elif program == "python" and rest[0].endswith(".py"):
            assert (ROOT / rest[0]).is_file(), f"{line}: no such file"
        elif program == "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            asked = re.findall(r"\[([\w,]+)\]", line)
            assert {name for one in asked for name in one.split(",")} <= set(extras), f"{line}: no such extra"
        for word in words[1:]:
            if "/" in word and not word.startswith((".", "-")):
                assert (ROOT / word).exists(), f"{line}: {word} is not there"


@cache
def options():
    """All options of all commands and programs."""
    found = set()

    def gather(command):
        found.update(option for p in command.params for option in p.opts)
        for name in command.list_commands(None) if hasattr(command, "commands") else ():
            gather(command.get_command(None, name))

    gather(typer.main.get_command(cli.app))
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        found.update(re.findall(r'add_argument\(\s*f?"(--[\w-]+)"', path.read_text()))
    return found | {
        f"--{flag}" for flag in ("only", "method", "mesh", "mode", "layout")
    }  # `conformance.internal.mesh` in a loop


@each_document
def test_options_are_some_commands(path):
    for option in (m[1] for span in spans(path) if (m := re.match(r"(--[\w-]+)", span))):
        assert option in options(), f"no command takes {option}"


def test_the_changelog_names_every_command():
    for name in typer.main.get_command(cli.app).commands:
        assert f"`{name}`" in CHANGELOG.read_text()


# ---- counts -------------------------------------------------------------------------------
WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
COUNTED = {
    "geometries": len(GEOMETRIES),
    "methods": len(METHODS),
    "drivers": len(DRIVERS),
    "problems": len(PROBLEMS),
    "planted faults": len(faults.FAULTS),
    "contracts": len(CONTRACTS),
    "packages": len(PACKAGES),
}
SOME = 5  # so many, and fewer, may be a part of them


TENS = {"thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
NUMBERS = {**{word: n for n, word in enumerate(WORDS)}, **TENS}
NUMBER = rf"(\d[\d,]*|{'|'.join(NUMBERS)})"


@each_document
def test_counts_are_those_of_the_registries(path):
    text = re.sub(r"\s+", " ", prose(path))
    for noun, count in COUNTED.items():
        for said in re.finditer(rf"\b{NUMBER} (?:\w+ )?{noun}\b", text, re.IGNORECASE):
            number = NUMBERS.get(said[1].lower()) or int(said[1].replace(",", ""))
            assert number <= SOME or number == count, f"{said[0]}: there are {count}"


def test_every_method_has_its_row_where_all_were_measured():
    """Runs on meshes, long runs and hostile gradients: each method by its name, and nobody else."""
    long, _, hostile = (ROOT / "docs" / "soak.md").read_text().partition("\n## Hostile gradients")
    meshes, *_ = (ROOT / "docs" / "sharding.md").read_text().partition("<!-- counts -->")
    for text, column in ((meshes, 0), (long, 1), (hostile, 2)):
        lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.rstrip().endswith("pass |")]
        assert {line[column].partition(",")[0] for line in lines} == set(METHODS)


def section(page, heading):
    """The text under a heading that begins so."""
    _, _, rest = (ROOT / "docs" / page).read_text().partition(f"\n## {heading}")
    assert rest, f"docs/{page} has no such heading"
    return rest.partition("\n## ")[0]


def stale() -> set[str]:
    """The files that the registries have left behind: tables, stubs, and documents that should name every record."""
    files = {document(name) for name in TABLES if with_tables(name) != document(name).read_text()}
    files |= {ROOT / path for path, stub in STUBS.items() if stub() != (ROOT / path).read_text()}
    files |= {path for path in TELLERS if not all(name in path.read_text() for name in METHODS)}
    return {str(path.relative_to(ROOT)) for path in files}


def told_to_touch(what):
    """The row of the table in contributing.md: the files that are written by hand, and by the two commands."""
    row = next(line for line in section("contributing.md", "What that touches").splitlines() if f"| {what}" in line)
    by_hand, generated = (set(re.findall(r"`([^`]+)`", cell)) for cell in row.strip("| ").split("|")[1:])
    return by_hand, generated


def test_a_new_method_makes_stale_what_contributing_tells(monkeypatch):
    toy = type("Toy", (next(iter(METHODS.values())),), {"name": "toy", "title": "Toy"})
    monkeypatch.setitem(METHODS, "toy", toy)
    monkeypatch.setattr(psgd_torch_backend, "Toy", named_class(toy, "psgd_torch_backend"), raising=False)
    for name, make in (("toy", named_function), ("scale_by_toy", scaling)):
        monkeypatch.setattr(psgd_jax_backend, name, make(toy, "psgd_jax_backend"), raising=False)
    assert told_to_touch("a method") == ({"psgd/methods/quad_torch.py"}, stale())


def test_a_new_geometry_makes_stale_what_contributing_tells(monkeypatch):
    monkeypatch.setitem(GEOMETRIES, "toy", GEOMETRIES["EQ"])
    assert told_to_touch("a geometry") == ({"psgd/geometry.py"}, stale())


# ---- what is compiled ---------------------------------------------------------------------
def compiled_parts(method, shape, monkeypatch, **settings):
    """What a step of one parameter compiles on a CPU with `compile=True`."""
    compiled = []
    for module in (_compile, _fused):
        monkeypatch.setattr(module, "compiled", lambda f: compiled.append(f.__name__) or f)
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = getattr(psgd_torch_backend, method.title)([p], compile=True, **settings)
    p.grad = torch.ones(shape)
    pair = {"Hvp": [p.grad], "vector": [p.grad], "update_preconditioner": False}
    optimizer.step(**(pair if method().recipe().newton else {}))
    return compiled


@pytest.mark.parametrize("name", METHODS)
def test_compile_true_compiles_on_a_cpu_what_documents_say(name, monkeypatch):
    method, large = METHODS[name], (_fused.LARGE // 8, 8)
    if method().recipe().joint:
        assert compiled_parts(method, (4, 3), monkeypatch) == ["step"]
        return
    assert compiled_parts(method, (4, 3), monkeypatch) == []
    assert compiled_parts(method, large, monkeypatch) == ["before", "after"]
    bounds = {f.name: 1.0 for f in fields(method) if f.name in ("grad_clip_max_norm", "update_global_norm_clip")}
    if bounds:
        assert compiled_parts(method, large, monkeypatch, **bounds) == []


def test_documents_name_the_methods_that_compile_whole_steps():
    text = re.sub(r"\s+", " ", (ROOT / "docs" / "from-adamw-in-pytorch.md").read_text())
    named = re.search(r"A method with one preconditioner of all parameters \(([^)]*)\) has one vector", text)[1]
    assert set(re.findall(r"\w+", named)) == {m.title for m in METHODS.values() if m().recipe().joint}


# ---- versions -----------------------------------------------------------------------------
def test_versions_of_others_are_those_that_are_installed_to_be_measured():
    """In the tables of benchmarks, and in the notes to them."""
    pinned = dict(re.findall(r"([\w-]+)==([\d.]+)", re.sub(r"PEERS_QUAD :=.*", "", (ROOT / "Makefile").read_text())))
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for name in ("kron-torch", "quad-torch", "heavyball", "pytorch-optimizer", "psgd-jax"):
        said = set(re.findall(rf"{name} (\d+\.\d+\.\d+)", text)) - ({"0.4.5"} if name == "quad-torch" else set())
        assert said == {pinned[name]}, name


# ---- numbers ------------------------------------------------------------------------------
def default(method, name):
    """Of a hyperparameter."""
    return next(f.default for f in fields(METHODS[method]) if f.name == name)


def refusal(method, **wrong):
    """What is said of a hyperparameter that is out of range."""
    with pytest.raises(ValueError) as raised:
        METHODS[method].of(**wrong)
    return str(raised.value)


def operations(method, shape, fit, **settings):
    """Of the products of a step of one tensor."""
    return floor.flops(floor.of_step(method, settings, (shape,), "float32", fit=fit))


def counted_in_strips():
    """GFLOP of a fit and of what a step does besides: as it is, and without strips."""
    found = []
    for most in (structured.MOST, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(structured, "MOST", most)
            both, rest = (operations("kron", (1024, 256), fit) / 1e9 for fit in (True, False))
            found.append((f"{both - rest:.1f}", f"{rest:.2f}"))
    return zip(*found, strict=True)


def counted_with_p():
    """What a step of a square matrix takes with P kept, over one without."""
    kinds = [(method, fit) for method in ("quad", "procrustes") for fit in (True, False)]
    taken = [[operations(method, (1024, 1024), fit, keep_p=keep) for method, fit in kinds] for keep in (True, False)]
    return {kind: f"{kept / not_kept:.2g}" for kind, kept, not_kept in zip(kinds, *taken, strict=True)}


@cache
def numbers():
    """(page, what it says), with the numbers from the code."""
    from benchmarks import peers, sets
    from benchmarks.cost import scale, variants
    from benchmarks.training import gpt, train, transfer
    from benchmarks.training.search import EdgeSearch, rate
    from psgd import rotate
    from psgd_jax_backend import _per_tensor as jax_per_tensor
    from psgd_jax_backend import _sharding

    def count(model):
        return f"{sum(p.numel() for p in model.parameters()):,}"

    stepped, task, size = variants.Setup(), train.tasks()["lm"], gpt.Size()
    images, search, races = train.tasks()["digits"], EdgeSearch(), train.Races()
    small, chosen = sets.SETS["gpt-4x256"], trainers.CHOSEN
    schedule = default("kron", "preconditioner_update_probability")
    last = next(t for t in range(1, 10_000) if schedule(t) == schedule.min_prob)
    flat, period = schedule.flat_start, int(np.ceil(1 / schedule.min_prob))
    peak = float(np.finfo(np.float32).max) ** 0.25
    mirrored = structured.NARROWEST_MIRRORED
    (fit, applied), kept = counted_in_strips(), counted_with_p()
    sweeps, tolerance = rotate.polished.__defaults__
    share = scale.share_of_training("kron")["share"]
    rates = ", ".join(f"{rate(k):.2g}" for k in search.begun[:-1])
    valley, trial = valley_runs.settings("EQ", 0), valley_runs.Setup()

    return [
        # the mathematics
        ("mathematics.md", f"from 1, after {flat:g} flat steps and at δ = {schedule.decay}, to {schedule.min_prob}"),
        ("mathematics.md", f"where it is from step {last:,} on: every {period}th step fits"),
        ("mathematics.md", f"Hermitian to {100 * tolerance:g} % of its largest entry, at most {sweeps} times"),
        # decisions
        ("decisions.md", f"which is exactly 1 below {peak:.1e}".replace("e+0", "e")),
        ("decisions.md", f"{WORDS[MAX_SKIPS].capitalize()} in a row raise"),
        ("decisions.md", f"more than {WORDS[jax_per_tensor.LONG]} times as large as its factors"),
        # contributing
        ("contributing.md", refusal("kron", b1=1.5)),
        # from AdamW
        ("from-adamw-in-pytorch.md", f"of tensors of at least {_fused.LARGE:,} numbers"),
        ("from-adamw-in-pytorch.md", f"those of more than {default('affine', 'max_skew_triangular')} numbers"),
        ("from-adamw-in-pytorch.md", f"{WORDS[MAX_SKIPS]} in a row (`max_skips`) raise an error"),
        ("from-adamw-in-pytorch.md", f"in the end at every {period}th step"),
        ("from-adamw-in-pytorch.md", f"{transfer.Setup().steps} steps without warm-up"),
        ("from-adamw-in-pytorch.md", f"a convolutional net of {count(transfer.wide_net())} numbers"),
        ("from-adamw-in-pytorch.md", f"a transformer of one layer and {count(transfer.Transformer())} numbers"),
        ("from-adamw-in-pytorch.md", f"at rank {default('low_rank_approximation', 'uvd_rank_of_approximation')}"),
        ("from-adamw-in-optax.md", f"raises after {WORDS[MAX_SKIPS]} in a row"),
        # conformance
        ("conformance.md", "from four *twins*" if compare.envelope.__defaults__ == (4,) else "not so"),
        # sharding
        ("sharding.md", f"other factors of {_sharding.WORTH_SPREADING} numbers and more"),
        ("sharding.md", f"weighs the state of {mesh_measures.DEEP} layers"),
        ("sharding.md", f"compiling an update of {mesh_measures.SHALLOW} and of {mesh_measures.DEEP} layers"),
        (
            "sharding.md",
            f"State of {mesh_measures.DEEP} layers of {mesh_measures.WIDTH} x {mesh_measures.WIDTH} in one leaf",
        ),
        ("sharding.md", f"on {WORDS[mesh_runs.DEVICES]} devices that one processor plays"),
        ("sharding.md", f"within {mesh_runs.BOUND:.0e} of one device"),
        # soak
        ("soak.md", f"{WORDS[soak.CHECKPOINTS]} times on the way and at the end of it"),
        ("soak.md", f"learning rate is {soak.RATE} throughout"),
        ("soak.md", f"low ranks are {soak.RANK}"),
        ("soak.md", f"at most {soak.FASTEST} times as large"),
        ("soak.md", f"below {WORDS[round(soak.LARGEST_LOSS / soak.RATE)]} times the learning rate"),
        ("soak.md", "once a thousand steps are over" if soak.SETTLED == 1000 else "not so"),
        *(("soak.md", f"| {run.name} | {run.steps:,} |") for run in soak.RUNS),
        # training
        ("training.md", f"a GPT of {WORDS[size.layers]} layers, width {size.width} and {count(gpt.GPT(size))} numbers"),
        ("training.md", f"{task.steps} batches of {size.batch} windows of {size.context} characters"),
        ("training.md", f"a convolutional net of {count(train.small_net())} numbers"),
        ("training.md", f"means of {WORDS[images.seeds]} seeds"),
        ("training.md", f"A step takes {train.PRODUCT:.4f} of each weight"),
        ("training.md", f"Everyone tries {rates} and {rate(search.begun[-1]):.2g} over a quarter"),
        ("training.md", f"{WORDS[search.more]} at most. The best {WORDS[search.finals]} are run in full"),
        ("training.md", f"All train {races.steps} steps in turn"),
        ("training.md", f"over {WORDS[races.count]} such races"),
        ("training.md", f"| `momentum` | {chosen['momentum']} |"),
        ("training.md", f"| `whiten_grad` | {chosen['whiten_grad']} |"),
        ("training.md", f"{chosen['lr_preconditioner']}, {chosen['preconditioner_lr']} |"),
        ("training.md", f"| `exact_hessian_vector_product` | {chosen['exact_hessian_vector_product']} |"),
        ("training.md", f"(a perfect loss is {-0.91 * log(0.91) - 0.09 * log(0.01):.2f})"),
        # benchmarks
        ("benchmarks.md", f"{small.numbers / 1e6:.1f} million numbers in {len(small.shapes)} tensors"),
        ("benchmarks.md", f"factors of axes above {peers.LONGEST} diagonal"),
        ("benchmarks.md", f"Forty layers of {stepped.layers.size} x {stepped.layers.size}"),
        ("benchmarks.md", f"{stepped.rounds} rounds of {stepped.steps} steps each"),
        ("benchmarks.md", f"`kron` fits at every step at first and at every {period}th in the end"),
        ("benchmarks.md", f"Rosenbrock's function in {trial.dimensions} dimensions"),
        ("benchmarks.md", "lr_preconditioner {lr_preconditioner}, momentum {momentum}".format(**valley)),
        ("benchmarks.md", f"in {trial.valley_steps:,} steps of float64; medians of {WORDS[trial.seeds]} seeds"),
        ("benchmarks.md", f"Fitting a {trial.size} x {trial.size} Hessian"),
        ("benchmarks.md", f"drawn to step {trial.shown:,}"),
        *(("benchmarks.md", f"`{name}`") for name in sets.SETS),
        # performance
        ("performance.md", f"of the move of `quad` 7/8 from {2 * mirrored} rows on, 13/16 from {4 * mirrored}"),
        ("performance.md", f"below {2 * mirrored} rows, or where"),
        ("performance.md", f"triangles below {2 * structured.NARROWEST} rows are multiplied whole"),
        ("performance.md", f"in {WORDS[structured.MOST]} strips"),
        ("performance.md", f"a fit of `kron` to 1024 x 256 takes {fit[0]} instead of {fit[1]} GFLOP"),
        ("performance.md", f"applying it {applied[0]} instead of {applied[1]}"),
        ("performance.md", f"a step that fits is {kept['quad', True]} of `quad` and {kept['procrustes', True]} of"),
        ("performance.md", f"one that does not {kept['quad', False]} of both"),
        ("performance.md", f"as many as have {torch_per_tensor.ROOM['cpu'] // 10**6} million numbers of state"),
        ("performance.md", f"takes {100 * share:.1f} % of the operations"),
        ("performance.md", f"at {scale.TOKENS:,} tokens"),
    ]


def of_a_matrix(method, **settings):
    """What is kept of it, and what a step and a fit take."""
    (found,) = parameter_costs(METHODS[method](**settings), [Parameter("w", (1024, 1024))])
    return found


def test_what_is_said_of_costs_by_half_and_by_times():
    page = (ROOT / "docs" / "from-adamw-in-pytorch.md").read_text()
    assert '`memory_save_mode="one_diag"` halves the cost of `Kron`; its state is then 8 bytes' in page
    usual, spared = of_a_matrix("kron"), of_a_matrix("kron", memory_save_mode="one_diag")
    assert [spared.apply / usual.apply, spared.fit / usual.fit] == pytest.approx([0.5, 0.5], rel=0.01)
    assert round(spared.state / 1024**2) == 8
    page = re.sub(r"\s+", " ", (ROOT / "docs" / "from-adamw-in-optax.md").read_text())
    assert "a fit of dense factors costs two to four times what the rest of a step does" in page
    for name, method in METHODS.items():
        if not method().recipe().joint:
            row = of_a_matrix(name)
            assert 2 <= row.fit / row.apply <= 4, name


@pytest.mark.parametrize("page", sorted({page for page, _ in numbers()}))
def test_numbers_are_those_of_the_code(page):
    text = re.sub(r"\s+", " ", (ROOT / "docs" / page).read_text())
    for said in (said for at, said in numbers() if at == page):
        assert said in text, f"docs/{page} does not say: {said}"
