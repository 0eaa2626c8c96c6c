"""Let a target answer the prompts of a file: the chats its drafter is trained on.

Our own decoding answers, or any OpenAI-compatible endpoints (SGLang, vLLM), which is faster for large targets:

    python scripts/regenerate_responses.py --target DIR_OR_ID --input prompts.jsonl --output r.jsonl
    python scripts/regenerate_responses.py --endpoint http://localhost:8000/v1 --input prompts.jsonl --output r.jsonl

User and system turns are kept, assistant turns are written again by the target. Stopped (Ctrl-C) it keeps the answers
so far, and started again with the same command it goes on with what is missing. Beside the output lie
OUTPUT.settings.json, what its rows are made from, and OUTPUT.bad_rows.jsonl, the rows of the input that cannot be used.
One process at a time writes to an output; another one is refused (not on Windows).
"""

import argparse
import sys
from pathlib import Path

from domino_jax.checkpoints.huggingface import load_target, read_target_config, resolve_directory
from domino_jax.checkpoints.safetensors_io import TensorFiles
from domino_jax.config import SamplingConfig
from domino_jax.data.chat_template import find_stop_ids, load_tokenizer
from domino_jax.data.responses import RowReport, read_chats
from domino_jax.decoding.generate import Decoder
from domino_jax.runs.endpoint_responses import (
    NumberedChat,
    read_left_out,
    regenerate_by_endpoints,
    report_left_out,
)
from domino_jax.runs.endpoint_settings import EndpointSettings
from domino_jax.runs.endpoints import find_served_model, sampling_fields
from domino_jax.runs.errors import explain_or_raise
from domino_jax.runs.folder import RunError
from domino_jax.runs.monitor import RunMonitor
from domino_jax.runs.provenance import describe_directory, describe_tokenizer, settings_path
from domino_jax.runs.responses import (
    ResponseCounts,
    ResponseSettings,
    claim_output,
    describe_job,
    hold_output,
    regenerate,
)

