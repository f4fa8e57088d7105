"""Noise has the same bits everywhere, and is as random as the algorithms assume."""

from __future__ import annotations

from math import sqrt

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from conformance.frameworks import FRAMEWORKS, Framework
from psgd import noise
from psgd._xp import dtype_of, namespace

DTYPES = ("float32", "float64", "bfloat16")
PLACES = [(0, 1, "damping"), (7, 1000, "bound/0"), (2**32 - 1, 2**31 - 1, "turn/1/3")]

# Frozen: another value in this table is another trajectory of every run ever recorded.
KEYS = [-1609466903, -88672402, 1353700779]
WORDS = [
    [999448133, -763036171, 214457285, -1272501743],
    [-973131418, 34300586, -446520030, -1943838981],
    [-992936865, -1405591562, 540516521, 205773245],
]
COINS = [0.2327021360397339, 0.7734251618385315, 0.7688138484954834]
NORMALS = [
    [-0.9607542623246385, 2.232738778641765, -0.06765875086793229, -1.569683020136029],
    [0.6292263830717703, -1.5493853948756493, 0.10825400138869165, 0.06765875086793229],
    [1.630575895917168, 0.39918663012080047, -0.6359922581585634, -0.1691468771698307],
]


def numpy_normal(n: int, seed: int = 0, step: int = 1, role: str = "damping", dtype=np.float64) -> np.ndarray:
    return noise.normal(noise.key(np, seed, step), noise.role_number(role), n, dtype)


def expected(n: int, dtype: str) -> np.ndarray:
    """NumPy's numbers of the second place, in float64; a half precision is rounded from float32."""
    wide = numpy_normal(n, *PLACES[1], dtype=np.float64 if dtype == "float64" else np.float32)
    return wide.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else wide.dtype).astype(np.float64)


def key_in(framework: Framework, seed: int = 7, step: int = 1000):
    return noise.key(namespace(framework.array(np.zeros(1), "float32")), seed, step)


# ---- the same bits ----------------------------------------------------------------------
@pytest.mark.parametrize("case", range(len(PLACES)))
def test_known_answers(framework: Framework, case: int):
    seed, step, role = PLACES[case]
    key, number = key_in(framework, seed, step), noise.role_number(role)
    assert int(key[0]) == KEYS[case]
    assert [int(w) for w in noise.words(key, number, 4)] == WORDS[case]
    assert float(noise.uniform(key, role)) == COINS[case]
    normals = noise.normal(key, number, 4, dtype_of(namespace(key), "float64"))
    assert framework.numpy(normals).tolist() == NORMALS[case]


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_bits_in_every_framework(framework: Framework, dtype: str):
    dtype = framework.nearest(dtype)
    like = framework.array(np.zeros(1), dtype)
    z = noise.Counter(key_in(framework)).normal("bound/0", (10, 100), like)
    assert z.dtype == like.dtype
    assert np.array_equal(framework.numpy(z), expected(1000, dtype).reshape(10, 100))


def test_equal_bits_under_jit():
    @jax.jit
    def draw(step: jax.Array) -> list[jax.Array]:
        key = noise.key(jnp, 7, step)
        return [noise.normal(key, noise.role_number("bound/0"), 1000, getattr(jnp, d)) for d in DTYPES]

    with jax.enable_x64(True):
        for z, dtype in zip(draw(jnp.int32(1000)), DTYPES, strict=True):
            assert z.dtype == dtype and np.array_equal(np.asarray(z, np.float64), expected(1000, dtype))


def test_equal_bits_under_torch_compile():
    role = noise.role_number("bound/0")

    @torch.compile(fullgraph=True)
    def draw(key: torch.Tensor) -> list[torch.Tensor]:
        return [noise.normal(key, role, 1000, getattr(torch, d)) for d in DTYPES]

    for z, dtype in zip(draw(key_in(FRAMEWORKS["torch"])), DTYPES, strict=True):
        assert z.dtype == getattr(torch, dtype)
        assert np.array_equal(z.to(torch.float64).numpy(), expected(1000, dtype))


def test_complex_noise_is_equal_too(framework: Framework):
    draws = [
        f.numpy(noise.Counter(key_in(f)).normal("v", (100,), f.array(np.zeros(1), "complex128")))
        for f in (framework, FRAMEWORKS["numpy"])
    ]
    assert np.array_equal(*draws)


