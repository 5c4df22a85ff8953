"""The paper's figures of runs, from the validation rows of their log.jsonl.

    python tests/toy/plot.py runs/specific runs/none --output figure.svg    # or .png

It needs matplotlib, which nothing else here does.

Left: the win rate against the seed asked directly after each iteration and, where there are
answers, exact match beside that seed's. Middle: lengths of thoughts and responses in tokens.
Right: in each category, the last iteration's gain over the seed asked directly, in points of exact
match, or of the win rate above 50% where there are no answers. Bars are 95% intervals.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import model as lm

LINES = {"win_rate": "-", "exact_match": "--", "response_tokens": "-", "thought_tokens": "--"}


def read_run(folder):
    """(direct, rows): the seed asked directly, and a run's own models from the seed on."""
    log = Path(folder) / "log.jsonl"
    rows = [row for _, row in lm.read_jsonl(log) if row["stage"] == "validation"]
    last = max((row["iteration"] for row in rows), default=0)
    if last == 0:
        raise lm.InputError(f"{log}: no iteration has ended; plot a run that has finished one")
    return rows[0], [row for row in rows if row["thought"] == rows[-1]["thought"]]


def series(rows, key):
    """(iteration, value, low, high) of each row that has the figure; shares in percent.

    low and high are the interval's ends, or the value where the figure has no interval.
    """
    points = []
    for row in rows:
        if row[key] is not None:
            values = (row[key], *row.get(f"{key}_interval", [row[key]] * 2))
            scale = 1 if key.endswith("tokens") else 100
            points.append((row["iteration"], *(scale * value for value in values)))
    return points


def gains(direct, last):
    """{category: (gain, low, high)} in points.

    The interval of a difference is Newcombe's, from the two shares' own; it takes them to be of
    different instructions, and so errs on the wide side.
    """
    found = {}
    for name, row in last["by_category"].items():
        before, key = direct["by_category"][name], "exact_match"
        if row[key] is None:  # no answers: against itself, the seed asked directly wins by half
            before, key = {"win_rate": 0.5, "win_rate_interval": (0.5, 0.5)}, "win_rate"
        (low, high), (old_low, old_high) = row[f"{key}_interval"], before[f"{key}_interval"]
        gain = row[key] - before[key]
        down = math.hypot(row[key] - low, old_high - before[key])
        up = math.hypot(high - row[key], before[key] - old_low)
        found[name] = (100 * gain, 100 * (gain - down), 100 * (gain + up))
    return found


def draw(runs):
    """A matplotlib figure of {name: read_run's}."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise lm.InputError("matplotlib: not installed; pip install matplotlib") from None
    figure = Figure(figsize=(13, 5), layout="constrained")
    shares, lengths, categories = figure.subplots(1, 3)
    for i, (name, (direct, rows)) in enumerate(runs.items()):
        for key, style in LINES.items():
            panel = lengths if key.endswith("tokens") else shares
            points = series(rows, key)
            if any(value for _, value, _, _ in points):  # no answers, no thoughts: no line
                label = f"{name}: {key.replace('_', ' ').removesuffix(' tokens')}"
                x, *values = zip(*points, strict=True)
                bars(panel, "y", x, values, label, color=f"C{i}", linestyle=style)
        if i == 0 and direct["exact_match"] is not None:
            height, label = 100 * direct["exact_match"], "exact match, seed asked directly"
            shares.axhline(height, label=label, color="gray", linestyle=":")
        if found := gains(direct, rows[-1]):
            places = [place + i / (len(runs) + 1) for place in range(len(found))]
            values = zip(*found.values(), strict=True)
            bars(categories, "x", places, values, name, color=f"C{i}", linestyle="")
            categories.set_yticks(range(len(found)), found)
            categories.legend(fontsize="small")
    shares.set(title="win rate and exact match", xlabel="iteration", ylabel="%")
    lengths.set(title="length", xlabel="iteration", ylabel="tokens", ylim=(0, None))
    categories.set(title="gain over the seed asked directly", xlabel="points")
    categories.axvline(0, color="gray", linewidth=0.8)
    categories.invert_yaxis()
    for panel in (shares, lengths):
        panel.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13))
        panel.xaxis.get_major_locator().set_params(integer=True)
    return figure


def bars(panel, along, places, values, label, **style):
    """Points with their intervals, upright (along y) or lying (along x)."""
    middle, low, high = values
    reach = [
        [max(0, m - end) for m, end in zip(middle, low, strict=True)],  # rounding may pass zero
        [max(0, end - m) for m, end in zip(middle, high, strict=True)],
    ]
    x, y = (places, middle) if along == "y" else (middle, places)
    panel.errorbar(x, y, **{f"{along}err": reach}, label=label, marker="o", capsize=2, **style)


def main():
    parser = argparse.ArgumentParser(description="Draws the paper's figures of finished runs.")
    parser.add_argument("runs", nargs="+", help="folders of runs, one an arm")
    parser.add_argument("--output", required=True, help="file to write, .svg or .png")
    args = parser.parse_args()
    kind = Path(args.output).suffix
    if kind not in (".svg", ".png"):
        raise lm.InputError(f"--output ends in {kind!r}: take .svg or .png")
    runs = [read_run(folder) for folder in args.runs]
    names = ["direct" if rows[-1]["thought"] == "none" else "thinking" for _, rows in runs]
    if len(set(names)) < len(names):  # two arms of a kind: their folders tell them apart
        names = args.runs
    figure = draw(dict(zip(names, runs, strict=True)))
    with lm.write_whole(args.output) as aside:
        figure.savefig(aside, format=kind[1:], dpi=150)


if __name__ == "__main__":
    lm.run_main(main)
