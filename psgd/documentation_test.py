"""Docstrings are made of a record and a signature, and say of each argument what these say."""

from __future__ import annotations

from dataclasses import fields
from inspect import Parameter

import pytest

from psgd.documentation import Argument, documented, filled
from psgd.methods import METHODS


@pytest.mark.parametrize("name", METHODS)
def test_each_argument_has_its_sentence_range_and_default(name: str):
    made, flag = METHODS[name], Argument(None, "bool", "ascend")
    settings = {f.name: f for f in fields(made)}
    own = [Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default) for f in settings.values()]
    parameters = [Parameter("params", Parameter.POSITIONAL_OR_KEYWORD), *own, flag.parameter("maximize")]
    others = {"params": "those that are stepped", "maximize": flag.doc, "seed": "another sentence"}
    text = documented(made, parameters, others, raises={"ValueError": "never."}, returns="it.", example=">>> 1 + 1")
    flat = " ".join(text.split())
    for f in settings.values():
        doc, within = f.metadata["doc"], f.metadata["within"]
        doc, within = (others["seed"], None) if f.name == "seed" else (doc, within)
        fact = f"in {within}; default" if within else "default"
        assert f" {f.name}: {doc} ({fact} {f.default!r})." in flat
    assert " params: those that are stepped. " in flat and " maximize: ascend (default None). " in flat
    assert text.startswith(f"{made.summary}\n\nArgs:\n    params: ") and max(map(len, text.splitlines())) <= 110
    sections = [line for line in text.splitlines() if line and line[0] != " "]
    source = f"Source: {made.source}."
    title = "Equation, with the defaults:"
    assert sections == [made.summary, "Args:", "Returns:", "Raises:", title, source, "Example:"]


@pytest.mark.parametrize("name", METHODS)
def test_the_equation_is_that_of_the_preconditioner(name: str):
    made = METHODS[name]
    recipe = made().recipe()
    text = documented(made, [], {}, rate="", raises={}, example="")
    assert f"    u = P g,  g the average of gradients\n    {recipe.preconditioner.equation}\n    fitted to the " in text
    assert ("(v, H v)" in text) is recipe.newton
    assert "p <- p - eta (P g + weight_decay p)" in documented(made, [], {}, rate="eta", raises={}, example="")


def test_parts_of_a_docstring_are_filled_in():
    assert (
        filled(
            """One.

        Args:
            {own}
        """,
            own="    a: b.\n        c.\n    d: e.",
        )
        == "One.\n\nArgs:\n    a: b.\n        c.\n    d: e."
    )
