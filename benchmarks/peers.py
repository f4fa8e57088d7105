"""Who is timed beside whom: our optimizers and published ones of the same method, with settings that make them do the
same work, and AdamW and Muon for scale.

`make peers` puts the published ones into environments of their own, from which `racing` starts them. The matrix
products of a step then count as many operations in each implementation of a method.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS_HOME = "ours"
PERIOD = 34  # steps a fit, in the end of kron's schedule
RARELY = 1e-6  # a probability so small that no step of a race fits
# Axes above this stay diagonal, an embedding's longer one alone: a factor of 8192 x 8192 would be all that is timed.
LONGEST = 2048
COMMON: Mapping[str, Mapping[str, Any]] = {
    "torch": {"lr": 1e-3, "weight_decay": 0.01},
    "jax": {"learning_rate": 1e-3, "weight_decay": 0.01},
}


@dataclass(frozen=True, eq=False)
class Entrant:
    """An optimizer by the place of its class or function, and the environment where it is installed.

    probability: the name of the setting that says how often it fits. half: what to set for parameters in bfloat16.
    compiling: what to set for a compiled step; wrapped: its whole step is to be compiled, as it compiles nothing by
    itself. path: folders to import from. scale: shown for scale, as it is of another method. compiles:
    it compiles by itself, or can.
    """

    place: str  # "module:name"
    settings: Mapping[str, Any] = field(default_factory=dict)
    home: str = OURS_HOME
    probability: str | None = None
    half: Mapping[str, Any] = field(default_factory=dict)
    compiling: Mapping[str, Any] = field(default_factory=dict)
    wrapped: bool = False
    note: str = ""
    path: tuple[str, ...] = ()
    scale: bool = False
    compiles: bool = True

    @property
    def module(self) -> str:
        """Where it is imported from."""
        return self.place.split(":")[0]

    @property
    def ours(self) -> bool:
        """Is it of this project?"""
        return str(ROOT) in self.path

    @property
    def name(self) -> str:
        """Without a version, which its environment knows."""
        return " ".join(filter(None, [self.place.split(":")[1], self.note]))

    @property
    def python(self) -> str:
        """The interpreter of its environment."""
        return sys.executable if self.home == OURS_HOME else str(ROOT / self.home / "bin" / "python")

    def spec(self, framework: str, *, compiled: bool, dtype: str, probability: float | None) -> dict[str, Any]:
        """What a worker has to know of it."""
        settings = {**COMMON[framework], **self.settings}
        settings |= self.half if dtype == "bfloat16" else {}
        settings |= self.compiling if compiled else {}
        if self.probability and probability is not None:
            settings[self.probability] = probability
        return {
            "kind": "optimizer",
            "framework": framework,
            "place": self.place,
            "settings": settings,
            "compiled": compiled,
            "wrapped": compiled and self.wrapped,
            "dtype": dtype,
        }


def _ours(framework: str, name: str, settings: Mapping[str, Any], probability: bool, **more: Any) -> Entrant:
    package = f"psgd_{framework}_backend:{name}"
    compiling = {"compile": True} if framework == "torch" else {}
    often = FITS if probability else None
    return Entrant(package, settings, probability=often, compiling=compiling, path=(str(ROOT),), **more)


FITS = "preconditioner_update_probability"
TORCH_HOME, JAX_HOME = ".venv-peers", ".venv-peers-jax"
LATEST_QUAD = ".venv-peers-quad"  # a folder of that release alone, for the environment above
KRON = {"b1": 0.9, "max_size_triangular": LONGEST}
BETAS = {"betas": (0.9, 0.999)}
RANK = 10
WIDE = {"precond_dtype": "float32"}
PEERS: Mapping[tuple[str, str], tuple[Entrant, ...]] = MappingProxyType(
    {
        ("torch", "kron"): (
            _ours("torch", "Kron", KRON, True, half=WIDE),
            Entrant(
                "kron_torch:Kron",
                {**KRON, "merge_dims": False},
                TORCH_HOME,
                FITS,
                half={"precond_dtype": "torch.float32"},
            ),
            Entrant(
                "heavyball:PSGDKron",
                {**BETAS, "max_size_triangular": LONGEST},
                TORCH_HOME,
                FITS,
                half={"storage_dtype": "bfloat16"},
            ),
            Entrant(
                "pytorch_optimizer:Kron",
                {"momentum": 0.9, "max_size_triangular": LONGEST},
                TORCH_HOME,
                "pre_conditioner_update_probability",
                compiles=False,
            ),
        ),
        ("torch", "quad"): (
            _ours("torch", "QUAD", {"momentum": 0.9}, False),
            Entrant("quad_torch:QUAD", {"momentum": 0.9}, TORCH_HOME),
            Entrant("quad_torch:QUAD", {"momentum": 0.9}, TORCH_HOME, path=(str(ROOT / LATEST_QUAD),)),
        ),
        # heavyball's rule for what stays diagonal is ours when its mode is "smart_one_diag".
        ("torch", "procrustes"): (
            _ours("torch", "Procrustes", {"momentum": 0.9}, False, half={"dtype": "float32"}),
            Entrant(
                "heavyball:PSGDPRO", {**BETAS, "memory_save_mode": "smart_one_diag", "merge_dims": True}, TORCH_HOME
            ),
        ),
        ("jax", "kron"): (
            _ours("jax", "kron", KRON, True, half=WIDE),
            Entrant("psgd_jax.kron:kron", KRON, JAX_HOME, FITS, half=WIDE),
        ),
        ("jax", "quad"): (_ours("jax", "quad", {"momentum": 0.9}, False),),
        ("jax", "procrustes"): (_ours("jax", "procrustes", {"momentum": 0.9}, False),),
        **{
            ("jax", name): (
                _ours("jax", name, {"b1": 0.9}, True),
                Entrant(f"psgd_jax.{name}:{name}", {"b1": 0.9}, JAX_HOME, FITS),
            )
            for name in ("xmat", "low_rank_approximation", "affine")
        },
    }
)
SCALE: Mapping[str, Sequence[Entrant]] = {
    "torch": (
        Entrant("torch.optim:AdamW", wrapped=True, scale=True),
        Entrant("torch.optim:AdamW", {"fused": True}, wrapped=True, note="fused", scale=True),
        Entrant(":Muon", wrapped=True, note="with AdamW", scale=True),  # of the worker, which gives AdamW the vectors
    ),
    "jax": (
        Entrant("optax:adamw", scale=True),
        Entrant("optax.contrib:muon", scale=True),
    ),
}
USUAL = ("kron", "quad", "procrustes")  # what is measured where no method is asked for
