"""Stage 04 and the DCN: layers against explicit loops, controls, table."""

import importlib
import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import call_stage, copy_run, ctr, quantize, settings
from sklearn.metrics import roc_auc_score
from torch import nn

import common
from common import Field


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


def test_controls_are_what_they_say():
    bank = np.array([[0, 2], [1, 0], [3, 1], [1, 3], [0, 0]] * 40, dtype=np.int16)
    rng = np.random.default_rng(0)
    shuffled, random = ctr.codes_of("shuffled", bank, [6, 4], None, rng)[0], ctr.codes_of("random", bank, [6, 4], None, rng)[0]
    assert sorted(map(tuple, shuffled)) == sorted(map(tuple, bank)) and not np.array_equal(shuffled, bank)
    assert random.shape == bank.shape and random.max(0).tolist() == [5, 3]  # uniform over K codes, used or not
    assert ctr.codes_of("none", bank, None, None, rng) == (None, None) and ctr.codes_of("userip", bank, [6, 4], None, rng) == (bank, [6, 4])
    assert ctr.codes_of("planted", None, None, bank, rng)[1] == [4, 4]


@pytest.mark.parametrize("kind, names", [("ids", ["user", "profile_0", "profile_1", "item"]),
                                         ("ids+attributes", ["user", "profile_0", "profile_1", "item", "item_hobby", "item_background"]),
                                         ("attributes", ["profile_0", "profile_1", "item", "item_hobby", "item_background"])])
def test_features_hold_what_their_fields_say(world, kind, names):
    dataset, truth = world
    fields, lookup = ctr.build_features(dataset, kind, truth, [4, 3])
    ids = lookup(np.array([5, 7]), np.array([3, 1]))
    assert [field.name for field in fields] == names and ids.shape == (2, sum(field.width for field in fields))
    unseen = lookup(np.array([len(dataset.users)]), np.array([len(dataset.items)]))[0].tolist()
    assert unseen == [field.size - field.name.startswith("profile") for field in fields]  # the unknown code, else the row that stays 0
    at = names.index("profile_0")
    assert ids[:, at:at + 2].tolist() == truth[[5, 7]].tolist() and ids[:, names.index("item")].tolist() == [3, 1]
    assert ("user" in names) == (ids[:, 0].tolist() == [5, 7])
    values = sorted({item["attributes"]["hobby"][0] for item in dataset.items})
    if kind != "ids":
        assert ids[:, names.index("item_hobby")].tolist() == [values.index(dataset.items[item]["attributes"]["hobby"][0]) for item in (3, 1)]


def test_best_epoch_is_chosen_on_validation_alone(world):
    """Turning the test labels round must change the test metrics and nothing else."""
    dataset, truth = world
    turned = dataset.interactions.copy()
    turned[turned[:, 3] == 2, 2] ^= 1
    args = settings(seed=0, fields="ids", lr=1e-3, batch_size=128, epochs=4, patience=2, weight_decay=0)
    one, state, _ = ctr.run_one(dataset, "dcn", "userip", 0, ctr.Inputs(truth, [4, 3]), args, torch.device("cpu"))
    poisoned = common.Dataset(turned, *list(vars(dataset).values())[1:])
    two, other, _ = ctr.run_one(poisoned, "dcn", "userip", 0, ctr.Inputs(truth, [4, 3]), args, torch.device("cpu"))
    assert (one["val_auc"], one["best_epoch"]) == (two["val_auc"], two["best_epoch"]) and one["test_auc"] == pytest.approx(1 - two["test_auc"])
    assert all(torch.equal(state[key], other[key]) for key in state)


def test_summary_pairs_differences_by_seed():
    rows = [{"model": "dcn", "ids": ids, "seed": seed, "val_auc": 0.5, "test_auc": value, "test_logloss": 0.6}
            for ids, values in (("none", (0.50, 0.60)), ("random", (0.51, 0.59)), ("planted", (0.70, 0.90)), ("userip", (0.60, 0.80)))
            for seed, value in enumerate(values)]
    table = ctr.summarize(rows)["dcn"]
    p = scipy.stats.ttest_rel([0.6, 0.8], [0.5, 0.6]).pvalue
    assert table["userip"]["auc_minus_none"] == pytest.approx({"mean": 0.15, "sd": np.std([0.1, 0.2], ddof=1), "p": p})
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


