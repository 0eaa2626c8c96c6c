"""Frozen, validated configuration of a training run: target, drafter, data, objective, optimizer, length, corpus.

The files below `configs/` build these; `domino_jax.config_flags` overrides their leaves from the command line.
Knows nothing about arrays, files or devices, and never imports jax.

Source: the published Domino recipe, arXiv 2605.29707, for names and defaults.
"""

from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal

from domino_jax.config import (
    ConfigError,
    DraftConfig,
    TargetConfig,
    default_target_layer_ids,
    require,
    require_positive,
)
from domino_jax.corpus_config import CorpusConfig


def require_used(config: Any, is_used: bool, why_not: str, *names: str) -> None:
    """Refuse a configuration that sets one of the named values where it has no effect.

    Raises:
        ConfigError: `is_used` is False and a value is not the default one.
    """
    defaults = {field.name: field.default for field in fields(config)}
    changed = [] if is_used else [name for name in names if getattr(config, name) != defaults[name]]
    if changed:
        values = " and ".join(f"{name} is {getattr(config, name)!r}" for name in changed)
        raise ConfigError(f"{values}, but {why_not}: nothing would come of it")


def require_ratio(config: Any, *names: str) -> None:
    """Refuse a configuration in which one of the named values lies outside [0, 1].

    Raises:
        ConfigError: one does.
    """
    for name in names:
        value = getattr(config, name)
        require(0.0 <= value <= 1.0, f"{type(config).__name__}.{name} is {value!r}; it must lie in [0, 1]")


