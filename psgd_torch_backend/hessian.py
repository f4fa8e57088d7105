"""Gradients and Hessian-vector products in PyTorch: by differentiating twice, or by differences of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from psgd import noise
from psgd._xp import namespace
from psgd.calls import step_may_come_second
from psgd_torch_backend._noise import CachedDraws

MISUSED = (
    "the closure must return the loss, one number that can still be differentiated, or a sequence that begins with it; "
    "leave backward() to the optimizer (in Lightning: automatic_optimization = False)"
)
# How torch says that it cannot differentiate a derivative.
ONCE = ("is not implemented", "once_differentiable", "double backward")
TWICE = (
    "the exact product with the Hessian differentiates the loss twice, and a part of it can be only once ({}); give "
    "exact_hessian_vector_product=False, or, for scaled_dot_product_attention, compute the loss within "
    "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
)
Closure = Callable[[], Any]  # -> the loss, or a sequence that begins with it
OfParameters = Tensor | Iterable[Tensor] | Mapping[str, Tensor]  # in the order of the parameters, or by their names


class Pairs(NamedTuple):
    """Pairs (v, H v) by the identity of their parameter, and whether this step fits to them."""

    fit: bool
    by_parameter: dict[int, tuple[Tensor, Tensor]]

    @classmethod
    def of_arguments(
        cls,
        owner: str,
        named: Sequence[tuple[str, Tensor]],
        Hvp: OfParameters | None,
        vector: OfParameters | None,
        update_preconditioner: bool | None,
    ) -> Pairs | None:
        """What a step of parameters is called with; None if with nothing."""
        arguments = {"Hvp": Hvp, "vector": vector, "update_preconditioner": update_preconditioner}
        missing = [name for name, x in arguments.items() if x is None]
        if len(missing) == len(arguments):
            return None
        if missing:
            raise ValueError(f"{owner}: {missing[0]} is missing; Hvp, vector and update_preconditioner go together")
        columns = [_for_each(owner, named, name, arguments[name]) for name in ("vector", "Hvp")]
        by_parameter = {id(p): (v, h) for (_, p), v, h in zip(named, *columns, strict=True)}
        return cls(bool(update_preconditioner), by_parameter)


def _for_each(owner: str, named: Sequence[tuple[str, Tensor]], argument: str, x: object) -> list[Tensor]:
    """What an argument holds for each parameter: a tensor of its shape."""
    if isinstance(x, dict):
        tensors: list[Any] = [x.get(name) for name, _ in named]
    else:
        tensors = [x] if isinstance(x, Tensor) or not isinstance(x, Iterable) else list(x)
    shapes = [tuple(y.shape) if isinstance(y, Tensor) else None for y in tensors]
    if shapes != [tuple(p.shape) for _, p in named]:
        raise ValueError(f"{owner}: {argument} must hold one tensor of the shape of each parameter, in their order")
    return tensors


def vector(step_key: int, name: str, like: Tensor) -> Tensor:
    """The vector v of a parameter: standard normal, a function of the step's key and the parameter's name."""
    key = torch.full((1,), step_key, dtype=torch.int32, device=like.device)
    return CachedDraws(key).normal(f"v/{name}", tuple(like.shape), like)


def _loss(closure: Closure) -> tuple[Any, Tensor]:
    """What the closure returns, and the loss in it."""
    returned = closure()
    loss = _first(returned)
    if not (isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1):
        raise RuntimeError(MISUSED)
    return returned, loss


def _freed(returned: Any) -> Any:
    """What a closure returned, its loss without the graph that made it."""
    if isinstance(returned, Tensor):
        return returned.detach()
    return type(returned)([returned[0].detach(), *returned[1:]]) if type(returned) in (list, tuple) else returned


def _derivative(loss: Tensor, params: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(loss, params, allow_unused=True, create_graph=create_graph)
    except RuntimeError as error:
        if "second time" in str(error):
            raise RuntimeError(MISUSED) from error
        raise


def finished(returned: object, params: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
    """What a closure returned, and the parameters that were given their gradients here, since it had left that undone:
    it returned a loss, and none of them has one.
    """
    loss, able = _first(returned), [p for p in params if p.requires_grad]
    undone = isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1
    if not (able and undone) or any(p.grad is not None for p in params):
        return returned, []
    try:
        loss.backward(inputs=able)  # and not `grad`: what waits for gradients, as DistributedDataParallel, sees them
    except RuntimeError as error:
        for p in able:
            p.grad = None
        if "second time" in str(error):  # it was not left undone: the closure has dropped the gradients again
            return returned, []
        raise
    return _freed(returned), able


def gradients(closure: Closure, params: Sequence[Tensor]) -> tuple[Any, list[Tensor | None]]:
    """What the closure returns, and the gradient of each parameter; None of those that the loss does not use."""
    with torch.enable_grad():
        returned, loss = _loss(closure)
        return _freed(returned), list(_derivative(loss, params))


def exact(
    closure: Closure, params: Sequence[Tensor], vectors: Sequence[Tensor]
) -> tuple[Any, list[Tensor | None], list[Tensor]]:
    """What the closure returns, gradients, and H v, the derivative of sum <v, gradient>, by differentiating twice."""
    with torch.enable_grad():
        returned, loss = _loss(closure)
        grads = _derivative(loss, params, create_graph=True)
        pairs = [(g, v) for g, v in zip(grads, vectors, strict=True) if g is not None and g.requires_grad]
        if not pairs:  # a linear loss
            return (
                _freed(returned),
                [None if g is None else g.detach() for g in grads],
                [torch.zeros_like(p) for p in params],
            )
        outputs, weights = zip(*pairs, strict=True)
        try:
            products = torch.autograd.grad(outputs, params, weights, allow_unused=True, materialize_grads=True)
        except RuntimeError as error:
            if any(words in str(error) for words in ONCE):
                raise RuntimeError(TWICE.format(str(error).partition("\n")[0])) from error
            raise
    return _freed(returned), [None if g is None else g.detach() for g in grads], [h.detach() for h in products]


def _generators(params: Sequence[Tensor]) -> Callable[[], None]:
    """What sets torch's own generators, of the CPU and of all devices of the parameters, to where they are now."""
    host, devices = torch.get_rng_state(), {p.device for p in params if p.device.type not in ("cpu", "meta")}
    others = [(module, module.get_rng_state(d), d) for d in devices for module in [torch.get_device_module(d)]]

    def put_back() -> None:
        torch.set_rng_state(host)
        for module, state, device in others:
            module.set_rng_state(state, device)

    return put_back


