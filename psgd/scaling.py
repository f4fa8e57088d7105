"""What keeps numbers in range: the power mean, bounds on a direction and on a whole step, the first scale of Q."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod, sqrt
from typing import Any

from psgd._xp import accumulation_dtype, cast, is_complex, is_something, largest, make, namespace, number, times, tiny
from psgd.arrays import Array, Number


def power_mean(x: Array, power: int) -> Array:
    """(mean|x|^p)^(1/p), 0-d, at least float32; no power of a finite x overflows."""
    unit = _unit(x)
    if power == 2 and not is_complex(x):
        return unit * _rms(cast(x, unit.dtype) / unit)
    return unit * namespace(x).mean((cast(namespace(x).abs(x), unit.dtype) / unit) ** power) ** (1 / power)


def _unit(x: Array) -> Array:
    """max|x|, 0-d, at least float32; 1 where that is 0."""
    top = cast(largest(x), accumulation_dtype(x))
    return namespace(x).where(top > 0, top, namespace(x).ones_like(top))


def _rms(part: Array) -> Array:
    """The RMS of a real array without entries above 1."""
    return namespace(part).linalg.vector_norm(part) / sqrt(prod(part.shape))


def max_norm_factor(limit: Number, us: Sequence[Array]) -> Array:
    """min(1, limit / r), 0-d, r = ||us|| over all entries of all tensors: what keeps a whole step within `limit`."""
    sizes = [power_mean(u, 2) * sqrt(prod(u.shape)) for u in us]
    xp = namespace(sizes[0])
    wide = max((s.dtype for s in sizes), key=lambda d: xp.finfo(d).bits)
    r = power_mean(xp.stack([cast(s, wide) for s in sizes]), 2) * sqrt(len(sizes))
    limit = number(limit, r)
    long, one = r > limit, xp.ones_like(r)  # the limit may be an array that is infinite
    return xp.where(long, limit / xp.where(long, r, one), one)


@dataclass(frozen=True)
class Clip:
    """Bounds on the direction u of a tensor: its RMS, by scaling, then each entry's modulus. After that, a gain.

    u is the caller's own, as in `times`, and comes in units of a 0-d array, at least 1, or as it is. Without a bound an
    entry in units is left out where a million of its kind would pass the floats.
    """

    rms: float = inf
    entry: float = inf

    def __call__(self, u: Array, gain: float = 1.0, unit: Any = None) -> Array:
        xp = namespace(u)
        if unit is not None:
            unit = cast(unit, accumulation_dtype(u))
        elif self.rms < inf:
            unit = make(u, "ones", (), dtype=accumulation_dtype(u))
        if self.rms < inf and is_complex(u):
            u = u * number(xp.minimum(unit, self.rms / xp.clip(power_mean(u, 2), min=tiny(unit))), u)
        elif self.rms < inf:
            own = xp.maximum(cast(largest(u), unit.dtype), 1 / unit)
            part = times(cast(u, own.dtype), 1 / own)
            factor = xp.minimum(own * unit, self.rms / xp.clip(_rms(part), min=tiny(unit)))
            gain, last = (1.0, gain) if self.entry == inf else (gain, 1.0)
            u = cast(times(part, last * factor), u.dtype)
        elif unit is not None:
            u = times(u, number(unit, u))
            u = xp.where(xp.abs(u) >= float(xp.finfo(u.dtype).max) * 2.0**-20, xp.zeros_like(u), u)
        if self.entry < inf:
            bounded = not is_complex(u)
            u = xp.clip(u, -self.entry, self.entry) if bounded else u / xp.clip(xp.abs(u) / self.entry, min=1.0)
        return u if gain == 1 else u * gain


@dataclass(frozen=True)
class InitialScale:
    """The first scale of Q, from the first gradients: s = (max_k mean|g_k|^p + damping^p)^(-1/(2p)) over tensors k.

    With it P starts near 1/rms(g). `shared`: one scale for all tensors that start together, or one for each that says
    something, and the smallest of these for the others.
    """

    power: int = 4
    shared: bool = True

    def size(self, g: Array) -> Array:
        """(mean|g|^p)^(1/p), 0-d."""
        return power_mean(g, self.power)

    def __call__(
        self, sizes: Sequence[Array], damping: Number, vs: Sequence[Array] | None = None
    ) -> tuple[list[Array], Array]:
        """s for each of the tensors that start together, and whether any of them says something, 0-d.

        Where none does, s is 1: what teaches nothing decides nothing, and the scale waits.

        sizes: at least one; of any shape where several tensors are in one. vs: the probes, of Newton pairs.
        """
        xp = namespace(sizes[0])
        wide = max((s.dtype for s in sizes), key=lambda d: xp.finfo(d).bits)
        most = xp.max(xp.stack([cast(xp.max(s), wide) for s in sizes]))
        seen = is_something(most) | xp.isnan(most)  # which nobody should overlook
        boosts: Sequence[Any] = [1.0] * len(sizes) if vs is None else self._probed(vs)
        if self.shared:
            scale = self.scale(most, damping) * boosts[0]
            return [xp.where(seen, scale, xp.ones_like(scale))] * len(sizes), seen
        each = [xp.where(is_something(s), s, cast(most, s.dtype)) for s in sizes]
        scales = [self.scale(s, damping) * boost for s, boost in zip(each, boosts, strict=True)]
        return [xp.where(seen, s, xp.ones_like(s)) for s in scales], seen

    def _probed(self, vs: Sequence[Array]) -> list[Array]:
        """What the probes v of a Newton pair add to s, as a factor: (mean|v|^2)^(1/4), of all tensors or of each."""
        if not self.shared or not vs:
            return [self._boost(power_mean(v, 2)) for v in vs]
        xp, total = namespace(vs[0]), sum(prod(v.shape) for v in vs)
        squares = [power_mean(v, 2) ** 2 * (prod(v.shape) / total) for v in vs]
        wide = max((s.dtype for s in squares), key=lambda d: xp.finfo(d).bits)
        return [self._boost(sum(cast(s, wide) for s in squares) ** 0.5)] * len(vs)

    @staticmethod
    def _boost(rms: Array) -> Array:
        """The square root of the RMS of v; 1 for a v of zero, which says nothing."""
        xp = namespace(rms)
        return xp.where(rms > 0, rms, xp.ones_like(rms)) ** 0.5

    def scale(self, size: Array, damping: Number) -> Array:
        """s of a size; 1 where it and the damping are zero."""
        xp, damping = namespace(size), number(damping, size)
        top = xp.maximum(size, xp.zeros_like(size) + damping)
        unit = xp.where(top > 0, top, xp.ones_like(top))
        total = (size / unit) ** self.power + (damping / unit) ** self.power
        safe = xp.where(total > 0, total, xp.ones_like(total))
        return unit**-0.5 * safe ** (-0.5 / self.power)
