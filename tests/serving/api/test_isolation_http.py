"""Over a socket, while adapters are loaded, replaced and unloaded: every token is what the named digest says, alone."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

import gossamer as gs
from gossamer.adapter import Adapter
from gossamer.models import tiny, tiny_tokenizer
from gossamer.serving import Engine, Limits, Sampling, Sequence
from gossamer.serving.api.app import create_app
from gossamer.serving.detokenizer import Spelling
from gossamer.serving.sequence import Reply
from tests.adapters import trained
from tests.serving.api.conftest import until

Digests = Mapping[str, str]
Meanings = list[str | None]
"""Digests that a name meant, one after the other; None where it meant nothing."""

PROMPTS = [list(range(1 + one, 20 + 3 * one)) for one in range(4)] + [[9], [5, 6, 7], list(range(1, 60))]
SAMPLINGS: list[dict[str, Any]] = [
    {"max_tokens": 6, "temperature": 0},
    {"max_tokens": 4, "temperature": 1.0, "seed": 1},
    {"max_tokens": 9, "temperature": 0.7, "top_p": 0.9, "seed": 2},
]
SUM = gs.LoRA(r=4)
SPECS = (SUM, gs.LoRA(r=2, target_modules=["q_proj", "v_proj"]), gs.DoRA(r=2), gs.IA3(), gs.BitFit())
NAMES = [f"a{number}" for number in range(6)]
MIXED = ["m0", "m1", "m2"]
"""Names that always mean sums, which alone can be mixed."""
CLIENTS = 12


@dataclass
class World:
    """Adapters by the folder they lie in, and what each name meant so far."""

    root: Path
    values: dict[str, Adapter]
    meanings: dict[str, Meanings] = field(default_factory=dict)
    settled: dict[str, int] = field(default_factory=dict)

    @property
    def sums(self) -> list[str]:
        """Folders of adapters that can be mixed."""
        return [name for name, value in self.values.items() if type(value.spec) is gs.LoRA]

    def begin(self, name: str, digest: str | None) -> None:
        """From now on a name may mean this."""
        self.meanings.setdefault(name, [None]).append(digest)

    def end(self, name: str) -> None:
        """From now on it means nothing older than the last that it was given."""
        self.settled[name] = len(self.meanings[name]) - 1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    base, root = tiny("qwen2"), tmp_path_factory.mktemp("adapters")
    values = {}
    for number in range(12):
        values[f"v{number}"] = trained(base, SPECS[number % len(SPECS)], seed=number)
        gs.detach(base)
        values[f"v{number}"].save(root / f"v{number}")
    broken = root / "broken"
    values["v0"].save(broken)
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    return World(root, values)


class Alone:
    """What a prompt gives when nobody else is there and nothing was ever replaced."""

    def __init__(self, values: Mapping[str, Adapter]) -> None:
        known = {value.digest: value for value in values.values()}
        self.engine = Engine((tiny("qwen2"), tiny_tokenizer()), known, limits=Limits(rows=1), prefixes=0)
        self.known: dict[Any, Reply] = {}

    def __call__(self, prompt: list[int], sampling: Mapping[str, Any], number: int, made_by: list[Any]) -> Reply:
        mix: dict[str, float] = {}
        for one in made_by:  # two names may mean one adapter
            mix[one["digest"]] = mix.get(one["digest"], 0.0) + one["scale"]
        given = dict(sampling) | ({"seed": sampling["seed"] + number} if "seed" in sampling else {})
        key = tuple(prompt), *given.items(), *mix.items()
        if key not in self.known:
            sequence = self.engine.submit(Sequence(tuple(prompt), mix, Sampling(ignore_eos=True, **given)))
            while not sequence.done:
                self.engine.step()
            assert sequence.reply
            self.known[key] = sequence.reply
        return self.known[key]


@dataclass
class Heard:
    """What a client got of one sequence."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    made_by: list[Any] = field(default_factory=list)
    finish: str | None = None

    def add(self, choice: Mapping[str, Any]) -> None:
        """Take a choice, or a piece of one."""
        self.texts += choice["logprobs"]["tokens"]
        self.logprobs += choice["logprobs"]["token_logprobs"]
        self.finish = choice["finish_reason"]


