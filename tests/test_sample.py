"""sample.py: thought prompts, cutting, the law and the independence of what generate draws, files.

python -m pytest tests/test_sample.py
"""

import gc
import io
import json
import os
import random
import sys
import time
import weakref
from collections import deque
from types import SimpleNamespace

import model as lm
import sample

import numpy as np
import pytest
import torch
from conftest import (
    FIXTURES,
    LLAMA,
    LLAMA_TEMPLATE,
    cache_bytes_per_token,
    read_rows,
    write_checkpoint,
    write_tokenizer,
)

GREEDY = json.loads((FIXTURES / "greedy.json").read_text())
FAMILIES = json.loads((FIXTURES / "families.json").read_text())
SMALL = LLAMA | {"vocab_size": 97}


def drawn(made):
    return [[(c.ids, c.finished) for c in own] for own in made]


def request(name, prompt, stream):
    return sample.Completion(prompt=prompt, stream=stream, name=name)


def decoder_of(llm, slots, length=256):
    return sample.Decoder(llm, slots, length)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return lm.load_model(write_checkpoint(tmp_path_factory.mktemp("small"), SMALL, seed=5))


@pytest.fixture(scope="module")
def long_llm(tmp_path_factory):
    config = SMALL | {"max_position_embeddings": 1000}
    return lm.load_model(write_checkpoint(tmp_path_factory.mktemp("long"), config, seed=5))


decodes = pytest.mark.usefixtures("memory_order")  # a test that runs with both


@pytest.fixture(scope="module")
def greedy_model(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("greedy"), GREEDY["config"], GREEDY["seed"])
    return lm.load_model(folder)


def check_greedy(llm, case, prompts, slots):
    """What `generate` says greedily of `prompts` against a fixture's case; the outputs' lengths."""
    stops, law = case["stop_ids"], {"num_samples": 1, "temperature": 0}
    law |= {"max_new_tokens": case["max_new_tokens"], "stop_ids": stops}
    held = decoder_of(llm, slots)
    made = sample.generate(llm, prompts, **law, decoder=held)
    assert [own[0].ids for own in made] == case["outputs"]
    for (completion,) in made:
        assert completion.finished == (completion.ids[-1] in stops)
        assert not set(completion.ids[:-1]) & set(stops)
    return {len(own[0].ids) for own in made}


@decodes
@pytest.mark.reference
@pytest.mark.parametrize("slots", [2, 64])
def test_greedy_is_transformers_token_by_token(slots, greedy_model):
    """Prompts of 1 to 90 tokens in one batch, three stop ids, rows that end at different steps."""
    lengths = check_greedy(greedy_model, GREEDY, GREEDY["prompts"], slots)
    assert len(lengths) > 10 and 1 in lengths


@decodes
@pytest.mark.reference
@pytest.mark.parametrize("slots", [2, 64])
@pytest.mark.parametrize("name", FAMILIES["cases"])
def test_greedy_is_transformers_in_the_newer_families(name, slots, tmp_path):
    """Norms on q and k, and layers without rotation, through the cache."""
    case = FAMILIES["cases"][name]
    llm = lm.load_model(write_checkpoint(tmp_path, case["config"], case["seed"]))
    lengths = check_greedy(llm, case, FAMILIES["prompts"], slots)
    assert len(lengths) > 10 and 1 in lengths


def nucleus(logits, temperature, top_p):
    """The law by its definition, in float64: a loop over the sorted tokens."""
    probs = np.exp((logits - logits.max()) / temperature)
    probs /= probs.sum()
    law, mass = np.zeros_like(probs), 0.0
    for token in np.argsort(-probs, kind="stable"):
        if mass >= top_p:
            break
        law[token] = probs[token]
        mass += probs[token]
    return law / law.sum()


def chi_square_is_likely(counts, law):
    """Pearson's statistic against its mean; 4 sigma by the Wilson-Hilferty approximation."""
    expected = law * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    degrees = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5
    return abs(z) < 4


def exact_logits(llm, tokens):
    with torch.no_grad():
        return llm(torch.tensor([tokens]))[0, -1].double().numpy()


@pytest.mark.parametrize("V", [1, 97, 264, 1280, 49152])
def test_two_steps_down_the_cdf_find_the_place_of_one(V):
    """Against one float64 sum over the row, with zeros among the weights and uniforms at the ends.

    Blocks are of 1, 1, 8, 128 and 128 words.
    """
    draws = np.random.default_rng(V)
    weights = draws.exponential(size=V) * (draws.random(V) < 0.5)
    weights[draws.integers(V)] = V
    ends = [0.0, 2.0**-53, 1 - 2.0**-53]
    uniforms = np.concatenate([ends, draws.random(2000)])
    rows = torch.tensor(weights, dtype=torch.float32).expand(len(uniforms), V)
    found = sample.draw_from(rows, torch.tensor(uniforms)).numpy()
    cdf = np.cumsum(weights) / weights.sum()
    assert (weights[found] > 0).all()
    assert (uniforms < cdf[found] + 1e-6).all()
    assert (uniforms >= cdf[found] - weights[found] / weights.sum() - 1e-6).all()
    if V > 1:
        assert found.min() < V / 4 and len(set(found)) > 20


@pytest.mark.parametrize("temperature, top_p", [(0.8, 0.95), (1.0, 0.4), (1.0, 0.03)])
def test_the_law_over_a_vocabulary_of_blocks(temperature, top_p):
    draws = np.random.default_rng(5)
    logits = np.round(draws.normal(size=384) * 2, 1)  # so that some are equal
    count = 40_000
    rows = torch.tensor(logits, dtype=torch.float32).expand(count, -1)
    tokens = sample.draw(rows, torch.tensor(draws.random((count, 2))), temperature, top_p)
    counts, law = np.bincount(tokens, minlength=384), nucleus(logits, temperature, top_p)
    assert counts[law == 0].sum() == 0
    assert (law > 0).sum() == 1 or chi_square_is_likely(counts, law)


LAWS = [(0.8, 0.95), (1.0, 1.0), (1.7, 0.5), (5.0, 0.99), (0.3, 0.3)]


