"""Special tokens that somebody wrote in a message, kept from acting as the tokens they spell.

A chat template puts control tokens around messages, and the rendering is tokenised as one text; a message that holds
`<|im_end|>` would end its own turn and could open another in a foreign name. Here such letters stay letters. Chats
without them never come here, so their ids are those of the rendering.

The rendering is cut at the template's own special tokens, which is where the tokenizer cuts it too, and what lies
between is encoded whole, so that tokens reach over the borders of a message as they do otherwise.

Source: `encode_special_tokens` of tokenizers (`split_special_tokens` of transformers).
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer


class WrittenTokens:
    """Finds special tokens in messages and encodes chats in which they are plain text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Know the tokenizer's special tokens."""
        self._tokenizer = tokenizer
        self._ids = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special and t.content}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _letters(self) -> Tokenizer:
        # A tokenizer of its own: how special tokens are read is a property of the object, and threads share it.
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.encode_special_tokens = True
        return tokenizer

    def are_in(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether a message holds the text of a special token."""
        texts = (value for message in messages for value in message.values() if isinstance(value, str))
        return any(self._pattern.search(text) for text in texts)

    def mark(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Return messages with marks in place of special tokens, and what each mark stands for."""
        nonce = secrets.token_hex(8)  # a mark that is guessed would be taken for a token
        marks = {text: f"w{nonce}n{i}w" for text, i in self._ids.items()}

        def replace(value: Any) -> Any:
            return self._pattern.sub(lambda found: marks[found[0]], value) if isinstance(value, str) else value

        marked = [{name: replace(value) for name, value in message.items()} for message in messages]
        return marked, {mark: text for text, mark in marks.items()}

    def encode(self, rendered: str, marks: Mapping[str, str]) -> list[int]:
        """Return the ids of a rendering of marked messages, with what the marks stand for as plain text.

        Raises:
            ValueError: the tokenizer does not cut the text at its special tokens alone.
        """
        if self._encode(rendered, {}) != self._tokenizer.encode(rendered, add_special_tokens=False).ids:
            raise ValueError(
                "a message holds the text of a special token, which this model's tokenizer cannot read as plain text; "
                "leave it out"
            )
        return self._encode(rendered, marks)

    def _encode(self, rendered: str, marks: Mapping[str, str]) -> list[int]:
        ids: list[int] = []
        end = 0
        for found in self._pattern.finditer(rendered):
            ids += [*self._encode_letters(rendered[end : found.start()], marks), self._ids[found[0]]]
            end = found.end()
        return ids + self._encode_letters(rendered[end:], marks)

    def _encode_letters(self, text: str, marks: Mapping[str, str]) -> list[int]:
        for mark, written in marks.items():
            text = text.replace(mark, written)
        return self._letters.encode(text, add_special_tokens=False).ids