def test_step_may_be_a_number_or_an_array(framework: Framework):
    step = namespace(framework.array(np.zeros(1), "float32")).asarray(1000)
    assert int(key_in(framework, step=step)[0]) == KEYS[1]


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, KEYS[0]])
def test_seed_may_be_a_number_or_an_array(framework: Framework, seed: int):
    """As a key is, of which other keys are made."""
    xp = namespace(framework.array(np.zeros(1), "float32"))
    for shape in ((), (1,)):
        array = xp.full(shape, noise.signed(seed), dtype=xp.int32)
        assert int(noise.key(xp, array, 1000)[0]) == int(noise.key(np, seed, 1000)[0])


@pytest.mark.parametrize("seed", [0, 7, 4294967295])
def test_python_integers_give_the_bits_of_arrays(seed: int):
    """Of keys and of coins, which the host decides by."""
    for step in (0, 1, 2, 12_345, 2_147_483_647):
        key = noise.key(np, seed, step)
        assert noise.host_key(seed, step) == int(key[0])
        for role in ("fit", "balance", "side"):
            assert noise.uniform(int(key[0]), role) == float(noise.uniform(key, role))


def test_role_numbers_are_fnv_1a():
    published = {"": 0x811C9DC5, "a": 0xE40C292C, "foobar": 0xBF9CF968}
    assert {role: noise.role_number(role) & 0xFFFFFFFF for role in published} == published


def test_roles_in_use_differ():
    axes = [f"bound/{i}" for i in range(9)] + [f"turn/{i}/{k}" for i in range(9) for k in range(10)]
    roles = ["damping", "fit", "balance", "side", "U", "V", *axes]
    roles += [role + "/imaginary" for role in roles]
    assert len({noise.role_number(role) for role in roles}) == len(roles)


def test_neither_order_nor_number_of_calls_matters():
    like, key = np.zeros(()), noise.key(np, 3, 4)
    forth = noise.Counter(key)
    first, second = forth.normal("a", (50,), like), forth.normal("b", (2, 3), like)
    back = noise.Counter(key)
    assert np.array_equal(back.normal("b", (2, 3), like), second)
    assert np.array_equal(back.normal("a", (50,), like), first)
    assert np.array_equal(back.normal("a", (50,), like), first)


def test_element_depends_on_its_index_alone():
    assert np.array_equal(numpy_normal(10), numpy_normal(1000)[:10])


