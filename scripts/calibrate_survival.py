"""Measure on held-out prompts how likely drafted tokens are kept, for `bench.py --verify-widths`.

    python scripts/calibrate_survival.py --target DIR_OR_ID --draft DIR --prompts FILE.jsonl --widths 4 6 8 12

The prompts should not be those that are measured afterwards. The result lies beside the drafter's weights as
survival.json, or where --output says.
"""

import argparse
import sys
from pathlib import Path

from domino_jax.checkpoints.huggingface import check_draft_fits, load_draft, load_target, resolve_directory
from domino_jax.checkpoints.safetensors_io import CheckpointError
from domino_jax.config import ConfigError, SamplingConfig
from domino_jax.data.chat_template import ChatTemplateError, find_stop_ids
from domino_jax.decoding.generate import Decoder, DecodingError
from domino_jax.decoding.survival import FILE_NAME, save_calibration
from domino_jax.evaluation.calibration import calibrate_survival
from domino_jax.evaluation.prompts import PromptError, load_prompts
from domino_jax.runs import options
from domino_jax.runs.draft_files import find_draft_vocabulary
from domino_jax.runs.prompt_tokens import encode_prompts, open_tokenizer


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the options of a command line; a wrong one ends the program with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", required=True, help="Hugging Face directory or hub id of the target")
    add("--draft", required=True, help="the same of the drafter")
    add("--prompts", required=True, help="JSONL file, as of bench.py")
    add("--widths", type=options.positive, nargs="+", required=True, help="block sizes")
    add("--draft-vocabulary", type=Path, help="as of bench.py; give the one that rounds will draft from")
    add("--output", type=Path, help=f"{FILE_NAME} beside the drafter by default")
    add("--max-new-tokens", type=options.positive, default=256)
    add("--limit", type=options.positive, help="only the first prompts")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--rule", choices=("seed-exact", "rejection"), default="seed-exact", help="acceptance above temperature 0")
    add("--seed", type=int, default=0, help="prompt i is decoded with seed + i")
    add("--batch-size", type=options.positive, default=8, help="prompts decoded together")
    return parser.parse_args(arguments)


def _run(args: argparse.Namespace) -> None:
    directory = str(resolve_directory(args.target))
    vocabulary = find_draft_vocabulary(args.draft_vocabulary, args.target, args.draft)
    prompts = load_prompts(args.prompts, args.limit)
    tokenizer = None if all(p.prompt_ids is not None for p in prompts) else open_tokenizer(directory, prompts)
    stop_ids, ids = find_stop_ids(tokenizer, directory), encode_prompts(tokenizer, prompts)
    target_config, target_params = load_target(args.target, "float32", keep_bfloat16=True)
    draft = load_draft(args.draft, "float32", keep_bfloat16=True)
    check_draft_fits(draft.config, target_config)
    for width in args.widths:
        draft.config.num_draft_tokens(width)
    if min(args.widths) < 2:
        raise ConfigError(f"--widths are {args.widths}; a block has 2 slots or more")
    decoder = Decoder(target_config, target_params, draft.config, draft.params, draft_vocabulary=vocabulary)
    for i, prompt in enumerate(ids):
        decoder.check_prompt(prompt, f"prompt {i + 1}")
    sampling = SamplingConfig(args.temperature, seed=args.seed)
    calibration = calibrate_survival(
        decoder, ids, args.max_new_tokens, args.widths, sampling, stop_ids, args.rule, args.batch_size
    )
    output = args.output or resolve_directory(args.draft) / FILE_NAME
    output.parent.mkdir(parents=True, exist_ok=True)
    save_calibration(output, calibration)
    for size, slots in calibration.sizes.items():
        print(f"block {size}: kept, by slot: " + " ".join(f"{rate:.2f}" for rate in slots.rate))
    print(f"calibration: {output}")


def main(arguments: list[str] | None = None) -> int:
    """Calibrate as a command line says; return 0, or 2 with one sentence where it cannot be done."""
    try:
        _run(parse_arguments(sys.argv[1:] if arguments is None else arguments))
    except (CheckpointError, ConfigError, ChatTemplateError, DecodingError, PromptError, OSError) as error:
        print(f"calibrate_survival.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
