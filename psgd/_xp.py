"""The only file that knows that frameworks differ.

The core is written against the Python Array API standard. What the standard lacks (a triangular solve, a device for
a constant, the name of a dtype) is filled in here, by the framework's own public function where it has one and by
standard operations where it has none. No framework is imported: an array that reaches us has already loaded its own.
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
    # A dictionary look-up and not `array_namespace`, which makes torch.compile print a warning to the user.
    known = sys.modules.get("array_api_compat.torch")
    return known if known is not None else importlib.import_module("array_api_compat.torch")


def is_array(x: object) -> TypeGuard[Array]:
    """Is `x` an array of any library, or a number of NumPy?"""
    return not isinstance(x, type) and all(hasattr(x, name) for name in ("shape", "dtype", "item"))


def is_of_numpy(x: object) -> bool:
    """Is `x` an array of NumPy?"""
    return isinstance(x, (np.ndarray, np.generic))


def on_host(x: Array) -> Any:
    """The array as one of NumPy; of a CPU without a copy."""
    return np.asarray(x)


def has_nan(x: Array) -> bool:
    """Is there a NaN in an array whose numbers are known? Looks on the host."""
    return bool(np.isnan(on_host(x)).any())


def is_of_jax(x: object) -> TypeGuard[Array]:
    """Is `x` an array of JAX, concrete or traced?"""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.Array)


def is_traced(x: object) -> TypeGuard[Array]:
    """Is `x` an array of JAX whose numbers are not known yet?"""
    return is_of_jax(x) and isinstance(x, sys.modules["jax"].core.Tracer)


def dtype_name(dtype: Dtype) -> str:
    """`torch.bfloat16`, `jnp.bfloat16`, `np.dtype("float32")`, "float32": all by their plain name."""
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
# What a gradient, a factor and a probe measure may lie further apart than floating-point numbers reach. Products are
# made of arrays in units of their own size, and those units are put back where the result has found its own.
def largest(x: Array) -> Array:
    """max|x|, 0-d."""
    xp = namespace(x)
    if is_complex(x) or not xp.__name__.endswith("torch") or prod(x.shape) < 1 << 12:
        return xp.max(xp.abs(x))
    return xp.maximum(xp.max(x), -xp.min(x))  # eager PyTorch would write |x| down


def in_units(x: Array, scale: Number = 1.0) -> tuple[Array, Array, Array]:
    """y = scale x / c, which products with large factors leave among the floats; c = max(|scale x|, 1); max|scale x|.

    At the end of the floats y is above 1: the inverse of a larger c is subnormal, which some devices take for zero.
    """
    xp, scale = namespace(x), number(scale, x)
    size = largest(x) if isinstance(scale, float) and scale == 1 else largest(x) * scale
    c = xp.clip(size, 1.0, 0.25 / tiny(x))
    return x * (scale / c), c, size


def shrinkage(x: Array, unit: Number, y: Array | None = None) -> tuple[Array, Array]:
    """What to multiply x and y by, 0-d: by `unit` and by 1, or both by less where squares of entries would not be
    finite.

    A residual of squares is normalised by its own size: beyond such sizes it points nowhere else.
    """
    xp, highest = namespace(x), float(namespace(x).finfo(x.dtype).max)
    if not prod(x.shape):
        one = xp.ones_like(xp.sum(xp.abs(x)))
        return one * unit, one
    limit = highest**0.25
    for_x = limit / xp.clip(largest(x), min=4 * limit / highest)
    for_x = xp.clip(for_x, max=unit) if isinstance(unit, float) else xp.minimum(unit, for_x)
    for_y = for_x / unit
    if y is None:
        return for_x, for_y
    other = limit / xp.clip(largest(y), min=limit)
    return xp.minimum(for_x, unit * other), xp.minimum(for_y, other)


def is_something(size: Array) -> Array:
    """Can a preconditioner learn from a tensor of this size? What is nearly subnormal would only make it grow."""
    return size > min(tiny(size), 2.0**-126) ** 0.75


def plus(y: Array, a: Number, x: Array, *, donate: bool = False) -> Array:
    """y + a x, in one pass over memory where the framework has one; `a`: a number, or an array to broadcast.

    donate: y is the caller's own and not needed any more, so that PyTorch may write over it.
    """
    xp = namespace(y)
    # Of half precisions the product is rounded too, everywhere: PyTorch would not, but in a stack.
    if not xp.__name__.endswith("torch") or dtype_name(y.dtype) in HALF:
        return y + a * x
    if isinstance(a, (int, float)):
        return (y.add_ if donate else y.add)(x, alpha=a)
    return y.addcmul(cast(a, y.dtype), x)  # torch.vmap has no rule for addcmul_


def times(x: Array, a: Number) -> Array:
    """a x, where x is the caller's own and not needed any more, so that PyTorch may write over it; `a` as in `plus`."""
    if not namespace(x).__name__.endswith("torch"):
        return x * a
    if isinstance(a, (int, float)):
        return x.mul_(a)
    return x * a if is_complex(a) and not is_complex(x) else x.mul_(cast(a, x.dtype))


