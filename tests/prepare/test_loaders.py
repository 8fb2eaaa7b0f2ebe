"""Stage 01 on the formats of real data sets, on broken and hostile files, and on files of one's own."""

import csv
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import threading
import zipfile

import numpy as np
import pytest
from conftest import call_stage, ctr, infer, prepare, quantize
from hypothesis import HealthCheck, given
from hypothesis import settings as property_settings
from hypothesis import strategies as st

import common

USERS, ITEMS = 40, 30


def pairs(count=600, seed=0):
    """Distinct (user, item, rating 1-5, time) rows, each user and item often enough."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(USERS * ITEMS, size=count, replace=False)
    return [(f"U{pair // ITEMS}", f"I{pair % ITEMS:02d}", int(rng.integers(1, 6)),
             1000 + int(rng.integers(10**6))) for pair in chosen]


def write(path, content):
    """bytes or text, gzipped where the name says so."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def lines(objects):
    return "".join(json.dumps(record) + "\n" for record in objects)


def amazon_reviews(year=2014):
    keys = {2014: ("reviewerID", "asin", "overall", "unixReviewTime"),
            2018: ("reviewerID", "asin", "overall", "unixReviewTime"),
            2023: ("user_id", "parent_asin", "rating", "timestamp")}[year]
    return [dict(zip(keys, row)) | {"reviewText": "good"} | ({"asin": "variant"} if year == 2023 else {})
            for row in pairs()]


def amazon_meta(year=2014):
    found = []
    for item in range(ITEMS):
        record = {"parent_asin" if year == 2023 else "asin": f"I{item:02d}",
                  "title": f"Thing &amp; <b>{item}</b>"}
        if item % 3:
            record["store" if year == 2023 else "brand"] = f"Brand{item % 4}"
        if item % 5:
            record["price"] = {2014: 10.5 + item, 2018: f"${1000 + item:,}.99", 2023: float(item)}[year]
        if year == 2014:
            record["categories"] = [["Games", "PC", f"Leaf{item % 2}"]]
        else:
            record["category" if year == 2018 else "categories"] = ["Games", "PC", f"Leaf{item % 2}"]
        found.append(record)
    return found


def amazon(folder, year=2014, literals=False):
    folder.mkdir()
    write(folder / "Games.json.gz", lines(amazon_reviews(year)))
    meta = amazon_meta(year)
    write(folder / "meta_Games.json.gz", "".join(f"{record!r}\n" for record in meta) if literals
          else lines(meta))
    return ["--dataset", "amazon", "--data-dir", folder]


def yelp(folder):
    folder.mkdir()
    write(folder / "yelp_academic_dataset_review.json", lines(
        {"user_id": u, "business_id": i, "stars": float(r), "date": f"2018-07-{1 + t % 28:02d} 22:09:11"}
        for u, i, r, t in pairs()))
    write(folder / "yelp_academic_dataset_business.json", lines(
        {"business_id": f"I{i:02d}", "name": f"Caf\u00e9 {i}", "categories": "Bars, Pizza" if i % 4 else None,
         "attributes": {"RestaurantsPriceRange2": str(1 + i % 4)} if i % 3 else None} for i in range(ITEMS)))
    return ["--dataset", "yelp", "--data-dir", folder]


def nete(folder):
    folder.mkdir()
    template = ("price", "good", "a sentence", 1)
    (folder / "reviews.pickle").write_bytes(pickle.dumps(
        [{"user": u, "item": i, "rating": r, "template": template} for u, i, r, _ in pairs()]))
    (folder / "item.json").write_text(json.dumps(
        [{"item": f"I{i:02d}", "title": f"Film {i}", "brand": f"Studio{i % 3}", "price": f"${i}"}
         for i in range(ITEMS)]))
    return ["--dataset", "nete", "--data-dir", folder]


