"""Thought Preference Optimization (Figure 1, section 2.2): the iterations.

    M_0 is the seed. At iteration t, M_(t-1) writes K outputs, thought and response, for each of
    some fresh instructions; a judge scores the responses and never sees a thought; the best and
    the worst output of an instruction become a pair; DPO on the pairs gives M_t.

In: the folders of a policy and a judge, files of instructions. Out: a run's folder, with
options.json, log.jsonl, and for each iteration samples.jsonl, scores.jsonl, pairs.jsonl and
checkpoint/ in Hugging Face's layout.

    python train.py                                 # the toy world of tests/toy, in minutes
    python train.py --model meta-llama/Meta-Llama-3-8B-Instruct \\
        --judge RLHFlow/ArmoRM-Llama3-8B-v0.1 --instructions ultrafeedback.jsonl \\
        --validation heldout.jsonl --device cuda --dtype bfloat16       # the paper's run
    python train.py --report runs/a runs/b          # finished runs side by side

The same command on a run's folder goes on from where it stood. Only one model is on the device at
a time: the policy, then the judge, then the policy again.
"""

import argparse
import fcntl
import gc
import math
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

import dpo
import judge as judging
import sample
from model import (
    DTYPES,
    GIB,
    InputError,
    LanguageModel,
    add_options,
    check_device,
    checkpoint_folder,
    file_hash,
    folder_hash,
    load_model,
    load_tokenizer,
    option,
    read_config,
    read_json,
    read_jsonl,
    read_options,
    run_main,
    save_model,
    stream,
    write_aside,
    write_groups,
    write_json,
    write_jsonl,
)

TOY_RECIPE = Path(__file__).parent / "tests" / "toy" / "recipe.json"
PATHS = ("model", "judge", "instructions", "validation")


@dataclass
class Options:
    """The loop's own options; sample.py, judge.py and dpo.py add theirs."""

    model: str = option(None, "the seed M_0: checkpoint folder or hub id", kind=str)
    judge: str = option(None, "the judge: checkpoint folder or hub id", kind=str)
    instructions: str = option(None, "file of training instructions", kind=str)
    validation: str = option(None, "file of held-out instructions", kind=str)
    output: str = option(None, "the run's folder; ours: runs/ and the thought's style", kind=str)
    iterations: int = option(4, "rounds of sampling and DPO; paper: up to 4", low=1)
    prompts_per_iteration: int = option(5000, "fresh instructions a round; paper 3.1", low=1)
    rho: float = option(0.25, "length control, 0 to 0.5 in the paper; ours", low=0, high=10)
    reject_failed: bool = option(False, "reject outputs that cannot be cut or did not end; ours")
    select: str = option("best", "kept epoch; paper: best on validation", choices=("best", "last"))
    keep: str = option(
        "all", "checkpoints kept: of all iterations, or the last; ours", choices=("all", "last")
    )
    device: str = option("cpu", "cpu, cuda, cuda:1, ...")
    dtype: str = option("float32", "of the weights", choices=DTYPES)


ALL_OPTIONS = (Options, sample.Options, judging.Options, dpo.Options)


