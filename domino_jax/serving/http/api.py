"""The HTTP API: an OpenAI-compatible app over an engine and a tokenizer."""

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

import domino_jax
from domino_jax.serving.contract import Engine
from domino_jax.serving.http.answer import Answer, unavailable
from domino_jax.serving.http.answer_json import AnswerForm, ChatForm, CompletionForm, to_text
from domino_jax.serving.http.api_description import describe_answers, describe_api, describe_body_route
from domino_jax.serving.http.body_reader import BodyReader
from domino_jax.serving.http.errors import ApiError, shorten
from domino_jax.serving.http.event_router import EventRouter
from domino_jax.serving.http.event_stream import EventStream, watch_disconnect
from domino_jax.serving.http.http_guard import HttpGuard
from domino_jax.serving.http.json_log import log_event
from domino_jax.serving.http.metrics import ServerMetrics
from domino_jax.serving.http.page_policy import make_policy, read_page
from domino_jax.serving.http.request_plan import Planner, Prompt, RequestPlan, check_ids, messages_for_template
from domino_jax.serving.http.request_types import (
    RESERVED_TEMPLATE_NAMES,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Message,
    TokenizeBody,
)
from domino_jax.serving.http.response_types import (
    ChatAnswer,
    ChatChunk,
    CompletionAnswer,
    CompletionChunk,
    DetokenizeAnswer,
    ModelCard,
    ModelList,
    StatusAnswer,
    TokenizeAnswer,
)
from domino_jax.serving.http.settings import ApiSettings
from domino_jax.serving.http.text_codec import TextCodec

_STOP_TIMEOUT_S = 10.0


def create_app(engine: Engine, codec: TextCodec, settings: ApiSettings) -> FastAPI:
    """Return the app; the engine is started with it and stopped with it.

    `app.state.service` is the `Service` behind the routes.
    """
    service = Service(engine, codec, settings)
    app = FastAPI(
        title="domino_jax",
        version=domino_jax.__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lambda app: service.run(),
    )
    app.state.service = service
    app.openapi = lambda: describe_api(app, bool(settings.api_keys))
    service.add_routes(app)
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(HttpGuard, settings=settings)
    return app