def ml_1m(folder):
    folder.mkdir()
    write(folder / "ratings.dat", "".join(f"{u[1:]}::{int(i[1:]) + 1}::{r}::{t}\n" for u, i, r, t in pairs()))
    write(folder / "movies.dat", "".join(f"{i + 1}::Caf\u00e9 {i}, The ({1940 + 2 * i})::Drama|Action\n"
                                         for i in range(ITEMS)).encode("latin-1"))
    return ["--dataset", "ml-1m", "--data-dir", folder]


def ml_csv(folder):
    folder.mkdir()
    write(folder / "ratings.csv", "userId,movieId,rating,timestamp\n"
          + "".join(f"{u[1:]},{int(i[1:])},{r - 0.5},{t}\n" for u, i, r, t in pairs()))
    write(folder / "movies.csv",
          "movieId,title,genres\n" + "".join(f'{i},"Film ""{i}"", A ({1995 + i})",Drama|(no genres listed)\n'
                                                                    for i in range(ITEMS)))
    return ["--dataset", "ml-1m", "--data-dir", folder]


def own_csv(folder):
    folder.mkdir()
    with open(folder / "r.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["who", "what", "stars", "when"], *pairs()])
    with open(folder / "i.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["key", "name", "kinds", "tier"], *[
            [f"I{i:02d}", f"Thing, {i}", f"A|B{i % 3}", "high" if i % 2 else "low"] for i in range(ITEMS)]])
    return ["--dataset", "csv", "--ratings-file", folder / "r.csv", "--items-file", folder / "i.csv",
            "--user-col", "who", "--item-col", "what", "--rating-col", "stars", "--time-col", "when",
            "--item-id-col", "key", "--title-col", "name", "--hobby-col", "kinds", "--background-col", "tier"]


def run_01(run, *flags):
    call_stage(prepare, "--run", run, *flags)
    check_artifacts(run)
    return json.loads((run / "dataset.json").read_text()), json.loads((run / "items.json").read_text())


def check_artifacts(run):
    """Valid by the contract: loadable, fingerprinted, bounded, split 8:1:1 where the split is ours."""
    dataset = common.load_dataset(run)
    assert dataset.interactions.dtype == np.int32 and set(np.unique(dataset.interactions[:, 2])) <= {0, 1}
    assert all(item["title"] and "\n" not in item["title"] and len(item["title"]) <= 200
               and item["title"].isprintable() for item in dataset.items)
    assert len(set(map(tuple, dataset.interactions[:, :2].tolist()))) == len(dataset.interactions)
    assert len(set(dataset.users)) == len(dataset.users)


def test_products_of_another_category_are_refused(tmp_path):
    flags = amazon(tmp_path / "raw")
    others = [{**record, "asin": f"B{record['asin']}"} for record in amazon_meta()]
    write(tmp_path / "raw" / "meta_Games.json.gz", lines(others))
    with pytest.raises(common.UserError, match="'I\\d+' is reviewed, 'BI\\d+' described"):
        call_stage(prepare, "--run", tmp_path / "run", *flags)


@pytest.mark.parametrize("year, literals", [(2014, False), (2014, True), (2018, False), (2023, False)])
def test_amazon_in_all_its_dialects(year, literals, tmp_path, capsys):
    facts, items = run_01(tmp_path / "run", *amazon(tmp_path / "raw", year, literals))
    by_id = {item["id"]: item for item in items}
    assert facts["n_interactions"] == 600 and facts["n_users"] == USERS
    assert by_id["I01"]["title"] == "Thing & 1"
    found = {raw: item["attributes"] for raw, item in by_id.items()}
    assert found["I01"]["hobby"] == ["brand1"] and found["I03"]["hobby"] == ["leaf1"]
    levels = [found[raw]["background"] for raw in ("I00", "I02", "I28")]
    assert levels == [[], ["cheap"], ["luxurious"]]
    assert "sparsity" in capsys.readouterr().out
    times = {row[:2]: row[3] for row in pairs()}
    dataset = common.load_dataset(tmp_path / "run")
    stored = [times[dataset.users[u], dataset.items[i]["id"]] for u, i, *_ in dataset.interactions.tolist()]
    assert stored == sorted(stored)


