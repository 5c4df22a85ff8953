"""Measures the paper's findings again in the toy world: several seeds of the loop, and ablations.

    python tests/toy/reproduce.py                     # 5 seeds and the ablations
    python tests/toy/reproduce.py --seeds 1 --no-ablations
    python tests/toy/reproduce.py --report            # the tables of runs already there

Every arm is the program itself, `python train.py` with the arm's options and a seed, two at a time
with one thread each. Runs stand in runs/reproduce and go on where they stopped. A finding is
printed with its figures whether it appears or not.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from judge import win_rate  # noqa: E402
from model import read_jsonl  # noqa: E402
from train import exact_match  # noqa: E402

MAIN_ARMS = {"TPO": [], "direct": ["--thought", "none"], "TPO, rho 0": ["--rho", "0"]}
ABLATIONS = {
    "generic thoughts": ["--thought", "generic"],
    "system prompt": ["--thought", "system"],
    "rho 0.25": ["--rho", "0.25"],
    "rho 0.5": ["--rho", "0.5"],
    "K 2": ["--num-samples", "2"],
    "K 4": ["--num-samples", "4"],
    "NLL weight 1": ["--nll-weight", "1"],
    "failed not rejected": ["--no-reject-failed"],
    # One iteration then does nearly all of it, and no rho works on the pairs that are left.
    "lr 5.5e-5": ["--lr", "5.5e-5"],
    "lr 5.5e-5, rho 0": ["--lr", "5.5e-5", "--rho", "0"],
}


def folder_of(arm, seed):
    name = arm.replace(", ", "-").replace(" ", "-").lower()
    return ROOT / "runs" / "reproduce" / f"{name}-seed-{seed}"


def train(arm, flags, seed):
    """One run of the program; its log is in the run's folder."""
    output = folder_of(arm, seed)
    command = [sys.executable, str(ROOT / "train.py"), "--output", str(output), "--seed", str(seed)]
    began = time.monotonic()
    done = subprocess.run(
        [*command, *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    result = f"{time.monotonic() - began:.0f} s"
    if done.returncode:
        result = done.stderr.strip().splitlines()[-1]
    if done.returncode and not (done.returncode == 2 and nothing_cut(output)):
        sys.exit(f"{arm}, seed {seed}: {result}")
    print(f"{arm}, seed {seed}: {result}", flush=True)


def read_rows(path):
    return [row for _, row in read_jsonl(path)] if path.exists() else []


def nothing_cut(folder):
    """Whether a run stopped early, as no response of the seed's outputs could be cut."""
    rows = read_rows(folder / "iteration-0" / f"validation-{options_of(folder)['thought']}.jsonl")
    return bool(rows) and all(row["outputs"][0]["response"] is None for row in rows)


def is_finished(folder):
    log = read_rows(folder / "log.jsonl")
    done = max((row["iteration"] for row in log if row["stage"] == "validation"), default=0)
    return done == options_of(folder)["iterations"]


def options_of(folder):
    """A run's options; these two where it was refused before it began."""
    file = folder / "options.json"
    return json.loads(file.read_text()) if file.exists() else {"thought": "", "iterations": None}


def markdown(table):
    """A table of cells as Markdown, the columns aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in table]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Result:
    """What a finished run's log and validation files say."""

    def __init__(self, arm, seed):
        folder = folder_of(arm, seed)
        log = read_rows(folder / "log.jsonl")
        judged = [row for row in log if row["stage"] == "judge"]
        self.rhos = [row["rho"] for row in judged]
        self.warned = [row["chosen_tokens"] > row["rejected_tokens"] for row in judged]
        rows = [row for row in log if row["stage"] == "validation"]
        self.seed_rows = {row["thought"]: row for row in rows if row["iteration"] == 0}
        self.rows = [row for row in rows if row["iteration"] > 0]
        self.last = self.rows[-1]
        last = folder / f"iteration-{self.last['iteration']}" / "validation-scores.jsonl"
        self.outputs = read_rows(last)
        before = folder / "iteration-0" / f"validation-{self.last['thought']}-scores.jsonl"
        self.seed_outputs = read_rows(before)

    def scores(self):
        return [row["outputs"][0]["score"] for row in self.outputs]

    def lengths(self, field):
        """Mean tokens of `field` for the seed and after every iteration."""
        first = self.seed_rows[self.last["thought"]]
        return [row[field] for row in (first, *self.rows)]


def right(rows):
    return [exact_match(row["outputs"][0]["response"], row["answer"]) for row in rows]


def spread(values, form="+.1f", unit=""):
    values = list(values)
    if not values:
        return "-"
    around = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{around}{unit}"


def gains_over(ours, theirs):
    """Points of exact match, a seed each, that one arm ends above the other."""
    pairs = zip(ours, theirs, strict=True)
    return [100 * (a.last["exact_match"] - b.last["exact_match"]) for a, b in pairs]


def same_words(ours, theirs):
    """Share of equal responses among the outputs, over all seeds, that two arms both have right."""
    same = []
    for a, b in zip(ours, theirs, strict=True):
        for pair in zip(a.outputs, b.outputs, strict=True):
            if all(right(pair)):
                one, other = (row["outputs"][0]["response"] for row in pair)
                same.append(one == other)
    return statistics.mean(same)


def change(values):
    """Percent from the first to the last."""
    return 100 * (values[-1] / values[0] - 1)


def finding(number, text, figures, holds):
    """One line: how many seeds show it, and the figure's mean and standard deviation."""
    print(f"{number}. {text}\n   {sum(holds)} of {len(holds)} seeds; {figures}")


def course(result):
    """Exact match in percent of the seed and after every iteration."""
    first = result.seed_rows[result.last["thought"]]
    return [100 * row["exact_match"] for row in (first, *result.rows)]


def courses(results, seeds):
    """Each seed's course and their mean: exact match, and what the rule for rho took."""
    table = [["seed", "untrained", *(f"iteration {row['iteration']}" for row in results[0].rows)]]
    table[0] += ["win rate at the end", "rho"]
    for seed, result in zip(seeds, results, strict=True):
        cells = [f"{value:.1f}" for value in course(result)]
        rhos = ", ".join(f"{rho:g}" for rho in result.rhos)
        table.append([str(seed), *cells, f"{100 * result.last['win_rate']:.1f}", rhos])
    means = [statistics.mean(column) for column in zip(*map(course, results), strict=True)]
    wins = statistics.mean(100 * result.last["win_rate"] for result in results)
    table.append(["mean", *(f"{value:.1f}" for value in means), f"{wins:.1f}", ""])
    return markdown(table)


def findings(seeds):
    tpo, direct, free = ([Result(arm, seed) for seed in seeds] for arm in MAIN_ARMS)
    for arm, results in zip(MAIN_ARMS, (tpo, direct, free), strict=True):
        print(f"{arm}: exact match\n\n{courses(results, seeds)}\n")
    untrained = [
        100 * (r.seed_rows["specific"]["exact_match"] - r.seed_rows["none"]["exact_match"])
        for r in tpo
    ]
    finding(
        1,
        "Untrained, thinking is at least 5 points of exact match below direct.",
        f"thinking minus direct: {spread(untrained)} points",
        [points <= -5 for points in untrained],
    )
    # After each iteration, a list of seeds: thinking less direct.
    leads = [
        [a - b for a, b in zip(course(ours), course(theirs), strict=True)]
        for ours, theirs in zip(tpo, direct, strict=True)
    ]
    wins = [100 * win_rate(a.scores(), b.scores())[0] for a, b in zip(tpo, direct, strict=True)]
    by_iteration = "; ".join(spread(column) for column in zip(*leads, strict=True))
    finding(
        2,
        "Thinking passes direct at the second iteration, and ends at least 15 points above it.",
        f"thinking minus direct, from the seed on: {by_iteration} points; at the end win rate "
        f"{spread(wins, '.1f', '%')}; of what both answer right, {same_words(tpo, direct):.0%} in "
        "the same words",
        [lead[1] <= 2 and lead[2] > 0 and lead[-1] >= 15 for lead in leads],
    )
    steps = [[b - a for a, b in pairwise(course(r))] for r in tpo]
    by_iteration = "; ".join(spread(column) for column in zip(*steps, strict=True))
    finding(
        3,
        "Each iteration gains at least 2 points, none more than 60% of the whole.",
        f"gains: {by_iteration} points",
        [min(step) >= 2 and max(step) <= 0.6 * sum(step) for step in steps],
    )
    shrunk = [-change(r.lengths("thought_tokens")) for r in tpo]
    finding(
        4,
        "Thoughts shrink by 10% or more.",
        f"by {spread(shrunk, '.1f', '%')}",
        [s >= 10 for s in shrunk],
    )
    controlled = [change(r.lengths("response_tokens")) for r in tpo]
    grown = [r.lengths("response_tokens") for r in free]
    by_iteration = [f"{statistics.mean(column):.1f}" for column in zip(*grown, strict=True)]
    finding(
        5,
        "With rho 0 responses grow every iteration; with the default they stay within 5%.",
        f"default rho {spread(controlled)}%, rho 0 {spread(map(change, grown))}%: on average "
        f"{', '.join(by_iteration)} tokens; exact match of the default less that of rho 0: "
        f"{spread(gains_over(tpo, free))} points",
        [
            abs(c) <= 5 and all(a < b for a, b in pairwise(g))
            for c, g in zip(controlled, grown, strict=True)
        ],
    )
    warned = [sum(r.warned) for r in tpo]
    finding(
        6,
        "The rule for rho makes the chosen no longer than the rejected, without a warning.",
        f"warnings in four iterations: {', '.join(map(str, warned))}",
        [not count for count in warned],
    )
    print("Gains by category, in points of exact match, with 95% intervals.\n")
    print(categories(tpo, direct))


def categories(tpo, direct):
    """TPO less the seed asked to think, and less the direct baseline, over all seeds."""
    table = [["category", "count", "TPO", "over the seed's thinking", "over the direct baseline"]]
    names = sorted({row["category"] for row in tpo[0].outputs})
    for name in [*names, "all"]:
        ours, seed, theirs = [], [], []
        for a, b in zip(tpo, direct, strict=True):
            picked = [i for i, row in enumerate(a.outputs) if name in ("all", row["category"])]
            for into, rows in ((ours, a.outputs), (seed, a.seed_outputs), (theirs, b.outputs)):
                into += right([rows[i] for i in picked])
        mean = f"{100 * statistics.mean(ours):.1f}%"
        table.append([name, str(len(ours)), mean, gain(ours, seed), gain(ours, theirs)])
    return markdown(table)


def gain(ours, theirs):
    """Mean of the paired differences in points, with a 95% interval (normal approximation)."""
    differences = [100 * (a - b) for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.mean(differences)
    reach = 1.96 * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean:+.1f} ({mean - reach:+.1f} to {mean + reach:+.1f})"


MEASURED = {  # the ablations' columns: the figure, and what it is times
    "exact match": ("exact_match", 100),
    "win rate": ("win_rate", 100),
    "unparsed": ("unparsed", 100),
    "thought": ("thought_tokens", 1),
    "response": ("response_tokens", 1),
}


def ablations(seeds):
    """One row an arm: means over the seeds that it was run with."""
    table = [["arm", "seeds", *MEASURED]]
    for arm in {**MAIN_ARMS, **ABLATIONS}:
        folders = {seed: folder_of(arm, seed) for seed in seeds if folder_of(arm, seed).exists()}
        rows = [Result(arm, s).last for s, folder in folders.items() if is_finished(folder)]
        cells = [spread((times * r[key] for r in rows), ".1f") for key, times in MEASURED.values()]
        if not rows:
            stopped = any(map(nothing_cut, folders.values()))
            why = "stopped: nothing the seed wrote could be cut" if stopped else "not run"
            cells = [why, *["-"] * (len(MEASURED) - 1)]
        table.append([arm, str(len(rows)), *cells])
    return markdown(table)


def main():
    parser = argparse.ArgumentParser(description="Measures the toy world's findings again.")
    add = parser.add_argument
    add("--seeds", type=int, default=5, help="seeds of the loop for the findings (default 5)")
    add("--no-ablations", action="store_true", help="leave out the table of ablations")
    add("--report", action="store_true", help="only print the tables of runs already there")
    args = parser.parse_args()
    began, seeds = time.monotonic(), range(args.seeds)
    jobs = [(arm, flags, seed) for seed in seeds for arm, flags in MAIN_ARMS.items()]
    if not args.no_ablations:
        jobs += [(arm, flags, 0) for arm, flags in ABLATIONS.items()]
    if not args.report:
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(train, *job) for job in jobs]:
                done.result()
        print(f"{len(jobs)} runs in {(time.monotonic() - began) / 60:.0f} minutes")
    recipe = json.loads((HERE / "recipe.json").read_text())
    print(f"\nrecipe: {json.dumps(recipe)}\n")
    findings(seeds)
    if not args.no_ablations:
        print(f"\nAfter the last iteration, mean +- deviation over seeds:\n\n{ablations(seeds)}")


if __name__ == "__main__":
    main()
