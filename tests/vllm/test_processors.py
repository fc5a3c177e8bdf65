"""The part of the plug-in that runs before an image is encoded, with vLLM's own processors and no engine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("vllm")

from pruning_runtime import ScheduleError
from schedule_finder.demo import demo_samples

pytestmark = pytest.mark.slow

VISION, IMAGE = 64, 3
"""Vision tokens of a demo image, and their id."""


def processor(folder: Path, entry: dict[str, Any] | None) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    overrides = {} if entry is None else {"adaptinfer": entry}
    config = EngineArgs(model=str(folder), dtype="float32", hf_overrides=overrides).create_engine_config()
    return MULTIMODAL_REGISTRY.create_processor(config.model_config)


def processed(processor: Any, image: Image.Image, options: dict[str, Any], uuid: str | None = None) -> Any:
    from vllm.multimodal.processing import ProcessorInputs

    items = processor.info.parse_mm_data({"image": [image]})
    given = ProcessorInputs(
        prompt=processor.info.get_tokenizer().encode("<bos>user <image>what is this assistant"),
        mm_data_items=items,
        mm_uuid_items=None if uuid is None else {"image": [uuid]},
        hf_processor_mm_kwargs=options,
    )
    from vllm.multimodal.processing import TimingContext

    return processor.apply(given, TimingContext(enabled=False))


def placeholders(found: Any) -> int:
    return sum(token == IMAGE for token in found["prompt_token_ids"])


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return next(iter(demo_samples(1, split="held_out", seed=0))).image


def test_cache_keys_contain_the_servers_setting_and_the_requests(
    folders: dict[str, Path], image: Image.Image
) -> None:
    """With a client's name for the image, and without."""
    servers = [
        processor(folders["llava"], {"keep_ratio": 0.5}),
        processor(folders["llava"], {"keep_ratio": 0.25}),
        processor(folders["llava"], {"keep_ratio": 0.5, "scorer": "divprune"}),
        processor(folders["llava"], None),
    ]
    for uuid in (None, "same"):
        keys = [processed(server, image, {}, uuid)["mm_hashes"]["image"][0] for server in servers]
        keys += [
            processed(servers[0], image, options, uuid)["mm_hashes"]["image"][0]
            for options in (
                {"keep_ratio": 0.75},
                {"scorer": {"name": "divprune", "options": {"scope": "image"}}},
            )
        ]
        assert len(set(keys)) == len(keys)
        assert processed(servers[0], image, {}, uuid)["mm_hashes"]["image"][0] == keys[0]


def test_threads_do_not_see_each_others_settings(folders: dict[str, Path], image: Image.Image) -> None:
    server = processor(folders["llava"], {"keep_ratio": 0.5})
    ratios = [(1 + number % 16) / 16 for number in range(96)]
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda ratio: placeholders(processed(server, image, {"keep_ratio": ratio})), ratios)
        )
    assert found == [round(ratio * VISION) for ratio in ratios]


def test_wrong_options_of_a_request_are_refused(folders: dict[str, Path], image: Image.Image) -> None:
    server = processor(folders["llava"], {"keep_ratio": 0.5})
    for options, message in (
        ({"keep_ratio": 0.0}, "`keep_ratio`"),
        ({"keep_ratio": "a"}, "`keep_ratio`"),
        ({"scorer": "best"}, "unknown scorer 'best'"),
        ({"scorer": "text_guided"}, "reads attention of the text.*choose divprune, strided"),
    ):
        with pytest.raises(ValueError, match=message):
            processed(server, image, options)


def test_options_need_a_server_that_prunes(folders: dict[str, Path], image: Image.Image) -> None:
    server = processor(folders["llava"], None)
    assert placeholders(processed(server, image, {})) == VISION
    with pytest.raises(ScheduleError, match="--hf-overrides"):
        processed(server, image, {"keep_ratio": 0.5})
