"""Stage 01: turn a rating source into the arrays the other stages read. Paper: sections 3.1 and 3.2.

Labels ratings above 3 as liked, drops users and items with few interactions and makes the one random 8:1:1
split that all stages obey. An item gets a title and, for each latent profile, words that could name it: a
film's genre and era, a product's brand and price.

Writes to --run (U users, I items, N interactions, M profiles):
    dataset.json      facts, prompts, words of each profile, fingerprints of the rest
    interactions.npy  int32 (N, 4): user, item, label, split (SPLITS); in time order if known
    users.json        (U) raw user ids;  items.json (I) {id, title, attributes}
    truth.npy         int16 (U, M) the demo's planted profiles, for evaluation

Run:
    python 01_prepare_data.py  # the demo, 1 s
"""

import argparse
import ast
import csv
import gzip
import html
import io
import json
import math
import pickle
import re
import tempfile
import urllib.request
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import (
    COLD, SUPPORT, TRAIN, Dataset, Parser, UserError, announce, at_least, fingerprint, guarded, progress,
    save_json, save_npy, together)

# -------- settings

# Paper: section 2.3, "This user's hobby is <theta_1>, and his background is <theta_2>. What is the user's
# interaction history?" DEVIATION(12): each prompt is worded so that the values of its data set complete the
# sentence, for an LLM that has never seen the data. codes: stage 03's K_m. likes: the share of titles that
# such a person likes, for the tiny LM.
HOBBY = {"name": "hobby", "prompt": "This user's hobby is", "codes": 4}
BACKGROUND = {"name": "background", "prompt": ", and this user's background is", "codes": 3}
PASTIME = {**HOBBY, "prompt": "This user's favorite hobby is"}
BRAND = {**HOBBY, "prompt": "This user's favorite brand is"}
PLACE = {**HOBBY, "prompt": "This user's favorite kind of place is"}
GENRE = {**HOBBY, "prompt": "This user's favorite movie genre is"}
PRICE = {**BACKGROUND, "prompt": ". This user only buys products that are"}
PLACE_PRICE = {**BACKGROUND, "prompt": ". This user only goes to places that are"}
ERA = {**BACKGROUND, "prompt": ", and the favorite decade is the"}
CRITIC = {"name": "critic", "prompt": ", and as a critic this user is", "codes": 8,
          "likes": {"harsh": 0.2, "balanced": 0.55, "generous": 0.85}}
BOUGHT = ". Products that this user bought:"  # this and the next three: task prompts
WATCHED = ".\nMovies that this user watched:"
VISITED = ".\nPlaces that this user visited:"
CHOSE = ".\nThings that this user chose:"

SPLITS = ("train", "validation", "test", "support", "cold")
GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
MAX_LINE = 2**22  # bytes; a longer line is no record
MAX_BAD = 0.01  # share of bad lines to skip
MAX_TITLE = 200  # characters the LLM reads
MAX_WORDS = 256  # of a profile, the most frequent: they span the space in which stage 02 looks for theta


def parse_arguments():
    parser = Parser(__doc__, device=False)
    add = parser.add_argument
    add("--dataset", choices=LOADERS, default="demo", help="what to read")
    add("--data-dir", type=Path, help="its files; else data/<dataset>, MovieLens downloaded")
    add("--min-interactions", type=at_least(1), default=4, help="fewest of a user or item (paper: 4)")
    add("--positive-above", type=at_least(0, float), default=3.0, help="higher is liked (paper: 3)")
    add("--max-per-user", type=at_least(1), help="keep so many random rows of a user")
    add("--subsample-users", type=at_least(1), help="keep so many random users")
    add("--cold-users", type=at_least(0, float, 1), default=0.0, help="share of users new to recommenders")
    add("--critic", action="store_true", help="a third profile, for rated histories")
    add("--hobby-words", type=word_list, help="a,b,c: what could name it (default: the items' values)")
    add("--background-words", type=word_list, help="the same for the background")
    add("--signal", type=at_least(0, float, 100), default=1.0, help="demo: strength of the profiles; 0: none")
    add = parser.add_argument_group("csv: comma- or tab-separated, with a header").add_argument
    add("--ratings-file", type=Path, help="a row an interaction")
    add("--items-file", type=Path, help="a row an item")
    columns = {"user": "user_id", "item": "item_id", "rating": "rating"}
    for name in [*columns, "time", "title", "hobby", "background", "item-id"]:
        add(f"--{name}-col", default=columns.get(name), help=f"column of the {name}")
    add("--value-sep", default="|", help="between values")
    args = parser.parse_args()
    if not args.value_sep or (args.dataset == "csv") != bool(args.ratings_file):
        parser.error("csv, --ratings-file and --value-sep need each other")
    if args.dataset == "demo" and args.data_dir:
        parser.error("--data-dir needs --dataset")
    return args


