"""`train.py` in several processes of this machine, with the flags and variables that a test gives them."""

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

CONFIG = """
from domino_jax.run_config import *
def get_config():
    return {config!r}
"""


def find_free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def give_address(port, count, number):
    """Return the flags that say where the processes meet."""
    return [f"--coordinator=127.0.0.1:{port}", f"--num-processes={count}", f"--process-id={number}"]


def ask_cluster(port, count, number):
    """Return the flag that leaves that to the cluster."""
    return ["--distributed"]


class Processes:
    """A run of `train.py` in several processes."""

    def __init__(
        self, repository, config, count, pace=0.0, last=(), flags=give_address, environments=None, module="paced_train"
    ):
        """Start them; `last` are more arguments of the last one, `environments` more variables of each."""
        folder = os.path.dirname(config.output_dir)
        config_file = os.path.join(folder, f"config_{time.monotonic_ns()}.py")
        with open(config_file, "w") as file:
            file.write(CONFIG.format(config=config))
        port = find_free_port()
        environment = os.environ | {"PYTHONPATH": str(repository), "JAX_PLATFORMS": "cpu", "PACE": str(pace)}
        environment.pop("XLA_FLAGS", None)
        command = [sys.executable, "-m", f"tests.runs.{module}", "--config", config_file]
        with ExitStack() as files:
            self.said = [files.enter_context(open(f"{config_file}.{i}.log", "w+")) for i in range(count)]
            self.files = files.pop_all()
        self.processes = [
            subprocess.Popen(
                [*command, *flags(port, count, number), *(last if number == count - 1 else ())],
                cwd=repository,
                env=environment | (environments[number] if environments else {}),
                stdout=self.said[number],
                stderr=subprocess.STDOUT,
            )
            for number in range(count)
        ]

    def wait_for(self, path):
        """Wait until `path` is there."""
        until = time.monotonic() + 240
        while not path.exists():
            assert all(process.poll() is None for process in self.processes), self.texts()
            assert time.monotonic() < until, self.texts()
            time.sleep(0.02)

    def statuses(self, timeout=300.0):
        """Return the exit statuses; nothing runs on when it returns or raises."""
        until = time.monotonic() + timeout
        try:
            return [process.wait(max(until - time.monotonic(), 0.1)) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError("\n".join(self.texts())) from None
        finally:
            for process in self.processes:
                process.kill()

    def texts(self):
        """Return what each process said so far."""
        for file in self.said:
            file.seek(0)
        return [file.read() for file in self.said]
