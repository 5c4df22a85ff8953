"""dpo.py: the loss, log-probabilities and gradients against direct forms, AdamW against torch's,
five steps against TRL's, resume to the same bytes.

    python -m pytest tests/test_dpo.py
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import dpo
import model as lm

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES, LLAMA, buffer_bytes, read_or_refuse, relative, write_checkpoint
from conftest import write_rows
from make_trl_fixture import FOLDER, OPTIONS, write_policy
from safetensors.torch import load_file

FAMILIES = json.loads((FIXTURES / "families.json").read_text())


def draw_pairs(count, seed=0, most=30):
    """Pairs of unequal lengths, prompts and outputs of one token among them."""
    rng = np.random.default_rng(seed)

    def ids(low):
        return rng.integers(0, LLAMA["vocab_size"], rng.integers(low, most)).tolist()

    pairs = [dpo.Pair(f"pair {i}", ids(1), ids(1), ids(1)) for i in range(count)]
    pairs[0].prompt_ids, pairs[0].chosen_ids = [5], [9]
    return pairs


def with_reference(pairs, value=-40.0):
    for i, pair in enumerate(pairs):
        pair.reference = (value - i, value + i)
    return pairs


def options_of(**changes):
    """Options as fit_options hands them over: nothing left to be tried."""
    return dpo.Options(**{"micro_batch_tokens": 100, "keep_activations": 1, **changes})


@pytest.fixture
def llm(tiny):
    return lm.load_model(tiny)


@pytest.fixture
def llm64(tiny):
    return lm.load_model(tiny, dtype=torch.float64)


def gradients(llm):
    return {name: p.grad.clone() for name, p in llm.named_parameters()}


# The loss


@pytest.mark.reference
def test_loss_and_rewards_in_closed_form():
    policy = [torch.tensor([-10.0, -80.0], dtype=torch.float64) for _ in range(2)]
    policy[1] = policy[1] - torch.tensor([4.0, -9.0])
    reference = [torch.tensor([-12.0, -75.0]).double(), torch.tensor([-13.0, -72.0]).double()]
    losses, chosen, rejected = dpo.dpo_loss(*policy, *reference, beta=0.5)
    margins = [0.5 * ((-10 + 12) - (-14 + 13)), 0.5 * ((-80 + 75) - (-71 + 72))]
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-m)) for m in margins])
    assert chosen.tolist() == [1, -2.5]
    assert rejected.tolist() == [-0.5, 0.5]
    x = torch.tensor([-3.0, -500.0])  # equal rewards
    losses, chosen, rejected = dpo.dpo_loss(x, x - 7, x, x - 7, beta=0.3)
    assert torch.allclose(losses, torch.full((2,), math.log(2)))
    assert chosen.tolist() == rejected.tolist() == [0, 0]


@pytest.mark.reference
def test_loss_gradient_raises_chosen_and_lowers_rejected():
    values = [torch.tensor([-5.0, -9.0], dtype=torch.float64) for _ in range(4)]
    values[1] -= torch.tensor([2.0, -1.0])
    policy = [x.requires_grad_() for x in values[:2]]
    losses, chosen, rejected = dpo.dpo_loss(*values, beta=0.4)
    assert not chosen.requires_grad and not rejected.requires_grad
    losses.sum().backward()
    # d loss / d chosen = -beta * sigmoid(-margin), of rejected the opposite.
    slope = 0.4 * torch.sigmoid(rejected - chosen)
    assert torch.allclose(policy[0].grad, -slope) and torch.allclose(policy[1].grad, slope)
    check = [x.detach().requires_grad_() for x in values]
    assert torch.autograd.gradcheck(lambda *x: dpo.dpo_loss(*x, beta=0.4)[0], check)


def test_loss_is_finite_far_out():
    far = torch.tensor([-1e5]), torch.tensor([1e5])
    zero = torch.zeros(1)
    assert dpo.dpo_loss(*far, zero, zero, beta=1)[0].tolist() == [2e5]
    assert dpo.dpo_loss(*far[::-1], zero, zero, beta=1)[0].tolist() == [0]


# Log-probabilities


def direct_logprobs(llm, pairs):
    """Each sequence alone, all its logits at once."""

    def total(prompt, output):
        logits = llm(torch.tensor([prompt + output]))[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)[range(len(output)), output].sum()

    chosen = [total(p.prompt_ids, p.chosen_ids) for p in pairs]
    rejected = [total(p.prompt_ids, p.rejected_ids) for p in pairs]
    return torch.stack(chosen), torch.stack(rejected)


@pytest.mark.reference
@pytest.mark.parametrize("keep", [0, 1, 9])
@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_logprobs_and_gradients_equal_the_direct_form(llm64, rows, keep):
    pairs, weights = draw_pairs(5), torch.tensor([1.0, -2.0, 0.5, 3.0, -1.5], dtype=torch.float64)
    results = []
    for chosen, rejected in (
        dpo.output_logprobs(llm64, pairs, keep, rows),
        direct_logprobs(llm64, pairs),
    ):
        llm64.zero_grad()
        (chosen * weights - rejected * weights.flip(0)).sum().backward()
        results.append((chosen, rejected, gradients(llm64)))
    (chosen, rejected, grads), (direct_chosen, direct_rejected, direct_grads) = results
    assert relative(chosen, direct_chosen) < 1e-12 and relative(rejected, direct_rejected) < 1e-12
    for name, grad in grads.items():
        assert relative(grad, direct_grads[name]) < 1e-10, name


@pytest.mark.reference
@pytest.mark.parametrize("name", FAMILIES["cases"])
def test_logprobs_are_those_of_transformers_in_the_newer_families(name, tmp_path):
    """All pairs in one packed row, with a prompt of one token, against each sequence alone."""
    case = FAMILIES["cases"][name]
    llm = lm.load_model(write_checkpoint(tmp_path, case["config"], case["seed"]))
    pairs = [dpo.Pair("", p["prompt"], p["chosen"], p["rejected"]) for p in FAMILIES["pairs"]]
    assert [len(pair.prompt_ids) for pair in pairs].count(1) == 2
    with torch.no_grad():
        together = dpo.output_logprobs(llm, pairs, logit_rows=7)
        alone = [dpo.output_logprobs(llm, [pair]) for pair in pairs]
    alone = [torch.cat(side) for side in zip(*alone, strict=True)]
    for found in (together, alone):
        for side, theirs in zip(found, case["logprobs"].values(), strict=True):
            assert side.tolist() == pytest.approx(theirs, rel=1e-5, abs=1e-4)


@pytest.mark.reference
def test_tied_head_gets_both_gradients(tmp_path):
    folder = write_checkpoint(tmp_path / "tied", LLAMA | {"tie_word_embeddings": True})
    llm, pairs = lm.load_model(folder, dtype=torch.float64), draw_pairs(3)
    dpo.output_logprobs(llm, pairs)[0].sum().backward()
    packed = llm.head.grad.clone()
    llm.zero_grad()
    direct_logprobs(llm, pairs)[0].sum().backward()
    assert relative(packed, llm.head.grad) < 1e-10


@pytest.mark.parametrize("keep", [0, 1, 9])
def test_logits_are_never_all_there_and_a_prompt_is_computed_once(llm, monkeypatch, keep):
    seen, linear, pairs = [], F.linear, draw_pairs(4)

    def watched(x, weight, bias=None):
        seen.append((x.numel() // x.shape[-1], weight.shape[0]))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", watched)
    dpo.output_logprobs(llm, pairs, keep, 4)[0].sum().backward()
    heads = [rows for rows, vocab in seen if vocab == LLAMA["vocab_size"]]
    assert len(heads) > 8 and max(heads) == 4
    wide = [rows for rows, out in seen if out == LLAMA["intermediate_size"]]  # two in a block
    size = sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) - 1 for p in pairs)
    assert wide == [size] * 2 * (2 + max(0, 2 - keep))  # of 2 blocks all but `keep` run twice


def test_bf16_logprobs_are_summed_in_float32(tiny):
    llm, pairs = lm.load_model(tiny, dtype=torch.bfloat16), draw_pairs(3)
    chosen, _ = dpo.output_logprobs(llm, pairs)
    assert chosen.dtype == torch.float32
    assert relative(chosen, direct_logprobs(lm.load_model(tiny), pairs)[0]) < 0.02


# The batch's gradient


@pytest.mark.reference
@pytest.mark.parametrize("nll_weight", [0.0, 0.7])
def test_gradient_is_that_of_the_whole_batch_however_it_is_cut(llm64, nll_weight):
    pairs = with_reference(draw_pairs(7))
    chosen, rejected = direct_logprobs(llm64, pairs)
    reference = torch.tensor([p.reference for p in pairs], dtype=torch.float64)
    losses, _, _ = dpo.dpo_loss(chosen, rejected, *reference.T, 0.1)
    lengths = torch.tensor([len(p.chosen_ids) for p in pairs])
    loss = (losses - nll_weight * chosen / lengths).mean()
    loss.backward()
    expected = gradients(llm64)
    for tokens in (1, 60, 130, 10_000):
        llm64.zero_grad()
        options = options_of(micro_batch_tokens=tokens, nll_weight=nll_weight)
        record = dpo.add_gradient(llm64, pairs, options)
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert record["chosen_logprob"] == pytest.approx(chosen.mean().item(), rel=1e-9)
        for name, grad in gradients(llm64).items():
            assert relative(grad, expected[name]) < 1e-6, (tokens, name)


def test_record_counts_rewards(llm):
    pairs = draw_pairs(4)
    chosen, rejected = (x.tolist() for x in dpo.output_logprobs(llm, pairs))
    gaps = [3.0, -1.0, 2.0, 0.5]  # of the log-ratios: chosen's less rejected's
    for pair, c, r, gap in zip(pairs, chosen, rejected, gaps, strict=True):
        pair.reference = (c - gap, r)
    record = dpo.add_gradient(llm, pairs, options_of(beta=0.1))
    assert record["accuracy"] == 0.75
    assert record["margin"] == pytest.approx(0.1 * sum(gaps) / 4, rel=1e-3)


def test_a_micro_batch_fills_up_to_the_budget(llm, monkeypatch):
    pairs = with_reference([dpo.Pair("", [1] * n, [1], [1]) for n in (2, 3, 4, 19, 1, 1)])
    cut, logprobs = [], dpo.output_logprobs

    def watched(model, part, *kept):
        cut.append([pair.num_tokens for pair in part])
        return logprobs(model, part, *kept)

    monkeypatch.setattr(dpo, "output_logprobs", watched)
    dpo.add_gradient(llm, pairs, options_of(micro_batch_tokens=8))
    assert cut == [[3, 4], [5], [20], [2, 2]]


@pytest.mark.reference
def test_gradients_of_bf16_weights_are_summed_in_float32(tiny):
    """Against sums in float64 and in bf16 of the very gradients that 32 micro-batches have."""
    llm = lm.load_model(tiny, dtype=torch.bfloat16)
    pairs, options = with_reference(draw_pairs(32, most=12)), options_of(micro_batch_tokens=1)
    dpo.add_gradient(llm, pairs, options)
    ours = [p.grad for p in llm.parameters()]
    assert {grad.dtype for grad in ours} == {torch.float32}
    exact, narrow = ([torch.zeros_like(grad, dtype=dtype) for grad in ours]
                     for dtype in (torch.float64, torch.bfloat16))  # fmt: skip
    for pair in pairs:  # one at a time; 1 / 32 of a gradient is exact in every dtype
        llm.zero_grad()
        dpo.add_gradient(llm, [pair], options)
        for p, high, low in zip(llm.parameters(), exact, narrow, strict=True):
            high += p.grad / 32
            low += (p.grad / 32).bfloat16()

    def error(sums):
        errors = [(a - b).square().sum() for a, b in zip(sums, exact, strict=True)]
        return (sum(errors) / sum(b.square().sum() for b in exact)).sqrt().item()

    assert error(ours) <= error(narrow) / 2
    assert error(ours) < 1e-6 and error(narrow) > 1e-3


# The optimizer


def set_gradients(llm, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    for p in llm.parameters():
        p.grad_dtype = dtype
        p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(dtype)


@pytest.mark.reference
def test_adamw_equals_torch(tiny):
    options = options_of(adam_beta1=0.8, adam_beta2=0.97, weight_decay=0.1)
    llm, twin = lm.load_model(tiny), lm.load_model(tiny)
    ours = dpo.AdamW(llm, options)
    groups = [
        {"params": [p for p in twin.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in twin.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, betas=(0.8, 0.97), eps=1e-8, foreach=False)
    for step in range(6):
        for group in theirs.param_groups:
            group["lr"] = 0.01 / (step + 1)
        set_gradients(llm, step)
        set_gradients(twin, step)
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 20.0)
        assert ours.gradient_norm() == pytest.approx(norm.item(), rel=1e-5)
        ours.step(0.01 / (step + 1), 20.0 / (norm.item() + 1e-6))
        theirs.step()
        assert all(p.grad is None for p in llm.parameters())
    for (name, p), q in zip(llm.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7), name


@pytest.mark.reference
def test_bf16_weights_move_where_naive_adamw_stands_still(tiny):
    llm = lm.load_model(tiny, dtype=torch.bfloat16)
    naive, wide = lm.load_model(tiny, dtype=torch.bfloat16), lm.load_model(tiny)
    with torch.no_grad():
        for p, q in zip(wide.parameters(), llm.parameters(), strict=True):
            p.copy_(q)
    before = [p.detach().clone() for p in llm.parameters()]
    ours = dpo.AdamW(llm, options_of())
    theirs = torch.optim.AdamW(naive.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0)
    exact = torch.optim.AdamW(wide.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0)
    for _ in range(100):
        for one in (llm, naive, wide):  # the same direction every time, as a steady signal gives
            set_gradients(one, 1, torch.bfloat16 if one is naive else torch.float32)
        ours.step(1e-6, 1.0)
        theirs.step()
        exact.step()

    def moved(one, tensors):
        return sum((p != b).sum().item() for p, b in zip(one.parameters(), tensors, strict=True))

    big = sum((b.abs() > 1e-3).sum().item() for b in before)
    assert moved(naive, before) < 0.02 * big  # only the weights next to zero
    assert moved(llm, before) > 0.05 * big
    rounded = [p.detach().bfloat16() for p in wide.parameters()]
    assert moved(llm, rounded) < 1e-3 * big  # the rounding of what float32 weights become


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_state_in_host_memory(tiny, tmp_path, dtype):
    """Exactly as many bytes as numbers times four, the same arithmetic, and it is saved whole."""
    twins = [lm.load_model(tiny, dtype=dtype) for _ in range(2)]
    places = ("same", "cpu")
    optimizers = [
        dpo.AdamW(llm, options_of(optimizer_device=place))
        for llm, place in zip(twins, places, strict=True)
    ]
    for step in range(3):
        for llm, optimizer in zip(twins, optimizers, strict=True):
            set_gradients(llm, step)
            optimizer.step(1e-3, 0.5)
    first, second = (optimizer.state for optimizer in optimizers)
    assert all(torch.equal(first[name], second[name]) for name in first)
    count = sum(p.numel() for p in twins[0].parameters())
    for kind in ("mean", "square", "weight"):
        views = [second[f"{kind}.{name}"] for name, _ in twins[1].named_parameters()]
        assert {(x.dtype, x.device.type) for x in views} == {(torch.float32, "cpu")}
        if kind == "weight" and dtype == torch.float32:  # the weights are their own master copy
            own = [p.data_ptr() for p in twins[1].parameters()]
            assert [x.data_ptr() for x in views] == own
            continue
        assert buffer_bytes(views)[0] == count * 4
    for number in (1, 2):
        dpo.save_state(tmp_path, optimizers[1], {"epoch": number})
        stored = list(lm.stored_tensors(tmp_path / f"epoch-{number}"))
        (file,) = {file for file, _, _ in stored}
        found = {name: tensor for _, name, tensor in stored}
        assert found.keys() == second.keys()
        assert all(torch.equal(found[name], second[name]) for name in found)
        assert file.stat().st_size < 3 * 4 * count + 10_000


def test_learning_rate():
    def rates(total, **options):
        return [dpo.learning_rate(s, total, options_of(lr=2.0, **options)) for s in (1, 2, 3, 5)]

    assert rates(5) == [2, 2, 2, 2]
    assert rates(5, warmup_steps=4) == [0.5, 1, 1.5, 2]
    cosine = rates(6, warmup_steps=2, lr_schedule="cosine")
    assert cosine == pytest.approx([1, 2, 2, 1 + math.cos(math.pi / 2)])


# TRL


@pytest.mark.reference
def test_five_steps_end_where_trl_ends(tmp_path):
    policy = write_policy(tmp_path / "policy")
    llm, start = lm.load_model(policy), load_file(policy / "model.safetensors")
    pairs, records = dpo.read_pairs(FOLDER / "pairs.jsonl", llm.config), []
    dpo.train(llm, pairs, options_of(**OPTIONS, micro_batch_tokens=150), log=records.append)
    names = {
        "loss": "loss",
        "grad_norm": "grad_norm",
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "chosen_logprob": "logps/chosen",
        "rejected_logprob": "logps/rejected",
        "lr": "learning_rate",
    }
    theirs = json.loads((FOLDER / "log.json").read_text())
    for record, row in zip(records[1:], theirs[1:], strict=True):
        assert record["step"] == row["step"] and record["epoch"] == row["epoch"]
        for name, trl_name in names.items():
            assert record[name] == pytest.approx(row[trl_name], rel=1e-4, abs=1e-4), name
    trained = load_file(FOLDER / "trained.safetensors")
    away = sum((p - trained[name]).square().sum() for name, p in llm.named_parameters()).sqrt()
    distance = sum((trained[name] - start[name]).square().sum() for name in start).sqrt()
    assert away / distance < 5e-4  # rounding alone; the target is 0.02


# Pairs


GOOD = {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen_ids": None}, "chosen_ids is None, not a list of token ids"),
        ({"rejected_ids": []}, "rejected_ids is [], not a list of token ids"),
        ({"prompt_ids": []}, "prompt_ids is [], not a list"),
        ({"prompt_ids": "1 2"}, "prompt_ids is '1 2', not a list"),
        ({"chosen_ids": [3, 264]}, "chosen_ids has an id outside of 0 to 263"),
        ({"chosen_ids": [-1]}, "chosen_ids has an id outside"),
        ({"chosen_ids": [True]}, "chosen_ids is [True], not a list"),
        ({"chosen_ids": [1.0]}, "chosen_ids is [1.0], not a list"),
        ({"chosen_ids": [[1]]}, "chosen_ids is [[1]], not a list"),
        ({"rejected_ids": [7] * 255}, "257 tokens in a context of 256"),
    ],
)
def test_bad_ids_are_refused_by_line(tiny, tmp_path, change, message):
    file = write_rows(tmp_path / "pairs.jsonl", [GOOD, GOOD | change])
    with pytest.raises(lm.InputError) as caught:
        dpo.read_pairs(file, lm.read_config(tiny))
    assert f"{file}:2: " in str(caught.value) and message in str(caught.value)


def test_files_changed_at_random_are_read_or_refused(tiny, tmp_path):
    """Bytes cut, changed or put in: no other end than pairs or an InputError."""
    file, config = write_rows(tmp_path / "pairs", [GOOD, GOOD | {"id": "x"}]), lm.read_config(tiny)
    read_or_refuse(lambda: dpo.read_pairs(file, config), file, [b"9", b"e9"])
    with pytest.raises(lm.InputError, match="there is no pair in it"):
        dpo.read_pairs(write_rows(tmp_path / "none", []), config)


# Going on after a stop


def train_all(folder, pairs, options, state=None, dtype=torch.float32, **hooks):
    llm = lm.load_model(folder, dtype=dtype)
    dpo.train(llm, pairs, options, state, **hooks)
    return llm.state_dict()


class Stop(Exception):
    pass


def stop_at(place):
    """A hook that raises at one place: the number of a step's record, or of an epoch."""

    def hook(seen, *_):
        if (seen["step"] if isinstance(seen, dict) else seen) == place:
            raise Stop

    return hook


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


