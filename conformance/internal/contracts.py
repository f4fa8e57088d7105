"""What the ecosystems demand of an optimizer, and which test shows that each demand is met.

A test says what it shows by a mark, `@pytest.mark.contract("torch: hooks")`; `psgd contracts` runs the marked tests and
prints the table. This module is also the plugin of pytest that reads the marks, and that makes JAX compile quickly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Of an option of XLA: its value in tests, which step a few times what took seconds to compile, and XLA's own. A test
# of what users run gives XLA's own to `jax.jit`; with XLA_FLAGS set, as to nothing at all, every test has the user's.
COMPILING = {
    "xla_backend_optimization_level": (0, 3),
    "xla_cpu_use_fusion_emitters": (False, True),
    "xla_cpu_parallel_codegen_split_count": (1, 32),
}

# Name: what is demanded. The part before the colon is whose demand it is.
CONTRACTS = {
    "torch: groups": "every argument is legal in a group, has a default, and is plain data; other keys stay",
    "torch: schedulers": "every scheduler of torch drives lr, and momentum or betas where it cycles them",
    "torch: late parameters": "groups may be added, parameters unfrozen or replaced between steps",
    "torch: closure": "is called once, with or without backward(); its loss comes back; what it raises changes nothing",
    "torch: copies": "a deep copy and a pickle go on as the original",
    "torch: state dict": "loads with weights_only, keeps dtypes and counters; a resumed run is bit by bit the same",
    "torch: old state dicts": "of before an argument existed, with a number as step, with and without names, load",
    "torch: foreign entries": "what others keep in `state` is left alone and does no harm",
    "torch: hooks": "all six kinds run, in torch's order",
    "torch: distributed checkpoints": "DCP saves and loads it: plain, flattened, full, from disk",
    "torch: distributed data": "every rank draws the same noise; ZeroRedundancyOptimizer trains as one process does",
    "torch: flags": "maximize ascends; flags that would not be honest are absent",
    "torch: tensor lr": "a tensor of one element is a learning rate, followed when it is filled",
    "torch: kinds of parameters": "complex ones as each method says; sparse ones are refused by name; frozen ones stay",
    "torch: gradients": "are read only; any strides do",
    "torch: mixed precision": "autocast and GradScaler work as with any optimizer",
    "torch: silence": "nothing is printed, warned of at each step, or switched for the process",
    "torch: compiler": "compile=True compiles each layout once, eager where it cannot; torch.compile(opt.step) works",
    "torch: clients": "Lightning, transformers' Trainer and accelerate train with it",
    "jax: arguments": "update(updates, state, params=None, **extra): foreign ones are ignored; decay needs params",
    "jax: purity": "traced once for all steps, the same again for the same, and nothing is printed",
    "jax: trees": "any containers, None, masked, empty and boxed leaves; updates come back as gradients came",
    "jax: state": "arrays alone, whose structure, shape, dtype and weak type never change; eval_shape knows them",
    "jax: dtypes": "updates have the dtype of the parameters, factors and momentum the one asked for",
    "jax: control flow": "jit or not, scan, cond, grad and checkify: a step is the same step",
    "jax: donation": "state and parameters may be donated; a donated buffer used again is JAX's own error",
    "jax: ensembles": "members under vmap step, and skip, as each would alone",
    "jax: wrappers": "MultiSteps, apply_if_finite, partition, masked and chain",
    "jax: hyperparameters": "inject_hyperparams schedules every number and sets it between steps, traced once",
    "jax: learning rate": "a number, traced or not, or a schedule that returns any kind of number",
    "jax: tree tools": "optax.tree.map_params, get and set",
    "jax: switches": "nothing is found by debug_nans, key reuse, leak, rank and dtype promotion, transfer guard",
    "jax: x64": "float32 is the same with it on, off, or turned between init and update",
    "jax: keys": "old and new keys give the same noise, whatever jax_threefry_partitionable says",
    "jax: callbacks": "a compiled step calls nothing on the host",
    "jax: inputs": "Python's and NumPy's leaves step; whole numbers, other trees and states are refused",
    "jax: clients": "flax's linen, nnx.Optimizer and equinox train with it",
    "jax: checkpoints": "orbax saves it and restores it to an abstract target, on another mesh too",
    "jax: sharding": "in both axis modes and any layout the trajectory of one device; updates lie as parameters do",
    "jax: state sharding": "state is laid out by the mesh from init on, and stays so",
    "jax: processes": "two of them walk as one",
    "input: numbers": "out of range, they are refused by name and value",
    "input: choices": "unknown ones are refused with the list of known ones",
    "input: dtypes": "of state that are not floating point are refused",
    "input: parameters": "none, duplicates, mixed names: torch's own errors",
    "input: names": "a misspelt argument is refused, in a group too",
    "step: no gradients": "nothing happens, and no counter moves",
    "step: zero gradients": "no parameter moves, and normal gradients afterwards find the factors whole",
    "step: not finite": "skip, raise or propagate, as told",
    "step: extremes": "gradients from 1e-38 to 1e30, and a single spike, keep everything finite",
    "step: shapes": "scalars, empty, long, thin and many-dimensional tensors",
    "step: degenerate gradients": "of rank one, constant, orthogonal, repeated: factors stay bounded",
    "step: strides": "non-contiguous, channels-last, expanded and shared parameters",
    "step: mismatches": "of shape or dtype are one clear sentence",
    "step: modes": "inference mode, deterministic algorithms",
    "step: no learning rate": "with lr = 0 parameters stay and state goes on",
    "step: moved parameters": "`model.to(dtype)` between steps",
    "state: of others": "other groups, parameters, shapes, another optimizer's: refused, nothing changed",
    "state: at any time": "before the first step, twice, after a copy",
}


@dataclass(frozen=True)
class Verdict:
    """One test of a contract: how many of its cases passed, were skipped, failed."""

    contract: str
    test: str
    passed: int = 0
    skipped: int = 0
    failed: int = 0

    @property
    def word(self) -> str:
        """passed, skipped or failed, with the number of cases where there are several."""
        word = "failed" if self.failed else "passed" if self.passed else "skipped"
        count = self.passed + self.skipped + self.failed
        return word if count == 1 else f"{word} ({self.passed} of {count})" if self.failed else f"{word} ({count})"


# ---- the plugin -----------------------------------------------------------------------------
def pytest_configure(config: Any) -> None:
    """The mark; and what XLA reads when it is first used, in processes of tests too."""
    os.environ.setdefault("XLA_FLAGS", " ".join(f"--{name}={value}" for name, (value, _) in COMPILING.items()))
    config.addinivalue_line("markers", "contract(name): the test shows that this one of `CONTRACTS` is kept")


def pytest_addoption(parser: Any) -> None:
    """Where the outcomes go."""
    parser.addoption("--contracts", metavar="FILE", help="run tests of contracts only, and write outcomes to this file")
    parser.addoption("--contract", action="append", metavar="NAME", help="of these contracts only; may be repeated")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Marks go with the reports, across processes; other tests stay out where only contracts are asked for."""
    kept = []
    for item in items:
        names = [mark.args[0] for mark in item.iter_markers("contract")]
        unknown = [name for name in names if name not in CONTRACTS]
        if unknown:
            raise ValueError(
                f"{item.nodeid} shows {unknown[0]!r}, which is no contract of conformance.internal.contracts"
            )
        item.user_properties += [("contract", name) for name in names]
        kept += [item] if set(names) & set(config.getoption("--contract") or CONTRACTS) else []
    if config.getoption("--contracts"):
        shown = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in shown])
        items[:] = kept


