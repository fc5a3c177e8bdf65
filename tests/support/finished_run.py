"""A run folder with files of all steps, written by hand: planted attention shifts, and made-up results."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
from PIL import Image

from pruning_runtime import Schedule
from pruning_runtime.schedule import BackboneIdentity, ScorerChoice, Stage
from schedule_finder.change_points import DETECTORS
from schedule_finder.evaluation.allocation_table import COLUMNS as ALLOCATION_COLUMNS
from schedule_finder.evaluation.methods import DEFAULT_BASELINES
from schedule_finder.evaluation.outcomes import COLUMNS
from schedule_finder.evidence import digest
from schedule_finder.intervals import wilson_interval
from schedule_finder.profiling.capture import CURVE_FIELDS, SCORE_FIELDS, ProfileRow
from schedule_finder.report.viewer import (
    StageTokens,
    Viewer,
    ViewerPanel,
    ViewerSample,
    answers_digest,
    as_bytes,
    as_data_uri,
)
from tests.support.planted_tables import table_from

LAYERS, SIDE, SHIFTS, SAMPLES = 12, 8, (3, 6), 12
TOKENS = SIDE * SIDE
STAGES = (Stage(layer=2, keep_ratio=0.5), Stage(layer=5, keep_ratio=0.125))
NEED = np.linspace(1.1, 0, LAYERS)
"""What each layer loses without any vision token."""
CONFIDENCE = {
    "resamples": 20,
    "level": 0.9,
    "ratio_low": [1.0] * 2 + [0.4] * 4 + [0.1] * 6,
    "ratio_high": [1.0] * 4 + [0.6] * 4 + [0.2] * 4,
    "layers": {"2,5": 13, "2,6": 7},
}
PARETO = pd.DataFrame(
    {
        "budget": [0.5, 0.2, 0.35],
        "processed": [0.5, 0.21, 0.35],
        "predicted_change": [1e-6, 0.5, 0.02],
        "measured_change": [2e-6, 0.7, np.nan],
        "stages": ["3:0.4", "0:0.5 1:0.3 2:0.1", "1:0.5 4:0.1"],
    }
)
CHECKS = """samples,change_points,first_half,second_half,standing,ratio_error,enough,stages
128,,,,True,0.05,False,2:0.5
256,4 9,4,4 9,False,0.03,False,2:0.5 6:0.1
512,4,4,4,True,0.015,True,3:0.4
"""
EXACT = {"full": 0.95, "schedule": 0.9, **dict.fromkeys(("uniform_text", *DEFAULT_BASELINES), 0.7)}


def write_run(run):
    write_profile(run, [TOKENS] * SAMPLES)
    profile = run.profile.read()
    found = {name: make().detect(profile.maps, layers=profile.layers) for name, make in DETECTORS.items()}
    document = {
        "default": "attention_shift",
        "layers": profile.layers,
        "detectors": {name: detection.to_json() for name, detection in found.items()},
    }
    run.change_points.write_text(json.dumps(document))
    Schedule(
        backbone=BackboneIdentity(name="planted", model_type="llava", num_layers=LAYERS),
        stages=STAGES,
        scorer=ScorerChoice(name="uniform_text"),
        evidence={"solver": {"solver": "sensitivity", "measured_samples": 8, "confidence": CONFIDENCE}},
    ).save(run.schedule)
    table_from(NEED).save(run.sensitivity)
    PARETO.to_csv(run.pareto, index=False)
    run.convergence.write_text(CHECKS)
    evaluation_table().to_csv(run.evaluation, index=False)
    write_example(run, np.full((12 * SIDE, 12 * SIDE, 3), 180, np.uint8))
    write_viewed(run)
    allocation_table().to_csv(run.allocation, index=False)


def allocation_table():
    """Two samples: 0.3 and 0.5 of the attention is on vision tokens while the answer is generated."""
    counts = (3, TOKENS, 5, 1)
    rows = [
        (name, layer, queries, *shares, *counts)
        for name, vision in (("a", 0.3), ("b", 0.5))
        for layer in range(LAYERS)
        for queries, shares in (
            ("question", (0.2, 0.7, 0.1, 0.0)),
            ("answer", (0.2, vision, 0.7 - vision, 0.1)),
        )
    ]
    return pd.DataFrame(rows, columns=list(ALLOCATION_COLUMNS))


def write_viewed(run):
    """Nine samples of the report's viewer; attention of layer 0 is on token 9, of layer 1 on token 10, and so on."""
    pd.DataFrame({"id": ["s"]}).to_parquet(run.answers)
    attention = np.full((LAYERS, TOKENS), 0.1)
    attention[range(LAYERS), range(9, 9 + LAYERS)] = 1.0
    values, peaks = as_bytes(attention)
    panel = ViewerPanel(
        picture=as_data_uri(Image.new("RGB", (64, 64), (90, 120, 200)), 64), rows=SIDE, columns=SIDE
    )
    sample = ViewerSample(
        id="s", question="what costs $5 and $6", question_type="where", references=[], full_answer="blue",
        pruned_answer="", full_score=None, pruned_score=None, kl=0.1, panels=[panel],
        places=[(0, token // SIDE, token % SIDE) for token in range(TOKENS)], layers=list(range(LAYERS)),
        attention=values, peaks=peaks, stages=[StageTokens(layer=2, kept=[0, 8, 18])],
    )  # fmt: skip
    digest_of = digest(Schedule.load(run.schedule))
    Viewer(schedule=digest_of, answers=answers_digest(run), num_layers=LAYERS, samples=[sample] * 9).save(
        run.viewer
    )


def write_profile(run, lengths, num_layers=LAYERS, layers=None):
    """Samples whose attention moves to other tokens at every layer of `SHIFTS`."""
    rng = np.random.default_rng(0)
    layers = list(range(num_layers)) if layers is None else layers
    regime = np.searchsorted(SHIFTS, layers, side="right")
    rows = []
    for tokens in lengths:
        logits = 1.5 * rng.normal(size=(len(SHIFTS) + 1, tokens))[regime]
        weights = np.exp(logits + 0.1 * rng.normal(size=logits.shape))
        mass = np.linspace(0.8, 0.3, len(layers), dtype=np.float32)
        attention = (weights / weights.sum(1, keepdims=True) * mass[:, None]).astype(np.float32)
        curves = {name: np.full(len(layers), 2.0, np.float32) for name in CURVE_FIELDS} | {
            "vision_mass": mass
        }
        rows.append(ProfileRow(tokens, 9, 20, dict.fromkeys(SCORE_FIELDS, attention), curves))
    run.profile.open({"backbone": {"num_layers": num_layers}, "layers": layers})
    run.profile.append([f"sample-{i:03d}" for i in range(len(rows))], rows)


def evaluation_table():
    rows = []
    for budget in (0.2, 0.5, 0.35):
        for method, exact in EXACT.items():
            if method in ("full", "uniform_text") and budget != 0.2:
                continue
            used = 1.0 if method == "full" else budget
            low, high = wilson_interval(round(200 * exact * used**0.1), 200)
            rows += [
                dict.fromkeys(COLUMNS, 0.5)
                | {"schedule": None, "digest": None, "metric": "exact_match"}
                | {"method": method, "budget": used, "question_type": kind, "n": 200, "processed": used}
                | {"exact_match": round(200 * exact * used**0.1) / 200, "ci_low": low, "ci_high": high}
                for kind in ("all", "where", "count")
            ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def write_example(run, pixels):
    Image.fromarray(pixels).save(run.folder / "5_example.png")
    document = {
        "id": "s",
        "question": "what costs $5 and $6",
        "answer": None,
        "full_answer": "blue",
        "pruned_answer": "",
        "grid": [SIDE, SIDE],
        "stages": [{"layer": 2, "kept": list(range(0, 64, 2))}, {"layer": 5, "kept": [0, 8, 18]}],
        "regions": [18, 19],
    }
    (run.folder / "5_example.json").write_text(json.dumps(document))
