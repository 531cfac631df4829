"""A map for somebody who waits: an estimate of every cell at once, then the cells that matter, measured."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.app.explorer.choices import METRICS, TraceChoices
from lens_defense.models.fingerprint import model_fingerprint
from lens_defense.patching.corruptions import Corruption
from lens_defense.patching.metrics import answer_logprob
from lens_defense.prompts.request import Request, Role
from lens_defense.tracing.trace import trace, trace_metrics
from lens_defense.tracing.trace_result import Trace, join_traces

SHARPENED: tuple[Role, ...] = ("subject_first", "subject_mid", "subject_last", "last")
"""Roles whose cells are measured after the estimate."""


def estimate_and_measure(
    model: TransformerBridge,
    requests: Sequence[Request],
    choices: TraceChoices,
    corruption: Corruption | None,
    *,
    show: Callable[[Trace | None, Trace], object],
    watch: Callable[[Sequence[Any]], object],
) -> None:
    """Trace a model by attribution patching, request by request, and then cell by cell.

    Args:
        model: the model, in which no edit stands.
        requests: those that are traced.
        choices: how.
        corruption: of the subject; None takes the trace's default.
        show: is called with what was measured (None before the end) and what was estimated.
        watch: is called with cells as they are measured.
    """
    fingerprint = model_fingerprint(model)

    def traced(items: Sequence[Request], **settings: Any) -> Trace:
        (made,) = trace_metrics(
            model,
            items,
            {choices.metric: METRICS[choices.metric]},
            components=choices.components,
            direction=choices.direction,
            corruption=corruption,
            layers="all",
            fingerprint=fingerprint,
            **settings,
        ).values()
        return made

    estimates: list[Trace] = []
    for item in requests:  # the first picture does not wait for the last request
        estimates.append(traced([item], positions="all", exact=False))
        show(None, join_traces(estimates))
    estimate = join_traces(estimates)
    show(traced(requests, positions=SHARPENED, answers=estimate, watch=watch), estimate)


def trace_edited(model: TransformerBridge, before: Trace, corruption: Corruption | None) -> Trace:
    """Measure the edited model with the requests, the settings and the answers of a map before."""
    return trace(
        model,
        [prompt.request for prompt in before.prompts],
        replace(before.settings, exact=True, verify=0, positions=SHARPENED, min_difference=0.0),
        metric=METRICS.get(before.metric, answer_logprob),
        corruption=corruption,
        answers=before,
    )
