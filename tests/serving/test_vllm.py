"""What vLLM takes of our adapters and how it is started; and, where there is one, that it says what we say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner

import gossamer as gs
from bench.peers.vllm_server import vllm_server
from gossamer.cli import serve
from gossamer.errors import UnsupportedError, UsageError
from gossamer.models import tiny
from gossamer.models.locate import locate
from gossamer.serving import vllm
from tests.adapters import trained

FITS: dict[str, Any] = {
    "plain": gs.LoRA(r=4),
    "qv": gs.LoRA(r=6, target_modules=("q_proj", "v_proj"), scaling="rslora"),
    "ranks": gs.LoRA(r=4, rank_pattern={"v_proj": 9}),
}
NOT: dict[str, tuple[Any, str, str]] = {
    "dora": (gs.DoRA(r=2), "this is dora", "gossamer merge"),
    "ia3": (gs.IA3(), "this is ia3", "gossamer merge"),
    "biased": (gs.LoRA(r=2, bias="all"), "trained biases", "gossamer merge"),
    "pissa": (gs.LoRA(r=2, start="pissa"), "changes the base", "gossamer merge"),
    "norms": (gs.LoRA(r=2, modules_to_save=("norm",)), "whole modules", "gossamer merge"),
    "wide": (gs.LoRA(r=600, target_modules=("q_proj",)), "its rank is 600", "gossamer resize"),
}


def saved(folder: Path, name: str, spec: Any) -> Path:
    return trained(tiny("qwen2"), spec).save(folder / name)


@pytest.mark.parametrize("name", FITS)
def test_what_fits(name: str, tmp_path: Path) -> None:
    verdict = vllm.check(saved(tmp_path, name, FITS[name]))
    assert (verdict.name, verdict.reason) == (name, "")
    assert verdict.rank == {"plain": 4, "qv": 6, "ranks": 9}[name]
    assert ("q_proj" in verdict.modules, "lm_head" in verdict.modules) == (True, False)


@pytest.mark.parametrize("name", NOT)
def test_what_does_not_says_why_and_what_would(name: str, tmp_path: Path) -> None:
    spec, reason, remedy = NOT[name]
    verdict = vllm.check(saved(tmp_path, name, spec))
    assert reason in verdict.reason
    assert remedy in verdict.remedy


def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    path = saved(tmp_path, "bad", FITS["plain"])
    (path / "adapter_model.safetensors").write_bytes(b"no")
    assert "cannot be read" in vllm.check(path).reason


def test_the_command_names_those_that_fit(tmp_path: Path) -> None:
    for name, spec in FITS.items():
        saved(tmp_path, name, spec)
    saved(tmp_path, "dora", NOT["dora"][0])
    verdicts = [vllm.check(one) for one in sorted(tmp_path.iterdir())]
    launch = vllm.command(Path("/models/base"), verdicts, cuda=False, python="/env/bin/python")
    words = [*launch.arguments]
    assert words[words.index("--max-loras") + 1] == "3"
    assert words[words.index("--max-lora-rank") + 1] == "16"  # the least of vLLM's that holds 9
    assert f"qv={tmp_path / 'qv'}" in words
    assert not any(word.startswith("dora=") for word in words)
    assert launch.environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "--model /models/base" in str(launch)
    bare = vllm.command(Path("/models/base"), [], cuda=True)
    assert "--enable-lora" not in bare.arguments
    assert not any(name.startswith("VLLM_CPU") for name in bare.environment)


def test_a_dry_run_says_and_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(vllm.ENVIRONMENT, raising=False)
    saved(tmp_path / "adapters", "plain", FITS["plain"])
    saved(tmp_path / "adapters", "dora", NOT["dora"][0])
    tiny("qwen2").save_pretrained(tmp_path / "base")
    said: list[str] = []
    asked: Any = (str(tmp_path / "base"), tmp_path / "adapters", "127.0.0.1", 8000)
    vllm.serve(*asked, dry_run=True, say=said.append)
    assert said[0].startswith("dora: vLLM knows LoRA")
    assert "plain: taken" in said
    assert "api_server" in said[-1]
    with pytest.raises(UnsupportedError, match="vLLM is not installed"):
        vllm.serve(*asked, say=said.append)
    with pytest.raises(UsageError, match="--host"):
        vllm.serve(str(tmp_path / "base"), None, "0.0.0.0", 8000, say=said.append)
    monkeypatch.setenv(vllm.ENVIRONMENT, str(tmp_path))
    with pytest.raises(UsageError, match="virtual environment"):
        vllm.interpreter()


def test_every_option_of_serve_is_passed_on_or_refused() -> None:
    options = {str(one.name) for one in serve.command.params}
    assert not serve.FOR_VLLM.keys() & serve.NOT_FOR_VLLM.keys()
    assert options == serve.FOR_VLLM.keys() | serve.NOT_FOR_VLLM.keys(), "say of a new option what vLLM makes of it"
    values = {"waiting": "5", "memory": "5", "drain": "5", "timeout": "5", "prepack": None, "log_json": None}
    for name in sorted(serve.NOT_FOR_VLLM):
        option, value = "--" + name.replace("_", "-"), values.get(name, "x")
        words = ["--base", "b", "--engine", "vllm", option, *([] if value is None else [value])]
        more = ["--embeddings", "x"] if name == "embedding_adapters" else []
        done = CliRunner().invoke(serve.command, [*words, *more])
        assert isinstance(done.exception, UnsupportedError), (name, done.exception)
        assert done.exception.hint in serve.NOT_FOR_VLLM.values()


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_says_what_we_say(tmp_path: Path) -> None:
    """The real model and two adapters, through the same client at both servers."""
    assert os.environ.get(vllm.ENVIRONMENT), "make test-all leaves this out without it"
    model, tokenizer = gs.load_base("smollm2-135m", dtype="fp32")
    for seed, name in enumerate(["one", "two"]):
        adapter = trained(model, gs.LoRA(r=8, target_modules=("q_proj", "v_proj")), seed=seed)
        gs.detach(model)
        adapter.save(tmp_path / name)
    prompts = ["The capital of France is", "def add(a, b):", "Once upon a time"]
    with gs.Engine((model, tokenizer), tmp_path) as engine:
        names = ["one", "two", None] * len(prompts)
        texts = [prompt for prompt in prompts for _ in range(3)]
        ours = [reply.text for reply in engine.generate(texts, names, max_tokens=8)]
    with vllm_server(locate("smollm2-135m"), tmp_path, 8125) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        assert {"base", "one", "two"} <= {one.id for one in client.models.list()}
        theirs = [
            client.completions.create(model=name or "base", prompt=text, max_tokens=8, temperature=0).choices[0].text
            for text, name in zip(texts, names, strict=True)
        ]
    assert len({*ours}) > len(prompts)  # adapters say other things than the base
    assert sum(one == other for one, other in zip(ours, theirs, strict=True)) >= len(ours) - 1
