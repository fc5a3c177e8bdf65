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
    METRIC_NAMES,
    MOST_ROWS,
    MOST_THREADS,
    SCORER_NAMES,
    SERVING_ENGINES,
    SOLVER_NAMES,
    data_presets,
    listed,
)
from schedule_finder.measuring.token_policy import ANSWER_TOKENS
from schedule_finder.models.load_options import ATTENTION_KERNELS, LOAD_IN

DEFAULT_BUDGET = "35%"


def _print_version(asked: bool) -> None:
    """Print the package's version and end the program."""
    if asked:
        from pruning_runtime import __version__

        typer.echo(f"adaptinfer {__version__}")
        raise typer.Exit


Backbone = Annotated[
    str,
    typer.Argument(metavar="[BACKBONE]", help="`demo`, `demo-video`, a checkpoint folder, or a hub name."),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run; default outputs/BACKBONE.")]
Dataset = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset",
        help="`demo`, `demo-video`, `photo`, a .jsonl/.parquet/.arrow/.csv/.tsv file, a folder, a hub name, a preset "
        f"({', '.join(data_presets())}), or PRESET=FILE. Repeat it to mix data sets in equal shares.",
    ),
]
Samples = Annotated[
    str, typer.Option("--samples", help=f"Samples to profile; {AUTO}: stop when more change nothing.")
]
EvalSamples = Annotated[
    int, typer.Option("--eval-samples", min=0, max=MOST_ROWS, help="Held-out samples to evaluate on.")
]
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
ScheduleName = Annotated[
    str | None,
    typer.Option(
        "--name", help="Name of the result; default from budget, kind and solver, as 35pct-processed-paper."
    ),
]
ScheduleCopy = Annotated[
    Path | None, typer.Option("--out", help="Also write the schedule to this file, which must not exist yet.")
]
Select = Annotated[
    str | None,
    typer.Option("--select", help="Search nothing: make the schedule of this name the selected one."),
]
ChosenSchedules = Annotated[
    list[str] | None,
    typer.Option(
        "--schedule",
        help="Name of a schedule of the run, or a file; default the selected one. Repeat it to compare several.",
    ),
]
FewerSamples = Annotated[
    int | None,
    typer.Option("--eval-samples", min=1, help="Use the first held-out samples only; default all."),
]
ServedBy = Annotated[
    str | None,
    typer.Option(
        "--for",
        help=f"{listed(SERVING_ENGINES)}: search only what this engine can run, and say what that costs in changed answers.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the work ahead, with time and memory from a few timed batches; write nothing.",
    ),
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
    int | None,
    typer.Option(
        "--batch-tokens",
        min=1,
        help="Maximum number of tokens in a batch of the profile, padding included; default 16384, on a CPU 1024; "
        "halved when memory runs out.",
    ),
]
TextQueries = Annotated[
    str,
    typer.Option(
        "--text-queries",
        help="Text tokens of a question whose attention is profiled: of longer texts a sample of so many, or all.",
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
Seed = Annotated[
    int,
    typer.Option(
        "--seed", min=0, max=2**32 - 1, help="Seed for the choice of samples and for all resampling."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, max=MOST_THREADS, help="CPU threads; default 1 for the demo, else torch's own."
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Maximum length of an answer.")]
AnswerTokens = Annotated[
    int | None,
    typer.Option(
        "--answer-tokens",
        min=1,
        help="Measure on the first tokens of the unpruned answer, at most so many; 1: the first token alone. "
        f"Default {ANSWER_TOKENS}.",
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        "--metric",
        help=f"How answers are judged: {listed(METRIC_NAMES)}; default the preset's, else {METRIC_NAMES[0]}.",
    ),
]
Baselines = Annotated[
    str | None,
    typer.Option(
        "--baselines",
        help=f"all, none, or names with commas between: {', '.join(BASELINE_NAMES)}; default three of them.",
    ),
]
Sweep = Annotated[
    bool,
    typer.Option(
        "--sweep/--no-sweep", help="Also evaluate schedules for other budgets, each with the same baselines."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")]
Version = Annotated[
    bool,
    typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit."),
]
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
    "allow_outside_paths": Annotated[
        bool | None,
        typer.Option("--allow-outside-paths", help="Read images outside the folder of the data file."),
    ],
}  # fmt: skip
"""How a data set is read: options by their names in `DataOptions`, which holds the defaults."""

LOADING_OPTIONS: dict[str, Any] = {
    "revision": Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a hub name.")
    ],
    "trust_remote_code": Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.")
    ],
    "attn_implementation": Annotated[
        str | None,
        typer.Option("--attn-implementation", help=f"Attention kernel: {listed(ATTENTION_KERNELS)}."),
    ],
    "load_in": Annotated[
        str | None, typer.Option("--load-in", help=f"Quantize with bitsandbytes: {listed(LOAD_IN)}.")
    ],
    "allow_missing_weights": Annotated[
        bool | None,
        typer.Option("--allow-missing-weights", help="Accept a checkpoint with missing or unexpected tensors."),
    ],
    "system_prompt": Annotated[
        str | None, typer.Option("--system-prompt", help="Text of a system message before each question.")
    ],
    "min_pixels": Annotated[
        int | None, typer.Option("--min-pixels", min=1, help="Smallest image that the processor makes.")
    ],
    "max_pixels": Annotated[
        int | None, typer.Option("--max-pixels", min=1, help="Largest image that the processor makes.")
    ],
    "processor_arg": Annotated[
        list[str] | None,
        typer.Option("--processor-arg", help="KEY=VALUE for the processor; repeat it for several."),
    ],
}  # fmt: skip
"""How a checkpoint is loaded: the options of `LoadOptions.given`, which holds the defaults."""

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.")
]
"""The one of `LOADING_OPTIONS` that a run does not keep, so that commands on a run take it."""
