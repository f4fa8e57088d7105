"""The named methods: the only place where a hyperparameter has a name, a default, a range and a sentence.

A method is a frozen dataclass of hyperparameters that turns itself into a `Recipe` and a `Tempo` of the pipeline.
Adding a method is adding a dataclass with the `method` decorator; both frameworks' optimizers, the conformance cases,
the documentation and the benchmarks iterate `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, replace
from decimal import Decimal
from math import inf, nan, prod
from numbers import Real
from typing import Any, ClassVar

from psgd import criterion, lra, xmat
from psgd._xp import PRECISIONS, dtype_name, is_array, is_of_jax, is_traced
from psgd.geometry import GEOMETRIES, OF_HERMITIAN_Q, Geometry, inverse_gram, mean_dear
from psgd.kron import DenseRule, Kronecker, by_terms, by_triangle
from psgd.lra import LRA
from psgd.naming import did_you_mean, shown, unknown
from psgd.pipeline import Clip, Recipe, StartScale, Tempo
from psgd.schedule import (
    Annealed,
    When,
    at,
    capped_average,
    coin,
    corrected,
    early,
    evenly,
    from_first,
    inverse_root,
    nesterov,
    never,
    periodic,
    unfitted,
)
from psgd.shapes import matrix, matrix_order, merge, squeeze
from psgd.spectral import NormBound, TraceBound

METHODS: dict[str, type[Method]] = {}

SCALES = "[1e-18, 1e18]"  # whose squares are numbers of float32, as the inverses of their squares are
NOISES = "[0, 1e18]"
RATES = "(0, 10]"  # of factors, whose steps are a share of them
RANKS = "[0, 1000000]"
REAL = ("float", "bfloat", "int", "uint")  # how the names of the dtypes of real numbers begin


# ---- hyperparameters -------------------------------------------------------------------
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
    """A hyperparameter: its default, its sentence and what it may be.

    within: an interval such as "[0, 1)" for numbers. kind: "number", "whole", "flag", "name", "dtype" or "pair".
    names: for a name, the collection it must be in (None allows None); looked up at each use, so that it may grow.
    scheduled: it may also be a function of the step, or the four numbers of one that `Annealed` is.
    structural: it shapes the program, as a bound on sizes does, and must be known before anything is traced; so does,
    unless told, what is no number, a whole number, and a default that is a function of the step.
    group_key: what PyTorch's groups call it, where its schedulers look for another name.
    """
    metadata = {"doc": doc, "within": within, "kind": kind, "names": names, "scheduled": scheduled}
    metadata["structural"] = (kind != "number" or callable(default)) if structural is None else structural
    metadata["group_key"] = group_key
    return field(default=default, metadata=metadata)


def group_key(f: Field[Any]) -> str:
    """What a group of a PyTorch optimizer calls a hyperparameter."""
    return f.metadata["group_key"] or f.name


def outside(value: float, within: str) -> bool:
    """Is a number outside an interval like "[0, 1)"? NaN always is."""
    low, high = (float(end) for end in within[1:-1].split(","))
    above = value >= low if within[0] == "[" else value > low
    below = value <= high if within[-1] == "]" else value < high
    return not (above and below)


def plain(value: Any, *, static: bool = False) -> Any:
    """The number that a value is, or that an array of one element holds, as Python's own; any other value as it is.

    An array of JAX stays one, 0-d: at the next call, traced, its number may not be known. static: it has to be.
    """
    if is_array(value) and prod(value.shape) == 1:
        if is_traced(value) or (is_of_jax(value) and not static):
            return value.reshape(())
        try:
            value = value.item()
        except (RuntimeError, TypeError):  # it holds no numbers, as on the device "meta"
            return value
    if not isinstance(value, (Real, Decimal)) or isinstance(value, bool):
        return value
    try:
        number = float(value)
    except OverflowError:  # more than floats hold
        return inf if abs(value) == value else -inf
    except ValueError:  # a signalling NaN
        return nan
    return value if isinstance(value, int) and abs(value) < 2**53 else number


def complaint(f: Field[Any], value: Any) -> str | None:
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
    if kind == "whole" and value != inf and not float(value).is_integer():
        return "must be a whole number"
    return f"must lie in {within}" if within and outside(value, within) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def normalised(f: Field[Any], value: Any) -> Any:
    """A value as it is kept: a dtype by its name, a pair as a tuple, a whole number as an integer, ..."""
    kind = f.metadata["kind"]
    if kind == "dtype":
        try:
            return None if value is None else dtype_name(value)
        except Exception:  # it has no name, so it is no dtype
            return shown(value)
    if isinstance(value, (tuple, list)):
        value = tuple(map(plain, value))
        many = f.metadata["scheduled"] and len(value) == len(Annealed._fields)
        return Annealed(*value) if many else value
    value = plain(value, static=f.metadata["structural"])
    if kind == "name" and isinstance(value, str) and value not in f.metadata["names"]():
        return value.replace("p5", ".5")  # psgd_torch's other spelling of Q0.5EQ1.5
    if kind == "whole" and _is_number(value) and float(value).is_integer():
        return int(value)
    return value


def checked(owner: str, f: Field[Any], value: Any, name: str = "") -> Any:
    """A value of a hyperparameter as it is kept; an error that says what is wrong with it. name: it was given as."""
    kept = normalised(f, value)
    wrong = complaint(f, kept)
    if wrong:
        choices = [x for x in f.metadata["names"]() if isinstance(x, str)] if f.metadata["kind"] == "name" else []
        meant = did_you_mean(value, choices) if isinstance(value, str) else ""
        told = shown(kept if f.metadata["kind"] == "dtype" else value)
        raise ValueError(f"{owner}: {name or f.name}={told} {wrong}; the default is {f.default!r}{meant}")
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
    seed: int = setting(0, "seed of the noise", "[0, 4294967295]", "whole", structural=False)

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

    def tempo(self) -> Tempo:
        """When and how much."""
        raise NotImplementedError

    def start_scale(self) -> float | None:
        """The first scale of Q; None is taken from the first gradients."""
        return getattr(self, "preconditioner_init_scale", getattr(self, "precond_init_scale", None))


def method(name: str, title: str, source: str) -> Callable[[type[Method]], type[Method]]:
    """Register a method under its name (of the optax function) and its title (of the PyTorch class)."""

    def register(cls: type[Method]) -> type[Method]:
        cls.name, cls.title, cls.source = name, title, source
        cls.summary = (cls.__doc__ or "").strip().splitlines()[0]
        made = dataclass(frozen=True, kw_only=True)(cls)
        METHODS[name] = made
        return made

    return register


def is_positive(value: Any) -> bool:
    """Is a number positive, or unknown yet?"""
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


# ---- quad_torch ------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class QuadTorch(Method):
    """What the two optimizers of quad_torch share: whitening of the momentum, merged to a matrix, at every step.

    One automatic scale serves all tensors, and every factor gets all of it, so that with the automatic scale a vector
    starts at P = 1/rms(g) and a matrix at 1/rms(g)^2, as in quad_torch.
    """

    geometry: ClassVar[Geometry]
    # Of quad_torch 0.4, its last release, which has no `preconditioner_init_scale`.
    positional = (
        "lr",
        "lr_style",
        "momentum",
        "weight_decay",
        "max_size_dense",
        "max_skew_dense",
        "preconditioner_lr",
        "noise_scale",
        "dtype",
    )

    weight_decay: float = setting(
        0.1, "decoupled weight decay: p loses the learning rate times weight_decay of itself each step", "[0, inf)"
    )
    lr_style: str | None = setting(
        "adam",
        '"adam" divides the direction by 5, so that Adam\'s learning rates fit; None does not',
        kind="name",
        names=lambda: ("adam", None),
    )
    momentum: float = setting(0.95, "weight of the past in the average of gradients", "[0, 1)")
    max_size_dense: float = setting(16384, "longest axis that gets a dense factor", "[1, inf]", "whole")
    max_skew_dense: float = skewest()
    preconditioner_lr: float = setting(
        0.7, "first step size of the factors; falls as 1/sqrt(1 + step/10000) to 0.3, its floor", RATES
    )
    preconditioner_init_scale: float | None = setting(
        None, "first scale of each factor; None takes it from the first gradients", SCALES
    )
    noise_scale: float = setting(1e-9, "noise added to what is whitened, times a random sign", NOISES)
    dtype: Any = setting(None, "dtype of all state, or its name; None is the parameter's", kind="dtype")
    keep_p: bool = keeping()

    def recipe(self) -> Recipe:
        return Recipe(
            preconditioner=Kronecker(
                self.geometry,
                DenseRule(self.max_size_dense, self.max_skew_dense, min_ndim=2),
                NormBound(probes=4, products=6, offset=1e-9),
                split=False,
                keep_p=self.keep_p,
            ),
            layout=merge,
            momentum=is_positive(self.momentum),
            whiten="momentum",
            balance_last=False,
            start=StartScale(power=2),
            clip=Clip(rms=1.1),
            gain=0.2 if self.lr_style == "adam" else 1.0,
            dtype=self.dtype,
        )

    def tempo(self) -> Tempo:
        return Tempo(
            averaging=from_first,
            momentum=self.momentum,
            rate=lambda xp, step: inverse_root(xp, self.preconditioner_lr, step, timescale=10_000, floor=0.3),
            memory=0.95,
            damping=self.noise_scale,
            balance=periodic(100),
            seed=self.seed,
        )


@method("procrustes", "Procrustes", "quad_torch `Procrustes`")
class Procrustes(QuadTorch):
    """Whitening by dense factors kept nearly Hermitian by rotations (geometry Q0.5EQ1.5)."""

    geometry = replace(GEOMETRIES["Q0.5EQ1.5"], root=OF_HERMITIAN_Q)


@method("quad", "QUAD", "quad_torch `QUAD`")
class Quad(QuadTorch):
    """Whitening by Hermitian factors moved from both sides (geometry QUAD)."""

    geometry = GEOMETRIES["QUAD"]


# ---- psgd_torch ------------------------------------------------------------------------
def geometry_name() -> Any:
    """The hyperparameter `dQ`; psgd_torch also writes "Q0p5EQ1p5"."""
    return setting("Q0.5EQ1.5", "the geometry", kind="name", names=lambda: tuple(GEOMETRIES))


def amplitudes() -> Any:
    """The hyperparameter `grad_clip_max_amps`."""
    return setting((2.0, 10.0), "largest RMS, then largest entry of the direction of a tensor", kind="pair")


def longest() -> Any:
    """The hyperparameter `preconditioner_max_size`."""
    return setting(inf, "longest axis that gets a dense factor", "[0, inf]", "whole")


def exactness() -> Any:
    """The hyperparameter `exact_hessian_vector_product`."""
    doc = "products with the Hessian by differentiating twice; False takes differences of two gradients"
    return setting(True, doc, kind="flag")


def step_bound() -> Any:
    """The hyperparameter `grad_clip_max_norm`."""
    return setting(inf, "largest length of the direction over all tensors", "(0, inf]")


@dataclass(frozen=True, kw_only=True)
class PsgdTorch(Method):
    """What the methods of psgd_torch share: a capped average, a coin, a running bound, damping relative to rounding."""

    momentum: float = setting(0.0, "weight of the past in the average of gradients, at most", "[0, 1)")
    preconditioner_update_probability: float = setting(1.0, "probability of a fit, by one coin a step", "(0, 1]")
    lr_preconditioner: float = setting(0.1, "step size of the factors", "(0, 1)")
    betaL: float = setting(0.9, "memory of the running bound on the residual", "[0, 1)")
    damping: float = setting(1e-9, "noise added to what is fitted, beside one rounding of it", NOISES)
    preconditioner_init_scale: float | None = setting(
        None, "first scale of Q; None takes it from what is fitted first", SCALES
    )

    def balance(self) -> When:
        """The steps at which factors are balanced."""
        return never

    def tempo(self) -> Tempo:
        return Tempo(
            averaging=capped_average,
            momentum=self.momentum,
            rate=lambda xp, step: self.lr_preconditioner,
            memory=self.betaL,
            damping=self.damping,
            fit=coin("fit", self.preconditioner_update_probability),
            balance=self.balance(),
            side=coin("side", 0.5),
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class Whitening(PsgdTorch):
    """What its whitening methods share."""

    whiten_grad: bool = setting(True, "whiten the gradient; False whitens the momentum", kind="flag")
    update_preconditioner_first: bool = setting(True, "fit before preconditioning, or after", kind="flag")
    grad_clip_max_amps: tuple[float, float] = amplitudes()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.whiten_grad and not is_positive(self.momentum):
            raise ValueError(f"{self.name}: whiten_grad=False whitens the momentum; give momentum > 0 with it")

    def shared(self) -> dict[str, Any]:
        """The part of the recipe that all of them have."""
        return {
            "momentum": is_positive(self.momentum),
            "whiten": "gradient" if self.whiten_grad else "momentum",
            "fit_first": self.update_preconditioner_first,
            "clip": Clip(*self.grad_clip_max_amps),
        }


@dataclass(frozen=True, kw_only=True)
class Newton(PsgdTorch):
    """What its methods for the inverse of the Hessian share: a pair (v, H v) at every fit, a bounded step."""

    lr: float = setting(0.01, "learning rate", "[0, inf)")
    grad_clip_max_norm: float = step_bound()
    exact_hessian_vector_product: bool = exactness()

    def shared(self) -> dict[str, Any]:
        """The part of the recipe that all of them have."""
        return {
            "newton": True,
            "momentum": is_positive(self.momentum),
            "trusted": not isinstance(self.grad_clip_max_norm, Real) or self.grad_clip_max_norm < inf,
        }

    def tempo(self) -> Tempo:
        base = super().tempo()
        # Published: a preconditioner whose first scale is to be found is fitted as soon as there is anything to fit.
        fit = unfitted(base.fit) if self.preconditioner_init_scale is None else base.fit
        return replace(base, fit=fit, counts=True, trust=self.grad_clip_max_norm)


@dataclass(frozen=True, kw_only=True)
class OfAxes(PsgdTorch):
    """A factor for each axis of each tensor, in any of the registered geometries."""

    complex_parameters = True

    dQ: str = geometry_name()
    preconditioner_max_size: float = longest()
    preconditioner_max_skew: float = skewest()
    keep_p: bool = keeping()

    def balance(self) -> When:
        return never if GEOMETRIES[self.dQ].balance_first else coin("balance", 0.01)

    def kronecker(self) -> Kronecker:
        """The preconditioner."""
        dense = DenseRule(self.preconditioner_max_size, self.preconditioner_max_skew)
        return Kronecker(GEOMETRIES[self.dQ], dense, keep_p=self.keep_p)


@method("kron_whiten", "KronWhiten", "psgd_torch `KronWhiten`")
class KronWhiten(OfAxes, Whitening):
    """Whitening of tensors of any order, complex ones too, in any of the registered geometries."""

    def recipe(self) -> Recipe:
        return Recipe(preconditioner=self.kronecker(), layout=squeeze, **self.shared())


@method("kron_newton", "KronNewton", "psgd_torch `KronNewton`")
class KronNewton(Newton, OfAxes):
    """The inverse Hessian of tensors of any order, complex ones too, in any of the registered geometries."""

    def recipe(self) -> Recipe:
        return Recipe(preconditioner=self.kronecker(), layout=squeeze, **self.shared())


@dataclass(frozen=True, kw_only=True)
class OfRank(PsgdTorch):
    """A low-rank preconditioner of all parameters."""

    rank_of_approximation: int = setting(10, "rank; 0 is a diagonal preconditioner", RANKS, "whole")

    def whole(self) -> dict[str, Any]:
        """The preconditioner, in a recipe."""
        return {"preconditioner": LRA(self.rank_of_approximation), "whole": True}


@method("lra_whiten", "LRAWhiten", "psgd_torch `LRAWhiten`")
class LRAWhiten(OfRank, Whitening):
    """Whitening of all parameters as one vector, by a low-rank preconditioner."""

    def recipe(self) -> Recipe:
        return Recipe(**self.whole(), **self.shared())


@method("lra_newton", "LRANewton", "psgd_torch `LRANewton`")
class LRANewton(Newton, OfRank):
    """The inverse Hessian of all parameters as one vector, by a low-rank preconditioner."""

    def recipe(self) -> Recipe:
        return Recipe(**self.whole(), **self.shared())


@method("dense_newton", "DenseNewton", "psgd_torch `DenseNewton`")
class DenseNewton(Newton):
    """The inverse Hessian of all parameters as one vector, by a matrix, in any of the registered geometries."""

    dQ: str = geometry_name()

    def recipe(self) -> Recipe:
        kind = Kronecker(GEOMETRIES[self.dQ], DenseRule(max_skew=inf), TraceBound())
        return Recipe(preconditioner=kind, whole=True, **self.shared())


@method("kwns4", "KWNS4", "psgd_torch `KWNS4`")
class Kwns4(Whitening):
    """Whitening of tensors of any order in half precision (geometry Q0.5EQ1.5), with weight decay."""

    lr: float = setting(2e-4, "learning rate", "[0, inf)")
    weight_decay: float = setting(0.05, "weight decay", "[0, inf)")
    decoupled_weight_decay: bool = setting(
        True,
        "p loses the learning rate times weight_decay of itself; False adds weight_decay * p to the gradient",
        kind="flag",
    )
    momentum: float = setting(0.9, "weight of the past in the average of gradients, at most", "[0, 1)")
    whiten_grad: bool = setting(False, "whiten the gradient; False whitens the momentum", kind="flag")
    lr_preconditioner: float = setting(0.5, "step size of the factors", "(0, 1)")
    preconditioner_max_size: float = longest()
    preconditioner_max_skew: float = skewest()
    preconditioner_init_scale: float | None = setting(1.0, "first scale of Q", SCALES)
    preconditioner_dtype: Any = setting("bfloat16", "dtype of all state; None is the parameter's", kind="dtype")
    resync_every: int = setting(1_000_000, "has no effect: ranks cannot drift apart here", "[1, inf)", "whole")
    keep_p: bool = keeping()

    def balance(self) -> When:
        return coin("balance", 0.01)

    def recipe(self) -> Recipe:
        dense = DenseRule(self.preconditioner_max_size, self.preconditioner_max_skew)
        return Recipe(
            preconditioner=Kronecker(GEOMETRIES["Q0.5EQ1.5"], dense, keep_p=self.keep_p),
            layout=squeeze,
            dtype=self.preconditioner_dtype,
            decoupled=self.decoupled_weight_decay,
            **self.shared(),
        )


# ---- psgd_jax --------------------------------------------------------------------------
PSGD_JAX_BOUND = NormBound(probes=0, products=2)


def order_of_psgd_jax(*own: str) -> tuple[str, ...]:
    """The published order of its functions with a coin, with the arguments that only one of them has."""
    before = ("lr", "preconditioner_update_probability", "b1", "nesterov", "weight_decay", "mask")
    after = ("precond_lr", "precond_init_scale", "update_global_norm_clip", "step_normalizer_order", "seed")
    return (*before, *own, *after, "mu_dtype", "precision")


@method("kron", "Kron", "psgd_jax `kron`")
class KronJax(Method):
    """Whitening of tensors of any order by triangular factors (geometry EQ), fitted more and more rarely."""

    positional = (
        "lr",
        "b1",
        "weight_decay",
        "weight_decay_mask",
        "preconditioner_update_probability",
        "max_size_triangular",
        "min_ndim_triangular",
        "memory_save_mode",
        "momentum_into_precond_update",
        "preconditioner_lr",
        "preconditioner_init_scale",
        "mu_dtype",
        "precond_dtype",
        "precond_update_precision",
        "precond_grads_precision",
        "scanned_layers",
        "lax_map_scanned_layers",
        "lax_map_batch_size",
    )

    b1: float = past()
    preconditioner_update_probability: Any = setting(
        Annealed(),
        "share of the steps that fit, at even distances; a number, or a function of the step such as "
        "`precond_update_prob_schedule` gives",
        "(0, 1]",
        scheduled=True,
    )
    max_size_triangular: float = setting(8192, "longest axis that gets a dense factor", "[0, inf]", "whole")
    min_ndim_triangular: int = setting(2, "fewest axes of a tensor that gets dense factors", "[0, inf)", "whole")
    memory_save_mode: str | None = setting(
        None,
        'axes that stay diagonal: None, "one_diag" (the longest, the last of equals) or "all_diag"',
        kind="name",
        names=lambda: (None, "one_diag", "all_diag"),
    )
    momentum_into_precond_update: bool = setting(True, "whiten the momentum; False whitens the gradient", kind="flag")
    preconditioner_lr: float = setting(0.1, "step size of the factors", RATES)
    preconditioner_init_scale: float = setting(1.0, "first scale of Q", SCALES)
    mu_dtype: Any = setting(None, "dtype in which the momentum is kept; None is the parameter's", kind="dtype")
    precond_dtype: Any = setting(
        None, "dtype in which the factors are kept; None is the parameter's, at least float32", kind="dtype"
    )
    precond_update_precision: str | None = precise("tensorfloat32", "fit the factors")
    precond_grads_precision: str | None = precise(None, "apply the factors")
    keep_p: bool = keeping()

    def recipe(self) -> Recipe:
        return Recipe(
            preconditioner=Kronecker(
                GEOMETRIES["EQ"],
                DenseRule(self.max_size_triangular, inf, self.min_ndim_triangular, self.memory_save_mode),
                PSGD_JAX_BOUND,
                keep_p=self.keep_p,
            ),
            momentum=is_positive(self.b1),
            whiten="momentum" if self.momentum_into_precond_update else "gradient",
            damping=criterion.proportional,
            balance_last=False,
            clip=Clip(rms=1.1),
            lifted=True,
            momentum_dtype=self.mu_dtype,
            factor_dtype=self.precond_dtype,
            fit_precision=self.precond_update_precision,
            apply_precision=self.precond_grads_precision,
        )

    def tempo(self) -> Tempo:
        return Tempo(
            averaging=corrected,
            momentum=self.b1,
            rate=lambda xp, step: self.preconditioner_lr,
            memory=0.0,
            damping=2.0**-11.5,  # the square root of float32's epsilon
            fit=evenly(self.preconditioner_update_probability),
            balance=coin("balance", 0.01),
            counts=True,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class PsgdJax(Method):
    """What psgd_jax's methods with a coin share: whitening of the gradient, a bounded step, two normalisers."""

    mask_name = "mask"
    positional = order_of_psgd_jax()

    lr: float = setting(0.01, "learning rate", "[0, inf)")
    preconditioner_update_probability: Any = setting(
        1.0, "probability of a fit, by one coin a step; the first two steps always fit", "(0, 1]", scheduled=True
    )
    b1: float = past()
    nesterov: bool = setting(False, "look one step ahead with the average", kind="flag")
    precond_lr: Any = setting(0.1, "step size of the factors", RATES, scheduled=True)
    precond_init_scale: float | None = setting(None, "first scale of Q; None takes it from the first gradients", SCALES)
    update_global_norm_clip: float | None = setting(
        None, "largest length of the direction over all tensors; None is no limit", "(0, inf)"
    )
    step_normalizer_order: str = setting(
        "2nd",
        'what a step of the factors is divided by: the norm of both terms of its residual ("2nd") or of their '
        'difference ("1st")',
        kind="name",
        names=lambda: ("1st", "2nd"),
    )
    seed: int | None = setting(  # type: ignore[assignment]
        None, "seed of the noise; None is 0", "[0, 4294967295]", "whole", structural=False
    )
    mu_dtype: Any = setting(None, "dtype in which the momentum is kept; None is the parameter's", kind="dtype")
    precision: str | None = precise("tensorfloat32", "fit and apply the factors")

    def shared(self) -> dict[str, Any]:
        """The part of the recipe that all of them have."""
        return {
            "momentum": is_positive(self.b1),
            "trusted": self.update_global_norm_clip is not None,
            "lifted": True,
            "momentum_dtype": self.mu_dtype,
            "fit_precision": self.precision,
            "apply_precision": self.precision,
        }

    def tempo(self) -> Tempo:
        return Tempo(
            averaging=nesterov if self.nesterov else corrected,
            momentum=self.b1,
            rate=lambda xp, step: at(self.precond_lr, step),
            memory=0.0,
            damping=0.0,
            fit=early(2, coin("fit", self.preconditioner_update_probability)),
            balance=coin("balance", 0.01),
            side=coin("side", 0.5),
            counts=True,
            trust=inf if self.update_global_norm_clip is None else self.update_global_norm_clip,
            seed=0 if self.seed is None else self.seed,
        )


