import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from domino_jax.data.chat_template import (
    ChatTemplateError,
    encode_prompt,
    find_mask_id,
    find_stop_ids,
    load_tokenizer,
    render_chat,
    renders_as_written,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tagged(inside: str, behind: str) -> str:
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        "{% generation %}{{ m.content + '" + inside + "' }}{% endgeneration %}{{ '" + behind + "' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


TAGGED = tagged("<|im_end|>", "\n")
# Thinking as Qwen3 renders it: dropped from turns before the last question, put (empty) into the last answer, and put
# into the generation prompt when thinking is off.
THINKING = """\
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role != 'assistant' -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
{%- else -%}
{%- set thought = '' -%}{%- set content = m.content -%}
{%- if '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\n' -}}
{%- if loop.index0 > ns.last and (loop.last or thought) -%}
{{- '<think>\n' + thought + '\n</think>\n\n' + content.lstrip('\n') -}}
{%- else -%}{{- content -}}{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}
"""
# Line breaks form one piece whatever follows, as with Qwen's tokenizers: a prompt's tokens start the whole chat's.
PIECES = r"\s*[\r\n]+|\s+(?!\S)|\s+| ?\w+| ?[^\s\w]+[\r\n]*"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


def make_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the answer\n\n to the question\n\n\n is the answer"] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


TOKENIZERS = {"prefix": make_tokenizer(CHATML), "tags": make_tokenizer(TAGGED), "thinking": make_tokenizer(THINKING)}


def chat(*contents: str, system: str = "") -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def learned(tokenizer: PreTrainedTokenizerFast, ids: list[int], mask: list[int]) -> str:
    assert len(ids) == len(mask)
    return tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])


