"""Chats built from the Python standard library's own source files: the embedded offline corpus.

In: the running interpreter's `*.py` files (tests, platform data and generated tables left out). Out: chats of one user
and one assistant message. `rewrites` are short transformations whose answer follows from the prompt by a program, so any
answer can be checked by program; `bodies` asks for a function's body given its signature and docstring.

Held-out chats come from top-level modules nothing is trained on. Held-out rewrites use real material only; training
rewrites are half real and half recombined (a real function name with parameters, literals or imports drawn from other
real places of the training modules), which gives far more distinct names to copy than the library's own combinations.
Everything is a function of the seed and of the library found; nothing here knows tokenizers, models or arrays.
"""

import ast
import hashlib
import json
import random
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 0.15
"""Share of top-level modules whose material is only ever used for held-out chats."""

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "encodings"})
_SKIPPED_FOLDERS |= {"__pycache__", "lib-dynload", "pydoc_data", "turtledemo", "__phello__"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "__phello__", "_sysconfig_vars")
_MAX_NAME, _MAX_LITERAL = 24, 14
_MIN_PARAMETERS, _MAX_PARAMETERS = 3, 7


class CorpusError(ValueError):
    """The standard library found here cannot give the chats asked for; the message says what is missing."""


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


@dataclass(frozen=True)
class Signature:
    """A function as its prompt shows it: positional and keyword-only parameters with the source of their defaults."""

    name: str
    positional: tuple[tuple[str, str | None], ...]
    keyword_only: tuple[tuple[str, str | None], ...] = ()

    def render(self) -> str:
        """Return `def name(a, b=1, *, c=None)`."""
        parts = [_render_parameter(p) for p in self.positional]
        if self.keyword_only:
            parts += ["*", *map(_render_parameter, self.keyword_only)]
        return f"def {self.name}({', '.join(parts)})"


@dataclass(frozen=True)
class Material:
    """What one source file offers.

    Attributes:
        signatures: functions without `*args`, `**kwargs` and with short literal defaults; `self` and `cls` dropped.
        constructors: the same for `__init__`, named after it.
        literals: dictionaries of string keys and constants, and the constant keyword arguments of calls, as pairs.
        imports: (module, imported names), of import statements and of the file's own public definitions.
        bodies: (signature and docstring, body) sources.
    """

    module: str
    signatures: list[Signature]
    constructors: list[Signature]
    literals: list[tuple[tuple[str, object], ...]]
    imports: list[tuple[str, tuple[str, ...]]]
    bodies: list[tuple[str, str]]


def _render_parameter(parameter: tuple[str, str | None]) -> str:
    name, default = parameter
    return name if default is None else f"{name}={default}"


# ---------------------------------------------------------------- reading the library


def find_modules(root: Path | None = None) -> list[tuple[str, Path]]:
    """Return (dotted module, file) of the standard library's own sources in name order, tests left out.

    Raises:
        CorpusError: no source file is found under the library's folder.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS.intersection(parts) or any(part.startswith(_SKIPPED_PREFIXES) for part in parts):
            continue
        if all(part.isidentifier() for part in parts):
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    if not found:
        raise CorpusError(f"no *.py file of the standard library under {root}; use a Python installed with its sources")
    return found


def is_held_out(module: str) -> bool:
    """Return whether `module`'s top-level package is kept for held-out chats (a fixed hash of its name)."""
    digest = hashlib.sha256(module.split(".")[0].lstrip("_").encode()).digest()
    return digest[0] < HELD_OUT_SHARE * 256


