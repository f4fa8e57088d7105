"""How a step grows is measured, drawn and told; and its share of training is counted."""

import json
from math import prod

import matplotlib.image
import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.cost import scale
from benchmarks.racing import field_of
from benchmarks.sets import GPTS, SETS
from conformance import cli
from psgd.methods import METHODS
from psgd.summary import Parameter, parameter_costs

pytestmark = pytest.mark.xdist_group("scale")  # what they look at is made once

METHOD = "kron"


@pytest.fixture(scope="module")
def measured():
    """Two points are real, one of them for each panel; the others are made up of the first."""
    with field_of(scale.layers(2, 4, 2)) as field:
        return scale.point(field, METHOD, ["torch, eager", "jax"])


@pytest.fixture
def result(measured, monkeypatch):
    monkeypatch.setattr(scale, "point", lambda field, method, variants: {**measured, "variants": list(variants)})
    return scale.measure(METHOD, Console(quiet=True), quick=True)


def test_every_variant_and_the_bare_products_are_timed(measured):
    assert list(measured["ms"]) == ["torch, eager", "jax", "products"] and not measured["why"]
    assert all(ms > 0 for ms in measured["ms"].values()) and measured["launches"] > 100 > measured["products"]


def test_there_is_a_panel_of_layers_and_one_of_widths(result):
    panels = scale.by_panel(result)
    assert {name: [p["at"] for p in points] for name, points in panels.items()} == {"layers": [1, 2], "width": [4, 8]}
    assert all(p["variants"] == ["torch, eager", "jax"] for p in result["rows"])
    assert [p["set"] for p in panels["width"]] == ["1 of 4 x 4", "1 of 8 x 8"]


@pytest.mark.parametrize("flags", [[], ["--markdown"]])
def test_the_command_prints_writes_and_draws(result, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "measure", lambda method, console, quick: result)
    png, file = tmp_path / "scaling.png", tmp_path / "scale.json"
    done = CliRunner().invoke(cli.app, ["bench", "scale", "--plot", str(png), "--json", str(file), *flags])
    assert done.exit_code == 0, done.output
    assert json.loads(file.read_text())["rows"] and "2 of 4 x 4" in done.output
    assert "Launched operations over layers" in done.output and "of the operations" in done.output
    assert matplotlib.image.imread(png).std() > 0.01


def test_a_variant_that_does_not_run_has_its_reason_in_its_cell(result):
    result["rows"][1] = {**result["rows"][1], "ms": {"jax": 1.0}, "why": {"torch, eager": "no | torch"}}
    head, _, second, *_ = scale.cells(result)
    assert dict(zip(head, second, strict=True))["torch, eager"] == "no / torch"


@pytest.mark.parametrize(("method", "every"), [("kron", 34), ("quad", 1)])
def test_the_share_of_training_is_that_of_the_counts(method, every):
    share = scale.share_of_training(method)
    counted = parameter_costs(METHODS[method](), [Parameter("", s) for s in SETS["gpt-12x768"].shapes])
    own = sum(r.apply + r.fit / every for r in counted)
    assert share["optimizer"] == pytest.approx(own) and share["fits_every"] == every
    assert share["share"] == pytest.approx(own / GPTS["gpt-12x768"].training_flops(65_536))
    products = sum(prod(s) for s in SETS["gpt-12x768"].shapes)
    assert share["training"] > 6 * 65_536 * products
