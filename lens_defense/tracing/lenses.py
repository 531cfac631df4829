"""Maps that patch no state: the logit lens, and how DINM and LED find their layers.

A cell is a share from 0 to 1 of what the map's `quantity` says. `heatmap`, `locate(..., by="cells")` and
`reliability` read these maps like a Trace.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools import analysis

from lens_defense.loading.resolve_model import Model, resolve_model
from lens_defense.models.fingerprint import model_fingerprint
from lens_defense.models.forward import Hooks, forward, model_device, with_hooks
from lens_defense.models.generate import generate
from lens_defense.patching.clean_corrupted import prompts_with_answers
from lens_defense.progress import ProgressBar
from lens_defense.prompts.conversation import decode_answer, tokenize_answer
from lens_defense.prompts.prompt import Prompt, tokenize
from lens_defense.prompts.resolve_requests import Requests, requests_with_subjects
from lens_defense.shown_text import shown_names
from lens_defense.sites import component_hook
from lens_defense.tracing.site_map import ScoreMap


@torch.no_grad()
def logit_lens(
    model: Model,
    requests: Requests,
    *,
    answers: Sequence[str] | None = None,
    chat: bool = True,
) -> ScoreMap:
    """What every state would say if the model stopped there: the logit lens (nostalgebraist 2020).

    A cell is the probability of the answer's first token, read from the residual stream after a layer through
    the final norm and the unembedding, by TransformerLens's own tool.

    Args:
        model: any TransformerBridge with a norm and an unembedding at its end; it is not changed.
        requests: what is asked; each with a subject.
        answers: one per request; None takes the request's `target` or the model's own greedy answer.
        chat: False asks without the model's chat template.

    Raises:
        ValueError: a request without a subject, or of the split "check".
    """
    call = "ld.lenses.logit_lens(model, requests)"
    model, requests = resolve_model(model, call), requests_with_subjects(requests, call)
    prompts = prompts_with_answers(model, requests, answers, answer_tokens=1, chat=chat)
    probabilities = []
    for prompt in prompts:
        ids = torch.tensor([prompt.ids], device=model_device(model))
        lens = analysis.logit_lens(
            model, ids, positions=None, targets=[prompt.answer_ids[0]], return_type="probs"
        )
        probabilities.append(lens.values[1:, 0, :, 0])  # entry 0 is the embeddings
    return _score_map(model, prompts, probabilities, "the logit lens: probability of the first token")


@torch.no_grad()
def toxic_layers(
    model: Model,
    requests: Requests,
    safe: str,
    *,
    answers: Sequence[str] | None = None,
    answer_tokens: int = 8,
    chat: bool = True,
) -> ScoreMap:
    """How far the states of a safe and of an unsafe answer lie apart, layer by layer (DINM's toxic layer).

    A cell is ||h_unsafe - h_safe|| of the residual stream at the last token of prompt and answer, divided by
    its largest value in any layer. DINM edits the layer where it is largest (Wang et al. 2024, "Detoxifying
    large language models via knowledge editing"). It names a layer and no token, so it stands at the role
    "last".

    Args:
        model: any TransformerBridge; it is not changed.
        requests: what is asked; each with a subject.
        safe: the safe answer.
        answers: the unsafe answers, one per request; None takes the request's `target` or the model's own.
        answer_tokens: how much of each answer is read.
        chat: False asks without the model's chat template.

    Raises:
        ValueError: a request without a subject, or of the split "check"; an unsafe answer that is the safe
            one.
    """
    call = "ld.lenses.toxic_layers(model, requests, safe)"
    model, requests = resolve_model(model, call), requests_with_subjects(requests, call)
    prompts = prompts_with_answers(model, requests, answers, answer_tokens=answer_tokens, chat=chat)
    hooks = [component_hook("resid_post", layer) for layer in range(model.cfg.n_layers)]

    def last_states(prompt: Prompt, answer_ids: Sequence[int]) -> Float[Tensor, "layer d_model"]:
        ids = torch.tensor([[*prompt.ids, *answer_ids]], device=model_device(model))
        states = forward(model, ids, capture=hooks).states
        return torch.stack([states[hook][0, -1] for hook in hooks]).double()

    scores = []
    for prompt in prompts:
        safe_ids = tokenize_answer(model.tokenizer, prompt, safe)[:answer_tokens]
        if tuple(safe_ids) == prompt.answer_ids[: len(safe_ids)]:
            raise ValueError(
                f"the answer to {prompt.request.id!r} is the safe one already; leave the request out, or "
                "give an unsafe answer"
            )
        unsafe = last_states(prompt, prompt.answer_ids[:answer_tokens])
        distances = (unsafe - last_states(prompt, safe_ids)).norm(dim=1)
        scores.append(_at_last(distances / distances.max(), prompt))
    return _score_map(model, prompts, scores, "distance of safe and unsafe states, over the largest")


@torch.no_grad()
def safety_layers(
    model: Model,
    requests: Requests,
    judge: Callable[[str, str], str],
    *,
    width: int = 1,
    max_new_tokens: int = 12,
    chat: bool = True,
    progress: bool = True,
) -> ScoreMap:
    """Which layers a refusal needs: 1 where it is gone without them (LED's first step).

    `width` layers from each layer on are skipped, and the model answers again. LED calls layers whose loss
    turns refusals into answers safety layers (Zhao et al. 2024, "Defending large language models against
    jailbreak attacks via layer-specific editing"). It names layers and no token, so it stands at the role
    "last".

    Args:
        model: any TransformerBridge; it is not changed.
        requests: what is asked; each with a subject, and refused by the model.
        judge: from a request and its answer to a verdict, "refusal" or another, like `ld.judges.prefix`.
        width: how many layers are skipped at once.
        max_new_tokens: the most tokens of an answer.
        chat: False asks without the model's chat template.
        progress: shows a bar.

    Raises:
        ValueError: a request without a subject, of the split "check", or not refused by the model.
    """
    call = "ld.lenses.safety_layers(model, requests, judge)"
    model, requests = resolve_model(model, call), requests_with_subjects(requests, call)
    prompts = [tokenize(model.tokenizer, request, chat=chat) for request in requests]

    def refusals() -> list[bool]:
        """Per prompt, whether the model refuses it as it is now."""
        answers = generate(model, [prompt.ids for prompt in prompts], max_new_tokens=max_new_tokens)
        return [
            judge(prompt.request.text, decode_answer(model.tokenizer, answer)) == "refusal"
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    answered = [prompt.request.id for prompt, refused in zip(prompts, refusals(), strict=True) if not refused]
    if answered:
        raise ValueError(
            f"the model does not refuse {shown_names(answered)}, and safety layers are those that a "
            "refusal needs; leave these requests out"
        )
    n_layers, lost_by_layer = model.cfg.n_layers, []
    with ProgressBar("layers", n_layers, unit="layer", shown=progress) as bar:
        for layer in range(n_layers):
            skipped = range(layer, min(n_layers, layer + width))
            refused_without = with_hooks(model, _zero_hooks(skipped), refusals)
            lost_by_layer.append([float(not refused) for refused in refused_without])
            bar.update()
    lost_by_prompt = torch.tensor(lost_by_layer).T
    scores = [_at_last(lost, prompt) for lost, prompt in zip(lost_by_prompt, prompts, strict=True)]
    return _score_map(model, prompts, scores, "refusals lost without the layer")


def _zero_hooks(layers: Sequence[int]) -> Hooks:
    """With these hooks the layers add nothing to the residual stream."""
    names = [component_hook(component, layer) for component in ("attn_out", "mlp_out") for layer in layers]
    return [(name, lambda state, **_: torch.zeros_like(state)) for name in names]


def _at_last(by_layer: Float[Tensor, " layer"], prompt: Prompt) -> Float[Tensor, "layer position"]:
    """Scores by layer at the prompt's last token, NaN at the others."""
    scores = torch.full((len(by_layer), len(prompt.ids)), float("nan"), dtype=torch.float64)
    scores[:, -1] = by_layer.cpu()
    return scores


def _score_map(
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
        fingerprint=model_fingerprint(model),
        scores=scores,
        quantity=quantity,
    )
