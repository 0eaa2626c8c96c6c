"""The host's door to decoding: prompts in, finished generations out.

Pads a batch, sizes its caches, runs prefill and one of the two loops, and turns device arrays into host records.
Knows nothing about text, files or servers.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.config import AcceptanceRule, DraftConfig, SamplingConfig, TargetConfig, find_misfits
from domino_jax.decoding.adaptive_width import FREE, decode_adaptive, measure_costs
from domino_jax.decoding.cache_growth import decode_growing
from domino_jax.decoding.draft_vocabulary import prepare_drafting
from domino_jax.decoding.initial_state import init_last_hidden, init_state, round_up
from domino_jax.decoding.plain import decode_plain
from domino_jax.decoding.prefill import choose_first, prefill_chunk, split_into_chunks
from domino_jax.decoding.speculative import Propose, decode_speculative, propose_block
from domino_jax.decoding.state import DecodeSettings, DecodeState, ModelParams, default_num_candidates
from domino_jax.decoding.survival import SurvivalCalibration, check_calibration
from domino_jax.decoding.width_choice import WidthTable, name_choices
from domino_jax.records import SOURCE_NAMES, Generation, RoundStats
from domino_jax.shapes import Int, Params
from domino_jax.sharding import Layout, activate, check_sizes, fetch

_NO_LIMIT = np.iinfo(np.int32).max


class DecodingError(ValueError):
    """A request that decoding cannot serve; the message names what was wrong and what is allowed."""


@dataclass(frozen=True)
class Timings:
    """Wall-clock seconds of the last batch: `prefill_s` up to the first token, `decode_s` from there to the end."""

    prefill_s: float
    decode_s: float


class Decoder:
    """Generate with a target, with or without a drafter.

    Attributes:
        last_timings: seconds of the last batch; compilation is included the first time a shape is seen.
        layout: as it was given.
        last_choices: with `verify_widths`, rounds of the last batch by what was done: (size drafted, width verified),
            (1, 1) for plain ones.
    """

    def __init__(
        self,
        target_config: TargetConfig,
        target_params: Params,
        draft_config: DraftConfig | None = None,
        draft_params: Params | None = None,
        dtype: str = "float32",
        layout: Layout | None = None,
        num_candidates: int | None = None,
        calibration: SurvivalCalibration | None = None,
        draft_vocabulary: Int[np.ndarray, " U"] | None = None,
    ) -> None:
        """Hold both models; `dtype` names the activation and cache type; weights may be bfloat16 in any case.

        With a layout parameters and caches are split over its mesh, and rows over `data`; the text is the same.
        `num_candidates` tokens a slot are corrected by the head (`DecodeSettings`), 0: the whole vocabulary, None: the
        default for its size. `calibration` says how likely drafts are kept, for `verify_widths`. `draft_vocabulary` has
        the tokens that may be drafted, ascending; None: all.

        Raises:
            DecodingError: the drafter does not fit the target, `num_candidates` is negative, or there is a draft
                vocabulary without a drafter.
            ConfigError: the layout splits what cannot be split.
        """
        misfits = find_misfits(draft_config, target_config) if draft_config else []
        if misfits:
            raise DecodingError("the drafter does not fit the target:\n  " + "\n  ".join(misfits))
        if num_candidates is not None and num_candidates < 0:
            raise DecodingError(f"num_candidates is {num_candidates}; give 0 for the whole vocabulary, or more")
        if draft_vocabulary is not None and draft_config is None:
            raise DecodingError("a draft vocabulary is given but no drafter; name one or leave the vocabulary out")
        draft_vocab_size = 0 if draft_vocabulary is None else len(draft_vocabulary)
        if num_candidates is None:
            num_candidates = default_num_candidates(target_config.vocab_size)
        check_sizes(layout, target_config, draft_config)
        self.settings = DecodeSettings(
            target=target_config,
            draft=draft_config,
            num_candidates=num_candidates,
            draft_vocab_size=draft_vocab_size,
            dtype=dtype,
        )
        params = ModelParams(target_params, draft_params)
        params = layout.place(params) if layout else params
        self.params = prepare_drafting(params, draft_vocabulary, dtype, layout)
        self.layout = layout
        self.calibration = calibration
        self.last_timings = Timings(0.0, 0.0)
        self.last_choices: dict[tuple[int, int], int] = {}
        self._width_tables: dict[tuple[DecodeSettings, tuple[int, ...], Propose], WidthTable] = {}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        sampling: SamplingConfig | Sequence[SamplingConfig] = SamplingConfig(),
        stop_ids: Sequence[int] | Sequence[Sequence[int]] = (),
        rule: AcceptanceRule = "seed-exact",
        block_size: int | None = None,
        use_head: bool = True,
        batch_size: int | None = None,
        propose: Propose = propose_block,
        verify_widths: Sequence[int] = (),
    ) -> list[Generation]:
        """Generate up to `max_new_tokens` for every prompt.

        `max_new_tokens`, `sampling` and `stop_ids` are one for all rows or one a row. `block_size` is 1 (plain
        decoding) up to the trained width, its default; without a drafter decoding is plain. With `batch_size` the
        prompts are run that many at a time, the last batch padded, so that shapes repeat. With `verify_widths` every
        round drafts and verifies what promises most tokens a second of these block sizes and plain decoding; what they
        cost is measured the first time a shape is seen.

        Raises:
            DecodingError: an empty prompt, an id outside the vocabulary, a prompt that fills the context, a
                number of per-row settings that differs from the number of prompts, or `verify_widths` that cannot be.
            ConfigError: a block size is wider than the drafter was trained for.
            CalibrationError: the calibration is not for these widths.
        """
        budgets = _per_row(max_new_tokens, len(prompts), "max_new_tokens", lambda v: isinstance(v, int))
        settings_rows = _per_row(sampling, len(prompts), "sampling", lambda v: isinstance(v, SamplingConfig))
        stops = _per_row(stop_ids, len(prompts), "stop_ids", lambda v: all(isinstance(i, int | np.integer) for i in v))
        self._check_prompts(prompts, budgets)
        if verify_widths:
            is_greedy = all(row.temperature == 0 for row in settings_rows)
            num_rows = min(batch_size or len(prompts), len(prompts))
            self.check_widths(verify_widths, block_size, "greedy" if is_greedy else rule, num_rows)
            block_size = max(verify_widths)
        loop = self._loop_settings(settings_rows, rule, block_size, use_head)
        loop = replace(loop, verify_widths=tuple(sorted(verify_widths)))
        step = batch_size or max(len(prompts), 1)
        results, prefill_s, decode_s = [], 0.0, 0.0
        for i in range(0, len(prompts), step):
            rows = slice(i, i + step)
            with activate(self.layout):
                results += self._run_batch(
                    loop, list(prompts[rows]), budgets[rows], settings_rows[rows], stops[rows], step, propose
                )
            prefill_s += self.last_timings.prefill_s
            decode_s += self.last_timings.decode_s
        self.last_timings = Timings(prefill_s, decode_s)
        return results

    def check_prompt(self, prompt: Sequence[int], name: str) -> None:
        """Refuse a prompt that cannot be decoded; the message calls it `name`.

        Raises:
            DecodingError: it is empty, holds an id outside the vocabulary or fills the context.
        """
        target = self.settings.target
        if len(prompt) == 0:
            raise DecodingError(f"{name} is empty; give at least one token id")
        wrong = [t for t in prompt if not 0 <= t < target.vocab_size]
        if wrong:
            raise DecodingError(
                f"{name} holds token id {wrong[0]}; the vocabulary has ids 0 .. {target.vocab_size - 1}"
            )
        if len(prompt) >= target.max_position_embeddings:
            raise DecodingError(
                f"{name} has {len(prompt)} tokens; the model's context holds {target.max_position_embeddings}, "
                "and a new token needs one of them"
            )

    def _check_prompts(self, prompts: Sequence[Sequence[int]], budgets: list[int]) -> None:
        for i, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True)):
            self.check_prompt(prompt, f"prompt {i}")
            if budget < 1:
                raise DecodingError(f"max_new_tokens of prompt {i} is {budget}; it must be 1 or more")

    def _loop_settings(
        self, rows: list[SamplingConfig], rule: str, block_size: int | None, use_head: bool
    ) -> DecodeSettings:
        if rule not in ("seed-exact", "rejection"):
            raise DecodingError(f"rule is {rule!r}; allowed: 'seed-exact', 'rejection'")
        is_greedy = all(s.temperature == 0 for s in rows)
        has_filters = not is_greedy and any(s.top_k > 0 or s.top_p < 1 or s.min_p > 0 for s in rows)
        draft = self.settings.draft
        width = 1 if draft is None else (draft.block_size if block_size is None else block_size)
        if draft is None and block_size not in (None, 1):
            raise DecodingError(f"block_size is {block_size} but there is no drafter; load one or use 1")
        if draft is not None and draft.num_draft_tokens(width) == 0:
            draft = None
        return replace(
            self.settings,
            draft=draft,
            block_size=width,
            rule="greedy" if is_greedy else rule,
            has_filters=has_filters,
            use_head=use_head,
        )

    def check_widths(self, widths: Sequence[int], block_size: int | None, rule: str, batch_size: int) -> None:
        """Refuse `verify_widths` that batches of that size cannot be decoded with, with the errors of `generate`."""
        draft = self.settings.draft
        if draft is None:
            raise DecodingError(f"verify_widths are {list(widths)} but there is no drafter; load one or leave them out")
        if self.layout:
            raise DecodingError("verify_widths need a single device; leave them or the mesh out")
        if min(widths) < 2 or len(set(widths)) < len(widths):
            raise DecodingError(f"verify_widths are {list(widths)}; give different block sizes from 2 on")
        if block_size not in (None, max(widths)):
            raise DecodingError(
                f"block_size is {block_size} but the largest of verify_widths is {max(widths)}; leave one of them out"
            )
        if self.calibration is None:
            raise DecodingError(
                "verify_widths need a survival calibration: make one with scripts/calibrate_survival.py"
            )
        check_calibration(self.calibration, draft, widths, self.settings.draft_vocab_size)
        if rule == "rejection" and batch_size > 1:
            raise DecodingError(  # rows share a width, which would tell one about another's discarded noise
                f"verify_widths under the rejection rule need batches of one row, these have {batch_size}; set it to 1"
            )

    def start_batch(
        self,
        loop: DecodeSettings,
        prompts: list[Sequence[int]],
        budgets: list[int],
        sampling: list[SamplingConfig],
        stops: list[Sequence[int]],
        num_rows: int,
        may_grow: bool = False,
    ) -> tuple[ModelParams, DecodeState]:
        """Return what a loop runs with after prefill: rows up to `num_rows` are padding, and done.

        Where caches `may_grow` they are short at first, and the loop has to be run as `decode_growing` does.
        """
        num_real = len(prompts)
        if self.layout:
            num_rows = round_up(num_rows, self.layout.num_data)
        padding = num_rows - num_real
        state = init_state(
            loop,
            prompts + [[0]] * padding,
            budgets + [0] * padding,
            sampling + [SamplingConfig()] * padding,
            stops + [()] * padding,
            self.layout,
            may_grow,
        )
        params = self.params if loop.draft else ModelParams(self.params.target)
        # Chunks do not depend on how blocks are drafted or tokens chosen: one program serves all such settings.
        chunks = replace(loop, block_size=1, rule="greedy", has_filters=False, use_head=True, verify_widths=())
        last_hidden = init_last_hidden(loop, num_rows, self.layout)
        start = 0
        for chunk_len in split_into_chunks(max(len(p) for p in prompts)):
            state, last_hidden = prefill_chunk(
                chunks, params, state, chunk_len, jnp.asarray(start, jnp.int32), last_hidden
            )
            start += chunk_len
        first = replace(loop, block_size=1, use_head=True, verify_widths=())
        return params, jax.block_until_ready(choose_first(first, params, state, last_hidden))

    def _run_batch(
        self,
        loop: DecodeSettings,
        prompts: list[Sequence[int]],
        budgets: list[int],
        sampling: list[SamplingConfig],
        stops: list[Sequence[int]],
        num_rows: int,
        propose: Propose,
    ) -> list[Generation]:
        began = time.perf_counter()
        # What rounds of chosen width cost is measured for caches of one length.
        may_grow = not loop.verify_widths
        params, state = self.start_batch(loop, prompts, budgets, sampling, stops, num_rows, may_grow)
        prefill_s = time.perf_counter() - began
        table = self._find_table(loop, params, state, propose) if loop.verify_widths else None
        first_token_at = time.perf_counter()
        if table is not None:
            state, progress = decode_adaptive(loop, params, state, table, FREE, np.int32(_NO_LIMIT), propose)
        elif loop.draft:
            state = decode_growing(lambda state: decode_speculative(loop, params, state, propose), state)
        else:
            state = decode_growing(lambda state: decode_plain(loop, params, state), state)
        state = jax.block_until_ready(state)
        self.last_timings = Timings(prefill_s, time.perf_counter() - first_token_at)
        if table is not None:
            self.last_choices = name_choices(loop, progress)
        return _to_generations(loop, state, prompts, budgets)

    def _find_table(
        self, loop: DecodeSettings, params: ModelParams, state: DecodeState, propose: Propose
    ) -> WidthTable:
        key = (loop, state.tokens.shape, propose)
        if key not in self._width_tables:
            self._width_tables[key] = measure_costs(loop, params, state, self.calibration, propose)
        return self._width_tables[key]


def _per_row(value: object, num_rows: int, name: str, is_single: object) -> list:
    if not isinstance(value, list | tuple) or is_single(value):
        return [value] * num_rows
    if len(value) != num_rows:
        raise DecodingError(f"{name} has {len(value)} entries for {num_rows} prompts; give one, or one for each")
    return list(value)


def _to_generations(
    loop: DecodeSettings, state: DecodeState, prompts: list[Sequence[int]], budgets: list[int]
) -> list[Generation]:
    tokens, sources, committed_len, has_stopped, lengths, num_rounds = fetch(
        (
            state.tokens,
            state.sources,
            state.committed_len,
            state.has_stopped,
            state.acceptance_lengths,
            state.num_rounds,
        )
    )
    generations = []
    for row, prompt in enumerate(prompts):
        new = slice(len(prompt), int(committed_len[row]))
        reason = "stop" if has_stopped[row] else "length"
        if reason == "length" and new.stop - new.start < budgets[row]:
            reason = "context"
        plain_rounds = [1] * (new.stop - new.start - 1)
        rounds = lengths[row, : num_rounds[row]].tolist() if loop.draft else plain_rounds
        generations.append(
            Generation(
                prompt_ids=[int(t) for t in prompt],
                output_ids=tokens[row, new].tolist(),
                token_sources=[SOURCE_NAMES[s] for s in sources[row, new]],
                finish_reason=reason,
                stats=RoundStats(rounds, loop.num_draft_tokens),
            )
        )
    return generations
