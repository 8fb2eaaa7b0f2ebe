"""Stage 04 and the DCN: layers against explicit loops, controls, table."""

import json

import numpy as np
import pytest
import torch
from conftest import call_stage, copy_run, ctr, settings
from sklearn.metrics import roc_auc_score

import common


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


def test_field_embedding_of_many_valued_and_vector_fields():
    torch.manual_seed(0)
    vectors = torch.randn(3, 6)
    embed = common.FieldEmbedding([common.Field("a", 4), common.Field("genres", 5, width=3), common.Field("v", 3, vectors=vectors)], 2)
    ids = torch.tensor([[1, 0, 4, 5, 2], [3, 5, 5, 5, 0]])  # 5 pads the many-valued field
    out, table = embed(ids), embed.table.weight
    assert torch.allclose(out[0, 0], table[1]) and torch.allclose(out[1, 0], table[3])
    assert torch.allclose(out[0, 1], (table[5 + 0] + table[5 + 4]) / 2, atol=1e-6) and not out[1, 1].any()
    assert torch.allclose(out[0, 2], embed.projections["v"](vectors[2]))


def test_dcn_learns_a_product_of_two_fields_that_no_sum_can_express():
    torch.manual_seed(0)
    ids = torch.randint(4, (4000, 2))
    labels = ((ids[:, 0] < 2) == (ids[:, 1] < 2)).float()
    model = common.DCN([common.Field("a", 4), common.Field("b", 4)], dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(ids), labels).backward()
        optimizer.step()
    assert roc_auc_score(labels, model(ids).detach()) > 0.99


def test_controls_are_what_they_say():
    bank = np.array([[0, 2], [1, 0], [3, 1], [1, 3], [0, 0]] * 40, dtype=np.int16)
    rng = np.random.default_rng(0)
    shuffled, random = ctr.codes_of("shuffled", bank, [6, 4], None, rng), ctr.codes_of("random", bank, [6, 4], None, rng)
    assert sorted(map(tuple, shuffled)) == sorted(map(tuple, bank)) and not np.array_equal(shuffled, bank)
    assert random.shape == bank.shape and random.max(0).tolist() == [5, 3]  # uniform over K codes, used or not
    assert ctr.codes_of("none", bank, None, None, rng) is None and ctr.codes_of("userip", bank, None, None, rng) is bank


@pytest.mark.parametrize("kind, names", [("ids", ["user", "item", "profile_0", "profile_1"]),
                                         ("ids+attributes", ["user", "item", "item_hobby", "item_background", "profile_0", "profile_1"]),
                                         ("attributes", ["item", "item_hobby", "item_background", "profile_0", "profile_1"])])
def test_features_hold_what_their_fields_say(world, kind, names):
    dataset, truth = world
    fields, lookup = ctr.build_features(dataset, kind, truth)
    ids = lookup(np.array([5, 7]), np.array([3, 1]))
    assert [field.name for field in fields] == names and ids.shape == (2, sum(field.width for field in fields))
    assert ids[:, -2:].tolist() == truth[[5, 7]].tolist() and ids[:, names.index("item")].tolist() == [3, 1]
    assert ("user" in names) == (ids[:, 0].tolist() == [5, 7])
    values = sorted({item["attributes"]["hobby"][0] for item in dataset.items})
    if kind != "ids":
        assert ids[:, names.index("item_hobby")].tolist() == [values.index(dataset.items[item]["attributes"]["hobby"][0]) for item in (3, 1)]


def test_best_epoch_is_chosen_on_validation_alone(world):
    """Turning the test labels round must change the test metrics and nothing else."""
    dataset, truth = world
    turned = dataset.interactions.copy()
    turned[turned[:, 3] == 2, 2] ^= 1
    args = settings(seed=0, fields="ids", lr=1e-3, batch_size=128, epochs=4, patience=2)
    one, state = ctr.run_one(dataset, "dcn", "userip", 0, ctr.Inputs(truth, [4, 3]), args, torch.device("cpu"))
    poisoned = common.Dataset(turned, *list(vars(dataset).values())[1:])
    two, other = ctr.run_one(poisoned, "dcn", "userip", 0, ctr.Inputs(truth, [4, 3]), args, torch.device("cpu"))
    assert (one["val_auc"], one["best_epoch"]) == (two["val_auc"], two["best_epoch"]) and one["test_auc"] == pytest.approx(1 - two["test_auc"])
    assert all(torch.equal(state[key], other[key]) for key in state)


def test_summary_pairs_differences_by_seed():
    rows = [{"model": "dcn", "ids": ids, "seed": seed, "val_auc": 0.5, "test_auc": value, "test_logloss": 0.6}
            for ids, values in (("none", (0.50, 0.60)), ("random", (0.51, 0.59)), ("planted", (0.70, 0.90)), ("userip", (0.60, 0.80)))
            for seed, value in enumerate(values)]
    table = ctr.summarize(rows)["dcn"]
    assert table["userip"]["auc_minus_none"] == pytest.approx({"mean": 0.15, "sd": np.std([0.1, 0.2], ddof=1)})
    assert table["userip"]["share_of_planted_lift"] == pytest.approx(0.15 / 0.25) and "auc_minus_none" not in table["none"]


def test_results_json_and_checkpoint(inferred, tmp_path, capsys):
    run = copy_run(inferred, tmp_path / "run")
    call_stage(ctr, "--run", run, "--seeds", 2, "--epochs", 3)
    printed = capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert [row["ids"] for row in results["rows"]] == ["none", "random", "shuffled", "userip", "planted"] * 2
    assert {"model", "ids", "fields", "seed", "val_auc", "test_auc", "test_logloss", "best_epoch", "train_samples_per_second",
            "parameters"} <= results["rows"][0].keys()
    interactions = np.load(run / "interactions.npy")
    rate = interactions[interactions[:, 3] == 0, 2].mean()
    test = interactions[interactions[:, 3] == 2, 2]
    assert results["base_rate_logloss"] == pytest.approx(-np.mean(test * np.log(rate) + (1 - test) * np.log(1 - rate)))
    assert "| dcn | userip |" in printed and "| constant | base rate |" in printed
    state = torch.load(run / "ctr_dcn.pt", weights_only=True)
    assert state["cross.weight"].shape == (3, 32)


def test_every_flag_of_stage_04_changes_a_number(inferred, tmp_path):
    run = copy_run(inferred, tmp_path / "run")

    def numbers(*args):
        call_stage(ctr, "--run", run, "--seeds", 1, "--epochs", 3, "--ids", "userip", "--lr", 0.01, *args)
        rows = json.loads((run / "results.json").read_text())["rows"]
        return [(row["val_auc"], row["test_auc"], row["test_logloss"], row["ids"]) for row in rows]
    base = numbers()
    assert base == numbers()
    for flags in (("--seed", 1), ("--seeds", 2), ("--ids", "none"), ("--fields", "attributes"), ("--fields", "ids+attributes"),
                  ("--profile-input", "embedding"), ("--epochs", 1), ("--batch-size", 32), ("--lr", 0.002)):
        assert numbers(*flags) != base, flags
    assert numbers("--epochs", 30, "--patience", 1) != numbers("--epochs", 30, "--patience", 20)
