"""One checkpoint: a Llama-style transformer, its KV cache, its tokenizer and chat template.

In: a folder in Hugging Face's layout (config.json, safetensors, tokenizer.json, ...), or a hub id.
Out: `load_model(path)`, whose `model(tokens)` gives next-token logits, `load_tokenizer(path)`, and
`save_model(model, path, source)`, which writes a folder that transformers and vLLM read back.

Families: llama, mistral without a sliding window, qwen2. What the other files share (errors, JSON
lines, options) comes last.

    python model.py --model DIR                    # what is in a checkpoint, and what it takes
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
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
        q_size = config.num_attention_heads * self.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.output_bias)

    def forward(self, x, cos, sin, attend):
        heads = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(2, heads).transpose(1, 2)  # (B, H, T, head_dim)
        k = self.k_proj(x).unflatten(2, heads).transpose(1, 2)  # (B, KV, T, head_dim)
        v = self.v_proj(x).unflatten(2, heads).transpose(1, 2)  # (B, KV, T, head_dim)
        out = attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)  # as q
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

    def forward(self, x, cos, sin, attend, wanted=...):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        x = x[:, wanted]
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, blocks, final norm: tokens to hidden states. Policy and judge share it."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

    def forward(self, tokens, positions=None, attend=causal_attention, recompute=0, wanted=...):
        """(B, T) int64 -> (B, T, hidden).

        positions: (B, T) int64, default 0..T-1. attend: causal_attention, pack's or the KV
        cache's. recompute: gradient checkpointing, the number of blocks (from the first) that keep
        only their input and are computed again in the backward pass. wanted: the places in T
        that are returned, by default all; the last block's MLP, where no tokens meet, skips others.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        angles = positions[:, None, :, None] * self.frequencies  # (B, 1, T, head_dim / 2)
        cos = torch.cat([angles.cos(), angles.cos()], dim=-1)  # (B, 1, T, head_dim) float32
        sin = torch.cat([-angles.sin(), angles.sin()], dim=-1)  # signed as rotate needs it
        x = self.embed_tokens(tokens)
        for i, block in enumerate(self.layers):
            args = (x, cos, sin, attend, wanted if block is self.layers[-1] else ...)
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


def fill(items, sizes, most):
    """Cuts a list, in order, into lists whose sizes sum to `most` at most, or of one item.

    >>> fill("abcd", [3, 4, 9, 1], 8)
    [['a', 'b'], ['c'], ['d']]
    """
    parts, room = [], 0
    for item, size in zip(items, sizes, strict=True):
        if size > room:
            parts.append([])
            room = most
        parts[-1].append(item)
        room -= size
    return parts


