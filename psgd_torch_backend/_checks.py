"""What parameters, gradients, pairs and state must be like, checked before anything is done with them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from psgd import pipeline
from psgd.arrays import Factors
from psgd.cost import NoDraws, ShapeNamespace, ShapeTracer
from psgd.hyperparameters import Method
from psgd.recipe import Recipe, Schedule
from psgd_torch_backend._groups import Named
from psgd_torch_backend._state import COUNTERS, Entry
from psgd_torch_backend.hessian import Pairs

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


def wrong_counter(schedule: Schedule, entry: Entry) -> str:
    """What is wrong with the counters of an entry of ours, if anything."""
    for name in COUNTERS:
        x = entry.get(name)
        if x is None and name not in entry and name != COUNTERS[0] and not schedule.counts:
            continue
        if not (isinstance(x, Tensor) and x.dtype == torch.int64 and not x.ndim and x.is_cpu):
            return f"has no counter {name!r} in its state"
    return ""


def wrong_tensors(p: Tensor, entry: Entry, forms: Forms, device: torch.device | None = None) -> str:
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


def _misfit(p: Tensor, kind: str, key: str, x: object, form: Form, device: torch.device | None) -> str:
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


# ---- parameters and gradients --------------------------------------------------------------
def check_parameter(owner: str, method: type[Method], name: str, p: Tensor) -> None:
    """Refuse a parameter that cannot be stepped. One that is frozen may be anything: it is left alone."""
    if is_lazy(p):
        raise ValueError(f"{owner}: {name} has no shape yet, being of a lazy module; run a forward pass first")
    wrong = unfit(method, name, p) if p.requires_grad or p.grad is not None else ""
    if wrong:
        raise TypeError(f"{owner}{wrong}")


def unfit(method: type[Method], name: str, p: Tensor) -> str:
    """Why a parameter cannot be stepped, after the name of the class; or ""."""
    if p.layout != torch.strided:
        return f" does not support sparse parameters; {name} is {p.layout}: make it dense"
    if p.is_complex() and not method.complex_parameters:
        return f" does not support complex parameters; {name} is {p.dtype}: use view_as_real of it"
    if not (p.is_floating_point() or p.is_complex()):
        return f" needs floating-point parameters; {name} is {p.dtype}: leave it out"
    if p.dtype not in COMPUTED:
        return f" cannot compute in {p.dtype}, which {name} is in; keep it in a wider dtype"
    part = sharded(p)
    if part:
        return (
            f" does not support sharded parameters, and {name} is {part}; use DistributedDataParallel, or "
            "ZeroRedundancyOptimizer for methods with a preconditioner for each parameter"
        )
    if any(step == 0 and n > 1 for step, n in zip(p.stride(), p.shape, strict=True)):
        return f": {name} is expanded, so that its numbers share memory; give a copy of it, contiguous"
    return ""


def sharded(p: Tensor) -> str:
    """What this is, if it is a part of a tensor, the rest of which is elsewhere. Nothing is imported to ask."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(p, module.DTensor):
        return "a DTensor"
    # So FullyShardedDataParallel marks what it has made flat.
    return "a flat shard of FullyShardedDataParallel" if getattr(p, "_fsdp_flattened", False) else ""


def check_gradient(owner: str, name: str, p: Tensor) -> None:
    """Refuse a gradient that its parameter cannot be stepped on."""
    g = p.grad
    if g is None:
        return
    if g.layout != torch.strided:
        raise RuntimeError(f"{owner} does not support sparse gradients; that of {name} is {g.layout}: use a dense one")
    if g.shape != p.shape:
        raise RuntimeError(
            f"{owner}: {name} has shape {tuple(p.shape)} and a gradient of shape {tuple(g.shape)}; "
            "call zero_grad() and backward() again after changing a parameter's shape"
        )
    if not g.is_floating_point() and not (g.is_complex() and p.is_complex()):
        raise RuntimeError(f"{owner}: {name} is {p.dtype}, its gradient {g.dtype}; give one of its own dtype")


def check_pairs(owner: str, pairs: Pairs, named: Named) -> None:
    """Refuse pairs that the parameters cannot be fitted to."""
    for name, p in named:
        pair = pairs.by_parameter[id(p)] if p.requires_grad or p.grad is not None else ()
        for what, x in zip(("vector", "Hvp"), pair, strict=False):
            if x.layout != torch.strided or x.device != p.device or (x.is_complex() and not p.is_complex()):
                raise ValueError(
                    f"{owner}: {what} of {name} is {x.dtype}, {x.layout}, on {x.device}; give a dense tensor such as "
                    f"the parameter, which is {p.dtype} on {p.device}"
                )


# ---- layers --------------------------------------------------------------------------------
def check_layers(owner: str, named: Named, layered: set[int]) -> None:
    """Refuse parameters that are said to stack layers and have no axis for them. layered: their identities."""
    for name, p in named:
        if id(p) in layered and not p.ndim:
            raise ValueError(f"{owner}: {name} is a scalar and cannot stack layers; leave it out of scanned_layers")


def check_layer_names(owner: str, layers: Iterable[bool | tuple[str, ...]], known: Collection[str]) -> None:
    """Refuse names of stacked parameters that no parameter has. layers: the `scanned_layers` of each group."""
    for names in layers:
        missing = [] if isinstance(names, bool) else [name for name in names if name not in known]
        if missing:
            raise ValueError(
                f"{owner}: scanned_layers names {missing[0]!r}, which is no parameter; "
                "give named parameters, as model.named_parameters() does"
            )


# ---- state ---------------------------------------------------------------------------------
def check_state(owner: str, named: Named, state: Mapping[Tensor, object], wrong: Iterable[tuple[str, str]]) -> None:
    """Refuse state that is not that of the parameters. wrong: names, and what is wrong with the state of each."""
    for name, p in named:
        if not isinstance(state.get(p, {}), dict):
            raise RuntimeError(f"{owner}: the state of {name} is no dictionary; delete optimizer.state[p]")
    for name, text in wrong:
        if text:
            raise RuntimeError(f"{owner}: {name} {text}")
