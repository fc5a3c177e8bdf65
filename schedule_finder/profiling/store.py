"""Profiles on disk: Parquet shards that are appended, resumed, merged and read.

Scores are stored per layer as float16 fractions of the layer's largest value, with that value beside
them, so that small attention keeps its precision.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pruning_runtime.geometry import DecoderShape
from schedule_finder.errors import StoreError
from schedule_finder.files import parse_json, replacing, write_json, writing
from schedule_finder.models.fingerprint import differences
from schedule_finder.profiling.columns import (
    COLUMNS,
    COUNTS,
    SMALL_COLUMNS,
    arrays_of,
    rows_by_id,
    score_arrays,
    table_of,
)
from schedule_finder.profiling.fields import CURVE_FIELDS, SCORE_FIELDS, ProfileRow
from schedule_finder.profiling.frames import curves_table, tokens_table
from schedule_finder.profiling.manifest import Manifest, file_state, shards
from schedule_finder.profiling.stored_scores import StoredScores, chosen
from schedule_finder.run.schema import missing_fields, problem_of_meta

__all__ = ["Profile", "ProfileStore", "StoreError"]

FORMAT, VERSION = "adaptinfer-profile", 2
_EARLIER: dict[str, Any] = {"left_out": {}, "text_queries": None}
"""Fields that earlier releases did not write, as they were then."""
_VERSION_1_NAMES = {"num_raters": "num_text_queries"}


@dataclass
class Profile:
    """A whole profile. Scores, which are nearly all of it, may be read from the disk when they are used.

    Attributes:
        meta: the store's ``meta.json``: backbone, layers, reasons for layers left out, dtype, prompt digest.
        ids: sample ids, in the order of everything else.
        counts: ``num_vision``, ``num_text_queries``, ``num_other`` to int ``[samples]``.
        scores: score field to one float32 ``[layers, num_vision]`` per sample, in memory or `StoredScores`.
        curves: curve field to float32 ``[samples, layers]``.
    """

    meta: dict[str, Any]
    ids: list[str]
    counts: dict[str, np.ndarray]
    scores: dict[str, Sequence[np.ndarray]] = field(repr=False)
    curves: dict[str, np.ndarray] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def maps(self) -> Sequence[np.ndarray]:
        """Attention of the text queries to each vision token, mean over heads and queries: ``[layers, num_vision]``."""
        return self.scores["uniform_text"]

    @property
    def layers(self) -> list[int]:
        """Decoder layers of the ``layers`` dimension, rising; layers without attention of their own are missing."""
        return list(self.meta["layers"])

    @property
    def shape(self) -> DecoderShape:
        """Geometry of the decoder."""
        sizes: dict[str, Any] = self.meta["shape"]
        fields: dict[str, Any] = {
            name: tuple(size) if isinstance(size, list) else size for name, size in sizes.items()
        }
        return DecoderShape(**fields)

    @property
    def earliest_stage(self) -> int:
        """Layer of the earliest possible stage: -1, before the decoder, where layer 0 has attention to score with."""
        return -1 if 0 in self.layers else 0

    @property
    def num_layers(self) -> int:
        """Decoder layers of the backbone."""
        return self.meta["backbone"]["num_layers"]

    @cached_property
    def mean_vision(self) -> float:
        """Mean number of vision tokens of a sample."""
        return float(self.counts["num_vision"].mean())

    @cached_property
    def mean_other(self) -> float:
        """Mean number of a sample's other tokens."""
        return float(self.counts["num_other"].mean())

    @cached_property
    def lengths(self) -> dict[str, int]:
        """Tokens of each sample's prompt, by id."""
        tokens = self.counts["num_vision"] + self.counts["num_other"]
        return dict(zip(self.ids, tokens.tolist(), strict=True))

    def to_pandas(self) -> pd.DataFrame:
        """One row per sample and layer; see `frames.curves_table`."""
        return curves_table(self)

    def tokens_to_pandas(self, sample_id: str) -> pd.DataFrame:
        """One row per layer and vision token of a sample; see `frames.tokens_table`."""
        return tokens_table(self, sample_id)

    def subset(self, indices: Sequence[int] | np.ndarray) -> Profile:
        """The profile of some samples, by index, in memory."""
        return Profile(
            self.meta,
            [self.ids[i] for i in indices],
            {name: values[indices] for name, values in self.counts.items()},
            {name: chosen(values, indices) for name, values in self.scores.items()},
            {name: values[indices] for name, values in self.curves.items()},
        )


