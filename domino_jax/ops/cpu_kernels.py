"""Products of a few rows and attention of a few tokens on a CPU, by kernels of our own (`cpu_kernels.cc`).

In: float32 rows, and a weight (float32 or bfloat16) or a cache that lies on one device. Out: what XLA would give of
float32 factors, without packing what is large. The machine's own C++ compiler makes the kernels when they are first
needed, for the CPU at hand; they are kept in the user's cache folder. Where there is no compiler nothing fails:
`has_kernels_for` says so, and all stays with XLA.

Source: XLA's foreign function interface as `jax.ffi` describes it.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib

from domino_jax.config import ConfigError
from domino_jax.shapes import Array, BFloat16, Float, Int

_SOURCE = Path(__file__).with_suffix(".cc")
_SWITCH = "DOMINO_JAX_KERNELS"
_COMPILERS = ("c++", "g++", "clang++")
_OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-w")
_LOGGER = logging.getLogger(__name__)
_LOCK = threading.Lock()


def has_kernels_for(dtype: str | jnp.dtype) -> bool:
    """Return whether what is traced now may use the kernels for numbers of a type; the first call may compile them.

    Not on a host of accelerators, and not where devices share arrays: each would need what lies on another.

    Raises:
        ConfigError: the environment variable `DOMINO_JAX_KERNELS` is neither `1` (the default) nor `0` (no kernels).
    """
    if jnp.dtype(dtype) != jnp.float32 or jax.default_backend() != "cpu":
        return False
    return jax.sharding.get_abstract_mesh().empty and _register() is not None


@jax.custom_jvp
def multiply_rows(x: Float[Array, "T I"], weight: Float[Array, "I O"]) -> Float[Array, "T O"]:
    """Return `x @ weight` of float32 rows on a CPU that has kernels; meant for up to 128 rows."""
    return _call("MultiplyRows", (x.shape[0], weight.shape[1]), x, weight)


@jax.custom_jvp
def multiply_turned_rows(x: Float[Array, "T I"], weight: Float[Array, "O I"]) -> Float[Array, "T O"]:
    """Return `x @ weight.T` of float32 rows on a CPU that has kernels; meant for up to 128 rows."""
    return _call("MultiplyTurnedRows", (x.shape[0], weight.shape[0]), x, weight)


def _derive(kernel: jax.custom_jvp, product: Callable[[Array, Array], Array]) -> None:
    def differentiate(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
        (x, weight), (x_dot, weight_dot) = primals, tangents
        return kernel(x, weight), product(x_dot, weight) + product(x, weight_dot)

    kernel.defjvp(differentiate)


_derive(multiply_rows, jnp.matmul)
_derive(multiply_turned_rows, lambda x, weight: x @ weight.T)


def take_rows(table: BFloat16[Array, "V D"], ids: Int[Array, "*at"]) -> Float[Array, "*at D"]:
    """Return float32 rows of a table; an id outside takes the row at that end. For a CPU that has kernels."""
    rows = _call("TakeRows", (ids.size, table.shape[1]), table, ids.reshape(-1).astype(jnp.int32))
    return rows.reshape(*ids.shape, table.shape[1])


def take_columns(table: BFloat16[Array, "E V"], ids: Int[Array, "*at"]) -> Float[Array, "*at E"]:
    """Return `take_rows` of the turned table, which is not turned for it."""
    columns = _call("TakeColumns", (ids.size, table.shape[0]), table, ids.reshape(-1).astype(jnp.int32))
    return columns.reshape(*ids.shape, table.shape[0])


def attend_cached(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B K H S"],
    values: Float[Array, "B K S H"],
    start: Int[Array, " B"],
) -> Float[Array, "B T N H"]:
    """Return grouped-query attention of tokens at positions `start ..` over a float32 cache that holds them already.

    Token t sees the positions up to `start + t`; what lies after `start + T` is not read. For a CPU that has kernels;
    without derivatives.
    """
    return _call("AttendCached", queries.shape, queries, keys, values, start.astype(jnp.int32))


def _call(kernel: str, shape: tuple[int, ...], *inputs: Array) -> Array:
    out = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.ffi.ffi_call(f"{_register()}.{kernel}", out, vmap_method="sequential")(*inputs)


def _register() -> str | None:
    """Register the kernels with XLA and return the first part of their names, or None where there are none."""
    with _LOCK:  # programs are traced in several threads
        return _register_once()


@functools.cache
def _register_once() -> str | None:
    switch = os.environ.get(_SWITCH, "1")
    if switch not in ("0", "1"):
        raise ConfigError(f"{_SWITCH} is {switch!r}; allowed: 1 (kernels where they can be compiled), 0 (none)")
    if switch == "0":
        return None
    try:
        key = _identify()
        library = _load(f"cpu_kernels-{key}.so")
    except (OSError, subprocess.SubprocessError) as error:
        _LOGGER.warning(
            "few rows are left to XLA, verify passes on this CPU take up to twice as long: %s "
            "(%s=0 keeps it so without this line)",
            _find_reason(error),
            _SWITCH,
        )
        return None
    name = f"domino_jax.{key}"
    for kernel in ("MultiplyRows", "MultiplyTurnedRows", "TakeRows", "TakeColumns", "AttendCached"):
        jax.ffi.register_ffi_target(f"{name}.{kernel}", jax.ffi.pycapsule(getattr(library, kernel)), platform="cpu")
    return name


def _find_reason(error: Exception) -> str:
    """Return the line of a compiler's output that tells most, or the error itself."""
    said = getattr(error, "stderr", None) or ""
    lines = said.decode(errors="replace").splitlines() if isinstance(said, bytes) else said.splitlines()
    return next((line.strip() for line in lines if "error" in line), lines[0].strip() if lines else str(error))


def _identify() -> str:
    """Return a name for what a compiled file depends on: source, options, interface, C library and CPU."""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    else:
        cpu = str(platform.uname())
    versions = jaxlib.__version__, *platform.libc_ver(), platform.machine()
    parts = _SOURCE.read_text(), " ".join(_OPTIONS), os.environ.get("CXX", ""), *versions, cpu
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _load(name: str) -> ctypes.CDLL:
    """Load the kernels from the user's cache folder, or compile them, and keep them there where it can be written."""
    folder = _find_folder()
    if folder is not None:
        with contextlib.suppress(OSError):  # none is there, or none that this system runs
            return ctypes.CDLL(str(folder / name))
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / name
        _compile(made)
        if folder is not None:
            with contextlib.suppress(OSError):  # it cannot be written: every process compiles
                return ctypes.CDLL(str(_keep(made, folder)))
        return ctypes.CDLL(str(made))


def _keep(made: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        copy = shutil.copyfile(made, Path(scratch) / made.name)
        return copy.replace(folder / made.name)  # whole or not at all, whoever else compiles it


def _find_folder() -> Path | None:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "domino_jax"
    except RuntimeError:  # this user has no home
        return None


def _compile(output: Path) -> None:
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler was found ({', '.join(_COMPILERS)}, or the variable CXX)")
    for_this_cpu = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
    command = [*compiler.split(), *_OPTIONS, for_this_cpu, "-I", jax.ffi.include_dir(), str(_SOURCE)]
    subprocess.run([*command, "-o", str(output)], check=True, capture_output=True, timeout=300)
