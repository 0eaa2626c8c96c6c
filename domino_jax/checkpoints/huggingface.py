"""Hugging Face directories <-> parameter trees of the target and the drafter.

In: a local directory or a hub id. Out: a frozen config and a pytree of jax arrays in this package's names; and back.
One table a model pairs public tensor names with paths of the tree and is read both ways. Linear weights are turned
(`[out, in]` in files, `[in, out]` here). A tensor goes to its devices piece by piece (`placed_tensors`).

Source: tensor names of Hugging Face `Qwen3ForCausalLM` and of the public `DominoDraftModel` / `DFlashDraftModel`.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from domino_jax.checkpoints.config_json import (
    parse_draft_config,
    parse_target_config,
    write_draft_config,
    write_target_config,
)
from domino_jax.checkpoints.gathered_tensors import Read, write_gathered
from domino_jax.checkpoints.placed_tensors import TensorName, iterate_placed
from domino_jax.checkpoints.safetensors_io import (
    FLOAT_TYPES,
    MAX_SHARD_BYTES,
    CheckpointError,
    TensorFiles,
    cast,
    parse_float_type,
    read_json_object,
    write_json,
    write_tensors,
)
from domino_jax.checkpoints.serving_layouts import TYPE_KEY, arrange_config, restore_public
from domino_jax.config import DraftConfig, TargetConfig, find_misfits
from domino_jax.durable import flush
from domino_jax.ops.products import takes_bfloat16
from domino_jax.shapes import Params
from domino_jax.sharding import Layout, check_sizes

CONFIG_FILE = "config.json"
_HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "vocab*", "merges*", "*.jinja"]
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class LoadedDraft:
    """A drafter as read.

    Attributes:
        config: its sizes and layout.
        params: `backbone`, and `head` unless it is plain DFlash.
        raw_config: the whole public `config.json`, unknown fields included; hand it back to `save_draft`.
    """

    config: DraftConfig
    params: Params
    raw_config: dict[str, Any]


def _layer_table(config: TargetConfig | DraftConfig, public: str, path: tuple[str, ...]) -> list[TensorName]:
    width, mlp, head = config.hidden_size, config.intermediate_size, config.head_dim
    query, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    linear = {
        "self_attn.q_proj": (query, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, query),
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
    }
    norms = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
    }
    table = []
    for i in range(config.num_hidden_layers):
        for name, shape in (linear | norms).items():
            leaf = (*path, f"layers_{i}", name.rsplit(".", 1)[-1])
            table.append(TensorName(f"{public}layers.{i}.{name}.weight", leaf, shape, name in linear))
    return table


def target_table(config: TargetConfig) -> list[TensorName]:
    """Return the name table of a target."""
    embedding = (config.vocab_size, config.hidden_size)
    table = [TensorName("model.embed_tokens.weight", ("embed_tokens",), embedding)]
    table += _layer_table(config, "model.", ())
    table.append(TensorName("model.norm.weight", ("norm",), (config.hidden_size,)))
    if not config.tie_word_embeddings:
        table.append(TensorName("lm_head.weight", ("lm_head",), embedding))
    return table


def draft_table(config: DraftConfig) -> list[TensorName]:
    """Return the name table of a drafter; without a head it names the backbone only."""
    width, state, rank = config.hidden_size, config.gru_hidden_dim, config.emb_dim
    num_captured = len(config.target_layer_ids)
    table = [
        TensorName("fc.weight", ("backbone", "fc"), (width, num_captured * width), True),
        TensorName("hidden_norm.weight", ("backbone", "hidden_norm"), (width,)),
        TensorName("norm.weight", ("backbone", "norm"), (width,)),
        *_layer_table(config, "", ("backbone",)),
    ]
    if config.has_head:
        table += [
            TensorName("prefix_gru.weight_ih_l0", ("head", "gru_input"), (3 * state, width), True),
            TensorName("prefix_gru.weight_hh_l0", ("head", "gru_hidden"), (3 * state, state), True),
            TensorName("embed_proj.0.weight", ("head", "down"), (rank, width + state), True),
            TensorName("embed_proj.2.weight", ("head", "up"), (config.vocab_size, rank), True),
        ]
    return table


def resolve_directory(path_or_id: str) -> Path:
    """Return the local directory of a checkpoint; a hub id is downloaded first (no pickled weights).

    Raises:
        CheckpointError: it is neither a directory nor a hub id that can be reached.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists() or path_or_id.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path_or_id):
        raise CheckpointError(
            f"{path_or_id} is not a directory; give a checkpoint directory or a hub id such as Qwen/Qwen3-4B"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_id, allow_patterns=_HUB_PATTERNS))
    except (OSError, ValueError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path_or_id!r} is no local directory and could not be had from the Hugging Face hub ({first_line}). "
            "Check the spelling and the network, log in for gated models, or download it and give the directory"
        ) from error


