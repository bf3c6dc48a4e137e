"""Merging file by file: the same bits as a merge in memory, whatever interrupts it, in the memory of one module."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gossamer as gs
from gossamer.errors import BaseMismatchError, DiskError, NonFiniteError, StateError, UnsupportedError, UsageError
from gossamer.files import atomic
from gossamer.merging import streamed
from gossamer.models import tiny, tiny_tokenizer
from tests.adapters import tokens, trained

SPECS = {
    "lora": gs.LoRA(r=4),
    "biases and a norm": gs.LoRA(r=2, bias="all", modules_to_save=("norm",), scaling="rslora"),
    "pissa": gs.LoRA(r=3, start="pissa"),
    "dora": gs.DoRA(r=3),
    "ia3": gs.IA3(),
    "vera": gs.VeRA(r=8),
    "norms": gs.NormTuning(),
}


def sharded(kind: str, folder: Path, **config: Any) -> Path:
    """A toy in several files."""
    model = tiny(kind, **config)
    model.save_pretrained(folder, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded("llama", tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return trained(tiny("llama"), gs.LoRA(r=4)).save(tmp_path / "adapter")


def contents(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_same_bits_as_in_memory(kind: str, spec: Any, tmp_path: Path):
    folder = sharded(kind, tmp_path / "base")
    model = tiny(kind)
    if kind == "gpt2" and isinstance(spec, gs.LoRA) and spec.modules_to_save:
        spec = spec.replace(modules_to_save=("ln_1",))
    trained(model, spec).save(tmp_path / "adapter")
    done = gs.merge_into_base(tmp_path / "adapter", folder, tmp_path / "merged", check="outputs")
    gs.merge(model, keep=False)
    expected = model.state_dict()
    found, before = contents(tmp_path / "merged"), contents(folder)
    assert done["streamed"]
    assert done["files"] > 2
    assert found.keys() == before.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in found.items())
    assert done["max_error"] < 1e-4 < done["max_logit"]
    assert done["rounding"] < 1e-6
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(plain(tokens()).logits, model(tokens()).logits)


def test_the_files_stay_as_they_were_laid_out(base: Path, adapter: Path, tmp_path: Path):
    gs.merge_into_base(adapter, base, tmp_path / "merged")
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names | {streamed.NOTE}
    for file in base.glob("*.safetensors"):
        with safe_open(file, "pt") as old, safe_open(tmp_path / "merged" / file.name, "pt") as new:
            assert old.offset_keys() == new.offset_keys()
            assert old.metadata() == new.metadata()
    for name in names - {path.name for path in base.glob("*.safetensors")}:
        assert (base / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


def test_several_adapters_with_weights(base: Path, tmp_path: Path):
    values = [trained(tiny("llama"), gs.LoRA(r=rank), seed=rank) for rank in (2, 5)]
    folders = [value.save(tmp_path / str(number)) for number, value in enumerate(values)]
    gs.merge_into_base(folders, base, tmp_path / "merged", weights=(0.7, -0.2))
    total = 0.7 * values[0] + -0.2 * values[1]
    found, before = contents(tmp_path / "merged"), contents(base)
    for path in total.paths:
        wanted = before[f"{path}.weight"].double() + total.delta(path).double()
        torch.testing.assert_close(found[f"{path}.weight"].double(), wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(UsageError, match="one weight for each"):
        gs.merge_into_base(folders, base, tmp_path / "other", weights=(1.0,))


def test_another_dtype_is_rounded_to_once_and_said(base: Path, adapter: Path, tmp_path: Path):
    done = gs.merge_into_base(adapter, base, tmp_path / "merged", dtype="bf16")
    found, before = contents(tmp_path / "merged"), contents(base)
    value = gs.Adapter.load(adapter)
    lost = change = 0.0
    for name, tensor in found.items():
        path = name.removesuffix(".weight")
        delta = value.delta(path).double() if path in value.paths else torch.zeros((), dtype=torch.float64)
        exact = before[name].double() + delta
        step = torch.finfo(torch.bfloat16).eps * exact.abs().clamp(min=1e-30).log2().floor().exp2()
        assert tensor.dtype == torch.bfloat16
        assert ((tensor.double() - exact).abs() <= 0.5001 * step + 1e-9).all()
        if path in value.paths:
            lost += (tensor.double() - exact).square().sum().item()
            change += delta.square().sum().item()
    assert done["rounding"] == pytest.approx((lost / change) ** 0.5, rel=0.3)  # from samples
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


class Killed(BaseException):
    """What no handler expects."""


def test_whoever_is_interrupted_goes_on(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gs.merge_into_base(adapter, base, tmp_path / "whole")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    written = streamed.write_shard
    files = len([*base.glob("*.safetensors")])
    for last in range(files):
        count = iter(range(files))

        def dying(file: Any, *given: Any, last: int = last, count: Iterator[int] = count) -> str:
            if next(count) == last:
                file.write(b"half of it")
                raise Killed
            return written(file, *given)

        monkeypatch.setattr(streamed, "write_shard", dying)
        with pytest.raises(Killed):
            gs.merge_into_base(adapter, base, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        monkeypatch.setattr(streamed, "write_shard", written)
        done = gs.merge_into_base(adapter, base, tmp_path / "merged")
        assert done["continued"] == last
        assert {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()} == expected
        assert {path.name for path in tmp_path.iterdir()} == {"adapter", "whole", "merged"}
        shutil.rmtree(tmp_path / "merged")


def test_a_killed_process_is_continued(base: Path, adapter: Path, tmp_path: Path):
    script = f"""
