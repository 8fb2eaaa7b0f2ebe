"""Stage 04, second net: what the first tests let pass.

Adapters first: what a rewrite changes is changed there alone.
"""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call_stage, copy_run, ctr, settings, small_world
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn

import common

CPU = torch.device("cpu")


# ---------------------------------------------------------------- adapters

def train_cell(dataset, model, ids, seed, inputs, flag_seed=0, **changes):
    """(row of results.json, state of the best epoch, test probabilities) of one cell of the table."""
    defaults = {"fields": "ids", "profile_input": "codes", "lr": 1e-3, "batch_size": 64, "epochs": 2,
                "patience": 9, "weight_decay": 0.0, "user_dropout": 0.0}
    args = settings(**{**defaults, "seed": flag_seed, **changes})
    cell = ctr.run_one(dataset, model, ids, seed, inputs, args, CPU)
    return cell["row"], cell["state"], cell["test"].numpy()


def inputs_with(codes, sizes=(4, 3), **banks):
    """Inputs whose bank of userip is codes (U, M); others by name: NAME=(codes, sizes)."""
    return ctr.Inputs({"userip": (codes, list(sizes)), **banks})


NOTHING = ctr.Inputs({})


def inputs_of(run, profile_input="codes"):
    """(dataset, Inputs) as main() reads them."""
    return ctr.read_inputs(SimpleNamespace(run=run, ids=["none", "userip"], profile_input=profile_input))


# ---------------------------------------------------------------- what the model is shown

class Probe(nn.Module):
    """Not a recommender: it notes what it is shown, and gives every pair the same logit."""

    made = []

    def __init__(self, fields):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.first, self.trained, self.scored, self.epoch = self.weight.tolist(), [[]], [[]], 0
        Probe.made.append(self)

    def forward(self, ids):
        if self.training:
            if self.scored[-1]:  # back from an evaluation: a new epoch
                self.trained.append([])
                self.scored.append([])
            self.trained[-1].append(ids.tolist())
        else:
            self.scored[-1] += ids.tolist()
        return self.weight.sum() * 0 + torch.zeros(len(ids))


@pytest.fixture
def probe(monkeypatch):
    """probe(dataset, ids, seed, **changes) trains a Probe and returns (probe, row)."""
    monkeypatch.setitem(ctr.MODELS, "probe", Probe)

    def run(dataset, ids="none", seed=0, inputs=None, **changes):
        row, *_ = train_cell(dataset, "probe", ids, seed, inputs or NOTHING, **changes)
        return Probe.made[-1], row
    return run


def pairs_of(dataset, split):
    return sorted(row[:2] for row in dataset.interactions.tolist() if row[3] == split)


def test_an_epoch_is_every_training_row_once_in_a_new_order_and_no_other(probe, world):
    dataset = world[0]
    model, _ = probe(dataset, epochs=3)
    wanted = pairs_of(dataset, common.TRAIN)
    epochs = [[pair for batch in epoch for pair in batch] for epoch in model.trained]
    assert len(epochs) == 3 and all(sorted(epoch) == wanted for epoch in epochs)
    stored = [row[:2] for row in dataset.interactions.tolist() if row[3] == common.TRAIN]
    orders = [*epochs, stored, wanted]
    assert all(a != b for i, a in enumerate(orders[:3]) for b in orders[i + 1:])
    for epoch in model.trained:
        assert {len(batch) for batch in epoch[:-1]} == {64} and 2 <= len(epoch[-1]) <= 64
    first = [dataset.users[user] for user, _ in epochs[0][:200]]
    assert len(set(first)) > 60  # rows are mixed, not only chunks or users moved


def test_validation_is_scored_once_an_epoch_and_test_once(probe, world):
    dataset = world[0]
    model, _ = probe(dataset, epochs=3)
    validation, test = pairs_of(dataset, common.VALIDATION), pairs_of(dataset, common.TEST)
    assert [sorted(scored) for scored in model.scored[:2]] == [validation] * 2
    last = model.scored[2]
    assert sorted(last[:len(validation)]) == validation and sorted(last[len(validation):]) == test


def test_the_first_of_equal_epochs_is_the_best_and_patience_counts_from_there(probe, world):
    model, row = probe(world[0], epochs=20, patience=3)
    assert row["best_epoch"] == 1 and row["val_auc"] == 0.5 and len(model.trained) == 4


