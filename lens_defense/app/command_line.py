"""The command line: `lens-defense demo`, `trace`, `organism train`. Heavy imports wait for a command."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from lens_defense.shown_text import shown

app = typer.Typer(
    help="Find where a language model keeps what it should not say, take it out, check the cost.",
    no_args_is_help=True,
    add_completion=False,
)
organism = typer.Typer(help="The bundled model whose storage sites are known.", no_args_is_help=True)
app.add_typer(organism, name="organism")

_Model = Annotated[str, typer.Option(help="smollm2, organism, a folder, a .gguf file or a hub name.")]
_Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; by default a GPU if there is one.")]


@app.command()
def demo(
    model: _Model = "smollm2",
    out: Annotated[Path, typer.Option(help="Folder for report.html and its data.", file_okay=False)] = Path(
        "demo"
    ),
    cache: Annotated[bool, typer.Option(help="Use covariances and target values from disk.")] = True,
    device: _Device = None,
) -> None:
    """The main job on a real chat model: trace, locate, edit, check, undo, and a page about it."""
    from rich.console import Console

    from lens_defense.app.demo import demo as run_demo

    with _errors_in_a_sentence("stopped; no weight was changed on disk"):
        run_demo(Console(), name=model, out=out, cache=cache, device=device)


@app.command()
def trace(
    requests: Annotated[str, typer.Option(help="core, organism, a JSONL, CSV or parquet file, a hub set.")],
    out: Annotated[Path, typer.Option(help="Folder of the results.", file_okay=False)],
    model: _Model = "smollm2",
    everything: Annotated[
        bool, typer.Option("--all", help="Every layer and token, and MLP and attention outputs too.")
    ] = False,
    samples: Annotated[int, typer.Option(help="Noise draws per request.")] = 3,
    device: _Device = None,
) -> None:
    """Trace many requests, one file per request; a stopped run goes on. Then write the mean map as a page."""
    from lens_defense.models.load import load
    from lens_defense.plotting.heatmap import heatmap
    from lens_defense.plotting.theme import save_figure
    from lens_defense.prompts.request_files import requests as read_requests
    from lens_defense.tracing.corruptions import GaussianNoise
    from lens_defense.tracing.locate import locate
    from lens_defense.tracing.survey import survey

    all_cells = {"positions": "all", "layers": "all", "components": ["resid_post", "mlp_out", "attn_out"]}
    with _errors_in_a_sentence("stopped; the same command goes on"):
        harmful = read_requests(requests, distinct=False)
        harmless = sum(len(read_requests(requests, kind=kind)) for kind in ("benign", "safe"))
        loaded = load(model, device=device)
        noise = GaussianNoise(samples=samples)
        changes: dict[str, Any] = all_cells if everything else {}
        result, refused = survey(loaded, harmful, out / "traces", corruption=noise, **changes)
        if result is None:
            reason = next(iter(refused.values()))
            raise ValueError(f"none of these requests could be traced; of the first: {reason}")
        result.save(out / "trace.safetensors")
        for id, reason in refused.items():
            typer.echo(f"not traced: {shown(id)}: {shown(reason, 2000)}")
        if harmless:
            typer.echo(f"not traced: {harmless} benign and safe requests")
        save_figure(heatmap(result), out / "map.html")  # for a map in which no site can be located
        sites = locate(result)
        save_figure(heatmap(result, sites), out / "map.html")
        typer.echo(f"{len(result.prompts)} requests; strongest sites: {', '.join(map(str, sites))}")
        typer.echo(shown(f"Open {out / 'map.html'}", 2000))


@organism.command("train")
def train_organism(
    out: Annotated[Path, typer.Option(help="Folder of the trained model.", file_okay=False)],
    seed: Annotated[int, typer.Option(help="Of the weights and of what is drawn.")] = 0,
    world_seed: Annotated[int, typer.Option(help="Of the words and of what they mean.")] = 0,
) -> None:
    """Train an organism of your own: an hour and a quarter of one core. A stopped training goes on."""
    from lens_defense.organism.exam import BARS, failed_bars
    from lens_defense.organism.release import release
    from lens_defense.organism.training import Recipe, train
    from lens_defense.storage import cache_folder

    recipe = Recipe(seed=seed, world_seed=world_seed)
    unfinished = cache_folder() / "organism" / f"s{seed}w{world_seed}"
    with _errors_in_a_sentence("stopped; the same command goes on"):
        scores = release(train(recipe, unfinished), recipe, out)
    for name, (right, number) in scores.items():
        typer.echo(f"{name:44} {right:4} of {number:4}  {right / number:6.1%}  (bar {BARS[name]:.0%})")
    typer.echo(shown(f"{out}: ", 2000) + ("; ".join(failed_bars(scores)) or "every bar is met"))


@contextmanager
def _errors_in_a_sentence(stopped: str) -> Iterator[None]:
    """An error of the input is one sentence without a traceback; Ctrl-C ends cleanly."""
    from lens_defense.models.devices import explain_out_of_memory

    try:
        with explain_out_of_memory("the model and its runs", "take a smaller model, or --device cpu"):
            yield
    except (ValueError, MemoryError) as error:
        typer.secho(shown(f"lens-defense: {error}", 2000), err=True, fg="red")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.secho(f"lens-defense: {stopped}", err=True)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    app()
