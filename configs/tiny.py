"""The embedded default: corpus, target and drafter from nothing, offline, on two CPU cores, under 15 minutes.

Method: Domino, arXiv 2605.29707, the published recipe scaled down.
Command: python train.py --config configs/tiny.py
Why these values:
  - the corpus and the target are the defaults of `CorpusConfig` (short verifiable rewrites that a few
    million parameters learn), so nothing is downloaded;
  - one draft layer and a small head, because on a CPU a round must cost little more than a plain step;
  - learning rate, warm-up, clipping, gamma and curriculum are the published ones.
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
            block_size=16,
            shift_label=True,
            pure_draft_prefix_len=1,
            gru_hidden_dim=128,
            emb_dim=64,
        ),
        data=DataConfig(max_length=max(corpus.bucket_widths), batch_size=16),
        objective=ObjectiveConfig(num_anchors=16, loss_decay_gamma=7.0, head_chunk=16),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_ratio=0.04, clip_norm=1.0),
        train=TrainConfig(
            num_steps=600,
            log_every=10,
            checkpoint_every=150,
            eval_every=150,
            eval_prompts=32,
            eval_max_new_tokens=corpus.response_max_new_tokens,
        ),
    )
