"""How chat endpoints are asked: their addresses, the key, how many at once, and when again.

In: values of a command line. Out: the same, checked. Speaks to no network; the key itself stays in the environment.
"""

import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

_MAX_DELAY_S = 60.0
_MAX_CONCURRENCY = 1000


class EndpointError(ValueError):
    """Endpoints that cannot be used, or no longer; the message says why and what to do."""


@dataclass(frozen=True)
class EndpointSettings:
    """How endpoints are asked.

    Attributes:
        urls: base URLs; one without a path gets `/v1`.
        model: as the endpoints list it; empty: the only one they list.
        api_key_env: environment variable that holds the key; empty: no key is sent.
        concurrency: requests in flight at each endpoint.
        request_timeout_s: seconds a reply may take.
        max_retries: further tries of a request, and of an endpoint that does not answer.
        retry_delay_s: seconds before the first of them; every further one waits twice as long, up to a minute.
        grace_s: seconds that replies are waited for when the run is asked to stop.

    Raises:
        EndpointError: a value that cannot be used.
    """

    urls: tuple[str, ...]
    model: str = ""
    api_key_env: str = ""
    concurrency: int = 32
    request_timeout_s: float = 600.0
    max_retries: int = 5
    retry_delay_s: float = 1.0
    grace_s: float = 10.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "urls", tuple(dict.fromkeys(_check_url(url) for url in self.urls)))
        if not self.urls:
            raise EndpointError("no endpoint is given; give --endpoint URL, such as http://localhost:30000/v1")
        if not 1 <= self.concurrency <= _MAX_CONCURRENCY:
            raise EndpointError(f"concurrency is {self.concurrency}; it must lie in 1 .. {_MAX_CONCURRENCY}")
        if not 0 < self.request_timeout_s < float("inf"):
            raise EndpointError(f"request_timeout_s is {self.request_timeout_s}; give a positive number of seconds")
        if self.max_retries < 0:
            raise EndpointError(f"max_retries is {self.max_retries}; give 0 or more")
        if not self.api_key_env:
            return
        key = os.environ.get(self.api_key_env)
        if not key:
            raise EndpointError(
                f"the environment variable {self.api_key_env!r} (--api-key-env) is not set; put the key there, or give "
                "the name of the variable that holds it"
            )
        if not all("!" <= character <= "~" for character in key):
            # No header could carry it, and what is said of the header that failed would quote it.
            raise EndpointError(
                f"the environment variable {self.api_key_env!r} (--api-key-env) holds more than a key: a blank, a line "
                "break or a character outside ASCII; put the bare key there"
            )

    def delay_s(self, num_failed: int) -> float:
        """Return the seconds to wait after the `num_failed`-th failure in a row."""
        return min(_MAX_DELAY_S, self.retry_delay_s * 2.0 ** min(num_failed - 1, 30))


def _check_url(url: str) -> str:
    if any(mark in url for mark in "@?#"):  # before anything else: what follows may quote the URL
        host = re.split("[?#]", url.rpartition("@")[2])[0]
        raise EndpointError(
            f"--endpoint for {host!r} holds a user, a query or a fragment; give the plain URL, and a key by "
            "--api-key-env"
        )
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an address in brackets, or a port, that is none
        is_usable = False
    if not is_usable:
        raise EndpointError(f"--endpoint is {url!r}; give a URL such as http://localhost:30000/v1")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"
