"""Time steps, verify passes and rounds on a CPU in several manners, in turns in one process.

    python benchmarks/few_rows.py --target DIR --draft DIR --blocks 7 15 --output benchmarks/DATE-cpu-few-rows
    python benchmarks/few_rows.py --target DIR --draft DIR --manners kernels bfloat16-draft bfloat16 --output ...

A row of OUTPUT/rows.jsonl is one block size and manner: `XLA` (products and attention as `domino_jax.ops` makes
them where there is no compiler), `kernels` (`domino_jax.ops.cpu_kernels`), `bfloat16-draft` (the same, the drafter's
weights rounded, and its copy of the LM head), `bfloat16` (all weights rounded); seconds of every repeat of a plain
step, a verify pass and a round of greedy decoding with random caches, whose drafts are whatever the drafter says.
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

from domino_jax.checkpoints.huggingface import load_draft, load_target
from domino_jax.decoding.generate import Decoder
from domino_jax.decoding.plain import decode_plain
from domino_jax.decoding.speculative import decode_speculative
from domino_jax.decoding.state import ModelParams
from domino_jax.evaluation import anatomy
from domino_jax.ops import cpu_kernels
from domino_jax.runs import options
from domino_jax.runs.draft_files import find_draft_vocabulary
from domino_jax.shapes import Params

MANNERS = ("XLA", "kernels", "bfloat16-draft", "bfloat16")
_has_kernels_for = cpu_kernels.has_kernels_for
NUM_STEPS = 32


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line, this process's own by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--blocks", type=options.positive, nargs="+", default=[7, 15])
    parser.add_argument("--batch", type=options.positive, default=1)
    parser.add_argument("--context", type=options.positive, default=128)
    parser.add_argument(
        "--manners", choices=MANNERS, nargs="+", default=MANNERS[:2], help="all are compared to the first"
    )
    parser.add_argument("--draft-vocabulary", type=Path, help="tokens to draft from in all manners")
    parser.add_argument("--repeats", type=options.positive, default=7)
    parser.add_argument("--output", type=Path, required=True, help="folder; rows are added to what is there")
    return parser.parse_args(arguments)


def compile_manner(decoder: Decoder, block: int, args: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """Return, by name, what runs a compiled program once and returns its seconds a step or round."""
    jax.clear_caches()  # a product that was traced in the other manner would be taken from there
    settings = replace(decoder.settings, block_size=block, rule="greedy", has_filters=False)
    plain = replace(settings, draft=None, block_size=1)
    target = ModelParams(decoder.params.target)
    limit = args.context + anatomy._LOOP_LEN
    states = {
        "plain": anatomy.random_state(plain, args.batch, args.context, NUM_STEPS),
        "round": anatomy.random_state(settings, args.batch, args.context, anatomy._LOOP_LEN * block),
    }
    carry = anatomy._random_carry(settings, jax.tree.map(jnp.copy, states["round"]), args.context)
    programs = {
        "plain": decode_plain.lower(plain, target, states["plain"]).compile(),
        "verify": anatomy._repeat_phase.lower(settings, "verify", decoder.params, carry).compile(),
        "round": decode_speculative.lower(settings, decoder.params, states["round"]).compile(),
    }

    def time_plain() -> float:
        state = anatomy.rewind(states["plain"], args.context)
        began = time.perf_counter()
        states["plain"] = jax.block_until_ready(programs["plain"](target, state))
        return (time.perf_counter() - began) / NUM_STEPS

    def time_verify() -> float:
        nonlocal carry
        began = time.perf_counter()
        carry = jax.block_until_ready(programs["verify"](decoder.params, carry))
        return (time.perf_counter() - began) / anatomy._LOOP_LEN

    def time_round() -> float:
        state = anatomy.rewind(states["round"], args.context)
        state = state.replace(limit_len=jnp.full_like(state.limit_len, limit))
        began = time.perf_counter()
        states["round"] = jax.block_until_ready(programs["round"](decoder.params, state))
        return (time.perf_counter() - began) / int(jnp.max(states["round"].num_rounds))

    return {"plain": time_plain, "verify": time_verify, "round": time_round}


def round_weights(params: Params) -> Params:
    """Return the matrices in bfloat16, as a checkpoint of that type has them."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim > 1 else leaf, params)


def make_decoders(args: argparse.Namespace) -> dict[str, Decoder]:
    """Return the pair as every manner holds it."""
    target, target_params = load_target(args.target, "float32")
    draft = load_draft(args.draft, "float32")
    vocabulary = find_draft_vocabulary(args.draft_vocabulary, args.target, args.draft)
    rounded = round_weights(draft.params)
    decoders = {}
    for manner in args.manners:
        target_held = round_weights(target_params) if manner == "bfloat16" else target_params
        draft_held = rounded if manner.startswith("bfloat16") else draft.params
        decoders[manner] = Decoder(target, target_held, draft.config, draft_held, draft_vocabulary=vocabulary)
    return decoders


def measure_block(decoders: dict[str, Decoder], block: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row a manner."""
    timers: dict[str, dict[str, Callable[[], float]]] = {}
    for manner, decoder in decoders.items():
        cpu_kernels.has_kernels_for = (lambda dtype: False) if manner == "XLA" else _has_kernels_for
        timers[manner] = compile_manner(decoder, block, args)
    seconds: dict[str, dict[str, list[float]]] = {manner: {} for manner in decoders}
    for _ in range(1 + args.repeats):
        for name in ("plain", "verify", "round"):
            for manner in decoders:
                seconds[manner].setdefault(name, []).append(timers[manner][name]())
    about = {"target": args.target, "block_size": block, "batch": args.batch, "context": args.context}
    about |= {"draft_vocab_size": next(iter(decoders.values())).settings.draft_vocab_size}
    about |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    return [
        about | {"manner": manner} | {f"{name}_s": s[1:] for name, s in seconds[manner].items()} for manner in decoders
    ]


def main() -> None:
    """Measure every block size and add its rows to the output."""
    args = parse_arguments()
    if not cpu_kernels.has_kernels_for("float32"):
        raise SystemExit("there are no kernels to compare with on this machine")
    decoders = make_decoders(args)
    args.output.mkdir(parents=True, exist_ok=True)
    for block in args.blocks:
        before, *others = rows = measure_block(decoders, block, args)
        with (args.output / "rows.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            outside = median(r / v for r, v in zip(row["round_s"], row["verify_s"], strict=True)) - 1
            print(f"block {block:2} batch {args.batch} {row['manner']:14} outside verify {outside:.0%}")
        for after in others:
            for name in ("plain", "verify", "round"):
                pairs = list(zip(before[f"{name}_s"], after[f"{name}_s"], strict=True))
                ratio = median(new / old for old, new in pairs)
                was, now = (1e3 * median(values) for values in zip(*pairs, strict=True))
                print(f"{after['manner']:14} {name:6} {was:7.2f} -> {now:7.2f} ms, paired {ratio:.2f}")


if __name__ == "__main__":
    main()
