"""What stays the same for all calls inside one ``with pruned(...)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pruning_runtime.backbone import Backbone
from pruning_runtime.cache_guard import Lease
from pruning_runtime.costs import feature_scoring_share
from pruning_runtime.masks import MaskBuilder
from pruning_runtime.model_quirks.image_newline import ImageNewline, find_image_newlines
from pruning_runtime.renumbering import Renumbering
from pruning_runtime.schedule import Schedule, Stage
from pruning_runtime.scorers import AttentionScorer, FeatureScorer, FrameScorer, Scorer, TowerScorer
from pruning_runtime.timing import Stopwatch
from pruning_runtime.tower import TowerNeeds, TowerTap


@dataclass(frozen=True)
class PruningSetup:
    """A schedule prepared for a backbone.

    Attributes:
        backbone: the model and its parts.
        stages: of the schedule.
        scorers: scorer of each stage, by layer.
        feature_share: see `Record`.
        merge: whether dropped tokens are merged.
        keep_scores: whether the record keeps every stage's scores.
        renumbering: None where tokens keep their original positions.
        image_newlines: learned vectors whose tokens are protected.
        masks: builds the masks of all layers.
        watch: measures time.
        tower: collects statistics of the vision tower; None unless a scorer reads it.
        lease: closed when the ``with`` ends.
    """

    backbone: Backbone
    stages: tuple[Stage, ...]
    scorers: dict[int, Scorer]
    feature_share: Callable[[float, float], float]
    merge: bool
    keep_scores: bool
    renumbering: Renumbering | None
    image_newlines: tuple[ImageNewline, ...]
    masks: MaskBuilder
    watch: Stopwatch
    tower: TowerTap | None
    lease: Lease

    @classmethod
    def prepare(
        cls,
        backbone: Backbone,
        schedule: Schedule,
        *,
        keep_scores: bool,
        timing: bool,
        tower: TowerTap | None = None,
    ) -> PruningSetup:
        """Prepare ``schedule`` for ``backbone``; ``tower`` collects what `tower_needs` names."""
        decoder = backbone.text_model, backbone.layers, backbone.layer_kinds
        protected = schedule.image_newlines == "protected"
        return cls(
            backbone=backbone,
            stages=schedule.stages,
            scorers=schedule.scorers(),
            feature_share=partial(
                feature_scoring_share, schedule.stages, schedule.scorer.name, backbone.shape
            ),
            merge=schedule.dropped_tokens == "merge",
            keep_scores=keep_scores,
            renumbering=Renumbering(*decoder) if schedule.positions == "renumbered" else None,
            image_newlines=find_image_newlines(backbone.model, backbone.text_model) if protected else (),
            masks=MaskBuilder.of_backbone(backbone),
            watch=Stopwatch(next(backbone.text_model.parameters()).device, timing),
            tower=tower,
            lease=Lease(),
        )

    @property
    def frame_scorer(self) -> FrameScorer | None:
        """The scorer of the first stage, if it compares frames; no other stage can have such a scorer."""
        scorer = self.scorers[self.stages[0].layer] if self.stages else None
        return scorer if isinstance(scorer, FrameScorer) else None

    @property
    def reads_attention(self) -> bool:
        """Whether any stage's scorer needs queries and keys of a layer."""
        return any(
            isinstance(scorer, AttentionScorer) or (isinstance(scorer, FeatureScorer) and scorer.needs_keys)
            for scorer in self.scorers.values()
        )


def tower_needs(schedule: Schedule) -> TowerNeeds | None:
    """What the schedule's scorers read of the vision tower; None if none does."""
    rules = [scorer for scorer in schedule.scorers().values() if isinstance(scorer, TowerScorer)]
    if not rules:
        return None
    return TowerNeeds(
        saliency=frozenset(name for rule in rules for name in rule.saliency),
        states=any(rule.needs_states for rule in rules),
        keys=any(rule.needs_tower_keys for rule in rules),
        places=any(rule.needs_places for rule in rules),
    )