import os, signal, gossamer as gs
from gossamer.merging import streamed
whole = streamed.write_shard
def dying(file, *given, seen=[]):
    seen.append(file)
    if len(seen) == 3:
        file.write(b"half of it")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(file, *given)
streamed.write_shard = dying
gs.merge_into_base({str(adapter)!r}, {str(base)!r}, {str(tmp_path / "merged")!r})
"""
    assert subprocess.run([sys.executable, "-c", script], check=False, capture_output=True).returncode == -9
    assert not (tmp_path / "merged").exists()
    assert (tmp_path / "merged.partial").is_dir()
    assert gs.merge_into_base(adapter, base, tmp_path / "merged")["continued"] == 2
    gs.merge_into_base(adapter, base, tmp_path / "whole")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "merged" / path.name).read_bytes()
    assert not (tmp_path / "merged.partial").exists()


def interrupted(adapter: Path, base: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A merge that died after its first file."""
    written, count = streamed.write_shard, iter(range(9))

    def dying(*given: Any) -> str:
        if next(count):
            raise Killed
        return written(*given)

    with monkeypatch.context() as patch:
        patch.setattr(streamed, "write_shard", dying)
        with pytest.raises(Killed):
            gs.merge_into_base(adapter, base, output)
    return output.parent / f"{output.name}.partial"


