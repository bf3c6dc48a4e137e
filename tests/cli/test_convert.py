"""gossamer convert: an adapter there and back, a model to GGUF with its Modelfile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gossamer as gs
from gossamer.cli import main
from gossamer.models import tiny, tiny_tokenizer, write_model_folder
from tests.adapters import trained
from tests.models.test_gguf import saved


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return trained(tiny("llama"), gs.LoRA(r=4)).save(tmp_path / "adapter")


def test_an_adapter_there_and_back(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = write_model_folder(tiny("llama"), tiny_tokenizer(), tmp_path / "base")
    there = [str(adapter), str(tmp_path / "a.gguf"), "--to", "gguf", "--base", str(base)]
    assert main(["convert", *there, "--modelfile", str(tmp_path / "Modelfile"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["exact"], told["error"], told["lost"]) == (True, 0.0, [])
    assert (tmp_path / "Modelfile").read_text() == "FROM base\nADAPTER a.gguf\n"
    assert main(["convert", str(tmp_path / "a.gguf"), str(tmp_path / "again"), "--to", "peft"]) == 0
    assert "bit for bit" in capsys.readouterr().out
    one, two = gs.Adapter.load(adapter), gs.Adapter.load(tmp_path / "again")
    assert one.named_tensors().keys() == two.named_tensors().keys()
    assert all((one.named_tensors()[name] == tensor).all() for name, tensor in two.named_tensors().items())


def test_a_model_becomes_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = saved("llama", tmp_path / "model")
    words = [str(folder), str(tmp_path / "m.gguf"), "--to", "gguf", "--type", "f16"]
    assert main(["convert", *words, "--modelfile", str(tmp_path / "Modelfile")]) == 0
    assert "float16" in capsys.readouterr().out
    assert (tmp_path / "Modelfile").read_text() == 'FROM m.gguf\nPARAMETER stop "<|end|>"\n'
    assert main(["convert", *words]) == 2
    assert "exists" in capsys.readouterr().err


def test_what_makes_no_sense_is_refused(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = saved("llama", tmp_path / "model")
    assert main(["convert", str(folder), str(tmp_path / "m"), "--to", "mlx"]) != 0
    assert "GGUF alone" in capsys.readouterr().err
    words = ["convert", str(adapter), str(tmp_path / "out")]
    assert main([*words, "--to", "gguff"]) != 0
    assert "did you mean 'gguf'" in capsys.readouterr().err
    assert main([*words, "--to", "mlx", "--modelfile", str(tmp_path / "Modelfile")]) == 2
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "Modelfile").exists()
