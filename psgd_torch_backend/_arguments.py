"""The arguments that every class takes beside its method's, and the documentation that is made of them."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import Parameter

from psgd.documentation import Argument, documented
from psgd.hyperparameters import Method
from psgd.nonfinite import MAX_SKIPS

ADAPTER = {
    "maximize": Argument(False, "bool", "ascend instead of descend"),
    "stack": Argument(
        True,
        "bool",
        "step parameters of equal shape together (`torch.vmap`); the numbers are the same to rounding, many small "
        "layers are faster",
    ),
    "compile": Argument(
        False,
        "bool | str",
        "compile the step with `torch.compile`. True: on a CPU the passes over tensors of 32,768 numbers and more, "
        "once for all shapes, which takes seconds, or the whole step where one preconditioner is for all parameters; "
        'elsewhere as "full": the whole step, once for each layout of parameters. Where no '
        "compiler works it stays eager, with one warning. `torch.compile(optimizer.step)` changes nothing: it is not "
        "traced",
    ),
    "scanned_layers": Argument(
        False,
        "bool | tuple[str, ...]",
        "parameters that hold one layer for each entry of their first axis: the names of some, as a tuple, or True for "
        "all (of a group). Each layer is preconditioned by itself, as if it were a parameter",
    ),
    "stack_batch_size": Argument(
        None,
        "int | None",
        "step at most so many layers in one call, for less memory at a time. None: as many as have 2 million numbers "
        "of state on a CPU, and 33 million elsewhere",
    ),
    "nonfinite": Argument(
        "skip",
        "str",
        'what to do where a gradient holds a NaN or an infinity, before anything has changed: "skip" the step of all '
        'groups that say so, as if it had not been, and count it; "raise"; or "propagate", and do not look',
    ),
    "max_skips": Argument(MAX_SKIPS, "int", "the error after so many skipped steps in a row"),
}
ADAPTER_DEFAULTS = {name: argument.default for name, argument in ADAPTER.items()}
ADAPTER_SENTENCES = {name: f"{argument.doc} (default {argument.default!r})." for name, argument in ADAPTER.items()}
OTHERS = {
    "params": "an iterable of parameters, of (name, parameter) pairs, or of groups, or one parameter. Every argument "
    "is legal in a group, and what else a group holds stays in it; only a misspelt argument is refused",
    "lr": "learning rate, a number or a tensor that holds one, in [0, inf)",
    **{name: argument.doc for name, argument in ADAPTER.items()},
}
RAISES = {
    "ValueError": "for an argument that is out of range or unknown, also as the key of a group where it is misspelt.",
    "TypeError": "for parameters that the method does not take, such as sparse ones or DTensors, unless they are "
    "frozen; for more arguments by position than have a place.",
    "RuntimeError": "from `step`, for gradients that are sparse or of another shape than their parameter.",
    "FloatingPointError": "from `step`, for gradients that are not finite, as `nonfinite` and `max_skips` say.",
}
NOTE = (
    "State and parameters stay as they were where there is an error. Groups are checked at every step as they are\n"
    "here; frozen parameters may be of any kind. foreach, fused, capturable and differentiable, as torch's own\n"
    "optimizers have them, are taken where they are None or False, and have no effect."
)
EXAMPLE = """\
>>> import torch
>>> from psgd_torch_backend import {name}
>>> model, x = torch.nn.Linear(4, 3), torch.ones(8, 4)
>>> loss = lambda: (model(x) - 1).square().mean()
>>> optimizer, start = {name}(model.named_parameters(), lr=0.01), loss().item()
{steps}
>>> loss().item() < start
True
>>> print(optimizer.summary())  # doctest: +SKIP"""
STEPS = {
    False: """\
>>> for _ in range(3):
...     optimizer.zero_grad()
...     loss().backward()
...     _ = optimizer.step()""",
    True: """\
>>> for _ in range(3):
...     _ = optimizer.step(loss)""",
}


def documentation(method: type[Method], parameters: Iterable[Parameter]) -> str:
    """The docstring of a method's class, from its signature."""
    return documented(
        method,
        parameters,
        OTHERS,
        raises=RAISES,
        note=NOTE,
        example=EXAMPLE.format(name=method.title, steps=STEPS[method().recipe().newton]),
    )
