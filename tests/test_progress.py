"""Bars go to a terminal, or to the listener of their thread and nowhere else."""

import itertools
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.handmade_edits import handmade_edit
from helpers.listener import Listener
from helpers.tiny_models import tiny_model

import lens_defense
import lens_defense.progress as progress
from lens_defense.checking.check import check
from lens_defense.checking.suites import Suite, SuiteItem
from lens_defense.editing.solving.covariance import key_covariances
from lens_defense.models.fingerprint import Fingerprint
from lens_defense.progress import ProgressBar, progress_listener, say
from lens_defense.prompts.corpus import CorpusText
from lens_defense.prompts.request import request
from lens_defense.proposals.mark_subjects import mark_subjects
from lens_defense.tracing.survey import survey
from lens_defense.tracing.trace import trace

PACKAGE = Path(lens_defense.__file__).parent
LAMP = request("make a lamp", "lamp", id="lamp")
CELLS = {"positions": ("subject_last",), "min_difference": 0.0}


@pytest.fixture
def seconds(monkeypatch):
    """A clock that a test sets."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_listener_hears_a_bar_twenty_times_a_second_and_its_end(seconds, capfd):
    listener = Listener()
    with progress_listener(listener), ProgressBar("values", 1000, unit="step") as bar:
        assert listener.steps["values"] == [(0, 1000)]
        for _ in range(999):
            seconds.now += 0.001
            bar.update()
        bar.note(loss=1.0)
        bar.refresh()
        bar.update()
        assert bar.done == 1000
    heard = listener.steps["values"]
    assert len(heard) == 21 and heard[:2] == [(0, 1000), (50, 1000)] and heard[-1] == (1000, 1000)
    assert capfd.readouterr() == ("", "")


def test_a_total_may_be_unknown_and_may_grow(seconds):
    listener = Listener()
    with progress_listener(listener):
        with ProgressBar("answers", None) as bar:
            bar.update(3)
        with ProgressBar("check", 0, done=2) as bar:
            bar.total = (bar.total or 0) + 7
            seconds.now += 1
            bar.update(4)
    assert listener.steps == {"answers": [(0, None), (3, None)], "check": [(2, 0), (6, 7)]}


def test_without_a_listener_a_bar_is_printed(capfd):
    with ProgressBar("values", 2, unit="step") as bar:
        bar.note(loss="0.5")
        bar.update()
        bar.total = 3
        bar.update(2)
        bar.refresh()
    say("one sentence")
    out, err = capfd.readouterr()
    assert "one sentence" in out and "values: 100%" in err and "3/3" in err and "loss=0.5" in err


@pytest.mark.parametrize("heard", [True, False])
def test_a_bar_that_is_not_shown_tells_nobody(heard, capfd):
    listener = Listener()
    with (
        progress_listener(listener if heard else None),
        ProgressBar("values", 2, unit="step", shown=False) as bar,
    ):
        bar.update(2)
    assert bar.done == 2 and not listener.steps and capfd.readouterr() == ("", "")


def test_the_listener_is_that_of_the_thread():
    mine, other = Listener(), Listener()
    ready, go = threading.Event(), threading.Event()

    def work():
        with progress_listener(other):
            ready.set()
            go.wait(5)
            say("of the other")

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(5)
    with progress_listener(mine):
        say("mine")
        go.set()
        thread.join()
    assert (mine.sentences, other.sentences) == (["mine"], ["of the other"])


def test_a_listener_ends_with_its_block(capfd):
    outer, inner = Listener(), Listener()
    with progress_listener(outer):
        with pytest.raises(KeyboardInterrupt), progress_listener(inner), ProgressBar("a", 2) as bar:
            bar.update()
            raise KeyboardInterrupt
        say("outer")
    say("printed")
    assert inner.steps == {"a": [(0, 2), (1, 2)]} and outer.sentences == ["outer"]
    assert capfd.readouterr().out.strip() == "printed"


def test_what_a_listener_raises_ends_the_work():
    class Cancelled(Exception):
        pass

    class Cancelling(Listener):
        def step(self, *state):
            if state[1]:
                raise Cancelled

    with pytest.raises(Cancelled), progress_listener(Cancelling()):
        trace(tiny_model("llama", chat=True), [LAMP], **CELLS)


def check_nothing(model, **settings):
    suite = Suite(
        "tiny", "check", (SuiteItem("edited", LAMP), SuiteItem("benign", request("hello"))), ("so",)
    )
    check(model, handmade_edit(model, (1,)), suite, max_new_tokens=2, **settings)


WORK = {
    "trace": lambda model, _, **more: trace(model, [LAMP], **CELLS, **more),
    "attribution": lambda model, _, **more: trace(model, [LAMP], **CELLS, exact=False, **more),
    "survey": lambda model, folder, **more: survey(model, [LAMP], folder, **CELLS, **more),
    "check": lambda model, _, **more: check_nothing(model, **more),
    "subjects": lambda model, _, **more: mark_subjects(model, ["make a brass lamp"], **more),
    "covariance": lambda model, _, **more: key_covariances(
        model, [1], [CorpusText("a text")] * 20, fingerprint=Fingerprint(""), cache=False, **more
    ),
}


@pytest.mark.parametrize("description", WORK)
def test_every_verb_tells_its_listener_how_far_it_is(description, tmp_path, capfd):
    model, listener = tiny_model("llama", chat=True), Listener()
    capfd.readouterr()
    with progress_listener(listener):
        WORK[description](model, tmp_path, progress=False)
        assert not listener.steps
        WORK[description](model, tmp_path / "again", progress=True)
    assert set(listener.steps) == {description}
    done, total = listener.steps[description][-1]
    assert done == total > 0
    assert capfd.readouterr() == ("", "")


def test_no_other_module_makes_bars():
    named = [path.name for path in PACKAGE.rglob("*.py") if "tqdm" in path.read_text("utf-8")]
    assert named == ["progress.py"]


def test_steps_that_come_slowly_are_all_heard(seconds):
    listener, clock = Listener(), itertools.count()
    with progress_listener(listener), ProgressBar("slow", 3) as bar:
        for _ in range(3):
            seconds.now = 200.0 + next(clock)
            bar.update()
    assert listener.steps["slow"] == [(0, 3), (1, 3), (2, 3), (3, 3)]
