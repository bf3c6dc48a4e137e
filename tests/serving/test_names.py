"""A name means one thing: one model, and one value until it is given another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import gossamer as gs
from gossamer.cli import main
from gossamer.cli.shared import load_with_adapter
from gossamer.errors import AdapterFileError, UnsupportedError, UsageError
from gossamer.models import tiny, tiny_tokenizer
from gossamer.serving import originals
from gossamer.serving.chat_format import PLAIN, ChatFormats, common_format
from gossamer.serving.engine import Engine
from gossamer.serving.names import check_names
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


# An adapter's own tokenizer ------------------------------------------------------------------------------------


TURN = "<|im_start|>"
"""A special token of the toy that ends nothing."""


def own(folder: Path, change: Any) -> Path:
    tokenizer = tiny_tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_copy_of_the_bases_tokenizer_is_nothing(tmp_path: Path) -> None:
    chat_formats = ChatFormats(tiny_tokenizer())
    assert chat_formats.of(tmp_path) is PLAIN
    assert chat_formats.of(own(tmp_path / "same", lambda _: None)) is PLAIN

    def sides(tokenizer: Any) -> None:
        tokenizer.padding_side = tokenizer.truncation_side = "left"
        tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)

    assert chat_formats.of(own(tmp_path / "sides", sides)) is PLAIN, "how batches were made is no part of a text"


def test_its_template_and_its_end_hold(tmp_path: Path) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.chat_template = "{{ messages[0].content }}!"
        tokenizer.eos_token = TURN

    base = tiny_tokenizer()
    turn = int(base.convert_tokens_to_ids(TURN))  # type: ignore[arg-type]
    assert turn != base.eos_token_id
    found = ChatFormats(base).of(own(tmp_path / "own", change))
    assert found.template == "{{ messages[0].content }}!"
    assert found.ends == {turn}
    assert found.tokens["eos_token"] == TURN
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "chat_template.jinja").write_text("hi")
    assert ChatFormats(base).of(tmp_path / "alone").template == "hi"
    with pytest.raises(UnsupportedError, match="different chat templates"):
        common_format([found, PLAIN])
    assert common_format([PLAIN, PLAIN]) is PLAIN


def test_the_command_speaks_to_an_adapter_as_its_folder_says(tmp_path: Path, capsys: Any) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.chat_template = "{{ messages[0].content }}!"
        tokenizer.eos_token = TURN

    tiny("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    values(1)[0].save(tmp_path / "adapter")
    own(tmp_path / "adapter", change)
    _, tokenizer, _ = load_with_adapter(str(tmp_path / "base"), str(tmp_path / "adapter"), None, "fp32", "cpu", False)
    turns = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "hi!"
    assert tokenizer.eos_token == TURN
    own(tmp_path / "adapter", lambda tokenizer: tokenizer.add_tokens(["<more>"]))
    words = ["--base", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "hi"]
    assert main(["generate", *words]) == 2
    assert "other tokens than the base's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda one: one.add_tokens(["<new>"]), "added tokens"),
        (lambda one: one.add_special_tokens({"pad_token": "<mine>"}), "added tokens"),
        (lambda one: setattr(one.backend_tokenizer, "normalizer", __import__("tokenizers").normalizers.Lowercase()),
         "normalizer"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_makes_other_tokens_is_refused(change: Any, word: str, tmp_path: Path) -> None:
    values(1)[0].save(tmp_path / "one")
    own(tmp_path / "one", change)
    with (
        Engine((tiny("llama"), tiny_tokenizer()), tmp_path) as engine,
        pytest.raises(UnsupportedError, match="own tokenizer") as raised,
    ):
        ask(engine, "one")
    assert word in raised.value.got


def test_an_answer_ends_where_the_adapter_was_taught_to(tmp_path: Path) -> None:
    for name in ("one", "plain"):
        values(1)[0].save(tmp_path / name)
    own(tmp_path / "one", lambda tokenizer: setattr(tokenizer, "eos_token", TURN))
    turn = int(tiny_tokenizer().convert_tokens_to_ids(TURN))  # type: ignore[arg-type]
    with Engine((tiny("llama"), tiny_tokenizer()), tmp_path) as engine:
        asked = ["one", "plain", {"one": 0.5, "plain": 0.5}, None]
        replies = [*engine.generate(["x"] * 4, asked, max_tokens=3, logit_bias={turn: 100.0})]
    assert [one.finish for one in replies] == ["stop", "length", "stop", "length"]