@pytest.mark.reference
@pytest.mark.parametrize("temperature, top_p", LAWS)
def test_the_first_tokens_law(temperature, top_p, llm):
    """8,000 draws against softmax(logits / T) cut at top-p; nothing outside the nucleus."""
    prompt, draws = [4, 8, 15, 16, 23, 42], 8000
    (own,) = sample.generate(llm, [prompt], draws, 1, temperature, top_p, seed=3)
    counts = np.bincount([c.ids[0] for c in own], minlength=97)
    law = nucleus(exact_logits(llm, prompt), temperature, top_p)
    assert counts.sum() == draws and counts[law == 0].sum() == 0
    if (law > 0).sum() > 1:
        assert chi_square_is_likely(counts, law)
    if top_p == 1:
        assert (law > 0).all()


@decodes
@pytest.mark.reference
def test_the_second_tokens_law(llm):
    """Given the first token, the second follows its own law: the streams do not repeat."""
    prompt = [9, 9]
    (own,) = sample.generate(llm, [prompt], 8000, 2, 2.0, 1.0, seed=1)
    first = int(np.bincount([c.ids[0] for c in own]).argmax())
    counts = np.bincount([c.ids[1] for c in own if c.ids[0] == first], minlength=97)
    assert counts.sum() > 200
    assert chi_square_is_likely(counts, nucleus(exact_logits(llm, [*prompt, first]), 2.0, 1.0))


def ranked_logits(step, equal=1):
    """(1, 9000) float32 in random order: each `equal` tokens `step` below the ones before."""
    ranks = np.random.default_rng(2).permutation(9000) // equal
    return torch.from_numpy((-step * ranks[None]).astype(np.float32))


@pytest.mark.reference
@pytest.mark.parametrize("step, equal", [(0.2, 1), (0.008, 1), (0.0005, 1), (0.5, 7), (0.3, 900)])
def test_the_law_of_many_tokens(step, equal):
    """Narrow nuclei and wide ones, of 9,000 tokens: 4,000 draws, 40 bins of like probability.

    Where the nucleus ends among equally likely tokens, the first of them are inside.
    """
    logits = ranked_logits(step, equal)
    uniforms = torch.from_numpy(np.random.default_rng(3).random((4000, 2)))
    law = nucleus(logits[0].double().numpy(), 0.8, 0.9)
    drawn = [
        sample.draw(logits.expand(len(part), -1), part, 0.8, 0.9) for part in uniforms.split(250)
    ]
    counts = np.bincount(np.concatenate(drawn), minlength=9000)
    assert counts[law == 0].sum() == 0
    bins = (40 * (law.cumsum() - law / 2)).astype(int)  # in the vocabulary's order
    assert chi_square_is_likely(np.bincount(bins, counts), np.bincount(bins, law))
    if equal > 1:
        assert np.count_nonzero(law) % equal


@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.95, 1.0])
def test_draw_at_the_ends_of_the_stream(top_p):
    """The least and the most that a stream gives: no token without probability, none beyond."""
    logits = np.random.default_rng(3).normal(0, 2, (200, 6)).astype(np.float32)
    logits[:, [0, -1]] = -np.inf
    for uniform, end, place in ((0.0, 1, 0), (1 - 2**-53, 4, -1)):
        uniforms = torch.full((200, 2), uniform, dtype=torch.float64)
        ids = sample.draw(torch.from_numpy(logits), uniforms, 1.0, top_p)
        for row, token in zip(logits.astype(np.float64), ids, strict=True):
            kept = np.flatnonzero(nucleus(row, 1.0, top_p))
            assert token == (end if end in kept else kept[np.argsort(-row[kept])][place])


def test_a_temperature_too_small_to_divide_by_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    uniforms = torch.tensor([[0.9, 0.9]], dtype=torch.float64)
    for temperature in (0, 1e-300, 1e-40, 9e-7):
        assert sample.draw(logits, uniforms, temperature, 1.0) == [1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature, top_p", [(0, 0.95), (0.8, 0.95), (0.8, 1.0)])
def test_logits_that_are_not_finite_are_refused(bad, temperature, top_p):
    logits = torch.zeros(3, 100)
    logits[1, 7] = bad
    with pytest.raises(lm.InputError, match="logits are NaN or infinite: take another --dtype"):
        sample.draw(logits, torch.full((3, 2), 0.5, dtype=torch.float64), temperature, top_p)


PROMPTS = [np.random.default_rng(8).integers(0, 97, n).tolist() for n in (5, 3, 40, 1)]


def generate(llm, prompts, samples, slots, **options):
    options = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.9, **options}
    stops = {"stop_ids": [1, 2, 3, 4, 5, 6]}
    held = decoder_of(llm, slots) if slots else None
    return drawn(sample.generate(llm, prompts, samples, **options, **stops, seed=7, decoder=held))


@pytest.fixture(scope="module")
def alone(llm):
    """What prompts 0 and 1 draw, three samples each, in one slot."""
    return generate(llm, PROMPTS[:2], 3, slots=1)


@decodes
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 16, 100, None])
def test_draws_do_not_depend_on_the_batch(slots, llm, alone):
    """Other prompts and more samples join, at any number of slots, one and too many included."""
    ends = {len(tokens) for own in alone for tokens, _ in own}
    assert len(ends) > 2, "the rows should end at different steps"
    made = generate(llm, PROMPTS, 6, slots)
    assert [own[:3] for own in made[:2]] == alone
    long = [tuple(tokens) for own in made for tokens, _ in own if len(tokens) > 3]
    assert len(long) > 15 and len(set(long)) == len(long), "no two completions share their draws"


@decodes
@pytest.mark.parametrize("slots", [5, 9])
def test_long_and_short_rows_draw_as_they_do_alone(slots, long_llm):
    """Prompts of 1 to 900 tokens, the longest first."""
    law = (2, 70, 1.0, 0.9, [2], 7)
    prompts = [np.random.default_rng(n).integers(0, 97, n).tolist() for n in (900, 30, 600, 300, 1)]
    alone = [sample.generate(long_llm, [ids], *law, names=[i]) for i, ids in enumerate(prompts)]
    made = sample.generate(long_llm, prompts, *law, decoder=decoder_of(long_llm, slots, 1000))
    assert drawn(made) == [own for part in alone for own in drawn(part)]


