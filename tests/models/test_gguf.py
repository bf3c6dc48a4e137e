"""A model folder as a GGUF file: transformers' own reader finds the same model and the same tokens in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import gossamer as gs
from gossamer.errors import BaseFileError, StateError, UnsupportedError, UsageError
from gossamer.families import GGUF_SPLITS
from gossamer.models import tiny, tiny_tokenizer, write_model_folder
from gossamer.models.gguf import modelfile, write_gguf
from tests.adapters import tokens
from tests.models.llama_cpp import said_by_llama_cpp

TEXT = ["the cat sat on the mat", "12 cats and 345 mats", "it's a hat, isn't it?"] * 8


def tokenizer(*steps: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that cuts text in these steps."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.Sequence([*steps]) if len(steps) > 1 else steps[0]  # pyright: ignore[reportAttributeAccessIssue]
    own.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|begin|>", "<|end|>"])
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|end|>"
    )


def byte_level(use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


CUTS = {
    "gpt-2": (byte_level(),),
    "smollm": (pre_tokenizers.Digits(individual_digits=True), byte_level()),
    **{
        name: (pre_tokenizers.Split(pattern, "isolated"), byte_level(False))
        for pattern, name in ((Regex(text), name) for text, name in GGUF_SPLITS.items())
    },
}


def model_of(kind: str) -> Any:
    if kind != "qwen3":
        return tiny(kind)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 320}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def saved(kind: str, folder: Path, cut: str = "gpt-2") -> Path:
    return write_model_folder(model_of(kind), tokenizer(*CUTS[cut]), folder)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_same_model(kind: str, tmp_path: Path):
    done = write_gguf(saved(kind, tmp_path / "model"), tmp_path / "model.gguf", dtype="f32")
    model, words = gs.load_base(tmp_path / "model.gguf")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, model_of(kind)(tokens()).logits, rtol=1e-5, atol=1e-5)
    assert words("the cat, 12").input_ids == tokenizer(*CUTS["gpt-2"])("the cat, 12").input_ids
    assert done["tensors"] == len(gguf.GGUFReader(tmp_path / "model.gguf").tensors)
    assert done["bytes"] == (tmp_path / "model.gguf").stat().st_size
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.gguf"}


@pytest.mark.parametrize("cut", CUTS)
def test_the_tokenizer_is_named(cut: str, tmp_path: Path):
    write_gguf(saved("llama", tmp_path / "model", cut), tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    own = tokenizer(*CUTS[cut])
    assert fields["tokenizer.ggml.pre"] == cut
    assert fields["tokenizer.ggml.tokens"][: len(own)] == own.convert_ids_to_tokens([*range(len(own))])
    assert fields["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert fields["tokenizer.ggml.token_type"][-1] == 5
    assert fields["tokenizer.ggml.eos_token_id"] == own.eos_token_id


@pytest.mark.parametrize(("dtype", "kind"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_matrices_are_rounded_and_vectors_are_not(dtype: str, kind: torch.dtype, tmp_path: Path):
    write_gguf(saved("llama", tmp_path / "model"), tmp_path / "model.gguf", dtype=dtype)
    stored = {one.name: one for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    model = tiny("llama")
    down = stored["blk.1.ffn_down.weight"]
    found = torch.from_numpy(np.ascontiguousarray(down.data).view(np.uint8).reshape(-1).copy()).view(kind)
    assert torch.equal(found, model.model.layers[1].mlp.down_proj.weight.data.to(kind).reshape(-1))
    assert stored["output_norm.weight"].tensor_type.name == "F32"


def test_stretched_positions(tmp_path: Path):
    """llama.cpp divides each frequency by what transformers' own Llama 3 multiplies it with."""
    stretched = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = tiny("llama", rope_parameters=stretched)
    folder = write_model_folder(model, tokenizer(*CUTS["gpt-2"]), tmp_path / "model")
    write_gguf(folder, tmp_path / "model.gguf")
    (factors,) = [one for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors if one.name == "rope_freqs.weight"]
    plain = tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    expected = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    torch.testing.assert_close(torch.from_numpy(np.array(factors.data)), expected, rtol=1e-5, atol=0)
    assert expected.max() == pytest.approx(8, rel=1e-4)


def test_refusals_leave_nothing(tmp_path: Path):
    output = tmp_path / "model.gguf"
    with pytest.raises(UnsupportedError, match="architecture"):
        write_gguf(saved("gpt2", tmp_path / "gpt2"), output)
    with pytest.raises(UnsupportedError, match="tokenizer"):
        write_gguf(write_model_folder(tiny("llama"), tiny_tokenizer(), tmp_path / "bytes"), output)
    llama = saved("llama", tmp_path / "llama")
    with pytest.raises(UsageError, match="type"):
        write_gguf(llama, output, dtype="q4_0")
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(StateError, match="exists"):
        write_gguf(llama, tmp_path / "there.gguf")
    (llama / "tokenizer.json").write_text("[]")
    with pytest.raises(BaseFileError, match="not a tokenizer"):
        write_gguf(llama, output)
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    stretched = write_model_folder(tiny("llama", rope_parameters=linear), tokenizer(byte_level()), tmp_path / "linear")
    with pytest.raises(UnsupportedError, match="stretching"):
        write_gguf(stretched, output)
    assert (tmp_path / "there.gguf").read_text() == "mine"
    assert not output.exists()
    assert not [*tmp_path.glob(".*")]


def test_a_modelfile():
    assert modelfile("m.gguf") == "FROM m.gguf\n"
    assert modelfile("m.gguf", "a.gguf", '<"end">') == 'FROM m.gguf\nADAPTER a.gguf\nPARAMETER stop "<\\"end\\">"\n'


@pytest.mark.llama_cpp
def test_llama_cpp_says_the_same(tmp_path: Path):
    """With and without an adapter, on the real model; llama.cpp keeps its cache in float16, hence the tolerance."""
    folder = gs.fetch("smollm2-135m")
    model, words = gs.load_base(folder, dtype="float32")
    write_gguf(folder, tmp_path / "model.gguf", dtype="f32")
    prompts = [words(text).input_ids for text in ("The capital of France is", "Review: i love it!\nSentiment:")]
    found = said_by_llama_cpp(tmp_path / "model.gguf", prompts)
    for prompt, row in zip(prompts, found, strict=True):
        with torch.no_grad():
            own = torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1].double(), -1)
        assert max(row, key=lambda one: row[one]) == int(own.argmax())
        assert max(abs(own[one].item() - value) for one, value in row.items()) < 0.02
