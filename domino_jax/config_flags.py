"""Command line -> frozen run configuration.

`--config FILE[:variant]` names a Python file with `get_config(variant="") -> RunConfig`;
`--config.a.b=value` overrides any leaf of it. The flags themselves are those of
ml_collections `config_flags` over absl; this module turns the frozen dataclasses into a
`ConfigDict` and back, so that every value passes the dataclass validation, and turns each
mistake into one line. It knows nothing about what a run does with its configuration.

Source: the `--config=file.py:arguments` convention of ml_collections `config_flags` and big_vision.
"""

import dataclasses
import importlib.util
import inspect
import json
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from domino_jax.config import ConfigError, from_json_dict, near_names, to_json_dict
from domino_jax.run_config import RunConfig

FlagDefault = bool | int | float | str


@dataclass(frozen=True)
class ExtraFlag:
    """A flag of the entry point beside the configuration; its type is the type of the default."""

    default: FlagDefault
    help: str


@dataclass(frozen=True)
class CommandLine:
    """What the command line asked for.

    Attributes:
        config: the configuration with all overrides applied.
        extras: value of every extra flag, by name.
    """

    config: RunConfig
    extras: dict[str, FlagDefault]


def parse_config(argv: Sequence[str]) -> RunConfig:
    """Return the configuration that `argv` (without the program's name) describes.

    Raises:
        ConfigError: see `parse_command_line`.
    """
    return parse_command_line(argv).config


def parse_command_line(argv: Sequence[str], extra_flags: Mapping[str, ExtraFlag] | None = None) -> CommandLine:
    """Read `--config FILE[:variant]`, its overrides and the entry point's own flags from `argv`.

    Raises:
        ConfigError: no or an unreadable configuration file, an unknown variant, name or flag, or a bad value.
    """
    extra_flags = extra_flags or {}
    location, rest = _take_config_location(list(argv))
    tree = to_json_dict(load_config_file(location))
    paths = [f"config.{path}" for path in _leaf_paths(RunConfig)]
    flag_values = flags.FlagValues()
    for name, extra in extra_flags.items():
        _define_extra(name, extra, flag_values)
    remaining = []
    for argument in rest:
        _check_flag_name(argument, paths, list(extra_flags))
        if not _apply_optional(tree, argument):
            remaining.append(argument)
    values = ConfigDict(tree, convert_dict=True)
    program = ["domino_jax", *remaining]
    config_flags.DEFINE_config_dict("config", values, flag_values=flag_values, sys_argv=program)
    try:
        positional = flag_values(program)[1:]
    except flags.Error as error:
        raise ConfigError(_explain(error, remaining)) from error
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"{_one_line(error)} (in {' '.join(remaining)})") from error
    if positional:
        raise ConfigError(f"unexpected argument {positional[0]!r}; overrides look like --config.train.num_steps=100")
    config = from_json_dict(RunConfig, values.to_dict())
    return CommandLine(config, {name: getattr(flag_values, name) for name in extra_flags})


def parse_or_exit(
    argv: Sequence[str], extra_flags: Mapping[str, ExtraFlag] | None = None, usage: str = ""
) -> CommandLine:
    """Do as `parse_command_line`, for an entry point: print a mistake as one line and exit with status 2.

    `--help` prints `usage`, the extra flags and the names that can be overridden, and exits with status 0.

    Raises:
        SystemExit: the command line was `--help` or cannot be used.
    """
    if any(argument in ("-h", "--help", "-help") for argument in argv):
        print(format_help(usage, extra_flags or {}))
        sys.exit(0)
    try:
        return parse_command_line(argv, extra_flags)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def format_help(usage: str, extra_flags: Mapping[str, ExtraFlag]) -> str:
    """Return the text of `--help`."""
    lines = [usage.strip(), "", "  --config FILE[:variant]   one of: " + ", ".join(_known_config_files(Path.cwd()))]
    lines += [f"  --{name}={extra.default!r}   {extra.help}" for name, extra in extra_flags.items()]
    lines += ["", "overrides:"] + [f"  --config.{path}" for path in _leaf_paths(RunConfig)]
    return "\n".join(lines).strip()


