"""Type stubs of the backends' classes and functions, from the registry: `python -m conformance.internal.stubs`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, fields
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import psgd_jax_backend
import psgd_torch_backend
from psgd.hyperparameters import Method
from psgd.methods import METHODS
from psgd_torch_backend._arguments import ADAPTER
from psgd_torch_backend._groups import arguments as by_position_and_name
from psgd_torch_backend._groups import keys

ROOT = Path(__file__).resolve().parents[2]
HEAD = '"""Made from `psgd.METHODS` by `make stubs`; not to be edited."""\n\n'
TORCH = """from collections.abc import Iterable
from typing import Any

from torch import Tensor

from psgd.schedule import precond_update_prob_schedule as precond_update_prob_schedule
from psgd_torch_backend._state import state_arrays as state_arrays
from psgd_torch_backend.hessian import hessian_helper as hessian_helper
from psgd_torch_backend.optimizer import PSGD as PSGD
"""
JAX = """from collections.abc import Callable
from typing import Any, ParamSpec, Protocol

from optax import GradientTransformationExtraArgs, ScalarOrSchedule

from psgd.schedule import precond_update_prob_schedule as precond_update_prob_schedule
from psgd_jax_backend._nonfinite import check_skips as check_skips
from psgd_jax_backend._sharding import state_sharding as state_sharding
from psgd_jax_backend._state import PSGDState as PSGDState
from psgd_jax_backend._state import state_arrays as state_arrays
from psgd_jax_backend._summary import summary as summary
from psgd_jax_backend.hessian import hessian_helper as hessian_helper
from psgd_jax_backend.transform import scale_by_psgd as scale_by_psgd

_P = ParamSpec("_P")

class _OptaxFunction(Protocol[_P]):
    static_args: tuple[str, ...]
    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> GradientTransformationExtraArgs: ...

def _optax_function(function: Callable[_P, GradientTransformationExtraArgs]) -> _OptaxFunction[_P]: ...
"""


def argument(f: Field[Any]) -> str:
    plain = f.default is None or type(f.default) in (bool, int, float, str, tuple)
    value = repr(f.default).replace("'", '"') if plain else "..."
    default = 'float("inf")' if value == "inf" else value
    return f"    {f.name}: {f.type} = {default},\n"


def arguments(method: type[Method], *left_out: str) -> str:
    return "".join(argument(f) for f in fields(method) if f.name not in left_out)


def shown(default: Any) -> str:
    """A default as the formatter writes it."""
    return repr(default).replace("'", '"')


def default(method: type[Method], name: str) -> Any:
    return next(f.default for f in fields(method) if f.name == name)


def torch_class(method: type[Method]) -> str:
    """The class of a method."""
    by_key, (placed, named) = keys(method), by_position_and_name(method)
    written = {key: "        " + argument(f).lstrip().replace(f.name, key, 1) for key, f in by_key.items()}
    written["lr"] = f"        lr: float | Tensor = {default(method, 'lr')},\n"
    parameters_of_class = signature(getattr(psgd_torch_backend, method.title)).parameters
    flags = "".join(
        f"        {flag}: {x.type} = {shown(x.default)},\n"
        for flag, x in ADAPTER.items()
        if flag in parameters_of_class
    )
    # A hyperparameter with a key of its own may also be given by its name.
    other = "".join(f"        {f.name}: {f.type} = ...,\n" for key, f in by_key.items() if key != f.name)
    return (
        f"\nclass {method.title}(PSGD):\n    def __init__(\n        self,\n        params: Iterable[Any] | Tensor,\n"
        f"{''.join(written[key] for key in placed)}        *,\n{''.join(written[key] for key in named)}"
        f"{other}{flags}    ) -> None: ...\n"
    )


def parameter(p: Parameter) -> str:
    """A parameter of a function, as its signature has it."""
    kind = p.annotation if isinstance(p.annotation, str) else "ScalarOrSchedule"
    value = shown(p.default)
    default = 'float("inf")' if value == "inf" else "..." if callable(getattr(p.default, "value", None)) else value
    return f"    {p.name}: {kind} = {default},\n"


def jax_function(name: str) -> str:
    """A function of a method."""
    parameters = list(signature(getattr(psgd_jax_backend, name)).parameters.values())
    lines = [(p.kind is Parameter.KEYWORD_ONLY, parameter(p)) for p in parameters]
    placed, named = ("".join(line for by_name, line in lines if by_name is kind) for kind in (False, True))
    return f"@_optax_function\ndef {name}(\n{placed}    *,\n{named}) -> GradientTransformationExtraArgs: ...\n"


def jax_functions(method: type[Method]) -> str:
    """The functions of a method."""
    names = [method.name, method.also] if method.also else [method.name]
    return "".join(jax_function(prefix + name) for prefix in ("", "scale_by_") for name in names)


def stub(head: str, of_method: Callable[[type[Method]], str]) -> str:
    return HEAD + head + "".join(of_method(method) for method in METHODS.values())


STUBS: dict[str, Callable[[], str]] = {
    "psgd_torch_backend/__init__.pyi": lambda: stub(TORCH, torch_class),
    "psgd_jax_backend/__init__.pyi": lambda: stub(JAX, jax_functions),
}


def main() -> None:
    """Write both stubs."""
    for path, text in STUBS.items():
        (ROOT / path).write_text(text())


if __name__ == "__main__":
    main()
