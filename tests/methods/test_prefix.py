"""Virtual tokens against PEFT: the same logits and gradients, with masks, padding and generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor

import gossamer as gs
from gossamer.errors import StateError, TargetError, UnsupportedError
from gossamer.models import tiny
from tests.adapters import bits, same_bits, shaken, tokens

Toys = Callable[[str], Any]

COUNT = 5
DECODERS = ("llama", "mistral", "gemma", "qwen2", "gpt2", "opt", "gpt_neox", "mixtral", "phi", "falcon", "bloom")
METHODS = {"prefix": gs.PrefixTuning, "prompt": gs.PromptTuning}
every_decoder = pytest.mark.parametrize("name", DECODERS)
every_method = pytest.mark.parametrize("method", METHODS)


def beside_peft(name: str, method: str, toy: Toys) -> tuple[Any, Any]:
    """Our model and PEFT's, with the same virtual tokens."""
    model = toy(name)
    gs.attach(model, METHODS[method](num_virtual_tokens=COUNT))
    kind = PrefixTuningConfig if method == "prefix" else PromptTuningConfig
    peft = get_peft_model(toy(name), kind(num_virtual_tokens=COUNT, task_type="CAUSAL_LM"))
    weight = peft.prompt_encoder["default"].embedding.weight
    (ours,) = gs.trainable_parameters(model).values()
    assert ours.shape == weight.shape
    weight.data.copy_(ours.data)
    return model, peft.eval()


@pytest.mark.parametrize(
    ("name", "method"),
    # PEFT makes keys for every query head; Falcon has one key head
    [(name, method) for name in DECODERS for method in METHODS if (name, method) != ("falcon", "prefix")],
)
def test_as_peft_computes(name: str, method: str, toy: Toys):
    model, peft = beside_peft(name, method, toy)
    ids = tokens(3, 7)
    with gs.using(model, None):
        base = model(ids).logits
    found, expected = model(ids).logits, peft(input_ids=ids).logits[:, -7:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - base).abs().max() > 1e-2
    found.square().mean().backward()
    expected.square().mean().backward()
    (ours,) = gs.trainable_parameters(model).values()
    theirs = peft.prompt_encoder["default"].embedding.weight
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * theirs.grad.abs().max().item())


@every_decoder
@every_method
def test_padding_on_the_right_changes_nothing(name: str, method: str, toy: Toys):
    model = toy(name)
    gs.attach(model, METHODS[method](num_virtual_tokens=COUNT))
    ids = tokens(1, 7)
    longer = torch.nn.functional.pad(ids, (0, 3), value=256)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 3))
    padded = model(input_ids=longer, attention_mask=mask).logits[:, :7]
    torch.testing.assert_close(padded, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def greedy(model: Any, ids: Tensor, steps: int) -> Tensor:
    """Greedy tokens by whole forward passes, without a cache from step to step."""
    for _ in range(steps):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@every_method
@every_decoder
def test_generation(name: str, method: str, toy: Toys):
    model = toy(name)
    gs.attach(model, METHODS[method](num_virtual_tokens=COUNT))
    ids = tokens(2, 6)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 256, "eos_token_id": None}
    with torch.no_grad():
        expected = greedy(model, ids, 6)
        assert torch.equal(model.generate(input_ids=ids, **options), expected)
        left = torch.nn.functional.pad(ids, (3, 0), value=256)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
        assert torch.equal(model.generate(input_ids=left, attention_mask=mask, **options)[:, 3:], expected)


@every_method
def test_rows(method: str, toy: Toys):
    model = toy("llama")
    gs.attach(model, METHODS[method](num_virtual_tokens=3), "a", seed=1)
    gs.attach(model, METHODS[method](num_virtual_tokens=6), "b", seed=2)
    gs.attach(model, gs.LoRA(r=2), "c")
    shaken(model, "c")
    ids = tokens(4, 7)
    names = ["a", None, "b", "c"]
    alone = []
    for row, name in enumerate(names):
        with gs.using(model, name):
            alone.append(model(ids[row : row + 1]).logits[0])
    with gs.using(model, names):
        torch.testing.assert_close(model(ids).logits, torch.stack(alone), rtol=1e-4, atol=1e-4)
        with pytest.raises(StateError, match="cache"):
            model.generate(input_ids=ids, max_new_tokens=2)
        with pytest.raises(StateError, match="one number"):
            model(input_ids=ids, labels=ids)


def test_beside_lora(toy: Toys):
    """The soft prompt runs through the adapted model, as the tokens after it do."""
    model, ids = toy("llama"), tokens(2, 7)
    gs.attach(model, gs.PromptTuning(num_virtual_tokens=4), "prompt")
    gs.attach(model, gs.LoRA(r=2), "lora")
    shaken(model, "lora")
    gs.use(model, "prompt", "lora")
    soft = gs.capture(model, "prompt").tensors[""]["prompt_embeddings"]
    with gs.using(model, "lora"):
        embedded = torch.cat([soft.expand(2, -1, -1), model.get_input_embeddings()(ids)], dim=1)
        expected = model(inputs_embeds=embedded).logits[:, 4:]
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_half_precision_base():
    model = tiny("llama", dtype=torch.bfloat16)
    for method in METHODS.values():
        gs.attach(model, method(num_virtual_tokens=3), "one")
        model(tokens()).logits.float().sum().backward()
        (parameter,) = gs.trainable_parameters(model, "one").values()
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        gs.detach(model, "one")


@every_method
def test_nothing_is_left_behind(method: str, toy: Toys):
    model = toy("gpt2")
    before, found = bits(model), model(tokens()).logits
    gs.attach(model, METHODS[method]())
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        gs.merge(model)
    model(tokens())
    gs.detach(model)
    assert same_bits(bits(model), before)
    assert torch.equal(model(tokens()).logits, found)
    assert "forward" not in vars(model)


@every_method
def test_what_is_refused(method: str, toy: Toys):
    spec = METHODS[method](num_virtual_tokens=2)
    for name in ("t5", "bert"):
        with pytest.raises(TargetError, match="a transformers decoder"):
            gs.attach(tiny(name), spec)
    with pytest.raises(UnsupportedError, match="sliding window"):
        gs.attach(tiny("gemma3"), spec)
    model = toy("llama")
    gs.attach(model, spec, "a")
    gs.attach(model, spec, "b")
    with pytest.raises(StateError, match="replace the same"):
        gs.use(model, "a", "b")
    with gs.using(model, None):
        plain = model(tokens(), use_cache=True).past_key_values
    with gs.using(model, "a"), pytest.raises(StateError, match="begun without"):
        model(tokens(), past_key_values=plain)
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(StateError, match="gradient checkpointing"):
        model(tokens())
