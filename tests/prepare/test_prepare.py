"""Stage 01: split, filter, demo world, MovieLens files."""

import collections
import json

import numpy as np
import pytest
from conftest import ML_100K, call_stage, ok, prepare, prepare_args, fork_stage
from sklearn.metrics import normalized_mutual_info_score

import common
from common import COLD, SUPPORT, TEST, TRAIN, VALIDATION


def write_ml_100k(folder, rows, titles):
    """Files in the published format: tab-separated u.data, ISO-8859-1 u.item with 19 genre flags, u.genre."""
    genres = ("unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy "
              "Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War Western").split()
    folder.mkdir(exist_ok=True)
    (folder / "u.genre").write_text("\n".join(f"{name}|{i}" for i, name in enumerate(genres)) + "\n\n")
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    flags = ["|".join("1" if column == 1 + number % 18 else "0" for column in range(19))
             for number in range(len(titles))]
    lines = [f"{i + 1}|{title}|01-Jan-1995||http://x|{flags[i]}\n" for i, title in enumerate(titles)]
    (folder / "u.item").write_text("".join(lines), encoding="latin-1")
    return folder


@pytest.mark.parametrize("raw, title, year", [
    ("Toy Story (1995)", "Toy Story", 1995), ("Matrix, The (1999)", "The Matrix", 1999),
    ("unknown", "unknown", None),
    ("Cité des enfants perdus, La (City of Lost Children, The) (1995)",
     "La Cité des enfants perdus (City of Lost Children, The)", 1995),
    ("Good, the Bad and the Ugly, The (1966)", "The Good, the Bad and the Ugly", 1966),
    ("2001: A Space Odyssey (1968)", "2001: A Space Odyssey", 1968),
    ("Fawlty Towers (1975-1979)", "Fawlty Towers", 1975), ("Atlanta (2016\u2013 )", "Atlanta", 2016),
    ("Room (237)", "Room (237)", None), ("M (a.k.a. N (1999))", "M (a.k.a. N (1999))", None)])
def test_title_is_turned_round_and_loses_its_year(raw, title, year):
    assert prepare.clean_title(raw) == (title, year)


def test_ml_100k_files_end_in_the_documented_artifacts(tmp_path):
    rng = np.random.default_rng(0)
    titles = [f"Café {i}, The ({1930 + 2 * i})" for i in range(30)]
    rows = [(u, i, rng.integers(1, 6), 1000 * u + rng.integers(900)) for u in range(1, 21)
            for i in rng.choice(np.arange(1, 31), 12, replace=False)]
    folder = write_ml_100k(tmp_path / "raw", rows, titles)
    process = fork_stage("01_prepare_data.py", "--dataset", "ml-100k", "--data-dir", folder,
                        "--run", tmp_path / "run")
    assert ok(process).stderr == "" and "\r" not in process.stdout  # a log stays a log
    facts = json.loads((tmp_path / "run/dataset.json").read_text())
    items = json.loads((tmp_path / "run/items.json").read_text())
    interactions = np.load(tmp_path / "run/interactions.npy")
    users = json.loads((tmp_path / "run/users.json").read_text())
    assert interactions.dtype == np.int32 and interactions.shape == (facts["n_interactions"], 4)
    assert items[0]["title"].startswith("The Café") and items[0]["attributes"]["background"] == ["thirties"]
    assert facts["positive_rate"] == pytest.approx(interactions[:, 2].mean())
    times = {(str(u), str(i)): t for u, i, _, t in rows}
    ratings = {(str(u), str(i)): r for u, i, r, _ in rows}
    stored = [(users[u], items[i]["id"]) for u, i, _, _ in interactions]
    assert [times[pair] for pair in stored] == sorted(times[pair] for pair in stored)  # time order
    assert all(label == (ratings[pair] > 3) for pair, label in zip(stored, interactions[:, 2]))


def small(**changes):
    args = prepare_args(**{"subsample_users": 150, **changes})
    return prepare.build(prepare.load_demo(args), args)[0]


def test_cold_users_are_drawn_from_the_seed_alone():
    def cold(**changes):
        rows = small(subsample_users=None, **changes).interactions
        return np.unique(rows[rows[:, 3] >= SUPPORT, 0])

    few, more, other = cold(cold_users=0.1), cold(cold_users=0.2), cold(cold_users=0.1, positive_above=4.0)
    assert len(few) == 200 and len(more) == 400 and set(few) < set(more) and np.array_equal(few, other)
    middle = len(few) / 2
    assert abs(np.sum(few < 1000) - middle) < 35  # from all users alike: 5 standard deviations
    assert np.sum(np.isin(cold(cold_users=0.1, seed=1), few)) < 50


