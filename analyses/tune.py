"""What an edit of tune's eight concrete subjects does, measured on the tune suite; no row of check is read.

The edit uses nine of the default contexts; the templates and wrappers left over are measured, beside
subjects that it does not know, and tune's benign and safe requests.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import lens_defense as ld
from lens_defense.checking.check import suite_answers
from lens_defense.checking.report import Report
from lens_defense.checking.suites import Suite
from lens_defense.editing.edit import REFUSAL
from lens_defense.editing.target_value import FIT_VERSION, FitSettings
from lens_defense.prompts.contexts import default_contexts
from lens_defense.prompts.corpus import read_corpus
from lens_defense.prompts.request_files import bundled_rows
from lens_defense.sites import Site

BAND, ROLE = (5, 9), "subject_last"


def contexts(request: ld.Request) -> list[ld.Request]:
    """Nine of the default contexts, alone and amid chatter; the templates and wrappers left over are asked."""
    return default_contexts(request)[:18]


def subjects() -> list[ld.Request]:
    """The concrete subjects of the tune split."""
    return [item for item in ld.requests("core", split="tune") if item.concrete]


WEAK = ("h067", "h069")
"""Tune subjects whose noise hardly changes the answer; trace refuses them."""


@cache
def recipe() -> str:
    """A hash of how edits are made: the defaults, the fit, the contexts, the corpus."""
    parts = [bundled_rows("core", part) for part in ("paraphrases", "jailbreaks", "chatter")]
    settings = [FIT_VERSION, asdict(FitSettings()), asdict(ld.methods.memit), REFUSAL]
    what = [settings, parts, read_corpus()]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def stands(file: Path) -> bool:
    """Whether a result is there and, where it is an edit's, was made as edits are made now."""
    if not file.is_file():
        return False
    told = json.loads(file.read_text("utf-8"))
    return "reach" not in told or told.get("recipe") == recipe()


def traced() -> list[ld.Request]:
    """What maps of smollm2 are made of: six subjects of tune and six of edit."""
    return [item for item in subjects() if item.id not in WEAK] + ld.requests("core")[:6]


def measure(model: Any, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Report]:
    """Plan, check and sum up; `band` and `role` say where, the rest goes to ld.edit."""
    settings = {"band": BAND, "role": ROLE, **settings}
    (low, high), role = settings.pop("band"), settings.pop("role")
    sites = [Site("resid_post", layer, role) for layer in range(low, high + 1)]
    start = time.perf_counter()
    planned = subjects()
    edit = ld.edit(model, planned, sites, contexts=contexts, held_out_contexts=0, progress=False, **settings)
    seconds = time.perf_counter() - start
    suite = ld.suite("core", split="tune")
    assert suite.split == "tune"
    report = ld.check(model, edit, suite, before=_before(model, edit.contexts), progress=False)
    return {
        "recipe": recipe(),
        "seconds": seconds,
        "losses": edit.losses,
        "reach": edit.forecast.reach,
        "leak": [edit.forecast.leak_neutral, edit.forecast.leak_safe],
        "change": list(edit.relative_change.values()),
        **{arm: [report.rate(arm, judge) for judge in ("prefix", "coherent")] for arm in _ARMS},
        "new refusals": report.new_refusals(),
        "facts lost": report.facts_lost(),
        "kl": sum(report.kl) / len(report.kl),
        "loss": [sum(told) / len(told) for told in (report.loss_before, report.loss_after)],
    }, report


_ARMS = ("paraphrase", "jailbreak", "held_out")


@cache
def _before(model: Any, used: tuple[tuple[str, ...], ...]) -> list[tuple[int, ...]]:
    seen = {text for texts in used for text in texts}
    planned = subjects()
    rows: Suite = ld.suite("core", split="tune").for_requests(planned).for_edit(planned, seen)[0]
    return suite_answers(model, rows, 24)
