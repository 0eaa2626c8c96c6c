"""Where arrays live on a mesh of devices: one table from tree paths and activations to the axes `data` and `model`.

In: trees of arrays, or of their shapes alone, and a mesh, whose devices need not be attached. Out: a sharding for every
leaf, and constraints on activations inside a trace. Tensor parallelism over `model` splits attention heads, the MLP and
the vocabulary (column-parallel q/k/v/gate/up, row-parallel o/down and `fc`); sequences and batch slots are split over
`data`, and with fsdp parameters and moments too: they are gathered where they are used.

An axis that its mesh axis does not divide stays whole on every device: a vocabulary of odd size, a batch of few rows.
Heads and MLP widths that `model` does not divide are refused (`check_sizes`): nothing would be gained by more devices.
Code below calls `constrain` and its like wherever a layout has to be fixed; without an active layout they do nothing.

Source: Megatron-LM, arXiv 1909.08053 (column- and row-parallel layers); ZeRO, arXiv 1910.02054 (fsdp).
"""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from domino_jax.config import DraftConfig, TargetConfig, require
from domino_jax.run_config import MeshConfig
from domino_jax.shapes import Array

_T = TypeVar("_T")
_Axes = tuple[Any, ...]

DATA, MODEL = "data", "model"

_MESH_AXES = {"batch": DATA, "heads": MODEL, "kv_heads": MODEL, "mlp": MODEL, "vocab": MODEL, "features": MODEL}
"""Mesh axis of every logical axis that is split."""

_FSDP_AXES = {"width": DATA, "state": DATA, "rank": DATA}
"""Further ones of parameters and moments under fsdp."""

_LAYER: list[tuple[str, _Axes]] = [
    ("q_proj", ("width", "heads")),
    ("[kv]_proj", ("width", "kv_heads")),
    ("o_proj", ("heads", "width")),
    ("(?:gate|up)_proj", ("width", "mlp")),
    ("down_proj", ("mlp", "width")),
    ("[a-z_]*norm", (None,)),
]
"""Tensor of a layer -> logical axes."""

_PARAMETERS: list[tuple[str, _Axes]] = [
    ("embed_tokens|lm_head", ("vocab", "width")),
    *((rf"layers_\d+/{name}", axes) for name, axes in _LAYER),
    *((f"layers/{name}", (None, *axes)) for name, axes in _LAYER),  # stacked
    (r"[a-z_]*norm", (None,)),
    ("backbone/fc", ("features", "width")),
    # The GRU is whole on every device: split, each step of the rollout would need a collective for its state alone.
    ("head/gru_input", ("width", None)),
    ("head/gru_hidden", ("state", None)),
    ("head/down", ("width", None)),
    ("head/up", ("rank", "vocab")),
]
"""Path of a parameter -> logical axes; moments have their parameter's path."""

_STATES: list[tuple[str, _Axes]] = [
    # caches: those of slots, and blocks of a prefix pool
    (r"(target|draft)_cache/(keys|values)/\d+", ("batch", "kv_heads", None, None)),
    (r"(target|draft)/(keys|values)/\d+", (None, "kv_heads", None, None)),
    # decoding
    ("tokens|sources|stop_ids|acceptance_lengths|last_hidden", ("batch", None)),
    ("committed_len|limit_len|has_stopped|is_done|num_rounds", ("batch",)),
    ("sampling/(temperature|top_k|top_p|min_p|seed)", ("batch",)),
    ("wants_scores|uses_draft|has_failed", ("batch",)),
    ("adjustment/(is_used|presence|frequency|repetition|min_len)", ("batch",)),
    ("adjustment/(bias|prompt_seen|output_counts)", ("batch", "vocab")),
    # a batch of training, its first axis the micro-steps
    ("input_ids|loss_mask", (None, "batch", None)),
    ("lengths|numbers", (None, "batch")),
    ("features|last_hidden", (None, "batch", None, None)),
    # a chunk of a prompt
    ("hidden", ("batch", None, None)),
    # the rest of a training's state, and what may be drafted
    ("key_data|ns_coeffs|vocabulary/token_ids", (None,)),
]
"""Path of another leaf -> logical axes. A leaf without axes (a count) is whole everywhere."""

_ACTIVATIONS: dict[str, _Axes] = {
    "states": ("batch", ..., None),
    "streams": (None, "batch", ..., None),
    "logits": ("batch", ..., "vocab"),
    "heads": ("batch", ..., "heads", None),
    "kv_heads": ("batch", ..., "kv_heads", None),
    "mlp": ("batch", ..., "mlp"),
    "features": ("batch", ..., "features"),
    "cache": ("batch", "kv_heads", None, None),
}
"""Kind of an activation -> logical axes; `...` stands for any number of whole axes."""

_TABLE = [(re.compile(rf"(?:^|.*/)(?:{pattern})"), axes) for pattern, axes in _PARAMETERS + _STATES]


