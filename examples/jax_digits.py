"""Digits in JAX: a small perceptron, trained by Procrustes. `torch_digits.py` is the same in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from psgd_jax_backend import procrustes

STEPS, BATCH = 200, 100
images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16, dtype=jnp.float32), jnp.asarray(labels)
random = np.random.default_rng(0)


def layer(n_in, n_out):
    weight = jnp.asarray(random.standard_normal((n_out, n_in)) / n_in**0.5, dtype=jnp.float32)
    return {"weight": weight, "bias": jnp.zeros(n_out)}


def model(params, x):
    for i, p in enumerate(params):
        x = (jnp.tanh(x) if i else x) @ p["weight"].T + p["bias"]
    return x


def loss_of(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(params, x), y).mean()


@jax.jit
def train_step(params, state, x, y):
    loss, gradients = jax.value_and_grad(loss_of)(params, x, y)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


params = [layer(64, 32), layer(32, 32), layer(32, 10)]
optimizer = procrustes(0.02)
state = optimizer.init(params)

for step in range(1, STEPS + 1):
    batch = random.choice(1500, BATCH, replace=False)
    params, state, loss = train_step(params, state, x[batch], y[batch])
    if step == 1 or step % 50 == 0:
        print(f"step {step:3d}  loss {loss:.6f}")

accuracy = (model(params, x[1500:]).argmax(1) == y[1500:]).mean()
print(f"accuracy on held-out digits {accuracy:.3f}")