SIZES = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    max_position_embeddings""".split()
LLAMA3 = "factor low_freq_factor high_freq_factor original_max_position_embeddings"
ROPE_NUMBERS = {"default": (), "linear": ("factor",), "llama3": LLAMA3.split()}


def read_config(folder):
    """The numbers of a config.json; refuses by name what is not llama, mistral or qwen2.

    Names are the file's; `rope` is transformers 5's `rope_parameters`, two keys in older files.
    """
    file = Path(folder) / "config.json"
    raw = read_json(file)

    def check(good, key, expected):
        expect(good, f"{file}: {key}", repr(raw.get(key)), expected)

    family = raw.get("model_type")
    check(family in ("llama", "mistral", "qwen2"), "model_type", "llama, mistral or qwen2")
    check(raw.get("hidden_act", "silu") == "silu", "hidden_act", "silu")
    if family == "mistral" or (family == "qwen2" and raw.get("use_sliding_window")):
        window = raw.setdefault("sliding_window", 4096)  # what leaving it out means there
        whole = window in (None, raw.get("max_position_embeddings"))
        check(whole, "sliding_window", "null: full attention")
    check(raw.get("partial_rotary_factor", 1) == 1, "partial_rotary_factor", "1: whole heads turn")
    for key in SIZES:
        check(raw.get(key), key, "a whole number above 0")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    flat = kind in ROPE_NUMBERS and dict not in map(type, rope.values())
    expect(flat, f"{file}: rope_type", repr(rope), "default, linear or llama3, of all layers")
    rope = {"rope_theta": raw.get("rope_theta") or 10000.0, **rope, "rope_type": kind}
    for key in ("rope_theta", *ROPE_NUMBERS[kind]):
        expect(rope.get(key, 0) > 0, f"{file}: rope {key}", rope.get(key), "a number above 0")
    heads, bias = raw["num_attention_heads"], family == "llama" and bool(raw.get("attention_bias"))
    return SimpleNamespace(
        **{key: raw[key] for key in SIZES},
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=rope,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
        qkv_bias=bias or family == "qwen2",
        output_bias=bias,
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias")),
    )


def stored_tensors(folder, device="cpu"):
    """Yields (file, name, tensor) of a checkpoint: of its one file, or the shards of its index."""
    shards, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if index.exists() and not (folder / shards[0]).exists():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
    for shard in shards:
        plain, file = re.fullmatch(r"[\w-][\w.-]*", shard), folder / shard  # no way out of it
        expect(plain, f"{index}: weight_map", repr(shard), "the name of a file in the folder")
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
    tensors, tied = {}, "lm_head.weight" not in module.state_dict()
    for file, name, found in stored_tensors(folder, device):
        # Some tied checkpoints store the copy, some old ones the frequencies.
        if name.endswith("inv_freq") or (tied and name == "lm_head.weight"):
            continue
        kind = dtype if name.startswith(("model.", "lm_head.")) else torch.float32
        floats = found.dtype in (torch.float32, torch.bfloat16, torch.float16)
        expect(floats, f"{file}: {name}", found.dtype, "float32, bfloat16 or float16")
        tensors[name] = found.to(kind, copy=True)
        finite = tensors[name].isfinite().all()
        expect(finite, f"{file}: {name}", "infinite values or NaN", f"finite {kind}")
    try:
        module.load_state_dict(tensors, assign=True)
    except RuntimeError as error:  # it names what is missing, unknown or of another shape
        raise InputError(f"{folder}: {error}") from None
    module.model.frequencies = rope_frequencies(module.config).to(device)
    return module.eval()


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
        write_json(aside / "config.json", config)


class Tokenizer:
    """tokenizer.json with the checkpoint's own chat template and stop tokens.

    special: bos_token, eos_token, ... as text. template: compiled by jinja2, or None.
    """

    def __init__(self, folder):
        self.folder, file = folder, folder / "tokenizer.json"
        try:
            self.tokenizer = TokenizersTokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{file}: not a tokenizer: {error}") from None
        own, generation, config = (
            read_json(folder / name) if (folder / name).exists() else {}
            for name in ("tokenizer_config.json", "generation_config.json", "config.json")
        )
        self.template = read_template(folder, own)
        special = {key: own[key] for key in ("bos_token", "eos_token", "pad_token") if own.get(key)}
        self.special = {k: v["content"] if isinstance(v, dict) else v for k, v in special.items()}
        stops = generation.get("eos_token_id", [])
        stops = set(stops if isinstance(stops, list) else [stops]) - {None}
        vocab = self.tokenizer.get_vocab()
        if "eos_token" in self.special:
            stops.add(vocab.get(self.special["eos_token"]))
        expect(None not in stops, f"{folder}: eos_token", self.special, "tokens of tokenizer.json")
        top, rows = max([*stops, *vocab.values()]), config.get("vocab_size", math.inf)
        expect(top < rows, file, f"token id {top}", f"one below config.json's vocab_size, {rows}")
        self.stop_ids = tuple(sorted(stops))

    def encode(self, text, add_special_tokens=True):
        """Token ids of a text, list of int; BOS and the like as Hugging Face adds them."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            raise InputError(f"{text[:99]!r}: found half a surrogate pair, expected text") from None

    def decode(self, ids, skip_special_tokens=False):
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages, add_generation_prompt=True):
        """The chat as text. messages: a list of {"role": ..., "content": ...}."""
        where = f"{self.folder}: chat_template"
        expect(self.template is not None, where, "none", "one in tokenizer_config.json")
        values = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self.template.render(**values, tools=None, documents=None, **self.special)
        except Exception as error:  # whatever a stranger's template does wrong, in its own words
            raise InputError(f"{where}: {type(error).__name__}: {error}") from None

    def apply_chat_template(self, messages, add_generation_prompt=True):
        """The chat as token ids; the template writes BOS itself, so none is added."""
        return self.encode(self.render_chat(messages, add_generation_prompt), False)


def load_tokenizer(path):
    """The tokenizer of a checkpoint folder or hub id."""
    return Tokenizer(checkpoint_folder(path))


def read_template(folder, config):
    """The compiled chat template: chat_template.jinja, or tokenizer_config's; None without one.

    It comes from strangers, so it runs in jinja2's sandbox, with the names that transformers gives.
    """
    import jinja2  # installed with torch
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, indent=None):  # jinja2's own escapes HTML, which no model was trained on
        return json.dumps(value, ensure_ascii=False, indent=indent)

    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    sandbox = ImmutableSandboxedEnvironment(**blocks, extensions=["jinja2.ext.loopcontrols"])
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
    """An error the user can fix; the message is one line: the culprit, found, expected."""


