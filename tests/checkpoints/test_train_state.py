"""Training checkpoints: exact bits, what is kept, data position, configuration differences, unfit states."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from domino_jax.checkpoints import train_state
from domino_jax.checkpoints.safetensors_io import CheckpointError
from domino_jax.checkpoints.train_state import TrainCheckpoints

METADATA = {"name": "tiny", "seed": 3, "draft": {"target_layer_ids": [1, 3], "block_size": 8}}


@jax.jit
def make_device_state(key):
    params = {
        "backbone": {"fc": jax.random.normal(key, (5, 7)), "norm": jnp.ones(5, jnp.bfloat16)},
        "head": {"up": jax.random.normal(key, (2, 300))},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-3, 10)))
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 0.1), params)
    _, opt_state = optimizer.update(gradients, optimizer.init(params), params)
    special = jnp.array([jnp.nan, -0.0, jnp.inf, 1.5], jnp.float32)
    return {"params": params, "opt_state": opt_state, "key": key, "special": special}


def make_state(seed: int):
    return make_device_state(jax.random.key(seed)) | {
        "step": jnp.int32(seed),
        "raw_key": jax.random.PRNGKey(seed),
        "host": np.array([2**40 + seed], np.int64),
        "count": seed,
        "subnormal": jax.device_put(np.array([1e-45, -3e-40], np.float32)),
    }


def bits(leaf):
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return array.dtype, array.shape, array.tobytes()


def assert_same_bits(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert type(a) is type(b)
        assert bits(a) == bits(b)


def test_restore_returns_the_saved_bits(tmp_path: Path) -> None:
    state = make_state(7)
    checkpoints = TrainCheckpoints(tmp_path / "run", keep=2)
    checkpoints.save(7, state, {"next_index": 12, "nested": {"seed": 2**40}}, METADATA, metric=None)
    checkpoints.close()
    again = TrainCheckpoints(tmp_path / "run", keep=2)
    restored = again.restore(make_state(1))
    assert restored is not None
    assert_same_bits(restored[0], state)
    assert restored[1:] == ({"next_index": 12, "nested": {"seed": 2**40}}, METADATA)
    again.close()


def test_nothing_stored_gives_none(tmp_path: Path) -> None:
    checkpoints = TrainCheckpoints(tmp_path / "run", keep=1)
    assert checkpoints.restore(make_state(1)) is None
    assert checkpoints.best_step() is None
    with pytest.raises(CheckpointError, match="step 4 is not stored"):
        checkpoints.restore(make_state(1), step=4)
    checkpoints.close()


def test_latest_and_best_are_kept(tmp_path: Path) -> None:
    checkpoints = TrainCheckpoints(tmp_path, keep=2)
    metrics = {1: float("inf"), 2: 2.5, 3: 1.0, 4: 2.5, 5: float("nan"), 6: None}
    for step, metric in metrics.items():
        checkpoints.save(step, {"x": jnp.float32(step)}, b"position \xff %d" % step, {}, metric)
    assert checkpoints.best_step() == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "5", "6"]
    best = checkpoints.restore({"x": jnp.float32(0)}, step=2)
    assert best is not None and best[0]["x"] == 2 and best[1] == b"position \xff 2"
    checkpoints.close()
    assert TrainCheckpoints(tmp_path, keep=1).best_step() == 2


def test_unfit_state_is_named(tmp_path: Path) -> None:
    checkpoints = TrainCheckpoints(tmp_path, keep=1)
    checkpoints.save(1, {"a": jnp.zeros((2, 3)), "b": {"c": jnp.zeros(4)}}, {}, {})
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore({"a": jnp.zeros((2, 4)), "b": {"d": jnp.zeros(4)}})
    message = str(caught.value)
    assert "missing: b.d" in message and "unexpected: b.c" in message
    assert "misshapen: a is float32[2, 3], expected float32[2, 4]" in message
    checkpoints.close()


def test_interrupted_save_is_ignored(tmp_path: Path) -> None:
    checkpoints = TrainCheckpoints(tmp_path, keep=1)
    checkpoints.save(1, {"a": jnp.zeros(2)}, {}, {})
    checkpoints.close()
    for name in ("2.partial.orbax-checkpoint-tmp", "3.partial"):
        shutil.copytree(tmp_path / "1", tmp_path / name)
    TrainCheckpoints(tmp_path, keep=1).close()
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


def test_keep_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="keep is 0"):
        TrainCheckpoints(tmp_path, keep=0)


def test_restored_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    optimizer = optax.adamw(1e-2)

    @jax.jit
    def advance(state):
        key, noise_key = jax.random.split(state["key"])
        gradient = jax.random.normal(noise_key, state["params"].shape) + state["params"]
        updates, opt_state = optimizer.update(gradient, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state, "key": key}

    def start():
        params = jnp.ones((3, 4))
        return {"params": params, "opt_state": optimizer.init(params), "key": jax.random.key(0)}

    whole = start()
    for _ in range(4):
        whole = advance(whole)
    half = advance(advance(start()))
    checkpoints = TrainCheckpoints(tmp_path, keep=1)
    checkpoints.save(2, half, {}, {})
    restored = checkpoints.restore(start())
    checkpoints.close()
    assert restored is not None
    assert_same_bits(advance(advance(restored[0])), whole)


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    checkpoints = TrainCheckpoints(tmp_path, keep=1)
    checkpoints.save(1, {"x": jnp.float32(1)}, {}, {"known": False}, 2.0)
    checkpoints.save(2, {"x": jnp.float32(2)}, {}, {"known": False})
    assert checkpoints.best_step() == 1
    checkpoints.save(2, {"x": jnp.float32(2)}, {}, {"known": True}, 3.0)
    assert checkpoints.best_step() == 2 and [path.name for path in tmp_path.iterdir()] == ["2"]
    restored = checkpoints.restore({"x": jnp.float32(0)})
    assert restored is not None and restored[2] == {"known": True}
    checkpoints.close()


@pytest.mark.parametrize("moves_done", [0, 1, 2])
def test_a_replacement_cut_short_leaves_the_old_or_the_new_step(tmp_path: Path, monkeypatch, moves_done: int) -> None:
    checkpoints = TrainCheckpoints(tmp_path, keep=1)
    checkpoints.save(2, {"x": jnp.float32(2)}, {}, {"known": False})
    moves = iter([train_state.move] * moves_done)

    def move(*paths: Path) -> None:
        done = next(moves, None)
        if done is None:
            raise KeyboardInterrupt
        done(*paths)

    def die(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train_state, "move", move)
        patched.setattr(train_state, "remove", die)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(2, {"x": jnp.float32(2)}, {}, {"known": True}, 3.0)
    checkpoints.close()
    again = TrainCheckpoints(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    restored = again.restore({"x": jnp.float32(0)})
    assert restored is not None and restored[2] == {"known": moves_done == 2}
    again.close()