def format_config(config: RunConfig) -> str:
    """Return `config` as text, one `path: value` a leaf, in the order of its fields."""
    lines = []

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, f"{path}.{name}" if path else name)
        else:
            lines.append(f"{path}: {json.dumps(value)}")

    walk(to_json_dict(config), "")
    return "\n".join(lines)


def load_config_file(location: str) -> RunConfig:
    """Return what `get_config` of a file returns; `location` is `FILE` or `FILE:variant`.

    Raises:
        ConfigError: the file or its `get_config` is missing, or it refuses the variant.
    """
    file_name, _, variant = location.partition(".py:")
    path = Path(file_name + ".py" if location.partition(".py:")[1] else location)
    if not path.is_file():
        known = ", ".join(_known_config_files(path.parent)) or "none found"
        raise ConfigError(f"configuration file {str(path)!r} does not exist; there are: {known}")
    if path.suffix != ".py":
        raise ConfigError(f"configuration file {str(path)!r} is not a Python file with get_config()")
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"configuration file {str(path)!r} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno}: {error.msg}; it must be Python with get_config()") from error
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise ConfigError(f"{str(path)!r} has no get_config(); it must return a RunConfig")
    if variant and not inspect.signature(get_config).parameters:
        raise ConfigError(f"{str(path)!r} has no variants; leave out ':{variant}'")
    config = get_config(variant) if variant else get_config()
    if not isinstance(config, RunConfig):
        raise ConfigError(f"get_config() of {str(path)!r} returns {type(config).__name__}; it must be a RunConfig")
    return config


def choose_variant(variant: str, variants: Sequence[str]) -> str:
    """Return `variant`, or the first of `variants` when it is empty; for `get_config` of configuration files.

    Raises:
        ConfigError: the variant is not one of `variants`; they are listed.
    """
    if not variants and variant:
        raise ConfigError(f"unknown variant {variant!r}; this configuration has none")
    if variant and variant not in variants:
        raise ConfigError(f"unknown variant {variant!r}; there are: {', '.join(variants)}")
    return variant or (variants[0] if variants else "")


def _known_config_files(folder: Path) -> list[str]:
    for candidate in (folder, folder / "configs", Path("configs")):
        found = sorted(
            os.path.relpath(path) for path in candidate.glob("*.py") if "def get_config(" in path.read_text()
        )
        if found:
            return found
    return []


def _take_config_location(argv: list[str]) -> tuple[str, list[str]]:
    locations, rest, index = [], [], 0
    while index < len(argv):
        argument = argv[index]
        if argument in ("--config", "-config"):
            if index + 1 == len(argv):
                raise ConfigError("--config needs a file, as in --config configs/tiny.py")
            locations.append(argv[index + 1])
            index += 2
            continue
        if argument.startswith(("--config=", "-config=")):
            locations.append(argument.partition("=")[2])
        else:
            rest.append(argument)
        index += 1
    if not locations:
        raise ConfigError(f"--config is missing; choose one of: {', '.join(_known_config_files(Path.cwd()))}")
    if len(locations) > 1:
        raise ConfigError(f"--config is given {len(locations)} times; one run has one configuration")
    return locations[0], rest


