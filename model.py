"""One checkpoint: a Llama-style transformer, its KV cache, tokenizer and chat template.

In: a folder in Hugging Face's layout, or a hub id. Out: next-token logits, and folders
that transformers and vLLM read back. What all files share comes last.

    python model.py --model DIR                    # what is in a checkpoint
"""

import argparse
import contextlib
import functools
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

# Before torch is imported: idle OpenMP threads spin, which beside another busy process
# costs ten times the work itself.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# DPO's batch shapes vary: this saves about 4 GiB of fragmentation on a GPU.
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

# Shapes: B rows, T tokens, H query heads, KV key and value heads, V vocabulary.


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        # In 16 bits it is rounded before the weight too, as in transformers.
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


def rope_frequencies(config):
    """Angle per position of each pair of dimensions: (head_dim / 2,) float32."""
    rope = config.rope
    steps = torch.arange(0, config.head_dim, 2, device="cpu").float()
    frequencies = 1.0 / rope["rope_theta"] ** (steps / config.head_dim)
    if rope["rope_type"] == "linear":  # as if the positions stood closer together
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        # Slow waves are stretched by the factor, fast ones stay, the rest is blended.
        low = rope["low_freq_factor"]
        high = rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, 1: fast
        return (1 - blend) * frequencies / rope["factor"] + blend * frequencies
    return frequencies


def rotate(x, cos, sin):
    """Turns each pair of dimensions of x, (B, H, T, head_dim), by its angle."""
    # As in Hugging Face's weights, dimension i is paired with i + head_dim / 2.
    x1, x2 = x.chunk(2, dim=-1)  # (B, H, T, head_dim / 2) each
    # cos and sin (B, 1, T, head_dim / 2) are float32, and so are the products.
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


def causal_attention(layer, q, k, v):
    """The plain `attend`: each row is a sequence; q may be only its last tokens."""
    # q (B, H, T, head_dim), k and v (B, KV, P + T, head_dim) -> (B, H, T, head_dim).
    # Query t sees keys 0 to P + t. layer: for a KV cache, which holds each layer's keys.
    mask = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


