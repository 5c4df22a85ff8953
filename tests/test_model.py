"""model.py against what transformers computed (tests/fixtures), and against itself in other shapes.

python -m pytest tests/test_model.py
"""

import argparse
import dataclasses
import json
import shutil
import time
from datetime import datetime

import numpy as np
import pytest
import torch
from conftest import (
    FIXTURES,
    LLAMA,
    LLAMA_TEMPLATE,
    tensor_shapes,
    write_checkpoint,
    write_tokenizer,
)
from safetensors import safe_open

import model

CASES = json.loads((FIXTURES / "checkpoints.json").read_text())
CHATS = json.loads((FIXTURES / "chats.json").read_text())


@pytest.fixture(scope="module")
def logits():
    return np.load(FIXTURES / "logits.npz")


def build(case, folder):
    dtype = getattr(torch, case.get("dtype", "float32"))
    return write_checkpoint(folder, case["config"], case["seed"], dtype, case.get("shards", 1))


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# Logits


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name, logits, tmp_path):
    tokens, kept = torch.from_numpy(logits["tokens"]), logits["kept"]
    original = CASES[name]["config"].get("rope_scaling", {}).get("original_max_position_embeddings")
    assert kept[-1] > (original or 32)
    ours = model.load_model(build(CASES[name], tmp_path))
    with torch.no_grad():
        out = ours(tokens)
    assert out.shape == (2, 96, 97) and not ours.training
    assert relative(out[:, kept], torch.from_numpy(logits[name])) < 2e-5


def test_right_padding_leaves_the_row_alone(tiny):
    ours = model.load_model(tiny)
    rows = torch.randint(0, 264, (2, 31), generator=torch.Generator().manual_seed(1))
    alone = ours(rows[:1, :17])
    assert relative(ours(rows)[:1, :17], alone) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_stay_near_float32(dtype, tiny):
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        wide = model.load_model(tiny)(tokens)
        narrow = model.load_model(tiny, dtype=model.DTYPES[dtype])(tokens)
    assert narrow.dtype == model.DTYPES[dtype]
    assert 0 < relative(narrow.float(), wide) < 0.1


def test_positions_of_bfloat16_are_exact(tmp_path):
    """Angles in bfloat16 would be off by radians at this length; float32's are off by 1e-4."""
    folder = write_checkpoint(tmp_path, LLAMA | {"max_position_embeddings": 4096})
    trunk = model.load_model(folder, dtype=torch.bfloat16).model
    tokens = torch.tensor([[5, 9, 5, 9]])
    near, far = torch.arange(4)[None], torch.arange(4000, 4004)[None]
    # Attention sees only distances, so a shift of all positions changes rounding alone.
    assert relative(trunk(tokens, far).float(), trunk(tokens, near).float()) < 0.05


# Packing, cache, checkpointing: other ways through the same transformer


def test_packed_rows_equal_separate_forwards(tiny):
    ours = model.load_model(tiny)
    rng = np.random.default_rng(3)
    prompt, other = rng.integers(0, 264, 13).tolist(), rng.integers(0, 264, 1).tolist()
    tails = [rng.integers(0, 264, n).tolist() for n in (7, 1, 20)]
    trees = [(prompt, tails), (other, []), ([], [tails[2]]), (other, [[], tails[0]])]
    tokens, positions, attend, offsets = model.pack(trees)
    assert tokens.shape == positions.shape == (1, 13 + 28 + 1 + 20 + 1 + 7)
    with torch.no_grad():
        packed = ours.model(tokens, positions, attend)[0]
        for (prompt, tails), (start, starts) in zip(trees, offsets, strict=True):
            for tail, at in zip(tails, starts, strict=True):
                alone = ours.model(torch.tensor([prompt + tail]))[0]
                if prompt:
                    row = packed[start : start + len(prompt)]
                    assert relative(row, alone[: len(prompt)]) < 1e-5
                if tail:
                    assert relative(packed[at : at + len(tail)], alone[len(prompt) :]) < 1e-5


