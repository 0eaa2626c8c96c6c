"""Estimate data, hours, cost and bottlenecks of a whole training on 8, 64 and 512 chips; nothing is measured here.

    python benchmarks/scaling_estimate.py --target qwen3-8b --length 3072 --num-anchors 512 --page docs/scaling.md

Operations follow from shapes (`count_flops` of accelerator_training.py); times from published rates of the chips and
from the share of them that one H200 was measured to reach (docs/performance.md). What is taken from elsewhere stands
with its source in this file. With --page the tables are written into it, between their markers.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from accelerator_training import count_flops
from plan_table import write_between

from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.run_config import DraftSettings
from domino_jax.runs.plan import PUBLIC_TARGETS
from domino_jax.runs.topologies import GPU_KINDS, TPU_KINDS, DeviceKind

SAMPLES, EPOCHS = 1_400_000, 6
PUBLISHED_RATE, PUBLISHED_TFLOP = 50.1, 45.0
PUBLISHED_LENGTH, PUBLISHED_ANCHORS, PUBLISHED_TOKENS = 768, 256, 550
"""Samples a second on 8 x H200 (one serves the target, seven train), TFLOP a sample of the drafter's forward and
backward pass at that length and number of anchors, and mean tokens of a sample.
Source: sgl-project/SpecForge, examples/disagg/PERF_FINDINGS.md, commit adf7f99."""

MEASURED_S, MEASURED_LENGTH, MEASURED_ANCHORS = 0.327, 3072, 512
"""Seconds a sequence of Qwen3-8B on one H200. Source: benchmarks/2026-11-26-gpu."""

BUCKET = 1024
"""Width that a sample of mean length is padded to in configs/qwen3.py."""

WRITTEN_GRADIENT_BYTES = 2
"""Bytes a weight that groups of devices sum in a micro-step as the step is written: one sum (the published objective
has one denominator) of gradients of weights that were cast to bfloat16."""

COMPILED_GRADIENT_BYTES = 2_404_880_360 / 1.10e9
"""All-reduced bytes a weight and step that XLA made for Qwen3-8B on 8 x H100: it moves the sum behind the loop over
micro-steps. Source: benchmarks/2026-11-26-plans/rows.jsonl."""

CHIPS = (8, 64, 512)
BATCH = 512
"""Sequences of an optimizer step: one a chip at 512 chips."""


@dataclass(frozen=True)
class Fleet:
    """Chips of a kind and what connects them.

    Attributes:
        link: bytes a second that a chip sends to its neighbours while it receives as many.
        network: the same between groups of `group` chips.
        price: US dollars an hour, lowest and highest found; None: no source at hand.
    """

    kind: DeviceKind
    link: float
    network: float
    group: int
    price: tuple[float, float] | None


FLEETS = {
    "h100": Fleet(GPU_KINDS["h100"], 450e9, 50e9, 8, (2.58, 6.16)),
    "h200": Fleet(GPU_KINDS["h200"], 450e9, 50e9, 8, (3.45, 6.31)),
    "v5e": Fleet(TPU_KINDS["v5e"], 200e9, 3.1e9, 256, None),
    "v5p": Fleet(TPU_KINDS["v5p"], 600e9, 6.2e9, 8960, None),
    "v6e": Fleet(TPU_KINDS["v6e"], 400e9, 12.5e9, 256, (2.70, 2.70)),
}
"""Source: NVLink 4 (900 GB/s both ways) and one 400 Gbit/s adapter a GPU, NVIDIA's data sheets of HGX H100 and H200;
ICI (400, 800 and 1200 GB/s both ways a chip) and data-centre network, docs.cloud.google.com/tpu/docs/v5e, v6e and
v5p-training, of v6e's network 4 x 200 Gbit/s a host of 8. Prices: renshuBTC/compute-screener,
data/gpu_providers_latest.csv of 2026-10-24 (means of providers on demand); v6e: neowin.net on Trillium's general
availability, on demand."""


@dataclass(frozen=True)
class Work:
    """One sequence: operations of the target and the drafter; bytes of what is exchanged and read."""

    target_flops: float
    draft_flops: float
    draft_params: int
    target_params: int
    feature_bytes_a_token: int


def count_work(target: TargetConfig, length: int, num_anchors: int) -> tuple[Work, DraftConfig]:
    """Return the work of one padded sequence, and the drafter of the published settings."""
    draft = DraftSettings(mask_token_id=151669).resolve(target, 0)
    flops = count_flops(target, draft, length, num_anchors)
    of_target = flops.pop("target")
    layer, width = layer_weights(draft), draft.hidden_size
    head = 3 * draft.gru_hidden_dim * (width + draft.gru_hidden_dim)
    head += draft.emb_dim * (width + draft.gru_hidden_dim + draft.vocab_size)
    params = draft.num_hidden_layers * layer + len(draft.target_layer_ids) * width**2 + head
    embeddings = target.vocab_size * target.hidden_size * (1 if target.tie_word_embeddings else 2)
    held = target.num_hidden_layers * layer_weights(target) + embeddings
    features = 2 * len(draft.target_layer_ids) * width
    return Work(of_target, sum(flops.values()), params, held, features), draft


def layer_weights(config: TargetConfig | DraftConfig) -> int:
    """Return the matrix weights of one layer."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)