class Attention(nn.Module):
    """Grouped-query attention: each key and value head serves H / KV query heads."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.is_rotated = config.rotated[layer]
        hidden = config.hidden_size
        q_size = config.num_attention_heads * self.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, q_size, config.qkv_bias)
        self.k_proj = nn.Linear(hidden, kv_size, config.qkv_bias)
        self.v_proj = nn.Linear(hidden, kv_size, config.qkv_bias)
        self.o_proj = nn.Linear(q_size, hidden, config.output_bias)
        # Qwen3 normalizes each head of q and k.
        norm = RMSNorm if config.head_norms else nn.Identity
        self.q_norm = norm(self.head_dim, config.rms_norm_eps)
        self.k_norm = norm(self.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, attend):
        heads = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(2, heads)  # (B, T, H, head_dim)
        k = self.k_proj(x).unflatten(2, heads)  # (B, T, KV, head_dim)
        v = self.v_proj(x).unflatten(2, heads)  # (B, T, KV, head_dim)
        q = self.q_norm(q).transpose(1, 2)  # (B, H, T, head_dim)
        k = self.k_norm(k).transpose(1, 2)  # (B, KV, T, head_dim)
        v = v.transpose(1, 2)  # (B, KV, T, head_dim)
        if self.is_rotated:  # then q @ k depends on the distance between two tokens
            q = rotate(q, cos, sin)
            k = rotate(k, cos, sin)
        # Only here do tokens meet. The caller decides which token sees which: attend is
        # causal_attention, or comes from pack or the KV cache.
        out = attend(self.layer, q, k, v)  # (B, H, T, head_dim)
        out = out.transpose(1, 2).flatten(2)  # (B, T, H * head_dim)
        return self.o_proj(out)  # (B, T, hidden)


class MLP(nn.Module):  # SwiGLU
    def __init__(self, config):
        super().__init__()
        hidden = config.hidden_size
        wide = config.intermediate_size
        self.gate_proj = nn.Linear(hidden, wide, config.mlp_bias)
        self.up_proj = nn.Linear(hidden, wide, config.mlp_bias)
        self.down_proj = nn.Linear(wide, hidden, config.mlp_bias)

    def forward(self, x):
        x = F.silu(self.gate_proj(x)) * self.up_proj(x)  # (B, T, wide)
        return self.down_proj(x)  # (B, T, hidden)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend, keep=None):
        """(B, T, hidden) -> the same, or only the positions in keep."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        if keep is not None:
            x = x[:, keep]  # (B, len(keep), hidden): in the MLP no tokens meet
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, blocks, final norm: what policy and judge share."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(Block(config, i) for i in layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # No buffer: model.bfloat16() would round it, and turn far positions wrongly.
        self.frequencies = rope_frequencies(config)

    def forward(self, tokens, positions=None, attend=causal_attention, recompute=0, keep=None):
        """(B, T) int64 -> (B, T, hidden), or (B, len(keep), hidden).

        positions (B, T): by default 0 to T - 1. attend: which token sees which.
        recompute: how many blocks, from the first, store no activations. keep: the
        indices into T that are needed after the last attention.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        self.frequencies = self.frequencies.to(tokens.device)
        angles = positions[:, None, :, None] * self.frequencies  # (B, 1, T, head_dim / 2)
        cos = angles.cos()
        sin = angles.sin()
        x = self.embed_tokens(tokens)  # (B, T, hidden)
        for i, block in enumerate(self.layers):
            is_last = i == len(self.layers) - 1
            args = (x, cos, sin, attend, keep if is_last else None)
            # Gradient checkpointing stores only a block's input; the backward pass computes
            # the rest again: a third more work, a small part of the memory.
            x = checkpoint(block, *args, use_reentrant=False) if i < recompute else block(*args)
        return self.norm(x)  # (B, T or len(keep), hidden)


class LanguageModel(nn.Module):
    """A trunk and an output head; parameter names are Hugging Face's."""

    # load_weights calls eval(), for DPO too: a dropout that you add would be off.
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    device = property(lambda self: self.head.device)
    dtype = property(lambda self: self.head.dtype)

    @property
    def head(self):
        """The output head's weight, (V, hidden). A tied model's is the embedding's."""
        return getattr(self, "lm_head", self.model.embed_tokens).weight

    def forward(self, tokens):
        """(B, T) int64 -> logits (B, T, V). Rows may be padded on the right."""
        hidden = self.model(tokens).flatten(0, 1)  # (B * T, hidden)
        return logits_of(hidden, self.head).unflatten(0, tokens.shape)  # (B, T, V)


def logits_of(hidden, head):
    """(N, hidden) and a head (V, hidden) -> logits (N, V), float32 at least."""
    if hidden.is_cuda and hidden.itemsize == 2:
        # A GPU can return its float32 sums: rounding them would cost 0.02 nats a token.
        return WideProduct.apply(hidden, head)
    logits = F.linear(hidden, head)  # a CPU rounds to 16 bits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class WideProduct(torch.autograd.Function):
    """16-bit hidden @ head.T in float32: torch.mm's out_dtype has no gradient."""

    @staticmethod
    def forward(ctx, hidden, head):
        ctx.save_for_backward(hidden, head)
        return torch.mm(hidden, head.T, out_dtype=torch.float32)  # (N, V)

    @staticmethod
    def backward(ctx, grad):
        hidden, head = ctx.saved_tensors
        grad = grad.to(hidden.dtype)  # (N, V)
        # A sum over all tokens stays in float32: dpo.py sets the head's grad_dtype.
        return grad @ head, torch.mm(grad.T, hidden, out_dtype=torch.float32)


