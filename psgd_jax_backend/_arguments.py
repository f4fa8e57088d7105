"""The arguments that every function takes beside its method's, and how defaults are shown to optax."""

from __future__ import annotations

from inspect import Parameter
from numbers import Real
from typing import Any

from psgd.documentation import Argument
from psgd_jax_backend._nonfinite import Guard
from psgd_jax_backend._per_tensor import Layering

SENTENCES = {
    "stack": (
        "bool",
        "step leaves of equal shape and dtype together, under `jax.vmap`; compilation and many small layers are faster",
    ),
    "scanned_layers": (
        "Any",
        "tree of booleans, as the parameters or a prefix of them: leaves whose first axis counts layers, as `nn.scan` "
        "makes them. Each layer is preconditioned by itself, as if it were a leaf of its own",
    ),
    "lax_map_scanned_layers": (
        "bool",
        "step stacks in batches of `lax_map_batch_size` layers, for less memory at a time",
    ),
    "lax_map_batch_size": ("int", "layers in such a batch"),
    "spread_over": (
        "str | tuple[str, ...] | None",
        "axes of the mesh, where the parameters are on one, over which factors and the work on stacks are spread; None "
        "is all of them, () none. See `state_sharding`",
    ),
    "nonfinite": (
        "str",
        'what to do where a gradient holds a NaN or an infinity: "skip" the step, which then is as if it had not been '
        'but for the count of such steps in the state, and updates are zero; "raise", under `jax.jit` by a callback to '
        'the host; or "propagate", and do not look',
    ),
    "max_skips": (
        "int",
        "where `update` is not traced, the error after so many skipped steps in a row; else see `check_skips`",
    ),
}
DEFAULTS = Layering._field_defaults | Guard._field_defaults
ADAPTER = {name: Argument(DEFAULTS[name], *said) for name, said in SENTENCES.items()}
ADAPTER_SENTENCES = {name: f"{argument.doc} (default {argument.default!r})." for name, argument in ADAPTER.items()}


class Default:
    """A default that shapes the program, as a signature shows it: equal to the value, printed as it, but no number.

    `optax.inject_hyperparams` makes an array of every number among the defaults, and a schedule of every function;
    what is neither it hands on.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return bool(self.value == (other.value if isinstance(other, Default) else other))

    def __hash__(self) -> int:
        return hash(self.value)

    def __repr__(self) -> str:
        return repr(self.value)

    @classmethod
    def shown(cls, p: Parameter) -> Parameter:
        """A parameter whose default optax leaves alone."""
        number = isinstance(p.default, Real) and not isinstance(p.default, bool)
        return p.replace(default=cls(p.default)) if number or callable(p.default) else p

    @classmethod
    def meant(cls, value: Any) -> Any:
        """The value of a default; any other as it is."""
        return value.value if isinstance(value, cls) else value
