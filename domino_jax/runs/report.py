"""The report at the end of a run: what was measured on held-out prompts, in words, tables and plots.

Everything in it is computed from rows that lie beside it (decoded prompts of both loops with their seconds, and the
run's metrics), so that it can be recomputed and checked.
"""

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from domino_jax.checkpoints.huggingface import load_draft
from domino_jax.config import SamplingConfig
from domino_jax.data.stdlib_chats import Chat, check_answer
from domino_jax.decoding.generate import Decoder
from domino_jax.evaluation.benchmark import BenchmarkSettings, measure
from domino_jax.evaluation.metrics import (
    Row,
    acceptance_by_slot,
    committed_lengths,
    decoded_tokens,
    repeated_ngram_share,
    summarise,
    tau_over_prompts,
    tau_over_rounds,
)
from domino_jax.evaluation.prompts import Prompt
from domino_jax.evaluation.row_file import write_rows
from domino_jax.processes import on_first
from domino_jax.run_config import RunConfig
from domino_jax.runs.draft import read_held_out
from domino_jax.runs.embedded import decode_answer, read_corpus_chats
from domino_jax.runs.folder import RunFolder, write_text
from domino_jax.runs.held_out import HeldOutPrompts, decode_held_out, tokens_by_round
from domino_jax.runs.monitor import RunMonitor, read_rows
from domino_jax.runs.pages import plot_metrics, render_samples, render_table
from domino_jax.runs.target_model import TargetModel

_TIMED_PROMPTS, _TIMED_REPEATS = 16, 3
_BATCH = 32
_WIDTHS = (4, 6, 8, 12)
_NUM_SAMPLES = 6
_SAMPLED = SamplingConfig(temperature=0.7, seed=1)


@dataclass(frozen=True)
class ReportNumbers:
    """What a report measured of the best drafter; None stands for what could not be measured.

    Attributes:
        device: kind of the device, and how many there are.
        num_prompts: held-out prompts decoded.
        max_new_tokens: token budget of each of them.
        quality: a row for each way of decoding: identity, exact match, repeated 4-grams, tau.
        tau: greedy, by `head on` and `head off` (absent without a head); each with `prompts` and `rounds`.
        slots: share of the rounds that accept drafted token i, by the same names.
        widths: a row for each block width: tau and speed at batch 1.
        reference_repeats: repeated 4-grams in the right answers.
    """

    device: str
    jax_version: str
    python_version: str
    num_prompts: int
    max_new_tokens: int
    quality: list[dict[str, Any]]
    tau: dict[str, dict[str, float | None]]
    slots: dict[str, list[float | None]]
    widths: list[dict[str, Any]]
    reference_repeats: float | None


@dataclass(frozen=True)
class _Subject:
    """What is reported on."""

    config: RunConfig
    folder: RunFolder
    target: TargetModel
    decoder: Decoder
    held_out: HeldOutPrompts
    chats: list[Chat]
    monitor: RunMonitor

    def measure(self, name: str, prompts: Sequence[list[int]], **settings: Any) -> list[Row]:
        """Decode `prompts` with both loops, keep the rows under `name` and return them."""
        benchmark = BenchmarkSettings(
            self.held_out.max_new_tokens,
            stop_ids=self.held_out.stop_ids,
            target=self.target.path,
            draft=str(self.folder.best_draft),
            **settings,
        )
        rows = measure(self.decoder, [Prompt(prompt_ids=ids) for ids in prompts], benchmark, None)
        return write_rows(self.folder.report / f"rows_{name}.jsonl", self._show(name, rows, len(prompts)))

    def _show(self, name: str, rows: Any, total: int) -> Any:
        with self.monitor.stage(f"report: {name}", total) as progress:
            for row in rows:
                progress.advance(tau=tau_over_prompts([_row_lengths(row)]))
                yield row


