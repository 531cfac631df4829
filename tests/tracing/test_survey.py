"""A survey can be stopped anywhere: what is there stays, nothing is done twice, and the whole is the same."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.trace_cases import BELL, LAMP, SHIP, SURVEY_SETTINGS, tiny_chat_model

from lens_defense.models.fingerprint import model_fingerprint
from lens_defense.patching.corruptions import GaussianNoise
from lens_defense.patching.metrics import kl_to_clean
from lens_defense.prompts.request import request
from lens_defense.tracing import survey as surveys
from lens_defense.tracing import trace as tracers
from lens_defense.tracing.survey import survey
from lens_defense.tracing.trace import trace, trace_metrics
from lens_defense.tracing.trace_result import Trace, join_traces


@pytest.fixture
def counted(monkeypatch):
    """Ids of the requests that were traced; one may be result to stop the survey."""
    made: list[str] = []
    stop: list[str] = []

    def tracing(model, some, metrics, settings, **more):
        if some[0].id in stop:
            stop.clear()
            raise KeyboardInterrupt
        made.append(some[0].id)
        return trace_metrics(model, some, metrics, settings, **more)

    monkeypatch.setattr(surveys, "trace_metrics", tracing)
    return made, stop


def test_a_stopped_survey_goes_on_and_repeats_nothing(tmp_path, counted):
    made, stop = counted
    model = tiny_chat_model()
    stop.append("ship")
    with pytest.raises(KeyboardInterrupt):
        survey(model, [LAMP, BELL, SHIP], tmp_path, progress=False, **SURVEY_SETTINGS)
    assert made == ["lamp", "bell"] and len(list(tmp_path.iterdir())) == 2
    result, refused = survey(model, [LAMP, BELL, SHIP], tmp_path, progress=False, **SURVEY_SETTINGS)
    assert not refused
    assert made == ["lamp", "bell", "ship"]
    whole = trace(model, [LAMP, BELL, SHIP], progress=False, **SURVEY_SETTINGS)
    torch.testing.assert_close(result.effects, whole.effects, equal_nan=True)
    assert result.prompts == whole.prompts and result.answers == whole.answers


def test_a_survey_hashes_the_weights_once(tmp_path, monkeypatch):
    hashed = []
    for module in (surveys, tracers):
        monkeypatch.setattr(
            module, "model_fingerprint", lambda model: hashed.append(1) or model_fingerprint(model)
        )
    model = tiny_chat_model()
    result, _ = survey(model, [LAMP, BELL, SHIP], tmp_path, progress=False, **SURVEY_SETTINGS)
    assert len(hashed) == 1 and result.fingerprint == model_fingerprint(model)


def test_a_survey_that_is_killed_loses_and_repeats_nothing(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from helpers.double_precision import softmax_in_double
from helpers.trace_cases import BELL, LAMP, SHIP, SURVEY_SETTINGS, tiny_chat_model
from lens_defense.patching.corruptions import GaussianNoise
from lens_defense.tracing.survey import survey
settings = {{**SURVEY_SETTINGS, "corruption": GaussianNoise(samples=40), "progress": False}}
with softmax_in_double():
    survey(tiny_chat_model(), [LAMP, BELL, SHIP], Path({str(tmp_path)!r}), **settings)
"""
    running = subprocess.Popen([sys.executable, "-c", code])
    while not any(file.suffix == ".safetensors" for file in tmp_path.iterdir()):
        assert running.poll() is None
        time.sleep(0.01)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    there = {file: file.stat().st_mtime_ns for file in tmp_path.glob("[!.]*")}
    assert len(there) < 3, "it was killed with work left"
    some = {**SURVEY_SETTINGS, "corruption": GaussianNoise(samples=40), "progress": False}
    result = survey(tiny_chat_model(), [LAMP, BELL, SHIP], tmp_path, **some).trace
    assert there.items() <= {file: file.stat().st_mtime_ns for file in tmp_path.glob("[!.]*")}.items()
    whole = trace(tiny_chat_model(), [LAMP, BELL, SHIP], **some)
    torch.testing.assert_close(result.effects, whole.effects, equal_nan=True)


def test_a_damaged_or_misplaced_file_is_made_anew_and_said(tmp_path, counted, caplog):
    made, _ = counted
    model = tiny_chat_model()
    whole = survey(model, [LAMP, BELL], tmp_path, progress=False, **SURVEY_SETTINGS).trace
    lamp, bell = sorted(tmp_path.iterdir(), key=lambda file: Trace.load(file).prompts[0].request.id != "lamp")
    bell.write_bytes(lamp.read_bytes())
    lamp.write_bytes(lamp.read_bytes()[:-1])
    again = survey(model, [LAMP, BELL], tmp_path, progress=False, **SURVEY_SETTINGS).trace
    assert made == ["lamp", "bell", "lamp", "bell"]
    torch.testing.assert_close(again.effects, whole.effects, equal_nan=True, rtol=0, atol=0)
    assert [str(lamp) in caplog.text, str(bell) in caplog.text, caplog.text.count("made anew")] == [
        True,
        True,
        2,
    ]


