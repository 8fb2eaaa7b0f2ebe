"""Stage 01, common.py and docs/tables.py, second net.

Adapters first: what a rewrite changes is changed there alone.
"""

import collections
import json
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import (call_stage, copy_run, ctr, infer, load_script, make_lm, prepare, prepare_args, quantize,
                      small_world)
from test_prepare import write_ml_100k

import common
from common import Field, FieldEmbedding

# ---------------------------------------------------------------- adapters


def source_of(users, items, ratings=None, times=None):
    """A Source of raw ids "0", "1", ... in the order given."""
    names = [str(number) for number in range(max(*users, *items) + 1)]
    ratings = np.full(len(users), 5.0) if ratings is None else ratings
    return prepare.Source(names, names, np.asarray(users, np.int32), np.asarray(items, np.int32),
                          np.asarray(ratings, np.float32), times, {}, {}, (), "?")


def mean_sd(values):
    found = ctr.mean_sd(values)
    return found["mean"], found["sd"]


def price_levels(prices):
    """{id: level} of products {id: (category, price)}."""
    facts = {
        raw: {"id": raw, "title": raw, "brand": "", "categories": [category], "price": price, "level": None}
        for raw, (category, price) in prices.items()
    }
    attributes = prepare.describe_products(facts)[1]
    return {raw: (found["background"] or [None])[0] for raw, found in attributes.items()}


def stage_01(folder, lines, *flags):
    """(Dataset, run) of stage 01 on a CSV of who,what,stars,when."""
    folder.mkdir(exist_ok=True)
    (folder / "r.csv").write_text(
        "who,what,stars,when\n" + "".join(",".join(map(str, line)) + "\n" for line in lines)
    )
    call_stage(prepare, "--run", folder / "run", "--dataset", "csv", "--ratings-file", folder / "r.csv",
               "--user-col", "who", "--item-col", "what", "--rating-col", "stars", "--time-col", "when",
               "--min-interactions", 1, *flags)
    return common.load_dataset(folder / "run"), folder / "run"


# ---------------------------------------------------------------- stage 01: rows, labels, order, split

def stored(dataset):
    """[(raw user, raw item, label)] in stored order."""
    return [
        (dataset.users[user], dataset.items[item]["id"], label)
        for user, item, label, _ in dataset.interactions.tolist()
    ]


def test_of_a_repeated_pair_the_last_in_time_stays_and_in_the_file_where_times_are_equal(tmp_path):
    lines = [(f"u{i}", f"i{j}", 5, 100 + i) for i in range(4) for j in range(4)]
    lines += [("u0", "i0", 1, 900), ("u1", "i1", 1, 50), ("u2", "i2", 1, 102), ("u0", "i0", 5, 800)]
    dataset, _ = stage_01(tmp_path / "a", lines)
    label = {pair[:2]: pair[2] for pair in stored(dataset)}
    assert len(stored(dataset)) == len(label) == 16
    assert (label["u0", "i0"], label["u1", "i1"], label["u2", "i2"], label["u3", "i3"]) == (0, 1, 0, 1)
    assert stored(dataset)[-1] == ("u0", "i0", 0)  # it stands at its own time


@pytest.mark.parametrize("above", [3, 4])
def test_only_ratings_above_the_bound_are_liked(tmp_path, above):
    lines = [(f"u{i}", f"i{j}", (2, 3, 3.5, 4, 5)[(i + j) % 5], 1 + i) for i in range(5) for j in range(5)]
    dataset, _ = stage_01(tmp_path / "a", lines, "--positive-above", above)
    stars = {(user, item): rating for user, item, rating, _ in lines}
    assert all(label == (stars[user, item] > above) for user, item, label in stored(dataset))


def test_rows_stand_in_time_order_and_as_in_the_file_where_times_are_equal(tmp_path):
    rng = np.random.default_rng(0)
    pairs = [(user, item) for user in range(40) for item in range(30)]
    lines = [
        (f"u{u}", f"i{i}", int(rng.integers(1, 6)), int(rng.integers(1, 4)))
        for u, i in rng.permutation(pairs)
    ]
    dataset, _ = stage_01(tmp_path / "a", lines)
    expected = [(user, item) for when in (1, 2, 3) for user, item, _, time in lines if time == when]
    assert [pair[:2] for pair in stored(dataset)] == expected


@pytest.mark.parametrize("seed", [0, 7])
def test_the_split_is_a_permutation_of_source_order_by_the_flag_s_seed(tmp_path, seed):
    """Times run against the file's order: what is permuted are the rows as they came."""
    lines = [(f"u{i % 11}", f"i{i // 11}", 5, 1000 - i) for i in range(123)]
    dataset, _ = stage_01(tmp_path / "a", lines, "--seed", seed)
    part = {pair[:2]: row[3] for pair, row in zip(stored(dataset), dataset.interactions.tolist())}
    order = np.random.default_rng(seed).permutation(123)
    expected = {}
    for place, row in enumerate(order):
        expected[lines[row][:2]] = 0 if place < int(0.8 * 123) else 1 if place < int(0.9 * 123) else 2
    assert part == expected
    assert len(dataset.rows(0)) == 98 and len(dataset.rows(1)) == 12 and len(dataset.rows(2)) == 13
    assert [row[:3] for row in dataset.interactions.tolist() if row[3] == 1] == dataset.rows(1).tolist()


