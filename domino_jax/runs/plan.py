"""Plan a training on devices that need not be here: compile its step for them, and say what it needs and moves.

In: a run's configuration and a topology. Out: bytes a device, operations and traffic of a step, whether it fits, and
what to change where it does not. Reads a target's `config.json` at most: no weights, no data, no hub; writes nothing.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from domino_jax.checkpoints.huggingface import CONFIG_FILE, check_draft_fits, read_target_config
from domino_jax.config import ConfigError, DraftConfig, TargetConfig, require
from domino_jax.durable import format_bytes
from domino_jax.models.qwen3 import init_target_params
from domino_jax.models.stacked_target import stack_params
from domino_jax.run_config import MeshConfig, RunConfig
from domino_jax.runs.draft import build_train_step
from domino_jax.runs.embedded import embedded_target_config
from domino_jax.runs.features import choose_feature_shape
from domino_jax.runs.program_costs import Traffic, count_flops, read_traffic
from domino_jax.runs.topologies import Topology
from domino_jax.sharding import Layout, activate, build_layout, check_sizes, count_device_bytes
from domino_jax.training.draft_init import check_start
from domino_jax.training.step import StepInputs, create_train_state

_QWEN3 = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
PUBLIC_TARGETS = {
    "qwen3-4b": TargetConfig(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        tie_word_embeddings=True, **_QWEN3,
    ),
    "qwen3-8b": TargetConfig(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, **_QWEN3
    ),
    "qwen3-14b": TargetConfig(
        hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, num_attention_heads=40, **_QWEN3
    ),
    "qwen3-32b": TargetConfig(
        hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64, **_QWEN3
    ),
}  # fmt: skip
"""Source: `config.json` of the public checkpoints Qwen/Qwen3-4B, -8B, -14B and -32B."""

ROOM_TO_WORK = 0.6
"""Share of a device that what is held between steps may fill in advice: the rest is for gradients and activations."""

MEMORY_FRACTION = 0.95
"""Share of a device's memory that JAX can be told to take."""


@dataclass(frozen=True)
class CompiledStep:
    """What the compiler and the two texts of a program say of one device, but for `flops`, of all of them.

    Attributes:
        argument_bytes: weights, moments and batch, held between steps.
        output_bytes: results that do not replace an argument.
        temporary_bytes: what is needed beside them at the fullest moment; on GPUs all that is set aside.
        compile_s: seconds that the compiler took.
    """

    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    code_bytes: int
    flops: float
    traffic: Traffic
    compile_s: float

    @property
    def total_bytes(self) -> int:
        """What a device needs at the fullest moment of a step."""
        return self.argument_bytes + self.output_bytes + self.temporary_bytes + self.code_bytes


@dataclass(frozen=True)
class TrainingPlan:
    """A step of a training on a topology; bytes are those of one device.

    Attributes:
        config: the run, with what had to be changed for it to start at all.
        target_origin: where the target's sizes are from.
        changes: what was changed, in sentences.
        step: None where the weights alone do not fit, or the compiler found no room.
        refusal: what the compiler said then.
    """

    config: RunConfig
    topology: Topology
    layout: Layout
    target_origin: str
    target_bytes: int
    draft_bytes: int
    moment_bytes: int
    changes: tuple[str, ...]
    advice: tuple[str, ...]
    step: CompiledStep | None
    refusal: str

    @property
    def held_bytes(self) -> int:
        """Weights and moments, from the shapes alone."""
        return self.target_bytes + self.draft_bytes + self.moment_bytes

    @property
    def is_fitting(self) -> bool:
        """Whether a step fits, if JAX is told to take all of the memory."""
        return self.step is not None and self.step.total_bytes <= count_usable_bytes(self.topology)


def plan_training(config: RunConfig, topology: Topology) -> TrainingPlan:
    """Return what a run's train step needs on a topology: at its widest batch, on random values.

    Raises:
        ConfigError: the target's sizes are not known here, or the mesh does not fit topology, models or batch.
        CheckpointError: the target's `config.json` cannot be used, or the drafter does not fit the target.
    """
    target, origin = find_target_sizes(config)
    draft = config.draft.resolve(target, target.vocab_size - 1)  # which token masks does not matter here
    check_draft_fits(draft, target)
    if config.draft.initial_weights == "target":
        check_start(draft, target)
    layout = build_layout(config.mesh, topology.devices)
    check_sizes(layout, target, draft)
    config, changes = fill_groups(config, layout)
    target_bytes, draft_bytes, moment_bytes = count_held_bytes(config, target, draft, layout)
    plan = partial(TrainingPlan, config, topology, layout, origin, target_bytes, draft_bytes, moment_bytes, changes)
    held = target_bytes + draft_bytes + moment_bytes
    if held > count_usable_bytes(topology):
        return plan(
            _advise_mesh(config, target, draft, topology),
            None,
            "weights and moments alone are too large, nothing was compiled",
        )
    try:
        step = compile_step(config, target, draft, layout)
    except jax.errors.JaxRuntimeError as error:
        return plan(_advise(config, target, draft, topology, layout), None, read_refusal(error))
    result = plan((), step, "")
    return result if result.is_fitting else plan(_advise(config, target, draft, topology, layout), step, "")


