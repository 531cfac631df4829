"""What is to be expected of an edit before it is applied: reach where it is meant, leak where it is not.

Reach: in contexts kept aside, the share of a request's vector that arrives at the top edited layer.
Leak: the norm of (change times key), summed over the edited layers, over the mean norm of a value;
the largest over a text's tokens, mean over texts; on texts of the package's corpus (which C knows) and on
safe-sounding ones (which it does not). On the latter it goes with over-refusal over edits of more and fewer
subjects at the subject's last token (analyses/results, real_model_correlations). It says nothing of other
roles: an edit at the prompt's last token leaked .126 there and had 76 of 80 harmless requests refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.editing.covariance import Corpus, CorpusText, iterate_keys, read_corpus
from lens_defense.prompts.request_files import requests

NEUTRAL_TEXTS = 32
"""Texts of the corpus that the leak is measured on."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """A table: for each subject and for the whole edit, reach and leak as shares of a value."""

    subjects: tuple[str, ...]
    reach: tuple[float, ...]
    leaks_neutral: tuple[float, ...]
    leaks_safe: tuple[float, ...]
    leak_neutral: float
    """Of the whole edit."""
    leak_safe: float
    """Of the whole edit."""

    THRESHOLD: ClassVar[float] = 0.15
    """The leak to safe-sounding text from which on an edit is called risky. On smollm2 the five edits above
    it newly refused 4 to 16% of XSTest-safe, thirteen below it at most 2.8% (real_model_dose.csv)."""

    @property
    def risky(self) -> bool:
        """Whether over-refusal is to be expected."""
        return self.leak_safe >= self.THRESHOLD

    def worst(self, k: int) -> tuple[str, ...]:
        """The subjects that leak most into safe-sounding text."""
        order = sorted(range(len(self.subjects)), key=lambda i: -self.leaks_safe[i])
        return tuple(self.subjects[i] for i in order[:k])

    def __str__(self) -> str:
        return self.to_dataframe().round(3).to_string(index=False)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a subject, and one for the whole edit."""
        mean = sum(self.reach) / len(self.reach)
        table = {
            "subject": [*self.subjects, "all"],
            "reach": [*self.reach, mean],
            "leak to neutral text": [*self.leaks_neutral, self.leak_neutral],
            "leak to safe text": [*self.leaks_safe, self.leak_safe],
        }
        return pd.DataFrame(table)

    def to_json(self) -> dict[str, Any]:
        """Plain fields."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Forecast":
        """The inverse of to_json."""
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(**{**fields, **lists})


@torch.no_grad()
def measure_forecast(
    model: TransformerBridge,
    factors: Mapping[int, tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]],
    *,
    subjects: Sequence[str],
    ranks: Sequence[int],
    reach: Sequence[float],
    value_norm: float,
) -> Forecast:
    """Measure the leaks of a change on keys of the unedited model.

    Args:
        model: the model, without the change.
        factors: left and right of each layer.
        subjects: one a request.
        ranks: for each request, which of the factors' ranks is its own.
        reach: for each request, the share of its vector that arrives.
        value_norm: mean norm of the requests' vectors, the unit of the leaks.
    """
    corpus = read_corpus()
    neutral = corpus[:: max(1, len(corpus) // NEUTRAL_TEXTS)][:NEUTRAL_TEXTS]
    # the other half of these stands in the corpus of C
    safe = [CorpusText(item.text, " ") for item in requests("core", split="tune", kind="safe")[1::2]]
    (each_neutral, all_neutral), (each_safe, all_safe) = (
        _leaks(model, factors, texts) for texts in (neutral, safe)
    )
    unit = value_norm or 1.0  # a place that cannot act gives vectors of nothing, which leak nothing
    return Forecast(
        subjects=tuple(subjects),
        reach=tuple(reach),
        leaks_neutral=tuple(float(each_neutral[rank]) / unit for rank in ranks),
        leaks_safe=tuple(float(each_safe[rank]) / unit for rank in ranks),
        leak_neutral=all_neutral / unit,
        leak_safe=all_safe / unit,
    )


def _leaks(
    model: TransformerBridge,
    factors: Mapping[int, tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]],
    corpus: Corpus,
) -> tuple[Float[Tensor, " rank"], float]:
    """Norms of (change times key) for each rank alone and for the whole: largest of a text, mean."""
    layers = sorted(factors)
    each, whole = [], []
    for keys in iterate_keys(model, layers, corpus):
        for text in zip(*(keys[layer] for layer in layers), strict=True):
            alone, together = torch.zeros(()), torch.zeros(())
            for layer, of_layer in zip(layers, text, strict=True):
                left, right = (side.to(of_layer.device) for side in factors[layer])
                strength = of_layer.float() @ right.T
                alone = alone + strength.abs() * left.norm(dim=0)
                together = together + (strength @ left.T).norm(dim=-1)
            each.append(alone.amax(0))
            whole.append(together.amax())
    return torch.stack(each).mean(0), float(torch.stack(whole).mean())
