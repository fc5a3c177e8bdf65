"""One sample with the tokens that each stage keeps, for the overlay figure."""

from __future__ import annotations

from pathlib import Path

from pruning_runtime import Schedule, pruned
from schedule_finder.evidence import digest
from schedule_finder.files import replacing, write_json
from schedule_finder.models.loading import LoadedBackbone
from schedule_finder.samples import Sample


def write_example(
    folder: Path, loaded: LoadedBackbone, schedule: Schedule, sample: Sample, max_new_tokens: int
) -> None:
    """Write ``5_example.json`` and ``5_example.png``; nothing unless the sample is one square image.

    Processors crop, pad or tile other images, so that the place of a token in the image is not known.
    """
    inputs = {name: value.to(loaded.device) for name, value in loaded.inputs([sample]).items()}
    vision = loaded.backbone.vision_mask(inputs["input_ids"])[0]
    side = round(int(vision.sum()) ** 0.5)
    square = len({size for image in sample.images for size in image.size}) == 1
    if len(sample.images) != 1 or not square or side * side != int(vision.sum()):
        return
    # Text may stand between vision tokens, for example at the end of a row of patches.
    index_of = {position: index for index, position in enumerate(vision.nonzero().flatten().tolist())}
    length = inputs["input_ids"].shape[1]
    full = loaded.generate(inputs, max_new_tokens)
    with pruned(loaded.backbone, schedule) as record:
        short = loaded.generate(inputs, max_new_tokens)
    document = {
        "schedule": digest(schedule),
        "id": sample.id,
        "question": sample.question,
        "answer": sample.answer,
        "full_answer": loaded.answers(full[:, length:])[0],
        "pruned_answer": loaded.answers(short[:, length:])[0],
        "grid": [side, side],
        "stages": [
            {"layer": stage.layer, "kept": [index_of[position] for position in stage.kept_positions()[0]]}
            for stage in record.stages
        ],
        "regions": list(sample.regions),
    }
    with replacing(folder / "5_example.png") as partial:
        sample.images[0].save(partial, format="PNG")
    write_json(folder / "5_example.json", document)