class Clients:
    """Ask at random, and hold every answer against the solo run of the digests that it names."""

    def __init__(self, address: str, world: World, requests: int) -> None:
        self.address, self.world, self.requests = address, world, requests
        self.chance, self.alone, self.tokenizer = random.Random(0), Alone(world.values), tiny_tokenizer()
        self.asked = 0
        self.counts: dict[str, int] = dict.fromkeys(
            ("whole", "stream", "left", "missing", "base", "mix", "loads", "refused"), 0
        )

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=CLIENTS + 1)
        async with httpx.AsyncClient(base_url=self.address, timeout=60, limits=limits) as client:
            for name in MIXED:
                await self.load(client, name, self.world.sums[0])
            async with asyncio.TaskGroup() as group:
                asking = [group.create_task(self.ask(client)) for _ in range(CLIENTS)]
                group.create_task(self.change(client, asking))

    # Names -----------------------------------------------------------------------------------------------------

    async def change(self, client: httpx.AsyncClient, asking: list[asyncio.Task[None]]) -> None:
        """Load, replace and unload, one after the other, as long as anybody asks."""
        while not all(task.done() for task in asking):
            name = self.chance.choice(NAMES + MIXED)
            if name in NAMES and self.chance.random() < 0.3:
                await self.unload(client, name)
            elif self.chance.random() < 0.1:
                body = {"lora_name": name, "lora_path": "broken", "load_inplace": True}
                assert (await client.post("/v1/load_lora_adapter", json=body)).status_code == 400
                self.counts["refused"] += 1  # and the name means what it meant
            else:
                await self.load(
                    client, name, self.chance.choice(self.world.sums if name in MIXED else [*self.world.values])
                )
            await asyncio.sleep(self.chance.random() * 0.02)

    async def load(self, client: httpx.AsyncClient, name: str, folder: str) -> None:
        digest = self.world.values[folder].digest
        self.world.begin(name, digest)
        body = {"lora_name": name, "lora_path": folder, "load_inplace": True}
        answer = await client.post("/v1/load_lora_adapter", json=body)
        assert answer.json()["digest"] == digest
        self.world.end(name)
        self.counts["loads"] += 1

    async def unload(self, client: httpx.AsyncClient, name: str) -> None:
        there = self.world.meanings.get(name, [None])[-1] is not None
        self.world.begin(name, None)
        answer = await client.post("/v1/unload_lora_adapter", json={"lora_name": name})
        assert answer.status_code == (200 if there else 404)
        self.world.end(name)

    # Requests --------------------------------------------------------------------------------------------------

    async def ask(self, client: httpx.AsyncClient) -> None:
        """One request after the other, until all were asked."""
        while self.asked < self.requests:
            self.asked += 1
            body, names = self.body()
            since = {name: self.world.settled.get(name, 0) for name in names}
            if self.chance.random() < 0.5:
                await self.whole(client, body, since)
            else:
                await self.stream(client, body, since)

    def body(self) -> tuple[dict[str, Any], list[str]]:
        chance = self.chance
        body = {"prompt": chance.choice(PROMPTS), "ignore_eos": True, "logprobs": 0} | chance.choice(SAMPLINGS)
        body["n"] = chance.choice([1, 1, 1, 3])
        kind = chance.choice(["base", "one", "one", "one", "mix"])
        names = {"base": [], "one": [chance.choice(NAMES)], "mix": chance.sample(MIXED, 2)}[kind]
        mix = [{"id": name, "scale": chance.choice([1.0, 0.5])} for name in names]
        chosen = {"model": names[0]} if kind == "one" else {"model": "toy"} | ({"lora": mix} if mix else {})
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return body | chosen, names

    async def whole(self, client: httpx.AsyncClient, body: Mapping[str, Any], since: Mapping[str, int]) -> None:
        patience = 0.02 if self.chance.random() < 0.1 else 60
        try:
            answer = await client.post("/v1/completions", json=body, timeout=patience)
        except httpx.TimeoutException:  # leaves before there is anything
            self.counts["left"] += 1
            return
        if not self.served(answer, since):
            return
        told = answer.json()
        heard = [Heard(made_by=told["gossamer"]["adapters"]) for _ in told["choices"]]
        for choice in told["choices"]:
            heard[choice["index"]].add(choice)
        self.counts["whole"] += 1
        self.check(body, heard, since, answer.headers["x-gossamer-adapter"])

    async def stream(self, client: httpx.AsyncClient, body: Mapping[str, Any], since: Mapping[str, int]) -> None:
        heard = [Heard() for _ in range(body["n"])]
        pieces = self.chance.choice([1, 2, 5, 1000, 1000, 1000, 1000])
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                await answer.aread()
            if not self.served(answer, since):
                return
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    [choice] = event["choices"]
                    heard[choice["index"]].add(choice)
                    heard[choice["index"]].made_by = (
                        event.get("gossamer", {}).get("adapters") or heard[choice["index"]].made_by
                    )
                    pieces -= 1
                if not pieces:  # leaves in the middle
                    break
        self.counts["left" if not pieces else "stream"] += 1
        self.check(body, heard, since, answer.headers["x-gossamer-adapter"], bool(pieces))

    # Answers ---------------------------------------------------------------------------------------------------

    def served(self, answer: httpx.Response, since: Mapping[str, int]) -> bool:
        """Whether there is an answer; there is none only for a name that meant nothing meanwhile."""
        if answer.status_code == 404:
            assert any(None in self.meant(name, start) for name, start in since.items())
            self.counts["missing"] += 1
            return False
        assert answer.status_code == 200, answer.text
        return True

    def meant(self, name: str, start: int) -> Meanings:
        """All that a name meant from a time on."""
        return self.world.meanings.get(name, [None])[start:]

    def spelled(self, tokens: list[int]) -> list[str]:
        """The texts of an answer's tokens, of which the first bytes of a character have none."""
        spelling = Spelling(self.tokenizer)
        told = [spelling.add(token)[0] for token in tokens]
        spelling.end(told[-1])
        return [one.text for one in told]

    def check(
        self,
        body: Mapping[str, Any],
        heard: list[Heard],
        since: Mapping[str, int],
        header: str,
        all_of_it: bool = True,
    ) -> None:
        sampling = {name: body[name] for name in ("max_tokens", "temperature", "top_p", "seed") if name in body}
        for number, one in enumerate(heard):
            if not (one.texts or all_of_it):
                continue  # he left before there was anything of it
            assert header == (", ".join(f"{part['id']}=sha256:{part['digest']}" for part in one.made_by) or "none")
            assert [part["id"] for part in one.made_by] == [*since]
            for part in one.made_by:  # neither a stale one nor one that was never there
                assert part["digest"] in self.meant(part["id"], since[part["id"]])
            alone = self.alone(body["prompt"], sampling, number, one.made_by)
            expected = self.spelled(alone.tokens)
            assert one.texts == expected[: len(one.texts)]
            assert one.logprobs == pytest.approx(alone.logprobs[: len(one.logprobs)], abs=1e-3)
            if all_of_it:
                assert len(one.texts) == len(expected)
                assert one.finish == "length"