def test_yelp(tmp_path):
    facts, items = run_01(tmp_path / "run", *yelp(tmp_path / "raw"))
    by_id = {item["id"]: item for item in items}
    assert facts["n_interactions"] == 600 and by_id["I01"]["title"] == "Caf\u00e9 1"
    assert by_id["I01"]["attributes"] == {"hobby": ["bars", "pizza"], "background": ["moderate"]}
    assert by_id["I00"]["attributes"] == {"hobby": [], "background": []}


def test_nete(tmp_path):
    facts, items = run_01(tmp_path / "run", *nete(tmp_path / "raw"))
    assert facts["n_interactions"] == 600 and items[0]["attributes"]["hobby"] == ["studio0"]
    dataset, source = common.load_dataset(tmp_path / "run"), [row[:2] for row in pairs()]
    stored = [(dataset.users[u], dataset.items[i]["id"]) for u, i, *_ in dataset.interactions.tolist()]
    assert stored == source  # NETE has no times: its rows stay in the order of the file


def test_movielens_folders(tmp_path):
    facts, items = run_01(tmp_path / "run", *ml_1m(tmp_path / "raw"))
    assert facts["n_interactions"] == 600 and items[0]["title"] == "The Caf\u00e9 0"
    assert items[0]["attributes"] == {"hobby": ["drama", "action"], "background": ["forties"]}
    facts, items = run_01(tmp_path / "run2", *ml_csv(tmp_path / "ml-25m"))
    assert items[0]["title"] == 'A Film "0"' and facts["dataset"] == "ml-25m"
    assert items[5]["attributes"] == {"hobby": ["drama"], "background": ["noughties"]}
    assert facts["positive_rate"] == pytest.approx(np.mean([r - 0.5 > 3 for _, _, r, _ in pairs()]))


def test_csv_of_ones_own(tmp_path):
    facts, items = run_01(tmp_path / "run", *own_csv(tmp_path / "raw"))
    assert items[1] == {"id": "I01", "title": "Thing, 1",
                        "attributes": {"hobby": ["a", "b1"], "background": ["high"]}}
    assert len(facts["profiles"]) == 2
    base = facts["fingerprint"]
    flags = own_csv(tmp_path / "raw2")
    for change in (["--value-sep", ";"], ["--title-col", "key"], ["--hobby-col", "tier"],
                   ["--background-col", "kinds"], ["--rating-col", "when", "--positive-above", "9000"],
                   ["--time-col", "stars"]):
        assert run_01(tmp_path / "run", *flags, *change)[0]["fingerprint"] != base, change
    without_items = [*flags[:4], *flags[6:12]]
    assert run_01(tmp_path / "run", *without_items)[1][0] == {"id": "I00", "title": "I00", "attributes": {}}
    with pytest.raises(common.UserError, match="cannot read nothing.csv"):
        run_01(tmp_path / "run", *without_items, "--items-file", tmp_path / "nothing.csv",
               "--title-col", "name")


