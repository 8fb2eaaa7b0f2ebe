"""What a request costs at serving time: a DCN without profiles, with ids from the feature bank, with a text embedding per user.

    python tests/bench_serving.py                     # 10,000 instances as 100 requests of 100 candidates, interleaved, 2 min
    python tests/bench_serving.py --batch-size 1000   # larger requests
    python tests/bench_serving.py --quick

dcn: user and item id. dcn_ids: the same and the user's two ids, looked up in feature_bank.npy. dcn_text: the same and a d-wide text
embedding per user through a projection (what KAR-like methods serve; d = 4096, Llama-2-7B's width). Latency of scoring all instances in
batches, lookups included. Prints a table of medians and, last, one JSON object.
"""

import argparse
import importlib
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
common = importlib.import_module("common")
ctr = importlib.import_module("04_train_ctr")
USERS, ITEMS, SIZES = 20_000, 20_000, (4, 3)


def make_ways(width):
    """{name: (model, lookup (users, items) -> ids)} in eval mode, built by stage 04 as for its --score."""
    rng = np.random.default_rng(0)
    dataset = common.Dataset(np.zeros((0, 4), dtype=np.int32), list(range(USERS)), [{"attributes": {}}] * ITEMS, [], "")
    bank = np.stack([rng.integers(size, size=USERS) for size in SIZES], axis=1)
    text = rng.standard_normal((USERS, 1, width), dtype=np.float32)
    features = {"dcn": (None, None), "dcn_ids": (bank, SIZES), "dcn_text": (None, None, text)}
    built = {name: ctr.build_features(dataset, "ids", *more) for name, more in features.items()}
    return {name: (common.DCN(fields).eval(), lookup) for name, (fields, lookup) in built.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--instances", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=100, help="instances scored at once")
    parser.add_argument("--width", type=int, default=4096, help="of the text embedding")
    parser.add_argument("--repeats", type=int, default=200, help="medians of this many")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ways = make_ways(64 if args.quick else args.width)
    rng = np.random.default_rng(1)
    users, items = rng.integers(USERS, size=args.instances), rng.integers(ITEMS, size=args.instances)
    times = {name: [] for name in ways}
    with torch.inference_mode():
        for repeat in range((3 if args.quick else args.repeats) + 5):
            for name, (model, lookup) in ways.items():
                clock = time.perf_counter()
                for at in range(0, args.instances, args.batch_size):
                    torch.sigmoid(model(lookup(users[at:at + args.batch_size], items[at:at + args.batch_size])))
                if repeat >= 5:  # the first rounds warm up
                    times[name].append(1e3 * (time.perf_counter() - clock))
    figures = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    for name in ways:
        print(f"{name:9s} {figures[f'{name}_ms']:9.2f} ms for {args.instances:,d} instances, {figures[f'{name}_ms'] / figures['dcn_ms']:6.2f} x dcn")
    for count in (10**6, 10**8):
        ids, text = count * len(SIZES) * 2 / 2**20, count * args.width * 4 / 2**20  # int16 ids, float32 text
        figures |= {f"bank_mib_{count}_users": ids, f"text_mib_{count}_users": text}
        print(f"{count:,d} users: feature bank {ids:,.0f} MiB, text embeddings {text:,.0f} MiB")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
