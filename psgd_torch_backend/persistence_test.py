"""The PyTorch optimizers: saved, loaded, resumed in another process, and trained by several.

Run as a program, with a folder of saved runs, it resumes them.
"""

from __future__ import annotations

import copy
import io
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from datetime import timedelta
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from psgd.hyperparameters import group_key
from psgd_torch_backend import PSGD
from psgd_torch_backend._testing import (
    CLASSES,
    OF_TENSORS,
    RECIPES,
    WHOLE,
    assert_untouched,
    close,
    equal,
    flat,
    flat_all,
    newton,
    normal,
    of_rank,
    parameters,
    run,
)
from psgd_torch_backend._testing import step as step_of

SHAPES = {"w": (4, 3), "v": (4, 3), "bias": (5,), "scale": ()}  # two that step together
# Of torch's checkpoints, where there is no process group.
alone = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

each_method = pytest.mark.parametrize("made", CLASSES.values(), ids=CLASSES)
each_of_tensors = pytest.mark.parametrize("made", OF_TENSORS.values(), ids=OF_TENSORS)
each_of_whole_models = pytest.mark.parametrize("made", WHOLE.values(), ids=WHOLE)

# Fixtures that start processes do so in one worker.
in_new_process = pytest.mark.xdist_group("resumed")
of_two_ranks = pytest.mark.xdist_group("ranks")