@pytest.mark.parametrize("line, cells", [("I00,Thing, of wood,A,low", 5), ("I00,Thing,A", 3)])
def test_a_line_with_a_comma_too_many_or_too_few_is_refused_not_shifted(line, cells, tmp_path):
    flags = own_csv(tmp_path / "raw")
    header, _, *rest = (tmp_path / "raw" / "i.csv").read_text(encoding="utf-8").splitlines()
    write(tmp_path / "raw" / "i.csv", "\n".join([header, line, *rest]) + "\n")
    with pytest.raises(common.UserError, match=f"1 of {ITEMS} records .* record 1: .*{cells} cells, not 4"):
        run_01(tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_one_profile_runs_through_all_stages(tmp_path):
    flags, run = own_csv(tmp_path / "raw")[:-2], tmp_path / "run"
    facts, _ = run_01(run, *flags)
    assert [profile["name"] for profile in facts["profiles"]] == ["hobby"]
    call_stage(infer, "--run", run, "--lm", "tiny", "--tiny-sentences", 64, "--steps", 1, "--task-steps", 1)
    call_stage(quantize, "--run", run, "--epochs", 1)
    call_stage(ctr, "--run", run, "--seeds", 1, "--epochs", 1)
    assert np.load(run / "feature_bank.npy").shape == (USERS, 1)
    assert len(json.loads((run / "quantize.json").read_text())["codes"]) == 1


def test_the_critic_is_a_third_profile_of_people_not_of_items(tmp_path, lm_folders, capsys):
    """Invented people like the share of titles that their word says; the bank gets a code, items no field."""
    flags = own_csv(tmp_path / "raw")
    facts, items = run_01(tmp_path / "run", *flags, "--critic")
    names = [profile["name"] for profile in facts["profiles"]]
    assert names == ["hobby", "background", "critic"] and facts["profiles"][2]["codes"] == 8
    assert all("critic" not in item["attributes"] for item in items)
    dataset = common.load_dataset(tmp_path / "run")
    traits = [common.Trait(profile, dataset.items) for profile in dataset.profiles]
    sentences = common.make_sentences(traits, dataset.items, 3000, 8, np.random.default_rng(0), rated=True)
    for word, share in facts["profiles"][2]["likes"].items():
        marks = [text[-2] == "+" for told, texts in sentences if told == {2: word} for text in texts]
        assert len(marks) > 200 and np.mean(marks) == pytest.approx(share, abs=0.06)
    for history in ("liked", "rated"):
        capsys.readouterr()
        call_stage(infer, "--run", tmp_path / "run", "--lm", lm_folders["gpt2"], "--steps", 1,
                   "--task-steps", 1, "--history", history)
        is_warned = "WARNING: liked titles alone tell little of a critic" in capsys.readouterr().out
        assert is_warned == (history == "liked")
    call_stage(quantize, "--run", tmp_path / "run", "--epochs", 1, "--warm-up", 1, "--codes", "2,2,3")
    assert np.load(tmp_path / "run" / "feature_bank.npy").shape == (len(dataset.users), 3)
    call_stage(ctr, "--run", tmp_path / "run", "--fields", "attributes", "--seeds", 1, "--epochs", 1,
               "--ids", "none,userip")
    rows = {row["ids"]: row["parameters"]
            for row in json.loads((tmp_path / "run" / "results.json").read_text())["rows"]}
    assert rows["userip"] > rows["none"]


# ---------------------------------------------------------------- broken and hostile files

GZ, META = "Games.json.gz", "meta_Games.json.gz"


def change_lines(name, change):
    """Rewrite the lines of a file of the data set."""
    def damage(folder):
        path = folder / name
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        write(path, b"".join(change(data.splitlines(keepends=True))))
    return damage


def insert(*new):
    """Put these lines behind the tenth."""
    return lambda found: found[:10] + [line.rstrip(b"\n") + b"\n" for line in new] + found[10:]


def review(**changes):
    return json.dumps({"reviewerID": "U1", "asin": "I00", "overall": 5, "unixReviewTime": 5,
                       **changes}).encode()


def reviews(**bad):
    """Ten good lines, then a line for each of these values, which its key should not have."""
    new = [review(**{key: value}) for key, values in bad.items() for value in values]
    return change_lines(GZ, insert(*new))


def every(key, value):
    return lambda found: [json.dumps(json.loads(line) | {key: value}).encode() + b"\n" for line in found]


def raw(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-200])


def remove(name):
    return lambda folder: (folder / name).unlink()