DTYPES = ("float32", "bfloat16")
DECODER_OPTIONS = {"batch_size": 32, "dtype": None}
ENDPOINT_OPTIONS = {"model": "", "api_key_env": "", "concurrency": 32, "request_timeout_s": 600.0, "max_retries": 5}
MAX_PROMPT_TOKENS = 2048


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, type=Path, help="JSONL of chats (messages or conversations)")
    parser.add_argument("--output", required=True, type=Path, help="JSONL the answered chats are appended to")
    parser.add_argument(
        "--target",
        help="Hugging Face directory or hub id; beside --endpoint only its tokenizer is read, which measures prompts "
        "and checks that the chat template renders what was written",
    )
    parser.add_argument("--max-new-tokens", type=parse_positive, default=2048)
    parser.add_argument(
        "--max-prompt-tokens",
        type=parse_positive,
        help=f"default {MAX_PROMPT_TOKENS}, without --target what the endpoint takes",
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--enable-thinking", action="store_true")
    parser.add_argument("--bad-rows", choices=("skip", "fail"), default="skip")
    parser.add_argument("--limit", type=parse_positive, default=None, help="answer only the first chats")
    own = parser.add_argument_group("own decoding")
    own.add_argument("--batch-size", type=parse_positive, help=f"default {DECODER_OPTIONS['batch_size']}")
    own.add_argument(
        "--dtype", choices=DTYPES, help="of weights and caches; default: the stored one (float16: float32)"
    )
    remote = parser.add_argument_group("endpoints")
    remote.add_argument("--endpoint", action="append", help="base URL; may be given several times")
    remote.add_argument("--model", help="as the endpoints list it; default: the only one they list")
    remote.add_argument("--api-key-env", help="environment variable that holds the key; default: no key")
    remote.add_argument("--concurrency", type=parse_positive, help="requests in flight at each endpoint; default 32")
    remote.add_argument("--request-timeout-s", type=float, help="default 600")
    remote.add_argument("--max-retries", type=int, help="of a request, and of an endpoint that is gone; default 5")
    return check_arguments(parser, parser.parse_args(argv))


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> argparse.Namespace:
    if not arguments.endpoint and not arguments.target:
        parser.error("give --target DIR_OR_ID, or --endpoint URL")
    unused, where = (DECODER_OPTIONS, "with") if arguments.endpoint else (ENDPOINT_OPTIONS, "without")
    for name in unused:
        if getattr(arguments, name) is not None:
            parser.error(f"--{name.replace('_', '-')} has no meaning {where} --endpoint; leave it out")
    if arguments.endpoint and not arguments.target and arguments.max_prompt_tokens:
        parser.error("--max-prompt-tokens needs a tokenizer; give --target DIR_OR_ID")
    for name, value in {**DECODER_OPTIONS, **ENDPOINT_OPTIONS}.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


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
    with hold_output(output):
        answer(arguments, sampling, bad_rows_log)


def answer(arguments: argparse.Namespace, sampling: SamplingConfig, bad_rows_log: Path) -> None:
    output, monitor = arguments.output, RunMonitor(None, None)
    earlier = read_left_out(bad_rows_log, output) if arguments.endpoint else {}
    report = RowReport(str(arguments.input), arguments.bad_rows, log_path=bad_rows_log)
    chats = [NumberedChat(*row) for row in read_chats(arguments.input, report, needs_answer=False)][: arguments.limit]
    if report.num_bad:
        monitor.say(report.summary())
    if arguments.endpoint:
        left_out = report_left_out(earlier, chats, report)
        counts = answer_by_endpoints(arguments, sampling, chats, report, left_out, monitor)
    else:
        counts = answer_by_decoder(arguments, sampling, [chat.messages for chat in chats], monitor)
    monitor.say(f"{output}: {counts.summary()}")


def answer_by_decoder(
    arguments: argparse.Namespace, sampling: SamplingConfig, chats: list, monitor: RunMonitor
) -> ResponseCounts:
    directory = resolve_directory(arguments.target).resolve()
    config, _ = read_target_config(str(directory))
    dtype = arguments.dtype or choose_dtype(directory)
    limit = min(arguments.max_prompt_tokens or MAX_PROMPT_TOKENS, config.max_position_embeddings - 1)
    settings = ResponseSettings(
        arguments.max_new_tokens, limit, arguments.batch_size, sampling, arguments.enable_thinking
    )
    tokenizer = load_tokenizer(str(directory))
    writer = describe_directory(directory, tokenizer)
    claim_output(arguments.output, describe_job(writer, arguments.input, chats, settings, dtype))
    stop_ids = find_stop_ids(tokenizer, str(directory))
    monitor.say(f"target: {directory} in {dtype}")
    decoder = Decoder(config, load_target(str(directory), dtype, keep_bfloat16=True)[1], dtype=dtype)
    return regenerate(decoder, tokenizer, stop_ids, chats, arguments.output, settings, monitor)


def answer_by_endpoints(
    arguments: argparse.Namespace,
    sampling: SamplingConfig,
    chats: list[NumberedChat],
    report: RowReport,
    left_out: set[int],
    monitor: RunMonitor,
) -> ResponseCounts:
    endpoints = EndpointSettings(
        tuple(arguments.endpoint), **{name: getattr(arguments, name) for name in ENDPOINT_OPTIONS}
    )
    tokenizer = load_tokenizer(arguments.target) if arguments.target else None
    limit = (arguments.max_prompt_tokens or MAX_PROMPT_TOKENS) if tokenizer else None
    settings = ResponseSettings(
        arguments.max_new_tokens, limit, endpoints.concurrency, sampling, arguments.enable_thinking
    )
    served = find_served_model(endpoints, monitor)
    writer = served.describe()
    if tokenizer:
        writer |= {"tokenizer": arguments.target, **describe_tokenizer(tokenizer)}
    messages = [chat.messages for chat in chats]
    made_from = describe_job(writer, arguments.input, messages, settings, sent=sampling_fields(sampling))
    claim_output(arguments.output, made_from)
    monitor.say(f"target: {served.model!r} of {', '.join(served.urls)}")
    num_bad = report.num_bad
    counts = regenerate_by_endpoints(
        endpoints, served.model, tokenizer, chats, arguments.output, settings, report, left_out, monitor
    )
    if report.num_bad > num_bad:
        monitor.say(report.summary())
    return counts


if __name__ == "__main__":
    arguments = parse_arguments(sys.argv[1:])
    sys.exit(explain_or_raise(lambda: run(arguments)))
