"""The API's outer layer: request ids, keys, security headers, the access log; plain ASGI, so streams pass as is."""

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from domino_jax.serving.http.errors import ApiError
from domino_jax.serving.http.json_log import log_event
from domino_jax.serving.http.settings import ApiSettings

IS_OVER_LIMIT = "is_over_limit"
"""Set in the state of requests whose connection is one too many."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_OPEN_PATHS = frozenset({"/", "/health"})
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}


class HttpGuard:
    """Wraps the app; every answer has a request id and security headers, and leaves a line in the log."""

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        """Guard `app`."""
        self._app, self._settings = app, settings
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived_s = time.monotonic()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_request_id()
        record: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=request_id, arrived_s=arrived_s, record=record)
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": _with_defaults(message.get("headers", []), request_id)}
            await send(message)

        try:
            refusal = self._check(scope, headers)
            if refusal is None:
                await self._app(scope, receive, send_with_headers)
            else:
                await refusal.to_response()(scope, receive, send_with_headers)
        except Exception:  # whatever it is, the client gets an error body and the log the traceback
            log_event("fault", level=logging.ERROR, exc_info=True, request_id=request_id, route=_route(scope))
            if status:
                raise  # the answer has begun; the server must cut the connection
            fault = ApiError(500, "a fault of the server; it is in its log", code="internal_error")
            await fault.to_response()(scope, receive, send_with_headers)
        finally:
            duration_s = round(time.monotonic() - arrived_s, 6)
            line = {"request_id": request_id, "method": scope["method"], "route": _route(scope), "status": status}
            log_event("request", **line, **record, duration_s=duration_s)

    def _check(self, scope: Scope, headers: Mapping[str, str]) -> ApiError | None:
        limit = self._settings.max_header_bytes
        if sum(len(name) + len(value) for name, value in scope["headers"]) > limit or len(scope["raw_path"]) > limit:
            return ApiError(431, f"the request's head is larger than {limit} bytes", headers={"Connection": "close"})
        if scope["state"].get(IS_OVER_LIMIT) and scope["path"] != "/health":
            return ApiError(
                503,
                f"{self._settings.max_connections} connections are open, as many as this server takes; try again later",
                code="too_many_connections",
                headers={"Connection": "close", "Retry-After": "2"},
            )
        is_preflight = scope["method"] == "OPTIONS" and bool(self._settings.cors_origins)
        if not self._keys or scope["path"] in _OPEN_PATHS or is_preflight:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            return _unauthorized("no API key was given; send the header Authorization: Bearer <key>")
        digest = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        # Every key is compared, so that the time tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        return None if any(matches) else _unauthorized("the API key is not known here")


def new_request_id() -> str:
    """Return an id for a request that brings none."""
    return f"req-{secrets.token_hex(12)}"


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _with_defaults(headers: list[tuple[bytes, bytes]], request_id: str) -> list[tuple[bytes, bytes]]:
    present = {name.lower() for name, _ in headers}
    extra = {**_HEADERS, "x-request-id": request_id}
    return [*headers, *((k.encode(), v.encode()) for k, v in extra.items() if k.encode() not in present)]


def _route(scope: Scope) -> str:
    # The route's pattern, not the path: a path is the client's text.
    route = scope.get("route")
    return getattr(route, "path", "") or "unknown"