def bomb(name, size=80 * 2**20):
    def damage(folder):
        with gzip.open(folder / name, "wb", compresslevel=9) as file:
            for _ in range(size // 2**20):
                file.write(b"0" * 2**20)
    return damage


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


REVIEW, BUSINESS = "yelp_academic_dataset_review.json", "yelp_academic_dataset_business.json"
SKIPPED, TOO_MANY, ENDLESS = "skipped", "cannot be read", "has no end"
ONE_EACH = "not one each"
CALLS = "error: reviews.pickle cannot be read: it wants to call"
CASES = [  # data set, damage, what the output (fine) or the error line must hold
    (amazon, change_lines(GZ, insert(b"not json")), "skipped 1 bad of 601 records, the first is record 11"),
    (amazon, change_lines(GZ, insert(b"{'reviewerID': 'x'}")), SKIPPED),
    (amazon, change_lines(GZ, insert(b"[]", b"3", b"null", b'"text"')), "skipped 4 bad of 604"),
    (amazon, change_lines(GZ, insert(*[b"x"] * 7)), f"error: 7 of 607 records {TOO_MANY}"),
    (amazon, reviews(overall=[6, 0, -1]), "rating 6 is not within 1 to 5"),
    (amazon, reviews(overall=[0, False]), "skipped 2 bad of 602"),
    (amazon, reviews(overall=[float("nan"), float("inf")]), SKIPPED),
    (amazon, reviews(overall=["5 stars", None, [5]]), SKIPPED),
    (amazon, reviews(reviewerID=[None, "", " "]), SKIPPED),
    (amazon, reviews(reviewerID=["a\nb"], asin=["x" * 500, {"a": 1}]), SKIPPED),
    (amazon, reviews(unixReviewTime=[float("inf"), "then"]), SKIPPED),
    (amazon, change_lines(GZ, every("unixReviewTime", None)), "600"),  # a time that is none counts as 0
    (amazon, change_lines(GZ, insert(b"\xff\xfe\xff", b'{"a": "\xe9"}')), SKIPPED),
    (amazon, change_lines(GZ, insert(b"", b"   ", b"\r")), "600"),
    (amazon, change_lines(GZ, insert(b'{"reviewText": "' + b"x" * 3 * 2**20 + b'"}')), SKIPPED),
    (amazon, change_lines(GZ, insert(b'{"reviewText": "' + b"x" * 10 * 2**20 + b'"}')),  # it bounds memory
     f"error: a line of Games.json.gz {ENDLESS}"),
    (amazon, change_lines(GZ, insert(b"[" * 100_000)), SKIPPED),
    (amazon, change_lines(GZ, insert(b'{"overall": ' + b"9" * 5000 + b"}")), SKIPPED),
    (amazon, change_lines(GZ, every("overall", "x")), f"error: 600 of 600 records {TOO_MANY}"),
    (amazon, change_lines(GZ, every("asin", "I00")),
     "error: kept 0 of 40 rows, 0 of 40 users, 0 of 1 items"),
    (amazon, change_lines(GZ, every("reviewerID", "only")),
     "error: kept 0 of 30 rows, 0 of 1 users, 0 of 30 items"),
    (amazon, change_lines(GZ, every("overall", 5)), "error: all 600 ratings are 5"),
    (amazon, change_lines(GZ, lambda found: found + found[:50]), "50 repeated user-item pairs"),
    (amazon, change_lines(GZ, lambda found: [line.rstrip(b"\n") + b"\r\n" for line in found]), "600"),
    (amazon, change_lines(GZ, lambda found: []), "error: kept 0 of 0 rows"),
    (amazon, raw(GZ, b""), "error: kept 0 of 0 rows"),
    (amazon, raw(GZ, b"no gzip at all"), "error: cannot read Games.json.gz"),
    (amazon, truncate(GZ), "error: cannot read Games.json.gz"),
    (amazon, bomb(GZ), f"error: a line of Games.json.gz {ENDLESS}"),
    (amazon, bomb(META), f"error: a line of meta_Games.json.gz {ENDLESS}"),
    (amazon, remove(GZ), f"error: 0 files of reviews and 1 of products, {ONE_EACH}"),
    (amazon, remove(META), f"error: 1 files of reviews and 0 of products, {ONE_EACH}"),
    (amazon, raw("Toys.json", b"{}"), f"error: 2 files of reviews and 1 of products, {ONE_EACH}"),
    (amazon, change_lines(META, lambda found: []), "30 of 30 items have no title"),
    (amazon, change_lines(META, every("title", None)), "30 of 30 items have no title"),
    (amazon, change_lines(META, every("title", "a\x00b\x1b[31m\u202e&lt;script&gt;\n" * 1000)), "600"),
    (amazon, change_lines(META, every("price", "about $1,299.00 - $2,000")), "600"),
    (amazon, change_lines(META, every("price", {"a": []})), "600"),
    (amazon, change_lines(META, every("categories", "x" * 5000)), "600"),
    (amazon, change_lines(META, every("categories", [[]])), "600"),
    (amazon, change_lines(META, insert(b"__import__('os').mkdir('pwned')")),
     f"error: 1 of 31 records {TOO_MANY}"),
    (amazon, change_lines(META, every("asin", 5)), "error: no reviewed product is described"),
    (yelp, change_lines(REVIEW, every("date", None)), "600"),
    (yelp, change_lines(REVIEW, every("stars", "4")), "error: all 600 ratings are 4"),
    (yelp, change_lines(BUSINESS, every("attributes", {"RestaurantsPriceRange2": "u'2'"})), "moderate"),
    (yelp, change_lines(BUSINESS, every("attributes", "None")), '"background": []'),
    (yelp, remove(BUSINESS), f"error: 1 files of reviews and 0 of products, {ONE_EACH}"),
    (nete, raw("reviews.pickle", pickle.dumps(Malicious())), CALLS),
    (nete, raw("reviews.pickle", pickle.dumps([np.float64(3)])), CALLS),
    (nete, raw("reviews.pickle", pickle.dumps({"a": 1})), "error: reviews.pickle holds a dict"),
    (nete, raw("reviews.pickle", b"\x80\x04garbage"), "error: reviews.pickle cannot be read"),
    (nete, raw("reviews.pickle", pickle.dumps([{"user": "a"}] * 50)), f"error: 50 of 50 records {TOO_MANY}"),
    (nete, raw("reviews.pickle", pickle.dumps([None, 3, "text", []])), f"error: 4 of 4 records {TOO_MANY}"),
    (nete, remove("item.json"), f"error: 1 files of reviews and 0 of products, {ONE_EACH}"),
    (nete, raw("item.json", b"[{"), "error: item.json cannot be read"),
    (ml_1m, change_lines("ratings.dat", insert(b"1::2::3")), SKIPPED),
    (ml_1m, change_lines("movies.dat", lambda found: [line.replace(b"::", b";") for line in found]),
     f"error: 30 of 30 records {TOO_MANY}"),
    (ml_1m, remove("movies.dat"), "error: cannot read movies.dat"),
    (ml_csv, change_lines("ratings.csv", lambda found: [b"a,b,c\n", *found[1:]]),
     "error: ratings.csv has no column userId, movieId"),
    (ml_csv, change_lines("ratings.csv", insert(b'1,"2,3,4', b"1,2")), SKIPPED),
    (own_csv, raw("r.csv", b""), "error: r.csv is empty or no text"),
    (own_csv, raw("r.csv", b"who,what,stars,when\rU1,I00,5,5\rU2,I00,2,5\r"), "error: kept 0 of 2 rows"),
    (own_csv, raw("r.csv", b"\xff\xfe"), "error: r.csv is empty or no text"),
    (own_csv, remove("i.csv"), "error: cannot read i.csv"),
    (own_csv, change_lines("r.csv", lambda found: [b"\xef\xbb\xbf" + found[0], *found[1:]]), "600"),
    (own_csv, change_lines("r.csv", insert(b"U1,I00,great,5", b"U1,I00,,5", b"U1,I00,nan,5")), SKIPPED),
    (amazon, raw("._Games.json", b"{}"), "600"),
]


@pytest.mark.parametrize("make, damage, words", CASES,
                         ids=[f"{case[0].__name__}-{number}" for number, case in enumerate(CASES)])
def test_broken_and_hostile_files_end_in_artifacts_or_one_line(make, damage, words, tmp_path, capsys,
                                                               monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = make(tmp_path / "raw")
    damage(tmp_path / "raw")
    if words.startswith("error"):
        with pytest.raises(SystemExit) as stop:
            common.guarded(lambda: call_stage(prepare, "--run", tmp_path / "run", *flags))
        text = capsys.readouterr().err
        assert stop.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1, text
        assert words in text and "); " in text
        assert not list((tmp_path / "run").glob("*"))
    else:
        run_01(tmp_path / "run", *flags)
        assert words in capsys.readouterr().out + (tmp_path / "run" / "items.json").read_text()
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("products", [True, False])
def test_where_there_are_several_files_their_names_are_told(products, tmp_path):
    flags = yelp(tmp_path / "raw")
    (tmp_path / "raw" / "a_review.json").write_text("{}")
    if not products:
        (tmp_path / "raw" / BUSINESS).unlink()
    with pytest.raises(common.UserError, match=f"leave one of a_review.json, {REVIEW}") as error:
        call_stage(prepare, "--run", tmp_path / "run", *flags)
    assert ("fetch" in str(error.value)) != products


FIELDS = ["asin", "title", "price", "categories", "category", "brand", "attributes"]
CELLS = st.text(alphabet=st.characters(codec="utf-8"), max_size=12)
ROWS = st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("uvwxyz"),
                          st.one_of(st.integers(-1, 7).map(str), CELLS), CELLS), max_size=60)