@decodes
def test_names_are_what_the_draws_follow(llm, alone):
    """A run that goes on with later prompts, or in another order, names them as the first did."""
    assert generate(llm, PROMPTS[1:], 3, 4, names=[1, 2, 3])[0] == alone[1]
    turned = generate(llm, PROMPTS[::-1], 3, 4, names=[3, 2, 1, 0])
    assert turned[:1:-1] == alone
    named = [generate(llm, [PROMPTS[0]] * 2, 3, 4, names=names) for names in ("ab", "ba")]
    assert named[0] == named[1][::-1] and named[0][0] != named[0][1]
    with pytest.raises(ValueError, match="zip"):
        generate(llm, PROMPTS, 1, 1, names=[0])


def test_equal_names_are_refused(llm):
    with pytest.raises((AssertionError, ValueError, lm.InputError)):
        sample.generate(llm, [[1], [2]], 1, 5, names=["a", "a"])


@decodes
def test_a_longer_limit_only_adds(llm, alone):
    longer = generate(llm, PROMPTS[:2], 3, 4, max_new_tokens=33)
    for short_row, long_row in zip(alone, longer, strict=True):
        for (short, finished), (long, _) in zip(short_row, long_row, strict=True):
            assert long == short if finished else long[:20] == short


def test_the_seed_and_nothing_else_names_the_draws(llm):
    """Another seed differs; the global random state is neither read nor moved."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, two, other = (
        drawn(sample.generate(llm, [[1, 2]], 2, 9, 1.0, 1.0, seed=seed)) for seed in (0, 0, 1)
    )
    assert one == two != other and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert drawn(sample.generate(llm, [[1, 2]], 2, 9, 1.0, 1.0)) == one


@decodes
@pytest.mark.parametrize("slots", [1, 4, None])
def test_the_context_is_filled_to_its_last_token(slots, llm):
    """256 positions: a prompt of 255 leaves one token, one of 250 six, one of 256 is refused."""
    prompts = [[7] * 255, [8] * 250, [9]]
    held = decoder_of(llm, slots) if slots else None
    made = sample.generate(llm, prompts, 2, 50, 1.0, 1.0, decoder=held)
    assert [[len(c.ids) for c in own] for own in made] == [[1, 1], [6, 6], [50, 50]]
    assert not any(c.finished for own in made for c in own)
    ((last,), (more,)) = sample.generate(llm, prompts[:2], 1, 50, 0, decoder=held)
    assert last.ids == [exact_logits(llm, prompts[0]).argmax()]
    assert more.ids[-1] == exact_logits(llm, prompts[1] + more.ids[:-1]).argmax()
    for bad, message in (
        ([7] * 256, "prompt 1 has 256 tokens: 1 to 255"),
        ([], "prompt 1 has 0 tokens: 1 to"),
    ):
        with pytest.raises(lm.InputError, match=message):
            sample.generate(llm, [[1], bad], 1, 5)


def watch_steps(decoder):
    """A list that gets the number of rows of each step from now on."""
    step, rows = decoder.step, []

    def watched(tokens, positions):
        rows.append(len(tokens))
        return step(tokens, positions)

    decoder.step = watched
    return rows


def test_nothing_to_decode(llm):
    """All rows end in the prefill: no slot is ever taken, nobody waits. And no prompt at all."""
    held = decoder_of(llm, 3)
    steps = watch_steps(held)
    made = sample.generate(llm, [[1], [2, 3]], 5, 9, stop_ids=range(97), decoder=held)
    assert all(len(c.ids) == 1 and c.finished for own in made for c in own) and not steps
    assert sample.generate(llm, [], 3, 9, names=[], decoder=held) == []
    assert sample.generate(llm, [], 3, 9) == []


@decodes
def test_slots_are_not_wasted_and_every_completion_comes_as_soon_as_it_ends(llm):
    """Continuous batching: 40 completions in 8 slots take few more steps than the tokens need."""
    held = decoder_of(llm, 8)
    steps = watch_steps(held)
    law = {"max_new_tokens": 40, "temperature": 1.0, "top_p": 1.0, "stop_ids": range(8)}
    made = sample.generate(llm, [[i] for i in range(10)], 4, **law, decoder=held)
    tokens = sum(len(c.ids) - 1 for own in made for c in own)
    assert sum(steps) == tokens, "no step is spent on a row that has ended"
    assert len(steps) <= tokens / 8 + 40
    groups = deque([request(i, [i], (0, "completion", i, j)) for j in range(4)] for i in range(10))
    steps.clear()
    stops = law.pop("stop_ids")
    for completion in sample.complete(held, groups, sample.Options(**law), stops):
        i, j = completion.stream[2:]
        assert completion.name == i
        assert (completion.ids, completion.finished) == (made[i][j].ids, made[i][j].finished)
        length = len(completion.ids)
        # Its first token came from the prefill, and every other took a step.
        assert length == 1 or len(steps) >= length - 1
        made[i][j] = None
    assert made == [[None] * 4] * 10


@decodes
def test_requests_that_come_meanwhile_are_completed_too(llm):
    """A request that is added when another ends draws what it draws alone."""
    law = (sample.Options(max_new_tokens=9, temperature=1.0, top_p=1.0), (1, 2, 3))
    streams = [(7, "completion", i, 0) for i in range(6)]
    alone = []
    for stream in streams:
        held = decoder_of(llm, 1)
        groups = deque([[request(stream, [5, 6], stream)]])
        (completion,) = sample.complete(held, groups, *law)
        alone.append((completion.ids, completion.finished))
    left = deque([request(i, [5, 6], streams[i])] for i in range(6))
    groups, completed = deque([left.popleft()]), {}
    for completion in sample.complete(decoder_of(llm, 2), groups, *law):
        completed[completion.name] = (completion.ids, completion.finished)
        if left:
            groups.append(left.popleft())
    assert [completed[i] for i in range(6)] == alone


@decodes
@pytest.mark.parametrize("slots, samples", [(1, 1), (2, 3), (8, 2)])
def test_a_prompts_keys_and_values_are_let_go(slots, samples, llm, monkeypatch):
    """None but those prefilled last are alive in a step, and none after the last one."""
    held, parts, alive = decoder_of(llm, slots), [], []
    prefill, step = held.prefill, held.step

    def watched_prefill(prompts):
        assert len(prompts) == 2
        kept, logits = prefill(prompts)
        parts.append([weakref.ref(x.untyped_storage()) for x in kept])
        return kept, logits

    def living():
        return {i for i, refs in enumerate(parts) if any(ref() is not None for ref in refs)}

    def watched_step(*args):
        alive.append(living() - {len(parts) - 1})
        return step(*args)

    held.prefill_tokens = 5  # two prompts of 2
    monkeypatch.setattr(held, "prefill", watched_prefill)
    monkeypatch.setattr(held, "step", watched_step)
    gc.disable()  # let go, not found by the collector
    try:
        made = sample.generate(llm, [[i, 9] for i in range(6)], samples, 9, 1.0, decoder=held)
        after = living()
    finally:
        gc.enable()
    assert len(made) == 2 * len(parts) == 6 and alive and not any(alive) and not after


DRAW_BYTES = 40  # of each logit: itself, its probability, sorted whole with order and sums
# What most of the memory is: weights, the cache, or the logits that are drawn from.
SIZES = {
    "weights": {"hidden_size": 64, "intermediate_size": 4000, "num_hidden_layers": 3},
    "cache": {"num_hidden_layers": 6, "num_key_value_heads": 4},
    "logits": {"vocab_size": 5000},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("largest", SIZES)
def test_memory_is_the_budgeted_whatever_the_number_of_prompts(
    tmp_path, tensor_bytes, largest, dtype
):
    config = LLAMA | SIZES[largest]
    llm = lm.load_model(write_checkpoint(tmp_path / "x", config, dtype=dtype), dtype=dtype)
    length, slots, peaks = 200, 16, []
    cache = slots * length * cache_bytes_per_token(llm.config, dtype)
    drawing = slots * config["vocab_size"] * DRAW_BYTES
    budget = sum(p.nbytes for p in llm.parameters()) + cache + drawing
    for count in (2, 8):
        prompts = [[count, i, *range(2, 2 + i % 9)] for i in range(count)]
        with tensor_bytes(llm) as tensors:
            held = sample.Decoder(llm, slots, length)
            assert held.cache.k.nbytes + held.cache.v.nbytes == cache
            held.prefill_tokens = 9  # of 2 prompts and of 8: two together
            sample.generate(llm, prompts, 8, 8, top_p=1e-6, decoder=held)  # every row is sorted
        peaks.append(tensors.peak / budget)
    assert min(peaks) > 0.9 and max(peaks) < 1.1
    assert max(peaks) < 1.02 * min(peaks)


def test_slots_are_planned_by_the_bytes(llm):
    """A slot of 100 positions: keys and values, 2 layers, 2 heads of 8, float32."""
    slot = 2 * 2 * 2 * 8 * 4 * 100
    budget = slot / lm.GIB
    cases = [(None, 5, 5), (None, 9999, 256)]
    cases += [(10 * budget, 9999, 10), (10.99 * budget, 9999, 10), (budget, 3, 1)]
    for memory, completions, slots in cases:
        assert sample.plan_slots(llm, 100, completions, memory) == slots
    for memory in (0, 0.99 * budget):
        with pytest.raises(lm.InputError, match="--cache-memory: one sequence of 100 tokens"):
            sample.plan_slots(llm, 100, 5, memory)


@pytest.mark.parametrize("tied", [True, False])
def test_slots_of_a_gpu_are_what_its_whole_memory_leaves(tied, monkeypatch):
    """Llama-3-8B's numbers in bf16; of what is free at the moment nothing is asked."""
    vocab, total = 128_256, 80 * lm.GIB
    sizes = {"num_hidden_layers": 32, "num_key_value_heads": 8, "head_dim": 128}
    sizes["vocab_size"] = vocab
    weights = [SimpleNamespace(nbytes=14 * lm.GIB)] + [SimpleNamespace(nbytes=lm.GIB)] * (2 - tied)
    model = SimpleNamespace(
        config=SimpleNamespace(**sizes),
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        parameters=lambda: weights,
    )
    properties = SimpleNamespace(total_memory=total)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", None)
    slot = 2 * 32 * 8 * 128 * 2 * 8192
    room = 0.9 * total - (16 - tied) * lm.GIB - 256 * vocab * DRAW_BYTES
    assert sample.plan_slots(model, 8192, 9999) == room // slot > 10
    properties.total_memory = 16 * lm.GIB
    with pytest.raises(lm.InputError, match=r"--cache-memory: .* takes 1\.00 GiB"):
        sample.plan_slots(model, 8192, 9999)
    assert sample.plan_slots(model, 8192, 9999, memory=8) == 8, "one's own budget is taken"


