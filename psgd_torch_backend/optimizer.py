"""The one generic PyTorch optimizer. Its named faces, one for each registered method, are made in `__init__`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from inspect import Parameter, Signature
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from psgd import pipeline
from psgd._xp import dtype_name, real_dtype
from psgd.methods import Method, documented
from psgd.pipeline import leaves, rebuilt
from psgd.summary import Summary, row, summary
from psgd_torch_backend._state import Stack, factor_shapes, to_entry, to_state, write
from psgd_torch_backend._step import Step, as_tensors, make_step, on_device

ADAPTER_DEFAULTS: dict[str, Any] = {
    "maximize": False,
    "stack": True,
    "compile": False,
    "scanned_layers": False,
    "stack_batch_size": None,
}
# What a group may hold beside hyperparameters: its parameters, and what torch's own schedulers keep there.
NOT_HYPERPARAMETERS = frozenset(
    ["params", "param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"]
)
COUNTERS = ("step", "since")
COUNTER_BYTES = 8  # int64, on the host
KNOWN_SETTINGS = 64  # how many combinations of hyperparameters are remembered
Group = dict[str, Any]


class PSGD(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` over the pipeline of a registered method; use its subclasses.

    Args:
        params: an iterable of parameters, of (name, parameter) pairs, or of groups; every argument is legal in a group.
        maximize: ascend instead of descend.
        stack: step parameters of equal shape together (`torch.vmap`); the numbers are the same, many small
            layers are faster.
        compile: compile the step with `torch.compile`, once for each layout of parameters.
        scanned_layers: parameters that hold one layer for each entry of their first axis: the names of some, as a
            tuple, or True for all (of a group). Each layer is preconditioned by itself, as if it were a parameter.
        stack_batch_size: step at most so many layers in one call, for less memory at a time; None is all of a shape.

    State of a parameter: "step" (and "since", the steps after the last fit, where the method asks for it), "momentum"
    (its shape), "Q" and "L" with one entry a factor, keyed "0", "1", ... in the dtype that the method says.

    Raises: ValueError for hyperparameters out of range or unknown; TypeError for parameters that are not floating
    point; RuntimeError at a step for sparse gradients. State and parameters then stay as they were.
    """

    method: ClassVar[type[Method]]

    def __init__(self, params: Iterable[Any], lr: Any = None, **hyperparameters: Any) -> None:
        given = hyperparameters if lr is None else {"lr": lr, **hyperparameters}
        self._forget()
        super().__init__(params, self._complete(given))
        self._check_layer_names()

    @classmethod
    def _complete(cls, given: Group) -> Group:
        """Given hyperparameters, checked, with the defaults of the others."""
        flags = {name: given.get(name, default) for name, default in ADAPTER_DEFAULTS.items()}
        for name in ("maximize", "stack", "compile"):
            if not isinstance(flags[name], bool):
                raise ValueError(f"{cls.__name__}: {name}={flags[name]!r} must be True or False")
        size, layers = flags["stack_batch_size"], flags["scanned_layers"]
        if not (size is None or (isinstance(size, int) and not isinstance(size, bool) and size > 0)):
            raise ValueError(f"{cls.__name__}: stack_batch_size={size!r} must be None or a whole number above 0")
        if isinstance(layers, (list, set, frozenset)):
            layers = flags["scanned_layers"] = tuple(layers)
        if not (isinstance(layers, bool) or (isinstance(layers, tuple) and all(isinstance(x, str) for x in layers))):
            raise ValueError(f"{cls.__name__}: scanned_layers={layers!r} must be True, False or a tuple of names")
        for name in ("lr", "weight_decay"):
            value = given.get(name)
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"{cls.__name__}: Tensor {name} must be 1-element, not of shape {tuple(value.shape)}")
        method = cls.method.of(**{k: v for k, v in given.items() if k not in ADAPTER_DEFAULTS})
        return {f.name: _plain(getattr(method, f.name)) for f in fields(method)} | flags

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, with its own hyperparameters where it has them, also between steps."""
        if isinstance(param_group, dict):
            own = {k: v for k, v in param_group.items() if k not in NOT_HYPERPARAMETERS}
            shared = {k: v for k, v in self.defaults.items() if k not in own}
            param_group = param_group | self._complete(own | shared)
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _named(self, group: Group) -> Iterator[tuple[str, Tensor]]:
        names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
        return zip(names, group["params"], strict=True)

    def _layered(self, group: Group) -> set[int]:
        """The identities of the parameters of a group that stack layers."""
        layers = group["scanned_layers"]
        if not layers:
            return set()
        return {id(p) for name, p in self._named(group) if layers is True or name in layers}

    def _check_group(self, group: Group) -> None:
        cls, layered = type(self).__name__, self._layered(group)
        for name, p in self._named(group):
            self._check_parameter(name, p)
            if id(p) in layered and not p.ndim:
                raise ValueError(f"{cls}: {name} is a scalar and cannot stack layers; leave it out of scanned_layers")

    def _check_layer_names(self) -> None:
        """Names of stacked parameters may be given for all groups; each must be in one."""
        known = {name for group in self.param_groups for name, _ in self._named(group)}
        for group in self.param_groups:
            layers = group["scanned_layers"]
            missing = [] if isinstance(layers, bool) else [name for name in layers if name not in known]
            if missing:
                raise ValueError(
                    f"{type(self).__name__}: scanned_layers names {missing[0]!r}, which is no parameter; "
                    "give named parameters, as model.named_parameters() does"
                )

    def _check_parameter(self, name: str, p: Tensor) -> None:
        cls = type(self).__name__
        if p.layout != torch.strided:
            raise TypeError(f"{cls} does not support sparse parameters; {name} is {p.layout}: make it dense")
        if p.is_complex() and not self.method.complex_parameters:
            raise TypeError(f"{cls} does not support complex parameters; {name} is {p.dtype}: use view_as_real of it")
        if not (p.is_floating_point() or p.is_complex()):
            raise TypeError(f"{cls} needs floating-point parameters; {name} is {p.dtype}: leave it out")

    # ---- stepping ----------------------------------------------------------------------
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient. `closure`, if given, is called once for the result.

        All gradients are checked before anything changes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = [(group, self._with_gradients(group)) for group in self.param_groups]
        waiting = [held for group, params in ready for held in self._step_group(group, params)]
        self._apply(waiting)
        return loss

    def _with_gradients(self, group: Group) -> list[Tensor]:
        cls, ready, layered = type(self).__name__, [], self._layered(group)
        recipe, expected = self._settings(group)[1], {}
        for name, p in self._named(group):
            g = p.grad
            if g is None:
                continue
            if g.layout != torch.strided:
                raise RuntimeError(
                    f"{cls} does not support sparse gradients; that of {name} is {g.layout}: use a dense one"
                )
            if g.shape != p.shape:
                raise RuntimeError(
                    f"{cls}: {name} has shape {tuple(p.shape)} and a gradient of shape {tuple(g.shape)}; "
                    "call zero_grad() and backward() again after changing a parameter's shape"
                )
            entry = self.state.get(p)
            kind = (p.shape, id(p) in layered)
            if kind not in expected:
                expected[kind] = factor_shapes(recipe, *_parted(p, id(p) in layered))
            if entry and "Q" in entry and [q.shape for q in entry["Q"].values()] != expected[kind]:
                raise RuntimeError(
                    f"{cls}: {name} has shape {tuple(p.shape)}, its state belongs to another; delete optimizer.state[p]"
                )
            ready.append(p)
        return ready

    def _settings(self, group: Group) -> tuple[Method, pipeline.Recipe, pipeline.Tempo]:
        """Method, recipe and tempo of a group; made again when a value of it has changed."""
        given = {f.name: group[f.name] for f in fields(self.method) if f.name not in ("lr", "weight_decay")}
        values = tuple(given.values())
        if values not in self._known:
            method = self.method.of(**given)
            while len(self._known) >= KNOWN_SETTINGS:
                self._known.pop(next(iter(self._known)))
            self._known[values] = (method, method.recipe(), method.tempo())
        return self._known[values]

    def _step_group(self, group: Group, params: list[Tensor]) -> list[Held]:
        """Step a group; what must wait for the directions of all others comes back."""
        method, recipe, tempo = self._settings(group)
        layered = self._layered(group)
        self._start(method, recipe, tempo, [p for p in params if "Q" not in self.state[p]], layered)
        plans: dict[Any, pipeline.Plan] = {}
        waiting: list[Held] = []
        for (age, since, *_), bucket in self._buckets(group, params, layered).items():
            if (age, since) not in plans:
                plans[age, since] = pipeline.host_plan(tempo, age, since=since)
            plan = plans[age, since]
            if since is not None:
                for p in bucket:
                    self.state[p]["since"].fill_(0 if plan.fit else since)
            waiting += self._step_bucket(group, recipe, plan, bucket, tempo.trust, id(bucket[0]) in layered)
        return waiting

    def _start(
        self,
        method: Method,
        recipe: pipeline.Recipe,
        tempo: pipeline.Tempo,
        new: list[Tensor],
        layered: set[int],
    ) -> None:
        """State of parameters seen for the first time, with their automatic scale if the method has none."""

        def size(g: Tensor) -> Tensor:
            return recipe.start.size(pipeline.working(recipe, g))

        given: Any = method.start_scale()
        seen = [p for p in new if p.numel()]
        scales: dict[int, Any] = {}
        if given is None:
            sizes = [(torch.vmap(size) if id(p) in layered else size)(_gradient(p)) for p in seen]
            scales = dict(zip(map(id, seen), recipe.start(sizes, tempo.damping), strict=True))
        for p in new:
            layers, shape = _parted(p, id(p) in layered)
            state = _fresh(recipe, p.detach().new_empty(shape), layers, scales.get(id(p), given or 1.0))
            self.state[p].update({"step": torch.zeros((), dtype=torch.int64), **to_entry(state)})
            if tempo.counts:
                self.state[p]["since"] = torch.zeros((), dtype=torch.int64)

    def _buckets(self, group: Group, params: list[Tensor], layered: set[int]) -> dict[tuple[Any, ...], list[Tensor]]:
        """Parameters that step in one call, being of equal age, shape, dtype and device. All grow one step older."""
        buckets: dict[tuple[Any, ...], list[Tensor]] = {}
        for i, p in enumerate(params):
            entry = self.state[p]
            age = entry["step"] = entry["step"] + 1
            since = int(entry["since"]) + 1 if "since" in entry else None
            alone = () if group["stack"] and id(p) not in layered else (i,)
            buckets.setdefault((int(age), since, p.shape, p.dtype, p.device, *alone), []).append(p)
        return buckets

    def _step_bucket(
        self,
        group: Group,
        recipe: pipeline.Recipe,
        plan: pipeline.Plan,
        bucket: list[Tensor],
        trust: Any,
        scanned: bool,
    ) -> list[Held]:
        """Step parameters of one shape, or the layers of one parameter, in batches if the group says so."""
        state = self._gathered(bucket)
        many = scanned or len(bucket) > 1
        count = len(bucket[0]) if scanned else len(bucket)
        size = group["stack_batch_size"] or max(count, 1)
        plan, numbers = on_device(plan, bucket[0].device), [group["lr"], group["weight_decay"]]
        if group["compile"]:
            plan, *numbers = as_tensors(plan, *numbers)
        waiting: list[Held] = []
        for rows in (slice(i, i + size) for i in range(0, count, size)):
            targets = [bucket[0].detach()[rows]] if scanned else [p.detach() for p in bucket[rows]]
            gradients = [_gradient(bucket[0])[rows]] if scanned else [_gradient(p) for p in bucket[rows]]
            batch = rebuilt(state, [x[rows] for x in leaves(state)]) if many and size < count else state
            stacked = many and not scanned
            p, g = (torch.stack(xs) if stacked else xs[0] for xs in (targets, gradients))
            g = -g if group["maximize"] else g
            step = self._step_of(recipe, many, tuple(p.shape) if group["compile"] else None)
            change, new = step(plan, *numbers, p, g, batch)
            write(batch, new)
            changes = list(change.unbind()) if stacked else [change]
            if recipe.trusted:
                waiting.append(Held(group, trust, targets, changes))
            else:
                for target, part in zip(targets, changes, strict=True):
                    target.add_(part)
        return waiting

    @staticmethod
    def _apply(waiting: list[Held]) -> None:
        """Take the steps whose length is bounded as a whole."""
        directions = [u for held in waiting for u in held.directions if u.numel()]
        if not directions:
            return
        near = [u.to(directions[0].device) for u in directions]
        for held in waiting:
            factor = pipeline.trust(held.trust, near)
            for p, u in zip(held.targets, held.directions, strict=True):
                u = u * factor.to(u.device, real_dtype(u))
                p.add_(pipeline.displacement(p, u, held.group["lr"], held.group["weight_decay"]))

    def _gathered(self, bucket: list[Tensor]) -> pipeline.State:
        """The state of a bucket, to be overwritten in place: of one parameter, or the stack of them all."""
        states = [to_state(self.state[p]) for p in bucket]
        if len(bucket) == 1:
            return states[0]
        stack = self._stacks.get(id(bucket[0]))
        if stack is None or not stack.holds(states):
            stack = self._stacks[id(bucket[0])] = Stack(states)
            for p, view in zip(bucket, stack.views, strict=True):
                self.state[p].update(to_entry(view))
        return stack.stacked

    def _step_of(self, recipe: pipeline.Recipe, stacked: bool, compiled_shape: tuple[int, ...] | None) -> Step:
        key = (recipe, stacked, compiled_shape)
        if key not in self._steps:
            one = compiled_shape[1:] if compiled_shape is not None and stacked else compiled_shape
            self._steps[key] = make_step(recipe, stacked=stacked, compiled=one)
        return self._steps[key]

    # ---- looking -----------------------------------------------------------------------
    def summary(self) -> Summary:
        """What is kept of each parameter and what a step costs; `print` it, or read its rows.

        Known from the shapes, before the first step and without the state. Counters are 8 bytes each.
        """
        rows, counters = [], 0
        for group in self.param_groups:
            (method, _, tempo), layered = self._settings(group), self._layered(group)
            for name, p in self._named(group):
                dtype = dtype_name(p.dtype)
                rows.append((method, row(method, name, tuple(p.shape), dtype, scanned=id(p) in layered)))
                counters += COUNTER_BYTES * (1 + tempo.counts)
        return summary(rows, counters)

    # ---- saving and copying ------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """State and groups as plain data. Functions given as hyperparameters stay behind: give them again to load."""
        state = super().state_dict()
        groups = [{k: v for k, v in group.items() if not callable(v)} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave. Tensors keep their saved dtype, on the device of their parameter.

        Hyperparameters that were not saved, as functions of the step are not, stay this optimizer's own.
        """
        loaded: dict[str, Any] = {}
        before = [{k: v for k, v in group.items() if k in self.defaults} for group in self.param_groups]

        def capture(_: Any, final: dict[str, Any]) -> None:
            loaded.update(final)

        def place(_: Any) -> None:
            # torch has cast all state to the parameters' dtype; the factors have their own.
            saved = chain.from_iterable(group["params"] for group in loaded["param_groups"])
            own = chain.from_iterable(group["params"] for group in self.param_groups)
            for index, p in zip(saved, own, strict=True):
                if index in loaded["state"]:
                    self.state[p] = _placed(loaded["state"][index], p.device)

        # After the hooks that may still change what is loaded, and before those that want to see it.
        handles = (
            self.register_load_state_dict_pre_hook(capture),
            self.register_load_state_dict_post_hook(place, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
        for group, own in zip(self.param_groups, before, strict=True):
            group.update({k: v for k, v in own.items() if k not in group})
        self._forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """Drop what can be made again: stacks, settings, compiled steps."""
        self._stacks: dict[int, Stack] = {}
        self._known: dict[tuple[Any, ...], tuple[Method, pipeline.Recipe, pipeline.Tempo]] = {}
        self._steps: dict[Any, Step] = {}


def _parted(p: Tensor, scanned: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many layers a parameter stacks, and the shape of one."""
    split = 1 if scanned else 0
    return tuple(p.shape[:split]), tuple(p.shape[split:])


def _fresh(recipe: pipeline.Recipe, like: Tensor, layers: tuple[int, ...], scale: Any) -> pipeline.State:
    """The first state of a parameter as `like`, or of layers of it, each with its own scale or all with one."""
    state = pipeline.init(recipe, like)
    if not layers:
        return pipeline.rescaled(recipe, state, scale)
    scales = scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float64, device=like.device)
    each = [pipeline.rescaled(recipe, state, s) for s in scales.expand(layers)]
    return Stack(each).stacked if each else rebuilt(state, [x.new_empty((0, *x.shape)) for x in leaves(state)])


class Held(NamedTuple):
    """Directions that wait for those of all other parameters, and where they go."""

    group: Group
    trust: Any
    targets: list[Tensor]
    directions: list[Tensor]


def _plain(value: Any) -> Any:
    """A hyperparameter as plain data: a schedule of numbers is the tuple of them."""
    return tuple(value) if isinstance(value, tuple) else value


def _gradient(p: Tensor) -> Tensor:
    if p.grad is None:
        raise RuntimeError("a parameter lost its gradient while it was stepped")
    return p.grad


def _placed(value: Any, device: torch.device, name: str = "") -> Any:
    """A copy of a nested state on a device; counters stay on the host."""
    if isinstance(value, dict):
        return {k: _placed(v, device, k) for k, v in value.items()}
    if isinstance(value, Tensor):
        return value.detach().clone() if name in COUNTERS else value.detach().to(device, copy=True)
    return value


def face(method: type[Method], module: str) -> type[PSGD]:
    """The optimizer class of a method: its name, signature and documentation come from the method's record."""
    settings = {f.name: f for f in fields(method)}
    keyword = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=f.default) for name, f in settings.items() if name != "lr"
    ]
    flags = [Parameter(name, Parameter.KEYWORD_ONLY, default=x) for name, x in ADAPTER_DEFAULTS.items()]
    first = [
        Parameter("params", Parameter.POSITIONAL_OR_KEYWORD),
        Parameter("lr", Parameter.POSITIONAL_OR_KEYWORD, default=settings["lr"].default),
    ]
    body = {
        "method": method,
        "__doc__": documented(method),
        "__module__": module,
        "__signature__": Signature([*first, *keyword, *flags]),
    }
    return type(method.title, (PSGD,), body)
