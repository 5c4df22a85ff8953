"""The loop, end to end on tiny random checkpoints: files, log, what a person sees, refusals.

    pytest tests/test_train.py

Kills and full disks have a folder of their own, tests/resume.
"""

import contextlib
import gc
import importlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import dpo
import judge as judging
import model as lm
import sample
import train

import huggingface_hub
import pytest
import torch
from conftest import LLAMA, write_checkpoint, write_tokenizer
from resume.faults import contents, make_world, start
from toy import plot, reproduce

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "tests" / "toy"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def command(world, output, *flags):
    words = ["--recipe", world / "recipe.json", "--output", output, *flags]
    return [str(ROOT / "train.py"), *map(str, words)]


def run(world, output, *flags):
    """What `python train.py` prints, piped."""
    argv = mock.patch.object(sys, "argv", command(world, output, *flags))
    with argv, contextlib.redirect_stdout(io.StringIO()) as text:
        train.main()
    return text.getvalue()


def options_of(world, *flags):
    """The Run that a command makes, before it begins."""
    caught = RuntimeError("begun")
    with (
        mock.patch.object(train, "read_inputs", side_effect=caught) as begin,
        pytest.raises(RuntimeError),
    ):
        run(world, world / "never", *flags)
    return begin.call_args.args[0]


def read(path):
    return [row for _, row in lm.read_jsonl(path)]


def rows_of(folder, stage, **fields):
    rows = [row for row in read(folder / "log.jsonl") if row["stage"] == stage]
    return [row for row in rows if all(row[key] == value for key, value in fields.items())]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """(folder, what was printed) of a run of four iterations, as the paper's."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, run(world, folder, "--iterations", 4)


# The run's folder


def test_the_run_folder_holds_what_the_design_names(finished):
    folder, _ = finished
    assert json.loads((folder / "options.json").read_text())["iterations"] == 4
    for t in range(1, 5):
        names = {path.name for path in (folder / f"iteration-{t}").iterdir()}
        assert {"samples.jsonl", "scores.jsonl", "pairs.jsonl", "checkpoint"} <= names
        assert not {name for name in names if name.startswith(("epoch", "state"))}
    assert not [path for path in folder.rglob("*") if ".partial" in path.name]
    rows = rows_of(folder, "validation")
    assert [row["iteration"] for row in rows] == [0, 0, 1, 2, 3, 4]
    assert [row["thought"] for row in rows] == ["none"] + 5 * ["specific"]
    for row in rows:
        assert set(row["by_category"]) == {"a", "b"}
        names = "score win_rate exact_match unparsed unparsed_left thought_tokens response_tokens"
        for key in names.split():
            assert isinstance(row[key], (int, float)), key
    assert rows[0]["win_rate"] == 0.5  # the seed asked directly, against itself
    assert rows[0]["thought_tokens"] == 0


def test_iterations_use_fresh_instructions_and_train_on_what_they_sampled(finished):
    folder, _ = finished
    used = []
    for t in range(1, 5):
        samples = read(folder / f"iteration-{t}" / "samples.jsonl")
        used += [row["instruction"] for row in samples]
        by_instruction = {row["instruction"]: row for row in samples}
        for pair in read(folder / f"iteration-{t}" / "pairs.jsonl"):
            row = by_instruction[pair["instruction"]]
            assert pair["prompt_ids"] == row["prompt_ids"]
            ids = [output["ids"] for output in row["outputs"]]
            assert pair["chosen_ids"] in ids and pair["rejected_ids"] in ids
    assert len(used) == len(set(used)) == 40


def test_the_judges_row_is_what_the_files_say(finished):
    """rho by the authors' rule, mean lengths, the share of failed outputs, and what has no pair."""
    folder, _ = finished
    for t in range(1, 5):
        (row,) = rows_of(folder, "judge", iteration=t)
        scores = read(folder / f"iteration-{t}" / "scores.jsonl")
        pairs = read(folder / f"iteration-{t}" / "pairs.jsonl")
        outputs = {(r["instruction"], *o["ids"]): o for r in scores for o in r["outputs"]}
        both = [
            [outputs[(p["instruction"], *p[f"{side}_ids"])] for side in ("chosen", "rejected")]
            for p in pairs
        ]
        good = [pair for pair in both if pair[1]["response"] and pair[1]["finished"]]
        assert row["pairs"] == len(pairs)
        assert row["failed"] == pytest.approx(1 - len(good) / len(pairs))
        for i, side in enumerate(("chosen", "rejected")):
            lengths = [pair[i]["response_tokens"] for pair in good]
            mean = sum(lengths) / len(good) if good else 0
            assert (row[f"{side}_tokens"] or 0) == pytest.approx(mean)
        assert row["no_pair"] == len(scores) - len(pairs)
        assert [entry["rho"] for entry in row["rhos"]] == judging.RHOS
        short = [
            entry["rho"]
            for entry in row["rhos"]
            if not entry["chosen_tokens"] or entry["chosen_tokens"] <= entry["rejected_tokens"]
        ]
        assert row["rho"] == (short[0] if short else 0.5)
    assert any(rows_of(folder, "judge", iteration=t)[0]["no_pair"] for t in range(1, 5))