@pytest.mark.parametrize("name", ["prefix", "tags"])
@pytest.mark.parametrize("system", ["", "be the answer"])
def test_masks_answers_and_their_ends_only(name: str, system: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids, mask = render_chat(tokenizer, chat("a?", "one", "b?", "two", system=system), False)
    assert learned(tokenizer, ids, mask) == "one<|im_end|>two<|im_end|>"
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    assert tokenizer.decode(ids) == head + (
        "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"
        "<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
    )


def test_tags_agree_with_transformers_own_mask() -> None:
    tokenizer = TOKENIZERS["tags"]
    messages = chat("a? é", "one 🎲", "b?", "two\n\n", system="s")
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert render_chat(tokenizer, messages, False) == (theirs["input_ids"], theirs["assistant_masks"])


# Answers start and end with a letter: white space at the border of a turn may share a token with the header.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).map(lambda text: f"x{text}y")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), st.sampled_from(sorted(TOKENIZERS)), st.booleans())
def test_masked_tokens_decode_to_the_answers(turns: list[tuple[str, str]], name: str, system: bool) -> None:
    tokenizer = TOKENIZERS[name]
    messages = chat(*(text for turn in turns for text in turn), system="s" if system else "")
    ids, mask = render_chat(tokenizer, messages, False)
    assert learned(tokenizer, ids, mask) == "".join(answer + "<|im_end|>" for _, answer in turns)
    assert ids == tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_a_prompt_is_the_start_of_its_rendering(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    messages = chat("a?", "one", "b?", "two", system="s")
    ids, mask = render_chat(tokenizer, messages, False)
    prompt = encode_prompt(tokenizer, messages[:-1], False)
    assert ids[: len(prompt)] == prompt
    assert mask[len(prompt)] == 1 and mask[len(prompt) - 1] == 0


def test_thinking_off_keeps_the_empty_thought_in_the_prompt() -> None:
    tokenizer = TOKENIZERS["thinking"]
    ids, mask = render_chat(tokenizer, chat("a?", "<html>", "b?", "two"), False)
    assert learned(tokenizer, ids, mask) == "<html><|im_end|>two<|im_end|>"
    assert tokenizer.decode(ids).count(EMPTY_THOUGHT) == 1


def test_thinking_on_learns_the_last_thought_and_drops_earlier_ones() -> None:
    tokenizer = TOKENIZERS["thinking"]
    messages = chat("a?", "<think>\nhm\n</think>\n\none", "b?", "<think>\nwell\n</think>\n\ntwo", system="s")
    ids, mask = render_chat(tokenizer, messages, True)
    assert learned(tokenizer, ids, mask) == "one<|im_end|><think>\nwell\n</think>\n\ntwo<|im_end|>"
    ids, mask = render_chat(tokenizer, chat("a?", "one"), True)
    assert learned(tokenizer, ids, mask) == EMPTY_THOUGHT + "one<|im_end|>"


def test_a_written_thought_is_learned_even_with_thinking_off() -> None:
    tokenizer = TOKENIZERS["thinking"]
    ids, mask = render_chat(tokenizer, chat("a?", "<think>\nhm\n</think>\n\none"), False)
    assert learned(tokenizer, ids, mask) == "<think>\nhm\n</think>\n\none<|im_end|>"


@pytest.mark.parametrize(("inside", "behind"), [("", "<|im_end|>\n"), ("<|im_end|>\n", ""), ("<|im_end|>", "\n")])
def test_tags_around_more_or_less_than_the_turn(inside: str, behind: str) -> None:
    tokenizer = make_tokenizer(tagged(inside.replace("\n", "\\n"), behind.replace("\n", "\\n")))
    ids, mask = render_chat(tokenizer, chat("a?", "one", "b?", "two"), False)
    assert learned(tokenizer, ids, mask) == "one<|im_end|>two<|im_end|>"


TAGS_WITHOUT_END = tagged("", "<|im_end|>\\n")


@pytest.mark.parametrize("template", [CHATML, TAGGED, TAGS_WITHOUT_END, THINKING])
@pytest.mark.parametrize("cut_turn", [1, 3])
def test_the_end_of_a_cut_answer_is_not_learned(template: str, cut_turn: int) -> None:
    tokenizer = make_tokenizer(template)
    messages = chat("a?", "one", "b?", "two")
    whole_ids, _ = render_chat(tokenizer, messages, False)
    messages[cut_turn]["finish_reason"] = "length"
    ids, mask = render_chat(tokenizer, messages, False)
    assert ids == whole_ids
    assert learned(tokenizer, ids, mask) == {1: "onetwo<|im_end|>", 3: "one<|im_end|>two"}[cut_turn]


def test_tags_that_do_not_fit_the_turns_are_refused_for_cut_answers() -> None:
    tokenizer = make_tokenizer(TAGGED.replace("{{ m.content +", "{% endgeneration %}{% generation %}{{ m.content +"))
    messages = chat("a?", "one")
    assert render_chat(tokenizer, messages, False)
    messages[1]["finish_reason"] = "length"
    with pytest.raises(ChatTemplateError, match="2 stretches of text as generated for 1 assistant turns"):
        render_chat(tokenizer, messages, False)


def test_an_answer_cut_inside_a_thought_does_not_render_as_written() -> None:
    tokenizer = TOKENIZERS["thinking"]
    for answer, expected in [("<think>\nhm", False), ("<think>\nhm\n</think>\n\none", True)]:
        assert renders_as_written(tokenizer, chat("a?"), answer, True) == expected
    assert renders_as_written(tokenizer, chat("a?", "one", "b?"), "two", False)


def test_tokens_over_the_border_of_a_turn_are_not_learned() -> None:
    tokenizer = TOKENIZERS["prefix"]
    ids, mask = render_chat(tokenizer, chat("a?", "\none"), False)
    (merged,) = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    assert merged in ids
    assert learned(tokenizer, ids, mask) == "one<|im_end|>"


def test_the_next_header_is_not_the_end_of_a_turn() -> None:
    tokenizer = make_tokenizer("{% for m in messages %}<|im_start|>{{ m.role + ':' + m.content }}{% endfor %}"
                               "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}")  # fmt: skip
    ids, mask = render_chat(tokenizer, chat("a?", "one", "b?", "two"), False)
    assert learned(tokenizer, ids, mask) == "onetwo"


def test_a_chat_may_hold_the_stand_in_for_a_turn() -> None:
    ids, mask = render_chat(TOKENIZERS["prefix"], chat("stand0in", "a stand0in stand1in"), False)
    assert learned(TOKENIZERS["prefix"], ids, mask) == "a stand0in stand1in<|im_end|>"


def test_no_assistant_turn_masks_nothing() -> None:
    for tokenizer in TOKENIZERS.values():
        assert not any(render_chat(tokenizer, chat("a?"), False)[1])


def test_unstable_template_is_refused() -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role + '|' + (m.content if m.role == 'user' else m.content | upper) }}{% endfor %}"
        "{{ messages | map(attribute='content') | join | length }}"
        "{% if add_generation_prompt %}{{ 'assistant|' }}{% endif %}"
    )
    with pytest.raises(ChatTemplateError, match=r"prefix-stable.*message 1"):
        render_chat(tokenizer, chat("a?", "one"), False)


