"""`adaptinfer-profile report` on a folder and a data set made elsewhere, with images that are not square."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from schedule_finder.report.recording import Answers
from schedule_finder.report.viewer import Viewer
from tests.support.command_line import call
from tests.support.tiny_folder import write_jsonl, write_llava_folder

pytest.importorskip("altair", reason="the extra `report` is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in a folder with its checkpoint and data; not to be changed."""
    folder = tmp_path_factory.mktemp("elsewhere")
    checkpoint, data = write_llava_folder(folder / "llava"), write_jsonl(folder / "data", 16)
    call(
        "run", checkpoint, "--dataset", data, "--samples", 10, "--eval-samples", 6, "--out", folder / "run",
        "--solver", "paper", "--budget", "40%", "--max-new-tokens", 2, "--baselines", "random",
    )  # fmt: skip
    return folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def viewer_of(run: Path) -> Viewer:
    found = Viewer.load(run / "7_viewer.json")
    assert found is not None
    return found


def test_run_records_every_held_out_sample_and_writes_the_report(made: Path) -> None:
    viewer = viewer_of(made)
    assert len(viewer.samples) == 6
    for sample in viewer.samples:
        assert len(sample.places) == 16
        assert None not in sample.places
        assert len(sample.peaks) == len(sample.layers) == viewer.num_layers
        kept = [len(stage.kept) for stage in sample.stages]
        assert kept == sorted(kept, reverse=True)
        assert set(sample.stages[-1].kept) <= set(range(16))
    assert (made / "report.html").exists()
    assert json.loads((made / "run.json").read_text())["steps"]["viewer"]["samples"] == 6


def test_the_order_is_broken_then_wrong_then_changed_then_the_rest() -> None:
    def answers(name: str, full: float | None, pruned: float | None, agrees: bool, kl: float) -> Answers:
        return Answers(name, "", "", full, pruned, agrees, kl)

    found = [
        answers("right", 1.0, 1.0, True, 9.0),
        answers("unknown", None, None, True, 8.0),
        answers("changed", 1.0, 1.0, False, 0.1),
        answers("both wrong", 0.0, 0.0, True, 0.1),
        answers("broken, a little", 1.0, 0.0, False, 0.2),
        answers("broken", 1.0, 0.0, False, 0.3),
    ]
    names = [one.id for one in sorted(found, key=lambda one: one.order)]
    assert names == ["broken", "broken, a little", "both wrong", "changed", "right", "unknown"]


def test_a_recorded_viewer_is_used_again_without_the_backbone(run: Path) -> None:
    before = (run / "7_viewer.json").read_bytes()
    (run / "report.html").unlink()
    done = call("report", run, "--no-model")
    assert done["viewers"] == [str(run)]
    assert (run / "7_viewer.json").read_bytes() == before
    assert (run / "report.html").exists()


def test_without_the_model_the_report_has_no_viewer_and_says_why(run: Path) -> None:
    (run / "7_viewer.json").unlink()
    done = call("report", run, "--no-model")
    assert done["viewers"] == []
    assert "--no-model was given" in (run / "report.html").read_text()


def test_a_backbone_that_is_gone_leaves_the_viewer_out(run: Path) -> None:
    (run / "7_viewer.json").unlink()
    document = json.loads((run / "run.json").read_text())
    document["options"]["backbone"] = str(run / "nowhere")
    (run / "run.json").write_text(json.dumps(document))
    assert call("report", run)["viewers"] == []
    html = (run / "report.html").read_text()
    assert "The viewer is left out" in html
    assert "nowhere" in html


def test_a_new_evaluation_is_recorded_again(run: Path) -> None:
    call("evaluate", run, "--eval-samples", 3, "--max-new-tokens", 2, "--baselines", "none")
    assert call("report", run)["viewers"] == [str(run)]
    assert len(viewer_of(run).samples) == 3


def test_several_runs_need_a_file_of_their_own(run: Path, made: Path, tmp_path: Path) -> None:
    assert call("report", run, made, code=2).startswith("error: several runs need --out")
    assert "is a folder" in call("report", run, "--out", tmp_path, code=2)
    done = call("report", run, made, "--out", tmp_path / "both.html")
    assert done["runs"] == [str(run), str(made)]
    assert "Comparison of 2 runs" in (tmp_path / "both.html").read_text()


def test_a_folder_without_a_run_is_one_line(tmp_path: Path) -> None:
    assert "no run here" in call("report", tmp_path, code=2)
