"""torchtune itself with our adapter, and we with its: a toy Llama, equal logits.

Runs in an interpreter that has torchtune and torchao beside the project's packages, named by GOSSAMER_TORCHTUNE.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.elsewhere import finds_equal

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from torchtune.models.convert_weights import hf_to_tune, tune_to_peft_adapter_weights
from torchtune.models.llama2 import lora_llama2
from torchtune.modules.peft import get_adapter_params
from torchtune.training.checkpointing._utils import safe_torch_load
import gossamer as gs
from gossamer.files.foreign import read_foreign, write_foreign
from gossamer.models import tiny, tiny_tokenizer, write_model_folder

folder = Path(sys.argv[1])
model = tiny("llama").eval()
base = write_model_folder(model, tiny_tokenizer(), folder / "base")
tokens, c = torch.tensor([[5, 9, 2, 40, 17, 3]]), model.config
heads = {"num_heads": c.num_attention_heads, "num_kv_heads": c.num_key_value_heads}


def torchtunes(rank, alpha):
    made = lora_llama2(
        ["q_proj", "k_proj", "output_proj"], apply_lora_to_mlp=True, vocab_size=c.vocab_size,
        num_layers=c.num_hidden_layers, embed_dim=c.hidden_size, max_seq_len=64, intermediate_dim=c.intermediate_size,
        norm_eps=c.rms_norm_eps, lora_rank=rank, lora_alpha=alpha, **heads)
    dense = hf_to_tune(tiny("llama").state_dict(), dim=c.hidden_size, **heads)
    missing, unexpected = made.load_state_dict(dense, strict=False)
    assert not unexpected and all("lora" in key for key in missing)
    return made.eval()


@torch.no_grad()
def ours(model):
    return model(tokens).logits


def shake(parameters):
    for number, parameter in enumerate(parameters):
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(number))


def near(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


plain = ours(model)
modules = ("q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
gs.attach(model, gs.LoRA(r=4, alpha=6.0, target_modules=modules))
shake(gs.trainable_parameters(model).values())
assert (ours(model) - plain).abs().max() > 0.1
write_foreign(gs.capture(model), folder / "ours", "torchtune", base)
config = json.loads((folder / "ours" / "adapter_config.json").read_text())
theirs = torchtunes(config["r"], config["lora_alpha"])
loaded = safe_torch_load(folder / "ours" / "adapter_0.safetensors")
assert {*loaded} == {*get_adapter_params(theirs)}
theirs.load_state_dict(loaded, strict=False)
with torch.no_grad():
    near(theirs(tokens), ours(model))

trained = torchtunes(3, 12.0)
factors = get_adapter_params(trained)
shake(factors.values())
factors = {key: value.detach() for key, value in factors.items()}
(folder / "theirs").mkdir()
save_file(factors, folder / "theirs" / "adapter_0.safetensors")
facts = {"peft_type": "LORA", "r": 3, "lora_alpha": 12.0, "target_modules": [*modules]}
(folder / "theirs" / "adapter_config.json").write_text(json.dumps(facts))
(folder / "peft").mkdir()
save_file(tune_to_peft_adapter_weights(factors, dim=c.hidden_size, **heads), folder / "peft/adapter_model.safetensors")
(folder / "peft" / "adapter_config.json").write_text(json.dumps(facts))
for adapter in (read_foreign(folder / "theirs", base=base), gs.Adapter.load(folder / "peft")):
    again = tiny("llama").eval()
    gs.attach(again, adapter)
    with torch.no_grad():
        near(ours(again), trained(tokens))
    assert (ours(again) - plain).abs().max() > 0.1
print("equal")
"""


@pytest.mark.torchtune
def test_torchtune_reads_our_file_and_we_read_its(tmp_path: Path):
    finds_equal("GOSSAMER_TORCHTUNE", SCRIPT, str(tmp_path))
