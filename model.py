"""One checkpoint: a Llama-style transformer, its KV cache, its tokenizer and chat template.

In: a folder in Hugging Face's layout (config.json, safetensors, tokenizer.json, ...), or a hub id.
Out: `load_model(path)`, whose `model(tokens)` gives next-token logits, `load_tokenizer(path)`, and
`save_model(model, path, source)`, which writes a folder that transformers and vLLM read back.

The file goes from the leaves to the root: files and errors, config, rotary positions, attention,
block, model, cache, weights, tokenizer. Nothing here knows of thoughts, judges or preferences.

    python model.py --model DIR                    # what is in a checkpoint, and what it takes
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from bisect import bisect_right
from dataclasses import dataclass, field, fields
from datetime import datetime
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer as TokenizersTokenizer
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GIB = 2**30


# Files and errors


class InputError(Exception):
    """Something the user can mend; the message is one line: the culprit, found, expected."""


def expect(good, what, found, expected):
    """Refuses what the user can mend: an InputError that says what, found and expected."""
    if not good:
        raise InputError(f"{what}: found {found}, expected {expected}")


def run_main(main):
    """Runs a module's main(): what the user can mend ends in one line and exit status 2."""

    def terminate(signum, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
    except (InputError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        where = f" {stop}" if stop.args else ""
        again = " ".join([Path(sys.executable).name, *sys.argv])
        print(f"\nstopped{where}; the same command goes on: {again}", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def naming(path):
    """Refuses by the name of its file a write that fails where errors do not say: a full disk."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        if getattr(error, "filename", None):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be written: {reason}") from None


@contextlib.contextmanager
def write_aside(path, folder=False):
    """Yields a path beside `path`; renamed to it when the block ends well, removed when not.

    So a file, or a folder, under its final name is whole: a kill at any moment leaves the old one
    or the new. The folder to be filled is made here, empty.
    """
    path = Path(path)
    aside = path.with_name(path.name + ".partial")
    try:
        if folder:
            shutil.rmtree(aside, ignore_errors=True)  # what a kill left
            aside.mkdir(parents=True)
        with naming(path):
            yield aside
            for file in aside.iterdir() if folder else [aside]:
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            os.replace(aside, path)
    finally:
        if folder:
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def write_json(path, value):
    with write_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path):
    """The JSON object in the file `path`, as a dict."""
    return parse_object(path, existing(path).read_bytes())


def read_jsonl(path):
    """Yields (line number, row as a dict) of a file of JSON lines; passes over blank lines."""
    path = existing(path)
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, parse_object(f"{path}:{number}", line)


def existing(path):
    """Path(path), refused where there is no such file."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    return Path(path)


def parse_json(where, data):
    """The value of bytes of UTF-8 JSON; `where` they stand is for the error."""
    try:
        value = json.loads(data.decode("utf-8"))
        if b"\\ud" in data.lower():  # half of a surrogate pair can be escaped, but is no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not UTF-8 JSON: {error}") from None
    return value


def parse_object(where, data):
    value = parse_json(where, data)
    expect(isinstance(value, dict), where, f"a {type(value).__name__}", "a JSON object")
    return value


def write_jsonl(path, rows):
    with write_aside(path) as aside, open(aside, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_groups(path, key, make_groups):
    """Writes a file of JSON lines group by group, so that a kill loses only the group in hand.

    make_groups(done) yields lists of rows from group `done` on. Until the last one, groups stand
    in `path`.groups, one line each under a first line with `key`: what the rows depend on.
    """
    path = Path(path)
    groups = path.with_name(path.name + ".groups")
    if not path.exists():
        done = resume_groups(groups, key)
        with open(groups, "ab", buffering=0) as file:
            for rows in make_groups(done):
                line = json.dumps(rows, ensure_ascii=False).encode() + b"\n"
                with naming(groups):
                    while line:  # the system may take a part
                        line = line[file.write(line) :]
                    os.fsync(file.fileno())
        with open(groups, "rb") as file:
            next(file)
            write_jsonl(path, (row for line in file for row in parse_json(groups, line)))
    groups.unlink(missing_ok=True)


def resume_groups(groups, key):
    """Cuts a file of groups after its last whole one and returns how many it holds."""
    if not groups.exists():
        with write_aside(groups) as aside:
            aside.write_text(json.dumps(key) + "\n")
    with open(groups, "rb+") as file:
        found = parse_object(groups, file.readline())
        for name in {**found, **key}:
            if found.get(name) != key.get(name):
                raise InputError(
                    f"{groups}: begun with {name} = {found.get(name)!r}, now {key.get(name)!r}; "
                    "expected the same, or the file removed"
                )
        done, end = 0, file.tell()
        for line in file:
            if line.endswith(b"\n"):
                done, end = done + 1, end + len(line)
        file.truncate(end)
    return done


def file_hash(path):
    """sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hash(folder):
    """sha256 of what a checkpoint's folder holds: names and bytes of its files."""
    kinds = (".json", ".safetensors", ".jinja")
    files = sorted(path for path in Path(folder).iterdir() if path.suffix in kinds)
    text = json.dumps([(path.name, file_hash(path)) for path in files])
    return hashlib.sha256(text.encode()).hexdigest()


def check_output(path):
    """Refuses, before the long work, an output that exists or cannot be written."""
    path = Path(path)
    if path.exists():
        raise InputError(f"{path}: already exists, expected a path still to be made")
    folder = path.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{path}: expected {folder} to be a folder that can be written to")


def check_range(option, value, low, high=math.inf):
    """Refuses a number outside low..high, and NaN."""
    good = low <= value <= high and value != math.inf
    expect(good, option, value, f"a number from {low} to {high}")


def option(default, help, low=None, high=math.inf, choices=None, kind=None):
    """A dataclass field that is also a command line option: its help names the default's source."""
    kind = kind or type(default)
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "kind": kind}
    return field(default=default, metadata=metadata)


def add_options(parser, *classes):
    """Gives a parser the options of dataclasses whose fields are made by `option`.

    What is not on the command line is not in the namespace, so that a recipe can give it.
    """
    switch = argparse.BooleanOptionalAction  # --no-NAME, so that a flag wins over a recipe's true
    for item in {item.name: item for options in classes for item in fields(options)}.values():
        kind, choices = item.metadata["kind"], item.metadata["choices"]
        text = f"{item.metadata['help']} (default {item.default})"
        parser.add_argument(
            "--" + item.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
            **({"action": switch} if kind is bool else {"type": kind, "choices": choices}),
        )


def read_options(options, values):
    """A dataclass of options from a mapping of names, each checked against its range."""
    values = {item.name: values.get(item.name, item.default) for item in fields(options)}
    for item in fields(options):
        value, rule = values[item.name], item.metadata
        name = "--" + item.name.replace("_", "-")
        if value is None and item.default is None:
            continue
        kind = (int, float) if rule["kind"] is float else rule["kind"]
        good = isinstance(value, kind) and isinstance(value, bool) == (rule["kind"] is bool)
        expect(good, name, repr(value), rule["kind"].__name__)
        good = not rule["choices"] or value in rule["choices"]
        expect(good, name, repr(value), f"one of {list(rule['choices'] or ())}")
        if rule["low"] is not None:
            check_range(name, value, rule["low"], rule["high"])
    return options(**values)


def stream(seed, *names):
    """The random stream of one named purpose: a numpy Generator that shares no draw with another.

    >>> stream(0, "completion", 3, 1).random() == stream(0, "completion", 3, 1).random()
    True
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def checkpoint_folder(path, revision=None):
    """The folder of a checkpoint: `path` itself, or a hub id downloaded to the hub's own cache.

    revision: the commit to take of a hub id (default: the newest). The name of the folder is it.
    """
    path = str(path)
    if os.path.isdir(path):
        return Path(path)
    expect(not os.path.exists(path), path, "a file", "a checkpoint folder")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path):
        raise InputError(f"{path}: no such folder")
    return hub_folder(path, revision)


@functools.cache  # the hub is asked once: it may have another revision the next time
def hub_folder(name, revision):
    from huggingface_hub import HfApi, snapshot_download  # installed with tokenizers

    def download(**where):
        kinds = ["*.json", "*.safetensors", "*.jinja"]
        patterns = {"allow_patterns": kinds, "ignore_patterns": ["*/*"]}
        return Path(snapshot_download(name, revision=revision, **patterns, **where))

    if revision:
        with contextlib.suppress(Exception):  # downloaded before, it needs no answer of the hub
            return download(local_files_only=True)
    reason = None
    try:  # the download asks for the revision too, but would wait for an answer without end
        revision = HfApi().model_info(name, revision=revision, timeout=10).sha
    except Exception as error:  # the hub's client fails in many ways; each is one line here
        reason = error
    try:  # without an answer, what was downloaded before
        return download(local_files_only=reason is not None)
    except Exception as error:
        reason = f"{type(reason or error).__name__}: {reason or error}"
        raise InputError(f"{name}: no such folder, and the hub gave none ({reason})") from None


def inside(folder, name):
    """folder/name, refused when it leads out of the checkpoint's folder.

    The hub's cache keeps the files of `models--org--name/snapshots/revision` as links to
    `models--org--name/blobs`, so links within that repository's own cache folder are allowed.
    """
    path = folder / name
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if not path.resolve().is_relative_to(root):
        raise InputError(f"{path}: leads to {path.resolve()}, outside the checkpoint's folder")
    return path


# Config


@dataclass(frozen=True)
class Config:
    """The sizes of a checkpoint, from its config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope: dict  # rope_type, rope_theta and the scaling's numbers, in transformers 5's spelling
    tied: bool  # the output head is the embedding
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool


def read_config(folder):
    """config.json of a llama, mistral or qwen2 checkpoint; refuses by name what is not one."""
    file = Path(folder) / "config.json"
    raw = read_json(file)

    def check(good, key, expected):
        expect(good, f"{file}: {key}", repr(raw.get(key)), expected)

    def size(key, default=None, most=2**20):
        value = default if raw.get(key) is None else raw[key]
        good = type(value) is int and 0 < value <= most
        check(good, key, f"a whole number from 1 to {most}")
        return value

    def flag(key):
        check(raw.get(key) is None or isinstance(raw[key], bool), key, "true or false")
        return bool(raw.get(key))

    family = raw.get("model_type")
    check(family in ("llama", "mistral", "qwen2"), "model_type", "llama, mistral or qwen2")
    check(raw.get("quantization_config") is None, "quantization_config", "float weights")
    check(raw.get("hidden_act", "silu") == "silu", "hidden_act", "silu")
    layers = size("num_hidden_layers", most=1000)
    max_positions = size("max_position_embeddings", most=2**30)
    if family == "mistral" or (family == "qwen2" and flag("use_sliding_window")):
        window = raw.setdefault("sliding_window", 4096)  # what leaving it out means there
        check(window in (None, max_positions), "sliding_window", "null: full attention")
    full = raw.get("layer_types") in (None, ["full_attention"] * layers)
    check(full, "layer_types", f"full_attention {layers} times")
    hidden, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads = size("num_key_value_heads", heads)
    check(heads % kv_heads == 0, "num_key_value_heads", f"a divisor of the {heads} heads")
    if raw.get("head_dim") is None:
        check(hidden % heads == 0, "hidden_size", f"a multiple of the {heads} heads")
    head_dim = size("head_dim", hidden // heads)
    check(head_dim % 2 == 0, "head_dim", "an even number")
    norm_eps = raw.get("rms_norm_eps", 1e-6)
    check(type(norm_eps) is float and 0 < norm_eps < 1, "rms_norm_eps", "a number from 0 to 1")
    bias = family == "llama" and flag("attention_bias")
    return Config(
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=max_positions,
        norm_eps=norm_eps,
        rope=read_rope(raw, file),
        tied=flag("tie_word_embeddings"),
        qkv_bias=bias or family == "qwen2",
        output_bias=bias,
        mlp_bias=family == "llama" and flag("mlp_bias"),
    )


LLAMA3_BOUNDS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_NUMBERS = {"default": (), "linear": ("factor",), "llama3": ("factor", *LLAMA3_BOUNDS)}


def read_rope(raw, file):
    """The rotary settings, from transformers 5's `rope_parameters` or the older two keys."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    flat = isinstance(rope, dict) and not any(isinstance(v, dict) for v in rope.values())
    expect(flat, f"{file}: rope_scaling", repr(rope), "one object for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = isinstance(kind, str) and kind in ROPE_NUMBERS
    expect(known, f"{file}: rope_type", repr(kind), "default, linear or llama3")
    rope = {"rope_theta": raw.get("rope_theta") or 10000.0, **rope, "rope_type": kind}
    for key in ("rope_theta", *ROPE_NUMBERS[kind]):
        value = rope.get(key)
        good = type(value) in (int, float) and 0 < value < 1e12
        expect(good, f"{file}: rope {key}", repr(value), "a number above 0")
    turned = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1))
    expect(turned == 1, f"{file}: partial_rotary_factor", turned, "1: all dimensions turn")
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        expect(low < high, f"{file}: rope low_freq_factor", low, f"less than {high}")
    return rope


# The transformer


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


def widen(x):
    """x in float32; in float64 where it is so already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x, cos, sin):
    """Turns each pair (x1, x2) of (B, H, T, head_dim) by its angle, in float32."""
    x1, x2 = widen(x).chunk(2, dim=-1)  # (B, H, T, head_dim / 2), Hugging Face's order of halves
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.norm_eps

    def forward(self, x):
        wide = widen(x)  # bf16 squares lose too much
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


ALL = slice(None)  # `kept`: the places in a row that are wanted, a list of them or all


def causal_attention(layer, q, k, v, kept=ALL):
    """The plain `attend`: each of B rows is one sequence.

    q (B, H, kept, head_dim), k and v (B, KV, T, head_dim) -> (B, H, kept, head_dim).
    """
    if kept == ALL:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    places = torch.tensor(kept, device=k.device)
    mask = torch.arange(k.shape[2], device=k.device) <= places[:, None]  # (kept, T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class Attention(nn.Module):
    """Grouped-query attention. Who sees whom is the caller's: `attend(layer, q, k, v, kept)`.

    One transformer so serves training (causal_attention, PackedAttention) and sampling (KVCache).
    Queries are those of the places `kept`, keys and values those of all.
    """

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_size, kv_size = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.output_bias)

    def forward(self, x, cos, sin, attend, kept=ALL):
        heads = (-1, self.head_dim)
        q = self.q_proj(x[:, kept]).unflatten(2, heads).transpose(1, 2)  # (B, H, kept, head_dim)
        k = self.k_proj(x).unflatten(2, heads).transpose(1, 2)  # (B, KV, T, head_dim)
        v = self.v_proj(x).unflatten(2, heads).transpose(1, 2)  # (B, KV, T, head_dim)
        q, k = rotate(q, cos[:, :, kept], sin[:, :, kept]), rotate(k, cos, sin)
        out = attend(self.layer, q, k, v, kept)  # (B, H, kept, head_dim)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, kept, hidden)


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
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend, kept=ALL):
        x = x[:, kept] + self.self_attn(self.input_layernorm(x), cos, sin, attend, kept)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, blocks, final norm: tokens to hidden states. Policy and judge share it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config)
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

    def forward(self, tokens, positions=None, attend=causal_attention, recompute=0, kept=ALL):
        """(B, T) int64 -> (B, T, hidden).

        positions: (B, T) int64, default 0..T-1. attend: who sees whom, see Attention.
        recompute: gradient checkpointing, the number of blocks (from the first) that keep only
        their input and compute the rest again in the backward pass.
        kept: the places in a row that are wanted, a list (default: all). Of the others the last
        block computes keys and values alone, and the result is (B, len(kept), hidden).
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        angles = positions[:, None, :, None] * self.frequencies  # (B, 1, T, head_dim / 2) float32
        cos, sin = angles.cos(), angles.sin()
        x = self.embed_tokens(tokens)
        for i, block in enumerate(self.layers):
            places = kept if block is self.layers[-1] else ALL
            if i < recompute:
                x = checkpoint(block, x, cos, sin, attend, places, use_reentrant=False)
            else:
                x = block(x, cos, sin, attend, places)
        return self.norm(x)


class LanguageModel(nn.Module):
    """A trunk and an output head; parameter names are Hugging Face's."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self):
        """The output head's weight: (V, hidden)."""
        return self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def forward(self, tokens):
        """(B, T) int64 -> logits (B, T, V). Rows may be padded on the right: causal attention."""
        return F.linear(self.model(tokens), self.head)


