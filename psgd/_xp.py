"""The only file that knows that frameworks differ.

The core is written against the Python Array API standard. What the standard lacks (a triangular solve, a device for
a constant, the name of a dtype) is filled in here, by the framework's own public function where it has one and by
standard operations where it has none. No framework is imported here: whoever passes an array has imported its library.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from types import ModuleType
from typing import Any, TypeGuard

import numpy as np

from psgd.arrays import Array, Dtype, Number

HALF = ("bfloat16", "float16")
PRECISIONS = (None, "bfloat16", "tensorfloat32", "float32")


def namespace(x: Array) -> ModuleType:
    """The Array API namespace of `x`: its own, or array_api_compat's where the library has none (PyTorch)."""
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    # By a dictionary look-up, since `array_api_compat.array_namespace` makes torch.compile print a warning.
    known = sys.modules.get("array_api_compat.torch")
    return known if known is not None else importlib.import_module("array_api_compat.torch")


def is_array(x: object) -> TypeGuard[Array]:
    """Is `x` an array of any library, or a NumPy scalar?"""
    return not isinstance(x, type) and all(hasattr(x, name) for name in ("shape", "dtype", "item"))


def is_of_numpy(x: object) -> bool:
    """Is `x` an array or a scalar of NumPy?"""
    return isinstance(x, (np.ndarray, np.generic))


def on_host(x: Array) -> Any:
    """The array as a NumPy array, without a copy if it lies on a CPU."""
    return np.asarray(x)


def has_nan(x: Array) -> bool:
    """Is there a NaN in an array? Its numbers must be known; they are read on the host."""
    return bool(np.isnan(on_host(x)).any())


def is_of_jax(x: object) -> TypeGuard[Array]:
    """Is `x` an array of JAX, concrete or traced?"""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.Array)


def is_traced(x: object) -> TypeGuard[Array]:
    """Is `x` an array of JAX whose numbers are not known yet?"""
    return is_of_jax(x) and isinstance(x, sys.modules["jax"].core.Tracer)


def dtype_name(dtype: Dtype) -> str:
    """The plain name, such as "bfloat16", of `torch.bfloat16`, `jnp.bfloat16`, `np.dtype("float32")` or a name."""
    name = getattr(dtype, "__name__", None) or str(dtype)
    return str(name).rsplit(".", maxsplit=1)[-1]


def dtype_of(xp: ModuleType, name: str) -> Any:
    """The dtype of a namespace by its plain name; ValueError where the namespace has none of that name."""
    if not hasattr(xp, name):
        raise ValueError(f"dtype={name!r} is unknown to {xp.__name__}; use a dtype that it has, such as 'float32'")
    return getattr(xp, name)


def is_complex(x: Array) -> bool:
    """Is the dtype of `x` complex?"""
    return bool(namespace(x).isdtype(x.dtype, "complex floating"))


def eps(x: Array) -> float:
    """Machine epsilon of the (real) dtype of `x`."""
    return float(namespace(x).finfo(x.dtype).eps)


# ---- sizes -------------------------------------------------------------------------------
# The product of a gradient with a factor may overflow, although the step, which is normalised, would not. So arrays are
# divided by a unit of their own size before they are multiplied, and the unit is put back into the normalised result.
def largest(x: Array) -> Array:
    """max|x|, 0-d, of at least one entry."""
    xp = namespace(x)
    # Eager PyTorch would store |x|, one more pass over memory. Below 4096 entries, which lie in the fastest cache, a
    # pass takes less than another call.
    if is_complex(x) or not xp.__name__.endswith("torch") or prod(x.shape) < 1 << 12:
        return xp.max(xp.abs(x))
    return xp.maximum(xp.max(x), -xp.min(x))


def in_units(x: Array, scale: Number = 1.0) -> tuple[Array, Array, Array]:
    """Divide an array by its own size, if that is above 1, so that its products with large factors stay finite.

        y = scale x / c,   c = max(max|scale x|, 1), at most 0.25 / tiny

    Args:
        x: at least one entry.
        scale: a number that multiplies x.

    Returns: y, in the shape of x; c and max|scale x|, both 0-d.
    """
    # 1 / c has to be a normal number, since some devices take subnormal ones for zero; 1 / (0.25 / tiny) is four times
    # the smallest. Only beyond, above 2e37 in float32, is y larger than 1, at most 16.
    xp, scale = namespace(x), number(scale, x)
    size = largest(x) if isinstance(scale, float) and scale == 1 else largest(x) * scale
    c = xp.clip(size, 1.0, 0.25 / tiny(x))
    return x * (scale / c), c, size


