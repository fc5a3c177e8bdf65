"""Figures show what the run's files hold, leave out what is missing, and are fit for a paper."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from pruning_runtime import Schedule
from pruning_runtime.costs import budget_of, pre_decoder_share, processed_ratios, published_ratios
from pruning_runtime.geometry import DecoderShape
from pruning_runtime.schedule import Stage
from schedule_finder import figures
from schedule_finder.errors import InputError
from schedule_finder.evaluation.methods import BASELINES
from schedule_finder.figures import make_figures, style
from schedule_finder.figures.accuracy import accuracy
from schedule_finder.figures.allocation import attention_allocation
from schedule_finder.figures.attention_map import ranked_attention
from schedule_finder.figures.convergence import convergence
from schedule_finder.figures.methods import GROUPS, METHOD_STYLES
from schedule_finder.figures.overlay import overlay
from schedule_finder.figures.pareto import pareto
from schedule_finder.figures.run_data import RunData, read_evaluation
from schedule_finder.figures.schedule import staircase
from schedule_finder.figures.sensitivity import sensitivity
from schedule_finder.figures.study import LINES, methods_figure, predictions_figure
from schedule_finder.figures.tables import to_latex, to_markdown, write_tables
from schedule_finder.figures.time import accuracy_by_time
from schedule_finder.intervals import band, wilson_interval
from schedule_finder.run.folder import Run
from schedule_finder.signals import layer_shift
from tests.support.finished_run import (
    CHECKS,
    CONFIDENCE,
    EXACT,
    LAYERS,
    NEED,
    PARETO,
    SHIFTS,
    STAGES,
    TOKENS,
    evaluation_table,
    write_example,
    write_profile,
    write_run,
)
from tests.support.planted_tables import UNIT, table_from

NAMES = list(figures.FIGURES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that went through all steps before the figures; not to be changed."""
    run = Run(tmp_path_factory.mktemp("run"))
    write_run(run)
    return run


@pytest.fixture(scope="module")
def drawn(whole):
    """The run and the files of its figures; not to be changed."""
    return whole, make_figures(whole)


@pytest.fixture
def run(whole, tmp_path):
    """The same run without figures, to be changed."""
    shutil.copytree(whole.folder, tmp_path / "run", ignore=shutil.ignore_patterns("6_figures"))
    return Run(tmp_path / "run")


def table(drawn, name):
    return pd.read_csv(drawn[0].figures / f"{name}.csv")


def remove_all_but(run, *names):
    """Fewer figures to draw where one of them is all that a test is about."""
    for path in run.folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def names_that_can_be_drawn(run):
    data = RunData(run)
    return [name for name, draw in figures.FIGURES.items() if draw(data) is not None]


# --- files ---------------------------------------------------------------------------------------


def test_every_figure_is_a_light_pdf_and_png_with_its_table(drawn):
    run, written = drawn
    expected = [f"{name}.{suffix}" for name in NAMES for suffix in ("pdf", "png", "csv")]
    assert [path.name for path in written] == expected
    assert all(path.parent == run.figures and 0 < path.stat().st_size < 200_000 for path in written)


def test_pdfs_are_one_or_two_columns_wide_and_embed_truetype_fonts(drawn):
    for path in drawn[1]:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.width / 300 <= style.DOUBLE + 0.01, path
        if path.suffix == ".pdf":
            content = path.read_bytes()
            assert b"/FontFile2" in content, path
            assert b"/Type3" not in content, path


def test_same_run_gives_same_bytes(drawn, run):
    remove_all_but(run, "4_schedule.json", "5_example.json", "5_example.png")
    again = {path.name: path.read_bytes() for path in make_figures(run)}
    assert len(again) == 6
    first = {path.name: path.read_bytes() for path in drawn[1]}
    assert again["6_overlay.pdf"] == first["6_overlay.pdf"]
    assert again["6_overlay.png"] == first["6_overlay.png"]
    assert b"CreationDate" not in first["6_overlay.pdf"]


def test_matplotlib_is_left_as_it_was(run):
    remove_all_but(run, "4_schedule.json")
    with matplotlib.rc_context({"font.size": 3.25, "pdf.fonttype": 3}):
        before = dict(matplotlib.rcParams)
        make_figures(run)
        assert dict(matplotlib.rcParams) == before


def test_no_global_state_of_pyplot_is_used():
    files = list(Path(figures.__file__).parent.glob("*.py"))
    assert len(files) > 1
    assert not [file for file in files if "pyplot" in file.read_text(encoding="utf-8")]


