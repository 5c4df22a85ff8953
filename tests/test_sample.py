"""sample.py: thought prompts, cutting, and the law and the independence of what generate draws.

python -m pytest tests/test_sample.py
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import FIXTURES, LLAMA, write_checkpoint, write_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

import model
import sample

GREEDY = json.loads((FIXTURES / "greedy.json").read_text())
SMALL = LLAMA | {"vocab_size": 97}


def ids(completions):
    return [[(c.ids, c.finished) for c in row] for row in completions]


def decoder(llm, slots, length=256):
    return sample.Decoder(llm, slots, length)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return model.load_model(write_checkpoint(tmp_path_factory.mktemp("small"), SMALL, seed=5))


# Greedy


@pytest.fixture(scope="module")
def greedy_model(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("greedy"), GREEDY["config"], GREEDY["seed"])
    return model.load_model(folder)


@pytest.mark.parametrize("slots", [1, 7, 64, 200])
def test_greedy_is_transformers_token_by_token(slots, greedy_model):
    """Prompts of 1 to 90 tokens in one batch, three stop ids, rows that end at different steps."""
    made = sample.generate(
        greedy_model,
        GREEDY["prompts"],
        num_samples=1,
        max_new_tokens=GREEDY["max_new_tokens"],
        temperature=0,
        stop_ids=GREEDY["stop_ids"],
        decoder=decoder(greedy_model, slots),
    )
    assert [row[0].ids for row in made] == GREEDY["outputs"]
    lengths = {len(row[0].ids) for row in made}
    assert len(lengths) > 10 and 1 in lengths
    for (completion,) in made:
        assert completion.finished == (completion.ids[-1] in GREEDY["stop_ids"])
        assert not set(completion.ids[:-1]) & set(GREEDY["stop_ids"])


# Prefill

SHARED = {
    "equal": [[5, 6, 7]] * 3,
    "one a prefix of the others": [[5, 6, 7], [5, 6, 7, 8, 9], [5, 6], [5, 6, 7, 8]],
    "a long beginning": [[*range(60), n, 3][: 61 + n % 2] for n in (70, 71, 72)],
    "nothing in common": [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]],
    "one alone": [[5, 6, 7, 8]],
    "one token": [[5], [5], [5, 6]],
}


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_prefill_equals_separate_ones(name, llm):
    prompts, made = SHARED[name], decoder(llm, 1)
    with torch.inference_mode():
        parts, logits = made.prefill(prompts)
        for prompt, held, row in zip(prompts, parts, logits, strict=True):
            (alone,), expected = made.prefill([prompt])
            together, alone = torch.cat(held, dim=-2), torch.cat(alone, dim=-2)
            assert together.shape == alone.shape == (2, 2, 2, len(prompt), 8)
            assert (together - alone).abs().max() < 1e-5 and (row - expected).abs().max() < 1e-5
            full = llm(torch.tensor([prompt]))[0, -1]
            assert (row - full).abs().max() < 1e-5 * full.abs().max()
    together, alone = (
        ids(c for part in parts for c in sample.generate(llm, part, 1, 12, 0))
        for parts in ([prompts], [[prompt] for prompt in prompts])
    )
    assert together == alone


def test_what_prompts_share_is_run_once(llm, monkeypatch):
    """Eight prompts of 52 tokens, 50 of them shared: 66 tokens, one prefill; 65 would be two."""
    prompts, sizes = [[*range(50), i, i] for i in range(8)], []
    llm.model.embed_tokens.register_forward_hook(lambda *call: sizes.append(call[2].shape[1]))
    for most in (66, 65):
        monkeypatch.setattr(sample.Decoder, "PREFILL_TOKENS", most)
        sample.generate(llm, prompts, 1, 1)
    assert sizes == [66, 64, 52]


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
    llm = model.load_model(write_checkpoint(tmp_path / "x", config, dtype=dtype), dtype=dtype)
    length, slots, peaks = 200, 16, []
    _, cache = sample.plan_slots(llm, length, slots)
    drawing = slots * config["vocab_size"] * sample.DRAW_BYTES
    budget = sum(p.nbytes for p in llm.parameters()) + cache + drawing
    for count in (2, 4, 40):
        prompts = [[count, i, *range(2, 2 + i % 9)] for i in range(count)]
        with tensor_bytes(llm) as tensors:
            sample.generate(llm, prompts, 8, 12, decoder=sample.Decoder(llm, slots, length))
        peaks.append(tensors.peak / budget)
    assert min(peaks) > 0.9 and max(peaks) < 1.1
    assert max(peaks) < 1.02 * min(peaks)


# The law


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


@pytest.mark.parametrize(
    "temperature, top_p", [(0.8, 0.95), (1.0, 1.0), (1.7, 0.5), (5.0, 0.99), (0.3, 0.3)]
)
def test_the_first_tokens_law(temperature, top_p, llm):
    """20,000 draws against softmax(logits / T) cut at top-p; nothing outside the nucleus."""
    prompt, draws = [4, 8, 15, 16, 23, 42], 20_000
    with torch.no_grad():
        logits = llm(torch.tensor([prompt]))[0, -1].double().numpy()
    (row,) = sample.generate(llm, [prompt], draws, 1, temperature, top_p, seed=3)
    counts = np.bincount([c.ids[0] for c in row], minlength=97)
    law = nucleus(logits, temperature, top_p)
    assert counts.sum() == draws
    assert counts[law == 0].sum() == 0
    if (law > 0).sum() > 1:
        assert chi_square_is_likely(counts, law)
    if top_p == 1:
        assert (law > 0).all()


def test_the_second_tokens_law(llm):
    """Given the first token, the second follows its own law: the streams do not repeat."""
    prompt = [9, 9]
    (row,) = sample.generate(llm, [prompt], 8000, 2, 2.0, 1.0, seed=1)
    firsts = np.bincount([c.ids[0] for c in row], minlength=97)
    first = int(firsts.argmax())
    with torch.no_grad():
        logits = llm(torch.tensor([[*prompt, first]]))[0, -1].double().numpy()
    counts = np.bincount([c.ids[1] for c in row if c.ids[0] == first], minlength=97)
    assert counts.sum() > 200
    assert chi_square_is_likely(counts, nucleus(logits, 2.0, 1.0))


def test_draw_where_the_nucleus_is_wider_than_the_candidates():
    """A flat law over 1,000 tokens: the nucleus is far wider than the partial sort."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 0.1, (1, 1000)).astype(np.float32))
    uniforms = torch.from_numpy(rng.random(8000))
    ids = sample.draw(logits.expand(8000, -1), uniforms, 1.0, 0.6)
    law = nucleus(logits[0].double().numpy(), 1.0, 0.6)
    counts = np.bincount(ids, minlength=1000)
    assert (law > 0).sum() > 3 * sample.CANDIDATES
    assert counts[law == 0].sum() == 0 and chi_square_is_likely(counts, law)


