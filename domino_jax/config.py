"""Frozen, validated configuration of models, runs and decoding.

Everything a run depends on is a dataclass of this file; an instance is hashable,
so a model configuration can be a static argument of jit. JSON goes in and out
through `to_json_dict` and `from_json_dict`. This module knows nothing about
arrays, files of foreign formats or devices, and never imports jax.

Source: field names follow Hugging Face `Qwen3Config` and the public Domino/DFlash `config.json`.
"""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

_T = TypeVar("_T")


class ConfigError(ValueError):
    """A configuration value that cannot be used; the message names it, what is allowed and what to do."""


def require(condition: bool, message: str) -> None:
    """Refuse a configuration with `message` unless `condition` holds.

    Raises:
        ConfigError: it does not.
    """
    if not condition:
        raise ConfigError(message)


def require_positive(config: Any, *names: str) -> None:
    """Refuse a configuration in which one of the named values is not positive.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{type(config).__name__}.{name} is {value!r}; it must be greater than 0")


def default_target_layer_ids(num_target_layers: int, num_draft_layers: int) -> tuple[int, ...]:
    """Return the target layers whose outputs a drafter reads when none are given.

    Halves round to even, and ids can repeat for small targets, as in the public rule.

    Source: `build_target_layer_ids` of z-lab/dflash.
    """
    if num_draft_layers == 1:
        return (num_target_layers // 2,)
    span = num_target_layers - 4
    return tuple(round(1 + j * span / (num_draft_layers - 1)) for j in range(num_draft_layers))


@dataclass(frozen=True)
class TargetConfig:
    """Sizes of a dense Qwen3 target.

    Raises:
        ConfigError: a size is not positive or the query heads do not divide over the key/value heads.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    max_position_embeddings: int = 40960
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        require_positive(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
            "rope_theta",
            "max_position_embeddings",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} must be a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
        require(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; RoPE needs an even width")


@dataclass(frozen=True)
class DraftConfig:
    """Sizes and layout of a drafter; without `gru_hidden_dim` it is a plain DFlash drafter (no head).

    Attributes:
        target_layer_ids: 0-based target layers whose residual stream after the layer is read, in this order.
        block_size: slots of a block as trained, the anchor's slot included.
        shift_label: True: slot k predicts the token k + 1 after the anchor; False: k after, slot 0 unused.
        pure_draft_prefix_len: leading drafted tokens that take the base logits as they are.
        gru_hidden_dim: width of the head's GRU; 0 for a drafter without a head.
        emb_dim: rank of the head's correction; 0 for a drafter without a head.

    Raises:
        ConfigError: a size is out of range or half of a head is configured.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_target_layers: int
    target_layer_ids: tuple[int, ...]
    block_size: int
    mask_token_id: int
    shift_label: bool = False
    pure_draft_prefix_len: int = 0
    gru_hidden_dim: int = 0
    emb_dim: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    max_position_embeddings: int = 40960

    def __post_init__(self) -> None:
        require_positive(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "num_target_layers",
            "rms_norm_eps",
            "rope_theta",
            "max_position_embeddings",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} must be a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
        require(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; RoPE needs an even width")
        require(self.block_size >= 2, f"block_size is {self.block_size}; a block needs at least 2 slots")
        require(len(self.target_layer_ids) > 0, "target_layer_ids is empty; name at least one target layer")
        for layer_id in self.target_layer_ids:
            require(
                0 <= layer_id < self.num_target_layers,
                f"target_layer_ids holds {layer_id}; the target has layers 0 .. {self.num_target_layers - 1}",
            )
        require(
            0 <= self.mask_token_id < self.vocab_size,
            f"mask_token_id is {self.mask_token_id}; the vocabulary has ids 0 .. {self.vocab_size - 1}",
        )
        require(
            (self.gru_hidden_dim > 0) == (self.emb_dim > 0) and self.gru_hidden_dim >= 0 and self.emb_dim >= 0,
            f"gru_hidden_dim {self.gru_hidden_dim} and emb_dim {self.emb_dim} must both be positive (Domino head) "
            "or both 0 (plain DFlash)",
        )
        require(
            self.pure_draft_prefix_len >= 0,
            f"pure_draft_prefix_len is {self.pure_draft_prefix_len}; it must be 0 or more",
        )

    @property
    def has_head(self) -> bool:
        """Whether a Domino head corrects the base logits."""
        return self.gru_hidden_dim > 0

    def num_draft_tokens(self, block_size: int | None = None) -> int:
        """Return the tokens drafted in a round of `block_size` slots (default: as trained); 0 for width 1.

        Raises:
            ConfigError: `block_size` is outside 1 .. the trained block size.
        """
        width = self.block_size if block_size is None else block_size
        require(
            1 <= width <= self.block_size,
            f"block size {width} is outside 1 .. {self.block_size}, the width this drafter was trained with",
        )
        if width == 1:
            return 0
        return width if self.shift_label else width - 1


def find_misfits(draft: DraftConfig, target: TargetConfig) -> list[str]:
    """Return every way in which a drafter does not belong to a target, with both values; empty where it does."""
    pairs = [
        ("hidden_size", draft.hidden_size, "hidden_size", target.hidden_size),
        ("vocab_size", draft.vocab_size, "vocab_size", target.vocab_size),
        ("num_target_layers", draft.num_target_layers, "num_hidden_layers", target.num_hidden_layers),
    ]
    problems = [
        f"{name} is {value}, the target's {other} is {expected}"
        for name, value, other, expected in pairs
        if value != expected
    ]
    outside = [i for i in draft.target_layer_ids if i >= target.num_hidden_layers]
    if outside:
        problems.append(f"target_layer_ids holds {outside}, the target has layers 0 .. {target.num_hidden_layers - 1}")
    if draft.mask_token_id >= target.vocab_size:
        problems.append(f"mask_token_id is {draft.mask_token_id}, the target's ids are 0 .. {target.vocab_size - 1}")
    return problems


AcceptanceRule = Literal["seed-exact", "rejection"]


@dataclass(frozen=True)
class SamplingConfig:
    """How one sequence's next token is chosen; temperature 0 is greedy.

    Attributes:
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose mass reaches top_p; 1 keeps all.
        min_p: keep tokens at least min_p times as likely as the most likely one; 0 keeps all.
        seed: names the noise of the sequence; the same seed and settings give the same text.

    Raises:
        ConfigError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            0.0 <= self.temperature < float("inf"),
            f"temperature is {self.temperature!r}; it must be 0 (greedy) or a positive number",
        )
        require(self.top_k >= 0, f"top_k is {self.top_k}; it must be 0 (off) or positive")
        require(0.0 < self.top_p <= 1.0, f"top_p is {self.top_p}; it must lie in (0, 1]")
        require(0.0 <= self.min_p <= 1.0, f"min_p is {self.min_p}; it must lie in [0, 1]")
        require(0 <= self.seed < 2**32, f"seed is {self.seed}; it must lie in 0 .. 2**32 - 1")


