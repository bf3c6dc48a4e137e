"""Everything but completions and adapters: embeddings, tokens, how the server is, the page."""

from __future__ import annotations

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
from gossamer.serving.api import told
from gossamer.serving.api.faults import Refusal
from gossamer.serving.api.metrics import of_store
from gossamer.serving.api.schema import Detokenize, Tokenize
from gossamer.serving.api.service import Service

router = APIRouter()


@router.get("/health", response_model=told.Status)
async def health() -> dict[str, str]:
    """That the server lives; `/ready` says whether it serves."""
    return {"status": "ok"}


@router.get("/ready", response_model=told.Status)
async def ready(request: HttpRequest) -> dict[str, str]:
    """Whether requests are taken."""
    _service(request).check_ready()
    return {"status": "ok"}


@router.get("/version", response_model=told.Version)
async def version() -> dict[str, str]:
    """Of gossamer."""
    return {"version": __version__}


@router.get("/metrics", response_class=PlainTextResponse, responses=told.ERRORS_OF_TEXTS)
async def metrics(request: HttpRequest) -> Response:
    """For Prometheus. Names adapters of all tenants, hence for admins."""
    service = _service(request)
    if not request.state.tenant.admin:
        raise Refusal(403, "This key may not do that.", "not_admin")
    worker = service.worker
    values: dict[str, float] = {"requests_running": worker.running, "requests_waiting": worker.waiting}
    if worker.ready:
        values |= await worker.call(
            lambda engine: of_store([engine.store.describe(name) for name in engine.store.names()])
        )
    return Response(service.metrics.write(values), media_type=CONTENT_TYPE_LATEST)


@router.post("/tokenize", response_model=told.Tokens)
async def tokenize(asked: Tokenize, request: HttpRequest) -> dict[str, Any]:
    """Token ids of a text, or of a conversation as the chat template writes it."""
    service = _service(request)
    service.check_ready()
    adapters = () if asked.model is None else service.chosen(request.state.tenant, asked.model)
    special = asked.add_special_tokens is not False
    if asked.messages is not None:
        tokens = await service.encode_chat(asked.messages, asked, adapters, bounded=False)
    else:
        tokens = await service.encode(asked.prompt or "", special, bounded=False)
    return {"tokens": tokens, "count": len(tokens), "max_model_len": service.context}


@router.post("/detokenize", response_model=told.Detokenized)
async def detokenize(asked: Detokenize, request: HttpRequest) -> dict[str, str]:
    """The text of token ids."""
    service = _service(request)
    service.check_ready()
    if asked.model is not None:
        service.chosen(request.state.tenant, asked.model)
    return {"prompt": await service.decode(asked.tokens)}


@router.get("/", response_class=HTMLResponse, responses=told.ERRORS_OF_TEXTS)
async def page() -> HTMLResponse:
    """A page to try adapters side by side. It talks to the routes above, with the key that is typed into it."""
    text, policy = _page()
    headers = {
        "content-security-policy": policy,
        "referrer-policy": "no-referrer",
        "x-frame-options": "DENY",
        "cross-origin-opener-policy": "same-origin",
    }
    return HTMLResponse(text, headers=headers)


@cache
def _page() -> tuple[str, str]:
    """The file, and the policy under which nothing but its own script and style runs."""
    text = files("gossamer.serving.api").joinpath("page.html").read_text(encoding="utf-8")
    allowed = {
        name: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
            for part in re.findall(rf"<{name}\b[^>]*>(.*?)</{name}>", text, re.DOTALL)
        )
        or "'none'"
        for name in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _service(request: HttpRequest) -> Service:
    return request.app.state.service
