"""Every speed and memory figure of the README for the CPU, measured again beside a named peer.

    python tests/benchmarks                     # all of them
    python tests/benchmarks dpo                 # one of sampling, judge, dpo
    python tests/benchmarks --short             # tiny sizes, to see that it still runs
    python tests/benchmarks sampling --model DIR    # real weights; dpo takes them too
    python tests/benchmarks/gpu.py              # the figures for a GPU

The files are bench_sampling.py, bench_judge.py and bench_dpo.py, so that none is called as a module
of the project. A peer, transformers or TRL, that is not installed is left out and said to be. The
variants of one table alternate, are repeated, and are given as median (lowest to highest); compare
ratios, not seconds. Last comes which claimed ratios still hold; exit status 1 where one does not.
"""

import argparse
import os
import platform
import sys

import bench
import bench_dpo
import bench_judge
import bench_sampling
import torch

PARTS = {"sampling": bench_sampling.run, "judge": bench_judge.run, "dpo": bench_dpo.run}


def main():
    parser = argparse.ArgumentParser(
        prog="python tests/benchmarks", description="Measures the figures of README.md again."
    )
    add = parser.add_argument
    add("part", nargs="?", choices=PARTS, help="one table (default: all)")
    add("--short", action="store_true", help="tiny sizes and one repeat, to see that it runs")
    add("--model", help="sampling, dpo: a checkpoint folder, for a table of real weights")
    add("--texts", help="judge, dpo: JSON lines of an instruction and responses beside it")
    add("--repeats", type=int, default=3, help="measured runs of each variant (default 3)")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    parts = [args.part] if args.part else [p for p in PARTS if p != "judge" or not args.model]
    measured = {}
    for part in parts:
        measured |= PARTS[part](args)
    if not args.model:
        sys.exit(1 if bench.check_claims(measured, timed=not args.short) else 0)


if __name__ == "__main__":
    main()
