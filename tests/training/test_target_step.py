"""Training of the embedded target: the loss counts what it should, and a step learns."""

import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.config import TargetConfig
from domino_jax.models.qwen3 import init_target_params
from domino_jax.shapes import Array
from domino_jax.training.target_step import (
    create_target_state,
    make_target_optimizer,
    target_loss,
    target_train_step,
)

CONFIG = TargetConfig(64, 32, 64, 2, 2, 1, 16, rope_theta=10_000.0, tie_word_embeddings=True)


def _batch() -> tuple[Array, Array, Array]:
    input_ids = np.random.default_rng(0).integers(4, 64, (4, 12)).astype(np.int32)
    loss_mask = np.zeros((4, 12), np.float32)
    loss_mask[:, 6:10] = 1
    return jnp.asarray(input_ids), jnp.asarray(loss_mask), jnp.full((4,), 10, jnp.int32)


def test_padding_never_counts_and_the_prompt_only_by_its_weight():
    params = jax.jit(init_target_params, static_argnums=0)(CONFIG, jax.random.key(0))
    loss = jax.jit(target_loss, static_argnums=(0, 5))
    input_ids, loss_mask, lengths = _batch()
    changed = input_ids.at[:, 10:].set(7)
    same = [loss(CONFIG, params, ids, loss_mask, lengths, 0.1)[0] for ids in (input_ids, changed)]
    assert same[0] == same[1]
    only_answer = loss(CONFIG, params, input_ids, loss_mask, lengths, 0.0)[0]
    everything = loss(CONFIG, params, input_ids, loss_mask, lengths, 1.0)[0]
    share = 4 / (4 + 0.1 * 5)
    only_prompt = (everything * 9 - only_answer * 4) / 5
    np.testing.assert_allclose(same[0], share * only_answer + (1 - share) * only_prompt, rtol=1e-5)


def test_steps_learn_and_repeat_exactly_and_compile_once():
    optimizer, compiled_before = make_target_optimizer(3e-3, 30), target_train_step._cache_size()

    def run() -> list[float]:
        state = create_target_state(CONFIG, optimizer, jax.random.key(0))
        losses = []
        for _ in range(30):
            state, metrics = target_train_step(state, *_batch(), config=CONFIG, optimizer=optimizer)
            losses.append(float(metrics["loss"]))
        assert int(state.step) == 30 and 0 <= float(metrics["accuracy"]) <= 1
        return losses

    first = run()
    assert first[-1] < 0.7 * first[0]
    assert first == run()
    assert target_train_step._cache_size() == compiled_before + 1
