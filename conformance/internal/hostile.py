"""Values that nobody should give and somebody does: what every argument of every constructor is tried with."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from math import inf, nan
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch


class Silent:
    """An object that cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("not to be shown")

    __str__ = __repr__


# Name to what makes the value.
VALUES: dict[str, Callable[[], Any]] = {
    # numbers
    "zero": lambda: 0,
    "minus one": lambda: -1,
    "half": lambda: 0.5,
    "nan": lambda: nan,
    "inf": lambda: inf,
    "-inf": lambda: -inf,
    "largest": lambda: 1e308,
    "smallest": lambda: 5e-324,
    "large whole": lambda: 10**400,
    "unprintable whole": lambda: 10**5000,
    "2**63": lambda: 2**63,
    "complex": lambda: 0.5j,
    "fraction": lambda: Fraction(1, 3),
    "large fraction": lambda: Fraction(10**400),
    "decimal": lambda: Decimal("0.5"),
    "signalling decimal": lambda: Decimal("sNaN"),
    "bool": lambda: True,
    # NumPy
    "numpy number": lambda: np.float32(0.5),
    "numpy bool": lambda: np.True_,
    "numpy array": lambda: np.array(5.0),
    "numpy (1, 1, 1)": lambda: np.full((1, 1, 1), 0.5),
    "numpy (2,)": lambda: np.ones(2),
    "numpy text": lambda: np.array("a"),
    "numpy object": lambda: np.array(None),
    "numpy dtype": lambda: np.dtype("float32"),
    "numpy type": lambda: np.float16,
    # PyTorch
    "torch number": lambda: torch.tensor(0.5),
    "torch (1, 1, 1)": lambda: torch.full((1, 1, 1), 0.5),
    "torch (2,)": lambda: torch.ones(2),
    "torch meta": lambda: torch.ones((), device="meta"),
    "torch complex": lambda: torch.tensor(0.5j),
    "torch sparse": lambda: torch.ones(1).to_sparse(),
    "torch dtype": lambda: torch.int8,
    # JAX
    "jax number": lambda: jnp.array(0.5),
    "jax (1, 1, 1)": lambda: jnp.full((1, 1, 1), 0.5),
    "jax (2,)": lambda: jnp.array([0.1, 0.2]),
    "jax nan": lambda: jnp.array(nan),
    "jax bool": lambda: jnp.array(True),
    "jax key": lambda: jax.random.key(0),
    "jax type": lambda: jnp.bfloat16,
    "jax shape": lambda: jax.ShapeDtypeStruct((), "float32"),
    # others
    "none": lambda: None,
    "text": lambda: "fast",
    "long text": lambda: "x\n" * 10_000,
    "escape": lambda: "\x1b[31m",
    "bytes": lambda: b"0.5",
    "list": lambda: [0.5, "a"],
    "four": lambda: [1, nan, None, 10**400],
    "pair": lambda: (1, 10**400),
    "set": lambda: {0.5},
    "mapping": lambda: {"a": 0.5},
    "class": lambda: dict,
    "object": object,
    "silent object": Silent,
}
LONGEST = 500  # characters of a sentence


def fault(argument: str, make: Callable[[Any], Any], value: Any) -> str | None:
    """What is wrong with what becomes of a value: it is taken, or refused by one sentence that names the argument."""
    try:
        make(value)
    except (ValueError, TypeError) as error:
        said = str(error)
        if argument not in said:
            return f"does not name it: {type(error).__name__}: {said[:LONGEST]}"
        if "\n" in said or "\x1b" in said or len(said) > LONGEST:
            return f"is no sentence: {said[:LONGEST]!r}"
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error)[:LONGEST]}"
    return None
