"""What the READMEs say is true: links, options, function names, ratios; the modules' shape.

pytest tests/test_readme.py
"""

import ast
import contextlib
import doctest
import importlib
import io
import re
import runpy
import signal
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "tests" / "README.md", *ROOT.glob("tests/*/README.md")]
READMES = {path: path.read_text(encoding="utf-8") for path in sorted(PAGES)}
README = READMES[ROOT / "README.md"]
MODULES = ("model", "sample", "judge", "dpo", "train")
# Commands of other programs.
OTHERS = ("vllm", "trl", "alpaca_eval", "accelerate", "hf", "huggingface-cli", "pip", "pytest")


def names_in(path):
    """Functions and classes of a Python file, and its upper-case constants."""
    tree = ast.parse(path.read_text())
    names = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    targets = (t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets)
    return names | {t.id for t in targets if isinstance(t, ast.Name)}


def commands():
    """The lines of the READMEs' shell blocks, continuations joined and comments left out."""
    for block in re.findall(r"```sh\n(.*?)```", "\n".join(READMES.values()), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.partition("#")[0].strip():
                yield line.partition("#")[0]


def help_text(script):
    """What `python script --help` prints, without a process of its own."""
    path = ROOT / script
    argv = mock.patch.object(sys, "argv", [str(path), "--help"])
    own_path = mock.patch.object(sys, "path", [str(path.parent), *sys.path])
    handler = signal.getsignal(signal.SIGTERM)
    text = io.TextIOWrapper(io.BytesIO())
    with argv, own_path, contextlib.redirect_stdout(text), pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    signal.signal(signal.SIGTERM, handler)
    assert not end.value.code, script
    text.seek(0)
    return text.read()


@pytest.fixture(scope="module")
def help_of():
    """{script: its --help}: the modules, and what tests/ has to be called."""
    scripts = [f"{module}.py" for module in MODULES]
    for folder in ("toy", "resume", "benchmarks", "real"):
        for path in sorted((ROOT / "tests" / folder).glob("*.py")):
            if "argparse.ArgumentParser(" in path.read_text():
                scripts.append(str(path.relative_to(ROOT)))
    found = {script: help_text(script) for script in scripts}
    packages = {name: text for name, text in found.items() if name.endswith("/__main__.py")}
    return found | {name.removesuffix("/__main__.py"): text for name, text in packages.items()}


def anchors_of(text):
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


every_readme = pytest.mark.parametrize(
    "path", READMES, ids=lambda path: str(path.relative_to(ROOT))
)


@every_readme
def test_links_resolve(path):
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", READMES[path]):
        if not target.startswith(("http://", "https://")):
            name, _, anchor = target.partition("#")
            file = (path.parent / name).resolve() if name else path
            assert file.exists(), target
            assert not anchor or anchor in anchors_of(READMES[file]), target


@every_readme
def test_linked_functions_exist(path):
    linked = re.findall(r"\[`(\w+)(?:\(\))?`\]\(([\w./]+\.py)(?:#\w+)?\)", READMES[path])
    assert linked or path != ROOT / "README.md"
    for name, file in linked:
        assert name in names_in(path.parent / file), f"{name} in {file}"


def test_commands_name_what_there_is(help_of):
    """Every script of a command exists, and has every option that is given to it."""
    for line in commands():
        words = line.split()
        if words[0] in OTHERS or words[:3] == ["python", "-m", "pip"]:
            continue
        scripts = [word for word in words if word.endswith(".py") or word.startswith("tests/")]
        for script in scripts:
            assert (ROOT / script).exists() or script.startswith("runs/"), line
        text = help_of.get(words[1], "") if words[0] == "python" else "".join(help_of.values())
        for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", line):
            assert re.search(rf"{option}\b", text), line


def test_ci_runs_the_commands_that_need_no_download():
    """The block after the method's steps, as it stands."""
    steps = README.partition("## The method")[2]
    block = re.search(r"```sh\n(.*?)```", steps, re.DOTALL)[1]
    ci = (ROOT / ".ci" / "run").read_text()
    assert len(block) > 200
    for line in block.splitlines():
        assert line in ci, line


def test_named_options_exist(help_of):
    own = "".join(help_of.values())
    prose = re.sub(r"```.*?```", "", "\n".join(READMES.values()), flags=re.DOTALL)
    for option in re.findall(r"`(?:python \S+ )?(--[a-z][a-z-]*)", prose):
        assert re.search(rf"{option}\b", own), option


def test_every_option_has_a_help_text(help_of):
    for script, text in help_of.items():
        options = re.findall(r"^  (--[a-z][a-z-]*)(.*(?:\n {10,}.*)*)", text, re.MULTILINE)
        for option, rest in options:
            words = re.sub(r"\{[^}]*\}|--[a-z-]+|\b[A-Z_]+\b|[^\w\s]", "", rest).split()
            assert len(words) >= 2, f"{script} {option}"
    for module in MODULES:
        assert "--model" in help_of[f"{module}.py"] or "--judge" in help_of[f"{module}.py"]


def claims():
    with mock.patch.object(sys, "path", [str(ROOT / "tests" / "benchmarks"), *sys.path]):
        return importlib.import_module("bench")


def test_the_ratios_are_those_that_the_benchmarks_check():
    """Of the tables with a checked ratio, every row that ends in one is checked, and holds."""
    checked, stated = claims().CLAIMS, {}
    text = READMES[ROOT / "tests" / "benchmarks" / "README.md"]
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")]
        if any(row[0] in checked for row in rows):
            stated |= {row[0]: float(row[-1]) for row in rows if re.fullmatch(r"[\d.]+", row[-1])}
    assert set(stated) == set(checked)
    for name, (side, bound) in checked.items():
        assert stated[name] >= bound if side == "at least" else stated[name] <= bound, name


def test_the_benchmarks_say_which_claims_no_longer_hold(monkeypatch, capsys):
    bench = claims()
    monkeypatch.setattr(bench, "CLAIMS", {"speed": ("at least", 4.0), "memory": ("at most", 0.4)})
    for measured, timed, lost, verdicts in (
        ({"speed": 4.0, "memory": 0.4, "other": 0.0}, True, 0, ["holds", "holds"]),
        ({"speed": 3.99}, True, 1, ["no longer holds", "not measured"]),
        ({"memory": 0.41, "speed": 9.0}, True, 1, ["holds", "no longer holds"]),
        ({"speed": 0.5, "memory": 2.0}, False, 0, ["other sizes"] * 2),
    ):
        assert bench.check_claims(measured, timed) == lost
        lines = capsys.readouterr().out.splitlines()
        assert [line.partition(":")[0] for line in lines] == verdicts


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module):
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried and not failed


def test_requirements_name_only_what_the_design_allows():
    lines = (ROOT / "requirements.txt").read_text().split()
    names = {line.partition("==")[0] for line in lines}
    assert names == {"torch", "tokenizers", "safetensors", "numpy", "tqdm"}
    assert all("==" in line for line in lines)


def test_the_modules_are_small_and_begin_with_their_reason_to_exist():
    lines = {name: (ROOT / f"{name}.py").read_text().splitlines() for name in MODULES}
    first = {
        "model": ("class Attention", 150),
        "sample": ("def thought_prompt", 120),
        "judge": ("def length_control", 120),
        "dpo": ("def dpo_loss", 120),
        "train": ("def tpo", 120),
    }
    for name, (start, most) in first.items():
        assert any(line.startswith(start) for line in lines[name][:most]), (start, most)
    assert sum(map(len, lines.values())) <= 3065
