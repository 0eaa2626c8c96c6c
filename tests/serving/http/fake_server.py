"""Serves a fake engine: python tests/serving/http/fake_server.py --port 8123 (for the page, curl and tests)."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from domino_jax.serving.http.api import create_app
from domino_jax.serving.http.http_server import run_server
from domino_jax.serving.http.settings import ApiSettings
from tests.serving.http.byte_codec import ByteCodec
from tests.serving.http.fake_engine import FakeEngine, FakeSettings

TEXT = (
    "Of course. Here is a **short** answer with <b>markup</b> that must stay text, an accent (é), an emoji (😀) "
    "and code:\n\n```python\ndef add(a, b):\n    return a + b\n```\n\nOne round may bring several letters at once.\n"
)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--round-s", type=float, default=0.05)
    parser.add_argument("--load-s", type=float, default=0.0)
    parser.add_argument("--api-key", action="append", default=[])
    parser.add_argument("--drain-grace-s", type=float, default=30.0)
    parser.add_argument("--header-timeout-s", type=float, default=10.0)
    parser.add_argument("--body-timeout-s", type=float, default=30.0)
    parser.add_argument("--fail-after", type=int)
    parser.add_argument("--fails", default="row")
    flags = parser.parse_args()
    engine = FakeEngine(
        FakeSettings(
            script=list(TEXT.encode()) + [256],
            round_s=flags.round_s,
            load_s=flags.load_s,
            rounds=(4, 2, 8, 1, 6, 3),
            max_model_len=4096,
            fail_after=flags.fail_after,
            fails=flags.fails,
        )
    )
    settings = ApiSettings(
        model_id="fake",
        api_keys=tuple(flags.api_key),
        drain_grace_s=flags.drain_grace_s,
        header_timeout_s=flags.header_timeout_s,
        body_timeout_s=flags.body_timeout_s,
    )
    try:
        return run_server(create_app(engine, ByteCodec(), settings), flags.host, flags.port)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
