"""Shared by all tests: the modules on sys.path, and tiny checkpoints made from nothing.

A checkpoint here is a folder in Hugging Face's layout with random weights drawn from a seed, so a
fixture stores a config and what transformers made of it, never the weights.
"""

import gc
import json
import random
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.utils._python_dispatch import TorchDispatchMode

TESTS = Path(__file__).resolve().parent
FIXTURES = TESTS / "fixtures"
# The modules, this folder, and the makers of fixtures, whose checkpoints the tests rebuild.
sys.path[:0] = map(str, (TESTS.parent, TESTS, FIXTURES, FIXTURES / "judge", FIXTURES / "trl"))
torch.set_num_threads(1)

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
LLAMA_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "reference: compares with transformers, TRL, a closed form or finite differences"
    )


@pytest.fixture(scope="module", autouse=True)
def little_to_collect():
    """What was imported before is not looked through by each collection of a run that begins now.

    train.py collects before each load. Beside torch and transformers that is most of a tiny run.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def relative(found, expected):
    """The largest difference beside the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_or_refuse(read, file, others):
    """Calls read() on 300 changes of a file: it ends well or in an InputError, of several kinds.

    A stretch of bytes is cut out, or one of `others` put in its place.
    """
    import model as lm

    whole, refusals = file.read_bytes(), set()
    for number in range(300):
        rng = random.Random(number)
        data, i = bytearray(whole), rng.randrange(len(whole))
        cuts = [i, min(i + rng.choice([0, 1, 4, 99]), len(whole))]
        data[slice(*cuts)] = rng.choice([b"", b"\xff", b'"', b"{", b"]", b"\n", b"-", *others])
        file.write_bytes(data)
        try:
            read()
        except lm.InputError as error:
            refusals.add(str(error)[-30:])
        except BaseException:
            print(f"case {number}: {bytes(data)!r}")
            raise
    assert len(refusals) > 3


def cache_bytes_per_token(config, dtype):
    heads = config.num_hidden_layers * config.num_key_value_heads
    return 2 * heads * config.head_dim * dtype.itemsize


def tensor_shapes(config):
    """Name and shape of every tensor that transformers expects of this config."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    qwen = config["model_type"] == "qwen2"
    tied = config.get("tie_word_embeddings", config["model_type"] == "smollm3")
    attention_bias, mlp_bias = config.get("attention_bias"), config.get("mlp_bias")
    linear = {  # name: (out, in, has a bias)
        "self_attn.q_proj": (heads * head_dim, hidden, qwen or attention_bias),
        "self_attn.k_proj": (kv_heads * head_dim, hidden, qwen or attention_bias),
        "self_attn.v_proj": (kv_heads * head_dim, hidden, qwen or attention_bias),
        "self_attn.o_proj": (hidden, heads * head_dim, attention_bias),
        "mlp.gate_proj": (wide, hidden, mlp_bias),
        "mlp.up_proj": (wide, hidden, mlp_bias),
        "mlp.down_proj": (hidden, wide, mlp_bias),
    }
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, (rows, columns, bias) in linear.items():
            shapes[f"{layer}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{layer}.{name}.bias"] = (rows,)
        if config["model_type"] == "qwen3":
            shapes[f"{layer}.self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (head_dim,)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if config["architectures"][0].endswith("ForSequenceClassification"):
        shapes["score.weight"] = (1, hidden)
    elif not tied:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def random_tensors(shapes, seed=0, dtype=torch.float32):
    """Large enough weights that attention, positions and biases all show in the logits."""
    tensors = {}
    for i, (name, shape) in enumerate(shapes.items()):
        draws = np.random.default_rng([seed, i]).standard_normal(shape, dtype=np.float32)
        if name.endswith("norm.weight"):
            draws = 1 + 0.2 * draws
        elif "embed" not in name:
            draws = draws * (1.5 / np.sqrt(shape[-1]) if len(shape) == 2 else 0.5)
        tensors[name] = torch.from_numpy(draws).to(dtype)
    return tensors


def write_checkpoint(folder, config=None, seed=0, dtype=torch.float32, shards=1):
    """config.json and weights, in one file or in `shards` files with an index. Returns folder."""
    config = LLAMA if config is None else config
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(tensor_shapes(config), seed, dtype)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def byte_tokenizer(special=LLAMA_SPECIAL, bos="<|begin_of_text|>", merges=()):
    """A byte-level BPE: ids 0-255 are bytes, then the merges, then the special tokens.

    special: their texts, or AddedToken where one also takes the blanks beside it.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [t if isinstance(t, AddedToken) else AddedToken(t, special=True) for t in special]
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def write_tokenizer(
    folder,
    tokenizer=None,
    template=LLAMA_TEMPLATE,
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
    stops=("<|end_of_text|>", "<|eot_id|>"),
):
    """tokenizer.json, tokenizer_config.json and generation_config.json. Returns folder."""
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": bos, "eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    stop_ids = [tokenizer.token_to_id(token) for token in stops]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_ids}))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A whole tiny checkpoint: a two-layer Llama of 264 tokens with Llama 3's template."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tokenizer(folder)
    return write_checkpoint(folder)


def use_dense_masks(monkeypatch, device="cpu"):
    """In place of torch's mask object, which works with torch's own attention and modes alone."""
    import model as lm

    def mask(rows, columns):
        seen = torch.ones(rows, columns, dtype=torch.bool, device=device)
        return seen.tril(columns - rows)

    monkeypatch.setattr(lm, "causal_lower_right", mask)


@pytest.fixture(params=["as torch", "(B, M, H, D) in memory"])
def memory_order(request, monkeypatch):
    """Attention's kernels are free in the order in which their result lies in memory."""
    attention = F.scaled_dot_product_attention

    def other(*args, **options):
        return attention(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)

    if request.param != "as torch":
        use_dense_masks(monkeypatch)
        monkeypatch.setattr(F, "scaled_dot_product_attention", other)


def buffer_bytes(tensors):
    """Bytes of the buffers behind some tensors: exact, and as torch rounds page-locked memory up.

    It takes the next power of two for each buffer.
    """
    buffers = {s._cdata: s.nbytes() for s in (x.untyped_storage() for x in tensors)}
    return sum(buffers.values()), sum(1 << (n - 1).bit_length() for n in buffers.values())


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.known = 0, 0, set()

    def count(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.known.remove(key)
        self.alive -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.count(x)
        return result


@pytest.fixture
def tensor_bytes(monkeypatch):
    """tensor_bytes(model): a TensorBytes that holds the model's weights already."""

    def begin(llm):
        tensors = TensorBytes()
        for p in llm.parameters():
            tensors.count(p)
        return tensors

    use_dense_masks(monkeypatch)
    return begin
