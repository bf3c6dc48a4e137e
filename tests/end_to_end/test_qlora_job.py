"""QLoRA by the command on a toy: quantise, train on the codes, evaluate, merge densely and into codes again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import gossamer as gs
from gossamer.cli import main
from gossamer.models import tiny, tiny_tokenizer, write_model_folder
from gossamer.models.quantizer import packed_modules
from tests.adapters import tokens
from tests.models.tiny_gguf import write_gguf

CONFIG = """\
base: {base}
quant: nf4
method: {{name: lora, r: 4}}
task: classify
data: {{train: {rows}, eval: {rows}}}
train: {{epochs: 4, batch_size: 4, lr: 2e-2, optimizer: adamw8bit}}
output: {output}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy base, its quantised copy, rows that can be learned, and a config."""
    folder = tmp_path_factory.mktemp("qlora")
    write_model_folder(tiny("llama"), tiny_tokenizer(), folder / "base")
    rows = [{"prompt": f"{word} {n}:", "completion": f" {word}"} for n in range(16) for word in ("yes", "no")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = {"base": folder / "packed", "rows": folder / "rows.jsonl", "output": folder / "run"}
    (folder / "run.yaml").write_text(CONFIG.format(**places))
    assert main(["quantize", str(folder / "base"), "--output", str(folder / "packed")]) == 0
    assert main(["train", str(folder / "run.yaml")]) == 0
    return folder


def test_it_learns_on_codes_and_says_with_which_optimiser(folder: Path):
    report = json.loads((folder / "run" / "report.json").read_text())
    assert report["eval_before"]["accuracy"] <= 0.6 < 0.95 <= report["eval_after"]["accuracy"]
    assert report["optimizer"] == "adamw"  # there are no 8-bit moments on a CPU


def test_the_dry_run_says_what_a_step_takes(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", str(folder / "run.yaml"), f"--output={folder / 'dry'}", "--dry-run"]) == 0
    assert "checkpointing auto: off, 4 x " in capsys.readouterr().out


def test_the_verbs_agree_on_the_base(folder: Path, capsys: pytest.CaptureFixture[str]):
    evaluate = ["eval", "--adapter", str(folder / "run"), "--data", str(folder / "rows.jsonl"), "--task", "classify"]
    found = []
    for base in (["--base", str(folder / "packed")], ["--base", str(folder / "base"), "--quant", "nf4"]):
        assert main([*evaluate, *base, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["loss"] == found[1]["loss"]
    assert found[0]["accuracy"] >= 0.95


@pytest.mark.parametrize("base", ["packed", "base"])
def test_it_merges_densely_and_says_what_is_lost(base: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    output = folder / f"merged-{base}"
    words = ["merge", str(folder / "run"), "--base", str(folder / base), "--output", str(output)]
    assert main([*words, *(["--quant", "nf4"] if base == "base" else [])]) == 0
    told = capsys.readouterr().out
    for storage in ("float32", "bfloat16", "nf4", "int8"):
        assert f"\n{storage} " in told
    model, _ = gs.load_base(folder / "packed")
    gs.attach(model, gs.Adapter.load(folder / "run" / "adapter"))
    plain = AutoModelForCausalLM.from_pretrained(output).eval()
    torch.testing.assert_close(plain(tokens()).logits, model(tokens()).logits, rtol=0, atol=1e-4)


def test_codes_only_when_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]):
    output = folder / "codes"
    words = ["merge", str(folder / "run"), "--base", str(folder / "packed"), "--output", str(output), "--requantize"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    merged, _ = gs.load_base(output)
    assert len(packed_modules(merged)) == 14
    assert told["choices"]["nf4"]["of_change"] > told["choices"]["bfloat16"]["of_change"] > 0


def test_a_gguf_base_is_quantised_too(tmp_path: Path):
    file = write_gguf(tmp_path / "toy.gguf", tiny("llama", seed=5), tiny_tokenizer())
    dense, _ = gs.load_base(file)
    model, _ = gs.load_base(file, quant="int8")
    assert len(packed_modules(model)) == 14
    torch.testing.assert_close(model(tokens()).logits, dense(tokens()).logits, rtol=0.1, atol=0.1)
