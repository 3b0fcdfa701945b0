"""Folders: of class folders, or flat."""

import os
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from rdpm_cli.errors import DataError
from rdpm_cli.images import decode
from rdpm_cli.images.arrange import CLASSES, EDM, arrange, is_hidden, is_image, read_note, without_wrapper
from rdpm_cli.images.interface import ImageSource


class FolderSource(ImageSource):
    """A folder of class folders, of EDM's images with their `dataset.json`, or a flat folder without labels."""

    def __init__(self, root: Path, found: Iterable[str] | None = None) -> None:
        """found: what `visible_files` says of it, where that is known."""
        self.root = root
        self.spec = str(root.resolve())
        members = visible_files(root) if found is None else found
        if (root / "samples.json").is_file():  # our own pictures: the grids beside them are not images of the set
            members = [name for name in members if not name.startswith("previews/")]
        listing = arrange(members, self.spec, lambda name: read_note(root / name))
        self.names, self.labels, self.class_names = listing.names, listing.labels, listing.class_names
        if listing.by_folder:
            self._need_no_empty_class()

    def _need_no_empty_class(self) -> None:
        """Refuse a class folder without images, as ImageFolder does: it would move the labels of those after it."""
        first = self.names[0]
        wrapper = first[: len(first) - len(without_wrapper(self.names)[0])]
        folders = {entry.name for entry in _entries(self.root / wrapper) if entry.is_dir(follow_symlinks=False)}
        if empty := sorted(folders - set(self.class_names)):
            raise DataError(
                f"{self.root / wrapper / empty[0]} is a class folder without images",
                f"name the folder that holds the images, or list its classes in {CLASSES}, one a line",
            )

    def open(self, index: int) -> Image.Image:
        return decode.open_image(self.root / self.names[index])


def visible_files(root: Path) -> list[str]:
    """Every file below root, relative to it, each folder once.

    Symbolic links are followed, after all real folders; one that leads out of the root is refused by a DataError (but
    for links to shards, which is how download caches keep them).
    """
    inside = os.path.realpath(root)
    found: list[str] = []
    seen: set[str] = set()
    todo, links = [""], list[str]()
    while todo or links:
        folder = todo.pop() if todo else links.pop(links.index(min(links)))
        real = os.path.realpath(root / folder)
        if real in seen:
            continue
        seen.add(real)
        for entry in _entries(root / folder):
            path = f"{folder}/{entry.name}" if folder else entry.name
            is_folder = entry.is_dir()
            if entry.is_symlink() and (is_folder or is_image(path) or entry.name in (CLASSES, EDM)):
                _need_inside(entry.path, inside)
            if not is_folder:
                if is_image(path) and not entry.is_file():
                    raise DataError(f"{entry.path} is no file, or a link to none", "remove it")
                found.append(path)
            else:
                (links if entry.is_symlink() else todo).append(path)
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}", "mend its permissions") from error


def _need_inside(link: str, inside: str) -> None:
    target = os.path.realpath(link)
    if os.path.commonpath([target, inside]) != inside:
        raise DataError(f"{link} is a link out of the folder, to {target}", "copy what it points to, or remove it")
