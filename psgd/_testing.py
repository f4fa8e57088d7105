"""What tests of several modules of the core draw from."""

from __future__ import annotations

import numpy as np


def normals(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal numbers."""
    return np.asarray(np.random.default_rng(seed).standard_normal(shape))
