"""What all golden cases share: tolerances, how numbers are compared, how recorded files are opened."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from domino_jax.checkpoints.huggingface import check_draft_fits, load_draft, load_target
from domino_jax.checkpoints.safetensors_io import CheckpointError

# The tolerances, here and nowhere else. An error is |ours - recorded| / max(1, |recorded|), its largest in a tensor;
# of a gradient it is max |ours - recorded| / max |recorded|. Ids, masks, labels and lengths are compared exactly.
STATE_TOLERANCE = 1e-4  # hidden states, logits, caches, GRU states
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
RULE_TOLERANCE = 1e-7


class LayoutError(ValueError):
    """A directory that does not hold what a case needs."""


class Recorded(dict[str, Any]):
    """Recorded values by name, and those of them that nothing has read yet.

    What nothing reads is compared with nothing: a case ends with `Result.all_read`.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.unread = set(values)

    def __getitem__(self, name: str) -> Any:
        self.unread.discard(name)
        return super().__getitem__(name)

    def part(self, prefix: str) -> "Recorded":
        """Take the values whose names begin with `prefix`, named without it."""
        return Recorded({name.removeprefix(prefix): self[name] for name in list(self) if name.startswith(prefix)})


@dataclass
class Result:
    """What one case found.

    Attributes:
        error: the largest floating-point error of the case.
        failures: one sentence for everything outside its tolerance; empty: the case passed.
    """

    error: float = 0.0
    failures: list[str] | None = None

    def compare(self, name: str, ours: object, recorded: object, tolerance: float = STATE_TOLERANCE) -> None:
        ours, recorded = np.asarray(ours, np.float64), np.asarray(recorded, np.float64)
        if ours.shape != recorded.shape:
            self.fail(f"{name} has shape {ours.shape}, recorded {recorded.shape}")
            return
        if ours.size:
            self.bound(name, float(np.max(np.abs(ours - recorded) / np.maximum(1.0, np.abs(recorded)))), tolerance)

    def bound(self, name: str, error: float, tolerance: float) -> None:
        self.error = max(self.error, error) if np.isfinite(error) else float("inf")
        if not error <= tolerance:
            self.fail(f"{name} differs by {error:.2e}, more than {tolerance:.0e}")

    def equal(self, name: str, ours: object, recorded: object) -> None:
        ours, recorded = np.asarray(ours), np.asarray(recorded)
        if ours.shape != recorded.shape:
            self.fail(f"{name} has shape {ours.shape}, recorded {recorded.shape}")
        elif not np.array_equal(ours, recorded):
            at = tuple(int(i) for i in np.argwhere(ours != recorded)[0])
            self.fail(f"{name} differs, first at {at}: {ours[at]}, recorded {recorded[at]}")

    def all_read(self, recorded: Recorded, prefix: str = "") -> None:
        for name in sorted(recorded.unread):
            self.fail(f"{prefix}{name} is recorded, but nothing here is compared with it")

    def fail(self, sentence: str) -> None:
        self.failures = [*(self.failures or []), sentence]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=8)
def open_target(path: Path) -> tuple:
    return load_target(str(path), "float32")


@lru_cache(maxsize=32)
def open_draft(path: Path) -> object:
    return load_draft(str(path), "float32")


def find_target(root: Path, draft_name: str) -> Path:
    """Return the target of a drafter: the one its recorded cases name, else the only one that it fits."""
    for kind in ("spec_generate", "backbone", "train"):
        path = root / kind / f"{draft_name}.json"
        named = read_json(path).get("target") if path.exists() else None
        if isinstance(named, str) and (root / named / "config.json").exists():
            return root / named
    fitting = []
    for config in sorted(root.glob("*/config.json")):
        try:
            check_draft_fits(open_draft(root / "draft" / draft_name).config, open_target(config.parent)[0])
        except CheckpointError:
            continue
        fitting.append(config.parent)
    if len(fitting) != 1:
        raise LayoutError(
            f"drafter {draft_name}: no file names its target, and {len(fitting)} directories of {root} fit it; "
            'give "target" in spec_generate'
        )
    return fitting[0]
