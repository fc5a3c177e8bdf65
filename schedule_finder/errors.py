"""Every error of schedule_finder. The command line prints an `AdaptInferError` as one line, with exit code 2."""

from __future__ import annotations


class AdaptInferError(ValueError):
    """Base: an input cannot be used; the message says what, where and what to do."""


class InputError(AdaptInferError):
    """Something the user gave cannot be used."""


class OutOfReach(InputError):
    """No stages can meet the budget on this backbone."""


class StoreError(InputError):
    """A profile folder cannot be used; the message names the file."""


class SampleError(AdaptInferError):
    """One sample cannot be used; a run skips it and records the reason."""


class BadSample(SampleError):
    """A sample cannot be read from its data set."""


class ProfileError(SampleError):
    """A sample cannot be profiled."""
