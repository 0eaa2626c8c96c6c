"""Time rounds that draft from part of the vocabulary beside rounds that draft from all of it, in turns in one process.

    python benchmarks/draft_vocabulary.py --target DIR --draft DIR --sizes 4096 8192 --blocks 7 15 --output FOLDER

A row of OUTPUT/rows.jsonl is one block size and draft vocabulary (0: all): seconds of every repeat of a round and of
its LM head, Domino head and verify pass, greedy, random caches. Which tokens may be drafted does not change a round's
seconds, so the lowest ids stand for them; what a draft vocabulary costs in accepted drafts is measured by bench.py.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.checkpoints.huggingface import load_draft, load_target
from domino_jax.decoding.generate import Decoder
from domino_jax.evaluation import anatomy
from domino_jax.runs import options

PHASES = ("LM head", "Domino head", "verify")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line, this process's own by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", required=True)
    add("--draft", required=True)
    add("--sizes", type=options.positive, nargs="+", required=True, help="draft vocabularies beside the whole one")
    add("--blocks", type=options.positive, nargs="+", default=[7, 15])
    add("--batch", type=options.positive, default=1)
    add("--context", type=options.positive, default=128)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--repeats", type=options.positive, default=7)
    add("--output", type=Path, required=True, help="folder; rows are added to what is there")
    return parser.parse_args(arguments)


def make_timers(decoder: Decoder, block: int, args: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """Return, by name, what runs a round or a phase of it a few times and returns the seconds of one."""
    settings = replace(decoder.settings, block_size=block, rule="greedy", has_filters=False)
    num_new = anatomy._LOOP_LEN * (settings.num_draft_tokens + 1)
    box = [anatomy.random_state(settings, args.batch, args.context, num_new)]
    carries = [anatomy._random_carry(settings, jax.tree.map(jnp.copy, box[0]), args.context)]

    def time_round() -> float:
        seconds, box[0] = anatomy._time_rounds(settings, decoder.params, box[0], args.context, 1)
        return seconds

    def time_phase(phase: str) -> float:
        began = time.perf_counter()
        carries[0] = jax.block_until_ready(anatomy._repeat_phase(settings, phase, decoder.params, carries[0]))
        return (time.perf_counter() - began) / anatomy._LOOP_LEN

    return {"round": time_round} | {phase: lambda phase=phase: time_phase(phase) for phase in PHASES}


def measure_block(decoders: dict[int, Decoder], block: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row a draft vocabulary."""
    timers = {size: make_timers(decoder, block, args) for size, decoder in decoders.items()}
    seconds: dict[int, dict[str, list[float]]] = {size: {} for size in decoders}
    for _ in range(1 + args.repeats):
        for name in ("round", *PHASES):
            for size in decoders:
                seconds[size].setdefault(name, []).append(timers[size][name]())
    about = {"target": args.target, "block_size": block, "batch": args.batch, "context": args.context}
    about |= {"dtype": args.dtype, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    return [
        about | {"draft_vocab_size": size} | {f"{name}_s": found[1:] for name, found in seconds[size].items()}
        for size in decoders
    ]


def main() -> None:
    """Measure every block size and add its rows to the output."""
    args = parse_arguments()
    target_config, target_params = load_target(args.target, args.dtype)
    draft = load_draft(args.draft, args.dtype)
    models = target_config, target_params, draft.config, draft.params, args.dtype
    decoders = {0: Decoder(*models)}
    decoders |= {size: Decoder(*models, draft_vocabulary=np.arange(size)) for size in args.sizes}
    args.output.mkdir(parents=True, exist_ok=True)
    for block in args.blocks:
        rows = measure_block(decoders, block, args)
        with (args.output / "rows.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            ratio = median(new / old for new, old in zip(row["round_s"], rows[0]["round_s"], strict=True))
            outside = median(r / v - 1 for r, v in zip(row["round_s"], row["verify_s"], strict=True))
            times = " ".join(f"{name} {1e3 * median(row[f'{name}_s']):.2f}" for name in ("round", *PHASES))
            print(f"block {block:2} drafts from {row['draft_vocab_size'] or 'all':>6}: {times} ms, "
                  f"round {ratio:.2f} of all's, outside verify {outside:.0%}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
