"""Ablations on the embedded pair: variants of one drafter at equal steps and data, several seeds each.

In: the folder of a finished run of the embedded default (its target, its responses, its held-out chats). Out: a row a
trained drafter (`rows.jsonl`, appended, so that an interrupted run goes on), a table and a plot computed from the rows.
A drafter is trained by the same step as in a run, on a feature cache below the run's folder, and judged by really
decoding the held-out prompts. The baseline is the run's configuration with the published objective. Seeds are paired:
data order, anchors and fresh weights of a seed are the same for every variant.

Source: Domino, arXiv 2605.29707 (tau 3.62 without a head, 3.96 with one, 4.19 with the curriculum, at equal steps).
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from domino_jax.checkpoints.fingerprint import fingerprint_target
from domino_jax.checkpoints.safetensors_io import read_json_object
from domino_jax.config import SamplingConfig, diff_configs, from_json_dict, to_json_dict
from domino_jax.data.feature_source import FeatureSource
from domino_jax.data.pipeline import ChatSource, RowSource, build_dataset
from domino_jax.decoding.generate import Decoder
from domino_jax.evaluation.metrics import tau_over_prompts, tau_over_rounds
from domino_jax.run_config import RunConfig
from domino_jax.runs.draft import build_train_step, read_held_out, resolve_draft, split_batch, start_state
from domino_jax.runs.errors import explain_or_raise
from domino_jax.runs.features import open_features
from domino_jax.runs.folder import RunError, RunFolder, write_text
from domino_jax.runs.held_out import HeldOutPrompts, decode_held_out, tokens_by_round
from domino_jax.runs.monitor import RunMonitor, read_rows
from domino_jax.runs.pages import render_table
from domino_jax.runs.target_model import TargetModel
from domino_jax.runs.training_run import load_target_model

BASELINE = "default"
PUBLISHED = {"objective.base_support": "block"}
"""What the baseline takes from the published recipe where the run's own configuration follows what won here."""
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "head and curriculum (published: 3.62, 3.96, 4.19)": {
        "no head (DFlash)": {"draft.gru_hidden_dim": 0, "draft.emb_dim": 0},
        "head, no curriculum": {"objective.base_weight_start": 0.0},
        BASELINE: {},
    },
    "shape of lambda": {
        "lambda cosine": {"objective.base_weight_shape": "cosine"},
        "lambda to 0 at half": {"objective.base_weight_decay_ratio": 0.5},
        "lambda from 0.5": {"objective.base_weight_start": 0.5},
        "lambda constant 0.5": {"objective.base_weight_start": 0.5, "objective.base_weight_shape": "constant"},
    },
    "sizes": {
        "prefix 0": {"draft.pure_draft_prefix_len": 0},
        "block 8": {"draft.block_size": 8, "objective.loss_decay_gamma": 4.0},
        "block 16": {"draft.block_size": 16, "objective.loss_decay_gamma": 7.0},
        "rank 16": {"draft.emb_dim": 16},
        "rank 256": {"draft.emb_dim": 256},
        "GRU 32": {"draft.gru_hidden_dim": 32},
        "GRU 512": {"draft.gru_hidden_dim": 512},
    },
    "objective": {
        "no decay": {"objective.loss_decay_gamma": 0.0},
        "D-PACE": {"objective.slot_weights": "dpace"},
        "accepted support": {"objective.base_support": "accepted"},
        "D-PACE, accepted support": {"objective.slot_weights": "dpace", "objective.base_support": "accepted"},
        "KL": {"objective.match": "kl"},
        "KL alone": {"objective.match": "kl", "objective.match_weight": 1.0},
        "total variation": {"objective.match": "tv"},
        "LK alpha": {"objective.match": "lk-alpha"},
        "LK hybrid": {"objective.match": "lk-hybrid"},
        "Muon": {"optimizer.kind": "muon"},
    },
    "data": {"original answers": {"data.train_path": "original"}},
    "fresh start": {
        "fresh": {"draft.initial_weights": "fresh"},
        "fresh, no head": {"draft.initial_weights": "fresh", "draft.gru_hidden_dim": 0, "draft.emb_dim": 0},
        "fresh, no curriculum": {"draft.initial_weights": "fresh", "objective.base_weight_start": 0.0},
    },
}
VARIANTS = {name: changes for group in GROUPS.values() for name, changes in group.items()}
METRICS = {
    "tau": "tau over prompts",
    "tau_rounds": "tau over rounds",
    "tau_head_off": "head off",
    "tau_sampled": "T = 1",
}
_DECODE_BATCH = 50
_SAMPLED = SamplingConfig(temperature=1.0, seed=1)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="folder of a finished embedded run")
    parser.add_argument("--output", type=Path, required=True, help="folder for rows, table and plot")
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps of every drafter")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of an optimizer step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--eval-prompts", type=int, default=120)
    parser.add_argument("--table-only", action="store_true", help="compute table and plot from the rows that are there")
    return parser.parse_args(argv)


