"""Chats built from the Python standard library: the embedded offline corpus.

`rewrites` are short transformations whose answer follows from the prompt by a program, so any answer can be checked by
program; `bodies` asks for a function's body given its signature and docstring. A chat is one user and one assistant
message.

Held-out chats come from top-level modules nothing is trained on. Held-out rewrites use real material only; training
rewrites are half real and half recombined (a real function name with parameters, or keys with values, drawn from other
real places of the training modules), which gives far more distinct names to copy than the library's own combinations.
Material in which a word occurs twice, or inside another one, is left out: what follows a word is then never
ambiguous to a small target.
Everything is a function of the seed and of the library found; nothing here knows tokenizers, models or arrays.
"""

import ast
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from domino_jax.data.stdlib_source import (
    MAX_PARAMETERS,
    MIN_PARAMETERS,
    CorpusError,
    Material,
    Signature,
    find_modules,
    is_held_out,
    read_material,
)


@dataclass(frozen=True)
class Chat:
    """One user message and its right answer.

    Attributes:
        messages: `{"role", "content"}` mappings, user then assistant.
        task: a name of `TASKS`, or `bodies`.
        module: dotted module the material comes from (of the function name, where material is recombined).
    """

    messages: tuple[dict[str, str], ...]
    task: str
    module: str


@dataclass(frozen=True)
class ChatSplit:
    """Training chats and held-out chats; no top-level module is in both."""

    train: list[Chat]
    eval: list[Chat]


def _parse_signature(text: str) -> Signature:
    node = ast.parse(f"{text}: pass").body[0]
    if not isinstance(node, ast.FunctionDef):
        raise CorpusError(f"{text!r} is not a function signature")
    arguments = node.args
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + [ast.unparse(d) for d in arguments.defaults]
    keyword_defaults = [None if d is None else ast.unparse(d) for d in arguments.kw_defaults]
    positional = tuple(zip([a.arg for a in arguments.args], defaults, strict=True))
    keyword_only = tuple(zip([a.arg for a in arguments.kwonlyargs], keyword_defaults, strict=True))
    return Signature(node.name, positional, keyword_only)


def _parameters(text: str) -> list[tuple[str, str | None]]:
    signature = _parse_signature(text)
    return [*signature.positional, *signature.keyword_only]


def _solve_docs(text: str) -> str:
    lines = [
        f"    {name}: " + ("Required argument." if default is None else f"Optional argument, default {default}.")
        for name, default in _parameters(text)
    ]
    return "\n".join([f'"""Summary of {_parse_signature(text).name}.', "", "Args:", *lines, '"""'])


def _solve_arguments(text: str) -> str:
    lines = [
        f"    {name}=get_value(" + ("required=True)," if default is None else f"default={default}),")
        for name, default in _parameters(text)
    ]
    return "\n".join(["arguments = dict(", *lines, ")"])


def _solve_fields(text: str) -> str:
    lines = [
        f"    {name}: object = dataclasses.field(" + (")" if default is None else f"default={default})")
        for name, default in _parameters(text)
    ]
    start = f"class {_parse_signature(text).name}_options:"
    return "\n".join(["@dataclasses.dataclass(frozen=True)", start, *lines])


def _solve_enum(text: str) -> str:
    lines = [f"    {name} = enum.auto()" for name, _ in _parameters(text) if name != "self"]
    return "\n".join(["@enum.unique", "class Parameter(enum.Enum):", *lines])


def _solve_json(text: str) -> str:
    return json.dumps(ast.literal_eval(text), indent=4)


@dataclass(frozen=True)
class Task:
    """One kind of rewrite.

    Attributes:
        instruction: the sentence that asks for it.
        material: what stands below the sentence.
        solve: the program that answers from the material's text.
    """

    instruction: str
    material: Literal["signature", "constructor", "dictionary"]
    solve: Callable[[str], str]


