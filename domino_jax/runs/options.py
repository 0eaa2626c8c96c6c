"""Values of command-line options that entry points share: what argparse calls with an option's text."""

import argparse
import re

from domino_jax.config import ConfigError
from domino_jax.run_config import MeshConfig


def positive(text: str) -> int:
    """Return a number of 1 or more.

    Raises:
        ValueError, ArgumentTypeError: it is none.
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number of 1 or more")
    return value


def numbers(text: str) -> tuple[int, ...]:
    """Return numbers that have commas between.

    Raises:
        ArgumentTypeError: they are none.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers with commas between") from None


def mesh(text: str) -> MeshConfig:
    """Return the mesh of `data=2,model=4`: fields of `--config.mesh` of training, what is not named as there.

    Raises:
        ArgumentTypeError: another form or name, a name twice, or a size that cannot be.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"(data|model)=(\d+)", part.strip())
        if not found or found[1] in sizes:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no mesh; give model=8, or data=2,model=4: devices that share every layer, and groups of "
                "them that share the rows (0 or not named: all that model leaves)"
            )
        sizes[found[1]] = int(found[2])
    try:
        return MeshConfig(**sizes)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
