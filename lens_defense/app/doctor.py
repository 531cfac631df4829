"""The doctor: what is installed here, what is missing, and what can be done with a model.

A check returns its finding in words. It raises a UserWarning for what only some work needs, and any other
error for what stands in the way. Libraries are imported by the checks: a broken one is a finding.
"""

import importlib.metadata
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lens_defense.shown_text import one_line

_PACKAGES = ("torch", "transformers", "transformer-lens")
_EXTRAS = {"notebook": ("jupyterlab", "ipywidgets", "anywidget"), "figures": ("kaleido",)}
_EDITED_LAYERS = 5
"""As many as `locate` returns by default."""
_TRACE_TOKENS = 4096
"""Tokens of the largest pass of a trace, with the states of one layer."""
_FIT_TOKENS = 1024
"""Tokens of one batch of a fit, with the states of every layer."""
_SPACE = 1_000_000_000
"""Bytes that the cache wants to be free: smollm2 as safetensors takes half of it."""


class Finding(NamedTuple):
    """One line of the doctor."""

    level: Literal["ok", "warning", "problem"]
    subject: str
    text: str


def examine(model: str | None, device: str | None, dtype: str) -> Iterator[Finding]:
    """Every finding, one after the other.

    Args:
        model: as of `load`; None looks at the machine alone.
        device: as of `load`.
        dtype: the precision of the weights, as torch names it.
    """
    yield from (
        _finding("lens_defense", _our_version),
        _finding("python", platform.python_version),
        *(_finding(package, lambda package=package: _version(package)) for package in _PACKAGES),
        _finding("device", lambda: _device(device)),
        _finding("cache", _cache),
        _finding("network", _network),
        _finding("smollm2", _smollm2),
        *(_finding(f"extra {extra}", lambda extra=extra: _extra(extra)) for extra in _EXTRAS),
        _finding("saved figures", _chromium),
        _finding("shown figures", _browser),
    )
    if model is not None:
        yield from _model_findings(model, device, dtype)


def _finding(subject: str, check: Callable[[], str]) -> Finding:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            text = check()
        said = [_one_line(warning.message) for warning in caught]
        return Finding("warning" if said else "ok", subject, "; ".join([text, *said]))
    except UserWarning as warning:
        return Finding("warning", subject, _one_line(warning))
    except Exception as error:
        return Finding("problem", subject, _one_line(error))


def _one_line(error: Exception | str) -> str:
    return one_line(error, 2000) or type(error).__name__


def _version(package: str) -> str:
    """The version of a package that is installed, if ours runs with it."""
    from transformers.utils.versions import require_version

    for requirement in _requirements():
        if requirement.startswith((f"{package}<", f"{package}>")):
            require_version(requirement, f"pip install '{requirement}'")
    return importlib.metadata.version(package)


def _requirements() -> list[str]:
    """What our own package requires, extras left out."""
    try:
        requirements = importlib.metadata.requires("lens-defense") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder that was not installed
        return []
    return [line for line in requirements if "extra ==" not in line]


def _our_version() -> str:
    import lens_defense

    return f"{lens_defense.__version__} in {Path(lens_defense.__file__).parent}"


def _device(name: str | None) -> str:
    import torch

    from lens_defense.models.devices import free_memory, resolve_device

    device = resolve_device(name)
    free = free_memory(device)
    if device.type == "cpu":
        what = f"{torch.get_num_threads()} threads"
    else:
        what = getattr(torch.get_device_module(device), "get_device_name", str)(device)
    memory = "its free memory is unknown" if free is None else f"{_gigabytes(free)} of memory free"
    return f"{device}: {what}, {memory}"


def _cache() -> str:
    from lens_defense.app.output_folder import require_writable
    from lens_defense.storage import cache_folder

    folder = cache_folder()
    try:
        require_writable(folder)
    except ValueError as error:
        raise UserWarning(
            f"{error} by setting LENS_DEFENSE_CACHE; until then smollm2 and .gguf files are converted at "
            "every load, and covariances and fits are made anew"
        ) from error
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < _SPACE:
        raise UserWarning(f"{folder}: only {_gigabytes(free)} are free there; a model may not fit")
    return f"{folder}: {_gigabytes(size)} used, {_gigabytes(free)} free"


def _network() -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            f"HF_HUB_OFFLINE is set: models and data sets of the hub come from {constants.HF_HUB_CACHE} alone"
        )
    return f"models and data sets of the hub may be downloaded, to {constants.HF_HUB_CACHE}"


def _smollm2() -> str:
    from lens_defense.loading.gguf import SMOLLM2_INSTALL, smollm2_file

    file = smollm2_file()
    if file is None:
        raise UserWarning(f"the small real model, the demo's default, is missing: {SMOLLM2_INSTALL}")
    return str(file)


