import dataclasses
import json
from itertools import islice

import numpy as np
import pytest

from domino_jax.data.chat_template import render_chat
from domino_jax.data.pipeline import build_dataset
from domino_jax.data.responses import ResponsesError, RowError, write_chats
from domino_jax.data.tokenizer import train_tokenizer
from domino_jax.run_config import DataConfig

CONFIG = DataConfig(max_length=64, batch_size=4)
VOCAB = 300


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["what is number one of all numbers"] * 5, VOCAB)


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


BUCKETED = dataclasses.replace(CONFIG, bucket_widths=(24, 40))
CHATS = [chat(f"q{i}", f"number {i}") for i in range(10)]


@pytest.fixture
def path(tmp_path) -> str:
    file = tmp_path / "chats.jsonl"
    write_chats(file, CHATS)
    return str(file)


def take(batches, count: int) -> list:
    return list(islice(batches, count))


def assert_equal(left: list, right: list) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for field in dataclasses.fields(a):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


def rows_of(batches: list, tokenizer) -> list[str]:
    return [
        tokenizer.decode(ids[:n]).split("user\n")[1].split("<")[0]
        for batch in batches
        for ids, n in zip(batch.input_ids, batch.lengths, strict=True)
    ]


def test_batches_hold_the_rendered_rows(path: str, tokenizer) -> None:
    batches, index, num_rows = build_dataset(path, tokenizer, CONFIG, VOCAB, seed=0, num_epochs=1)
    assert num_rows == 10 and index.report.num_bad == 0 and batches.num_batches == 2
    expected = {tuple(ids): mask for ids, mask in (render_chat(tokenizer, c, False) for c in CHATS)}
    assert index.num_tokens == sum(map(len, expected)) and index.num_learned_tokens == sum(map(sum, expected.values()))
    for batch in batches:
        assert batch.input_ids.shape == batch.loss_mask.shape == (4, 64) and batch.lengths.shape == (4,)
        assert batch.input_ids.dtype == batch.lengths.dtype == np.int32 and batch.loss_mask.dtype == np.float32
        for ids, mask, n in zip(batch.input_ids, batch.loss_mask, batch.lengths, strict=True):
            assert expected[tuple(ids[:n].tolist())] == mask[:n].tolist()
            assert not ids[n:].any() and not mask[n:].any()


def test_epochs_are_shuffled_anew_and_batches_run_on(path: str, tokenizer) -> None:
    batches, _, _ = build_dataset(path, tokenizer, CONFIG, VOCAB, seed=3, num_epochs=2)
    rows = rows_of(list(batches), tokenizer)
    assert len(rows) == 20
    assert sorted(rows[:10]) == sorted(rows[10:]) == sorted(f"q{i}" for i in range(10))
    assert rows[:10] != rows[10:]
    other, _, _ = build_dataset(path, tokenizer, CONFIG, VOCAB, seed=4, num_epochs=2)
    assert rows_of(list(other), tokenizer) != rows


@pytest.mark.parametrize(("num_epochs", "expected"), [(0.5, 1), (1, 2), (1.25, 3), (2.0, 5)])
def test_fractional_epochs(path: str, tokenizer, num_epochs: float, expected: int) -> None:
    batches, _, _ = build_dataset(path, tokenizer, CONFIG, VOCAB, seed=0, num_epochs=num_epochs)
    assert batches.num_batches == expected == len(list(batches))


@pytest.fixture
def mixed_path(tmp_path) -> str:
    """Ten short rows and seven long ones."""
    file = tmp_path / "mixed.jsonl"
    write_chats(file, CHATS + [chat(f"q{i}", f"number {i} " + "of all numbers " * 3) for i in range(10, 17)])
    return str(file)


def test_without_widths_the_order_is_that_of_one_global_shuffle(path: str, tokenizer) -> None:
    """Recorded: a change here changes what every run without buckets learns."""
    batches, _, _ = build_dataset(path, tokenizer, CONFIG, VOCAB, seed=3, num_epochs=2)
    assert batches.layout.startswith("rows by padded length: 10 of up to 64 tokens")
    order = [int(name.strip().removeprefix("q")) for name in rows_of(list(batches), tokenizer)]
    assert order == [4, 7, 0, 8, 2, 5, 3, 6, 1, 9, 6, 0, 4, 3, 2, 1, 9, 8, 7, 5]