TASKS = {
    "arguments": Task("Keyword arguments:", "signature", _solve_arguments),
    "docs": Task("Docstring:", "signature", _solve_docs),
    "enum": Task("Enumeration:", "constructor", _solve_enum),
    "fields": Task("Dataclass:", "signature", _solve_fields),
    "json": Task("JSON:", "dictionary", _solve_json),
}
"""Rewrites by name. The answer of each is a function of the prompt's text alone, and every item starts a line: where a
small target has to look up the next name is then the same in all of them."""

_BODY_INSTRUCTION = "Function body:"


def _make_chat(task: str, module: str, text: str) -> Chat:
    return _join_chat(task, module, TASKS[task].instruction, text, TASKS[task].solve(text))


def _join_chat(task: str, module: str, instruction: str, text: str, answer: str) -> Chat:
    user = {"role": "user", "content": f"{instruction}\n{text}"}
    return Chat((user, {"role": "assistant", "content": answer}), task, module)


def check_answer(chat: Chat, answer: str) -> bool:
    """Return whether `answer` is right for the chat's prompt, spaces at both ends aside.

    A rewrite is solved again from the prompt's text and compared exactly; a body must be the reference's syntax tree.
    """
    if chat.task == "bodies":
        try:
            return ast.dump(ast.parse(answer)) == ast.dump(ast.parse(chat.messages[-1]["content"]))
        except (SyntaxError, ValueError):
            return False
    material = chat.messages[0]["content"].split("\n", 1)[1]
    return answer.strip() == TASKS[chat.task].solve(material).strip()


@dataclass(frozen=True)
class _Pool:
    """Material of one side of the split, flattened, each entry with the module it comes from."""

    signatures: list[tuple[str, Signature]]
    constructors: list[tuple[str, Signature]]
    literals: list[tuple[str, tuple[tuple[str, object], ...]]]
    bodies: list[tuple[str, tuple[str, str]]]

    def parameters(self) -> list[tuple[str, str | None]]:
        """Return every distinct parameter of the pool's signatures, in order of first appearance."""
        every = [p for _, s in [*self.signatures, *self.constructors] for p in (*s.positional, *s.keyword_only)]
        return list(dict.fromkeys(every))


def _make_pool(materials: list[Material]) -> _Pool:
    return _Pool(
        signatures=list(dict.fromkeys((m.module, s) for m in materials for s in m.signatures)),
        constructors=list(dict.fromkeys((m.module, s) for m in materials for s in m.constructors)),
        literals=[(m.module, pairs) for m in materials for pairs in m.literals],
        bodies=list(dict.fromkeys((m.module, b) for m in materials for b in m.bodies)),
    )


def _sample_real(pool: _Pool, task: str, rng: random.Random) -> tuple[str, str]:
    material = TASKS[task].material
    if material == "dictionary":
        module, pairs = rng.choice(pool.literals)
        return module, repr(dict(pairs))
    module, signature = rng.choice(pool.constructors if material == "constructor" else pool.signatures)
    return module, _with_self(signature) if material == "constructor" else signature.render()


def _with_self(signature: Signature) -> str:
    return Signature("__init__", (("self", None), *signature.positional), signature.keyword_only).render()


@dataclass(frozen=True)
class _Recombiner:
    """Draws prompts whose pieces are real but come from different places of one pool."""

    pool: _Pool
    parameters: list[tuple[str, str | None]]
    pairs: list[tuple[str, object]]

    def sample(self, task: str, rng: random.Random) -> tuple[str, str]:
        """Return (module of the leading name, prompt material)."""
        material = TASKS[task].material
        if material == "dictionary":
            module, _ = rng.choice(self.pool.literals)
            values = [value for _, value in rng.choices(self.pairs, k=rng.randint(2, 4))]
            keys = [key for key, _ in rng.choices(self.pairs, k=len(values))]
            return module, repr(dict(zip(keys, values, strict=True)))
        module, signature = rng.choice(self.pool.signatures)
        signature = self._signature(signature.name, rng)
        return module, _with_self(signature) if material == "constructor" else signature.render()

    def _signature(self, name: str, rng: random.Random) -> Signature:
        drawn = dict(rng.choices(self.parameters, k=rng.randint(MIN_PARAMETERS, MAX_PARAMETERS)))
        drawn.pop("self", None)
        required = [(p, d) for p, d in drawn.items() if d is None]
        optional = [(p, d) for p, d in drawn.items() if d is not None]
        num_keyword_only = rng.randint(1, len(optional)) if optional and rng.random() < 0.2 else 0
        split = len(optional) - num_keyword_only
        return Signature(name, (*required, *optional[:split]), tuple(optional[split:]))


