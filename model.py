"""One checkpoint: a Llama-style transformer, its KV cache, its tokenizer and chat template.

In: a folder in Hugging Face's layout (config.json, safetensors, tokenizer.json, ...), or a hub id.
Out: `load_model(path)`, whose `model(tokens)` gives next-token logits, `load_tokenizer(path)`, and
`save_model(model, path, source)`, which writes a folder that transformers and vLLM read back.

Families: llama, mistral, qwen2, qwen3, smollm3, all without a sliding window. They are one block;
`read_config` says what each changes. What the other files share (errors, JSON lines, options)
comes last.

    python model.py --model DIR                    # what is in a checkpoint, and what it takes
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

# Idle OpenMP threads spin for the next small operation. Beside another busy process that costs ten
# times the work itself, unless they soon sleep. Read once, when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Every batch of DPO has other sizes: on a GPU 4 GiB less lie idle between what is in use.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer as TokenizersTokenizer
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


class RMSNorm(nn.RMSNorm):
    def forward(self, x):  # rounded before the weight too, as transformers does
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


def rope_frequencies(config):
    """Angle per position of each pair of dimensions: (head_dim / 2,) float32."""
    rope = config.rope
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float()
    frequencies = 1.0 / rope["rope_theta"] ** (steps / config.head_dim)
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        # Slow waves are stretched by the factor, fast ones kept, those between are blended.
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - blend) * frequencies / rope["factor"] + blend * frequencies
    return frequencies


def rotate(x, cos, sin):
    """Turns each pair of x (B, H, T, head_dim), one of each half, by its angle, in float32."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


def causal_attention(layer, q, k, v):
    """The plain `attend`: each of B rows is a sequence, of which q may be only the end.

    q (B, H, T, head_dim), k and v (B, KV, P + T, head_dim) -> (B, H, T, head_dim). Query t sees
    P + t + 1 keys. The CPU's kernel computes what a mask hides too; there 128 queries at a time
    read only the keys that they see: judging is 1.1 times as fast.
    """
    T, P = q.shape[2], k.shape[2] - q.shape[2]
    if T > 128 and not q.is_cuda:
        out = []
        for i, block in enumerate(q.split(128, dim=2), 1):
            seen = P + 128 * i  # a slice may go beyond the end
            out.append(causal_attention(layer, block, k[:, :, :seen], v[:, :, :seen]))
        return torch.cat(out, dim=2)
    return F.scaled_dot_product_attention(q, k, v, causal_lower_right(T, P + T), enable_gqa=True)


class Attention(nn.Module):
    """Grouped-query attention. The caller decides who sees whom: `attend(layer, q, k, v)`."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.rotated = config.rotated[layer]
        q_size = config.num_attention_heads * self.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.output_bias)
        self.q_norm = self.k_norm = nn.Identity()
        if config.head_norms:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, attend):
        heads = (-1, self.head_dim)
        q = self.q_norm(self.q_proj(x).unflatten(2, heads)).transpose(1, 2)  # (B, H, T, head_dim)
        k = self.k_norm(self.k_proj(x).unflatten(2, heads)).transpose(1, 2)  # (B, KV, T, head_dim)
        v = self.v_proj(x).unflatten(2, heads).transpose(1, 2)  # (B, KV, T, head_dim)
        if self.rotated:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = attend(self.layer, q, k, v)  # as q
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, hidden)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        hidden, wide, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, wide, bias=bias)
        self.up_proj = nn.Linear(hidden, wide, bias=bias)
        self.down_proj = nn.Linear(wide, hidden, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend, keep=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        if keep is not None:
            x = x[:, keep]  # (B, len(keep), hidden)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, blocks, final norm: tokens to hidden states. Policy and judge share it."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

    def forward(self, tokens, positions=None, attend=causal_attention, recompute=0, keep=None):
        """(B, T) int64 -> (B, T, hidden).

        positions: (B, T) int64, default 0..T-1. attend: causal_attention, pack's or the KV
        cache's. recompute: gradient checkpointing, the number of blocks (from the first) that keep
        only their input and are computed again in the backward pass. keep: the positions
        in T that are needed after the last attention, by default all; the rest is left out.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        angles = positions[:, None, :, None] * self.frequencies  # (B, 1, T, head_dim / 2)
        cos = torch.cat([angles.cos(), angles.cos()], dim=-1)  # (B, 1, T, head_dim) float32
        sin = torch.cat([-angles.sin(), angles.sin()], dim=-1)  # signed as rotate needs it
        x = self.embed_tokens(tokens)
        for i, block in enumerate(self.layers):
            args = (x, cos, sin, attend, keep if block is self.layers[-1] else None)
            x = checkpoint(block, *args, use_reentrant=False) if i < recompute else block(*args)
        return self.norm(x)


