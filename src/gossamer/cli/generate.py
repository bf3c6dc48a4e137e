"""The verb `gossamer generate`."""

from typing import Any

import click

from gossamer.cli.shared import adapter_options, emit, force_option, json_option, load_with_adapter


@click.command("generate")
@adapter_options
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 takes the likeliest token."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--chat", is_flag=True, help="Put each prompt through the tokenizer's chat template.")
@force_option
@json_option
def command(
    prompts: tuple[str, ...], max_tokens: int, temperature: float, seed: int, chat: bool, as_json: bool, **loading: Any
) -> None:
    """Continue prompts with a base, or a base with an adapter."""
    from gossamer.serving import generate

    model, tokenizer, digest, _ = load_with_adapter(**loading)
    results = generate(model, tokenizer, prompts, max_tokens=max_tokens, temperature=temperature, seed=seed, chat=chat)
    if as_json:
        emit([one | {"adapter_digest": digest} for one in results])
    else:
        click.echo("\n".join(one["text"] for one in results))