@pytest.mark.slow
@pytest.mark.parametrize("stages", [3, 9])
def test_a_noisy_photograph_stays_light(run, stages):
    remove_all_but(run)
    noise = np.random.default_rng(0).normal(0, 10, (500, 500, 3))
    ramp = np.linspace(40, 200, 500)[:, None, None] + np.linspace(-30, 30, 500)[None, :, None]
    write_example(run, np.clip(ramp + noise, 0, 255).astype(np.uint8))
    document = json.loads((run.folder / "5_example.json").read_text())
    document["stages"] = [{"layer": layer, "kept": list(range(TOKENS - layer))} for layer in range(stages)]
    (run.folder / "5_example.json").write_text(json.dumps(document))
    sizes = {path.name: path.stat().st_size for path in make_figures(run)}
    assert max(sizes["6_overlay.pdf"], sizes["6_overlay.png"]) < 200_000, sizes


@pytest.mark.slow
def test_legends_lie_inside_the_figure(run):
    with matplotlib.rc_context(style.STYLE):
        data = RunData(run)
        for name, draw in figures.FIGURES.items():
            figure, _ = draw(data)
            FigureCanvasAgg(figure).draw()
            legends = [axes.get_legend() for axes in figure.axes]
            legends += figure.legends
            boxes = [legend.get_window_extent() for legend in legends if legend is not None]
            assert boxes or name.startswith("6_")
            for box in boxes:
                assert box.x0 >= 0, name
                assert box.x1 <= figure.bbox.x1, name
                assert box.y1 <= figure.bbox.y1, name


# --- tables --------------------------------------------------------------------------------------


def test_attention_map_is_even_on_average_and_falls_with_rank(drawn):
    rows = table(drawn, "1_attention_map")
    rows["width"] = rows.last_rank - rows.first_rank + 1
    for _, layer in rows.groupby("layer"):
        assert layer.width.sum() == TOKENS
        assert np.average(layer.attention_over_even, weights=layer.width) == pytest.approx(1, rel=1e-4)
        assert layer.attention_over_even.iloc[0] > 3 * layer.attention_over_even.iloc[-1]


def test_attention_map_of_one_sample_is_its_sorted_map():
    sample = np.array([[0.1, 0.4, 0.0, 0.1], [0.1, 0.1, 0.1, 0.3]])  # totals .2 .5 .1 .4
    ranked = ranked_attention([sample], np.arange(5))
    expected = 4 * np.array([[0.4, 0.1, 0.1, 0.0], [0.1, 0.3, 0.1, 0.1]]) / 0.6
    assert ranked == pytest.approx(expected)


def test_attention_map_of_ragged_samples_and_silent_layers(tmp_path):
    run = Run(tmp_path)
    write_profile(run, [40, 64, 100], num_layers=16, layers=[0, 2, 3, 4, 6, 7, 8, 10, 12, 14])
    assert names_that_can_be_drawn(run) == ["1_attention_map", "2_shift"]
    ranked = ranked_attention([np.ones((3, 5)), np.diag([1.0, 0, 1]) @ np.ones((3, 9))], np.arange(6))
    assert ranked == pytest.approx(np.ones((3, 5)))


def test_shift_table_is_the_signal_and_peaks_at_the_planted_layers(drawn):
    rows = table(drawn, "2_shift").set_index("layer")
    expected = band(layer_shift(drawn[0].profile.read().maps))
    for part in ("mean", "low", "high"):
        column = rows[f"js_bits_from_layer_before_{part}"]
        assert np.isnan(column[0])
        assert column[1:].tolist() == pytest.approx(getattr(expected, part), rel=1e-4)
    assert set(rows.js_bits_from_layer_before_mean.nlargest(2).index) == set(SHIFTS)
    assert rows.vision_mass_mean.tolist() == pytest.approx(np.linspace(0.8, 0.3, LAYERS), rel=1e-4)
    assert rows.vision_entropy_share_mean.tolist() == pytest.approx([2 / 6] * LAYERS)  # 2 of log2(64) bits


@pytest.mark.parametrize(
    ("detector", "field", "value", "reason"),
    [
        ("attention_shift", "layers", [0.5], "layers.0"),
        ("attention_shift", "layers", list(range(LAYERS))[::-1], "layers do not rise"),
        (
            "attention_shift",
            "distance",
            [[0.0] * LAYERS] * (LAYERS - 1) + [[0.0]],
            r"distance\[11\] has 1 entries",
        ),
        ("attention_shift", "own", [0.1], "own has 1 entries"),
        ("token_curve", "histogram", ["many"] * LAYERS, "histogram.0"),
        ("token_curve", "histogram", [1], "1 numbers for 12 layers"),
    ],
)
def test_damaged_evidence_of_a_detector_is_one_error_that_names_it(run, detector, field, value, reason):
    document = json.loads(run.change_points.read_text())
    document["detectors"][detector]["evidence"][field] = value
    run.change_points.write_text(json.dumps(document))
    with pytest.raises(InputError, match=f"3_change_points.json.*{reason}.*detect again"):
        figures.FIGURES["3_change_points"](RunData(run))


