"""Replace the ``forward`` of modules for the duration of a ``with``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forwards(
    modules: Iterable[nn.Module], make: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Set each module's ``forward`` to ``make(index, forward)``; hooks still run around it.

    Afterwards every module has the ``forward`` that it had before, also after an exception.
    """
    modules = list(modules)
    # An instance may own a `forward` already (accelerate puts one there); the class's is found if it does not.
    owned = [vars(module).get("forward") for module in modules]
    try:
        for index, module in enumerate(modules):
            vars(module)["forward"] = make(index, module.forward)
        yield
    finally:
        for module, own in zip(modules, owned, strict=True):
            vars(module).pop("forward", None)
            if own is not None:
                vars(module)["forward"] = own
