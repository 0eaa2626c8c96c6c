"""The README's commands and paths exist and parse; `.ci/run` reads the commands from there."""

import dataclasses
import importlib.util
import re
import shlex
import subprocess
import tomllib
import typing

import pytest

from domino_jax.config_flags import parse_command_line
from domino_jax.run_config import RunConfig

VOCABULARY = [
    *"target draft anchor block slot context round accepted bonus committed".split(),
    *["base logits", "corrected logits", "base weight", "tau"],
]


@pytest.fixture(scope="module")
def readme(repository):
    return (repository / "README.md").read_text(encoding="utf-8")


def shell_commands(readme):
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", readme, flags=re.DOTALL | re.MULTILINE)
    return [part.strip() for block in blocks for line in block.splitlines() for part in line.split("&&")]


def marked_command(readme, mark):
    (block,) = re.findall(rf"^<!-- ci:{mark} -->\n```bash\n(.*?)\n```", readme, flags=re.DOTALL | re.MULTILINE)
    return block


def test_the_two_commands(readme):
    assert marked_command(readme, "main") == "pip install -e . && python train.py --config configs/tiny.py"
    assert marked_command(readme, "tests") == 'pip install -e ".[dev]" && pytest'


def test_ci_reads_both_commands(repository):
    script = (repository / ".ci" / "run").read_text(encoding="utf-8")
    assert 'run_readme "$work/venv311" main' in script and 'run_readme "$work/venv311" tests' in script
    assert "train.py" not in script
    subprocess.run(["bash", "-n", str(repository / ".ci" / "run")], check=True)


def test_programs_of_the_commands_exist(repository, readme):
    programs = {word for command in shell_commands(readme) for word in shlex.split(command) if word.endswith(".py")}
    assert {"train.py", "bench.py", "configs/tiny.py"} <= programs
    assert [program for program in programs if not (repository / program).is_file()] == []


@pytest.mark.parametrize(("page", "count"), [("README.md", 5), ("docs/export.md", 1), ("docs/recipes.md", 2)])
def test_configurations_of_the_commands_parse(repository, page, count, monkeypatch):
    monkeypatch.chdir(repository)
    text = (repository / page).read_text(encoding="utf-8")
    commands = [shlex.split(c) for c in shell_commands(text) if re.match(r"python \S+ --config ", c)]
    assert len(commands) >= count
    for _, program, *arguments in commands:
        assert parse_command_line(arguments, load_program(repository / program).FLAGS).config.name


@pytest.mark.parametrize("page", ["README.md", "docs/export.md", "docs/recipes.md", "docs/scaling.md"])
def test_configuration_names_in_the_text_exist(repository, page):
    """Those inside of other programs' commands too: `srun`, a JobSet, a table of settings."""
    known = {f"{prefix}{name}" for name in list_names(RunConfig) for prefix in ("--config.", "")}
    text = (repository / page).read_text(encoding="utf-8")
    used = set(re.findall(r"--config\.[a-z_.0-9]+[a-z0-9]", text))
    assert sorted(used - known) == []
    assert used or page == "README.md"


def list_names(config_type, prefix=""):
    for field in dataclasses.fields(config_type):
        hint = typing.get_type_hints(config_type)[field.name]
        inner = next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)
        if inner:
            yield from list_names(inner, f"{prefix}{field.name}.")
        yield f"{prefix}{field.name}"


def load_program(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("page", "programs"),
    [
        (
            "README.md",
            {
                "bench.py",
                "serve.py",
                "scripts/regenerate_responses.py",
                "scripts/convert_checkpoint.py",
                "scripts/choose_draft_vocabulary.py",
            },
        ),
        (
            "benchmarks/README.md",
            {
                "scripts/compare_transformers.py",
                "scripts/run_ablations.py",
                "scripts/calibrate_survival.py",
                "bench.py",
                "serve.py",
                "benchmarks/widths.py",
                "benchmarks/tpu_rounds.py",
                "benchmarks/serving_load.py",
                "benchmarks/loading.py",
                "benchmarks/cpu_sizes.py",
                "benchmarks/few_rows.py",
                "benchmarks/width_costs.py",
                "benchmarks/draft_vocabulary.py",
                "scripts/choose_draft_vocabulary.py",
                "benchmarks/first_token.py",
                "benchmarks/accelerator_round.py",
            },
        ),
        ("docs/serving.md", {"serve.py", "scripts/convert_checkpoint.py"}),
        ("docs/export.md", {"scripts/convert_checkpoint.py"}),
        ("docs/scaling.md", {"benchmarks/plan_table.py", "benchmarks/scaling_estimate.py"}),
    ],
)
def test_options_of_the_other_commands_are_the_programs_own(repository, page, programs, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))  # as Python does for a program there
    text = (repository / page).read_text(encoding="utf-8")
    commands = [shlex.split(c, comments=True) for c in shell_commands(text) if c.startswith("python ")]
    commands = [words[1:] for words in commands if words[1] not in ("train.py", "-m")]
    commands = [words for words in commands if words[1:2] != ["--config"]]
    assert {program for program, *_ in commands} == programs
    for program, *arguments in commands:
        load_program(repository / program).parse_arguments(arguments)  # ends the test where an option is unknown


def test_paths_in_the_text_exist(repository, readme):
    paths = set(re.findall(r"`((?:domino_jax|configs|scripts|tests|docs|benchmarks|\.ci)/[\w./]*)", readme))
    paths |= set(re.findall(r"\]\((?!http)([^)#]+)\)", readme))
    assert [path for path in sorted(paths) if not (repository / path).exists()] == []


def test_python_example_names_what_exists(readme):
    (example,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    imports = [line for line in example.splitlines() if line.startswith("from ")]
    assert len(imports) == 3
    exec("\n".join(imports), {})  # raises ImportError when a name has moved
    compile(example, "README.md", "exec")


def test_vocabulary_is_complete(readme):
    table = readme.partition("## Vocabulary")[2].partition("\n## ")[0]
    words = re.findall(r"^\| ([\w ]+?) \|", table, flags=re.MULTILINE)
    assert words[1:] == VOCABULARY


def test_licence_is_apache(repository):
    text = (repository / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_extras_are_declared(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"cuda12", "tpu", "serve", "eval", "wandb", "dev"} <= set(project["optional-dependencies"])
    assert not any("[" in requirement.partition(";")[0] for requirement in project["dependencies"])