def test_the_kept_epoch_is_the_best(finished):
    for t in range(1, 5):
        epochs = rows_of(finished[0], "epoch", iteration=t)
        (kept,) = rows_of(finished[0], "validation", iteration=t)
        best = max(epochs, key=lambda row: (row["win_rate"], row["score"]))
        assert kept["epoch"] == best["epoch"] and kept["win_rate"] == best["win_rate"]


@pytest.mark.parametrize(("scores", "kept"), [((None, -3.0), 2), ((-3.0, None), 1)])
def test_an_epoch_of_which_nothing_can_be_cut_is_below_any_score(scores, kept, world, tmp_path):
    validate, left = train.validate, list(scores)

    def validated(own, judge, path, iteration, style):
        row = validate(own, judge, path, iteration, style)
        return {**row, "win_rate": 0.5, "score": left.pop(0)} if iteration else row

    with mock.patch.object(train, "validate", validated):
        run(world, tmp_path, "--iterations", 1)
    assert rows_of(tmp_path, "validation", iteration=1)[0]["epoch"] == kept


def test_only_one_model_and_no_optimizer_is_held_at_a_time(world, tmp_path, monkeypatch):
    """A GPU's KV cache takes the room that they would need: at samplings and at judgings.

    Every model is in a reference cycle here, as autograd may leave one, and nothing but the run
    itself collects: it does before each load, and then hands back what torch keeps.
    """
    weights, seen, emptied = weakref.WeakSet(), [], []

    def watched(function):
        def call(*args, **kwargs):
            optimizers = [x for x in gc.get_objects() if type(x) is dpo.AdamW]
            seen.append((function.__name__, len(weights), len(optimizers)))
            assert (len(weights), optimizers) == (1, []), seen
            return function(*args, **kwargs)

        return call

    def load_weights(module, *args, load=lm.load_weights):
        assert len(weights) == 0 and emptied[-1:] == [0], "the one before is gone, and its memory"
        emptied.clear()
        weights.add(module)
        module.__dict__["cycle"] = [module]
        return load(module, *args)

    monkeypatch.setattr(lm, "load_weights", load_weights)
    monkeypatch.setattr(judging, "load_weights", load_weights)
    monkeypatch.setattr(sample, "sample_file", watched(sample.sample_file))
    monkeypatch.setattr(judging, "score_file", watched(judging.score_file))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(weights)))
    gc.disable()
    try:
        run(world, tmp_path / "run", "--iterations", 1, "--epochs", 2)
    finally:
        gc.enable()
    assert [name for name, *_ in seen].count("sample_file") == 2 + 1 + 2


def test_a_second_start_changes_nothing(finished, world):
    before = contents(finished[0])
    run(world, finished[0], "--iterations", 4)
    assert contents(finished[0]) == before


def test_what_other_options_or_other_files_make_is_refused_by_name(finished, world, tmp_path):
    same = ["--iterations", 4]
    with pytest.raises(lm.InputError, match=r"beta was 0\.1 and is 0\.2"):
        run(world, finished[0], *same, "--beta", 0.2)
    policy, rows = tmp_path / "policy", tmp_path / "validation.jsonl"
    shutil.copytree(world / "policy", policy)
    (policy / "generation_config.json").write_text('{"eos_token_id": [1]}')
    rows.write_text((world / "validation.jsonl").read_text() + '{"instruction": "more"}\n')
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    options = json.loads((folder / "options.json").read_text())
    for name, path in (("model", policy), ("validation", rows)):
        (folder / "options.json").write_text(json.dumps({**options, name: str(path)}))
        with pytest.raises(lm.InputError, match=f"{name}_sha256"):
            run(world, folder, *same, f"--{name}", path)