# Prompts and cutting

QUERY = "What is {instruction}? {}"
GENERIC = (  # section 2.1 and Figure 2, written here a second time
    "Respond to the following user query in a comprehensive and detailed way. You can write down "
    'your thought process before responding. Write your thoughts after "Here is my thought '
    'process:" and write your response after "Here is my response:".'
)
SPECIFIC = (
    "Respond to the following user query in a comprehensive and detailed way. But first write down "
    "your internal thoughts. This must include your draft response and its evaluation. After this, "
    'write your final response after "<R>".'
)
TURNS = {  # the system turn and the user's
    "specific": (None, SPECIFIC + "\nUser query: " + QUERY),
    "generic": (None, GENERIC + "\nUser query: " + QUERY),
    "system": ("You are a helpful assistant. " + GENERIC, QUERY),  # draft, appendix A
    "none": (None, QUERY),
}


def chat_of(tokenizer, style):
    """The chat that asks QUERY, as text."""
    config = SimpleNamespace(max_position_embeddings=4096)
    (row,) = sample.make_prompts([{"instruction": QUERY}], tokenizer, style, config, "f")
    text = row["prompt_text"]
    assert row["prompt_ids"] == tokenizer.encode(text, add_special_tokens=False)
    return text


@pytest.mark.parametrize("style", TURNS)
def test_thought_prompts_are_the_papers(style, tiny):
    system, user = TURNS[style]
    assert set(TURNS) == set(sample.STYLES)
    assert sample.thought_prompt(QUERY, style) == user
    turns = {"user": user} if system is None else {"system": system, "user": user}
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    chat = "".join(head.format(role) + text + "<|eot_id|>" for role, text in turns.items())
    expected = "<|begin_of_text|>" + chat + head.format("assistant")
    assert chat_of(lm.load_tokenizer(tiny), style) == expected


