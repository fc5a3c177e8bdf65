"""The same requests answered by transformers under this project's runtime: the reference of the plug-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

from pruning_runtime import Schedule, Stage, find_backbone, pruned
from pruning_runtime.schedule import BackboneIdentity, ScorerChoice
from tests.support.vllm_requests import REQUESTS, STEPS, Request, video_metadata


def reference_answers(folder: Path, family: str) -> list[dict[str, Any]]:
    """Tokens and the log-probability of the first, for every request in its own setting."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return [_answer(model, processor, request) for request in REQUESTS[family]()]


def schedule_of(model: Any, setting: dict[str, Any]) -> Schedule:
    """The schedule of a request's setting."""
    backbone = find_backbone(model)
    scorer = setting["scorer"]
    return Schedule(
        backbone=BackboneIdentity(
            name=backbone.name, model_type=backbone.model_type, num_layers=backbone.shape.num_layers
        ),
        stages=(Stage(layer=-1, keep_ratio=setting["keep_ratio"]),),
        scorer=ScorerChoice(name=scorer) if isinstance(scorer, str) else ScorerChoice(**scorer),
    )


def _answer(model: Any, processor: Any, request: Request) -> dict[str, Any]:
    inputs = _inputs(processor, request)
    with torch.no_grad(), pruned(model, schedule_of(model, request.setting or {})) as record:
        output = model.generate(
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            eos_token_id=1 << 20,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    logprob = output.logits[0][0].log_softmax(-1)[tokens[0]].item()
    dropped = record.num_vision[0] - record.tokens_per_layer[-1][0] + record.num_other[0]
    return {
        "tokens": tokens,
        "logprob": logprob,
        "prompt_tokens": inputs["input_ids"].shape[1] - dropped,
    }


def _inputs(processor: Any, request: Request) -> dict[str, Any]:
    media: dict[str, Any] = {}
    if request.images:
        media["images"] = list(request.images)
    if request.video is not None:
        facts = video_metadata(request.video, request.fps)
        del facts["do_sample_frames"]
        media |= {
            "videos": [request.video],
            "video_metadata": [VideoMetadata(**facts)],
            "do_sample_frames": False,
        }
    return processor(text=[request.prompt], return_tensors="pt", **media)
