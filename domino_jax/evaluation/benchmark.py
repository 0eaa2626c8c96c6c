"""The same prompts through both loops of one decoder, and the rows that say what came out.

In come a `Decoder`, prompts and two callables for text; out come rows (dictionaries, one a decoded prompt) from which
`metrics.summarise` makes the table. Both loops run in turn on every batch, prefill and decode seconds apart; a run in
which anything was compiled is repeated and its seconds are dropped. Knows no tokenizers, chat templates or file formats
of models.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from domino_jax.config import AcceptanceRule, SamplingConfig
from domino_jax.decoding.generate import Decoder
from domino_jax.evaluation.metrics import Row, decoded_tokens
from domino_jax.evaluation.prompts import Prompt, PromptError
from domino_jax.models.qwen3 import Qwen3
from domino_jax.ops import cpu_kernels
from domino_jax.records import Generation

ROW_FIELDS = {
    "prompt_index": "place among the prompts, the first is 0",
    "turn": "0, or the turn of a chat whose answers are generated one after the other",
    "batch_id": "prompts of one id were decoded together and share its seconds by their tokens",
    "prompt_ids": "the prompt as decoded",
    "output_ids": "new tokens: speculative where there is a drafter, else plain",
    "plain_output_ids": "new tokens of the plain loop",
    "acceptance_lengths": "per round, accepted drafts + 1; null without a drafter",
    "num_draft_tokens": "drafted a round",
    "token_sources": "who wrote each new token",
    "text": "output_ids as text; null without a tokenizer",
    "finish_reason": "stop, length or context",
    "decode_s": "seconds from the first token to the last of the speculative loop; null without a drafter",
    "plain_decode_s": "the same of the plain loop",
    "prefill_s": "seconds to the first token, speculative; null without a drafter",
    "plain_prefill_s": "the same of the plain loop",
    "identical": "whether both loops wrote the same; null where that is not promised (rejection) or not measured",
    "first_difference": "place of the first differing new token; null where there is none",
    "target_margin": "at that place, how far the target's logits of the two tokens are apart (greedy only)",
    "seed": "of this prompt",
    "target": "the target as it was named",
    "draft": "the drafter as it was named; null without one",
    "dtype": "type of activations and caches",
    "target_weights": "type of the target's weights",
    "draft_weights": "type of the drafter's weights; null without one",
    "draft_lm_head": "type of the rows of the LM head that drafts come from; null without a drafter",
    "cpu_kernels": "whether there were kernels for few rows and tokens, see docs/performance.md; false off a CPU",
    "mesh": "devices by axis, data and model; null on one device",
    "rule": "acceptance above temperature 0: seed-exact or rejection",
    "block_size": "slots of a block; 1 is plain decoding",
    "verify_widths": "block sizes each round chose among, plain decoding besides; empty: block_size always",
    "choices": "with them, rounds of the batch by size drafted/width verified, 1/1 for plain; else null",
    "use_head": "whether a head corrected the drafts",
    "num_candidates": "tokens a slot the head corrected; 0: all that could be drafted",
    "draft_vocab_size": "tokens that could be drafted; 0: all",
    "batch_size": "prompts decoded together, at most",
    "repeats": "timed runs of each loop; seconds are their median",
    "stop_ids": "token ids that end a text",
    "max_new_tokens": "token budget",
    "temperature": "0 is greedy",
    "top_k": "0 keeps all",
    "top_p": "1 keeps all",
    "min_p": "0 keeps all",
}
"""Fields of a row and what they hold."""

_MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class BenchmarkSettings:
    """How prompts are decoded and measured.

    Attributes:
        sampling: of the first prompt; prompt i uses seed + i.
        block_size: None: as trained.
        verify_widths: block sizes that each round chooses among; empty: `block_size` always.
        use_head: False drafts from the base logits alone.
        repeats: timed runs of each loop on each batch; the median counts.
        target: what the rows call the target.
        draft: what the rows call the drafter.
    """

    max_new_tokens: int
    sampling: SamplingConfig = SamplingConfig()
    stop_ids: tuple[int, ...] = ()
    rule: AcceptanceRule = "seed-exact"
    block_size: int | None = None
    verify_widths: tuple[int, ...] = ()
    use_head: bool = True
    batch_size: int = 1
    repeats: int = 1
    target: str | None = None
    draft: str | None = None


@dataclass(frozen=True)
class TextCodec:
    """How text becomes token ids and back; None where a model has no tokenizer.

    Attributes:
        encode_text: text to be continued -> ids.
        encode_chat: messages -> ids that end where the assistant begins.
        decode: new ids -> text, special tokens left out.
    """

    encode_text: Callable[[str], list[int]]
    encode_chat: Callable[[list[dict[str, Any]]], list[int]]
    decode: Callable[[Sequence[int]], str]


class _CompileCounter:
    """Counts compilations of this process, so that a timing that holds one can be thrown away."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, event: str, _seconds: float, **_details: object) -> None:
        self.count += event.startswith("/jax/core/compile/")


