"""What a plan says, against transformers' own models, the papers' arithmetic and published measurements."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import gossamer as gs
from gossamer.errors import BaseFileError, SpecError, TargetError, UnsupportedError, UsageError
from gossamer.models import tiny
from gossamer.pages.sizes import count
from gossamer.planning import DEVICES, ModelShape, Plan, compare, plan
from gossamer.planning.devices import GIB, Device, this_machine
from gossamer.planning.setting import QUANTS, moments, packed
from gossamer.planning.shape import KNOWN
from gossamer.planning.source import shape_of
from gossamer.planning.table import compared
from gossamer.quant import FORMATS, packed_bytes, quantize
from tests.house import tree

QV = ("q_proj", "v_proj")


def plain(kind: str, **fields: Any) -> Any:
    """A transformers config of the family's own defaults, made small."""
    small = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    return transformers.AutoConfig.for_model(kind, **(small | {"vocab_size": 320} | fields))


SMALL: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "mistral": {"num_key_value_heads": 2, "head_dim": 24},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32},
    "gemma": {"num_key_value_heads": 1, "head_dim": 32},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 32},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 32},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "qwen3_moe": {"num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16},
    "gpt2": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": {},
    "falcon": {"ffn_hidden_size": 96},
    "bert": {},
    "roberta": {},
}


@pytest.mark.parametrize("kind", [*SMALL])
def test_parameters_are_those_of_the_model(kind: str):
    config = plain(kind, **SMALL[kind])
    shape = shape_of(config.to_dict())
    auto = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    assert shape.total == sum(parameter.numel() for parameter in model.parameters())
    assert sum(shape.parameters.values()) == shape.total
    linears = {
        name: one
        for name, one in model.named_modules()
        if isinstance(one, torch.nn.Linear) or type(one).__name__ == "Conv1D"
    }
    assert shape.linears
    for linear in shape.linears:
        weight = linears[shape.path(linear, 1)].weight
        assert sorted(weight.shape) == sorted((linear.inner, linear.outer))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_numbers_by_hand_are_those_of_the_real_classes(gated: bool, tied: bool):
    kept = {"kv_heads": 2} if gated else {}
    given = ModelShape("by hand", 2, 64, 4, 320, 96, gated=gated, tied=tied, **kept)
    counted = shape_of(given.config())
    assert given.parameters == counted.parameters
    assert given.multiplied == counted.multiplied
    assert {*given.linears} == {*counted.linears}
    assert {given.path(one, 1) for one in given.linears} == {counted.path(one, 1) for one in counted.linears}


@pytest.mark.parametrize(
    ("architecture", "spec"),
    [("llama", gs.LoRA(r=4)), ("gpt2", gs.LoRA(r=4)), ("qwen2", gs.DoRA(r=4)), ("falcon", gs.LoRA(r=2)),
     ("llama", gs.LoRA(r=3, target_modules=QV)), ("opt", gs.LoRA(target_modules=r".*\.fc1")), ("mixtral", gs.LoRA(r=4)),
     ("llama", gs.FullTuning()), ("llama", gs.VeRA(r=4)), ("bert", gs.LoRA(r=4)),
     ("llama", gs.LoRA(r=4, modules_to_save=("model.norm",))),
     ("llama", gs.LoRA(target_modules=r".*layers\.0\..*_proj"))],
)  # fmt: skip
def test_what_is_trained_is_what_attach_trains(architecture: str, spec: Any):
    model = tiny(architecture)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    gs.attach(model, spec)
    trained = sum(parameter.numel() for parameter in gs.trainable_parameters(model).values())
    planned = plan(config, spec, sequence=32)
    assert planned.trainable == trained
    assert planned.peak > planned.memory.weights


# The papers' arithmetic ------------------------------------------------------------------------------------------


def test_gpt3_of_the_lora_paper():
    """Hu et al. 2021: 175B parameters, 18.9M and 37.7M trained, a checkpoint of 350 GB becomes one of 35 MB."""
    small = plan("gpt-3-175b", {"r": 4, "target_modules": QV}, dtype="float16", adapter_dtype="float16")
    large = plan("gpt-3-175b", {"r": 8, "target_modules": QV}, dtype="float16", adapter_dtype="float16")
    assert small.trainable == 96 * 2 * 4 * (12288 + 12288) == 18_874_368
    assert large.trainable == 37_748_736
    assert (count(small.trainable), count(large.trainable)) == ("18.9M", "37.7M")
    assert small.checkpoint_bytes == pytest.approx(350e9, rel=0.01)
    assert small.adapter_bytes / 2**20 == pytest.approx(35, rel=0.05)
    text = str(small)
    assert "18,874,368" in text
    assert "349 GB" in text
    assert "37.75 MB" in text


