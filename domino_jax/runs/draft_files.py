"""What was measured for a drafter and lies in files: its survival calibration, the tokens it should draft from."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from domino_jax.checkpoints.huggingface import read_target_config, resolve_directory
from domino_jax.config import ConfigError
from domino_jax.decoding.draft_vocabulary import load_draft_vocabulary
from domino_jax.decoding.survival import FILE_NAME, SurvivalCalibration, load_calibration
from domino_jax.shapes import Int


def find_calibration(path: Path | None, widths: Sequence[int], draft: str | None) -> SurvivalCalibration | None:
    """Return the calibration that `widths` are chosen by; None where there are none to choose among.

    Raises:
        ConfigError: there are widths and no drafter, or a file and no widths.
        CalibrationError: the file is missing or is no calibration.
    """
    if not widths:
        if path:
            raise ConfigError(f"--calibration {path} is for --verify-widths; name block sizes too, or leave it out")
        return None
    if draft is None:
        raise ConfigError(f"--verify-widths are {list(widths)} but there is no --draft; name one or leave them out")
    return load_calibration(path or Path(resolve_directory(draft)) / FILE_NAME)


def require_draft(draft_weights: str | None, draft: str | None) -> None:
    """Refuse a type for the weights of a drafter that is not there.

    Raises:
        ConfigError: there is a type and no drafter.
    """
    if draft_weights and draft is None:
        raise ConfigError(
            f"--draft-weights {draft_weights} is given but no drafter; name one with --draft or leave it out"
        )


def find_draft_vocabulary(path: Path | None, target: str, draft: str | None) -> Int[np.ndarray, " U"] | None:
    """Return the tokens to draft from; None, all of the target's, where no file is named. Reads no weights.

    Raises:
        ConfigError: there is a file and no drafter.
        CheckpointError: the target's configuration cannot be read.
        DraftVocabularyError: the file is missing, or no draft vocabulary of the target.
    """
    if path is None:
        return None
    if draft is None:
        raise ConfigError(f"--draft-vocabulary {path} is given but no drafter; name one with --draft or leave it out")
    return load_draft_vocabulary(path, read_target_config(str(resolve_directory(target)))[0].vocab_size)