@pytest.mark.parametrize("name", "llama3 llama3_1 llama3_2 phi3 qwen2_5".split())
def test_the_system_prompt_stands_in_real_templates(name):
    """Once, as text, before the instruction; the other styles hold their prompt once too."""
    tokenizer = lm.load_tokenizer(FIXTURES / "templates" / name)
    first, after = chat_of(tokenizer, "system").split(TURNS["system"][0])
    assert "system" in first and after.count(QUERY) == 1 and QUERY not in first
    for style in ("specific", "generic", "none"):
        assert chat_of(tokenizer, style).count(TURNS[style][1]) == 1


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
DROPPED = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
BAD_TEMPLATES = {
    "refuses": (NO_SYSTEM + LLAMA_TEMPLATE, "chat_template: TemplateError: no system"),
    "drops": (DROPPED, "chat_template drops the system turn; --thought system needs it"),
    "none": (None, "chat_template is missing, in tokenizer_config.json and beside it"),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_a_template_without_a_system_role_is_refused_by_name(name, tmp_path):
    template, message = BAD_TEMPLATES[name]
    tokenizer = lm.load_tokenizer(write_tokenizer(tmp_path, template=template))
    with pytest.raises(lm.InputError) as caught:
        chat_of(tokenizer, "system")
    assert str(caught.value) == f"{tmp_path}: {message}"
    if template:
        assert chat_of(tokenizer, "generic").count(GENERIC) == 1


THOUGHT, MARKER = "Here is my thought process:", "Here is my response:"
CUTS = [
    ("  It is 4.\n", "none", ("", "It is 4.")),
    ("a <R> b", "none", ("", "a <R> b")),
    ("draft <R>\nIt is 4.\n", "specific", ("draft", "It is 4.")),
    ("draft <R> one <R> two", "specific", ("draft", "one <R> two")),
    ("<R>only", "specific", ("", "only")),
    ("draft <r> no", "specific", None),
    (f"{THOUGHT} t <R> r", "specific", (f"{THOUGHT} t", "r")),
    (f"t {MARKER} r", "specific", None),
    (f"{THOUGHT} t\n\n{MARKER} r", "generic", ("t", "r")),
    (f" \n{THOUGHT}\nt {MARKER}\nr\n", "generic", ("t", "r")),
    (f"t {MARKER} r {MARKER} s", "generic", ("t", f"r {MARKER} s")),
    (f"a {THOUGHT} t {MARKER}", "generic", (f"a {THOUGHT} t", "")),
    (f"t {MARKER.lower()} r", "generic", None),
    ("t <R> r", "generic", None),
    # Emphasis and heading marks around a marker belong to it.
    (f"t\n\n**{MARKER}**\n\nParis is it.", "generic", ("t", "Paris is it.")),
    (f"**{THOUGHT}**\nt\n\n__{MARKER}__ r", "generic", ("t", "r")),
    ("**Here is my response**: r", "generic", ("", "r")),
    (f"t\n### {MARKER}\n# Title", "generic", ("t", "# Title")),
    (f"## **{THOUGHT}**\nt\n## ***{MARKER}*** ##\nr", "generic", ("t", "r")),
    (f"t\n{MARKER}\n---\nr", "generic", ("t", "r")),
    ("t **<R>** r", "specific", ("t", "r")),
    ("t *<R>*r", "specific", ("t", "r")),
    ("**t. <R>** r", "specific", ("**t.", "r")),
    ("t <R> **bold** r", "specific", ("t", "**bold** r")),
    ("t <R>**bold** r", "specific", ("t", "**bold** r")),
    ("t <R>\n* one\n* two", "specific", ("t", "* one\n* two")),
    ("2 * 3 = 6, C# <R> 6", "specific", ("2 * 3 = 6, C#", "6")),
    # Repetitions that follow at once belong to it too; what stands later stays.
    (f"t\n{MARKER}\n{MARKER}\nParis", "generic", ("t", "Paris")),
    (f"t **{MARKER}**\n\n**{MARKER}** Paris", "generic", ("t", "Paris")),
    (f"{THOUGHT} {THOUGHT} t {MARKER} {THOUGHT} r {MARKER}", "generic", ("t", f"r {MARKER}")),
    ("t <R> <R><R> r <R> s", "specific", ("t", "r <R> s")),
    (f"t {MARKER} {MARKER}", "generic", ("t", "")),
    ("I think. <R>", "specific", ("I think.", "")),
]


def test_a_long_run_of_blanks_takes_no_time():
    began = time.monotonic()
    assert sample.split_output(" \t" * 30_000, "generic") is None  # without a limit: a minute
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("text, style, expected", CUTS)
def test_split_output(text, style, expected):
    assert sample.split_output(text, style) == expected
    if style == "generic":
        assert sample.split_output(text, "system") == expected


# Files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with room for a thought prompt of bytes."""
    folder = write_tokenizer(tmp_path_factory.mktemp("wide"))
    return write_checkpoint(folder, LLAMA | {"max_position_embeddings": 1024})


@pytest.fixture(scope="module")
def loaded(folder):
    return lm.load_model(folder), lm.load_tokenizer(folder)


GIVEN = [
    {"instruction": "Say hi.", "category": "chat", "id": 3},
    {"prompt": "2+2?", "answer": "#### 4"},
    {"question": "Why — 日本?", "nested": {"kept": [1, None]}},
    {"instruction": "a", "prompt": "b", "question": "c"},
    {"prompt": "d", "question": "e", "outputs": "taken"},
]
TEXTS = ["Say hi.", "2+2?", "Why — 日本?", "a", "d"]


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs main() as the command line does; gives back (standard output, standard error)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, args)])
        capfd.readouterr()
        sample.main()
        return capfd.readouterr()

    return run


