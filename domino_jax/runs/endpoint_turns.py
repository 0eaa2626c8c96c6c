"""An endpoint's reply as the assistant's turn of a training row: what a drafter can learn from it, and what not.

In: a reply and the turns it answers. Out: the turn whose rendering by the chat template is what the target wrote.
"""

from transformers import PreTrainedTokenizerBase

from domino_jax.data.chat_template import ChatTemplateError, renders_as_written
from domino_jax.data.responses import CUT_REASONS
from domino_jax.runs.endpoints import Reply
from domino_jax.runs.responses import Messages


class Unlearnable(Exception):
    """An answer that a drafter cannot learn from.

    Attributes:
        reason: a short reason that rows are counted by.
        detail: what was found; may be empty.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        """Keep the reason."""
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def build_turn(
    reply: Reply, asked: Messages, tokenizer: PreTrainedTokenizerBase | None, enable_thinking: bool
) -> dict[str, str]:
    """Return the assistant's turn whose rendering is what the target wrote.

    A thought that the endpoint's reasoning parser took out is put back as the chat template has it: with its opening
    tag, or without where the generation prompt ends in it. Without a tokenizer Qwen3's form is taken.

    Raises:
        Unlearnable: there is no such turn.
    """
    if reply.finish_reason not in ("stop", *CUT_REASONS):
        raise Unlearnable("unusable finish reason", reply.finish_reason)
    was_cut = reply.finish_reason in CUT_REASONS
    text = reply.text.rstrip("\ufffd") if was_cut else reply.text
    thought = reply.thought
    if not text.strip():
        raise Unlearnable("cut inside a thought" if was_cut and thought.strip() else "empty answer")
    if thought.strip():
        if not enable_thinking:
            raise Unlearnable("thought although thinking is off", "does the endpoint take chat_template_kwargs?")
        if any(tag in part for tag in ("<think>", "</think>") for part in (thought, text)):
            raise Unlearnable("thought that cannot be told from the answer", "a thinking tag inside the text")
        behind_tag = thought.strip("\n") + "\n</think>\n\n" + text.lstrip("\n")
        candidates = ["<think>\n" + behind_tag, behind_tag]
    else:
        candidates = [text]
    if tokenizer is None:
        text = candidates[0]
        if was_cut and "</think>" not in text and (enable_thinking or "<think>" in text):
            raise Unlearnable("cut inside a thought")
    elif was_cut or thought.strip():
        try:
            written = [c for c in candidates if renders_as_written(tokenizer, asked, c, enable_thinking)]
        except ChatTemplateError as error:
            raise Unlearnable("chat template failed", str(error)) from error
        if not written:
            raise Unlearnable("rewritten by the chat template", "the thought is not rendered as it was written")
        text = written[0]
    return {"role": "assistant", "content": text, "finish_reason": reply.finish_reason}
