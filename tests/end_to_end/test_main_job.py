"""The main job on a toy: the command trains, measures, merges; PEFT and plain transformers read what it wrote."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import gossamer as gs
from gossamer.cli import main
from gossamer.models import tiny, tiny_tokenizer, write_model_folder

CONFIG = """\
base: {base}
method: {{name: lora, r: 4, dropout: 0.1}}
task: classify
data: {{train: {rows}, eval: {rows}}}
train: {{epochs: 3, batch_size: 4, lr: 1e-2, checkpoint_every: 3}}
output: {output}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy base, rows that can be learned, and a config."""
    folder = tmp_path_factory.mktemp("job")
    write_model_folder(tiny("llama"), tiny_tokenizer(), folder / "base")
    rows = [{"prompt": f"{word} {n}:", "completion": f" {word}"} for n in range(16) for word in ("yes", "no")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(config(folder, "run"))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """The finished run."""
    assert main(["train", str(folder / "run.yaml")]) == 0
    return folder / "run"


def config(folder: Path, output: str) -> str:
    return CONFIG.format(base=folder / "base", rows=folder / "rows.jsonl", output=folder / output)


def tokens() -> torch.Tensor:
    return torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))


def test_it_learns_and_leaves_the_whole_run_folder(run: Path):
    report = json.loads((run / "report.json").read_text())
    assert report["eval_before"]["accuracy"] <= 0.6 < 0.95 <= report["eval_after"]["accuracy"]
    assert {entry.name for entry in run.iterdir()} == {
        "config.yaml", "metrics.jsonl", "report.json", "report.html", "adapter", "checkpoints",
    }  # fmt: skip
    assert report["adapter_bytes"] == (run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert gs.RunConfig.read(run / "config.yaml") == gs.RunConfig.read(run.parent / "run.yaml")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 24


def test_eval_reads_the_run_and_agrees_with_its_report(run: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--base", str(folder / "base"), "--data", str(folder / "rows.jsonl"), "--task", "classify", "--json"]
    assert main(["eval", *words, "--adapter", str(run)]) == 0
    found = json.loads(capsys.readouterr().out)
    report = json.loads((run / "report.json").read_text())
    assert found["accuracy"] == report["eval_after"]["accuracy"]
    assert found["adapter_digest"] == report["adapter_digest"]
    assert main(["eval", *words]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == report["eval_before"]["accuracy"]


def test_peft_loads_the_adapter_in_silence(run: Path, folder: Path):
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks transformers, not us
        theirs = PeftModel.from_pretrained(base, run / "adapter").eval()
    ours = tiny("llama")
    gs.attach(ours, gs.Adapter.load(run / "adapter"))
    torch.testing.assert_close(theirs(tokens()).logits, ours(tokens()).logits, rtol=0, atol=1e-5)


def test_the_merged_folder_is_a_plain_model(run: Path, folder: Path):
    merged = folder / "merged"
    assert main(["merge", str(run), "--base", str(folder / "base"), "--output", str(merged)]) == 0
    plain, info = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    ours = tiny("llama")
    gs.attach(ours, gs.Adapter.load(run / "adapter"))
    torch.testing.assert_close(plain.eval()(tokens()).logits, ours(tokens()).logits, rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(merged)("yes 1:").input_ids == tiny_tokenizer()("yes 1:").input_ids


def test_generate_says_what_was_learned(run: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--base", str(folder / "base"), "--adapter", str(run), "--max-tokens", "5", "--json"]
    assert main(["generate", "no 3:", "yes 4:", *words]) == 0
    assert [one["text"] for one in json.loads(capsys.readouterr().out)] == [" no", " yes"]


@pytest.mark.parametrize("signalled", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_command_resumes_to_the_same_bits(
    run: Path, folder: Path, signalled: signal.Signals, capsys: pytest.CaptureFixture[str]
):
    name = f"stopped-by-{signalled.name}"
    (folder / f"{name}.yaml").write_text(config(folder, name))
    command = [sys.executable, "-m", "gossamer", "train", str(folder / f"{name}.yaml")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as child:
        while child.poll() is None and not (folder / name / "checkpoints" / "step-3").exists():
            time.sleep(0.002)
        child.send_signal(signalled)
        code = child.wait()
    assert code in ((75, 0) if signalled == signal.SIGTERM else (-9, 0))  # 0: it was over before the signal came
    assert main(["train", str(folder / f"{name}.yaml"), "--resume"]) == 0
    capsys.readouterr()
    assert gs.Adapter.load(folder / name / "adapter") == gs.Adapter.load(run / "adapter")


def test_bad_input_is_named_and_leaves_nothing(run: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    bad = folder / "bad.yaml"
    bad.write_text(config(folder, "bad").replace("lr: 1e-2", "lrr: 1e-2").replace("r: 4", "r: four"))
    assert main(["train", str(bad)]) == 2
    told = capsys.readouterr().err
    assert f"{bad}:2:" in told
    assert f"{bad}:5:" in told
    assert "did you mean 'lr'" in told

    assert (
        main(["train", str(folder / "run.yaml"), f"--output={folder / 'bad'}", "--method.target_modules=[q_prj]"]) == 2
    )
    assert "did you mean 'q_proj'" in capsys.readouterr().err

    (folder / "broken.jsonl").write_text('{"prompt": "a", "completion": " b"}\n{"prompt": "a", \n')
    words = [f"--output={folder / 'bad'}", f"--data.train={folder / 'broken.jsonl'}"]
    assert main(["train", str(folder / "run.yaml"), *words]) == 2
    assert f"{folder / 'broken.jsonl'}:2" in capsys.readouterr().err

    write_model_folder(tiny("llama", seed=1), tiny_tokenizer(), folder / "other")
    words = ["--base", str(folder / "other"), "--output", str(folder / "bad")]
    assert main(["merge", str(run), *words, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "base-mismatch"

    cut = folder / "cut"
    gs.Adapter.load(run / "adapter").save(cut)
    whole = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert main(["merge", str(cut), "--base", str(folder / "base"), "--output", str(folder / "bad")]) == 3
    assert "adapter_model.safetensors" in capsys.readouterr().err
    assert not (folder / "bad").exists()


def test_a_dry_run_shows_everything_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", str(folder / "run.yaml"), f"--output={folder / 'dry'}", "--dry-run"]) == 0
    told = capsys.readouterr().out
    for part in (
        "target_modules: all-linear",
        "7,424 trainable of 110,144",
        "32 rows of prompt/completion",
        "24 steps",
    ):
        assert part in told
    assert "yes 0:[[ yes<|im_end|>]]" in told
    assert not (folder / "dry").exists()
    assert main(["train", str(folder / "run.yaml"), f"--output={folder / 'dry'}", "--dry-run", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["injection"]["trainable"] == 7424
    assert [piece["text"] for piece in shown["preview"] if piece["supervised"]] == [" yes<|im_end|>"]
