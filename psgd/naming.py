"""What a name that is not known was meant to be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

CUTOFF = 0.75  # of difflib's ratio: one letter of four may be off
# What one thing is called in the published packages, in PyTorch and in optax: each line is one thing.
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
# Arguments of published packages to which nothing here corresponds, and why.
WITHOUT = (("merge_dims", "whether axes are merged is part of a method here, and no argument"),)


LONGEST = 80  # characters of a value in an error


def shown(value: object) -> str:
    """A value as an error shows it: on one line, and where that is long its beginning and its end."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # whatever it is: the error is about something else
        text = f"<{type(value).__name__}>"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 20]}...{text[-17:]}"


def _folded(name: str) -> str:
    return name.casefold().replace("-", "_")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name for the same thing, or else the one that is spelt most alike, whatever its case; None if none."""
    folded = {_folded(k): k for k in known}
    meant = [folded[other] for line in SYNONYMS if _folded(name) in line for other in line if other in folded]
    close = get_close_matches(_folded(name), folded, n=1, cutoff=CUTOFF)
    return next(iter([*meant, *(folded[k] for k in close)]), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What an error about an unknown name adds: "; did you mean 'kron'?", or nothing where nothing is near."""
    close = nearest(name, known)
    return "" if close is None else f"; did you mean {close!r}?"


def unknown(owner: str, name: str, known: Sequence[str]) -> str:
    """The error about a hyperparameter that is not known: what was meant, then all that are."""
    why = "".join(f"; {reason}" for missing, reason in WITHOUT if missing == name)
    hint = did_you_mean(name, known)
    listed = f"{hint} It has" if hint else "; it has"
    return f"{owner}: unknown hyperparameter {name!r}{why}{listed} {', '.join(known)}"
