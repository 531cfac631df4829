"""The session as one HTML page, of what was checked last."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lens_defense.app.explorer.map_values import editable, with_effect
from lens_defense.app.explorer.reproduce import Session, reproducing_code
from lens_defense.app.explorer.talk import Talk
from lens_defense.app.report_page import Conversation, save_report
from lens_defense.checking.report import Report
from lens_defense.checking.suites import Suite
from lens_defense.editing.edit_plan import Edit
from lens_defense.prompts.request import Role
from lens_defense.sites import Site
from lens_defense.tracing.trace_result import Trace


@dataclass(frozen=True, slots=True)
class Checked:
    """A check that was made."""

    report: Report
    edits: tuple[Edit, ...]
    """Those that stood."""
    suite: Suite
    """What was asked."""


def session_report(
    title: str,
    checked: Checked,
    *,
    trace: Trace,
    after: Trace | None,
    sites: Sequence[Site],
    talk: Talk | None,
    session: Session,
) -> bytes:
    """The page, as `save_report` writes it.

    Args:
        title: its heading.
        checked: the check that it tells of.
        trace: the map without the edits.
        after: the map with the edits that were checked.
        sites: the chosen cells; where the edits are of others, theirs are outlined.
        talk: the last question; it is shown if it was answered with the edits that were checked.
        session: what the explorer was opened with.
    """
    conversations = []
    if talk is not None and talk.standing == checked.edits:
        conversations.append(Conversation(talk.question, talk.before, talk.now, harmful=True))
    places = _places(checked.edits, sites, trace)
    with TemporaryDirectory() as folder:
        page = save_report(
            Path(folder) / "report.html",
            title=title,
            trace=trace,
            sites=places,
            edit=checked.edits,
            reports={"the edits that stood": checked.report},
            conversations=conversations,
            reproduce=reproducing_code(session, trace, places, checked.edits, None, checked=True),
            after=after,
            suite=checked.suite,
        )
        return page.read_bytes()


def _places(edits: Sequence[Edit], chosen: Sequence[Site], trace: Trace) -> list[Site]:
    """Where the edits are: the chosen cells if they are just these, else cells of the first component."""
    edited_addresses: set[tuple[int, Role]] = {(layer, edit.role) for edit in edits for layer in edit.layers}
    if {(site.layer, site.role) for site in chosen} == edited_addresses:
        return [*chosen]
    component = next(filter(editable, trace.components), "resid_post")
    return [with_effect(Site(component, layer, role), trace) for layer, role in sorted(edited_addresses)]
