"""Runs the app under uvicorn until it is told to stop: bounded connections and heads, drain on a signal, exit status.

The first SIGTERM or SIGINT drains: no new requests are taken, open ones may end within the grace period and are aborted
after it. A second signal ends the process at once. Both exit with 0; a failed engine exits with 1.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from domino_jax.serving.http.api import Service
from domino_jax.serving.http.errors import ApiError
from domino_jax.serving.http.http_guard import IS_OVER_LIMIT, new_request_id
from domino_jax.serving.http.json_log import log_event, start_logging
from domino_jax.serving.http.settings import ApiSettings

EXIT_DONE, EXIT_FAILED = 0, 1
_SWITCH_INTERVAL_S = 2e-4
"""A thread that wants to go on waits that long for another one. Python's 5 ms are a round of a small model: the engine
would stand still while streams are written."""
_REFUSALS_AT_ONCE = 64
"""Connections over the limit that are told why; what comes on top is closed unheard."""
_FAILURE_GRACE_S = 1.0
_ABORT_GRACE_S = 5.0


def run_server(app: FastAPI, host: str, port: int, log_level: int = logging.INFO) -> int:
    """Serve an app of `create_app` on `host` and `port` until a signal or the engine's end; return the exit status.

    Port 0 takes any free one; the line `listening` of the log tells which.

    Raises:
        OSError: the address cannot be used; nothing has been started.
    """
    start_logging(log_level)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    service: Service = app.state.service
    with bind_socket(host, port) as listener:
        warn_if_exposed(host, service.settings)
        log_event("listening", host=host, port=listener.getsockname()[1], pid=os.getpid())
        server = DrainingServer(make_config(app), service)
        server.run(sockets=[listener])
    return EXIT_DONE if server.started and not server.has_failed else EXIT_FAILED


def bind_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        OSError: the address is in use, unknown or not allowed; the message names it.
    """
    advice = "choose another --host or --port"
    if not 0 <= port <= 65535:
        raise OSError(f"cannot listen on {host} port {port}: ports are 0 .. 65535; {advice}")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {host} port {port}: {error.strerror}; {advice}") from error


def warn_if_exposed(host: str, settings: ApiSettings) -> None:
    """Log a warning where everybody on the network may use the server."""
    if not settings.api_keys and not _is_loopback(host):
        log_event(
            "exposed",
            level=logging.WARNING,
            host=host,
            note="no API key is set: everybody who can reach this address may use the server",
        )


def make_config(app: FastAPI) -> uvicorn.Config:
    """Return uvicorn's configuration: limits and deadlines of the app's settings, no log of its own."""
    settings: ApiSettings = app.state.service.settings
    return uvicorn.Config(
        app,
        http=_protocol_type(settings),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        timeout_graceful_shutdown=int(_ABORT_GRACE_S),
        timeout_keep_alive=settings.idle_timeout_s,
    )


class DrainingServer(uvicorn.Server):
    """uvicorn, with this server's way to end.

    Attributes:
        has_failed: the engine ended by itself.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        """Serve `service`."""
        super().__init__(config)
        self._service = service
        self._drain_ends_s: float | None = None
        self._failed_at_s: float | None = None
        self._num_signals = 0
        self.has_failed = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT while the server runs; unlike uvicorn's, the exit status stays ours."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may take signals
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; on a second signal end the process."""
        self._num_signals += 1
        if self._num_signals > 1:
            os._exit(EXIT_DONE)

    async def on_tick(self, counter: int) -> bool:
        """Look ten times a second after signals, the drain and the engine."""
        if await super().on_tick(counter):
            return True
        now_s = time.monotonic()
        if self._watch_engine(now_s):
            return True
        if self._num_signals and self._drain_ends_s is None:
            log_event("draining", open_requests=self._service.router.num_open)
            self._drain_ends_s = now_s + self._service.settings.drain_grace_s
            self._service.drain()
        if self._drain_ends_s is None:
            return False
        if self._service.router.num_open and now_s < self._drain_ends_s:
            return False
        log_event("stopping", aborted_requests=self._service.router.num_open)
        self._service.abort()
        return True

    def _watch_engine(self, now_s: float) -> bool:
        # The engine answers its requests before it ends; what is still open a second later is answered here.
        failure = self._service.engine.status().failure
        if failure is None:
            return False
        if self._failed_at_s is None:
            self._failed_at_s, self.has_failed = now_s, True
            log_event("engine_failed", level=logging.ERROR, failure=failure)
        if self._service.router.num_open and now_s < self._failed_at_s + _FAILURE_GRACE_S:
            return False
        self._service.router.fail_all("the engine has failed")
        return True


class _BoundedProtocol(H11Protocol):
    # h11 bounds a head's size; this bounds its time, the time of a client that does not read, and how many there are.
    max_connections: int
    header_timeout_s: float
    write_timeout_s: float
    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        num_over = len(self.connections) - self.max_connections
        if num_over > _REFUSALS_AT_ONCE:
            transport.close()
            return
        if num_over > 0:
            self.app_state = {**self.app_state, IS_OVER_LIMIT: True}
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._awaits_head():
            self._start_timer()
        super().data_received(data)
        if not self._awaits_head():
            self._stop_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._awaits_head() and self.conn.trailing_data[0]:
            self._start_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        is_large = len(self.conn.trailing_data[0]) > self.config.h11_max_incomplete_event_size
        if is_large:
            self._refuse(431, f"the request's head is larger than {self.config.h11_max_incomplete_event_size} bytes")
        else:
            self._refuse(400, "this is no valid HTTP request")

    def _awaits_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _start_timer(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_timeout_s, self._give_up)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _give_up(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing():
            self._refuse(408, f"the request's head did not arrive within {self.header_timeout_s:g} s")

    def _refuse(self, status: int, message: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(ApiError(status, message).to_json()).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("x-request-id", new_request_id()),
                ("connection", "close"),
            ]
            for event in (
                h11.Response(status_code=status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _protocol_type(settings: ApiSettings) -> type[asyncio.Protocol]:
    names = ("max_connections", "header_timeout_s", "write_timeout_s")
    return type("BoundedProtocol", (_BoundedProtocol,), {name: getattr(settings, name) for name in names})


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
