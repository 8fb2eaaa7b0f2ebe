"""How fast stage 04 trains a DCN, beside other ways to feed the same model, interleaved in one run.

    python tests/bench/bench_ctr.py                  # 200,000 rows, batch 1024: 2 min on 2 cores
    python tests/bench/bench_ctr.py --quick          # does it run?
    python tests/bench/bench_ctr.py --rows 20000000  # stage 04 on 20 million rows: rate, peak memory

ours: stage 04's training loop. bare loop: the least a loop can do, slices of tensors shuffled once an epoch,
fused Adam. dataloader: the same model behind DataLoader(TensorDataset). deepctr-torch, RecBole: their own DCN
and loop, where installed. Progress goes to stderr; a table of medians and, last, one JSON object to stdout.
"""

import argparse
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
common = importlib.import_module("common")
ctr = importlib.import_module("04_train_ctr")
BATCH, USERS, ITEMS = 1024, 943, 1682  # as MovieLens-100K
BEGIN = time.perf_counter()
BUDGET = 150  # seconds; slower rounds are fewer rounds


def note(text):
    print(f"[{time.perf_counter() - BEGIN:4.0f} s] {text}", file=sys.stderr, flush=True)


def make_dataset(rows, users=USERS, items=ITEMS):
    """Random interactions, 8:1:1."""
    rng = np.random.default_rng(0)
    columns = [rng.integers(size, size=rows, dtype=np.int32) for size in (users, items, 2)]
    columns.append(rng.choice(3, size=rows, p=(0.8, 0.1, 0.1)).astype(np.int32))
    described = [{"id": str(item), "title": f"item {item}", "attributes": {}} for item in range(items)]
    return common.Dataset(np.stack(columns, axis=1), [str(user) for user in range(users)], described, [], "")


def fields():
    return [common.Field("user", USERS), common.Field("item", ITEMS)]


def ours(dataset):
    """Samples a second of one epoch, as stage 04 counts them: without the validation."""
    _, lookup = ctr.build_features(dataset, "ids", None, None)
    rows, few = (ctr.rows_of(dataset, split, lookup, torch.device("cpu"))
                 for split in (common.TRAIN, common.TEST))
    args = SimpleNamespace(lr=3e-3, weight_decay=1e-3, epochs=1, patience=1, batch_size=BATCH,
                           user_dropout=ctr.default_user_dropout(dataset))
    return ctr.train(common.DCN(fields()), rows, few, USERS, args)[0]["train_samples_per_second"]


def training_tensors(dataset):
    rows = dataset.rows(common.TRAIN)
    return torch.tensor(rows[:, :2], dtype=torch.long), torch.tensor(rows[:, 2], dtype=torch.float32)


