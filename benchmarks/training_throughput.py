"""Time and memory of a drafter's training step against the straightforward version, in one process.

    python benchmarks/training_throughput.py --setting tiny --run runs/tiny --output DIR
    python benchmarks/training_throughput.py --setting stdlib --run runs/stdlib --output DIR
    python benchmarks/training_throughput.py --setting large --output DIR
    python benchmarks/training_throughput.py --setting qwen3-attention --output DIR

Straightforward (`dense`): every batch padded to max_length, one mask of (anchors x block) x (context + anchors x block)
and one softmax over all of it. Ours: the step of `domino_jax.training`, with batches padded to max_length (`padded`)
and in length buckets (`bucketed`). A repeat runs one step of every variant and width, back to back in turning order;
the seconds of a bucketed step are those of its widths, weighted by their share in the batches of the data. All
variants learn the same rows, so their learned tokens a step are the same on average. Ratios are taken within a repeat,
and the median over repeats is reported.

`qwen3-attention` compiles attention alone at the sizes of the Qwen3-8B drafter and runs nothing.
"""

import argparse
import json
import platform
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.checkpoints.huggingface import load_target
from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.config_flags import parse_config
from domino_jax.data.bucket_plan import BucketPlan
from domino_jax.data.chat_template import load_tokenizer
from domino_jax.data.pipeline import ChatSource, pad_batch
from domino_jax.models import draft_backbone
from domino_jax.models.qwen3 import init_target_params
from domino_jax.models.stacked_target import stack_params
from domino_jax.ops.attention import attend, attend_blocks
from domino_jax.records import ChatRow
from domino_jax.run_config import ObjectiveConfig, OptimizerConfig
from domino_jax.runs.draft import resolve_draft
from domino_jax.runs.target_model import HeldWeights, TargetModel
from domino_jax.training.step import StepInputs, TrainState, create_train_state, make_train_step

ROOT = Path(__file__).resolve().parent.parent
RUNS = ("tiny", "stdlib")


def attend_dense(
    queries: jax.Array,
    context_keys: jax.Array,
    context_values: jax.Array,
    block_keys: jax.Array,
    block_values: jax.Array,
    anchor_pos: jax.Array,
    _anchor_chunk: int | None = None,
) -> jax.Array:
    """Return what `attend_blocks` returns, with all blocks in one row, one mask and one softmax."""
    batch, num_anchors, block, num_heads, head_dim = queries.shape
    length, num_slots = context_keys.shape[-1], num_anchors * block
    block_of = jnp.arange(num_slots) // block
    sees_context = jnp.arange(length) < jnp.repeat(anchor_pos, block, axis=1)[..., None]
    sees_block = jnp.broadcast_to(block_of[:, None] == block_of, (batch, num_slots, num_slots))
    flat_keys = block_keys.reshape(batch, num_slots, -1, head_dim)
    flat_values = block_values.reshape(batch, num_slots, -1, head_dim)
    mixed = attend(
        queries.reshape(batch, num_slots, num_heads, head_dim),
        jnp.concatenate([context_keys, flat_keys.transpose(0, 2, 3, 1)], axis=-1),
        jnp.concatenate([context_values, flat_values.transpose(0, 2, 1, 3)], axis=2),
        jnp.concatenate([sees_context, sees_block], axis=-1),
    )
    return mixed.reshape(queries.shape)


@contextmanager
def attention_of_variant(variant: str) -> Iterator[None]:
    """Trace the drafter with dense attention inside, where the variant is `dense`."""
    if variant == "dense":
        draft_backbone.attend_blocks = attend_dense
    try:
        yield
    finally:
        draft_backbone.attend_blocks = attend_blocks


@dataclass(frozen=True)
class Setting:
    """Sizes and rows of one measurement."""

    name: str
    target: TargetConfig
    target_params: Any
    draft: DraftConfig
    objective: ObjectiveConfig
    rows: list[ChatRow]
    widths: tuple[int, ...]
    batch_size: int


def run_setting(name: str, run: Path, data: Path, widths: tuple[int, ...]) -> Setting:
    """Return the sizes of `configs/NAME.py` with the target of a finished run of it and the chats in `data`."""
    config = parse_config(["--config", str(ROOT / "configs" / f"{name}.py")])
    path = str(run / "target")
    target, params = load_target(path, "float32")
    tokenizer = load_tokenizer(path)
    source = ChatSource(str(data), tokenizer, config.data, target.vocab_size)
    draft = resolve_draft(config, TargetModel(path, target, HeldWeights(params), tokenizer))
    widths = (*(widths or config.data.bucket_widths or config.corpus.bucket_widths), config.data.max_length)
    rows = [source[i] for i in range(len(source))]
    return Setting(name, target, stack_params(params), draft, config.objective, rows, widths, config.data.batch_size)


