"""The command line without models: its extra, names, help and start-up."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import pruning_runtime
from pruning_runtime import Schedule
from pruning_runtime.geometry import DecoderShape
from pruning_runtime.scorers import SCORERS
from schedule_finder import __main__
from schedule_finder.change_points import DEFAULT_DETECTOR, DETECTORS
from schedule_finder.cli import names, parsing
from schedule_finder.cli.commands import app
from schedule_finder.errors import InputError
from schedule_finder.evaluation.methods import BASELINES, NUM_DEFAULT, RANDOM_DRAWS
from schedule_finder.models.loading import DTYPES
from schedule_finder.profiling.fields import CURVE_FIELDS, SCORE_FIELDS, ProfileRow
from schedule_finder.run.folder import Run
from schedule_finder.samples import SampleEntry, write_entries
from schedule_finder.samples.presets import presets
from schedule_finder.search import AUTO
from schedule_finder.served_search import ENGINE
from schedule_finder.solvers import DEFAULT_SOLVER, SOLVERS


def test_the_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    absent = {"ruptures", "matplotlib"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in absent else find_spec(name, *rest)
    )
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip()
    assert "ruptures, matplotlib" in message
    assert "pip install 'adaptinfer[profile]'" in message
    assert len(message.splitlines()) == 1


# ---- names and start-up

COMMANDS = [
    command.callback.__name__.replace("_", "-") for command in app.registered_commands if command.callback
]
HEAVY = ("torch", "transformers", "datasets", "ruptures", "pandas", "pyarrow", "matplotlib", "PIL")
RUN_AND_LIST = f"""
import sys
from schedule_finder.__main__ import main
try:
    main()
except SystemExit as stopped:
    assert stopped.code in (0, None), stopped.code
print([name for name in {HEAVY!r} if name in sys.modules])
"""


def test_listed_names_are_those_of_the_registries() -> None:
    assert tuple(SOLVERS) == names.SOLVER_NAMES
    assert names.SOLVER_NAMES[0] == DEFAULT_SOLVER
    assert tuple(name for name, solver in SOLVERS.items() if solver.measures) == names.MEASURING_SOLVERS
    assert tuple(DETECTORS) == names.DETECTOR_NAMES
    assert names.DETECTOR_NAMES[0] == DEFAULT_DETECTOR
    assert tuple(SCORERS) == names.SCORER_NAMES
    assert names.SERVING_ENGINES == (ENGINE,)
    assert tuple(BASELINES) == names.BASELINE_NAMES
    assert (NUM_DEFAULT, RANDOM_DRAWS) == (names.NUM_DEFAULT_BASELINES, names.RANDOM_DRAWS)
    assert (names.AUTO, *DTYPES) == names.DTYPE_NAMES
    assert names.data_presets() == tuple(presets())
    assert names.AUTO == AUTO


@pytest.mark.parametrize("command", COMMANDS)
def test_help_offers_every_name_and_no_old_word(command: str) -> None:
    text = " ".join(CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300"}).output.split())
    offered = {
        "--solver": names.SOLVER_NAMES,
        "--detector": names.DETECTOR_NAMES,
        "--scorer": names.SCORER_NAMES,
        "--budget-kind": names.BUDGET_KINDS,
        "--dropped-tokens": names.DROPPED_TOKENS,
        "--dataset ": names.data_presets(),
        "--baselines": names.BASELINE_NAMES,
    }
    if command == "benchmark":  # its baselines are those that lmms-eval can run
        offered["--baselines"] = (*names.SCORER_NAMES, "smaller-images")
    for option, choices in offered.items():
        if option in text:
            assert [name for name in choices if name not in text] == []
    assert not re.search(r"residual|rival|(?<!not-)merged|look|leave behind|distribution_shift", text)


def modules_after(*arguments: str) -> list[str]:
    """Heavy modules that a command imports, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_AND_LIST, *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return list(ast.literal_eval(done.stdout.splitlines()[-1]))


def test_help_version_and_inspect_import_nothing_heavy(tmp_path: Path) -> None:
    options = {
        "backbone": "demo",
        "dataset": "demo",
        "samples": 4,
        "eval_samples": 0,
        "seed": 0,
        "columns": {},
    }
    Run.begin(tmp_path, "test", options)
    Schedule.preset("adaptinfer/llava-1.5-7b-64").save(tmp_path / "4_schedule.json")
    assert modules_after("run", "--help") == []
    assert modules_after("--version") == []
    assert modules_after("inspect", str(tmp_path), "--json") == []


def test_the_version_is_that_of_the_package() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"adaptinfer {pruning_runtime.__version__}\n")


def test_commands_that_need_no_model_do_not_import_torch(tmp_path: Path) -> None:
    write_profile(tmp_path)
    for command in (
        ("detect",),
        ("schedule", "--no-model", "--solver", "retained"),
        ("schedule", "--no-model", "--solver", "pyramid", "--budget", "60%"),
        ("plot",),
    ):
        imported = modules_after(command[0], str(tmp_path), *command[1:])
        assert {"torch", "transformers", "datasets"}.isdisjoint(imported), command
    assert (tmp_path / "6_figures" / "4_schedule.png").exists()


def test_figures_import_neither_solvers_nor_numerics() -> None:
    """Most of the start of ``plot`` is matplotlib and pandas; nothing else there may be heavy."""
    code = "import sys, schedule_finder.figures; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    unwanted = {"schedule_finder.solvers", "schedule_finder.search", "scipy", "ruptures", "torch", "datasets"}
    assert unwanted.isdisjoint(done.stdout.split())


def write_profile(folder: Path) -> None:
    """A run with a profile of three samples, written without a model."""
    generator = np.random.default_rng(0)
    layers, tokens = 6, 16
    shape = DecoderShape(layers, 32, 2, 2, 16, 64, 100)
    options = {
        "backbone": "tiny",
        "dataset": "none",
        "samples": 3,
        "eval_samples": 0,
        "seed": 0,
        "columns": {},
    }
    run = Run.begin(folder, "test", options)
    run.profile.open(
        {
            "backbone": {"name": "tiny", "model_type": "llava", "num_layers": layers},
            "shape": asdict(shape),
            "layers": list(range(layers)),
            "dtype": "float32",
            "prompt_digest": "sha256:0",
        }
    )
    rows = [
        ProfileRow(
            tokens,
            5,
            9,
            {name: generator.random((layers, tokens), dtype=np.float32) for name in SCORE_FIELDS},
            {name: generator.random(layers, dtype=np.float32) for name in CURVE_FIELDS},
        )
        for _ in range(3)
    ]
    names = [f"sample-{index}" for index in range(3)]
    run.profile.append(names, rows)
    write_entries(
        run.samples, [SampleEntry(name, "none", index, "calibration") for index, name in enumerate(names)]
    )


def test_pruned_stays_the_function_when_its_module_is_imported() -> None:
    module = importlib.import_module("pruning_runtime.pruned")
    pruning_runtime.pruned = module  # type: ignore[assignment]  # as the import system does
    assert pruning_runtime.pruned is module.pruned


@pytest.mark.parametrize(
    ("old", "new"), [("none", "discard"), ("merged", "merge"), ("distribution_shift", "attention_shift")]
)
def test_names_of_the_previous_release_are_accepted(old: str, new: str) -> None:
    choices = (*names.DROPPED_TOKENS, *names.DETECTOR_NAMES)
    assert parsing.choice("--option", old, choices) == parsing.choice("--option", new, choices) == new
    with pytest.raises(InputError, match=r"--option 'merged': choose attention_shift, token_curve"):
        parsing.choice("--option", "merged", names.DETECTOR_NAMES)
