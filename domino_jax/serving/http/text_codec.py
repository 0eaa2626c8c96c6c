"""Text to token ids and back, as the API needs it; the tokenizer behind it is somebody else's.

What makes exact streams simple is that byte-level tokenizers (GPT-2's, and so Qwen's) write a text as the joined bytes
of its tokens: a stream is the bytes so far, read as UTF-8.

Source: byte-to-letter table of GPT-2 (`bytes_to_unicode`), as `tokenizers.decoders.ByteLevel` reads it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jinja2
from tokenizers import Tokenizer, decoders

from domino_jax.serving.http.written_tokens import WrittenTokens

RenderChat = Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], str]
"""Writes messages as the model's prompt; takes the template's further variables, such as `enable_thinking`."""

_TEMPLATE_ERRORS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError
)  # fmt: skip


class TextCodecError(ValueError):
    """A text, chat or tokenizer that cannot be used; the message says what is wrong with it."""


@runtime_checkable
class TextCodec(Protocol):
    """What the API knows of a tokenizer; all methods are safe from any thread.

    Attributes:
        stop_ids: ids that end a text (end of turn, end of text).
        special_ids: ids that are no text and are left out of it on request.
    """

    stop_ids: tuple[int, ...]
    special_ids: frozenset[int]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any]) -> list[int]:
        """Return the ids of a chat as the model's prompt.

        Raises:
            ValueError: the chat template refuses it; the message is fit for users.
        """
        ...

    def encode_text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a plain text."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token stands for: a text's bytes are its tokens' bytes, joined. Unknown ids have none."""
        ...


class ByteLevelCodec:
    """A `TextCodec` over a byte-level `tokenizers.Tokenizer`.

    Raises:
        TextCodecError: the tokenizer is not a byte-level one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        render_chat: RenderChat,
        stop_ids: Sequence[int],
        special_ids: Sequence[int] | None = None,
    ) -> None:
        """Read every token's bytes once; `special_ids`: those that the tokenizer marks as special, where not given."""
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise TextCodecError(
                f"the tokenizer's decoder is {type(tokenizer.decoder).__name__}; serving streams text of byte-level "
                "tokenizers (decoder ByteLevel, as Qwen3 has it)"
            )
        self._tokenizer = tokenizer
        self._written_tokens = WrittenTokens(tokenizer)
        self._render_chat = render_chat
        self.stop_ids = tuple(stop_ids)
        added = tokenizer.get_added_tokens_decoder()
        special = [i for i, token in added.items() if token.special] if special_ids is None else special_ids
        self.special_ids = frozenset(special)
        letters = _letter_bytes()
        self._bytes = {i: _bytes_of(token, letters) for token, i in tokenizer.get_vocab().items()}

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any]) -> list[int]:
        """Render and encode a chat; special tokens that its messages spell are plain text.

        Raises:
            TextCodecError: the chat template refuses the chat or a variable, or a message spells a special token that
                the tokenizer cannot read otherwise.
        """
        if not self._written_tokens.are_in(messages):
            return self.encode_text(self._render(messages, template_kwargs), add_special_tokens=False)
        marked, marks = self._written_tokens.mark(messages)
        try:
            return self._written_tokens.encode(self._render(marked, template_kwargs), marks)
        except ValueError as error:
            raise TextCodecError(str(error)) from error

    def _render(self, messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any]) -> str:
        try:
            return self._render_chat(messages, template_kwargs)
        except _TEMPLATE_ERRORS as error:
            raise TextCodecError(f"the chat template failed on this chat: {str(error)[:200]}") from error

    def encode_text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids."""
        kept = (i for i in ids if not (skip_special_tokens and i in self.special_ids))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return a token's bytes; none for an id without a token, as padded vocabularies have them."""
        return self._bytes.get(token_id, b"")


def _letter_bytes() -> dict[str, int]:
    # Printable Latin-1 letters stand for themselves, the other bytes for the letters from U+0100 on, in order.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _bytes_of(token: str, letters: Mapping[str, int]) -> bytes:
    # A token with a letter outside the table was added as plain text.
    if all(letter in letters for letter in token):
        return bytes(letters[letter] for letter in token)
    return token.encode("utf-8")
