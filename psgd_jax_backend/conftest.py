"""Helpers of the tests fail with the values that they compare."""

import pytest

pytest.register_assert_rewrite("psgd_jax_backend._testing")
