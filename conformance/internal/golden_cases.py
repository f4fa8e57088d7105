"""Recorded cases as files: the index of a folder, what its fields have to be, and the arrays of a case."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from psgd.naming import shown

Case = Mapping[str, Any]


class Data(dict[str, np.ndarray]):
    """The arrays of a case."""

    def __missing__(self, name: str) -> np.ndarray:
        raise ValueError(f"the case lacks {name}, which its schema demands")


def cases(folder: Path, supported: Callable[[Case], bool]) -> list[Case]:
    """All cases of a folder, in its order; ValueError where its index or a field of a supported case is wrong."""
    path = Path(folder) / "index.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no index.json; give a folder of recorded cases, as conformance/internal/golden is"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); give a folder of recorded cases") from error
    if not isinstance(index, dict) or index.get("schema") != 1:
        schema = index.get("schema") if isinstance(index, dict) else index
        raise ValueError(f"{path} has schema {shown(schema)}; this version reads schema 1")
    found = index.get("cases")
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path} holds no cases; give a folder of recorded cases, as conformance/internal/golden is")
    for k, case in enumerate(found):
        wrong = complaint(case, Path(folder), supported)
        if wrong:
            name = shown(case["file"]) if isinstance(case, dict) and "file" in case else f"number {k}"
            raise ValueError(f"{path}: case {name}: {wrong}")
    return found


MOST = 10**6  # steps, and numbers along an axis: what is beyond was not recorded


def complaint(case: Any, folder: Path, supported: Callable[[Case], bool]) -> str | None:
    """What is wrong with a case of an index, as far as the index tells; None where nothing is."""
    if not isinstance(case, dict):
        return f"it is {shown(case)} and not an object of fields"
    file = case.get("file")
    if not isinstance(file, str) or not file or "\0" in file:
        return f"file={shown(file)} must name its .npz file"
    if Path(file).name != file or (folder / file).resolve().parent != folder.resolve():
        return f"file={shown(file)} must be a file of this folder itself: no path out of it, and no link"
    for field, kind in {"family": str, **({"function": str} if case.get("family") == "primitive" else {})}.items():
        if not isinstance(case.get(field), kind):
            return f"{field}={shown(case.get(field))} must be a text"
    if not supported(case):
        return None
    for field, (fits, wanted) in FIELDS.items():
        if not fits(case.get(field)):
            return f"{field}={shown(case.get(field))} must be {wanted}"
    return None


def _is_whole(x: Any) -> bool:
    return type(x) is int and 0 <= x <= MOST


def _is_share(x: Any) -> bool:
    return type(x) in (int, float) and 0 <= x < 1


def _are(fits: Callable[[Any], bool], *, optional: bool = False) -> Callable[[Any], bool]:
    """Is it a list of what fits?"""
    return lambda xs: (optional and xs is None) or (isinstance(xs, list) and all(map(fits, xs)))


def _is_mapping(x: Any) -> bool:
    return isinstance(x, dict)


def _is_text(x: Any) -> bool:
    return isinstance(x, str)


# Of a case that can be replayed: what each field has to be.
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rtol": (_is_share, "a number in [0, 1)"),
    "atol": (lambda x: x is None or (type(x) in (int, float) and 0 <= x < inf), "a number in [0, inf)"),
    "steps": (lambda x: _is_whole(x) and x > 0, f"a whole number in [1, {MOST}]"),
    "recorded_state_steps": (_are(_is_whole, optional=True), "a list of steps"),
    "dtype": (_is_text, "the name of a dtype"),
    "shapes": (_are(_are(_is_whole)), f"a list of shapes, of whole numbers up to {MOST}"),
    "hyperparameters": (lambda x: x is None or _is_mapping(x), "an object of options"),
    "groups": (_are(lambda x: _is_mapping(x) and _are(_is_whole)(x.get("params")), optional=True), "a list of groups"),
    "draws": (lambda x: x is None or (_is_mapping(x) and all(map(_are(_is_text), x.values()))), "lists of draws"),
}
