"""What the first compiled step costs, in processes of their own.

    python -m benchmarks.compiling --layers 40 --size 64 torch:trivial torch:procrustes

compiles what it is given, in that order, in one process, and prints the seconds of each as JSON. `trivial` is a
function of one addition: what a framework's compiler costs before there is anything to compile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import jax
import torch

import psgd_jax_backend
import psgd_torch_backend
from benchmarks.contenders import Layers, jax_arguments, jax_step, torch_run
from psgd.methods import METHODS, Method

TRIVIAL = "trivial"


def torch_first(name: str, layers: Layers) -> Callable[[], object]:
    """A function that compiles by running for the first time."""
    if name == TRIVIAL:
        return lambda: torch.compile(lambda x: x + 1)(torch.zeros(3))
    make = getattr(psgd_torch_backend, METHODS[name].title)
    return torch_run(lambda params: make(params, compile=True), layers)


def jax_first(name: str, layers: Layers, *, stack: bool) -> Callable[[], object]:
    """A function that compiles ahead of time."""
    if name == TRIVIAL:
        return jax.jit(lambda x: x + 1).lower(jax.numpy.zeros(3)).compile
    transform = getattr(psgd_jax_backend, name)(stack=stack)
    pool, state, params = jax_arguments(transform, layers)
    return lambda: jax_step(transform).lower(pool[0], state, params).compile()


FIRSTS: dict[str, Callable[[str, Layers], Callable[[], object]]] = {
    "torch": torch_first,
    "jax": lambda name, layers: jax_first(name, layers, stack=True),
    "jax-loop": lambda name, layers: jax_first(name, layers, stack=False),
}


def seconds(what: str, layers: Layers) -> float:
    """How long "framework:name" takes to compile in this process."""
    framework, name = what.split(":")
    first = FIRSTS[framework](name, layers)
    start = perf_counter()
    first()
    return perf_counter() - start


def in_new_process(what: Sequence[str], layers: Layers, cache: str) -> list[float]:
    """The seconds of each of `what`, compiled in turn in one new process whose compiler keeps its files in `cache`."""
    sizes = ["--layers", str(layers.count), "--size", str(layers.size)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiling", *sizes, *what],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"compiling {', '.join(what)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def compile_times(method: type[Method], layers: Layers) -> dict[str, float]:
    """Seconds to compile a method's step.

    torch_cold: the first thing compiled in a process, nothing cached. torch_trivial: what a trivial function takes in
    its place, and torch_warm: the step after that. torch_cached: in a further process that finds torch_cold's files.
    jax, jax_loop: under `jax.jit`, stacked and one leaf at a time, and jax_trivial before them.
    """
    step = f"torch:{method.name}"
    with tempfile.TemporaryDirectory() as cold, tempfile.TemporaryDirectory() as warm:
        (torch_cold,) = in_new_process([step], layers, cold)
        (torch_cached,) = in_new_process([step], layers, cold)
        torch_trivial, torch_warm = in_new_process([f"torch:{TRIVIAL}", step], layers, warm)
        traced = in_new_process([f"jax:{TRIVIAL}", f"jax:{method.name}", f"jax-loop:{method.name}"], layers, warm)
    return {
        "torch_cold": torch_cold,
        "torch_trivial": torch_trivial,
        "torch_warm": torch_warm,
        "torch_cached": torch_cached,
        **dict(zip(("jax_trivial", "jax", "jax_loop"), traced, strict=True)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Seconds to compile each of the given, in turn, as JSON.")
    parser.add_argument("what", nargs="+", help=f"{'|'.join(FIRSTS)}:{'|'.join((TRIVIAL, *METHODS))}")
    parser.add_argument("--layers", type=int, default=Layers.count)
    parser.add_argument("--size", type=int, default=Layers.size)
    given = parser.parse_args(arguments)
    print(json.dumps([seconds(what, Layers(given.layers, given.size)) for what in given.what]))


if __name__ == "__main__":
    main()