def write_report(
    config: RunConfig, folder: RunFolder, target: TargetModel, eval_path: str, monitor: RunMonitor
) -> ReportNumbers | None:
    """Measure the best drafter on held-out prompts and write `report/report.md` with its plots, rows and samples.

    Return the numbers, which lie in `report/numbers.json` too. Without held-out chats the report holds the training
    curves only, and there are none. A report that is there is left alone. Of several processes all decode, and each
    needs a `folder.report` of its own.
    """
    path, numbers_path = folder.report / "report.md", folder.report / "numbers.json"
    if on_first(lambda: path.exists() and (numbers_path.exists() or not eval_path)):
        monitor.say(f"report: {path}")
        read = partial(numbers_path.read_text, encoding="utf-8")
        return ReportNumbers(**json.loads(on_first(read))) if eval_path else None
    limit = config.corpus.num_eval_chats if config.corpus else 4 * config.train.eval_prompts
    held_out = read_held_out(config, eval_path, target, limit, monitor)
    metrics = read_rows(folder.metrics)
    if held_out is None:
        plots = plot_metrics(metrics, {}, folder.report)
        write_text(path, _join([f"# Run {config.name}", "No held-out chats: nothing was decoded.", *_images(plots)]))
        return None
    draft = load_draft(str(folder.best_draft), "float32", target.layout)
    decoder = Decoder(
        target.config, target.weights.by_layer(), draft.config, draft.params, config.target.dtype, target.layout
    )
    chats = read_corpus_chats(folder.eval_chats) if config.corpus else []
    chats = [chats[line_no - 1] for line_no in held_out.line_nos] if chats else []
    subject = _Subject(config, folder, target, decoder, held_out, chats, monitor)
    numbers = _measure_all(subject)
    plots = plot_metrics(metrics, _plotted_slots(numbers), folder.report)
    text = _report_text(config.name, numbers, plots)
    write_text(numbers_path, json.dumps(asdict(numbers), indent=2) + "\n")
    write_text(path, text)
    monitor.say(text)
    monitor.say(f"report: {path}")
    return numbers


def _measure_all(subject: _Subject) -> ReportNumbers:
    """Decode everything that the report tells; rows and coloured samples land in its folder."""
    prompts = subject.held_out.prompt_ids
    greedy = subject.measure("greedy", prompts, batch_size=_BATCH)
    sampled = subject.measure("sampled", prompts, batch_size=_BATCH, sampling=_SAMPLED)
    widths = _time_widths(subject, prompts[:_TIMED_PROMPTS])
    table = summarise(greedy)
    tau = {"head on": {"prompts": table["tau_prompts"], "rounds": table["tau_rounds"]}}
    slots = {"head on": [slot.share for slot in table["acceptance_by_slot"]]}
    if subject.decoder.settings.draft.has_head:
        tau["head off"], slots["head off"] = _decode_head_off(subject)
    write_text(subject.folder.report / "samples.html", render_samples(_samples(subject, greedy)))
    devices = jax.devices()
    return ReportNumbers(
        device=devices[0].device_kind + (f" x {len(devices)}" if len(devices) > 1 else ""),
        jax_version=jax.__version__,
        python_version=platform.python_version(),
        num_prompts=len(prompts),
        max_new_tokens=subject.held_out.max_new_tokens,
        quality=[_quality_row(subject, "greedy", greedy), _quality_row(subject, "T = 0.7", sampled)],
        tau=tau,
        slots=slots,
        widths=widths,
        reference_repeats=_reference_repeats(subject),
    )


def _plotted_slots(numbers: ReportNumbers) -> dict[str, list[float]]:
    return {name: [math.nan if s is None else s for s in shares] for name, shares in numbers.slots.items()}


def _report_text(name: str, numbers: ReportNumbers, plots: Sequence[str]) -> str:
    sections = [
        f"# Run {name}",
        f"Device: {numbers.device}, jax {numbers.jax_version}. {numbers.num_prompts} held-out prompts, at most "
        f"{numbers.max_new_tokens} new tokens each. Rows: `rows_*.jsonl`; numbers: `numbers.json`; settings: "
        "`../config.json`.",
        "## Text and acceptance",
        render_table(numbers.quality),
        *_reference_sentences(numbers),
        _head_sentence(numbers),
        "## Speed at batch 1, greedy",
        render_table(numbers.widths),
        best_width_sentence(numbers.widths),
        "## Plots",
        *_images(plots),
        "Answers coloured by who wrote each token: [samples.html](samples.html)",
    ]
    return _join(sections)


def _quality_row(subject: _Subject, name: str, rows: list[Row]) -> dict[str, Any]:
    table = summarise(rows)
    return {
        "decoding": name,
        "identical to plain": f"{table['num_identical']} of {table['num_compared']}",
        "exact match, plain": _exact_match(subject, rows, "plain_output_ids"),
        "exact match, speculative": _exact_match(subject, rows, "output_ids"),
        "repeated 4-grams": table["repeated_ngrams"],
        "mean new tokens": table["num_new_tokens"] / table["num_rows"],
        "tau (prompts)": table["tau_prompts"],
        "tau (rounds)": table["tau_rounds"],
    }