def shrinkage(x: Array, unit: Number, y: Array | None = None) -> tuple[Array, Array]:
    """Factors of x and y with which products of four entries are finite; their ratio is always `unit`.

        for_x = min(unit, limit / max|x|, unit limit / max|y|),   for_y = for_x / unit,   limit = max float^(1/4)

    So they are `unit` and 1 where all entries of unit x and of y are below 4.3e9 in float32. A residual x x^H - y y^H
    is normalised by its own size, so that beyond that a smaller common factor changes nothing.

    Args:
        x: divided by `unit` before, see `in_units`; what it is multiplied by puts the unit back.
        unit: at least 1.
        y: the other array of the residual, in units of 1; None where its mean is taken.

    Returns: for_x and for_y, 0-d.
    """
    xp, highest = namespace(x), float(namespace(x).finfo(x.dtype).max)
    if not prod(x.shape):
        one = xp.ones_like(xp.sum(xp.abs(x)))
        return one * unit, one
    limit = highest**0.25
    for_x = limit / xp.clip(largest(x), min=4 * limit / highest)  # at most a quarter of the largest float, if x is 0
    for_x = xp.clip(for_x, max=unit) if isinstance(unit, float) else xp.minimum(unit, for_x)
    for_y = for_x / unit
    if y is None:
        return for_x, for_y
    other = limit / xp.clip(largest(y), min=limit)
    return xp.minimum(for_x, unit * other), xp.minimum(for_y, other)


def is_something(size: Array) -> Array:
    """Is a tensor of this size (0-d, max|x| or an RMS) a signal that a preconditioner can be fitted to? 0-d, boolean.

    It is above tiny^(3/4), 4e-29 in float32: P is about 1 / size then, and its products with entries up to
    tiny^(-1/4), 3e9, stay below 1 / tiny, hence finite. float16 counts as float32, in which it is computed: its own
    tiny, 6e-5, is an ordinary gradient.
    """
    return size > min(tiny(size), 2.0**-126) ** 0.75


def plus(y: Array, a: Number, x: Array, *, donate: bool = False) -> Array:
    """y + a x, in one pass over memory where the framework has a function for it.

    Args:
        y: in a shape that x broadcasts to.
        a: a number, or an array to broadcast.
        x: read only.
        donate: the caller made y and does not need it afterwards, so that PyTorch may write over it.

    Returns: in the shape and dtype of y.
    """
    xp = namespace(y)
    # PyTorch's fused functions do not round a x to a half precision before they add, but under torch.vmap they do. So
    # that both ways give the same bits, half precisions take two operations.
    if not xp.__name__.endswith("torch") or dtype_name(y.dtype) in HALF:
        return y + a * x
    if isinstance(a, (int, float)):
        return (y.add_ if donate else y.add)(x, alpha=a)
    return y.addcmul(cast(a, y.dtype), x)  # torch.vmap has no rule for addcmul_


def times(x: Array, a: Number) -> Array:
    """a x of an array that the caller made and does not need afterwards, so that PyTorch may write over it.

    a: a number, or an array to broadcast.
    """
    if not namespace(x).__name__.endswith("torch"):
        return x * a
    if isinstance(a, (int, float)):
        return x.mul_(a)
    return x * a if is_complex(a) and not is_complex(x) else x.mul_(cast(a, x.dtype))


def running_sums(x: Array) -> Array:
    """The cumulative sums over the first axis, in the shape of x."""
    xp = namespace(x)
    # array_api_compat's function makes torch.compile print a warning.
    return xp.cumsum(x, dim=0) if xp.__name__.endswith("torch") else xp.cumulative_sum(x, axis=0)


def tiny(x: Array) -> float:
    """Smallest normal number of the (real) dtype of `x`."""
    return float(namespace(x).finfo(x.dtype).smallest_normal)


def real_dtype(x: Array) -> Any:
    """The dtype of |x|."""
    xp = namespace(x)
    return {"complex64": xp.float32, "complex128": xp.float64}.get(dtype_name(x.dtype), x.dtype)


def accumulation_dtype(x: Array) -> Any:
    """The dtype of |x|, or float32 where that is a half precision: for norms, traces, bounds and solves."""
    dtype = real_dtype(x)
    return namespace(x).float32 if dtype_name(dtype) in HALF else dtype


def real(x: Array) -> Array:
    """The real part, of real arrays too."""
    return namespace(x).real(x) if is_complex(x) else x


def conj(x: Array) -> Array:
    """The complex conjugate, of real arrays too."""
    if not is_complex(x):
        return x
    xp = namespace(x)
    return xp.real(x) - 1j * xp.imag(x)  # `conj` makes torch.vmap print a warning