def test_one_matrix_of_4096():
    shape = ModelShape("one", 1, 4096, 32, 32_000, 11_008)
    planned = plan(shape, {"r": 8, "target_modules": ("q_proj",)})
    assert (planned.trainable, shape.linears[0].weights) == (65_536, 16_777_216)
    assert "65,536" in str(planned)


def test_65b_in_four_bits_on_one_card_of_48_gb():
    """Dettmers et al. 2023: from more than 780 GB to less than 48."""
    qlora = plan(
        "llama-65b", {"r": 64}, quant="nf4", sequence=512, adapter_dtype="bfloat16", optimizer="paged_adamw8bit",
        checkpointing=True,
    )  # fmt: skip
    assert qlora.peak < 48e9
    assert plan("llama-65b", "full", path="peft", adapter_dtype="float32", dtype="float32").peak > 780e9
    assert "65.3B" in count(qlora.shape.total)


def test_bits_of_a_packed_weight():
    rows, numbers = 4096, 4096 * 4096
    bits = {quant: 8 * packed(rows, numbers, quant) / numbers for quant in QUANTS}
    assert bits["nf4"] == bits["fp4"] == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), rel=1e-5)
    assert bits["nf4-single"] == bits["fp4-single"] == 4.5
    assert bits["int8"] == pytest.approx(8, abs=0.01)


@pytest.mark.parametrize("sizes", [(64, 64), (7, 9), (576, 1536)])
def test_a_packed_weight_is_counted_as_it_is_stored(sizes: tuple[int, int]):
    assert {*QUANTS} == {*FORMATS}
    for quant, form in FORMATS.items():
        assert packed(sizes[0], sizes[0] * sizes[1], quant) == packed_bytes(form, *sizes)
        assert packed_bytes(form, *sizes) == quantize(torch.randn(sizes), form).nbytes


def test_moments_in_eight_bits():
    assert moments(1 << 20, 4, "adamw") == 8 << 20
    assert moments(1 << 20, 4, "adamw8bit") == pytest.approx(2.03 * (1 << 20), rel=0.01)
    assert moments(64, 4, "adamw8bit") == 8 * 64  # too small to be worth it


@pytest.mark.parametrize(
    ("method", "gib"),
    [({"r": 32, "target_modules": QV}, 20.76), ({"r": 64, "target_modules": QV}, 21.00),
     ({"r": 10, "target_modules": ("gate_proj", "up_proj", "down_proj")}, 23.00), ("full", 36.2)],
    ids=str,
)  # fmt: skip
def test_published_peaks(method: Any, gib: float):
    """PEFT's own benchmark: Llama-3.2-3B, four rows of 768 tokens, bfloat16 with float32 adapters, one L40S."""
    planned = plan("llama-3.2-3b", method, sequence=768, batch=4, padded=False, path="peft")
    assert planned.peak / GIB == pytest.approx(gib, rel=0.10)


def test_full_against_lora_against_qlora():
    plans = dict(compare("llama-3.1-8b", sequence=512))
    sizes = [round(plans[name].peak / 1e9) for name in ("full, in place", "LoRA", "QLoRA")]
    assert sizes == pytest.approx([80, 16, 6], rel=0.2)
    assert "QLoRA" in compared(compare("llama-3.1-8b", sequence=512))


def test_the_readme_s_table_is_the_plan():
    readme = (tree.ROOT / "README.md").read_text(encoding="utf-8")
    plans = dict(compare("llama-3.1-8b", sequence=512))
    rows = {"full fine-tuning in 16 bits": "full, in place", "LoRA r=16": "LoRA", "QLoRA r=16": "QLoRA"}
    for row, name in rows.items():
        assert f"| {row} | {plans[name].peak / 1e9:.1f} GB |" in readme


@pytest.mark.parametrize(
    ("kind", "predicts"), [("llama", True), ("gpt2", True), ("t5", True), ("vit", False), ("bert", False)]
)
def test_a_plain_loop_holds_logits_where_tokens_are_predicted(kind: str, predicts: bool):
    optimiser = plan(tiny(kind), "full", path="peft", sequence=32).during[-1]
    assert optimiser.activations == (32 * 320 * 2 if predicts else 0)


# The plan itself -------------------------------------------------------------------------------------------------


