"""`bench.py --profile`: load a pair of checkpoints, time its rounds by phases, print, write rows and a figure."""

import argparse
from dataclasses import replace
from pathlib import Path

from domino_jax.checkpoints.huggingface import check_draft_fits, load_draft, load_target
from domino_jax.decoding.generate import Decoder
from domino_jax.evaluation import anatomy
from domino_jax.evaluation.anatomy_page import draw_anatomy, format_anatomy
from domino_jax.evaluation.row_file import check_output, write_rows
from domino_jax.runs.draft_files import find_draft_vocabulary
from domino_jax.runs.options import positive

_CONTEXTS, _BATCHES = (128, 1024), (1,)


def run(arguments: list[str]) -> None:
    """Profile as a command line says; a wrong option ends the program with status 2.

    Raises:
        CheckpointError, ConfigError, DecodingError, OutputError: what was given cannot be profiled.
    """
    args = _parse(arguments)
    if args.output:
        check_output(args.output)
    vocabulary = find_draft_vocabulary(args.draft_vocabulary, args.target, args.draft)
    target_config, target_params = load_target(args.target, args.dtype, keep_bfloat16=True)
    draft = load_draft(args.draft, args.draft_weights or args.dtype, keep_bfloat16=True)
    check_draft_fits(draft.config, target_config)
    draft.config.num_draft_tokens(args.block_size)
    decoder = Decoder(
        target_config,
        target_params,
        draft.config,
        draft.params,
        args.dtype,
        num_candidates=args.num_candidates,
        draft_vocabulary=vocabulary,
    )
    settings = replace(
        decoder.settings, block_size=args.block_size or draft.config.block_size, use_head=not args.no_head
    )
    anatomy.check_contexts(settings, args.contexts)
    rates = anatomy.measure_rates(args.dtype)
    rows = [
        cost.to_row(rates, settings, decoder.params.weight_types)
        for context in args.contexts
        for batch in args.batches
        for cost in anatomy.measure_round(settings, decoder.params, batch, context, args.repeats)
    ]
    print(format_anatomy(rates, rows))
    if args.output:
        write_rows(args.output, rows)
        draw_anatomy(rows, args.output.with_suffix(".png"))
        print(f"rows: {args.output}; figure: {args.output.with_suffix('.png')}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.py", description=anatomy.__doc__)
    add = parser.add_argument
    add("--profile", action="store_true", required=True)
    add("--target", required=True, help="Hugging Face directory or hub id of the target")
    add("--draft", required=True, help="the same of the drafter")
    add("--output", type=Path, help="rows as JSONL; the figure goes beside it")
    add("--contexts", type=positive, nargs="+", default=_CONTEXTS, help="tokens before the round")
    add("--batches", type=positive, nargs="+", default=_BATCHES, help="rows of a round")
    add("--block-size", type=positive, help="slots of a block; the drafter's own by default")
    add("--num-candidates", type=int, help="tokens a slot the head corrects, 0: all; else by the vocabulary's size")
    add("--draft-vocabulary", type=Path, help="tokens to draft from; all by default")
    add("--no-head", action="store_true", help="draft from the base logits alone")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations, caches, wider weights")
    add("--draft-weights", choices=("float32", "bfloat16"), help="round the drafter's to it; --dtype by default")
    add("--repeats", type=positive, default=5, help="timed runs of each phase; the median counts")
    return parser.parse_args(arguments)