def test_buckets_pad_rows_to_the_width_of_their_length(mixed_path: str, tokenizer) -> None:
    batches, index, _ = build_dataset(mixed_path, tokenizer, BUCKETED, VOCAB, seed=0, num_epochs=4)
    assert len(index.lengths) == 17 and sum(index.lengths) == index.num_tokens
    short, long = (sum(n <= 24 for n in index.lengths), sum(24 < n <= 40 for n in index.lengths))
    assert (short, long) == (10, 7)
    assert batches.layout.startswith("rows by padded length: 10 of up to 24, 7 of up to 40 tokens")
    made = list(batches)
    assert len(made) == batches.num_batches == 17 and "left" not in batches.layout
    assert {batch.input_ids.shape for batch in made} == {(4, 24), (4, 40)}
    assert all(batch.loss_mask.shape == batch.input_ids.shape for batch in made)
    assert sorted(rows_of(made, tokenizer)) == sorted([f"q{i}" for i in range(17)] * 4)
    odd, _, _ = build_dataset(mixed_path, tokenizer, BUCKETED, VOCAB, seed=0, num_epochs=1)
    assert odd.num_batches == 4 and odd.layout.endswith("; 1 rows left after the last epoch fill no batch")


@pytest.mark.parametrize("config", [CONFIG, BUCKETED], ids=["one width", "buckets"])
@pytest.mark.parametrize("num_epochs", [None, 6])
def test_resume_gives_the_same_batches(mixed_path: str, tokenizer, num_epochs: int | None, config: DataConfig) -> None:
    path = mixed_path
    whole, _, _ = build_dataset(path, tokenizer, config, VOCAB, seed=1, num_epochs=num_epochs)
    expected = take(whole, 10)
    first, _, _ = build_dataset(path, tokenizer, config, VOCAB, seed=1, num_epochs=num_epochs)
    assert_equal(take(first, 4), expected[:4])
    state = json.loads(json.dumps(first.get_state()))
    take(first, 1)
    second, _, _ = build_dataset(path, tokenizer, config, VOCAB, seed=1, num_epochs=num_epochs)
    second.set_state(state)
    assert second.get_state() == state
    assert_equal(take(second, 6), expected[4:])
    first.set_state(state)
    assert_equal(take(first, 6), expected[4:])


def test_a_position_of_another_stream_is_refused(path: str, tokenizer) -> None:
    state = build_dataset(path, tokenizer, CONFIG, VOCAB, seed=1)[0].get_state()
    with pytest.raises(ResponsesError, match="seed was 1 and is 2"):
        build_dataset(path, tokenizer, CONFIG, VOCAB, seed=2)[0].set_state(state)
    with pytest.raises(ResponsesError, match=r"bucket_widths was \[\] and is \[24, 40\]"):
        build_dataset(path, tokenizer, BUCKETED, VOCAB, seed=1)[0].set_state(state)
    write_chats(path, [chat("more", "of it")])
    with pytest.raises(ResponsesError, match="rows was"):
        build_dataset(path, tokenizer, CONFIG, VOCAB, seed=1)[0].set_state(state)
    with pytest.raises(ResponsesError, match="another stream"):
        build_dataset(path, tokenizer, CONFIG, VOCAB, seed=1)[0].set_state({})


@pytest.mark.parametrize("config", [CONFIG, BUCKETED], ids=["one width", "buckets"])
def test_processes_share_the_stream(mixed_path: str, tokenizer, config: DataConfig) -> None:
    whole, _, _ = build_dataset(mixed_path, tokenizer, config, VOCAB, seed=1, num_epochs=2)
    streams = [
        build_dataset(mixed_path, tokenizer, config, VOCAB, seed=1, num_epochs=2, places=places)[0]
        for places in ([0, 2], [1, 3])
    ]
    for batch, left, right in zip(list(whole), *map(list, streams), strict=True):
        for part, rows in ((left, slice(0, None, 2)), (right, slice(1, None, 2))):
            np.testing.assert_array_equal(batch.input_ids[rows], part.input_ids)
            np.testing.assert_array_equal(batch.loss_mask[rows], part.loss_mask)
            np.testing.assert_array_equal(batch.line_nos, part.line_nos)
            assert part.num_tokens == batch.num_tokens == batch.lengths.sum()
    assert whole.get_state() == streams[0].get_state() == streams[1].get_state()
    for wrong in ([], [0, 4]):
        with pytest.raises(ValueError, match=r"places are .*; they must lie in 0 \.\. 3"):
            build_dataset(mixed_path, tokenizer, config, VOCAB, 1, 2, places=wrong)


