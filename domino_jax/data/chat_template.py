"""Chats to token ids and loss masks, by the tokenizer's own chat template.

In: a fast transformers tokenizer and OpenAI-style messages. Out: the ids of the whole rendering and a mask that is 1
exactly on the tokens the model has to produce: the assistant's text and the token that ends its turn. The rendering
is tokenised once, and spans of characters are mapped to tokens through offsets. Knows nothing about files of chats,
batches or models, and never runs code that comes with a checkpoint.

Source: `{% generation %}` tags and chat templates of Hugging Face transformers; thinking blocks as Qwen3 renders them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

Messages = Sequence[Mapping[str, str]]
"""Turns of a chat, oldest first; each has `role` (system, user or assistant) and `content`.

An assistant turn with a `finish_reason` other than `stop` was cut: nobody wrote the token that ends it.
"""

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class ChatTemplateError(ValueError):
    """A tokenizer or template that cannot render a chat; the message says what is missing and what to do."""


def load_tokenizer(path_or_id: str, needs_template: bool = True) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a Hugging Face directory or hub id; code of the checkpoint is never run.

    Raises:
        ChatTemplateError: no tokenizer files, a tokenizer that needs its own code, no fast form, or no chat template
            although `needs_template`.
    """
    directory = Path(path_or_id)
    if directory.is_dir() and not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise ChatTemplateError(
            f"{path_or_id} holds no tokenizer: none of {', '.join(_TOKENIZER_FILES)} is there; "
            "copy the tokenizer's files beside the weights"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_id, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ChatTemplateError(
            f"no tokenizer could be loaded from {path_or_id!r}: {error}; give a directory with tokenizer.json or a "
            "reachable hub id (tokenizers that need trust_remote_code are refused)"
        ) from error
    if needs_template:
        _require_chat(tokenizer)
    else:
        _require_fast(tokenizer)
    return tokenizer


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, enable_thinking: bool
) -> tuple[list[int], list[int]]:
    """Return the ids of the whole chat and a mask, 1 on the assistant's tokens, its end-of-turn token included.

    Templates with `{% generation %}` tags say themselves what the assistant wrote. For all others a turn starts where
    the generation prompt ends and ends with its content and the end-of-turn token. A token that reaches over the
    border of a turn counts as prompt: the model could not produce it after the generation prompt. The end-of-turn
    token of a turn that was cut has mask 0.

    Raises:
        ChatTemplateError: the template fails, or its renderings of a chat's prefixes do not fit the whole rendering.
    """
    template = _require_chat(tokenizer)
    if _GENERATION_TAG.search(template):
        text, spans = _spans_by_tags(tokenizer, template, messages, enable_thinking)
    else:
        text, spans = _spans_by_prefix(tokenizer, messages, enable_thinking)
    spans = _leave_out_unwritten_ends(tokenizer, messages, text, spans)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), _mask_tokens(encoded["offset_mapping"], spans)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, enable_thinking: bool) -> list[int]:
    """Return the ids of the chat followed by the generation prompt, ready for decoding.

    Raises:
        ChatTemplateError: the tokenizer has no chat template or the template fails on these messages.
    """
    _require_chat(tokenizer)
    text = _render(tokenizer, messages, enable_thinking, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def renders_as_written(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, answer: str, enable_thinking: bool
) -> bool:
    """Return whether the chat with `answer` renders as the prompt for it and its very text.

    A template may rewrite an answer that was cut: Qwen3's puts an empty thought before one that ends inside a thought.

    Raises:
        ChatTemplateError: the template fails on these messages.
    """
    prompt = _render(tokenizer, messages, enable_thinking, add_generation_prompt=True)
    chat = [*messages, {"role": "assistant", "content": answer}]
    return _render(tokenizer, chat, enable_thinking, add_generation_prompt=False).startswith(prompt + answer)


def find_stop_ids(tokenizer: PreTrainedTokenizerBase | None, path_or_id: str | None = None) -> tuple[int, ...]:
    """Return the ids that end a generation, ascending: the tokenizer's end token and `generation_config.json`'s.

    Without a tokenizer there may be none.

    Raises:
        ChatTemplateError: `generation_config.json` cannot be read or holds something else than ids, or a tokenizer is
            given and no id is found.
    """
    stop_ids = set() if tokenizer is None or tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    config_path = _find_generation_config(path_or_id) if path_or_id else None
    if config_path is not None:
        try:
            configured = json.loads(config_path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise ChatTemplateError(f"{config_path} is not a JSON object that can be read: {error}") from error
        configured = [] if configured is None else configured if isinstance(configured, list) else [configured]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in configured):
            raise ChatTemplateError(f"{config_path}: eos_token_id is {configured!r}; it must be an id or a list of ids")
        stop_ids.update(configured)
    if tokenizer is not None and not stop_ids:
        raise ChatTemplateError(
            "no stop id: the tokenizer has no eos_token and no generation_config.json names one; add eos_token to "
            "tokenizer_config.json"
        )
    return tuple(sorted(stop_ids))


def find_mask_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """Return the drafter's mask token: the tokenizer's own, else the lowest id of the target that no token uses.

    Raises:
        ChatTemplateError: the tokenizer's mask token is also its padding or end token, or it has none and the target's
            vocabulary has no unused id.

    Source: the published Domino settings for Qwen3-8B take 151669, the first id after the tokenizer's last.
    """
    used = set(tokenizer.get_vocab().values())
    unused = next((i for i in range(vocab_size) if i not in used), None)
    mask_id = tokenizer.mask_token_id
    if mask_id is None or mask_id >= vocab_size:
        if unused is None:
            raise ChatTemplateError(
                f"no mask token: the tokenizer has none below {vocab_size} and its {len(used)} tokens fill the "
                "vocabulary; set draft.mask_token_id to the id of a token that never occurs in text"
            )
        return unused
    for name, other_id in (("pad", tokenizer.pad_token_id), ("eos", tokenizer.eos_token_id)):
        if mask_id == other_id:
            choice = "of a token that never occurs in text" if unused is None else f"no token uses, such as {unused}"
            raise ChatTemplateError(
                f"the tokenizer's mask token {tokenizer.mask_token!r} (id {mask_id}) is also its {name} token, which "
                f"occurs in text; set draft.mask_token_id to an id {choice}"
            )
    return int(mask_id)


def _require_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise ChatTemplateError(f"{type(tokenizer).__name__} is not a fast tokenizer; save it with tokenizer.json")


def _require_chat(tokenizer: PreTrainedTokenizerBase) -> str:
    _require_fast(tokenizer)
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use the chat version of the model or add "
            "chat_template to tokenizer_config.json"
        )
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise ChatTemplateError(f"no default among the chat templates: {error}") from error


