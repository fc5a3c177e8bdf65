"""Metrics against cases that were worked out by hand, and what holds for every metric."""

from __future__ import annotations

import string
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedule_finder.evaluation.metrics import METRICS
from schedule_finder.evaluation.metrics.anls import edit_distance, similarity
from schedule_finder.evaluation.metrics.multiple_choice import option_letter
from schedule_finder.evaluation.metrics.rouge_l import common_length
from schedule_finder.evaluation.metrics.vqa_accuracy import normalized
from schedule_finder.evaluation.metrics.yes_no import says_yes

TEXTS = st.text(string.ascii_letters + string.digits + " .,'%()-", max_size=12)
TEN = ["red"] * 2 + ["dark red"] * 5 + ["maroon"] * 3


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        # Two equal: leaving out one of the 2 leaves 1, leaving out one of the 8 leaves 2: (2 * 1/3 + 8 * 2/3) / 10.
        ("red", 0.6),
        ("Dark Red.", 1.0),  # five equal: four or five are left, both are enough
        ("the maroon", (3 * 2 / 3 + 7 * 1) / 10),
        ("blue", 0.0),
        ("", 0.0),
    ],
)
def test_vqa_accuracy_of_ten_references(answer: str, score: float) -> None:
    assert METRICS["vqa_accuracy"].score(answer, TEN) == pytest.approx(score)


@given(st.lists(st.sampled_from("abcd"), min_size=4, max_size=12), st.sampled_from("abcde"))
def test_vqa_accuracy_is_the_mean_over_all_ways_to_leave_one_out(references: list[str], answer: str) -> None:
    references, answer = [one * 2 for one in references], answer * 2  # "a" alone is an article
    left = [references[:index] + references[index + 1 :] for index in range(len(references))]
    expected = sum(min(1, others.count(answer) / 3) for others in left) / len(left)
    assert METRICS["vqa_accuracy"].score(answer, references) == pytest.approx(expected)


@pytest.mark.parametrize("references", [["red"], ["red", "blue"], ["blue", "green", "red"]])
def test_few_references_are_alternatives(references: list[str]) -> None:
    assert METRICS["vqa_accuracy"].score("Red", references) == 1
    assert METRICS["vqa_accuracy"].score("white", references) == 0


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("Two  dogs", "2 dogs"),
        ("None", "0"),
        ("The man's hat!", "man's hat"),
        ("dont know", "don't know"),
        ("1,000 men", "1000 men"),
        ("red/white", "red white"),  # a mark between words separates them
        ("red, white", "red white"),  # at a space it leaves
        ("3.5 m.", "3.5 m"),
        ("a\nb", "b"),
    ],
)
def test_vqa_normalization(text: str, result: str) -> None:
    assert normalized(text) == result


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        (" B. ", "B"),
        ("(C) a dog", "C"),
        ("C) a dog", "C"),
        ("d: cat", "D"),
        ("The answer is D", "D"),
        ("Answer: (A)", "A"),
        ("Option E", "E"),
        ("I think it is (B), the dog", "B"),
        ("It must be D because it is blue", "D"),
        ("A dog on a bench", None),  # an article
        ("the answer is a dog", None),
        ("either (B) or (C)", None),
        ("", None),
        ("dog", None),
        ("7", None),
    ],
)
def test_option_letters(text: str, letter: str | None) -> None:
    assert option_letter(text) == letter


def test_multiple_choice_compares_letters_and_other_references_as_text() -> None:
    metric = METRICS["multiple_choice"]
    assert metric.score("(B) dog", ["B"]) == 1
    assert metric.score("C", ["(B)"]) == 0
    assert metric.score("A dog", ["A"]) == 0
    assert metric.score("the 12", ["12"]) == 1
    assert metric.score("12", ["12.", "13"]) == 1


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("yes, there is no doubt", False),  # as the benchmark reads it
        ("No, there isn't", False),
        ("There is not a dog", False),
        ("NO.", False),
        ("Yes. It is not red", True),  # the first sentence decides
        ("nothing", True),
        ("", True),
    ],
)
def test_yes_and_no(text: str, yes: bool) -> None:
    assert says_yes(text) is yes


def test_f1_of_yes() -> None:
    # Answers y y y n n n y, references y y n y n n n: 2 right of 4 said and 3 true.
    answers, references = ["yes", "Yes.", "yes", "no", "no", "No", "yes"], list("yynynnn")
    metric, lists = METRICS["yes_no"], [["yes" if one == "y" else "no"] for one in references]
    found = metric.details(answers, lists)
    assert found["precision"] == pytest.approx(2 / 4)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(4 / 7)
    assert found["yes_share"] == pytest.approx(4 / 7)
    scores = [metric.score(answer, known) for answer, known in zip(answers, lists, strict=True)]
    assert scores == [1, 1, 0, 0, 1, 1, 0]