def test_gradients_through_a_packed_row(tiny):
    ours = model.load_model(tiny)
    trees = [([1, 2, 3], [[4, 5], [6]]), ([7], [[8, 9, 10], [11, 12, 13, 14]])]

    def gradients(loss):
        ours.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in ours.model.parameters()]

    tokens, positions, attend, offsets = model.pack(trees)
    hidden = ours.model(tokens, positions, attend)[0]
    packed = sum(hidden[at].square().sum() for _, starts in offsets for at in starts)
    separate = sum(
        ours.model(torch.tensor([prompt + tail]))[0, len(prompt)].square().sum()
        for prompt, tails in trees
        for tail in tails
    )
    for a, b in zip(gradients(packed), gradients(separate), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_cache_steps_equal_the_full_forward(tiny):
    """Rows at unequal positions, in a cache with a slot to spare; one row moves to another slot."""
    ours = model.load_model(tiny)
    rows = [torch.arange(3, 3 + n) % 264 for n in (1, 9, 24)]
    start, length = [1, 4, 15], 25
    cache = model.KVCache(ours.config, 4, length, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        full = [ours(row[None])[0] for row in rows]
        for slot, (row, n) in enumerate(zip(rows, start, strict=True)):
            held = []

            def keep(layer, q, k, v, places, held=held):
                held.append((k[0], v[0]))
                return model.causal_attention(layer, q, k, v, places)

            ours.model(row[None, :n], attend=keep)
            cache.write(slot, *(torch.stack(part) for part in zip(*held, strict=True)))
        slots, at = [0, 1, 2], list(start)
        for _ in range(9):
            if at[slots[0]] == len(rows[slots[0]]):  # the first row is at its end: its slot goes
                slots = [slots[-1], *slots[1:-1]]  # to the last row
                cache.move(len(slots), 0, at[slots[0]])
            tokens = torch.tensor([[rows[i][at[i]]] for i in slots])
            positions = torch.tensor([at[i] for i in slots])
            attend = cache.step(positions, int(positions.max()) + 1)
            hidden = ours.model(tokens, positions[:, None], attend)
            out = torch.nn.functional.linear(hidden, ours.head)[:, 0]
            for i, row in zip(slots, out, strict=True):
                assert relative(row, full[i][at[i]]) < 1e-5
                at[i] += 1
            if at[1] == len(rows[1]):
                break
    assert at[1] == 9 and slots[0] == 2


def test_cache_size_is_what_it_says(tiny):
    config = model.read_config(tiny)
    cache = model.KVCache(config, 3, 10, torch.device("cpu"), torch.bfloat16)
    size = cache.k.nbytes + cache.v.nbytes
    assert size == 3 * 10 * model.KVCache.bytes_per_token(config, torch.bfloat16)


@pytest.mark.parametrize("recompute", [1, 2])
def test_recomputed_blocks_give_equal_gradients(recompute, tiny):
    ours = model.load_model(tiny)
    tokens = torch.arange(40)[None]
    gradients = []
    for blocks in (0, recompute):
        ours.zero_grad()
        ours.model(tokens, recompute=blocks).square().sum().backward()
        gradients.append([p.grad.clone() for p in ours.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(g.abs().max() > 0 for g in gradients[1])


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_kept_places_equal_the_full_computation(recompute, tiny):
    """Hidden states and gradients, in a batch and in a packed row; one place is wanted twice."""
    ours = model.load_model(tiny)
    tokens, positions, attend, _ = model.pack([([1, 2, 3], [[4, 5], [6, 7, 8, 9, 10, 11, 12]])])
    batch = torch.arange(40).view(2, 20), None, model.causal_attention
    places = [7, 0, 11, 7, 3]
    for row in (batch, (tokens, positions, attend)):
        found, gradients = [], []
        for kept in (slice(None), places):
            ours.zero_grad()
            hidden = ours.model(*row, recompute, kept)
            hidden = hidden[:, places] if kept != places else hidden
            hidden.pow(3).sum().backward()
            found.append(hidden.detach())
            gradients.append([p.grad.clone() for p in ours.model.parameters()])
        assert found[1].shape == (len(row[0]), 5, 32) and relative(*found) < 1e-6
        for full, part in zip(*gradients, strict=True):
            assert (full - part).abs().max() <= 1e-5 * full.abs().max() and full.abs().max() > 0


def test_the_last_block_asks_and_answers_at_kept_places_alone(tiny):
    ours, rows = model.load_model(tiny), []
    for block in ours.model.layers:
        for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.mlp):
            part.register_forward_hook(lambda *call: rows.append(call[2].shape[1]))
    ours.model(torch.arange(40)[None], kept=[3, 39])
    assert rows == [40, 40, 40, 2, 40, 2]


def test_recompute_keeps_fewer_activations(tiny):
    ours, sizes = model.load_model(tiny), []
    for blocks in (0, 2):
        saved = []

        def note(tensor, saved=saved):
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            ours.model(torch.arange(40)[None], recompute=blocks)
        sizes.append(sum(saved))
    assert sizes[1] < sizes[0] / 3


# Saving


def tensors_of(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}  # transformers refuses a file without
            found[file.name] = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("shard_bytes", [5e9, 30_000])
@pytest.mark.parametrize("name", CASES)
def test_saved_folders_hold_what_was_loaded(name, shard_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "SHARD_BYTES", shard_bytes)
    source, saved = build(CASES[name], tmp_path / "source"), tmp_path / "deep" / "saved"
    write_tokenizer(source)
    ours = model.load_model(source)
    model.save_model(ours, saved, source)
    files = tensors_of(saved)
    together = {name: tensor for part in files.values() for name, tensor in part.items()}
    assert {n: tuple(t.shape) for n, t in together.items()} == tensor_shapes(CASES[name]["config"])
    assert sum(len(part) for part in files.values()) == len(together)
    index = saved / "model.safetensors.index.json"
    if shard_bytes == 5e9:
        assert list(files) == ["model.safetensors"] and not index.exists()
    else:
        names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        assert list(files) == names and len(files) > 1
        for part in files.values():
            assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= shard_bytes
        content = json.loads(index.read_text())
        assert content["weight_map"] == {n: f for f, part in files.items() for n in part}
        assert content["metadata"]["total_size"] == sum(t.nbytes for t in together.values())
    config = json.loads((saved / "config.json").read_text())
    key = "dtype" if name == "newer" else "torch_dtype"
    assert config == CASES[name]["config"] | {key: "float32"}
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (saved / file).read_bytes() == (source / file).read_bytes()
    again = model.load_model(saved).state_dict()
    assert all(torch.equal(again[n], t) for n, t in ours.state_dict().items())
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


@pytest.mark.parametrize("name", ["llama3.2 tied", "qwen2", "newer"])
def test_transformers_reads_saved_folders(name, tmp_path, monkeypatch):
    """All of them: python tests/make_fixtures.py --check."""
    transformers = pytest.importorskip("transformers")
    source = write_tokenizer(build(CASES[name], tmp_path / "source"))
    ours = model.load_model(source)
    monkeypatch.setattr(model, "SHARD_BYTES", 20_000)
    model.save_model(ours, tmp_path / "saved", source)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, info = load(tmp_path / "saved", output_loading_info=True)
    assert theirs.dtype == torch.float32 and not any(info.values())
    tokens = torch.arange(96)[None]
    with torch.no_grad():
        assert relative(theirs(tokens).logits, ours(tokens)) < 2e-5


def test_a_checkpoint_in_bfloat16_says_so(tiny, tmp_path):
    model.save_model(model.load_model(tiny, dtype=torch.bfloat16), tmp_path / "saved", tiny)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    (part,) = tensors_of(tmp_path / "saved").values()
    assert {t.dtype for t in part.values()} == {torch.bfloat16}


def test_saving_takes_an_empty_folder_and_no_other(tiny, tmp_path):
    ours = model.load_model(tiny)
    (tmp_path / "empty").mkdir()
    model.save_model(ours, tmp_path / "empty", tiny)
    (tmp_path / "file").write_text("kept")
    for taken in (tmp_path / "empty", tmp_path / "file"):
        with pytest.raises(model.InputError, match="already exists"):
            model.save_model(ours, taken, tiny)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("write", ["save_file", "shutil.copyfile", "os.replace"])
def test_a_failed_save_leaves_nothing_under_the_name(write, tiny, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(f"model.{write}", fail)
        with pytest.raises(model.InputError, match="cannot be written: No space"):
            model.save_model(model.load_model(tiny), tmp_path / "saved", tiny)
    assert not (tmp_path / "saved").exists()
    model.save_model(model.load_model(tiny), tmp_path / "saved", tiny)  # the remains do not disturb
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


# Tokenizer and chat template


class Frozen(datetime):
    @classmethod
    def now(cls):
        return datetime.fromisoformat(CHATS["now"])


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "named list"])
@pytest.mark.parametrize("name", sorted({case["template"] for case in CHATS["cases"]}))
def test_chats_are_the_very_ids_of_transformers(name, place, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "datetime", Frozen)
    folder = tmp_path / name
    shutil.copytree(FIXTURES / "templates" / name, folder)
    if place != "chat_template.jinja":
        template = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").unlink()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        if place == "named list":
            other = {"name": "tool_use", "template": "no"}
            template = [other, {"name": "default", "template": template}]
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config | {"chat_template": template})
        )
    tokenizer = model.load_tokenizer(folder)
    cases = [case for case in CHATS["cases"] if case["template"] == name]
    assert len(cases) == 9
    for case in cases:
        if "plain" in case:
            assert tokenizer.encode(case["plain"]) == case["ids"]
            continue
        chat = case["messages"], case["add_generation_prompt"]
        assert tokenizer.render_chat(*chat) == case["text"]
        assert tokenizer.apply_chat_template(*chat) == case["ids"]