def _reference_sentences(numbers: ReportNumbers) -> list[str]:
    """Say how much the right answers repeat themselves: text that repeats is easy to draft."""
    if numbers.reference_repeats is None:
        return []
    return [f"Repeated 4-grams in the right answers themselves: {numbers.reference_repeats:.3g}."]


def _reference_repeats(subject: _Subject) -> float | None:
    if not subject.chats:
        return None
    encode = subject.target.tokenizer
    shares = [repeated_ngram_share(encode(chat.messages[-1]["content"])["input_ids"]) for chat in subject.chats]
    return sum(shares) / len(shares)


def _exact_match(subject: _Subject, rows: list[Row], field: str) -> float | None:
    """Return the share of answers a program accepts; None for chats whose answers cannot be checked."""
    if not subject.chats:
        return None
    by_prompt = {row["prompt_index"]: row for row in rows}
    return sum(_is_right(subject, i, by_prompt[i][field]) for i in range(len(subject.chats))) / len(subject.chats)


def _is_right(subject: _Subject, index: int, output_ids: Sequence[int]) -> bool:
    answer = decode_answer(subject.target.tokenizer, output_ids, subject.held_out.stop_ids)
    return check_answer(subject.chats[index], answer)


def _decode_head_off(subject: _Subject) -> tuple[dict[str, float | None], list[float | None]]:
    """Return both means of tau, and acceptance by slot, of greedy decoding from the base logits alone."""
    generations = decode_held_out(subject.decoder, subject.held_out, use_head=False, batch_size=_BATCH)
    slots = acceptance_by_slot(
        [g.stats.acceptance_lengths for g in generations],
        generations[0].stats.num_draft_tokens,
        [subject.held_out.max_new_tokens] * len(generations),
        [decoded_tokens(g.output_ids) for g in generations],
    )
    lengths = tokens_by_round(generations)
    tau = {"prompts": tau_over_prompts(lengths), "rounds": tau_over_rounds(lengths)}
    return tau, [slot.share for slot in slots]


def _head_sentence(numbers: ReportNumbers) -> str:
    if "head off" not in numbers.tau:
        return "The drafter has no head."
    on, off = (numbers.tau[name]["prompts"] for name in ("head on", "head off"))
    if on is None or off is None:
        return "Nothing was decoded past the first token: tau cannot be given."
    return f"tau with the head on is {on:.3f}, off {off:.3f}: {100 * (on / off - 1):+.1f} %."


def _time_widths(subject: _Subject, prompts: list[list[int]]) -> list[dict[str, Any]]:
    trained = subject.decoder.settings.draft.block_size
    results = []
    for width in [w for w in _WIDTHS if w < trained] + [trained]:
        rows = subject.measure(f"width_{width}", prompts, block_size=width, repeats=_TIMED_REPEATS)
        table = summarise(rows)
        speed = table["speed_up"]
        results.append(
            {
                "block width": width,
                "tau (prompts)": table["tau_prompts"],
                "plain tokens/s": table["plain_tokens_per_s"],
                "speculative tokens/s": table["tokens_per_s"],
                "speed-up": speed.ratio if speed else None,
                "95 % low": speed.low if speed else None,
                "95 % high": speed.high if speed else None,
            }
        )
    return results


def best_width_sentence(widths: Sequence[dict[str, Any]]) -> str:
    """Return a sentence that names the fastest block width of a report and its speed-up."""
    measured = [row for row in widths if row["speed-up"] is not None]
    if not measured:
        return "Nothing was decoded past the first token: no speed can be given."
    best = max(measured, key=lambda row: row["speed-up"])
    return (
        f"Best block width here: {best['block width']}, {best['speed-up']:.2f} times the lean plain loop "
        "(decode time a token, prefill left out)."
    )


def _samples(subject: _Subject, rows: list[Row]) -> list[dict[str, Any]]:
    decode = subject.target.tokenizer.decode
    return [
        {
            "prompt": decode(row["prompt_ids"]),
            "tokens": [
                (decode([token]), source) for token, source in zip(row["output_ids"], row["token_sources"], strict=True)
            ],
            "tau": tau_over_prompts([_row_lengths(row)]),
            "is_right": _is_right(subject, row["prompt_index"], row["output_ids"]) if subject.chats else None,
        }
        for row in sorted(rows, key=lambda r: r["prompt_index"])[:_NUM_SAMPLES]
    ]


def _row_lengths(row: Row) -> list[int]:
    return committed_lengths(row["acceptance_lengths"], decoded_tokens(row["output_ids"]))


def _images(names: Sequence[str]) -> list[str]:
    return [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in names]


def _join(sections: Sequence[str]) -> str:
    return "\n\n".join(sections) + "\n"
