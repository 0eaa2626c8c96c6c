import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from domino_jax.ops.verification import (
    accept_by_ratio,
    accept_equal,
    count_leading,
    first_stop,
    sample_law,
    write_rows,
)

ROWS, DRAFTS, VOCAB = 4, 3, 5
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
jit_ratio, jit_equal = jax.jit(accept_by_ratio), jax.jit(accept_equal)
jit_stop, jit_write = jax.jit(first_stop), jax.jit(write_rows)


def draw_laws(generator, *shape):
    """Laws with zeros in them."""
    weights = generator.random((*shape, VOCAB)) * (generator.random((*shape, VOCAB)) < 0.7)
    weights[..., 0] += weights.sum(-1) == 0
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def test_count_leading():
    rows = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 0]], bool)
    np.testing.assert_array_equal(count_leading(jnp.asarray(rows)), [3, 0, 1, 2, 0])


@quick
@given(st.integers(0, 2**32 - 1))
def test_accept_equal(seed):
    generator = np.random.default_rng(seed)
    drafts = generator.integers(0, 2, (ROWS, DRAFTS)).astype(np.int32)
    choices = generator.integers(0, 2, (ROWS, DRAFTS + 1)).astype(np.int32)
    counts, tokens = jit_equal(drafts, choices)
    for row in range(ROWS):
        k = 0
        while k < DRAFTS and drafts[row, k] == choices[row, k]:
            k += 1
        assert (counts[row], tokens[row]) == (k, choices[row, k])


@quick
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_accept_by_ratio(seed, is_perfect):
    generator = np.random.default_rng(seed)
    target = draw_laws(generator, ROWS, DRAFTS + 1)
    draft = target[:, :DRAFTS].copy() if is_perfect else draw_laws(generator, ROWS, DRAFTS)
    drafts = np.array([[generator.choice(VOCAB, p=q / q.sum()) for q in row.astype(float)] for row in draft], np.int32)
    uniform = generator.random((ROWS, DRAFTS)).astype(np.float32)
    counts, laws = jit_ratio(drafts, draft, target, uniform)
    for row in range(ROWS):
        k = 0
        while k < DRAFTS and uniform[row, k] * draft[row, k, drafts[row, k]] < target[row, k, drafts[row, k]]:
            k += 1
        law = target[row, k] if k == DRAFTS else np.maximum(target[row, k] - draft[row, k], 0)
        assert counts[row] == k
        assert k == DRAFTS or not is_perfect
        np.testing.assert_allclose(laws[row], law if law.sum() > 0 else target[row, k], atol=1e-7)


def test_one_step_is_exact():
    """Summed over drafts and coins in closed form, accepted plus residual mass is p."""
    generator = np.random.default_rng(0)
    p, q = draw_laws(generator, 1, 2), draw_laws(generator, 1, 1)
    total = np.zeros(VOCAB)
    for token in range(VOCAB):
        if q[0, 0, token] == 0:
            continue
        ratio = min(1.0, p[0, 0, token] / q[0, 0, token])
        for uniform, weight in ((ratio * 0.999, ratio), (min(ratio * 1.001, 0.99999), 1 - ratio)):
            if weight == 0:
                continue
            args = (np.full((1, 1), token, np.int32), q, p, np.full((1, 1), uniform, np.float32))
            count, law = accept_by_ratio(*(jnp.asarray(a) for a in args))
            mass = q[0, 0, token] * weight
            law = np.asarray(law[0], np.float64)
            total += mass * (np.eye(VOCAB)[token] if count[0] else law / law.sum())
    np.testing.assert_allclose(total, p[0, 0], atol=1e-6)


def test_extreme_coins():
    """A token of target weight 0 is refused even by the coin 0; one of equal weight is kept by the largest coin."""
    p = jnp.asarray([[[0.0, 1.0], [0.5, 0.5]]])
    coins = jnp.asarray([[0.0]]), jnp.asarray([[1 - 2.0**-23]])
    assert accept_by_ratio(jnp.asarray([[0]]), jnp.asarray([[[1.0, 0.0]]]), p, coins[0])[0][0] == 0
    assert accept_by_ratio(jnp.asarray([[1]]), jnp.asarray([[[0.0, 1.0]]]), p, coins[1])[0][0] == 1


def test_sample_law_never_draws_weight_0():
    law = jnp.asarray([[0.0, 2.0, 0.0, 1e-30], [0.0, 0.0, 0.0, 3.0]])
    high = jnp.asarray([[1e6, -5.0, 1e6, -50.0], [1e6, 1e6, 1e6, -50.0]])
    np.testing.assert_array_equal(sample_law(law, high), [1, 3])


@quick
@given(st.integers(0, 2**32 - 1))
def test_first_stop(seed):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 4, (ROWS, 5)).astype(np.int32)
    num = generator.integers(0, 6, ROWS).astype(np.int32)
    stops = generator.integers(-1, 4, (ROWS, 2)).astype(np.int32)
    kept, has_stopped = jit_stop(tokens, num, stops)
    for row in range(ROWS):
        hits = [i for i in range(num[row]) if tokens[row, i] in stops[row]]
        assert has_stopped[row] == bool(hits)
        assert kept[row] == (hits[0] + 1 if hits else num[row])


@quick
@given(st.integers(0, 2**32 - 1))
def test_write_rows(seed):
    generator = np.random.default_rng(seed)
    buffer = generator.integers(0, 99, (ROWS, 9)).astype(np.int32)
    new = generator.integers(100, 199, (ROWS, 3)).astype(np.int32)
    start = generator.integers(0, 7, ROWS).astype(np.int32)
    count = generator.integers(0, 4, ROWS).astype(np.int32)
    written = jit_write(buffer, new, start, count)
    for row in range(ROWS):
        buffer[row, start[row] : start[row] + count[row]] = new[row, : count[row]]
    np.testing.assert_array_equal(written, buffer)