def expect(good, what, found, expected):
    """Raises an InputError that says what, found and expected, unless `good`."""
    if not good:
        raise InputError(f"{what}: found {found}, expected {expected}")


def run_main(main):
    """Runs a module's main(): an error the user can fix ends in one line and exit status 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sys.stdout.reconfigure(line_buffering=True)  # into a pipe too
    try:
        main()
    except (InputError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        command = " ".join([Path(sys.executable).name, *sys.argv])
        print(f"\nstopped; to resume: {command}", file=sys.stderr)
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
            with open(file, "rb") as written:
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


def write_groups(path, items, group, key, make_rows, label, unit, each=1):
    """Writes a file of JSON lines, one for each item, `group` at a time: a kill loses one group.

    make_rows(part, bar) gives the rows of some items, and moves the bar by `each` an item. The
    rows stand beside `path`, in a file named after `key`, what they depend on, until all are
    there. So the same call resumes, and another one does not take its rows.
    """
    path = Path(path)
    if path.exists():
        return
    partial = path.with_name(f"{path.name}.{hash_of(key)[:8]}.partial")
    with write_whole(path, aside=partial), open(partial, "ab+") as file:
        file.seek(0)
        lines = [line for line in file if line.endswith(b"\n")]
        done = len(lines) // group * group
        file.truncate(sum(map(len, lines[:done])))
        with progress_bar(label, len(items) * each, done * each, unit) as bar:
            for first in range(done, len(items), group):
                for row in make_rows(items[first : first + group], bar):
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())


def read_json(path, kind=dict):
    """The value in a file of UTF-8 JSON: an object, or a list."""
    return parse_json(path, Path(path).read_bytes(), kind)


def read_jsonl(path):
    """Yields (line number, row as a dict) of a file of JSON lines; passes over blank lines."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, parse_json(f"{path}:{number}", line, dict)


def parse_json(where, data, kind):
    try:
        value = json.loads(data.decode("utf-8"))
        if b"\\ud" in data.lower():  # half of a surrogate pair can be escaped, but is no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not UTF-8 JSON: {error}") from None
    expect(isinstance(value, kind), where, f"a {type(value).__name__}", f"a JSON {kind.__name__}")
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
    """torch.device, refused by name where it is not there."""
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from None
    # cuDNN's attention builds a plan for every new shape, and here nearly every shape is new.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def stream(seed, *names):
    """The numpy Generator of one named purpose, which shares no draw with another."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def progress_bar(label, total, done, unit):
    """A bar that begins at `done`, its rate the mean: on a terminal only, and gone when full."""
    look = {"leave": False, "dynamic_ncols": True, "disable": None, "smoothing": 0}
    return tqdm(desc=label, total=total, initial=done, unit=f" {unit}", **look)


def option(default, help, low=None, high=math.inf, choices=None):
    """A dataclass field that is also a command line option. low, high: a number's range."""
    return field(default=default, metadata={"help": help, "range": (low, high), "choices": choices})


@dataclass
class Device:
    """Where and how a command computes."""

    device: str = option("cpu", "cpu, cuda, cuda:1, ...")
    dtype: str = option("float32", "of the weights", choices=DTYPES)
    deterministic: bool = option(False, "on a GPU: equal bits in every run, slower")


def make_parser(description, *classes):
    """A parser with the options of dataclasses made of `option` fields."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.error = lambda message: expect(False, "the command", message, "as in --help")
    items = [item for options in classes for item in fields(options)]
    for item in {item.name: item for item in items}.values():
        kinds = {"type": item.type, "choices": item.metadata["choices"]}
        if item.type is bool:  # --no-NAME, so that a flag wins over a recipe's true
            kinds = {"action": argparse.BooleanOptionalAction}
        text = f"{item.metadata['help']} (default {item.default})".replace("%", "%%")
        name = "--" + item.name.replace("_", "-")
        parser.add_argument(name, default=item.default, help=text, **kinds)
    return parser


def options_of(options, args):
    """A dataclass of options from a parser's result; refuses a number out of its range."""
    values = {item.name: getattr(args, item.name) for item in fields(options)}
    for item in fields(options):
        (low, high), value = item.metadata["range"], values[item.name]
        good = low is None or value is None or (low <= value <= high and value < math.inf)
        name = "--" + item.name.replace("_", "-")
        expect(good, name, value, f"a number from {low} to {high}")
    if values.get("deterministic"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as torch asks for
        torch.use_deterministic_algorithms(True)
    return options(**values)


def check_output(path):
    """Refuses, before the long work, an output that exists or has no folder to be in."""
    there = Path(path).exists() or not Path(path).parent.is_dir()
    expect(not there, path, "a file or no folder for it", "a path still to be made")


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