def test_cold_users_are_a_random_share_and_no_other_row_moves():
    """Their training rows are support, their others cold: all of them, and nobody else's."""
    source, drawn = prepare.load_demo(prepare_args()), []
    turned = {common.TRAIN: common.SUPPORT, common.VALIDATION: common.COLD, common.TEST: common.COLD}
    for seed in (0, 1):
        plain, rows = (prepare.build(source, prepare_args(seed=seed, subsample_users=120, cold_users=share,
                                                          min_interactions=1))[0] for share in (0, 0.3))
        cold = {user for user, *_, split in rows.interactions.tolist() if split > common.TEST}
        assert len(cold) == 36 and plain.users == rows.users
        expected = [[*row[:3], turned[row[3]] if row[0] in cold else row[3]]
                    for row in plain.interactions.tolist()]
        assert rows.interactions.tolist() == expected
        drawn.append(cold)
    both = len(drawn[0] & drawn[1])
    assert 2 < both < 25 and drawn[0] != set(range(36))  # neither the first ones nor the same ones


def test_raw_ids_are_in_the_order_of_numbers_then_of_the_alphabet(tmp_path):
    names = ["10", "9", "b", "100", "a", "007"]
    dataset, _ = stage_01(tmp_path / "a", [(user, item, 5, 1) for user in names for item in names])
    assert dataset.users == [item["id"] for item in dataset.items] == ["007", "9", "10", "100", "a", "b"]


def test_words_are_the_values_of_items_of_training_rows_by_frequency():
    """Against a loop; an item of held-out rows alone says nothing, a word said twice counts once."""
    dataset, _ = small_world()
    args, source = prepare_args(subsample_users=120), prepare.load_demo(prepare_args())
    source.attributes = {raw: {"hobby": [f"h{index % 5}", "all", "all"], "background": []}
                         for index, raw in enumerate(source.item_ids)}
    rare = dataset.rows(common.TEST)[0, 1]
    source.attributes[dataset.items[rare]["id"]]["hobby"] = ["zzz"]
    found, _ = prepare.build(source, args)
    counts = {}
    for item in sorted(set(found.rows(common.TRAIN)[:, 1].tolist())):
        for value in sorted(set(found.items[item]["attributes"]["hobby"])):
            counts[value] = counts.get(value, 0) + 1
    expected = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    assert list(found.profiles[0]["words"].items()) == expected and expected[0][0] == "all"
    assert found.profiles[1]["words"] == {}
    met = found.interactions[:, 3] == common.TRAIN
    assert ("zzz" in counts) == bool((met & (found.interactions[:, 1] == rare)).any())


def test_a_word_of_held_out_items_is_no_word():
    source = prepare.load_demo(prepare_args())
    plain, _ = prepare.build(source, prepare_args(min_interactions=1, subsample_users=30))
    trained = set(plain.rows(common.TRAIN)[:, 1].tolist())
    unseen = [item for item in range(len(plain.items)) if item not in trained]
    assert unseen  # an item that only held-out rows have
    for item in unseen:
        source.attributes[plain.items[item]["id"]] = {"hobby": ["poison"], "background": ["poison"]}
    found, _ = prepare.build(source, prepare_args(min_interactions=1, subsample_users=30))
    assert all("poison" not in profile["words"] for profile in found.profiles)
    assert found.profiles == plain.profiles


def test_the_order_of_words_belongs_to_the_data():
    """It decides at which words k-means begins, and which are asked."""
    one, two = (small_world(hobby_words=words)[0] for words in (["a", "b", "c"], ["c", "b", "a"]))
    assert one.fingerprint() != two.fingerprint()


def test_words_by_flag_take_the_place_of_the_values():
    dataset, _ = small_world(hobby_words=["chess", "music"], critic=True)
    words = [profile["words"] for profile in dataset.profiles]
    assert words[0] == {"chess": 1, "music": 1} and set(words[1]) == {"cheap", "ordinary", "luxurious"}
    assert list(words[2]) == ["harsh", "balanced", "generous"]


def test_max_per_user_keeps_a_random_few_of_each_user():
    users = np.repeat([0, 1, 2], [20, 3, 20])
    items = np.concatenate([np.arange(20), np.arange(3), np.arange(20)])
    source, times_kept = source_of(users, items), np.zeros(43)
    for seed in range(200):
        kept = prepare.thin_out(source, prepare_args(seed=seed, max_per_user=5, min_interactions=1))
        assert np.bincount(users[kept]).tolist() == [5, 3, 5] and sorted(kept) == list(kept)
        times_kept[kept] += 1
    assert (times_kept[20:23] == 200).all()
    assert 25 < times_kept[:20].min() and times_kept[:20].max() < 80  # a quarter of 200, whichever the row
    assert 25 < times_kept[23:].min() and times_kept[23:].max() < 80


def test_subsampled_users_are_a_random_few():
    users = np.repeat(np.arange(30), 4)
    source, seen = source_of(users, np.tile(np.arange(4), 30)), collections.Counter()
    for seed in range(60):
        kept = prepare.thin_out(source, prepare_args(seed=seed, subsample_users=6, min_interactions=1))
        found = set(users[kept].tolist())
        assert len(found) == 6 and len(kept) == 24
        seen.update(found)
    assert len(seen) == 30 and max(seen.values()) < 30


def test_both_users_and_items_need_their_interactions_until_none_is_left_below():
    """A chain: each removal makes the next one due, so a single pass is not enough."""
    pairs = [(user, item) for user in range(4) for item in range(4)]          # the core
    pairs += [(4, 0), (4, 1), (4, 2), (4, 4)]  # needs item 4
    pairs += [(5, 4), (5, 0), (5, 1), (5, 5)]  # needs item 5, and item 4 needs it
    pairs += [(6, 5), (6, 4), (6, 0)]                                         # too few: falls first
    pairs += [(0, 4), (0, 5), (1, 5)]
    kept = prepare.thin_out(source_of(*zip(*pairs)), prepare_args())
    alive = list(range(len(pairs)))
    while True:
        users, items = (collections.Counter(pairs[row][side] for row in alive) for side in (0, 1))
        left = [row for row in alive if users[pairs[row][0]] >= 4 and items[pairs[row][1]] >= 4]
        if left == alive:
            break
        alive = left
    assert kept.tolist() == alive and len(alive) < len(pairs) - 3


