"""What an edit of tune's eight concrete subjects does, measured on the tune suite; no row of check is read.

The edit uses nine of the default contexts; the paraphrases and jailbreaks left over are measured, beside
held-out subjects, and tune's benign and safe requests.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from tidy import read_table, rows_where

import lens_defense as ld
from lens_defense.checking.check import suite_answers
from lens_defense.editing.solving.target_value import FIT_VERSION, REFUSAL
from lens_defense.prompts.contexts import default_contexts
from lens_defense.prompts.request_files import bundled_rows
from lens_defense.sites import Site

LAYERS, ROLE = (5, 9), "subject_last"
"""Where edits are made unless a setting says otherwise: the first and the last layer."""
ARMS = ("paraphrase", "jailbreak", "held_out")
TOO_WEAK = ("h067", "h069")
"""Tune subjects whose noise hardly changes the answer; trace refuses them."""


def contexts(request: ld.Request) -> list[ld.Request]:
    """Nine of the default contexts, alone and amid chatter; those left over are asked."""
    return default_contexts(request)[:18]


def subjects() -> list[ld.Request]:
    """The concrete subjects of the tune split."""
    return [item for item in ld.requests("core", split="tune") if item.concrete]


def traced_requests() -> list[ld.Request]:
    """What maps of smollm2 are made of: six subjects of tune and six of edit."""
    return [item for item in subjects() if item.id not in TOO_WEAK] + ld.requests("core")[:6]


@cache
def recipe() -> str:
    """A hash of how edits are made: the defaults of the fit and the method, the contexts, the corpus."""
    settings = [FIT_VERSION, asdict(ld.FitSettings()), asdict(ld.methods.memit), REFUSAL]
    contexts_from = [bundled_rows("core", name) for name in ("paraphrases", "jailbreaks", "chatter")]
    text = json.dumps([settings, contexts_from, ld.read_corpus()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_made(path: Path, **key: Any) -> bool:
    """Whether a table has a row of this key that was made as edits are made now."""
    return bool(rows_where(read_table(path), {**key, "recipe": recipe()}).any())


def measure(model: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Plan an edit, check it and sum it up in one row.

    `layers` (first and last) and `role` say where, fields of FitSettings how it is fitted; the rest goes to ld.edit.
    """
    settings = {"layers": LAYERS, "role": ROLE, **settings}
    (first, last), role = settings.pop("layers"), settings.pop("role")
    fit_names = asdict(ld.FitSettings())
    fit = ld.FitSettings(**{name: settings.pop(name) for name in [*settings] if name in fit_names})
    sites = [Site("resid_post", layer, role) for layer in range(first, last + 1)]
    start = time.perf_counter()
    edit = ld.edit(
        model, subjects(), sites, contexts=contexts, held_out_contexts=0, fit=fit, progress=False, **settings
    )
    seconds = time.perf_counter() - start
    before = _answers_before(model, edit.contexts)
    report = ld.check(model, edit, ld.suite("core", split="tune"), before=before, progress=False)
    return {
        **{f"{arm}_{judge}": report.rate(arm, judge) for arm in ARMS for judge in ("prefix", "coherent")},
        "new_refusals": report.new_refusals(),
        "facts_lost": report.facts_lost(),
        "kl": _mean(report.kl),
        "loss_before": _mean(report.loss_before),
        "loss_after": _mean(report.loss_after),
        "leak_neutral": edit.forecast.leak_neutral,
        "leak_safe": edit.forecast.leak_safe,
        "reach": _mean(edit.forecast.reach),
        "target_loss": _mean(edit.losses),
        "relative_change": max(edit.relative_change.values()),
        "seconds": seconds,
        "recipe": recipe(),
    }


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


@cache
def _answers_before(model: Any, contexts: tuple[tuple[str, ...], ...]) -> list[tuple[int, ...]]:
    """The unedited model's answers, which all settings share."""
    texts = {text for request_contexts in contexts for text in request_contexts}
    suite = ld.suite("core", split="tune").for_requests(subjects()).for_edit(subjects(), texts)[0]
    return suite_answers(model, suite, 24)
