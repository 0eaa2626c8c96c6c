"""Import a Qwen3 target or a Domino/DFlash drafter and write it again, for a program and in a type of your choice.

    python scripts/convert_checkpoint.py --source DIR_OR_ID --output DIR [--dtype stored|float32|bfloat16|float16]
        [--layout public|sglang|specforge|vllm|speculators [--verifier DIR_OR_ID]]

Whether it is a target or a drafter is read from `config.json`; every tensor is checked by name and shape on the way.
Tokenizer and generation files and the model card are copied along; fields of `config.json` that this project does not
know are kept.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from domino_jax.checkpoints.huggingface import (
    CONFIG_FILE,
    is_draft_config,
    load_draft,
    load_target,
    resolve_directory,
    save_draft,
    save_target,
)
from domino_jax.checkpoints.safetensors_io import (
    FLOAT_TYPES,
    INDEX_FILE,
    CheckpointError,
    TensorFiles,
    read_json_object,
)
from domino_jax.checkpoints.serving_layouts import LAYOUTS

SIDE_FILES = (
    *("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "generation_config.json", "*.jinja"),
    "README.md",
)


def convert(source: str, output: Path, dtype: str, layout: str = "public", verifier: str = "") -> str:
    """Convert `source` into `output` and return a line that says what was done.

    Raises:
        CheckpointError: `source` cannot be used or not be held by `layout`, or `output` is the same directory.
    """
    directory = resolve_directory(source)
    if output.resolve() == directory.resolve():
        raise CheckpointError(f"--output {output} is the source itself; give another directory")
    raw = read_json_object(directory / CONFIG_FILE)
    chosen = TensorFiles(directory).common_type() if dtype == "stored" else dtype
    if is_draft_config(raw):
        draft = load_draft(str(directory), chosen)
        save_draft(output, draft.config, draft.params, draft.raw_config, chosen, layout=layout, verifier=verifier)
    else:
        if layout != "public" or verifier:
            raise CheckpointError(
                f"{source} is a target, which all of these programs load as it is; give --layout and --verifier with a "
                "drafter only"
            )
        config, params = load_target(str(directory), chosen)
        save_target(output, config, params, chosen, extra_config=raw)
    for file in sorted({f for pattern in SIDE_FILES for f in directory.glob(pattern)}):
        if file.is_file() and file.name not in (CONFIG_FILE, INDEX_FILE):
            shutil.copyfile(file, output / file.name)
    kind = "drafter" if is_draft_config(raw) else "target"
    form = "" if layout == "public" else f", in the layout of {layout}"
    return f"wrote the {kind} in {directory} to {output} as {chosen}{form}"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", required=True, help="checkpoint directory or hub id")
    parser.add_argument("--output", required=True, type=Path, help="directory to write; created when missing")
    parser.add_argument("--dtype", default="stored", choices=("stored", *FLOAT_TYPES), help="type of the weights")
    parser.add_argument(
        "--layout", default="public", choices=LAYOUTS, help="the program that is to load a drafter; see docs/export.md"
    )
    parser.add_argument("--verifier", default="", help="hub id or directory of the target, for --layout speculators")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 2 with one sentence where nothing could be converted."""
    arguments = parse_arguments(argv)
    try:
        print(convert(**vars(arguments)))
    except (CheckpointError, OSError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
