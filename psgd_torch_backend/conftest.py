"""Every method, as fixtures."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("psgd_torch_backend._testing")

from psgd_torch_backend import PSGD
from psgd_torch_backend._testing import CLASSES, OF_TENSORS, WHOLE


@pytest.fixture(params=CLASSES.values(), ids=CLASSES)
def optimizer_class(request: pytest.FixtureRequest) -> type[PSGD]:
    return request.param


@pytest.fixture(params=WHOLE.values(), ids=WHOLE)
def whole_class(request: pytest.FixtureRequest) -> type[PSGD]:
    """A method with one preconditioner for all parameters."""
    return request.param


@pytest.fixture(params=OF_TENSORS.values(), ids=OF_TENSORS)
def tensor_class(request: pytest.FixtureRequest) -> type[PSGD]:
    """A method with a preconditioner for each parameter."""
    return request.param
