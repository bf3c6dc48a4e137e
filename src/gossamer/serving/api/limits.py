"""What is refused before it is parsed: unknown keys, bodies that are too large, too deep or too slow."""

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gossamer.serving.api.faults import ClientGone, Refusal, unexpected
from gossamer.serving.api.keys import Keyring

OPEN = frozenset({"/health", "/"})
"""Answered without a key: that the server lives, and the page, which is the same file for all."""

STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)
LOCAL = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)
BRACKETS = re.compile(rb"[\[\]{}]")
NUMBER = re.compile(rb"[A-Za-z0-9._-]{1,128}")
"""What a client may call its request."""
log = logging.getLogger("gossamer.serving")


@dataclass(frozen=True)
class HttpLimits:
    """Limits of requests.

    Attributes:
        body: bytes of a request. depth: of its JSON. headers: how many of them.
        bodies: bytes of all requests that are there at a time, from their first byte to the end of their answer.
        reading: seconds until a body must be there. answering: seconds until an answer must be done.
    """

    body: int = 4 * 2**20
    bodies: int = 256 * 2**20
    depth: int = 64
    headers: int = 64
    reading: float = 15.0
    answering: float = 600.0


class Gate:
    """Middleware before the app: whose key a request has, and whether it is within the limits.

    Args:
        keyring: who may. Without keys, only programs and pages of this machine may, by the name of the host they ask.
        count: called with the route and the status of each answer.

    Attributes:
        held: bytes of all bodies whose requests are being answered.
    """

    def __init__(self, app: ASGIApp, keyring: Keyring, limits: HttpLimits, count: Callable[[str, int], None]) -> None:
        self.app, self.keyring, self.limits, self.count = app, keyring, limits, count
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":
            return
        given, method, parts, route = scope["path"], scope["method"], list[bytes](), "(refused)"
        # HEAD asks for what GET answers, less the body, which the server leaves out by the scope that it keeps
        path, bare = re.sub("/+", "/", given).rstrip("/") or "/", method == "HEAD"
        scope = {**scope, "path": path, "method": "GET" if bare else method}
        answer = _Answer(send, _number(scope), bare)
        try:
            self._check(scope, given)
            body, route = await self._read(receive, parts), "(none)"
            await self.app(scope, _again(body, receive), answer)
        except ClientGone:
            return
        except Exception as error:
            said = error if isinstance(error, Refusal) else unexpected(error)
            if answer.status == 0:
                await said.response()(scope, receive, answer)
        finally:
            self.held -= sum(map(len, parts))
        if answer.status:
            route = getattr(scope.get("route"), "path", route)
            self.count(route, answer.status)
            log.info("request %s: %s %s %d", answer.number or "-", method, route, answer.status)

    def _check(self, scope: Scope, given: str) -> None:
        """Find the tenant, and check the headers. Raises `Refusal`."""
        if len(scope["headers"]) > self.limits.headers:
            raise Refusal(431, f"At most {self.limits.headers} headers.", "too_many_headers")
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self.keyring.open and not LOCAL.fullmatch(host):  # a page whose name was made to mean this machine
            raise Refusal(403, "Without keys, this server answers its own machine only.", "not_local")
        if self.keyring.open and origin and origin.partition("://")[2] != host:
            raise Refusal(403, "Pages of other origins may not use this server.", "foreign_origin")
        tenant = self.keyring.whose(headers.get(b"authorization", ""))
        if tenant is None and given not in OPEN:
            raise Refusal(401, "A key is needed: Authorization: Bearer ...", "invalid_api_key")
        scope.setdefault("state", {})["tenant"] = tenant
        if headers.get(b"content-encoding", "identity") != "identity":
            raise Refusal(415, "Bodies are read as they are, not compressed.", "unsupported_encoding")
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > self.limits.body:
            raise Refusal(413, f"At most {self.limits.body:,} bytes.", "body_too_large")

    async def _read(self, receive: Receive, parts: list[bytes]) -> bytes:
        """The whole body, counted as it comes, which is what `parts` hold in the end. Raises `Refusal`."""
        size, more = 0, True
        try:
            async with asyncio.timeout(self.limits.reading):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    parts.append(message.get("body", b""))
                    self.held += len(parts[-1])
                    more = message.get("more_body", False)
                    if (size := size + len(parts[-1])) > self.limits.body:
                        raise Refusal(413, f"At most {self.limits.body:,} bytes.", "body_too_large")
                    if self.held > self.limits.bodies:
                        raise Refusal(429, "Too much is being sent at a time.", "server_full", after=1)
        except TimeoutError:
            raise Refusal(408, "The body did not come in time.", "body_too_slow") from None
        parts[:] = [body := b"".join(parts)]
        if deeper(body, self.limits.depth):
            raise Refusal(400, f"JSON of more than {self.limits.depth} levels.", "too_deep")
        return body


def deeper(body: bytes, most: int) -> bool:
    """Whether JSON has more levels than `most`; strings do not count."""
    level = 0
    for bracket in BRACKETS.findall(STRINGS.sub(b"", body)):
        level += 1 if bracket in b"[{" else -1
        if level > most:
            return True
    return False


def _number(scope: Scope) -> str:
    """The client's own number of its request, if it has one that may stand in a log."""
    given = next((value for name, value in scope["headers"] if name.lower() == b"x-request-id"), b"")
    return given.decode() if NUMBER.fullmatch(given) else ""


def _again(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read once more, and then what comes after it."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def give() -> Message:
        return left.pop() if left else await receive()

    return give


class _Answer:
    """Sends an answer with its request's number and headers for browsers; `bare` without its body."""

    def __init__(self, send: Send, number: str, bare: bool) -> None:
        self.send, self.status, self.number, self.bare = send, 0, number, bare

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [
                *message.get("headers", []),
                (b"x-content-type-options", b"nosniff"),
                (b"cache-control", b"no-store"),
                *([(b"x-request-id", self.number.encode())] if self.number else []),
            ]
        elif self.bare:
            message = {**message, "body": b""}
        await self.send(message)
