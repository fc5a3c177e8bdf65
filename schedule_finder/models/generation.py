"""How answers are generated, everywhere in this package. Imports nothing: `bench` runs without the finder's packages."""

from typing import Any

GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1}
"""Arguments of `generate`: a checkpoint's own ``generation_config`` may ask for sampling and beams."""
