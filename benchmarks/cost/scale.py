"""How the time of a step grows with the number of layers and with their width, and what it is of training.

    psgd bench scale --plot docs/scaling.png --markdown

Equal square layers, stepped and fitted by ours, eager and compiled in torch and jitted in JAX, which take turns with
the bare matrix products of the step: what counting alone predicts. The operations that a step launches hardly grow with
the number of layers, as equal ones are stepped in one call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks.cost import floor
from benchmarks.peers import PEERS, PERIOD, USUAL
from benchmarks.racing import Field, field_of
from benchmarks.sets import GPTS, SETS, ParameterSet
from benchmarks.tables import Cells, JsonFile, Markdown, Quick, frameworks, machine, methods, tell
from conformance.plots import colour, hue, png, quiet
from conformance.terminal import writable
from psgd.methods import METHODS
from psgd.summary import Parameter, parameter_costs

DEPTHS, WIDTH = (2, 4, 8, 16, 32), 128  # layers, of that width
WIDTHS, DEPTH = (64, 128, 256, 512, 1024), 4  # so many layers each
VARIANTS = {"torch, eager": ("torch", False), "torch, compiled": ("torch", True), "jax": ("jax", True)}
PRODUCTS = "products"
TOKENS = 65_536


def layers(count: int, width: int, rounds: int) -> ParameterSet:
    """Equal square layers."""
    return ParameterSet(f"{count} of {width} x {width}", ((width, width),) * count, "equal layers", rounds, pool=4)


def point(field: Field, method: str, variants: Iterable[str]) -> dict[str, Any]:
    """Milliseconds of each variant on one set of layers, and how many operations an eager step launches."""
    for variant in variants:
        framework, compiled = VARIANTS[variant]
        entrant = PEERS[framework, method][0]
        field.enter(
            variant, entrant, entrant.spec(framework, compiled=compiled, dtype="float32", probability=1.0), laps=3
        )
    settings = dict(PEERS["torch", method][0].settings)
    products = floor.of_step(method, settings, field.parameters.shapes, "float32", fit=True)
    field.enter_products(PRODUCTS, "torch", "float32", products)
    seen = field.race(field.parameters.rounds)
    return {
        "ms": {variant: float(1e3 * np.median(x)) for variant, x in seen.items()},
        "launches": field.ask(next(iter(VARIANTS)), "launches"),
        "products": sum(often for *_, often in products),
        "flops": floor.flops(products),
        "why": {str(k): v for k, v in field.failures.items()},
    }


def measure(method: str, console: Console, *, quick: bool) -> dict[str, Any]:
    """All figures, as plain data."""
    depths, width, widths, depth, rounds = ((1, 2), 4, (4, 8), 1, 2) if quick else (DEPTHS, WIDTH, WIDTHS, DEPTH, 7)
    variants = [
        variant
        for variant, (framework, compiled) in VARIANTS.items()
        if not (quick and framework == "torch" and compiled)
    ]
    made: list[dict[str, Any]] = []
    for panel, points in (
        ("layers", [(n, layers(n, width, rounds)) for n in depths]),
        ("width", [(n, layers(depth, n, rounds)) for n in widths]),
    ):
        for at, parameters in points:
            console.log(f"{method}: {parameters.name}")
            with field_of(parameters) as field:
                made.append({"panel": panel, "at": at, "set": parameters.name, **point(field, method, variants)})
    return {"machine": machine(), "method": method, "rows": made, "share": share_of_training(method)}


def share_of_training(method: str, name: str = "gpt-12x768", tokens: int = TOKENS) -> dict[str, Any]:
    """Operations of a step of an optimizer as it is by default, beside those of a training step; by count alone.

    A method that may fit now and then is counted at one fit in a period.
    """
    parameters = [Parameter(str(i), shape) for i, shape in enumerate(SETS[name].shapes)]
    counted = parameter_costs(METHODS[method](), parameters)
    every = PERIOD if PEERS["torch", method][0].probability else 1
    own = sum(r.apply for r in counted) + sum(r.fit for r in counted) / every
    training = GPTS[name].training_flops(tokens)
    return {
        "set": name,
        "tokens": tokens,
        "fits_every": every,
        "optimizer": own,
        "training": training,
        "share": own / training,
    }


def growth(points: Sequence[Mapping[str, Any]], of: str) -> str:
    """A figure at the first and at the last point."""
    first, last = points[0], points[-1]
    return f"{first[of]} at {first['at']}, {last[of]} at {last['at']}"


def by_panel(result: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The points of each panel."""
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for r in result["rows"]:
        panels.setdefault(r["panel"], []).append(r)
    return panels


