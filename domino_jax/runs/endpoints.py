"""OpenAI-compatible chat endpoints (SGLang, vLLM): what they serve, one question to one of them, what a failure means.

In: messages of a chat and sampling settings. Out: the reply, or one of three failures: the row's own fault
(`RowRefused`), one worth another try (`TryFailed`), or one that stops the run (`EndpointError`). Which endpoint is
asked, and when again, is decided elsewhere. A key is read from the environment, never written anywhere, and blotted
out of messages.

Source: the OpenAI chat completions API; `chat_template_kwargs`, `top_k`, `min_p`, `repetition_penalty` and reasoning
fields as SGLang and vLLM have them.
"""

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from types import ModuleType
from typing import Any, Literal

from domino_jax.config import SamplingConfig
from domino_jax.runs.endpoint_settings import EndpointError, EndpointSettings
from domino_jax.runs.monitor import RunMonitor
from domino_jax.runs.provenance import ENDPOINT

_ROW_STATUS = (400, 413, 422)
_LIMITED_STATUS = (429, 502, 503)
_TIMEOUT_STATUS = (408, 504)
_RETRIED_STATUS = (409, 425)
_NEVER_REACHED = ("ConnectTimeout", "PoolTimeout")
_CONNECT_TIMEOUT_S, _LIST_TIMEOUT_S = 10.0, 30.0
_MAX_RETRY_AFTER_S = 3600.0


class RowRefused(Exception):
    """An endpoint refused this very request: another try would give the same.

    Attributes:
        detail: what the endpoint said.
    """

    def __init__(self, detail: str) -> None:
        """Keep what the endpoint said."""
        super().__init__(detail)
        self.detail = detail


class TryFailed(Exception):
    """A try that gave no usable reply; another may.

    Attributes:
        kind: `unreached` (nobody answered), `limited` (too many requests, or nobody behind the proxy), `timeout` or
            `broken` (an error of the server or a reply that is none).
        retry_after_s: seconds the endpoint asked to wait.
    """

    def __init__(
        self,
        kind: Literal["unreached", "limited", "timeout", "broken"],
        detail: str,
        retry_after_s: float | None = None,
    ) -> None:
        """Keep what happened."""
        super().__init__(detail)
        self.kind, self.detail, self.retry_after_s = kind, detail, retry_after_s


@dataclass(frozen=True)
class ServedModel:
    """The model that endpoints list.

    Attributes:
        model: its name in requests.
        root: what it was loaded from, if told.
        max_model_len: its context in tokens, if told.
        urls: all endpoints of the run.
    """

    model: str
    root: str | None
    max_model_len: int | None
    urls: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """Return who answers, for the settings file."""
        told = {"root": self.root, "max_model_len": self.max_model_len}
        found = {name: value for name, value in told.items() if value is not None}
        return {"kind": ENDPOINT, "model": self.model, **found, "urls": sorted(self.urls)}


@dataclass(frozen=True)
class Reply:
    """What an endpoint answered.

    Attributes:
        text: the content; what a reasoning parser took out of it is in `thought`.
        num_tokens: generated tokens as the endpoint counted them; 0 where it does not.
    """

    text: str
    thought: str
    finish_reason: str
    num_tokens: int