def read_material(module: str, path: Path, with_bodies: bool = False) -> Material | None:
    """Return what `path` offers (`bodies` only when asked: they take longest), or None for a file that does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return None
    material = Material(module, [], [], [], [], [])
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            _collect_signature(node, material)
            if with_bodies:
                _collect_body(node, material)
        elif isinstance(node, ast.Dict):
            _collect_pairs(list(zip(node.keys, node.values, strict=True)), material)
        elif isinstance(node, ast.Call):
            _collect_pairs([(ast.Constant(k.arg), k.value) for k in node.keywords], material)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            _collect_import(node.module, [alias.name for alias in node.names], material)
    definitions = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    public = [name for name in definitions if not name.startswith("_")]
    for start in range(0, len(public), 5):
        _collect_import(module, public[start : start + 5], material)
    return material


def _is_name(name: str) -> bool:
    return name.isascii() and name.isidentifier() and 1 < len(name) <= _MAX_NAME


def _literal_source(node: ast.expr) -> str | None:
    if not isinstance(node, ast.Constant | ast.Name | ast.UnaryOp | ast.Tuple | ast.List | ast.Dict):
        return None
    source = ast.unparse(node)
    is_short = len(source) <= _MAX_LITERAL and source.isascii() and source.isprintable()
    return source if is_short and not source.startswith("...") else None


def _collect_signature(node: ast.FunctionDef, material: Material) -> None:
    arguments = node.args
    if arguments.vararg or arguments.kwarg or (node.name.startswith("__") and node.name != "__init__"):
        return
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [*([None] * (len(plain) - len(arguments.defaults))), *arguments.defaults]
    positional = _read_parameters(plain, defaults)
    keyword_only = _read_parameters(arguments.kwonlyargs, arguments.kw_defaults)
    if positional is None or keyword_only is None:
        return
    if positional and positional[0][0] in ("self", "cls"):
        positional = positional[1:]
    if not _MIN_PARAMETERS <= len(positional) + len(keyword_only) <= _MAX_PARAMETERS or not _is_name(node.name):
        return
    signature = Signature(node.name, tuple(positional), tuple(keyword_only))
    (material.constructors if node.name == "__init__" else material.signatures).append(signature)


def _read_parameters(arguments: list[ast.arg], defaults: list) -> list[tuple[str, str | None]] | None:
    parameters = []
    for argument, default in zip(arguments, defaults, strict=True):
        source = None if default is None else _literal_source(default)
        if (default is not None and source is None) or not argument.arg.isascii() or len(argument.arg) > _MAX_NAME:
            return None
        parameters.append((argument.arg, source))
    return parameters


def _collect_pairs(entries: list[tuple[ast.expr | None, ast.expr]], material: Material) -> None:
    pairs = {}
    for key, value in entries:
        if not (isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(key.value, str)):
            return
        if not _is_json_pair(key.value, value.value):
            return
        pairs[key.value] = value.value
    items = list(pairs.items())
    for start in range(0, len(items), 5):
        if len(items[start : start + 5]) >= 2:
            material.literals.append(tuple(items[start : start + 5]))


def _is_json_pair(key: str, value: object) -> bool:
    if not (0 < len(key) <= _MAX_NAME and len(repr(value)) <= _MAX_NAME):
        return False
    texts = [key, value] if isinstance(value, str) else [key]
    is_plain = all(t.isascii() and t.isprintable() and not set(t) & set("'\"\\") for t in texts)
    return is_plain and (value is None or isinstance(value, str | bool | int))


def _collect_import(module: str, names: list[str], material: Material) -> None:
    names = [name for name in names if _is_name(name)]
    if 3 <= len(names) <= 5 and len(module) <= _MAX_NAME:
        material.imports.append((module, tuple(names)))


def _collect_body(node: ast.FunctionDef, material: Material) -> None:
    docstring = ast.get_docstring(node)
    if not docstring or len(node.body) < 2 or node.decorator_list:
        return
    header = f'def {node.name}({ast.unparse(node.args)}):\n    """{docstring.splitlines()[0]}"""'
    body = "\n".join(ast.unparse(statement) for statement in node.body[1:])
    if body.isascii() and header.isascii() and len(body) <= 1200:
        material.bodies.append((header, body))


# ---------------------------------------------------------------- tasks: prompt -> answer by program


def _parse_signature(text: str) -> Signature:
    node = ast.parse(f"{text}: pass").body[0]
    if not isinstance(node, ast.FunctionDef):
        raise CorpusError(f"{text!r} is not a function signature")
    arguments = node.args
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + [ast.unparse(d) for d in arguments.defaults]
    keyword_defaults = [None if d is None else ast.unparse(d) for d in arguments.kw_defaults]
    positional = tuple(zip([a.arg for a in arguments.args], defaults, strict=True))
    return Signature(node.name, positional, tuple(zip([a.arg for a in arguments.kwonlyargs], keyword_defaults, strict=True)))


def _parameters(text: str) -> list[tuple[str, str | None]]:
    signature = _parse_signature(text)
    return [*signature.positional, *signature.keyword_only]


def _solve_call(text: str) -> str:
    arguments = ", ".join(f"{name}={name}" for name, _ in _parameters(text))
    return f"{_parse_signature(text).name}({arguments})"


def _solve_docs(text: str) -> str:
    lines = [f"{name}: required" if default is None else f"{name}: default {default}" for name, default in _parameters(text)]
    return "\n".join(["Args:", *(f"    {line}" for line in lines)])


def _solve_flags(text: str) -> str:
    flags = [f"--{n.replace('_', '-')}" + ("" if d is None else f"={d}") for n, d in _parameters(text)]
    return " ".join([_parse_signature(text).name, *flags])


def _solve_init(text: str) -> str:
    return "\n".join(f"self.{name} = {name}" for name, _ in _parameters(text) if name != "self")


def _solve_json(text: str) -> str:
    return json.dumps(ast.literal_eval(text))


def _solve_imports(text: str) -> str:
    node = ast.parse(text).body[0]
    if not isinstance(node, ast.ImportFrom):
        raise CorpusError(f"{text!r} is not a from-import")
    return "\n".join(f"from {node.module} import {alias.name}" for alias in node.names)


@dataclass(frozen=True)
class Task:
    """One kind of rewrite: the sentence that asks for it, and the program that answers it from the material's text."""

    instruction: str
    solve: Callable[[str], str]