class Run:
    """A run's folder, its options, and its log; what every stage below is handed."""

    def __init__(self, values, overwrite=False):
        self.options, self.sampling, self.judging, self.dpo = (
            read_options(options, values) for options in ALL_OPTIONS
        )
        for name in PATHS:
            if getattr(self.options, name) is None:
                raise InputError(f"--{name}: found none, expected a path")
        self.folder = Path(self.options.output or f"runs/{self.sampling.thought}")
        self.device, self.dtype = check_device(self.options.device), DTYPES[self.options.dtype]
        file = self.folder / "options.json"
        kept = read_json(file) if file.exists() and not overwrite else {}
        self.folders = {}
        for name in ("model", "judge"):  # of a hub id, the revision that the run began with
            path = getattr(self.options, name)
            revision = kept.get(f"{name}_revision") if kept.get(name) == path else None
            self.folders[name] = checkpoint_folder(path, revision)
        self.where = "before the first stage"  # what a stopped run says of itself
        self.log_rows = []

    def iteration_folder(self, t):
        return self.folder / f"iteration-{t}"

    def policy_folder(self, t):
        """The folder of M_t: the seed, or what iteration t trained."""
        return self.iteration_folder(t) / "checkpoint" if t else self.folders["model"]

    def load_policy(self, t):
        return load_model(self.policy_folder(t), self.device, self.dtype)

    def load_judge(self):
        return judging.load_judge(self.folders["judge"], self.device, self.dtype, self.judging)

    def log(self, row, *keys):
        """Adds a row to log.jsonl; one that a killed process wrote under the same keys goes."""
        keys = ("stage", "iteration", *keys)
        kept = [old for old in self.log_rows if any(old.get(k) != row.get(k) for k in keys)]
        self.log_rows = [*kept, row]
        write_jsonl(self.folder / "log.jsonl", self.log_rows)

    def finished(self, path, stage, t):
        """Whether a stage's file is there and in the log, and is the one that the log tells of."""
        for row in self.log_rows if path.exists() else ():
            if (row["stage"], row["iteration"]) == (stage, t):
                if row["sha256"] == file_hash(path):
                    return True
                raise InputError(f"{path}: changed since the run wrote it; --overwrite starts anew")
        return False


def release():
    """Gives the memory of a model that went out of use back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# The loop


def tpo(run, rows, held_out):
    """Runs every iteration of TPO. rows, held_out: training and validation instructions."""
    validate_seed(run, held_out)
    n, iterations = run.options.prompts_per_iteration, range(1, run.options.iterations + 1)
    newest = max((t for t in iterations if run.policy_folder(t).exists()), default=0)
    for t in iterations:
        run.iteration_folder(t).mkdir(exist_ok=True)
        sample_stage(run, t, rows[(t - 1) * n : t * n])
        judge_stage(run, t)
        if t >= newest:  # with --keep last, the checkpoints before the newest are gone
            train_stage(run, t, held_out)
            select_stage(run, t)
        if run.options.keep == "last" and t > 1:
            shutil.rmtree(run.policy_folder(t - 1), ignore_errors=True)


def sample_stage(run, t, rows):
    """K outputs of M_(t-1) for each fresh instruction."""
    path = run.iteration_folder(t) / "samples.jsonl"
    if run.finished(path, "sample", t):
        return
    run.where = f"in iteration {t}, sampling"
    began = time.monotonic()
    model = run.load_policy(t - 1)
    write_samples(run, model, rows, run.sampling.thought, f"iteration-{t}", path)
    outputs = [output for _, row in read_jsonl(path) for output in row["outputs"]]
    tokens = sum(len(output["ids"]) for output in outputs)
    cut = sum(output["response"] is not None for output in outputs)
    say(f"iteration {t}: {len(outputs):,} outputs sampled, {tokens:,} tokens")
    run.log(
        {
            "stage": "sample",
            "iteration": t,
            "outputs": len(outputs),
            "tokens": tokens,
            "unparsed": 1 - cut / len(outputs),
            "seconds": time.monotonic() - began,
            "sha256": file_hash(path),
        }
    )
    del model
    release()


def write_samples(run, model, rows, style, name, path, num_samples=None):
    """Samples `rows` with a thought prompt's style into a file; `name` names the stream."""
    options = replace(
        run.sampling,
        thought=style,
        seed=f"{run.sampling.seed}/{name}",
        num_samples=num_samples or run.sampling.num_samples,
    )
    tokenizer = load_tokenizer(run.folders["model"])
    write_groups(
        path,
        asdict(options),
        lambda done: sample.sample_rows(model, tokenizer, rows, options, name, done),
    )


def judge_stage(run, t):
    """Scores of the responses, and the pairs of best and worst output."""
    folder = run.iteration_folder(t)
    path = folder / "pairs.jsonl"
    if run.finished(path, "judge", t):
        return
    run.where = f"in iteration {t}, judging"
    began = time.monotonic()
    judge = run.load_judge()
    judging.score_file(judge, folder / "samples.jsonl", folder / "scores.jsonl")
    scored = (row for _, row in read_jsonl(folder / "scores.jsonl"))
    options = run.options
    write_jsonl(
        path, judging.build_pairs(scored, options.rho, judge.tokenizer, options.reject_failed)
    )
    pairs = sum(1 for _ in read_jsonl(path))
    say(f"iteration {t}: {pairs:,} pairs")
    run.log(
        {
            "stage": "judge",
            "iteration": t,
            "pairs": pairs,
            "seconds": time.monotonic() - began,
            "sha256": file_hash(path),
        }
    )
    del judge
    release()


