"""Algebra along one axis of a tensor: the verbs of every Kronecker-factored preconditioner.

A factor of axis i is a matrix (n_i, n_i), or the diagonal of one, (n_i,). A scalar has one 0-d factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from psgd._xp import adjoint, conj, matmul, namespace, real, solve_adjoint
from psgd.arrays import Factor, Tensor

Act = Callable[[Factor, Tensor, int], Tensor]


def along(q: Factor, x: Tensor, axis: int) -> Tensor:
    """q applied to axis `axis` of x: the mode product q x_i x."""
    xp, shape = namespace(q), tuple(x.shape)
    if q.ndim < 2:
        return xp.reshape(q, (1,) * axis + q.shape + (1,) * (x.ndim - axis - 1)) * x if x.ndim else q * x
    if axis == x.ndim - 1:
        return matmul(x, q.mT)
    before = shape[:axis]
    rows = (prod(before),) if prod(before) > 1 else ()
    return xp.reshape(matmul(q, xp.reshape(x, (*rows, shape[axis], -1))), shape)


def along_inverse_adjoint(q: Factor, x: Tensor, axis: int) -> Tensor:
    """q^-H applied to axis `axis` of x; a dense q is upper triangular."""
    if q.ndim < 2:
        return along(1 / conj(q), x, axis)
    xp = namespace(q)
    order = (axis, *(i for i in range(x.ndim) if i != axis))
    front = xp.permute_dims(x, order)
    solved = xp.reshape(solve_adjoint(q, xp.reshape(front, (q.shape[0], -1))), front.shape)
    return xp.permute_dims(solved, tuple(order.index(i) for i in range(x.ndim)))


def along_all(qs: Sequence[Factor], x: Tensor, act: Act = along) -> Tensor:
    """Every factor applied to its axis: the Kronecker product of the factors times vec(x)."""
    for axis, q in enumerate(qs):
        x = act(q, x, axis)
    return x


def gram(x: Tensor, axis: int, *, diagonal: bool) -> Factor:
    """x contracted with its conjugate over every axis but one: (n, n), or the diagonal of that, (n,) or 0-d."""
    xp = namespace(x)
    if diagonal:
        squares = real(x * conj(x))
        rest = tuple(i for i in range(x.ndim) if i != axis)
        return xp.sum(squares, axis=rest) if rest else squares
    if axis == x.ndim - 1:
        rows = xp.reshape(x, (-1, x.shape[axis]))
        return matmul(rows.mT, conj(rows))
    front = xp.permute_dims(x, (axis, *(i for i in range(x.ndim) if i != axis))) if axis else x
    rows = xp.reshape(front, (x.shape[axis], -1))
    return matmul(rows, adjoint(rows))


def outer(q: Factor) -> Factor:
    """q q^H."""
    return real(q * conj(q)) if q.ndim < 2 else matmul(q, adjoint(q))
