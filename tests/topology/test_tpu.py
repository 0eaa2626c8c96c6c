"""Qwen3-4B's and 8B's programs compile for TPUs that are not here, with the `libtpu` package alone: at full depth.

Sequences of the train step have 1024 tokens and 64 anchors, not the 3072 and 512 of the recipe: the programs are the
same, shorter. The compiler makes its least effort for speed, which takes a third of the time; what is checked here
(places, exchanges, memory, no asking of the host) does not hang on it. JAX_EXEC_TIME_OPTIMIZATION_EFFORT=0 compiles as
a run does. DOMINO_TOPOLOGY_LAYERS=2 takes two layers of each target and a drafter of one.
"""

import dataclasses
import itertools
import math
import os
import subprocess
import sys
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from domino_jax.config import DraftConfig, SamplingConfig, TargetConfig
from domino_jax.decoding.generate import init_state
from domino_jax.decoding.plain import decode_plain
from domino_jax.decoding.prefill import prefill_chunk
from domino_jax.decoding.speculative import decode_speculative
from domino_jax.decoding.state import DecodeSettings, ModelParams, default_num_candidates
from domino_jax.models.domino_head import init_draft_params
from domino_jax.models.qwen3 import init_target_params
from domino_jax.run_config import (
    DataConfig,
    DraftSettings,
    MeshConfig,
    ObjectiveConfig,
    RunConfig,
    TargetSource,
    TrainConfig,
)
from domino_jax.runs import plan
from domino_jax.runs.plan import PUBLIC_TARGETS, compile_step
from domino_jax.runs.program_costs import read_traffic
from domino_jax.runs.server import ServerOptions
from domino_jax.runs.serving_plan import plan_serving
from domino_jax.runs.topologies import Topology, TopologyError, find_topology
from domino_jax.serving.engine_config import EngineConfig
from domino_jax.sharding import Layout, activate, build_layout, check_sizes

pytestmark = pytest.mark.topology
pytest.importorskip("libtpu", reason="the compiler for TPUs is not installed (extra `tpu`)")

MESHES = {"v5e:4x4": MeshConfig(2, 8), "v6e:4x4": MeshConfig(4, 4, fsdp=True), "v5p:2x2x1": MeshConfig(1, 4)}
NUM_LAYERS = int(os.environ.get("DOMINO_TOPOLOGY_LAYERS", "0"))
SLOTS, PROMPT = 8, 1024
TARGETS = ("qwen3-4b", "qwen3-8b")
DRAFT_SETTINGS = DraftSettings(num_hidden_layers=1 if 0 < NUM_LAYERS < 7 else 5, mask_token_id=151669)


class Place(NamedTuple):
    """A target, its drafter, and where they are compiled for."""

    name: str
    target: TargetConfig
    draft: DraftConfig
    topology: Topology
    layout: Layout


@pytest.fixture(autouse=True)
def compiler_effort():
    """Let the compiler spend little on making programs fast, unless JAX is told in the environment what to spend."""
    name = "jax_exec_time_optimization_effort"
    before = getattr(jax.config, name)
    if name.upper() not in os.environ:
        jax.config.update(name, -1.0)
    yield
    jax.config.update(name, before)


@pytest.fixture(scope="module", params=itertools.product(TARGETS, MESHES), ids="-".join)
def place(request):
    name, topology_name = request.param
    topology = find_topology(topology_name)
    layout = build_layout(MESHES[topology_name], topology.devices)
    target = choose_depth(name)
    draft = DRAFT_SETTINGS.resolve(target, 0)
    check_sizes(layout, target, draft)
    return Place(name, target, draft, topology, layout)


def choose_depth(name):
    target = PUBLIC_TARGETS[name]
    return dataclasses.replace(target, num_hidden_layers=NUM_LAYERS or target.num_hidden_layers)