def train_stage(run, t, held_out):
    """DPO of M_(t-1) on the pairs; every epoch is saved, and sampled on the held-out prompts."""
    folder, source = run.iteration_folder(t), run.policy_folder(t - 1)
    last = folder / f"epoch-{run.dpo.epochs}"
    if (folder / "checkpoint").exists() or (last / "validation.jsonl").exists():
        return
    run.where = f"in iteration {t}, DPO"
    tokenizer, config = load_tokenizer(run.folders["model"]), read_config(run.policy_folder(t - 1))
    pairs = dpo.read_pairs(folder / "pairs.jsonl", tokenizer, config)
    estimate = dpo.check_memory(config, pairs, run.dpo, run.device, run.dtype)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    model = run.load_policy(t - 1)

    def end_of_epoch(epoch, model):
        path = folder / f"epoch-{epoch}"
        path.mkdir(exist_ok=True)
        if not (path / "checkpoint").exists():
            save_model(model, path / "checkpoint", source)
        write_samples(
            run,
            model,
            held_out,
            run.sampling.thought,
            "validation",
            path / "validation.jsonl",
            num_samples=1,
        )

    def log(record):
        run.log({"stage": "dpo", "iteration": t, **record}, "step")

    options = replace(run.dpo, seed=f"{run.dpo.seed}/iteration-{t}")
    dpo.train(model, pairs, options, folder / "state", log, end_of_epoch)
    measured = dpo.peak_memory(run.device)  # on the CPU, of all that this process has done
    say(
        f"iteration {t}: trained; peak memory {measured / GIB:.2f} GiB, "
        f"estimated for the computation {estimate / GIB:.2f}"
    )
    del model
    release()


def select_stage(run, t):
    """Judges every epoch's validation samples and keeps one epoch (the paper: the best of 10)."""
    folder = run.iteration_folder(t)
    if not (folder / "checkpoint").exists():
        run.where = f"in iteration {t}, validation"
        judge = run.load_judge()
        rows = []
        for epoch in range(1, run.dpo.epochs + 1):
            path = folder / f"epoch-{epoch}" / "validation.jsonl"
            rows.append({"epoch": epoch, **validate(run, judge, path, t, run.sampling.thought)})
            run.log({**rows[-1], "stage": "epoch"}, "epoch")
        del judge
        release()
        best = max(rows, key=rank)  # of equals the earlier
        kept = rows[-1] if run.options.select == "last" else best
        run.log({"stage": "validation", **kept})
        say(f"iteration {t}: epoch {kept['epoch']} of {run.dpo.epochs} kept; {describe(kept)}")
        epoch = folder / f"epoch-{kept['epoch']}"
        for name in ("validation.jsonl", "validation-scores.jsonl"):
            with write_aside(folder / name) as aside:
                shutil.copyfile(epoch / name, aside)
        os.replace(epoch / "checkpoint", folder / "checkpoint")
    for path in [*folder.glob("epoch-*"), folder / "state"]:
        shutil.rmtree(path, ignore_errors=True)


def rank(row):
    """What the best epoch is best by: its win rate, then its mean score."""
    return row["win_rate"], -math.inf if row["score"] is None else row["score"]


# Validation


def validate_seed(run, held_out):
    """The seed on held-out instructions, asked directly and, unless the style is none, to think.

    Its direct responses are what every later model's win rate is measured against.
    """
    folder = run.iteration_folder(0)
    styles = list(dict.fromkeys(("none", run.sampling.thought)))
    paths = {style: folder / f"validation-{style}.jsonl" for style in styles}
    logged = [row for row in run.log_rows if (row["stage"], row["iteration"]) == ("validation", 0)]
    if len(logged) == len(styles):
        return
    run.where = "validating the seed"
    folder.mkdir(exist_ok=True)
    model = run.load_policy(0)
    for style, path in paths.items():
        write_samples(run, model, held_out, style, "validation", path, num_samples=1)
    del model
    release()
    judge = run.load_judge()
    for style, path in paths.items():
        row = validate(run, judge, path, 0, style)
        run.log({"stage": "validation", **row}, "thought")
        say(f"{label(row)}: {describe(row)}")
    del judge
    release()


