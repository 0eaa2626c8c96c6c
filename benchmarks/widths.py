"""Compare rounds that choose their width with fixed widths and plain decoding, in turns in one process.

    python benchmarks/widths.py --target DIR --draft DIR --prompts FILE.jsonl --calibration survival.json \\
        --widths 4 6 8 12 --batches 1 4 16 32 --output benchmarks/DATE-width

The prompts should not be those of the calibration; only as many as fill whole batches are decoded. A row of
OUTPUT/rows.jsonl is one batch size and manner (`plain`, `fixed N`, `adaptive`): tokens and seconds of decoding
(prefill left out) of every repeat, manners in another order each time, and the choices that `adaptive` made.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import jax

from domino_jax.checkpoints.huggingface import load_draft, load_target, resolve_directory
from domino_jax.config import SamplingConfig
from domino_jax.data.chat_template import find_stop_ids
from domino_jax.decoding.generate import Decoder
from domino_jax.decoding.survival import load_calibration
from domino_jax.evaluation.prompts import load_prompts
from domino_jax.runs import options
from domino_jax.runs.prompt_tokens import encode_prompts, open_tokenizer


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line, this process's own by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--prompts", required=True, help="as of bench.py")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--widths", type=options.positive, nargs="+", default=[4, 6, 8, 12])
    parser.add_argument("--batches", type=options.positive, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--limit", type=options.positive, help="only the first prompts")
    parser.add_argument("--max-new-tokens", type=options.positive, default=112)
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="seed-exact above 0; a prompt's place is its seed"
    )
    parser.add_argument("--repeats", type=options.positive, default=3)
    parser.add_argument("--output", type=Path, required=True, help="folder; rows are added to what is there")
    return parser.parse_args(arguments)


def measure_batch(
    decoder: Decoder, prompts: list[list[int]], stop_ids: tuple[int, ...], batch: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row a manner at one batch size."""
    manners: dict[str, dict[str, Any]] = {"plain": {"block_size": 1}}
    manners |= {f"fixed {width}": {"block_size": width} for width in args.widths}
    manners["adaptive"] = {"verify_widths": args.widths}
    places = range(0, len(prompts) - batch + 1, batch)
    groups = [list(zip(range(i, i + batch), prompts[i : i + batch], strict=True)) for i in places]
    names, seconds = list(manners), {name: [0.0] * args.repeats for name in manners}
    choices: Counter[tuple[int, int]] = Counter()
    texts: dict[str, list[list[int]]] = {}

    def decode(name: str, group: list[tuple[int, list[int]]]) -> list[list[int]]:
        sampling = [SamplingConfig(temperature=args.temperature, seed=seed) for seed, _ in group]
        rows = [prompt for _, prompt in group]
        found = decoder.generate(rows, args.max_new_tokens, sampling, stop_ids=stop_ids, **manners[name])
        return [g.output_ids for g in found]

    for name in names:
        texts[name] = [ids for group in groups for ids in decode(name, group)]  # compiles and measures costs
    for repeat in range(args.repeats):
        for i, group in enumerate(groups):
            for name in random.Random(repeat * len(groups) + i).sample(names, len(names)):
                decode(name, group)
                seconds[name][repeat] += decoder.last_timings.decode_s
                if name == "adaptive":
                    choices.update(decoder.last_choices)
    num_tokens = sum(len(ids) - 1 for ids in texts["plain"])
    return [
        {
            "batch": batch,
            "manner": name,
            "temperature": args.temperature,
            "num_prompts": len(groups) * batch,
            "num_tokens": num_tokens,
            "seconds": seconds[name],
            "tokens_per_s": num_tokens / median(seconds[name]),
            "over_plain": median(p / s for p, s in zip(seconds["plain"], seconds[name], strict=True)),
            "identical": texts[name] == texts["plain"],
            "choices": {f"{d}/{w}": n for (d, w), n in sorted(choices.items())} if name == "adaptive" else None,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }
        for name in names
    ]


def main() -> None:
    """Measure every batch size and add its rows to the output."""
    args = parse_arguments()
    directory = str(resolve_directory(args.target))
    loaded = load_prompts(args.prompts, args.limit)
    tokenizer = open_tokenizer(directory, loaded)
    prompts = encode_prompts(tokenizer, loaded)
    stop_ids = find_stop_ids(tokenizer, directory)
    target_config, target_params = load_target(args.target, "float32")
    draft = load_draft(args.draft, "float32")
    calibration = load_calibration(args.calibration)
    decoder = Decoder(target_config, target_params, draft.config, draft.params, calibration=calibration)
    args.output.mkdir(parents=True, exist_ok=True)
    for batch in args.batches:
        rows = measure_batch(decoder, prompts, stop_ids, batch, args)
        with (args.output / "rows.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            print(f"{batch:3} {row['manner']:10} {row['over_plain']:.3f} {row['identical']} {row['choices'] or ''}")
        for (_, shape, _), table in decoder._width_tables.items():
            if shape[0] == batch:
                print(f"    costs, ms: plain {1e3 * float(table.plain_s):.3f}, rounds {(1e3 * table.round_s).tolist()}")


if __name__ == "__main__":
    main()
