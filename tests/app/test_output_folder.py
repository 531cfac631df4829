"""Folders that commands write to are tried first, and a failure leaves them as they were."""

import pytest

from lens_defense.app.output_folder import require_writable, staged_folder


def all_files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
    }


def test_a_trial_leaves_nothing(tmp_path):
    require_writable(tmp_path / "new/deep/folder")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").write_text("mine")
    require_writable(tmp_path)
    assert all_files(tmp_path) == {"mine": "mine"}


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"folder .*file/below \(Not a directory\); name another one$"):
        require_writable(tmp_path / "file/below")


def test_files_appear_at_the_end(tmp_path):
    out = tmp_path / "new/folder"
    with staged_folder(out, pytest.fail) as folder:
        (folder / "page").write_text("new")
        assert not (out / "page").exists()
    assert all_files(tmp_path) == {"new/folder/page": "new"}
    assert [path.name for path in out.iterdir()] == ["page"]


def test_earlier_files_are_kept_and_others_stay(tmp_path):
    (tmp_path / "notes").write_text("mine")
    said = []
    for text in ("first", "second", "third"):
        with staged_folder(tmp_path, said.append) as folder:
            (folder / "page").write_text(text)
    assert all_files(tmp_path) == {
        "notes": "mine",
        "page": "third",
        "earlier-1/page": "first",
        "earlier-2/page": "second",
    }
    assert [str(tmp_path / f"earlier-{i}") in sentence for i, sentence in enumerate(said, 1)] == [True, True]


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("older", [True, False])
def test_a_failure_leaves_what_was_there(tmp_path, stop, older):
    out = tmp_path / "new/folder"
    if older:
        out.mkdir(parents=True)
        (out / "page").write_text("old")
    with pytest.raises(stop), staged_folder(out, pytest.fail) as folder:
        (folder / "page").write_text("half")
        raise stop
    assert all_files(tmp_path) == ({"new/folder/page": "old"} if older else {})
    assert older or list(tmp_path.iterdir()) == []