def test_planted_profiles_stay_with_their_users():
    args = prepare_args(subsample_users=200)
    source = prepare.load_demo(args)
    dataset, truth = prepare.build(source, args)
    assert len(dataset.users) > 150 and truth.dtype == np.int16
    assert truth.tolist() == [list(source.truth[raw]) for raw in dataset.users]
    fits = np.zeros((2, 2))
    for user, item, label in dataset.rows(0).tolist():
        kinds = dataset.items[item]["attributes"]
        match = kinds["hobby"] == [list(prepare.DEMO_HOBBIES)[truth[user, 0]]]
        fits[int(match)] += (label, 1)
    rate = fits[:, 0] / fits[:, 1]
    assert rate[1] > rate[0] + 0.2  # the users' own titles carry it


def test_without_signal_a_planted_type_is_not_even_more_generous():
    args = prepare_args(signal=0.0)
    dataset, truth = prepare.build(prepare.load_demo(args), args)
    users, _, labels, _ = dataset.interactions.T
    for m, size in ((0, 4), (1, 3)):
        rates = [labels[truth[users, m] == value].mean() for value in range(size)]
        assert max(rates) - min(rates) < 0.035


# ---------------------------------------------------------------- stage 01: what items say

@pytest.mark.parametrize("year, word", [
    (1899, "twenties"), (1922, "twenties"), (1930, "thirties"), (1939, "thirties"), (1940, "forties"),
    (1955, "fifties"), (1969, "sixties"), (1970, "seventies"), (1989, "eighties"), (1990, "nineties"),
    (1999, "nineties"), (2000, "noughties"), (2019, "twenty-tens")])
def test_an_era_is_one_word_for_ten_years(year, word):
    assert prepare.era_of(year) == word


def test_movielens_genres_are_those_flagged(tmp_path):
    rows = [(user, item, 5, 1) for user in range(1, 6) for item in range(1, 11)]
    folder = write_ml_100k(tmp_path / "raw", rows, [f"Film {i} (1990)" for i in range(10)])
    call_stage(prepare, "--dataset", "ml-100k", "--data-dir", folder, "--run", tmp_path / "run")
    names = [line.split("|")[0].lower() for line in (folder / "u.genre").read_text().splitlines() if line]
    for number, item in enumerate(common.load_dataset(tmp_path / "run").items):
        assert item["attributes"]["hobby"] == [names[1 + number]] and item["title"] == f"Film {number}"


def test_price_levels_are_thirds_within_a_category():
    rng = np.random.default_rng(0)
    prices = {f"{name}{i}": (name, price) for name, scale in (("toys", 10), ("cars", 9000))
              for i, price in enumerate((scale * rng.permutation(np.arange(1, 22))).tolist())}
    prices["gift"] = ("toys", None)
    found = price_levels(prices)
    for name in ("toys", "cars"):
        ranked = sorted(
            (price, raw) for raw, (category, price) in prices.items() if category == name and price
        )
        expected = ["cheap"] * 7 + ["ordinary"] * 7 + ["luxurious"] * 7
        assert [found[raw] for _, raw in ranked] == expected
    assert found["gift"] is None
    equal = price_levels({str(i): ("toys", 5.0) for i in range(12)})
    assert set(equal.values()) == {"cheap"}  # a price is dear only above what others cost


# ---------------------------------------------------------------- common: fingerprints and files

def test_the_fingerprint_sees_every_part_of_the_data(world):
    dataset = world[0]

    def changed(**parts):
        return common.Dataset(**{**vars(dataset), **parts}).fingerprint()

    def cell(column):
        rows = np.array(dataset.interactions)
        rows[7, column] = rows[7, column] ^ 1
        return changed(interactions=rows)

    prints = [
        dataset.fingerprint(),
        *(cell(column) for column in range(4)),
        changed(users=["other", *dataset.users[1:]]),
        changed(items=[{**dataset.items[0], "title": "Other"}, *dataset.items[1:]]),
        changed(items=[{**dataset.items[0], "attributes": {}}, *dataset.items[1:]]),
        changed(profiles=[{**dataset.profiles[0], "prompt": "His hobby is"}, *dataset.profiles[1:]]),
        changed(task_prompt="?"),
    ]
    assert len(set(prints)) == len(prints) and changed() == prints[0]


def test_a_fingerprint_of_arrays_sees_type_shape_and_the_last_of_many_rows():
    array = np.zeros((70_000, 2), dtype=np.int32)
    other = array.copy()
    other[-1, -1] = 1
    changed = (array, other, array.reshape(-1, 1), array.reshape(2, -1), array.view(np.float32), array[:-1])
    prints = [common.fingerprint(value) for value in changed]
    assert len(set(prints)) == len(prints)
    assert common.fingerprint(array) == common.fingerprint(np.asfortranarray(array))


def test_changed_artifacts_of_stage_01_are_refused(prepared, tmp_path):
    run = copy_run(prepared, tmp_path / "run")
    rows = np.load(run / "interactions.npy")
    rows[0, 2] ^= 1
    np.save(run / "interactions.npy", rows)
    with pytest.raises(common.UserError, match="interactions.npy was made from another"):
        common.load_dataset(run)
    truth = np.load(run / "truth.npy")
    np.save(run / "truth.npy", truth[::-1])
    with pytest.raises(common.UserError, match="truth.npy was made from another"):
        common.load_truth(run)
    (run / "dataset.json").write_text("{}")
    with pytest.raises(common.UserError, match="dataset.json lacks"):
        common.load_dataset(run)


