"""The one generic PyTorch optimizer; `named` makes the class of each registered method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from psgd._xp import dtype_name
from psgd.documentation import entries, filled
from psgd.hyperparameters import Method
from psgd.nonfinite import not_finite
from psgd.recipe import Plan, Recipe, Schedule
from psgd.summary import Parameter, Summary, counters, rows, summary
from psgd_torch_backend import _checkpoint as loading
from psgd_torch_backend import _groups as groups
from psgd_torch_backend import hessian
from psgd_torch_backend._arguments import ADAPTER_DEFAULTS, ADAPTER_SENTENCES, RAISES
from psgd_torch_backend._checks import COMPUTED, OURS
from psgd_torch_backend._joint import Joint
from psgd_torch_backend._per_tensor import PerTensor
from psgd_torch_backend._state import COUNTER_BYTES, begun
from psgd_torch_backend._step import Group, Job, apply_pending, finite, in_full, sharded
from psgd_torch_backend.hessian import Pairs

KNOWN_SETTINGS = 64  # how many combinations of hyperparameters are remembered
Settings = tuple[Method, Recipe, Schedule]


class PSGD(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` over the pipeline of a registered method; use its subclasses.

    Args:
        params: an iterable of parameters, of (name, parameter) pairs, or of groups, or one parameter. Every argument is
            legal in a group, and what else a group holds stays in it; only a misspelt argument is refused.
        values: arguments of the method by position: lr, and what follows it in the published order.
        hyperparameters: those of the method, by name.
        {adapter}

    State of a parameter: "step" (and "since", the steps after the last fit, where the method asks for it), "momentum"
    (its shape), "Q" and "L" with one entry a factor, keyed "0", "1", ... in the dtype that the method says, "P" as "Q"
    where it is kept. What others keep beside them stays.

    Groups are checked at every step as they are here. Frozen parameters may be of any kind, and are left alone.
    foreach, fused, capturable and differentiable, as torch's own optimizers have them, are taken where they are None or
    False, and have no effect. A first step of gradients and rates of 0, by which torch.distributed.checkpoint asks for
    the state, makes it and counts nothing.

    Raises:
        {raises}
        State and parameters then stay as they were.
    """

    method: ClassVar[type[Method]]

    def __init__(self, params: Iterable[Any] | Tensor, *values: Any, **hyperparameters: Any) -> None:
        given = groups.by_position(type(self).__name__, self.method, values, hyperparameters)
        if given.get("lr", 0) is None:
            del given["lr"]
        groups.drop_switches(type(self).__name__, given)
        self._forget()
        super().__init__([params] if isinstance(params, Tensor) else params, self._complete(given))
        self._check_layer_names()

    @classmethod
    def _names(cls) -> set[str]:
        """The keys of all that is ours in a group."""
        return set(groups.known(cls.method))

    @classmethod
    def _complete(cls, given: Group) -> Group:
        """Given hyperparameters, checked, with the defaults of the others."""
        return groups.complete(cls.__name__, cls.method, given)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, with its own hyperparameters where it has them, also between steps. Other keys of it stay.

        Args:
            param_group: "params", as the class takes them, and any of its arguments.

        Raises:
            ValueError: for an argument that is out of range or misspelt.
            TypeError: for parameters that the method does not take.
        """
        if isinstance(param_group, dict):
            own, others = groups.sorted_out(self.method, param_group)
            missing = self._names() - groups.under_keys(self.method, own).keys()
            shared = {k: v for k, v in self.defaults.items() if k in missing}
            param_group = dict.fromkeys(groups.SKIPS, 0) | others | self._complete(shared | own)
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _named(self, group: Group, first: int | None = None) -> list[tuple[str, Tensor]]:
        """The parameters of a group with their names. Without names they are numbered, from `first` where it is given.

        Raises ValueError for a group that was edited so that they do not go together.
        """
        params, names = group["params"], group.get("param_names")
        if not isinstance(params, (list, tuple)) or not all(isinstance(p, Tensor) for p in params):
            raise ValueError(f"{type(self).__name__}: params of {self._place(group)} must be a list of tensors")
        if names is None:
            names = [f"parameter {i}" if first is None else str(first + i) for i in range(len(params))]
        elif not isinstance(names, (list, tuple)) or len(names) != len(params):
            raise ValueError(
                f"{type(self).__name__}: {self._place(group)} has {len(params)} params and param_names={names!r}; "
                'give it as many names, or delete "param_names" from all groups'
            )
        return list(zip(names, params, strict=True))

    def _place(self, group: Group) -> str:
        """Where a group is."""
        place = next((i for i, own in enumerate(self.param_groups) if own is group), None)
        return "the state dict" if place is None else f"param_groups[{place}]"

    def _layered(self, group: Group) -> set[int]:
        """The identities of the parameters of a group that stack layers."""
        layers = group["scanned_layers"]
        if not layers:
            return set()
        return {id(p) for name, p in self._named(group) if layers is True or name in layers}

    def _check_group(self, group: Group) -> None:
        job = self._job(group)
        for name, p in job.named:
            self._check_parameter(name, p)
        self._check_layers(job)

    def _check_layers(self, job: Job) -> None:
        for name, p in job.named:
            if id(p) in job.layered and not p.ndim:
                raise ValueError(
                    f"{type(self).__name__}: {name} is a scalar and cannot stack layers; leave it out of scanned_layers"
                )

    def _check_layer_names(self, param_groups: list[Group] | None = None) -> None:
        """Names of stacked parameters may be given for all groups; each must be in one."""
        param_groups = self.param_groups if param_groups is None else param_groups
        known = {name for group in param_groups for name, _ in self._named(group)}
        for group in param_groups:
            layers = group["scanned_layers"]
            missing = [] if isinstance(layers, bool) else [name for name in layers if name not in known]
            if missing:
                raise ValueError(
                    f"{type(self).__name__}: scanned_layers names {missing[0]!r}, which is no parameter; "
                    "give named parameters, as model.named_parameters() does"
                )

    def _check_parameter(self, name: str, p: Tensor) -> None:
        """Refuse a parameter that cannot be stepped. One that is frozen may be anything: it is left alone."""
        if is_lazy(p):
            raise ValueError(
                f"{type(self).__name__}: {name} has no shape yet, being of a lazy module; run a forward pass first"
            )
        wrong = self._unfit(name, p) if p.requires_grad or p.grad is not None else ""
        if wrong:
            raise TypeError(f"{type(self).__name__}{wrong}")

    def _unfit(self, name: str, p: Tensor) -> str:
        """Why a parameter cannot be stepped, after the name of the class; or ""."""
        if p.layout != torch.strided:
            return f" does not support sparse parameters; {name} is {p.layout}: make it dense"
        if p.is_complex() and not self.method.complex_parameters:
            return f" does not support complex parameters; {name} is {p.dtype}: use view_as_real of it"
        if not (p.is_floating_point() or p.is_complex()):
            return f" needs floating-point parameters; {name} is {p.dtype}: leave it out"
        if p.dtype not in COMPUTED:
            return f" cannot compute in {p.dtype}, which {name} is in; keep it in a wider dtype"
        part = sharded(p)
        if part:
            return (
                f" does not support sharded parameters, and {name} is {part}; use DistributedDataParallel, or "
                "ZeroRedundancyOptimizer for methods with a preconditioner for each parameter"
            )
        if any(step == 0 and n > 1 for step, n in zip(p.stride(), p.shape, strict=True)):
            return f": {name} is expanded, so that its numbers share memory; give a copy of it, contiguous"
        return ""

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
            closure: called once, for what `step` returns. Where it returns a loss and no parameter has a gradient, as
                in psgd_torch's programs, which leave `backward()` out, the optimizer differentiates the loss, steps,
                and sets the gradients to None again. Methods that fit Hessian-vector products need one that
                returns the loss, or a sequence that begins with it, and does not call `backward`: the optimizer
                differentiates it, twice where the step fits. With `exact_hessian_vector_product=False` it is called
                again at perturbed parameters, which are then put back, bit for bit, whatever it raises. It must then
                be one function of the parameters: torch's generators, of the CPU and of the parameters' devices,
                start at the second call where they did at the first, so that dropout has one mask; what a forward
                pass changes, such as the running statistics of BatchNorm, changes twice, and the generators of
                Python, of NumPy and of your own go on.
            Hvp: instead of whitening, or of a closure, fit to products of the Hessian with a vector, as
                `hessian_helper` returns them: one tensor for each parameter, in the order of the parameters or by
                their names.
            vector: that vector, in the same form.
            update_preconditioner: whether to fit at this step.

        Returns:
            what the closure returned; None without one.

        Raises:
            ValueError: for products that do not go with the parameters; for a value in a group, or of a schedule, that
                the constructor refuses.
            RuntimeError: for gradients that are sparse or of another shape than their parameter; for a closure that
                does not return a loss where one is needed.
            FloatingPointError: for gradients that are not finite, as `nonfinite` and `max_skips` say.
        """
        given = {"Hvp": Hvp, "vector": vector, "update_preconditioner": update_preconditioner}
        # What can be compiled of a step `compile=True` compiles; the rest decides on the host.
        run = torch.compiler.disable(self._step) if torch.compiler.is_compiling() else self._step
        return run(closure, given)

    def _step(self, closure: Callable[[], Any] | None, given: dict[str, Any]) -> Any:
        jobs, named = self._jobs(), self._all_named()
        newton = any(job.recipe.newton for job in jobs)
        pairs = Pairs.given(type(self).__name__, named, **given)
        if pairs is not None:
            self._check_pairs(pairs, named)
        loss, lent = None, list[Tensor]()
        if closure is not None and newton and pairs is None:
            loss, pairs = self._differentiated(closure, jobs, named)
        elif closure is not None:
            with torch.enable_grad():
                loss, lent = hessian.finished(closure(), [p for _, p in named])
        elif newton and pairs is None and self._still():
            pairs = Pairs(False, {})  # to have the state, as torch.distributed.checkpoint does before it loads
        elif newton and pairs is None:
            raise RuntimeError(
                f"{type(self).__name__} fits Hessian-vector products; call step(closure) with a closure that returns "
                "the loss, or step(Hvp=..., vector=..., update_preconditioner=...)"
            )
        try:
            # A closure may have changed gradients and groups.
            self._advance([job._replace(pairs=pairs) for job in jobs] if closure is None else self._jobs(pairs))
        finally:
            for p in lent:
                p.grad = None
        return loss

    def _advance(self, jobs: list[Job]) -> None:
        """Step the groups on the gradients there are. All that may be refused is refused before anything changes."""
        for job in jobs:
            self._check_gradients(job)
            self._check_state(job)
        with in_full(p for job in jobs for p in job.params):
            ready = [job for job in jobs if job.params]
            for job in ready:
                self._plan(job)
            if self._empty(ready):
                for job in ready:
                    self._kind(job).begin(job)
                return
            admitted = [job for job in self._admitted(jobs) if job.params]
            apply_pending([held for job in admitted for held in self._kind(job)(job)])

    def _kind(self, job: Job) -> PerTensor | Joint:
        """What steps a group."""
        return self._joint if job.recipe.joint else self._per_tensor

    def _still(self) -> bool:
        """Is every learning rate 0?"""
        return all(group["lr"] == 0 for group in self.param_groups)

    def _empty(self, jobs: list[Job]) -> bool:
        """Is a first step to make the state and nothing else, as torch.distributed.checkpoint makes it before it loads:
        with rates of 0 and gradients of 0?
        """
        if not jobs or any(begun(self.state.get(p)) for group in self.param_groups for p in group["params"]):
            return False
        fitting = any(job.pairs is not None and job.pairs.fit for job in jobs)
        return (
            not fitting
            and self._still()
            and not any(bool(x.any()) for job in jobs for x in job.seen() if not x.is_meta)
        )

    def _admitted(self, jobs: list[Job]) -> list[Job]:
        """The groups that step: without those that skip, where one of them has a gradient that is not finite."""
        looking = [job for job in jobs if job.group["nonfinite"] != "propagate"]
        if finite([x for job in looking for x in job.seen()]):
            for job in looking:
                job.group["skipped_in_a_row"] = 0
            return jobs
        cls = type(self).__name__
        bad = [(job, name) for job in looking for name in job.not_finite()]
        strict = [name for job, name in bad if job.group["nonfinite"] == "raise"]
        if strict:
            raise FloatingPointError(not_finite(cls, strict[0]))
        skipping = [job for job in looking if job.group["nonfinite"] == "skip"]
        for job in skipping:
            for name in groups.SKIPS:
                job.group[name] = job.group.get(name, 0) + 1
        stuck = next((job.group for job in skipping if job.group["skipped_in_a_row"] >= job.group["max_skips"]), None)
        if stuck is not None:
            raise FloatingPointError(
                f"{cls}: {stuck['skipped_in_a_row']} steps in a row had a gradient that is not finite, this one of "
                f"{bad[0][1]}; lower the learning rate, or go back to a checkpoint"
            )
        return [job for job in jobs if job.group["nonfinite"] != "skip"]

    def _jobs(self, pairs: Pairs | None = None) -> list[Job]:
        """The groups, with all that is set in them looked at."""
        jobs = [self._job(group, pairs) for group in self.param_groups]
        if not all(isinstance(group["scanned_layers"], bool) for group in self.param_groups):
            self._check_layer_names()
        return jobs

    def _job(self, group: Group, pairs: Pairs | None = None) -> Job:
        settings, named = self._settings(group), self._named(group)
        ready = [p for _, p in named if p.grad is not None]
        return Job(group, *settings, self.state, named, self._layered(group), ready, pairs, {}, {})

    def _plan(self, job: Job) -> None:
        """Have the plans of a group made, which may call functions that the user gave."""
        try:
            self._kind(job).plan(job)
        except ValueError as error:
            raise ValueError(f"{error} (in {self._place(job.group)})") from error

    def _all_named(self) -> list[tuple[str, Tensor]]:
        """Every parameter with its name: its own, or its number over all groups."""
        named: list[tuple[str, Tensor]] = []
        for group in self.param_groups:
            named += self._named(group, len(named))
        return named

    def _differentiated(
        self, closure: Callable[[], Any], jobs: list[Job], named: list[tuple[str, Tensor]]
    ) -> tuple[Any, Pairs]:
        """The loss; its gradients, left in `p.grad`; and pairs (v, H v) if this step fits."""
        for job in jobs:
            self._check_state(job)
        plans = [job.plan() for job in jobs]
        for _, p in named:
            p.grad = p.grad if p.requires_grad else None
        named = [(name, p) for name, p in named if p.requires_grad]
        params = [p for _, p in named]
        fit = any(plan.fit for plan in plans)
        exact = all(group.get("exact_hessian_vector_product", True) for group in self.param_groups)
        vectors = self._vectors(named, plans) if fit else []
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

    def _vectors(self, named: list[tuple[str, Tensor]], plans: list[Plan]) -> list[Tensor]:
        """v of each parameter: a function of seed, step and the parameter's name."""
        pairs = zip(self.param_groups, plans, strict=True)
        keys = {id(p): plan.key for group, plan in pairs for p in group["params"]}
        return [hessian.vector(keys[id(p)], name, p) for name, p in named]

    def _check_gradients(self, job: Job) -> None:
        """Can each parameter that has a gradient be stepped?"""
        cls = type(self).__name__
        if job.layered:
            self._check_layers(job)
        for name, p in job.named:
            self._check_parameter(name, p)
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
            if not g.is_floating_point() and not (g.is_complex() and p.is_complex()):
                raise RuntimeError(f"{cls}: {name} is {p.dtype}, its gradient {g.dtype}; give one of its own dtype")

    def _check_pairs(self, pairs: Pairs, named: list[tuple[str, Tensor]]) -> None:
        """Can each parameter be fitted to the pair that was given for it?"""
        cls = type(self).__name__
        for name, p in named:
            pair = pairs.by_parameter[id(p)] if p.requires_grad or p.grad is not None else ()
            for what, x in zip(("vector", "Hvp"), pair, strict=False):
                if x.layout != torch.strided or x.device != p.device or (x.is_complex() and not p.is_complex()):
                    raise ValueError(
                        f"{cls}: {what} of {name} is {x.dtype}, {x.layout}, on {x.device}; give a dense tensor such as "
                        f"the parameter, which is {p.dtype} on {p.device}"
                    )

    def _check_state(self, job: Job) -> None:
        """Is the state that there is that of the parameters?"""
        cls = type(self).__name__
        for name, p in job.named:
            if not isinstance(self.state.get(p, {}), dict):
                raise RuntimeError(f"{cls}: the state of {name} is no dictionary; delete optimizer.state[p]")
        for name, wrong in self._kind(job).wrong(job):
            if wrong:
                raise RuntimeError(f"{cls}: {name} {wrong}")

    def _settings(self, group: Group) -> Settings:
        """Method, recipe and schedule of a group, whose values are checked; made again when one of them has changed."""
        cls = type(self).__name__
        for name, key in self._renamed.items():
            if name in group:
                raise ValueError(f"{cls}: a group calls {name} {key!r}; set that, and delete {name!r}")
        lost = groups.missing(self.method, group)
        if lost:
            raise ValueError(f"{cls}: {self._place(group)} has lost its {lost!r}; add groups by add_param_group alone")
        key = groups.key_of(group[name] for name in self._keys)
        settings = None if key is None else self._known.get(key)
        try:
            groups.check_rates(self.method, group)
            return self._made(group, key) if settings is None else settings
        except ValueError as error:
            raise ValueError(f"{error} (in {self._place(group)})") from error

    def _made(self, group: Group, key: Any) -> Settings:
        """What `_settings` gives, checked as the constructor checks it, and remembered under a key."""
        self._complete({name: group[name] for name in self._names()})
        own = {name: group[name] for name in groups.keys(self.method) if name not in ("lr", "weight_decay")}
        method = groups.method_of(self.method, groups.watched(self.method, own))
        settings = method, method.recipe(), method.schedule()
        if group["scanned_layers"] and settings[1].joint:
            raise ValueError(
                f"{type(self).__name__} has one preconditioner for all parameters, no scanned_layers; leave them out"
            )
        if key is not None:
            while len(self._known) >= KNOWN_SETTINGS:
                self._known.pop(next(iter(self._known)))
            self._known[key] = settings
        return settings

    # ---- looking -----------------------------------------------------------------------
    def summary(self) -> Summary:
        """What is kept of each parameter and what a step costs; `print` it, or read its rows.

        Known from the shapes, before the first step and without the state. Counters are 8 bytes each.

        Returns:
            a `psgd.summary.Summary`.
        """
        lines, counted = [], 0
        for group in self.param_groups:
            (method, *_), layered = self._settings(group), self._layered(group)
            parameters = [
                Parameter(name, tuple(p.shape), dtype_name(p.dtype), id(p) in layered)
                for name, p in self._named(group)
                if not self._unfit(name, p)
            ]
            lines += [(method, row) for row in rows(method, parameters)]
            counted += counters(method, parameters, COUNTER_BYTES, each=True)
        return summary(lines, counted, max((group["skipped"] for group in self.param_groups), default=0))

    # ---- saving and copying ------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """State and groups as plain data. Functions given as hyperparameters stay behind: give them again to load.

        Returns:
            a dictionary, as of any torch optimizer, that `load_state_dict` takes.
        """

        def strip(_: Any, state: dict[str, Any]) -> None:
            state["param_groups"] = [
                {"method": self.method.name, **{k: v for k, v in group.items() if not callable(v)}}
                for group in state["param_groups"]
            ]

        # Before the hooks that may want to write it down.
        handle = self.register_state_dict_post_hook(strip, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave. Tensors keep their saved dtype, on the device of their parameter.

        Where both sides name their parameters, and name the same ones, state goes to the parameter of its name
        ("module" and "_orig_mod", which wrappers put into names, apart); else to the parameter in its place, as in
        torch. Names that were saved go on. Hyperparameters that were not saved, as functions of the step are not, stay
        this optimizer's own. A parameter without an entry begins anew at its next gradient.

        Args:
            state_dict: of an optimizer of the same class, over parameters of the same shapes.

        Raises:
            ValueError: naming the first fault, where the state is that of other parameters or another optimizer, or
                spoilt; everything then stays as it was.
        """
        cls = type(self).__name__
        loaded: dict[Any, Any] = {}

        def capture(_: Any, final: dict[str, Any]) -> dict[str, Any]:
            wrong = loading.wrong_form(final)
            if wrong:
                raise ValueError(f"{cls}: the state dict {wrong}; nothing was loaded")
            if not loading.alike(self.param_groups, final):
                return final  # torch refuses it
            final = loading.in_words(final)
            final["param_groups"], entries = self._groups_to_load(final)
            entries = {p: loading.placed(entry, p.device) for p, entry in entries.items()}
            known = {index for group in final["param_groups"] for index in group["params"]}
            loaded.update({key: x for key, x in final["state"].items() if key not in known} | entries)
            # Without the state, which torch would cast to the parameters' dtype; the factors have their own.
            return {**final, "state": {}}

        def place(_: Any) -> None:
            self.state.update(loaded)

        if not hasattr(state_dict, "copy"):
            raise ValueError(f"{cls}: the state dict is {type(state_dict).__name__} and no dictionary")

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
        self._forget()

    def _groups_to_load(self, saved: dict[str, Any]) -> tuple[list[Group], dict[Tensor, Any]]:
        """Saved groups, completed by what was not saved, and the saved state of each parameter; or an error."""
        loaded = self._completed(saved)
        places = loading.places(self.param_groups, loaded)
        indices = [[loaded[i]["params"][k] for i, k in own] for own in places]
        if all(group.get("param_names") for group in loaded):
            names = [[loaded[i]["param_names"][k] for i, k in own] for own in places]
            for group, own in zip(loaded, names, strict=True):
                group["param_names"] = own
        pairs = zip(self.param_groups, indices, strict=True)
        at = {p: index for group, own in pairs for p, index in zip(group["params"], own, strict=True)}
        entries = {p: saved["state"][index] for p, index in at.items() if index in saved["state"]}
        filled = [{**theirs, "params": own["params"]} for own, theirs in zip(self.param_groups, loaded, strict=True)]
        for i, group in enumerate(filled):
            self._check_loaded(group, entries, {k for k, _ in places[i]} - {i})
        self._check_layer_names(filled)
        return [{**group, "params": own} for group, own in zip(loaded, indices, strict=True)], entries

    def _completed(self, saved: dict[str, Any]) -> list[Group]:
        """Saved groups, completed by what was not saved; refused if they are of another optimizer."""
        cls, names, loaded = type(self).__name__, self._names(), []
        for own, theirs in zip(self.param_groups, saved["param_groups"], strict=True):
            given = groups.under_keys(self.method, theirs)
            method = given.pop("method", None)
            strange = [k for k in given if k not in names and k not in groups.OF_TORCH]
            unsigned = method is None and strange and not groups.keys(self.method).keys() <= given.keys()
            if unsigned or method not in (None, self.method.name):
                what = f"has {strange[0]!r} in its groups" if unsigned else f"is of {method}"
                raise ValueError(f"{cls}: the state dict is of another optimizer, it {what}; nothing was loaded")
            # Some writers make lists of tuples, and functions are not saved.
            given = {k: tuple(v) if k in names and isinstance(v, list) else v for k, v in given.items()}
            given = {k: v for k, v in given.items() if k != "param_names" or v is not None}
            stays = names | {"param_names", *groups.SKIPS}
            kept = {k: v for k, v in own.items() if k in stays or callable(v)}
            loaded.append(kept | given)
        return loaded

    def _check_loaded(self, group: Group, entries: dict[Tensor, Any], strangers: set[int]) -> None:
        """Is saved state that of the parameters of a group as it is to be? strangers: other groups that it is from."""
        cls = type(self).__name__
        job = self._job(group)._replace(state=entries)
        self._check_layers(job)
        for name, p in job.named:
            entry, wrong = entries.get(p, {}), ""
            if not isinstance(entry, dict):
                wrong = f"has {type(entry).__name__} for its state in the state dict"
            elif OURS & entry.keys():
                try:
                    wrong = loading.wrong_entry(job, p, entry, self._kind(job).forms(job, p))
                except ValueError as error:  # there are no factors for so few numbers
                    wrong = f"has a state that cannot be: {error}"
            if wrong:
                raise ValueError(f"{cls}: {name} {wrong}; nothing was loaded")
        if strangers and job.recipe.joint:
            raise ValueError(
                f"{cls}: param_groups[{min(strangers)}] of the state dict has parameters of another group here, and "
                "one preconditioner is for all of a group; group them as they were; nothing was loaded"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for held in (self.defaults, *self.param_groups):
            for name, key in groups.renamed(self.method).items():
                if name in held:  # of before the key was another
                    held.setdefault(key, held.pop(name))
        for group in self.param_groups:
            for name, value in {**ADAPTER_DEFAULTS, **dict.fromkeys(groups.SKIPS, 0)}.items():
                group.setdefault(name, value)
        self._forget()

    def _forget(self) -> None:
        """Drop what can be made again: stacks, settings, compiled steps."""
        self._per_tensor, self._joint = PerTensor(), Joint()
        self._renamed = groups.renamed(self.method)
        self._keys = [key for key in groups.known(self.method) if key not in ("lr", "weight_decay")]
        self._known: dict[Any, Settings] = {}


PSGD.__doc__ = filled(PSGD.__doc__, adapter=entries(ADAPTER_SENTENCES), raises=entries(RAISES))
