"""Prompts of a benchmark: JSONL files, and the paper's evaluation sets by name.

Out come `Prompt` records; turning text into token ids is the caller's business, and so is everything about models.
A set is fetched through the optional package `datasets`; nothing else here leaves the machine.

Source: counts as in Domino (arXiv 2605.29707); data sets, fields and wording of the prompts as in the public benchmark
of z-lab/dflash, which jianuo-huang/Domino uses too (drawn with `shuffle(seed=0)` where a set is larger than its count).
"""

import codecs
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

# The hub's HTTP library differs by version (httpx or a successor), and its connection errors are no OSError.
_FETCH_ERRORS = (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)


class PromptError(ValueError):
    """A prompt file or set that cannot be used; the message names file and line, or the set, and what to do."""


@dataclass(frozen=True)
class Prompt:
    """One prompt; exactly one of the first four fields is set.

    Attributes:
        text: text to be continued as it stands, without a chat template.
        messages: a chat that ends with a user's turn.
        prompt_ids: token ids, taken as they are.
        turns: user turns of a chat whose answers are generated one after the other.
        name: where it comes from, for messages: file and line, or set and number; prompts are equal without it.
    """

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt_ids: list[int] | None = None
    turns: list[str] | None = None
    name: str = field(default="", compare=False)


@dataclass(frozen=True)
class PromptSet:
    """One of the paper's evaluation sets.

    Attributes:
        load: positional and keyword arguments of `datasets.load_dataset`.
        num_prompts: prompts the paper decodes.
        to_turns: from a row of the set to its user turns.
    """

    load: tuple[tuple[str, ...], dict[str, Any]]
    num_prompts: int
    to_turns: Callable[[dict[str, Any]], list[str]]


_BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
_CODE_FILES = "https://huggingface.co/datasets/livecodebench/code_generation_lite/resolve/main/"


def _alpaca_turns(row: dict[str, Any]) -> list[str]:
    return [f"{row['instruction']}\n\nInput:\n{row['input']}" if row["input"] else row["instruction"]]


def _livecodebench_turns(row: dict[str, Any]) -> list[str]:
    starter = row.get("starter_code")
    parts = [
        "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
        "correct Python program that matches the specification and passes all tests. You will NOT return anything "
        "except for the program",
        f"### Question:\n{row['question_content']}",
        "### Format: "
        + ("Use the following code structure:" if starter else "Write your code in the following format:")
        + f"\n```python\n{starter or '# YOUR CODE HERE'}\n```",
        "### Answer: (use the provided format with backticks)",
    ]
    return ["\n\n".join(parts)]


PROMPT_SETS: dict[str, PromptSet] = {
    "gsm8k": PromptSet((("openai/gsm8k", "main"), {"split": "test"}), 128, lambda r: [r["question"] + _BOXED]),
    "math500": PromptSet((("HuggingFaceH4/MATH-500",), {"split": "test"}), 128, lambda r: [r["problem"] + _BOXED]),
    "aime24": PromptSet((("HuggingFaceH4/aime_2024",), {"split": "train"}), 30, lambda r: [r["problem"] + _BOXED]),
    "aime25": PromptSet((("MathArena/aime_2025",), {"split": "train"}), 30, lambda r: [r["problem"] + _BOXED]),
    "humaneval": PromptSet(
        (("openai/openai_humaneval",), {"split": "test"}),
        164,
        lambda r: [
            "Write a solution to the following problem and make sure that it passes the tests:\n"
            f"```python\n{r['prompt']}\n```"
        ],
    ),
    "mbpp": PromptSet(
        (("google-research-datasets/mbpp", "sanitized"), {"split": "test"}), 128, lambda r: [r["prompt"]]
    ),
    "livecodebench": PromptSet(
        (
            ("json",),
            {
                "data_files": {"test": [f"{_CODE_FILES}test{i}.jsonl" for i in ("", 2, 3, 4, 5, 6)]},
                "split": "test",
            },
        ),
        128,
        _livecodebench_turns,
    ),
    "swe-bench": PromptSet(
        (("princeton-nlp/SWE-bench_Lite",), {"split": "test"}),
        128,
        lambda r: [f"Problem Statement:\n{r['problem_statement']}\nPlease fix the issue described above."],
    ),
    "mt-bench": PromptSet((("HuggingFaceH4/mt_bench_prompts",), {"split": "train"}), 80, lambda r: list(r["prompt"])),
    "alpaca": PromptSet((("tatsu-lab/alpaca",), {"split": "train"}), 128, _alpaca_turns),
}


