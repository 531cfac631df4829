"""C = E[k k^T]: what the keys of a layer look like in general, so that an edit keeps away from it.

Streamed over a corpus in one pass for all layers asked for, and cached by the hashes of the weights
and of the corpus. The package's corpus was sampled from smollm2 itself (analyses/corpus.py): chat
turns and answers, so that C holds keys of subjects too, and requests with dangerous words in harmless use.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.load import cache_folder
from lens_defense.models.mlp_output import weights_fingerprint
from lens_defense.models.prefix_batch import states_of_rows
from lens_defense.prompts.conversation import tokenize_conversation, tokenize_text
from lens_defense.prompts.request_files import BUNDLED_SETS, bundled_rows, file_rows
from lens_defense.sites import key_hook
from lens_defense.storage import atomic_write

Moments = dict[int, Float[Tensor, "d_in d_in"]]


class CorpusText(NamedTuple):
    """A turn of a user and its answer; an empty answer makes plain running text of the first."""

    user: str
    assistant: str = ""


Corpus = Sequence[CorpusText]


def read_corpus(source: str | os.PathLike[str] | None = None, *, rows: int = 2000) -> Corpus:
    """The corpus of a bundled set, a text or table file, or a hub data set with a column `text`.

    Args:
        source: None for "core", or "organism"; a .txt file (a paragraph a text), a .jsonl, .json, .csv
            or .parquet file (`text`, or `user` and `assistant`); else the name of a hub data set.
        rows: the most texts taken of a hub data set.

    Raises:
        ValueError: there is no such corpus, it is empty, or a row of it is no object.
    """
    source = "core" if source is None else source
    if source in BUNDLED_SETS:
        return [_text(row) for row in bundled_rows(str(source), "corpus")]
    path = Path(source)
    if path.suffix in (".jsonl", ".json", ".csv", ".parquet") and path.is_file():
        found = [_text(row) for _, row in file_rows(path)]
    elif path.is_file():
        found = [CorpusText(part.strip()) for part in path.read_text("utf-8").split("\n\n")]
    else:
        from datasets import load_dataset

        try:
            stream = load_dataset(str(source), split="train", streaming=True).take(rows)
            found = [_text(dict(row)) for row in stream]
        except Exception as error:
            raise ValueError(
                f"{str(source)!r} is no file and the hub gives no such data set: {error}"
            ) from error
    found = [text for text in found if text.user]
    if not found:
        raise ValueError(f"the corpus {str(source)!r} is empty")
    return found


def key_covariances(
    model: TransformerBridge,
    layers: Sequence[int],
    corpus: Corpus | None = None,
    *,
    batch: int = 16,
    cache: bool = True,
    progress: bool = True,
) -> Moments:
    """C of each layer over all tokens of a corpus, in one pass.

    Args:
        model: the model.
        layers: whose MLP output matrices' keys are meant.
        corpus: see read_corpus; None takes the package's own.
        batch: texts that run together.
        cache: keep the result on disk, by the hashes of weights and corpus.
        progress: shows a bar.
    """
    corpus = read_corpus() if corpus is None else corpus
    what = [weights_fingerprint(model), [_ids(model, text) for text in corpus]]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    folder = cache_folder() / "moments" / key
    files_of = {layer: folder / f"{layer}.safetensors" for layer in layers}
    found = {layer: load_file(file)["moment"] for layer, file in files_of.items() if cache and file.is_file()}
    missing = [layer for layer in layers if layer not in found]
    if missing:
        made = _streamed(model, missing, corpus, batch, progress)
        found |= made
        for layer in made if cache else ():
            with atomic_write(files_of[layer]) as file:
                save_file({"moment": made[layer]}, file)
    return {layer: found[layer] for layer in layers}


@torch.no_grad()
def _streamed(
    model: TransformerBridge, layers: Sequence[int], corpus: Corpus, batch: int, progress: bool
) -> Moments:
    sums: dict[int, Tensor] = {}
    count = 0
    with tqdm(total=len(corpus), desc="moments", unit="text", disable=not progress) as bar:
        for keys in iterate_keys(model, layers, corpus, batch=batch):
            for layer in layers:
                rows = torch.cat(keys[layer]).float()
                sums[layer] = sums.get(layer, 0) + (rows.T @ rows).double()
            count += sum(map(len, keys[layers[0]]))
            bar.update(min(batch, len(corpus) - bar.n))
    return {layer: (total / count).float().cpu() for layer, total in sums.items()}


def iterate_keys(
    model: TransformerBridge, layers: Sequence[int], corpus: Corpus, *, batch: int = 16
) -> Iterator[dict[int, list[Float[Tensor, "token d_in"]]]]:
    """Keys of some layers over a corpus, text by text, shortest texts first.

    The chat template's tokens count as any other: the first one is an attention sink whose key is many
    times longer than the rest, and an edit that C does not keep away from it breaks every answer.
    """
    texts = sorted((_ids(model, text) for text in corpus), key=lambda ids: (len(ids), ids))
    for start in range(0, len(texts), batch):
        some = texts[start : start + batch]
        held = states_of_rows(model, some, [key_hook(layer) for layer in layers], stop=max(layers) + 1)
        yield {layer: held[key_hook(layer)] for layer in layers}


def _ids(model: TransformerBridge, text: CorpusText) -> tuple[int, ...]:
    if text.assistant:
        return tokenize_conversation(model.tokenizer, text.user, text.assistant)
    return tokenize_text(model.tokenizer, text.user)


def _text(row: dict[str, Any]) -> CorpusText:
    return CorpusText(str(row.get("user") or row.get("text") or ""), str(row.get("assistant") or ""))
