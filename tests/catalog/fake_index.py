"""A package index on 127.0.0.1 that can be told to misbehave."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from gossamer.catalog.download import ReleaseFile


@dataclass
class FakeIndex:
    """One release of one package; the attributes are read at every request.

    Attributes:
        content: what the file is served as.
        listing: "json" or "html".
        faults: statuses to answer the next file requests with, before the file is served again.
        truncate: bytes to leave out at the end of the next transfers, one entry each.
        password: "user:password" that the listing asks for.
        requests: the paths asked for, in order, with the Authorization header.
    """

    content: bytes
    file: str = "toy-1.0.tar.gz"
    listing: str = "json"
    faults: list[int] = field(default_factory=list)
    truncate: list[int] = field(default_factory=list)
    password: str = ""
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        """What PIP_INDEX_URL is set to."""
        return f"http://127.0.0.1:{self.port}/simple"

    def source(self, **changes: object) -> ReleaseFile:
        """The catalog's view of the file, right unless told otherwise."""
        fields = {"package": "Toy", "version": "1.0", "file": self.file, "size": len(self.content)}
        return ReleaseFile(**(fields | {"sha256": hashlib.sha256(self.content).hexdigest()} | changes))  # type: ignore[arg-type]

    def page(self) -> tuple[str, bytes]:
        """Content type and body of the listing."""
        names = ["toy-0.9.tar.gz", self.file]
        if self.listing == "json":
            files = [{"filename": name, "url": f"../../files/{name}", "hashes": {}} for name in names]
            return "application/vnd.pypi.simple.v1+json", json.dumps({"files": files}).encode()
        links = "".join(f'<a href="../../files/{name}#sha256=00">{name}</a><br>' for name in names)
        return "text/html", f"<!DOCTYPE html><html><body>{links}</body></html>".encode()


@contextmanager
def serving(index: FakeIndex) -> Iterator[FakeIndex]:
    """Serve `index` until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            index.requests.append((self.path, self.headers.get("Authorization")))
            if self.path == "/simple/toy/":
                kind, body = index.page()
                self.answer(200, kind, body)
            elif self.path == f"/files/{index.file}":
                self.answer(index.faults.pop(0) if index.faults else 200, "application/octet-stream", index.content)
            else:
                self.answer(404, "text/plain", b"no")

        def answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            missing = index.truncate.pop(0) if index.truncate and self.path.startswith("/files") else 0
            self.wfile.write(body[: len(body) - missing])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    index.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield index
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
