"""Train a Domino drafter: `python train.py --config configs/tiny.py`.

Acts in order: read the configuration, open the run's folder, build the embedded target where the configuration has a
corpus, train the drafter, report. Interrupted, the same command goes on where it stopped.
"""

import sys

from domino_jax.config_flags import format_config, parse_or_exit
from domino_jax.runs.errors import explain_or_raise

USAGE = "python train.py --config FILE[:variant] [--config.NAME=VALUE ...]"


def main(argv: list[str]) -> int:
    """Run the training that `argv` describes; return the exit status."""
    config = parse_or_exit(argv, usage=USAGE).config
    print(format_config(config), flush=True)
    from domino_jax.runs.training_run import run_training  # after the command line: importing jax takes seconds

    return explain_or_raise(lambda: run_training(config))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
