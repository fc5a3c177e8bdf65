"""Share schedules: a repository of the Hugging Face Hub with several budgets, and a local index by backbone.

A repository holds ``schedules/NAME.json``, optionally ``schedules/NAME.results.json`` with held-out numbers, a figure
``evidence.png``, and the model card ``README.md``, which is written from all of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruning_runtime.errors import ScheduleError
from pruning_runtime.hub_card import Entry, model_card

if TYPE_CHECKING:
    from pruning_runtime.backbone import Backbone
    from pruning_runtime.schedule import Schedule

SCHEME = "hf://"
FOLDER = "schedules"
FIGURE = "evidence.png"
_RESULTS = ".results.json"


# ---- write


def push(
    schedule: Schedule,
    repo_id: str,
    *,
    name: str | None,
    results: Mapping[str, Mapping[str, float]] | None,
    figure: str | os.PathLike[str] | None,
    private: bool | None,
    token: str | None,
    message: str | None,
) -> str:
    """Upload one schedule and write the card anew, in one commit; returns the address of the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, name = HfApi(token=token), name or file_name(schedule)
    api.create_repo(repo_id, private=private, exist_ok=True)
    entries = {entry.name: entry for entry in _entries(api, repo_id)}
    replaced = entries.get(name)
    entries[name] = Entry(name, schedule, dict(results or {}))
    files: dict[str, bytes | Path] = {f"{FOLDER}/{name}.json": schedule.to_json().encode()}
    if results is not None:
        files[f"{FOLDER}/{name}{_RESULTS}"] = json.dumps(results, indent=2).encode()
    if figure is not None:
        files[FIGURE] = Path(figure)
    has_figure = figure is not None or FIGURE in _files(api, repo_id)
    card = model_card(repo_id, list(entries.values()), FIGURE if has_figure else None)
    files["README.md"] = card.encode()
    operations: list[Any] = [CommitOperationAdd(path, content) for path, content in files.items()]
    if results is None and replaced is not None and replaced.results:  # they are of the older schedule
        operations.append(CommitOperationDelete(f"{FOLDER}/{name}{_RESULTS}"))
    commit = api.create_commit(
        repo_id,
        operations,
        commit_message=message or f"Schedule {name}",
    )
    return str(commit.commit_url)


def file_name(schedule: Schedule) -> str:
    """Name of a schedule in a repository: its budget, or its scorer where it has none."""
    if schedule.budget is None:
        return schedule.scorer.name
    return f"{100 * schedule.budget.target:.3g}pct-{schedule.budget.kind}".replace(".", "_")


def _entries(api: Any, repo_id: str) -> list[Entry]:
    """The schedules that a repository holds already."""
    files = _files(api, repo_id)
    found = []
    for path in files:
        if not _is_schedule(path):
            continue
        name = Path(path).stem
        other = f"{FOLDER}/{name}{_RESULTS}"
        results = json.loads(_download(repo_id, other, api.token).read_text()) if other in files else {}
        found.append(Entry(name, _load(_download(repo_id, path, api.token)), results))
    return found


def _files(api: Any, repo_id: str) -> list[str]:
    return [str(name) for name in api.list_repo_files(repo_id)]


def _is_schedule(path: str) -> bool:
    return path.startswith(f"{FOLDER}/") and path.endswith(".json") and not path.endswith(_RESULTS)


# ---- read


def read(
    source: str, *, budget: float | None, name: str | None, revision: str | None, token: str | None
) -> Schedule:
    """A schedule of a file, a folder or a repository; see `Schedule.from_pretrained`."""
    location = Path(source.removeprefix(SCHEME))
    if not source.startswith(SCHEME) and location.is_file():
        return _chosen(source, {location.stem: _load(location)}, budget, name)
    if not source.startswith(SCHEME) and location.is_dir():
        return _chosen(source, _in_folder(location, name), budget, name)
    if source.startswith((".", "/", "~")) or "\\" in source:
        raise ScheduleError(f"{source}: no such file or folder")
    repo_id, revision, file = _parsed(source, revision)
    if file is not None:
        only = _load(_fetched(repo_id, file, revision, token))
        return _chosen(source, {Path(file).stem: only}, budget, name)
    paths = {Path(path).stem: path for path in _listed(repo_id, revision, token) if _is_schedule(path)}
    if name in paths:
        paths = {name: paths[name]}
    found = {stem: _load(_fetched(repo_id, path, revision, token)) for stem, path in paths.items()}
    return _chosen(source, found, budget, name)


def _parsed(source: str, revision: str | None) -> tuple[str, str | None, str | None]:
    """Repository, revision and file of ``[hf://]user/name[@revision][/file]``."""
    parts = source.removeprefix(SCHEME).strip("/").split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise ScheduleError(
            f"{source}: neither a file, nor a folder, nor a repository; write user/name or {SCHEME}user/name"
        )
    owner, (repository, _, given), file = parts[0], parts[1].partition("@"), "/".join(parts[2:]) or None
    return f"{owner}/{repository}", revision or given or None, file


