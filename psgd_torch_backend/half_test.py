"""Parameters in bfloat16 with factors in float32, for long."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from psgd_torch_backend import PSGD, Kron, Procrustes

STEPS = 1000


def trained(made: type[PSGD], kept: torch.dtype, **options: Any) -> tuple[float, PSGD]:
    """A classifier of digits, at a rate that moves numbers by more than bfloat16 rounds away: the loss at the end."""
    torch.manual_seed(0)
    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    x = (x / 16).to(kept)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).to(kept)
    optimizer, losses = made(model.parameters(), **options), []
    for _ in range(STEPS):
        batch = torch.randint(0, len(x), (128,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[batch]).float(), y[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-STEPS // 4 :]) / (STEPS // 4), optimizer


@pytest.mark.parametrize(
    ("made", "options"),
    [
        (Procrustes, {"lr": 0.05, "weight_decay": 0.5, "dtype": "float32"}),
        (Kron, {"lr": 0.003, "weight_decay": 3.0, "precond_dtype": "float32"}),
    ],
)
def test_bfloat16_parameters_are_trained_as_well_as_float32(made: type[PSGD], options: dict[str, Any]):
    exact, _ = trained(made, torch.float32, **options)
    loss, optimizer = trained(made, torch.bfloat16, **options)
    assert loss == pytest.approx(exact, rel=0.05)
    for p in optimizer.param_groups[0]["params"]:
        entry = optimizer.state[p]
        assert p.dtype == torch.bfloat16 and p.isfinite().all()
        assert all(q.dtype == torch.float32 and q.isfinite().all() for q in entry["Q"].values())
        assert int(entry["step"]) == STEPS
    assert optimizer.summary().skipped == 0