def test_change_point_table_counts_every_break_at_the_first_layer_of_its_regime(drawn):
    rows = table(drawn, "3_change_points").set_index("first_layer_of_new_regime")
    detectors = json.loads(drawn[0].change_points.read_text())["detectors"]
    histogram = detectors["token_curve"]["evidence"]["histogram"]
    for index, count in enumerate(histogram[:-1]):
        assert rows.breaks_percent[index + 1] == pytest.approx(100 * count / sum(histogram), rel=1e-4)
    assert rows.straight_ramp_percent.to_dict() == {layer: 100.0 * (layer == 6) for layer in range(1, LAYERS)}
    for name, detection in detectors.items():
        assert rows.index[rows[name] == 1].tolist() == detection["change_points"]
    assert detectors["attention_shift"]["change_points"] == list(SHIFTS)


def test_change_point_table_has_the_distances_of_neighbours_and_their_noise_band(drawn):
    rows = table(drawn, "3_change_points").set_index("first_layer_of_new_regime")
    evidence = json.loads(drawn[0].change_points.read_text())["detectors"]["attention_shift"]["evidence"]
    distance = np.array(evidence["distance"])
    assert rows.distance_from_layer_before.to_numpy() == pytest.approx(np.diag(distance, 1), abs=1e-5)
    assert (rows.without_a_change_low <= rows.without_a_change).all()
    assert (rows.without_a_change <= rows.without_a_change_high).all()
    changed = rows.index.isin(SHIFTS)
    above = rows.distance_from_layer_before > rows.without_a_change_high
    assert above[changed].all()


def test_staircase_is_the_accounting(drawn):
    rows = table(drawn, "4_schedule")
    assert rows.processed_tokens.tolist() == [64] * 3 + [32] * 3 + [8] * 6
    assert rows.published_tokens.tolist() == [64] * 2 + [32] * 3 + [8] * 7
    assert rows.processed_ratio.tolist() == processed_ratios(STAGES, LAYERS)
    assert rows.published_ratio.tolist() == published_ratios(STAGES, LAYERS)


def test_staircase_legend_states_both_means(run):
    figure, _ = staircase(RunData(run))
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [
        "90% band of 20 resamples",
        "Processed, mean 28.0 (43.8%)",
        "Published count, mean 23.3 (36.5%)",
    ]


