"""The manifest of a profile: every shard with its number of samples, size and checksum.

A shard that is missing, changed, or not from this profile is noticed. The manifest is written after each shard, so a
killed process leaves at most one complete shard that is not listed, the last one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schedule_finder.errors import StoreError
from schedule_finder.files import parse_json, write_json

FORMAT, VERSION = "adaptinfer-profile-manifest", 1


class Manifest:
    """``2_profile/manifest.json``: the shards that belong to a profile.

    Profiles of earlier releases have none; all their shards belong to them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "manifest.json"
        self._checked: dict[Path, tuple[Any, ...]] = {}
        """Shards whose checksum was right, with what they and the manifest said then: a scan reads each many times."""
        self._parsed: tuple[Any, dict[str, dict[str, Any]]] | None = None

    def listed(self) -> dict[str, dict[str, Any]] | None:
        """File name to ``samples``, ``bytes`` and ``sha256``; None where there is no manifest. Raises `StoreError`."""
        try:
            state = file_state(self._path)
            if self._parsed is None or self._parsed[0] != state:
                self._parsed = state, self._parse()
            return dict(self._parsed[1])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return self._refuse(f"not readable: {error}")

    def _parse(self) -> dict[str, dict[str, Any]]:
        document = parse_json(self._path.read_text(encoding="utf-8"))
        known = document.get("format") == FORMAT and document.get("version") == VERSION
        if not known:
            return self._refuse("another format or version")
        for name, facts in document["shards"].items():
            if not (
                type(facts["samples"]) is type(facts["bytes"]) is int and isinstance(facts["sha256"], str)
            ):
                return self._refuse(f"samples, bytes and sha256 of {name} are not given")
        return dict(document["shards"])

    def missing(self) -> dict[str, dict[str, Any]]:
        """Listed shards that are not in the folder."""
        listed = self.listed() or {}
        return {name: facts for name, facts in listed.items() if not (self._folder / name).is_file()}

    def unlisted(self) -> list[Path]:
        """Shards in the folder that are not listed; none where there is no manifest."""
        listed = self.listed()
        return [] if listed is None else [path for path in shards(self._folder) if path.name not in listed]

    def check_complete(self) -> None:
        """Raise `StoreError` where a shard is missing, or one is there that does not belong to the profile."""
        if missing := self.missing():
            samples = sum(facts["samples"] for facts in missing.values())
            raise StoreError(
                f"{self._folder}: {', '.join(missing)} missing ({samples} samples); restore the file, or run the same "
                "`adaptinfer-profile profile` again, which does its samples again"
            )
        if foreign := [path for path in self.unlisted() if not self._is_next(path)]:
            raise StoreError(
                f"{self._folder}: {foreign[0].name} is not in manifest.json; move it elsewhere (profiles are joined with "
                "`adaptinfer-profile merge`)"
            )

    def is_changed(self, path: Path) -> bool:
        """Whether a listed shard is not the file that was written."""
        facts = (self.listed() or {}).get(path.name)
        if facts is None:
            return False
        state = (*file_state(path), facts["sha256"])
        if self._checked.get(path) == state:
            return False
        if facts["bytes"] != path.stat().st_size or facts["sha256"] != _checksum(path):
            return True
        self._checked[path] = state
        return False

    def add(self, paths: list[Path]) -> None:
        """List shards that are in the folder."""
        shards_by_name = self.listed() or {}
        for path in paths:
            try:
                samples = pq.read_metadata(path).num_rows
            except (pa.ArrowInvalid, OSError):  # reading it reports the damage
                samples = 0
            shards_by_name[path.name] = {
                "samples": samples,
                "bytes": path.stat().st_size,
                "sha256": _checksum(path),
            }
        self._write(shards_by_name)

    def drop(self, names: list[str]) -> None:
        """No longer list some shards: their samples are done again."""
        self._write({name: facts for name, facts in (self.listed() or {}).items() if name not in names})

    def adopt(self) -> None:
        """List what is not listed but belongs to the profile.

        All shards of an earlier release, or the last shard of a process that was killed before it listed it.
        """
        if self.listed() is None:
            if there := shards(self._folder):
                self.add(there)
        elif last := [path for path in self.unlisted() if self._is_next(path)]:
            self.add(last)

    def next_number(self) -> int:
        """Number of the next shard; none is used twice."""
        names = {path.stem for path in shards(self._folder)} | {
            Path(name).stem for name in self.listed() or {}
        }
        return max((number_of(name) for name in names), default=-1) + 1

    def _is_next(self, path: Path) -> bool:
        listed = [number_of(Path(name).stem) for name in self.listed() or {}]
        return number_of(path.stem) == max(listed, default=-1) + 1

    def _write(self, listed: dict[str, dict[str, Any]]) -> None:
        write_json(self._path, {"format": FORMAT, "version": VERSION, "shards": dict(sorted(listed.items()))})

    def _refuse(self, reason: str) -> Any:
        raise StoreError(
            f"{self._path}: {reason}; restore it, or remove it to accept the shards beside it as they are"
        )


def shards(folder: Path) -> list[Path]:
    """The shards in a folder, in order."""
    return sorted(
        path for path in folder.glob("part-*.parquet") if path.stem.removeprefix("part-").isdecimal()
    )


def number_of(stem: str) -> int:
    """Number of a shard from its name without the suffix."""
    return int(stem.removeprefix("part-"))


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_state(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written or replaced."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
