"""Steps through transformers' own forward: the logits of a whole forward without a cache, whoever else is there."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import gossamer as gs
from gossamer.adapter import Adapter
from gossamer.errors import UnsupportedError
from gossamer.models import make_dense, tiny
from gossamer.quant import quantize_model
from gossamer.running.cached import CachedDecoder
from gossamer.running.steps import Chunk, Decoder, StepInput
from gossamer.running.whole_steps import TransformersDecoder
from gossamer.serving.store import AdapterStore, LoadedAdapter
from gossamer.serving.terms import BatchTerms, DecoderTarget

TOYS = (
    *("llama", "mistral", "mixtral", "gemma", "gemma3", "qwen2", "qwen3_moe", "phi", "falcon", "bloom", "gpt2"),
    *("opt", "gpt_neox"),
)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon with alibi": ("falcon", {"alibi": True}),
    "falcon's new decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "mistral with a window": ("mistral", {"sliding_window": 5}),
    "gpt2 scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "opt with a norm after": ("opt", {"do_layer_norm_before": False}),
    "eager attention": ("gemma3", {"attn_implementation": "eager"}),
}
SMALL = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"vocab_size": 320, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 4}
        | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128},
    ),
    "gptj": ("GPTJForCausalLM", {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    "gemma2": (
        "Gemma2ForCausalLM",
        SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        SMALL
        | {"num_key_value_heads": 2, "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 4}
        | {"shared_expert_intermediate_size": 48, "num_experts_per_tok": 2},
    ),
    "mpt": ("MptForCausalLM", {"vocab_size": 320, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "deepseek": (
        "DeepseekV2ForCausalLM",
        SMALL
        | {"intermediate_size": 96, "moe_intermediate_size": 48, "q_lora_rank": 16, "kv_lora_rank": 16}
        | {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24, "n_routed_experts": 4}
        | {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "num_key_value_heads": 4, "n_shared_experts": 1},
    ),
}


def made(name: str) -> Any:
    """A toy, a variant of one, or another small model of random weights."""
    if name in MORE:
        kind, fields = MORE[name]
        of: Any = getattr(transformers, kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return of(of.config_class(**fields)).eval()
    family, fields = VARIANTS.get(name, (name, {}))
    return tiny(family, **fields)


def alone(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def run(decoder: Decoder, cache: Any, given: list[tuple[int, list[int], int, int]], terms: Any = None) -> Tensor:
    """Logits after the last token of each (row, text, start, count); those that continue come first."""
    chunks = tuple(Chunk(row, start, count) for row, _, start, count in given)
    tokens = torch.tensor([one for _, text, start, count in given for one in text[start : start + count]])
    return decoder(StepInput(tokens, chunks, tuple(range(len(chunks)))), cache, terms)


def drawn(draw: random.Random, lengths: tuple[int, ...]) -> list[list[int]]:
    return [[draw.randrange(250) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("name", [*TOYS, *VARIANTS, *MORE])
def test_every_token_has_the_logits_of_the_whole_forward(name: str) -> None:
    """Uneven prompts, whole and in chunks; rows go on in any order, one rests, one is taken by another sequence."""
    model = made(name)
    decoder = TransformersDecoder(model)
    cache = decoder.cache(4)
    texts = drawn(random.Random(1), (12, 9, 11, 5, 7))
    right = [alone(model, text) for text in texts]
    for step in (
        [(0, 0, 6), (2, 0, 3)],
        [(0, 6, 1), (2, 3, 1), (1, 0, 5)],  # row 1 is read while 0 and 2 go on
        [(2, 4, 1), (0, 7, 1)],  # row 1 rests, and they come in another order
        [(0, 8, 1), (1, 5, 1), (2, 5, 1), (3, 0, 1)],
        [(0, 9, 2), (2, 6, 2), (3, 1, 3)],
        [(2, 8, 1), (3, 4, 1), (0, 11, 1)],
    ):
        out = run(decoder, cache, [(row, texts[row], start, count) for row, start, count in step])
        known = torch.stack([right[row][start + count - 1] for row, start, count in step])
        torch.testing.assert_close(out, known, rtol=1e-4, atol=1e-4)
        assert out.argmax(1).tolist() == known.argmax(1).tolist()
    run(decoder, cache, [(0, texts[4], 0, 4)])  # another sequence in row 0
    cache.copy(2, 3, 9)
    out = run(decoder, cache, [(3, texts[2], 9, 1), (0, texts[4], 4, 1)])
    torch.testing.assert_close(out, torch.stack([right[2][9], right[4][4]]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "deepseek"])
def test_what_was_kept_of_a_row_goes_on_in_another(name: str) -> None:
    model = made(name)
    decoder = TransformersDecoder(model)
    cache, fresh = decoder.cache(3), decoder.cache(2)
    (text,) = drawn(random.Random(2), (8,))
    run(decoder, cache, [(0, text, 0, 7)])
    kept = cache.keep(0, 5)
    assert kept.nbytes == 4 * 5 * sum(one.numel() for pair in decoder.samples for one in pair)
    fresh.give(1, kept, 5)
    torch.testing.assert_close(run(decoder, fresh, [(1, text, 5, 3)]), alone(model, text)[-1:], rtol=1e-4, atol=1e-4)
    fresh.trim()
    assert not any(one.numel() for pair in fresh.layers for one in pair)


def test_the_cache_grows_and_keeps_what_it_has() -> None:
    model = tiny("gpt2")
    decoder = TransformersDecoder(model)
    cache = decoder.cache(2)
    (text,) = drawn(random.Random(3), (140,))
    run(decoder, cache, [(1, text, 0, 100)])
    before = cache.tokens
    out = run(decoder, cache, [(1, text, 100, 40)])
    assert cache.tokens > before
    torch.testing.assert_close(out, alone(model, text)[-1:], rtol=1e-4, atol=1e-4)


# Adapters ------------------------------------------------------------------------------------------------------


def adapter(name: str, seed: int, spec: Any) -> Adapter:
    model = made(name)
    gs.attach(model, spec)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in gs.trainable_parameters(model, "default").values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return gs.capture(model)


def specs(name: str, decoder: TransformersDecoder) -> list[Any]:
    """LoRA at every site, the head among them; another rank at few; bias terms; scaled outputs."""
    ends = sorted({site.paths[0].rpartition(".")[2] for site in decoder.sites})
    body = [one for one in ends if one not in ("lm_head", "embed_out")]
    return [
        gs.LoRA(r=2, target_modules=tuple(ends)),
        gs.LoRA(r=3, target_modules=(body[0],), bias="lora_only"),
        gs.IA3(target_modules=tuple(body), feedforward_modules=(body[-1],)),
        gs.DoRA(r=2, target_modules=(body[0],)),
    ]


@pytest.mark.parametrize("name", [*TOYS, "gpt_neo", "qwen2_moe"])
def test_an_adapter_in_each_row_is_as_if_it_were_attached(name: str) -> None:
    model = made(name)
    decoder = TransformersDecoder(model)
    store = AdapterStore(model, None, DecoderTarget(model, decoder))
    made_of = [adapter(name, seed, spec) for seed, spec in enumerate(specs(name, decoder))]
    loaded: list[LoadedAdapter] = [store.prepare(str(number), one) for number, one in enumerate(made_of)]
    texts = drawn(random.Random(4), (8, 5, 7, 6, 7))
    right = []
    for number, text in enumerate(texts):
        attached = made(name)
        if number < len(made_of):
            gs.attach(attached, made_of[number])
        right.append(alone(attached, text))
    plain = alone(model, texts[0])
    cache, terms = decoder.cache(5), BatchTerms()
    for step in (
        [(row, 0, len(text) - 2) for row, text in enumerate(texts)],
        [(0, 6, 1), (2, 5, 1), (4, 5, 1), (1, 3, 2), (3, 4, 2)],
        [(4, 6, 1), (0, 7, 1), (2, 6, 1)],
    ):
        chunks = tuple(Chunk(*one) for one in step)
        tokens = torch.tensor([one for row, start, count in step for one in texts[row][start : start + count]])
        taken = StepInput(tokens, chunks, tuple(range(len(chunks))))
        mixes = [((loaded[chunk.row], 1.0),) if chunk.row < len(loaded) else () for chunk in chunks]
        assert terms.look(mixes, decoder.parts(taken))
        out = decoder(taken, cache, terms)
        known = torch.stack([right[row][start + count - 1] for row, start, count in step])
        torch.testing.assert_close(out, known, rtol=1e-4, atol=2e-4)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    assert torch.equal(alone(model, texts[0]), plain)
    assert not torch.allclose(right[0][-1], plain[-1], atol=1e-2)
    store.close()


def test_hooks_go_when_a_step_fails() -> None:
    model = tiny("gpt2")
    decoder = TransformersDecoder(model)

    class Failing:
        def before(self, part: int, site: int, x: Tensor) -> Tensor:
            raise UnsupportedError("no")

    with pytest.raises(UnsupportedError):
        run(decoder, decoder.cache(1), [(0, [1, 2, 3], 0, 3)], Failing())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


def test_sites_are_the_maps_that_read_every_token() -> None:
    sites = {site.paths[0] for site in TransformersDecoder(made("qwen2_moe")).sites}
    assert "model.layers.0.mlp.shared_expert.up_proj" in sites
    assert "lm_head" in sites
    assert not any(".experts." in one for one in sites)
    conv = {site.paths[0] for site in TransformersDecoder(tiny("gpt2")).sites}
    assert "transformer.h.0.attn.c_attn" in conv


# What the weights are held as, and what is refused ---------------------------------------------------------------


@pytest.mark.parametrize("kind", [CachedDecoder, TransformersDecoder])
def test_a_quantised_base_equals_its_dequantised_twin(kind: Any) -> None:
    packed, dense = tiny("llama"), tiny("llama")
    for model in (packed, dense):
        quantize_model(model, "nf4", {"lm_head"})
    make_dense(dense)
    texts = drawn(random.Random(5), (6, 8))
    outs = []
    for model in (packed, dense):
        decoder = kind(model)
        cache = decoder.cache(2)
        run(decoder, cache, [(0, texts[0], 0, 4), (1, texts[1], 0, 5)])
        outs.append(run(decoder, cache, [(1, texts[1], 5, 1), (0, texts[0], 4, 1)]))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outs[1][1], alone(dense, texts[0])[4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper", "bert", "bert_mlm", "vit", "clip", "llama_classifier"])
def test_what_is_no_causal_model_is_refused_by_name(name: str) -> None:
    model = tiny(name)
    assert not TransformersDecoder.takes(model)
    with pytest.raises(UnsupportedError, match=type(model).__name__):
        TransformersDecoder(model)


STRANGE: dict[str, dict[str, Any]] = {
    "MambaForCausalLM": {},
    "JambaForCausalLM": {"intermediate_size": 32, "num_key_value_heads": 2},
    "Lfm2ForCausalLM": {
        "intermediate_size": 32,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"],
    },
    "BertLMHeadModel": {"intermediate_size": 32, "initializer_range": 0.2},  # looks ahead
    "RobertaForCausalLM": {"intermediate_size": 32, "initializer_range": 0.2, "is_decoder": True},  # other positions
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_more_or_other_than_keys_and_values_is_refused(kind: str) -> None:
    of: Any = getattr(transformers, kind)
    fields = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(UnsupportedError, match=kind):
        TransformersDecoder(of(of.config_class(**fields, **STRANGE[kind])).eval())
