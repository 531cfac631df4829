"""C = E[k k^T] and E[k]: what the keys of a layer look like in general, so that an edit keeps away from them.

Streamed over a corpus in one pass for all layers asked for, and cached by the hashes of the weights,
the config and the corpus. The package's corpus was sampled from smollm2 itself (analyses/corpus.py): chat
turns and answers, so that C holds keys of subjects too, and requests with dangerous words in harmless use.
"""

import warnings
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.context_length import context_length
from lens_defense.models.fingerprint import Fingerprint, model_fingerprint
from lens_defense.models.prefix_batch import states_of_rows
from lens_defense.progress import ProgressBar
from lens_defense.prompts.conversation import tokenize_conversation, tokenize_text
from lens_defense.prompts.corpus import Corpus, CorpusText, read_corpus
from lens_defense.sites import key_hook
from lens_defense.storage import cached

KEYS_PER_DIMENSION = 2
"""Keys that a corpus should have for each of a key's dimensions."""
Covariances = dict[int, Float[Tensor, "d_in d_in"]]
"""By layer."""


def key_covariances(
    model: TransformerBridge,
    layers: Sequence[int],
    corpus: Corpus | None = None,
    *,
    batch_size: int = 16,
    fingerprint: Fingerprint | None = None,
    cache: bool = True,
    progress: bool = True,
) -> Covariances:
    """C of each layer over all tokens of a corpus, in one pass.

    Args:
        model: the model.
        layers: whose MLP output matrices' keys are meant.
        corpus: see read_corpus; None takes the package's own.
        batch_size: texts that run together.
        fingerprint: model_fingerprint(model), where it is known; only the cache needs it.
        cache: keep the result on disk, by the hashes of weights, config and corpus.
        progress: shows a bar.
    """
    corpus = read_corpus() if corpus is None else corpus
    fingerprint = fingerprint or (model_fingerprint(model) if cache else Fingerprint(""))
    token_ids = corpus_token_ids(model, corpus)
    streamed: Covariances = {}

    def make(layer: int) -> dict[str, Tensor]:
        if not streamed:  # one pass for this layer and all after it
            remaining = layers[layers.index(layer) :]
            streamed.update(_stream(model, remaining, token_ids, batch_size, progress))
        return {"covariance": streamed[layer]}

    return {
        layer: cached(
            "covariances",
            [fingerprint.parts("weights", "config"), layer, token_ids],
            lambda layer=layer: make(layer),
            enabled=cache,
        )["covariance"]
        for layer in layers
    }


@torch.no_grad()
def mean_key(
    model: TransformerBridge,
    layer: int,
    corpus: Corpus | None = None,
    *,
    batch_size: int = 16,
    cache: bool = True,
    progress: bool = True,
) -> Float[Tensor, " d_in"]:
    """E[k] of a layer over all tokens of a corpus, in one pass, on the CPU; the arguments are those of C."""
    token_ids = corpus_token_ids(model, read_corpus() if corpus is None else corpus)

    def make() -> dict[str, Tensor]:
        total, tokens = torch.zeros(()).double(), 0
        with ProgressBar("mean key", len(token_ids), unit="text", shown=progress) as bar:
            for keys in iterate_keys(model, [layer], token_ids, batch_size=batch_size):
                rows = torch.cat(keys[layer])
                total, tokens = total + rows.double().sum(0).cpu(), tokens + len(rows)
                bar.update(min(batch_size, len(token_ids) - bar.done))
        return {"mean_key": (total / tokens).float()}

    fingerprint = model_fingerprint(model) if cache else Fingerprint("")
    parts = [fingerprint.parts("weights", "config"), layer, token_ids]
    return cached("mean_keys", parts, make, enabled=cache)["mean_key"]


def shrink_covariances(
    model: TransformerBridge, covariances: Covariances, corpus: Corpus | None, ridge: float = 0.0
) -> Covariances:
    """C as an edit uses it: mixed with a multiple of the identity where the corpus has few keys.

    With n keys of width d, the share 1 - n / (2 d) of C, if that is more than the ridge, is replaced by
    (tr C / d) I, and a warning says so. Directions that a small corpus does not show would look free, and an
    edit would write there.

    Args:
        model: whose tokenizer counts the keys.
        covariances: by layer.
        corpus: what they were taken over; None is the package's own.
        ridge: the share that is replaced however many keys there are.
    """
    corpus = read_corpus() if corpus is None else corpus
    width, keys = len(next(iter(covariances.values()))), 0
    for text in corpus:
        keys += len(_token_ids(model, text))
        if keys >= KEYS_PER_DIMENSION * width:  # as many as matter
            break
    share = 1 - keys / (KEYS_PER_DIMENSION * width)
    if share > ridge:
        warnings.warn(
            f"the corpus has {keys} tokens, too few for keys of width {width}: {share:.0%} of C is replaced "
            f"by a multiple of the identity; give {KEYS_PER_DIMENSION * width} tokens or more",
            stacklevel=3,
        )
    share = max(share, ridge)
    if not share:
        return covariances
    return {
        layer: (1 - share) * covariance + share * covariance.diagonal().mean() * torch.eye(width)
        for layer, covariance in covariances.items()
    }


@torch.no_grad()
def _stream(
    model: TransformerBridge,
    layers: Sequence[int],
    token_ids: Sequence[tuple[int, ...]],
    batch_size: int,
    progress: bool,
) -> Covariances:
    sums: dict[int, Tensor] = {}
    tokens = 0
    with ProgressBar("covariance", len(token_ids), unit="text", shown=progress) as bar:
        for keys in iterate_keys(model, layers, token_ids, batch_size=batch_size):
            for layer in layers:
                rows = torch.cat(keys[layer]).float()
                sums[layer] = sums.get(layer, 0) + (rows.T @ rows).double()
            tokens += sum(map(len, keys[layers[0]]))
            bar.update(min(batch_size, len(token_ids) - bar.done))
    return {layer: (total / tokens).float().cpu() for layer, total in sums.items()}


def iterate_keys(
    model: TransformerBridge,
    layers: Sequence[int],
    token_ids: Sequence[tuple[int, ...]],
    *,
    batch_size: int = 16,
) -> Iterator[dict[int, list[Float[Tensor, "token d_in"]]]]:
    """Keys of some layers over texts, shortest first: per batch and layer, a tensor for each text.

    The chat template's tokens count as any other: the first one is an attention sink whose key is many times
    longer than the rest, and an edit that C does not keep away from it breaks every answer.
    """
    texts = sorted(token_ids, key=lambda ids: (len(ids), ids))
    hooks = [key_hook(layer) for layer in layers]
    for start in range(0, len(texts), batch_size):
        states = states_of_rows(
            model, texts[start : start + batch_size], hooks, stop_at_layer=max(layers) + 1
        )
        yield {layer: states[key_hook(layer)] for layer in layers}


def corpus_token_ids(model: TransformerBridge, corpus: Corpus) -> list[tuple[int, ...]]:
    """The tokens of each text of a corpus, as many as the model's context holds."""
    return [_token_ids(model, text) for text in corpus]


def _token_ids(model: TransformerBridge, text: CorpusText) -> tuple[int, ...]:
    ids = (
        tokenize_conversation(model.tokenizer, text.user, text.assistant)
        if text.assistant
        else tokenize_text(model.tokenizer, text.user)
    )
    return ids[: context_length(model)]
