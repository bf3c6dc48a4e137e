"""llama.cpp with our GGUF adapter beside our GGUF base says what we say, on the real model.

Its interpreter needs xllamacpp and is named by GOSSAMER_LLAMA_CPP; it is no dependency of the project.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gossamer as gs
from gossamer.files.foreign import write_foreign
from gossamer.models.gguf import write_gguf
from tests.adapters import shaken
from tests.models.llama_cpp import said_by_llama_cpp

TEXTS = ("The capital of France is", "Review: i love it!\nSentiment:", "def add(a, b): return 12 +")


@pytest.mark.llama_cpp
@pytest.mark.parametrize("spec", [gs.LoRA(r=8), gs.LoRA(r=4, alpha=3.0, scaling="rslora", rank_pattern={"q_proj": 6})])
def test_llama_cpp_adds_our_adapter(spec: gs.LoRA, tmp_path: Path):
    folder = gs.fetch("smollm2-135m")
    model, words = gs.load_base(folder, dtype="float32")
    prompts = [words(text).input_ids for text in TEXTS]
    plain = [said(model, prompt) for prompt in prompts]
    gs.attach(model, spec)
    shaken(model, "default", scale=0.02)
    write_gguf(folder, tmp_path / "model.gguf", dtype="f32")
    write_foreign(gs.capture(model), tmp_path / "adapter.gguf", "gguf", folder)
    found = said_by_llama_cpp(tmp_path / "model.gguf", prompts, tmp_path / "adapter.gguf")
    for prompt, row, before in zip(prompts, found, plain, strict=True):
        own = said(model, prompt)
        moved = max(abs(own[one].item() - before[one].item()) for one in row)
        wrong = max(abs(own[one].item() - value) for one, value in row.items())
        assert wrong < 0.02 < 0.3 < moved, f"differs by {wrong:.3g}, the adapter moves it by {moved:.3g}"


@torch.no_grad()
def said(model: torch.nn.Module, prompt: list[int]) -> torch.Tensor:
    return torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1].double(), -1)
