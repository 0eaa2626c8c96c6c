"""Prompts of a benchmark as token ids, by the target's tokenizer; of a prompt of several turns the first."""

from collections.abc import Sequence
from typing import Any

from domino_jax.data.chat_template import encode_prompt, load_tokenizer
from domino_jax.evaluation.prompts import Prompt


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