SHORT = {"lr": 1e-3, "epochs": 3, "batch_size": 3}  # 8 pairs: 3 steps an epoch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_stopped_anywhere_ends_in_the_same_bytes(tiny, tmp_path, dtype):
    options, pairs, state = options_of(**SHORT), draw_pairs(8), tmp_path / "state"
    weights, steps = {}, []  # at each epoch's end

    def note(epoch, llm):
        weights[epoch] = {name: p.clone() for name, p in llm.state_dict().items()}

    expected = train_all(tiny, pairs, options, dtype=dtype, end_of_epoch=note)
    assert list(weights) == [1, 2, 3]
    assert same(weights[3], expected) and not same(weights[2], expected)

    def run(**hooks):
        return train_all(tiny, pairs, options, state, dtype, **hooks)

    def again(epoch, llm):
        assert same(llm.state_dict(), weights[epoch])

    def log(record):
        steps.append(record["step"])

    # In an epoch's midst, and inside end_of_epoch, which is then called again.
    for step, epoch in ((2, 9), (9, 1), (9, 2), (5, 9), (9, 2), (8, 9)):
        with pytest.raises(Stop):
            run(log=stop_at(step), end_of_epoch=stop_at(epoch))
    assert [path.name for path in state.iterdir()] == ["epoch-2"]
    assert same(run(log=log, end_of_epoch=again), expected)
    assert steps == [7, 8, 9]
    # A finished run goes on from its last state: nothing is trained, the weights are there.
    assert same(run(log=stop_at(1), end_of_epoch=stop_at(1)), expected)


