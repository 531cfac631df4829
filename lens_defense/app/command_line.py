"""The command line: `lens-defense demo`, `app`, `trace`, `doctor`, `ledger` ... Heavy imports wait."""

import shlex
import sys
from collections.abc import Iterable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lens_defense.app.options import listed_layers, read_harmful_requests, trace_settings
from lens_defense.app.output_folder import require_writable, staged_folder
from lens_defense.app.sentences import errors_in_a_sentence
from lens_defense.prompts.request import Request
from lens_defense.shown_text import shown


def _examples(*commands: str) -> str:
    """The last lines of a help text; a test gives each of them to the parser."""
    return "\n\n".join(("Examples:", *commands))


app = typer.Typer(
    help="Find where a language model keeps what it should not say, take it out, check the cost.",
    epilog=_examples("lens-defense doctor", "lens-defense demo", "lens-defense trace --help"),
    no_args_is_help=True,
    add_completion=False,
)
organism = typer.Typer(
    help="The bundled model whose storage sites are known.",
    epilog=_examples("lens-defense organism train --out my_organism"),
    no_args_is_help=True,
)
app.add_typer(organism, name="organism")


class Dtype(StrEnum):
    """Precisions of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class LearnedMethodName(StrEnum):
    """Methods that are trained before they edit."""

    mend = "mend"
    ke = "ke"


class MapFormat(StrEnum):
    """Files that a map can be written to."""

    html = "html"
    svg = "svg"
    pdf = "pdf"
    png = "png"
    csv = "csv"
    json = "json"


_Model = Annotated[str, typer.Option(help="smollm2, organism, a folder, a .gguf file or a hub name.")]
_Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; by default a GPU if there is one.")]
_Dtype = Annotated[Dtype, typer.Option(help="Precision of the weights.")]
_TextField = Annotated[
    str | None,
    typer.Option(help="Column of the request; by default text, prompt, goal and other known names."),
]
_SubjectField = Annotated[
    str, typer.Option(help="Column of the subject: the words of the request that carry the harm.")
]
_Limit = Annotated[int | None, typer.Option(min=1, help="The most requests that are taken.")]
_Strict = Annotated[
    bool, typer.Option("--strict", help="Stop at a row that cannot be read, in place of leaving it out.")
]


def _print_version(show_version: bool) -> bool:
    if show_version:
        from lens_defense import __version__

        typer.echo(f"lens-defense {__version__}")
        raise typer.Exit
    return show_version


@app.callback()
def _main(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


@app.command(
    epilog=_examples(
        "lens-defense demo",
        "lens-defense demo --model organism --out demo_organism",
        "lens-defense demo --requests my_requests.csv --text-field prompt --limit 8",
    )
)
def demo(
    model: _Model = "smollm2",
    requests: Annotated[
        str | None,
        typer.Option(
            help="Your own: a JSONL, JSON, CSV, parquet or text file, or a hub set; at most eight are edited."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html and its data.", file_okay=False)] = Path(
        "demo"
    ),
    text_field: _TextField = None,
    subject_field: _SubjectField = "subject",
    limit: _Limit = None,
    strict: _Strict = False,
    cache: Annotated[bool, typer.Option(help="Use covariances and target values from disk.")] = True,
    device: _Device = None,
    dtype: _Dtype = Dtype.float32,
) -> None:
    """The main job on a chat model: trace, locate, edit, check, undo, and a page about it.

    Files of an earlier run are kept in a folder beside the new ones. A failure leaves nothing in --out; what
    was cached makes the next run faster.
    """
    from rich.console import Console

    with errors_in_a_sentence(
        "stopped; nothing was left in --out; the same command is faster by what was cached"
    ):
        require_writable(out)
        own = _own_requests(requests, text_field, subject_field, limit, strict)
        from lens_defense.app.demo import demo as run_demo

        options = {"--model": model, "--requests": requests, "--text-field": text_field}
        options |= {"--subject-field": subject_field if requests and subject_field != "subject" else None}
        options |= {"--limit": limit, "--dtype": None if dtype is Dtype.float32 else dtype.value}
        run_demo(
            Console(),
            name=model,
            requests=own,
            out=out,
            cache=cache,
            device=device,
            dtype=_torch_dtype(dtype),
            reproduce=_command("demo", options),
        )


@app.command(
    name="app",
    epilog=_examples(
        "lens-defense app",
        "lens-defense app organism",
        "lens-defense app path/to/model --requests my_requests.csv --limit 8",
    ),
)
def local_page(
    model: Annotated[
        str, typer.Argument(help="smollm2, organism, a folder, a .gguf file or a hub name.")
    ] = "smollm2",
    requests: Annotated[
        str | None,
        typer.Option(help="Your own: a JSONL, JSON, CSV, parquet or text file, or a hub set."),
    ] = None,
    text_field: _TextField = None,
    subject_field: _SubjectField = "subject",
    limit: _Limit = None,
    strict: _Strict = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; 0 takes a free one.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
    device: _Device = None,
    dtype: _Dtype = Dtype.float32,
) -> None:
    """The interactive page: trace, choose cells, edit there, ask, check, undo.

    It is served to this machine alone, at an address with a token, until Ctrl-C. No file is written, and the
    model's files stay as they are.
    """
    with errors_in_a_sentence("closed; no file was changed"):
        own = _own_requests(requests, text_field, subject_field, limit, strict)
        from lens_defense.app.page_command import serve_page

        serve_page(
            model, own, port=port, browser=browser, device=device, dtype=_torch_dtype(dtype), say=typer.echo
        )


@app.command(
    epilog=_examples(
        "lens-defense trace --model organism --requests organism --out traces",
        "lens-defense trace --requests my_requests.jsonl --out traces --format html --format csv",
        "lens-defense trace --requests goals.csv --text-field goal --subject-field topic --out traces",
        "lens-defense trace --requests core --layers 4-12 --components mlp_out,attn_out --out traces",
    )
)
def trace(
    requests: Annotated[
        str,
        typer.Option(help="core, organism, a JSONL, JSON, CSV, parquet or text file, or a hub set."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the results.", file_okay=False)],
    model: _Model = "smollm2",
    text_field: _TextField = None,
    subject_field: _SubjectField = "subject",
    limit: _Limit = None,
    strict: _Strict = False,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS",
            help="all, every-2, or layers as in 0,4,8-12; by default at most 12, evenly spaced.",
        ),
    ] = None,
    components: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="resid_pre, resid_post, mlp_out, attn_out, z (every head), z.3; by default resid_post.",
        ),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            metavar="ROLES",
            help="all, or as in subject_last,last; by default also subject_first and next.",
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every layer and token, and MLP and attention outputs too.")
    ] = False,
    samples: Annotated[int, typer.Option(min=1, help="Noise draws per request.")] = 3,
    min_difference: Annotated[
        float,
        typer.Option(
            min=0.0, help="Nats that corrupting the subject must change the answer by, else it is refused."
        ),
    ] = 0.1,
    formats: Annotated[
        list[MapFormat],
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="html, svg, pdf, png: the mean map; csv, json: its numbers. Can be given several times.",
        ),
    ] = [MapFormat.html],  # noqa: B006 - typer copies it
    device: _Device = None,
    dtype: _Dtype = Dtype.float32,
) -> None:
    """Trace many requests, one file per request; a stopped run goes on. Then write the mean map."""
    with errors_in_a_sentence("stopped; the same command goes on"):
        require_writable(out)
        settings = trace_settings(everything, layers, components, positions, min_difference)
        _require_drawable(formats)
        chosen = read_harmful_requests(
            requests, text_field=text_field, subject_field=subject_field, limit=limit, strict=strict
        )
        from lens_defense.app.trace_command import trace_to_folder

        trace_to_folder(
            model,
            chosen,
            settings,
            out,
            samples=samples,
            formats=formats,
            device=device,
            dtype=_torch_dtype(dtype),
        )


@app.command(
    epilog=_examples(
        "lens-defense defend smollm2 --out defended",
        "lens-defense defend organism --out defended --trials 8 --yes",
        "lens-defense defend path/to/model --requests my_requests.csv --out defended --adapter --yes",
    )
)
def defend(
    model: Annotated[str, typer.Argument(help="smollm2, organism, a folder, a .gguf file or a hub name.")],
    out: Annotated[
        Path, typer.Option(help="Folder of the results; a stopped run goes on in it.", file_okay=False)
    ],
    requests: Annotated[
        str | None,
        typer.Option(
            help="What shall be refused: a JSONL, JSON, CSV, parquet or text file, or a hub set; by default "
            "sixteen of the model's own set."
        ),
    ] = None,
    text_field: _TextField = None,
    subject_field: _SubjectField = "subject",
    limit: _Limit = None,
    strict: _Strict = False,
    trials: Annotated[int, typer.Option(min=1, help="Edits that are tried.")] = 16,
    minutes: Annotated[
        float, typer.Option(min=1, help="For the whole run; a quarter of them is kept for the check.")
    ] = 30,
    method: Annotated[
        list[str] | None,
        typer.Option(help="A method to search among; can be given several times; by default all that solve."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    pick: Annotated[
        int | None, typer.Option(min=1, help="The row of the front that is taken; by default the knee.")
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="With --yes: write an adapter, not a model.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Ask nothing: take the knee, check it, write it.")
    ] = False,
    device: _Device = None,
    dtype: _Dtype = Dtype.float32,
) -> None:
    """Search the edit after which a model refuses some requests and little else, and write the model.

    It traces, chooses sites, and tries methods, layers and strengths for a front of refusals against
    over-refusal and KL. The same command gives the same bits on the same machine, unless --minutes ends the
    search early.
    """
    from rich.console import Console

    with errors_in_a_sentence("stopped; the same command goes on"):
        require_writable(out)
        own = _own_requests(requests, text_field, subject_field, limit, strict)
        if not yes and not sys.stdin.isatty():
            raise ValueError("nobody can be asked here, since this is no terminal; give --yes")
        from lens_defense.app.defend_command import DefendSettings
        from lens_defense.app.defend_command import defend as run_defend

        settings = DefendSettings(trials=trials, minutes=minutes, seed=seed, pick=pick, asks=not yes)
        settings = replace(settings, write="adapter" if adapter else "model")
        if method:
            settings = replace(settings, methods=tuple(method))
        options: dict[str, object] = {"--out": out, "--requests": requests, "--text-field": text_field}
        options |= {"--subject-field": subject_field if requests and subject_field != "subject" else None}
        options |= {"--limit": limit, "--strict": strict, "--trials": trials, "--minutes": f"{minutes:g}"}
        options |= {"--method": method, "--seed": seed, "--pick": pick, "--adapter": adapter, "--yes": yes}
        options |= {"--device": device, "--dtype": None if dtype is Dtype.float32 else dtype.value}
        run_defend(
            Console(),
            name=model,
            requests=own,
            out=out,
            settings=settings,
            device=device,
            dtype=_torch_dtype(dtype),
            reproduce=_command("defend", options, model),
        )


@app.command(
    name="train-editor",
    epilog=_examples(
        "lens-defense train-editor --method mend --model organism --out organism_mend",
        "lens-defense train-editor --method ke --model organism --out organism_ke --layers 0-4 --steps 400",
        "lens-defense train-editor --method mend --requests my_requests.csv --out my_editor",
    ),
)
def train_editor(
    method: Annotated[LearnedMethodName, typer.Option(help="mend, or ke (KnowledgeEditor).")],
    out: Annotated[
        Path, typer.Option(help="Folder of the editor; a stopped training goes on in it.", file_okay=False)
    ],
    model: _Model = "smollm2",
    requests: Annotated[
        str | None,
        typer.Option(
            help="What it learns to make refused: a JSONL, JSON, CSV, parquet or text file, or a hub set; by "
            "default the model's own set."
        ),
    ] = None,
    text_field: _TextField = None,
    subject_field: _SubjectField = "subject",
    limit: _Limit = None,
    strict: _Strict = False,
    layers: Annotated[
        str | None,
        typer.Option(metavar="LAYERS", help="As in 3-7 or 4,6; by default those that a trace finds."),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Of the training; more than a folder has go on from there.")
    ] = 500,
    seed: Annotated[int, typer.Option(help="Of the network and of what is drawn.")] = 0,
    device: _Device = None,
    dtype: _Dtype = Dtype.float32,
) -> None:
    """Train a network that edits this model in one step: MEND or KE, on the model's own edits.

    It edits like any other method: ld.edit(model, requests, sites, method=ld.load_editor(folder)).
    """
    from rich.console import Console

    with errors_in_a_sentence("stopped; the same command goes on"):
        require_writable(out)
        own = _own_requests(requests, text_field, subject_field, limit, strict)
        chosen_layers = None if layers is None else listed_layers(layers)
        from lens_defense.app.train_editor_command import train_to_folder
        from lens_defense.editing.tuning.train_editor import EditorTraining

        train_to_folder(
            Console(),
            name=model,
            requests=own,
            layers=chosen_layers,
            out=out,
            method=method.value,
            training=EditorTraining(steps=steps, seed=seed),
            device=device,
            dtype=_torch_dtype(dtype),
        )


@app.command(epilog=_examples("lens-defense doctor", "lens-defense doctor organism"))
def doctor(
    model: Annotated[
        str | None, typer.Argument(help="smollm2, organism, a folder, a .gguf file or a hub name.")
    ] = None,
    device: _Device = None,
    dtype: _Dtype = Dtype.float32,
) -> None:
    """What is installed here, what is missing, and whether a model can be loaded, traced and edited.

    Exit code 1 if there is a problem.
    """
    from lens_defense.app.doctor import examine

    colours = {"ok": "green", "warning": "yellow", "problem": "red"}
    problems = 0
    with errors_in_a_sentence("stopped"):
        for finding in examine(model, device, dtype.value):
            typer.secho(f"{finding.level:8}", fg=colours[finding.level], nl=False)
            typer.echo(f" {finding.subject:16} {finding.text}")
            problems += finding.level == "problem"
    raise typer.Exit(1 if problems else 0)


ledger = typer.Typer(
    help="The folder of a ledger: edits that stand, kept by ld.Ledger(model, folder).",
    epilog=_examples("lens-defense ledger show my_ledger"),
    no_args_is_help=True,
)
app.add_typer(ledger, name="ledger")
_Folder = Annotated[Path, typer.Argument(help="The ledger's folder.", file_okay=False)]


@ledger.command(name="show", epilog=_examples("lens-defense ledger show my_ledger"))
def ledger_show(folder: _Folder) -> None:
    """List the edits that stand; requests are counted by category."""
    with errors_in_a_sentence("stopped"):
        from rich.console import Console

        from lens_defense.app.ledger_command import show

        show(folder, Console())


@ledger.command(name="undo", epilog=_examples("lens-defense ledger undo my_ledger"))
def ledger_undo(folder: _Folder) -> None:
    """Take the last edit off."""
    _ledger_drop(folder, -1)


@ledger.command(name="drop", epilog=_examples("lens-defense ledger drop my_ledger 2"))
def ledger_drop(
    folder: _Folder, number: Annotated[int, typer.Argument(min=1, help="As `show` counts the edits.")]
) -> None:
    """Take an edit off, also from the middle."""
    _ledger_drop(folder, number)


def _ledger_drop(folder: Path, number: int) -> None:
    with errors_in_a_sentence("stopped"):
        from rich.console import Console

        from lens_defense.app.ledger_command import drop

        drop(folder, number, Console())


@ledger.command(
    name="replay", epilog=_examples("lens-defense ledger replay my_ledger --model smollm2 --out edited")
)
def ledger_replay(
    folder: _Folder,
    model: _Model,
    out: Annotated[Path, typer.Option(help="A new folder for the edited model.", file_okay=False)],
    dtype: _Dtype = Dtype.float32,
) -> None:
    """Make the edits again on a fresh copy of the model, and write it as a Hugging Face folder."""
    with errors_in_a_sentence("stopped; nothing was written"):
        require_writable(out)
        from rich.console import Console

        from lens_defense.app.ledger_command import replay

        replay(folder, model, out, _torch_dtype(dtype), Console())


@ledger.command(name="diff", epilog=_examples("lens-defense ledger diff my_ledger"))
def ledger_diff(folder: _Folder) -> None:
    """Show how much the edits that stand change, layer by layer."""
    with errors_in_a_sentence("stopped"):
        from rich.console import Console

        from lens_defense.app.ledger_command import diff

        diff(folder, Console())


@organism.command("train", epilog=_examples("lens-defense organism train --seed 1 --out my_organism"))
def train_organism(
    out: Annotated[Path, typer.Option(help="Folder of the trained model, new or empty.", file_okay=False)],
    seed: Annotated[int, typer.Option(help="Of the weights and of what is drawn.")] = 0,
    world_seed: Annotated[int, typer.Option(help="Of the words and of what they mean.")] = 0,
) -> None:
    """Train an organism of your own: an hour and a quarter of one core. A stopped training goes on."""
    with errors_in_a_sentence("stopped; the same command goes on"):
        require_writable(out)
        if out.is_dir() and any(out.iterdir()):
            raise ValueError(f"the folder {out} is not empty; name a new one")
        from lens_defense.organism.exam import BARS, failed_bars
        from lens_defense.organism.release import release
        from lens_defense.organism.training import Recipe, train
        from lens_defense.storage import cache_folder

        recipe = Recipe(seed=seed, world_seed=world_seed)
        unfinished = cache_folder() / "organism" / f"s{seed}w{world_seed}"
        trained = train(recipe, unfinished)
        with staged_folder(out, typer.echo) as folder:
            scores = release(trained, recipe, folder)
    for name, (right, number) in scores.items():
        typer.echo(f"{name:44} {right:4} of {number:4}  {right / number:6.1%}  (bar {BARS[name]:.0%})")
    typer.echo(shown(f"{out}: ", 2000) + ("; ".join(failed_bars(scores)) or "every bar is met"))


def _own_requests(
    source: str | None, text_field: str | None, subject_field: str, limit: int | None, strict: bool
) -> list[Request] | None:
    """A person's own requests, each subject once; None where none are named."""
    if source is None:
        return None
    return read_harmful_requests(
        source,
        text_field=text_field,
        subject_field=subject_field,
        limit=limit,
        strict=strict,
        distinct=True,
    )


def _require_drawable(formats: Iterable[MapFormat]) -> None:
    """Refuse formats that need a browser where there is none."""
    if {MapFormat.svg, MapFormat.pdf, MapFormat.png} & set(formats):
        from lens_defense.plotting.theme import find_chromium

        find_chromium()


def _torch_dtype(dtype: Dtype) -> Any:
    import torch

    return getattr(torch, dtype.value)


def _command(name: str, options: dict[str, object], *arguments: str) -> str:
    """A command that does the same again."""
    words = []
    for option, value in options.items():
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            for one in value if isinstance(value, list) else [value]:
                words += [option, str(one)]
    return shlex.join(["lens-defense", name, *arguments, *words])


if __name__ == "__main__":
    app()
