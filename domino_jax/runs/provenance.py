"""Who wrote the answers of a file of chats, and whether that is the target a drafter is trained for.

Beside every file of responses lies FILE.settings.json: the target that answered, how it sampled, and whether it was
asked to think. A drafter learns the habits of whoever wrote the answers, so a run looks there before it trains.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from domino_jax.checkpoints.fingerprint import fingerprint_target, hash_json
from domino_jax.checkpoints.huggingface import CONFIG_FILE
from domino_jax.checkpoints.safetensors_io import CheckpointError, read_json_object
from domino_jax.config import diff_configs
from domino_jax.runs.target_model import TargetModel

DIRECTORY, ENDPOINT = "directory", "endpoint"
"""Values of `target.kind` in a settings file."""
_REGENERATE = "answer the prompts again with this target (scripts/regenerate_responses.py), or tau will stay low"


def settings_path(output: Path) -> Path:
    """Return the file beside `output` that says what its rows are made from."""
    return output.with_name(output.name + ".settings.json")


def describe_directory(directory: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return who answers when a directory's weights do: its path, fingerprint and tokenizer.

    Raises:
        CheckpointError: the directory holds no supported target, or a file is damaged.
    """
    identity = {"kind": DIRECTORY, "path": str(directory.resolve())}
    return identity | fingerprint_target(directory) | describe_tokenizer(tokenizer)


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return hashes of a tokenizer's `vocabulary` and `chat_template`."""
    return {
        "vocabulary": hash_json(tokenizer.get_vocab()),
        "chat_template": hash_json(tokenizer.get_chat_template()),
    }


def name_writer(writer: Any) -> str:
    """Return who answered, from the `target` of a settings file, in a form for the public: no host and no folder."""
    if not isinstance(writer, Mapping) or writer.get("kind") not in (DIRECTORY, ENDPOINT):
        return "not recorded"
    if writer["kind"] == ENDPOINT:
        return f"{_last_part(str(writer.get('model', '')))} behind an endpoint"
    return _last_part(str(writer.get("path", "")))


def find_mismatches(train_path: Path, target: TargetModel, target_path: str, enable_thinking: bool) -> list[str]:
    """Return a line for everything in which the answers of `train_path` and a run that trains on them do not match.

    `target_path` is the directory or hub id as the configuration names it: an endpoint's model is known by name only.
    A file that nothing is known about gives one line that says so.
    """
    settings_file = settings_path(train_path)
    if not settings_file.exists():
        return [
            f"nothing says who wrote the answers in {train_path} ({settings_file.name} is missing); they should be the "
            "target's own: scripts/regenerate_responses.py writes both files"
        ]
    try:
        settings = read_json_object(settings_file)
    except CheckpointError as error:
        return [f"nothing says who wrote the answers in {train_path}: {error}"]
    writer = settings.get("target")
    if not isinstance(writer, dict) or writer.get("kind") not in (DIRECTORY, ENDPOINT):
        return [f"nothing says who wrote the answers in {train_path}: {settings_file} names no target"]
    if writer["kind"] == DIRECTORY:
        found = _compare_weights(train_path, writer, target)
    else:
        found = _compare_names(train_path, writer, target, target_path)
    found += _compare_tokenizers(train_path, writer, describe_tokenizer(target.tokenizer), target.path)
    thinking = settings.get("enable_thinking")
    if not isinstance(thinking, bool):
        found.append(
            f"the settings of {train_path} do not say whether the target was asked to think; the run has "
            f"data.enable_thinking {enable_thinking}"
        )
    elif thinking is not enable_thinking:
        found.append(
            f"the answers in {train_path} were written with enable_thinking {thinking}, the run has "
            f"data.enable_thinking {enable_thinking}; give --config.data.enable_thinking={not enable_thinking} or "
            "answer the prompts again"
        )
    return found


def _compare_weights(train_path: Path, writer: Mapping[str, Any], target: TargetModel) -> list[str]:
    ours = fingerprint_target(Path(target.path))
    stored = {name: writer.get(name) for name in ours}
    if stored == ours:
        return []
    sizes = diff_configs({"config": stored["config"]}, {"config": ours["config"]})
    parts = [line.removeprefix("config.") for line in sizes] or [n for n in ours if stored[n] != ours[n]]
    return [
        f"the answers in {train_path} were written by {writer.get('path')}, which is another target than "
        f"{target.path} (differing: {', '.join(parts)}); {_REGENERATE}"
    ]


def _compare_names(train_path: Path, writer: Mapping[str, Any], target: TargetModel, target_path: str) -> list[str]:
    theirs = [name for name in (writer.get("model"), writer.get("root")) if isinstance(name, str) and name]
    raw_config = read_json_object(Path(target.path) / CONFIG_FILE)
    ours = [target_path, target.path, str(raw_config.get("_name_or_path") or "")]
    if {_last_part(name) for name in theirs} & {_last_part(name) for name in ours if name}:
        return []
    return [
        f"the answers in {train_path} were written by the model {' = '.join(map(repr, theirs)) or 'of no name'} of an "
        f"endpoint, the run's target is {target_path or target.path}; if these are not two names of one model, "
        f"{_REGENERATE}"
    ]


def _compare_tokenizers(
    train_path: Path, writer: Mapping[str, Any], ours: Mapping[str, str], target_path: str
) -> list[str]:
    return [
        f"the answers in {train_path} were written with another {name.replace('_', ' ')} ({writer[name]}) than that of "
        f"{target_path} ({value}); train with the tokenizer files that answered, or answer the prompts again"
        for name, value in ours.items()
        if name in writer and writer[name] != value
    ]


def _last_part(name: str) -> str:
    """Return what a path, hub id or folder of the hub's cache calls a model, in lower case."""
    cached = re.search(r"models--(?:[^/]+?--)?([^/]+)", name)
    return (cached[1] if cached else name.rstrip("/").rsplit("/", 1)[-1]).lower()
