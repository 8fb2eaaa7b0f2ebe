"""Stage 01: which rows stay, in which order; the split; the words of a profile."""

import collections
import numpy as np
import pytest
from conftest import (call_stage, prepare, prepare_args, small_world)
from test_prepare import write_ml_100k
import common


def source_of(users, items, ratings=None, times=None):
    """A Source of raw ids "0", "1", ... in the order given."""
    names = [str(number) for number in range(max(*users, *items) + 1)]
    ratings = np.full(len(users), 5.0) if ratings is None else ratings
    return prepare.Source(names, names, np.asarray(users, np.int32), np.asarray(items, np.int32),
                          np.asarray(ratings, np.float32), times, {}, {}, (), "?")


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
    lines = [(f"u{i % 11}", f"i{i // 11}", 2 + i % 4, 1000 - i) for i in range(123)]
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
        assert np.array_equal(rows.rows(common.SEEN), plain.rows(common.TRAIN))
        drawn.append(cold)
    both = len(drawn[0] & drawn[1])
    assert 2 < both < 25 and drawn[0] != set(range(36))  # neither the first ones nor the same ones


@pytest.mark.parametrize("share, who", [(0.001, "nobody"), (0.999, "everybody")])
def test_a_share_of_cold_users_that_is_nobody_or_everybody_is_refused(share, who):
    source = prepare.load_demo(prepare_args())
    args = prepare_args(subsample_users=120, cold_users=share, min_interactions=1)
    with pytest.raises(common.UserError, match=f"users is {who}.*--cold-users"):
        prepare.build(source, args)


def test_raw_ids_are_in_the_order_of_numbers_then_of_the_alphabet(tmp_path):
    """Numbers that are equal but written otherwise too, in whatever order the file has them."""
    names = ["10", "9", "b", "100", "a", "007", "0010"]
    for number, some in enumerate((names, names[::-1])):
        lines = [(user, item, 5 if user == item else 2, 1) for user in some for item in some]
        dataset, _ = stage_01(tmp_path / str(number), lines)
        assert dataset.users == [item["id"] for item in dataset.items] == [
            "007", "9", "0010", "10", "100", "a", "b"]


def test_words_are_the_values_of_items_of_training_rows_by_frequency():
    """Against a loop; a word said twice of an item counts once."""
    args, source = prepare_args(subsample_users=120), prepare.load_demo(prepare_args())
    source.attributes = {raw: {"hobby": [f"h{index % 5}", "all", "all"], "background": []}
                         for index, raw in enumerate(source.item_ids)}
    found, _ = prepare.build(source, args)
    counts = {}
    for item in sorted(set(found.rows(common.TRAIN)[:, 1].tolist())):
        for value in sorted(set(found.items[item]["attributes"]["hobby"])):
            counts[value] = counts.get(value, 0) + 1
    expected = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    assert list(found.profiles[0]["words"].items()) == expected and expected[0][0] == "all"
    assert found.profiles[1]["words"] == {}


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
    dataset, _ = small_world(background_words=["dear", "cheap"])
    words = [profile["words"] for profile in dataset.profiles]
    assert set(words[0]) == {"music", "fishing", "cooking", "cycling"} and words[1] == {"dear": 1, "cheap": 1}
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


def test_subsampled_users_are_of_those_who_have_enough_rows():
    """Most users of a shop have one row: of users drawn from them hardly anyone would be left."""
    users = np.concatenate([np.repeat(np.arange(30), 4), np.arange(30, 930)])
    source = source_of(users, np.concatenate([np.tile(np.arange(4), 30), np.zeros(900, int)]))
    kept = prepare.thin_out(source, prepare_args(subsample_users=20, min_interactions=4))
    found = set(users[kept].tolist())
    assert len(found) == 20 and max(found) < 30 and len(kept) == 80
    args = prepare_args(subsample_users=1, min_interactions=4)
    with pytest.raises(common.UserError, match="raise --subsample-users"):
        prepare.build(source, args)


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


def test_words_that_a_flag_gave_are_shown_without_counts(capsys):
    prepare.show_words({"name": "hobby", "words": {"chess": 1, "go": 1}}, [])
    prepare.show_words({"name": "hobby", "words": {"chess": 12, "go": 3}}, [])
    given, counted = capsys.readouterr().out.splitlines()
    assert given == "words of hobby: 2, among them chess, go"
    assert counted == "words of hobby: 2, the commonest are chess 12, go 3"


@pytest.mark.parametrize("year, word", [
    (1922, "twenties"), (1930, "thirties"), (1939, "thirties"), (1940, "forties"),
    (1955, "fifties"), (1969, "sixties"), (1970, "seventies"), (1989, "eighties"), (1990, "nineties"),
    (1999, "nineties"), (2000, "noughties"), (2019, "twenty-tens")])
def test_an_era_is_one_word_for_ten_years(year, word):
    assert prepare.era_of(year) == [word]


def test_a_year_of_another_century_or_none_has_no_era():
    assert [prepare.era_of(year) for year in (1895, 1919, 2030, None)] == [[], [], [], []]


def test_movielens_genres_are_those_flagged(tmp_path):
    rows = [(user, item, 2 + item % 3, 1) for user in range(1, 6) for item in range(1, 11)]
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
    assert set(equal.values()) == {"ordinary"}
    songs = {f"{price}-{i}": ("songs", price) for price, count in ((0.69, 6), (0.99, 24), (1.29, 10))
             for i in range(count)}
    for raw, level in price_levels(songs).items():
        assert level == {"0.69": "cheap", "0.99": "ordinary", "1.29": "luxurious"}[raw.split("-")[0]]