def by_differences(
    closure: Closure, params: Sequence[Tensor], vectors: Sequence[Tensor]
) -> tuple[Any, list[Tensor | None], list[Tensor]]:
    """The same by (g(p + delta v) - g(p)) / delta, delta the square root of the dtype's epsilon.

    The closure is called twice, with the same random numbers of torch, of which one call is used up. Beside them it
    must be the same function both times. Parameters come back bit for bit, also when it raises at the second call.
    """
    delta = sqrt(max(torch.finfo(p.dtype).eps for p in params))
    start = _generators(params)
    returned, grads = gradients(closure, params)
    end, kept = _generators(params), [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for p, v in zip(params, vectors, strict=True):
                p.add_(v, alpha=delta)
        start()
        _, moved = gradients(closure, params)
    finally:
        end()
        with torch.no_grad():
            for p, was in zip(params, kept, strict=True):
                p.copy_(was)
    products = [
        torch.zeros_like(p) if a is None or b is None else (b - a) / delta
        for p, a, b in zip(params, grads, moved, strict=True)
    ]
    return returned, grads, products


def differentiated(
    closure: Closure, params: Sequence[Tensor], vectors: Sequence[Tensor] | None, *, exactly: bool
) -> tuple[Any, Pairs]:
    """What the closure returns, and the pairs to fit to, where there are vectors; gradients are left in `p.grad`."""
    if vectors is None:
        returned, grads = gradients(closure, params)
        pairs = Pairs(False, {})
    else:
        returned, grads, products = (exact if exactly else by_differences)(closure, params, vectors)
        pairs = Pairs(True, {id(p): (v, h) for p, v, h in zip(params, vectors, products, strict=True)})
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return returned, pairs


@step_may_come_second
def hessian_helper(
    key: int,
    loss_fn: Callable[..., Any],
    params: Any,
    loss_fn_extra_args: Sequence[Any] = (),
    has_aux: bool = False,
    preconditioner_update_probability: float = 1.0,
    *,
    train_step: int | None = None,
) -> tuple[Any, Any, Any, Any, bool]:
    """Loss, gradient and, where a coin says so, the product H v of the Hessian with a random vector.

    Also takes the order of psgd_jax 0.2.9, `(key, train_step, loss_fn, params, ...)`: a second argument that is not
    callable is the step.

    Args:
        key: a whole number, other for each step. The coin and the vector depend on it, and the vector of a parameter on
            its name: with the same key (`jax.random.PRNGKey(key)`) and name it is the same in JAX.
        loss_fn: (params, *loss_fn_extra_args) -> loss, or (loss, aux) with `has_aux`.
        params: a tensor, or a list, tuple or dictionary of tensors; nested ones too.
        loss_fn_extra_args: what `loss_fn` takes beside the parameters, as a batch.
        has_aux: `loss_fn` returns an auxiliary output beside the loss.
        preconditioner_update_probability: of an update; 1 always does.
        train_step: number of this step, from 0; the first two then always update. None: the coin alone decides.

    Returns:
        what `loss_fn` returns, detached; the gradient, H v and v, in the structure of `params`, the last two zero at
        steps without an update; whether this step updates. The last three are what
        `step(Hvp=, vector=, update_preconditioner=)` takes once the gradient is in the parameters' `grad`.

    Raises:
        TypeError: a step that is no whole number, or a loss that is no function.
        RuntimeError: a loss that cannot be differentiated.

    Equation: H v = d<v, grad> / dp, by differentiating twice.

    Source: psgd_jax `hessian_helper`.

    Example:
        >>> import torch
        >>> from psgd_torch_backend import hessian_helper
        >>> loss, grad, hvp, v, update = hessian_helper(0, lambda p: (p**2).sum(), torch.ones(3))
        >>> torch.allclose(hvp, 2 * v), update
        (True, True)
    """
    named = _named(params)
    leaves = [p.detach().requires_grad_() for _, p in named]
    words = noise.signed(key >> 32), noise.signed(key)
    step_key = int(noise.key(namespace(leaves[0]), *words)[0])
    coin = float(noise.uniform(torch.tensor([step_key], dtype=torch.int32), "fit"))
    early = train_step is not None and int(train_step) < 2
    update = preconditioner_update_probability >= 1 or coin < preconditioner_update_probability or early

    def closure() -> Any:
        return loss_fn(_rebuilt(params, iter(leaves)), *loss_fn_extra_args)

    if update:
        v = [vector(step_key, name, p) for name, p in named]
        out, grads, hvp = exact(closure, leaves, v)
    else:
        out, grads = gradients(closure, leaves)
        v, hvp = [torch.zeros_like(p) for p in leaves], [torch.zeros_like(p) for p in leaves]
    used = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)]
    out = out if has_aux else _first(out)
    loss = (out[0].detach(), *out[1:]) if has_aux else out.detach()
    return loss, *(_rebuilt(params, iter(xs)) for xs in (used, hvp, v)), update


def _first(out: object) -> Any:
    return out[0] if isinstance(out, (tuple, list)) and out else out


def _named(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, Tensor]]:
    """The tensors of nested containers with their names: the path, joined by dots; "0" for a single tensor."""
    if isinstance(tree, Tensor):
        return [(".".join(path) or "0", tree)]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return [leaf for key, x in items for leaf in _named(x, (*path, str(key)))]


def _rebuilt(tree: Any, tensors: Iterator[object]) -> Any:
    """Containers as those of `tree`, with other tensors."""
    if isinstance(tree, Tensor):
        return next(tensors)
    if isinstance(tree, dict):
        return {key: _rebuilt(x, tensors) for key, x in tree.items()}
    return type(tree)(_rebuilt(x, tensors) for x in tree)
