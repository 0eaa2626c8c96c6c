"""JSONL of chats: read, validate, write.

In: one JSON object a line, `messages` (OpenAI roles) or `conversations` (ShareGPT); an assistant turn may have a
`finish_reason`, other fields are ignored. Out: checked messages with their line numbers; a row that cannot be used is
a `RowError` with file, line and reason, which a `RowReport` counts, lists and skips or makes fatal. Lines are read as
bytes and end with a line feed only, so a row is found again by its offset. Knows nothing about tokenizers or batches.

Source: message fields of the OpenAI chat API and of ShareGPT exports.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_ROLES = ("system", "user", "assistant")
CUT_REASONS = ("length", "context")
"""Values of an assistant turn's `finish_reason` that say: the answer was cut, its end was never written."""
_MAX_MESSAGES = 100
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class ResponsesError(ValueError):
    """A file of chats that cannot be used as a whole; the message says why and what to do."""


class RowError(ResponsesError):
    """One row that cannot be used.

    Attributes:
        path: the file.
        line_no: 1-based line.
        reason: a short reason that rows are counted by.
        detail: what was found in this row; may be empty.
    """

    def __init__(self, path: str | Path, line_no: int, reason: str, detail: str = "") -> None:
        """Build the message `path:line: reason (detail)`."""
        super().__init__(f"{path}:{line_no}: {reason}" + (f" ({detail})" if detail else ""))
        self.path, self.line_no, self.reason, self.detail = str(path), line_no, reason, detail


@dataclass(frozen=True)
class RawRow:
    """A line of the file that is not blank.

    Attributes:
        line_no: 1-based line.
        offset: first byte of the line in the file.
        content: the bytes of the line, line break included.
    """

    line_no: int
    offset: int
    content: bytes


@dataclass
class RowReport:
    """Counts of a pass over a file, and what a bad row leads to.

    Attributes:
        bad_rows: `skip` counts a bad row and goes on; `fail` raises it.
        max_bad_rows: one bad row more than this raises; -1: no cap.
        log_path: JSONL that every bad row is written to as it is found; one of an earlier pass is removed.
        num_good: rows that can be used.
        reasons: bad rows by reason.
        messages: of the first 100 bad rows.
    """

    path: str
    bad_rows: Literal["skip", "fail"] = "skip"
    max_bad_rows: int = -1
    log_path: Path | None = None
    num_good: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.log_path:
            self.log_path.unlink(missing_ok=True)

    @property
    def num_bad(self) -> int:
        """Return the number of rows that were not used."""
        return sum(self.reasons.values())

    def add_bad(self, error: RowError) -> None:
        """Count and log `error`, or raise where the policy says so.

        Raises:
            RowError: `bad_rows` is `fail`.
            ResponsesError: more than `max_bad_rows` rows are bad.
        """
        if self.bad_rows == "fail":
            raise error
        self.reasons[error.reason] += 1
        if len(self.messages) < _MAX_MESSAGES:
            self.messages.append(str(error))
        if self.log_path:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            row = {"path": error.path, "line": error.line_no, "reason": error.reason, "detail": error.detail}
            with self.log_path.open("a", encoding="ascii") as file:
                file.write(json.dumps(row) + "\n")
        if 0 <= self.max_bad_rows < self.num_bad:
            raise ResponsesError(
                f"more than max_bad_rows = {self.max_bad_rows} bad rows: repair the file or raise data.max_bad_rows "
                f"(-1: no cap); {self.summary()}"
            ) from error

    def require_good(self) -> None:
        """Check that at least one row can be used.

        Raises:
            ResponsesError: the file is empty or every row was dropped.
        """
        if self.num_good == 0:
            what = f"every row was dropped; {self.summary()}" if self.num_bad else "the file has no rows"
            raise ResponsesError(f"{self.path}: nothing can be read from it: {what}")

    def summary(self) -> str:
        """Return the counts by reason, and the bad rows or the log that lists them."""
        text = f"{self.path}: {self.num_good} rows used, {self.num_bad} skipped"
        if not self.num_bad:
            return text
        text += " (" + ", ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common()) + ")"
        if self.log_path:
            return f"{text}; all of them are listed in {self.log_path}, the first: {self.messages[0]}"
        num_more = self.num_bad - len(self.messages)
        return "\n  ".join([f"{text}:", *self.messages, *([f"and {num_more} more"] if num_more else [])])


