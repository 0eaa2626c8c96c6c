"""Time plain decoding with Hugging Face transformers against both loops of this project, in one run.

    python scripts/compare_transformers.py --target DIR --draft DIR --prompts FILE.jsonl --output rows.jsonl

Same weights, same prompts, greedy, float32, one prompt at a time, on the CPU; every repeat runs the three decoders in
turn on each prompt and the median of the repeats counts. Prefill is left out everywhere: for transformers it is the
median time of a run of one new token. Needs torch (`pip install torch`), which the package itself never uses.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from domino_jax.checkpoints.huggingface import check_draft_fits, load_draft, load_target, resolve_directory
from domino_jax.checkpoints.safetensors_io import CheckpointError
from domino_jax.config import ConfigError
from domino_jax.data.chat_template import ChatTemplateError, find_stop_ids, load_tokenizer
from domino_jax.decoding.generate import Decoder, DecodingError
from domino_jax.evaluation.metrics import committed_lengths, decoded_tokens, speed_up, tau_over_prompts, tau_over_rounds
from domino_jax.evaluation.prompts import Prompt, PromptError, load_prompts
from domino_jax.evaluation.row_file import OutputError, check_output, write_rows
from domino_jax.runs.prompt_tokens import encode_prompts, open_tokenizer

_REFUSALS = (CheckpointError, ConfigError, ChatTemplateError, DecodingError, OutputError, PromptError)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="compare_transformers.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, help="Hugging Face directory or hub id of the target")
    parser.add_argument("--draft", required=True, help="the same of the drafter")
    parser.add_argument("--prompts", required=True, help="JSONL file or name of a set, as for bench.py")
    parser.add_argument("--output", type=Path, help="rows as JSONL")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--block-size", type=int, help="the drafter's own by default")
    parser.add_argument("--limit", type=int, default=8, help="only the first prompts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--torch-threads", type=int, default=0, help="0 leaves torch's own number")
    return parser.parse_args(arguments)


def _encode_all(target: str, prompts: list[Prompt]) -> tuple[list[list[int]], tuple[int, ...]]:
    directory = str(resolve_directory(target))
    if all(prompt.prompt_ids is not None for prompt in prompts):
        try:
            return [prompt.prompt_ids for prompt in prompts], find_stop_ids(load_tokenizer(directory), directory)
        except ChatTemplateError:
            return [prompt.prompt_ids for prompt in prompts], ()
    tokenizer = open_tokenizer(directory, prompts)
    return encode_prompts(tokenizer, prompts), find_stop_ids(tokenizer, directory)


def _open_transformers(target: str, stop_ids: tuple[int, ...], num_threads: int) -> Callable:
    """Return greedy generation as a callable: prompt ids and budget to new ids and seconds."""
    import torch
    from transformers import AutoModelForCausalLM

    if num_threads:
        torch.set_num_threads(num_threads)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    options = {"do_sample": False, "eos_token_id": list(stop_ids) or None, "pad_token_id": 0}

    def generate(ids: list[int], max_new_tokens: int) -> tuple[list[int], float]:
        inputs = torch.tensor([ids])
        began = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_new_tokens, **options
            )
        return output[0, len(ids) :].tolist(), time.perf_counter() - began

    return generate


def _measure(args: argparse.Namespace, decoder: Decoder, generate: Callable, prompts: list, stop_ids: tuple) -> list:
    rows = []
    for index, ids in enumerate(prompts):
        seconds: dict[str, list[float]] = {"transformers": [], "plain": [], "speculative": []}
        prefill: list[float] = []
        for repeat in range(args.repeats + 1):
            theirs, whole_s = generate(ids, args.max_new_tokens)
            prefill_s = generate(ids, 1)[1]
            (plain,) = decoder.generate([ids], args.max_new_tokens, stop_ids=stop_ids, block_size=1)
            plain_s = decoder.last_timings.decode_s
            (ours,) = decoder.generate([ids], args.max_new_tokens, stop_ids=stop_ids, block_size=args.block_size)
            if repeat == 0:  # warms caches and compiles
                continue
            prefill.append(prefill_s)
            seconds["transformers"].append(whole_s)
            seconds["plain"].append(plain_s)
            seconds["speculative"].append(decoder.last_timings.decode_s)
        rows.append(
            {
                "prompt_index": index,
                "prompt_ids": ids,
                "output_ids": ours.output_ids,
                "acceptance_lengths": ours.stats.acceptance_lengths,
                "transformers_decode_s": max(median(seconds["transformers"]) - median(prefill), 1e-9),
                "plain_decode_s": median(seconds["plain"]),
                "decode_s": median(seconds["speculative"]),
                "identical": ours.output_ids == plain.output_ids,
                "transformers_identical": theirs == plain.output_ids,
                "repeats": args.repeats,
                "torch_threads": args.torch_threads,
            }
        )
    return rows


def _print_table(rows: list[dict]) -> None:
    tokens = [decoded_tokens(row["output_ids"]) for row in rows]
    names = {
        "transformers_decode_s": "transformers, plain",
        "plain_decode_s": "domino_jax, plain",
        "decode_s": "domino_jax, speculative",
    }
    print(f"{'':<24}  tokens/s  speed-up over transformers (95 %)")
    theirs = [row["transformers_decode_s"] for row in rows]
    for field, name in names.items():
        ours = [row[field] for row in rows]
        ratio = speed_up(theirs, tokens, ours, tokens)
        interval = f"{ratio.ratio:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio and ratio.low else "-"
        print(f"{name:<24}  {sum(tokens) / sum(ours):>8.1f}  {interval}")
    lengths = [committed_lengths(row["acceptance_lengths"], n) for row, n in zip(rows, tokens, strict=True)]
    print(f"tau {tau_over_prompts(lengths):.2f} over prompts, {tau_over_rounds(lengths):.2f} over rounds")
    for field, name in (("identical", "speculative"), ("transformers_identical", "transformers")):
        print(f"{name} text equal to plain: {sum(row[field] for row in rows)} of {len(rows)}")


def _run(args: argparse.Namespace) -> None:
    if args.output:
        check_output(args.output)
    prompts = load_prompts(args.prompts, args.limit)
    encoded, stop_ids = _encode_all(args.target, prompts)
    target_config, target_params = load_target(args.target, "float32", keep_bfloat16=True)
    draft = load_draft(args.draft, "float32", keep_bfloat16=True)
    check_draft_fits(draft.config, target_config)
    draft.config.num_draft_tokens(args.block_size)
    decoder = Decoder(target_config, target_params, draft.config, draft.params)
    for prompt, ids in zip(prompts, encoded, strict=True):
        decoder.check_prompt(ids, prompt.name)
    generate = _open_transformers(args.target, stop_ids, args.torch_threads)
    _print_table(write_rows(args.output, _measure(args, decoder, generate, encoded, stop_ids)))


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison of a command line; return 0, or 2 with one sentence where it cannot be run."""
    args = parse_arguments(arguments)
    try:
        _run(args)
    except ImportError as error:
        print(f"compare_transformers.py: {error}; install torch (pip install torch) and try again", file=sys.stderr)
        return 2
    except _REFUSALS as error:
        print(f"compare_transformers.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
