"""Model folders appear whole, or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from gossamer.errors import DiskError, StateError
from gossamer.models import tiny, tiny_tokenizer, write_model_folder


def test_plain_transformers_reads_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    assert write_model_folder(model, tiny_tokenizer(), tmp_path / "model") == tmp_path / "model"
    assert capfd.readouterr() == ("", "")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (256, 258)
    assert tokenizer.chat_template
    assert {path.suffix for path in (tmp_path / "model").iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_without_a_tokenizer(tmp_path: Path) -> None:
    write_model_folder(tiny("bert"), None, tmp_path / "model")
    assert not list((tmp_path / "model").glob("tokenizer*"))


def test_what_a_gguf_leaves_is_dropped(tmp_path: Path) -> None:
    model = tiny("llama")
    model.hf_quantizer = object()  # type: ignore[assignment]
    model.config.quantization_config = GgufConfig()
    write_model_folder(model, tiny_tokenizer(), tmp_path / "model")
    assert "quantization" not in (tmp_path / "model" / "config.json").read_text()


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(StateError, match="exists"):
        write_model_folder(tiny("llama"), None, tmp_path / "model")
    assert list((tmp_path / "model").iterdir()) == []


def test_a_full_disk_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError):
        write_model_folder(tiny("llama"), tiny_tokenizer(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
