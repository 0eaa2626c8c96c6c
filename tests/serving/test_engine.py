import dataclasses
import gc
import itertools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.config import ConfigError, SamplingConfig
from domino_jax.decoding.generate import Decoder
from domino_jax.decoding.prefill import MAX_PADDING
from domino_jax.models.qwen3 import Qwen3
from domino_jax.records import Penalties, Request
from domino_jax.serving.contract import EngineUnavailableError, QueueFullError
from tests.decoding.tiny_pair import CONTEXT, SHARP, VOCAB, make_decoder, make_prompts
from tests.serving.engine_driver import EngineDriver, make_params

STOP_ID = 7
FULL, HALF = 5, 3
_ids = (f"r{i}" for i in itertools.count())


@pytest.fixture(scope="module")
def decoder():
    return make_decoder()


@pytest.fixture(scope="module")
def driver(decoder):
    """Four slots, the full block always, a prefix cache of 40 blocks."""
    driver = EngineDriver(
        decoder,
        max_slots=4,
        max_waiting=30,
        batch_sizes=(1, 4),
        is_adaptive=False,
        prefix_cache_tokens=640,
        prefill_tokens_per_call=64,
    ).wait_until_ready()
    yield driver
    driver.engine.stop()
    assert driver.engine.status().num_compiles["serving"] == 0


def make_request(prompt, max_new_tokens=24, **fields):
    return Request(next(_ids), prompt, max_new_tokens, **fields)


def make_mixed_requests(num_requests, seed=0, **fields):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 90, num_requests)
    requests = []
    for i, prompt in enumerate(make_prompts(lengths, seed=seed)):
        sampling = [SamplingConfig(), SHARP, SamplingConfig(temperature=1.2)][i % 3]
        requests.append(
            make_request(
                prompt,
                int(generator.integers(1, 60)),
                sampling=dataclasses.replace(sampling, seed=i),
                stop_ids=(STOP_ID,) if i % 2 else (),
                **fields,
            )
        )
    return requests


def decode_alone(decoder, request):
    [wanted] = decoder.generate(
        [request.prompt_ids], request.max_new_tokens, request.sampling, stop_ids=request.stop_ids
    )
    return wanted


def test_requests_that_join_and_leave_get_what_each_would_get_alone(decoder, driver):
    requests = make_mixed_requests(14)
    answers = driver.run(requests)
    for request, answer in zip(requests, answers, strict=True):
        wanted = decode_alone(decoder, request)
        assert answer.output_ids == wanted.output_ids
        assert answer.acceptance_lengths == wanted.stats.acceptance_lengths
        assert answer.sources == wanted.token_sources
        assert answer.finish_reason == wanted.finish_reason
    assert {a.finish_reason for a in answers} == {"stop", "length", "context"}
    status = driver.engine.status()
    assert (status.num_running, status.num_waiting) == (0, 0)


def test_a_request_without_drafts_among_others_has_the_same_text(decoder, driver):
    drafted = make_mixed_requests(6, seed=3)
    plain = [dataclasses.replace(r, request_id=next(_ids), use_draft=False) for r in drafted]
    answers = driver.run([request for pair in zip(drafted, plain, strict=True) for request in pair])
    for with_draft, without in zip(answers[::2], answers[1::2], strict=True):
        assert without.output_ids == with_draft.output_ids
        assert without.finish_reason == with_draft.finish_reason
        assert set(without.acceptance_lengths) <= {1}
        assert set(without.sources) == {"target"}
        assert {event.num_draft_tokens for event in without.events} == {0}
    assert any(max(a.acceptance_lengths, default=1) > 1 for a in answers[::2])


def test_a_block_size_that_is_asked_for_is_used_and_teaches_nothing(decoder):
    sizes = 4, 2
    driver = EngineDriver(decoder, max_slots=4, batch_sizes=(4,), block_sizes=sizes).wait_until_ready()
    try:
        untaught = list(driver.engine.policy.survival)
        for size in sizes:
            requests = make_mixed_requests(5, seed=6)
            asking = [dataclasses.replace(r, request_id=next(_ids), block_size=size) for r in requests]
            answers = driver.run(asking)
            for request, answer in zip(asking, answers, strict=True):
                assert answer.output_ids == decode_alone(decoder, request).output_ids
            drafted = {event.num_draft_tokens for answer in answers for event in answer.events}
            assert drafted == {0, driver.engine.programs.num_draft_tokens(size)}
        assert driver.engine.policy.survival == untaught
        # With others that ask for less, that is what all of a call get.
        both = [make_request([5] * 9, 40, block_size=size) for size in sizes] + [make_request([5] * 9, 40)]
        alone = [driver.run([dataclasses.replace(r, request_id=next(_ids), block_size=None)])[0] for r in both]
        together = driver.run(both)
        assert [a.output_ids for a in together] == [a.output_ids for a in alone]
        with pytest.raises(ValueError, match=r"block size 3 is asked for; \(4, 2\) are served"):
            driver.engine.submit(make_request([1], block_size=3))
    finally:
        driver.engine.stop()