def scores_path(path):
    return path.with_name(path.stem + "-scores.jsonl")


def validate(run, judge, path, iteration, style):
    """The figures of one file of validation samples, as log.jsonl holds them."""
    seed = run.iteration_folder(0) / "validation-none.jsonl"
    pairwise = isinstance(judge, judging.Pairwise)
    judging.score_file(judge, beside(path, seed) if pairwise else path, scores_path(path))
    ours = [row for _, row in read_jsonl(scores_path(path))]
    theirs = ours if pairwise else [row for _, row in read_jsonl(scores_path(seed))]
    # The seed's output is the last of its row: the only one, or the one beside ours.
    compared = [(a, b["outputs"][-1]["score"]) for a, b in zip(ours, theirs, strict=True)]
    by_category = {
        category: measure([pair for pair in compared if pair[0].get("category") == category])
        for category in sorted({row["category"] for row in ours if "category" in row})
    }
    return {
        "iteration": iteration,
        "thought": style,
        **measure(compared),
        "by_category": by_category,
    }


def beside(path, seed):
    """A file with the seed's direct output after each of ours, for a judge that compares two."""
    both = path.with_name(path.stem + "-and-seed.jsonl")
    rows = []
    for (_, row), (_, other) in zip(read_jsonl(path), read_jsonl(seed), strict=True):
        rows.append({**row, "outputs": row["outputs"] + other["outputs"]})
    write_jsonl(both, rows)
    return both


def measure(compared):
    """Figures of (row, score of the seed's direct response) pairs; a row's first output counts."""
    rows, theirs = zip(*compared, strict=True)
    outputs = [row["outputs"][0] for row in rows]
    rate, low, high = judging.win_rate_of_scores([output["score"] for output in outputs], theirs)
    right = [
        exact_match(output["response"], row["answer"])
        for output, row in zip(outputs, rows, strict=True)
        if "answer" in row
    ]
    cut = [output for output in outputs if output["response"] is not None]
    return {
        "count": len(outputs),
        "score": mean([output["score"] for output in cut]),
        "win_rate": rate,
        "win_rate_interval": [low, high],
        "exact_match": mean(right),
        "exact_match_interval": judging.wilson_interval(mean(right), len(right)) if right else None,
        "unparsed": 1 - len(cut) / len(outputs),
        "thought_tokens": mean([output["thought_tokens"] for output in cut]),
        "response_tokens": mean([output["response_tokens"] for output in cut]),
    }


def mean(values):
    return sum(values) / len(values) if values else None


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
ANSWER_MARKS = ("####", "answer is")  # GSM8K's mark, and plain words


def exact_match(response, answer):
    """Whether a response gives the known answer, as final_answer reads both.

    An answer that is a number is also given by a text whose last number it is.

    >>> exact_match("The answer is Paris. Enjoy!", "paris"), exact_match("$1,200", "#### 1200")
    (True, True)
    """
    if response is None:
        return False
    given, wanted = final_answer(response), final_answer(str(answer))
    if given == wanted:
        return True
    numbers = NUMBER.findall(given)
    if not numbers or not NUMBER.fullmatch(wanted):
        return False
    return float(numbers[-1].replace(",", "")) == float(wanted.replace(",", ""))


def final_answer(text):
    """The sentence behind the last mark, or the whole text without one; case and spaces folded."""
    for mark in ANSWER_MARKS:
        _, found, after = text.rpartition(mark)
        if found:
            text = re.split(r"[.!?](?:\s|$)|\n", after.strip(" :\n"), maxsplit=1)[0]
    return " ".join(text.casefold().split()).strip(" :.")


# Reports


def say(text):
    print(text, flush=True)


def describe(row):
    parts = [f"win rate {percent(row['win_rate'])}"]
    if row["exact_match"] is not None:
        parts.append(f"exact match {percent(row['exact_match'])}")
    parts.append(
        f"thought {number(row['thought_tokens'])}, response {number(row['response_tokens'])} tokens"
    )
    return ", ".join(parts)


