"""A loaded target, as the stages of a run hand it to each other."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from domino_jax.config import TargetConfig
from domino_jax.shapes import Params


@dataclass(frozen=True)
class TargetModel:
    """A loaded target and what belongs to it.

    Attributes:
        path: directory or hub id it was loaded from.
    """

    path: str
    config: TargetConfig
    params: Params
    tokenizer: PreTrainedTokenizerBase
