"""The session as one HTML page, of what was checked last."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lens_defense.app.explorer.talk import Talk
from lens_defense.app.report_page import Conversation, save_report
from lens_defense.checking.report import Report
from lens_defense.checking.suites import Suite
from lens_defense.editing.edit_plan import Edit
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
    reproduce: str,
) -> bytes:
    """The page, as `save_report` writes it.

    Args:
        title: its heading.
        checked: the check that it tells of.
        trace: the map without the edits.
        after: the map with the edits that were checked.
        sites: the chosen cells.
        talk: the last question; it is shown if it was answered with the edits that were checked.
        reproduce: the Python that does it again.
    """
    conversations = []
    if talk is not None and talk.standing == checked.edits:
        conversations.append(Conversation(talk.question, talk.before, talk.now, harmful=True))
    with TemporaryDirectory() as folder:
        page = save_report(
            Path(folder) / "report.html",
            title=title,
            trace=trace,
            sites=sites,
            edit=checked.edits[-1],
            reports={"what stands": checked.report},
            conversations=conversations,
            reproduce=reproduce,
            after=after,
            suite=checked.suite,
        )
        return page.read_bytes()
