"""What keeps numbers in range: the power mean, bounds on a direction and on a whole step, the first scale of Q."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod, sqrt
from typing import Any

from psgd._xp import accumulation_dtype, cast, is_complex, is_something, largest, make, namespace, number, times, tiny
from psgd.arrays import Array, Number


def power_mean(x: Array, power: int) -> Array:
    """(mean|x|^p)^(1/p) of at least one entry, 0-d, at least float32. Powers are of x / max|x| and do not overflow."""
    unit = _unit(x)
    if power == 2 and not is_complex(x):
        return unit * _rms(cast(x, unit.dtype) / unit)
    return unit * namespace(x).mean((cast(namespace(x).abs(x), unit.dtype) / unit) ** power) ** (1 / power)


def _unit(x: Array) -> Array:
    """max|x|, 0-d, at least float32; 1 where that is 0."""
    top = cast(largest(x), accumulation_dtype(x))
    return namespace(x).where(top > 0, top, namespace(x).ones_like(top))


def _rms(part: Array) -> Array:
    """The RMS, 0-d, of a real array without entries above 1, whose squares need no unit."""
    return namespace(part).linalg.vector_norm(part) / sqrt(prod(part.shape))


def max_norm_factor(limit: Number, us: Sequence[Array]) -> Array:
    """min(1, limit / r) with r the 2-norm of all entries of all tensors: what bounds the length of a whole step.

    Args:
        limit: largest length, a number or a 0-d array; it may be infinite.
        us: the directions of all tensors, at least one, each with entries.

    Returns: 0-d, in the widest dtype of the sizes, at least float32.

    Source: psgd_torch `grad_clip_max_norm`, psgd_jax `update_global_norm_clip`.
    """
    sizes = [power_mean(u, 2) * sqrt(prod(u.shape)) for u in us]
    xp = namespace(sizes[0])
    wide = max((s.dtype for s in sizes), key=lambda d: xp.finfo(d).bits)
    r = power_mean(xp.stack([cast(s, wide) for s in sizes]), 2) * sqrt(len(sizes))
    limit = number(limit, r)
    long, one = r > limit, xp.ones_like(r)  # the limit may be an array that is infinite
    return xp.where(long, limit / xp.where(long, r, one), one)


@dataclass(frozen=True)
class Clip:
    """Bounds on the direction u of a tensor: its RMS, by scaling, then the modulus of each entry; then a gain.

        u <- u min(1, rms / RMS(u)),   then each entry is cut to `entry`,   then u <- gain u

    in the order of psgd_torch's `grad_clip_max_amps`.

    Args:
        rms: largest RMS [psgd_torch (2, 10), quad_torch and psgd_jax `kron` 1.1].
        entry: largest modulus of an entry.

    Source: psgd_torch `KronWhiten`.
    """

    rms: float = inf
    entry: float = inf

    def __call__(self, u: Array, gain: float = 1.0, unit: Any = None) -> Array:
        """The bounded direction, in the shape and dtype of u.

        u: made by the caller, who does not need it afterwards, and divided by `unit`: 0-d, at least 1, or None for 1.
        """
        xp = namespace(u)
        if unit is not None:
            unit = cast(unit, accumulation_dtype(u))
        elif self.rms < inf:
            unit = make(u, "ones", (), dtype=accumulation_dtype(u))
        if self.rms < inf and is_complex(u):
            u = u * number(xp.minimum(unit, self.rms / xp.clip(power_mean(u, 2), min=tiny(unit))), u)
        elif self.rms < inf:
            # First divided by max|u|, whose squares may overflow; then one factor for the RMS and all units. max|u| is
            # taken as 1 at least, unit included: small entries need no unit, and 0 / 0 would be NaN.
            size = xp.maximum(cast(largest(u), unit.dtype), 1 / unit)
            part = times(cast(u, size.dtype), 1 / size)
            factor = xp.minimum(size * unit, self.rms / xp.clip(_rms(part), min=tiny(unit)))
            gain, gain_now = (1.0, gain) if self.entry == inf else (gain, 1.0)  # in the same pass, if nothing follows
            u = cast(times(part, gain_now * factor), u.dtype)
        elif unit is not None:
            u = times(u, number(unit, u))
            # Without a bound an entry stays as it is, unless it is so large that a million (2^20) of its size, added up
            # in a parameter, would overflow: 3e32 in float32. A NaN is not above it and stays.
            u = xp.where(xp.abs(u) >= float(xp.finfo(u.dtype).max) * 2.0**-20, xp.zeros_like(u), u)
        if self.entry < inf:
            bounded = not is_complex(u)
            u = xp.clip(u, -self.entry, self.entry) if bounded else u / xp.clip(xp.abs(u) / self.entry, min=1.0)
        return u if gain == 1 else u * gain


@dataclass(frozen=True)
class InitialScale:
    """The first scale s of Q, from the first gradients g_k of the tensors k that start together.

        s = (max_k mean|g_k|^p + damping^p)^(-1/(2p)),   for Newton pairs times (mean|v|^2)^(1/4)

    With it P = s^2 I starts near 1/rms(g).

    Args:
        power: p; 4 [psgd_torch], 2 [quad_torch, psgd_jax].
        shared: one scale for all tensors; false: one for each [psgd_jax `affine`], and for a tensor without a signal
            that of the largest one.

    Source: psgd_torch `KronWhiten`, `KronNewton`; quad_torch; psgd_jax `affine`.
    """

    power: int = 4
    shared: bool = True

    def size(self, g: Array) -> Array:
        """(mean|g|^p)^(1/p), 0-d, at least float32."""
        return power_mean(g, self.power)

    def __call__(
        self, sizes: Sequence[Array], damping: Number, vs: Sequence[Array] | None = None
    ) -> tuple[list[Array], Array]:
        """The scale of each tensor, and whether any of them is a signal to learn from.

        Args:
            sizes: at least one, as `size` gives them; not 0-d where several tensors are in one stack.
            damping: a number of the same unit as the gradients.
            vs: the probes v of Newton pairs, one a tensor.

        Returns: s of each, in the shape of its size, 1 where no tensor is a signal; a 0-d boolean, true if one is.
        """
        xp = namespace(sizes[0])
        wide = max((s.dtype for s in sizes), key=lambda d: xp.finfo(d).bits)
        most = xp.max(xp.stack([cast(xp.max(s), wide) for s in sizes]))
        signal = is_something(most) | xp.isnan(most)  # a NaN is shown in the scale, not hidden by waiting
        boosts: Sequence[Any] = [1.0] * len(sizes) if vs is None else self._probed(vs)
        if self.shared:
            scale = self.scale(most, damping) * boosts[0]
            return [xp.where(signal, scale, xp.ones_like(scale))] * len(sizes), signal
        each = [xp.where(is_something(s), s, cast(most, s.dtype)) for s in sizes]
        scales = [self.scale(s, damping) * boost for s, boost in zip(each, boosts, strict=True)]
        return [xp.where(signal, s, xp.ones_like(s)) for s in scales], signal

    def _probed(self, vs: Sequence[Array]) -> list[Array]:
        """The factor of s that comes from the probes of Newton pairs, (mean|v|^2)^(1/4), of all tensors or of each."""
        if not self.shared or not vs:
            return [self._boost(power_mean(v, 2)) for v in vs]
        xp, total = namespace(vs[0]), sum(prod(v.shape) for v in vs)
        squares = [power_mean(v, 2) ** 2 * (prod(v.shape) / total) for v in vs]
        wide = max((s.dtype for s in squares), key=lambda d: xp.finfo(d).bits)
        return [self._boost(sum(cast(s, wide) for s in squares) ** 0.5)] * len(vs)

    @staticmethod
    def _boost(rms: Array) -> Array:
        """The square root of the RMS of v, 0-d; 1 where v is zero."""
        xp = namespace(rms)
        return xp.where(rms > 0, rms, xp.ones_like(rms)) ** 0.5

    def scale(self, size: Array, damping: Number) -> Array:
        """(size^p + damping^p)^(-1/(2p)) in the shape of `size`; 1 where both are zero. No power overflows."""
        xp, damping = namespace(size), number(damping, size)
        top = xp.maximum(size, xp.zeros_like(size) + damping)
        unit = xp.where(top > 0, top, xp.ones_like(top))
        total = (size / unit) ** self.power + (damping / unit) ** self.power
        safe = xp.where(total > 0, total, xp.ones_like(total))
        return unit**-0.5 * safe ** (-0.5 / self.power)
