"""Step 4c, search: profile, measurements and a budget in, a schedule with its evidence out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast, get_args

from pruning_runtime import Schedule
from pruning_runtime.schedule import BackboneIdentity, BudgetKind, DroppedTokens, Stage
from pruning_runtime.scorers import SCORERS, find_scorer
from schedule_finder.errors import InputError
from schedule_finder.evidence import (
    AnswerQuality,
    Asked,
    DetectorChoice,
    Evidence,
    RuleProbe,
    SampleCounts,
    SolverEvidence,
    TypicalPrompt,
)
from schedule_finder.files import parse_json, write_json
from schedule_finder.measuring.latency_model import LatencyModel, measure_latency
from schedule_finder.measuring.sensitivity_table import (
    SensitivityTable,
    better_dropped_tokens,
    measure_sensitivity,
)
from schedule_finder.measuring.token_policy import ANSWER_TOKENS, CONTROLS, PAPER_POLICY, TokenPolicy
from schedule_finder.profiling.store import Profile
from schedule_finder.provenance import provenance
from schedule_finder.run.folder import Run
from schedule_finder.run.reader import ChangePoints, read_change_points
from schedule_finder.run.schema import problem_of_searched
from schedule_finder.samples import BadSample, DataSet, Sample, SampleEntry, in_turn, read_entries
from schedule_finder.solvers import DEFAULT_SOLVER, SOLVERS, BudgetTarget, Problem

if TYPE_CHECKING:
    from pruning_runtime.backbone import Backbone
    from schedule_finder.measuring.answer_kl import AnswerKL
    from schedule_finder.models.loading import LoadedBackbone

AUTO = "auto"
"""The solver chooses scorer and dropped-token setting; `PAPER_POLICY` where it cannot."""
TABLE_SAMPLES = 32
CHOICE_SAMPLES = 192
"""Samples for the sensitivity table, and others for the choice among whole schedules."""
MEASURED_LAYERS = 12
"""Most layers in the sensitivity table; of deeper decoders every second or third is measured."""
LATENCY_SAMPLES = 8
TABLE_BATCH, CHOICE_BATCH = 8, 16
"""Most samples per forward pass: rules and whole schedules are measured on one batch first."""

Progress = Callable[[int, int], None]


class Search:
    """Solves for budgets over one run's profile; measurements on the model are made once and kept in the run.

    Args:
        run: a run with a profile and change points.
        model: backbone and data set, for solvers and budgets that measure; None: use stored measurements only.
        batch_size: samples per forward pass when measuring.
        answer_tokens: longest answer that is measured, in tokens; None: that of the stored table, or the default.
        progress: called with (done, total) layers while the sensitivity table is measured.
    """

    def __init__(
        self,
        run: Run,
        model: tuple[LoadedBackbone, DataSet] | None = None,
        *,
        batch_size: int = 32,
        answer_tokens: int | None = None,
        progress: Progress = lambda _done, _total: None,
    ) -> None:
        self._run = run
        self._model = model
        self._batch_size = batch_size
        self._asked_tokens = answer_tokens
        self._progress = progress
        self._answer_kl: AnswerKL | None = None

    def solve(
        self,
        budget: float,
        kind: BudgetKind,
        *,
        solver: str = DEFAULT_SOLVER,
        scorer: str = AUTO,
        dropped_tokens: str = AUTO,
    ) -> Schedule:
        """A schedule for one budget with its evidence, not written anywhere. Raises `InputError`."""
        self._check(solver, scorer, dropped_tokens)
        profile = self.profile
        target = self.target(budget, kind)
        chosen = SOLVERS[solver]
        detector = chosen.detector or self.detections.default
        change_points = self.detections.of(detector)
        table = self.sensitivity_table(scorer, dropped_tokens) if chosen.needs_sensitivity else None
        policy = _policy(scorer, dropped_tokens) if table is None else table.policy
        rules = RuleProbe.load(self._run.rules) if scorer == AUTO and chosen.measures else None
        solution = chosen().solve(
            Problem(
                profile,
                change_points,
                target.under(policy),
                policy,
                alternatives=_alternatives(policy, scorer, dropped_tokens, rules, list(profile.scores)),
                controls=[replace(_policy(AUTO, dropped_tokens), scorer=name) for name in CONTROLS],
                may_change=scorer == AUTO,
                rules=rules,
                sensitivity=table,
                answer_kl=self._choice_answer_kl() if chosen.measures else None,
                isolated=self.detections.isolated,
            )
        )
        asked = Asked(solver=solver, scorer=scorer, dropped_tokens=dropped_tokens)
        reasons = solution.evidence
        if chosen.measures:
            reasons = reasons.model_copy(update={"answer_tokens": self.answer_tokens})
        evidence = self._evidence(asked, detector, change_points, reasons)
        return Schedule(
            backbone=BackboneIdentity(**profile.meta["backbone"]),
            stages=self._with_counts(solution.policy.apply(solution.stages)),
            scorer=solution.policy.choice,
            dropped_tokens=solution.policy.dropped_tokens,
            budget=target.under(solution.policy).account(solution.stages),
            evidence=evidence.model_dump(mode="json", exclude_unset=True),
            provenance=self._provenance(),
        )

    def _with_counts(self, stages: Sequence[Stage]) -> tuple[Stage, ...]:
        """``stages`` with the vision tokens that a typical prompt keeps."""
        count = round(self.profile.mean_vision)
        return tuple(stage.model_copy(update={"keep_tokens": stage.kept(count)}) for stage in stages)

    def _provenance(self) -> dict[str, Any]:
        meta = self.profile.meta
        return provenance(
            revision=meta["backbone"].get("revision"),
            profile_dtype=meta["dtype"],
            prompt_digest=meta["prompt_digest"],
            loading=self._run.options.get("loading", {}),
            seed=self._run.options["seed"],
        )

    def _evidence(
        self, asked: Asked, detector: str, change_points: list[int], solver: SolverEvidence
    ) -> Evidence:
        """What a schedule of this run is based on, with the quality of the full model's first answers if known."""
        profile = self.profile
        evidence = Evidence(
            samples=len(profile),
            dataset=self._run.options["dataset"],
            typical_prompt=TypicalPrompt(
                vision_tokens=round(profile.mean_vision, 1), other_tokens=round(profile.mean_other, 1)
            ),
            question_types=self._question_types,
            detector=DetectorChoice(name=detector),
            change_points=change_points,
            asked=asked,
            counts=self._counts,
            solver=solver,
        )
        quality = AnswerQuality.load(self._run.first_answers)
        return evidence if quality is None else evidence.model_copy(update={"full_model": quality})

    def _check(self, solver: str, scorer: str, dropped_tokens: str) -> None:
        """Raise `InputError` for a name that is not known, or a scorer that the solver cannot use."""
        # Solvers that do not measure replay the scores that the profile holds.
        measures = solver in SOLVERS and SOLVERS[solver].measures
        known = {
            "solver": (solver, list(SOLVERS)),
            "scorer": (scorer, [AUTO, *(SCORERS if measures else self.profile.scores)]),
            "dropped-tokens": (dropped_tokens, [AUTO, *get_args(DroppedTokens)]),
        }
        for option, (value, choices) in known.items():
            if value not in choices:
                raise InputError(f"--{option} {value!r}: choose {', '.join(choices)}")

    def target(self, budget: float, kind: BudgetKind) -> BudgetTarget:
        """The budget on this run's backbone and typical prompt. Raises `InputError`."""
        if not 0 < budget <= 1:
            raise InputError(
                f"--budget {budget}: a fraction of the unpruned cost, above 0 and at most 1 (or 15%)"
            )
        profile = self.profile
        return BudgetTarget(
            kind,
            budget,
            profile.shape,
            profile.mean_vision,
            profile.mean_other,
            self._latency if kind == "latency" or self._run.latency.exists() else None,
            profile.layers,
        )

    def share_of_prefill(self, milliseconds: float) -> float:
        """``milliseconds`` as a fraction of the unpruned decoder's prefill of a typical prompt on this device.

        Raises `InputError` where it is above 1.
        """
        whole = self.target(1.0, "latency").full_ms
        if not 0 < milliseconds <= whole:
            raise InputError(
                f"--budget {milliseconds:g}ms: the unpruned decoder takes {whole:.3g} ms for a typical prompt; ask for "
                "less, and more than 0"
            )
        return milliseconds / whole

    @cached_property
    def profile(self) -> Profile:
        """The run's profile. Raises `InputError`."""
        profile = self._run.profile.read()
        if (problem := problem_of_searched(profile.meta)) is not None:
            raise InputError(f"{self._run.profile.meta_path}: {problem}; profile again into a new folder")
        return profile

    @cached_property
    def detections(self) -> ChangePoints:
        """The content of the change-point file. Raises `InputError`."""
        return read_change_points(self._run.change_points)

    @cached_property
    def _entries(self) -> dict[str, SampleEntry]:
        return {entry.id: entry for entry in read_entries(self._run.samples)}

    @property
    def _counts(self) -> SampleCounts:
        """Samples of the run: asked for and there."""
        options = self._run.options
        return SampleCounts(
            asked=options["samples"] if isinstance(options["samples"], int) else None,
            profiled=len(self.profile),
            asked_held_out=options["eval_samples"],
            held_out=sum(
                entry.use == "held_out" and entry.status != "skipped" for entry in self._entries.values()
            ),
        )

    @property
    def _question_types(self) -> list[str]:
        return sorted(
            {self._entries[name].question_type for name in self.profile.ids if name in self._entries}
        )

    # ---- measurements

    @cached_property
    def answer_tokens(self) -> int:
        """Tokens of an answer that are measured, at most. Raises `InputError` where the stored table is damaged."""
        if self._asked_tokens is None and self._run.sensitivity.exists():
            return SensitivityTable.load(self._run.sensitivity).answer_tokens
        return self._asked_tokens or ANSWER_TOKENS

    def sensitivity_table(self, scorer: str = AUTO, dropped_tokens: str = AUTO) -> SensitivityTable:
        """The stored table, or a new one where there is none or it is of another policy or number of answer tokens."""
        path = self._run.sensitivity
        if path.exists():
            table = SensitivityTable.load(path)
            same_scorer = table.policy.scorer == table.policy.before_decoder == scorer
            same_tokens = dropped_tokens in (AUTO, table.policy.dropped_tokens)
            if (scorer == AUTO or same_scorer) and same_tokens and table.answer_tokens == self.answer_tokens:
                return table
        what = f"sensitivity table over {self.answer_tokens} answer token(s)"
        samples = self._load_samples(0, TABLE_SAMPLES, what)
        answer_kl = self._measure_on(samples, TABLE_BATCH)
        layers = measured_layers(self._loaded.backbone, scorer)
        policy = _policy(scorer, dropped_tokens)
        if scorer == AUTO:
            policy = self._best_rules(answer_kl, layers, dropped_tokens)
        elif dropped_tokens == AUTO:
            better = better_dropped_tokens(answer_kl, policy.scorer, layers)
            policy = replace(policy, dropped_tokens=better)
        table = measure_sensitivity(answer_kl, policy, layers, self._progress)
        table.save(path)
        return table

    def _best_rules(self, answer_kl: AnswerKL, layers: list[int], dropped_tokens: str) -> TokenPolicy:
        """The best scorers on single stages, before the decoder and inside it; writes the comparison."""
        from schedule_finder.measuring.rule_probe import probe_rules

        one = (cast("DroppedTokens", dropped_tokens),)
        rules = probe_rules(answer_kl, layers, get_args(DroppedTokens) if dropped_tokens == AUTO else one)
        rules.save(self._run.rules)
        best = rules.ranked("decoder")[0]
        before = rules.ranked("pre_decoder")
        return TokenPolicy(best.scorer, best.dropped_tokens, pre_decoder=before[0].scorer if before else None)

    def _choice_answer_kl(self) -> AnswerKL | None:
        if self._answer_kl is None and self._model is not None:
            samples = self._load_samples(TABLE_SAMPLES, CHOICE_SAMPLES, "choice")
            self._answer_kl = self._measure_on(samples, CHOICE_BATCH)
        return self._answer_kl

    def _measure_on(self, samples: list[Sample], most: int) -> AnswerKL:
        from schedule_finder.measuring.answer_kl import AnswerKL

        lengths = [self.profile.lengths[sample.id] for sample in samples]
        batch, folder = min(self._batch_size, most), self._run.measurements
        return AnswerKL.for_samples(self._loaded, samples, batch, folder, self.answer_tokens, lengths)

    @cached_property
    def _latency(self) -> LatencyModel:
        path = self._run.latency
        if path.exists():
            document = parse_json(path.read_text(encoding="utf-8"))
            return LatencyModel(**document | {name: tuple(document[name]) for name in ("tokens", "layer_ms")})
        samples = self._load_samples(0, LATENCY_SAMPLES, "latency model")
        found = measure_latency(self._loaded, self._loaded.inputs(samples), PAPER_POLICY.scorer)
        write_json(path, asdict(found))
        return found

    @property
    def _loaded(self) -> LoadedBackbone:
        return self._need_model("measuring")[0]

    def _need_model(self, what: str) -> tuple[LoadedBackbone, DataSet]:
        if self._model is None:
            raise InputError(
                f"{self._run.folder}: {what} is not measured yet and needs the backbone; run without --no-model"
            )
        return self._model

    def _load_samples(self, first: int, count: int, what: str) -> list[Sample]:
        """Profiled samples ``first`` to ``first + count`` in an order that takes question types in turn.

        A short profile is split: one half where ``first`` is 0, the other half where it is not.
        """
        _, data = self._need_model(what)
        known = [self._entries[name] for name in self.profile.ids if name in self._entries]
        names = [entry.id for entry in in_turn(known, self._run.options["seed"])]
        if len(names) < TABLE_SAMPLES + CHOICE_SAMPLES:
            half = max(1, len(names) // 2)
            names = names[:half] if first == 0 else names[half:] or names
        else:
            names = names[first:]
        samples: list[Sample] = []
        for name in names:
            if len(samples) == count:
                break
            try:
                samples.append(data.load(self._entries[name]))
            except BadSample:
                continue  # readable when it was profiled, but no longer; the next sample takes its place
        if not samples:
            raise InputError(f"{self._run.folder}: none of the profiled samples can be loaded for the {what}")
        return samples


def measured_layers(backbone: Backbone, scorer: str = AUTO) -> list[int]:
    """Layers of single stages that are measured: with their own attention, at most `MEASURED_LAYERS`, not the last.

    The first is -1 (before the decoder) unless ``scorer`` reads attention and layer 0 has none.
    """
    usable = [layer for layer in range(backbone.shape.num_layers - 1) if backbone.has_own_attention(layer)]
    reads_attention = scorer != AUTO and find_scorer(scorer).needs_attention
    return spread_layers(usable, before_decoder=not reads_attention or usable[0] == 0)


def spread_layers(usable: list[int], *, before_decoder: bool = True) -> list[int]:
    """At most `MEASURED_LAYERS` of ``usable``, evenly spread, after -1 if ``before_decoder``."""
    spread = usable[:: -(-len(usable) // MEASURED_LAYERS)]
    return [-1, *spread] if before_decoder else spread


def _alternatives(
    policy: TokenPolicy, scorer: str, dropped_tokens: str, rules: RuleProbe | None, profiled: list[str]
) -> list[TokenPolicy]:
    """Policies that a solver may choose instead of ``policy``, each of which differs from it in one choice.

    Args:
        policy: of the sensitivity table.
        scorer, dropped_tokens: as asked for.
        rules: scorers that were compared; None: those of the profile are alternatives.
        profiled: scorers whose scores the profile holds.
    """
    found = []
    if scorer == AUTO and rules is None:
        found += [replace(policy, scorer=name, pre_decoder=None) for name in profiled]
    elif rules is not None:
        found += [
            replace(policy, scorer=rule.scorer, pre_decoder=policy.before_decoder)
            for rule in rules.ranked("decoder")
        ]
        found += [replace(policy, pre_decoder=rule.scorer) for rule in rules.ranked("pre_decoder")]
    if dropped_tokens == AUTO:
        found += [replace(policy, dropped_tokens=other) for other in get_args(DroppedTokens)]
    return [one for one in dict.fromkeys(found) if one != policy]


def _policy(scorer: str, dropped_tokens: str) -> TokenPolicy:
    """The policy that was asked for, with the paper's choice for ``auto``."""
    return TokenPolicy(
        PAPER_POLICY.scorer if scorer == AUTO else scorer,
        PAPER_POLICY.dropped_tokens if dropped_tokens == AUTO else cast("DroppedTokens", dropped_tokens),
    )
