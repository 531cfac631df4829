"""A file appears whole or not at all, and gives back what was saved or a sentence that says why not."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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
from lens_defense.storage import (
    MANIFEST,
    atomic_folder,
    atomic_write,
    cache_folder,
    cached,
    check_manifest,
    load,
    require_shapes,
    save,
)
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


JSON_AND_TENSORS = pytest.mark.parametrize("tensors", [None, TENSORS], ids=["json", "tensors"])


@JSON_AND_TENSORS
def test_a_flipped_bit_anywhere_is_refused(tmp_path, tensors):
    path = save(tmp_path / "file", "whole", WHOLE, tensors)
    intact = path.read_bytes()
    for i in range(len(intact)):
        path.write_bytes(intact[:i] + bytes([intact[i] ^ 1 << i % 8]) + intact[i + 1 :])
        with pytest.raises(ValueError, match=r"file (is damaged|holds no whole).*make it again"):
            load(path, "whole", Whole)


@JSON_AND_TENSORS
def test_a_file_cut_short_is_refused(tmp_path, tensors):
    path = save(tmp_path / "file", "whole", WHOLE, tensors)
    intact = path.read_bytes()
    for length in (0, 1, len(intact) // 2, len(intact) - 1):
        path.write_bytes(intact[:length])
        with pytest.raises(ValueError, match=r"file (is damaged|holds no whole).*make it again"):
            load(path, "whole", Whole)


@JSON_AND_TENSORS
def test_a_whole_file_of_another_kind_format_or_type_is_refused(tmp_path, monkeypatch, tensors):
    path = save(tmp_path / "file", "whole", WHOLE, tensors)
    with pytest.raises(ValueError, match=r"file holds a whole, not a part: give another file$"):
        load(path, "part", Part)
    with pytest.raises(ValueError, match="holds no whole that this version can read"):
        load(path, "whole", Part)
    monkeypatch.setattr(storage, "FORMAT", 4)
    with pytest.raises(ValueError, match="has the format version 3, and this version reads 4; make it again"):
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


def test_what_looks_like_a_seal_in_the_content_is_content(tmp_path):
    content = {storage.SEAL: "f" * 64, "text": f'{storage.SEAL}": "{"e" * 64}'}
    for tensors in (None, {"one": torch.ones(1)}):
        assert load(save(tmp_path / "file", "plain", content, tensors), "plain", dict)[0] == content


def test_loaded_tensors_do_not_follow_the_file(tmp_path):
    path = save(tmp_path / "file", "whole", WHOLE, TENSORS)
    _, tensors = load(path, "whole", Whole)
    path.write_bytes(bytes(path.stat().st_size))
    assert_same_bits(tensors, TENSORS)


def test_a_file_that_is_not_ours_is_refused(tmp_path):
    path = tmp_path / "file"
    for not_a_file in (path, tmp_path):
        with pytest.raises(ValueError, match=r"cannot be read \(.*\): give a file of the kind 'whole'"):
            load(not_a_file, "whole", Whole)
    path.write_bytes(b"neither JSON nor safetensors")
    with pytest.raises(ValueError, match="holds no whole"):
        load(path, "whole", Whole)
    save_file({"one": torch.ones(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds no whole"):
        load(path, "whole", Whole)


def test_a_file_of_an_older_version_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "old"
    fields = {"layers": [1], "model": "tiny"}
    format_2 = json.dumps({"format": 2, "kind": "trace", "sha256": "0" * 64, "content": fields})
    old_sentence = "holds no trace .* of an older version, or damaged; make it again"
    for metadata in ({"trace": json.dumps(fields)}, {"lens_defense": format_2}):
        save_file({"clean": torch.ones(2)}, path, metadata=metadata)
        with pytest.raises(ValueError, match=old_sentence):
            load(path, "trace", dict)
    for text in (json.dumps(fields), format_2):
        path.write_text(text, "utf-8")
        with pytest.raises(ValueError, match=old_sentence):
            load(path, "trace", dict)


SHAPES = {"square": ("n", "n"), "row": (1, "n")}


@pytest.mark.parametrize(
    "tensors, names",
    [
        ({"square": (3, 3), "row": (1, 3)}, ""),
        ({"square": (3, 3)}, "row"),
        ({"square": (3, 3), "row": (1, 3), "more": (1,)}, "more"),
        ({"square": (3, 4), "row": (1, 3)}, "square"),
        ({"square": (3, 3), "row": (2, 3)}, "row"),
        ({"square": (3, 3, 1), "row": (1, 3)}, "square"),
        ({"square": (3, 3), "row": (1, 2)}, "row|square"),
    ],
)
def test_tensors_of_other_shapes_are_refused_by_name(tensors, names):
    tensors = {name: torch.zeros(shape) for name, shape in tensors.items()}
    if not names:
        require_shapes("file", tensors, SHAPES)
        return
    with pytest.raises(ValueError, match=f"do not fit its content: ({names}); make it again"):
        require_shapes("file", tensors, SHAPES)


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


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "another's", "another key's content"])
def test_a_damaged_entry_is_made_anew_and_said(cache, damage, caplog):
    make = Maker()
    cached("numbers", "key", make)
    (path,) = cached_files(cache)
    intact = path.read_bytes()
    if damage == "another's":
        cached("numbers", "another", make)
        (other,) = set(cached_files(cache)) - {path}
        other.replace(path)
    elif damage == "another key's content":
        save(path, "numbers", {"key": "of another"}, {"number": torch.tensor([7.0])})
    else:
        flipped = intact[:-1] + bytes([intact[-1] ^ 1])
        path.write_bytes({"flipped": flipped, "cut": intact[:-2], "empty": b""}[damage])
    assert not caplog.records
    made = cached("numbers", "key", make)["number"]
    assert float(made) == make.calls >= 2
    (record,) = caplog.records
    assert str(path) in record.message and "made anew" in record.message
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

    monkeypatch.setattr(storage.safetensors.torch, "save_file", half)
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


@pytest.mark.usefixtures("cache")
def test_an_entry_that_may_not_be_read_is_made_anew(monkeypatch):
    make = Maker()
    cached("numbers", "key", make)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert float(cached("numbers", "key", make)["number"]) == 2.0


def test_writers_of_one_entry_meet_no_error_and_the_last_whole_one_stays(cache):
    start = threading.Barrier(8)

    def write(i):
        start.wait()
        for _ in range(20):
            save(cache / "entry", "number", i, {"number": torch.full((500,), float(i))})
            content, tensors = load(cache / "entry", "number", int)
            assert set(tensors["number"].tolist()) == {float(content)}

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(8)))
    assert [path.name for path in cache.iterdir()] == ["entry"]


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


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_have_the_mode_that_the_umask_allows(tmp_path, umask):
    for tensors in (None, TENSORS):
        path = save(tmp_path / "file", "whole", WHOLE, tensors)
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    with atomic_folder(tmp_path / "folder") as folder:
        save_file({"one": torch.ones(1)}, folder / "model.safetensors")
        (folder / "part").mkdir()
    for path in (tmp_path / "folder", *(tmp_path / "folder").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_what_killed_writers_left_is_removed_after_a_day(tmp_path):
    writer = f"""
