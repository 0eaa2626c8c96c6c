"""Text of a growing token sequence: what may be shown already, and where a stop string ends it.

Whatever way the tokens arrive, the joined text is the same, byte for byte. Held back are bytes that may become a letter
and letters that may become a stop string; both come out with the token that settles the matter.
"""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StopRules:
    """What ends a text besides the engine's stop ids.

    Attributes:
        strings: stop strings, none of them empty.
        include_stop: the stop string (or stop id's text) stays in the text.
        min_tokens: a stop string counts only where a token after that many completes it.
    """

    strings: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0


@dataclass
class TextDelta:
    """What a few tokens added.

    Attributes:
        pieces: (text, index of the token that wrote it), in order; joined: the new text. No piece is empty.
        num_tokens: tokens that count; fewer than were given where a stop string ended the text.
        is_stopped: a stop string ended the text.
    """

    pieces: list[tuple[str, int]] = field(default_factory=list)
    num_tokens: int = 0
    is_stopped: bool = False

    @property
    def text(self) -> str:
        """The new text."""
        return "".join(piece for piece, _ in self.pieces)


class TextStream:
    """Incremental detokenisation of one sequence under stop rules.

    Attributes:
        token_offsets: for every token, where in the text (before a stop string was cut) its own text begins.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], skip_ids: frozenset[int], rules: StopRules) -> None:
        """Begin with no text; `skip_ids` are tokens that are no text."""
        self._token_bytes = token_bytes
        self._skip_ids = skip_ids
        self._rules = rules
        self._max_stop_len = max(map(len, rules.strings), default=0)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held: list[tuple[str, int]] = []
        self._num_written = 0
        self.token_offsets: list[int] = []

    def add(self, token_ids: Sequence[int], ends_with_stop_id: bool = False, is_last: bool = False) -> TextDelta:
        """Take further tokens and return what they settle; nothing may be added after a stop or `is_last`."""
        delta = TextDelta()
        for position, token_id in enumerate(token_ids):
            is_stop_id = ends_with_stop_id and position == len(token_ids) - 1
            hides = token_id in self._skip_ids or (is_stop_id and not self._rules.include_stop)
            text = "" if hides else self._utf8.decode(self._token_bytes(token_id))
            index = len(self.token_offsets)
            self.token_offsets.append(self._num_written)
            delta.num_tokens += 1
            if self._write(text, index, delta):
                return delta
        if is_last:
            if self._write(self._utf8.decode(b"", True), len(self.token_offsets) - 1, delta):
                return delta
            self._release(delta, 0)
        else:
            self._release(delta, self._num_held_back())
        return delta

    def _write(self, text: str, index: int, delta: TextDelta) -> bool:
        if not text:
            return False
        self._held.append((text, index))
        self._num_written += len(text)
        if not self._rules.strings or index < self._rules.min_tokens:
            return False
        held = "".join(piece for piece, _ in self._held)
        found = self._find_stop(held, max(0, len(held) - len(text)))
        if found is None:
            return False
        start, end = found
        self._release(delta, len(held) - (end if self._rules.include_stop else start))
        self._held.clear()
        delta.is_stopped = True
        return True

    def _find_stop(self, held: str, num_old: int) -> tuple[int, int] | None:
        # The one that is complete first, of those the longest; only what reaches into the new text is new.
        found = None
        for stop in self._rules.strings:
            start = held.find(stop, max(0, num_old - len(stop) + 1))
            if start >= 0:
                end = start + len(stop)
                if found is None or (end, start) < (found[1], found[0]):
                    found = start, end
        return found

    def _num_held_back(self) -> int:
        # Letters at the end that begin a stop string, without being one.
        if not self._held or not self._rules.strings:
            return 0
        tail = "".join(piece for piece, _ in self._held)[-self._max_stop_len :]
        for length in range(min(len(tail), self._max_stop_len - 1), 0, -1):
            if any(len(stop) > length and stop.startswith(tail[-length:]) for stop in self._rules.strings):
                return length
        return 0

    def _release(self, delta: TextDelta, num_kept: int) -> None:
        num_out = sum(len(piece) for piece, _ in self._held) - num_kept
        while num_out > 0:
            piece, index = self._held[0]
            if len(piece) <= num_out:
                self._held.pop(0)
                delta.pieces.append((piece, index))
            else:
                self._held[0] = piece[num_out:], index
                delta.pieces.append((piece[:num_out], index))
            num_out -= len(piece)
