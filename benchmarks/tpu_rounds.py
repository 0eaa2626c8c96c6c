"""Predict a plain step and a round on TPUs that are not here: nothing in it is a measurement of time.

    python benchmarks/tpu_rounds.py --targets qwen3-4b qwen3-8b --topologies v5e:4x4 v6e:4x4 v5p:2x2x1 \\
        --output benchmarks/DATE-tpu-rounds

Two ways, both over published rates of the chips: what every phase has to move and to compute, counted from shapes
(`domino_jax.evaluation.anatomy`), and what a turn of the compiled loops moves, read off their optimised programs, with
all that those exchange (`domino_jax.runs.program_costs`; needs the `libtpu` package). A phase takes as long as its
bytes or its operations take at those rates, whichever is longer; programs also take what their exchanges do at a link's
rate. Launches, latencies of exchanges and what a chip misses of its rates are left out: real rounds take longer.

Rows: one a place (`rows.jsonl`); the table goes to the terminal.
"""

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scaling_estimate import FLEETS, Fleet

from domino_jax.config import SamplingConfig
from domino_jax.decoding.draft_vocabulary import limit_vocabulary
from domino_jax.decoding.generate import init_state
from domino_jax.decoding.plain import decode_plain
from domino_jax.decoding.speculative import decode_speculative
from domino_jax.decoding.state import DecodeSettings, ModelParams, default_num_candidates
from domino_jax.evaluation.anatomy import count_target_work, count_work
from domino_jax.models.domino_head import init_draft_params
from domino_jax.models.qwen3 import init_target_params
from domino_jax.run_config import DraftSettings, MeshConfig
from domino_jax.runs.plan import PUBLIC_TARGETS
from domino_jax.runs.program_costs import Traffic, read_traffic
from domino_jax.runs.topologies import TopologyError, find_topology
from domino_jax.sharding import Layout, activate, build_layout, check_sizes

MESHES = {"v5e:4x4": MeshConfig(2, 8), "v6e:4x4": MeshConfig(4, 4), "v5p:2x2x1": MeshConfig(1, 4)}
"""Attention heads divide by `model`."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line; a wrong one ends the program with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=sorted(PUBLIC_TARGETS), default=["qwen3-4b", "qwen3-8b"])
    parser.add_argument("--topologies", nargs="+", choices=list(MESHES), default=list(MESHES))
    parser.add_argument("--context", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=1, help="rows of every group of devices that shares a copy")
    parser.add_argument("--draft-vocab-size", type=int, default=0, help="tokens that may be drafted, 0: all")
    parser.add_argument("--output", type=Path, required=True, help="folder of rows.jsonl, which is added to")
    return parser.parse_args(arguments)


def predict(name: str, topology_name: str, context: int, rows: int, draft_vocab_size: int = 0) -> dict[str, Any]:
    """Return the row of a target on a topology."""
    topology = find_topology(topology_name)
    layout = build_layout(MESHES[topology_name], topology.devices)
    target = PUBLIC_TARGETS[name]
    draft = DraftSettings(num_hidden_layers=5, mask_token_id=target.vocab_size - 1).resolve(target, 0)
    check_sizes(layout, target, draft)
    settings = DecodeSettings(
        target,
        draft,
        draft.block_size,
        num_candidates=default_num_candidates(target.vocab_size),
        draft_vocab_size=draft_vocab_size,
        dtype="bfloat16",
    )
    fleet = FLEETS[topology_name.partition(":")[0]]
    phases = count_work(settings, rows, context) | {"plain step": count_target_work(settings, rows, context, 1)}
    del phases["round"]
    phase_s = {phase: find_seconds(fleet, layout, *work) for phase, work in phases.items()}
    plain_s = phase_s.pop("plain step")
    round_s = sum(phase_s.values())
    plain, drafted = (compile_loop(settings, layout, context, rows, is_plain) for is_plain in (True, False))
    compiled_s = [t.turn_bytes / fleet.kind.bandwidth_bytes_per_s + exchange_s(fleet, t) for t in (plain, drafted)]
    return {
        "target": name,
        "topology": topology_name,
        "mesh": dict(layout.mesh.shape),
        "rows_a_group": rows,
        "context": context,
        "block_size": settings.block_size,
        "num_candidates": settings.num_candidates,
        "draft_vocab_size": settings.draft_vocab_size,
        "phase_s": phase_s,
        "plain_s": plain_s,
        "round_s": round_s,
        "outside_verify": round_s / phase_s["verify"] - 1,
        "break_even_tau": round_s / plain_s,
        "counted_bytes": {phase: work[0] // layout.num_model for phase, work in phases.items()},
        "compiled": {
            manner: {
                "turn_bytes": traffic.turn_bytes,
                "other_bytes": traffic.moved_bytes - traffic.turn_bytes,
                "exchanged_bytes": sum(traffic.collective_bytes.values()),
                "largest_copy": traffic.largest_copy,
                "returned_types": traffic.returned_types,
                "seconds": seconds,
            }
            for manner, traffic, seconds in zip(("plain", "round"), (plain, drafted), compiled_s, strict=True)
        },
        "compiled_break_even_tau": compiled_s[1] / compiled_s[0],
        "jax": jax.__version__,
    }


def find_seconds(fleet: Fleet, layout: Layout, num_bytes: int, num_flops: int) -> float:
    """Return what a phase takes on the devices that share it."""
    seconds = num_bytes / fleet.kind.bandwidth_bytes_per_s, num_flops / fleet.kind.flops_per_s
    return max(seconds) / layout.num_model


def exchange_s(fleet: Fleet, traffic: Traffic) -> float:
    """Return what exchanges take at a link's rate: sums go out and come back."""
    exchanged = dict(traffic.collective_bytes)
    return (2 * exchanged.pop("all-reduce", 0) + sum(exchanged.values())) / fleet.link


