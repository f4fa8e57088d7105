"""Hessian-vector products: right, by either way, and what the optimizers do with those they make or are given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from psgd_torch_backend import (
    PSGD,
    Affine,
    DenseNewton,
    KronNewton,
    KronWhiten,
    LRANewton,
    LRAWhiten,
    Procrustes,
    XMat,
    hessian,
    hessian_helper,
)
from psgd_torch_backend._testing import assert_untouched, equal, give_gradients, normal, parameters, run

PRODUCTS = {"exact": hessian.exact, "differences": hessian.by_differences}
NEWTON = {made.__name__: made for made in (KronNewton, LRANewton, DenseNewton)}


@pytest.fixture(params=PRODUCTS.values(), ids=PRODUCTS)
def products(request: pytest.FixtureRequest) -> Callable:
    return request.param


@pytest.fixture(params=NEWTON.values(), ids=NEWTON)
def newton_class(request: pytest.FixtureRequest) -> type[PSGD]:
    return request.param


def net(dtype: torch.dtype = torch.float64) -> tuple[list[nn.Parameter], Callable[..., Tensor]]:
    """The parameters of a small net and its loss at them."""
    x, y = normal(20, 3, seed=7, dtype=dtype), normal(20, seed=8, dtype=dtype)

    def loss(w: Tensor, b: Tensor, out: Tensor) -> Tensor:
        return ((torch.tanh(x @ w + b) @ out - y) ** 2).mean()

    return parameters((3, 4), (4,), (4,), dtype=dtype), loss


def drawn(params: list[nn.Parameter]) -> list[Tensor]:
    return [normal(*p.shape, seed=50 + i, dtype=p.dtype) for i, p in enumerate(params)]


def refused(optimizer: PSGD, params: list[nn.Parameter], error: type[Exception], text: str, *args, **options) -> None:
    """A step that fails, in one line, with everything as it was."""
    before = copy.deepcopy((params, optimizer.state_dict()))
    with pytest.raises(error, match=text) as caught:
        optimizer.step(*args, **options)
    assert "\n" not in str(caught.value)
    assert_untouched(optimizer, params, before)


# ---- products -------------------------------------------------------------------------------
def test_products_are_those_of_torch(products: Callable):
    params, loss = net()
    vectors = drawn(params)
    returned, grads, hvp = products(lambda: loss(*params), params, vectors)
    value, wanted = torch.autograd.functional.hvp(loss, tuple(params), tuple(vectors))
    assert torch.equal(returned, value) and returned.grad_fn is None  # no graph is kept
    assert equal(grads, torch.autograd.grad(loss(*params), params))
    near = 1e-12 if products is hessian.exact else 1e-6
    for h, w in zip(hvp, wanted, strict=True):
        assert (h - w).abs().max() < near * w.abs().max() and not h.requires_grad
    assert all(p.grad is None and p.requires_grad for p in params)


def test_differences_put_parameters_back_bit_for_bit():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        params, loss = net(dtype)
        seen = []

        def closure(params=params, loss=loss, seen=seen) -> Tensor:
            seen.append([p.detach().clone() for p in params])
            return loss(*params)

        hessian.by_differences(closure, params, drawn(params))
        assert len(seen) == 2 and equal(params, seen[0]) and not equal(params, seen[1])


def test_a_linear_loss_and_an_unused_parameter_have_products_of_zero(products: Callable):
    a, b, idle = parameters((3,), (2, 2), (2,), dtype=torch.float64)
    vectors = drawn([a, b, idle])
    for loss in (lambda: 2 * a.sum(), lambda: 2 * a.sum() + (b**2).sum()):
        _, (da, db, none), hvp = products(loss, [a, b, idle], vectors)
        assert torch.equal(da, torch.full_like(a, 2)) and none is None and not da.requires_grad
        assert not hvp[0].any() and not hvp[2].any()
        assert not hvp[1].any() if db is None else torch.allclose(hvp[1], 2 * vectors[1], rtol=1e-6)


def test_products_of_complex_parameters():
    """Against central differences of the loss along a line, as the gradient of a real function of real parts."""
    (p,) = parameters((4, 3), dtype=torch.complex128)
    c, v = normal(4, 3, seed=5, dtype=torch.complex128), normal(4, 3, seed=6, dtype=torch.complex128)

    def loss() -> Tensor:
        return ((p * c).abs() ** 4).sum() + (p**3).real.sum()

    _, _, (h,) = hessian.exact(loss, [p], [v])
    ends = []
    for delta in (1e-5, -2e-5):
        p.data += delta * v
        ends.append(hessian.gradients(loss, [p])[1][0])
    assert torch.allclose(h, (ends[0] - ends[1]) / 2e-5, rtol=1e-8, atol=1e-8 * h.abs().max())


def test_vectors_are_functions_of_step_and_name():
    like = torch.zeros(40, 25)
    v = hessian.vector(3, "a", like)
    assert torch.equal(v, hessian.vector(3, "a", torch.ones(40, 25)))
    for other in (hessian.vector(3, "b", like), hessian.vector(4, "a", like)):
        assert abs((v * other).mean()) < 0.1
    assert abs(v.mean()) < 0.1 and abs(v.std() - 1) < 0.1
    assert hessian.vector(3, "a", torch.zeros(2, dtype=torch.complex64)).imag.all()


# ---- closures -------------------------------------------------------------------------------
@pytest.mark.parametrize("exact", [True, False])
def test_newton_descends(newton_class: type[PSGD], exact: bool):
    params, loss = net()
    optimizer = newton_class(params, lr=0.1, exact_hessian_vector_product=exact, grad_clip_max_norm=1.0)
    losses = [optimizer.step(lambda: loss(*params)).item() for _ in range(60)]
    assert losses[-1] < 0.6 * losses[0]


def test_complex_newton_descends():
    (p,) = parameters((4, 3), dtype=torch.complex64)
    c, optimizer = 1 + normal(4, 3, seed=5).abs(), KronNewton([p], lr=0.1)
    losses = [optimizer.step(lambda: (c * (p - 1j).abs() ** 2).sum()).item() for _ in range(100)]
    assert losses[-1] < 1e-2 * losses[0]


@pytest.mark.contract("torch: closure")
def test_the_closure_of_newton_is_called_as_often_as_said():
    """Once, or twice where the step fits by differences; with gradients on; what it returns first comes back."""
    for exact, probability, wanted in ((True, 1.0, [1, 1, 1]), (False, 1.0, [2, 2, 2]), (False, 1e-9, [2, 1, 1])):
        (p,) = parameters((3,))
        options = {"exact_hessian_vector_product": exact, "preconditioner_update_probability": probability}
        optimizer, calls = KronNewton([p], **options), []

        def closure(p=p, calls=calls) -> tuple[Tensor, str]:
            assert torch.is_grad_enabled()
            calls.append((p**2).sum())
            return calls[-1], f"aux {len(calls)}"

        counts = []
        for _ in range(3):
            calls.clear()
            loss, aux = optimizer.step(closure)
            assert torch.equal(loss, calls[0]) and aux == "aux 1"
            counts.append(len(calls))
        assert counts == wanted


def test_auxiliary_output_changes_nothing(newton_class: type[PSGD]):
    bare, more = parameters((4, 3)), parameters((4, 3))
    ours, theirs = newton_class(bare), newton_class(more)
    for _ in range(3):
        ours.step(lambda: (bare[0] ** 4).sum())
        theirs.step(lambda: [(more[0] ** 4).sum(), object()])
    assert equal(bare, more) and not equal(bare, parameters((4, 3)))


NOT_LOSSES = {
    "nothing": lambda p: None,
    "float": lambda p: (p**2).sum().item(),
    "detached": lambda p: (p.detach() ** 2).sum(),
    "loss last": lambda p: (1.0, (p**2).sum()),
    "empty": lambda p: (),
}


@pytest.mark.contract("torch: closure")
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("returned", NOT_LOSSES)
def test_a_closure_without_a_loss_is_refused(returned: str, exact: bool):
    params = parameters((4, 3))
    optimizer = KronNewton(params, exact_hessian_vector_product=exact)
    run(optimizer, params, range(2))
    refused(optimizer, params, RuntimeError, "must return the loss", lambda: NOT_LOSSES[returned](params[0]))


@pytest.mark.contract("torch: closure")
@pytest.mark.parametrize("exact", [True, False])
def test_a_closure_that_calls_backward_is_refused(exact: bool):
    params = parameters((4, 3))
    optimizer = KronNewton(params, exact_hessian_vector_product=exact)

    def closure() -> Tensor:
        loss = (params[0] ** 4).sum()
        loss.backward()
        return loss

    refused(optimizer, params, RuntimeError, r"leave backward\(\) to the optimizer", closure)


@pytest.mark.contract("torch: closure")
def test_a_closure_that_fails_at_either_call_changes_nothing(newton_class: type[PSGD]):
    params = parameters((4, 3), (5,))
    optimizer = newton_class(params, exact_hessian_vector_product=False)
    run(optimizer, params, range(2))
    for good in (0, 1):
        calls = []

        def closure(good=good, calls=calls) -> Tensor:
            calls.append(1)
            if len(calls) > good:
                raise ArithmeticError("no loss")
            return sum((p**2).sum() for p in params)

        refused(optimizer, params, ArithmeticError, "no loss", closure)
        assert len(calls) == good + 1


def test_newton_asks_for_a_closure(newton_class: type[PSGD]):
    params = parameters((4, 3))
    optimizer = newton_class(params)
    give_gradients(params, 1)
    refused(optimizer, params, RuntimeError, r"call step\(closure\)")


@pytest.mark.contract("step: no gradients")
def test_newton_lets_be_what_the_loss_does_not_use():
    used, idle = parameters((4, 3), (4, 3))
    optimizer = KronNewton([used, idle], weight_decay=0.1)
    for _ in range(2):
        optimizer.step(lambda: (used**2).sum())
    assert idle.grad is None and not optimizer.state.get(idle) and equal([idle], parameters((4, 3), (4, 3))[1:])


@pytest.mark.contract("torch: late parameters")
def test_a_parameter_may_be_frozen_between_steps(newton_class: type[PSGD]):
    params = parameters((4, 3), (4, 3))
    optimizer = newton_class(params)
    run(optimizer, params, range(2))
    params[1].requires_grad_(False)
    before = params[1].detach().clone()
    optimizer.step(lambda: (params[0] ** 2).sum())
    assert torch.equal(params[1], before)


# ---- given products -------------------------------------------------------------------------
def test_what_the_closure_does_can_be_given(newton_class: type[PSGD]):
    """Pairs in the order of the parameters, or by name."""
    options = {"lr": 0.01, "preconditioner_init_scale": 1.0}
    inside, listed, by_name = (parameters((4, 3), (5,), dtype=torch.float64) for _ in range(3))
    optimizers = [newton_class(list(zip("ab", params, strict=True)), **options) for params in (inside, listed, by_name)]
    c = normal(5, seed=9, dtype=torch.float64)

    def loss(p: Tensor, q: Tensor) -> Tensor:
        return (p**4).sum() + (q**2 * c).sum() + p.sum() * q.sum()

    for _ in range(3):
        plans = [optimizers[0]._job(group).plan() for group in optimizers[0].param_groups]
        vectors = optimizers[0]._vectors(list(zip("ab", inside, strict=True)), plans)
        for optimizer, params in zip(optimizers[1:], (listed, by_name), strict=True):
            _, grads, hvp = hessian.exact(lambda params=params: loss(*params), params, vectors)
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            given = {"Hvp": hvp, "vector": vectors}
            if params is by_name:
                given = {k: {"b": x[1], "a": x[0]} for k, x in given.items()}
            optimizer.step(**given, update_preconditioner=True)
        optimizers[0].step(lambda: loss(*inside))
    assert equal(inside, listed) and equal(inside, by_name)


X = torch.ones(4, 3)
BAD_PAIRS = [
    ({"Hvp": [X]}, "vector is missing"),
    ({"Hvp": [X], "vector": [X]}, "update_preconditioner is missing"),
    ({"update_preconditioner": False}, "Hvp is missing"),
    ({"Hvp": [X.T], "vector": [X], "update_preconditioner": True}, "Hvp must hold one tensor of the shape"),
    ({"Hvp": [X], "vector": [X, X], "update_preconditioner": True}, "vector must hold one tensor of the shape"),
    ({"Hvp": [], "vector": [X], "update_preconditioner": True}, "Hvp must hold one tensor of the shape"),
]


@pytest.mark.contract("step: mismatches")
@pytest.mark.parametrize(("given", "text"), BAD_PAIRS)
@pytest.mark.parametrize("made", [KronNewton, KronWhiten, LRAWhiten, XMat])
def test_wrong_pairs_are_refused(made: type[PSGD], given: dict[str, Any], text: str):
    params = parameters((4, 3))
    optimizer = made(params)
    run(optimizer, params, range(2))
    give_gradients(params, 2)
    refused(optimizer, params, ValueError, f"{made.__name__}: {text}", **given)


@pytest.mark.parametrize("made", [KronNewton, LRANewton, DenseNewton, Affine, XMat, KronWhiten, LRAWhiten, Procrustes])
def test_the_automatic_scale_is_given_once(made: type[PSGD]):
    """A method that counts the steps since a fit waits for the first pair, and P starts near |v| / |H v|; others take
    the scale of what there is at the first step. No later fit scales P again.
    """
    small = {"lr_preconditioner": 1e-9, "precond_lr": 1e-9, "preconditioner_lr": 1e-9, "momentum": 0.0, "b1": 0.0}
    options = {f.name: small[f.name] for f in fields(made.method) if f.name in small}
    params, v = parameters((4, 3), dtype=torch.float64), normal(4, 3, seed=3, dtype=torch.float64)
    optimizer, (p,) = made(params, lr=0.0, **options), params

    def size(update: bool, hessian: float) -> float:
        p.grad = v.clone()
        optimizer.step(Hvp=[hessian * v], vector=[v], update_preconditioner=update)
        return (sum((q**2).sum() for q in optimizer.state[p]["Q"].values()) ** 0.5).item()

    first, second = size(False, 1.0), size(False, 1.0)
    assert first == second
    fitted, waits = size(True, 1e-4), "since" in optimizer.state[p]
    # the square root of 1e4, in all factors together; U and V of a low rank keep theirs
    assert fitted > 2 * second if waits else fitted < 1.5 * second
    later = pytest.approx(fitted, rel=1e-6 if waits else 0.5)  # Procrustes has no rate that could be made small
    assert size(True, 1e-2) == later and size(False, 1.0) == later


def test_whitening_fits_where_it_is_told():
    """The pair goes into the factors, when it says so, and not the gradient."""
    (p,) = parameters((4, 3))
    optimizer = XMat([p], precond_init_scale=1.0)
    found = []
    for update in (False, True, False):
        give_gradients([p], 1)
        optimizer.step(Hvp=[X], vector=[X], update_preconditioner=update)
        found.append([q.clone() for q in optimizer.state[p]["Q"].values()])
    assert not found[0][1].any() and (found[0][0] == 1).all()
    assert equal(found[1], found[2])
    assert equal(found[0], found[1])  # P H v = v already
    give_gradients([p], 1)
    optimizer.step(Hvp=[2 * X], vector=[X], update_preconditioner=True)
    assert not equal(list(optimizer.state[p]["Q"].values()), found[2])


# ---- hessian_helper -------------------------------------------------------------------------
STRUCTURES = {
    "tensor": (lambda a, b: torch.cat([a, b]), lambda t: (t[:2], t[2:])),
    "list": (lambda a, b: [a, b], lambda t: t),
    "tuple": (lambda a, b: (a, b), lambda t: t),
    "dict": (lambda a, b: {"a": a, "b": b}, lambda t: t.values()),
    "nested": (lambda a, b: {"a": [a], "b": {"c": b}}, lambda t: (t["a"][0], t["b"]["c"])),
}


@pytest.mark.parametrize(("pack", "unpack"), STRUCTURES.values(), ids=STRUCTURES)
@pytest.mark.parametrize("has_aux", [False, True])
def test_helper_takes_every_structure(pack: Callable, unpack: Callable, has_aux: bool):
    a, b = normal(2, dtype=torch.float64), normal(3, seed=1, dtype=torch.float64)
    params = pack(a, b)

    def loss_fn(tree: Any, scale: float) -> Any:
        a, b = unpack(tree)
        loss = scale * (a**3).sum() + (b**2).sum()
        return (loss, "aux") if has_aux else loss

    out, grads, hvp, v, update = hessian_helper(5, loss_fn, params, (2.0,), has_aux)
    loss = out[0] if has_aux else out
    assert update is True and not loss.requires_grad and (not has_aux or out[1] == "aux")
    assert loss == 2 * (a**3).sum() + (b**2).sum()
    assert type(grads) is type(hvp) is type(v) is type(params)
    (da, db), (ha, hb), (va, vb) = (tuple(unpack(t)) for t in (grads, hvp, v))
    assert torch.allclose(da, 6 * a**2) and torch.allclose(db, 2 * b)
    assert torch.allclose(ha, 12 * a * va) and torch.allclose(hb, 2 * vb) and va.all() and vb.all()


def test_helper_tosses_a_coin():
    p = normal(4)

    def updates(probability: float, step: int | None = None) -> list[bool]:
        found = []
        for key in range(200):
            loss, g, hvp, v, update = hessian_helper(
                key, lambda p: (p**2).sum(), p, preconditioner_update_probability=probability, train_step=step
            )
            assert torch.equal(loss, (p**2).sum()) and torch.equal(g, 2 * p)
            assert bool(v.any()) == update and torch.equal(hvp, 2 * v)
            found.append(update)
        return found

    assert all(updates(1.0)) and not any(updates(0.0)) and not any(updates(0.0, 2))
    assert all(updates(0.0, 0)) and all(updates(0.0, 1))
    half = updates(0.5)
    assert 70 < sum(half) < 130 and half == updates(0.5)


def test_helper_draws_by_key():
    p = normal(50)
    one, same, other, high = (hessian_helper(k, lambda p: (p**2).sum(), p)[3] for k in (1, 1, 2, 1 + 2**32))
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one, high)


def test_helper_leaves_parameters_alone():
    a, b = parameters((3,), (2,))
    b.requires_grad_(False)
    _, (_, db), _, _, _ = hessian_helper(1, lambda t: (t[0] ** 2).sum(), [a, b])
    assert not db.any() and a.grad is None and a.requires_grad and not b.requires_grad
    assert equal([a, b], parameters((3,), (2,)))


# ---- the programs of psgd_jax's README --------------------------------------------------------
def test_readme_whitening():
    p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer, losses = XMat([p], lr=1.0, b1=0.0), []
    for _ in range(14):
        optimizer.zero_grad()
        (p**2).sum().backward()
        optimizer.step()
        losses.append((p.detach() ** 2).sum().item())
    assert min(losses) < 1e-4


def test_readme_newton():
    p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer, losses = XMat([p], lr=1.0, b1=0.0), []
    for t in range(2):
        loss, p.grad, hvp, vector, update = hessian_helper(t, lambda p: (p**2).sum(), p, train_step=t)
        optimizer.step(Hvp=hvp, vector=vector, update_preconditioner=update)
        losses.append(loss.item())
    assert losses[0] == 14.0 and losses[1] < 1e-12


# ---- random numbers, and what can be differentiated once --------------------------------------
def dropping() -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """The parameters of a small net with dropout, and its loss."""
    params, _ = net()
    x, y = normal(20, 3, seed=7, dtype=torch.float64), normal(20, seed=8, dtype=torch.float64)
    w, b, out = params

    def loss() -> Tensor:
        return ((nn.functional.dropout(torch.tanh(x @ w + b), 0.5) @ out - y) ** 2).mean()

    return params, loss


def test_both_calls_see_the_same_random_numbers_and_use_up_those_of_one():
    params, loss = dropping()
    vectors = drawn(params)
    results, ends = [], []
    for way in (hessian.gradients, hessian.exact, hessian.by_differences):
        torch.manual_seed(3)
        results.append(way(loss, params, *([] if way is hessian.gradients else [vectors])))
        ends.append(torch.get_rng_state())
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    for exact, near in zip(results[1][2], results[2][2], strict=True):
        assert torch.allclose(exact, near, rtol=1e-5, atol=1e-6)


def test_differences_train_under_dropout_as_exact_products_do(newton_class: type[PSGD]):
    losses = []
    for exact in (True, False):
        torch.manual_seed(0)
        params, loss = dropping()
        optimizer = newton_class(params, lr=0.05, exact_hessian_vector_product=exact, grad_clip_max_norm=1.0)
        losses.append(torch.stack([optimizer.step(loss) for _ in range(30)]))
    assert torch.allclose(*losses, rtol=1e-3)


def test_generators_are_put_back_where_the_second_call_fails():
    params, loss = dropping()
    calls = []

    def closure() -> Tensor:
        calls.append(loss())
        if len(calls) == 2:
            raise ArithmeticError("no loss")
        return calls[-1]

    torch.manual_seed(3)
    loss()
    after_one = torch.get_rng_state()
    torch.manual_seed(3)
    with pytest.raises(ArithmeticError):
        hessian.by_differences(closure, params, drawn(params))
    assert torch.equal(torch.get_rng_state(), after_one)


def test_generators_of_other_devices_are_put_back(monkeypatch: pytest.MonkeyPatch):
    """Told by a module in place of that of the accelerator, which may not be there."""
    device, states = torch.device("cuda:1"), {}
    module = SimpleNamespace(get_rng_state=lambda d: ("state of", d), set_rng_state=lambda s, d: states.update({d: s}))
    monkeypatch.setattr(torch, "get_device_module", lambda d: module)
    hessian._generators([SimpleNamespace(device=device), *parameters((3,))])()
    assert states == {device: ("state of", device)}


@pytest.mark.parametrize("way", ["step", "helper"])
def test_attention_that_is_differentiated_once_is_told_from_a_bug(way: str):
    (p,) = parameters((1, 2, 4, 8))

    def loss(p: Tensor = p) -> Tensor:
        return nn.functional.scaled_dot_product_attention(p, p, p).square().sum()

    with pytest.raises(RuntimeError, match=r"exact_hessian_vector_product=False.*SDPBackend\.MATH") as caught:
        KronNewton([p]).step(loss) if way == "step" else hessian_helper(0, loss, p)
    assert "is not implemented" in str(caught.value.__cause__)
    KronNewton([p], exact_hessian_vector_product=False).step(loss)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        KronNewton([p]).step(loss)
