"""Every device program of an engine, compiled ahead of time for the shapes it serves.

A state has a shape: rows x cache positions, both from a short ladder. Programs run on one shape or lead from one to the
next; after `compile_all` nothing is compiled again, because only compiled programs are called.

Source: ahead-of-time compilation of JAX (`jit(f).lower(shapes).compile()`).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.decoding import prefix_pool, slot_rows, slots
from domino_jax.decoding.prefill import CHUNK_LENGTHS
from domino_jax.decoding.prefix_pool import PrefixPool
from domino_jax.decoding.slots import CallResult, SlotState
from domino_jax.decoding.state import DecodeSettings, ModelParams
from domino_jax.ops.scoring import Scores
from domino_jax.sharding import Layout, activate, constrain, constrain_tree

_T = TypeVar("_T")

MAX_STOP_IDS = 32
"""Stop ids a request may have."""


@dataclass(frozen=True)
class Shape:
    """Rows x cache positions of a state."""

    rows: int
    positions: int


@dataclass(frozen=True)
class Ladders:
    """The shapes that are compiled.

    Attributes:
        rows: batch sizes, ascending; the last is the number of slots.
        positions: cache lengths, ascending; the last holds the longest sequence.
        block_sizes: slots of a block, descending; 1 is plain decoding and always there.
        max_rounds: rounds a device call can run.
        num_blocks: blocks of the prefix pool; 0 for none.
        block_len: positions of a block.
        margin: positions a sequence needs past its last token, for drafts and for the padding of a prompt.
    """

    rows: tuple[int, ...]
    positions: tuple[int, ...]
    block_sizes: tuple[int, ...]
    max_rounds: int
    num_blocks: int
    block_len: int
    margin: int

    @property
    def shapes(self) -> list[Shape]:
        """Every shape, smallest first."""
        return [Shape(rows, positions) for positions in self.positions for rows in self.rows]

    def positions_for(self, needed: int) -> int:
        """Return the shortest cache that holds `needed` positions.

        Raises:
            ValueError: none does.
        """
        for positions in self.positions:
            if positions >= needed:
                return positions
        raise ValueError(f"{needed} positions are needed; the longest cache has {self.positions[-1]}")

    def rows_for(self, needed: int) -> int:
        """Return the smallest batch that holds `needed` rows."""
        return next(rows for rows in self.rows if rows >= needed)

    def steps_between(self, start: Shape, end: Shape) -> list[Shape]:
        """Return the shapes on the way from `start` to `end`, `end` last: one step of one ladder at a time."""
        rows, positions = self.rows.index(start.rows), self.positions.index(start.positions)
        path = []
        for ladder_end, is_rows in ((self.positions.index(end.positions), False), (self.rows.index(end.rows), True)):
            while (rows if is_rows else positions) != ladder_end:
                move = 1 if (rows if is_rows else positions) < ladder_end else -1
                rows, positions = (rows + move, positions) if is_rows else (rows, positions + move)
                path.append(Shape(self.rows[rows], self.positions[positions]))
        return path


class Programs:
    """Compiled programs by name and shape; each method runs one.

    Attributes:
        settings: block size 1 and the drafter's own sizes; a call with drafts replaces the block size.
    """

    def __init__(self, settings: DecodeSettings, ladders: Ladders, layout: Layout | None = None) -> None:
        """Plan the programs; `take_params` and `compile_all` make them.

        With a layout they run on its mesh: heads, MLP and vocabulary are split over `model`, the rows of a batch over
        `data` where it divides their number. The text is the same.
        """
        self._layout = layout
        self.settings = settings
        self.ladders = ladders
        self._params: ModelParams | None = None
        self._compiled: dict[tuple, Any] = {}

    def take_params(self, params: ModelParams) -> None:
        """Use the weights of both models from now on."""
        self._params = params

    def slots_shape(self, shape: Shape) -> SlotState:
        """Return shapes and types of a state, without arrays."""
        return self._lay_out(jax.eval_shape(lambda: self._init_slots(shape)))

    def pool_shape(self) -> PrefixPool:
        """Return shapes and types of the prefix pool, without arrays."""
        ladders = self.ladders
        shape = partial(prefix_pool.init_pool, self.settings, ladders.num_blocks, ladders.block_len)
        return self._lay_out(jax.eval_shape(shape))

    def _lay_out(self, shapes: _T) -> _T:
        return self._layout.abstract(shapes) if self._layout else shapes

    def init_pool(self) -> PrefixPool:
        """Return an empty prefix pool."""
        if self._layout:
            return self._layout.zeros(self.pool_shape())
        return prefix_pool.init_pool(self.settings, self.ladders.num_blocks, self.ladders.block_len)

    def _init_slots(self, shape: Shape) -> SlotState:
        return slots.init_slots(self.settings, shape.rows, shape.positions, MAX_STOP_IDS, self.ladders.max_rounds)

    def _init_free(self, shape: Shape) -> SlotState:
        return constrain_tree(self._init_slots(shape))

    def init_slots(self, shape: Shape) -> SlotState:
        """Return free slots."""
        return self._compiled["init", shape]()

    def num_prefix_blocks(self, positions: int) -> int:
        """Return the blocks that a row of `positions` can load or store."""
        return positions // self.ladders.block_len

    def num_draft_tokens(self, block_size: int) -> int:
        """Return the tokens drafted a round of a block size."""
        return self._with_width(block_size).num_draft_tokens

    def _with_width(self, block_size: int) -> DecodeSettings:
        return replace(self.settings, block_size=block_size)

    def _lowerings(self) -> Iterator[tuple[tuple, Callable[[], Any]]]:
        """Yield the key of every program, and what lowers it."""
        ladders, settings = self.ladders, self.settings
        params = self._lay_out(_shapes_of(self._params))
        number = jax.ShapeDtypeStruct((), jnp.int32)
        state = self.slots_shape

        def lower(function: Any, *arguments: Any) -> Callable[[], Any]:
            return lambda: function.lower(*arguments)

        for shape in {*ladders.shapes, *(Shape(1, positions) for positions in ladders.positions)}:
            yield ("init", shape), lower(jax.jit(partial(self._init_free, shape)))
        for shape in ladders.shapes:
            for size in ladders.block_sizes:
                yield ("run", shape, size), lower(slots.run_rounds, *self._round_arguments(shape, size))
                if size > 1:
                    yield ("draft", shape, size), lower(slots.draft_only, self._with_width(size), params, state(shape))
            yield ("extract", shape), lower(slot_rows.extract_row, state(shape), number)
            for positions in (p for p in ladders.positions if p <= shape.positions):
                yield (
                    ("insert", shape, positions),
                    lower(slot_rows.insert_row, state(shape), state(Shape(1, positions)), number),
                )
            for other in self._neighbours(shape):
                rows = jax.ShapeDtypeStruct((other.rows,), jnp.int32)
                mask = jax.ShapeDtypeStruct((other.rows,), bool)
                yield ("resize", shape, other), lower(slot_rows.resize_slots, state(shape), rows, mask, other.positions)
        last_hidden = self._states_shape(1, settings.target.hidden_size)
        pool = self.pool_shape()
        for positions in ladders.positions:
            row = state(Shape(1, positions))
            yield ("first", positions), lower(slots.choose_first_token, settings, params, row, last_hidden)
            for length in self._chunks(positions):
                yield ("prefill", positions, length), lower(slots.prefill_slots, settings, params, row, length, number)
            if ladders.num_blocks:
                num_parts = self.num_prefix_blocks(positions)
                ids = jax.ShapeDtypeStruct((num_parts,), jnp.int32)
                mask = jax.ShapeDtypeStruct((num_parts,), bool)
                yield ("load", positions), lower(prefix_pool.load_blocks, pool, row, ids, mask)
                yield ("store", positions), lower(prefix_pool.store_blocks, pool, row, ids)
        for length in self._chunks(ladders.positions[-1]):
            hidden = self._states_shape(1, length, settings.target.hidden_size)
            tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
            yield ("score", length), lower(slots.score_chunk, settings, params, hidden, tokens)
            yield ("last", length), lower(_take_position, hidden, number)

    def _round_arguments(self, shape: Shape, block_size: int) -> tuple:
        mask = jax.ShapeDtypeStruct((shape.rows,), bool)
        flag, number = jax.ShapeDtypeStruct((), bool), jax.ShapeDtypeStruct((), jnp.int32)
        params, state = self._lay_out(_shapes_of(self._params)), self.slots_shape(shape)
        return self._with_width(block_size), params, state, mask, mask, number, flag

    def trace_round(self, shape: Shape, block_size: int) -> Any:
        """Return the program that runs rounds, traced; the parameters may be shapes alone."""
        with activate(self._layout):
            return slots.run_rounds.trace(*self._round_arguments(shape, block_size))

    def _states_shape(self, *sizes: int) -> jax.ShapeDtypeStruct:
        name = "hidden" if len(sizes) == 3 else "last_hidden"
        return self._lay_out({name: jax.ShapeDtypeStruct(sizes, self.settings.dtype)})[name]

    def _chunks(self, positions: int) -> list[int]:
        return [length for length in CHUNK_LENGTHS if length <= positions]

    def _neighbours(self, shape: Shape) -> list[Shape]:
        ladders = self.ladders
        row, position = ladders.rows.index(shape.rows), ladders.positions.index(shape.positions)
        rows = [Shape(ladders.rows[i], shape.positions) for i in (row - 1, row + 1) if 0 <= i < len(ladders.rows)]
        near = (position - 1, position + 1)
        return rows + [Shape(shape.rows, ladders.positions[i]) for i in near if 0 <= i < len(ladders.positions)]

    def compile_all(self, report: Callable[[int, int], None], is_stopped: Callable[[], bool]) -> None:
        """Compile everything; `report` gets how many of how many programs are done.

        Returns early where `is_stopped`.
        """
        lowerings = list(self._lowerings())
        report(0, len(lowerings))
        # XLA compiles without holding Python's lock; lowering traces, one at a time is as fast.
        with ThreadPoolExecutor(max_workers=max(1, min(8, os.cpu_count() or 1))) as pool:
            futures = {}
            for key, lower in lowerings:
                if is_stopped():
                    break
                with activate(self._layout):
                    lowered = lower()
                futures[pool.submit(lowered.compile)] = key
                self._collect(futures, report, len(lowerings))
            for future in as_completed(list(futures)):
                self._compiled[futures[future]] = future.result()
                report(len(self._compiled), len(lowerings))
                if is_stopped():
                    pool.shutdown(cancel_futures=True)
                    return

    def _collect(self, futures: dict, report: Callable[[int, int], None], total: int) -> None:
        for future in [f for f in futures if f.done()]:
            self._compiled[futures.pop(future)] = future.result()
        report(len(self._compiled), total)

    def draft_only(self, state: SlotState, shape: Shape, block_size: int) -> Any:
        """See `decoding.slots.draft_only`."""
        return self._compiled["draft", shape, block_size](self._params, state)

    def run(
        self,
        state: SlotState,
        shape: Shape,
        block_size: int,
        is_cancelled: np.ndarray,
        is_drafted: np.ndarray,
        num_rounds: int,
        ends_early: bool,
    ) -> tuple[SlotState, CallResult]:
        """See `decoding.slots.run_rounds`."""
        program = self._compiled["run", shape, block_size]
        return program(self._params, state, is_cancelled, is_drafted, np.int32(num_rounds), np.bool_(ends_early))

    def prefill(self, row: SlotState, positions: int, chunk_len: int, start: int) -> tuple[SlotState, jax.Array]:
        """See `decoding.slots.prefill_slots`."""
        return self._compiled["prefill", positions, chunk_len](self._params, row, np.int32(start))

    def take_position(self, hidden: jax.Array, position: int) -> jax.Array:
        """Return one position's state of a prefilled chunk."""
        return self._compiled["last", hidden.shape[1]](hidden, np.int32(position))

    def score(self, hidden: jax.Array, next_tokens: Sequence[int]) -> Scores:
        """Return the scores of the tokens after each position of a chunk; the last ones may be missing."""
        length = hidden.shape[1]
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(next_tokens)] = next_tokens
        return self._compiled["score", length](self._params, hidden, tokens)

    def choose_first(self, row: SlotState, positions: int, last_hidden: jax.Array) -> tuple[SlotState, CallResult]:
        """See `decoding.slots.choose_first_token`."""
        return self._compiled["first", positions](self._params, row, last_hidden)

    def insert(self, state: SlotState, shape: Shape, row: SlotState, positions: int, index: int) -> SlotState:
        """See `decoding.slot_rows.insert_row`."""
        return self._compiled["insert", shape, positions](state, row, np.int32(index))

    def extract(self, state: SlotState, shape: Shape, index: int) -> SlotState:
        """See `decoding.slot_rows.extract_row`."""
        return self._compiled["extract", shape](state, np.int32(index))

    def resize(self, state: SlotState, shape: Shape, other: Shape, rows: np.ndarray, is_used: np.ndarray) -> SlotState:
        """See `decoding.slot_rows.resize_slots`; `other` is a neighbour of `shape` on one ladder."""
        return self._compiled["resize", shape, other](state, rows.astype(np.int32), is_used)

    def load_prefix(self, pool: PrefixPool, row: SlotState, positions: int, blocks: Sequence[int]) -> SlotState:
        """Copy pool blocks to the start of a row."""
        ids = np.zeros(self.num_prefix_blocks(positions), np.int32)
        ids[: len(blocks)] = blocks
        return self._compiled["load", positions](pool, row, ids, np.arange(len(ids)) < len(blocks))

    def store_prefix(self, pool: PrefixPool, row: SlotState, positions: int, blocks: dict[int, int]) -> PrefixPool:
        """Copy the blocks of a row named by `blocks` (place in the row -> pool block) into the pool."""
        ids = np.full(self.num_prefix_blocks(positions), self.ladders.num_blocks, np.int32)
        for place, block in blocks.items():
            ids[place] = block
        return self._compiled["store", positions](pool, row, ids)


@jax.jit
def _take_position(hidden: jax.Array, position: jax.Array) -> jax.Array:
    return constrain(jax.lax.dynamic_index_in_dim(hidden, position, axis=1, keepdims=False), "states")


def _shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