def model_of(dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> nn.ParameterDict:
    shapes = shapes or SHAPES
    return nn.ParameterDict(list(zip(shapes, parameters(*shapes.values(), dtype=dtype), strict=True)))


def train(model: nn.Module, optimizer: PSGD, *steps: int) -> None:
    run(optimizer, list(model.parameters()), range(*steps))


def trained(made: type[PSGD], steps: int = 3, **options: Any) -> tuple[nn.ParameterDict, PSGD]:
    """A model of named parameters, and its optimizer, after some steps; of a low rank unless told."""
    model = model_of()
    optimizer = made(model.named_parameters(), **of_rank(made, 2) | {"lr": 0.01} | options)
    train(model, optimizer, steps)
    return model, optimizer


def other_value(f: Field) -> Any:
    """A legal value of a hyperparameter that is not its default."""
    kind, default = f.metadata["kind"], f.default
    if kind == "flag":
        return not default
    if kind == "name":
        return next(x for x in f.metadata["names"]() if x != default)
    if kind == "dtype":
        return "float32"
    if kind == "integer":
        return 3 if default in (None, inf) else default + 1
    if isinstance(default, tuple):
        return tuple(x / 2 for x in default)
    return 0.5 if default in (None, inf, 0.0) else default / 2


def unusual(made: type[PSGD]) -> dict[str, Any]:
    """Every hyperparameter at another value than its default."""
    own = {group_key(f): other_value(f) for f in fields(made.method)}
    return own | {"maximize": True, "stack": False, "stack_batch_size": 2, "nonfinite": "raise", "max_skips": 3}


def identical(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert set(ours) == set(theirs)
    for k, x in ours.items():
        assert x.dtype == theirs[k].dtype and torch.equal(x, theirs[k]), k


# ---- in a new process -----------------------------------------------------------------------
SAVED, FINAL = 50, 56  # steps
# In bfloat16 some state is told to be float32: what torch casts to the parameters' dtype would lose bits.
KINDS = {"float32": (torch.float32, lambda _: {}), "bfloat16": (torch.bfloat16, unusual)}
RUNS = [(name, kind) for name in CLASSES for kind in KINDS]
WAYS = ("file", "checkpoint")


def begun(name: str, kind: str) -> tuple[nn.ParameterDict, PSGD]:
    dtype, options = KINDS[kind]
    model = model_of(dtype)
    return model, CLASSES[name](model.named_parameters(), **{"lr": 0.01} | options(CLASSES[name]))


def outcome(model: nn.Module, optimizer: PSGD) -> dict[str, Tensor]:
    return flat({"model": dict(model.state_dict()), "state": flat_all(optimizer.state_dict())})


def save(folder: Path, name: str, kind: str) -> dict[str, Tensor]:
    """Save a run on its way; what it comes to without a break."""
    model, optimizer = begun(name, kind)
    train(model, optimizer, SAVED)
    own = folder / f"{name} {kind}"
    own.mkdir()
    torch.save((model.state_dict(), optimizer.state_dict()), own / "file")
    checkpoint.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=own / "checkpoint")
    train(model, optimizer, SAVED, FINAL)
    return outcome(model, optimizer)


def resume(folder: Path, name: str, kind: str, way: str) -> dict[str, Tensor]:
    """What a saved run comes to."""
    model, optimizer = begun(name, kind)
    own = folder / f"{name} {kind}"
    of_model, of_optimizer = torch.load(own / "file", weights_only=True)
    model.load_state_dict(of_model)
    if way == "file":
        optimizer.load_state_dict(of_optimizer)
    else:
        loaded = get_optimizer_state_dict(model, optimizer)
        checkpoint.load(loaded, checkpoint_id=own / "checkpoint")
        set_optimizer_state_dict(model, optimizer, loaded)
    train(model, optimizer, SAVED, FINAL)
    return outcome(model, optimizer)


def resume_all(folder: Path) -> None:
    for name, kind in RUNS:
        for way in WAYS:
            try:
                result = resume(folder, name, kind, way)
            except Exception as error:
                result = f"{type(error).__name__}: {error}"
            torch.save(result, folder / f"{name} {kind}" / f"resumed {way}")


@pytest.fixture(scope="module")
def folder_of_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that were saved here and resumed in another process, with what they came to."""
    folder = tmp_path_factory.mktemp("runs")
    for name, kind in RUNS:
        torch.save(save(folder, name, kind), folder / f"{name} {kind}" / "unbroken")
    subprocess.run([sys.executable, "-m", "psgd_torch_backend.persistence_test", str(folder)], check=True, timeout=1800)
    return folder


@alone
@pytest.mark.contract("torch: state dict")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLASSES)
@in_new_process
def test_a_run_resumes_in_a_new_process(folder_of_runs: Path, name: str, kind: str):
    assert_resumed(folder_of_runs, name, kind, "file")


@alone
@pytest.mark.contract("torch: distributed checkpoints")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLASSES)
@in_new_process
def test_a_checkpoint_resumes_in_a_new_process(folder_of_runs: Path, name: str, kind: str):
    assert_resumed(folder_of_runs, name, kind, "checkpoint")


def assert_resumed(folder: Path, name: str, kind: str, way: str) -> None:
    own = folder / f"{name} {kind}"
    ours, theirs = (torch.load(own / file, weights_only=True) for file in (f"resumed {way}", "unbroken"))
    assert not isinstance(ours, str), ours
    identical(ours, theirs)


@pytest.mark.contract("torch: state dict")
@each_method
def test_weights_only_loads_every_argument(made: type[PSGD]):
    layers = {"scanned_layers": ("w", "v")} if made in OF_TENSORS.values() else {}
    model, optimizer = trained(made, **unusual(made) | layers)
    usual = made(model_of().named_parameters()).param_groups[0]
    saved = optimizer.state_dict()
    same = {k for k, v in saved["param_groups"][0].items() if k in optimizer.defaults and v == usual[k]}
    assert same == {"compile"} | ({"scanned_layers"} - set(layers))
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["param_groups"] == saved["param_groups"]
    identical(flat_all(loaded), flat_all(saved))
    twin = copy.deepcopy(model)
    resumed = made(twin.named_parameters())
    resumed.load_state_dict(loaded)
    train(model, optimizer, 3, 5)
    train(twin, resumed, 3, 5)
    identical(outcome(twin, resumed), outcome(model, optimizer))


# ---- torch's checkpoints --------------------------------------------------------------------
LAYOUTS = {
    "plain": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
}


@alone
@pytest.mark.contract("torch: distributed checkpoints")
@pytest.mark.parametrize(("layout", "disk"), [("plain", False), *((layout, True) for layout in LAYOUTS)])
@each_method
def test_checkpoints_load_into_fresh_optimizers(made: type[PSGD], layout: str, disk: bool, tmp_path: Path):
    options = StateDictOptions(**LAYOUTS[layout])

    def begun(**own: float) -> tuple[nn.ParameterDict, PSGD]:
        model = model_of(torch.bfloat16)
        first, second = list(model.named_parameters())[:2], list(model.named_parameters())[2:]
        groups = [{"params": first, **own}, {"params": second}]
        return model, made(groups, weight_decay=0.1, **of_rank(made, 2))

    model, optimizer = begun(lr=0.02, weight_decay=0.3)
    train(model, optimizer, 3)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    fresh, resumed = begun()
    fresh.load_state_dict(model.state_dict())
    if disk:
        checkpoint.save({"optimizer": saved}, checkpoint_id=tmp_path)
        into = {"optimizer": get_optimizer_state_dict(fresh, resumed, options=options)}
        checkpoint.load(into, checkpoint_id=tmp_path)
        saved = into["optimizer"]
    set_optimizer_state_dict(fresh, resumed, saved, options=options)
    assert all(torch.equal(p, fresh[name]) for name, p in model.items())

    for ours, theirs in zip(resumed.param_groups, optimizer.param_groups, strict=True):
        assert {**ours, "params": 0} == {**theirs, "params": 0}
    identical(outcome(fresh, resumed), outcome(model, optimizer))
    train(model, optimizer, 3, 6)
    train(fresh, resumed, 3, 6)
    identical(outcome(fresh, resumed), outcome(model, optimizer))


# ---- several processes ----------------------------------------------------------------------
AVERAGED = "averaged pairs"  # of vector and product, as those must be averaged who have no backward() to do it
GIVEN_SCALE = ("preconditioner_init_scale", "precond_init_scale")
DATA_STEPS = (4, 6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.scale = parameters((4, 3), (5, 4), (5,), (), dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.tanh(torch.tanh(x @ self.a.T) @ self.b.T + self.c)


def fit(model: nn.Module, optimizer: Any, *steps: int, rank: int | None = None, averaged: bool = False) -> None:
    """Train on all data, or on those of a rank; Newton methods by a closure, or by pairs of the averaged loss."""
    params = list(model.parameters())
    for t in range(*steps):
        share = slice(rank, None, 1 if rank is None else 2)
        x, y = (normal(8, n, seed=100 * n + t, dtype=torch.float64)[share] for n in (3, 5))

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            return (model(x) - y).square().mean()

        optimizer.zero_grad()
        if averaged:
            vectors = [normal(*p.shape, seed=t, dtype=p.dtype) for p in params]
            grads = torch.autograd.grad(loss(), params, create_graph=True)
            products = torch.autograd.grad(grads, params, vectors)
            for p, g in zip(params, grads, strict=True):
                p.grad = g.detach()
            for x in [p.grad for p in params] + list(products) if rank is not None else []:
                distributed.all_reduce(x)
                x /= 2
            optimizer.step(Hvp=list(products), vector=vectors, update_preconditioner=True)
        elif isinstance(optimizer, PSGD) and newton(type(optimizer)):
            optimizer.step(loss)
        else:
            loss().backward()
            optimizer.step()


def scaled(made: type[PSGD]) -> dict[str, float]:
    """The option of a method that spares it to take its first scale from the gradients of all parameters."""
    return {f.name: 1.0 for f in fields(made.method) if f.name in GIVEN_SCALE}


def data_parallel(made: type[PSGD], rank: int | None, averaged: bool = False) -> list[Tensor]:
    model = Net()
    optimizer = made(model.parameters(), lr=0.01)
    parallel = model if rank is None else DistributedDataParallel(model)
    fit(parallel, optimizer, DATA_STEPS[0], rank=rank, averaged=averaged)
    return [p.detach() for p in model.parameters()]


def without_redundancy(made: type[PSGD], rank: int, options: dict[str, float]) -> dict[str, Any]:
    """Train, gather the state in one process, and train on."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which uses what torch has deprecated, and is warned

    model = Net()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=made, lr=0.01, **options)
    parallel = DistributedDataParallel(model)
    own = {id(p) for group in optimizer.optim.param_groups for p in group["params"]}
    fit(parallel, optimizer, DATA_STEPS[0], rank=rank)
    optimizer.consolidate_state_dict(0)
    out = {
        "own": [id(p) in own for p in model.parameters()],
        "parameters": [p.detach().clone() for p in model.parameters()],
        "state": copy.deepcopy(optimizer.state_dict()) if rank == 0 else None,
    }
    fit(parallel, optimizer, *DATA_STEPS, rank=rank)
    return out | {"later": [p.detach() for p in model.parameters()]}