TASKS = {
    "call": Task("Keyword call:", _solve_call),
    "docs": Task("Parameters:", _solve_docs),
    "flags": Task("Command line:", _solve_flags),
    "init": Task("Attributes:", _solve_init),
    "json": Task("JSON:", _solve_json),
    "imports": Task("Split imports:", _solve_imports),
}
"""Rewrites by name. The answer of each is a function of the prompt's text alone."""

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


# ---------------------------------------------------------------- building


@dataclass(frozen=True)
class _Pool:
    """Material of one side of the split, flattened, each entry with the module it comes from."""

    signatures: list[tuple[str, Signature]]
    constructors: list[tuple[str, Signature]]
    literals: list[tuple[str, tuple[tuple[str, object], ...]]]
    imports: list[tuple[str, str, tuple[str, ...]]]
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
        imports=list(dict.fromkeys((m.module, *entry) for m in materials for entry in m.imports)),
        bodies=list(dict.fromkeys((m.module, b) for m in materials for b in m.bodies)),
    )


def _sample_real(pool: _Pool, task: str, rng: random.Random) -> tuple[str, str]:
    if task == "json":
        module, pairs = rng.choice(pool.literals)
        return module, repr(dict(pairs))
    if task == "imports":
        module, source, names = rng.choice(pool.imports)
        return module, f"from {source} import {', '.join(names)}"
    module, signature = rng.choice(pool.constructors if task == "init" else pool.signatures)
    return module, _with_self(signature) if task == "init" else signature.render()


def _with_self(signature: Signature) -> str:
    return Signature("__init__", (("self", None), *signature.positional), signature.keyword_only).render()


@dataclass(frozen=True)
class _Recombiner:
    """Draws prompts whose pieces are real but come from different places of one pool."""

    pool: _Pool
    parameters: list[tuple[str, str | None]]
    pairs: list[tuple[str, object]]
    names: list[str]

    def sample(self, task: str, rng: random.Random) -> tuple[str, str]:
        """Return (module of the leading name, prompt material)."""
        if task == "json":
            module, _ = rng.choice(self.pool.literals)
            values = [value for _, value in rng.choices(self.pairs, k=rng.randint(2, 5))]
            keys = [key for key, _ in rng.choices(self.pairs, k=len(values))]
            return module, repr(dict(zip(keys, values, strict=True)))
        if task == "imports":
            module, source, _ = rng.choice(self.pool.imports)
            names = dict.fromkeys(rng.choices(self.names, k=rng.randint(3, 5)))
            return module, f"from {source} import {', '.join(names)}"
        module, signature = rng.choice(self.pool.signatures)
        signature = self._signature(signature.name, rng)
        return module, _with_self(signature) if task == "init" else signature.render()

    def _signature(self, name: str, rng: random.Random) -> Signature:
        drawn = dict(rng.choices(self.parameters, k=rng.randint(_MIN_PARAMETERS, 6)))
        drawn.pop("self", None)
        required = [(p, d) for p, d in drawn.items() if d is None]
        optional = [(p, d) for p, d in drawn.items() if d is not None]
        num_keyword_only = rng.randint(1, len(optional)) if optional and rng.random() < 0.2 else 0
        split = len(optional) - num_keyword_only
        return Signature(name, (*required, *optional[:split]), tuple(optional[split:]))


def _iterate_rewrites(pool: _Pool, rng: random.Random, recombined_share: float) -> Iterator[Chat]:
    recombiner = _Recombiner(
        pool,
        parameters=pool.parameters(),
        pairs=[pair for _, pairs in pool.literals for pair in pairs],
        names=list(dict.fromkeys(name for _, _, names in pool.imports for name in names)),
    )
    while True:
        for task in TASKS:
            is_recombined = rng.random() < recombined_share
            module, text = recombiner.sample(task, rng) if is_recombined else _sample_real(pool, task, rng)
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
    """Return distinct training and held-out chats of `rewrites` or `bodies`; the same seed and library give the same chats.

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
    else:
        train, held_out = _iterate_rewrites(train_pool, train_rng, 0.5), _iterate_rewrites(eval_pool, eval_rng, 0.0)
    return ChatSplit(_take_distinct(train, num_train, "training"), _take_distinct(held_out, num_eval, "held-out"))
