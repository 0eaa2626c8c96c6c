"""Load a running server over loopback, with Domino and plain, and write what its clients saw.

    python serve.py --config configs/tiny.py --max-slots 32 &
    python benchmarks/serving_load.py --prompts runs/tiny/corpus/eval.jsonl --output benchmarks/DATE-serving

    python benchmarks/serving_load.py --block-size 6 ...     (a third mode: always drafting, blocks of that size)

For every number of concurrent streams the modes take the same prompts, greedily, one mode after the other in every
order, so that a noisy machine hits all; the median repeat counts. A mode's clients begin together, and each sends its
next prompt when its last answer has ended. Texts of the modes are compared. Only loopback addresses are loaded.

One row a repeat (`rows.jsonl`): `streams`, `mode` (`domino`: the server chooses the block size, `plain`: `use_draft`
false, `fixed`: every request asks for `--block-size`), `tokens_per_s` (all streams, from the first request to the last
answer), `ttft_s` (median time to the first token), `itl_ms` (median over answers of the mean time between tokens),
`tau` (tokens a round, mean over answers that were drafted for), `host_share` (part of the engine's busy time outside
device calls), `num_tokens`, `num_answers`.
"""

import argparse
import asyncio
import ipaddress
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from urllib.parse import urlparse

import httpx

MODES = ("domino", "plain", "fixed")


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--block-size", type=int, help="a third mode that always drafts blocks of this size")
    parser.add_argument("--prompts", type=Path, required=True, help='JSONL of {"messages": [...]}')
    parser.add_argument("--output", type=Path, required=True, help="folder for rows.jsonl and table.md")
    parser.add_argument("--streams", default="1,2,4,8,16,32")
    parser.add_argument("--answers", type=int, default=64, help="answers a repeat, at least eight a stream")
    parser.add_argument("--repeats", type=int, default=6, help="best a multiple of 6, of 2 without --block-size")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--ignore-eos", action="store_true", help="every answer has max-tokens tokens")
    args = parser.parse_args(arguments)
    host = urlparse(args.url).hostname or ""
    if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
        parser.error(f"{host} is not this machine; the load goes to loopback addresses only")
    return args


def read_prompts(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    prompts = []
    for row in rows:
        messages = row["messages"]
        prompts.append(messages[:-1] if messages[-1]["role"] == "assistant" else messages)
    return prompts


async def ask(client, messages, mode, args):
    body = {
        "messages": messages,
        "temperature": 0,
        "max_tokens": args.max_tokens,
        "ignore_eos": args.ignore_eos,
        "stream": True,
        "stream_options": {"include_usage": True},
        "use_draft": mode != "plain",
        "return_metrics": True,
    } | ({"block_size": args.block_size} if mode == "fixed" else {})
    began, first_s, last_s, text, usage, metrics = time.perf_counter(), None, None, [], None, None
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            usage, metrics = chunk.get("usage") or usage, chunk.get("metrics") or metrics
            for choice in chunk["choices"]:
                if choice["delta"].get("content"):
                    last_s = time.perf_counter()
                    first_s = first_s or last_s
                    text.append(choice["delta"]["content"])
    num_tokens = usage["completion_tokens"]
    speculative = (metrics or {}).get("speculative_decoding") or {}
    return {
        "text": "".join(text),
        "num_tokens": num_tokens,
        "ttft_s": (first_s or time.perf_counter()) - began,
        "itl_ms": 1e3 * (last_s - first_s) / (num_tokens - 1) if last_s and num_tokens > 1 else None,
        "tau": speculative.get("mean_acceptance_length"),
    }


async def read_engine_seconds(client):
    text = (await client.get("/metrics")).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("domino_engine_"))
    return [float(values[f"domino_engine_{name}_seconds_total"]) for name in ("busy", "device")]


