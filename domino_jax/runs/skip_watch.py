"""Updates that are not finite while a drafter is trained: said with their rows, and too many in a row end the run."""

import numpy as np

from domino_jax.records import TrainBatch
from domino_jax.runs.monitor import RunMonitor


class TrainingError(ValueError):
    """A training that cannot go on; the message names the batch."""


class SkipWatch:
    """Says which batches gave an update that is not finite, and stops the run after too many in a row.

    A step's numbers are read when the next one is under way, so that the device never waits for the host.
    """

    def __init__(self, train_path: str, max_skipped: int, monitor: RunMonitor) -> None:
        """Stop after `max_skipped` in a row; `train_path` is named beside the lines of a batch."""
        self._train_path, self._max_skipped, self._monitor = train_path, max_skipped, monitor
        self._watched: tuple[int, np.ndarray, dict] | None = None

    def watch(self, step: int, batch: TrainBatch, metrics: dict) -> None:
        """Watch the step that has just been started."""
        self._watched = step, batch.line_nos, metrics

    def check(self) -> None:
        """Read what is watched.

        Raises:
            TrainingError: `train.max_skipped` updates in a row were not finite.
        """
        if self._watched is None:
            return
        (step, line_nos, metrics), self._watched = self._watched, None
        in_row = int(metrics["skipped_in_row"])
        if in_row == 0:
            return
        lines = ", ".join(map(str, sorted(set(line_nos.tolist()))))
        batch = f"step {step} (lines {lines} of {self._train_path})"
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        self._monitor.say(f"update skipped: {batch}: loss {loss}, gradient norm {norm}; {in_row} in a row")
        if in_row >= self._max_skipped:
            raise TrainingError(
                f"{in_row} updates in a row were not finite, the last one at {batch}; nothing after step "
                f"{step - in_row} was learned. Look at these rows, or start a new run with a lower "
                "optimizer.learning_rate"
            )