def test_signs_are_bits_of_the_words(framework: Framework):
    key, role = key_in(framework), noise.role_number("damping")
    n = 70  # no whole number of words
    signs = framework.numpy(noise.signs(key, role, n, dtype_of(namespace(key), "float32")))
    words = framework.numpy(noise.words(key, role, 3))
    assert signs.tolist() == [-1.0 if int(words[i // 32]) >> (31 - i % 32) & 1 else 1.0 for i in range(n)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_may_be_taken_in_parts_and_in_any_dtype(framework: Framework, dtype: str):
    dtype = framework.nearest(dtype)
    like = framework.array(np.zeros(1), dtype)
    counter = noise.Counter(key_in(framework))
    whole = counter.signs("damping", (10, 20), like)
    assert whole.dtype == like.dtype
    part = noise.signs(counter.step_key, noise.role_number("damping"), 200 - 64, like.dtype, 64)
    assert np.array_equal(framework.numpy(part), framework.numpy(whole).reshape(-1)[64:])


def test_complex_signs_lie_on_the_unit_circle():
    z = noise.Counter(noise.key(np, 0, 1)).signs("v", (1000,), np.zeros((), np.complex128))
    assert np.abs(z) == pytest.approx(np.ones(1000))
    assert len(np.unique(np.round(z, 3))) == 4


# ---- as random as assumed ---------------------------------------------------------------
def test_signs_are_fair_and_uncorrelated():
    n = 320_000
    key, role = noise.key(np, 3, 5), noise.role_number("damping")
    signs = noise.signs(key, role, n, np.float64)
    assert abs(signs.mean()) < 5 / sqrt(n)
    for lag in (1, 2, 16, 31, 32, 64, 256):
        assert abs(np.mean(signs[lag:] * signs[:-lag])) < 5 / sqrt(n - lag), lag
    assert np.abs(signs.reshape(-1, 32).mean(axis=0)).max() < 5 / sqrt(n / 32)


@pytest.mark.parametrize("first", [0, 1, 39])
def test_a_draw_may_be_taken_in_parts(framework: Framework, first: int):
    key, role = key_in(framework), noise.role_number("damping")
    whole = noise.normal(key, role, 40, dtype_of(namespace(key), "float32"))
    part = noise.normal(key, role, 40 - first, dtype_of(namespace(key), "float32"), first)
    assert np.array_equal(framework.numpy(part), framework.numpy(whole)[first:])


def test_words_are_a_bijection_of_the_counter():
    words = noise.words(noise.key(np, 0, 1), 0, 2**20)
    assert np.unique(words).size == words.size
    set_bits = [np.count_nonzero(words & np.int32(noise.signed(1 << bit))) for bit in range(32)]
    assert np.abs(np.array(set_bits) / words.size - 0.5).max() < 5 * 0.5 / sqrt(words.size)


@pytest.mark.parametrize("place", PLACES)
def test_moments(place: tuple[int, int, str]):
    n = 10**6
    z = numpy_normal(n, *place)
    # Bounds of five standard errors of the distribution itself: four bytes summed.
    power = {k: float(np.mean(z**k)) for k in (1, 2, 3, 4, 6, 8)}
    assert abs(power[1]) < 5 / sqrt(n)
    assert abs(power[2] - 1) < 5 * sqrt(1.7 / n)
    assert abs(power[3]) < 5 * sqrt(power[6] / n)
    assert abs(power[4] - 2.7) < 5 * sqrt((power[8] - 2.7**2) / n)
    assert 3.2 < np.abs(z).max() <= 510 / noise.BYTE_SUM_DEVIATION


def test_streams_are_uncorrelated():
    n = 50_000
    places = [(s, t, r) for s in (0, 1, 2**31) for t in (1, 2, 3, 256) for r in ("damping", "bound/0", "bound/1")]
    rows = np.stack([numpy_normal(n, *place) for place in places])
    for moment in (rows, rows**2):
        off = np.corrcoef(moment) - np.eye(len(places))
        assert np.abs(off).max() < 5 / sqrt(n)


@pytest.mark.parametrize("lag", [1, 2, 3, 16, 256, 4096])
def test_elements_are_uncorrelated(lag: int):
    n = 200_000
    for z in (numpy_normal(n), numpy_normal(n) ** 2):
        assert abs(np.corrcoef(z[lag:], z[:-lag])[0, 1]) < 5 / sqrt(n)


def test_successive_steps_are_uncorrelated_in_each_element():
    rows = np.stack([numpy_normal(4, step=step) for step in range(1, 5001)])
    for z in rows.T:
        assert abs(np.corrcoef(z[1:], z[:-1])[0, 1]) < 5 / sqrt(len(z))


def test_coins_are_uniform_and_fair():
    n = 4000
    coins = np.sort([float(noise.uniform(noise.key(np, 5, step), "fit")) for step in range(1, n + 1)])
    assert coins[0] >= 0 and coins[-1] < 1
    assert np.array_equal(coins * 2**24, np.round(coins * 2**24))  # 24 bits: exact in float32
    distance = np.abs(coins - (np.arange(n) + 0.5) / n).max()
    assert distance < 1.95 / sqrt(n)  # Kolmogorov-Smirnov, one in a thousand


def test_the_largest_word_is_still_below_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(noise, "words", lambda key, role, n: np.full(n, -1, np.int32))
    assert float(noise.uniform(noise.key(np, 0, 1), "fit")) == 1 - 2.0**-24


def test_complex_noise_has_unit_modulus_in_the_mean():
    n = 200_000
    z = noise.Counter(noise.key(np, 0, 1)).normal("v", (n,), np.zeros((), np.complex128))
    assert abs(np.mean(np.abs(z) ** 2) - 1) < 5 * sqrt(0.85 / n)
    assert abs(np.mean(z**2)) < 5 * sqrt(1.85 / n)  # as much real as imaginary, and independent