@dataclass
class Endpoint:
    """One endpoint: its client, and how it has fared.

    Attributes:
        must_be_listed: its models are to be listed before it is asked: it is new, or it did not answer.
        num_running: requests in flight.
        num_failed: failures in a row that are the endpoint's: nobody answered, or too many requests.
        rests_until: time (monotonic) before which it is not asked.
        failed_at: time of the last of them; failures of requests sent before it are the same failure.
        is_aside: it was said that it does not answer.
    """

    url: str
    client: Any
    settings: EndpointSettings
    must_be_listed: bool = True
    num_running: int = 0
    num_failed: int = 0
    rests_until: float = 0.0
    failed_at: float = field(default=-1.0)
    is_aside: bool = False

    def note_answer(self) -> None:
        """Take a request that was served as the end of all trouble, but wait where the endpoint asked for it."""
        if self.must_be_listed:
            self.rests_until = 0.0
        self.num_failed, self.must_be_listed = 0, False

    def note_failure(self, failure: TryFailed, sent_at: float) -> None:
        """Let the endpoint rest where the failure is its own."""
        if failure.kind not in ("unreached", "limited") or sent_at < self.failed_at:
            return
        self.num_failed += 1
        self.failed_at = time.monotonic()
        wait_s = self.settings.delay_s(self.num_failed) if failure.retry_after_s is None else failure.retry_after_s
        self.rests_until = self.failed_at + wait_s
        self.must_be_listed |= failure.kind == "unreached"

    async def list_models(self) -> list[Any]:
        """Return the models it lists.

        Raises:
            EndpointError: it refuses, or lists nothing.
            TryFailed: it does not answer.
        """
        timeout_s = min(_LIST_TIMEOUT_S, self.settings.request_timeout_s)

        async def fetch() -> Any:
            return await self.client.models.list(timeout=timeout_s)

        try:
            page = await self._call(fetch(), timeout_s)
        except TryFailed as failure:
            raise TryFailed("unreached", failure.detail, failure.retry_after_s) from failure
        except RowRefused as refusal:
            raise EndpointError(f"{self.url}/models answered {refusal.detail}; check --endpoint") from refusal
        models = [m for m in (getattr(page, "data", None) or []) if isinstance(getattr(m, "id", None), str)]
        if not models:
            raise EndpointError(f"{self.url}/models lists no model; give the base URL of an OpenAI-compatible API")
        return models

    async def check_model(self, model: str) -> None:
        """Check that it still serves `model`.

        Raises:
            EndpointError: it lists others.
            TryFailed: it does not answer.
        """
        _pick_model(self.url, [m.id for m in await self.list_models()], model)

    async def ask(
        self,
        model: str,
        messages: Sequence[Mapping[str, str]],
        max_new_tokens: int,
        sampling: SamplingConfig,
        enable_thinking: bool,
    ) -> Reply:
        """Return the answer to `messages`.

        Raises:
            RowRefused: the request is at fault.
            TryFailed: another try may succeed.
            EndpointError: no request can succeed.
        """
        call = self.client.chat.completions.create(
            model=model,
            messages=[{"role": m["role"], "content": m["content"]} for m in messages],
            max_tokens=max_new_tokens,
            extra_body={"chat_template_kwargs": {"enable_thinking": enable_thinking}, **sampling_fields(sampling)},
        )
        return _read_reply(await self._call(call, self.settings.request_timeout_s), self.url)

    async def _call(self, call: Any, timeout_s: float) -> Any:
        openai = import_openai()
        try:
            async with asyncio.timeout(timeout_s):
                return await call
        except openai.APIStatusError as error:
            raise self._read_status(error) from error
        except openai.APITimeoutError as error:
            if type(error.__cause__).__name__ in _NEVER_REACHED:
                raise TryFailed("unreached", f"{self.url} cannot be reached (timeout)") from error
            raise TryFailed("timeout", f"{self.url} gave no reply in {timeout_s:g} s") from error
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            text = self._blot_key(str(cause)) or type(cause).__name__
            raise TryFailed("unreached", f"{self.url} cannot be reached ({text})") from error
        except TimeoutError as error:
            raise TryFailed("timeout", f"{self.url} gave no reply in {timeout_s:g} s") from error
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is not JSON or not UTF-8
            raise TryFailed("broken", f"{self.url}: the reply cannot be read: {self._blot_key(str(error))}") from error

    def _read_status(self, error: Any) -> EndpointError | RowRefused | TryFailed:
        status = error.status_code
        said = self._blot_key(_first_line(_message(error)))
        what = f"{self.url} answered {status}: {said}"
        if status in (401, 403):
            key = f"the key in {self.settings.api_key_env}" if self.settings.api_key_env else "no key was sent"
            return EndpointError(f"{what} ({key}); name the variable that holds a valid key by --api-key-env")
        if status == 404 or "model_not_found" in (error.code, error.type):
            return EndpointError(f"{what}; check --endpoint (the base URL, often ending in /v1) and --model")
        if status in _ROW_STATUS:
            return RowRefused(f"{status}: {said}")
        if status in _LIMITED_STATUS:
            return TryFailed("limited", what, _retry_after_s(error.response.headers))
        if status in _TIMEOUT_STATUS:
            return TryFailed("timeout", what)
        if status in _RETRIED_STATUS or status >= 500:
            return TryFailed("broken", what, _retry_after_s(error.response.headers))
        return EndpointError(f"{what}; no request can succeed so")

    def _blot_key(self, text: str) -> str:
        key = os.environ.get(self.settings.api_key_env) if self.settings.api_key_env else None
        return text.replace(key, "***") if key else text


def sampling_fields(sampling: SamplingConfig) -> dict[str, float | int]:
    """Return all fields of a request that say how to sample, also those that change nothing.

    For a field that a request leaves out SGLang and vLLM take what the model's `generation_config.json` says.
    """
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or -1,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "seed": sampling.seed,
    }


def import_openai() -> ModuleType:
    """Return the `openai` package.

    Raises:
        EndpointError: it is not installed.
    """
    try:
        import openai
    except ImportError as error:
        raise EndpointError(
            "asking endpoints needs the openai package, which is not installed; pip install 'domino_jax[endpoints]'"
        ) from error
    return openai


