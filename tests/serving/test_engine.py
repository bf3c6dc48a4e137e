"""The engine: every request gets what it would get alone, whoever else is in the batch."""

from __future__ import annotations

import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer as gs
from gossamer.adapter import Adapter
from gossamer.errors import (
    AdapterFileError,
    BaseMismatchError,
    NonFiniteError,
    ResourceError,
    StateError,
    UnsupportedError,
    UsageError,
)
from gossamer.models import tiny, tiny_tokenizer
from gossamer.serving.engine import Engine
from gossamer.serving.sampling import Sampling
from gossamer.serving.scheduler import Limits
from gossamer.serving.sequence import Sequence, SequenceState
from tests.adapters import trained

TOKENS = len(tiny_tokenizer())
"""Fewer than the toys' heads have rows: the rest are never drawn."""


def adapter(seed: int, rank: int = 3, targets: Any = "all-linear", family: str = "llama") -> Adapter:
    """One that changes what is said."""
    model = tiny(family)
    gs.attach(model, gs.LoRA(r=rank, target_modules=targets, scaling="rslora" if seed % 2 else "standard"))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in gs.trainable_parameters(model, "default").values():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return gs.capture(model)


@pytest.fixture(scope="module")
def adapters() -> dict[str, Adapter]:
    made = {f"a{seed}": adapter(seed, 1 + seed % 4) for seed in range(10)}
    return made | {"qv": adapter(20, 2, ("q_proj", "v_proj")), "up": adapter(21, 5, ("up_proj",))}


def alone(adapters: Mapping[str, Adapter], request: Sequence) -> list[int]:
    """By transformers' own model with the adapters attached, without a cache."""
    model = tiny("llama")
    total = None
    for name, weight in request.adapters.items():
        part = weight * adapters[name]
        total = part if total is None else total + part
    if total is not None:
        gs.attach(model, total)
    ids = [*request.prompt]
    with torch.no_grad():
        for _ in range(request.sampling.max_tokens):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1, :TOKENS].argmax()))
    return ids[len(request.prompt) :]


def engine_of(adapters: Any = None, family: str = "llama", **options: Any) -> Engine:
    return Engine((tiny(family), tiny_tokenizer()), adapters, **options)


def drawn(names: list[str], count: int, seed: int) -> list[Sequence]:
    draw, made = random.Random(seed), []
    for _ in range(count):
        prompt = tuple(draw.randrange(250) for _ in range(draw.randint(1, 30)))
        chosen = {name: draw.choice([1.0, 1.0, 0.5, -1.0]) for name in draw.sample(names, draw.choice([0, 1, 1, 1, 2]))}
        sampling = Sampling(max_tokens=draw.randint(1, 8), ignore_eos=True)
        made.append(Sequence(prompt, chosen, sampling, f"t{draw.randrange(3)}"))
    return made


@pytest.mark.parametrize("limits", [Limits(), Limits(rows=3, tokens=7), Limits(rows=12, tokens=40)])
def test_everybody_gets_what_he_would_get_alone(adapters: dict[str, Adapter], limits: Limits) -> None:
    requests = drawn([*adapters], 24, 0)
    with engine_of(adapters, limits=limits) as engine:
        sequences = [engine.submit(one) for one in requests[:10]]
        for one in requests[10:]:  # the others come while these are served
            engine.step()
            sequences.append(engine.submit(one))
        while engine.busy:
            engine.step()
        for request, sequence in zip(requests, sequences, strict=True):
            assert sequence.reply is not None
            assert [*sequence.reply.tokens] == alone(adapters, request)
            assert sequence.reply.digests == {name: adapters[name].digest for name in request.adapters}
        assert not any(one.holders for one in engine.store.resident)
        assert not engine.scheduler.running


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma"])
def test_families(family: str) -> None:
    made = adapter(1, family=family)
    with engine_of({"one": made}, family) as engine:
        (base, other) = engine.generate(["some words", "some words"], [None, "one"], max_tokens=5, ignore_eos=True)
    ids = tiny_tokenizer()("some words", return_tensors="pt")["input_ids"]
    model = tiny(family)
    for reply, attached in ((base, None), (other, made)):
        if attached:
            gs.attach(model, attached)
        beside = [*range(TOKENS, model.config.vocab_size)]
        out = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, suppress_tokens=beside)
        assert [*reply.tokens] == out[0, ids.shape[1] :].tolist()
    assert base.tokens != other.tokens


