"""Stage 01: turn a rating source into the arrays the other stages read. Paper: sections 3.1 and 3.2.

Computes binary labels (rating > 3), removes users and items with few interactions until none is left, and makes the one
random 8:1:1 split that every later stage obeys. Each item gets a title and, for each latent profile, the words that could
name it (MovieLens: genre and era of the film; Amazon, Yelp: brand or category and price level).

Writes to --run (U users, I items, N interactions, M profiles):
    dataset.json       facts, prompts and the fingerprint of the rest
    interactions.npy   int32 (N, 4): user, item, label, split (0 train, 1 validation, 2 test), in time order where the source has times
    users.json         (U) raw user ids          items.json  (I) {id, title, attributes}
    truth.npy          int16 (U, M) planted profiles, demo only, read by evaluation alone

Run:
    python 01_prepare_data.py                                                            # the demo world, 1 s
    python 01_prepare_data.py --dataset ml-100k --run runs/ml-100k                       # MovieLens-100K, downloaded
    python 01_prepare_data.py --dataset amazon --data-dir PATH --run runs/games          # reviews and meta_*.json.gz of one category
    python 01_prepare_data.py --dataset csv --ratings-file r.csv --items-file i.csv --user-col u --item-col i --rating-col stars
"""

import array
import ast
import csv
import gzip
import hashlib
import html
import json
import math
import os
import pickle
import re
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from sklearn.metrics import normalized_mutual_info_score
from tqdm import tqdm

from common import (TEST, TRAIN, VALIDATION, Dataset, Parser, UserError, announce, at_least, fingerprint, guarded, one_run_at_a_time,
                    save_json, save_npy)

# ---------------------------------------------------------------- settings

# Paper: section 2.3 names x^1, x^2 and the task. Note: the prompt of a profile may be worded to suit its values. codes: default K_m of stage 03;
# likes (people's traits, which are no attribute of items): share of titles that such a person likes, for the tiny LM's invented people.
HOBBY = {"name": "hobby", "prompt": "This user's hobby is", "codes": 4}
BACKGROUND = {"name": "background", "prompt": ", and his background is", "codes": 3}
CRITIC = {"name": "critic", "prompt": ", and as a critic he is", "codes": 8,  # says how much of what he meets he likes: a matter of degree
          "likes": {"harsh": 0.2, "balanced": 0.55, "generous": 0.85}}
ERA = {"name": "background", "prompt": ", and his background is the", "codes": 3}
TASK_PROMPT = ".\nWhat is the user's interaction history?"

PAPER_TABLE_1 = {"Clothing": (179_223, 38_764, 22_919), "Movies": (441_783, 7_506, 7_360), "Games": (19_927, 2_490, 8_912),
                 "Yelp": (1_293_247, 27_147, 20_266)}
GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
MAX_LINE = 2**20    # bytes; a longer line is no record
MAX_SKIP = 2**26    # bytes skipped in search of that line's end, before the file is given up
MAX_BAD = 0.01      # share of bad lines that is skipped and counted; more is an error
MAX_TITLE = 200     # characters of a title that the LLM will read


def nonempty(text):
    """argparse type: at least one character."""
    if not text:
        raise ValueError
    return text


def parse_arguments():
    parser = Parser(__doc__, device=False)
    parser.add_argument("--dataset", choices=LOADERS, default="demo", help="what to read; demo needs no files")
    parser.add_argument("--data-dir", type=Path, help="folder with the source's files (default: data/<dataset>, downloaded)")
    parser.add_argument("--min-interactions", type=at_least(1), default=4, help="drop users and items with fewer (paper: 4)")
    parser.add_argument("--positive-above", type=at_least(0, float), default=3.0, help="label 1 for ratings above this (paper: 3)")
    parser.add_argument("--max-per-user", type=at_least(1), help="keep a random N rows of each user (default: all)")
    parser.add_argument("--subsample-users", type=at_least(1), help="keep a random N users, for class-room sizes (default: all)")
    parser.add_argument("--critic", action="store_true", help="a third profile: harsh, balanced or generous; for 02 --history rated")
    parser.add_argument("--profile-words", help="words that stand in the prompt for the profiles' names, such as zorp,quell (ablation)")
    parser.add_argument("--split-dir", type=Path, help="nete: folder with train.index, validation.index and test.index (default: our own split)")
    parser.add_argument("--signal", type=at_least(0, float), default=1.0,
                        help="demo: strength of the planted profiles; 0 is the negative control")
    columns = parser.add_argument_group("csv: files of your own, comma- or tab-separated, one record a line, with a header line")
    columns.add_argument("--ratings-file", type=Path, help="a row an interaction")
    columns.add_argument("--items-file", type=Path, help="a row an item (default: the item columns are in the ratings file)")
    for name, default in (("user", "user_id"), ("item", "item_id"), ("rating", "rating")):
        columns.add_argument(f"--{name}-col", default=default, help=f"ratings file: column of the {name}")
    columns.add_argument("--time-col", help="ratings file: column of a number that grows with time (default: the rows are in order)")
    columns.add_argument("--item-id-col", help="items file: column of the item's id (default: as --item-col)")
    for name in ("title", "hobby", "background"):
        columns.add_argument(f"--{name}-col", help=f"column of the item's {name}" + (" (default: there is one profile)" * (name == "background")))
    columns.add_argument("--value-sep", type=nonempty, default="|", help="separates several values in a hobby or background cell")
    return parser.parse_args()


