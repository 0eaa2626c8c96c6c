"""The server's log: one JSON object a line, every character outside printable ASCII escaped."""

import json
import logging
import time
from typing import Any

LOGGER = logging.getLogger("domino_jax.serving")


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON; messages of other libraries become its `message`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields = getattr(record, "fields", None)
        line = {"time": _iso_time(record.created), "level": record.levelname.lower()}
        line |= {"event": record.getMessage()} if fields is not None else {"event": "log", "logger": record.name}
        line |= fields if fields is not None else {"message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def log_event(event: str, level: int = logging.INFO, exc_info: bool = False, **fields: Any) -> None:
    """Log an event with its fields."""
    LOGGER.log(level, event, extra={"fields": fields}, exc_info=exc_info)


def start_logging(level: int = logging.INFO) -> None:
    """Send the log of this package and of uvicorn to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    for name in ("domino_jax.serving", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level if name == "domino_jax.serving" else max(level, logging.WARNING))
        logger.propagate = False


def _iso_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"
