"""Log lines and warnings of libraries, off: what matters of them is checked here and said in one line."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = (
    *("transformers", "datasets", "huggingface_hub", "httpx", "httpx2", "accelerate", "fsspec"),
    "bitsandbytes",
)
_VERBOSITY = ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY")
"""Variables that these libraries read when they are imported."""
_OWN = r"pruning_runtime|schedule_finder"


@contextmanager
def library_messages_off() -> Iterator[None]:
    """No log lines below `CRITICAL` and no warnings of libraries inside; warnings of this package stay.

    Imports none of the libraries. A verbosity that the user chose by an environment variable stays.
    """
    if any(name in os.environ and os.environ[name] != "critical" for name in _VERBOSITY):
        yield
        return
    for name in _VERBOSITY:
        os.environ[name] = "critical"
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("default", module=_OWN, append=True)
        warnings.filterwarnings("ignore", append=True)
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for name in _VERBOSITY:
                os.environ.pop(name, None)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
