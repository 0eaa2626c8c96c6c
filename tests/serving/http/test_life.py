"""Start and end of a server process: drain, second signal, a failed engine, exit statuses."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

BODY = {"messages": [{"role": "user", "content": "hi"}]}


class Process:
    def __init__(self, repository, *flags):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "tests/serving/http/fake_server.py", "--port", str(self.port), *flags]
        environment = os.environ | {"PYTHONPATH": str(repository)}
        self.process = subprocess.Popen(command, cwd=repository, env=environment, stderr=subprocess.PIPE, text=True)
        ends_s = time.monotonic() + 120
        while time.monotonic() < ends_s and self.process.poll() is None:
            try:
                httpx.get(f"{self.url}/health")
                return
            except httpx.TransportError:
                time.sleep(0.05)

    def send(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def end(self, timeout_s=60):
        self.log = self.process.communicate(timeout=timeout_s)[1]
        return self.process.returncode

    def stream(self, sink, **fields):
        """Read a stream in a thread of its own; `sink` gets its text."""

        def read():
            body = {**BODY, "stream": True, **fields}
            with (
                contextlib.suppress(httpx.RemoteProtocolError),
                httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body) as r,
            ):
                for text in r.iter_text():
                    sink.append(text)

        thread = threading.Thread(target=read)
        thread.start()
        ends_s = time.monotonic() + 60
        while not sink and time.monotonic() < ends_s:
            time.sleep(0.01)
        return thread


@pytest.fixture
def start(repository):
    processes = []

    def run(*flags):
        processes.append(Process(repository, *flags))
        return processes[-1]

    yield run
    for one in processes:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def test_an_engine_that_hangs_does_not_keep_the_server(serve, monkeypatch):
    from domino_jax.serving.http import api
    from tests.serving.http.fake_engine import FakeEngine

    engine, ends = FakeEngine(), threading.Event()
    stop = engine.stop
    engine.stop = lambda: ends.wait(20) and stop()
    monkeypatch.setattr(api, "_STOP_TIMEOUT_S", 0.2)
    server = serve(engine)
    server.server.should_exit = True
    server.thread.join(5)
    assert not server.thread.is_alive()
    ends.set()


def test_addresses_that_cannot_be_used():
    from domino_jax.serving.http.http_server import bind_socket

    for host, port in (("127.0.0.1", 70_000), ("203.0.113.7", 0), ("no.such.host.invalid", 0)):
        with pytest.raises(OSError, match=f"cannot listen on {host} port {port}: .*; choose another"):
            bind_socket(host, port)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(start, number):
    server = start("--round-s", "0.05")
    texts = []
    thread = server.stream(texts, max_tokens=60)
    server.send(number)
    time.sleep(0.3)
    assert httpx.post(f"{server.url}/v1/chat/completions", json=BODY).status_code == 503
    assert httpx.get(f"{server.url}/ready").status_code == 503
    assert httpx.get(f"{server.url}/health").status_code == 200
    thread.join(10)
    assert "".join(texts).endswith("data: [DONE]\n\n")
    assert server.end() == 0
    events = [json.loads(line)["event"] for line in server.log.splitlines()]
    assert events[0] == "listening" and "draining" in events and "stopping" in events and "log" not in events


def test_what_outlasts_the_grace_is_aborted_with_an_error(start):
    server = start("--round-s", "0.2", "--drain-grace-s", "0.5")
    texts = []
    thread = server.stream(texts)
    server.send()
    thread.join(10)
    assert "shutting down" in texts[-1] and "[DONE]" not in "".join(texts)
    assert server.end() == 0


def test_a_second_signal_stops_at_once(start):
    server = start("--round-s", "0.5")
    texts = []
    thread = server.stream(texts)
    server.send()
    time.sleep(0.3)
    began_s = time.monotonic()
    server.send()
    assert server.end() == 0
    assert time.monotonic() - began_s < 2
    thread.join(5)


def test_a_failed_engine_answers_and_ends_the_process(start):
    server = start("--fail-after", "3", "--fails", "engine")
    texts = []
    thread = server.stream(texts)
    thread.join(10)
    assert "generation failed" in "".join(texts)
    assert server.end() == 1
    assert any(json.loads(line)["event"] == "engine_failed" for line in server.log.splitlines())


def test_a_port_in_use_ends_the_process(start, repository):
    first = start()
    command = [sys.executable, "tests/serving/http/fake_server.py", "--port", str(first.port)]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    second = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=120)
    assert second.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {first.port}: Address already in use" in second.stderr
    assert "Traceback" not in second.stderr


def test_ready_only_after_loading(start):
    server = start("--load-s", "1.5")
    response = httpx.get(f"{server.url}/ready")
    assert response.status_code == 503 and "compiled 3/12" in response.text
    ends_s = time.monotonic() + 60
    while httpx.get(f"{server.url}/ready").status_code != 200:
        assert time.monotonic() < ends_s
        time.sleep(0.1)
    server.send()
    assert server.end() == 0