# ---------------------------------------------------------------- data

@dataclass
class Source:
    """A data set as its files hold it. Rows are in source order; times may be None."""

    user_ids: list       # raw id of each user index
    item_ids: list       # raw id of each item index
    users: np.ndarray    # int32 (N,) user index
    items: np.ndarray    # int32 (N,) item index
    ratings: np.ndarray  # float32 (N,)
    times: np.ndarray | None
    titles: dict         # raw item id -> title
    attributes: dict     # raw item id -> {profile name: [values]}
    profiles: list = field(default_factory=lambda: [HOBBY, BACKGROUND])
    truth: dict | None = None  # demo: raw user id -> planted value index of each profile
    split: np.ndarray | None = None  # (N,) the source's own split, -1 where a row is in none


class Ratings:
    """Collects rows in compact arrays: 20 bytes each, beside one copy of every raw id."""

    def __init__(self):
        self.user_index, self.item_index = {}, {}
        self.users, self.items, self.ratings, self.times = array.array("i"), array.array("i"), array.array("f"), array.array("d")

    def add(self, user, item, rating, time=0, low=1.0, high=5.0):
        """Append a row. Raises ValueError or TypeError, and appends nothing, for a rating out of bounds or what cannot be an id or a time."""
        number, when = float(rating), float(time or 0)
        if not low <= number <= high or abs(number) == math.inf:
            raise ValueError(f"rating {rating!r:.20} is not within {low:g} to {high:g}")
        if not abs(when) < math.inf:
            raise ValueError(f"time {time!r:.20} is no time stamp")
        user, item = (index[raw] if raw in index else raw_id(raw) for index, raw in ((self.user_index, user), (self.item_index, item)))
        self.users.append(user if type(user) is int else self.user_index.setdefault(user, len(self.user_index)))
        self.items.append(item if type(item) is int else self.item_index.setdefault(item, len(self.item_index)))
        self.ratings.append(number)
        self.times.append(when)

    def source(self, titles, attributes, profiles, split=None):
        """Source without repeated user-item pairs: of each, the last row in time stays."""
        users, items = np.array(self.users, dtype=np.int32), np.array(self.items, dtype=np.int32)
        ratings, times = np.array(self.ratings, dtype=np.float32), np.array(self.times)
        pairs = users.astype(np.int64) * max(1, len(self.item_index)) + items
        order = np.lexsort((times, pairs))  # stable: rows of the same time stay in source order
        last = np.ones(len(order), dtype=bool)
        last[:-1] = pairs[order][1:] != pairs[order][:-1]
        kept = np.sort(order[last])
        if len(kept) < len(pairs):
            print(f"{len(pairs) - len(kept):,d} repeated user-item pairs: the last rating of each stays")
        return Source(list(self.user_index), list(self.item_index), users[kept], items[kept], ratings[kept],
                      times[kept] if times.any() else None, titles, attributes, profiles, split=None if split is None else split[kept])


DEMO_HOBBIES = {
    "music": "Guitar Piano Violin Drum Trumpet Microphone Ukulele Songbook Cello Flute Amplifier Banjo".split(),
    "fishing": "Rod Reel Lure Net Waders Bait Float Hook Kayak Tackle Bobber Sinker".split(),
    "cooking": "Pan Knife Cookbook Mixer Oven Wok Blender Apron Teapot Grill Whisk Ladle".split(),
    "cycling": "Bike Helmet Saddle Pedal Jersey Pump Chain Tyre Gloves Bell Fork Spokes".split(),
}
DEMO_BACKGROUNDS = {
    "student": "Budget Basic Starter Compact Secondhand Mini".split(),
    "family": "Classic Everyday Reliable Standard Practical Sturdy".split(),
    "wealthy": "Premium Deluxe Handmade Signature Gold Exclusive".split(),
}
EXPOSURE = (0.95, 0.6)  # log weight, when items to meet are drawn, of one that fits the user's hobby, background
TASTE = (2.8, 2.2)      # log odds of liking it
GENEROSITY = (np.array([0.15, -0.15, 0.06, -0.06]), np.array([-0.15, 0.0, 0.15]))  # of each hobby, background, for any item