def test_weighted_auc_and_the_bootstrap_interval():
    rng = np.random.default_rng(0)
    labels, weights = rng.integers(2, size=3000), rng.integers(4, size=3000)
    bad, good = rng.integers(9, size=3000) / 9, rng.integers(9, size=3000) / 9 + 0.4 * labels  # many ties
    for scores in (bad, good):
        assert ctr.weighted_auc(np.unique(scores, return_inverse=True)[1], labels, weights) == pytest.approx(
            roc_auc_score(labels, scores, sample_weight=weights))
    low, high = ctr.bootstrap(labels, [good, good], [bad, bad])
    assert 0 < low < common.auc(labels, good) - common.auc(labels, bad) < high < low + 0.1
    assert ctr.bootstrap(labels, [bad], [bad]) == [0, 0]


def test_relative_improvements_are_eq_10_and_11_against_the_best_baseline():
    def entry(auc, loss):
        return {"test_auc": {"mean": auc}, "test_logloss": {"mean": loss}}
    found = ctr.improvements({"lr": {"none": entry(0.6, 0.65), "userip": entry(0.62, 0.6)},
                              "dcn": {"none": entry(0.7, 0.5), "userip": entry(0.75, 0.4)}})
    assert found["baseline"] == "dcn" and found["relative"]["dcn"]["userip"] == pytest.approx({"auc": 0.25 / 0.2 - 1, "logloss": 0.1 / 0.4})
    assert found["relative"]["lr"]["userip"]["auc"] == pytest.approx(0.12 / 0.2 - 1)


def test_tiny_test_splits_and_batches_of_one_row_end_well(world):
    rng = np.random.default_rng(0)
    assert ctr.bootstrap(np.array([1] + [0] * 3), [rng.random(4)], [rng.random(4)]) is not None
    assert ctr.bootstrap(np.ones(5), [rng.random(5)], [rng.random(5)]) is None
    assert ctr.improvements({"dcn": {"none": {"test_auc": {"mean": 0.5}, "test_logloss": {"mean": 0.7}}}}) is None
    dataset, truth = world
    rows = int((dataset.interactions[:, 3] == 0).sum())
    args = settings(seed=0, fields="ids", lr=1e-3, batch_size=rows - 1, epochs=1, patience=1, weight_decay=0)
    assert ctr.run_one(dataset, "afn", "none", 0, ctr.Inputs(), args, torch.device("cpu"))[0]["best_epoch"] == 1  # its last batch has one row


def test_score_of_a_model_without_ids_that_was_trained_beside_others(inferred, tmp_path):
    run = copy_run(inferred, tmp_path / "run")
    call_stage(ctr, "--run", run, "--seeds", 1, "--epochs", 1, "--ids", "none,random")
    (run / "pairs.csv").write_text("\ufeffuser_id,item_id\nu0001,i001\n", encoding="utf-8")
    call_stage(ctr, "--run", run, "--score", run / "pairs.csv")
    assert len((run / "scores.csv").read_text().splitlines()) == 2


def test_rows_in_chunks_are_the_rows_at_once(world, monkeypatch):
    dataset, truth = world
    _, lookup = ctr.build_features(dataset, "ids", truth, [4, 3])
    whole = ctr.Rows(dataset, 0, lookup, torch.device("cpu"))
    monkeypatch.setattr(ctr, "CHUNK", 100)
    parts = ctr.Rows(dataset, 0, lookup, torch.device("cpu"))
    assert parts.kept is None and len(parts.starts) > 10
    for first, second in zip(zip(*whole.chunks()), zip(*parts.chunks())):
        assert torch.equal(torch.cat(first), torch.cat(second))
    torch.manual_seed(0)
    shuffled = torch.cat([ids for ids, _ in parts.shuffled_chunks()])
    plain = torch.cat([ids for ids, _ in whole.chunks()])
    assert not torch.equal(shuffled, plain) and sorted(shuffled.tolist()) == sorted(plain.tolist())


