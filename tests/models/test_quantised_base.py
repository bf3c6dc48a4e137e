"""Bases in 4 and 8 bits: quantised while they load, written, read again here and by transformers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import gossamer as gs
from gossamer.errors import BaseFileError, NonFiniteError, StateError, UnsupportedError, UsageError
from gossamer.models import load_base, quantize_base, tiny, tiny_tokenizer, write_model_folder
from gossamer.models.quantizer import kept_dense, packed_modules
from gossamer.planning.fake import LiveBytes
from gossamer.quant import FORMATS, quantize_model
from tests.adapters import tokens

every_format = pytest.mark.parametrize("quant", FORMATS)


def wide(seed: int = 0, layers: int = 2, **others: Any) -> LlamaForCausalLM:
    """A toy whose widths bitsandbytes' own kernels take."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=320, num_hidden_layers=layers, **(sizes | others))
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model_folder(wide(), tiny_tokenizer(), tmp_path / "base")


def edit(folder: Path, change: dict[str, Any]) -> None:
    """Replace, add or (None) remove stored tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file) | change
    save_file({name: value for name, value in tensors.items() if value is not None}, file, {"format": "pt"})


@every_format
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_quantised_while_loading_is_quantised_afterwards(kind: str, quant: str, tmp_path: Path):
    folder = write_model_folder(tiny(kind), tiny_tokenizer(), tmp_path / "base")
    dense, _ = load_base(folder)
    expected = quantize_model(dense, quant, kept_dense(dense))
    model, _ = load_base(folder, quant=quant)
    assert packed_modules(model).keys() == packed_modules(expected).keys() != set()
    assert torch.equal(model(tokens()).logits, expected(tokens()).logits)
    assert gs.base_fingerprint(model) == gs.base_fingerprint(tiny(kind))


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_stay_dense(tied: bool, tmp_path: Path):
    original = wide(tie_word_embeddings=tied)
    model, _ = load_base(write_model_folder(original, tiny_tokenizer(), tmp_path / "base"), quant="nf4")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert torch.equal(head.weight, original.lm_head.weight)
    assert (head.weight is embedding.weight) == tied
    assert len(packed_modules(model)) == 14


@every_format
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_folder_reads_back_bit_for_bit(kind: str, quant: str, tmp_path: Path):
    base = write_model_folder(tiny(kind), tiny_tokenizer(), tmp_path / "base")
    done = quantize_base(base, tmp_path / "packed", quant=quant)
    model, _ = load_base(base, quant=quant)
    again, tokenizer = load_base(tmp_path / "packed")
    one, other = (
        {
            f"{path}.{name}": value
            for path, module in packed_modules(net).items()
            for name, value in module.named_buffers()
        }
        for net in (model, again)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert gs.base_fingerprint(again) == gs.base_fingerprint(tiny(kind))
    assert tokenizer is not None
    assert done["bytes"] == sum(module.packed.nbytes for module in packed_modules(model).values())
    assert done["bits"] == pytest.approx(8 * done["bytes"] / done["parameters"])
    write_model_folder(again, tokenizer, tmp_path / "twice")
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (
        tmp_path / "packed" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("quant", ["nf4", "nf4-single", "fp4", "fp4-single"])
def test_transformers_reads_our_folder(quant: str, base: Path, tmp_path: Path):
    quantize_base(base, tmp_path / "packed", quant=quant)
    ours, _ = load_base(tmp_path / "packed")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    torch.testing.assert_close(theirs(tokens()).logits, ours(tokens()).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_we_read_what_transformers_and_bitsandbytes_wrote(table: str, double: bool, base: Path, tmp_path: Path):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=table,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    tiny_tokenizer().save_pretrained(tmp_path / "theirs")
    ours, _ = load_base(tmp_path / "theirs")
    assert len(packed_modules(ours)) == 14
    torch.testing.assert_close(ours(tokens()).logits, theirs(tokens()).logits, rtol=0, atol=1e-6)
    fingerprint = gs.base_fingerprint(ours)
    assert fingerprint["weights"] == "unknown"  # nobody noted what it was made of
    gs.attach(wide(), gs.LoRA(r=2))


def test_an_adapter_of_a_quantised_base_fits_the_original(base: Path):
    model, _ = load_base(base, quant="nf4")
    gs.attach(model, gs.LoRA(r=2))
    adapter = gs.capture(model)
    gs.attach(wide(), adapter)
    with pytest.raises(gs.BaseMismatchError):
        gs.attach(wide(seed=1), adapter)


def test_a_sharded_base(tmp_path: Path):
    model = wide(layers=4)
    model.save_pretrained(tmp_path / "base", max_shard_size="200KB")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    shards = [*(tmp_path / "base").glob("model-*.safetensors")]
    assert len(shards) > 3
    with LiveBytes() as live:
        loaded, _ = load_base(tmp_path / "base", quant="nf4")
    assert len(packed_modules(loaded)) == 28
    stored = sum(part.nbytes for part in (*loaded.parameters(), *loaded.buffers()))
    largest = max(shard.stat().st_size for shard in shards)
    assert live.peak <= (stored + largest) * 1.1
    dense = sum(parameter.nbytes for parameter in model.parameters())
    assert live.peak < 0.75 * dense


def test_an_existing_folder_is_left_alone(base: Path):
    with pytest.raises(StateError, match="exists"):
        quantize_base(base, base)


def test_asked_for_another_format_than_the_stored_one(base: Path, tmp_path: Path):
    quantize_base(base, tmp_path / "packed", quant="int8")
    load_base(tmp_path / "packed", quant="int8")
    with pytest.raises(UsageError, match="another format") as caught:
        load_base(tmp_path / "packed", quant="nf4")
    assert caught.value.where == str(tmp_path / "packed")


def claim(folder: Path, stored: Any) -> None:
    """Let the config say that the weights are stored so."""
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | {"quantization_config": stored}))


@pytest.mark.parametrize(
    ("stored", "got"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}, "bitsandbytes"),
        ("nf4", "nf4"),
    ],
)
def test_other_quantisations_are_refused_by_name(stored: Any, got: str, base: Path):
    claim(base, stored)
    with pytest.raises(UnsupportedError) as caught:
        load_base(base)
    assert (caught.value.where, caught.value.got) == (str(base), got)


@pytest.mark.parametrize("stored", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"load_in_4bit": "yes"}])
def test_plain_weights_under_a_config_that_says_quantised(stored: Any, base: Path):
    claim(base, stored)
    with pytest.raises(BaseFileError, match="none is") as caught:
        load_base(base)
    assert caught.value.where == str(base)


Q = "model.layers.1.self_attn.q_proj"


def without_offset() -> torch.Tensor:
    """A quantisation state like the toy's own, but for the offset of its scales."""
    state = {"quant_type": "nf4", "blocksize": 64, "shape": [64, 64], "nested_blocksize": 256}
    return torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("weight", None, "without its codes"),
        ("weight", torch.zeros(9, 1, dtype=torch.uint8), "do not fit"),
        ("weight.absmax", None, "not read"),
        ("weight.absmax", torch.zeros(3, dtype=torch.uint8), "do not fit"),
        ("weight.nested_absmax", None, "do not fit"),
        ("weight.nested_absmax", torch.full((1,), torch.nan), "not finite"),
        ("weight.quant_state.bitsandbytes__nf4", None, "without its quantisation state"),
        ("weight.quant_state.bitsandbytes__nf4", without_offset(), "without their offset"),
        ("weight.quant_map", torch.linspace(-1, 1, 16), "table of codes"),
    ],
)
def test_a_broken_part_is_refused_with_its_module(part: str, value: Any, says: str, base: Path, tmp_path: Path):
    quantize_base(base, tmp_path / "packed")
    edit(tmp_path / "packed", {f"{Q}.{part}": value})
    with pytest.raises(BaseFileError, match=says) as caught:
        load_base(tmp_path / "packed")
    assert caught.value.where in (Q, f"{Q}.{part}")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({f"{Q}.weight.stranger": torch.zeros(2)}, "not in the model"),
        ({"model.norm.weight": None}, "not in the file"),
        ({"model.norm.weight": torch.ones(3)}, "another shape"),
    ],
)
def test_weights_must_fit_exactly(change: dict[str, Any], kind: str, base: Path, tmp_path: Path):
    quantize_base(base, tmp_path / "packed")
    edit(tmp_path / "packed", change)
    with pytest.raises(BaseFileError, match=kind) as caught:
        load_base(tmp_path / "packed")
    assert (caught.value.where, caught.value.got) == (str(tmp_path / "packed"), *change)


