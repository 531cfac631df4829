"""A survey can be stopped anywhere: what is there stays, nothing is done twice, and the whole is the same."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_trace import BELL, LAMP, model_of

from lens_defense.models.mlp_output import weights_fingerprint
from lens_defense.prompts.prompt import request
from lens_defense.tracing import survey as surveys
from lens_defense.tracing import trace as tracers
from lens_defense.tracing.corruptions import noise
from lens_defense.tracing.metrics import kl_to_clean
from lens_defense.tracing.survey import survey
from lens_defense.tracing.trace import trace, traces
from lens_defense.tracing.trace_result import join_traces

SHIP = request("tell me of an old ship", "old ship", id="ship")
SOME = {"positions": "all", "answer_tokens": 2, "floor": 0.0}


@pytest.fixture
def counted(monkeypatch):
    """Ids of the requests that were traced; one may be told to stop the survey."""
    made: list[str] = []
    stop: list[str] = []

    def tracing(model, some, metrics, **settings):
        if some[0].id in stop:
            stop.clear()
            raise KeyboardInterrupt
        made.append(some[0].id)
        return traces(model, some, metrics, **settings)

    monkeypatch.setattr(surveys, "traces", tracing)
    return made, stop


def test_a_stopped_survey_goes_on_and_repeats_nothing(tmp_path, counted):
    made, stop = counted
    model = model_of()
    stop.append("ship")
    with pytest.raises(KeyboardInterrupt):
        survey(model, [LAMP, BELL, SHIP], tmp_path, progress=False, **SOME)
    assert made == ["lamp", "bell"] and len(list(tmp_path.iterdir())) == 2
    told, refused = survey(model, [LAMP, BELL, SHIP], tmp_path, progress=False, **SOME)
    assert not refused
    assert made == ["lamp", "bell", "ship"]
    whole = trace(model, [LAMP, BELL, SHIP], progress=False, **SOME)
    torch.testing.assert_close(told.effects, whole.effects, equal_nan=True)
    assert told.prompts == whole.prompts and told.answers == whole.answers


def test_a_survey_hashes_the_weights_once(tmp_path, monkeypatch):
    hashed = []
    for module in (surveys, tracers):
        monkeypatch.setattr(
            module, "fingerprint", lambda model: hashed.append(1) or weights_fingerprint(model)
        )
    model = model_of()
    told, _ = survey(model, [LAMP, BELL, SHIP], tmp_path, progress=False, **SOME)
    assert len(hashed) == 1 and told.fingerprint == weights_fingerprint(model)


def test_a_survey_that_is_killed_loses_and_repeats_nothing(tmp_path):
    code = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
from pathlib import Path
from test_survey import BELL, LAMP, SHIP, SOME, model_of, survey
survey(model_of(), [LAMP, BELL, SHIP], Path({str(tmp_path)!r}), progress=False, samples=40, **SOME)
"""
    running = subprocess.Popen([sys.executable, "-c", code])
    while not any(file.suffix == ".safetensors" for file in tmp_path.iterdir()):
        assert running.poll() is None
        time.sleep(0.01)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    there = {file: file.stat().st_mtime_ns for file in tmp_path.glob("[!.]*")}
    assert len(there) < 3, "it was killed with work left"
    some = {**SOME, "samples": 40, "progress": False}
    told = survey(model_of(), [LAMP, BELL, SHIP], tmp_path, **some).trace
    assert there.items() <= {file: file.stat().st_mtime_ns for file in tmp_path.glob("[!.]*")}.items()
    whole = trace(model_of(), [LAMP, BELL, SHIP], **some)
    torch.testing.assert_close(told.effects, whole.effects, equal_nan=True)


def test_other_defaults_are_another_survey(tmp_path, counted, monkeypatch):
    made, _ = counted
    for window in (7, 5):
        monkeypatch.setitem(surveys._DEFAULTS, "window", window)
        survey(model_of(), [LAMP], tmp_path, progress=False, **SOME)
    assert made == ["lamp", "lamp"]


def test_other_settings_are_another_survey(tmp_path, counted):
    made, _ = counted
    for samples in (2, 3, 2):
        survey(model_of(), [LAMP], tmp_path, progress=False, samples=samples, **SOME)
    assert made == ["lamp", "lamp"]


def test_a_weak_request_gets_a_note(tmp_path, counted):
    made, _ = counted
    weak = {**SOME, "floor": 1e9}
    for _ in range(2):
        told, refused = survey(model_of(), [LAMP, BELL], tmp_path, progress=False, **weak)
        assert told is None
        assert list(refused) == ["lamp", "bell"]
        assert "hardly changes the answer" in refused["bell"]
    assert made == ["lamp", "bell"]
    _, refused = survey(model_of(), [LAMP], tmp_path, progress=False, **SOME)
    assert not refused, "notes of other settings are not this survey's"


def test_a_request_that_does_not_fit_does_not_stop_the_others(tmp_path):
    short = request("tell me of x", "x", id="short")
    first = {**SOME, "positions": ["subject_first"]}
    told, refused = survey(model_of(), [short, LAMP], tmp_path, progress=False, **first)
    assert "no token of the roles" in refused["short"]
    assert [met.request.id for met in told.prompts] == ["lamp"]


def test_enough_is_enough(tmp_path, counted):
    made, _ = counted
    short = request("tell me of x", "x", id="short")
    first = {**SOME, "positions": ["subject_first"], "progress": False}
    told, refused = survey(model_of(), [short, LAMP, BELL, SHIP], tmp_path, enough=2, **first)
    assert [met.request.id for met in told.prompts] == ["lamp", "bell"] and list(refused) == ["short"]
    assert made == ["short", "lamp", "bell"]


def test_moved_requests_are_not_traced_again(tmp_path, counted):
    made, _ = counted
    for some in ([LAMP, BELL], [SHIP, BELL], [BELL]):
        told = survey(model_of(), some, tmp_path, progress=False, **SOME).trace
        assert [met.request.id for met in told.prompts] == [item.id for item in some]
    assert made == ["lamp", "bell", "ship"]


def test_a_bad_setting_is_told(tmp_path):
    with pytest.raises(ValueError, match="samples must be at least 1"):
        survey(model_of(), [LAMP], tmp_path, progress=False, samples=0)
    with pytest.raises(ValueError, match="belongs to the split 'check'"):
        survey(model_of(), [request("a lamp", "lamp", split="check")], tmp_path)


def test_only_what_was_measured_alike_is_joined():
    model = model_of()
    one = trace(model, [LAMP], progress=False, **SOME)
    assert (one.corruption, one.metric) == ("noise of 3 standard deviations, seed 0", "answer_logprob")
    others = {
        "window": {"window": 3},
        "samples": {"samples": 2},
        "corruption": {"corruption": noise(model, scale=2.0)},
        "metric": {"metric": kl_to_clean},
        "direction": {"direction": "noising"},
    }
    for name, settings in others.items():
        other = trace(model, [LAMP], progress=False, **{**SOME, **settings})
        with pytest.raises(ValueError, match=f"differ in {name};"):
            join_traces([one, other])
    assert len(join_traces([one, replace(one, corruption="", metric="")]).prompts) == 2
    with pytest.raises(ValueError, match="no trace to join"):
        join_traces([])
