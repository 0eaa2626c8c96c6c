"""A request to stop that comes at the worst moment: right after the loop has looked for one for the first time."""

import signal
from contextlib import contextmanager


class _LateRequest(list):
    def __bool__(self):
        self.append(signal.SIGTERM)
        return len(self) > 1


@contextmanager
def request_late():
    """Stand in for `stop_requests`."""
    yield _LateRequest()
