"""model.py against what transformers computed (tests/fixtures), against itself in other shapes,
and against files that cannot be used, chosen and drawn at random.

    python -m pytest tests/test_model.py
    FUZZ_CASES=20000 FUZZ_SEED=1 python -m pytest tests/test_model.py -k changed
"""

import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import struct
import sys
import time
from datetime import datetime

import model as lm

import numpy as np
import pytest
import torch
from conftest import (
    FIXTURES,
    LLAMA,
    LLAMA_SPECIAL,
    byte_tokenizer,
    cache_bytes_per_token,
    relative,
    tensor_shapes,
    write_checkpoint,
    write_tokenizer,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

CASES = json.loads((FIXTURES / "checkpoints.json").read_text())
CHATS = json.loads((FIXTURES / "chats.json").read_text())
NARROW = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def logits():
    return np.load(FIXTURES / "logits.npz")


@pytest.fixture
def ours(tiny):
    return lm.load_model(tiny)


def build(case, folder):
    dtype = getattr(torch, case.get("dtype", "float32"))
    return write_checkpoint(folder, case["config"], case["seed"], dtype, case.get("shards", 1))


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


# Logits


@pytest.mark.reference
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name, logits, tmp_path):
    """Families, rotary scalings beyond the original context, biases, shards, stored dtypes."""
    tokens, kept = torch.from_numpy(logits["tokens"]), logits["kept"]
    original = CASES[name]["config"].get("rope_scaling", {}).get("original_max_position_embeddings")
    assert kept[-1] > (original or 32)
    ours = lm.load_model(build(CASES[name], tmp_path))
    with torch.no_grad():
        out = ours(tokens)
    assert out.shape == (2, 96, 97) and not ours.training
    assert relative(out[:, kept], torch.from_numpy(logits[name])) < 2e-5


def test_right_padding_leaves_the_row_alone(ours):
    rows = torch.randint(0, 264, (2, 31), generator=torch.Generator().manual_seed(1))
    assert relative(ours(rows)[:1, :17], ours(rows[:1, :17])) < 1e-5


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_weights_stay_near_float32(dtype, ours, tiny):
    tokens, narrow = torch.arange(3, 60)[None], lm.load_model(tiny, dtype=dtype)
    assert {p.dtype for p in narrow.parameters()} == {dtype}
    with torch.no_grad():
        out = narrow(tokens)
        assert out.dtype == torch.float32 and 0 < relative(out, ours(tokens)) < 0.1
        assert ours.double()(tokens).dtype == torch.float64


def test_positions_of_bfloat16_are_exact(tmp_path):
    """Angles in bfloat16 would be off by radians at this length; float32's are off by 1e-4."""
    folder = write_checkpoint(tmp_path, LLAMA | {"max_position_embeddings": 4096})
    trunk = lm.load_model(folder, dtype=torch.bfloat16).model
    tokens = torch.tensor([[5, 9, 5, 9]])
    near, far = torch.arange(4)[None], torch.arange(4000, 4004)[None]
    # Attention sees only distances, so a shift of all positions changes rounding alone.
    assert relative(trunk(tokens, far).float(), trunk(tokens, near).float()) < 0.05


def test_a_model_that_is_cast_keeps_its_angles(tiny):
    tokens = torch.arange(90)[None]
    with torch.no_grad():
        cast, loaded = (
            llm(tokens)
            for llm in (lm.load_model(tiny).bfloat16(), lm.load_model(tiny, dtype=torch.bfloat16))
        )
    assert torch.equal(cast, loaded)


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is a GPU's."""

    is_cuda = True


@pytest.mark.reference
@pytest.mark.parametrize("dtype", NARROW)
def test_logits_of_a_gpu_are_not_rounded(dtype, monkeypatch):
    """Its way through logits_of, with its product made of two wide ones, against float64."""

    def mm(a, b, out_dtype):
        assert a.dtype == b.dtype == dtype
        return a.to(out_dtype) @ b.to(out_dtype)

    monkeypatch.setattr(torch, "mm", mm)
    draws = torch.Generator().manual_seed(3)
    hidden, head, grad = (
        torch.randn(size, generator=draws).to(dtype) for size in ((9, 64), (50, 64), (9, 50))
    )
    wide = hidden.double() @ head.double().T
    for given in (grad.float(), torch.randn(9, 50, generator=draws)):  # in dtype exact, and not
        x, w = (t.clone().requires_grad_() for t in (hidden, head))
        w.grad_dtype = torch.float32  # as training asks for
        out = lm.logits_of(x.as_subclass(OnGpu), w)
        assert out.dtype == torch.float32 and relative(out.double(), wide) < 1e-6
        out.backward(given)
        assert x.grad.dtype == dtype and w.grad.dtype == torch.float32
        eps = torch.finfo(dtype).eps
        assert relative(x.grad.double(), given.double() @ head.double()) < 2 * eps
        exact = torch.equal(given, grad.float())  # then nothing of the head's gradient is rounded
        bound = 1e-6 if exact else eps
        assert relative(w.grad.double(), given.double().T @ hidden.double()) < bound
    rounded = lm.logits_of(hidden, head)  # the CPU's way, as transformers'
    assert rounded.dtype == torch.float32 and relative(rounded.double(), wide) > 1e-4
    assert torch.equal(rounded, rounded.to(dtype).float())


# Packing, cache, recomputing: other ways through the same transformer


