"""The Hugging Face hub without waiting: whether it answers, and offline mode where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 3.0
"""How long the hub may take to answer before only its local cache is used."""


def hub_reachable() -> bool:
    """Whether the hub answers at all within `SECONDS`; any status counts.

    The libraries try again several times with growing pauses, half a minute in all, before they report that there is
    no network.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # errors of the HTTP client, whose types differ between versions of huggingface_hub
        return False
    return True


@contextmanager
def cache_only() -> Iterator[None]:
    """Offline mode of huggingface_hub and datasets: what is not in the local cache fails at once."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
