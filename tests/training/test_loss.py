"""The loss: exact, and only where something is learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gossamer.data.batches import Batch, collate
from gossamer.data.masks import Example
from gossamer.errors import UnsupportedError
from gossamer.kernels import losses
from gossamer.kernels.losses import token_nll
from gossamer.models import tiny
from gossamer.training.loss import output_embeddings, refuse_unless_causal, supervised_nll

CAUSAL = ["llama", "mistral", "gemma", "qwen2", "gpt2", "opt", "gpt_neox"]


def batch_of(rows: int = 3, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    examples = []
    for row in range(rows):
        ids = torch.randint(0, 256, (6 + 2 * row,), generator=draw).tolist()
        examples.append(Example(ids, [index > 3 for index in range(len(ids))], f"rows:{row}"))
    return collate(examples, 256)


def reference_nll(model: nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.double()
    return nn.functional.cross_entropy(logits.flatten(0, 1)[batch.at], batch.targets, reduction="none")


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("architecture", CAUSAL)
def test_equals_plain_cross_entropy_without_the_full_logits(architecture: str, frozen: bool) -> None:
    """A frozen head meets one position itself, to show that nothing follows it; a trained one all that have labels."""
    model, batch = tiny(architecture).requires_grad_(not frozen), batch_of()
    refuse_unless_causal(model)  # what it reads is tried once a model, with a forward of its own
    head, seen = output_embeddings(model), []
    assert head is not None
    with head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape))):
        nll = supervised_nll(model, batch)
    torch.testing.assert_close(nll.double(), reference_nll(model, batch), rtol=1e-5, atol=1e-5)
    assert seen == [(1, 1 if frozen else batch.supervised, 320)]
    assert not head._forward_pre_hooks


def test_soft_capped_logits_stay_capped() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    fields: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 64}
    fields |= {"num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 320, "initializer_range": 1.0}
    config = Gemma2Config(**fields, final_logit_softcapping=2.0)
    model, batch = Gemma2ForCausalLM(config).eval(), batch_of()
    torch.testing.assert_close(supervised_nll(model, batch).double(), reference_nll(model, batch), rtol=1e-5, atol=1e-5)


def test_a_model_without_output_embeddings_gives_the_same() -> None:
    model, batch = tiny("llama"), batch_of()
    expected = supervised_nll(model, batch)
    model.get_output_embeddings = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(supervised_nll(model, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "bert_mlm", "llama_classifier"])
def test_models_that_do_not_predict_the_next_token_are_refused(architecture: str) -> None:
    with pytest.raises(UnsupportedError):
        supervised_nll(tiny(architecture), batch_of())


def test_within_1e_6_of_float64_over_a_real_vocabulary() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 49_152, generator=draw) * 3
    targets = torch.randint(0, 49_152, (64,), generator=draw)
    exact = nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    assert ((token_nll(logits, targets).double() - exact) / exact).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_chunks_change_nothing_and_gradients_are_right(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(7, 50, generator=draw).to(dtype).requires_grad_()
    targets, outer = torch.randint(0, 50, (7,), generator=draw), torch.randn(7, generator=draw)
    (token_nll(logits, targets) * outer).sum().backward()
    whole = logits.grad
    assert whole is not None
    assert whole.dtype == dtype
    logits.grad = None
    monkeypatch.setattr(losses, "CHUNK", 100)
    (token_nll(logits, targets) * outer).sum().backward()
    assert torch.equal(whole, logits.grad)  # pyright: ignore[reportArgumentType]
    twin = logits.detach().double().requires_grad_()
    (nn.functional.cross_entropy(twin, targets, reduction="none") * outer).sum().backward()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(whole.double(), twin.grad, rtol=tolerance, atol=tolerance)


def test_gradcheck() -> None:
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda one: token_nll(one, torch.tensor([0, 8, 3, 3])), (logits,))
