"""All routes, and what each promises."""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request as HttpRequest

from gossamer import __version__
from gossamer.serving.api import responses
from gossamer.serving.api.faults import Refusal
from gossamer.serving.api.handlers import ChatHandler, CompletionHandler, EmbeddingHandler
from gossamer.serving.api.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from gossamer.serving.api.service import Service
from gossamer.serving.engine import Engine

router = APIRouter()


def _service(request: HttpRequest, *, admin: bool = False) -> Service:
    if admin and not request.state.tenant.admin:
        raise Refusal(403, "This key may not do that.", "not_admin")
    return request.app.state.service


@router.post("/v1/chat/completions", response_model=responses.ChatCompletion, responses=responses.STREAMS)
async def chat(body: ChatRequest, request: HttpRequest) -> Response:
    """Go on with a conversation."""
    return await ChatHandler(request, body).answer()


@router.post("/v1/completions", response_model=responses.TextCompletion, responses=responses.STREAMS)
async def completions(body: CompletionRequest, request: HttpRequest) -> Response:
    """Go on with texts, or with token ids."""
    return await CompletionHandler(request, body).answer()


@router.post("/v1/embeddings", response_model=responses.EmbeddingList)
async def embeddings(body: EmbeddingRequest, request: HttpRequest) -> Response:
    """Vectors of texts or token ids, from the base or from one of its adapters."""
    return await EmbeddingHandler(request, body).answer()


@router.get("/v1/models", response_model=responses.ModelList)
async def models(request: HttpRequest) -> Response:
    """The bases, and the adapters that the key may use."""
    tenant = request.state.tenant
    data = [card for one in _service(request).backends for card in await one.cards(tenant)]
    return responses.ModelList(object="list", data=data).response()


@router.get("/v1/models/{name:path}", response_model=responses.ModelCard)
async def model(name: str, request: HttpRequest) -> Response:
    """One of them."""
    return (await _service(request).backend_of(name).find(request.state.tenant, name)).response()


@router.post("/v1/load_lora_adapter", response_model=responses.AdapterChangeResponse)
async def load(body: LoadAdapterRequest, request: HttpRequest) -> Response:
    """Read, check and offer an adapter from the server's folder. A failed load leaves what was there."""
    return (await _service(request, admin=True).load(body)).response()


@router.post("/v1/unload_lora_adapter", response_model=responses.AdapterChangeResponse)
async def unload(body: UnloadAdapterRequest, request: HttpRequest) -> Response:
    """Forget an adapter. Requests that use it go on with it."""
    return (await _service(request, admin=True).unload(body.lora_name)).response()


@router.post("/tokenize", response_model=responses.TokenizeResponse)
async def tokenize(body: TokenizeRequest, request: HttpRequest) -> Response:
    """Token ids of a text, or of a conversation as the chat template writes it."""
    service = _service(request)
    service.check_ready()
    base = service.completions
    adapters = {} if body.model is None else base.resolve(request.state.tenant, body.model)
    if body.messages is not None:
        tokens = await base.encode_chat(body.messages, body, adapters, bounded=False)
    else:
        tokens = await base.encode(body.prompt or "", body.add_special_tokens is not False, bounded=False)
    return responses.TokenizeResponse(tokens=[*tokens], count=len(tokens), max_model_len=base.context).response()


@router.post("/detokenize", response_model=responses.DetokenizeResponse)
async def detokenize(body: DetokenizeRequest, request: HttpRequest) -> Response:
    """The text of token ids."""
    service = _service(request)
    service.check_ready()
    if body.model is not None:
        service.completions.resolve(request.state.tenant, body.model)
    return responses.DetokenizeResponse(prompt=await service.completions.decode(body.tokens)).response()


@router.get("/health", response_model=responses.StatusResponse)
async def health() -> Response:
    """That the server lives; `/ready` says whether it serves."""
    return responses.StatusResponse(status="ok").response()


@router.get("/ready", response_model=responses.StatusResponse)
async def ready(request: HttpRequest) -> Response:
    """Whether requests are taken."""
    _service(request).check_ready()
    return responses.StatusResponse(status="ok").response()


@router.get("/version", response_model=responses.VersionResponse)
async def version() -> Response:
    """Of gossamer."""
    return responses.VersionResponse(version=__version__).response()


@router.get("/metrics", response_class=PlainTextResponse, responses=responses.ERRORS_OF_TEXTS)
async def metrics(request: HttpRequest) -> Response:
    """For Prometheus. Names adapters of all tenants, hence for admins."""
    service = _service(request, admin=True)
    worker = service.worker
    described = await worker.call(_described) if worker.ready else None
    text = service.metrics.write(worker.running, worker.waiting, described)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def _described(engine: Engine) -> list[dict[str, Any]]:
    return [engine.store.describe(name) for name in engine.store.names()]


@router.get("/", response_class=HTMLResponse, responses=responses.ERRORS_OF_TEXTS)
async def page() -> HTMLResponse:
    """A page to try adapters side by side. It talks to the routes above, with the key that is typed into it."""
    text, headers = _page()
    return HTMLResponse(text, headers=headers)


@cache
def _page() -> tuple[str, dict[str, str]]:
    """The file, and headers under which nothing but its own script and style runs."""
    text = files("gossamer.serving.api").joinpath("page.html").read_text(encoding="utf-8")

    def allowed(name: str) -> str:
        parts = re.findall(rf"<{name}\b[^>]*>(.*?)</{name}>", text, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts)
        return " ".join(f"'sha256-{one}'" for one in digests) or "'none'"

    policy = (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"content-security-policy": policy, "referrer-policy": "no-referrer", "x-frame-options": "DENY"}
    return text, headers | {"cross-origin-opener-policy": "same-origin"}