def test_what_is_found_is_not_trusted(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    partial = interrupted(adapter, base, tmp_path / "merged", monkeypatch)
    (file,) = partial.glob("*.safetensors")
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert gs.merge_into_base(adapter, base, tmp_path / "merged")["continued"] == 0


def test_another_merge_does_not_go_on_there(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    partial = interrupted(adapter, base, tmp_path / "merged", monkeypatch)
    other = trained(tiny("llama"), gs.LoRA(r=2)).save(tmp_path / "other")
    with pytest.raises(StateError, match="another merge"):
        gs.merge_into_base(other, base, tmp_path / "merged")
    with pytest.raises(StateError, match="another merge"):
        gs.merge_into_base(adapter, base, tmp_path / "merged", dtype="bf16")
    assert len([*partial.glob("*.safetensors")]) == 1


def test_refusals_leave_nothing(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    value = gs.Adapter.load(adapter)
    large = (1e7 * value).save(tmp_path / "large")
    with pytest.raises(NonFiniteError, match="float16"):
        gs.merge_into_base(large, base, tmp_path / "merged", dtype="fp16")
    prompt = trained(tiny("llama"), gs.PromptTuning(num_virtual_tokens=2)).save(tmp_path / "prompt")
    with pytest.raises(UnsupportedError):
        gs.merge_into_base(prompt, base, tmp_path / "merged")
    monkeypatch.setattr(atomic, "_free_bytes", lambda folder: 1000)
    with pytest.raises(DiskError, match="writing failed") as caught:
        gs.merge_into_base(adapter, base, tmp_path / "merged")
    assert "1,000 bytes free" in str(caught.value)
    assert not (tmp_path / "merged").exists()
    assert not [*(tmp_path / "merged.partial").glob("*.safetensors")]
    assert gs.Adapter.load(adapter) == value


def test_a_file_that_says_something_else_is_caught(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written = streamed.write_shard

    def flipped(file: Any, outline: Any, *given: Any) -> str:
        digest = written(file, outline, *given)
        file.seek(len(outline.header()))
        file.write(b"\x55" * 64)
        return digest

    monkeypatch.setattr(streamed, "write_shard", flipped)
    with pytest.raises(DiskError, match="not what was written"):
        gs.merge_into_base(adapter, base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_undone(base: Path, adapter: Path, tmp_path: Path):
    gs.merge_into_base(adapter, base, tmp_path / "merged")
    done = gs.merge_into_base(adapter, tmp_path / "merged", tmp_path / "undone", undo=True)
    before = contents(base)
    for name, tensor in contents(tmp_path / "undone").items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)
    assert done["rounding"] < 1e-6
    with pytest.raises(BaseMismatchError, match="does not say"):
        gs.merge_into_base(adapter, base, tmp_path / "again", undo=True)
    dora = trained(tiny("llama"), gs.DoRA(r=2)).save(tmp_path / "dora")
    gs.merge_into_base(dora, base, tmp_path / "with dora")
    with pytest.raises(UnsupportedError):
        gs.merge_into_base(dora, tmp_path / "with dora", tmp_path / "again", undo=True)
    assert not (tmp_path / "again").exists()


def test_what_cannot_be_streamed_is_loaded(tmp_path: Path):
    folder = sharded("mixtral", tmp_path / "base")
    model = tiny("mixtral")
    experts = gs.LoRA(r=2, target_modules=("q_proj",), target_parameters=("mlp.experts.gate_up_proj",))
    trained(model, experts).save(tmp_path / "adapter")
    done = gs.merge_into_base(tmp_path / "adapter", folder, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not done["streamed"]
    torch.testing.assert_close(plain(tokens()).logits, model(tokens()).logits, rtol=0, atol=1e-4)


def test_the_memory_is_that_of_a_module(tmp_path: Path):
    """Peak over what the process had before, of a base of 400 MB whose largest matrix is 8."""
    script = f"""
import json, resource, sys, torch, transformers, gossamer as gs
from gossamer.merging import into_base
sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=8, vocab_size=4096)
if sys.argv[1] == "make":
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).bfloat16()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained({str(tmp_path / "base")!r}, max_shard_size="100MB")
    gs.attach(model, gs.LoRA(r=8))
    gs.capture(model).save({str(tmp_path / "adapter")!r})
else:
    def peak():
        return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
    gs.Adapter.load({str(tmp_path / "adapter")!r})
    transformers.LlamaForCausalLM
    before = peak()
    done = gs.merge_into_base({str(tmp_path / "adapter")!r}, {str(tmp_path / "base")!r}, {str(tmp_path / "merged")!r},
                              check="samples")
    print(json.dumps([done["bytes"], done["files"], peak() - before]))
"""
    for step in ("make", "merge"):
        ran = subprocess.run([sys.executable, "-c", script, step], capture_output=True, text=True, check=True)
    nbytes, files, grown = json.loads(ran.stdout)
    assert nbytes > 380e6
    assert files > 3
    assert grown < 220e6, f"{grown / 1e6:.0f} MB"
