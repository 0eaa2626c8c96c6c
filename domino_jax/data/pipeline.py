"""Grain pipeline: a JSONL of chats to shuffled, padded batches with a position that can be saved.

In: the file, a tokenizer, `DataConfig`. One pass checks every row (it is rendered, truncated and thrown away) and
keeps only offsets; training reads rows by offset and tokenises them when they are needed. Out: an iterator of
`records.TrainBatch`. Rows are shuffled anew every epoch, batches run on over the ends of epochs, and only what is
left after the last epoch is dropped. Batches have one width or, of rows of similar length, a few (`bucket_plan`).
They are made on the calling thread. Knows nothing about models or devices.

Source: an anchor needs two neighbouring supervised tokens (METHOD: training example).
"""

import hashlib
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from transformers import PreTrainedTokenizerBase

from domino_jax.data.bucket_plan import BucketPlan, PlannedBatch
from domino_jax.data.chat_template import ChatTemplateError, render_chat
from domino_jax.data.responses import RawRow, ResponsesError, RowError, RowReport, parse_row, scan_rows
from domino_jax.records import ChatRow, TrainBatch
from domino_jax.run_config import DataConfig


@dataclass
class RowIndex:
    """Where the usable rows of a file are, and what they add up to.

    Attributes:
        offsets: first byte of each usable row.
        sizes: bytes of each usable row.
        line_nos: 1-based line of each usable row.
        lengths: tokens of each usable row after truncation.
        report: counts of usable and bad rows.
        num_tokens: tokens of all usable rows after truncation.
        num_learned_tokens: those of them with a loss mask of 1.
        num_truncated: usable rows that lost tokens to `max_length`.
        fingerprint: hash of the bytes of the usable rows.
        token_fingerprint: hash of their token ids and loss masks.
    """

    report: RowReport
    offsets: array = field(default_factory=lambda: array("Q"))
    sizes: array = field(default_factory=lambda: array("Q"))
    line_nos: array = field(default_factory=lambda: array("Q"))
    lengths: array = field(default_factory=lambda: array("I"))
    num_tokens: int = 0
    num_learned_tokens: int = 0
    num_truncated: int = 0
    fingerprint: str = ""
    token_fingerprint: str = ""


@runtime_checkable
class RowSource(Protocol):
    """Usable rows by number; what `build_dataset` shuffles and batches."""

    index: RowIndex

    def __len__(self) -> int:
        """Return the number of usable rows."""
        ...

    def read(self, rows: Sequence[int]) -> list[ChatRow]:
        """Return the rows of a batch that this process holds; of several processes each calls it for every batch."""
        ...


class ChatSource:
    """Random access to the usable rows of a file: `source[i]` is a `ChatRow` truncated to `max_length`.

    Raises:
        ResponsesError: the file cannot be read, too many rows are bad, or none can be used.
    """

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        vocab_size: int,
        bad_rows_log: Path | None = None,
    ) -> None:
        """Check every row of `path` and keep the offsets of those that can be used."""
        self._path, self._tokenizer, self._config, self._vocab_size = path, tokenizer, config, vocab_size
        self.index = self._check_rows(RowReport(path, config.bad_rows, config.max_bad_rows, bad_rows_log))

    def __len__(self) -> int:
        """Return the number of usable rows."""
        return len(self.index.offsets)

    def __getitem__(self, row: int) -> ChatRow:
        """Read and tokenise one row.

        Raises:
            RowError: the file has changed since it was checked.
        """
        line_no = int(self.index.line_nos[row])
        try:
            with open(self._path, "rb") as file:
                file.seek(self.index.offsets[row])
                content = file.read(self.index.sizes[row])
        except OSError as error:
            raise ResponsesError(f"{self._path} cannot be read any more: {error.strerror}") from error
        ids, loss_mask, _ = self._tokenise(RawRow(line_no, 0, content))
        return ChatRow(ids, loss_mask, line_no)

    def read(self, rows: Sequence[int]) -> list[ChatRow]:
        """Read and tokenise some rows.

        Raises:
            RowError: as for one row.
        """
        return [self[row] for row in rows]

    def _check_rows(self, report: RowReport) -> RowIndex:
        index = RowIndex(report)
        digest, token_digest = hashlib.sha256(), hashlib.sha256()
        for row in scan_rows(self._path):
            try:
                ids, loss_mask, num_all = self._tokenise(row)
            except RowError as error:
                report.add_bad(error)
                continue
            report.num_good += 1
            index.offsets.append(row.offset)
            index.sizes.append(len(row.content))
            index.line_nos.append(row.line_no)
            index.lengths.append(len(ids))
            index.num_tokens += len(ids)
            index.num_learned_tokens += sum(loss_mask)
            index.num_truncated += num_all > len(ids)
            digest.update(row.content)
            token_digest.update(np.array([ids, loss_mask], "<i4").tobytes())
        report.require_good()
        index.fingerprint, index.token_fingerprint = digest.hexdigest()[:16], token_digest.hexdigest()[:16]
        return index

    def _tokenise(self, row: RawRow) -> tuple[list[int], list[int], int]:
        messages = parse_row(row.content, self._path, row.line_no)
        try:
            ids, loss_mask = render_chat(self._tokenizer, messages, self._config.enable_thinking)
        except ChatTemplateError as error:
            raise RowError(self._path, row.line_no, "chat template failed", str(error)) from error
        num_all, max_length = len(ids), self._config.max_length
        ids, loss_mask = ids[:max_length], loss_mask[:max_length]
        if max(ids, default=0) >= self._vocab_size:
            raise RowError(
                self._path,
                row.line_no,
                "id out of range",
                f"{max(ids)} with a vocabulary of {self._vocab_size}; does the tokenizer belong to the target?",
            )
        if not any(a and b for a, b in pairwise(loss_mask)):
            raise RowError(
                self._path,
                row.line_no,
                "no assistant token left" if not any(loss_mask) else "only single assistant tokens left",
                f"{num_all} tokens cut to max_length {max_length}; an anchor needs two neighbours",
            )
        return ids, loss_mask, num_all


