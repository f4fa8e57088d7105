"""Made from `psgd.METHODS` by `make stubs`; not to be edited."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from psgd_torch_backend.optimizer import PSGD as PSGD

class Procrustes(PSGD):
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.001,
        *,
        weight_decay: float = 0.1,
        seed: int = 0,
        lr_style: str | None = "adam",
        momentum: float = 0.95,
        max_size_dense: float = 16384,
        max_skew_dense: float = 1.0,
        preconditioner_lr: float = 0.7,
        preconditioner_init_scale: float | None = None,
        noise_scale: float = 1e-09,
        dtype: Any = None,
        maximize: bool = False,
        stack: bool = True,
        compile: bool = False,
    ) -> None: ...

class QUAD(PSGD):
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.001,
        *,
        weight_decay: float = 0.1,
        seed: int = 0,
        lr_style: str | None = "adam",
        momentum: float = 0.95,
        max_size_dense: float = 16384,
        max_skew_dense: float = 1.0,
        preconditioner_lr: float = 0.7,
        preconditioner_init_scale: float | None = None,
        noise_scale: float = 1e-09,
        dtype: Any = None,
        maximize: bool = False,
        stack: bool = True,
        compile: bool = False,
    ) -> None: ...

class KronWhiten(PSGD):
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.001,
        *,
        weight_decay: float = 0.0,
        seed: int = 0,
        dQ: str = "Q0.5EQ1.5",
        momentum: float = 0.0,
        whiten_grad: bool = True,
        update_preconditioner_first: bool = True,
        preconditioner_update_probability: float = 1.0,
        lr_preconditioner: float = 0.1,
        betaL: float = 0.9,
        damping: float = 1e-09,
        preconditioner_max_size: float = float("inf"),
        preconditioner_max_skew: float = 1.0,
        preconditioner_init_scale: float | None = None,
        grad_clip_max_amps: tuple[float, float] = (2.0, 10.0),
        maximize: bool = False,
        stack: bool = True,
        compile: bool = False,
    ) -> None: ...
