import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domino_jax.data.responses import (
    ResponsesError,
    RowError,
    RowReport,
    parse_row,
    read_chats,
    scan_rows,
    write_chats,
)

GOOD = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "one"}]


def row(*turns: tuple[str, object], **extra: object) -> bytes:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns], **extra}).encode()


def test_reads_both_forms_and_ignores_other_fields() -> None:
    system = [{"role": "system", "content": "s"}]
    assert parse_row(json.dumps({"messages": system + GOOD, "seed": 3}).encode(), "f", 1) == system + GOOD
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "a?"}, {"from": "gpt", "value": "one"}]
    assert parse_row(json.dumps({"conversations": turns, "id": "x"}).encode(), "f", 1) == system + GOOD


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"messages": [', "malformed JSON"),
        (b"[" * 100_000, "malformed JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[1]", "not an object"),
        (b"{}", "no messages"),
        (b'{"messages": []}', "no messages"),
        (b'{"messages": "x"}', "no messages"),
        (b'{"messages": ["x"]}', "malformed turn"),
        (row(("tool", "x")), "unknown role"),
        (b'{"messages": [{"role": ["user"], "content": "x"}]}', "unknown role"),
        (b'{"conversations": [{"from": "bing", "value": "x"}]}', "unknown role"),
        (row(("assistant", "x")), "roles out of order"),
        (row(("user", "a"), ("assistant", "b"), ("assistant", "c")), "roles out of order"),
        (row(("user", "a"), ("system", "b"), ("assistant", "c")), "roles out of order"),
        (row(("user", "a"), ("assistant", " \n")), "empty content"),
        (row(("user", "a"), ("assistant", None)), "content is not text"),
        (row(("user", "a"), ("assistant", [{"type": "text", "text": "x"}])), "content is not text"),
        (row(("user", "a"), ("assistant", "\ud800")), "not UTF-8"),
        (row(("user", "a")), "no assistant turn"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(content: bytes, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(content, "some/file.jsonl", 7)
    assert caught.value.reason == reason
    assert str(caught.value).startswith(f"some/file.jsonl:7: {reason}")


@given(st.binary(max_size=60))
def test_any_bytes_are_a_chat_or_a_row_error(content: bytes) -> None:
    with pytest.raises(RowError):
        parse_row(content, "f", 1)


def test_prompts_need_no_answer_but_a_user() -> None:
    prompt = row(("system", "be brief"), ("user", "a?"))
    assert [m["role"] for m in parse_row(prompt, "f", 1, needs_answer=False)] == ["system", "user"]
    with pytest.raises(RowError, match="no assistant turn"):
        parse_row(prompt, "f", 1)
    with pytest.raises(RowError, match="no user turn"):
        parse_row(row(("system", "be brief")), "f", 1, needs_answer=False)


@pytest.mark.parametrize(("reason", "is_kept"), [("length", True), ("context", True), ("stop", False), (["x"], False)])
def test_only_what_cut_an_answer_is_read(reason: object, is_kept: bool) -> None:
    messages = [GOOD[0], GOOD[1] | {"finish_reason": reason}]
    assert parse_row(json.dumps({"messages": messages}).encode(), "f", 1) == (messages if is_kept else GOOD)
    messages = [GOOD[0] | {"finish_reason": reason}, GOOD[1]]
    assert parse_row(json.dumps({"messages": messages}).encode(), "f", 1) == GOOD


def write_mixed(path) -> None:
    good = row(*[(m["role"], m["content"]) for m in GOOD])
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n" + b"\n  \n" + b"oops\n" + row(("user", "a")) + b"\n" + good)


def test_line_numbers_blank_lines_and_line_ends(tmp_path) -> None:
    path = tmp_path / "chats.jsonl"
    write_mixed(path)
    report = RowReport(str(path))
    assert list(read_chats(path, report)) == [(1, GOOD), (6, GOOD)]
    assert report.num_good == 2 and report.num_bad == 2
    assert report.reasons == {"malformed JSON": 1, "no assistant turn": 1}
    assert [e.split(": ")[0] for e in report.messages] == [f"{path}:4", f"{path}:5"]
    assert "2 rows used, 2 skipped (1 x malformed JSON, 1 x no assistant turn)" in report.summary()
    data = path.read_bytes()
    assert all(data[r.offset : r.offset + len(r.content)] == r.content for r in scan_rows(path))


def test_policies(tmp_path) -> None:
    path = tmp_path / "chats.jsonl"
    write_mixed(path)
    with pytest.raises(RowError, match=r"chats.jsonl:4: malformed JSON"):
        list(read_chats(path, RowReport(str(path), bad_rows="fail")))
    assert len(list(read_chats(path, RowReport(str(path), max_bad_rows=2)))) == 2
    with pytest.raises(ResponsesError, match=r"more than max_bad_rows = 1"):
        list(read_chats(path, RowReport(str(path), max_bad_rows=1)))


def test_every_bad_row_is_named(tmp_path) -> None:
    path = tmp_path / "chats.jsonl"
    good = json.dumps({"messages": GOOD})
    path.write_text("\n".join([good, *["oops"] * 103]))
    report = RowReport(str(path))
    list(read_chats(path, report))
    lines = report.summary().splitlines()
    assert lines[0] == f"{path}: 1 rows used, 103 skipped (103 x malformed JSON):"
    assert [line.strip().split(": ")[0] for line in lines[1:-1]] == [f"{path}:{n}" for n in range(2, 102)]
    assert lines[-1] == "  and 3 more"


def test_bad_rows_are_logged_as_they_are_found_and_once(tmp_path) -> None:
    path, log = tmp_path / "chats.jsonl", tmp_path / "run" / "bad_rows.jsonl"
    write_mixed(path)
    for _ in range(2):
        report = RowReport(str(path), log_path=log)
        rows = read_chats(path, report)
        next(rows)
        assert not log.exists()
        next(rows)
        logged = [json.loads(line) for line in log.read_text().splitlines()]
        assert [(row["path"], row["line"], row["reason"]) for row in logged] == [
            (str(path), 4, "malformed JSON"),
            (str(path), 5, "no assistant turn"),
        ]
        assert logged[0]["detail"].startswith("Expecting value")
        assert str(log) in report.summary() and f"{path}:4: malformed JSON" in report.summary()
    with pytest.raises(ResponsesError, match="max_bad_rows = 1") as caught:
        list(read_chats(path, RowReport(str(path), max_bad_rows=1, log_path=log)))
    assert str(log) in str(caught.value) and len(log.read_text().splitlines()) == 2


def test_nothing_left_is_an_error(tmp_path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"x\ny\n")
    with pytest.raises(ResponsesError, match="every row was dropped"):
        list(read_chats(path))
    path.write_bytes(b"")
    with pytest.raises(ResponsesError, match="no rows"):
        list(read_chats(path))
    with pytest.raises(ResponsesError, match="cannot be read"):
        list(read_chats(tmp_path / "absent.jsonl"))


def test_write_then_read(tmp_path) -> None:
    path = tmp_path / "new" / "chats.jsonl"
    odd = [{"role": "user", "content": "\u2028 é 🎲"}, {"role": "assistant", "content": "x" * 200_000}]
    assert write_chats(path, [GOOD, {"messages": odd, "seed": 1}]) == 2
    assert write_chats(path, [GOOD]) == 1
    assert [messages for _, messages in read_chats(path)] == [GOOD, odd, GOOD]
    assert json.loads(path.read_text().splitlines()[1])["seed"] == 1


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_resume_after_a_cut_line(tmp_path, cut: int) -> None:
    path = tmp_path / "chats.jsonl"
    write_chats(path, [GOOD, GOOD])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2 + cut])
    with pytest.raises(ResponsesError, match="is cut"):
        write_chats(path, [GOOD])
    write_chats(path, [GOOD], resume=True)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("tail", [b"", b"\n  "])
def test_a_whole_last_line_is_kept(tmp_path, resume: bool, tail: bytes) -> None:
    path = tmp_path / "chats.jsonl"
    write_chats(path, [GOOD])
    path.write_bytes(path.read_bytes()[:-1] + tail)
    write_chats(path, [GOOD], resume=resume)
    assert [messages for _, messages in read_chats(path)] == [GOOD, GOOD]


def test_rows_survive_an_interrupted_writer(tmp_path) -> None:
    path = tmp_path / "chats.jsonl"

    def interrupted():
        yield GOOD
        assert path.read_bytes().count(b"\n") == 1  # flushed before the next one is asked for
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_chats(path, interrupted())
    assert len(list(read_chats(path))) == 1
