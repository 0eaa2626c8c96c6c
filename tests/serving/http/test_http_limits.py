"""Slow, large and broken HTTP, from a raw socket."""

import contextlib
import json
import socket
import time

import pytest

from domino_jax.serving.http.settings import ApiSettings
from tests.serving.http.fake_engine import FakeEngine

BODY = json.dumps({"prompt": "x", "max_tokens": 2}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=5)


def read_all(connection):
    parts = []
    while True:
        part = connection.recv(65536)
        if not part:
            return b"".join(parts)
        parts.append(part)


def check(answer, status):
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), answer
    assert b"x-request-id" in head.lower()
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def server(serve_module):
    limits = {"header_timeout_s": 0.3, "body_timeout_s": 0.3, "max_header_bytes": 4096, "write_timeout_s": 0.3}
    return serve_module(FakeEngine(script=[*b"y" * 400]), **limits)


def test_a_connection_that_says_nothing_is_closed(server):
    with connect(server) as connection:
        check(read_all(connection), 408)


def test_a_head_that_drips_is_cut(server):
    began_s = time.monotonic()
    with connect(server) as connection:
        for byte in HEAD[:20]:
            try:
                connection.send(bytes([byte]))
            except OSError:
                break
            time.sleep(0.03)
        check(read_all(connection), 408)
    assert time.monotonic() - began_s < 2


def test_a_second_head_that_drips_is_cut(server):
    with connect(server) as connection:
        connection.send(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.send(b"GET /hea")
        check(read_all(connection), 408)


def test_a_body_that_does_not_come_is_cut(server):
    with connect(server) as connection:
        connection.send(HEAD + b"Content-Length: 100\r\n\r\n" + BODY[:5])
        check(read_all(connection), 408)


def test_a_refused_body_that_drips_on_is_cut(server):
    with connect(server) as connection:
        connection.send(b"POST /nothing HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
        began_s = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() < began_s + 3:
                connection.send(b"x")
                time.sleep(0.02)


@pytest.mark.parametrize("length", [3000, 10_000, 200_000])
def test_a_large_head_is_refused(server, length):
    with connect(server) as connection:
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nA: " + b"x" * length + b"\r\n\r\n")
            connection.shutdown(socket.SHUT_WR)
            answer = read_all(connection)
        except OSError:
            assert length > 100_000  # closed with bytes unread
            return
        if length < 4096:
            assert answer.startswith(b"HTTP/1.1 200")
        else:
            check(answer, 431)


@pytest.mark.parametrize("raw", [b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00" * 4 + b"\r\n\r\n",
                                 b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
                                 b"POST /tokenize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
                                 b"Content-Length: 5\r\n\r\nhello"])  # fmt: skip
def test_what_is_no_http_is_refused(server, raw):
    with connect(server) as connection:
        connection.sendall(raw)
        check(read_all(connection), 400)


def test_requests_on_one_connection(server):
    with connect(server) as connection:
        one = HEAD + f"Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY
        connection.sendall(one * 3 + b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 200") == 4


def test_idle_connections_are_closed_later_than_clients_leave_them(serve):
    # httpx keeps its own for 5 s, proxies for up to 60 s.
    assert ApiSettings("fake").idle_timeout_s > 60
    server = serve(FakeEngine(), idle_timeout_s=1)
    with connect(server) as connection:
        begin_s = time.monotonic()
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200")  # and then its end, without an error
        assert 1 <= time.monotonic() - begin_s < 4  # uvicorn's own would be 5


def test_a_client_that_does_not_read_is_dropped(serve):
    engine = FakeEngine(script=[*b"y" * 12_000], rounds=(1,), round_s=0.002, max_model_len=16_000)
    server = serve(engine, write_timeout_s=0.3)
    server.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    body = json.dumps({"prompt": "x", "stream": True, "return_token_sources": True, "logprobs": 5}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: server.metric("vllm:request_success_total", finished_reason="abort") == 1)
    server.wait_until_idle()
    assert server.chat(max_tokens=1).status_code == 200


def test_connections_over_the_limit_are_refused_and_give_their_place_back(serve):
    server = serve(FakeEngine(script=[*b"y" * 400]), max_connections=3)
    server.client.close()
    ask = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(server)) for _ in range(3)]
        wait_for(lambda: len(server.server.server_state.connections) == 3)
        with connect(server) as connection:
            connection.sendall(HEAD + f"Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY)
            answer = read_all(connection)
        check(answer, 503)
        assert b'"code":"too_many_connections"' in answer
        assert b"retry-after" in answer.lower()
        with connect(server) as connection:  # a busy server is alive
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert read_all(connection).startswith(b"HTTP/1.1 200")
        held[0].sendall(ask)
        assert held[0].recv(65536).startswith(b"HTTP/1.1 200")
        held[1].close()
        wait_for(lambda: len(server.server.server_state.connections) == 2)
        with connect(server) as connection:
            connection.sendall(ask)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_flood_of_connections_is_bounded(serve):
    server = serve(FakeEngine(), max_connections=2, header_timeout_s=1.0)
    server.client.close()
    with contextlib.ExitStack() as stack:
        flood = [stack.enter_context(connect(server)) for _ in range(2 + 64 + 20)]
        for connection in flood[-20:]:
            assert connection.recv(100) == b""  # closed unheard
        assert len(server.server.server_state.connections) <= 2 + 64
        for connection in flood[:-20]:
            check(read_all(connection), 408)
    wait_for(lambda: not server.server.server_state.connections)


def wait_for(is_reached):
    ends_s = time.monotonic() + 20
    while not is_reached() and time.monotonic() < ends_s:
        time.sleep(0.01)
    assert is_reached()
