"""The embedded corpus: answers follow from prompts, the split is by module, everything follows from the seed."""

import ast
import json

import pytest

from domino_jax.data.stdlib_chats import TASKS, build_chats, check_answer, repeats_a_word
from domino_jax.data.stdlib_source import CorpusError, find_modules, is_held_out


@pytest.fixture(scope="module")
def split():
    return build_chats("rewrites", seed=3, num_train=600, num_eval=60)


def test_counts_tasks_and_distinct_prompts(split):
    assert (len(split.train), len(split.eval)) == (600, 60)
    assert {chat.task for chat in split.train} == {chat.task for chat in split.eval} == set(TASKS)
    prompts = [chat.messages[0]["content"] for chat in split.train]
    assert len(set(prompts)) == len(prompts)


def test_no_word_of_the_material_occurs_twice(split):
    assert not any(repeats_a_word(chat.messages[0]["content"].split("\n", 1)[1]) for chat in split.train)
    assert repeats_a_word("def f(file, file_name)") and not repeats_a_word("def f(a=None, b=None)")


def test_no_module_on_both_sides(split):
    assert not any(is_held_out(chat.module) for chat in split.train)
    assert all(is_held_out(chat.module) for chat in split.eval)


def test_the_seed_decides(split):
    again = build_chats("rewrites", seed=3, num_train=50, num_eval=10)
    assert again.train == split.train[:50] and again.eval == split.eval[:10]
    assert build_chats("rewrites", seed=4, num_train=50, num_eval=10).train != again.train


def test_answers_are_checked_by_program(split):
    for chat in split.train + split.eval:
        answer = chat.messages[1]["content"]
        assert check_answer(chat, answer) and check_answer(chat, answer + "\n")
        assert not check_answer(chat, answer[:-1]) and not check_answer(chat, "")


def test_answers_mean_what_they_should(split):
    for chat in split.train:
        material, answer = chat.messages[0]["content"].split("\n", 1)[1], chat.messages[1]["content"]
        if chat.task == "json":
            assert json.loads(answer) == ast.literal_eval(material)
        elif chat.task == "call":
            call = ast.parse(answer, mode="eval").body
            names = [p.split("=")[0].strip() for p in material[material.index("(") + 1 : -1].split(", ")]
            assert all(k.arg == k.value.id for k in call.keywords)
            assert {k.arg for k in call.keywords} <= set(names)
        elif chat.task == "init":
            ast.parse(answer)


@pytest.mark.parametrize(
    ("task", "material", "answer"),
    [
        ("call", "def open_it(path, mode='r', *, newline=None)", "open_it(path=path, mode=mode, newline=newline)"),
        ("docs", "def f(a_b, c=-1)", "Args:\n    a_b: required\n    c: default -1"),
        ("flags", "def serve(host_name, port=80)", "serve --host-name --port=80"),
        ("init", "def __init__(self, host, *, port=80)", "self.host = host\nself.port = port"),
        ("json", "{'a': None, 'b': True, 'c': 'x'}", '{"a": null, "b": true, "c": "x"}'),
    ],
)
def test_each_task_by_hand(task, material, answer):
    assert TASKS[task].solve(material) == answer


def test_bodies_are_compared_as_programs():
    split = build_chats("bodies", seed=0, num_train=40, num_eval=10)
    chat = split.train[0]
    assert check_answer(chat, chat.messages[1]["content"] + "  # said otherwise")
    assert not check_answer(chat, "return +++") and not check_answer(chat, "pass; pass; pass")
    assert all(is_held_out(held.module) for held in split.eval)


def test_library_is_read_without_its_tests():
    modules = [module for module, _ in find_modules()]
    assert "json.decoder" in modules and "json" in modules
    assert not any("test" in module.split(".") for module in modules)


def test_impossible_requests_are_named(tmp_path):
    with pytest.raises(CorpusError, match=r"only \d+ distinct held-out chats of the 1000000"):
        build_chats("bodies", seed=0, num_train=1, num_eval=1_000_000)
    with pytest.raises(CorpusError, match="'rewrites', 'bodies'"):
        build_chats("poems", seed=0, num_train=1, num_eval=1)
    with pytest.raises(CorpusError, match=r"no \*.py file"):
        find_modules(tmp_path)