def test_half_written_states_are_passed_over(tiny, tmp_path, monkeypatch):
    options, pairs, state = options_of(**SHORT), draw_pairs(8), tmp_path / "state"
    expected = train_all(tiny, pairs, options)
    save, calls = dpo.save_file, []

    def fail_second(tensors, file):
        save(tensors, file)
        calls.append(file)
        if len(calls) == 2:
            raise Stop

    monkeypatch.setattr(dpo, "save_file", fail_second)
    with pytest.raises(Stop):
        train_all(tiny, pairs, options, state)
    monkeypatch.undo()
    assert {path.name for path in state.iterdir()} == {"epoch-1", "epoch-2.partial"}
    remove = shutil.rmtree

    def fail_first(path, **options):
        if path.name == "epoch-1":
            raise Stop
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", fail_first)
    with pytest.raises(Stop):
        train_all(tiny, pairs, options, state)
    monkeypatch.undo()
    assert {path.name for path in state.iterdir()} == {"epoch-1", "epoch-2"}
    assert same(train_all(tiny, pairs, options, state, log=stop_at(6)), expected)


def test_a_state_of_another_run_is_refused_by_name(tiny, tmp_path):
    options, pairs, state = options_of(**SHORT), draw_pairs(8), tmp_path / "state"
    with pytest.raises(Stop):
        train_all(tiny, pairs, options, state, log=stop_at(4))
    for change, message in (
        ({"lr": 2e-3}, r"state: lr was 0\.001 and is 0\.002: remove it"),
        ({"beta": 0.2}, r"state: beta was 0\.1 and is 0\.2"),
        ({"micro_batch_tokens": 50}, "state: micro_batch_tokens was 100 and is 50"),
    ):
        with pytest.raises(lm.InputError, match=message):
            train_all(tiny, pairs, options_of(**SHORT | change), state)
    with pytest.raises(lm.InputError, match="state: pairs was"):
        train_all(tiny, draw_pairs(8, seed=1), options, state)
    other = write_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(lm.InputError, match="state: weights was"):
        train_all(other, pairs, options, state)
    for name, message in (("model.safetensors", "not a whole"), ("key.json", "not UTF-8 JSON")):
        file = state / "epoch-1" / name
        file.write_bytes(file.read_bytes()[:99])
        with pytest.raises(lm.InputError, match=rf"{name}: {message}.*\Z"):
            train_all(tiny, pairs, options, state)


