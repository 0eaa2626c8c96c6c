"""A small byte-level BPE tokenizer with a chat template, for targets that a run builds itself.

In: texts. Out: a transformers tokenizer, saved as a directory that `AutoTokenizer` loads offline. Words (with an
underscore before them), digits and punctuation never share a token, so a name has the same tokens after a space, a
bracket or an equals sign: copying names is what the embedded target has to learn. Every byte has a token: decoding
gives back any text. Knows nothing about models or chats' content.

Source: byte-level BPE of GPT-2; ChatML messages and the names of the special tokens as Qwen uses them.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT, TURN_START, TURN_END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, MASK)
"""Padding, start and end of a turn (the end is also the stop token), and the drafter's mask token: ids 0 .. 3."""

_PIECES = r"_?[A-Z]?[a-z]+|_?[A-Z]+|[0-9]|_|\n *|[^A-Za-z0-9_\s]+ ?|\s"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\n' -}}
{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}
{{- '\n' -}}
{%- else -%}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
"""ChatML; the generation tags let transformers mark the assistant's tokens, `<|im_end|>` included."""


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained as asked; the message says why."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int = 40960) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`; the result has at most `vocab_size` tokens, special tokens included.

    Raises:
        TokenizerError: `vocab_size` leaves no room beside the 256 bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise TokenizerError(f"vocab_size is {vocab_size}; bytes and special tokens alone need {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The template's own words come with every message; naming them often makes each a single token.
    tokenizer.train_from_iterator(itertools.chain(texts, ["system", "user", "assistant"] * 1000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        mask_token=MASK,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: str | Path) -> None:
    """Write `tokenizer` into `directory`, made when missing, in Hugging Face format."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(directory))
