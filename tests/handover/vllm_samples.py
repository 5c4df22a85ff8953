"""Samples drawn by vLLM, in the file that sample.py would write: it reads and parses as sample.py.

    python tests/handover/vllm_samples.py MODEL INSTRUCTIONS SAMPLES

The draws are vLLM's own. What such a file must have stands at the head of sample.py.
"""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from model import checkpoint_folder, load_tokenizer, read_config, write_jsonl
from sample import Completion, make_prompts, read_instructions, read_output

model, instructions, samples = sys.argv[1:]
folder = checkpoint_folder(model)
style = "specific"
tokenizer = load_tokenizer(folder)
rows = read_instructions(instructions)
rows = make_prompts(rows, tokenizer, style, read_config(folder), instructions)
prompts = [{"prompt_token_ids": row["prompt_ids"]} for row in rows]  # a text would get BOS twice
stops = list(tokenizer.stop_ids)
law = {"n": 8, "temperature": 0.8, "top_p": 0.95, "max_tokens": 2048, "stop_token_ids": stops}
if __name__ == "__main__":  # vLLM may start processes that import this file
    llm = LLM(model=str(folder), tensor_parallel_size=8)
    results = llm.generate(prompts, SamplingParams(**law, detokenize=False))
    for row, result in zip(rows, results, strict=True):
        drawn = [list(output.token_ids) for output in result.outputs]
        # The stop token is the last of the ids; an output that ran into the limit has none.
        drawn = [Completion(ids, finished=ids[-1] in stops) for ids in drawn]
        row["outputs"] = [read_output(completion, tokenizer, style) for completion in drawn]
    write_jsonl(samples, rows)
