"""Render a report: plots of the metric rows, Markdown tables, and sample answers coloured by who wrote each token.

In: plain rows. Out: PNG, Markdown and one self-contained HTML page. Text of a model is escaped, never markup.
"""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLOURS = {"target": "#e8e8e8", "drafted": "#bfe3b4", "corrected": "#f6c9a8", "bonus": "#b9d4f5"}
_LEGEND = {
    "target": "the target alone, in the prefill",
    "drafted": "drafted and accepted",
    "corrected": "the target's correction of a refused draft",
    "bonus": "the target's bonus after a wholly accepted block",
}

_TOKEN_STYLE = "color:#111;border-right:1px solid #fff;border-radius:3px;padding:0 1px"
_STYLE = """
body{font:16px/1.5 system-ui;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#111;background:#fff}
pre{white-space:pre-wrap;background:#fafafa;padding:.6rem;border:1px solid #ddd}
"""


def plot_metrics(rows: Sequence[Mapping[str, Any]], slots: Mapping[str, Sequence[float]], directory: Path) -> list[str]:
    """Draw losses with the base weight, tau over steps and acceptance by slot; return the names of the files.

    `slots` holds acceptance shares by slot for each line of the last plot. A plot without rows is left out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    training = [row for row in rows if row["stage"] == "draft"]
    decoded = [row for row in rows if row["stage"] == "held_out"]
    names = []
    if training:
        names.append(_plot_losses(training, directory / "losses.png"))
    if decoded:
        names.append(_plot_tau(decoded, directory / "tau.png"))
    if any(slots.values()):
        names.append(_plot_slots(slots, directory / "acceptance_by_slot.png"))
    return names


def _plot_losses(rows: Sequence[Mapping[str, Any]], path: Path) -> str:
    figure, axes = _figure("optimizer step", "cross-entropy (nats)")
    steps = [row["step"] for row in rows]
    for name, label in (("corrected_loss", "corrected logits"), ("base_loss", "base logits")):
        if name in rows[0]:
            axes.plot(steps, [row[name] for row in rows], label=label)
    weight = axes.twinx()
    weight.plot(steps, [row["base_weight"] for row in rows], "k--", linewidth=1, label="base weight (lambda)")
    weight.set_ylabel("base weight")
    weight.set_ylim(0, 1.05)
    handles = [*axes.get_lines(), *weight.get_lines()]
    axes.legend(handles, [str(line.get_label()) for line in handles])
    return _save(figure, path)


def _plot_tau(rows: Sequence[Mapping[str, Any]], path: Path) -> str:
    figure, axes = _figure("optimizer step", "tau (tokens a round, mean over prompts)")
    steps = [row["step"] for row in rows]
    for name, label in (("tau", "head on"), ("tau_head_off", "head off")):
        if name in rows[0]:
            axes.plot(steps, [row[name] for row in rows], marker="o", label=label)
    axes.legend()
    return _save(figure, path)


def _plot_slots(slots: Mapping[str, Sequence[float]], path: Path) -> str:
    figure, axes = _figure("drafted token", "share of rounds that accept it")
    for label, shares in slots.items():
        axes.plot(range(1, len(shares) + 1), shares, marker="o", label=label)
    axes.set_ylim(0, 1.02)
    axes.legend()
    return _save(figure, path)


def _figure(x_label: str, y_label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, path: Path) -> str:
    figure.savefig(path, dpi=110)
    return path.name


def render_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of rows with the same keys; numbers are rounded, None is a dash."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def colour_tokens(tokens: Sequence[tuple[str, str]]) -> str:
    """Return new tokens, given as (text, who wrote it), as one coloured line of HTML; line breaks need a `<pre>`."""
    return "".join(
        f'<span style="background:{_COLOURS[source]};{_TOKEN_STYLE}" title="{source}">{html.escape(text)}</span>'
        for text, source in tokens
    )


def colour_legend() -> str:
    """Return what the colours of `colour_tokens` mean, as HTML."""
    return " ".join(
        f'<span style="background:{_COLOURS[name]};{_TOKEN_STYLE}">{html.escape(_LEGEND[name])}</span>'
        for name in _COLOURS
    )


def render_samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return a page of answers; a sample has `prompt`, `tokens` (text, source), `tau` and `is_right`."""
    parts = [
        "<!doctype html><meta charset='utf-8'><meta name='viewport' content='width=device-width'>",
        "<title>Who wrote each token</title>",
        f"<style>{_STYLE}</style>",
        f"<h1>Who wrote each token</h1><p>{colour_legend()}</p>",
    ]
    for sample in samples:
        tokens = colour_tokens(sample["tokens"])
        tau = "no round" if sample["tau"] is None else f"{sample['tau']:.2f} tokens a round"
        verdict = {True: "right", False: "wrong", None: "not checked"}[sample["is_right"]]
        parts.append(f"<pre>{html.escape(sample['prompt'])}</pre><pre>{tokens}</pre><p>answer {verdict}; {tau}</p>")
    return "\n".join(parts) + "\n"
