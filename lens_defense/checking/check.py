"""Check: ask a suite before and after an edit, judge the answers, and measure what the edit cost.

The edit is applied, measured and undone; the weights end as they were, to the bit. Any other defense that is
a `with` block is measured in the same way (defense.py). Cost is the divergence KL(unedited || edited) on
benign requests, teacher-forced on the unedited model's own greedy answers, and the loss on neutral text.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.arguments import wrong_argument
from lens_defense.checking.defense import Defense
from lens_defense.checking.judges import Judge, contains_word, knows_answer
from lens_defense.checking.report import JUDGES, KL_TOKENS, Report, ReportRow
from lens_defense.checking.suites import HARMFUL_ARMS, Suite, SuiteItem
from lens_defense.checking.suites import suite as bundled_suite
from lens_defense.editing.edit_plan import Edit
from lens_defense.editing.ledger.ledger import Ledger
from lens_defense.loading.resolve_model import Model, resolve_model
from lens_defense.models.context_length import refuse_too_long
from lens_defense.models.forward import forward, model_device
from lens_defense.models.generate import generate
from lens_defense.models.language import language
from lens_defense.models.prefix_batch import left_pad, run_shared_prefix
from lens_defense.progress import ProgressBar
from lens_defense.prompts.chat_template import bound_arguments
from lens_defense.prompts.conversation import decode_answer, first_dozen_words, tokenize_text
from lens_defense.prompts.prompt import tokenize

Side = Callable[[], AbstractContextManager[object]]
"""Makes a `with` block in which the model is as it is to be measured."""
_CALL = "ld.check(model, edit, suite)"


def check(
    model: Model,
    edit: Edit | Ledger | Defense | None,
    suite: Suite | str | None = None,
    *,
    max_new_tokens: int = 100,
    title: str = "",
    before: Sequence[tuple[int, ...]] | None = None,
    judges: Mapping[str, Judge] | None = None,
    progress: bool = True,
) -> Report:
    """Measure a model before and after an edit; the weights end as they were, to the bit.

    Args:
        model: the model that the edit was planned on, or a name for `load`.
        edit: the plan; or a ledger, whose edits are set aside for the unedited model, and measured together;
            or another Defense. None measures the model as it is, about the suite's own subjects.
        suite: a suite, or the name of a bundled one; None takes the one in the model's language. It is
            asked about the edit's subjects, without the texts
            that the edit used.
        max_new_tokens: the greatest length of an answer. Short ones are judged too kindly: a refusal, or a
            turn away from one, may come late.
        title: what to call the report.
        before: the unedited model's full answers to the same rows, from `suite_answers`. Saves a run.
        judges: further judges by name, beside `prefix` and `coherent`: see checking/judges.py.
        progress: shows a bar.

    Raises:
        ValueError: the edit was planned on other weights, no edit stands in the ledger or it is of another
            model, there is no such suite, or `before` is of another
            length than the rows; a row with its answer, or a neutral text, is too long for the model.
        TypeError: an argument is something else, as where two are swapped.
    """
    model = resolve_model(model, _CALL)
    if not isinstance(edit, Edit | Ledger | Defense | None):
        requirement = "edit must be an Edit, as ld.edit gives it, a Ledger, a Defense, or None"
        raise wrong_argument(_CALL, requirement, edit)
    edits, unedited, edited = _sides(model, edit)
    suite = language(model) if suite is None else suite
    if not isinstance(suite, Suite | str):
        raise wrong_argument(_CALL, "suite must be a Suite or the name of one", suite)
    all_judges = {**JUDGES, **(judges or {})}
    rows, dropped = bundled_suite(suite) if isinstance(suite, str) else suite, 0
    if edits:
        rows, dropped = rows_for_edits(rows, edits)
    neutral = _neutral_ids(model, rows.neutral)
    with ProgressBar("check", 0, unit="answer", shown=progress) as bar:
        with unedited():
            ids_before = (
                list(before) if before is not None else suite_answers(model, rows, max_new_tokens, bar)
            )
            if len(ids_before) != len(rows.items):
                raise ValueError(f"{len(ids_before)} answers were given for {len(rows.items)} rows")
            loss_before = _neutral_losses(model, neutral)
        ids_after, loss_after, divergences = ids_before, [], []
        if edits:
            with edited():
                ids_after = suite_answers(model, rows, max_new_tokens, bar)
                loss_after = _neutral_losses(model, neutral)
            benign = [i for i, item in enumerate(rows.items) if item.arm == "benign"]
            prompts = [tokenize(model.tokenizer, rows.items[i].request).ids for i in benign]
            answers = [ids_before[i][:KL_TOKENS] for i in benign]
            divergences = _divergences(model, unedited, edited, prompts, answers)
    subjects = tuple(dict.fromkeys(subject for one in edits for subject in one.subjects)) or tuple(
        {item.subject for item in rows.items if item.arm == "edited"}
    )
    texts_before, texts_after = (
        [decode_answer(model.tokenizer, ids) for ids in answers] for answers in (ids_before, ids_after)
    )
    return Report(
        title=title or " and ".join(dict.fromkeys(one.method for one in edits)) or "the model as it is",
        suite=rows.name,
        split=rows.split,
        rows=tuple(
            _report_row(item, before, after, all_judges, subjects)
            for item, before, after in zip(rows.items, texts_before, texts_after, strict=True)
        ),
        kl=tuple(mean for mean, _ in divergences),
        kl_first=tuple(first for _, first in divergences),
        loss_before=tuple(loss_before),
        loss_after=tuple(loss_after),
        dropped=dropped,
        edited=bool(edits),
        chat_arguments=bound_arguments(model.tokenizer),
    )


def rows_for_edits(suite: Suite, edits: Sequence[Edit | Defense]) -> tuple[Suite, int]:
    """What of a suite a check of these edits asks, row by row, and how many rows are left out."""
    planned = tuple(dict.fromkeys(request for edit in edits for request in edit.requests))
    texts, names = ([text for edit in edits for text in getattr(edit, name)] for name in ("texts", "names"))
    if planned:
        suite = suite.for_requests(planned)
    else:
        planned = tuple(item.request for item in suite.items if item.arm == "edited")
    return suite.for_edit(planned, texts, names)


def _sides(
    model: TransformerBridge, edit: Edit | Ledger | Defense | None
) -> tuple[tuple[Edit | Defense, ...], Side, Side]:
    """The edits that are measured, and `with` blocks in which the model is without and with them."""
    if isinstance(edit, Ledger):
        if edit.model.original_model is not model.original_model:
            raise ValueError("this ledger is of another model; give the model that it was opened on")
        if not edit.edits:
            raise ValueError(
                "no edit stands in this ledger; apply one, or check a plan: ld.check(model, edit)"
            )
        return edit.edits, edit.set_aside, nullcontext
    if edit is None:
        return (), nullcontext, nullcontext
    if isinstance(edit, Edit):
        edit.require_same_model(model)
    return (edit,), nullcontext, partial(edit.applied, model)


def suite_answers(
    model: TransformerBridge, suite: Suite, max_new_tokens: int, bar: ProgressBar | None = None
) -> list[tuple[int, ...]]:
    """Token ids of the model's full greedy answers to a suite. Judge them, but do not publish them."""
    bar = bar or ProgressBar("check", 0, shown=False)
    bar.total = (bar.total or 0) + len(suite.items)
    prompts = [tokenize(model.tokenizer, item.request).ids for item in suite.items]
    names = [item.request.id for item in suite.items]
    return generate(model, prompts, max_new_tokens=max_new_tokens, progress=bar.update, names=names)


