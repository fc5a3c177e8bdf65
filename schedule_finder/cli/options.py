"""Types of the options and arguments; choices and help texts read the registries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from schedule_finder.cli.names import (
    AUTO,
    BASELINE_NAMES,
    BUDGET_KINDS,
    DETECTOR_NAMES,
    DROPPED_TOKENS,
    DTYPE_NAMES,
    ENGINE_NAMES,
    SCORER_NAMES,
    SOLVER_NAMES,
    data_presets,
    listed,
)

DEFAULT_BUDGET = "35%"

Backbone = Annotated[
    str, typer.Argument(metavar="[BACKBONE]", help="`demo`, a checkpoint folder, or a hub name.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run; default outputs/BACKBONE.")]
Dataset = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset",
        help="`demo`, a .jsonl/.parquet/.arrow/.csv/.tsv file, a folder, a hub name, a preset "
        f"({', '.join(data_presets())}), or PRESET=FILE. Repeat it to mix data sets in equal shares.",
    ),
]
Samples = Annotated[
    str, typer.Option("--samples", help=f"Samples to profile; {AUTO}: stop when more change nothing.")
]
EvalSamples = Annotated[int, typer.Option("--eval-samples", min=0, help="Held-out samples to evaluate on.")]
Budget = Annotated[
    str, typer.Option("--budget", help="Fraction of the unpruned cost: 0.15 or 15%; latency also 12ms.")
]
BudgetKindOption = Annotated[
    str, typer.Option("--budget-kind", help=f"Unit of the budget: {listed(BUDGET_KINDS)}.")
]
Solver = Annotated[str, typer.Option("--solver", help=f"How the stages are chosen: {listed(SOLVER_NAMES)}.")]
Scorer = Annotated[
    str,
    typer.Option("--scorer", help=f"{AUTO} (the solver compares them), {listed(SCORER_NAMES)}."),
]
DroppedTokensOption = Annotated[
    str,
    typer.Option(
        "--dropped-tokens", help=f"What happens to dropped tokens: {listed((AUTO, *DROPPED_TOKENS))}."
    ),
]
Model = Annotated[
    bool, typer.Option("--model/--no-model", help="Measure on the backbone, or use stored measurements only.")
]
Pareto = Annotated[
    bool, typer.Option("--pareto", help="Solve for a range of budgets instead; writes a table and a figure.")
]
Detector = Annotated[
    str | None,
    typer.Option("--detector", help=f"Change-point detector that the solver uses: {listed(DETECTOR_NAMES)}."),
]
Device = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda, cuda:1, ..., or auto-map: all GPUs and host memory."),
]
Dtype = Annotated[str, typer.Option("--dtype", help=f"{listed(DTYPE_NAMES)}.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Maximum number of samples in a batch.")]
BatchTokens = Annotated[
    int,
    typer.Option(
        "--batch-tokens",
        min=1,
        help="Maximum number of tokens in a batch, padding included; halved when memory runs out.",
    ),
]
MaxSkipped = Annotated[
    str, typer.Option("--max-skipped", help="Share of unusable samples that stops the run: 0.05 or 5%.")
]
EngineName = Annotated[
    str, typer.Option("--engine", help=f"{listed(ENGINE_NAMES)}; ray: one worker per GPU of a Ray cluster.")
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Ray workers; default one per GPU, or one without GPUs."),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed for the choice of samples and for all resampling.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads; default 1 for the demo, else torch's own."),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Maximum length of an answer.")]
Baselines = Annotated[
    str | None,
    typer.Option(
        "--baselines",
        help=f"all, none, or names with commas between: {', '.join(BASELINE_NAMES)}; default three of them.",
    ),
]
Sweep = Annotated[bool, typer.Option("--sweep/--no-sweep", help="Also evaluate schedules for other budgets.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Residual = Annotated[str | None, typer.Option("--residual", hidden=True)]
"""The previous name of ``--dropped-tokens``, with the values ``none`` and ``merged``."""

DATA_OPTIONS: dict[str, Any] = {
    "split": Annotated[
        str | None, typer.Option("--split", help="Split of a hub data set or folder; default the first that exists "
        "of test, validation, val, dev, train.")
    ],
    "config": Annotated[
        str | None, typer.Option("--dataset-config", help="Config of a hub data set or folder.")
    ],
    "streaming": Annotated[
        bool | None,
        typer.Option("--streaming", help="Read the first rows only, 4 per requested sample, and draw from them."),
    ],
    "image_column": Annotated[
        str | None,
        typer.Option("--image-column", help="Column of images or paths; several: a,b; or images/{id}.jpg."),
    ],
    "video_column": Annotated[
        str | None,
        typer.Option("--video-column", help="Column of video files or lists of frames; or videos/{id}.mp4."),
    ],
    "question_column": Annotated[str | None, typer.Option("--question-column", help="Column of questions.")],
    "question_template": Annotated[
        str | None,
        typer.Option("--question-template", help="Question made from columns: '{question} Options: {options}'; "
        "{options:letters} writes a list as lines A. B. C."),
    ],
    "answer_column": Annotated[
        str | None, typer.Option("--answer-column", help="Column of answers, or of lists of answers.")
    ],
    "frames": Annotated[
        int | None, typer.Option("--frames", min=1, help="Frames per video, evenly spaced; default 8.")
    ],
}  # fmt: skip
"""How a data set is read: options by their names in `DataOptions`, which holds the defaults."""
