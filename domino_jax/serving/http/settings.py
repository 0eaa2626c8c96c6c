"""What the operator of a server decides: names, keys, limits, deadlines."""

from dataclasses import dataclass, field

from domino_jax.config import SamplingConfig, require, require_positive


@dataclass(frozen=True)
class ApiSettings:
    """Settings of the HTTP side.

    Attributes:
        model_id: the name under which the model is served.
        api_keys: one of them must come with a request; none: open to everybody who can connect.
        cors_origins: origins whose pages may call the API from a browser; none by default.
        default_sampling: used for what a request leaves out, the seed excepted.
        max_connections: open connections that are served; further ones get an error body (503) and are closed.
        max_body_bytes: larger request bodies are refused (413).
        max_header_bytes: larger request heads are refused (431).
        max_messages: messages a chat.
        max_choices: sequences a request, prompts times `n`.
        max_stops: stop strings, and stop ids, a request.
        max_stop_len: letters a stop string.
        max_logit_bias: entries of `logit_bias`.
        header_timeout_s: seconds a client has to send a request's head.
        body_timeout_s: seconds a client has to send a request's body.
        request_timeout_s: seconds a request may take, queue included.
        idle_timeout_s: seconds a connection without a request is kept; more than what clients and proxies keep it for
            (5 to 60), or now and then one sends a request into a connection that is being closed.
        keep_alive_comment_s: silent seconds of a stream after which a comment is sent.
        drain_grace_s: seconds that open requests have after SIGTERM.
        write_timeout_s: seconds a client that does not read may block a stream.

    Raises:
        ConfigError: a value is out of range.
    """

    model_id: str
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()
    default_sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=1.0))
    max_connections: int = 512
    max_body_bytes: int = 4 * 2**20
    max_header_bytes: int = 32 * 2**10
    max_messages: int = 1024
    max_choices: int = 128
    max_stops: int = 16
    max_stop_len: int = 1024
    max_logit_bias: int = 1024
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    request_timeout_s: float = 600.0
    idle_timeout_s: int = 75
    keep_alive_comment_s: float = 10.0
    drain_grace_s: float = 30.0
    write_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        require(bool(self.model_id), "model_id is empty; give the name under which the model is served")
        require(
            all(key and key.isascii() and key.isprintable() for key in self.api_keys),
            "an API key is empty or has characters outside printable ASCII; use letters and digits",
        )
        names = [name for name in self.__dataclass_fields__ if name.startswith("max_") or name.endswith("_s")]
        require_positive(self, *(name for name in names if name != "drain_grace_s"))
        require(self.drain_grace_s >= 0, f"drain_grace_s is {self.drain_grace_s}; it must be 0 or more")
