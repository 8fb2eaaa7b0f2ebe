"""Do the ids work in a library we did not write? RecBole's own DCN on our split, without and with our bank.

    pip install recbole "ray<2.7" "numpy<2" "scipy<1.14" "pandas<2.3"   # in an environment of its own
    python tests/bench/check_recbole.py --run runs/demo

Feeds the ids of feature_bank.csv (and the same ids permuted over users, the control) and our train /
validation / test rows to RecBole as atomic files, and trains its DCN (embedding 8, 3 cross layers, MLP 16-16,
dropout .2, batch 512, early stopping on validation AUC) for each seed. Progress goes to stderr; test AUC,
mean and sd over the seeds, and last one JSON object to stdout.
"""

import argparse
import csv
import json
import logging
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

SETTINGS = {
    "model": "DCN", "embedding_size": 8, "mlp_hidden_size": [16, 16], "cross_layer_num": 3,
    "dropout_prob": 0.2, "train_batch_size": 512, "eval_batch_size": 16384, "epochs": 60, "stopping_step": 5,
    "use_gpu": False, "show_progress": False, "state": "ERROR", "worker": 0, "nproc": 1,
    "metrics": ["AUC", "LogLoss"],
    "valid_metric": "AUC", "train_neg_sample_args": None, "threshold": None, "LABEL_FIELD": "label",
    "eval_args": {"split": {"RS": [8, 1, 1]}, "order": "RO", "group_by": None, "mode": "labeled"},
    "benchmark_filename": ["train", "valid", "test"]}


def write_files(run, folder, ids, seed):
    """RecBole's atomic files of a run: NAME.SPLIT.inter and NAME.user. ids: none, shuffled or userip.

    Returns the columns of the .user file.
    """
    rows = np.load(run / "interactions.npy")
    users = json.loads((run / "users.json").read_text(encoding="utf-8"))
    items = [item["id"] for item in json.loads((run / "items.json").read_text(encoding="utf-8"))]
    for split, name in enumerate(("train", "valid", "test")):
        with open(folder / f"{folder.name}.{name}.inter", "w", encoding="utf-8") as file:
            file.write("user_id:token\titem_id:token\tlabel:float\n")
            file.writelines(f"{users[user]}\t{items[item]}\t{label}\n"
                            for user, item, label, part in rows if part == split)
    with open(run / "feature_bank.csv", newline="", encoding="utf-8") as file:
        header, *bank = csv.reader(file)
    codes = [line[1:] for line in bank]
    if ids == "shuffled":
        codes = [codes[other] for other in np.random.default_rng(seed).permutation(len(codes))]
    lines = [[f"{name}:token" for name in header], *([line[0], *own] for line, own in zip(bank, codes))]
    text = "".join("\t".join(line) + "\n" for line in lines)
    (folder / f"{folder.name}.user").write_text(text, encoding="utf-8")
    return header


def train(run, ids, seed):
    """Test AUC of RecBole's DCN."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.context_aware_recommender.dcn import DCN
    from recbole.trainer import Trainer
    from recbole.utils import init_seed
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "bank"
        folder.mkdir()
        fields = write_files(run, folder, ids, seed)
        columns = {"inter": ["user_id", "item_id", "label"]} | ({} if ids == "none" else {"user": fields})
        config = Config(model="DCN", dataset="bank", config_dict={
            **SETTINGS, "data_path": parent, "load_col": columns, "seed": seed, "checkpoint_dir": parent})
        logging.disable(logging.CRITICAL)
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # RecBole reads its checkpoint back as a pickle
        init_seed(seed, True)
        data = create_dataset(config)
        train_rows, validation, test = data_preparation(config, data)
        trainer = Trainer(config, DCN(config, train_rows.dataset))
        trainer.fit(train_rows, validation, saved=True, show_progress=False)
        return trainer.evaluate(test, load_best_model=True, show_progress=False)["auc"]


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    found = {}
    for ids in ("none", "shuffled", "userip"):
        for seed in range(args.seeds):
            found.setdefault(ids, []).append(train(args.run, ids, seed))
            print(f"{ids}, seed {seed}: {found[ids][-1]:.4f}", file=sys.stderr, flush=True)
    for ids, values in found.items():
        sd = statistics.stdev(values) if len(values) > 1 else 0
        print(f"RecBole DCN {ids:9s} test AUC {statistics.mean(values):.4f} ± {sd:.4f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
