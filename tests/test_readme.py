"""What the README says is true: links, options, function names, line counts; and the doctests.

pytest tests/test_readme.py
"""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import benchmark
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = ("model", "sample", "judge", "dpo", "train")
OTHER_TOOLS = ("vllm", "trl", "alpaca_eval", "accelerate", "hf", "pip")


def names_in(path):
    """Functions and classes of a Python file, and its upper-case constants."""
    tree = ast.parse(path.read_text())
    names = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    targets = (t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets)
    return names | {t.id for t in targets if isinstance(t, ast.Name)}


def commands():
    """The lines of the README's shell blocks, continuations joined."""
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                yield line


@pytest.fixture(scope="module")
def help_of():
    """{script: its --help}."""
    scripts = [f"{module}.py" for module in MODULES]
    scripts += ["tests/benchmark.py", "tests/toy/reproduce.py", "tests/toy/make.py"]
    run = {
        script: subprocess.run(
            [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True
        ).stdout
        for script in scripts
    }
    return run


def test_links_resolve():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith(("http://", "https://")):
            assert (ROOT / target.split("#")[0]).exists(), target


def test_linked_functions_exist():
    linked = re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", README)
    assert len(linked) > 8
    for name, file in linked:
        assert name in names_in(ROOT / file), f"{name} in {file}"


def test_line_counts_are_true():
    counts = re.findall(r"\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", README)
    assert {file for file, _ in counts} == {f"{module}.py" for module in MODULES}
    for file, count in counts:
        assert len((ROOT / file).read_text().splitlines()) == int(count), file


def test_the_ratios_are_those_that_the_benchmark_checks():
    """Every row that ends in a ratio is a claim, every claim such a row, and it upholds itself."""
    _, _, numbers = README.partition("## Numbers")
    rows = re.findall(
        r"^\| (.+?) \|.*\| (\d+\.\d+) \|$", numbers.partition("\n## ")[0], re.MULTILINE
    )
    claims = {row: stated for row, (stated, _, _) in benchmark.CLAIMS.items()}
    assert {row: float(ratio) for row, ratio in rows} == claims
    assert benchmark.check_claims(claims) == 0


def test_the_benchmark_says_which_claims_no_longer_hold(monkeypatch, capsys):
    claims = {"speed": (4.5, "at least", 4.0), "memory": (0.3, "at most", 0.4)}
    monkeypatch.setattr(benchmark, "CLAIMS", claims)
    for measured, timed, lost, verdicts in (
        ({"speed": 4.0, "memory": 0.4, "other": 0.0}, True, 0, ["holds", "holds"]),
        ({"speed": 3.99}, True, 1, ["no longer holds", "not measured"]),
        ({"memory": 0.41, "speed": 9.0}, True, 1, ["holds", "no longer holds"]),
        ({"speed": 0.5, "memory": 2.0}, False, 0, ["other sizes"] * 2),
    ):
        assert benchmark.check_claims(measured, timed) == lost
        lines = capsys.readouterr().out.splitlines()
        assert [line.partition(":")[0] for line in lines] == verdicts
    assert lines[0] == "other sizes: speed: measured 0.50, README 4.5, at least 4.0"


def test_named_options_exist(help_of):
    own = "".join(help_of.values())
    for line in commands():
        words = line.split()
        if words[0] in OTHER_TOOLS:
            continue
        text = own
        if words[0] == "python" and words[1] in help_of:
            text = help_of[words[1]]
        for option in re.findall(r"(?<!\S)--[a-z-]+", line):
            assert re.search(rf"{option}\b", text), line
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for option in re.findall(r"`(?:python \S+ )?(--[a-z-]+)", prose):
        assert re.search(rf"{option}\b", own), option


def test_every_option_has_a_help_text(help_of):
    for script, text in help_of.items():
        options = re.findall(r"^  (--[a-z-]+)(.*(?:\n {10,}.*)*)", text, re.MULTILINE)
        assert options or script.endswith("make.py"), script
        for option, rest in options:
            words = re.sub(r"\{[^}]*\}|[A-Z_]+", "", rest).split()
            assert len(words) >= 2, f"{script} {option}"


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module):
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried and not failed


def test_requirements_name_only_what_the_design_allows():
    lines = (ROOT / "requirements.txt").read_text().split()
    names = {line.partition("==")[0] for line in lines}
    assert names == {"torch", "tokenizers", "safetensors", "numpy", "tqdm"}
    assert all("==" in line for line in lines)