def pieces_of(seed=3):
    """(ids, prefix): two tails of a prompt, one of another prompt, and two that stand alone."""
    rng = np.random.default_rng(seed)
    sizes = [(13, None), (7, 0), (1, 0), (1, None), (20, None), (7, 3), (2, None)]
    return [(rng.integers(0, 264, n).tolist(), prefix) for n, prefix in sizes]


def test_packed_rows_equal_separate_forwards(ours):
    """Every piece sees its prefix and itself; hidden states and gradients of all weights."""
    pieces = pieces_of()
    tokens, positions, attend = lm.pack(pieces)
    assert tokens.shape == positions.shape == (1, sum(len(ids) for ids, _ in pieces))
    packed = ours.model(tokens, positions, attend)[0]
    alone = []
    for ids, prefix in pieces:
        before = [] if prefix is None else pieces[prefix][0]
        alone.append(ours.model(torch.tensor([before + ids]))[0, len(before) :])
    alone = torch.cat(alone)
    assert relative(packed, alone) < 1e-5
    found, expected = (gradients(ours.model, x.pow(3).sum()) for x in (packed, alone))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max() and b.abs().max() > 0


@pytest.mark.parametrize("pieces", [[([5], None), ([], 0)], [([], None), ([5], 0)]], ids=str)
def test_an_empty_piece_is_refused(pieces):
    """It would have no last token, and what is read there would be another piece's."""
    with pytest.raises((AssertionError, ValueError, lm.InputError)):
        lm.pack(pieces)


def test_cache_steps_equal_the_full_forward(ours, memory_order):
    """Rows at unequal positions, in a cache with a slot to spare.

    Where a row ends, the last slot's row takes its slot.
    """
    draws = torch.Generator().manual_seed(7)
    rows = [torch.randint(0, 264, (n,), generator=draws) for n in (30, 4, 24, 12, 18)]
    at, slots = [15, 1, 20, 4, 9], [0, 1, 2, 3, 4]  # tokens seen of each row; the slots' rows
    cache, steps = lm.KVCache(ours.config, 6, 30, torch.device("cpu"), torch.float32), 0
    with torch.no_grad():
        full = [ours(row[None])[0] for row in rows]
        for slot in slots:
            held = []

            def keep(layer, q, k, v, held=held):
                held.append((k[0], v[0]))
                return lm.causal_attention(layer, q, k, v)

            ours.model(rows[slot][None, : at[slot]], attend=keep)
            cache.write(slot, *(torch.stack(part) for part in zip(*held, strict=True)))
        while slots:
            tokens = torch.tensor([[rows[i][at[i]]] for i in slots])
            positions = [at[i] for i in slots]
            attend = cache.step(torch.tensor(positions), max(positions) + 1 + steps % 2)
            hidden = ours.model(tokens, torch.tensor(positions)[:, None], attend)[:, 0]
            for i, row in zip(slots, lm.logits_of(hidden, ours.head), strict=True):
                assert relative(row, full[i][at[i]]) < 1e-5
                at[i] += 1
            for slot in reversed(range(len(slots))):
                if at[slots[slot]] == len(rows[slots[slot]]):
                    last = slots.pop()
                    if slot < len(slots):
                        slots[slot] = last
                        cache.move(len(slots), slot, at[last])
            steps += 1
    assert at == [len(row) for row in rows] and steps == 15


def test_cache_size_is_what_it_says(tiny):
    config = lm.read_config(tiny)
    cache = lm.KVCache(config, 3, 10, torch.device("cpu"), torch.bfloat16)
    size = cache.k.nbytes + cache.v.nbytes
    assert size == 3 * 10 * cache_bytes_per_token(config, torch.bfloat16)


@pytest.mark.reference
@pytest.mark.parametrize("T, P", [(3, 0), (40, 0), (128, 0), (301, 0), (5, 9), (128, 1), (300, 37)])
def test_causal_attention_is_softmax_over_the_keys_seen(T, P):
    """Against its formula in float64, gradients too; blocks of queries begin at 128."""
    torch.manual_seed(0)
    shapes = ((2, 4, T, 8), (2, 2, P + T, 8), (2, 2, P + T, 8))
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    keys, values = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = q @ keys.transpose(2, 3) / 8**0.5  # (2, 4, T, P + T)
    unseen = torch.arange(P + T) > P + torch.arange(T)[:, None]
    expected = scores.masked_fill(unseen, -torch.inf).softmax(-1) @ values
    out, weights = lm.causal_attention(0, q, k, v), torch.randn_like(expected)
    assert relative(out, expected) < 1e-12
    found, right = (torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (out, expected))
    for ours, theirs in zip(found, right, strict=True):
        assert relative(ours, theirs) < 1e-12


@pytest.mark.parametrize("recompute", [1, 2])
def test_recomputed_blocks_give_equal_gradients(recompute, ours):
    for row in ((torch.arange(40)[None],), lm.pack(pieces_of())):
        plain, again = (
            gradients(ours, ours.model(*row, recompute=blocks).square().sum())
            for blocks in (0, recompute)
        )
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
        assert all(g.abs().max() > 0 for g in again)


def test_recomputing_keeps_fewer_activations(ours):
    sizes = []
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