@cache
def _compile_counter() -> _CompileCounter:
    counter = _CompileCounter()
    jax.monitoring.register_event_duration_secs_listener(counter)
    return counter


@dataclass(frozen=True)
class _Run:
    generations: list[Generation]
    prefill_s: float
    decode_s: float


def measure(
    decoder: Decoder, prompts: Sequence[Prompt], settings: BenchmarkSettings, codec: TextCodec | None
) -> Iterator[Row]:
    """Check all prompts, then return one row a decoded prompt, each when asked for, as batches finish.

    A prompt of several turns gives one row a turn; the answer that goes on is the speculative one.

    Raises:
        PromptError: a prompt of text or messages although there is no tokenizer.
        DecodingError: a prompt that is empty, holds an id outside the vocabulary or fills the context, or
            `verify_widths` that cannot be.
    """
    if settings.verify_widths:
        rule = "greedy" if settings.sampling.temperature == 0 else settings.rule
        batch_size = min(settings.batch_size, len(prompts))
        decoder.check_widths(settings.verify_widths, settings.block_size, rule, batch_size)
    pending = []
    for i, prompt in enumerate(prompts):
        ids = _encode(prompt, codec, i)
        decoder.check_prompt(ids, _name(prompt, i))
        pending.append((i, 0, ids, _first_messages(prompt)))
    return _measure_pending(decoder, prompts, settings, codec, pending)


def _measure_pending(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    settings: BenchmarkSettings,
    codec: TextCodec | None,
    pending: list[tuple[int, int, list[int], list[dict[str, Any]]]],
) -> Iterator[Row]:
    num_batches = 0
    while pending:
        batch, pending = pending[: settings.batch_size], pending[settings.batch_size :]
        rows = _measure_batch(decoder, [(i, ids) for i, _, ids, _ in batch], settings, num_batches)
        num_batches += 1
        following = []
        for (i, turn, _, messages), row in zip(batch, rows, strict=True):
            text = codec.decode(row["output_ids"]) if codec else None
            yield {"prompt_index": i, "turn": turn, **row, "text": text}
            turns = prompts[i].turns or []
            if turn + 1 < len(turns) and codec:
                chat = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": turns[turn + 1]}]
                ids = codec.encode_chat(chat)
                decoder.check_prompt(ids, f"{_name(prompts[i], i)}, turn {turn + 2},")
                following.append((i, turn + 1, ids, chat))
        pending = following + pending


def _name(prompt: Prompt, index: int) -> str:
    return prompt.name or f"prompt {index + 1}"


def _first_messages(prompt: Prompt) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt.turns[0]}] if prompt.turns else []


def _encode(prompt: Prompt, codec: TextCodec | None, index: int) -> list[int]:
    if prompt.prompt_ids is not None:
        return prompt.prompt_ids
    if codec is None:
        raise PromptError(
            f"{_name(prompt, index)} is text but the target has no tokenizer; put one beside its weights or give "
            "prompt_ids"
        )
    if prompt.text is not None:
        return codec.encode_text(prompt.text)
    return codec.encode_chat(prompt.messages or _first_messages(prompt))


