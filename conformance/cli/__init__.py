"""The command `psgd`: compare frameworks, plan, replay recorded runs. A module a command.

Exit codes: 0 where every verdict is a pass, 1 where one is not, 2 where the command was not understood or a package is
missing. Frameworks load when a driver asks for them, so help is quick.
"""

from __future__ import annotations

from typing import Annotated

from conformance.packages import known_as, missing, releases

try:
    import typer

    from conformance.cli import bench, compare, contracts, demo, golden, methods, plan
    from conformance.terminal import console
except ImportError as error:
    package = known_as(error.name)
    if package is None:
        raise
    raise SystemExit(f"psgd: {missing(package)}") from None

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


def show_versions(wanted: bool) -> None:
    """The releases of ours and of every package."""
    if wanted:
        console().print("\n".join(" ".join(item) for item in releases().items()), markup=False)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=show_versions, is_eager=True, help="Show all versions and exit.")
    ] = False,
) -> None:
    """PSGD optimizers that are the same in PyTorch and in JAX: compare them, plan with them, time them."""


for command in (compare.compare, demo.demo, golden.golden, plan.plan, contracts.contracts):
    app.command()(command)
app.add_typer(bench.app, name="bench")
app.command()(methods.methods)


def main() -> None:
    """The entry point."""
    app(prog_name="psgd")
