"""One training run in several processes, each with devices of its own: how they find each other, agree, and end.

In: what the command line says of the processes, and what to run in each. Out: an exit status. `jax.distributed` joins
the processes; before anything is loaded they compare their settings and see that they share the run's folder. A request
to stop (SIGTERM, SIGINT) that reaches one process stops all of them at the same step, saved. A process that dies takes
the others with it, within `HEARTBEAT_TIMEOUT_S`, and the same commands go on from the last checkpoint.

Source: `jax.distributed.initialize`; `jax.experimental.multihost_utils.reached_preemption_sync_point`.
"""

import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

import domino_jax
from domino_jax.config import ConfigError, diff_configs, require, to_json_dict
from domino_jax.config_flags import format_config
from domino_jax.processes import ProcessError, check_same, is_first, on_all
from domino_jax.run_config import RunConfig
from domino_jax.runs.cluster import find_gaps
from domino_jax.runs.errors import EXIT_MISTAKE, explain_or_raise, stop_requests

EXIT_LOST, EXIT_BUG = 3, 1
HEARTBEAT_TIMEOUT_S = 100
"""Seconds without a sign of life after which a process counts as dead."""
_JOIN_TIMEOUT_S = 300
_JAX_LATER_S = 30
"""Seconds that jax waits longer for the others than we do."""
_LEAVE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Launch:
    """Where the processes of a run meet; without an address the cluster (TPU, Slurm, GKE, MPI) is asked.

    Attributes:
        coordinator: host:port that process 0 listens at; empty: found out, with the two numbers.
    """

    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1


def read_launch(extras: Mapping[str, Any]) -> Launch:
    """Return what the flags `coordinator`, `num-processes`, `process-id` and `distributed` say; one is given.

    Raises:
        ConfigError: they contradict each other, or one is missing or out of range.
    """
    coordinator, count, number = extras["coordinator"], extras["num-processes"], extras["process-id"]
    given = [name for name, is_given in (("num-processes", count != 0), ("process-id", number != -1)) if is_given]
    if not coordinator:
        require(not given, f"--{' and --'.join(given)} need --coordinator=HOST:PORT, the address of process 0")
        return Launch()
    if extras["distributed"]:
        raise ConfigError(
            "--distributed asks the cluster for what --coordinator, --num-processes and --process-id say; leave it out"
        )
    require(
        re.fullmatch(r".+:\d+", coordinator) is not None,
        f"--coordinator is {coordinator!r}; give host and port of process 0, such as 10.0.0.2:8476",
    )
    require(count >= 1, f"--num-processes is {count}; with --coordinator give the number of processes, 1 or more")
    require(0 <= number < count, f"--process-id is {number}; give each process its own of 0 .. {count - 1}")
    return Launch(coordinator, count, number)


def run_processes(extras: Mapping[str, Any], config: RunConfig, run: Callable[[], None]) -> int:
    """Join the processes that `extras` name (`read_launch`), call `run` and return the exit status.

    It is that of `explain_or_raise`, or 3 where another process was lost. A process that fails ends by force, without
    waiting long for others, which then end too: it does not return.
    """
    status = explain_or_raise(lambda: _join(read_launch(extras)))
    if status:
        return status
    return _leave(_guarded(lambda: _run_joined(config, run)))


def is_stop_agreed(requested: list[int], step: int) -> bool:
    """Return whether the run is to stop after `step`: at the first request, or at the step that all processes agree on.

    All of them call this after every step. Asked again about a step it gives many processes the same answer.
    """
    if jax.process_count() == 1:
        return bool(requested)
    return multihost_utils.reached_preemption_sync_point(step)


@contextmanager
def shared_stop_requests() -> Iterator[list[int]]:
    """Collect requests to stop as `stop_requests` does; of several processes for `is_stop_agreed`.

    There jax itself watches for SIGTERM, from the time the processes have joined, and SIGINT is handed to it; a second
    SIGINT interrupts. When the block ends SIGTERM ends the process again, one that is first in its container too.
    """
    if jax.process_count() == 1:
        with stop_requests() as received:
            yield received
        return
    before = signal.getsignal(signal.SIGINT)

    def hand_on(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, hand_on)
    try:
        yield []
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, _end_at_once)


