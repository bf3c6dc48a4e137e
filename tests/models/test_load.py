"""Loading a base: where it is found, what it may be, and what is refused before anything runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as noise

from gossamer.catalog.catalog import CATALOG, MANIFEST
from gossamer.errors import BaseFileError, ResourceError, UnsupportedError, UsageError
from gossamer.models import load_base, tiny, tiny_tokenizer, write_model_folder
from gossamer.models import locate as module
from tests.models.tiny_gguf import write_gguf

IDS = torch.tensor([[72, 101, 108, 108, 111]])


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No catalog but an empty one, no network, nothing in the hub's cache."""
    monkeypatch.setenv("GOSSAMER_HOME", str(tmp_path / "home"))

    def unreachable(name: str, **options: Any) -> str:
        raise AssertionError(f"went to the network for {name}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model_folder(tiny("llama"), tiny_tokenizer(), tmp_path / "llama")


@pytest.fixture
def quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """The test must leave the terminal empty."""
    capfd.readouterr()
    yield
    assert capfd.readouterr() == ("", "")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "architecture",
    ["llama", "gemma", "qwen2", "gpt2", "opt", "gpt_neox", "mistral", "bert", "bert_mlm", "llama_classifier"],
)
def test_every_architecture_comes_back_as_it_was(tmp_path: Path, architecture: str, quiet: None) -> None:
    model = tiny(architecture, seed=3)
    write_model_folder(model, tiny_tokenizer(), tmp_path / "base")
    loaded, tokenizer = load_base(tmp_path / "base", device="cpu")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    # not bit-equal: weights mapped from a file are aligned differently, and the matrix product may take another path
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    assert tokenizer("Hi").input_ids == tiny_tokenizer()("Hi").input_ids
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


def test_strings_name_folders_too(folder: Path) -> None:
    torch.testing.assert_close(
        load_base(str(folder))[0](IDS).logits, load_base(folder)[0](IDS).logits, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(("units", "expected"), [({"avx512_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")])
def test_auto_keeps_bfloat16_where_the_machine_multiplies_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    write_model_folder(tiny("llama", dtype=torch.bfloat16), tiny_tokenizer(), tmp_path / "base")
    assert load_base(tmp_path / "base", device="cpu")[0].dtype == getattr(torch, expected)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", "float32"),
        ("bf16", "bfloat16"),
        ("float16", "float16"),
        (torch.float32, "float32"),
    ],
)
def test_dtype(tmp_path: Path, dtype: str | torch.dtype, expected: str) -> None:
    write_model_folder(tiny("llama", dtype=torch.bfloat16), tiny_tokenizer(), tmp_path / "base")
    model, _ = load_base(tmp_path / "base", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, expected)}


def test_wrong_arguments(folder: Path) -> None:
    with pytest.raises(UsageError, match="unknown dtype") as caught:
        load_base(folder, dtype="bfloat")
    assert "bfloat16" in caught.value.hint
    with pytest.raises(UsageError, match="unknown dtype"):
        load_base(folder, dtype=torch.int8)
    with pytest.raises(UsageError, match="unknown device"):
        load_base(folder, device="gpu")
    with pytest.raises(ResourceError, match="not there"):
        load_base(folder, device="cuda:99")
    with pytest.raises(UsageError, match="unknown quantisation") as caught:
        load_base(folder, quant="nf5")
    assert "nf4" in caught.value.hint


def test_gguf(tmp_path: Path, quiet: None) -> None:
    model = tiny("llama", seed=5)
    file = write_gguf(tmp_path / "toy.gguf", model, tiny_tokenizer())
    loaded, tokenizer = load_base(file)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    assert tokenizer.decode(tokenizer("Grüße, world").input_ids) == "Grüße, world"
    assert tokenizer.eos_token == "<|im_end|>"
    write_model_folder(loaded, tokenizer, tmp_path / "plain")
    again, _ = load_base(tmp_path / "plain")
    torch.testing.assert_close(again(IDS).logits, loaded(IDS).logits, rtol=0, atol=1e-5)


