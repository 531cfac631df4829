"""A file appears whole or not at all, and gives back what was saved or a sentence that says why not."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.handmade import a_report, a_trace, an_edit
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lens_defense import storage
from lens_defense.checking.report import Report
from lens_defense.editing.edit_plan import Edit
from lens_defense.storage import atomic_write, cache_folder, cached, load, save
from lens_defense.tracing.site_map import ScoreMap
from lens_defense.tracing.trace_result import Trace


@dataclass(frozen=True, slots=True)
class Part:
    texts: tuple[str, ...]
    score: float


@dataclass(frozen=True, slots=True)
class Whole:
    name: str
    parts: tuple[Part, ...]
    by_layer: dict[int, float]
    note: str | None = None


WHOLE = Whole("naïve 日本\u2028", (Part(("a", ""), 0.1), Part((), float("inf"))), {3: 1e-17, 12: 2.0})
TENSORS = {
    "single": torch.tensor([[0.1, -0.0], [float("nan"), 3.0]]),
    "half": torch.arange(3).bfloat16(),
    "view": torch.arange(6).reshape(2, 3).T,
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 4, dtype=torch.float64),
}


def assert_same_bits(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert torch.equal(tensor.nan_to_num(7.5), expected[name].nan_to_num(7.5))


@pytest.mark.parametrize("tensors", [None, {}, TENSORS], ids=["json", "no tensors", "tensors"])
def test_what_was_saved_comes_back(tmp_path, tensors):
    path = save(tmp_path / "folder" / "file", "whole", WHOLE, tensors)
    content, loaded_tensors = load(path, "whole", Whole)
    assert content == WHOLE
    assert_same_bits(loaded_tensors, tensors or {})
    assert path.read_bytes().startswith(b"{") == (tensors is None)


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=8,
)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(), plain_values))
def test_any_plain_content_comes_back(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "file"
    for tensors in (None, {"one": torch.ones(1)}):
        assert load(save(path, "plain", content, tensors), "plain", dict)[0] == content


@pytest.mark.parametrize("tensors", [None, TENSORS], ids=["json", "tensors"])
def test_a_flipped_bit_anywhere_is_refused(tmp_path, tensors):
    """A bit of JSON may pass that changes nothing ("1E5" is "1e5"); every bit of a tensor is noticed."""
    path = save(tmp_path / "file", "whole", WHOLE, tensors)
    intact = path.read_bytes()
    passed = []
    for i in range(len(intact)):
        path.write_bytes(intact[:i] + bytes([intact[i] ^ 1 << i % 8]) + intact[i + 1 :])
        try:
            content, loaded_tensors = load(path, "whole", Whole)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        passed.append(i)
        assert content == WHOLE
        assert_same_bits(loaded_tensors, tensors or {})
    header_end = len(intact) if tensors is None else 8 + int.from_bytes(intact[:8], "little")
    assert not [i for i in passed if i >= header_end]


@pytest.mark.parametrize("tensors", [None, TENSORS], ids=["json", "tensors"])
def test_a_file_cut_short_is_refused(tmp_path, tensors):
    path = save(tmp_path / "file", "whole", WHOLE, tensors)
    intact = path.read_bytes()
    for length in (0, 1, len(intact) // 2, len(intact) - 1):
        path.write_bytes(intact[:length])
        with pytest.raises(ValueError, match=r"file cannot be read: .* kind 'whole'"):
            load(path, "whole", Whole)


@pytest.mark.parametrize("tensors", [None, TENSORS], ids=["json", "tensors"])
def test_a_changed_word_or_number_is_refused(tmp_path, tensors):
    path = save(tmp_path / "file", "whole", {"name": "xyz", "number": 123454321}, tensors)
    for old, new in ((b"xyz", b"xyy"), (b"123454321", b"123454322"), (b"number", b"nunber")):
        intact = path.read_bytes()
        assert intact.count(old) == 1
        path.write_bytes(intact.replace(old, new))
        with pytest.raises(ValueError, match=r"is damaged: .* does not match its hash; make it again"):
            load(path, "whole", dict)
        path.write_bytes(intact)


def test_another_kind_format_or_type_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "file", "whole", WHOLE)
    with pytest.raises(ValueError, match=r"file holds a whole, not a part: give another file$"):
        load(path, "part", Part)
    with pytest.raises(ValueError, match="holds no whole that this version can read"):
        load(path, "whole", Part)
    monkeypatch.setattr(storage, "FORMAT", 3)
    with pytest.raises(ValueError, match="has the format version 2; this version reads 3"):
        load(path, "whole", Whole)


@pytest.mark.parametrize(
    ("make", "reads", "sentence"),
    [
        (a_trace, Report, "a trace, not a report: read it with ld.Trace.load"),
        (a_report, Edit, "a report, not an edit: read it with ld.Report.load"),
        (an_edit, Trace, "an edit, not a trace: read it with ld.Edit.load"),
        (a_trace, ScoreMap, "a trace, not a score map: read it with ld.Trace.load"),
    ],
)
def test_a_file_of_another_kind_is_named_with_its_reader(tmp_path, make, reads, sentence):
    path = make().save(tmp_path / "file")
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path} holds {sentence}')}$"):
        reads.load(path)


def test_a_file_that_is_not_ours_is_refused(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(ValueError, match=r"file cannot be read: .*No such file"):
        load(path, "whole", Whole)
    with pytest.raises(ValueError, match="cannot be read: "):
        load(tmp_path, "whole", Whole)
    path.write_bytes(b"neither JSON nor safetensors")
    with pytest.raises(ValueError, match="cannot be read: "):
        load(path, "whole", Whole)
    save_file({"one": torch.ones(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds no whole"):
        load(path, "whole", Whole)


@pytest.mark.parametrize("kind", ["trace", "edit"])
def test_tensors_of_version_0_1_are_refused_in_a_sentence(tmp_path, kind):
    path = tmp_path / "old.safetensors"
    save_file({"clean": torch.ones(2)}, path, metadata={kind: json.dumps({"layers": [1], "model": "tiny"})})
    with pytest.raises(ValueError, match=rf"old\.safetensors holds no {kind} .* lens_defense 0\.1; make it"):
        load(path, kind, dict)


def test_a_report_of_version_0_1_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"title": "old", "rows": [], "kl": []}), "utf-8")
    with pytest.raises(ValueError, match=r"report\.json holds no report .* lens_defense 0\.1; make it"):
        load(path, "report", Report)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("LENS_DEFENSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    """Makes tensors, a new one each time."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"number": torch.tensor([float(self.calls)])}


