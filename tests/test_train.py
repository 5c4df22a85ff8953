"""The loop, end to end on tiny random checkpoints: files, log, resume, refusals.

pytest tests/test_train.py
"""

import argparse
import gc
import importlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import huggingface_hub
import pytest
from conftest import (
    LLAMA,
    LLAMA_TEMPLATE,
    byte_tokenizer,
    longer_wins,
    write_checkpoint,
    write_tokenizer,
)
from faults import contents

import model
import train
from model import InputError, read_jsonl
from sample import thought_prompt

ROOT = Path(__file__).resolve().parents[1]
REWARD = {**LLAMA, "architectures": ["LlamaForSequenceClassification"], "num_labels": 1}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A policy and a judge of random weights, instructions, and a recipe of two iterations."""
    folder = tmp_path_factory.mktemp("world")
    settings = {"eos_token": "<|eot_id|>", "bos_token": "<|begin_of_text|>"}
    for seed, (name, config) in enumerate({"policy": LLAMA, "judge": REWARD}.items()):
        write_checkpoint(folder / name, config, seed=seed)
        byte_tokenizer().save(str(folder / name / "tokenizer.json"))
        settings["chat_template"] = LLAMA_TEMPLATE
        (folder / name / "tokenizer_config.json").write_text(json.dumps(settings))
        stops = {"eos_token_id": list(range(0, 260, 8))}  # random weights would rarely stop
        (folder / name / "generation_config.json").write_text(json.dumps(stops))
    for name, count in (("train", 20), ("validation", 6)):
        rows = [
            {"instruction": f"{name} {'x' * (i % 7)} {i}", "answer": str(i), "category": c}
            for i, c in zip(range(count), "ab" * count, strict=False)
        ]
        write_lines(folder / f"{name}.jsonl", rows)
    recipe = {
        "model": "policy",
        "judge": "judge",
        "instructions": "train.jsonl",
        "validation": "validation.jsonl",
        "thought": "none",
        "iterations": 2,
        "prompts_per_iteration": 10,
        "num_samples": 4,
        "max_new_tokens": 24,
        "epochs": 2,
        "batch_size": 4,
        "lr": 1e-3,
        "group": 4,
        "save_steps": 1,
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


def command(world, output, *flags):
    recipe = ["--recipe", str(world / "recipe.json"), "--output", str(output)]
    return [sys.executable, str(ROOT / "train.py"), *recipe, *map(str, flags)]


def run(world, output, *flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(world, output, *flags), capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    done = run(world, folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_run_folder_holds_what_the_design_names(finished):
    folder, output = finished
    assert json.loads((folder / "options.json").read_text())["iterations"] == 2
    for t in (1, 2):
        names = {path.name for path in (folder / f"iteration-{t}").iterdir()}
        assert {"samples.jsonl", "scores.jsonl", "pairs.jsonl", "checkpoint"} <= names
        assert not {name for name in names if name.startswith(("epoch", "state"))}
    rows = [row for _, row in read_jsonl(folder / "log.jsonl")]
    validation = [row for row in rows if row["stage"] == "validation"]
    assert [row["iteration"] for row in validation] == [0, 1, 2]
    for row in validation:
        assert row["thought"] == "none" and set(row["by_category"]) == {"a", "b"}
        for key in ("score", "win_rate", "exact_match", "unparsed", "thought_tokens"):
            assert isinstance(row[key], (int, float)), key
    assert validation[0]["win_rate"] == 0.5  # the seed asked directly, against itself
    assert "iteration 2" in output and "| seed, asked directly" in output


def test_iterations_use_fresh_instructions_and_train_on_what_they_sampled(finished):
    folder, _ = finished
    used = []
    for t in (1, 2):
        samples = [row for _, row in read_jsonl(folder / f"iteration-{t}" / "samples.jsonl")]
        used += [row["instruction"] for row in samples]
        by_instruction = {row["instruction"]: row for row in samples}
        for _, pair in read_jsonl(folder / f"iteration-{t}" / "pairs.jsonl"):
            row = by_instruction[pair["instruction"]]
            assert pair["prompt_ids"] == row["prompt_ids"]
            ids = [output["ids"] for output in row["outputs"]]
            assert pair["chosen_ids"] in ids and pair["rejected_ids"] in ids
    assert len(used) == len(set(used)) == 20


def test_a_second_start_changes_nothing(finished, world):
    folder, _ = finished
    before = contents(folder)
    again = run(world, folder)
    assert again.returncode == 0, again.stderr
    assert contents(folder) == before


def test_killed_at_any_moment_it_ends_with_the_same_bytes(finished, world, tmp_path):
    """SIGKILL at random moments until a run comes through; TPO_KILLS asks for more of them."""
    folder, _ = finished
    expected, moments = contents(folder), random.Random(0)
    kills, wanted = 0, int(os.environ.get("TPO_KILLS", "6"))
    for round_ in range(1000):
        output = tmp_path / f"run-{round_}"
        while True:
            process = subprocess.Popen(
                command(world, output),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            patience = moments.uniform(1.5, 7) if kills < wanted else 600
            try:
                _, stderr = process.communicate(timeout=patience)
                assert process.returncode == 0, stderr.decode()
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
        assert contents(output) == expected
        shutil.rmtree(output)
        if kills >= wanted:
            break
    assert kills >= wanted


@pytest.mark.parametrize("fault", ["kill", "full"])
def test_stopped_at_changes_of_its_folder_it_ends_with_the_same_bytes(
    fault, finished, world, tmp_path
):
    """By SIGKILL or a full disk, see faults.py; TPO_EVERY=1 stops at every change, in minutes."""
    every = os.environ.get("TPO_EVERY", "19")
    words = [sys.executable, faults.__file__, fault, str(finished[0]), str(tmp_path / "stopped")]
    done = subprocess.run(
        [*words, every, "--recipe", str(world / "recipe.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    changes = {"kill": 588, "full": 378}[fault]  # of the whole chain, when this was written
    assert int(done.stdout.split()[1]) >= 0.9 * changes // int(every)


def test_a_hub_id_is_resolved_once_a_run(world, tmp_path, monkeypatch):
    """A run that goes on keeps to its revisions and asks the hub for nothing."""
    asked, newest = [], "aaa"

    def model_info(self, name, revision, timeout):
        asked.append(name)
        return huggingface_hub.ModelInfo(id=name, sha=newest, tags=[])

    def download(name, revision, local_files_only, **patterns):
        folder = tmp_path / name / "snapshots" / revision
        if not folder.exists():
            assert not local_files_only
            shutil.copytree(world / name.removeprefix("org/"), folder)
        return str(folder)

    def start(*flags):
        hub = ["--model", "org/policy", "--judge", "org/judge", "--iterations", 1, "--epochs", 1]
        monkeypatch.setattr(sys, "argv", command(world, tmp_path / "run", *hub, *flags)[1:])
        asked.clear()
        model.hub_folder.cache_clear()  # as in a new process
        train.main()

    def stop(run, t):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for flags, revision in (((), "aaa"), (("--overwrite",), "bbb")):
        newest = revision
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train, "judge_stage", stop)
            start(*flags)
        gc.collect()  # the lock of the stopped run
        assert asked == ["org/policy", "org/judge"]
        options = json.loads((tmp_path / "run" / "options.json").read_text())
        assert options["model_revision"] == options["judge_revision"] == revision
    newest = "ccc"
    start()
    assert not asked and (tmp_path / "run" / "iteration-1" / "checkpoint").is_dir()
    model.hub_folder.cache_clear()


def test_other_options_are_refused_by_name(finished, world):
    done = run(world, finished[0], "--beta", 0.2)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "beta" in done.stderr and "0.2" in done.stderr


def test_a_changed_file_is_refused(finished, world, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    with open(folder / "iteration-1" / "samples.jsonl", "a") as file:
        file.write("{}\n")
    done = run(world, folder)
    assert done.returncode == 2 and "samples.jsonl" in done.stderr


def test_a_second_process_is_refused_and_sigterm_says_how_to_go_on(world, tmp_path):
    words = command(world, tmp_path / "run", "--epochs", 999)  # longer than the second's start
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (tmp_path / "run" / "options.json").exists():
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)  # else it may end before the second has begun
    second = run(world, tmp_path / "run")
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2 and "another process" in second.stderr
    _, stderr = first.communicate()
    last = stderr.decode().strip().splitlines()[-1]
    assert first.returncode == 130 and "the same command goes on" in last


REFUSALS = {
    "few instructions": (["--iterations", 3], "found 20 instructions, expected 30"),
    "not a folder": (["--model", "/nowhere/at all"], "no such folder"),
    "a policy as judge's head": (["--judge", "JUDGE2"], "labels"),
    "no file": (["--instructions", "/nowhere.jsonl"], "no such file"),
    "nan": (["--lr", "nan"], "--lr"),
    "negative": (["--rho", "-1"], "--rho"),
    "zero": (["--iterations", "0"], "--iterations"),
    "device": (["--device", "cuda:77"], "--device"),
    "overlap": (["--validation", "OVERLAP"], "also stands in"),
    "no recipe": (["--recipe", "/nowhere.json"], "no such file"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(world, tmp_path, name, monkeypatch):
    flags, expected = REFUSALS[name]
    overlap, two_labels = tmp_path / "overlap.jsonl", tmp_path / "judge"
    write_lines(overlap, [{"instruction": "train  0"}])
    shutil.copytree(world / "judge", two_labels)
    (two_labels / "config.json").write_text(json.dumps({**REWARD, "num_labels": 2}))
    places = {"OVERLAP": str(overlap), "JUDGE2": str(two_labels)}
    words = [places.get(flag, str(flag)) for flag in flags]
    monkeypatch.setattr(sys, "argv", command(world, tmp_path / "run", *words)[1:])
    with pytest.raises(InputError) as refusal:
        train.main()
    assert expected in str(refusal.value) and "\n" not in str(refusal.value)


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
        ("", "7", False),
        (None, "7", False),
        ("7.0", "7", True),
    ],
)
def test_exact_match(response, answer, right):
    assert train.exact_match(response, answer) is right


def validation_rows(responses, **fields):
    counts = {"score": 1.0, "thought_tokens": 3, "response_tokens": 1}
    return [
        {"instruction": "?", **fields, "outputs": [{"response": r, **counts}]} for r in responses
    ]


def test_exact_match_has_an_interval_over_the_instructions_with_answers():
    """81 of 263: R's prop.test(81, 263, correct = FALSE), as in test_judge.py."""
    asked = validation_rows(["7"] * 81 + ["8"] * 181 + [None], answer="7", category="sum")
    free = validation_rows(["7"] * 50, category="chat")
    rows, chat = (train.measure([(row, 1.0) for row in part]) for part in (asked + free, free))
    assert rows["count"] == 313 and rows["exact_match"] == 81 / 263
    assert rows["exact_match_interval"] == pytest.approx([0.2553, 0.3662], abs=6e-5)
    assert chat["exact_match"] is chat["exact_match_interval"] is None
    row = {"stage": "validation", "iteration": 1, "thought": "none", **rows}
    table = train.report({"run": [{**row, "by_category": {"chat": chat, "sum": rows}}]})
    assert "| run | iteration 1 | 30.8% (26 to 37) | 50.0% (44 to 56) |" in table
    assert "| run | iteration 1 | -    | 30.8% (26 to 37) |" in table


