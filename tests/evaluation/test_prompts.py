import builtins
import json
import random
import sys
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError

from domino_jax.evaluation import prompts
from domino_jax.evaluation.prompts import PROMPT_SETS, Prompt, PromptError


def write(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_the_three_forms(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    path = write(tmp_path, {"prompt": "a"}, "", {"messages": chat}, {"prompt_ids": [1, 2]})
    expected = [Prompt(text="a"), Prompt(messages=chat), Prompt(prompt_ids=[1, 2])]
    assert prompts.load_prompts(str(path)) == expected
    assert prompts.load_prompts(str(path), limit=1) == expected[:1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting"),
        ([1], "a list"),
        ({"text": "a"}, "none of the forms"),
        ({"prompt": "a", "prompt_ids": [1]}, "prompt and prompt_ids"),
        ({"prompt": ""}, "not empty"),
        ({"prompt_ids": []}, "not empty"),
        ({"prompt_ids": [1, -1]}, "0 or more"),
        ({"prompt_ids": [True]}, "0 or more"),
        ({"messages": [{"role": "user"}]}, "message 0"),
        ({"messages": [{"role": "x", "content": "a"}]}, "allowed: system"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "end with the turn"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    path = write(tmp_path, {"prompt": "a"}, line)
    with pytest.raises(PromptError, match="line 2") as caught:
        prompts.load_prompts(str(path))
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_only_a_line_feed_ends_a_line_and_a_byte_order_mark_is_no_text(tmp_path):
    texts = ["a\u2028b", "a\u2029b", "a\u0085b", "a\vb"]
    rows = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(rows).encode())
    read = prompts.read_prompts(path)
    assert [prompt.text for prompt in read] == texts
    assert [prompt.name for prompt in read] == [f"{path}, line {number}" for number in (1, 3, 5, 7)]


def test_a_line_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(PromptError, match=r"line 2: 'utf-8' .* save the file as UTF-8"):
        prompts.read_prompts(path)


@pytest.mark.parametrize(
    ("line", "where"),
    [
        (r'{"prompt": "a\ud800"}', "prompt"),
        (r'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "\ud800"}]}', "message 1"),
        (r'{"messages": [{"role": "user", "content": "a", "name": "\ud800"}]}', "message 0"),
    ],
)
def test_half_of_a_surrogate_pair_is_no_text(tmp_path, line, where):
    whole = r'{"prompt": "\ud83d\ude00"}'
    with pytest.raises(PromptError, match=rf"line 2: {where} holds \\ud800, half of"):
        prompts.load_prompts(str(write(tmp_path, whole, line)))


def test_an_empty_file_and_an_unknown_name_are_refused(tmp_path):
    with pytest.raises(PromptError, match="no prompt"):
        prompts.load_prompts(str(write(tmp_path, "")))
    with pytest.raises(PromptError, match="gsm8k, math500"):
        prompts.load_prompts("gsm9k")


def test_without_datasets_one_sentence(monkeypatch):
    real_import = builtins.__import__

    def fail(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(PromptError, match="pip install"):
        prompts.load_prompts("gsm8k")


def pretend_datasets(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


@pytest.mark.parametrize("error", [ConnectionError, OSError, ValueError, HfHubHTTPError.__bases__[0]])
@pytest.mark.parametrize("name", ["gsm8k", "livecodebench"])
def test_a_set_out_of_reach_is_one_sentence(monkeypatch, error, name):
    def fail(*arguments, **options):
        raise error("cannot reach the hub\nmore lines")

    pretend_datasets(monkeypatch, fail)
    with pytest.raises(PromptError, match=r"\(cannot reach the hub\).*offline, give a JSONL file") as caught:
        prompts.load_prompts(name)
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)


class Rows(list):
    def shuffle(self, seed):
        return Rows(random.Random(seed).sample(self, len(self)))

    def select(self, places):
        return [self[i] for i in places]


@pytest.mark.parametrize(("num_rows", "num_prompts"), [(300, 128), (128, 128), (5, 5)])
def test_a_larger_set_is_shuffled_with_seed_0_and_cut(monkeypatch, num_rows, num_prompts):
    asked = []
    rows = Rows({"question": str(i)} for i in range(num_rows))
    pretend_datasets(monkeypatch, lambda *arguments, **options: asked.append((arguments, options)) or rows)
    read = prompts.load_prompts("gsm8k")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]
    expected = rows.shuffle(0)[:128] if num_rows > 128 else rows
    assert [prompt.turns[0].partition("\n")[0] for prompt in read] == [row["question"] for row in expected]
    assert len(read) == num_prompts
    assert read[1].name == "gsm8k, prompt 2"


def test_sets_have_the_counts_of_the_paper():
    assert {name: s.num_prompts for name, s in PROMPT_SETS.items()} == {
        "gsm8k": 128,
        "math500": 128,
        "aime24": 30,
        "aime25": 30,
        "humaneval": 164,
        "mbpp": 128,
        "livecodebench": 128,
        "swe-bench": 128,
        "mt-bench": 80,
        "alpaca": 128,
    }


def test_prompt_forms():
    row = {
        "question": "Q",
        "problem": "Q",
        "prompt": "Q",
        "problem_statement": "Q",
        "instruction": "Q",
        "input": "I",
        "question_content": "Q",
        "starter_code": "",
    }
    turns = {name: s.to_turns(row) for name, s in PROMPT_SETS.items() if name != "mt-bench"}
    assert turns["gsm8k"] == ["Q\nPlease reason step by step, and put your final answer within \\boxed{}."]
    assert turns["humaneval"][0].endswith("tests:\n```python\nQ\n```")
    assert turns["mbpp"] == ["Q"]
    assert turns["alpaca"] == ["Q\n\nInput:\nI"]
    assert "# YOUR CODE HERE" in turns["livecodebench"][0]
    assert PROMPT_SETS["mt-bench"].to_turns({"prompt": ["one", "two"]}) == ["one", "two"]