def shared_fields(decoder: Decoder, settings: BenchmarkSettings) -> Row:
    """Return what all rows of a run have in common: the settings, as they are resolved for this decoder."""
    draft, sampling = decoder.settings.draft, settings.sampling
    return {
        "target": settings.target,
        "draft": settings.draft,
        "dtype": decoder.settings.dtype,
        **decoder.params.weight_types,
        "cpu_kernels": decoder.layout is None and cpu_kernels.has_kernels_for(decoder.settings.dtype),
        "mesh": dict(decoder.layout.mesh.shape) if decoder.layout else None,
        "rule": settings.rule,
        "block_size": 1 if draft is None else settings.block_size or max(settings.verify_widths or (draft.block_size,)),
        "verify_widths": list(settings.verify_widths),
        "use_head": settings.use_head and draft is not None and draft.has_head,
        "num_candidates": decoder.settings.num_candidates,
        "draft_vocab_size": decoder.settings.draft_vocab_size,
        "batch_size": settings.batch_size,
        "repeats": settings.repeats,
        "stop_ids": list(settings.stop_ids),
        "max_new_tokens": settings.max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
    }


def _measure_batch(
    decoder: Decoder, batch: list[tuple[int, list[int]]], settings: BenchmarkSettings, batch_id: int
) -> list[Row]:
    prompts = [ids for _, ids in batch]
    sampling = [replace(settings.sampling, seed=(settings.sampling.seed + index) % 2**32) for index, _ in batch]
    is_speculative = decoder.settings.draft is not None
    plain_runs: list[_Run] = []
    speculative_runs: list[_Run] = []
    for repeat in range(settings.repeats):
        order = [(plain_runs, True)] + [(speculative_runs, False)] * is_speculative
        # Who goes first alternates, so that neither loop always finds the machine as the other left it.
        for runs, is_plain in order if (batch_id + repeat) % 2 == 0 else order[::-1]:
            runs.append(_run_without_compiling(decoder, prompts, sampling, settings, is_plain))
    choices = {f"{a}/{b}": n for (a, b), n in decoder.last_choices.items()} if settings.verify_widths else None
    rows = []
    for row in range(len(batch)):
        plain = plain_runs[0].generations[row]
        chosen = speculative_runs[0].generations[row] if is_speculative else plain
        rows.append(
            _make_row(chosen, plain, settings, is_speculative)
            | {"batch_id": batch_id, "seed": sampling[row].seed, "choices": choices}
            | _shared_seconds(plain_runs, row, "plain_")
            | (_shared_seconds(speculative_runs, row, "") if is_speculative else {"decode_s": None, "prefill_s": None})
            | _compare(decoder, chosen, plain, settings, is_speculative)
            | shared_fields(decoder, settings)
        )
    return rows


def _run_without_compiling(
    decoder: Decoder,
    prompts: list[list[int]],
    sampling: list[SamplingConfig],
    settings: BenchmarkSettings,
    is_plain: bool,
) -> _Run:
    counter = _compile_counter()
    for _ in range(_MAX_ATTEMPTS):
        before = counter.count
        generations = decoder.generate(
            prompts,
            settings.max_new_tokens,
            sampling,
            settings.stop_ids,
            rule=settings.rule,
            block_size=1 if is_plain else settings.block_size,
            use_head=settings.use_head,
            batch_size=settings.batch_size,
            verify_widths=() if is_plain else settings.verify_widths,
        )
        run = _Run(generations, decoder.last_timings.prefill_s, decoder.last_timings.decode_s)
        if jax.process_count() > 1 or counter.count == before:  # one process alone may not decode once more
            break
    return run


