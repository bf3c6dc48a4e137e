"""Every error's status and words: OpenAI's shape, and nothing that a client should not know."""

import logging
import re
import secrets
import traceback
from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from gossamer.errors import GossamerError, NonFiniteError, ResourceError, UsageError
from gossamer.serving.api.requests import why_unsupported
from gossamer.serving.api.responses import ErrorResponse

log = logging.getLogger("gossamer.serving")


class ClientGone(Exception):
    """The client left and reads no answer."""


class Refusal(Exception):
    """An answer that is no success.

    Args:
        status: of the response. message: for the client. code: a stable word for it. param: the field it concerns.
        after: seconds after which asking again makes sense.
    """

    def __init__(self, status: int, message: str, code: str, *, param: str | None = None, after: int = 0) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.after = status, message, code, param, after

    @property
    def kind(self) -> str:
        """OpenAI's word for errors of this status."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    @property
    def headers(self) -> dict[str, str]:
        """When to ask again, and how to send a key."""
        again = {"retry-after": str(self.after)} if self.after else {}
        return again | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    @property
    def body(self) -> ErrorResponse:
        """In OpenAI's shape."""
        return ErrorResponse(error={"message": self.message, "type": self.kind, "param": self.param, "code": self.code})

    def response(self) -> Response:
        """The whole answer."""
        return self.body.response(self.status, self.headers)


def missing(name: str) -> Refusal:
    """Of an adapter that is not there, or not for this client, which cannot tell which."""
    return Refusal(404, f"The model {name[:256]!r} does not exist.", "model_not_found", param="model")


def not_ready() -> Refusal:
    """Of everything, as long as there is no model."""
    return Refusal(503, "The model is not there.", "not_ready", after=5)


def refusal(error: BaseException) -> Refusal:
    """What a client hears of an error: what it can mend, but no place on this machine; else a number."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, RequestValidationError):
        return _of_body(error.errors())
    if isinstance(error, HTTPException):  # FastAPI's own: a route, a method or JSON that is none
        words = {404: "There is no such route.", 405: "This route has other methods.", 400: "The body is not JSON."}
        status = error.status_code
        return Refusal(status, words.get(status, "This cannot be answered."), f"http_{status}")
    if isinstance(error, UsageError):
        param = error.where if re.fullmatch(r"[\w.$\[\]: -]{1,256}", error.where) else None
        return Refusal(400, _told(error, "got", "expected", "hint"), error.code, param=param)
    if isinstance(error, ResourceError) and not isinstance(error, NonFiniteError):
        return Refusal(429, error.what, "queue_full", after=1)
    return unexpected(error)


def _of_body(faults: Sequence[Any]) -> Refusal:
    """Of a body's first fault: which field, and what is wrong with it; not what was in it."""
    # of the members of a union the one that was followed furthest says what is meant
    first = max((one for one in faults if one["loc"][:2] == faults[0]["loc"][:2]), key=lambda one: len(one["loc"]))
    # what pydantic calls the members of a union is no part of the field's name
    parts = [str(part) for part in first["loc"][1:] if isinstance(part, int) or re.fullmatch(r"\w{1,64}", part)]
    place = ".".join(parts)[:256]
    message = "This field is not known." if first["type"] == "extra_forbidden" else first["msg"]
    if why := why_unsupported(place):
        message = f"This is not supported: {why}."
    return Refusal(400, f"{place or 'body'}: {message}"[:512], "invalid_request", param=place or None)


def unusable(name: str, error: GossamerError, *, param: str = "model") -> Refusal:
    """Of an adapter that cannot be used: what is wrong with it, and the error's own code. The log names it too."""
    log.warning("adapter %r cannot be used: %s: %s", name[:256], error.code, error.what)
    return Refusal(400, f"The adapter {name[:256]!r} cannot be used: {_told(error, 'got')}", error.code, param=param)


def _told(error: GossamerError, *parts: str) -> str:
    """What went wrong, with those of its parts that hold no path: whatever has a separator in it could be one."""
    texts = [error.what.partition("\n")[0], *(str(getattr(error, part)) for part in parts)]
    return "; ".join(text for text in texts if text and not re.search(r"[/\\]", text)) or "it is not as it should be"


def unexpected(error: BaseException) -> Refusal:
    """Note an error under a number, and give the client that number only.

    The log gets the kind of error and the places in the code, not its text, which may quote the request.
    """
    number = secrets.token_hex(8)
    said = f"{error.code}: {error.what}" if isinstance(error, GossamerError) else type(error).__name__
    frames = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    log.error("error %s: %s at %s", number, said, " < ".join(reversed(frames)) or "nowhere")
    return Refusal(500, f"Something went wrong here. It was noted as {number}.", "internal_error")
