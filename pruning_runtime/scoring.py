"""Scores of the stages of one prompt: collects what each stage's scorer needs, and calls it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pruning_runtime.attention_rows import attention_rows, padded_indices
from pruning_runtime.attention_tap import AttentionInputs
from pruning_runtime.errors import PruningError
from pruning_runtime.merging import join_dropped
from pruning_runtime.scorers import (
    AttentionScorer,
    FeatureScorer,
    FrameScorer,
    PositionScorer,
    Scorer,
    TowerScorer,
    VisionTokens,
)
from pruning_runtime.selection import StagePlan
from pruning_runtime.sequence import PrunedPrompt, Segment
from pruning_runtime.setup import PruningSetup
from pruning_runtime.token_groups import (
    FrameProblem,
    TokenGroups,
    frame_problems,
    image_counts,
    image_numbers,
)
from pruning_runtime.tower_tokens import PromptTower


class _LayerStopped(Exception):
    """Layer 0 reached its attention kernel in a run for its queries and keys only."""


@dataclass(frozen=True, slots=True)
class PromptCounts:
    """Counts of a prompt that are known on the host; all shapes of scoring follow from them.

    Attributes:
        text_queries: maximum over the rows.
        vision: vision tokens, maximum over the rows.
        images: images of a row, maximum over the rows.
        largest_image: vision tokens of the largest image.
    """

    text_queries: int
    vision: int
    images: int
    largest_image: int


@dataclass
class StageScoring:
    """Scores the vision tokens of one prompt, stage by stage.

    Attributes:
        setup: of the ``with``.
        prompt: the positions that each layer holds.
        number: earlier prefills inside the same ``with``.
        vision, text_queries: bool ``[batch, length]``.
        counts: of the prompt.
        scores: of the next attention-scored stage, ``[batch, slots]``.
        chosen_text: text queries that count for a stage whose scorer chooses them, by layer, bool ``[batch, length]``.
        layer_only: layer 0 runs for its queries and keys only.
        previous: hidden states before the layer of the next stage.
        key_norms: of that layer's keys, ``[batch, slots]``.
        tower: statistics of the vision tower; None unless a scorer reads them.
        joining: rule, groups and tokens of the stage that was scored last, if dropped tokens join kept ones there.
    """

    setup: PruningSetup
    prompt: PrunedPrompt
    number: int
    vision: Tensor
    text_queries: Tensor
    counts: PromptCounts
    scores: Tensor | None = None
    chosen_text: dict[int, Tensor] = field(default_factory=dict)
    layer_only: bool = False
    previous: Tensor | None = None
    key_norms: Tensor | None = None
    tower: PromptTower | None = None
    joining: tuple[FeatureScorer, TokenGroups, VisionTokens] | None = None

    def check_text(self, num_text_queries: list[int], num_vision: list[int]) -> None:
        """Raise `PruningError` if a scorer reads text and a row with an image has none after it."""
        pairs = zip(num_text_queries, num_vision, strict=True)
        without = [row for row, (text, vision) in enumerate(pairs) if vision and not text]
        reading = [scorer.name for scorer in self.setup.scorers.values() if scorer.needs_text]
        if without and reading:
            raise PruningError(
                f"scorer {reading[0]!r} compares vision tokens with the text after them, and row {without[0]} has no "
                "text after its first vision token; put the question after the image, or use a scorer without text"
            )

    def check_frames(self, problems: list[list[int]]) -> None:
        """Raise `PruningError` if a scorer compares frames and a row has none; ``problems``: `find_frame_problems`."""
        scorer = self.setup.frame_scorer
        if scorer is None or not any(map(any, problems)):
            return
        row, problem = next((row, found) for row, found in enumerate(problems[0]) if found)
        if problem == FrameProblem.TOO_FEW:
            what = f"needs {scorer.fewest_frames} frames or more, and a video of row {row} has fewer"
        elif scorer.frame_tokens is None:
            what = f"takes every image of a row as a frame, and those of row {row} differ in size"
        else:
            what = f"has frame_tokens {scorer.frame_tokens}, which does not divide a video of row {row}"
        raise PruningError(
            f"scorer {scorer.name!r} {what}; set its option frame_tokens to the vision tokens of a frame, or use "
            "a scorer without frames"
        )

    # ---- before a layer

    def choose_text(self, embeddings: Tensor) -> None:
        """Let scorers choose text queries by the decoder's inputs, ``[batch, length, width]``."""
        for stage, scorer in self.setup.scorers.items():
            if isinstance(scorer, AttentionScorer) and scorer.chooses_text:
                self.chosen_text[stage] = self._choose_text(scorer, embeddings)

    def remember(self, layer: int, hidden: Tensor) -> None:
        """Keep the inputs of ``layer``, ``[batch, slots, width]``, if the scorer of the stage after it compares them."""
        scorer = self.setup.scorers[layer]
        if isinstance(scorer, FeatureScorer) and scorer.needs_layer:
            self.previous = hidden

    def _choose_text(self, scorer: AttentionScorer, embeddings: Tensor) -> Tensor:
        """The text queries that count for ``scorer``, bool ``[batch, length]``."""
        keep = self.vision.sum(1)
        groups = TokenGroups.of(
            self.vision, torch.zeros_like(self.vision).long(), keep, 1, self.counts.vision
        )
        embeddings = _states(embeddings)
        rows, real = padded_indices(self.text_queries, max(self.counts.text_queries, 1))
        tokens = VisionTokens(
            features=groups.gather(embeddings).float(),
            is_token=groups.is_token.squeeze(1),
            keep=keep,
            most_kept=self.counts.vision,
            groups_per_row=1,
            text=_rows_at(embeddings, rows, real),
            is_text=real,
        )
        with _full_precision(embeddings):
            chosen = scorer.choose_text(tokens)
        # A padding entry repeats a position that is not a text query.
        return torch.zeros_like(self.text_queries).scatter_(1, rows, chosen) & self.text_queries

    def before_decoder(
        self, hidden: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any], features: Tensor | None
    ) -> None:
        """Score all tokens with layer 0's queries and keys, without its cache.

        Runs the layer's own forward and stops it at its attention kernel, so that projections, norms and rotary
        embeddings of all families are those of the model.

        Args:
            hidden, others, kwargs: arguments of the layer.
            features: DeepStack features to add to ``hidden``.
        """
        self.prompt.segment_of_layer[0] = 0
        if features is not None:
            hidden = hidden + features.to(hidden.device)
        self.layer_only = True
        try:
            # `forward` and not a call: this code runs inside a hook of the call.
            run = self.setup.backbone.layers[0].forward
            if "hidden_states" in kwargs:
                run(**{**kwargs, "hidden_states": hidden, "past_key_values": None})
            else:
                run(hidden, *others, **{**kwargs, "past_key_values": None})
        except _LayerStopped:
            pass
        finally:
            self.layer_only = False

    # ---- in a layer's attention

    def on_attention(self, inputs: AttentionInputs, is_stage: bool) -> None:
        """Score the tokens if a stage follows this layer, or if layer 0 runs for its queries and keys only."""
        if self.layer_only:
            self._score_rows(-1, inputs)
            raise _LayerStopped
        scorer = self.setup.scorers.get(inputs.layer) if is_stage else None
        if isinstance(scorer, AttentionScorer):
            with self.setup.watch.part("scoring"):
                self._score_rows(inputs.layer, inputs)
        elif isinstance(scorer, FeatureScorer) and scorer.needs_keys:
            self.key_norms = inputs.key.float().abs().sum((1, 3))

    def _score_rows(self, stage: int, inputs: AttentionInputs) -> None:
        """Set `scores` from the attention rows of one layer, for the stage with layer ``stage``."""
        scorer = self.setup.scorers[stage]
        assert isinstance(scorer, AttentionScorer)
        device = inputs.query.device
        segment = self.prompt.of(inputs.layer, device)
        text_queries = self.chosen_text.get(stage, self.text_queries).to(device)
        is_text_query = text_queries.gather(1, segment.index) & segment.valid
        width = 1 if scorer.last_row_only else max(self.counts.text_queries, 1)
        rows, real = padded_indices(is_text_query, width, last_only=scorer.last_row_only)
        blocks = attention_rows(
            inputs.query,
            inputs.key,
            rows,
            real,
            inputs.mask,
            inputs.scaling,
            softcap=inputs.softcap,
            sliding_window=inputs.sliding_window,
        )
        scores = inputs.query.new_zeros(segment.index.shape, dtype=torch.float32)
        for block in blocks:
            scores += scorer.score_heads(block, rows, real)
        self.scores = scores

    # ---- at a stage

    def stage_scores(
        self,
        stage: StagePlan,
        before: Segment,
        hidden: Tensor,
        vision: Tensor,
        keep: Tensor,
        protected: Tensor | None,
    ) -> Tensor:
        """Scores for a stage, ``[batch, slots]``.

        Scorers choose among the tokens that are not protected, so that they spread over those.

        Args:
            stage: planned for this batch.
            before: the sequence that reaches the stage.
            hidden: its hidden states, ``[..., slots, width]``.
            vision, protected: bool ``[batch, slots]``.
            keep: vision tokens to keep in each row, ``[batch]``.
        """
        scorer: Scorer = self.setup.scorers[stage.layer]
        if protected is not None:
            keep = (keep - protected.sum(1)).clamp(min=0)
            vision = vision & ~protected
        if isinstance(scorer, AttentionScorer):
            if self.scores is None:
                raise PruningError(
                    f"layer {stage.layer} ran without calling its attention kernel, so it gave no scores"
                )
            scores, self.scores = self.scores.to(vision.device), None
            return scorer.finish(scores, vision, before.index, keep)
        if isinstance(scorer, PositionScorer):
            return scorer.score_positions(vision, before.index, keep, self.number)
        with self.setup.watch.part("scoring"):
            return self._score_features(scorer, stage, before, hidden, vision, keep)

    def _score_features(
        self,
        scorer: FeatureScorer,
        stage: StagePlan,
        before: Segment,
        hidden: Tensor,
        vision: Tensor,
        keep: Tensor,
    ) -> Tensor:
        """`stage_scores` of a feature scorer."""
        if hidden.shape[-2] != before.width:
            # The model goes on with the prompt's last tokens only, which are all kept.
            return torch.zeros(before.index.shape, device=vision.device)
        groups, most_kept = self._groups(scorer, stage, before, vision, keep)
        tokens = self._vision_tokens(scorer, groups, most_kept, before, hidden)
        with _full_precision(hidden):
            scores = scorer.score(tokens)
        self.previous = self.key_norms = None
        self.joining = (scorer, groups, tokens) if scorer.joins else None
        if tokens.groups_per_row > 1:
            # Scores of two groups cannot be compared: what a group keeps ranks above what it does not.
            rank = scores.masked_fill(~tokens.is_token, float("-inf"))
            rank = rank.argsort(dim=1, descending=True, stable=True).argsort(1)
            scores = (rank < tokens.keep[:, None]).float()
        return groups.scatter(scores, vision.shape[1], torch.finfo(torch.float32).min)

    def joined(self, hidden: Tensor, index: Tensor, valid: Tensor) -> Tensor:
        """``hidden`` of the stage scored last, with dropped tokens joined to kept ones where its rule says so.

        Args:
            hidden: ``[batch, slots, width]``.
            index, valid: slots to keep, result of `select_kept`.
        """
        if self.joining is None:
            return hidden
        (scorer, groups, tokens), self.joining = self.joining, None
        kept = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device).scatter_(1, index, valid)
        in_groups = groups.gather(kept.float()) > 0
        with _full_precision(hidden):
            features = join_dropped(tokens.features, in_groups, scorer.join(tokens, in_groups), scorer.joins)
        return groups.put(hidden, features.to(hidden.dtype), in_groups)

    def _groups(
        self, scorer: FeatureScorer, stage: StagePlan, before: Segment, vision: Tensor, keep: Tensor
    ) -> tuple[TokenGroups, int]:
        """The groups of a stage, and the most tokens that one of them keeps."""
        counts = self.counts
        if scorer.scope == "tile":
            assert self.tower is not None
            tile, num_tiles, largest = self.tower.tiles(before.index)
            groups = TokenGroups.of(vision, tile, keep, num_tiles, largest)
            return groups, min(stage.most_kept, largest)
        if scorer.scope == "sample" or counts.images <= 1:
            group = torch.zeros_like(before.index)
            return TokenGroups.of(vision, group, keep, 1, counts.vision), min(stage.most_kept, counts.vision)
        numbers = image_numbers(self.vision).to(vision.device)
        group = numbers.gather(1, before.index)
        groups = TokenGroups.of(vision, group, keep, counts.images, counts.largest_image)
        return groups, min(stage.most_kept, counts.largest_image)

    def _vision_tokens(
        self, scorer: FeatureScorer, groups: TokenGroups, most_kept: int, before: Segment, hidden: Tensor
    ) -> VisionTokens:
        """What ``scorer`` may read about ``groups``."""
        device, number = hidden.device, groups.index.shape[1]
        hidden = _states(hidden)
        text_queries = self.text_queries.to(device) & _after_vision(self.vision.to(device), self.text_queries)
        width = max(self.counts.text_queries, 1) if scorer.needs_text else 1
        rows, real = padded_indices(text_queries.gather(1, before.index) & before.valid, width)
        if not scorer.needs_text:
            real = torch.zeros_like(real)
        states = hidden
        if scorer.after_final_norm:
            states = self.setup.backbone.final_norm(hidden)
        previous = None if self.previous is None else _states(self.previous).to(device)
        keys = None if self.key_norms is None else self.key_norms.to(device)
        images = None
        if isinstance(scorer, FrameScorer):
            images = groups.is_token.any(2).long().flatten()
            if number == 1:
                vision = self.vision.to(device)
                images = image_counts(vision, image_numbers(vision))[0]
        return VisionTokens(
            features=groups.gather(states).float(),
            is_token=groups.is_token.flatten(0, 1),
            keep=groups.keep.flatten(),
            most_kept=most_kept,
            groups_per_row=number,
            text=_rows_at(states, rows, real).repeat_interleave(number, 0),
            is_text=real.repeat_interleave(number, 0),
            previous=None if previous is None else groups.gather(previous).float(),
            key_norms=None if keys is None else groups.gather(keys),
            text_key_norms=None if keys is None else keys.gather(1, rows).repeat_interleave(number, 0),
            images=images,
            tower=self.tower.tokens(groups, before.index)
            if self.tower and isinstance(scorer, TowerScorer)
            else None,
        )


