"""What the state of a parameter must hold, told before anything is done with it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from psgd import pipeline
from psgd.arrays import Factors
from psgd.outline import Outline, Outlines, Silence
from psgd.pipeline import Recipe, Tempo
from psgd_torch_backend._state import COUNTERS

COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
OURS = frozenset([*COUNTERS, "momentum", *Factors._fields])  # other keys of an entry are kept for others


class Form(NamedTuple):
    """A tensor of the state: its shape, and is it complex?"""

    shape: tuple[int, ...]
    is_complex: bool


@lru_cache(maxsize=1024)
def factors_of(recipe: Recipe, shape: tuple[int, ...], is_complex: bool) -> Factors:
    """The forms of the factors of a tensor. Raises ValueError where the recipe has none for it."""
    like = Outline(shape, "complex64" if is_complex else "float32", Outlines())
    factors = pipeline.init(recipe, like, None, Silence()).factors
    return Factors(*(tuple(Form(tuple(x.shape), x.dtype.startswith("complex")) for x in xs) for xs in factors))


def counter_names(tempo: Tempo, entry: Any) -> list[str]:
    """The counters that an entry must have, and those that it has."""
    return [name for name in COUNTERS if name == COUNTERS[0] or tempo.counts or name in entry]


def wrong_counter(tempo: Tempo, entry: Any) -> str:
    """What is wrong with the counters of an entry of ours, if anything."""
    for name in counter_names(tempo, entry):
        x = entry.get(name)
        if not (isinstance(x, Tensor) and x.dtype == torch.int64 and not x.ndim and x.device.type == "cpu"):
            return f"has no counter {name!r} in its state"
    return "" if int(entry["step"]) >= 0 else f"has taken {int(entry['step'])} steps, as its state says"


def wrong_tensors(p: Tensor, entry: Any, forms: Factors, device: torch.device | None = None) -> str:
    """What is wrong with the tensors of an entry of ours, their numbers apart, if anything. device: where they must be,
    or None for anywhere.
    """
    if "momentum" in entry:
        wrong = _wrong_tensor(p, "momentum", entry["momentum"], Form(tuple(p.shape), p.is_complex()), device)
        if wrong:
            return wrong
    for kind, wanted in (("Q", forms.Q), ("L", forms.L), ("P", forms.Q if entry.get("P") else ())):
        held = entry.get(kind, {})  # some writers drop what is empty
        if not isinstance(held, dict) or len(held) != len(wanted):
            return _wrong_keys(kind, held, wanted)
        for i, form in enumerate(wanted):
            if str(i) not in held:
                return _wrong_keys(kind, held, wanted)
            wrong = _wrong_tensor(p, f"factor {kind}[{i}]", held[str(i)], form, device)
            if wrong:
                return wrong
    return ""


def _wrong_keys(kind: str, held: Any, wanted: Sequence[Form]) -> str:
    keys = [str(i) for i in range(len(wanted))]
    found = list(held) if isinstance(held, dict) else type(held).__name__
    return f"needs factors {kind} under the keys {keys} of its state, where there are {found}"


def _wrong_tensor(p: Tensor, name: str, x: Any, form: Form, device: torch.device | None) -> str:
    if not isinstance(x, Tensor):
        return f"has a {name} in its state that is no tensor, but {type(x).__name__}"
    if x.layout != torch.strided or x.dtype not in COMPUTED or x.is_complex() != form.is_complex:
        kind = "complex" if form.is_complex else "real floating-point"
        return f"has a {name} in its state that is no dense tensor of {kind} numbers, but {x.dtype}, {x.layout}"
    if x.shape != form.shape:
        found = f"{name} there has shape {tuple(x.shape)}, not {form.shape}"
        return f"has shape {tuple(p.shape)}, its state belongs to another ({found})"
    if device is not None and x.device != device:
        return f"is on {p.device}, the {name} of its state on {x.device}"
    return ""