def shapes_of(place, slots=SLOTS, num_positions=PROMPT):
    """Return settings, parameters and state of the decoding loop, as shapes with places.

    Prompts have `num_positions` tokens, and as many may follow.
    """
    target, draft, layout = place.target, place.draft, place.layout
    settings = DecodeSettings(
        target, draft, draft.block_size, num_candidates=default_num_candidates(target.vocab_size), dtype="bfloat16"
    )
    inits = partial(init_target_params, target), partial(init_draft_params, draft)
    params = ModelParams(*(jax.eval_shape(init, jax.random.key(0)) for init in inits))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    rows = [[1] * num_positions] * slots, [num_positions] * slots, [SamplingConfig()] * slots, [()] * slots
    state = jax.eval_shape(lambda: init_state(settings, *rows))
    return settings, layout.abstract(params), layout.abstract(state)


def check(compiled, topology):
    """Check that a program fits its device and never asks the host; return what it moves."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert 0 < held + memory.temp_size_in_bytes < topology.kind.memory_bytes
    traffic = read_traffic(compiled.as_text())
    assert traffic.host_calls == ()
    assert traffic.moved_bytes > 0 and sum(traffic.collective_bytes.values()) > 0
    return traffic


def test_decoding_loop(place):
    target, draft, layout = place.target, place.draft, place.layout
    settings, params, state = shapes_of(place)
    with activate(layout):
        compiled = decode_speculative.lower(settings, params, state).compile()
    traffic = check(compiled, place.topology)
    assert traffic.num_unknown_loops >= 1, "the loop over rounds is not in the program"
    caches = 2 * SLOTS // layout.num_data * target.num_key_value_heads // layout.num_model * 2 * PROMPT
    state_bytes = caches * target.head_dim * 2 * (target.num_hidden_layers + draft.num_hidden_layers)
    assert compiled.memory_analysis().alias_size_in_bytes >= state_bytes, "the caches are not written in place"
    if MESHES[place.topology.name].fsdp:
        return  # weights are gathered
    logits = SLOTS // layout.num_data * draft.num_draft_tokens() * target.vocab_size // layout.num_model * 4
    assert traffic.collective_bytes.get("all-gather", 0) < logits // 4, "logits are gathered"


def test_caches_stay_where_they_are():
    """Two layers, compiled as for a run: only then the compiler makes use of the chip's own memory."""
    jax.config.update("jax_exec_time_optimization_effort", 0.0)
    topology = find_topology("v5e:4x4")
    layout = build_layout(MESHES["v5e:4x4"], topology.devices)
    target = dataclasses.replace(PUBLIC_TARGETS["qwen3-4b"], num_hidden_layers=2)
    draft_settings = dataclasses.replace(DRAFT_SETTINGS, num_hidden_layers=1, target_layer_ids=(0, 1))
    place = Place("qwen3-4b", target, draft_settings.resolve(target, 0), topology, layout)
    settings, params, state = shapes_of(place)
    with activate(layout):
        compiled = decode_speculative.lower(settings, params, state).compile()
    keys, values = (
        f"bf16[{','.join(map(str, x.sharding.shard_shape(x.shape)))}]"
        for x in (state.target_cache.keys[0], state.target_cache.values[0])
    )
    text = compiled.as_text()
    assert "S(1)" in text, "nothing is in the chip's own memory: the test says nothing"
    assert not {keys, values} & set(read_traffic(text).returned_types), "caches are copied out and back whole"


def test_plain_steps_read_caches_and_write_positions():
    """All layers, rows and caches of a server, compiled as for a run: with fewer the compiler copies no cache."""
    jax.config.update("jax_exec_time_optimization_effort", 0.0)
    topology = find_topology("v5e:4x4")
    layout = build_layout(MESHES["v5e:4x4"], topology.devices)
    target = PUBLIC_TARGETS["qwen3-4b"]
    place = Place("qwen3-4b", target, DRAFT_SETTINGS.resolve(target, 0), topology, layout)
    settings, params, state = shapes_of(place, slots=16, num_positions=4096)
    settings = dataclasses.replace(settings, draft=None, block_size=1)
    with activate(layout):
        compiled = decode_plain.lower(settings, params.replace(draft=None), state).compile()
    read = sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
        for x in jax.tree.leaves((params.target, state.target_cache))
    )
    assert read_traffic(compiled.as_text()).turn_bytes < 1.05 * read, "caches are copied"


