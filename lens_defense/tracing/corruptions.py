"""How the subject is taken out of a prompt: noise on its embeddings, ablation, or another subject.

A Corruption is any callable (clean embeddings [1, token, d_model], Prompt) -> [sample, token,
d_model], the same prompt with its subject spoiled, once a sample.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.forward import forward, model_device
from lens_defense.prompts.prompt import Prompt, UnfitRequest, prompt, request
from lens_defense.sites import EMBEDDING_HOOK

Embeddings = Float[Tensor, "sample token d_model"]
Corruption = Callable[[Float[Tensor, "1 token d_model"], Prompt], Embeddings]


def noise(model: TransformerBridge, *, scale: float = 3.0, samples: int = 3, seed: int = 0) -> Corruption:
    """Gaussian noise on the embeddings of the subject's tokens (Meng et al. 2022, section 2.1).

    Args:
        model: gives the unit: the standard deviation of the whole embedding matrix, as the model scales it
            (gemma's by the root of its width).
        scale: in these units; ROME's tracer takes 3.
        samples: how many draws a request.
        seed: with the request's text it fixes the draws, whatever else is traced.
    """
    deviation = float(model.embed.weight.detach().float().std())

    def corrupt(embeddings: Float[Tensor, "1 token d_model"], met: Prompt) -> Embeddings:
        where = list(met.corrupted)
        shape = (samples, len(where), embeddings.shape[-1])
        unit = deviation * _scale(model, embeddings, met)
        draw = torch.randn(shape, generator=_generator(seed, met)) * (unit * scale)
        out = embeddings.repeat(samples, 1, 1)
        out[:, where] += draw.to(out)
        return out

    corrupt.__name__ = f"noise of {scale:g} standard deviations, seed {seed}"
    return corrupt


def ablation(
    model: TransformerBridge,
    how: Literal["zero", "mean", "resample"] = "mean",
    *,
    samples: int = 3,
    seed: int = 0,
) -> Corruption:
    """The subject's embeddings put to nothing, to the vocabulary's mean, or to those of random tokens.

    Args:
        model: gives the embedding matrix.
        how: "zero" and "mean" give one sample; "resample" draws tokens of the vocabulary.
        samples: how many draws a request, for "resample".
        seed: with the request's text it fixes the draws.
    """
    if how not in ("zero", "mean", "resample"):
        raise ValueError(f"how must be zero, mean or resample, got {how!r}")

    def corrupt(embeddings: Float[Tensor, "1 token d_model"], met: Prompt) -> Embeddings:
        matrix = model.embed.weight.detach()
        where = list(met.corrupted)
        out = embeddings.repeat(samples if how == "resample" else 1, 1, 1)
        if how == "resample":
            drawn = torch.randint(len(matrix), (samples, len(where)), generator=_generator(seed, met))
            scale = _scale(model, embeddings, met)
            out[:, where] = (matrix[drawn.to(matrix.device)] * scale).to(out)
        else:
            out[:, where] = 0 if how == "zero" else (matrix.mean(0) * _scale(model, embeddings, met)).to(out)
        return out

    corrupt.__name__ = f"{how} ablation" + (f", seed {seed}" if how == "resample" else "")
    return corrupt


def _scale(model: TransformerBridge, embeddings: Float[Tensor, "1 token d_model"], met: Prompt) -> float:
    """What the model multiplies its embedding matrix by (gemma's root of the width, else 1)."""
    where = list(met.corrupted)
    own = model.embed.weight.detach()[[met.ids[at] for at in where]].double()
    return float(embeddings[0, where].detach().double().norm() / own.norm().clamp(min=1e-12))


def _generator(seed: int, met: Prompt) -> torch.Generator:
    return torch.Generator().manual_seed(seed + zlib.crc32(met.request.text.encode()))


def replacement(model: TransformerBridge, *, samples: int = 1, subjects: Sequence[str] = ()) -> Corruption:
    """Symmetric token replacement: a harmless subject of the same token length (Zhang & Nanda 2024).

    Args:
        model: gives the embeddings.
        samples: how many replacements a request.
        subjects: what to choose from; empty takes the request's counterfactual or, without one, the
            package's list of harmless subjects.
    """

    def corrupt(embeddings: Float[Tensor, "1 token d_model"], met: Prompt) -> Embeddings:
        given = met.request.counterfactual
        choice = subjects or ([given] if given else harmless_subjects())
        rows = list(_same_length(model, met, choice, samples))
        if len(rows) < samples:
            raise UnfitRequest(
                f"request {met.request.id!r}: {len(rows)} of {len(choice)} subjects have the token "
                f"length of {met.request.subject!r}, and {samples} are wanted; give the request a "
                "counterfactual of that length, or ask for fewer samples"
            )
        ids = torch.tensor(rows, device=model_device(model))
        with torch.no_grad():
            return forward(model, ids, names=[EMBEDDING_HOOK], stop=1).states[EMBEDDING_HOOK].to(embeddings)

    corrupt.__name__ = "token replacement"
    return corrupt


def counterfactual(model: TransformerBridge, texts: Mapping[str, str]) -> Corruption:
    """The whole prompt replaced by a given one of the same token length, whatever differs in it.

    Args:
        model: gives the embeddings.
        texts: the other request's text, by the id of each request.
    """

    def corrupt(embeddings: Float[Tensor, "1 token d_model"], met: Prompt) -> Embeddings:
        text = texts.get(met.request.id)
        if text is None:
            raise UnfitRequest(f"request {met.request.id!r} has no counterfactual prompt; give it a text")
        other = prompt(model.tokenizer, request(text, id=met.request.id), chat=met.chat)
        if len(other.ids) != len(met.ids):
            raise UnfitRequest(
                f"request {met.request.id!r} has {len(met.ids)} tokens and its counterfactual prompt "
                f"{len(other.ids)}; give one of the same length"
            )
        ids = torch.tensor([other.ids], device=model_device(model))
        with torch.no_grad():
            return forward(model, ids, names=[EMBEDDING_HOOK], stop=1).states[EMBEDDING_HOOK].to(embeddings)

    corrupt.__name__ = "counterfactual prompt"
    return corrupt


def harmless_subjects() -> list[str]:
    """The package's list of harmless things to put in a subject's place."""
    text = files("lens_defense").joinpath("data/harmless_subjects.txt").read_text("utf-8")
    return text.split("\n")[: text.count("\n")]


def _same_length(
    model: TransformerBridge, met: Prompt, subjects: Sequence[str], samples: int
) -> list[tuple[int, ...]]:
    """Token ids of the prompt with other subjects, where no other token moves."""
    rows: list[tuple[int, ...]] = []
    fixed = [i for i in range(len(met.ids)) if i not in met.corrupted]
    for subject in subjects:
        try:
            other = prompt(model.tokenizer, replace(met.request, subject=subject), chat=met.chat)
        except ValueError:  # this candidate's edge falls inside a token: it does not fit
            continue
        aligned = len(other.ids) == len(met.ids) and other.subjects == met.subjects
        if aligned and other.ids not in (met.ids, *rows) and all(other.ids[i] == met.ids[i] for i in fixed):
            rows.append(other.ids)
        if len(rows) == samples:
            break
    return rows