def test_decode_gives_the_text_back(tiny):
    tokenizer = model.load_tokenizer(tiny)
    text = "naïve — 日本語 🙂\n\n  <R> It is 4 ."
    ids = tokenizer.encode(text)
    assert ids[0] == 256 and tokenizer.decode(ids[1:]) == text
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert tokenizer.decode([*ids, 260]) == f"<|begin_of_text|>{text}<|eot_id|>"
    assert tokenizer.decode([*ids, 260], skip_special_tokens=True) == text


def test_stop_ids_come_from_both_files(tmp_path):
    write_tokenizer(tmp_path, eos="<|eot_id|>", stops=["<|end_of_text|>"])
    assert model.load_tokenizer(tmp_path).stop_ids == (257, 260)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 258}')
    assert model.load_tokenizer(tmp_path).stop_ids == (258, 260)
    (tmp_path / "generation_config.json").unlink()
    assert model.load_tokenizer(tmp_path).stop_ids == (260,)


def test_the_guard_on_templates_is_cheap():
    """The guard against templates that never end costs under 2 ms a prompt."""
    tokenizer = model.load_tokenizer(FIXTURES / "templates" / "llama3")
    messages = [{"role": "user", "content": "word " * 500}]
    times = []
    for _ in range(20):
        began = time.perf_counter()
        tokenizer.render_chat(messages)
        times.append(time.perf_counter() - began)
    assert min(times) < 2e-3