def test_staircase_charges_pre_decoder_scoring(run):
    stages = (Stage(layer=-1, keep_ratio=0.25), *STAGES[1:])
    schedule = Schedule.load(run.schedule)
    shape = DecoderShape(LAYERS, 64, 4, 2, 16, 128, 1000)
    budget = budget_of(stages, shape, TOKENS, 8, pre_decoder=True)
    schedule.model_copy(update={"stages": stages, "budget": budget}).save(run.schedule)
    figure, rows = staircase(RunData(run))
    assert rows.processed_ratio.tolist() == [0.25] * 6 + [0.125] * 6
    tokens = TOKENS * (0.1875 + pre_decoder_share(shape) / LAYERS)
    _, said, published = (text.get_text() for text in figure.legends[0].get_texts())
    assert said == f"Processed, mean {tokens:.1f} ({tokens / TOKENS:.1%}), pre-decoder scoring included"
    assert published.startswith(f"Published count, mean {rows.published_tokens.mean():.1f}")
    # From all tokens down at the left edge; their number, and what is left.
    fall = figure.axes[0].get_lines()[0].get_xydata()
    assert fall.tolist() == [[-0.5, TOKENS], [-0.5, TOKENS / 4]]
    numbers = [text.get_text() for text in figure.axes[0].texts]
    assert numbers == [str(TOKENS), str(TOKENS // 4), str(TOKENS // 8)]


def test_staircase_without_a_profile_takes_tokens_from_the_evidence_or_percent(run):
    shutil.rmtree(run.profile.folder)
    _, rows = staircase(RunData(run))
    assert not [name for name in rows if name.endswith("_tokens")]
    evidence = {"typical_prompt": {"vision_tokens": 100.0}}
    Schedule.load(run.schedule).model_copy(update={"evidence": evidence}).save(run.schedule)
    _, rows = staircase(RunData(run))
    assert rows.processed_tokens.max() == 100


def test_sensitivity_table_is_what_was_measured_and_what_layers_lose(drawn):
    rows = table(drawn, "4_sensitivity")
    tenth = rows[rows.keep_ratio == 0.1].set_index("layer")
    behind = [NEED[layer + 1 :].sum() for layer in range(LAYERS - 1)]
    changes = [UNIT * 0.9 * need for need in behind]
    assert tenth.change_mean.tolist() == pytest.approx(changes, rel=1e-4)
    assert tenth.kl_mean.tolist() == pytest.approx([-math.log1p(-change) for change in changes], rel=1e-4)
    losses = rows.groupby("layer")[["loss", "loss_low", "loss_high"]].first()
    assert losses.index.tolist() == list(range(LAYERS))
    assert losses.loc[0].isna().all()  # nothing was dropped before it
    for name in losses:  # the planted samples are all alike
        assert losses[name].tolist()[1:] == pytest.approx(UNIT * 0.9 * NEED[1:], abs=1e-6)


def test_a_stage_before_the_decoder_stands_on_the_left_edge(run):
    table_from(NEED, earliest=-1).save(run.sensitivity)
    figure, rows = sensitivity(RunData(run))
    above, below = figure.axes
    (curve,) = (line for line in above.get_lines() if line.get_label() == "10% kept")
    assert curve.get_xdata()[0] == above.get_xlim()[0] == -0.5
    assert not curve.get_clip_on()  # or half of its marker is gone
    assert rows.groupby("layer").loss.first()[0] == pytest.approx(UNIT * 0.9 * NEED[0])
    assert len([bar for bar in below.patches if bar.get_height() > 0]) == LAYERS - 1


def test_single_stages_stand_on_the_edge_behind_their_layer_and_tiny_losses_on_the_floor(run):
    figure, rows = sensitivity(RunData(run))
    above, below = figure.axes
    curves = {line.get_label(): line.get_xydata() for line in above.get_lines()}
    assert curves["10% kept"][:, 0].tolist() == [layer + 0.5 for layer in range(LAYERS - 1)]
    table_from(NEED * 1e-9).save(run.sensitivity)
    figure, rows = sensitivity(RunData(run))
    curves = {line.get_label(): line.get_xydata() for line in figure.axes[0].get_lines()}
    assert set(curves["0% kept"][:, 1]) == {style.KL_FLOOR}
    assert 0 < rows.kl_mean.max() < style.KL_FLOOR
    low, high = figure.axes[0].get_ylim()
    assert low < style.KL_FLOOR < high
    assert len([bar for bar in below.patches if bar.get_height() > 0]) == LAYERS - 2


def test_sensitivity_without_a_profile_takes_the_layers_from_the_schedule(run):
    remove_all_but(run, "4_sensitivity.parquet", "4_schedule.json")
    assert "4_sensitivity" in names_that_can_be_drawn(run)
    remove_all_but(run, "4_sensitivity.parquet")
    assert names_that_can_be_drawn(run) == []


def test_staircase_shows_the_band_and_how_many_resamples_agree(run):
    figure, rows = staircase(RunData(run))
    assert rows.ratio_low.tolist() == CONFIDENCE["ratio_low"]
    assert rows.ratio_high.tolist() == CONFIDENCE["ratio_high"]
    band_drawn = figure.axes[0].patches[0].get_data()
    assert band_drawn.values.tolist() == pytest.approx([TOKENS * high for high in CONFIDENCE["ratio_high"]])
    assert band_drawn.baseline.tolist() == pytest.approx([TOKENS * low for low in CONFIDENCE["ratio_low"]])
    said = figure.legends[0].get_title().get_text()
    assert said == "13 of 20 resamples choose the schedule's layers\nMeasured on 8 samples"
    change_evidence(run, layers={"3": 11, "2,6": 9})
    figure, _ = staircase(RunData(run))
    assert "0 of 20 resamples choose" in figure.legends[0].get_title().get_text()
    assert "11 choose layer 3" in figure.legends[0].get_title().get_text()


def test_bands_of_another_depth_are_an_input_error(run):
    change_evidence(run, ratio_low=[1.0] * 5)
    with pytest.raises(InputError, match="ratio_low has 5 entries for 12 layers"):
        staircase(RunData(run))


def change_evidence(run, **changes):
    evidence = {"solver": {"measured_samples": 8, "confidence": CONFIDENCE | changes}}
    Schedule.load(run.schedule).model_copy(update={"evidence": evidence}).save(run.schedule)


def test_pareto_table_holds_divergences_and_the_evaluated_schedules(drawn):
    rows = table(drawn, "4_pareto")
    predicted = rows[rows.series == "predicted_change"]
    assert predicted.processed.tolist() == [0.21, 0.35, 0.5]
    assert predicted.value.tolist() == [0.5, 0.02, 1e-6]
    assert predicted.num_stages.tolist() == [3, 2, 1]
    assert rows[rows.series == "measured_change"].value.tolist() == [0.7, 2e-6]
    evaluated = rows[rows.series == "exact_match"]
    source = evaluation_table().query("question_type == 'all' and method == 'schedule'")
    assert evaluated.processed.tolist() == [0.2, 0.35, 0.5]
    assert evaluated.value.tolist() == source.sort_values("processed").exact_match.tolist()


def test_pareto_points_bear_their_number_of_stages(run):
    figure, _ = pareto(RunData(run))
    above, _ = figure.axes
    labels = {round(text.xy[0]): text.get_text() for text in above.texts if hasattr(text, "xy")}
    assert labels == {21: "3", 35: "2", 50: "1"}
    run.evaluation.unlink()
    figure, _ = pareto(RunData(run))
    assert len(figure.axes) == 1


def test_a_front_without_divergences_is_no_figure(run):
    PARETO.assign(predicted_change=np.nan, measured_change=np.nan).to_csv(run.pareto, index=False)
    assert "4_pareto" not in names_that_can_be_drawn(run)


def test_every_method_has_a_style_of_its_own():
    looks = [(colour, marker) for colour, marker, _ in METHOD_STYLES.values()]
    assert len(set(looks)) == len(looks)
    for group in GROUPS.values():
        assert len({colour for colour, _, _ in group.values()}) == len(group)
    names = {name.replace("-", " ") for name in BASELINES} - {"not merged"}  # open markers of the same colour
    assert {"schedule", *names} == set(METHOD_STYLES)


def test_a_method_without_merging_has_the_open_marker_of_the_same_method(run):
    rows = evaluation_table()
    random = rows[rows.method == "random"]
    more = [random.assign(method=name) for name in ("not merged", "random, not merged")]
    pd.concat([rows, *more]).to_csv(run.evaluation, index=False)
    figure, _ = accuracy(RunData(run))
    drawn = {container.get_label(): container.lines[0] for container in figure.axes[0].containers}
    for name in ("Random tokens", "Schedule (uniform text)"):
        merged, discarded = drawn[name], drawn[f"{name}, not merged"]
        assert merged.get_color() == discarded.get_color() == discarded.get_markeredgecolor()
        assert merged.get_marker() == discarded.get_marker()
        assert (merged.get_markerfacecolor(), discarded.get_markerfacecolor()) == (
            merged.get_color(),
            "white",
        )


@pytest.mark.parametrize("draw", [accuracy, accuracy_by_time])
def test_many_methods_have_a_panel_for_each_group_with_the_schedule_in_it(run, draw):
    rows = evaluation_table().assign(prefill_ms=0.5)
    random = rows[rows.method == "random"]
    names = [name for name in METHOD_STYLES if name not in set(rows.method)]
    more = [random.assign(method=name) for name in (*names, "divprune, not merged", "of a plug-in")]
    pd.concat([rows, *more]).to_csv(run.evaluation, index=False)
    figure, _ = draw(RunData(run))
    panels = {axes.get_legend().get_title().get_text(): axes for axes in figure.axes if axes.get_legend()}
    assert list(panels) == [*GROUPS, "Others"]
    legends = {
        title: [text.get_text() for text in axes.get_legend().get_texts()] for title, axes in panels.items()
    }
    assert all(names[:2] == ["Full model", "Schedule (uniform text)"] for names in legends.values())
    assert sum(len(names) - 2 for names in legends.values()) == len(
        METHOD_STYLES
    )  # a plug-in, without the schedule
    drawn = [box.get_label() for box in panels["Hidden states"].containers]
    assert {"DivPrune", "DivPrune, not merged"} <= set(drawn)
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == ["Dropped tokens merged", "Dropped tokens discarded"]


def test_accuracy_at_one_budget_has_both_variants_of_a_method_in_its_row(run):
    rows = evaluation_table()
    rows = rows[(rows.budget == 0.2) | (rows.method == "full")]
    other = rows[rows.method == "random"].assign(method="random, not merged")
    pd.concat([rows, other]).to_csv(run.evaluation, index=False)
    figure, _ = accuracy(RunData(run))
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    at = {box.get_label(): box.lines[0].get_ydata()[0] for box in axes.containers}
    row = labels.index("Random tokens")
    assert labels.count("Random tokens") == 1
    assert at["Random tokens"] == pytest.approx(row - 0.18)
    assert at["Random tokens, not merged"] == pytest.approx(row + 0.18)


def test_draws_of_random_layers_have_one_style_and_appear_once_in_the_legend(run):
    rows = evaluation_table()
    random = rows[rows.method == "random"]
    more = (
        *(f"random layers {draw}" for draw in range(3)),
        "paper",
        "not merged",
    )
    draws = [random.assign(method=name) for name in more]
    pd.concat([rows, *draws]).to_csv(run.evaluation, index=False)
    with matplotlib.rc_context(style.STYLE):
        figure, table = accuracy(RunData(run))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels.count("Random layers") == 1
    FigureCanvasAgg(figure).draw()
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
    drawn = [box for box in figure.axes[0].containers if box.get_label() == "Random layers"]
    assert len(drawn) == 3
    assert len({box.lines[0].get_color() for box in drawn}) == 1
    assert {"random layers 0", "random layers 2"} <= set(table.method)


def test_attention_allocation_is_the_mean_over_samples_stacked_to_one(drawn):
    rows = table(drawn, "5_allocation")
    assert len(rows) == 2 * 4 * LAYERS
    assert rows.groupby(["queries", "layer"]).share.sum().tolist() == pytest.approx([1.0] * 2 * LAYERS)
    answer = rows[(rows.queries == "answer") & (rows["keys"] == "vision")]
    assert answer.share.tolist() == pytest.approx([0.4] * LAYERS)
    assert answer.low.tolist() == pytest.approx([0.3] * LAYERS)
    figure, _ = attention_allocation(RunData(drawn[0]))
    _, below = figure.axes
    tops = [bar.get_y() + bar.get_height() for bar in below.patches[-LAYERS:]]
    assert tops == pytest.approx([100] * LAYERS)
    assert "mean of 2 samples" in figure.legends[0].get_title().get_text()


def test_sensitivity_has_intervals_around_its_curves(run):
    figure, rows = sensitivity(RunData(run))
    first = rows.dropna(subset="change_mean")
    spread = np.stack([first.change_low, first.change_mean, first.change_high])
    assert (np.diff(spread, axis=0) >= -1e-12).all()
    assert len(figure.axes[0].collections) == len(rows.keep_ratio.dropna().unique())


def test_accuracy_table_is_the_evaluation_over_all_types(drawn):
    rows = table(drawn, "5_accuracy")
    source = evaluation_table().query("question_type == 'all'")
    assert rows.method.tolist() == source.method.tolist()
    columns = {"processed": "processed", "value": "exact_match", "ci_low": "ci_low", "ci_high": "ci_high"}
    for mine, theirs in columns.items():
        assert rows[mine].tolist() == pytest.approx(source[theirs].tolist(), rel=1e-4)
    assert set(rows.measure) == {"exact_match"}


def test_accuracy_points_stand_where_the_evaluation_says(run):
    figure, _ = accuracy(RunData(run))
    drawn = {
        container.get_label(): container.lines[0].get_xydata() for container in figure.axes[0].containers
    }
    source = evaluation_table().query("question_type == 'all'").sort_values("processed")
    for label, name in (("Schedule (uniform text)", "schedule"), ("Random tokens", "random")):
        # The line goes from budget to budget, whatever the order of rows.
        expected = source[source.method == name]
        assert drawn[label][:, 0] == pytest.approx(100 * expected.processed)
        assert drawn[label][:, 1] == pytest.approx(100 * expected.exact_match)


def test_accuracy_of_samples_without_answers_is_agreement(run):
    rows = evaluation_table()
    rows[["exact_match", "ci_low", "ci_high"]] = np.nan
    rows.to_csv(run.evaluation, index=False)
    figure, found = accuracy(RunData(run))
    assert set(found.measure) == {"agreement"}
    assert set(found.value) == {0.5}
    assert (found.ci_low.iloc[0], found.ci_high.iloc[0]) == wilson_interval(100, 200)
    assert "Agreement" in figure.axes[0].get_ylabel()


def test_accuracy_at_one_budget_is_a_row_per_method(run):
    rows = evaluation_table()
    rows = rows[(rows.budget == 0.2) | (rows.method == "full")]
    draws = [rows[rows.method == "random"].assign(method=f"random layers {draw}") for draw in range(2)]
    pd.concat([rows, *draws]).to_csv(run.evaluation, index=False)
    figure, table = accuracy(RunData(run))
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels[0] == "Schedule (uniform text)"
    assert len(labels) == len(EXACT)  # the full model is a line, both draws share a row
    own = table[table.method == "schedule"].iloc[0]
    drawn = next(box for box in axes.containers if box.get_label() == labels[0])
    assert drawn.lines[0].get_xydata().tolist() == [[pytest.approx(100 * own.value), 0]]


def test_overlay_table_holds_every_token_and_what_each_stage_kept(drawn):
    rows = table(drawn, "6_overlay")
    assert rows.token[rows.kept_after_layer_2 == 1].tolist() == list(range(0, 64, 2))
    assert rows.token[rows.kept_after_layer_5 == 1].tolist() == [0, 8, 18]
    assert rows.token[rows.needed == 1].tolist() == [18, 19]
    assert (rows.row[18], rows.column[18]) == (2, 2)


def test_overlay_fades_dropped_tokens_only(run):
    figure, _ = overlay(RunData(run))
    whole, _, last = (axes.images[0].get_array() for axes in figure.axes)
    assert (whole == 180).all()
    assert (last[2 * 12 : 3 * 12, 2 * 12 : 3 * 12] == 180).all()  # token 18: row 2, column 2
    assert (last[1 * 12 : 2 * 12, 0 * 12 : 1 * 12] == 180).all()  # token 8: row 1, column 0
    assert (last == 180).all(axis=2).sum() == 3 * 12 * 12
    assert last[3 * 12 :, :].min() > 240


# --- what is missing or wrong --------------------------------------------------------------------


def test_caption_of_a_narrow_overlay_lies_inside_the_figure(run):
    path = run.folder / "5_example.json"
    document = json.loads(path.read_text())
    document["question"] = "what costs $5 and $6 " * 9
    del document["stages"][1]
    path.write_text(json.dumps(document))
    with matplotlib.rc_context(style.STYLE):
        figure, _ = overlay(RunData(run))
        FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in figure.texts]
    assert len(boxes) == 3
    assert figure.texts[2].get_text().count("\n") > 2
    assert not figure.texts[2].get_parse_math()  # between dollar signs stands no mathematics
    assert "costs $5 and $6 what" in figure.texts[2].get_text().replace("\n", " ")
    for box in boxes:
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert box.y0 >= 0
    assert boxes[2].y1 <= boxes[0].y0


@pytest.mark.parametrize(
    ("missing", "skipped"),
    [
        ("2_profile", {"1_attention_map", "2_shift"}),
        ("3_change_points.json", {"3_change_points"}),
        ("4_sensitivity.parquet", {"4_sensitivity"}),
        ("4_schedule.json", {"4_schedule", "6_gallery", "6_heatmaps"}),
        ("4_pareto.csv", {"4_pareto"}),
        ("5_evaluation.csv", {"5_accuracy", "5_time", "5_retention"}),
        ("7_viewer.json", {"6_gallery", "6_heatmaps"}),
        ("5_allocation.csv", {"5_allocation"}),
        ("5_example.json", {"6_overlay"}),
        ("5_example.png", {"6_overlay"}),
    ],
)
def test_missing_data_skips_only_its_figures(run, missing, skipped):
    path = run.folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert names_that_can_be_drawn(run) == [name for name in NAMES if name not in skipped]


def test_profile_that_has_only_begun_is_no_data(tmp_path):
    run = Run(tmp_path)
    run.profile.open({"backbone": {"num_layers": 4}, "layers": [0, 1, 2, 3]})
    assert make_figures(run) == []
    assert not run.figures.exists()


def test_detector_that_had_too_few_layers_skips_its_figure(run):
    document = json.loads(run.change_points.read_text())
    for found in document["detectors"].values():
        found["evidence"] = {"num_layers": 3, "reason": "too few"}
    run.change_points.write_text(json.dumps(document))
    assert "3_change_points" not in names_that_can_be_drawn(run)


MALFORMED = {
    "column": (lambda rows: rows.drop(columns="ci_low"), "no ci_low in it"),
    "text": (lambda rows: rows.assign(processed="half"), "column 'processed' must hold numbers"),
    "percent": (lambda rows: rows.assign(exact_match=97.5), "exact_match of 'full' is 97.5"),
    "full": (lambda rows: rows[rows.method != "full"], "no row with method 'full'"),
    "hole": (lambda rows: rows.assign(processed=np.nan), "must be given in every row"),
}


@pytest.mark.parametrize("problem", MALFORMED)
def test_malformed_evaluation_is_an_input_error(run, problem):
    change, message = MALFORMED[problem]
    change(evaluation_table()).to_csv(run.evaluation, index=False)
    with pytest.raises(InputError, match=message) as raised:
        names_that_can_be_drawn(run)
    assert str(run.evaluation) in str(raised.value)
    assert "evaluate again" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b'a,b\n1,2,3\n"', b"\xff\xfe\x00"])