def load_demo(args):
    """A world whose user profiles are known: 2,000 users of 4 hobbies x 3 backgrounds, 400 items, about 14 ratings a user.

    An item is met more often, and liked more often, when its category fits the user's hobby and its tier the background;
    item quality, user generosity and noise act on top. The planted types also differ a little in generosity towards any item.
    --signal scales all effects of the planted profiles.
    """
    rng = np.random.default_rng((args.seed, 1))
    n_users, n_items = 2000, 400
    hobbies, backgrounds = list(DEMO_HOBBIES), list(DEMO_BACKGROUNDS)
    truth = np.stack([rng.integers(4, size=n_users), rng.integers(3, size=n_users)], axis=1)

    kinds = rng.permutation(np.arange(n_items) % 12)  # item kind = category * 3 + tier
    names = {kind: [f"{tier} {noun}" for tier in DEMO_BACKGROUNDS[backgrounds[kind % 3]] for noun in DEMO_HOBBIES[hobbies[kind // 3]]]
             for kind in range(12)}
    names = {kind: list(rng.permutation(titles)) for kind, titles in names.items()}
    titles = [str(names[kind].pop()) for kind in kinds]

    fits_hobby = truth[:, :1] == kinds // 3      # Shape: (U, I)
    fits_background = truth[:, 1:] == kinds % 3  # Shape: (U, I)
    popularity, quality = rng.normal(0, 0.5, n_items), rng.normal(0, 0.3, n_items)
    generosity = rng.normal(0, 0.3, (n_users, 1))
    generosity += args.signal * (GENEROSITY[0][truth[:, :1]] + GENEROSITY[1][truth[:, 1:]])
    # Shape of exposure, taste and liked: (U, I)
    exposure = np.exp(popularity + args.signal * (EXPOSURE[0] * fits_hobby + EXPOSURE[1] * fits_background))
    taste = quality + generosity + args.signal * (TASTE[0] * (fits_hobby - 1 / 4) + TASTE[1] * (fits_background - 1 / 3))
    liked = rng.random((n_users, n_items)) < 1 / (1 + np.exp(-taste))

    users, items = [], []
    for user in range(n_users):
        count = 6 + rng.poisson(8)
        chosen = rng.choice(n_items, size=count, replace=False, p=exposure[user] / exposure[user].sum())
        users += [user] * count
        items += list(chosen)
    users, items = np.array(users), np.array(items)
    ratings = np.where(liked[users, items], rng.integers(4, 6, len(users)), rng.integers(1, 4, len(users)))
    raw_users, raw_items = [f"u{user:04d}" for user in range(n_users)], [f"i{item:03d}" for item in range(n_items)]
    return Source(
        raw_users, raw_items, users.astype(np.int32), items.astype(np.int32), ratings.astype(np.float32), times=None,
        titles=dict(zip(raw_items, titles)),
        attributes={raw: {"hobby": [hobbies[kind // 3]], "background": [backgrounds[kind % 3]]} for raw, kind in zip(raw_items, kinds)},
        truth={raw: row for raw, row in zip(raw_users, truth)})


def load_ml_100k(args):
    """MovieLens-100K: u.data (user, item, rating, time) and u.item (ISO-8859-1; title with year, 19 genre flags)."""
    folder = args.data_dir or download("ml-100k", "u.data", md5="0e33842e24a9c977be4e0107933c0723")
    genres = [line.rsplit("|", 1)[0].lower() for line in records(folder / "u.genre", str, "latin-1") if "|" in line]
    titles, attributes, ratings = {}, {}, Ratings()

    for cells in records(folder / "u.item", lambda line: cells_of(line.rstrip("\r\n").split("|"), 5 + len(genres)), "latin-1"):
        add_movie(cells[0], cells[1], [genre for genre, flag in zip(genres, cells[5:]) if flag == "1"], titles, attributes)
    read(records(folder / "u.data", lambda line: ratings.add(*cells_of(line.split("\t"), 4)), "latin-1"))
    return ratings.source(titles, attributes, [HOBBY, ERA])


def load_ml_1m(args):
    """MovieLens-1M (ratings.dat, movies.dat, '::' between the cells) or any MovieLens folder with ratings.csv and movies.csv."""
    folder = args.data_dir or download("ml-1m", "ratings.dat")
    titles, attributes, ratings = {}, {}, Ratings()
    if (folder / "ratings.csv").exists():
        movies = table(folder / "movies.csv", ["movieId", "title", "genres"])
        read(table(folder / "ratings.csv", ["userId", "movieId", "rating", "timestamp"], lambda cells: ratings.add(*cells, low=0.5)))
    else:
        movies = records(folder / "movies.dat", lambda line: cells_of(line.rstrip("\r\n").split("::"), 3), "latin-1")
        read(records(folder / "ratings.dat", lambda line: ratings.add(*cells_of(line.split("::"), 4)), "latin-1"))
    for raw, title, genres in movies:
        add_movie(raw, title, genres.lower().split("|"), titles, attributes)
    return ratings.source(titles, attributes, [HOBBY, ERA])


def add_movie(raw, title, genres, titles, attributes):
    titles[raw], year = clean_title(clean_text(title))
    attributes[raw] = {"hobby": [genre for genre in genres if genre not in ("unknown", "(no genres listed)", "")],
                       "background": [era_of(year)] if year else []}


def load_amazon(args):
    """Amazon reviews of one category (.json or .json.gz, an object a line) and meta_*.json(.gz) in either dialect; 2014, 2018 and 2023 fields."""
    files = [path for path in listing(args, "amazon", "a reviews file and meta_*.json.gz of one category from https://amazon-reviews-2023.github.io")
             if re.search(r"\.(json|jsonl)(\.gz)?$", path.name)]
    reviews, meta = [path for path in files if not path.name.startswith("meta_")], [path for path in files if path.name.startswith("meta_")]
    if len(reviews) != 1 or len(meta) != 1:
        raise UserError(f"{len(reviews)} reviews files and {len(meta)} meta_ files instead of one each", args.data_dir,
                        "keep one category in a folder: NAME.json.gz and meta_NAME.json.gz")
    ratings = Ratings()

    def parse(line):
        record = json.loads(line)
        user, rating = record.get("reviewerID") or record.get("user_id"), record.get("overall", record.get("rating"))
        ratings.add(user, record.get("parent_asin") or record["asin"], rating, record.get("unixReviewTime", record.get("timestamp", 0)))

    read(records(reviews[0], parse))
    known = ratings.item_index
    facts = {record["id"]: record for record in records(meta[0], parse_product) if record["id"] in known}
    return ratings.source(*describe_products(facts), [HOBBY, BACKGROUND])


def load_yelp(args):
    """The academic JSON lines: *review.json and *business.json; hobby = categories, background = RestaurantsPriceRange2."""
    files = listing(args, "yelp", "yelp_academic_dataset_review.json and yelp_academic_dataset_business.json from https://www.yelp.com/dataset")
    found = {name: [path for path in files if re.search(rf"{name}\.json(\.gz)?$", path.name)] for name in ("review", "business")}
    for name, paths in found.items():
        if len(paths) != 1:
            raise UserError(f"{len(paths)} files end in {name}.json instead of one", args.data_dir, "use the files as published")
    ratings = Ratings()

    def parse(line):
        record = json.loads(line)
        ratings.add(record["user_id"], record["business_id"], record["stars"], re.sub(r"\D", "", str(record.get("date", "")))[:14] or 0)

    read(records(found["review"][0], parse))
    facts = {record["id"]: record for record in records(found["business"][0], parse_product) if record["id"] in ratings.item_index}
    return ratings.source(*describe_products(facts), [HOBBY, BACKGROUND])


def load_nete(args):
    """The NETE / PEPLER release: reviews.pickle (untrusted: only plain data is built), item.json, and with --split-dir its own split."""
    listing(args, "nete", "reviews.pickle and item.json from https://github.com/lileipisces/NETE")
    path, ratings = args.data_dir / "reviews.pickle", Ratings()
    try:
        with open(path, "rb") as file:
            reviews = PlainUnpickler(file).load()
    except Exception as error:  # a broken pickle fails in as many ways as there are opcodes
        raise UserError(f"reviews.pickle cannot be read: {error}", args.data_dir, "use the file as published") from None
    if not isinstance(reviews, list):
        raise UserError(f"reviews.pickle holds a {type(reviews).__name__} instead of a list", args.data_dir, "use the file as published")
    place = {}  # position in reviews.pickle -> row
    for position, _ in parsed(reviews, lambda review: ratings.add(review["user"], review["item"], review["rating"]), path):
        place[position] = len(place)
    facts = {record["id"]: record for record in json_objects(args.data_dir / "item.json") if record["id"] in ratings.item_index}
    split = None
    if args.split_dir:
        split = np.full(len(ratings.users), -1, dtype=np.int32)
        for part, name in ((TRAIN, "train"), (VALIDATION, "validation"), (TEST, "test")):
            try:
                indices = [int(text) for text in (args.split_dir / f"{name}.index").read_text(encoding="ascii").split()]
            except (OSError, ValueError) as error:
                raise UserError(f"cannot read {name}.index: {error}", args.split_dir, "give one of the release's split folders, such as 1") from None
            if indices and not 0 <= min(indices) <= max(indices) < len(reviews):
                raise UserError(f"{name}.index names a review beyond the {len(reviews)} of reviews.pickle", args.split_dir,
                                "use files of one release")
            split[[place[index] for index in indices if index in place]] = part
    return ratings.source(*describe_products(facts), [HOBBY, BACKGROUND], split)


def load_csv(args):
    """Any ratings file with an optional items file; columns by flags."""
    if args.ratings_file is None:
        raise UserError("no ratings file is given", "--dataset csv", "name it with --ratings-file")
    ratings, titles, attributes = Ratings(), {}, {}
    columns = [args.user_col, args.item_col, args.rating_col] + [args.time_col] * bool(args.time_col)
    read(table(args.ratings_file, columns, lambda cells: ratings.add(*cells, low=-math.inf, high=math.inf)))
    columns = {name: getattr(args, f"{name}_col") for name in ("title", "hobby", "background") if getattr(args, f"{name}_col")}
    id_column = args.item_id_col or args.item_col if args.items_file else args.item_col
    if columns:
        for raw, *cells in table(args.items_file or args.ratings_file, [id_column, *columns.values()], lambda cells: [raw_id(cells[0]), *cells[1:]]):
            if raw in ratings.item_index:
                found = dict(zip(columns, map(clean_text, cells)))
                titles[raw] = found.pop("title", None)
                attributes[raw] = {name: [value.strip().lower() for value in text.split(args.value_sep) if value.strip()]
                                   for name, text in found.items()}
    return ratings.source(titles, attributes, [HOBBY] + [BACKGROUND] * bool(args.background_col))


LOADERS = {"demo": load_demo, "ml-100k": load_ml_100k, "ml-1m": load_ml_1m, "amazon": load_amazon, "nete": load_nete, "yelp": load_yelp,
           "csv": load_csv}


# ---------------------------------------------------------------- reading files that may be broken

# What a parser raises when a record is not what it should be.
NOT_A_RECORD = (ValueError, LookupError, TypeError, AttributeError, SyntaxError, RecursionError, MemoryError, OverflowError, csv.Error)


class Bad:
    """Bad lines of one file: skipped and counted while they are few, the first one shown; more than MAX_BAD of all is an error."""

    def __init__(self, path):
        self.path, self.count, self.first = path, 0, None

    def note(self, number, error):
        """error: what was wrong with line `number`, an exception or text."""
        self.count += 1
        if self.first is None:
            why = f"{error} is missing" if isinstance(error, KeyError) else str(error).split("\n")[0][:120] or type(error).__name__
            self.first = f"line {number}: {why}"

    def judge(self, total):
        """Raise UserError when too many of `total` lines were bad, else say how many were skipped."""
        if self.count > MAX_BAD * total:
            raise UserError(f"{self.count:,d} of {total:,d} lines are not what they should be, the first is {self.first}", self.path,
                            "check --dataset, the column flags and the file")
        if self.count:
            print(f"{self.path.name}: skipped {self.count:,d} bad of {total:,d} lines, the first is {self.first}")


def parsed(values, parse, path):
    """(position, parse(value)) of every value of a list that can be parsed; the others are skipped as Bad says."""
    bad = Bad(path)
    for position, value in enumerate(values):
        try:
            record = parse(value)
        except NOT_A_RECORD as error:
            bad.note(position + 1, error)
        else:
            yield position, record
    bad.judge(len(values))


def records(path, parse, encoding="utf-8", skip_first=False):
    """parse(line) of every non-empty line of a text file or .gz, in one pass; bad lines are skipped as Bad says.

    Raises UserError when the file is missing, cut short, no text, or too many of its lines are bad.
    """
    bad, number, total = Bad(path), 0, 0
    try:
        with open(path, "rb") as raw, tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, leave=False, mininterval=1) as bar:
            file = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            while line := file.readline(MAX_LINE):
                number += 1
                if number % 4096 == 0:
                    bar.update(raw.tell() - bar.n)
                if len(line) == MAX_LINE and not line.endswith(b"\n"):
                    skip_line(file, path, number)
                    total += 1
                    bad.note(number, f"longer than {MAX_LINE:,d} bytes")
                elif not line.isspace() and not (skip_first and number == 1):
                    total += 1
                    try:
                        record = parse(line.decode(encoding))
                    except NOT_A_RECORD as error:
                        bad.note(number, error)
                    else:
                        yield record
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path.name}: {getattr(error, 'strerror', None) or error}", path.parent,
                        "fetch the file again, or give the folder that holds it with --data-dir") from None
    bad.judge(total)


def read(rows):
    """Run a reader to its end, for what its parser does with each line."""
    for _ in rows:
        pass


def skip_line(file, path, number):
    """Read on to the end of a line that is too long, but not for ever."""
    skipped = 0
    while rest := file.readline(MAX_LINE):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            return
        if skipped > MAX_SKIP:
            raise UserError(f"line {number} has no end within {MAX_SKIP:,d} bytes", path, "this is no file of one record a line")


def table(path, columns, parse=list):
    """parse([cells of the named columns]) of every row of a comma- or tab-separated file with a header line."""
    try:
        with (gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")) as file:
            header = file.readline(MAX_LINE).decode("utf-8-sig")
        separator = "\t" if "\t" in header else ","
        names = next(csv.reader([header.rstrip("\r\n")], delimiter=separator), [])
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path.name}: {getattr(error, 'strerror', None) or error}", path.parent,
                        "give a text file with a header line") from None
    missing = [column for column in columns if column not in names]
    if missing:
        raise UserError(f"there is no column {', '.join(missing)} among {', '.join(names)[:200]}", path, "name the columns with the --...-col flags")
    places = [names.index(column) for column in columns]

    def cells(line):
        row = next(csv.reader([line.rstrip("\r\n")], delimiter=separator, strict=True))
        return parse([row[place] for place in places])

    return records(path, cells, skip_first=True)


def cells_of(cells, count):
    if len(cells) != count:
        raise ValueError(f"{len(cells)} cells instead of {count}")
    return cells


def raw_id(value):
    """An id as text. Raises ValueError for what cannot be one."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"{value!r:.40} is no id")
    text = str(value).strip()
    if not text or len(text) > 200 or not text.isprintable():
        raise ValueError(f"{text!r:.40} is no id")
    return text


def clean_text(text):
    """One line of plain text: entities and markup resolved, control characters gone, at most MAX_TITLE characters."""
    text = re.sub(r"<[^<>]{0,200}>", " ", html.unescape(str(text)[:20 * MAX_TITLE]))
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return text if len(text) <= MAX_TITLE else text[:MAX_TITLE].rsplit(" ", 1)[0]


def clean_title(text):
    """('The Matrix', 1999) from 'Matrix, The (1999)'; the year is None where the title carries none."""
    year = re.search(r"\((\d{4})\)\s*$", text)
    title = re.sub(r"\s*\(\d{4}\)\s*$", "", text).strip()
    title = re.sub(r"^(.+?), (The|A|An|Il|La|Le|Les|L'|Das|Der|Die|El|Los|Las|Un|Une|Det|Den)(?= \(|$)", r"\2 \1", title)
    return " ".join(title.split()), int(year[1]) if year else None


def era_of(year):
    """The decade as one word, so that it can stand in the profile's slot."""
    words = {1930: "thirties", 1940: "forties", 1950: "fifties", 1960: "sixties", 1970: "seventies", 1980: "eighties", 1990: "nineties",
             2000: "noughties", 2010: "twenty-tens", 2020: "twenty-twenties"}
    return words.get(year // 10 * 10, "twenties")


# ---------------------------------------------------------------- products: Amazon, Yelp, NETE

YELP_PRICES = {"1": "cheap", "2": "moderate", "3": "expensive", "4": "luxurious"}


def parse_product(line):
    """Facts of a product line: strict JSON, or the Python literals of Amazon's 2014 files, which are read without being run."""
    try:
        record = json.loads(line)
    except ValueError:
        record = ast.literal_eval(line.strip())
    return product_facts(record)


def product_facts(record):
    """{id, title, brand, categories, price, level} from an Amazon, Yelp or NETE record; what is missing is None or empty."""
    raw = next((record[key] for key in ("parent_asin", "asin", "business_id", "item", "id") if record.get(key)), None)
    found = record.get("categories") or record.get("category") or []
    if isinstance(found, list) and found and isinstance(found[0], list):  # 2014: paths, each from the root to a leaf
        found = found[0]
    if isinstance(found, str):  # Yelp: one line, all of the same rank
        categories = [clean_text(part).lower() for part in found.split(",")]
    else:
        categories = [clean_text(found[-1]).lower()] if found else []
    details = record.get("attributes")
    level = re.sub(r"\D", "", str(details.get("RestaurantsPriceRange2", ""))) if isinstance(details, dict) else ""
    price = re.search(r"\d[\d,]*\.?\d*", str(record.get("price") or ""))
    return {"id": raw_id(raw), "title": clean_text(record.get("title") or record.get("name") or ""),
            "brand": clean_text(record.get("brand") or record.get("store") or "").lower(), "categories": [name for name in categories if name][:3],
            "price": float(price[0].replace(",", "")) if price else None, "level": YELP_PRICES.get(level)}


def json_objects(path):
    """Facts of the products in a JSON array or in JSON lines."""
    try:
        start = path.read_bytes()[:1]
        if start == b"[":
            content = json.loads(path.read_text(encoding="utf-8"))
            return [record for _, record in parsed(content, product_facts, path)]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path.name}: {error}", path.parent, "use the file as published") from None
    return records(path, parse_product)


def describe_products(facts):
    """(titles, attributes): hobby = brand, else category; background = price level within the category, a missing price its own level."""
    prices = {}
    for record in facts.values():
        if record["price"] is not None:
            prices.setdefault(record["categories"][-1] if record["categories"] else "", []).append(record["price"])
    overall = [price for values in prices.values() for price in values]
    bounds = {name: np.quantile(values if len(values) >= 9 else overall, (1 / 3, 2 / 3)) for name, values in prices.items()}
    titles, attributes = {}, {}
    for raw, record in facts.items():
        category = record["categories"][-1] if record["categories"] else ""
        level = record["level"] or "unpriced"
        if record["price"] is not None and not record["level"]:
            level = ("budget", "midrange", "premium")[int((record["price"] > bounds[category]).sum())]
        titles[raw] = record["title"]
        attributes[raw] = {"hobby": [record["brand"]] if record["brand"] else record["categories"], "background": [level]}
    return titles, attributes


class PlainUnpickler(pickle.Unpickler):
    """Builds lists, dicts, tuples, sets, strings, bytes and numbers; a pickle that names any class or function is refused, not run."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}, which is not plain data")

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to outside data")


# ---------------------------------------------------------------- finding and fetching files

def listing(args, name, what):
    """The files of --data-dir; UserError that says where a data set that may not be passed on is to be had."""
    if args.data_dir is None or not args.data_dir.is_dir():
        raise UserError(f"{name} has to be fetched by hand: {what}", args.data_dir or "--data-dir", "give their folder with --data-dir")
    return sorted(path for path in args.data_dir.iterdir() if path.is_file())


def download(name, needed, md5=None):
    """Folder data/<name> with GroupLens' archive unpacked, fetched unless it is there. A broken download goes on where it stopped.

    md5: of the archive; by default the one published beside it is fetched.
    """
    url, folder = GROUPLENS + f"{name}.zip", Path("data")
    target, part = folder / name, folder / f"{name}.zip.part"
    if (target / needed).exists():
        return target
    by_hand = f"unpack it by hand and give the folder with {needed} as --data-dir"
    print(f"downloading {url} to {target}")
    try:
        if md5 is None:
            with urllib.request.urlopen(url + ".md5", timeout=30) as reply:
                md5 = re.search(r"\b[0-9a-f]{32}\b", reply.read(1000).decode("ascii", "replace"))[0]
        folder.mkdir(exist_ok=True)
        fetch(url, part)
        if hashlib.md5(part.read_bytes()).hexdigest() != md5:
            part.unlink()
            raise UserError("the download's checksum is wrong", url, f"try again, or {by_hand}")
        with zipfile.ZipFile(part) as zipped, tempfile.TemporaryDirectory(dir=folder) as aside:
            zipped.extractall(aside)
            os.replace(Path(aside) / name, target)
        part.unlink()
    except (OSError, zipfile.BadZipFile, TypeError) as error:
        with_reason = getattr(error, "reason", None) or error
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise UserError(f"cannot download {name}: {with_reason}", url, by_hand) from None
    return target


def fetch(url, part):
    """Download into the file `part`, going on behind the bytes that are there; a reply cut short is an OSError."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        reply = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing is left to send
            raise
        return
    with reply, open(part, "ab" if reply.status == 206 else "wb") as file:
        left = int(reply.headers.get("Content-Length", 0))
        with tqdm(total=left, unit="B", unit_scale=True) as bar:
            while chunk := reply.read(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
        if bar.n < left:
            raise OSError(f"the connection broke after {bar.n:,d} of {left:,d} bytes; the same command goes on from there")


# ---------------------------------------------------------------- filter, split

def thin_out(source, args):
    """Indices of the rows kept: --subsample-users, --max-per-user at random, then users and items below --min-interactions out,
    until none is left."""
    users, items = source.users, source.items
    kept = np.arange(len(users)) if source.split is None else np.flatnonzero(source.split >= 0)
    if args.max_per_user:
        shuffled = np.random.default_rng((args.seed, 2)).permutation(kept)
        order = shuffled[np.argsort(users[shuffled], kind="stable")]  # a random order within each user
        first = np.searchsorted(users[order], users[order])           # where the user's rows begin
        kept = np.sort(order[np.arange(len(order)) - first < args.max_per_user])
    if args.subsample_users:
        chosen = np.random.default_rng((args.seed, 3)).permutation(len(source.user_ids))[:args.subsample_users]
        kept = kept[np.isin(users[kept], chosen)]
    while len(kept):
        enough = np.bincount(users[kept])[users[kept]] >= args.min_interactions
        enough &= np.bincount(items[kept])[items[kept]] >= args.min_interactions
        if enough.all():
            break
        kept = kept[enough]
    return kept


def in_order(indices, raw_ids):
    """(raw ids that occur, numbers by value and everything else alphabetically; array that turns an old index into a new one)."""
    found = np.unique(indices)
    order = sorted(found.tolist(), key=lambda index: (0, int(raw_ids[index]), "") if is_number(raw_ids[index]) else (1, 0, raw_ids[index]))
    renumber = np.zeros(len(raw_ids), dtype=np.int32)
    renumber[order] = np.arange(len(order))
    return [raw_ids[index] for index in order], renumber


def is_number(text):
    return text.isascii() and text.isdecimal() and len(text) < 19


def choose_profiles(source, args):
    """The source's profiles, with the critic and with other words for their names in the prompt where the flags say so."""
    profiles = source.profiles + [CRITIC] * args.critic
    if args.critic and source.truth is not None:
        raise UserError("the demo has no planted critics", "--critic", "take a real data set")
    words = [profile["name"] for profile in profiles] if args.profile_words is None else args.profile_words.split(",")
    if len(words) != len(profiles):
        raise UserError(f"{len(words)} words for {len(profiles)} profiles", "--profile-words", "give one for each, separated by commas")
    return [{**profile, "prompt": profile["prompt"].replace(profile["name"], word)} for profile, word in zip(profiles, words)]


def build(source, args):
    """(Dataset, truth or None): labels, filtering, ids and the split, made once for all stages: whatever is trained later sees TRAIN rows alone."""
    kept = thin_out(source, args)
    if len(kept) < 10:
        raise UserError(f"{len(kept)} interactions are left after filtering", f"--min-interactions {args.min_interactions}",
                        "lower it, or give more data")
    (users, new_user), (items, new_item) = in_order(source.users[kept], source.user_ids), in_order(source.items[kept], source.item_ids)

    n = len(kept)
    split = np.empty(n, dtype=np.int32)
    order = np.random.default_rng(args.seed).permutation(n)  # Paper: 8:1:1, at random
    split[order[:int(n * 0.8)]], split[order[int(n * 0.8):int(n * 0.9)]], split[order[int(n * 0.9):]] = TRAIN, VALIDATION, TEST
    if source.split is not None:
        split = source.split[kept]
    interactions = np.stack([new_user[source.users[kept]], new_item[source.items[kept]], source.ratings[kept] > args.positive_above, split],
                            axis=1).astype(np.int32)
    if source.times is not None:
        interactions = interactions[np.argsort(source.times[kept], kind="stable")]
    records = [describe(raw, source) for raw in items]
    untitled = sum(not source.titles.get(raw) for raw in items)
    if untitled:
        print(f"{untitled:,d} of {len(items):,d} items have no title: their brand, category or id stands in")
    dataset = Dataset(interactions, users, records, choose_profiles(source, args), TASK_PROMPT, args.dataset)
    truth = None if source.truth is None else np.array([source.truth[raw] for raw in users], dtype=np.int16)
    return dataset, truth


def describe(raw, source):
    """An entry of items.json; an item without a title is called by its brand or category, else by its id."""
    attributes = source.attributes.get(raw, {})
    return {"id": raw, "title": source.titles.get(raw) or next(iter(attributes.get("hobby", [])), raw), "attributes": attributes}


# ---------------------------------------------------------------- evaluate

def majority_vote_nmi(dataset, truth):
    """Per profile: NMI between the planted value and the value most of a user's liked training items carry.

    It says how much of the truth the data show to somebody who knows every item's true attributes.
    """
    scores, liked = [], [row for row in dataset.rows(TRAIN) if row[2] == 1]
    for m, profile in enumerate(dataset.profiles):
        votes = [Counter() for _ in dataset.users]
        for user, item, _ in liked:
            votes[user].update(dataset.items[item]["attributes"].get(profile["name"], []))
        known = [user for user, vote in enumerate(votes) if vote]
        guess = [votes[user].most_common(1)[0][0] for user in known]
        scores.append(normalized_mutual_info_score(truth[known, m], guess))
    return scores


def report(dataset, facts, truth):
    """Table 1 for this data set beside the paper's, what is in it, and what the LLM will read of three users."""
    print(f"\n{'Table 1':14s}{'interactions':>14s}{'users':>10s}{'items':>10s}{'sparsity':>10s}")
    rows = {f"here: {dataset.name}": (facts["n_interactions"], facts["n_users"], facts["n_items"])}
    rows.update({f"paper: {name}": counts for name, counts in PAPER_TABLE_1.items()})
    for name, (n, users, items) in rows.items():
        print(f"{name:14s}{n:14,d}{users:10,d}{items:10,d}{100 * (1 - n / users / items):9.2f}%")
    if dataset.name in ("amazon", "nete", "yelp"):
        print("the paper does not say which release and category dump, which duplicates and which order of filters it used; counts differ by these")
    users = facts["n_users"]
    print(f"positive rate {facts['positive_rate']:.3f}; rows train/validation/test "
          + "/".join(str(len(dataset.rows(split))) for split in (TRAIN, VALIDATION, TEST)))
    lengths = np.bincount(dataset.rows(TRAIN)[:, 0], minlength=users)
    bounds = [0, 1, 2, 4, 8, 16, 32, 64, 128, 10**9]
    ranges = [f"{low}" if high == low + 1 else f"{low}+" if high == bounds[-1] else f"{low}-{high - 1}" for low, high in zip(bounds, bounds[1:])]
    print("users by training rows: " + ", ".join(f"{name}: {count:,d}" for name, count in zip(ranges, np.histogram(lengths, bounds)[0]) if count))
    for profile in dataset.profiles:
        counted = Counter(value for item in dataset.items for value in item["attributes"].get(profile["name"], []))
        if counted:
            top = ", ".join(f"{value} {count:,d}" for value, count in counted.most_common(6))
            print(f"items by {profile['name']} ({len(counted):,d} values): {top}")
    liked = dataset.rows(TRAIN)
    liked = liked[liked[:, 2] == 1]
    prompt = "".join(f"{profile['prompt']} <theta{m}>" for m, profile in enumerate(dataset.profiles, 1)) + dataset.task_prompt
    for user in np.unique(liked[:, 0])[:3]:
        titles = "".join(f" {dataset.items[item]['title']};" for item in liked[liked[:, 0] == user, 1][-6:])
        print(f"prompt of user {dataset.users[user]}: {prompt}{titles}".replace("\n", " "))
    if truth is not None:
        print("majority vote over liked true attributes, NMI with the planted profile: "
              + ", ".join(f"{p['name']} {nmi:.2f}" for p, nmi in zip(dataset.profiles, majority_vote_nmi(dataset, truth))))


# ---------------------------------------------------------------- save

def save(run, dataset, truth, args):
    """Write all artifacts; dataset.json comes last, so that its fingerprint vouches for the others. Returns its content."""
    n, users, items = len(dataset.interactions), len(dataset.users), len(dataset.items)
    facts = {"dataset": dataset.name, "n_users": users, "n_items": items, "n_interactions": n, "sparsity": 1 - n / users / items,
             "positive_rate": float(dataset.interactions[:, 2].mean()), "profiles": dataset.profiles, "task_prompt": dataset.task_prompt,
             "fingerprint": dataset.fingerprint(), "truth_fingerprint": None if truth is None else fingerprint(truth),
             **{key: getattr(args, key) for key in ("seed", "min_interactions", "positive_above", "max_per_user", "subsample_users", "critic",
                                                       "signal")}}
    (run / "dataset.json").unlink(missing_ok=True)
    save_npy(run / "interactions.npy", dataset.interactions)
    save_json(run / "users.json", dataset.users)
    save_json(run / "items.json", dataset.items)
    if truth is None:
        (run / "truth.npy").unlink(missing_ok=True)
    else:
        save_npy(run / "truth.npy", truth)
    save_json(run / "dataset.json", facts)
    return facts


# ---------------------------------------------------------------- main

def main():
    args = parse_arguments()
    announce("01 prepare data", args, {"demo": "nothing, the demo is made here", "csv": args.ratings_file}.get(
        args.dataset, args.data_dir or f"data/{args.dataset}"))
    source = LOADERS[args.dataset](args)
    values, counts = np.unique(source.ratings, return_counts=True)
    print("ratings in the source: " + ", ".join(f"{value:g}: {count:,d}" for value, count in list(zip(values, counts))[:12]))
    dataset, truth = build(source, args)
    with one_run_at_a_time(args.run):
        facts = save(args.run, dataset, truth, args)
    report(dataset, facts, truth)
    print(f"\nwrote dataset.json interactions.npy users.json items.json{'' if truth is None else ' truth.npy'} to {args.run}")
    print(f"next: python 02_infer_profiles.py --run {args.run}")


if __name__ == "__main__":
    guarded(main)
