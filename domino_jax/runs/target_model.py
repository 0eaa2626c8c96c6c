"""A loaded target, as the stages of a run hand it to each other."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from domino_jax.config import TargetConfig
from domino_jax.shapes import Params
from domino_jax.sharding import Layout


@dataclass(frozen=True)
class TargetModel:
    """A loaded target and what belongs to it.

    Attributes:
        path: directory or hub id it was loaded from.
        layout: how `params` and whatever is computed with them lie on several devices; None: on one.
    """

    path: str
    config: TargetConfig
    params: Params
    tokenizer: PreTrainedTokenizerBase
    layout: Layout | None = None
