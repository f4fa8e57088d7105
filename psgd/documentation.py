"""Docstrings of the methods' functions and classes, composed from a method's record and a signature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from inspect import Parameter, cleandoc
from textwrap import fill, indent
from typing import Any, NamedTuple

from psgd.hyperparameters import Method

WIDTH = 110


class Argument(NamedTuple):
    """An argument that an adapter adds to a method's: its default, its type and its sentence."""

    default: Any
    type: str
    doc: str

    def parameter(self, name: str) -> Parameter:
        """Its place in a signature."""
        return Parameter(name, Parameter.KEYWORD_ONLY, default=self.default, annotation=self.type)


def entry(name: str, sentence: str) -> str:
    """A line of a section, `name: sentence`, wrapped as the sections of a docstring are."""
    return fill(
        f"{name}: {sentence}", WIDTH, initial_indent="    ", subsequent_indent="        ", break_on_hyphens=False
    )


def entries(sentences: Mapping[str, str]) -> str:
    """The lines of a section."""
    return "\n".join(entry(name, sentence) for name, sentence in sentences.items())


def section(title: str, sentences: Mapping[str, str]) -> str:
    """A section such as "Args:"."""
    return f"{title}:\n{entries(sentences)}"


def filled(docstring: str | None, **parts: str) -> str:
    """A docstring, as `help` shows it, with texts in place of lines such as `{adapter}`."""
    text = cleandoc(docstring or "")
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part.strip())
    return text


def arguments(method: type[Method], parameters: Iterable[Parameter], others: Mapping[str, str]) -> dict[str, str]:
    """The sentence of each parameter of a signature: from `others`, else that of the hyperparameter, with its range and
    default.
    """
    names = {f.name: (f.name, f.metadata.get("group_key") or f.name) for f in fields(method)}
    settings = {name: f.metadata for f in fields(method) for name in names[f.name]}
    said = {}
    for p in parameters:
        sentence, within = others.get(p.name), ""
        if sentence is None:
            sentence, within = settings[p.name]["doc"], settings[p.name]["within"]
        facts = [f"in {within}"] if within else []
        facts += [] if p.default is Parameter.empty else [f"default {p.default!r}"]
        said[p.name] = f"{sentence} ({'; '.join(facts)})." if facts else f"{sentence}."
    return said


def equation(method: type[Method], rate: str) -> str:
    """What a step of a method computes, as text. rate: the name of the learning rate, "" where there is none."""
    recipe = method().recipe()
    fitted = "the pair (v, H v), H the Hessian" if recipe.newton else f"the {recipe.whiten} (whitening)"
    step = f"p <- p - {rate} (P g + weight_decay p)" if rate else "u = P g"
    return f"{step},  g the average of gradients\n{recipe.preconditioner.equation}\nfitted to {fitted}"


def documented(
    method: type[Method],
    parameters: Iterable[Parameter],
    others: Mapping[str, str],
    *,
    rate: str = "lr",
    returns: str = "",
    raises: Mapping[str, str],
    example: str,
    note: str = "",
) -> str:
    """A docstring of a method as a class or a function takes it.

    Args:
        method: the record.
        parameters: of the signature; each is documented, with the default that it has there.
        others: sentences of the parameters that are no hyperparameters of the method, or go by another name here.
        rate: the name of the learning rate, "" where there is none.
        returns: what is returned.
        raises: errors and when.
        example: a program, as a doctest.
        note: a paragraph.
    """
    sections = [
        method.summary,
        section("Args", arguments(method, parameters, others)),
        f"Returns:\n{fill(returns, WIDTH, initial_indent='    ', subsequent_indent='    ')}" if returns else "",
        section("Raises", raises),
        f"Equation, with the defaults:\n{indent(equation(method, rate), '    ')}",
        note,
        f"Source: {method.source}.",
        f"Example:\n{indent(example, '    ')}",
    ]
    return "\n\n".join(part for part in sections if part)
