"""The one generic PyTorch optimizer; `named` makes the class of each registered method."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from psgd._xp import dtype_name
from psgd.documentation import entries, filled
from psgd.hyperparameters import Method
from psgd.recipe import Plan
from psgd.summary import Parameter, Summary, counters, parameter_costs, summary
from psgd_torch_backend import _checks as checks
from psgd_torch_backend import _groups as groups
from psgd_torch_backend import hessian
from psgd_torch_backend._arguments import ADAPTER_DEFAULTS, ADAPTER_SENTENCES, RAISES
from psgd_torch_backend._checkpoint import Loader, StateDict, plain_groups
from psgd_torch_backend._groups import Group, Named
from psgd_torch_backend._job import Job, Stepper, apply_pending, without_autocast
from psgd_torch_backend._joint import Joint
from psgd_torch_backend._nonfinite import admitted
from psgd_torch_backend._per_tensor import PerTensor
from psgd_torch_backend._settings import SettingsCache
from psgd_torch_backend._state import COUNTER_BYTES, begun
from psgd_torch_backend.hessian import Closure, OfParameters, Pairs


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

    def __init__(self, params: ParamsT | Tensor, *values: object, **hyperparameters: object) -> None:
        owner = type(self).__name__
        arguments = groups.by_position(owner, self.method, values, hyperparameters)
        if arguments.get("lr", 0) is None:
            del arguments["lr"]
        groups.drop_switches(owner, arguments)
        self._forget()
        defaults = groups.complete(owner, self.method, arguments)
        super().__init__([params] if isinstance(params, Tensor) else params, defaults)
        self._check_layer_names()

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, with its own hyperparameters where it has them, also between steps. Other keys of it stay.

        Args:
            param_group: "params", as the class takes them, and any of its arguments.

        Raises:
            ValueError: for an argument that is out of range or misspelt.
            TypeError: for parameters that the method does not take.
        """
        owner = type(self).__name__
        if isinstance(param_group, dict):
            ours, others = groups.sorted_out(self.method, param_group)
            missing = set(groups.known(self.method)) - groups.under_keys(self.method, ours).keys()
            shared = {k: v for k, v in self.defaults.items() if k in missing}
            complete = groups.complete(owner, self.method, shared | ours)
            param_group = dict.fromkeys(groups.SKIPS, 0) | others | complete
        super().add_param_group(param_group)
        try:
            job = self._job(self.param_groups[-1])
            for name, p in job.named:
                checks.check_parameter(owner, self.method, name, p)
            checks.check_layers(owner, job.named, job.layered)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    # ---- stepping ----------------------------------------------------------------------
    @torch.no_grad()
    def step(
        self,
        closure: Closure | None = None,
        *,
        Hvp: OfParameters | None = None,
        vector: OfParameters | None = None,
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
        # What can be compiled of a step `compile=True` compiles; the rest decides on the host.
        run = torch.compiler.disable(self._step) if torch.compiler.is_compiling() else self._step
        return run(closure, Hvp, vector, update_preconditioner)

    def _step(
        self,
        closure: Closure | None,
        Hvp: OfParameters | None,
        vector: OfParameters | None,
        update_preconditioner: bool | None,
    ) -> Any:
        owner, jobs = type(self).__name__, self._jobs()
        named = groups.all_named(owner, self.param_groups)
        newton = any(job.recipe.newton for job in jobs)
        pairs = Pairs.of_arguments(owner, named, Hvp, vector, update_preconditioner)
        if pairs is not None:
            checks.check_pairs(owner, pairs, named)
        loss, lent = None, list[Tensor]()
        if closure is not None and newton and pairs is None:
            loss, pairs = self._differentiated(closure, jobs, named)
        elif closure is not None:
            with torch.enable_grad():
                loss, lent = hessian.finished(closure(), [p for _, p in named])
        elif newton and pairs is None and self._rates_are_zero():
            pairs = Pairs(False, {})  # to have the state, as torch.distributed.checkpoint does before it loads
        elif newton and pairs is None:
            raise RuntimeError(
                f"{owner} fits Hessian-vector products; call step(closure) with a closure that returns "
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
        with without_autocast(p for job in jobs for p in job.params):
            ready = [job for job in jobs if job.params]
            for job in ready:
                self._plan(job)
            if self._only_makes_state(ready):
                for job in ready:
                    self._stepper(job).begin(job)
                return
            stepping = [job for job in admitted(type(self).__name__, jobs) if job.params]
            apply_pending([update for job in stepping for update in self._stepper(job)(job)])

    def _stepper(self, job: Job) -> Stepper:
        """What steps a group."""
        return self._joint if job.recipe.joint else self._per_tensor

    def _rates_are_zero(self) -> bool:
        """Is every learning rate 0?"""
        return all(group["lr"] == 0 for group in self.param_groups)

    def _only_makes_state(self, jobs: list[Job]) -> bool:
        """Is a first step to make the state and nothing else, as torch.distributed.checkpoint makes it before it loads:
        with rates of 0 and gradients of 0?
        """
        if not jobs or any(begun(self.state.get(p)) for group in self.param_groups for p in group["params"]):
            return False
        fitting = any(job.pairs is not None and job.pairs.fit for job in jobs)
        return (
            not fitting
            and self._rates_are_zero()
            and not any(bool(x.any()) for job in jobs for x in job.inputs() if not x.is_meta)
        )

    def _jobs(self, pairs: Pairs | None = None) -> list[Job]:
        """A job for each group, with all that is set in the groups checked."""
        jobs = [self._job(group, pairs) for group in self.param_groups]
        if not all(isinstance(group["scanned_layers"], bool) for group in self.param_groups):
            self._check_layer_names()
        return jobs

    def _job(self, group: Group, pairs: Pairs | None = None) -> Job:
        settings = self._settings.of(group, self.param_groups)
        named = groups.named_in(type(self).__name__, self.param_groups, group)
        ready = [p for _, p in named if p.grad is not None]
        return Job(group, *settings, self.state, named, groups.layered(group, named), ready, pairs, {}, {})

    def _plan(self, job: Job) -> None:
        """Have the plans of a group made, which may call functions that the user gave."""
        try:
            self._stepper(job).plan(job)
        except ValueError as error:
            raise ValueError(f"{error} (in {groups.place(self.param_groups, job.group)})") from error

    def _differentiated(self, closure: Closure, jobs: list[Job], named: Named) -> tuple[Any, Pairs]:
        """The loss; its gradients, left in `p.grad`; and pairs (v, H v) if this step fits."""
        for job in jobs:
            self._check_state(job)
        plans = [job.plan() for job in jobs]
        for _, p in named:
            p.grad = p.grad if p.requires_grad else None
        named = [(name, p) for name, p in named if p.requires_grad]
        vectors = self._vectors(named, plans) if any(plan.fit for plan in plans) else None
        exactly = all(group.get("exact_hessian_vector_product", True) for group in self.param_groups)
        return hessian.differentiated(closure, [p for _, p in named], vectors, exactly=exactly)

    def _vectors(self, named: Named, plans: list[Plan]) -> list[Tensor]:
        """v of each parameter: a function of seed, step and the parameter's name."""
        groups_and_plans = zip(self.param_groups, plans, strict=True)
        keys = {id(p): plan.key for group, plan in groups_and_plans for p in group["params"]}
        return [hessian.vector(keys[id(p)], name, p) for name, p in named]

    def _check_gradients(self, job: Job) -> None:
        """Can each parameter that has a gradient be stepped?"""
        owner = type(self).__name__
        if job.layered:
            checks.check_layers(owner, job.named, job.layered)
        for name, p in job.named:
            checks.check_parameter(owner, self.method, name, p)
            checks.check_gradient(owner, name, p)

    def _check_state(self, job: Job) -> None:
        """Is the state of a group that of its parameters?"""
        checks.check_state(type(self).__name__, job.named, self.state, self._stepper(job).wrong(job))

    def _check_layer_names(self) -> None:
        """Names of stacked parameters may be given for all groups; each must be in one."""
        owner, layers = type(self).__name__, [group["scanned_layers"] for group in self.param_groups]
        known = {name for group in self.param_groups for name, _ in groups.named_in(owner, self.param_groups, group)}
        checks.check_layer_names(owner, layers, known)

    # ---- looking -----------------------------------------------------------------------
    def summary(self) -> Summary:
        """What is kept of each parameter and what a step costs; `print` it, or read its rows.

        Known from the shapes, before the first step and without the state. Counters are 8 bytes each.

        Returns:
            a `psgd.summary.Summary`.
        """
        lines, counted = [], 0
        for group in self.param_groups:
            job = self._job(group)
            parameters = [
                Parameter(name, tuple(p.shape), dtype_name(p.dtype), id(p) in job.layered)
                for name, p in job.named
                if not checks.unfit(self.method, name, p)
            ]
            lines += [(job.method, row) for row in parameter_costs(job.method, parameters)]
            counted += counters(job.method, parameters, COUNTER_BYTES, each=True)
        return summary(lines, counted, max((group["skipped"] for group in self.param_groups), default=0))

    # ---- saving and copying ------------------------------------------------------------
    def state_dict(self) -> StateDict:
        """State and groups as plain data. Functions given as hyperparameters stay behind: give them again to load.

        Returns:
            a dictionary, as of any torch optimizer, that `load_state_dict` takes.
        """
        with plain_groups(self, self.method):
            return super().state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
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
        loader = Loader(type(self).__name__, self.method, self, self._job, self._stepper)
        with loader.loading(state_dict):
            super().load_state_dict(state_dict)
        self._forget()

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        for values in (self.defaults, *self.param_groups):
            for name, key in groups.renamed(self.method).items():
                if name in values:  # of before the key was another
                    values.setdefault(key, values.pop(name))
        for group in self.param_groups:
            for name, value in {**ADAPTER_DEFAULTS, **dict.fromkeys(groups.SKIPS, 0)}.items():
                group.setdefault(name, value)
        self._forget()

    def _forget(self) -> None:
        """Drop what can be made again: settings, compiled steps."""
        self._per_tensor, self._joint = PerTensor(), Joint()
        self._settings = SettingsCache(type(self).__name__, self.method)


PSGD.__doc__ = filled(PSGD.__doc__, adapter=entries(ADAPTER_SENTENCES), raises=entries(RAISES))
