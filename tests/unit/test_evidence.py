"""Evidence as types: old files, presets, facts of one solver, and files that are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pruning_runtime import Schedule
from pruning_runtime.schedule import BackboneIdentity, Budget, ScorerChoice, Stage
from schedule_finder.errors import InputError
from schedule_finder.evidence import Evidence, HeldOutResult, HeldOutSummary, RuleProbe, digest
from schedule_finder.solvers.fitprune import FitPruneEvidence

REFERENCE = Path(__file__).parents[1] / "data" / "schedule_v1" / "demo-35pct.json"


def schedule_with(evidence: Evidence | None = None, **fields: object) -> Schedule:
    return Schedule(
        backbone=BackboneIdentity(name="tiny", model_type="llava", num_layers=6),
        stages=(Stage(layer=1, keep_ratio=0.5),),
        scorer=ScorerChoice(name="text_guided"),
        evidence={} if evidence is None else evidence.model_dump(mode="json", exclude_unset=True),
        **fields,
    )


def test_evidence_of_a_version_1_file_is_read(tmp_path: Path) -> None:
    """The words of that version, whatever the reference run is by now."""
    old = {
        "samples": 1000,
        "dataset": "demo",
        "typical_prompt": {"vision_tokens": 64.0, "other_tokens": 9.9},
        "change_points": [],
        "solver": {
            "solver": "sensitivity",
            "measured_kl": 0.00117,
            "candidates": [{"stages": [{"layer": 1, "keep_ratio": 0.22}], "measured_kl": 0.00117}],
            "rules": {"text_guided": {"measured_kl": 0.5, "worse_by": [0.2, 0.9]}},
            "confidence": {
                "resamples": 20,
                "level": 0.9,
                "ratio_low": [1.0] * 6,
                "ratio_high": [1.0] * 6,
                "layers": {"1": 20},
                "parts": {"first half": [{"layer": 1, "keep_ratio": 0.22}]},
            },
        },
        "held_out": {"full": {"n": 450, "exact_match": 0.99, "ci_low": 0.97, "ci_high": 1.0, "kl": 0.0}},
    }
    document = json.loads(schedule_with().to_json()) | {"version": 1, "evidence": old, "residual": "merged"}
    for name in ("dropped_tokens", "image_newlines"):
        document.pop(name)
    path = tmp_path / "old.json"
    path.write_text(json.dumps(document))
    found = Evidence.of(Schedule.load(path), path)
    assert found.solver is not None
    assert found.solver.confidence is not None
    assert found.solver.policies["text_guided"].worse_by == (0.2, 0.9)
    assert found.solver.confidence.variation["first half"] == [Stage(layer=1, keep_ratio=0.22)]
    assert found.held_out["full"].n == 450
    assert found.typical_prompt is not None
    assert found.typical_prompt.vision_tokens == 64


def test_the_reference_run_and_every_preset_are_read() -> None:
    assert Evidence.of(Schedule.load(REFERENCE)).solver is not None
    for name in Schedule.presets():
        Evidence.of(Schedule.preset(name), name)


def test_a_solvers_own_facts_survive_the_file(tmp_path: Path) -> None:
    evidence = Evidence(samples=3, solver=FitPruneEvidence(solver="fitprune", alpha=0.25))
    schedule_with(evidence).save(tmp_path / "s.json")
    written = json.loads((tmp_path / "s.json").read_text())["evidence"]
    assert written == {"samples": 3, "solver": {"solver": "fitprune", "alpha": 0.25}}
    solver = Evidence.of(Schedule.load(tmp_path / "s.json")).solver
    assert solver is not None
    assert solver.model_dump()["alpha"] == 0.25


def test_evidence_of_another_shape_is_named() -> None:
    broken = schedule_with().model_copy(update={"evidence": {"solver": {"confidence": {"resamples": 20}}}})
    with pytest.raises(
        InputError, match=r"4_schedule\.json: evidence `solver\.confidence\.level`.*schedule again"
    ):
        Evidence.of(broken, "4_schedule.json")


def test_a_schedule_is_known_by_what_it_does() -> None:
    schedule = schedule_with()
    budget = Budget(kind="processed", target=0.5, processed=0.5, published=0.5, flops=0.5)
    assert digest(schedule.model_copy(update={"budget": budget, "provenance": {"seed": 1}})) == digest(
        schedule
    )
    changes = {
        "stages": (Stage(layer=1, keep_ratio=0.4),),
        "scorer": ScorerChoice(name="random", options={"seed": 1}),
        "dropped_tokens": "merge",
        "positions": "renumbered",
    }
    changed = [digest(schedule.model_copy(update={name: value})) for name, value in changes.items()]
    assert len({digest(schedule), *changed}) == 1 + len(changes)


def test_the_held_out_summary_round_trips_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "5_evaluation.json"
    assert HeldOutSummary.load(path) is None
    methods = {"full": HeldOutResult(n=3, kl=1 / 3)}
    summary = HeldOutSummary(schedule="sha256:1", budget=0.1, samples=3, methods=methods)
    summary.save(path)
    assert HeldOutSummary.load(path) == summary
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match=r"5_evaluation\.json.*evaluate again"):
        HeldOutSummary.load(path)


@pytest.mark.parametrize("kind", [HeldOutSummary, RuleProbe])
def test_a_folder_in_the_place_of_a_document_is_an_error_that_says_what_to_do(
    tmp_path: Path, kind: type[HeldOutSummary] | type[RuleProbe]
) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}: cannot be read .*; {kind.remedy}"):
        kind.load(tmp_path)
