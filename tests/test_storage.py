"""A file appears whole or not at all."""

import pytest

from lens_defense.storage import atomic_write


def test_the_file_appears_at_the_end_and_its_folder_is_made(tmp_path):
    path = tmp_path / "new" / "told.txt"
    with atomic_write(path) as file:
        file.write_text("told")
        assert not path.exists()
    assert path.read_text() == "told"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there_and_no_debris(tmp_path, stop):
    path = tmp_path / "told.txt"
    path.write_text("before")
    with pytest.raises(stop), atomic_write(path) as file:
        file.write_text("half")
        raise stop
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
