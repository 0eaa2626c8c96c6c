"""Metric rows on Weights & Biases, beside TensorBoard: the same scalars, one W&B run for a run's folder.

The folder remembers which W&B run that is and what it was sent, so that a run that goes on continues it, repeats
nothing, and sends what an outage or a late switch-on left out. W&B counts its own steps; every stage brings its own as
`stage/step`. Trouble with W&B is told once and never stops a run.

Source: `wandb.init(id=..., resume="allow")` and `define_metric` of the wandb package.
"""

import importlib
import json
import secrets
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from domino_jax.checkpoints.safetensors_io import CheckpointError, read_json_object
from domino_jax.config import to_json_dict
from domino_jax.run_config import RunConfig
from domino_jax.runs.folder import RunError, RunFolder, write_text
from domino_jax.runs.monitor import choose_scalars, read_rows

_FINISH_TIMEOUT_S = 120.0


def load_wandb() -> ModuleType:
    """Import the wandb package.

    Raises:
        RunError: it is not installed.
    """
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise RunError(_missing()) from error
    if not hasattr(wandb, "init"):  # a folder `wandb`, where offline runs are kept, passes for a package
        raise RunError(_missing())
    return wandb


def _missing() -> str:
    return (
        "train.wandb_project is set, but the package wandb is not installed; install the extra "
        '(pip install -e ".[wandb]") or leave train.wandb_project empty'
    )


class WandbLog:
    """The W&B run of one folder; goes quiet after its first failure."""

    def __init__(self, config: RunConfig, folder: RunFolder, say: Callable[[str], None]) -> None:
        """Open or continue the W&B run and send it the rows of the folder that it lacks.

        Raises:
            RunError: the wandb package is not installed.
        """
        wandb = load_wandb()
        self._folder, self._say, self._run = folder, say, None
        self._sent: dict[str, Any] = {}
        self._guarded(lambda: self._open(wandb, config))
        if folder.metrics.exists():
            for row in read_rows(folder.metrics):
                self.send(row)

    def _read_sent(self, project: str) -> dict[str, Any]:
        path = self._folder.wandb
        if path.exists():
            sent = read_json_object(path)
            if {"project", "id", "steps"} - sent.keys():
                raise CheckpointError(f"{path} names no W&B run; remove it to begin another")
            if sent["project"] == project:
                return sent
        return {"project": project, "id": secrets.token_hex(4), "steps": {}}

    def _open(self, wandb: ModuleType, config: RunConfig) -> None:
        self._sent = self._read_sent(config.train.wandb_project)
        self._run = wandb.init(
            project=config.train.wandb_project,
            name=config.name,
            id=self._sent["id"],
            resume="allow",
            dir=str(self._folder.root),
            config=to_json_dict(config),
            settings=wandb.Settings(console="off", finish_timeout=_FINISH_TIMEOUT_S),
        )
        for stage in ("target", "draft", "held_out"):
            self._run.define_metric(f"{stage}/step")
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._keep_sent()

    def send(self, row: Mapping[str, Any]) -> None:
        """Send the scalars of a metric row, unless the W&B run has them already."""
        if self._run is None or row["step"] <= self._sent["steps"].get(row["stage"], -1):
            return
        stage, run = row["stage"], self._run
        scalars = choose_scalars(row) | {f"{stage}/step": row["step"]}

        def log() -> None:
            run.log(scalars)
            self._sent["steps"][stage] = row["step"]
            self._keep_sent()

        self._guarded(log)

    def _keep_sent(self) -> None:
        write_text(self._folder.wandb, json.dumps(self._sent) + "\n")

    def close(self) -> None:
        """Finish the upload."""
        if self._run is not None:
            self._guarded(self._run.finish)

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever wandb raises, a training of days is worth more
            self._run = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self._say(f"warning: Weights & Biases failed, the run goes on without it: {reason}")