def work(rank: int, folder: Path) -> None:
    """What one of two processes does."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", store, timeout=timedelta(minutes=30), rank=rank, world_size=2)
    out: dict[str, Any] = {}
    for name, made in CLASSES.items():
        out[name, "parallel"] = data_parallel(made, rank)
        if RECIPES[name].newton:
            out[name, AVERAGED] = data_parallel(made, rank, averaged=True)
        else:
            out[name, "split"] = without_redundancy(made, rank, {})
            out[name, "split, scaled"] = without_redundancy(made, rank, scaled(made))
    torch.save(out, folder / f"{rank}")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What two processes came to."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}", weights_only=True) for rank in range(2)]


WHITENING = [name for name, recipe in RECIPES.items() if not recipe.newton]
ULPS = 256


@pytest.mark.contract("torch: distributed data")
@pytest.mark.parametrize("name", CLASSES)
@of_two_ranks
def test_two_processes_train_as_one_does(ranks: list[dict[Any, Any]], name: str):
    """Bit by bit as one another. Newton methods are given averaged products; their closures: see below."""
    averaged = RECIPES[name].newton
    first, second = (r[name, AVERAGED if averaged else "parallel"] for r in ranks)
    assert equal(first, second)
    close(first, data_parallel(CLASSES[name], None, averaged), ulps=ULPS)


@pytest.mark.contract("torch: distributed data")
@pytest.mark.xfail(
    strict=True, reason="a closure is differentiated without the hooks by which torch averages gradients"
)
@pytest.mark.parametrize("name", [name for name in CLASSES if name not in WHITENING])
@of_two_ranks
def test_two_processes_with_closures_train_as_one_does(ranks: list[dict[Any, Any]], name: str):
    first, second = (r[name, "parallel"] for r in ranks)
    assert equal(first, second)
    close(first, data_parallel(CLASSES[name], None), ulps=ULPS)


@pytest.mark.contract("torch: distributed data")
@pytest.mark.parametrize("kind", ["split", "split, scaled"])
@pytest.mark.parametrize("name", WHITENING)
@of_two_ranks
def test_a_split_optimizer_is_an_optimizer_with_a_group_for_each_process(
    ranks: list[dict[Any, Any]], name: str, kind: str
):
    """Each has a first scale, and where it is for all parameters a preconditioner, of its own."""
    runs = [r[name, kind] for r in ranks]
    assert equal(*(r["parameters"] for r in runs))
    assert all(any(r["own"]) for r in runs) and [sum(x) for x in zip(*(r["own"] for r in runs), strict=True)] == [1] * 4
    model, options = Net(), scaled(CLASSES[name]) if "scaled" in kind else {}
    groups = [{"params": [p for p, own in zip(model.parameters(), r["own"], strict=True) if own]} for r in runs]
    fit(model, CLASSES[name](groups, lr=0.01, **options), DATA_STEPS[0])
    close(runs[0]["parameters"], list(model.parameters()), ulps=ULPS)


@pytest.mark.contract("torch: distributed data")
@pytest.mark.parametrize("name", [name for name in WHITENING if name in OF_TENSORS])
@of_two_ranks
def test_a_split_optimizer_trains_as_one_does_from_a_given_scale(ranks: list[dict[Any, Any]], name: str):
    model = Net()
    fit(model, CLASSES[name](model.parameters(), lr=0.01, **scaled(CLASSES[name])), DATA_STEPS[0])
    close(ranks[0][name, "split, scaled"]["parameters"], list(model.parameters()), ulps=ULPS)


@pytest.mark.contract("torch: distributed data")
@pytest.mark.parametrize("name", [name for name in WHITENING if name in OF_TENSORS])
@of_two_ranks
def test_a_split_optimizer_is_gathered_for_one_process(ranks: list[dict[Any, Any]], name: str):
    """Its state dict is complete: one process goes on with it."""
    gathered, later = (ranks[0][name, "split, scaled"][k] for k in ("state", "later"))
    model = Net()
    optimizer = CLASSES[name](model.parameters(), **scaled(CLASSES[name]))
    with torch.no_grad():
        for p, x in zip(model.parameters(), ranks[0][name, "split, scaled"]["parameters"], strict=True):
            p.copy_(x)
    optimizer.load_state_dict(gathered)
    identical(flat_all(optimizer.state_dict()), flat_all(gathered))
    assert [int(optimizer.state[p]["step"]) for p in model.parameters()] == [DATA_STEPS[0]] * 4
    fit(model, optimizer, *DATA_STEPS)
    close(later, list(model.parameters()), ulps=ULPS)


# ---- dtypes and counters --------------------------------------------------------------------
@pytest.mark.contract("torch: state dict")
@each_method
def test_loaded_state_keeps_dtypes_and_counters(made: type[PSGD]):
    """Of bfloat16 parameters, which could count to 256 only."""
    float32 = {f.name: "float32" for f in fields(made.method) if f.metadata["kind"] == "dtype"}
    model = model_of(torch.bfloat16)
    optimizer = made(model.named_parameters(), **float32)
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry.update({k: torch.tensor(2**33 + 1) for k in ("step", "since") if k in entry})
    optimizer.load_state_dict(saved)
    identical(flat_all(optimizer.state_dict()), flat_all(saved))
    kinds = {x.dtype for k, x in flat(optimizer.state[model["w"]]).items() if k.startswith(("Q", "L"))}
    assert torch.float32 in kinds or not float32


# ---- old state dicts ------------------------------------------------------------------------
def skip(model: nn.Module, optimizer: PSGD) -> dict[str, Any]:
    """A step with gradients that are not finite; the counts of such steps."""
    for p in model.parameters():
        p.grad = torch.full_like(p, inf)
    step_of(optimizer)
    return {k: optimizer.param_groups[0][k] for k in ("skipped", "skipped_in_a_row")}


@pytest.mark.contract("torch: state dict")
def test_skipped_steps_are_counted_on():
    made = CLASSES["procrustes"]
    model, optimizer = trained(made)
    skip(model, optimizer)
    train(model, optimizer, 3, 4)
    skip(model, optimizer)
    resumed = made(model.named_parameters())
    resumed.load_state_dict(optimizer.state_dict())
    assert skip(model, resumed) == {"skipped": 3, "skipped_in_a_row": 2}
    assert skip(model, optimizer) == {"skipped": 3, "skipped_in_a_row": 2}


@pytest.mark.contract("torch: old state dicts")
@each_method
def test_arguments_that_were_not_saved_stay_as_they_are(made: type[PSGD]):
    """Each on its own, and all at once, as a state dict of before they existed has none of them."""
    model, optimizer = trained(made, 0, momentum=0.5)
    own = unusual(made) | of_rank(made, 2) | {"momentum": 0.9}
    for missing in [[name] for name in optimizer.defaults] + [list(optimizer.defaults)]:
        saved = copy.deepcopy(optimizer.state_dict())
        resumed = made(model.named_parameters(), **own)
        for group in saved["param_groups"]:
            for name in missing:
                del group[name]
        resumed.load_state_dict(saved)
        (group,) = resumed.param_groups
        wanted = {k: (resumed if k in missing else optimizer).defaults[k] for k in optimizer.defaults}
        assert {k: v for k, v in group.items() if k in wanted} == wanted


@pytest.mark.contract("torch: old state dicts")
def test_skipped_steps_are_counted_from_a_state_dict_without_their_counts():
    model, optimizer = trained(CLASSES["procrustes"])
    saved = optimizer.state_dict()
    counts = [k for k in saved["param_groups"][0] if k.startswith("skipped")]
    assert len(counts) == 2
    for k in counts:
        del saved["param_groups"][0][k]
    optimizer.load_state_dict(saved)
    assert optimizer.summary()
    assert skip(model, optimizer) == {"skipped": 1, "skipped_in_a_row": 1}


@pytest.mark.contract("torch: old state dicts")
@pytest.mark.parametrize("names", ["saved", "own", "neither"])
@each_of_tensors
def test_names_may_be_missing_on_either_side(made: type[PSGD], names: str):
    model, twin = model_of(), model_of()
    optimizer = made(model.named_parameters() if names == "saved" else model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    twin.load_state_dict(model.state_dict())
    resumed = made(twin.named_parameters() if names == "own" else twin.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0].get("param_names") == (None if names == "neither" else list(SHAPES))
    if newton(made) and names == "own":  # whose vectors depend on the names
        return
    train(model, optimizer, 3, 5)
    train(twin, resumed, 3, 5)
    identical(outcome(twin, resumed), outcome(model, optimizer))


@pytest.mark.contract("torch: old state dicts")
@each_of_whole_models
def test_names_that_were_saved_go_on(made: type[PSGD]):
    """One preconditioner is for all parameters in the order of their names."""
    model, optimizer = trained(made)
    twin = copy.deepcopy(model)
    resumed = made(twin.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 3, 5)
    train(twin, resumed, 3, 5)
    identical(outcome(twin, resumed), outcome(model, optimizer))


# ---- by name, and by words ------------------------------------------------------------------
WRAPPED = {"the same": "{}", "wrapped": "module.{}", "compiled": "_orig_mod.{}"}


def carried_on(made: type[PSGD], model: nn.ParameterDict, optimizer: PSGD, saved: dict, names: list[tuple]) -> PSGD:
    """A copy of a run, of parameters in groups of (own name, name for the optimizer), goes on as the run does."""
    twin = copy.deepcopy(model)
    groups = [{"params": [(told, twin[own]) for own, told in group]} for group in names]
    resumed = made(groups, **of_rank(made, 2))
    resumed.load_state_dict(saved)
    train(model, optimizer, 3, 5)
    train(twin, resumed, 3, 5)
    assert all(torch.equal(p, twin[k]) for k, p in model.items())
    for k, p in model.items():
        identical(flat(resumed.state[twin[k]]), flat(optimizer.state[p]))
    return resumed


@pytest.mark.contract("torch: state dict")
@pytest.mark.parametrize("wrapped", WRAPPED)
@each_method
def test_state_goes_to_the_parameter_of_its_name(made: type[PSGD], wrapped: str):
    """Also where a wrapper of the module has changed all names. Names that were saved go on."""
    model, optimizer = trained(made)
    names = [(k, WRAPPED[wrapped].format(k)) for k in ("scale", "v", "bias", "w")]
    resumed = carried_on(made, model, optimizer, copy.deepcopy(optimizer.state_dict()), [names])
    assert resumed.param_groups[0]["param_names"] == ["scale", "v", "bias", "w"]


@pytest.mark.contract("torch: state dict")
@each_method
def test_state_of_other_names_goes_by_place(made: type[PSGD]):
    """As in torch."""
    model, optimizer = trained(made)
    names = [[(k, f"other.{k}" if k == "w" else k) for k in SHAPES]]
    carried_on(made, model, optimizer, copy.deepcopy(optimizer.state_dict()), names)


@pytest.mark.contract("torch: state dict")
@each_method
def test_state_in_other_groups_goes_by_name_unless_it_is_of_all(made: type[PSGD]):
    model = model_of()
    named = list(model.items())
    optimizer = made([{"params": named[:2]}, {"params": named[2:]}], lr=0.01, **of_rank(made, 2))
    train(model, optimizer, 3)
    twin = copy.deepcopy(model)
    groups = [{"params": [(k, twin[k]) for k in names]} for names in (("w", "bias"), ("scale", "v"))]
    resumed = made(groups, **of_rank(made, 2))
    if made in WHOLE.values():
        with pytest.raises(ValueError, match=f"{made.__name__}: .*nothing was loaded"):
            resumed.load_state_dict(optimizer.state_dict())
        return
    resumed.load_state_dict(optimizer.state_dict())
    for k, p in model.items():
        identical(flat(resumed.state[twin[k]]), flat(optimizer.state[p]))
    train(twin, resumed, 3, 4)


@pytest.mark.contract("torch: old state dicts")
@each_method
def test_indices_that_became_words_are_found(made: type[PSGD]):
    """As JSON makes them of the keys of the state."""
    model, optimizer = trained(made)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"] = {str(k): entry for k, entry in saved["state"].items()}
    carried_on(made, model, optimizer, saved, [[(k, k) for k in SHAPES]])


COUNTED = {"int": int, "float": float, "float32": lambda x: torch.tensor(float(x))}


@pytest.mark.contract("torch: old state dicts")
@pytest.mark.parametrize("kind", COUNTED)
@each_method
def test_a_number_as_counter_becomes_a_counter(made: type[PSGD], kind: str):
    model, optimizer = trained(made)
    twin = copy.deepcopy(model)
    resumed = made(twin.named_parameters())
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry.update({k: COUNTED[kind](int(entry[k])) for k in ("step", "since") if k in entry})
    resumed.load_state_dict(saved)
    train(model, optimizer, 3, 5)
    train(twin, resumed, 3, 5)
    identical(outcome(twin, resumed), outcome(model, optimizer))


# ---- state dicts of others ------------------------------------------------------------------
def assert_refused(optimizer: PSGD, model: nn.Module, state_dict: dict[str, Any], *texts: str) -> None:
    """In one sentence that says where and what; the optimizer then walks on as if nothing had been."""
    twin, unaware = copy.deepcopy((model, optimizer))
    params = list(model.parameters())
    before = copy.deepcopy((params, optimizer.state_dict()))
    groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError) as caught:
        optimizer.load_state_dict(state_dict)
    said = str(caught.value)
    assert all(re.search(rf"(?<!\w)({text})", said) for text in texts) and "\n" not in said, said
    assert_untouched(optimizer, params, before)
    assert groups == optimizer.param_groups
    train(model, optimizer, 3, 5)
    train(twin, unaware, 3, 5)
    identical(outcome(model, optimizer), outcome(twin, unaware))


@pytest.mark.contract("state: of others")
@pytest.mark.parametrize(("groups", "text"), [([4], "size"), ([2, 1], "groups")], ids=["parameters", "groups"])
@each_method
def test_state_of_another_number_is_refused(made: type[PSGD], groups: list[int], text: str):
    params = iter(parameters(*[(4, 3)] * sum(groups)))
    theirs = made([{"params": [next(params) for _ in range(n)]} for n in groups])
    ours = model_of(a=(4, 3), b=(4, 3), c=(4, 3))
    optimizer = made(ours.named_parameters())
    train(ours, optimizer, 3)
    assert_refused(optimizer, ours, theirs.state_dict(), text)


@pytest.mark.contract("state: of others")
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@each_method
def test_state_of_other_shapes_is_refused(made: type[PSGD], named: bool):
    """The first parameter is of another shape."""
    runs = []
    for shape in ((2, 6), (3, 2)):
        model = model_of(a=shape, b=(4, 3))
        optimizer = made(model.named_parameters() if named else model.parameters(), **of_rank(made, 2))
        train(model, optimizer, 3)
        runs.append((model, optimizer))
    (_, theirs), (ours, optimizer) = runs
    assert_refused(optimizer, ours, theirs.state_dict(), r"a\b" if named else "parameter 0", "shape")


def without_factors(entry: dict[str, Any]) -> None:
    del entry["Q"]


def without_a_factor(entry: dict[str, Any]) -> None:
    del entry["Q"]["0"]


def with_another_factor(entry: dict[str, Any]) -> None:
    entry["Q"]["7"] = torch.ones(2)


def with_a_factor_of_text(entry: dict[str, Any]) -> None:
    entry["Q"]["0"] = "text"


def with_a_factor_of_whole_numbers(entry: dict[str, Any]) -> None:
    entry["Q"]["0"] = entry["Q"]["0"].to(torch.int64)


def with_a_short_factor(entry: dict[str, Any]) -> None:
    entry["Q"]["0"] = entry["Q"]["0"][:1]


def with_nan(entry: dict[str, Any]) -> None:
    entry["Q"]["0"].view(-1)[-1] = float("nan")


def with_infinity(entry: dict[str, Any]) -> None:
    entry["Q"]["0"].view(-1)[-1] = inf


def without_steps(entry: dict[str, Any]) -> None:
    del entry["step"]


def with_negative_steps(entry: dict[str, Any]) -> None:
    entry["step"] = torch.tensor(-1)


def with_another_momentum(entry: dict[str, Any]) -> None:
    entry["momentum"] = torch.ones(7)


def without_momentum(entry: dict[str, Any]) -> None:
    del entry["momentum"]


def with_too_many_steps(entry: dict[str, Any]) -> None:
    entry["step"] = 2**70


def with_half_a_step(entry: dict[str, Any]) -> None:
    entry["step"] = torch.tensor(2.5)


def with_a_factor_of_zero(entry: dict[str, Any]) -> None:
    for q in entry["Q"].values():
        q.zero_()


def with_a_complex_factor(entry: dict[str, Any]) -> None:
    entry["Q"]["0"] = entry["Q"]["0"].to(torch.complex64)


def with_a_sparse_factor(entry: dict[str, Any]) -> None:
    entry["Q"]["0"] = entry["Q"]["0"].to_sparse()


def with_a_factor_of_none(entry: dict[str, Any]) -> None:
    entry["Q"]["0"] = None


def with_another_bound(entry: dict[str, Any]) -> None:
    entry["L"]["9"] = torch.ones(())


FACTOR = r"Q\b|factor|finite"
SPOILT = {
    without_factors: FACTOR,
    without_a_factor: FACTOR,
    with_another_factor: FACTOR,
    with_a_factor_of_text: FACTOR,
    with_a_factor_of_whole_numbers: FACTOR,
    with_a_short_factor: FACTOR,
    with_nan: FACTOR,
    with_infinity: FACTOR,
    without_steps: "step|count",
    with_negative_steps: "step|count",
    with_another_momentum: "momentum",
    without_momentum: "momentum",
    with_too_many_steps: "step",
    with_half_a_step: "step",
    with_a_factor_of_zero: "would stay zero",
    with_a_complex_factor: FACTOR,
    with_a_sparse_factor: FACTOR,
    with_a_factor_of_none: FACTOR,
    with_another_bound: r"factors L\b",
}


@pytest.mark.contract("state: of others")
@pytest.mark.parametrize(("spoil", "text"), SPOILT.items(), ids=[spoil.__name__ for spoil in SPOILT])
@pytest.mark.parametrize("name", ["kron", "kron_newton", "lra_whiten"])
def test_spoilt_state_is_refused(name: str, spoil: Callable[[dict[str, Any]], None], text: str):
    """The entry of the second parameter."""
    model, made = model_of(), CLASSES[name]
    optimizer = made(model.named_parameters(), momentum=0.9, **of_rank(made, 2))
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved["state"][1])
    assert_refused(optimizer, model, saved, r"v\b", text)


@pytest.mark.contract("state: of others")
def test_a_parameter_is_named_as_either_side_names_it():
    model, made = model_of(), CLASSES["kron"]
    optimizer = made(model.parameters())
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1] = None
    assert_refused(optimizer, model, saved, "parameter 1 has NoneType for its state")
    named = made(model.named_parameters())
    train(model, named, 3)
    assert_refused(named, model, saved, "Kron: v has NoneType for its state")


OF_TORCH = {
    "AdamW": torch.optim.AdamW,
    "SGD": lambda params: torch.optim.SGD(params, momentum=0.9),
}


@pytest.mark.contract("state: of others")
@pytest.mark.parametrize("theirs", OF_TORCH)
@each_method
def test_state_of_torchs_optimizers_is_refused(made: type[PSGD], theirs: str):
    ours, optimizer = trained(made)
    model = model_of()
    other = OF_TORCH[theirs](model.named_parameters())
    sum(p.square().sum() for p in model.parameters()).backward()
    other.step()
    assert_refused(optimizer, ours, other.state_dict(), made.__name__)


@cache
def saved_by(name: str) -> dict[str, Any]:
    return trained(CLASSES[name])[1].state_dict()


@pytest.mark.contract("state: of others")
@each_method
def test_state_of_another_method_is_refused(made: type[PSGD]):
    """Of each, also where all shapes are the same."""
    ours, optimizer = trained(made)
    for name in [name for name in CLASSES if name != made.method.name]:
        assert_refused(optimizer, ours, saved_by(name), f"{made.__name__}|{made.method.name}")


@pytest.mark.contract("state: of others")
@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1.0), ("weight_decay", float("nan")), ("stack", 1), ("momentum", "much")],
)
def test_groups_with_wrong_values_are_refused(name: str, value: Any):
    model, optimizer = trained(CLASSES["procrustes"])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][name] = value
    assert_refused(optimizer, model, saved, name, re.escape(repr(value)))


# ---- at any time ----------------------------------------------------------------------------
def in_pair(made: type[PSGD]) -> tuple[nn.ParameterDict, PSGD, tuple[Any, Any], dict[str, Tensor]]:
    """A run after three steps, what it saved, and what it came to in two more."""
    model, optimizer = trained(made)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 3, 5)
    return model, optimizer, saved, outcome(model, optimizer)


def restore(model: nn.Module, optimizer: PSGD, saved: tuple) -> None:
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])


@pytest.mark.contract("state: at any time")
@pytest.mark.parametrize("steps", [0, 2])
@each_method
def test_state_loads_before_the_first_step_and_later_and_twice(made: type[PSGD], steps: int):
    *_, saved, end = in_pair(made)
    model, optimizer = trained(made, steps, lr=0.3)
    for _ in range(2):
        restore(model, optimizer, saved)
        train(model, optimizer, 3, 5)
        identical(outcome(model, optimizer), end)


@pytest.mark.contract("state: at any time")
@each_method
def test_state_of_before_the_first_step_loads(made: type[PSGD]):
    """Into one that has stepped, which then begins anew."""
    start = copy.deepcopy([x.state_dict() for x in trained(made, 0)])
    model, optimizer = trained(made)
    end = outcome(model, optimizer)
    restore(model, optimizer, start)
    assert not any(optimizer.state.get(p) for p in model.parameters())
    train(model, optimizer, 3)
    identical(outcome(model, optimizer), end)


@pytest.mark.contract("state: at any time")
@each_method
def test_a_copy_loads_by_itself(made: type[PSGD]):
    model, optimizer, saved, end = in_pair(made)
    twin, copied = copy.deepcopy((model, optimizer))
    restore(twin, copied, saved)
    identical(outcome(model, optimizer), end)
    train(twin, copied, 3, 5)
    identical(outcome(twin, copied), end)


@pytest.mark.contract("state: at any time")
@pytest.mark.contract("torch: late parameters")
@pytest.mark.parametrize("how", ["loaded", "copied"])
@each_of_tensors
def test_groups_are_added_to_what_was_loaded_and_copied(made: type[PSGD], how: str):
    model, optimizer = trained(made)
    if how == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
    else:
        model, optimizer = copy.deepcopy((model, optimizer))
    model["late"] = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [("late", model["late"])]})
    train(model, optimizer, 3, 5)
    assert [int(optimizer.state[p]["step"]) for p in model.values()] == [5, 5, 5, 5, 2]


@pytest.mark.contract("state: at any time")
@each_method
def test_a_state_dict_is_of_one_moment(made: type[PSGD]):
    """Like torch's own it may follow later steps, but then in all its parts."""
    model, optimizer = trained(made)
    saved = optimizer.state_dict()
    then = copy.deepcopy(flat_all(saved))
    train(model, optimizer, 3, 4)
    now = flat_all(optimizer.state_dict())
    wanted = now if torch.equal(saved["state"][0]["step"], optimizer.state[model["w"]]["step"]) else then
    identical(flat_all(saved), wanted)
    assert not torch.equal(now["0/Q/0"], then["0/Q/0"])