def test_equal_tokens_rank_by_their_ids():
    """Ten values shared by 1,000 tokens: every id is that of a stable sort, taken by its rank."""
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.integers(0, 10, (300, 1000)).astype(np.float32) / 8)
    uniforms = rng.random(300)
    ids = sample.draw(logits, torch.from_numpy(uniforms), 1.0, 0.9)
    for row, uniform, token in zip(logits.double().softmax(-1).numpy(), uniforms, ids, strict=True):
        order = np.argsort(-row, kind="stable")
        cdf = row[order].cumsum()
        kept = 1 + (cdf[:-1] < 0.9).sum()
        assert token == order[np.searchsorted(cdf[:kept], uniform * cdf[kept - 1], side="right")]


def test_draw_mixes_narrow_and_wide_rows():
    """Rows whose nuclei differ in width draw in one call what each draws alone."""
    rng = np.random.default_rng(2)
    logits = torch.from_numpy(rng.normal(0, 1, (50, 500)) * np.linspace(0.01, 9, 50)[:, None])
    uniforms = torch.from_numpy(rng.random(50))
    together = sample.draw(logits, uniforms, 0.8, 0.95)
    alone = [sample.draw(logits[i : i + 1], uniforms[i : i + 1], 0.8, 0.95) for i in range(50)]
    assert [[token] for token in together] == alone


@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.95, 1.0])
def test_draw_at_the_ends_of_the_stream(top_p):
    logits = torch.tensor([[0.0, 3.0, -1.0, 1.0, -np.inf]] * 2)
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    first, last = sample.draw(logits, uniforms, 1.0, top_p)
    law = nucleus(logits[0].double().numpy(), 1.0, top_p)
    assert law[first] > 0 and law[last] > 0
    if (law > 0).sum() > 1:
        assert first != last


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("top_p", [0.95, 1.0])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_logits_that_are_not_finite_are_refused(bad, top_p, temperature):
    logits = torch.zeros(3, 100)
    logits[1, 7] = bad
    with pytest.raises(model.InputError, match="finite"):
        sample.draw(logits, torch.full((3,), 0.5, dtype=torch.float64), temperature, top_p)


