"""Rows of a measurement in a JSONL file: each is written as soon as it is there."""

import json
from collections.abc import Iterable
from pathlib import Path

from domino_jax.evaluation.metrics import Row


class OutputError(ValueError):
    """A place where rows cannot be written; the message names it."""


def check_output(path: Path) -> None:
    """Refuse a path that `write_rows` could not write, before anything is measured for it.

    Raises:
        OutputError: it is a directory or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise OutputError(f"rows cannot be written to {path} ({error}); give a file where you may write") from error


def write_rows(path: Path | None, rows: Iterable[Row]) -> list[Row]:
    """Write rows as JSONL, each as soon as it is there, and return them; without a path they are only returned."""
    if path is None:
        return list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            written.append(row)
    return written