@pytest.mark.contract("state: at any time")
@pytest.mark.parametrize("idle", ["frozen", "unused"])
@pytest.mark.parametrize("place", range(3))
@each_of_whole_models
def test_a_whole_model_with_an_idle_parameter_loads_its_own_state(made: type[PSGD], place: int, idle: str):
    """First, in the middle, last, in the first of two groups; from a file."""

    def begun() -> tuple[nn.ParameterList, list[nn.Parameter], PSGD]:
        params = nn.ParameterList(parameters((4, 3), (3, 2), (5,), (2, 2)))
        params[place].requires_grad_(idle == "unused")
        optimizer = made([{"params": params[:3]}, {"params": params[3:]}], lr=0.01, **of_rank(made, 2))
        return params, [p for i, p in enumerate(params) if i != place], optimizer

    params, used, optimizer = begun()
    run(optimizer, used, range(3))
    file = io.BytesIO()
    torch.save((params.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    twins, used_twins, resumed = begun()
    restore(twins, resumed, torch.load(file, weights_only=True))
    run(optimizer, used, range(3, 6))
    run(resumed, used_twins, range(3, 6))
    identical(outcome(twins, resumed), outcome(params, optimizer))
    assert len(resumed.state) == 3


# ---- what others keep in the state, and state that is asked for early -----------------------
@pytest.mark.contract("torch: foreign entries")
@pytest.mark.parametrize("early", [True, False], ids=["before the first step", "later"])
@each_method
def test_entries_of_others_live_beside_ours(made: type[PSGD], early: bool):
    """Through steps, saving and loading; our state begins where ours is missing."""
    plain, unaware = trained(made, 0 if early else 2)
    model, optimizer = copy.deepcopy((plain, unaware))
    for p in model.parameters():
        optimizer.state[p].update(ema=p.detach().double(), note={"step": 0.5})
    theirs = {k: v for k, v in flat_all(optimizer.state_dict()).items() if "ema" in k or "note" in k}
    resumed = made(model.named_parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(plain, unaware, 2, 4)
    train(model, resumed, 2, 4)
    ours = flat_all(resumed.state_dict())
    assert {k: v for k, v in ours.items() if "note" in k} == {k: v for k, v in theirs.items() if "note" in k}
    identical({k: v for k, v in ours.items() if "ema" in k}, {k: v for k, v in theirs.items() if "ema" in k})
    identical({k: v for k, v in ours.items() if k not in theirs}, flat_all(unaware.state_dict()))
    assert equal(list(model.parameters()), list(plain.parameters()))


@pytest.mark.contract("torch: distributed checkpoints")
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
@each_method
def test_state_that_is_asked_for_before_the_first_step_counts_no_step(made: type[PSGD], lr: float | Tensor):
    """torch makes it by a step of zero gradients and rates. The run is then the one without."""
    runs = []
    for asked in (False, True):
        model = model_of()
        model["idle"] = nn.Parameter(torch.ones(3, 2))
        optimizer = made(model.named_parameters(), lr=copy.copy(lr), weight_decay=0.1, **of_rank(made, 2))
        if asked:
            entries = get_optimizer_state_dict(model, optimizer)["state"]
            assert set(entries) == set(model) and {int(entry["step"]) for entry in entries.values()} == {0}
        run(optimizer, [p for k, p in model.items() if k != "idle"], range(3))
        optimizer.state.pop(model["idle"], None)
        runs.append(outcome(model, optimizer))
    identical(*runs)


# ---- parameters replaced in their groups ----------------------------------------------------
def replace(model: nn.ParameterDict, optimizer: PSGD, *names: str) -> None:
    """Other objects of the same values, in the model and in place in the group, as accelerate puts them there."""
    (group,) = optimizer.param_groups
    for name in names:
        i = list(model).index(name)
        assert group["params"][i] is model[name]
        model[name] = group["params"][i] = nn.Parameter(model[name].detach().clone())


@pytest.mark.contract("torch: late parameters")
@pytest.mark.parametrize("names", [["w"], list(SHAPES)], ids=["one", "all"])
@each_method
def test_parameters_replaced_before_the_first_step_are_stepped(made: type[PSGD], names: list[str]):
    ours, optimizer = trained(made, 0)
    old = dict(ours.items())
    replace(ours, optimizer, *names)
    train(ours, optimizer, 3)
    kept = model_of()
    assert all(torch.equal(p, kept[k]) and p not in optimizer.state for k, p in old.items() if k in names)
    identical(outcome(ours, optimizer), outcome(*trained(made)))


@pytest.mark.contract("torch: late parameters")
@pytest.mark.parametrize("name", ["w", "bias"])
@each_of_tensors
def test_a_parameter_replaced_later_starts_anew(made: type[PSGD], name: str):
    """The others go on; the state of the old one stays until it is deleted, as in torch's own optimizers."""
    options = scaled(made)  # else the first scales of all depend on one another
    model, optimizer = trained(made, **options)
    old, others = model[name], [p for k, p in model.items() if k != name]
    before = copy.deepcopy(optimizer.state[old])
    fresh = nn.ParameterDict({name: nn.Parameter(old.detach().clone())})
    replace(model, optimizer, name)
    train(model, optimizer, 3, 5)
    identical(flat(optimizer.state[old]), flat(before))
    assert [int(optimizer.state[p]["step"]) for p in (model[name], *others)] == [2, 5, 5, 5]
    unbroken = trained(made, 5, **options)[0]
    close(others, [p for k, p in unbroken.items() if k != name])
    if not newton(made):  # whose vectors are those of the group's step
        train(fresh, made(fresh.named_parameters(), lr=0.01, **options), 3, 5)
        close([model[name]], [fresh[name]])
    del optimizer.state[old]
    resumed = made(model_of().named_parameters(), **options)
    resumed.load_state_dict(optimizer.state_dict())
    identical(flat_all(resumed.state_dict()), flat_all(optimizer.state_dict()))


@pytest.mark.contract("torch: late parameters")
@each_of_whole_models
def test_parameters_of_a_whole_model_are_replaced_together(made: type[PSGD]):
    """One alone would be late, and is refused; all begin anew."""
    model, optimizer = trained(made)
    twin, other = copy.deepcopy((model, optimizer))
    replace(model, optimizer, "v")
    params = list(model.parameters())
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="v has its first gradient after the first step"):
        step_of(optimizer)
    assert equal(params, before)

    replace(twin, other, *SHAPES)
    train(twin, other, 3, 5)
    fresh = nn.ParameterDict([(k, nn.Parameter(x)) for k, x in zip(SHAPES, before, strict=True)])
    anew = made(fresh.named_parameters(), lr=0.01, **of_rank(made, 2))
    train(fresh, anew, 3, 5)
    assert equal(list(twin.parameters()), list(fresh.parameters()))


if __name__ == "__main__":
    resume_all(Path(sys.argv[1]))


# ---- parameters that are spread over processes ------------------------------------------------
SHARDED = """
import sys
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from psgd_torch_backend import KronNewton, Procrustes

from torch.distributed.fsdp import FullyShardedDataParallel as Flat

torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
part = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), init_device_mesh("cpu", (1,)), [Shard(0)]))
swapped = Procrustes([torch.nn.Parameter(torch.ones(4, 3))])
swapped.param_groups[0]["params"][0] = part
flat, kept = (Flat(torch.nn.Linear(3, 2), device_id=torch.device("cpu"), use_orig_params=x) for x in (False, True))
used = [
    lambda: Procrustes([part]),
    lambda: KronNewton([("w", part)]),
    swapped.step,
    lambda: Procrustes(flat.parameters()),
    lambda: KronNewton(kept.named_parameters()),
]
for use in used:
    try:
        use()
        print("taken")
    except TypeError as error:
        print(error)
model, calls = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2)), []
def averaged(state, bucket):
    calls.append(bucket.index())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
model.register_comm_hook(None, averaged)
Procrustes(model.parameters()).step(lambda: model(torch.ones(4, 3)).square().sum())
print("averaged", calls)
torch.distributed.destroy_process_group()
"""


@pytest.mark.contract("torch: distributed data")
def test_sharded_parameters_are_refused_and_replicated_ones_are_averaged(tmp_path: Path):
    """When they are given, and when they have taken the place of others."""
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "rendezvous")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    a_part, flat = "a DTensor", "a flat shard of FullyShardedDataParallel"
    wanted = [
        ("Procrustes", "parameter 0", a_part),
        ("KronNewton", "w", a_part),
        ("Procrustes", "parameter 0", a_part),
        ("Procrustes", "parameter 0", flat),
        ("KronNewton", "_fsdp_wrapped_module.weight", flat),
    ]
    *lines, last = done.stdout.splitlines()
    said = [f"{made} does not support sharded parameters, and {name} is {what}; use " for made, name, what in wanted]
    assert all(map(str.startswith, lines, said)), done.stdout + done.stderr
    # Gradients of a closure that leaves backward() to the optimizer are averaged over processes.
    assert len(lines) == len(said) and last == "averaged [0]"
