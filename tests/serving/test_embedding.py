"""Vectors: each text what it would be alone with its adapter attached, pooled as the model's own files say."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import gossamer as gs
from gossamer.adapter import Adapter
from gossamer.errors import BaseFileError, GossamerError, NonFiniteError, StateError, UnsupportedError, UsageError
from gossamer.models import tiny, tiny_tokenizer, write_model_folder
from gossamer.serving.embedding import Bounds, Embedder
from tests.adapters import trained

FAMILIES = ("bert_mlm", "roberta", "deberta_v2", "llama", "gpt2", "bloom", "opt")


def encoder(family: str = "bert_mlm", **fields: Any) -> Any:
    return tiny(family, **fields)


def adapter(family: str, seed: int, spec: Any = None) -> Adapter:
    model = encoder(family)
    gs.attach(model, spec or gs.LoRA(r=1 + seed))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in gs.trainable_parameters(model, "default").values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return gs.capture(model)


def alone(family: str, ids: list[int], made: Adapter | None, pooling: str = "mean") -> Tensor:
    """One text through the plain model, pooled in plain words."""
    model = encoder(family)
    if made:
        gs.attach(model, made)
    with torch.no_grad():
        states = model.base_model(torch.tensor([ids])).last_hidden_state[0]
    ways = {"mean": states.mean(0), "cls": states[0], "last": states[-1], "max": states.max(0).values}
    return ways[pooling] / ways[pooling].norm()


def texts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(2, 250) for _ in range(draw.randint(1, 20))] for _ in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_as_alone_with_its_adapter(family: str) -> None:
    made = {"a": adapter(family, 1), "b.2": adapter(family, 2)}
    embedder = Embedder((encoder(family), tiny_tokenizer()), made, bounds=Bounds(rows=4))
    given, each = texts(11), [(None, "a", "b.2")[one % 3] for one in range(11)]
    found = embedder.embed(given, each)
    known = torch.stack([alone(family, ids, made.get(name or "")) for ids, name in zip(given, each, strict=True)])
    torch.testing.assert_close(found.vectors, known, rtol=1e-4, atol=1e-5)
    assert found.tokens == tuple(map(len, given))
    assert found.digests == {name: one.digest for name, one in made.items()}
    one = embedder.embed(given[1:2], "a")
    torch.testing.assert_close(one.vectors, known[1:2], rtol=1e-4, atol=1e-5)
    assert one.digests == {"a": made["a"].digest}
    assert not torch.allclose(embedder.embed(given[1:2]).vectors, known[1:2], atol=1e-2)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
def test_ways_of_pooling(pooling: Any) -> None:
    embedder = Embedder((encoder(), tiny_tokenizer()), pooling=pooling)
    given = texts(5, 1)
    known = torch.stack([alone("bert_mlm", ids, None, pooling) for ids in given])
    torch.testing.assert_close(embedder.embed(given).vectors, known, rtol=1e-4, atol=1e-5)


def test_texts_are_tokenized_and_cut_to_dimensions() -> None:
    embedder = Embedder((encoder(), tiny_tokenizer()))
    words, ids = embedder.embed(["some words"]), embedder.embed([tiny_tokenizer()("some words")["input_ids"]])
    assert torch.equal(words.vectors, ids.vectors)
    short = embedder.embed(["some words"], dimensions=8).vectors
    torch.testing.assert_close(short, torch.nn.functional.normalize(words.vectors[:, :8], dim=1))


# The model's own files -----------------------------------------------------------------------------------------


def folder(
    path: Path, pooling: dict[str, Any], *, normalise: bool = True, template: str | None = None, **files: Any
) -> Path:
    """An encoder with sentence-transformers' files."""
    config = transformers.BertConfig(
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    write_model_folder(transformers.BertModel(config).eval(), tokenizer, path)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalise else [])]
    listed = [{"idx": number, "name": str(number), "path": where, "type": f"sentence_transformers.models.{kind}"}
              for number, (where, kind) in enumerate(kinds)]  # fmt: skip
    (path / "modules.json").write_text(json.dumps(listed))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_the_model_says_how_to_pool(tmp_path: Path) -> None:
    cls = folder(tmp_path / "cls", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, normalise=False)
    embedder = Embedder(str(cls))
    model, _ = gs.load_base(str(cls))
    with torch.no_grad():
        states = model(torch.tensor([[5, 6, 7]])).last_hidden_state[0]
    torch.testing.assert_close(embedder.embed([[5, 6, 7]]).vectors[0], states[0], rtol=1e-4, atol=1e-5)
    mean = Embedder(str(cls), pooling="mean", normalise=True).embed([[5, 6, 7]]).vectors[0]
    torch.testing.assert_close(mean, torch.nn.functional.normalize(states.mean(0), dim=0), rtol=1e-4, atol=1e-5)


def test_length_and_prompt_of_the_files(tmp_path: Path) -> None:
    about = {"prompts": {"query": "q: "}, "default_prompt_name": "query"}
    made = folder(
        tmp_path / "m",
        {"pooling_mode": "mean"},
        sentence_bert_config={"max_seq_length": 12, "do_lower_case": False},
        config_sentence_transformers=about,
    )
    embedder = Embedder(str(made))
    assert torch.equal(
        embedder.embed(["abc"]).vectors, embedder.embed([tiny_tokenizer()("q: abc")["input_ids"]]).vectors
    )
    with pytest.raises(UsageError, match="13 tokens"):
        embedder.embed(["x" * 10])