def test_a_pairwise_judge_compares_each_response_with_the_seeds_once(world, tmp_path, monkeypatch):
    judge, folder = write_tokenizer(tmp_path / "judge"), tmp_path / "run"
    write_checkpoint(judge, LLAMA | {"max_position_embeddings": 4096})
    verdicts = longer_wins(model.load_tokenizer(judge))
    monkeypatch.setattr(train.judging, "generate", verdicts)
    flags = ["--judge", judge, "--iterations", 1, "--verdict-tokens", 4]
    monkeypatch.setattr(sys, "argv", command(world, folder, *flags)[1:])
    train.main()
    # Two orders of 6 held-out responses beside the seed's: the seed's own, and two epochs'. And
    # all orders of two of the 4 responses to 10 instructions.
    assert len(verdicts.asked) == 3 * 6 * 2 + 10 * 4 * 3
    rows = [row for _, row in read_jsonl(folder / "log.jsonl") if row["stage"] == "validation"]
    assert rows[0]["win_rate"] == 0.5 and rows[0]["score"] == 0
    ours, theirs = (
        [row["outputs"][0]["response"] for _, row in read_jsonl(folder / name)]
        for name in ("iteration-1/validation.jsonl", "iteration-0/validation-none.jsonl")
    )
    points = [(len(a) > len(b)) + (len(a) == len(b)) / 2 for a, b in zip(ours, theirs, strict=True)]
    assert rows[1]["win_rate"] == sum(points) / 6 and 0 < sum(points) < 6
    by_category = [rows[1]["by_category"][category]["win_rate"] for category in "ab"]
    assert by_category == [sum(points[0::2]) / 3, sum(points[1::2]) / 3]
    win = 200 * math.log10(2.5 / 0.5)  # Elo of two wins and none, with half a win more each way
    assert rows[1]["score"] == pytest.approx(win * (2 * sum(points) / 6 - 1), abs=1e-5)