def test_a_damaged_gguf(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "toy.gguf", tiny("llama"), tiny_tokenizer())
    content = file.read_bytes()
    for length in (0, 3, 20, 3000, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(BaseFileError) as caught:
            load_base(file)
        assert str(file) in caught.value.where


def test_the_catalog_is_never_fetched_silently(tmp_path: Path) -> None:
    with pytest.raises(BaseFileError, match="not been fetched") as caught:
        load_base("smollm2-135m")
    assert caught.value.hint == "gossamer fetch smollm2-135m"


def test_a_fetched_entry_is_loaded(tmp_path: Path, folder: Path) -> None:
    place = tmp_path / "home" / "smollm2-135m"
    place.parent.mkdir()
    folder.rename(place)
    files = {path.name: {"bytes": path.stat().st_size} for path in place.iterdir()}
    source = {"sha256": CATALOG["smollm2-135m"].source.sha256}
    manifest = {"source": source, "recipe": CATALOG["smollm2-135m"].recipe, "files": files}
    (place / MANIFEST).write_text(json.dumps(manifest))
    torch.testing.assert_close(load_base("smollm2-135m")[0](IDS).logits, tiny("llama")(IDS).logits, rtol=0, atol=1e-5)
    (place / "model.safetensors").write_bytes(b"")
    with pytest.raises(BaseFileError, match="not been fetched"):
        load_base("smollm2-135m")


@pytest.mark.parametrize("name", ["smolm2-135m", "smollm2", "smollm-135m"])
def test_a_misspelt_catalog_name_stays_here(name: str) -> None:
    with pytest.raises(BaseFileError, match="no such base") as caught:
        load_base(name)
    assert "'smollm2-135m'" in caught.value.hint


def test_a_misspelt_folder(folder: Path) -> None:
    for name in (folder.parent / "lama", str(folder.parent / "lama"), str(folder.parent / "llama.gguf")):
        with pytest.raises(BaseFileError, match="no such base") as caught:
            load_base(name)
        assert str(folder) in caught.value.hint
    with pytest.raises(BaseFileError, match="not a base model"):
        load_base(folder / "model.safetensors")


def test_hub_ids(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def cache(name: str, **options: Any) -> str:
        asked.append(name)
        if name != "someone/toy":
            raise LocalEntryNotFoundError("not cached")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", cache)
    torch.testing.assert_close(load_base("someone/toy")[0](IDS).logits, tiny("llama")(IDS).logits, rtol=0, atol=1e-5)
    with pytest.raises(BaseFileError, match="no such base") as caught:
        load_base("someone/else")
    assert "hub's cache" in caught.value.got
    assert asked == ["someone/toy", "someone/else"]


def test_the_hub_is_asked_for_what_is_read_alone() -> None:
    from fnmatch import fnmatch

    def taken(name: str) -> bool:
        allowed = any(fnmatch(name, pattern) for pattern in module._HUB_FILES)
        return allowed and not any(fnmatch(name, pattern) for pattern in module._HUB_CLUTTER)

    wanted = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.model", "merges.txt"]
    clutter = ["pytorch_model.bin", "onnx/config.json", "consolidated.safetensors", "modeling_x.py", "tf_model.h5"]
    assert [name for name in wanted + clutter if taken(name)] == wanted


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "fields",
    [
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"text_config": {"auto_map": {"AutoModel": "evil.Model"}}},
        {"_attn_implementation_internal": "someone/kernel"},
        {"_experts_implementation_internal": "someone/kernel"},
        {"attn_implementation": "someone/kernel:flash"},
        {"vision_config": [{"attn_implementation": {"": "someone/kernel"}}]},
    ],
)
def test_code_from_elsewhere_is_refused(folder: Path, file: str, fields: dict[str, Any]) -> None:
    edit(folder / file, **fields)
    with pytest.raises(BaseFileError, match="never done") as caught:
        load_base(folder)
    assert file in caught.value.where
    assert "someone/kernel" in caught.value.got + "someone/kernel"


