"""What the terminal says of a schedule's evidence."""

from __future__ import annotations

import numpy as np
import pytest

from pruning_runtime import Schedule
from pruning_runtime.schedule import BackboneIdentity, ScorerChoice, Stage
from schedule_finder.change_points import DETECTORS
from schedule_finder.cli.terminal.schedule import (
    _better_controls,
    _compared_rules,
    _reasons,
    show_detections,
    show_schedule,
)
from schedule_finder.evidence import (
    Alternative,
    Asked,
    Evidence,
    HeldOutResult,
    HeldOutSummary,
    PolicyResult,
    RuleResult,
    SolverEvidence,
    digest,
)


def evidence(scorer: str, **worse_by: tuple[float, float]) -> Evidence:
    policies = {
        name: PolicyResult(measured_kl=1.0, measured_change=0.5, worse_by=interval)
        for name, interval in worse_by.items()
    }
    return Evidence(
        asked=Asked(solver="sensitivity", scorer=scorer, dropped_tokens="auto"),
        solver=SolverEvidence(policies=policies),
    )


@pytest.mark.parametrize(
    ("scorer", "interval", "warns"),
    [
        ("text_guided", (-0.5, -0.1), True),
        ("text_guided", (-0.5, 0.1), False),
        ("text_guided", (0.1, 0.5), False),
        ("auto", (-0.5, -0.1), False),
    ],
)
def test_a_warning_names_a_control_that_is_better_than_the_scorer_that_was_asked_for(
    scorer: str, interval: tuple[float, float], warns: bool
) -> None:
    lines = list(_better_controls(evidence(scorer, strided=interval, last_token=(-9.0, -8.0))))
    assert len(lines) == int(warns)
    if warns:
        assert "strided tokens on these stages change fewer answers than --scorer text_guided" in lines[0]
        assert "by 10 to 50 points" in lines[0]


def test_a_policy_that_left_early_is_shown_with_its_samples() -> None:
    policies = {
        name: PolicyResult(measured_kl=1.0, measured_change=0.5, worse_by=(0.1, 0.2), samples=samples)
        for name, samples in (("strided", 32), ("random", 192), ("mmtok", None))
    }
    lines = list(_reasons(SolverEvidence(policies=policies, chosen_on_samples=192)))
    assert [("on 32" in line, "on " in line) for line in lines[-3:]] == [
        (True, True),
        (False, False),
        (False, False),
    ]


def test_rules_are_listed_best_first_and_those_of_the_first_round_after_them() -> None:
    rules = [
        RuleResult(place="decoder", scorer="strided", kl=1.0, change=0.5, samples=24),
        RuleResult(place="decoder", scorer="last_token", kl=0.5, change=0.3, samples=8),
        RuleResult(place="decoder", scorer="mmtok", dropped_tokens="merge", kl=2.0, change=0.25, samples=24),
    ]
    tried = Alternative(
        policy="mmtok", measured_kl=0.25, measured_change=0.2, samples=48, worse_by=(0.0, 0.5)
    )
    few = Alternative(policy="random", measured_kl=0.1, samples=8)
    lines = list(
        _compared_rules(
            SolverEvidence(compared_rules=rules, refused_rules={"evs": "no frames"}, candidates=[few, tried])
        )
    )
    assert lines[0] == (
        "scorers in the decoder, answer change of single stages on 24 samples: mmtok (merge) 25 %, strided 50 %, "
        "last_token 30 % (on 8)"
    )
    assert lines[1] == "not usable here: evs: no frames"
    assert lines[2].startswith("whole schedules that were tried")
    assert lines[3:] == ["  , mmtok: answer change 20 %, KL 0.25 (0 to 50 points)"]


def test_evidence_of_earlier_releases_is_shown_in_nats() -> None:
    rules = [RuleResult(place="decoder", scorer="strided", kl=2.0, samples=24)]
    tried = Alternative(policy="mmtok", measured_kl=0.25, samples=48, worse_by=(0.0, 0.5))
    solver = SolverEvidence(compared_rules=rules, candidates=[tried], predicted_kl=0.1, measured_kl=0.25)
    lines = list(_reasons(solver))
    assert "KL 0.1 predicted" in lines[0]
    assert "KL 0.25 measured" in lines[0]
    assert lines[1].endswith("KL of single stages on 24 samples: strided 2")
    assert lines[-1] == "  , mmtok: KL 0.25 (0 to 0.5 nats)"


def test_held_out_results_of_the_full_model_alone_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged summary may have lost the schedule's own results."""
    schedule = Schedule(
        backbone=BackboneIdentity(name="tiny", model_type="llava", num_layers=6),
        stages=(Stage(layer=1, keep_ratio=0.5),),
        scorer=ScorerChoice(name="text_guided"),
    )
    full = HeldOutResult(n=7, exact_match=0.5, ci_low=0.2, ci_high=0.8)
    own = HeldOutSummary(schedule=digest(schedule), budget=0.5, samples=7, methods={"full": full})
    show_schedule(schedule, own)
    assert "full model 50.0 % (20.0-80.0), n = 7" in capsys.readouterr().out


def test_a_detection_on_a_part_of_the_samples_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    maps = [np.ones((4, 3), np.float32)] * 5
    found = {name: make().detect(maps).to_json() for name, make in DETECTORS.items()}
    for samples, line in ((5, ""), (9, "attention_shift used 5 of 9 samples")):
        show_detections({"default": "attention_shift", "samples": samples, "detectors": found})
        assert line in (said := capsys.readouterr().out)
        assert ("used 5" in said) == bool(line)
    show_detections({"default": "token_curve", "samples": 9, "detectors": found})
