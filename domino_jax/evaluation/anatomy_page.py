"""Show what `anatomy` has measured: a table for the terminal, and a figure of a round's parts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from domino_jax.evaluation.anatomy import PHASES, MachineRates

_PARTS = (*PHASES, "loop and host")


def format_anatomy(rates: MachineRates, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of rows of `PhaseCost.to_row`, and under it what each round has outside its verify pass."""
    lines = [
        f"machine: copies {rates.bytes_per_s / 1e9:.1f} GB/s, multiplies {rates.flops_per_s / 1e9:.0f} GFLOP/s",
        f"{'batch':>5} {'context':>7}  {'phase':18} {'ms':>9} {'MB':>9} {'GFLOP':>8} {'bandwidth':>9} {'products':>8}",
    ]
    for row in rows:
        sizes = f"{row['batch']:5} {row['context']:7}  {row['phase']:18} {row['seconds'] * 1e3:9.3f}"
        if row["num_bytes"]:
            sizes += f" {row['num_bytes'] / 1e6:9.2f} {row['num_flops'] / 1e9:8.3f}"
            sizes += f" {row['bandwidth_share']:9.0%} {row['flops_share']:8.0%}"
        lines.append(sizes)
    for cell in _cells(rows):
        plain, verify, whole = cell["plain step"], cell["verify"], cell["round"]
        lines.append(
            f"batch {cell['batch']}, context {cell['context']}: verify takes {verify / plain:.2f} plain steps, a round "
            f"{whole / plain:.2f}; outside verify it takes {whole / verify - 1:.0%} of verify"
        )
    return "\n".join(lines)


def draw_anatomy(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw one bar a batch and context: the phases of a round on one another, beside a plain step; write a PNG."""
    cells = _cells(rows)
    figure = Figure(figsize=(2.5 + 1.1 * len(cells), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(cells))
    plain_ms = [1e3 * cell["plain step"] for cell in cells]
    axes.bar([p - 0.22 for p in places], plain_ms, 0.4, color="#bbbbbb", label="plain step")
    bottom = [0.0] * len(cells)
    for part in _PARTS:
        heights = [1e3 * max(cell.get(part, 0.0), 0.0) for cell in cells]
        axes.bar([p + 0.22 for p in places], heights, 0.4, bottom=bottom, label=part)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set_xticks(list(places), [f"batch {c['batch']}\ncontext {c['context']}" for c in cells])
    axes.set_ylabel("milliseconds")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the seconds of every phase, by batch and context."""
    cells: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        key = (row["batch"], row["context"])
        cells.setdefault(key, {"batch": key[0], "context": key[1]})[row["phase"]] = row["seconds"]
    return list(cells.values())
