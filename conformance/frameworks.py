"""Arrays of every framework under one roof: how to make one, and how to read it back. Frameworks load on first use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

Array = Any


@dataclass(frozen=True)
class Framework:
    """array: (NumPy array, dtype name) -> its own. numpy: back, in float64 or complex128. dtypes: those it has."""

    name: str
    array: Callable[[np.ndarray, str], Array]
    numpy: Callable[[Array], np.ndarray]
    dtypes: tuple[str, ...] = ("float32", "float64", "complex64", "complex128")

    def nearest(self, dtype: str) -> str:
        """The dtype itself, or float32 for a half precision that the framework lacks."""
        return dtype if dtype in self.dtypes else "float32"


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def _torch_array(x: np.ndarray, dtype: str) -> Array:
    torch = import_module("torch")
    return torch.as_tensor(np.array(x)).to(getattr(torch, dtype))


def _torch_numpy(x: Array) -> np.ndarray:
    torch = import_module("torch")
    x = x.detach()
    return x.to(torch.complex128 if x.is_complex() else torch.float64).cpu().numpy()


def _jax_array(x: np.ndarray, dtype: str) -> Array:
    return import_module("jax.numpy").array(x, dtype=dtype)  # a copy: asarray may share NumPy's memory


def _strict_array(x: np.ndarray, dtype: str) -> Array:
    xp = import_module("array_api_strict")
    return xp.asarray(np.array(x), dtype=getattr(xp, dtype))


HALVES = ("bfloat16", "float16")
FRAMEWORKS: dict[str, Framework] = {
    f.name: f
    for f in (
        Framework("numpy", lambda x, dtype: np.array(x, dtype=dtype), lambda x: _wide(np.asarray(x))),
        Framework("strict", _strict_array, lambda x: _wide(np.asarray(x))),
        Framework("torch", _torch_array, _torch_numpy, (*Framework.dtypes, *HALVES)),
        Framework("jax", _jax_array, lambda x: _wide(np.asarray(x)), (*Framework.dtypes, *HALVES)),
    )
}


@contextmanager
def double_precision(*names: str) -> Iterator[None]:
    """Let JAX keep float64 while in the block, if it is one of the names; its setting is put back after."""
    if not any(name.startswith("jax") for name in names):
        yield
        return
    with import_module("jax").enable_x64(True):
        yield


KEEPING = {  # settings of JAX's cache of compiled programs on disk: it keeps them all
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextmanager
def compiled_once() -> Iterator[None]:
    """Let JAX compile no program twice while in the block, unless it has a cache already; its settings are put back."""
    config = import_module("jax").config
    if config.jax_compilation_cache_dir:
        yield
        return
    cache = import_module("jax.experimental.compilation_cache.compilation_cache")
    before = {name: getattr(config, name) for name in ("jax_compilation_cache_dir", *KEEPING)}
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            for name, value in (KEEPING | {"jax_compilation_cache_dir": folder}).items():
                config.update(name, value)
            cache.reset_cache()  # JAX asks once whether there is one
            yield
        finally:
            for name, value in before.items():
                config.update(name, value)
            cache.reset_cache()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute in one thread while in the block: on small tensors more of them only wait for each other."""
    torch = import_module("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