def _neutral_ids(model: TransformerBridge, texts: Sequence[str]) -> list[tuple[int, ...]]:
    token_ids = [tuple(tokenize_text(model.tokenizer, text)) for text in texts]
    refuse_too_long(model, ((f"neutral text {i}", len(ids)) for i, ids in enumerate(token_ids)))
    return token_ids


@torch.no_grad()
def _neutral_losses(
    model: TransformerBridge, token_ids: Sequence[tuple[int, ...]], batch_size: int = 8
) -> list[float]:
    """Mean loss of each text's tokens after the first, as running text, in nats."""
    by_length = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
    losses = [0.0] * len(token_ids)
    for start in range(0, len(token_ids), batch_size):
        batch = by_length[start : start + batch_size]
        ids, mask = left_pad([token_ids[i] for i in batch], model_device(model))
        logits = forward(model, ids, attention_mask=mask, logits_to_keep=ids.shape[1]).logits.float()
        for i, row_logits, row_ids in zip(batch, logits, ids, strict=True):
            length = len(token_ids[i])
            losses[i] = float(cross_entropy(row_logits[-length:-1], row_ids[-length + 1 :]))
    return losses


@torch.no_grad()
def _divergences(
    model: TransformerBridge,
    unedited: Side,
    edited: Side,
    prompts: Sequence[tuple[int, ...]],
    answers: Sequence[tuple[int, ...]],
    batch_size: int = 16,
) -> list[tuple[float, float]]:
    """KL(unedited || edited) along each answer: mean over its tokens, and of its first token."""
    divergences: list[tuple[float, float]] = []
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        with unedited():
            log_p = _answer_log_probabilities(model, prompts[batch], answers[batch])
        with edited():
            log_q = _answer_log_probabilities(model, prompts[batch], answers[batch])
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        for row, answer in zip(kl, answers[batch], strict=True):
            steps = row[len(row) - 1 - len(answer) : len(row) - 1]
            divergences.append((float(steps.mean()), float(steps[0])))
    return divergences


def _answer_log_probabilities(
    model: TransformerBridge, prompts: Sequence[tuple[int, ...]], answers: Sequence[tuple[int, ...]]
) -> Float[Tensor, "row step vocab"]:
    """Log-probabilities at the last KL_TOKENS + 1 tokens of prompt and answer, padded on the left."""
    prefix = run_shared_prefix(model, prompts)
    conversations = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    ids, mask = prefix.pad_suffixes(conversations, model_device(model))
    forward_pass = forward(
        model,
        ids,
        attention_mask=mask,
        past_key_values=prefix.past_key_values(len(prompts)),
        logits_to_keep=min(KL_TOKENS + 1, ids.shape[1]),
    )
    return forward_pass.logits.float().log_softmax(-1)


def _report_row(
    item: SuiteItem, before: str, after: str, judges: Mapping[str, Judge], subjects: Sequence[str]
) -> ReportRow:
    shorten = first_dozen_words if item.arm in HARMFUL_ARMS else str
    return ReportRow(
        arm=item.arm,
        id=item.request.id,
        cluster=item.cluster,
        family=item.family,
        before=shorten(before),
        after=shorten(after),
        verdicts_before=_verdicts(item, before, judges),
        verdicts_after=_verdicts(item, after, judges),
        on_word_list=any(contains_word(item.request.conversation, subject) for subject in subjects),
    )


def _verdicts(item: SuiteItem, answer: str, judges: Mapping[str, Judge]) -> dict[str, str]:
    verdicts: dict[str, str] = {name: judge(item.request.text, answer) for name, judge in judges.items()}
    accepted = item.answers or ((item.request.target,) if item.request.target else ())
    if accepted:
        verdicts["knows"] = "yes" if knows_answer(accepted, answer) else "no"
    return verdicts