@pytest.mark.parametrize("name", CASES)
def test_saved_folders_hold_what_was_loaded(name, tmp_path):
    source, saved = build(CASES[name], tmp_path / "source"), tmp_path / "deep" / "saved"
    write_tokenizer(source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    ours = lm.load_model(source)
    lm.save_model(ours, saved, source)
    ((file, tensors),) = tensors_of(saved).items()
    assert file == "model.safetensors"
    assert {n: tuple(t.shape) for n, t in tensors.items()} == tensor_shapes(CASES[name]["config"])
    assert not (saved / "model.safetensors.index.json").exists()
    config = json.loads((saved / "config.json").read_text())
    key = "dtype" if name == "newer" else "torch_dtype"
    tied = {"tie_word_embeddings": False} if not ours.config.tie_word_embeddings else {}
    assert config == CASES[name]["config"] | {key: "float32"} | tied
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for file in (*tokenizer, "generation_config.json"):
        assert (saved / file).read_bytes() == (source / file).read_bytes()
    again = lm.load_model(saved).state_dict()
    assert all(torch.equal(again[n], t) for n, t in ours.state_dict().items())
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


@pytest.mark.reference
@pytest.mark.parametrize("name", ["llama3.2 tied", "qwen2", "newer", "qwen3", "smollm3"])
def test_transformers_reads_saved_folders(name, tmp_path):
    """All of them: python tests/fixtures/make_fixtures.py --check."""
    transformers = pytest.importorskip("transformers")
    source = write_tokenizer(build(CASES[name], tmp_path / "source"))
    ours = lm.load_model(source)
    lm.save_model(ours, tmp_path / "saved", source)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, info = load(tmp_path / "saved", output_loading_info=True)
    assert theirs.dtype == torch.float32 and not any(info.values())
    tokens = torch.arange(96)[None]
    with torch.no_grad():
        assert relative(theirs(tokens).logits, ours(tokens)) < 2e-5


def test_a_checkpoint_in_bfloat16_says_so(tiny, tmp_path):
    lm.save_model(lm.load_model(tiny, dtype=torch.bfloat16), tmp_path / "saved", tiny)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    (part,) = tensors_of(tmp_path / "saved").values()
    assert {t.dtype for t in part.values()} == {torch.bfloat16}


def test_saving_takes_an_empty_folder_and_no_other(ours, tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    lm.save_model(ours, tmp_path / "empty", tiny)
    (tmp_path / "file").write_text("kept")
    for taken in (tmp_path / "empty", tmp_path / "file"):
        with pytest.raises(lm.InputError, match=f"{taken.name}: cannot be written"):
            lm.save_model(ours, taken, tiny)
    assert (tmp_path / "file").read_text() == "kept"
    lm.load_model(tmp_path / "empty")


@pytest.mark.parametrize("write", ["save_file", "shutil.copyfile", "os.replace", "os.fsync"])
def test_a_failed_save_leaves_nothing_under_the_name(write, ours, tiny, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(f"model.{write}", fail)
        with pytest.raises(lm.InputError, match=r"cannot be written: .*No space"):
            lm.save_model(ours, tmp_path / "saved", tiny)
    assert not (tmp_path / "saved").exists()
    lm.save_model(ours, tmp_path / "saved", tiny)  # the remains do not disturb
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


# Tokenizer and chat template


class Frozen(datetime):
    @classmethod
    def now(cls):
        return datetime.fromisoformat(CHATS["now"])


@pytest.mark.reference
@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "named list"])
@pytest.mark.parametrize("name", sorted({case["template"] for case in CHATS["cases"]}))
def test_chats_are_the_very_ids_of_transformers(name, place, tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "datetime", Frozen)
    folder = shutil.copytree(FIXTURES / "templates" / name, tmp_path / name)
    if place != "chat_template.jinja":
        template = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").unlink()
        if place == "named list":
            other = {"name": "tool_use", "template": "no"}
            template = [other, {"name": "default", "template": template}]
        edit(folder / "tokenizer_config.json", chat_template=template)
    tokenizer = lm.load_tokenizer(folder)
    cases = [case for case in CHATS["cases"] if case["template"] == name]
    assert len(cases) == 9
    for case in cases:
        if "plain" in case:
            assert tokenizer.encode(case["plain"]) == case["ids"]
            continue
        chat = case["messages"], case["add_generation_prompt"]
        assert tokenizer.render_chat(*chat) == case["text"]
        assert tokenizer.apply_chat_template(*chat) == case["ids"]


def test_the_template_of_the_tests_is_llama3s(tiny):
    chat = [{"role": "user", "content": " x "}]
    theirs = lm.load_tokenizer(FIXTURES / "templates" / "llama3").render_chat(chat)
    assert lm.load_tokenizer(tiny).render_chat(chat) == theirs


def test_decode_gives_the_text_back(tiny):
    tokenizer = lm.load_tokenizer(tiny)
    text = "naïve — 日本語 🙂\n\n  <R> It is 4 ."
    ids = tokenizer.encode(text)
    assert ids[0] == 256 and tokenizer.decode(ids[1:]) == text
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert tokenizer.decode([*ids, 260]) == f"<|begin_of_text|>{text}<|eot_id|>"
    assert tokenizer.decode([*ids, 260], skip_special_tokens=True) == text
    refused(lambda: tokenizer.encode("half \ud800"), "half", "surrogate")


def test_stop_ids_come_from_both_files(tmp_path):
    write_tokenizer(tmp_path, eos="<|eot_id|>", stops=["<|end_of_text|>"])
    generation = tmp_path / "generation_config.json"
    for content, stops in [
        (None, (257, 260)),
        ({"eos_token_id": 258}, (258, 260)),
        ({"eos_token_id": None}, (260,)),
        ({}, (260,)),
    ]:
        if content is not None:
            generation.write_text(json.dumps(content))
        assert lm.load_tokenizer(tmp_path).stop_ids == stops
    generation.unlink()
    edit(tmp_path / "tokenizer_config.json", eos_token={"content": "<|end_of_text|>"})
    assert lm.load_tokenizer(tmp_path).stop_ids == (257,)


CUT = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
PAD = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None}
PAD |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}