@method("affine", "Affine", "psgd_jax `affine`")
class Affine(PsgdJax):
    """Whitening of matrices, tensors as the most square of them, by a triangular factor on either side."""

    positional = order_of_psgd_jax("max_size_triangular", "max_skew_triangular")

    max_size_triangular: float = setting(4096, "longest side that gets a dense factor", "[0, inf]", "whole")
    max_skew_triangular: float = setting(
        128, "a side is dense if it is at most this many times as long as the other", "[0, inf]", structural=True
    )
    keep_p: bool = keeping()

    def recipe(self) -> Recipe:
        return Recipe(
            preconditioner=Kronecker(
                replace(GEOMETRIES["EQ"], expected=inverse_gram, probed=mean_dear),
                DenseRule(self.max_size_triangular, self.max_skew_triangular),
                PSGD_JAX_BOUND,
                by_triangle if self.step_normalizer_order == "1st" else by_terms,
                keep_p=self.keep_p,
            ),
            order=matrix_order,
            layout=matrix,
            damping=criterion.undamped,
            start=StartScale(power=2, shared=False),
            **self.shared(),
        )


@method("xmat", "XMat", "psgd_jax `xmat`")
class XMatJax(PsgdJax):
    """Whitening of all parameters as one vector, by a diagonal and an antidiagonal."""

    def recipe(self) -> Recipe:
        normaliser = xmat.by_residual if self.step_normalizer_order == "1st" else xmat.by_terms
        return Recipe(
            preconditioner=xmat.XShaped(normaliser),
            whole=True,
            damping=criterion.undamped,
            start=StartScale(power=2),
            **self.shared(),
        )


@method("low_rank_approximation", "LowRankApproximation", "psgd_jax `low_rank_approximation`")
class LraJax(PsgdJax):
    """Whitening of all parameters as one vector, by a low-rank preconditioner."""

    also = "lra"
    positional = order_of_psgd_jax("uvd_rank_of_approximation")

    uvd_rank_of_approximation: int = setting(
        10, "rank; 0 is a diagonal preconditioner; of n parameters in all at most n - 1", RANKS, "whole"
    )

    def recipe(self) -> Recipe:
        normaliser = lra.BY_RESIDUAL if self.step_normalizer_order == "1st" else lra.BY_TERMS
        return Recipe(
            preconditioner=LRA(
                self.uvd_rank_of_approximation, normaliser, lra.aligned_if_long, lra.spread_by_rank, capped=True
            ),
            whole=True,
            damping=criterion.undamped,
            balance_last=False,
            start=StartScale(power=2),
            **self.shared(),
        )
