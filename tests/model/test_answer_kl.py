"""Answer KL: its value, from saved states as from the start; the model is unchanged afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from pruning_runtime import find_backbone, pruned
from pruning_runtime.schedule import Stage
from schedule_finder.measuring.answer_kl import AnswerKL, TokenPolicy
from schedule_finder.measuring.own_answers import answers_with_logits, greedy_answers, with_answers
from schedule_finder.measuring.unit_store import UnitStore
from tests.support import greedy
from tests.support.answer_kls import POLICY, a_model_of, answer_kl_of
from tests.support.own_mask_reference import append_tokens
from tests.support.rounding import rounding_bound
from tests.support.schedules import schedule_for
from tests.support.tiny_families_a import FAMILIES_A
from tests.support.tiny_families_b import FAMILIES_B
from tests.support.tiny_models import EOS, FAMILIES, IMAGE, Inputs

ROUNDING = 32 * torch.finfo(torch.float32).eps
"""Of a KL of 0 whose logits come from two float32 runs: some units in the last place of log-probabilities up to about 10."""


def log_probabilities(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[:, -1].double().log_softmax(-1)


def test_of_one_token_it_is_the_kl_divergence_of_the_next_token() -> None:
    tiny = FAMILIES["llava"]
    model, batches = tiny.build(), [tiny.batch((1, 2)), tiny.batch((1,), seed=1)]
    answer_kl = answer_kl_of(model, batches, answer_tokens=1)
    assert answer_kl.forwards == 3
    stages = (Stage(layer=0, keep_ratio=0.4), Stage(layer=3, keep_ratio=0.1))
    found, tokens = answer_kl.measure_with_tokens(stages, POLICY)
    expected, likely = [], []
    for inputs in batches:
        full = log_probabilities(model, inputs)
        with pruned(model, schedule_for(model, (0, 0.4), (3, 0.1))):
            short = log_probabilities(model, inputs)
        expected += (full.exp() * (full - short)).sum(1).tolist()
        likely += short.argmax(1).tolist()
    assert found == pytest.approx(expected, abs=1e-6)
    assert tokens.tolist() == likely
    assert min(expected) > 1e-4  # there is something to see
    assert answer_kl.measure((), POLICY) == pytest.approx(np.zeros(3), abs=ROUNDING)


def answers_of(
    model: PreTrainedModel, inputs: Inputs, most: int, ends: tuple[int, ...] = (EOS, IMAGE)
) -> list[list[int]]:
    """The model's own answers, token by token and without a cache; one of ``ends`` is the last."""
    rows = []
    for row in range(len(inputs["input_ids"])):
        answer: list[int] = []
        while len(answer) < most and (not answer or answer[-1] not in ends):
            others = torch.full((len(inputs["input_ids"]), len(answer)), 5)
            others[row] = torch.tensor(answer, dtype=torch.long)
            answer.append(int(log_probabilities(model, append_tokens(inputs, others))[row].argmax()))
        rows.append(answer)
    return rows


def ends_of(model: PreTrainedModel, inputs: Inputs) -> tuple[int, ...]:
    """Let the first row's answer end with its second token and the second row's with its first."""
    answers = answers_of(model, inputs, 2)
    ends = (EOS, IMAGE, answers[0][1], answers[1][0])
    model.generation_config.eos_token_id = [EOS, *ends[2:]]
    return ends


def test_answers_end_where_a_prompt_could_not_go_on() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1, 2), seed=3)
    backbone = find_backbone(model)
    whole = greedy_answers(backbone, inputs, 6)
    assert whole == answers_of(model, inputs, 6)
    assert list(map(len, whole)) == [6, 6]
    as_vision = replace(backbone, vision_token_ids=(IMAGE, whole[0][2]))
    assert greedy_answers(as_vision, inputs, 6)[0] == whole[0][: whole[0].index(whole[0][2]) + 1]
    ends = ends_of(model, inputs)

    def ended(answer: list[int]) -> list[int]:
        return answer[: next(place for place, token in enumerate(answer) if token in ends) + 1]

    found = greedy_answers(backbone, inputs, 6)
    assert found == [ended(answer) for answer in whole]
    assert max(map(len, found)) < 6


