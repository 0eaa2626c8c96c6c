"""Decoded tokens and acceptance lengths on a mesh are those of one device; run by `test_eight_devices.py`."""

import functools
from unittest import mock

import numpy as np
import pytest

from domino_jax.config import SamplingConfig
from domino_jax.decoding import cache_growth
from tests.sharding.small_pair import NUM_NEW, PROMPTS, VOCAB, make_decoder, make_layout, spread

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


NUM_CANDIDATES = {"candidates": 7, "sampled candidates": 7, "some of a draft vocabulary": 7}
WAYS |= {"candidates": {}, "sampled candidates": {"sampling": SAMPLED}, "growing caches": {"sampling": SAMPLED}}
SOME_TOKENS = np.flatnonzero(np.arange(VOCAB) % 4)
WAYS |= {"draft vocabulary": {"sampling": SAMPLED}, "some of a draft vocabulary": {}}
WAYS |= {"rejected of a draft vocabulary": {"sampling": SAMPLED, "rule": "rejection"}}
QUICK = [
    *(((1, 8, False), way) for way in ("greedy", "sampled candidates", "draft vocabulary")),
    *(((4, 2, False), way) for way in ("greedy", "rejection")),
]


def decode(layout, way):
    vocabulary = SOME_TOKENS if way.endswith("draft vocabulary") else None
    decoder = make_decoder(layout, NUM_CANDIDATES.get(way, 0), vocabulary)
    shortest = 40 if way == "growing caches" else cache_growth.SHORTEST
    with mock.patch.object(cache_growth, "SHORTEST", shortest):
        generations = decoder.generate(PROMPTS, NUM_NEW, **WAYS[way])
    return [(g.output_ids, g.token_sources, g.stats.acceptance_lengths) for g in generations]


@functools.cache
def decode_on_one(way):
    return decode(None, way)


def test_the_drafter_is_sometimes_right():
    """Without accepted blocks equal acceptance lengths would say little."""
    for way in ("greedy", "rejection"):
        assert np.mean([np.mean(lengths) for _, _, lengths in decode_on_one(way)]) > 1.3, way


@pytest.mark.parametrize(("mesh", "way"), QUICK, ids=str)
def test_what_is_decoded_is_that_of_one_device(mesh, way):
    assert decode(make_layout(*mesh), way) == decode_on_one(way)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "way"), spread(WAYS))
def test_every_way_of_decoding_is_that_of_one_device(mesh, way):
    assert decode(make_layout(*mesh), way) == decode_on_one(way)
