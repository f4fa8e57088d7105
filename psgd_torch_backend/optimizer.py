"""The one generic PyTorch optimizer. Its named faces, one for each registered method, are made in `__init__`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from psgd import noise, pipeline
from psgd._xp import dtype_name, real_dtype
from psgd.arrays import Factors
from psgd.methods import Method, documented
from psgd.pipeline import leaves, rebuilt
from psgd.summary import Parameter, Summary, counters, rows, summary
from psgd_torch_backend import hessian
from psgd_torch_backend._state import Stack, factor_shapes, gathered, scatter, to_entry, to_state, write
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
        if group["scanned_layers"] and self._settings(group)[1].whole:
            raise ValueError(f"{cls} has one preconditioner for all parameters, no scanned_layers; leave them out")
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
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        Hvp: Any = None,
        vector: Any = None,
        update_preconditioner: bool | None = None,
    ) -> Any:
        """One step for every parameter that has a gradient. All gradients are checked before anything changes.

        Args:
            closure: called once, for what `step` returns. Methods that fit Hessian-vector products need one that
                returns the loss, or a sequence that begins with it, and does not call `backward`: the optimizer
                differentiates it, twice where the step fits. With `exact_hessian_vector_product=False` it is called
                again at perturbed parameters, which are then put back, bit for bit, whatever it raises.
            Hvp, vector, update_preconditioner: instead of whitening, or of a closure, fit to products of the Hessian
                with a vector, as `hessian_helper` returns them: one tensor for each parameter, in the order of the
                parameters or by their names; and whether to fit at this step.
        """
        pairs = self._given_pairs(Hvp, vector, update_preconditioner)
        loss = None
        if closure is not None and self._newton() and pairs is None:
            loss, pairs = self._differentiated(closure)
        elif closure is not None:
            with torch.enable_grad():
                loss = closure()
        elif self._newton() and pairs is None:
            raise RuntimeError(
                f"{type(self).__name__} fits Hessian-vector products; call step(closure) with a closure that returns "
                "the loss, or step(Hvp=..., vector=..., update_preconditioner=...)"
            )
        ready = [(group, self._with_gradients(group)) for group in self.param_groups]
        waiting = [held for group, params in ready for held in self._step_group(group, params, pairs)]
        self._apply(waiting)
        return loss

    def _newton(self) -> bool:
        return any(self._settings(group)[1].newton for group in self.param_groups)

    def _all_named(self) -> list[tuple[str, Tensor]]:
        """Every parameter with its name: its own, or its number over all groups."""
        named, count = [], 0
        for group in self.param_groups:
            names = group.get("param_names") or [str(count + i) for i in range(len(group["params"]))]
            named += list(zip(names, group["params"], strict=True))
            count += len(group["params"])
        return named

    def _given_pairs(self, hvp: Any, vector: Any, update_preconditioner: bool | None) -> Pairs | None:
        """What was given to `step`, by parameter."""
        given = {"Hvp": hvp, "vector": vector, "update_preconditioner": update_preconditioner}
        missing = [name for name, x in given.items() if x is None]
        if len(missing) == len(given):
            return None
        cls, named = type(self).__name__, self._all_named()
        if missing:
            raise ValueError(f"{cls}: {missing[0]} is missing; Hvp, vector and update_preconditioner go together")
        columns = []
        for name, x in (("vector", vector), ("Hvp", hvp)):
            x = [x] if isinstance(x, Tensor) else x
            own = [x.get(n) for n, _ in named] if isinstance(x, dict) else list(x) if hasattr(x, "__iter__") else [x]
            shapes = [tuple(y.shape) if isinstance(y, Tensor) else None for y in own]
            if shapes != [tuple(p.shape) for _, p in named]:
                raise ValueError(f"{cls}: {name} must hold one tensor of the shape of each parameter, in their order")
            columns.append(own)
        pairs = {id(p): (v, h) for (_, p), v, h in zip(named, *columns, strict=True)}
        return Pairs(bool(update_preconditioner), pairs)

    def _differentiated(self, closure: Callable[[], Any]) -> tuple[Any, Pairs]:
        """The loss; its gradients, left in `p.grad`; and pairs (v, H v) if this step fits."""
        for _, p in self._all_named():
            p.grad = p.grad if p.requires_grad else None
        named = [(name, p) for name, p in self._all_named() if p.requires_grad]
        params = [p for _, p in named]
        fit = any(self._next_plan(group).fit for group in self.param_groups)
        exact = all(group.get("exact_hessian_vector_product", True) for group in self.param_groups)
        vectors = self._vectors(named) if fit else []
        if not fit:
            loss, grads = hessian.gradients(closure, params)
            pairs = Pairs(False, {})
        else:
            products = hessian.exact if exact else hessian.by_differences
            loss, grads, hvp = products(closure, params, vectors)
            pairs = Pairs(True, {id(p): pair for p, *pair in zip(params, vectors, hvp, strict=True)})
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        return loss, pairs

    def _age(self, group: Group) -> tuple[int, int | None]:
        """Steps of a group so far, and those after its last fit, by its first parameter that has stepped."""
        entries = [self.state[p] for p in group["params"] if self.state.get(p)]
        if not entries:
            return 0, 0
        return int(entries[0]["step"]), int(entries[0]["since"]) if "since" in entries[0] else None

    def _next_plan(self, group: Group) -> pipeline.Plan:
        age, since = self._age(group)
        return pipeline.host_plan(self._settings(group)[2], age + 1, since=None if since is None else since + 1)

    def _vectors(self, named: list[tuple[str, Tensor]]) -> list[Tensor]:
        """v of each parameter: a function of seed, step and the parameter's name."""
        keys = {id(p): self._next_plan(group).key for group in self.param_groups for p in group["params"]}
        return [hessian.vector(keys[id(p)], name, p) for name, p in named]

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
            if recipe.whole:
                self._check_member(group, name, p)
                ready.append(p)
                continue
            if kind not in expected:
                expected[kind] = factor_shapes(recipe, *_parted(p, id(p) in layered))
            if entry and "Q" in entry and [q.shape for q in entry["Q"].values()] != expected[kind]:
                raise RuntimeError(
                    f"{cls}: {name} has shape {tuple(p.shape)}, its state belongs to another; delete optimizer.state[p]"
                )
            ready.append(p)
        return ready

    def _check_member(self, group: Group, name: str, p: Tensor) -> None:
        """Is a parameter one of those that a preconditioner of all of them began with, and of the same shape?"""
        cls, entry = type(self).__name__, self.state.get(p)
        if not entry and any(self.state.get(q) for q in group["params"]):
            raise RuntimeError(
                f"{cls}: {name} has its first gradient after the first step; one preconditioner is for all parameters, "
                "so all must have one from the start, or groups of their own"
            )
        same = not entry or (len(entry["Q"]["0"]) == p.numel() and entry.get("momentum", p).shape == p.shape)
        if not same:
            raise RuntimeError(
                f"{cls}: {name} has shape {tuple(p.shape)}, its state belongs to another; delete optimizer.state[p]"
            )

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

    def _step_group(self, group: Group, params: list[Tensor], pairs: Pairs | None) -> list[Held]:
        """Step a group; what must wait for the directions of all others comes back."""
        method, recipe, tempo = self._settings(group)
        if not params:
            return []
        if recipe.whole:
            return self._step_whole(group, params, pairs)
        layered = self._layered(group)
        new = [p for p in params if "Q" not in self.state[p]]
        self._start(recipe, tempo, new, layered, method.start_scale())
        if method.start_scale() is None:
            self._scale(recipe, tempo, params, layered, pairs)
        plans: dict[Any, pipeline.Plan] = {}
        waiting: list[Held] = []
        for (age, since, *_), bucket in self._buckets(group, params, layered).items():
            if (age, since) not in plans:
                plans[age, since] = pipeline.host_plan(tempo, age, since=since)
            plan = plans[age, since] if pairs is None else plans[age, since]._replace(fit=pairs.fit)
            if since is not None:
                for p in bucket:
                    self.state[p]["since"].fill_(0 if plan.fit else since)
            waiting += self._step_bucket(group, recipe, plan, bucket, tempo.trust, id(bucket[0]) in layered, pairs)
        return waiting

    def _start(
        self, recipe: pipeline.Recipe, tempo: pipeline.Tempo, new: list[Tensor], layered: set[int], scale: Any
    ) -> None:
        """State of parameters seen for the first time. A `scale` of None is found by `_scale`."""
        for p in new:
            layers, shape = _parted(p, id(p) in layered)
            state = _fresh(recipe, p.detach().new_empty(shape), layers, scale or 1.0)
            self.state[p].update({**_counters(tempo), **to_entry(state)})

    def _scale(
        self,
        recipe: pipeline.Recipe,
        tempo: pipeline.Tempo,
        params: list[Tensor],
        layered: set[int],
        pairs: Pairs | None,
    ) -> None:
        """The automatic scale of parameters at their first step; with Hessian-vector products, at their first fit."""

        def size(g: Tensor) -> Tensor:
            return recipe.start.size(pipeline.working(recipe, g))

        due = [p for p in params if p.numel() and _unscaled(self.state[p], pairs)]
        pairs = pairs if pairs is not None and pairs.fit else None
        seen = [_gradient(p) if pairs is None else pairs.by_parameter[id(p)][1] for p in due]
        sizes = [(torch.vmap(size) if id(p) in layered else size)(x) for p, x in zip(due, seen, strict=True)]
        scales = recipe.start(sizes, tempo.damping) if due else []
        if pairs is not None and due:
            vs = [pipeline.working(recipe, pairs.by_parameter[id(p)][0]) for p in due]
            scales = [scale * boost for scale, boost in zip(scales, recipe.start.probed(vs), strict=True)]
        for p, scale in zip(due, scales, strict=True):
            state = to_state(self.state[p])
            if id(p) in layered:
                rows = [rebuilt(state, [x[k] for x in leaves(state)]) for k in range(len(p))]
                each = [pipeline.rescaled(recipe, row, s) for row, s in zip(rows, scale.expand(len(p)), strict=True)]
                write(state, Stack(each).stacked)
            else:
                write(state, pipeline.rescaled(recipe, state, scale))

    def _step_whole(self, group: Group, params: list[Tensor], pairs: Pairs | None) -> list[Held]:
        """Step a group whose parameters are one vector to their preconditioner, in the order of their names.

        The rows of the factors that belong to a parameter are its state. A parameter without a gradient counts as one
        with a gradient of zero, and stays where it is.
        """
        method, recipe, tempo = self._settings(group)
        known = [p for p in group["params"] if self.state.get(p)]
        present = {id(p) for p in known or params}
        order = sorted(((_by_part(name), p) for name, p in self._named(group) if id(p) in present), key=lambda x: x[0])
        members = [p for _, p in order]
        n = sum(p.numel() for p in members)
        if not n:
            return []
        scale = method.start_scale()
        if not known:
            like = _vector([p.detach() for p in members])
            key = torch.full((1,), pipeline.first_key(tempo), dtype=torch.int32, device=like.device)
            draws = noise.Counter(key)
            state = pipeline.init(recipe, like, scale or 1.0, draws)
            self._spread(recipe, tempo, members, state)
        entries = [self.state[p] for p in members]
        age, since = self._age(group)
        plan = pipeline.host_plan(tempo, age + 1, since=None if since is None else since + 1)
        plan = plan if pairs is None else plan._replace(fit=pairs.fit)
        state = gathered(entries)
        g = _vector([torch.zeros_like(p) if p.grad is None else p.grad for p in members])
        g = -g if group["maximize"] else g
        pair = None
        if pairs is not None and pairs.fit:
            nothing = {id(p): (torch.zeros_like(p), torch.zeros_like(p)) for p in members}  # of a frozen parameter
            vs, hs = zip(*((nothing | pairs.by_parameter)[id(p)] for p in members), strict=True)
            pair = _vector(list(vs)), _vector(list(hs))
        if scale is None and _unscaled(entries[0], pairs):
            scales = recipe.start(
                [recipe.start.size(pipeline.working(recipe, g if pair is None else pair[1]))], tempo.damping
            )
            boost = 1.0 if pair is None else recipe.start.probed([pipeline.working(recipe, pair[0])])[0]
            state = pipeline.rescaled(recipe, state, scales[0] * boost)
        numbers = [group["lr"], group["weight_decay"]]
        on = on_device(plan, g.device)
        if group["compile"]:
            on, *numbers = as_tensors(on, *numbers)
        step = self._step_of(recipe, False, (n,) if group["compile"] else None)
        u, new = step(on, *numbers, g, g, state, pair)
        scatter(entries, new)
        for entry in entries:
            entry["step"] = entry["step"] + 1
            if "since" in entry:
                entry["since"].fill_(0 if plan.fit else int(entry["since"]) + 1)
        parts = [x.reshape(p.shape) for x, p in zip(u.split([p.numel() for p in members]), members, strict=True)]
        moved = [(p.detach(), x) for p, x in zip(members, parts, strict=True) if p.grad is not None]
        return [Held(group, tempo.trust if recipe.trusted else None, *map(list, zip(*moved, strict=True)))]

    def _spread(
        self, recipe: pipeline.Recipe, tempo: pipeline.Tempo, members: list[Tensor], state: pipeline.State
    ) -> None:
        """The first state of all parameters, to each its rows."""
        sizes = [p.numel() for p in members]
        rows = zip(*(q.split(sizes) for q in state.factors.Q), strict=True)
        for p, own in zip(members, rows, strict=True):
            factors = Factors(tuple(x.clone() for x in own), tuple(x.clone() for x in state.factors.L))
            momentum = pipeline.init_momentum(recipe, p.detach())
            self.state[p].update({**_counters(tempo), **to_entry(pipeline.State(momentum, factors))})

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
        pairs: Pairs | None,
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
        for some in (slice(i, i + size) for i in range(0, count, size)):
            targets = [bucket[0].detach()[some]] if scanned else [p.detach() for p in bucket[some]]
            gradients = [_gradient(bucket[0])[some]] if scanned else [_gradient(p) for p in bucket[some]]
            batch = rebuilt(state, [x[some] for x in leaves(state)]) if many and size < count else state
            stacked = many and not scanned
            p, g = (torch.stack(xs) if stacked else xs[0] for xs in (targets, gradients))
            pair = None
            if pairs is not None and pairs.fit:
                given = [pairs.by_parameter[id(p)] for p in (bucket if scanned else bucket[some])]
                columns = [[x[some] for x in xs] if scanned else list(xs) for xs in zip(*given, strict=True)]
                pair = tuple(torch.stack(xs) if stacked else xs[0] for xs in columns)
            g = -g if group["maximize"] else g
            step = self._step_of(recipe, many, tuple(p.shape) if group["compile"] else None)
            change, new = step(plan, *numbers, p, g, batch, pair)
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
            factor = None if held.trust is None else pipeline.trust(held.trust, near)
            for p, u in zip(held.targets, held.directions, strict=True):
                u = u if factor is None else u * factor.to(u.device, real_dtype(u))
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
        lines, counted = [], 0
        for group in self.param_groups:
            (method, *_), layered = self._settings(group), self._layered(group)
            parameters = [
                Parameter(name, tuple(p.shape), dtype_name(p.dtype), id(p) in layered) for name, p in self._named(group)
            ]
            lines += [(method, row) for row in rows(method, parameters)]
            counted += counters(method, parameters, COUNTER_BYTES, each=True)
        return summary(lines, counted)

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