def read_target_config(path_or_id: str) -> tuple[TargetConfig, dict[str, Any]]:
    """Return a target's config, parsed and raw, without reading weights.

    Raises:
        CheckpointError: the checkpoint is not there or is no supported target.
    """
    file = resolve_directory(path_or_id) / CONFIG_FILE
    raw = read_json_object(file)
    return parse_target_config(raw, str(file)), raw


def load_target(
    path_or_id: str, dtype: str, layout: Layout | None = None, keep_bfloat16: bool = False
) -> tuple[TargetConfig, Params]:
    """Return a target's config and its parameters in `dtype`, laid out; a process reads its own devices' parts alone.

    A tied target has no `lm_head`; one in the files is not read. With `keep_bfloat16` matrices that are stored in that
    type stay in it where products take them so (`products.takes_bfloat16`): half the memory, half to read a step, and
    the same numbers.

    Raises:
        CheckpointError: the checkpoint is not there, not supported or damaged, or its tensors do not fit its config.
        ConfigError: the layout does not divide the model.
    """
    directory = resolve_directory(path_or_id)
    config, _ = read_target_config(str(directory))
    check_sizes(layout, config, None)
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return config, _read_params(TensorFiles(directory), target_table(config), ignored, dtype, layout, keep_bfloat16)


def read_draft_config(path_or_id: str) -> tuple[DraftConfig, dict[str, Any]]:
    """Return a drafter's config, parsed and raw, without reading weights; the raw one in the public layout.

    Raises:
        CheckpointError: the checkpoint is not there or is no supported drafter.
    """
    file = resolve_directory(path_or_id) / CONFIG_FILE
    raw = read_json_object(file)
    if TYPE_KEY in raw:
        raw = restore_public(raw, str(file))
    return parse_draft_config(raw, str(file)), raw


def load_draft(path_or_id: str, dtype: str, layout: Layout | None = None, keep_bfloat16: bool = False) -> LoadedDraft:
    """Return a drafter in the public layout or that of speculators; its parameters as those of `load_target`.

    Raises:
        CheckpointError: the checkpoint is not there, not supported or damaged, or its tensors do not fit its config.
    """
    directory = resolve_directory(path_or_id)
    config, raw = read_draft_config(str(directory))
    params = _read_params(TensorFiles(directory), draft_table(config), set(), dtype, layout, keep_bfloat16)
    return LoadedDraft(config, params, raw)


