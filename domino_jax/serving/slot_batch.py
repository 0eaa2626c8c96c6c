"""The device state of an engine: slots in a batch of fitting shape, and the pool of prefix blocks.

Every method is one or a few calls of compiled programs; who runs and what is told is decided above.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import jax
import numpy as np

from domino_jax.decoding.slots import CallResult, SlotState
from domino_jax.ops.scoring import Scores
from domino_jax.serving.prefix_cache import PrefixCache
from domino_jax.serving.programs import Programs, Shape


class SlotBatch:
    """Slots and prefix blocks.

    Attributes:
        shape: rows and positions of the batch as it is.
        prefixes: which block holds which tokens.
        device_s: seconds spent in device calls so far, from dispatch until the results were on the host.
    """

    def __init__(self, programs: Programs) -> None:
        """Plan an empty batch of the smallest shape; `allocate` makes it."""
        ladders = programs.ladders
        self.shape = Shape(ladders.rows[0], ladders.positions[0])
        self.prefixes = PrefixCache(ladders.num_blocks, ladders.block_len)
        self.device_s = 0.0
        self._programs, self._ladders = programs, ladders
        self._cancelled: set[int] = set()

    def allocate(self) -> None:
        """Make the arrays."""
        self._slots = self._programs.init_slots(self.shape)
        self._pool = self._programs.init_pool() if self._ladders.num_blocks else None
        jax.block_until_ready((self._slots, self._pool))

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.device_s += time.perf_counter() - began

    # Prompts

    def start_row(self, num_tokens: int) -> tuple[SlotState, int]:
        """Return a free row for a prompt of `num_tokens`, and its positions."""
        positions = self._ladders.positions_for(num_tokens + self._ladders.margin)
        with self._on_device():
            return self._programs.init_slots(Shape(1, positions)), positions

    def load_prefix(self, row: SlotState, positions: int, tokens: Sequence[int]) -> tuple[SlotState, int]:
        """Return `row` with what is known of a prefix of `tokens`, and that prefix' length."""
        blocks = self.prefixes.match(tokens) if self._pool is not None else []
        if blocks:
            with self._on_device():
                row = self._programs.load_prefix(self._pool, row, positions, blocks)
        return row, len(blocks) * self._ladders.block_len

    def run_chunk(self, row: SlotState, positions: int, length: int, start: int) -> tuple[SlotState, jax.Array]:
        """Run a chunk of a row's prompt; return the row and the chunk's last states."""
        with self._on_device():
            return self._programs.prefill(row, positions, length, start)

    def score_chunk(self, hidden: jax.Array, following: Sequence[int]) -> Scores:
        """Return the scores of the tokens after each position of a chunk."""
        with self._on_device():
            return jax.device_get(self._programs.score(hidden, following))

    def choose_first(
        self, row: SlotState, positions: int, hidden: jax.Array, offset: int
    ) -> tuple[SlotState, CallResult]:
        """Commit the token after a prompt that ends at position `offset` of a chunk."""
        with self._on_device():
            last_hidden = self._programs.take_position(hidden, offset)
            row, result = self._programs.choose_first(row, positions, last_hidden)
            return row, jax.device_get(result)

    def store_prefix(self, row: SlotState, positions: int, tokens: Sequence[int]) -> None:
        """Keep the whole blocks of `tokens`, which a row has computed."""
        if self._pool is not None and (to_fill := self.prefixes.insert(tokens)):
            with self._on_device():
                self._pool = self._programs.store_prefix(self._pool, row, positions, to_fill)

    # Slots

    def insert(self, row: SlotState, positions: int, slot: int) -> None:
        """Put a row into a slot; the batch grows where it must."""
        rows = max(self.shape.rows, self._ladders.rows_for(slot + 1))
        self._reshape(Shape(rows, max(self.shape.positions, positions)))
        with self._on_device():
            self._slots = self._programs.insert(self._slots, self.shape, row, positions, slot)
        self._cancelled.discard(slot)

    def cancel(self, slot: int) -> None:
        """Let a slot take no part in later rounds."""
        self._cancelled.add(slot)

    def store_slot(self, slot: int, tokens: Sequence[int]) -> None:
        """Keep the whole blocks of `tokens`, which a slot has computed."""
        if self._pool is not None and (to_fill := self.prefixes.insert(tokens)):
            with self._on_device():
                row = self._programs.extract(self._slots, self.shape, slot)
                self._pool = self._programs.store_prefix(self._pool, row, self.shape.positions, to_fill)

    def rerun(self, slot: int, start: int, chunks: Sequence[int]) -> None:
        """Run a slot's tokens from position `start` on again, in chunks, so that the draft's context holds them."""
        positions = self.shape.positions
        with self._on_device():
            row = self._programs.extract(self._slots, self.shape, slot)
            for length in chunks:
                row, _ = self._programs.prefill(row, positions, length, start)
                start += length
            self._slots = self._programs.insert(self._slots, self.shape, row, positions, slot)

    def run(
        self, block_size: int, drafted: Iterable[int], num_rounds: int, ends_early: bool, wants_scores: bool
    ) -> tuple[CallResult, float]:
        """Run up to `num_rounds` rounds that draft for some slots.

        Returns what they did, on the host, and the seconds they took.
        """
        is_cancelled = np.isin(np.arange(self.shape.rows), list(self._cancelled))
        is_drafted = np.isin(np.arange(self.shape.rows), list(drafted))
        self._cancelled.clear()
        before_s = self.device_s
        with self._on_device():
            self._slots, result = self._programs.run(
                self._slots, self.shape, block_size, is_cancelled, is_drafted, num_rounds, ends_early
            )
            result = jax.device_get(result if wants_scores else result.replace(scores=None))
        return result, self.device_s - before_s

    def shrink(self, shape: Shape, moved: dict[int, int], used: set[int]) -> None:
        """Cut the batch to `shape`, after moving slots as `moved` says (old -> new); only those `used` go on."""
        order = np.arange(self.shape.rows)
        for old, new in moved.items():
            order[new] = old
        self._cancelled.clear()
        self._reshape(shape, order, used)

    def hold_positions(self, num_tokens: int) -> None:
        """Lengthen the caches so that a sequence of `num_tokens` fits."""
        needed = self._ladders.positions_for(num_tokens + self._ladders.margin)
        if needed > self.shape.positions:
            self._reshape(Shape(self.shape.rows, needed))

    def _reshape(self, shape: Shape, order: np.ndarray | None = None, used: set[int] | None = None) -> None:
        """Bring the slots to a shape; `order` names the row that each of the new ones takes over."""
        for step in self._ladders.steps_between(self.shape, shape):
            rows = np.arange(step.rows) if order is None else order[: step.rows]
            is_used = rows < self.shape.rows if used is None else np.isin(np.arange(step.rows), list(used))
            rows = np.minimum(rows, self.shape.rows - 1)
            with self._on_device():
                self._slots = self._programs.resize(self._slots, self.shape, step, rows, is_used)
            self.shape, order = step, None
