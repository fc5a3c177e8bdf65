"""vLLM's OpenAI server with a schedule file, over HTTP on the loopback interface."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from transformers import AutoModelForImageTextToText, AutoProcessor

from pruning_runtime import Schedule, Stage, pruned
from pruning_runtime.schedule import BackboneIdentity, ScorerChoice
from schedule_finder.demo import BACKBONE_FOLDER, demo_samples

pytestmark = pytest.mark.slow

VISION = 64
"""Vision tokens of a demo image."""
START = 240
"""Seconds until the server must answer."""


def schedule(ratio: float, scorer: str) -> Schedule:
    return Schedule(
        backbone=BackboneIdentity(name="demo", model_type="llava", num_layers=12),
        stages=(Stage(layer=-1, keep_ratio=ratio),),
        scorer=ScorerChoice(name=scorer),
    )


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the demo backbone with a schedule of 22 %, `divprune`."""
    folder = tmp_path_factory.mktemp("server")
    schedule(0.22, "divprune").save(folder / "s.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [
        *("--model", str(BACKBONE_FOLDER), "--served-model-name", "demo", "--host", "127.0.0.1"),
        *("--port", str(port), "--dtype", "float32", "--max-model-len", "256", "--enforce-eager"),
        *("--trust-request-mm-kwargs", "--hf-overrides"),
        json.dumps({"adaptinfer": {"schedule": str(folder / "s.json")}}),
    ]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
            stdout=log,
            stderr=log,
            env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        )
    base = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START
        while not answers(f"{base}/health"):
            assert server.poll() is None, (folder / "log").read_text()[-4000:]
            assert time.monotonic() < deadline, (folder / "log").read_text()[-4000:]
            time.sleep(0.5)
        yield base
    finally:
        server.terminate()
        server.wait(60)


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def ask(url: str, sample: Any, **options: Any) -> tuple[str, int]:
    """Answer and prompt tokens."""
    png = io.BytesIO()
    sample.image.save(png, "PNG")
    image = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": sample.question}]
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 4,
        "temperature": 0,
        **options,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    found = json.load(urllib.request.urlopen(request, timeout=60))
    return found["choices"][0]["message"]["content"].strip(), found["usage"]["prompt_tokens"]


def expected(samples: list[Any], ratio: float, scorer: str) -> list[str]:
    """Answers of transformers under the runtime."""
    processor = AutoProcessor.from_pretrained(BACKBONE_FOLDER)
    model = AutoModelForImageTextToText.from_pretrained(BACKBONE_FOLDER, dtype=torch.float32).eval()
    found = []
    for sample in samples:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}
        prompt = processor.apply_chat_template([message], add_generation_prompt=True)
        inputs = processor(
            text=[prompt], images=[sample.image], return_tensors="pt", add_special_tokens=False
        )
        with torch.no_grad(), pruned(model, schedule(ratio, scorer)):
            output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append(text.strip())
    return found


def test_the_schedule_of_the_server_and_settings_of_requests(url: str) -> None:
    samples = list(demo_samples(30, split="held_out", seed=0))
    whole = [ask(url, sample, mm_processor_kwargs={"keep_ratio": 1.0}) for sample in samples]
    assert [answer for answer, _ in whole] == expected(samples, 1.0, "divprune")
    for options, ratio, scorer in (
        ({}, 0.22, "divprune"),
        ({"keep_ratio": 0.5, "scorer": "strided"}, 0.5, "strided"),
    ):
        given = {"mm_processor_kwargs": options} if options else {}
        found = [ask(url, sample, **given) for sample in samples]
        assert [answer for answer, _ in found] == expected(samples, ratio, scorer)
        dropped = VISION - Stage(layer=-1, keep_ratio=ratio).kept(VISION)
        assert [tokens + dropped for _, tokens in found] == [tokens for _, tokens in whole]


def test_a_wrong_setting_is_a_client_error(url: str) -> None:
    (sample,) = demo_samples(1, split="held_out", seed=0)
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(url, sample, mm_processor_kwargs={"scorer": "text_guided"})
    assert error.value.code == 400
    assert "reads attention of the text" in error.value.read().decode()
