"""The truth about the organism: which cells hold a subject, measured by strict interchange.

A cell is a role and a block. The states that another prompt, about another subject, has there after that
block are put into a prompt's run, every token of the role at once. Where the subject is kept, the answer
becomes the other subject's; where it is not, nothing changes. Strict: at the subject's last token, the states
of the subject's other tokens are a third subject's at the same time (Gupta et al. 2024).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lens_defense.organism.interchange import (
    InterchangeBatch,
    answer_logits,
    answered_exactly,
    make_batch,
    rows_answered_exactly,
    states_after,
)
from lens_defense.organism.phrasings import TRAINED_FRAMES
from lens_defense.organism.world import Example, World
from lens_defense.prompts.prompt import READING_ORDER, Role, prompt

HOLDS, EMPTY = 0.95, 0.03
"""From which share of switched answers on a cell holds the subject; up to which share of changed ones not."""


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
    """
    rng = random.Random(f"truth {seed}")
    known = [*world.of("harmful"), *world.of("benign")]
    asked = [
        world.ask(one, rng, frames=TRAINED_FRAMES, wrapper=rng.choice(world.trained_wrappers(one)))
        for _ in range(n)
        for one in rng.sample(known, 3)
    ]
    right = answered_exactly(model, tokenizer, asked)
    triples = [asked[i : i + 3] for i in range(0, len(asked), 3) if all(right[i : i + 3])]
    if not triples:
        raise ValueError("the model answers none of its questions rightly; train it longer")
    base, sources, thirds = ([three[k] for three in triples] for k in range(3))
    facts = []
    for layer in range(model.config.num_hidden_layers):
        donors = [_States(model, tokenizer, examples, layer) for examples in (sources, thirds)]
        for role in READING_ORDER:
            fact = _fact(model, tokenizer, base, donors, role, layer)
            if fact:
                facts.append(fact)
    return facts


class _States:
    """The residual stream of some prompts after a block, and where each role stands in them."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: Any, examples: Sequence[Example], layer: int):
        self.examples = examples
        self.met = [prompt(tokenizer, example.request) for example in examples]
        self.states = states_after(model, make_batch(tokenizer, examples), layer)


def _fact(
    model: LlamaForCausalLM,
    tokenizer: Any,
    base: Sequence[Example],
    donors: Sequence[_States],
    role: Role,
    layer: int,
) -> CellTruth | None:
    met = [prompt(tokenizer, example.request) for example in base]
    rows = [i for i, one in enumerate(met) if one.positions(role) and donors[0].met[i].positions(role)]
    if not rows:
        return None
    moves: list[tuple[int, int, Tensor]] = []
    for row, i in enumerate(rows):
        own, other = met[i].positions(role), donors[0].met[i].positions(role)
        for k in range(1, min(len(own), len(other)) + 1):  # aligned at the role's end
            moves.append((row, own[-k], donors[0].states[i, other[-k]]))
        if role == "subject_last":
            first, last = donors[1].met[i].subjects[-1]
            for k, position in enumerate(range(met[i].subjects[-1][0], own[0])):
                moves.append((row, position, donors[1].states[i, min(first + k, last - 2)]))
    where = torch.tensor([move[0] for move in moves]), torch.tensor([move[1] for move in moves])
    moved = torch.stack([move[2] for move in moves])

    def write(residual: Tensor) -> Tensor:
        return residual.index_put(where, moved)

    def share(answers: Sequence[Example]) -> float:
        told = [replace(base[i], answer=answers[i].answer) for i in rows]
        return sum(_told(model, make_batch(tokenizer, told), layer, write)) / len(rows)

    return CellTruth(role, layer, share(donors[0].examples), 1 - share(base), len(rows))


def _told(
    model: LlamaForCausalLM, batch: InterchangeBatch, layer: int, write: Callable[[Tensor], Tensor]
) -> list[bool]:
    return rows_answered_exactly(batch, *answer_logits(model, batch, after=layer, write=write))