class Collector:
    """Outcomes of marked tests, written when all are done."""

    def __init__(self, file: Path) -> None:
        self.file, self.outcomes = file, list[dict[str, str]]()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """The outcome of a test; of its setup or teardown only where that went wrong."""
        if report.when != "call" and report.passed:
            return
        self.outcomes += [
            {"contract": value, "test": report.nodeid, "outcome": report.outcome}
            for name, value in report.user_properties
            if name == "contract"
        ]

    def pytest_sessionfinish(self) -> None:
        """All of them, as JSON."""
        self.file.write_text(json.dumps(self.outcomes))


def pytest_sessionstart(session: Any) -> None:
    """The controlling process collects."""
    file = session.config.getoption("--contracts")
    if file and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(Collector(Path(file)))


# ---- the table ------------------------------------------------------------------------------
def run(names: Sequence[str], workers: int = 2) -> list[Verdict]:
    """Run the tests of contracts, from a checkout: a verdict for each test, in the order of the contracts."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.json"
        command = [sys.executable, "-m", "pytest", f"--contracts={file}", *(f"--contract={name}" for name in names)]
        command += ["-n", str(workers), "--dist", "loadgroup"] if workers > 1 else []
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if not file.exists():
            raise RuntimeError(f"pytest could not run:\n{done.stdout}")
        return [v for v in verdicts(json.loads(file.read_text())) if v.contract in names]


def verdicts(outcomes: Sequence[dict[str, str]]) -> Iterator[Verdict]:
    """Outcomes of cases, counted for each test of each contract."""
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for one in outcomes:
        key = one["contract"], one["test"].partition("[")[0]
        words = counts.setdefault(key, {})
        words[one["outcome"]] = words.get(one["outcome"], 0) + 1
    for contract in CONTRACTS:
        for (name, test), words in counts.items():
            if name == contract:
                yield Verdict(contract, test, **words)
