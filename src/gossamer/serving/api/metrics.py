"""What Prometheus may ask. Labels come from fixed sets: adapters that are known, and at most so many of them."""

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

MOST_ADAPTERS = 256
"""That have numbers of their own; the others share one."""

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
GAUGES = {
    "requests_running": "Sequences that have a row.",
    "requests_waiting": "Sequences that wait for one.",
    "lora_registered": "Adapters that are known.",
    "lora_in_memory": "Adapters that are in memory.",
    "lora_in_use": "Adapters that somebody holds.",
    "lora_bytes": "Bytes of adapters in memory.",
    "lora_loads": "How often adapters were read since the start.",
}


class Metrics:
    """One server's numbers, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.labelled: set[str] = set()
        self.requests = Counter("gossamer_requests", "Answers by status.", ["route", "status"], registry=registry)
        self.tokens = Counter("gossamer_tokens", "Tokens read and drawn.", ["kind"], registry=registry)
        self.reused = Counter("gossamer_prompt_tokens_reused", "Not read again.", registry=registry)
        self.cancelled = Counter("gossamer_requests_cancelled", "Whose client left.", registry=registry)
        self.adapter = Counter("gossamer_lora_requests", "Sequences.", ["adapter"], registry=registry)
        first, between = "gossamer_time_to_first_token_seconds", "gossamer_inter_token_seconds"
        self.first = Histogram(first, "From the request on.", buckets=FIRST, registry=registry)
        self.between = Histogram(between, "From one token to the next.", buckets=BETWEEN, registry=registry)
        self.gauges = {name: Gauge(f"gossamer_{name}", about, registry=registry) for name, about in GAUGES.items()}

    def count_sequences(self, adapters: Iterable[str], sequences: int) -> None:
        """Count sequences by adapter. The names must be known ones."""
        for name in adapters:
            if name in self.labelled or len(self.labelled) < MOST_ADAPTERS:
                self.labelled.add(name)
            else:
                name = "(others)"
            self.adapter.labels(name).inc(sequences)

    def answered(self, route: str, status: int) -> None:
        """Count an answer. The route is its pattern, not its path."""
        self.requests.labels(route, str(status)).inc()

    def write(self, running: int, waiting: int, described: Iterable[Mapping[str, Any]] | None) -> bytes:
        """Prometheus' text form, with the gauges of sequences, and of what the store tells of each adapter."""
        values: dict[str, float] = {"requests_running": running, "requests_waiting": waiting}
        if described is not None:
            every = [*described]
            there = [one for one in every if one["state"] != "disk"]
            values["lora_registered"], values["lora_in_memory"] = len(every), len(there)
            values["lora_in_use"] = sum(one["state"] == "in use" for one in there)
            values["lora_bytes"] = sum(one["size"] or 0 for one in there)
            values["lora_loads"] = sum(one["loads"] for one in every)
        for name, value in values.items():
            self.gauges[name].set(value)
        return generate_latest(self.registry)
