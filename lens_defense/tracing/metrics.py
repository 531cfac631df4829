"""What a patch is measured by: a Metric reads the answer's logits and gives one number a row.

A Metric is any callable (logits [row, answer, vocab], Prompt with answer ids, clean logits [1,
answer, vocab]) -> [row]. The answer is teacher-forced: logits at step i predict answer token i.
"""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.devices import index_tensor
from lens_defense.prompts.conversation import tokenize_answer
from lens_defense.prompts.prompt import Prompt, has_chat_template

Logits = Float[Tensor, "row answer vocab"]
Clean = Float[Tensor, "1 answer vocab"]
Metric = Callable[[Logits, Prompt, Clean], Float[Tensor, " row"]]


def answer_logprob(logits: Logits, prompt: Prompt, _clean: Clean) -> Float[Tensor, " row"]:
    """Log probability of the whole answer, summed over its tokens, in nats."""
    answer = index_tensor(prompt.answer_ids, logits.device).expand(len(logits), -1)
    told = logits.gather(-1, answer[..., None])[..., 0]
    return (told - logits.logsumexp(-1)).sum(-1)


def answer_probability(logits: Logits, prompt: Prompt, _clean: Clean) -> Float[Tensor, " row"]:
    """Probability of the answer's first token, ROME's metric for facts."""
    return logits[:, 0].softmax(-1)[:, prompt.answer_ids[0]]


def kl_to_clean(logits: Logits, _prompt: Prompt, clean: Clean) -> Float[Tensor, " row"]:
    """KL(clean || row), mean over the answer's tokens, in nats; the clean run's own is 0."""
    told, wanted = logits.log_softmax(-1), clean.log_softmax(-1)
    return (wanted.exp() * (wanted - told)).sum(-1).mean(-1)


def logit_diff(model: TransformerBridge, against: str) -> Metric:
    """Logit of the answer's first token less that of another answer's, at the first step."""

    def metric(logits: Logits, prompt: Prompt, _clean: Clean) -> Float[Tensor, " row"]:
        other = tokenize_answer(model.tokenizer, against, chat=prompt.chat)[0]
        return logits[:, 0, prompt.answer_ids[0]] - logits[:, 0, other]

    metric.__name__ = f"answer_difference against {against!r}"
    return metric


def refusal_logit_diff(
    model: TransformerBridge,
    *,
    refusals: Sequence[str] = ("I'm sorry", "Sorry", "I can't", "Unfortunately"),
    compliances: Sequence[str] = ("Sure", "Here", "Certainly", "To", "1."),
) -> Metric:
    """Mean logit of the first tokens of refusals less that of compliant openings, at the first step."""

    def first_tokens(texts: Sequence[str]) -> list[int]:
        chat = has_chat_template(model.tokenizer)
        return sorted({tokenize_answer(model.tokenizer, text, chat=chat)[0] for text in texts})

    against, towards = first_tokens(refusals), first_tokens(compliances)

    def metric(logits: Logits, _prompt: Prompt, _clean: Clean) -> Float[Tensor, " row"]:
        refused, complied = (index_tensor(some, logits.device) for some in (against, towards))
        return logits[:, 0, refused].mean(-1) - logits[:, 0, complied].mean(-1)

    metric.__name__ = "refusal_difference"
    return metric