@property_settings(max_examples=40, deadline=None, derandomize=True,
                   suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, raw_bytes=st.binary(max_size=40))
def test_any_csv_ends_in_valid_artifacts_or_one_line(rows, raw_bytes, tmp_path):
    buffer = io.StringIO()
    csv.writer(buffer).writerows([["user_id", "item_id", "rating", "kind"], *rows])
    (tmp_path / "r.csv").write_bytes(buffer.getvalue().encode("utf-8") + raw_bytes)
    run = tmp_path / hashlib.md5((tmp_path / "r.csv").read_bytes()).hexdigest()
    flags = ["--dataset", "csv", "--ratings-file", tmp_path / "r.csv", "--hobby-col", "kind",
             "--min-interactions", 1]
    try:
        call_stage(prepare, "--run", run, *flags)
    except common.UserError as error:
        assert "\n" not in str(error)
        assert not list(run.glob("*"))
    else:
        check_artifacts(run)


@pytest.mark.parametrize("brand, categories, wanted", [
    ("by\n    \n    Intuit", ["Software", "Accounting"], ("intuit", ["accounting"])),
    ("By Invitation", ["Games", "Games for PC"], ("by invitation", ["games for pc"])),
    ("Intuit", ["Games", "PC Games", "</span></span></span>"], ("intuit", ["pc games"])),
    (None, "Bars, , Pizza, Food, Wine", ("", ["bars", "pizza", "food"])),
    ("Visit Amazon's Jimmy Page Page", ["Books"], ("jimmy page", ["books"])),
    ("Jimmy Page", ["Books"], ("jimmy page", ["books"])),
    ("SWV   Format: Audio CD", ["CDs"], ("swv", ["cds"])),
    ("Jane Doe (Author)   Format: Kindle Edition", ["Books"], ("jane doe", ["books"])),
    ("Ann Lee  (Composer),     Bo Li  (Conductor)    Format: Vinyl", ["CDs"], ("ann lee", ["cds"])),
    ("Format: Audio CD", ["CDs"], ("", ["cds"])),
    ("Top Rated: Pans", ["Pans"], ("top rated: pans", ["pans"])),
    ("Crayola (Toys)", ["Toys"], ("crayola (toys)", ["toys"])),
    (None, "Restaurants, Beer, Wine & Spirits, Food", ("", ["restaurants", "beer, wine & spirits", "food"])),
    (None, "Books, Mags, Music & Video, Music Shops", ("", ["books, mags, music & video", "music shops"])),
    (float("nan"), ["Books"], ("", ["books"]))])
