"""The app on a socket: from the first request to a stop that lets everybody finish."""

import asyncio
import ipaddress
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from gossamer.errors import UsageError
from gossamer.serving.api.service import Service

GREETING = 10.0
"""Seconds within which a connection must have sent its first request's headers."""


class _Protocol(H11Protocol):
    """Does not wait for ever for what a connection has to say."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.patience = self.loop.call_later(GREETING, self._tire)

    def _tire(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.patience.cancel()
        super().connection_lost(exc)


class _Server(uvicorn.Server):
    """Leaves signals to `serve`: uvicorn's own way ends the process by the signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def check_host(host: str, keyed: bool) -> None:
    """Without keys, only this machine may reach the server. Raises `UsageError`."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not keyed:
        what, expected = "without keys the server is for this machine only", "127.0.0.1, ::1 or localhost"
        raise UsageError(what, where="--host", got=host, expected=expected, hint="give --keys FILE")


def server_of(app: FastAPI, host: str, port: int) -> uvicorn.Server:
    """A server that bounds what a connection may send before the app sees it."""
    quiet: Any = {"log_config": None, "access_log": False, "server_header": False, "proxy_headers": False}
    limits: Any = {"h11_max_incomplete_event_size": 32 * 1024, "limit_concurrency": 4096}
    timeouts: Any = {"timeout_keep_alive": 30, "timeout_graceful_shutdown": 5}
    return _Server(uvicorn.Config(app, host, port, http=_Protocol, ws="none", **quiet, **limits, **timeouts))


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens at an address, for `serve`; port 0 takes a free one. Raises `UsageError` if it is taken."""
    try:
        where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(*where[:2])
        try:
            if sys.platform != "win32":  # where it would let two servers have one address
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(where[4])
            found.listen(2048)
        except OSError:
            found.close()
            raise
    except (OSError, UnicodeError) as error:
        got = getattr(error, "strerror", None) or type(error).__name__
        where = f"{host}:{port}"
        raise UsageError("the address cannot be had", where=where, got=got, hint="another --port") from None
    return found


def serve(
    app: FastAPI, host: str = "127.0.0.1", port: int = 8000, drain: float = 30.0, *, at: socket.socket | None = None
) -> None:
    """Serve until SIGTERM or SIGINT; then take nothing new, and give those that run `drain` seconds to finish.

    `at` is a socket of `bound`, in place of one for host and port.

    Raises: what loading the engine raised; UsageError if the address cannot be had.
    """
    with closing(at or bound(host, port)) as listening:
        host, port = listening.getsockname()[:2]
        server = server_of(app, host, port)
        fault = asyncio.run(_serve(server, app, listening, drain))
    if fault:
        raise fault
    if not server.started:
        raise UsageError("the server did not start", where=f"{host}:{port}")


async def _serve(server: uvicorn.Server, app: FastAPI, at: socket.socket, drain: float) -> BaseException | None:
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    for one in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(one, stopping.set)
        except NotImplementedError:  # Windows' loops take none
            signal.signal(one, lambda *_: loop.call_soon_threadsafe(stopping.set))
    serving = asyncio.ensure_future(_quietly(server, at))
    watching = asyncio.ensure_future(_until_fault(server, app))
    stopped = asyncio.ensure_future(stopping.wait())
    await asyncio.wait({serving, watching, stopped}, return_when="FIRST_COMPLETED")
    if stopped.done() and not serving.done():
        await _drained(app.state.service, drain)
    server.should_exit = True
    await serving
    for task in (watching, stopped):
        task.cancel()
    return watching.exception() if watching.done() and not watching.cancelled() else None


async def _quietly(server: uvicorn.Server, at: socket.socket) -> None:
    try:
        await server.serve(sockets=[at])
    except SystemExit:  # uvicorn's way to say that it could not start
        server.started = False


async def _until_fault(server: uvicorn.Server, app: FastAPI) -> None:
    """Raise the reason for which the model is not there; wait for ever if it is."""
    while not server.started:
        await asyncio.sleep(0.01)
    await asyncio.shield(app.state.service.loading)
    await asyncio.Event().wait()


async def _drained(service: Service, seconds: float) -> None:
    service.draining = True
    end = asyncio.get_running_loop().time() + seconds
    while service.answering and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.02)
    await service.worker.close()  # those that are left hear that it was stopped
