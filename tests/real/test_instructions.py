"""Which instructions a real run gets."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import instructions
from fit_judge import GOOD


def test_the_shortest_answers_that_the_judge_has_not_seen(tmp_path, monkeypatch):
    texts = [f"question {i}" for i in range(20)]
    rows = []
    for i, text in enumerate(texts):
        lengths = [30 - i] * 3 + [1, 999]  # one short and one long answer move no median
        answers = {name: "x" * n for name, n in zip(GOOD, lengths, strict=True)}
        rows.append({"instruction": text, **answers})
    responses = tmp_path / "responses.jsonl"
    responses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = {"held_out": texts[18:], "fit": texts[:3], "unused": texts[3:18]}
    (tmp_path / "smollm2-judge-split.json").write_text(json.dumps(split))
    monkeypatch.setattr(instructions, "RUNS", tmp_path)
    words = ["instructions.py", responses, "--train", 5, "--held-out", 4]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    instructions.main()
    parts = []
    for name in ("train", "heldout"):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        parts.append([json.loads(line)["instruction"] for line in lines])
    train, held_out = parts
    assert (len(train), len(held_out)) == (5, 4)
    assert sorted(train + held_out, key=texts.index) == texts[9:18]
