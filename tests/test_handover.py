"""The scripts of tests/handover for vLLM and TRL: what they read and write is ours, to the id.

pytest tests/test_handover.py
"""

import ast
import json
import runpy
import sys
import types
from dataclasses import dataclass, replace

import dpo
import judge as judging
import model as lm
import sample

import pytest
from conftest import LLAMA, TESTS, write_checkpoint, write_tokenizer
from make_handover_fixture import EOS, FILE, LR, STEPS, draw_rows, script_text, write_long_policy
from make_judge_fixtures import ONE_LABEL, write_judge

# TRL: log-probabilities and steps on the ids of a pairs file.


@pytest.fixture(scope="module")
def trl():
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.fixture
def policy(tmp_path):
    return write_long_policy(tmp_path / "policy")


@pytest.fixture
def pairs_file(tmp_path):
    lm.write_jsonl(tmp_path / "pairs.jsonl", draw_rows())
    return tmp_path / "pairs.jsonl"


def test_the_fixture_was_made_by_the_script_as_it_is(trl):
    shown = script_text()
    again = "make tests/fixtures/trl/handover.json again"
    assert ast.dump(ast.parse(shown)) == ast.dump(ast.parse(trl["script"])), again


@pytest.mark.reference
def test_trl_is_given_our_ids(trl, policy, pairs_file):
    """No second BOS, no EOS at the limit, nothing cut: although the tokenizer adds BOS."""
    tokenizer = lm.load_tokenizer(policy)
    assert tokenizer.encode("w0") == [tokenizer.encode("<s>", False)[0], 0]
    pairs = dpo.read_pairs(pairs_file, lm.read_config(policy))
    for pair, row in zip(pairs, trl["rows"], strict=True):
        for name, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            assert row[f"{name}_sequence"] == pair.prompt_ids + ids
            assert row[f"{name}_tokens"] == len(ids)
    assert {pair.chosen_ids[-1] == EOS for pair in pairs} == {True, False}
    assert {pair.rejected_ids[-1] == EOS for pair in pairs} == {True, False}
    assert max(pair.num_tokens for pair in pairs) > 1024


@pytest.mark.reference
def test_trl_gives_our_log_probabilities(trl, policy, pairs_file):
    llm = lm.load_model(policy)
    pairs = dpo.read_pairs(pairs_file, llm.config)
    dpo.add_reference(llm, pairs, dpo.Options(micro_batch_tokens=300))
    for pair, row in zip(pairs, trl["rows"], strict=True):
        theirs = (row["chosen_logprob"], row["rejected_logprob"])
        assert pair.reference == pytest.approx(theirs, rel=1e-6)


@pytest.mark.reference
def test_trl_takes_our_steps(trl, policy, pairs_file):
    llm, records = lm.load_model(policy), []
    pairs = dpo.read_pairs(pairs_file, llm.config)
    options = dpo.Options(
        lr=LR, epochs=STEPS, batch_size=len(pairs), micro_batch_tokens=300, keep_activations=1
    )
    dpo.train(llm, pairs, options, log=records.append)
    names = {
        "loss": "loss",
        "grad_norm": "grad_norm",
        "margin": "rewards/margins",
        "chosen_logprob": "logps/chosen",
        "rejected_logprob": "logps/rejected",
    }
    for record, row in zip(records, trl["steps"], strict=True):
        for name, theirs in names.items():
            assert record[name] == pytest.approx(row[theirs], rel=1e-4, abs=1e-4), name


SCRIPT = TESTS / "handover" / "vllm_samples.py"

# vLLM: a stand-in for its module, which "draws" outputs that are given here.

OUTPUTS = [  # (text, whether a stop token ended it)
    ("Draft: 4. <R> It is 4.", True),
    ("Short. <R> Four, which is two and two, or one and three.", True),
    ("I think of numbers and <R> then the limit ca", False),
    ("It cannot be cut.", True),
    ("<|eot_id|>", True),  # its only token stops it
]


@dataclass
class CompletionOutput:
    """The fields of vLLM's own that say what was drawn."""

    index: int
    text: str  # "" with detokenize=False
    token_ids: tuple
    finish_reason: str
    stop_reason: int | None  # None too where the tokenizer's eos ended it


@dataclass
class RequestOutput:
    prompt_token_ids: list
    outputs: list


def drawn_ids(tokenizer, number):
    """Ids of one prompt's 8 outputs, unequal from prompt to prompt; both stop tokens occur."""
    made = []
    for i in range(8):
        text, ended = OUTPUTS[(i + number) % len(OUTPUTS)]
        ids = [] if text == "<|eot_id|>" else tokenizer.encode(text + "!" * i, False)
        made.append(ids + [tokenizer.stop_ids[i % 2]] * ended)
    return made


