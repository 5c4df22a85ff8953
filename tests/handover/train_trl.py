"""DPO by TRL on the very ids of a pairs file, on as many GPUs as accelerate is given.

    accelerate launch ... tests/handover/train_trl.py MODEL PAIRS [any option of DPOConfig]

`trl dpo` itself would make ids of the texts anew: BOS comes twice for a tokenizer that adds it,
outputs that ran into the limit get an EOS that the model never drew, and what is beyond 1,024
tokens is cut off. README.md beside this file has the whole command.
"""

import sys

import datasets
import trl


class OnTheseIds(trl.DPOTrainer):
    def _prepare_dataset(self, dataset, *_):
        return dataset  # prompt_ids, chosen_ids and rejected_ids are there already


model, pairs, *words = sys.argv[1:]
(options,) = trl.TrlParser(trl.DPOConfig).parse_args_and_config(words)
options.max_length = None
# Read as a file, it has a cache in which all processes find the reference's log-probabilities.
rows = datasets.load_dataset("json", data_files=pairs, split="train")
trainer = OnTheseIds(model, args=options, train_dataset=rows)
trainer.train()
trainer.save_model()