# Random streams


def test_streams_share_no_draw():
    draws = [
        model.stream(seed, *names).random()
        for seed in (0, 1)
        for names in (("a",), ("a", 1), ("a", 1, 1), ("a", 11), ("b", 1))
    ]
    assert len(set(draws)) == 10
    assert model.stream(0, "a", 1).random() == draws[1]
    values = np.concatenate([model.stream(0, "uniform", i).random(5) for i in range(2000)])
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    chi_square = ((counts - 500) ** 2 / 500).sum()
    assert 5 < chi_square < 50  # 19 degrees of freedom: outside once in 10,000


def test_the_template_of_the_tests_is_llama3s(tiny):
    chat = [{"role": "user", "content": " x "}]
    theirs = model.load_tokenizer(FIXTURES / "templates" / "llama3").render_chat(chat)
    assert model.load_tokenizer(tiny).render_chat(chat) == theirs
    assert LLAMA_TEMPLATE


# Files


def test_json_lines_come_back(tmp_path):
    rows = [{"a": "日本\u2028 \n"}, {"b": [1, None, 0.1]}, {}]
    model.write_jsonl(tmp_path / "rows", rows)
    assert list(model.read_jsonl(tmp_path / "rows")) == list(enumerate(rows, 1))
    (tmp_path / "rows").write_bytes(b'{"a": 1}\r\n\n  \n{"a": 2}')
    assert list(model.read_jsonl(tmp_path / "rows")) == [(1, {"a": 1}), (4, {"a": 2})]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    def rows():
        yield {"new": 1}
        raise OSError("disk full")

    model.write_jsonl(tmp_path / "rows", [{"old": 1}])
    with pytest.raises(model.InputError, match="rows: cannot be written: disk full"):
        model.write_jsonl(tmp_path / "rows", rows())
    assert list(model.read_jsonl(tmp_path / "rows")) == [(1, {"old": 1})]
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop", [0, 1, 2])
@pytest.mark.parametrize("tail", [b"", b'[{"row": ', b'[{"row": 99}]'])
def test_groups_go_on_where_they_stopped(stop, tail, tmp_path):
    """Stopped before group `stop`, with half a line behind it: the file is that of one go."""
    path, key, begun = tmp_path / "rows.jsonl", {"seed": 1}, []

    def groups(done, stop=9):
        begun.append(done)
        for i in range(done, 3):
            if i == stop:
                raise Stopped
            yield [{"row": i}, {"row": -i}]

    with pytest.raises(Stopped):
        model.write_groups(path, key, lambda done: groups(done, stop))
    assert not path.exists()
    with open(tmp_path / "rows.jsonl.groups", "ab") as file:
        file.write(tail)
    with pytest.raises(model.InputError, match="seed = 1, now 2"):
        model.write_groups(path, {"seed": 2}, groups)
    model.write_groups(path, key, groups)
    assert begun == [0, stop]
    assert path.read_text() == "".join(f'{{"row": {i}}}\n{{"row": {-i}}}\n' for i in range(3))
    model.write_groups(path, key, groups)  # it is there: nothing is done again
    assert begun == [0, stop] and [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]\n", b"\xff\n"])
