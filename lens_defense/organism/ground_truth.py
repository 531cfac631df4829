"""The ground truth about the organism: which cells hold a subject, measured by strict interchange.

A cell is a role and a block. The states that a donor prompt, about another subject, has there after the block
are put into a base prompt's run, at every token of the role at once. Where the subject is stored, the answer
becomes the other subject's; where it is not, nothing changes. Strict: at the subject's last token, the states
of the subject's other tokens are a third subject's at the same time (Gupta et al. 2024).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaForCausalLM

from lens_defense.organism.interchange import (
    answered_exactly,
    make_batch,
    rows_answered_exactly,
    states_after,
)
from lens_defense.organism.phrasings import phrasings
from lens_defense.organism.world import Example, World
from lens_defense.prompts.prompt import Prompt, tokenize
from lens_defense.prompts.request import READING_ORDER, Role

HOLDS, EMPTY = 0.95, 0.03
"""A cell holds the subject from .95 of switched answers on; it is empty up to .03 of changed ones."""


@dataclass(frozen=True, slots=True)
class CellTruth:
    """What interchanging one cell did."""

    role: Role
    layer: int
    switched: float
    """The share of answers that became the other subject's."""
    changed: float
    """The share of answers that were not the prompt's own any more."""
    n: int

    @property
    def kind(self) -> Literal["positive", "negative", "between"]:
        """Whether the cell holds the subject; "between" is left out of grades."""
        return "positive" if self.switched >= HOLDS else "negative" if self.changed <= EMPTY else "between"


@torch.no_grad()
def measure_ground_truth(
    model: LlamaForCausalLM, tokenizer: Any, world: World, *, n: int = 100, seed: int = 0
) -> list[CellTruth]:
    """Interchange every role after every block, among prompts whose answers are recalled.

    Args:
        model: the organism, as it ships.
        tokenizer: its tokenizer.
        world: what it was taught.
        n: prompts to draw; those that are not answered rightly are left out, and those that lack a role
            are left out of its cells.
        seed: which prompts.

    Raises:
        ValueError: no prompt is answered rightly.
    """
    rng = random.Random(f"truth {seed}")
    subjects = [*world.subjects_of("harmful"), *world.subjects_of("benign")]
    frames = phrasings().trained_frames
    examples = [
        world.ask(subject, rng, frames=frames, jailbreak=rng.choice(world.trained_jailbreaks(subject)))
        for _ in range(n)
        for subject in rng.sample(subjects, 3)
    ]
    right = answered_exactly(model, tokenizer, examples)
    triples = [examples[i : i + 3] for i in range(0, len(examples), 3) if all(right[i : i + 3])]
    if not triples:
        raise ValueError("the model answers none of its questions rightly; train it longer")
    base, donor_examples, third_examples = (list(group) for group in zip(*triples, strict=True))
    cells = []
    for layer in range(model.config.num_hidden_layers):
        donors, thirds = (
            _donor_run(model, tokenizer, group, layer) for group in (donor_examples, third_examples)
        )
        for role in READING_ORDER:
            cell = _measure_cell(model, tokenizer, base, donors, thirds, role, layer)
            if cell:
                cells.append(cell)
    return cells


@dataclass(frozen=True, slots=True, eq=False)
class _DonorRun:
    """Prompts, and the residual stream of their runs after one block."""

    examples: Sequence[Example]
    prompts: Sequence[Prompt]
    states: Float[Tensor, "prompt token d_model"]


def _donor_run(model: LlamaForCausalLM, tokenizer: Any, examples: Sequence[Example], layer: int) -> _DonorRun:
    prompts = [tokenize(tokenizer, example.request) for example in examples]
    return _DonorRun(examples, prompts, states_after(model, make_batch(tokenizer, examples), layer))


def _measure_cell(
    model: LlamaForCausalLM,
    tokenizer: Any,
    base: Sequence[Example],
    donors: _DonorRun,
    thirds: _DonorRun,
    role: Role,
    layer: int,
) -> CellTruth | None:
    """What the interchange of one cell does; None where no base prompt and its donor have the role."""
    prompts = [tokenize(tokenizer, example.request) for example in base]
    chosen = [
        i for i, prompt in enumerate(prompts) if prompt.positions(role) and donors.prompts[i].positions(role)
    ]
    if not chosen:
        return None
    # each: row of the batch, position in it, and the state to put there
    patches: list[tuple[int, int, Tensor]] = []
    for row, i in enumerate(chosen):
        positions, donor_positions = prompts[i].positions(role), donors.prompts[i].positions(role)
        for k in range(1, min(len(positions), len(donor_positions)) + 1):  # aligned at the role's end
            patches.append((row, positions[-k], donors.states[i, donor_positions[-k]]))
        if role == "subject_last":
            start, third_span = prompts[i].subject_spans[-1][0], thirds.prompts[i].subject_spans[-1]
            for k, position in enumerate(range(start, positions[0])):
                patches.append((row, position, thirds.states[i, min(third_span[0] + k, third_span[1] - 2)]))
    rows, positions, states = zip(*patches, strict=True)
    index, new_states = (torch.tensor(rows), torch.tensor(positions)), torch.stack(states)

    def share_answering_as(examples: Sequence[Example]) -> float:
        expected = [replace(base[i], answer=examples[i].answer) for i in chosen]
        right = rows_answered_exactly(
            model,
            make_batch(tokenizer, expected),
            layer=layer,
            patch=lambda residual: residual.index_put(index, new_states),
        )
        return sum(right) / len(chosen)

    switched = share_answering_as(donors.examples)
    return CellTruth(role, layer, switched, 1 - share_answering_as(base), len(chosen))
