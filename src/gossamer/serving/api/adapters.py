"""/v1/models, and loading and unloading adapters while serving."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request as HttpRequest

from gossamer.errors import ArtefactError, NonFiniteError
from gossamer.serving.api import told
from gossamer.serving.api.faults import Refusal, missing
from gossamer.serving.api.schema import Load, Unload
from gossamer.serving.api.service import Service, digests_of
from gossamer.serving.engine import Engine

router = APIRouter()


@router.get("/v1/models", response_model=told.Models, response_model_exclude_unset=True)
async def models(request: HttpRequest) -> dict[str, Any]:
    """The base, and the adapters that whoever asks may use."""
    service, tenant = _service(request), request.state.tenant
    listed = await service.worker.call(
        lambda engine: [_model(service, engine, name) for name in engine.store.names() if tenant.may(name)]
    )
    vectors = service.vectors
    if vectors and vectors.embedder:
        common = {"object": "model", "created": service.started, "owned_by": "gossamer"}
        listed.append(common | {"id": vectors.name, "root": vectors.name, "parent": None})
        for name, digest in sorted(vectors.embedder.digests.items()):
            if tenant.may(name):
                listed.append(common | {"id": name, "root": digest, "parent": vectors.name})
    return {"object": "list", "data": [_base(service), *listed]}


@router.get("/v1/models/{name:path}", response_model=told.Model, response_model_exclude_unset=True)
async def model(name: str, request: HttpRequest) -> dict[str, Any]:
    """One of them."""
    service = _service(request)
    if name == service.name:
        return _base(service)
    [adapter] = service.chosen(request.state.tenant, name)

    def look(engine: Engine) -> dict[str, Any]:
        if adapter not in engine.store.names():
            raise missing(name)
        return _model(service, engine, adapter)

    return await service.worker.call(look)


@router.post("/v1/load_lora_adapter", response_model=told.Changed)
async def load(asked: Load, request: HttpRequest) -> Response:
    """Read, check and offer an adapter from the server's folder. A failed load leaves what was there."""
    service, name = _service(request), asked.lora_name
    _check_admin(request)
    service.check_ready()
    if name == service.name:
        raise Refusal(400, "That is the name of the base.", "name_taken", param="lora_name")
    folder = service.inside(asked.lora_path)
    async with service.reading:  # one at a time: of two loads of a name, the second finds the first's
        if name in service.worker.names and not asked.load_inplace:
            message = f"An adapter {name!r} is there. Its replacement is loaded with load_inplace."
            raise Refusal(400, message, "name_taken", param="lora_name")
        engine = service.worker.engine
        assert engine
        try:
            loaded = await asyncio.wrap_future(engine.store.reader.submit(engine.store.prepare, name, folder))
        except (ArtefactError, NonFiniteError) as error:
            raise Refusal(400, f"The adapter cannot be used: {error.what}", error.code, param="lora_path") from None
        await service.worker.call(lambda engine: engine.store.put(loaded), renames=True)
        kept = await service.keep(name, folder)
    return JSONResponse({"status": "ok", "id": name, "digest": loaded.digest, "kept": kept})


@router.post("/v1/unload_lora_adapter", response_model=told.Changed)
async def unload(asked: Unload, request: HttpRequest) -> Response:
    """Forget an adapter. Requests that use it go on with it."""
    service, name = _service(request), asked.lora_name
    _check_admin(request)
    service.check_ready()
    async with service.reading:
        if name not in service.worker.names:
            raise missing(name)
        await service.worker.call(lambda engine: engine.store.unregister(name), renames=True)
        if service.fetching:
            service.fetching.revisions.pop(name, None)
        kept = await service.keep(name, None)
    return JSONResponse({"status": "ok", "id": name, "kept": kept})


def _service(request: HttpRequest) -> Service:
    return request.app.state.service


def _check_admin(request: HttpRequest) -> None:
    if not request.state.tenant.admin:
        raise Refusal(403, "This key may not do that.", "not_admin")


def _base(service: Service) -> dict[str, Any]:
    common = {"id": service.name, "object": "model", "created": service.started, "owned_by": "gossamer"}
    return common | {"root": service.name, "parent": None}


def _model(service: Service, engine: Engine, name: str) -> dict[str, Any]:
    about = digests_of(engine.store.describe(name))
    if service.fetching and name in service.fetching.revisions:
        about["revision"] = service.fetching.revisions[name]
    return _base(service) | {"id": name, "root": about["digest"], "parent": service.name, "gossamer": about}