def word_list(text):
    """argparse type: words separated by commas, each once."""
    words = [" ".join(word.split()) for word in text.split(",")]
    if len(words) < 2 or not all(words) or len(set(words)) < len(words) or not text.isprintable():
        raise argparse.ArgumentTypeError("give two different words or more, separated by commas")
    return words


# -------- data

@dataclass
class Source:
    """A data set as its files hold it, N rows in their order."""

    user_ids: list  # raw ids by index
    item_ids: list
    users: np.ndarray  # (N,) indices
    items: np.ndarray  # (N,) indices
    ratings: np.ndarray  # (N,)
    times: np.ndarray | None
    titles: dict  # raw item id -> title
    attributes: dict  # raw item id -> {profile name: [values]}
    profiles: tuple
    task_prompt: str
    truth: dict | None = None  # demo: raw user id -> index of each profile's planted value


def rating(user, item, value, time=0, low=1.0, high=5.0):
    """(user, item, rating, time) of a row. Raises ValueError or TypeError for what cannot be one."""
    value, time = float(value), float(time or 0)
    if not (low <= value <= high and math.isfinite(value) and math.isfinite(time)):
        raise ValueError(f"rating {value:g} is not within {low:g} to {high:g}, or time infinite")
    return raw_id(user), raw_id(item), value, time


def collect(rows, profiles, task_prompt):
    """Source without titles of (user, item, rating, time) rows; of a repeated pair the last stays."""
    users, items = {}, {}  # raw id -> index
    indexed = ((users.setdefault(user, len(users)), items.setdefault(item, len(items)), *rest)
               for user, item, *rest in rows)
    found = np.fromiter(indexed, [("user", "i8"), ("item", "i4"), ("rating", "f4"), ("time", "f8")])
    pairs = found["user"] * len(items) + found["item"]
    order = np.lexsort((found["time"], pairs))  # stable: rows of one time stay in source order
    last = np.diff(pairs[order], append=-1) != 0
    kept = found[np.sort(order[last])]
    if len(kept) < len(found):
        print(f"{len(found) - len(kept):,d} repeated user-item pairs: the last stays")
    return Source(list(users), list(items), kept["user"], kept["item"], kept["rating"],
                  kept["time"] if kept["time"].any() else None, {}, {}, profiles, task_prompt)


DEMO_HOBBIES = dict(
    music="Guitar Piano Violin Drum Trumpet Microphone Ukulele Songbook Cello Flute Amplifier Banjo".split(),
    fishing="Rod Reel Lure Net Waders Bait Float Hook Kayak Tackle Bobber Sinker".split(),
    cooking="Pan Knife Cookbook Mixer Oven Wok Blender Apron Teapot Grill Whisk Ladle".split(),
    cycling="Bike Helmet Saddle Pedal Jersey Pump Chain Tyre Gloves Bell Fork Spokes".split())
DEMO_BACKGROUNDS = dict(
    cheap="Budget Basic Starter Compact Secondhand Mini".split(),
    ordinary="Classic Everyday Reliable Standard Practical Sturdy".split(),
    luxurious="Premium Deluxe Handmade Signature Gold Exclusive".split())
EXPOSURE = (0.95, 0.6)  # log weight, when items are met, of what fits the user's hobby, background
TASTE = (2.8, 2.2)  # log odds of liking it
GENEROSITY = (np.array([0.15, -0.15, 0.06, -0.06]), np.array([-0.15, 0.0, 0.15]))  # of types, to all


