"""The embedded default: corpus, target and drafter from nothing, offline, on two CPU cores.

Aim: under 15 minutes in all; not yet timed in one undisturbed run (see docs/log.md).

Method: Domino, arXiv 2605.29707, the published recipe scaled down.
Command: python train.py --config configs/tiny.py
Why these values:
  - the corpus and the target are the defaults of `CorpusConfig` (short verifiable rewrites that a few
    million parameters learn), so nothing is downloaded;
  - two draft layers, the fewest with which a slot can find out where the text is being copied from and then read there,
    and a small head, because on a CPU a round must cost little more than a plain step;
  - answers have about 17 tokens, so a block of 10 and 8 anchors a chat cover them; gamma 5 is the published one for 10;
  - warm-up, clipping and curriculum are the published ones, the learning rate is higher as the drafter is narrow.
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
            num_hidden_layers=2,
            target_layer_ids=(1, 3, 5),
            block_size=10,
            shift_label=True,
            pure_draft_prefix_len=1,
            gru_hidden_dim=128,
            emb_dim=64,
        ),
        data=DataConfig(max_length=max(corpus.bucket_widths), batch_size=16),
        objective=ObjectiveConfig(num_anchors=8, loss_decay_gamma=5.0, head_chunk=8),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_ratio=0.04, clip_norm=1.0),
        train=TrainConfig(
            num_steps=600,
            log_every=10,
            checkpoint_every=150,
            eval_every=150,
            eval_prompts=32,
            eval_max_new_tokens=corpus.response_max_new_tokens,
        ),
    )