class LanguageModel(nn.Module):
    """A trunk and an output head; parameter names are Hugging Face's."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.model.embed_tokens.weight.dtype

    @property
    def head(self):
        """The output head's weight: (V, hidden)."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def forward(self, tokens):
        """(B, T) int64 -> logits (B, T, V). Rows may be padded on the right: causal attention."""
        hidden = self.model(tokens)
        return logits_of(hidden.flatten(0, 1), self.head).unflatten(0, tokens.shape)


def logits_of(hidden, head):
    """Hidden states (N, hidden) and a head (V, hidden) -> logits (N, V), float32 at least.

    A GPU hands out the sums of 16-bit products in float32, unrounded: rounding costs 0.02 nats a
    token. The CPU has no such product; there 16-bit logits are rounded, as transformers' are.
    """
    if hidden.is_cuda and hidden.itemsize == 2:
        return WideProduct.apply(hidden, head)
    logits = F.linear(hidden, head)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class WideProduct(torch.autograd.Function):
    """hidden @ head.T of 16-bit operands in float32: torch.mm with out_dtype has no gradient."""

    @staticmethod
    def forward(ctx, hidden, head):
        ctx.save_for_backward(hidden, head)
        return torch.mm(hidden, head.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        hidden, head = ctx.saved_tensors
        grad = grad.to(hidden.dtype)
        return grad @ head, torch.mm(grad.T, hidden, out_dtype=torch.float32)


class KVCache:
    """Keys and values of a fixed number of slots, each a sequence at its own position.

    Allocated once: k and v are (layers, slots, KV, length, head_dim).
    """

    def __init__(self, config, slots, length, device, dtype):
        heads, size = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, slots, heads, length, size)
        # Zeros, not empty: a masked position has weight 0, and 0 * NaN would still be NaN.
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    def write(self, slot, k, v):
        """Starts a slot with a prompt's keys and values, (layers, KV, T, head_dim) each."""
        self.k[:, slot, :, : k.shape[2]] = k
        self.v[:, slot, :, : v.shape[2]] = v

    def move(self, source, target, length):
        """Copies the first `length` positions of one slot to another."""
        self.write(target, self.k[:, source, :, :length], self.v[:, source, :, :length])

    def step(self, positions, length):
        """The `attend` of one new token in each of the first B slots.

        positions (B,): where each token goes. length: how many keys to read, more than any row
        sees; a mask hides the rest. A GPU's kernel for 16 bits reads only what each row sees.
        """
        B, KV, size = len(positions), self.k.shape[2], self.k.shape[4]
        rows = torch.arange(B, device=positions.device)
        flash = self.k.is_cuda and self.k.itemsize == 2
        if flash:  # it takes sequences of one head, end to end: a slot is KV of them
            starts = torch.arange(B * KV + 1, device=positions.device, dtype=torch.int32)
            seen = (positions + 1).int().repeat_interleave(KV)
            # Where queries and keys begin, the most of each; no dropout, no mask, no debugging.
            how = (starts, starts * length, 1, length, 0.0, False, False)
        else:
            unseen = torch.arange(length, device=positions.device) > positions[:, None, None, None]
            # (B, 1, 1, length), added to the scores: attention would make it of booleans each time.
            mask = torch.zeros_like(unseen, dtype=self.k.dtype).masked_fill(unseen, -math.inf)

        def attend(layer, q, k, v):
            self.k[layer, rows, :, positions] = k[:, :, 0]
            self.v[layer, rows, :, positions] = v[:, :, 0]
            # The query heads of a group stand where a sequence would: no key is repeated.
            grouped = q.reshape(B, KV, -1, size)  # (B, KV, H / KV, head_dim)
            held = (x[layer, :B, :, :length] for x in (self.k, self.v))
            if flash:
                held = (x.reshape(-1, 1, size) for x in held)  # (B * KV * length, 1, head_dim)
                attention = torch.ops.aten._flash_attention_forward
                out = attention(grouped.flatten(0, 1), *held, *how, seqused_k=seen)[0]
            else:
                out = F.scaled_dot_product_attention(grouped, *held, mask)
            return out.reshape(q.shape)  # (B, H, 1, head_dim)

        return attend


