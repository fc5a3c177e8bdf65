"""Commands with options of random text, for `scripts.fuzz_inputs`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from scripts.fuzz_damage import JUNK_TEXT

MOST_SIZE = 4
NO_MODEL = ("--no-model", "--solver", "retained")

OPTIONS = {
    "detect": {"--detector": "attention_shift"},
    "schedule": {
        "--budget": "40%", "--budget-kind": "flops", "--solver": "retained", "--scorer": "last_token",
        "--dropped-tokens": "discard", "--device": "cpu", "--dtype": "float32", "--batch-size": "2", "--name": "mine",
        "--select": "40pct-processed-sensitivity",
    },
    "inspect": {},
    "evaluate": {
        "--device": "cpu", "--dtype": "float32", "--batch-size": "4", "--max-new-tokens": "1", "--baselines": "none",
        "--schedule": "40pct-processed-sensitivity", "--eval-samples": "2",
    },
    "profile": {
        "--dataset": "demo", "--samples": "2", "--eval-samples": "1", "--device": "cpu", "--dtype": "float32",
        "--batch-size": "2", "--batch-tokens": "512", "--max-skipped": "5%", "--engine": "local", "--seed": "1",
        "--split": "test", "--image-column": "image", "--question-column": "question", "--frames": "2",
        "--question-template": "{question}", "--workers": "1", "--answer-column": "answer", "--video-column": "video",
        "--dataset-config": "default", "--revision": "main", "--attn-implementation": "eager", "--load-in": "4bit",
        "--system-prompt": "be brief", "--min-pixels": "1", "--max-pixels": "4096", "--processor-arg": "do_resize=true",
    },
    "run": {
        "--dataset": "demo", "--samples": "2", "--eval-samples": "1", "--budget": "40%", "--budget-kind": "flops",
        "--solver": "retained", "--scorer": "last_token", "--dropped-tokens": "discard", "--device": "cpu",
        "--detector": "attention_shift", "--dtype": "float32", "--batch-size": "2", "--batch-tokens": "512",
        "--max-skipped": "5%", "--baselines": "none", "--max-new-tokens": "1", "--threads": "1",
    },
    "merge": {},
    "bench": {"--lengths": "1,2", "--batch": "1", "--device": "cpu", "--dtype": "float32", "--vision-tokens": "16",
              "--schedule": "none", "--text-tokens": "8"},
}  # fmt: skip
"""Options of each command with a value that is allowed, or nearly."""
WEIGHTS = {
    "detect": 3, "schedule": 8, "inspect": 2, "evaluate": 2, "profile": 6, "run": 3, "merge": 2, "bench": 1,
}  # fmt: skip


def broken_options(rng: np.random.Generator, base: Path, work: Path) -> list[str]:
    """A command with one to three options of random text, and sometimes with another argument."""
    command = str(rng.choice(list(WEIGHTS), p=np.array([*WEIGHTS.values()]) / sum(WEIGHTS.values())))
    known = OPTIONS[command]
    chosen = dict(known) if rng.random() < 0.5 and command not in ("profile", "run") else {}
    names = list(known)
    for index in rng.permutation(len(names))[: rng.integers(1, 4)]:
        junk = _junk(rng)
        # A large size is valid for `bench`: it is long work, or more than the memory.
        chosen[names[index]] = (
            "0" if command == "bench" and junk.isdecimal() and int(junk) > MOST_SIZE else junk
        )
    argument = _junk(rng) if rng.random() < 0.1 or not known else str(work / "run")
    run = shutil.copytree(base, work / "run")
    if command in ("profile", "run"):
        target = ["demo", "--out", str(work / "new"), *([] if "--samples" in chosen else ["--samples", "2"])]
        target += ["--dry-run"] if command == "run" else []
        target += [] if "--eval-samples" in chosen else ["--eval-samples", "1"]
    elif command == "bench":
        target = ["shape:llava-tiny", "--rounds", "3", "--seconds", "0", "--out", str(work / "new")]
    elif command == "merge":
        target = [str(run), argument, "--out", str(work / "joined")]
    else:
        target = [argument, *(NO_MODEL[:1] if command == "schedule" else ())]
    # "--name=value", so that a value that begins with a dash stays one.
    return [command, *target, *(f"{name}={value}" for name, value in chosen.items())]


def _junk(rng: np.random.Generator) -> str:
    return JUNK_TEXT[rng.integers(len(JUNK_TEXT))]
