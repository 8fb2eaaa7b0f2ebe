"""How fast stage 01 reads, and in how much memory: generated Amazon reviews, as a process of its own.

    python tests/bench/bench_prepare.py                  # 2 million lines, plain and gzipped: 2 min
    python tests/bench/bench_prepare.py --lines 5000000  # 5 million: 4 min
    python tests/bench/bench_prepare.py --quick          # does it run?

Prints lines a second (reading; the whole process, filtering and writing included), peak memory and, last, one
JSON object; progress goes to stderr.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
CODE = """import importlib, sys, time
import common
sys.argv = ["01_prepare_data.py", *sys.argv[1:]]
prepare = importlib.import_module("01_prepare_data")
load, took = prepare.LOADERS["amazon"], []
def timed(args):
    start = time.perf_counter()
    source = load(args)
    took.append(time.perf_counter() - start)
    return source
prepare.LOADERS["amazon"] = timed
prepare.main()
print(took[0], common.peak_memory_mb(common.torch.device("cpu")))"""
BEGIN = time.perf_counter()


def note(text):
    print(f"[{time.perf_counter() - BEGIN:4.0f} s] {text}", file=sys.stderr, flush=True)


def generate(path, lines, users, items):
    """Reviews as of 2018, some 300 bytes a line; items by a power law."""
    rng = np.random.default_rng(0)
    text = "x" * 170
    with gzip.open(path, "wt", 1) if path.suffix == ".gz" else open(path, "w", encoding="utf-8") as file:
        for start in range(0, lines, 100_000):
            count = min(100_000, lines - start)
            rows = zip(rng.integers(users, size=count), (items * rng.random(count) ** 2).astype(int),
                       rng.integers(1, 6, size=count), rng.integers(10**9, 2 * 10**9, size=count))
            file.writelines(f'{{"overall": {rating}.0, "reviewerID": "A{user:013d}", "asin": "B{item:09d}", '
                            f'"reviewText": "{text}", "unixReviewTime": {when}}}\n'
                            for user, item, rating, when in rows)


def measure(folder, suffix, lines, users, items):
    kind = suffix or "plain"
    reviews = folder / f"reviews.json{suffix}"
    generate(reviews, lines, users, items)
    size = reviews.stat().st_size / 2**20
    note(f"{kind} file of {lines:,d} lines written; stage 01 begins")
    with open(folder / "meta_reviews.json", "w", encoding="utf-8") as file:
        for item in range(items):
            record = {"asin": f"B{item:09d}", "title": f"Thing {item}", "brand": f"Brand {item % 999}",
                      "price": f"${item % 90}.99"}
            file.write(json.dumps(record) + "\n")
    clock = time.perf_counter()
    flags = ["--dataset", "amazon", "--data-dir", folder, "--run", folder / "run"]
    output = subprocess.run([sys.executable, "-c", CODE, *flags], check=True, capture_output=True, text=True,
                            cwd=ROOT).stdout
    seconds, (reading, peak) = time.perf_counter() - clock, map(float, output.splitlines()[-1].split())
    reviews.unlink()
    print(f"{kind:6s} {lines:,d} lines, {size:,.0f} MiB: read at {lines / reading:,.0f} lines/s, "
          f"all of stage 01 at {lines / seconds:,.0f} lines/s ({seconds:.0f} s), peak {peak:,.0f} MB")
    return {"read_lines_per_s": lines / reading, "stage_lines_per_s": lines / seconds, "peak_mb": peak}


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--lines", type=int, default=2_000_000)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    lines = 50_000 if args.quick else args.lines
    with tempfile.TemporaryDirectory() as folder:
        figures = {name: measure(Path(folder), suffix, lines, max(10, lines // 12), max(10, lines // 60))
                   for name, suffix in (("plain", ""), ("gzip", ".gz"))}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
