"""Digits in JAX: a small perceptron, trained by Procrustes. `torch_digits.py` is the same in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from psgd_jax_backend import procrustes

images, labels = load_digits(return_X_y=True)  # the last 297 are held out
x, y = jnp.asarray(images / 16, dtype=jnp.float32), jnp.asarray(labels)
random = np.random.default_rng(0)
weights = [random.standard_normal((n, m)) / m**0.5 for n, m in [(32, 64), (32, 32), (10, 32)]]
params = [{"w": jnp.asarray(w, dtype=jnp.float32), "b": jnp.zeros(len(w))} for w in weights]
optimizer = procrustes(0.01)


def model(params, x):
    for i, layer in enumerate(params):
        x = (jnp.tanh(x) if i else x) @ layer["w"].T + layer["b"]
    return x


@jax.jit
def train_step(params, state, x, y):
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    loss, gradients = jax.value_and_grad(lambda p: cross_entropy(model(p, x), y).mean())(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


state = optimizer.init(params)
for step in range(1, 201):
    batch = random.choice(1500, 100, replace=False)
    params, state, loss = train_step(params, state, x[batch], y[batch])
    if step == 1 or step % 50 == 0:
        print(f"step {step:3d}  loss {loss:.6f}")
print(f"held-out accuracy {(model(params, x[1500:]).argmax(1) == y[1500:]).mean():.3f}")
