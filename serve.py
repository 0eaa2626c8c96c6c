"""Serve a target with its drafter over an OpenAI-compatible API.

    python serve.py --target DIR_OR_ID --draft DIR_OR_ID
    python serve.py --config configs/tiny.py        (the pair of a finished run)
    python serve.py                                 (the newest finished run of the embedded default)

Without --draft beside --target decoding is plain. The server listens at once, compiles, and takes requests when /ready
answers 200. SIGTERM lets open requests end. --plan --topology v6e:4x4 says instead what fits on devices that need not
be here; a run of --config need not be finished for it.
"""

import argparse
import os
import sys
from pathlib import Path

from domino_jax.config_flags import parse_command_line
from domino_jax.runs import options
from domino_jax.runs.errors import explain_or_raise

_EXTRA = ("fastapi", "uvicorn", "prometheus_client", "h11")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of a command line; a wrong one ends the program with status 2."""
    parser = argparse.ArgumentParser(
        prog="serve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = parser.add_argument_group("models")
    models.add_argument("--target", help="Hugging Face directory or hub id of the target")
    models.add_argument("--draft", help="the same of the drafter")
    models.add_argument("--config", help="configuration file of a finished run, whose pair is served")
    models.add_argument("--served-model-name", help="name in the API; the target directory's by default")
    models.add_argument("--mesh", type=options.mesh, help="devices that share both models: model=8 or data=2,model=4")
    models.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    models.add_argument("--draft-weights", choices=("float32", "bfloat16"), help="as of bench.py; --dtype by default")
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="127.0.0.1 is reachable from this machine alone")
    http.add_argument("--port", type=int, default=8000)
    http.add_argument(
        "--api-key", action="append", default=[], help="may be repeated; else DOMINO_API_KEY, with commas"
    )
    http.add_argument("--cors-origin", action="append", default=[], help="web origin that may call the API; repeatable")
    http.add_argument("--max-connections", type=int, default=512, help="open at once; further ones get 503")
    http.add_argument("--request-timeout", type=float, default=600.0, metavar="SECONDS")
    http.add_argument("--drain-grace", type=float, default=30.0, metavar="SECONDS", help="after SIGTERM")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--max-slots", type=int, help="sequences that run at once; as many of 32 as fit by default")
    engine.add_argument("--max-waiting", type=int, default=256, help="requests that may wait for a slot")
    engine.add_argument("--max-model-len", type=int, help="tokens of prompt and output; the model's context by default")
    engine.add_argument(
        "--block-sizes", type=options.numbers, help="widths to choose from by load, as 16,8; 1 is plain"
    )
    engine.add_argument("--block-size", type=int, help="always this width, whatever the load; 1 is plain decoding")
    engine.add_argument("--batch-sizes", type=options.numbers, help="row counts to compile; fewer start sooner")
    engine.add_argument("--rounds-per-call", type=int, default=4)
    engine.add_argument("--prefill-tokens", type=int, default=256, help="prompt tokens between two calls under load")
    engine.add_argument("--num-candidates", type=int, help="tokens a slot the head corrects, 0: all")
    engine.add_argument("--draft-vocabulary", type=Path, help="tokens to draft from, as of bench.py; all by default")
    engine.add_argument("--prefix-cache-tokens", type=int, help="0 turns it off; half of the slots' own by default")
    engine.add_argument("--memory-fraction", type=float, default=0.9, help="part of the device's memory to use")
    engine.add_argument("--compilation-cache", default="~/.cache/domino_jax/xla", help="directory, or none")
    plan = parser.add_argument_group("plan")
    plan.add_argument("--plan", action="store_true", help="print what fits on --topology and what a round needs there")
    plan.add_argument("--topology", help="with --plan: v5e:4x4, v6e:4x4, v5p:2x2x1, h100:8, ...")
    args = parser.parse_args(arguments)
    if args.plan != bool(args.topology) or (args.plan and not (args.target or args.config)):
        parser.error("give --plan, --topology NAME (such as v6e:4x4) and --target or --config together")
    if args.config and (args.target or args.draft):
        parser.error("give --config or --target/--draft, not both")
    if args.draft and not args.target:
        parser.error("--draft needs --target, the model it was trained for")
    if args.block_size is not None and args.block_sizes:
        parser.error("give --block-size or --block-sizes, not both")
    return args


def _run(args: argparse.Namespace) -> int:
    # Imported after the command line is read: jax takes seconds.
    from domino_jax.runs import server
    from domino_jax.serving.engine_config import EngineConfig
    from domino_jax.serving.http.settings import ApiSettings

    run = parse_command_line(["--config", args.config]).config if args.config else None
    if args.plan:
        target, draft = args.target or "", args.draft
    elif args.target:
        target, draft = args.target, args.draft
    elif run:
        target, draft = server.find_pair(run)
    else:
        target, draft = server.find_newest_pair(Path("runs"))
    keys = args.api_key or [key for key in os.environ.get("DOMINO_API_KEY", "").split(",") if key]
    asked = server.ServerOptions(
        target=target,
        draft=draft,
        draft_vocabulary=args.draft_vocabulary,
        model_id=args.served_model_name,
        mesh=args.mesh,
        dtype=args.dtype,
        draft_weights=args.draft_weights,
        host=args.host,
        port=args.port,
        max_slots=args.max_slots,
        memory_fraction=args.memory_fraction,
        engine=EngineConfig(
            max_waiting=args.max_waiting,
            max_model_len=args.max_model_len,
            block_sizes=args.block_sizes if args.block_size is None else (args.block_size,),
            batch_sizes=args.batch_sizes,
            is_adaptive=args.block_size is None,
            rounds_per_call=args.rounds_per_call,
            prefill_tokens_per_call=args.prefill_tokens,
            prefix_cache_tokens=args.prefix_cache_tokens,
            num_candidates=args.num_candidates,
        ),
        api=ApiSettings(
            model_id="model",
            api_keys=tuple(keys),
            cors_origins=tuple(args.cors_origin),
            max_connections=args.max_connections,
            request_timeout_s=args.request_timeout,
            drain_grace_s=args.drain_grace,
        ),
    )
    if args.plan:
        from domino_jax.runs.serving_plan import print_plan

        print_plan(asked, run, args.topology)
        return 0
    server.use_compilation_cache(args.compilation_cache)
    return server.serve(asked)


def main(arguments: list[str] | None = None) -> int:
    """Serve as a command line asks; return 0, 1 where the engine failed, or 2 with one sentence where it cannot run."""
    args = parse_arguments(arguments)
    status = []
    try:
        mistake = explain_or_raise(lambda: status.append(_run(args)))
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        print(f'error: serving needs {error.name}; install it with pip install -e ".[serve]"', file=sys.stderr)
        return 2
    return mistake or status[0]


if __name__ == "__main__":
    sys.exit(main())
