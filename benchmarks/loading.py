"""Time and host memory of loading a sharded Hugging Face checkpoint, against reading its files and nothing else.

    python benchmarks/loading.py --checkpoint /tmp/checkpoint --output benchmarks/DATE-loading

The checkpoint is made where it is not there yet: bfloat16 tensors of Qwen3-4B's shapes, 16 layers, random bits, about
4 GB in files of 1 GB. A case is `TYPE` or `TYPE@DATAxMODEL`, with `+fsdp`: a mesh of virtual devices, all of them this
process's own. Every measurement has its own process, in which it is done twice: pass 1 compiles, pass 2 does not. Files
are dropped from the system's cache first (`posix_fadvise`), also before `raw_s`, which reads them into one buffer.
Memory is claimed and freed before each pass: a virtual machine may have given its free memory back to its host, and new
pages then cost many times what they cost a loader elsewhere.

What is measured on a CPU, whose devices' memory is the host's: the highest resident set (`VmHWM`, set back before; not
`ru_maxrss`, which a larger parent or the imports would hide it in) less what was resident before, less the parameters.

- `kept`: `load_target` as it is called; the parameters, each buffer once, are taken off: a CPU's devices take over what
  the host has read, so this is what is held beside them.
- `released`: as accelerators are loaded. Each array is deleted as soon as it is on its devices, as memory of an
  accelerator is none of the host's; nothing is taken off. Too large by what devices hold of the tensor being placed.
- `buffers`: as `released`, but `host_bytes` is the most that Python and numpy held at once (`tracemalloc`): what a host
  with accelerators needs, the runtime's own buffers aside.
- `control`: all files are read, then placed (first case only): a loader of which this measurement must tell that it
  holds them all.

One row a pass in `rows.jsonl`: `host_bytes` (that), `largest_file_bytes`, `over_largest_file` (their ratio), `seconds`,
`raw_s` (files into one buffer), `raw_kept_s` (into new memory of their size: parameters that stay on a
CPU cannot be had for less), `cpu_s` (user and system, of the load), `param_bytes`, `file_bytes`.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from domino_jax.checkpoints.config_json import write_target_config
from domino_jax.checkpoints.huggingface import CONFIG_FILE, load_target, read_target_config, target_table
from domino_jax.checkpoints.placed_tensors import iterate_staged
from domino_jax.checkpoints.safetensors_io import TensorFiles, parse_float_type, write_json, write_tensors
from domino_jax.config import TargetConfig
from domino_jax.run_config import MeshConfig
from domino_jax.sharding import Layout, build_layout

CASES = ("bfloat16", "float32", "bfloat16@1x8", "bfloat16@8x1+fsdp", "float32@2x4+fsdp")
SIZES = TargetConfig(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
_BUFFER_BYTES = 8 << 20


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder for rows.jsonl")
    parser.add_argument("--config", type=Path, help="JSON of a TargetConfig to make a checkpoint of")
    parser.add_argument("--file-bytes", type=int, default=1_000_000_000)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--control", action="store_true", help="also measure reading all files first")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "MANNER"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def make_checkpoint(directory: Path, config: TargetConfig, file_bytes: int) -> None:
    generator = np.random.default_rng(0)
    shapes = {row.public: row.shape for row in target_table(config)}

    def draw(name: str) -> np.ndarray:
        bits = generator.integers(0, 1 << 16, shapes[name], np.uint16)
        return (bits & 0xBFFF).view(ml_dtypes.bfloat16)  # the highest bit of the exponent: all are finite

    directory.mkdir(parents=True)
    write_tensors(directory, shapes, draw, "bfloat16", file_bytes)
    write_json(directory / CONFIG_FILE, write_target_config(config, "bfloat16", None))


def parse_case(case: str) -> tuple[str, MeshConfig | None]:
    """Return the type and the mesh of a case."""
    dtype, _, mesh = case.partition("@")
    if not mesh:
        return dtype, None
    sizes, _, fsdp = mesh.partition("+")
    data, model = map(int, sizes.split("x"))
    return dtype, MeshConfig(data, model, bool(fsdp))


def count_devices(case: str) -> int:
    mesh = parse_case(case)[1]
    return mesh.data * mesh.model if mesh else 1


def drop_from_cache(files: list[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def claim_memory(num_bytes: int) -> None:
    """Have the system own this much free memory; numpy asks for huge pages."""
    np.empty(num_bytes, np.uint8)[::4096] = 1


def time_raw(files: list[Path], keeps: bool) -> float:
    """Return the seconds of reading files from the disk, into one buffer or into new memory."""
    drop_from_cache(files)
    began = time.perf_counter()
    size = sum(file.stat().st_size for file in files) if keeps else _BUFFER_BYTES
    memory, at = np.empty(size, np.uint8), 0
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while count := handle.readinto(memory[at : at + _BUFFER_BYTES]):
                at += count if keeps else 0
    return time.perf_counter() - began


def resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def count_buffers(arrays: list[jax.Array]) -> int:
    """Return the bytes of arrays; a host buffer that several virtual devices share counts once."""
    buffers = {s.data.unsafe_buffer_pointer(): s.data.nbytes for a in arrays for s in a.addressable_shards}
    return sum(buffers.values())


def load(directory: Path, dtype: str, layout: Layout | None, manner: str) -> tuple[list[jax.Array], int]:
    """Return what stays of a loaded checkpoint, and the bytes of its parameters."""
    if manner == "kept":
        arrays = jax.tree.leaves(load_target(str(directory), dtype, layout)[1])
        return arrays, count_buffers(arrays)
    if manner == "control":
        whole = [load_file(file) for file in sorted(directory.glob("*.safetensors"))]
        arrays = [jnp.array(t, dtype, copy=True).block_until_ready() for tensors in whole for t in tensors.values()]
        return arrays, count_buffers(arrays)
    num_bytes = 0
    table = target_table(read_target_config(str(directory))[0])
    for _, array in iterate_staged(TensorFiles(directory), table, parse_float_type(dtype), layout):
        num_bytes += count_buffers([array])
        array.delete()
    return [], num_bytes


def measure(directory: Path, case: str, manner: str) -> list[dict]:
    dtype, mesh = parse_case(case)
    layout = build_layout(mesh) if mesh else None
    files = sorted(directory.glob("*.safetensors"))
    jnp.zeros(1).block_until_ready()
    rows = []
    for number in (1, 2):
        drop_from_cache(files)
        claim_memory(sum(file.stat().st_size for file in files))
        raw_s, raw_kept_s = time_raw(files, keeps=False), time_raw(files, keeps=True)
        drop_from_cache(files)
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_bytes("VmRSS")
        if manner == "buffers":
            tracemalloc.start()
        began, began_cpu = time.perf_counter(), time.process_time()
        arrays, param_bytes = load(directory, dtype, layout, manner)
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
        host_bytes = resident_bytes("VmHWM") - before - (param_bytes if arrays else 0)
        if manner == "buffers":
            host_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        largest = max(file.stat().st_size for file in files)
        rows.append(
            {
                "case": case,
                "manner": manner,
                "pass": number,
                "devices": count_devices(case),
                "host_bytes": host_bytes,
                "largest_file_bytes": largest,
                "over_largest_file": round(host_bytes / largest, 4),
                "seconds": round(seconds, 3),
                "raw_s": round(raw_s, 3),
                "raw_kept_s": round(raw_kept_s, 3),
                "cpu_s": round(cpu_s, 3),
                "param_bytes": param_bytes,
                "file_bytes": sum(file.stat().st_size for file in files),
                "files": len(files),
            }
        )
        del arrays
    return rows


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.measure:
        print(json.dumps(measure(args.checkpoint, *args.measure)))
        return
    if not args.checkpoint.exists():
        config = TargetConfig(**json.loads(args.config.read_text())) if args.config else SIZES
        make_checkpoint(args.checkpoint, config, args.file_bytes)
    args.output.mkdir(parents=True, exist_ok=True)
    manners = ["buffers", "released", "kept"] + ["control"] * args.control
    with (args.output / "rows.jsonl").open("w") as rows:
        for repeat in range(args.repeats):
            for case in args.cases:
                for manner in manners if case == args.cases[0] else manners[:3]:
                    flags = f"--xla_force_host_platform_device_count={count_devices(case)}"
                    finished = subprocess.run(
                        [sys.executable, __file__, "--checkpoint", args.checkpoint, "--output", args.output]
                        + ["--measure", case, manner],
                        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
                        stdout=subprocess.PIPE,
                        text=True,
                        check=True,
                    )
                    for row in json.loads(finished.stdout):
                        line = json.dumps({"repeat": repeat} | row)
                        print(line, flush=True)
                        rows.write(line + "\n")
                        rows.flush()


if __name__ == "__main__":
    main()