def percent(value):
    return "-" if value is None else f"{100 * value:.1f}%"


def with_interval(row, key):
    """A share and its 95% interval, as in 57.5% (42 to 71)."""
    if row[key] is None:
        return "-"
    low, high = row[f"{key}_interval"]
    return f"{percent(row[key])} ({100 * low:.0f} to {100 * high:.0f})"


def number(value, digits=1):
    return "-" if value is None else f"{value:.{digits}f}"


def label(row):
    """The model of a validation row, in words."""
    asked = "directly" if row["thought"] == "none" else "to think"
    return f"iteration {row['iteration']}" if row["iteration"] else f"seed, asked {asked}"


def report(rows_of_runs):
    """The paper's table for the validation rows of runs, {name: log rows}, as Markdown."""
    table = [
        ["run", "model", "exact match", "win rate", "score", "unparsed", "thought", "response"]
    ]
    categories = [["run", "model"]]
    for name, rows in rows_of_runs.items():
        for row in rows:
            if row["stage"] != "validation":
                continue
            table.append(
                [
                    name,
                    label(row),
                    with_interval(row, "exact_match"),
                    with_interval(row, "win_rate"),
                    number(row["score"], 3),
                    percent(row["unparsed"]),
                    number(row["thought_tokens"]),
                    number(row["response_tokens"]),
                ]
            )
            by_category = row["by_category"]
            categories[0] += [key for key in by_category if key not in categories[0]]
            cells = {key: with_interval(value, "exact_match") for key, value in by_category.items()}
            categories.append(
                [name, label(row), *(cells.get(key, "-") for key in categories[0][2:])]
            )
    text = markdown(table)
    if len(categories[0]) > 2:
        text += "\n\nExact match by category, 95% intervals:\n\n" + markdown(categories)
    return text


def markdown(table):
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in table]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# Beginning and going on


def begin(run, overwrite):
    """Locks the run's folder, checks all inputs, and returns training and validation rows."""
    lock_folder(run, overwrite)
    rows = distinct(sample.read_instructions(run.options.instructions), run.options.instructions)
    held_out = sample.read_instructions(run.options.validation)
    wanted = run.options.iterations * run.options.prompts_per_iteration
    if len(rows) < wanted:
        raise InputError(
            f"{run.options.instructions}: found {len(rows)} instructions, expected {wanted}: "
            f"{run.options.iterations} iterations of {run.options.prompts_per_iteration}"
        )
    seen = {row["instruction"] for row in held_out}
    for row in rows:
        if row["instruction"] in seen:
            raise InputError(
                f"{run.options.instructions}: {row['instruction'][:60]!r} also stands in "
                f"{run.options.validation}, expected held-out instructions there"
            )
    check_same_run(run)
    check_disk(run)
    check_prompts(run, rows, held_out)
    order = stream(run.sampling.seed, "instructions").permutation(len(rows))
    return [rows[i] for i in order], held_out


def lock_folder(run, overwrite):
    """Makes the run's folder and holds it against a second process until this one ends."""
    folder = run.folder
    if folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise InputError(f"{folder}: expected a folder that can be written to")
    if folder.exists() and any(folder.iterdir()) and not (folder / "lock").exists():
        raise InputError(f"{folder}: found files that no run wrote, expected a run's folder")
    folder.mkdir(parents=True, exist_ok=True)
    run.lock = open(folder / "lock", "w")  # noqa: SIM115  # held open as long as the process lives
    try:
        fcntl.flock(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"{folder}: another process is at work on this run") from None
    for path in folder.iterdir() if overwrite else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def check_prompts(run, rows, held_out):
    """Refuses, before the long work, prompts beyond the context and DPO beyond the memory."""
    tokenizer, config = load_tokenizer(run.folders["model"]), read_config(run.folders["model"])
    longest = 0
    for path, part in ((run.options.instructions, rows), (run.options.validation, held_out)):
        prompts = sample.make_prompts(part, tokenizer, run.sampling, config, path)
        longest = max(longest, *(len(ids) for _, ids in prompts))
    output = [0] * min(run.sampling.max_new_tokens, config.max_positions - longest)
    pair = dpo.Pair("the longest possible pair", [0] * longest, output, output)
    dpo.check_memory(config, [pair], run.dpo, run.device, run.dtype)