def large_setting(widths: tuple[int, ...]) -> Setting:
    """Return a context of 1024, 128 anchors and blocks of 16; rows of random tokens, lengths log-uniform."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 768}
    target = TargetConfig(vocab_size=4096, hidden_size=256, num_hidden_layers=4, **sizes)
    draft = DraftConfig(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=2,
        num_target_layers=4,
        target_layer_ids=(0, 1, 3),
        block_size=16,
        mask_token_id=4095,
        shift_label=True,
        pure_draft_prefix_len=1,
        gru_hidden_dim=128,
        emb_dim=64,
        **sizes,
    )
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.uniform(np.log(96), np.log(1024), 2000)).astype(int)
    rows = [
        ChatRow(generator.integers(0, 4095, n).astype(np.int32), (np.arange(n) >= 0.3 * n).astype(np.int32))
        for n in lengths.tolist()
    ]
    params = jax.jit(init_target_params, static_argnums=0)(target, jax.random.key(0))
    objective = ObjectiveConfig(num_anchors=128)
    return Setting("large", target, stack_params(params), draft, objective, rows, (*(widths or (256, 512)), 1024), 2)


@dataclass
class Compiled:
    """A step of one variant and width, and what it is run on."""

    variant: str
    width: int
    step: Callable[..., Any]
    inputs: list[StepInputs]
    row: dict[str, Any]

    def run_once(self, setting: Setting, state: TrainState, repeat: int) -> tuple[TrainState, float]:
        """Return the state after one more step, and its seconds."""
        began = time.perf_counter()
        state, metrics = self.step(state, setting.target_params, self.inputs[repeat % len(self.inputs)])
        jax.block_until_ready((state, metrics))
        seconds = time.perf_counter() - began
        if not np.isfinite(metrics["loss"]):
            raise ValueError(f"{self.variant}, width {self.width}: the loss is {metrics['loss']}")
        return state, seconds


def compile_step(setting: Setting, state: TrainState, variant: str, width: int, batches: list) -> Compiled:
    """Compile one variant for one width; the row holds compile time and XLA's temporary memory."""
    padded = [pad_batch([setting.rows[i] for i in batch.rows.tolist()], width) for batch in batches]
    inputs = [StepInputs(b.input_ids[None], b.loss_mask[None], b.lengths[None]) for b in padded]
    began = time.perf_counter()
    with attention_of_variant(variant):
        step = make_train_step(setting.target, setting.draft, setting.objective, OptimizerConfig(), 1000)
        compiled = step.lower(state, setting.target_params, inputs[0]).compile()
    row = {
        "setting": setting.name,
        "kind": "compiled",
        "variant": variant,
        "width": width,
        "compile_s": time.perf_counter() - began,
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }
    return Compiled(variant, width, compiled, inputs, row)


def measure_steps(setting: Setting, repeats: int) -> list[dict[str, Any]]:
    """Return the raw rows: one a compiled step, one a repeat and step, one for the data."""
    lengths = [len(row.ids) for row in setting.rows]
    plan = BucketPlan(lengths, setting.widths, setting.batch_size, seed=0, num_epochs=1)
    batches = [plan[i] for i in range(len(plan))]
    by_width = {width: [b for b in batches if b.width == width] for width in plan.widths}
    learned = sum(int(np.sum(row.loss_mask)) for row in setting.rows) / len(setting.rows) * setting.batch_size
    about = {
        "setting": setting.name,
        "kind": "data",
        "batch_size": setting.batch_size,
        "max_length": max(setting.widths),
        "shares": {width: len(chosen) / len(batches) for width, chosen in by_width.items()},
        "learned_tokens_per_step": learned,
        "machine": f"{platform.processor() or platform.machine()}, {jax.devices()[0].platform}, jax {jax.__version__}",
    }
    widest = max(setting.widths)
    wanted = [("bucketed", width, chosen) for width, chosen in by_width.items()]
    wanted += [("padded", widest, batches), ("dense", widest, batches)]
    steps, state = [], create_train_state(setting.draft, OptimizerConfig(), jax.random.key(0))
    # The least memory first: the process's peak after a variant's first step is then that variant's own.
    for variant, width, chosen in wanted:
        steps.append(compile_step(setting, state, variant, width, chosen[:4]))
        state, _ = steps[-1].run_once(setting, state, 0)
        steps[-1].row["peak_rss_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = [about, *(step.row for step in steps)]
    for repeat in range(repeats):
        for step in steps if repeat % 2 else steps[::-1]:
            state, seconds = step.run_once(setting, state, repeat)
            rows.append(
                {
                    "setting": setting.name,
                    "kind": "step",
                    "repeat": repeat,
                    "variant": step.variant,
                    "width": step.width,
                    "seconds": seconds,
                }
            )
    return rows


def measure_attention() -> list[dict[str, Any]]:
    """Return XLA's temporary memory for the gradient of attention, one sequence of the Qwen3-8B drafter."""
    anchors, block, heads, kv_heads, head_dim, context = 512, 16, 32, 8, 128, 3072
    variants = {"dense": (attend_dense, None), "all anchors": (attend_blocks, None), "16 anchors": (attend_blocks, 16)}
    rows = []
    for dtype in ("float32", "bfloat16"):
        shapes = (
            (1, anchors, block, heads, head_dim),
            (1, kv_heads, head_dim, context),
            (1, kv_heads, context, head_dim),
            (1, anchors, block, kv_heads, head_dim),
            (1, anchors, block, kv_heads, head_dim),
        )
        arrays = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes]
        anchor_pos = jax.ShapeDtypeStruct((1, anchors), jnp.int32)
        for variant, (attention, chunk) in variants.items():

            def loss(arrays: list, anchor_pos: jax.Array, attention: Any = attention, chunk: int | None = chunk) -> Any:
                return jnp.sum(jnp.square(attention(*arrays, anchor_pos, chunk).astype(jnp.float32)))

            compiled = jax.jit(jax.grad(loss)).lower(arrays, anchor_pos).compile()
            temp = compiled.memory_analysis().temp_size_in_bytes
            rows.append(
                {
                    "setting": "qwen3-attention",
                    "kind": "compiled",
                    "variant": variant,
                    "dtype": dtype,
                    "temp_bytes": temp,
                }
            )
    return rows