def write_instructions(path, rows=GIVEN):
    listed = path.suffix == ".json"
    lines = [json.dumps(row, ensure_ascii=listed) for row in rows]
    path.write_text(json.dumps(rows) if listed else "\n\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_instructions_of_every_format(name, tmp_path):
    rows = sample.read_instructions(write_instructions(tmp_path / name))
    assert [row["instruction"] for row in rows] == TEXTS
    assert [row | {"instruction": 0} for row in rows] == [g | {"instruction": 0} for g in GIVEN]


def test_alpacas_input_stands_below_its_instruction(tmp_path):
    rows = [{"instruction": "Summarize the text.", "input": "Cats sleep all day.", "output": "z"}]
    rows += [{"instruction": "Hi", "input": ""}, {"instruction": "Ho", "input": None}]
    found = sample.read_instructions(write_instructions(tmp_path / "a.json", rows))
    texts = ["Summarize the text.\n\nCats sleep all day.", "Hi", "Ho"]
    assert [row["instruction"] for row in found] == texts
    lm.write_jsonl(tmp_path / "again.jsonl", found)  # and not twice
    again = sample.read_instructions(tmp_path / "again.jsonl")
    assert [row["instruction"] for row in again] == texts and again[0]["output"] == "z"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_lists_and_lines_are_read_under_either_name_with_a_byte_order_mark(name, mark, tmp_path):
    rows = [{"instruction": "Why?"}, {"prompt": "日本"}]
    lines = "".join(json.dumps(row) + "\r\n" for row in rows)
    for text in (lines, " \n" + json.dumps(rows, indent=1)):
        (tmp_path / name).write_bytes(mark + text.encode())
        assert [r["instruction"] for r in sample.read_instructions(tmp_path / name)] == [
            "Why?",
            "日本",
        ]


@pytest.mark.parametrize("style", ["none", "specific", "system"])
def test_a_file_of_instructions_to_a_file_of_samples(style, run, folder, loaded, tmp_path):
    llm, tokenizer = loaded
    file, out = write_instructions(tmp_path / "instructions.jsonl"), tmp_path / "samples.jsonl"
    flags = ["--num-samples", 3, "--max-new-tokens", 9, "--thought", style]
    run("--model", folder, "--instructions", file, "--output", out, *flags)
    rows = read_rows(out)
    for row, given, text in zip(rows, GIVEN, TEXTS, strict=True):
        mine = {"instruction": text, "outputs": row["outputs"]}
        assert row == given | mine | {key: row[key] for key in ("prompt_ids", "prompt_text")}
        assert sample.thought_prompt(text, style) in row["prompt_text"]
        assert row["prompt_ids"] == tokenizer.encode(row["prompt_text"], add_special_tokens=False)
        for output in row["outputs"]:
            assert output["finished"] == (output["ids"][-1] in tokenizer.stop_ids)
            assert output["text"] == tokenizer.decode(output["ids"], skip_special_tokens=True)
            assert output["tries"] == 1 and 0 < len(output["ids"]) <= 9
            parts = (output["thought"], output["response"])
            assert parts == (sample.split_output(output["text"], style) or (None, None))
            if style == "none":
                count = len(tokenizer.encode(output["response"], add_special_tokens=False))
                assert (output["thought_tokens"], output["response_tokens"]) == (0, count)
    again = sample.generate(
        llm, [row["prompt_ids"] for row in rows], 3, 9, stop_ids=tokenizer.stop_ids
    )
    found = [[output["ids"] for output in row["outputs"]] for row in rows]
    assert found == [[c.ids for c in own] for own in again]
    assert {p.name for p in tmp_path.iterdir()} == {"instructions.jsonl", "samples.jsonl"}


def test_special_tokens_inside_an_output_reach_no_text(loaded):
    _, tokenizer = loaded
    stop, start = tokenizer.stop_ids[-1], tokenizer.encode("<|start_header_id|>")[-1]
    ids = [*tokenizer.encode("t <R>", False), start, *tokenizer.encode(" r", False), stop]
    output = sample.read_output(sample.Completion(ids, True), tokenizer, "specific")
    assert output["ids"] == ids and output["text"] == "t <R> r"
    assert (output["thought"], output["response"], output["response_tokens"]) == ("t", "r", 1)


class Killed(BaseException):
    pass


@pytest.fixture
def sampled(loaded, tmp_path, monkeypatch):
    """Runs sample_file into `name` and returns the file's bytes.

    most: it is killed after so many rows. sampled.rows: how many the last call drew.
    """
    given = sample.read_instructions(write_instructions(tmp_path / "a.jsonl"))
    original = sample.sample_rows

    def sampled(name, most=99, key=None, rows=given, **options):
        options = {"thought": "none", "num_samples": 2, "max_new_tokens": 6, **options}
        path, sampled.rows = tmp_path / name, 0

        def counted(*args, **more):
            for row in original(*args, **more):
                if sampled.rows == most:
                    raise Killed
                sampled.rows += 1
                yield row

        monkeypatch.setattr(sample, "sample_rows", counted)
        sample.sample_file(*loaded, rows, sample.Options(**options), path, key or {}, "a.jsonl")
        return path.read_bytes()

    return sampled


def kill(sampled, name, most, tmp_path, **options):
    """The file of rows that a kill leaves beside `name`."""
    with pytest.raises(Killed):
        sampled(name, most, **options)
    assert not (tmp_path / name).exists()
    (partial,) = tmp_path.glob(f"{name}.*.partial")
    return partial


def test_a_kill_at_any_byte_resumes_to_the_same_file(sampled, tmp_path):
    """Whole rows stay, and what is behind them is drawn again."""
    whole = sampled("whole")
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    assert sampled.rows == len(ends) == 5
    partial = kill(sampled, "b", 2, tmp_path)
    assert partial.read_bytes() == whole[: ends[1]]
    cuts = {0, 1, len(whole)} | {end + i for end in ends for i in (-1, 0, 1)}
    for cut in sorted(cuts | set(random.Random(0).sample(range(len(whole)), 15))):
        partial.write_bytes(whole[:cut])
        assert sampled("b") == whole, cut
        # the last row is whole in a file that was not yet renamed
        assert sampled.rows == 5 - sum(end <= cut for end in ends), cut
        assert {p.name for p in tmp_path.iterdir()} == {"a.jsonl", "whole", "b"}
        (tmp_path / "b").unlink()


def test_rows_are_written_as_soon_as_those_before_them_are_there(sampled, loaded, tmp_path):
    """A kill loses the rows in hand: a long first one holds up the others, not the reverse."""
    partials = []
    rows = [{"instruction": "a"}, {"instruction": "b"}, {"instruction": "c"}]

    def watch(row):
        partials.extend(path.read_bytes() for path in tmp_path.glob("w.*.partial"))

    original = sample.read_output
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "read_output", lambda *args: watch(args) or original(*args))
        whole = sampled("w", rows=rows, num_samples=3, max_new_tokens=40, cache_memory=1e-4)
    sizes = sorted({data.count(b"\n") for data in partials})
    assert sizes[0] == 0 and sizes[-1] >= 1 and all(whole.startswith(data) for data in partials)


OTHERS = [{"seed": 1}, {"temperature": 0.5}, {"top_p": 0.5}, {"num_samples": 1}]
OTHERS += [{"max_new_tokens": 7}, {"thought": "generic"}, {"resample": 1}]
OTHERS += [{"cache_memory": 1.0}, {"key": {"model": "another"}}]


