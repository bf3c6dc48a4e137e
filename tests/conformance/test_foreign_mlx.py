"""mlx-lm itself with our adapter, and we with its: toy models, equal logits.

Runs in an interpreter that has mlx and mlx-lm beside the project's packages, named by GOSSAMER_MLX. Its CPU build does.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.elsewhere import finds_equal

SCRIPT = """
import json, sys
from pathlib import Path
import mlx.core as mx
import torch
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers
import gossamer as gs
from gossamer.files.foreign import read_foreign, write_foreign
from gossamer.models import tiny, tiny_tokenizer, write_model_folder

folder, name = Path(sys.argv[1]), sys.argv[2]
base = write_model_folder(tiny(name), tiny_tokenizer(), folder / "base")
tokens = [[5, 9, 2, 40, 17, 3]]


def theirs(model):
    return torch.tensor(model(mx.array(tokens)).astype(mx.float32).tolist())


@torch.no_grad()
def ours(model):
    return model(torch.tensor(tokens)).logits


def shake(parameters):
    for number, parameter in enumerate(parameters):
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(number))


def near(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


model = tiny(name).eval()
plain = ours(model)
near(theirs(load(str(base))[0]), plain)

spec = gs.LoRA(r=4, alpha=2.0, target_modules=("q_proj", "down_proj"), rank_pattern={"down_proj": 6},
               alpha_pattern={"down_proj": 9.0}, layers_to_transform=(1,) if name == "mistral" else None)
gs.attach(model, spec)
shake(gs.trainable_parameters(model).values())
wanted = ours(model)
assert (wanted - plain).abs().max() > 0.1
write_foreign(gs.capture(model), folder / "ours", "mlx")
near(theirs(load(str(base), adapter_path=str(folder / "ours"))[0]), wanted)

trained = load(str(base))[0]
given = {"rank": 3, "scale": 7.0, "dropout": 0.0, "keys": ["self_attn.k_proj", "mlp.up_proj"]}
trained.freeze()
linear_to_lora_layers(trained, 1, given)
leaves = dict(tree_flatten(trained.trainable_parameters()))
mx.random.seed(1)
moved = {key: 0.1 * mx.random.normal(value.shape) for key, value in leaves.items()}
trained.load_weights([*moved.items()], strict=False)
(folder / "theirs").mkdir()
mx.save_safetensors(str(folder / "theirs" / "adapters.safetensors"), moved)
facts = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": given}
(folder / "theirs" / "adapter_config.json").write_text(json.dumps(facts))
again = tiny(name).eval()
gs.attach(again, read_foreign(folder / "theirs"))
near(ours(again), theirs(trained))
assert (ours(again) - plain).abs().max() > 0.1
print("equal")
"""


@pytest.mark.mlx
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_mlx_reads_our_folder_and_we_read_its(name: str, tmp_path: Path):
    finds_equal("GOSSAMER_MLX", SCRIPT, str(tmp_path), name)
