"""From a training to a model that ships: half precision, its exam, its ground truth, its card."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

from jinja2 import Template
from transformers import LlamaForCausalLM

from lens_defense.models.language import LANGUAGE_KEY
from lens_defense.organism.exam import BARS, Score, take_exam
from lens_defense.organism.ground_truth import EMPTY, HOLDS, CellTruth, measure_ground_truth
from lens_defense.organism.training import Recipe, make_model, make_tokenizer
from lens_defense.organism.world import World
from lens_defense.prompts.request import READING_ORDER
from lens_defense.storage import check_manifest, write_manifest

CARD, TRUTH = "README.md", "truth.json"


def release(model: LlamaForCausalLM, recipe: Recipe, folder: Path) -> dict[str, Score]:
    """Write a trained organism as a Hugging Face folder, with the exam and ground truth of what is written.

    Args:
        model: as trained.
        recipe: what it was trained by.
        folder: where it goes; files there are replaced.

    Returns:
        The exam.
    """
    world = World(recipe.world_seed)
    tokenizer = make_tokenizer(world, recipe.vocab)
    shipped = make_model(recipe, tokenizer)
    shipped.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})
    shipped.eval()
    scores, cells = take_exam(shipped, tokenizer, world), measure_ground_truth(shipped, tokenizer, world)
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.world_seed == Recipe().world_seed:  # another world has other words than the bundled set
        setattr(shipped.config, LANGUAGE_KEY, "organism")
    shipped.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    content = {"recipe": asdict(recipe), "exam": scores, "truth": [asdict(cell) for cell in cells]}
    (folder / TRUTH).write_text(json.dumps(content, indent=1), "utf-8")
    (folder / CARD).write_text(model_card(recipe, scores, cells), "utf-8")
    write_manifest(folder)
    return scores


def released_ground_truth(folder: Path) -> list[CellTruth]:
    """The ground truth that a release carries.

    Raises:
        ValueError: the folder is not as it was released.
    """
    check_manifest(folder)
    return [CellTruth(**cell) for cell in json.loads((folder / TRUTH).read_text("utf-8"))["truth"]]


def model_card(recipe: Recipe, scores: dict[str, Score], cells: Sequence[CellTruth]) -> str:
    """The model card: data, recipe, seeds, behaviour, ground truth."""
    template = Template(
        files("lens_defense.organism").joinpath("model_card.md.j2").read_text("utf-8"),
        keep_trailing_newline=True,
    )
    return template.render(
        recipe=recipe,
        scores=scores,
        bars=BARS,
        holds=HOLDS,
        empty=EMPTY,
        prompts=max(cell.n for cell in cells),
        table=truth_table(cells),
    )


def truth_table(cells: Sequence[CellTruth]) -> str:
    """Cells as a Markdown table: roles in reading order, blocks across."""
    layers = sorted({cell.layer for cell in cells})
    by_address = {(cell.role, cell.layer): cell for cell in cells}
    marks = {"positive": "**", "negative": "", "between": "*"}
    lines = [f"| role | {' | '.join(map(str, layers))} |", "|---" * (len(layers) + 1) + "|"]
    for role in READING_ORDER:
        row = [by_address[role, layer] for layer in layers if (role, layer) in by_address]
        texts = [
            f"{marks[cell.kind]}{cell.switched:.2f}{marks[cell.kind]} ({cell.changed:.2f})" for cell in row
        ]
        if row:
            lines.append(f"| {role} | {' | '.join(texts)} |")
    return "\n".join(lines)
