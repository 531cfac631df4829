"""The command line: `lens-defense demo`, `trace`, `organism train`. Heavy imports wait for a command."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Find where a language model keeps what it should not say, take it out, check the cost.",
    no_args_is_help=True,
    add_completion=False,
)


DEVICE = "cpu, cuda, cuda:1 ...; without it, a GPU where there is one."

organism = typer.Typer(help="The bundled model whose storage sites are known.", no_args_is_help=True)
app.add_typer(organism, name="organism")


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="smollm2, organism, a folder, a .gguf file or a hub name.")] = (
        "smollm2"
    ),
    out: Annotated[Path, typer.Option(help="Folder for report.html and its data.", file_okay=False)] = Path(
        "demo"
    ),
    cache: Annotated[bool, typer.Option(help="Use moments and values kept on disk.")] = True,
    device: Annotated[str | None, typer.Option(help=DEVICE)] = None,
) -> None:
    """The main job on a real chat model: trace, locate, edit, check, undo, and a page about it."""
    from rich.console import Console

    from lens_defense.app.demo import demo as run_demo

    with _in_a_sentence("stopped; no weight was changed on disk"):
        run_demo(Console(), name=model, out=out, cache=cache, device=device)


@app.command()
def trace(
    requests: Annotated[str, typer.Option(help="core, organism, a JSONL, CSV or parquet file, a hub set.")],
    out: Annotated[Path, typer.Option(help="Folder of the results.", file_okay=False)],
    model: Annotated[
        str, typer.Option(help="smollm2, organism, a folder, a .gguf or a hub name.")
    ] = "smollm2",
    everything: Annotated[
        bool, typer.Option("--all", help="Every layer and token, and MLP and attention outputs too.")
    ] = False,
    samples: Annotated[int, typer.Option(help="Noise draws a request.")] = 3,
    device: Annotated[str | None, typer.Option(help=DEVICE)] = None,
) -> None:
    """Trace many requests: a file each, resumed where it was stopped; then the mean map as a page."""
    from lens_defense.models.load import load
    from lens_defense.plotting.heatmap import heatmap
    from lens_defense.plotting.theme import save_figure
    from lens_defense.prompts.request_files import requests as read
    from lens_defense.tracing.locate import locate
    from lens_defense.tracing.survey import survey

    wide = {"positions": "all", "layers": "all", "components": ["resid_post", "mlp_out", "attn_out"]}
    with _in_a_sentence("stopped; the same command goes on"):
        asked = read(requests, distinct=False)
        harmless = sum(len(read(requests, kind=kind)) for kind in ("benign", "safe"))
        loaded = load(model, device=device)
        told, refused = survey(loaded, asked, out / "traces", samples=samples, **(wide if everything else {}))
        if told is None:
            raise ValueError(
                f"none of these requests could be traced; of the first: {next(iter(refused.values()))}"
            )
        told.save(out / "trace.safetensors")
        for id, why in refused.items():
            typer.echo(f"not traced: {id}: {why}")
        if harmless:
            typer.echo(f"not traced: {harmless} benign and safe requests")
        save_figure(heatmap(told), out / "map.html")
        sites = locate(told)
        save_figure(heatmap(told, sites), out / "map.html")
        typer.echo(f"{len(told.prompts)} requests; strongest sites: {', '.join(map(str, sites))}")
        typer.echo(f"Open {out / 'map.html'}")


@organism.command("train")
def train_organism(
    out: Annotated[Path, typer.Option(help="Folder of the trained model.", file_okay=False)],
    seed: Annotated[int, typer.Option(help="Of the weights and of what is drawn.")] = 0,
    world_seed: Annotated[int, typer.Option(help="Of the words and of what they mean.")] = 0,
) -> None:
    """Plant a model of your own: an hour and a quarter of one core; a stopped training goes on."""
    from lens_defense.models.load import cache_folder
    from lens_defense.organism.exam import BARS, failed
    from lens_defense.organism.release import release
    from lens_defense.organism.training import Recipe, train

    recipe = Recipe(seed=seed, world_seed=world_seed)
    kept = cache_folder() / "organism" / f"s{seed}w{world_seed}"
    with _in_a_sentence("stopped; the same command goes on"):
        scores = release(train(recipe, kept), recipe, out)
    for name, (right, asked) in scores.items():
        typer.echo(f"{name:44} {right:4} of {asked:4}  {right / asked:6.1%}  (bar {BARS[name]:.0%})")
    typer.echo(f"{out}: " + ("; ".join(failed(scores)) or "every bar is met"))


@contextmanager
def _in_a_sentence(stopped: str) -> Iterator[None]:
    """What is wrong with the input is told without a traceback; Ctrl-C ends cleanly."""
    from lens_defense.models.devices import explain_out_of_memory

    try:
        with explain_out_of_memory("the model and its runs", "take a smaller model, or --device cpu"):
            yield
    except (ValueError, MemoryError) as error:
        typer.secho(f"lens-defense: {error}", err=True, fg="red")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.secho(f"lens-defense: {stopped}", err=True)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    app()
