"""What drives a torch optimizer, from its package: schedulers, scalers, hooks; Lightning, transformers, accelerate."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import lr_scheduler as S
from torch.optim import swa_utils as swa
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from psgd_torch_backend import PSGD, Kron, KronNewton, KronWhiten, LRAWhiten, Procrustes
from psgd_torch_backend._groups import known
from psgd_torch_backend._testing import (
    CLASSES,
    Bars,
    assert_untouched,
    descend,
    equal,
    flat_all,
    newton,
    normal,
    parameters,
    run,
    step,
)

SHAPES = ((4, 3), (4, 3), (5,), ())
WHITENING = [Procrustes, KronWhiten, Kron, LRAWhiten]
EACH_KIND = [*WHITENING, KronNewton]


def over(classes: Sequence[type[PSGD]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("optimizer_class", classes, ids=lambda c: c.__name__)


def saved_and_loaded(thing: Any) -> Any:
    """What comes back of plain data from a file, and of nothing else."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def rate_of(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


# ---- schedulers -----------------------------------------------------------------------------
ATTACH: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: S.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: S.StepLR(o, 2),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: S.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: S.LinearLR(o),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: S.PolynomialLR(o, power=2.0),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, T_0=3),
    "CyclicLR": lambda o: S.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CyclicLR, rate only": lambda o: S.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.1, total_steps=10),
    "OneCycleLR, rate only": lambda o: S.OneCycleLR(o, 0.1, total_steps=10, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: S.SequentialLR(o, [S.LinearLR(o, total_iters=2), S.ExponentialLR(o, 0.5)], [3]),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.LinearLR(o), S.ExponentialLR(o, 0.9)]),
    "SWALR": lambda o: swa.SWALR(o, swa_lr=0.01, anneal_epochs=4),
}
CYCLING = ["CyclicLR", "OneCycleLR"]  # of momentum too, unless told


def driven(classes: Sequence[type[PSGD]]) -> pytest.MarkDecorator:
    """Methods with all schedulers."""
    cases = [pytest.param(c, attach, id=f"{c.__name__}-{name}") for c in classes for name, attach in ATTACH.items()]
    return pytest.mark.parametrize(("optimizer_class", "attach"), cases)


def advance(scheduler: Any) -> None:
    scheduler.step(*([1.0] if isinstance(scheduler, S.ReduceLROnPlateau) else []))


def step_from_zero(optimizer: PSGD, params: list[nn.Parameter], t: int) -> list[Tensor]:
    """Where a step with the t-th gradients leads from zero: the learning rate times what does not depend on it."""
    for i, p in enumerate(params):
        p.data.zero_()
        p.grad = normal(*p.shape, seed=10 * t + i, dtype=p.dtype)
    step(optimizer)
    return [p.detach().clone() for p in params]


@pytest.mark.contract("torch: schedulers")
def test_no_scheduler_of_torch_is_left_out():
    public = {c for m in (S, swa) for n, c in vars(m).items() if not n.startswith("_") and isinstance(c, type)}
    known = {c.__name__ for c in public if issubclass(c, S.LRScheduler)} - {"LRScheduler"}
    assert known == {name.partition(",")[0] for name in ATTACH}


@pytest.mark.contract("torch: schedulers")
@pytest.mark.contract("torch: tensor lr")
@pytest.mark.parametrize("number", [float, torch.tensor], ids=["float", "tensor"])
@driven(EACH_KIND)
def test_steps_follow_a_scheduler(optimizer_class: type[PSGD], attach: Callable, number: Callable):
    """Rates and momenta are those of torch's SGD; a step is, to the bit, the rate times one at a rate of 1."""
    params, unit, plain = (parameters(*SHAPES, dtype=torch.float64) for _ in range(3))
    optimizer, twin = optimizer_class(params, lr=number(0.05)), optimizer_class(unit, lr=1.0)
    reference = torch.optim.SGD(plain, lr=0.05, momentum=optimizer.defaults.get("momentum", 0.0))
    scheduler, theirs, rates = attach(optimizer), attach(reference), []
    for t in range(8):
        group, same = optimizer.param_groups[0], reference.param_groups[0]
        assert rate_of(optimizer) == pytest.approx(same["lr"], rel=1e-6)  # tensors of float32 are rates too
        if "momentum" in group:
            assert group["momentum"] == same["momentum"]
            twin.param_groups[0]["momentum"] = group["momentum"]
        rates.append((rate_of(optimizer), group.get("momentum")))
        moved, wanted = (step_from_zero(o, ps, t) for o, ps in ((optimizer, params), (twin, unit)))
        assert equal(moved, [rates[-1][0] * x for x in wanted]) and all(x.abs().min() > 0 for x in wanted)
        reference.step()
        advance(scheduler)
        advance(theirs)
    assert len({rate for rate, _ in rates}) > 1
    assert len({m for _, m in rates}) > 1 or not getattr(scheduler, "cycle_momentum", False)


