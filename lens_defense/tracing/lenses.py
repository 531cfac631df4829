"""Other maps with the face of a Trace: the logit lens, and how DINM and LED find their layers.

None of them patches a state: a cell is a share from 0 to 1 of something else, which the Trace's `measure`
says. So `locate(..., by="cells")`, `heatmap` and the statistics read them like any map.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import logit_lens as readout

from lens_defense.models.forward import forward, model_device
from lens_defense.models.generate import generate
from lens_defense.models.mlp_output import weights_fingerprint
from lens_defense.prompts.conversation import decode_answer, tokenize_answer
from lens_defense.prompts.prompt import Prompt, tokenize
from lens_defense.prompts.request import Request, validated_requests
from lens_defense.sites import component_hook
from lens_defense.tracing.clean_corrupted import prompts_with_answers
from lens_defense.tracing.site_map import ScoreMap


@torch.no_grad()
def logit_lens(
    model: TransformerBridge,
    requests: Sequence[Request],
    *,
    answers: Sequence[str] | None = None,
    chat: bool = True,
) -> ScoreMap:
    """What every state would say if the model stopped there: the logit lens (nostalgebraist 2020).

    A cell is the probability of the answer's first token, read from the residual stream after a layer at a
    token through the final norm and the unembedding (TransformerLens's tool).

    Args:
        model: any TransformerBridge with a norm and an unembedding at its end; it is not changed.
        requests: what is asked; each with a subject.
        answers: one a request; None takes the request's `target` or the model's own greedy answer.
        chat: False asks without the model's chat template.

    Raises:
        ValueError: a request without a subject, or of the split "check".
    """
    prompts = prompts_with_answers(model, validated_requests(requests), answers, answer_tokens=1, chat=chat)
    told = []
    for met in prompts:
        ids = torch.tensor([met.ids], device=model_device(model))
        read = readout(model, ids, positions=None, targets=[met.answer_ids[0]], return_type="probs")
        told.append(read.values[1:, 0, :, 0])  # entry 0 is the embeddings
    return _map(model, prompts, told, "the logit lens: probability of the first token")


@torch.no_grad()
def toxic_layers(
    model: TransformerBridge,
    requests: Sequence[Request],
    safe: str,
    *,
    answers: Sequence[str] | None = None,
    answer_tokens: int = 8,
    chat: bool = True,
) -> ScoreMap:
    """How far the states of a safe and of an unsafe answer lie apart, layer by layer (DINM's toxic layer).

    ||h_unsafe - h_safe|| of the residual stream at the last token of prompt and answer, over its largest in
    any layer; Wang et al. 2024, "Detoxifying large language models via knowledge editing", edit the layer
    where it is largest. It names a layer and no token, so it stands at the role "last".

    Args:
        model: any TransformerBridge; it is not changed.
        requests: what is asked; each with a subject.
        safe: the safe answer.
        answers: the unsafe ones, one a request; None takes the model's own.
        answer_tokens: how much of each answer is read.
        chat: False asks without the model's chat template.

    Raises:
        ValueError: a request without a subject, or of the split "check"; the model's answer is the safe one.
    """
    prompts = prompts_with_answers(
        model, validated_requests(requests), answers, answer_tokens=answer_tokens, chat=chat
    )
    hooks = [component_hook("resid_post", layer) for layer in range(model.cfg.n_layers)]
    told = []
    for met in prompts:
        wanted = tokenize_answer(model.tokenizer, safe, chat=met.chat)[:answer_tokens]
        if tuple(wanted) == met.answer_ids[: len(wanted)]:
            raise ValueError(
                f"the answer to {met.request.id!r} is the safe one already; leave the request out, or "
                "give an unsafe answer"
            )
        ends = []
        for answer in (met.answer_ids[:answer_tokens], wanted):
            ids = torch.tensor([[*met.ids, *answer]], device=model_device(model))
            held = forward(model, ids, capture=hooks).states
            ends.append(torch.stack([held[hook][0, -1] for hook in hooks]).double())
        apart = (ends[0] - ends[1]).norm(dim=1)
        told.append(_at_last(apart / apart.max(), met))
    return _map(model, prompts, told, "distance of safe and unsafe states, over the largest")


@torch.no_grad()
def safety_layers(
    model: TransformerBridge,
    requests: Sequence[Request],
    judge: Callable[[str, str], str],
    *,
    width: int = 1,
    tokens: int = 12,
    chat: bool = True,
    progress: bool = True,
) -> ScoreMap:
    """Which layers a refusal needs: 1 where it is gone without them (LED's first step).

    `width` layers from each on are passed over, and the request is asked again; Zhao et al. 2024,
    "Defending large language models against jailbreak attacks via layer-specific editing", call those
    whose loss turns refusals into answers safety layers. It names layers
    and no token, so it stands at the role "last".

    Args:
        model: any TransformerBridge; it is not changed.
        requests: what is asked; each with a subject, and refused by the model.
        judge: says "refusal" of a request and its answer, as `ld.judges.prefix` does.
        width: layers that are passed over at once.
        tokens: the most tokens of an answer.
        chat: False asks without the model's chat template.
        progress: shows a bar.

    Raises:
        ValueError: a request without a subject, of the split "check", or not refused by the model.
    """
    prompts = [tokenize(model.tokenizer, item, chat=chat) for item in validated_requests(requests)]

    def refused() -> list[bool]:
        told = generate(model, [met.ids for met in prompts], max_new_tokens=tokens)
        texts = (decode_answer(model.tokenizer, answer) for answer in told)
        return [judge(met.request.text, text) == "refusal" for met, text in zip(prompts, texts, strict=True)]

    complied = [met.request.id for met, yes in zip(prompts, refused(), strict=True) if not yes]
    if complied:
        raise ValueError(
            f"the model does not refuse {', '.join(complied[:8])}, and safety layers are those that a "
            "refusal needs; leave these requests out"
        )
    depth = model.cfg.n_layers
    gone = []
    for layer in tqdm(range(depth), desc="layers", disable=not progress):
        with _passed_over(model, range(layer, min(depth, layer + width))):
            gone.append([float(not yes) for yes in refused()])
    told = [_at_last(column, met) for column, met in zip(torch.tensor(gone).T, prompts, strict=True)]
    return _map(model, prompts, told, "refusals lost without the layer")


@contextmanager
def _passed_over(model: TransformerBridge, layers: Sequence[int]) -> Iterator[None]:
    """Inside, some blocks add nothing to the residual stream."""
    hooks = [component_hook(component, layer) for component in ("attn_out", "mlp_out") for layer in layers]
    with model.hooks(fwd_hooks=[(hook, lambda state, **_: torch.zeros_like(state)) for hook in hooks]):
        yield


def _at_last(values: Float[Tensor, " layer"], met: Prompt) -> Float[Tensor, "layer position"]:
    """A map of one prompt that has only its last token."""
    told = torch.full((len(values), len(met.ids)), float("nan"), dtype=torch.float64)
    told[:, -1] = values.cpu()
    return told


def _map(
    model: TransformerBridge,
    prompts: Sequence[Prompt],
    scores_by_prompt: Sequence[Float[Tensor, "layer _"]],
    quantity: str,
) -> ScoreMap:
    """The scores of each prompt's positions as one map."""
    width, n_layers = max(len(prompt.ids) for prompt in prompts), model.cfg.n_layers
    scores = torch.full((len(prompts), 1, n_layers, width), float("nan"), dtype=torch.float64)
    for r, values in enumerate(scores_by_prompt):
        scores[r, 0, :, : values.shape[1]] = values.double().cpu()
    return ScoreMap(
        prompts=tuple(prompts),
        components=("resid_post",),
        layers=tuple(range(n_layers)),
        model=str(model.cfg.model_name),
        model_layers=n_layers,
        fingerprint=weights_fingerprint(model),
        scores=scores,
        quantity=quantity,
    )
