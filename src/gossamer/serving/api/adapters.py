"""/v1/models, and loading and unloading adapters while serving."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request as HttpRequest

from gossamer.errors import ArtefactError, NonFiniteError, UsageError
from gossamer.serving.api import told
from gossamer.serving.api.faults import Refusal, missing, unusable
from gossamer.serving.api.schema import Load, Unload
from gossamer.serving.api.service import Service, digests_of
from gossamer.serving.engine import Engine
from gossamer.serving.folder import Folder

router = APIRouter()


@router.get("/v1/models", response_model=told.Models, response_model_exclude_unset=True)
async def models(request: HttpRequest) -> dict[str, Any]:
    """The base, and the adapters that whoever asks may use."""
    service, tenant = _service(request), request.state.tenant
    listed = await service.worker.call(
        lambda engine: [_model(service, engine, name) for name in engine.store.usable() if tenant.may(name)]
    )
    if vectors := service.vectors:
        listed += [_vector_model(service, name) for name in vectors.names() if name == vectors.name or tenant.may(name)]
    return {"object": "list", "data": [_base(service), *listed]}


@router.get("/v1/models/{name:path}", response_model=told.Model, response_model_exclude_unset=True)
async def model(name: str, request: HttpRequest) -> dict[str, Any]:
    """One of them."""
    service = _service(request)
    if name == service.name:
        return _base(service)
    if (vectors := service.vectors) and vectors.knows(name):
        return _vector_model(service, vectors.chosen(request.state.tenant, name) or name)
    [adapter] = service.chosen(request.state.tenant, name)

    def look(engine: Engine) -> dict[str, Any]:
        if fault := engine.store.fault_of(adapter):
            raise unusable(adapter, fault)
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
    vectors = service.vectors
    if name == service.name or (vectors and name == vectors.name):
        raise Refusal(400, "That is the name of a base.", "name_taken", param="lora_name")
    folder, shelf = service.inside(asked.lora_path)
    async with service.reading:  # one at a time: of two loads of a name, the second finds the first's
        is_vectors = vectors is not None and shelf is vectors.folder
        there = name in service.worker.names, bool(vectors and vectors.knows(name))
        if there[not is_vectors]:
            raise Refusal(400, "An adapter of the other base has this name.", "name_taken", param="lora_name")
        if any(there) and not asked.load_inplace:
            message = f"An adapter {name!r} is there. Its replacement is loaded with load_inplace."
            raise Refusal(400, message, "name_taken", param="lora_name")
        try:
            if vectors and is_vectors:
                digest = await vectors.register(name, folder)
            else:
                digest = await _put(service, name, folder)
        except (ArtefactError, NonFiniteError, UsageError) as error:
            raise unusable(name, error, param="lora_path") from None
        service.forgotten.discard(name)
        kept = await asyncio.to_thread(shelf.keep, name, folder)
    return JSONResponse({"status": "ok", "id": name, "digest": digest, "kept": kept})


async def _put(service: Service, name: str, folder: Path) -> str:
    """Let a name of the completions' base mean what lies in a folder; gives its digest."""
    engine = service.worker.engine
    assert engine
    loaded = await asyncio.wrap_future(engine.store.reader.submit(engine.store.prepare, name, folder))
    await service.worker.call(lambda engine: engine.store.put(loaded), renames=True)
    return loaded.digest


@router.post("/v1/unload_lora_adapter", response_model=told.Changed)
async def unload(asked: Unload, request: HttpRequest) -> Response:
    """Forget an adapter. Requests that use it go on with it."""
    service, name = _service(request), asked.lora_name
    _check_admin(request)
    service.check_ready()
    vectors = service.vectors
    async with service.reading:
        if vectors and name != vectors.name and vectors.knows(name):
            await vectors.unregister(name)
            kept = await _keep_none(vectors.folder, name)
        elif name in service.worker.names:
            await service.worker.call(lambda engine: engine.store.unregister(name), renames=True)
            if service.fetching:
                service.fetching.revisions.pop(name, None)
            service.forgotten.add(name)
            kept = await _keep_none(service.folder, name)
        else:
            raise missing(name)
    return JSONResponse({"status": "ok", "id": name, "kept": kept})


async def _keep_none(folder: Folder | None, name: str) -> bool:
    return bool(folder) and await asyncio.to_thread(folder.keep, name, None)


def _vector_model(service: Service, name: str) -> dict[str, Any]:
    """The base of vectors, or one of its adapters."""
    vectors = service.vectors
    assert vectors
    digest = vectors.digests.get(name)
    return _base(service) | {"id": name, "root": digest or name, "parent": vectors.name if digest else None}


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
