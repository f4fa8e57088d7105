"""What the tests of the documents share: which there are, their parts, and the tables that the registries make."""

import re
from collections.abc import Callable
from dataclasses import fields, replace
from math import inf
from pathlib import Path

from conformance import tolerances
from conformance.drivers import DRIVERS
from conformance.problems import PROBLEMS
from psgd.geometry import GEOMETRIES, mean_unknown
from psgd.kron import Kronecker
from psgd.lra import LowRankNormaliser
from psgd.methods import METHODS
from psgd.spectral import TraceBound
from psgd.summary import Parameter, in_flops, parameter_costs

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [*([README] if README.is_file() else []), *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^ *```")


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def blocks(path):
    """Each fenced block as (what its fence says, first line number from 0, lines)."""
    said, start, held = None, 0, []
    for i, line in enumerate(path.read_text().splitlines()):
        if not FENCE.match(line):
            held.append(line)
        elif said is None:
            said, start, held = line.strip().strip("`"), i + 1, []
        else:
            yield said, start, held
            said = None


def prose(path):
    """A document without its fenced blocks."""
    text, inside = [], False
    for line in path.read_text().splitlines():
        inside ^= bool(FENCE.match(line))
        text.append("" if inside else line)
    return "\n".join(text)


MATHEMATICS = ROOT / "docs" / "mathematics.md"
CHANGELOG = ROOT / "docs" / "CHANGELOG.md"
TELLERS = [path for path in (README, MATHEMATICS) if path in DOCUMENTS]


# ---- tables -----------------------------------------------------------------------------
def table(head, rows):
    cells = [list(head), ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in cells)


def code(value):
    return f"`{value}`"


def called(function: Callable | str | None) -> str:
    """The name of a rule; of one that a function made, that function's."""
    return code(function if isinstance(function, str) else function.__qualname__.split(".")[0])


def geometries():
    head = ("geometry", "fits", "factor of P", "measure", "refer", "lift", "E T2", "move", "diagonal", "turn")

    def row(name, g):
        expected = f"drawn ({called(g.expected)})" if g.probed is mean_unknown else called(g.expected)
        rules = map(called, (g.root.factor, g.measure or "P x", g.refer, g.lift))
        turn = "" if g.turn is None else called(g.turn)
        return name, "P" if g.fits_p else "Q", *rules, expected, called(g.move), called(g.move_diagonal), turn

    return table(head, [row(name, g) for name, g in GEOMETRIES.items()])


PRINTED = {" <- ": " ← ", " - ": " − ", "^-H": "⁻ᴴ", "^H": "ᴴ", "^-1": "⁻¹", "^2": "²", "|": r"\|"}


def equation(rule: Callable | str) -> str:
    """What a rule is, by the first sentence of its own documentation, without its source."""
    if isinstance(rule, str):
        return "by the factors of P"
    text = re.sub(r" \[[^\]]*\]", "", " ".join(rule.__doc__.split())).split(". ")[0].rstrip(".")
    for plain, printed in PRINTED.items():
        text = text.replace(plain, printed)
    return text


def verbs():
    columns = {
        "factor of P": lambda g: g.root.factor,
        "measure, refer": lambda g: (g.measure or "P x", g.refer),
        "lift": lambda g: g.lift,
        "E T2": lambda g: g.expected,
        "move": lambda g: g.move,
        "diagonal": lambda g: g.move_diagonal,
        "turn": lambda g: g.turn or (),
    }
    # Those too of which a method has its own.
    used = [*GEOMETRIES.values(), *(x for x in map(geometry_of, METHODS.values()) if x is not None)]
    lines = []
    for verb, rule in columns.items():
        found = [rule(g) for g in used]
        found = [x for one in found for x in (one if isinstance(one, tuple) else (one,))]
        lines += [(verb, called(x), equation(x)) for x in dict.fromkeys(found)]
    return table(("verb", "rule", "what it is"), lines)


def geometry_of(method):
    return getattr(method().recipe().preconditioner, "geometry", None)


def dampings():
    rules = dict.fromkeys(method().recipe().damping for method in METHODS.values())
    told = (equation(rule).replace("amount", "λ").replace("eps", "ε") for rule in rules)
    return table(("rule", "h becomes"), [(called(rule), text) for rule, text in zip(rules, told, strict=True)])


def geometry_name(geometry):
    """The registered geometry that a method uses, perhaps with another way to apply P or to take the mean over v."""
    kept = {name: getattr(geometry, name) for name in ("root", "expected", "probed")}
    alike = (name for name, g in GEOMETRIES.items() if geometry == replace(g, **kept))
    return next(alike, "its own")


def averaging(recipe, schedule):
    return f"{called(schedule.averaging)}, {schedule.momentum:g}" if recipe.momentum else "none"


def memory(schedule, kind):
    """What a step of the factors is divided by."""
    rule = kind.normaliser.diagonal if isinstance(kind.normaliser, LowRankNormaliser) else kind.normaliser
    return f"{called(rule)}, " + (
        f"running L, {schedule.beta_lipschitz:g}" if schedule.beta_lipschitz else "of the moment"
    )


def point(method):
    """Where a method with its defaults lies on each axis of the grid."""
    recipe, schedule = method().recipe(), method().schedule()
    kind, clip = recipe.preconditioner, recipe.clip
    return {
        "momentum": averaging(recipe, schedule),
        "fits to": recipe.whiten,
        "complex numbers": "yes" if method.complex_parameters else "refused",
        "trigger": called(schedule.fit),
        "damping": f"{called(recipe.damping)}, {schedule.damping:g}",
        "criterion": "newton" if recipe.newton else "whitening",
        "preconditioner": f"{type(kind).__name__}, {'of all parameters' if recipe.joint else 'of each tensor'}",
        **of_axes(kind),
        "normaliser": memory(schedule, kind),
        "order": "fit, then precondition" if recipe.fit_first else "precondition, then fit",
        "balance": f"{called(schedule.balance)}, {'after' if recipe.balance_last else 'before'} the fit",
        "layout": called(recipe.layout),
        "start": started(method(), recipe, kind),
        "clip": f"RMS {clip.rms:g}, entry {clip.entry:g}",
        "gain": f"{recipe.gain:g}",
        "decay": f"{method().weight_decay:g}" + ("" if recipe.decoupled else ", in the gradient"),
    }


def of_axes(kind):
    """The axes of the grid that preconditioners of axes alone have."""
    if not isinstance(kind, Kronecker):
        return dict.fromkeys(("geometry", "E T2 over v", "factor of P", "norm bound"), "")
    bound = kind.bound
    offset = f" + {bound.offset:g}" if bound.offset else ""
    size = "trace" if isinstance(bound, TraceBound) else f"k = {bound.probes}, m = {bound.products}{offset}"
    return {
        "geometry": geometry_name(kind.geometry),
        "E T2 over v": called(kind.geometry.probed),
        "factor of P": called(kind.geometry.root.factor),
        "norm bound": size,
    }


def started(method, recipe, kind):
    """How the first scale comes about."""
    share = "not split" if isinstance(kind, Kronecker) and not kind.split else "split"
    if method.initial_scale() is not None:
        return f"{method.initial_scale():g}, {share}"
    return f"p = {recipe.initial_scale.power}, {'one for all' if recipe.initial_scale.shared else 'one each'}, {share}"


def grid():
    points = {name: point(method) for name, method in METHODS.items()}
    axes = next(iter(points.values()))
    return table(("axis", *map(code, points)), [(axis, *(p[axis] for p in points.values())) for axis in axes])


def bounds():
    def row(kind, dtype, bound):
        value = f"{bound.factor:g} × envelope" if bound.value is None else f"{bound.value:g}"
        return kind, dtype, value, bound.reason

    rows = [row("step-locked, any problem", dtype, b) for dtype, b in tolerances.LOCKED.items()]
    rows += [row("free, not chaotic", dtype, b) for dtype, b in tolerances.CONTRACTIVE.items()]
    return table(("comparison", "dtype", "bound", "reason"), [*rows, row("free, chaotic", "any", tolerances.ENVELOPE)])


def problems():
    rows = [(code(p.name), p.summary, "yes" if p.chaotic else "no") for p in PROBLEMS.values()]
    return table(("problem", "what it is", "chaotic"), rows)


def drivers():
    def row(name, driver):
        summary = driver.__doc__.splitlines()[0]
        return code(name), summary, "its own" if driver.differentiates else "given"

    return table(("driver", "what it is", "gradients"), [row(*item) for item in DRIVERS.items()])


def costs():
    """Of a matrix, as it is told of every model, by the defaults and with a momentum where there may be one."""
    size = 1024
    matrix = Parameter("w", (size, size))

    def kept(method):
        (row,) = parameter_costs(method, [matrix])
        return f"{row.state / size**2:,.0f}"

    def line(method):
        made = method()
        (row,) = parameter_costs(made, [matrix])
        later = getattr(made, "momentum", 1) == 0
        state = kept(made) + (f"; with momentum {kept(replace(made, momentum=0.9))}" if later else "")
        return code(method.title), state, in_flops(row.apply), in_flops(row.fit)

    def square(method):
        """Has it a number for every pair of numbers?"""
        made = method().recipe()
        return made.joint and any(q == (size, size) for q in made.preconditioner.shapes((size,)))

    shown = (method for method in METHODS.values() if not square(method))
    return table(("method", "state", "step", "a fit adds"), map(line, shown))


def defaults():
    """What a user of another optimizer has to know of the defaults."""

    def own(made, wanted):
        """The first hyperparameter of a wanted name, with its default."""
        found = (f.name for f in fields(made) if re.search(wanted, f.name))
        return next((f"{code(name)}, {getattr(made, name):g}" for name in found), "")

    def line(method):
        made = method()
        clip = made.recipe().clip
        bounds = {"RMS": clip.rms, "entry": clip.entry}
        bounded = ", ".join(f"{what} {x:g}" for what, x in bounds.items() if x < inf)
        longest = own(made, "max_size")
        rates = f"{made.lr:g}", f"{made.weight_decay:g}"
        return code(method.title), *rates, own(made, "^(momentum|b1)$"), longest, bounded

    head = ("method", "rate", "weight decay", "momentum", "longest dense axis", "bound on its direction")
    return table(head, map(line, METHODS.values()))


def methods():
    """What each method is and whose, by the first sentences of their records."""

    def line(name, method):
        functions = ", ".join(map(code, (name, *filter(None, [method.also]))))
        return code(method.title), functions, method.summary.rstrip("."), method.source.split()[0]

    return table(("PyTorch", "JAX", "what it does", "from"), [line(*item) for item in METHODS.items()])


TABLES = {
    "README.md": {"methods": methods},
    "mathematics.md": {"geometries": geometries, "verbs": verbs, "dampings": dampings, "grid": grid},
    "from-adamw-in-pytorch.md": {"costs": costs, "defaults": defaults},
    "conformance.md": {"bounds": bounds, "problems": problems, "drivers": drivers},
}


def document(name):
    """The file of a document, by its name alone."""
    return ROOT / name if name == "README.md" else ROOT / "docs" / name


def with_tables(name):
    """A document with its tables as they should be. They lie between `<!-- table -->` and `<!-- end -->`."""
    text = document(name).read_text()
    for mark, make in TABLES[name].items():
        pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, found = pattern.subn(lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text)
        assert found == 1, f"{name} has {found} places for the table of {mark}"
    return text
