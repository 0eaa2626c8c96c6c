"""The published Domino recipe for Qwen3-4B and Qwen3-8B.

Paper: Domino, arXiv 2605.29707 (settings of the released drafters).
Command: python train.py --config configs/qwen3.py:8b
Before it: scripts/regenerate_responses.py writes data/qwen3_8b_train.jsonl, the assistant turns in the target's
own words (thinking mode off); without them the drafter learns somebody else's text and tau falls.
Why these values:
  - five draft layers read the target layers that the default rule spreads over 1 .. L - 3
    (8B and 4B, 36 layers: 1, 9, 17, 25, 33); draft sizes are the target's own;
  - a block of 16 with shift_label drafts 16 tokens a round; the first takes the base logits as they are;
  - gamma 7 belongs to block 16 (5 for 10, 4 for 8);
  - the mask token 151669 is an id that the tokenizer leaves unused;
  - batches come in four widths, so that only rows of more than 2048 tokens are padded to 3072 (the published recipe
    mixes lengths in a batch; what that does to tau has not been measured here);
  - the objective is the published one; on the embedded pair objective.base_support=accepted raised tau by 0.17 of 5.4
    and is tiny.py's default (benchmarks/2026-11-25-ablations), at these sizes it has not been measured;
  - lambda falls from 1 to 0 over the whole run: first a good backbone, then the head on top of it.
"""

from domino_jax.config_flags import choose_variant
from domino_jax.run_config import (
    DataConfig,
    DraftSettings,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    TargetSource,
    TrainConfig,
)

TARGETS = {"8b": "Qwen/Qwen3-8B", "4b": "Qwen/Qwen3-4B"}


def get_config(variant: str = "") -> RunConfig:
    """Return the run for `8b` (default) or `4b`."""
    variant = choose_variant(variant, tuple(TARGETS))
    return RunConfig(
        name=f"qwen3_{variant}",
        target=TargetSource(path=TARGETS[variant], dtype="bfloat16"),
        draft=DraftSettings(
            num_hidden_layers=5,
            block_size=16,
            mask_token_id=151669,
            shift_label=True,
            pure_draft_prefix_len=1,
            gru_hidden_dim=1024,
            emb_dim=256,
        ),
        data=DataConfig(
            train_path=f"data/qwen3_{variant}_train.jsonl",
            eval_path=f"data/qwen3_{variant}_eval.jsonl",
            max_length=3072,
            bucket_widths=(512, 1024, 2048),
            batch_size=32,
            micro_steps=32,
            enable_thinking=False,
        ),
        objective=ObjectiveConfig(
            num_anchors=512, loss_decay_gamma=7.0, base_weight_start=1.0, base_weight_decay_ratio=1.0, head_chunk=32
        ),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_ratio=0.04, clip_norm=1.0),
        train=TrainConfig(
            num_epochs=6.0,
            log_every=10,
            checkpoint_every=500,
            eval_every=1000,
            eval_prompts=32,
            eval_max_new_tokens=512,
            compute_dtype="bfloat16",
        ),
    )