import os
from lens_defense.storage import atomic_folder, atomic_write
with atomic_write({str(tmp_path / "file")!r}) as file, atomic_folder(file.parent / "folder") as folder:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", writer]).returncode == -signal.SIGKILL
    debris = list(tmp_path.iterdir())
    assert len(debris) == 2
    mine = tmp_path / ".mine"
    mine.write_text("not yours")
    save(tmp_path / "other", "whole", WHOLE)
    assert all(path.exists() for path in debris), "they may still be written"
    for path in (*debris, mine):
        os.utime(path, (1, 1))
    save(tmp_path / "other", "whole", WHOLE)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "other"]


@pytest.fixture
def folder(tmp_path):
    """A folder with a manifest."""
    with atomic_folder(tmp_path / "folder", {"model": "tiny"}) as unfinished:
        for name in ("config.json", "model.safetensors", "README.md", "templates/tool.jinja"):
            (unfinished / name).parent.mkdir(exist_ok=True)
            (unfinished / name).write_text(name)
    return tmp_path / "folder"


def test_a_folder_is_whole_where_notes_are_added_or_changed(folder):
    check_manifest(folder)
    (folder / "README.md").write_text("another card")
    (folder / "LICENSE").write_text("MIT")
    check_manifest(folder)
    (folder / "config.json").write_text("{}")
    (folder / MANIFEST).unlink()
    check_manifest(folder)