def test_initial_weights_and_order_are_paired_over_ids_and_new_for_each_seed(probe, world):
    dataset, truth = world
    inputs = inputs_with(truth)
    made = {
        (ids, seed): probe(dataset, ids, seed, inputs, epochs=1)[0]
        for ids in ("none", "userip", "random")
        for seed in (0, 1)
    }
    for seed in (0, 1):
        assert len({tuple(made[ids, seed].first) for ids in ("none", "userip", "random")}) == 1
        orders = [
            [[pair[0], pair[-1]] for batch in made[ids, seed].trained[0] for pair in batch]
            for ids in ("none", "userip", "random")
        ]
        assert orders[0] == orders[1] == orders[2]  # user and item stand first and last
    one, two = made["none", 0], made["none", 1]
    assert one.first != two.first and one.trained != two.trained


def test_flag_seed_changes_the_initial_weights(world):
    first, second = (
        train_cell(world[0], "dcn", "none", 0, NOTHING, epochs=1, flag_seed=base)
        for base in (0, 1)
    )
    assert not torch.equal(first[1]["cross.weight"], second[1]["cross.weight"])


def test_random_and_shuffled_codes_are_new_for_each_seed(monkeypatch, world):
    dataset, truth = world
    original, drawn = ctr.codes_of, {}

    def recorded(ids, *args):
        codes, sizes = original(ids, *args)
        drawn.setdefault(ids, []).append(np.array(codes))
        return codes, sizes

    monkeypatch.setattr(ctr, "codes_of", recorded)
    for seed in range(3):
        for ids in ("random", "shuffled"):
            train_cell(dataset, "lr", ids, seed, inputs_with(truth), epochs=1)
    for ids, codes in drawn.items():
        assert all((codes[a] != codes[b]).any(axis=1).mean() > 0.5 for a, b in ((0, 1), (0, 2), (1, 2))), ids


def test_random_codes_are_uniform_over_the_codebook_and_shuffled_ones_a_permutation_of_users():
    bank = np.array([[0, 2]] * 900 + [[4, 3]] * 100, dtype=np.int16)  # unused codes, some users unknown
    banks = {"userip": (bank, [4, 3])}
    random, sizes = ctr.codes_of("random", banks, np.random.default_rng(0))
    assert sizes == [4, 3]
    for m, size in enumerate((4, 3)):
        share = np.bincount(random[:, m], minlength=size) / 1000
        assert len(share) == size and share.tolist() == pytest.approx([1 / size] * size, abs=0.06)
    assert abs(np.corrcoef(random.T)[0, 1]) < 0.1
    shuffled, _ = ctr.codes_of("shuffled", banks, np.random.default_rng(0))
    assert sorted(map(tuple, shuffled)) == sorted(map(tuple, bank))
    assert 0.02 < np.mean((shuffled[900:] == [4, 3]).all(axis=1)) < 0.25  # the unknown sit on anybody now


def test_a_bank_by_name_has_controls_of_its_own():
    mine = np.arange(300, dtype=np.int16)[:, None] % 7
    banks = {"userip": (np.zeros((300, 2), np.int16), [4, 3]), "mine": (mine, [9])}
    assert ctr.codes_of("none", banks, None) == (None, None)
    for name in banks:
        codes, sizes = ctr.codes_of(name, banks, None)
        assert np.array_equal(codes, banks[name][0]) and sizes == banks[name][1]
    random, sizes = ctr.codes_of("random-mine", banks, np.random.default_rng(0))
    assert sizes == [9] and set(random[:, 0].tolist()) == set(range(9))  # two codes that nobody has
    shuffled, sizes = ctr.codes_of("shuffled-mine", banks, np.random.default_rng(0))
    assert sizes == [9] and (shuffled != mine).any()
    assert np.array_equal(np.sort(shuffled, 0), np.sort(mine, 0))


# ---------------------------------------------------------------- user dropout and cold users

@pytest.fixture(scope="module")
def cold_world():
    """(Dataset, truth): three users in ten are cold."""
    return small_world(cold_users=0.3)


def shown(epoch):
    """The ids of an epoch's batches, a row each."""
    return np.array([ids for batch in epoch for ids in batch])


def hidden_rows(codes, users, rows):
    """What rows look like whose user is the unknown one: (user, codes of the true user, item)."""
    return sorted((users, *codes[user].tolist(), item) for user, item in rows)


