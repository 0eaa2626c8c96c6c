"""Parameters read straight to a mesh are those of whole files, bit for bit; run by `test_eight_devices.py`."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from domino_jax.checkpoints import huggingface, placed_tensors
from domino_jax.checkpoints.huggingface import (
    draft_table,
    load_draft,
    load_target,
    save_draft,
    save_target,
    target_table,
)
from tests.sharding.small_pair import choose_quick, make_layout, make_pair


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    target, target_params, draft, draft_params = make_pair()
    root = tmp_path_factory.mktemp("saved")
    save_target(root / "target", target, target_params, "bfloat16", max_shard_bytes=20_000)
    save_draft(root / "draft", draft, draft_params)
    return root


def read_whole(directory, table):
    stored = {}
    for file in directory.glob("*.safetensors"):
        stored |= load_file(file)
    return {row.path: stored[row.public].T if row.is_turned else stored[row.public] for row in table}


def flatten(params):
    return {tuple(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}


@pytest.mark.parametrize("manner", ["taken over", "staged"])
@pytest.mark.parametrize("piece", [1 << 27, 600], ids=["whole parts", "many pieces"])
@pytest.mark.parametrize("mesh", choose_quick((1, 8, False), (2, 4, True)))
def test_parameters_on_a_mesh_are_those_of_the_files(saved, monkeypatch, mesh, piece, manner):
    if manner == "staged":
        monkeypatch.setattr(huggingface, "iterate_placed", placed_tensors.iterate_staged)
    monkeypatch.setattr(placed_tensors, "_PIECE_BYTES", piece)
    layout = make_layout(*mesh)
    for dtype in ("float32", "bfloat16"):
        config, target_params = load_target(str(saved / "target"), dtype, layout)
        draft = load_draft(str(saved / "draft"), dtype, layout)
        loaded = [
            (saved / "target", target_table(config), target_params),
            (saved / "draft", draft_table(draft.config), draft.params),
        ]
        for directory, table, params in loaded:
            whole = read_whole(directory, table)
            shardings = flatten(layout.shardings(params))
            for path, leaf in flatten(params).items():
                expected = whole.pop(path).astype(dtype)
                assert leaf.sharding == shardings[path] and leaf.dtype == expected.dtype, path
                for shard in leaf.addressable_shards:
                    np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index], err_msg=str(path))
            assert not whole


def test_a_device_is_sent_its_own_part_alone(saved, monkeypatch):
    """Bytes that go to devices: the parameters once over `model`, and under fsdp over `data` too."""
    sent = []
    put = placed_tensors._put

    def record(part, *others):
        sent.append(part.nbytes)
        return put(part, *others)

    monkeypatch.setattr(placed_tensors, "_put", record)
    monkeypatch.setattr(huggingface, "iterate_placed", placed_tensors.iterate_staged)
    _, params = load_target(str(saved / "target"), "float32", make_layout(2, 4, True))
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert sum(sent) == held < 1.1 * whole
