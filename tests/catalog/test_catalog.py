"""Fetching: once over the network, whole or not at all, and noticed when damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer.catalog import catalog
from gossamer.catalog import download as downloads
from gossamer.catalog.catalog import CATALOG, Entry, cached, data_file, home
from gossamer.errors import DataError, DiskError, DownloadError, UsageError
from gossamer.files.atomic import sha256_file
from gossamer.models.fetching import converter_of, fetch
from tests.catalog.fake_index import FakeIndex, serving

CONTENT = b"an archive, as far as anybody here can tell" * 1000


def convert(archive: Path, folder: Path) -> dict[str, int]:
    """The toy entry's converter."""
    (folder / "sub").mkdir()
    (folder / "sub" / "copy").write_bytes(archive.read_bytes())
    (folder / "text").write_text("made")
    return {"rows": 3}


def interrupted(archive: Path, folder: Path) -> dict[str, int]:
    """A converter that is stopped when it is half done."""
    convert(archive, folder)
    raise KeyboardInterrupt


def out_of_space(archive: Path, folder: Path) -> dict[str, int]:
    """A converter that fills the disk."""
    convert(archive, folder)
    raise OSError(errno.ENOSPC, "No space left on device")


def empty(archive: Path, folder: Path) -> dict[str, int]:
    """A converter that finds nothing."""
    return {}


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeIndex]:
    """A catalog of one entry, "toy", whose archive a local index serves."""
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("GOSSAMER_HOME", str(tmp_path / "home"))
    with serving(FakeIndex(CONTENT)) as fake:
        monkeypatch.setenv("PIP_INDEX_URL", fake.url)
        entry = Entry("toy", "data", "A toy.", "MIT", fake.source(), f"{__name__}:convert")
        monkeypatch.setattr(catalog, "CATALOG", {"toy": entry})
        yield fake


def use(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    monkeypatch.setattr(catalog, "CATALOG", {"toy": replace(catalog.CATALOG["toy"], **changes)})  # type: ignore[arg-type]


def test_a_data_set_names_its_files(index: FakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="not been fetched") as caught:
        data_file("toy/text")
    assert caught.value.hint == "gossamer fetch toy"
    fetch("toy")
    assert data_file("toy/text").read_text() == "made"
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "text").write_text("mine")
    assert data_file("toy/text").read_text() == "mine", "what exists at the path itself comes first"
    assert data_file("elsewhere/rows.jsonl") == Path("elsewhere/rows.jsonl")