def step(model, optimizer, ids, labels):
    loss = F.binary_cross_entropy_with_logits(model(ids), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def bare_loop(dataset):
    ids, labels = training_tensors(dataset)
    model = common.DCN(fields())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    clock = time.perf_counter()
    order = torch.randperm(len(ids))
    ids, labels = ids[order], labels[order]
    for at in range(0, len(ids), BATCH):
        step(model, optimizer, ids[at:at + BATCH], labels[at:at + BATCH])
    return len(ids) / (time.perf_counter() - clock)


def dataloader(dataset):
    ids, labels = training_tensors(dataset)
    model = common.DCN(fields())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    rows = torch.utils.data.TensorDataset(ids, labels)
    loader = torch.utils.data.DataLoader(rows, batch_size=BATCH, shuffle=True)
    clock = time.perf_counter()
    for batch in loader:
        step(model, optimizer, *batch)
    return len(ids) / (time.perf_counter() - clock)


def deepctr(dataset):
    from deepctr_torch.inputs import SparseFeat
    from deepctr_torch.models import DCN
    rows = dataset.rows(common.TRAIN)
    columns = [SparseFeat("user", USERS, embedding_dim=8), SparseFeat("item", ITEMS, embedding_dim=8)]
    model = DCN(columns, columns, cross_num=3, dnn_hidden_units=(16, 16), dnn_dropout=0.2, device="cpu")
    model.compile(torch.optim.Adam(model.parameters(), lr=1e-3), "binary_crossentropy", metrics=[])
    clock = time.perf_counter()
    model.fit({"user": rows[:, 0], "item": rows[:, 1]}, rows[:, 2], batch_size=BATCH, epochs=1, verbose=0)
    return len(rows) / (time.perf_counter() - clock)


def recbole(dataset):
    """RecBole's DCN and Trainer on the same rows; its own reading of the file is not timed."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.context_aware_recommender.dcn import DCN
    from recbole.trainer import Trainer
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bench").mkdir()
        with open(Path(folder) / "bench" / "bench.inter", "w", encoding="utf-8") as file:
            file.write("user_id:token\titem_id:token\tlabel:float\n")
            file.writelines(f"{user}\t{item}\t{label}\n" for user, item, label in dataset.rows(common.TRAIN))
        split = {"split": {"RS": [0.98, 0.01, 0.01]}, "order": "RO", "group_by": None, "mode": "labeled"}
        config = Config(model="DCN", dataset="bench", config_dict={
            "data_path": folder, "load_col": {"inter": ["user_id", "item_id", "label"]}, "embedding_size": 8,
            "mlp_hidden_size": [16, 16], "cross_layer_num": 3, "dropout_prob": 0.2, "train_batch_size": BATCH,
            "epochs": 1, "use_gpu": False, "show_progress": False, "eval_args": split, "metrics": ["AUC"],
            "valid_metric": "AUC", "state": "ERROR", "checkpoint_dir": folder, "train_neg_sample_args": None,
            "worker": 0, "nproc": 1})
        train, *_ = data_preparation(config, create_dataset(config))
        trainer = Trainer(config, DCN(config, train.dataset))
        clock = time.perf_counter()
        trainer._train_epoch(train, 0, show_progress=False)
        return len(train.dataset) / (time.perf_counter() - clock)


def compare(rows, repeats):
    dataset, ways = make_dataset(rows), {"ours": ours, "bare_loop": bare_loop, "dataloader": dataloader}
    for name, way in (("deepctr_torch", deepctr), ("recbole", recbole)):
        if importlib.util.find_spec(name):
            ways[name] = way
    rates = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            rate = way(dataset)
            if number:  # the first round warms up
                rates[name].append(rate)
            note(f"round {number} of up to {repeats}: {name} {rate:,.0f} samples/s")
        if number and (time.perf_counter() - BEGIN) * (number + 2) / (number + 1) > BUDGET:
            break
    figures = {f"{name}_samples_per_s": statistics.median(values) for name, values in rates.items()}
    for name in ways:
        rate = figures[f"{name}_samples_per_s"]
        print(f"{name:14s} {rate:12,.0f} samples/s   ours is {figures['ours_samples_per_s'] / rate:.2f} x")
    return figures


BIG = """import importlib, sys
import common, torch
sys.argv = ["04_train_ctr.py", "--run", sys.argv[1], "--ids", "none", "--seeds", "1", "--epochs", "1",
            "--batch-size", "16384", "--device", "cpu"]
common.guarded(importlib.import_module("04_train_ctr").main)  # which sets the threads
print(common.peak_memory_mb(torch.device("cpu")))"""


def big(rows):
    """Stage 04, one epoch, in a process of its own, on artifacts that are written here."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        dataset = make_dataset(rows, max(USERS, rows // 20), max(ITEMS, rows // 200))
        common.save_npy(run / "interactions.npy", dataset.interactions)
        common.save_json(run / "users.json", dataset.users)
        common.save_json(run / "items.json", dataset.items)
        common.save_json(run / "dataset.json", {"dataset": "bench", "profiles": [], "task_prompt": "",
                                                "fingerprint": dataset.fingerprint()})
        del dataset
        note("artifacts written; stage 04 begins")
        clock = time.perf_counter()
        output = subprocess.run([sys.executable, "-c", BIG, folder], check=True, capture_output=True,
                                text=True, cwd=ROOT).stdout
        seconds, peak = time.perf_counter() - clock, int(output.splitlines()[-1])
        rate = json.loads((run / "results.json").read_text())["rows"][0]["train_samples_per_second"]
    print(f"{rows:,d} rows: {rate:,d} samples/s in training, {seconds:.0f} s in all, peak {peak} MB")
    return {"rows": rows, "train_samples_per_s": rate, "seconds": seconds, "peak_mb": peak}


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; a second one gains little here")
    parser.add_argument("--repeats", type=int, default=5, help="medians of this many")
    parser.add_argument("--rows", type=int, help="only run stage 04 on this many rows, and report its memory")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, repeats = (20_000, 1) if args.quick else (200_000, args.repeats)
    print(json.dumps(big(args.rows) if args.rows else compare(rows, repeats)))


if __name__ == "__main__":
    main()