def test_pieces_add_up_to_the_peak():
    for planned in (plan("llama-3.1-8b"), plan("smollm2-135m", "full"), plan("llama-3.2-3b", quant="nf4", batch=4)):
        assert sum(planned.pieces.values()) == planned.peak == planned.to_dict()["peak"]
        assert planned.peak == max(planned.to_dict()["moments"].values())
        json.dumps(planned.to_dict())


def test_more_of_anything_takes_more():
    base = plan("llama-3.1-8b", sequence=512)
    assert plan("llama-3.1-8b", sequence=1024).peak > base.peak
    assert plan("llama-3.1-8b", sequence=512, batch=2).peak > base.peak
    assert plan("llama-3.1-8b", sequence=512, checkpointing=True).peak < base.peak
    assert plan("llama-3.1-8b", sequence=512, quant="nf4").peak < base.peak
    assert plan("llama-3.1-8b", sequence=512, supervised=0.1).peak <= base.peak  # few logits exist at once
    assert plan("llama-3.1-8b", sequence=512, path="peft").peak > base.peak
    assert plan("llama-3.1-8b", {"dropout": 0.1}, sequence=512).peak > base.peak
    assert plan("llama-3.1-8b", {"start": "pissa"}, sequence=512).peak > base.peak
    assert (
        plan("llama-3.1-8b", {"r": 512}, sequence=512, accumulation=4).peak
        > plan("llama-3.1-8b", {"r": 512}, sequence=512).peak
    )


def test_operations_of_a_token():
    """4 (P + hV) + 6 r sum(in + out) = 30.3e9 at 8B and r = 16, and attention; full fine-tuning 6 (P + hV)."""
    lora, full = plan("llama-3.1-8b", {"r": 16}, sequence=1), plan("llama-3.1-8b", "full", sequence=1)
    assert lora.forward_flops + lora.backward_flops == pytest.approx(30.3e9, rel=0.01)
    assert (full.forward_flops + full.backward_flops) == pytest.approx(6 * 7.504e9, rel=0.01)
    again = plan("llama-3.1-8b", {"r": 16}, sequence=1, checkpointing=True)
    assert again.backward_flops == pytest.approx(lora.forward_flops + lora.backward_flops)
    timed = plan("llama-3.1-8b", {"r": 16}, device="H100")
    assert timed.seconds_per_token == pytest.approx((timed.forward_flops + timed.backward_flops) / (0.4 * 989e12))


def test_checkpointing_is_turned_on_only_where_it_is_needed():
    roomy = plan("llama-3.1-8b", sequence=4096, checkpointing="auto", device="H100")
    tight = plan("llama-3.1-8b", sequence=4096, checkpointing="auto", device="RTX 4090")
    nowhere = plan("llama-3.1-8b", sequence=4096, checkpointing="auto")
    assert (roomy.checkpointing, tight.checkpointing, nowhere.checkpointing) == (False, True, False)
    assert "checkpointing is on" in str(tight)
    assert "fits without" in str(roomy)


def test_verdicts_name_the_least_change():
    verdicts = {one.device.name: one for one in plan("llama-3.1-8b", sequence=2048, batch=6).verdicts()}
    assert [*verdicts] == ["8 GB", "16 GB", "24 GB", "48 GB", "80 GB", "this machine"]
    assert verdicts["80 GB"].fits
    assert verdicts["48 GB"].change == "checkpointing"
    assert verdicts["16 GB"].change.startswith("checkpointing + batch 1 x 6 + nf4 instead of bfloat16")
    for one in verdicts.values():
        assert one.plan is None or one.device.fits(one.plan.peak)
    hopeless = plan("llama-3.1-405b").verdicts((8,))[0]
    assert not hopeless.fits
    assert str(hopeless) == "no, whatever was tried"
    assert "LoRA instead of full" in str(plan("llama-3.1-8b", "full").verdicts((16,))[0])


def test_devices():
    assert DEVICES["H100"].memory == 80 * GIB
    assert this_machine().memory > 0
    assert not Device("x", 1000, driver=False).fits(1000)
    assert plan("smollm2-135m", device=24 * GIB).device == Device("24 GB", 24 * GIB)
    with pytest.raises(UsageError, match="RTX 4090"):
        plan("smollm2-135m", device="RTX 4091")