def test_it_is_the_mean_over_the_tokens_of_the_unpruned_answer() -> None:
    """Against single steps on a pruned cache, row by row; answers of unlike lengths."""
    tiny = FAMILIES["llava"]
    model = tiny.build()
    batches = [tiny.batch((1, 2, 1), seed=3), tiny.batch((1,), seed=1)]
    stages = (Stage(layer=0, keep_ratio=0.4), Stage(layer=3, keep_ratio=0.1))
    ends = ends_of(model, batches[0])
    expected, lengths, likely = [], [], []
    for inputs in batches:
        answers = answers_of(model, inputs, 4, ends)
        lengths += map(len, answers)
        with pruned(model, schedule_for(model, (0, 0.4), (3, 0.1))), torch.no_grad():
            output = model(**inputs, use_cache=True)
            short = [output.logits[:, -1]]
            for step in range(3):
                fed = torch.tensor([answer[step] if step < len(answer) - 1 else 5 for answer in answers])
                output = model(input_ids=fed[:, None], past_key_values=output.past_key_values, use_cache=True)
                short.append(output.logits[:, -1])
        for row, answer in enumerate(answers):
            terms = []
            for step in range(len(answer)):
                fed = torch.tensor([answer[:step]] * len(answers), dtype=torch.long)
                full = log_probabilities(model, append_tokens(inputs, fed))[row]
                other = short[step][row].double().log_softmax(-1)
                terms.append(float((full.exp() * (full - other)).sum()))
            expected.append(np.mean(terms))
        likely += short[0].argmax(1).tolist()
    assert lengths[:2] == [2, 1]
    assert max(lengths) == 4
    answer_kl = answer_kl_of(model, batches)
    assert answer_kl.forwards == 4  # the answers, which give the reference too
    found, tokens = answer_kl.measure_with_tokens(stages, POLICY)
    assert found == pytest.approx(expected, abs=1e-5)
    assert tokens.tolist() == likely
    first = answer_kl_of(model, batches, answer_tokens=1).measure(stages, POLICY)
    assert np.abs(found - first).max() > 0.01  # the other tokens count
    assert answer_kl.measure((), POLICY) == pytest.approx(np.zeros(4), abs=ROUNDING)


@pytest.mark.parametrize("name", [*FAMILIES, *FAMILIES_A, *FAMILIES_B])
def test_a_prompt_with_its_answer_gives_the_logits_that_chose_it(name: str) -> None:
    """Masks, types and positions of an answer are those of generated tokens, in every family."""
    model, inputs = a_model_of(name)
    tokens, logits = greedy.generate(model, inputs, steps=4)
    whole = with_answers(find_backbone(model), inputs, tokens.tolist())
    with torch.no_grad():
        found = model(**whole, use_cache=False, logits_to_keep=4).logits[:, -4:]  # some return all
    assert (found - logits).abs().max() < rounding_bound(model, whole)


@pytest.mark.parametrize("name", [*FAMILIES, *FAMILIES_A, *FAMILIES_B])
def test_the_logits_that_chose_an_answer_are_those_of_one_pass_over_it(name: str) -> None:
    """The reference of a search comes from single steps on a cache; pruned schedules are measured in one pass."""
    model, inputs = a_model_of(name)
    backbone = find_backbone(model)
    answers, logits = answers_with_logits(backbone, inputs, 4)
    assert answers == greedy_answers(backbone, inputs, 4)
    longest = max(map(len, answers))
    whole = with_answers(backbone, inputs, answers)
    with torch.no_grad():
        found = model(**whole, use_cache=False, logits_to_keep=longest).logits[:, -longest:].float()
    assert logits.shape == found.shape
    bound = rounding_bound(model, whole)
    for row, answer in enumerate(answers):
        assert (logits[row] - found[row])[: len(answer)].abs().max() < bound
        assert logits[row].argmax(-1)[: len(answer)].tolist() == answer


def test_answers_are_greedy_whatever_the_checkpoint_asks_for() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1, 2), seed=3)
    expected = answers_with_logits(find_backbone(model), inputs, 4)
    model.generation_config.num_beams = 3
    model.generation_config.do_sample = True
    model.generation_config.repetition_penalty = 1.0001
    found = answers_with_logits(find_backbone(model), inputs, 4)
    assert found[0] == expected[0] == greedy_answers(find_backbone(model), inputs, 4)
    assert torch.equal(found[1], expected[1])


def test_in_half_precision_the_reference_is_one_pass() -> None:
    """There, single steps round otherwise than one pass; a schedule that drops nothing must still change nothing."""
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build().bfloat16(), tiny.batch((1, 2), seed=3)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    answer_kl = answer_kl_of(model, [inputs])
    assert answer_kl.forwards == 2 + 2  # the answers and the pass
    assert answer_kl.measure((), POLICY).tolist() == [0, 0]


def test_stored_results_belong_to_the_answers_they_were_measured_on(tmp_path: Path) -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1, 2), seed=3)
    stages = (Stage(layer=0, keep_ratio=0.4), Stage(layer=3, keep_ratio=0.1))
    longer = answer_kl_of(model, [inputs], UnitStore(tmp_path, {})).measure(stages, POLICY)
    ends_of(model, inputs)
    shorter = answer_kl_of(model, [inputs], UnitStore(tmp_path, {})).measure(stages, POLICY)
    assert shorter.tolist() == answer_kl_of(model, [inputs]).measure(stages, POLICY).tolist()
    assert np.abs(shorter - longer).min() > 1e-4