def test_groups_that_are_none_are_refused(content, tmp_path):
    (tmp_path / "rows.groups").write_bytes(content)
    with pytest.raises(model.InputError, match=r"rows\.groups"):
        model.write_groups(tmp_path / "rows", {}, lambda done: [])


# Options


@dataclasses.dataclass
class Options:
    count: int = model.option(8, "how many (ours)", 1)
    rate: float = model.option(0.5, "how fast, 50% (ours)", 0, 1)
    style: str = model.option("plain", "how (ours)", choices=("plain", "bold"))
    loud: bool = model.option(False, "aloud (ours)")
    room: float | None = model.option(None, "GiB (ours)", 0, kind=float)


def test_options_come_from_flags_defaults_and_values():
    parser = argparse.ArgumentParser()
    model.add_options(parser, Options)
    given = vars(parser.parse_args(["--count", "3", "--loud", "--room", "1.5"]))
    assert given == {"count": 3, "loud": True, "room": 1.5}
    assert model.read_options(Options, given) == Options(3, 0.5, "plain", True, 1.5)
    assert model.read_options(Options, {}) == Options()
    assert model.read_options(Options, {"rate": 1, "other": 5}) == Options(rate=1)
    assert "50% (ours) (default 0.5)" in " ".join(parser.format_help().split())


@pytest.mark.parametrize(
    "name, value",
    [
        *(("count", v) for v in (0, -1, 2.0, "3", True, None, [])),
        *(("rate", v) for v in (-0.1, 1.1, float("nan"), float("inf"), "0.5", True, None)),
        *(("style", v) for v in ("", "italic", None, ["plain"])),
        *(("loud", v) for v in (1, "yes", None)),
        *(("room", v) for v in (-1, float("nan"), float("inf"), "1")),
    ],
)
def test_options_outside_their_range(name, value):
    with pytest.raises(model.InputError, match=f"--{name}: found"):
        model.read_options(Options, {name: value})