@pytest.mark.parametrize("limit", ["num_candidates", "draft_vocab_size"])
def test_what_limits_drafts_changes_drafts_and_no_text(decoder, driver, limit):
    requests = make_mixed_requests(6, seed=5)
    models = decoder.settings.target, decoder.params.target, decoder.settings.draft, decoder.params.draft
    every_other = np.arange(0, decoder.settings.target.vocab_size, 2)
    limits = {"num_candidates": {"num_candidates": 2}, "draft_vocab_size": {"draft_vocabulary": every_other}}
    limited = Decoder(*models, **limits[limit])
    config = {"max_slots": 4, "batch_sizes": (4,), "is_adaptive": False, limit: getattr(limited.settings, limit)}
    own = EngineDriver(limited, **config).wait_until_ready()
    try:
        answers = own.run(requests)
    finally:
        own.engine.stop()
    for request, answer in zip(requests, answers, strict=True):
        wanted = decode_alone(limited, request)
        assert answer.output_ids == wanted.output_ids == decode_alone(decoder, request).output_ids
        assert answer.acceptance_lengths == wanted.stats.acceptance_lengths


def test_an_event_is_a_round(driver):
    [answer] = driver.run([make_request(make_prompts([20])[0], 50)])
    first, *rounds = answer.events
    assert first.acceptance_len is None
    assert len(first.token_ids) == 1
    assert [len(e.token_ids) for e in rounds] == [e.acceptance_len for e in rounds]
    assert {e.num_draft_tokens for e in rounds} == {FULL}


