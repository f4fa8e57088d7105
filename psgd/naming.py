"""Errors about names that are not known, with the name that was probably meant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

CUTOFF = 0.75  # of difflib's ratio: one letter of four may be wrong
# The names of one hyperparameter in the published packages, in PyTorch and in optax, on each line.
SYNONYMS = (
    ("lr", "learning_rate", "lr_params"),
    ("momentum", "b1", "beta1", "betas"),
    ("preconditioner_lr", "precond_lr", "lr_preconditioner"),
    ("preconditioner_init_scale", "precond_init_scale"),
    ("preconditioner_update_probability", "precond_update_prob"),
    ("preconditioner_dtype", "precond_dtype"),
    ("max_size_dense", "max_size_triangular", "preconditioner_max_size"),
    ("max_skew_dense", "max_skew_triangular", "preconditioner_max_skew"),
    ("rank_of_approximation", "uvd_rank_of_approximation"),
    ("grad_clip_max_norm", "update_global_norm_clip"),
    ("one_diag", "smart_one_diag"),  # choices of kron_torch's memory_save_mode
)
# Arguments of published packages that have no counterpart here, and why.
WITHOUT = (("merge_dims", "whether axes are merged is part of a method here, and no argument"),)


LONGEST = 80  # characters of a value in an error: a line of a terminal


def shown(value: object) -> str:
    """A value as an error shows it: its repr on one line; of a long one the beginning and the end."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a repr that fails must not hide the error that is being raised
        text = f"<{type(value).__name__}>"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 20]}...{text[-17:]}"


def _folded(name: str) -> str:
    """A name without differences of case and hyphens."""
    return name.casefold().replace("-", "_")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name of the same hyperparameter, else the one that is spelt most alike, whatever its case, or None."""
    folded = {_folded(k): k for k in known}
    meant = [folded[other] for line in SYNONYMS if _folded(name) in line for other in line if other in folded]
    close = get_close_matches(_folded(name), folded, n=1, cutoff=CUTOFF)
    return next(iter([*meant, *(folded[k] for k in close)]), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: "; did you mean 'kron'?", or nothing where no name is near."""
    close = nearest(name, known)
    return "" if close is None else f"; did you mean {close!r}?"


def unknown(owner: str, name: str, known: Sequence[str]) -> str:
    """The error text about a hyperparameter that is not known: what was probably meant, then all that are known."""
    why = "".join(f"; {reason}" for missing, reason in WITHOUT if missing == name)
    hint = did_you_mean(name, known)
    listed = f"{hint} It has" if hint else "; it has"
    return f"{owner}: unknown hyperparameter {name!r}{why}{listed} {', '.join(known)}"
