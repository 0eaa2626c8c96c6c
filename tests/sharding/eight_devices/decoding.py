"""Decoded tokens and acceptance lengths on a mesh are those of one device; run by `test_eight_devices.py`."""

import functools

import numpy as np
import pytest

from domino_jax.config import SamplingConfig
from tests.decoding.tiny_pair import make_prompts
from tests.sharding.small_pair import OTHERS, QUICK, VOCAB, make_decoder, make_layout

PROMPTS = make_prompts([3, 17, 30, 5, 9], VOCAB)
SAMPLED = [SamplingConfig(temperature=t, seed=s) for s, t in enumerate((0.0, 0.9, 1.2, 0.7, 0.0))]
FILTERED = [SamplingConfig(), *(SamplingConfig(temperature=0.9, top_k=20, top_p=0.9, seed=s) for s in range(1, 5))]
WAYS = {
    "greedy": {},
    "seed-exact": {"sampling": SAMPLED},
    "filters": {"sampling": FILTERED},
    "rejection": {"sampling": SAMPLED, "rule": "rejection"},
    "plain": {"block_size": 1, "sampling": SAMPLED},
    # The last batch has one prompt; the rows beside it are padding.
    "uneven batches": {"batch_size": 4},
    "no head": {"use_head": False},
}


def decode(layout, way):
    generations = make_decoder(layout).generate(PROMPTS, 24, **WAYS[way])
    return [(g.output_ids, g.token_sources, g.stats.acceptance_lengths) for g in generations]


@functools.cache
def decode_on_one(way):
    return decode(None, way)


def test_the_drafter_is_sometimes_right():
    """Without accepted blocks equal acceptance lengths would say little."""
    for way in ("greedy", "seed-exact", "filters", "rejection"):
        assert np.mean([np.mean(lengths) for _, _, lengths in decode_on_one(way)]) > 1.3, way


@pytest.mark.parametrize("mesh", QUICK, ids=str)
@pytest.mark.parametrize("way", ["greedy", "rejection"])
def test_tokens_and_acceptance_are_those_of_one_device(mesh, way):
    assert decode(make_layout(*mesh), way) == decode_on_one(way)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", QUICK + OTHERS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_decoding_is_that_of_one_device(mesh, way):
    assert decode(make_layout(*mesh), way) == decode_on_one(way)
