"""Model cards: only what was measured, of the drafter it was measured on; the owner's words stay."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from domino_jax.config import DraftConfig, SamplingConfig
from domino_jax.data.pipeline import RowIndex
from domino_jax.data.responses import RowReport
from domino_jax.run_config import CorpusConfig, DataConfig, ObjectiveConfig, OptimizerConfig, RunConfig, TargetSource
from domino_jax.runs.draft import TrainedDraft
from domino_jax.runs.folder import RunFolder
from domino_jax.runs.model_card import render_card, write_model_cards
from domino_jax.runs.provenance import settings_path
from domino_jax.runs.report import ReportNumbers
from domino_jax.runs.responses import ResponseSettings, describe_job

NUMBERS = ReportNumbers(
    device="cpu",
    jax_version="1.2.3",
    python_version="3.11.7",
    num_prompts=7,
    max_new_tokens=64,
    quality=[{"decoding": "greedy", "identical to plain": "7 of 7", "exact match, plain": None}],
    tau={"head on": {"prompts": 3.25, "rounds": 3.125}, "head off": {"prompts": 2.5, "rounds": None}},
    slots={"head on": [0.875, None], "head off": [0.625, 0.25]},
    widths=[{"block width": 4, "speed-up": 1.75, "95 % low": 1.5, "95 % high": None}],
    reference_repeats=None,
)
HELD_OUT = {"stage": "held_out", "step": 9, "tau": 3.375, "tau_head_off": 2.25}


@pytest.fixture
def config(tmp_path):
    target, data = TargetSource("Qwen/Qwen3-8B", "bfloat16"), DataConfig(str(tmp_path / "train.jsonl"))
    return RunConfig("night", str(tmp_path / "runs"), target=target, data=data)


def make_trained(best_step=6, gru=8):
    draft = DraftConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_target_layers=4, target_layer_ids=(1, 2), block_size=4,
        mask_token_id=3, gru_hidden_dim=gru, emb_dim=gru // 2,
    )  # fmt: skip
    index = RowIndex(RowReport("x"), num_tokens=4321, num_learned_tokens=1234, num_truncated=2)
    index.offsets.extend(range(1100))
    return TrainedDraft(draft, index, 9, best_step)


def card_of(config, step=6, numbers=NUMBERS, held_out=None, warnings=(), trained=None):
    card = render_card(config, Path("runs/night/draft"), step, trained or make_trained(), numbers, held_out, warnings)
    assert not re.search(r"\b(None|nan)\b", card)
    return card


def test_the_front_matter_names_the_target_and_leaves_the_licence_open(config):
    front = yaml.safe_load(card_of(config).split("---")[1])
    assert front == {
        "base_model": "Qwen/Qwen3-8B",
        "library_name": "domino_jax",
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "draft-model", "domino", "jax"],
    }
    plain = yaml.safe_load(card_of(config, trained=make_trained(gru=0)).split("---")[1])
    assert "dflash" in plain["tags"]


def test_numbers_are_those_given_and_a_dash_is_what_is_missing(config):
    card = card_of(config)
    for line in (
        "| head on | 3.25 | 3.12 |",
        "| head off | 2.5 | - |",
        "| 1 | 0.875 | 0.625 |",
        "| 2 | - | 0.25 |",
        "| 4 | 1.75 | 1.5 | - |",
        "| rows used | 1,100 |",
        "| learned tokens | 1,234 |",
        "| target layers read | 1, 2 |",
        "| steps | 6 of 9, batches of 8 |",
    ):
        assert line in card, line
    assert "7 held-out prompts, at most 64 new tokens" in card and "cpu, jax 1.2.3, Python 3.11.7" in card
    assert 'load_target("Qwen/Qwen3-8B", "bfloat16")' in card and "`DominoDraftModel`" in card


def test_objective_and_optimizer_are_those_of_the_run(config):
    objective = ObjectiveConfig(slot_weights="dpace", match="kl", base_weight_shape="cosine")
    card = card_of(replace(config, objective=objective, optimizer=OptimizerConfig(kind="muon")))
    for said in ("slot_weights dpace", "match kl", "match_weight 0.5", "base_weight_shape cosine", "kind muon"):
        assert said in card, said


def test_a_later_drafter_does_not_borrow_the_numbers_of_the_best(config):
    folder = RunFolder(Path(config.output_dir) / config.name)
    for directory in (folder.best_draft, folder.latest_draft):
        directory.mkdir(parents=True)
    folder.metrics.write_text(json.dumps(HELD_OUT) + "\n")
    write_model_cards(config, folder, make_trained(), NUMBERS)
    best, latest = ((d / "README.md").read_text() for d in (folder.best_draft, folder.latest_draft))
    assert "| head on | 3.25 |" in best
    assert "3.25" not in latest and "| tau over prompts, head on | 3.38 |" in latest
    assert "not measured for this drafter (step 9), only for the best one of its run (step 6)" in latest
    (folder.best_draft / "README.md").write_text("license: mit")
    write_model_cards(config, folder, make_trained(), NUMBERS)
    assert (folder.best_draft / "README.md").read_text() == "license: mit"


def test_without_held_out_chats_nothing_is_claimed(config):
    card = card_of(config, numbers=None)
    assert "tau, acceptance by slot and speed-up: not measured" in card and "speed-up |" not in card


def test_who_answered_and_what_a_user_must_know(config):
    assert "not recorded (train.jsonl.settings.json is missing)" in card_of(config)
    url = "http://gpu7.internal:30000/v1"
    writers = {
        "qwen3-8b": {"kind": "directory", "path": "/secret/models/Qwen3-8B"},
        "qwen3-8b behind an endpoint": {
            "kind": "endpoint",
            "model": "Qwen/Qwen3-8B",
            "root": "/secret/q",
            "urls": [url],
        },
        "not recorded": "a model",
    }
    for shown, writer in writers.items():
        record = {"target": writer, "sampling": {"temperature": 0.7}}
        if isinstance(writer, dict):
            record = describe_job(writer, Path("in.jsonl"), [], ResponseSettings(8, 8, 1, SamplingConfig(0.7)))
        settings_path(Path(config.data.train_path)).write_text(json.dumps(record))
        card = card_of(config, warnings=["The answers are another model's."])
        assert f"| who wrote the answers | {shown}, temperature 0.7 |" in card
        assert "secret" not in card and "internal" not in card
    assert "- The answers are another model's." in card and "**Mind:**" not in card_of(config)
    embedded = replace(config, target=TargetSource(), data=DataConfig(), corpus=CorpusConfig())
    card = card_of(embedded)
    assert "the target itself, greedy" in card and "base_model" not in card
