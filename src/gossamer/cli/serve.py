"""The verb `gossamer serve`."""

import json
import logging
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from gossamer.cli.shared import base_options
from gossamer.errors import UnsupportedError, UsageError


@click.command("serve")
@base_options
@click.option("--adapters", metavar="DIR", type=click.Path(path_type=Path), help="A folder of adapters, or one.")
@click.option("--hub", metavar="OWNER/NAME", multiple=True, help="Ids of the hub that may be fetched: owner/*, ...")
@click.option("--name", help="What clients call the base; by default the last part of --base.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Others than this machine's own need --keys.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--keys", metavar="FILE", type=click.Path(path_type=Path), help="JSON: who may use what.")
@click.option("--engine", type=click.Choice(["embedded", "vllm"]), default="embedded", show_default=True)
@click.option("--rows", type=click.IntRange(1, 1024), default=32, show_default=True, help="Sequences at a time.")
@click.option("--tokens", type=click.IntRange(1), default=512, show_default=True, help="Tokens a step.")
@click.option("--waiting", type=click.IntRange(0), default=1024, show_default=True, help="Sequences that may wait.")
@click.option("--memory", type=click.IntRange(1), default=1024, show_default=True, help="MiB of adapters in memory.")
@click.option("--prepack/--no-prepack", default=None, help="Copy the weights as this CPU reads them best, or not.")
@click.option("--embeddings", metavar="B", help="A second base that answers /v1/embeddings.")
@click.option("--embedding-adapters", metavar="DIR", type=click.Path(path_type=Path), help="Adapters of that base.")
@click.option("--drain", type=click.FloatRange(0), default=30.0, show_default=True, help="Seconds to finish in.")
@click.option("--timeout", type=click.FloatRange(1), default=600.0, show_default=True, help="Seconds a request.")
@click.option("--log-json", is_flag=True, help="Log JSON lines.")
@click.option("--dry-run", is_flag=True, help="With --engine vllm: check the adapters and print the command only.")
@click.pass_context
def command(context: click.Context, **options: Any) -> None:
    """Serve a base and its adapters to OpenAI's clients."""
    name = options["name"] or _called(options["base"])
    if ":" in name:
        raise UsageError("a name without a colon", where="--name", got=name)
    if options["embedding_adapters"] and not options["embeddings"]:
        raise UsageError("--embedding-adapters goes with --embeddings")
    if options["engine"] == "vllm":
        given = {one for one in options if context.get_parameter_source(one) is not ParameterSource.DEFAULT}
        _vllm(name, options, given)
        return
    if options["dry_run"]:
        raise UsageError("--dry-run goes with --engine vllm")
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        hint = 'pip install "gossamer[serve]"'
        raise UnsupportedError("serving needs packages that are not there", got=str(error), hint=hint) from None
    _log(options["log_json"])
    _serve(name, options)


def _serve(name: str, options: dict[str, Any]) -> None:
    from gossamer.serving.api.app import create_app
    from gossamer.serving.api.backends import Vectors
    from gossamer.serving.api.keys import Keyring
    from gossamer.serving.api.limits import HttpLimits
    from gossamer.serving.api.server import bound, check_host, serve
    from gossamer.serving.embedding import Embedder
    from gossamer.serving.engine import Engine
    from gossamer.serving.folder import check_names
    from gossamer.serving.hub import Hub
    from gossamer.serving.scheduler import Limits

    check_host(options["host"], bool(options["keys"]))
    keyring = Keyring.read(options["keys"]) if options["keys"] else Keyring()
    hub = Hub(options["hub"]) if options["hub"] else None
    limits = Limits(rows=options["rows"], tokens=options["tokens"], waiting=options["waiting"])
    loading = {field: options[field] for field in ("quant", "dtype", "device")}
    folder = options["adapters"]

    def engine() -> Engine:
        settings = {"limits": limits, "memory": options["memory"] * 2**20, "prepack": options["prepack"]}
        made = Engine(options["base"], folder, **settings, **loading)
        check_names(name, made.store.names(), vectors and vectors.name)
        click.echo(f"base      {name}")
        if made.decoder.copied:
            click.echo(f"weights   prepacked for this CPU: {made.decoder.copied / 1e6:,.0f} MB beside the base")
        click.echo(f"adapters  {len(made.store.names()):,}" + (f" in {folder}" if folder else ""))
        click.echo(f"keys      {len(keyring.entries) or 'none: this machine only'}")
        host = f"[{options['host']}]" if ":" in options["host"] else options["host"]
        click.echo(f"listening http://{host}:{at.getsockname()[1]}")
        return made

    vectors = None
    if options["embeddings"]:
        base, found = options["embeddings"], options["embedding_adapters"]
        vectors = Vectors(_called(base), lambda: Embedder(base, found, **loading))
    bounds = HttpLimits(answering=options["timeout"])
    app = create_app(engine, name=name, keyring=keyring, folder=folder, bounds=bounds, vectors=vectors, hub=hub)
    with closing(bound(options["host"], options["port"])) as at:  # before anything is loaded
        serve(app, drain=options["drain"], at=at)
    click.echo("stopped")


FOR_VLLM: dict[str, str | None] = {
    "rows": "--max-num-seqs",
    "tokens": "--max-num-batched-tokens",
    "dtype": "--dtype",
    "base": None,
    "adapters": None,
    "name": None,
    "host": None,
    "port": None,
    "engine": None,
    "dry_run": None,
}
"""Options that vLLM is given, and as what; None where `vllm.serve` takes them itself."""
NOT_FOR_VLLM = {
    "quant": "vLLM quantises in ways of its own; give it a base that is stored so",
    "device": "vLLM takes the devices that CUDA_VISIBLE_DEVICES names",
    "hub": "vLLM fetches no adapters; fetch them with gossamer pull",
    "keys": "vLLM knows one key for all, the environment's VLLM_API_KEY, and no tenants",
    "waiting": "vLLM's queue has no bound",
    "memory": "vLLM counts adapters, not bytes: --max-cpu-loras in its command",
    "prepack": "it is the embedded engine's",
    "embeddings": "vLLM serves one base; start a second server for it",
    "embedding_adapters": "vLLM serves one base; start a second server for it",
    "drain": "vLLM has no such option",
    "timeout": "vLLM has no such option",
    "log_json": "vLLM logs in its own way",
}
"""Options that it cannot be given, and why."""


def _vllm(name: str, options: dict[str, Any], given: set[str]) -> None:
    from gossamer.serving import vllm

    for one in sorted(given & NOT_FOR_VLLM.keys()):
        option = "--" + one.replace("_", "-")
        raise UnsupportedError("an option of the embedded engine only", where=option, hint=NOT_FOR_VLLM[one])
    words = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    more: list[str] = []
    for one in sorted(given & FOR_VLLM.keys()):
        if option := FOR_VLLM[one]:
            more += [option, words.get(options[one], str(options[one]))]
    asked = (options["base"], options["adapters"], options["host"], options["port"], options["dry_run"])
    vllm.serve(*asked, name=name, options=more)


def _called(base: str) -> str:
    """What clients call a base: the last part of its id or path."""
    return Path(base).name or Path(base).resolve().name


class _Lines(logging.Formatter):
    """A JSON mapping a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        return json.dumps(fields, ensure_ascii=False)


def _log(as_json: bool) -> None:
    """Log what the server does to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("gossamer.serving")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