def dense_attention_flops(draft: DraftConfig, length: int, num_anchors: int) -> float:
    """Return what draft attention costs where every block's query meets every key, forward and backward."""
    queries = num_anchors * draft.block_size
    keys = length + queries
    return 3.5 * 4 * draft.num_hidden_layers * queries * keys * draft.num_attention_heads * draft.head_dim


def measured_share() -> float:
    """Return the share of the H200's published rate that the measured step reached."""
    work, _ = count_work(PUBLIC_TARGETS["qwen3-8b"], MEASURED_LENGTH, MEASURED_ANCHORS)
    return (work.target_flops + work.draft_flops) / MEASURED_S / GPU_KINDS["h200"].flops_per_s


def reduce_seconds(fleet: Fleet, num_chips: int, size: float) -> float:
    """Return the seconds of a ring all-reduce of `size` bytes: inside a group, then the groups' shares between them."""
    inside = min(num_chips, fleet.group)
    groups = num_chips // inside
    seconds = 2 * size * (inside - 1) / inside / fleet.link
    return seconds + 2 * size / inside * (groups - 1) / groups / fleet.network


def gather_seconds(fleet: Fleet, num_chips: int, size: float) -> float:
    """Return the seconds until every chip has all of `size` bytes that lie spread over them."""
    return reduce_seconds(fleet, num_chips, size) / 2


def format_tables(args: argparse.Namespace) -> str:
    """Return all tables."""
    target = PUBLIC_TARGETS[args.target]
    titles = (
        "#### Operations and bytes",
        f"#### Hours and cost of {SAMPLES * EPOCHS / 1e6:.1f} M samples of {args.length} tokens",
        "#### Where a micro-step of one sequence a chip spends its time",
    )
    tables = (format_samples(target, args), format_fleets(target, args), format_parts(target, args))
    return "\n\n".join(f"{title}\n\n{table}" for title, table in zip(titles, tables, strict=True))


def format_samples(target: TargetConfig, args: argparse.Namespace) -> str:
    """Return operations, bytes and hours of both settings."""
    lines = [
        "| settings | drafter, TFLOP a sample | target's forward, TFLOP | all, EFLOP | 8 x H200, measured share |",
        "| --- | --- | --- | --- | --- |",
    ]
    total = SAMPLES * EPOCHS
    for name, length, anchors in (
        ("published", PUBLISHED_LENGTH, PUBLISHED_ANCHORS),
        ("this project's, a row of mean length", BUCKET, args.num_anchors),
        ("this project's, the widest row", args.length, args.num_anchors),
    ):
        work, _ = count_work(target, length, anchors)
        flops = work.draft_flops + work.target_flops
        rate = 8 * GPU_KINDS["h200"].flops_per_s * measured_share() / flops
        lines.append(
            f"| {name}: {length} tokens, {anchors} anchors | {work.draft_flops / 1e12:.1f} | "
            f"{work.target_flops / 1e12:.1f} | {flops * total / 1e18:.0f} | {rate:.0f} samples/s, "
            f"{total / rate / 3600:.0f} h |"
        )
    work, draft = count_work(target, args.length, args.num_anchors)
    tokens = SAMPLES * PUBLISHED_TOKENS
    held = tokens * work.feature_bytes_a_token
    hours = total / PUBLISHED_RATE / 3600
    cost = format_cost(8 * hours, args.prices.get("h200", FLEETS["h200"].price))
    lines += [
        "",
        f"- Published, measured by others: {PUBLISHED_RATE} samples/s, so {hours:.0f} h and {8 * hours:.0f} GPU hours "
        f"on 8 x H200, {cost} US dollars.",
        f"- Data: {tokens / 1e9:.2f} G tokens of {PUBLISHED_TOKENS} a sample; ids and masks {tokens * 5 / 1e9:.1f} GB.",
        f"- Drafter: {work.draft_params / 1e9:.2f} G weights; published: about 1.1 G.",
        f"- Draft attention where every block's query meets every key, as a dense mask counts it, at the published "
        f"setting: {dense_attention_flops(draft, PUBLISHED_LENGTH, PUBLISHED_ANCHORS) / 1e12:.1f} TFLOP a sample.",
        f"- Feature cache in bfloat16: {work.feature_bytes_a_token / 1000:.1f} kB a token, "
        f"{PUBLISHED_TOKENS * work.feature_bytes_a_token / 1e6:.1f} MB a sample, {held / 1e12:.1f} TB in all; "
        f"read at {PUBLISHED_RATE * PUBLISHED_TOKENS * work.feature_bytes_a_token / 1e9:.2f} GB/s to keep up with the "
        "published rate.",
    ]
    return "\n".join(lines)