class ReadValues(TorchDispatchMode):
    """Collects the calls that must wait for a device, since Python asks for a tensor's values."""

    WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.WAITING:
            self.calls.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature, top_p", [(0, 1.0), (0.8, 1.0), (0.8, 0.95)])
def test_a_draw_waits_for_nothing_but_its_tokens(temperature, top_p):
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(0)) * 9
    with ReadValues() as read:
        ids = sample.draw(logits, torch.full((6,), 0.5, dtype=torch.float64), temperature, top_p)
        assert len(ids) == 6 and not read.calls
        logits.amax().isfinite().item()  # the mode sees a wait
    assert read.calls


# Independence


@pytest.fixture(scope="module")
def alone(llm):
    """What prompt 1 draws in a batch of two prompts, three samples each, one slot."""
    rng = np.random.default_rng(8)
    prompts = [rng.integers(0, 97, n).tolist() for n in (5, 3, 40, 1)]
    return prompts, generate(llm, prompts[:2], 3, slots=1)


def generate(llm, prompts, samples, slots, **options):
    options = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.9, **options}
    stops = {"stop_ids": [1, 2, 3, 4, 5, 6]}
    held = decoder(llm, slots) if slots else None
    return ids(sample.generate(llm, prompts, samples, **options, **stops, seed=7, decoder=held))


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 16, 100, None])
def test_draws_do_not_depend_on_the_batch(slots, llm, alone):
    """Other prompts and more samples join, at any number of slots, one and too many included."""
    prompts, expected = alone
    ends = {len(tokens) for row in expected for tokens, _ in row}
    assert len(ends) > 2, "the rows should end at different steps"
    made = generate(llm, prompts, 6, slots)
    assert [row[:3] for row in made[:2]] == expected
    long = [tuple(tokens) for row in made for tokens, _ in row if len(tokens) > 3]
    assert len(long) > 15 and len(set(long)) == len(long), "no two completions share their draws"


def test_a_run_goes_on_with_the_same_draws(llm, alone):
    prompts, expected = alone
    later = generate(llm, prompts[1:], 3, 4, first_prompt=1)
    assert later[0] == expected[1]


def test_a_longer_limit_only_adds(llm, alone):
    prompts, expected = alone
    longer = generate(llm, prompts[:2], 3, 4, max_new_tokens=33)
    for short_row, long_row in zip(expected, longer, strict=True):
        for (short, finished), (long, _) in zip(short_row, long_row, strict=True):
            assert long == short if finished else long[:20] == short


def test_two_seeds_differ(llm):
    one, two = (sample.generate(llm, [[1, 2]], 2, 9, 1.0, 1.0, seed=s) for s in (0, 1))
    assert ids(one) != ids(two)


def test_global_random_state_is_neither_read_nor_moved(llm):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = ids(sample.generate(llm, [[1, 2]], 2, 9))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert ids(sample.generate(llm, [[1, 2]], 2, 9)) == one


# Ends


@pytest.mark.parametrize("slots", [1, 4, None])
def test_the_context_is_filled_to_its_last_token(slots, llm):
    """256 positions: a prompt of 255 leaves one token, one of 250 six, one of 256 is refused."""
    prompts = [[7] * 255, [8] * 250, [9]]
    held = decoder(llm, slots) if slots else None
    made = sample.generate(llm, prompts, 2, 50, 1.0, 1.0, decoder=held)
    assert [[len(c.ids) for c in row] for row in made] == [[1, 1], [6, 6], [50, 50]]
    assert not any(c.finished for row in made for c in row)
    with torch.no_grad():
        logits = llm(torch.tensor([prompts[0]]))[0, -1]
    greedy = sample.generate(llm, prompts[:1], 1, 50, 0, decoder=held)
    assert greedy[0][0].ids == [int(logits.argmax())]
    for bad in ([7] * 256, []):
        with pytest.raises(model.InputError, match=rf"prompt 1: found {len(bad)} tokens"):
            sample.generate(llm, [[1], bad], 1, 5)


def test_every_first_token_a_stop(llm):
    """All rows end in the prefill: no slot is ever taken, nobody waits."""
    made = sample.generate(llm, [[1], [2, 3]], 5, 9, stop_ids=range(97))
    assert all(len(c.ids) == 1 and c.finished for row in made for c in row)


def test_nothing_to_do(llm):
    assert sample.generate(llm, [], 3, 9) == []


def test_on_end_hears_of_every_completion_once(llm):
    heard = []
    made = sample.generate(
        llm, [[1], [2, 3], [4]], 3, 9, 1.0, stop_ids=range(9), on_end=heard.append
    )
    assert sorted(map(id, heard)) == sorted(id(c) for row in made for c in row)


