"""Digits in PyTorch: a small perceptron, trained by Procrustes. `jax_digits.py` is the same in JAX."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from psgd_torch_backend import Procrustes

images, labels = load_digits(return_X_y=True)  # the last 297 are held out
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
random = np.random.default_rng(0)
model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
with torch.no_grad():
    for p in model.parameters():
        start = random.standard_normal(p.shape) / p.shape[-1] ** 0.5 if p.ndim > 1 else np.zeros(p.shape)
        p.copy_(torch.tensor(start))
optimizer = Procrustes(model.parameters(), lr=0.01)

for step in range(1, 201):
    batch = torch.tensor(random.choice(1500, 100, replace=False))
    loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step == 1 or step % 50 == 0:
        print(f"step {step:3d}  loss {loss.item():.6f}")

accuracy = (model(x[1500:]).argmax(1) == y[1500:]).float().mean()
print(f"held-out accuracy {accuracy.item():.3f}")
