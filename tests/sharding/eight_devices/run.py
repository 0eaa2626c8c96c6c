"""A whole training run on a mesh, and one that goes on on another mesh; run by `test_eight_devices.py`."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from domino_jax.checkpoints.huggingface import save_target
from domino_jax.config import ConfigError, TargetConfig
from domino_jax.data.responses import write_chats
from domino_jax.data.tokenizer import save_tokenizer, train_tokenizer
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
from domino_jax.runs import training_run
from domino_jax.runs.dry_run import rehearse
from domino_jax.runs.training_run import run_training

WORDS = ["alpha", "beta", "gamma", "delta", "omega", "sigma"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    root = tmp_path_factory.mktemp("material")
    chats = [
        [
            {"role": "user", "content": f"say {WORDS[i % 6]} {WORDS[i // 6 % 6]}"},
            {"role": "assistant", "content": f"{WORDS[i % 6]} and {WORDS[i // 6 % 6]}, that is number {i}"},
        ]
        for i in range(24)
    ]
    tokenizer = train_tokenizer((m["content"] for chat in chats for m in chat), 300)
    config = TargetConfig(len(tokenizer), 16, 32, 4, 4, 2, 8, max_position_embeddings=96, tie_word_embeddings=True)
    save_tokenizer(tokenizer, root / "target")
    save_target(str(root / "target"), config, init_target_params(config, jax.random.key(0)))
    write_chats(root / "train.jsonl", chats[:20])
    write_chats(root / "eval.jsonl", chats[20:])
    return root


def make_config(material, output_dir, mesh=None) -> RunConfig:
    return RunConfig(
        name="run",
        output_dir=str(output_dir),
        target=TargetSource(str(material / "target")),
        draft=DraftSettings(num_hidden_layers=1, block_size=4, gru_hidden_dim=8, emb_dim=4),
        data=DataConfig(str(material / "train.jsonl"), str(material / "eval.jsonl"), max_length=48, batch_size=10),
        objective=ObjectiveConfig(num_anchors=4, head_chunk=2, attention_chunk=2),
        train=TrainConfig(
            num_steps=6, log_every=1, checkpoint_every=2, eval_every=3, eval_prompts=3, eval_max_new_tokens=8
        ),
        mesh=mesh or MeshConfig(),
    )


def read_numbers(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    taus = {row["step"]: row["tau"] for row in rows if "tau" in row}
    return losses, taus


@pytest.fixture(scope="module")
def on_one(material, tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training_run, "find_layout", lambda config: None)
        run_training(make_config(material, output))
    return read_numbers(output / "run")


def test_a_run_goes_on_on_another_mesh_to_the_same_numbers(material, on_one, tmp_path):
    run_training(make_config(material, tmp_path, MeshConfig(4, 2, True)))
    folder = tmp_path / "run"
    losses, taus = read_numbers(folder)
    assert list(losses) == list(on_one[0]) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(list(losses.values()), list(on_one[0].values()), rtol=0, atol=1e-5)
    assert taus == on_one[1]
    for name in ("checkpoints/6", "draft", "draft_latest"):
        shutil.rmtree(folder / name)
    run_training(make_config(material, tmp_path))  # all devices on `data`; 10 sequences are filled up to 16
    again, taus = read_numbers(folder)
    assert list(again) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(list(again.values()), list(on_one[0].values()), rtol=0, atol=1e-5)
    assert taus == on_one[1]


def test_a_rehearsal_counts_what_a_device_holds(material, tmp_path, capsys):
    rehearse(make_config(material, tmp_path, MeshConfig(4, 2, True)))
    said = capsys.readouterr().out
    assert "memory of each of 8 devices, in training" in said
    assert "one train step on the first batch" in said


def test_more_groups_than_sequences_are_refused(material, tmp_path):
    config = make_config(material, tmp_path)
    message = r"data.batch_size 10 by data.micro_steps 2 is 5 rows at a time for 8 groups of devices"
    with pytest.raises(ConfigError, match=message):
        run_training(replace(config, data=replace(config.data, micro_steps=2)))
