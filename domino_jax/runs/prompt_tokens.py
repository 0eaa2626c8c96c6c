"""Prompts of a benchmark as token ids, by the target's tokenizer; of a prompt of several turns the first."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from domino_jax.data.chat_template import ChatTemplateError, encode_prompt, find_stop_ids, load_tokenizer
from domino_jax.evaluation.benchmark import TextCodec
from domino_jax.evaluation.prompts import Prompt, PromptError


def open_tokenizer(directory: str, prompts: Sequence[Prompt]) -> Any:
    """Return the tokenizer of a target, with the chat template that prompts of messages need.

    Raises:
        ChatTemplateError: there is none.
    """
    return load_tokenizer(directory, needs_template=any(p.messages or p.turns for p in prompts))


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the ids of every prompt; where all are given as ids, no tokenizer is looked at."""
    return [_encode(tokenizer, prompt) for prompt in prompts]


def _encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    if prompt.prompt_ids is not None:
        return prompt.prompt_ids
    if prompt.text is not None:
        return list(tokenizer(prompt.text)["input_ids"])
    return encode_prompt(tokenizer, prompt.messages or [{"role": "user", "content": prompt.turns[0]}], False)


def open_text(
    directory: str, prompts: Sequence[Prompt], stop_ids: str | None, enable_thinking: bool
) -> tuple[TextCodec | None, tuple[int, ...]]:
    """Return a target's tokenizer as callables, and the ids that end a text: those of `stop_ids`, else its own.

    Where all prompts are ids no tokenizer is needed; that there is none is said on stderr.

    Raises:
        ChatTemplateError: there is none and one is needed, or nothing says what ends a text.
        PromptError: `stop_ids` are no ids with commas between.
    """
    try:
        tokenizer = open_tokenizer(directory, prompts)
    except ChatTemplateError as error:
        if any(prompt.prompt_ids is None for prompt in prompts):
            raise
        print(f"no text in the rows: {error}", file=sys.stderr)
        return None, _find_stop_ids(stop_ids, None, directory)
    codec = TextCodec(
        encode_text=lambda text: list(tokenizer(text)["input_ids"]),
        encode_chat=partial(encode_prompt, tokenizer, enable_thinking=enable_thinking),
        decode=partial(tokenizer.decode, skip_special_tokens=True),
    )
    return codec, _find_stop_ids(stop_ids, tokenizer, directory)


def _find_stop_ids(given: str | None, tokenizer: Any, directory: str) -> tuple[int, ...]:
    try:
        if given is None:
            return find_stop_ids(tokenizer, directory)
        return tuple(int(part) for part in given.split(",") if part.strip())
    except ChatTemplateError as error:
        raise ChatTemplateError(f"{error}, or give --stop-ids") from error
    except ValueError as error:
        raise PromptError(f"--stop-ids is {given!r}; give token ids with commas between, such as 5,7") from error