def connect(settings: EndpointSettings) -> list[Endpoint]:
    """Return the endpoints, each with a client that the caller closes; nothing is sent yet.

    Raises:
        EndpointError: the openai package is missing.
    """
    openai = import_openai()
    # A key is always given: the client would otherwise send the one in OPENAI_API_KEY to whoever listens there.
    key = os.environ[settings.api_key_env] if settings.api_key_env else "none"
    timeout_s = settings.request_timeout_s
    timeout = openai.Timeout(timeout_s, connect=min(_CONNECT_TIMEOUT_S, timeout_s))
    return [
        Endpoint(url, openai.AsyncOpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=0), settings)
        for url in settings.urls
    ]


def find_served_model(settings: EndpointSettings, monitor: RunMonitor) -> ServedModel:
    """Return the model that answers, as the endpoints that can be reached list it.

    Raises:
        EndpointError: none can be reached, the model is not listed by one of them, or none is named and they list
            several.
    """
    return asyncio.run(_find_served_model(settings, monitor))


async def _find_served_model(settings: EndpointSettings, monitor: RunMonitor) -> ServedModel:
    endpoints = connect(settings)
    try:
        for num_failed in range(1, settings.max_retries + 2):
            found = await asyncio.gather(*(e.list_models() for e in endpoints), return_exceptions=True)
            for result in found:
                if isinstance(result, BaseException) and not isinstance(result, TryFailed):
                    raise result
            listed = [(e, r) for e, r in zip(endpoints, found, strict=True) if isinstance(r, list)]
            if listed:
                break
            if num_failed <= settings.max_retries:
                await asyncio.sleep(settings.delay_s(num_failed))
        else:
            raise EndpointError(
                f"no endpoint answers after {settings.max_retries + 1} tries; start the server or check --endpoint:\n  "
                + "\n  ".join(str(failure) for failure in found)
            )
    finally:
        await asyncio.gather(*(e.client.close() for e in endpoints))
    picked: dict[str, Any] = {}
    for endpoint, models in listed:
        name = _pick_model(endpoint.url, [m.id for m in models], settings.model)
        picked[endpoint.url] = next(m for m in models if m.id == name)
    if len({m.id for m in picked.values()}) > 1:
        names = ", ".join(f"{url} serves {m.id!r}" for url, m in picked.items())
        raise EndpointError(f"the endpoints serve different models: {names}; all answers must come from one: --model")
    first = next(iter(picked.values()))
    root, context_len = getattr(first, "root", None), getattr(first, "max_model_len", None)
    for url, model in picked.items():
        if (getattr(model, "root", None), getattr(model, "max_model_len", None)) != (root, context_len):
            monitor.say(f"{url} tells another root or max_model_len of {model.id!r} than the first endpoint")
    return ServedModel(
        first.id,
        root if isinstance(root, str) else None,
        context_len if isinstance(context_len, int) else None,
        settings.urls,
    )


def _pick_model(url: str, listed: Sequence[str], wanted: str) -> str:
    names = ", ".join(repr(name) for name in listed)
    if wanted and wanted not in listed:
        raise EndpointError(f"{url} serves no model {wanted!r}, it lists {names}; give one of these by --model")
    if not wanted and len(listed) > 1:
        raise EndpointError(f"{url} lists {len(listed)} models: {names}; choose one by --model")
    return wanted or listed[0]


def _read_reply(completion: Any, url: str) -> Reply:
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise TryFailed("broken", f"{url}: the reply holds no choice")
    message, finish_reason = getattr(choices[0], "message", None), getattr(choices[0], "finish_reason", None)
    text = getattr(message, "content", None)
    thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    if message is None or not all(part is None or isinstance(part, str) for part in (text, thought)):
        raise TryFailed("broken", f"{url}: the reply holds no text")
    if finish_reason == "abort":  # the server gave the request up, as it does when it is shut down
        raise TryFailed("broken", f"{url}: the server aborted the request")
    num_tokens = getattr(getattr(completion, "usage", None), "completion_tokens", None)
    return Reply(text or "", thought or "", str(finish_reason), num_tokens if isinstance(num_tokens, int) else 0)


def _message(error: Any) -> str:
    body = error.body
    if isinstance(body, Mapping):
        nested = body.get("error")
        body = nested if isinstance(nested, Mapping) else body
        for name in ("message", "detail"):
            if isinstance(body.get(name), str):
                return body[name]
    return str(error)


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:300]


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        wait_s = float(value)
    except ValueError:
        try:
            wait_s = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(wait_s, 0.0), _MAX_RETRY_AFTER_S) if wait_s == wait_s else None
