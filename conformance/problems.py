"""The problems both frameworks train, each written once against the Python Array API standard.

A loss asks its arguments for their namespace, so the same lines run on numpy, array-api-strict, torch and
jax, under torch.compile and jax.jit, and each framework differentiates them with its own autodiff.  Every
loss is smooth (tanh for relu, mean pooling for max pooling): at a kink, a rounding error could pick the other
one-sided derivative, and two correct gradients would differ by far more than rounding.

The problems that are not chaotic also keep noise in every direction of the gradient.  Whitening scales a
gradient to unit size, so along a direction without noise the preconditioner grows as the gradient vanishes,
until a step overshoots: there one ulp becomes a visible difference within a few hundred steps, even on a
convex quadratic.  Where noise remains, the preconditioner stays bounded and one ulp stays about one ulp.

All data is made in numpy and float64 from explicit seeds.  The caller moves it to the framework, casting
batches to the dtype of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from psgd._xp import namespace

Array = Any  # the standard names no common array type
Arrays = Mapping[str, Array]
Data = dict[str, np.ndarray]

CLASSES = 10
SIDE = 8  # the digits are SIDE x SIDE images
PIXELS = SIDE * SIDE
TRAIN = 1500  # of 1797; the remaining 297 are held out
BATCH = 100


@dataclass(frozen=True)
class Problem:
    """A model, where its training starts, and what it sees at each step."""

    name: str
    summary: str
    init: Callable[[int], Data]  # seed -> parameters at the start
    batch: Callable[[int, int], Data]  # (seed, step counted from 1) -> this step's data, {} if there is none
    loss: Callable[[Arrays, Arrays], Array]  # (parameters, batch) -> 0-d loss
    lr: float  # a step size at which a whitened update visibly trains it
    chaotic: bool  # does a difference of one ulp grow as training goes on?
    evaluate: Callable[[Arrays], float] | None = None  # numpy parameters -> accuracy on held-out data
    scanned: frozenset[str] = frozenset()  # parameters that hold one layer for each entry of their first axis


def _random(seed: int, step: int = 0, purpose: int = 0) -> np.random.Generator:
    """One of a step's random streams; steps count from 1, which leaves step 0 to what is drawn once."""
    return np.random.Generator(np.random.PCG64([seed, step, purpose]))


def _namespace(params: Arrays, batch: Arrays) -> Any:
    """The namespace of all arguments."""
    return namespace(next(iter(params.values())))


# Rosenbrock -------------------------------------------------------------------------------------------------


def _rosenbrock_init(seed: int) -> Data:
    return {"x": 0.1 * _random(seed).standard_normal(10)}


def _rosenbrock_loss(params: Arrays, batch: Arrays) -> Array:
    """f(x) = sum_i 100 (x_{2i+1} - x_{2i}^2)^2 + (1 - x_{2i})^2, whose minimum 0 is at x = 1."""
    xp = _namespace(params, batch)
    even, odd = params["x"][0::2], params["x"][1::2]
    return xp.sum(100 * (odd - even**2) ** 2 + (1 - even) ** 2)


# Least squares ----------------------------------------------------------------------------------------------


def _least_squares_init(seed: int) -> Data:
    random = _random(seed)
    shapes = {"W": (6, 9), "b": (6,), "s": ()}
    start = {name: np.asarray(0.1 * random.standard_normal(shape)) for name, shape in shapes.items()}
    return start | {"s": np.asarray(1 + start["s"])}  # away from zero, beside which no difference is small


def _least_squares_batch(seed: int, step: int) -> Data:
    """The full batch: one affine map seen at 64 fixed points, through noise that is fresh at every step.

    64 Gaussian rows in 9 dimensions are well conditioned as they come: the ratio of the extreme singular
    values is near (8 + 3) / (8 - 3).
    """
    fixed, fresh = _random(seed, purpose=1), _random(seed, step)
    inputs, weight, bias = (fixed.standard_normal(shape) for shape in ((64, 9), (6, 9), (6,)))
    targets = inputs @ weight.T + bias + 8.0 * fresh.standard_normal((64, 6))
    return {"inputs": inputs, "targets": targets}


def _least_squares_loss(params: Arrays, batch: Arrays) -> Array:
    """f(W, b, s) = mean over samples n and outputs o of (W x_n + b + s - y_n)_o^2.

    Only b + s is determined: to raise s and to lower b as much changes nothing.
    """
    xp = _namespace(params, batch)
    outputs = batch["inputs"] @ xp.matrix_transpose(params["W"]) + params["b"] + params["s"]
    return xp.mean((outputs - batch["targets"]) ** 2)


