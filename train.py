"""Train a Domino drafter: `python train.py --config configs/tiny.py`.

Acts in order: read the configuration, open the run's folder, build the embedded target where the configuration has a
corpus, train the drafter, report. Interrupted, the same command goes on where it stopped. `--dry-run` shows sizes,
examples and one executed step instead, and writes nothing.
"""

import sys

if any(argument.lstrip("-").startswith("dry-run") for argument in sys.argv[1:]):
    sys.dont_write_bytecode = True  # not even compiled modules

from domino_jax.config_flags import ExtraFlag, format_config, parse_or_exit
from domino_jax.runs.errors import explain_or_raise

USAGE = "python train.py --config FILE[:variant] [--dry-run] [--config.NAME=VALUE ...]"
FLAGS = {"dry-run": ExtraFlag(False, "print sizes, examples and one executed step; write nothing")}


def main(argv: list[str]) -> int:
    """Run or rehearse the training that `argv` describes; return the exit status."""
    command = parse_or_exit(argv, FLAGS, USAGE)
    config = command.config
    print(format_config(config), flush=True)
    # Imported after the command line is read: jax takes seconds.
    if command.extras["dry-run"]:
        from domino_jax.runs.dry_run import rehearse

        return explain_or_raise(lambda: rehearse(config))
    from domino_jax.runs.training_run import run_training

    return explain_or_raise(lambda: run_training(config))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
