"""An engine on a mesh writes what one device writes; run by `test_eight_devices.py`."""

import dataclasses

import jax
import numpy as np
import pytest

from domino_jax.config import SamplingConfig
from domino_jax.records import Penalties, Request
from domino_jax.runs.server import ServerOptions, size_engine
from domino_jax.sharding import count_device_bytes
from tests.decoding.tiny_pair import make_prompts
from tests.serving.engine_driver import EngineDriver
from tests.sharding.small_pair import CONTEXT, VOCAB, make_decoder, make_layout, make_pair

FIRST = make_prompts([40], VOCAB, seed=3)[0]


def make_requests():
    """More requests than slots: greedy, sampled, filtered, adjusted, scored, plain, and two with one long beginning."""
    prompts = [*make_prompts([3, 40, 17, 30, 5, 9], VOCAB), FIRST, FIRST + [1, 2, 3]]
    sampled, filtered = SamplingConfig(temperature=0.9, seed=5), SamplingConfig(temperature=1.0, top_p=0.9, seed=6)
    fields = [
        {},
        {"sampling": sampled},
        {"sampling": filtered, "stop_ids": (7,)},
        {"penalties": Penalties(presence=0.5), "logit_bias": {5: 2.0}},
        {"num_top_logprobs": 3},
        {"use_draft": False},
        {},
        {"sampling": sampled},
    ]
    numbered = enumerate(zip(prompts, fields, strict=True))
    return [Request(f"r{i}", prompt, 10 + 3 * i, **more) for i, (prompt, more) in numbered]


def serve(layout):
    driver = EngineDriver(
        make_decoder(layout),
        layout=layout,
        max_slots=4,
        batch_sizes=(1, 4),
        is_adaptive=False,
        prefix_cache_tokens=320,
        max_model_len=CONTEXT,
    ).wait_until_ready()
    try:
        requests = make_requests()
        driver.run(requests[:-1])
        driver.run([dataclasses.replace(requests[-1], request_id="again")])  # starts from the prefix cache
        answers = {name: driver.wait_for_end(name) for name in (*(r.request_id for r in requests[:-1]), "again")}
    finally:
        driver.engine.stop()
    assert driver.engine.status().num_compiles["serving"] == 0
    return answers, driver


@pytest.fixture(scope="module")
def on_one():
    return serve(None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 2), (1, 8), (2, 4), (4, 2)], ids=str)
def test_an_engine_on_a_mesh_writes_what_one_device_writes(on_one, mesh):
    layout = make_layout(*mesh)
    answers, driver = serve(layout)
    assert answers["again"].num_cached_tokens == on_one["again"].num_cached_tokens > 0
    for name, wanted in on_one.items():
        got = answers[name]
        assert got.error == wanted.error == "", name
        assert (got.output_ids, got.sources, got.finish_reason) == (
            wanted.output_ids,
            wanted.sources,
            wanted.finish_reason,
        ), name
        assert got.acceptance_lengths == wanted.acceptance_lengths, name
        chosen = [[entry.logprob for entry in answer.logprobs] for answer in (got, wanted)]
        np.testing.assert_allclose(*chosen, atol=1e-4)
    slots, pool = driver.engine._batch._slots, driver.engine._batch._pool
    for tree in (slots, pool):
        wanted = jax.tree.leaves(layout.shardings(tree))
        for leaf, sharding in zip(jax.tree.leaves(tree), wanted, strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_the_plan_counts_what_a_device_holds():
    target, target_params, draft, _ = make_pair()
    options = ServerOptions("unused", max_slots=4)
    whole = dict(size_engine(options, target, draft)[1].parts)
    shared = dict(size_engine(options, target, draft, make_layout(1, 8))[1].parts)
    caches = next(name for name in whole if name.startswith("target's caches"))
    assert shared[caches] * 8 == whole[caches]
    assert whole["target's weights"] / 8 <= shared["target's weights"] < whole["target's weights"] / 7
    params = make_layout(1, 8).abstract(target_params)
    assert shared["target's weights"] == count_device_bytes(params)
