"""How steady is the cost table of `--verify-widths`? Measure it again and again, and compare ways to read it.

    python benchmarks/width_costs.py --target DIR --draft DIR --calibration survival.json --tables 9 \\
        --output benchmarks/DATE-width/costs.jsonl

A row of the output is one table: seconds of every repeat (last axis) of a plain step and of rounds that draft a size
and verify a width, one row of a batch, greedy. Printed for the medians of the repeats, for their minima and for
`fit_costs`: how far the logarithm of a cost, over the table's mean cost, is apart between tables (standard deviation);
and how far `fit_costs` of all tables together is from what was measured.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from domino_jax.checkpoints.huggingface import load_draft, load_target
from domino_jax.decoding import adaptive_width
from domino_jax.decoding.generate import Decoder
from domino_jax.decoding.survival import load_calibration
from domino_jax.decoding.width_choice import fit_costs
from domino_jax.runs import options


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line, this process's own by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--widths", type=options.positive, nargs="+", default=[4, 6, 8, 12])
    parser.add_argument("--tables", type=options.positive, default=9)
    parser.add_argument("--output", type=Path, required=True, help="JSONL file, which is added to")
    return parser.parse_args(arguments)


def measure_table(decoder: Decoder, widths: list[int]) -> dict[str, Any]:
    """Return what one warm-up measures."""
    found: dict[str, Any] = {}

    def record(seconds: np.ndarray, rounds: list[tuple[int, int]]) -> tuple[float, np.ndarray]:
        found.update(widths=sorted(widths), rounds=rounds, seconds=seconds.tolist())
        return fit_costs(seconds, rounds)

    decoder._width_tables.clear()
    with mock.patch.object(adaptive_width, "fit_costs", record):
        decoder.generate([list(range(5, 45))], 112, verify_widths=widths)
    return found


def by_parts(seconds: np.ndarray, rounds: list[tuple[int, int]]) -> np.ndarray:
    """Return the costs of `fit_costs`, the plain step's first."""
    plain_s, round_s = fit_costs(seconds, rounds)
    return np.array([plain_s, *(round_s[size, width] for size, width in rounds)])


def main() -> None:
    """Measure the tables, add them to the output and print how steady they are."""
    args = parse_arguments()
    target_config, target_params = load_target(args.target, "float32")
    draft = load_draft(args.draft, "float32")
    calibration = load_calibration(args.calibration)
    decoder = Decoder(target_config, target_params, draft.config, draft.params, calibration=calibration)
    tables = [measure_table(decoder, args.widths) for _ in range(args.tables)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("a") as file:
        file.writelines(json.dumps(table) + "\n" for table in tables)
    ways: dict[str, Callable[[np.ndarray, list[tuple[int, int]]], np.ndarray]] = {
        "medians": lambda seconds, _: np.median(seconds, axis=1),
        "minima": lambda seconds, _: seconds.min(axis=1),
        "fit_costs": by_parts,
    }
    for name, read in ways.items():
        costs = np.log([read(np.array(table["seconds"]), table["rounds"]) for table in tables])
        spread = (costs - costs.mean(axis=1, keepdims=True)).std(axis=0)
        print(f"{name:9}: plain step {spread[0]:.3f}, rounds {spread[1:].mean():.3f}")
    together = np.concatenate([table["seconds"] for table in tables], axis=1)
    scale = np.exp(np.log(together).mean(axis=0))
    measured = np.median(together / scale, axis=1) * np.median(scale)
    bias = by_parts(together, tables[0]["rounds"]) / measured - 1
    print(f"fit_costs of all tables over what was measured: {bias.min():+.1%} to {bias.max():+.1%}")


if __name__ == "__main__":
    main()
