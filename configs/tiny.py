"""The embedded default: corpus, target and drafter from nothing, offline, on two CPU cores.

Method: Domino, arXiv 2605.29707, the published recipe scaled down.
Command: python train.py --config configs/tiny.py
Why these values (measurements in docs/log.md):
  - the corpus and the target are the defaults of `CorpusConfig`: verifiable rewrites that a few million parameters
    learn, and a target just large enough that verifying a block costs little more than a step;
  - one draft layer, because on a CPU a round must cost little more than a plain step; it starts as a copy of the
    target's layer 1, which has learned to look up where the text is being copied from;
  - a block of 12: answers are runs of up to a dozen predictable tokens between names that have to be looked up; gamma
    lies between the published ones for 10 and 16;
  - the base branch learns up to its first mistake only: of all objectives tried the one that raised tau for sure (by
    0.17, benchmarks/2026-11-25-ablations); a block of 16 may bring more tau, but a round then costs more;
  - warm-up, clipping and curriculum are the published ones (the curriculum left tau as it was here, and the drafter
    without its head useful), the learning rate is higher as the drafter is narrow.
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
    corpus = CorpusConfig()
    return RunConfig(
        name="tiny",
        corpus=corpus,
        draft=DraftSettings(
            num_hidden_layers=1,
            target_layer_ids=(0, 2, 3),
            block_size=12,
            shift_label=True,
            pure_draft_prefix_len=1,
            gru_hidden_dim=128,
            emb_dim=64,
            initial_weights="target",
        ),
        data=DataConfig(max_length=max(corpus.bucket_widths), batch_size=16),
        objective=ObjectiveConfig(num_anchors=12, loss_decay_gamma=5.7, head_chunk=16, base_support="accepted"),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_ratio=0.04, clip_norm=1.0),
        train=TrainConfig(
            num_steps=320,
            log_every=10,
            checkpoint_every=80,
            eval_every=80,
            eval_prompts=32,
            eval_max_new_tokens=corpus.response_max_new_tokens,
        ),
    )