def tabulate_steps(rows: list[dict[str, Any]]) -> str:
    """Return the table of a setting from its raw rows."""
    (about,) = [row for row in rows if row["kind"] == "data"]
    compiled = [row for row in rows if row["kind"] == "compiled"]
    shares = {"padded": {about["max_length"]: 1.0}, "dense": {about["max_length"]: 1.0}}
    shares["bucketed"] = {int(width): share for width, share in about["shares"].items()}
    seconds = {(r["repeat"], r["variant"], r["width"]): r["seconds"] for r in rows if r["kind"] == "step"}
    repeats = 1 + max(repeat for repeat, _, _ in seconds)

    def per_step(variant: str) -> np.ndarray:
        parts = [
            [share * seconds[repeat, variant, width] for width, share in shares[variant].items()]
            for repeat in range(repeats)
        ]
        return np.sum(parts, axis=1)

    lines = [
        "| step | widths (share of batches) | steps/s | learned tokens/s | over dense (lowest to highest) "
        "| XLA temporary MB | peak RSS MB | compile s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    dense = per_step("dense")
    for variant in ("dense", "padded", "bucketed"):
        own = per_step(variant)
        of_variant = [row for row in compiled if row["variant"] == variant]
        widths = ", ".join(f"{width} ({share:.0%})" for width, share in shares[variant].items())
        ratios = dense / own
        rate = 1 / float(np.median(own))
        lines.append(
            f"| {variant} | {widths} | {rate:.2f} | {rate * about['learned_tokens_per_step']:.0f} | "
            f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f}) | "
            f"{max(row['temp_bytes'] for row in of_variant) / 1e6:.0f} | "
            f"{max(row['peak_rss_bytes'] for row in of_variant) / 1e6:.0f} | "
            f"{sum(row['compile_s'] for row in of_variant):.0f} |"
        )
    return "\n".join(lines)


def tabulate_attention(rows: list[dict[str, Any]]) -> str:
    """Return the table of XLA's temporary memory."""
    lines = ["| attention, gradient | float32 MB | bfloat16 MB |", "| --- | --- | --- |"]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        sizes = {row["dtype"]: row["temp_bytes"] / 1e6 for row in rows if row["variant"] == variant}
        lines.append(f"| {variant} | {sizes['float32']:.0f} | {sizes['bfloat16']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure one setting, write its raw rows and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=(*RUNS, "large", "qwen3-attention"), required=True)
    parser.add_argument("--run", type=Path, help=f"folder of a finished run; needed by {' and '.join(RUNS)}")
    parser.add_argument("--data", type=Path, help="chats to learn; those of the run's responses.jsonl when not given")
    parser.add_argument("--widths", default="", help="bucket widths, comma-separated; max_length is added")
    parser.add_argument("--attention-chunk", type=int, default=0, help="0: as configured")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, required=True, help="folder of rows_SETTING.jsonl and SETTING.md")
    given = parser.parse_args()
    if given.setting in RUNS and given.run is None:
        name = given.setting
        parser.error(f"--setting {name} needs --run, the folder of a finished run of configs/{name}.py")
    if given.setting not in RUNS and (given.run or given.data):
        parser.error(f"--run and --data would be ignored by --setting {given.setting}")
    if given.setting == "qwen3-attention" and (given.widths or given.attention_chunk):
        parser.error("--widths and --attention-chunk would be ignored by --setting qwen3-attention")
    if given.repeats < 1:
        parser.error(f"--repeats is {given.repeats}; it must be at least 1")
    widths = tuple(int(width) for width in given.widths.split(",") if width)
    if given.setting == "qwen3-attention":
        rows = measure_attention()
        table = tabulate_attention(rows)
    else:
        if given.run:
            data = given.data or given.run / "responses.jsonl"
            setting = run_setting(given.setting, given.run, data, widths)
        else:
            setting = large_setting(widths)
        if given.attention_chunk:
            setting = replace(setting, objective=replace(setting.objective, attention_chunk=given.attention_chunk))
        rows = measure_steps(setting, given.repeats)
        table = tabulate_steps(rows)
    given.output.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (given.output / f"rows_{given.setting}.jsonl").write_text(text, encoding="utf-8")
    (given.output / f"{given.setting}.md").write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