def test_other_options_do_not_take_a_killed_runs_rows(sampled, tmp_path):
    partial = kill(sampled, "b", 1, tmp_path)
    left = partial.read_bytes()
    for i, options in enumerate(OTHERS):
        expected = sampled(f"whole-{i}", **options)
        assert sampled("b", **options) == expected and sampled.rows == 5, options
        assert partial.read_bytes() == left, options
        (tmp_path / "b").unlink()
    sampled("b")
    assert sampled.rows == 4 and not partial.exists(), "its own are still taken"
    with pytest.raises(lm.InputError, match="b exists already: remove it"):
        sampled("b", temperature=0.0, seed=9)  # its rows may be of other options


@pytest.fixture
def often_cut(monkeypatch):
    """A marker that some of the tiny model's outputs hold."""
    specific = sample.STYLES["specific"]._replace(response_marker="\x03")
    monkeypatch.setitem(sample.STYLES, "specific", specific)


def outputs_of(data):
    return [output for line in data.splitlines() for output in json.loads(line)["outputs"]]


def test_what_cannot_be_cut_is_sampled_again(sampled, often_cut, tmp_path):
    """First tries stay, tries are recorded, each has a stream of its own, and more only add."""
    law = {"thought": "specific", "num_samples": 8, "max_new_tokens": 12}
    tries = [outputs_of(sampled(f"{n}", resample=n, **law)) for n in (0, 1, 3)]
    first, once, thrice = tries
    failed = [not o["response"] for o in first]
    assert 5 < sum(failed) < len(failed) - 5 and {o["tries"] for o in first} == {1}
    for before, after, limit in ((first, once, 2), (once, thrice, 4)):
        for old, new in zip(before, after, strict=True):
            assert new == old if old["response"] else new["ids"] != old["ids"]
            assert new["tries"] <= limit if new["response"] else new["tries"] == limit
    assert len({o["tries"] for o in thrice}) > 2
    assert sum(not o["response"] for o in thrice) < sum(failed) / 2
    again = [tuple(o["ids"]) for o in first + once if not o["response"] or o["tries"] > 1]
    assert len(set(again)) == len(again), "no two tries share their draws"
    kill(sampled, "b", 3, tmp_path, resample=3, **law)
    assert outputs_of(sampled("b", resample=3, **law)) == thrice and sampled.rows == 2


def test_answer_files_have_the_fields_that_the_benchmarks_read(run, folder, often_cut, tmp_path):
    """One answer an instruction, tried up to four times: as samples of these options."""
    rows = [{"instruction": "Hi", "dataset": "koala", "uid": "a"}, {"prompt": "2+2?", "uid": "b"}]
    file = write_instructions(tmp_path / "a.jsonl", rows)
    flags = ["--model", folder, "--instructions", file, "--max-new-tokens", 30]
    for form in ("jsonl", "alpaca_eval", "arena_hard"):
        count = ["--num-samples", 1, "--resample", 3] if form == "jsonl" else []
        run(*flags, "--output", tmp_path / form, "--format", form, *count)
    (one,), (two,) = (row["outputs"] for _, row in lm.read_jsonl(tmp_path / "jsonl"))
    name, texts = str(folder), [output["response"] or "" for output in (one, two)]
    assert json.loads((tmp_path / "alpaca_eval").read_text(encoding="utf-8")) == [
        {"dataset": "koala", "instruction": "Hi", "output": texts[0], "generator": name},
        {"instruction": "2+2?", "output": texts[1], "generator": name},
    ]
    first, second = (row for _, row in lm.read_jsonl(tmp_path / "arena_hard"))
    assert (first["uid"], first["metadata"]) == ("a", {"token_len": one["response_tokens"] or 0})
    # Arena-Hard's loader knows a model by the name of its file.
    assert second["model"] == "arena_hard" and second["messages"] == [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": {"answer": texts[1]}},
    ]
    assert {p.name for p in tmp_path.iterdir()} == {"a.jsonl", "jsonl", "alpaca_eval", "arena_hard"}
    row, uncut = {"uid": "c", "instruction": "x"}, {"response": None, "response_tokens": None}
    assert sample.answer_row(row, uncut, "alpaca_eval", "m")["output"] == ""
    assert sample.answer_row(row, uncut, "arena_hard", "m")["metadata"]["token_len"] == 0


def refused(call, *args):
    with pytest.raises(lm.InputError) as caught:
        call(*args)
    return str(caught.value)


NO_TEXT = "no text under instruction, prompt or question"
BAD_INSTRUCTIONS = [
    ("a.json", b'[{"prompt": "x"}, 3]', "a.json: entry 2 is 3, not a JSON object"),
    ("a.json", b"[", "a.json: not UTF-8 JSON"),
    ("a.json", b'{"prompt": "x"}\n{"prompt"', "a.json:2: not UTF-8 JSON"),
    ("a.jsonl", b"[1]", "a.jsonl: entry 1 is 1, not a JSON object"),
    ("a.jsonl", b'"x"', "a.jsonl:1 is JSON, but not an object"),
    ("a.jsonl", b'\n{"text": "x"}', "a.jsonl:2: " + NO_TEXT),
    ("a.jsonl", b'{"question": " "}', "a.jsonl:1: " + NO_TEXT),
    ("a.jsonl", b'{"instruction": null, "prompt": "x"}', "a.jsonl:1: " + NO_TEXT),
    ("a.jsonl", b'{"instruction": "x", "input": ["y"]}', "a.jsonl:1: input is not a text"),
    ("a.jsonl", b'{"prompt": "x"}\n{"prompt', "a.jsonl:2: not UTF-8 JSON"),
    ("a.jsonl", b'{"prompt": "\xff"}', "a.jsonl:1: not UTF-8 JSON"),
    ("a.jsonl", b'{"prompt": "\\ud800"}', "a.jsonl:1: "),
    ("a.jsonl", b"\n", "a.jsonl: there is no instruction in it"),
]


@pytest.mark.parametrize("name, text, message", BAD_INSTRUCTIONS)
def test_bad_instructions_are_refused(name, text, message, tmp_path):
    (tmp_path / name).write_bytes(text)
    assert message in refused(sample.read_instructions, tmp_path / name)