def test_brand_and_category_of_a_product(brand, categories, wanted):
    """Some lines of 2018 have "by" and a new line before the brand, some markup at the path's end; those of
    2023 have what a page adds to a name; some of Yelp's categories have a comma."""
    found = prepare.parse_product(json.dumps({"asin": "I1", "brand": brand, "category": categories}).encode())
    assert (found["brand"], found["categories"]) == wanted


@property_settings(max_examples=40, deadline=None, derandomize=True,
                   suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5),
                                     lambda inner: st.lists(inner, max_size=3)
                                     | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
                                     max_leaves=8), max_size=12))
def test_any_product_record_is_described_or_counted_as_bad(records, tmp_path):
    path = tmp_path / "meta.json"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    try:
        found = prepare.good(prepare.records(path), prepare.parse_product, path)
        facts = {record["id"]: record for record in found}
    except common.UserError:
        return
    titles, attributes = prepare.describe_products(facts)
    assert all(isinstance(title, str) for title in titles.values())
    assert all(len(found["background"]) <= 1 for found in attributes.values())  # none without a price


@pytest.mark.parametrize("title, wanted", [
    ("var aPageStart = (new Date()).getTime();\nvar ue_t0=ue_t0||+new Date();", ""),
    ("<!DOCTYPE html><html><head>", ""), ("A Date with Time", "A Date with Time")])