def test_a_page(tmp_path: Path):
    page = plan("llama-3.1-8b", quant="nf4").html(tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "llama-3.1-8b" in page


# Where the numbers come from -------------------------------------------------------------------------------------


def test_a_model_by_folder_file_mapping_and_name(tmp_path: Path):
    config = plain("llama", num_key_value_heads=2).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = [shape_of(tmp_path), shape_of(str(tmp_path / "config.json")), shape_of(config)]
    assert len({shape.total for shape in shapes}) == 1
    assert shape_of("meta-llama/Meta-Llama-3.1-8B-Instruct") is KNOWN["llama-3.1-8b"]
    typed = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "vocabulary": 320, "intermediate": 96}
    assert shape_of(typed).total == shapes[0].total


@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        ("lama-3.1-8b", BaseFileError, "llama-3.1-8b"),
        ({"model_type": "a-model-of-tomorrow"}, UnsupportedError, "tomorrow"),
        ({"model_type": "llama"}, BaseFileError, "num_attention_heads"),
        ({"layers": 2}, SpecError, "hidden"),
        ({"layers": 2, "hiden": 3}, SpecError, "hidden"),
    ],
)
def test_models_that_are_none(model: Any, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        plan(model)


def test_a_hub_id_out_of_reach(monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BaseFileError, match=r"config\.json"):
        plan("nobody/nothing-of-this-name")


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"method": "lorra"}, SpecError, "lora"),
        ({"method": {"r": 0}}, SpecError, "equal to 1"),
        ({"method": {"rank": 8}}, SpecError, "unknown"),
        ({"method": {"target_modules": ("q_prj",)}}, TargetError, "q_proj"),
        ({"method": "full", "quant": "nf4"}, UnsupportedError, "codes"),
        ({"method": "dora", "path": "peft"}, UnsupportedError, "PEFT"),
        ({"quant": "nf5"}, UsageError, "nf4"),
        ({"dtype": "float8"}, UsageError, "bfloat16"),
        ({"batch": 0}, UsageError, "batch"),
        ({"supervised": 0.0}, UsageError, "share"),
        ({"optimizer": "sgd"}, UsageError, "adamw"),
    ],
    ids=str,
)
def test_what_cannot_be_planned(arguments: dict[str, Any], error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        plan("smollm2-135m", **arguments)


@pytest.mark.parametrize("kind", ["bert", "falcon"])
def test_encoders_and_any_attention_are_planned(kind: str):
    planned = plan(plain(kind).to_dict(), sequence=64)
    assert planned.shape.total > 0
    assert planned.peak > planned.memory.weights + planned.memory.activations > planned.memory.weights


def test_a_module_and_what_makes_one_are_planned():
    """Any torch module, with a loss of its own: here a stack of blocks that transformers never saw."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.nn.functional.gelu(self.up(x)))

    class Stacked(torch.nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(Block() for _ in range(depth))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    def loss(model: Any, setting: Any) -> torch.Tensor:
        return model(torch.zeros(setting.batch, setting.sequence, 32)).square().mean()

    spec = gs.LoRA(r=4, target_modules=("up", "down"))
    found = [
        plan(lambda depth=depth: Stacked(depth), spec, sequence=16, dtype="float32", loss=loss) for depth in (6, 7, 8)
    ]
    assert plan(Stacked(6), spec, sequence=16, dtype="float32", loss=loss).peak == found[0].peak
    assert found[0].trainable == 6 * 2 * 4 * (32 + 64)
    assert found[2].peak - found[1].peak == found[1].peak - found[0].peak > 0


def test_experts_are_planned_with_a_note():
    planned = plan(plain("mixtral", **SMALL["mixtral"]).to_dict(), sequence=64)
    assert planned.parameters["experts"] > planned.parameters["attention"]
    assert "experts" in str(planned)


SCRIPT = """
import sys, time
started = time.process_time()
from gossamer.planning import plan
print(plan(sys.argv[1]).peak)
heavy = ("torch", "transformers", "pydantic", "numpy")
print(time.process_time() - started, *(name for name in heavy if name in sys.modules))
"""


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b"])
def test_an_answer_in_less_than_a_second_without_torch(name: str):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    best = 9.0
    for _ in range(5):  # a busy neighbour makes CPU-seconds longer too
        child = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, name], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        peak, _, *loaded = child.stdout.read().split()
        child.stdout.close()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert (child.returncode, loaded) == (0, [])
        assert int(peak) > 2 * 8e9
        best = min(best, used.ru_utime + used.ru_stime)
        if best < 1:
            break
    assert best < 1


def test_a_plan_is_a_value():
    assert isinstance(plan("smollm2-135m"), Plan)
    assert plan("smollm2-135m") == plan("smollm2-135m")