def test_user_dropout_puts_the_unknown_user_into_column_0_and_touches_no_other(probe, world):
    """His codes and the item stay; which rows, is drawn anew in each epoch; nothing is hidden in scoring."""
    dataset, truth = world
    model, _ = probe(dataset, "userip", inputs=inputs_with(truth), epochs=4, user_dropout=0.6)
    stranger, train = len(dataset.users), pairs_of(dataset, common.TRAIN)
    wanted, met = hidden_rows(truth, stranger, train), []
    for epoch in map(shown, model.trained):
        assert sorted((stranger, *row[1:]) for row in epoch.tolist()) == wanted
        known = epoch[epoch[:, 0] != stranger]
        assert 1 - len(known) / len(epoch) == pytest.approx(0.6, abs=0.06)
        assert (known[:, 1:3] == truth[known[:, 0]]).all()
        pairs = set(map(tuple, known[:, [0, 3]].tolist()))
        assert pairs <= set(map(tuple, train))
        met.append(pairs)
    assert len(set.union(*met)) > 0.8 * len(train)
    assert max(row[0] for scored in model.scored for row in scored) < stranger


def test_who_is_dropped_is_paired_over_ids_and_nobody_is_where_there_is_no_user(probe, world):
    dataset, truth = world
    dropped = []
    for ids in ("none", "random", "userip"):
        model, _ = probe(dataset, ids, inputs=inputs_with(truth), epochs=1, user_dropout=0.5)
        dropped.append([(row[0], row[-1]) for row in shown(model.trained[0]).tolist()])
    assert dropped[0] == dropped[1] == dropped[2]
    model, _ = probe(dataset, "userip", inputs=inputs_with(truth), epochs=1, user_dropout=0.9,
                     fields="attributes")
    found = sorted(map(tuple, shown(model.trained[0])[:, :3].tolist()))
    assert found == sorted((*truth[user].tolist(), item) for user, item in pairs_of(dataset, common.TRAIN))


def test_the_rule_of_user_dropout(world, cold_world):
    def dropout(rows, cold=False):
        """Ten users of `rows` training rows each, one row of each other split."""
        interactions = [(user, 0, 1, common.TRAIN) for user in range(10) for _ in range(rows)]
        interactions += [(0, 0, 1, common.VALIDATION), (0, 0, 1, common.TEST)]
        interactions += [(11, 0, 1, common.SUPPORT)] * 900 + [(11, 0, 1, common.COLD)] if cold else []
        found = dataclasses.replace(world[0], interactions=np.array(interactions, np.int32))
        return ctr.default_user_dropout(found)

    assert [dropout(rows) for rows in (2, 29, 30, 90)] == [0.85, 0.85, 0, 0]
    assert [dropout(rows, cold=True) for rows in (29, 30)] == [0.85, 0.5]


def test_cold_rows_are_scored_and_the_epoch_chosen_with_the_user_hidden(probe, cold_world):
    dataset, truth = cold_world
    model, row = probe(dataset, "userip", inputs=inputs_with(truth), epochs=1)
    stranger = len(dataset.users)
    scored = [tuple(ids) for ids in model.scored[0]]
    validation, test, cold = (pairs_of(dataset, split) for split in
                              (common.VALIDATION, common.TEST, common.COLD))
    ends = np.cumsum([len(validation), len(test), len(cold)])
    assert len(scored) == ends[2] and min(map(len, (validation, test, cold))) > 50
    assert sorted(scored[:ends[0]]) == hidden_rows(truth, stranger, validation)
    plain = sorted((user, *truth[user].tolist(), item) for user, item in test)
    assert sorted(scored[ends[0]:ends[1]]) == plain
    assert sorted(scored[ends[1]:]) == hidden_rows(truth, stranger, cold)
    assert row["cold_auc"] == row["cold_gauc"] == 0.5
    trained = sorted((row[0], row[3]) for row in shown(model.trained[0]).tolist())
    assert trained == sorted(map(tuple, pairs_of(dataset, common.TRAIN)))  # neither support nor cold rows
    model, _ = probe(dataset, "userip", inputs=inputs_with(truth), epochs=1, fields="attributes")
    assert max(ids[0] for ids in model.scored[0]) < 4  # there is no user: column 0 is a code, and stays


