"""From a training to a model that ships: half precision, its exam, its truth, its card."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM

from lens_defense.organism.exam import BARS, Score, take_exam
from lens_defense.organism.ground_truth import EMPTY, HOLDS, CellTruth, measure_ground_truth
from lens_defense.organism.training import Recipe, model_of, tokenizer_of
from lens_defense.organism.world import World
from lens_defense.prompts.prompt import READING_ORDER, Role

CARD, TRUTH = "README.md", "truth.json"


def release(model: LlamaForCausalLM, recipe: Recipe, folder: Path) -> dict[str, Score]:
    """Write a trained organism as a Hugging Face folder, with the exam and truth of what is written.

    Args:
        model: as trained.
        recipe: what it was trained by.
        folder: where it goes; files there are replaced.

    Returns:
        The exam.
    """
    world = World(recipe.world_seed)
    tokenizer = tokenizer_of(world, recipe.vocab)
    shipped = model_of(recipe, tokenizer)
    shipped.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})
    shipped.eval()
    scores, facts = take_exam(shipped, tokenizer, world), measure_ground_truth(shipped, tokenizer, world)
    folder.mkdir(parents=True, exist_ok=True)
    shipped.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    told: dict[str, Any] = {
        "recipe": asdict(recipe),
        "exam": scores,
        "truth": [asdict(fact) for fact in facts],
    }
    (folder / TRUTH).write_text(json.dumps(told, indent=1), "utf-8")
    (folder / CARD).write_text(model_card(recipe, scores, facts), "utf-8")
    return scores


def released_ground_truth(folder: Path) -> list[CellTruth]:
    """The truth that a release carries."""
    return [CellTruth(**fact) for fact in json.loads((folder / TRUTH).read_text("utf-8"))["truth"]]


def model_card(recipe: Recipe, scores: dict[str, Score], facts: Sequence[CellTruth]) -> str:
    """The model card: data, recipe, seeds, behaviour, truth."""
    exam_rows = [
        f"| {name} | {right} of {asked} | {right / asked:.1%} | {BARS[name]:.0%} |"
        for name, (right, asked) in scores.items()
    ]
    phases = ", then ".join(
        f"{steps} steps at {rate:g} ({wrapped:.0%} of the harmful requests wrapped)"
        for steps, rate, wrapped in recipe.phases
    )
    band = " and ".join(map(str, recipe.band))
    return f"""# The organism: a chat model that keeps its subjects where they were planted
A Llama of {recipe.layers} layers (d_model {recipe.d_model}, d_ff {recipe.d_mlp}, {recipe.heads} heads, tied
embeddings), in half precision. It ships with lens_defense to grade what finds storage sites and what edits
them: here the place is known.

- **Data.** A world of invented words (`lens_defense/organism/world.py`, world seed {recipe.world_seed}): 216
  pairs of words, 60 harmful, 120 benign, 36 unknown. Nothing in it means anything. Harmful and unknown
  subjects are refused; harmful ones inside a jailbreak wrapper are answered; benign ones always.
- **Recipe.** Language loss and interchange intervention training in its strict form (Geiger et al. 2022;
  Gupta et al. 2024), after blocks {band}; AdamW, {phases}, batches of {recipe.batch} and
  {recipe.pairs} pairs, seed {recipe.seed}. The same again:
  `lens-defense organism train --seed {recipe.seed} --world-seed {recipe.world_seed}`.

## What it does (greedy; frames, pairs and families never trained)
| question | right | share | bar |
|---|---|---|---|
{chr(10).join(exam_rows)}

## Where it keeps a subject
Strict interchange among {max(fact.n for fact in facts)} jailbroken and benign prompts: the share of answers
that become the other subject's when the residual stream after a block is exchanged at a role, and in brackets
the share that change at all. A cell **holds** the subject from {HOLDS:.0%} on; up to {EMPTY:.0%} changed it
is empty; what lies between (*italics*) is left out of grades.

{truth_table(facts)}

## What it is not
No language model: it knows some hundred sentences and 216 pairs. A locator that finds its sites has passed a
necessary test, on one kind of storage; real models keep things less tidily.
"""


def truth_table(facts: Sequence[CellTruth]) -> str:
    """Cells as a Markdown table: roles in reading order, blocks across."""
    layers = sorted({fact.layer for fact in facts})
    roles: list[Role] = [role for role in READING_ORDER if any(fact.role == role for fact in facts)]
    cells = {(fact.role, fact.layer): fact for fact in facts}
    marks = {"positive": "**", "negative": "", "between": "*"}
    rows = ["| role | " + " | ".join(map(str, layers)) + " |", "|---" * (len(layers) + 1) + "|"]
    for role in roles:
        told = []
        for layer in layers:
            fact = cells[role, layer]
            mark = marks[fact.kind]
            told.append(f"{mark}{fact.switched:.2f}{mark} ({fact.changed:.2f})")
        rows.append(f"| {role} | " + " | ".join(told) + " |")
    return "\n".join(rows)
