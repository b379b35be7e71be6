"""Append-only JSON lines that survive kill -9: one file for every fate that a job can have, and the settings beside them."""

import contextlib
import json
import os
import pathlib
import shutil

from lens.errors import LensError
from lens.files import json_object, read_json, take_lock, write_json


def check_folder(folder: pathlib.Path, needed: int = 0) -> None:
    """Raises LensError where the folder cannot be made or has no room for `needed` bytes; makes nothing."""
    at = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not at.is_dir() or not os.access(at, os.W_OK | os.X_OK):
        raise LensError(f'{folder} cannot be written: {at} is {"not writable" if at.is_dir() else "no folder"}.')
    free = shutil.disk_usage(at).free
    if needed > free:
        raise LensError(f'{folder} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB left: make room.')


def cannot_write(path, e: OSError, again: str) -> LensError:
    return LensError(
        f'{path} cannot be written ({e.strerror or e}): free space or choose another place; {again} goes on.'
    )


def read_settings(path: pathlib.Path) -> dict:
    """Returns the settings with which a folder was begun, {} where it was not. Raises LensError."""
    return read_json(path, 'remove it to go on with what is given now') if path.exists() else {}


def filled(path: pathlib.Path) -> bool:
    """Returns whether a file is there and holds something."""
    return path.exists() and path.stat().st_size > 0


class Journal:
    """What became of every job. A subclass says in `note` what a record means, and keeps `counts` of jobs by fate.

    paths: kind -> file; all in `folder`, where settings.json is, except where a subclass says otherwise. One process
    at a time may hold it open. A kill loses what is in flight.
    """

    forgotten: tuple[str, ...] = ()  # kinds whose jobs another command tries again: their lines go when it opens
    again = 'the same command'  # what goes on after an error
    elsewhere = 'another folder'  # what to choose for other settings
    counts: dict[str, int]
    cost = 0.0

    def __init__(self, folder: pathlib.Path, paths: dict[str, pathlib.Path], settings: dict, also: dict | None = None):
        """Reads what is there; `also` is written to settings.json and not compared. Raises LensError."""
        self.folder, self.paths, self._settings = folder, paths, settings | (also or {})
        self._files, self._sizes = {}, dict.fromkeys(paths, 0)
        path, before = folder / 'settings.json', read_settings(folder / 'settings.json')
        begun = before and any(map(filled, paths.values()))
        for key, value in settings.items() if begun else ():
            if before.get(key) != value:
                raise LensError(
                    f'{path} says {key} {before.get(key)!r:.80}, this run {value!r:.80}: give what it was begun with, or '
                    f'choose {self.elsewhere}.'
                )
        self._read()

    def done(self) -> int:
        return sum(self.counts.values())

    def note(self, kind: str, record: dict, at: int) -> bool:
        """Takes notice of the record at byte `at` of its file; False where its job has its fate already."""
        raise NotImplementedError

    def _read(self) -> None:
        """Notes what was added to the files; when they are open, a torn last line is taken off."""
        for kind, path in self.paths.items():
            if kind in self.forgotten or not path.exists():
                continue
            with path.open('rb') as f:
                f.seek(self._sizes[kind])
                for line in f:
                    if not line.endswith(b'\n'):  # torn, or another command is writing it
                        break
                    if (record := json_object(line)) is not None:
                        self.note(kind, record, self._sizes[kind])
                    self._sizes[kind] += len(line)
            if self._files:
                self._files[kind].truncate(self._sizes[kind])

    def records(self, kind: str):
        """Yields the whole records of a file, in their order."""
        with self.paths[kind].open('rb') as f:
            yield from (record for line in f if (record := json_object(line)))

    def open(self) -> None:
        """Makes or takes over the files, unless they are open. Raises LensError."""
        if self._files:
            return
        files = {}
        try:
            for kind, path in self.paths.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                files[kind] = path.open('ab', buffering=0)
                take_lock(files[kind], f'Another command is writing {path}: wait for its end or stop it.')
            self._files = files
            for kind in self.forgotten:
                files[kind].truncate(0)
            self._read()
            path = self.folder / 'settings.json'
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, self._settings)
        except OSError as e:
            raise cannot_write(path, e, self.again) from None
        finally:
            if not self._files:
                for file in files.values():
                    file.close()

    def append(self, kind: str, record: dict) -> bool:
        """Writes a line, which survives the end of this process; False where the job has its fate already.

        Raises LensError; then the file is as it was.
        """
        at = self._sizes[kind]
        if not self.note(kind, record, at):
            return False
        line = (json.dumps(record, ensure_ascii=False) + '\n').encode('utf-8', 'replace')
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._files[kind].write(rest) :]
        except OSError as e:
            with contextlib.suppress(OSError):
                self._files[kind].truncate(at)
            raise cannot_write(self.paths[kind], e, self.again) from None
        self._sizes[kind] += len(line)
        return True

    def sync(self) -> None:
        """Makes what was appended survive the end of the machine, too. Raises LensError."""
        for kind, file in self._files.items():
            try:
                os.fsync(file.fileno())
            except OSError as e:
                raise cannot_write(self.paths[kind], e, self.again) from None

    def close(self) -> None:
        self.sync()
        for file in self._files.values():
            file.close()
        self._files = {}
