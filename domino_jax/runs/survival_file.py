"""Where a drafter's survival calibration lies: in a file that was named, or beside the weights."""

from collections.abc import Sequence
from pathlib import Path

from domino_jax.checkpoints.huggingface import resolve_directory
from domino_jax.config import ConfigError
from domino_jax.decoding.survival import FILE_NAME, SurvivalCalibration, load_calibration


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