def pack(pieces, device="cpu"):
    """Lays pieces end to end in one row.

    pieces: (ids, prefix) each; prefix is the index of an earlier piece that it continues, or None.
    No piece may be empty. Returns tokens and positions, (1, N) int64 each, and the `attend` for
    the trunk: a piece sees its prefix whole, itself causally, and nothing else.

    >>> tokens, positions, _ = pack([([5, 6], None), ([7], 0), ([8, 9], 0), ([4], None)])
    >>> tokens.tolist(), positions.tolist()
    ([[5, 6, 7, 8, 9, 4]], [[0, 1, 2, 2, 3, 0]])
    """
    tokens, positions = [], []
    lengths = [len(ids) for ids, _ in pieces]
    for ids, prefix in pieces:
        P = 0 if prefix is None else lengths[prefix]
        tokens += ids
        positions += range(P, P + len(ids))
    row = torch.tensor([tokens, positions], device=device)  # (2, N)

    def attend(layer, q, k, v):
        # Split, not sliced: the gradient of a slice is as long as the row, once for every piece.
        q, k, v = (x.split(lengths, dim=2) for x in (q, k, v))  # (1, H or KV, T, head_dim) each
        out = []
        for i, (_, prefix) in enumerate(pieces):
            keys, values = k[i], v[i]
            if prefix is not None:
                keys = torch.cat([k[prefix], keys], dim=2)  # (1, KV, P + T, head_dim)
                values = torch.cat([v[prefix], values], dim=2)
            out.append(causal_attention(layer, q[i], keys, values))
        return torch.cat(out, dim=2)  # (1, H, N, head_dim)

    return row[:1], row[1:], attend


def batch_by_size(items, sizes, max_size):
    """Groups consecutive items whose sizes sum to max_size or less; an oversized one is alone.

    >>> batch_by_size("abcd", [3, 4, 9, 1], 8)
    [['a', 'b'], ['c'], ['d']]
    """
    groups = []
    room = 0
    for item, size in zip(items, sizes, strict=True):
        if size > room:
            groups.append([])
            room = max_size
        groups[-1].append(item)
        room -= size
    return groups


