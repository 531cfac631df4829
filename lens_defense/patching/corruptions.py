"""Corruptions: how the subject is taken out of a prompt, as values that carry their samples and their seed.

A Corruption is any callable (model, clean embeddings [1, token, d_model], Prompt) -> [sample, token,
d_model]: the embeddings of the same prompt with its subject corrupted, one row per sample.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.forward import forward, model_device
from lens_defense.prompts.prompt import Prompt, tokenize
from lens_defense.prompts.request import UnfitRequest, request
from lens_defense.sites import EMBEDDING_HOOK

CleanEmbeddings = Float[Tensor, "1 token d_model"]
Embeddings = Float[Tensor, "sample token d_model"]
Corruption = Callable[[TransformerBridge, CleanEmbeddings, Prompt], Embeddings]


@dataclass(frozen=True, slots=True)
class GaussianNoise:
    """Gaussian noise on the embeddings of the subject's tokens (Meng et al. 2022, section 2.1)."""

    scale: float = 3.0
    """In standard deviations of the whole embedding matrix, as the model scales it; ROME takes 3."""
    samples: int = 3
    """Draws per request."""
    seed: int = 0
    """With the request's text it fixes the draws, whatever else is traced."""

    def __post_init__(self) -> None:
        _refuse_no_samples(self.samples)

    def __call__(self, model: TransformerBridge, clean: CleanEmbeddings, prompt: Prompt) -> Embeddings:
        """The embeddings with the subject corrupted, one row per sample."""
        positions = list(prompt.subject_positions)
        shape = (self.samples, len(positions), clean.shape[-1])
        deviation = float(model.embed.weight.detach().float().std()) * _embedding_scale(model, clean, prompt)
        noise = torch.randn(shape, generator=_generator(self.seed, prompt)) * (deviation * self.scale)
        corrupted = clean.repeat(self.samples, 1, 1)
        corrupted[:, positions] += noise.to(corrupted)
        return corrupted

    def __str__(self) -> str:
        return f"noise of {self.scale:g} standard deviations, {self.samples} samples, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class ZeroAblation:
    """The subject's embeddings set to zero: one sample."""

    def __call__(self, _model: TransformerBridge, clean: CleanEmbeddings, prompt: Prompt) -> Embeddings:
        """The embeddings with the subject corrupted, one row per sample."""
        corrupted = clean.clone()
        corrupted[:, list(prompt.subject_positions)] = 0
        return corrupted

    def __str__(self) -> str:
        return "zero ablation"


@dataclass(frozen=True, slots=True)
class MeanAblation:
    """The subject's embeddings set to the mean of the vocabulary's: one sample."""

    def __call__(self, model: TransformerBridge, clean: CleanEmbeddings, prompt: Prompt) -> Embeddings:
        """The embeddings with the subject corrupted, one row per sample."""
        mean = model.embed.weight.detach().mean(0) * _embedding_scale(model, clean, prompt)
        corrupted = clean.clone()
        corrupted[:, list(prompt.subject_positions)] = mean.to(corrupted)
        return corrupted

    def __str__(self) -> str:
        return "mean ablation"


@dataclass(frozen=True, slots=True)
class ResampleAblation:
    """The subject's embeddings replaced by those of random tokens of the vocabulary."""

    samples: int = 3
    """Draws per request."""
    seed: int = 0
    """With the request's text it fixes the draws."""

    def __post_init__(self) -> None:
        _refuse_no_samples(self.samples)

    def __call__(self, model: TransformerBridge, clean: CleanEmbeddings, prompt: Prompt) -> Embeddings:
        """The embeddings with the subject corrupted, one row per sample."""
        matrix = model.embed.weight.detach()
        positions = list(prompt.subject_positions)
        shape = (self.samples, len(positions))
        tokens = torch.randint(len(matrix), shape, generator=_generator(self.seed, prompt))
        embeddings = matrix[tokens.to(matrix.device)] * _embedding_scale(model, clean, prompt)
        corrupted = clean.repeat(self.samples, 1, 1)
        corrupted[:, positions] = embeddings.to(corrupted)
        return corrupted

    def __str__(self) -> str:
        return f"resample ablation, {self.samples} samples, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class TokenReplacement:
    """Symmetric token replacement: a harmless subject of the same token length (Zhang & Nanda 2024)."""

    samples: int = 1
    """Replacements per request."""
    subjects: Sequence[str] = ()
    """What to choose from; empty takes the request's `counterfactual` or, without one, the package's list."""

    def __post_init__(self) -> None:
        _refuse_no_samples(self.samples)

    def __call__(self, model: TransformerBridge, clean: CleanEmbeddings, prompt: Prompt) -> Embeddings:
        """The embeddings with the subject corrupted, one row per sample."""
        counterfactual = prompt.request.counterfactual
        subjects = self.subjects or ([counterfactual] if counterfactual else harmless_subjects())
        rows = _same_length_prompts(model, prompt, subjects, self.samples)
        if len(rows) < self.samples:
            raise UnfitRequest(
                f"request {prompt.request.id!r}: {len(rows)} of {len(subjects)} subjects have the token "
                f"length of {prompt.request.subject!r}, and {self.samples} are wanted; give the request a "
                "counterfactual of that length, or ask for fewer samples"
            )
        return _embed(model, rows).to(clean)

    def __str__(self) -> str:
        return f"token replacement, {self.samples} samples"


