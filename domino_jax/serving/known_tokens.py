"""Tokens that are known and still have to be run, under one budget a step, so that no running stream stands still long.

They are of two kinds: prompts, and positions that plain rounds left out of a draft's context.
"""

from collections import deque
from collections.abc import Iterable

import jax

from domino_jax.decoding.prefill import CHUNK_LENGTHS, split_into_chunks
from domino_jax.decoding.slots import CallResult
from domino_jax.serving.sequence import PromptRun, ServedSequence, fill_row, read_logprobs
from domino_jax.serving.slot_batch import SlotBatch


class KnownTokens:
    """Runs known tokens through both models.

    Attributes:
        budget: tokens this step may still run; a chunk that begins within it is run whole.
    """

    def __init__(self, batch: SlotBatch, tokens_per_step: int) -> None:
        """Run at most `tokens_per_step`, and the padding of a chunk, between two `begin_step`."""
        self._batch, self._tokens_per_step = batch, tokens_per_step
        self.budget = 0

    def begin_step(self) -> None:
        """Take a new budget."""
        self.budget = self._tokens_per_step

    def run_prompt(self, sequence: ServedSequence) -> tuple[PromptRun, CallResult] | None:
        """Go on with a prompt; return it and its first token once it is done, None where the budget ends before."""
        run = sequence.prompt_run or self._start_prompt(sequence)
        while run.chunks and self.budget > 0:
            self.budget -= run.chunks[0]
            hidden, start = self._run_chunk(sequence, run)
        if run.chunks:
            return None
        offset = len(sequence.tokens) - 1 - start
        run.row, result = self._batch.choose_first(run.row, run.positions, hidden, offset)
        sequence.prompt_run = None
        return run, result

    def _start_prompt(self, sequence: ServedSequence) -> PromptRun:
        prompt, num_cached = sequence.tokens, 0
        row, positions = self._batch.start_row(len(prompt))
        row = fill_row(row, sequence)
        if sequence.request.num_prompt_logprobs is None:
            # The last prompt token is always run: its state chooses the first new token.
            row, num_cached = self._batch.load_prefix(row, positions, prompt[:-1])
        chunks = deque(split_into_chunks(len(prompt) - num_cached))
        sequence.prompt_run = PromptRun(row, positions, num_cached, num_cached, chunks)
        return sequence.prompt_run

    def _run_chunk(self, sequence: ServedSequence, run: PromptRun) -> tuple[jax.Array, int]:
        """Run the next chunk of a prompt; return its last states and where it starts."""
        length, start = run.chunks.popleft(), run.done_len
        run.row, hidden = self._batch.run_chunk(run.row, run.positions, length, start)
        num_top = sequence.request.num_prompt_logprobs
        if num_top is not None:
            following = sequence.tokens[start + 1 : start + 1 + length]
            scores = self._batch.score_chunk(hidden, following)
            run.logprobs += [read_logprobs(scores, 0, i, num_top) for i in range(len(following))]
        run.done_len = min(start + length, len(sequence.tokens))
        return hidden, start

    def catch_up(self, sequences: Iterable[ServedSequence]) -> bool:
        """Fill the drafts' contexts as far as the budget goes, at least by a short chunk whatever prompts have taken.

        Returns whether anything was missing.

        Who lacks least comes first, so that as many as possible can be drafted for soon.
        """
        self.budget = max(self.budget, CHUNK_LENGTHS[0])
        lacking = sorted((s for s in sequences if s.missing), key=lambda s: len(s.missing))
        for sequence in lacking:
            if self.budget <= 0:
                break
            chunks = split_into_chunks(min(len(sequence.missing), self.budget))
            self._batch.rerun(sequence.slot, sequence.missing.start, chunks)
            sequence.missing = sequence.missing[sum(chunks) :]
            self.budget -= sum(chunks)
        return bool(lacking)