def read_refusal(error: jax.errors.JaxRuntimeError) -> str:
    """Return what a compiler says that found no room on its device.

    Raises:
        JaxRuntimeError: `error`, where it is another one.
    """
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return str(error).strip().splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")


def find_target_sizes(config: RunConfig) -> tuple[TargetConfig, str]:
    """Return the target's sizes and where they are from: its directory, the run itself, or the public checkpoint.

    Raises:
        ConfigError: the target is no directory here and none of the public ones.
        CheckpointError: its `config.json` cannot be used.
    """
    if config.corpus is not None:
        return embedded_target_config(config.corpus, config.corpus.vocab_size), "the target that the run builds"
    return find_sizes(config.target.path)


def find_sizes(path: str) -> tuple[TargetConfig, str]:
    """Return the sizes of a target that is a directory here or one of the public checkpoints, and where they are from.

    Raises:
        ConfigError: it is neither.
        CheckpointError: its `config.json` cannot be used.
    """
    if Path(path).expanduser().is_dir():
        return read_target_config(path)[0], str(Path(path) / CONFIG_FILE)
    name = path.rstrip("/").rpartition("/")[2].lower()
    require(
        name in PUBLIC_TARGETS,
        f"the target is {path!r}, no directory here, and a plan asks no hub; give a directory with a {CONFIG_FILE}, "
        f"or one of {', '.join(PUBLIC_TARGETS)}, whose published sizes are known",
    )
    return PUBLIC_TARGETS[name], f"published sizes of {name}; {path} itself was not read"


def compile_step(config: RunConfig, target: TargetConfig, draft: DraftConfig, layout: Layout) -> CompiledStep:
    """Return what the train step of a run needs on a layout, whose devices need not be attached.

    Raises:
        JaxRuntimeError: the compiler refuses the step; `RESOURCE_EXHAUSTED` where the devices are too small.
    """
    return compile_traced(lambda: trace_step(config, target, draft, layout), layout)


def compile_traced(trace: Callable[[], Any], layout: Layout) -> CompiledStep:
    """Return what a program needs on a layout; `trace` returns it traced.

    Raises:
        JaxRuntimeError: as of `compile_step`.
    """
    began = time.perf_counter()
    traced = trace()
    flops = count_flops(traced.jaxpr)
    with activate(layout):
        compiled = traced.lower().compile()
    memory = compiled.memory_analysis()
    return CompiledStep(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        count_temporaries(memory, layout.mesh.devices.flat[0].platform),
        memory.generated_code_size_in_bytes,
        flops,
        read_traffic(compiled.as_text()),
        time.perf_counter() - began,
    )


def count_temporaries(memory: Any, platform: str) -> int:
    """Return what a program needs of a device beside its arguments and results; `memory` is the compiler's account."""
    if platform != "tpu" or not memory.peak_memory_in_bytes:
        return memory.temp_size_in_bytes
    # libtpu's sum of temporaries is more than it sets aside and refuses programs by. The peak is what it sets aside.
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.peak_memory_in_bytes - held


def trace_step(config: RunConfig, target: TargetConfig, draft: DraftConfig, layout: Layout) -> Any:
    """Return the train step of a run, traced at its widest batch; it is lowered where the layout is active."""
    train_step = build_train_step(config, target, draft, config.train.num_steps or 1000, layout)
    trees = _state_shapes(config, draft), _target_shapes(config, target), _input_shapes(config, target, draft, layout)
    with activate(layout):
        return train_step.trace(*map(layout.abstract, trees))


def fill_groups(config: RunConfig, layout: Layout) -> tuple[RunConfig, tuple[str, ...]]:
    """Return the run with as few micro-steps as give every group of devices a sequence, and what that changed.

    Raises:
        ConfigError: no number of micro-steps does.
    """
    data, groups = config.data, layout.num_data
    if data.batch_size // data.micro_steps >= groups:
        return config, ()
    require(
        data.batch_size >= groups,
        f"data.batch_size {data.batch_size} leaves some of the {groups} groups of devices (mesh.data) without a "
        "sequence; raise it, or give mesh.model more of the devices",
    )
    micro_steps = max(n for n in _divisors(data.batch_size) if data.batch_size // n >= groups)
    change = (
        f"data.micro_steps is taken as {micro_steps}: {data.micro_steps} would leave some of the {groups} groups of "
        f"devices without a sequence, and the run would refuse it; give --config.data.micro_steps={micro_steps}"
    )
    return replace(config, data=replace(data, micro_steps=micro_steps)), (change,)


@cache
def _target_shapes(config: RunConfig, target: TargetConfig) -> Any:
    shapes = jax.eval_shape(lambda: stack_params(init_target_params(target, jax.random.key(0))))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.target.dtype)), shapes)