def test_slots_are_not_wasted(llm):
    """Continuous batching: 40 completions in 8 slots take few more steps than the tokens need."""
    held = decoder(llm, 8)
    made = sample.generate(
        llm, [[i] for i in range(10)], 4, 40, 1.0, 1.0, stop_ids=range(8), decoder=held
    )
    tokens = sum(len(c.ids) - 1 for row in made for c in row)
    assert held.rows == tokens, "no step is spent on a row that has ended"
    assert held.steps <= tokens / 8 + 40


# Prompts and cutting


def test_thought_prompts_are_the_papers():
    """Section 2.1 and Figure 2, written here a second time."""
    query = "What is {instruction}? {}"
    assert sample.thought_prompt(query, "none") == query
    assert sample.thought_prompt(query, "specific") == (
        "Respond to the following user query in a comprehensive and detailed way. But first write "
        "down your internal thoughts. This must include your draft response and its evaluation. "
        'After this, write your final response after "<R>".\nUser query: ' + query
    )
    assert sample.thought_prompt(query, "generic") == (
        "Respond to the following user query in a comprehensive and detailed way. You can write "
        "down your thought process before responding. Write your thoughts after "
        '"Here is my thought process:" and write your response after "Here is my response:".\n'
        "User query: " + query
    )


@pytest.mark.parametrize(
    "text, style, expected",
    [
        ("  It is 4.\n", "none", ("", "It is 4.")),
        ("a <R> b", "none", ("", "a <R> b")),
        ("draft <R>\nIt is 4.\n", "specific", ("draft", "It is 4.")),
        ("draft <R> one <R> two", "specific", ("draft", "one <R> two")),
        ("<R>only", "specific", ("", "only")),
        ("draft <R>", "specific", ("draft", "")),
        ("draft <r> no", "specific", None),
        ("", "specific", None),
        ("Here is my thought process: t\n\nHere is my response: r", "generic", ("t", "r")),
        ("t Here is my response: r", "generic", ("t", "r")),
        ("Here is my thought process: t", "generic", None),
        ("t <R> r", "generic", None),
    ],
)
def test_split_output(text, style, expected):
    assert sample.split_output(text, style) == expected


# Files and the command line


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs main() as the command line does; gives back (standard output, standard error)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, args)])
        capfd.readouterr()
        sample.main()
        return capfd.readouterr()

    return run


@pytest.fixture
def instructions(tmp_path):
    rows = [
        {"instruction": "Say hi.", "category": "chat", "id": 3},
        {"prompt": "2+2?", "answer": "#### 4"},
        {"question": "Why — 日本?", "nested": {"kept": [1, None]}},
    ]
    file = tmp_path / "instructions.jsonl"
    file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return file


def test_a_file_of_instructions_to_a_file_of_samples(run, tiny, instructions, tmp_path):
    flags = ["--num-samples", 3, "--max-new-tokens", 9, "--thought", "none", "--group", 2]
    out = tmp_path / "samples.jsonl"
    run("--model", tiny, "--instructions", instructions, "--output", out, *flags)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    given = [json.loads(line) for line in instructions.read_text().splitlines() if line]
    tokenizer = model.load_tokenizer(tiny)
    assert [row["instruction"] for row in rows] == ["Say hi.", "2+2?", "Why — 日本?"]
    for row, source in zip(rows, given, strict=True):
        assert {key: row[key] for key in source} == source, "fields not known are carried along"
        chat = [{"role": "user", "content": row["instruction"]}]
        assert row["prompt_ids"] == tokenizer.apply_chat_template(chat)
        assert row["prompt_text"] == tokenizer.render_chat(chat)
        assert row["thought_style"] == "none" and len(row["outputs"]) == 3
        for output in row["outputs"]:
            assert 0 < len(output["ids"]) <= 9
            assert output["finished"] == (output["ids"][-1] in tokenizer.stop_ids)
            assert output["text"] == tokenizer.decode(output["ids"], skip_special_tokens=True)
            assert output["thought"] == "" and output["response"] == output["text"].strip()
    llm = model.load_model(tiny)
    again = sample.generate(
        llm, [row["prompt_ids"] for row in rows], 3, 9, stop_ids=tokenizer.stop_ids
    )
    assert [[o["ids"] for o in row["outputs"]] for row in rows] == [
        [c.ids for c in row] for row in again
    ]
    assert {p.name for p in tmp_path.iterdir()} == {"instructions.jsonl", "samples.jsonl"}