def test_a_file_is_replaced_by_a_rename_and_nothing_half_written_stays(tmp_path):
    path, held = tmp_path / "value.json", tmp_path / "held.json"
    common.save_json(path, {"old": 1})
    os.link(path, held)  # somebody has the old file open
    common.save_json(path, {"new": 2})
    assert json.loads(held.read_text()) == {"old": 1} and json.loads(path.read_text()) == {"new": 2}
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), common.atomic(path) as temporary:
            Path(temporary).write_text("half")
            raise error
    assert json.loads(path.read_text()) == {"new": 2}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["held.json", "value.json"]
    with pytest.raises(ValueError):
        common.save_json(path, {"auc": float("nan")})  # no other reader of JSON takes NaN
    assert json.loads(path.read_text()) == {"new": 2}


def test_exit_codes(capsys):
    def raising(error):
        def main():
            raise error
        return main

    for error, code in (
        (common.UserError("what", "where", "do"), 2),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 2),
        (PermissionError(13, "Permission denied", "x"), 2),
        (torch.OutOfMemoryError("CUDA out of memory"), 2),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), 2),
    ):
        with pytest.raises(SystemExit) as stop:
            common.guarded(raising(error))
        lines = capsys.readouterr().err.strip().split("\n")
        assert stop.value.code == code and len(lines) == 1
        assert lines[0].startswith("error: ") == (code == 2)
    for bug in (ZeroDivisionError("a bug"), RuntimeError("shapes do not match"), KeyError("x")):
        with pytest.raises(type(bug)):
            common.guarded(raising(bug))


def test_numbers_on_the_command_line_are_finite_and_within_bounds(capsys, monkeypatch):
    parser = common.Parser("A stage.")
    parser.add_argument("--x", type=common.at_least(0.5, float))
    parser.add_argument("--share", type=common.at_least(0, float, 1))
    monkeypatch.setattr("sys.argv", ["stage.py", "--x", "0.5", "--share", "0"])
    assert vars(parser.parse_args()).items() >= {"x": 0.5, "share": 0}.items()
    for flag, text in (("--x", "0.4"), ("--x", "inf"), ("--x", "nan"), ("--x", "x"), ("--share", "1")):
        monkeypatch.setattr("sys.argv", ["stage.py", flag, text])
        with pytest.raises(SystemExit) as stop:
            parser.parse_args()
        lines = capsys.readouterr().err.strip().split("\n")
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith(f"error: argument {flag}")


def test_the_llm_s_stages_take_the_gpu_that_is_there_and_stage_04_the_cores(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for stage, where in ((infer, "cuda"), (quantize, "cuda"), (ctr, "cpu")):
        monkeypatch.setattr("sys.argv", ["stage.py"])
        assert common.pick_device(stage.parse_arguments().device).type == where
        for flag in ("cpu", "cuda"):
            monkeypatch.setattr("sys.argv", ["stage.py", "--device", flag])
            assert common.pick_device(stage.parse_arguments().device).type == flag


# ---------------------------------------------------------------- common: seeds, models

def test_seeds_decide_torch_and_numpy_alike():
    def draws(*seeds):
        generator = common.seeded(*seeds)
        return generator.integers(2**31), torch.randn(2).tolist()

    found = [draws(0), draws(1), draws(0, 1), draws(2, 1)]
    assert draws(0) == found[0]
    for part in (0, 1):
        assert len({str(one[part]) for one in found}) == 4


def test_mean_and_sample_deviation():
    assert mean_sd([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, np.sqrt(7 / 3)))
    assert mean_sd([0.7]) == (0.7, 0.0)


def test_a_loaded_lm_computes_what_it_computes_elsewhere(lm_folders):
    """Fused or not: GPT-2's activation is the tanh form of GELU."""
    from transformers import AutoModelForCausalLM
    ids = torch.arange(40)[None]
    for folder in lm_folders.values():
        model, _ = common.load_language_model(str(folder), torch.float32, torch.device("cpu"))
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
        assert common.count_parameters(model) == sum(tensor.numel() for tensor in model.parameters()) > 0
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
            assert torch.allclose(model(ids).logits, expected, atol=2e-5)
        if model.config.model_type == "gpt2":
            x = torch.linspace(-4, 4, 101)
            expected = x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x ** 3)))
            assert torch.allclose(model.transformer.h[0].mlp.act(x), expected, atol=1e-6)


def test_an_lm_is_loaded_frozen_and_without_its_dropout(tmp_path):
    model, tokenizer = make_lm("gpt2")
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(model.config, name, 0.5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.arange(30)[None]
    loaded, _ = common.load_language_model(str(tmp_path), torch.float32, torch.device("cpu"))
    assert loaded.config.resid_pdrop == 0.5
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=2e-5)


@pytest.mark.parametrize("rounded", [False, True])
def test_gauc_is_the_auc_within_a_user_weighted_by_his_rows(rounded):
    """By loops; users of one label say nothing, equal scores count half, in whatever order the rows stand."""
    rng = np.random.default_rng(0)
    users = rng.choice([3, 9, 40, 41, 77, 1000], p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.05], size=400)
    labels = np.where(users == 40, 1, np.where(users == 41, 0, rng.integers(2, size=400)))
    scores = rng.random(400) + 0.3 * labels * (users == 3) + 5.0 * (users == 9)
    scores = scores.round(1) if rounded else scores
    weighted, weight, plain = 0.0, 0, []
    for user in (3, 9, 77, 1000):
        own = [(label, score) for who, label, score in zip(users, labels, scores) if who == user]
        pairs = [(above > below) + (above == below) / 2 for yes, above in own for no, below in own
                 if yes > no]
        weighted, weight = weighted + len(own) * np.mean(pairs), weight + len(own)
        plain.append(np.mean(pairs))
    found = common.gauc(users, labels, scores)
    assert found == pytest.approx(weighted / weight) and abs(found - np.mean(plain)) > 0.01
    assert common.gauc(users, labels, -scores) == pytest.approx(1 - found)
    assert common.gauc(users, labels, np.ones(400)) == 0.5
    assert common.gauc(np.arange(4), np.array([0, 1, 1, 0]), np.arange(4.0)) is None