class ProfileStore:
    """The folder ``2_profile``: ``meta.json``, ``manifest.json`` and ``part-*.parquet``, one row per sample."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._manifest = Manifest(folder)
        self._scanned: tuple[Any, list[str], list[tuple[Path, int]]] | None = None

    @property
    def meta_path(self) -> Path:
        """The file that describes the shards."""
        return self.folder / "meta.json"

    def open(self, meta: dict[str, Any], report: Callable[[str], None] = lambda _line: None) -> None:
        """Begin a store, or continue one with the same meta; one of version 1 becomes version 2.

        ``report`` is called with a line where it is not known whether the backbone has changed. Raises `StoreError`
        where the folder holds a profile of something else.
        """
        # Through JSON, which has lists only: what is compared is what a file holds.
        meta = json.loads(json.dumps(_EARLIER | {"format": FORMAT, "version": VERSION} | meta))
        if self.meta_path.exists():
            known = self.meta()
            if "backbone" in meta:
                self.check_backbone(meta["backbone"], report)
            different = [key for key in meta if not _same(key, known.get(key), meta[key])]
            if different:
                raise StoreError(
                    f"{self.folder} holds a profile with another {', '.join(different)}; "
                    "choose another --out, or remove that folder to start again"
                )
            self._manifest.adopt()
            # Earlier releases stated less of the shape. A fingerprint is never added to samples that are stored already.
            meta = (
                known | {"shape": known["shape"] | meta["shape"]}
                if "shape" in meta and "shape" in known
                else known
            )
            if parse_json(self.meta_path.read_text(encoding="utf-8")) == meta:
                return
        write_json(self.meta_path, meta)

    def check_backbone(
        self, backbone: dict[str, Any], report: Callable[[str], None] = lambda _line: None
    ) -> None:
        """Raise `StoreError` where the profile is of another state of this backbone's checkpoint.

        Args:
            backbone: identity of the backbone that is loaded.
            report: called with a line where the profile holds no fingerprint to compare with.
        """
        if not self.meta_path.exists():
            return
        known = self.meta()["backbone"].get("fingerprint")
        found = backbone.get("fingerprint")
        if changed := differences(known, found):
            raise StoreError(
                f"{self.folder}: the {' and the '.join(changed)} of backbone {backbone.get('name')!r} changed since it was "
                "profiled; restore the checkpoint, or choose another --out and profile again"
            )
        if not known and found:
            report(
                f"{self.folder}: written by an earlier release, without a fingerprint of the backbone; whether its "
                "weights changed is not known"
            )

    def meta(self) -> dict[str, Any]:
        """The content of ``meta.json``, as version 2. Raises `StoreError` where there is no profile."""
        try:
            meta = parse_json(self.meta_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StoreError(
                f"{self.folder}: no profile here; run `adaptinfer-profile profile` first"
            ) from None
        except ValueError as error:
            raise StoreError(
                f"{self.meta_path}: not readable ({error}); profile again into a new folder"
            ) from error
        if not isinstance(meta, dict):
            raise StoreError(f"{self.meta_path}: holds no JSON object; profile again into a new folder")
        if meta.get("format") != FORMAT or meta.get("version") not in (1, VERSION):
            raise StoreError(
                f"{self.meta_path}: format {meta.get('format')!r}, version {meta.get('version')!r}; need {FORMAT!r}, "
                f"version 1 or {VERSION}"
            )
        meta = _EARLIER | meta | {"version": VERSION}
        if (problem := problem_of_meta(meta)) is not None:
            raise StoreError(f"{self.meta_path}: {problem}; profile again into a new folder")
        return meta

    def append(self, ids: Sequence[str], rows: Sequence[ProfileRow]) -> None:
        """Write one shard in one step; a reader sees all of it or nothing. Raises `InputError`."""
        if rows:
            self._append(table_of(ids, rows))

    def ids(self) -> list[str]:
        """Ids of all samples that are stored, in no order."""
        return [
            name for path in self._parts() for name in pq.read_table(path, columns=["id"])["id"].to_pylist()
        ]

    def recover(self, report: Callable[[str], None]) -> list[str]:
        """Read every shard, set damaged and foreign ones aside, and return the ids of the samples that are left.

        ``report`` is called with a line about every shard that is damaged, missing, or not from this profile.
        """
        found: list[str] = []
        for name, facts in self._manifest.missing().items():
            report(f"{self.folder / name} is missing: its {facts['samples']} samples are done again")
        for path in self._manifest.unlisted():
            report(f"{path} is not in manifest.json and is set aside as {path.stem}.unlisted")
            with writing(path):
                path.rename(path.with_suffix(".unlisted"))
        for path in self._parts():
            try:
                found += self._load(path)["id"].to_pylist()
            except (pa.ArrowInvalid, OSError) as error:
                aside = path.with_suffix(".corrupt")
                with writing(path):
                    path.rename(aside)
                report(
                    f"{path} is damaged ({_in_one_line(error)}) and set aside as {aside.name}; its samples are done again"
                )
        if gone := self._manifest.missing():
            self._manifest.drop(list(gone))
        return found

    def read(self) -> Profile:
        """All samples, each once, ordered by id; scores when they are used. Raises `StoreError`."""
        meta = self._readable_meta()
        names, _ = self._rows()
        table = pa.concat_tables([self._read(path, SMALL_COLUMNS) for path in self._parts()])
        order = rows_by_id(names)
        curves = {name: np.stack(arrays_of(table[name]))[order] for name in CURVE_FIELDS}
        self._check_layers(meta, curves[CURVE_FIELDS[0]])
        counts = {name: table[name].to_numpy()[order] for name in COUNTS}
        scores: dict[str, Sequence[np.ndarray]] = {name: self.scores(name) for name in SCORE_FIELDS}
        return Profile(meta, [names[i] for i in order], counts, scores, curves)

    def scores(self, name: str) -> StoredScores:
        """One score of every sample, in the order and with the errors of `read`."""
        self._readable_meta()
        names, places = self._rows()
        columns = [name, f"{name}_max"]
        return StoredScores(
            lambda path: score_arrays(self._read(path, columns), name), [places[i] for i in rows_by_id(names)]
        )

    def curve(self, name: str) -> np.ndarray:
        """One curve, ``[samples, layers]``, in the order and with the errors of `read`."""
        meta = self._readable_meta()
        names, _ = self._rows()
        table = pa.concat_tables([self._read(path, [name]) for path in self._parts()])
        curve = np.stack(arrays_of(table[name]))[rows_by_id(names)]
        self._check_layers(meta, curve)
        return curve

    def _rows(self) -> tuple[list[str], list[tuple[Path, int]]]:
        """Id, shard and row of every sample, shard by shard; read once while no shard changes."""
        parts = self._parts()
        state = [(path, file_state(path)) for path in parts]
        if self._scanned is None or self._scanned[0] != state:
            names, places = [], []
            for path in parts:
                in_part = self._read(path, ["id"])["id"].to_pylist()
                names += in_part
                places += [(path, row) for row in range(len(in_part))]
            self._scanned = state, names, places
        return self._scanned[1], self._scanned[2]

    def _readable_meta(self) -> dict[str, Any]:
        meta = self.meta()
        if (problem := missing_fields(meta, ("layers",))) is not None:
            raise StoreError(f"{self.meta_path}: {problem}; profile again into a new folder")
        self._manifest.check_complete()
        if not self._parts():
            raise StoreError(f"{self.folder}: the profile is empty; run `adaptinfer-profile profile` first")
        return meta

    def _check_layers(self, meta: dict[str, Any], curve: np.ndarray) -> None:
        if curve.shape[1] != len(meta["layers"]):
            numbers = f"{curve.shape[1]} layers per sample, but meta.json lists {len(meta['layers'])}"
            raise StoreError(f"{self.folder}: {numbers}; profile again into a new folder")

    def merge(self, stores: Sequence[ProfileStore]) -> None:
        """Add the samples of other stores unchanged, each id once. Raises `StoreError` where a meta differs."""
        for store in stores:
            self.open(store.meta())
        done = set(self.ids())
        for store in stores:
            store._manifest.check_complete()
            for path in store._parts():
                table = store._read(path)
                fresh = [name not in done for name in table["id"].to_pylist()]
                done.update(table["id"].to_pylist())
                if any(fresh):
                    self._append(table.filter(pa.array(fresh)))

    def _append(self, table: pa.Table) -> None:
        number = self._manifest.next_number()
        floats = [f"{name}.list.element" for name in SCORE_FIELDS]
        path = self.folder / f"part-{number:05d}.parquet"
        with replacing(path) as partial:
            pq.write_table(
                table,
                partial,
                compression="zstd",
                use_dictionary=False,
                use_byte_stream_split=floats,
                write_page_checksum=True,
            )
        self._manifest.add([path])

    def _read(self, path: Path, columns: Sequence[str] = ()) -> pa.Table:
        """One whole shard with the columns of version 2, or some of them.

        Raises `StoreError`; only `recover` moves damaged files.
        """
        try:
            return self._load(path, columns)
        except (pa.ArrowInvalid, OSError) as error:
            raise StoreError(
                f"{path} is damaged ({_in_one_line(error)}); restore it, or run the same `adaptinfer-profile profile` "
                "again, which sets it aside and does its samples again"
            ) from error

    def _load(self, path: Path, columns: Sequence[str] = ()) -> pa.Table:
        """As `_read`, but with the errors of Arrow."""
        if self._manifest.is_changed(path):
            raise pa.ArrowInvalid("its checksum is not that in manifest.json: one of the two files changed")
        if not columns:
            columns = COLUMNS  # version 1 has curves that nothing reads
        stored = set(pq.read_schema(path).names)
        old = {new: name for name, new in _VERSION_1_NAMES.items() if name in stored}
        table = pq.read_table(
            path, columns=[old.get(name, name) for name in columns], page_checksum_verification=True
        )
        return table.rename_columns([_VERSION_1_NAMES.get(name, name) for name in table.column_names])

    def _parts(self) -> list[Path]:
        return shards(self.folder)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _same(field_name: str, known: Any, given: Any) -> bool:
    """Whether a field of the stored meta is that of the profile to be stored.

    Backbone and shape are compared in what both state: earlier releases stated less. `ProfileStore.check_backbone`
    compares the fingerprint.
    """
    if field_name not in ("backbone", "shape") or not isinstance(known, dict):
        return bool(known == given)
    return all(known[name] == given[name] for name in known.keys() & given.keys() - {"fingerprint"})
