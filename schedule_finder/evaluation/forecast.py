"""Progress and expected time of an evaluation."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
Report = Callable[[str], None]


class Forecast:
    """Progress of an evaluation in generated answers, and one line with the expected time.

    The first batch that the full model answers is the measure: no method takes much longer than the full model.
    """

    def __init__(self, methods: int, samples: int, progress: Progress, report: Report) -> None:
        self._total, self._done, self._reported = methods * samples, 0, False
        self._progress, self._report = progress, report
        report(f"evaluation: {methods} methods x {samples} samples = {self._total} generated answers")
        progress(0, self._total)

    def __call__(self, samples: int, full_seconds: float | None) -> None:
        """Count the answers of one method on a batch; ``full_seconds``: its time where the full model answered."""
        if full_seconds is not None and not self._reported:
            self._reported = True
            left = self._total - self._done
            seconds = full_seconds / samples * left
            self._report(
                f"expected time: about {seconds:.0f} s or less for {left} answers "
                f"(the full model: {full_seconds:.2f} s for {samples})"
            )
        self._done += samples
        self._progress(self._done, self._total)
