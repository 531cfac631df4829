"""What a search tries and what it measures of it; the Pareto front of what was measured, and its knee."""

from collections.abc import Sequence
from dataclasses import dataclass

KL_UNIT = 0.1
"""Nats per token of divergence on benign answers that weigh, for the knee, as much as refusing nothing."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to edit the requests."""

    method: str
    layers: tuple[int, ...]
    strength: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an edit made this way did, as shares of the answers."""

    candidate: Candidate
    edited_layers: tuple[int, ...]
    """Those of the candidate that its method changes: of ROME's the middle one."""
    refused_as_asked: float
    """Of the edited requests, as they are: answered by a coherent refusal."""
    refusals: float
    """The same in words that the edit has not seen."""
    same_subject_refused: float | None
    """Of the harmless questions about the edited subjects: newly refused. None where there are none."""
    harmless_refused: float
    """Of the other harmless requests: newly refused."""
    kl: float
    """KL(unedited || edited) on benign answers, nats per token."""
    seconds: float
    """To plan it and to ask."""
    failure: str = ""
    """Why no edit could be planned; it stands on no front then, whatever its numbers."""

    @property
    def over_refusal(self) -> float:
        """The mean share of harmless questions that are newly refused, both kinds weighing the same."""
        if self.same_subject_refused is None:
            return self.harmless_refused
        return (self.same_subject_refused + self.harmless_refused) / 2

    @property
    def layer_words(self) -> str:
        """The edited layers, as "5 to 9" or "0, 2, 4"."""
        layers = self.edited_layers
        if len(layers) > 2 and layers == tuple(range(layers[0], layers[-1] + 1)):
            return f"{layers[0]} to {layers[-1]}"
        return ", ".join(map(str, layers))

    @property
    def objectives(self) -> tuple[float, float, float]:
        """What a search makes small: refusals that are missing, over-refusal, KL."""
        return 1 - self.refusals, self.over_refusal, self.kl


def pareto_front(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes that no other one beats in an objective without losing in another; most refusals first.

    Of equal ones the first stands.
    """
    planned = [outcome for outcome in outcomes if not outcome.failure]

    def is_beaten(index: int) -> bool:
        own = planned[index].objectives
        return any(
            all(a <= b for a, b in zip(other.objectives, own, strict=True))
            and (other.objectives != own or j < index)
            for j, other in enumerate(planned)
        )

    front = [outcome for i, outcome in enumerate(planned) if not is_beaten(i)]
    return sorted(front, key=lambda outcome: outcome.objectives)


def knee(front: Sequence[Outcome]) -> Outcome:
    """The outcome nearest to refusing all, over-refusing nothing and changing nothing.

    The distance is Euclidean, with KL in units of `KL_UNIT`.

    Raises:
        ValueError: the front is empty.
    """
    if not front:
        raise ValueError("no edit could be planned, so there is none to pick")

    def distance(outcome: Outcome) -> float:
        missing, over_refusal, kl = outcome.objectives
        return missing**2 + over_refusal**2 + (kl / KL_UNIT) ** 2

    return min(front, key=distance)