class Pairs(NamedTuple):
    """Pairs (v, H v) by the identity of their parameter, and whether this step fits to them."""

    fit: bool
    by_parameter: dict[int, Any]


def _counters(tempo: pipeline.Tempo) -> dict[str, Tensor]:
    """The counters of a parameter before its first step."""
    names = COUNTERS if tempo.counts else COUNTERS[:1]
    return {name: torch.zeros((), dtype=torch.int64) for name in names}


def _unscaled(entry: dict[str, Any], pairs: Pairs | None) -> bool:
    """Is the automatic scale due? At the first step, or with Hessian-vector products at the first fit."""
    if pairs is None or "since" not in entry:
        return int(entry["step"]) == 0
    return pairs.fit and int(entry["since"]) == int(entry["step"])


def _vector(tensors: list[Tensor]) -> Tensor:
    """All tensors as one vector, in the widest of their dtypes."""
    return torch.cat([x.reshape(-1) for x in tensors])


def _by_part(name: str) -> list[tuple[int, int, str]]:
    """A key that orders dotted names as nested containers are ordered, numbers by their size."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.removeprefix("parameter ").split(".")
    ]


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
    defaults = {name: f.default for name, f in settings.items() if name != "lr"} | ADAPTER_DEFAULTS
    keyword = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=x) for name, x in defaults.items()]
    first = [
        inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        inspect.Parameter("lr", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=settings["lr"].default),
    ]
    body = {
        "method": method,
        "__doc__": documented(method),
        "__module__": module,
        "__signature__": inspect.Signature([*first, *keyword]),
    }
    return type(method.title, (PSGD,), body)
