"""The verb `gossamer convert`."""

from pathlib import Path
from typing import Any

import click

from gossamer.cli.shared import emit, json_option
from gossamer.pages.sizes import amount


@click.command("convert")
@click.argument("source", metavar="IN")
@click.argument("output", metavar="OUT")
@click.option("--to", "target", required=True, metavar="F", help="peft, gguf, kohya, diffusers, mlx or torchtune.")
@click.option("--from", "origin", metavar="F", help="The source's format, where its names do not tell it.")
@click.option("--base", metavar="DIR", help="The base's folder, where a format needs its heads or module names.")
@click.option("--type", "dtype", default="auto", show_default=True, help="Of a model's matrices: f32, f16 or bf16.")
@click.option("--modelfile", metavar="FILE", help="Also write an Ollama Modelfile for a model or its adapter.")
@json_option
def command(
    source: str,
    output: str,
    target: str,
    origin: str | None,
    base: str | None,
    dtype: str,
    modelfile: str | None,
    as_json: bool,
) -> None:
    """Translate an adapter from and to other tools' formats, or a model folder to GGUF; say what was lost."""
    from gossamer.errors import StateError, UsageError

    for path in (output, modelfile):
        if path and Path(path).exists():
            raise StateError("the output exists already", where=path, hint="choose another name")
    if modelfile and target != "gguf":
        raise UsageError("Ollama reads GGUF files", got=f"--to {target}", expected="--to gguf")
    whole = (Path(source) / "config.json").is_file() and not (Path(source) / "adapter_config.json").is_file()
    done = _model(source, output, target, dtype) if whole else _adapter(source, output, target, origin, base)
    if modelfile:
        _write_modelfile(Path(modelfile), output, whole, source if whole else base)
        done["modelfile"] = modelfile
    if as_json:
        emit(done)
        return
    click.echo("\n".join(_told(done)))


def _model(source: str, output: str, target: str, dtype: str) -> dict[str, Any]:
    from gossamer.errors import UnsupportedError
    from gossamer.models.gguf import write_gguf

    if target != "gguf":
        raise UnsupportedError("a whole model is written as GGUF alone", got=f"--to {target}", expected="--to gguf")
    return write_gguf(source, output, dtype=dtype)


def _adapter(source: str, output: str, target: str, origin: str | None, base: str | None) -> dict[str, Any]:
    from gossamer.adapter import Adapter
    from gossamer.files.foreign import Written, read_foreign, write_foreign
    from gossamer.merging.companions import hand_on, held
    from gossamer.training import adapter_of

    here, inside = Path(source, "adapter_model.safetensors"), Path(source, "adapter", "adapter_model.safetensors")
    ours = origin == "peft" or (origin is None and (here.is_file() or inside.is_file()))
    folders = [adapter_of(source)] if ours else []
    adapter = Adapter.load(folders[0]) if folders else read_foreign(source, origin, base)
    if target == "peft":
        adapter.save(output)
        hand_on(folders, Path(output))
        done, beside = Written(Path(output), Adapter.load(output) == adapter, 0.0, ()), []
    else:
        done = write_foreign(adapter, output, target, base)
        beside = [f"{name}, which lies beside the adapter" for folder in folders for name in held(folder)]
    found = {"output": output, "modules": len(adapter.tensors), "exact": done.exact}
    return found | {"error": done.error, "lost": [*done.lost, *beside]}


def _write_modelfile(path: Path, output: str, whole: bool, folder: str | None) -> None:
    """FROM and ADAPTER, with paths as the Modelfile's own folder sees them."""
    from os.path import relpath

    from gossamer.errors import UsageError
    from gossamer.files.atomic import write_text
    from gossamer.models.gguf import modelfile, stop_of

    if folder is None:
        raise UsageError("a Modelfile names the model that the adapter is for", hint="--base")
    here = path.parent
    if whole:
        write_text(path, modelfile(relpath(output, here), stop=stop_of(folder)))
    else:
        write_text(path, modelfile(relpath(folder, here), relpath(output, here)))


def _told(done: dict[str, Any]) -> list[str]:
    if "tensors" in done:
        lines = [f"{done['output']}: {done['tensors']} tensors in {done['dtype']}, {amount(done['bytes'])}"]
        lines.append(f"architecture {done['architecture']}, tokenizer {done['tokenizer']}; read back and compared")
    else:
        exact = "bit for bit" if done["exact"] else "not bit for bit"
        lines = [f"{done['output']}: {done['modules']} modules, {exact}"]
        if not done["exact"]:
            lines.append(f"read back, a module's change differs by at most {done['error']:.2g} of itself")
        lines += [f"not kept: {one}" for one in done["lost"]]
    return lines + ([f"{done['modelfile']}: for `ollama create`"] if "modelfile" in done else [])