@cache
def _state_shapes(config: RunConfig, draft: DraftConfig) -> Any:
    return jax.eval_shape(partial(create_train_state, draft, config.optimizer), jax.random.key(0))


def _input_shapes(config: RunConfig, target: TargetConfig, draft: DraftConfig, layout: Layout) -> StepInputs:
    """Return the shapes of the widest batch, filled up as `pad_sequences` does."""
    data = config.data
    rows = data.batch_size // data.micro_steps
    padded = -(-rows // layout.num_data) * layout.num_data
    shape = data.micro_steps, padded, data.max_length
    struct = jax.ShapeDtypeStruct
    inputs = StepInputs(struct(shape, jnp.int32), struct(shape, jnp.float32), struct(shape[:2], jnp.int32))
    if padded != rows:
        inputs = inputs.replace(numbers=struct(shape[:2], jnp.int32))
    if data.feature_cache:
        kept = choose_feature_shape(config, draft, target)
        inputs = inputs.replace(features=struct((*shape, kept.feature_width), jnp.dtype(kept.dtype)))
        if kept.hidden_width:
            inputs = inputs.replace(last_hidden=struct((*shape, kept.hidden_width), jnp.dtype(kept.dtype)))
    return inputs


def count_held_bytes(
    config: RunConfig, target: TargetConfig, draft: DraftConfig, layout: Layout
) -> tuple[int, int, int]:
    """Return a device's bytes of the target, the drafter and the rest of the training's state, from shapes alone."""
    state = _state_shapes(config, draft)
    whole = count_device_bytes(layout.abstract(state))
    params = count_device_bytes(layout.abstract(state.params))
    return count_device_bytes(layout.abstract(_target_shapes(config, target))), params, whole - params


def count_usable_bytes(topology: Topology) -> int:
    """Return what a program can have of a device's memory if JAX is told to take it."""
    return int(topology.kind.memory_bytes * max(topology.kind.jax_share, MEMORY_FRACTION))


def _advise(
    config: RunConfig, target: TargetConfig, draft: DraftConfig, topology: Topology, layout: Layout
) -> tuple[str, ...]:
    """Return what lowers a step's temporaries, the cheapest first."""
    data, objective, advice = config.data, config.objective, []
    rows = data.batch_size // data.micro_steps
    fewest = [n for n in _divisors(data.batch_size) if data.batch_size // n >= layout.num_data]
    if max(fewest) > data.micro_steps:
        advice.append(
            f"--config.data.micro_steps={max(fewest)}: {data.batch_size // max(fewest)} sequences at a time, not {rows}"
        )
    larger = [c for c in list_meshes(config, target, draft, topology) if c[0].num_model > layout.num_model]
    if larger:
        advice.append(f"{format_mesh_flags(larger[0][0])}: layers, caches and logits are split over more devices")
    if not layout.fsdp and layout.num_data > 1:
        advice.append("--config.mesh.fsdp=True: weights and moments are split over the groups of devices too")
    if objective.head_chunk > 1:
        advice.append(f"--config.objective.head_chunk={objective.head_chunk // 2}: fewer logits at a time")
    if objective.attention_chunk > 1:
        advice.append(f"--config.objective.attention_chunk={objective.attention_chunk // 2}: fewer scores at a time")
    return (*advice, f"--config.data.max_length below {data.max_length}: shorter sequences")


def _advise_mesh(config: RunConfig, target: TargetConfig, draft: DraftConfig, topology: Topology) -> tuple[str, ...]:
    """Return the mesh that leaves room to work, or that none does."""
    room = count_usable_bytes(topology) * ROOM_TO_WORK
    meshes = list(list_meshes(config, target, draft, topology))
    for layout, held in meshes:
        if held <= room:
            return (f"{format_mesh_flags(layout)}: weights and moments take {format_bytes(held)} of a device",)
    smallest, held = min(meshes, key=lambda mesh: mesh[1])
    return (
        f"even {format_mesh_flags(smallest)} holds {format_bytes(held)} of weights and moments a device, which leaves "
        "too little to work with: take a topology with more or larger devices",
    )


def list_meshes(
    config: RunConfig, target: TargetConfig, draft: DraftConfig, topology: Topology
) -> Iterator[tuple[Layout, int]]:
    """Yield the meshes that divide devices, models and batch, those that exchange least first, with what they hold."""
    for model in _divisors(len(topology.devices)):
        for fsdp in (False, True):
            layout = build_layout(MeshConfig(0, model, fsdp), topology.devices)
            try:
                check_sizes(layout, target, draft)
            except ConfigError:
                continue
            if layout.num_data <= config.data.batch_size and (layout.num_data > 1 or not fsdp):
                yield layout, sum(count_held_bytes(config, target, draft, layout))


def format_mesh_flags(layout: Layout) -> str:
    """Return the options that give a run this mesh."""
    flags = f"--config.mesh.data=0 --config.mesh.model={layout.num_model}"
    return f"{flags} --config.mesh.fsdp=True" if layout.fsdp else flags


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
