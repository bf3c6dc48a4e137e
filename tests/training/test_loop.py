"""The loop: it learns, touches only the adapter, logs what it does and refuses what would be silent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.data.batches import collate
from gossamer.data.formats import read_rows
from gossamer.data.masks import encode
from gossamer.errors import DataError, GradientError, StateError, UnsupportedError
from gossamer.models import tiny, tiny_tokenizer
from gossamer.training import RunConfig, adapter_of
from gossamer.training.dataset import Steps
from gossamer.training.optim import lr_factor, warmup_steps
from tests.training.toy_run import Watcher, curve, metrics_of, toy_config, toy_model, toy_train, write_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learns_and_touches_nothing_but_the_adapter(tmp_path: Path, dtype: torch.dtype) -> None:
    model = toy_model(dtype=dtype, target_modules="all-linear")
    base = {name: value.clone() for name, value in model.state_dict().items() if "gossamer" not in name}
    random = torch.get_rng_state()
    rows = write_rows(tmp_path / "rows.jsonl")
    config = toy_config(tmp_path, data={"train": rows, "eval": rows}, task="classify", epochs=8)
    run = toy_train(config, model=model)
    before, after = run.report["eval_before"], run.report["eval_after"]
    assert after["loss"] < 0.8 * before["loss"]
    assert all(torch.equal(base[name], value) for name, value in model.state_dict().items() if name in base)
    assert all(tensor.dtype == torch.float32 for tensor in run.adapter.named_tensors().values())
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training


def test_the_run_folder(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    config = toy_config(
        tmp_path, data={"train": rows, "eval": rows}, task="classify", eval_every=3, log_every=2, keep_checkpoints=1
    )
    watcher = Watcher()
    run = toy_train(config, progress=watcher)
    folder = run.output
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter", "checkpoints", "config.yaml", "metrics.jsonl", "report.html", "report.json",
    ]  # fmt: skip
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-8"]
    kept = RunConfig.read(folder / "config.yaml")
    assert kept.replace(**{name: getattr(config, name) for name in ("base", "dtype", "device", "method")}) == config
    assert json.loads((folder / "report.json").read_text()) == run.report
    promised = "base method trainable_params total_params eval_before eval_after peak_memory_bytes tokens_per_second"
    assert set(f"{promised} adapter_bytes adapter_sha256 base_fingerprint seconds".split()) <= set(run.report)
    assert [one["step"] for one in metrics_of(folder)] == [2, 3, 4, 6, 6, 8]
    assert [set(one) & {"loss", "eval_loss", "eval_accuracy"} for one in metrics_of(folder)[:2]] == [
        {"loss"},
        {"eval_loss", "eval_accuracy"},
    ]
    assert gs.Adapter.load(adapter_of(folder)) == run.adapter == gs.Adapter.load(adapter_of(folder / "adapter"))
    assert [one["expected"] for one in run.report["examples"]] == [" bad", " fine", " good", " bad", " fine"]
    for words in (
        "24 rows of prompt/completion",
        "supervised",
        "lr 0.01",
        "before training: accuracy",
        "after training: accuracy",
    ):
        assert words in watcher.text


def test_tokens_are_real_ones(tmp_path: Path) -> None:
    config = toy_config(tmp_path, epochs=1)
    run = toy_train(config)
    assert (
        run.report["tokens"]
        == metrics_of(run.output)[-1]["tokens"]
        == encode(read_rows(config.data.train), tiny_tokenizer()).tokens
    )


def test_a_split_batch_is_the_big_batch(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 8, [" a", " four", " and more of it"])
    outcomes = []
    for name, size, parts, most in [("whole", 8, 1, 8192), ("split", 2, 4, 8192), ("parts", 8, 1, 16)]:
        fields: dict[str, Any] = {"output": tmp_path / name, "batch_size": size, "accumulation": parts, "epochs": 3}
        fields["micro_batch_tokens"] = most
        run = toy_train(toy_config(tmp_path, **fields), model=toy_model(dropout=0.0))
        outcomes.append(torch.tensor(curve(run.output), dtype=torch.float64))
    for outcome in outcomes[1:]:
        torch.testing.assert_close(outcome, outcomes[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, 4),
        ({"epochs": 3}, 12),
        ({"max_steps": 10}, 10),
        ({"epochs": 1, "max_steps": 10}, 4),
        ({"epochs": 9, "max_steps": 5}, 5),
    ],
)
def test_how_long_a_run_is(tmp_path: Path, fields: dict[str, int], steps: int) -> None:
    config = toy_config(tmp_path, **({"epochs": None} | fields))
    plan = Steps(encode(read_rows(config.data.train), tiny_tokenizer()), config)
    assert plan.total == steps
    epoch = [index for step in range(4) for batch in plan[step] for index in batch]
    assert sorted(epoch) == list(range(24))
    if steps > 4:
        assert plan[4] != plan[0]


def test_one_trainable_active_adapter(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    bare = tiny("llama")
    with pytest.raises(StateError, match=r"none is|no adapter"):
        toy_train(config, model=bare)
    two = toy_model()
    gs.attach(two, gs.LoRA(r=1), name="other")
    with pytest.raises(StateError, match="default, other"):
        toy_train(config, model=two)
    resting = toy_model()
    gs.use(resting, None)
    with pytest.raises(StateError, match="not active"):
        toy_train(config, model=resting)
    merged = toy_model()
    gs.merge(merged)
    with pytest.raises(StateError, match="merged"):
        toy_train(config, model=merged)
    assert not (tmp_path / "run").exists()


def test_unfrozen_bases_and_narrow_adapters_are_refused(tmp_path: Path) -> None:
    thawed = toy_model()
    thawed.lm_head.weight.requires_grad_(True)
    with pytest.raises(StateError, match=r"lm_head\.weight"):
        toy_train(toy_config(tmp_path), model=thawed)
    with pytest.raises(StateError, match="float32"):
        toy_train(toy_config(tmp_path), model=toy_model().to(torch.bfloat16))


def test_a_module_that_the_first_step_does_not_reach(tmp_path: Path) -> None:
    model = toy_model()
    model.model.layers[1].mlp.forward = lambda hidden: hidden * 0  # its three projections are never called
    with pytest.raises(GradientError) as caught:
        toy_train(toy_config(tmp_path), model=model)
    assert "model.layers.1.mlp.up_proj" in caught.value.where
    assert "6 parameters without a gradient, 3 modules" in caught.value.got


def test_a_loss_that_no_adapter_has_a_part_in(tmp_path: Path) -> None:
    with torch.no_grad(), pytest.raises(GradientError, match="28 parameters without a gradient"):
        toy_train(toy_config(tmp_path))


def test_a_gradient_that_is_zero_everywhere(tmp_path: Path) -> None:
    model = toy_model()
    parameters = gs.trainable_parameters(model, "default")
    parameters["model.layers.0.self_attn.q_proj.lora_B"].register_hook(torch.zeros_like)
    with pytest.raises(GradientError, match=r"layers\.0\.self_attn\.q_proj"):
        toy_train(toy_config(tmp_path), model=model)


def test_models_and_tokens_that_do_not_fit(tmp_path: Path) -> None:
    classifier = tiny("llama_classifier")
    gs.attach(classifier, gs.LoRA(r=2))
    with pytest.raises(UnsupportedError):
        toy_train(toy_config(tmp_path), model=classifier)
    for field, value in [("vocab_size", 100), ("max_position_embeddings", 8)]:
        model = toy_model()
        setattr(model.config, field, value)
        with pytest.raises(DataError, match=r"rows\.jsonl:\d"):
            toy_train(toy_config(tmp_path), model=model)


def test_the_config_s_method_must_be_the_attached_one(tmp_path: Path) -> None:
    flat = toy_config(tmp_path)
    config = RunConfig(base="toy", method=gs.LoRA(r=4), data=flat.data, train=flat.train, output=flat.output)
    with pytest.raises(StateError, match="not of the config's method"):
        toy_train(config)  # pyright: ignore[reportArgumentType]


def test_fifty_steps_equal_a_plain_peft_loop(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = toy_config(tmp_path, max_steps=50, epochs=None, accumulation=1, lr=1e-3)
    ours = toy_model(dropout=0.0, r=4)
    start = gs.capture(ours)
    run = toy_train(config, model=ours)

    settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny("llama"), settings)
    named = {name: value for name, value in theirs.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for name, value in start.named_tensors().items():
            path, slot = name.rsplit(".", 1)
            named[f"base_model.model.{path}.{slot}.default.weight"].copy_(value)
    examples = encode(read_rows(config.data.train), tiny_tokenizer())
    steps, optimizer = Steps(examples, config), torch.optim.AdamW(named.values(), lr=0.0, weight_decay=0.0)
    losses = []
    for step in range(50):
        batch = collate([examples[index] for index in steps[step][0]], 256)
        logits = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = nn.functional.cross_entropy(logits.reshape(-1, 320)[batch.at].double(), batch.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(named.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * lr_factor(step, 50, warmup_steps(config.train.warmup, 50), "linear")
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    gap = max(abs(mine - other) for (_, mine, *_), other in zip(curve(run.output), losses, strict=True))
    assert gap < 1e-4
    assert losses[-1] < losses[0]