def cells(result: Mapping[str, Any]) -> Cells:
    """A row for each set of layers."""
    variants = list(dict.fromkeys(variant for r in result["rows"] for variant in r["ms"]))
    head = ["set", *variants, "launched", "operations"]

    def ms(r: Mapping[str, Any], variant: str) -> str:
        return f"{r['ms'][variant]:.2f} ms" if variant in r["ms"] else r["why"].get(variant, "").replace("|", "/")

    return [
        head,
        *(
            [r["set"], *(ms(r, variant) for variant in variants), str(r["launches"]), f"{r['flops']:.3g}"]
            for r in result["rows"]
        ),
    ]


def last_line(result: Mapping[str, Any]) -> str:
    """How launches grow, and the share of training."""
    share = result["share"]
    return (
        f"Launched operations over layers: {growth(by_panel(result)['layers'], 'launches')}. Of a training step of "
        f"{share['set']} at {share['tokens']:,} tokens, {result['method']} fitting every {share['fits_every']} steps "
        f"is {100 * share['share']:.2f} % of the operations ({share['optimizer']:.3g} of {share['training']:.3g})."
    )


def picture(result: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: time over the number of layers and over their width."""
    panels = by_panel(result)
    with png(path, (10.4, 4.2)) as figure:
        row = figure.subplots(1, len(panels))
        for axes, (name, points) in zip(row, panels.items(), strict=True):
            draw(axes, name, points)
            quiet(axes)
            axes.get_legend().remove()
        row[0].set_ylabel("milliseconds a step", color=colour("muted"))
        handles, labels = row[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), labelcolor=colour("ink"))


def draw(axes: Any, name: str, points: Sequence[Mapping[str, Any]]) -> None:
    """One panel, both axes logarithmic."""
    at = [p["at"] for p in points]
    for i, variant in enumerate(VARIANTS):
        some = [(p["at"], p["ms"][variant]) for p in points if variant in p["ms"]]
        if some:
            axes.plot(*zip(*some, strict=True), color=hue(i), linewidth=2.4, marker="o", markersize=4, label=variant)
    predicted = [p["ms"][PRODUCTS] for p in points]
    style = {"color": colour("muted"), "linewidth": 1.2, "linestyle": (0, (4, 2))}
    axes.plot(at, predicted, label="its matrix products alone", **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_xticks(at, [str(n) for n in at])
    other = points[0]["set"].split(" of ")
    title = f"layers, each {other[1]}" if name == "layers" else f"width of {other[0]} layers"
    axes.set_title(title)


def command(
    method: Annotated[str, typer.Option(help="Of ours.")] = USUAL[0],
    plot: Annotated[Path | None, typer.Option(dir_okay=False, metavar="FILE", help="Draw it here, as a PNG.")] = None,
    json_file: JsonFile = None,
    markdown: Markdown = False,
    quick: Quick = False,
) -> None:
    """Time a step over the number of layers and their width, and count its share of training."""
    writable(json_file, plot)
    frameworks(None)
    (name,) = methods([method])
    result = measure(name, Console(stderr=True), quick=quick)
    if plot:
        picture(result, plot)
    tell(
        result,
        {f"A step of {method} on equal layers": cells(result)},
        json_file,
        as_markdown=markdown,
        last=last_line(result),
    )
