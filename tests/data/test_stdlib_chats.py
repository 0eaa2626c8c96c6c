"""The embedded corpus: answers follow from prompts, the split is by module, everything follows from the seed."""

import ast
import functools
import json

import pytest

from domino_jax.data import stdlib_chats as chats_module
from domino_jax.data.stdlib_chats import TASKS, build_chats, check_answer, repeats_a_word
from domino_jax.data.stdlib_source import CorpusError, find_modules, is_held_out


@pytest.fixture(scope="module", autouse=True)
def parsed_once():
    """Let corpora of this file share what each file of the library offers."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chats_module, "read_material", functools.cache(chats_module.read_material))
        yield


@pytest.fixture(scope="module")
def split(parsed_once):
    return build_chats("rewrites", seed=3, num_train=600, num_eval=60)


def test_counts_tasks_and_distinct_prompts(split):
    assert (len(split.train), len(split.eval)) == (600, 60)
    assert {chat.task for chat in split.train} == {chat.task for chat in split.eval} == set(TASKS)
    prompts = [chat.messages[0]["content"] for chat in split.train]
    assert len(set(prompts)) == len(prompts)


def test_no_word_of_the_material_occurs_twice(split):
    assert not any(repeats_a_word(chat.messages[0]["content"].split("\n", 1)[1]) for chat in split.train)
    assert repeats_a_word("def g(file, file_name)") and repeats_a_word("def g(args, kwargs)")
    assert not repeats_a_word("def g(x=None, b=None)")


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


def _names_of(material):
    if material.startswith("{"):
        return list(ast.literal_eval(material))
    arguments = ast.parse(f"{material}: pass").body[0].args
    return [a.arg for a in (*arguments.args, *arguments.kwonlyargs) if a.arg != "self"]


def _names_in(task, answer):
    """Return the names an answer is about, found by reading it as the program it claims to be."""
    if task == "json":
        return list(json.loads(answer))
    if task == "docs":
        lines = ast.literal_eval(answer).splitlines()[3:]
        return [line.split(":")[0].strip() for line in lines if line.strip()]
    nodes = list(ast.walk(ast.parse(answer)))
    if task == "arguments":
        return [keyword.arg for keyword in ast.parse(answer).body[0].value.keywords]
    if task == "fields":
        return [n.target.id for n in nodes if isinstance(n, ast.AnnAssign)]
    return [n.targets[0].id for n in nodes if isinstance(n, ast.Assign)]


def test_answers_mean_what_they_should(split):
    for chat in split.train:
        material, answer = chat.messages[0]["content"].split("\n", 1)[1], chat.messages[1]["content"]
        assert sorted(_names_in(chat.task, answer)) == sorted(_names_of(material)), chat
        if chat.task == "json":
            assert json.loads(answer) == ast.literal_eval(material)


@pytest.mark.parametrize(
    ("task", "material", "answer"),
    [
        (
            "docs",
            "def f(a_b, c=-1)",
            '"""Summary of f.\n\nArgs:\n    a_b: Required argument.\n    c: Optional argument, default -1.\n"""',
        ),
        (
            "arguments",
            "def serve(host, *, port=80)",
            "arguments = dict(\n    host=get_value(required=True),\n    port=get_value(default=80),\n)",
        ),
        (
            "fields",
            "def serve(host, port=80)",
            "@dataclasses.dataclass(frozen=True)\nclass serve_options:\n    host: object = dataclasses.field()\n"
            "    port: object = dataclasses.field(default=80)",
        ),
        (
            "enum",
            "def __init__(self, host, *, port=80)",
            "@enum.unique\nclass Parameter(enum.Enum):\n    host = enum.auto()\n    port = enum.auto()",
        ),
        (
            "json",
            "{'a': None, 'b': True, 'c': 'x', 'd': 2}",
            '{\n    "a": null,\n    "b": true,\n    "c": "x",\n    "d": 2\n}',
        ),
    ],
)
def test_each_task_by_hand(task, material, answer):
    assert TASKS[task].solve(material) == answer


def test_bodies_are_compared_as_programs():
    split = build_chats("bodies", seed=0, num_train=0, num_eval=10)
    assert len(split.train) > 1000  # all there are
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
