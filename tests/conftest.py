"""Settings of all tests: no network, few threads, the CPU, attention in the model's own precision."""

import os

import jaxtyping
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # another process has the other core
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def on_the_cpu():
    """Models go to the CPU unless a test says otherwise, also where there is a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lens_defense.models.devices.get_device", lambda: "cpu")
        yield


@pytest.fixture(scope="session", autouse=True)
def double_precision():
    """Models of double precision compute their attention in it."""
    from helpers.double_precision import softmax_in_double  # not above: the settings there come first

    with softmax_in_double():
        yield


@pytest.fixture
def unchecked(monkeypatch):
    """Without jaxtyping's checks, as users run: the package's own sentence is what they see."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
