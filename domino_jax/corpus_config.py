"""Frozen, validated configuration of the embedded offline default: its chats, its target, its responses.

A part of `run_config.RunConfig`. Knows nothing about arrays, files or devices, and never imports jax.
"""

from dataclasses import dataclass
from typing import Literal

from domino_jax.config import require, require_positive


@dataclass(frozen=True)
class CorpusConfig:
    """The embedded offline default: chats from the standard library, and the small target trained on them.

    Attributes:
        task: `rewrites` are short verifiable transformations; `bodies` is signature and docstring -> body.
        num_train_chats: chats the target learns from; 0: as many as the library gives (`bodies` only).
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
    max_length: int = 256
    vocab_size: int = 2048
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10_000.0
    bucket_widths: tuple[int, ...] = (48, 64, 80, 100, 144)
    tokens_per_batch: int = 1024
    target_steps: int = 850
    target_learning_rate: float = 8e-4
    response_batch_size: int = 64
    response_max_new_tokens: int = 112

    def __post_init__(self) -> None:
        require_positive(
            self,
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
        for name in ("num_train_chats", "num_draft_chats"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value}; use 0 for all")
        require(
            self.num_train_chats > 0 or self.task == "bodies",
            "num_train_chats is 0, which takes every function body; rewrites have no end: give a number",
        )
        require(len(self.bucket_widths) > 0 and min(self.bucket_widths) > 0, "bucket_widths must hold positive widths")
        require(
            max(self.bucket_widths) <= self.max_length,
            f"bucket_widths reach {max(self.bucket_widths)}; the target's context, max_length, is {self.max_length}",
        )
        require(
            self.tokens_per_batch >= max(self.bucket_widths),
            f"tokens_per_batch is {self.tokens_per_batch}; it must hold a row of the widest bucket, "
            f"{max(self.bucket_widths)}",
        )
        require(
            self.response_max_new_tokens < self.max_length,
            f"response_max_new_tokens is {self.response_max_new_tokens}; prompt and response share max_length "
            f"{self.max_length}",
        )
