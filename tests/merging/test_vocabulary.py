"""A merged folder speaks as its adapters do: their tokenizer and settings, their own embedding and head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gossamer as gs
from gossamer.cli import main
from gossamer.errors import AdapterFileError, UsageError
from gossamer.models import tiny, tiny_tokenizer, write_model_folder
from gossamer.testing.toys import VOCABULARY
from tests.adapters import tokens, trained

TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{% endfor %}"


def templated(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def more_tokens(folder: Path) -> None:
    words = tiny_tokenizer()
    words.add_tokens(["<new>"])
    words.save_pretrained(folder)


def another_end(folder: Path) -> None:
    words = tiny_tokenizer()
    words.eos_token = words.mask_token
    words.save_pretrained(folder)


def old_fashioned(folder: Path) -> None:
    """A template in the tokenizer's config, as older versions wrote it."""
    words = tiny_tokenizer()
    words.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))


def another_generation(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256], "temperature": 0.6}))


def another_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 16}))


def template_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder).chat_template


OWN: dict[str, tuple[Callable[[Path], None], str, Callable[[Path], Any], Any]] = {
    "template": (templated, "chat template", template_of, TEMPLATE),
    "old template": (old_fashioned, "chat template", template_of, TEMPLATE),
    "tokens": (more_tokens, "1 tokens more", lambda to: "<new>" in AutoTokenizer.from_pretrained(to).get_vocab(), True),
    "end": (another_end, "special tokens", lambda to: AutoTokenizer.from_pretrained(to).eos_token, "<|mask|>"),
    "generation": (
        another_generation,
        "generation config",
        lambda to: json.loads((to / "generation_config.json").read_text()).get("temperature"),
        0.6,
    ),
    "processor": (
        another_processor,
        "processor",
        lambda to: json.loads((to / "preprocessor_config.json").read_text())["size"],
        16,
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model_folder(tiny("llama"), tiny_tokenizer(), tmp_path_factory.mktemp("bases") / "llama")
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 8}))
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return trained(tiny("llama"), gs.LoRA(r=2, target_modules=("q_proj",))).save(tmp_path / "adapter")


@pytest.mark.parametrize(("kind", "quant"), [*((kind, None) for kind in OWN), ("tokens", "nf4"), ("processor", "nf4")])
def test_what_lies_beside_an_adapter_goes_into_the_merged_folder(
    kind: str, quant: str | None, base: Path, adapter: Path, tmp_path: Path
):
    write, said, read, wanted = OWN[kind]
    assert read(base) != wanted
    write(adapter)
    done = gs.merge_into_base(adapter, base, tmp_path / "merged", quant=quant, check="samples")
    assert done["streamed"] == (quant is None)
    assert read(tmp_path / "merged") == wanted
    assert any(said in note for note in done["notes"])
    if kind != "processor":  # what an adapter does not hold stays the base's, in memory too
        assert (tmp_path / "merged" / "preprocessor_config.json").read_bytes() == (
            base / "preprocessor_config.json"
        ).read_bytes()
    if kind in ("tokens", "end", "generation", "processor"):
        assert template_of(tmp_path / "merged") == template_of(base)