class KVCache:
    """Keys and values of some slots, each a sequence at its own position."""

    def __init__(self, config, slots, length, device, dtype):
        heads = config.num_key_value_heads
        shape = (config.num_hidden_layers, slots, heads, length, config.head_dim)
        # Zeros, not empty: a masked position has weight 0, and 0 * NaN is NaN.
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    def write(self, slot, k, v):
        """Starts a slot with a prompt's k and v, (layers, KV, T, head_dim) each."""
        self.k[:, slot, :, : k.shape[2]] = k
        self.v[:, slot, :, : v.shape[2]] = v

    def move(self, source, target, length):
        """Copies the first `length` positions of one slot to another."""
        self.write(target, self.k[:, source, :, :length], self.v[:, source, :, :length])

    def step(self, positions, length):
        """The `attend` of one new token in each of the first B slots.

        positions (B,): where each token goes. length: how many keys are read.
        """
        B = len(positions)
        rows = torch.arange(B, device=positions.device)
        is_flash = self.k.is_cuda and self.k.itemsize == 2
        if not is_flash:
            keys = torch.arange(length, device=positions.device)  # length > positions.max()
            unseen = keys > positions[:, None, None, None]  # (B, 1, 1, length)
            # Added to the scores: SDPA would convert a boolean mask in each layer.
            mask = torch.zeros_like(unseen, dtype=self.k.dtype).masked_fill(unseen, -math.inf)

        def attend(layer, q, k, v):
            # rows and positions pair up: (B, KV, head_dim).
            self.k[layer, rows, :, positions] = k[:, :, 0]
            self.v[layer, rows, :, positions] = v[:, :, 0]
            keys = self.k[layer, :B, :, :length]  # (B, KV, length, head_dim)
            values = self.v[layer, :B, :, :length]
            # A group's query heads take the time axis, so no key is repeated.
            shape = q.shape
            q = q.reshape(B, k.shape[1], -1, shape[3])  # (B, KV, H / KV, head_dim)
            if is_flash:
                out = flash_attention(q, keys, values, positions)
            else:
                out = F.scaled_dot_product_attention(q, keys, values, mask)
            return out.reshape(shape)  # (B, H, 1, head_dim)

        return attend


def flash_attention(q, k, v, positions):
    """A GPU's 16-bit kernel, which never reads the keys that a row does not see."""
    B, KV, length, head_dim = k.shape
    # The kernel takes sequences end to end. Here each key head of a slot is one: one query
    # token of H / KV heads, and `length` keys of one head.
    q = q.flatten(0, 1)  # (B * KV, H / KV, head_dim)
    k = k.reshape(-1, 1, head_dim)  # (B * KV * length, 1, head_dim)
    v = v.reshape(-1, 1, head_dim)
    starts = torch.arange(B * KV + 1, device=q.device, dtype=torch.int32)
    seen = (positions + 1).int().repeat_interleave(KV)  # (B * KV,)
    # Starts of queries and keys, their longest lengths; no dropout, causality, debug mask.
    layout = (starts, starts * length, 1, length, 0.0, False, False)
    kernel = torch.ops.aten._flash_attention_forward  # torch has no public name for it
    return kernel(q, k, v, *layout, seqused_k=seen)[0]  # (B * KV, H / KV, head_dim)


def pack(pieces, device="cpu"):
    """Lays pieces end to end in one row, without padding.

    pieces: (ids, prefix) each; prefix is the index of an earlier piece that it continues,
    or None. Returns tokens and positions, (1, N) int64 each, and the `attend`: a piece
    sees its prefix whole, itself causally, and nothing else.

    >>> tokens, positions, _ = pack([([5, 6], None), ([7], 0), ([8, 9], 0), ([4], None)])
    >>> tokens.tolist(), positions.tolist()
    ([[5, 6, 7, 8, 9, 4]], [[0, 1, 2, 2, 3, 0]])
    """
    lengths = [len(ids) for ids, _ in pieces]
    if 0 in lengths:  # its end would be another piece's
        raise ValueError("a piece is empty")
    tokens = []
    positions = []
    for ids, prefix in pieces:
        start = 0 if prefix is None else lengths[prefix]
        tokens += ids
        positions += range(start, start + len(ids))

    def attend(layer, q, k, v):
        # split, not slices: a slice's gradient would be allocated as long as the row.
        q = q.split(lengths, dim=2)  # for each piece (1, H, T, head_dim)
        k = k.split(lengths, dim=2)  # (1, KV, T, head_dim)
        v = v.split(lengths, dim=2)
        out = []
        for i, (_, prefix) in enumerate(pieces):
            keys = k[i]
            values = v[i]
            if prefix is not None:
                keys = torch.cat([k[prefix], keys], dim=2)  # (1, KV, P + T, head_dim)
                values = torch.cat([v[prefix], values], dim=2)
            out.append(causal_attention(layer, q[i], keys, values))
        return torch.cat(out, dim=2)  # (1, H, N, head_dim)

    row = torch.tensor([tokens, positions], device=device)  # (2, N)
    return row[:1], row[1:], attend


