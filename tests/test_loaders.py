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
    return [(f"U{pair // ITEMS}", f"I{pair % ITEMS:02d}", int(rng.integers(1, 6)), 1000 + int(rng.integers(10**6))) for pair in chosen]


def write(path, content):
    """bytes or text, gzipped where the name says so."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def lines(objects):
    return "".join(json.dumps(record) + "\n" for record in objects)


def amazon_reviews(year=2014):
    keys = {2014: ("reviewerID", "asin", "overall", "unixReviewTime"), 2018: ("reviewerID", "asin", "overall", "unixReviewTime"),
            2023: ("user_id", "parent_asin", "rating", "timestamp")}[year]
    return [dict(zip(keys, row)) | {"reviewText": "good"} | ({"asin": "variant"} if year == 2023 else {}) for row in pairs()]


def amazon_meta(year=2014):
    found = []
    for item in range(ITEMS):
        record = {"parent_asin" if year == 2023 else "asin": f"I{item:02d}", "title": f"Thing &amp; <b>{item}</b>"}
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
    write(folder / "meta_Games.json.gz", "".join(f"{record!r}\n" for record in meta) if literals else lines(meta))
    return ["--dataset", "amazon", "--data-dir", folder]


def yelp(folder):
    folder.mkdir()
    write(folder / "yelp_academic_dataset_review.json", lines(
        {"user_id": u, "business_id": i, "stars": float(r), "date": f"2018-07-{1 + t % 28:02d} 22:09:11"} for u, i, r, t in pairs()))
    write(folder / "yelp_academic_dataset_business.json", lines(
        {"business_id": f"I{i:02d}", "name": f"Caf\u00e9 {i}", "categories": "Bars, Pizza" if i % 4 else None,
         "attributes": {"RestaurantsPriceRange2": str(1 + i % 4)} if i % 3 else None} for i in range(ITEMS)))
    return ["--dataset", "yelp", "--data-dir", folder]


def nete(folder, reviews=None):
    (folder / "1").mkdir(parents=True)
    reviews = reviews or [{"user": u, "item": i, "rating": r, "template": ("price", "good", "a sentence", 1)} for u, i, r, _ in pairs()]
    (folder / "reviews.pickle").write_bytes(pickle.dumps(reviews))
    (folder / "item.json").write_text(json.dumps([{"item": f"I{i:02d}", "title": f"Film {i}", "brand": f"Studio{i % 3}", "price": f"${i}"}
                                                  for i in range(ITEMS)]))
    order = np.random.default_rng(5).permutation(len(reviews))
    for name, part in zip(("train", "validation", "test"), np.split(order, [400, 500])):
        (folder / "1" / f"{name}.index").write_text(" ".join(map(str, part)))
    return ["--dataset", "nete", "--data-dir", folder]


def ml_1m(folder):
    folder.mkdir()
    write(folder / "ratings.dat", "".join(f"{u[1:]}::{int(i[1:]) + 1}::{r}::{t}\n" for u, i, r, t in pairs()))
    write(folder / "movies.dat", "".join(f"{i + 1}::Caf\u00e9 {i}, The ({1940 + 2 * i})::Drama|Action\n" for i in range(ITEMS)).encode("latin-1"))
    return ["--dataset", "ml-1m", "--data-dir", folder]


def ml_csv(folder):
    folder.mkdir()
    write(folder / "ratings.csv", "userId,movieId,rating,timestamp\n" + "".join(f"{u[1:]},{int(i[1:])},{r - 0.5},{t}\n" for u, i, r, t in pairs()))
    write(folder / "movies.csv", "movieId,title,genres\n" + "".join(f'{i},"Film ""{i}"", A ({1995 + i})",Drama|(no genres listed)\n'
                                                                    for i in range(ITEMS)))
    return ["--dataset", "ml-1m", "--data-dir", folder]


def own_csv(folder, separator=","):
    folder.mkdir()
    with open(folder / "r.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows([["who", "what", "stars", "when"], *pairs()])
    with open(folder / "i.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows([["key", "name", "kinds", "tier"], *[
            [f"I{i:02d}", f"Thing, {i}", f"A|B{i % 3}", "high" if i % 2 else "low"] for i in range(ITEMS)]])
    return ["--dataset", "csv", "--ratings-file", folder / "r.csv", "--items-file", folder / "i.csv", "--user-col", "who", "--item-col", "what",
            "--rating-col", "stars", "--time-col", "when", "--item-id-col", "key", "--title-col", "name", "--hobby-col", "kinds",
            "--background-col", "tier"]


def run_01(run, *flags):
    call_stage(prepare, "--run", run, *flags)
    check_artifacts(run)
    return json.loads((run / "dataset.json").read_text()), json.loads((run / "items.json").read_text())


def check_artifacts(run):
    """Valid by the contract: loadable, fingerprinted, bounded, split 8:1:1 where the split is ours."""
    dataset = common.load_dataset(run)
    assert dataset.interactions.dtype == np.int32 and set(np.unique(dataset.interactions[:, 2])) <= {0, 1}
    assert all(item["title"] and "\n" not in item["title"] and len(item["title"]) <= 200 and item["title"].isprintable() for item in dataset.items)
    assert len(set(map(tuple, dataset.interactions[:, :2].tolist()))) == len(dataset.interactions)
    assert len(set(dataset.users)) == len(dataset.users)


@pytest.mark.parametrize("year, literals", [(2014, False), (2014, True), (2018, False), (2023, False)])
def test_amazon_in_all_its_dialects(year, literals, tmp_path, capsys):
    facts, items = run_01(tmp_path / "run", *amazon(tmp_path / "raw", year, literals))
    by_id = {item["id"]: item for item in items}
    assert facts["n_interactions"] == 600 and facts["n_users"] == USERS and by_id["I01"]["title"] == "Thing & 1"
    assert by_id["I01"]["attributes"]["hobby"] == ["brand1"] and by_id["I03"]["attributes"]["hobby"] == ["leaf1"]
    assert by_id["I00"]["attributes"]["background"] == ["unpriced"] and by_id["I02"]["attributes"]["background"] == ["budget"]
    assert by_id["I28"]["attributes"]["background"] == ["premium"] and "paper: Games" in capsys.readouterr().out
    times = {row[:2]: row[3] for row in pairs()}
    dataset = common.load_dataset(tmp_path / "run")
    stored = [times[dataset.users[u], dataset.items[i]["id"]] for u, i, *_ in dataset.interactions.tolist()]
    assert stored == sorted(stored)


def test_yelp(tmp_path):
    facts, items = run_01(tmp_path / "run", *yelp(tmp_path / "raw"))
    by_id = {item["id"]: item for item in items}
    assert facts["n_interactions"] == 600 and by_id["I01"] == {"id": "I01", "title": "Caf\u00e9 1",
                                                               "attributes": {"hobby": ["bars", "pizza"], "background": ["moderate"]}}
    assert by_id["I00"]["attributes"] == {"hobby": [], "background": ["unpriced"]}


def test_nete_with_our_split_and_with_its_own(tmp_path):
    flags = nete(tmp_path / "raw")
    facts, items = run_01(tmp_path / "run", *flags)
    assert facts["n_interactions"] == 600 and items[0]["attributes"]["hobby"] == ["studio0"]
    run_01(tmp_path / "own", *flags, "--split-dir", tmp_path / "raw" / "1", "--min-interactions", 1)
    dataset = common.load_dataset(tmp_path / "own")
    wanted = {(pairs()[row][0], pairs()[row][1]): part for part, name in enumerate(("train", "validation", "test"))
              for row in map(int, (tmp_path / "raw" / "1" / f"{name}.index").read_text().split())}
    assert {(dataset.users[u], dataset.items[i]["id"]): split for u, i, _, split in dataset.interactions.tolist()} == wanted


def test_movielens_folders(tmp_path):
    facts, items = run_01(tmp_path / "run", *ml_1m(tmp_path / "raw"))
    assert facts["n_interactions"] == 600 and items[0]["title"] == "The Caf\u00e9 0"
    assert items[0]["attributes"] == {"hobby": ["drama", "action"], "background": ["forties"]}
    facts, items = run_01(tmp_path / "run2", *ml_csv(tmp_path / "raw2"))
    assert items[0]["title"] == 'A Film "0"' and items[5]["attributes"] == {"hobby": ["drama"], "background": ["noughties"]}
    assert facts["positive_rate"] == pytest.approx(np.mean([r - 0.5 > 3 for _, _, r, _ in pairs()]))


@pytest.mark.parametrize("separator", [",", "\t"])
def test_csv_of_ones_own(separator, tmp_path):
    facts, items = run_01(tmp_path / "run", *own_csv(tmp_path / "raw", separator))
    assert items[1] == {"id": "I01", "title": "Thing, 1", "attributes": {"hobby": ["a", "b1"], "background": ["high"]}}
    assert len(facts["profiles"]) == 2
    base = facts["fingerprint"]
    flags = own_csv(tmp_path / "raw2", separator)
    for change in (["--value-sep", ";"], ["--title-col", "key"], ["--hobby-col", "tier"], ["--background-col", "kinds"], ["--rating-col", "when"],
                   ["--time-col", "stars"]):
        assert run_01(tmp_path / "run", *flags, *change)[0]["fingerprint"] != base, change
    without_items = [*flags[:4], *flags[6:12]]
    assert run_01(tmp_path / "run", *without_items)[1][0] == {"id": "I00", "title": "I00", "attributes": {}}


def test_one_profile_runs_through_all_stages(tmp_path):
    flags, run = own_csv(tmp_path / "raw")[:-2], tmp_path / "run"
    facts, _ = run_01(run, *flags)
    assert [profile["name"] for profile in facts["profiles"]] == ["hobby"]
    call_stage(infer, "--run", run, "--lm", "tiny", "--tiny-sentences", 64, "--steps", 1)
    call_stage(quantize, "--run", run, "--epochs", 1)
    call_stage(ctr, "--run", run, "--seeds", 1, "--epochs", 1)
    assert np.load(run / "feature_bank.npy").shape == (USERS, 1) and len(json.loads((run / "quantize.json").read_text())["codes"]) == 1


def test_the_critic_is_a_third_profile_of_people_not_of_items(tmp_path, lm_folders):
    """--critic: invented people like the share of titles that their word says; the bank gets a third code; no field of items is made of it."""
    flags = own_csv(tmp_path / "raw")
    facts, items = run_01(tmp_path / "run", *flags, "--critic")
    names = [profile["name"] for profile in facts["profiles"]]
    assert names == ["hobby", "background", "critic"] and facts["profiles"][2]["codes"] == 8
    assert all("critic" not in item["attributes"] for item in items)
    dataset = common.load_dataset(tmp_path / "run")
    sentences = infer.make_sentences(dataset, dataset.items, 3000, 8, np.random.default_rng(0), "rated")
    for word, share in facts["profiles"][2]["likes"].items():
        marks = [text[-2] == "+" for told, texts in sentences if told == {2: word} for text in texts]
        assert len(marks) > 200 and np.mean(marks) == pytest.approx(share, abs=0.06)
    call_stage(infer, "--run", tmp_path / "run", "--lm", lm_folders["gpt2"], "--steps", 2, "--history", "rated")
    call_stage(quantize, "--run", tmp_path / "run", "--epochs", 1, "--warm-up", 1, "--codes", "2,2,3")
    assert np.load(tmp_path / "run" / "feature_bank.npy").shape == (len(dataset.users), 3)
    call_stage(ctr, "--run", tmp_path / "run", "--fields", "attributes", "--seeds", 1, "--epochs", 1, "--ids", "none,userip")
    rows = {row["ids"]: row["parameters"] for row in json.loads((tmp_path / "run" / "results.json").read_text())["rows"]}
    assert rows["userip"] > rows["none"]
    with pytest.raises(common.UserError, match="the demo has no planted critics"):
        call_stage(prepare, "--run", tmp_path / "demo", "--critic")


# ---------------------------------------------------------------- broken and hostile files

def change_lines(name, change):
    """Rewrite the lines of a file of the data set."""
    def damage(folder):
        path = folder / name
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        write(path, b"".join(change(data.splitlines(keepends=True))))
    return damage


def insert(*new):
    """Put these lines behind the tenth."""
    return lambda found: found[:10] + [line if line.endswith(b"\n") else line + b"\n" for line in new] + found[10:]


def review(**changes):
    return json.dumps({"reviewerID": "U1", "asin": "I00", "overall": 5, "unixReviewTime": 5, **changes}).encode()


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


GZ, META, REVIEW, BUSINESS = "Games.json.gz", "meta_Games.json.gz", "yelp_academic_dataset_review.json", "yelp_academic_dataset_business.json"
SKIPPED, TOO_MANY = "skipped", "are not what they should be"
CASES = [  # data set, damage, what the output (fine) or the error line must hold, flags
    (amazon, change_lines(GZ, insert(b"not json")), "skipped 1 bad of 601 lines, the first is line 11"),
    (amazon, change_lines(GZ, insert(b"{'reviewerID': 'x'}")), SKIPPED),
    (amazon, change_lines(GZ, insert(b"[]", b"3", b"null", b'"text"')), "skipped 4 bad of 604"),
    (amazon, change_lines(GZ, insert(*[b"x"] * 7)), f"error: 7 of 607 lines {TOO_MANY}"),
    (amazon, change_lines(GZ, insert(review(overall=6), review(overall=0), review(overall=-1))), "rating 6 is not within 1 to 5"),
    (amazon, change_lines(GZ, insert(review(overall=float("nan")), review(overall=float("inf")))), "rating nan is not within"),
    (amazon, change_lines(GZ, insert(review(overall="5 stars"), review(overall=None), review(overall=[5]))), SKIPPED),
    (amazon, change_lines(GZ, insert(review(reviewerID=None), review(reviewerID=""), review(reviewerID=" "))), SKIPPED),
    (amazon, change_lines(GZ, insert(review(reviewerID="a\nb"), review(asin="x" * 500), review(asin={"a": 1}))), SKIPPED),
    (amazon, change_lines(GZ, insert(review(unixReviewTime=float("inf")), review(unixReviewTime="then"))), SKIPPED),
    (amazon, change_lines(GZ, insert(b"\xff\xfe\xff", b'{"a": "\xe9"}')), SKIPPED),
    (amazon, change_lines(GZ, insert(b"", b"   ", b"\r")), "600"),
    (amazon, change_lines(GZ, insert(b'{"reviewText": "' + b"x" * 10 * 2**20 + b'"}')), "longer than 1,048,576 bytes"),
    (amazon, change_lines(GZ, insert(b"[" * 100_000)), SKIPPED),
    (amazon, change_lines(GZ, insert(b'{"overall": ' + b"9" * 5000 + b"}")), SKIPPED),
    (amazon, change_lines(GZ, every("overall", "x")), f"error: 600 of 600 lines {TOO_MANY}"),
    (amazon, change_lines(GZ, every("asin", "only")), "error: 0 interactions are left"),
    (amazon, change_lines(GZ, every("reviewerID", "only")), "error: 0 interactions are left"),
    (amazon, change_lines(GZ, every("overall", 5)), "positive rate 1.000"),
    (amazon, change_lines(GZ, lambda found: found + found[:50]), "50 repeated user-item pairs"),
    (amazon, change_lines(GZ, lambda found: [line.rstrip(b"\n") + b"\r\n" for line in found]), "600"),
    (amazon, change_lines(GZ, lambda found: []), "error: 0 interactions are left"),
    (amazon, raw(GZ, b""), "error: 0 interactions are left"),
    (amazon, raw(GZ, b"no gzip at all"), "error: cannot read Games.json.gz"),
    (amazon, truncate(GZ), "error: cannot read Games.json.gz"),
    (amazon, bomb(GZ), "error: line 1 has no end within"),
    (amazon, bomb(META), "error: line 1 has no end within"),
    (amazon, remove(GZ), "error: 0 reviews files and 1 meta_ files"),
    (amazon, remove(META), "error: 1 reviews files and 0 meta_ files"),
    (amazon, raw("Toys.json", b"{}"), "error: 2 reviews files"),
    (amazon, change_lines(META, lambda found: []), "30 of 30 items have no title"),
    (amazon, change_lines(META, every("title", None)), "30 of 30 items have no title"),
    (amazon, change_lines(META, every("title", "a\x00b\x1b[31m\u202e&lt;script&gt;\n" * 1000)), "600"),
    (amazon, change_lines(META, every("price", "about $1,299.00 - $2,000")), "600"),
    (amazon, change_lines(META, every("price", {"a": []})), "600"),
    (amazon, change_lines(META, every("categories", "x" * 5000)), "600"),
    (amazon, change_lines(META, every("categories", [[]])), "600"),
    (amazon, change_lines(META, insert(b"__import__('os').mkdir('pwned')")), f"error: 1 of 31 lines {TOO_MANY}"),
    (amazon, change_lines(META, every("asin", 5)), "30 of 30 items have no title"),
    (yelp, change_lines(REVIEW, every("date", None)), "600"),
    (yelp, change_lines(REVIEW, every("stars", "4")), "positive rate 1.000"),
    (yelp, change_lines(BUSINESS, every("attributes", {"RestaurantsPriceRange2": "u'2'"})), "moderate 30"),
    (yelp, change_lines(BUSINESS, every("attributes", "None")), "unpriced 30"),
    (yelp, remove(BUSINESS), "error: 0 files end in business.json"),
    (nete, raw("reviews.pickle", pickle.dumps(Malicious())), "error: reviews.pickle cannot be read: it wants to call"),
    (nete, raw("reviews.pickle", pickle.dumps([np.float64(3)])), "error: reviews.pickle cannot be read: it wants to call"),
    (nete, raw("reviews.pickle", pickle.dumps({"a": 1})), "error: reviews.pickle holds a dict"),
    (nete, raw("reviews.pickle", b"\x80\x04garbage"), "error: reviews.pickle cannot be read"),
    (nete, raw("reviews.pickle", pickle.dumps([{"user": "a"}] * 50)), f"error: 50 of 50 lines {TOO_MANY}"),
    (nete, remove("item.json"), "error: cannot read item.json"),
    (nete, raw("item.json", b"[{"), "error: cannot read item.json"),
    (nete, raw("1/train.index", b"0 1 two"), "error: cannot read train.index", "--split-dir", "1"),
    (nete, raw("1/train.index", b"0 99999"), "error: train.index names a review beyond", "--split-dir", "1"),
    (nete, remove("1/test.index"), "error: cannot read test.index", "--split-dir", "1"),
    (ml_1m, change_lines("ratings.dat", insert(b"1::2::3")), SKIPPED),
    (ml_1m, change_lines("movies.dat", lambda found: [line.replace(b"::", b";") for line in found]), f"error: 30 of 30 lines {TOO_MANY}"),
    (ml_1m, remove("movies.dat"), "error: cannot read movies.dat"),
    (ml_csv, change_lines("ratings.csv", lambda found: [b"a,b,c\n", *found[1:]]), "error: there is no column userId, movieId"),
    (ml_csv, change_lines("ratings.csv", insert(b'1,"2,3,4', b"1,2")), SKIPPED),
    (own_csv, raw("r.csv", b""), "error: there is no column who, what, stars, when among"),
    (own_csv, raw("r.csv", b"who,what,stars,when\rU1,I00,5,5\rU2,I00,5,5\r"), "error: cannot read r.csv"),
    (own_csv, raw("r.csv", b"\xff\xfe"), "error: cannot read r.csv"),
    (own_csv, remove("i.csv"), "error: cannot read i.csv"),
    (own_csv, change_lines("r.csv", lambda found: [b"\xef\xbb\xbf" + found[0], *found[1:]]), "600"),
    (own_csv, change_lines("r.csv", insert(b"U1,I00,great,5", b"U1,I00,,5", b"U1,I00,nan,5")), SKIPPED),
]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{case[0].__name__}-{number}" for number, case in enumerate(CASES)])
def test_broken_and_hostile_files_end_in_artifacts_or_one_line(case, tmp_path, capsys, monkeypatch):
    make, damage, words, *more = CASES[case]
    monkeypatch.chdir(tmp_path)
    flags = make(tmp_path / "raw")
    damage(tmp_path / "raw")
    if more:
        flags = [*flags, more[0], tmp_path / "raw" / more[1]]
    if words.startswith("error"):
        with pytest.raises(SystemExit) as stop:
            common.guarded(lambda: call_stage(prepare, "--run", tmp_path / "run", *flags))
        message = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if line.startswith("error: ")]
        assert stop.value.code == 2 and len(message) == 1 and words in message[0] and "); " in message[0]
        assert not [path for path in (tmp_path / "run").glob("*") if path.name != ".lock"]
    else:
        run_01(tmp_path / "run", *flags)
        assert words in capsys.readouterr().out
    assert not (tmp_path / "pwned").exists()


FIELDS = ["asin", "title", "price", "categories", "category", "brand", "attributes"]
CELLS = st.text(alphabet=st.characters(codec="utf-8"), max_size=12)
ROWS = st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("uvwxyz"), st.one_of(st.integers(-1, 7).map(str), CELLS), CELLS), max_size=60)


@property_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, raw_bytes=st.binary(max_size=40))
def test_any_csv_ends_in_valid_artifacts_or_one_line(rows, raw_bytes, tmp_path):
    buffer = io.StringIO()
    csv.writer(buffer).writerows([["user_id", "item_id", "rating", "kind"], *rows])
    (tmp_path / "r.csv").write_bytes(buffer.getvalue().encode("utf-8") + raw_bytes)
    run = tmp_path / hashlib.md5((tmp_path / "r.csv").read_bytes()).hexdigest()
    flags = ["--dataset", "csv", "--ratings-file", tmp_path / "r.csv", "--hobby-col", "kind", "--min-interactions", 1]
    try:
        call_stage(prepare, "--run", run, *flags)
    except common.UserError as error:
        assert "\n" not in str(error)
        assert not [path for path in run.glob("*") if path.name != ".lock"]
    else:
        check_artifacts(run)


@property_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5),
                                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
                                     max_leaves=8), max_size=12))
def test_any_product_record_is_described_or_counted_as_bad(records, tmp_path):
    path = tmp_path / "meta.json"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    try:
        facts = {record["id"]: record for record in prepare.records(path, prepare.parse_product)}
    except common.UserError:
        return
    titles, attributes = prepare.describe_products(facts)
    assert all(isinstance(title, str) for title in titles.values()) and all(len(found["background"]) == 1 for found in attributes.values())


# ---------------------------------------------------------------- downloads

@pytest.fixture
def server(tmp_path, monkeypatch):
    """An HTTP server of one archive, with byte ranges, whose first reply breaks off half way. Yields (archive bytes, requests)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        ml_1m(tmp_path / "published")
        for path in (tmp_path / "published").iterdir():
            zipped.write(path, f"ml-1m/{path.name}")
    content, requests = buffer.getvalue(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].rstrip("-"))
            requests.append((self.path, start))
            if self.path.endswith(".md5"):
                body = f"MD5 (ml-1m.zip) = {hashlib.md5(content).hexdigest()}\n".encode()
            else:
                body = content[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            broken = len(requests) == 2
            self.wfile.write(body[:len(body) // 2] if broken else body)

        def log_message(self, *_):
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    monkeypatch.setattr(prepare, "GROUPLENS", f"http://127.0.0.1:{found.server_port}/")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield content, requests
    found.shutdown()


def test_a_broken_download_goes_on_and_is_checked(server, tmp_path):
    content, requests = server
    flags = ["--run", tmp_path / "run", "--dataset", "ml-1m"]
    with pytest.raises(common.UserError, match="the same command goes on from there"):
        call_stage(prepare, *flags)
    assert (tmp_path / "data" / "ml-1m.zip.part").stat().st_size == len(content) // 2
    call_stage(prepare, *flags)
    assert requests[-1] == ("/ml-1m.zip", len(content) // 2) and sorted(path.name for path in (tmp_path / "data").iterdir()) == ["ml-1m"]
    count = len(requests)
    call_stage(prepare, *flags)  # what is there is not fetched again
    assert len(requests) == count


def test_a_download_with_a_wrong_checksum_is_thrown_away(server, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ml-1m.zip.part").write_bytes(b"x" * 10)
    server[1].append("no break")
    server[1].append("no break")
    with pytest.raises(common.UserError, match="checksum is wrong"):
        call_stage(prepare, "--run", tmp_path / "run", "--dataset", "ml-1m")
    assert not list((tmp_path / "data").iterdir())