def test_evaluation_that_is_no_table_is_an_input_error(run, content):
    run.evaluation.write_bytes(content)
    with pytest.raises(InputError, match="not a readable table"):
        read_evaluation(run.evaluation)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("3_change_points.json", "{", "not readable"),
        ("3_change_points.json", "[]", "no JSON object"),
        ("3_change_points.json", '{"default": "x", "detectors": {}}', "no detector 'x'"),
        ("4_pareto.csv", "budget,stages\n0.1,0:0.1", "no processed, predicted_change, measured_change in it"),
        ("4_sensitivity.parquet", "", "measure again"),
        ("5_example.json", '{"question": ""}', "answer: Field required"),
        ("5_example.png", "not an image", "not a readable image"),
    ],
)
def test_files_that_cannot_be_used_are_input_errors(run, name, content, message):
    (run.folder / name).write_text(content)
    with pytest.raises(InputError, match=message) as raised:
        names_that_can_be_drawn(run)
    assert name in str(raised.value)


def test_token_outside_the_grid_is_an_input_error(run):
    path = run.folder / "5_example.json"
    document = json.loads(path.read_text())
    document["stages"][0]["kept"].append(64)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="token 64 is outside the grid of 8 x 8"):
        names_that_can_be_drawn(run)


def test_the_study_draws_every_backbone_and_method() -> None:
    budgets = (0.1, 0.25, 0.5)
    rows = [
        {
            "backbone": name,
            "method": method,
            "budget": budget,
            "right": 0.5 + budget,
            "ci_low": 0.5,
            "ci_high": 1.0,
        }
        for name in ("demo", "deep")
        for method in LINES
        for budget in budgets
    ]
    rows += [
        {"backbone": name, "method": "full", "budget": 1.0, "right": 0.9, "ci_low": 0.9, "ci_high": 0.9}
        for name in ("demo", "deep")
    ]
    figure = methods_figure(pd.DataFrame(rows))
    assert [panel.get_title() for panel in figure.axes] == ["demo", "deep"]
    for panel in figure.axes:
        drawn = [line.get_ydata() for line in panel.get_lines()]
        assert sum(list(values) == [60.0, 75.0, 100.0] for values in drawn) == len(LINES)
        assert panel.get_xticks().tolist() == [10, 25, 50]