def test_few_rows(tmp_path, tokenizer) -> None:
    path = tmp_path / "one.jsonl"
    write_chats(path, CHATS[:1])
    with pytest.raises(ResponsesError, match="do not fill one batch of 4"):
        build_dataset(str(path), tokenizer, CONFIG, VOCAB, seed=0, num_epochs=3)
    batches, _, _ = build_dataset(str(path), tokenizer, CONFIG, VOCAB, seed=0)
    assert rows_of(take(batches, 2), tokenizer) == ["q0"] * 8


def test_bad_rows_are_known_before_training(tmp_path, tokenizer) -> None:
    path = tmp_path / "chats.jsonl"
    rows = [json.dumps({"messages": c}) for c in [*CHATS[:4], chat("long " * 60, "cut off")]]
    path.write_text("\n".join([rows[0], "oops", *rows[1:]]) + "\r\n", encoding="utf-8")
    log = tmp_path / "bad_rows.jsonl"
    batches, index, num_rows = build_dataset(
        str(path), tokenizer, CONFIG, VOCAB, seed=0, num_epochs=1, bad_rows_log=log
    )
    assert [json.loads(line)["line"] for line in log.read_text().splitlines()] == [2, 6]
    assert num_rows == 4 and index.report.reasons == {"malformed JSON": 1, "no assistant token left": 1}
    assert index.report.messages[1].startswith(f"{path}:6: no assistant token left")
    assert list(index.line_nos) == [1, 3, 4, 5]
    assert sorted(rows_of(list(batches), tokenizer)) == ["q0", "q1", "q2", "q3"]
    with pytest.raises(RowError, match=":2: malformed JSON"):
        build_dataset(str(path), tokenizer, dataclasses.replace(CONFIG, bad_rows="fail"), VOCAB, seed=0)
    with pytest.raises(ResponsesError, match="max_bad_rows = 1"):
        build_dataset(str(path), tokenizer, dataclasses.replace(CONFIG, max_bad_rows=1), VOCAB, seed=0)
    with pytest.raises(ResponsesError, match=r"every row was dropped.*id out of range"):
        build_dataset(str(path), tokenizer, CONFIG, 50, seed=0)


def test_truncation_and_single_learned_tokens(tmp_path, tokenizer) -> None:
    path = tmp_path / "chats.jsonl"
    long = chat("q", "number one of all numbers")
    write_chats(path, [long])
    ids, mask = render_chat(tokenizer, long, False)
    first = mask.index(1)
    for max_length, reason in [(first, "no assistant token left"), (first + 1, "only single assistant tokens left")]:
        config = DataConfig(max_length=max_length, batch_size=1)
        with pytest.raises(ResponsesError, match=reason):
            build_dataset(str(path), tokenizer, config, VOCAB, seed=0)
    config = DataConfig(max_length=first + 2, batch_size=1)
    batches, index, _ = build_dataset(str(path), tokenizer, config, VOCAB, seed=0)
    assert index.num_truncated == 1 and index.num_learned_tokens == 2
    assert next(batches).input_ids[0].tolist() == ids[: first + 2]


def test_the_end_of_a_cut_answer_is_no_label(tmp_path, tokenizer) -> None:
    path = tmp_path / "chats.jsonl"
    question, answer = CHATS[0]
    write_chats(path, [[question, answer], [question, answer | {"finish_reason": "length"}]])
    batches, _, _ = build_dataset(str(path), tokenizer, DataConfig(max_length=64, batch_size=2), VOCAB, 0, 1)
    batch = next(batches)
    np.testing.assert_array_equal(batch.input_ids[0], batch.input_ids[1])
    (end,) = np.flatnonzero(batch.loss_mask[0] != batch.loss_mask[1])
    assert batch.input_ids[0, end] == tokenizer.eos_token_id


def test_a_changed_file_is_noticed(path: str, tokenizer) -> None:
    batches, _, _ = build_dataset(path, tokenizer, CONFIG, VOCAB, seed=0)
    with open(path, "r+b") as file:
        file.truncate(5)
    with pytest.raises(RowError, match="malformed JSON"):
        next(batches)