def test_a_part_of_the_samples_is_the_first_of_them() -> None:
    tiny = FAMILIES["llava"]
    answer_kl = answer_kl_of(
        tiny.build(), [tiny.batch((1, 2)), tiny.batch((1,), seed=1), tiny.batch((1,), seed=2)]
    )
    stages = (Stage(layer=1, keep_ratio=0.1),)
    whole = answer_kl.measure(stages, POLICY)
    assert answer_kl.measure(stages, POLICY, 1).tolist() == whole[:2].tolist()
    assert answer_kl.measure(stages, POLICY, 3).tolist() == whole[:3].tolist()
    assert len(answer_kl) == len(whole) == 4


def test_results_are_in_the_order_of_the_samples_however_batches_are_formed() -> None:
    """Batches by length: the first samples are whole batches, in another order."""
    tiny = FAMILIES["llava"]
    model = tiny.build()
    alone = [tiny.batch((1,), seed=seed) for seed in range(4)]
    stages = (Stage(layer=1, keep_ratio=0.1),)
    expected = answer_kl_of(model, alone).measure_with_tokens(stages, POLICY)
    single = dict(answer_kl_of(model, alone).measure_single([1, 3], (0.5, 0.1), POLICY))
    order = [1, 2, 0, 3]
    answer_kl = answer_kl_of(model, [alone[row] for row in order], order=order)
    found = answer_kl.measure_with_tokens(stages, POLICY)
    assert [part.tolist() for part in found] == [part.tolist() for part in expected]
    for count, whole in ((1, 3), (2, 3), (3, 3), (4, 4)):
        assert answer_kl.measure(stages, POLICY, count).tolist() == expected[0][:whole].tolist()
    for layer, values in answer_kl.measure_single([1, 3], (0.5, 0.1), POLICY):
        assert values.tolist() == single[layer].tolist()
    assert len(set(expected[0].tolist())) == 4


def test_the_model_is_as_before_even_after_an_error() -> None:
    tiny = FAMILIES["llava"]
    model, inputs = tiny.build(), tiny.batch((1,))
    answer_kl = answer_kl_of(model, [inputs])
    before: Any = [dict(vars(module)) for module in model.modules()]
    list(answer_kl.measure_single([1, 2], (0.5,), POLICY))
    block = find_backbone(model).layers[4]
    handle = block.register_forward_hook(lambda *_args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(answer_kl.measure_single([1, 2], (0.5,), POLICY))
    handle.remove()
    for module, known in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == known.keys()
    assert answer_kl.measure((), POLICY).max() == pytest.approx(0, abs=ROUNDING)


def everything_of(answer_kl: AnswerKL) -> list[Any]:
    """Every kind of measurement, so that a result that is taken for another one shows."""
    found: list[Any] = []
    for policy in (
        POLICY,
        TokenPolicy("text_guided", "merge"),
        TokenPolicy("random", seed=1),
        TokenPolicy("random"),
    ):
        for stages in ((Stage(layer=1, keep_ratio=0.3),), (Stage(layer=2, keep_ratio=0.3),), ()):
            found += [part.tolist() for part in answer_kl.measure_with_tokens(stages, policy)]
        found += [values.tolist() for _, values in answer_kl.measure_single([-1, 1, 3], (0.5, 0.1), policy)]
    return [*found, answer_kl.measure((Stage(layer=1, keep_ratio=0.1),), POLICY, 2).tolist()]


def test_what_is_stored_is_what_is_measured_and_is_not_measured_again(tmp_path: Path) -> None:
    tiny = FAMILIES["llava"]
    model, batches = tiny.build(), [tiny.batch((1, 2)), tiny.batch((1,), seed=1)]
    expected = everything_of(answer_kl_of(model, batches))
    assert everything_of(answer_kl_of(model, batches, UnitStore(tmp_path, {}))) == expected
    again = answer_kl_of(model, batches, UnitStore(tmp_path, {}))
    reference = again.forwards
    assert everything_of(again) == expected
    assert again.forwards == reference
    # Neither answers of another length nor batches of other samples are taken for these.
    longer = answer_kl_of(model, batches, UnitStore(tmp_path, {}), answer_tokens=5)
    assert everything_of(longer) == everything_of(answer_kl_of(model, batches, answer_tokens=5)) != expected
    other = [tiny.batch((1, 2), seed=5), tiny.batch((1,), seed=6)]
    found = everything_of(answer_kl_of(model, other, UnitStore(tmp_path, {})))
    assert found == everything_of(answer_kl_of(model, other)) != expected