def test_cold_figures_are_of_cold_rows_within_their_true_users(cold_world):
    dataset, truth = cold_world
    args = settings(seed=0, fields="ids", lr=0.02, batch_size=64, epochs=4, patience=9, weight_decay=0.0,
                    user_dropout=0.5)
    cell = ctr.run_one(dataset, "dcn", "userip", 0, inputs_with(truth), args, CPU)
    fields, lookup = ctr.build_features(dataset, "ids", truth, [4, 3])
    model = ctr.MODELS["dcn"](fields)
    model.load_state_dict(cell["state"])
    users, items, labels = dataset.rows(common.COLD).T
    ids = lookup(users, items)
    ids[:, 0] = len(dataset.users)
    with torch.no_grad():
        scores = torch.sigmoid(model.eval()(ids)).numpy()
    assert np.allclose(cell["cold"].numpy(), scores, atol=1e-6)
    row = cell["row"]
    assert row["cold_auc"] == pytest.approx(roc_auc_score(labels, scores))
    assert row["cold_logloss"] == pytest.approx(log_loss(labels, scores.astype(float)), rel=1e-5)
    assert row["cold_gauc"] == pytest.approx(gauc_by_loops(users, labels, scores))


# ---------------------------------------------------------------- training

def with_labels(dataset, split, label_of):
    rows = np.array(dataset.interactions)
    for row in rows:
        if row[3] == split or split is None:
            row[2] = label_of(row)
    return dataclasses.replace(dataset, interactions=rows)


def test_validation_and_test_labels_move_no_weight(world):
    """One epoch, so that it is the best whatever the labels say."""
    dataset, states = world[0], []
    for changed in (dataset, with_labels(dataset, common.VALIDATION, lambda row: 1 - row[2]),
                    with_labels(dataset, common.TEST, lambda row: 1 - row[2])):
        states.append(train_cell(changed, "dcn", "none", 0, NOTHING, epochs=1)[1])
    assert all(torch.equal(states[0][key], other[key]) for other in states[1:] for key in states[0])


def test_each_row_keeps_its_own_label(world):
    """Items of even number are liked: the first-order weights suffice, if labels stay beside their rows."""
    dataset = with_labels(world[0], None, lambda row: row[1] % 2)
    row, *_ = train_cell(dataset, "lr", "none", 0, NOTHING, epochs=25, lr=0.01)
    assert row["val_auc"] > 0.95 and row["test_auc"] > 0.95


class Scripted(nn.Module):
    """It knows the labels: evaluated after an epoch of the script it says shift + sign * label, else 0."""

    labels, script = {}, {}

    def __init__(self, fields):
        super().__init__()
        self.w, self.resumes = nn.Parameter(torch.zeros(1)), True
        self.register_buffer("epoch", torch.tensor(0))

    def forward(self, ids):
        if self.training and self.resumes:
            self.epoch += 1
        self.resumes = not self.training
        shift, sign = self.script.get(int(self.epoch), (0.0, 0.0))
        said = torch.tensor([self.labels[tuple(pair)] for pair in ids.tolist()])
        return self.w * 0 + shift + sign * said


def scripted(monkeypatch, dataset, script, **changes):
    monkeypatch.setitem(ctr.MODELS, "scripted", Scripted)
    Scripted.labels = {(user, item): float(label) for user, item, label, _ in dataset.interactions.tolist()}
    Scripted.script = script
    return train_cell(dataset, "scripted", "none", 0, NOTHING, epochs=20, patience=4, **changes)


def test_the_epoch_of_the_best_validation_figures_is_the_best(monkeypatch, world):
    row, state, scores = scripted(monkeypatch, world[0], {1: (0, -1), 3: (0, 1)})
    assert (row["best_epoch"], row["val_auc"], row["test_auc"]) == (3, 1.0, 1.0)
    assert int(state["epoch"]) == 3 and sorted(set(scores.tolist())) == pytest.approx([0.5, 0.731], abs=1e-3)


def test_neither_a_high_auc_with_absurd_probabilities_nor_the_logloss_alone_is_the_best(monkeypatch, world):
    """AUC - logloss decides: epoch 2 ranks like epoch 4 and says 0 to all; epoch 6 is a better constant."""
    rows = world[0].interactions
    share = rows[rows[:, 3] == common.VALIDATION, 2].mean()
    best_constant = float(np.log(share / (1 - share)))
    script = {2: (-9, 1), 4: (best_constant - 2.2, 1), 6: (best_constant, 0)}
    row, state, _ = scripted(monkeypatch, world[0], script)
    assert row["best_epoch"] == 4 == int(state["epoch"]) and row["val_auc"] == 1
    value = [(label, 1 / (1 + np.exp(-(best_constant - 2.2 + label)))) for label in (0, 1)]
    logloss = -(1 - share) * np.log(1 - value[0][1]) - share * np.log(value[1][1])
    constant = -(1 - share) * np.log(1 - share) - share * np.log(share)
    assert row["val_logloss"] == pytest.approx(logloss, rel=1e-4) and logloss > constant


