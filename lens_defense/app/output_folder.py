"""Folders that commands write to: tried before the long work, and left as they were after a failure."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path


def require_writable(folder: Path) -> None:
    """Try to write a file into a folder that need not exist yet; nothing is left of the trial.

    Raises:
        ValueError: the folder cannot be made, or nothing can be written to it.
    """
    try:
        with _removed_if_left_empty(folder), tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise ValueError(
            f"nothing can be written to the folder {folder} ({error.strerror}); name another one"
        ) from error


@contextmanager
def staged_folder(folder: Path, say: Callable[[str], object]) -> Iterator[Path]:
    """A folder to write to, whose files move to `folder` at the end; after a failure none of them is left.

    Files of these names that lie there already are not written over: they move to a new folder inside.

    Args:
        folder: where the files go.
        say: is told where older files are now.
    """
    with (
        _removed_if_left_empty(folder),
        tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as unfinished,
    ):
        yield Path(unfinished)
        files = sorted(Path(unfinished).iterdir())
        earlier = [folder / file.name for file in files if (folder / file.name).exists()]
        if earlier:
            earlier_folder = next(path for i in count(1) if not (path := folder / f"earlier-{i}").exists())
            earlier_folder.mkdir()
            for file in earlier:
                file.rename(earlier_folder / file.name)
            say(f"The files of an earlier run are now in {earlier_folder}")
        for file in files:
            file.rename(folder / file.name)


@contextmanager
def _removed_if_left_empty(folder: Path) -> Iterator[None]:
    """A folder made with its parents; those of them that are still empty at the end are taken away again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # it is not empty
                path.rmdir()
