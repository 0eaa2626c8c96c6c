"""Time the drafter's training step at Qwen3 shapes with random weights and count its useful operations.

    python benchmarks/accelerator_training.py --sizes 4b 8b --length 3072 --micro-steps 2 --output DIR

Settings are those of configs/qwen3.py but for the number of micro-steps. Useful operations are those the method needs:
target forward, drafter forward and backward, the frozen LM head forward and backward to its input; what is computed
again to save memory does not count. Rows go to DIR/training.jsonl.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_round import SIZES, draft_config, make_params, trace_kernels

from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.config_flags import parse_config
from domino_jax.evaluation.anatomy import layer_size, measure_rates
from domino_jax.runs.target_model import HeldWeights
from domino_jax.training.step import StepInputs, create_train_state, make_train_step

_CONFIG = str(Path(__file__).resolve().parent.parent / "configs" / "qwen3.py")


def count_flops(target: TargetConfig, draft: DraftConfig, length: int, num_anchors: int) -> dict[str, int]:
    """Return the useful operations of one sequence of `length` tokens, by part."""
    drafted = num_anchors * draft.block_size
    query_width = target.num_attention_heads * target.head_dim
    kv_width = draft.num_key_value_heads * draft.head_dim
    backbone = draft.num_hidden_layers * layer_size(draft)
    context = draft.hidden_size**2 * len(draft.target_layer_ids)
    context += draft.num_hidden_layers * 2 * draft.hidden_size * kv_width
    gru, rank = draft.gru_hidden_dim, draft.emb_dim
    head = 3 * gru * (draft.hidden_size + gru) + rank * (draft.hidden_size + gru + draft.vocab_size)
    draft_query = draft.num_attention_heads * draft.head_dim
    return {
        # causal attention sees half of the positions on average, an anchor's context is half of the sequence too
        "target": length * target.num_hidden_layers * (2 * layer_size(target) + 2 * query_width * length),
        "backbone": 6 * (drafted * backbone + length * context),
        "draft_attention": 6 * draft.num_hidden_layers * drafted * draft_query * length,
        "lm_head": 4 * drafted * draft.vocab_size * draft.hidden_size,
        "domino_head": 6 * drafted * head,
    }


def measure(args: argparse.Namespace, size: str) -> dict:
    """Return the row of one size."""
    length, num_micro, repeats, num_anchors = args.length, args.micro_steps, args.repeats, args.num_anchors
    config = parse_config(["--config", _CONFIG, f"--config.objective.num_anchors={num_anchors}"])
    target, draft = SIZES[size], draft_config(SIZES[size])
    params = make_params(target, draft, "bfloat16")
    state = create_train_state(draft, config.optimizer, jax.random.key(1), params.draft)
    held = HeldWeights(params.target)
    del params
    frozen = held.stacked()
    step = make_train_step(target, draft, config.objective, config.optimizer, 1000, "bfloat16", "bfloat16")
    ids = np.random.default_rng(0).integers(0, target.vocab_size, (num_micro, 1, length), dtype=np.int32)
    lengths = np.full((num_micro, 1), length, np.int32)
    inputs = StepInputs(jnp.asarray(ids), jnp.ones(ids.shape, jnp.float32), jnp.asarray(lengths))
    began = time.perf_counter()
    compiled = step.lower(state, frozen, inputs).compile()
    compile_s, seconds = time.perf_counter() - began, []
    box = [state]

    def run() -> dict:
        box[0], metrics = compiled(box[0], frozen, inputs)
        return metrics

    for _ in range(repeats + 1):
        began = time.perf_counter()
        metrics = jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    if args.trace:
        for name, nanoseconds in trace_kernels(run).most_common(60):
            print(f"{size} {nanoseconds / 1e6 / num_micro:9.3f} ms a sequence  {name}", flush=True)
    flops = count_flops(target, draft, length, num_anchors)
    memory = compiled.memory_analysis()
    return {
        "size": size,
        "length": length,
        "micro_steps": num_micro,
        "num_anchors": num_anchors,
        "seconds_a_sequence": median(seconds[1:]) / num_micro,
        "flops_a_sequence": flops,
        "compile_s": compile_s,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "loss": float(metrics["loss"]),
        "device": jax.devices()[0].device_kind,
    }


def main() -> None:
    """Run the measurement of a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES), default=["8b"])
    parser.add_argument("--length", type=int, default=3072)
    parser.add_argument("--num-anchors", type=int, default=512)
    parser.add_argument("--micro-steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trace", action="store_true", help="print the kernels of a step by total time")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    matrix_size = 2048 if jax.default_backend() == "cpu" else 8192
    rate = measure_rates("bfloat16", 1 << 28, matrix_size).flops_per_s
    for size in args.sizes:
        row = measure(args, size)
        row["matrix_flops_per_s"] = rate
        row["mfu"] = sum(row["flops_a_sequence"].values()) / row["seconds_a_sequence"] / rate
        with (args.output / "training.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