def _find_generation_config(path_or_id: str) -> Path | None:
    if Path(path_or_id).is_dir():
        path = Path(path_or_id) / "generation_config.json"
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(path_or_id, "generation_config.json"))
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ChatTemplateError(f"generation_config.json of {path_or_id!r} is out of reach: {error}") from error


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, enable_thinking: bool, add_generation_prompt: bool
) -> str:
    try:
        return tokenizer.apply_chat_template(
            [dict(m) for m in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=enable_thinking,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ChatTemplateError(f"the chat template failed on this chat: {error}") from error


def _spans_by_tags(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Messages, enable_thinking: bool
) -> tuple[str, list[tuple[int, int]]]:
    arguments = {**tokenizer.special_tokens_map, "enable_thinking": enable_thinking}
    try:
        rendered, spans = render_jinja_template(
            conversations=[[dict(m) for m in messages]],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **arguments,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ChatTemplateError(f"the chat template failed on this chat: {error}") from error
    text = rendered[0]
    return text, [(start, _end_at_token(tokenizer, text, start, end)) for start, end in spans[0]]


def _end_at_token(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int) -> int:
    # Tags may stop short of the end-of-turn token or reach over the line break behind it, which nobody generates.
    written = text[start:end].rstrip()
    if written.endswith(tuple(_special_texts(tokenizer))):
        return start + len(written)
    end_of_turn = tokenizer.eos_token
    return end + len(end_of_turn) if end_of_turn and text.startswith(end_of_turn, end) else end


def _special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added.union(tokenizer.all_special_tokens), key=lambda text: (-len(text), text))


def _spans_by_prefix(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, enable_thinking: bool
) -> tuple[str, list[tuple[int, int]]]:
    text = _render(tokenizer, messages, enable_thinking, add_generation_prompt=False)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    stand_in = _pick_stand_in(text)
    end_of_turn = _find_end_of_turn(tokenizer, messages[: turns[0]], stand_in, enable_thinking) if turns else ""
    spans, reached = [], 0
    for turn in turns:
        around = [dict(m) for m in messages]
        around[turn]["content"] = stand_in
        before, found, after = _render(tokenizer, around, enable_thinking, False).partition(stand_in)
        start = _find_start(tokenizer, messages[:turn], text, before, enable_thinking)
        end = len(text) - len(after)
        if not found or not text.endswith(after) or start is None or not reached <= start <= end:
            raise ChatTemplateError(
                f"the chat template is not prefix-stable: message {turn} (assistant) cannot be located in the whole "
                "rendering, because the text around it changes with the turn or with what follows; add "
                "{% generation %} tags around the assistant's text in the template"
            )
        reached = end + len(end_of_turn) * text.startswith(end_of_turn, end)
        spans.append((start, reached))
    return text, spans


def _leave_out_unwritten_ends(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, text: str, spans: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    was_cut = [m.get("finish_reason", "stop") != "stop" for m in messages if m["role"] == "assistant"]
    if not any(was_cut):
        return spans
    if len(was_cut) != len(spans):
        raise ChatTemplateError(
            f"the chat template marks {len(spans)} stretches of text as generated for {len(was_cut)} assistant turns, "
            "so the end of an answer that was cut cannot be told; give every assistant turn one pair of "
            "{% generation %} tags, or leave out the rows that were cut"
        )
    endings = _special_texts(tokenizer)
    for i, (start, end) in enumerate(spans):
        if was_cut[i]:
            spans[i] = start, end - next((len(t) for t in endings if t and text.endswith(t, start, end)), 0)
    return spans


def _pick_stand_in(text: str) -> str:
    # Takes the place of a turn's content in a rendering, so it must not occur in the chat.
    number = 0
    while f"stand{number}in" in text:
        number += 1
    return f"stand{number}in"


def _find_start(
    tokenizer: PreTrainedTokenizerBase, history: Messages, text: str, before: str, enable_thinking: bool
) -> int | None:
    # What the model is given when it writes this turn, where the whole rendering keeps it. Qwen3 drops the thinking
    # block of earlier turns: there the turn starts where its content does, and last where thinking itself is learned.
    prompt = _render(tokenizer, history, enable_thinking, add_generation_prompt=True)
    if text.startswith(prompt):
        return len(prompt)
    if text.startswith(before):
        return len(before)
    prompt = _render(tokenizer, history, not enable_thinking, add_generation_prompt=True)
    return len(prompt) if text.startswith(prompt) else None


def _find_end_of_turn(
    tokenizer: PreTrainedTokenizerBase, history: Messages, stand_in: str, enable_thinking: bool
) -> str:
    # Rendered as the last turn, so that the next turn's header is not taken for the end of this one.
    chat = [*(dict(m) for m in history), {"role": "assistant", "content": stand_in}]
    after = _render(tokenizer, chat, enable_thinking, add_generation_prompt=False).partition(stand_in)[2]
    return next((text for text in _special_texts(tokenizer) if text and after.startswith(text)), "")


def _mask_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    mask, span = [0] * len(offsets), 0
    for i, (start, end) in enumerate(offsets):
        if start == end:
            start -= 1  # some post-processors trim the offsets of a token that is all white space to nothing
        while span < len(spans) and start >= spans[span][1]:
            span += 1
        if span < len(spans) and spans[span][0] <= start and end <= spans[span][1]:
            mask[i] = 1
    return mask