def find_frame_problems(setup: PruningSetup, vision: Tensor, images: Tensor) -> list[Tensor]:
    """`frame_problems` of a prompt, if the schedule's scorer compares frames; else none.

    Args:
        setup: of the ``with``.
        vision: bool ``[batch, length]``.
        images: result of `image_numbers`.
    """
    scorer = setup.frame_scorer
    if scorer is None:
        return []
    newlines = bool(setup.image_newlines)
    return [frame_problems(vision, images, scorer.frame_tokens, scorer.fewest_frames, newlines)]


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Similarities are float32 even where the model runs under autocast."""
    return torch.autocast(tensor.device.type, enabled=False)


def _states(hidden: Tensor) -> Tensor:
    """Hidden states as ``[batch, slots, width]``: of several streams (Gemma 3n) the first, which the layers compute."""
    return hidden if hidden.dim() == 3 else hidden[0]


def _rows_at(states: Tensor, rows: Tensor, real: Tensor) -> Tensor:
    """``states`` (``[batch, length, width]``) at ``rows`` (``[batch, number]``) in float32; 0 where not ``real``."""
    found = states.gather(1, rows[..., None].expand(-1, -1, states.shape[-1])).float()
    return found * real[..., None]


def _after_vision(vision: Tensor, text_queries: Tensor) -> Tensor:
    """True after the last vision token; everywhere in rows with no text query there, ``[batch, length]``."""
    after = vision.flip(1).cumsum(1).flip(1) == 0
    return after | ~(after & text_queries.to(vision.device)).any(1, keepdim=True)
