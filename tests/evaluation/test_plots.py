# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The pictures: which rows they draw, and with which numbers."""

from contextlib import contextmanager

import pytest

from phase15.evaluation import plots


@pytest.fixture
def drawn(monkeypatch):
    """The axes of each picture, kept open."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    axes = []

    @contextmanager
    def picture(path):
        axes.append(pyplot.figure().add_subplot())
        yield axes[-1]

    monkeypatch.setattr(plots, "picture", picture)
    yield axes
    pyplot.close("all")


def lines(axes) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


def test_losses_are_drawn_without_the_two_far_controls(drawn):
    names = ["model", "first_soft_prompt", "shuffled_soft_prompt", "shuffled_delta", "baseline_a$b"]
    plots.plot_losses({name: {"loss": 1.5, "loss_by_chunk": [1.0, 2.0]} for name in names}, "x.png")
    expected = ["the model (1.500)", "shuffled Δ (1.500)", r"baseline: a\$b (1.500)"]
    assert lines(drawn[0]) == dict.fromkeys(expected, [1.0, 2.0])


@pytest.mark.parametrize("has_completed", [True, False])
def test_recall_is_drawn_in_percent(has_completed, drawn):
    row = {"right": 0.5} | ({"completed": 0.75} if has_completed else {})
    distances = [{"distance": number, "rows": {"model": row, "shuffled_delta": row}} for number in (0, 512)]
    plots.plot_recall(distances, "x.png")
    right, *completed = drawn[0].get_lines()
    assert right.get_label() == "the model" and list(right.get_ydata()) == [50, 50]
    assert list(right.get_xdata()) == [0, 512]
    assert [list(line.get_ydata()) for line in completed] == [[75, 75]] * has_completed


def test_training_is_drawn_from_its_logs(drawn):
    logs = [{"step": 1, "loss": 3.0, "delta_share": 0.0}, {"step": 2, "loss": 2.0, "delta_share": 0.1}]
    logs += [{"step": 2, "eval_loss": 2.5}, {"step": 2, "train_loss": 2.4}]
    plots.plot_training(logs, "x.png")
    assert lines(drawn[0]) == {"training loss": [3.0, 2.0], "validation loss": [2.5]}


def test_equal_drawings_are_equal_files(tmp_path):
    for name in ("a", "b"):
        with plots.picture(tmp_path / f"{name}.png") as axes:
            axes.plot([1, 2])
    first = (tmp_path / "a.png").read_bytes()
    assert first[:4] == b"\x89PNG" and first == (tmp_path / "b.png").read_bytes()


def test_axes_of_chunks_and_steps_have_whole_numbers(drawn):
    plots.plot_losses({"model": {"loss": 1.5, "loss_by_chunk": [1.0, 2.0]}}, "x.png")
    plots.plot_training([{"step": step, "loss": 3.0, "delta_share": 0.0} for step in (1, 2)], "x.png")
    for axes in drawn:
        assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_known_intervals_are_bands(drawn):
    bounds = [[0.5, 1.5], [1.0, 3.0]]
    plots.plot_losses({"model": {"loss": 1.5, "loss_by_chunk": [1.0, 2.0], "interval_by_chunk": bounds}}, "x.png")
    rows = [{"model": {"right": 0.5, "right_interval": [0.4, 0.6]}}] * 2
    plots.plot_recall([{"distance": words, "rows": row} for words, row in zip((0, 512), rows, strict=True)], "x.png")
    for axes, expected in zip(drawn, ({0.5, 1.5, 1.0, 3.0}, {40.0, 60.0}), strict=True):
        (band,) = axes.collections
        assert {round(float(y), 6) for _, y in band.get_paths()[0].vertices} == expected


@pytest.mark.parametrize("name", ["x.doc", "x", "pdf"])
def test_a_format_that_no_picture_has_is_refused(name):
    plots.check_picture("a/x.PDF")
    with pytest.raises(ValueError, match="`picture` is .*svg"):
        plots.check_picture(name)
