"""Reads a request's body under a size limit and a deadline, and checks it; a mistake becomes a 400 that names it."""

import asyncio
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.requests import ClientDisconnect, Request

from domino_jax.serving.http.errors import ApiError, shorten
from domino_jax.serving.http.json_log import log_event
from domino_jax.serving.http.request_types import INERT_FIELDS, UNSUPPORTED_FIELDS, Body
from domino_jax.serving.http.settings import ApiSettings

_BodyT = TypeVar("_BodyT", bound=Body)
_MAX_WARNED = 256


class BodyReader:
    """Reads and checks bodies; warns once of every unknown field."""

    def __init__(self, settings: ApiSettings) -> None:
        """Read under the limits of `settings`."""
        self._settings = settings
        self._warned: set[str] = set()

    async def read(self, request: Request, body_type: type[_BodyT]) -> _BodyT:
        """Return the checked body.

        Raises:
            ApiError: too large (413), too slow (408), no JSON, a wrong type or value, or an unsupported field (400).
        """
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            # Browsers send other types to foreign servers without asking; those must not start work.
            raise ApiError(400, f"Content-Type is {shorten(media_type)}; send the body as application/json")
        raw = await self._read_bytes(request)
        try:
            body = body_type.model_validate(from_json(raw, allow_inf_nan=False))
        except ValidationError as error:
            raise _explain(error.errors(include_url=False, include_context=False)) from None
        except ValueError as error:
            raise ApiError(400, f"the body is no valid JSON ({error})", code="invalid_json") from None
        self._check_extra(body)
        return body

    async def _read_bytes(self, request: Request) -> bytes:
        limit = self._settings.max_body_bytes
        too_large = ApiError(
            413, f"the body is larger than {limit} bytes", code="body_too_large", headers={"Connection": "close"}
        )
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > limit):
            raise too_large
        raw = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                async for part in request.stream():
                    raw += part
                    if len(raw) > limit:
                        raise too_large
        except TimeoutError:
            seconds = self._settings.body_timeout_s
            raise ApiError(
                408, f"the body did not arrive within {seconds:g} s", code="slow_body", headers={"Connection": "close"}
            ) from None
        except ClientDisconnect:
            raise ApiError(499, "the client is gone", code="disconnected") from None
        return bytes(raw)

    def _check_extra(self, body: Body) -> None:
        for name, value in (body.model_extra or {}).items():
            if name in UNSUPPORTED_FIELDS:
                if not any(value == nothing and type(value) is type(nothing) for nothing in UNSUPPORTED_FIELDS[name]):
                    raise ApiError(400, f"{name} is not supported; leave it out", name, "unsupported_parameter")
            elif name not in INERT_FIELDS and name not in self._warned and len(self._warned) < _MAX_WARNED:
                self._warned.add(name)
                log_event("unknown_field", field=name[:80], note="accepted and without effect; told once")


def _explain(errors: Sequence[ErrorDetails]) -> ApiError:
    # A value that fits no member of a union has an error for each; the one that came furthest is the most telling.
    error = max(errors, key=lambda e: (len(_path(e["loc"])), e["type"] != "string_type"))
    where = ".".join(map(str, _path(error["loc"])))
    if error["type"] == "missing":
        return ApiError(400, f"{where} is missing; it is required", where)
    same = [e["msg"].removeprefix("Input should be ") for e in errors if _path(e["loc"]) == _path(error["loc"])]
    wanted = " or ".join(dict.fromkeys(same))
    return ApiError(400, f"{where or 'the body'} is {_describe(error['input'])}; it should be {wanted}", where or None)


def _path(loc: Sequence[int | str]) -> list[int | str]:
    # Members of a union add their own names ("str", "list[constrained-int]") to the path.
    tags = ("str", "int", "float", "bool", "list", "nullable")
    return [
        part
        for part in loc
        if isinstance(part, int) or not (part in tags or "[" in part or part.startswith("constrained"))
    ]


def _describe(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    return "null" if value is None else shorten(value)