# Packing: sequences of unequal length without padding


class PackedAttention:
    """Attention inside one packed row, where some sequences share their beginning.

    pieces: (length, prefix) each, in the row's order, prefix being None or (piece, P): the first P
    tokens of an earlier piece, which this one continues. A piece sees its prefix whole and itself
    causally, and nothing else.
    """

    def __init__(self, pieces):
        self.lengths = [length for length, _ in pieces]
        self.prefixes = [prefix for _, prefix in pieces]
        self.starts = [0, *accumulate(self.lengths)]

    def __call__(self, layer, q, k, v, kept=ALL):
        """(1, H, kept, head_dim), (1, KV, N, head_dim) twice -> (1, H, kept, head_dim)."""
        if kept != ALL:
            queries = zip(q.split(1, dim=2), kept, strict=True)
            return torch.cat([self.attend_one(one, k, v, place) for one, place in queries], dim=2)
        # Split, not sliced: the gradient of a slice is as long as the row, once for every piece.
        q, k, v = (x.split(self.lengths, dim=2) for x in (q, k, v))
        return torch.cat([self.attend(i, q, k, v) for i in range(len(q))], dim=2)

    def attend(self, i, q, k, v):
        if self.prefixes[i] is None:
            return causal_attention(None, q[i], k[i], v[i])
        piece, P = self.prefixes[i]
        T = q[i].shape[2]
        keys = torch.cat([k[piece][:, :, :P], k[i]], dim=2)  # (1, KV, P + T, head_dim)
        values = torch.cat([v[piece][:, :, :P], v[i]], dim=2)
        if q[i].device.type == "cpu" and 2 * P <= T:
            # There the mask is a tensor: a short prefix's rows, run again and dropped, cost less.
            queries = torch.cat([q[piece][:, :, :P], q[i]], dim=2)  # (1, H, P + T, head_dim)
            return causal_attention(None, queries, keys, values)[:, :, P:]
        mask = causal_lower_right(T, P + T)  # row t sees P + t + 1 keys
        return F.scaled_dot_product_attention(q[i], keys, values, attn_mask=mask, enable_gqa=True)

    def attend_one(self, q, k, v, place):
        """The attention of one place of the row. q (1, H, 1, head_dim), k and v the row's."""
        i = bisect_right(self.starts, place) - 1
        seen = [slice(self.starts[i], place + 1)]
        if self.prefixes[i] is not None:
            piece, P = self.prefixes[i]
            seen.insert(0, slice(self.starts[piece], self.starts[piece] + P))
        k, v = (torch.cat([x[:, :, places] for places in seen], dim=2) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def pack(trees, device="cpu"):
    """Lays prompts and their continuations end to end in one row, each prompt once.

    trees: (prompt ids, list of continuations' ids) pairs. Returns tokens (1, N) int64,
    positions (1, N) int64, the attention to pass to the trunk, and for each tree the offset of
    its prompt and the offsets of its continuations in the row.

    >>> tokens, positions, _, offsets = pack([([5, 6], [[7], [8, 9]]), ([4], [])])
    >>> tokens.tolist(), positions.tolist(), offsets
    ([[5, 6, 7, 8, 9, 4]], [[0, 1, 2, 2, 3, 0]], [(0, [2, 3]), (5, [])])
    """
    tokens, positions, pieces, offsets = [], [], [], []
    for prompt, continuations in trees:
        offsets.append((len(tokens), []))
        prefix, before = None, len(prompt)  # the prompt and what follows it at once are one piece
        tokens += prompt
        positions += range(len(prompt))
        for ids in continuations:
            offsets[-1][1].append(len(tokens))
            tokens += ids
            positions += range(len(prompt), len(prompt) + len(ids))
            if before + len(ids):
                pieces.append((before + len(ids), prefix))
            if before:
                prefix, before = (len(pieces) - 1, len(prompt)), 0
        if before:
            pieces.append((before, None))
    tokens = torch.tensor([tokens], device=device)
    positions = torch.tensor([positions], device=device)
    return tokens, positions, PackedAttention(pieces), offsets


def shared_length(sequences):
    """How many first ids all sequences have in common, each keeping at least one for itself.

    >>> shared_length([(1, 2, 3), (1, 2, 4, 5)]), shared_length([(1, 2, 3)]), shared_length([])
    (2, 2, 0)
    """
    if not sequences:
        return 0
    low, high = min(sequences), max(sequences)  # as in a dictionary: these part first
    most = min(map(len, sequences)) - 1
    return next((i for i in range(most) if low[i] != high[i]), most)


def fill(items, sizes, most):
    """Cuts a list, in order, into lists whose sizes sum to `most` at most, or of one item."""
    parts, room = [], 0
    for item, size in zip(items, sizes, strict=True):
        if size > room:
            parts.append([])
            room = most
        parts[-1].append(item)
        room -= size
    return parts


class KVCache:
    """Keys and values of a fixed number of slots, each a sequence at its own position.

    Allocated once: k and v are (layers, slots, KV, length, head_dim). It is passed to the trunk
    as an attention and knows nothing of the model that fills it.
    """

    def __init__(self, config, slots, length, device, dtype):
        shape = (config.num_layers, slots, config.num_kv_heads, length, config.head_dim)
        # Zeros, not empty: a masked position has weight 0, and 0 * NaN would still be NaN.
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    @staticmethod
    def bytes_per_token(config, dtype):
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize

    def write(self, slot, k, v):
        """Starts a slot with a prompt's keys and values, (layers, KV, T, head_dim) each."""
        self.k[:, slot, :, : k.shape[2]] = k
        self.v[:, slot, :, : v.shape[2]] = v

    def move(self, source, target, length):
        """Copies the first `length` positions of one slot to another."""
        self.write(target, self.k[:, source, :, :length], self.v[:, source, :, :length])

    def step(self, positions, length):
        """The attention of one new token in each of the first B slots.

        positions (B,): where each token goes, all below `length`: the keys that are read.
        """
        B = len(positions)
        rows = torch.arange(B, device=positions.device)
        unseen = torch.arange(length, device=positions.device) > positions[:, None]  # (B, length)
        # Added to the scores: attention would make it of booleans again in every layer.
        mask = torch.zeros_like(unseen, dtype=self.k.dtype).masked_fill(unseen, -math.inf)
        mask = mask[:, None, None]  # (B, 1, 1, length)

        def attend(layer, q, k, v, kept):
            self.k[layer, rows, :, positions] = k[:, :, 0]
            self.v[layer, rows, :, positions] = v[:, :, 0]
            # The query heads of a group stand where a sequence would: no key is repeated.
            grouped = q.view(B, k.shape[1], -1, q.shape[3])  # (B, KV, H / KV, head_dim)
            keys, values = self.k[layer, :B, :, :length], self.v[layer, :B, :, :length]
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
            return out.view(q.shape)  # (B, H, 1, head_dim)

        return attend


# Weights


def weight_files(folder):
    """The safetensors files of a checkpoint: one, or the shards that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [inside(folder, single.name)]
    if not index.exists():
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        found = f"only {pickles[0].name}, a pickle, which is never read" if pickles else "none"
        raise InputError(f"{folder}: weights: found {found}, expected model.safetensors")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{index}: weight_map: expected an object of tensor names and files")
    names = list(dict.fromkeys(map(str, shards.values())))
    for name in names:
        plain = re.fullmatch(r"[\w.-]{1,200}", name)
        if not plain or not inside(folder, name).is_file():
            raise InputError(f"{index}: names the shard {name!r}, which is not in {folder}")
    return [folder / name for name in names]


def load_weights(module, folder, device, dtype):
    """Fills a module built on the meta device, tensor by tensor: never two copies of a model."""
    missing = dict(module.named_parameters())
    missing |= {name: b for name, b in module.named_buffers() if name != "model.frequencies"}
    tied = "lm_head.weight" not in missing  # some tied checkpoints store the copy all the same
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for name in sorted(tensors.keys()):
                    if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
                        continue
                    where = f"{file}: tensor {name}"
                    if name not in missing:
                        raise InputError(f"{where} is not in this model, or stands there twice")
                    tensor, shape = tensors.get_tensor(name), list(missing.pop(name).shape)
                    floats = tensor.dtype in DTYPES.values()
                    expect(floats, where, tensor.dtype, "float32, bfloat16 or float16")
                    found = list(tensor.shape)
                    expect(found == shape, where, f"shape {found}", f"{shape}, by config.json")
                    tensor = tensor.to(dtype, copy=True)
                    finite = tensor.isfinite().all()
                    expect(finite, where, "infinite values or NaN", f"finite values in {dtype}")
                    place(module, name, tensor)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a whole safetensors file: {error}") from None
    if missing:
        raise InputError(f"{folder}: tensor {min(missing)} is missing ({len(missing)} in all)")
    module.model.frequencies = rope_frequencies(module.config).to(device)
    return module


def place(module, name, tensor):
    """Puts a tensor where the meta parameter or buffer `name` stood."""
    owner, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner)
    setattr(owner, leaf, nn.Parameter(tensor) if leaf in owner._parameters else tensor)


def check_device(device):
    """torch.device, refused by name where it is not there."""
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device}: not available here: {reason}") from None
    return device


def load_model(path, device="cpu", dtype=torch.float32):
    """A causal language model from a checkpoint folder or hub id, in evaluation mode."""
    device, folder = check_device(device), checkpoint_folder(path)
    config, file = read_config(folder), folder / "config.json"
    kinds = read_json(file).get("architectures") or ["LlamaForCausalLM"]
    causal = isinstance(kinds, list) and str(kinds[0]).endswith("ForCausalLM")
    expect(causal, f"{file}: architectures", kinds, "a causal language model")
    with torch.device("meta"):
        model = LanguageModel(config)
    return load_weights(model, folder, device, dtype).eval()


COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
SHARD_BYTES = 5e9  # the limit that transformers long had, and that the public checkpoints follow


def save_model(model, path, source):
    """Writes a checkpoint folder: weights, and the config and tokenizer files of `source`.

    Written aside as `path`.partial and renamed, so that a folder under its own name is whole.
    """
    path, source = Path(path), checkpoint_folder(source)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: already exists, expected a folder still to be made")
    with write_aside(path, folder=True) as aside:
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        save_shards(tensors, aside)
        config = read_json(inside(source, "config.json"))
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
        write_json(aside / "config.json", config)
        for name in COPIED_FILES:
            if (source / name).is_file():
                shutil.copyfile(inside(source, name), aside / name)


def save_shards(tensors, folder):
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    shards = fill(tensors.items(), (tensor.nbytes for tensor in tensors.values()), SHARD_BYTES)
    shards = [dict(shard) for shard in shards]
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


# Tokenizer and chat template


class Tokenizer:
    """tokenizer.json with the checkpoint's own chat template and stop tokens."""

    def __init__(self, folder, tokenizer, template, special, stop_ids):
        self.folder, self.tokenizer, self.template = folder, tokenizer, template
        self.special = special  # bos_token, eos_token, ... as text, for the template
        self.stop_ids = stop_ids

    def encode(self, text, add_special_tokens=True):
        """Token ids of a text, list of int; BOS and the like as Hugging Face adds them."""
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids, skip_special_tokens=False):
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages, add_generation_prompt=True):
        """The chat as text. messages: a list of {"role": ..., "content": ...}."""
        where = f"{self.folder}: chat_template"
        expect(self.template is not None, where, "none", "one in tokenizer_config.json")
        values = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return render(self.template, values | {"tools": None, "documents": None} | self.special)
        except Exception as error:  # whatever a stranger's template does wrong, in its own words
            raise InputError(f"{where}: {type(error).__name__}: {error}") from None

    def apply_chat_template(self, messages, add_generation_prompt=True):
        """The chat as token ids; the template writes BOS itself, so none is added."""
        text = self.render_chat(messages, add_generation_prompt)
        return self.encode(text, add_special_tokens=False)