@pytest.mark.parametrize(
    "name, change, fault",
    [
        ("config.json", "{}", "is not as it was saved"),
        ("templates/tool.jinja", "", "is not as it was saved"),
        ("model.safetensors", None, "is missing from the folder"),
        ("model.safetensors.index.json", "{}", "was added to the folder after it was saved"),
        ("lens_defense.json", "{}", "holds no folder"),
    ],
)
def test_a_sentence_says_which_file_of_a_folder_differs(folder, name, change, fault):
    (folder / name).unlink(missing_ok=True)
    if change is not None:
        (folder / name).write_text(change)
    with pytest.raises(ValueError, match=rf"{name} {fault}") as caught:
        check_manifest(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("unchecked")
def test_results_whose_tensors_do_not_fit_are_refused_also_without_asserts(tmp_path):
    """Whole files that no version of the package would write."""
    trace, edit = a_trace(), an_edit()
    replace(trace, patched=trace.patched[:, :, 1:]).save(tmp_path / "trace")
    replace(trace, clean=trace.clean[:0]).save(tmp_path / "clean")
    factors = {f"left.{layer}": left for layer, left in edit.left.items()}
    factors |= {f"right.{layer}": right[1:] for layer, right in edit.right.items()}
    save(tmp_path / "edit", "edit", replace(edit, left={}, right={}), factors)
    code = f"""
import lens_defense as ld
for kind, name in ((ld.Trace, "trace"), (ld.Trace, "clean"), (ld.Edit, "edit")):
    try:
        kind.load({str(tmp_path)!r} + "/" + name)
    except ValueError as error:
        print(error)
"""
    printed = subprocess.run(
        [sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    for line, name in zip(printed.splitlines(), ("patched", "clean", "left.1"), strict=True):
        assert "tensors that do not fit its content" in line and name.partition(".")[0] in line.replace(
            "right", "left"
        )


def test_no_home_breaks_nothing_where_the_cache_is_named(tmp_path):
    code = """
import pwd
def nobody(_):
    raise KeyError("uid not found")
pwd.getpwuid = nobody
import lens_defense as ld
from lens_defense.storage import cache_folder
model = ld.load("organism", device="cpu")
requests = ld.requests("organism")[:1]
print(len(ld.trace(model, requests, layers=[2], progress=False).prompts), cache_folder())
for name in ("~/nothing", "~nobody/nothing"):
    try:
        ld.load(name)
    except ValueError as error:
        print(error)
import os
del os.environ["LENS_DEFENSE_CACHE"]
try:
    cache_folder()
except ValueError as error:
    print(error)
"""
    other_variables = {
        name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")
    }
    environment = {**other_variables, "LENS_DEFENSE_CACHE": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert lines[0] == f"1 {tmp_path}", run.stderr
    assert [line.startswith("there is no folder '~") for line in lines[1:3]] == [True, True]
    assert lines[3] == "there is no home folder to keep a cache in; set LENS_DEFENSE_CACHE to a folder"
