"""Measure a target with and without a drafter on the same prompts: rows to JSONL, a table to the terminal.

    python bench.py --target DIR_OR_ID --draft DIR_OR_ID --prompts FILE.jsonl --max-new-tokens 256 --output rows.jsonl

A line of the prompt file is {"prompt": str} (continued as it stands), {"messages": [...]} (by the chat template) or
{"prompt_ids": [int]}; a name of the paper's sets does too. Rows: `domino_jax.evaluation.benchmark.ROW_FIELDS`.

    python bench.py --target DIR_OR_ID --draft DIR_OR_ID --profile --contexts 128 1024 --batches 1 8 --output rows.jsonl

says where the time of a round goes instead, and writes a figure beside the rows (`domino_jax.evaluation.anatomy`).
"""

import argparse
import json
import sys
from pathlib import Path

from domino_jax.checkpoints.huggingface import check_draft_fits, load_draft, load_target, resolve_directory
from domino_jax.checkpoints.safetensors_io import CheckpointError
from domino_jax.config import ConfigError, SamplingConfig
from domino_jax.data.chat_template import ChatTemplateError
from domino_jax.decoding.generate import Decoder, DecodingError
from domino_jax.evaluation import benchmark
from domino_jax.evaluation.metrics import summarise
from domino_jax.evaluation.prompts import PROMPT_SETS, PromptError, load_prompts
from domino_jax.evaluation.row_file import OutputError, check_output, write_rows
from domino_jax.runs import options, round_profile
from domino_jax.runs.draft_files import find_calibration, find_draft_vocabulary, require_draft
from domino_jax.runs.prompt_tokens import open_text
from domino_jax.sharding import find_layout

_REFUSALS = (CheckpointError, ConfigError, ChatTemplateError, DecodingError, OutputError, PromptError)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the options of a command line; a wrong one ends the program with status 2."""
    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--target", required=True, help="Hugging Face directory or hub id of the target")
    add("--draft", help="the same of the drafter; without it plain decoding is measured")
    add("--prompts", required=True, help=f"JSONL file, or one of {', '.join(PROMPT_SETS)}")
    add("--output", type=Path, help="rows as JSONL")
    add("--max-new-tokens", type=options.positive, default=256)
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="0 keeps all")
    add("--top-p", type=float, default=1.0, help="1 keeps all")
    add("--min-p", type=float, default=0.0, help="0 keeps all")
    add("--seed", type=int, default=0, help="prompt i is decoded with seed + i")
    add("--rule", choices=("seed-exact", "rejection"), default="seed-exact", help="acceptance above temperature 0")
    add("--block-size", type=options.positive, help="slots of a block; the drafter's own by default, 1 is plain")
    add("--verify-widths", type=options.positive, nargs="+", default=(), help="block sizes each round chooses among")
    add("--calibration", type=Path, help="of --verify-widths; survival.json beside the drafter by default")
    add("--batch-size", type=options.positive, default=1, help="prompts decoded together")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations, caches, wider weights")
    add("--draft-weights", choices=("float32", "bfloat16"), help="round the drafter's to it; --dtype by default")
    add("--mesh", type=options.mesh, help="devices to split both models over, as model=8 or data=2,model=4")
    add("--no-head", action="store_true", help="draft from the base logits alone")
    add("--num-candidates", type=int, help="tokens a slot the head corrects, 0: all; else by the vocabulary's size")
    add("--draft-vocabulary", type=Path, help="tokens to draft from (scripts/choose_draft_vocabulary.py); else all")
    add("--limit", type=options.positive, help="only the first prompts")
    add("--repeats", type=options.positive, default=1, help="timed runs of each loop; the median counts")
    add("--stop-ids", help="token ids with commas between, empty for none; the model's own by default")
    add("--enable-thinking", action="store_true", help="passed to the chat template")
    add("--profile", action="store_true", help="time the phases of a round instead; see --profile --help")
    return parser.parse_args(arguments)


def _run(args: argparse.Namespace) -> None:
    if args.output:
        check_output(args.output)
    require_draft(args.draft_weights, args.draft)
    survival = find_calibration(args.calibration, args.verify_widths, args.draft)
    vocabulary = find_draft_vocabulary(args.draft_vocabulary, args.target, args.draft)
    prompts = load_prompts(args.prompts, args.limit)
    sampling = SamplingConfig(args.temperature, args.top_k, args.top_p, args.min_p, args.seed)
    codec, stop_ids = open_text(
        str(resolve_directory(args.target)), prompts, args.stop_ids, enable_thinking=args.enable_thinking
    )
    layout = find_layout(args.mesh) if args.mesh else None
    target_config, target_params = load_target(args.target, args.dtype, layout, keep_bfloat16=True)
    draft_type = args.draft_weights or args.dtype
    draft = load_draft(args.draft, draft_type, layout, keep_bfloat16=True) if args.draft else None
    if draft:
        check_draft_fits(draft.config, target_config)
        draft.config.num_draft_tokens(args.block_size)
    elif args.block_size not in (None, 1):
        raise ConfigError(f"--block-size is {args.block_size} but there is no --draft; name a drafter or leave it out")
    drafter = (draft.config, draft.params) if draft else (None, None)
    limits = args.num_candidates, survival, vocabulary
    decoder = Decoder(target_config, target_params, *drafter, args.dtype, layout, *limits)
    settings = benchmark.BenchmarkSettings(
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        rule=args.rule,
        block_size=args.block_size,
        verify_widths=tuple(sorted(args.verify_widths)),
        use_head=not args.no_head,
        batch_size=args.batch_size,
        repeats=args.repeats,
        target=args.target,
        draft=args.draft,
    )
    shown = {**benchmark.shared_fields(decoder, settings), "seed": args.seed, "prompts": args.prompts}
    print(f"settings: {json.dumps(shown, ensure_ascii=False)}", flush=True)
    rows = write_rows(args.output, benchmark.measure(decoder, prompts, settings, codec))
    print(benchmark.format_table(summarise(rows)))
    if args.output:
        print(f"rows: {args.output}")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark of a command line; return 0, or 2 with one sentence where it cannot be run."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if "--profile" in arguments:
            round_profile.run(arguments)
        else:
            _run(parse_arguments(arguments))
    except _REFUSALS as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