def test_f1_without_any_yes_is_zero() -> None:
    found = METRICS["yes_no"].details(["no", "no"], [["yes"], ["no"]])
    assert found == {"precision": 0, "recall": 0, "f1": 0, "yes_share": 0}
    assert METRICS["yes_no"].details([], [])["f1"] == 0


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("Hello", ["hello"], 1.0),
        ("hallo", ["hello"], 0.8),
        ("hello  world", ["Hello World"], 1.0),
        ("abcd", ["abxy"], 0.0),  # half of it: exactly the threshold
        ("abcde", ["abcxy"], 0.6),
        ("cat", ["dog", "cart"], 0.75),
        ("", ["a"], 0.0),
        ("", [""], 1.0),
    ],
)
def test_anls(answer: str, references: list[str], score: float) -> None:
    assert METRICS["anls"].score(answer, references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0)],
)
def test_edit_distance(one: str, other: str, distance: int) -> None:
    assert edit_distance(one, other) == edit_distance(other, one) == distance


@given(TEXTS, TEXTS, TEXTS)
def test_edit_distance_is_a_distance(one: str, other: str, third: str) -> None:
    between = edit_distance(one, other)
    assert abs(len(one) - len(other)) <= between <= max(len(one), len(other))
    assert (between == 0) == (one == other)
    assert between <= edit_distance(one, third) + edit_distance(third, other)
    assert 0 <= similarity(one, other) <= 1


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("105", ["100"], 1),  # exactly 5 %
        ("95", ["100"], 1),
        ("105.1", ["100"], 0),
        ("-95", ["-100"], 1),
        ("100", ["-100"], 0),
        ("12%", ["0.12"], 1),
        ("12", ["12%"], 0),
        ("0", ["0"], 1),
        ("0.0", ["0"], 0),  # 5 % of nothing is nothing
        ("Blue", ["blue"], 1),
        ("dark blue", ["blue"], 0),
        ("nan", ["nan"], 1),
        ("inf", ["100"], 0),
        ("4", ["7", "4"], 1),
    ],
)
def test_relaxed_accuracy(answer: str, references: list[str], score: float) -> None:
    assert METRICS["relaxed_accuracy"].score(answer, references) == score


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("It says STOP here", ["stop"], 1),
        ("new\nyork", ["New York"], 1),
        ("stop", ["stop sign"], 0),
        ("stop", ["go", "st"], 1),
        ("stop", [""], 0),
    ],
)
def test_contains(answer: str, references: list[str], score: float) -> None:
    assert METRICS["contains"].score(answer, references) == score


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("A red star.", ["a red star"], 1.0),
        ("star", ["a red star"], 2.44 * (1 / 3) / (1 / 3 + 1.44)),  # precision 1, recall 1/3
        ("star red", ["red star"], 0.5),  # in the other order only one word is in common: both are 1/2
        # Precision is best for one reference (1), recall for the other (1/2): 2.44 * 1/2 / (1/2 + 1.44).
        ("red star", ["a red star in the corner", "blue star"], 2.44 * 0.5 / (0.5 + 1.44)),
        ("blue ring", ["red star"], 0.0),
        ("", ["red star"], 0.0),
        (" . ", ["?"], 1.0),
        ("red star", ["?", "red star"], 1.0),
    ],
)
def test_rouge_l(answer: str, references: list[str], score: float) -> None:
    assert METRICS["rouge_l"].score(answer, references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("one", "other", "length"),
    [("", "abc", 0), ("abcbdab", "bdcaba", 4), ("abc", "abc", 3), ("abc", "cba", 1)],
)
def test_common_length(one: str, other: str, length: int) -> None:
    assert common_length(one, other) == common_length(other, one) == length


@pytest.mark.parametrize("name", METRICS)
@given(answer=TEXTS, references=st.lists(TEXTS, min_size=1, max_size=3))
def test_scores_are_shares_and_a_reference_answers_itself(
    name: str, answer: str, references: list[str]
) -> None:
    metric = METRICS[name]
    assert 0 <= metric.score(answer, references) <= 1
    # A lone article and an answer that names two options are what these metrics cannot judge.
    if name != "contains" or references[0].strip():
        assert metric.score(references[0], references) == 1 or name == "multiple_choice"
    assert set(metric.details([answer], [references])) in (
        set(),
        {"precision", "recall", "f1", "yes_share"},
    )


@pytest.mark.parametrize("name", [name for name in METRICS if name not in ("yes_no", "vqa_accuracy")])
@given(answer=TEXTS, references=st.lists(TEXTS, min_size=2, max_size=4))
def test_another_reference_never_lowers_a_score(name: str, answer: str, references: list[str]) -> None:
    metric = METRICS[name]
    assert metric.score(answer, references) >= metric.score(answer, references[:-1])
    assert metric.score(answer, references) == metric.score(answer, references[::-1])


def test_every_metric_says_where_it_is_from() -> None:
    for name, metric in METRICS.items():
        assert metric.name == name
        assert "arXiv" in metric.source
        assert type(metric).__module__.rpartition(".")[2] == name


def test_metrics_are_light() -> None:
    code = (
        "import sys, schedule_finder.evaluation.metrics; "
        "print([name for name in ('torch', 'pandas', 'numpy', 'datasets') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
