"""Hyperparameters and the methods that are made of them: the only place where one has a name, a default, a range and a
sentence.

A method is a frozen dataclass of hyperparameters that turns itself into a `Recipe` and a `Schedule`. Adding a method is
adding a dataclass with the `method` decorator; both frameworks' optimizers, the conformance cases, the documentation
and the benchmarks iterate `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from decimal import Decimal
from math import inf, nan, prod
from numbers import Real
from typing import Any, ClassVar, TypeGuard

from psgd._xp import PRECISIONS, dtype_name, is_array, is_of_jax, is_traced
from psgd.naming import did_you_mean, shown, unknown
from psgd.recipe import Recipe, Schedule
from psgd.schedule import Annealed

METHODS: dict[str, type[Method]] = {}

SCALES = "[1e-18, 1e18]"  # squares and inverse squares are normal numbers of float32
NOISES = "[0, 1e18]"  # squares are finite in float32
RATES = "(0, 10]"  # of factors: at 1 a step may be as long as the factor itself; more than ten times that is a mistake
RANKS = "[0, 1000000]"  # more columns than there is memory for
REAL = ("float", "bfloat", "int", "uint")  # how the names of the dtypes of real numbers begin


def setting(
    default: Any,
    doc: str,
    within: str | None = None,
    kind: str = "number",
    names: Any = None,
    *,
    scheduled: bool = False,
    structural: bool | None = None,
    group_key: str | None = None,
) -> Any:
    """A hyperparameter, as a field of a method's dataclass: its default, its sentence and what it may be.

    Args:
        default: its default.
        doc: its sentence, without a full stop.
        within: an interval such as "[0, 1)", for numbers.
        kind: "number", "integer", "flag", "name", "dtype" or "pair".
        names: of a name, a function that gives the values it may have; called at each use, since registries grow.
        scheduled: it may also be a function of the step, or the four numbers of an `Annealed`.
        structural: it shapes the program, as a bound on sizes does, and must be known before anything is traced. None:
            it does unless it is of the kind "number" with a number as default.
        group_key: its key in PyTorch's groups, where schedulers look for another name.
    """
    metadata = {"doc": doc, "within": within, "kind": kind, "names": names, "scheduled": scheduled}
    metadata["structural"] = (kind != "number" or callable(default)) if structural is None else structural
    metadata["group_key"] = group_key
    return field(default=default, metadata=metadata)


def group_key(f: Field[Any]) -> str:
    """The key of a hyperparameter in a group of a PyTorch optimizer."""
    return f.metadata["group_key"] or f.name


def outside(value: float, within: str) -> bool:
    """Is a number outside an interval like "[0, 1)"? NaN always is."""
    low, high = (float(end) for end in within[1:-1].split(","))
    above = value >= low if within[0] == "[" else value > low
    below = value <= high if within[-1] == "]" else value < high
    return not (above and below)


def plain(value: object, *, static: bool = False) -> Any:
    """A number, or the element of an array of one, as Python's int or float; any other value as it is.

    An array of JAX stays an array, 0-d, since in a traced call its number may not be known. static: it must be known,
    so that an array which is not traced becomes a number too.
    """
    if is_array(value) and prod(value.shape) == 1:
        if is_traced(value) or (is_of_jax(value) and not static):
            return value.reshape(())
        try:
            value = value.item()
        except (RuntimeError, TypeError):  # an array without numbers, as on the device "meta"
            return value
    if not isinstance(value, (Real, Decimal)) or isinstance(value, bool):
        return value
    try:
        number = float(value)
    except OverflowError:  # above the largest float
        return inf if abs(value) == value else -inf
    except ValueError:  # a signalling NaN
        return nan
    return value if isinstance(value, int) and abs(value) < 2**53 else number


def complaint(f: Field[Any], value: object) -> str | None:
    """What is wrong with a value of a hyperparameter, with the remedy; None where nothing is."""
    kind, within, names = f.metadata["kind"], f.metadata["within"], f.metadata["names"]
    if f.metadata["scheduled"] and isinstance(value, Annealed):
        ok = all(map(_is_number, value)) and 0 < value.min_prob <= value.max_prob
        ok = (
            ok
            and not outside(value.max_prob, within or "(0, inf)")
            and 0 <= value.decay < inf
            and value.flat_start >= 0
        )
        return None if ok else f"must be four numbers, largest in {within}, smallest in (0, largest], decay, flat start"
    if f.metadata["scheduled"] and callable(value) and not isinstance(value, type):
        return None
    if kind == "flag":
        return None if isinstance(value, bool) else "must be True or False"
    if kind == "dtype":
        ok = value is None or (isinstance(value, str) and value in ("bfloat16", "float16", "float32", "float64"))
        return None if ok else "must be None or one of bfloat16, float16, float32, float64"
    if kind == "name":
        ok = (value is None or isinstance(value, str)) and value in names()
        return None if ok else f"must be one of {', '.join(map(repr, names()))}"
    if kind == "pair":
        ok = isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value)) and 0 < value[0] <= value[1]
        return None if ok else "must be a pair of numbers, 0 < first <= second"
    if value is None and f.default is None:
        return None
    if is_of_jax(value) and not value.shape and dtype_name(value.dtype).startswith(REAL):
        if is_traced(value):
            return None
        value = value.item()
    if not _is_number(value):
        wanted = "a number or a function of the step" if f.metadata["scheduled"] else "a number"
        return f"must be {wanted}{', not an array of another kind or size' if is_array(value) else ''}"
    if kind == "integer" and value != inf and not float(value).is_integer():
        return "must be a whole number"
    return f"must lie in {within}" if within and outside(value, within) else None


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def normalised(f: Field[Any], value: object) -> Any:
    """A value in the form in which it is kept: a dtype by its name, a pair as a tuple, a whole number as an int, ..."""
    kind = f.metadata["kind"]
    if kind == "dtype":
        try:
            return None if value is None else dtype_name(value)
        except Exception:  # without a name it is no dtype, which `complaint` will say
            return shown(value)
    if isinstance(value, (tuple, list)):
        value = tuple(map(plain, value))
        is_schedule = f.metadata["scheduled"] and len(value) == len(Annealed._fields)
        return Annealed(*value) if is_schedule else value
    value = plain(value, static=f.metadata["structural"])
    if kind == "name" and isinstance(value, str) and value not in f.metadata["names"]():
        return value.replace("p5", ".5")  # psgd_torch's other spelling of Q0.5EQ1.5
    if kind == "integer" and _is_number(value) and float(value).is_integer():
        return int(value)
    return value


def checked(owner: str, f: Field[Any], value: object, name: str = "") -> Any:
    """A value of a hyperparameter in the form in which it is kept.

    name: by which it was given, where that is not the field's; for errors, as `owner` is.

    Raises:
        ValueError: says what is wrong with the value.
    """
    kept = normalised(f, value)
    wrong = complaint(f, kept)
    if wrong:
        choices = [x for x in f.metadata["names"]() if isinstance(x, str)] if f.metadata["kind"] == "name" else []
        meant = did_you_mean(value, choices) if isinstance(value, str) else ""
        text = shown(kept if f.metadata["kind"] == "dtype" else value)
        raise ValueError(f"{owner}: {name or f.name}={text} {wrong}; the default is {f.default!r}{meant}")
    return kept


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of the named methods: checks hyperparameters, compares by value, describes itself.

    `lr` and `weight_decay` are applied by the adapter, in each framework's own way: p <- p - lr (u + weight_decay p).

    Args:
        lr: learning rate.
        weight_decay: decoupled weight decay.
        seed: seed of the noise.

    Raises:
        ValueError: for a hyperparameter that is unknown or out of range.

    Example:
        >>> from psgd import METHODS
        >>> METHODS["quad"](momentum=0.9).recipe().momentum
        True
    """

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    complex_parameters: ClassVar[bool] = False
    also: ClassVar[str] = ""  # another name of the optax function
    mask_name: ClassVar[str] = "weight_decay_mask"  # of the optax function's mask of weight decay
    # Arguments by position, in the published order after the parameters; an adapter takes those that it has.
    positional: ClassVar[tuple[str, ...]] = ("lr",)

    lr: float = setting(1e-3, "learning rate", "[0, inf)")
    weight_decay: float = setting(
        0.0, "decoupled weight decay: p loses the learning rate times weight_decay of itself each step", "[0, inf)"
    )
    seed: int = setting(0, "seed of the noise", "[0, 4294967295]", "integer", structural=False)

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, checked(self.name, f, getattr(self, f.name)))

    @classmethod
    def of(cls, **hyperparameters: Any) -> Method:
        """A method from keyword arguments, with an error that names the unknown ones."""
        known = [f.name for f in fields(cls)]
        strange = sorted(set(hyperparameters) - set(known))
        if strange:
            raise ValueError(unknown(cls.name, strange[0], known))
        return cls(**hyperparameters)

    def recipe(self) -> Recipe:
        """What a step computes."""
        raise NotImplementedError

    def schedule(self) -> Schedule:
        """When and how much."""
        raise NotImplementedError

    def initial_scale(self) -> float | None:
        """The first scale of Q; None: it is taken from the first gradients."""
        return getattr(self, "preconditioner_init_scale", getattr(self, "precond_init_scale", None))


