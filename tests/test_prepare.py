"""Stage 01: split, filter, demo world, MovieLens files."""

import collections
import json

import conftest
import numpy as np
import pytest
from conftest import ML_100K, ok, prepare, prepare_args, run_stage


def write_ml_100k(folder, rows, titles):
    """Files in the published format: tab-separated u.data, ISO-8859-1 u.item with 19 genre flags, u.genre."""
    genres = ("unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror Musical Mystery Romance "
              "Sci-Fi Thriller War Western").split()
    folder.mkdir(exist_ok=True)
    (folder / "u.genre").write_text("\n".join(f"{name}|{i}" for i, name in enumerate(genres)) + "\n\n")
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    flags = ["|".join("1" if column == 1 + number % 18 else "0" for column in range(19)) for number in range(len(titles))]
    (folder / "u.item").write_text("".join(f"{i + 1}|{title}|01-Jan-1995||http://x|{flags[i]}\n" for i, title in enumerate(titles)),
                                   encoding="latin-1")
    return folder


@pytest.mark.parametrize("raw, title, year", [
    ("Toy Story (1995)", "Toy Story", 1995), ("Matrix, The (1999)", "The Matrix", 1999), ("unknown", "unknown", None),
    ("Cité des enfants perdus, La (City of Lost Children, The) (1995)", "La Cité des enfants perdus (City of Lost Children, The)", 1995),
    ("Good, the Bad and the Ugly, The (1966)", "The Good, the Bad and the Ugly", 1966),
    ("2001: A Space Odyssey (1968)", "2001: A Space Odyssey", 1968)])
def test_title_is_turned_round_and_loses_its_year(raw, title, year):
    assert prepare.clean_title(raw) == (title, year)


def test_ml_100k_files_end_in_the_documented_artifacts(tmp_path):
    rng = np.random.default_rng(0)
    titles = [f"Café {i}, The ({1930 + 2 * i})" for i in range(30)]
    rows = [(u, i, rng.integers(1, 6), 1000 * u + rng.integers(900)) for u in range(1, 21) for i in rng.choice(np.arange(1, 31), 12, replace=False)]
    folder = write_ml_100k(tmp_path / "raw", rows, titles)
    ok(run_stage("01_prepare_data.py", "--dataset", "ml-100k", "--data-dir", folder, "--run", tmp_path / "run"))
    facts = json.loads((tmp_path / "run/dataset.json").read_text())
    items = json.loads((tmp_path / "run/items.json").read_text())
    interactions, users = np.load(tmp_path / "run/interactions.npy"), json.loads((tmp_path / "run/users.json").read_text())
    assert interactions.dtype == np.int32 and interactions.shape == (facts["n_interactions"], 4)
    assert items[0]["title"].startswith("The Café") and items[0]["attributes"]["background"] == ["thirties"]
    assert facts["positive_rate"] == pytest.approx(interactions[:, 2].mean())
    times = {(str(u), str(i)): t for u, i, _, t in rows}
    ratings = {(str(u), str(i)): r for u, i, r, _ in rows}
    stored = [(users[u], items[i]["id"]) for u, i, _, _ in interactions]
    assert [times[pair] for pair in stored] == sorted(times[pair] for pair in stored)  # time order
    assert all(label == (ratings[pair] > 3) for pair, label in zip(stored, interactions[:, 2]))


def test_split_is_the_contracts_split():
    source = prepare.load_demo(prepare_args())
    dataset, _ = prepare.build(source, prepare_args())
    n = len(dataset.interactions)
    order = np.random.default_rng(0).permutation(n)
    expected = np.full(n, 2)
    for place, row in enumerate(order):  # no times: stored order is source order
        expected[row] = 0 if place < int(0.8 * n) else 1 if place < int(0.9 * n) else 2
    assert np.array_equal(dataset.interactions[:, 3], expected)


def test_k_core_filter_against_a_brute_force_loop():
    rng = np.random.default_rng(1)
    names = [str(number) for number in range(50)]
    source = prepare.Source(names, names, rng.integers(40, size=260), rng.integers(50, size=260), np.ones(260), None, {}, {})
    rows = list(range(260))
    while True:
        users, items = collections.Counter(source.users[r] for r in rows), collections.Counter(source.items[r] for r in rows)
        fewer = [r for r in rows if users[source.users[r]] >= 4 and items[source.items[r]] >= 4]
        if len(fewer) == len(rows):
            break
        rows = fewer
    assert rows and len(rows) < 260
    assert prepare.thin_out(source, prepare_args()).tolist() == rows


def test_max_per_user_and_subsample_users_bound_the_rows():
    source = prepare.load_demo(prepare_args())
    kept = prepare.thin_out(source, prepare_args(max_per_user=3, min_interactions=1))
    assert max(collections.Counter(source.users[kept]).values()) == 3 and len(set(source.users[kept])) == 2000
    kept = prepare.thin_out(source, prepare_args(subsample_users=50, min_interactions=1))
    assert len(set(source.users[kept])) == 50


@pytest.mark.parametrize("seed", [0, 7])
def test_demo_world_is_neither_trivial_nor_hopeless(seed):
    args = prepare_args(seed=seed)
    dataset, truth = prepare.build(prepare.load_demo(args), args)
    hobby, background = prepare.majority_vote_nmi(dataset, truth)
    assert 0.60 <= hobby <= 0.75 and 0.40 <= background <= 0.55
    assert len(dataset.users) == 2000 and len(dataset.items) == 400 and 13 < len(dataset.interactions) / 2000 < 15


def test_without_signal_the_world_says_nothing_of_the_planted_types():
    args = prepare_args(signal=0.0)
    dataset, truth = prepare.build(prepare.load_demo(args), args)
    assert max(prepare.majority_vote_nmi(dataset, truth)) < 0.01


def test_every_flag_changes_the_data():
    def world(**changes):
        args = prepare_args(**{"subsample_users": 150, **changes})
        return prepare.build(prepare.load_demo(args), args)[0].fingerprint()
    prints = [world(), world(seed=1), world(signal=0.5), world(min_interactions=6), world(positive_above=4.0), world(max_per_user=11),
              world(subsample_users=140), world(profile_words="zorp,quell")]
    assert len(set(prints)) == len(prints) and world() == prints[0]


@pytest.mark.skipif(not ML_100K.exists(), reason="MovieLens-100K is not beside the checkout")
def test_real_ml_100k_has_the_published_counts():
    args = prepare_args(dataset="ml-100k", data_dir=ML_100K, min_interactions=1)
    dataset, truth = prepare.build(prepare.load_ml_100k(args), args)
    assert (len(dataset.users), len(dataset.items), len(dataset.interactions)) == (943, 1682, 100_000) and truth is None
    assert dataset.users[:3] == ["1", "2", "3"] and dataset.items[0]["title"] == "Toy Story"
    assert len(dataset.rows(0)) == 80_000 and len(dataset.rows(1)) == len(dataset.rows(2)) == 10_000


def test_a_failed_download_is_one_line(tmp_path):
    process = run_stage("01_prepare_data.py", "--dataset", "ml-100k", "--run", tmp_path / "run", cwd=tmp_path,
                        env={"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"})
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and "--data-dir" in process.stderr
    assert not (tmp_path / "run").exists() and not list((tmp_path / "data").glob("*.zip*"))


def test_conftest_world_has_all_kinds_of_rows(world):
    dataset, truth = world
    assert len(dataset.users) == len(truth) and {0, 1, 2} == set(dataset.interactions[:, 3]) and conftest.ROOT.exists()
