"""Counter-based noise: the same bits in NumPy, PyTorch and JAX, eager or compiled.

Every draw is a pure function of (seed, step, role, element index); there is no generator and no state. So a draw
depends neither on the order of parameters nor on sharding or rank, and a resumed run continues exactly.

Word i of a draw is `mix(mix(i * GOLDEN + key))` in wrapping int32 arithmetic. The sum of its four bytes, an exact
integer, is nearly normal, with kurtosis 2.7; a subtraction and one multiplication give it mean 0 and variance 1, and
round alike everywhere. Where nothing but mean and covariance matter, each of the 32 bits of a word is a random sign.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod, sqrt
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from psgd._xp import is_complex, make, namespace, real_dtype
from psgd.arrays import Array, Dtype, Number

GOLDEN = 0x9E3779B9 - (1 << 32)  # 2^32 / golden ratio: consecutive counters land far apart
M1, M2 = 0x7FEB352D, 0x846CA68B - (1 << 32)  # the "lowbias32" multipliers of C. Wellons' hash prospector
# Of four uniform bytes: mean 4 * 255 / 2, variance 4 * (256^2 - 1) / 12.
BYTE_SUM_MEAN, BYTE_SUM_DEVIATION = 510.0, sqrt(4 * (256**2 - 1) / 12)


Numbers = Callable[..., Array]  # (step_key, role, n, dtype, first) -> (n,)


@runtime_checkable
class Draws(Protocol):
    """Where a step takes its random numbers from: a counter, or a recording."""

    def normal(self, role: str, shape: Sequence[int], like: Array, skip: Array | None = None) -> Array:
        """Standard normal numbers of a shape, in the dtype of `like`; complex ones have E|z|^2 = 1.

        Where the 0-d boolean `skip` is true the numbers are not used; a recording has none for that case.
        """
        ...

    def signs(self, role: str, shape: Sequence[int], like: Array) -> Array:
        """1 or -1, as likely, of a shape, in the dtype of `like`; complex ones are (+-1 +- i) / sqrt(2)."""
        ...


def shifted(x: Array, k: int) -> Array:
    """Logical right shift of int32 by k bits: zeros come in from the left. A Python integer or an array."""
    return (x >> k) & ((1 << (32 - k)) - 1)


def mix(x: Array) -> Array:
    """The bijection "lowbias32" of int32: every bit of the result depends on every bit of x, an array or an integer.

    The shifts 16, 15, 16 belong to its multipliers. Source: C. Wellons, hash prospector.
    """
    x = wrapped((x ^ shifted(x, 16)) * M1)
    x = wrapped((x ^ shifted(x, 15)) * M2)
    return x ^ shifted(x, 16)


def signed(word: int) -> int:
    """The low 32 bits of a Python integer, read as int32."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def wrapped(x: Array) -> Array:
    """A product modulo 2^32 as int32: a Python integer is reduced; an int32 array has wrapped around already."""
    return signed(x) if isinstance(x, int) else x


def key(xp: ModuleType, seed: Number, step: Number) -> Array:
    """The int32 key of one step, (1,), on which all its draws depend: mix(mix(seed + GOLDEN) + step * GOLDEN).

    seed, step: Python integers or 0-d integer arrays, modulo 2^32.
    """
    # Shape (1,) and not (): NumPy warns when a scalar wraps and is silent when an array does.
    t = xp.reshape(xp.astype(xp.asarray(step), xp.int32), (1,))
    if isinstance(seed, int):
        s = xp.full((1,), signed(seed), dtype=xp.int32)
    else:
        s = xp.reshape(xp.astype(seed, xp.int32), (1,))
    return mix(mix(s + GOLDEN) + t * GOLDEN)


def host_key(seed: int, step: int) -> int:
    """The number in `key`, by Python's integers, which take a fraction of the time of arrays."""
    return mix(signed(mix(signed(seed + GOLDEN)) + step * GOLDEN))


