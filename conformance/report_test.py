"""The report is one readable file that needs nothing else; the picture is a PNG."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from conformance import report
from conformance._testing import STEPS, comparison
from conformance.compare import Comparison
from conformance.packages import PACKAGES, release
from psgd.methods import METHODS

pytestmark = pytest.mark.xdist_group("report")  # the page is drawn once

SOME = list(METHODS)[:4]  # drawing takes its time, and a page does not ask which method it shows
VOID = {"meta"}


@pytest.fixture(scope="module")
def comparisons() -> list[Comparison]:
    return [comparison(method, locked=locked) for method in SOME for locked in (False, True)]


@pytest.fixture(scope="module")
def page(comparisons: list[Comparison]) -> str:
    return report.render(comparisons)


class Checker(HTMLParser):
    """Every element is closed in order; identifiers are gathered."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_each_method_has_its_plots_with_a_text_for_those_who_cannot_see_them(page):
    for method in SOME:
        section = re.search(rf'<section><h2 id="{method}">.*?</section>', page, re.DOTALL)
        assert section and len(re.findall('<svg [^>]*role="img" aria-label="[^"]+"', section[0])) == 2


def test_it_needs_nothing_from_outside(page):
    assert "http" not in page
    assert not re.search(r"<(script|link|img|iframe|object|embed)|@import|url\((?!#)", page)


def test_it_is_well_formed_and_its_identifiers_are_unique_and_found(page):
    checker = Checker(page)
    assert not checker.open
    assert len(set(checker.ids)) == len(checker.ids)
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(checker.ids)


def test_names_are_escaped(page):
    assert "&lt;one&gt;" in page
    assert "<one>" not in page


def test_colours_follow_the_reader(page):
    from conformance.plots import PALETTE

    style, body = page.split("</style>", 1)
    assert "prefers-color-scheme:dark" in style
    assert not any(light in body for light, _ in PALETTE.values())


def test_it_says_what_ran_on_what_and_why_the_bounds_are_what_they_are(page):
    for package in PACKAGES.values():
        assert f"{package.distribution} {release(package.distribution)}" in page
    for word in ("python", "cores", "mlp-digits", "float64", f"{STEPS} step-locked"):
        assert word in page
    assert "ten times" in page


def test_the_same_comparisons_give_the_same_page(comparisons, page):
    assert report.render(comparisons) == page


def test_a_failure_is_named_with_its_leaf():
    page = report.render([comparison(next(iter(METHODS)), far=1.0)])
    assert "do not agree in 1 of 1 method: " in page and "<details open" in page
    assert "first at step 1" in page and "w1/Q/0" in page


@pytest.mark.parametrize("far", [0.0, float("nan"), float("inf")])
def test_numbers_that_no_log_axis_shows(far):
    assert "<svg" in report.render([comparison(next(iter(METHODS)), far=far)])


def test_explain_without_a_leaf():
    pair = comparison(next(iter(METHODS)), far=float("nan")).pairs[0]
    pair.worst = {}
    assert "not finite" in report.explain(pair)


def test_a_picture(tmp_path: Path, comparisons):
    for n in (1, len(comparisons)):
        report.picture(comparisons[:n], tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_needs_a_free_run(tmp_path: Path):
    with pytest.raises(ValueError, match="free-running"):
        report.picture([comparison(next(iter(METHODS)), locked=True)], tmp_path / "picture.png")


def test_write(tmp_path: Path, comparisons, page):
    made = report.Report()
    for group in report.grouped(comparisons).values():
        made.add(group)
    made.write(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page


# ---- what it says --------------------------------------------------------------------------------
def test_success_is_one_sentence_and_its_figures_are_folded(page):
    lead = re.search('<p class="lead">.*?</p>', page)[0]
    assert f"agree in all {len(SOME)} methods: one step from a common state differs by" in lead
    assert page.count("<details>") == 2 and "<details open" not in page
    rows = re.search("<details>.*?</details>", page, re.DOTALL)[0].count("<tr>")
    assert rows == 1 + len(SOME)  # a head, and one for each


def test_it_says_what_has_not_run(comparisons):
    made = report.Report()
    made.add(comparisons[:2])
    assert "partial" not in made.html()
    assert "This report is partial: b, c have not run." in made.html(["b", "c"])


@pytest.mark.parametrize(
    ("losses", "falls"),
    [
        (np.linspace(2, 1, 100), True),
        (np.exp(-np.arange(100.0)), False),
        (np.full(100, 3.0), False),
        (np.linspace(1, 2, 100), False),
        ([2.0, 1.9], True),
    ],
)
def test_a_curve_that_ends_early_says_so(losses, falls, page):
    assert report.is_falling(list(losses)) == falls
    assert page.count(report.SHORT) == len(SOME)  # of six steps


def test_no_number_breaks_and_nothing_is_wider_than_the_screen(page):
    """Numbers with a minus among them stand in elements that do not break; tables are blocks where it is narrow."""
    text = re.sub(r"<svg.*?</svg>|<style>.*?</style>", "", page, flags=re.DOTALL)
    assert ".n,.badge{white-space:nowrap}" in page and "thead{display:none}" in page
    for found in re.finditer(r"\d[\d.]*e-\d+", text):
        assert text[: found.start()].endswith('<span class="n">'), text[found.start() - 40 : found.end()]
    for row in re.findall("<tr>(.*?)</tr>", text):
        assert row.count("<td") in (0, row.count("data-head"))
