"""The long variant: signature and docstring -> body on the whole standard library, offline.

Method: Domino, arXiv 2605.29707, the published recipe scaled down.
Command: python train.py --config configs/stdlib.py
Meant for about an hour on a CPU (estimated from measured rates, see docs/log.md) or minutes on a GPU.
Why these values:
  - every function of the library that has a docstring and a body of its own is a chat;
  - free code needs a deeper target, a larger vocabulary and longer sequences than the rewrites of tiny.py;
  - two draft layers start as copies of the target's layers 1 and 2, which hold what it has learned about copying;
  - 63 % of the chats fit 128 tokens, 11 % need more than 256: batches come in the widths of the target's training;
  - the base branch learns up to its first mistake only, which raised tau on the pair of tiny.py (docs/log.md);
  - the drafter learns from answers that the target wrote itself to every training prompt.
"""

from domino_jax.config_flags import choose_variant
from domino_jax.run_config import (
    CorpusConfig,
    DataConfig,
    DraftSettings,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)


def get_config(variant: str = "") -> RunConfig:
    """Return the run; there are no variants."""
    choose_variant(variant, ())
    corpus = CorpusConfig(
        task="bodies",
        num_train_chats=0,
        num_draft_chats=0,
        num_eval_chats=200,
        max_length=384,
        vocab_size=4096,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        bucket_widths=(128, 256, 384),
        tokens_per_batch=4096,
        target_steps=700,
        target_learning_rate=1.5e-3,
        response_batch_size=64,
        response_max_new_tokens=192,
    )
    return RunConfig(
        name="stdlib",
        corpus=corpus,
        draft=DraftSettings(
            num_hidden_layers=2,
            target_layer_ids=(0, 3, 6),
            block_size=16,
            shift_label=True,
            pure_draft_prefix_len=1,
            gru_hidden_dim=256,
            emb_dim=128,
            initial_weights="target",
        ),
        data=DataConfig(max_length=corpus.max_length, bucket_widths=corpus.bucket_widths[:-1], batch_size=16),
        objective=ObjectiveConfig(num_anchors=16, loss_decay_gamma=7.0, head_chunk=32, base_support="accepted"),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_ratio=0.04, clip_norm=1.0),
        train=TrainConfig(
            num_epochs=3.0,
            log_every=20,
            checkpoint_every=200,
            eval_every=200,
            eval_prompts=32,
            eval_max_new_tokens=corpus.response_max_new_tokens,
        ),
    )
