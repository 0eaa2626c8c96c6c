import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from domino_jax.ops.sampling import (
    SamplingParams,
    choose_tokens,
    gumbel_noise,
    row_probabilities,
    scale_and_filter,
    uniform_noise,
)

ROWS, POSITIONS, VOCAB = 4, 2, 13
jit_filter = functools.cache(lambda has_filters: jax.jit(lambda x, s: scale_and_filter(x, s, has_filters)))


jit_laws = jax.jit(row_probabilities)
jit_gumbel = jax.jit(gumbel_noise, static_argnums=(2, 3))
jit_uniform = jax.jit(uniform_noise, static_argnums=2)


def make_sampling(temperature, top_k=0, top_p=1.0, min_p=0.0, seed=0, rows=ROWS):
    def full(value, dtype):
        return jnp.asarray(np.broadcast_to(value, (rows,)), dtype)

    return SamplingParams(
        temperature=full(temperature, jnp.float32),
        top_k=full(top_k, jnp.int32),
        top_p=full(top_p, jnp.float32),
        min_p=full(min_p, jnp.float32),
        seed=full(seed, jnp.uint32),
    )


def naive_kept(logits, temperature, top_k, top_p, min_p):
    """Ids that survive, one filter after the other, each on the renormalised law; ties with the last are kept."""
    scaled = np.float32(logits) / np.float32(temperature)
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    kept = order[:top_k] if top_k > 0 else order
    weights = {i: np.exp(float(scaled[i]) - float(scaled[order[0]])) for i in kept}
    total = sum(weights.values())
    nucleus, mass = [], 0.0
    for i in kept:
        if top_p < 1 and nucleus and mass >= top_p:
            break
        nucleus.append(i)
        mass += weights[i] / total
    likely = [i for i in nucleus if weights[i] >= min_p]
    return {i for i in range(len(scaled)) if scaled[i] >= min(scaled[j] for j in likely)}


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(
        st.tuples(
            st.sampled_from([0.3, 0.7, 1.0, 2.5]),
            st.sampled_from([0, 1, 2, 5, VOCAB, 99]),
            st.sampled_from([1e-6, 0.1, 0.33, 0.71, 0.93, 1.0]),
            st.sampled_from([0.0, 0.013, 0.21, 0.57, 1.0]),
        ),
        min_size=ROWS,
        max_size=ROWS,
    ),
    st.booleans(),
)
def test_filters_keep_what_a_naive_loop_keeps(seed, rows, has_ties):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(ROWS, POSITIONS, VOCAB)).astype(np.float32) * 2
    if has_ties:
        logits = np.round(logits)
    temperature, top_k, top_p, min_p = (np.array(column) for column in zip(*rows, strict=True))
    sampling = make_sampling(temperature, top_k, top_p, min_p)
    weights = np.asarray(jit_filter(True)(logits, sampling))
    laws = np.asarray(jit_laws(jnp.asarray(weights), sampling))
    for row, values in enumerate(rows):
        for position in range(POSITIONS):
            kept = set(np.flatnonzero(np.isfinite(weights[row, position])).tolist())
            assert kept == naive_kept(logits[row, position], *values)
            wanted = np.zeros(VOCAB)
            ids = sorted(kept)
            wanted[ids] = np.exp(np.float64(logits[row, position, ids]) / values[0])
            np.testing.assert_allclose(laws[row, position], wanted / wanted.sum(), rtol=2e-5, atol=1e-7)


def test_filters_that_are_off_change_nothing():
    """A row without filters reads the same in a batch where another row has some, far tails included."""
    logits = np.random.default_rng(0).normal(size=(2, 3, 4000)).astype(np.float32) * 3
    logits[:, :, -1] = -60.0
    sampling = make_sampling([0.7, 0.7], [0, 5], rows=2)
    weights = np.asarray(jit_filter(True)(logits, sampling))
    np.testing.assert_array_equal(weights[0], np.asarray(jit_filter(False)(logits, sampling))[0])
    np.testing.assert_array_equal(np.isfinite(weights[1]).sum(-1), [5, 5, 5])


def test_greedy_rows_ignore_filters_and_noise():
    logits = np.random.default_rng(1).normal(size=(ROWS, POSITIONS, VOCAB)).astype(np.float32)
    sampling = make_sampling([0.0, 1.0, 0.0, 1.0], top_k=3)
    weights = jit_filter(True)(logits, sampling)
    noise = jnp.asarray(np.random.default_rng(2).normal(size=logits.shape) * 100, jnp.float32)
    chosen = np.asarray(choose_tokens(weights, sampling, noise))
    np.testing.assert_array_equal(chosen[::2], logits.argmax(-1)[::2])
    np.testing.assert_array_equal(chosen[1::2], np.asarray(weights + noise).argmax(-1)[1::2])
    np.testing.assert_array_equal(choose_tokens(weights, sampling, None), logits.argmax(-1))
    laws = np.asarray(jit_laws(weights, sampling))
    np.testing.assert_array_equal(laws[::2], np.eye(VOCAB)[logits.argmax(-1)][::2])


def test_noise_is_a_function_of_seed_position_and_purpose():
    seeds = jnp.asarray([5, 5, 6, 2**32 - 1], jnp.uint32)
    positions = jnp.asarray([[0, 1], [1, 2], [0, 1], [0, 1]], jnp.int32)
    noise = np.asarray(jit_gumbel(seeds, positions, 7, "choice"))
    np.testing.assert_array_equal(noise[0, 1], noise[1, 0])
    distinct = {tuple(noise[i, j]) for i in range(4) for j in range(2)}
    assert len(distinct) == 7, "only seed 5 at position 1 repeats"
    for purpose in ("draft", "residual"):
        assert not np.any(np.asarray(jit_gumbel(seeds, positions, 7, purpose)) == noise)
    uniforms = {tuple(np.asarray(jit_uniform(seeds, positions, p)).ravel()) for p in ("draft", "accept")}
    assert len(uniforms) == 2


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_noise_has_its_law(vary):
    """Kolmogorov-Smirnov of neighbouring seeds, and of neighbouring positions."""
    count = 3000
    line = jnp.arange(count)
    seeds, positions = (line, jnp.zeros((count, 1))) if vary == "seed" else (jnp.zeros(count), line[:, None])
    seeds, positions = seeds.astype(jnp.uint32), positions.astype(jnp.int32)
    uniform = np.asarray(jit_uniform(seeds, positions, "accept")).ravel()
    gumbel = np.asarray(jit_gumbel(seeds, positions, 3, "choice"))
    assert uniform.min() >= 0 and uniform.max() < 1
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert stats.kstest(gumbel.ravel(), "gumbel_r").pvalue > 1e-3
    assert np.abs(np.corrcoef(np.concatenate([gumbel[:, 0].T, uniform[None]]))[np.triu_indices(4, 1)]).max() < 0.08