def gauc_by_loops(users, labels, scores):
    """AUC of each user who has both labels, weighted by his rows."""
    weighted, rows = 0.0, 0
    for user in set(users.tolist()):
        own = users == user
        if 0 < labels[own].sum() < own.sum():
            weighted += own.sum() * roc_auc_score(labels[own], scores[own])
            rows += own.sum()
    return weighted / rows


@pytest.mark.parametrize("ids", ["none", "userip"])
def test_figures_and_state_are_those_of_the_best_epoch(world, ids):
    dataset, truth = world
    inputs = inputs_with(truth)
    row, state, probabilities = train_cell(dataset, "dcn", ids, 0, inputs, epochs=9, lr=0.03)
    assert 1 <= row["best_epoch"] < 9  # later epochs are worse: what is kept must not be theirs
    fields, lookup = ctr.build_features(dataset, "ids", *((None, None) if ids == "none" else (truth, [4, 3])))
    model = ctr.MODELS["dcn"](fields)
    model.load_state_dict(state)
    model.eval()
    found = {}
    for split in (common.VALIDATION, common.TEST):
        rows = dataset.interactions[dataset.interactions[:, 3] == split]
        with torch.no_grad():
            found[split] = torch.sigmoid(model(lookup(rows[:, 0], rows[:, 1]))).double().numpy(), rows[:, 2]
    assert np.allclose(found[common.TEST][0], probabilities, atol=1e-6)
    assert row["val_auc"] == pytest.approx(
        roc_auc_score(found[common.VALIDATION][1], found[common.VALIDATION][0])
    )
    assert row["test_auc"] == pytest.approx(roc_auc_score(found[common.TEST][1], found[common.TEST][0]))
    assert row["val_logloss"] == pytest.approx(
        log_loss(found[common.VALIDATION][1], found[common.VALIDATION][0]), rel=1e-5
    )
    assert row["test_logloss"] == pytest.approx(
        log_loss(found[common.TEST][1], found[common.TEST][0]), rel=1e-5
    )
    users = dataset.interactions[dataset.interactions[:, 3] == common.TEST, 0]
    assert row["test_gauc"] == pytest.approx(gauc_by_loops(users, found[common.TEST][1], probabilities))
    assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert "cold_auc" not in row


@pytest.mark.parametrize("name", ["dcn", "dcnv2", "deepfm", "pnn", "onn", "afn", "difm", "fibinet", "afm"])
def test_a_fifth_of_the_units_is_dropped_in_training_and_none_in_scoring(monkeypatch, world, name):
    kept, original = {True: [], False: []}, nn.Dropout.forward

    def recorded(self, x):
        out = original(self, x)
        there = x.detach() != 0
        kept[torch.is_grad_enabled()].append(
            (float((out.detach() != 0)[there].float().sum()), float(there.sum()))
        )
        return out

    monkeypatch.setattr(nn.Dropout, "forward", recorded)
    train_cell(world[0], name, "none", 0, NOTHING, epochs=2)
    assert kept[True] and kept[False]
    per_epoch = np.array_split(np.array(kept[True]), 2)
    for half in per_epoch:
        assert half[:, 0].sum() / half[:, 1].sum() == pytest.approx(0.8, abs=0.02)
    scored = np.array(kept[False])
    assert scored[:, 0].sum() == scored[:, 1].sum() > 0


# ---------------------------------------------------------------- features

def test_noise_in_the_place_of_theta_has_its_scale(inferred):
    inputs = inputs_of(inferred, "embedding")[1]
    for ids in ("userip", "random", "shuffled"):
        found = inputs.of(ids, (0, 1))[2]
        for m in range(2):
            varies = found[:, m].any(0)
            assert found[:, m, varies].std() == pytest.approx(1, abs=0.1), ids


