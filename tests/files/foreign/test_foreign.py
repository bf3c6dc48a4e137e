"""Every format, there and back, and each against its own facts written out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

import gossamer as gs
from gossamer.errors import AdapterFileError, GossamerError, UnsupportedError, UsageError
from gossamer.files.foreign import FORMATS, read_foreign, write_foreign

HEADS, KV_HEADS, WIDTH = 4, 2, 32


def language_adapter(dtype: torch.dtype = torch.float32, **fields: object) -> gs.Adapter:
    generator = torch.Generator().manual_seed(0)
    spec = gs.LoRA(**{"r": 4, "alpha": 8.0, "target_modules": ("q_proj", "k_proj", "down_proj")} | fields)
    sizes = {"self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (16, WIDTH), "mlp.down_proj": (WIDTH, 64)}
    tensors = {}
    for layer in range(2):
        for name, (outer, inner) in sizes.items():
            path = f"model.layers.{layer}.{name}"
            rank = spec.rank_at(path)
            tensors[path] = {
                "lora_A": torch.randn(rank, inner, generator=generator).to(dtype),
                "lora_B": torch.randn(outer, rank, generator=generator).to(dtype),
            }
    return gs.Adapter(spec, tensors)


def picture_adapter(dtype: torch.dtype = torch.float32) -> gs.Adapter:
    generator = torch.Generator().manual_seed(0)
    spec = gs.LoRA(r=4, alpha=2.0, target_modules=("to_q", "conv1"), alpha_pattern={"conv1": 3.0})
    shapes = {
        "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": ((4, 8), (16, 4)),
        "unet.down_blocks.0.resnets.0.conv1": ((4, 8, 3, 3), (16, 4, 1, 1)),
    }
    return gs.Adapter(
        spec,
        {
            path: {
                "lora_A": torch.randn(a, generator=generator).to(dtype),
                "lora_B": torch.randn(b, generator=generator).to(dtype),
            }
            for path, (a, b) in shapes.items()
        },
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    numbers = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | numbers))
    return folder


def suffix(name: str) -> str:
    return {"gguf": ".gguf", "kohya": ".safetensors", "diffusers": ".safetensors"}.get(name, "")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_there_and_back_is_bit_equal(name: str, dtype: torch.dtype, base: Path, tmp_path: Path):
    adapter = (picture_adapter if name in ("kohya", "diffusers") else language_adapter)(dtype)
    done = write_foreign(adapter, tmp_path / f"out{suffix(name)}", name, base)
    again = read_foreign(done.path, None, base)
    assert done.exact
    assert done.error == 0
    assert done.lost == ()
    assert again.paths == adapter.paths
    for path in adapter.paths:
        assert again.spec.scaling_at(path) == adapter.spec.scaling_at(path)
        for slot, tensor in adapter.tensors[path].items():
            assert torch.equal(again.tensors[path][slot], tensor)
            assert again.tensors[path][slot].dtype == tensor.dtype


@pytest.mark.parametrize("name", ["gguf", "torchtune", "mlx"])
def test_rslora_and_patterns_keep_their_change(name: str, base: Path, tmp_path: Path):
    fields = {"scaling": "rslora", "dropout": 0.1, "alpha_pattern": {"k_proj": 3.0}}
    if name != "torchtune":
        fields["rank_pattern"] = {"down_proj": 2}
    adapter = language_adapter(**fields)
    done = write_foreign(adapter, tmp_path / f"out{suffix(name)}", name, base)
    again = read_foreign(done.path, name, base)
    assert any("rslora" in one for one in done.lost)
    assert any("dropout" in one for one in done.lost)
    for path in adapter.paths:
        torch.testing.assert_close(again.delta(path), adapter.delta(path), rtol=1e-5, atol=1e-5)
    assert done.error < 1e-6


def test_gguf_says_what_llama_cpp_reads(base: Path, tmp_path: Path):
    adapter = language_adapter()
    write_foreign(adapter, tmp_path / "a.gguf", "gguf", base)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    told = {name: field.contents() for name, field in reader.fields.items()}
    assert told["general.architecture"] == "llama"
    assert told["general.type"] == "adapter"
    assert told["adapter.type"] == "lora"
    assert told["adapter.lora.alpha"] == 8.0
    tensors = {one.name: one for one in reader.tensors}
    assert [*tensors["blk.0.attn_q.weight.lora_a"].shape] == [WIDTH, 4]
    assert [*tensors["blk.0.attn_q.weight.lora_b"].shape] == [4, WIDTH]
    rows = adapter.tensors["model.layers.0.self_attn.q_proj"]["lora_B"]
    stored = torch.tensor(tensors["blk.0.attn_q.weight.lora_b"].data)
    size = WIDTH // HEADS
    for head in range(HEADS):  # row 2 i of a head is its row i, row 2 i + 1 its row size / 2 + i
        for index in range(size // 2):
            assert torch.equal(stored[head * size + 2 * index], rows[head * size + index])
            assert torch.equal(stored[head * size + 2 * index + 1], rows[head * size + size // 2 + index])


def test_mlx_lies_down_and_has_one_scale(tmp_path: Path):
    adapter = language_adapter()
    write_foreign(adapter, tmp_path / "mlx", "mlx")
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    name = "model.layers.0.mlp.down_proj"
    change = 2.0 * tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]  # x @ a @ b * scale
    torch.testing.assert_close(change.T, adapter.delta(name))
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == 2.0
    assert "mlp.down_proj" in config["lora_parameters"]["keys"]


def test_a_kohya_file_of_another_tool(tmp_path: Path):
    stem = "lora_unet_down_blocks_0_attn_to_q"
    factors = {f"{stem}.lora_down.weight": torch.ones(2, 4), f"{stem}.lora_up.weight": torch.ones(6, 2)}
    save_file(factors | {f"{stem}.alpha": torch.tensor(1.0)}, tmp_path / "k.safetensors")
    with pytest.raises(UsageError, match="where the dots were"):
        read_foreign(tmp_path / "k.safetensors")
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"down_blocks.0.attn.to_q.weight": torch.zeros(6, 4)}, folder / "model.safetensors")
    adapter = read_foreign(tmp_path / "k.safetensors", base=folder)
    assert adapter.paths == ("down_blocks.0.attn.to_q",)
    assert torch.equal(adapter.delta(adapter.paths[0]), torch.ones(6, 4))  # 1 / 2 * 2


def test_a_diffusers_file_without_alphas_takes_the_rank(tmp_path: Path):
    name = "transformer.blocks.0.to_q"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(6, 2)},
        tmp_path / "d.safetensors",
    )
    adapter = read_foreign(tmp_path / "d.safetensors")
    assert torch.equal(adapter.delta(name), torch.full((6, 4), 2.0))


@pytest.mark.parametrize("name", FORMATS)
def test_dora_is_refused_by_name(name: str, base: Path, tmp_path: Path):
    plain = language_adapter()
    tensors = {
        path: dict(slots) | {"lora_magnitude_vector": torch.ones(slots["lora_B"].shape[0])}
        for path, slots in plain.tensors.items()
    }
    dora = gs.Adapter(gs.DoRA(r=4, alpha=8.0, target_modules=("q_proj", "k_proj", "down_proj")), tensors)
    with pytest.raises(UnsupportedError, match="dora"):
        write_foreign(dora, tmp_path / f"x{suffix(name)}", name, base)
    assert not (tmp_path / f"x{suffix(name)}").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_cut_and_altered_files_are_refused(name: str, base: Path, tmp_path: Path):
    adapter = picture_adapter() if name in ("kohya", "diffusers") else language_adapter()
    path = write_foreign(adapter, tmp_path / f"out{suffix(name)}", name, base).path
    file = path if path.is_file() else next(path.glob("*.safetensors"))
    whole = file.read_bytes()
    generator = torch.Generator().manual_seed(1)
    for cut in torch.randint(0, len(whole), (12,), generator=generator).tolist():
        file.write_bytes(whole[:cut])
        with pytest.raises(GossamerError):
            read_foreign(path, name, base)
    for place in torch.randint(0, min(400, len(whole)), (40,), generator=generator).tolist():
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            read_foreign(path, name, base)
        except GossamerError:
            continue


def test_not_finite_and_missing_factors(tmp_path: Path):
    name = "unet.to_q"
    pair = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.full((6, 2), float("nan"))}
    save_file(pair, tmp_path / "n.safetensors")
    with pytest.raises(AdapterFileError, match="finite"):
        read_foreign(tmp_path / "n.safetensors")
    save_file({f"{name}.lora_A.weight": torch.ones(2, 4)}, tmp_path / "m.safetensors")
    with pytest.raises(AdapterFileError, match="missing"):
        read_foreign(tmp_path / "m.safetensors")


# What each format knows, and refuses by name ----------------------------------------------------------------------


LANGUAGE = {
    "llama": ("gguf", "torchtune"),
    "mistral": ("gguf", "torchtune"),
    "qwen2": ("gguf", "torchtune"),
    "granite": ("gguf",),
    "qwen3": ("gguf",),
    "qwen3_moe": ("gguf",),
    "gemma": ("gguf",),
    "gemma2": ("gguf",),
    "gemma3_text": ("gguf",),
    "olmo2": ("gguf",),
    "phi3": ("gguf",),
    "mixtral": (),
    "gpt_neox": (),
    "cohere": (),
    "": (),
}
PAIRED = {"gguf": ("llama", "mistral", "granite"), "torchtune": ("llama", "mistral")}
"""Whose rows of queries and keys change places, by each tool's own converter."""


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("kind", LANGUAGE)
def test_every_architecture_is_covered_or_refused_by_name(kind: str, name: str, base: Path, tmp_path: Path):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    path = "model.layers.0.self_attn." + ("qkv_proj" if kind == "phi3" else "q_proj")
    slots = {"lora_A": torch.randn(4, WIDTH), "lora_B": torch.randn(WIDTH, 4)}
    adapter = gs.Adapter(gs.LoRA(r=4, target_modules=(path,)), {path: slots})
    output = tmp_path / f"out{suffix(name)}"
    if name not in LANGUAGE[kind]:
        with pytest.raises(UnsupportedError, match=r"an architecture that is not covered|torchtune's Llama has not"):
            write_foreign(adapter, output, name, base)
        assert not output.exists()
        return
    assert write_foreign(adapter, output, name, base).exact
    if name == "gguf":
        stored = {one.name: torch.tensor(one.data) for one in gguf.GGUFReader(output).tensors}
        rows = next(value for key, value in stored.items() if key.endswith("lora_b"))
        assert key_of(stored) == ("blk.0.attn_qkv" if kind == "phi3" else "blk.0.attn_q")
    else:
        rows = load_file(output / "adapter_0.safetensors")["layers.0.attn.q_proj.lora_b.weight"]
    assert torch.equal(rows, slots["lora_B"]) == (kind not in PAIRED[name])


