"""Fingerprints of targets: the same for the same tensors, another for any others."""

import jax
import pytest

from domino_jax.checkpoints.fingerprint import fingerprint_target
from domino_jax.checkpoints.huggingface import save_target
from domino_jax.checkpoints.safetensors_io import CheckpointError
from domino_jax.config import TargetConfig
from domino_jax.models.qwen3 import init_target_params

CONFIG = TargetConfig(50, 16, 32, 2, 2, 1, 8, max_position_embeddings=96, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def params():
    return init_target_params(CONFIG, jax.random.key(0))


@pytest.fixture
def fingerprint(tmp_path):
    def take(params, dtype="float32", **options):
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        save_target(directory, CONFIG, params, dtype, **options)
        return fingerprint_target(directory)

    return take


def test_it_does_not_depend_on_shards_or_place(fingerprint, params):
    whole = fingerprint(params)
    assert whole == fingerprint(params, max_shard_bytes=4000)
    assert whole["config"]["hidden_size"] == 16


def test_another_tensor_or_type_gives_another(fingerprint, params):
    whole = fingerprint(params)
    tuned = {**params, "norm": params["norm"] + 1e-3}
    changed = fingerprint(tuned)
    assert changed["weights"] != whole["weights"] and changed["tensors"] == whole["tensors"]
    last = {**params, "embed_tokens": params["embed_tokens"].at[-1, -1].add(1e-3)}
    assert fingerprint(last)["weights"] != whole["weights"]
    halved = fingerprint(params, "bfloat16")
    assert halved["weights"] != whole["weights"] and halved["tensors"] != whole["tensors"]


def test_a_damaged_file_is_named(tmp_path, params):
    save_target(tmp_path, CONFIG, params)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        fingerprint_target(tmp_path)
