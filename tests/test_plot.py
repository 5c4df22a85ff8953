"""tests/plot.py: the series are the log's, the intervals published ones, the file is written.

pytest tests/test_plot.py
"""

import sys

import plot
import pytest

from judge import wilson_interval
from model import InputError, write_jsonl


def share(key, right, count):
    return {key: right / count, f"{key}_interval": wilson_interval(right / count, count)}


def row(iteration, thought, wins, right, lengths, categories):
    """A validation row; categories: {name: right of 40, or None where there are no answers}."""
    parts = {
        name: share("win_rate", 30, 40)
        | (
            {"exact_match": None, "exact_match_interval": None}
            if n is None
            else share("exact_match", n, 40)
        )
        for name, n in categories.items()
    }
    figures = share("win_rate", wins, 80) | share("exact_match", right, 80)
    names = ("thought_tokens", "response_tokens")
    figures |= dict(zip(names, lengths, strict=True)) | {"by_category": parts}
    return {"stage": "validation", "iteration": iteration, "thought": thought, **figures}


@pytest.fixture
def run(tmp_path):
    """A run that thinks, of two iterations: the seed's two rows, and other stages between."""
    rows = [
        row(0, "none", 40, 60, (0.0, 10.0), {"sum": 30, "chat": None}),
        row(0, "specific", 20, 30, (25.0, 11.5), {"sum": 10, "chat": None}),
        {"stage": "dpo", "iteration": 1, "step": 1, "loss": 0.7},
        row(1, "specific", 48, 50, (20.0, 12.5), {"sum": 20, "chat": None}),
        row(2, "specific", 80, 64, (18.0, 12.0), {"sum": 40, "chat": None}),
    ]
    write_jsonl(tmp_path / "log.jsonl", rows)
    return tmp_path


def test_series_are_those_of_the_log(run):
    direct, rows = plot.read_run(run)
    assert direct["thought"] == "none" and [r["iteration"] for r in rows] == [0, 1, 2]
    points = plot.series(rows, "win_rate")
    assert [(i, value) for i, value, _, _ in points] == [(0, 25.0), (1, 60.0), (2, 100.0)]
    assert points[1][2:] == pytest.approx([100 * end for end in wilson_interval(0.6, 80)])
    assert plot.series(rows, "response_tokens") == [
        (0, *[11.5] * 3),
        (1, *[12.5] * 3),
        (2, *[12.0] * 3),
    ]
    assert plot.series([{"iteration": 1, "exact_match": None}], "exact_match") == []


def test_gains_have_newcombes_interval():
    """56 of 70 against 48 of 80: Newcombe 1998, method 10."""
    (direct, last) = (
        {"by_category": {"a": share("win_rate", 1, 2) | share("exact_match", *n)}}
        for n in ((48, 80), (56, 70))
    )
    assert plot.gains(direct, last)["a"] == pytest.approx((20, 5.24, 33.39), abs=0.006)


def test_without_answers_the_gain_is_the_win_rates(run):
    direct, rows = plot.read_run(run)
    found = plot.gains(direct, rows[-1])
    assert list(found) == ["sum", "chat"] and found["sum"][0] == pytest.approx(25)
    low, high = wilson_interval(0.75, 40)
    assert found["chat"] == pytest.approx((25, 100 * (low - 0.5), 100 * (high - 0.5)))


def test_the_figure_draws_the_series(run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    direct, rows = plot.read_run(run)
    shares, lengths, categories = plot.draw({"arm": (direct, rows)}).axes
    drawn = {c.get_label(): c.lines[0] for panel in (shares, lengths) for c in panel.containers}
    assert list(drawn) == ["arm: win rate", "arm: exact match", "arm: response", "arm: thought"]
    assert list(shares.lines[-1].get_ydata()) == [75.0, 75.0]  # the seed's 60 of 80
    for label, key in (("win rate", "win_rate"), ("thought", "thought_tokens")):
        points = [point[:2] for point in plot.series(rows, key)]
        assert list(map(tuple, drawn[f"arm: {label}"].get_xydata())) == points
    gains = [gain for gain, _, _ in plot.gains(direct, rows[-1]).values()]
    assert list(categories.containers[0].lines[0].get_xdata()) == gains
    for kind, begins in (("svg", b"<?xml"), ("png", b"\x89PNG")):
        output = tmp_path / f"figure.{kind}"
        monkeypatch.setattr(sys, "argv", ["plot.py", str(run), "--output", str(output)])
        plot.main()
        assert output.read_bytes().startswith(begins)


def test_refusals(run, tmp_path, monkeypatch):
    words = ["plot.py", str(run), "--output"]
    monkeypatch.setattr(sys, "argv", [*words, "figure.pdf"])
    with pytest.raises(InputError, match=r"--output: found '.pdf'"):
        plot.main()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / "figure.svg")])
    with pytest.raises(InputError, match="matplotlib: not installed"):
        plot.main()
    write_jsonl(run / "log.jsonl", [row(0, "none", 1, 1, (0, 1), {})])
    with pytest.raises(InputError, match="no iteration's validation"):
        plot.read_run(run)
