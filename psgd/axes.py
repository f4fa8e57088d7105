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

# Neighbouring dense axes whose lengths multiply to at most this are multiplied as one: one wider product takes less
# time than two narrow ones, and the Kronecker product of their factors, 64 x 64 at most, costs nothing beside it. The
# 3 x 3 and 7 x 7 kernels of convolutions are below it.
SHORT = 64
Act = Callable[..., Tensor]  # (factor, tensor, axis, donate=) -> tensor


def along(q: Factor, x: Tensor, axis: int, *, donate: bool = False) -> Tensor:
    """q applied to axis `axis` of x: the mode product q x_i x.

    Args:
        q: factor of the axis, (n, n) if dense, (n,) if diagonal, 0-d if x is.
        x: tensor whose axis `axis` has length n.
        axis: number of the axis, from 0.
        donate: x is not needed afterwards, so that PyTorch may write over it, as in `times`.

    Returns: a tensor of the shape of x.

    Source: arXiv 1512.04202 (Kronecker products as preconditioners).
    """
    return _along(q, x, axis, donate, matmul, lambda q, x: matmul(x, q.mT))


def along_upper(q: Factor, x: Tensor, axis: int, *, donate: bool = False) -> Tensor:
    """`along` where a dense q is upper triangular, with zeros below its diagonal.

    Args, Returns: as of `along`. The products leave out the zeros of q (`psgd.structured`).
    """
    return _along(q, x, axis, donate, upper_from_left, upper_from_right)


def along_adjoint_of_upper(q: Factor, x: Tensor, axis: int) -> Tensor:
    """q^H applied to axis `axis` of x, where a dense q is upper triangular.

    Args, Returns: as of `along`. The products leave out the zeros of q (`psgd.structured`).
    """
    return _along(conj(q) if q.ndim < 2 else q, x, axis, False, adjoint_from_left, adjoint_from_right)


def _along(
    q: Factor, x: Tensor, axis: int, donate: bool, from_left: Callable[..., Tensor], from_right: Callable[..., Tensor]
) -> Tensor:
    """q along an axis of x: elementwise if q is diagonal; a dense q by `from_left` of an x (..., n, k), or on the last
    axis by `from_right` of an x (..., n).
    """
    xp, shape = namespace(q), tuple(x.shape)
    if q.ndim < 2:
        q = xp.reshape(q, (1,) * axis + q.shape + (1,) * (x.ndim - axis - 1)) if x.ndim else q
        return times(x, q) if donate else q * x
    if axis == x.ndim - 1:
        return from_right(q, x)
    before, after = shape[:axis], shape[axis + 1 :]
    if before and prod(after) < shape[axis]:  # one product with many rows is faster than many products with few columns
        return _by_rows(partial(from_right, q), x, axis)
    rows = (prod(before),) if prod(before) > 1 else ()
    return xp.reshape(from_left(q, xp.reshape(x, (*rows, shape[axis], -1))), shape)


def along_inverse_adjoint(q: Factor, x: Tensor, axis: int, *, donate: bool = False) -> Tensor:
    """q^-H applied to axis `axis` of x, where a dense q is upper triangular and has no zero on its diagonal.

    Args, Returns: as of `along`. A dense q costs a triangular solve, n^2 operations for each row of x; a diagonal one
    a quotient.

    Source: psgd_torch `update_precond_kron_whiten_eq`, psgd_jax `_conjB`.
    """
    if q.ndim < 2:
        return along(1 / conj(q), x, axis, donate=donate)
    return _by_rows(lambda rows: by_inverse(rows, conj(q)), x, axis)


def _by_rows(work: Callable[[Rows], Rows], x: Tensor, axis: int) -> Tensor:
    """Apply `work`, which maps the rows of a matrix (k, n), to x with its axis of length n moved last and back."""
    xp, order = namespace(x), (*(i for i in range(x.ndim) if i != axis), axis)
    last = xp.permute_dims(x, order)
    done = xp.reshape(work(xp.reshape(last, (-1, x.shape[axis]))), last.shape)
    return xp.permute_dims(done, tuple(order.index(i) for i in range(x.ndim)))


def along_all(qs: Sequence[AxisFactor | None], x: Tensor, act: Act = along, *, donate: bool = False) -> Tensor:
    """Every factor applied to its axis: the Kronecker product of the factors times vec(x), q_1 x_1 (q_2 x_2 (... x)).

    Args:
        qs: one factor an axis, as in `along`; None leaves an axis as it is.
        x: tensor, as many axes as factors, or 0-d with one factor.
        act: how a factor acts on its axis: `along` or one of its variants.
        donate: x is not needed afterwards, as in `along`.

    Returns: a tensor of the shape of x.
    """
    xp, shape = namespace(x), tuple(x.shape)
    if x.ndim > 2:
        qs, lengths = _joined(qs, shape)
        x = xp.reshape(x, lengths)
    # Diagonal factors come last, so that they can write over the product of a dense one instead of taking memory.
    for axis, q in sorted(((i, q) for i, q in enumerate(qs) if q is not None), key=lambda pair: -pair[1].ndim):
        x, donate = act(q, x, axis, donate=donate), True
    return xp.reshape(x, shape)


def _joined(qs: Sequence[AxisFactor | None], shape: tuple[int, ...]) -> tuple[list[AxisFactor | None], tuple[int, ...]]:
    """The factors, with dense ones of short neighbouring axes replaced by their Kronecker product (see `SHORT`), and
    the lengths of the axes that result.
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
    """The Kronecker product of two square matrices, of lengths n and m: (n m, n m)."""
    n = a.shape[0] * b.shape[0]
    return namespace(a).reshape(a[:, None, :, None] * b[None, :, None, :], (n, n))


def gram(x: Tensor, axis: int, *, diagonal: bool) -> Factor:
    """x contracted with its conjugate over every axis but one: X X^H of the unfolding X of x along that axis.

    Args:
        x: tensor whose axis `axis` has length n.
        axis: the axis that is kept.
        diagonal: compute the diagonal of X X^H alone.

    Returns: (n, n) Hermitian; (n,), real, if `diagonal`; |x|^2, 0-d, of a 0-d x.
    """
    xp = namespace(x)
    if diagonal:
        other_axes = tuple(i for i in range(x.ndim) if i != axis)
        # Over the last axes alone: over others PyTorch's vector_norm takes 14 times as long (docs/performance.md).
        if other_axes and not axis:
            return xp.linalg.vector_norm(x, axis=other_axes) ** 2
        squares = real(x * conj(x))
        return xp.sum(squares, axis=other_axes) if other_axes else squares
    if axis == x.ndim - 1:
        return gram_of_columns(xp.reshape(x, (-1, x.shape[axis])))
    return gram_of_rows(unfolded(x, axis))


def outer(q: Factor) -> Factor:
    """q q^H: (n, n) of a dense q, (n,) and real of a diagonal one."""
    return real(q * conj(q)) if q.ndim < 2 else gram_of_rows(q)