@dataclass(frozen=True, slots=True)
class CounterfactualPrompt:
    """The whole prompt replaced by another one of the same token length, whatever differs in it."""

    texts: Mapping[str, str]
    """The other request's text, by the id of each request."""

    def __call__(self, model: TransformerBridge, clean: CleanEmbeddings, prompt: Prompt) -> Embeddings:
        """The embeddings with the subject corrupted, one row per sample."""
        text = self.texts.get(prompt.request.id)
        if text is None:
            raise UnfitRequest(f"request {prompt.request.id!r} has no counterfactual prompt; give it a text")
        other = tokenize(model.tokenizer, request(text, id=prompt.request.id), chat=prompt.chat)
        if len(other.ids) != len(prompt.ids):
            raise UnfitRequest(
                f"request {prompt.request.id!r} has {len(prompt.ids)} tokens and its counterfactual prompt "
                f"{len(other.ids)}; give one of the same length"
            )
        return _embed(model, [other.ids]).to(clean)

    def __str__(self) -> str:
        return "counterfactual prompt"


def harmless_subjects() -> list[str]:
    """The package's list of harmless things to put in a subject's place."""
    text = files("lens_defense").joinpath("data/harmless_subjects.txt").read_text("utf-8")
    return text.removesuffix("\n").split("\n")


def _refuse_no_samples(samples: int) -> None:
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")


@torch.no_grad()
def _embed(model: TransformerBridge, rows: Sequence[Sequence[int]]) -> Embeddings:
    ids = torch.tensor(rows, device=model_device(model))
    return forward(model, ids, capture=[EMBEDDING_HOOK], stop_at_layer=1).states[EMBEDDING_HOOK]


def _embedding_scale(model: TransformerBridge, clean: CleanEmbeddings, prompt: Prompt) -> float:
    """What the model multiplies its embedding matrix by (gemma's root of the width, else 1)."""
    positions = list(prompt.subject_positions)
    rows = model.embed.weight.detach()[[prompt.ids[position] for position in positions]].double()
    return float(clean[0, positions].detach().double().norm() / rows.norm().clamp(min=1e-12))


def _generator(seed: int, prompt: Prompt) -> torch.Generator:
    return torch.Generator().manual_seed(seed + zlib.crc32(prompt.request.text.encode()))


def _same_length_prompts(
    model: TransformerBridge, prompt: Prompt, subjects: Sequence[str], samples: int
) -> list[tuple[int, ...]]:
    """Token ids of the prompt with other subjects, where no other token moves."""
    rows: list[tuple[int, ...]] = []
    unchanged = [i for i in range(len(prompt.ids)) if i not in prompt.subject_positions]
    for subject in subjects:
        try:
            other = tokenize(model.tokenizer, prompt.request.renamed(subject), chat=prompt.chat)
        except ValueError:  # this candidate's edge falls inside a token: it does not fit
            continue
        aligned = len(other.ids) == len(prompt.ids) and other.subject_spans == prompt.subject_spans
        same_text = aligned and all(other.ids[i] == prompt.ids[i] for i in unchanged)
        if same_text and other.ids not in (prompt.ids, *rows):
            rows.append(other.ids)
        if len(rows) == samples:
            break
    return rows