MANY = [Field("user", 4), Field("genres", 5, width=3), Field("item", 6)]


def test_a_many_valued_field_is_the_mean_of_its_values_and_padding_is_never_trained():
    torch.manual_seed(0)
    embed = FieldEmbedding(MANY, 3)
    ids = torch.tensor([[1, 0, 4, 5, 2], [3, 5, 5, 5, 0], [0, 2, 5, 5, 1], [2, 1, 3, 4, 5]])
    optimizer = torch.optim.Adam(embed.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (embed(ids) - 1).pow(2).sum().backward()
        optimizer.step()
    none = torch.tensor([[0, 5, 5, 5, 0]])
    assert not embed(none)[0, 1].any()  # no value at all
    one = [embed(torch.tensor([[0, value, 5, 5, 0]]))[0, 1] for value in range(5)]
    assert all(vector.abs().sum() > 0.1 for vector in one)
    for row, values in ((0, (0, 4)), (2, (2,)), (3, (1, 3, 4))):
        mean = sum(one[value] for value in values) / len(values)
        assert torch.allclose(embed(ids)[row, 1], mean, atol=1e-6)
    weights = embed.table.weight.detach()
    zero = [row for row in range(len(weights)) if not weights[row].any()]
    assert len(zero) == 3 and len(weights) == 4 + 5 + 6 + 3  # each field's extra row: unseen or padding


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_the_unknown_id_of_a_single_valued_field_is_trained_where_it_is_met(penalty):
    """User dropout lives on that; the padding of a many-valued field says nothing and learns nothing."""
    torch.manual_seed(0)
    embed = FieldEmbedding(MANY, 3)
    ids = torch.tensor([[4, 0, 5, 5, 2], [4, 1, 3, 5, 6], [0, 5, 5, 5, 1]])
    optimizer = torch.optim.Adam(embed.parameters(), lr=0.1, weight_decay=penalty)
    for _ in range(5):
        optimizer.zero_grad()
        (embed(ids) - 1).pow(2).sum().backward()
        optimizer.step()
    user, genres, item = embed(torch.tensor([[4, 5, 5, 5, 6]]))[0]
    assert user.min() > 0.2 and item.min() > 0.2 and not genres.any()
    assert torch.allclose(embed(ids)[0, 1], embed(torch.zeros(1, 5).long())[0, 1])  # the mean of one value
    assert not embed.table.weight[4 + 1 + 5].any()


@pytest.mark.parametrize("fields", [MANY, [Field("user", 4), Field("item", 6)]])
def test_unseen_ids_are_0_and_no_two_fields_share_a_row(fields):
    torch.manual_seed(0)
    embed = FieldEmbedding(fields, 3)
    unseen = torch.tensor([[field.size for field in fields for _ in range(field.width)]])
    assert not embed(unseen).any()
    rows = set()
    for at, field in enumerate(fields):
        for value in range(field.size):
            ids = [other.size for other in fields for _ in range(other.width)]
            ids[sum(other.width for other in fields[:at])] = value
            out = embed(torch.tensor([ids]))[0]
            assert out[at].any() and not np.delete(out.detach().numpy(), at, axis=0).any()
            rows.add(tuple(out[at].tolist()))
    assert len(rows) == sum(field.size for field in fields)


# ---------------------------------------------------------------- docs/tables.py

def rows_of(variant, aucs, **more):
    """Rows of {ids: AUC a repetition}."""
    return [{"variant": variant, "model": "dcn", "ids": ids, "seed": seed, "test_auc": auc,
             "test_gauc": auc - 0.03, "test_logloss": 1.2 - auc, **more}
            for ids, values in aucs.items() for seed, auc in enumerate(values)]


def data_of(rows, **more):
    """What collect() makes of runs, without intervals."""
    return {"study": "own", "metric": "test", "rows": rows, "base_rate_logloss": 0.65, "intervals": {},
            "stability": None, "versions": {"torch": "9"}, "fields": "ids", "user_dropout": 0.7,
            "date": "2026-01-01", **more}


def cells_of(text):
    """({ids: {title: cell}} of a Markdown table, the notes below)."""
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
             if line.startswith("| ")]
    return {row[0]: dict(zip(split[0], row)) for row in split[1:]}, text.split("\n\n")[1]