def save_target(
    directory: str | Path,
    config: TargetConfig,
    params: Params,
    dtype: str = "float32",
    extra_config: dict[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a target so that `transformers` loads it; `extra_config` adds fields such as `eos_token_id`.

    All processes call it; the first writes.

    Raises:
        CheckpointError: the parameters do not fit the config, or a value does not fit `dtype`.
        ProcessError: the first process could not write.
    """
    raw = write_target_config(config, dtype, extra_config)
    _write_params(Path(directory), target_table(config), params, raw, dtype, max_shard_bytes)


def save_draft(
    directory: str | Path,
    config: DraftConfig,
    params: Params,
    raw_config: dict[str, Any] | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    layout: str = "public",
    verifier: str = "",
) -> None:
    """Write a drafter; fields of `raw_config` that this package does not know are kept.

    All processes call it; the first writes, and gathers one tensor at a time (`gathered_tensors`).

    Args:
        layout: who is to load it, one of `serving_layouts.LAYOUTS`.
        verifier: the target's hub id or directory, for layout `speculators`.

    Raises:
        CheckpointError: the parameters do not fit the config, a value does not fit `dtype`, or the layout cannot hold
            the drafter.
        ProcessError: the first process could not write.
    """
    raw = arrange_config(layout, config, dtype, write_draft_config(config, dtype, raw_config), verifier)
    _write_params(Path(directory), draft_table(config), params, raw, dtype, max_shard_bytes)


def check_draft_fits(draft: DraftConfig, target: TargetConfig) -> None:
    """Check that a drafter belongs to a target of this shape.

    Raises:
        CheckpointError: it does not; the message names every mismatch with both values.
    """
    problems = find_misfits(draft, target)
    if problems:
        listing = "\n  ".join(problems)
        raise CheckpointError(f"the drafter does not fit the target; use the one trained for it:\n  {listing}")


def find_kept(path_or_id: str, table: list[TensorName], dtype: str, layout: Layout | None = None) -> set[str]:
    """Return the public names of what `keep_bfloat16` leaves in that type; reads no weights.

    Raises:
        CheckpointError: the checkpoint is not there or damaged.
    """
    return _find_kept(TensorFiles(resolve_directory(path_or_id)), table, dtype, layout)


def _find_kept(files: TensorFiles, table: list[TensorName], dtype: str, layout: Layout | None) -> set[str]:
    if layout is not None or not takes_bfloat16(dtype):
        return set()
    matrices = [row.public for row in table if len(row.shape) > 1 and row.public in files.stored]
    return {name for name in matrices if files.stored[name].type_code == "BF16"}


def shape_params(table: list[TensorName], dtype: str, kept: Collection[str] = ()) -> Params:
    """Return shapes and types of the parameters of a table; `kept` (`find_kept`) are those that stay bfloat16."""
    return _grow_tree(
        (row, jax.ShapeDtypeStruct(row.tree_shape, "bfloat16" if row.public in kept else dtype)) for row in table
    )


def _read_params(
    files: TensorFiles,
    table: list[TensorName],
    ignored: set[str],
    dtype: str,
    layout: Layout | None,
    keep_bfloat16: bool,
) -> Params:
    float_type = parse_float_type(dtype)
    stored = {n: t for n, t in files.stored.items() if n not in ignored and not _IGNORED.search(n)}
    expected = {row.public: row for row in table}
    problems = [f"missing: {n}, expected {list(r.shape)}" for n, r in expected.items() if n not in stored]
    problems += [f"unexpected: {n} {list(t.shape)}" for n, t in sorted(stored.items()) if n not in expected]
    present = [n for n in expected if n in stored]
    problems += [
        f"misshapen: {n} is {list(stored[n].shape)}, expected {list(expected[n].shape)}"
        for n in present
        if stored[n].shape != expected[n].shape
    ]
    problems += [
        f"type: {n} is {code}; float32, bfloat16 and float16 are read"
        for n, code in files.unsupported_types(present).items()
    ]
    if problems:
        raise CheckpointError(
            f"the tensors in {files.directory} do not fit its {CONFIG_FILE}:\n  " + "\n  ".join(problems)
        )
    bfloat16 = FLOAT_TYPES["bfloat16"]
    kept = dict.fromkeys(_find_kept(files, table, dtype, layout), bfloat16) if keep_bfloat16 else {}
    return _grow_tree(iterate_placed(files, table, float_type, layout, kept))


def _grow_tree(leaves: Iterable[tuple[TensorName, Any]]) -> Params:
    tree: dict[str, Any] = {}
    for row, leaf in leaves:
        branch = tree
        for key in row.path[:-1]:
            branch = branch.setdefault(key, {})
        branch[row.path[-1]] = leaf
    return tree


def _write_params(
    directory: Path, table: list[TensorName], params: Params, raw: dict[str, Any], dtype: str, max_shard_bytes: int
) -> None:
    float_type = parse_float_type(dtype)
    rows = {row.public: row for row in table}
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        leaves[tuple(str(getattr(k, "key", k)) for k in path)] = leaf
    shapes = {row.path: row.tree_shape for row in table}
    problems = [f"missing: {'.'.join(p)}, expected {list(s)}" for p, s in shapes.items() if p not in leaves]
    problems += [f"unexpected: {'.'.join(p)} {list(np.shape(v))}" for p, v in leaves.items() if p not in shapes]
    problems += [
        f"misshapen: {'.'.join(p)} is {list(np.shape(leaves[p]))}, expected {list(s)}"
        for p, s in shapes.items()
        if p in leaves and np.shape(leaves[p]) != s
    ]
    if problems:
        raise CheckpointError("the parameters do not fit the config:\n  " + "\n  ".join(problems))

    def write(fetch: Read) -> None:
        def read(name: str) -> np.ndarray:
            array = fetch(name)
            if array.dtype == float_type:
                return array
            converted = np.empty(array.shape, float_type)
            cast(array, name, converted)
            return converted

        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(directory, {n: r.shape for n, r in rows.items()}, read, dtype, max_shard_bytes)
        write_json(directory / CONFIG_FILE, raw)
        flush(directory.parent)

    arrays = {name: leaves[row.path] for name, row in rows.items()}
    write_gathered(arrays, {name for name, row in rows.items() if row.is_turned}, write)


def is_draft_config(raw: Mapping[str, Any]) -> bool:
    """Return whether a `config.json` claims to describe a drafter."""
    return "dflash_config" in raw or TYPE_KEY in raw
