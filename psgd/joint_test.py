from math import prod

import numpy as np
import pytest

from conformance.frameworks import FRAMEWORKS
from psgd import METHODS, pipeline
from psgd.joint import join, join_states, split, split_rows, split_state
from psgd.noise import Counter, key
from psgd.recipe import leaves

SHAPES = [(2, 3), (), (4,), (0, 2)]
JOINT = {name: made().recipe() for name, made in METHODS.items() if made().recipe().joint}


def arrays() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [np.asarray(random.standard_normal(shape)) for shape in SHAPES]


@pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_what_was_joined_is_split(framework):
    xs = [framework.array(x, "float32") for x in arrays()]
    vector = join(xs)
    assert tuple(vector.shape) == (11,)
    for x, y, rows in zip(xs, split(vector, SHAPES), split_rows(vector, SHAPES), strict=True):
        assert tuple(x.shape) == tuple(y.shape) and tuple(rows.shape) == (prod(x.shape),)
        assert np.array_equal(framework.numpy(x), framework.numpy(y))


@pytest.mark.parametrize("name", JOINT)
def test_a_state_is_shared_out_by_rows(name: str):
    recipe, vector = JOINT[name], join(arrays())
    state = pipeline.init(recipe, vector, 2.0, Counter(key(np, 0, 0)))
    state = state._replace(momentum=vector)
    parts = split_state(state, SHAPES)
    assert [part.factors.Q[0].shape[0] for part in parts] == [6, 1, 4, 0]
    assert [part.momentum.shape for part in parts] == SHAPES
    again = join_states(parts)
    assert all(np.array_equal(x, y) for x, y in zip(leaves(state), leaves(again), strict=True))
    assert join_states([p._replace(momentum=None) for p in parts]).momentum is None
