"""What is to be expected of an edit before it is applied: reach where it is meant, leak where it is not.

Reach: in held-out contexts, the share of a request's value that arrives at the highest edited layer.
Reach in harmless uses: the same in held-out harmless questions about the same subject, where it should be 0.
From about half of a value on such questions are refused too (docs/methods/contrast.md). Leak: the norm of
change times key, summed over the edited layers, over the mean norm of a value; the largest over a text's
tokens, mean over texts. It is measured on texts of the package's corpus, which C knows, and on safe-sounding
ones, which it does not. The latter correlates with over-refusal over edits of more and fewer subjects at the
subject's last token (analyses/results/tables/correlations.md). It says nothing of other roles: an edit at the
prompt's last token leaked .126 there and had 76 of 80 harmless requests refused.

Of a change times a strength, leaks are the strength times those of the change, exactly. Reach is so to first
order: the share that arrives goes through the layers between, which are not linear.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.editing.methods import Factors
from lens_defense.editing.solving.covariance import corpus_token_ids, iterate_keys
from lens_defense.prompts.corpus import Corpus, CorpusText, read_corpus
from lens_defense.prompts.request_files import requests
from lens_defense.shown_text import shown

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
    reach_harmless: tuple[float, ...] = ()
    """Of each request, in harmless uses of its subject; empty where none were given."""
    language: str = "core"
    """The bundled set whose texts the leaks were measured on."""
    strength: float = 1.0
    """What the planned change is multiplied by: see `Edit.scaled`."""
    measured: "Forecast | None" = None
    """What was measured, at strength 1, where this forecast was scaled from it."""

    THRESHOLD: ClassVar[float] = 0.15
    """The leak to safe-sounding text from which on an edit is called risky. On smollm2 the five edits above
    it newly refused 4 to 16% of XSTest-safe, thirteen below it at most 2.8% (analyses/results/tables)."""

    CONTRAST_THRESHOLD: ClassVar[float] = 0.4
    """The same for an edit with a contrast, whose leaks are more and say less: of nine edits below .33 none
    newly refused more than 2 of 40 other harmless requests, one of .51 refused 18 of 80."""

    @property
    def threshold(self) -> float:
        """The leak from which on this edit is called risky; infinite in a language where no runs tell.

        The thresholds are smollm2's, in English. The organism leaked .18 and newly refused none of 80.
        """
        if self.language != "core":
            return math.inf
        return self.CONTRAST_THRESHOLD if self.reach_harmless else self.THRESHOLD

    @property
    def risky(self) -> bool:
        """Whether over-refusal is to be expected."""
        return self.leak_safe >= self.threshold

    def scaled(self, strength: int | float) -> "Forecast":
        """The forecast of the same change times a strength, from what was measured at strength 1."""
        measured, strength = self.measured or self, self.strength * strength
        if strength == 1:
            return measured

        def times_strength(shares: Sequence[float]) -> tuple[float, ...]:
            return tuple(strength * share for share in shares)

        return replace(
            measured,
            reach=times_strength(measured.reach),
            leaks_neutral=times_strength(measured.leaks_neutral),
            leaks_safe=times_strength(measured.leaks_safe),
            leak_neutral=strength * measured.leak_neutral,
            leak_safe=strength * measured.leak_safe,
            reach_harmless=times_strength(measured.reach_harmless),
            strength=strength,
            measured=measured,
        )

    def worst(self, k: int) -> tuple[str, ...]:
        """The subjects that leak most into safe-sounding text."""
        order = sorted(range(len(self.subjects)), key=lambda i: -self.leaks_safe[i])
        return tuple(self.subjects[i] for i in order[:k])

    def __str__(self) -> str:
        return self.shown_table().to_string(index=False)

    def shown_table(self) -> pd.DataFrame:
        """The table as it is shown: rounded, names cut."""
        table = self.to_dataframe().round(3)
        return table.assign(subject=table["subject"].map(shown))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per subject, and one for the whole edit."""
        mean = sum(self.reach) / len(self.reach) if self.reach else math.nan
        table = {
            "subject": [*self.subjects, "all"],
            "reach": [*self.reach, mean],
            "leak to neutral text": [*self.leaks_neutral, self.leak_neutral],
            "leak to safe text": [*self.leaks_safe, self.leak_safe],
        }
        if self.reach_harmless:
            mean = sum(self.reach_harmless) / len(self.reach_harmless)
            table["reach in harmless uses"] = [*self.reach_harmless, mean]
        return pd.DataFrame(table)


@torch.no_grad()
def measure_forecast(
    model: TransformerBridge,
    factors: Mapping[int, Factors],
    *,
    subjects: Sequence[str],
    reach: Sequence[float],
    reach_harmless: Sequence[float],
    value_norm: float,
    language: str = "core",
) -> Forecast:
    """Measure the leaks of a change on keys of the unedited model.

    Args:
        model: the model, without the change.
        factors: the change of each layer.
        subjects: one per request.
        reach: for each request, the share of its value that arrives.
        reach_harmless: the same in harmless uses; none where none were given.
        value_norm: mean norm of the requests' values, the unit of the leaks.
        language: the bundled set whose texts the leaks are measured on; on others a leak says nothing.
    """
    corpus = read_corpus(language)
    neutral = corpus[:: max(1, len(corpus) // NEUTRAL_TEXTS)][:NEUTRAL_TEXTS]
    # the other half of these stands in the corpus of C
    safe = [CorpusText(item.text, " ") for item in requests(language, split="tune", kind="safe")[1::2]]
    (leaks_neutral, leak_neutral), (leaks_safe, leak_safe) = (
        _leaks(model, factors, len(subjects), texts) for texts in (neutral, safe)
    )
    unit = value_norm or 1.0  # values of norm 0 make a change of 0, which leaks nothing
    return Forecast(
        subjects=tuple(subjects),
        reach=tuple(reach),
        leaks_neutral=tuple((leaks_neutral / unit).tolist()),
        leaks_safe=tuple((leaks_safe / unit).tolist()),
        leak_neutral=leak_neutral / unit,
        leak_safe=leak_safe / unit,
        reach_harmless=tuple(reach_harmless),
        language=language,
    )


def _leaks(
    model: TransformerBridge, factors: Mapping[int, Factors], requests: int, corpus: Corpus
) -> tuple[Float[Tensor, " request"], float]:
    """Norms of change times key, of each request and of the whole: largest of a text, mean over texts."""
    layers = sorted(factors)
    ranks = {
        layer: [
            tuple(rank for rank, owners in enumerate(change.owners) if i in owners) for i in range(requests)
        ]
        for layer, change in factors.items()
    }
    request_leaks, whole_leaks = [], []
    for keys in iterate_keys(model, layers, corpus_token_ids(model, corpus)):
        for text_keys in zip(*(keys[layer] for layer in layers), strict=True):
            by_request, whole = torch.zeros(()), torch.zeros(())
            for layer, layer_keys in zip(layers, text_keys, strict=True):
                left, right = (side.to(layer_keys.device) for side in factors[layer][:2])
                strengths = layer_keys.float() @ right.T
                norms = {  # requests that share all ranks are computed once
                    own: (strengths[:, own] @ left[:, own].T).norm(dim=-1) for own in set(ranks[layer])
                }
                by_request = by_request + torch.stack([norms[own] for own in ranks[layer]], 1)
                whole = whole + (strengths @ left.T).norm(dim=-1)
            request_leaks.append(by_request.amax(0))
            whole_leaks.append(whole.amax())
    return torch.stack(request_leaks).mean(0), float(torch.stack(whole_leaks).mean())
