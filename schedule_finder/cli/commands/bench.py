"""`bench`: latency and memory of a schedule beside its baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from schedule_finder.cli import options as opt
from schedule_finder.cli.names import MOST_THREADS
from schedule_finder.cli.parsing import whole_numbers
from schedule_finder.cli.progress import progress_bar, status
from schedule_finder.cli.runner import command
from schedule_finder.cli.terminal import screen
from schedule_finder.cli.terminal.benchmark import show_benchmark
from schedule_finder.models.load_options import LoadOptions

_Measured = Annotated[
    str,
    typer.Argument(
        metavar="BACKBONE",
        help="`shape:llava-1.5-7b` (random weights), `demo`, a checkpoint folder, or a hub name.",
    ),
]
_Schedule = Annotated[
    str | None,
    typer.Option("--schedule", help="Schedule file or preset; default the published preset that fits."),
]
_Batch = Annotated[
    str | None, typer.Option("--batch", help="Batch sizes; default 1,8,32 on a GPU, 1 on the CPU.")
]
_Lengths = Annotated[str, typer.Option("--lengths", help="Numbers of new tokens.")]
_VisionTokens = Annotated[
    int | None, typer.Option("--vision-tokens", help="Per prompt; default as many as a typical image has.")
]
_TextTokens = Annotated[int, typer.Option("--text-tokens", help="Per prompt.")]
_Rounds = Annotated[int, typer.Option("--rounds", min=3, help="Maximum number of rounds per batch size.")]
_Seconds = Annotated[
    float,
    typer.Option("--seconds", help="Time limit for all batch sizes together; three rounds run in any case."),
]
_Out = Annotated[Path | None, typer.Option("--out", help="Folder; default outputs/bench/BACKBONE.")]
_Threads = Annotated[
    int | None, typer.Option("--threads", min=1, max=MOST_THREADS, help="CPU threads; default 1 on the CPU.")
]


@command
def bench(
    backbone: _Measured,
    schedule: _Schedule = None,
    batch: _Batch = None,
    lengths: _Lengths = "1,16,128",
    vision_tokens: _VisionTokens = None,
    text_tokens: _TextTokens = 88,
    rounds: _Rounds = 15,
    seconds: _Seconds = 60.0,
    out: _Out = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    threads: _Threads = None,
    *,
    loading: dict[str, Any],
) -> dict[str, Any]:
    """Latency and memory by part: the schedule and its baselines on random prompts, in the same run.

    adaptinfer-profile bench shape:llava-1.5-7b

    adaptinfer-profile bench shape:llava-tiny --device cpu --batch 1,8

    adaptinfer-profile bench ./my-llava --schedule outputs/mine/4_schedule.json
    """
    import torch

    from schedule_finder import benchmark
    from schedule_finder.figures.benchmark import draw_benchmark
    from schedule_finder.models.loading import load_to_measure

    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    sizes = whole_numbers("--batch", batch or ("1" if on_cpu else "1,8,32"))
    new_tokens = whole_numbers("--lengths", lengths)
    if threads or on_cpu:
        torch.set_num_threads(threads or 1)
    with status("loading the backbone"):
        loaded = load_to_measure(backbone, device=device, dtype=dtype, options=LoadOptions.given(**loading))
    chosen, source = benchmark.choose_schedule(schedule, loaded)
    with progress_bar("rounds") as progress:
        document = benchmark.run_benchmark(
            loaded,
            chosen,
            schedule_source=source,
            batches=sizes,
            lengths=new_tokens,
            num_vision=vision_tokens,
            num_text=text_tokens,
            rounds=rounds,
            seconds=seconds,
            progress=progress,
        )
    folder = out or Path("outputs/bench") / Path(backbone.removeprefix("shape:")).name
    paths = benchmark.write_benchmark(document, folder) + draw_benchmark(document, folder)
    show_benchmark(document)
    screen.print(f"written: {folder} ({len(paths)} files)", soft_wrap=True)
    return document