def cached_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_cache_makes_once_per_key(cache):
    make = Maker()
    keys = [{"layers": [1, 2], "part": Part(("a",), 0.5)}, {"layers": [1, 2], "part": Part(("a",), 0.25)}]
    for _ in range(2):
        assert [float(cached("numbers", key, make)["number"]) for key in keys] == [1.0, 2.0]
    assert float(cached("other", keys[0], make)["number"]) == 3.0, "another kind"
    assert float(cached("numbers", keys[0], make, enabled=False)["number"]) == 4.0
    assert float(cached("numbers", keys[0], make)["number"]) == 1.0
    assert {path.parent for path in cached_files(cache)} == {cache / "numbers", cache / "other"}


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "another's"])
def test_a_damaged_entry_is_made_anew(cache, damage):
    make = Maker()
    cached("numbers", "key", make)
    (path,) = cached_files(cache)
    intact = path.read_bytes()
    if damage == "another's":
        cached("numbers", "another", make)
        (other,) = set(cached_files(cache)) - {path}
        other.replace(path)
    else:
        flipped = intact[:-1] + bytes([intact[-1] ^ 1])
        path.write_bytes({"flipped": flipped, "cut": intact[:-2], "empty": b""}[damage])
    made = cached("numbers", "key", make)["number"]
    assert float(made) == make.calls >= 2
    assert torch.equal(cached("numbers", "key", make)["number"], made), "and kept"


def test_a_maker_that_fails_leaves_no_entry(cache):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("numbers", "key", interrupted)
    assert not cached_files(cache)


@pytest.mark.parametrize("before", [True, False])
def test_an_interrupted_writer_leaves_the_old_file_or_none(tmp_path, monkeypatch, before):
    path = tmp_path / "file"
    if before:
        save(path, "whole", WHOLE, TENSORS)

    def half(_, file, **__):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        save(path, "whole", WHOLE, {})
    assert list(tmp_path.iterdir()) == ([path] if before else [])
    if before:
        assert_same_bits(load(path, "whole", Whole)[1], TENSORS)


@pytest.mark.parametrize("obstacle", ["read-only", "a file"])
def test_a_cache_that_cannot_be_written_is_no_error(cache, monkeypatch, obstacle):
    if obstacle == "a file":
        cache.write_text("in the folder's place")
    else:
        cache.mkdir()

        def refuse(*_, **__):
            raise PermissionError("read-only")

        monkeypatch.setattr(Path, "mkdir", refuse)  # a test may run as root, who may write anywhere
    make = Maker()
    assert [float(cached("numbers", "key", make)["number"]) for _ in range(2)] == [1.0, 2.0]


def test_the_cache_folder_is_the_users_or_the_one_that_is_set(monkeypatch, tmp_path):
    monkeypatch.delenv("LENS_DEFENSE_CACHE", raising=False)
    assert cache_folder().name == "lens_defense"
    monkeypatch.setenv("LENS_DEFENSE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


def test_the_file_appears_at_the_end_and_its_folder_is_made(tmp_path):
    path = tmp_path / "new" / "text.txt"
    with atomic_write(path) as file:
        file.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there_and_no_debris(tmp_path, stop):
    path = tmp_path / "text.txt"
    path.write_text("before")
    with pytest.raises(stop), atomic_write(path) as file:
        file.write_text("half")
        raise stop
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