def compile_together(step: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """Return a jitted `step` ready to be called; of several processes, when all of them have compiled it.

    On CPUs gloo gives up a first exchange that one process is 30 s late for, and compiling can take longer on one.
    """
    if jax.process_count() == 1:
        return step
    return on_all(lambda: step.lower(*arguments).compile())


def check_same_settings(values: Mapping[str, Any], advice: str) -> None:
    """Check that all processes have the same values, such as hashes of their data.

    Raises:
        ProcessError: a process differs from the first.
    """
    check_same(values, diff_configs, advice)


def _join(launch: Launch) -> None:
    if launch.coordinator and launch.process_id == 0:
        _check_port(int(launch.coordinator.rsplit(":", 1)[1]))
    known = (launch.coordinator, launch.num_processes, launch.process_id) if launch.coordinator else (None,) * 3
    flags = "--coordinator=HOST:PORT (reachable, a free port of process 0), --num-processes and its own --process-id"
    who = f"process {launch.process_id} of {launch.num_processes}" if launch.coordinator else "this process"
    where = f"at {launch.coordinator}" if launch.coordinator else "that the cluster names (--distributed)"
    advice = f"; start all processes within {_JOIN_TIMEOUT_S} s, each with {flags}"
    alone = f"{who} could not join the others {where}"
    began = time.monotonic()
    try:
        with _end_after(_JOIN_TIMEOUT_S, f"{alone} within {_JOIN_TIMEOUT_S} s{advice}"):
            jax.distributed.initialize(
                *known,
                initialization_timeout=_JOIN_TIMEOUT_S + _JAX_LATER_S,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            )
    except (KeyError, ValueError, RuntimeError) as error:  # a variable that a cluster lacks is a KeyError
        if launch.coordinator or _is_lost(error):
            raise ProcessError(f"{alone} ({time.monotonic() - began:.0f} s): {_first_line(error)}{advice}") from error
        gaps = find_gaps(os.environ) or ["no TPU slice, Slurm step, Open MPI or Kubernetes job was found"]
        raise ProcessError(
            f"the cluster does not say which processes belong to this run (--distributed; {_first_line(error)}): "
            f"{'; '.join(gaps)}. Mend that, or give each process {flags}"
        ) from error


def _check_port(port: int) -> None:
    """Refuse a port that this machine cannot listen at: jax would crash (seen with 0.10.2).

    Raises:
        ProcessError: it is in use, reserved or none.
    """
    has_both = socket.has_dualstack_ipv6()
    try:
        socket.create_server(
            ("", port), family=socket.AF_INET6 if has_both else socket.AF_INET, dualstack_ipv6=has_both
        ).close()
    except (OSError, OverflowError) as error:
        raise ProcessError(
            f"process 0 cannot listen at port {port} ({_first_line(error)}); give --coordinator a port that is free "
            "on its machine"
        ) from error


@contextmanager
def _end_after(timeout_s: float, message: str) -> Iterator[None]:
    """End the process with a message if the block takes longer: jax would abort it, and say that another one died."""

    def end() -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(EXIT_MISTAKE)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _run_joined(config: RunConfig, run: Callable[[], None]) -> None:
    if is_first():
        print(format_config(config), flush=True)
        print(f"{jax.process_count()} processes, {jax.device_count()} devices", flush=True)
    versions = {name: version(name) for name in ("jax", "jaxlib", "orbax-checkpoint", "grain")}
    check_same_settings(
        {
            "config": to_json_dict(config),
            "versions": versions | {"domino_jax": domino_jax.__version__},
            "local devices": [device.device_kind for device in jax.local_devices()],
        },
        "start all processes with the same command, but for --process-id, on machines of the same make",
    )
    run()


def _guarded(run: Callable[[], None]) -> int:
    """Return the exit status of `run`; whatever it raises is told here, since the process may have to end by force."""
    try:
        return explain_or_raise(run)
    except (RuntimeError, ValueError) as error:  # a collective's failure is told as one or the other
        if not _is_lost(error):
            traceback.print_exc()
            return EXIT_BUG
        traceback.print_exc()  # what is taken for a lost process may be another fault
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} lost contact to another one, which has "
            f"ended or cannot be reached ({_first_line(error)}); see what that one said. The same commands, all "
            "processes together, go on from the last checkpoint",
            file=sys.stderr,
        )
        return EXIT_LOST
    except BaseException:  # noqa: BLE001 - told here, since the process is about to end without unwinding
        traceback.print_exc()
        return EXIT_BUG


def _is_lost(error: Exception) -> bool:
    """Return whether a collective failed because of another process: gloo and the coordination service say so."""
    return bool(re.search("gloo|nccl|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|coordination|heartbeat", str(error), re.I))


def _end_at_once(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _leave(status: int) -> int:
    """End together with the others where they end too; else alone, in bounded time."""
    leaving = threading.Thread(target=_shut_down, daemon=True)
    leaving.start()
    leaving.join(_LEAVE_TIMEOUT_S if status else None)
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)  # jax's own way out would wait for processes that have gone
    return status


def _shut_down() -> None:
    try:
        jax.distributed.shutdown()
    except (RuntimeError, ValueError) as error:
        print(f"the processes did not end together: {_first_line(error)}", file=sys.stderr)
