"""Time decoding on this machine's CPU at targets of about 10, 50 and 120 M random parameters, beside transformers.

    python benchmarks/cpu_sizes.py --output benchmarks/DATE-cpu

Writes each pair (a drafter as `configs/tiny.py` has it: one layer, a small head) as a checkpoint, profiles its rounds
with blocks that verify 8 and 16 tokens (`bench.py --profile`), and decodes greedily with transformers and both loops
(`scripts/compare_transformers.py`; needs torch). Random drafts are never accepted, so nothing is said of speculation's
gain, only of what a step, a verify pass and a round cost. Rows go to OUTPUT/rows.jsonl.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from domino_jax.checkpoints.huggingface import save_draft, save_target
from domino_jax.config import TargetConfig
from domino_jax.models.domino_head import init_draft_params
from domino_jax.models.qwen3 import init_target_params
from domino_jax.run_config import DraftSettings

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"10m": (256, 768, 8, 4, 2, 64), "50m": (640, 1920, 10, 10, 2, 64), "120m": (896, 2688, 12, 14, 2, 64)}
"""Width, MLP width, layers, heads, key/value heads, head width."""
BLOCKS = (7, 15)


def write_pair(size: str, vocab: int, folder: Path) -> float:
    """Write a target and a drafter of random weights and one prompt; return the target's parameters in millions."""
    target = TargetConfig(vocab, *SIZES[size], tie_word_embeddings=True)
    settings = DraftSettings(
        num_hidden_layers=1,
        block_size=max(BLOCKS),
        mask_token_id=vocab - 1,
        shift_label=True,
        pure_draft_prefix_len=1,
        gru_hidden_dim=128,
        emb_dim=64,
    )
    draft = settings.resolve(target, vocab - 1)
    params = init_target_params(target, jax.random.key(0))
    save_target(folder / "target", target, params)
    save_draft(folder / "draft", draft, init_draft_params(draft, jax.random.key(1)))
    prompt = np.random.default_rng(0).integers(0, vocab - 1, 64).tolist()
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt_ids": prompt}) + "\n")
    return sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6


def run_json(command: list[str], output: Path) -> list[dict[str, Any]]:
    """Run a program that writes rows to `output` and return them."""
    subprocess.run([sys.executable, *command, "--output", str(output)], check=True, cwd=ROOT, stdout=sys.stderr)
    return [json.loads(line) for line in output.read_text().splitlines()]


def measure(size: str, vocab: int, context: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a pair."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        about = {"size": size, "vocab": vocab, "target_m": write_pair(size, vocab, folder)}
        pair = ["--target", str(folder / "target"), "--draft", str(folder / "draft")]
        for block in BLOCKS:
            command = ["bench.py", "--profile", *pair, "--contexts", str(context), "--block-size", str(block)]
            for row in run_json(command, folder / f"profile{block}.jsonl"):
                yield about | row
        command = ["scripts/compare_transformers.py", *pair, "--prompts", str(folder / "prompts.jsonl")]
        (row,) = run_json([*command, "--max-new-tokens", "64"], folder / "compared.jsonl")
        num_tokens = len(row["output_ids"]) - 1
        for name in ("transformers", "plain"):
            seconds = row[f"{name}_decode_s"] / num_tokens
            yield about | {"phase": f"{name} generate", "seconds": seconds, "context": 64}


def print_summary(rows: list[dict[str, Any]]) -> None:
    """Print the ratios that matter, a line a pair."""
    print("| target | plain ms | of the copy rate | verify 8 | verify 16 | outside verify | over transformers |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for size, vocab in dict.fromkeys((row["size"], row["vocab"]) for row in rows):
        own = [row for row in rows if (row["size"], row["vocab"]) == (size, vocab)]

        def seconds(phase: str, block: int | None = None, own: list[dict[str, Any]] = own) -> float:
            return median(r["seconds"] for r in own if r["phase"] == phase and r.get("block_size", block) == block)

        plain = median(row["seconds"] for row in own if row["phase"] == "plain step")
        share = median(row["bandwidth_share"] for row in own if row["phase"] == "plain step")
        verify = [seconds("verify", block) for block in BLOCKS]
        outside = [seconds("round", block) / v - 1 for block, v in zip(BLOCKS, verify, strict=True)]
        over = seconds("transformers generate") / seconds("plain generate")
        print(
            f"| {own[0]['target_m']:.0f} M, vocabulary {vocab} | {plain * 1e3:.2f} | {share:.2f} | "
            f"{verify[0] / plain:.2f} | {verify[1] / plain:.2f} | {outside[0]:.0%}, {outside[1]:.0%} | {over:.2f} |"
        )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line; a wrong one ends the program with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--vocabs", nargs="+", type=int, default=[4096, 32768])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args(arguments)


def main() -> None:
    """Run the measurement of a command line."""
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with (args.output / "rows.jsonl").open("a") as file:
        for size in args.sizes:
            for vocab in args.vocabs:
                for row in measure(size, vocab, args.context):
                    file.write(json.dumps(row) + "\n")
                    rows.append(row)
                file.flush()
    print_summary(rows)


if __name__ == "__main__":
    main()