SIZES = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    max_position_embeddings""".split()
LLAMA3 = "factor low_freq_factor high_freq_factor original_max_position_embeddings"
ROPE_NUMBERS = {"default": (), "linear": ("factor",), "llama3": LLAMA3.split()}


# The families, and what a key means in each where config.json leaves it out. Elsewhere it means
# what llama means by it.
FAMILIES = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
    "smollm3": {"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
}
FLAGS = "tie_word_embeddings attention_bias mlp_bias use_sliding_window".split()


def read_config(folder):
    """The numbers of a config.json; refuses by name what is of no family here.

    Names are the file's; `rope` is transformers 5's `rope_parameters`, two keys in older files.
    What a family changes: llama has a bias where `attention_bias` and `mlp_bias` ask for one,
    mistral nowhere, qwen2 on q, k and v; qwen3 norms each head of q and k, and `attention_bias`
    counts; smollm3 is llama with layers that do not rotate.
    """
    file = Path(folder) / "config.json"
    raw = read_json(file)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise InputError(f"{file}: model_type is {family!r}; only {known} can be read")
    raw = FAMILIES[family] | raw

    def check(good, key, expected):
        if not good:
            raise InputError(f"{file}: {key} is {raw.get(key)!r}, but must be {expected}")

    for key in SIZES:
        check(is_count(raw.get(key)), key, "a whole number above 0")
    for key in ("num_key_value_heads", "head_dim"):
        check(raw.get(key) is None or is_count(raw[key]), key, "a whole number above 0")
    for key in FLAGS:
        check(raw.get(key) in (None, True, False), key, "true or false")
    epsilon = raw.get("rms_norm_eps", 1e-6)
    check(is_number(epsilon), "rms_norm_eps", "a number above 0")
    # Two names of one function.
    check(
        raw.get("hidden_act", "silu") in ("silu", "swish"), "hidden_act", "silu, also called swish"
    )

    # In a sliding window a token sees only those near it. The later families use one where a flag
    # asks for it, or in the layers that `layer_types` names.
    kinds, window = raw.get("layer_types"), raw.get("sliding_window")
    slides = window not in (None, raw["max_position_embeddings"])
    if family in ("qwen2", "qwen3", "smollm3"):
        slides = slides and bool(raw.get("use_sliding_window"))
        if kinds is not None:
            whole = kinds == ["full_attention"] * raw["num_hidden_layers"]
            check(whole, "layer_types", "full_attention in every layer")
            slides = False
    if family != "llama":
        check(not slides, "sliding_window", "null: full attention")

    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    if str(kind) not in ROPE_NUMBERS or dict in map(type, rope.values()):
        raise InputError(
            f"{file}: rope_type: {rope!r} is not default, linear or llama3, one for all"
        )
    rope = {"rope_theta": raw.get("rope_theta") or 10000.0, **rope, "rope_type": kind}
    for key in ("rope_theta", *ROPE_NUMBERS[kind]):
        if not is_number(rope.get(key)):
            raise InputError(
                f"{file}: rope {key} is {rope.get(key)!r}, but must be a number above 0"
            )
    turned = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if turned not in (None, 1):
        raise InputError(f"{file}: partial_rotary_factor is {turned!r}, but whole heads must turn")

    layers, heads = raw["num_hidden_layers"], raw["num_attention_heads"]
    rotated = [1] * layers
    if family == "smollm3":
        every = raw.get("no_rope_layer_interval", 4)
        check(is_count(every), "no_rope_layer_interval", "a whole number above 0")
        rotated = [int((layer + 1) % every != 0) for layer in range(layers)]
        if raw.get("no_rope_layers") is not None:  # named one by one: 1 is rotated, 0 is not
            rotated = raw["no_rope_layers"]
            good = isinstance(rotated, list) and set(map(str, rotated)) <= {"0", "1"}
            check(good and len(rotated) >= layers, "no_rope_layers", "a 0 or 1 for each layer")
    bias = family in ("llama", "qwen3", "smollm3") and bool(raw.get("attention_bias"))
    return SimpleNamespace(
        **{key: raw[key] for key in SIZES},
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rms_norm_eps=float(epsilon),
        rope=rope,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
        qkv_bias=bias or family == "qwen2",
        output_bias=bias,
        mlp_bias=family in ("llama", "smollm3") and bool(raw.get("mlp_bias")),
        head_norms=family == "qwen3",
        rotated=rotated,
    )


def is_count(value):
    """A whole number above 0; JSON's true is none."""
    return type(value) is int and value > 0


def is_number(value):
    """A finite number above 0."""
    return type(value) in (int, float) and 0 < value < math.inf


def stored_tensors(folder, device="cpu"):
    """Yields (file, name, tensor) of a checkpoint: of its one file, or the shards of its index."""
    shards = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / shards[0]).exists():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
    for shard in shards:
        file = folder / shard
        if not re.fullmatch(r"[\w-][\w.-]*", shard):  # a path could lead out of the folder
            raise InputError(f"{index}: weight_map names {shard!r}, which is no file's name")
        try:
            with safe_open(file, framework="pt", device=str(device)) as stored:
                for name in stored.keys():  # noqa: SIM118, it is no dict
                    yield file, name, stored.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a whole safetensors file: {error}") from None


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GIB = 2**30


def load_weights(module, folder, device, dtype):
    """Fills a module built on the meta device. Reward heads, which read few tokens, are float32."""
    tensors = {}
    for file, name, stored in stored_tensors(folder, device):
        if name.endswith("inv_freq"):  # some old checkpoints store the frequencies
            continue
        kind = dtype if name.startswith(("model.", "lm_head.")) else torch.float32
        if stored.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(
                f"{file}: {name} is {stored.dtype}; float32 and 16-bit floats are read"
            )
        tensors[name] = stored.to(kind, copy=True)
        if not tensors[name].isfinite().all():
            raise InputError(f"{file}: {name} has infinite values or NaN in {kind}")
    if "lm_head.weight" not in module.state_dict():
        settle_head(module, tensors)
    check_shapes(module, tensors, folder)
    module.load_state_dict(tensors, assign=True)
    module.model.frequencies = rope_frequencies(module.config).to(device)
    return module.eval()


