"""Tensors read in pieces: the same bits as whole files, what is read and held, and files that are cut while read."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from domino_jax.checkpoints import huggingface, placed_tensors, safetensors_io
from domino_jax.checkpoints.huggingface import load_target, target_table
from domino_jax.checkpoints.safetensors_io import CheckpointError, TensorFiles, open_tensors, read_part
from tests.checkpoints.test_huggingface import SMALL, write_small

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["taken over", "staged"])
def manner(request, monkeypatch) -> str:
    """Load as on a CPU, whose devices take memory of the host over, and as on accelerators."""
    if request.param == "staged":
        monkeypatch.setattr(huggingface, "iterate_placed", placed_tensors.iterate_staged)
    return request.param


@pytest.mark.parametrize(("piece", "block"), [(1 << 20, 1 << 20), (100, 40), (1, 1)])
@pytest.mark.parametrize(("stored", "wanted"), [(np.float32, "float32"), (ml_dtypes.bfloat16, "float32")])
@pytest.mark.usefixtures("manner")
def test_pieces_and_blocks_of_any_size_give_the_same_bits(
    tmp_path: Path, monkeypatch, piece: int, block: int, stored, wanted: str
) -> None:
    public = write_small(tmp_path, dtype=stored)
    monkeypatch.setattr(placed_tensors, "_PIECE_BYTES", piece)
    monkeypatch.setattr(placed_tensors, "_BLOCK_BYTES", block)
    _, params = load_target(str(tmp_path), wanted)
    for row in target_table(SMALL):
        leaf = params
        for key in row.path:
            leaf = leaf[key]
        expected = public[row.public].T if row.is_turned else public[row.public]
        np.testing.assert_array_equal(np.asarray(leaf), expected.astype(wanted), err_msg=row.public)


@pytest.mark.usefixtures("manner")
def test_subnormal_numbers_survive(tmp_path: Path) -> None:
    public = write_small(tmp_path)
    tiny = np.full_like(public["model.norm.weight"], 1e-40)
    safetensors_io.write_tensors(
        tmp_path,
        {n: t.shape for n, t in public.items()},
        lambda n: tiny if n == "model.norm.weight" else public[n],
        "float32",
    )
    assert np.array_equal(np.asarray(load_target(str(tmp_path), "float32")[1]["norm"]), tiny)


def test_a_part_is_read_without_the_bytes_beside_it(tmp_path: Path, monkeypatch) -> None:
    public = write_small(tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"
    tensor = TensorFiles(tmp_path).stored[name]
    asked: list[tuple[int, int]] = []
    preadv = os.preadv

    def record(descriptor, buffers, offset):
        asked.append((offset - tensor.offset, sum(map(len, buffers))))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", record)
    row_bytes = 12 * 4
    with open_tensors(tensor.file) as descriptor:
        whole_rows, some_columns = np.empty((3, 12), np.float32), np.empty((2, 4), np.float32)
        read_part(descriptor, tensor, (2, 5), (0, 12), whole_rows)
        assert asked == [(2 * row_bytes, 3 * row_bytes)]
        asked.clear()
        read_part(descriptor, tensor, (2, 4), (3, 7), some_columns)
        assert asked == [(2 * row_bytes + 12, 16), (3 * row_bytes + 12, 16)]
    assert np.array_equal(whole_rows, public[name][2:5])
    assert np.array_equal(some_columns, public[name][2:4, 3:7])


@pytest.mark.usefixtures("manner")
def test_short_reads_are_continued(tmp_path: Path, monkeypatch) -> None:
    public = write_small(tmp_path)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:7]], offset))
    _, params = load_target(str(tmp_path), "float32")
    assert np.array_equal(np.asarray(params["embed_tokens"]), public["model.embed_tokens.weight"])


def test_a_file_cut_after_it_was_checked_is_named(tmp_path: Path) -> None:
    write_small(tmp_path)
    files = TensorFiles(tmp_path)
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    last = max(files.stored.values(), key=lambda tensor: tensor.offset).name
    with pytest.raises(
        CheckpointError, match=rf"cannot read {last} from .*model\.safetensors: the file has become shor"
    ):
        list(placed_tensors.iterate_placed(files, target_table(SMALL), np.dtype(np.float32)))
    file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot open .*model\.safetensors: .*No such file"):
        list(placed_tensors.iterate_placed(files, target_table(SMALL), np.dtype(np.float32)))


@pytest.mark.usefixtures("manner")
def test_float16_overflow_is_named(tmp_path: Path) -> None:
    public = write_small(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    large = {n: t * (1e6 if n == name else 1) for n, t in public.items()}
    safetensors_io.write_tensors(tmp_path, {n: t.shape for n, t in large.items()}, large.__getitem__, "float32")
    with pytest.raises(CheckpointError, match=rf"{name} has values that float16 cannot hold"):
        load_target(str(tmp_path), "float16")


def test_devices_of_a_cpu_take_over_what_was_read(tmp_path: Path, monkeypatch) -> None:
    """No second copy: the parameters lie where they were read to, embeddings and turned weights alike."""
    public = write_small(tmp_path)
    made: set[int] = set()
    new_array = placed_tensors._new_array

    def record(shape, float_type):
        array = new_array(shape, float_type)
        made.add(array.ctypes.data)
        return array

    monkeypatch.setattr(placed_tensors, "_new_array", record)
    _, params = load_target(str(tmp_path), "bfloat16")
    leaves = jax.tree.leaves(params)
    assert len(leaves) == len(public)
    assert {leaf.unsafe_buffer_pointer() for leaf in leaves} <= made


def test_a_consumer_that_ends_early_leaves_no_thread_and_no_open_file(tmp_path: Path) -> None:
    write_small(tmp_path)
    before = os.listdir("/proc/self/fd") if Path("/proc/self/fd").exists() else []
    placed = placed_tensors.iterate_placed(TensorFiles(tmp_path), target_table(SMALL), np.dtype(np.float32))
    next(placed)
    placed.close()
    assert not before or len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.usefixtures("manner")
def test_loaded_parameters_may_be_donated(tmp_path: Path) -> None:
    """What was read lies in a buffer of the host's; giving it away must neither warn nor change what is computed."""
    public = write_small(tmp_path)
    params = load_target(str(tmp_path), "float32")[1]
    doubled = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)(params)
    assert np.array_equal(np.asarray(doubled["embed_tokens"]), 2 * public["model.embed_tokens.weight"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_host_memory_is_bounded_by_a_file(tmp_path: Path) -> None:
    """90 MB in four files; a loader that keeps what it read must be seen to fail the same bound."""
    sizes = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 9}
    config = replace(SMALL, head_dim=128, num_attention_heads=8, num_key_value_heads=4, **sizes)
    command = [sys.executable, str(ROOT / "benchmarks" / "loading.py"), "--checkpoint", str(tmp_path / "made")]
    (tmp_path / "config.json").write_text(json.dumps(config.__dict__))
    command += [
        "--config",
        str(tmp_path / "config.json"),
        "--file-bytes",
        "24000000",
        "--output",
        str(tmp_path / "out"),
    ]
    command += ["--cases", "bfloat16", "--repeats", "1", "--control"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    by_manner = {row["manner"]: row for row in rows if row["pass"] == 2}
    files = [file.stat().st_size for file in (tmp_path / "made").glob("*.safetensors")]
    assert len(files) >= 4 and by_manner["released"]["largest_file_bytes"] == max(files)
    assert by_manner["released"]["host_bytes"] < 1.3 * max(files)
    assert by_manner["kept"]["host_bytes"] < 1.3 * max(files)
    assert by_manner["control"]["host_bytes"] > 3 * max(files)
