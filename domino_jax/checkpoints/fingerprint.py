"""What tells one target from another without reading all of its weights.

In: a checkpoint directory. Out: its sizes and short hashes that fit into a JSON file. Two saves of the same tensors
have the same fingerprint however they are cut into files; a fine-tuned copy has another one. Knows no tokenizer.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from domino_jax.checkpoints.huggingface import read_target_config
from domino_jax.checkpoints.safetensors_io import CheckpointError, TensorFiles
from domino_jax.config import to_json_dict

_ROWS_PER_TENSOR = 4


def fingerprint_target(directory: Path) -> dict[str, Any]:
    """Return `config` (sizes), `tensors` (hash of names, shapes and types) and `weights` (hash of sampled values).

    Of every tensor the first, the last and two rows between are read: some MB of a target of 16 GB.

    Raises:
        CheckpointError: the directory holds no supported target, or a file is damaged.
    """
    config, _ = read_target_config(str(directory))
    files = TensorFiles(directory)
    listed = [[name, list(stored.shape), stored.type_code] for name, stored in sorted(files.stored.items())]
    return {
        "config": to_json_dict(config),
        "tensors": hash_json(listed),
        "weights": _hash_samples(files),
    }


def hash_json(value: Any) -> str:
    """Return a short hash of what JSON makes of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _hash_samples(files: TensorFiles) -> str:
    names_in: dict[Path, list[str]] = {}
    unsupported = files.unsupported_types(list(files.stored))  # told by the loader; numpy could not read them
    for name, stored in files.stored.items():
        if name in unsupported:
            continue
        names_in.setdefault(stored.file, []).append(name)
    samples = {}
    for file, names in names_in.items():
        try:
            with safe_open(file, framework="numpy") as handle:
                for name in names:
                    samples[name] = _hash_rows(handle, name, files.stored[name].shape)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}; download or write it again") from error
    return hash_json(samples)


def _hash_rows(handle: Any, name: str, shape: tuple[int, ...]) -> str:
    digest = hashlib.sha256()
    if len(shape) < 2:
        digest.update(handle.get_tensor(name).tobytes())
    else:
        view = handle.get_slice(name)
        for row in sorted({int(i) for i in np.linspace(0, shape[0] - 1, _ROWS_PER_TENSOR)} if shape[0] else ()):
            digest.update(view[row : row + 1].tobytes())
    return digest.hexdigest()[:16]
