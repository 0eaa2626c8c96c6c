"""How likely a drafted token is kept, from the drafter's own probability of it: fitted on held-out decodes, as JSON.

For every block size and slot two numbers make a monotone map: logit of the chance = slope * logit(p) + intercept, with
slope >= 0. Knows no devices.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domino_jax.config import ConfigError, DraftConfig
from domino_jax.durable import write_atomically

FILE_NAME = "survival.json"
"""What a calibration is called beside the drafter's weights."""


class CalibrationError(ConfigError):
    """A calibration that cannot be used; the message names the file, what is wrong and how to make one."""


@dataclass(frozen=True)
class SlotSurvival:
    """The slots of one block size.

    Attributes:
        slope: of the map, a slot each.
        intercept: of the map, a slot each.
        rate: share of the drafts that were kept, of those whose predecessors were; drafts past a stop token are not.
    """

    slope: tuple[float, ...]
    intercept: tuple[float, ...]
    rate: tuple[float, ...]


@dataclass(frozen=True)
class SurvivalCalibration:
    """Calibrated slots by block size.

    Attributes:
        draft_vocab_size: `DecodeSettings.draft_vocab_size` of the decodes; 0: everything could be drafted.
    """

    sizes: Mapping[int, SlotSurvival]
    draft_vocab_size: int = 0


def save_calibration(path: Path, calibration: SurvivalCalibration) -> None:
    """Write a calibration as JSON."""
    content = {
        "draft_vocab_size": calibration.draft_vocab_size,
        "block_sizes": {str(size): asdict(slots) for size, slots in calibration.sizes.items()},
    }
    with write_atomically(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def load_calibration(path: Path) -> SurvivalCalibration:
    """Read a calibration.

    Raises:
        CalibrationError: there is no such file, or it is not one.
    """
    how = "make one with scripts/calibrate_survival.py"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        sizes = {int(size): _read_slots(slots) for size, slots in content["block_sizes"].items()}
        return SurvivalCalibration(sizes, int(content.get("draft_vocab_size", 0)))
    except OSError as error:
        raise CalibrationError(f"no survival calibration at {path} ({error.strerror}); {how}") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise CalibrationError(f"{path} is not a survival calibration ({error!r}); {how}") from error


def _read_slots(content: dict[str, Any]) -> SlotSurvival:
    columns = [np.asarray(content[name], np.float64) for name in ("slope", "intercept", "rate")]
    slope, intercept, rate = columns
    if not (slope.ndim == 1 and slope.shape == intercept.shape == rate.shape):
        raise ValueError("slope, intercept and rate must be lists of one length")
    if not (np.isfinite(columns).all() and (slope >= 0).all() and (rate > 0).all() and (rate < 1).all()):
        raise ValueError("slopes must be finite and not negative, intercepts finite, rates between 0 and 1")
    return SlotSurvival(*(tuple(column.tolist()) for column in columns))


def check_calibration(
    calibration: SurvivalCalibration, draft: DraftConfig, widths: Sequence[int], draft_vocab_size: int = 0
) -> None:
    """Refuse a calibration that was not made for these block sizes, or cannot be of this drafter.

    A calibration of an earlier state of a drafter is not noticed; texts stay right under it, choices get worse.

    Raises:
        CalibrationError: a block size is missing or has another number of slots, or another number of tokens could be
            drafted.
    """
    if calibration.draft_vocab_size != draft_vocab_size:
        made, used = (f"a draft vocabulary of {n}" if n else "all tokens" for n in
                      (calibration.draft_vocab_size, draft_vocab_size))  # fmt: skip
        raise CalibrationError(
            f"the survival calibration was made with {made}, rounds draft from {used}; calibrate with the same "
            "--draft-vocabulary (scripts/calibrate_survival.py)"
        )
    for size in widths:
        wanted, slots = draft.num_draft_tokens(size), calibration.sizes.get(size)
        if slots is None:
            known = ", ".join(map(str, sorted(calibration.sizes)))
            raise CalibrationError(
                f"the survival calibration has block sizes {known}, not {size}; choose among them, or calibrate anew "
                "with scripts/calibrate_survival.py"
            )
        if len(slots.rate) != wanted:
            raise CalibrationError(
                f"the survival calibration has {len(slots.rate)} slots for blocks of {size}, the drafter drafts "
                f"{wanted}; it belongs to another drafter: calibrate with scripts/calibrate_survival.py"
            )