def test_theta_of_each_user_is_his_own_and_an_unseen_user_s_is_0(inferred):
    dataset, inputs = inputs_of(inferred, "embedding")
    theta = np.load(inferred / "profiles.npy").astype(np.float64)
    for m in range(2):  # centred over users, one scale a profile
        centred = theta[:, m] - theta[:, m].mean(axis=0)
        scale = np.sqrt(np.mean(centred[:, centred.any(0)] ** 2))  # of the directions that there are
        assert np.allclose(inputs.z[:, m], centred / scale, atol=1e-3)
    # Stage 02's theta is centred already where it chose its directions from all users: here it is not.
    assert np.allclose(ctr.standardized(theta + 3), inputs.z, atol=1e-3)
    fields, lookup = ctr.build_features(dataset, "ids", *inputs.banks["userip"], inputs.z)
    model = ctr.MODELS["dcn"](fields).eval()
    users = np.array([7, 3, len(dataset.users)])
    embedded = model.embed(lookup(users, np.array([0, 1, 2])))
    names = [field.name for field in fields]
    assert names == ["user", "profile_0", "profile_1", "item"]
    vectors = np.concatenate([inputs.z, np.zeros_like(inputs.z[:1])])[users]
    for m in range(2):
        at = lookup(users, np.array([0, 1, 2]))[:, 1 + m].numpy()
        assert np.allclose(fields[1 + m].vectors.numpy()[at], vectors[:, m], atol=1e-6)
    gaps = (embedded[0, 1:3] - embedded[1, 1:3]).abs().sum(1)
    assert (gaps > 1e-4).all()


def test_users_without_a_history_stay_at_0_like_an_unseen_user_and_move_nobody_s_theta():
    z = np.random.default_rng(0).normal(2, 1, (30, 2, 3)).astype(np.float32)
    z[[4, 9]] = 0
    rest = np.delete(z, [4, 9], axis=0)
    found = ctr.standardized(z)
    assert not found[[4, 9]].any()
    assert np.allclose(np.delete(found, [4, 9], axis=0), ctr.standardized(rest), atol=1e-6)


def test_with_theta_the_controls_are_vectors_too(inferred, tmp_path):
    """Codes would be no control: d numbers a user tell who he is. Noise as wide has as many parameters."""
    dataset, inputs = inputs_of(inferred, "embedding")
    theta = inputs.z
    assert inputs.of("userip", (0, 0, 4))[2] is theta and inputs.of("none", (0, 0, 4)) == (None, None, None)
    noise, again, other = (inputs.of("random", (0, seed, 4))[2] for seed in (0, 0, 1))
    assert noise.shape == theta.shape and np.array_equal(noise, again) and not np.array_equal(noise, other)
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    assert np.array_equal(inputs.of("random-userip", (0, 0, 4))[2], noise)
    lent = inputs.of("shuffled", (0, 0, 4))[2]
    rows = [theta.reshape(len(theta), -1), lent.reshape(len(theta), -1)]
    assert np.array_equal(*(found[np.lexsort(found.T)] for found in rows))
    assert (rows[0] != rows[1]).any(1).sum() > 90
    run = copy_run(inferred, tmp_path / "run")
    call_stage(ctr, "--run", run, "--profile-input", "embedding", "--seeds", 1, "--epochs", 1,
               "--ids", "random,shuffled,userip,planted")
    rows = {row["ids"]: row["parameters"] for row in json.loads((run / "results.json").read_text())["rows"]}
    assert rows["random"] == rows["shuffled"] == rows["userip"] != rows["planted"]


def test_theta_that_somebody_changed_is_refused(inferred, tmp_path):
    run = copy_run(inferred, tmp_path / "run")
    np.save(run / "profiles.npy", np.load(run / "profiles.npy")[::-1])
    inputs_of(run)  # codes do not read it
    with pytest.raises(common.UserError, match="quantize.json was made from another profiles.npy"):
        call_stage(
            ctr, "--run", run, "--profile-input", "embedding", "--seeds", 1, "--epochs", 1, "--ids", "userip"
        )


@pytest.mark.parametrize("name, ids", [("mine", "mine"), ("my-own", "shuffled-my-own"),
                                       ("randomly", "randomly"), ("shuffledness", "random-shuffledness"),
                                       ("dataset", "dataset")])