def test_harmless_neighbours_of_refused_keys(folder: Path) -> None:
    edit(folder / "config.json", _attn_implementation_autoset=False, attn_implementation="eager")
    assert load_base(folder)[0].config._attn_implementation == "eager"


def test_a_key_that_is_there_twice(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"hidden_size": 32,', 1))
    with pytest.raises(BaseFileError, match="twice") as caught:
        load_base(folder)
    assert "hidden_size" in caught.value.got


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"model_type": ', "\ufffe", "[" * 100_000])
def test_a_config_that_is_no_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(BaseFileError, match="JSON"):
        load_base(folder)


def test_stored_quantised(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedError) as caught:
        load_base(folder)
    assert caught.value.got == "gptq"


def test_only_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseFileError, match="pickle") as caught:
        load_base(folder)
    assert caught.value.got == "pytorch_model.bin"


def test_missing_pieces(folder: Path, tmp_path: Path) -> None:
    for name, message in (
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "no weights"),
        ("config.json", "not a model folder"),
    ):
        (folder / name).unlink()
        with pytest.raises(BaseFileError, match=message):
            load_base(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseFileError, match="holds an adapter, not a base"):
        load_base(folder)


def test_an_adapter_in_the_base_is_not_loaded_along(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseFileError, match="also holds an adapter"):
        load_base(folder)


def test_shards(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    torch.testing.assert_close(load_base(tmp_path / "base")[0](IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    shard = min((tmp_path / "base").glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(BaseFileError, match="weights are missing") as caught:
        load_base(tmp_path / "base")
    assert shard.name in caught.value.got


def test_weights_must_fit_exactly(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = load_file(file)
    gone = "model.layers.1.mlp.up_proj.weight"

    def store(tensors: dict[str, torch.Tensor]) -> BaseFileError:
        save_file(tensors, file, metadata={"format": "pt"})
        level = noise.get_verbosity()
        with pytest.raises(BaseFileError) as caught:
            load_base(folder)
        assert noise.get_verbosity() == level
        assert noise.is_progress_bar_enabled()
        return caught.value

    lacking = store({name: tensor for name, tensor in whole.items() if name != gone})
    assert lacking.what == "1 weights of the model are not in the file"
    assert lacking.got == gone
    surplus = store(whole | {"model.layers.2.mlp.up_proj.weight": whole[gone].clone()})
    assert "not in the model" in surplus.what
    assert "layers.2" in surplus.got
    other = store(whole | {gone: whole[gone][:, :7].contiguous()})
    assert gone in other.got


def test_a_causal_model_is_not_taken_for_a_classifier(folder: Path) -> None:
    edit(folder / "config.json", architectures=["LlamaForSequenceClassification"])
    with pytest.raises(BaseFileError, match="not in the file") as caught:
        load_base(folder)
    assert "score.weight" in caught.value.got
    assert "architecture" in caught.value.hint


def test_unknown_architectures_load_as_causal_models(folder: Path) -> None:
    edit(folder / "config.json", architectures=["MyLlama"])
    assert type(load_base(folder)[0]).__name__ == "LlamaForCausalLM"
    edit(folder / "config.json", model_type="not-a-model")
    with pytest.raises(BaseFileError, match="cannot be loaded"):
        load_base(folder)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_weights(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(BaseFileError, match="cannot be loaded"):
        load_base(folder)


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    write_model_folder(model, tiny_tokenizer(), tmp_path / "base")
    assert "lm_head.weight" not in load_file(tmp_path / "base" / "model.safetensors")
    loaded = load_base(tmp_path / "base")[0]
    assert loaded.get_parameter("model.embed_tokens.weight") is loaded.get_parameter("lm_head.weight")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