@pytest.mark.contract("torch: schedulers")
@over(CLASSES.values())
def test_every_method_takes_every_scheduler(optimizer_class: type[PSGD]):
    """With the defaults of both; where the momentum is cycled, the group has that of the scheduler."""
    for name, attach in ATTACH.items():
        params = parameters((4, 3), (5,))
        optimizer = optimizer_class(params)
        before, scheduler = optimizer.param_groups[0]["momentum"], attach(optimizer)
        for t in range(2):
            step_from_zero(optimizer, params, t)
            advance(scheduler)
        assert (optimizer.param_groups[0]["momentum"] != before) == (name in CYCLING), name
        assert all(p.isfinite().all() and p.abs().max() > 0 for p in params), name


@pytest.mark.contract("torch: schedulers")
@driven([Procrustes, Kron])
def test_a_scheduled_run_resumes_bit_for_bit(optimizer_class: type[PSGD], attach: Callable):
    params = parameters(*SHAPES)
    optimizer = optimizer_class(params, lr=0.05)
    scheduler = attach(optimizer)

    def go(optimizer: PSGD, scheduler: Any, params: list[nn.Parameter], steps: range) -> list[float]:
        rates = []
        for t in steps:
            run(optimizer, params, range(t, t + 1))
            advance(scheduler)
            rates.append(rate_of(optimizer))
        return rates

    go(optimizer, scheduler, params, range(3))
    loaded, *states = saved_and_loaded((params, optimizer.state_dict(), scheduler.state_dict()))
    resumed = optimizer_class(loaded, lr=0.05)
    other = attach(resumed)
    for thing, state in zip((resumed, other), states, strict=True):
        thing.load_state_dict(state)
    assert go(optimizer, scheduler, params, range(3, 7)) == go(resumed, other, loaded, range(3, 7))
    assert equal(loaded, params)


@pytest.mark.contract("torch: schedulers")
@pytest.mark.contract("torch: late parameters")
@pytest.mark.parametrize("attach", ATTACH.values(), ids=ATTACH)
def test_a_group_may_come_late_with_all_that_a_scheduler_keeps(attach: Callable):
    params = parameters((4, 3), (5,))
    optimizer = KronWhiten(params[:1], lr=0.05)
    scheduler = attach(optimizer)
    run(optimizer, params[:1], range(2))
    advance(scheduler)
    optimizer.add_param_group({**optimizer.param_groups[0], "params": params[1:]})
    run(optimizer, params, range(2, 4))
    first, second = ({k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups)
    assert first == second and [int(optimizer.state[p]["step"]) for p in params] == [4, 2]


@pytest.mark.contract("torch: schedulers")
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("name", CYCLING)
@over(CLASSES.values())
def test_a_momentum_that_a_scheduler_brings_is_used(optimizer_class: type[PSGD], name: str, before: int):
    """Also when it comes after some steps without."""
    runs = []
    for kind in (name, f"{name}, rate only"):
        params = parameters(*SHAPES)
        gradients = {f.name: True for f in fields(optimizer_class.method) if f.name == "whiten_grad"}
        optimizer = optimizer_class(params, momentum=0.0, **gradients)
        run(optimizer, params, range(before))
        ATTACH[kind](optimizer)
        runs.append(run(optimizer, params, range(before, before + 3)))
    assert not equal(*runs)


@pytest.mark.contract("torch: schedulers")
@over(EACH_KIND)
def test_averaging_of_weights_leaves_training_alone(optimizer_class: type[PSGD]):
    """AveragedModel holds the mean of what it was shown, at a rate that SWALR holds."""
    models, snapshots = (Bars(), Bars()), []
    averaged = swa.AveragedModel(models[0])
    for model in models:
        optimizer = optimizer_class(model.parameters(), lr=0.05)
        scheduler = swa.SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
        for t in range(4):
            descend(optimizer, lambda model=model, t=t: model.loss(t))
            scheduler.step()
            if model is models[0]:
                averaged.update_parameters(model)
                snapshots.append([p.detach().clone() for p in model.parameters()])
    assert equal([*models[0].parameters()], [*models[1].parameters()]) and rate_of(optimizer) == 0.01
    means = [torch.stack(column).mean(0) for column in zip(*snapshots, strict=True)]
    for mean, ours in zip(means, averaged.module.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), mean)
    assert not any(torch.allclose(mean, last) for mean, last in zip(means, snapshots[-1], strict=True))


