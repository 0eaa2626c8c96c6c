"""Replies of endpoints as turns that a drafter can learn from."""

import pytest

from domino_jax.runs.endpoint_turns import Unlearnable, build_turn
from domino_jax.runs.endpoints import Reply
from tests.data.test_chat_template import THINKING, make_tokenizer


def user(text):
    return {"role": "user", "content": text}


QWEN = make_tokenizer(THINKING)
OPENED = make_tokenizer(  # as Qwen3-Thinking-2507: the generation prompt opens the thought
    THINKING.partition("{%- if add_generation_prompt")[0]
    + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}{%- endif -%}"
)
SHOUTING = make_tokenizer("{{ messages[-1].content | upper }}")
THOUGHT = "<think>\nhm\n</think>\n\none"


@pytest.mark.parametrize(
    ("tokenizer", "reply", "content"),
    [
        (None, Reply("\n\none", "\nhm\n", "stop", 1), THOUGHT),
        (QWEN, Reply("one", "hm", "stop", 1), THOUGHT),
        (QWEN, Reply("\n\none", "\nhm\n", "length", 1), THOUGHT),
        (OPENED, Reply("one", "hm", "stop", 1), THOUGHT.removeprefix("<think>\n")),
        (None, Reply(THOUGHT, "", "length", 1), THOUGHT),
        (None, Reply("one\ufffd", "", "stop", 1), "one\ufffd"),
        (QWEN, Reply(THOUGHT + "\ufffd", "", "length", 1), THOUGHT),
    ],
)
def test_a_thought_is_put_back_as_it_was_written(tokenizer, reply, content):
    turn = build_turn(reply, [user("a?")], tokenizer, True)
    assert turn == {"role": "assistant", "content": content, "finish_reason": reply.finish_reason}


@pytest.mark.parametrize(
    ("tokenizer", "reply", "enable_thinking", "reason"),
    [
        (None, Reply("", "hm", "length", 1), True, "cut inside a thought"),
        (None, Reply("<think>\nhm", "", "length", 1), True, "cut inside a thought"),
        (QWEN, Reply("<think>\nhm", "", "length", 1), True, "rewritten by the chat template"),
        (QWEN, Reply("one", "hm", "stop", 1), False, "thought although thinking is off"),
        (None, Reply("one", "a </think> b", "stop", 1), True, "thought that cannot be told from the answer"),
        (SHOUTING, Reply("one", "hm", "stop", 1), True, "rewritten by the chat template"),
        (None, Reply(" \n", "", "stop", 1), False, "empty answer"),
        (None, Reply("one", "", "content_filter", 1), False, "unusable finish reason"),
    ],
)  # fmt: skip
def test_an_answer_that_cannot_be_learned_is_named(tokenizer, reply, enable_thinking, reason):
    with pytest.raises(Unlearnable) as caught:
        build_turn(reply, [user("a?")], tokenizer, enable_thinking)
    assert caught.value.reason == reason