def test_answer_files_have_the_fields_that_the_benchmarks_read(run, tiny, tmp_path):
    """One answer an instruction, equal to the file of samples of the same seed."""
    file, flags = tmp_path / "instructions.jsonl", ["--thought", "none", "--max-new-tokens", 9]
    rows = [{"instruction": "Hi", "dataset": "koala", "uid": "a"}, {"prompt": "2+2?", "uid": "b"}]
    model.write_jsonl(file, rows)
    for form in ("jsonl", "alpaca_eval", "arena_hard"):
        count = ["--num-samples", 1] if form == "jsonl" else []
        out = ["--output", tmp_path / form, "--format", form]
        run("--model", tiny, "--instructions", file, *out, *count, *flags)
    (one,), (two,) = (row["outputs"] for _, row in model.read_jsonl(tmp_path / "jsonl"))
    assert json.loads((tmp_path / "alpaca_eval").read_text()) == [
        {
            "dataset": "koala",
            "instruction": "Hi",
            "output": one["response"],
            "generator": str(tiny),
        },
        {"instruction": "2+2?", "output": two["response"], "generator": str(tiny)},
    ]
    first, second = (row for _, row in model.read_jsonl(tmp_path / "arena_hard"))
    assert (first["uid"], first["metadata"]) == ("a", {"token_len": one["response_tokens"]})
    assert second["model"] == str(tiny) and second["messages"] == [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": {"answer": two["response"]}},
    ]
    assert not list(tmp_path.glob("*.samples*"))
    uncut = {
        "uid": "c",
        "instruction": "x",
        "outputs": [{"response": None, "response_tokens": None}],
    }
    assert sample.alpaca_eval_row(uncut, "m")["output"] == ""
    assert sample.arena_hard_row(uncut, "m")["metadata"]["token_len"] == 0
    model.write_jsonl(file, [*rows[:1], {"prompt": "2+2?"}])
    with pytest.raises(model.InputError, match=r"jsonl: instruction 2: found no uid, expected one"):
        run("--model", tiny, "--instructions", file, "--output", tmp_path / "a", *out[2:])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"instruction": "x"}', "a.json: found a dict, expected a list of JSON objects"),
        ("a.json", '[{"prompt": "x"}, 3]', "a.json:2: found 3, expected a JSON object"),
        ("a.jsonl", '\n{"text": "x"}', "a.jsonl:2: found no text, expected one under instruction"),
        ("a.jsonl", '{"question": " "}', "a.jsonl:1: question: found ' ', expected a text"),
        ("a.jsonl", '{"prompt": 3}', "a.jsonl:1: prompt: found 3, expected a text"),
        ("a.jsonl", "\n", "a.jsonl: found no instruction, expected at least one"),
    ],
)
def test_bad_instructions_are_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(model.InputError) as caught:
        sample.read_instructions(tmp_path / name)
    assert message in str(caught.value)


def test_a_prompt_beyond_the_context_is_refused_by_its_place(tiny):
    options = sample.Options(thought="none")
    rows = [{"instruction": "x"}, {"instruction": "y" * 300}]
    tokenizer, config = model.load_tokenizer(tiny), model.read_config(tiny)
    expected = r"f: the prompt of instruction 2: found 3\d\d tokens, expected 1 to 255"
    with pytest.raises(model.InputError, match=expected):
        sample.make_prompts(rows, tokenizer, options, config, "f")


def test_one_instruction_to_the_terminal(run, tmp_path):
    folder = write_checkpoint(write_tokenizer(tmp_path), LLAMA | {"max_position_embeddings": 400})
    assert run("--model", folder, "Hi", "--thought", "none", "--max-new-tokens", 5).out.strip()
    hidden = run("--model", folder, "Hi", "--max-new-tokens", 5)
    assert "no response could be cut" in hidden.err and "--show-thought" in hidden.err
    assert not hidden.out.strip()
    assert run("--model", folder, "Hi", "--max-new-tokens", 5, "--show-thought").out.strip()


@pytest.mark.parametrize("text", ["", " \n", "a\udcff"])
def test_an_instruction_that_is_no_text(text, run, tiny):
    with pytest.raises(model.InputError, match="instruction: found"):
        run("--model", tiny, text)


def test_the_command_ends_in_one_line_and_status_2(tmp_path):
    command = [sys.executable, sample.__file__, "--model", "no/such/folder", "Hi"]
    made = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert made.returncode == 2 and made.stdout == ""
    assert made.stderr == "sample.py: error: no/such/folder: no such folder\n"
