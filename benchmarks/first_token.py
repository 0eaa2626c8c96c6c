"""Time from the start of a server's process to its first token: with an empty compilation cache, and with a filled one.

    python benchmarks/first_token.py --output benchmarks/DATE-first-token --config configs/tiny.py --repeats 3

    python benchmarks/first_token.py --output benchmarks/DATE-first-token --layers 36 --tokenizer runs/tiny/target \\
        -- --max-slots 4 --batch-sizes 1 --block-sizes 8 --max-model-len 2000

Starts `serve.py` with a compilation cache of its own, once to fill it and then `--repeats` times more, asks for a token
as soon as it is ready, and ends it. One row a start (`rows.jsonl`): `is_cold`, `listening_s` (the first answer of any
kind), `ready_s`, `first_token_s`, all since the process began, and `cache_bytes` after it. What follows `--` is handed
to `serve.py`. With `--layers` the pair has random weights: as deep as a real target, but narrow, so that what is timed
is tracing, compiling and loading programs.
"""

import argparse
import json
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import jax

from domino_jax.checkpoints.huggingface import save_draft, save_target
from domino_jax.config import TargetConfig
from domino_jax.models.domino_head import init_draft_params
from domino_jax.models.qwen3 import init_target_params
from domino_jax.run_config import DraftSettings

ROOT = Path(__file__).resolve().parent.parent
START_S = 3600
SIZES = (128, 256, 4, 2, 32)
"""Width, MLP width, heads, key/value heads and head width of a deep pair."""


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="handed to serve.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for rows.jsonl")
    parser.add_argument("--layers", type=int, help="make a narrow random pair with so many target layers")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer that pair gets")
    parser.add_argument("--repeats", type=int, default=3, help="starts with a filled cache")
    parser.add_argument("options", nargs="*", help="options of serve.py, after --")
    args = parser.parse_args(arguments)
    if (args.layers is None) != (args.tokenizer is None):
        parser.error("--layers and --tokenizer go together")
    return args


def write_deep_pair(num_layers, tokenizer, folder):
    """Write a pair of random weights: a drafter of five layers as published, a target of `num_layers` narrow ones."""
    vocab = max(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"].values()) + 1
    width, mlp_width, *heads = SIZES
    target = TargetConfig(vocab, width, mlp_width, num_layers, *heads, tie_word_embeddings=True)
    draft = DraftSettings(num_hidden_layers=5, mask_token_id=vocab - 1).resolve(target, vocab - 1)
    save_target(folder / "target", target, init_target_params(target, jax.random.key(0)))
    save_draft(folder / "draft", draft, init_draft_params(draft, jax.random.key(1)))
    for path in [*tokenizer.glob("*token*"), *tokenizer.glob("*.jinja")]:
        shutil.copy(path, folder / "target")
    return ["--target", str(folder / "target"), "--draft", str(folder / "draft")]


def find_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(answers, process):
    """Return when `answers()` is true; tell why a server ended before."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"serve.py ended with code {process.returncode}")
        try:
            if answers():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)  # each answer takes the server a few milliseconds
    raise SystemExit(f"serve.py was not ready after {START_S} s")


def time_start(args, cache, port):
    command = [sys.executable, str(ROOT / "serve.py"), "--port", str(port), "--compilation-cache", str(cache)]
    command += (["--config", args.config] if args.config else []) + args.options
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                wait_for(lambda: client.get("/health"), process)
                listening_s = time.perf_counter() - began
                wait_for(lambda: client.get("/ready").status_code == 200, process)
                ready_s = time.perf_counter() - began
                answer = client.post("/v1/completions", json={"prompt": "def f(", "max_tokens": 1, "temperature": 0})
                answer.raise_for_status()
                first_token_s = time.perf_counter() - began
        finally:
            process.send_signal(signal.SIGTERM)
    return {"listening_s": listening_s, "ready_s": ready_s, "first_token_s": first_token_s}


def main(arguments=None):
    args = parse_arguments(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as folder:
        if args.layers:
            args.options = [*write_deep_pair(args.layers, args.tokenizer, Path(folder)), *args.options]
        for repeat in range(args.repeats + 1):
            row = {"is_cold": repeat == 0, **time_start(args, cache, find_port())}
            row["cache_bytes"] = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
            rows.append(row)
            print(json.dumps(row), flush=True)
    (args.output / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    warm_s = statistics.median(row["first_token_s"] for row in rows[1:]) if rows[1:] else None
    print(
        f"first token after {rows[0]['first_token_s']:.1f} s with an empty cache"
        + (f", {warm_s:.1f} s with a filled one" if warm_s else "")
    )


if __name__ == "__main__":
    main()