@dataclass(frozen=True)
class Layout:
    """A mesh with axes `data` and `model`, and how trees are laid out on it.

    Attributes:
        fsdp: split parameters and moments over `data` too.
    """

    mesh: Mesh
    fsdp: bool = False

    @property
    def num_data(self) -> int:
        """Groups of devices that share a batch."""
        return self.mesh.shape[DATA]

    @property
    def num_model(self) -> int:
        """Devices that share every layer."""
        return self.mesh.shape[MODEL]

    def shardings(self, tree: _T) -> _T:
        """Return the sharding of every leaf of a tree of arrays or shapes: parameters, states, batches.

        Raises:
            ValueError: a leaf whose path the table does not know.
        """
        sizes = dict(self.mesh.shape)
        return _map_specs(tree, lambda leaf, axes: NamedSharding(self.mesh, _fit(axes, leaf.shape, sizes, self.fsdp)))

    def abstract(self, tree: _T) -> _T:
        """Return shapes, types and shardings of a tree, without arrays; what ahead-of-time lowering takes.

        Raises:
            ValueError: as `shardings`.
        """
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            self.shardings(tree),
        )

    def place(self, tree: _T) -> _T:
        """Return a tree of host or device arrays laid out on the mesh; every process holds all of a host array.

        Raises:
            ValueError: as `shardings`.
        """
        return jax.tree.map(_place, tree, self.shardings(tree))

    def find_places(self, num_rows: int) -> list[int]:
        """Return which rows of a batch axis of `num_rows` the devices of this process hold, ascending.

        Processes that share a layer over `model` hold the same ones.
        """
        rows = np.arange(num_rows)
        held = self._batch_sharding(num_rows).addressable_devices_indices_map((num_rows,)).values()
        return sorted({row for index in held for row in rows[index].tolist()})

    def place_rows(self, tree: _T, num_rows: int) -> _T:
        """Return a batch of training laid out on the mesh, of which every process gives the rows at its `find_places`.

        Raises:
            ValueError: as `shardings`.
        """

        def place(leaf: np.ndarray, sharding: NamedSharding) -> jax.Array:
            shape = (leaf.shape[0], num_rows, *leaf.shape[2:])
            return jax.make_array_from_process_local_data(sharding, leaf, shape)

        whole = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0], num_rows, *leaf.shape[2:]), leaf.dtype), tree
        )
        return jax.tree.map(place, tree, self.shardings(whole))

    def _batch_sharding(self, num_rows: int) -> NamedSharding:
        return NamedSharding(self.mesh, _fit(("batch",), (num_rows,), dict(self.mesh.shape), False))

    def replicate(self, tree: _T) -> _T:
        """Return a tree of traced arrays that is whole on every device."""
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, PartitionSpec()))

    def zeros(self, shapes: _T) -> _T:
        """Return arrays of zeros of the shapes and types of a tree, each made where it will live.

        Raises:
            ValueError: as `shardings`.
        """
        return jax.tree.map(
            lambda leaf, sharding: jnp.zeros(leaf.shape, leaf.dtype, device=sharding), shapes, self.shardings(shapes)
        )

    def constrain(self, tree: _T) -> _T:
        """Return a tree of traced arrays that is laid out as `shardings` says."""
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree))


def build_layout(config: MeshConfig, devices: Sequence[Any] | None = None) -> Layout:
    """Return the layout on some devices: all attached ones by default; those of a topology need not be attached.

    Raises:
        ConfigError: the mesh has more or fewer devices than there are.
    """
    devices = jax.devices() if devices is None else list(devices)
    count, model = len(devices), config.model
    require(
        count % model == 0,
        f"mesh.model is {model}, which does not divide the {count} devices; choose one of {_divisors(count)}",
    )
    data = config.data or count // model
    require(
        data * model == count,
        f"mesh.data {config.data} x mesh.model {model} is {data * model} devices, there are {count}; give mesh.data "
        f"{count // model}, or 0 for all that mesh.model leaves",
    )
    if count > 1 and jax.devices()[0] in devices:
        # Neighbours of `model` talk most: `make_mesh` puts them next to each other on the wires.
        return Layout(
            jax.make_mesh((data, model), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2, devices=devices), config.fsdp
        )
    grid = np.array(devices).reshape(data, model)
    return Layout(Mesh(grid, (DATA, MODEL), axis_types=(AxisType.Auto,) * 2), config.fsdp)


def find_layout(config: MeshConfig) -> Layout | None:
    """Return the layout on all attached devices, or None where there is one: then nothing needs to be placed.

    Raises:
        ConfigError: as `build_layout`.
    """
    layout = build_layout(config)
    return layout if layout.mesh.size > 1 else None


def check_sizes(layout: Layout | None, target: TargetConfig, draft: DraftConfig | None = None) -> None:
    """Check that `model` divides the heads and the MLP of both models.

    Raises:
        ConfigError: it does not; the message names the size and what `mesh.model` may be.
    """
    if layout is None:
        return
    named = [
        (f"the {model}'s {name}", getattr(config, name))
        for model, config in (("target", target), ("drafter", draft))
        if config
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    ]
    allowed = _divisors(int(np.gcd.reduce([size for _, size in named])))
    for name, size in named:
        require(
            size % layout.num_model == 0,
            f"mesh.model is {layout.num_model}, which does not divide {name}, {size}; these models can be split over "
            f"{allowed} devices: use the others for mesh.data",
        )


