"""Checkpoints of a training run: state, data position and the configuration they belong to, by Orbax.

In: any pytree of arrays, numbers and PRNG keys. Out: the same bits in the structure the caller asks for.
A step is a folder of that number. It appears by one rename, when all its files and the list of their hashes are on the
disk; a crash or a full disk while saving leaves the earlier steps as they were. A step that no longer is what was
written is named, moved aside and never used. Leaves are stored under their tree path, so that the first thing that
does not fit is named. This module knows nothing of models.

With several processes all of them call each method of `TrainCheckpoints`, on one folder that all of them see: each
writes and reads its own parts of the arrays, and the first alone decides, lists, renames and removes.

Source: Orbax `Checkpointer`. Its `CheckpointManager` renames a step into place before anything could list the files;
a step killed in between could not be told from a damaged one.
"""

import base64
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from domino_jax.checkpoints.manifest import find_damage, write_manifest
from domino_jax.checkpoints.safetensors_io import CheckpointError
from domino_jax.checkpoints.stored_leaves import as_abstract, as_like, as_stored, name_leaves
from domino_jax.durable import NO_ROOM, find_room, flush_tree, format_bytes, move, remove
from domino_jax.processes import is_first, on_first

_STATE, _RECORD = "state", "record"
_RECORD_FILE = "metadata"
"""What Orbax calls the one file of a JSON item."""
_PARTIAL, _REPLACED, _DAMAGED = ".partial", ".replaced", "damaged"
_OVERHEAD_BYTES = 1 << 20  # names, shapes, the record, and files rounded up to blocks
_NUM_NAMED = 5


