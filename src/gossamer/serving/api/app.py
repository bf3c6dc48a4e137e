"""The app: an engine, who may use it, and the routes to it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from gossamer import __version__
from gossamer.errors import GossamerError
from gossamer.serving.api import adapters, completions, routes
from gossamer.serving.api import vectors as embeddings
from gossamer.serving.api.faults import Refusal, refusal
from gossamer.serving.api.fetching import Fetching
from gossamer.serving.api.keys import Keyring
from gossamer.serving.api.limits import Bounds, Gate
from gossamer.serving.api.metrics import Metrics
from gossamer.serving.api.openais import reason
from gossamer.serving.api.service import Gone, Service
from gossamer.serving.api.told import ERRORS
from gossamer.serving.api.vectors import Vectors
from gossamer.serving.api.worker import Worker
from gossamer.serving.engine import Engine
from gossamer.serving.folder import Folder
from gossamer.serving.hub import Hub
from gossamer.serving.names import check_names


def create_app(
    engine: Engine | Callable[[], Engine],
    *,
    name: str = "base",
    keyring: Keyring | None = None,
    folder: str | Path | None = None,
    bounds: Bounds | None = None,
    vectors: Vectors | None = None,
    hub: Hub | None = None,
) -> FastAPI:
    """An ASGI app that serves an engine; its life is the app's.

    Args:
        engine: or what makes it, called in the engine's own thread once the app has started: until it is there,
            /health says yes and /ready no.
        name: of the base, for clients.
        keyring: who may do what. Without one, everybody who reaches the app by a name of this machine may do all.
        folder: where adapters that are loaded while serving must lie, and where it is kept what their names mean;
            without one, none can be loaded.
        bounds: of requests.
        vectors: answers /v1/embeddings.
        hub: which adapters may be asked for by their id on the Hugging Face hub; without one, none.

    Raises: UsageError for one name of two models, or one that cannot be asked for; or starting does.
    """
    ring, limits, metrics = keyring or Keyring(), bounds or Bounds(), Metrics()

    check_names(name, engine.store.names() if isinstance(engine, Engine) else (), vectors and vectors.name)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        worker = Worker(lambda: _checked(engine, name, vectors))
        fetching = Fetching(hub, worker) if hub else None
        app.state.service = service = Service(
            worker, ring, limits, metrics, name, Folder(folder) if folder else None, vectors, fetching
        )
        worker.start()
        service.loading = asyncio.ensure_future(_loaded(worker, name, vectors))
        if isinstance(engine, Engine):
            await service.loading
        try:
            yield
        finally:
            service.draining = True
            service.loading.cancel()
            await worker.close()
            if fetching:
                fetching.close()
            if vectors:
                vectors.close()

    app = FastAPI(title="Gossamer", version=__version__, docs_url=None, redoc_url=None, lifespan=life, responses=ERRORS)
    for room in (completions, adapters, embeddings, routes):
        app.include_router(room.router)
    app.add_middleware(Gate, keyring=ring, bounds=limits, count=metrics.answered)
    for kind, handler in ((GossamerError, _known), (Refusal, _known), (RequestValidationError, _invalid)):
        app.add_exception_handler(kind, handler)
    app.add_exception_handler(HTTPException, _plain)
    app.add_exception_handler(Gone, _gone)
    return app


def _checked(engine: Engine | Callable[[], Engine], name: str, vectors: Vectors | None) -> Engine:
    """The engine, if its names and the base's are each of one model. Raises `UsageError`."""
    made = engine if isinstance(engine, Engine) else engine()
    check_names(name, made.store.names(), vectors and vectors.name)
    return made


async def _loaded(worker: Worker, name: str, vectors: Vectors | None) -> None:
    """Until everything is there; raises what loading it raised."""
    await worker.loaded.wait()
    if worker.engine is None and worker.fault:
        raise worker.fault
    if vectors:
        await vectors.start()
        check_names(name, worker.names, vectors.name, vectors.digests)


async def _known(_: HttpRequest, error: Exception) -> JSONResponse:
    return refusal(error).response()


async def _gone(request: HttpRequest, _: Exception) -> Response:
    """Nobody hears it; the metrics count it."""
    request.app.state.service.metrics.cancelled.inc()
    return Response(status_code=499)


async def _invalid(request: HttpRequest, error: Exception) -> JSONResponse:
    """The first fault of a body: which field, and what is wrong with it; not what was in it."""
    assert isinstance(error, RequestValidationError)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        message = "Bodies are JSON: send the header Content-Type: application/json."
        return Refusal(415, message, "unsupported_media_type").response()
    faults = error.errors()
    # of the members of a union the one that was followed furthest says what is meant
    first = max((one for one in faults if one["loc"][:2] == faults[0]["loc"][:2]), key=lambda one: len(one["loc"]))
    # what pydantic calls the members of a union is no part of the field's name
    parts = [str(part) for part in first["loc"][1:] if isinstance(part, int) or re.fullmatch(r"\w{1,64}", part)]
    place = ".".join(parts)[:256]
    message = "This field is not known." if first["type"] == "extra_forbidden" else first["msg"]
    if why := reason(place):
        message = f"This is not supported: {why}."
    return Refusal(400, f"{place or 'body'}: {message}"[:512], "invalid_request", param=place or None).response()


async def _plain(_: HttpRequest, error: Exception) -> JSONResponse:
    """FastAPI's own: no such route, a method that a route has not, a body that is no JSON."""
    assert isinstance(error, HTTPException)
    words = {404: "There is no such route.", 405: "This route has other methods.", 400: "The body is not JSON."}
    status = error.status_code
    return Refusal(status, words.get(status, "This cannot be answered."), f"http_{status}").response()
