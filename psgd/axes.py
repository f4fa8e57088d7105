"""Algebra along one axis of a tensor: the verbs of every Kronecker-factored preconditioner.

A factor of axis i is a matrix (n_i, n_i), or the diagonal of one, (n_i,). A scalar has one 0-d factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

from psgd._xp import by_inverse, conj, matmul, namespace, real, times
from psgd.arrays import AxisFactor, Factor, Rows, Tensor
from psgd.structured import (
    adjoint_from_left,
    adjoint_from_right,
    gram_of_columns,
    gram_of_rows,
    upper_from_left,
    upper_from_right,
)
from psgd.thin import unfolded

SHORT = 64  # axes that together are no longer than this are multiplied as one
Act = Callable[..., Tensor]  # (factor, tensor, axis, donate=) -> tensor


def along(q: Factor, x: Tensor, axis: int, *, donate: bool = False) -> Tensor:
    """q applied to axis `axis` of x: the mode product q x_i x. donate: x is not needed any more, as in `times`."""
    return _along(q, x, axis, donate, matmul, lambda q, x: matmul(x, q.mT))


def along_upper(q: Factor, x: Tensor, axis: int, *, donate: bool = False) -> Tensor:
    """`along`, where a dense q is upper triangular."""
    return _along(q, x, axis, donate, upper_from_left, upper_from_right)


def along_adjoint_of_upper(q: Factor, x: Tensor, axis: int) -> Tensor:
    """q^H applied to axis `axis` of x; a dense q is upper triangular."""
    return _along(conj(q) if q.ndim < 2 else q, x, axis, False, adjoint_from_left, adjoint_from_right)


def _along(
    q: Factor, x: Tensor, axis: int, donate: bool, from_left: Callable[..., Tensor], from_right: Callable[..., Tensor]
) -> Tensor:
    """A diagonal q, or a product of a matrix q from the left, x being (..., n, k), or from the right, x (..., n)."""
    xp, shape = namespace(q), tuple(x.shape)
    if q.ndim < 2:
        q = xp.reshape(q, (1,) * axis + q.shape + (1,) * (x.ndim - axis - 1)) if x.ndim else q
        return times(x, q) if donate else q * x
    if axis == x.ndim - 1:
        return from_right(q, x)
    before, after = shape[:axis], shape[axis + 1 :]
    if before and prod(after) < shape[axis]:  # one product of many rows, and not many of few columns
        return _by_rows(partial(from_right, q), x, axis)
    rows = (prod(before),) if prod(before) > 1 else ()
    return xp.reshape(from_left(q, xp.reshape(x, (*rows, shape[axis], -1))), shape)


def along_inverse_adjoint(q: Factor, x: Tensor, axis: int, *, donate: bool = False) -> Tensor:
    """q^-H applied to axis `axis` of x; a dense q is upper triangular."""
    if q.ndim < 2:
        return along(1 / conj(q), x, axis, donate=donate)
    return _by_rows(lambda rows: by_inverse(rows, conj(q)), x, axis)


def _by_rows(work: Callable[[Rows], Rows], x: Tensor, axis: int) -> Tensor:
    """What works on the rows of a matrix, with an axis of x along them."""
    xp, order = namespace(x), (*(i for i in range(x.ndim) if i != axis), axis)
    last = xp.permute_dims(x, order)
    done = xp.reshape(work(xp.reshape(last, (-1, x.shape[axis]))), last.shape)
    return xp.permute_dims(done, tuple(order.index(i) for i in range(x.ndim)))


def along_all(qs: Sequence[AxisFactor | None], x: Tensor, act: Act = along, *, donate: bool = False) -> Tensor:
    """Every factor applied to its axis: the Kronecker product of the factors times vec(x). None leaves an axis alone.

    donate: as in `along`.
    """
    xp, shape = namespace(x), tuple(x.shape)
    if x.ndim > 2:
        qs, lengths = _joined(qs, shape)
        x = xp.reshape(x, lengths)
    # Diagonal factors come last: what they act on was made by those before, and they take no memory.
    for axis, q in sorted(((i, q) for i, q in enumerate(qs) if q is not None), key=lambda pair: -pair[1].ndim):
        x, donate = act(q, x, axis, donate=donate), True
    return xp.reshape(x, shape)


def _joined(qs: Sequence[AxisFactor | None], shape: tuple[int, ...]) -> tuple[list[AxisFactor | None], tuple[int, ...]]:
    """Dense factors of neighbouring short axes, as those of a convolution's kernel, as one: a single product of some
    width takes less time than two that are narrow. Also the lengths of the axes that are left.
    """
    joined: list[AxisFactor | None] = []
    lengths: list[int] = []

    def dense(q: AxisFactor | None) -> bool:
        return q is not None and q.ndim == 2

    for q, n in zip(qs, shape, strict=True):
        if len(joined) > 1 and dense(joined[-1]) and dense(q) and lengths[-1] * n <= SHORT:
            joined[-1], lengths[-1] = _kronecker(joined[-1], q), lengths[-1] * n
        else:
            joined.append(q)
            lengths.append(n)
    return joined, tuple(lengths)


def _kronecker(a: AxisFactor, b: AxisFactor) -> AxisFactor:
    """The Kronecker product of two matrices."""
    n = a.shape[0] * b.shape[0]
    return namespace(a).reshape(a[:, None, :, None] * b[None, :, None, :], (n, n))


def gram(x: Tensor, axis: int, *, diagonal: bool) -> Factor:
    """x contracted with its conjugate over every axis but one: (n, n), or the diagonal of that, (n,) or 0-d."""
    xp = namespace(x)
    if diagonal:
        rest = tuple(i for i in range(x.ndim) if i != axis)
        # PyTorch is slow to take norms over any but the last axes.
        if rest and not axis:
            return xp.linalg.vector_norm(x, axis=rest) ** 2
        squares = real(x * conj(x))
        return xp.sum(squares, axis=rest) if rest else squares
    if axis == x.ndim - 1:
        return gram_of_columns(xp.reshape(x, (-1, x.shape[axis])))
    return gram_of_rows(unfolded(x, axis))


def outer(q: Factor) -> Factor:
    """q q^H."""
    return real(q * conj(q)) if q.ndim < 2 else gram_of_rows(q)