def load_prompts(path_or_name: str, limit: int | None = None) -> list[Prompt]:
    """Return the prompts of a JSONL file, or of one of `PROMPT_SETS` where no such file exists.

    Raises:
        PromptError: neither file nor set; a line or set that cannot be used; no prompt at all.
    """
    path = Path(path_or_name)
    if path.is_file():
        prompts = read_prompts(path)
    elif path_or_name in PROMPT_SETS:
        prompts = _load_set(path_or_name)
    else:
        raise PromptError(
            f"{path_or_name!r} is neither a file nor a known set; give a JSONL file or one of: {', '.join(PROMPT_SETS)}"
        )
    if not prompts:
        raise PromptError(f"{path_or_name} holds no prompt; give at least one line")
    return prompts if limit is None else prompts[:limit]


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a JSONL file in UTF-8, with or without a byte order mark; empty lines are skipped.

    Raises:
        PromptError: a line that is not one of the three forms or not text; the message names file and line.
    """
    prompts = []
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise PromptError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            name = f"{path}, line {number}"
            try:
                prompts.append(_parse_line(line, name))
            except UnicodeDecodeError as error:
                raise PromptError(f"{name}: {error}; save the file as UTF-8") from error
            except ValueError as error:
                raise PromptError(f"{name}: {error}") from error
    return prompts


def _parse_line(line: bytes, name: str) -> Prompt:
    row = json.loads(line.decode("utf-8"))
    forms = '{"prompt": str}, {"messages": [...]} or {"prompt_ids": [int]}'
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}; a line must be {forms}")
    given = [key for key in ("prompt", "messages", "prompt_ids") if key in row]
    if len(given) != 1:
        raise ValueError(f"names {' and '.join(given) or 'none of the forms'}; a line must be exactly one of {forms}")
    value = row[given[0]]
    if given == ["prompt"]:
        if not isinstance(value, str) or not value:
            raise ValueError("prompt must be a text that is not empty")
        _check_text("prompt", value)
        return Prompt(text=value, name=name)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{given[0]} must be a list that is not empty")
    if given == ["prompt_ids"]:
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
            raise ValueError("prompt_ids must hold token ids: integers of 0 or more")
        return Prompt(prompt_ids=value, name=name)
    _check_messages(value)
    return Prompt(messages=value, name=name)


def _check_text(where: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(
            f"{where} holds {half}, half of a surrogate pair; write both halves, or the character"
        ) from error


def _check_messages(messages: list[Any]) -> None:
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {i} must be an object with a text as its content")
        if message.get("role") not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"message {i} has role {message.get('role')!r}; allowed: system, user, assistant, tool")
        _check_text(f"message {i}", json.dumps(message, ensure_ascii=False))
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's; end with the turn that is to be answered")


def _load_set(name: str) -> list[Prompt]:
    try:
        import datasets
    except ImportError as error:
        raise PromptError(
            f"the set {name!r} is fetched with the package `datasets`, which is not installed; "
            'run: pip install "domino_jax[eval]", or give a JSONL file'
        ) from error
    prompt_set = PROMPT_SETS[name]
    arguments, options = prompt_set.load
    try:
        rows = datasets.load_dataset(*arguments, **options)
    except _FETCH_ERRORS as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise PromptError(
            f"the set {name!r} could not be fetched ({first_line}); it needs a reachable Hugging Face hub or a cache; "
            "offline, give a JSONL file"
        ) from error
    if len(rows) > prompt_set.num_prompts:
        rows = rows.shuffle(seed=0).select(range(prompt_set.num_prompts))
    return [Prompt(turns=prompt_set.to_turns(row), name=f"{name}, prompt {i}") for i, row in enumerate(rows, start=1)]
