"""The server as the command line starts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from torch import nn

from gossamer.cli import main
from gossamer.models import tiny, tiny_tokenizer
from gossamer.quant import QuantizedLinear
from gossamer.serving.api import server
from tests.serving.api.conftest import until


def test_both_bases_are_loaded_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, model in (("base", tiny("llama")), ("encoder", tiny("bert"))):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    made: list[Any] = []

    def served(app: Any, *_: Any, **__: Any) -> None:
        with TestClient(app, "http://localhost") as client:
            until(lambda: client.get("/ready").status_code == 200)
            made.extend((app.state.service.worker.engine.model, app.state.service.vectors.embedder.model))

    monkeypatch.setattr(server, "serve", served)
    words = ["--base", str(tmp_path / "base"), "--embeddings", str(tmp_path / "encoder"), "--port", "0"]
    for more, kind in (([], nn.Linear), (["--quant", "nf4"], QuantizedLinear)):
        made.clear()
        assert main(["serve", *words, "--dtype", "bf16", *more]) == 0
        model, encoder = made
        assert type(model.model.layers[0].self_attn.q_proj) is kind
        assert type(encoder.bert.encoder.layer[0].attention.self.query) is kind
        assert model.dtype == encoder.dtype == torch.bfloat16
