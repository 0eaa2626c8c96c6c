"""A plan's numbers are those of the step, and what cannot be planned is one sentence."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

from domino_jax.config import ConfigError
from domino_jax.config_flags import parse_config
from domino_jax.run_config import (
    CorpusConfig,
    DataConfig,
    DraftSettings,
    MeshConfig,
    ObjectiveConfig,
    RunConfig,
    TargetSource,
    TrainConfig,
)
from domino_jax.runs import topologies
from domino_jax.runs.plan import PUBLIC_TARGETS, count_temporaries, find_target_sizes, plan_training
from domino_jax.runs.plan_page import format_plan
from domino_jax.runs.topologies import DeviceKind, Topology, TopologyError, find_topology


def make_topology(memory_bytes=16 * 2**30, share=1.0):
    kind = DeviceKind(memory_bytes, 1e9, 1e12, share)
    return Topology("here", "cpu", kind, jax.devices()[:1])


def make_config(**changes):
    return RunConfig(
        name="small",
        draft=DraftSettings(num_hidden_layers=1, target_layer_ids=(0, 1), block_size=4, gru_hidden_dim=8, emb_dim=4),
        data=DataConfig(max_length=64, batch_size=4, micro_steps=2),
        objective=ObjectiveConfig(num_anchors=4, head_chunk=2),
        train=TrainConfig(num_steps=3),
        corpus=CorpusConfig(
            vocab_size=400, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8,
        ),
        **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def plan():
    return plan_training(make_config(), make_topology())


def count_parameters(target):
    layer = target.hidden_size * (3 * target.intermediate_size + 2 * target.num_attention_heads * target.head_dim)
    layer += target.hidden_size * 2 * target.num_key_value_heads * target.head_dim
    return target.num_hidden_layers * layer + target.vocab_size * target.hidden_size * (
        1 if target.tie_word_embeddings else 2
    )


@pytest.mark.parametrize("name, billions", [("4b", 4.0), ("8b", 8.2), ("14b", 14.8), ("32b", 32.8)])
def test_published_sizes(name, billions):
    """The model cards name these numbers of parameters."""
    assert count_parameters(PUBLIC_TARGETS[f"qwen3-{name}"]) / 1e9 == pytest.approx(billions, abs=0.05)


def test_bytes_are_those_of_the_trees(plan):
    target_values = 400 * 16 + 2 * (16 * 3 * 24 + 2 * 16 * 16 + 2 * 16 * 8 + 2 * 16 + 2 * 8) + 16
    assert plan.target_bytes == 4 * target_values
    assert plan.moment_bytes == pytest.approx(2 * plan.draft_bytes, rel=0.01)
    batch = 4 * 64 * (4 + 4) + 4 * 4
    assert plan.step.argument_bytes == pytest.approx(plan.held_bytes + batch, rel=0.01)
    assert plan.step.output_bytes < 1000  # the state takes the old one's place
    assert plan.step.temporary_bytes > plan.draft_bytes  # gradients at least
    assert plan.step.traffic.collective_bytes == {}


def test_two_micro_steps_of_two_are_twice_the_operations_of_one(plan):
    config = make_config()
    half = plan_training(replace(config, data=replace(config.data, batch_size=2, micro_steps=1)), make_topology())
    assert plan.step.flops == 2 * half.step.flops


@pytest.mark.parametrize("platform, peak, bytes_expected", [("tpu", 142, 40), ("tpu", 0, 55), ("cuda", 142, 55)])
def test_temporaries_of_a_tpu_are_what_libtpu_sets_aside(platform, peak, bytes_expected):
    account = {"argument": 100, "output": 32, "alias": 30, "temp": 55}
    memory = SimpleNamespace(peak_memory_in_bytes=peak, **{f"{k}_size_in_bytes": v for k, v in account.items()})
    assert count_temporaries(memory, platform) == bytes_expected


def test_what_is_printed(plan):
    text = "\n".join(format_plan(plan))
    assert "mesh: data 1 x model 1\n" in text
    assert "in 2 micro-steps" in text
    assert f"{plan.step.flops / 1e12:.4g} TFLOP" in text
    assert format_plan(plan)[-1].startswith("fits: ")


def test_a_step_that_is_too_large_is_told_what_to_change(plan):
    memory = plan.step.total_bytes - 1
    small = plan_training(make_config(), make_topology(memory))
    lines = format_plan(small)
    assert not small.is_fitting
    assert any(line.startswith("does not fit: ") for line in lines)
    assert "--config.data.micro_steps=4: 1 sequences at a time, not 2" in lines[-4]
    assert "--config.objective.head_chunk=1" in lines[-3]


def test_memory_that_jax_does_not_take_by_itself(plan):
    memory = int(plan.step.total_bytes / 0.9)
    assert format_plan(plan_training(make_config(), make_topology(memory, 0.75)))[-1].startswith(
        "fits with XLA_CLIENT_MEM_FRACTION=0.95"
    )


def test_weights_that_do_not_fit_are_not_compiled(repository):
    config = parse_config(["--config", f"{repository}/configs/qwen3.py:8b"])
    plan = plan_training(config, make_topology())
    assert plan.target_bytes == pytest.approx(2 * 8.19e9, rel=0.01)
    assert plan.step is None
    assert "take a topology with more or larger devices" in plan.advice[0]
    assert "does not fit: weights and moments alone are too large" in "\n".join(format_plan(plan))


def test_the_target_is_named(repository, tmp_path):
    config = parse_config(["--config", f"{repository}/configs/qwen3.py:8b"])
    sizes, origin = find_target_sizes(config)
    assert sizes.hidden_size == 4096 and "published sizes of qwen3-8b" in origin
    with pytest.raises(ConfigError, match=r"'org/Other-7B', no directory here.*qwen3-4b, qwen3-8b"):
        find_target_sizes(replace(config, target=TargetSource("org/Other-7B")))
    with pytest.raises(ValueError, match=r"config.json"):
        find_target_sizes(replace(config, target=TargetSource(str(tmp_path))))


def test_a_mesh_that_does_not_fit():
    with pytest.raises(ConfigError, match=r"mesh\.model is 2, which does not divide the 1 devices"):
        plan_training(make_config(mesh=MeshConfig(model=2)), make_topology())


@pytest.mark.parametrize("name", ["", "v5e", "v5e:4", "v5e:4x4x4", "v5p:2x2", "v9:4x4", "h100", "h100:0", "h100:2x2"])
def test_unknown_topologies(name):
    with pytest.raises(TopologyError, match="for example v5e:4x4, v6e:4x4, v5p:2x2x1, h100:1"):
        find_topology(name)


@pytest.mark.parametrize("name, extra", [("v5e:4x4", "tpu"), ("h100:1", "cuda12")])
def test_a_compiler_that_is_not_installed(monkeypatch, name, extra):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(TopologyError, match=rf'needs .*pip install -e "\.\[{extra}\]"'):
        find_topology(name)


@pytest.mark.parametrize(
    "flags", [["--plan"], ["--topology", "v6e:4x4"], ["--plan", "--topology=v6e:4x4", "--dry-run"]]
)
def test_flags_that_belong_together(repository, flags):
    command = [sys.executable, "train.py", "--config", "configs/tiny.py", *flags]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: give --plan and --topology NAME (such as v6e:4x4) together, without --dry-run"
    )
    assert done.stdout == ""
