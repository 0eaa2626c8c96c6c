"""What the processes of one run tell each other: one decides and all follow, a check holds for all, values are equal.

In: functions of a single process, and values for JSON. Out: the same outcome in every process. What one process finds
wrong ends all of them, so that none waits for one that has gone. In a run of one process nothing is exchanged. All
functions that exchange are called by all processes, in the same order. Knows nothing of files, models or signals.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

_T = TypeVar("_T")
_MIN_BYTES = 256


class ProcessError(ValueError):
    """Processes that cannot work together, or one that failed; the message says which and what to do."""


def is_first() -> bool:
    """Return whether this process is the one that decides and writes."""
    return jax.process_index() == 0


def on_first(function: Callable[[], _T]) -> _T:
    """Call `function` in the first process alone and return its JSON value in all of them, when it is done.

    Raises:
        ProcessError: it raised an error in the first process, which raises its own.
    """
    if jax.process_count() == 1:
        return function()
    if not is_first():
        answer = json.loads(_exchange(b"")[0])
        if "error" in answer:
            raise ProcessError(f"process 0: {answer['error']}")
        return answer["value"]
    try:
        value = function()
        message = json.dumps({"value": value}).encode()
    except BaseException as error:
        _exchange(json.dumps({"error": _describe(error)}).encode())
        raise
    _exchange(message)
    return value


def on_all(function: Callable[[], _T]) -> _T:
    """Call `function` in every process and return its value there, when all are done without an error.

    Raises:
        ProcessError: it raised an error in another process; a process where it did raises its own.
    """
    if jax.process_count() == 1:
        return function()
    try:
        value = function()
    except BaseException as error:
        _exchange(_describe(error).encode())
        raise
    for number, message in enumerate(_exchange(b"")):
        if message:
            raise ProcessError(f"process {number}: {message.decode()}")
    return value


def share(values: list[Any]) -> list[list[Any]]:
    """Return the lists of JSON values that all processes call this with, by process number.

    Where all are empty that takes one small exchange: cheap enough for every batch.
    """
    if jax.process_count() == 1:
        return [values]
    messages = _exchange(json.dumps(values).encode() if values else b"")
    return [json.loads(message) if message else [] for message in messages]


def check_same(values: Mapping[str, Any], find_differences: Callable[[Any, Any], list[str]], advice: str) -> None:
    """Check that all processes call this with the same JSON values.

    Raises:
        ProcessError: one has others than the first; there the message lists `find_differences(first's, own)`.
    """
    own = json.loads(json.dumps(dict(values)))

    def check() -> None:
        first = json.loads(everyone[0])
        if first != own:
            lines = "\n  ".join(find_differences(first, own))
            raise ProcessError(
                f"process {jax.process_index()} differs from process 0 ('stored' is process 0's); {advice}:\n  {lines}"
            )

    everyone = _exchange(json.dumps(own).encode())
    on_all(check)


def _describe(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _exchange(message: bytes) -> list[bytes]:
    """Return the messages of all processes, by process number."""
    if jax.process_count() == 1:
        return [message]
    lengths = multihost_utils.process_allgather(np.array([len(message)], np.int32)).reshape(-1)
    longest = int(lengths.max())
    if not longest:
        return [b""] * len(lengths)
    size = max(_MIN_BYTES, 1 << (longest - 1).bit_length())  # few shapes to compile
    padded = np.zeros(size, np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    rows = multihost_utils.process_allgather(padded).reshape(jax.process_count(), size)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]
