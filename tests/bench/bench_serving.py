"""What a request costs at serving time: a DCN without profiles, with the bank's ids, with text embeddings.

    python tests/bench/bench_serving.py                     # 10,000 pairs in 100 batches of 100: 2 min
    python tests/bench/bench_serving.py --batch-size 1000   # larger batches
    python tests/bench/bench_serving.py --quick

A pair is a user and an item, both drawn at random: a batch holds the requests of many users. (Where a request
is one user and many items, dcn_text could project that user's embedding once; folded_dcn_text does.)
dcn: user and item id. dcn_ids: the same and the user's two ids, of a bank in memory. dcn_text: the
same and a d-wide text embedding of the user through a projection (what KAR-like methods serve; d = 4096,
Llama-2-7B's width). Latency of scoring all instances in batches, lookups included. folded_*: the same three
models with everything that is linear in the embeddings computed beforehand (FoldedDCN); their scores are the
same. Progress goes to stderr; a table of medians and, last, one JSON object to stdout.
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
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
common = importlib.import_module("common")
ctr = importlib.import_module("04_train_ctr")
USERS, ITEMS, SIZES = 20_000, 20_000, (4, 3)
BEGIN = time.perf_counter()
BUDGET = 180  # seconds; on a busy machine the rounds are fewer


def note(text):
    print(f"[{time.perf_counter() - BEGIN:4.0f} s] {text}", file=sys.stderr, flush=True)


class FoldedDCN(torch.nn.Module):
    """A trained DCN for serving: what it asks of x_0, a user's embeddings beside an item's, is linear in x_0.

    The cross layers (common.CrossNetwork) are x_(l+1) = x_0 (x_l . w_l) + b_l + x_l. Every x_l is a number
    times x_0 plus a vector that is the same for all rows: x_l = a_l x_0 + c_l, with a_0 = 1, c_0 = 0 and

        a_(l+1) = a_l + x_l . w_l = a_l + a_l (x_0 . w_l) + c_l . w_l,        c_(l+1) = c_l + b_l.

    So the L products x_0 . w_l say all of the cross layers, the 16 products with the first MLP layer all of
    that, and one with the head's weights all that the head wants of x_L: 16 + L + 1 numbers a user and as
    many an item, added, however many ids a user has.

    forward: users (B,), items (B,) int64 -> logits (B,), as the DCN's. user_ids (U, fields), item_ids (I,
    fields): their ids in all fields, which have one column each.
    """

    def __init__(self, dcn, user_ids, item_ids):
        super().__init__()
        self.hidden, self.head = dcn.deep[3:], dcn.head  # deep: linear, ReLU, dropout; then the rest
        first, n = dcn.deep[0], dcn.cross.weight.shape[1]
        c = dcn.cross.bias.cumsum(0)  # c_1 ... c_L
        self.constants = [0.0, *(c[:-1] * dcn.cross.weight[1:]).sum(1).tolist()]  # c_l . w_l
        self.last = dcn.head.weight[0, :n] @ c[-1] + dcn.head.bias[0]
        self.width = len(first.weight)
        folded = torch.cat([first.weight, dcn.cross.weight, dcn.head.weight[:, :n]])  # Shape: (16 + L + 1, n)
        of_users = self.embedded(dcn, user_ids, item_ids[:1])
        of_items = self.embedded(dcn, user_ids[:1], item_ids)
        at = n - n // len(dcn.embed.fields) * item_ids.shape[1]  # where the item's embeddings begin
        self.users, self.items = of_users[:, :at] @ folded[:, :at].T, of_items[:, at:] @ folded[:, at:].T
        self.items[:, :self.width] += first.bias

    @staticmethod
    def embedded(dcn, user_ids, item_ids):
        size = max(len(user_ids), len(item_ids))
        ids = torch.cat([user_ids.expand(size, -1), item_ids.expand(size, -1)], dim=1)
        return dcn.embed(ids).flatten(1)

    def forward(self, users, items):
        # Shape: (B, 16 + L + 1)
        numbers = F.embedding(users, self.users).add_(F.embedding(items, self.items))
        hidden = self.hidden(torch.relu(numbers[:, :self.width]))
        *products, output = numbers[:, self.width:].T.contiguous()  # (B,) each
        a = torch.ones(())
        for product, constant in zip(products, self.constants):
            a = torch.addcmul(a + constant, a, product)  # a_(l+1)
        weight = self.head.weight[0, -hidden.shape[1]:]
        return torch.addmv(torch.addcmul(self.last, a, output), hidden, weight)


def make_ways(width):
    """{name: a function of (users, items) int64 arrays that gives logits}: plain and folded."""
    rng = np.random.default_rng(0)
    nothing, items = np.zeros((0, 4), dtype=np.int32), [{"attributes": {}}] * ITEMS
    dataset = common.Dataset(nothing, list(range(USERS)), items, [], "")
    bank = np.stack([rng.integers(size, size=USERS) for size in SIZES], axis=1)
    text = rng.standard_normal((USERS, 1, width), dtype=np.float32)
    features = {"dcn": (None, None), "dcn_ids": (bank, SIZES), "dcn_text": (None, None, text)}
    ways, everybody, everything = {}, np.arange(USERS), np.arange(ITEMS)
    for name, (fields, lookup) in {name: ctr.build_features(dataset, "ids", *more)
                                   for name, more in features.items()}.items():
        model = common.DCN(fields).eval()
        for parameter in model.parameters():  # as after training: no bias is 0
            parameter += 0.1 * torch.randn_like(parameter)
        of_users, of_items = lookup(everybody, 0 * everybody), lookup(0 * everything, everything)
        folded = FoldedDCN(model, of_users[:, :-1], of_items[:, -1:])
        ways[name] = lambda users, items, model=model, lookup=lookup: model(lookup(users, items))
        ways[f"folded_{name}"] = lambda users, items, folded=folded: folded(torch.from_numpy(users),
                                                                            torch.from_numpy(items))
        note(f"{name} made and folded")
    return ways


@torch.inference_mode()
def measure(ways, instances, batch_size, repeats):
    """{name: milliseconds of scoring all instances in batches, a list of at most `repeats`}."""
    rng, begin = np.random.default_rng(1), time.perf_counter()
    users, items = rng.integers(USERS, size=instances), rng.integers(ITEMS, size=instances)
    times = {name: [] for name in ways}
    for number in range(repeats + 5):
        for name, way in ways.items():
            clock = time.perf_counter()
            for at in range(0, instances, batch_size):
                torch.sigmoid(way(users[at:at + batch_size], items[at:at + batch_size]))
            if number >= 5:  # the first rounds warm up
                times[name].append(1e3 * (time.perf_counter() - clock))
        if number % 20 == 4:
            note(f"{number + 1} of up to {repeats + 5} rounds")
        if number >= 5 and time.perf_counter() - begin > BUDGET:
            break
    return times


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--instances", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=100, help="instances scored at once")
    parser.add_argument("--width", type=int, default=4096, help="of the text embedding")
    parser.add_argument("--repeats", type=int, default=200, help="medians of at most this many")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        ways = make_ways(64 if args.quick else args.width)
    times = measure(ways, args.instances, args.batch_size, 3 if args.quick else args.repeats)
    figures = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    for name in ways:
        took = figures[f"{name}_ms"]
        times_dcn = took / figures["dcn_ms"]
        print(f"{name:16s} {took:9.2f} ms for {args.instances:,d} instances, {times_dcn:6.2f} x dcn")
    for count in (10**6, 10**8):
        ids, text = count * len(SIZES) * 2 / 2**20, count * args.width * 4 / 2**20  # int16 ids, float32 text
        figures |= {f"bank_mib_{count}_users": ids, f"text_mib_{count}_users": text}
        print(f"{count:,d} users: feature bank {ids:,.0f} MiB, text embeddings {text:,.0f} MiB")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