# ---- mixed precision ------------------------------------------------------------------------
@pytest.mark.contract("torch: mixed precision")
@over(EACH_KIND)
def test_autocast_trains(optimizer_class: type[PSGD]):
    model, seen = Bars(), []
    optimizer, start = optimizer_class(model.parameters(), lr=0.1), model.loss(0).item()

    def loss(t: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen.append(model(Bars.batch(t)[0]).dtype)
            return model.loss(t)

    for t in range(1, 41):
        descend(optimizer, lambda t=t: loss(t))
    assert model.loss(0).item() < 0.75 * start and set(seen) == {torch.bfloat16}
    kinds = {x.dtype for x in flat_all(optimizer.state_dict()).values()} | {p.dtype for p in model.parameters()}
    assert kinds == {torch.float32, torch.int64}


@pytest.mark.contract("torch: mixed precision")
@over(EACH_KIND)
def test_a_step_is_not_autocast(optimizer_class: type[PSGD]):
    """torch's own optimizers step in the dtype of their parameters within autocast too."""
    runs = []
    for enabled in (False, True):
        params = parameters(*SHAPES)
        optimizer = optimizer_class(params)
        for t in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                step_from_zero(optimizer, params, t)
        runs.append([*params, *flat_all(optimizer.state_dict()).values()])
    assert equal(*runs)


def scaled_run(
    optimizer_class: type[PSGD],
    steps: Sequence[int],
    scaler: Any = None,
    clip: float | None = None,
    spoilt: int | None = None,
) -> tuple[PSGD, list[nn.Parameter]]:
    """Trained, by a scaler if there is one; at the spoilt step a gradient is infinite, and nothing must change."""
    model = Bars()
    params = list(model.parameters())
    optimizer = optimizer_class(params, lr=0.05)
    probes = [torch.ones_like(p) for p in params]
    pairs = {"vector": probes, "Hvp": probes, "update_preconditioner": True} if newton(optimizer_class) else {}
    for t in steps:
        optimizer.zero_grad()
        loss = model.loss(t)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if t == spoilt:
            params[1].grad[0] = torch.inf
        if clip is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            assert clip_grad_norm_(params, clip) > clip
        if scaler is None:
            optimizer.step(**pairs)
            continue
        before = copy.deepcopy((params, optimizer.state_dict())), scaler.get_scale()
        scaler.step(optimizer, **pairs)
        scaler.update()
        if t == spoilt:
            assert_untouched(optimizer, params, before[0])
            assert scaler.get_scale() == before[1] / 2
    return optimizer, params


def assert_same(ours: tuple[PSGD, list[nn.Parameter]], theirs: tuple[PSGD, list[nn.Parameter]]) -> None:
    assert equal(ours[1], theirs[1]) and not equal(ours[1], list(Bars().parameters()))
    states = [flat_all(optimizer.state_dict()) for optimizer, _ in (ours, theirs)]
    assert list(states[0]) == list(states[1]) and equal(*(list(s.values()) for s in states))


@pytest.fixture
def scaler() -> torch.amp.GradScaler:
    """One by powers of two, which gradients in float32 take without rounding."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**10)


@pytest.mark.contract("torch: mixed precision")
@pytest.mark.parametrize("clip", [None, 0.1])
@over(EACH_KIND)
def test_scaled_training_is_the_same(optimizer_class: type[PSGD], clip: float | None, scaler: torch.amp.GradScaler):
    """With `unscale_` before clipping, and without either."""
    assert_same(
        scaled_run(optimizer_class, range(4), scaler, clip=clip), scaled_run(optimizer_class, range(4), clip=clip)
    )


@pytest.mark.contract("torch: mixed precision")
@pytest.mark.parametrize("spoilt", [0, 2])
@over(EACH_KIND)
def test_a_step_that_the_scaler_skips_never_was(optimizer_class: type[PSGD], spoilt: int, scaler: torch.amp.GradScaler):
    """At the first step too, where there is no state."""
    ours = scaled_run(optimizer_class, range(4), scaler, spoilt=spoilt)
    assert_same(ours, scaled_run(optimizer_class, [t for t in range(4) if t != spoilt]))
    assert {int(entry["step"]) for entry in ours[0].state.values()} == {3}


@pytest.mark.contract("torch: mixed precision")
def test_a_scaler_refuses_the_closure_of_a_newton_method(scaler: torch.amp.GradScaler):
    params = parameters(*SHAPES)
    optimizer = KronNewton(params)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported if GradScaler is enabled"):
        scaler.step(optimizer, closure=lambda: sum((p**2).sum() for p in params))
    assert not optimizer.state and equal(params, parameters(*SHAPES))


# ---- hooks ----------------------------------------------------------------------------------
@pytest.mark.contract("torch: hooks")
@over(EACH_KIND)
def test_hooks_of_a_step_run_in_torchs_order(optimizer_class: type[PSGD]):
    params, seen = parameters(*SHAPES), []
    optimizer, other = optimizer_class(params), optimizer_class(parameters((2, 2)))

    def noted(name: str) -> Callable:
        return lambda o, *_: seen.append((name, int(o.state[params[0]]["step"]) if o.state else 0))

    with ExitStack() as hooks:
        for name, register in {
            "all, after": register_optimizer_step_post_hook,
            "after": optimizer.register_step_post_hook,
            "before": optimizer.register_step_pre_hook,
            "all, before": register_optimizer_step_pre_hook,
            "not this one": other.register_step_pre_hook,
        }.items():
            hooks.callback(register(noted(name)).remove)
        run(optimizer, params, range(2))
    run(optimizer, params, range(2, 3))
    names = ["all, before", "before", "after", "all, after"]
    assert seen == [(name, t + ("after" in name)) for t in range(2) for name in names]


@pytest.mark.contract("torch: hooks")
@over(EACH_KIND)
def test_a_hook_may_bring_the_closure(optimizer_class: type[PSGD]):
    models = Bars(), Bars()
    given, hooked = (optimizer_class(model.parameters()) for model in models)

    def closure(model: Bars, optimizer: PSGD) -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(1)
        if not newton(optimizer_class):
            loss.backward()
        return loss

    hooked.register_step_pre_hook(lambda o, args, kwargs: (args, {"closure": lambda: closure(models[1], o)}))
    assert hooked.step() == given.step(lambda: closure(models[0], given))
    assert equal(*([*model.parameters()] for model in models)) and hooked.state


@pytest.mark.contract("torch: hooks")
def test_hooks_of_saving_and_loading_run_in_torchs_order():
    """Those before see what is there, those after what came of it, of which the state has its saved dtypes."""
    params, seen = parameters((3, 2)), []
    optimizer, other = Procrustes(params, lr=0.5, dtype=torch.bfloat16), Procrustes(parameters((3, 2)))
    run(optimizer, params, range(2))

    def noted(name: str) -> Callable:
        def hook(o: PSGD, state_dict: dict | None = None) -> None:
            (entry,) = o.state.values() if o.state else [None]
            state = None if entry is None else (int(entry["step"]), entry["Q"]["0"].dtype)
            seen.append((name, rate_of(o), state, None if state_dict is None else state_dict["param_groups"][0]["lr"]))

        return hook

    def halved(o: PSGD, state_dict: dict) -> dict:
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] /= 2
        return state_dict

    optimizer.register_state_dict_post_hook(halved)
    optimizer.register_state_dict_post_hook(noted("saved"))
    optimizer.register_state_dict_post_hook(noted("saved, first"), prepend=True)
    optimizer.register_state_dict_pre_hook(noted("save"))
    other.register_load_state_dict_post_hook(noted("loaded"))
    other.register_load_state_dict_post_hook(noted("loaded, first"), prepend=True)
    other.register_load_state_dict_pre_hook(halved)
    other.register_load_state_dict_pre_hook(noted("load"))
    other.register_load_state_dict_pre_hook(noted("load, first"), prepend=True)
    other.load_state_dict(optimizer.state_dict())
    there, own = (2, torch.bfloat16), Procrustes(params).defaults["lr"]
    assert seen == [
        ("save", 0.5, there, None),
        ("saved, first", 0.5, there, 0.5),
        ("saved", 0.5, there, 0.25),
        ("load, first", own, None, 0.25),
        ("load", own, None, 0.125),
        ("loaded, first", 0.125, there, None),
        ("loaded", 0.125, there, None),
    ]


FUNCTION = {"preconditioner_update_probability": lambda t: 0.5}


@pytest.mark.contract("torch: hooks")
def test_a_hook_of_saving_sees_the_plain_data_that_is_saved():
    optimizer, seen = Kron(parameters((3, 2)), **FUNCTION), []
    optimizer.register_state_dict_post_hook(lambda o, state_dict: seen.append(copy.copy(state_dict["param_groups"][0])))
    optimizer.state_dict()
    assert "momentum" in seen[0] and not any(callable(value) for value in seen[0].values())


@pytest.mark.contract("torch: hooks")
def test_a_hook_of_saving_has_the_last_word():
    optimizer = Procrustes(parameters((3, 2)))
    optimizer.register_state_dict_post_hook(lambda o, state_dict: {"optimizer": state_dict})
    assert list(optimizer.state_dict()) == ["optimizer"]


@pytest.mark.contract("torch: hooks")
def test_a_hook_of_loading_sees_whole_groups():
    params, seen = parameters((3, 2)), []
    optimizer = Kron(params, **FUNCTION)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(list(o.param_groups[0])))
    optimizer.load_state_dict(optimizer.state_dict())
    assert set(seen[0]) >= set(known(optimizer.method))


# ---- packages that train --------------------------------------------------------------------
BATCHES = [Bars.batch(seed, n=16) for seed in range(8)]
LOADER = DataLoader(BATCHES, batch_size=None)


def loss_of(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


@lru_cache
def loop(optimizer_class: type[PSGD], accumulate: int, clip: float | None) -> tuple[list[Tensor], list[Tensor]]:
    """What the packages shall do in two epochs, done by hand: the parameters, and the state."""
    model = Bars()
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    scheduler = S.StepLR(optimizer, 3)
    for start in [*range(0, len(BATCHES), accumulate)] * 2:
        optimizer.zero_grad()
        for batch in BATCHES[start : start + accumulate]:
            (loss_of(model, batch) / accumulate).backward()
        if clip is not None:
            assert clip_grad_norm_(model.parameters(), clip) > clip
        optimizer.step()
        scheduler.step()
    assert loss_of(model, BATCHES[0]) < 0.97 * loss_of(Bars(), BATCHES[0])  # 0.95 of few clipped steps of Kron
    return list(model.parameters()), list(flat_all(optimizer.state_dict()).values())


WAYS = pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (1, 0.1), (4, 0.1)])


@pytest.fixture
def lightning(caplog: pytest.LogCaptureFixture) -> ModuleType:
    caplog.set_level("ERROR", logger="lightning.pytorch")  # or it writes to what pytest has closed
    return pytest.importorskip("lightning")


def lightning_marks(test: Callable) -> Callable:
    for mark in (
        # Lightning's own, at import and at the start of training.
        pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\):FutureWarning"),
        pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning"),
        pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning"),
        pytest.mark.contract("torch: clients"),
        pytest.mark.xdist_group("clients"),
    ):
        test = mark(test)
    return test


def lit(lightning: ModuleType, optimizer_class: type[PSGD], by_hand: bool = False) -> Any:
    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = Bars(), not by_hand

        def training_step(self, batch: Sequence[Tensor], _: int) -> Tensor | None:
            if self.automatic_optimization:
                return loss_of(self.net, batch)
            self.optimizers().step(lambda: loss_of(self.net, batch))
            return None

        def configure_optimizers(self) -> dict:
            optimizer = optimizer_class(self.parameters(), lr=0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": S.StepLR(optimizer, 3), "interval": "step"}}

    return Lit()


def trainer(lightning: ModuleType, folder: Path, **options: Any) -> Any:
    quiet = {f"enable_{x}": False for x in ("checkpointing", "progress_bar", "model_summary")}
    return lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, default_root_dir=folder, **quiet, **{"max_epochs": 2} | options
    )


@lightning_marks
@WAYS
@over(WHITENING)
def test_lightning_trains_as_a_loop_does(
    lightning: ModuleType, tmp_path: Path, optimizer_class: type[PSGD], accumulate: int, clip: float | None
):
    module = lit(lightning, optimizer_class)
    trained = trainer(lightning, tmp_path, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    trained.fit(module, LOADER)
    params, state = loop(optimizer_class, accumulate, clip)
    assert equal(list(module.parameters()), params)
    assert equal(list(flat_all(trained.optimizers[0].state_dict()).values()), state)


@lightning_marks
@over(WHITENING)
def test_lightning_resumes_bit_for_bit(lightning: ModuleType, tmp_path: Path, optimizer_class: type[PSGD]):
    first = trainer(lightning, tmp_path, max_epochs=1)
    first.fit(lit(lightning, optimizer_class), LOADER)
    first.save_checkpoint(tmp_path / "first.ckpt")
    module = lit(lightning, optimizer_class)
    second = trainer(lightning, tmp_path)
    second.fit(module, LOADER, ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    params, state = loop(optimizer_class, 1, None)
    assert second.global_step == 16 and equal(list(module.parameters()), params)
    assert equal(list(flat_all(second.optimizers[0].state_dict()).values()), state)


@lightning_marks
@over([c for c in CLASSES.values() if newton(c)])
def test_lightning_leaves_newton_methods_to_the_user(
    lightning: ModuleType, tmp_path: Path, optimizer_class: type[PSGD]
):
    """Its own closure has called backward: that is refused, and nothing changed. By hand they train."""
    module = lit(lightning, optimizer_class)
    refused = trainer(lightning, tmp_path)
    with pytest.raises(RuntimeError, match=r"closure must return the loss, .* leave backward\(\) to the optimizer"):
        refused.fit(module, LOADER)
    assert equal(list(module.net.parameters()), list(Bars().parameters())) and not refused.optimizers[0].state
    module = lit(lightning, optimizer_class, by_hand=True)
    trainer(lightning, tmp_path).fit(module, LOADER)
    assert loss_of(module.net, BATCHES[0]) < 0.9 * loss_of(Bars(), BATCHES[0])


@pytest.fixture
def transformers() -> Iterator[ModuleType]:
    module = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    verbosity = module.logging.get_verbosity()
    module.logging.set_verbosity_error()
    yield module
    module.logging.set_verbosity(verbosity)


SENTENCES = [{"input_ids": (words := (torch.arange(8) + i) % 11), "labels": words} for i in range(32)]


def hugging(transformers: ModuleType, folder: Path, optimizer_class: type[PSGD], way: str, **options: Any) -> Any:
    """A Trainer of a tiny GPT-2, given the optimizer, or its class."""
    nowhere = {f"{x}_pdrop": 0.0 for x in ("attn", "embd", "resid")}
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, **nowhere
    )
    transformers.set_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    arguments = transformers.TrainingArguments(
        folder,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        save_steps=6,
        max_steps=12,
        per_device_train_batch_size=8,
        weight_decay=0.01,
        **options,
    )
    if way == "class":
        chosen = {"optimizer_cls_and_kwargs": (optimizer_class, {"lr": 0.03})}
    else:
        optimizer = optimizer_class(model.named_parameters(), lr=0.03)
        chosen = {"optimizers": (optimizer, S.LinearLR(optimizer, 1.0, 0.1, total_iters=12))}
    return transformers.Trainer(model, arguments, train_dataset=SENTENCES, **chosen)


@pytest.mark.contract("torch: clients")
@pytest.mark.xdist_group("clients")
@pytest.mark.parametrize(
    ("optimizer_class", "way"), [*((c, "class") for c in WHITENING), (Procrustes, "instance"), (LRAWhiten, "instance")]
)
def test_the_trainer_of_transformers_trains_and_resumes(
    transformers: ModuleType, tmp_path: Path, optimizer_class: type[PSGD], way: str
):
    ours = hugging(transformers, tmp_path, optimizer_class, way, gradient_accumulation_steps=2)
    ours.train()
    losses, rates = ([x[k] for x in ours.state.log_history if k in x] for k in ("loss", "learning_rate"))
    assert losses[-1] < 0.98 * losses[0] and rates[0] == 0.03 and rates == sorted(set(rates), reverse=True)
    assert type(ours.optimizer.optimizer) is optimizer_class
    decays = [0.01, 0.0] if way == "class" else [optimizer_class.method().weight_decay]  # of matrices, of all others
    assert [group["weight_decay"] for group in ours.optimizer.param_groups] == decays
    resumed = hugging(transformers, tmp_path, optimizer_class, way, gradient_accumulation_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert equal(list(ours.model.parameters()), list(resumed.model.parameters()))
    assert {int(entry["step"]) for entry in resumed.optimizer.state.values()} == {12}


@pytest.mark.contract("torch: clients")
@pytest.mark.xdist_group("clients")
def test_the_trainer_of_transformers_gives_newton_methods_no_closure(transformers: ModuleType, tmp_path: Path):
    ours = hugging(transformers, tmp_path, KronNewton, "class")
    with pytest.raises(RuntimeError, match=r"KronNewton fits Hessian-vector products; call step\(closure\)"):
        ours.train()


@pytest.fixture
def accelerator() -> Iterator[Callable]:
    """What makes an Accelerator; its package keeps the settings of the first for the process."""
    accelerate = pytest.importorskip("accelerate")
    states = accelerate.state.AcceleratorState, accelerate.state.GradientState

    def reset() -> None:
        states[0]._reset_state(reset_partial_state=True)
        states[1]._reset_state()

    reset()
    yield lambda **options: accelerate.Accelerator(cpu=True, **options)
    reset()


def accelerated(accelerator: Any, optimizer_class: type[PSGD]) -> tuple[Any, ...]:
    model = Bars()
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    return accelerator.prepare(model, optimizer, S.StepLR(optimizer, 3))


def accelerated_epoch(accelerator: Any, model: nn.Module, optimizer: Any, scheduler: Any, clip: float | None) -> None:
    for batch in BATCHES:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


@pytest.mark.contract("torch: clients")
@pytest.mark.xdist_group("clients")
@WAYS
@over(WHITENING)
def test_accelerate_trains_as_a_loop_does_and_resumes(
    accelerator: Callable, tmp_path: Path, optimizer_class: type[PSGD], accumulate: int, clip: float | None
):
    ours = accelerator(gradient_accumulation_steps=accumulate)
    prepared = accelerated(ours, optimizer_class)
    accelerated_epoch(ours, *prepared, clip)
    ours.save_state(tmp_path)
    ours.free_memory()
    again = accelerator(gradient_accumulation_steps=accumulate)
    resumed = accelerated(again, optimizer_class)
    again.load_state(tmp_path)
    params, state = loop(optimizer_class, accumulate, clip)
    for one, things in ((ours, prepared), (again, resumed)):
        accelerated_epoch(one, *things, clip)
        assert equal(list(things[0].parameters()), params)
        assert equal(list(flat_all(things[1].state_dict()).values()), state)


@pytest.mark.contract("torch: clients")
@pytest.mark.contract("torch: mixed precision")
@pytest.mark.xdist_group("clients")
@over(EACH_KIND)
def test_accelerate_trains_in_mixed_precision(accelerator: Callable, optimizer_class: type[PSGD]):
    """It passes closures on, in which Newton methods find the loss."""
    ours = accelerator(mixed_precision="bf16")
    model, optimizer, _ = accelerated(ours, optimizer_class)
    start = loss_of(model, BATCHES[0]).item()
    for batch in BATCHES * 2:
        if newton(optimizer_class):
            optimizer.step(lambda batch=batch: loss_of(model, batch))
            continue
        optimizer.zero_grad()
        ours.backward(loss_of(model, batch))
        optimizer.step()
    assert loss_of(model, BATCHES[0]).item() < 0.9 * start
