"""Stage 01: turn a rating source into the arrays the other stages read. Paper: sections 3.1 and 3.2.

Computes binary labels (rating > 3), removes users and items with few interactions until none is left, and makes the one
random 8:1:1 split that every later stage obeys. Each item gets a title and, for each latent profile, the words that could
name it (MovieLens: hobby = genre, background = era of the film).

Writes to --run (U users, I items, N interactions, M profiles):
    dataset.json       facts, prompts and the fingerprint of the rest
    interactions.npy   int32 (N, 4): user, item, label, split (0 train, 1 validation, 2 test), in time order
    users.json         (U) raw user ids          items.json  (I) {id, title, attributes}
    truth.npy          int16 (U, M) planted profiles, demo only, read by evaluation alone

Run:
    python 01_prepare_data.py                                                            # the demo world, 1 s
    python 01_prepare_data.py --dataset ml-100k --data-dir PATH --run runs/ml-100k       # MovieLens-100K, 2 s
"""

import hashlib
import os
import re
import tempfile
import urllib.request
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from sklearn.metrics import normalized_mutual_info_score
from tqdm import tqdm

from common import (TEST, TRAIN, VALIDATION, Dataset, Parser, UserError, announce, at_least, atomic, fingerprint, guarded,
                    one_run_at_a_time, save_json, save_npy)

# ---------------------------------------------------------------- settings

# Paper: section 2.3 names x^1, x^2 and the task. Note: the prompt of a profile may be worded to suit its values.
HOBBY = {"name": "hobby", "prompt": "This user's hobby is", "codes": 4}
BACKGROUND = {"name": "background", "prompt": ", and his background is", "codes": 3}
CRITIC = {"name": "critic", "prompt": ", and as a critic he is", "codes": 3,  # says how much of what he meets he likes
          "likes": {"harsh": 0.2, "balanced": 0.55, "generous": 0.85}}
ERA = {"name": "background", "prompt": ", and his background is the", "codes": 3}
TASK_PROMPT = ".\nWhat is the user's interaction history?"

PAPER_TABLE_1 = {"Clothing": (179_223, 38_764, 22_919), "Movies": (441_783, 7_506, 7_360), "Games": (19_927, 2_490, 8_912),
                 "Yelp": (1_293_247, 27_147, 20_266)}
ML_100K_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
ML_100K_MD5 = "0e33842e24a9c977be4e0107933c0723"


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
    parser.add_argument("--signal", type=at_least(0, float), default=1.0,
                        help="demo: strength of the planted profiles; 0 is the negative control")
    return parser.parse_args()


# ---------------------------------------------------------------- data

