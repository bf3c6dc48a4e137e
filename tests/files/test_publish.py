"""Model cards, and a hub that is a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner
from ruamel.yaml import YAML

import gossamer as gs
from gossamer.cli import convert as convert_verb
from gossamer.cli import pull as pull_verb
from gossamer.cli import push as push_verb
from gossamer.errors import AdapterFileError, DownloadError, UsageError
from gossamer.files.card import model_card, spectrum_picture
from gossamer.files.hub import pull, push
from gossamer.models import tiny_tokenizer


class FakeHub:
    """What HfApi does, in a folder."""

    root: Path
    calls: list[str]

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
        self.calls.append(f"create {repository} private={private}")

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
        self.calls.append(f"upload {repo_id}")
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return f"fake://{repo_id}"

    def model_info(self, repository: str, *, revision: str | None, **_: Any) -> Any:
        folder = self.root / repository
        if not folder.is_dir():
            raise OSError("404 not found")
        paths = [one for one in folder.rglob("*") if one.is_file()]
        files = [SimpleNamespace(rfilename=str(one.relative_to(folder)), size=one.stat().st_size) for one in paths]
        return SimpleNamespace(sha=revision or "newest", siblings=files)

    def snapshot_download(self, repository: str, *, local_dir: str, allow_patterns: list[str], **_: Any) -> str:
        for name in allow_patterns:
            Path(local_dir, name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.root / repository / name, Path(local_dir, name))
        return local_dir


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    FakeHub.root, FakeHub.calls = tmp_path / "hub", []
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    return FakeHub


@pytest.fixture
def adapter(tmp_path: Path) -> gs.Adapter:
    slots = {"lora_A": torch.randn(2, 8), "lora_B": torch.randn(4, 2)}
    value = gs.Adapter(gs.LoRA(r=2, alpha=4.0, target_modules=("q_proj",)), {"model.layers.0.q_proj": slots})
    value.save(tmp_path / "adapter")
    (tmp_path / "adapter" / "secret.txt").write_text("not to be sent")
    return value


def test_a_card_is_valid_and_cannot_be_broken_out_of(adapter: gs.Adapter):
    card = model_card(
        adapter,
        base="a: b | <x>",
        licence="apache-2.0",
        data=["- one"],
        report={"loss": {"held_out": 1.5}, "flag": True},
    )
    _, front, body = card.split("---\n", 2)
    read = YAML(typ="safe").load(front)
    assert read["base_model"] == "a: b | <x>"
    assert read["datasets"] == ["- one"]
    assert read["license"] == "apache-2.0"
    assert adapter.digest in body
    assert "| loss.held_out | 1.5 |" in body
    assert "flag" not in body
    assert "<x>" not in body
    with pytest.raises(UsageError):
        model_card(adapter, base="a\nb", licence="mit")
    assert spectrum_picture(adapter).startswith("<svg")


def test_there_and_back(hub: type[FakeHub], adapter: gs.Adapter, tmp_path: Path):
    done = push(tmp_path / "adapter", "me/thing", "card", "<svg/>")
    assert hub.calls == ["create me/thing private=True", "upload me/thing"]
    assert "secret.txt" not in done["files"]
    assert not (hub.root / "me/thing/secret.txt").exists()
    assert pull("me/thing", tmp_path / "again") == adapter
    assert (tmp_path / "again" / "README.md").read_text() == "card"


def test_its_own_tokenizer_and_template_go_too(hub: type[FakeHub], adapter: gs.Adapter, tmp_path: Path):
    folder = tmp_path / "adapter"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}!"
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"name_or_path": "/home/me/base"}))
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    (folder / "additional_chat_templates").mkdir()
    for name in ("tools.jinja", "code.py"):
        (folder / "additional_chat_templates" / name).write_text("x")
    beside = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    beside |= {"additional_chat_templates/tools.jinja"}
    own = {"adapter_config.json", "adapter_model.safetensors", "gossamer.json", "README.md"}
    assert push(folder, "me/thing", "card")["files"].keys() == own | beside
    assert pull("me/thing", tmp_path / "again") == adapter
    for name in beside - {"tokenizer_config.json"}:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text()) == settings | {"name_or_path": "base"}


PATHS = ("/home/me/base", "~/base", "./base", "..\\base", "C:\\\\me\\base", "\\\\\\\\server\\base", "file:///me/base")


@pytest.mark.parametrize("path", PATHS)
def test_no_path_of_this_machine_is_published(path: str, hub: type[FakeHub], adapter: gs.Adapter, tmp_path: Path):
    """Wherever it stands: the base's name, a tokenizer's, and all that provenance says."""
    foreign = {"base_model_name_or_path": path, "tokenizer_name_or_path": path, "other": {"deep": [path]}}
    named = gs.Adapter(adapter.spec, adapter.tensors, None, {"base": path, "of": [{"file": path}], "by": "me"}, foreign)
    folder = named.save(tmp_path / "named")
    with pytest.raises(UsageError, match="path of this machine"):
        push(folder, "me/thing", "a card that names no base")
    assert hub.calls == []
    push(folder, "me/thing", model_card(named, base="owner/base", licence="mit"))
    sent = hub.root / "me/thing"
    assert json.loads((sent / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/base"
    everything = "".join(file.read_bytes().decode("latin-1") for file in sent.iterdir())
    assert path not in everything
    assert json.dumps(path)[1:-1] not in everything
    assert pull("me/thing", tmp_path / "again") == adapter
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == path, "ours stays"


@pytest.mark.parametrize(
    ("named", "card", "sent"),
    [
        ("owner/base", "a card", "owner/base"),
        (None, "a card", None),
        ("/x/models--owner--base/snapshots/01", "a card", "owner/base"),
        ("owner/base", "---\nbase_model: other/base\n---\n", "other/base"),
        ("owner/base", "---\nbase_model: a name\n---\n", "owner/base"),
    ],
)
def test_the_base_is_called_by_its_id(
    named: str | None, card: str, sent: str | None, hub: type[FakeHub], adapter: gs.Adapter, tmp_path: Path
):
    foreign = {"base_model_name_or_path": named}
    gs.Adapter(adapter.spec, adapter.tensors, None, {}, foreign).save(tmp_path / "named")
    push(tmp_path / "named", "me/thing", card)
    config = json.loads((hub.root / "me/thing" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == sent


def test_a_dry_run_uses_no_network(hub: type[FakeHub], adapter: gs.Adapter, tmp_path: Path):
    done = push(tmp_path / "adapter", "me/thing", "card", dry_run=True)
    assert hub.calls == []
    assert done["files"]["README.md"] == 4


def test_what_goes_wrong_is_said(hub: type[FakeHub], adapter: gs.Adapter, tmp_path: Path):
    with pytest.raises(UsageError):
        push(tmp_path / "adapter", "../x", "card")
    with pytest.raises(DownloadError, match="did not"):
        pull("me/nothing", tmp_path / "again")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(AdapterFileError):
        push(tmp_path / "adapter", "me/thing", "card")
    assert hub.calls == []
    assert not (tmp_path / "again").exists()


def test_the_verbs(hub: type[FakeHub], adapter: gs.Adapter, tmp_path: Path):
    def run(command: Any, *arguments: object) -> dict[str, Any]:
        words = [*map(str, arguments), "--json"]
        return json.loads(CliRunner().invoke(command, words, catch_exceptions=False).output)

    names = ("--base", "me/base", "--licence", "mit", "--data", "mine")
    assert run(push_verb.command, tmp_path / "adapter", "me/thing", *names, "--dry-run")["url"] == ""
    assert run(push_verb.command, tmp_path / "adapter", "me/thing", *names)["url"] == "fake://me/thing"
    assert run(pull_verb.command, "me/thing", "--output", tmp_path / "again")["sha256"] == adapter.digest
    told = run(convert_verb.command, tmp_path / "again", tmp_path / "mlx", "--to", "mlx")
    assert told["exact"]
    run(convert_verb.command, tmp_path / "mlx", tmp_path / "back", "--to", "peft")
    back = gs.Adapter.load(tmp_path / "back")
    assert torch.equal(back.delta("model.layers.0.q_proj"), adapter.delta("model.layers.0.q_proj"))
