"""Stage 04 and the DCN: layers against loops, training, controls and named banks, cold users, the table."""

import dataclasses
import importlib
import itertools
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call_stage, copy_run, ctr, settings, small_world
from sklearn.metrics import roc_auc_score
from torch import nn

import common
from common import COLD, SUPPORT, TEST, TRAIN, VALIDATION, Field

CPU = torch.device("cpu")


def training(**changes):
    """Stage 04's settings for in-process calls: no user dropout, no L2."""
    return settings(**{"seed": 0, "fields": "ids", "lr": 1e-3, "batch_size": 128, "epochs": 2, "patience": 9,
                       "weight_decay": 0.0, "user_dropout": 0.0, **changes})


def cell(dataset, model="dcn", ids="none", seed=0, banks=None, **changes):
    """One cell of the table: {row, state, test, cold}."""
    return ctr.run_one(dataset, model, ids, seed, ctr.Inputs(banks or {}), training(**changes), CPU)


def with_rows(dataset, split, change):
    """The same data set, where change(interaction rows) has been at the rows of one split."""
    interactions = dataset.interactions.copy()
    chosen = interactions[:, 3] == split
    assert chosen.any()
    interactions[chosen] = change(interactions[chosen])
    return dataclasses.replace(dataset, interactions=interactions)


def turned(rows):
    return rows ^ [0, 0, 1, 0]  # the other label