# Digits -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 UCI digits, shuffled once and for all: pixels in [0, 1], and one-hot labels."""
    from sklearn.datasets import load_digits  # slow to import, and not every problem needs it

    images, labels = load_digits(return_X_y=True)
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(labels))
    return images[order] / 16, np.eye(CLASSES)[labels[order]]


def _digits_batch(seed: int, step: int) -> Data:
    images, labels = _digits()
    chosen = _random(seed, step).choice(TRAIN, BATCH, replace=False)
    return {"images": images[chosen], "labels": labels[chosen]}


def _cross_entropy(xp: Any, logits: Array, labels: Array) -> Array:
    """-mean_n sum_c y_nc log softmax(z_n)_c.  The subtracted maximum cancels, in the gradient as well."""
    shifted = logits - xp.max(logits, axis=1, keepdims=True)
    log_total = xp.log(xp.sum(xp.exp(shifted), axis=1, keepdims=True))
    return -xp.mean(xp.sum(labels * (shifted - log_total), axis=1))


def _dense(random: np.random.Generator, fan_in: int, fan_out: int) -> np.ndarray:
    return random.standard_normal((fan_in, fan_out)) / fan_in**0.5


def _softmax_init(seed: int) -> Data:
    return {"weight": 0.1 * _dense(_random(seed), PIXELS, CLASSES), "bias": np.zeros(CLASSES)}


def _softmax_batch(seed: int, step: int) -> Data:
    """A batch of digits, and the anchors of the ridge: small Gaussian arrays, fresh at every step."""
    random = _random(seed, step, purpose=1)
    anchors = {
        "anchor_weight": 0.1 * random.standard_normal((PIXELS, CLASSES)),
        "anchor_bias": 0.1 * random.standard_normal(CLASSES),
    }
    return _digits_batch(seed, step) | anchors


def _softmax_logits(xp: Any, params: Arrays, images: Array) -> Array:
    """z = x W + b."""
    return images @ params["weight"] + params["bias"]


def _softmax_loss(params: Arrays, batch: Arrays) -> Array:
    """f(W, b) = cross entropy of z + 0.01 / 2 (|W - A|^2 + |b - a|^2), strongly convex.

    The anchors A and a have mean zero, so on average this is plain l2.  They put noise where digits put none:
    on the pixels that are always blank, and on the shift common to all classes.
    """
    xp = _namespace(params, batch)
    logits = _softmax_logits(xp, params, batch["images"])
    ridge = sum(xp.sum((p - batch[f"anchor_{name}"]) ** 2) for name, p in params.items())
    return _cross_entropy(xp, logits, batch["labels"]) + 0.005 * ridge


MLP_WIDTHS = (PIXELS, 32, 32, 32, CLASSES)  # the two 32 x 32 layers can share one stacked preconditioner


def _mlp_init(seed: int) -> Data:
    random, params = _random(seed), {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(MLP_WIDTHS), start=1):
        params[f"w{layer}"] = _dense(random, fan_in, fan_out)
        params[f"b{layer}"] = np.zeros(fan_out)
    return params


def _mlp_logits(xp: Any, params: Arrays, images: Array) -> Array:
    """z = h_3 W_4 + b_4, where h_l = tanh(h_{l-1} W_l + b_l) and h_0 = x."""
    hidden, last = images, len(MLP_WIDTHS) - 1
    for layer in range(1, last):
        hidden = xp.tanh(hidden @ params[f"w{layer}"] + params[f"b{layer}"])
    return hidden @ params[f"w{last}"] + params[f"b{last}"]


DEPTH, WIDTH = 4, 16


def _deep_init(seed: int) -> Data:
    random = _random(seed)
    return {
        "first": _dense(random, PIXELS, WIDTH),
        "hidden": 0.5 * np.stack([_dense(random, WIDTH, WIDTH) for _ in range(DEPTH)]),
        "shift": np.zeros((DEPTH, WIDTH)),
        "gain": np.ones(DEPTH),
        "last": _dense(random, WIDTH, CLASSES),
    }


def _deep_logits(xp: Any, params: Arrays, images: Array) -> Array:
    """z = h_L W, where h_l = h_{l-1} + g_l tanh(h_{l-1} W_l + b_l) and h_0 = x W_0."""
    h = images @ params["first"]
    for layer in range(DEPTH):
        inner = xp.tanh(h @ params["hidden"][layer, ...] + params["shift"][layer, ...])
        h = h + params["gain"][layer, ...] * inner
    return h @ params["last"]


KERNEL = 3
CHANNELS = 8


