"""What `generate` and `eval` use of an adapter: the base that its run names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gossamer as gs
from gossamer.cli import main
from gossamer.cli.shared import load_with_adapter
from gossamer.errors import UsageError
from gossamer.models import tiny, tiny_tokenizer
from tests.adapters import trained


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def used(adapter: Path, base: str | None = None) -> str:
    return load_with_adapter(base, str(adapter), None, "fp32", "cpu", False).base


def test_the_base_is_the_one_that_was_trained_on(base: Path, tmp_path: Path) -> None:
    model, _ = gs.load_base(base)
    value = trained(model, gs.LoRA(r=2))
    alone = value.save(tmp_path / "alone")
    assert used(alone) == str(base), "as PEFT's config says"
    (tmp_path / "run").mkdir()
    inside = value.save(tmp_path / "run" / "adapter")
    told = {"base": f"{base}/."}
    (tmp_path / "run" / "report.json").write_text(json.dumps(told))
    assert used(tmp_path / "run") == used(inside) == told["base"], "as the run says"
    assert used(inside, str(base)) == str(base), "or whoever asks"


def test_a_base_that_nobody_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nameless = trained(tiny("llama"), gs.LoRA(r=2)).save(tmp_path / "nameless")
    with pytest.raises(UsageError, match="does not say what its base is") as raised:
        used(nameless)
    assert "--base" in raised.value.hint
    for words in (["generate", "hi"], ["eval", "--data", "x.jsonl"]):
        assert main(words) == 2
        assert "Missing option '--base'" in capsys.readouterr().err


def test_what_is_measured_names_it(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = gs.load_base(base)
    adapter = trained(model, gs.LoRA(r=2)).save(tmp_path / "one")
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    assert main(["eval", "--adapter", str(adapter), "--data", str(tmp_path / "d.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["base"] == str(base)
