"""`gossamer plan`: from words on a command line to the same plan that the library makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gossamer.cli.plan import command
from gossamer.errors import BaseFileError
from gossamer.planning import plan


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, [*arguments])


def as_json(*arguments: str) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def test_the_same_plan_as_the_library():
    words = ["llama-3.1-8b", "--method", "lora", "--quant", "nf4", "--r", "8", "--target", "q_proj,v_proj"]
    words += ["--sequence", "512", "--batch", "2", "--dtype", "bf16", "--checkpointing", "on", "--supervised", "0.2"]
    words += ["--optimizer", "paged_adamw8bit", "--device", "RTX 4090"]
    expected = plan(
        "llama-3.1-8b", {"r": 8, "target_modules": ("q_proj", "v_proj")}, quant="nf4", sequence=512, batch=2,
        checkpointing=True, supervised=0.2, optimizer="paged_adamw8bit", device="RTX 4090",
    )  # fmt: skip
    assert as_json(*words) == json.loads(json.dumps(expected.to_dict()))
    assert run(*words).output.strip() == str(expected)


def test_numbers_typed_in():
    gpt3 = ["--layers", "96", "--hidden", "12288", "--heads", "96", "--vocab", "50257", "--intermediate", "49152"]
    found = as_json(*gpt3, "--no-gated", "--tied", "--r", "4", "--target", "q_proj,v_proj", "--dtype", "fp16")
    assert found["trainable"] == 18_874_368
    assert found["disk"]["checkpoint"] == pytest.approx(350e9, rel=0.01)


def test_beside_each_other():
    text = run("llama-3.1-8b", "--compare", "--sequence", "512").output
    assert all(word in text for word in ("full, in place", "LoRA", "QLoRA", "peak"))
    assert set(as_json("smollm2-135m", "--compare")) == {"full, in place", "full, float32 copies", "LoRA", "QLoRA"}


def test_a_page(tmp_path: Path):
    assert run("smollm2-135m", "--html", str(tmp_path / "plan.html")).exit_code == 0
    assert (tmp_path / "plan.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    "arguments", [(), ("smollm2-135m", "--layers", "3"), ("smollm2-135m", "--checkpointing", "no")]
)
def test_misuse(arguments: tuple[str, ...]):
    assert run(*arguments).exit_code == 2


def test_an_unknown_model():
    assert isinstance(run("lama-3.1-8b").exception, BaseFileError)


def test_a_run_s_own_config_is_planned_and_options_come_before_it(tmp_path: Path):
    text = "base: llama-3.1-8b\nquant: nf4\nmethod: {name: lora, r: 4, target_modules: [q_proj]}\n"
    text += "data: d.jsonl\noutput: o\n"
    (tmp_path / "run.yaml").write_text(text + "train: {batch_size: 16, max_length: 1024, optimizer: paged_adamw8bit}\n")
    found = as_json(str(tmp_path / "run.yaml"))
    wanted = plan(
        "llama-3.1-8b", {"r": 4, "target_modules": ("q_proj",)}, quant="nf4", sequence=1024, batch=8, accumulation=2,
        optimizer="paged_adamw8bit", checkpointing="auto",
    )  # fmt: skip
    assert (found["peak"], found["trainable"]) == (wanted.peak, wanted.trainable)
    assert found["setting"]["accumulation"] == 2
    changed = as_json(str(tmp_path / "run.yaml"), "--r", "8", "--batch", "1", "--quant", "int8")
    assert (changed["setting"]["batch"], changed["setting"]["quant"]) == (1, "int8")
    assert changed["method"].startswith("LoRA r=8 on all-linear")
    (tmp_path / "run.yaml").write_text(text + "task: classify\n")
    assert as_json(str(tmp_path / "run.yaml"))["trainable"] == wanted.trainable
