"""Tokens of a frame, for baselines that compare the frames of a video."""

from __future__ import annotations

from pruning_runtime.token_groups import image_counts, image_numbers
from schedule_finder.models.loading import LoadedBackbone
from schedule_finder.samples import Sample


def frame_tokens(loaded: LoadedBackbone, sample: Sample) -> int | None:
    """Vision tokens of a frame of a video that is one run of them; None where every run of vision tokens is a frame.

    An image-newline token after the last frame counts for no frame.
    """
    inputs = loaded.inputs([sample])
    if len(sample.videos) != 1 or sample.images:
        return None
    vision = loaded.backbone.vision_mask(inputs["input_ids"])
    runs, largest = image_counts(vision, image_numbers(vision))
    if int(runs[0]) != 1:
        return None
    if "video_grid_thw" in inputs:  # times, height and width in patches; a time may be two frames
        times = int(inputs["video_grid_thw"][0, 0])
    elif "pixel_values_videos" in inputs:
        times = inputs["pixel_values_videos"].shape[1]
    else:
        return None
    return int(largest[0]) // times
