"""diffusers itself with our files, and we with its: a toy UNet and a toy transformer, equal outputs.

Runs in an interpreter that has diffusers beside the project's packages, named by GOSSAMER_DIFFUSERS.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.elsewhere import finds_equal

SCRIPT = """
import sys, torch
from pathlib import Path
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
import gossamer as gs
from gossamer.files.foreign import read_foreign, write_foreign

folder, part, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8,
    ).eval()


def transformer():
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
    ).eval()


make = {"unet": unet, "transformer": transformer}[part]
pipeline = {"unet": StableDiffusionPipeline, "transformer": StableDiffusion3Pipeline}[part]
everywhere = {"unet": ("to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"), "transformer": ("to_q", "to_v", "proj")}
targets = everywhere[part]


@torch.no_grad()
def run(model):
    draw = torch.Generator().manual_seed(1)
    image, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 5, 16, generator=draw)
    pooled, step = torch.randn(2, 16, generator=draw), torch.tensor([3, 5])
    more = {"pooled_projections": pooled} if part == "transformer" else {}
    return model(hidden_states=image, encoder_hidden_states=text, timestep=step, **more).sample if more else model(
        image, step, text).sample


def shake(parameters):
    for number, parameter in enumerate(parameters):
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(number))


def load(path, model):
    state, *rest = pipeline.lora_state_dict(path, return_lora_metadata=True, **(
        {"unet_config": model.config} if part == "unet" else {}))
    if part == "unet":
        alphas, metadata = rest
        pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=model, metadata=metadata)
    else:
        pipeline.load_lora_into_transformer(state, transformer=model, metadata=rest[-1])


ours, plain = make(), run(make())
gs.attach(ours, gs.LoRA(r=4, alpha=2.0, target_modules=targets))
shake(gs.trainable_parameters(ours).values())
wanted, adapter = run(ours), gs.capture(ours)
assert (wanted - plain).abs().max() > 0.1
named = {f"{part}.{path}": slots for path, slots in adapter.tensors.items()}
renamed = gs.Adapter(adapter.spec.replace(target_modules=tuple(named)), named)
done = write_foreign(renamed, folder / "a.safetensors", name)
assert done.exact
theirs = make()
load(folder / "a.safetensors", theirs)
torch.testing.assert_close(run(theirs), wanted, rtol=1e-5, atol=1e-5)

if name == "diffusers":
    trained = make()
    trained.add_adapter(LoraConfig(r=3, lora_alpha=6, init_lora_weights="gaussian", target_modules=[*targets]))
    shake(value for key, value in trained.named_parameters() if "lora_" in key)
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(trained)}
    facts = {f"{part}_lora_adapter_metadata": trained.peft_config["default"].to_dict()}
    pipeline.save_lora_weights(folder / "theirs", **layers, **facts)
    found = read_foreign(next((folder / "theirs").glob("*.safetensors")))
    own = {path.removeprefix(f"{part}."): slots for path, slots in found.tensors.items()}
    again = make()
    gs.attach(again, gs.Adapter(found.spec.replace(target_modules=tuple(own), rank_pattern={}, alpha_pattern={}), own))
    torch.testing.assert_close(run(again), run(trained), rtol=1e-5, atol=1e-5)
    assert (run(again) - plain).abs().max() > 0.1
print("equal")
"""


@pytest.mark.diffusers
@pytest.mark.parametrize(("part", "name"), [("unet", "diffusers"), ("unet", "kohya"), ("transformer", "diffusers")])
def test_diffusers_reads_our_file_and_we_read_its(part: str, name: str, tmp_path: Path):
    finds_equal("GOSSAMER_DIFFUSERS", SCRIPT, str(tmp_path), part, name)
