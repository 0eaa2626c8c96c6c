"""Let a target answer the prompts of a file: the chats its drafter is trained on.

    python scripts/regenerate_responses.py --target DIR_OR_ID --input chats.jsonl --output responses.jsonl

User and system turns are kept, assistant turns are written again by the target. Stopped (Ctrl-C) it keeps the answers
so far, and started again with the same command it goes on after the last whole row. Beside the output lie
OUTPUT.settings.json, what its rows are made from, and OUTPUT.bad_rows.jsonl, the rows of the input that cannot be used.
"""

import argparse
import sys
from pathlib import Path

from domino_jax.checkpoints.huggingface import load_target, read_target_config, resolve_directory
from domino_jax.checkpoints.safetensors_io import TensorFiles
from domino_jax.config import SamplingConfig, to_json_dict
from domino_jax.data.chat_template import find_stop_ids, load_tokenizer
from domino_jax.data.responses import RowReport, read_chats
from domino_jax.decoding.generate import Decoder
from domino_jax.runs.errors import explain_or_raise
from domino_jax.runs.folder import RunError
from domino_jax.runs.monitor import RunMonitor
from domino_jax.runs.responses import ResponseSettings, claim_output, hash_prompts, regenerate, settings_path

DTYPES = ("float32", "bfloat16")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="Hugging Face directory or hub id")
    parser.add_argument("--input", required=True, type=Path, help="JSONL of chats (messages or conversations)")
    parser.add_argument("--output", required=True, type=Path, help="JSONL the answered chats are appended to")
    parser.add_argument("--max-new-tokens", type=parse_positive, default=2048)
    parser.add_argument("--max-prompt-tokens", type=parse_positive, default=2048)
    parser.add_argument("--batch-size", type=parse_positive, default=32)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="type of weights and caches; by default the stored one (float32 for float16)"
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--enable-thinking", action="store_true")
    parser.add_argument("--bad-rows", choices=("skip", "fail"), default="skip")
    parser.add_argument("--limit", type=parse_positive, default=None, help="answer only the first chats")
    return parser.parse_args(argv)


def parse_positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def choose_dtype(directory: Path) -> str:
    stored = TensorFiles(directory).common_type()
    return stored if stored in DTYPES else "float32"


def run(arguments: argparse.Namespace) -> None:
    sampling = SamplingConfig(arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p, arguments.seed)
    output, bad_rows_log = arguments.output, arguments.output.with_name(arguments.output.name + ".bad_rows.jsonl")
    for written in (output, settings_path(output), bad_rows_log):
        if written.exists() and arguments.input.exists() and written.samefile(arguments.input):
            raise RunError(f"--input {arguments.input} is a file that would be written to; give another --output")
    monitor = RunMonitor(None, None)
    report = RowReport(str(arguments.input), arguments.bad_rows, log_path=bad_rows_log)
    chats = [messages for _, messages in read_chats(arguments.input, report, needs_answer=False)][: arguments.limit]
    if report.num_bad:
        monitor.say(report.summary())
    directory = resolve_directory(arguments.target).resolve()
    config, _ = read_target_config(str(directory))
    dtype = arguments.dtype or choose_dtype(directory)
    settings = ResponseSettings(
        arguments.max_new_tokens,
        min(arguments.max_prompt_tokens, config.max_position_embeddings - 1),
        arguments.batch_size,
        sampling,
        arguments.enable_thinking,
    )
    made_from = {
        "target": str(directory),
        "dtype": dtype,
        "input": str(arguments.input.resolve()),
        "num_prompts": len(chats),
        "prompts": hash_prompts(chats),
        **to_json_dict(settings),
    }
    del made_from["batch_size"]  # one that does not fit the memory must be mendable; answers do not depend on it
    claim_output(output, made_from)
    tokenizer = load_tokenizer(str(directory))
    stop_ids = find_stop_ids(tokenizer, str(directory))
    monitor.say(f"target: {directory} in {dtype}")
    decoder = Decoder(config, load_target(str(directory), dtype)[1], dtype=dtype)
    counts = regenerate(decoder, tokenizer, stop_ids, chats, output, settings, monitor)
    monitor.say(f"{output}: {counts.summary()}")


if __name__ == "__main__":
    arguments = parse_arguments(sys.argv[1:])
    sys.exit(explain_or_raise(lambda: run(arguments)))