def paired(values, control):
    differences = np.array(values) - control
    return f"{differences.mean():+.4f} ± {differences.std(ddof=1):.4f}"


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """docs/tables.py with a root of its own."""
    tables = load_script("tables")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(tables, "PAGE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(tables, "code_fingerprint", lambda: "the code")
    return tables


BASE = {"none": (0.60, 0.64, 0.59), "random": (0.58, 0.62, 0.60), "userip": (0.7, 0.71, 0.72),
        "planted": (0.80, 0.84, 0.82)}


def test_a_study_s_differences_are_paired_by_seed_with_the_base_in_whatever_order_rows_stand(tables):
    """A variant without none and random of its own is compared with the first variant's."""
    one, two = (0.70, 0.72, 0.75), (0.72, 0.764, 0.71)
    base, others = rows_of("base", BASE), rows_of("one", {"userip": one, "shuffled": (0.1, 0.2, 0.1)})
    rows = [base[0], *base[:0:-1], *others[::-1], *rows_of("two", {"userip": two})]
    cells, _ = cells_of(tables.table(data_of(rows)))
    for name, values in (("userip", BASE["userip"]), ("userip: one", one), ("userip: two", two),
                         ("shuffled: one", (0.1, 0.2, 0.1))):
        assert cells[name]["AUC"] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
        for control in ("none", "random"):
            assert cells[name][f"AUC - {control}"].startswith(paired(values, BASE[control]))
    assert cells["none"]["AUC - none"] == "" and cells["random"]["AUC - random"] == ""


def test_a_variant_with_controls_of_its_own_is_paired_with_those(tables):
    own = {"none": (0.50, 0.55, 0.5), "random": (0.40, 0.43, 0.4), "userip": (0.70, 0.71, 0.74)}
    cells, _ = cells_of(tables.table(data_of(rows_of("base", BASE) + rows_of("one", own))))
    for control in ("none", "random"):
        assert cells["userip: one"][f"AUC - {control}"].startswith(paired(own["userip"], own[control]))
        assert cells["userip"][f"AUC - {control}"].startswith(paired(BASE["userip"], BASE[control]))


def test_the_lift_is_a_share_of_the_planted_one(tables):
    _, notes = cells_of(tables.table(data_of(rows_of("base", BASE))))
    floor, planted = np.mean(BASE["none"]), np.mean(BASE["planted"])
    for ids in ("random", "userip"):
        assert f"{ids} {(np.mean(BASE[ids]) - floor) / (planted - floor):.0%}" in notes
    assert "planted" not in notes.replace("planted lift", "")


def test_a_share_of_no_lift_is_not_given(tables):
    for top, there in ((0.607, False), (0.4, False), (0.63, True)):
        aucs = {"none": (0.6, 0.61), "userip": (0.62, 0.6), "planted": (top, top), "random": (0.6, 0.61)}
        assert ("planted lift" in tables.table(data_of(rows_of("base", aucs)))) == there


def test_each_figure_stands_in_its_column(tables):
    rows, health = rows_of("base", BASE), {"perplexity": [3.5, 2.5], "nmi": [0.8, 0.6],
                                           "heldout_nll": {"own": 1.0, "population": 2.0, "shuffled": 3.0}}
    rows[8]["health"] = health | {"perplexity": [3.0, 2.0]}
    rows[7]["health"] = health | {"perplexity": [2.0, 2.2]}
    interval = {"base|dcn|userip": {"none": [0.01, 0.2], "random": [-0.03, 0.04]}}
    cells, notes = cells_of(tables.table(data_of(rows, intervals=interval, stability={"base": [0.91, 0.52]})))
    for ids, values in BASE.items():
        sd = f"± {np.std(values, ddof=1):.4f}"
        assert cells[ids]["AUC"] == f"{np.mean(values):.4f} {sd}"
        assert cells[ids]["GAUC"] == f"{np.mean(values) - 0.03:.4f} {sd}"
        assert cells[ids]["logloss"] == f"{1.2 - np.mean(values):.4f} {sd}"
    assert cells["userip"]["AUC - none"].endswith("[+0.0100, +0.2000]")
    assert cells["userip"]["AUC - random"].endswith("[-0.0300, +0.0400]")
    constant = cells["constant: base rate"]
    assert [constant[key] for key in ("AUC", "GAUC", "logloss")] == ["0.5000", "0.5000", "0.6500"]
    for text in ("perplexity 2.50 / 2.10", "NMI with the truth 0.80 / 0.60", "0.91 / 0.52", "3 repetitions",
                 "own 1.0000 / population 2.0000 / shuffled 3.0000", "user dropout 0.7", "torch 9"):
        assert text in notes, text


def test_in_a_table_of_cold_users_all_figures_are_theirs_and_metadata_is_the_reference(tables):
    cold = {"none": (0.5, 0.52), "metadata": (0.6, 0.63), "userip": (0.61, 0.66)}
    rows = [{**row, "cold_auc": row["test_auc"], "cold_gauc": 0.4, "cold_logloss": 0.9, "test_auc": 0.77}
            for row in rows_of("base", cold)]
    cells, _ = cells_of(tables.table(data_of(rows, metric="cold")))
    assert cells["userip"]["AUC"].startswith("0.6350") and cells["userip"]["warm AUC"].startswith("0.7700")
    assert cells["userip"]["GAUC"].startswith("0.4") and cells["userip"]["logloss"].startswith("0.9")
    for control in ("none", "metadata"):
        assert cells["userip"][f"AUC - {control}"].startswith(paired(cold["userip"], cold[control]))


def test_p_values_are_of_paired_differences_and_holm_is_over_claims_alone(tables):
    rng = np.random.default_rng(0)
    aucs = {"none": rng.normal(0.6, 0.01, 5), "random": rng.normal(0.6, 0.01, 5),
            "metadata": rng.normal(0.605, 0.01, 5), "words": rng.normal(0.61, 0.01, 5),
            "userip": rng.normal(0.62, 0.01, 5)}
    cells, _ = cells_of(tables.table(data_of(rows_of("base", aucs))))
    p_values = {(ids, control): scipy.stats.ttest_rel(aucs[ids], aucs[control]).pvalue
                for ids in aucs for control in ("none", "random") if ids != control}
    claims = sorted((p, key) for key, p in p_values.items() if key[0] in ("words", "userip"))
    corrected = {key: min(1, max(earlier * (4 - at) for at, (earlier, _) in enumerate(claims[:place + 1])))
                 for place, (_, key) in enumerate(claims)}
    for (ids, control), p in p_values.items():
        holm = f" (Holm {corrected[ids, control]:.2g})" if (ids, control) in corrected else ""
        assert cells[ids][f"AUC - {control}"].endswith(f", p {p:.2g}{holm}"), (ids, control)
    assert tables.holm([0.5, None, 0.001, 0.4]) == [0.8, None, pytest.approx(0.003), 0.8]


def test_bootstrap_weighs_users_not_rows(tables):
    """One user has most rows, and he alone is told apart well: without him there is nothing."""
    rng = np.random.default_rng(0)
    users = np.concatenate([np.zeros(300, int), np.arange(1, 41).repeat(4)])
    labels = rng.integers(2, size=len(users))
    first = np.where(users == 0, labels + rng.random(len(users)), rng.random(len(users)))
    second = rng.random(len(users))
    low, high = tables.bootstrap([(users, labels, first, second)] * 2)
    assert low < 0.03 and high > 0.2
    low, _ = tables.bootstrap([(np.arange(len(users)), labels, first, second)] * 2)  # each row a user: clear
    assert low > 0.1
    everybody = tables.bootstrap([(users, labels, labels + 0.0, labels + 0.0)])
    assert everybody == [0, 0] and tables.bootstrap([(users, labels * 0 + 1, first, second)]) is None


def test_weighted_auc_counts_a_row_as_often_as_it_weighs(tables):
    rng = np.random.default_rng(0)
    labels, scores, weights = rng.integers(2, size=60), rng.integers(9, size=60), rng.integers(4, size=60)
    again = np.repeat(np.arange(60), weights)
    liked, disliked = scores[again][labels[again] == 1], scores[again][labels[again] == 0]
    expected = np.mean([(above > below) + (above == below) / 2 for above in liked for below in disliked])
    ranks = np.unique(scores, return_inverse=True)[1]
    assert tables.weighted_auc(ranks, labels, weights.astype(float)) == pytest.approx(expected)


def test_improvements_are_eq_10_and_11_against_the_best_model_without_ids(tables):
    entries = {("dcn", "none"): (0.70, 0.6), ("dcn", "userip"): (0.74, 0.5), ("lr", "none"): (0.65, 0.62),
               ("lr", "userip"): (0.72, 0.55), ("lr", "planted"): (0.9, 0.3)}
    found = tables.improvements({key: {"test_auc": auc, "test_logloss": logloss}
                                 for key, (auc, logloss) in entries.items()})
    assert found["baseline"] == "dcn" and found["test_auc"] == 0.70
    expected = {"auc": 0.22 / 0.2 - 1, "logloss": 0.05 / 0.55}
    assert found["relative"]["lr"] == {"userip": pytest.approx(expected)}
    assert found["relative"]["dcn"]["userip"]["auc"] == pytest.approx(0.24 / 0.2 - 1)


STUDY = {"base": ("--dataset ml-100k", "--lm tiny", "--epochs 1", "--ids none,userip", "metadata"),
         "Same Theta": (None, None, "--beta 1", "--ids userip", ""),
         "other theta": (None, "--steps 3", "", "--ids userip", ""),
         "other data": ("--dataset ml-100k --critic", "--lm tiny --history rated", "", "", "words")}


def study_of(tables, monkeypatch, name="own"):
    """Put STUDY into docs/tables.py; its stages note how they are called, and leave what they would write."""
    started, wrote = [], {"01": "interactions.npy", "02": "profiles.npy", "03": "feature_bank.npy",
                          "docs": "feature_bank_metadata.npy", "04": "results.json"}

    def call(script, run, flags, log, threads):
        started.append((run.parent.name, int(run.name), script[:4].split("_")[0], flags.split()))
        (run / wrote[script[:4].split("_")[0]]).write_text(f"{run.parent.name} {run.name}")
        if script[:2] == "02" and run.parent.name == "base":
            (run / "lm-tiny").mkdir()
            (run / "lm-tiny" / "tiny.json").write_text(run.name)

    monkeypatch.setattr(tables, "call", call)
    monkeypatch.setattr(tables, "STUDIES", {name: {
        variant: tables.variant(first, second, third, controls, fourth)
        for variant, (first, second, third, fourth, controls) in STUDY.items()}})
    return started


def test_a_variant_takes_the_first_one_s_artifacts_of_the_same_repetition(tables, monkeypatch):
    started = study_of(tables, monkeypatch)
    tables.run_study("own", 2, 1, "/data", again=False)
    folder = tables.ROOT / "runs" / "studies" / "own"
    order = list(dict.fromkeys((name, seed) for name, seed, *_ in started))
    assert order[:2] == [("base", 0), ("base", 1)] and len(order) == 8  # the first variant before the others
    flags = {(name, script): words for name, seed, script, words in started if seed == 1}
    stages = {}
    for name, seed, script, _ in started:
        stages.setdefault(name, []).extend([script] * seed)
    assert stages == {"base": ["01", "02", "03", "docs", "04"], "same-theta": ["03", "04"],
                      "other-theta": ["02", "03", "04"], "other-data": ["01", "02", "03", "docs", "04"]}
    for name in ("same-theta", "other-theta"):
        for seed in ("0", "1"):
            assert (folder / name / seed / "interactions.npy").read_text() == f"base {seed}"
    assert (folder / "same-theta/1/profiles.npy").read_text() == "base 1"
    assert (folder / "other-theta/1/profiles.npy").read_text() == "other-theta 1"
    assert (folder / "other-theta/1/lm-tiny/tiny.json").read_text() == "1"  # the base's LM
    assert not (folder / "other-data/1/lm-tiny").exists()  # it reads another history
    assert not (folder / "same-theta/1/feature_bank_metadata.npy").exists()
    assert flags["same-theta", "03"] == ["--beta", "1", "--seed", "1"]
    assert flags["other-theta", "02"] == ["--steps", "3", "--seed", "1"]
    assert flags["base", "docs"] == ["metadata", "--seed", "1"]
    assert flags["other-data", "docs"] == ["words", "--seed", "1"]
    for name in stages:
        assert flags[name, "04"][-4:] == ["--seed", "1", "--seeds", "1"]
    assert flags["base", "01"] == ["--dataset", "ml-100k", "--data-dir", "/data"]  # the same data for all
    assert {"ml-100k", "--critic", "--data-dir", "/data"} <= set(flags["other-data", "01"])
    count = len(started)
    tables.run_study("own", 2, 1, "/data", again=False)
    assert len(started) == count  # what is there is not run again
    tables.run_study("own", 2, 1, "/data", again=True)
    assert len(started) == 2 * count


def test_a_repetition_of_folds_draws_the_split_anew_and_old_runs_are_named(tables, monkeypatch, capsys):
    started = study_of(tables, monkeypatch, "folds")
    monkeypatch.setattr(tables, "FOLDS", ("folds",))
    tables.run_study("folds", 2, 1, None, again=False)
    made = [(name, seed, words) for name, seed, script, words in started if script == "01"]
    assert len(made) == 4 and all(words[-2:] == ["--seed", str(seed)] for _, seed, words in made)
    monkeypatch.setattr(tables, "code_fingerprint", lambda: "other code")
    tables.run_study("folds", 2, 1, None, again=False)
    assert "WARNING: 8 runs of folds are older than the code" in capsys.readouterr().err


def test_intervals_are_of_each_repetition_s_own_rows_and_controls(tables, monkeypatch, prepared):
    """A variant's own none where it has one, else the first variant's; users are those of the test rows."""
    data = common.load_dataset(prepared).rows(common.TEST)
    study_of(tables, monkeypatch)
    given, rows = {}, []
    for name, ids in (("base", ("none", "random", "userip")), ("Same Theta", ("userip",)),
                      ("other theta", ("none", "userip"))):
        for seed in range(2):
            folder = copy_run(prepared, tables.folder("own", name, seed))
            (folder / "predictions").mkdir()
            rows += [{"variant": name, "model": "dcn", "ids": each, "seed": seed} for each in ids]
            for each in ids:
                given[name, each, seed] = np.random.default_rng(len(given)).random(len(data))
                np.save(folder / "predictions" / f"dcn-{each}-0.npy", given[name, each, seed])
    seen = []
    monkeypatch.setattr(tables, "bootstrap", lambda repetitions: seen.append(repetitions) or [0, 1])
    found = tables.intervals("own", rows, 2, "test")
    assert list(found) == [f"{name}|dcn|userip" for name in ("base", "Same Theta", "other theta")]
    expected = [("base", "base"), ("base", "base"), ("Same Theta", "base"), ("Same Theta", "base"),
                ("other theta", "other theta"), ("other theta", "base")]
    for (name, where), control, repetitions in zip(expected, ["none", "random"] * 3, seen):
        assert len(repetitions) == 2
        for seed, (users, labels, first, second) in enumerate(repetitions):
            assert np.array_equal(users, data[:, 0]) and np.array_equal(labels, data[:, 2])
            assert np.array_equal(first, given[name, "userip", seed])
            assert np.array_equal(second, given[where, control, seed])


def test_intervals_of_cold_users_are_against_the_rows_that_their_table_names(tables, monkeypatch, prepared):
    data = common.load_dataset(prepared)
    study_of(tables, monkeypatch)
    folder, cold = copy_run(prepared, tables.folder("own", "base", 0)), np.array(data.interactions)
    cold[::2, 3] = common.COLD
    count = len(cold[::2])
    monkeypatch.setattr(common, "load_dataset", lambda run: common.Dataset(cold, [], [], [], ""))
    monkeypatch.setattr(tables, "common", common)
    (folder / "predictions").mkdir()
    given, ids = {}, ("none", "random", "metadata", "userip")
    for number, each in enumerate(ids):
        given[each] = np.random.default_rng(number).random(count)
        np.save(folder / "predictions" / f"dcn-{each}-0-cold.npy", given[each])
        np.save(folder / "predictions" / f"dcn-{each}-0.npy", np.zeros(3))
    rows, seen = [{"variant": "base", "model": "dcn", "ids": each, "seed": 0} for each in ids], []
    monkeypatch.setattr(tables, "bootstrap", lambda repetitions: seen.append(repetitions[0]) or [0, 1])
    assert tables.intervals("own", rows, 1, "cold") == {
        "base|dcn|userip": {"none": [0, 1], "metadata": [0, 1]}}
    for control, (users, labels, first, second) in zip(("none", "metadata"), seen):
        assert np.array_equal(users, cold[::2, 0]) and np.array_equal(labels, cold[::2, 2])
        assert np.array_equal(first, given["userip"]) and np.array_equal(second, given[control])


def test_stability_is_the_agreement_of_two_repetitions_codes(tables, monkeypatch):
    study_of(tables, monkeypatch)
    monkeypatch.setattr(tables, "STUDIES", {"own": {"base": tables.STUDIES["own"]["base"]}})
    bank = np.random.default_rng(0).integers(4, size=(500, 2))
    for seed, codes in enumerate((bank, np.stack([(bank[:, 0] + 1) % 4, bank[::-1, 1]], axis=1))):
        folder = tables.folder("own", "base", seed)
        folder.mkdir(parents=True)
        np.save(folder / "feature_bank.npy", codes.astype(np.int16))
    same, other = tables.stability("own", 2)["base"]
    assert same == pytest.approx(1) and abs(other) < 0.05  # the names of codes do not matter
    assert tables.stability("own", 1) is None


def test_writing_one_table_leaves_the_others(tables, monkeypatch):
    other = "<!-- table nosignal -->\nkept\n<!-- end nosignal -->\n"
    tables.PAGE.write_text(f"{other}between\n<!-- table demo -->\nold\n<!-- end demo -->\n{other}")
    tables.KEPT.mkdir()
    (tables.KEPT / "demo.json").write_text(json.dumps(data_of(rows_of("default", BASE))))
    monkeypatch.setattr("sys.argv", ["tables.py", "demo", "--kept", "--write"])
    tables.main()
    text = tables.PAGE.read_text()
    assert text.startswith(f"{other}between\n<!-- table demo -->\n| ids") and "old" not in text
    assert text.endswith(f"<!-- end demo -->\n{other}")
    monkeypatch.setattr("sys.argv", ["tables.py", "demo7", "--kept", "--write"])
    (tables.KEPT / "demo7.json").write_text(json.dumps(data_of(rows_of("default", BASE))))
    with pytest.raises(common.UserError, match="no markers for demo7"):
        tables.main()
    assert tables.PAGE.read_text() == text
