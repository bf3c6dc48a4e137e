"""Gradient checkpointing: the same gradients for less memory, turned on only when needed, and given back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gossamer as gs
from gossamer.errors import ResourceError, TargetError, UnsupportedError, UsageError
from gossamer.methods import METHODS
from gossamer.models import tiny, tiny_inputs
from gossamer.quant import FORMATS, quantize_model
from gossamer.training import LoopConfig, RunConfig, memory
from gossamer.training.loss import refuse_unless_causal
from tests.training.test_methods import FIELDS
from tests.training.test_resume import Killed, at, kill
from tests.training.toy_run import Watcher, curve, fingerprint, toy_config, toy_model, toy_train

SMALLER = "train.micro_batch_tokens: 400, which makes the same steps in smaller parts"
VIRTUAL = ("prefix", "prompt")
DROPOUT = {name: {"dropout": 0.3} for name in ("lora", "dora", "vera")}
CASES = [
    *(("gpt2" if name == "bitfit" else "llama", name) for name in METHODS if name not in VIRTUAL),
    *((architecture, "lora") for architecture in ("gpt2", "gemma3", "qwen3_moe", "gpt_neox", "falcon")),
]


def gradients(model: Any, inputs: dict[str, torch.Tensor], on: bool) -> tuple[dict[str, Any], int]:
    """Of every trainable parameter, and how often the first block's normalisation ran."""
    calls: list[int] = []
    norm = next(module for name, module in model.named_modules() if name.endswith(("layernorm", "h.0.ln_1")))
    hook = norm.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(5)
    with memory.checkpointing(model, on):
        model(**inputs, use_cache=False).loss.backward()
    hook.remove()
    found = {name: parameter.grad for name, parameter in gs.trainable_parameters(model, "default").items()}
    model.zero_grad(set_to_none=True)
    return found, len(calls)


@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_the_same_gradients_bit_for_bit(architecture: str, name: str) -> None:
    model = tiny(architecture).train()
    gs.attach(model, METHODS[name](**FIELDS.get(name, {}) | DROPOUT.get(name, {})), seed=3)
    inputs = tiny_inputs(architecture)
    kept, once = gradients(model, inputs, on=False)
    again, twice = gradients(model, inputs, on=True)
    assert (once, twice) == (1, 2)
    assert all(gradient is not None for gradient in kept.values())
    assert all(torch.equal(again[name], gradient) for name, gradient in kept.items())


def marks(model: torch.nn.Module) -> list[dict[str, Any]]:
    names = ("gradient_checkpointing", "_gradient_checkpointing_func", "_forward_hooks")
    return [{name: repr(vars(module)[name]) for name in names if name in vars(module)} for module in model.modules()]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("on", [False, True])
def test_given_back_as_it_was(before: bool, on: bool) -> None:
    model = toy_model()
    if before:
        model.activation_checkpointing_enable({"use_reentrant": True})
    kept = marks(model)
    try:
        with memory.checkpointing(model, on):
            assert all(one.gradient_checkpointing is on for one in model.model.layers)
            kill()
    except Killed:
        assert marks(model) == kept
    else:
        pytest.fail("nothing stopped it")


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_resumed_and_uncheckpointed_runs_are_the_same(tmp_path: Path, name: str) -> None:
    """What is kept for the backward is no part of what a run computes, so a run may be resumed with more or less."""

    def model() -> Any:
        made = tiny("llama")
        gs.attach(made, METHODS[name](r=2, dropout=0.3), seed=3)
        return made

    runs = []
    for first, second in [("off", "off"), ("on", "on"), ("off", "on")]:
        folder = tmp_path / f"{first}-{second}"
        folder.mkdir()
        with pytest.raises(Killed):
            toy_train(toy_config(folder, checkpointing=first), model=model(), progress=at(5, kill))
        run = toy_train(toy_config(folder, checkpointing=second), model=model(), resume=True)
        assert run.report["checkpointing"] == (second == "on")
        runs.append((fingerprint(run.output), curve(run.output)))
    assert runs[0] == runs[1] == runs[2]


def test_a_run_counts_its_blocks_twice(tmp_path: Path) -> None:
    calls: dict[str, int] = {}
    for setting in ("off", "on"):
        model, seen = toy_model(), []
        refuse_unless_causal(model)  # tries the model once, which is no step
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        (tmp_path / setting).mkdir()
        toy_train(toy_config(tmp_path / setting, checkpointing=setting, max_steps=2), model=model)
        calls[setting] = len(seen)
    assert calls == {"off": 4, "on": 8}


