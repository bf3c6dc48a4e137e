"""One file of one release from the package index, without an installer.

The file is found through the index's simple API (PEP 503 and 691), streamed beside its final place, checked against the
sha256 that the caller names, and only then renamed. Nothing in it is ever executed, so a source archive is as safe to
fetch as a wheel. The index is PIP_INDEX_URL, UV_DEFAULT_INDEX or UV_INDEX_URL where one is set, else pypi.org; proxies
and certificates come from the usual environment variables.
"""

import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from gossamer.errors import DownloadError, nearest
from gossamer.files.atomic import new_file

OnBytes = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""

PYPI = "https://pypi.org/simple"
ATTEMPTS = 3
PAUSE = 1.0  # seconds before the second attempt; doubled before the third
TIMEOUT = 60.0  # seconds without a byte

_INDEX_VARIABLES = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")
_CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE")
_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_LARGEST_LISTING = 64 << 20
_CHUNK = 1 << 18
_TRANSPORT_FAULTS = (OSError, http.client.HTTPException)


@dataclass(frozen=True)
class ReleaseFile:
    """The one file that is meant: its release, its exact name, its size in bytes and its sha256 in hex."""

    package: str
    version: str
    file: str
    sha256: str
    size: int


class _Transient(Exception):
    """A fault of the moment, worth another attempt; `args[0]` says what it was."""


def download(source: ReleaseFile, destination: Path, *, progress: OnBytes | None = None) -> Path:
    """Write `source` to `destination`, whole and with the right hash, or not at all.

    Raises `DownloadError` when the index cannot be reached, lacks the file or delivers other bytes, and `DiskError`
    when the disk refuses; either way nothing is left behind.
    """
    index = index_url()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _transfer(_find(index, source), source, destination, progress)
            return destination
        except _Transient as fault:
            if attempt == ATTEMPTS:
                raise _unreachable(index, source, destination, str(fault)) from fault.__cause__
            time.sleep(PAUSE * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def index_url() -> str:
    """The package index that the environment names, without a closing slash."""
    for variable in _INDEX_VARIABLES:
        value = os.environ.get(variable, "").strip()
        if value:
            return re.sub(r"^[\w-]+=(?=https?:)", "", value).rstrip("/")  # uv allows NAME=URL
    return PYPI


def _unreachable(index: str, source: ReleaseFile, destination: Path, reason: str) -> DownloadError:
    return DownloadError(
        f"could not download {source.file} in {ATTEMPTS} attempts",
        where=_without_credentials(index),
        got=reason,
        hint=f"check the network, set PIP_INDEX_URL to a mirror, or place the file yourself at {destination}",
    )


def _find(index: str, source: ReleaseFile) -> str:
    """The address of the file, from the release listing of its package."""
    address = f"{index}/{re.sub(r'[-_.]+', '-', source.package).lower()}/"
    with _open(address, accept=_ACCEPT) as (response, final):
        kind = response.headers.get_content_type()
        content = bytearray()
        for chunk in _chunks(response):
            content += chunk
            if len(content) > _LARGEST_LISTING:
                got = f"more than {_LARGEST_LISTING:,} bytes"
                raise DownloadError("the package index sent an endless listing", got=got)
    try:
        links = _links(content.decode("utf-8"), kind)
    except (ValueError, KeyError, TypeError) as error:
        where = _without_credentials(address)
        raise DownloadError("the package index sent an unreadable listing", where=where, got=str(error)) from error
    if source.file not in links:
        raise DownloadError(
            f"the package index does not carry {source.file}",
            where=_without_credentials(address),
            got=f"{len(links)} other files",
            hint=nearest(source.file, links),
        )
    return urljoin(final, links[source.file])


def _links(text: str, kind: str) -> dict[str, str]:
    """File name -> address, of a listing in JSON or in HTML."""
    if kind.endswith("json"):
        return {str(file["filename"]): str(file["url"]) for file in json.loads(text)["files"]}
    anchors = _Anchors()
    anchors.feed(text)
    return {unquote(urlsplit(link).path).rsplit("/", 1)[-1]: link for link in anchors.links}


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _transfer(address: str, source: ReleaseFile, destination: Path, progress: OnBytes | None) -> None:
    """Stream the file to its place; the temporary file vanishes with any error raised here."""
    with _open(address) as (response, _), new_file(destination, needed=source.size) as file:
        digest, done = hashlib.sha256(), 0
        for chunk in _chunks(response):
            done += len(chunk)
            if done > source.size:
                break  # some other file: do not fill the disk with it
            digest.update(chunk)
            file.write(chunk)
            if progress:
                progress(done, source.size)
        if done < source.size:
            raise _Transient(f"the transfer ended after {done:,} of {source.size:,} bytes")
        if done > source.size or digest.hexdigest() != source.sha256:
            raise DownloadError(
                f"{source.file} is not the file that the catalog names; nothing was kept",
                where=_without_credentials(address),
                got=f"more than {source.size:,} bytes" if done > source.size else f"sha256 {digest.hexdigest()}",
                expected=f"{source.size:,} bytes with sha256 {source.sha256}",
                hint="the index or something on the way changed it; try another index through PIP_INDEX_URL",
            )


@contextlib.contextmanager
def _open(address: str, *, accept: str = "*/*") -> Iterator[tuple[Any, str]]:
    """The response of a GET request and its final address; refuses everything but http and https."""
    where = _without_credentials(address)
    if urlsplit(address).scheme not in ("http", "https"):
        raise DownloadError("not a web address", where=where, expected="http:// or https://")
    try:
        response = _opener(address).open(_request(address, accept), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code >= 500 or error.code == 429:
            raise _Transient(f"HTTP {error.code} {error.reason}") from error
        status = f"HTTP {error.code} {error.reason}"
        raise DownloadError("the package index refused", where=where, got=status) from error
    except _TRANSPORT_FAULTS as error:
        raise _Transient(str(getattr(error, "reason", error)) or type(error).__name__) from error
    with response:
        final = response.geturl()
        # credentials are for the index's own host; a redirect elsewhere must not carry them along
        yield response, address if urlsplit(final).netloc == urlsplit(where).netloc else final


def _request(address: str, accept: str) -> urllib.request.Request:
    from gossamer import __version__

    headers = {"Accept": accept, "User-Agent": f"gossamer/{__version__}", "Accept-Encoding": "identity"}
    request = urllib.request.Request(_without_credentials(address), headers=headers)
    parts = urlsplit(address)
    if parts.username:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(pair).decode("ascii"))
    return request


def _opener(address: str) -> urllib.request.OpenerDirector:
    if urlsplit(address).scheme == "http":  # a redirect to https then meets urllib's own certificates
        return urllib.request.build_opener()
    context = ssl.create_default_context()
    with contextlib.suppress(ImportError):  # python.org's builds bring no certificates of their own
        import certifi

        context.load_verify_locations(certifi.where())
    for variable in _CERTIFICATE_VARIABLES:
        place = os.environ.get(variable)
        if place and os.path.exists(place):
            context.load_verify_locations(**{"capath" if os.path.isdir(place) else "cafile": place})
    return urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))


def _without_credentials(address: str) -> str:
    parts = urlsplit(address)
    return urlunsplit(parts._replace(netloc=parts.netloc.rsplit("@", 1)[-1]))


def _chunks(response: BinaryIO) -> Iterator[bytes]:
    try:
        while chunk := response.read(_CHUNK):
            yield chunk
    except _TRANSPORT_FAULTS as error:
        raise _Transient(str(error) or type(error).__name__) from error
