"""Let a target answer the prompts of a file: the chats its drafter is trained on.

    python scripts/regenerate_responses.py --target DIR_OR_ID --input chats.jsonl --output responses.jsonl

User and system turns are kept, assistant turns are written again by the target. Started again with the same command it
goes on after the last whole row.
"""

import argparse
import sys
from pathlib import Path

from domino_jax.checkpoints.huggingface import load_target, resolve_directory
from domino_jax.config import SamplingConfig
from domino_jax.data.chat_template import find_stop_ids, load_tokenizer
from domino_jax.data.responses import RowReport, read_chats
from domino_jax.decoding.generate import Decoder
from domino_jax.runs.errors import explain_or_raise
from domino_jax.runs.monitor import RunMonitor
from domino_jax.runs.responses import ResponseSettings, regenerate


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="Hugging Face directory or hub id")
    parser.add_argument("--input", required=True, type=Path, help="JSONL of chats (messages or conversations)")
    parser.add_argument("--output", required=True, type=Path, help="JSONL the answered chats are appended to")
    parser.add_argument("--max-new-tokens", type=int, default=2048)
    parser.add_argument("--max-prompt-tokens", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--enable-thinking", action="store_true")
    parser.add_argument("--bad-rows", choices=("skip", "fail"), default="skip")
    parser.add_argument("--limit", type=int, default=None, help="answer only the first chats")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    sampling = SamplingConfig(arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p, arguments.seed)
    report = RowReport(str(arguments.input), arguments.bad_rows)
    chats = [messages for _, messages in read_chats(arguments.input, report, needs_answer=False)][: arguments.limit]
    path = str(resolve_directory(arguments.target))
    config, params = load_target(path, arguments.dtype)
    tokenizer = load_tokenizer(path)
    settings = ResponseSettings(
        arguments.max_new_tokens,
        min(arguments.max_prompt_tokens, config.max_position_embeddings - 1),
        arguments.batch_size,
        sampling,
        arguments.enable_thinking,
    )
    monitor = RunMonitor(None, None)
    if report.num_bad:
        monitor.say(report.summary())
    decoder = Decoder(config, params, dtype=arguments.dtype)
    stop_ids = find_stop_ids(tokenizer, path)
    counts = regenerate(decoder, tokenizer, stop_ids, chats, arguments.output, settings, monitor)
    monitor.say(f"{arguments.output}: {counts.summary()}")


if __name__ == "__main__":
    arguments = parse_arguments(sys.argv[1:])
    sys.exit(explain_or_raise(lambda: run(arguments)))
