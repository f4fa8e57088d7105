"""Digits in PyTorch: a small perceptron, trained by Procrustes. `jax_digits.py` is the same in JAX."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from psgd_torch_backend import Procrustes

STEPS, BATCH = 200, 100
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
train, test = slice(0, 1500), slice(1500, None)
random = np.random.default_rng(0)


def layer(n_in: int, n_out: int) -> nn.Linear:
    linear = nn.Linear(n_in, n_out)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(random.standard_normal((n_out, n_in)) / n_in**0.5))
        linear.bias.zero_()
    return linear


model = nn.Sequential(layer(64, 32), nn.Tanh(), layer(32, 32), nn.Tanh(), layer(32, 10))
optimizer = Procrustes(model.parameters(), lr=0.02)

for step in range(1, STEPS + 1):
    batch = torch.tensor(random.choice(1500, BATCH, replace=False))
    loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step == 1 or step % 50 == 0:
        print(f"step {step:3d}  loss {loss.item():.6f}")

accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
print(f"accuracy on held-out digits {accuracy.item():.3f}")
