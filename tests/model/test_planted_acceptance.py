"""The whole acceptance run on planted backbones: minutes, so `make test-slow`."""

from __future__ import annotations

import pytest

from scripts.bench_detectors import recovery


@pytest.mark.slow
def test_moderate_noise_fifty_seeds() -> None:
    """All boundaries within one layer and no others in at least 95 % of cases; without a shift, none."""
    found = recovery(noise=1.0, drift=0.0, seeds=50, num_samples=24)["found"]["attention_shift"]
    assert found[0] >= 0.95
    assert sum(found[1:]) / 4 >= 0.95
