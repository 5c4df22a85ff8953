"""What the benchmarks share: the claimed ratios, models of public sizes, timing, peak memory."""

import importlib.util
import re
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import conftest  # puts the project and the fixtures on sys.path

# isort: split
import model as lm

import torch

TESTS = Path(conftest.__file__).parent
# The ratios of README.md beside this file: "at least" or "at most" a bound, which leaves room
# for another machine.
CLAIMS = {
    "rows wait for the slowest, as in a plain loop": ("at least", 2.0),
    "each prompt prefilled K times": ("at least", 1.05),
    "transformers' `generate`, 24 rows": ("at least", 4.0),
    "transformers' `generate`, 96 rows": ("at least", 4.0),
    "transformers, best of 4, 8 and 16 a batch": ("at least", 1.05),
    "TRL, seconds an epoch": ("at least", 1.8),
    "TRL, our share of its peak memory": ("at most", 0.4),
}


def check_claims(measured, timed=True):
    """Prints of every claim whether it holds; returns how many no longer do.

    measured: {name: ratio}. timed: false where the sizes are others, so nothing follows.
    """
    lost = 0
    for name, (side, bound) in CLAIMS.items():
        if name not in measured:
            print(f"not measured: {name}, {side} {bound}")
            continue
        ratio = measured[name]
        holds = ratio >= bound if side == "at least" else ratio <= bound
        lost += timed and not holds
        verdict = "other sizes" if not timed else "holds" if holds else "no longer holds"
        print(f"{verdict}: {name}: measured {ratio:.2f}, claimed {side} {bound}")
    return lost


# vocabulary, width, MLP width, layers, heads, KV heads, head width
SHAPES = {
    "tiny": (500, 64, 128, 2, 4, 2, 16),
    "cpu-19m": (8000, 384, 1024, 8, 6, 2, 64),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 8, 128),
}


def random_model(shape, device="cpu", dtype=torch.float32, kind=lm.LanguageModel):
    """A model of a shape above with random weights, made where it stays; its logits are flat."""
    names = (*lm.SIZES, "num_key_value_heads", "head_dim")
    config = SimpleNamespace(
        **dict(zip(names, SHAPES[shape], strict=True)),
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        head_norms=False,
        rotated=[1] * SHAPES[shape][3],
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = kind(config).to(dtype)
    model.to_empty(device=device).eval()
    model.model.frequencies = lm.rope_frequencies(config).to(device)
    for name, p in model.named_parameters():
        with torch.no_grad():
            p.fill_(1) if name.endswith("norm.weight") else p.normal_(std=0.02)
    return model


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function):
    """(seconds, result) of one call, the device's queue emptied before and after."""
    synchronize()
    began = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - began, result


def alternate(functions, repeats):
    """{name: list of results} of functions called in turn, once unmeasured and then `repeats`."""
    results = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            result = function()
            if i:
                results[name].append(result)
    return results


def padded_batches(chats, size, pad, device="cpu"):
    """Yields (places, inputs) as transformers takes them: lists of ids, sorted by length."""
    order = sorted(range(len(chats)), key=lambda i: len(chats[i]))
    for first in range(0, len(order), size):
        places = order[first : first + size]
        width = max(len(chats[i]) for i in places)
        ids = torch.tensor([[*chats[i], *[pad] * (width - len(chats[i]))] for i in places])
        mask = torch.arange(width) < torch.tensor([len(chats[i]) for i in places])[:, None]
        yield places, {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}


def spread(values, form=",.0f"):
    middle = statistics.median(values)
    return f"{middle:{form}} ({min(values):{form}} to {max(values):{form}})"


def peak_memory():
    """Most bytes in use so far: of the GPU's tensors, or without one of this whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage there counts what the process that began this one held
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on macOS


def installed(name):
    spec = importlib.util.find_spec(name)
    if spec and spec.origin:  # a folder of that name, as in tests/fixtures, has none
        return True
    print(f"{name} is not installed: no peer")
    return False