class BatchIterator(Iterator[TrainBatch]):
    """Batches in a fixed order, with a position that is saved and restored as JSON-ready values.

    Attributes:
        num_batches: batches of the whole stream; None when it does not end.
        layout: what widths the batches have, and what is left out, for people.
    """

    def __init__(
        self, dataset: grain.MapDataset, num_batches: int | None, path: str, layout: str, identity: dict[str, Any]
    ) -> None:
        """Start at the first batch of `dataset`; `identity` names the stream of `path` a saved position belongs to."""
        # No reading threads: tokenising a batch takes milliseconds and runs beside the device's asynchronous step.
        self._iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
        self._path, self._identity = path, identity
        self.num_batches = num_batches
        self.layout = layout

    def __next__(self) -> TrainBatch:
        """Return the next batch."""
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Return the position and the identity of the stream, ready for JSON."""
        return {"grain": self._iterator.get_state(), **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            ResponsesError: the position belongs to another file, seed, batch size, length or widths.
        """
        changed = [
            f"{'hash of the usable rows' if name == 'rows' else name} was {state.get(name)!r} and is {value!r}"
            for name, value in self._identity.items()
            if state.get(name) != value
        ]
        if changed or "grain" not in state:
            raise ResponsesError(
                f"the saved data position belongs to another stream than {self._path}: "
                f"{'; '.join(changed) or 'no position in it'}; resume with the same data and settings (put the file "
                "back as it was if it was edited), or start a new run"
            )
        self._iterator.set_state(dict(state["grain"]))


def build_dataset(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    vocab_size: int,
    seed: int,
    num_epochs: int | float | None = None,
    bad_rows_log: Path | None = None,
    source: RowSource | None = None,
    places: Sequence[int] | None = None,
) -> tuple[BatchIterator, RowIndex, int]:
    """Check `path` and return its batches, what the check found, and the number of usable rows.

    Bad rows that are skipped are written to `bad_rows_log`, one JSON object a line; the log of an earlier check goes.
    `source` has the rows of `path` where they are checked already; the order of the batches is the same.
    `num_epochs` may be a fraction; None never ends. With fewer rows than a batch a batch holds a row more than once,
    from successive epochs. With `places` only the rows at these places of every batch are read, for a process that
    holds no others; the batches are the same however many processes share them, and so is a saved position.

    Raises:
        ResponsesError: no row can be used, too many are bad, or all epochs together do not fill one batch.
        RowError: a bad row while `config.bad_rows` is `fail`.
        ValueError: an argument is out of range.
    """
    _check_arguments(config, seed, num_epochs, places)
    if source is None:
        source = ChatSource(path, tokenizer, config, vocab_size, bad_rows_log)
    num_rows = len(source)
    num_batches, num_left = None, 0
    if num_epochs is not None:
        num_batches, num_left = divmod(round(num_epochs * num_rows), config.batch_size)
        if num_batches == 0:
            raise ResponsesError(
                f"{path}: {num_rows} usable rows x {num_epochs} epochs do not fill one batch of {config.batch_size}; "
                "lower data.batch_size, give more rows or more epochs"
            )
    plan: Sequence[PlannedBatch]
    if config.bucket_widths:
        plan = BucketPlan(
            source.index.lengths, (*config.bucket_widths, config.max_length), config.batch_size, seed, num_epochs
        )
        widths, counts = plan.widths, plan.num_rows_by_width
    else:
        plan = _OneWidthPlan(num_rows, config.max_length, config.batch_size, seed, num_batches)
        widths, counts = (config.max_length,), (num_rows,)
    batches = grain.MapDataset.source(plan).map(lambda batch: _read_batch(source, batch, places))
    identity = {
        "rows": source.index.fingerprint,
        "seed": seed,
        "batch_size": config.batch_size,
        "max_length": config.max_length,
        "bucket_widths": list(config.bucket_widths),
    }
    layout = _describe_layout(source.index, widths, counts, num_left)
    return BatchIterator(batches, num_batches, path, layout, identity), source.index, num_rows