def running_sums(x: Array) -> Array:
    """The sums over the first axis up to each entry."""
    xp = namespace(x)
    # torch.compile warns at array_api_compat's.
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
    return xp.real(x) - 1j * xp.imag(x)  # torch.vmap warns at `conj`


def adjoint(q: Array) -> Array:
    """q^H of a matrix; the conjugate of a diagonal."""
    return conj(q) if q.ndim < 2 else conj(q.mT)


def diagonal(a: Array) -> Array:
    """The real diagonal of a square matrix, as a strided slice: torch.compile warns at `diagonal` itself."""
    n = a.shape[-1]
    return real(namespace(a).reshape(a, (n * n,))[:: n + 1])


def cast(x: Array, dtype: Dtype) -> Array:
    """`x` in a dtype: itself where it has it."""
    return x if x.dtype == dtype else namespace(x).astype(x, dtype)


def number(value: Number, like: Array) -> Any:
    """A number of the plan beside an array: cast to the array's real dtype unless it is Python's own."""
    return value if isinstance(value, (int, float)) else cast(value, real_dtype(like))


def make(like: Array, function: str, *args: object, dtype: Dtype | None = None) -> Array:
    """`ones`, `zeros` or `arange` of the namespace of `like`, in its dtype unless told, on its device."""
    xp = namespace(like)
    place = {"device": like.device} if xp.__name__.endswith("torch") else {}
    return getattr(xp, function)(*args, dtype=like.dtype if dtype is None else dtype, **place)


def identity(like: Array, n: int) -> Array:
    """The (n, n) identity, by comparing counters: torch.compile warns at `eye`."""
    xp = namespace(like)
    i = make(like, "arange", n, dtype=xp.int32)
    return xp.astype(i[:, None] == i[None, :], like.dtype)


# ---- products ----------------------------------------------------------------------------
# The precision in force, for this thread alone; set by `products` and by nothing else.
_local = threading.local()


@contextmanager
def products(precision: str | None) -> Iterator[None]:
    """Matrix products of float32 arrays in a precision, while the context lasts, in this thread.

    None: as the framework does by default. "float32": nothing less. "tensorfloat32": float32, which tensor cores may
    round to 10 bits on the way in. "bfloat16": operands and result in bfloat16, summed in float32 by the hardware.
    """
    before = getattr(_local, "precision", None)
    _local.precision = precision
    try:
        yield
    finally:
        _local.precision = before


def matmul(a: Array, b: Array) -> Array:
    """a @ b in the precision in force; other dtypes than float32 are multiplied as they are."""
    precision = getattr(_local, "precision", None)
    if precision is None or dtype_name(a.dtype) != "float32" or dtype_name(b.dtype) != "float32":
        return a @ b
    xp = namespace(a)
    if precision == "bfloat16":
        low = dtype_of(xp, "bfloat16")
        return xp.astype(xp.astype(a, low) @ xp.astype(b, low), a.dtype)
    # JAX chooses for each product. PyTorch has one switch for the process, which is not ours to turn.
    return xp.matmul(a, b, precision=precision) if xp.__name__.startswith("jax") else a @ b


def solve(a: Array, b: Array) -> Array:
    """Solve a y = b for a small square `a` (r, r) and a vector `b` (r,), by LU; half precisions in float32."""
    xp, dtype = namespace(a), b.dtype
    a, b = cast(a, _solvable(a)), cast(b, _solvable(b))
    return cast(xp.reshape(xp.linalg.solve(a, b[:, None]), (-1,)), dtype)


def _solvable(x: Array) -> Any:
    return namespace(x).float32 if dtype_name(x.dtype) in HALF else x.dtype


def by_inverse(x: Array, q: Array) -> Array:
    """x q^-1: solve y q = x for an upper-triangular (n, n) `q` and a (k, n) `x`; half precisions in float32."""
    xp, dtype = namespace(q), x.dtype
    q, x = cast(q, _solvable(q)), cast(x, _solvable(x))
    library = xp.__name__
    if library.endswith("torch"):  # from this side LAPACK needs no copies in another layout, which take twice its time
        y = xp.linalg.solve_triangular(q, x, upper=True, left=False)
    elif library.startswith("jax"):
        y = importlib.import_module("jax.scipy.linalg").solve_triangular(q.mT, x.mT, lower=True).mT
    else:
        y = xp.linalg.solve(q.mT, x.mT).mT
    return cast(y, dtype)
