"""Material from the Python standard library's own source files, by `ast`.

In: the running interpreter's `*.py` files (tests, platform data and generated tables left out). Out: signatures,
constant dictionaries and function bodies, file by file in name order, and the split of top-level modules into
training and held-out ones. Knows nothing about chats, tokenizers or models.
"""

import ast
import hashlib
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 0.15
"""Share of top-level modules whose material is only ever used for held-out chats."""

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "encodings"})
_SKIPPED_FOLDERS |= {"__pycache__", "lib-dynload", "pydoc_data", "turtledemo", "__phello__"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "__phello__", "_sysconfig_vars")
_MAX_NAME, _MAX_LITERAL = 24, 14
MIN_PARAMETERS, MAX_PARAMETERS = 2, 5


class CorpusError(ValueError):
    """The standard library found here cannot give the chats asked for; the message says what is missing."""


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
        bodies: (signature and docstring, body) sources.
    """

    module: str
    signatures: list[Signature]
    constructors: list[Signature]
    literals: list[tuple[tuple[str, object], ...]]
    bodies: list[tuple[str, str]]


def _render_parameter(parameter: tuple[str, str | None]) -> str:
    name, default = parameter
    return name if default is None else f"{name}={default}"


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
    """Return what `path` offers (`bodies` only when asked: they take longest), or None where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return None
    material = Material(module, [], [], [], [])
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            _collect_signature(node, material)
            if with_bodies:
                _collect_body(node, material)
        elif isinstance(node, ast.Dict):
            _collect_pairs(list(zip(node.keys, node.values, strict=True)), material)
        elif isinstance(node, ast.Call):
            _collect_pairs([(ast.Constant(k.arg), k.value) for k in node.keywords], material)
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
    if not MIN_PARAMETERS <= len(positional) + len(keyword_only) <= MAX_PARAMETERS or not _is_name(node.name):
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


def _collect_body(node: ast.FunctionDef, material: Material) -> None:
    docstring = ast.get_docstring(node)
    if not docstring or len(node.body) < 2 or node.decorator_list:
        return
    header = f'def {node.name}({ast.unparse(node.args)}):\n    """{docstring.splitlines()[0]}"""'
    body = "\n".join(ast.unparse(statement) for statement in node.body[1:])
    if body.isascii() and header.isascii() and len(body) <= 1200:
        material.bodies.append((header, body))
