"""Hear of every program that XLA compiles."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


@contextmanager
def listen_for_compiles(tell: Callable[[], None]) -> Iterator[None]:
    """Call `tell` after every compilation of the process while the block runs, in the thread that compiled."""

    def listen(event: str, duration_s: float, **_: Any) -> None:
        if event == _COMPILED:
            tell()

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