# Not finite


def poison(llm, token):
    with torch.no_grad():
        llm.model.embed_tokens.weight[token] = math.nan


def test_a_pair_without_finite_logprobs_is_named(llm):
    pairs = [dpo.Pair(f"p:{i}", [1, 2], [3], [4 + i]) for i in range(3)]
    pairs[1].chosen_ids = [200, 3]
    poison(llm, 200)
    with pytest.raises(lm.InputError, match=r"p:1: the loss is nan"):
        dpo.train(llm, pairs, options_of(batch_size=3))


def test_a_loss_that_is_not_finite_names_its_pair_and_keeps_the_state(llm, tmp_path):
    pairs = [dpo.Pair(f"p:{i}", [1, 2], [3, 5], [4 + i, 6]) for i in range(3)]
    pairs[2].rejected_ids = [200, 3]

    def log(record):
        if record["step"] == 2:
            poison(llm, 200)

    with pytest.raises(lm.InputError, match="p:2: the loss is nan"):
        dpo.train(llm, pairs, options_of(batch_size=3), tmp_path / "state", log)
    assert (tmp_path / "state" / "epoch-2" / "model.safetensors").exists()


def test_a_gradient_that_is_not_finite_names_its_batch(llm):
    pairs = with_reference([dpo.Pair(f"p:{i}", [1, 2], [3, 5], [4 + i, 6]) for i in range(4)])
    llm.model.embed_tokens.weight.register_hook(lambda grad: grad * math.inf)
    before = llm.head.detach().clone()
    with pytest.raises(lm.InputError, match="p:0 and its batch: the gradient's norm is"):
        dpo.train_step(llm, pairs, dpo.AdamW(llm, options_of()), 1)
    assert torch.equal(llm.head, before)