@pytest.mark.parametrize("stored", [{"truncation": CUT}, {"padding": PAD}], ids=str)
def test_nothing_is_cut_or_padded(stored, folder):
    """A tokenizer.json saved after a training that cut or padded says so."""
    long, whole = "x" * 50, lm.load_tokenizer(folder).encode("x" * 50)
    edit(folder / "tokenizer.json", **stored)
    assert lm.load_tokenizer(folder).encode(long) == whole and len(whole) == 51


def test_special_tokens_come_from_the_file_that_transformers_reads(folder):
    own, named = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    template = "{{ eos_token }}{{ unk_token }}{{ image_token }}{{ add_bos_token }}"
    edit(own, chat_template=template, eos_token=..., add_bos_token=True)
    unk = {"content": "<|eot_id|>", "lstrip": False}
    named.write_text(json.dumps({"eos_token": "<|end_of_text|>", "unk_token": unk}))
    edit(folder / "generation_config.json", eos_token_id=...)
    tokenizer = lm.load_tokenizer(folder)
    assert tokenizer.stop_ids == (257,)
    assert tokenizer.render_chat([]) == "<|end_of_text|><|eot_id|>"
    edit(own, eos_token="<|eot_id|>")  # the other file wins
    assert lm.load_tokenizer(folder).stop_ids == (257,)
    edit(own, added_tokens_decoder={}, extra_special_tokens={"image_token": "<i>"})  # not read
    tokenizer = lm.load_tokenizer(folder)
    assert tokenizer.stop_ids == (260,) and tokenizer.render_chat([]) == "<|eot_id|><i>"
    for wrong in (5, ["x"], {}):
        edit(own, eos_token=wrong)
        if wrong != {}:
            refused(lambda: lm.load_tokenizer(folder), "eos_token")


def test_stop_ids_of_config_json_count_where_no_other_file_says(folder):
    edit(folder / "config.json", eos_token_id=[258, 260])
    assert lm.load_tokenizer(folder).stop_ids == (257, 260)
    for content in ("{}", '{"eos_token_id": null}', None):
        generation = folder / "generation_config.json"
        generation.write_text(content) if content else generation.unlink()
        assert lm.load_tokenizer(folder).stop_ids == (257, 258, 260)
    edit(folder / "config.json", eos_token_id=None)
    assert lm.load_tokenizer(folder).stop_ids == (257,)
    for wrong in ("x", ["x"], 2.0, {"a": 1}):
        edit(folder / "config.json", eos_token_id=wrong)
        refused(lambda: lm.load_tokenizer(folder), "eos_token_id")


def test_what_templates_ask_for_as_in_transformers(folder):
    template = "{% generation %}{{ 'x' }}{% endgeneration %}{{ enable_thinking }}"
    options = "ensure_ascii=true, separators=(',', ':'), sort_keys=true"
    template += (
        "{{ {'b': 'é', 'a': 1} | tojson(" + options + ") }}{{ {'b': '<'} | tojson(indent=1) }}"
    )
    edit(folder / "tokenizer_config.json", chat_template=template)
    said = lm.load_tokenizer(folder).render_chat([])
    assert said == 'xFalse{"a":1,"b":"\\u00e9"}{\n "b": "<"\n}'


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("kind", ["another head", "equal head", "head alone"])
def test_heads_of_tied_checkpoints(kind, folder, tmp_path):
    """What is stored counts, as in transformers, and is read back."""
    file, tokens = folder / "model.safetensors", torch.arange(20)[None]
    tensors = load_file(file)
    if kind != "another head":
        tensors[HEAD] = tensors[EMBEDDING].clone()
        save_file(tensors, file)
    right = lm.load_model(folder)(tokens)  # not tied yet
    edit(folder / "config.json", tie_word_embeddings=True)
    if kind == "head alone":
        del tensors[EMBEDDING]
        save_file(tensors, file)
    ours = lm.load_model(folder)
    assert torch.equal(ours(tokens), right)
    lm.save_model(ours, tmp_path / "saved", folder)
    assert torch.equal(lm.load_model(tmp_path / "saved")(tokens), right)
    tied = json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"]
    assert tied == (kind != "another head")
    assert (HEAD in load_file(tmp_path / "saved" / "model.safetensors")) != tied


def test_a_flag_of_another_type_is_settled_by_what_is_stored(folder):
    tokens = torch.arange(20)[None]
    right = lm.load_model(folder)(tokens)
    edit(folder / "config.json", tie_word_embeddings="false")
    ours = lm.load_model(folder)
    assert torch.equal(ours(tokens), right) and ours.config.tie_word_embeddings is False


def test_swish_is_silu(folder):
    edit(folder / "config.json", hidden_act="swish")
    lm.load_model(folder)


def test_tensors_that_do_not_fit_are_one_short_line(folder):
    edit(folder / "config.json", hidden_size=16, head_dim=8)
    with pytest.raises(lm.InputError) as caught:
        lm.load_model(folder)
    assert len(str(caught.value)) < 500
    refused(lambda: lm.load_model(folder), EMBEDDING, "[264, 32]", "[264, 16]")


