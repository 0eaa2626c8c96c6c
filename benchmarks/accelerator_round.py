"""Time plain steps, rounds and their phases at Qwen3 shapes with random weights; made for accelerators.

    python benchmarks/accelerator_round.py --sizes 4b 8b --contexts 1024 --batches 1 8 --output DIR
    python benchmarks/accelerator_round.py --sizes 8b --torch --output DIR

Weights are drawn on the device: no checkpoint is needed and none is read. `--torch` adds a plain step of
transformers' Qwen3 on PyTorch at the same shapes, run as it is and as a CUDA graph. `--trace` adds the device's kernels
of some rounds, by total time. Rows go to DIR/rows.jsonl and DIR/kernels.jsonl.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.decoding.plain import decode_plain
from domino_jax.decoding.speculative import decode_speculative
from domino_jax.decoding.state import DecodeSettings, ModelParams
from domino_jax.evaluation import anatomy
from domino_jax.models.domino_head import init_draft_params
from domino_jax.models.qwen3 import init_target_params
from domino_jax.run_config import DraftSettings
from domino_jax.runs.plan import PUBLIC_TARGETS

SIZES = {
    "tiny": TargetConfig(1024, 64, 192, 6, 4, 2, 16, tie_word_embeddings=True),
    "4b": PUBLIC_TARGETS["qwen3-4b"],
    "8b": PUBLIC_TARGETS["qwen3-8b"],
}
"""`tiny` tries the script on any machine."""


def draft_config(target: TargetConfig) -> DraftConfig:
    """Return the drafter that `configs/qwen3.py` trains for a target."""
    settings = DraftSettings(
        num_hidden_layers=5 if target.num_hidden_layers > 6 else 2,
        block_size=16,
        mask_token_id=min(151669, target.vocab_size - 1),
        shift_label=True,
        pure_draft_prefix_len=1,
        gru_hidden_dim=1024,
        emb_dim=256,
    )
    return settings.resolve(target, settings.mask_token_id)


def draw_params(shapes: Any, dtype: str) -> Any:
    """Return random parameters of the shapes of a tree, drawn on the device; norms are 1."""

    @partial(jax.jit, static_argnums=0)
    def draw(shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        if len(shape) == 1:
            return jnp.ones(shape, dtype)
        return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)

    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return structure.unflatten([draw(leaf.shape, key) for leaf, key in zip(leaves, keys, strict=True)])


def make_params(target: TargetConfig, draft: DraftConfig, dtype: str) -> ModelParams:
    """Return random parameters of both models."""
    key = jax.random.key(0)
    shapes = (
        jax.eval_shape(partial(init_target_params, target), key),
        jax.eval_shape(partial(init_draft_params, draft), key),
    )
    return ModelParams(*draw_params(shapes, dtype))


def trace_kernels(run: Callable[[], Any]) -> Counter[str]:
    """Return the nanoseconds of every kernel of the first device while `run` runs."""
    totals: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        for file in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                if not plane.name.startswith("/device:"):
                    continue
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        for event in line.events:
                            totals[event.name] += int(event.duration_ns)
    return totals


def trace_rows(size: str, settings: DecodeSettings, params: ModelParams, context: int, rounds: int) -> Iterator[dict]:
    """Yield the kernels of some plain steps and some rounds, longest first, with their microseconds a step or round."""
    plain = DecodeSettings(settings.target, dtype=settings.dtype)
    state = anatomy.random_state(plain, 1, context, rounds)
    loops = {"plain": (decode_plain, plain, ModelParams(params.target), state)}
    state = anatomy.random_state(settings, 1, context, rounds)
    loops["round"] = (decode_speculative, settings, params, state)
    for loop, (decode, loop_settings, loop_params, state) in loops.items():
        box = [decode(loop_settings, loop_params, state)]
        box[0] = anatomy.rewind(box[0], context)

        def run(decode: Any = decode, given: tuple = (loop_settings, loop_params), box: list = box) -> Any:
            box[0] = decode(*given, box[0])
            return box[0].tokens

        totals = trace_kernels(run)
        for name, nanoseconds in totals.most_common(40):
            yield {"size": size, "loop": loop, "kernel": name, "microseconds": nanoseconds / 1e3 / rounds}
        yield {"size": size, "loop": loop, "kernel": "all", "microseconds": sum(totals.values()) / 1e3 / rounds}


def time_torch(size: str, context: int, num_tokens: int) -> dict[str, Any]:
    """Return seconds of one forward of `num_tokens` after `context` cached ones, of transformers on PyTorch."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, StaticCache

    target = SIZES[size]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = Qwen3Config(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_hidden_layers=target.num_hidden_layers,
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=target.head_dim,
        tie_word_embeddings=target.tie_word_embeddings,
        max_position_embeddings=target.max_position_embeddings,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen3ForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.02)
    cache = StaticCache(config=config, max_cache_len=-(-(context + num_tokens) // 128) * 128)
    result: dict[str, Any] = {"num_tokens": num_tokens, "torch": torch.__version__}
    with torch.no_grad():
        ids = torch.randint(0, target.vocab_size, (1, context), device=device)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        step_ids = torch.randint(0, target.vocab_size, (1, num_tokens), device=device)
        positions = torch.arange(context, context + num_tokens, device=device)

        def step() -> Any:
            for layer in cache.layers:  # the same positions again
                if hasattr(layer, "cumulative_length"):
                    layer.cumulative_length.fill_(context) if torch.is_tensor(layer.cumulative_length) else setattr(
                        layer, "cumulative_length", context
                    )
            return model(step_ids, past_key_values=cache, position_ids=positions[None], use_cache=True).logits

        def seconds(run: Callable[[], Any], count: int) -> float:
            times = []
            for _ in range(7):
                began = time.perf_counter()
                for _ in range(count):
                    run()
                if device == "cuda":
                    torch.cuda.synchronize()
                times.append((time.perf_counter() - began) / count)
            return median(times)

        step()
        result["eager_s"] = seconds(step, 4)
        if device == "cuda":
            try:
                stream = torch.cuda.Stream()
                with torch.cuda.stream(stream):
                    step()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step()
                result["graph_s"] = seconds(graph.replay, 8)
            except RuntimeError as error:
                result["graph_error"] = str(error)[:300]
    return result


def _append(path: Path, rows: list[dict]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def measure(args: argparse.Namespace) -> None:
    """Measure everything asked for and write the rows."""
    args.output.mkdir(parents=True, exist_ok=True)
    is_large = jax.default_backend() != "cpu"
    rates = anatomy.measure_rates(args.dtype, 1 << 31 if is_large else 1 << 28, 8192 if is_large else 2048)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: copy {rates.bytes_per_s / 1e9:.0f} GB/s, "
          f"{args.dtype} products {rates.flops_per_s / 1e12:.2f} TFLOP/s")  # fmt: skip
    for size in args.sizes:
        target = SIZES[size]
        settings = DecodeSettings(
            target, draft_config(target), 16, dtype=args.dtype, num_candidates=args.num_candidates
        )
        params = make_params(target, settings.draft, args.dtype)
        for context in args.contexts:
            for batch in args.batches:
                began = time.perf_counter()
                costs = anatomy.measure_round(settings, params, batch, context)
                rows = [{"size": size} | cost.to_row(rates, settings, params.weight_types) for cost in costs]
                _append(args.output / "rows.jsonl", rows)
                for row in rows:
                    shares = f"bandwidth {row['bandwidth_share']:5.2f}  products {row['flops_share']:5.3f}"
                    name = f"{size} batch {batch} context {context} {row['phase']:18s}"
                    print(f"{name} {row['seconds'] * 1e3:8.3f} ms  {shares}", flush=True)
                print(f"  in {time.perf_counter() - began:.0f} s", flush=True)
        if args.trace:
            rows = list(trace_rows(size, settings, params, args.contexts[0], 8))
            _append(args.output / "kernels.jsonl", rows)
            for row in rows:
                print(f"{size} {row['loop']:5s} {row['microseconds']:9.1f} us  {row['kernel'][:110]}", flush=True)
        del params


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line; a wrong one ends the program with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES), default=["8b"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--num-candidates", type=int, default=64, help="tokens a slot the head corrects, 0: all")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--trace", action="store_true", help="kernels of plain steps and rounds at the first context")
    parser.add_argument("--torch", action="store_true", help="time PyTorch too, in a process of its own")
    parser.add_argument("--only-torch", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Run the measurement of a command line."""
    args = parse_arguments()
    if args.only_torch:
        for size in args.sizes:
            for num_tokens in (1, 17):
                row = {"size": size, "phase": "torch forward", "context": args.contexts[0], "batch": 1}
                row |= time_torch(size, args.contexts[0], num_tokens)
                _append(args.output / "rows.jsonl", [row])
                print(row, flush=True)
        return
    measure(args)
    if args.torch:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only-torch"], check=True)


if __name__ == "__main__":
    main()
