"""Where PEFT 0.21 is known to be wrong, the referee is einsum in float64: Gossamer agrees with it, and PEFT does not.

Each test also says that PEFT still differs, so that the day on which it is mended does not go by unnoticed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn

import gossamer as gs
from gossamer.errors import SharedWeightError, TargetError, UnsupportedError
from gossamer.models import tiny, tiny_inputs
from tests.adapters import trained
from tests.conformance.oracle import Toys, logits, moved, tensors_of
from tests.files.test_older import old_file

EXACT, WRONG = 1e-5, 1e-3
PREFIX = "base_model.model."
HIDDEN = {"attn": "attn.in_proj_weight", "attn.base_layer.out_proj": "attn.out_proj.weight"}
"""Where the weights of torch's attention are, which are no module's `weight`."""


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def seeded(kind: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return kind().eval()


def by_peft(model: nn.Module, folder: Path, **fields: Any) -> Any:
    """PEFT's wrapper of a model with random factors, which are saved too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen: dict[str, Any] = {"r": 4, "lora_alpha": 8} | fields
        config = LoraConfig(**chosen)
        wrapped = moved(get_peft_model(model, config).eval(), 0.2)  # pyright: ignore[reportArgumentType]
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return wrapped


def doubled(model: nn.Module) -> Any:
    """A copy in float64; torch multiplies experts in groups in narrower kinds only."""
    exact: Any = copy.deepcopy(model).double()
    if hasattr(exact, "config"):
        exact.config._experts_implementation = "eager"
    return exact


@torch.no_grad()
def referee(model: nn.Module, folder: Path, scaling: float = 2.0) -> Any:
    """The model in float64, `scaling * B A` of the file's factors added to its weights."""
    exact, stored = doubled(model), tensors_of(folder)
    for name, inner in stored.items():
        path, linear, _ = name.removeprefix(PREFIX).partition(".lora_A")
        path, embedding, _ = path.partition(".lora_embedding_A")
        if linear or embedding:
            outer = stored[name.replace("_A", "_B")].double().flatten(1)
            change = torch.einsum("or,ri->oi", outer, inner.double().flatten(1))
            weight = exact.get_parameter(HIDDEN.get(path, f"{path}.weight"))
            weight += scaling * (change.T if embedding else change).reshape(weight.shape)
    return exact


def apart(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / max(1.0, other.abs().max().item())).item()


def attached(model: nn.Module, folder: Path) -> Any:
    gs.attach(model, gs.Adapter.load(folder))
    return model


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x)[0]


@torch.no_grad()
def test_the_output_matrix_of_attention_is_adapted_once(tmp_path: Path):
    x = drawn(2, 5, 8)
    theirs = by_peft(seeded(Attention), tmp_path, target_modules=["attn"])(x)
    exact = referee(seeded(Attention), tmp_path)(x.double())
    assert apart(attached(seeded(Attention), tmp_path)(x), exact) <= EXACT
    assert apart(theirs, exact) > WRONG


CONVOLUTIONS = {
    "dilated": {"dilation": 2, "padding": "same"},
    "reflecting": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": 1, "padding_mode": "circular"},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_with_dilation_or_another_padding(kind: str, tmp_path: Path):
    def net() -> Any:
        return seeded(lambda: nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3, **CONVOLUTIONS[kind])}))

    x = drawn(2, 3, 9, 9)
    theirs = by_peft(net(), tmp_path, target_modules=["conv"]).base_model.model["conv"](x)
    exact = referee(net(), tmp_path)["conv"](x.double())
    model = attached(net(), tmp_path)
    assert apart(model["conv"](x), exact) <= EXACT
    gs.merge(model)
    assert apart(model["conv"](x), exact) <= EXACT
    assert apart(theirs, exact) > WRONG