def test_a_prompt_beyond_the_context_is_refused_by_its_place(tiny):
    rows = [{"instruction": "x"}, {"instruction": "y" * 300}]
    tokenizer, config = lm.load_tokenizer(tiny), lm.read_config(tiny)
    message = refused(sample.make_prompts, rows, tokenizer, "none", config, "f")
    expected = "f: the prompt of instruction 2 has {} tokens: 1 to 255 leave room for more"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "y" * 300}])
    assert message == expected.format(len(chat))


FILES = "--model {model} --instructions {file} --output {out} "
COMMANDS = [
    ("Hi", "error: the following arguments are required: --model"),
    ("--model {model} --nonsense Hi", "error: unrecognized arguments: --nonsense"),
    ("--model {file} Hi", "a.jsonl: no such folder"),
    ("--model {model} --instructions {file}", "--instructions and --output go together"),
    (FILES + "Hi", "an instruction and --output were given: give one of them"),
    ("--model {model} --format alpaca_eval Hi", "--format is a file's: give"),
    (FILES + "--show-thought", "--show-thought shows it on the terminal"),
    (FILES + "--output {file}", "a.jsonl exists already: remove it, or name another output"),
    (FILES + "--output {file}/b/c", "there is no folder"),
    (FILES + "--instructions {out}", "No such file or directory"),
    (FILES + "--format arena_hard", "a.jsonl: instruction 1 has no uid"),
    (FILES + "--format x", "argument --format: invalid choice: 'x'"),
    (FILES + "--cache-memory 0.000001", "--cache-memory: one sequence of"),
    (FILES + "--num-samples 0", "argument --num-samples: 0 is out of range, 1 to inf"),
    (FILES + "--num-samples x", "argument --num-samples: invalid int value: 'x'"),
    (FILES + "--top-p 0", "argument --top-p: 0.0 is out of range, 1e-06 to 1"),
    (FILES + "--top-p nan", "argument --top-p: nan is out of range"),
    (FILES + "--temperature -1", "argument --temperature: -1.0 is out of range"),
    (FILES + "--cache-memory inf", "argument --cache-memory: inf is out of range"),
    (FILES + "--device mps", "--device mps: not supported; take cpu, cuda or cuda:1"),
    (FILES + "--device xpu:0", "--device xpu:0: not supported"),
]


@pytest.mark.parametrize("command, message", COMMANDS)
def test_a_refused_command_ends_in_one_line(command, message, folder, tmp_path, monkeypatch, capfd):
    file = write_instructions(tmp_path / "a.jsonl")
    before = file.read_bytes()
    names = {"model": folder, "file": file, "out": tmp_path / "out"}
    words = [word.format(**names) for word in command.split()]
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    monkeypatch.setattr("signal.signal", lambda *args: None)
    with pytest.raises(SystemExit) as caught:
        lm.run_main(sample.main)
    out, error = capfd.readouterr()
    assert caught.value.code == 2 and out == "" and error.count("\n") == 1
    assert error.startswith("sample.py: error: ") and message in error
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"] and file.read_bytes() == before


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_instruction_that_is_no_text(text, run, tiny):
    assert refused(run, "--model", tiny, "--thought", "none", text) == "the instruction is empty"


@pytest.mark.parametrize("given", ["typed", "argument"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_show_is_replaced(encoding, given, folder, monkeypatch):
    """Its input likewise: bytes that are no text in its encoding, typed or as an argument."""
    words = ["sample.py", "--model", str(folder), "--thought", "none"]
    words += ["--max-new-tokens", "9", "--temperature", "5"]
    text = b"Caf\xc3\xa9 \xff?"
    if given == "argument":
        words.append(os.fsdecode(text))  # as Python itself makes sys.argv
    monkeypatch.setattr(sys, "argv", words)
    # As Python makes them with PYTHONIOENCODING: strict.
    streams = {name: io.BytesIO() for name in ("stdin", "stdout", "stderr")}
    streams["stdin"] = io.BytesIO((text + b"\n") * (given == "typed"))
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding))
    monkeypatch.setattr("signal.signal", lambda *args: None)
    lm.run_main(sample.main)
    sys.stdout.flush()
    sys.stderr.flush()
    assert not streams["stderr"].getvalue(), streams["stderr"].getvalue()
    said = streams["stdout"].getvalue()
    assert said.decode(encoding).strip() and b"?" in said


def test_one_instruction_to_the_terminal(run, folder, often_cut):
    flags = ["--model", folder, "Hi", "--max-new-tokens", 40]
    plain = run(*flags, "--thought", "none")
    assert plain.out.strip() and not plain.err
    uncut = "no response in the output\n"
    cut = run(*flags).out  # tried up to four times
    assert cut.strip() and not cut.startswith(uncut)
    both = run(*flags, "--show-thought").out
    assert both.endswith(cut) and len(both) > len(cut) and "\033" not in both
    short = [*flags[:-1], 1, "--temperature", 0]
    assert run(*short).out == uncut
    thought = run(*short, "--show-thought").out
    assert thought.endswith("\n" + uncut) and len(thought) > len(uncut) + 1
    assert run(*flags, "--num-samples", 2, "--thought", "none").out.startswith(plain.out)


def test_instructions_of_standard_input_one_a_line(run, folder, monkeypatch):
    """Each is answered as alone; empty lines are passed over, the end of the input ends it."""
    flags = ["--model", folder, "--thought", "none", "--max-new-tokens", 9]
    alone = [run(*flags, text).out for text in ("Hi", "2+2?")]
    assert alone[0] != alone[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\n  \n2+2?"))
    assert run(*flags).out == "".join(alone)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert run(*flags).out == ""


def test_a_changed_file_of_instructions_has_other_samples(tiny, tmp_path, monkeypatch):
    """What a stop left is resumed only for the same contents, whatever the file's name."""
    file, keys = tmp_path / "in.jsonl", []

    def stop(model, tokenizer, rows, options, path, key, *_):
        keys.append(key)
        raise lm.InputError("stopped")

    monkeypatch.setattr(sample, "sample_file", stop)
    words = f"sample.py --model {tiny} --instructions {file} --output {tmp_path / 'out'}".split()
    monkeypatch.setattr(sys, "argv", words)
    for text in ("one", "two", "one"):
        lm.write_jsonl(file, [{"instruction": text}])
        refused(sample.main)
    assert keys[0] == keys[2] != keys[1]