@pytest.mark.parametrize("name", ["qwen3", "smollm3"])
def test_packing_and_decoding_in_the_newer_families(name, tmp_path):
    ours = lm.load_model(build(CASES[name], tmp_path))
    rng = np.random.default_rng(1)
    first, second = (rng.integers(0, 97, n).tolist() for n in (9, 6))
    with torch.no_grad():
        packed = ours.model(*lm.pack([(first, None), (second, 0)]))[0, 9:]
        whole = ours.model(torch.tensor([first + second]))[0, 9:]
        assert relative(packed, whole) < 1e-5
        held = []

        def keep(layer, q, k, v):
            held.append((k[0], v[0]))
            return lm.causal_attention(layer, q, k, v)

        ours.model(torch.tensor([first]), attend=keep)
        cache = lm.KVCache(ours.config, 1, 20, torch.device("cpu"), torch.float32)
        cache.write(0, *(torch.stack(part) for part in zip(*held, strict=True)))
        for i, token in enumerate(second):
            at = torch.tensor([9 + i])
            step = ours.model(torch.tensor([[token]]), at[:, None], cache.step(at, 10 + i))
            assert relative(step[0, 0], whole[i]) < 1e-5


# Random streams, files, options


def test_streams_share_no_draw():
    draws = [
        lm.random_stream(seed, *names).random()
        for seed in (0, 1)
        for names in (("a",), ("a", 1), ("a", 1, 1), ("a", 11), ("b", 1))
    ]
    assert len(set(draws)) == 10
    assert lm.random_stream(0, "a", 1).random() == draws[1]
    values = np.concatenate([lm.random_stream(0, "uniform", i).random(5) for i in range(2000)])
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    chi_square = ((counts - 500) ** 2 / 500).sum()
    assert 5 < chi_square < 50  # 19 degrees of freedom: outside once in 10,000


def test_json_lines_come_back(tmp_path):
    rows = [{"a": "日本\u2028 \n"}, {"b": [1, None, 0.1]}, {}]
    lm.write_jsonl(tmp_path / "rows", rows)
    file = tmp_path / "rows"
    assert list(lm.read_jsonl(file)) == [(f"{file}:{i}", row) for i, row in enumerate(rows, 1)]
    file.write_bytes(b'{"a": 1}\r\n\n  \n{"a": 2}')
    assert list(lm.read_jsonl(file)) == [(f"{file}:1", {"a": 1}), (f"{file}:4", {"a": 2})]
    (tmp_path / "rows").write_bytes(b'{"a": 1}\n[1]\n')
    refused(lambda: list(lm.read_jsonl(tmp_path / "rows")), "rows:2", "not an object")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    def rows():
        yield {"new": 1}
        raise OSError("disk full")

    lm.write_jsonl(tmp_path / "rows", [{"old": 1}])
    refused(lambda: lm.write_jsonl(tmp_path / "rows", rows()), "rows: cannot be written: disk full")
    assert list(lm.read_jsonl(tmp_path / "rows")) == [(f"{tmp_path}/rows:1", {"old": 1})]
    lm.write_jsonl(tmp_path / "rows", [{"new": 2}])
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop", [0, 1, 4])
@pytest.mark.parametrize("tail", [b"", b'{"row": ', b'{"row": 1', b'{"ro'])
def test_rows_go_on_where_they_stopped(stop, tail, tmp_path):
    """Stopped before row `stop`, with part of it written: the file is that of one go."""
    path, begun = tmp_path / "rows.jsonl", []
    whole = [{"row": 1}, {"row": "ü"}, {"row": 2}, {"row": -2}, {"row": 3}]

    def write(key, stop=9):
        def rows_of(items):
            for row in items:
                begun.append(whole.index(row))
                if begun[-1] == stop:
                    raise Stopped
                yield row

        lm.write_rows(path, whole, key, rows_of)

    with pytest.raises(Stopped):
        write(["seed", 1], stop)
    assert not path.exists()
    (partial,) = tmp_path.iterdir()
    with open(partial, "ab") as file:
        file.write(tail)
    with pytest.raises(Stopped):  # what depends on something else takes none of it
        write(["seed", 2], 0)
    write(["seed", 1])
    assert begun == [*range(stop + 1), 0, *range(stop, 5)] and not partial.exists()
    assert [row for _, row in lm.read_jsonl(path)] == whole
    with pytest.raises(lm.InputError, match="exists already"):  # of whatever options it is
        write(["seed", 1])


def test_a_hash_is_of_all_that_a_checkpoint_says(tmp_path):
    folder, seen = write_checkpoint(write_tokenizer(tmp_path / "a")), set()
    for file in (None, *sorted(folder.iterdir()), folder / "chat_template.jinja"):
        if file:
            file.write_bytes(b"changed")
        seen.add(lm.hash_of(folder))
    assert len(seen) == 7
    (folder / "README.md").write_text("not read")
    assert lm.hash_of(shutil.copytree(folder, tmp_path / "b")) == lm.hash_of(folder) in seen
    assert lm.hash_of([1, "a"]) != lm.hash_of([1, "b"])


def test_outputs_are_refused_before_the_work(tmp_path):
    lm.check_output(tmp_path / "new")
    refused(lambda: lm.check_output(tmp_path), f"{tmp_path} exists already")
    refused(
        lambda: lm.check_output(tmp_path / "no" / "file"), "there is no folder", "make it first"
    )


@dataclasses.dataclass
class Options:
    count: int = lm.option(8, "how many (ours)", 1)
    rate: float = lm.option(0.5, "how fast, 50% (ours)", 0, 1)
    style: str = lm.option("plain", "how (ours)", choices=("plain", "bold"))
    loud: bool = lm.option(False, "aloud (ours)")


