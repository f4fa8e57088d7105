"""Made from `psgd.METHODS` by `make stubs`; not to be edited."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from psgd.schedule import precond_update_prob_schedule as precond_update_prob_schedule
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
        scanned_layers: bool = False,
        stack_batch_size: Any = None,
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
        scanned_layers: bool = False,
        stack_batch_size: Any = None,
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
        scanned_layers: bool = False,
        stack_batch_size: Any = None,
    ) -> None: ...

class Kron(PSGD):
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.001,
        *,
        weight_decay: float = 0.0,
        seed: int = 0,
        b1: float = 0.9,
        preconditioner_update_probability: Any = ...,
        max_size_triangular: float = 8192,
        min_ndim_triangular: int = 2,
        memory_save_mode: str | None = None,
        momentum_into_precond_update: bool = True,
        preconditioner_lr: float = 0.1,
        preconditioner_init_scale: float = 1.0,
        mu_dtype: Any = None,
        precond_dtype: Any = None,
        precond_update_precision: str | None = "tensorfloat32",
        precond_grads_precision: str | None = None,
        maximize: bool = False,
        stack: bool = True,
        compile: bool = False,
        scanned_layers: bool = False,
        stack_batch_size: Any = None,
    ) -> None: ...

class Affine(PSGD):
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.01,
        *,
        weight_decay: float = 0.0,
        seed: int | None = None,
        preconditioner_update_probability: Any = 1.0,
        b1: float = 0.9,
        nesterov: bool = False,
        precond_lr: Any = 0.1,
        precond_init_scale: float | None = None,
        update_global_norm_clip: float | None = None,
        step_normalizer_order: str = "2nd",
        mu_dtype: Any = None,
        precision: str | None = "tensorfloat32",
        max_size_triangular: float = 4096,
        max_skew_triangular: float = 128,
        maximize: bool = False,
        stack: bool = True,
        compile: bool = False,
        scanned_layers: bool = False,
        stack_batch_size: Any = None,
    ) -> None: ...