def test_weights_that_cannot_be_quantised(base: Path):
    edit(base, {f"{Q}.weight": torch.full((64, 64), torch.nan)})
    with pytest.raises(NonFiniteError, match="not finite") as caught:
        load_base(base, quant="nf4")
    assert caught.value.where == f"{Q}.weight"
    edit(base, {f"{Q}.weight": torch.zeros(64, 32)})
    with pytest.raises(BaseFileError, match="shape"):
        load_base(base, quant="nf4")


@pytest.mark.slow
def test_the_real_base_takes_half_a_byte_a_parameter():
    gs.fetch("smollm2-135m")
    with LiveBytes() as live:
        model, _ = load_base("smollm2-135m", dtype="float32", quant="nf4")
    packed = packed_modules(model).values()
    count = sum(module.in_features * module.out_features for module in packed)
    assert sum(module.packed.nbytes for module in packed) / count <= 0.53
    stored = sum(part.nbytes for part in (*model.parameters(), *model.buffers()))
    assert live.peak <= stored * 1.15  # what quantising one weight takes beside what is stored already


def mamba_hybrid(tmp_path: Path) -> Path:
    """A model that reads the weight of a linear module without calling it, beside convolutions and experts."""
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    kinds: Any = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    config = JambaConfig(
        vocab_size=320, num_hidden_layers=2, num_experts=4, mamba_d_state=8, use_mamba_kernels=False, **sizes, **kinds
    )
    return write_model_folder(JambaForCausalLM(config), tiny_tokenizer(), tmp_path / "base")


