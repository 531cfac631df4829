"""Metrics: what a patch is measured by, one number per row from the answer's logits.

The answer is teacher-forced: the logits at step i predict answer token i. Any function with the signature of
`Metric` will do.
"""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.devices import index_tensor
from lens_defense.prompts.conversation import tokenize_answer
from lens_defense.prompts.prompt import Prompt, tokenize
from lens_defense.prompts.request import request

Logits = Float[Tensor, "row answer vocab"]
CleanLogits = Float[Tensor, "1 answer vocab"]
Metric = Callable[[Logits, Prompt, CleanLogits], Float[Tensor, " row"]]
"""From the logits, the prompt with its answer, and the clean run's logits to one number per row."""
Measure = Callable[[Logits], Float[Tensor, "row metric"]]
"""One or more metrics of one prompt, as a function of its logits alone."""


def answer_logprob(logits: Logits, prompt: Prompt, _clean_logits: CleanLogits) -> Float[Tensor, " row"]:
    """Log probability of the whole answer, summed over its tokens, in nats."""
    answer_ids = index_tensor(prompt.answer_ids, logits.device).expand(len(logits), -1)
    answer_logits = logits.gather(-1, answer_ids[..., None])[..., 0]
    return (answer_logits - logits.logsumexp(-1)).sum(-1)


def answer_probability(logits: Logits, prompt: Prompt, _clean_logits: CleanLogits) -> Float[Tensor, " row"]:
    """Probability of the answer's first token, ROME's metric for facts."""
    return logits[:, 0].softmax(-1)[:, prompt.answer_ids[0]]


def kl_to_clean(logits: Logits, _prompt: Prompt, clean_logits: CleanLogits) -> Float[Tensor, " row"]:
    """KL(clean || row), mean over the answer's tokens, in nats; 0 for the clean run itself."""
    log_q, log_p = logits.log_softmax(-1), clean_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)


def logit_diff(model: TransformerBridge, against: str) -> Metric:
    """Logit of the answer's first token less that of another answer's, at the first step."""

    def metric(logits: Logits, prompt: Prompt, _clean_logits: CleanLogits) -> Float[Tensor, " row"]:
        against_id = tokenize_answer(model.tokenizer, prompt, against)[0]
        return logits[:, 0, prompt.answer_ids[0]] - logits[:, 0, against_id]

    metric.__name__ = f"logit_diff against {against!r}"
    return metric


def refusal_logit_diff(
    model: TransformerBridge,
    *,
    refusals: Sequence[str] = ("I'm sorry", "Sorry", "I can't", "Unfortunately"),
    compliances: Sequence[str] = ("Sure", "Here", "Certainly", "To", "1."),
) -> Metric:
    """Mean logit of the first tokens of refusals less that of compliant openings, at the first step."""

    def first_tokens(texts: Sequence[str]) -> list[int]:
        prompt = tokenize(model.tokenizer, request("Hello."))
        return sorted({tokenize_answer(model.tokenizer, prompt, text)[0] for text in texts})

    refusal_ids, compliance_ids = first_tokens(refusals), first_tokens(compliances)

    def metric(logits: Logits, _prompt: Prompt, _clean_logits: CleanLogits) -> Float[Tensor, " row"]:
        refusal, compliance = (index_tensor(ids, logits.device) for ids in (refusal_ids, compliance_ids))
        return logits[:, 0, refusal].mean(-1) - logits[:, 0, compliance].mean(-1)

    metric.__name__ = "refusal_logit_diff"
    return metric