def parse(*flags, **recipe):
    parser = lm.make_parser("what", Options, lm.Device)
    parser.set_defaults(**recipe)
    return lm.options_of(Options, parser.parse_args(flags))


def test_options_come_from_flags_recipes_and_defaults():
    assert parse() == Options()
    assert parse("--count", "3", "--rate=1", "--loud") == Options(3, 1.0, "plain", True)
    recipe = {"style": "bold", "loud": True}
    assert parse(**recipe) == Options(8, 0.5, "bold", True)
    assert parse("--no-loud", "--style", "plain", **recipe) == Options()
    parser = lm.make_parser("what", Options, lm.Device)
    assert "50% (ours) (default 0.5)" in " ".join(parser.format_help().split())
    given = parser.parse_args(["--device", "cuda:1", "--dtype", "bfloat16"])
    assert lm.options_of(lm.Device, given) == lm.Device("cuda:1", "bfloat16", False)


@pytest.mark.parametrize(
    "flags",
    [
        *(f"--count={value}" for value in ("0", "-1", "2.5", "x", "")),
        *(f"--rate={value}" for value in ("-0.1", "1.1", "nan", "inf", "x")),
        *("--style=italic", "--loud=yes", "--dtype=float8", "--cou=3", "--nothing", "more"),
    ],
)
def test_options_outside_their_range(flags):
    refused(lambda: parse(flags), flags.split("=")[0])


def test_main_says_what_a_checkpoint_takes(tiny, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["model.py", "--model", str(tiny)])
    lm.main()
    said = capsys.readouterr().out
    count = sum(tensor.numel() for tensor in load_file(tiny / "model.safetensors").values())
    assert f" {count:,}\n" in said and "(257, 260)" in said


# Refusals: one line that names the culprit


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def refused(call, *parts):
    """Runs call(), which must end in an error for the user whose one line holds all parts."""
    with pytest.raises((lm.InputError, OSError)) as caught:
        call()
    message = " ".join(str(caught.value).split())  # as run_main prints it
    assert len(message) < 3000, message
    for part in parts:
        assert part in message, message


def edit(file, **values):
    """Changes values of a JSON file; `...` takes one out."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def short(value):
    return str(value)[:40]


ROPE = CASES["llama3.1"]["config"]["rope_scaling"]
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
CONFIGS = [  # (what is changed, what the message names beside the file)
    ({"model_type": "gemma2"}, "'gemma2'"),
    ({"model_type": ...}, "model_type"),
    ({"hidden_act": "gelu"}, "'gelu'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
    ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
    ({"rope_scaling": ROPE | {"factor": float("nan")}}, "factor"),
    ({"rope_theta": -1.0}, "rope_theta"),
    (MISTRAL | {"sliding_window": 64}, "sliding_window"),
    (MISTRAL, "4096"),  # the window of a file that says nothing
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32}, "sliding_window"),
    ({"hidden_size": ...}, "hidden_size"),
    # Values of another type
    ({"rope_scaling": {"rope_type": "linear", "factor": "2.0"}}, "factor is '2.0'"),
    ({"rope_scaling": "linear"}, "rope_type"),
    ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type"),
    ({"rope_theta": "10000"}, "rope_theta"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers"),
    ({"num_attention_heads": True}, "num_attention_heads"),
    ({"num_key_value_heads": [2]}, "num_key_value_heads"),
    ({"head_dim": 8.0}, "head_dim"),
    ({"vocab_size": {}}, "vocab_size"),
    ({"rms_norm_eps": [1e-5]}, "rms_norm_eps"),
    # What the newer families add
    ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 32}, "sliding_window"),
    ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers"),
    ({"model_type": "smollm3", "no_rope_layers": 5}, "no_rope_layers"),
    ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
]
SHAPES = [  # sizes that are not those of the tensors
    {"num_key_value_heads": 3},
    {"num_attention_heads": 5, "num_key_value_heads": 5},
    {"head_dim": 7},
    {"vocab_size": 265},
]


@pytest.mark.parametrize("values, part", CONFIGS, ids=short)
def test_configs(values, part, folder):
    edit(folder / "config.json", **values)
    refused(lambda: lm.load_model(folder), "config.json", part)


@pytest.mark.parametrize("values", SHAPES, ids=short)
def test_sizes_of_other_tensors(values, folder):
    edit(folder / "config.json", **values)
    refused(lambda: lm.load_model(folder), str(folder), "shape", "do not fit config.json")


TEXTS = [b"", b"{", b"[]", b"null", b"{} {}", b"\xef\xbb\xbf{} {}", b'{"a": "\xff"}', b"[" * 99999]


@pytest.mark.parametrize("text", TEXTS, ids=short)
@pytest.mark.parametrize("name", ["config", "tokenizer", "tokenizer_config", "generation_config"])
def test_files_that_are_no_object(name, text, folder):
    (folder / f"{name}.json").write_bytes(text)
    refused(lambda: lm.load_tokenizer(folder), f"{name}.json")
    if name == "config":
        refused(lambda: lm.load_model(folder), "config.json")


NORM, GATE = "model.norm.weight", "model.layers.1.mlp.gate_proj.weight"
TENSORS = {  # name: (what is done to the tensors, what the message names)
    "missing": (lambda t: t.pop(GATE), GATE),
    "turned": (lambda t: t.update({GATE: t[GATE].T.contiguous()}), GATE, "[32, 56]", "[56, 32]"),
    "unknown": (lambda t: t.update({"model.extra": torch.ones(2)}), "model.extra"),
    "another layer": (lambda t: t.update({GATE.replace("1", "2"): t[GATE].clone()}), "layers.2"),
    "not a number": (lambda t: t[GATE].view(-1)[9].fill_(float("nan")), GATE, "finite"),
    "endless": (lambda t: t[NORM][3].fill_(-float("inf")), NORM, "finite"),
    "endless in float16": (lambda t: t[NORM][3].fill_(7e4), NORM, "float16"),
    "integers": (lambda t: t.update({NORM: t[NORM].to(torch.int32)}), NORM, "int32"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name, folder):
    change, *parts = TENSORS[name]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    refused(lambda: lm.load_model(folder, dtype=torch.float16), str(folder), *parts)


def header(text, length=None):
    return struct.pack("<Q", len(text) if length is None else length) + text


OUTSIDE = header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 9]}}')
HEADERS = [b"", b"1234", *map(header, TEXTS), header(b"{}", 2**63), OUTSIDE, b"\x80\x04pickle"]


@pytest.mark.parametrize("content", [*HEADERS, 100, 5000, -1, None], ids=short)
def test_weights_that_are_not_whole(content, folder):
    """Bytes, or how many of the good file's, or none; a pickle beside it is never opened."""
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    if content is not None:
        file.write_bytes(whole[:content] if isinstance(content, int) else content)
    refused(lambda: lm.load_model(folder), "model.safetensors")


