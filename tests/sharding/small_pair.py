"""A target and a drafter whose every axis divides over eight devices, and the meshes that tests run them on."""

import functools

import jax
import numpy as np
import pytest

from domino_jax.decoding.generate import Decoder
from domino_jax.models.domino_head import init_draft_params
from domino_jax.models.qwen3 import init_target_params
from domino_jax.models.stacked_target import stack_params
from domino_jax.run_config import MeshConfig, ObjectiveConfig, OptimizerConfig
from domino_jax.sharding import build_layout
from domino_jax.training.step import StepInputs, create_train_state, make_train_step
from tests.decoding.tiny_pair import draw_params, make_configs, make_prompts

VOCAB, CONTEXT, BLOCK, MASK_ID, NUM_NEW = 64, 128, 5, 62, 24
PROMPTS = make_prompts([3, 17, 30, 5, 9], VOCAB)

MESHES = [
    *((1, 1, False), (2, 1, False), (1, 2, False), (4, 1, False), (2, 2, False), (1, 4, False)),
    *((8, 1, False), (4, 2, False), (2, 4, False), (1, 8, False), (2, 2, True), (2, 4, True)),
]
"""`data`, `model`, `fsdp`."""


def choose_quick(*quick):
    """Return all meshes as parameters of a test, those not named marked slow."""
    return [pytest.param(mesh, id=str(mesh), marks=() if mesh in quick else pytest.mark.slow) for mesh in MESHES]


def spread(names):
    """Return parameters of a test: all meshes with the first name, four with each other one, among them a mixed one.

    The four change from name to name, so a mesh meets a third of them; all with all took over 22 minutes.
    """
    return [
        pytest.param(mesh, name, id=f"{name}-{mesh}")
        for turn, name in enumerate(names)
        for number, mesh in enumerate(MESHES)
        if turn == 0 or (turn + number + number // 3) % 3 == 0
    ]


def make_layout(data, model, fsdp=False):
    return build_layout(MeshConfig(data, model, fsdp), jax.devices()[: data * model])


@functools.cache
def make_pair(**draft_changes):
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 4, "intermediate_size": 64}
    target, draft = make_configs(VOCAB, CONTEXT, BLOCK, MASK_ID, sizes, **draft_changes)
    return target, draw_params(init_target_params, target, 0), draft, draw_params(init_draft_params, draft, 1)


@functools.cache
def learn_texts(num_steps=150):
    """Train the drafter on a few texts of the target, so that blocks are accepted in part; return its parameters."""
    target, target_params, draft, draft_params = make_pair()
    texts = Decoder(target, target_params).generate(PROMPTS, NUM_NEW)
    ids = np.zeros((len(texts), 64), np.int32)
    lengths = np.array([len(t.prompt_ids) + len(t.output_ids) for t in texts], np.int32)
    for row, text in enumerate(texts):
        ids[row, : lengths[row]] = text.prompt_ids + text.output_ids
    inputs = StepInputs(ids[None], np.ones((1, *ids.shape), np.float32), lengths[None])
    optimizer = OptimizerConfig(learning_rate=1e-2)
    step = make_train_step(target, draft, ObjectiveConfig(num_anchors=24), optimizer, num_steps)
    state = create_train_state(draft, optimizer, jax.random.key(0), draft_params)
    stacked = stack_params(target_params)
    for _ in range(num_steps):
        state, _ = step(state, stacked, inputs)
    return jax.tree.map(np.asarray, state.params)


def make_decoder(layout=None, num_candidates=0, draft_vocabulary=None):
    target, target_params, draft, _ = make_pair()
    limits = {"num_candidates": num_candidates, "draft_vocabulary": draft_vocabulary}
    return Decoder(target, target_params, draft, learn_texts(), layout=layout, **limits)


def make_batch(seed, sequences, length=32):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(length // 2, length + 1, sequences).astype(np.int32)
    positions = np.arange(length)
    is_token = positions < lengths[:, None]
    ids = np.where(is_token, generator.integers(0, MASK_ID, (sequences, length)), 0).astype(np.int32)
    return ids, (is_token & (positions >= 6)).astype(np.float32), lengths