@dataclass
class Source:
    """A data set as its files hold it. Rows are in source order; times may be None."""

    users: np.ndarray    # (N,) raw ids
    items: np.ndarray    # (N,) raw ids
    ratings: np.ndarray  # (N,) float
    times: np.ndarray | None
    titles: dict         # raw item id -> title
    attributes: dict     # raw item id -> {profile name: [values]}
    profiles: list = field(default_factory=lambda: [HOBBY, BACKGROUND])
    truth: dict | None = None  # demo: raw user id -> planted value index of each profile


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
EXPOSURE = (0.95, 0.6)  # log odds of meeting an item that fits the user's hobby, background
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
        users=np.array(raw_users)[users], items=np.array(raw_items)[items], ratings=ratings.astype(float), times=None,
        titles=dict(zip(raw_items, titles)),
        attributes={raw: {"hobby": [hobbies[kind // 3]], "background": [backgrounds[kind % 3]]} for raw, kind in zip(raw_items, kinds)},
        truth={raw: row for raw, row in zip(raw_users, truth)})


def load_ml_100k(args):
    """MovieLens-100K: u.data (user, item, rating, time) and u.item (ISO-8859-1; title with year, 19 genre flags)."""
    folder = args.data_dir or download_ml_100k(Path("data"))
    genres = [line.rsplit("|", 1)[0].lower() for line in read_lines(folder / "u.genre", "latin-1") if "|" in line]
    titles, attributes = {}, {}
    for number, line in enumerate(read_lines(folder / "u.item", "latin-1"), 1):
        cells = line.split("|")
        if len(cells) != 5 + len(genres):
            raise UserError(f"{len(cells)} cells instead of {5 + len(genres)}", f"{folder / 'u.item'} line {number}",
                            "use the files as published")
        title, year = clean_title(cells[1])
        titles[cells[0]] = title
        attributes[cells[0]] = {"hobby": [genre for genre, flag in zip(genres, cells[5:]) if flag == "1" and genre != "unknown"],
                                "background": [era_of(year)] if year else []}
    rows = [line.split("\t") for line in read_lines(folder / "u.data", "latin-1")]
    try:
        users, items, ratings, times = zip(*rows)
        return Source(np.array(users), np.array(items), np.array(ratings, dtype=float), np.array(times, dtype=np.int64), titles,
                      attributes, [HOBBY, ERA])
    except ValueError as error:
        raise UserError(f"not four tab-separated numbers a line: {error}", folder / "u.data", "use the files as published") from None


LOADERS = {"demo": load_demo, "ml-100k": load_ml_100k}


def read_lines(path, encoding):
    """Non-empty lines of a text file; UserError when it is missing or unreadable."""
    try:
        return [line for line in path.read_text(encoding=encoding).split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path.name}: {error}", path.parent, "give the folder that holds it with --data-dir") from None


def clean_title(text):
    """('The Matrix', 1999) from 'Matrix, The (1999)'; the year is None where the title carries none."""
    year = re.search(r"\((\d{4})\)\s*$", text)
    title = re.sub(r"\s*\(\d{4}\)\s*$", "", text).strip()
    title = re.sub(r"^(.+?), (The|A|An|Il|La|Le|Les|L'|Das|Der|Die|El|Los|Las|Un|Une|Det|Den)(?= \(|$)", r"\2 \1", title)
    return " ".join(title.split()), int(year[1]) if year else None


def era_of(year):
    """The decade as one word, so that it can stand in the profile's slot."""
    words = {1930: "thirties", 1940: "forties", 1950: "fifties", 1960: "sixties", 1970: "seventies", 1980: "eighties", 1990: "nineties"}
    return words.get(year // 10 * 10, "twenties")


def download_ml_100k(folder):
    """Fetch and unpack ml-100k.zip into folder/ml-100k unless it is there; checks the published MD5."""
    target = folder / "ml-100k"
    if (target / "u.data").exists():
        return target
    archive = folder / "ml-100k.zip"
    print(f"downloading {ML_100K_URL} (5 MB) to {archive}")
    try:
        with atomic(archive) as temporary, urllib.request.urlopen(ML_100K_URL, timeout=30) as reply, open(temporary, "wb") as file:
            with tqdm(total=int(reply.headers.get("Content-Length", 0)), unit="B", unit_scale=True) as bar:
                while chunk := reply.read(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))
            if hashlib.md5(temporary.read_bytes()).hexdigest() != ML_100K_MD5:
                raise UserError("the download's checksum is wrong", ML_100K_URL, "try again, or place the files by hand (--data-dir)")
        with zipfile.ZipFile(archive) as zipped, tempfile.TemporaryDirectory(dir=folder) as aside:
            zipped.extractall(aside)
            os.replace(Path(aside) / "ml-100k", target)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot download ml-100k: {getattr(error, 'reason', error)}", ML_100K_URL,
                        "unpack it by hand and give the folder with u.data and u.item as --data-dir") from None
    return target


def thin_out(source, args):
    """Indices of the rows kept: --subsample-users, --max-per-user at random, then users and items below --min-interactions out,
    until none is left."""
    kept = np.arange(len(source.users))
    users, items = np.unique(source.users, return_inverse=True)[1], np.unique(source.items, return_inverse=True)[1]
    if args.max_per_user:
        shuffled = np.random.default_rng((args.seed, 2)).permutation(len(kept))
        order = shuffled[np.argsort(users[shuffled], kind="stable")]  # a random order within each user
        first = np.searchsorted(users[order], users[order])           # where the user's rows begin
        kept = np.sort(order[np.arange(len(order)) - first < args.max_per_user])
    if args.subsample_users:
        chosen = np.random.default_rng((args.seed, 3)).permutation(users.max() + 1)[:args.subsample_users]
        kept = kept[np.isin(users[kept], chosen)]
    while len(kept):
        enough = np.bincount(users[kept])[users[kept]] >= args.min_interactions
        enough &= np.bincount(items[kept])[items[kept]] >= args.min_interactions
        if enough.all():
            break
        kept = kept[enough]
    return kept


def in_order(raw_ids):
    """Distinct ids, numbers by value and everything else alphabetically."""
    return sorted(set(raw_ids.tolist()), key=lambda raw: (0, int(raw), "") if raw.isdecimal() else (1, 0, raw))


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
    """(Dataset, truth or None): labels, filtering, ids and the split of CONTRACT's rules of evidence."""
    kept = thin_out(source, args)
    if len(kept) < 10:
        raise UserError(f"{len(kept)} interactions are left after filtering", f"--min-interactions {args.min_interactions}",
                        "lower it, or give more data")
    raw_users, raw_items = source.users[kept], source.items[kept]
    users, items = in_order(raw_users), in_order(raw_items)
    user_index, item_index = {raw: i for i, raw in enumerate(users)}, {raw: i for i, raw in enumerate(items)}

    n = len(kept)
    split = np.empty(n, dtype=np.int32)
    order = np.random.default_rng(args.seed).permutation(n)  # Paper: 8:1:1, at random
    split[order[:int(n * 0.8)]], split[order[int(n * 0.8):int(n * 0.9)]], split[order[int(n * 0.9):]] = TRAIN, VALIDATION, TEST
    labels = source.ratings[kept] > args.positive_above
    interactions = np.stack([[user_index[raw] for raw in raw_users], [item_index[raw] for raw in raw_items], labels, split],
                            axis=1).astype(np.int32)
    if source.times is not None:
        interactions = interactions[np.argsort(source.times[kept], kind="stable")]
    records = [{"id": raw, "title": source.titles.get(raw, raw), "attributes": source.attributes.get(raw, {})} for raw in items]
    dataset = Dataset(interactions, users, records, choose_profiles(source, args), TASK_PROMPT, args.dataset)
    truth = None if source.truth is None else np.array([source.truth[raw] for raw in users], dtype=np.int16)
    return dataset, truth


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
    """Table 1 for this data set beside the paper's, and an example of what the LLM will read."""
    print(f"\n{'Table 1':14s}{'interactions':>14s}{'users':>10s}{'items':>10s}{'sparsity':>10s}")
    rows = {f"here: {dataset.name}": (facts["n_interactions"], facts["n_users"], facts["n_items"])}
    rows.update({f"paper: {name}": counts for name, counts in PAPER_TABLE_1.items()})
    for name, (n, users, items) in rows.items():
        print(f"{name:14s}{n:14,d}{users:10,d}{items:10,d}{100 * (1 - n / users / items):9.2f}%")
    print(f"positive rate {facts['positive_rate']:.3f}; rows train/validation/test "
          + "/".join(str(len(dataset.rows(split))) for split in (TRAIN, VALIDATION, TEST)))
    for item in dataset.items[:2]:
        print(f"item {item['id']}: {item['title']!r} {item['attributes']}")
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
    announce("01 prepare data", args, "nothing, the demo is made here" if args.dataset == "demo" else args.data_dir or "data/" + args.dataset)
    dataset, truth = build(LOADERS[args.dataset](args), args)
    with one_run_at_a_time(args.run):
        facts = save(args.run, dataset, truth, args)
    report(dataset, facts, truth)
    print(f"\nwrote dataset.json interactions.npy users.json items.json{'' if truth is None else ' truth.npy'} to {args.run}")
    print(f"next: python 02_infer_profiles.py --run {args.run}")


if __name__ == "__main__":
    guarded(main)
