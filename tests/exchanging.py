"""What `tests/test_processes.py` runs in each of several processes: `ADDRESS COUNT NUMBER`; prints a JSON line."""

import json
import sys

import jax

from domino_jax import processes
from tests.together import told


def fail_in(number, error):
    """Return a function that raises in one process and returns that process's number in others."""

    def function():
        if jax.process_index() == number:
            raise error
        return jax.process_index()

    return function


def find_differences(first, own):
    return [f"{name}: {first[name]} / {own[name]}" for name in own if first[name] != own[name]]


def main():
    address, count, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    jax.distributed.initialize(address, count, number)
    called = []
    long = "ä" * 5000
    said = {
        "is_first": processes.is_first(),
        "decided": processes.on_first(lambda: called.append(number) or {"from": number, "text": long}),
        "nothing": processes.on_first(lambda: None),
        "called": called,
        "first_fails": told(lambda: processes.on_first(fail_in(0, OSError(28, "no room")))),
        "first_says_nothing": told(lambda: processes.on_first(fail_in(0, Silent()))),
        "not_json": told(lambda: processes.on_first(lambda: {1, 2})),
        "own": processes.on_all(lambda: number),
        "last_fails": told(lambda: processes.on_all(fail_in(count - 1, ValueError("no such file")))),
        "same": told(lambda: processes.check_same({"a": (1, 2)}, find_differences, "unused")),
        "other": told(lambda: processes.check_same({"a": 1, "b": number // 2}, find_differences, "use one command")),
        "shared": processes.share([number, "x" * 300 * number] if number else []),
        "nothing_shared": processes.share([]),
        "after": processes.on_first(lambda: "still in step"),
    }
    print(json.dumps(said), flush=True)
    jax.distributed.shutdown()


class Silent(Exception):
    """An error without a text."""


if __name__ == "__main__":
    main()