def test_thought_prompts_are_the_papers():
    assert thought_prompt("{instruction}?", "none") == "{instruction}?"
    for style, marker in (("specific", '"<R>".'), ("generic", '"Here is my response:".')):
        text = thought_prompt("Why?", style)
        assert text.startswith("Respond to the following user query in a comprehensive and ")
        assert text.endswith(f"{marker}\nUser query: Why?")


def test_the_default_run_begins_with_the_toy_world(tmp_path):
    """`python train.py`, cut short: the committed world loads, samples, judges, trains."""
    short = ["--iterations", "1", "--prompts-per-iteration", "12", "--num-samples", "4"]
    words = [sys.executable, str(ROOT / "train.py"), "--output", str(tmp_path / "run"), *short]
    done = subprocess.run([*words, "--epochs", "1"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| seed, asked to think" in done.stdout and "iteration 1" in done.stdout
    rows = [row for _, row in read_jsonl(tmp_path / "run" / "log.jsonl")]
    seed = [row["thought"] for row in rows if row["stage"] == "validation"][:2]
    assert seed == ["none", "specific"]


def test_the_toy_judge_learns_from_a_batch_without_a_word_to_grade(monkeypatch):
    """An answer of another length than the right one has a grade, but no word of it has."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "toy")
    make = importlib.import_module("make")
    base = make.begin(model.LanguageModel(make.make_config(50, make.POLICY_LAYERS)))
    judge = make.JudgeInTraining(make.Judge(base, make.JUDGE_LAYERS))
    make.grade_loss(judge, [([1, 2, 3], [math.nan, math.nan, 1.0], [-1, -1, -1])]).backward()
    assert judge.judge.score.weight.grad.abs().max() > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in judge.parameters())


def test_the_toy_world_is_small():
    toy = ROOT / "tests" / "toy"
    assert sum(path.stat().st_size for path in toy.rglob("*") if path.is_file()) < 8 * 2**20


def test_a_flag_wins_over_a_recipe_s_switch():
    parser = argparse.ArgumentParser()
    model.add_options(parser, train.Options)
    for flags, expected in (
        (["--no-reject-failed"], False),
        (["--reject-failed"], True),
        ([], True),
    ):
        values = {"reject_failed": True, **vars(parser.parse_args(flags))}
        assert model.read_options(train.Options, values).reject_failed is expected
