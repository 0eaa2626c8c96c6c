"""The embedded tokenizer: exact round trips, names that copy, a template that transformers understands."""

import pytest
from transformers import AutoTokenizer

from domino_jax.data.tokenizer import SPECIAL_TOKENS, TokenizerError, save_tokenizer, train_tokenizer

TEXTS = ["def connect(source_address, timeout=None):\n    self.timeout = timeout", "getName HTTPServer {'a': 1}"] * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(TEXTS, 320), directory / "nested")
    return AutoTokenizer.from_pretrained(str(directory / "nested"))


@pytest.mark.parametrize(
    "text", [*TEXTS[:2], "  two  spaces\t\ttab\r\n", "naïve — 日本語 🙂", "a_b__c", "x ,y ; z", ""]
)
def test_round_trip_is_exact(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_name_has_the_same_tokens_everywhere(tokenizer):
    name = tokenizer("timeout").input_ids
    for before in ("(", ", ", "=", "\n    ", ".", " ", "--"):
        assert tokenizer(before + "timeout").input_ids[-len(name) :] == name


def test_special_tokens(tokenizer):
    assert [tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (2, 0, 3)
    assert len(tokenizer) <= 320


def test_template_marks_the_assistant(tokenizer):
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "timeout"},
    ]
    out = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    marked = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "timeout<|im_end|>"
    prompt = tokenizer.apply_chat_template(chat[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert out["input_ids"][: len(prompt)] == prompt
    assert tokenizer.decode(prompt) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_vocabulary_without_room_is_refused():
    with pytest.raises(TokenizerError, match="260"):
        train_tokenizer(TEXTS, 100)


def test_training_is_deterministic():
    assert train_tokenizer(TEXTS, 300).get_vocab() == train_tokenizer(TEXTS, 300).get_vocab()
