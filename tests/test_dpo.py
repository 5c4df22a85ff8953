"""dpo.py: the loss, log-probabilities and gradients against direct forms, AdamW against torch's,
five steps against TRL's, resume to the same bytes.

    python -m pytest tests/test_dpo.py
"""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LLAMA, byte_tokenizer, write_checkpoint, write_tokenizer
from make_trl_fixture import CONFIG, FOLDER, OPTIONS, write_policy
from safetensors.torch import load_file

import dpo
import model

CPU = torch.device("cpu")


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


@pytest.fixture
def llm(tiny):
    return model.load_model(tiny)


@pytest.fixture
def llm64(tiny):
    return model.load_model(tiny, dtype=torch.float64)


def gradients(llm):
    return {name: p.grad.clone() for name, p in llm.named_parameters()}


def relative(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


# The loss


def test_loss_at_equal_rewards_is_log_two():
    x = torch.tensor([-3.0, -500.0])
    losses, chosen, rejected = dpo.dpo_loss(x, x - 7, x, x - 7, beta=0.3)
    assert torch.allclose(losses, torch.full((2,), math.log(2)))
    assert chosen.tolist() == rejected.tolist() == [0, 0]


def test_loss_and_rewards_in_closed_form():
    policy = [torch.tensor([-10.0, -80.0], dtype=torch.float64) for _ in range(2)]
    policy[1] = policy[1] - torch.tensor([4.0, -9.0])
    reference = [torch.tensor([-12.0, -75.0]).double(), torch.tensor([-13.0, -72.0]).double()]
    losses, chosen, rejected = dpo.dpo_loss(*policy, *reference, beta=0.5)
    margins = [0.5 * ((-10 + 12) - (-14 + 13)), 0.5 * ((-80 + 75) - (-71 + 72))]
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-m)) for m in margins])
    assert chosen.tolist() == [1, -2.5]
    assert rejected.tolist() == [-0.5, 0.5]


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


@pytest.mark.parametrize("keep", [0, 1, 9])
@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_logprobs_and_gradients_equal_the_direct_form(llm64, monkeypatch, rows, keep):
    monkeypatch.setattr(dpo, "LOGIT_ROWS", rows)
    pairs, weights = draw_pairs(5), torch.tensor([1.0, -2.0, 0.5, 3.0, -1.5], dtype=torch.float64)
    results = []
    for chosen, rejected in (
        dpo.output_logprobs(llm64, pairs, keep),
        direct_logprobs(llm64, pairs),
    ):
        llm64.zero_grad()
        (chosen * weights - rejected * weights.flip(0)).sum().backward()
        results.append((chosen, rejected, gradients(llm64)))
    (chosen, rejected, grads), (direct_chosen, direct_rejected, direct_grads) = results
    assert relative(chosen, direct_chosen) < 1e-12 and relative(rejected, direct_rejected) < 1e-12
    for name, grad in grads.items():
        assert relative(grad, direct_grads[name]) < 1e-10, name


def test_tied_head_gets_both_gradients(tmp_path):
    folder = write_checkpoint(tmp_path / "tied", LLAMA | {"tie_word_embeddings": True})
    llm, pairs = model.load_model(folder, dtype=torch.float64), draw_pairs(3)
    (dpo.output_logprobs(llm, pairs)[0].sum()).backward()
    packed = llm.head.grad.clone()
    llm.zero_grad()
    direct_logprobs(llm, pairs)[0].sum().backward()
    assert relative(packed, llm.head.grad) < 1e-10


def test_logits_are_never_all_there(llm, monkeypatch):
    """No tensor of the forward or backward pass has more than LOGIT_ROWS * V elements."""
    monkeypatch.setattr(dpo, "LOGIT_ROWS", 4)
    seen = []
    linear = F.linear

    def watched(x, weight, bias=None):
        seen.append((x.shape[0], weight.shape[0]))
        return linear(x, weight, bias)

    monkeypatch.setattr(dpo.F, "linear", watched)
    dpo.output_logprobs(llm, draw_pairs(4))[0].sum().backward()
    heads = [rows for rows, vocab in seen if vocab == LLAMA["vocab_size"]]
    assert len(heads) > 8 and max(heads) == 4


