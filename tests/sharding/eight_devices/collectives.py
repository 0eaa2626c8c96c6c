"""What devices exchange, counted in the optimised programs; run by `test_eight_devices.py`.

A dimension of the vocabulary's size would betray a gather of logits or embeddings; no other axis has that size.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.config import SamplingConfig
from domino_jax.decoding.draft_vocabulary import limit_vocabulary
from domino_jax.decoding.generate import init_state
from domino_jax.decoding.speculative import backbone_block, choose_block, decode_speculative
from domino_jax.decoding.state import DecodeSettings, ModelParams
from domino_jax.models.stacked_target import stack_params
from domino_jax.run_config import ObjectiveConfig, OptimizerConfig
from domino_jax.sharding import activate
from domino_jax.training.step import StepInputs, create_train_state, make_train_step
from tests.sharding.small_pair import BLOCK, VOCAB, make_layout, make_pair

KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"


def find_collectives(program):
    """Return (computation, kind, result) of every collective of an optimised program."""
    found = []
    for computation in re.split(r"\n(?=%|ENTRY )", program):
        name = computation.split(" ")[0]
        for result, kind in re.findall(rf"^ .*? = (.*?) ({KINDS})(?:-start)?\(", computation, re.MULTILINE):
            found.append((name, kind, result))
    return found


def dimensions(result):
    return [int(size) for group in re.findall(r"\[([0-9,]*)\]", result) for size in group.split(",") if size]


def lower_decoding(function, mesh, rule="greedy", has_filters=False, num_candidates=0, draft_vocab_size=0):
    target, target_params, draft, draft_params = make_pair()
    layout = make_layout(*mesh)
    limits = {"num_candidates": num_candidates, "draft_vocab_size": draft_vocab_size}
    settings = DecodeSettings(target, draft, BLOCK, rule, has_filters, **limits)
    rows = [[[1, 2]] * 8, [20] * 8, [SamplingConfig()] * 8, [()] * 8]
    state = layout.abstract(jax.eval_shape(lambda: init_state(settings, *rows)))
    params = ModelParams(target_params, draft_params)
    if draft_vocab_size:
        params = limit_vocabulary(params, np.arange(draft_vocab_size))
    params = layout.abstract(jax.eval_shape(lambda: params))
    with activate(layout):
        return function.lower(settings, params, state).compile().as_text()


def roll_out(settings, params, state):
    return choose_block(settings, params, state, *backbone_block(settings, params, state))


@pytest.mark.parametrize("mesh", [(1, 8), (4, 2)], ids=str)
@pytest.mark.parametrize(
    ("rule", "has_filters", "num_candidates", "draft_vocab_size", "a_step"),
    [
        ("greedy", False, 0, 0, 1),
        ("greedy", False, 5, 0, 1),
        ("greedy", False, 0, 40, 1),
        ("greedy", False, 5, 40, 1),
        ("seed-exact", False, 0, 0, 1),
        ("rejection", False, 0, 0, 1),
        ("seed-exact", True, 0, 0, 2),
    ],
)
def test_collectives_of_a_head_step(mesh, rule, has_filters, num_candidates, draft_vocab_size, a_step):
    limits = has_filters, num_candidates, draft_vocab_size
    program = lower_decoding(jax.jit(roll_out, static_argnums=0), mesh, rule, *limits)
    loops = set(re.findall(r"body=(%[\w.\-]+)", program))
    inside = [(kind, result) for name, kind, result in find_collectives(program) if name in loops]
    assert len(inside) == a_step, inside
    steps = re.findall(r'known_trip_count":\{"n":"(\d+)"', program)
    assert str(BLOCK) in steps  # the rollout is a loop over the drafted tokens, not unrolled
    if not has_filters:
        assert VOCAB not in dimensions(str(inside))


@pytest.mark.parametrize("mesh", [(1, 8), (4, 2)], ids=str)
@pytest.mark.parametrize(
    ("rule", "num_candidates", "draft_vocab_size"),
    [
        ("greedy", 0, 0),
        ("greedy", 5, 0),
        ("greedy", 0, 40),
        pytest.param("rejection", 0, 0, marks=pytest.mark.slow),
    ],
)
def test_no_round_gathers_logits_or_caches(mesh, rule, num_candidates, draft_vocab_size):
    target, _, drafter, _ = make_pair()
    found = find_collectives(lower_decoding(decode_speculative, mesh, rule, False, num_candidates, draft_vocab_size))
    assert found
    for _, kind, result in found:
        assert not {VOCAB, draft_vocab_size or VOCAB} & set(dimensions(result)), (kind, result)
    # Two a layer, one each for embeddings and features, the head's, the target's choice, whether rows are done.
    num_layers = target.num_hidden_layers + drafter.num_hidden_layers
    # Of both laws: two for the normaliser, the drafts' probabilities, rows of temperature 0; and the residual's mass.
    by_rule = 2 * 4 + 1 if rule == "rejection" else 0
    # The candidates themselves, and what is looked up of each before the rollout.
    by_candidates = 4 if num_candidates else 0
    assert len(found) <= 2 * num_layers + 7 + by_rule + by_candidates, found


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["seed-exact", "rejection"])
@pytest.mark.parametrize("mesh", [(1, 8), (4, 2)], ids=str)
def test_a_sampled_round_exchanges_one_number_a_slot_and_token_of_a_draft_vocabulary(mesh, rule):
    """The noise of its tokens or their laws; nothing of the whole vocabulary's size."""
    size = 40
    found = find_collectives(lower_decoding(decode_speculative, mesh, rule, draft_vocab_size=size))
    arrays = [dimensions(array) for _, _, result in found for array in re.findall(r"f32\[[0-9,]*\]", result)]
    assert arrays and not [array for array in arrays if VOCAB in array]
    assert [array for array in arrays if size in array] == [[8 // mesh[0], BLOCK, size]]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 8, False), (4, 2, False), (4, 2, True)], ids=str)
def test_a_train_step_sums_gradients_once_and_gathers_no_logits(mesh):
    target, target_params, drafter, _ = make_pair()
    layout, optimizer = make_layout(*mesh), OptimizerConfig()
    objective = ObjectiveConfig(num_anchors=6, head_chunk=5, attention_chunk=4)
    step = make_train_step(target, drafter, objective, optimizer, 20, layout=layout)
    state = jax.eval_shape(functools.partial(create_train_state, drafter, optimizer), jax.random.key(0))
    ids = jax.ShapeDtypeStruct((2, 4, 32), jnp.int32)
    inputs = StepInputs(ids, jax.ShapeDtypeStruct(ids.shape, jnp.float32), jax.ShapeDtypeStruct((2, 4), jnp.int32))
    trees = (state, jax.eval_shape(lambda: stack_params(target_params)), inputs)
    with activate(layout):
        program = step.lower(*map(layout.abstract, trees)).compile().as_text()
    found = find_collectives(program)
    assert all(VOCAB not in dimensions(result) for _, _, result in found)
    gates = f"[{3 * drafter.gru_hidden_dim},{drafter.gru_hidden_dim}]"
    gates_turned = f"[{drafter.gru_hidden_dim},{3 * drafter.gru_hidden_dim}]"
    sums = [result for _, kind, result in found if kind == "all-reduce" and (gates in result or gates_turned in result)]
    assert len(sums) == (1 if mesh[0] > 1 else 0), sums
