"""A server's plan is what its engine would take on these devices; what cannot be planned is one sentence."""

import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from domino_jax.config import ConfigError
from domino_jax.decoding.draft_vocabulary import save_draft_vocabulary
from domino_jax.run_config import MeshConfig
from domino_jax.runs import serving_plan
from domino_jax.runs.embedded import embedded_target_config
from domino_jax.runs.server import ServerOptions, size_engine
from domino_jax.runs.serving_plan import format_plan, plan_serving
from domino_jax.runs.topologies import DeviceKind, Topology
from domino_jax.serving.engine_config import EngineConfig
from tests.runs.test_plan import make_config, make_topology

OPTIONS = ServerOptions("", max_slots=4, engine=EngineConfig(max_model_len=96), dtype="float32")


@pytest.fixture(scope="module")
def plan():
    return plan_serving(OPTIONS, make_config(), make_topology())


def test_memory_is_the_engines_own(plan):
    run = make_config()
    target = embedded_target_config(run.corpus, run.corpus.vocab_size)
    draft = run.draft.resolve(target, target.vocab_size - 1)
    engine = replace(OPTIONS.engine, batch_sizes=(1, 4))
    _, memory = size_engine(replace(OPTIONS, engine=engine), target, draft)
    assert plan.memory == memory
    assert (plan.num_slots, plan.max_model_len, plan.block_size) == (4, 96, 4)


def test_the_compiled_round_holds_what_was_counted(plan):
    parts = dict(plan.memory.parts)
    held = parts["target's weights"] + parts["drafter's weights"] + parts["draft's context caches"]
    held += parts["tokens, bias and counts of the slots"]
    held += next(size for name, size in parts.items() if name.startswith("target's caches"))
    assert plan.round.argument_bytes == pytest.approx(held, rel=0.02)
    assert plan.round.output_bytes < held / 10, "the slots are not updated in place"
    assert plan.round.traffic.host_calls == ()
    assert plan.is_fitting


def test_a_round_verifies_its_block_for_every_row(plan):
    """5 positions of 4 rows through 2 layers, the head of 400 tokens, and what the drafter adds to it."""
    run = make_config()
    weights = 2 * (16 * 3 * 24 + 2 * 16 * 16 + 2 * 16 * 8) + 400 * 16
    verify = 2 * 4 * run.draft.block_size * weights
    assert verify < plan.round.flops < 4 * verify


def test_a_draft_vocabulary_makes_a_round_cheaper(plan, tmp_path):
    save_draft_vocabulary(tmp_path / "vocabulary.json", 400, np.arange(40))
    part = plan_serving(replace(OPTIONS, draft_vocabulary=tmp_path / "vocabulary.json"), make_config(), make_topology())
    run = make_config()
    draft = run.draft.resolve(embedded_target_config(run.corpus, run.corpus.vocab_size), 399)
    a_token = 4 * draft.num_draft_tokens() * 2 * (16 + draft.emb_dim)  # its logit and correction, in four rows
    assert part.round.flops == pytest.approx(plan.round.flops - a_token * (400 - 40), rel=0.01)


def test_lines(plan):
    text = "\n".join(format_plan(plan))
    assert "slots: 4 of 96 tokens each" in text
    assert "a round of block size 4" in text
    assert text.rpartition("\n")[2].startswith("fits: a round takes ")


def test_as_many_slots_as_fit_are_taken():
    options = replace(OPTIONS, max_slots=None)
    room = plan_serving(options, make_config(), make_topology())
    assert room.num_slots == 32
    parts = dict(plan_serving(replace(options, max_slots=8), make_config(), make_topology()).memory.parts)
    tight = plan_serving(options, make_config(), make_topology(int(sum(parts.values()) / 0.9) + 1))
    assert tight.num_slots == 8


def test_what_does_not_fit_says_what_would():
    with pytest.raises(ConfigError, match=r"the server needs .* and may use 14\.4 KiB"):
        plan_serving(OPTIONS, make_config(), make_topology(16 * 1024))


def test_a_number_of_slots_that_cannot_be_is_one_sentence():
    with pytest.raises(ConfigError, match="max_slots is -1"):
        plan_serving(replace(OPTIONS, max_slots=-1), make_config(), make_topology())


@pytest.mark.parametrize(
    ("said", "error", "told"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in hbm.\nmore",
            ConfigError,
            r"of here: Ran out of memory in hbm; take",
        ),
        ("INTERNAL: broken", jax.errors.JaxRuntimeError, "INTERNAL: broken"),
    ],
)
def test_a_compiler_that_finds_no_room_is_one_sentence(monkeypatch, said, error, told):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(serving_plan, "compile_traced", refuse)
    with pytest.raises(error, match=told):
        plan_serving(OPTIONS, make_config(), make_topology())


def test_several_devices_need_a_mesh():
    topology = Topology("two", "cpu", DeviceKind(2**30, 1e9, 1e12), jax.devices()[:1] * 2)
    with pytest.raises(ConfigError, match="two has 2 devices and a server without --mesh uses one of them"):
        plan_serving(OPTIONS, make_config(), topology)
    with pytest.raises(ConfigError, match="mesh"):
        plan_serving(replace(OPTIONS, mesh=MeshConfig(model=3)), make_config(), make_topology())


def test_a_target_that_is_not_here_and_not_public():
    with pytest.raises(ConfigError, match="the target is 'someone/model', no directory here, and a plan asks no hub"):
        serving_plan.find_pair_sizes(replace(OPTIONS, target="someone/model"), None)
    target, draft, origin = serving_plan.find_pair_sizes(replace(OPTIONS, target="Qwen/Qwen3-8B"), None)
    assert (target.hidden_size, draft) == (4096, None)
    assert origin.startswith("published sizes of qwen3-8b")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--plan"], "give --plan, --topology NAME (such as v6e:4x4) and --target or --config together"),
        (["--topology", "h100:1", "--target", "x"], "give --plan, --topology NAME"),
        (["--plan", "--topology", "abacus:3", "--target", "Qwen/Qwen3-4B"], "topology is 'abacus:3'; give a kind"),
    ],
)
def test_mistakes_are_one_sentence(repository, arguments, said):
    command = [sys.executable, "serve.py", *arguments]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
