"""Fill the feature cache of a run and stop there, so that a large machine can do it before the training.

    python scripts/cache_features.py --config configs/qwen3.py:8b --config.data.feature_cache=DIR [--verify]

The command line is that of train.py. What is in the directory is kept; stopped, the same command goes on. With --verify
every record that is there is read and checked against its checksum, which training does for each record as it comes.
"""

import sys

from domino_jax.config_flags import ExtraFlag, parse_or_exit

USAGE = "python scripts/cache_features.py --config FILE[:variant] --config.data.feature_cache=DIR [--verify]"
FLAGS = {"verify": ExtraFlag(False, "read and check every record that is there")}


def main(argv: list[str]) -> int:
    command = parse_or_exit(argv, FLAGS, USAGE)
    from domino_jax.runs.errors import explain_or_raise  # after the command line: importing jax takes seconds
    from domino_jax.runs.training_run import cache_features

    return explain_or_raise(lambda: cache_features(command.config, bool(command.extras["verify"])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