def format_fleets(target: TargetConfig, args: argparse.Namespace) -> str:
    """Return hours and cost of this project's settings by kind and number of chips, compute alone."""
    work, _ = count_work(target, args.length, args.num_anchors)
    flops = (work.draft_flops + work.target_flops) * SAMPLES * EPOCHS
    lines = ["| chips | 8 | 64 | 512 | chip hours | US dollars |", "| --- | --- | --- | --- | --- | --- |"]
    for name, fleet in FLEETS.items():
        seconds = flops / fleet.kind.flops_per_s / measured_share()
        hours = [f"{seconds / n / 3600:.1f} h" for n in CHIPS]
        cost = format_cost(seconds / 3600, args.prices.get(name, fleet.price))
        lines.append(f"| {name} | {' | '.join(hours)} | {seconds / 3600:,.0f} | {cost} |")
    return "\n".join(lines)


def format_cost(hours: float, price: tuple[float, float] | None) -> str:
    """Return what chip hours cost, lowest and highest."""
    if price is None:
        return "no price at hand"
    return " to ".join(f"{hours * one:,.0f}" for one in sorted(set(price)))


def format_parts(target: TargetConfig, args: argparse.Namespace) -> str:
    """Return the parts of a micro-step with one sequence a chip, and what the input has to deliver."""
    work, _ = count_work(target, args.length, args.num_anchors)
    lines = [
        "| chips | target's forward | drafter | gradients as written | as compiled | "
        "fsdp's gathers | share of gradients as written | a feature cache delivers |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in ("h200", "v6e"):
        fleet = FLEETS[name]
        rate = fleet.kind.flops_per_s * measured_share()
        compute = (work.target_flops + work.draft_flops) / rate
        for chips in CHIPS:
            gradients = reduce_seconds(fleet, chips, WRITTEN_GRADIENT_BYTES * work.draft_params)
            once = reduce_seconds(fleet, chips, COMPILED_GRADIENT_BYTES * work.draft_params) * chips / BATCH
            gathers = gather_seconds(fleet, chips, 2 * work.target_params + 4 * work.draft_params)
            read = chips * args.length * work.feature_bytes_a_token / (work.draft_flops / rate)
            times = (work.target_flops / rate, work.draft_flops / rate, gradients, once, gathers)
            cells = [*(f"{1000 * seconds:.0f} ms" for seconds in times)]
            cells += [f"{gradients / (gradients + compute):.0%}", f"{read / 1e9:.0f} GB/s"]
            lines.append(f"| {chips} x {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=sorted(PUBLIC_TARGETS), default="qwen3-8b")
    parser.add_argument("--length", type=int, default=3072, help="tokens a sequence is padded to")
    parser.add_argument("--num-anchors", type=int, default=512)
    parser.add_argument("--price", action="append", default=[], metavar="KIND=DOLLARS", help="an hour of a chip")
    parser.add_argument("--page", type=Path, help="page to write the tables into")
    args = parser.parse_args(argv)
    args.prices = {}
    for given in args.price:
        kind, _, dollars = given.partition("=")
        if kind not in FLEETS or not dollars.replace(".", "", 1).isdigit():
            parser.error(f"--price is {given!r}; give KIND=DOLLARS, with one of {', '.join(FLEETS)}")
        args.prices[kind] = (float(dollars), float(dollars))
    return args


def main() -> None:
    """Print the tables, or write them into a page."""
    args = parse_arguments()
    if args.page:
        write_between(args.page, "estimate", format_tables(args))
    else:
        print(format_tables(args))


if __name__ == "__main__":
    main()
