"""What a person sees of a run, and what is kept of it: progress bar, TensorBoard, one JSONL of metric rows.

On a terminal a bar moves; elsewhere (a log file, CI) a line is printed now and then. Rows are plain numbers.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from domino_jax.durable import flush, write_atomically

_SECONDS_BETWEEN_LINES = 15.0


class StageProgress:
    """The progress of one stage; made by `RunMonitor.stage`."""

    def __init__(self, name: str, total: int, done: int, console: Console, bar: Progress | None) -> None:
        self._name, self._total, self._done, self._console, self._bar = name, total, done, console, bar
        self._task = bar.add_task(name, total=total, completed=done, shown="") if bar else None
        self._began, self._began_at, self._printed = time.monotonic(), done, 0.0

    def advance(self, count: int = 1, **shown: float | int | str | None) -> None:
        """Count `count` more items and show the values given; None values are left out."""
        self._done += count
        text = "  ".join(f"{k} {_short(v)}" for k, v in shown.items() if v is not None)
        if self._bar is not None and self._task is not None:
            fields = {"shown": text} if text else {}
            self._bar.update(self._task, completed=self._done, **fields)
            return
        now = time.monotonic()
        if text and (now - self._printed >= _SECONDS_BETWEEN_LINES or self._done >= self._total):
            self._printed = now
            rate = (self._done - self._began_at) / max(now - self._began, 1e-9)
            left_s = (self._total - self._done) / max(rate, 1e-9)
            self._console.print(f"{self._name}: {self._done}/{self._total}  {text}  left {_clock(left_s)}")


@runtime_checkable
class MetricLog(Protocol):
    """Another place that shows metric rows."""

    def send(self, row: Mapping[str, Any]) -> None:
        """Show one row."""

    def close(self) -> None:
        """Show nothing more."""


class RunMonitor:
    """Progress and metrics of a run.

    Attributes:
        console: where messages go.
    """

    def __init__(self, metrics_path: Path | None, tensorboard_dir: Path | None, is_quiet: bool = False) -> None:
        """Append to the metrics of an earlier part of the run, if there is one; None keeps no metrics."""
        self.console = Console(highlight=False, soft_wrap=True, quiet=is_quiet)
        self._path = metrics_path
        if metrics_path:
            metrics_path.parent.mkdir(parents=True, exist_ok=True)
        self._tensorboard_dir = tensorboard_dir
        self._writer = SummaryWriter(str(tensorboard_dir)) if tensorboard_dir else None
        self._other_log: MetricLog | None = None

    def also_log_to(self, log: MetricLog) -> None:
        """Send every further row to `log` too, and close it at the end."""
        self._other_log = log

    def say(self, text: str) -> None:
        """Print a message."""
        self.console.print(text, markup=False)

    def log(self, stage: str, step: int, values: Mapping[str, float | int | list]) -> None:
        """Keep one row; single numbers also go to TensorBoard as `stage/name`."""
        row = {"stage": stage, "step": step, **values}
        if self._path:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self._show(row)
        if self._other_log:
            self._other_log.send(row)

    def _show(self, row: Mapping[str, Any]) -> None:
        if self._writer:
            for name, value in choose_scalars(row).items():
                self._writer.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        """Have the rows on the disk: a checkpoint that outlives a power cut must not have rows missing before it."""
        if self._path and self._path.exists():
            flush(self._path)

    def drop_rows_after(self, stage: str, step: int) -> None:
        """Forget rows of `stage` past `step`, and a row that an interruption cut: a run that resumes writes them again.

        TensorBoard's files are written anew from the rows that stay.
        """
        if not (self._path and self._path.exists()):
            return
        kept = [row for row in read_rows(self._path) if row["stage"] != stage or row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        if text == self._path.read_text(encoding="utf-8"):
            return
        with write_atomically(self._path) as file:
            file.write(text.encode())
        if self._writer and self._tensorboard_dir:
            self._writer.close()
            for file in self._tensorboard_dir.glob("events*"):
                file.unlink()
            self._writer = SummaryWriter(str(self._tensorboard_dir))
            for row in kept:
                self._show(row)

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[StageProgress]:
        """Show the progress of a stage of `total` items, `done` of which were done before."""
        if not self.console.is_terminal:
            self.say(f"{name}: {done}/{total}")
            yield StageProgress(name, total, done, self.console, None)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as bar:
            yield StageProgress(name, total, done, self.console, bar)

    def close(self) -> None:
        """Flush TensorBoard and the other log."""
        if self._writer:
            self._writer.close()
        if self._other_log:
            self._other_log.close()


def choose_scalars(row: Mapping[str, Any]) -> dict[str, int | float]:
    """Return the single numbers of a metric row as `stage/name`, its step left out."""
    return {
        f"{row['stage']}/{name}": value
        for name, value in row.items()
        if name not in ("stage", "step") and isinstance(value, int | float)
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the metric rows of a file; a last line cut by an interruption is left out."""
    return list(_whole_rows(path.read_text(encoding="utf-8").splitlines()))


def _whole_rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def _short(value: float | int | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
