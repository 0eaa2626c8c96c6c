"""`train.py --plan`: print what a run's train step needs on a topology."""

import jax

from domino_jax.durable import format_bytes
from domino_jax.run_config import RunConfig
from domino_jax.runs.plan import MEMORY_FRACTION, CompiledStep, TrainingPlan, plan_training
from domino_jax.runs.topologies import Topology, find_topology


def print_plan(config: RunConfig, topology_name: str) -> None:
    """Print what a run's train step needs on a topology, and nothing else.

    Raises:
        TopologyError: the topology is unknown or cannot be described here.
        ConfigError: the target's sizes are not known here, or the mesh does not fit topology, models or batch.
        CheckpointError: the target's `config.json` cannot be used, or the drafter does not fit the target.
    """
    topology = announce_topology(topology_name)
    print("\n".join(format_plan(plan_training(config, topology))), flush=True)


def announce_topology(name: str) -> Topology:
    """Return the topology called `name` and print what it is; the devices of this machine are left alone from now on.

    Raises:
        TopologyError: it is unknown or cannot be described here.
    """
    jax.config.update("jax_platforms", "cpu")
    topology = find_topology(name)
    print(
        f"\nplan for {topology.name}: {len(topology.devices)} x {topology.devices[0].device_kind}, nothing is run; "
        "compiling takes minutes at full size",
        flush=True,
    )
    return topology


def format_plan(plan: TrainingPlan) -> list[str]:
    """Return the plan as lines of text."""
    config, layout, topology = plan.config, plan.layout, plan.topology
    data = config.data
    lines = [
        f"target: {plan.target_origin}",
        f"mesh: data {layout.num_data} x model {layout.num_model}{', fsdp' if layout.fsdp else ''}",
        f"batch: {data.batch_size} sequences of {data.max_length} tokens in {data.micro_steps} micro-steps",
        *(f"note: {change}" for change in plan.changes),
        "",
        "bytes of a device",
        *format_rows(_memory_rows(plan)),
        "",
    ]
    if plan.step:
        lines += ["a step", *format_rows(format_traffic(plan.step, topology)), ""]
        if topology.platform == "cuda" and not data.feature_cache:
            lines.append(
                "note: the target's attention scores are counted as written to memory; on the device cuDNN's kernel, "
                "where it has one, writes none"
            )
    lines.append(_verdict(plan))
    return lines + [f"  {one}" for one in plan.advice]


def _memory_rows(plan: TrainingPlan) -> list[tuple[str, str]]:
    rows = [
        ("target's weights", format_bytes(plan.target_bytes)),
        ("drafter's weights (float32)", format_bytes(plan.draft_bytes)),
        ("optimizer's moments", format_bytes(plan.moment_bytes)),
    ]
    step = plan.step
    if step:
        rows += [
            ("arguments: those and the batch", format_bytes(step.argument_bytes)),
            ("temporaries: gradients, features, activations, logits", format_bytes(step.temporary_bytes)),
            ("results beside the arguments they replace", format_bytes(step.output_bytes)),
            ("the program", format_bytes(step.code_bytes)),
            ("in all", format_bytes(step.total_bytes)),
        ]
    return [*rows, ("a device has", format_bytes(plan.topology.kind.memory_bytes))]


def format_traffic(step: CompiledStep, topology: Topology) -> list[tuple[str, str]]:
    """Return names and values of what a compiled program computes and moves on a topology."""
    kind, count = topology.kind, len(topology.devices)
    exchanged = step.traffic.collective_bytes
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in sorted(exchanged.items()))
    compute_s = step.flops / count / kind.flops_per_s
    memory_s = step.traffic.moved_bytes / kind.bandwidth_bytes_per_s
    rows = [
        ("FLOPs of all devices", f"{step.flops / 1e12:.4g} TFLOP"),
        ("bytes moved by a device", format_bytes(step.traffic.moved_bytes)),
        ("collective bytes of a device", format_bytes(sum(exchanged.values())) + (f" ({parts})" if parts else "")),
        ("at the published rates not below", f"{max(compute_s, memory_s):.3g} s "
         f"(products {compute_s:.3g} s, memory {memory_s:.3g} s)"),
        ("compiled in", f"{step.compile_s:.0f} s"),
    ]  # fmt: skip
    if step.traffic.num_unknown_loops:
        rows.append(("loops of unknown length, counted once", str(step.traffic.num_unknown_loops)))
    return rows


def _verdict(plan: TrainingPlan) -> str:
    step, kind = plan.step, plan.topology.kind
    if step is None:
        return f"does not fit: {plan.refusal}; instead"
    total = format_bytes(step.total_bytes)
    if step.total_bytes <= kind.default_bytes:
        return f"fits: {total} of the {format_bytes(kind.default_bytes)} that JAX takes"
    if plan.is_fitting:
        return f"fits with XLA_CLIENT_MEM_FRACTION={MEMORY_FRACTION}: {total}; JAX takes {kind.jax_share:.0%} by itself"
    return f"does not fit: {total} of {format_bytes(kind.memory_bytes)}; instead"


def format_rows(pairs: list[tuple[str, str]]) -> list[str]:
    """Return names and values as indented lines, the values below each other."""
    width = max(len(name) for name, _ in pairs)
    return [f"  {name:{width}}  {value}" for name, value in pairs]
