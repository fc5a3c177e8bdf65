"""Published benchmarks need an environment with lmms-eval, and say so before they write anything."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from schedule_finder.errors import InputError
from schedule_finder.lmms_eval.runs import Benchmark


@pytest.mark.parametrize(
    ("python", "message"),
    [(sys.executable, r"has no lmms-eval; install it there"), ("no-such-python", "cannot be run")],
)
def test_an_environment_without_lmms_eval_is_refused_first(tmp_path: Path, python: str, message: str) -> None:
    if python == sys.executable and importlib.util.find_spec("lmms_eval") is not None:
        pytest.skip("lmms-eval is installed here")
    out = tmp_path / "out"
    run = Benchmark(out, {"base": "llava_hf", "pretrained": "model"}, ["pope"], python=python)
    with pytest.raises(InputError, match=message):
        run.run([])
    assert not out.exists()