def batch_by_size(items, sizes, max_size):
    """Groups consecutive items of at most max_size in sum; an oversized one is alone.

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
        room -= size  # after an oversized item below 0: the next one opens a group
    return groups


SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
FAMILIES = {  # defaults of missing keys that differ from llama's
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
    "smollm3": {"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
}


def read_config(folder):
    """The numbers of a config.json; refuses what would be computed wrongly here."""
    file = Path(folder) / "config.json"
    raw = read_json(file)
    family = raw.get("model_type")

    def check(is_good, key, expected):
        if not is_good:
            raise InputError(f"{file}: {key} is {raw.get(key)!r}, but must be {expected}")

    def size(key, default=None):  # null means the default too
        value = raw.get(key) or default
        check(is_count(value), key, "a whole number above 0")
        return value

    check(family in list(FAMILIES), "model_type", f"one of {', '.join(FAMILIES)}")
    raw = FAMILIES[family] | raw
    sizes = {key: size(key) for key in [*SIZES, "max_position_embeddings"]}
    layers = sizes["num_hidden_layers"]
    heads = sizes["num_attention_heads"]
    check(raw.get("hidden_act", "silu") in ("silu", "swish"), "hidden_act", "silu")
    eps = raw.get("rms_norm_eps", 1e-6)
    check(is_number(eps), "rms_norm_eps", "a number above 0")
    # A sliding window hides far tokens: refused, but for one as long as the context.
    # Mistral always has one; later families where use_sliding_window says so, unless
    # their layer_types lists no sliding layer.
    kinds = raw.get("layer_types")
    check(kinds in (None, ["full_attention"] * layers), "layer_types", "full_attention alone")
    slides = family == "mistral" or (kinds is None and raw.get("use_sliding_window"))
    is_whole = raw.get("sliding_window") in (None, sizes["max_position_embeddings"])
    check(is_whole or not slides, "sliding_window", "null: full attention")
    rotated = [1] * layers
    if family == "smollm3":  # by default every fourth layer is not rotated
        interval = raw.get("no_rope_layer_interval", 4)
        check(is_count(interval), "no_rope_layer_interval", "a whole number above 0")
        rotated = raw.get("no_rope_layers")  # despite its name, 1 is rotated
        if rotated is None:
            rotated = [int(i % interval != 0) for i in range(1, layers + 1)]
        is_list = isinstance(rotated, list) and len(rotated) >= layers
        check(is_list and set(rotated) <= {0, 1}, "no_rope_layers", "0 or 1 for each layer")
    # Qwen2 has the biases of q, k and v always; Mistral has none.
    has_bias = bool(raw.get("attention_bias")) and family not in ("mistral", "qwen2")
    return SimpleNamespace(
        **sizes,
        num_key_value_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", sizes["hidden_size"] // heads),
        rms_norm_eps=float(eps),
        rope=read_rope(raw, check),
        rotated=rotated,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
        qkv_bias=has_bias or family == "qwen2",
        output_bias=has_bias,
        mlp_bias=family in ("llama", "smollm3") and bool(raw.get("mlp_bias")),
        head_norms=family == "qwen3",
    )


def read_rope(raw, check):
    """The rotary numbers: rope_type, rope_theta and those that the type needs."""
    kinds = {"default": "", "linear": "factor"}
    kinds["llama3"] = "factor low_freq_factor high_freq_factor original_max_position_embeddings"
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # older, newer
    # A nested dict has settings for each kind of layer, which no family here has.
    is_flat = isinstance(rope, dict) and dict not in map(type, rope.values())
    kind = rope.get("rope_type", rope.get("type", "default")) if is_flat else rope
    raw["rope_type"] = kind  # which check's error shows
    check(is_flat and str(kind) in kinds, "rope_type", f"one of {', '.join(kinds)}")
    raw["rope_theta"] = raw.get("rope_theta") or 10000.0
    raw |= rope | {"rope_type": kind}
    keys = ["rope_theta", *kinds[kind].split()]
    for key in keys:
        check(is_number(raw.get(key)), key, "a number above 0")
    part = raw.get("partial_rotary_factor")
    check(part in (None, 1), "partial_rotary_factor", "1: all of a head turns")
    return {key: raw[key] for key in ["rope_type", *keys]}


def is_count(value):
    return type(value) is int and value > 0  # JSON's true is no number


def is_number(value):
    return type(value) in (int, float) and 0 < value < math.inf


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GIB = 2**30


def load_model(path, device="cpu", dtype=torch.float32):
    """The language model of a checkpoint folder or hub id, in evaluation mode."""
    device = check_device(device)
    folder = checkpoint_folder(path)
    with torch.device("meta"):  # no memory until the weights come
        model = LanguageModel(read_config(folder))
    return load_weights(model, folder, device, dtype)


def load_weights(module, folder, device, dtype):
    """Fills a module built on the meta device, a LanguageModel or a judge."""
    tensors = {}
    for file, name, stored in stored_tensors(folder, device):
        if name.endswith("inv_freq"):  # rotary frequencies, in some old checkpoints
            continue
        if stored.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(f"{file}: {name} is {stored.dtype}, not float32 or 16 bits")
        # A judge's heads are float32: they read few tokens. copy: no view of the file.
        is_head_of_judge = not name.startswith(("model.", "lm_head."))
        tensors[name] = stored.to(torch.float32 if is_head_of_judge else dtype, copy=True)
        if not tensors[name].isfinite().all():
            raise InputError(f"{file}: {name} has NaN or infinite values in {dtype}")
    # A tied checkpoint may store its one matrix under either name, or both.
    if "lm_head.weight" not in module.state_dict():
        head = tensors.pop("lm_head.weight", None)
        if head is not None and isinstance(module, LanguageModel):  # no judge uses it
            embedding = tensors.setdefault("model.embed_tokens.weight", head)
            if not torch.equal(embedding, head):
                # The flag is wrong, as after merging an adapter: both are used.
                module.config.tie_word_embeddings = False
                module.lm_head = nn.Linear(*head.shape[::-1], bias=False, device="meta")
                tensors["lm_head.weight"] = head
    try:
        module.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        fault = str(error).splitlines()[1].strip()  # the first fault is enough
        raise InputError(f"{folder}: the weights do not fit config.json: {fault:.300}") from None
    return module.eval()


def stored_tensors(folder, device="cpu"):
    """Yields (file, name, tensor) of a checkpoint's one file, or its shards."""
    shards = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / shards[0]).exists():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
    for shard in shards:
        if not re.fullmatch(r"[\w-][\w.-]*", shard):  # a path could lead out of the folder
            raise InputError(f"{index}: weight_map names {shard!r}, no file beside it")
        file = folder / shard
        try:
            with safe_open(file, framework="pt", device=str(device)) as stored:
                for name in stored.keys():  # noqa: SIM118, it is no dict
                    yield file, name, stored.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a whole file: {error}") from None