def test_equal_files_change_nothing_and_are_not_mentioned(base: Path, adapter: Path, tmp_path: Path):
    tiny_tokenizer().save_pretrained(adapter)
    done = gs.merge_into_base(adapter, base, tmp_path / "merged", check="samples")
    assert done["notes"] == []
    assert (tmp_path / "merged" / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()


def test_what_does_not_fit_is_refused(base: Path, adapter: Path, tmp_path: Path):
    words = tiny_tokenizer()
    words.add_tokens([f"<{number}>" for number in range(VOCABULARY - len(words) + 1)])
    words.save_pretrained(adapter)
    for quant in (None, "nf4"):  # streamed and in memory
        with pytest.raises(AdapterFileError, match="no embedding for"):
            gs.merge_into_base(adapter, base, tmp_path / "merged", quant=quant)
        assert not [*tmp_path.glob("merged*")]
    (adapter / "tokenizer.json").write_text("{}")
    with pytest.raises(AdapterFileError, match="cannot be read"):
        gs.merge_into_base(adapter, base, tmp_path / "merged")

    others = [tmp_path / "one", tmp_path / "two"]
    for place, write in zip(others, (templated, more_tokens), strict=True):
        trained(tiny("llama"), gs.LoRA(r=2)).save(place)
        write(place)
    with pytest.raises(UsageError, match="different tokenizers"):
        gs.merge_into_base(others, base, tmp_path / "merged")
    assert main(["compose", *map(str, others), "--output", str(tmp_path / "both")]) == 2
    assert not (tmp_path / "both").exists()


def test_adapters_made_of_an_adapter_keep_its_files(base: Path, adapter: Path, tmp_path: Path):
    more_tokens(adapter)
    another_generation(adapter)
    plain = trained(tiny("llama"), gs.LoRA(r=2, target_modules=("q_proj",))).save(tmp_path / "plain")
    places = {name: str(tmp_path / name) for name in ("resized", "both", "extracted", "converted")}
    assert main(["resize", str(adapter), "--rank", "1", "--output", places["resized"]]) == 0
    assert main(["compose", str(adapter), str(plain), "--output", places["both"]]) == 0
    assert main(["extract", str(base), str(adapter), "--rank", "1", "--output", places["extracted"]]) == 0
    assert main(["convert", str(adapter), places["converted"], "--to", "peft"]) == 0
    for place in map(Path, places.values()):
        assert (place / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes(), place
        assert OWN["generation"][2](place) == 0.6


def test_a_tuned_model_s_own_tokenizer_is_extracted_too(base: Path, tmp_path: Path):
    words = tiny_tokenizer()
    words.chat_template = TEMPLATE
    write_model_folder(tiny("llama", seed=1), words, tmp_path / "tuned")
    for tuned, own in ((tmp_path / "tuned", True), (base, False)):
        if not own:  # the base's own files beside other weights are no part of the adapter
            write_model_folder(tiny("llama", seed=1), tiny_tokenizer(), tmp_path / "same")
            tuned = tmp_path / "same"
        place = tmp_path / f"of-{tuned.name}"
        assert main(["extract", str(base), str(tuned), "--rank", "2", "--output", str(place)]) == 0
        assert (place / "chat_template.jinja").exists() == own


def test_formats_without_a_place_for_it_say_so(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    templated(adapter)
    assert main(["convert", str(adapter), str(tmp_path / "mlx"), "--to", "mlx"]) == 0
    assert "chat_template.jinja" in capsys.readouterr().out


SAVED = {"embedding": ("embed_tokens",), "head": ("lm_head",), "both": ("embed_tokens", "lm_head")}


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [VOCABULARY, VOCABULARY + 4])
def test_own_embeddings_and_heads_merge_to_what_they_say_attached(saved: str, tied: bool, rows: int, tmp_path: Path):
    base = write_model_folder(tiny("llama", tie_word_embeddings=tied), tiny_tokenizer(), tmp_path / "base")
    model = tiny("llama", tie_word_embeddings=tied)
    model.resize_token_embeddings(rows, mean_resizing=False)
    trained(model, gs.LoRA(r=2, target_modules=("q_proj",), modules_to_save=SAVED[saved])).save(tmp_path / "adapter")
    with torch.no_grad():
        wanted = model(tokens()).logits
    force = rows != VOCABULARY  # the base that it was trained on had more rows
    if force and saved != "both":
        with pytest.raises(AdapterFileError, match="not all of its rows"):
            gs.merge_into_base(tmp_path / "adapter", base, tmp_path / "merged", force_base=True)
        return
    done = gs.merge_into_base(tmp_path / "adapter", base, tmp_path / "merged", force_base=force)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.vocab_size == rows == merged.get_input_embeddings().weight.shape[0]
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(merged(tokens()).logits, wanted, rtol=0, atol=1e-4)
    assert any("tie_word_embeddings" in note for note in done["notes"]) == tied
    assert any(str(rows) in note for note in done["notes"]) == force
