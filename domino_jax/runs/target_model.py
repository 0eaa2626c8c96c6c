"""A loaded target, as the stages of a run hand it to each other, and its weights, which are held once.

Decoding takes the layers one by one, the forward of a training takes them stacked (`models/stacked_target.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from transformers import PreTrainedTokenizerBase

from domino_jax.checkpoints.huggingface import read_target_config, resolve_directory
from domino_jax.config import TargetConfig, require
from domino_jax.models.stacked_target import STACKED, split_layers, stack_layers, unstack_layers
from domino_jax.run_config import RunConfig
from domino_jax.runs.folder import RunFolder
from domino_jax.shapes import Array, Params
from domino_jax.sharding import Layout

_VOCABULARY = ("embed_tokens", "lm_head")


class HeldWeights:
    """A target's weights in the form that was asked for last, one kind of tensor turned into the other at a time.

    Whoever gets a tree should not keep it longer than it is used: its arrays live until then, whatever is held here.
    In several processes all of them ask alike.
    """

    def __init__(self, params: Params) -> None:
        self._outer, self._layers = split_layers(params)
        self._stacked: dict[str, Array] = {}
        self._lock = Lock()  # a shard of features may be computed again in the thread that reads batches

    def by_layer(self) -> Params:
        """Return the parameters as they were loaded: `layers_0`, `layers_1` and so on."""
        with self._lock:
            if self._stacked:
                layers = unstack_layers(self._stacked, self._part)
                self._layers = list(layers.values())
            return self._outer | {f"layers_{i}": dict(layer) for i, layer in enumerate(self._layers)}

    def stacked(self) -> Params:
        """Return the parameters with their layers stacked."""
        with self._lock:
            if self._layers:
                self._stacked = stack_layers(self._layers, self._join)
                self._layers = []
            return self._outer | {STACKED: dict(self._stacked)}

    def vocabulary(self) -> Params:
        """Return embedding and output head alone, in whatever form the layers are held."""
        return {name: self._outer[name] for name in _VOCABULARY if name in self._outer}

    @staticmethod
    def _join(parts: list[Array]) -> Array:
        return _joining(parts[0].sharding)(*parts).block_until_ready()

    @staticmethod
    def _part(whole: Array) -> Sequence[Array]:
        return jax.block_until_ready(_parting(whole.sharding)(whole))


@cache
def _joining(sharding: Sharding) -> Any:
    """Return the program that stacks arrays of a sharding where they lie: no device sends anything."""
    target = sharding
    if isinstance(sharding, NamedSharding):
        target = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return jax.jit(lambda *parts: jnp.stack(parts), out_shardings=target)


@cache
def _parting(sharding: Sharding) -> Any:
    """Return the inverse of `_joining`."""
    target = sharding
    if isinstance(sharding, NamedSharding):
        target = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.jit(lambda whole: [whole[i] for i in range(len(whole))], out_shardings=target)


@dataclass(frozen=True)
class TargetModel:
    """A loaded target and what belongs to it.

    Attributes:
        path: directory or hub id it was loaded from.
        layout: how `weights` and whatever is computed with them lie on several devices; None: on one.
    """

    path: str
    config: TargetConfig
    weights: HeldWeights
    tokenizer: PreTrainedTokenizerBase
    layout: Layout | None = None


def find_target(config: RunConfig, folder: RunFolder) -> str:
    """Return the directory of the run's target, whose context is long enough for the run's sequences.

    Raises:
        ConfigError: it is not.
        CheckpointError: the directory or hub id cannot be used.
    """
    path = str(folder.target) if config.corpus else str(resolve_directory(config.target.path))
    context_len = read_target_config(path)[0].max_position_embeddings
    require(
        config.data.max_length <= context_len,
        f"data.max_length is {config.data.max_length}; the context of the target {path} holds {context_len} tokens: "
        f"give --config.data.max_length={context_len} or less",
    )
    return path
