"""The folder of one run: where each stage leaves its result, and the configuration all of them belong to.

Knows paths and the stored configuration, nothing about models or training.
"""

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from domino_jax.config import diff_configs, to_json_dict
from domino_jax.durable import flush_tree, hold_lock, move, remove, write_atomically
from domino_jax.processes import ProcessError, on_all, on_first
from domino_jax.run_config import RunConfig

_FREE_PARTS = ("name", "output_dir", "mesh")
"""Where the run lies and on which devices; no result depends on it, and a run that was moved goes on."""
_FEATURE_SETTINGS = ("feature_cache", "feature_dtype", "damaged_shards")
"""Settings of `data` that only the drafter's training depends on."""


class RunError(ValueError):
    """A run that cannot start or go on; the message says why and what to do."""


@dataclass(frozen=True)
class RunFolder:
    """Paths below `output_dir/name`.

    Attributes:
        report_root: where the report goes instead.
    """

    root: Path
    report_root: Path | None = None

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
    def lock(self) -> Path:
        """Held by the process that works in the folder."""
        return self.root / ".lock"

    @property
    def report(self) -> Path:
        """The report's folder: `report.md`, plots, raw rows, coloured samples."""
        return self.report_root or self.root / "report"


@contextmanager
def hold_run(config: RunConfig) -> Iterator[RunFolder]:
    """Open the run's folder as `open_run` does, for this run alone; that ends with the process, however it ends.

    Raises:
        RunError: as `open_run`, or another process works in the folder.
        ProcessError: of several processes one does not see the folder of the first, which holds it for all of them.
    """
    with ExitStack() as held:
        root = Path(on_first(lambda: str(held.enter_context(_hold_alone(config)).root.absolute())))
        if jax.process_count() > 1:
            _check_shared(root)
        yield RunFolder(root) if jax.process_count() > 1 else find_run(config)


def _check_shared(root: Path) -> None:
    """Check that all processes see the lock that the first has written.

    Raises:
        ProcessError: one sees none, or another.
    """
    lock = RunFolder(root).lock
    holder = on_first(lambda: lock.read_text(encoding="utf-8"))

    def check() -> None:
        if not lock.exists() or lock.read_text(encoding="utf-8") != holder:
            raise ProcessError(
                f"{root} on {socket.gethostname()} is not the folder that {holder} holds; give --config.output_dir "
                "on a file system that all processes share"
            )

    on_all(check)


@contextmanager
def _hold_alone(config: RunConfig) -> Iterator[RunFolder]:
    folder = find_run(config)
    folder.root.mkdir(parents=True, exist_ok=True)

    def refuse(holder: str) -> None:
        raise RunError(
            f"{holder} works in {folder.root}; wait for its end (a run that is asked to stop saves first), or "
            "give this run another --config.name"
        )

    with hold_lock(folder.lock, refuse):
        yield open_run(config)


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
        stored = _fixed_settings(folder, json.loads(folder.config.read_text()))
        now = _fixed_settings(folder, json.loads(json.dumps(to_json_dict(config))))
        differences = diff_configs(stored, now)
        if differences:
            raise RunError(
                f"{folder.root} holds results of another configuration; go on with the same one, give this run another "
                "--config.name, or remove the folder:\n  " + "\n  ".join(differences)
            )
    return folder


def _fixed_settings(folder: RunFolder, config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a configuration that results in the folder depend on.

    A feature cache may be moved, but not given up or taken up between two checkpoints: losses from it are not those of
    training without it, bit for bit.
    """
    has_checkpoints = _has_content(folder.checkpoints)
    if not has_checkpoints and not folder.best_draft.exists():
        parts: set[str] = set()
        if folder.train_chats.exists():
            parts |= {"seed", "target", "corpus"}
        if folder.responses.exists():
            parts.add("data")
        fixed = {name: value for name, value in config.items() if name in parts}
        return _leave_out(fixed, "data", _FEATURE_SETTINGS)
    fixed = {name: value for name, value in config.items() if name not in _FREE_PARTS}
    fixed = _leave_out(fixed, "train", ("wandb_project",))
    if has_checkpoints:  # they know the target by its content
        fixed = _leave_out(fixed, "target", ("path",))
    if fixed["data"].get("feature_cache"):
        fixed["data"] = fixed["data"] | {"feature_cache": "a directory"}
    return fixed


def _leave_out(config: dict[str, Any], part: str, names: Sequence[str]) -> dict[str, Any]:
    """Return a configuration without some settings of one part, which may be missing."""
    if part not in config:
        return config
    return config | {part: {name: value for name, value in config[part].items() if name not in names}}


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