def test_bf16_logprobs_are_summed_in_float32(tiny):
    llm, pairs = model.load_model(tiny, dtype=torch.bfloat16), draw_pairs(3)
    chosen, _ = dpo.output_logprobs(llm, pairs)
    assert chosen.dtype == torch.float32
    assert relative(chosen, direct_logprobs(model.load_model(tiny), pairs)[0]) < 0.02


# The batch's gradient


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
        options = dpo.Options(micro_batch_tokens=tokens, nll_weight=nll_weight)
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
    record = dpo.add_gradient(llm, pairs, dpo.Options(beta=0.1))
    assert record["accuracy"] == 0.75
    assert record["margin"] == pytest.approx(0.1 * sum(gaps) / 4, rel=1e-3)


def test_micro_batches_fill_up_to_the_budget():
    pairs = [dpo.Pair("", [1] * n, [1], [1]) for n in (3, 4, 5, 20, 1, 1)]
    cut = [[len(p) for p in part] for part in dpo.micro_batches(pairs, 8)]
    assert cut == [[3, 4], [5], [20], [1, 1]]


# The optimizer


def set_gradients(llm, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in llm.parameters():
        p.grad = scale * torch.randn(p.shape, generator=generator).to(p.dtype)


def test_adamw_equals_torch(tiny):
    options = dpo.Options(adam_beta1=0.8, adam_beta2=0.97, weight_decay=0.1)
    llm, twin = model.load_model(tiny), model.load_model(tiny)
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


def test_bf16_weights_move_where_naive_adamw_stands_still(tiny):
    llm = model.load_model(tiny, dtype=torch.bfloat16)
    naive, wide = model.load_model(tiny, dtype=torch.bfloat16), model.load_model(tiny)
    with torch.no_grad():
        for p, q in zip(wide.parameters(), llm.parameters(), strict=True):
            p.copy_(q)
    before = [p.detach().clone() for p in llm.parameters()]
    ours = dpo.AdamW(llm, dpo.Options())
    theirs = torch.optim.AdamW(naive.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0)
    exact = torch.optim.AdamW(wide.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0)
    for _ in range(100):
        for one in (llm, naive, wide):  # the same direction every time, as a steady signal gives
            set_gradients(one, seed=1)
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


def test_peak_memory_is_that_of_this_process_alone():
    words = "import torch, dpo; held = b'x' * 2**28; print(dpo.peak_memory(torch.device('cpu')))"
    ballast = b"x" * 2**30  # of the process that begins the other
    done = subprocess.run(
        [sys.executable, "-c", words],
        capture_output=True,
        text=True,
        cwd=Path(dpo.__file__).parent,
        check=True,
    )
    assert 2**28 < int(done.stdout) < len(ballast)


def test_optimizer_in_host_memory_is_the_same_arithmetic(tiny):
    """On the CPU both places are one; what is left to see is that the state stays on the host."""
    llm = model.load_model(tiny, dtype=torch.bfloat16)
    optimizer = dpo.AdamW(llm, dpo.Options(optimizer_device="cpu"))
    assert {t.device.type for t in optimizer.state.values()} == {"cpu"}
    assert {t.dtype for t in optimizer.state.values()} == {torch.float32}


def test_learning_rate():
    def rates(total, **options):
        return [dpo.learning_rate(s, total, dpo.Options(lr=2.0, **options)) for s in (1, 2, 3, 5)]

    assert rates(5) == [2, 2, 2, 2]
    assert rates(5, warmup_steps=4) == [0.5, 1, 1.5, 2]
    cosine = rates(6, warmup_steps=2, lr_schedule="cosine")
    assert cosine == pytest.approx([1, 2, 2, 1 + math.cos(math.pi / 2)])


# TRL


def test_text_gets_the_ids_of_trl(tmp_path):
    policy = write_policy(tmp_path / "policy")
    tokenizer, config = model.load_tokenizer(policy), model.read_config(policy)
    rows = [row for _, row in model.read_jsonl(FOLDER / "pairs.jsonl")]
    texts = [{side: row[side] for side in dpo.SIDES} for row in rows]
    model.write_jsonl(tmp_path / "text.jsonl", texts)
    from_text = dpo.read_pairs(tmp_path / "text.jsonl", tokenizer, config)
    for pair, row in zip(from_text, rows, strict=True):
        assert [pair.prompt_ids, pair.chosen_ids, pair.rejected_ids] == [
            row[f"{side}_ids"] for side in dpo.SIDES
        ]


def test_five_steps_end_where_trl_ends(tmp_path):
    policy = write_policy(tmp_path / "policy")
    llm, start = model.load_model(policy), load_file(policy / "model.safetensors")
    pairs = dpo.read_pairs(FOLDER / "pairs.jsonl", model.load_tokenizer(policy), llm.config)
    records = []
    dpo.train(llm, pairs, dpo.Options(**OPTIONS, micro_batch_tokens=150), log=records.append)
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


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD = {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6]}
BAD_ROWS = [
    ({"chosen_ids": None}, "chosen_ids: found nothing"),
    ({"rejected_ids": []}, "rejected_ids: found an empty list"),
    ({"prompt_ids": []}, "prompt_ids: found an empty list"),
    ({"prompt_ids": "1 2"}, "prompt_ids: found a str"),
    ({"chosen_ids": [3, 264]}, "chosen_ids: found 264, expected ids from 0 to 263"),
    ({"chosen_ids": [-1]}, "chosen_ids: found -1"),
    ({"chosen_ids": [True]}, "chosen_ids: found True"),
    ({"chosen_ids": [1.0]}, "chosen_ids: found 1.0"),
    ({"chosen_ids": [[1]]}, "chosen_ids: found [1]"),
    ({"rejected_ids": [7] * 255}, "prompt and output: found 257, expected 256 tokens at most"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ROWS)
def test_bad_ids_are_refused_by_line(tiny, tmp_path, change, message):
    file = write_rows(tmp_path / "pairs.jsonl", GOOD, GOOD | change)
    with pytest.raises(model.InputError) as caught:
        dpo.read_pairs(file, model.load_tokenizer(tiny), model.read_config(tiny))
    assert f"{file}:2: " in str(caught.value) and message in str(caught.value)


def test_bad_texts_are_refused(tiny, tmp_path):
    tokenizer, config = model.load_tokenizer(tiny), model.read_config(tiny)
    text = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for change, message in (
        ({"rejected": None}, ":1: rejected: found nothing, expected a text"),
        ({"prompt": ["a"]}, ":1: prompt: found a list"),
    ):
        with pytest.raises(model.InputError, match=message):
            dpo.read_pairs(write_rows(tmp_path / "bad.jsonl", text | change), tokenizer, config)
    with pytest.raises(model.InputError, match="found no pair"):
        dpo.read_pairs(write_rows(tmp_path / "none.jsonl"), tokenizer, config)


def test_bos_is_not_doubled(tiny, tmp_path):
    tokenizer, config = model.load_tokenizer(tiny), model.read_config(tiny)
    rows = [{"prompt": p, "chosen": "b", "rejected": "c"} for p in ("a", "<|begin_of_text|>a")]
    plain, marked = dpo.read_pairs(write_rows(tmp_path / "p.jsonl", *rows), tokenizer, config)
    assert plain.prompt_ids == marked.prompt_ids == [256, ord("a") - 33]
    assert plain.chosen_ids == [ord("b") - 33, 257] and plain.rejected_ids[-1] == 257


def test_a_token_across_the_boundary_belongs_to_the_output(tmp_path):
    """As in TRL: the prompt ends where the three tokenizations part."""
    tokenizer = byte_tokenizer(merges=[("a", "b")])
    write_tokenizer(tmp_path, tokenizer, stops=("<|end_of_text|>",))
    ab, a, c, x, bos, eos = (
        tokenizer.token_to_id(t)
        for t in ("ab", "a", "c", "x", "<|begin_of_text|>", "<|end_of_text|>")
    )
    ids = dpo.tokenize_pair(model.load_tokenizer(tmp_path), "xa", "b", "c")
    assert ids == ([bos, x], [ab, eos], [a, c, eos])


# Going on after a stop


def train_all(tiny, pairs, options, state=None, **hooks):
    llm = model.load_model(tiny)
    dpo.train(llm, pairs, options, state, **hooks)
    return llm.state_dict()


class Stop(Exception):
    pass


def stop_after(count):
    """A hook that raises at its call number `count`."""

    def hook(*_):
        nonlocal count
        count -= 1
        if count == 0:
            raise Stop

    return hook


OPTIONS_SHORT = {"lr": 1e-3, "epochs": 3, "batch_size": 3, "micro_batch_tokens": 100}


@pytest.mark.parametrize("save_steps", [0, 2])
def test_a_run_stopped_anywhere_ends_in_the_same_bytes(tiny, tmp_path, save_steps):
    options, pairs = dpo.Options(**OPTIONS_SHORT, save_steps=save_steps), draw_pairs(8)
    ended = []
    expected = train_all(tiny, pairs, options, end_of_epoch=lambda epoch, _: ended.append(epoch))
    assert ended == [1, 2, 3]
    ended.clear()
    state = tmp_path / "state"

    def note(epoch, llm):
        ended.append(epoch)
        if ended == [1, 2]:
            raise Stop  # in the middle of an epoch's end: it is called again

    for stop in (1, 4, 2, 5):
        with pytest.raises(Stop):
            train_all(tiny, pairs, options, state, log=stop_after(stop), end_of_epoch=note)
    steps = []
    result = train_all(
        tiny, pairs, options, state, log=lambda r: steps.append(r["step"]), end_of_epoch=note
    )
    assert ended == [1, 2, 2, 3] and steps == [7, 8, 9]
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    again = train_all(tiny, pairs, options, state, log=stop_after(1), end_of_epoch=stop_after(1))
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_half_written_states_are_passed_over(tiny, tmp_path, monkeypatch):
    options, pairs, state = dpo.Options(**OPTIONS_SHORT), draw_pairs(8), tmp_path / "state"
    expected = train_all(tiny, pairs, options)
    replace, calls = os.replace, []

    def fail_second(source, target):
        if target.name.startswith("step-"):
            calls.append(target)
            if len(calls) == 2:
                source.rename(tmp_path / "half")  # as a kill would leave it
                raise Stop
        replace(source, target)

    monkeypatch.setattr(dpo.os, "replace", fail_second)
    with pytest.raises(Stop):
        train_all(tiny, pairs, options, state)
    monkeypatch.undo()
    (tmp_path / "half").rename(f"{calls[1]}.partial")
    assert {path.name for path in state.glob("step-*")} == {"step-3", f"{calls[1].name}.partial"}
    result = train_all(tiny, pairs, options, state)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_bf16_goes_on_from_its_master_weights(tiny, tmp_path):
    def run(state=None, log=None):
        llm = model.load_model(tiny, dtype=torch.bfloat16)
        dpo.train(llm, draw_pairs(4), dpo.Options(**OPTIONS_SHORT | {"lr": 1e-5}), state, log)
        return llm.state_dict()

    with pytest.raises(Stop):
        run(tmp_path / "state", stop_after(5))
    result, expected = run(tmp_path / "state"), run()
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_a_state_of_another_run_is_refused(tiny, tmp_path):
    options, pairs, state = dpo.Options(**OPTIONS_SHORT), draw_pairs(8), tmp_path / "state"
    with pytest.raises(Stop):
        train_all(tiny, pairs, options, state, log=stop_after(4))
    other = dpo.Options(**OPTIONS_SHORT | {"lr": 2e-3})
    with pytest.raises(model.InputError, match=r"lr: found 0.001, expected 0.002"):
        train_all(tiny, pairs, other, state)
    with pytest.raises(model.InputError, match="other weights or pairs"):
        train_all(tiny, draw_pairs(8, seed=1), options, state)
    (file,) = state.glob("step-*/model.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(model.InputError, match="not a saved state"):
        train_all(tiny, pairs, options, state)


def test_reference_is_kept_and_never_taken_for_anothers(tiny, tmp_path, monkeypatch):
    options, pairs, state = dpo.Options(**OPTIONS_SHORT), draw_pairs(5), tmp_path / "state"
    llm = model.load_model(tiny)
    chosen, rejected = direct_logprobs(llm, pairs)
    with pytest.raises(Stop):
        dpo.train(llm, pairs, options, state, log=stop_after(1))
    kept = json.loads((state / "reference.json").read_text())["logprobs"]
    assert np.allclose(kept, torch.stack([chosen, rejected], 1).tolist(), rtol=1e-5)
    calls = []
    compute = dpo.reference_logprobs
    monkeypatch.setattr(dpo, "reference_logprobs", lambda *a: calls.append(1) or compute(*a))
    with pytest.raises(Stop):
        train_all(tiny, pairs, options, state, log=stop_after(1))
    assert not calls
    with pytest.raises(Stop):
        train_all(tiny, pairs[:4], options, state, log=stop_after(1))
    assert calls


# Not finite


def poison(llm, token):
    with torch.no_grad():
        llm.model.embed_tokens.weight[token] = math.nan


def test_a_pair_without_finite_logprobs_is_named(llm):
    pairs = [dpo.Pair(f"p:{i}", [1, 2], [3], [4 + i]) for i in range(3)]
    pairs[1].chosen_ids = [200, 3]
    poison(llm, 200)
    with pytest.raises(model.InputError, match=r"p:1: log-probabilities: found .*nan"):
        dpo.train(llm, pairs, dpo.Options(batch_size=3))


def test_a_loss_that_is_not_finite_names_its_pair_and_keeps_the_state(llm, tmp_path):
    pairs = [dpo.Pair(f"p:{i}", [1, 2], [3, 5], [4 + i, 6]) for i in range(3)]
    pairs[2].rejected_ids = [200, 3]

    def log(record):
        if record["step"] == 2:
            poison(llm, 200)

    with pytest.raises(model.InputError, match="p:2: loss: found nan"):
        dpo.train(llm, pairs, dpo.Options(batch_size=3), tmp_path / "state", log)
    assert (tmp_path / "state" / "step-2" / "model.safetensors").exists()


def test_a_gradient_that_is_not_finite_names_its_pair(llm):
    pairs = with_reference([dpo.Pair(f"p:{i}", [1, 2], [3, 5], [4 + i, 6]) for i in range(4)])
    pairs[2].rejected_ids = [200, 3]

    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.inf

    embed = llm.model.embed_tokens

    def hook(module, inputs, output):
        return Break.apply(output) if (inputs[0] == 200).any() else output

    embed.register_forward_hook(hook)
    with pytest.raises(model.InputError, match="p:2: gradient: found one that is not"):
        dpo.train_step(llm, pairs, dpo.AdamW(llm, dpo.Options(micro_batch_tokens=1)), 1)


def test_float16_is_refused(tiny):
    llm = model.load_model(tiny, dtype=torch.float16)
    with pytest.raises(model.InputError, match="float16"):
        dpo.train(llm, draw_pairs(2), dpo.Options())


# Memory


LLAMA_8B = LLAMA | {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


def write_config(folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return model.read_config(folder)


def test_estimate_at_the_shape_of_llama_3_8b(tmp_path):
    config = write_config(tmp_path / "8b", LLAMA_8B)
    parts = dpo.memory_parts(config, 8192, dpo.Options(optimizer_device="cpu"), torch.bfloat16)
    count = 8_030_261_248  # the published number of parameters
    assert parts["weights"] == parts["gradients"] == 2 * count
    assert parts["optimizer"] == 12 * count
    gib = {name: size / 2**30 for name, size in parts.items()}
    passing = gib["activations"] + max(gib["logits"], gib["block"])
    assert gib["weights"] + gib["gradients"] + max(passing, gib["update"]) < 76


def test_what_cannot_fit_is_refused_with_advice(tmp_path, capsys):
    config = write_config(tmp_path / "huge", LLAMA_8B | {"intermediate_size": 2**20})
    pairs = draw_pairs(3)
    with pytest.raises(model.InputError, match=r"found .* GiB, expected .* try --dtype bfloat16"):
        dpo.check_memory(config, pairs, dpo.Options(), CPU, torch.float32)
    assert "weights" in capsys.readouterr().out
    assert dpo.check_memory(
        write_config(tmp_path / "small", LLAMA), pairs, dpo.Options(), CPU, torch.float32
    )


ACTIVATIONS = {"hidden_size": 64, "intermediate_size": 176}
WEIGHTS = {"hidden_size": 64, "intermediate_size": 90, "vocab_size": 2000}
LOGITS = {"hidden_size": 32, "intermediate_size": 56, "vocab_size": 3000}


@pytest.mark.parametrize(
    ("shape", "output", "keep", "dtype"),  # what most of the memory is, and an output's length
    [
        (ACTIVATIONS, 100, 0, torch.float32),
        (ACTIVATIONS, 100, 1, torch.bfloat16),
        (ACTIVATIONS, 100, 4, torch.float32),
        (WEIGHTS, 8, 1, torch.bfloat16),
        (LOGITS, 90, 1, torch.float32),
        (LOGITS, 90, 0, torch.bfloat16),
    ],
)
def test_estimate_is_within_a_tenth_of_the_peak(tmp_path, tensor_bytes, shape, output, keep, dtype):
    config = LLAMA | {"num_hidden_layers": 4} | shape
    llm = model.load_model(write_checkpoint(tmp_path / "x", config, dtype=dtype), dtype=dtype)
    pairs = [dpo.Pair(str(i), [1] * 9, [2] * output, [3] * output) for i in range(6)]
    options = dpo.Options(
        epochs=2, batch_size=6, keep_activations=keep, micro_batch_tokens=2 * len(pairs[0])
    )
    estimate = dpo.check_memory(llm.config, pairs, options, CPU, dtype)
    with tensor_bytes(llm) as tensors:
        dpo.train(llm, pairs, options)
    assert 0.9 < tensors.peak / estimate < 1.1


# Command line


def arguments(tiny, pairs, output):
    fixed = ["--model", tiny, "--pairs", pairs, "--output", output, "--epochs", "2"]
    return [*map(str, fixed), "--batch-size", "3", "--lr", "1e-3", "--save-steps", "1"]


def run_main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["dpo.py", *words])
    dpo.main()


@pytest.fixture
def pairs_file(tmp_path):
    rows = [
        {f"{side}_ids": getattr(pair, f"{side}_ids") for side in dpo.SIDES}
        for pair in draw_pairs(8)
    ]
    return write_rows(tmp_path / "pairs.jsonl", *rows)


def test_killed_command_goes_on_to_the_same_checkpoint(
    tiny, tmp_path, pairs_file, monkeypatch, capsys
):
    killed = arguments(tiny, pairs_file, tmp_path / "killed")
    command = [sys.executable, dpo.__file__, *killed]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        for line in process.stdout:
            if b" step 4 " in line:
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed").exists()
    run_main(monkeypatch, *killed)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("memory in GiB") and "measured" in lines[-1]
    assert "epoch 1 step 1" not in "".join(lines)
    run_main(monkeypatch, *arguments(tiny, pairs_file, tmp_path / "whole"))
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert "model.safetensors" in files and "tokenizer.json" in files
    for name in files:
        same = (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
        assert same, name
    assert not list(tmp_path.glob("*.state")) and not list(tmp_path.glob("*.partial"))


def test_a_finished_output_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "done").mkdir()
    with pytest.raises(model.InputError, match="already exists"):
        run_main(monkeypatch, *arguments("no-model", "no-pairs", tmp_path / "done"))


@pytest.mark.parametrize("words", ["--lr nan", "--beta 0", "--epochs 0", "--adam-beta2 1"])
def test_options_out_of_range_are_refused(tiny, tmp_path, monkeypatch, words):
    fixed = arguments(tiny, tmp_path / "p", tmp_path / "out")
    with pytest.raises(model.InputError, match=words.split()[0]):
        run_main(monkeypatch, *fixed, *words.split())


def test_fixture_config_is_the_one_that_was_trained():
    trained = load_file(FOLDER / "trained.safetensors")
    assert trained["lm_head.weight"].shape == (CONFIG["vocab_size"], CONFIG["hidden_size"])