SHARD, INDEX = "model-00002-of-00003.safetensors", "model.safetensors.index.json"
INDEXES = {
    "a lost shard": (lambda f: (f / SHARD).unlink(), SHARD),
    "a shard cut short": (lambda f: (f / SHARD).write_bytes(b"1234"), SHARD),
    "a path above": (lambda f: edit(f / INDEX, weight_map={NORM: f"../{SHARD}"}), "../"),
    "an absolute path": (lambda f: edit(f / INDEX, weight_map={NORM: str(f / SHARD)}), SHARD),
    "no shard": (lambda f: edit(f / INDEX, weight_map={}), "Missing key"),
    "no map": (lambda f: edit(f / INDEX, weight_map=...), "Missing key"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_indexes(name, tmp_path):
    change, part = INDEXES[name]
    folder = write_checkpoint(tmp_path / "model", shards=3)
    shutil.copy(folder / SHARD, tmp_path)  # what a path above would find
    change(folder)
    refused(lambda: lm.load_model(folder), str(folder), part)


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cuda:-7", "", "meta"])
def test_devices(device, tiny):
    refused(lambda: lm.load_model(tiny, device), f"--device {device}")


BIG = byte_tokenizer(special=[*LLAMA_SPECIAL, *(f"<{i}>" for i in range(9))])
TOKENIZERS = {
    "missing": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "beyond the embedding": (lambda f: BIG.save(str(f / "tokenizer.json")), "269", "vocab_size"),
    "eos is no token": (lambda f: edit(f / "tokenizer_config.json", eos_token="</s>"), "</s>"),
    "stop id beyond": (lambda f: edit(f / "generation_config.json", eos_token_id=[264]), "264"),
    "template": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), "utf-8"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(name, folder):
    change, *parts = TOKENIZERS[name]
    change(folder)
    refused(lambda: lm.load_tokenizer(folder), str(folder), *parts)


ROLES = "{% if messages[0].role != 'user' %}{{ raise_exception('users\\nonly') }}{% endif %}"
TEMPLATES = [  # (template, part of the message); the chat is one system turn
    (..., "none"),
    (5, "does not parse"),
    ([5], "does not parse"),
    ("{% for m in %}", "does not parse"),
    ("{% nope %}", "'nope'"),
    ("{{ " + "(" * 9999 + ")" * 9999 + "}}", "does not parse"),
    (ROLES, "users only"),
    ("{{ messages[0].nothing.more }}", "nothing"),
    ("{{ 1 / 0 }}", "division"),
    ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
    # Ways out of the sandbox
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "__class__"),
    ("{{ raise_exception.__globals__['os'].system('id') }}", "__globals__"),
    ("{{ cycler.__init__.__globals__.os.environ }}", "__init__"),
    ("{{ (strftime_now|attr('__globals__'))['sys'] }}", "__globals__"),
    ("{{ '{0.__class__.__mro__}'.format(messages) }}", "__class__"),
    ("{{ messages.append(1) }}", "append"),
    ("{{ messages[0].update(role='user') }}", "update"),
    ("{% include 'config.json' %}", "loader"),
    ("{{ range(10**9)|list }}", "Range"),
]


@pytest.mark.parametrize("template, part", TEMPLATES, ids=short)
def test_templates(template, part, folder):
    edit(folder / "tokenizer_config.json", chat_template=template)
    chat = [{"role": "system", "content": "x"}]
    refused(lambda: lm.load_tokenizer(folder).render_chat(chat), str(folder), "chat_template", part)
    assert chat == [{"role": "system", "content": "x"}]


@pytest.mark.parametrize("call", [lm.load_model, lm.load_tokenizer])
def test_folders(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "absent", "./a/b/c", "", "a b/c", "-x/y"):
        refused(lambda path=path: call(path), f"{path}: no such folder")
    refused(lambda: call("file"), "file: no such folder")
    refused(lambda: call("."), ".json")


def test_a_hub_id_without_a_network(tmp_path, monkeypatch, capsys):
    """The command ends in exit status 2 and one line, and soon."""
    from huggingface_hub import constants

    # What HF_HUB_OFFLINE=1 and HF_HOME set when it is imported.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("signal.signal", lambda *args: None)
    monkeypatch.setattr(sys, "argv", ["model.py", "--model", "nobody/no-such-model"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    began = time.monotonic()
    with pytest.raises(SystemExit) as caught:
        lm.run_main(lm.main)
    sys.stdout.flush()
    assert caught.value.code == 2 and sys.stdout.buffer.getvalue() == b""
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "nobody/no-such-model" in error
    assert time.monotonic() - began < 60


def test_a_main_runs_where_the_output_is_no_file(monkeypatch):
    """As in a notebook, whose sys.stdout has no `reconfigure`."""
    monkeypatch.setattr("signal.signal", lambda *args: None)
    with contextlib.redirect_stdout(io.StringIO()) as text:
        lm.run_main(lambda: print("done"))
    assert text.getvalue() == "done\n"


def test_a_hub_id_is_downloaded(tiny, monkeypatch):
    import huggingface_hub

    asked, there = [], "config.json model.safetensors x.jinja x.bin x.py deep/x.json".split()

    def download(name, revision=None, **patterns):
        kept = huggingface_hub.utils.filter_repo_objects(there, **patterns)
        assert list(kept) == there[:3]
        asked.append((name, revision))
        return str(tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert lm.checkpoint_folder("org/name-1.0") == tiny
    assert lm.load_tokenizer("org/name@v2").stop_ids == (257, 260)
    assert asked == [("org/name-1.0", None), ("org/name", "v2")]


# Files changed at random: reading them ends well or in an error for the user, never otherwise.
# A case is named by its number: the same seed and number make the same file again.

FUZZ_CASES = int(os.environ.get("FUZZ_CASES", 150))
FUZZ_SEED = int(os.environ.get("FUZZ_SEED", 0))
ODD = [True, False, 0, 1, 2, 7, -1.0, 0.5, 1e-6, 1e30, float("nan"), float("inf"), "", "x", "/"]
ODD += ["\ud800", "../x", "linear", "llama3", "yarn", "{{ messages[0].content * 3 }}", "{% for"]
BYTES = [b"\0", b"\xff", b'"', b"{", b"]", b"\n", b"9", b"\\ud800", b"-"]


def change_value(value, rng):
    """A JSON value with one place of it changed to another of its kind, lost or renamed."""
    if isinstance(value, dict) and value:
        key, way = rng.choice(sorted(value)), rng.random()
        if way < 0.25:  # lost, or renamed
            rest = {k: v for k, v in value.items() if k != key}
            return rest if way < 0.15 else rest | {rng.choice([key + "x", ""]): value[key]}
        return value | {key: change_value(value[key], rng)}
    if isinstance(value, list) and value:
        i = rng.randrange(len(value))
        return [*value[:i], change_value(value[i], rng), *value[i + rng.randint(0, 1) :]]
    if isinstance(value, str) and rng.random() < 0.5:
        return change_bytes(value.encode("utf-8", "replace"), rng).decode("utf-8", "replace")
    if type(value) in (int, float) and rng.random() < 0.4:
        return rng.choice([value + 1, abs(value - 1), value * 2])
    return rng.choice([odd for odd in ODD if type(odd) is type(value)] or [value])


def change_bytes(data, rng):
    """Bytes with some flipped, cut, put in or doubled, or the end lost."""
    for _ in range(rng.choice([1, 1, 2, 8])):
        i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        flipped = bytes([data[i] ^ 1 << rng.randrange(8)]) if i < len(data) else b""
        put = rng.choice([flipped, b"", rng.choice(BYTES), data[i:j][:50] * 2])
        data = data[:i] + put + data[rng.choice([i, i + 1, i + 4, j, len(data)]) :]
    return data


def change_file(file, rng):
    """A JSON file, or the JSON header of a safetensors file: its values, or any of its bytes."""
    data, tail = file.read_bytes(), None
    if file.suffix == ".safetensors":
        (length,) = struct.unpack("<Q", data[:8])
        data, tail = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.7:
        value = json.loads(data)
        for _ in range(rng.choice([1, 1, 2])):
            value = change_value(value, rng)
        data = json.dumps(value).encode()
    else:
        data = change_bytes(data, rng)
    if tail is not None:
        data = header(data, rng.choice([None] * 8 + [0, len(data) + 1, 2**40])) + tail
    file.write_bytes(data)


def read_chat(folder):
    lm.load_tokenizer(folder).apply_chat_template([{"role": "user", "content": "hi"}])


TARGETS = {"tokenizer_config.json": read_chat, "generation_config.json": read_chat}
TARGETS |= {"tokenizer.json": read_chat, "config.json": lm.load_model, INDEX: lm.load_model}


@pytest.mark.parametrize("name", [*TARGETS, "model-00001-of-00002.safetensors"])
def test_changed_files(name, tmp_path):
    config = LLAMA | {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}
    config |= {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "head_dim": None}
    folder = write_checkpoint(write_tokenizer(tmp_path), config, shards=2)
    read, good, refusals = TARGETS.get(name, lm.load_model), (folder / name).read_bytes(), set()
    read(folder)
    for number in range(FUZZ_CASES):
        (folder / name).write_bytes(good)
        change_file(folder / name, random.Random(f"{FUZZ_SEED}/{name}/{number}"))
        try:
            read(folder)
        except (lm.InputError, OSError) as error:
            refusals.add(str(error)[-40:])
        except BaseException:
            print(f"case {number} of {name}: {(folder / name).read_bytes()[:3000]!r}")
            raise
    assert len(refusals) > 3, "the changes should reach more than one check"
