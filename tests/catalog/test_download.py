"""A download is the named file, whole, or an error with nothing left behind; never anything that runs."""

from __future__ import annotations

import base64
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gossamer.catalog import download as module
from gossamer.catalog.download import download, index_url
from gossamer.errors import DownloadError
from tests.catalog.fake_index import FakeIndex, serving

CONTENT = bytes(range(256)) * 4096  # 1 MiB: several pieces


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeIndex]:
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "*")
    with serving(FakeIndex(CONTENT)) as fake:
        monkeypatch.setenv("PIP_INDEX_URL", fake.url + "/")
        yield fake


@pytest.mark.parametrize("listing", ["json", "html"])
def test_both_kinds_of_listing(index: FakeIndex, tmp_path: Path, listing: str) -> None:
    index.listing = listing
    assert download(index.source(), tmp_path / "deep" / "file") == tmp_path / "deep" / "file"
    assert (tmp_path / "deep" / "file").read_bytes() == CONTENT
    assert [path for path, _ in index.requests] == ["/simple/toy/", "/files/toy-1.0.tar.gz"]


def test_progress_reaches_the_end(index: FakeIndex, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    download(index.source(), tmp_path / "file", progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_other_bytes_of_the_same_size(index: FakeIndex, tmp_path: Path) -> None:
    source = index.source()
    index.content = b"\x01" + CONTENT[1:]
    with pytest.raises(DownloadError, match="not the file that the catalog names") as caught:
        download(source, tmp_path / "file")
    assert source.sha256 in caught.value.expected
    assert list(tmp_path.iterdir()) == []
    assert len(index.requests) == 2, "a wrong file is wrong at the second attempt too"


def test_a_larger_file_is_cut_off(index: FakeIndex, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="catalog names") as caught:
        download(index.source(size=1000), tmp_path / "file")
    assert caught.value.got == "more than 1,000 bytes"
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_transfer_is_tried_again(index: FakeIndex, tmp_path: Path) -> None:
    index.truncate = [5, len(CONTENT)]
    download(index.source(), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_truncated_every_time(index: FakeIndex, tmp_path: Path) -> None:
    index.truncate = [7] * 9
    with pytest.raises(DownloadError, match="3 attempts") as caught:
        download(index.source(), tmp_path / "file")
    assert "1,048,569 of 1,048,576 bytes" in caught.value.got
    assert str(tmp_path / "file") in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_busy_server_is_asked_again(index: FakeIndex, tmp_path: Path) -> None:
    index.faults = [503, 429]
    assert download(index.source(), tmp_path / "file").read_bytes() == CONTENT


def test_a_refusal_is_final(index: FakeIndex, tmp_path: Path) -> None:
    index.faults = [403, 200]
    with pytest.raises(DownloadError) as caught:
        download(index.source(), tmp_path / "file")
    assert "HTTP 403" in caught.value.got


def test_an_absent_file_names_the_nearest(index: FakeIndex, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"does not carry toy-1\.1\.tar\.gz") as caught:
        download(index.source(file="toy-1.1.tar.gz"), tmp_path / "file")
    assert "toy-1.0.tar.gz" in caught.value.hint


def test_an_absent_package(index: FakeIndex, tmp_path: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        download(index.source(package="nothing"), tmp_path / "file")
    assert "HTTP 404" in caught.value.got
    assert "/simple/nothing/" in caught.value.where


def test_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/simple")
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(module, "PAUSE", 0.0)
        with pytest.raises(DownloadError) as caught:
            download(FakeIndex(CONTENT).source(), tmp_path / "file")
    assert "check the network" in caught.value.hint
    assert "PIP_INDEX_URL" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(index: FakeIndex, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(index.source(), tmp_path / "file", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_credentials_are_sent_and_never_shown(
    index: FakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("//", "//me:s%40cret@"))
    download(index.source(), tmp_path / "file")
    expected = "Basic " + base64.b64encode(b"me:s@cret").decode()
    assert [header for _, header in index.requests] == [expected, expected]
    with pytest.raises(DownloadError) as caught:
        download(index.source(file="other"), tmp_path / "file")
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize("address", ["file:///etc/simple", "ftp://127.0.0.1/simple"])
def test_only_web_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", address)
    with pytest.raises(DownloadError, match="not a web address"):
        download(FakeIndex(CONTENT).source(), tmp_path / "file")


def test_which_index(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        monkeypatch.delenv(variable, raising=False)
    assert index_url() == "https://pypi.org/simple"
    monkeypatch.setenv("UV_INDEX_URL", "https://two.example/simple/")
    assert index_url() == "https://two.example/simple"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "mine=https://one.example/simple")
    assert index_url() == "https://one.example/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://pip.example/simple")
    assert index_url() == "https://pip.example/simple"
