"""The photo scenes as a data set like any other: one question about each scene."""

from __future__ import annotations

from pathlib import Path

from schedule_finder.samples.entries import Sample, SampleEntry, Use
from schedule_finder.samples.photo_assets import PhotoAssets, load_photographs
from schedule_finder.samples.photo_questions import LEARNT_TYPES, ask
from schedule_finder.samples.photo_scenes import draw_scene, render_scene, scene_generator


class PhotoData:
    """Photo scenes; calibration and held-out samples are drawn from disjoint seeds.

    Both have backgrounds and pairs of an object and a position that the photo backbone was not trained on. The
    question types are those that it has learnt, in turn.

    Raises:
        InputError: the photographs were not fetched.
    """

    source = "photo"

    def __init__(
        self, seed: int = 0, *, folder: Path | None = None, assets: PhotoAssets | None = None
    ) -> None:
        self._seed = seed
        self._assets = assets or load_photographs(folder)

    def size(self, use: Use) -> int:
        """As many as anybody wants."""
        return 1_000_000

    def entries(self, count: int, held_out: int) -> list[SampleEntry]:
        """The first samples of both uses: they are drawn at random already."""
        wanted: list[tuple[Use, int]] = [("calibration", count), ("held_out", held_out)]
        return [
            SampleEntry(id=f"{use}-{self._seed}-{row:06d}", source=self.source, row=row, use=use)
            for use, number in wanted
            for row in range(number)
        ]

    def load(self, entry: SampleEntry) -> Sample:
        """Draw the sample: the first type that the scene allows, from the one whose turn it is."""
        rng = scene_generator(entry.use, self._seed, entry.row)
        scene = draw_scene(rng, entry.use)
        picture = render_scene(scene, self._assets, rng)
        turn = entry.row % len(LEARNT_TYPES)
        in_turn = (*LEARNT_TYPES[turn:], *LEARNT_TYPES[:turn])
        question = next(asked for kind in in_turn if (asked := ask(scene, kind, rng)) is not None)
        return Sample(
            entry.id, (picture,), question.text, question.answer, question.question_type, question.regions
        )
