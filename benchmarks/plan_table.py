"""Fill the table of what trains where: one row a target and topology, compiled ahead of time for devices not here.

    python benchmarks/plan_table.py --targets qwen3-8b --topologies v6e:4x4 --rows DATE/rows.jsonl
    python benchmarks/plan_table.py --targets qwen3-8b --topologies h100:8 --serving --rows DATE/serving.jsonl
    python benchmarks/plan_table.py --rows DATE/rows.jsonl --page docs/scaling.md

The first form adds rows: settings of configs/qwen3.py, one sequence a group of devices at a time, and of all meshes the
one that exchanges least and whose step fits. TPUs need the `libtpu` package, GPUs JAX's CUDA plugin; a row of either
may be made on its own.
`--no-compile` writes what follows from shapes. `--serving` writes how many slots of some lengths `serve.py` takes
there, from shapes, both models split over as many devices as divide their heads. `--page` writes the rows into the
page, between its markers. A TPU row with `is_upper_bound` has libtpu's sum of temporaries in place of its peak.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax

from domino_jax.config import ConfigError
from domino_jax.config_flags import parse_config
from domino_jax.run_config import MeshConfig
from domino_jax.runs.plan import (
    PUBLIC_TARGETS,
    ROOM_TO_WORK,
    compile_step,
    count_held_bytes,
    count_usable_bytes,
    fill_groups,
    format_mesh_flags,
    list_meshes,
)
from domino_jax.runs.server import ServerOptions
from domino_jax.runs.serving_plan import plan_serving
from domino_jax.runs.topologies import GIB, TopologyError, find_topology
from domino_jax.serving.engine_config import EngineConfig

CONFIG = str(Path(__file__).resolve().parent.parent / "configs" / "qwen3.py")
MAX_TRIES = 3
SERVED_LENGTHS = (4096, 16384, 40960)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=sorted(PUBLIC_TARGETS), default=[])
    parser.add_argument("--topologies", nargs="+", default=[], help="v5e:4x4, v6e:4x4, v5p:2x2x1, h100:8, ...")
    parser.add_argument("--serving", action="store_true", help="slots of a server, not steps of a training")
    parser.add_argument("--no-compile", action="store_true", help="shapes alone")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL to add to and to read")
    parser.add_argument("--page", type=Path, help="page to write the table into")
    return parser.parse_args(argv)


def make_rows(name: str, topology_name: str, is_compiled: bool) -> list[dict]:
    """Return the rows of one target on one topology: those that were tried, the last one the one to take."""
    topology = find_topology(topology_name)
    target = PUBLIC_TARGETS[name]
    config = parse_config(["--config", CONFIG, f"--config.target.path=Qwen/{name}"])
    draft = config.draft.resolve(target, 0)
    meshes = list(list_meshes(config, target, draft, topology))
    usable = count_usable_bytes(topology)
    roomy = [mesh for mesh in meshes if mesh[1] <= usable * ROOM_TO_WORK]
    candidates = roomy or sorted(meshes, key=lambda mesh: mesh[1])[:1]
    rows = []
    for layout, held in candidates[:MAX_TRIES]:
        data = config.data
        micro_steps = max(
            n
            for n in range(1, data.batch_size + 1)
            if data.batch_size // n >= layout.num_data and data.batch_size % n == 0
        )
        run, _ = fill_groups(replace(config, data=replace(data, micro_steps=micro_steps)), layout)
        row = {
            "target": name,
            "topology": topology.name,
            "devices": len(topology.devices),
            "mesh": format_mesh_flags(layout),
            "micro_steps": micro_steps,
            "held_bytes": held,
            "usable_bytes": usable,
            "device_bytes": topology.kind.memory_bytes,
            "default_bytes": topology.kind.default_bytes,
            "jax": jax.__version__,
        }
        if is_compiled and held <= usable:
            row |= compile_row(run, target, draft, layout)
            row["total_bytes"] = held + row["rest_bytes"] + row["temporary_bytes"] + row["code_bytes"]
            row["fits"] = row["total_bytes"] <= usable
        rows.append(row)
        if row.get("fits", not is_compiled) or held > usable:
            break
    return rows


def compile_row(run, target, draft, layout) -> dict:
    """Return what the compiler says of a step; `rest_bytes` is the batch, beside what is held."""
    began = time.perf_counter()
    try:
        step = compile_step(run, target, draft, layout)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).strip().splitlines()[0]
        return {"refusal": said, "temporary_bytes": sys.maxsize, "rest_bytes": 0, "code_bytes": 0}
    held = sum(count_held_bytes(run, target, draft, layout))
    return {
        "flops": step.flops,
        "rest_bytes": step.argument_bytes - held + step.output_bytes,
        "temporary_bytes": step.temporary_bytes,
        "code_bytes": step.code_bytes,
        "moved_bytes": step.traffic.moved_bytes,
        "collective_bytes": step.traffic.collective_bytes,
        "compile_s": time.perf_counter() - began,
    }


def make_serving_rows(name: str, topology_name: str) -> list[dict]:
    """Return how many slots of each of some lengths a server takes; 0 where not even one fits."""
    topology = find_topology(topology_name)
    config = parse_config(["--config", CONFIG, f"--config.target.path=Qwen/{name}"])
    target, count = PUBLIC_TARGETS[name], len(topology.devices)
    model = max(n for n in range(1, count + 1) if count % n == 0 and target.num_key_value_heads % n == 0)
    rows = []
    for length in SERVED_LENGTHS:
        options = ServerOptions(
            "",
            mesh=MeshConfig(count // model, model),
            dtype="bfloat16",
            engine=EngineConfig(max_model_len=length, prefix_cache_tokens=0),
        )
        row = {
            "target": name,
            "topology": topology.name,
            "mesh": f"data={count // model},model={model}",
            "max_model_len": length,
            "jax": jax.__version__,
        }
        try:
            plan = plan_serving(options, config, topology, is_compiled=False)
            row |= {"slots": plan.num_slots, "bytes": plan.memory.total_bytes, "limit_bytes": plan.limit_bytes}
        except ConfigError:
            row |= {"slots": 0}
        rows.append(row)
    return rows


def format_serving_table(rows: list[dict]) -> str:
    """Return slots by target, topology and length."""
    lengths = sorted({row["max_model_len"] for row in rows})
    lines = [
        "| target | topology | `--mesh` | " + " | ".join(f"{length} tokens" for length in lengths) + " |",
        "| --- | --- | --- |" + " --- |" * len(lengths),
    ]
    latest = {(row["target"], row["topology"], row["max_model_len"]): row for row in rows}
    pairs = dict.fromkeys((row["target"], row["topology"]) for row in rows)
    for name, topology in sorted(pairs, key=lambda pair: (list(PUBLIC_TARGETS).index(pair[0]), pair[1])):
        own = [latest[name, topology, length] for length in lengths]
        cells = [
            f"{row['slots']} ({row['bytes'] / GIB:.1f} of {row['limit_bytes'] / GIB:.1f} GiB)" if row["slots"] else "no"
            for row in own
        ]
        lines.append(f"| {name} | {topology} | {own[0]['mesh']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_table(rows: list[dict]) -> str:
    """Return the table of the last row of every target and topology, those that were compiled before the others."""
    lines = [
        "| target | topology | settings | held + temporaries a device | of | fits |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    latest = {(row["target"], row["topology"]): row for row in sorted(rows, key=lambda row: "fits" in row)}
    for row in sorted(latest.values(), key=lambda r: (list(PUBLIC_TARGETS).index(r["target"]), r["topology"])):
        flags = f"`{row['mesh']} --config.data.micro_steps={row['micro_steps']}`"
        held, usable = row["held_bytes"] / GIB, row["usable_bytes"] / GIB
        lines.append(
            f"| {row['target']} | {row['topology']} | {flags} | {held:.1f} + {format_work(row)} GiB | "
            f"{usable:.1f} GiB | {format_verdict(row)} |"
        )
    return "\n".join(lines)


def format_work(row: dict) -> str:
    if "refusal" in row:
        return "too much"
    if "temporary_bytes" not in row:
        return "?"
    work = f"{(row['temporary_bytes'] + row['code_bytes']) / GIB:.1f}"
    return f"at most {work}" if row.get("is_upper_bound") else work


def format_verdict(row: dict) -> str:
    if "fits" not in row:
        return "no" if row["held_bytes"] > row["usable_bytes"] else "shapes alone"
    if not row["fits"]:
        return "no"
    return "yes" if row["total_bytes"] <= row["default_bytes"] else "with `XLA_CLIENT_MEM_FRACTION=0.95`"


def write_between(page: Path, name: str, text: str) -> None:
    """Put a text between the markers of that name in a page."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found_begin, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise SystemExit(f"{page} has no {begin} ... {end}; add both lines where the text is to stand")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def main() -> None:
    """Add rows, or write the table."""
    args = parse_arguments()
    jax.config.update("jax_platforms", "cpu")
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    for topology in args.topologies:
        for name in args.targets:
            try:
                if args.serving:
                    rows = make_serving_rows(name, topology)
                else:
                    rows = make_rows(name, topology, not args.no_compile)
            except TopologyError as error:
                raise SystemExit(f"plan_table: {error}") from error
            with args.rows.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            print(json.dumps(rows[-1]), flush=True)
    if args.page:
        rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
        if args.serving:
            write_between(args.page, "serving", format_serving_table(rows))
        else:
            write_between(args.page, "plans", format_table(rows))


if __name__ == "__main__":
    main()
