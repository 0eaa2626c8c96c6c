"""A dry run: it writes nothing, and what it shows is what the run does."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from safetensors.numpy import load_file

from domino_jax.data.chat_template import load_tokenizer
from domino_jax.durable import format_bytes
from domino_jax.run_config import (
    CorpusConfig,
    DataConfig,
    DraftSettings,
    ObjectiveConfig,
    RunConfig,
    TargetSource,
    TrainConfig,
)
from domino_jax.runs import training_run as training_run_module
from domino_jax.runs.dry_run import describe_folder, mark_row, rehearse
from domino_jax.runs.folder import RunError, RunFolder, open_run
from domino_jax.runs.monitor import read_rows
from domino_jax.runs.training_run import run_training

CONFIG_FILE = """
from domino_jax.run_config import *


def get_config():
    return RunConfig(
        name="run",
        target=TargetSource("target"),
        draft=DraftSettings(num_hidden_layers=1, block_size=4, gru_hidden_dim=8, emb_dim=4),
        data=DataConfig("train.jsonl", "eval.jsonl", max_length=48, batch_size=4, micro_steps=2),
        objective=ObjectiveConfig(num_anchors=4, head_chunk=2),
        train=TrainConfig(eval_prompts=2, eval_max_new_tokens=8, num_steps=1, log_every=1),
    )
