"""The over-fit gate: one answer of the target learned by heart, exported, reloaded and decoded for real.

Whatever the objective, a drafter that knows a text must have whole blocks of it accepted; teacher-forced accuracy would
not show a label or an anchor that is off by one between training and decoding.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.checkpoints.huggingface import load_draft, save_draft
from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.decoding.generate import Decoder
from domino_jax.evaluation.metrics import tau_over_rounds
from domino_jax.models.qwen3 import init_target_params
from domino_jax.models.stacked_target import stack_params
from domino_jax.run_config import ObjectiveConfig, OptimizerConfig
from domino_jax.training.step import StepInputs, create_train_state, make_train_step

PROMPT, NUM_NEW, STEPS, BLOCK = [3, 17, 5, 9, 40, 2], 40, 150, 5
PLAIN = {"gru_hidden_dim": 0, "emb_dim": 0, "shift_label": False}
SLOW = pytest.mark.slow
CASES = [
    pytest.param({}, {}, {}, id="published"),
    pytest.param({}, {}, PLAIN, id="plain dflash", marks=SLOW),
    pytest.param({"slot_weights": "dpace", "base_support": "accepted"}, {}, {}, id="dpace and accepted support"),
    pytest.param({"base_support": "accepted"}, {}, PLAIN, id="accepted support without head", marks=SLOW),
    pytest.param({"match": "kl"}, {}, {}, id="kl", marks=SLOW),
    pytest.param({"match": "tv"}, {}, {}, id="tv", marks=SLOW),
    pytest.param({"match": "lk-alpha"}, {}, {}, id="lk-alpha", marks=SLOW),
    pytest.param({"match": "lk-hybrid"}, {}, {}, id="lk-hybrid", marks=SLOW),
    pytest.param({"loss_decay_gamma": 0.0}, {}, {"pure_draft_prefix_len": 0}, id="no decay, no prefix", marks=SLOW),
    pytest.param({"base_weight_shape": "constant", "base_weight_start": 0.5}, {}, {}, id="constant", marks=SLOW),
    pytest.param({}, {"kind": "muon"}, {}, id="muon", marks=SLOW),
]


@pytest.fixture(scope="module")
def target():
    config = TargetConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    fresh = jax.jit(init_target_params, static_argnums=0)(config, jax.random.key(0))
    # Larger weights make a text that wanders instead of repeating one token.
    params = jax.tree.map(lambda p: 16 * p if p.ndim > 1 else p, fresh)
    (plain,) = Decoder(config, params).generate([PROMPT], NUM_NEW)
    assert len(set(plain.output_ids)) > 8
    return config, params, plain.output_ids


@pytest.mark.parametrize(("objective", "optimizer", "draft"), CASES)
def test_a_text_learned_by_heart_is_accepted_block_by_block(target, tmp_path, objective, optimizer, draft):
    config, params, answer = target
    draft_config = DraftConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_target_layers=4,
        target_layer_ids=(1, 3),
        block_size=BLOCK,
        mask_token_id=63,
        shift_label=True,
        pure_draft_prefix_len=1,
        gru_hidden_dim=24,
        emb_dim=16,
    )
    draft_config = dataclasses.replace(draft_config, **draft)
    ids = np.array([[PROMPT + answer]], np.int32)
    loss_mask = (np.arange(ids.shape[-1]) >= len(PROMPT)).astype(np.float32)[None, None]
    inputs = StepInputs(ids, loss_mask, np.full((1, 1), ids.shape[-1], np.int32))
    settings = OptimizerConfig(**({"learning_rate": 1e-2} | optimizer))
    step = make_train_step(
        config, draft_config, ObjectiveConfig(**({"num_anchors": NUM_NEW} | objective)), settings, STEPS
    )
    state, stacked = create_train_state(draft_config, settings, jax.random.key(0)), stack_params(params)
    for _ in range(STEPS):
        state, _ = step(state, stacked, inputs)
    save_draft(str(tmp_path), draft_config, state.params)
    loaded = load_draft(str(tmp_path), "float32")
    decoder = Decoder(config, params, loaded.config, jax.tree.map(jnp.asarray, loaded.params))
    (generation,) = decoder.generate([PROMPT], NUM_NEW)
    assert generation.output_ids == answer
    # A round commits a whole block and the target's token; the last one is cut by the budget.
    assert tau_over_rounds([generation.stats.acceptance_lengths]) > 0.85 * (1 + draft_config.num_draft_tokens())
