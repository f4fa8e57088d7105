"""`psgd bench`: a group of commands, each of which is the function `command` of a module of the benchmarks."""

from __future__ import annotations

from functools import wraps
from typing import Any

import typer
from typer.core import TyperGroup

from conformance.cli.options import from_checkout
from conformance.terminal import known, packages

# By name: nothing here depends on them, and none is loaded that is not asked for.
BENCHMARKS = {
    "step": "benchmarks.cost.step",
    "compile": "benchmarks.cost.compiling",
    "memory": "benchmarks.cost.memory",
    "scale": "benchmarks.cost.scale",
    "train": "benchmarks.training.train",
}
WHAT = "the benchmarks are"  # only in a checkout


class Benchmarks(TyperGroup):
    """The group: it loads the module of a command when that is asked for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from_checkout("benchmarks", "bench", WHAT)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(BENCHMARKS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        known("benchmark", cmd_name, BENCHMARKS)
        with packages():
            function = from_checkout(BENCHMARKS[cmd_name], "bench", WHAT).command

        @wraps(function)
        def command(**arguments: Any) -> None:
            with packages():
                function(**arguments)

        single = typer.Typer(add_completion=False)
        single.command(cmd_name)(command)
        return typer.main.get_command(single)


app = typer.Typer(cls=Benchmarks, no_args_is_help=True, help="Time optimizers: steps, compilation, memory, scale.")
app.callback()(lambda: None)