def test_a_checkpoint_vouches_for_the_bank_it_was_trained_on_whatever_its_name(inferred, tmp_path, name, ids):
    run = copy_run(inferred, tmp_path / "run")
    dataset, _ = inputs_of(run)
    card = {"codes": [3], "dataset_fingerprint": dataset.fingerprint(), "made_by": "a test"}
    (run / f"feature_bank_{name}.json").write_text(json.dumps(card))
    prints = []
    for shift in (0, 0, 1):
        np.save(run / f"feature_bank_{name}.npy", (np.arange(len(dataset.users))[:, None] + shift) % 3)
        call_stage(ctr, "--run", run, "--seeds", 1, "--epochs", 1, "--ids", ids)
        made = common.load(run, "ctr_dcn.json")
        prints.append(made["fingerprints"])
        assert made["ids"] == ids
    assert prints[0] == prints[1] != prints[2]


def test_an_item_of_many_values_has_them_all(world):
    dataset, _ = world
    items = [{**item, "attributes": {"hobby": values, "background": []}} for item, values in
             zip(dataset.items, (["b", "a"], ["c"], [], *[["a", "b", "c"]] * (len(dataset.items) - 3)))]
    fields, lookup = ctr.build_features(
        dataclasses.replace(dataset, items=items), "ids+attributes", None, None
    )
    assert [(field.name, field.size, field.columns) for field in fields[2:]] == [("item_hobby", 3, 3)]
    ids = lookup(np.zeros(5, int), np.array([0, 1, 2, 3, len(items)]))[:, 2:].tolist()
    assert [sorted(row) for row in ids] == [[0, 1, 3], [2, 3, 3], [3, 3, 3], [0, 1, 2], [3, 3, 3]]


# ---------------------------------------------------------------- how the models start

FIELDS = [common.Field("user", 40), common.Field("item", 50), common.Field("profile_0", 5)]


def started(name, seed=0, fields=FIELDS):
    torch.manual_seed(seed)
    ids = [torch.randint(field.size, (300,)) for field in fields]
    return ctr.MODELS[name](fields).eval(), torch.stack(ids, dim=1)


def pair_sum(e):
    """sum over i < j of <e_i, e_j>."""
    return sum((e[:, i] * e[:, j]).sum(1) for i in range(e.shape[1]) for j in range(i + 1, e.shape[1]))


@pytest.mark.parametrize(
    "name, std",
    [("dcn", 0.05), ("deepfm", 0.05), ("ffm", 0.05), ("pnn", 0.05), ("difm", 0.01), ("fibinet", 0.005)],
)
def test_embeddings_start_as_small_as_the_model_needs(name, std):
    model, ids = started(name)
    assert float(model.embed(ids).detach().std()) == pytest.approx(std, rel=0.1)


def test_afm_starts_as_a_plain_fm():
    model, ids = started("afm", fields=FIELDS[:2])  # one pair: its attention is 1
    assert torch.allclose(model(ids) - model.first_order(ids), pair_sum(model.embed(ids)), atol=1e-7)


def test_difm_starts_as_a_plain_fm():
    model, ids = started("difm")
    with torch.no_grad():
        model.weights.table.weight.normal_()
    logits, first = model(ids).detach(), model.first_order(ids).detach()
    slope = float((logits * first).sum() / (first * first).sum())
    assert slope == pytest.approx(1, abs=0.15)


def test_fibinet_s_gates_start_open_and_its_products_are_large_beside_their_embeddings():
    model, ids = started("fibinet")
    seen = []
    model.deep.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    model(ids)
    e = model.embed(ids).detach()
    plain = torch.stack([e[:, i] * e[:, j] for i in range(3) for j in range(i + 1, 3)], dim=1).flatten(1)
    for half in seen[0].chunk(2, dim=1):  # of the embeddings, and of the embeddings behind SENET's gates
        assert float((half * plain).sum() / (plain * plain).sum()) == pytest.approx(5, rel=0.15)


@pytest.mark.parametrize("name", ["dcn", "dcnv2", "deepfm", "pnn", "onn", "afn", "difm", "fibinet"])
def test_the_mlp_is_16_16_with_xavier_weights_and_bias_0(name):
    model, _ = started(name)
    layers = [layer for layer in model.deep.modules() if isinstance(layer, nn.Linear)][:2]
    assert [layer.out_features for layer in layers] == [16, 16]
    for layer in layers:
        assert not layer.bias.any()
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert 0.9 * bound < float(layer.weight.detach().abs().max()) <= bound
    assert [layer.p for layer in model.deep.modules() if isinstance(layer, nn.Dropout)] == [0.2, 0.2]


