"""The parts of the serving check that need no server; tests/vllm runs it for real."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from schedule_finder.errors import InputError
from schedule_finder.samples import Sample
from schedule_finder.serving.check import FULL, Load, check_that_it_pruned, verdicts
from schedule_finder.serving.client import request_body
from schedule_finder.serving.server import VllmInstallation, _first_error


def load(
    method: str, speed: float, wait: float, scores: list[float], tokens: float = 74, concurrency: int = 8
) -> Load:
    values = np.array(scores)
    score = float(values.mean()) if len(values) else None
    return Load(method, concurrency, 40, score, tokens, speed, wait, 2 * wait, values)


@pytest.mark.parametrize(
    ("speed", "wait", "verdict"),
    [
        (150, 60, "serving is faster"),
        (101, 60, "serving is faster"),
        (103, 98, "pruning does not pay, serving is not faster"),
        (80, 100, "pruning does not pay, serving is slower"),
        (150, 120, "one of the two is better and the other worse"),
    ],
)
def test_the_verdict_weighs_throughput_and_waiting(speed: float, wait: float, verdict: str) -> None:
    (line,) = verdicts([load(FULL, 100, 100, [])], [load("mine", speed, wait, [])])
    assert line.startswith(f"concurrency 8: {verdict}; {speed / 100:.2f} times the answers per second")


def test_a_loss_of_score_is_stated() -> None:
    full = [load(FULL, 100, 100, [1.0] * 40)]
    worse, *_ = verdicts(full, [load("mine", 100, 100, [1.0] * 20 + [0.0] * 20, tokens=26)])
    assert worse.startswith("the schedule costs score: 100.0 % without and 50.0 % with it")
    assert worse.endswith("74 and 26 prompt tokens")
    same, *_ = verdicts(full, [load("mine", 100, 100, [1.0] * 40)])
    assert same.startswith("no loss of score is shown")


def test_a_server_that_did_not_prune_is_found() -> None:
    full = load(FULL, 100, 100, [])
    check_that_it_pruned(full, load("mine", 100, 100, [], tokens=73))
    with pytest.raises(InputError, match="74 prompt tokens with the schedule and 74 without"):
        check_that_it_pruned(full, load("mine", 100, 100, []))


def test_a_request_holds_the_images_before_the_question() -> None:
    image = Image.new("RGB", (4, 4))
    sample = Sample("a", (image, image), "what?", "red")
    body = json.loads(request_body(sample, 5, "Be brief."))
    system, user = body["messages"]
    assert (system["content"], body["max_tokens"], body["temperature"]) == ("Be brief.", 5, 0)
    assert [part["type"] for part in user["content"]] == ["image_url", "image_url", "text"]
    with pytest.raises(InputError, match="a: the serving check sends images only"):
        request_body(Sample("a", (), "what?", "red", videos=((image,),)), 5)


def test_the_first_error_of_a_log_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "WARNING limits can cause OSError: [Errno 24]\n(W) ERROR 1 [a.py:9]     raise ValueError(\n"
        "(W) ERROR 1 [a.py:9] ValueError: too little memory\nRuntimeError: initialization failed\n"
    )
    assert _first_error(log) == "ValueError: too little memory"
    log.write_text("killed\n")
    assert _first_error(log) == "killed"


def test_environments_without_vllm_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--python {tmp_path}/python: cannot be run"):
        VllmInstallation.of(f"{tmp_path}/python")
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(InputError, match="has no vLLM that starts .*No module named 'vllm'"):
            VllmInstallation.of(sys.executable)