def test_a_second_process_is_refused_and_sigterm_says_how_to_resume(world, tmp_path):
    words = [sys.executable, *command(world, tmp_path / "run", "--epochs", 999)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    first = subprocess.Popen(words, **pipes, env=environment, text=True)
    while not (tmp_path / "run" / "options.json").exists():
        time.sleep(0.05)
    with pytest.raises(lm.InputError, match="another process is at work"):
        run(world, tmp_path / "run", "--epochs", 999)
    first.send_signal(signal.SIGTERM)
    _, stderr = first.communicate()
    assert first.returncode == 130
    again = shlex.join([Path(sys.executable).name, *words[1:]])
    assert stderr.strip().splitlines()[-1].endswith(f"to resume: {again}")


def test_a_hub_id_is_a_seed_too(world, tmp_path, monkeypatch):
    def download(name, revision, **patterns):
        return str(world / name.removeprefix("org/"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    began = mock.patch.object(train, "tpo", side_effect=RuntimeError("begun"))
    with began, pytest.raises(RuntimeError, match="begun"):
        run(world, tmp_path / "run", "--model", "org/policy", "--judge", "org/judge@main")


# A seed that does not follow the prompt


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):
    """(folder, exit status, lines of errors) of a run whose seed never writes the marker."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    recipe = world / "stopped.json"
    values = json.loads((world / "recipe.json").read_text())
    recipe.write_text(json.dumps({**values, "model": "without-marker"}))
    first = start(folder, recipe)
    assert start(folder, recipe) == first  # and so does the same command again
    return folder, *first


def test_a_seed_of_which_nothing_can_be_cut_stops_before_training(stopped):
    folder, status, lines = stopped
    assert status == 2 and len(lines) == 1 and "--thought" in lines[0]
    assert lines[0].startswith(f"train.py: error: {folder / 'iteration-0'}/validation-specific")
    assert not list(folder.glob("iteration-[1-9]*"))


def test_first_tries_and_what_is_left_are_counted(finished, world, tmp_path):
    """unparsed is of the first tries; unparsed_left is after --resample more."""
    for row in rows_of(finished[0], "validation"):
        if row["iteration"]:
            folder, name = finished[0] / f"iteration-{row['iteration']}", "validation.jsonl"
        else:
            folder, name = finished[0] / "iteration-0", f"validation-{row['thought']}.jsonl"
        outputs = [r["outputs"][0] for r in read(folder / name)]
        left = sum(not output["response"] for output in outputs)
        again = sum(output["tries"] > 1 and bool(output["response"]) for output in outputs)
        assert row["unparsed_left"] == pytest.approx(left / len(outputs))
        assert row["unparsed"] == pytest.approx((left + again) / len(outputs))
    (seed,) = rows_of(finished[0], "validation", iteration=0, thought="specific")
    assert seed["unparsed_left"] < seed["unparsed"]
    training = [
        o for r in read(finished[0] / "iteration-1" / "samples.jsonl") for o in r["outputs"]
    ]
    assert {output["tries"] for output in training} == {1}  # what cannot be cut is to be rejected
    run(world, tmp_path / "run", "--resample", 0, "--iterations", 1)
    (once,) = rows_of(tmp_path / "run", "validation", iteration=0, thought="specific")
    assert once["unparsed"] == once["unparsed_left"] == seed["unparsed"]


def test_a_seed_of_which_nothing_ends_stops_before_training(world, tmp_path):
    with pytest.raises(lm.InputError, match="no output has a response and an end: take more --max"):
        run(world, tmp_path / "run", "--thought", "none", "--max-new-tokens", 1)


def test_what_is_refused_before_the_work_may_be_asked_for_otherwise(world, tmp_path):
    judge = tmp_path / "judge"  # with room for the longest instruction and 24 tokens more
    shutil.copytree(world / "judge", judge)
    config = json.loads((judge / "config.json").read_text())
    rows = read(world / "train.jsonl") + read(world / "validation.jsonl")
    longest = max((row["instruction"] for row in rows), key=len)
    chat = judging.load_judge(judge).longest_chat(longest, 0)
    config["max_position_embeddings"] = chat + 24
    (judge / "config.json").write_text(json.dumps(config))
    flags = ["--judge", judge, "--iterations", 1, "--epochs", 1]
    with pytest.raises(lm.InputError, match=f"holds {chat + 24} tokens, and a chat may have"):
        run(world, tmp_path / "run", *flags, "--max-new-tokens", 25)
    assert "iteration 1 " in run(world, tmp_path / "run", *flags)  # in the same folder


def test_instructions_that_are_not_used_refuse_nothing(world, tmp_path):
    rows = read(world / "train.jsonl")
    order = lm.random_stream(0, "instructions").permutation(len(rows))
    rows[order[-1]] = {"instruction": "x" * 600}  # no prompt of the policy holds it
    file = tmp_path / "train.jsonl"
    lm.write_jsonl(file, rows)
    flags = ["--instructions", file, "--epochs", 1]
    assert "iteration 1 " in run(world, tmp_path / "run", *flags, "--iterations", 1)
    with pytest.raises(lm.InputError, match=f"{file}: the prompt of instruction"):
        run(world, tmp_path / "other", *flags, "--iterations", 4)


def test_categories_and_answers_that_are_null_or_numbers(world, tmp_path):
    rows = read(world / "validation.jsonl")
    fields = [{"category": None}, {"category": 3}, {"category": "a"}, {}]
    rows = [
        {"instruction": row["instruction"], "answer": None, **fields[i % 4]}
        for i, row in enumerate(rows)
    ]
    file = tmp_path / "validation.jsonl"
    lm.write_jsonl(file, rows)
    flags = ["--validation", file, "--iterations", 1, "--epochs", 1]
    run(world, tmp_path / "run", *flags)
    for row in rows_of(tmp_path / "run", "validation"):
        assert row["exact_match"] is None
        counts = {name: each["count"] for name, each in row["by_category"].items()}
        assert counts == {"3": 2, "a": 1}


# What a person sees


def test_a_piped_run_writes_no_control_characters(finished):
    """Neither a progress bar's nor what a model wrote: this world's writes bells."""
    folder, text = finished
    assert "\\u0007" in (folder / "iteration-1" / "validation.jsonl").read_text()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


def test_the_lines_of_a_run_are_few_and_no_wider_than_a_terminal(finished, world):
    text = finished[1]
    lines = text.split("\n")[:-1]
    assert len(lines) + 2 < 60  # with a warning of the judge now and then
    # A folder of a test has a name that no terminal holds.
    ours = [line for line in lines if str(finished[0]) not in line and str(world) not in line]
    assert len(ours) == len(lines) - 4 and max(map(len, ours)) <= 80
    assert "4 iterations on cpu: K = 4 outputs to 10 instructions" in lines[0]
    for name in ("seed", "judge", "run"):
        assert any(line.startswith(f"{name} ") for line in lines[1:4])
    assert lines[4].split() == "exact match win rate not parsed thought response".split()
    for line, style, how in zip(
        lines[5:7], ("none", "specific"), ("directly", "to think"), strict=True
    ):
        (row,) = rows_of(finished[0], "validation", iteration=0, thought=style)
        cells = re.split(r" {2,}", line)
        assert cells[0] == f"seed, {how}" and cells[1].startswith(f"{row['exact_match']:.1%} (")
        assert cells[2].startswith(f"{row['win_rate']:.1%} (")
    for t in range(1, 5):
        assert any(line.startswith(f"iteration {t} of 4") for line in lines)
    for name, count in (("seed, directly ", 2), ("seed, to think ", 2), ("iteration 4  ", 1)):
        assert sum(line.startswith(name) for line in lines) == count, name
    for name in ("before  ", "after   "):
        assert sum(line.startswith(name) for line in lines) == 1, name
    for word in ("sampling", "judging", "DPO", "validation"):
        assert sum(line.startswith(f"  {word} ") for line in lines) == 4
    assert "python sample.py --model" in text


def test_an_example_is_what_the_seed_got_wrong_before_and_after(monkeypatch, capsys):
    def row(text, response, instruction="Why\a\n\nso?"):
        output = {"text": text, "response": response, "finished": True}
        return {"instruction": instruction, "answer": "b c", "outputs": [output]}

    longer = row("no", "no", "Why is it so?")
    files = [[row("right", "b c"), longer, row("a\n" * 300 + "\x1b[31m", "b d")]]
    files += [[row("d", "e"), longer, row("\ad <R>\rb c\x1b", "b c")]]
    monkeypatch.setattr(train, "read_rows", lambda t: files[t])
    run = SimpleNamespace(
        file=lambda t, name: min(t, 1),
        sampling=SimpleNamespace(thought="specific"),
        options=SimpleNamespace(iterations=2),
    )
    train.print_example(run)
    first, *before, after = capsys.readouterr().out.splitlines()
    assert (first.split(), after) == (["Why", "so?"], "after    d <R> b c")
    assert len(before) == 6 and max(map(len, before)) <= 80
    assert before[0] == "before  " + "a " * 35 + "a" and before[-1].endswith(" [...]")
    files[0] = files[1] = [row("x", "b c")]  # nothing wrong: there is an example all the same
    train.print_example(run)
    assert capsys.readouterr().out.split() == "Why so? before x after x".split()


def test_report_shows_the_table_of_each_run(finished, capsys):
    folder = str(finished[0])
    with mock.patch.object(sys, "argv", ["train.py", "--report", folder, folder]):
        train.main()
    text = capsys.readouterr().out
    assert text.count(folder) == 2 and text.count("seed, directly") == 2
    last = rows_of(finished[0], "validation", iteration=4)[0]
    (line,) = {line for line in text.splitlines() if line.startswith("iteration 4")}
    low, high = (f"{100 * end:.0f}" for end in last["win_rate_interval"])
    assert f"{100 * last['win_rate']:.1f}% ({low} to {high})" in line
    assert f"{last['thought_tokens']:.1f}" in line and f"{last['response_tokens']:.1f}" in line


# Figures


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("The answer is 7.", "7", True),
        ("7", "7", True),
        ("It is 70", "7", False),
        ("It costs $1,080 in all.", "360*3=<<360*3=1080>>1080\n#### 1080", True),
        ("so 1080 dollars, or 90 a month", "#### 1080", False),
        ("#### -3", "-3", True),
        ("dog cat", "cat dog", False),
        ("The answer is: cat  dog", "Cat dog", True),
        ("The answer is (B).", "B", True),
        ('The answer is "Paris".', "Paris", True),
        ("The answer is [a].", "(A)", True),
        ("", "7", False),
        (None, "7", False),
        ("7.0", "7", True),
        ("7", 7, True),
    ],
)
def test_exact_match(response, answer, right):
    assert train.exact_match(response, answer) is right


ENDED, CUT_OFF = True, False


@pytest.mark.parametrize(
    ("response", "finished", "answer", "right"),
    [
        # The words of a mark, in any case and dress
        ("The Answer Is 18.\nThis took 3 steps.", ENDED, "#### 18", True),
        ("**The answer is:**\n\n18\n\nIt took 3 steps.", ENDED, "#### 18", True),
        ("The answer\nis 18, for 2 days", ENDED, "18", True),
        ("The answer is not 5 but 18.", ENDED, "18", True),
        # The first number of what follows
        ("#### 18 (9 x 2)", ENDED, "#### 18", True),
        ("#### 18 (2x = 36)", ENDED, "#### 18", True),
        ("The answer is $18 for 2 days.", ENDED, "#### 18", True),
        ("The answer is 18 because 2 + x = 20.", ENDED, "18", True),
        ("The answer is 18. I hope that this answer is helpful.", ENDED, "18", True),
        # ... or an equation's right side
        ("The answer is 9 * 2 = 18.", ENDED, "18", True),
        ("#### = 9 * 2 = 18 for 2 days", ENDED, "#### 18", True),
        ("#### 18 = 9 * 2", ENDED, "#### 18", True),
        # A box
        (r"The answer is \boxed{1{,}200}.", ENDED, "#### 1200", True),
        (r"\boxed{18\text{ dollars}} for 2 days", ENDED, "18", True),
        (r"\boxed{-\$18} for 2 days", ENDED, "-18", True),
        (r"\boxed{\frac{3}{4}} of 8", ENDED, "3/4", True),
        (r"\boxed{\frac34} of 8", CUT_OFF, "3/4", True),
        (r"So \boxed{x^{2}} is it", ENDED, "x^{2}", True),
        ("The answer is\n\\[\n18\n\\]\nfor 2 days", ENDED, "18", True),
        # Which mark
        ("#### 18\n\nQuestion: What is 3 + 4?\n#### 7", ENDED, "#### 18", True),
        ("#### 18\n\nTom has 3 and buys 4.\n#### 7", ENDED, "#### 18", True),
        ("The answer is 18.\n\nQ: What is 3 + 4?\nA: The answer is 7.", ENDED, "18", True),
        ("The answer is 18.\n\n### Problem 2:\nWhat is 3 + 4?\n#### 7", ENDED, "18", True),
        ("The answer is 5? No, wait. The answer is 18 in 2 days.", ENDED, "18", True),
        ("#### Step 1: 9\n9 eggs\n#### Step 2: 9 * 2\n#### 18\nin 3 steps", ENDED, "18", True),
        # Signs
        ("the answer is -$5.", ENDED, "#### -5", True),
        ("It is $-5", ENDED, "-5", True),
        ("It is \u2212$5.", ENDED, "-5", True),
        ("15-10 = 20-15", ENDED, "15", True),
        # Points, commas and fractions
        ("The answer is .5", ENDED, "#### 5", False),
        ("The answer is .5", ENDED, "#### 0.5", True),
        ("The answer is 5", ENDED, ".5", False),
        ("It is one of 1,2,18", ENDED, "18", True),
        ("It is 3/4", ENDED, "4", False),
        ("It is 3/4", ENDED, "0.75", True),
        ("It is 3/0", ENDED, "1", False),
        ("The answer is 1 1/2 cups.", ENDED, "1.5", True),
        (r"\boxed{1\frac{1}{2}}", ENDED, "1.5", True),
        (r"\boxed{1\frac{1}{2}}", ENDED, "5.5", False),
        ("The answer is -2 1/2.", ENDED, "-2.5", True),
        # Marks inside a passage that hold no answer, and marks of other things
        ("The answer is 18, so the first answer is right.", ENDED, "18", True),
        ("#### 18 (the answer is in dollars)", ENDED, "18", True),
        ("##### Part 2\nThe answer is 18.", ENDED, "18", True),
        ("#### 18", ENDED, "The answer is 9 * 2 = 18\n#### 18", True),
        # Exponents and indices
        ("The answer is 10**3.", ENDED, "103", False),
        ("18 m^2", ENDED, "18", True),
        ("18 = x_1", ENDED, "18", True),
        ("18 = 2x^{3}", ENDED, "3", False),
        ("18 cm**2", ENDED, "18", True),
        ("It costs **18**.", ENDED, "18", True),
        # Text
        ("**The Answer is Paris.**", ENDED, "Paris", True),
        (r"#### The answer is \boxed{\text{Paris}}.", ENDED, "paris", True),
        ("The answer is 5.", ENDED, "room 5", False),
        # Cut off: the end of the answer must be there.
        ("9 + 9 = 18", CUT_OFF, "18", False),
        ("18", CUT_OFF, "18", False),
        ("Paris", CUT_OFF, "Paris", False),
        ("The answer is 18", CUT_OFF, "18", False),
        ("The answer is 18.", CUT_OFF, "18", False),
        ("The answer is 9 * 2", CUT_OFF, "9", False),
        (r"\boxed{18", CUT_OFF, "18", False),
        (r"\boxed{18", ENDED, "18", True),
        (r"So \boxed{18} is the sum of 9 and", CUT_OFF, "18", True),
        ("#### 18\n#### 1", CUT_OFF, "18", True),
        ("The answer is 18. The answer is 18. The answer is 1", CUT_OFF, "18", True),
        ("The Answer is Paris.\nIt", CUT_OFF, "Paris", True),
    ],
)
def test_exact_match_of_what_models_write(response, finished, answer, right):
    assert train.exact_match(response, answer, finished) is right


def test_an_output_that_was_cut_off_in_mid_sum_is_not_right():
    (row,) = validation_rows(["9 + 9 = 18"], answer="18")
    assert train.is_right(row)
    row["outputs"][0]["finished"] = False
    assert not train.is_right(row) and train.measure([row])["exact_match"] == 0


def validation_rows(responses, **fields):
    counts = {"score": 1.0, "thought_tokens": 3, "response_tokens": 1, "tries": 1}
    counts["finished"] = True
    seed = {"response": "1", **counts}
    outputs = ([{"response": r, **counts}, seed] for r in responses)
    return [{"instruction": "?", **fields, "outputs": both} for both in outputs]


@pytest.mark.reference
def test_exact_match_has_an_interval_over_the_instructions_with_answers():
    """81 of 263: R's prop.test(81, 263, correct = FALSE)."""
    asked = validation_rows(["7"] * 81 + ["8"] * 181 + [None], answer="7", category="sum")
    free = validation_rows(["7"] * 50, category="chat")
    rows, chat = (train.measure(part) for part in (asked + free, free))
    assert rows["count"] == 313 and rows["exact_match"] == 81 / 263
    assert rows["exact_match_interval"] == pytest.approx([0.2553, 0.3662], abs=6e-5)
    assert chat["exact_match"] is chat["exact_match_interval"] is None
    row = {"stage": "validation", "thought": "none"}
    table = train.report([{**row, "iteration": 1, **rows}, {**row, "iteration": 2, **chat}])
    cells = [re.split(r" {2,}", line)[:3] for line in table.splitlines()]
    assert ["iteration 1", "30.8% (26 to 37)", "50.0% (44 to 56)"] in cells
    assert ["iteration 2", "-", "50.0% (37 to 63)"] in cells


def test_where_nothing_can_be_cut_there_is_no_score_and_every_comparison_is_lost():
    (row,) = validation_rows([None], answer="7")
    row["outputs"][0]["score"] = None
    measured = train.measure([row])
    assert measured["score"] is measured["thought_tokens"] is None
    assert measured["win_rate"] == measured["exact_match"] == 0 and measured["unparsed_left"] == 1


def longer_wins(tokenizer):
    """In place of `generate`: verdicts of a pairwise judge that likes length.

    Of two that are equally long it names both or neither. It keeps the prompts under `asked`.
    """

    def verdict(prompt):
        a, b = (prompt.split(f"{x}'s Answer]\n")[1].split("\n[The End")[0] for x in "AB")
        if len(a) == len(b):
            return "[[A]] or [[B]]" if len(a) % 2 else "no idea"
        return f"because. [[{'A' if len(a) > len(b) else 'B'}]]"

    def generate(model, prompts, *law, **more):
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        generate.asked += texts
        return [[sample.Completion(tokenizer.encode(verdict(text)), True)] for text in texts]

    generate.asked = []
    return generate


def test_a_pairwise_judge_compares_each_response_with_the_seeds_once(world, tmp_path, monkeypatch):
    judge, folder = write_tokenizer(tmp_path / "judge"), tmp_path / "run"
    write_checkpoint(judge, LLAMA | {"max_position_embeddings": 4096})
    verdicts = longer_wins(lm.load_tokenizer(judge))
    monkeypatch.setattr(judging, "generate", verdicts)
    monkeypatch.setattr(judging.Pairwise, "verdict_tokens", 4)
    flags = ["--judge", judge, "--iterations", 1, "--thought", "none"]
    run(world, folder, *flags)
    # Two orders of the held-out responses beside the seed's: the seed's own, and two epochs'. And
    # all orders of two of the responses to 10 instructions. An empty response is none.
    asked = sum(
        len(row["verdicts"]) for path in folder.rglob("*scores.jsonl") for row in read(path)
    )
    epochs = rows_of(folder, "epoch")
    assert len(epochs) == 2 and 84 < asked <= len(verdicts.asked) <= 3 * 6 * 2 + 10 * 4 * 3
    scores = read(folder / "iteration-1" / "scores.jsonl")
    counts = [sum(bool(output["response"]) for output in row["outputs"]) for row in scores]
    assert [len(row["verdicts"]) for row in scores] == [n * (n - 1) for n in counts]
    rows = rows_of(folder, "validation")
    assert rows[0]["win_rate"] == 0.5 and rows[0]["score"] == 0
    ours, theirs = (
        [row["outputs"][0]["response"] for row in read(folder / name)]
        for name in ("iteration-1/validation.jsonl", "iteration-0/validation-none.jsonl")
    )
    points = [(len(a) > len(b)) + (len(a) == len(b)) / 2 for a, b in zip(ours, theirs, strict=True)]
    assert rows[1]["win_rate"] == sum(points) / 6 and 0 < sum(points) < 6
    by_category = [rows[1]["by_category"][category]["win_rate"] for category in "ab"]
    assert by_category == [sum(points[0::2]) / 3, sum(points[1::2]) / 3]
    win = 200 * math.log10(2.5 / 0.5)  # Elo of two wins and none, with half a win more each way
    assert rows[1]["score"] == pytest.approx(win * (2 * sum(points) / 6 - 1), abs=1e-5)


# Options and refusals


def test_a_recipe_is_flags_and_a_flag_wins(world, tmp_path):
    file, names = tmp_path / "recipe.json", {"model", "lr", "reject_failed", "select"}
    (tmp_path / "seed").mkdir()
    values = {"model": "seed", "lr": 1e-3, "reject_failed": False, "select": None}
    file.write_text(json.dumps(values))
    flags = train.read_recipe(file, names)
    assert flags == [f"--model={tmp_path / 'seed'}", "--lr=0.001", "--no-reject-failed"]
    with pytest.raises(lm.InputError, match="'lr'"):
        train.read_recipe(file, names - {"lr"})
    # Of the recipe, of the defaults, and of flags that win over both.
    own = options_of(world)
    assert own.sampling.num_samples == 4 and own.options.instructions == str(world / "train.jsonl")
    assert (own.options.rho, own.options.reject_failed, own.sampling.resample) == ("auto", True, 3)
    assert own.dpo == dpo.Options(epochs=2, batch_size=8, lr=1e-3)
    values = json.loads((world / "recipe.json").read_text())
    for switch in (True, False):
        (world / "switch.json").write_text(json.dumps({**values, "reject_failed": switch}))
        recipe = ["--recipe", world / "switch.json"]
        assert options_of(world, *recipe).options.reject_failed is switch
        flag = "--no-reject-failed" if switch else "--reject-failed"
        assert options_of(world, *recipe, flag, "--epochs", 7).options.reject_failed is not switch
        assert options_of(world, *recipe, "--epochs", 7).dpo.epochs == 7


REFUSALS = {
    "few instructions": ("--iterations 5", "40 different instructions, 50 are needed"),
    "no folder": ("--model /nowhere/at all", "no such folder"),
    "no file": ("--instructions /nowhere.jsonl", "No such file"),
    "no recipe": ("--recipe /nowhere.json", "No such file"),
    "an unknown name in a recipe": (
        "--recipe UNKNOWN",
        "recipe.json: 'colour' is not an option of train.py",
    ),
    "nan": ("--lr nan", "argument --lr: nan is out of range"),
    "negative": ("--rho -1", "argument --rho: -1 is neither auto nor"),
    "words": ("--rho much", "argument --rho: invalid number_or_auto value: 'much'"),
    "zero": ("--iterations 0", "argument --iterations: 0 is out of range"),
    "a choice": ("--thought worst", "--thought"),
    "no number": ("--epochs many", "--epochs"),
    "an unknown option": ("--colour red", "--colour"),
    "device": ("--device cuda:77", "--device cuda:77"),
    "dtype": ("--dtype float16", "--dtype: invalid choice: 'float16'"),
    "overlap": ("--validation OVERLAP", "train  0"),
    "a long prompt": ("--validation LONG", "the prompt of instruction 2 has"),
    "not JSON": ("--validation BROKEN", "validation.jsonl:2: not UTF-8 JSON"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(world, tmp_path, name):
    flags, expected = REFUSALS[name]
    file = tmp_path / "validation.jsonl"
    rows = {"OVERLAP": "train  0", "LONG": "x" * 600}
    for word, text in rows.items():
        if word in flags:
            lm.write_jsonl(file, [{"instruction": "one"}, {"instruction": text}])
    if "BROKEN" in flags:
        file.write_text('{"instruction": "one"}\n{"instruction": \n')
    unknown = tmp_path / "recipe.json"
    unknown.write_text('{"colour": "red"}')
    places = {"UNKNOWN": unknown, **dict.fromkeys(("BROKEN", *rows), file)}
    words = [places.get(word, word) for word in flags.split(" ", 1)]
    with pytest.raises((lm.InputError, OSError)) as refusal:
        run(world, tmp_path / "run", *words)
    assert expected in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "run" / "iteration-1").exists()


# The toy world


def test_the_default_run_begins_with_the_toy_world(tmp_path, monkeypatch):
    """`python train.py`, cut short: the committed world loads, samples, judges, trains."""
    held_out = (TOY / "validation.jsonl").read_text().splitlines()[:7]
    (tmp_path / "few.jsonl").write_text("\n".join(held_out))
    flags = "--iterations 1 --prompts-per-iteration 6 --num-samples 4 --epochs 1".split()
    flags += "--validation few.jsonl --micro-batch-tokens 512 --output run".split()
    words = ["train.py", *flags]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    with contextlib.redirect_stdout(io.StringIO()) as text:
        train.main()
    assert "seed, to think" in text.getvalue() and "iteration 1" in text.getvalue()
    rows = rows_of(tmp_path / "run", "validation")
    assert [row["thought"] for row in rows] == ["none", "specific", "specific"]
    options = json.loads((tmp_path / "run" / "options.json").read_text())
    recipe = json.loads((TOY / "recipe.json").read_text())
    kept = [
        key
        for key in recipe
        if key not in train.PATHS and f"--{key.replace('_', '-')}" not in words
    ]
    assert len(kept) > 5 and [options[key] for key in kept] == [recipe[key] for key in kept]


def test_the_toy_world_is_small():
    assert sum(path.stat().st_size for path in TOY.rglob("*") if path.is_file()) < 8 * 2**20


def test_the_toy_world_is_made_from_nothing(tmp_path, monkeypatch):
    """make.py with few examples: the instructions are the committed ones, both folders load."""
    monkeypatch.syspath_prepend(TOY)
    make = importlib.import_module("make")
    small = {"HERE": tmp_path, "TEXTS": 50, "BASE": (16, 4e-3), "TUNING": (16, 1e-3)}
    for name, value in {**small, "JUDGING": (32, 3e-3)}.items():
        monkeypatch.setattr(make, name, value)
    for name in ("report_policy", "report_judge"):
        own = getattr(make, name)
        monkeypatch.setattr(make, name, lambda *given, own=own: own(*given[:-1], given[-1][:1]))
    monkeypatch.setattr(make.torch, "set_num_threads", lambda count: None)
    # Its iteration is in 16 bits, which a CPU may do slowly.
    monkeypatch.setattr(make.torch.optim, "Muon", partial(make.torch.optim.Muon, ns_steps=1))
    monkeypatch.setattr(sys, "argv", ["make.py"])
    make.main()
    for name in ("train.jsonl", "validation.jsonl", "recipe.json"):
        assert (tmp_path / name).read_bytes() == (TOY / name).read_bytes()
    for name in ("policy", "judge"):
        found, wanted = (
            json.loads((folder / name / "config.json").read_text()) for folder in (tmp_path, TOY)
        )
        assert {**found, "vocab_size": wanted["vocab_size"]} == wanted
    judging.load_judge(tmp_path / "judge").score("a", ["b"])


def test_the_toy_judge_learns_from_a_batch_without_a_word_to_grade(tmp_path, monkeypatch):
    """An answer of another length than the right one has a grade, but no word of it has."""
    monkeypatch.syspath_prepend(TOY)
    make = importlib.import_module("make")
    base = make.begin(lm.LanguageModel(make.write_config(tmp_path, 50, make.POLICY_LAYERS)))
    judge = make.JudgeInTraining(make.Judge(base, make.JUDGE_LAYERS))
    make.grade_loss(judge, [([1, 2, 3], [math.nan, math.nan, 1.0], [-1, -1, -1])]).backward()
    assert judge.judge.score.weight.grad.abs().max() > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in judge.parameters())


def test_the_ablations_say_of_an_arm_that_it_stopped(finished, stopped, tmp_path, monkeypatch):
    """An arm whose seed cannot be cut ends its own row, not the command; another is not run."""
    folders = {"TPO": finished[0], "system prompt": stopped[0]}
    monkeypatch.setattr(reproduce, "folder_of", lambda arm, seed: folders.get(arm, tmp_path / "no"))
    for folder, status in ((stopped[0], 2), (finished[0], 2), (stopped[0], 1)):
        folders["arm"], ends = folder, contextlib.nullcontext()
        if (folder, status) != (stopped[0], 2):
            ends = pytest.raises(SystemExit, match="arm, seed 0: why")
        done = mock.Mock(returncode=status, stderr="warning\nwhy\n")
        with mock.patch.object(reproduce.subprocess, "run", return_value=done), ends:
            reproduce.train("arm", [], 0)
    lines = reproduce.ablations([0]).splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines[2:]}
    assert "stopped" in rows["system prompt"] and "not run" in rows["K 2"]
    last = rows_of(finished[0], "validation", iteration=4)[0]
    assert f"{100 * last['win_rate']:.1f}" in rows["TPO"]
    assert len({len(line) for line in lines}) == 1


def test_the_figure_draws_the_logs_series(finished, tmp_path, monkeypatch):
    direct, rows = plot.read_run(finished[0])
    assert direct["thought"] == "none" and [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]
    points = plot.series(rows, "win_rate")
    assert [value for _, value, _, _ in points] == [100 * row["win_rate"] for row in rows]
    assert points[1][2:] == tuple(100 * end for end in rows[1]["win_rate_interval"])
    assert plot.series([{"iteration": 1, "exact_match": None}], "exact_match") == []
    # Newcombe 1998, method 10: 56 of 70 against 48 of 80.
    shares = [
        {"exact_match": n / of, "exact_match_interval": judging.wilson_interval(n / of, of)}
        for n, of in ((48, 80), (56, 70))
    ]
    gain = plot.gains(*({"by_category": {"a": share}} for share in shares))["a"]
    assert gain == pytest.approx((20, 5.24, 33.39), abs=0.006)
    output = tmp_path / "figure.svg"
    monkeypatch.setattr(sys, "argv", ["plot.py", str(finished[0]), "--output", str(output)])
    if importlib.util.find_spec("matplotlib"):
        plot.main()
        assert output.read_bytes().startswith(b"<?xml")
    else:
        with pytest.raises(lm.InputError, match="matplotlib: not installed"):
            plot.main()
