import pytest

from domino_jax.config import ConfigError
from domino_jax.decoding.state import DecodeSettings, ModelParams
from domino_jax.models.domino_head import init_draft_params
from domino_jax.models.qwen3 import init_target_params
from domino_jax.serving.engine_config import EngineConfig, plan_ladders
from domino_jax.serving.memory_plan import plan_memory, require_fit
from domino_jax.serving.programs import Ladders, Programs, Shape
from tests.decoding.tiny_pair import draw_params, make_configs


def make_ladders(rows=(1, 2, 4), positions=(128, 512), **fields):
    defaults = {"block_sizes": (5, 1), "max_rounds": 4, "num_blocks": 8, "block_len": 16, "margin": 32}
    return Ladders(rows=rows, positions=positions, **(defaults | fields))


def test_shapes_change_one_step_of_one_ladder_at_a_time():
    ladders = make_ladders()
    path = ladders.steps_between(Shape(1, 128), Shape(4, 512))
    assert path == [Shape(1, 512), Shape(2, 512), Shape(4, 512)]
    assert ladders.steps_between(Shape(4, 512), Shape(1, 512)) == [Shape(2, 512), Shape(1, 512)]
    assert ladders.steps_between(Shape(2, 128), Shape(2, 128)) == []


@pytest.mark.parametrize("start", make_ladders().shapes)
@pytest.mark.parametrize("end", make_ladders().shapes)
def test_every_step_on_the_way_has_a_program(start, end):
    target, draft = make_configs()
    programs = Programs(DecodeSettings(target=target, draft=draft), make_ladders())
    at = start
    for step in programs.ladders.steps_between(start, end):
        assert step in programs._neighbours(at)
        at = step
    assert at == end


def test_the_smallest_shape_that_holds_is_found():
    ladders = make_ladders()
    assert [ladders.rows_for(n) for n in (1, 2, 3, 4)] == [1, 2, 4, 4]
    assert [ladders.positions_for(n) for n in (1, 128, 129, 512)] == [128, 128, 512, 512]
    with pytest.raises(ValueError, match="513 positions"):
        ladders.positions_for(513)


def test_ladders_hold_the_longest_sequence_and_its_drafts():
    target, draft = make_configs(context=5000)
    ladders = plan_ladders(EngineConfig(max_slots=6), target, draft)
    assert ladders.rows == (1, 2, 4, 6)
    assert ladders.positions == (1024, 5120)
    assert ladders.positions[-1] >= 5000 + ladders.margin
    assert ladders.block_sizes == (5, 2, 1)
    short = plan_ladders(EngineConfig(max_slots=1, max_model_len=100, is_adaptive=False), target, draft)
    assert (short.rows, short.positions, short.block_sizes) == ((1,), (256,), (5, 1))
    plain = plan_ladders(EngineConfig(max_slots=3, batch_sizes=(2,)), target, None)
    assert (plain.rows, plain.block_sizes) == ((2, 3), (1,))


def test_the_plan_counts_what_the_arrays_hold():
    target, draft = make_configs()
    settings = DecodeSettings(target=target, draft=draft)
    ladders = make_ladders()
    parts = dict(plan_memory(settings, ladders, 1000, 100).parts)
    # keys and values x layers x heads x width x positions x rows x 4 bytes
    assert parts["target's caches (4 slots x 512 positions)"] == 2 * 2 * 1 * 16 * 512 * 4 * 4
    assert parts["draft's context caches"] == 2 * 1 * 1 * 16 * 512 * 4 * 4
    assert parts["prefix cache (8 blocks)"] == 2 * 3 * 1 * 16 * 16 * 8 * 4
    assert parts["logits of a round and their sampling"] == 4 * 4 * 6 * 48 * 4
    assert parts["attention scores of a round or of a prompt's chunk"] == 2 * 2 * 512 * 256 * 4
    assert parts["logits of a prompt's chunk, where they are scored"] == 2 * 256 * 48 * 4
    assert parts["target's weights"] == 1000
    plan = plan_memory(settings, ladders, 1000, 100)
    assert plan.total_bytes == sum(parts.values())
    assert plan.lines()[-1].strip().startswith("in all")
    half = plan_memory(DecodeSettings(target=target, draft=draft, dtype="bfloat16"), ladders, 1000, 100)
    assert dict(half.parts)["draft's context caches"] * 2 == parts["draft's context caches"]


def test_the_plan_covers_what_xla_says_a_round_and_a_chunk_need():
    target, draft = make_configs()
    settings = DecodeSettings(target=target, draft=draft)
    ladders = make_ladders(rows=(4,), positions=(2048,))
    programs = Programs(settings, ladders)
    programs.take_params(
        ModelParams(draw_params(init_target_params, target, 0), draw_params(init_draft_params, draft, 0))
    )
    parts = dict(plan_memory(settings, ladders, 0, 0).parts)
    lowerings = dict(programs._lowerings())
    for key in (("run", Shape(4, 2048), 5), ("prefill", 2048, 256)):
        needed = lowerings[key]().compile().memory_analysis().temp_size_in_bytes
        planned = parts["attention scores of a round or of a prompt's chunk"]
        planned += parts["logits of a round and their sampling"] + parts["a prompt being run"]
        assert needed <= planned


def test_a_plan_that_does_not_fit_is_refused_with_its_breakdown():
    target, draft = make_configs()
    plan = plan_memory(DecodeSettings(target=target, draft=draft), make_ladders(), 1000, 100)
    require_fit(plan, plan.total_bytes, lambda: "unused")
    with pytest.raises(ConfigError, match=r"(?s)draft's context caches.*--max-slots 2 would fit"):
        require_fit(plan, plan.total_bytes - 1, lambda: "--max-slots 2 would fit")
