"""An adapter is written to as its own folder says, wherever it is used; what cannot be used so is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gossamer as gs
from gossamer.cli import main
from gossamer.cli.shared import load_with_adapter
from gossamer.errors import AdapterFileError, UnsupportedError
from gossamer.files.companions import CHAT, GENERATION, TEMPLATES, TOKENIZER, is_companion
from gossamer.models import tiny, tiny_tokenizer
from gossamer.serving import Engine, vllm
from gossamer.serving.chat_format import PLAIN, ChatFormats, common_format
from tests.adapters import trained

TURN = "<|im_start|>"
"""A special token of the toy that ends nothing."""


TEMPLATE = "{{ messages[0].content }} said {{ eos_token }}"


def learned() -> gs.Adapter:
    return trained(tiny("llama"), gs.LoRA(r=2))


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
    learned().save(tmp_path / "adapter")
    own(tmp_path / "adapter", change)
    _, tokenizer, _, _ = load_with_adapter(
        str(tmp_path / "base"), str(tmp_path / "adapter"), None, "fp32", "cpu", False
    )
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
    learned().save(tmp_path / "one")
    own(tmp_path / "one", change)
    with (
        Engine((tiny("llama"), tiny_tokenizer()), tmp_path) as engine,
        pytest.raises(UnsupportedError, match="own tokenizer") as raised,
    ):
        [*engine.generate(["x"], "one", max_tokens=1)]
    assert word in raised.value.got


def test_an_answer_ends_where_the_adapter_was_taught_to(tmp_path: Path) -> None:
    for name in ("one", "plain"):
        learned().save(tmp_path / name)
    own(tmp_path / "one", lambda tokenizer: setattr(tokenizer, "eos_token", TURN))
    turn = int(tiny_tokenizer().convert_tokens_to_ids(TURN))  # type: ignore[arg-type]
    with Engine((tiny("llama"), tiny_tokenizer()), tmp_path) as engine:
        asked = ["one", "plain", {"one": 0.5, "plain": 0.5}, None]
        replies = [*engine.generate(["x"] * 4, asked, max_tokens=3, logit_bias={turn: 100.0})]
    assert [one.finish for one in replies] == ["stop", "length", "stop", "length"]


# Every way in which a folder can say it ------------------------------------------------------------------------


def text(name: str, content: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))

    return write


def whole(folder: Path) -> None:
    own(folder, lambda tokenizer: setattr(tokenizer, "chat_template", TEMPLATE))


def in_settings(folder: Path) -> None:
    """As older versions of transformers wrote it."""
    whole(folder)
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    text("tokenizer_config.json", settings | {"chat_template": TEMPLATE})(folder)


def settings_alone(folder: Path) -> None:
    in_settings(folder)
    (folder / "tokenizer.json").unlink()


WAYS: dict[str, Callable[[Path], None]] = {
    "a whole tokenizer": whole,
    "a template in its settings": in_settings,
    "settings without a vocabulary": settings_alone,
    "a template alone": text("chat_template.jinja", TEMPLATE),
    "a processor's template": text("chat_template.json", {"chat_template": TEMPLATE}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_a_template_holds_however_it_is_written(
    way: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = learned().save(tmp_path / "one")
    WAYS[way](folder)
    tokenizer = tiny_tokenizer()
    assert ChatFormats(tokenizer).of(folder).template == TEMPLATE
    assert tokenizer.chat_template != TEMPLATE, "the base's is left as it is"
    assert "chat template" in vllm.check(folder, tokenizer=tokenizer).reason
    written: list[str] = []
    plain: Any = type(tokenizer).apply_chat_template

    def heard(self: Any, *given: Any, **options: Any) -> Any:
        written.append(plain(self, *given, **options))
        return written[-1]

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", heard)
    words = ["--base", str(base), "--adapter", str(folder), "--max-tokens", "1", "--chat", "--json", "hi"]
    assert main(["generate", *words]) == 0, capsys.readouterr().err
    assert written == [f"hi said {tokenizer.eos_token}"]


def test_every_file_that_says_it_is_known() -> None:
    """What merge carries with an adapter, serving reads, and adapters of the hub are fetched with."""
    for name in (*TOKENIZER, *TEMPLATES[:2], GENERATION, f"{TEMPLATES[2]}/tool_use.jinja"):
        assert is_companion(name, CHAT)
    for name in ("README.md", "model.py", "training_args.bin", f"{TEMPLATES[2]}/x.py", "x/tokenizer.json", "../a"):
        assert not is_companion(name, CHAT)


@pytest.mark.parametrize("ends", [[TURN], TURN])
def test_the_ends_of_its_settings_hold(ends: Any, base: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(ends)
    folder = learned().save(tmp_path / "one")
    text(GENERATION, {"eos_token_id": ids})(folder)
    turn = {*(ids if isinstance(ids, list) else [ids])}
    assert ChatFormats(tokenizer).of(folder).ends == turn
    assert "end of an answer" in vllm.check(folder, tokenizer=tokenizer).reason
    text(GENERATION, {"eos_token_id": "end"})(folder)
    with pytest.raises(AdapterFileError, match="by their ids"):
        ChatFormats(tokenizer).of(folder)


def test_generating_ends_there(base: Path, tmp_path: Path) -> None:
    folder = learned().save(tmp_path / "one")
    with Engine((tiny("llama"), tiny_tokenizer()), {"one": folder}) as engine:
        (whole,) = engine.generate("abc", "one", max_tokens=6)
    assert len(whole.tokens) == 6
    text(GENERATION, {"eos_token_id": whole.tokens[2]})(folder)
    model, tokenizer = load_with_adapter(str(base), str(folder), None, "fp32", "cpu", False)[:2]
    (told,) = gs.generate(model, tokenizer, "abc", max_tokens=6)
    with Engine((tiny("llama"), tiny_tokenizer()), {"one": folder}) as engine:
        (one,) = engine.generate("abc", "one", max_tokens=6)
    assert len(one.tokens) == told["tokens"] == 1 + whole.tokens.index(whole.tokens[2])
    assert one.finish == "stop"


def test_a_tokenizer_that_cannot_be_read_is_refused_everywhere(base: Path, tmp_path: Path) -> None:
    folder = learned().save(tmp_path / "one")
    text("tokenizer.json", "{}")(folder)
    for use in (
        lambda: ChatFormats(tiny_tokenizer()).of(folder),
        lambda: load_with_adapter(str(base), str(folder), None, "fp32", "cpu", False),
    ):
        with pytest.raises(AdapterFileError, match="own tokenizer cannot be read"):
            use()
    assert "cannot be read" in vllm.check(folder, tokenizer=tiny_tokenizer()).reason
