"""The floor counts the products that counting by hand finds."""

import pytest

from benchmarks.cost import floor
from benchmarks.cost.floor import Recorder, of_step
from psgd.cost import ShapeTracer


def test_what_is_multiplied_is_written_down_and_a_solve_is_half_a_product():
    xp = Recorder()
    a, b, v = (ShapeTracer(shape, "float32", xp) for shape in ((5, 2, 3), (3, 4), (4,)))
    _ = a @ b, b @ v, (a @ b) @ v
    xp.linalg.solve(ShapeTracer((3, 3), "float32", xp), b)
    assert xp.products == {(5, 2, 3, 4): 2, (1, 3, 4, 1): 1, (5, 2, 4, 1): 1, (1, 3, 3, 4): 0.5}
    assert floor.flops([(*k, n) for k, n in xp.products.items()]) + 0 == xp.flops


@pytest.mark.parametrize("count", [1, 6])
def test_a_step_without_a_fit_multiplies_by_two_factors_and_their_adjoints(count):
    """Q' Q on either side of a square matrix: four products, in whichever order; of equal tensors in one call."""
    products = of_step("kron", {}, [(8, 8)] * count, "float32", fit=False)
    assert products == [(count, 8, 8, 8, 4.0)]


def test_a_fit_adds_to_it_and_vectors_multiply_nothing():
    shapes = [(8, 4), (7,)]
    rest, fit = (of_step("kron", {}, shapes, "float32", fit=fit) for fit in (False, True))
    assert floor.flops(fit) > 2 * floor.flops(rest) > 0
    assert rest == of_step("kron", {}, shapes[:1], "float32", fit=False)


def test_one_preconditioner_of_all_parameters_is_one_vector():
    products = of_step("low_rank_approximation", {"uvd_rank_of_approximation": 3}, [(4, 5), (6,)], "float32", fit=False)
    assert products and all(26 in sides for sides in products)


def test_the_kernel_of_a_convolution_is_one_axis():
    """Its two factors are formed, 3 x 3 each, and act as one of 9 x 9; the axis before is multiplied in one product."""
    products = of_step("kron", {}, [(16, 32, 3, 3)], "float32", fit=False)
    assert (16, 32, 9, 9, 1.0) in products and (1, 144, 32, 32, 1.0) in products
    assert sum(often for *_, k, n, often in products if k == n == 3) == 2.0