def leftovers(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_fetch_converts_and_says_where_it_came_from(index: FakeIndex) -> None:
    folder = fetch("toy")
    assert folder == home() / "toy"
    assert leftovers(home()) == ["toy/gossamer-catalog.json", "toy/sub/copy", "toy/text"], "the archive is gone too"
    manifest = json.loads((folder / "gossamer-catalog.json").read_text())
    assert manifest["source"]["sha256"] == index.source().sha256
    assert manifest["notes"] == {"rows": 3}
    assert manifest["licence"] == "MIT"
    assert manifest["files"]["text"] == {"bytes": 4, "sha256": sha256_file(folder / "text")}


def test_the_second_fetch_needs_no_network(index: FakeIndex) -> None:
    first = fetch("toy")
    asked = len(index.requests)
    assert fetch("toy") == first == cached("toy")
    assert len(index.requests) == asked


@pytest.mark.parametrize("damage", ["cut", "deleted", "no manifest", "manifest cut", "manifest of something else"])
def test_damage_is_noticed_and_mended(index: FakeIndex, damage: str) -> None:
    folder = fetch("toy")
    manifest = folder / "gossamer-catalog.json"
    match damage:
        case "cut":
            (folder / "sub" / "copy").write_bytes(CONTENT[:-1])
        case "deleted":
            (folder / "text").unlink()
        case "no manifest":
            manifest.unlink()
        case "manifest cut":
            manifest.write_text(manifest.read_text()[:40])
        case "manifest of something else":
            manifest.write_text("[1]")
    assert cached("toy") is None
    fetch("toy")
    assert cached("toy") == folder
    assert (folder / "sub" / "copy").read_bytes() == CONTENT
    assert (folder / "text").read_text() == "made"


def test_verify_reads_every_byte(index: FakeIndex) -> None:
    folder = fetch("toy")
    (folder / "text").write_text("MADE")
    fetch("toy")
    assert (folder / "text").read_text() == "MADE", "same size: only a full check can see it"
    fetch("toy", verify=True)
    assert (folder / "text").read_text() == "made"


def test_a_newer_recipe_or_archive_rebuilds(index: FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch("toy")
    use(monkeypatch, recipe=2)
    assert cached("toy") is None
    fetch("toy")
    assert cached("toy")
    use(monkeypatch, source=index.source(sha256="0" * 64))
    assert cached("toy") is None


def test_a_wrong_archive_leaves_nothing(index: FakeIndex) -> None:
    index.content = CONTENT[:-1] + b"!"
    with pytest.raises(DownloadError):
        fetch("toy")
    assert leftovers(home()) == []
    assert not (home() / "toy").exists()


def test_a_wrong_archive_keeps_what_was_there(index: FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch("toy")
    before = leftovers(home())
    use(monkeypatch, recipe=2)
    index.content = CONTENT[:-1] + b"!"
    with pytest.raises(DownloadError):
        fetch("toy")
    assert leftovers(home()) == before


@pytest.mark.parametrize(
    ("converter", "error"), [("interrupted", KeyboardInterrupt), ("out_of_space", DiskError), ("empty", DownloadError)]
)
def test_a_conversion_that_fails_leaves_no_folder(
    index: FakeIndex, monkeypatch: pytest.MonkeyPatch, converter: str, error: type[BaseException]
) -> None:
    right = catalog.CATALOG["toy"].converter
    use(monkeypatch, converter=f"{__name__}:{converter}")
    with pytest.raises(error):
        fetch("toy")
    assert leftovers(home()) == [f"downloads/{index.file}"]
    assert cached("toy") is None
    use(monkeypatch, converter=right)
    asked = len(index.requests)
    assert fetch("toy").is_dir()
    assert len(index.requests) == asked, "the archive was whole and is used again"


def test_an_archive_placed_by_hand_is_used_when_it_is_right(index: FakeIndex) -> None:
    place = home() / "downloads" / index.file
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)
    fetch("toy")
    assert index.requests == []
    shutil.rmtree(home())
    place.parent.mkdir(parents=True)
    place.write_bytes(b"something else")
    fetch("toy")
    assert index.requests != []
    assert cached("toy")


def test_leftovers_of_killed_fetches_go_after_a_day(index: FakeIndex) -> None:
    old, young = home() / ".toy.0123.partial", home() / ".toy.4567.partial"
    for folder in (old, young):
        folder.mkdir(parents=True)
    long_ago = time.time() - 2 * 86_400
    os.utime(old, (long_ago, long_ago))
    fetch("toy")
    assert not old.exists()
    assert young.exists()


def test_unknown_names() -> None:
    with pytest.raises(UsageError) as caught:
        fetch("smolm2-135m")
    assert "smollm2-135m" in caught.value.hint
    assert "reviews" in caught.value.expected


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOSSAMER_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("GOSSAMER_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert home() == tmp_path / "xdg" / "gossamer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert home() == Path.home() / ".cache" / "gossamer"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert home() == Path.home() / "Library" / "Caches" / "gossamer"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert home() == tmp_path / "local" / "gossamer"


def test_every_entry_is_whole() -> None:
    for name, entry in CATALOG.items():
        assert entry.name == name
        assert entry.description
        assert entry.licence
        assert len(entry.source.sha256) == 64
        assert entry.source.size > 0
        assert callable(converter_of(entry))


@pytest.mark.slow
def test_the_real_model() -> None:
    """Needs the network once; then the user's cache."""
    folder = fetch("smollm2-135m", verify=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.get_parameter("model.embed_tokens.weight") is model.get_parameter("lm_head.weight")
    assert (folder / "model.safetensors").stat().st_size < 270e6, "tied embeddings are stored once"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    text = "Héllo  wörld\n\t🙂 it 's  , done ."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    for name in ("terrible", "bad", "neutral", "good", "great"):
        assert len(tokenizer(f" {name}").input_ids) == 1
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_the_real_reviews() -> None:
    folder = fetch("reviews", verify=True)
    lines = {name: (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("train", "eval")}
    parts = {name: [json.loads(line) for line in texts] for name, texts in lines.items()}
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 2967, "eval": 741}
    assert sha256_file(folder / "eval.jsonl").startswith("4d82213078b5c27d")
    documents = {name: {row["id"].split("_")[0] for row in rows} for name, rows in parts.items()}
    prompts = {name: {row["prompt"] for row in rows} for name, rows in parts.items()}
    assert not documents["train"] & documents["eval"]
    assert not prompts["train"] & prompts["eval"]
