"""8-bit and paged AdamW: the plain one stands in and says so on a CPU; on CUDA they train, page and resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gossamer.training import optim, state
from gossamer.training.optim import EIGHT_BIT, make_optimizer, set_lr
from gossamer.training.runs.checkpoint import newest_checkpoint, save_checkpoint
from tests.training.test_checkpoint import EightBit
from tests.training.test_resume import Killed, at, kill
from tests.training.toy_run import Watcher, curve, fingerprint, toy_config, toy_model, toy_train


@pytest.mark.parametrize("kind", EIGHT_BIT)
def test_on_a_cpu_the_plain_one_says_so(tmp_path: Path, kind: str) -> None:
    runs = []
    for name in ("adamw", kind):
        (tmp_path / name).mkdir()
        watcher = Watcher()
        runs.append(toy_train(toy_config(tmp_path / name, optimizer=name, max_steps=3), progress=watcher))
        assert [line for line in watcher.lines if "optimizer" in line] == (
            [] if name == "adamw" else [f"optimizer {kind} needs a CUDA device; on cpu this run uses adamw, in float32"]
        )
    plain, asked = runs
    assert plain.report["optimizer"] == asked.report["optimizer"] == "adamw"
    assert plain.adapter == asked.adapter


def test_a_run_with_another_optimiser_s_state_is_resumed_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "usable_optimizer", lambda asked, device: (asked, ""))
    monkeypatch.setattr(optim, "_maker", lambda kind: EightBit)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    fields: dict[str, Any] = {"optimizer": "adamw8bit", "lr_ratio": 4.0}
    one = toy_train(toy_config(whole, **fields))
    assert one.report["optimizer"] == "adamw8bit"
    with pytest.raises(Killed):
        toy_train(toy_config(parts, **fields), progress=at(5, kill))
    two = toy_train(toy_config(parts, **fields), resume=True)
    assert fingerprint(one.output) == fingerprint(two.output)
    assert curve(one.output) == curve(two.output)


def cuda_model() -> Any:
    return toy_model(r=64, target_modules="all-linear").to("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", EIGHT_BIT)
def test_a_run_on_cuda_is_resumed_exactly(tmp_path: Path, kind: str) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    fields = {"optimizer": kind, "lr_ratio": 4.0, "lr": 1e-3, "epochs": 4}
    one = toy_train(toy_config(whole, **fields), model=cuda_model())
    assert one.report["optimizer"] == kind
    assert curve(one.output)[-1][1] < curve(one.output)[0][1]
    with pytest.raises(Killed):
        toy_train(toy_config(parts, **fields), model=cuda_model(), progress=at(5, kill))
    two = toy_train(toy_config(parts, **fields), model=cuda_model(), resume=True)
    assert fingerprint(one.output) == fingerprint(two.output)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", EIGHT_BIT)
def test_bytes_and_pages_come_back(tmp_path: Path, kind: str) -> None:
    def made(seed: int) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        torch.manual_seed(seed)
        parameters = {"a.lora_A": nn.Parameter(torch.randn(512, 512, device="cuda"))}
        optimizer = make_optimizer(parameters, 0.0, kind=kind)
        set_lr(optimizer, 1e-2)
        return parameters, optimizer

    def advance(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
        draw = torch.Generator("cuda").manual_seed(seed)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, device="cuda", generator=draw)
        optimizer.step()

    parameters, optimizer = made(0)
    for step in range(3):
        advance(parameters, optimizer, step)
    save_checkpoint(tmp_path, {"step": 3, "identity": {}}, parameters, optimizer, torch.device("cuda"), keep=1)
    others, fresh = made(1)
    found = newest_checkpoint(tmp_path, print)
    assert found
    found.restore(others, fresh, torch.device("cuda"))
    state = fresh.state[others["a.lora_A"]]
    assert state["state1"].dtype == torch.uint8
    assert getattr(state["state1"], "is_paged", False) is kind.startswith("paged")
    for step in range(3, 6):
        advance(parameters, optimizer, step)
        advance(others, fresh, step)
    assert torch.equal(parameters["a.lora_A"], others["a.lora_A"])