def server(world: World, listening: Callable[[Any], str]) -> tuple[str, Any]:
    limits = Limits(rows=12, tokens=40)
    engine = Engine((tiny("qwen2"), tiny_tokenizer()), None, limits=limits, memory=20_000)
    app = create_app(engine, name="toy", folder=world.root)
    return listening(app), app


def isolated(world: World, listening: Callable[[Any], str], requests: int) -> dict[str, int]:
    """Ask so many, then look whether anything was left behind."""
    world.meanings.clear()
    world.settled.clear()
    address, app = server(world, listening)
    clients = Clients(address, world, requests)
    asyncio.run(clients.run())
    service = app.state.service
    engine = service.worker.engine
    until(lambda: not service.answering and not engine.busy)
    assert all(not version.holders for version in engine.store.versions.values())
    assert all(version in engine.store.versions.values() for version in engine.store.resident)
    assert not service.worker.watched
    counts = clients.counts
    assert counts["whole"] + counts["stream"] + counts["left"] + counts["missing"] == requests
    return counts


def test_two_hundred_requests(world: World, listening: Callable[[Any], str]) -> None:
    counts = isolated(world, listening, 200)
    assert all(counts[kind] >= 5 for kind in ("whole", "stream", "left", "missing", "base", "mix", "loads")), counts


@pytest.mark.slow
def test_two_thousand_requests(world: World, listening: Callable[[Any], str]) -> None:
    counts = isolated(world, listening, 2000)
    assert all(counts[kind] >= 50 for kind in ("whole", "stream", "left", "missing", "base", "mix", "loads")), counts


def test_the_base_answers_as_without_adapters_to_the_bit(world: World, listening: Callable[[Any], str]) -> None:
    """Also while the server has adapters in memory and other requests have gone before; one by one, as the numbers of
    a batch depend on its shape."""
    address, _ = server(world, listening)
    plain = listening(create_app(Engine((tiny("qwen2"), tiny_tokenizer())), name="toy"))

    def answers(where: str, between: Iterator[str | None]) -> list[Any]:
        found = []
        with httpx.Client(base_url=where, timeout=60) as client:
            for prompt in PROMPTS:
                for sampling in SAMPLINGS:
                    if (name := next(between)) is not None:
                        body = {"lora_name": "a", "lora_path": name, "load_inplace": True}
                        assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
                        body = {"model": "a", "prompt": prompt} | sampling
                        assert client.post("/v1/completions", json=body).status_code == 200
                    body = {"model": "toy", "prompt": prompt, "logprobs": 3, "ignore_eos": True} | sampling
                    found.append(client.post("/v1/completions", json=body).json()["choices"])
        return found

    names = [f"v{number % 12}" for number in range(len(PROMPTS) * len(SAMPLINGS))]
    assert answers(address, iter(names)) == answers(plain, iter([None] * len(names)))