STORED = {
    "llama": ("embeddings", False),
    "gpt2": ("embeddings", False),
    "mixtral": ("experts that are stacked in one parameter", True),
    "qwen3_moe": ("experts that are stacked in one parameter", True),
    "jamba": ("experts that are stacked in one parameter", True),
}


@pytest.mark.parametrize("kind", STORED)
def test_what_is_packed_and_what_is_not_is_counted_over_the_whole_model(kind: str, tmp_path: Path):
    base = mamba_hybrid(tmp_path) if kind == "jamba" else None
    base = base or write_model_folder(tiny(kind), tiny_tokenizer(), tmp_path / "base")
    most, warns = STORED[kind]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, _ = load_base(base, quant="nf4")
    assert any(most in str(one.message) for one in said) == warns
    whole = quantize_base(base, tmp_path / "packed", quant="nf4")["model"]
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    files = sum(one.nbytes for name, one in stored.items() if "quant_map" not in name and "quant_state" not in name)
    assert whole["parameters"] == sum(parameter.numel() for parameter in load_base(base)[0].parameters())
    assert files == whole["bytes"] - 4 * len(packed_modules(model))  # the offset of the scales is in the state
    assert whole["bits"] == 8 * whole["bytes"] / whole["parameters"]
    assert next(iter(whole["dense"])) == most
    dense, _ = load_base(base)
    for path, module in packed_modules(model).items():  # however a weight is used, it is the one the codes stand for
        own = dense.get_parameter(f"{path}.weight")
        own.data.copy_(module.dequantized().T if module.turned else module.dequantized())
    torch.testing.assert_close(model(tokens()).logits, dense(tokens()).logits, rtol=0, atol=1e-5)