def load_demo(args):
    """A world of known profiles: 2,000 users of 4 hobbies x 3 backgrounds, 400 items, 14 ratings each.

    Items whose category fits a user's hobby, or tier his background, are met and liked more.
    """
    rng = np.random.default_rng((args.seed, 1))
    n_users, n_items = 2000, 400
    hobby, background = rng.integers(4, size=(n_users, 1)), rng.integers(3, size=(n_users, 1))
    kinds = rng.permutation(np.arange(n_items) % 12)
    category, tier = divmod(kinds, 3)  # Shape: (I,)
    names = [rng.permutation([f"{adjective} {noun}" for adjective in adjectives for noun in nouns]).tolist()
             for nouns in DEMO_HOBBIES.values() for adjectives in DEMO_BACKGROUNDS.values()]
    titles = [names[kind].pop() for kind in kinds]

    fits_hobby, fits_background = hobby == category, background == tier  # Shape: (U, I)
    popularity, quality = rng.normal(0, 0.5, n_items), rng.normal(0, 0.3, n_items)
    generosity = rng.normal(0, 0.3, (n_users, 1))
    generosity += args.signal * (GENEROSITY[0][hobby] + GENEROSITY[1][background])
    exposure = np.exp(popularity + args.signal * (EXPOSURE[0] * fits_hobby + EXPOSURE[1] * fits_background))
    fit = TASTE[0] * (fits_hobby - 1 / 4) + TASTE[1] * (fits_background - 1 / 3)
    taste = quality + generosity + args.signal * fit
    liked = rng.random(taste.shape) < 1 / (1 + np.exp(-taste))

    met = [rng.choice(n_items, size=6 + rng.poisson(8), replace=False, p=weights / weights.sum())
           for weights in exposure]
    users, items = np.repeat(np.arange(n_users), list(map(len, met))), np.concatenate(met)  # Shape: (N,)
    ratings = np.where(liked[users, items], rng.integers(4, 6, len(users)), rng.integers(1, 4, len(users)))
    raw_users = [f"u{user:04d}" for user in range(n_users)]
    raw_items = [f"i{item:03d}" for item in range(n_items)]
    values = [{"hobby": [name], "background": [level]} for name in DEMO_HOBBIES for level in DEMO_BACKGROUNDS]
    return Source(
        raw_users, raw_items, users, items, ratings, None, dict(zip(raw_items, titles)),
        {raw: values[kind] for raw, kind in zip(raw_items, kinds)}, (HOBBY, PRICE), BOUGHT,
        truth=dict(zip(raw_users, np.hstack([hobby, background]))))


def load_movielens(args):
    """MovieLens-100K (u.*), -1M (*.dat) or any release with ratings.csv and movies.csv."""
    needed = "u.data" if args.dataset == "ml-100k" else "ratings.dat"
    folder = args.data_dir or download(args.dataset, needed)
    if args.dataset == "ml-100k":
        genres = [name for name, _ in cells(folder / "u.genre", "|", 2)]
        movies = [(raw, title, "|".join(genre for genre, flag in zip(genres, flags) if flag == "1"))
                  for raw, title, _, _, _, *flags in cells(folder / "u.item", "|", 5 + len(genres))]
        rows = cells(folder / needed, "\t", 4, rating)
    elif (folder / "ratings.csv").exists():
        movies = table(folder / "movies.csv", ["movieId", "title", "genres"])
        rows = table(folder / "ratings.csv", ["userId", "movieId", "rating", "timestamp"],
                     lambda *row: rating(*row, low=0.5))
    else:
        movies = cells(folder / "movies.dat", "::", 3)
        rows = cells(folder / needed, "::", 4, rating)
    source = collect(rows, (GENRE, ERA), WATCHED)
    for raw, title, genres in movies:
        source.titles[raw], year = clean_title(clean_text(title))
        hobby = [name for name in genres.lower().split("|") if name not in NO_GENRE]
        source.attributes[raw] = {"hobby": hobby, "background": [era_of(year)] if year else []}
    return source


NO_GENRE = ("unknown", "(no genres listed)", "")
RELEASES = {  # what to fetch, patterns of the reviews and the products file
    "amazon": ("reviews and meta_*.json.gz of a category from amazon-reviews-2023.github.io",
               r"(?!meta_).*\.jsonl?(\.gz)?", r"meta_.*\.jsonl?(\.gz)?"),
    "yelp": ("*review.json and *business.json from www.yelp.com/dataset",
             r".*review\.json(\.gz)?", r".*business\.json(\.gz)?"),
    "nete": ("reviews.pickle, item.json from github.com/lileipisces/NETE", r"reviews\.pickle", r"item\.json"),
}


