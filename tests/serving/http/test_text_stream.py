"""Text of token streams: the same however the tokens arrive; stops exact at every offset."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domino_jax.records import TokenEvent, TokenLogprobs
from domino_jax.serving.http.choice import Choice
from domino_jax.serving.http.text_stream import StopRules, TextStream
from tests.serving.http.byte_codec import EOS, ByteCodec

CODEC = ByteCodec()
TOKENS = st.sampled_from([*b"aab", *b"c\n", 0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 257, *range(260, 268)])
STOPS = st.lists(st.text("abc\né\ufffd<", min_size=1, max_size=4), max_size=3)


def cut_points(n):
    return st.sets(st.integers(1, max(n - 1, 1)), max_size=n).map(lambda cuts: sorted(c for c in cuts if c < n))


def split(items, cuts):
    return [items[a:b] for a, b in itertools.pairwise([0, *cuts, len(items)])]


def decode_growing(ids, is_whole):
    """What is certain of the text after `ids`: nothing that later bytes could change."""
    raw = b"".join(map(CODEC.token_bytes, ids))
    if is_whole:
        return raw.decode("utf-8", "replace")
    for held in range(min(4, len(raw) + 1)):
        # Held back is only what some later byte could still complete.
        head, tail = raw[: len(raw) - held], raw[len(raw) - held :]
        if held == 0:
            if not any(is_open(raw[-k:]) for k in range(1, min(3, len(raw)) + 1)):
                return raw.decode("utf-8", "replace")
        elif is_open(tail) and not any(is_open(raw[-k:]) for k in range(held + 1, min(3, len(raw)) + 1)):
            return head.decode("utf-8", "replace")
    raise AssertionError(raw)


def is_open(tail):
    """Whether `tail` is the beginning of one letter."""
    for more in (b"\x80", b"\x80\x80", b"\x80\x80\x80", b"\xbf", b"\xbf\x80", b"\xbf\x80\x80", b"\x90\x80\x80"):
        try:
            if len((tail + more).decode("utf-8")) == 1 and len(tail) < len(tail + more):
                return True
        except UnicodeDecodeError:
            continue
    return False


def expected(ids, stops, include, min_tokens, ends_with_eos):
    """The whole text, its tokens and whether a stop string ended it; written for clearness."""
    shown = ids[:-1] if ends_with_eos and not include else ids
    before = ""
    for count in range(1, len(ids) + 1):
        text = decode_growing(shown[:count], is_whole=count == len(ids))
        hits = []
        for stop in stops:
            for start in range(len(text)):
                end = start + len(stop)
                if text.startswith(stop, start) and end > len(before) and count > min_tokens:
                    hits.append((end, start))
        if hits:
            end, start = min(hits)
            return text[: end if include else start], count, True
        before = text
    return before, len(ids), False


@settings(max_examples=400, deadline=None)
@given(st.data(), st.lists(TOKENS, min_size=1, max_size=14), STOPS, st.booleans(), st.integers(0, 5), st.booleans())
def test_any_split_gives_the_whole_text(data, ids, stops, include, min_tokens, ends_with_eos):
    ids = [*ids, EOS] if ends_with_eos else ids
    rules = StopRules(tuple(stops), include, min_tokens)
    text, num_tokens, is_stopped = expected(ids, stops, include, min_tokens, ends_with_eos)
    for cuts in ([], list(range(1, len(ids))), data.draw(cut_points(len(ids)))):
        stream = TextStream(CODEC.token_bytes, frozenset(), rules)
        got, count, stopped = "", 0, False
        pieces = split(ids, cuts)
        for i, part in enumerate(pieces):
            is_last = i == len(pieces) - 1
            delta = stream.add(part, ends_with_stop_id=is_last and ends_with_eos, is_last=is_last)
            assert all(piece for piece, _ in delta.pieces)
            got += delta.text
            count += delta.num_tokens
            stopped = delta.is_stopped
            assert text.startswith(got), "shown text was taken back"
            if stopped:
                break
        assert (got, count, stopped) == (text, num_tokens, is_stopped)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.lists(TOKENS, min_size=1, max_size=12), STOPS, st.sampled_from(["stop", "length", "context"]))
def test_a_choice_is_the_same_for_every_split_into_rounds(data, ids, stops, reason):
    ids = [*ids, EOS] if reason == "stop" else ids
    sources = [data.draw(st.sampled_from(["drafted", "corrected", "bonus"])) for _ in ids]
    scores = [TokenLogprobs(-float(i), [(i, -1.0)]) for i in range(len(ids))]
    outcomes = []
    for cuts in ([], list(range(1, len(ids))), data.draw(cut_points(len(ids)))):
        choice = Choice(0, 0, CODEC, StopRules(tuple(stops)))
        bounds = list(itertools.pairwise([0, *cuts, len(ids)]))
        for a, b in bounds:
            end = reason if b == len(ids) else None
            event = TokenEvent("r", ids[a:b], sources[a:b], scores[a:b], b - a, 7, finish_reason=end)
            if choice.take(event, 0.0).finish_reason:
                break
        letters = [(letter, s) for d in choice.deltas for text, s in d.sources for letter in text]
        taken = [i for d in choice.deltas for i in d.token_ids]
        offsets = [i for d in choice.deltas for i in d.offsets]
        logprobs = [s for d in choice.deltas for s in d.logprobs]
        outcomes.append((choice.text, choice.num_tokens, taken, letters, offsets, logprobs, choice.finish_reason))
        assert choice.num_tokens == len(taken) == len(offsets) == len(logprobs)
        assert "".join(letter for letter, _ in letters) == choice.text
    assert outcomes[0] == outcomes[1] == outcomes[2]


def run(rounds, ends=None, **rules):
    choice = Choice(0, 0, CODEC, StopRules(**rules))
    for i, ids in enumerate(rounds):
        is_last = i == len(rounds) - 1
        event = TokenEvent("r", ids, ["drafted"] * len(ids), finish_reason=ends if is_last else None)
        if choice.take(event, 0.0).finish_reason:
            break
    return choice


@pytest.mark.parametrize("offset", range(13))
@pytest.mark.parametrize("begins_before", range(4))
def test_a_stop_string_at_every_offset_of_a_block(offset, begins_before):
    before, block = b"x" * 5 + b"STOP"[:begins_before], b"STOP"[begins_before:]
    block = block if begins_before else b"y" * offset + block
    choice = run([list(before), list(block + b"z" * (16 - len(block)))], strings=("STOP",))
    tail = b"" if begins_before else b"y" * offset
    assert (choice.text, choice.finish_reason) == ((b"xxxxx" + tail).decode(), "stop")
    assert choice.num_tokens == 5 + len(tail) + 4


@pytest.mark.parametrize("offset", range(16))
def test_a_stop_id_and_a_budget_at_every_offset_of_a_block(offset):
    for ids, reason in ([*b"y" * offset, EOS], "stop"), (list(b"y" * (offset + 1)), "length"):
        choice = run([list(b"xxx"), ids], reason)
        text = "xxx" + "y" * (offset if reason == "stop" else offset + 1)
        assert (choice.text, choice.num_tokens, choice.finish_reason) == (text, 3 + offset + 1, reason)


def test_a_full_context_reads_as_length():
    assert run([list(b"abc")], "context").finish_reason == "length"


def test_letters_that_may_begin_a_stop_string_wait_for_what_settles_them():
    stream = TextStream(CODEC.token_bytes, frozenset(), StopRules(("</stop>",)))
    assert [stream.add(part).text for part in ([*b"a<"], [*b"/st"], [*b"ay"], [264])] == ["a", "", "</stay", ""]
    assert stream.add([265, *b"more"]).is_stopped
    stream = TextStream(CODEC.token_bytes, frozenset(), StopRules(("</stop>",)))
    assert stream.add([*b"a</s"], is_last=True).text == "a</s"


def test_an_incomplete_letter_waits_and_is_told_as_broken_at_the_end():
    stream = TextStream(CODEC.token_bytes, frozenset(), StopRules())
    emoji = "😀".encode()
    assert [stream.add([byte]).text for byte in emoji] == ["", "", "", "😀"]
    assert stream.add([*emoji[:3]]).text == ""
    assert stream.add([], is_last=True).text == "\ufffd"


def test_of_two_stop_strings_the_first_complete_one_ends_the_text():
    assert run([list(b"xabcd")], strings=("abcd", "bc")).text == "xa"
    assert run([list(b"xabcd")], strings=("bc", "abc")).text == "x"
    # Both are complete in one token; "bc" is so a letter earlier, "abca" begins earlier.
    assert run([[266]], strings=("abca", "bc")).text == "a"


def test_a_stop_string_counts_only_after_min_tokens():
    assert run([list(b"ab ab ab")], "length", strings=("ab",), min_tokens=2).text == "ab "
    assert run([list(b"ab ab ab")], "length", strings=("ab",), min_tokens=1).text == ""


def test_a_stop_string_that_does_not_count_yet_is_not_held_back():
    stream = TextStream(CODEC.token_bytes, frozenset(), StopRules(("ab", "xyz"), min_tokens=5))
    assert stream.add(list(b"ab")).text == "ab"


@pytest.mark.parametrize("include, text", [(False, "xy"), (True, "xyc")])
def test_a_stop_id_that_is_text_is_left_out_of_it_unless_asked_for(include, text):
    choice = run([list(b"xyc")], "stop", include_stop=include)
    assert (choice.text, choice.num_tokens, choice.finish_reason) == (text, 3, "stop")


def test_stop_text_stays_on_request():
    assert run([list(b"xENDy")], strings=("END",), include_stop=True).text == "xEND"
    choice = Choice(0, 0, CODEC, StopRules(include_stop=True), skip_special_tokens=False)
    choice.take(TokenEvent("r", [*b"x", EOS], ["target"] * 2, finish_reason="stop"), 0.0)
    assert choice.text == "x<|256|>"


def test_special_tokens_are_text_on_request_only():
    for skips, text in (True, "ab"), (False, "a<|257|>b"):
        choice = Choice(0, 0, CODEC, skip_special_tokens=skips)
        choice.take(TokenEvent("r", [97, 257, 98], ["target"] * 3, finish_reason="length"), 0.0)
        assert choice.text == text and choice.num_tokens == 3