def test_the_share_of_cold_users_is_written_down(tmp_path, capsys):
    call_stage(prepare, "--run", tmp_path / "run", "--subsample-users", 150, "--cold-users", 0.2)
    assert json.loads((tmp_path / "run/dataset.json").read_text())["cold_users"] == 0.2
    dataset, printed = common.load_dataset(tmp_path / "run"), capsys.readouterr().out
    for name, split in (("support", SUPPORT), ("cold", COLD)):
        assert f"{name}: {len(dataset.rows(split)):,d} rows" in printed
    assert len(dataset.rows(common.SEEN)) == len(dataset.rows(TRAIN)) + len(dataset.rows(SUPPORT))


def ratings_file(path, rating):
    """300 distinct pairs; rating: of the row's place in the file."""
    rows = [(place % 20, place // 20, rating(place)) for place in range(300)]
    lines = ["user_id,item_id,rating", *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return ["--run", path.parent / "run", "--dataset", "csv", "--ratings-file", path]


def test_a_split_whose_labels_are_all_equal_is_warned_of_at_once(tmp_path, capsys):
    """Else 02 and 03 would work for minutes until 04 refuses."""
    split = np.empty(300, dtype=int)
    for part, places in enumerate(np.split(np.random.default_rng(0).permutation(300), [240, 270])):
        split[places] = part
    def half_constant(place):
        return {VALIDATION: 5, TEST: 1}.get(split[place], 1 + place % 5)

    for rating, named in ((lambda place: 1 + place % 5, []), (half_constant, ["validation", "test"])):
        call_stage(prepare, *ratings_file(tmp_path / "r.csv", rating))
        lines = capsys.readouterr().out.split("\n")
        warnings = [line for line in lines if line.startswith("WARNING: all labels")]
        assert len(warnings) == len(named)
        for line, name in zip(warnings, named):
            assert f"all labels of the {name} split are equal" in line


def majority_vote_nmi(dataset, truth):
    """Per profile: NMI of the planted value and what most of a user's liked training items have."""
    scores = []
    for m, profile in enumerate(dataset.profiles):
        votes = [collections.Counter() for _ in dataset.users]
        for user, item, label in dataset.rows(common.TRAIN):
            if label:
                votes[user].update(dataset.items[item]["attributes"][profile["name"]])
        known = [user for user, vote in enumerate(votes) if vote]
        guess = [votes[user].most_common(1)[0][0] for user in known]
        scores.append(normalized_mutual_info_score(truth[known, m], guess))
    return scores


@pytest.mark.parametrize("seed", [0, 7])
def test_demo_world_is_neither_trivial_nor_hopeless(seed):
    args = prepare_args(seed=seed)
    dataset, truth = prepare.build(prepare.load_demo(args), args)
    hobby, background = majority_vote_nmi(dataset, truth)
    assert 0.60 <= hobby <= 0.75 and 0.40 <= background <= 0.55
    assert len(dataset.users) == 2000 and len(dataset.items) == 400
    assert 13 < len(dataset.interactions) / 2000 < 15


def test_without_signal_the_world_says_nothing_of_the_planted_types():
    args = prepare_args(signal=0.0)
    dataset, truth = prepare.build(prepare.load_demo(args), args)
    assert max(majority_vote_nmi(dataset, truth)) < 0.01


@pytest.mark.skipif(not ML_100K.exists(), reason="MovieLens-100K is not beside the checkout")
def test_real_ml_100k_has_the_published_counts():
    args = prepare_args(dataset="ml-100k", data_dir=ML_100K, min_interactions=1)
    dataset, truth = prepare.build(prepare.load_movielens(args), args)
    assert (len(dataset.users), len(dataset.items), len(dataset.interactions)) == (943, 1682, 100_000)
    assert truth is None
    assert dataset.users[:3] == ["1", "2", "3"] and dataset.items[0]["title"] == "Toy Story"
    assert len(dataset.rows(0)) == 80_000 and len(dataset.rows(1)) == len(dataset.rows(2)) == 10_000


def test_a_download_without_a_network_is_one_line(tmp_path, monkeypatch, capsys):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        common.guarded(lambda: call_stage(prepare, "--dataset", "ml-100k", "--run", tmp_path / "run"))
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith("error: cannot download ml-100k")
    assert text.count("\n") == 1 and "--data-dir" in text
    assert not (tmp_path / "run").exists() and not list((tmp_path / "data").glob("*"))
