"""Whose answers a file holds: what matches stays silent, what does not is one line that says what to do."""

import json
import shutil

import pytest

from domino_jax.checkpoints.huggingface import read_target_config
from domino_jax.data.chat_template import load_tokenizer
from domino_jax.runs.provenance import describe_directory, describe_tokenizer, find_mismatches, settings_path
from domino_jax.runs.target_model import HeldWeights, TargetModel


@pytest.fixture(scope="module")
def target(material):
    path = str(material / "target")
    return TargetModel(path, read_target_config(path)[0], HeldWeights({}), load_tokenizer(path))


@pytest.fixture
def find(target, tmp_path):
    """Return the mismatches between a target and a file whose settings name this writer."""

    def look(writer, enable_thinking=False, target_path=None, stored_thinking=False):
        train_path = tmp_path / "train.jsonl"
        stored = {"target": writer, "enable_thinking": stored_thinking}
        settings_path(train_path).write_text(json.dumps(stored))
        return find_mismatches(train_path, target, target_path or target.path, enable_thinking)

    return look


def test_the_targets_own_answers_are_silent(find, material, target, tmp_path):
    shutil.copytree(material / "target", tmp_path / "copy")
    assert find(describe_directory(tmp_path / "copy", target.tokenizer)) == []


def test_another_targets_answers_are_told(find, material, target):
    own = describe_directory(material / "target", target.tokenizer)
    (line,) = find({**own, "path": "/models/other", "weights": "0"})
    assert "were written by /models/other, which is another target than" in line and "(differing: weights)" in line
    (line,) = find({**own, "config": own["config"] | {"hidden_size": 99}, "tensors": "0", "weights": "0"})
    assert "(differing: hidden_size: stored 99, now 16)" in line and "scripts/regenerate_responses.py" in line
    lines = find({**own, "chat_template": "0", "vocabulary": "1"})
    assert ["another chat template (0)" in lines[1], "another vocabulary (1)" in lines[0]] == [True, True]


def test_the_thinking_mode_is_compared(find, material, target):
    own = describe_directory(material / "target", target.tokenizer)
    (line,) = find(own, enable_thinking=True)
    assert "enable_thinking False, the run has data.enable_thinking True" in line
    assert "--config.data.enable_thinking=False" in line
    (line,) = find(own, stored_thinking=None)
    assert "do not say whether the target was asked to think" in line


@pytest.mark.parametrize(
    ("names", "target_path", "is_same"),
    [
        ({"model": "Qwen/Qwen3-8B"}, "/models/qwen3-8b/", True),
        ({"model": "served", "root": "/data/Qwen3-8B"}, "Qwen/Qwen3-8B", True),
        ({"model": "Qwen3-8B"}, "/cache/models--Qwen--Qwen3-8B/snapshots/0123abc", True),
        ({"model": "Qwen3-8B"}, "Qwen/Qwen3-4B", False),
        ({}, "Qwen/Qwen3-4B", False),
    ],
)
def test_an_endpoints_model_is_known_by_its_name(find, target, names, target_path, is_same):
    lines = find({"kind": "endpoint", "urls": ["http://h"], **names}, target_path=target_path)
    assert (lines == []) == is_same
    if names and not is_same:
        assert "by the model 'Qwen3-8B' of an endpoint, the run's target is Qwen/Qwen3-4B" in lines[0]


def test_an_endpoints_tokenizer_is_compared_where_it_was_read(find, target):
    writer = {"kind": "endpoint", "model": "target", **describe_tokenizer(target.tokenizer)}
    assert find(writer) == []
    (line,) = find({**writer, "chat_template": "0"})
    assert "another chat template" in line


def test_a_name_in_the_config_counts(find, material, target, tmp_path):
    shutil.copytree(material / "target", tmp_path / "mine")
    config = tmp_path / "mine" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": "Qwen/Qwen3-8B"}))
    mine = TargetModel(str(tmp_path / "mine"), target.config, HeldWeights({}), target.tokenizer)
    find({"kind": "endpoint", "model": "Qwen3-8B"})
    assert find_mismatches(tmp_path / "train.jsonl", mine, mine.path, False) == []


@pytest.mark.parametrize("content", [None, "not json", "{}", '{"target": "/models/x"}'])
def test_a_file_that_nothing_is_known_about_gives_one_line(target, tmp_path, content):
    train_path = tmp_path / "train.jsonl"
    if content is not None:
        settings_path(train_path).write_text(content)
    (line,) = find_mismatches(train_path, target, target.path, False)
    assert line.startswith(f"nothing says who wrote the answers in {train_path}")