def load_release(args):
    """Amazon (2014, 2018, 2023), Yelp's academic files, or the NETE / PEPLER release."""
    folder = args.data_dir or Path("data", args.dataset)
    what, *patterns = RELEASES[args.dataset]
    reviews, products = ([path for path in folder.glob("*")
                          if path.is_file() and re.fullmatch(form, path.name)] for form in patterns)
    if len(reviews) != 1 or len(products) != 1:
        raise UserError(f"{len(reviews)} files of reviews and {len(products)} of products, not one each",
                        folder, f"fetch {what}, or change --data-dir")
    wording = ((PLACE, PLACE_PRICE), VISITED) if args.dataset == "yelp" else ((BRAND, PRICE), BOUGHT)
    source = collect(good(records(reviews[0]), parse_review, reviews[0]), *wording)
    known, found = set(source.item_ids), good(records(products[0]), parse_product, products[0])
    facts = {fact["id"]: fact for fact in found if fact["id"] in known}
    source.titles, source.attributes = describe_products(facts)
    return source


def load_csv(args):
    """Any ratings file with an optional items file; columns by flags."""
    wanted = [args.user_col, args.item_col, args.rating_col] + [args.time_col] * bool(args.time_col)
    rows = table(args.ratings_file, wanted, lambda *row: rating(*row, low=-math.inf, high=math.inf))
    has_background = bool(args.background_col or args.background_words)
    source = collect(rows, (PASTIME,) + (BACKGROUND,) * has_background, CHOSE)
    columns = {name: column for name in ("title", "hobby", "background")
               if (column := getattr(args, f"{name}_col"))}
    wanted = [args.items_file and args.item_id_col or args.item_col, *columns.values()]
    items = table(args.items_file or args.ratings_file, wanted,
                  lambda raw, *cells: (raw_id(raw), *map(clean_text, cells)))
    for raw, *texts in items if columns else ():
        found = dict(zip(columns, texts))
        source.titles[raw] = found.pop("title", None)
        source.attributes[raw] = {
            name: [value.strip().lower() for value in text.split(args.value_sep) if value.strip()]
            for name, text in found.items()}
    return source


LOADERS = {"demo": load_demo, "ml-100k": load_movielens, "ml-1m": load_movielens,
           **dict.fromkeys(sorted(RELEASES), load_release), "csv": load_csv}


# -------- files that may be broken

