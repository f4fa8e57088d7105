"""What the state of a parameter must hold, told before anything is done with it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from psgd import pipeline
from psgd.arrays import Factors
from psgd.cost import NoDraws, ShapeNamespace, ShapeTracer
from psgd.recipe import Recipe, Schedule
from psgd_torch_backend._state import COUNTERS

REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
COMPUTED = (*REAL, *COMPLEX)
OURS = frozenset([*COUNTERS, "momentum", *Factors._fields])  # other keys of an entry are kept for others


class Form(NamedTuple):
    """What a tensor of the state must be like: its shape, and the dtypes that it may have."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


class Forms(NamedTuple):
    """The forms of the factors of a parameter, by their keys."""

    Q: dict[str, Form]
    L: dict[str, Form]


@lru_cache(maxsize=1024)
def forms_of(recipe: Recipe, layers: tuple[int, ...], shape: tuple[int, ...], is_complex: bool) -> Forms:
    """The forms of the factors of a tensor, or of as many as there are layers. Raises ValueError where the recipe has
    none for it.
    """
    like = ShapeTracer(shape, "complex64" if is_complex else "float32", ShapeNamespace())
    q, bounds, _ = pipeline.init(recipe, like, None, NoDraws()).factors
    dtypes = COMPLEX if is_complex else REAL
    return Forms(
        {str(i): Form((*layers, *x.shape), dtypes) for i, x in enumerate(q)},
        {str(i): Form((*layers, *x.shape), REAL) for i, x in enumerate(bounds)},
    )


@lru_cache(maxsize=1024)
def rows_of(recipe: Recipe, n: int, size: int, is_complex: bool) -> Forms:
    """The forms of some rows of the factors of a vector of length n, and of its bounds."""
    forms = forms_of(recipe, (), (n,), is_complex)
    return forms._replace(Q={key: Form((size, *form.shape[1:]), form.dtypes) for key, form in forms.Q.items()})


def wrong_counter(schedule: Schedule, entry: Any) -> str:
    """What is wrong with the counters of an entry of ours, if anything."""
    for name in COUNTERS:
        x = entry.get(name)
        if x is None and name not in entry and name != COUNTERS[0] and not schedule.counts:
            continue
        if not (isinstance(x, Tensor) and x.dtype == torch.int64 and not x.ndim and x.is_cpu):
            return f"has no counter {name!r} in its state"
    return ""


def wrong_tensors(p: Tensor, entry: Any, forms: Forms, device: torch.device | None = None) -> str:
    """What is wrong with the tensors of an entry of ours, their numbers apart, if anything. device: where they must be,
    or None for anywhere.
    """
    if "momentum" in entry:
        form = Form(p.shape, COMPLEX if p.is_complex() else REAL)
        wrong = _misfit(p, "momentum", "", entry["momentum"], form, device)
        if wrong:
            return wrong
    for kind, wanted in (("Q", forms.Q), ("L", forms.L), ("P", forms.Q if entry.get("P") else {})):
        held = entry.get(kind, {})  # some writers drop what is empty
        if not isinstance(held, dict) or held.keys() != wanted.keys():
            found = list(held) if isinstance(held, dict) else type(held).__name__
            return f"needs factors {kind} under the keys {list(wanted)} of its state, where there are {found}"
        for key, form in wanted.items():
            wrong = _misfit(p, kind, key, held[key], form, device)
            if wrong:
                return wrong
    return ""


def _misfit(p: Tensor, kind: str, key: str, x: Any, form: Form, device: torch.device | None) -> str:
    """How a tensor of the state is not as it must be, if so."""
    shape, dtypes = form
    if isinstance(x, Tensor) and x.shape == shape and x.dtype in dtypes and x.layout == torch.strided:
        if device is None or x.device == device:
            return ""
        return f"is on {p.device}, its state on {x.device}; load a state dict to have it there"
    name = f"factor {kind}[{key}]" if key else kind
    if not isinstance(x, Tensor):
        return f"has a {name} in its state that is no tensor, but {type(x).__name__}"
    if x.dtype not in dtypes or x.layout != torch.strided:
        numbers = "complex" if dtypes is COMPLEX else "real floating-point"
        return f"has a {name} in its state that is no dense tensor of {numbers} numbers, but {x.dtype}, {x.layout}"
    needed = f"factors {kind} of shapes such as" if key else f"a {kind} of shape"
    found = f"{tuple(shape)}, its {name} there has {tuple(x.shape)}"
    return f"has shape {tuple(p.shape)}, its state belongs to another: it needs {needed} {found}"
