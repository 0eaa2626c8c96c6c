"""Losses of a training on a mesh are those of one device; run by `test_eight_devices.py`."""

import functools

import jax
import numpy as np
import pytest

from domino_jax.models.stacked_target import stack_params
from domino_jax.run_config import ObjectiveConfig, OptimizerConfig
from domino_jax.sharding import activate
from domino_jax.training.step import StepInputs, create_train_state, make_train_step, pad_sequences
from tests.sharding.small_pair import make_batch, make_layout, make_pair, spread

NUM_STEPS = 20
PLAIN = {"num_anchors": 6, "head_chunk": 5, "loss_decay_gamma": 4.0, "attention_chunk": 4}
RUNS = {
    "one batch": {"sequences": 8, "micro_steps": 1, "kind": "adamw"},
    # 3 sequences a micro-step: no even number of devices divides them.
    "uneven micro-steps": {"sequences": 6, "micro_steps": 2, "kind": "adamw"},
    "muon": {"sequences": 8, "micro_steps": 2, "kind": "muon"},
    "two denominators": {
        "sequences": 6,
        "micro_steps": 2,
        "kind": "adamw",
        "objective": {"base_support": "accepted", "match": "kl", "slot_weights": "dpace", "loss_decay_gamma": 4.0},
    },
}


def train(layout, sequences, micro_steps, kind, objective=None):
    target, target_params, draft, draft_params = make_pair()
    optimizer = OptimizerConfig(kind=kind, learning_rate=1e-3, warmup_ratio=0.0, weight_decay=0.01)
    settings = ObjectiveConfig(**(PLAIN | (objective or {})))
    step = make_train_step(target, draft, settings, optimizer, NUM_STEPS, layout=layout)
    state = create_train_state(draft, optimizer, jax.random.key(0), draft_params, layout)
    frozen = stack_params(target_params)
    frozen = layout.place(frozen) if layout else frozen
    losses = []
    for number in range(NUM_STEPS):
        batch = make_batch(number, sequences)
        inputs = StepInputs(*(x.reshape(micro_steps, -1, *x.shape[1:]) for x in batch))
        if layout:
            inputs = layout.place(pad_sequences(inputs, layout.num_data))
        with activate(layout):
            state, metrics = step(state, frozen, inputs)
        losses.append([float(metrics[name]) for name in ("loss", "corrected_loss", "base_loss", "accept_len")])
    return np.array(losses), state


@functools.cache
def train_on_one(run):
    return train(None, **RUNS[run])[0]


@pytest.mark.parametrize("mesh", [(4, 2, False), (2, 2, True)], ids=str)
def test_losses_are_those_of_one_device(mesh):
    losses, state = train(make_layout(*mesh), **RUNS["uneven micro-steps"])
    np.testing.assert_allclose(losses, train_on_one("uneven micro-steps"), rtol=0, atol=1e-5)
    assert losses[-1, 0] < losses[0, 0]
    wanted = make_layout(*mesh).shardings(state)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "run"), spread(RUNS))
def test_losses_of_every_run_are_those_of_one_device(mesh, run):
    np.testing.assert_allclose(train(make_layout(*mesh), **RUNS[run])[0], train_on_one(run), rtol=0, atol=1e-5)


def test_weights_drawn_on_a_mesh_are_those_of_one_device():
    draft, optimizer = make_pair()[2], OptimizerConfig()
    one = create_train_state(draft, optimizer, jax.random.key(3))
    many = create_train_state(draft, optimizer, jax.random.key(3), layout=make_layout(2, 4, True))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(a, b)
