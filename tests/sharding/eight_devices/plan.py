"""What devices exchange is counted as it is, and a plan advises a mesh that holds the models."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from domino_jax.config_flags import parse_config
from domino_jax.run_config import MeshConfig
from domino_jax.runs import plan as plans
from domino_jax.runs.plan import find_target_sizes, plan_training, trace_step
from domino_jax.runs.plan_page import format_plan
from domino_jax.runs.program_costs import count_flops, read_traffic
from domino_jax.runs.topologies import DeviceKind, Topology
from domino_jax.sharding import build_layout
from tests.conftest import REPOSITORY
from tests.runs.test_plan import make_config

STEPS, ROWS, WIDTH, MLP = 7, 16, 32, 64


def make_topology(memory_bytes):
    return Topology("eight", "cpu", DeviceKind(memory_bytes, 1e9, 1e12), jax.devices())


def test_a_product_over_split_rows_is_summed_once_a_step():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def place(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    def chain(x, up, down):
        def body(c, ws):
            hidden = jax.lax.with_sharding_constraint(jnp.tanh(c @ ws[0]), place("data", "model"))
            return jax.lax.with_sharding_constraint(hidden @ ws[1], place("data", None)), None

        return jax.lax.scan(body, x, (up, down))[0]

    struct = jax.ShapeDtypeStruct
    traced = jax.jit(chain).trace(
        struct((ROWS, WIDTH), jnp.float32, sharding=place("data", None)),
        struct((STEPS, WIDTH, MLP), jnp.float32, sharding=place(None, None, "model")),
        struct((STEPS, MLP, WIDTH), jnp.float32, sharding=place(None, "model", None)),
    )
    traffic = read_traffic(traced.lower().compile().as_text())
    assert traffic.collective_bytes == {"all-reduce": STEPS * ROWS // 2 * WIDTH * 4}
    assert count_flops(traced.jaxpr) == STEPS * 2 * 2 * ROWS * WIDTH * MLP


def make_divisible_config(batch_size, micro_steps):
    config = make_config(mesh=MeshConfig(data=4, model=2))
    corpus = replace(config.corpus, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    return replace(config, corpus=corpus, data=replace(config.data, batch_size=batch_size, micro_steps=micro_steps))


@pytest.mark.slow
def test_a_plan_fills_the_groups_and_counts_what_they_exchange():
    plan = plan_training(make_divisible_config(4, 2), make_topology(2**30))
    assert plan.config.data.micro_steps == 1
    assert "--config.data.micro_steps=1" in plan.changes[0]
    assert plan.step.traffic.collective_bytes["all-reduce"] >= plan.draft_bytes  # gradients over the groups
    assert any("fits: " in line for line in format_plan(plan))


def test_flops_do_not_depend_on_the_mesh():
    config = make_divisible_config(8, 1)
    target, _ = find_target_sizes(config)
    draft = config.draft.resolve(target, 0)

    def count(mesh):
        layout = build_layout(mesh, jax.devices()[: mesh.data * mesh.model])
        return count_flops(trace_step(config, target, draft, layout).jaxpr)

    one = count(MeshConfig(1, 1))
    # Chunks are filled up by every device on its own.
    assert [count(MeshConfig(8, 1)), count(MeshConfig(4, 2))] == pytest.approx([one, one], rel=1e-3)
    assert one > 0


def test_weights_that_do_not_fit_are_spread():
    config = parse_config(["--config", f"{REPOSITORY}/configs/qwen3.py:8b"])
    plan = plan_training(config, make_topology(20 * 2**30))
    assert plan.step is None
    assert "--config.mesh.model=" in plan.advice[0]
    model = int(plan.advice[0].partition("mesh.model=")[2].split()[0].rstrip(":"))
    mesh = MeshConfig(model=model, fsdp="fsdp=True" in plan.advice[0])
    target, _ = find_target_sizes(config)
    draft = config.draft.resolve(target, 0)
    layout = build_layout(mesh, jax.devices())
    assert sum(plans.count_held_bytes(config, target, draft, layout)) < 0.6 * 20 * 2**30
