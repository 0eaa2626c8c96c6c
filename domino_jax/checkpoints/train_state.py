"""Checkpoints of a training run: state, data position and the configuration they belong to, by Orbax.

In: any pytree of arrays, numbers and PRNG keys. Out: the same bits in the structure the caller asks for.
A step appears only when it is whole; a crash while saving leaves the earlier steps as they were. Leaves are stored
under their tree path, so that the first thing that does not fit is named. This module knows nothing of models.

Source: Orbax `CheckpointManager`.
"""

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from domino_jax.checkpoints.safetensors_io import CheckpointError

_STATE, _RECORD = "state", "record"


def diff_configs(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """Return a line for every leaf in which two nested configurations differ, named by its dotted path.

    Tuples and lists of the same elements are the same: JSON knows no tuples.
    """
    lines = []
    for name in [*old, *(n for n in new if n not in old)]:
        where = f"{path}{name}"
        if name not in new:
            lines.append(f"{where}: stored {old[name]!r}, now absent")
        elif name not in old:
            lines.append(f"{where}: not stored, now {new[name]!r}")
        elif isinstance(old[name], dict) and isinstance(new[name], dict):
            lines += diff_configs(old[name], new[name], f"{where}.")
        elif _as_json(old[name]) != _as_json(new[name]):
            lines.append(f"{where}: stored {old[name]!r}, now {new[name]!r}")
    return lines


class TrainCheckpoints:
    """The checkpoints of one run: the `keep` latest steps and the best one.

    Saving blocks until the step is on disk, so the caller may donate the state to the next step at once.

    Raises:
        CheckpointError: `keep` is less than 1.
    """

    def __init__(self, directory: str | Path, keep: int) -> None:
        if keep < 1:
            raise CheckpointError(f"keep is {keep}; at least 1 checkpoint must be kept")
        self._keep = keep
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            create=True, cleanup_tmp_directories=True, enable_async_checkpointing=False
        )
        handlers = {_STATE: ocp.StandardCheckpointHandler(), _RECORD: ocp.JsonCheckpointHandler()}
        self._orbax = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def save(
        self,
        step: int,
        state: Any,
        data_state: dict[str, Any] | bytes,
        metadata: dict[str, Any],
        metric: float | None = None,
    ) -> bool:
        """Store a step and drop those that need not be kept; return False where the step is stored already.

        The highest `metric` is the best, the earlier one among equals; a step without one (or with NaN) is never it.
        `data_state` and `metadata` are JSON values (`data_state` may be bytes); tuples come back as lists.

        Raises:
            CheckpointError: two leaves of the state have the same path.
        """
        if step in self._orbax.all_steps():
            return False
        has_metric = metric is not None and not math.isnan(metric)
        record = {
            "data_state": _encode_data_state(data_state),
            "metadata": metadata,
            "metric": float(metric) if has_metric and metric is not None else None,
        }
        stored = {name: _as_stored(leaf) for name, leaf in _named_leaves(state).items()}
        arguments = {_STATE: ocp.args.StandardSave(stored), _RECORD: ocp.args.JsonSave(record)}
        self._orbax.save(step, args=ocp.args.Composite(**arguments), force=True)
        best = self.best_step()
        for old in self._steps()[: -self._keep]:
            if old != best:
                self._orbax.delete(old)
        return True

    def restore(self, state_like: Any, step: int | None = None) -> tuple[Any, Any, dict[str, Any]] | None:
        """Return (state, data_state, metadata) of `step` (default: the latest), or None where nothing is stored.

        `state_like` is a state of arrays that gives structure, shapes, types and placement; its values do not matter.

        Raises:
            CheckpointError: `step` is not stored, or the stored state does not fit `state_like`.
        """
        chosen = self._choose(step)
        if chosen is None:
            return None
        likes = _named_leaves(state_like)
        self._check_fits(chosen, likes)
        abstract = {name: _as_abstract(leaf) for name, leaf in likes.items()}
        stored = self._orbax.restore(chosen, args=ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(abstract)}))[
            _STATE
        ]
        leaves = [_as_like(stored[name], like) for name, like in likes.items()]
        record = self._record(chosen)
        state = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(state_like), leaves)
        return state, _decode_data_state(record["data_state"]), record["metadata"]

    def read_metadata(self, step: int | None = None) -> dict[str, Any] | None:
        """Return the metadata of `step` (default: the latest) without reading the state, or None if nothing is stored.

        Raises:
            CheckpointError: `step` is not stored.
        """
        chosen = self._choose(step)
        return None if chosen is None else self._record(chosen)["metadata"]

    def latest_step(self) -> int | None:
        """Return the newest stored step, or None."""
        return max(self._steps(), default=None)

    def best_step(self) -> int | None:
        """Return the stored step with the highest metric, or None where no step has one."""
        metrics = {step: self._record(step)["metric"] for step in self._steps()}
        ranked = [(metric, -step) for step, metric in metrics.items() if metric is not None]
        return -max(ranked)[1] if ranked else None

    def close(self) -> None:
        """Release Orbax's threads; the object cannot be used afterwards."""
        self._orbax.close()

    def _steps(self) -> Sequence[int]:
        return sorted(self._orbax.all_steps())

    def _choose(self, step: int | None) -> int | None:
        if step is None:
            return self.latest_step()
        if step not in self._steps():
            held = ", ".join(map(str, self._steps())) or "none"
            raise CheckpointError(f"step {step} is not stored in {self.directory}; stored steps: {held}")
        return step

    def _record(self, step: int) -> dict[str, Any]:
        return self._orbax.restore(step, args=ocp.args.Composite(**{_RECORD: ocp.args.JsonRestore()}))[_RECORD]

    def _check_fits(self, step: int, likes: dict[str, Any]) -> None:
        metadata = self._orbax.item_metadata(step).get(_STATE)
        if metadata is None:
            raise CheckpointError(
                f"step {step} in {self.directory} is damaged: its {_STATE!r} part cannot be read; remove the folder of "
                "this step to go on from the one before it"
            )
        stored = {n: (tuple(m.shape), np.dtype(m.dtype)) for n, m in metadata.items()}
        wanted = {n: (tuple(a.shape), np.dtype(a.dtype)) for n, a in ((n, _as_abstract(v)) for n, v in likes.items())}
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


def _named_leaves(state: Any) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "value"
        if name in named:
            raise CheckpointError(f"two leaves of the state are called {name}; rename one")
        named[name] = leaf
    return named


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _as_stored(leaf: Any) -> Any:
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _as_abstract(leaf: Any) -> Any:
    """Return what Orbax reads into: a placed shape for device arrays, an empty host array for anything else."""
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return np.empty_like(np.asarray(leaf))


def _as_like(stored: Any, like: Any) -> Any:
    if _is_key(like):
        return jax.random.wrap_key_data(stored, impl=jax.random.key_impl(like))
    if isinstance(like, jax.Array):
        return stored
    if isinstance(like, bool | int | float):
        return type(like)(np.asarray(stored).item())
    return np.asarray(stored)


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_as_json(v) for v in value]
    if isinstance(value, dict):
        return {k: _as_json(v) for k, v in value.items()}
    return value


def _encode_data_state(data_state: dict[str, Any] | bytes) -> dict[str, Any]:
    if isinstance(data_state, bytes):
        return {"base64": base64.b64encode(data_state).decode("ascii")}
    return {"json": data_state}


def _decode_data_state(encoded: dict[str, Any]) -> Any:
    return base64.b64decode(encoded["base64"]) if "base64" in encoded else encoded["json"]
