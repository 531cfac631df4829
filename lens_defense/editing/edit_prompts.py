"""What an edit reads: contexts and harmless uses, also under other names, and what is held out of both."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lens_defense.editing.contrast import Contrast
from lens_defense.editing.solving.layer_spread import PromptGroup
from lens_defense.prompts.contexts import Contexts
from lens_defense.prompts.conversation import tokenize_answer
from lens_defense.prompts.prompt import Prompt, tokenize
from lens_defense.prompts.request import Request, UnfitRequest
from lens_defense.prompts.surface_forms import Names

NAMED_CONTEXTS = 4
"""Contexts, and as many harmless uses, in which another name of a subject stands: enough to know its key."""


@dataclass(frozen=True, slots=True)
class EditPrompts:
    """By request: the prompts that the values are fitted on; in groups: those whose keys are written."""

    contexts: tuple[tuple[Prompt, ...], ...]
    written: tuple[PromptGroup, ...]
    measured: tuple[PromptGroup, ...]
    """Held-out contexts of each request; after them, with a contrast, held-out harmless uses of each."""
    names: tuple[tuple[str, ...], ...]
    """By request, the other names that could be used."""

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """Every prompt whose keys are written or measured."""
        return tuple(prompt for group in (*self.written, *self.measured) for prompt in group.prompts)

    def conversations(self, owner: int) -> tuple[str, ...]:
        """Every conversation whose keys or value the edit uses, of one request."""
        prompts = [prompt for group in self.written if group.owner == owner for prompt in group.prompts]
        return tuple(dict.fromkeys(prompt.request.conversation for prompt in prompts))


def group_prompts(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    contexts: Contexts,
    contrast: Contrast | None,
    names: Names,
    held_out: int,
    longest: int | None = None,
) -> EditPrompts:
    """Tokenize all that an edit reads.

    Args:
        tokenizer: the model's.
        requests: what shall be refused.
        contexts: ways to ask, from a request.
        contrast: harmless uses; None for none.
        names: other names, from a request. One that cannot be marked in this tokenizer's tokens is left out.
        held_out: how many contexts and harmless uses of each request, from the end, are measured alone.
        longest: the most tokens of a context or a use; longer ones are left out, but the first.

    Raises:
        ValueError: the contexts, or the contrast, give nothing for a request.
    """
    all_contexts, written, reached, leaked, all_names = [], [], [], [], []
    for owner, request in enumerate(requests):
        asked, uses = list(contexts(request)), contrast.of(request) if contrast else []
        if not asked:
            raise ValueError(f"contexts gave nothing for request {request.id!r}; give the request itself")
        if contrast and not uses:
            raise ValueError(
                f"the contrast has no harmless use of {request.subject!r}; give some, or contrast=None"
            )
        asked, uses = (_that_fit(tokenizer, items, longest) for items in (asked, uses))
        kept_asked, out_asked = _split(tokenizer, asked, held_out)
        kept_uses, out_uses = _split(tokenizer, uses, held_out)
        neighbors = _neighbors(tokenizer, kept_asked, contrast, longest) if contrast else []
        all_contexts.append(tuple(kept_asked))
        reached.append(PromptGroup(owner, out_asked or kept_asked))
        weight = contrast.weight if contrast else 1.0
        written.append(PromptGroup(owner, kept_asked, weight))
        if contrast:
            leaked.append(PromptGroup(owner, out_uses or kept_uses))
            written.append(PromptGroup(owner, [*kept_uses, *neighbors], weight, harmless=True))
        used = []
        for name in names(request):
            named = _named(tokenizer, asked[1 : len(kept_asked)] or asked, name)
            if not named:
                continue
            used.append(name)
            written.append(PromptGroup(owner, named, weight))
            if contrast and (named_uses := _named(tokenizer, uses[: len(kept_uses)], name)):
                written.append(PromptGroup(owner, named_uses, weight, harmless=True))
        all_names.append(tuple(used))
    return EditPrompts(tuple(all_contexts), tuple(written), (*reached, *leaked), tuple(all_names))


def refusal_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, refusal: str) -> tuple[int, ...]:
    """The tokens of the refusal that a prompt shall meet, its request's own or this one, with their end."""
    return tokenize_answer(tokenizer, prompt, prompt.request.safe_target or refusal, end=True)


def _that_fit(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Request], longest: int | None
) -> list[Request]:
    """The first, mostly the request as asked, which is refused if it is too long; and the others that fit."""
    if longest is None:
        return list(items)
    others = (item for item in items[1:] if len(tokenize(tokenizer, item).ids) <= longest)
    return [*items[:1], *others]


def _split(
    tokenizer: PreTrainedTokenizerBase, asked: Sequence[Request], held_out: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts that are used, at least one, and those that are held out."""
    prompts = [tokenize(tokenizer, item) for item in asked]
    split = max(1, len(prompts) - held_out)
    return prompts[:split], prompts[split:]


def _neighbors(
    tokenizer: PreTrainedTokenizerBase, contexts: Sequence[Prompt], contrast: Contrast, longest: int | None
) -> list[Prompt]:
    """The contrast's neighborhood prompts that fit, made of the contexts that are written."""
    asked = contrast.neighborhood([context.request for context in contexts])
    prompts = _markable(tokenizer, asked)
    return [prompt for prompt in prompts if longest is None or len(prompt.ids) <= longest]


def _named(tokenizer: PreTrainedTokenizerBase, asked: Sequence[Request], name: str) -> list[Prompt]:
    """Some of the texts, evenly from first to last, with another name in the subject's place.

    The request as asked is left out where there are others: under other names it is asked by `check`.
    """
    some = asked[:: max(1, len(asked) // NAMED_CONTEXTS)][:NAMED_CONTEXTS]
    return _markable(tokenizer, [item.renamed(name) for item in some])


def _markable(tokenizer: PreTrainedTokenizerBase, items: Sequence[Request]) -> list[Prompt]:
    """Prompts of the requests whose subject can be marked in this tokenizer's tokens."""
    prompts = []
    for item in items:
        try:
            prompts.append(tokenize(tokenizer, item))
        except UnfitRequest:
            continue
    return prompts