def test_template_errors_are_named() -> None:
    tokenizer = make_tokenizer("{{ raise_exception('no system here') }}")
    with pytest.raises(ChatTemplateError, match="no system here"):
        render_chat(tokenizer, chat("a?", "one"), False)
    with pytest.raises(ChatTemplateError, match="no system here"):
        encode_prompt(tokenizer, chat("a?"), False)
    with pytest.raises(ChatTemplateError, match="no chat template"):
        encode_prompt(make_tokenizer(None), chat("a?"), False)


def test_load_tokenizer(tmp_path) -> None:
    TOKENIZERS["tags"].save_pretrained(str(tmp_path / "good"))
    loaded = load_tokenizer(str(tmp_path / "good"))
    messages = chat("a?", "one")
    assert render_chat(loaded, messages, False) == render_chat(TOKENIZERS["tags"], messages, False)

    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ChatTemplateError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path / "empty"))
    with pytest.raises(ChatTemplateError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path / "absent"))
    make_tokenizer(None).save_pretrained(str(tmp_path / "base"))
    with pytest.raises(ChatTemplateError, match="no chat template"):
        load_tokenizer(str(tmp_path / "base"))
    assert load_tokenizer(str(tmp_path / "base"), needs_template=False).chat_template is None


def test_load_tokenizer_never_runs_code(tmp_path) -> None:
    TOKENIZERS["tags"].save_pretrained(str(tmp_path))
    settings_path = tmp_path / "tokenizer_config.json"
    values = json.loads(settings_path.read_text())
    values.update(tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", "mine.Mine"]})
    settings_path.write_text(json.dumps(values))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Mine: pass\n")
    try:
        load_tokenizer(str(tmp_path))
    except ChatTemplateError as error:
        assert "trust_remote_code" in str(error)
    assert not (tmp_path / "ran").exists()


def test_stop_ids(tmp_path) -> None:
    tokenizer = TOKENIZERS["tags"]
    assert find_stop_ids(None, str(tmp_path)) == ()
    assert find_stop_ids(tokenizer) == (2,)
    assert find_stop_ids(tokenizer, str(tmp_path)) == (2,)
    config = tmp_path / "generation_config.json"
    config.write_text('{"eos_token_id": [2, 0]}')
    assert find_stop_ids(tokenizer, str(tmp_path)) == (0, 2)
    assert find_stop_ids(None, str(tmp_path)) == (0, 2)
    config.write_text('{"eos_token_id": 1}')
    assert find_stop_ids(tokenizer, str(tmp_path)) == (1, 2)
    config.write_text('{"eos_token_id": "x"}')
    with pytest.raises(ChatTemplateError, match="list of ids"):
        find_stop_ids(tokenizer, str(tmp_path))


def test_mask_id() -> None:
    tokenizer = make_tokenizer(TAGGED)
    assert find_mask_id(tokenizer, len(tokenizer) + 1) == len(tokenizer)
    with pytest.raises(ChatTemplateError, match="no mask token"):
        find_mask_id(tokenizer, len(tokenizer))
    tokenizer.mask_token = "<|im_start|>"
    assert find_mask_id(tokenizer, len(tokenizer)) == 1


@pytest.mark.parametrize(("token", "name"), [("<|endoftext|>", "pad"), ("<|im_end|>", "eos")])
def test_a_mask_token_with_another_job_is_refused(token: str, name: str) -> None:
    tokenizer = make_tokenizer(TAGGED)
    tokenizer.mask_token = token
    with pytest.raises(
        ChatTemplateError, match=rf"is also its {name} token.*an id no token uses, such as {len(tokenizer)}$"
    ):
        find_mask_id(tokenizer, len(tokenizer) + 2)
    with pytest.raises(ChatTemplateError, match=r"draft\.mask_token_id to an id of a token that never occurs"):
        find_mask_id(tokenizer, len(tokenizer))


def test_a_mask_id_is_free_where_ids_have_gaps() -> None:
    """The number of tokens is the id of one where the tokenizer leaves ids out before it."""
    vocab = {"a": 0, "b": 1, "c": 3, "d": 4}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="a")), unk_token="a", chat_template=CHATML
    )
    assert len(tokenizer) == 4
    assert find_mask_id(tokenizer, 8) == find_mask_id(tokenizer, 5) == 2
