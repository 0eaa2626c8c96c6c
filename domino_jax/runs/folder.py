"""The folder of one run: where each stage leaves its result, and the configuration all of them belong to.

Knows paths and the stored configuration, nothing about models or training.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domino_jax.checkpoints.train_state import diff_configs
from domino_jax.config import to_json_dict
from domino_jax.durable import flush_tree, move, remove, write_atomically
from domino_jax.run_config import RunConfig

_FREE_SETTINGS = {"train": ("wandb_project",), "data": ("feature_cache", "damaged_shards")}
"""Settings, by part of the configuration, that say where metrics are shown, where features lie and how files are
mended; no result depends on them, and a run may go on with others."""


class RunError(ValueError):
    """A run that cannot start or go on; the message says why and what to do."""


@dataclass(frozen=True)
class RunFolder:
    """Paths below `output_dir/name`."""

    root: Path

    @property
    def config(self) -> Path:
        """Resolved configuration (JSON)."""
        return self.root / "config.json"

    @property
    def train_chats(self) -> Path:
        """Chats the embedded target learns from (JSONL)."""
        return self.root / "corpus" / "train.jsonl"

    @property
    def eval_chats(self) -> Path:
        """Held-out chats of the embedded corpus (JSONL)."""
        return self.root / "corpus" / "eval.jsonl"

    @property
    def target(self) -> Path:
        """The embedded target in Hugging Face format, tokenizer included."""
        return self.root / "target"

    @property
    def target_checkpoints(self) -> Path:
        """Checkpoints of the embedded target's own training."""
        return self.root / "target_checkpoints"

    @property
    def responses(self) -> Path:
        """Chats whose assistant turns the target wrote (JSONL)."""
        return self.root / "responses.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the drafter's training: `latest` and `best`."""
        return self.root / "checkpoints"

    @property
    def best_draft(self) -> Path:
        """The drafter with the highest decoded tau, in the public layout."""
        return self.root / "draft"

    @property
    def latest_draft(self) -> Path:
        """The drafter after the last step, in the public layout."""
        return self.root / "draft_latest"

    @property
    def metrics(self) -> Path:
        """Metric rows of all stages (JSONL)."""
        return self.root / "metrics.jsonl"

    @property
    def wandb(self) -> Path:
        """Which Weights & Biases run shows the metrics, and up to which step of each stage (JSON)."""
        return self.root / "wandb.json"

    @property
    def report(self) -> Path:
        """The report's folder: `report.md`, plots, raw rows, coloured samples."""
        return self.root / "report"


def open_run(config: RunConfig) -> RunFolder:
    """Make the run's folder, or go on in one whose results so far come from the same configuration.

    Parts of the configuration that no result depends on yet may change; the stored one is then replaced.

    Raises:
        RunError: a result in the folder comes from another configuration; the message lists every difference.
    """
    folder = find_run(config)
    folder.root.mkdir(parents=True, exist_ok=True)
    write_text(folder.config, json.dumps(to_json_dict(config), indent=2) + "\n")
    return folder


def find_run(config: RunConfig) -> RunFolder:
    """Return the paths of the run without writing anything.

    Raises:
        RunError: as `open_run`.
    """
    folder = RunFolder(Path(config.output_dir) / config.name)
    if folder.config.exists():
        now = json.loads(json.dumps(to_json_dict(config)))
        fixed = _fixed_parts(folder, now)
        stored = _choose_parts(json.loads(folder.config.read_text()), fixed)
        differences = diff_configs(stored, _choose_parts(now, fixed))
        if differences:
            raise RunError(
                f"{folder.root} holds results of another configuration; go on with the same one, give this run another "
                "--config.name, or remove the folder:\n  " + "\n  ".join(differences)
            )
    return folder


def _choose_parts(config: dict[str, Any], parts: set[str]) -> dict[str, Any]:
    """Return the parts of a configuration that are named, without the settings that no result depends on."""
    chosen = {name: value for name, value in config.items() if name in parts}
    for part, names in _FREE_SETTINGS.items():
        if part in chosen:
            chosen[part] = {name: value for name, value in chosen[part].items() if name not in names}
    return chosen


def _fixed_parts(folder: RunFolder, config: dict[str, Any]) -> set[str]:
    """Return the parts of a configuration that results in the folder depend on."""
    if _has_content(folder.checkpoints) or folder.best_draft.exists():
        return set(config)
    fixed = set()
    if folder.train_chats.exists():
        fixed |= {"seed", "target", "corpus"}
    if folder.responses.exists():
        fixed.add("data")
    return fixed


def _has_content(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write(text.encode())


def build_once(path: Path, build: Callable[[Path], Any]) -> None:
    """Let `build` fill a folder or file beside `path` and move it there when whole; do nothing where `path` exists."""
    if path.exists():
        return
    unfinished = path.with_name(path.name + ".part")
    remove(unfinished)
    path.parent.mkdir(parents=True, exist_ok=True)
    build(unfinished)
    flush_tree(unfinished)
    move(unfinished, path)