class Service:
    """What the routes do.

    Attributes:
        is_draining: no new requests are taken.
    """

    def __init__(self, engine: Engine, codec: TextCodec, settings: ApiSettings) -> None:
        """Serve `engine`."""
        self.engine, self.codec, self.settings = engine, codec, settings
        self.router = EventRouter(engine)
        self.metrics = ServerMetrics(engine, settings.model_id)
        self.is_draining = False
        self._planner = Planner(engine, codec, settings, self.router.new_id)
        self._reader = BodyReader(settings)
        self._page = read_page()
        self._page_policy = make_policy(self._page)

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Run the engine while the app runs."""
        self.router.bind(asyncio.get_running_loop())
        self.engine.start(self.router.deliver, self.metrics.observe_call)
        try:
            yield
        finally:
            await self._stop_engine()

    async def _stop_engine(self) -> None:
        # A thread of its own that nobody waits for: a device call that hangs must not keep the process alive.
        stopper = threading.Thread(target=self.engine.stop, name="engine-stop", daemon=True)
        stopper.start()
        ends_s = time.monotonic() + _STOP_TIMEOUT_S
        while stopper.is_alive() and time.monotonic() < ends_s:
            await asyncio.sleep(0.01)
        if stopper.is_alive():
            log_event("engine_hangs", level=logging.ERROR, waited_s=_STOP_TIMEOUT_S)

    def drain(self) -> None:
        """Take no further requests."""
        self.is_draining = True
        self.engine.drain()

    def abort(self) -> None:
        """End the open requests with an error."""
        self.router.cancel_all()

    def add_routes(self, app: FastAPI) -> None:
        """Add every route."""
        chat = describe_body_route(ChatBody, ChatAnswer, ChatChunk)
        completion = describe_body_route(CompletionBody, CompletionAnswer, CompletionChunk)
        app.post("/v1/chat/completions", **chat)(self.chat)
        app.post("/v1/completions", **completion)(self.complete)
        app.get("/v1/models", responses=describe_answers(ModelList))(self.list_models)
        app.get("/v1/models/{model:path}", responses=describe_answers(ModelCard, 404))(self.show_model)
        app.post("/tokenize", **describe_body_route(TokenizeBody, TokenizeAnswer))(self.tokenize)
        app.post("/detokenize", **describe_body_route(DetokenizeBody, DetokenizeAnswer))(self.detokenize)
        app.get("/health", responses=describe_answers(StatusAnswer))(self.health)
        app.get("/ready", responses=describe_answers(StatusAnswer))(self.ready)
        app.get("/metrics", response_class=PlainTextResponse, responses=describe_answers(None))(self.show_metrics)
        app.get("/", include_in_schema=False)(self.page)

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        body = await self._reader.read(request, ChatBody)
        self._check_takes(body.model)
        ids = await self._encode_chat(body.messages, body.chat_template_kwargs)
        plan = self._planner.plan_chat(body, ids)
        return await self._generate(request, plan, "chatcmpl", ChatForm)

    async def complete(self, request: Request) -> Response:
        """Complete one prompt or several."""
        body = await self._reader.read(request, CompletionBody)
        self._check_takes(body.model)
        prompts = await self._read_prompts(body)
        plan = self._planner.plan_completion(body, prompts)
        return await self._generate(request, plan, "cmpl", CompletionForm)

    async def list_models(self) -> Response:
        """List the served model."""
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def show_model(self, model: str) -> Response:
        """Describe a model."""
        self._check_model(model)
        return JSONResponse(self._model_card())

    async def tokenize(self, request: Request) -> Response:
        """Return the token ids of a text or chat."""
        body = await self._reader.read(request, TokenizeBody)
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", "prompt")
        if body.messages is not None:
            ids = await self._encode_chat(body.messages, body.chat_template_kwargs)
        else:
            adds = True if body.add_special_tokens is None else body.add_special_tokens
            ids = await self._encode(body.prompt or "", adds)
        return JSONResponse({"count": len(ids), "max_model_len": self.engine.max_model_len, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        """Return the text of token ids."""
        body = await self._reader.read(request, DetokenizeBody)
        self._check_model(body.model)
        check_ids(body.tokens, self.engine.vocab_size, "tokens")
        return JSONResponse({"prompt": self.codec.decode(body.tokens)})

    async def health(self) -> Response:
        """Tell whether the process lives."""
        if self.engine.status().failure is not None:
            raise ApiError(503, "the engine has failed", code="engine_failed")
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Tell whether requests are taken."""
        self._check_ready()
        return JSONResponse({"status": "ready"})

    async def show_metrics(self) -> Response:
        """Return the metrics for Prometheus."""
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self) -> Response:
        """Return the page."""
        headers = {"content-security-policy": self._page_policy, "cache-control": "no-cache"}
        return Response(self._page, media_type="text/html; charset=utf-8", headers=headers)

    async def _generate(self, request: Request, plan: RequestPlan, prefix: str, form_type: type) -> Response:
        arrived_s = request.scope["state"]["arrived_s"]
        answer = Answer(
            answer_id=f"{prefix}-{secrets.token_hex(12)}",
            model_id=self.settings.model_id,
            plan=plan,
            codec=self.codec,
            router=self.router,
            metrics=self.metrics,
            arrived_s=arrived_s,
            deadline_s=arrived_s + self.settings.request_timeout_s,
            keep_alive_s=self.settings.keep_alive_comment_s,
            record=request.scope["state"]["record"],
        )
        form: AnswerForm = form_type(answer)
        answer.submit()
        if plan.streams:
            return EventStream(answer, form)
        try:
            async with watch_disconnect(request.receive, answer):
                async for events in answer.events():
                    for event in events:
                        answer.take(event)
        finally:
            answer.close("disconnected")
        return Response(to_text(form.to_json()), media_type="application/json")

    async def _encode_chat(self, messages: Sequence[Message], template_kwargs: dict | None) -> list[int]:
        rows = messages_for_template(messages, self.settings)
        for name in sorted(RESERVED_TEMPLATE_NAMES.intersection(template_kwargs or ())):
            where = f"chat_template_kwargs.{name}"
            raise ApiError(400, f"{where} is not supported; leave it out", where, "unsupported_parameter")
        try:
            return await asyncio.to_thread(self.codec.encode_chat, rows, template_kwargs or {})
        except ValueError as error:
            raise ApiError(400, str(error), "messages") from error

    async def _encode(self, text: str, adds_special: bool = True) -> list[int]:
        return await asyncio.to_thread(self.codec.encode_text, text, adds_special)

    async def _read_prompts(self, body: CompletionBody) -> list[Prompt]:
        given = body.prompt
        is_one = isinstance(given, str) or isinstance(given[0], int)
        prompts = []
        for one in [given] if is_one else given:
            if isinstance(one, str):
                prompts.append(Prompt(await self._encode(one), one))
            else:
                check_ids(one, self.engine.vocab_size, "prompt")
                prompts.append(Prompt(one))
            if not prompts[-1].ids:
                raise ApiError(400, "prompt is empty; give at least one token", "prompt")
        return prompts

    def _check_takes(self, model: str | None) -> None:
        self._check_model(model)
        self._check_ready()

    def _check_ready(self) -> None:
        status = self.engine.status()
        if status.failure is not None:
            raise unavailable("the engine has failed")
        if self.is_draining:
            raise unavailable("the server is shutting down")
        if not status.is_ready:
            raise unavailable(
                f"the server is loading: {status.progress}" if status.progress else "the server is loading"
            )

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self.settings.model_id:
            raise ApiError(
                404,
                f"the model {shorten(model)} is not served here; {shorten(self.settings.model_id)} is",
                "model",
                "model_not_found",
            )

    def _model_card(self) -> dict[str, object]:
        return {
            "id": self.settings.model_id,
            "object": "model",
            "created": 0,
            "owned_by": "domino_jax",
            "max_model_len": self.engine.max_model_len,
        }


async def _answer_api_error(request: Request, error: ApiError) -> Response:
    return error.to_response()


async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    messages = {404: "there is nothing at this path", 405: f"{shorten(request.method)} is not allowed at this path"}
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=dict(error.headers or {})).to_response()


async def _answer_validation_error(request: Request, error: RequestValidationError) -> Response:
    return ApiError(400, "a path or query parameter is not valid").to_response()