@pytest.mark.parametrize(
    ("pooling", "files", "error"),
    [
        ({"pooling_mode_weightedmean_tokens": True}, {}, UnsupportedError),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, {}, UnsupportedError),
        ({"pooling_mode": "mean"}, {"sentence_bert_config": {"do_lower_case": True}}, UnsupportedError),
        ({"pooling_mode": "mean"}, {"sentence_bert_config": {"max_seq_length": "long"}}, BaseFileError),
        ({"pooling_mode": "mean"}, {"sentence_bert_config": [1]}, BaseFileError),
        ({"pooling_mode": "mean"}, {"config_sentence_transformers": {"default_prompt_name": "no"}}, BaseFileError),
        ({"pooling_mode": "mean"}, {"modules": [{"type": "a.Transformer", "path": ""}, {"type": "Dense"}]},
         UnsupportedError),
        ({"pooling_mode": "mean"}, {"modules": [{"type": "T.Transformer", "path": ""},
                                                {"type": "P.Pooling", "path": "../../etc"}]}, BaseFileError),
        ({"pooling_mode": "mean"}, {"modules": {}}, BaseFileError),
    ],
)  # fmt: skip
def test_files_that_say_something_else(tmp_path: Path, pooling: Any, files: Any, error: Any) -> None:
    with pytest.raises(error):
        Embedder(str(folder(tmp_path / "m", pooling, **files)))


# Adapters that come and go, and what is refused ----------------------------------------------------------------


def test_a_name_means_another_adapter_from_now_on(tmp_path: Path) -> None:
    first, second = adapter("bert_mlm", 1), adapter("bert_mlm", 2)
    second.save(tmp_path / "it")
    model = encoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    embedder = Embedder((model, tiny_tokenizer()), {"it": first})
    embedder.register("it", tmp_path / "it")
    found = embedder.embed([[5, 6, 7]], "it")
    torch.testing.assert_close(found.vectors[0], alone("bert_mlm", [5, 6, 7], second), rtol=1e-4, atol=1e-5)
    assert found.digests == {"it": second.digest}
    with pytest.raises(GossamerError):
        embedder.register("it", adapter("llama", 1))
    assert embedder.embed([[5, 6, 7]], "it").digests == {"it": second.digest}
    assert embedder.names() == ["it"]
    embedder.close()
    assert gs.attached(model) == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_folder_of_adapters(tmp_path: Path) -> None:
    made = adapter("bert_mlm", 1)
    made.save(tmp_path / "one")
    (tmp_path / "other").mkdir()
    assert Embedder((encoder(), tiny_tokenizer()), tmp_path).digests == {"one": made.digest}


def test_what_changes_no_vector_is_refused() -> None:
    prompt = trained(tiny("llama"), gs.PromptTuning(num_virtual_tokens=2))
    head = trained(tiny("llama"), gs.LoRA(r=1, target_modules=("lm_head",)))
    model = tiny("llama")
    embedder = Embedder((model, tiny_tokenizer()), {"fine": adapter("llama", 1)})
    for made in (prompt, head):
        with pytest.raises(UnsupportedError):
            embedder.register("other", made)
    assert embedder.names() == ["fine"]
    assert len(gs.attached(model)) == 1


@pytest.mark.parametrize(
    ("given", "adapters", "options"),
    [
        ([], None, {}),
        ([[]], None, {}),
        ([""], None, {}),
        ([[320]], None, {}),
        ([[-1]], None, {}),
        ([["a"]], None, {}),
        ([[5] * 513], None, {}),
        ([[5]] * 9, None, {}),
        ([[5] * 300] * 4, None, {}),
        ([[5]], "nobody", {}),
        ([[5]], ["a", "b"], {}),
        ([[5]], None, {"dimensions": 0}),
        ([[5]], None, {"dimensions": 65}),
    ],
)
def test_bounds(given: Any, adapters: Any, options: Any) -> None:
    embedder = Embedder((encoder(), tiny_tokenizer()), bounds=Bounds(texts=8, tokens=1000))
    with pytest.raises(UsageError):
        embedder.embed(given, adapters, **options)


def test_positions_of_roberta() -> None:
    model = tiny("roberta")
    embedder = Embedder((model, tiny_tokenizer()))
    assert embedder.longest == 512 - model.config.pad_token_id - 1 or embedder.longest < 512
    embedder.embed([[5] * embedder.longest])


def test_models_that_give_no_vectors() -> None:
    for family in ("t5", "clip", "vit"):
        with pytest.raises(UnsupportedError):
            Embedder((tiny(family), tiny_tokenizer()))
    model = encoder()
    gs.attach(model, gs.LoRA(r=1))
    with pytest.raises(StateError):
        Embedder((model, tiny_tokenizer()))


def test_numbers_that_are_none() -> None:
    model = encoder()
    with torch.no_grad():
        model.base_model.encoder.layer[0].output.dense.bias[0] = torch.nan
    with pytest.raises(NonFiniteError):
        Embedder((model, tiny_tokenizer())).embed([[5]])


def test_texts_that_sentence_transformers_would_render_are_refused(tmp_path: Path) -> None:
    pooling, template = {"pooling_mode_mean_tokens": True}, "{{ messages[0].content }}"
    plain = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    with pytest.raises(UnsupportedError, match="chat template"):
        Embedder(str(folder(tmp_path / "old", pooling, template=template)))
    said = {
        "modality_config": plain,
        "transformer_task": "feature-extraction",
        "module_output_name": "token_embeddings",
    }
    Embedder(str(folder(tmp_path / "plain", pooling, template=template, sentence_bert_config=said)))
    cases = ({"modality_config": plain | {"message": plain["text"]}}, {"query_expansion": {"a": 1}})
    for number, more in enumerate(cases):
        with pytest.raises(UnsupportedError, match="setting of sentence-transformers"):
            Embedder(str(folder(tmp_path / str(number), pooling, sentence_bert_config=more)))
