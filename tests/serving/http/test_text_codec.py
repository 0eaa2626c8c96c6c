"""The byte-level codec against the tokenizer it reads."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from domino_jax.serving.http.text_codec import ByteLevelCodec, TextCodecError
from domino_jax.serving.http.text_stream import StopRules, TextStream


def build_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|wörd|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world é 😀 " * 20], trainer)
    return Tokenizer.from_str(tokenizer.to_str())


TOKENIZER = build_tokenizer()


def make_codec(render=lambda messages, extra: "".join(m["content"] for m in messages)):
    return ByteLevelCodec(TOKENIZER, render, [TOKENIZER.token_to_id("<|end|>")])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=20), st.booleans())
def test_any_ids_read_as_the_tokenizer_reads_them(ids, skips):
    codec = make_codec()
    whole = TOKENIZER.decode(ids, skip_special_tokens=skips)
    assert codec.decode(ids, skips) == whole
    stream = TextStream(codec.token_bytes, codec.special_ids if skips else frozenset(), StopRules())
    assert "".join(stream.add([i]).text for i in ids) + stream.add([], is_last=True).text == whole


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30).filter(lambda text: "<|" not in text))
def test_text_survives(text):
    codec = make_codec()
    assert codec.decode(codec.encode_text(text)) == text


def test_ids_without_a_token_have_no_bytes():
    assert make_codec().token_bytes(100_000) == b""


def test_a_failing_template_tells_why():
    import jinja2

    for error in (
        jinja2.TemplateError("roles must alternate"),
        KeyError("x"),
        ZeroDivisionError("no"),
        RecursionError("deep"),
    ):

        def render(messages, extra, error=error):
            raise error

        with pytest.raises(TextCodecError, match="chat template failed"):
            make_codec(render).encode_chat([{"role": "user", "content": "x"}], {})


def test_a_tokenizer_of_another_kind_is_refused():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.Metaspace()
    with pytest.raises(TextCodecError, match="Metaspace"):
        ByteLevelCodec(tokenizer, lambda m, e: "", [])


def test_no_argument_of_the_renderer_can_be_given_as_a_template_variable():
    import inspect

    import transformers

    from domino_jax.serving.http.request_types import RESERVED_TEMPLATE_NAMES

    arguments = inspect.signature(transformers.PreTrainedTokenizerBase.apply_chat_template).parameters
    assert set(arguments) - {"self", "kwargs"} <= RESERVED_TEMPLATE_NAMES
