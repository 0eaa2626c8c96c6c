"""Runs a module of the tests in several processes that meet on this machine, and what such a module needs."""

import json
import os
import subprocess
import sys

from tests.runs.many_processes import find_free_port


def run_together(repository, module, count, *arguments):
    """Run `module ADDRESS COUNT NUMBER *arguments` once a process; return the JSON that each prints last."""
    environment = os.environ | {"PYTHONPATH": str(repository), "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-m", module, f"127.0.0.1:{find_free_port()}", str(count)]
    started = [
        subprocess.Popen(
            [*command, str(number), *map(str, arguments)],
            cwd=repository,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(count)
    ]
    try:
        answers = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert [process.returncode for process in started] == [0] * count, answers
    return [json.loads(out.splitlines()[-1]) for out, _ in answers]


def told(function):
    """Return what an error says, with its class, or None."""
    try:
        function()
    except Exception as error:  # noqa: BLE001 - told to the test
        return type(error).__name__, str(error)
    return None