def settle_head(module, tensors):
    """Makes one tensor of a tied checkpoint's embedding and head, of which it may store both.

    Where they differ, the flag is wrong (a merged adapter leaves it so) and both are used.
    """
    head = tensors.pop("lm_head.weight", None)
    if head is None or not isinstance(module, LanguageModel):  # a reward model has no use for it
        return
    embedding = tensors.setdefault("model.embed_tokens.weight", head)
    if not torch.equal(embedding, head):
        module.config.tie_word_embeddings = False
        module.lm_head = nn.Linear(*head.shape[::-1], bias=False, device="meta")
        tensors["lm_head.weight"] = head


def check_shapes(module, tensors, folder):
    """Refuses tensors that are not the module's; names the first one, and how many more."""
    expected = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    labels = found.get("score.weight", [1])[0]
    if "score.weight" in expected and labels != 1:
        raise InputError(
            f"{folder}: this reward model has {labels} labels; take one with a single label"
        )
    wrong = [n for n in {**expected, **found} if found.get(n) != expected.get(n)]
    if not wrong:
        return
    name, *others = wrong
    shape = f"has the shape {found.get(name)} there, {expected.get(name)} by config.json"
    if name not in found:
        shape = "is not there"
    elif name not in expected:
        shape = "has no place in the model that config.json describes"
    more = f" (and {len(others)} more tensors do not fit)" if others else ""
    raise InputError(f"{folder}: the weights do not fit: {name} {shape}{more}")


def load_model(path, device="cpu", dtype=torch.float32):
    """A causal language model from a checkpoint folder or hub id, in evaluation mode."""
    device, folder = check_device(device), checkpoint_folder(path)
    with torch.device("meta"):
        model = LanguageModel(read_config(folder))
    return load_weights(model, folder, device, dtype)


def save_model(model, path, source):
    """Writes a checkpoint folder: weights, and the config and tokenizer files of `source`."""
    source = checkpoint_folder(source)
    with write_whole(path, folder=True) as aside:
        tensors = model.state_dict()
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
        for file in source.iterdir():  # the tokenizer's files, generation_config.json
            if file.suffix in (".json", ".jinja", ".txt") and not file.name.startswith("model."):
                shutil.copyfile(file, aside / file.name)
        config = read_json(source / "config.json")
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
        if not model.config.tie_word_embeddings:  # the source's flag may be wrong
            config["tie_word_embeddings"] = False
        write_json(aside / "config.json", config)