def _extra(extra: str) -> str:
    missing = [package for package in _EXTRAS[extra] if find_spec(package) is None]
    if missing:
        raise UserWarning(f"{', '.join(missing)} is missing: pip install 'lens-defense[{extra}]'")
    return "installed"


def _chromium() -> str:
    from lens_defense.plotting.theme import find_chromium

    try:
        return f"svg, pdf and png are drawn by {find_chromium()}"
    except ValueError as error:
        raise UserWarning(error) from error


def _browser() -> str:
    from lens_defense.plotting.theme import can_open_browser

    if not can_open_browser():
        raise UserWarning(
            "no window with a browser can be opened here: save figures as .html, or show them in a notebook"
        )
    return "in a browser"


def _model_findings(name: str, device: str | None, dtype: str) -> Iterator[Finding]:
    """What a model would take; then it is loaded, traced and looked at."""
    sizes: list[_Size] = []
    yield _finding("size", lambda: _measure(name, sizes))
    if not sizes:
        return
    for work, needed in sizes[0].memory(dtype).items():
        finding = _finding(f"memory to {work}", lambda needed=needed: _fits(needed, device))
        yield finding
        if work == "load" and finding.level == "problem":
            return
    loaded: list[Any] = []
    yield _finding("load", lambda: _load(name, device, dtype, loaded))
    if loaded:
        yield _finding("trace", lambda: _trace(loaded[0]))
        yield _finding("edit", lambda: _edit(loaded[0]))


class _Size(NamedTuple):
    """What a model's memory is estimated from."""

    parameters: int
    layers: int
    width: int
    mlp_width: int
    vocabulary: int

    def memory(self, dtype: str) -> dict[str, int]:
        """Bytes that some work takes at its peak, about; the same shapes as in docs/performance.md."""
        import torch

        item = getattr(torch, dtype).itemsize
        weights = self.parameters * item
        states = (6 * self.width + 3 * self.mlp_width) * item  # of one token in one layer
        logits = _FIT_TOKENS * self.vocabulary * 4
        fit = self.layers * _FIT_TOKENS * states
        covariances = self.mlp_width**2 * (4 * _EDITED_LAYERS + 16)  # single precision, solved in double
        return {
            "load": weights,
            "trace": weights + _TRACE_TOKENS * states + logits,
            "edit": weights + fit + logits + covariances,
        }


def _measure(name: str, sizes: list[_Size]) -> str:
    from lens_defense.loading.load import model_without_weights

    model = model_without_weights(name)
    config = model.config.get_text_config()
    inner = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")  # as families call it
    width = config.hidden_size
    mlp_width = next((value for key in inner if (value := getattr(config, key, None))), 4 * width)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes.append(_Size(parameters, config.num_hidden_layers, width, mlp_width, config.vocab_size))
    return f"{parameters / 1e6:,.0f} million parameters in {config.num_hidden_layers} layers of width {width}"


def _fits(needed: int, device: str | None) -> str:
    from lens_defense.models.devices import free_memory, resolve_device

    place = resolve_device(device)
    free = free_memory(place)
    if free is not None and needed > free:
        raise MemoryError(
            f"about {_gigabytes(needed)}, more than the {_gigabytes(free)} that are free on {place}: take a "
            "smaller model, --dtype bfloat16 or another --device"
        )
    return f"about {_gigabytes(needed)}"


def _load(name: str, device: str | None, dtype: str, loaded: list[Any]) -> str:
    import torch

    from lens_defense.loading.load import load

    start = time.perf_counter()
    loaded.append(load(name, device=device, dtype=getattr(torch, dtype)))
    return f"in {time.perf_counter() - start:.1f} s"


def _trace(model: Any) -> str:
    """A small trace of the stream, the MLP and the attention."""
    from lens_defense.patching.corruptions import GaussianNoise
    from lens_defense.prompts.request import request
    from lens_defense.tracing.trace import trace

    start, last = time.perf_counter(), model.cfg.n_layers - 1
    trace(
        model,
        [request("What is a lamp made of?", "lamp")],
        corruption=GaussianNoise(samples=1),
        components=["resid_post", "mlp_out", "attn_out"],
        layers=[0, last],
        min_difference=0.0,
        progress=False,
    )
    return f"one request at two of {last + 1} layers in {time.perf_counter() - start:.1f} s"


def _edit(model: Any) -> str:
    from lens_defense.models.mlp_output import refuse_uneditable

    refuse_uneditable(model, range(model.cfg.n_layers))
    return "every layer has an MLP output matrix that can be changed"


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