def test_the_study_says_how_well_predictions_rank() -> None:
    table = pd.DataFrame(
        {"backbone": "demo", "predicted_change": [0.0, 0.1, 1.0, 2.0], "right": [0.99, 0.98, 0.4, 0.6]}
    )
    (panel,) = predictions_figure(table).axes
    assert panel.get_title() == "demo, rank correlation -0.80"


def test_the_schedule_against_the_number_of_samples(tmp_path: Path) -> None:
    run = Run.begin(tmp_path, "test", {})
    run.convergence.write_text(CHECKS)
    figure, table = convergence(RunData(run))
    above, below = figure.axes
    stages, points = above.collections
    assert stages.get_offsets().tolist() == [[128, 2.5], [256, 2.5], [256, 6.5], [512, 3.5]]
    assert points.get_offsets().tolist() == [[256, 3.5], [256, 8.5], [512, 3.5]]
    assert below.get_lines()[0].get_ydata().tolist() == pytest.approx([5, 3, 1.5])
    assert below.get_lines()[1].get_ydata() == [2, 2]  # percent: the tolerance
    assert len(table) == 10


def test_the_gallery_and_the_heatmaps_show_the_viewers_samples(drawn):
    shown = table(drawn, "6_gallery")
    assert shown.kept.tolist() == [3] * 8
    heat = table(drawn, "6_heatmaps")
    most = heat.loc[heat.groupby("layer").attention_over_mean.idxmax()]
    assert most.token.tolist() == list(range(9, 9 + LAYERS))
    assert most.attention_over_mean.iloc[0] == pytest.approx(1 / 0.1140625, abs=0.02)