def adjoint(q: Array) -> Array:
    """q^H of a matrix, or of a stack of matrices; the conjugate of a diagonal."""
    return conj(q) if q.ndim < 2 else conj(q.mT)


def diagonal(a: Array) -> Array:
    """The real diagonal of a square matrix, (n,), as a strided slice: `diagonal` makes torch.compile warn."""
    n = a.shape[-1]
    return real(namespace(a).reshape(a, (n * n,))[:: n + 1])


def cast(x: Array, dtype: Dtype) -> Array:
    """`x` in a dtype; x itself where it has that dtype."""
    return x if x.dtype == dtype else namespace(x).astype(x, dtype)


def number(value: Number, like: Array) -> Any:
    """A number of the plan beside an array: cast to the array's real dtype unless it is Python's own."""
    return value if isinstance(value, (int, float)) else cast(value, real_dtype(like))


def make(like: Array, function: str, *args: object, dtype: Dtype | None = None) -> Array:
    """`ones`, `zeros` or `arange` of the namespace of `like`, on its device, in its dtype or in `dtype`."""
    xp = namespace(like)
    place = {"device": like.device} if xp.__name__.endswith("torch") else {}
    return getattr(xp, function)(*args, dtype=like.dtype if dtype is None else dtype, **place)


def identity(like: Array, n: int) -> Array:
    """The (n, n) identity in the dtype of `like`, by comparing counters: `eye` makes torch.compile print a warning."""
    xp = namespace(like)
    i = make(like, "arange", n, dtype=xp.int32)
    return xp.astype(i[:, None] == i[None, :], like.dtype)


# ---- products ----------------------------------------------------------------------------
# The precision in force, for this thread alone; set by `products` and by nothing else.
_local = threading.local()


@contextmanager
def products(precision: str | None) -> Iterator[None]:
    """The precision of matrix products of float32 arrays inside the `with` block, in this thread alone.

    Args:
        precision: None, the framework's default; "float32", nothing less; "tensorfloat32", operands may be rounded to
            10 bits by tensor cores; "bfloat16", operands and result are rounded to bfloat16.

    Source: psgd_jax's `precision`, `precond_update_precision` and `precond_grads_precision`.
    """
    before = getattr(_local, "precision", None)
    _local.precision = precision
    try:
        yield
    finally:
        _local.precision = before


def matmul(a: Array, b: Array) -> Array:
    """a @ b in the precision that `products` set; dtypes other than float32 are multiplied as they are."""
    precision = getattr(_local, "precision", None)
    if precision is None or dtype_name(a.dtype) != "float32" or dtype_name(b.dtype) != "float32":
        return a @ b
    xp = namespace(a)
    if precision == "bfloat16":
        low = dtype_of(xp, "bfloat16")
        return xp.astype(xp.astype(a, low) @ xp.astype(b, low), a.dtype)
    # JAX takes a precision for each product. PyTorch has one switch for the whole process, which belongs to the user.
    return xp.matmul(a, b, precision=precision) if xp.__name__.startswith("jax") else a @ b


def solve(a: Array, b: Array) -> Array:
    """y of a y = b, (r,), for a small square `a` (r, r) and a vector `b` (r,), by LU; half precisions in float32."""
    xp, dtype = namespace(a), b.dtype
    a, b = cast(a, _solvable(a)), cast(b, _solvable(b))
    return cast(xp.reshape(xp.linalg.solve(a, b[:, None]), (-1,)), dtype)


def _solvable(x: Array) -> Any:
    """The dtype in which x can be solved with: no library has solvers for half precisions."""
    return namespace(x).float32 if dtype_name(x.dtype) in HALF else x.dtype


def by_inverse(x: Array, q: Array) -> Array:
    """x q^-1: solve y q = x for an upper-triangular (n, n) `q` and a (k, n) `x`; half precisions in float32.

    Returns: y, (k, n), in the dtype of x. With zeros on the diagonal of q it is infinite or NaN, or NumPy raises.
    """
    xp, dtype = namespace(q), x.dtype
    q, x = cast(q, _solvable(q)), cast(x, _solvable(x))
    library = xp.__name__
    if library.endswith("torch"):  # solved from the right, row-major arrays need no copy: 1/2 to 1/3 of the time
        y = xp.linalg.solve_triangular(q, x, upper=True, left=False)
    elif library.startswith("jax"):
        y = importlib.import_module("jax.scipy.linalg").solve_triangular(q.mT, x.mT, lower=True).mT
    else:
        y = xp.linalg.solve(q.mT, x.mT).mT
    return cast(y, dtype)