def _divisors(number: int) -> str:
    return ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)


def activate(layout: Layout | None) -> AbstractContextManager[Any]:
    """Return the context in which jitted functions are called or lowered for a layout; None: all on one device."""
    return nullcontext() if layout is None else jax.set_mesh(layout.mesh)


def fetch(tree: _T) -> _T:
    """Return a tree of arrays as numpy arrays, whole in every process; all of them call it."""

    def get(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(get, tree)


def count_device_bytes(tree: Any) -> int:
    """Return what each device holds of a tree of arrays or shapes; a leaf without a sharding is whole."""
    parts = [
        (leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape, jnp.dtype(leaf.dtype).itemsize)
        for leaf in jax.tree.leaves(tree)
    ]
    return sum(prod(shape) * size for shape, size in parts)


def constrain(x: Array, kind: str) -> Array:
    """Return an activation laid out as the table says for its kind; nothing changes without an active layout."""
    sizes = _active_sizes()
    if not sizes:
        return x
    return jax.lax.with_sharding_constraint(x, _fit(_expand(_ACTIVATIONS[kind], x.ndim), x.shape, sizes, False))


def constrain_tree(tree: _T) -> _T:
    """Return a state laid out as the table says for its paths; nothing changes without an active layout.

    Raises:
        ValueError: a leaf whose path the table does not know.
    """
    sizes = _active_sizes()
    if not sizes:
        return tree
    return _map_specs(
        tree, lambda leaf, axes: jax.lax.with_sharding_constraint(leaf, _fit(axes, leaf.shape, sizes, False))
    )


def gather_parameter(weight: Array, path: str) -> Array:
    """Return a parameter whole over `data`, as products need it under fsdp; `path` is one of the table's.

    Cast before: what travels is then of the activations' type. Nothing changes without an active layout.
    """
    sizes = _active_sizes()
    if not sizes:
        return weight
    return jax.lax.with_sharding_constraint(weight, _fit(_find_axes(path, weight.ndim), weight.shape, sizes, False))


def on_own_rows(function: Callable[..., _T], whole: Any, rows: Any) -> _T:
    """Return `function(whole, rows)`, run by every group of devices on its own rows of a batch, the first axis.

    Its results are rows too. What it does in a loop then needs no exchange between the groups, and gradients of `whole`
    are summed over them once, after the loop. Without an active layout, or where the rows do not divide, it is called
    once on all of them.
    """
    if count_shards("batch", jax.tree.leaves(rows)[0].shape[0]) == 1:
        return function(whole, rows)
    by_rows = jax.shard_map(
        function,
        in_specs=(PartitionSpec(), PartitionSpec(DATA)),
        out_specs=PartitionSpec(DATA),
        axis_names={DATA},
        check_vma=False,
    )
    return by_rows(whole, rows)


def count_shards(kind: str, size: int) -> int:
    """Return over how many devices the active layout splits a logical axis of `size`; 1 without one."""
    sizes = _active_sizes()
    shards = sizes.get(_MESH_AXES[kind], 1)
    return shards if size % shards == 0 else 1


def split_axes() -> set[str]:
    """Return the mesh axes of the active layout that the compiler splits arrays over."""
    return set(_active_sizes())


def _active_sizes() -> dict[str, int]:
    """Return the mesh axes that the compiler splits arrays over; inside `on_own_rows` that is `model` alone."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: mesh.shape[name] for name in mesh.axis_names if name not in mesh.manual_axes}


def _expand(axes: _Axes, ndim: int) -> _Axes:
    if ... not in axes:
        return axes
    at = axes.index(...)
    return axes[:at] + (None,) * (ndim - len(axes) + 1) + axes[at + 1 :]


def _fit(axes: _Axes, shape: Sequence[int], sizes: dict[str, int], fsdp: bool) -> PartitionSpec:
    """Return the mesh axes of an array's axes, None where there is none or it does not divide."""
    names = _MESH_AXES | _FSDP_AXES if fsdp else _MESH_AXES
    wanted = [names.get(axis) if axis else None for axis in axes]
    return PartitionSpec(
        *(name if name in sizes and size % sizes[name] == 0 else None for name, size in zip(wanted, shape, strict=True))
    )


def _map_specs(tree: _T, make: Callable[[Any, _Axes], Any]) -> _T:
    def one(path: Any, leaf: Any) -> Any:
        return make(leaf, _find_axes(jax.tree_util.keystr(path, simple=True, separator="/"), len(leaf.shape)))

    return jax.tree_util.tree_map_with_path(one, tree)


@cache
def _find_axes(path: str, ndim: int) -> _Axes:
    if ndim == 0:
        return ()
    for pattern, axes in _TABLE:
        if len(axes) == ndim and pattern.fullmatch(path):
            return axes
    raise ValueError(f"{path}, with {ndim} axes, has no row in the table of {__name__}; add one")


def _place(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and (sharding.is_fully_addressable or not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    # To devices of other processes `device_put` would first compare all values between them.
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