def test_time_is_relative_to_the_full_model(drawn, run):
    assert set(table(drawn, "5_time").time_share) == {1.0}
    evaluated = pd.read_csv(run.evaluation)
    evaluated.loc[evaluated.method != "full", "prefill_ms"] = 0.1
    evaluated.to_csv(run.evaluation, index=False)
    make_figures(run, ["5_time"])
    again = pd.read_csv(run.figures / "5_time.csv").set_index("method")
    assert again.time_share["full"] == 1.0
    assert set(again.time_share.drop("full")) == {0.2}
    evaluated.drop(columns="prefill_ms").to_csv(run.evaluation, index=False)
    assert "5_time" not in names_that_can_be_drawn(run)


def test_style_and_column_width(run):
    wide, paper = make_figures(run, ["1_attention_map"]), None
    with Image.open(wide[1]) as image:
        before = image.size
    paper = make_figures(run, ["1_attention_map"], style="paper", column=2 * style.SINGLE)
    with Image.open(paper[1]) as image:
        assert image.size == pytest.approx([2 * side for side in before], abs=2)
    assert b"STIX" in paper[0].read_bytes()


def test_tables_are_written_as_markdown_and_latex(run):
    make_figures(run, ["5_accuracy", "4_pareto"])
    names = {path.name for path in write_tables(run)}
    assert names == {
        f"{name}.{end}" for name in ("5_accuracy", "4_pareto", "5_evaluation") for end in ("md", "tex")
    }
    some = pd.DataFrame({"a_b": ["x|y & 50%", "z"], "n": [0.123456, np.nan]})
    assert to_markdown(some) == "| a_b | n |\n| --- | --- |\n| x\\|y & 50% | 0.1235 |\n| z |  |\n"
    latex = to_latex(some)
    assert "\\begin{tabular}{lr}" in latex
    assert "x|y \\& 50\\% & 0.1235" in latex.replace("\\textbar ", "|")


def test_retention_compares_the_schedule_with_the_full_model_by_question_type(run):
    evaluated = pd.read_csv(run.evaluation)
    evaluated["score"] = np.where(evaluated.method == "full", 0.8, 0.6)
    evaluated.loc[(evaluated.method == "schedule") & (evaluated.question_type == "count"), "score"] = 0.2
    evaluated.to_csv(run.evaluation, index=False)
    make_figures(run, ["5_retention"])
    shown = pd.read_csv(run.figures / "5_retention.csv").set_index("question_type")
    assert shown.retained.to_dict() == pytest.approx({"where": 0.75, "count": 0.25})
    evaluated[evaluated.question_type != "count"].to_csv(run.evaluation, index=False)
    assert "5_retention" not in names_that_can_be_drawn(run)