def test_the_source_of_a_web_page_is_no_title(title, wanted):
    """Some products of Amazon's files of 2018 have it."""
    assert prepare.parse_product(json.dumps({"asin": "I1", "title": title}).encode())["title"] == wanted


# ---------------------------------------------------------------- downloads

def test_what_another_command_has_fetched_meanwhile_is_taken(server, tmp_path, monkeypatch):
    original = prepare.zipfile.ZipFile

    def slow(*args):
        (tmp_path / "data" / "ml-1m").mkdir(parents=True)
        (tmp_path / "data" / "ml-1m" / "ratings.dat").write_text("of the other")
        return original(*args)

    monkeypatch.setattr(prepare.zipfile, "ZipFile", slow)
    folder = prepare.download("ml-1m", "ratings.dat")
    assert (folder / "ratings.dat").read_text() == "of the other"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An HTTP server of one archive. Yields (replies, requests); a reply: (bytes, share of them sent)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        ml_1m(tmp_path / "published")
        for path in (tmp_path / "published").iterdir():
            zipped.write(path, f"ml-1m/{path.name}")
    replies, requests = [(buffer.getvalue(), 1.0)], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            body, share = replies[0]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:int(share * len(body))])

        def log_message(self, *_):
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    monkeypatch.setattr(prepare, "GROUPLENS", f"http://127.0.0.1:{found.server_port}/")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield replies, requests
    found.shutdown()


def changed(content, at, by=b"X"):
    return content[:at] + by + content[at + len(by):]


@pytest.mark.parametrize("damage", [
    lambda content: (content, 0.5), lambda content: (content[:-100], 1.0), lambda _: (b"", 1.0),
    lambda _: (b"<html>not found</html>", 1.0),
    lambda content: (changed(content, 60, b"\xff" * 40), 1.0),
    lambda content: (changed(content, content.index(b"PK\1\2") + 16), 1.0)],
    ids=["breaks off", "cut", "empty", "no archive", "packed bytes", "sum in the directory"])
def test_a_broken_download_is_one_line_leaves_nothing_and_the_same_command_fetches_it_again(
        damage, server, tmp_path, capsys):
    replies, requests = server
    flags, whole = ["--run", tmp_path / "run", "--dataset", "ml-1m"], replies[0]
    replies[0] = damage(whole[0])
    with pytest.raises(SystemExit) as stop:
        common.guarded(lambda: call_stage(prepare, *flags))
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith("error: cannot download ml-1m: ")
    assert text.count("\n") == 1 and "ratings.dat as --data-dir" in text
    assert not list((tmp_path / "data").glob("*")) and not (tmp_path / "run").exists()
    replies[0] = whole
    call_stage(prepare, *flags)
    assert requests == ["/ml-1m.zip"] * 2
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["ml-1m"]
    assert json.loads((tmp_path / "run" / "dataset.json").read_text())["n_interactions"] == 600
    call_stage(prepare, *flags)  # what is there is not fetched again
    assert len(requests) == 2