def test_a_damaged_note_is_made_anew(tmp_path, counted):
    made, _ = counted
    weak = {**SURVEY_SETTINGS, "min_difference": 1e9, "progress": False}
    survey(tiny_chat_model(), [LAMP], tmp_path, **weak)
    (note,) = tmp_path.iterdir()
    note.write_text(note.read_text().replace("hardly", "greatly"))
    _, refused = survey(tiny_chat_model(), [LAMP], tmp_path, **weak)
    assert made == ["lamp", "lamp"] and "hardly" in refused["lamp"]


def test_the_same_weights_with_another_epsilon_are_another_survey(tmp_path, counted):
    made, _ = counted
    for epsilon in (1e-6, 0.1, 1e-6):
        model = tiny_chat_model()
        model.original_model.config.rms_norm_eps = epsilon
        survey(model, [LAMP], tmp_path, progress=False, **SURVEY_SETTINGS)
    assert made == ["lamp", "lamp"]


def test_other_settings_are_another_survey(tmp_path, counted):
    made, _ = counted
    for samples in (2, 3, 2):
        survey(
            tiny_chat_model(),
            [LAMP],
            tmp_path,
            progress=False,
            corruption=GaussianNoise(samples=samples),
            **SURVEY_SETTINGS,
        )
    assert made == ["lamp", "lamp"]


def test_a_weak_request_gets_a_note(tmp_path, counted):
    made, _ = counted
    weak = {**SURVEY_SETTINGS, "min_difference": 1e9}
    for _ in range(2):
        result, refused = survey(tiny_chat_model(), [LAMP, BELL], tmp_path, progress=False, **weak)
        assert result is None
        assert list(refused) == ["lamp", "bell"]
        assert "hardly changes the answer" in refused["bell"]
    assert made == ["lamp", "bell"]
    _, refused = survey(tiny_chat_model(), [LAMP], tmp_path, progress=False, **SURVEY_SETTINGS)
    assert not refused, "notes of other settings are not this survey's"


def test_a_request_that_does_not_fit_does_not_stop_the_others(tmp_path):
    short = request("tell me of x", "x", id="short")
    first = {**SURVEY_SETTINGS, "positions": ["subject_first"]}
    result, refused = survey(tiny_chat_model(), [short, LAMP], tmp_path, progress=False, **first)
    assert "no token of the roles" in refused["short"]
    assert [prompt.request.id for prompt in result.prompts] == ["lamp"]


def test_rows_without_a_subject_or_too_long_do_not_stop_the_others(tmp_path):
    bare = request("ring it", id="bare")
    long = request("ring an old bell " * 60, "old bell", id="long")
    found = survey(tiny_chat_model("gpt2"), [LAMP, bare, long], tmp_path, progress=False, **SURVEY_SETTINGS)
    assert found.trace is not None and [p.request.id for p in found.trace.prompts] == ["lamp"]
    assert found.refused.keys() == {"bare", "long"}
    assert "no subject" in found.refused["bare"] and "reads 256 tokens" in found.refused["long"]
    with pytest.raises(ValueError, match=r"no subject.* is marked in 'bare'\. Name it"):
        survey(tiny_chat_model("gpt2"), [bare], tmp_path, progress=False)


def test_enough_is_enough(tmp_path, counted):
    made, _ = counted
    short = request("tell me of x", "x", id="short")
    first = {**SURVEY_SETTINGS, "positions": ["subject_first"], "progress": False}
    result, refused = survey(tiny_chat_model(), [short, LAMP, BELL, SHIP], tmp_path, enough=2, **first)
    assert [prompt.request.id for prompt in result.prompts] == ["lamp", "bell"] and list(refused) == ["short"]
    assert made == ["short", "lamp", "bell"]


def test_moved_requests_are_not_traced_again(tmp_path, counted):
    made, _ = counted
    for some in ([LAMP, BELL], [SHIP, BELL], [BELL]):
        result = survey(tiny_chat_model(), some, tmp_path, progress=False, **SURVEY_SETTINGS).trace
        assert [prompt.request.id for prompt in result.prompts] == [item.id for item in some]
    assert made == ["lamp", "bell", "ship"]


def test_a_bad_setting_is_told(tmp_path):
    with pytest.raises(ValueError, match="window must be at least 1"):
        survey(tiny_chat_model(), [LAMP], tmp_path, progress=False, window=0)
    with pytest.raises(ValueError, match="belongs to the split 'check'"):
        survey(tiny_chat_model(), [request("a lamp", "lamp", split="check")], tmp_path)


def test_only_what_was_measured_alike_is_joined():
    model = tiny_chat_model()
    one = trace(model, [LAMP], progress=False, **SURVEY_SETTINGS)
    assert (one.corruption, one.metric) == (
        "noise of 3 standard deviations, 3 samples, seed 0",
        "answer_logprob",
    )
    others = {
        "settings": {"window": 3},
        "corruption, samples": {"corruption": GaussianNoise(samples=2)},
        "corruption": {"corruption": GaussianNoise(scale=2.0)},
        "metric": {"metric": kl_to_clean},
    }
    for name, settings in others.items():
        other = trace(model, [LAMP], progress=False, **{**SURVEY_SETTINGS, **settings})
        with pytest.raises(ValueError, match=f"differ in {name};"):
            join_traces([one, other])
    with pytest.raises(ValueError, match="no trace to join"):
        join_traces([])