def _in_folder(folder: Path, name: str | None) -> dict[str, Schedule]:
    """Schedules of a run folder, of a copy of a repository, or of a folder of files; only ``name`` where it is there."""
    for inside in ("4_schedules", FOLDER, "."):
        if name is not None and (named := folder / inside / f"{name}.json").is_file():
            return {name: _load(named)}
        files = sorted((folder / inside).glob("*.json"))
        paths = [path for path in files if not path.name.endswith(_RESULTS) and _holds_schedule(path)]
        if paths:
            return {path.stem: _load(path) for path in paths}
    return {}


def _holds_schedule(path: Path) -> bool:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("format") == "adaptinfer-schedule"


def _chosen(source: str, found: Mapping[str, Schedule], budget: float | None, name: str | None) -> Schedule:
    """The one of ``found`` that has the name and the budget. Raises `ScheduleError` where it is not exactly one."""
    fitting = [
        one
        for stem, one in found.items()
        if (name is None or stem == name) and (budget is None or _meets(one, budget))
    ]
    if len(fitting) == 1:
        return fitting[0]
    there = ", ".join(f"{stem} ({_budget_of(one)})" for stem, one in found.items()) or "none"
    asked = " and ".join(
        text for text in (name and f"name {name!r}", budget is not None and f"budget {budget:g}") if text
    )
    several = (
        f"several schedules with {asked}; give a name"
        if asked
        else "several schedules; give a budget or a name"
    )
    problem = f"no schedule with {asked}" if asked and not fitting else several
    raise ScheduleError(f"{source}: {problem if found else 'no schedule'} (there: {there})")


def _meets(schedule: Schedule, budget: float) -> bool:
    return schedule.budget is not None and abs(schedule.budget.target - budget) < 1e-6


def _budget_of(schedule: Schedule) -> str:
    return "no budget" if schedule.budget is None else f"{schedule.budget.target:g} {schedule.budget.kind}"


def _listed(repo_id: str, revision: str | None, token: str | None) -> list[str]:
    from huggingface_hub import HfApi

    try:
        return [str(name) for name in HfApi(token=token).list_repo_files(repo_id, revision=revision)]
    except Exception as error:  # errors of the HTTP client, whose types differ between versions
        raise _unreachable(repo_id, error) from error


def _fetched(repo_id: str, path: str, revision: str | None, token: str | None) -> Path:
    try:
        return _download(repo_id, path, token, revision)
    except Exception as error:
        raise _unreachable(f"{repo_id}/{path}", error) from error


def _download(repo_id: str, path: str, token: str | None, revision: str | None = None) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo_id, path, revision=revision, token=token))


def _unreachable(what: str, error: Exception) -> ScheduleError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ScheduleError(
        f"{SCHEME}{what}: cannot be read from the hub ({reason}); check the name and the network"
    )


def _load(path: Path) -> Schedule:
    from pruning_runtime.schedule import Schedule

    return Schedule.load(path)


# ---- the local index


def index_folder() -> Path:
    """Where `Schedule.for_model` looks: ``$ADAPTINFER_CACHE/schedules``, or the same in the user's cache."""
    own = os.environ.get("ADAPTINFER_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(own) if own else Path(base) / "adaptinfer") / "schedules"


def add_to_index(schedule: Schedule) -> Path:
    """Keep a copy under the backbone's digest and the budget; returns the file."""
    digest = (schedule.backbone.config_digest or "").removeprefix("sha256:")
    if not digest:
        raise ScheduleError(
            f"a schedule for {schedule.backbone.name!r} without a config_digest cannot be indexed"
        )
    path = index_folder() / digest[:32] / f"{file_name(schedule)}.json"
    schedule.save(path)
    return path


def find_in_index(backbone: Backbone, budget: float) -> Schedule:
    """The indexed schedule of a backbone for a budget. Raises `ScheduleError` that names the command to run."""
    folder = index_folder() / backbone.config_digest.removeprefix("sha256:")[:32]
    found = {path.stem: _load(path) for path in sorted(folder.glob("*.json"))}
    fitting = {stem: one for stem, one in found.items() if _meets(one, budget)}
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    if fitting:
        raise ScheduleError(
            f"several schedules for {backbone.name!r} at budget {budget:g} in {folder}: {_join(fitting)}; load one of them "
            "with Schedule.load(FILE)"
        )
    there = f" (budgets there: {_join(_budget_of(one) for one in found.values())})" if found else ""
    raise ScheduleError(
        f"no schedule for {backbone.name!r} at budget {budget:g} in {index_folder()}{there}; find one with "
        f"`adaptinfer-profile run {backbone.name} --dataset DATA --budget {100 * budget:g}%`, then "
        "Schedule.load(FILE).add_to_index()"
    )


def _join(texts: Iterable[str]) -> str:
    return ", ".join(texts)
