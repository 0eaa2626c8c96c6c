"""Devices that need not be here: named topologies that programs are compiled for ahead of time.

In: a name like `v6e:4x4` or `h100:8`. Out: JAX's description of its devices, for a mesh, and what the makers publish
about one of them. TPU topologies need the `libtpu` package (extra `tpu`), GPU ones JAX's CUDA plugin (extra `cuda12`);
neither needs a device. Knows nothing about models and runs.
"""

import importlib
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

GIB = 2**30


class TopologyError(ValueError):
    """A topology that cannot be described here; the message says which there are, or what to install."""


@dataclass(frozen=True)
class DeviceKind:
    """What is published about one device of a kind.

    Attributes:
        memory_bytes: what a program can have of its own memory.
        bandwidth_bytes_per_s: between it and that memory.
        flops_per_s: dense bfloat16 products.
        jax_share: part of `memory_bytes` that JAX takes unless told otherwise.
    """

    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops_per_s: float
    jax_share: float = 1.0

    @property
    def default_bytes(self) -> int:
        """Memory that a program has unless JAX is told otherwise."""
        return int(self.memory_bytes * self.jax_share)


TPU_KINDS = {
    "v5e": DeviceKind(int(15.75 * GIB), 819e9, 197e12),
    "v5p": DeviceKind(int(95.74 * GIB), 2765e9, 459e12),
    "v6e": DeviceKind(int(31.25 * GIB), 1638e9, 918e12),
}
"""Source: cloud.google.com/tpu/docs, one page a version, for the rates; for the memory the limit that libtpu's compiler
names when a program exceeds it."""

_NO_MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at a time, or one beside a run: none takes a device
}
_TPU_AXES = {"v5e": 2, "v5p": 3, "v6e": 2}

GPU_KINDS = {
    "h100": DeviceKind(84_942_979_072, 3.35e12, 989e12, 0.75),
    "h200": DeviceKind(150_754_820_096, 4.8e12, 989e12, 0.75),
}
"""Source: NVIDIA's data sheets of the SXM modules; the share is the default of `XLA_CLIENT_MEM_FRACTION`."""

EXAMPLES = "v5e:4x4, v6e:4x4, v5p:2x2x1, h100:1, h100:8, h200:1"
_GPU_NAMES = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
_GPU_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""
"""A `GpuTargetConfigProto`. Source: CUDA's device properties of an H100 SXM."""


@dataclass(frozen=True)
class Topology:
    """A described set of devices.

    Attributes:
        platform: `tpu` or `cuda`.
        devices: JAX's descriptions; they compute nothing.
    """

    name: str
    platform: str
    kind: DeviceKind
    devices: Sequence[Any]


def find_topology(name: str) -> Topology:
    """Return the topology called `name`: `v6e:4x4` (a TPU's version and its chips by axis) or `h100:8` (GPUs).

    Raises:
        TopologyError: the name is none of a topology, or the package that describes it is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind in TPU_KINDS and re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (_TPU_AXES[kind] - 1), shape):
        return Topology(name, "tpu", TPU_KINDS[kind], _describe_tpu(name))
    if kind in GPU_KINDS and re.fullmatch(r"[1-9]\d*", shape):
        return Topology(name, "cuda", GPU_KINDS[kind], _describe_gpu(kind, int(shape)))
    known = ", ".join([*TPU_KINDS, *GPU_KINDS])
    raise TopologyError(
        f"topology is {name!r}; give a kind ({known}) and a shape: chips by axis (v5e and v6e have two, v5p three), or "
        f"a number of GPUs, for example {EXAMPLES}"
    )


def _describe_tpu(name: str) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(f'topology {name!r} needs the compiler for TPUs: pip install -e ".[tpu]" (no TPU needed)')
    # libtpu wants to know what machine this is and would ask a server; the topology's name decides all the same.
    for variable, value in _NO_MACHINE.items():
        os.environ.setdefault(variable, value)
    # A host has 2 x 2 chips, but for the smallest slices, which are one host.
    is_one_chip = set(name.partition(":")[2].split("x")) == {"1"}
    options = {"chips_per_host_bounds": [1, 1, 1]} if is_one_chip else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise TopologyError(f"libtpu knows no topology {name!r} ({_first_line(error)}); try {EXAMPLES}") from error


def _describe_gpu(kind: str, count: int) -> Sequence[Any]:
    plugins = [plugin for plugin in _GPU_PLUGINS if _is_installed(plugin)]
    if not plugins:
        raise TopologyError(
            f"topology '{kind}:{count}' needs JAX's CUDA plugin: pip install -e \".[cuda12]\" (no GPU needed)"
        )
    importlib.import_module(plugins[0])
    made = GPU_KINDS[kind]
    target = _HOPPER.format(bandwidth=int(made.bandwidth_bytes_per_s), memory=made.memory_bytes, name=_GPU_NAMES[kind])
    try:
        described = topologies.get_topology_desc(
            platform="cuda", topology_name=kind, target_config=target, topology=f"1x1x{count}"
        )
    except jax.errors.JaxRuntimeError as error:
        raise TopologyError(f"JAX's CUDA plugin cannot describe '{kind}:{count}' ({_first_line(error)})") from error
    return described.devices


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package above it
        return False


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
