"""The named classes: one optimizer for each registered method."""

from __future__ import annotations

from inspect import Parameter, Signature

from psgd.hyperparameters import Method
from psgd_torch_backend import _groups as groups
from psgd_torch_backend._arguments import ADAPTER_DEFAULTS, documentation
from psgd_torch_backend.optimizer import PSGD


def named_class(method: type[Method], module: str) -> type[PSGD]:
    """The optimizer class of a method: its name, signature and documentation come from the method's record."""
    signature = _signature(method)
    body = {
        "method": method,
        "__doc__": documentation(method, signature.parameters.values()),
        "__module__": module,
        "__signature__": signature,
    }
    return type(method.title, (PSGD,), body)


def _signature(method: type[Method]) -> Signature:
    """The parameters, the hyperparameters in the published order, and what is given by name alone."""
    defaults = {key: f.default for key, f in groups.keys(method).items()} | ADAPTER_DEFAULTS
    if method().recipe().joint:
        del defaults["scanned_layers"]  # there is one preconditioner for all parameters
    by_position, by_name = groups.arguments(method)
    first = [
        Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=defaults.get(name, Parameter.empty))
        for name in ("params", *by_position)
    ]
    rest = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=defaults[name])
        for name in (*by_name, *ADAPTER_DEFAULTS)
        if name in defaults
    ]
    return Signature([*first, *rest])