async def run_repeat(client, prompts, mode, streams, args):
    waiting = iter(enumerate(prompts))
    answers = {}

    async def one_client():
        for i, messages in waiting:
            answers[i] = await ask(client, messages, mode, args)

    before = await read_engine_seconds(client)
    began = time.perf_counter()
    await asyncio.gather(*(one_client() for _ in range(streams)))
    wall_s = time.perf_counter() - began
    busy_s, device_s = (b - a for a, b in zip(before, await read_engine_seconds(client), strict=True))
    ordered = [answers[i] for i in range(len(prompts))]
    taus = [a["tau"] for a in ordered if a["tau"]]
    row = {
        "streams": streams,
        "mode": mode,
        "tokens_per_s": sum(a["num_tokens"] for a in ordered) / wall_s,
        "ttft_s": statistics.median(a["ttft_s"] for a in ordered),
        "itl_ms": statistics.median(a["itl_ms"] for a in ordered if a["itl_ms"] is not None),
        "tau": statistics.fmean(taus) if taus else None,
        "host_share": 1 - device_s / busy_s,
        "num_tokens": sum(a["num_tokens"] for a in ordered),
        "num_answers": len(ordered),
    }
    return row, [a["text"] for a in ordered]


async def measure(args):
    prompts = read_prompts(args.prompts)
    args.output.mkdir(parents=True, exist_ok=True)
    rows, num_different = [], 0
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    modes = MODES if args.block_size else MODES[:2]
    # What a mode leaves in the prefix cache is found by the next one, so that each comes first, and after each other.
    orders = list(itertools.permutations(modes))
    async with httpx.AsyncClient(base_url=args.url, timeout=600, limits=limits) as client:
        for streams in map(int, args.streams.split(",")):
            count = max(args.answers, 8 * streams)
            chosen = [prompts[i % len(prompts)] for i in range(count)]
            for mode in modes:  # the prefix cache holds the prompts from here on, in all modes alike
                await run_repeat(client, chosen, mode, streams, args)
            for repeat in range(args.repeats):
                texts = {}
                for mode in orders[repeat % len(orders)]:
                    row, texts[mode] = await run_repeat(client, chosen, mode, streams, args)
                    rows.append({"repeat": repeat, **row})
                    print(json.dumps(rows[-1]), flush=True)
                num_different += sum(len(set(same)) > 1 for same in zip(*texts.values(), strict=True))
    (args.output / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = format_table(rows)
    (args.output / "table.md").write_text(table + f"\nanswers whose text differed between the modes: {num_different}\n")
    print(table)
    return num_different


def format_table(rows):
    """Return medians by number of streams; the ratio is the median of those within one repeat."""
    header = "| streams | mode | tokens/s | over plain | first token ms | between tokens ms | tau | host share |\n"
    lines = [header, "| --- | --- | --- | --- | --- | --- | --- | --- |\n"]
    for streams in sorted({row["streams"] for row in rows}):
        by_mode = {m: [r for r in rows if r["streams"] == streams and r["mode"] == m] for m in MODES}
        for mode in filter(by_mode.get, MODES):
            pairs = zip(by_mode[mode], by_mode["plain"], strict=True)
            ratios = [row["tokens_per_s"] / plain["tokens_per_s"] for row, plain in pairs]
            median = {
                name: statistics.median(values)
                if (values := [r[name] for r in by_mode[mode] if r[name] is not None])
                else 0
                for name in ("tokens_per_s", "ttft_s", "itl_ms", "tau", "host_share")
            }
            spread = f" ({min(ratios):.2f} to {max(ratios):.2f})"
            ratio = "1" if mode == "plain" else f"{statistics.median(ratios):.2f}{spread}"
            tau = f"{median['tau']:.2f}" if median["tau"] else "-"
            lines.append(
                f"| {streams} | {mode} | {median['tokens_per_s']:.0f} | {ratio} | {1e3 * median['ttft_s']:.0f} | "
                f"{median['itl_ms']:.2f} | {tau} | {median['host_share']:.1%} |\n"
            )
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(1 if asyncio.run(measure(parse_arguments())) else 0)