_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")


def repeats_a_word(text: str) -> bool:
    """Return whether a word of the names and literals in `text` occurs twice, also inside another word.

    Keywords of the language do not count.
    """
    words = [word.lower() for word in _WORD.findall(text) if word not in ("None", "True", "False", "def")]
    return any(a in b for i, a in enumerate(words) for j, b in enumerate(words) if i != j)


def _iterate_rewrites(pool: _Pool, rng: random.Random, recombined_share: float) -> Iterator[Chat]:
    recombiner = _Recombiner(
        pool,
        parameters=pool.parameters(),
        pairs=[pair for _, pairs in pool.literals for pair in pairs],
    )
    while True:
        for task in TASKS:
            is_recombined = rng.random() < recombined_share
            module, text = recombiner.sample(task, rng) if is_recombined else _sample_real(pool, task, rng)
            if not repeats_a_word(text):
                yield _make_chat(task, module, text)


def _take_distinct(chats: Iterator[Chat], count: int, what: str) -> list[Chat]:
    seen: set[str] = set()
    taken: list[Chat] = []
    num_repeats = 0
    for chat in chats:
        prompt = chat.messages[0]["content"]
        if prompt not in seen:
            seen.add(prompt)
            taken.append(chat)
            num_repeats = 0
        else:
            num_repeats += 1
        if len(taken) == count:
            return taken
        if num_repeats > 10_000:
            break
    raise CorpusError(f"the standard library gives only {len(taken)} distinct {what} chats of the {count} asked for")


def _body_chats(pool: _Pool, rng: random.Random) -> Iterator[Chat]:
    entries = list(pool.bodies)
    rng.shuffle(entries)
    for module, (header, body) in entries:
        yield _join_chat("bodies", module, _BODY_INSTRUCTION, header, body)


def build_chats(task: str, seed: int, num_train: int, num_eval: int) -> ChatSplit:
    """Return distinct training and held-out chats; the same seed and library give the same chats.

    `task` is `rewrites` or `bodies`; `num_train` 0 takes every body (rewrites have no end).

    Raises:
        CorpusError: the library has too little material for the counts, or `task` is unknown.
    """
    if task not in ("rewrites", "bodies"):
        raise CorpusError(f"corpus task is {task!r}; allowed: 'rewrites', 'bodies'")
    with_bodies = task == "bodies"
    read = (read_material(module, path, with_bodies) for module, path in find_modules())
    materials = [material for material in read if material is not None]
    train_pool = _make_pool([m for m in materials if not is_held_out(m.module)])
    eval_pool = _make_pool([m for m in materials if is_held_out(m.module)])
    train_rng, eval_rng = random.Random(f"train-{seed}"), random.Random(f"eval-{seed}")
    if task == "bodies":
        train, held_out = _body_chats(train_pool, train_rng), _body_chats(eval_pool, eval_rng)
        num_train = num_train or len({header for _, (header, _) in train_pool.bodies})
    else:
        train, held_out = _iterate_rewrites(train_pool, train_rng, 0.5), _iterate_rewrites(eval_pool, eval_rng, 0.0)
    return ChatSplit(_take_distinct(train, num_train, "training"), _take_distinct(held_out, num_eval, "held-out"))
