"""Losses of answers that a model is made to give, token by token: what methods that tune are made of."""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AnswerLogits:
    """What a model says at the places where answers stand; a row is one prompt with its answer.

    Answers end at the last column. What stands before the first token of a shorter one is no target.
    """

    logits: Float[Tensor, "row token vocab"]
    """At each place, of the token that stands there: computed from the prompt and the answer before it."""
    targets: Int[Tensor, "row token"]
    is_target: Bool[Tensor, "row token"]

    def row_means(self, values: Float[Tensor, "row token"]) -> Float[Tensor, " row"]:
        """The mean over each answer's tokens."""
        return (values * self.is_target).sum(1) / self.is_target.sum(1)


def teacher_forced_losses(answers: AnswerLogits) -> Float[Tensor, " row"]:
    """Nats per token of each answer, each token behind those before: mean over t of -log p(y_t | x, y_<t)."""
    log_probs = answers.logits.log_softmax(-1).gather(-1, answers.targets[..., None])[..., 0]
    return answers.row_means(-log_probs)


def first_place_losses(answers: AnswerLogits) -> Float[Tensor, " row"]:
    """Nats per token of each answer, every token expected at its first place: mean over t of -log p(y_t | x).

    The loss of the fine-tuning baseline in ROME's release. It is right for answers of one token; of longer
    ones it makes all tokens likely first ones.
    """
    places = answers.is_target.int().argmax(1)
    first = answers.logits[range(len(places)), places].log_softmax(-1)
    return answers.row_means(-first.gather(-1, answers.targets))


def kl_from(before: Float[Tensor, "row token vocab"], answers: AnswerLogits) -> Float[Tensor, " row"]:
    """KL(before || now) of the next token, mean over each answer's places; `before` are logits as well."""
    log_before = before.log_softmax(-1)
    differences = log_before.exp() * (log_before - answers.logits.log_softmax(-1))
    return answers.row_means(differences.sum(-1))
