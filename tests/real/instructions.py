"""Chooses the instructions of a real run: those that the judge has not seen, the shortest answers.

A laptop's run has no time for long answers. So the instructions are ordered by the median length,
in characters, of the good models' responses to them; the first ones are taken and dealt out.

In: the file that the judge was fitted on, and the split that make.py --judge wrote beside it. Out:
two files of instructions, none in both.

    python tests/real/instructions.py RESPONSES.jsonl --train 96 --held-out 64
"""

import argparse
import json
from pathlib import Path
from statistics import median

import numpy as np
from fit_judge import GOOD

RUNS = Path(__file__).resolve().parents[2] / "runs"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("responses", help="JSON lines: an instruction and ten models' responses")
    parser.add_argument("--train", type=int, default=96, help="instructions to train on")
    parser.add_argument("--held-out", type=int, default=64, help="instructions for validation")
    args = parser.parse_args()
    split = json.loads((RUNS / "smollm2-judge-split.json").read_text(encoding="utf-8"))
    unseen = set(split["unused"])
    lines = Path(args.responses).read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["instruction"] in unseen]
    rows.sort(key=lambda row: median(len(row[model]) for model in GOOD))
    count = args.train + args.held_out
    order = np.random.default_rng(0).permutation(count)  # short and long ones in both files
    parts = {"train": order[: args.train], "heldout": order[args.train :]}
    for name, part in parts.items():
        path = RUNS / f"{name}.jsonl"
        texts = [json.dumps({"instruction": rows[i]["instruction"]}) + "\n" for i in part]
        path.write_text("".join(texts), encoding="utf-8")
        print(f"{path}: {len(part)} instructions")


if __name__ == "__main__":
    main()