Match = Literal["none", "kl", "tv", "lk-alpha", "lk-hybrid"]
"""Distances of the corrected distribution from the target's; formulas in `training/objectives.py`."""


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
        mask_token_id: -1: the tokenizer's mask token, else the lowest id that no token uses.
        initial_weights: `target` copies draft layers from the target (`training/draft_init.py`), `fresh` draws them.
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
    initial_weights: Literal["fresh", "target"] = "fresh"

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
        bucket_widths: lengths that batches of similarly long rows are padded to, ascending; rows longer than the last
            one are padded to `max_length`. Empty: all batches are.
        batch_size: sequences of an optimizer step, over all devices and micro-steps.
        micro_steps: gradient-accumulation steps one optimizer step is split into.
        bad_rows: what to do with a row that cannot be used.
        max_bad_rows: more than this many skipped rows stop the run; -1: no cap.
        enable_thinking: passed to the tokenizer's chat template.
        feature_cache: directory that the target's features are kept in; empty: every step runs the target.
        feature_dtype: type they are kept in; float32 trains as without a cache, bfloat16 takes half the disk (and loses
            nothing where `target.dtype` is bfloat16).
        damaged_shards: what to do with a file of the cache that is damaged or gone: compute it again, or train
            nothing on its rows.
    """

    train_path: str = ""
    eval_path: str = ""
    max_length: int = 3072
    bucket_widths: tuple[int, ...] = ()
    batch_size: int = 8
    micro_steps: int = 1
    bad_rows: Literal["skip", "fail"] = "skip"
    max_bad_rows: int = -1
    enable_thinking: bool = False
    feature_cache: str = ""
    feature_dtype: Literal["float32", "bfloat16"] = "float32"
    damaged_shards: Literal["rebuild", "skip"] = "rebuild"

    def __post_init__(self) -> None:
        require_positive(self, "max_length", "batch_size", "micro_steps")
        require(self.max_length >= 3, f"max_length is {self.max_length}; a sequence needs at least 3 tokens")
        widths = self.bucket_widths
        require(
            all(a < b for a, b in pairwise((0, *widths))) and all(w <= self.max_length for w in widths),
            f"bucket_widths are {widths}; they must be positive, ascending and at most max_length {self.max_length}",
        )
        require(
            self.batch_size % self.micro_steps == 0,
            f"batch_size {self.batch_size} must be a multiple of micro_steps {self.micro_steps}",
        )
        for name, default in (("feature_dtype", "float32"), ("damaged_shards", "rebuild")):
            value = getattr(self, name)
            require(
                bool(self.feature_cache) or value == default,
                f"{name} is {value!r} while feature_cache is empty, so nothing would use it; give feature_cache a "
                f"directory, or leave {name} at {default!r}",
            )


@dataclass(frozen=True)
class ObjectiveConfig:
    """Block sampling, slot weights, the base-anchored curriculum, and what is learned beside the labels.

    Attributes:
        num_anchors: anchors drawn a sequence.
        slot_weights: `decay` weighs slot k by exp(-k / gamma); `dpace` by its share in the expected accepted length.
        loss_decay_gamma: gamma of `decay`, 0 switches the decay off; `dpace` has none.
        dpace_alpha: smoothing of the confidences that `dpace` multiplies; 1 makes them all certain.
        base_support: slots the base logits learn from: the whole `block`, or those `accepted` and the first wrong one.
        match: distance to the target's own distribution that the corrected logits learn beside the labels.
        match_weight: share of `match` in the corrected logits' loss; the labels have the rest.
        lk_eta: how soon `lk-hybrid` goes over from KL to total variation as the distributions come to overlap.
        base_weight_start: lambda at step 0.
        base_weight_shape: how lambda falls from there to 0: `linear`, `cosine`, or not at all (`constant`).
        base_weight_decay_ratio: share of the optimizer steps over which lambda falls to 0; unused by `constant`.
        head_chunk: blocks whose logits exist at the same time in the loss.
        attention_chunk: anchors of a sequence whose attention scores exist at the same time.
    """

    num_anchors: int = 512
    slot_weights: Literal["decay", "dpace"] = "decay"
    loss_decay_gamma: float = 7.0
    dpace_alpha: float = 0.5
    base_support: Literal["block", "accepted"] = "block"
    match: Match = "none"
    match_weight: float = 0.5
    lk_eta: float = 3.0
    base_weight_start: float = 1.0
    base_weight_shape: Literal["linear", "cosine", "constant"] = "linear"
    base_weight_decay_ratio: float = 1.0
    head_chunk: int = 32
    attention_chunk: int = 16

    def __post_init__(self) -> None:
        require_positive(self, "num_anchors", "head_chunk", "attention_chunk", "lk_eta", "dpace_alpha")
        require(self.loss_decay_gamma >= 0, f"loss_decay_gamma is {self.loss_decay_gamma}; use 0 for no decay")
        require_ratio(self, "base_weight_start", "base_weight_decay_ratio", "match_weight", "dpace_alpha")
        require_used(self, self.match != "none", "match is 'none'", "match_weight")
        require_used(self, self.match == "lk-hybrid", f"match is {self.match!r}, not 'lk-hybrid'", "lk_eta")
        require_used(self, self.slot_weights == "dpace", "slot_weights is 'decay'", "dpace_alpha")
        require(
            self.base_weight_shape != "constant" or self.base_weight_start < 1,
            "base_weight_shape is 'constant' and base_weight_start 1: lambda would stay 1 and the corrected logits "
            "would never learn; lower base_weight_start, or choose 'linear' or 'cosine'",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon with linear warm-up and cosine decay, gradients clipped by their global norm.

    Attributes:
        kind: `muon` orthogonalises the momentum of weight matrices, scaled to AdamW's step size so that one learning
            rate serves both; norms and the output matrix of the head get AdamW with Nesterov momentum
            and no decay.
        warmup_ratio: share of the steps in which the learning rate rises from 0.
        end_ratio: final learning rate over the highest one.
        b1, b2: decay of AdamW's moments.
        momentum: decay of Muon's momentum.
        clip_norm: 0 switches clipping off.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 6e-4
    warmup_ratio: float = 0.04
    end_ratio: float = 0.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    momentum: float = 0.95
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "learning_rate")
        require_ratio(self, "warmup_ratio", "end_ratio")
        for name in ("b1", "b2", "momentum"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"{name} is {value!r}; it must lie in [0, 1): 1 would never forget")
        require_used(self, self.kind == "muon", f"kind is {self.kind!r}, not 'muon'", "momentum")
        require(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; it must be 0 or more")
        require(self.clip_norm >= 0, f"clip_norm is {self.clip_norm}; it must be 0 (off) or positive")


@dataclass(frozen=True)
class TrainConfig:
    """Length of a run and what happens along it.

    Attributes:
        num_steps: optimizer steps; 0: `num_epochs` over the data.
        num_epochs: passes over the data; used when `num_steps` is 0.
        log_every: steps between two metric rows.
        checkpoint_every: steps between two checkpoints.
        keep_checkpoints: latest checkpoints kept beside the best one; with 1 a damaged one has no other before it.
        eval_every: steps between two decodes of held-out prompts.
        eval_prompts: held-out prompts decoded each time.
        eval_max_new_tokens: token budget of each of them.
        max_skipped: updates skipped in a row, because they were not finite, that stop the run.
        compute_dtype: type of the drafter's activations; its weights are always float32.
        wandb_project: Weights & Biases project that shows the metrics too; empty: none. May change along a run.
    """

    num_steps: int = 0
    num_epochs: float = 6.0
    log_every: int = 10
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    eval_every: int = 500
    eval_prompts: int = 32
    eval_max_new_tokens: int = 256
    max_skipped: int = 10
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    wandb_project: str = ""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "eval_every",
            "eval_prompts",
            "eval_max_new_tokens",
            "max_skipped",
        )
        require(self.num_steps >= 0, f"num_steps is {self.num_steps}; use 0 to train by epochs")
        require(
            self.num_steps > 0 or self.num_epochs > 0,
            f"num_steps is 0 and num_epochs is {self.num_epochs}; one of them must be positive",
        )


@dataclass(frozen=True)
class MeshConfig:
    """How the devices of a run share its work; no result depends on it beyond rounding.

    Attributes:
        data: groups of devices that share the sequences of a batch; 0: as many as `model` leaves.
        model: devices that share every layer: heads, MLP and vocabulary.
        fsdp: split parameters and optimizer moments over `data` too; they are gathered where they are used.
    """

    data: int = 0
    model: int = 1
    fsdp: bool = False

    def __post_init__(self) -> None:
        require(self.data >= 0, f"mesh.data is {self.data}; use 0 for all devices that mesh.model leaves")
        require(self.model >= 1, f"mesh.model is {self.model}; it must be 1 or more")


@dataclass(frozen=True)
class RunConfig:
    """One training run, whole.

    Attributes:
        name: names the folder of the run below `output_dir`.
        corpus: settings of the embedded default; None when `target.path` and `data.train_path` are given.

    Raises:
        ConfigError: neither a target nor a corpus is given, only half of a target and its data, or both; a name or seed
            that cannot be used.
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
    mesh: MeshConfig = field(default_factory=MeshConfig)
    corpus: CorpusConfig | None = None

    def __post_init__(self) -> None:
        require(
            bool(self.name) and "/" not in self.name and self.name not in (".", ".."),
            f"name is {self.name!r}; it must be a plain folder name",
        )
        require(0 <= self.seed < 2**32, f"seed is {self.seed}; it must lie in 0 .. 2**32 - 1")
        given = {
            "target.path": self.target.path,
            "data.train_path": self.data.train_path,
            "data.eval_path": self.data.eval_path,
        }
        if self.corpus is not None:
            named = [f"{name} ({value!r})" for name, value in given.items() if value]
            require(
                not named,
                f"{' and '.join(named)} would be ignored: this configuration builds its own target and data (corpus); "
                "add --config.corpus=None to use yours",
            )
        else:
            require(bool(self.target.path), "target.path is empty; give a Hugging Face directory or hub id")
            require(
                bool(self.data.train_path),
                "data.train_path is empty; give a JSONL of chats whose assistant turns the target wrote "
                "(scripts/regenerate_responses.py makes one)",
            )
