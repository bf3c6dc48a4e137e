"""A name means one thing: one model, and one value until it is given another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import gossamer as gs
from gossamer.errors import AdapterFileError, UsageError
from gossamer.models import tiny, tiny_tokenizer
from gossamer.serving import originals
from gossamer.serving.engine import Engine
from gossamer.serving.folder import check_names
from tests.adapters import trained


@pytest.mark.parametrize(
    "name", ["", "*", "a\nb", "a\r\nx: 1", "\t", "a\0", "\u202eabc", "\u200b", " a", "a ", ".a", "n" * 257, "\ud800"]
)
def test_names_that_nothing_may_have(name: str) -> None:
    for base, adapters in ((name, []), ("toy", [name])):
        with pytest.raises(UsageError, match="cannot be the name"):
            check_names(base, adapters)


@pytest.mark.parametrize(
    ("adapters", "other", "others"),
    [
        (["toy"], None, []),
        (["toy:sql"], None, []),
        (["toy:toy:sql", "sql"], None, []),
        ([], "toy", []),
        (["enc"], "enc", []),
        (["enc:law"], "enc", ["law"]),
        (["law"], "enc", ["law"]),
        ([], "enc", ["enc"]),
        ([], "enc", ["toy"]),
        ([], "enc", ["toy:law"]),
    ],
)
def test_one_name_is_one_model(adapters: list[str], other: str | None, others: list[str]) -> None:
    with pytest.raises(UsageError, match=r"one name for two models|means something else"):
        check_names("toy", adapters, other, others)


def test_names_are_compared_letter_by_letter() -> None:
    check_names(
        "toy", ["Toy", "toy-2", "toy+sql", "a,b", "a=0.7", "na\u00efve", "nai\u0308ve", "SQL", "sql"], "enc", ["law"]
    )


# A value until it is given another -----------------------------------------------------------------------------


def values(count: int) -> list[gs.Adapter]:
    return [trained(tiny("llama"), gs.LoRA(r=2), seed=seed) for seed in range(count)]


def ask(engine: Engine, name: str) -> str:
    (reply,) = engine.generate(["x"], name, max_tokens=1)
    return reply.digests[name]


def replaced(folder: Path, new: gs.Adapter) -> None:
    new.save(folder)


def removed(folder: Path, new: gs.Adapter) -> None:
    shutil.rmtree(folder)


def put_anew(folder: Path, new: gs.Adapter) -> None:
    shutil.rmtree(folder)
    new.save(folder)


def in_place(folder: Path, new: gs.Adapter) -> None:
    new.save(folder.parent / "new")
    for one in (folder.parent / "new").iterdir():
        (folder / one.name).write_bytes(one.read_bytes())


@pytest.mark.parametrize("memory", [1, 2**30])
@pytest.mark.parametrize("change", [replaced, removed, put_anew, in_place])
def test_a_name_means_what_was_first_read(change: Any, memory: int, tmp_path: Path) -> None:
    """Whether it is in memory or not, and whatever came into its place; or it says that it cannot."""
    old, new, other = values(3)
    old.save(tmp_path / "one")
    other.save(tmp_path / "two")
    with Engine((tiny("llama"), tiny_tokenizer()), tmp_path, memory=memory) as engine:
        assert ask(engine, "one") == old.digest
        change(tmp_path / "one", new)
        assert ask(engine, "two") == other.digest
        if change is in_place and memory == 1:  # the bytes themselves are gone
            with pytest.raises(AdapterFileError, match="changed since it was first read"):
                ask(engine, "one")
        else:
            assert ask(engine, "one") == old.digest
        assert engine.store.describe("one")["digest"] == old.digest
        if change is not removed:
            engine.store.register("one", tmp_path / "one")
            assert ask(engine, "one") == new.digest
            assert engine.store.fault_of("one") is None


def test_what_is_kept_open_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(originals, "MOST", 1)
    old, new, other = values(3)
    old.save(tmp_path / "one")
    other.save(tmp_path / "two")
    with Engine((tiny("llama"), tiny_tokenizer()), tmp_path, memory=1) as engine:
        assert ask(engine, "one") == old.digest
        assert ask(engine, "two") == other.digest
        assert len(engine.store.originals.kept) == 1
        assert ask(engine, "one") == old.digest, "as it still lies there"
        new.save(tmp_path / "one")
        with pytest.raises(AdapterFileError, match="changed since it was first read"):
            ask(engine, "one")
        engine.store.unregister("two")
        assert not engine.store.originals.kept