def change_config(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Return `config` with the leaves named by dotted paths replaced."""
    tree = to_json_dict(config)
    for path, value in changes.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return from_json_dict(RunConfig, tree)


def train_and_judge(
    config: RunConfig, target: TargetModel, source: RowSource, held_out: HeldOutPrompts
) -> dict[str, Any]:
    """Train one drafter on the rows and features of `source` and return what decoding with it gave."""
    draft, num_steps = resolve_draft(config, target), config.train.num_steps
    vocab_size = target.config.vocab_size
    batches, _, _ = build_dataset("", target.tokenizer, config.data, vocab_size, config.seed, source=source)
    state = start_state(config, draft, target)
    step = build_train_step(config, target.config, draft, num_steps)
    began = time.perf_counter()
    for _ in range(num_steps):
        inputs = split_batch(next(batches), config.data.micro_steps)
        if config.objective.match == "none":
            inputs = inputs.replace(last_hidden=None)
        state, metrics = step(state, target.weights.vocabulary(), inputs)
    metrics = jax.device_get(metrics)
    train_s = time.perf_counter() - began
    decoder = Decoder(target.config, target.weights.by_layer(), draft, state.params)
    result = {
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "train_s": train_s,
        "num_skipped": int(state.num_skipped),
        "loss": float(metrics["corrected_loss"]),
        "base_loss": float(metrics["base_loss"]),
        "accept_len": float(metrics["accept_len"]),
    }
    for suffix, use_head in (("", True), ("_head_off", False)) if draft.has_head else (("", True),):
        lengths = tokens_by_round(decode_held_out(decoder, held_out, use_head, _DECODE_BATCH))
        result |= {f"tau{suffix}": tau_over_prompts(lengths), f"tau_rounds{suffix}": tau_over_rounds(lengths)}
        if use_head:
            result["tau_by_prompt"] = [round(sum(x) / len(x), 4) if x else None for x in lengths]
    sampled = decoder.generate(
        held_out.prompt_ids,
        held_out.max_new_tokens,
        [replace(_SAMPLED, seed=i) for i in range(len(held_out.prompt_ids))],
        held_out.stop_ids,
        rule="rejection",
        batch_size=_DECODE_BATCH,
    )
    return result | {"tau_sampled": tau_over_prompts(tokens_by_round(sampled))}


def run(arguments: argparse.Namespace) -> None:
    rows_path = arguments.output / "rows.jsonl"
    arguments.output.mkdir(parents=True, exist_ok=True)
    if not arguments.table_only:
        _run_missing(arguments, rows_path)
    rows = read_rows(rows_path)
    write_text(arguments.output / "table.md", render_results(rows))
    plot_results(rows, arguments.output / "ablations.png")
    print(f"{arguments.output}: {len(rows)} rows, table.md, ablations.png")


def _run_missing(arguments: argparse.Namespace, rows_path: Path) -> None:
    folder = RunFolder(arguments.run)
    if not (folder.target.exists() and folder.responses.exists() and folder.config.exists()):
        raise RunError(f"{arguments.run} holds no target and responses; run `python train.py --config configs/tiny.py`")
    changes = {"train.num_steps": arguments.steps, "data.batch_size": arguments.batch_size} | PUBLISHED
    base = change_config(from_json_dict(RunConfig, read_json_object(folder.config)), changes)
    if base.corpus is None:
        raise RunError(f"{arguments.run} is not a run of the embedded default: it has no corpus of its own")
    _claim_output(arguments, base, folder, rows_path)
    monitor = RunMonitor(None, None)
    target = load_target_model(base, folder)
    held_out = read_held_out(base, str(folder.eval_chats), target, arguments.eval_prompts, monitor)
    sources = {name: _open_source(name, base, folder, target, monitor) for name in ("responses", "original")}
    rows = read_rows(rows_path) if rows_path.exists() else []
    done = {(row["variant"], row["seed"]) for row in rows}
    todo = [(s, v) for s in arguments.seeds for v in arguments.variants if (v, s) not in done]
    with monitor.stage("ablations", len(todo)) as progress:
        for seed, variant in todo:
            changes = dict(VARIANTS[variant])
            source = sources[changes.pop("data.train_path", "responses")]
            config = change_config(base, {"seed": seed} | changes)
            result = train_and_judge(config, target, source, held_out)
            row = {"variant": variant, "seed": seed} | result
            with rows_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            progress.advance(variant=variant, tau=result["tau"])
            jax.clear_caches()


def _claim_output(arguments: argparse.Namespace, base: RunConfig, folder: RunFolder, rows_path: Path) -> None:
    """Write down what the rows of the output belong to, or check it where there are rows: only equals are averaged."""
    settings = json.loads(json.dumps(to_json_dict(base))) | {
        "eval_prompts": arguments.eval_prompts,
        "weights": fingerprint_target(folder.target)["weights"],
    }
    path = arguments.output / "settings.json"
    if rows_path.exists() and path.exists():
        differences = diff_configs(read_json_object(path), settings)
        if differences:
            raise RunError(
                f"{arguments.output} holds rows of other settings; give the same ones or another --output:\n  "
                + "\n  ".join(differences)
            )
    write_text(path, json.dumps(settings, indent=2) + "\n")


def _open_source(
    name: str, base: RunConfig, folder: RunFolder, target: TargetModel, monitor: RunMonitor
) -> FeatureSource:
    """Return rows with features: the run's responses, or the corpus' own answers to the same prompts."""
    path, kept = folder.responses, folder.root / f"ablation_features_{name}"
    if name == "original":
        path = folder.root / "original_answers.jsonl"
        with folder.train_chats.open("rb") as file:
            path.write_bytes(b"".join(islice(file, base.corpus.num_draft_chats or None)))
    config = change_config(
        base, {"data.feature_cache": str(kept), "objective.match": "kl"}
    )  # keeps the last states too
    chats = ChatSource(str(path), target.tokenizer, config.data, target.config.vocab_size)
    return open_features(config, resolve_draft(config, target), target, chats, monitor)


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the half-width of its 95 % t-interval; None for a single value."""
    if len(values) < 2:
        return float(np.mean(values)), None
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def compare(rows: Sequence[Mapping[str, Any]], variant: str, metric: str, to: str) -> tuple[float, float | None] | None:
    """Return mean and half-width of the difference to variant `to`, paired by seed; None without common seeds."""
    values = {
        name: {row["seed"]: row[metric] for row in rows if row["variant"] == name and row.get(metric) is not None}
        for name in (variant, to)
    }
    common = sorted(values[variant].keys() & values[to].keys())
    return mean_interval([values[variant][s] - values[to][s] for s in common]) if common else None


def render_results(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table: mean over seeds with its 95 % interval, and the paired difference to the default."""
    sections = []
    for group, variants in GROUPS.items():
        table = []
        for variant in variants:
            own = [row for row in rows if row["variant"] == variant]
            if not own:
                continue
            line = {"variant": variant, "seeds": len(own)}
            for metric, title in METRICS.items():
                values = [row[metric] for row in own if row.get(metric) is not None]
                line[title] = _show(mean_interval(values), "") if values else "-"
            to = "fresh" if variant.startswith("fresh") else BASELINE
            difference = compare(rows, variant, "tau", to)
            line[f"tau over prompts, less {'fresh' if group == 'fresh start' else 'default'}"] = (
                "-" if variant == to or difference is None else _show(difference, "+")
            )
            table.append(line)
        if table:
            sections += [f"## {group[0].upper()}{group[1:]}", render_table(table)]
    return "\n\n".join(sections) + "\n"


def _show(value: tuple[float, float | None], sign: str) -> str:
    mean, half = value
    return f"{mean:{sign}.3f}" + (f" ± {half:.3f}" if half is not None else "")


def plot_results(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw tau of every variant: a dot a seed, a bar the mean."""
    present = {row["variant"] for row in rows}
    names = [name for name in VARIANTS if name in present]
    figure = Figure(figsize=(8, 0.3 * len(names) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for y, name in enumerate(reversed(names)):
        values = [row["tau"] for row in rows if row["variant"] == name]
        axes.barh(y, np.mean(values), color="#f6c9a8" if name == BASELINE else "#b9d4f5")
        axes.plot(values, [y] * len(values), "k.", markersize=4)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    lowest = min((row["tau"] for row in rows), default=0.0)
    axes.set_xlim(left=max(0.0, 0.8 * lowest))
    axes.set_xlabel("tau over prompts (greedy, committed tokens); dots: seeds; the axis does not start at 0")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    arguments = parse_arguments(sys.argv[1:])
    sys.exit(explain_or_raise(lambda: run(arguments)))