def test_score_gives_the_trained_models_probabilities_and_counts_unseen_ids(inferred, tmp_path, capsys):
    run = copy_run(inferred, tmp_path / "run")
    call_stage(ctr, "--run", run, "--seeds", 1, "--epochs", 2, "--ids", "none,userip", "--models", "dcn,deepfm", "--fields", "ids+attributes")
    users, items = (json.loads((run / f"{name}.json").read_text()) for name in ("users", "items"))
    test = np.load(run / "interactions.npy")
    test = test[test[:, 3] == 2]
    pairs = [(users[user], items[item]["id"]) for user, item, *_ in test] + [("stranger", items[0]["id"]), (users[0], "novelty")]
    (run / "pairs.csv").write_text("item_id,user_id\n" + "".join(f"{item},{user}\n" for user, item in pairs))
    capsys.readouterr()
    call_stage(ctr, "--run", run, "--models", "deepfm", "--score", run / "pairs.csv")
    assert f"{len(pairs)} pairs scored by deepfm with userip ids; unseen: 1 users, 1 items" in capsys.readouterr().out
    lines = [line.split(",") for line in (run / "scores.csv").read_text().splitlines()]
    assert lines[0] == ["user_id", "item_id", "probability"] and [tuple(line[:2]) for line in lines[1:]] == pairs
    scores = np.array([float(line[2]) for line in lines[1:]])
    assert np.allclose(scores[:-2], np.load(run / "predictions" / "deepfm-userip-0.npy"), atol=1e-6) and ((scores > 0) & (scores < 1)).all()
    call_stage(quantize, "--run", run, "--epochs", 0, "--codes", "3,3")
    with pytest.raises(common.UserError, match="ctr_deepfm.pt was made from another"):
        call_stage(ctr, "--run", run, "--models", "deepfm", "--score", run / "pairs.csv")


def test_every_flag_of_stage_04_changes_a_number(inferred, tmp_path):
    run = copy_run(inferred, tmp_path / "run")

    def numbers(*args):
        call_stage(ctr, "--run", run, "--seeds", 1, "--epochs", 3, "--ids", "userip", "--lr", 0.01, *args)
        rows = json.loads((run / "results.json").read_text())["rows"]
        return [(row["val_auc"], row["test_auc"], row["test_logloss"], row["ids"]) for row in rows]
    base = numbers()
    assert base == numbers()
    for flags in (("--seed", 1), ("--seeds", 2), ("--ids", "none"), ("--fields", "attributes"), ("--fields", "ids+attributes"),
                  ("--profile-input", "embedding"), ("--epochs", 1), ("--batch-size", 32), ("--lr", 0.002), ("--weight-decay", 0.01),
                  ("--models", "deepfm")):
        assert numbers(*flags) != base, flags
    assert numbers("--epochs", 30, "--patience", 1) != numbers("--epochs", 30, "--patience", 20)


# ---------------------------------------------------------------- the models against explicit loops over fields, one row at a time

def perceptron(module, x):
    """A Linear or a Sequential of them, ReLU and Dropout (off), by hand."""
    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.ReLU))]
    for layer in layers:
        x = [sum(w * value for w, value in zip(row, x)) + b for row, b in zip(layer.weight.tolist(), layer.bias.tolist())] \
            if isinstance(layer, nn.Linear) else [max(0.0, value) for value in x]
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
    query, key, value, skip = ([matrix(layer[name].weight, vector) for vector in e] for name in ("query", "key", "value", "skip"))
    result = []
    for i in range(len(e)):
        mixed = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            weights = softmax([dot(query[i][part], key[j][part]) / math.sqrt(width) for j in range(len(e))])
            mixed += [sum(weight * value[j][part][k] for j, weight in enumerate(weights)) for k in range(width)]
        result.append([max(0.0, a + b) for a, b in zip(mixed, skip[i])])
    return result


def batch_norm(norm, x):
    return [(value - mean) / math.sqrt(var + norm.eps) * w + b for value, mean, var, w, b in
            zip(x, norm.running_mean.tolist(), norm.running_var.tolist(), norm.weight.tolist(), norm.bias.tolist())]