def load_tokenizer(path):
    """The tokenizer of a checkpoint folder or hub id."""
    folder = checkpoint_folder(path)
    file = existing(folder / "tokenizer.json")
    try:
        tokenizer = TokenizersTokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{file}: not a tokenizer: {error}") from None
    own, generation, config = (
        read_json(folder / name) if (folder / name).exists() else {}
        for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    )
    special = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = own.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            special[key] = value
    stops = generation.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    good = all(type(i) is int and i >= 0 for i in stops)
    expect(good, f"{folder}/generation_config.json: eos_token_id", stops, "token ids")
    if "eos_token" in special:
        eos = tokenizer.token_to_id(special["eos_token"])
        where = f"{folder}/tokenizer_config.json: eos_token"
        expect(eos is not None, where, repr(special["eos_token"]), "a token of tokenizer.json")
        stops = [*stops, eos]
    top = max([*stops, *tokenizer.get_vocab().values()], default=0)
    rows = config.get("vocab_size")
    good = type(rows) is not int or top < rows
    expect(good, file, f"token id {top}", f"one below config.json's vocab_size, {rows}")
    template = read_template(folder, own)
    return Tokenizer(folder, tokenizer, template, special, tuple(sorted(set(stops))))


TEMPLATE_SECONDS = 2.0
TEMPLATE_CHARACTERS = 10_000_000
TEMPLATE_BYTES = 2**27  # beyond what the process holds before


