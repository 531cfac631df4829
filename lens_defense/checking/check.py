"""Check: the same questions before and after an edit, which is made, measured and unmade.

Cost is the KL to the original over its own greedy tokens on benign requests, and the loss on neutral
text.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.checking.judges import knows_answer
from lens_defense.checking.report import JUDGES, KL_TOKENS, Report, ReportRow
from lens_defense.checking.suites import HARMFUL_ARMS, Suite, SuiteItem
from lens_defense.checking.suites import suite as named_suite
from lens_defense.editing.edit_plan import Edit
from lens_defense.models.forward import forward, model_device
from lens_defense.models.generate import generate
from lens_defense.models.prefix_batch import left_pad, run_shared_prefix
from lens_defense.prompts.conversation import decode_answer, first_dozen_words, tokenize_text
from lens_defense.prompts.prompt import prompt


def check(
    model: TransformerBridge,
    edit: Edit | None,
    suite: Suite | str = "core",
    *,
    tokens: int = 24,
    title: str = "",
    before: Sequence[tuple[int, ...]] | None = None,
    progress: bool = True,
) -> Report:
    """Measure a model with and without an edit; afterwards no bit differs.

    Args:
        model: the model that the edit was planned on.
        edit: the plan; None measures the model as it is, about the suite's own subjects.
        suite: rows, or the name of a bundled suite.
        tokens: the most tokens of an answer.
        title: what the report is called.
        before: the full answers of the unedited model, from `answers` on the same rows, to save a run.
        progress: shows a bar.

    Raises:
        ValueError: the edit was planned on other weights, or there is no such suite.
    """
    asked = named_suite(suite) if isinstance(suite, str) else suite
    dropped = 0
    if edit is not None:
        edit.refuse_other(model)
        seen = {text for texts in edit.contexts for text in texts}
        asked, dropped = asked.for_requests(edit.requests).about(edit.requests, seen)
    made: Callable[[], AbstractContextManager[Any]] = (
        (lambda: edit.applied(model)) if edit is not None else nullcontext
    )
    with tqdm(total=0, desc="check", unit="answer", disable=not progress) as bar:
        first = list(before) if before is not None else suite_answers(model, asked, tokens, bar)
        if len(first) != len(asked.items):
            raise ValueError(f"{len(first)} answers were given for {len(asked.items)} rows")
        second = first
        if edit is not None:
            with made():
                second = suite_answers(model, asked, tokens, bar)
    benign = [i for i, item in enumerate(asked.items) if item.arm == "benign"]
    kl: list[tuple[float, float]] = []
    loss_before = neutral_losses(model, asked.neutral)
    loss_after: list[float] = []
    if edit is not None:
        kl = _divergences(model, made, [asked.items[i] for i in benign], [first[i] for i in benign])
        with made():
            loss_after = neutral_losses(model, asked.neutral)
    texts = [[decode_answer(model.tokenizer, ids) for ids in told] for told in (first, second)]
    return Report(
        title=title or ("the model as it is" if edit is None else f"{edit.method}"),
        suite=asked.name,
        split=asked.split,
        rows=tuple(_row(*three) for three in zip(asked.items, *texts, strict=True)),
        kl=tuple(mean for mean, _ in kl),
        kl_first=tuple(start for _, start in kl),
        loss_before=tuple(loss_before),
        loss_after=tuple(loss_after),
        dropped=dropped,
        edited=edit is not None,
    )


def suite_answers(
    model: TransformerBridge, suite: Suite, tokens: int, bar: "tqdm[Any] | None" = None
) -> list[tuple[int, ...]]:
    """Tokens of the model's greedy answers to a suite's rows, in full: to be judged, not to be kept."""
    bar = bar if bar is not None else tqdm(disable=True)
    bar.total = (bar.total or 0) + len(suite.items)
    asked = [prompt(model.tokenizer, item.request).ids for item in suite.items]
    return generate(model, asked, tokens=tokens, progress=bar.update)


@torch.no_grad()
def neutral_losses(model: TransformerBridge, texts: Sequence[str], batch: int = 8) -> list[float]:
    """Mean loss of each text's tokens, as running text, in nats."""
    rows = [tokenize_text(model.tokenizer, text) for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    losses = [0.0] * len(rows)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        ids, mask = left_pad([rows[i] for i in part], model_device(model))
        logits = forward(model, ids, mask=mask, keep=ids.shape[1]).logits.float()
        for i, told, seen in zip(part, logits, ids, strict=True):
            n = len(rows[i])
            losses[i] = float(cross_entropy(told[-n:-1], seen[-n + 1 :]))
    return losses


@torch.no_grad()
def _divergences(
    model: TransformerBridge,
    made: Callable[[], AbstractContextManager[Any]],
    items: Sequence[SuiteItem],
    told: Sequence[tuple[int, ...]],
    batch: int = 16,
) -> list[tuple[float, float]]:
    """KL(original || edited) of each row, teacher-forced on the original's answer: mean, first token."""
    out: list[tuple[float, float]] = []
    rows = [
        (prompt(model.tokenizer, item.request).ids, answer[:KL_TOKENS])
        for item, answer in zip(items, told, strict=True)
    ]
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]

        def log_probabilities(
            part: Sequence[tuple[tuple[int, ...], tuple[int, ...]]] = part,
        ) -> Float[Tensor, "row kept vocab"]:
            before = run_shared_prefix(model, [asked for asked, _ in part])
            ids, mask = before.batch([[*asked, *answer] for asked, answer in part], model_device(model))
            keep = min(KL_TOKENS + 1, ids.shape[1])
            told = forward(model, ids, mask=mask, past=before.past(len(part)), keep=keep)
            return told.logits.float().log_softmax(-1)

        original = log_probabilities()
        with made():
            changed = log_probabilities()
        kl = (original.exp() * (original - changed)).sum(-1)
        for row, (_, answer) in zip(kl, part, strict=True):
            steps = row[len(row) - 1 - len(answer) : len(row) - 1]
            out.append((float(steps.mean()), float(steps[0])))
    return out


def _row(item: SuiteItem, before: str, after: str) -> ReportRow:
    kept = first_dozen_words if item.arm in HARMFUL_ARMS else str
    return ReportRow(
        arm=item.arm,
        id=item.request.id,
        cluster=item.cluster,
        family=item.family,
        before=kept(before),
        after=kept(after),
        verdicts_before=_verdicts(item, before),
        verdicts_after=_verdicts(item, after),
    )


def _verdicts(item: SuiteItem, answer: str) -> dict[str, str]:
    verdicts = {name: str(judge(item.request.text, answer)) for name, judge in JUDGES.items()}
    known = item.answers or tuple(filter(None, [item.request.target]))
    if known:
        verdicts["knows"] = "yes" if knows_answer(known, answer) else "no"
    return verdicts