def scan_rows(path: str | Path) -> Iterator[RawRow]:
    """Yield every line that is not blank, as bytes, without checking it.

    Raises:
        ResponsesError: the file cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            offset = 0
            for line_no, content in enumerate(file, start=1):
                if content.strip():
                    yield RawRow(line_no, offset, content)
                offset += len(content)
    except OSError as error:
        raise ResponsesError(f"{path} cannot be read: {error.strerror}; give a JSONL file of chats") from error


def parse_row(content: bytes, path: str | Path, line_no: int, needs_answer: bool = True) -> list[dict[str, str]]:
    """Return the messages of one line: `role` and `content`, and `finish_reason` where an answer was cut.

    `needs_answer` False also takes chats without an assistant turn, as prompts; then a user turn is needed.

    Raises:
        RowError: the line is not a chat; the reason is one of a short list.
    """
    if line_no == 1:
        content = content.removeprefix(_BYTE_ORDER_MARK)
    try:
        row = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(path, line_no, "not UTF-8", f"byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise RowError(path, line_no, "malformed JSON", str(error)) from error
    if not isinstance(row, dict):
        raise RowError(path, line_no, "not an object", f"a JSON {type(row).__name__}")
    if "messages" in row:
        turns, role_key, content_key, roles = row["messages"], "role", "content", {role: role for role in _ROLES}
    elif "conversations" in row:
        turns, role_key, content_key, roles = row["conversations"], "from", "value", _SHAREGPT_ROLES
    else:
        raise RowError(path, line_no, "no messages", "neither 'messages' nor 'conversations' is there")
    if not isinstance(turns, list) or not turns:
        raise RowError(path, line_no, "no messages", "the list of turns is empty or not a list")
    messages = []
    for i, turn in enumerate(turns):
        reason, detail, message = _read_turn(turn, role_key, content_key, roles)
        if message is None:
            raise RowError(path, line_no, reason, f"turn {i}: {detail}")
        messages.append(message)
    _check_order(messages, path, line_no, needs_answer)
    return messages


def read_chats(
    path: str | Path, report: RowReport | None = None, needs_answer: bool = True
) -> Iterator[tuple[int, list[dict[str, str]]]]:
    """Yield `(line number, messages)` of every usable row; bad rows go to `report` (one that skips when None).

    `needs_answer` as in `parse_row`.

    Raises:
        RowError: a bad row while the report's policy is `fail`.
        ResponsesError: the file cannot be opened, too many rows are bad, or no row is left.
    """
    report = RowReport(str(path)) if report is None else report
    for row in scan_rows(path):
        try:
            messages = parse_row(row.content, path, row.line_no, needs_answer)
        except RowError as error:
            report.add_bad(error)
            continue
        report.num_good += 1
        yield row.line_no, messages
    report.require_good()


def write_chats(
    path: str | Path, chats: Iterable[Mapping[str, Any] | Sequence[Mapping[str, str]]], resume: bool = False
) -> int:
    """Append chats, one JSON object a line, flushed row by row; return how many were written.

    A chat is a row with `messages` and any other fields, or just its messages. Folders are made when missing. With
    `resume` a last line that an interruption cut is removed first; it is written again by the caller.

    Raises:
        ResponsesError: the last line of the file is cut and `resume` is false.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _repair_tail(path, resume)
    num_written = 0
    with path.open("ab") as file:
        for chat in chats:
            row = dict(chat) if isinstance(chat, Mapping) else {"messages": [dict(m) for m in chat]}
            # ASCII escapes: half a surrogate pair, which UTF-8 cannot hold, is written and then reported on reading.
            file.write(json.dumps(row).encode("ascii") + b"\n")
            file.flush()
            num_written += 1
        os.fsync(file.fileno())
    return num_written


def _read_turn(
    turn: Any, role_key: str, content_key: str, roles: Mapping[str, str]
) -> tuple[str, str, dict[str, str] | None]:
    if not isinstance(turn, dict):
        return "malformed turn", f"a JSON {type(turn).__name__}, it must be an object", None
    name = turn.get(role_key)
    role = roles.get(name) if isinstance(name, str) else None
    if role is None:
        return "unknown role", f"{role_key!r} is {name!r}; allowed: {', '.join(roles)}", None
    content = turn.get(content_key)
    if not isinstance(content, str):
        return "content is not text", f"{content_key!r} of the {role} is {type(content).__name__}", None
    if not content.strip():
        return "empty content", f"{content_key!r} of the {role}", None
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        return "not UTF-8", f"{content_key!r} of the {role} holds half a surrogate pair", None
    message = {"role": role, "content": content}
    if role == "assistant" and turn.get("finish_reason") in CUT_REASONS:
        message["finish_reason"] = turn["finish_reason"]
    return "", "", message


def _check_order(messages: Sequence[Mapping[str, str]], path: str | Path, line_no: int, needs_answer: bool) -> None:
    previous = None
    for i, message in enumerate(messages):
        role = message["role"]
        if role == "system" and i > 0:
            raise RowError(path, line_no, "roles out of order", f"turn {i}: a system message must be the first")
        if role == "assistant" and previous != "user":
            raise RowError(path, line_no, "roles out of order", f"turn {i}: an assistant must follow a user")
        previous = role
    needed = "assistant" if needs_answer else "user"
    if all(message["role"] != needed for message in messages):
        raise RowError(path, line_no, f"no {needed} turn")


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return False
    return True


def _repair_tail(path: Path, resume: bool) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        tail = None
        for row in scan_rows(path):
            tail = row
        if tail is None or tail.content.endswith(b"\n") or _is_json(tail.content):
            file.write(b"\n")
        elif resume:
            file.truncate(tail.offset)
        else:
            raise ResponsesError(f"the last line of {path} is cut; pass resume=True to drop it and go on after it")
