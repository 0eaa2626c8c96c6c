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
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

_T = TypeVar("_T")


class ConfigError(ValueError):
    """A configuration value that cannot be used; the message names it, what is allowed and what to do."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{type(config).__name__}.{name} is {value!r}; it must be greater than 0")


def _require_ratio(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0.0 <= value <= 1.0, f"{type(config).__name__}.{name} is {value!r}; it must lie in [0, 1]")


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
        _require_positive(
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
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} must be a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; RoPE needs an even width")


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
        _require_positive(
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
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} must be a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; RoPE needs an even width")
        _require(self.block_size >= 2, f"block_size is {self.block_size}; a block needs at least 2 slots")
        _require(len(self.target_layer_ids) > 0, "target_layer_ids is empty; name at least one target layer")
        for layer_id in self.target_layer_ids:
            _require(
                0 <= layer_id < self.num_target_layers,
                f"target_layer_ids holds {layer_id}; the target has layers 0 .. {self.num_target_layers - 1}",
            )
        _require(
            0 <= self.mask_token_id < self.vocab_size,
            f"mask_token_id is {self.mask_token_id}; the vocabulary has ids 0 .. {self.vocab_size - 1}",
        )
        _require(
            (self.gru_hidden_dim > 0) == (self.emb_dim > 0) and self.gru_hidden_dim >= 0 and self.emb_dim >= 0,
            f"gru_hidden_dim {self.gru_hidden_dim} and emb_dim {self.emb_dim} must both be positive (Domino head) "
            "or both 0 (plain DFlash)",
        )
        _require(
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
        _require(
            1 <= width <= self.block_size,
            f"block size {width} is outside 1 .. {self.block_size}, the width this drafter was trained with",
        )
        if width == 1:
            return 0
        return width if self.shift_label else width - 1


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
        _require(
            0.0 <= self.temperature < float("inf"),
            f"temperature is {self.temperature!r}; it must be 0 (greedy) or a positive number",
        )
        _require(self.top_k >= 0, f"top_k is {self.top_k}; it must be 0 (off) or positive")
        _require(0.0 < self.top_p <= 1.0, f"top_p is {self.top_p}; it must lie in (0, 1]")
        _require(0.0 <= self.min_p <= 1.0, f"min_p is {self.min_p}; it must lie in [0, 1]")
        _require(0 <= self.seed < 2**32, f"seed is {self.seed}; it must lie in 0 .. 2**32 - 1")


@dataclass(frozen=True)
class TargetSource:
    """Where a run's target comes from.

    Attributes:
        path: a Hugging Face directory or hub id; empty: the run builds its own (see `CorpusConfig`).
        dtype: type the parameters are held and computed in.
    """

    path: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class DraftSettings:
    """What a new drafter is made of; sizes left at 0 are taken from the target.

    Attributes:
        target_layer_ids: empty: the default rule for the number of draft layers.
        mask_token_id: -1: the tokenizer's mask token, else a clear error.
    """

    num_hidden_layers: int = 5
    intermediate_size: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    target_layer_ids: tuple[int, ...] = ()
    block_size: int = 16
    mask_token_id: int = -1
    shift_label: bool = True
    pure_draft_prefix_len: int = 1
    gru_hidden_dim: int = 1024
    emb_dim: int = 256

    def resolve(self, target: TargetConfig, mask_token_id: int) -> DraftConfig:
        """Return the drafter for `target`; `mask_token_id` is used where the settings leave it open.

        Raises:
            ConfigError: the resulting drafter is not valid for the target.
        """
        layer_ids = self.target_layer_ids or default_target_layer_ids(target.num_hidden_layers, self.num_hidden_layers)
        return DraftConfig(
            vocab_size=target.vocab_size,
            hidden_size=target.hidden_size,
            intermediate_size=self.intermediate_size or target.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads or target.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads or target.num_key_value_heads,
            head_dim=self.head_dim or target.head_dim,
            num_target_layers=target.num_hidden_layers,
            target_layer_ids=tuple(layer_ids),
            block_size=self.block_size,
            mask_token_id=self.mask_token_id if self.mask_token_id >= 0 else mask_token_id,
            shift_label=self.shift_label,
            pure_draft_prefix_len=self.pure_draft_prefix_len,
            gru_hidden_dim=self.gru_hidden_dim,
            emb_dim=self.emb_dim,
            rms_norm_eps=target.rms_norm_eps,
            rope_theta=target.rope_theta,
            max_position_embeddings=target.max_position_embeddings,
        )


@dataclass(frozen=True)
class DataConfig:
    """Training chats and how rows are read.

    Attributes:
        train_path: JSONL of chats whose assistant turns the target wrote; empty: the run builds its own.
        eval_path: JSONL of held-out chats whose prompts are decoded for tau; empty: none.
        max_length: tokens a sequence is truncated to.
        batch_size: sequences of an optimizer step, over all devices and micro-steps.
        micro_steps: gradient-accumulation steps one optimizer step is split into.
        bad_rows: what to do with a row that cannot be used.
        max_bad_rows: more than this many skipped rows stop the run; -1: no cap.
        enable_thinking: passed to the tokenizer's chat template.
    """

    train_path: str = ""
    eval_path: str = ""
    max_length: int = 3072
    batch_size: int = 8
    micro_steps: int = 1
    bad_rows: Literal["skip", "fail"] = "skip"
    max_bad_rows: int = -1
    enable_thinking: bool = False

    def __post_init__(self) -> None:
        _require_positive(self, "max_length", "batch_size", "micro_steps")
        _require(self.max_length >= 3, f"max_length is {self.max_length}; a sequence needs at least 3 tokens")
        _require(
            self.batch_size % self.micro_steps == 0,
            f"batch_size {self.batch_size} must be a multiple of micro_steps {self.micro_steps}",
        )


@dataclass(frozen=True)
class ObjectiveConfig:
    """Block sampling, slot weights and the base-anchored curriculum.

    Attributes:
        num_anchors: anchors drawn a sequence.
        loss_decay_gamma: slot k weighs exp(-k / gamma); 0 switches the decay off.
        base_weight_start: lambda at step 0.
        base_weight_decay_ratio: share of the optimizer steps over which lambda falls to 0.
        head_chunk: anchors whose logits exist at the same time in the loss.
    """

    num_anchors: int = 512
    loss_decay_gamma: float = 7.0
    base_weight_start: float = 1.0
    base_weight_decay_ratio: float = 1.0
    head_chunk: int = 32

    def __post_init__(self) -> None:
        _require_positive(self, "num_anchors", "head_chunk")
        _require(self.loss_decay_gamma >= 0, f"loss_decay_gamma is {self.loss_decay_gamma}; use 0 for no decay")
        _require_ratio(self, "base_weight_start", "base_weight_decay_ratio")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay, gradients clipped by their global norm.

    Attributes:
        warmup_ratio: share of the steps in which the learning rate rises from 0.
        end_ratio: final learning rate over the highest one.
        clip_norm: 0 switches clipping off.
    """

    learning_rate: float = 6e-4
    warmup_ratio: float = 0.04
    end_ratio: float = 0.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(self, "learning_rate")
        _require_ratio(self, "warmup_ratio", "end_ratio", "b1", "b2")
        _require(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; it must be 0 or more")
        _require(self.clip_norm >= 0, f"clip_norm is {self.clip_norm}; it must be 0 (off) or positive")


@dataclass(frozen=True)
class TrainConfig:
    """Length of a run and what happens along it.

    Attributes:
        num_steps: optimizer steps; 0: `num_epochs` over the data.
        num_epochs: passes over the data; used when `num_steps` is 0.
        log_every: steps between two metric rows.
        checkpoint_every: steps between two checkpoints.
        eval_every: steps between two decodes of held-out prompts.
        eval_prompts: held-out prompts decoded each time.
        eval_max_new_tokens: token budget of each of them.
        compute_dtype: type of the drafter's activations; its weights are always float32.
    """

    num_steps: int = 0
    num_epochs: float = 6.0
    log_every: int = 10
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    eval_every: int = 500
    eval_prompts: int = 32
    eval_max_new_tokens: int = 256
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        _require_positive(
            self,
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "eval_every",
            "eval_prompts",
            "eval_max_new_tokens",
        )
        _require(self.num_steps >= 0, f"num_steps is {self.num_steps}; use 0 to train by epochs")
        _require(
            self.num_steps > 0 or self.num_epochs > 0,
            f"num_steps is 0 and num_epochs is {self.num_epochs}; one of them must be positive",
        )


@dataclass(frozen=True)
class CorpusConfig:
    """The embedded offline default: chats from the standard library, and the small target trained on them.

    Attributes:
        task: `rewrites` are short verifiable transformations; `bodies` is signature and docstring -> body.
        num_train_chats: chats the target learns from.
        num_draft_chats: prompts whose responses the target writes again for the drafter; 0: all training prompts.
        num_eval_chats: held-out chats, from modules nothing was trained on.
        max_length: context of the target, in tokens.
        target_steps: optimizer steps of the target's own training.
        bucket_widths: static lengths its chats are padded to.
        tokens_per_batch: padded tokens of one of its steps.
        response_max_new_tokens: token budget of a regenerated response.
    """

    task: Literal["rewrites", "bodies"] = "rewrites"
    num_train_chats: int = 20000
    num_draft_chats: int = 4000
    num_eval_chats: int = 200
    max_length: int = 160
    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10_000.0
    bucket_widths: tuple[int, ...] = (48, 96)
    tokens_per_batch: int = 1536
    target_steps: int = 520
    target_learning_rate: float = 2e-3
    response_batch_size: int = 64
    response_max_new_tokens: int = 64

    def __post_init__(self) -> None:
        _require_positive(
            self,
            "num_train_chats",
            "num_eval_chats",
            "max_length",
            "vocab_size",
            "tokens_per_batch",
            "rope_theta",
            "target_steps",
            "target_learning_rate",
            "response_batch_size",
            "response_max_new_tokens",
        )
        _require(self.num_draft_chats >= 0, f"num_draft_chats is {self.num_draft_chats}; use 0 for all")


@dataclass(frozen=True)
class RunConfig:
    """One training run, whole.

    Attributes:
        name: names the folder of the run below `output_dir`.
        corpus: settings of the embedded default; None when `target.path` and `data.train_path` are given.

    Raises:
        ConfigError: neither a target nor a corpus is given, or only half of a target and its data.
    """

    name: str
    output_dir: str = "runs"
    seed: int = 0
    target: TargetSource = field(default_factory=TargetSource)
    draft: DraftSettings = field(default_factory=DraftSettings)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    corpus: CorpusConfig | None = None

    def __post_init__(self) -> None:
        _require(bool(self.name) and "/" not in self.name, f"name is {self.name!r}; it must be a plain folder name")
        if self.corpus is None:
            _require(bool(self.target.path), "target.path is empty; give a Hugging Face directory or hub id")
            _require(
                bool(self.data.train_path),
                "data.train_path is empty; give a JSONL of chats whose assistant turns the target wrote "
                "(scripts/regenerate_responses.py makes one)",
            )


def to_json_dict(config: Any) -> dict[str, Any]:
    """Return `config` as JSON-ready nested dictionaries (tuples become lists)."""
    return dataclasses.asdict(config)


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
        _require(isinstance(value, dict), f"{where} is {value!r}; it must be a mapping of {hint.__name__} fields")
        return from_json_dict(hint, value, f"{where}.")
    if origin is Literal:
        _require(value in arguments, f"{where} is {value!r}; allowed: {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        _require(isinstance(value, list | tuple), f"{where} is {value!r}; it must be a list")
        return tuple(_convert(arguments[0], v, where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _require(
        isinstance(value, hint) and not (hint is not bool and isinstance(value, bool)),
        f"{where} is {value!r} of type {type(value).__name__}; it must be {hint.__name__}",
    )
    return value