def test_prefill(place):
    layout = place.layout
    settings, params, state = shapes_of(place)
    hidden = jax.ShapeDtypeStruct((SLOTS, place.target.hidden_size), jnp.bfloat16)
    hidden = layout.abstract({"last_hidden": hidden})["last_hidden"]
    with activate(layout):
        start = jax.ShapeDtypeStruct((), jnp.int32)
        compiled = prefill_chunk.lower(settings, params, state, 256, start, hidden).compile()
    check(compiled, place.topology)


def test_train_step(place):
    name, target, draft, topology, layout = place
    config = RunConfig(
        name="topology",
        target=TargetSource(f"Qwen/{name}", "bfloat16"),
        draft=DRAFT_SETTINGS,
        data=DataConfig("train.jsonl", max_length=1024, batch_size=2 * layout.num_data, micro_steps=2),
        objective=ObjectiveConfig(num_anchors=64),
        train=TrainConfig(num_steps=100, compute_dtype="bfloat16"),
    )
    step = compile_step(config, target, draft, layout)
    assert step.total_bytes < topology.kind.memory_bytes
    assert step.traffic.host_calls == ()
    assert step.traffic.num_unknown_loops <= 2  # searches in sorted anchors, of a few steps
    # No device multiplies what another one has: products are those of the method, once more for what is computed again.
    tokens = 2 * layout.num_data * 1024
    num_run = 1 + max(draft.target_layer_ids)
    weights = num_run * (target.hidden_size * (3 * target.intermediate_size + 2 * 32 * 128 + 2 * 8 * 128))
    assert step.flops > 2 * tokens * weights
    assert step.output_bytes < 2**20, "the state is not updated in place"


def test_the_command(repository):
    """The published recipe on a slice that cannot hold it whole: known before anything is compiled."""
    command = [sys.executable, "train.py", "--config", "configs/qwen3.py:8b", "--plan", "--topology", "v5e:2x2"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "plan for v5e:2x2: 4 x TPU v5 lite" in done.stdout
    assert "published sizes of qwen3-8b; Qwen/Qwen3-8B itself was not read" in done.stdout
    assert "data.micro_steps is taken as 8" in done.stdout
    advice = done.stdout.partition("does not fit: weights and moments alone are too large")[2]
    assert "--config.mesh.model=1 --config.mesh.fsdp=True: weights and moments take 6.9 GiB" in advice


def test_a_shape_that_is_none_is_one_sentence():
    with pytest.raises(TopologyError, match=r"libtpu knows no topology 'v5e:3x5' \(.*\); try v5e:4x4"):
        find_topology("v5e:3x5")


def test_one_chip():
    assert len(find_topology("v5e:1x1").devices) == 1


@pytest.mark.parametrize("name", TARGETS)
def test_a_servers_round_on_v5e(monkeypatch, name):
    """The engine's own program, with every slot in use, and its caches written in place."""
    monkeypatch.setitem(plan.PUBLIC_TARGETS, name, choose_depth(name))
    run = RunConfig(
        name="topology",
        target=TargetSource(f"Qwen/{name}", "bfloat16"),
        draft=DRAFT_SETTINGS,
        data=DataConfig("train.jsonl"),
    )
    options = ServerOptions(
        "", mesh=MeshConfig(2, 4), dtype="bfloat16", max_slots=16, engine=EngineConfig(max_model_len=2048)
    )
    serving = plan_serving(options, run, find_topology("v5e:2x4"))
    assert serving.is_fitting and serving.num_slots == 16
    assert serving.round.traffic.host_calls == ()
    assert serving.round.output_bytes < 2**22, "the slots are not updated in place"
    assert sum(serving.round.traffic.collective_bytes.values()) > 0