def test_over_a_quantised_base(tmp_path: Path) -> None:
    runs = []
    for setting in ("off", "on"):
        model = quantize_model(tiny("llama"), "nf4")
        gs.attach(model, gs.LoRA(r=2, dropout=0.1), seed=3)
        (tmp_path / setting).mkdir()
        runs.append(toy_train(toy_config(tmp_path / setting, checkpointing=setting), model=model))
        assert runs[-1].report["quant"] == "nf4"
        assert runs[-1].report["total_params"] == toy_model().num_parameters(), "packed weights are parameters too"
    assert curve(runs[0].output) == curve(runs[1].output)
    config = RunConfig.read(runs[0].output / "config.yaml")
    assert config.quant == "nf4"


@pytest.mark.parametrize(
    ("needed", "free", "on"), [(1 << 20, 1 << 30, False), (1 << 30, 1 << 20, True), (1000 << 20, 1024 << 20, True)]
)
def test_auto_asks_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: int, free: int, on: bool) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(memory, "planned_bytes", lambda model, config, part: asked.append(part) or needed)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    watcher = Watcher()
    report = toy_train(toy_config(tmp_path, max_steps=1), progress=watcher).report
    assert len(asked) == 1
    assert asked[0][0] == 3, "rows of a batch"
    assert report["checkpointing"] is on
    assert report["checkpointing_rule"].startswith(f"checkpointing auto: {'on' if on else 'off'}, 3 x ")
    assert watcher.lines.count(report["checkpointing_rule"]) == 1


def settings(**fields: Any) -> RunConfig:
    return RunConfig(base="toy", data="rows.jsonl", output="run", **fields)


def test_what_the_plan_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    plan = lambda *what, **how: asked.append((what, how)) or SimpleNamespace(peak=7)  # noqa: E731
    monkeypatch.setitem(sys.modules, "gossamer.planning", SimpleNamespace(plan=plan))
    model, config = quantize_model(toy_model(dtype=torch.bfloat16), "nf4-single"), settings()
    assert memory.planned_bytes(model, config, (4, 100)) == 7
    (shape, method), how = asked[0]
    assert shape["hidden_size"] == 64
    assert method == config.method
    assert how == {"sequence": 100, "batch": 4, "dtype": "bfloat16", "quant": "nf4-single", "checkpointing": False}


@pytest.mark.parametrize("kind", [UnsupportedError, TargetError])
def test_auto_leaves_off_what_the_plan_refuses(kind: type[UsageError], monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> int:
        raise kind("no such module")

    monkeypatch.setattr(memory, "planned_bytes", unknown)
    assert memory.decide(toy_model(), settings(), (4, 9)) == memory.MemoryPolicy(
        False, "checkpointing auto: off, without a plan of this run (no such module)"
    )


def test_auto_needs_to_know_what_is_free_and_keeps_what_the_model_came_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert "free memory of this device is not known" in memory.decide(toy_model(), settings(), (4, 9)).rule
    with_it = toy_model()
    with_it.activation_checkpointing_enable()
    assert memory.decide(with_it, settings(), (4, 9)).checkpointing


def without_support() -> Any:
    model = toy_model()
    model.supports_gradient_checkpointing = False
    return model


def with_virtual_tokens(name: str) -> Any:
    model = tiny("llama")
    gs.attach(model, METHODS[name](), seed=3)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (without_support, "LlamaForCausalLM does not support it"),
        *((lambda name=name: with_virtual_tokens(name), "virtual tokens") for name in VIRTUAL),
    ],
)
def test_models_that_cannot(tmp_path: Path, make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        toy_train(toy_config(tmp_path, checkpointing="on"), model=make())
    assert not (tmp_path / "run").exists()
    report = toy_train(toy_config(tmp_path, max_steps=1), model=make()).report
    assert report["checkpointing"] is False
    assert reason in report["checkpointing_rule"]


@pytest.mark.parametrize(
    ("thrifty", "rows", "hint"),
    [
        (False, 8, f"train.checkpointing: on; or {SMALLER}; or in a new run quant: nf4 or train.max_length below 100"),
        (True, 1, "in a new run train.max_length below 100"),
    ],
)
def test_out_of_memory_names_what_is_not_in_force_yet(thrifty: bool, rows: int, hint: str) -> None:
    model = quantize_model(tiny("llama"), "nf4") if thrifty else tiny("llama")
    config = settings(train=LoopConfig(checkpointing="on" if thrifty else "off"))
    with pytest.raises(ResourceError) as caught, memory.decide(model, config, (rows, 100)).errors():
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")
    assert (caught.value.got, caught.value.hint) == ("CUDA out of memory", hint)


@pytest.mark.parametrize("quant", [None, *FORMATS])
def test_how_weights_are_held(quant: str | None) -> None:
    model = tiny("llama")
    assert memory.stored_as(quantize_model(model, quant) if quant else model) == quant


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="else"), memory.MemoryPolicy(False, "").errors():
        raise RuntimeError("something else")