def method(name: str, title: str, source: str) -> Callable[[type[Method]], type[Method]]:
    """Register a method under its name (of the optax function) and its title (of the PyTorch class)."""

    def register(cls: type[Method]) -> type[Method]:
        cls.name, cls.title, cls.source = name, title, source
        cls.summary = (cls.__doc__ or "").strip().splitlines()[0]
        METHODS[name] = dataclass(frozen=True, kw_only=True)(cls)
        return METHODS[name]

    return register


def is_positive(value: object) -> bool:
    """Is a number positive? True too of an array, whose number may not be known."""
    return not isinstance(value, Real) or float(value) > 0


def skewest() -> Any:
    """The hyperparameter `preconditioner_max_skew` or `max_skew_dense`."""
    doc = "an axis is dense if its length squared is at most this times the tensor's size"
    return setting(1.0, doc, "[0, inf]", structural=True)


def keeping() -> Any:
    """The hyperparameter `keep_p`."""
    return setting(False, "keep P between steps beside its factors Q: fewer products, twice their memory", kind="flag")


def past() -> Any:
    """The hyperparameter `b1`."""
    doc = "weight of the past in the average of gradients; in PyTorch `momentum`, where `b1` is taken too"
    return setting(0.9, doc, "[0, 1)", group_key="momentum")


def precise(default: str | None, what: str) -> Any:
    """A hyperparameter for the precision of matrix products; see `psgd._xp.products`."""
    doc = f"precision of the float32 products that {what}; None is the framework's own"
    return setting(default, doc, kind="name", names=lambda: PRECISIONS)