def compile_loop(settings: DecodeSettings, layout: Layout, context: int, rows: int, is_plain: bool) -> Traffic:
    """Compile a decoding loop; return what one device moves, and of it in one turn."""
    if is_plain:
        settings = replace(settings, draft=None, block_size=1, draft_vocab_size=0)
    params = abstract_params(settings)
    num_rows = rows * layout.num_data
    prompts = [[1] * context] * num_rows
    state = jax.eval_shape(
        lambda: init_state(settings, prompts, [context] * num_rows, [SamplingConfig()] * num_rows, [()] * num_rows)
    )
    loop = decode_plain if is_plain else decode_speculative
    with activate(layout):
        compiled = loop.lower(settings, layout.abstract(params), layout.abstract(state)).compile()
    return read_traffic(compiled.as_text())


def abstract_params(settings: DecodeSettings) -> ModelParams:
    """Return the shapes of both models' weights in bfloat16."""
    key, draft = jax.random.key(0), settings.draft
    params = ModelParams(
        jax.eval_shape(partial(init_target_params, settings.target), key),
        jax.eval_shape(partial(init_draft_params, draft), key) if draft else None,
    )
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    if settings.draft_vocab_size:
        token_ids = np.arange(settings.draft_vocab_size)
        params = jax.eval_shape(lambda params: limit_vocabulary(params, token_ids), params)
    return params


def format_row(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    mesh, compiled = row["mesh"], row["compiled"]
    moved = [compiled[manner]["turn_bytes"] / 1e9 for manner in ("plain", "round")]
    copy = max(compiled[manner]["largest_copy"] for manner in ("plain", "round"))
    return (
        f"| {row['target']} on {row['topology']}, {mesh['data']} x {mesh['model']} | {row['plain_s'] * 1e3:.2f} | "
        f"{row['round_s'] * 1e3:.2f} | {row['outside_verify']:.0%} | {row['break_even_tau']:.2f} | "
        f"{moved[0]:.2f}, {moved[1]:.2f} | {compiled['round']['exchanged_bytes'] / 1e6:.1f} | "
        f"{row['compiled_break_even_tau']:.2f} | {copy / 1e3:.0f} |"
    )


def main() -> None:
    """Predict every place of a command line."""
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    print(
        "| place, data x model | plain step, ms | round, ms | outside verify | break-even tau | compiled: GB moved, "
        "plain and round | MB exchanged a round | break-even tau of it | largest copy, kB |"
    )
    print("|" + " --- |" * 9)
    for name in args.targets:
        for topology_name in args.topologies:
            try:
                row = predict(name, topology_name, args.context, args.rows, args.draft_vocab_size)
            except TopologyError as error:
                raise SystemExit(f"tpu_rounds.py: {error}") from error
            with (args.output / "rows.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(format_row(row), flush=True)


if __name__ == "__main__":
    main()