def test_a_request_keeps_the_adapter_that_it_began_with(adapters: dict[str, Adapter]) -> None:
    with engine_of({"it": adapters["a1"]}) as engine:
        request = Sequence((5, 6, 7), {"it": 1.0}, Sampling(max_tokens=6, ignore_eos=True))
        first = engine.submit(request)
        engine.step()
        engine.store.register("it", adapters["a2"])
        second = engine.submit(replace(request))
        while engine.busy:
            engine.step()
        for sequence, known in ((first, "a1"), (second, "a2")):
            assert sequence.reply is not None
            assert [*sequence.reply.tokens] == alone({"it": adapters[known]}, request)
            assert sequence.reply.digests == {"it": adapters[known].digest}


METHODS: dict[str, Any] = {
    "lora": gs.LoRA(r=3, bias="all"),
    "pissa": gs.LoRA(r=2, start="pissa", target_modules=("o_proj", "down_proj")),
    "dora": gs.DoRA(r=2),
    "ia3": gs.IA3(),
    "vera": gs.VeRA(r=8),
    "bitfit": gs.BitFit(),
    "head": gs.LoRA(r=2, modules_to_save=("lm_head",)),
}


def test_every_row_may_have_another_method() -> None:
    model = tiny("qwen2", tie_word_embeddings=False)
    made = {}
    for seed, (name, spec) in enumerate(METHODS.items()):
        made[name] = trained(model, spec, seed=seed)
        gs.detach(model)
    names = [*made, None, "dora"]
    prompts = [tuple(range(3 + row, 12 + 2 * row)) for row in range(len(names))]
    sampling = Sampling(max_tokens=5, ignore_eos=True)
    with Engine((model, tiny_tokenizer()), made, limits=Limits(tokens=40)) as engine:
        sequences = [
            engine.submit(Sequence(prompt, {name: 1.0} if name else {}, sampling))
            for prompt, name in zip(prompts, names, strict=True)
        ]
        while engine.busy:
            engine.step()
        with pytest.raises(UnsupportedError, match="only sums"):
            next(engine.generate(["x"], [{"dora": 0.5}]))
    for prompt, name, sequence in zip(prompts, names, sequences, strict=True):
        if name:
            gs.attach(model, made[name])
        logits = []
        ids = [*prompt]
        with torch.no_grad():
            for _ in range(5):
                logits.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1))
                ids.append(int(logits[-1][:TOKENS].argmax()))
        if name:
            gs.detach(model)
        assert [*sequence.drawn] == ids[len(prompt) :]
        known = torch.stack([one[:TOKENS].max() for one in logits])
        torch.testing.assert_close(torch.tensor(sequence.logprobs), known, rtol=1e-4, atol=1e-4)


def test_what_rows_cannot_share_leaves_the_old_one_serving(adapters: dict[str, Adapter]) -> None:
    norms = tiny("llama")
    gs.attach(norms, gs.NormTuning())
    with engine_of({"it": adapters["a1"]}) as engine:
        with pytest.raises(UnsupportedError, match=r"norm at LlamaRMSNorm"):
            engine.store.register("it", gs.capture(norms))
        (reply,) = engine.generate(["x"], "it", max_tokens=1)
        assert reply.digests == {"it": adapters["a1"].digest}


def test_an_adapter_of_another_base_is_refused(adapters: dict[str, Adapter]) -> None:
    with engine_of(family="mistral") as engine, pytest.raises(BaseMismatchError, match="another base"):
        engine.store.register("it", adapters["a1"])