def test_the_mlp_is_rectified():
    torch.manual_seed(0)
    hidden = common.mlp(12).eval()(torch.randn(50, 12))
    assert hidden.shape == (50, 16) and (hidden >= 0).all() and 0.2 < (hidden == 0).float().mean() < 0.8


def test_cross_layers_start_in_proportion_to_their_width():
    torch.manual_seed(0)
    for width in (16, 400):
        assert float(common.CrossNetwork(width, 40).weight.detach().std()) == pytest.approx(
            width**-0.5, rel=0.1
        )


def test_afn_survives_embeddings_of_0():
    model, ids = started("afn")
    ids[:, 0] = FIELDS[0].size  # an unseen user
    logits = model.train()(ids)
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert all(
        torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None
    )


# ---------------------------------------------------------------- the table and the checkpoint

def test_the_checkpoint_is_userip_of_seed_0_and_figures_are_those_of_the_predictions(
        inferred, tmp_path):
    run = copy_run(inferred, tmp_path / "run")
    call_stage(ctr, "--run", run, "--seeds", 2, "--epochs", 2, "--ids", "none,userip,random", "--lr", 0.02)
    dataset, inputs = inputs_of(run)
    test = dataset.interactions[dataset.interactions[:, 3] == common.TEST]
    fields, lookup = ctr.build_features(dataset, "ids", *inputs.banks["userip"])
    model = ctr.MODELS["dcn"](fields)
    model.load_state_dict(common.load(run, "ctr_dcn.pt"))
    first = np.load(run / "predictions" / "dcn-userip-0.npy")
    assert np.allclose(ctr.predict(model, lookup(test[:, 0], test[:, 1])), first, atol=1e-6)
    results = common.load(run, "results.json")
    assert len(results["rows"]) == 6
    for row in results["rows"]:
        probabilities = np.load(run / "predictions" / f"dcn-{row['ids']}-{row['seed']}.npy")
        assert row["test_auc"] == pytest.approx(roc_auc_score(test[:, 2], probabilities))
    assert len({row["test_logloss"] for row in results["rows"]}) == 6  # no two cells are the same run


class Slope(nn.Module):
    """A weight plus an embedding, the same logit for every pair; it notes both values at each step."""

    made = []

    def __init__(self, fields):
        super().__init__()
        self.w, self.path = nn.Parameter(torch.tensor(0.0)), []
        self.e = common.FieldEmbedding([common.Field("all", 1)], 1)
        self.e.table.weight.data[0] = 0.4
        Slope.made.append(self)

    def forward(self, ids):
        e = self.e(torch.zeros(len(ids), 1, dtype=torch.long))[:, 0, 0]
        if self.training:
            self.path.append((float(self.w.detach()), float(e[0].detach())))
        return self.w + e


def test_a_step_is_adam_on_eq_9_with_an_l2_penalty_on_embeddings_alone(monkeypatch, world):
    """One batch, so its gradients can be written down: sigmoid(w + e) - mean(y), for e also penalty * e."""
    monkeypatch.setitem(ctr.MODELS, "slope", Slope)
    rate = world[0].rows(common.TRAIN)[:, 2].mean()
    train_cell(world[0], "slope", "none", 0, NOTHING, epochs=30, patience=30, batch_size=10**6, lr=0.05,
               weight_decay=0.5)
    x, first, second, path = np.array([0.0, 0.4]), np.zeros(2), np.zeros(2), []
    for t in range(1, 31):
        path.append(x.tolist())
        gradient = 1 / (1 + np.exp(-x.sum())) - rate + np.array([0, 0.5]) * x
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient ** 2
        x = x - 0.05 * (first / (1 - 0.9 ** t)) / (np.sqrt(second / (1 - 0.999 ** t)) + 1e-8)
    assert np.allclose(Slope.made[-1].path, path, atol=2e-4)


def test_the_penalty_is_on_every_embedding_table_and_on_nothing_else():
    """Projections of theta, layers and biases have none; first-order weights are embeddings of width 1."""
    fields = [*FIELDS[:2], common.Field("profile_0", 6, vectors=torch.randn(6, 5))]
    for name, build in ctr.MODELS.items():
        model = build(fields)
        penalised = {id(weight): group["weight_decay"] for group in
                     ctr.adam(model, settings(lr=1e-3, weight_decay=0.7)).param_groups
                     for weight in group["params"]}
        for at, weight in model.named_parameters():
            assert penalised.pop(id(weight)) == (0.7 if at.endswith("table.weight") else 0), (name, at)
        assert not penalised