def _optional_inner(hint: Any) -> Any:
    """Return X of `X | None`, else None."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return None
    return next((a for a in typing.get_args(hint) if a is not type(None)), None)


def _leaf_paths(config_type: Any, prefix: str = "") -> list[str]:
    hints = typing.get_type_hints(config_type)
    paths = []
    for config_field in dataclasses.fields(config_type):
        hint = hints[config_field.name]
        inner = _optional_inner(hint) or hint
        path = f"{prefix}{config_field.name}"
        if dataclasses.is_dataclass(inner):
            paths += _leaf_paths(inner, f"{path}.")
        else:
            paths.append(path)
    return paths


def _hint_at(path: str) -> Any:
    hint: Any = RunConfig
    for name in path.split("."):
        hint = typing.get_type_hints(_optional_inner(hint) or hint)[name]
    return hint


def _flag_name(argument: str) -> str:
    return argument.lstrip("-").partition("=")[0]


def _check_flag_name(argument: str, paths: list[str], extras: list[str]) -> None:
    if not argument.startswith("-") or _is_number(argument):
        return
    name = _flag_name(argument)
    groups = sorted({path.rpartition(".")[0] for path in paths})
    plain = name[2:] if name.startswith("no") and name[2:] in [*extras, *paths] else name
    if plain in paths or plain in extras or plain == "config.corpus":
        return
    if plain in groups:
        inside = [path for path in paths if path.startswith(f"{plain}.")]
        raise ConfigError(f"--{plain} is a group, not a value; set one of: {', '.join(inside)}")
    if not plain.startswith("config."):
        raise ConfigError(f"unknown flag --{plain}{near_names(plain, ['config', *extras, *paths])}")
    raise ConfigError(f"unknown configuration name {plain.removeprefix('config.')!r}{_near_paths(plain, paths)}")


def _near_paths(name: str, paths: list[str]) -> str:
    """Return the leaves whose whole path or last part is close to `name`, or those of its group."""
    name, leaves = name.removeprefix("config."), [path.removeprefix("config.") for path in paths]

    def similarity(path: str) -> float:
        last, wanted = path.rpartition(".")[2], name.rpartition(".")[2]
        whole = SequenceMatcher(None, name, path).ratio()
        return 0.6 * SequenceMatcher(None, wanted, last).ratio() + 0.4 * whole

    near = [path for path in sorted(leaves, key=similarity, reverse=True)[:3] if similarity(path) >= 0.6]
    group = [path for path in leaves if path.rpartition(".")[0] == name.rpartition(".")[0]]
    return f"; did you mean {' or '.join(near)}?" if near else f"; known names: {', '.join(group or leaves)}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _apply_optional(tree: dict[str, Any], argument: str) -> bool:
    """Apply what a ConfigDict cannot: None, and a leaf below an absent optional part. Return True when consumed."""
    name, equals, text = argument.lstrip("-").partition("=")
    if not name.startswith("config."):
        return False
    names = name.removeprefix("config.").split(".")
    if names == ["corpus"]:
        if text not in ("None", "none"):
            raise ConfigError(f"--config.corpus={text}: only None (no embedded corpus) can be set; set its fields")
        tree["corpus"] = None
        return True
    node, hint = tree, RunConfig
    for part in names[:-1]:
        hint = typing.get_type_hints(_optional_inner(hint) or hint).get(part)
        if hint is None:
            return False
        if node[part] is None:
            node[part] = to_json_dict((_optional_inner(hint) or hint)())
        node = node[part]
    if equals and text in ("None", "none") and _optional_inner(_hint_at(".".join(names))):
        node[names[-1]] = None
        return True
    return False


def _define_extra(name: str, extra: ExtraFlag, flag_values: flags.FlagValues) -> None:
    kinds: dict[type, Any] = {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    kinds[type(extra.default)](name, extra.default, extra.help, flag_values=flag_values)


def _explain(error: flags.Error, arguments: list[str]) -> str:
    """Say which value was refused and what it must be, where absl only passes on Python's complaint."""
    text = _one_line(error)
    for index, argument in enumerate(arguments):
        name, equals, value = argument.lstrip("-").partition("=")
        value = value if equals else (arguments + [""])[index + 1]
        if name.startswith("config.") and text.startswith(f"flag --{name}={value}:"):
            path = name.removeprefix("config.")
            return f"{path} is {value!r}; it must be {getattr(_hint_at(path), '__name__', _hint_at(path))}"
    return text


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__
