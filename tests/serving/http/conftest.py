"""A server on loopback over the fake engine, in a thread of the test's process."""

import contextlib
import json
import threading
import time

import httpx
import pytest


class RunningServer:
    def __init__(self, server, service, thread):
        self.server, self.service, self.thread = server, service, thread
        self.engine = service.engine
        port = server.servers[0].sockets[0].getsockname()[1]
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=20)

    def chat(self, text="hi", **fields):
        return self.client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": text}], **fields}
        )

    def complete(self, prompt="hi", **fields):
        return self.client.post("/v1/completions", json={"prompt": prompt, **fields})

    def stream(self, path, body):
        """All events of a stream, decoded; the last must be [DONE]."""
        response = self.client.post(path, json={**body, "stream": True})
        assert response.status_code == 200, response.text
        return read_events(response.text)

    def chat_stream(self, text="hi", **fields):
        return self.stream("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    def metric(self, name, **labels):
        """The sum of a metric's samples with these labels."""
        total = 0.0
        for line in self.client.get("/metrics").text.splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.partition("{")[0] == name and all(f'{k}="{v}"' in sample for k, v in labels.items()):
                total += float(value)
        return total

    def wait_until_idle(self, timeout_s=10.0):
        ends_s = time.monotonic() + timeout_s
        while time.monotonic() < ends_s:
            status = self.engine.status()
            if status.num_running == status.num_waiting == self.service.router.num_open == 0:
                return
            time.sleep(0.01)
        raise AssertionError(f"still busy: {status}, {self.service.router.num_open} open")


def read_events(text):
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines), lines
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.fixture
def serve():
    """Start servers for one test."""
    with start_servers() as start:
        yield start


@pytest.fixture(scope="module")
def serve_module():
    """Start servers for all tests of a file."""
    with start_servers() as start:
        yield start


@contextlib.contextmanager
def start_servers():
    """Start servers: `serve(engine, **api_settings)`; `FakeEngine` settings may be given as `engine_settings`."""
    from domino_jax.serving.http.api import create_app
    from domino_jax.serving.http.http_server import DrainingServer, bind_socket, make_config
    from domino_jax.serving.http.settings import ApiSettings
    from tests.serving.http.byte_codec import ByteCodec
    from tests.serving.http.fake_engine import FakeEngine

    with contextlib.ExitStack() as stack:

        def start(engine=None, codec=None, **settings):
            app = create_app(engine or FakeEngine(), codec or ByteCodec(), ApiSettings("fake", **settings))
            server = DrainingServer(make_config(app), app.state.service)
            listener = bind_socket("127.0.0.1", 0)
            thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
            thread.start()

            def stop():
                server.should_exit = True
                server.force_exit = True
                app.state.service.engine.stop()
                thread.join(10)
                assert not thread.is_alive()

            ends_s = time.monotonic() + 10
            while not server.started and time.monotonic() < ends_s:
                time.sleep(0.005)
            stack.callback(stop)
            running = RunningServer(server, app.state.service, thread)
            stack.callback(running.client.close)
            return running

        yield start
