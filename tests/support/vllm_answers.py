"""Answers the requests of a family in a process of its own: `python -m tests.support.vllm_answers JOB OUT`.

A job: ``folder``, ``family``, ``engine`` (arguments of `LLM`), ``settings`` (whether requests send theirs), ``uuids``
(whether they name their images), ``turns``.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from tests.support.vllm_requests import REQUESTS, STEPS


def main(job_path: str, out_path: str) -> None:
    """Write the answers of every turn: tokens, log-probability of the first, prompt tokens, cached tokens."""
    job = json.loads(Path(job_path).read_text())
    from vllm import LLM, SamplingParams

    engine: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_seqs": 16,
        "disable_log_stats": True,
        "limit_mm_per_prompt": {"image": 2, "video": int(job["family"] == "qwen")},
    }
    llm = LLM(model=job["folder"], **engine | job["engine"])
    requests = []
    for request in REQUESTS[job["family"]]():
        given = request.for_vllm(settings=job["settings"])
        if job["uuids"] and request.images:
            # An image has one name under all settings, so the cache key must contain the setting.
            names = [hashlib.sha256(image.tobytes()).hexdigest() for image in request.images]
            given["multi_modal_uuids"] = {"image": names}
        requests.append(given)
    sampling = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, logprobs=1)
    turns = []
    for _ in range(job["turns"]):
        outputs = llm.generate(requests, sampling, use_tqdm=False)
        turns.append([_answer(output) for output in outputs])
    Path(out_path).write_text(json.dumps(turns))


def _answer(output: Any) -> dict[str, Any]:
    tokens = list(output.outputs[0].token_ids)
    return {
        "tokens": tokens,
        "logprob": output.outputs[0].logprobs[0][tokens[0]].logprob,
        "prompt_tokens": len(output.prompt_token_ids),
        "cached": output.num_cached_tokens or 0,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
