"""An OpenAI-compatible server on loopback that misbehaves as it is told."""

import json
import socket
import struct
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RESET = "reset"


def answer(content, finish_reason="stop", **fields):
    """A reply with one choice; `fields` go beside the content."""
    message = {"role": "assistant", "content": content, **fields}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return {"id": "c", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice],
            "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}}  # fmt: skip


class Wrong:
    """A reply with a status, headers and body of its own, after a while."""

    def __init__(self, status=200, body="", headers=(), after_s=0.0):
        self.status, self.headers, self.after_s = status, dict(headers), after_s
        self.body = body if isinstance(body, str) else json.dumps(body)


class FakeEndpoint:
    """Answers what was said last with `echo`, unless `script` has something else for it.

    Attributes:
        script: by what the user said last: what the next requests get, one after the other.
        asked: bodies of the requests, with `at`, `headers`.
        is_dead: every connection is reset.
        delay_s: seconds every answer takes.
    """

    def __init__(self, models=("tiny",), port=0, root=None):
        self.models, self.root, self.script, self.asked = models, root, defaultdict(list), []
        self.is_dead, self.delay_s, self.dies_after = False, 0.0, None
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    @staticmethod
    def echo(body):
        return answer(f"{body['messages'][-1]['content']}! (seed {body['seed']}, turn {len(body['messages'])})")

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def _reply(self, body, headers):
        said = body["messages"][-1]["content"]
        with self.lock:
            self.asked.append({**body, "at": time.monotonic(), "headers": headers})
            if self.dies_after is not None and len(self.asked) > self.dies_after:
                self.is_dead = True
            reply = RESET if self.is_dead else self.script[said].pop(0) if self.script[said] else None
        return self.echo(body) if reply is None else reply

    def _handler(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_GET(self):
                models = [{"id": m, "object": "model", "created": 0, "owned_by": "me", "root": fake.root or m,
                           "max_model_len": 64} for m in fake.models]  # fmt: skip
                self.send(RESET if fake.is_dead else {"object": "list", "data": models})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                reply = fake._reply(body, {name.lower(): value for name, value in self.headers.items()})
                time.sleep(fake.delay_s)
                self.send(reply)

            def send(self, reply):
                if reply == RESET:
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.close_connection = True
                    self.connection.close()
                    return
                wrong = reply if isinstance(reply, Wrong) else Wrong(body=reply)
                time.sleep(wrong.after_s)
                content = wrong.body.encode()
                try:
                    self.send_response(wrong.status)
                    for name, value in wrong.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    self.close_connection = True  # the client has gone

        return Handler
