"""Code stores at a URL, each by a copy on this machine: fetched before it is read, sent while it is written.

A store is mapped into memory, locked and renamed into place, which object stores cannot do. The copies are below
$XDG_CACHE_HOME/rdpm, or ~/.cache/rdpm, until the user removes them."""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from rdpm_cli import files
from rdpm_cli.codes.store import MANIFEST, TOKENIZER, Plan
from rdpm_cli.data.folder import one_at_a_time
from rdpm_cli.data.remote import Place, RemotePath
from rdpm_cli.errors import DataError, RdpmError, RunError, UsageError
from rdpm_cli.runs import RUN_FILE

SHARD = re.compile(r"\w+-(\d+)\.npy")
REQUESTS = 8  # at once
T = TypeVar("T")


class Mirror:
    """A store at a URL, and its copy, which the processes of this machine share."""

    def __init__(self, url: str) -> None:
        self.remote = RemotePath(url)
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.folder = cache / "rdpm" / quote(str(self.remote), safe="")
        self._sent: dict[str, int] = {}  # time of change of the copy's files that are as at the URL, by name

    def fetch(self, shards: Collection[int] | None = None, begun: Plan | None = None) -> Path:
        """Bring the copy up to date; of the shards only these. begun: where there is none yet. -> its folder.

        What only the copy has stays if it is of the same store. Raises UsageError for a URL that holds other files."""
        with one_at_a_time(self.folder), files.report_full_disk(self.folder):
            sizes, plan = self.remote.sizes(), _plan(self.remote)
            if plan is None and (found := self.remote.walk()):
                raise UsageError(f"{self.remote} holds {min(found)}, and no code store", "name another URL")
            if begun and plan is None:
                plan = _fixed(begun.model_dump(mode="json"))
            if plan not in (None, _plan(self.folder)):
                for path in self.folder.glob("[!.]*"):
                    path.unlink()
            notes = {name for name in sizes if name.endswith(".json")}
            before = _sums(self.folder)
            self._get(notes)
            sums, rest = _sums(self.folder), sizes.keys() - notes
            there = {path.name: path.stat().st_size for path in self.folder.iterdir()}
            same = {name for name in rest if (there.get(name), before.get(name)) == (sizes[name], sums.get(name))}
            lacking = rest - same
            if shards is not None:
                others = {name for name in lacking if (shard := SHARD.fullmatch(name)) and int(shard[1]) not in shards}
                lacking -= others
                for name in others & there.keys():  # of another machine's since, which this one must not send back
                    (self.folder / name).unlink()
            files.need_space(self.folder, sum(sizes[name] for name in lacking))
            self._get(lacking)
            self._sent = {name: (self.folder / name).stat().st_mtime_ns for name in notes | same | lacking}
        return self.folder

    def send(self) -> None:
        """Send what has changed in the copy, a note after its shard and the manifest last, and remove what has gone."""
        times = {path.name: path.stat().st_mtime_ns for path in self.folder.glob("[!.]*")}
        changed = [name for name, time in times.items() if self._sent.get(name) != time]
        for name in sorted(changed, key=lambda name: (name == MANIFEST, name.endswith(".json"))):
            (self.remote / name).write_bytes((self.folder / name).read_bytes())
        gone = self._sent.keys() - times.keys()
        if any(name == TOKENIZER or SHARD.fullmatch(name) for name in gone):
            raise RunError(f"{self.folder} was emptied while it was used", "run the command again: it goes on")
        for name in gone:
            (self.remote / name).unlink()
        self._sent = times

    def sending(self, pieces: Generator[int, None, None]) -> Generator[int, None, None]:
        """The counts of `write_store`; what is written by then is sent before each.

        Raises UsageError for processes of several machines, whose copies would differ."""
        if os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1"):
            hint = "give every machine some --shards of its own, then --finish"
            raise UsageError(f"{self.remote} is a URL, and processes of several machines are to write it", hint)
        try:
            with contextlib.closing(pieces):
                for count in pieces:
                    self.send()
                    yield count
        except RdpmError as error:  # the user knows the URL
            error.message = error.message.replace(str(self.folder), str(self.remote))
            raise
        self.send()

    def _get(self, names: Collection[str]) -> None:
        def get(name: str) -> None:
            content = (self.remote / name).read_bytes()
            files.write_atomic(self.folder / name, lambda file: file.write(content))

        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(get, sorted(names)))


def fetched(url: str) -> Path:
    """The copy of the finished store at a URL. Raises DataError where there is none."""
    mirror = Mirror(url)
    if not is_store(url):
        raise DataError(f"{mirror.remote} is not a finished code store", "make it with `rdpm tokenize IMAGES URL`")
    return mirror.fetch()


def is_store(url: str) -> bool:
    """Whether there is a finished store at a URL."""
    return (RemotePath(url) / MANIFEST).exists()


def _plan(folder: Place) -> dict[str, Any] | None:
    """What fixes the bytes of a store, apart from the name of its source; None where there is no store."""
    for name in (MANIFEST, RUN_FILE):
        if (folder / name).exists():
            return _read(folder / name, lambda content: _fixed(content.get("plan", content)))
    return None


def _fixed(plan: dict[str, Any]) -> dict[str, Any]:
    return {**{key: plan.get(key) for key in Plan.model_fields}, "data": {**plan.get("data", {}), "source": None}}


def _sums(folder: Path) -> dict[str, str]:
    """sha256 of the files that the notes and the manifest list, by name."""
    lists = [_read(path, lambda note: [note["sha256"]]) for path in folder.glob("note-*.json")]
    if (folder / MANIFEST).exists():
        lists += [
            _read(folder / MANIFEST, lambda found: [found["files"], *(shard["sha256"] for shard in found["shards"])])
        ]
    return {name: digest for sums in itertools.chain(*lists) for name, digest in sums.items()}


def _read(path: Place, take: Callable[[Any], T]) -> T:
    """What is taken from a JSON file of a store. Raises DataError for another content."""
    try:
        return take(json.loads(path.read_bytes()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{path} is not of a code store: {error!r}"
        raise DataError(reason, "remove it, or name another URL; then run the command again") from error
