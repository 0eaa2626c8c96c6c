"""Caches that grow along a batch: the records are those of caches that are long from the start."""

import jax
import numpy as np
import pytest

from domino_jax.config import SamplingConfig
from domino_jax.decoding import cache_growth, generate
from domino_jax.decoding.cache_growth import first_cache_len
from domino_jax.decoding.state import DecodeSettings
from tests.decoding.tiny_pair import full_sequences, make_configs, make_decoder, make_prompts, propose_known, with_known

PROMPTS = make_prompts([5, 30, 3, 17], seed=4)
BUDGETS = [90, 20, 100, 64]
SAMPLING = [SamplingConfig(temperature=t, seed=i) for i, t in enumerate((0.0, 0.8, 1.1, 0.6))]


@pytest.mark.parametrize(
    ("needed", "longest", "expected"),
    [(64, 128, 128), (64, 1023, 1023), (64, 1024, 512), (513, 4096, 2048), (513, 4095, 4095), (2049, 40960, 8192)],
)
def test_first_cache_len(needed, longest, expected):
    assert first_cache_len(needed, longest) == expected


@pytest.mark.parametrize(
    ("sampling", "way"),
    [(SamplingConfig(), {}), (SAMPLING, {}), (SAMPLING, {"rule": "rejection"}), (SAMPLING, {"block_size": 1})],
    ids=["greedy", "seed-exact", "rejection", "plain"],
)
def test_records_are_those_of_long_caches(monkeypatch, sampling, way):
    texts = make_decoder().generate(PROMPTS, BUDGETS, sampling, block_size=1, batch_size=8)
    decoder = with_known(make_decoder(), [ids[:60] for ids in full_sequences(texts)])
    run = {"max_new_tokens": BUDGETS, "sampling": sampling, "stop_ids": [[7], [], [], [9]], "batch_size": 8, **way}
    long = decoder.generate(PROMPTS, propose=propose_known, **run)
    lengths = record_lengths(monkeypatch)
    monkeypatch.setattr(cache_growth, "SHORTEST", 16)
    monkeypatch.setattr(cache_growth, "_FACTOR", 2)
    assert decoder.generate(PROMPTS, propose=propose_known, **run) == long
    assert lengths[-2:] == [64, 128]


def test_a_batch_that_ends_early_never_gets_long_caches(monkeypatch):
    decoder = make_decoder()
    stop = [decoder.generate(PROMPTS[:1], 4, block_size=1)[0].output_ids[2]]
    lengths = record_lengths(monkeypatch)
    monkeypatch.setattr(cache_growth, "SHORTEST", 32)
    (row,) = decoder.generate(PROMPTS[:1], 100, stop_ids=stop)
    assert row.finish_reason == "stop" and lengths == [32]


def record_lengths(monkeypatch):
    """Return a list that gets the length of the caches of every run of a loop."""
    lengths = []
    decode_growing = generate.decode_growing

    def recorded(run, state):
        def run_recorded(state):
            lengths.append(state.target_cache.num_positions)
            assert state.draft_cache is None or state.draft_cache.num_positions == lengths[-1]
            if len(lengths) > 1:
                shorter = (*state.target_cache.keys[0].shape[:-1], lengths[-2])
                assert all(x.shape != shorter for x in jax.live_arrays()), "the shorter caches are held"
            return run(state)

        return decode_growing(run_recorded, state)

    monkeypatch.setattr(generate, "decode_growing", recorded)
    return lengths


def test_a_row_that_is_done_never_holds_a_batch_up():
    """Its next round would not fit, which is nobody's business."""
    target, _ = make_configs()
    state = generate.init_state(DecodeSettings(target), [[1], [2]], [120, 8], [SamplingConfig()] * 2, [()] * 2)
    committed_len = np.array([state.target_cache.num_positions, 4], np.int32)
    state = state.replace(committed_len=committed_len)
    go_on = {done: bool(cache_growth.can_go_on(state.replace(is_done=np.array(done)), 1)) for done in DONE}
    assert go_on == {(True, False): True, (False, False): False, (True, True): False, (False, True): False}


DONE = [(True, False), (False, False), (True, True), (False, True)]
