"""Arrays without elements: shape and dtype alone, in a namespace that counts arithmetic instead of doing it.

The core runs on them as on any other arrays. So the memory and the operations of a method come from the code itself,
for a model of any size and without allocating it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np

Shape = tuple[int, ...]

# Bytes of an element. The result of two dtypes is the later one in this order.
BYTES = MappingProxyType(
    dict(bool=1, int32=4, int64=8, bfloat16=2, float16=2, float32=4, float64=8, complex64=8, complex128=16)
)
REAL = MappingProxyType(dict(complex64="float32", complex128="float64"))
FINFO = MappingProxyType(dict(bfloat16=np.float32, float16=np.float16, float32=np.float32, float64=np.float64))
ELEMENTWISE = ("clip", "cumulative_sum", "exp", "log", "maximum", "minimum", "sqrt", "where")
REDUCTIONS = ("argmax", "max", "mean", "min", "sum")
OPERATORS = (
    "add",
    "sub",
    "mul",
    "truediv",
    "pow",
    "and",
    "or",
    "xor",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
    "rshift",
    "lshift",
)


def _broadcast(*shapes: Shape) -> Shape:
    """The broadcast shape, by NumPy's rules; NumPy's own function refuses shapes too large for an array."""
    ndim = max(map(len, shapes))
    columns = zip(*((1,) * (ndim - len(s)) + tuple(s) for s in shapes), strict=True)
    lengths = [set(column) - {1} or {1} for column in columns]
    if any(len(n) > 1 for n in lengths):
        raise ValueError(f"cannot broadcast arrays of shapes {', '.join(map(str, shapes))}")
    return tuple(n.pop() for n in lengths)


class ShapeTracer:
    """An array of a shape and a dtype, in a namespace that counts; see `ShapeNamespace`."""

    __array_priority__ = 1000
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, shape: Sequence[int], dtype: str, xp: ShapeNamespace) -> None:
        self.shape, self.dtype, self.xp = tuple(shape), dtype, xp

    def __array_namespace__(self, api_version: str | None = None) -> ShapeNamespace:
        return self.xp

    def __repr__(self) -> str:
        return f"ShapeTracer({self.shape}, {self.dtype})"

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * BYTES[self.dtype]

    @property
    def mT(self) -> ShapeTracer:
        return self.xp.permute_dims(self, (*range(self.ndim - 2), self.ndim - 1, self.ndim - 2))

    def __getitem__(self, index: Any) -> ShapeTracer:
        index = index if isinstance(index, tuple) else (index,)
        k = index.index(...) if ... in index else len(index)
        skipped = self.ndim - sum(x is not None and x is not ... for x in index)
        axes, shape = iter(self.shape), list[int]()
        for x in (*index[:k], *(slice(None),) * skipped, *index[k + 1 :]):
            n = 1 if x is None else next(axes)
            if isinstance(x, slice):
                shape.append(len(range(*x.indices(n))))
            elif x is None:
                shape.append(1)
            elif not -n <= x < n:
                raise IndexError(f"index {x} is out of bounds for an axis of {n}")
        return ShapeTracer(shape, self.dtype, self.xp)

    def __matmul__(self, other: ShapeTracer) -> ShapeTracer:
        return self.xp.matmul(self, other)

    def __neg__(self) -> ShapeTracer:
        return self.xp.elementwise(self)

    def __bool__(self) -> bool:
        raise TypeError("a step branches on the value of an array; only decisions of the plan may")


def _operator(a: ShapeTracer, b: object) -> ShapeTracer:
    return a.xp.elementwise(a, b)


for _name in OPERATORS:
    setattr(ShapeTracer, f"__{_name}__", _operator)
    setattr(ShapeTracer, f"__r{_name}__", _operator)


class ShapeNamespace:
    """The functions of an Array API namespace that the core uses, each of which counts its operations.

    `flops` is the number of real floating-point operations so far. The product of an (m, k) and a (k, n) matrix is
    2 m k n of them, a triangular solve m^2 n, any other function one for each element that it reads or makes; a complex
    operation counts as four, as its multiplication has four real ones.
    """

    __name__ = "psgd.cost"

    def __init__(self) -> None:
        self.flops = 0
        self.linalg = SimpleNamespace(vector_norm=self._reduce, solve=self._solve)

    def __getattr__(self, name: str) -> Any:
        if name in BYTES:
            return name
        if name in ("abs", "real", "imag"):
            return lambda x: self.astype(self.elementwise(x), REAL.get(x.dtype, x.dtype))
        if name in ELEMENTWISE:
            return self.elementwise
        if name in REDUCTIONS:
            return self._reduce
        if name.endswith("_like"):
            return lambda x: ShapeTracer(x.shape, x.dtype, self)
        raise AttributeError(f"a namespace of shapes has no {name!r}")

    # ---- what is counted -----------------------------------------------------------------
    def elementwise(self, *xs: object, **limits: object) -> ShapeTracer:
        """Any function of elements, broadcast."""
        arrays = [x for x in xs if isinstance(x, ShapeTracer)]
        shape = _broadcast(*(x.shape for x in arrays))
        dtype = self.result_type(*arrays)
        dtype = "complex64" if dtype == "float32" and any(isinstance(x, complex) for x in xs) else dtype
        self._count(dtype, prod(shape))
        return ShapeTracer(shape, dtype, self)

    def _reduce(self, x: ShapeTracer, /, *, axis: Any = None, keepdims: bool = False, **_: Any) -> ShapeTracer:
        axes = range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
        gone = {a % x.ndim for a in axes}
        shape = [1 if i in gone else n for i, n in enumerate(x.shape) if keepdims or i not in gone]
        self._count(x.dtype, prod(x.shape))
        return ShapeTracer(shape, x.dtype, self)

    def matmul(self, a: ShapeTracer, b: ShapeTracer) -> ShapeTracer:
        """Matrix product, broadcast over leading axes."""
        row, column = a.ndim == 1, b.ndim == 1
        (*_, m, k), (*_, inner, n) = (1, *a.shape) if row else a.shape, (*b.shape, 1) if column else b.shape
        if k != inner:
            raise ValueError(f"cannot multiply matrices of shapes {a.shape} and {b.shape}")
        batch = _broadcast(a.shape[:-2], b.shape[:-2])
        dtype = self.result_type(a, b)
        self._count(dtype, 2 * prod(batch) * m * k * n)
        return ShapeTracer((*batch, *(m,) * (not row), *(n,) * (not column)), dtype, self)

    def _solve(self, a: ShapeTracer, b: ShapeTracer) -> ShapeTracer:
        self._count(b.dtype, prod(a.shape) * b.shape[-1])  # as of a triangle; general ones are of a rank, and small
        return ShapeTracer(b.shape, b.dtype, self)

    def _count(self, dtype: str, n: int) -> None:
        weight = 0 if dtype in ("bool", "int32", "int64") else 4 if dtype in REAL else 1
        self.flops += weight * n

    # ---- what is not ---------------------------------------------------------------------
    def result_type(self, *xs: ShapeTracer | str) -> str:
        """The dtype in which arrays, or dtypes, meet."""
        names = [x.dtype if isinstance(x, ShapeTracer) else x for x in xs]
        return max(names, key=list(BYTES).index)

    def isdtype(self, dtype: str, kind: str) -> bool:
        return kind == "complex floating" and dtype in REAL

    def finfo(self, dtype: str) -> Any:
        return np.finfo(FINFO[REAL.get(dtype, dtype)])

    def astype(self, x: ShapeTracer, dtype: str) -> ShapeTracer:
        return ShapeTracer(x.shape, dtype, self)

    def reshape(self, x: ShapeTracer, shape: Shape) -> ShapeTracer:
        known = prod(n for n in shape if n != -1)
        shape = tuple(prod(x.shape) // max(known, 1) if n == -1 else n for n in shape)
        if prod(shape) != prod(x.shape):
            raise ValueError(f"cannot reshape {x.shape} to {shape}")
        return ShapeTracer(shape, x.dtype, self)

    def permute_dims(self, x: ShapeTracer, axes: Shape) -> ShapeTracer:
        return ShapeTracer([x.shape[i] for i in axes], x.dtype, self)

    def take(self, x: ShapeTracer, indices: ShapeTracer, *, axis: int) -> ShapeTracer:
        return ShapeTracer([prod(indices.shape) if i == axis else n for i, n in enumerate(x.shape)], x.dtype, self)

    def stack(self, xs: Sequence[ShapeTracer], *, axis: int = 0) -> ShapeTracer:
        shape = list(xs[0].shape)
        shape.insert(axis % (len(shape) + 1), len(xs))
        return ShapeTracer(shape, self.result_type(*xs), self)

    def concat(self, xs: Sequence[ShapeTracer], *, axis: int = 0) -> ShapeTracer:
        shape = list(xs[0].shape)
        shape[axis] = sum(x.shape[axis] for x in xs)
        return ShapeTracer(shape, self.result_type(*xs), self)

    def triu(self, x: ShapeTracer) -> ShapeTracer:
        return x

    def flip(self, x: ShapeTracer, *, axis: int) -> ShapeTracer:
        return x

    def asarray(self, x: object) -> ShapeTracer:
        return x if isinstance(x, ShapeTracer) else ShapeTracer((), "float32", self)

    def ones(self, shape: int | Shape, *, dtype: str) -> ShapeTracer:
        return ShapeTracer((shape,) if isinstance(shape, int) else shape, dtype, self)

    zeros = ones
    arange = ones


class NoDraws:
    """Draws without numbers, which count no operations."""

    def normal(self, role: str, shape: Sequence[int], like: ShapeTracer, skip: object = None) -> ShapeTracer:
        return ShapeTracer(shape, like.dtype, like.xp)

    signs = normal