def same_state(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def measured(results):
    """The rows of results.json without what a clock says."""
    return [{key: value for key, value in row.items() if key != "train_samples_per_second"}
            for row in results["rows"]]


def refused(capsys, *args):
    """The one line with which stage 04 refuses; it has exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        common.guarded(lambda: call_stage(ctr, *args))
    message, = capsys.readouterr().err.strip().split("\n")
    assert stop.value.code == 2 and message.startswith("error: ") and " (" in message and "); " in message
    return message


@pytest.fixture(scope="module")
def cold_world():
    """(Dataset, {bank name: (codes, sizes)}) with a quarter of the users cold."""
    dataset, truth = small_world(cold_users=0.25)
    return dataset, {"userip": (truth, [4, 3])}


# ---------------------------------------------------------------- layers

def test_cross_network_against_explicit_loops():
    torch.manual_seed(0)
    cross = common.CrossNetwork(5, 3)
    cross.bias.data.normal_()
    x0 = torch.randn(4, 5)
    for row in range(4):
        x = x0[row].tolist()
        for layer in range(3):
            dot = sum(x[j] * cross.weight[layer, j].item() for j in range(5))
            x = [x0[row, j].item() * dot + cross.bias[layer, j].item() + x[j] for j in range(5)]
        assert cross(x0)[row].tolist() == pytest.approx(x, abs=1e-4)


def test_a_field_of_vectors_is_their_projection():
    vectors = torch.randn(3, 6)
    embed = common.FieldEmbedding([Field("a", 4), Field("v", 3, vectors=vectors)], 2)
    assert torch.allclose(embed(torch.tensor([[1, 2]]))[0, 1], embed.projections["v"](vectors[2]))


# ---------------------------------------------------------------- features, controls and named banks

@pytest.mark.parametrize("kind, names", [
    ("ids", ["user", "profile_0", "profile_1", "item"]),
    ("ids+attributes", ["user", "profile_0", "profile_1", "item", "item_hobby", "item_background"]),
    ("attributes", ["profile_0", "profile_1", "item", "item_hobby", "item_background"])])
def test_features_hold_what_their_fields_say(world, kind, names):
    dataset, truth = world
    fields, lookup = ctr.build_features(dataset, kind, truth, [4, 3])
    ids = lookup(np.array([5, 7]), np.array([3, 1]))
    assert [field.name for field in fields] == names
    assert ids.shape == (2, sum(field.columns for field in fields))
    unseen = lookup(np.array([len(dataset.users)]), np.array([len(dataset.items)]))[0].tolist()
    # the unknown code of a profile, else the row behind the last value
    assert unseen == [field.size - field.name.startswith("profile") for field in fields]
    at = names.index("profile_0")
    assert ids[:, at:at + 2].tolist() == truth[[5, 7]].tolist()
    assert ids[:, names.index("item")].tolist() == [3, 1]
    assert ("user" in names) == (ids[:, 0].tolist() == [5, 7])
    values = sorted({item["attributes"]["hobby"][0] for item in dataset.items})
    if kind != "ids":
        hobbies = [dataset.items[item]["attributes"]["hobby"][0] for item in (3, 1)]
        assert ids[:, names.index("item_hobby")].tolist() == list(map(values.index, hobbies))


def write_bank(run, name, codes, sizes, **changes):
    """feature_bank_NAME.npy and .json, as a student would write them."""
    np.save(run / f"feature_bank_{name}.npy", codes)
    known = common.load(run, "dataset.json")["fingerprint"]
    card = {"codes": sizes, "dataset_fingerprint": known, "made_by": "me"}
    (run / f"feature_bank_{name}.json").write_text(json.dumps({**card, **changes}))


def test_a_bank_by_name_is_a_row_with_controls_of_its_own(inferred, tmp_path, capsys):
    """The same codes under another name: the same row, and the same random and shuffled ones."""
    run = copy_run(inferred, tmp_path / "run")
    write_bank(run, "mine", np.load(run / "feature_bank.npy").astype(np.int64), [4, 3])
    write_bank(run, "truth", np.load(run / "truth.npy"), [4, 3])
    rows = {}
    for names in ("none,mine,random-mine,shuffled-mine,truth", "none,userip,random,shuffled,planted"):
        call_stage(ctr, "--run", run, "--seeds", 1, "--epochs", 3, "--lr", 0.02, "--ids", names)
        rows |= {row.pop("ids"): row for row in measured(common.load(run, "results.json"))}
    assert rows["mine"] == rows["userip"] and rows["truth"] == rows["planted"] != rows["mine"]
    assert rows["random-mine"] == rows["random"] and rows["shuffled-mine"] == rows["shuffled"]
    assert len({row["test_auc"] for row in rows.values()}) == 5
    count = len(rows_of(run, "users.json"))
    write_bank(run, "one", np.arange(count) % 3, [2])
    message = refused(capsys, "--run", run, "--ids", "one")  # a vector is no table
    assert f"feature_bank_one.npy holds int64 ({count},); wanted are integers ({count}, 1) from 0" in message
    write_bank(run, "one", np.arange(len(rows_of(run, "users.json")))[:, None] % 3, [2])  # 2: unknown
    call_stage(ctr, "--run", run, "--seeds", 1, "--epochs", 1, "--ids", "one,none")
    grown, plain = (row["parameters"] for row in common.load(run, "results.json")["rows"])
    assert grown == plain + 4 * 8 + (3 + 3 + 16 + 1) * 8  # 2 codes, unknown, a spare row; x0 is 8 wider


def rows_of(run, name):
    return json.loads((run / name).read_text())


BAD_BANKS = [  # what is done to the run and the codes of feature_bank_mine, words of the refusal
    (lambda run, codes: (run / "feature_bank_mine.json").unlink(), "; write it: codes and dataset_f"),
    (lambda run, codes: (run / "feature_bank_mine.json").write_text("{}"), "lacks codes, dataset_finger"),
    (lambda run, codes: (run / "feature_bank_mine.npy").write_bytes(b"x"), "bank_mine.npy cannot be read"),
    (lambda run, codes: write_bank(run, "mine", codes, [4, 3], dataset_fingerprint="0"), "again, by me"),
    (lambda run, codes: write_bank(run, "mine", codes[:-1], [4, 3]), "wanted are integers ("),
    (lambda run, codes: write_bank(run, "mine", codes[:, :1], [4, 3]), "wanted are integers ("),
    (lambda run, codes: write_bank(run, "mine", codes.astype(float), [4, 3]), "float64 ("),
    (lambda run, codes: write_bank(run, "mine", codes - 1, [4, 3]), "from 0 to [4, 3]"),
    (lambda run, codes: write_bank(run, "mine", codes * 0 + 4, [4, 3]), "from 0 to [4, 3]"),
    (lambda run, codes: write_bank(run, "mine", codes, 4), "feature_bank_mine.json"),
    (lambda run, codes: write_bank(run, "mine", codes, [0, 3]), "feature_bank_mine.json"),
    (lambda run, codes: write_bank(run, "mine", codes, [[4], [3, 4]]), "feature_bank_mine.json"),
    (lambda run, codes: write_bank(run, "mine", codes, [4, "3"]), "feature_bank_mine.json"),
    (lambda run, codes: write_bank(run, "mine", codes, [4, 3.5]), "feature_bank_mine.json"),
    (lambda run, codes: write_bank(run, "mine", codes, [4, 3], dataset_fingerprint="0",
                                   made_by="tools/controls.py mine"), "run: python tools/controls.py mine"),
    (lambda run, codes: write_bank(run, "mine", codes, [4, 3], dataset_fingerprint="0", made_by=None),
     "make it again, by what made it")]


@pytest.mark.parametrize("case", range(len(BAD_BANKS)))
def test_a_bad_bank_is_one_line_and_changes_nothing(case, inferred, tmp_path, capsys):
    run = copy_run(inferred, tmp_path / "run")
    codes = np.load(run / "truth.npy")
    write_bank(run, "mine", codes, [4, 3])
    damage, words = BAD_BANKS[case]
    damage(run, codes)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    message = refused(capsys, "--run", run, "--ids", "none,mine")
    assert words in message and "feature_bank_mine" in message and "03_quantize.py" not in message
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


# ---------------------------------------------------------------- training

def test_a_bank_with_the_name_of_a_control_is_refused(inferred, tmp_path, capsys):
    run = copy_run(inferred, tmp_path / "run")
    codes = np.zeros((len(common.load_dataset(run).users), 1), np.int16)
    write_bank(run, "random-x", codes, [2])
    text = refused(capsys, "--run", run, "--ids", "none,random-x")
    assert "a bank may not be called random-x" in text and "rename feature_bank_random-x.npy" in text
    write_bank(run, "userip", codes, [2])
    assert "a bank may not be called userip" in refused(capsys, "--run", run, "--ids", "none,userip")


def test_what_the_table_needs_is_asked_for_before_anything_is_trained(inferred, tmp_path, capsys):
    run = copy_run(inferred, tmp_path / "run")
    text = refused(capsys, "--run", run, "--profile-input", "embedding", "--ids", "none,planted")
    assert "--profile-input" in text and "add userip to --ids" in text
    facts = json.loads((run / "quantize.json").read_text())
    del facts["quantizer"]
    (run / "quantize.json").write_text(json.dumps(facts))
    assert "quantize.json lacks quantizer" in refused(capsys, "--run", run, "--ids", "none,userip")
    assert not list(run.glob("rows-*"))


def test_user_dropout_trains_the_unknown_user_s_row(world):
    stranger = len(world[0].users)
    for dropout in (0.0, 0.3):
        state = cell(world[0], user_dropout=dropout)["state"]
        assert state["embed.table.weight"][stranger].any() == (dropout > 0)


def test_best_epoch_is_chosen_on_validation_alone(world):
    """Turning the test labels round must change the test metrics and nothing else."""
    datasets = world[0], with_rows(world[0], TEST, turned)
    one, two = (cell(dataset, epochs=4, patience=2) for dataset in datasets)
    for key in ("val_auc", "val_logloss", "best_epoch"):
        assert one["row"][key] == two["row"][key]
    assert one["row"]["test_auc"] == pytest.approx(1 - two["row"]["test_auc"])
    assert same_state(one["state"], two["state"])


def test_a_last_batch_of_one_row_ends_well(world):
    rows = len(world[0].rows(TRAIN))
    assert cell(world[0], "afn", batch_size=rows - 1, epochs=1)["row"]["best_epoch"] == 1


@pytest.mark.parametrize("epoch, warned", [(2, ["userip", "planted"]), (3, [])])
def test_a_row_whose_ids_never_left_the_main_effects_is_named(epoch, warned, inferred, tmp_path, monkeypatch,
                                                              capsys):
    run, original = copy_run(inferred, tmp_path / "run"), ctr.run_one

    def run_one(*args):
        found = original(*args)
        return {**found, "row": found["row"] | {"best_epoch": epoch}}

    monkeypatch.setattr(ctr, "run_one", run_one)
    call_stage(ctr, "--run", run, "--seeds", 1, "--epochs", 1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: dcn")]
    assert [line.split()[1:4] for line in lines] == [["dcn", "with", ids] for ids in warned]


# ---------------------------------------------------------------- cold users

@pytest.mark.parametrize("ids", ["none", "userip"])
def test_cold_labels_are_for_evaluation_and_support_rows_for_inference_alone(ids, cold_world):
    dataset, banks = cold_world
    rng = np.random.default_rng(0)

    def poison(rows):
        return np.c_[rows[:, 0], rng.integers(len(dataset.items), size=len(rows)), 1 - rows[:, 2], rows[:, 3]]

    options = {"ids": ids, "banks": banks, "user_dropout": 0.5, "epochs": 3, "weight_decay": 1e-3}
    clean, cold, support = (cell(each, **options) for each in (
        dataset, with_rows(dataset, COLD, turned), with_rows(dataset, SUPPORT, poison)))
    for other in (cold, support):
        assert same_state(clean["state"], other["state"])
    clean["row"].pop("train_samples_per_second"), support["row"].pop("train_samples_per_second")
    assert clean["row"] == support["row"]
    assert cold["row"]["cold_auc"] == pytest.approx(1 - clean["row"]["cold_auc"])
    assert torch.equal(cold["cold"], clean["cold"])
    for key in ("val_auc", "best_epoch", "test_auc", "test_gauc", "test_logloss"):
        assert cold["row"][key] == clean["row"][key]


@pytest.fixture(scope="module")
def cold_run(tmp_path_factory, cold_world):
    """A run folder with cold users and a bank, without stages 02 and 03."""
    run, (dataset, banks) = tmp_path_factory.mktemp("run") / "cold", cold_world
    run.mkdir()
    args = SimpleNamespace(**dict.fromkeys(("seed", "min_interactions", "positive_above", "max_per_user",
                                            "subsample_users", "critic", "signal"), 0), cold_users=0.25)
    importlib.import_module("01_prepare_data").save(run, dataset, banks["userip"][0], args, [])
    write_bank(run, "mine", banks["userip"][0], [4, 3])
    return run


def test_the_table_of_a_run_with_cold_users(cold_run, cold_world, tmp_path, capsys):
    run, dataset = copy_run(cold_run, tmp_path / "run"), cold_world[0]
    call_stage(ctr, "--run", run, "--ids", "none,mine", "--seeds", 2, "--epochs", 2, "--lr", 0.02)
    printed, results = capsys.readouterr().out, common.load(run, "results.json")
    assert "cold_auc" in printed and "cold_gauc" in printed and results["user_dropout"] == 0.85
    for row in results["rows"]:
        for ending, name, split in (("", "test", TEST), ("-cold", "cold", COLD)):
            scores = np.load(run / "predictions" / f"dcn-{row['ids']}-{row['seed']}{ending}.npy")
            assert row[f"{name}_auc"] == pytest.approx(roc_auc_score(dataset.rows(split)[:, 2], scores))
    likes = dataset.rows(TRAIN)[:, 2].mean()
    base = -np.log(np.where(dataset.rows(COLD)[:, 2], likes, 1 - likes)).mean()
    assert results["cold_base_rate_logloss"] == pytest.approx(base)
    entry, rows = results["summary"]["dcn"]["mine"], results["rows"]
    for key in ("cold_auc", "cold_gauc", "cold_logloss"):
        differences = [rows[1][key] - rows[0][key], rows[3][key] - rows[2][key]]
        assert entry[f"{key}_minus_none"]["mean"] == pytest.approx(np.mean(differences))
        assert entry[key]["mean"] == pytest.approx((rows[1][key] + rows[3][key]) / 2)


def test_cold_rows_of_one_label_are_refused_and_their_absence_is_not(cold_run, tmp_path, capsys):
    run = copy_run(cold_run, tmp_path / "run")
    interactions = np.load(run / "interactions.npy")
    interactions[interactions[:, 3] == COLD, 2] = 1
    facts, dataset = common.load(run, "dataset.json"), common.load_dataset(run)
    np.save(run / "interactions.npy", interactions)
    dataset = dataclasses.replace(dataset, interactions=interactions)
    (run / "dataset.json").write_text(json.dumps(facts | {"fingerprint": dataset.fingerprint()}))
    assert "all cold labels are equal" in refused(capsys, "--run", run, "--ids", "none")


# ---------------------------------------------------------------- the table

def cells_of(ids, values, model="dcn"):
    return [{"model": model, "ids": ids, "seed": seed, "val_auc": 0.5, "test_auc": value,
             "test_gauc": value - 0.1, "test_logloss": 0.7 - value / 10} for seed, value in enumerate(values)]


def test_the_constant_stands_in_its_columns_also_where_there_is_no_gauc(capsys):
    for gauc in (True, False):
        rows = cells_of("none", (0.5, 0.6))
        for row in rows if not gauc else ():
            row["test_gauc"] = None
        ctr.show(ctr.summarize(rows), 0.6931)
        header, *_, constant = capsys.readouterr().out.strip().splitlines()
        places = [header.index(name) + 1 for name in header.split() if name.startswith("test")]
        assert ("test_gauc" in header) == gauc and len(places) == 2 + gauc
        assert [constant[place:place + 6] for place in places] == ["0.5000"] * (1 + gauc) + ["0.6931"]


def test_summary_pairs_differences_by_seed():
    rows = [*cells_of("none", (0.50, 0.60)), *cells_of("random", (0.52, 0.57)),
            *cells_of("userip", (0.60, 0.80)), *cells_of("planted", (0.70, 0.90)),
            *cells_of("none", (0.4, 0.3), "lr"), *cells_of("userip", (0.5, 0.5), "lr")]
    table = ctr.summarize(rows[::-1])  # in whatever order
    for control, differences in (("none", (0.1, 0.2)), ("random", (0.08, 0.23))):
        for metric, share in (("auc", 1), ("gauc", 1), ("logloss", -0.1)):
            found = table["dcn"]["userip"][f"{metric}_minus_{control}"]
            wanted = {"mean": share * np.mean(differences), "sd": abs(share) * np.std(differences, ddof=1)}
            assert found == pytest.approx(wanted)
    assert table["lr"]["userip"]["auc_minus_none"]["mean"] == pytest.approx(0.15)
    assert table["dcn"]["userip"]["test_logloss"]["mean"] == pytest.approx(0.63)
    assert "auc_minus_random" not in table["lr"]["userip"] and "auc_minus_none" not in table["dcn"]["none"]


def test_a_bank_is_compared_with_its_own_random_codes_where_they_are_given():
    rows = [*cells_of("random", (0.5, 0.5)), *cells_of("random-mine", (0.6, 0.5)),
            *cells_of("mine", (0.7, 0.7)), *cells_of("yours", (0.8, 0.6))]
    table = ctr.summarize(rows)["dcn"]
    assert table["mine"]["auc_minus_random"]["mean"] == pytest.approx(0.15)
    assert table["yours"]["auc_minus_random"]["mean"] == pytest.approx(0.2)
    assert table["random-mine"]["auc_minus_random"]["mean"] == pytest.approx(0.05)
    assert "auc_minus_random" not in table["random"]


def test_results_json_and_checkpoint(inferred, tmp_path, capsys):
    run = copy_run(inferred, tmp_path / "run")
    call_stage(ctr, "--run", run, "--seeds", 2, "--epochs", 3)
    printed = capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert [row["ids"] for row in results["rows"]] == ["none", "random", "shuffled", "userip", "planted"] * 2
    assert {"model", "ids", "fields", "seed", "val_auc", "test_auc", "test_gauc", "test_logloss",
            "best_epoch", "train_samples_per_second", "parameters"} <= results["rows"][0].keys()
    interactions = np.load(run / "interactions.npy")
    rate = interactions[interactions[:, 3] == 0, 2].mean()
    test = interactions[interactions[:, 3] == 2, 2]
    expected = -np.mean(test * np.log(rate) + (1 - test) * np.log(1 - rate))
    assert results["base_rate_logloss"] == pytest.approx(expected) and f"{expected:.4f}" in printed
    assert results["cold_base_rate_logloss"] is None  # there are no cold users
    lines = {tuple(line.split()[:2]): line for line in printed.splitlines()
             if line.startswith(("dcn", "constant"))}
    assert list(lines) == [("dcn", ids) for ids in ctr.IDS] + [("constant", "base")]
    mean = results["summary"]["dcn"]["userip"]
    for key in ("test_auc", "test_gauc", "test_logloss", "auc_minus_none", "auc_minus_random"):
        assert f"{mean[key]['mean']:7.4f} ± {mean[key]['sd']:.4f}" in lines["dcn", "userip"]
    state = torch.load(run / "ctr_dcn.pt", weights_only=True)
    assert state["cross.weight"].shape == (3, 32) and not list(run.glob("rows-*"))
    call_stage(ctr, "--run", run, "--seeds", 1, "--epochs", 1)  # a single repetition has no sd
    printed = capsys.readouterr().out
    assert "±" not in printed and f"next: python tools/explain.py --run {run} --all" in printed
    alone = json.loads((run / "results.json").read_text())["summary"]["dcn"]["userip"]
    assert f"{alone['test_auc']['mean']:7.4f}" in printed and alone["auc_minus_none"]["sd"] is None


def test_cells_side_by_side_are_bit_for_bit_those_of_one_process(inferred, tmp_path, monkeypatch):
    original, found = ctr.run_one, []
    for threads in (1, 2):
        run = copy_run(inferred, tmp_path / str(threads))

        def run_one(dataset, model, ids, seed, *args, seen=tmp_path / f"{threads}-by"):
            seen.mkdir(exist_ok=True)
            (seen / f"{os.getpid()} {ids} {seed}").touch()
            return original(dataset, model, ids, seed, *args)

        monkeypatch.setattr(ctr, "run_one", run_one)
        monkeypatch.setattr(common, "THREADS", threads)
        call_stage(ctr, "--run", run, "--seeds", 2, "--epochs", 2, "--ids", "none,random,userip")
        done = [path.name.split() for path in (tmp_path / f"{threads}-by").iterdir()]
        assert len({pid for pid, *_ in done}) == threads
        assert 6 <= len(done) <= 5 + threads  # two may begin the same one at once
        results = common.load(run, "results.json")
        found.append((measured(results), results["summary"], common.load(run, "ctr_dcn.pt"),
                      {path.name: path.read_bytes() for path in (run / "predictions").iterdir()}))
    (rows, summary, state, predictions), other = found
    assert (rows, summary, predictions) == (other[0], other[1], other[3]) and same_state(state, other[2])
    assert len(predictions) == 6


def test_without_a_user_id_none_is_hidden(inferred, tmp_path, capsys):
    run = copy_run(inferred, tmp_path / "run")
    flags = ["--run", run, "--seeds", 1, "--epochs", 1, "--ids", "none", "--fields", "attributes"]
    call_stage(ctr, *flags)
    assert json.loads((run / "results.json").read_text())["user_dropout"] == 0
    assert "no user id to hide" in refused(capsys, *flags, "--user-dropout", 0.5)


def test_every_flag_of_stage_04_changes_a_number(inferred, tmp_path, monkeypatch):
    run, original, scored = copy_run(inferred, tmp_path / "run"), ctr.predict, []
    monkeypatch.setattr(ctr, "predict", lambda *args: scored.append(1) or original(*args))

    def numbers(*args):
        call_stage(ctr, "--run", run, "--seeds", 1, "--epochs", 3, "--ids", "userip", "--lr", 0.01, *args)
        rows = json.loads((run / "results.json").read_text())["rows"]
        return [(row["val_auc"], row["test_auc"], row["test_logloss"], row["ids"]) for row in rows]
    base = numbers()
    assert base == numbers() == numbers("--user-dropout", 0.85, "--weight-decay", 1e-3)
    for flags in (("--seed", 1), ("--seeds", 2), ("--ids", "none"), ("--fields", "attributes"),
                  ("--fields", "ids+attributes"), ("--profile-input", "embedding"), ("--epochs", 1),
                  ("--batch-size", 32), ("--lr", 0.002), ("--weight-decay", 0), ("--weight-decay", 0.1),
                  ("--user-dropout", 0), ("--user-dropout", 0.5), ("--models", "deepfm")):
        assert numbers(*flags) != base, flags
    epochs = []
    for patience in (1, 30):
        del scored[:]
        numbers("--epochs", 25, "--patience", patience)
        epochs.append(len(scored) - 1)  # the last time is for the test rows
    assert epochs[0] < 25 == epochs[1]


# ---------------------------------------------------------------- the models against loops, one row at a time

def perceptron(module, x):
    """A Linear or a Sequential of them, ReLU and Dropout (off), by hand."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            x = [dot(row, x) + b for row, b in zip(layer.weight.tolist(), layer.bias.tolist())]
        elif isinstance(layer, nn.ReLU):
            x = [max(0.0, value) for value in x]
    return x


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def times(a, b):
    return [x * y for x, y in zip(a, b)]


def matrix(weight, x):
    return [dot(row, x) for row in weight.tolist()]


def softmax(values):
    exps = [math.exp(value) for value in values]
    return [value / sum(exps) for value in exps]


def flat(vectors):
    return [value for vector in vectors for value in vector]


def attention_by_loops(layer, e, heads):
    """ReLU(self-attention over fields + W e) of one row."""
    width = len(e[0]) // heads
    query, key, value, skip = ([matrix(weight, vector) for vector in e] for weight in layer.weight.chunk(4))
    result = []
    for i in range(len(e)):
        mixed = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            weights = softmax([dot(query[i][part], key[j][part]) / math.sqrt(width) for j in range(len(e))])
            mixed += [sum(weight * value[j][part][k] for j, weight in enumerate(weights))
                      for k in range(width)]
        result.append([max(0.0, a + b) for a, b in zip(mixed, skip[i])])
    return result


def batch_norm(norm, x):
    figures = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return [(value - mean) / math.sqrt(var + norm.eps) * w + b for value, mean, var, w, b in
            zip(x, *(figure.tolist() for figure in figures))]


def afm_by_loops(model, e, pairs):
    products = [times(e[i], e[j]) for i, j in pairs]
    attention = softmax([matrix(model.h.weight, [max(0.0, v) for v in perceptron(model.W, product)])[0]
                         for product in products])
    pooled = [sum(a * product[k] for a, product in zip(attention, products)) for k in range(len(e[0]))]
    return dot(model.p.weight[0].tolist(), pooled)


def difm_by_loops(model, e, w, pairs):
    vectors = flat(attention_by_loops(model.attention, e, 2))
    bits = matrix(model.from_bits.weight, perceptron(model.deep, flat(e)))
    m = [a + b for a, b in zip(perceptron(model.from_vectors, vectors), bits)]
    return float(model.bias.detach()) + dot(m, w) + sum(m[i] * m[j] * dot(e[i], e[j]) for i, j in pairs)


def fibinet_by_loops(model, e, pairs):
    squeezed = [max(0.0, v) for v in perceptron(model.squeeze, [sum(vector) / len(vector) for vector in e])]
    gates = [max(0.0, v) for v in perceptron(model.excite, squeezed)]
    both = (e, [[gate * value for value in vector] for gate, vector in zip(gates, e)])
    crossed = [times(matrix(W[p].T, v[i]), v[j]) for W, v in zip(model.W, both)
               for p, (i, j) in enumerate(pairs)]
    return perceptron(model.deep, flat(crossed))[0]


def afn_by_loops(model, e):
    F, D = len(e), len(e[0])
    logs = batch_norm(model.log_norm, [math.log(max(abs(value), 1e-4)) for value in flat(e)])
    crossed = [math.exp(value) for k in range(D)
               for value in perceptron(model.powers, [logs[i * D + k] for i in range(F)])]
    return perceptron(model.deep, batch_norm(model.exp_norm, crossed))[0]


def cross_by_loops(model, e):
    x0 = flat(e)
    x = x0
    for weight, bias in zip(model.cross.weight.tolist(), model.cross.bias.tolist()):
        x = [a * dot(x, weight) + b + c for a, b, c in zip(x0, bias, x)]
    return perceptron(model.head, x + perceptron(model.deep, x0))[0]


def cross_of_matrices_by_loops(model, e):
    x0 = flat(e)
    x = x0
    for layer in model.cross:
        x = [a * b + c for a, b, c in zip(x0, perceptron(layer, x), x)]
    return perceptron(model.head, x + perceptron(model.deep, x0))[0]


def autoint_by_loops(model, e):
    for layer in model.layers:
        e = attention_by_loops(layer, e, 2)
    return perceptron(model.head, flat(e))[0]


def onn_by_loops(model, e, pairs):
    own = flat(e[i][i] for i in range(len(e)))
    return perceptron(model.deep, own + [dot(e[i][j], e[j][i]) for i, j in pairs])[0]


# The logit of one row by plain loops, an independent reference for each model of the project:
# (model, e: embeddings of F fields, field-aware F x F; w: first-order weights (F); first: their sum + bias;
# pairs).
# A model without an entry here is trained and scored by the other tests all the same.
LOOPS = {
    "lr": lambda model, e, w, first, pairs: 8 * first,
    "ffm": lambda model, e, w, first, pairs: first + sum(dot(e[i][j], e[j][i]) for i, j in pairs),
    "afm": lambda model, e, w, first, pairs: first + afm_by_loops(model, e, pairs),
    "deepfm": lambda model, e, w, first, pairs: (
        first + sum(dot(e[i], e[j]) for i, j in pairs) + perceptron(model.deep, flat(e))[0]),
    "pnn": lambda model, e, w, first, pairs: perceptron(
        model.deep, flat(e) + [dot(e[i], e[j]) for i, j in pairs])[0],
    "onn": lambda model, e, w, first, pairs: onn_by_loops(model, e, pairs),
    "afn": lambda model, e, w, first, pairs: first + afn_by_loops(model, e),
    "autoint": lambda model, e, w, first, pairs: first + autoint_by_loops(model, e),
    "difm": lambda model, e, w, first, pairs: difm_by_loops(model, e, w, pairs),
    "fibinet": lambda model, e, w, first, pairs: first + fibinet_by_loops(model, e, pairs),
    "dcn": lambda model, e, w, first, pairs: cross_by_loops(model, e),
    "dcnv2": lambda model, e, w, first, pairs: cross_of_matrices_by_loops(model, e),
}


@pytest.mark.parametrize("name", LOOPS)
def test_each_model_against_explicit_loops(name):
    fields = [Field("user", 5), Field("item", 6), Field("genre", 3, 2), Field("profile_0", 4)]
    torch.manual_seed(1)
    model = ctr.MODELS[name](fields)
    for parameter in model.parameters():  # large random values, so that every term matters
        nn.init.normal_(parameter, std=0.5)
    ids = torch.stack([torch.randint(0, 3, (40,)) for _ in range(5)], dim=1)
    for _ in range(3):
        model.train()(ids)  # fills BatchNorm's running figures
    model.eval()
    logits = model(ids)
    pairs = list(itertools.combinations(range(len(fields)), 2))
    for row in range(3):
        e = torch.zeros(4, 8)
        if hasattr(model, "embed"):
            e = model.embed(ids[row:row + 1])[0]
        if e.shape[1] > 8:  # field-aware
            e = e.view(4, 4, 8)
        w = None
        first = 0.0
        if hasattr(model, "weights"):
            w = model.weights(ids[row:row + 1])[0, :, 0].tolist()
            first = sum(w) + float(model.bias.detach())
        found = LOOPS[name](model, e.detach().tolist(), w, first, pairs)
        assert float(logits[row].detach()) == pytest.approx(found, rel=1e-4, abs=1e-4), (
            f"{name} scores row {row} as {float(logits[row]):.5f}, plain loops as {found:.5f}")


@pytest.mark.parametrize("name", ctr.MODELS)
def test_a_field_of_one_value_breaks_no_model(name, world):
    """The ids of a collapsed codebook say nothing; AFN's scores were not finite in epoch 14."""
    dataset, codes = world[0], np.zeros((len(world[0].users), 2), int)
    _, lookup = ctr.build_features(dataset, "ids", codes, [4, 3])
    fields = ctr.build_features(dataset, "ids", codes, [4, 3])[0]
    rows = [ctr.rows_of(dataset, split, lookup, CPU) for split in (TRAIN, VALIDATION)]
    torch.manual_seed(0)
    model = ctr.MODELS[name](fields)
    facts, _ = ctr.train(model, *rows, None, training(epochs=15, patience=15, lr=0.01))
    assert facts["val_logloss"] < 0.75


@pytest.mark.parametrize("name", ctr.MODELS)
def test_each_model_trains_every_parameter_and_learns(name):
    """Users of even number like items of even number: only a product of two fields can say it.

    The third field says nothing; with it there are several pairs, among which an attention can choose.
    """
    torch.manual_seed(0)
    ids = torch.cartesian_prod(torch.arange(8), torch.arange(8), torch.arange(2)).repeat(20, 1)
    labels = ((ids[:, 0] + ids[:, 1]) % 2 == 0).float()
    model = ctr.MODELS[name]([Field("user", 8), Field("item", 8), Field("nothing", 2)])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(400):
        batch = torch.randint(len(ids), (256,))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(ids[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    still = [key for (key, parameter), before in zip(model.named_parameters(), start)
             if torch.equal(parameter, before)]
    assert not still, f"these parameters of {name} never moved: {still}"
    model.eval()
    score = common.auc(labels, ctr.predict(model, ids))
    if name == "lr":  # the floor, which knows no products
        assert abs(score - 0.5) < 0.1
    else:
        assert score > 0.95, f"{name} ranks the rows that it was trained on with an AUC of {score:.3f} alone"


def test_the_folded_dcn_scores_as_the_dcn_does():
    """The serving benchmark's claim, for a user's id alone, with two codes, and with a text embedding."""
    serving = importlib.import_module("bench_serving")
    rng = np.random.default_rng(0)
    users, items = rng.integers(serving.USERS, size=50), rng.integers(serving.ITEMS, size=50)
    torch.manual_seed(0)
    with torch.no_grad():
        ways = serving.make_ways(8)
        for name in ("dcn", "dcn_ids", "dcn_text"):
            plain, folded = ways[name](users, items), ways[f"folded_{name}"](users, items)
            assert plain.std() > 0.01 and torch.allclose(plain, folded, atol=1e-5), name