def by_loops(name, model, e, w):
    """The logit of one row from its field embeddings e (F lists; field-aware: F x F lists) and first-order weights w (F)."""
    F, pairs = len(w or e), list(itertools.combinations(range(len(w or e)), 2))
    first = sum(w) + float(model.bias.detach()) if hasattr(model, "bias") else None
    if name == "lr":
        return 8 * first
    if name == "ffm":
        return first + sum(dot(e[i][j], e[j][i]) for i, j in pairs)
    if name == "afm":
        products = [times(e[i], e[j]) for i, j in pairs]
        attention = softmax([matrix(model.h.weight, [max(0.0, v) for v in perceptron(model.W, product)])[0] for product in products])
        return first + dot(model.p.weight[0].tolist(), [sum(a * product[k] for a, product in zip(attention, products)) for k in range(len(e[0]))])
    if name == "deepfm":
        return first + sum(dot(e[i], e[j]) for i, j in pairs) + perceptron(model.deep, flat(e))[0]
    if name == "pnn":
        return perceptron(model.deep, flat(e) + [dot(e[i], e[j]) for i, j in pairs])[0]
    if name == "onn":
        return perceptron(model.deep, flat(e[i][i] for i in range(F)) + [dot(e[i][j], e[j][i]) for i, j in pairs])[0]
    if name == "afn":
        logs = batch_norm(model.log_norm, [math.log(max(abs(value), 1e-4)) for value in flat(e)])
        D = len(e[0])
        crossed = [math.exp(value) for k in range(D) for value in perceptron(model.powers, [logs[i * D + k] for i in range(F)])]
        return first + perceptron(model.deep, batch_norm(model.exp_norm, crossed))[0]
    if name == "autoint":
        for layer in model.layers:
            e = attention_by_loops(layer, e, model.heads)
        return first + perceptron(model.head, flat(e))[0]
    if name == "difm":
        vectors = flat(attention_by_loops(model.attention, e, model.heads))
        m = [a + b for a, b in zip(perceptron(model.from_vectors, vectors), matrix(model.from_bits.weight, perceptron(model.deep, flat(e))))]
        return float(model.bias.detach()) + dot(m, w) + sum(m[i] * m[j] * dot(e[i], e[j]) for i, j in pairs)
    if name == "fibinet":
        means = [sum(vector) / len(vector) for vector in e]
        gates = [max(0.0, v) for v in perceptron(model.excite, [max(0.0, v) for v in perceptron(model.squeeze, means)])]
        both = (e, [[gate * value for value in vector] for gate, vector in zip(gates, e)])
        crossed = [times(matrix(W[p].T, v[i]), v[j]) for W, v in zip(model.W, both) for p, (i, j) in enumerate(pairs)]
        return first + perceptron(model.deep, flat(crossed))[0]
    x0 = x = flat(e)
    if name == "dcnv2":
        for layer in model.cross:
            x = [a * b + c for a, b, c in zip(x0, perceptron(layer, x), x)]
    else:
        for weight, bias in zip(model.cross.weight.tolist(), model.cross.bias.tolist()):
            x = [a * dot(x, weight) + b + c for a, b, c in zip(x0, bias, x)]
    return perceptron(model.head, x + perceptron(model.deep, x0))[0]


@pytest.mark.parametrize("name", ctr.MODELS)
def test_each_model_against_explicit_loops(name):
    torch.manual_seed(1)
    fields = [Field("user", 5), Field("item", 6), Field("genre", 3, 2), Field("profile_0", 4)]
    model = ctr.MODELS[name](fields)
    for parameter in model.parameters():  # large random values, so that every term matters
        nn.init.normal_(parameter, std=0.5)
    ids = torch.stack([torch.randint(0, 3, (40,)) for _ in range(5)], dim=1)
    for _ in range(3):
        model.train()(ids)  # fills BatchNorm's running figures
    model.eval()
    logits = model(ids)
    for row in range(3):
        e = model.embed(ids[row:row + 1])[0] if name != "lr" else torch.zeros(4, 8)
        e = e.view(4, 4, 8) if name in ("ffm", "onn") else e
        w = model.weights(ids[row:row + 1])[0, :, 0].tolist() if hasattr(model, "weights") else None
        assert float(logits[row].detach()) == pytest.approx(by_loops(name, model, e.detach().tolist(), w), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", ctr.MODELS)
def test_each_model_trains_every_parameter_and_learns(name):
    """A world where users of even number like items of even number: only a product of the two fields can say it."""
    torch.manual_seed(0)
    ids = torch.cartesian_prod(torch.arange(8), torch.arange(8)).repeat(40, 1)
    labels = ((ids[:, 0] + ids[:, 1]) % 2 == 0).float()
    model = ctr.MODELS[name]([Field("user", 8), Field("item", 8)])
    optimizer, start = torch.optim.Adam(model.parameters(), lr=0.01), [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(400):
        batch = torch.randint(len(ids), (256,))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(ids[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    constant = {"h.weight", "W.weight", "W.bias"} if name == "afm" else set()  # one pair: its attention is 1
    still = {n for (n, parameter), before in zip(model.named_parameters(), start) if torch.equal(parameter, before)}
    assert still <= constant
    model.eval()
    score = common.auc(labels, ctr.predict(model, ids))
    assert score > 0.95 if name != "lr" else abs(score - 0.5) < 0.1


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
