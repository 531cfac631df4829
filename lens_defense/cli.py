"""The command line: `lens-defense demo`. Heavy imports wait until a command runs."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Find where a language model keeps what it should not say, take it out, check the cost.",
    no_args_is_help=True,
    add_completion=False,
)


@app.callback()
def _app() -> None:
    """Keeps `demo` a command of its own while it is the only one."""


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="smollm2, a folder, a .gguf file or a hub name.")] = ("smollm2"),
    out: Annotated[Path, typer.Option(help="Folder for report.html and its data.", file_okay=False)] = Path(
        "demo"
    ),
    cache: Annotated[bool, typer.Option(help="Use moments and values kept on disk.")] = True,
) -> None:
    """The main job on a real chat model: trace, locate, edit, check, undo, and a page about it."""
    from rich.console import Console

    from lens_defense.demos import demo as run_demo

    try:
        run_demo(Console(), name=model, out=out, cache=cache)
    except ValueError as error:
        typer.secho(f"lens-defense: {error}", err=True, fg="red")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.secho("lens-defense: stopped; no weight was changed on disk", err=True)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    app()