"""


def make_config(material, output_dir) -> RunConfig:
    return RunConfig(
        name="run",
        output_dir=str(output_dir),
        target=TargetSource(str(material / "target")),
        draft=DraftSettings(num_hidden_layers=1, block_size=4, gru_hidden_dim=8, emb_dim=4),
        data=DataConfig(
            str(material / "train.jsonl"), str(material / "eval.jsonl"), max_length=48, batch_size=4, micro_steps=2
        ),
        objective=ObjectiveConfig(num_anchors=4, head_chunk=2),
        train=TrainConfig(eval_prompts=2, eval_max_new_tokens=8, num_steps=1, log_every=1),
    )


def make_embedded_config(output_dir) -> RunConfig:
    return RunConfig(
        name="embedded",
        output_dir=str(output_dir),
        draft=DraftSettings(
            num_hidden_layers=1, target_layer_ids=(0, 1), block_size=4, gru_hidden_dim=8, emb_dim=4,
            initial_weights="target",
        ),
        data=DataConfig(max_length=160, batch_size=7),
        objective=ObjectiveConfig(num_anchors=4, head_chunk=2),
        train=TrainConfig(eval_max_new_tokens=12, num_steps=3),
        corpus=CorpusConfig(
            num_train_chats=60, num_draft_chats=20, num_eval_chats=4, vocab_size=400, hidden_size=16,
            intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
            response_max_new_tokens=12,
        ),
    )  # fmt: skip


def hash_tree(root):
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        if path.is_file()
        else None
        for path in sorted(root.rglob("*"))
    }


def test_nothing_is_written_not_even_for_bad_rows(material, repository, tmp_path):
    """The command, as a user types it, in a folder with configuration, target and data."""
    shutil.copytree(material / "target", tmp_path / "target")
    shutil.copy(repository / "train.py", tmp_path)
    shutil.copytree(repository / "domino_jax", tmp_path / "domino_jax", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.py").write_text(CONFIG_FILE)
    (tmp_path / "train.jsonl").write_text((material / "train.jsonl").read_text() + "not json\n")
    shutil.copy(material / "eval.jsonl", tmp_path)
    before = hash_tree(tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"PYTHONPATH": "."}
    command = [sys.executable, "train.py", "--config", "configs/small.py", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert hash_tree(tmp_path) == before
    assert "data.batch_size: 4" in done.stdout  # the resolved configuration
    assert "20 rows used, 1 skipped" in done.stdout and "malformed JSON" in done.stdout
    assert "WARNING: nothing says who wrote the answers in train.jsonl" in done.stdout
    assert re.search(r"train step compiled in [\d.]+ s", done.stdout)
    assert len(re.findall(r"^--- \d: ", done.stdout, flags=re.MULTILINE)) == 5
    command = [sys.executable, "train.py", "--config", "configs/small.py", "--dry-run", "--config.data.eval_path=no"]
    failed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and failed.stderr.startswith("error: data.eval_path is 'no', which is no file")
    assert hash_tree(tmp_path) == before


def find(pattern, said):
    return re.search(pattern, said, flags=re.MULTILINE)[1].replace(",", "")


def test_its_loss_and_sizes_are_those_of_the_run(material, tmp_path, capsys, monkeypatch):
    config = make_config(material, tmp_path)
    data = replace(config.data, eval_path="", bucket_widths=(40,))
    rehearse(replace(config, data=replace(data, feature_cache=str(tmp_path / "features"))))
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    config = replace(config, data=data)
    monkeypatch.setattr(training_run_module, "write_report", lambda *_: None)
    run_training(config)
    row = next(row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["stage"] == "draft")
    assert float(find(r"^one train step .* loss ([\d.]+)$", said)) == pytest.approx(row["loss"], abs=1e-6)
    trained = int(find(r"^  trained in all +([\d,]+)$", said))
    parts = [int(find(rf"^  drafter: {name} +([\d,]+)$", said)) for name in ("backbone", "head")]
    weights = load_file(tmp_path / "run" / "draft" / "model.safetensors")
    assert trained == sum(parts) == sum(tensor.size for tensor in weights.values())
    target = load_file(material / "target" / "model.safetensors")
    num_target = sum(tensor.size for tensor in target.values())
    assert int(find(r"^  target \(frozen\) +([\d,]+)$", said)) == num_target
    assert find(r"^  target's weights +(.*)$", said) == format_bytes(4 * num_target)
    assert find(r"^  drafter's weights \(float32\) +(.*)$", said) == format_bytes(4 * trained)
    assert find(r"^  target features of a micro-step +(.*)$", said) == format_bytes(4 * 2 * 48 * 1 * 16)
    assert find(r"^  exported drafters.*latest +(.*)$", said) == format_bytes(2 * 4 * trained)
    num_tokens = int(find(r"^data: .* ([\d,]+) tokens, ", said))
    assert find(r"^  features in .*, beside it +(.*), less what", said) == format_bytes(
        (4 * 16 + 5) * num_tokens
    )  # id and mask too
    for name in ("optimizer moments", "gradients", "XLA: in all", "checkpoints: ", "free at"):
        assert re.search(rf"^  {name}.* [\d.]+ (B|KiB|MiB|GiB)$", said, flags=re.MULTILINE), name


def test_it_says_where_a_run_would_go_on(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert describe_folder(folder).endswith("does not exist yet")
    folder.root.mkdir()
    assert "without a checkpoint" in describe_folder(folder)
    for name in ("7", "12", "12.orbax-checkpoint-tmp"):
        (folder.checkpoints / name).mkdir(parents=True)
    assert "a run goes on from step 12" in describe_folder(folder)


@pytest.mark.slow
def test_the_embedded_default_is_rehearsed_in_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rehearse(make_embedded_config("runs"))
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert said.count("weights are random, the loss says nothing") == 2
    assert "20 chats; the target has not answered them yet" in said
    assert re.search(r"target \(frozen\) +[\d,]+", said) and re.search(r"loss [\d.]+ \(weights are random", said)
    assert "[[<|im_start|>user" in said


def test_a_folder_of_another_configuration_is_refused_as_a_run_would(material, tmp_path):
    config = make_config(material, tmp_path)
    folder = open_run(config)
    (folder.checkpoints / "1").mkdir(parents=True)
    before = hash_tree(tmp_path)
    changed = replace(config, draft=replace(config.draft, block_size=5))
    with pytest.raises(RunError, match=r"draft\.block_size: stored 4, now 5"):
        rehearse(changed)
    assert hash_tree(tmp_path) == before


def test_what_is_not_learned_is_marked_and_long_text_loses_its_middle(material):
    tokenizer = load_tokenizer(str(material / "target"))
    prompt, answer = tokenizer("say alpha")["input_ids"], tokenizer("beta")["input_ids"]
    ids, mask = prompt + answer, [0] * len(prompt) + [1] * len(answer)
    assert mark_row(tokenizer, ids, mask, with_brackets=True) == [("[[say alpha]]", False), ("beta", True)]
    assert mark_row(tokenizer, ids, mask, with_brackets=False) == [("say alpha", False), ("beta", True)]
    ((text, _),) = mark_row(tokenizer, answer * 100, [1] * 100 * len(answer), with_brackets=True)
    assert f"... {100 * len(answer) - 80} tokens ..." in text and len(text) < 600
