"""The draws of a step in PyTorch: on a CPU by NumPy, to the compiler one opaque operation; the bits are the core's."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from psgd import noise

# Thirty passes over so many numbers stay in a core's cache.
BLOCK = 1 << 17


def _in_blocks(draw: noise.Numbers, step_key: Tensor, role: int, n: int, dtype: torch.dtype) -> Tensor:
    """`noise.normal` or `noise.signs`; on a CPU block by block and by NumPy, which takes a quarter of the time."""
    if step_key.device.type != "cpu":
        return draw(step_key, role, n, dtype)
    numbers = torch.empty(n, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device="cpu")
    key, blocks = step_key.numpy(), numbers.numpy()
    for i in range(0, n, BLOCK):
        blocks[i : i + BLOCK] = draw(key, role, min(BLOCK, n - i), blocks.dtype, i)
    return numbers.to(dtype)


@torch.library.custom_op("psgd::noise", mutates_args=())
def _noise(signs: bool, step_key: Tensor, role: int, n: int, dtype: torch.dtype) -> Tensor:
    """The same, opaque to the compiler: tracing its integer arithmetic would double the time to compile."""
    return _in_blocks(noise.signs if signs else noise.normal, step_key, role, n, dtype)


@_noise.register_fake
def _(signs: bool, step_key: Tensor, role: int, n: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((n,), dtype=dtype, device=step_key.device)


role_number = cache(noise.role_number)


class CachedDraws(noise.Counter):
    """The draws of a step, each role once: a shorter draw is the beginning of a longer one."""

    def __init__(self, step_key: Tensor) -> None:
        super().__init__(step_key)
        self._longest: dict[Any, Tensor] = {}

    def numbers(self, draw: noise.Numbers, role: str, n: int, dtype: torch.dtype) -> Tensor:
        drawn = self._longest.get((draw, role, dtype))
        if drawn is None or len(drawn) < n:
            drawn = _in_blocks(draw, self.step_key, role_number(role), n, dtype)
            self._longest[draw, role, dtype] = drawn
        return drawn[:n]


class OpaqueDraws(noise.Counter):
    """The same draws, by the opaque operation."""

    def numbers(self, draw: noise.Numbers, role: str, n: int, dtype: torch.dtype) -> Tensor:
        return _noise(draw is noise.signs, self.step_key, noise.role_number(role), n, dtype)