def role_number(role: str) -> int:
    """A role as an int32: the 32-bit FNV-1a hash of its characters, with its published offset and prime.

    A loop in Python, which torch.compile can trace, as it cannot a function of C such as `zlib.crc32`.
    """
    number = 0x811C9DC5
    for character in role:
        number = ((number ^ ord(character)) * 0x01000193) & 0xFFFFFFFF
    return signed(number)


def words(step_key: Array, role: int, n: int, first: int = 0) -> Array:
    """The n int32 words of a role from index `first` on, (n,): mix(mix(i GOLDEN + (step_key xor role))).

    step_key: (1,), see `key`. role: its number, see `role_number`.
    """
    return mix(mix(make(step_key, "arange", first, first + n) * GOLDEN + (step_key ^ role)))


def normal(step_key: Array, role: int, n: int, dtype: Dtype, first: int = 0) -> Array:
    """The n nearly normal numbers of a role, (n,), in a real dtype, from index `first` on: mean 0, variance 1.

    step_key, role: as of `words`.
    """
    xp = namespace(step_key)
    w = words(step_key, role, n, first)
    pairs = (w & 0x00FF00FF) + ((w >> 8) & 0x00FF00FF)  # bytes 0 and 1, bytes 2 and 3, each sum in 16 bits
    total = (pairs & 0xFFFF) + (pairs >> 16)
    wide = xp.float64 if dtype == xp.float64 else xp.float32  # half precisions cannot hold the sum
    return xp.astype((xp.astype(total, wide) - BYTE_SUM_MEAN) * (1 / BYTE_SUM_DEVIATION), dtype)


def signs(step_key: Array, role: int, n: int, dtype: Dtype, first: int = 0) -> Array:
    """The n signs of a role, 1 or -1, (n,), in a real dtype, from index `first` on, a multiple of 32.

    step_key, role: as of `words`, of which each gives 32 signs.
    """
    xp, start = namespace(step_key), first // 32
    w = words(step_key, role, -(-n // 32), start)
    bits = (w[:, None] << make(step_key, "arange", 32)[None, :]) >> 31  # bit 31 - k of a word, as 0 or -1
    return xp.astype(xp.reshape(bits | 1, (-1,))[:n], dtype)


def uniform(step_key: Array | int, role: str) -> Any:
    """One uniform number in [0, 1): a 0-d float32 array, or a Python number if the key is one.

    It has 24 bits, as many as float32 holds exactly, so that both are equal.
    """
    if isinstance(step_key, int):
        return shifted(mix(mix(step_key ^ role_number(role))), 8) * 2.0**-24
    xp = namespace(step_key)
    top = shifted(words(step_key, role_number(role), 1), 8)
    return xp.reshape(xp.astype(top, xp.float32) * 2.0**-24, ())


class Counter:
    """The draws of one step, from its key, (1,); see `key`."""

    def __init__(self, step_key: Array) -> None:
        self.step_key = step_key

    def numbers(self, draw: Numbers, role: str, n: int, dtype: Dtype) -> Array:
        """The n real numbers of a role, (n,), by `normal` or `signs`."""
        return draw(self.step_key, role_number(role), n, dtype)

    def normal(self, role: str, shape: Sequence[int], like: Array, skip: Array | None = None) -> Array:
        """See `Draws.normal`. Element i of the draw is element i of the array in row-major order."""
        return self._drawn(normal, role, shape, like)

    def signs(self, role: str, shape: Sequence[int], like: Array) -> Array:
        """See `Draws.signs`."""
        return self._drawn(signs, role, shape, like)

    def _drawn(self, draw: Numbers, role: str, shape: Sequence[int], like: Array) -> Array:
        xp, dtype, n = namespace(like), real_dtype(like), prod(shape)
        z = self.numbers(draw, role, n, dtype)
        if is_complex(like):
            z = (z + 1j * self.numbers(draw, role + "/imaginary", n, dtype)) * sqrt(0.5)
        return xp.reshape(z, tuple(shape))