def key_of(stored: dict[str, torch.Tensor]) -> str:
    return next(iter(stored)).partition(".weight")[0]


PARTS = {
    "unet": ("kohya", "diffusers"),
    "text_encoder": ("kohya", "diffusers"),
    "text_encoder_2": ("kohya", "diffusers"),
    "text_encoder_3": ("diffusers",),
    "transformer": ("diffusers",),
    "prior": (),
}


@pytest.mark.parametrize("name", ["kohya", "diffusers"])
@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_a_pipeline_is_covered_or_refused_by_name(part: str, name: str, tmp_path: Path):
    path = f"{part}.transformer_blocks.0.attn.to_q"
    adapter = gs.Adapter(
        gs.LoRA(r=4, target_modules=(path,)), {path: {"lora_A": torch.ones(4, 8), "lora_B": torch.ones(8, 4)}}
    )
    output = tmp_path / "out.safetensors"
    if name in PARTS[part]:
        assert write_foreign(adapter, output, name).exact
        return
    with pytest.raises(UnsupportedError) as refused:
        write_foreign(adapter, output, name)
    assert part in str(refused.value)
    assert not output.exists()


@pytest.mark.parametrize("stem", ["lora_unet_double_blocks_0_qkv", "lora_transformer_blocks_0_to_q"])
def test_a_kohya_file_of_a_transformer_is_refused_by_name(stem: str, tmp_path: Path):
    save_file(
        {f"{stem}.lora_down.weight": torch.ones(2, 4), f"{stem}.lora_up.weight": torch.ones(6, 2)},
        tmp_path / "k.safetensors",
    )
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": None}))  # as a diffusers UNet has it
    save_file({"transformer_blocks.0.attn.to_q.weight": torch.zeros(6, 4)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedError, match="of a transformer"):
        read_foreign(tmp_path / "k.safetensors", base=folder)


def test_what_a_tool_would_pass_over_or_misread_is_refused(base: Path, tmp_path: Path):
    head = {"lora_A": torch.ones(4, WIDTH), "lora_B": torch.ones(64, 4)}
    for path in ("lm_head", "transformer.h.0.attn.c_attn", "model.language_model.layers.0.self_attn.q_proj"):
        adapter = gs.Adapter(gs.LoRA(r=4, target_modules=(path,)), {path: head})
        for name in ("mlx", "gguf", "torchtune"):
            with pytest.raises(UnsupportedError) as refused:
                write_foreign(adapter, tmp_path / f"out{suffix(name)}", name, base)
            assert path in str(refused.value)
    with pytest.raises(UnsupportedError, match="alpha of 0"):  # which llama.cpp takes for a scaling of 1
        write_foreign(language_adapter(alpha=0.0), tmp_path / "a.gguf", "gguf", base)
