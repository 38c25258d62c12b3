"""The endpoints."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from diablo.data.rows import MEND_UNICODE, is_unicode
from diablo.errors import UserError
from diablo.serving.adapters import Adapter
from diablo.serving.engine import ClosedError, Engine
from diablo.web.answers import Answer, ChatAnswer, CompletionAnswer, event
from diablo.web.asking import Asked, Asking
from diablo.web.bodies import ChatRequest, CompletionRequest, LoadRequest, UnloadRequest, parsed
from diablo.web.faults import ADAPTER_STATUS, ApiError, refused
from diablo.web.log import note
from diablo.web.metrics import CONTENT_TYPE, Metrics
from diablo.web.rates import Charge, Rate, TooMuch
from diablo.web.rows import Rows

# The status that logs and metrics have for a client that went away, by the custom of nginx.
_GONE = 499
Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass
class Access:
    """Who may ask, and for how much at once.

    Attributes:
        api_keys: keys of which clients have to name one; none where they need none.
        is_loopback: whether only this machine can ask.
        body: the most bytes of a request's body.
        requests: the most requests for completions that a client has answered in a minute; None for any number. A
            client is known by its key, or by its address where there are no keys.
        tokens: the most tokens that a client has read and written in a minute; None for any number.
    """

    api_keys: Sequence[str] = field(default=(), repr=False)
    is_loopback: bool = True
    body: int = 4 << 20
    requests: int | None = None
    tokens: int | None = None


class Server:
    """The endpoints over an engine.

    Args:
        engine: the engine, which runs.
        asking: reads requests.
        tokenizer: names tokens; the engine uses another one.
        access: who may ask.

    Attributes:
        app: the ASGI application.
        metrics: what has been done.
        is_closing: whether no further requests are taken.
    """

    def __init__(self, engine: Engine, asking: Asking, tokenizer: Any, access: Access) -> None:
        self._engine, self._asking, self._tokenizer, self._access = engine, asking, tokenizer, access
        self._requests = None if access.requests is None else Rate(access.requests)
        self._tokens = None if access.tokens is None else Rate(access.tokens)
        self.metrics = Metrics(engine)
        self.is_closing = False
        self._started = int(time.time())
        self._page = (files("diablo.web") / "chat.html").read_text(encoding="utf-8")
        # Tokenizers are not made for several threads, and long prompts would keep the event loop busy.
        self._reading = asyncio.Lock()
        guarded = self._guarded
        hosts = ["localhost", "127.0.0.1", "::1", "[::1]"] if access.is_loopback else ["*"]
        self.app = Starlette(
            routes=[
                Route("/", self._show_page),
                Route("/health", self._show_health),
                Route("/metrics", guarded(self._show_metrics)),
                Route("/v1/models", guarded(self._list_models)),
                Route("/v1/models/{name:path}", guarded(self._show_model), methods=["GET"]),
                Route("/v1/models/{name:path}", guarded(self._delete_model), methods=["DELETE"]),
                Route("/v1/completions", guarded(self._complete), methods=["POST"]),
                Route("/v1/chat/completions", guarded(self._chat), methods=["POST"]),
                Route("/v1/load_lora_adapter", guarded(self._load), methods=["POST"]),
                Route("/v1/unload_lora_adapter", guarded(self._unload), methods=["POST"]),
            ],
            # A page of another site could give this machine a name of its own, and then read what it answers.
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
            exception_handlers={HTTPException: _not_routed},
        )

    def _guarded(self, endpoint: Endpoint) -> Endpoint:
        """An endpoint behind the key, whose errors are OpenAI's, and which is counted."""

        async def answer(request: Request) -> Response:
            path = request.scope["path"] if "name" not in request.path_params else "/v1/models"
            start = time.perf_counter()
            try:
                self._check_key(request)
                response = await endpoint(request)
            except ApiError as error:
                response = error.response()
                note("refused", path=path, status=error.status, code=error.code, message=_first_words(str(error)))
            except ClientDisconnect:
                response = Response(status_code=_GONE)
            except Exception as error:
                note("error", logging.ERROR, path=path, error=f"{type(error).__name__}: {error}")
                logging.getLogger("diablo.web").exception("traceback")
                response = ApiError(500, "The server has failed; its log says how.").response()
            if not isinstance(response, StreamingResponse):
                self._count(path, response.status_code, time.perf_counter() - start)
            return response

        return answer

    def _check_key(self, request: Request) -> None:
        """Check the key that a request names, and note in its state who asks."""
        request.state.client = request.client.host if request.client is not None else None
        if not self._access.api_keys:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        # All are compared, so that the time does not tell which one a wrong key is like.
        same = [hmac.compare_digest(given.encode(), key.encode()) for key in self._access.api_keys]
        if kind.lower() != "bearer" or not any(same):
            raise ApiError(401, "The API key is missing or wrong; send it as a bearer token.", code="invalid_api_key")
        request.state.client = same.index(True)

    def _charged(self, request: Request, rate: Rate | None, what: str, amount: int) -> Charge | None:
        """Count something that a request takes, where that is limited.

        Raises:
            ApiError: its client would exceed the limit.
        """
        if rate is None:
            return None
        found = rate.take(request.state.client, amount)
        if not isinstance(found, TooMuch):
            return found
        self.metrics.limited[what] += 1
        if found.seconds is None:
            message = f"The request may take {amount} {what}, and {rate.most} a minute are allowed; ask for less."
        else:
            message = f"More than {rate.most} {what} a minute were asked for; ask again in {found.seconds} seconds."
        raise ApiError(429, message, code="rate_limit_exceeded", retry_after=found.seconds)

    def _count(self, path: str, status: int, seconds: float) -> None:
        self.metrics.requests[path, status] += 1
        if path.endswith("completions") and status == 200:
            self.metrics.whole.add(seconds)

    async def _show_page(self, _: Request) -> Response:
        # Nothing but what is in the page may be loaded or asked, whatever a model writes.
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(self._page, headers={"Content-Security-Policy": policy})

    async def _show_health(self, _: Request) -> Response:
        state = "closing" if self.is_closing else "ok" if self._engine.is_alive else "failed"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def _show_metrics(self, _: Request) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type=CONTENT_TYPE)

    async def _list_models(self, _: Request) -> Response:
        known = [None, *self._engine.adapters.known()]
        async with self._reading:
            data = await asyncio.to_thread(lambda: list(map(self._model, known)))
        return JSONResponse({"object": "list", "data": data})

    async def _show_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        adapter = None if name == self._asking.base else self._engine.adapters.get(name)
        if adapter is None and name != self._asking.base:
            self._asking.adapter(name)
        return JSONResponse(self._model(adapter))

    def _model(self, adapter: Adapter | None) -> dict[str, Any]:
        try:
            form, fault = self._asking.prompts.of(adapter).form, None if adapter is None else adapter.fault
        except UserError as error:
            form, fault = "completions", str(error)
        return {
            "id": self._asking.base if adapter is None else adapter.name,
            "object": "model",
            "created": self._started,
            "owned_by": "diablo",
            "parent": None if adapter is None else self._asking.base,
            "form": form,
            "fault": fault,
        }

    async def _complete(self, request: Request) -> Response:
        self._charged(request, self._requests, "requests", 1)
        body = parsed(CompletionRequest, await self._body(request))
        return await self._answer(request, body, CompletionAnswer, lambda: self._asking.completion(body))

    async def _chat(self, request: Request) -> Response:
        self._charged(request, self._requests, "requests", 1)
        body = parsed(ChatRequest, await self._body(request))
        return await self._answer(request, body, ChatAnswer, lambda: self._asking.chat(body))

    async def _answer(
        self,
        request: Request,
        body: CompletionRequest | ChatRequest,
        kind: type[Answer],
        read: Callable[[], Asked],
    ) -> Response:
        start = time.perf_counter()
        if body.stream_options is not None and not body.stream:
            raise refused("stream_options: found without stream; set stream to true.", "stream_options")
        async with self._reading:
            asked = await asyncio.to_thread(read)
        most = asked.prompt_tokens + sum(ask.most for ask in asked.asks)
        charge = self._charged(request, self._tokens, "tokens", most)
        try:
            rows = Rows(self._engine, asked.adapter, asked.asks, asked.prompt_tokens, charge)
        except ApiError:
            if charge is not None:
                charge.amount = 0
            raise
        answer = kind(body.model, self._tokenizer, len(asked.asks))
        pieces = rows.pieces()
        # An error before the first token has its own status, also where a stream is asked for.
        first = await _unless_gone(request, anext(pieces))
        if body.stream:
            told = self._told(request, body, answer, rows, first, pieces, start)
            return StreamingResponse(told, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        answer.add(*first)

        async def collect() -> None:
            async for piece in pieces:
                answer.add(*piece)

        await _unless_gone(request, collect())
        self._note(request, answer, rows, 200, start)
        return JSONResponse(answer.whole(rows.usage()))

    async def _told(
        self,
        request: Request,
        body: CompletionRequest | ChatRequest,
        answer: Answer,
        rows: Rows,
        first: tuple[int, Any],
        pieces: AsyncIterator[tuple[int, Any]],
        start: float,
    ) -> AsyncIterator[str]:
        """The events of a stream."""
        status = _GONE
        try:
            for opening in answer.openings():
                yield event(opening)
            if (chunk := answer.chunk(*first)) is not None:
                yield event(chunk)
            async for piece in pieces:
                if (chunk := answer.chunk(*piece)) is not None:
                    yield event(chunk)
            if body.stream_options is not None and body.stream_options.include_usage:
                yield event(answer.usage_chunk(rows.usage()))
            status = 200
            yield event("[DONE]")
        except ApiError as error:
            status = error.status
            yield event(error.body())
        finally:
            # Where the client has gone, this is where its rows are let go.
            await pieces.aclose()  # pyrefly: ignore[missing-attribute]
            self._count(request.scope["path"], status, time.perf_counter() - start)
            self._note(request, answer, rows, status, start)

    def _note(self, request: Request, answer: Answer, rows: Rows, status: int, start: float) -> None:
        if rows.first is not None:
            self.metrics.first_token.add(rows.first)
        note(
            "answered" if status == 200 else "ended",
            id=answer.id,
            path=request.scope["path"],
            model=answer.model,
            status=status,
            **{key: value for key, value in rows.usage().items() if key != "total_tokens"},
            first_token_s=None if rows.first is None else round(rows.first, 4),
            seconds=round(time.perf_counter() - start, 4),
            ends=rows.ends,
        )

    async def _load(self, request: Request) -> Response:
        self._check_may_load()
        body = parsed(LoadRequest, await self._body(request))
        await self._add(body.lora_name, Path(body.lora_path), replace=body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def _unload(self, request: Request) -> Response:
        self._check_may_load()
        body = parsed(UnloadRequest, await self._body(request))
        self._remove(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def _delete_model(self, request: Request) -> Response:
        self._check_may_load()
        name = request.path_params["name"]
        self._remove(name)
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    def _check_may_load(self) -> None:
        if not self._access.api_keys and not self._access.is_loopback:
            raise ApiError(
                403,
                "Adapters come and go by requests only where the server has an API key, or listens to this machine "
                "alone; start it with --api-key.",
                code="not_allowed",
            )

    async def _add(self, name: str, folder: Path, *, replace: bool) -> None:
        if name == self._asking.base:
            raise refused(f"lora_name: {name!r} is the base model; give another name.", "lora_name")
        if not folder.is_dir():
            raise refused(f"lora_path: there is no folder {str(folder)!r} on the server.", "lora_path")
        if not replace and self._engine.adapters.get(name) is not None:
            message = f"lora_name: there is an adapter {name!r} already; unload it, or set load_inplace to true."
            raise refused(message, "lora_name")
        try:
            added = self._engine.call(lambda: self._engine.adapters.add(name, folder, replace=replace))
            await asyncio.wrap_future(added)
        except UserError as error:
            raise ApiError(ADAPTER_STATUS, str(error), param="lora_path", code="adapter") from None
        except ClosedError as error:
            raise ApiError(503, str(error), code="closing") from None
        note("adapter added", adapter=name, folder=str(folder))

    def _remove(self, name: str) -> None:
        if name == self._asking.base:
            raise refused(f"model: {name!r} is the base model, which stays.", "model")
        if self._engine.adapters.remove(name) is None:
            raise ApiError(404, f"model: there is no adapter {name!r}.", param="model", code="model_not_found")
        note("adapter removed", adapter=name)

    async def _body(self, request: Request) -> Any:
        """The object that a request sends.

        Raises:
            ApiError: it is too large, or no JSON.
        """
        # Browsers send such a body to another site only after having asked, which is not answered here.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "The body's type is not application/json; send JSON.", code="unsupported_media_type")
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self._access.body:
                message = f"The body has more than {self._access.body} bytes, the most that this server reads."
                raise ApiError(413, message, code="body_too_large")
            parts.append(part)
        try:
            given = json.loads(b"".join(parts))
        except (ValueError, RecursionError) as error:
            raise refused(f"The body is no JSON: {error}.", None, "invalid_json") from None
        if not is_unicode(json.dumps(given, ensure_ascii=False)):
            raise refused(f"The body has text that is no Unicode: {MEND_UNICODE}.", None, "invalid_json")
        return given


async def _unless_gone(request: Request, work: Any) -> Any:
    """What work comes to, which is given up where the client goes away.

    Raises:
        ClientDisconnect: it has.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    doing, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientDisconnect
    finally:
        for task in (doing, watching):
            task.cancel()
        await asyncio.wait({doing, watching})


async def _not_routed(request: Request, error: Exception) -> Response:
    """The error for a path or a method that there is not."""
    status = getattr(error, "status_code", 404)
    what = "does not take this method" if status == 405 else "is no path of this server"
    return ApiError(status, f"{request.scope['path']} {what}; its endpoints are listed in docs/serve.md.").response()


def _first_words(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