def read_template(folder, config):
    """The compiled chat template: chat_template.jinja, or tokenizer_config's; None without one."""
    import jinja2  # installed with torch
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, indent=None):  # jinja2's own escapes HTML, which no model was trained on
        return json.dumps(value, ensure_ascii=False, indent=indent)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context, operator, left, right):
            if not all(isinstance(x, (int, float)) and abs(x) < 1e6 for x in (left, right)):
                raise jinja2.TemplateError(f"{operator} of large or non-numeric values")
            return super().call_binop(context, operator, left, right)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    file, source = folder / "chat_template.jinja", config.get("chat_template")
    try:
        if file.is_file():
            source = file.read_text(encoding="utf-8")
        if isinstance(source, list):  # several named templates
            source = {template["name"]: template["template"] for template in source}.get("default")
        with bounded():  # constant parts are computed as it is compiled
            return None if source is None else environment.from_string(source)
    except Exception as error:  # as in render_chat
        reason = f"does not parse: {type(error).__name__}: {error}"
        raise InputError(f"{folder}: chat_template: {reason}") from None


@contextlib.contextmanager
def bounded():
    """Ends a stranger's template that runs on (TimeoutError) or takes much memory (MemoryError).

    Memory is the process's own limit, the only one that holds inside a call of C; Linux alone
    tells how much is in use, so elsewhere there is none.
    """
    deadline = time.thread_time() + TEMPLATE_SECONDS  # so a busy machine fails no template

    def watch(frame, event, argument):
        if time.thread_time() > deadline:
            raise TimeoutError(f"still running after {TEMPLATE_SECONDS} s")
        return watch

    outer, (soft, hard) = sys.gettrace(), resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + TEMPLATE_BYTES
        most = most if soft == resource.RLIM_INFINITY else min(soft, most)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    sys.settrace(watch)
    try:
        yield
    except MemoryError:
        raise MemoryError(f"takes over {TEMPLATE_BYTES >> 20} MiB") from None
    finally:
        sys.settrace(outer)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def render(template, values):
    """A template's text; refuses one that runs, grows or writes without end."""
    text = ""
    with bounded():
        for piece in template.generate(**values):
            text += piece
            if len(text) > TEMPLATE_CHARACTERS:
                raise ValueError(f"wrote over {TEMPLATE_CHARACTERS} characters")
    return text


def main():
    parser = argparse.ArgumentParser(description="What is in a checkpoint, and what it takes.")
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    args = parser.parse_args()
    folder = checkpoint_folder(args.model)
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    with torch.device("meta"):
        count = sum(p.numel() for p in LanguageModel(config).parameters())
    for key, value in vars(config).items():
        print(f"{key:18} {value}")
    print(f"{'stop ids':18} {list(tokenizer.stop_ids)}")
    print(f"{'parameters':18} {count:,} ({2 * count / GIB:.2f} GiB in bf16)")
    cache = KVCache.bytes_per_token(config, torch.bfloat16)
    print(f"{'cache':18} {cache:,} bytes a token in bf16")


if __name__ == "__main__":
    run_main(main)