def save_model(model, path, source):
    """Writes a checkpoint folder, with `source`'s config and tokenizer files."""
    source = checkpoint_folder(source)
    with write_whole(path, folder=True) as aside:
        save_file(model.state_dict(), aside / "model.safetensors", {"format": "pt"})
        for file in source.iterdir():  # all but the weights and their index
            if file.suffix in (".json", ".jinja", ".txt") and not file.name.startswith("model."):
                shutil.copyfile(file, aside / file.name)
        config = read_json(source / "config.json")
        key = "dtype" if "dtype" in config else "torch_dtype"  # newer and older files
        config[key] = str(next(model.parameters()).dtype).removeprefix("torch.")
        if not model.config.tie_word_embeddings:  # the source's flag may be wrong
            config["tie_word_embeddings"] = False
        write_json(aside / "config.json", config)


class Tokenizer:
    """tokenizer.json with the checkpoint's own chat template and stop tokens."""

    def __init__(self, folder):
        self.folder = folder
        file = folder / "tokenizer.json"
        try:
            self.tokenizer = TokenizersTokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{file}: not a tokenizer: {error}") from None
        # The file may ask for the truncation and padding of a training.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        settings = read_optional(folder / "tokenizer_config.json")
        self.template = read_template(folder, settings)
        self.special = special_tokens(folder, settings)  # {"bos_token": text, ...}
        # Stop at the tokenizer's eos, and at eos_token_id, a number or a list, of
        # generation_config.json or, where that does not say, of config.json.
        config = read_optional(folder / "config.json")
        stops = read_optional(folder / "generation_config.json").get("eos_token_id")
        if stops is None:
            stops = config.get("eos_token_id")
        if not isinstance(stops, list):
            stops = [] if stops is None else [stops]
        vocab = self.tokenizer.get_vocab()  # {token: id}
        eos = self.special.get("eos_token")
        if eos is not None:
            stops.append(vocab.get(eos) if isinstance(eos, str) else None)
        if any(type(stop) is not int for stop in stops):
            raise InputError(f"{folder}: eos_token {eos!r} or eos_token_id: no ids: {stops}")
        self.stop_ids = tuple(sorted(set(stops)))
        top = max([*stops, *vocab.values()])
        if top >= config.get("vocab_size", math.inf):
            raise InputError(f"{file}: id {top} is beyond config.json's vocab_size")

    def encode(self, text, add_special_tokens=True):
        """Token ids of a text, with BOS and the like as Hugging Face adds them."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            raise InputError(f"{text[:80]!r} holds half a surrogate pair") from None

    def decode(self, ids, skip_special_tokens=False):
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages, add_generation_prompt=True):
        """The chat as text. messages: a list of {"role": ..., "content": ...}."""
        where = f"{self.folder}: chat_template"
        if self.template is None:
            raise InputError(f"{where} is missing, in tokenizer_config.json and beside it")
        values = {"messages": messages}
        values["add_generation_prompt"] = add_generation_prompt
        # Our prompt asks for the thought, so a template's own thinking is off.
        values |= {"tools": None, "documents": None, "enable_thinking": False}
        try:
            return self.template.render(**self.special | values)
        except Exception as error:  # a stranger's template can fail in any way
            raise InputError(f"{where}: {type(error).__name__}: {error}") from None

    def apply_chat_template(self, messages, add_generation_prompt=True):
        """The chat as token ids."""
        text = self.render_chat(messages, add_generation_prompt)
        return self.encode(text, add_special_tokens=False)  # the template writes BOS


def load_tokenizer(path):
    """The tokenizer of a checkpoint folder or hub id."""
    return Tokenizer(checkpoint_folder(path))


def special_tokens(folder, settings):
    """Each special token's text by its name. settings: tokenizer_config.json's."""
    values = dict(settings)
    # As in transformers: special_tokens_map.json overrides an old tokenizer_config.json,
    # one without added_tokens_decoder.
    if "added_tokens_decoder" not in settings:
        values |= read_optional(folder / "special_tokens_map.json")
    values = {key: value for key, value in values.items() if key.endswith("_token")}
    extra = settings.get("extra_special_tokens")  # a model's own names
    values |= extra if isinstance(extra, dict) else {}
    special = {}
    for key, value in values.items():
        token = value.get("content") if isinstance(value, dict) else value
        if token is not None and type(token) is not bool:  # add_bos_token is no token
            special[key] = token
    return special


def read_template(folder, settings):
    """The compiled chat template of a folder; None where it has none."""
    import jinja2  # installed with torch
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    # A template is a stranger's: it runs in a sandbox, with transformers' names.
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    sandbox.add_extension("jinja2.ext.loopcontrols")
    # jinja2's own tojson escapes HTML, which no model was trained on.
    sandbox.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    file = folder / "chat_template.jinja"
    source = settings.get("chat_template")
    try:
        if file.is_file():
            source = file.read_text(encoding="utf-8")
        if isinstance(source, list):  # several named templates
            source = {row["name"]: row["template"] for row in source}.get("default")
        if source is None:
            return None
        # {% generation %} marks text for trainers; here it does nothing.
        source = re.sub(r"({%[-+]?\s*)(end)?generation\b", r"\1\2with", source)
        return sandbox.from_string(source)
    except Exception as error:  # as in render_chat
        raise InputError(f"{folder}: chat_template: does not parse: {error}") from None


def checkpoint_folder(path):
    """The folder `path`, or that of a hub id: org/name or org/name@revision."""
    path = str(path)
    if os.path.isdir(path):
        return Path(path)
    from huggingface_hub import snapshot_download  # installed with tokenizers

    name, _, revision = path.partition("@")
    files = {"allow_patterns": ["*.json", "*.safetensors", "*.jinja"], "ignore_patterns": ["*/*"]}
    try:  # where no revision is named, the newest is taken
        return Path(snapshot_download(name, revision=revision or None, **files))
    except Exception as error:  # the hub's client fails in many ways
        raise InputError(f"{path}: no such folder, and the hub gave none: {error}") from None


def check_device(device):
    """torch.device of a name: the CPU or a CUDA GPU. Others lack float64."""
    name = str(device)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name}: not supported; take cpu, cuda or cuda:1")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if name != "cpu":  # streams and graphs are made on the current device
        torch.cuda.set_device(name)
    # cuDNN's attention plans anew for each shape, and here shapes hardly repeat.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name)


class InputError(Exception):
    """An error that the user can fix: one line that says where, what, what to do."""


def run_main(main, resumes=False):
    """Runs a module's main(): an InputError ends in one line and exit status 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    # What cannot be shown, or is not valid input, is replaced.
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace", line_buffering=True)  # into a pipe too
    try:
        main()
    except (InputError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        # resumes: whether the same command goes on where it was stopped.
        command = shlex.join([Path(sys.executable).name, *sys.argv])
        print("\nstopped" + (f"; to resume: {command}" if resumes else ""), file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def write_whole(path, folder=False, aside=None):
    """Yields a path beside `path`, or `aside`, and renames it when the block ends."""
    # So what has the final name is whole: a kill leaves the old one or the new.
    path = Path(path)
    aside = aside or path.with_name(path.name + ".partial")
    try:
        if folder:
            shutil.rmtree(aside, ignore_errors=True)  # what a kill left
            aside.mkdir(parents=True)
        yield aside
        for file in aside.iterdir() if folder else [aside]:
            with open(file, "rb+") as stream:  # Windows cannot sync a file opened to read
                os.fsync(stream.fileno())
        os.replace(aside, path)
    except (SafetensorError, OSError) as error:  # a full disk's error names no file
        raise InputError(f"{path}: cannot be written: {error}") from None


def write_json(path, value):
    with write_whole(path) as aside:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        aside.write_text(text, encoding="utf-8")


def write_jsonl(path, rows):
    with write_whole(path) as aside, open(aside, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_rows(path, items, key, make_rows):
    """Writes JSON lines, one row an item; after a kill the same call resumes."""
    # make_rows(items) yields the rows of the items that are left. key is all that rows
    # depend on. It names the unfinished file: a call with other options has its own.
    path = Path(path)
    check_output(path)  # a file that exists may be of other options
    partial = path.with_name(f"{path.name}.{hash_of(key)[:8]}.partial")
    with write_whole(path, aside=partial), open(partial, "ab+") as file:
        file.seek(0)
        whole_lines = [line for line in file if line.endswith(b"\n")]
        file.truncate(sum(map(len, whole_lines)))  # a kill may have left half a line
        for row in make_rows(items[len(whole_lines) :]):
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()


def read_json(path, kind=dict):
    """The value in a file of UTF-8 JSON: an object, or a list."""
    return parse_json(path, Path(path).read_bytes(), kind)


def read_optional(path):
    """The object in a JSON file, or {} where there is no such file."""
    return read_json(path) if path.exists() else {}


def read_jsonl(path):
    """Yields (place, row as a dict) of a file of JSON lines, or of one JSON list."""
    blank = b" \t\r\n\xef\xbb\xbf"  # the last three are a byte order mark
    with open(path, "rb") as lines:
        is_list = lines.read(4096).lstrip(blank).startswith(b"[")
        lines.seek(0)
        if not is_list:  # a file may be larger than the memory
            for number, line in enumerate(lines, 1):
                if line.strip(blank):
                    yield f"{path}:{number}", parse_json(f"{path}:{number}", line, dict)
            return
    for number, row in enumerate(read_json(path, list), 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: entry {number} is {row!r:.40}, not a JSON object")
        yield f"{path}: entry {number}", row


def parse_json(where, data, kind):
    """The value of some bytes of JSON; kind is dict or list."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
        if b"\\ud" in data.lower():  # an escape for half of a surrogate pair is no text
            json.dumps(value, ensure_ascii=False).encode()  # raises for it
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not UTF-8 JSON: {error}") from None
    if not isinstance(value, kind):
        name = "an object" if kind is dict else "a list"
        raise InputError(f"{where} is JSON, but not {name}: {value!r:.40}")
    return value


def hash_of(value):
    """The sha256 of a file's bytes, a checkpoint's files, or a value as JSON."""
    # Only a Path names a file or folder: of a str its own text is hashed.
    if isinstance(value, Path) and value.is_dir():
        kinds = (".json", ".safetensors", ".jinja")
        files = sorted(path for path in value.iterdir() if path.suffix in kinds)
        value = [(path.name, hash_of(path)) for path in files]
    if isinstance(value, Path):
        with open(value, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def random_stream(seed, *names):
    """A numpy Generator, named by its parts joined with "/"."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def progress_bar(label, total, done, unit):
    """A bar that begins at `done`: on a terminal only, and gone when full."""
    look = {"leave": False, "dynamic_ncols": True, "disable": None}
    look["smoothing"] = 0  # the rate is the mean over the whole run
    return tqdm(desc=label, total=total, initial=done, unit=f" {unit}", **look)


def option(default, help, low=None, high=math.inf, choices=None):
    """A field of a dataclass of options, with what the command line says of it."""
    # low, high: a number's range. In help, "paper" and "draft" cite their sections,
    # "field" a value usual for Llama-3-8B, "ours" a choice of this project.
    metadata = {"help": help, "range": (low, high), "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass
class Device:
    """Where and how a command computes."""

    device: str = option("cpu", "cpu, cuda, cuda:1, ...")
    dtype: str = option("float32", "of the weights", choices=tuple(DTYPES))
    deterministic: bool = option(False, "on a GPU: equal bits in every run, slower")

    def __post_init__(self):
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)


def make_parser(description, *classes):
    """A parser of some dataclasses' options; of equal names the first counts."""

    def refuse(message):  # in argparse's words, but in one line as every other error
        raise InputError(message)

    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.error = refuse
    options = {}
    for each in classes:
        for item in fields(each):
            options.setdefault("--" + item.name.replace("_", "-"), item)
    for name, item in options.items():
        kind = {"type": item.type, "choices": item.metadata["choices"]}
        if item.type is bool:  # --no-NAME too, so that a flag wins over a recipe's true
            kind = {"action": argparse.BooleanOptionalAction}
        default = "" if item.default is None else f" (default {item.default})"
        help = (item.metadata["help"] + default).replace("%", "%%")
        parser.add_argument(name, default=item.default, help=help, **kind)
    return parser


def options_of(options, args):
    """A dataclass of options from parsed args; refuses what is out of range."""
    values = {item.name: getattr(args, item.name) for item in fields(options)}
    for item in fields(options):
        value = values[item.name]
        low, high = item.metadata["range"]
        if None not in (low, value) and not (low <= value <= high and value < math.inf):
            name = "--" + item.name.replace("_", "-")
            raise InputError(f"argument {name}: {value} is out of range, {low} to {high}")
    return options(**values)


def check_output(path):
    """Refuses, before the work, an output that exists or has no folder to be in."""
    if Path(path).exists():
        raise InputError(f"{path} exists already: remove it, or name another output")
    if not Path(path).parent.is_dir():
        raise InputError(f"{path}: there is no folder {Path(path).parent}; make it first")


def main():
    parser = make_parser("What is in a checkpoint.")
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    folder = checkpoint_folder(parser.parse_args().model)
    config = read_config(folder)
    print(*(f"{name:24} {value}" for name, value in vars(config).items()), sep="\n")
    with torch.device("meta"):
        count = sum(p.numel() for p in LanguageModel(config).parameters())
    print(f"{'stop ids':24} {load_tokenizer(folder).stop_ids}")
    print(f"{'parameters':24} {count:,}")


if __name__ == "__main__":
    run_main(main)
