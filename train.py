"""Train a Domino drafter: `python train.py --config configs/tiny.py`.

Acts in order: read the configuration, open the run's folder, build the embedded target where the configuration has a
corpus, train the drafter, report. Interrupted, the same command goes on where it stopped. `--dry-run` shows sizes,
examples and one executed step instead, and writes nothing. `--plan --topology v6e:4x4` compiles the step for devices
that need not be here and prints what it needs on them. Started once on each of many hosts, with `--distributed` or
`--coordinator`, it is one run on the devices of all of them.
"""

import sys

if any(argument.lstrip("-").startswith("dry-run") for argument in sys.argv[1:]):
    sys.dont_write_bytecode = True  # not even compiled modules

from domino_jax.config_flags import ExtraFlag, format_config, parse_or_exit
from domino_jax.runs.errors import explain_or_raise

USAGE = (
    "python train.py --config FILE[:variant] [--dry-run | --plan --topology NAME] [--config.NAME=VALUE ...]\n"
    "       many processes: each [--distributed | --coordinator HOST:PORT --num-processes N --process-id I]"
)
FLAGS = {
    "dry-run": ExtraFlag(False, "print sizes, examples and one executed step; write nothing"),
    "plan": ExtraFlag(False, "print what a step needs on the devices of --topology, which need not be here"),
    "topology": ExtraFlag("", "with --plan: v5e:4x4, v6e:4x4, v5p:2x2x1, h100:8, ..."),
    "distributed": ExtraFlag(False, "one of many processes of a TPU slice, Slurm, GKE or MPI job, which are found out"),
    "coordinator": ExtraFlag("", "one of many processes: host:port at which process 0 listens"),
    "num-processes": ExtraFlag(0, "with --coordinator: how many processes there are"),
    "process-id": ExtraFlag(-1, "with --coordinator: which of them this is, from 0"),
}

LAUNCH = ("distributed", "coordinator", "num-processes", "process-id")


def main(argv: list[str]) -> int:
    """Run or rehearse the training that `argv` describes; return the exit status."""
    command = parse_or_exit(argv, FLAGS, USAGE)
    config, extras = command.config, command.extras
    if extras["plan"] != bool(extras["topology"]) or (extras["plan"] and extras["dry-run"]):
        print("error: give --plan and --topology NAME (such as v6e:4x4) together, without --dry-run", file=sys.stderr)
        return 2
    is_launched = any(extras[name] != FLAGS[name].default for name in LAUNCH)
    if is_launched and (extras["plan"] or extras["dry-run"]):
        print(f"error: --plan and --dry-run are for one process: leave out --{', --'.join(LAUNCH)}", file=sys.stderr)
        return 2
    if not is_launched:
        print(format_config(config), flush=True)
    # Imported after the command line is read: jax takes seconds.
    if extras["plan"]:
        from domino_jax.runs.plan_page import print_plan

        return explain_or_raise(lambda: print_plan(config, str(extras["topology"])))
    if extras["dry-run"]:
        from domino_jax.runs.dry_run import rehearse

        return explain_or_raise(lambda: rehearse(config))
    from domino_jax.runs.training_run import run_training

    if is_launched:
        from domino_jax.runs.launch import run_processes

        return run_processes(extras, config, lambda: run_training(config))
    return explain_or_raise(lambda: run_training(config))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