def test_float16_is_refused(tiny):
    llm = lm.load_model(tiny, dtype=torch.float16)
    with pytest.raises(lm.InputError, match="float16"):
        dpo.train(llm, draw_pairs(2), options_of())


# Memory


def test_options_are_filled_in_by_trying_and_nothing_is_left(llm, monkeypatch):
    pairs, tried, add = draw_pairs(5), [], dpo.add_gradient
    longest = max(pairs, key=lambda pair: pair.num_tokens)

    def watched(model, batch, options):
        tried.append((batch, options))
        return add(model, batch, options)

    monkeypatch.setattr(dpo, "add_gradient", watched)
    before = {name: p.clone() for name, p in llm.state_dict().items()}
    found = dpo.fit_options(llm, longest, dpo.Options(lr=0.5))
    values = (found.lr, found.micro_batch_tokens, found.keep_activations, found.optimizer_device)
    assert values == (0.5, 1024, 1, "same")
    given = options_of(micro_batch_tokens=70, keep_activations=0, optimizer_device="cpu")
    assert dpo.fit_options(llm, longest, given) == given  # what was asked for stays
    # First any pair, for the sums of gradients; then at once as much as the largest micro-batch.
    for (one, _), (batch, options), tokens in zip(tried[::2], tried[1::2], (1024, 70), strict=True):
        sizes = [pair.num_tokens for pair in batch]
        assert len(one) == 1 and set(sizes) == {longest.num_tokens}
        assert replace(options, micro_batch_tokens=tokens) in (found, given)
        assert sum(sizes) - sizes[0] < tokens <= sum(sizes) == options.micro_batch_tokens
    assert same(llm.state_dict(), before) and all(p.grad is None for p in llm.parameters())
    assert longest.reference == ()


