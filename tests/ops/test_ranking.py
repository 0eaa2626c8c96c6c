"""Ranking by groups against numpy's plain order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.ops.ranking import first_argmax, top_indices


def random_values(length, seed=0):
    values = np.random.default_rng(seed).normal(size=(2, 3, length)).astype(np.float32)
    values[0, 0, length // 2 :] = -np.inf
    return values


@pytest.mark.parametrize("length", [1, 7, 64, 65, 128, 1000, 4096, 4097])
def test_argmax_is_that_of_jax(length):
    values = random_values(length)
    values[1, 1] = np.round(values[1, 1])  # ties: the first counts
    values[1, 2] = -np.inf
    got = jax.jit(first_argmax)(values)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, np.argmax(values, axis=-1))


@pytest.mark.parametrize(("length", "num"), [(7, 7), (65, 1), (65, 64), (1000, 5), (4096, 5), (4096, 64), (4097, 64)])
def test_top_indices(length, num):
    values = random_values(length, seed=num)
    values[0, 0] = np.arange(length)
    got = jax.jit(top_indices, static_argnums=1)(values, num)
    ranked = np.sort(values, axis=-1)[..., ::-1][..., :num]
    np.testing.assert_array_equal(np.take_along_axis(values, np.asarray(got), axis=-1), ranked)
    assert all(len(set(row)) == num for row in np.asarray(got).reshape(-1, num).tolist())


def test_many_in_one_group():
    values = np.zeros((1, 1, 640), np.float32)
    values[..., 128:192] = np.arange(1, 65)
    assert top_indices(jnp.asarray(values), 5)[0, 0].tolist() == [191, 190, 189, 188, 187]