def test_memory_is_bounded_and_what_was_forgotten_is_read_again(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    for name, one in adapters.items():
        one.save(tmp_path / name)
    with engine_of(tmp_path, memory=1, limits=Limits(rows=4)) as engine:
        assert engine.store.names() == sorted(adapters)
        assert not engine.store.resident
        replies = [*engine.generate(["a"] * 12, [*adapters], max_tokens=2)]
        assert not engine.store.resident
        again = [*engine.generate(["a"] * 12, [*adapters], max_tokens=2)]
        about = engine.store.describe("a1")
        assert not any(one.last is None or one.last.placed.stacks for one in engine.store.versions.values())
    assert [one.tokens for one in replies] == [one.tokens for one in again]
    assert (about["requests"], about["state"], about["digest"]) == (2, "disk", adapters["a1"].digest)
    assert (about["rank"], about["method"]) == (2, "lora")


def test_a_folder_that_cannot_be_read_is_the_fault_of_its_request_alone(
    adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    adapters["a1"].save(tmp_path / "bad")
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"no")
    with engine_of({"bad": tmp_path / "bad", "a2": adapters["a2"]}) as engine:
        bad = engine.submit(Sequence((1, 2), {"bad": 1.0}))
        good = engine.submit(Sequence((1, 2), {"a2": 1.0}, Sampling(max_tokens=2)))
        while engine.busy:
            engine.step()
        assert isinstance(bad.fault, AdapterFileError)
        assert good.reply
        adapters["a1"].save(tmp_path / "fresh")
        (tmp_path / "fresh" / "adapter_model.safetensors").rename(tmp_path / "bad" / "adapter_model.safetensors")
        assert next(engine.generate(["x"], "bad", max_tokens=1)).digests == {"bad": adapters["a1"].digest}


def test_prompts_that_begin_alike_are_read_once(adapters: dict[str, Adapter]) -> None:
    """While one reads, the others rest; they go on from what it has read, and say the same as without."""
    long = tuple(range(1, 60))
    requests = [Sequence((*long, 70 + one), {"a1": 1.0}, Sampling(max_tokens=4, ignore_eos=True)) for one in range(4)]
    with engine_of(adapters, limits=Limits(tokens=16)) as engine:
        sequences = [engine.submit(one) for one in requests]
        through = 0
        while engine.busy:
            through += engine.step()
        assert [sequence.reused for sequence in sequences] == [0, 59, 59, 59]
        assert through == 60 + 3 + 4 * 3
        for sequence, request in zip(sequences, requests, strict=True):
            assert [*sequence.drawn] == alone(adapters, request)


def test_the_one_that_reads_for_others_may_be_cancelled(adapters: dict[str, Adapter]) -> None:
    request = Sequence(tuple(range(1, 60)), {"a1": 1.0}, Sampling(max_tokens=4, ignore_eos=True))
    with engine_of(adapters, limits=Limits(tokens=16)) as engine:
        first, second, third = (engine.submit(replace(request)) for _ in range(3))
        engine.step()
        engine.step()
        assert second.state is SequenceState.PAUSED
        engine.cancel(first)
        while engine.busy:
            engine.step()
        assert first.fault
        for sequence in (second, third):
            assert [*sequence.drawn] == alone(adapters, request)


def test_cancelled_ones_leave_at_once(adapters: dict[str, Adapter]) -> None:
    with engine_of(adapters, limits=Limits(rows=1)) as engine:
        one, other = (engine.submit(Sequence((1, 2), {"a1": 1.0})) for _ in range(2))
        engine.step()
        for sequence in (other, one, one):
            engine.cancel(sequence)
        assert "cancelled" in str(one.fault)
        assert "cancelled" in str(other.fault)
        assert not engine.busy
        assert not any(version.holders for version in engine.store.resident)


def test_the_cache_holds_no_more_than_it_may() -> None:
    with engine_of(limits=Limits(rows=8, cache=100)) as engine:
        for _ in range(6):
            engine.submit(Sequence(tuple(range(20)), {}, Sampling(max_tokens=20, ignore_eos=True)))
        most = 0
        while engine.busy:
            engine.step()
            most = max(most, len(engine.scheduler.running))
        assert most == 2
        with pytest.raises(UsageError, match="impossible length"):
            engine.submit(Sequence(tuple(range(100))))


def test_an_adapter_that_overflows_spoils_nobody_else(adapters: dict[str, Adapter]) -> None:
    huge = 1e36 * adapters["a3"]
    request = Sequence((5, 6, 7), {"a1": 1.0}, Sampling(max_tokens=4, ignore_eos=True))
    for others in (1, 9):  # concatenated, then gathered
        with engine_of(adapters | {"huge": huge}) as engine:
            bad = engine.submit(Sequence((5, 6), {"huge": 1.0}))
            good = engine.submit(replace(request))
            for other in range(others):
                engine.submit(Sequence((9, 8), {f"a{other}": 1.0}))
            while engine.busy:
                engine.step()
            assert isinstance(bad.fault, NonFiniteError)
            assert good.reply is not None
            assert [*good.reply.tokens] == alone(adapters, request)


def test_sampling_depends_on_the_seed_alone(adapters: dict[str, Adapter]) -> None:
    with engine_of(adapters) as engine:
        options: dict[str, Any] = {"max_tokens": 8, "temperature": 1.5, "top_p": 0.9, "top_k": 40, "seed": 7}
        (one,) = engine.generate(["hello"], "a1", **options)
        several = [*engine.generate(["hello", "other words", "hello"], ["a1", "a2", "a1"], **options)]
        (changed,) = engine.generate(["hello"], "a1", **options | {"seed": 8})
    assert one.tokens == several[0].tokens == several[2].tokens
    assert changed.tokens != one.tokens
    assert all(value <= 0 for value in one.logprobs)


def test_stop_texts_and_ends() -> None:
    with engine_of() as engine:
        (whole,) = engine.generate(["abc"], max_tokens=12, ignore_eos=True)
        word = whole.text[3:5]
        (cut,) = engine.generate(["abc"], max_tokens=12, ignore_eos=True, stop=(word,))
        assert cut.text == whole.text[: whole.text.index(word)]
        assert (cut.finish, whole.finish) == ("stop", "length")
        engine.ends = {whole.tokens[2]}
        (ended,) = engine.generate(["abc"], max_tokens=12)
        assert (ended.finish, len(ended.tokens)) == ("stop", whole.tokens.index(whole.tokens[2]) + 1)


def test_refusals(adapters: dict[str, Adapter]) -> None:
    with engine_of(adapters, limits=Limits(waiting=1)) as engine:
        with pytest.raises(UsageError, match="qv"):
            engine.submit(Sequence((1,), {"qw": 1.0}))
        with pytest.raises(UsageError, match="impossible length"):
            engine.submit(Sequence(()))
        engine.submit(Sequence((1,)))
        with pytest.raises(ResourceError, match="too many"):
            engine.submit(Sequence((1,), {"a1": 1.0}))
        assert not engine.store.versions["a1"].holders
    with pytest.raises(UnsupportedError, match="Bert"):
        engine_of(family="bert")
    model = tiny("llama")
    gs.attach(model, adapters["a1"])
    with pytest.raises(StateError, match="default"):
        Engine((model, tiny_tokenizer()))
    for wrong in ({"max_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"stop": ("",)}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Sampling(**wrong)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "mixtral", "opt"])
def test_models_of_other_families_answer_each_row_as_alone(family: str) -> None:
    """Through transformers' own forward, with prompts in pieces and rows that come and go."""
    model = tiny(family)
    made = {}
    for seed, name in enumerate("ab"):
        made[name] = trained(
            model, gs.LoRA(r=2, target_modules="all-linear" if family != "mixtral" else ("q_proj",)), seed=seed
        )
        gs.detach(model)
    names = ["a", None, "b", "a", "b"]
    prompts = [tuple(range(5, 9 + 3 * row)) for row in range(len(names))]
    sampling = Sampling(max_tokens=4, ignore_eos=True)
    with Engine((model, tiny_tokenizer()), made, limits=Limits(rows=3, tokens=8)) as engine:
        sequences = [
            engine.submit(Sequence(prompt, {name: 1.0} if name else {}, sampling))
            for prompt, name in zip(prompts, names, strict=True)
        ]
        while engine.busy:
            engine.step()
    for prompt, name, sequence in zip(prompts, names, sequences, strict=True):
        if name:
            gs.attach(model, made[name])
        ids = [*prompt]
        with torch.no_grad():
            for _ in range(4):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1, :TOKENS].argmax()))
        if name:
            gs.detach(model)
        assert sequence.drawn == ids[len(prompt) :]


def test_reading_adapters_computes_with_one_core_and_leaves_the_others_theirs() -> None:
    """A second OpenMP team would make every product of a step wait for its workers to wake."""
    before = torch.get_num_threads()
    with engine_of() as engine:
        assert engine.store.reader.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == before
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == before
