"""Choose the tokens that a drafter may draft, by how often the target writes them, for --draft-vocabulary.

    python scripts/choose_draft_vocabulary.py --target DIR_OR_ID --data FILE.jsonl --size 32768 --output FILE.json

--data is what train.py trains on: chats whose assistant turns the target wrote. Counted are the assistant's tokens of
nine rows of ten; what part of the tenth row's tokens the choice has is printed for it and for other sizes. Special
tokens of the tokenizer are always among them.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from domino_jax.checkpoints.huggingface import read_target_config, resolve_directory
from domino_jax.checkpoints.safetensors_io import CheckpointError
from domino_jax.config import ConfigError
from domino_jax.data.chat_template import ChatTemplateError, find_stop_ids, load_tokenizer
from domino_jax.data.pipeline import ChatSource
from domino_jax.data.responses import ResponsesError
from domino_jax.decoding.draft_vocabulary import choose_token_ids, save_draft_vocabulary
from domino_jax.evaluation.row_file import OutputError, check_output
from domino_jax.run_config import DataConfig
from domino_jax.runs import options

_HELD_OUT = 10
"""One row of so many is not counted."""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the options of a command line; a wrong one ends the program with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", required=True, help="Hugging Face directory or hub id of the target")
    add("--data", required=True, help="JSONL of chats, as data.train_path of train.py")
    add("--size", type=options.positive, required=True, help="tokens; a multiple of 1024 splits over devices")
    add("--output", type=Path, required=True, help="JSON file")
    add("--max-length", type=options.positive, default=DataConfig.max_length, help="tokens a chat is cut to")
    add("--enable-thinking", action="store_true", help="passed to the chat template")
    return parser.parse_args(arguments)


def _run(args: argparse.Namespace) -> None:
    directory = str(resolve_directory(args.target))
    vocab_size = read_target_config(directory)[0].vocab_size
    tokenizer = load_tokenizer(directory)
    ends = set(find_stop_ids(tokenizer, directory))
    always = {i for i in ends.union(tokenizer.all_special_ids) if i < vocab_size}
    # What cannot be is said before the data is read.
    choose_token_ids(np.zeros(vocab_size, np.int64), args.size, always)
    check_output(args.output)
    data = DataConfig(max_length=args.max_length, enable_thinking=args.enable_thinking)
    source = ChatSource(args.data, tokenizer, data, vocab_size)
    counted, held_out = np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64)
    for i in range(len(source)):
        row = source[i]
        learned = np.array(row.ids)[np.array(row.loss_mask) > 0]
        np.add.at(held_out if i % _HELD_OUT == _HELD_OUT - 1 else counted, learned, 1)
    chosen = choose_token_ids(counted, args.size, always)
    print(f"rows: {len(source)} ({source.index.report.num_bad} could not be used), tokens counted: {counted.sum()}")
    _print_shares(counted, held_out, always, args.size)
    save_draft_vocabulary(args.output, vocab_size, chosen)
    print(f"draft vocabulary: {args.output}")


def _print_shares(counted: np.ndarray, held_out: np.ndarray, always: set[int], size: int) -> None:
    """Print what part of the rows that were not counted each size has; of very few rows those that were."""
    seen, name = (held_out, "held-out") if held_out.any() else (counted, "counted")
    for other in (size // 4, size // 2, size, 2 * size, 4 * size):
        if max(len(always), 1) <= other <= len(counted):
            share = seen[choose_token_ids(counted, other, always)].sum() / seen.sum()
            print(f"{other:8} tokens have {share:.2%} of the {name} rows' tokens" + " <- chosen" * (other == size))


def main(arguments: list[str] | None = None) -> int:
    """Choose as a command line says; return 0, or 2 with one sentence where it cannot be done."""
    try:
        _run(parse_arguments(sys.argv[1:] if arguments is None else arguments))
    except (CheckpointError, ConfigError, ChatTemplateError, OutputError, ResponsesError, OSError) as error:
        print(f"choose_draft_vocabulary.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
