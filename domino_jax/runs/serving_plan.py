"""`serve.py --plan`: what a server holds on devices that need not be here, and a round compiled for them.

In: what the command line asked for, sizes of both models and a topology. Out: slots, bytes a device by purpose, and
operations and traffic of a round with every slot in use at the longest length. Reads a `config.json` at most: no
weights, no hub; writes nothing.
"""

from dataclasses import dataclass, replace

import jax

from domino_jax.checkpoints.huggingface import check_draft_fits, read_draft_config
from domino_jax.config import ConfigError, DraftConfig, TargetConfig, require
from domino_jax.durable import format_bytes
from domino_jax.run_config import MeshConfig, RunConfig
from domino_jax.runs.plan import CompiledStep, compile_traced, find_sizes, find_target_sizes, read_refusal
from domino_jax.runs.plan_page import announce_topology, format_rows, format_traffic
from domino_jax.runs.server import ServerOptions, read_vocabulary, shape_pair, size_engine
from domino_jax.runs.topologies import Topology
from domino_jax.serving.engine_config import find_max_model_len, find_settings, plan_ladders
from domino_jax.serving.memory_plan import MemoryPlan
from domino_jax.serving.programs import Programs, Shape
from domino_jax.sharding import Layout, build_layout, check_sizes

_BATCH_SIZES = (1, 4, 16)
"""Rows that an engine compiles on accelerators, below its number of slots (`plan_ladders`)."""


@dataclass(frozen=True)
class ServingPlan:
    """A server on a topology; bytes are those of one device.

    Attributes:
        origin: where the target's sizes are from.
        limit_bytes: what the server may use.
        num_slots: sequences that run at once.
        max_model_len: tokens that each may have.
        memory: what is held, counted from shapes.
        round: a round of the widest block, all slots in use at the longest length; None where nothing was compiled.
    """

    topology: Topology
    layout: Layout
    origin: str
    limit_bytes: int
    num_slots: int
    max_model_len: int
    memory: MemoryPlan
    block_size: int
    round: CompiledStep | None

    @property
    def is_fitting(self) -> bool:
        """Whether a round fits the device as the compiler counts it; what is held fits in any case."""
        return self.round is None or self.round.total_bytes <= self.topology.kind.default_bytes


def find_pair_sizes(options: ServerOptions, run: RunConfig | None) -> tuple[TargetConfig, DraftConfig | None, str]:
    """Return the sizes of both models and where the target's are from: a run's configuration, or what is named.

    Raises:
        ConfigError: the target is no directory here and none of the public ones.
        CheckpointError: a `config.json` cannot be used, or the drafter does not fit the target.
    """
    if run is not None:
        target, origin = find_target_sizes(run)
        draft = run.draft.resolve(target, target.vocab_size - 1)  # which token masks does not matter here
    else:
        target, origin = find_sizes(options.target)
        draft = None
        if options.draft is not None:
            draft, _ = read_draft_config(options.draft)
    if draft is not None:
        check_draft_fits(draft, target)
    return target, draft, origin


def plan_serving(
    options: ServerOptions, run: RunConfig | None, topology: Topology, is_compiled: bool = True
) -> ServingPlan:
    """Return what a server needs on a topology; without compiling, what follows from shapes.

    Raises:
        ConfigError: it does not fit, with what would; or the target's sizes are not known here, or the mesh does not
            fit topology or models.
        CheckpointError: see `find_pair_sizes`.
    """
    target, draft, origin = find_pair_sizes(options, run)
    count = len(topology.devices)
    require(
        options.mesh is not None or count == 1,
        f"{topology.name} has {count} devices and a server without --mesh uses one of them; give --mesh model={count}, "
        "or as many as divide the models' heads, and data=0 for groups of them",
    )
    layout = build_layout(options.mesh or MeshConfig(), topology.devices)
    check_sizes(layout, target, draft)
    if options.engine.batch_sizes is None:
        sizes = tuple(size for size in _BATCH_SIZES if size <= (options.max_slots or max(_BATCH_SIZES)))
        options = replace(options, engine=replace(options.engine, max_slots=max(sizes, default=1), batch_sizes=sizes))
    options, _ = read_vocabulary(options, target, draft)
    config, memory = size_engine(options, target, draft, layout, topology.kind.default_bytes)
    ladders = plan_ladders(config, target, draft)
    compiled = None
    if is_compiled:
        programs = Programs(find_settings(config, target, draft, options.dtype), ladders, layout)
        programs.take_params(shape_pair(options, target, draft, layout))
        full = Shape(ladders.rows[-1], ladders.positions[-1])
        try:
            compiled = compile_traced(lambda: programs.trace_round(full, ladders.block_sizes[0]), layout)
        except jax.errors.JaxRuntimeError as error:
            raise ConfigError(
                f"a round of {config.max_slots} slots of {full.positions} positions does not fit a device of "
                f"{topology.name}: {read_refusal(error)}; take fewer --max-slots or a smaller --max-model-len"
            ) from error
    return ServingPlan(
        topology,
        layout,
        origin,
        int(topology.kind.default_bytes * options.memory_fraction),
        config.max_slots,
        find_max_model_len(config, target),
        memory,
        ladders.block_sizes[0],
        compiled,
    )


def format_plan(plan: ServingPlan) -> list[str]:
    """Return the plan as lines of text."""
    layout, kind, compiled = plan.layout, plan.topology.kind, plan.round
    lines = [
        f"target: {plan.origin}",
        f"mesh: data {layout.num_data} x model {layout.num_model}",
        f"slots: {plan.num_slots} of {plan.max_model_len} tokens each",
        "",
        f"bytes of a device, of {format_bytes(plan.limit_bytes)} that the server may use",
        *plan.memory.lines(),
    ]
    if compiled is None:
        return lines
    total = format_bytes(compiled.total_bytes)
    rows = [
        ("arguments: weights and slots", format_bytes(compiled.argument_bytes)),
        ("temporaries", format_bytes(compiled.temporary_bytes)),
        ("in all", total),
        *format_traffic(compiled, plan.topology),
    ]
    lines += [
        "",
        f"a round of block size {plan.block_size}, as compiled, all slots in use at the longest length",
        *format_rows(rows),
        "",
    ]
    room = format_bytes(kind.default_bytes)
    if plan.is_fitting:
        return [*lines, f"fits: a round takes {total} of the {room} that JAX takes"]
    return [
        *lines,
        f"does not fit: a round takes {total} of {room}; take fewer --max-slots or a smaller --max-model-len",
    ]


def print_plan(options: ServerOptions, run: RunConfig | None, topology_name: str) -> None:
    """Print what a server needs on a topology, and nothing else.

    Raises:
        TopologyError: the topology is unknown or cannot be described here.
        ConfigError, CheckpointError: see `plan_serving`.
    """
    topology = announce_topology(topology_name)
    print("\n".join(format_plan(plan_serving(options, run, topology))), flush=True)