@pytest.fixture(scope="module")
def dense(decoder):
    """The target's logits of a whole sequence, by position."""
    model = Qwen3(decoder.settings.target)

    @jax.jit
    def run(tokens):
        params = {"params": decoder.params.target}
        return model.apply(params, model.apply(params, tokens[None]).hidden, method=Qwen3.logits)[0]

    def logits(tokens):
        padded = np.zeros(CONTEXT, np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(run(jnp.asarray(padded)), np.float64)[: len(tokens)]

    return logits


def log_softmax(logits):
    return logits - np.log(np.sum(np.exp(logits - logits.max()))) - logits.max()


def test_log_probabilities_are_those_of_the_raw_logits(driver, dense):
    requests = [
        make_request(
            make_prompts([70], seed=5)[0],
            30,
            sampling=sampling,
            penalties=penalties,
            num_top_logprobs=num_top,
            num_prompt_logprobs=num_prompt,
        )
        for sampling, penalties, num_top, num_prompt in [
            (SamplingConfig(), Penalties(), 5, 3),
            (SHARP, Penalties(presence=1.0), 20, None),
            (SHARP, Penalties(), 0, 0),
        ]
    ]
    for request, answer in zip(requests, driver.run(requests), strict=True):
        sequence = [*request.prompt_ids, *answer.output_ids]
        laws = np.array([log_softmax(row) for row in dense(sequence)])
        prompt_len = len(request.prompt_ids)
        check_logprobs(answer.logprobs, laws[prompt_len - 1 : -1], answer.output_ids, request.num_top_logprobs)
        if request.num_prompt_logprobs is None:
            assert answer.prompt_logprobs is None
        else:
            wanted = laws[: prompt_len - 1], request.prompt_ids[1:]
            check_logprobs(answer.prompt_logprobs, *wanted, request.num_prompt_logprobs)


def check_logprobs(entries, laws, tokens, num_top):
    assert len(entries) == len(tokens)
    for entry, law, token in zip(entries, laws, tokens, strict=True):
        assert entry.logprob == pytest.approx(law[token], abs=1e-4)
        assert len(entry.top) == num_top
        np.testing.assert_allclose([v for _, v in entry.top], np.sort(law)[::-1][:num_top], atol=1e-4)
        np.testing.assert_allclose([law[i] for i, _ in entry.top], [v for _, v in entry.top], atol=1e-4)


ADJUSTMENTS = {
    "frequency": {"penalties": Penalties(frequency=0.7)},
    "presence": {"penalties": Penalties(presence=1.5)},
    "repetition": {"penalties": Penalties(repetition=1.4)},
    "bias": {"logit_bias": {3: 2.5, 11: -100.0, 40: 4.0}},
    "min_tokens": {"min_new_tokens": 15, "stop_ids": tuple(range(0, VOCAB, 2))},
    "all": {
        "penalties": Penalties(0.4, 0.3, 1.2),
        "logit_bias": {5: 1.0},
        "min_new_tokens": 6,
        "stop_ids": (1, 2, 3, 4, 5, 6),
    },
}


def choose_naively(dense, request, num_tokens):
    """Greedy decoding, one token at a time, with the adjustments as their definitions say."""
    output, penalties = [], request.penalties
    while len(output) < num_tokens:
        logits = dense([*request.prompt_ids, *output])[-1].copy()
        for token, bias in request.logit_bias.items():
            logits[token] += bias
        for token in set(request.prompt_ids) | set(output):
            logits[token] *= penalties.repetition if logits[token] < 0 else 1 / penalties.repetition
        for token in set(output):
            logits[token] -= penalties.frequency * output.count(token) + penalties.presence
        if len(output) < request.min_new_tokens:
            logits[list(request.stop_ids)] = -np.inf
        output.append(int(np.argmax(logits)))
        if output[-1] in request.stop_ids:
            break
    return output


@pytest.mark.parametrize("name", ADJUSTMENTS)
def test_adjusted_logits_choose_as_their_definitions_say(driver, dense, name):
    prompts = make_prompts([12, 30], seed=9)
    requests = [
        make_request(prompt, 25, use_draft=use_draft, **ADJUSTMENTS[name])
        for prompt in prompts
        for use_draft in (True, False)
    ]
    others = make_mixed_requests(3, seed=11)
    answers = driver.run([*requests, *others])[: len(requests)]
    for request, answer in zip(requests, answers, strict=True):
        assert answer.output_ids == choose_naively(dense, request, 25)
    unadjusted = driver.run([make_request(prompts[0], 25)])[0]
    assert unadjusted.output_ids != answers[0].output_ids


def test_a_known_prefix_is_not_run_again_and_changes_nothing(driver):
    system = make_prompts([50], seed=21)[0]
    prompts = [system + tail for tail in make_prompts([5, 9, 30], seed=22)]
    fresh = driver.run([make_request(prompts[0])])[0]
    assert fresh.num_cached_tokens == 0
    again = driver.run([make_request(prompts[0])])[0]
    assert again.num_cached_tokens == (len(prompts[0]) - 1) // 16 * 16
    assert again.output_ids == fresh.output_ids
    assert again.acceptance_lengths == fresh.acceptance_lengths
    for prompt in prompts[1:]:
        answer = driver.run([make_request(prompt)])[0]
        assert answer.num_cached_tokens == 48


def test_a_chat_that_goes_on_finds_what_it_has_computed(decoder, driver):
    prompt = make_prompts([33], seed=31)[0]
    first = driver.run([make_request(prompt, 40)])[0]
    sequence = prompt + first.output_ids
    request = make_request(sequence + make_prompts([7], seed=32)[0], 20)
    answer = driver.run([request])[0]
    assert answer.num_cached_tokens == (len(sequence) - 1) // 16 * 16 > len(prompt)
    wanted = decode_alone(decoder, request)
    assert answer.output_ids == wanted.output_ids
    assert answer.acceptance_lengths == wanted.stats.acceptance_lengths


def test_prompt_scores_look_at_the_whole_prompt_although_it_is_known(driver):
    prompt = make_prompts([40], seed=41)[0]
    driver.run([make_request(prompt)])
    answer = driver.run([make_request(prompt, num_prompt_logprobs=0)])[0]
    assert answer.num_cached_tokens == 0
    assert len(answer.prompt_logprobs) == 39


def test_cancelled_requests_end_once_and_free_their_slots(driver):
    requests = [make_request(prompt, 100) for prompt in make_prompts([20] * 20, seed=51)]
    for request in requests:
        driver.engine.submit(request)
    driver.wait_for(lambda: driver.events[requests[0].request_id])
    for request in requests:
        driver.engine.cancel(request.request_id)
        driver.engine.cancel(request.request_id)
    driver.engine.cancel("unknown")
    answers = [driver.wait_for_end(request.request_id) for request in requests]
    assert {answer.finish_reason for answer in answers} <= {"cancelled", "length", "context"}
    assert sum(answer.finish_reason == "cancelled" for answer in answers) > 10
    status = driver.engine.status()
    assert (status.num_running, status.num_waiting) == (0, 0)
    test = make_mixed_requests(5, seed=52)
    assert [a.finish_reason for a in driver.run(test)] == [
        a.finish_reason for a in driver.run([dataclasses.replace(r, request_id=next(_ids)) for r in test])
    ]


def test_after_a_storm_everything_is_free_again(driver):
    generator = np.random.default_rng(91)
    for _ in range(10):
        requests = [
            make_request(prompt, int(generator.integers(1, 60)))
            for prompt in make_prompts(generator.integers(1, 60, 30), seed=int(generator.integers(1000)))
        ]
        for request in requests:
            driver.engine.submit(request)
        for index in generator.permutation(30)[:20]:
            driver.engine.cancel(requests[index].request_id)
        reasons = {driver.wait_for_end(request.request_id).finish_reason for request in requests}
        assert reasons <= {"cancelled", "length", "context"}
    status = driver.engine.status()
    assert (status.num_running, status.num_waiting) == (0, 0)
    driver.run([make_request([1, 2, 3], 5)])
    assert driver.engine.status().cache_usage < 0.05


def test_a_full_queue_refuses(driver):
    requests = [make_request(prompt, 100) for prompt in make_prompts([5] * 60, seed=61)]
    taken = []
    with pytest.raises(QueueFullError, match="try again later"):
        for request in requests:
            driver.engine.submit(request)
            taken.append(request)
    assert len(taken) >= 34
    for request in taken:
        driver.engine.cancel(request.request_id)
    for request in taken:
        driver.wait_for_end(request.request_id)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_ids": []}, "0 tokens"),
        ({"prompt_ids": [1] * CONTEXT}, "128 tokens; 1 .. 127"),
        ({"prompt_ids": [VOCAB]}, "vocabulary"),
        ({"stop_ids": (-1,)}, "vocabulary"),
        ({"logit_bias": {VOCAB: 1.0}}, "vocabulary"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop_ids": tuple(range(33))}, "33 stop ids"),
        ({"num_top_logprobs": 21}, "21 log-prob"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(driver, fields, message):
    with pytest.raises(ValueError, match=message):
        driver.engine.submit(dataclasses.replace(make_request([1, 2, 3]), **fields))


def test_calls_are_timed(driver):
    driver.calls.clear()
    driver.run([make_request([1, 2, 3], 60)])
    assert all(call.call_s > 0 and 0 < call.draft_share <= 1 for call in driver.calls)
    assert {call.num_rounds for call in driver.calls} <= {1, 2, 3, 4}
    assert driver.calls[0].num_rounds == 4


@pytest.fixture(scope="module")
def faulty(decoder):
    """An adaptive engine whose target breaks on token 13."""
    broken = decoder.params.target["embed_tokens"].at[13].set(jnp.nan)
    params = make_params(decoder, embed_tokens=broken)
    driver = EngineDriver(
        decoder, lambda: params, max_slots=4, batch_sizes=(4,), block_sizes=(FULL, HALF), prefix_cache_tokens=0
    ).wait_until_ready()
    yield driver
    driver.engine.stop()


def without_13(requests):
    return [
        dataclasses.replace(r, prompt_ids=[12 if t == 13 else t for t in r.prompt_ids], logit_bias={13: -100.0})
        for r in requests
    ]


def test_numbers_that_are_not_finite_fail_their_own_request_only(faulty):
    good = without_13(make_mixed_requests(6, seed=71))
    alone = faulty.run(good)
    assert "error" not in {answer.finish_reason for answer in alone}
    bad_prompt = make_request([1, 2, 13, 4], 20)
    bad_later = make_request([1, 2, 3, 4], 40, logit_bias={13: 100.0})
    again = [dataclasses.replace(r, request_id=next(_ids)) for r in good]
    answers = faulty.run([again[0], bad_prompt, *again[1:3], bad_later, *again[3:]])
    assert [a.finish_reason for a in (answers[1], answers[4])] == ["error", "error"]
    assert "not finite" in answers[1].error
    assert answers[1].output_ids == []
    assert set(answers[4].output_ids) == {13}
    for answer, wanted in zip([answers[0], *answers[2:4], *answers[5:]], alone, strict=True):
        assert answer.output_ids == wanted.output_ids
        assert answer.finish_reason == wanted.finish_reason


def test_changing_block_sizes_change_no_text(faulty, monkeypatch):
    requests = without_13(make_mixed_requests(8, seed=81))
    wanted = faulty.run(requests)
    sizes = itertools.cycle([1, 1, FULL, HALF, 1, FULL, FULL])
    monkeypatch.setattr(faulty.engine.policy, "choose", lambda *_: (next(sizes), 2))
    answers = faulty.run([dataclasses.replace(r, request_id=next(_ids)) for r in requests])
    assert [a.output_ids for a in answers] == [w.output_ids for w in wanted]
    assert {e.num_draft_tokens for a in answers for e in a.events} == {0, HALF, FULL}


def test_after_a_long_plain_phase_contexts_are_completed_within_the_budget(decoder, monkeypatch):
    budget, num_plain_calls = 32, 10
    driver = EngineDriver(
        decoder,
        max_slots=4,
        batch_sizes=(4,),
        block_sizes=(FULL,),
        prefill_tokens_per_call=budget,
        prefix_cache_tokens=640,
    ).wait_until_ready()
    programs, reruns = driver.engine.programs, [0]
    prefill, run = programs.prefill, programs.run

    def spy_on_prefill(row, positions, chunk_len, start):
        reruns[-1] += chunk_len
        return prefill(row, positions, chunk_len, start)

    def spy_on_run(*arguments):
        reruns.append(0)
        return run(*arguments)

    sizes = itertools.chain([1] * num_plain_calls, itertools.repeat(FULL))
    monkeypatch.setattr(driver.engine.policy, "choose", lambda *_: (next(sizes), 4))
    monkeypatch.setattr(programs, "prefill", spy_on_prefill)
    monkeypatch.setattr(programs, "run", spy_on_run)
    requests = [make_request(prompt, 115) for prompt in make_prompts([6, 8, 10, 12], seed=85)]
    answers = driver.run(requests)

    reruns_a_step = reruns[num_plain_calls:]
    assert sum(reruns_a_step) > 4 * budget
    assert max(reruns_a_step) < budget + MAX_PADDING
    num_plain = []
    for request, answer in zip(requests, answers, strict=True):
        assert answer.output_ids == decode_alone(decoder, request).output_ids
        is_drafted = [event.num_draft_tokens > 0 for event in answer.events]
        assert is_drafted == sorted(is_drafted)
        # From then on drafts are accepted as they are after a prompt of that length.
        start = sum(len(e.token_ids) for e in answer.events if not e.num_draft_tokens)
        known = request.prompt_ids + answer.output_ids[: start - 1]
        [alone] = decoder.generate([known], request.max_new_tokens - start + 1)
        assert alone.stats.acceptance_lengths == [e.acceptance_len for e in answer.events if e.num_draft_tokens]
        num_plain.append(start)
    assert len(set(num_plain)) > 1  # who is complete is drafted for while others are not yet

    sequence = requests[-1].prompt_ids + answers[-1].output_ids[:80]
    answer = driver.run([request := make_request(sequence)])[0]
    assert answer.num_cached_tokens == 80
    assert answer.acceptance_lengths == decode_alone(decoder, request).stats.acceptance_lengths
    driver.engine.stop()
    assert driver.engine.status().num_compiles["serving"] == 0


def test_what_plain_rounds_leave_out_of_the_drafts_context_is_not_kept_for_others(decoder, monkeypatch):
    driver = EngineDriver(
        decoder, max_slots=1, batch_sizes=(1,), block_sizes=(FULL,), prefix_cache_tokens=640
    ).wait_until_ready()
    sizes = itertools.chain([FULL] * 5, itertools.repeat(1))
    monkeypatch.setattr(driver.engine.policy, "choose", lambda *_: (next(sizes), 4))
    prompt = make_prompts([20], seed=86)[0]
    answer = driver.run([make_request(prompt, 100)])[0]
    num_complete = len(prompt) + sum(len(e.token_ids) for e in answer.events if e.num_draft_tokens)
    sizes = itertools.repeat(FULL)
    again = driver.run([request := make_request(prompt + answer.output_ids[:80], 20)])[0]
    assert 32 <= again.num_cached_tokens == num_complete // 16 * 16 < 96
    assert again.acceptance_lengths == decode_alone(decoder, request).stats.acceptance_lengths
    driver.engine.stop()


def test_a_stopped_engine_and_its_weights_are_given_back(decoder):
    arrays = {name: value + 0 for name, value in decoder.params.target.items() if name == "embed_tokens"}
    params = [make_params(decoder, **arrays)]
    driver = EngineDriver(decoder, lambda: params.pop(), max_slots=1, batch_sizes=(1,), prefix_cache_tokens=0)
    driver.wait_until_ready().run([make_request([1, 2, 3], 5)])
    driver.engine.stop()
    left = [weakref.ref(thing) for thing in (driver.engine, driver.engine.programs, arrays.pop("embed_tokens"))]
    del driver
    gc.collect()
    assert [thing() for thing in left] == [None, None, None]


@pytest.mark.slow
def test_a_request_among_32_others_is_what_it_is_alone(decoder):
    """Batches of 1 and 32 rows; every sampling, with and without drafts; texts and acceptance lengths."""
    driver = EngineDriver(decoder, max_slots=33, batch_sizes=(1,), is_adaptive=False).wait_until_ready()
    requests = make_mixed_requests(11, seed=101)
    alone = [driver.run([request])[0] for request in requests]
    for request, wanted in zip(requests, alone, strict=True):
        others = [
            dataclasses.replace(other, use_draft=i % 3 > 0, max_new_tokens=120)
            for i, other in enumerate(make_mixed_requests(32, seed=len(request.prompt_ids)))
        ]
        again = dataclasses.replace(request, request_id=next(_ids))
        answer = driver.run([*others[:20], again, *others[20:]])[20]
        assert answer.output_ids == wanted.output_ids
        assert answer.acceptance_lengths == wanted.acceptance_lengths
        assert answer.sources == wanted.sources
    driver.engine.stop()


def test_draining_ends_what_was_taken_and_takes_no_more(decoder):
    driver = EngineDriver(decoder, max_slots=1, block_sizes=(1,), prefix_cache_tokens=0).wait_until_ready()
    requests = [make_request([1, 2, 3], 30) for _ in range(3)]
    for request in requests:
        driver.engine.submit(request)
    driver.engine.drain()
    with pytest.raises(EngineUnavailableError, match="draining"):
        driver.engine.submit(make_request([1]))
    assert {driver.wait_for_end(r.request_id).finish_reason for r in requests} == {"length"}
    driver.engine.stop()
    driver.engine.stop()


def test_stopping_ends_open_requests(decoder):
    driver = EngineDriver(decoder, max_slots=1, block_sizes=(1,), prefix_cache_tokens=0).wait_until_ready()
    requests = [make_request([1, 2, 3], 120) for _ in range(3)]
    for request in requests:
        driver.engine.submit(request)
    driver.engine.stop()
    assert driver.wait_for_end(requests[-1].request_id).finish_reason == "cancelled"
    with pytest.raises(EngineUnavailableError, match="stopped"):
        driver.engine.submit(make_request([1]))


def test_an_engine_can_be_stopped_while_it_compiles(decoder):
    driver = EngineDriver(decoder, max_slots=2)
    driver.engine.stop()
    assert not driver.engine.status().is_ready


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_ends_open_requests_and_is_told(decoder, monkeypatch):
    driver = EngineDriver(decoder, max_slots=1, block_sizes=(1,), prefix_cache_tokens=0).wait_until_ready()

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(driver.engine.programs, "run", fail)
    requests = [make_request([1, 2, 3], 120) for _ in range(3)]
    for request in requests:
        driver.engine.submit(request)
    answers = [driver.wait_for_end(request.request_id) for request in requests]
    assert {answer.finish_reason for answer in answers} == {"error"}
    assert driver.engine.status().failure == "RuntimeError: out of memory"
    with pytest.raises(EngineUnavailableError, match="failed"):
        driver.engine.submit(make_request([1]))
    driver.engine.stop()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_model_len": CONTEXT + 1}, "context holds 128"),
        ({"block_sizes": (9,)}, "outside 1 .. 5"),
        ({"max_slots": 0}, "max_slots is 0"),
        ({"batch_sizes": (64,)}, "batch_sizes has 64"),
        ({"prefix_cache_tokens": -1}, "prefix_cache_tokens is -1"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(decoder, config, message):
    with pytest.raises(ConfigError, match=message):
        EngineDriver(decoder, **config)