def distinct(rows, path):
    """Rows with an instruction seen before left out: no instruction is used twice (3.1)."""
    first = {row["instruction"]: row for row in reversed(rows)}
    kept = [row for row in rows if first[row["instruction"]] is row]
    if len(kept) < len(rows):
        print(f"{path}: {len(rows) - len(kept)} repeated instructions left out", file=sys.stderr)
    return kept


def check_same_run(run):
    """options.json: written by a new run, compared by one that goes on."""
    values = {}
    for part in (run.options, run.sampling, run.judging, run.dpo):
        values |= asdict(part)
    del values["output"]  # a run's folder may be moved
    for name, folder in run.folders.items():
        values[f"{name}_sha256"] = folder_hash(folder)
        values[f"{name}_revision"] = None if os.path.isdir(values[name]) else folder.name
    for name in ("instructions", "validation"):
        values[f"{name}_sha256"] = file_hash(values[name])
    file = run.folder / "options.json"
    if not file.exists():
        write_json(file, values)
    found = read_json(file)
    for name in {**found, **values}:
        if found.get(name) != values.get(name):
            raise InputError(
                f"{file}: this run has {name} = {found.get(name)!r}, the command "
                f"{values.get(name)!r}; another --output, or --overwrite, starts anew"
            )
    log = run.folder / "log.jsonl"
    run.log_rows = [row for _, row in read_jsonl(log)] if log.exists() else []


def check_disk(run):
    """Says how much disk the run takes and refuses to begin where it is not there."""
    with torch.device("meta"):
        model = LanguageModel(read_config(run.folders["model"]))
    numbers = sum(p.numel() for p in model.parameters())
    weights = numbers * run.dtype.itemsize
    state = weights + 4 * numbers * (2 if run.dtype == torch.float32 else 3)
    kept = run.options.iterations if run.options.keep == "all" else 2
    need = (kept + run.dpo.epochs) * weights + 2 * state
    free = shutil.disk_usage(run.folder).free
    say(f"disk: up to {need / GIB:.2f} GiB in {run.folder} ({free / GIB:.0f} GiB free)")
    if need > free and not run.log_rows:
        raise InputError(
            f"{run.folder}: found {free / GIB:.1f} GiB free, expected "
            f"{need / GIB:.1f}: --keep last or fewer --epochs take less"
        )


def read_recipe(path, names):
    """Options from a recipe, a JSON object; a path in it may be relative to its own folder."""
    recipe = read_json(path)
    for name, value in recipe.items():
        if name not in names:
            raise InputError(f"{path}: {name} is not an option")
        if name in PATHS and isinstance(value, str) and (Path(path).parent / value).exists():
            recipe[name] = str(Path(path).parent / value)
    return recipe


def main():
    parser = argparse.ArgumentParser(description="Thought Preference Optimization.")
    parser.add_argument("--recipe", help="JSON object of options (default: the toy world's)")
    parser.add_argument("--report", nargs="+", metavar="RUN", help="show finished runs and stop")
    parser.add_argument("--overwrite", action="store_true", help="start the run anew")
    add_options(parser, *ALL_OPTIONS)
    flags = vars(parser.parse_args())
    recipe, folders, overwrite = (flags.pop(key) for key in ("recipe", "report", "overwrite"))
    if folders:
        logs = {folder: Path(folder) / "log.jsonl" for folder in folders}
        say(report({name: [row for _, row in read_jsonl(log)] for name, log in logs.items()}))
        return
    if recipe is None and "model" not in flags:
        recipe = TOY_RECIPE
    names = {item.name for options in ALL_OPTIONS for item in fields(options)}
    run = Run({**(read_recipe(recipe, names) if recipe else {}), **flags}, overwrite)
    rows, held_out = begin(run, overwrite)
    try:
        tpo(run, rows, held_out)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(", ".join((run.where, *map(str, stop.args)))) from None
    say("\n" + report({str(run.folder): run.log_rows}))


if __name__ == "__main__":
    run_main(main)