class Twice(nn.Module):
    """One module under two names, called under both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@torch.no_grad()
def test_a_module_under_two_names_is_merged_once(tmp_path: Path):
    x = drawn(3, 4)
    model = seeded(Twice)
    trained(model, gs.LoRA(r=4, alpha=8.0)).save(tmp_path / "ours")
    exact = referee(seeded(Twice), tmp_path / "ours")(x.double())
    assert apart(model(x), exact) <= EXACT
    gs.merge(model)
    assert apart(model(x), exact) <= EXACT
    wrapped = by_peft(seeded(Twice), tmp_path / "theirs", target_modules=["first", "second"])
    before = wrapped(x)
    assert apart(wrapped.merge_and_unload()(x), before) > WRONG


class Bounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4, max_norm=1.0)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x))


@torch.no_grad()
def test_an_embedding_with_max_norm_cannot_be_merged(tmp_path: Path):
    ids = torch.arange(9)
    wrapped = by_peft(seeded(Bounded), tmp_path, target_modules=["embedding"])
    cut = seeded(Bounded)
    cut(ids)  # torch cuts the rows that it looks up, in place
    exact = referee(cut, tmp_path)
    exact.embedding.max_norm = None
    model = attached(seeded(Bounded), tmp_path)
    assert apart(model(ids), exact(ids)) <= EXACT
    with pytest.raises(UnsupportedError, match="max_norm"):
        gs.merge(model)
    assert apart(wrapped(ids), exact(ids)) <= EXACT
    assert apart(wrapped.merge_and_unload()(ids), exact(ids)) > WRONG


@torch.no_grad()
def test_a_tied_embedding_cannot_be_merged(tmp_path: Path):
    wrapped = by_peft(tiny("llama", tie_word_embeddings=True), tmp_path, target_modules=["embed_tokens", "q_proj"])
    untied = tiny("llama", tie_word_embeddings=True)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    exact = logits(referee(untied, tmp_path))
    model = attached(tiny("llama", tie_word_embeddings=True), tmp_path)
    assert apart(logits(model), exact) <= EXACT
    with pytest.raises(SharedWeightError):
        gs.merge(model)
    assert apart(logits(wrapped), exact) <= EXACT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert apart(logits(wrapped.merge_and_unload()), exact) > WRONG


@torch.no_grad()
def test_single_experts_of_old_with_rslora(toy: Toys, tmp_path: Path):
    """Gate and up become one matrix of twice the rank, so alpha grows by sqrt(2), not by 2."""
    old = old_file("mixtral", tmp_path, use_rslora=True)
    exact = doubled(toy("mixtral"))
    for name, inner in old.items():
        path, mark, _ = name.partition(".lora_A")
        if mark:
            change = 5 / 3**0.5 * torch.einsum("or,ri->oi", old[f"{path}.lora_B.weight"].double(), inner.double())
            block, _, rest = path.partition(".block_sparse_moe.experts.")
            expert, _, matrix = rest.partition(".")
            if not rest:
                exact.get_parameter(f"{path}.weight").add_(change)
            elif matrix == "w2":
                exact.get_parameter(f"{block}.mlp.experts.down_proj")[int(expert)] += change
            else:
                half = slice(0, 96) if matrix == "w1" else slice(96, 192)
                exact.get_parameter(f"{block}.mlp.experts.gate_up_proj")[int(expert), half] += change
    with pytest.warns(UserWarning, match="transformers 5"):
        model = attached(toy("mixtral"), tmp_path)
    assert apart(logits(model), logits(exact)) <= EXACT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(toy("mixtral"), str(tmp_path)).eval()
    assert apart(logits(theirs), logits(exact)) > WRONG


@torch.no_grad()
def test_a_sum_with_rslora_is_the_sum_of_the_changes(toy: Toys, tmp_path: Path):
    config = {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}
    wrapped = by_peft(toy("llama"), tmp_path / "a", **config)
    wrapped.add_adapter("b", LoraConfig(r=4, lora_alpha=8, **config))
    wrapped.set_adapter("b")
    moved(wrapped, 0.1).save_pretrained(str(tmp_path), selected_adapters=["b"], save_embedding_layers=False)
    scaling = 8 / 4**0.5
    exact = logits(referee(referee(toy("llama"), tmp_path / "a", scaling), tmp_path / "b", scaling))
    model = toy("llama")
    gs.attach(model, gs.Adapter.load(tmp_path / "a") + gs.Adapter.load(tmp_path / "b"))
    assert apart(logits(model), exact) <= EXACT
    for kind in ("cat", "svd"):
        wrapped.add_weighted_adapter(["default", "b"], [1.0, 1.0], kind, combination_type=kind, svd_rank=8)
        wrapped.set_adapter(kind)
        assert apart(logits(wrapped), exact) > WRONG


@torch.no_grad()
def test_whispers_convolutions(toy: Toys, tmp_path: Path):
    """Whisper reads `conv1.stride`, which PEFT's wrapper does not have."""
    inputs = tiny_inputs("whisper")
    wrapped = by_peft(toy("whisper"), tmp_path, target_modules=["conv1", "conv2", "q_proj"])
    double = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    exact = referee(toy("whisper"), tmp_path)(**double).logits
    model = attached(toy("whisper"), tmp_path)
    assert apart(model(**inputs).logits, exact) <= EXACT
    gs.merge(model)
    assert apart(model(**inputs).logits, exact) <= EXACT
    with pytest.raises(AttributeError, match="stride"):
        wrapped(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_an_expression_on_a_mixture_names_what_it_says(name: str, toy: Toys, tmp_path: Path):
    """PEFT takes it apart into suffixes, and adapts the other layer too; here that only adds factors of zero."""
    expression = r".*\.1\..*(q_proj|o_proj)"
    model = toy(name)
    adapter = trained(model, gs.LoRA(r=4, alpha=8.0, target_modules=expression))
    assert adapter.paths == ("model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.q_proj")
    adapter.save(tmp_path / "ours")
    assert apart(logits(model), logits(referee(toy(name), tmp_path / "ours"))) <= EXACT
    with pytest.warns(UserWarning, match=r"missing adapter keys.*layers\.0"):
        theirs = PeftModel.from_pretrained(toy(name), str(tmp_path / "ours")).eval()
    assert apart(logits(theirs), logits(model)) <= EXACT


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_every_linear_module_of_a_mixture(name: str, toy: Toys, tmp_path: Path):
    """PEFT's word for them takes the router as well, which is none: refused by name. Ours is understood by PEFT."""
    by_peft(toy(name), tmp_path / "theirs", target_modules="all-linear")
    model = toy(name)
    with pytest.raises(TargetError, match="gate"):
        attached(model, tmp_path / "theirs")
    trained(model, gs.LoRA(r=4, alpha=8.0)).save(tmp_path / "ours")
    theirs = PeftModel.from_pretrained(toy(name), str(tmp_path / "ours")).eval()
    assert apart(logits(theirs), logits(model)) <= EXACT
    assert apart(logits(model), logits(referee(toy(name), tmp_path / "ours"))) <= EXACT


def test_a_prefix_of_falcon(toy: Toys):
    """It has one head of keys; PEFT makes some for every head of queries."""
    wrapped = get_peft_model(toy("falcon"), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    report = gs.attach(model := toy("falcon"), gs.PrefixTuning(num_virtual_tokens=3))
    assert report.trainable == 3 * 2 * 2 * 1 * 16
    assert logits(model).isfinite().all()
    with pytest.raises(RuntimeError):
        logits(wrapped)


def test_warnings_that_say_nothing(toy: Toys):
    """A pattern that names a stacked matrix is used, and a norm that is not LayerNorm is tuned; PEFT warns of both."""
    config = LoraConfig(target_parameters=["experts.down_proj"], rank_pattern={"experts.down_proj": 5})
    with pytest.warns(RuntimeWarning, match="rank_pattern keys"):
        wrapped: Any = get_peft_model(toy("mixtral"), config)
    assert {len(value) for name, value in wrapped.named_parameters() if ".experts." in name and "lora_A" in name} == {
        20
    }
    with pytest.warns(UserWarning, match="Unsupported layer type"):
        wrapped = get_peft_model(toy("llama"), LNTuningConfig(target_modules=["input_layernorm"]))
    assert any("ln_tuning_layers" in name for name, value in wrapped.named_parameters() if value.requires_grad)
