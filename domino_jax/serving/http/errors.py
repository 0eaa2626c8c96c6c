"""Errors as the API tells them: one body form, one status, no paths and no echo of large input."""

from typing import Any

from fastapi.responses import JSONResponse

_MAX_MESSAGE_LEN = 500
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer other than 200.

    Attributes:
        status: HTTP status.
        message: for people; cut where it is long.
        param: the request's field that is at fault, if one is.
        code: for programs.
        headers: beside the body, such as `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Describe an error."""
        message = message if len(message) <= _MAX_MESSAGE_LEN else message[:_MAX_MESSAGE_LEN] + " ..."
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def to_json(self) -> dict[str, Any]:
        """Return the error's body."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def to_response(self) -> JSONResponse:
        """Return the error as an answer."""
        return JSONResponse(self.to_json(), status_code=self.status, headers=self.headers)


def shorten(value: object, max_len: int = 80) -> str:
    """Return `value` for a message: quoted, control characters escaped, cut."""
    text = ascii(value[: max_len + 1]) if isinstance(value, str) else repr(value)
    return text if len(text) <= max_len else text[:max_len] + "..."
