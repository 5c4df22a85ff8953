"""make.py on tiny GGUF files made here: random weights, every type of tensor that real files have.

Skipped without the package gguf.
"""

import importlib.util
import json
from pathlib import Path

import model

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

gguf = pytest.importorskip("gguf")
spec = importlib.util.spec_from_file_location("make_real", Path(__file__).with_name("make.py"))
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

HIDDEN, WIDE, HEADS, KV, HEAD_DIM = 256, 512, 4, 2, 64
TYPES = {
    "token_embd": "Q5_0",
    "output": "F16",
    "attn_q": "Q8_0",
    "attn_k": "F32",
    "attn_v": "Q8_0",
    "attn_output": "Q5_0",
    "ffn_gate": "Q4_K",
    "ffn_up": "Q4_K",
    "ffn_down": "Q6_K",
}
# Text tokens; added ones: type 3 is special, 4 is text; 5 only fills the matrix.
BYTES = sorted(ByteLevel.alphabet())
MERGES = ["1 2", "12 3", "h e", "l l", "he ll"]
ADDED = [("<|endoftext|>", 3), ("<|im_end|>", 3), ("<call>", 4), ("[PAD]", 5)]


def packed(random, name, shape):
    """Values of a type, packed. gguf can read K types, but not make them: their bytes are drawn."""
    kind = gguf.GGMLQuantizationType[name]
    if not name.endswith("_K"):
        return gguf.quantize(random.standard_normal(shape, dtype=np.float32) / 16, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = random.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    places = {"Q4_K": (0, 2), "Q6_K": (size - 2,)}[name]  # of the block's float16 scales
    for place in places:
        rows[..., place : place + 2] = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
    return rows.reshape(*shape[:-1], -1)


def llama_order(rows, heads):
    """As llama.cpp's converter stores a llama's queries and keys: value i beside i + half."""
    half = len(rows) // heads // 2
    order = [h * 2 * half + i + s * half for h in range(heads) for i in range(half) for s in (0, 1)]
    return rows[order]


def write_gguf(path, family, pre, tied):
    """A file of two blocks; returns its weights by Hugging Face's names."""
    random, expected = np.random.default_rng(0), {}
    writer = gguf.GGUFWriter(path, family)
    tokens = BYTES + [m.replace(" ", "") for m in MERGES] + [token for token, _ in ADDED]
    numbers = {
        "context_length": 128,
        "embedding_length": HIDDEN,
        "block_count": 2,
        "feed_forward_length": WIDE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV,
    }
    for key, value in numbers.items():
        writer.add_uint32(f"{family}.{key}", value)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32(f"{family}.rope.freq_base", 1e6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - len(ADDED)) + [kind for _, kind in ADDED])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(pre == "llama-bpe")
    writer.add_chat_template("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")

    def add(name, *shape, heads=None, bias=False):
        kind = TYPES.get(name.split(".")[-1], "F32") if len(shape) > 1 else "F32"
        data, name = packed(random, kind, shape), f"{name}.{'bias' if bias else 'weight'}"
        kind = gguf.GGMLQuantizationType[kind]
        expected[make.their_name(name)] = torch.from_numpy(gguf.dequantize(data, kind).copy())
        stored = llama_order(data, heads) if heads and family == "llama" else data
        writer.add_tensor(name, np.ascontiguousarray(stored), raw_dtype=kind)

    add("token_embd", len(tokens), HIDDEN)
    if not tied:
        add("output", len(tokens), HIDDEN)
    add("output_norm", HIDDEN)
    for i in (0, 1):
        for part, rows, heads in (("q", HEADS, HEADS), ("k", KV, KV), ("v", KV, None)):
            add(f"blk.{i}.attn_{part}", rows * HEAD_DIM, HIDDEN, heads=heads)
            if family == "qwen2":
                add(f"blk.{i}.attn_{part}", rows * HEAD_DIM, bias=True)
        add(f"blk.{i}.attn_output", HIDDEN, HIDDEN)
        add(f"blk.{i}.attn_norm", HIDDEN)
        add(f"blk.{i}.ffn_norm", HIDDEN)
        add(f"blk.{i}.ffn_gate", WIDE, HIDDEN)
        add(f"blk.{i}.ffn_up", WIDE, HIDDEN)
        add(f"blk.{i}.ffn_down", HIDDEN, WIDE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


CASES = [("llama", "smollm", True), ("llama", "llama-bpe", False), ("qwen2", "qwen2", False)]


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case[:2]) for case in CASES])
def made(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("gguf")
    expected = write_gguf(place / "file.gguf", *request.param)
    make.make_policy(place / "folder", place / "file.gguf", torch.float32)
    return *request.param, place / "folder", expected


def test_the_folder_has_the_file_s_weights_to_the_bit(made):
    _, _, tied, folder, expected = made
    loaded = model.load_model(folder)
    state = loaded.state_dict()
    assert state.keys() == expected.keys() and loaded.config.tie_word_embeddings == tied
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert loaded(torch.arange(9)[None]).isfinite().all()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    told = [config[key] for key in ("rms_norm_eps", "rope_theta", "max_position_embeddings")]
    assert told == [1e-6, 1e6, 128]


def test_words_are_cut_as_the_file_says(made):
    _, pre, _, folder, _ = made
    tokenizer = model.load_tokenizer(folder)
    start = ["<|endoftext|>"] * (pre == "llama-bpe")

    def tokens(text):
        return [tokenizer.tokenizer.id_to_token(i) for i in tokenizer.encode(text)]

    # Digits: one by one, or up to three together.
    three = {"smollm": ["1", "2", "3"], "qwen2": ["1", "2", "3"], "llama-bpe": ["123"]}[pre]
    assert tokens("123hello") == [*start, *three, "hell", "o"]
    # Qwen2 puts a letter and its accent together first; only the others see two characters.
    assert tokens("e\u0301") == tokens("é" if pre == "qwen2" else "e\u0301")
    assert (tokens("e\u0301") == tokens("é")) == (pre == "qwen2")
    assert tokens("<call><|im_end|>") == [*start, "<call>", "<|im_end|>"]
    assert len(tokens("[PAD]")) == len(start) + 5  # as text: it stands for nothing
    ids = tokenizer.encode("<call>a<|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<call>a"


def test_a_reply_ends_where_the_file_says(made):
    _, pre, _, folder, _ = made
    tokenizer = model.load_tokenizer(folder)
    ends = {"<|im_end|>"} | ({"<|endoftext|>"} if pre == "qwen2" else set())
    assert {tokenizer.tokenizer.id_to_token(i) for i in tokenizer.stop_ids} == ends


def test_other_files_are_refused_by_name(tmp_path):
    write_gguf(tmp_path / "file.gguf", "gemma", "smollm", True)
    with pytest.raises(SystemExit, match="a gemma, expected a llama or a qwen2"):
        make.read_gguf(tmp_path / "file.gguf")
    write_gguf(tmp_path / "other.gguf", "llama", "deepseek", True)
    with pytest.raises(SystemExit, match="gpt2 with deepseek, expected"):
        make.make_policy(tmp_path / "folder", tmp_path / "other.gguf", torch.float32)