def _shared_seconds(runs: list[_Run], row: int, prefix: str) -> dict[str, float]:
    tokens = [decoded_tokens(g.output_ids) for g in runs[0].generations]
    share = tokens[row] / sum(tokens) if sum(tokens) else 1 / len(tokens)
    return {
        f"{prefix}decode_s": median(run.decode_s for run in runs) * share,
        f"{prefix}prefill_s": median(run.prefill_s for run in runs) / len(tokens),
    }


def _make_row(chosen: Generation, plain: Generation, settings: BenchmarkSettings, is_speculative: bool) -> Row:
    lengths = chosen.stats.acceptance_lengths
    if settings.block_size == 1:
        lengths = [1] * decoded_tokens(chosen.output_ids)  # plain decoding: a round is a token
    return {
        "prompt_ids": chosen.prompt_ids,
        "output_ids": chosen.output_ids,
        "plain_output_ids": plain.output_ids,
        "acceptance_lengths": lengths if is_speculative else None,
        "num_draft_tokens": chosen.stats.num_draft_tokens,
        "token_sources": chosen.token_sources,
        "finish_reason": chosen.finish_reason,
    }


def _compare(
    decoder: Decoder, chosen: Generation, plain: Generation, settings: BenchmarkSettings, is_speculative: bool
) -> Row:
    is_promised = settings.rule == "seed-exact" or settings.sampling.temperature == 0
    place, margin = None, None
    if is_speculative and is_promised and chosen.output_ids != plain.output_ids:
        place = next(
            (i for i, (a, b) in enumerate(zip(chosen.output_ids, plain.output_ids, strict=False)) if a != b),
            min(len(chosen.output_ids), len(plain.output_ids)),
        )
        if settings.sampling.temperature == 0 and place < min(len(chosen.output_ids), len(plain.output_ids)):
            margin = _target_margin(decoder, chosen, plain, place)
    return {
        "identical": chosen.output_ids == plain.output_ids if is_speculative and is_promised else None,
        "first_difference": place,
        "target_margin": margin,
    }


def _target_margin(decoder: Decoder, chosen: Generation, plain: Generation, place: int) -> float:
    target = Qwen3(decoder.settings.target, dtype=jnp.dtype(decoder.settings.dtype))
    variables = {"params": decoder.params.target}
    ids = jnp.asarray([plain.prompt_ids + plain.output_ids[:place]], jnp.int32)
    hidden = target.apply(variables, ids).hidden[0, -1]
    logits = target.apply(variables, hidden, method=Qwen3.logits)
    return float(jnp.abs(logits[plain.output_ids[place]] - logits[chosen.output_ids[place]]))


def format_table(table: dict[str, Any]) -> str:
    """Return the lines that `bench.py` prints for the result of `metrics.summarise`."""

    def number(value: float | None, form: str = ".2f") -> str:
        return "-" if value is None else format(value, form)

    reasons = ", ".join(f"{name} {count}" for name, count in table["finish_reasons"].items())
    lines = [
        ("prompts decoded", f"{table['num_rows']} ({reasons})"),
        ("new tokens", str(table["num_new_tokens"])),
        ("repeated 4-grams", number(table["repeated_ngrams"], ".1%")),
        ("plain loop, tokens/s", number(table["plain_tokens_per_s"], ".1f")),
    ]
    if "tau_prompts" in table:
        speed = table["speed_up"]
        interval = f" [{speed.low:.2f}, {speed.high:.2f}] (95 %)" if speed and speed.low is not None else ""
        same = f"{table['num_identical']} of {table['num_compared']}" if table["num_compared"] else "not promised"
        slots = " ".join(number(slot.share) for slot in table["acceptance_by_slot"]) or "-"
        lines += [
            ("speculative loop, tokens/s", number(table["tokens_per_s"], ".1f")),
            ("speed-up over the plain loop", (number(speed.ratio) if speed else "-") + interval),
            ("tau, mean over prompts", number(table["tau_prompts"])),
            ("tau, mean over rounds", number(table["tau_rounds"])),
            ("acceptance by slot", slots),
            ("identical to plain decoding", same),
        ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