class TrainCheckpoints:
    """The checkpoints of one run: the `keep` latest steps and the best one.

    Saving blocks until the step is on disk, so the caller may donate the state to the next step at once.

    Raises:
        CheckpointError: `keep` is less than 1.
    """

    def __init__(self, directory: str | Path, keep: int, say: Callable[[str], None] = print) -> None:
        """Open the folder of checkpoints, made if missing; `say` is told which steps are damaged, and how."""
        if keep < 1:
            raise CheckpointError(f"keep is {keep}; at least 1 checkpoint must be kept")
        self._keep, self._say = keep, say
        self.directory = Path(directory).absolute()
        handlers = {_STATE: ocp.StandardCheckpointHandler(), _RECORD: ocp.JsonCheckpointHandler()}
        self._orbax = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))

        def prepare() -> None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_partial()

        on_first(prepare)

    def save(
        self,
        step: int,
        state: Any,
        data_state: dict[str, Any] | bytes,
        metadata: dict[str, Any],
        metric: float | None = None,
    ) -> None:
        """Store a step and drop those that need not be kept; one that is stored already is replaced.

        The highest `metric` is the best, the earlier one among equals; a step without one, or with one that is not
        finite, is never it. `data_state` and `metadata` are JSON values (`data_state` may be bytes); tuples come back
        as lists.

        Raises:
            CheckpointError: two leaves of the state have the same path, or the disk has no room or refuses to write;
                the steps stored before are as they were.
        """
        record = {
            "data_state": _encode_data_state(data_state),
            "metadata": metadata,
            "metric": float(metric) if metric is not None and math.isfinite(metric) else None,
        }
        stored = {name: as_stored(leaf) for name, leaf in name_leaves(state).items()}
        num_bytes = sum(leaf.nbytes for leaf in stored.values()) + _OVERHEAD_BYTES
        on_first(lambda: self._check_room(step, num_bytes))
        arguments = {_STATE: ocp.args.StandardSave(stored), _RECORD: ocp.args.JsonSave(record)}
        try:
            self._write(step, ocp.args.Composite(**arguments))
        except (OSError, ValueError) as error:
            if is_first():
                self._remove_partial()
            if not _is_from_system(error):
                raise
            # Other writes failed with the first; asyncio would tell them one by one after the error that ends the run.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            if not _is_from_system(error, NO_ROOM):
                raise CheckpointError(
                    f"step {step} cannot be written to {self.directory} ({error}); {self._what_is_left()}. Mend the "
                    "disk, then the same command goes on"
                ) from error
            raise self._no_room(step, num_bytes) from error
        on_first(self._drop_old)

    def restore(self, state_like: Any, step: int | None = None) -> tuple[Any, Any, dict[str, Any]] | None:
        """Return (state, data_state, metadata) of `step` (default: the latest), or None where nothing was ever stored.

        `state_like` is a state of arrays that gives structure, shapes, types and placement; its values do not matter.
        Asked for the latest, a damaged step is moved aside and the one before it is taken.

        Raises:
            CheckpointError: `step` is not stored or damaged, all steps are damaged, a file cannot be read now, or the
                state does not fit `state_like`.
        """
        chosen = on_first(self._latest_whole if step is None else lambda: self._check_whole(step))
        return None if chosen is None else self._read(chosen, state_like)

    def restore_best(self, state_like: Any) -> tuple[int, Any] | None:
        """Return (step, state) with the highest metric, or None where no step has one.

        A damaged step is moved aside and the next best is taken.

        Raises:
            CheckpointError: the state does not fit `state_like`.
        """
        step = on_first(self._best_whole)
        return None if step is None else (step, self._read(step, state_like)[0])

    def best_step(self) -> int | None:
        """Return the stored step with the highest metric, or None where no step has one.

        A step whose metric can no longer be trusted is moved aside.
        """
        return on_first(self._find_best)

    def _best_whole(self) -> int | None:
        while (step := self._find_best()) is not None:
            damage = find_damage(self._folder(step))
            if not damage:
                return step
            self._set_aside(step, damage)
            self._say("it was the best step; the next best is used, or the latest")
        return None

    def _find_best(self) -> int | None:
        ranked = []
        for step in self._steps():
            damage = find_damage(self._folder(step), f"{_RECORD}/")
            if damage:
                self._set_aside(step, damage)
            elif (metric := self._record(step)["metric"]) is not None:
                ranked.append((metric, -step))
        return -max(ranked)[1] if ranked else None

    def close(self) -> None:
        """Release Orbax's threads; the object cannot be used afterwards."""
        self._orbax.close()

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _steps(self) -> list[int]:
        return sorted(int(p.name) for p in self.directory.iterdir() if re.fullmatch("[0-9]+", p.name) and p.is_dir())

    def _remove_partial(self) -> None:
        """Remove what a crash left of steps being written or dropped, and put back one that was being replaced."""
        for replaced in self.directory.glob(f"*{_REPLACED}"):
            folder = replaced.with_suffix("")
            if folder.exists():
                shutil.rmtree(replaced)
            else:
                move(replaced, folder)
        for path in self.directory.glob(f"*{_PARTIAL}*"):
            shutil.rmtree(path)

    def _partial(self, step: int) -> Path:
        return self.directory / f"{step}{_PARTIAL}"

    def _write(self, step: int, arguments: ocp.args.Composite) -> None:
        with _quiet_orbax():
            self._orbax.save(self._partial(step), args=arguments)
        on_first(lambda: self._put_in_place(step))

    def _put_in_place(self, step: int) -> None:
        partial = self._partial(step)
        write_manifest(partial, str(step))
        flush_tree(partial)
        folder, replaced = self._folder(step), self.directory / f"{step}{_REPLACED}"
        if folder.exists():
            move(folder, replaced)
        move(partial, folder)
        remove(replaced)  # there is one only where a step was stored twice

    def _drop_old(self) -> None:
        best = self._find_best()
        for old in self._steps()[: -self._keep]:
            if old != best:
                self._drop(old)

    def _drop(self, step: int) -> None:
        """Remove a step; cut short, it is no step that misses files."""
        partial = self._partial(step)
        self._folder(step).rename(partial)
        shutil.rmtree(partial)

    def _read(self, step: int, state_like: Any) -> tuple[Any, Any, dict[str, Any]]:
        likes = name_leaves(state_like)
        self._check_fits(step, likes)
        abstract = {name: as_abstract(leaf) for name, leaf in likes.items()}
        arguments = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(abstract)})
        stored = self._orbax.restore(self._folder(step), args=arguments)[_STATE]
        leaves = [as_like(stored[name], like) for name, like in likes.items()]
        record = self._record(step)
        state = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(state_like), leaves)
        return state, _decode_data_state(record["data_state"]), record["metadata"]

    def _record(self, step: int) -> dict[str, Any]:
        # Read without Orbax, which would wait for all processes.
        return json.loads((self._folder(step) / _RECORD / _RECORD_FILE).read_text(encoding="utf-8"))

    def _check_whole(self, step: int) -> int:
        if step not in self._steps():
            held = ", ".join(map(str, self._steps())) or "none"
            raise CheckpointError(f"step {step} is not stored in {self.directory}; stored steps: {held}")
        damage = find_damage(self._folder(step))
        if damage:
            raise CheckpointError(f"step {step} in {self.directory} is damaged: {_shorten(damage)}")
        return step

    def _latest_whole(self) -> int | None:
        """Return the latest step whose files are as written, or None where there never was a step."""
        for step in reversed(self._steps()):
            damage = find_damage(self._folder(step))
            if not damage:
                return step
            self._set_aside(step, damage)
            self._say(self._what_is_left())
        aside = self.directory / _DAMAGED
        if aside.exists():
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged; put a copy of one there under its number, or remove "
                f"{aside} to start from the first step again"
            )
        return None

    def _set_aside(self, step: int, damage: list[str]) -> None:
        aside = self.directory / _DAMAGED
        aside.mkdir(exist_ok=True)
        taken = sum(path.name.split(".")[0] == str(step) for path in aside.iterdir())
        destination = aside / (f"{step}.{taken + 1}" if taken else str(step))
        move(self._folder(step), destination)
        self._say(
            f"step {step} in {self.directory} is damaged: {_shorten(damage)}; it is not used and was moved to "
            f"{destination}"
        )

    def _what_is_left(self) -> str:
        steps = self._steps()
        return f"the latest step stored is {steps[-1]}" if steps else "no step is stored"

    def _check_room(self, step: int, num_bytes: int) -> None:
        if find_room(self.directory)[1] < num_bytes:
            raise self._no_room(step, num_bytes)

    def _no_room(self, step: int, num_bytes: int) -> CheckpointError:
        _, free = find_room(self.directory)
        return CheckpointError(
            f"no room to save step {step}: it needs {format_bytes(num_bytes)}, {format_bytes(free)} are free for "
            f"{self.directory} (a quota or a limit on file sizes may allow less); {self._what_is_left()}. Make room, "
            "then the same command goes on"
        )

    def _check_fits(self, step: int, likes: dict[str, Any]) -> None:
        metadata = self._orbax.metadata(self._folder(step)).item_metadata[_STATE]
        stored = {n: (tuple(m.shape), np.dtype(m.dtype)) for n, m in metadata.items()}
        wanted = {n: (tuple(a.shape), np.dtype(a.dtype)) for n, a in ((n, as_abstract(v)) for n, v in likes.items())}
        problems = [f"missing: {n}" for n in wanted if n not in stored]
        problems += [f"unexpected: {n}" for n in stored if n not in wanted]
        problems += [
            f"misshapen: {n} is {stored[n][1]}{list(stored[n][0])}, expected {wanted[n][1]}{list(wanted[n][0])}"
            for n in wanted
            if n in stored and stored[n] != wanted[n]
        ]
        if problems:
            raise CheckpointError(
                f"step {step} in {self.directory} was saved by a run of another make; give a fresh output directory "
                "or the configuration it was saved with:\n  " + "\n  ".join(problems)
            )


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keep Orbax from logging a failed write once a thread, with its traceback: the error that is raised tells all."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _is_from_system(error: OSError | ValueError, codes: Sequence[int] = ()) -> bool:
    """Return whether the operating system refused, with one of `codes` if any are given.

    TensorStore, which writes the arrays, raises a `ValueError` that holds code and text of the system's error.
    """
    if isinstance(error, OSError):
        return not codes or error.errno in codes
    said = str(error)
    if not re.search("os_error_code|OS error", said):
        return False
    return not codes or any(os.strerror(code) in said for code in codes)


def _shorten(problems: list[str]) -> str:
    more = len(problems) - _NUM_NAMED
    return "; ".join(problems[:_NUM_NAMED]) + (f"; and {more} more files" if more > 0 else "")


def _encode_data_state(data_state: dict[str, Any] | bytes) -> dict[str, Any]:
    if isinstance(data_state, bytes):
        return {"base64": base64.b64encode(data_state).decode("ascii")}
    return {"json": data_state}


def _decode_data_state(encoded: dict[str, Any]) -> Any:
    return base64.b64decode(encoded["base64"]) if "base64" in encoded else encoded["json"]
