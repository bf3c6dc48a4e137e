"""The app: an engine, who may use it, and the routes to it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from gossamer import __version__
from gossamer.errors import GossamerError
from gossamer.serving.api.backends import CompletionBackend, Vectors
from gossamer.serving.api.faults import ClientGone, Refusal, refusal
from gossamer.serving.api.keys import Keyring
from gossamer.serving.api.limits import Gate, HttpLimits
from gossamer.serving.api.metrics import Metrics
from gossamer.serving.api.responses import ERRORS
from gossamer.serving.api.routes import router
from gossamer.serving.api.service import Service
from gossamer.serving.api.worker import Worker
from gossamer.serving.engine import Engine
from gossamer.serving.folder import Folder, check_names
from gossamer.serving.hub import Hub


def create_app(
    engine: Engine | Callable[[], Engine],
    *,
    name: str = "base",
    keyring: Keyring | None = None,
    folder: str | Path | None = None,
    bounds: HttpLimits | None = None,
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
    ring, limits, metrics = keyring or Keyring(), bounds or HttpLimits(), Metrics()
    other = vectors.name if vectors else None
    check_names(name, engine.store.names() if isinstance(engine, Engine) else (), other)

    def make() -> Engine:
        made = engine if isinstance(engine, Engine) else engine()
        check_names(name, made.store.names(), other)
        return made

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        worker = Worker(make)
        completions = CompletionBackend(name, worker, Folder(folder) if folder else None, hub, vectors)
        app.state.service = service = Service(completions, vectors, limits, metrics)
        worker.start()
        service.loading = asyncio.ensure_future(_loaded(service))
        if isinstance(engine, Engine):
            await service.loading
        try:
            yield
        finally:
            service.draining = True
            service.loading.cancel()
            await worker.close()
            for one in service.backends:
                one.close()

    app = FastAPI(title="Gossamer", version=__version__, docs_url=None, redoc_url=None, lifespan=life, responses=ERRORS)
    app.include_router(router)
    app.add_middleware(Gate, keyring=ring, limits=limits, count=metrics.answered)
    for kind in (GossamerError, Refusal, ClientGone, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _failed)
    return app


async def _loaded(service: Service) -> None:
    """Until everything is there; raises what loading it raised."""
    worker, vectors = service.worker, service.vectors
    await worker.loaded.wait()
    if worker.engine is None and worker.fault:
        raise worker.fault
    if vectors:
        await vectors.start()
        check_names(service.completions.name, worker.names, vectors.name, vectors.names)


async def _failed(request: HttpRequest, error: Exception) -> Response:
    """The answer to a request that raised."""
    if isinstance(error, ClientGone):
        request.app.state.service.metrics.cancelled.inc()
        return Response(status_code=499)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if isinstance(error, RequestValidationError) and kind != "application/json" and not kind.endswith("+json"):
        message = "Bodies are JSON: send the header Content-Type: application/json."
        error = Refusal(415, message, "unsupported_media_type")
    return refusal(error).response()
