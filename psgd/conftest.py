"""What tests of several modules of the core share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from conformance.frameworks import FRAMEWORKS, Framework, double_precision


@pytest.fixture(params=FRAMEWORKS.values(), ids=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> Iterator[Framework]:
    """Each framework, in which float64 is kept."""
    with double_precision(request.param.name):
        yield request.param
