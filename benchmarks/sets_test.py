"""The sets have the shapes of what they are named after, and gradients of modest condition."""

from math import prod

import numpy as np
import pytest
import torch

from benchmarks.sets import GPT, GPTS, SETS, ParameterSet, alike


def test_a_gpt_has_the_shapes_of_transformer_layers():
    shapes = SETS["gpt-4x256"].shapes
    assert len(shapes) == 2 + 4 * 12 + 2 and alike(shapes)[256,] == 4 * (4 + 2) + 2
    assert {s: n for s, n in alike(shapes).items() if len(s) == 2} == {
        (8192, 256): 1,
        (768, 256): 4,
        (256, 256): 4 + 1,
        (1024, 256): 4,
        (256, 1024): 4,
    }
    model = torch.nn.TransformerEncoderLayer(256, nhead=4, dim_feedforward=1024)
    assert sorted(tuple(p.shape) for p in model.parameters()) == sorted(shapes[2:14])


@pytest.mark.parametrize(
    ("name", "numbers", "tensors"),
    [
        ("gpt-12x768", 124_439_808, 148),  # the published counts of GPT-2 small
        ("resnet-18", 11_689_512, 62),  # and of ResNet-18
        ("400-small", 40 * (256 + 2 * 512 + 1024 + 2 * 2048 + 4096 + 112), 400),
        ("embedding", 25_600_000, 1),
    ],
)
def test_sets_are_as_large_as_what_they_are_named_after(name, numbers, tensors):
    assert (SETS[name].numbers, len(SETS[name].shapes)) == (numbers, tensors)


def test_convolutions_are_tensors_of_four_axes():
    assert sum(len(s) == 4 for s in SETS["resnet-18"].shapes) == 20


def test_training_takes_six_operations_a_parameter_and_token_and_attention_on_top():
    gpt = GPT(layers=2, width=4, vocabulary=16, context=8)
    parameters = sum(map(prod, gpt.shapes()))
    scores_and_values = 2 * (2 * gpt.context * gpt.width)  # of a token, forwards, in a layer
    assert gpt.training_flops(10) == 10 * (6 * parameters + 3 * gpt.layers * scores_and_values)
    assert 7e8 < GPTS["gpt-12x768"].training_flops(1) < 1e9


def test_gradients_differ_and_have_a_scale_for_every_index(tmp_path):
    made = ParameterSet("", ((2, 3), (5,), (64, 2048)), "", pool=3)
    made.write_gradients(tmp_path / "g.npy")
    pool = np.load(tmp_path / "g.npy")
    assert pool.dtype == np.float32 and pool.shape == (3, made.numbers) and len(np.unique(pool)) > 0.9 * pool.size
    rms = np.sqrt(np.square(pool[:, 11:].reshape(3, 64, 2048)).mean((0, 2)))
    assert 4 < rms.max() / rms.min() < 1.5 * np.exp(2)


@pytest.mark.parametrize("name", SETS)
def test_tiny_sets_have_the_same_kinds_of_tensors(name):
    tiny = SETS[name].tiny()
    assert {len(s) for s in tiny.shapes} <= {len(s) for s in SETS[name].shapes} and tiny.numbers < 50_000
    assert set(alike(tiny.shapes).values()) == {2}
