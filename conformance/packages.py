"""The packages that this one runs with: what each is called where it is installed from, its release, what brings it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from platform import python_version
from typing import NamedTuple

from psgd import __version__


class Package(NamedTuple):
    """distribution: its name for pip. extra: of ours, that asks for it; none where ours always needs it."""

    distribution: str
    extra: str = ""


PACKAGES = {  # by the name that is imported
    "numpy": Package("numpy"),
    "array_api_compat": Package("array-api-compat"),
    "torch": Package("torch", "torch"),
    "jax": Package("jax", "jax"),
    "jaxlib": Package("jaxlib", "jax"),
    "optax": Package("optax", "jax"),
    "typer": Package("typer", "cli"),
    "rich": Package("rich", "cli"),
    "sklearn": Package("scikit-learn", "cli"),
    "matplotlib": Package("matplotlib", "report"),
    "array_api_strict": Package("array-api-strict", "test"),
    "pytest": Package("pytest", "test"),
}
NOT_INSTALLED = "not installed"


def release(distribution: str) -> str:
    """The version of a distribution."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return NOT_INSTALLED


def releases() -> dict[str, str]:
    """Of ours, of Python, and of every package."""
    versions = {"psgd": __version__, "python": python_version()}
    return versions | {package.distribution: release(package.distribution) for package in PACKAGES.values()}


def is_there(name: str) -> bool:
    """Can a package be imported? It is not loaded."""
    return find_spec(name) is not None


def known_as(module: str | None) -> Package | None:
    """The package that a module such as `jax.numpy` is of."""
    return PACKAGES.get((module or "").partition(".")[0])


def missing(package: Package) -> str:
    """That a package is not installed, and the remedy: ours is on no index, so its extras need a checkout."""
    extra = f", or in a checkout: pip install -c constraints.txt '.[{package.extra}]'" if package.extra else ""
    return f"{package.distribution} is not installed; pip install {package.distribution}{extra}"