class _OneWidthPlan(Sequence[PlannedBatch]):
    """The batches of a training run whose rows are all padded to one width; `plan[n]` is batch n."""

    def __init__(self, num_rows: int, width: int, batch_size: int, seed: int, num_batches: int | None) -> None:
        self._rows = grain.MapDataset.range(num_rows).shuffle(seed).repeat()
        self._width, self._batch_size = width, batch_size
        self._num_batches = sys.maxsize // batch_size if num_batches is None else num_batches

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, number: int) -> PlannedBatch:
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        first = number * self._batch_size
        return PlannedBatch(self._width, np.array([self._rows[first + i] for i in range(self._batch_size)]))


def _read_batch(source: RowSource, batch: PlannedBatch, places: Sequence[int] | None) -> TrainBatch:
    if places is None:
        return pad_batch(source.read(batch.rows.tolist()), batch.width)
    part = pad_batch(source.read(batch.rows[list(places)].tolist()), batch.width)
    rows, index = batch.rows.tolist(), source.index
    line_nos = np.array([index.line_nos[row] for row in rows], np.int64)
    return replace(part, line_nos=line_nos, num_tokens=sum(index.lengths[row] for row in rows))


def _describe_layout(index: RowIndex, widths: Sequence[int], counts: Sequence[int], num_left: int) -> str:
    parts = ", ".join(f"{count} of up to {width}" for width, count in zip(widths, counts, strict=True))
    num_padded = sum(width * count for width, count in zip(widths, counts, strict=True))
    left = f"; {num_left} rows left after the last epoch fill no batch" if num_left else ""
    return f"rows by padded length: {parts} tokens ({1 - index.num_tokens / num_padded:.0%} padding){left}"


def _check_arguments(
    config: DataConfig, seed: int, num_epochs: int | float | None, places: Sequence[int] | None
) -> None:
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; it must lie in 0 .. 2**32 - 1")
    if num_epochs is not None and num_epochs <= 0:
        raise ValueError(f"num_epochs is {num_epochs}; it must be positive, or None for a stream without end")
    if places is not None and not (places and all(0 <= place < config.batch_size for place in places)):
        raise ValueError(f"places are {places}; they must lie in 0 .. {config.batch_size - 1}, one at least")


def pad_batch(rows: Sequence[ChatRow], width: int) -> TrainBatch:
    """Return rows of at most `width` tokens as one batch, padded on the right with 0."""
    return TrainBatch(
        input_ids=_pad([row.ids for row in rows], width, np.dtype(np.int32)),
        loss_mask=_pad([row.loss_mask for row in rows], width, np.dtype(np.float32)),
        lengths=np.array([len(row.ids) for row in rows], np.int32),
        line_nos=np.array([row.line_no for row in rows], np.int64),
        num_tokens=sum(len(row.ids) for row in rows),
        features=_pad_arrays([row.features for row in rows], width),
        last_hidden=_pad_arrays([row.last_hidden for row in rows], width),
    )


def _pad_arrays(values: Sequence[np.ndarray | None], width: int) -> np.ndarray | None:
    if any(value is None for value in values):
        return None
    return _pad(values, width, values[0].dtype)


def _pad(values: Sequence[Any], width: int, dtype: np.dtype) -> np.ndarray:
    padded = np.zeros((len(values), width, *np.shape(values[0])[1:]), dtype)
    for i, value in enumerate(values):
        padded[i, : len(value)] = value
    return padded