def lines(path):
    """Non-empty lines of a file or .gz, as bytes."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            while line := file.readline(MAX_LINE):
                if len(line) == MAX_LINE:
                    raise UserError(f"a line of {path.name} has no end", path, "give one record a line")
                if not line.isspace():
                    yield line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path.name}: {error}", path, "fetch it or mend the path") from None


def good(records, parse, path):
    """parse(record) of every good record; a few bad ones are skipped, the first is shown."""
    count, bad, example = 0, 0, None
    for count, record in enumerate(progress(records, path.name, "lines"), 1):
        try:
            yield parse(record)
        except Exception as error:
            bad += 1
            example = example or f"record {count}: {error!r:.150}"
    if bad > MAX_BAD * count:
        raise UserError(f"{bad:,d} of {count:,d} lines are not what they should be, the first is {example}",
                        path, "check --dataset and columns")
    if bad:
        print(f"{path.name}: skipped {bad:,d} bad of {count:,d} lines, the first is {example}")


def exactly(count, cells):
    if len(cells) != count:
        raise ValueError(f"{len(cells)} cells, not {count}")
    return cells


def cells(path, separator, count, parse=lambda *cells: cells):
    """parse(*cells) of every line; `count` cells a line, ISO-8859-1 (MovieLens)."""
    def parse_line(line):
        return parse(*exactly(count, line.decode("latin-1").rstrip("\r\n").split(separator)))

    return good(lines(path), parse_line, path)


def table(path, columns, parse=lambda *cells: cells):
    """parse(*cells of these columns) of every line; comma- or tab-separated under a header."""
    rows = lines(path)
    try:
        header = next(rows, b"").decode("utf-8-sig").rstrip("\r\n")
        separator = "\t" if "\t" in header else ","
        names = next(csv.reader([header], delimiter=separator))
    except (UnicodeError, csv.Error) as error:
        raise UserError(f"cannot read {path.name}: {error}", path, "give a header line") from None
    if missing := [column for column in columns if column not in names]:
        raise UserError(f"there is no column {', '.join(missing)} among {', '.join(names)[:200]}", path,
                        "use the --...-col flags")
    places = [names.index(column) for column in columns]

    def parse_line(line):
        row = next(csv.reader([line.decode().rstrip("\r\n")], delimiter=separator, strict=True))
        return parse(*[exactly(len(names), row)[place] for place in places])

    return good(rows, parse_line, path)


def raw_id(value):
    """An id as text. Raises ValueError for what cannot be one."""
    text = str(value).strip()
    if type(value) not in (str, int) or not 0 < len(text) <= 200 or not text.isprintable():
        raise ValueError(f"{value!r:.40} is no id")
    return text


def clean_text(text):
    """One line of plain text, at most MAX_TITLE long: no entities, markup or control characters."""
    text = re.sub(r"<[^<>]{0,200}>", " ", html.unescape(str(text)[:20 * MAX_TITLE]))
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return text if len(text) <= MAX_TITLE else text[:MAX_TITLE].rsplit(" ", 1)[0]


ARTICLES = "The|A|An|Il|La|Le|Les|L'|Das|Der|Die|El|Los|Las|Un|Une|Det|Den"


def clean_title(text):
    """('The Matrix', 1999) from 'Matrix, The (1999)'; None in the place of no year."""
    title, year = re.fullmatch(r"(.*?)\s*(?:\((\d{4})\))?\s*", text).groups()
    title = re.sub(rf"^(.+?), ({ARTICLES})(?= \(|$)", r"\2 \1", title)
    return " ".join(title.split()), int(year) if year else None


def era_of(year):
    """The decade as one word, to stand in the profile's slot."""
    words = ("thirties forties fifties sixties seventies eighties nineties noughties "
             "twenty-tens twenty-twenties").split()  # from 1930 on
    return words[year // 10 - 193] if 1930 <= year < 2030 else "twenties"


# -------- products: Amazon, Yelp, NETE

YELP_PRICES = {"1": "cheap", "2": "moderate", "3": "expensive", "4": "luxurious"}


class PlainUnpickler(pickle.Unpickler):
    """Builds plain data; a pickle that names a class or function is refused, not run."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}")


def records(path):
    """Records of a pickled list, a JSON array or, unparsed, of a file of one a line."""
    try:
        if path.suffix == ".pickle":
            found = PlainUnpickler(path.open("rb")).load()
        elif path.suffix == ".json" and path.open("rb").read(1) == b"[":
            found = json.loads(path.read_text("utf-8"))
        else:
            return lines(path)
        wrong = f"holds a {type(found).__name__}, not a list"
    except Exception as error:
        found, wrong = None, f"cannot be read: {error}"
    if not isinstance(found, list):
        raise UserError(f"{path.name} {wrong}", path.parent, "use the file as published")
    return found


def parse_record(line):
    """A record from its line: JSON or, Amazon 2014, a Python literal, which is not run."""
    try:
        return json.loads(line) if isinstance(line, bytes) else line
    except ValueError:
        return ast.literal_eval(line.decode().strip())


def first(record, *keys):
    """The first of these entries that is not empty, else ''."""
    return next((record[key] for key in keys if record.get(key)), "")


def parse_review(line):
    """rating() of a review in any release's spelling."""
    record = parse_record(line)
    date = re.sub(r"\D", "", str(first(record, "date")))[:14]  # Yelp: year to second
    return rating(
        first(record, "reviewerID", "user_id", "user"),
        first(record, "parent_asin", "asin", "business_id", "item"),
        first(record, "overall", "rating", "stars"), first(record, "unixReviewTime", "timestamp") or date)


def parse_product(line):
    """{id, title, brand, categories, price, level}, None or empty where missing."""
    record = parse_record(line)
    found = first(record, "categories", "category") or [""]
    if isinstance(found[0], list):  # 2014: paths from the root to a leaf
        found = found[0]
    found = found.split(",") if isinstance(found, str) else found[-1:]  # Yelp: one line, of equal rank
    details = record.get("attributes")
    details = details.get("RestaurantsPriceRange2") if isinstance(details, dict) else None
    price = re.search(r"\d[\d,]*\.?\d*", str(first(record, "price")))
    return {
        "id": raw_id(first(record, "parent_asin", "asin", "business_id", "item", "id")),
        "title": clean_text(first(record, "title", "name")),
        "brand": clean_text(first(record, "brand", "store")).lower(),
        "categories": [name for part in found if (name := clean_text(part).lower())][:3],
        "price": float(price[0].replace(",", "")) if price else None,
        "level": YELP_PRICES.get(re.sub(r"\D", "", str(details)))}


def describe_products(facts):
    """(titles, attributes) of {id: product}: brand, else categories; the third of their prices, if any."""
    prices, titles, attributes = {}, {}, {}
    for fact in facts.values():
        if fact["price"] is not None:
            prices.setdefault(tuple(fact["categories"][-1:]), []).append(fact["price"])
    everything = [price for values in prices.values() for price in values]
    bounds = {name: np.quantile(values if len(values) >= 9 else everything, (1 / 3, 2 / 3))
              for name, values in prices.items()}
    for raw, fact in facts.items():
        level = fact["level"]
        if fact["price"] is not None and not fact["level"]:
            above = fact["price"] > bounds[tuple(fact["categories"][-1:])]
            level = ("cheap", "ordinary", "luxurious")[above.sum()]
        hobby = [fact["brand"]] if fact["brand"] else fact["categories"]
        titles[raw] = fact["title"]
        attributes[raw] = {"hobby": hobby, "background": [level] if level else []}
    return titles, attributes


def download(name, needed):
    """data/<name> of GroupLens' archive, fetched unless it is there."""
    url, target = f"{GROUPLENS}{name}.zip", Path("data", name)
    if (target / needed).exists():
        return target
    print(f"downloading {url} to {target}")
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            archive = zipfile.ZipFile(io.BytesIO(reply.read()))
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as aside:
            archive.extractall(aside)  # checks each file's CRC
            Path(aside, name).replace(target)
    except Exception as error:  # network, archive, disk
        raise UserError(f"cannot download {name}: {error}", url,
                        f"give the folder of {needed} as --data-dir") from None
    return target


# -------- filter, split

def thin_out(source, args):
    """Indices of the rows kept: random ones by flags; then users and items with too few go until none has."""
    users, items = source.users, source.items
    kept = np.arange(len(users))
    if args.max_per_user:
        shuffled = np.random.default_rng((args.seed, 2)).permutation(kept)
        order = shuffled[np.argsort(users[shuffled], kind="stable")]  # random within each user
        start = np.searchsorted(users[order], users[order])  # where his rows begin
        kept = np.sort(order[np.arange(len(order)) - start < args.max_per_user])
    if args.subsample_users:
        shuffled = np.random.default_rng((args.seed, 3)).permutation(len(source.user_ids))
        kept = kept[np.isin(users[kept], shuffled[:args.subsample_users])]
    enough = np.zeros(1)
    while not enough.all():
        enough = np.bincount(users[kept])[users[kept]] >= args.min_interactions
        enough &= np.bincount(items[kept])[items[kept]] >= args.min_interactions
        kept = kept[enough]
    return kept


def in_order(indices, raw_ids):
    """(raw ids that occur, each row's index among them). Numbers first, by value, then the alphabet."""
    def key(index):
        text = raw_ids[index]
        number = text.isascii() and text.isdecimal()
        return not number, text.zfill(200) if number else text

    order = sorted(np.unique(indices).tolist(), key=key)
    renumber = np.zeros(len(raw_ids), np.int32)
    renumber[order] = np.arange(len(order))
    return [raw_ids[index] for index in order], renumber[indices]


def build(source, args):
    """(Dataset, truth or None): filter, order of ids, labels and the one split."""
    kept = thin_out(source, args)
    n = len(kept)
    if n < 10:
        raise UserError(f"{n} interactions are left", "--min-interactions", "lower it or give more data")
    users, user_rows = in_order(source.users[kept], source.user_ids)
    items, item_rows = in_order(source.items[kept], source.item_ids)
    split = np.empty(n, np.int32)
    order = np.random.default_rng(args.seed).permutation(n)
    split[order] = np.digitize(np.arange(n), [int(n * 0.8), int(n * 0.9)])  # Paper: 8:1:1, here 0, 1, 2
    shuffled = np.random.default_rng((args.seed, 4)).permutation(len(users))
    cold = np.isin(user_rows, shuffled[:round(args.cold_users * len(users))])
    split[cold] = np.where(split[cold] == TRAIN, SUPPORT, COLD)
    labels = source.ratings[kept] > args.positive_above
    interactions = np.stack([user_rows, item_rows, labels, split], axis=1)
    if source.times is not None:
        interactions = interactions[np.argsort(source.times[kept], kind="stable")]
    described, untitled = [], 0
    for raw in items:
        attributes, title = source.attributes.get(raw, {}), source.titles.get(raw)
        untitled += not title
        title = title or [*attributes.get("hobby", []), raw][0]
        described.append({"id": raw, "title": title, "attributes": attributes})
    if untitled:
        print(f"{untitled:,d} of {len(items):,d} items have no title: brand, category or id stands in")
    profiles = [*source.profiles] + [CRITIC] * args.critic
    met = np.unique(interactions[interactions[:, 3] == TRAIN, 1])
    profiles = [profile | {"words": words_of(profile, [described[item] for item in met], args)}
                for profile in profiles]
    truth = source.truth and np.array([source.truth[raw] for raw in users], np.int16)
    return Dataset(interactions, users, described, profiles, source.task_prompt, args.dataset), truth


def words_of(profile, items, args):
    """{word: items that have it}, the most frequent first: what could name this profile's values.

    items: those of training rows. Words that were given by flag, and a critic's, count as equally frequent.
    """
    given = getattr(args, f"{profile['name']}_words", None) or list(profile.get("likes", ()))
    if given:
        return dict.fromkeys(given, 1)
    values = [value for item in items for value in set(item["attributes"].get(profile["name"], []))]
    counts = Counter(value for value in values if value != "unknown")  # in feature_bank.csv: no history
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[:MAX_WORDS]
    return {word: counts[word] for word in frequent}


# -------- evaluate

def show(dataset, facts):
    """The paper's Table 1; splits; what the LLM reads of three users."""
    print("\n{dataset}: {n_interactions:,d} interactions, {n_users:,d} users, {n_items:,d} items, sparsity "
          "{sparsity:.2%}, positive rate {positive_rate:.3f}".format(**facts))
    for split, name in enumerate(SPLITS[:5 if "cold_users" in facts else 3]):
        labels = dataset.rows(split)[:, 2]
        print(f"{name}: {len(labels):,d} rows, {labels.sum():,d} liked")
        if len(np.unique(labels)) < 2:
            print(f"WARNING: all labels of the {name} split are equal: try more data or --positive-above")
    prompt = "".join(f"{profile['prompt']} <theta{m}>" for m, profile in enumerate(dataset.profiles, 1))
    prompt += dataset.task_prompt
    rows = dataset.rows(TRAIN)
    for user in np.unique(rows[:, 0])[:3]:
        items = rows[(rows[:, 0] == user) & (rows[:, 2] == 1), 1][-6:]
        titles = "".join(f" {dataset.items[item]['title']};" for item in items)
        print(f"prompt of user {dataset.users[user]}: {prompt}{titles}".replace("\n", " "))


# -------- save

def save(run, dataset, truth, args):
    """Write all artifacts and return the facts."""
    n, users, items = len(dataset.interactions), len(dataset.users), len(dataset.items)
    settings = "seed min_interactions positive_above max_per_user subsample_users critic signal".split()
    settings += ["cold_users"] * bool(args.cold_users)
    facts = {
        "dataset": dataset.name, "n_users": users, "n_items": items, "n_interactions": n,
        "sparsity": 1 - n / users / items, "positive_rate": dataset.interactions[:, 2].mean().item(),
        "profiles": dataset.profiles, "task_prompt": dataset.task_prompt,
        "fingerprint": dataset.fingerprint(),
        "truth_fingerprint": None if truth is None else fingerprint(truth),
        **{key: getattr(args, key) for key in settings}}
    with together(run) as aside:
        save_npy(aside / "interactions.npy", dataset.interactions)
        save_json(aside / "users.json", dataset.users)
        save_json(aside / "items.json", dataset.items)
        if truth is not None:
            save_npy(aside / "truth.npy", truth)
        save_json(aside / "dataset.json", facts)
    if truth is None:
        (run / "truth.npy").unlink(missing_ok=True)  # another's
    return facts


# -------- main

def main():
    args = parse_arguments()
    announce("01 prepare data", args, args.ratings_file or args.data_dir or f"{args.dataset}'s own files")
    dataset, truth = build(LOADERS[args.dataset](args), args)
    show(dataset, save(args.run, dataset, truth, args))
    print(f"\nwrote dataset.json interactions.npy users.json items.json to {args.run}\n"
          f"next: python 02_infer_profiles.py --run {args.run}")


if __name__ == "__main__":
    guarded(main)