@pytest.mark.parametrize("where", ["add_gradient", "AdamW"])
def test_running_out_of_memory_shows_in_the_trial(llm, monkeypatch, where):
    monkeypatch.setattr(dpo, where, mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out")))
    with pytest.raises(torch.OutOfMemoryError):
        dpo.fit_options(llm, dpo.Pair("", [1], [2], [3, 4]), dpo.Options())


# Command line


def arguments(folder, pairs, output):
    fixed = ["--model", folder, "--pairs", pairs, "--output", output, "--epochs", "2"]
    return [*map(str, fixed), "--batch-size", "3", "--lr", "1e-3"]


def run_main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["dpo.py", *words])
    dpo.main()


def test_killed_command_goes_on_to_the_same_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    rows = [
        {"prompt_ids": p.prompt_ids, "chosen_ids": p.chosen_ids, "rejected_ids": p.rejected_ids}
        for p in draw_pairs(8)
    ]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    killed = arguments(tiny, pairs, tmp_path / "killed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, dpo.__file__, *killed]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        for line in process.stdout:
            if b"'step': 4" in line:
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed").exists()
    run_main(monkeypatch, *killed)
    assert "'step': 3" not in capsys.readouterr().out
    run_main(monkeypatch, *arguments(tiny, pairs, tmp_path / "whole"))
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert "model.safetensors" in files and "tokenizer.json" in files
    for name in files:
        both = [(tmp_path / folder / name).read_bytes() for folder in ("whole", "killed")]
        assert both[0] == both[1], name
    assert not list(tmp_path.glob("*.state")) and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("ends", "endless"),  # of the chosen outputs; 257 and 260 are the model's stop tokens
    [([257, 260, 257], 0), ([260, 5, 258], 2), ([5, 5, 5], 3)],
)
def test_chosen_outputs_without_a_stop_token_are_counted(
    tiny, tmp_path, monkeypatch, capsys, ends, endless
):
    rows = [GOOD | {"chosen_ids": [3, end]} for end in ends]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    run_main(monkeypatch, *arguments(tiny, pairs, tmp_path / "out"))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    count = f"{endless} of 3 chosen outputs do not end in one of the model's stop tokens (257, 260)"
    assert [count in line and "unlearn to stop" in line for line in said] == [True] * bool(endless)
    assert (tmp_path / "out" / "model.safetensors").exists()