def to_json_dict(config: Any) -> dict[str, Any]:
    """Return `config` as JSON-ready nested dictionaries (tuples become lists)."""
    return dataclasses.asdict(config)


def diff_configs(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """Return a line for every leaf in which two nested configurations differ, named by its dotted path.

    Tuples and lists of the same elements are the same: JSON knows no tuples.
    """
    lines = []
    for name in [*old, *(n for n in new if n not in old)]:
        where = f"{path}{name}"
        if name not in new:
            lines.append(f"{where}: stored {old[name]!r}, now absent")
        elif name not in old:
            lines.append(f"{where}: not stored, now {new[name]!r}")
        elif isinstance(old[name], dict) and isinstance(new[name], dict):
            lines += diff_configs(old[name], new[name], f"{where}.")
        elif _as_json(old[name]) != _as_json(new[name]):
            lines.append(f"{where}: stored {old[name]!r}, now {new[name]!r}")
    return lines


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_as_json(v) for v in value]
    if isinstance(value, dict):
        return {k: _as_json(v) for k, v in value.items()}
    return value


def near_names(name: str, known: list[str]) -> str:
    """Return ' (did you mean ...?)' for the known names closest to `name`, or all of them when none is close."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else f"; known names: {', '.join(sorted(known))}"


def from_json_dict(config_type: type[_T], values: dict[str, Any], path: str = "") -> _T:
    """Build `config_type` from nested dictionaries, as `to_json_dict` wrote them.

    Raises:
        ConfigError: an unknown name, a value of the wrong type or out of range; the message names its path.
    """
    hints = typing.get_type_hints(config_type)
    names = [f.name for f in dataclasses.fields(config_type)]
    arguments = {}
    for name, value in values.items():
        where = f"{path}{name}"
        if name not in hints:
            raise ConfigError(f"unknown configuration name {where!r}{near_names(name, names)}")
        arguments[name] = _convert(hints[name], value, where)
    try:
        return config_type(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{path.rstrip('.')}: {error}" if path else str(error)) from error
    except TypeError as error:
        raise ConfigError(f"{config_type.__name__} at {path or 'top level'}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (inner,) = [a for a in arguments if a is not type(None)]
        return _convert(inner, value, where)
    if dataclasses.is_dataclass(hint):
        require(isinstance(value, dict), f"{where} is {value!r}; it must be a mapping of {hint.__name__} fields")
        return from_json_dict(hint, value, f"{where}.")
    if origin is Literal:
        require(value in arguments, f"{where} is {value!r}; allowed: {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where} is {value!r}; it must be a list")
        return tuple(_convert(arguments[0], v, where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    require(
        isinstance(value, hint) and not (hint is not bool and isinstance(value, bool)),
        f"{where} is {value!r} of type {type(value).__name__}; it must be {hint.__name__}",
    )
    return value