def _conv_init(seed: int) -> Data:
    random = _random(seed)
    pooled = (SIDE - 2 * (KERNEL - 1)) // 2  # 8 -> 6 -> 4 by the convolutions, -> 2 by the pooling

    def kernel(inputs: int) -> np.ndarray:
        fan_in = inputs * KERNEL**2
        return random.standard_normal((CHANNELS, inputs, KERNEL, KERNEL)) / fan_in**0.5

    return {
        "kernel1": kernel(1),
        "bias1": np.zeros(CHANNELS),
        "kernel2": kernel(CHANNELS),
        "bias2": np.zeros(CHANNELS),
        "weight": _dense(random, CHANNELS * pooled**2, CLASSES),
        "bias": np.zeros(CLASSES),
    }


def _convolve(xp: Any, images: Array, kernel: Array) -> Array:
    """out[n,r,c,o] = sum_{i,u,v} images[n,r+u,c+v,i] kernel[o,i,u,v], without padding.

    The standard has no convolution, so the shifted windows are stacked and contracted with the flat kernel.
    """
    out_channels, in_channels, tall, wide = kernel.shape
    height, width = images.shape[1] - tall + 1, images.shape[2] - wide + 1
    shifts = [(u, v) for u in range(tall) for v in range(wide)]
    windows = xp.stack([images[:, u : u + height, v : v + width, :] for u, v in shifts], axis=-1)
    flat = xp.reshape(kernel, (out_channels, in_channels, tall * wide))
    return xp.tensordot(windows, flat, axes=((3, 4), (1, 2)))


def _conv_logits(xp: Any, params: Arrays, images: Array) -> Array:
    """z = pool(h_2) W + b, where h_l = tanh(h_{l-1} * K_l + b_l), h_0 = x, and pool takes 2 x 2 means."""
    hidden = xp.reshape(images, (-1, SIDE, SIDE, 1))
    for layer in (1, 2):
        hidden = xp.tanh(_convolve(xp, hidden, params[f"kernel{layer}"]) + params[f"bias{layer}"])
    count, height, width, channels = hidden.shape
    blocks = xp.reshape(hidden, (count, height // 2, 2, width // 2, 2, channels))
    features = xp.reshape(xp.mean(blocks, axis=(2, 4)), (count, -1))
    return features @ params["weight"] + params["bias"]


def _classifier(logits: Callable[[Any, Arrays, Array], Array], **fields: Any) -> Problem:
    """A classifier of the digits; unless fields say otherwise, f(p) = cross entropy of its logits."""

    def loss(params: Arrays, batch: Arrays) -> Array:
        xp = _namespace(params, batch)
        return _cross_entropy(xp, logits(xp, params, batch["images"]), batch["labels"])

    def evaluate(params: Arrays) -> float:
        images, labels = _digits()
        params = {name: np.asarray(p, dtype=np.float64) for name, p in params.items()}
        guesses = logits(namespace(images), params, images[TRAIN:])
        return float(np.mean(np.argmax(guesses, axis=1) == np.argmax(labels[TRAIN:], axis=1)))

    return Problem(**{"batch": _digits_batch, "loss": loss, "evaluate": evaluate} | fields)


# The catalogue ----------------------------------------------------------------------------------------------

PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (
        Problem(
            name="rosenbrock",
            summary="Five curved valleys in one vector of ten numbers, without data.",
            init=_rosenbrock_init,
            batch=lambda seed, step: {},
            loss=_rosenbrock_loss,
            lr=0.01,
            chaotic=True,
        ),
        Problem(
            name="least-squares",
            summary="A full-batch affine regression with a matrix, a vector and a scalar to fit.",
            init=_least_squares_init,
            batch=_least_squares_batch,
            loss=_least_squares_loss,
            lr=0.02,
            chaotic=False,
        ),
        _classifier(
            name="softmax-digits",
            summary="Softmax regression on the digits, strongly convex by its ridge.",
            init=_softmax_init,
            batch=_softmax_batch,
            logits=_softmax_logits,
            loss=_softmax_loss,
            lr=0.01,
            chaotic=False,
        ),
        _classifier(
            name="mlp-digits",
            summary="A tanh perceptron on the digits with three hidden layers of 32.",
            init=_mlp_init,
            logits=_mlp_logits,
            lr=0.005,
            chaotic=True,
        ),
        _classifier(
            name="conv-digits",
            summary="Two 3 x 3 convolutions, mean pooling and a linear layer on the digits.",
            init=_conv_init,
            logits=_conv_logits,
            lr=0.01,
            chaotic=True,
        ),
        _classifier(
            name="stacked-digits",
            summary="Four residual layers on the digits, stacked in one tensor and preconditioned one by one.",
            init=_deep_init,
            logits=_deep_logits,
            lr=0.005,
            chaotic=True,
            scanned=frozenset(["hidden", "shift", "gain"]),
        ),
        _classifier(
            name="tensor-digits",
            summary="The same layers, their stack preconditioned as one tensor of three axes.",
            init=_deep_init,
            logits=_deep_logits,
            lr=0.005,
            chaotic=True,
        ),
    )
}