class Tokenizer:
    """tokenizer.json with the checkpoint's own chat template and stop tokens.

    special: bos_token, eos_token, ... as text, for the template. template: compiled, or None.
    """

    def __init__(self, folder):
        self.folder, file = folder, folder / "tokenizer.json"
        try:
            self.tokenizer = TokenizersTokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{file}: not a tokenizer: {error}") from None
        # Saved after a training that cut or padded its texts, a tokenizer.json says so. No one asks
        # for either here.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        own, named, generation, config = (
            read_json(folder / f"{name}.json") if (folder / f"{name}.json").exists() else {}
            for name in ("tokenizer_config", "special_tokens_map", "generation_config", "config")
        )
        self.template = read_template(folder, own)
        self.special = special_tokens(folder, own, named)
        # Where one file does not say what ends an output, the other does.
        source, stops = "generation_config.json", generation.get("eos_token_id")
        if stops is None:
            source, stops = "config.json", config.get("eos_token_id")
        stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
        if any(type(stop) is not int for stop in stops):
            raise InputError(f"{folder}/{source}: eos_token_id is {stops!r}, but must be token ids")
        vocab, eos = self.tokenizer.get_vocab(), self.special.get("eos_token")
        if eos is not None:
            if eos not in vocab:
                raise InputError(
                    f"{folder}: eos_token is {eos!r}, which tokenizer.json does not have"
                )
            stops = [*stops, vocab[eos]]
        top, rows = max([*stops, *vocab.values()]), config.get("vocab_size", math.inf)
        if not is_count(rows) and rows != math.inf:
            raise InputError(f"{folder}/config.json: vocab_size is {rows!r}, but must be a number")
        if top >= rows:
            raise InputError(f"{file}: token id {top} is beyond config.json's vocab_size, {rows}")
        self.stop_ids = tuple(sorted(set(stops)))

    def encode(self, text, add_special_tokens=True):
        """Token ids of a text, list of int; BOS and the like as Hugging Face adds them."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            raise InputError(
                f"{text[:99]!r} holds half a surrogate pair, which is no text"
            ) from None

    def decode(self, ids, skip_special_tokens=False):
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages, add_generation_prompt=True):
        """The chat as text. messages: a list of {"role": ..., "content": ...}."""
        where = f"{self.folder}: chat_template"
        if self.template is None:
            raise InputError(f"{where} is missing, in tokenizer_config.json and beside it")
        values = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        # Thoughts are asked for in text here, so a template that can think of itself does not.
        values |= {"tools": None, "documents": None, "enable_thinking": False}
        try:
            return self.template.render(**self.special | values)
        except Exception as error:  # whatever a stranger's template does wrong, in its own words
            raise InputError(f"{where}: {type(error).__name__}: {error}") from None

    def apply_chat_template(self, messages, add_generation_prompt=True):
        """The chat as token ids; the template writes BOS itself, so none is added."""
        return self.encode(self.render_chat(messages, add_generation_prompt), False)


def load_tokenizer(path):
    """The tokenizer of a checkpoint folder or hub id."""
    return Tokenizer(checkpoint_folder(path))


def special_tokens(folder, own, named):
    """Name and text of each special token, of tokenizer_config.json and special_tokens_map.json.

    As in transformers: the second file counts, and then wins, where the first has no
    added_tokens_decoder, which later versions wrote. Models may name tokens of their own.
    """
    values = own if "added_tokens_decoder" in own else own | named
    values = {key: value for key, value in values.items() if key.endswith("_token")}
    more = own.get("extra_special_tokens")
    if isinstance(more, dict):  # named ones; a list has no names to be used by
        values |= more
    special = {}
    for key, value in values.items():
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str):
            special[key] = token
        elif token is not None and type(token) is not bool:  # add_bos_token is no token
            raise InputError(f"{folder}: {key} is {value!r}, but must be a token's text")
    return special


def read_template(folder, config):
    """The compiled chat template: chat_template.jinja, or tokenizer_config's; None without one.

    It comes from strangers, so it runs in jinja2's sandbox, with the names that transformers gives.
    """
    import jinja2.ext  # installed with torch
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    # jinja2's own escapes HTML, which no model was trained on. The order is that of transformers.
    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        how = {"separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **how)

    class Generation(jinja2.ext.Extension):
        """{% generation %}: marks what the assistant wrote, for trainers. It changes no text."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            inside = jinja2.nodes.CallBlock(self.call_method("render"), [], [], body)
            return inside.set_lineno(line)

        def render(self, caller):
            return caller()

    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    sandbox = ImmutableSandboxedEnvironment(
        **blocks, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = tojson
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    file, source = folder / "chat_template.jinja", config.get("chat_template")
    try:
        if file.is_file():
            source = file.read_text(encoding="utf-8")
        if isinstance(source, list):  # several named templates
            source = {template["name"]: template["template"] for template in source}.get("default")
        return None if source is None else sandbox.from_string(source)
    except Exception as error:  # as in render_chat
        raise InputError(f"{folder}: chat_template: does not parse: {error}") from None


class InputError(Exception):
    """An error that the user can fix, in one line: where it is, what is wrong, what to do."""


def run_main(main, resumes=False):
    """Runs a module's main(): an error that the user can fix ends in one line and exit status 2.

    resumes: whether the same command goes on where a stop left it; Ctrl-C then shows it.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    # What a terminal cannot show, or a pipe did not encode, is replaced: an answer is not lost.
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.stdout.reconfigure(line_buffering=True)  # into a pipe too
    try:
        main()
    except (InputError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        command = shlex.join([Path(sys.executable).name, *sys.argv])
        print("\nstopped" + f"; to resume: {command}" * resumes, file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def write_whole(path, folder=False, aside=None):
    """Yields a path beside `path` to write to, or `aside`; renamed to it when the block ends well.

    So a file or a folder under its final name is whole, and a kill leaves the old one or the new.
    """
    path = Path(path)
    aside = aside or path.with_name(path.name + ".partial")
    try:
        if folder:
            shutil.rmtree(aside, ignore_errors=True)  # what a kill left
            aside.mkdir(parents=True)
        yield aside
        for file in aside.iterdir() if folder else [aside]:
            with open(file, "rb+") as written:  # Windows syncs only what is open for writing
                os.fsync(written.fileno())
        os.replace(aside, path)
    except (SafetensorError, OSError) as error:  # errors of a full disk do not name the file
        raise InputError(f"{path}: cannot be written: {error}") from None


def write_json(path, value):
    with write_whole(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path, rows):
    with write_whole(path) as aside, open(aside, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_rows(path, items, key, make_rows):
    """Writes a file of JSON lines, one row an item, in order; a kill loses only the row in hand.

    make_rows(items) yields the rows of the items that are left. Until all are there, the rows
    stand beside `path` in a file named after `key`, which is what they depend on: the same call
    resumes, and a call with other options starts its own file.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"{path} exists already: remove it, or name another file")
    partial = path.with_name(f"{path.name}.{hash_of(key)[:8]}.partial")
    with write_whole(path, aside=partial), open(partial, "ab+") as file:
        file.seek(0)
        whole_lines = [line for line in file if line.endswith(b"\n")]
        file.truncate(sum(map(len, whole_lines)))  # half a line, where a kill came in its midst
        for row in make_rows(items[len(whole_lines) :]):
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()