def stand_in(tokenizer, folder, laws):
    """A module `vllm` with LLM and SamplingParams, the arguments checked as it would."""

    class SamplingParams:
        def __init__(self, *, n, temperature, top_p, max_tokens, stop_token_ids, detokenize=True):
            assert type(stop_token_ids) is list
            laws.append(vars() | {"self": None})

    class LLM:
        def __init__(self, model, *, tensor_parallel_size=1):
            assert model == str(folder)

        def generate(self, prompts, sampling_params):
            assert isinstance(sampling_params, SamplingParams)
            found = []
            for number, prompt in enumerate(prompts):
                outputs = []
                for i, ids in enumerate(drawn_ids(tokenizer, number)):
                    stopped = ids[-1] in tokenizer.stop_ids
                    reason = ids[-1] if stopped and ids[-1] != tokenizer.stop_ids[0] else None
                    finish = "stop" if stopped else "length"
                    outputs.append(CompletionOutput(i, "", tuple(ids), finish, reason))
                found.append(RequestOutput(prompt["prompt_token_ids"], outputs))
            return found

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    return module


def test_vllms_draws_become_the_samples_that_sample_py_writes(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "tiny", LLAMA | {"max_position_embeddings": 2048})
    tokenizer = lm.load_tokenizer(write_tokenizer(folder))
    source, laws = tmp_path / "instructions.jsonl", []
    lm.write_jsonl(source, [{"prompt": "2 + 2?", "id": "é"}, {"prompt": "More?"}, {"prompt": "?"}])
    monkeypatch.setitem(sys.modules, "vllm", stand_in(tokenizer, folder, laws))
    argv = [str(SCRIPT), str(folder), str(source), str(tmp_path / "samples.jsonl")]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    options = sample.Options()
    (law,) = laws
    same = {"num_samples": "n", "max_new_tokens": "max_tokens"}
    for name in ("num_samples", "max_new_tokens", "temperature", "top_p"):
        assert getattr(options, name) == law[same.get(name, name)]
    assert set(law["stop_token_ids"]) == set(tokenizer.stop_ids)

    def complete(decoder, groups, *law):
        for group in groups:
            number, *_ = group[0].name
            for completion, ids in zip(group, drawn_ids(tokenizer, number), strict=True):
                yield replace(completion, ids=ids, finished=ids[-1] in tokenizer.stop_ids)

    monkeypatch.setattr(sample, "complete", complete)
    rows, ours = sample.read_instructions(source), tmp_path / "ours.jsonl"
    model = lm.load_model(folder)
    sample.sample_file(model, tokenizer, rows, options, ours, {}, source)
    assert (tmp_path / "samples.jsonl").read_text() == ours.read_text()
    outputs = [output for _, row in lm.read_jsonl(ours) for output in row["outputs"]]
    assert {output["finished"] for output in outputs} == {True, False}
    assert {output["response"] is None for output in outputs} == {True, False}


def test_judge_and_dpo_take_what_vllm_drew(tmp_path, monkeypatch, capsys):
    folder = write_checkpoint(tmp_path / "tiny", LLAMA | {"max_position_embeddings": 2048})
    tokenizer = lm.load_tokenizer(write_tokenizer(folder))
    judge = write_judge(tmp_path / "judge", ONE_LABEL)
    lm.write_jsonl(tmp_path / "in.jsonl", [{"instruction": "2 + 2?"}, {"instruction": "More?"}])
    monkeypatch.setitem(sys.modules, "vllm", stand_in(tokenizer, folder, []))
    monkeypatch.chdir(tmp_path)

    def run(main, line):
        monkeypatch.setattr(sys, "argv", line.split())
        main()

    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folder), "in.jsonl", "samples.jsonl"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    run(
        judging.main,
        f"judge.py --judge {judge} --samples samples.jsonl --output scores.jsonl "
        "--pairs pairs.jsonl",
    )
    capsys.readouterr()
    run(
        dpo.main,
        f"dpo.py --model {folder} --pairs pairs.jsonl --output trained --epochs 1 --batch-size 2",
    )
    assert "warning" not in capsys.readouterr().err
    prompts = [row["prompt_ids"] for _, row in lm.read_jsonl(tmp_path / "samples.jsonl")]
    pairs = dpo.read_pairs(tmp_path / "pairs.jsonl", lm.read_config(folder))
    assert [pair.prompt_ids for pair in pairs] == prompts
    assert all(pair.chosen_ids[-1] in tokenizer.stop_ids for pair in pairs)
    assert (tmp_path / "trained" / "model.safetensors").exists()