REFUSED = {  # words of the command line, with {} the test's folder: the message
    "--output {}/done --model none --pairs none": "done exists already",
    "--pairs {}/none": "none",
    "--model {}/none": "none: no such folder",
    "--lr nan": "argument --lr: nan is out of range",
    "--beta 0": "argument --beta: 0.0 is out of range",
    "--epochs 0": "argument --epochs: 0 is out of range",
    "--adam-beta2 1": "argument --adam-beta2: 1.0 is out of range",
    "--micro-batch-tokens 0": "argument --micro-batch-tokens: 0 is out of range",
    "--lr-schedule linear": "--lr-schedule",
    "--optimizer-device disk": "--optimizer-device",
    "--epoch 3": "--epoch 3",
    "--dtype float16": "--dtype: invalid choice: 'float16'",
}


@pytest.mark.parametrize("line", REFUSED)
def test_commands_refused(tiny, tmp_path, monkeypatch, line):
    (tmp_path / "done").mkdir()
    pairs = write_rows(tmp_path / "pairs", [GOOD])
    words = line.replace("{}", str(tmp_path)).split()
    with pytest.raises((lm.InputError, OSError), match=REFUSED[line]):
        run_main(monkeypatch, *arguments(tiny, pairs, tmp_path / "out"), *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done", "pairs"]