def read_json(path, kind=dict):
    """The value in a file of UTF-8 JSON: an object, or a list."""
    return parse_json(path, Path(path).read_bytes(), kind)


def read_jsonl(path):
    """Yields (line number, row as a dict) of a file of JSON lines; passes over blank lines."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip(b" \t\r\n\xef\xbb\xbf"):
                yield number, parse_json(f"{path}:{number}", line, dict)


def read_json_rows(path):
    """Yields (place, row as a dict) of JSON lines or of one JSON list, whatever the file's name."""
    with open(path, "rb") as file:
        is_list = file.read(4096).lstrip(b" \t\r\n\xef\xbb\xbf").startswith(b"[")
    if not is_list:
        for number, row in read_jsonl(path):
            yield f"{path}:{number}", row
        return
    for number, row in enumerate(read_json(path, list), 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: entry {number} is {row!r:.40}, not a JSON object")
        yield f"{path}: entry {number}", row


def parse_json(where, data, kind):
    """The value of UTF-8 JSON, with or without a byte order mark; `where` is for the error."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
        if b"\\ud" in data.lower():  # half of a surrogate pair can be escaped, but is no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not UTF-8 JSON: {error}") from None
    if not isinstance(value, kind):
        names = {dict: "object", list: "list", str: "string", int: "number", float: "number"}
        found = names.get(type(value), str(value))
        raise InputError(f"{where}: a JSON {found} where a JSON {names[kind]} should be")
    return value


def hash_of(value):
    """sha256, in hexadecimal: of a file's bytes, of a checkpoint's files, or of a value as JSON."""
    if isinstance(value, Path) and value.is_dir():
        kinds = (".json", ".safetensors", ".jinja")
        files = sorted(path for path in value.iterdir() if path.suffix in kinds)
        return hash_of([(path.name, hash_of(path)) for path in files])
    if isinstance(value, Path):
        with open(value, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def checkpoint_folder(path):
    """The folder of a checkpoint: `path` itself, or a hub id downloaded to the hub's own cache.

    `org/name@revision` names one revision of a hub id; without it the newest is taken.
    """
    path = str(path)
    if os.path.isdir(path):
        return Path(path)
    name, _, revision = path.partition("@")
    from huggingface_hub import snapshot_download  # installed with tokenizers

    kinds = {"allow_patterns": ["*.json", "*.safetensors", "*.jinja"], "ignore_patterns": ["*/*"]}
    try:
        return Path(snapshot_download(name, revision=revision or None, **kinds))
    except Exception as error:  # the hub's client fails in many ways; each is one line here
        raise InputError(f"{path}: no such folder, and the hub gave none: {error}") from None


def check_device(device):
    """torch.device of a name: the CPU or a CUDA GPU; another, or one that is not there, is refused.

    Others lack what this code needs: float64 on mps, for one.
    """
    name = str(device)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name}: not supported; take cpu, cuda or cuda:1")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    # cuDNN's attention builds a plan for every new shape, and here nearly every shape is new.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name)


def random_stream(seed, *names):
    """The numpy Generator of one named purpose, which shares no draw with another."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def progress_bar(label, total, done, unit):
    """A bar that begins at `done`, its rate the mean: on a terminal only, and gone when full."""
    look = {"leave": False, "dynamic_ncols": True, "disable": None, "smoothing": 0}
    return tqdm(desc=label, total=total, initial=done, unit=f" {unit}", **look)


def option(default, help, low=None, high=math.inf, choices=None):
    """A field of a dataclass of options: all that the command line says of it, on one line.

    low, high: the range of a number.
    """
    limits = {"low": low, "high": high, "choices": choices}
    return field(default=default, metadata={"help": help, **limits})


@dataclass
class Device:
    """Where and how a command computes."""

    device: str = option("cpu", "cpu, cuda, cuda:1, ...")
    dtype: str = option("float32", "of the weights", choices=DTYPES)
    deterministic: bool = option(False, "on a GPU: equal bits in every run, slower")


def make_parser(description, *classes):
    """A parser with the options of some dataclasses.

    A command's own class comes first: its default and help win over those of a stage that it calls.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.error = refuse
    own_names = {item.name for options in classes[:1] for item in fields(options)}
    for options in classes:
        for item in fields(options):
            if options is not classes[0] and item.name in own_names:
                continue
            name = "--" + item.name.replace("_", "-")
            text = item.metadata["help"] + f" (default {item.default})" * (item.default is not None)
            text = text.replace("%", "%%")
            if item.type is bool:  # --no-NAME too, so that a flag wins over a recipe's true
                action = argparse.BooleanOptionalAction
                parser.add_argument(name, action=action, default=item.default, help=text)
            else:
                kind = number_between(item) if item.metadata["low"] is not None else item.type
                choices = item.metadata["choices"]
                parser.add_argument(
                    name, type=kind, choices=choices, default=item.default, help=text
                )
    return parser


def refuse(message):
    """A parser's error, in argparse's own words, as the one line of every other error."""
    raise InputError(message)


def number_between(item):
    """What turns the text of an option into a number, and refuses one out of its range."""
    low, high = item.metadata["low"], item.metadata["high"]

    def parse(text):
        value = item.type(text)
        if not (low <= value <= high and value < math.inf):
            upper = "" if high == math.inf else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: at least {low}{upper}")
        return value

    parse.__name__ = item.type.__name__  # for argparse's "invalid int value"
    return parse


def options_of(options, args):
    """A dataclass of options, filled from what the parser read."""
    return options(**{item.name: getattr(args, item.name) for item in fields(options)})


def set_deterministic(device_options):
    """Asks torch for kernels that give equal bits in every run, where --deterministic is set."""
    if device_options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as torch asks for
        torch.use_deterministic_algorithms(True)


def check_output(path):
    """Refuses, before the long work, an output that exists or has no folder to be in."""
    if Path(path).exists():
        raise InputError(f"{path} exists already: remove it, or name another output")
    if not Path(path).parent.is_dir():
        raise InputError(f"{path}: there is no folder {Path(path).parent}; make it first")


def main():
    parser = make_parser("What is in a checkpoint, and what it takes.")
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    folder = checkpoint_folder(parser.parse_args().model)
    config = read_config(folder)
    with torch.device("meta"):
        count = sum(p.numel() for p in LanguageModel(config).parameters())
    found = vars(config) | {"stop ids": load_tokenizer(folder).stop_ids, "parameters": f"{count:,}"}
    print("\n".join(f"{key:24} {value}" for key, value in found.items()))


if __name__ == "__main__":
    run_main(main)
