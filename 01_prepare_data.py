"""Stage 01: turn a rating source into the arrays that the other stages read. Sections 3.1, 3.2, 3.4.

Later stages infer latent profiles of a user, such as the hobby: for each user and profile m a vector theta^m,
which stands in a prompt ("This user's hobby is ...") where a word could stand. What they need is made here.
Ratings above 3 are labelled as liked; users and items with few interactions are dropped; one random split
into training, validation and test rows, 8:1:1, is made, which all stages obey. An item gets a title and, for
each profile, words that could stand in theta's place: a film's genre and era, a product's brand and price.

What stands where; each part begins with a line of dashes:
    settings, data     the prompts; what a source is; the demo, whose users' profiles are known. Read first.
    filter and split   labels, the split, each profile's words: what the other stages rely on.
    show, save         what was understood, and the files that keep it
    running it         flags, MovieLens and csv files, broken files, product releases. Skip it at first.

Writes to --run (U users, I items, N interactions, M profiles):
    dataset.json        facts, prompts, words of each profile, fingerprints of the rest
    interactions.npy    int32 (N, 4): user, item, label, split (SPLITS); by time where times are known
    users.json          (U) raw user ids;  items.json (I) {id, title, attributes}
    dropped_users.json  raw ids of users who were dropped
    truth.npy           int16 (U, 2) the demo's planted hobby and background, for evaluation

Run:
    python 01_prepare_data.py  # the demo, some seconds
"""

import argparse
import ast
import codecs
import csv
import datetime
import gzip
import html
import io
import itertools
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
    COLD, SPLITS, SUPPORT, TEST, TRAIN, VALIDATION, Dataset, Parser, UserError, announce, at_least,
    fingerprint, guarded, progress, save_json, save_npy, together)

# -------- settings

# A profile is a dict:
#     name    hobby or background, the paper's two, which each data set fills with what it has (films: genre
#             and era; products: brand and price), or critic. Attributes of items and columns of stage 03's
#             feature_bank.csv go by it.
#     prompt  the paper's x^m, the text before theta^m. The prompts are joined, prompt^1 <theta^1> prompt^2
#             <theta^2> task prompt, hence their punctuation.
#     codes   K_m: into so many groups, the codes, stage 03 sorts users by theta^m. Paper: 4 and 3.
# DEVIATION(k): row k of README's differences from the paper. Paper, section 2.3: "This user's hobby is
# <theta_1>, and his background is <theta_2>. What is the user's interaction history?" DEVIATION(12): each
# prompt is worded so that the data set's values complete the sentence, for an LLM that has never seen the
# data. The demo has HOBBY and PRICE, csv files PASTIME and BACKGROUND.
HOBBY = {"name": "hobby", "prompt": "This user's hobby is", "codes": 4}
BACKGROUND = {"name": "background", "prompt": ", and this user's background is", "codes": 3}
PASTIME = {**HOBBY, "prompt": "This user's favorite hobby is"}
BRAND = {**HOBBY, "prompt": "This user is a fan of the brand"}
PLACE = {**HOBBY, "prompt": "This user's favorite kind of place is"}
GENRE = {**HOBBY, "prompt": "This user's favorite movie genre is"}
PRICE = {**BACKGROUND, "prompt": ". This user only buys products that are"}
PLACE_PRICE = {**BACKGROUND, "prompt": ". This user only goes to places that are"}
ERA = {**BACKGROUND, "prompt": ", and the favorite decade is the"}
# --critic adds a third profile, how generous the user is, for `02 --history rated`, which writes + or -
# behind each title. It is no attribute of items. So its words stand here, the keys of `likes`; the number of
# a word is the share of titles that such a user likes, from which the tiny LM, a small GPT-2 that stage 02
# can train, learns what harsh means.
CRITIC = {"name": "critic", "prompt": ", and as a critic this user is", "codes": 8,
          "likes": {"harsh": 0.2, "balanced": 0.55, "generous": 0.85}}
# Task prompts, the paper's D_task: the text between the profiles and the titles. Stage 02 trains the vectors
# of these words, too.
BOUGHT = ". Products that this user bought:"
WATCHED = ".\nMovies that this user watched:"
VISITED = ".\nPlaces that this user visited:"
CHOSE = ".\nThings that this user chose:"

MAX_WORDS = 256  # of a profile, the most frequent; stage 02 starts theta at the mean of their embeddings


# -------- data

@dataclass
class Source:
    """A data set before it is filtered: N rows in the order of its files, each user-item pair once."""

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
    truth: dict | None = None  # demo: raw user id -> the user's hobby and background, as indices
    name: str = ""  # of the data set, if it is not --dataset


DEMO_HOBBIES = dict(
    music="Guitar Piano Violin Drum Trumpet Microphone Ukulele Songbook Cello Flute Amplifier Banjo".split(),
    fishing="Rod Reel Lure Net Waders Bait Float Hook Kayak Tackle Bobber Sinker".split(),
    cooking="Pan Knife Cookbook Mixer Oven Wok Blender Apron Teapot Grill Whisk Ladle".split(),
    cycling="Bike Helmet Saddle Pedal Jersey Pump Chain Tyre Gloves Bell Fork Spokes".split())
DEMO_BACKGROUNDS = dict(
    cheap="Budget Basic Starter Compact Secondhand Mini".split(),
    ordinary="Classic Everyday Reliable Standard Practical Sturdy".split(),
    luxurious="Premium Deluxe Handmade Signature Gold Exclusive".split())
# In the demo a user meets an item with a chance in proportion to exp(the item's popularity + EXPOSURE), and
# the log odds of liking it are the item's quality + the user's generosity + TASTE. EXPOSURE and TASTE hold
# two numbers: the first is added where the item is of the user's hobby, the second where it is of the user's
# background (TASTE is centred, see below). --signal multiplies all that depends on profiles.
EXPOSURE = (0.95, 0.6)
TASTE = (2.8, 2.2)
HOBBY_GENEROSITY = np.array([0.15, -0.15, 0.06, -0.06])  # what each hobby adds to its users' generosity
BACKGROUND_GENEROSITY = np.array([-0.15, 0.0, 0.15])  # the same of each background


def load_demo(args):
    """A world of known profiles: 2,000 users of 4 hobbies x 3 backgrounds, 400 items, some 14 ratings a user.

    An item is of one hobby and one background; where they are the user's, it is met and liked more.
    """
    rng = np.random.default_rng((args.seed, 1))  # the second number keeps apart what one --seed draws
    n_users = 2000
    n_items = 400
    hobby = rng.integers(4, size=(n_users, 1))
    background = rng.integers(3, size=(n_users, 1))
    kinds = rng.permutation(np.arange(n_items) % 12)  # 3 x hobby + background, as in the loop below
    item_hobby, item_background = np.divmod(kinds, 3)  # Shape: (I,)
    titles_of_kind = []  # in random order; each item takes the last one that is left
    for nouns, adjectives in itertools.product(DEMO_HOBBIES.values(), DEMO_BACKGROUNDS.values()):
        titles = [f"{adjective} {noun}" for adjective, noun in itertools.product(adjectives, nouns)]
        titles_of_kind.append(rng.permutation(titles).tolist())
    titles = [titles_of_kind[kind].pop() for kind in kinds]

    fits_hobby = hobby == item_hobby  # Shape: (U, I)
    fits_background = background == item_background  # Shape: (U, I)
    popularity = rng.normal(0, 0.5, n_items)
    quality = rng.normal(0, 0.3, n_items)
    generosity = rng.normal(0, 0.3, (n_users, 1))
    generosity += args.signal * (HOBBY_GENEROSITY[hobby] + BACKGROUND_GENEROSITY[background])
    weights = np.exp(popularity + args.signal * (EXPOSURE[0] * fits_hobby + EXPOSURE[1] * fits_background))
    # Centred, so that taste adds nothing to the log odds of all items together.
    taste = TASTE[0] * (fits_hobby - 1 / 4) + TASTE[1] * (fits_background - 1 / 3)
    log_odds = quality + generosity + args.signal * taste
    liked = rng.random(log_odds.shape) < 1 / (1 + np.exp(-log_odds))

    items_met = []  # of each user
    for of_user in weights:
        count = 6 + rng.poisson(8)
        items_met.append(rng.choice(n_items, size=count, replace=False, p=of_user / of_user.sum()))
    users = np.repeat(np.arange(n_users), [len(met) for met in items_met])  # Shape: (N,)
    items = np.concatenate(items_met)  # Shape: (N,)
    high = rng.integers(4, 6, len(users))
    low = rng.integers(1, 4, len(users))
    ratings = np.where(liked[users, items], high, low)
    raw_users = [f"u{user:04d}" for user in range(n_users)]
    raw_items = [f"i{item:03d}" for item in range(n_items)]
    values_of_kind = [{"hobby": [hobby_name], "background": [background_name]}
                      for hobby_name, background_name in itertools.product(DEMO_HOBBIES, DEMO_BACKGROUNDS)]
    attributes = {raw: values_of_kind[kind] for raw, kind in zip(raw_items, kinds)}
    truth = dict(zip(raw_users, np.hstack([hobby, background])))
    return Source(user_ids=raw_users, item_ids=raw_items, users=users, items=items, ratings=ratings,
                  times=None, titles=dict(zip(raw_items, titles)), attributes=attributes,
                  profiles=(HOBBY, PRICE), task_prompt=BOUGHT, truth=truth)


# -------- filter and split

def thin_out(source, args):
    """Indices of the rows kept.

    --max-per-user and --subsample-users choose at random, the latter among users who have enough rows for
    --min-interactions. Fewer may stay, for among the chosen ones alone an item may have too few.
    """
    users = source.users
    items = source.items
    kept = np.arange(len(users))
    if args.max_per_user:
        # Number the rows of each user in random order, and keep those of low numbers.
        shuffled = np.random.default_rng((args.seed, 2)).permutation(kept)
        order = shuffled[np.argsort(users[shuffled], kind="stable")]  # random within each user
        first_row = np.searchsorted(users[order], users[order])  # where the user's rows begin
        place = np.arange(len(order)) - first_row  # within the user's rows
        kept = np.sort(order[place < args.max_per_user])
    kept = with_enough_rows(kept, users, items, args.min_interactions)
    if args.subsample_users:
        shuffled = np.random.default_rng((args.seed, 3)).permutation(len(source.user_ids))
        chosen = shuffled[np.isin(shuffled, users[kept])][:args.subsample_users]
        kept = kept[np.isin(users[kept], chosen)]
    return with_enough_rows(kept, users, items, args.min_interactions)


def with_enough_rows(kept, users, items, least):
    """Of these rows those whose user and whose item have at least `least` of them.

    They are dropped again and again, for without a dropped user an item may have too few.
    """
    while True:
        enough = np.bincount(users[kept])[users[kept]] >= least
        enough &= np.bincount(items[kept])[items[kept]] >= least
        if enough.all():
            return kept
        kept = kept[enough]


def in_order(indices, raw_ids):
    """(raw ids that occur, in order; for each row the place of its id among them).

    Ids that are numbers come first, by value, then the others by the alphabet: so a place does not depend on
    the order of the rows in a file.
    """
    def key(index):
        text = raw_ids[index]
        is_number = text.isascii() and text.isdecimal()
        return not is_number, int(text) if is_number else 0, text

    order = sorted(np.unique(indices).tolist(), key=key)
    renumber = np.zeros(len(raw_ids), np.int32)
    renumber[order] = np.arange(len(order))
    return [raw_ids[index] for index in order], renumber[indices]


def build(source, args):
    """(Dataset, truth or None): filter, order of ids, labels and the one split."""
    kept = thin_out(source, args)
    say_what_is_left(source, kept, args)
    n = len(kept)
    user_ids, users = in_order(source.users[kept], source.user_ids)
    item_ids, items = in_order(source.items[kept], source.item_ids)
    # Paper, section 3.4: 8:1:1. Note: of what and how it does not say. Here it is all rows in random order; a
    # user may have no row in one of the three.
    order = np.random.default_rng(args.seed).permutation(n)
    split = np.full(n, TRAIN, np.int32)
    split[order[int(n * 0.8):]] = VALIDATION  # the last fifth
    split[order[int(n * 0.9):]] = TEST  # of it the second half
    # --cold-users: a share of the users is kept from the recommenders of stage 04. Their training rows become
    # SUPPORT, from which profiles may be inferred; all their other rows become COLD, for evaluation.
    # Note: 13 is the number of this draw alone. Stage 02 draws users from --seed, too; with the same number
    # it might draw the very users who are cold here.
    shuffled = np.random.default_rng((args.seed, 13)).permutation(len(user_ids))
    n_cold = round(args.cold_users * len(user_ids))
    if args.cold_users and n_cold in (0, len(user_ids)):
        who, remedy = ("everybody", "smaller") if n_cold else ("nobody", "larger")
        raise UserError(f"this share of {len(user_ids):,d} users is {who}",
                        f"--cold-users {args.cold_users:g}", f"give a {remedy} one")
    cold = np.isin(users, shuffled[:n_cold])
    split[cold] = np.where(split[cold] == TRAIN, SUPPORT, COLD)
    labels = source.ratings[kept] > args.positive_above
    interactions = np.stack([users, items, labels, split], axis=1)
    if source.times is not None:
        interactions = interactions[np.argsort(source.times[kept], kind="stable")]
    described = describe_items(source, item_ids)  # {id, title, attributes} of each item
    profiles = list(source.profiles)
    if args.critic:
        profiles.append(CRITIC)
    # Words come from items of training rows alone.
    training_items = [described[item] for item in np.unique(interactions[interactions[:, 3] == TRAIN, 1])]
    profiles = [profile | {"words": words_of(profile, training_items, args)} for profile in profiles]
    truth = None
    if source.truth is not None:
        truth = np.array([source.truth[raw] for raw in user_ids], np.int16)
    name = source.name or args.dataset
    return Dataset(interactions, user_ids, described, profiles, source.task_prompt, name), truth


def describe_items(source, raw_ids):
    """{id, title, attributes} of each item; a value of the hobby or the id stands in for a missing title."""
    check_joined(source, raw_ids)  # UserError or WARNING where ratings and items write ids differently
    described = []
    untitled = 0
    for raw in raw_ids:
        attributes = {}
        for name, values in source.attributes.get(raw, {}).items():
            attributes[name] = [value for value in values if value.lower() not in MISSING]
        title = source.titles.get(raw)
        if not title:
            untitled += 1
            title = next(iter(attributes.get("hobby", [])), raw)
        described.append({"id": raw, "title": title, "attributes": attributes})
    if untitled:
        warning = "WARNING: " if 2 * untitled > len(raw_ids) else ""
        print(f"{warning}{untitled:,d} of {len(raw_ids):,d} items have no title: brand, category or id "
              "stands in, and an LLM learns little from an id")
    return described


def words_of(profile, items, args):
    """{word: number of items that have it}, the most frequent first. Each could stand in theta's place.

    items: those of training rows. Words that were given by flag, and a critic's, count as equally frequent.
    """
    by_flag = getattr(args, f"{profile['name']}_words", None)  # --hobby-words, --background-words
    if by_flag:
        return dict.fromkeys(by_flag, 1)
    if "likes" in profile:
        return dict.fromkeys(profile["likes"], 1)
    counts = Counter()
    for item in items:
        counts.update(set(item["attributes"].get(profile["name"], [])))
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[:MAX_WORDS]
    return {word: counts[word] for word in frequent}


# -------- here the method ends; show what was understood

def say_what_is_left(source, kept, args):
    """Print what thin_out dropped and which flags dropped it; UserError where next to nothing is left."""
    counts = []
    for name, values in (("users", source.users), ("items", source.items)):
        counts.append(f"{len(np.unique(values[kept])):,d} of {len(np.unique(values)):,d} {name}")
    flags = [f"--min-interactions {args.min_interactions}"]
    if args.max_per_user:
        flags.append(f"--max-per-user {args.max_per_user}")
    if args.subsample_users:
        flags.append(f"--subsample-users {args.subsample_users}")
    rows = f"kept {len(kept):,d} of {len(source.users):,d} rows"
    if len(kept) < 10:
        todo = "lower --min-interactions or give more data"
        if args.subsample_users:
            todo = "raise --subsample-users or lower --min-interactions"
        raise UserError(f"{rows}, {', '.join(counts)}: too few to learn from", ", ".join(flags), todo)
    if len(kept) < len(source.users):
        print(f"{rows}, {', '.join(counts)} ({', '.join(flags)})")


def check_ratings(ratings, positive_above):
    """Print how often each rating occurs; UserError or WARNING where --positive-above does not fit them."""
    if not len(ratings):
        return
    values, counts = np.unique(ratings, return_counts=True)
    low = values[0]
    high = values[-1]
    if len(values) <= 12:
        listed = ", ".join(f"{value:g}: {count:,d}" for value, count in zip(values, counts))
        print(f"ratings {listed}; above {positive_above:g} is liked (--positive-above)")
    else:
        print(f"ratings from {low:g} to {high:g}; above {positive_above:g} is liked (--positive-above)")
    if low == high:
        raise UserError(
            f"all {len(ratings):,d} ratings are {low:g}", "ratings",
            "a recommender needs dislikes as well as likes: add rows of rating 0 for items that a user saw "
            "and left, and give --positive-above 0")
    if not low <= positive_above < high:
        what = "a like" if positive_above < low else "a dislike"
        raise UserError(f"every rating, from {low:g} to {high:g}, is {what}",
                        f"--positive-above {positive_above:g}",
                        f"give a number from {low:g} to below {high:g}")
    place = (positive_above - low) / (high - low)
    liked = np.mean(ratings > positive_above)
    if len(values) > 2 and not 0.4 <= place <= 0.85:
        print(f"WARNING: ratings go from {low:g} to {high:g}, and above {positive_above:g} is liked: "
              f"{liked:.0%} of the rows. Is --positive-above right for this scale?")
    # A 0 beside ratings from 1 to 10, a 99 beside -10 to 10: some sources write "not rated" so.
    for value, count, others in ((low, counts[0], values[1:]), (high, counts[-1], values[:-1])):
        apart = len(others) > 1 and np.abs(others - value).min() >= 2 * np.diff(others).max()
        unrated = value <= 0 and len(others) > 1 and others.min() >= 1 and count == counts.max()
        if apart or unrated:
            print(f"WARNING: {count:,d} of {len(ratings):,d} ratings are {value:g}, all others from "
                  f"{others.min():g} to {others.max():g}. Leave them out if {value:g} means 'not rated'")


def show(dataset, facts):
    """The paper's Table 1; splits; each profile's words; prompts of three users, with six liked titles."""
    print("\n{dataset}: {n_interactions:,d} interactions, {n_users:,d} users, {n_items:,d} items, sparsity "
          "{sparsity:.2%}, positive rate {positive_rate:.3f}".format(**facts))
    for split, name in enumerate(SPLITS if "cold_users" in facts else SPLITS[:3]):
        labels = dataset.rows(split)[:, 2]
        print(f"{name}: {len(labels):,d} rows, {labels.sum():,d} liked")
        if len(np.unique(labels)) < 2:
            print(f"WARNING: all labels of the {name} split are equal: try more data or --positive-above")
    for profile in dataset.profiles:
        show_words(profile, dataset.items)
    prompt = "".join(f"{profile['prompt']} <theta{m}>" for m, profile in enumerate(dataset.profiles, 1))
    prompt += dataset.task_prompt
    rows = dataset.rows(TRAIN)
    for user in np.unique(rows[:, 0])[:3]:
        items = rows[(rows[:, 0] == user) & (rows[:, 2] == 1), 1][-6:]
        titles = "".join(f" {dataset.items[item]['title']};" for item in items)
        print(f"prompt of user {dataset.users[user]}: {prompt}{titles}".replace("\n", " "))


def show_words(profile, items):
    """The commonest words of a profile; WARNING where most items have none."""
    words = profile["words"]
    enough = len(words) > 1  # a single word tells nobody apart: stage 02 then takes the LLM's own words
    if len(set(words.values())) > 1:
        counted = [f"{word} {count:,d}" for word, count in list(words.items())[:6]]
        first = "the commonest are " + ", ".join(counted)
    else:  # words that a flag gave have the count 1 each
        first = "among them " + ", ".join(list(words)[:6])
    without = sum(not item["attributes"].get(profile["name"]) for item in items)
    print(f"words of {profile['name']}: {len(words):,d}"
          + (f", {first}" if enough else "; the LLM will choose its own"))
    if words and 2 * without > len(items) and not profile.get("likes"):
        print(f"WARNING: {without:,d} of {len(items):,d} items have no value for {profile['name']}")


# -------- save

def save(run, dataset, truth, args, dropped):
    """Write all artifacts and return the facts. dropped: raw ids of the users whom the filter dropped."""
    n_rows = len(dataset.interactions)
    n_users = len(dataset.users)
    n_items = len(dataset.items)
    settings = "seed min_interactions positive_above max_per_user subsample_users critic signal".split()
    if args.cold_users:
        settings.append("cold_users")
    facts = {
        "dataset": dataset.name, "n_users": n_users, "n_items": n_items, "n_interactions": n_rows,
        "sparsity": 1 - n_rows / n_users / n_items, "positive_rate": dataset.interactions[:, 2].mean().item(),
        "profiles": dataset.profiles, "task_prompt": dataset.task_prompt,
        "fingerprint": dataset.fingerprint(),
        "truth_fingerprint": None if truth is None else fingerprint(truth),
        **{key: getattr(args, key) for key in settings}}
    with together(run) as aside:
        save_npy(aside / "interactions.npy", dataset.interactions)
        save_json(aside / "users.json", dataset.users)
        save_json(aside / "items.json", dataset.items)
        save_json(aside / "dropped_users.json", dropped)
        if truth is not None:
            save_npy(aside / "truth.npy", truth)
        save_json(aside / "dataset.json", facts)
    if truth is None:
        (run / "truth.npy").unlink(missing_ok=True)  # of a demo that was prepared in this folder before
    return facts


# -------- running it: the flags

def parse_arguments():
    parser = Parser(__doc__, device=False)
    add = parser.add_argument
    add("--dataset", choices=LOADERS, default="demo", help="what to read")
    add("--data-dir", type=Path, help="its files; else data/<dataset>, MovieLens downloaded")
    add("--min-interactions", type=at_least(1), default=4, help="fewest of a user or item (paper: 4)")
    add("--positive-above", type=at_least(-1e9, float), default=3.0, help="higher is liked (paper: 3)")
    add("--max-per-user", type=at_least(1), help="at most so many random rows of a user")
    add("--subsample-users", type=at_least(1), help="at most so many random users")
    add("--cold-users", type=at_least(0, float, 1), default=0.0, help="share of users new to recommenders")
    add("--critic", action="store_true", help="a third profile, for rated histories")
    add("--hobby-words", type=word_list, help="a,b,c: what could name it (default: the items' values)")
    add("--background-words", type=word_list, help="the same for the background")
    add("--signal", type=at_least(0, float, 100), default=1.0, help="demo: strength of the profiles; 0: none")
    add = parser.add_argument_group("csv: values between , ; | or tabs, under a header").add_argument
    add("--ratings-file", type=Path, help="a row an interaction")
    add("--items-file", type=Path, help="a row an item")
    add("--user-col", default="user_id", help="column of the user")
    add("--item-col", default="item_id", help="column of the item")
    add("--rating-col", default="rating", help="column of the rating")
    add("--time-col", help="column of the time: seconds or an ISO date")
    add("--title-col", help="column of the title")
    add("--hobby-col", help="column of the hobby's values")
    add("--background-col", help="column of the background's values")
    add("--item-id-col", help="column of the item in --items-file (default: --item-col)")
    add("--value-sep", default="|", help="between values of one cell; a comma cuts no number (1,5)")
    args = parser.parse_args()
    args.value_sep = args.value_sep.replace("\\t", "\t")
    if args.dataset == "csv" and not args.ratings_file:
        parser.error("--dataset csv needs --ratings-file")
    if args.dataset == "csv" and args.data_dir:
        parser.error("--data-dir does not go with --dataset csv: give --ratings-file and --items-file")
    for flag in ("ratings_file", "items_file", "user_col", "item_col", "rating_col", "time_col", "title_col",
                 "hobby_col", "background_col", "value_sep"):
        if getattr(args, flag) != parser.get_default(flag) and args.dataset != "csv":
            parser.error(f"--{flag.replace('_', '-')} needs --dataset csv")
    if args.signal != 1 and args.dataset != "demo":
        parser.error("--signal needs --dataset demo")
    if args.item_id_col and not args.items_file:
        parser.error("--item-id-col needs --items-file")
    if args.items_file and not (args.title_col or args.hobby_col or args.background_col):
        parser.error("--items-file needs --title-col, --hobby-col or --background-col")
    if not args.value_sep:
        parser.error("--value-sep is empty")
    if args.dataset == "demo" and args.data_dir:
        parser.error("--data-dir needs --dataset")
    return args


def word_list(text):
    """argparse type: words separated by commas, each once."""
    words = [" ".join(word.split()).lower() for word in text.split(",")]  # as values_of() spells values
    if len(words) < 2 or not all(words) or len(set(words)) < len(words) or not text.isprintable():
        raise argparse.ArgumentTypeError("give two different words or more, separated by commas")
    if "unknown" in words:
        raise argparse.ArgumentTypeError("'unknown' cannot be a word: stage 03 writes it for no history")
    return words


# -------- MovieLens and csv files

def rating(user, item, value, time=0, low=1.0, high=5.0):
    """(user, item, rating, time) of a row. Raises ValueError or TypeError for what cannot be one.

    time: seconds or any number that sorts like them; None, "" or 0: the source has no times; -inf: it has,
    but not for this row.
    """
    value = float(value)
    time = float(time or 0)
    if not (low <= value <= high and math.isfinite(value) and time < math.inf):
        raise ValueError(f"rating {value:g} is not within {low:g} to {high:g}, or time infinite")
    return raw_id(user), raw_id(item), value, time


def film_rating(*cells):
    """rating() of MovieLens, whose later releases have half stars."""
    return rating(*cells, low=0.5)


def csv_rating(user, item, value, time=""):
    """rating() on any scale. The number may have a decimal comma; the time is seconds or an ISO date."""
    value = {"true": "1", "false": "0"}.get(value.lower(), value)
    number = r"[-+]?(\d+([.,]\d*)?|[.,]\d+)([eE][-+]?\d+)?"
    if not re.fullmatch(number, value) or re.search(r",\d{3}$", value):  # 1,234 may be a thousand or one
        raise ValueError(f"{value!r:.40} is no rating")
    time = "" if time.strip().lower() in MISSING else time.strip()
    try:
        seconds = float(time or "-inf")  # unknown: before all others
    except ValueError:
        try:
            date = datetime.datetime.fromisoformat(time.replace("Z", "+00:00"))
        except ValueError:
            raise ValueError(f"time {time!r:.40} is neither seconds nor an ISO date like 2020-12-31; convert "
                             "it or leave --time-col out") from None
        seconds = (date if date.tzinfo else date.replace(tzinfo=datetime.timezone.utc)).timestamp()
    return rating(user, item, value.replace(",", "."), seconds, -1e30, 1e30)


def collect(rows, profiles, task_prompt):
    """A Source, still without titles, of (user, item, rating, time) rows.

    Where a user rated an item several times, the latest row stays.
    """
    users = {}  # raw id -> index
    items = {}  # raw id -> index

    def indexed():
        for user, item, value, time in rows:
            yield users.setdefault(user, len(users)), items.setdefault(item, len(items)), value, time

    # indexed() fills the two dicts while fromiter() consumes it.
    found = np.fromiter(indexed(), [("user", "i8"), ("item", "i4"), ("rating", "f4"), ("time", "f8")])
    pairs = found["user"] * len(items) + found["item"]  # a number for each user-item pair
    # By pair and, within it, by time, at equal times in the source's order: the last of a pair is its latest.
    order = np.lexsort((found["time"], pairs))
    # The last row of a pair is the one behind which another pair follows; -1, which is none, ends them all.
    is_latest = np.diff(pairs[order], append=-1) != 0
    kept = found[np.sort(order[is_latest])]
    if len(kept) < len(found):
        print(f"{len(found) - len(kept):,d} repeated user-item pairs: the latest stays")
    known = kept["time"][np.isfinite(kept["time"])]
    times = kept["time"] if known.any() else None  # some sources write 0 for all
    return Source(list(users), list(items), kept["user"], kept["item"], kept["rating"], times, {}, {},
                  profiles, task_prompt)


def load_movielens(args):
    """MovieLens-100K (u.*) and -1M (*.dat); with --dataset ml-1m --data-dir PATH also -10M and later ones.

    Releases later than -10M have ratings.csv and movies.csv.
    """
    needed = "u.data" if args.dataset == "ml-100k" else "ratings.dat"
    folder = args.data_dir or download(args.dataset, needed)
    later_release = args.dataset == "ml-1m" and (folder / "ratings.csv").exists()  # such as ml-25m
    if args.dataset == "ml-100k":
        genres = [name for name, _ in read_cells(folder / "u.genre", "|", 2)]
        movies = []
        for row in read_cells(folder / "u.item", "|", 5 + len(genres)):
            flags = row[5:]
            own = [genre for genre, flag in zip(genres, flags) if flag == "1"]
            movies.append((row[0], row[1], "|".join(own)))
        rows = read_cells(folder / needed, "\t", 4, film_rating)
    elif later_release:
        movies = read_table(folder / "movies.csv", ["movieId", "title", "genres"])
        rows = read_table(folder / "ratings.csv", ["userId", "movieId", "rating", "timestamp"], film_rating)
    else:
        movies = read_cells(folder / "movies.dat", "::", 3)
        rows = read_cells(folder / needed, "::", 4, film_rating)
    source = collect(rows, (GENRE, ERA), WATCHED)
    if later_release:
        source.name = f"ml-{folder.resolve().name.removeprefix('ml-')}"
    for raw, title, genres in movies:
        title, year = clean_title(clean_text(title))
        source.titles[raw] = title
        source.attributes[raw] = {"hobby": values_of(genres, "|"), "background": era_of(year)}
    return source


def load_csv(args):
    """Any ratings file with an optional items file; columns by flags."""
    wanted = [args.user_col, args.item_col, args.rating_col]
    if args.time_col:
        wanted.append(args.time_col)
    rows = read_table(args.ratings_file, wanted, csv_rating)
    profiles = [PASTIME]
    if args.background_col or args.background_words:
        profiles.append(BACKGROUND)
    source = collect(rows, tuple(profiles), CHOSE)
    columns = {"title": args.title_col, "hobby": args.hobby_col, "background": args.background_col}
    columns = {name: column for name, column in columns.items() if column}
    if columns:
        id_column = args.item_col
        if args.items_file:
            id_column = args.item_id_col or args.item_col
        path = args.items_file or args.ratings_file
        rows = read_table(path, [id_column, *columns.values()], lambda raw, *texts: (raw_id(raw), texts))
        read_items(source, rows, list(columns), args.value_sep, None if args.items_file else path)
    return source


def read_items(source, rows, names, separator, ratings_file=None):
    """Give a csv source titles and values. rows: (raw id, texts), a text for each of names.

    The lines of one item add up: some files have a genre a line, some an interaction a line. ratings_file:
    where the rows are interactions; a WARNING then counts the items whose rows differ.
    """
    distinct = set()
    texts_of = {}  # of an item in a ratings file: the texts of its first row
    differing = set()
    for raw, texts in rows:
        found = dict(zip(names, texts))
        if ratings_file and texts_of.setdefault(raw, texts) != texts:
            differing.add(raw)
        title = clean_text(found.pop("title", ""))
        if title.lower() in NO_TITLE:
            title = ""
        source.titles[raw] = source.titles.get(raw) or title
        attributes = source.attributes.setdefault(raw, {name: [] for name in found})
        for name, text in found.items():
            for value in values_of(text, separator):
                distinct.add(value)
                if value not in attributes[name]:
                    attributes[name].append(value)
    for name in names:
        if name != "title" and not any(found[name] for found in source.attributes.values()):
            print(f"WARNING: the column of the {name} holds no value")
    if differing:
        print(f"WARNING: {len(differing):,d} of {len(texts_of):,d} items are described differently in their "
              f"rows of {ratings_file.name}. What all rows say is taken together, those of validation and "
              "test too; where a column is of the user and not of the item, give --items-file")
    joined = sorted(value for value in distinct if re.search(r"[,;|/>]", value))
    if 5 * len(joined) > len(distinct):
        print(f"WARNING: {len(joined):,d} of {len(distinct):,d} values look like several in one, as "
              f"'{joined[0]}': give what stands between them as --value-sep (now '{separator}')")


# -------- files that may be broken

MAX_LINE = 2**22  # bytes, or characters of a decoded file; a longer line is no record
MAX_BAD = 0.01  # share of bad records to skip; a larger one is an error
MAX_BREAKS = 50  # lines over which a quoted cell may go on
MAX_TITLE = 200  # characters the LLM reads
LONGEST_ID = 200  # characters of a raw id
# A number with a comma or point in it, at which it must not be split: 1,5  1,234.50  1.234,50
NUMBER = r"\d+[.,]\d{1,2}|\d{1,3}(,\d{3})+(\.\d+)?|\d{1,3}(\.\d{3})+(,\d+)?"
# What counts as missing depends on the column: "unknown" is no brand but may be a user's id, and None and Nil
# are films. Hence three lists: of values, of ids, of titles.
MISSING = {"", "-", "--", "?", "n/a", "na", "nan", "none", "null", "nil", "unknown", "undefined", "\\n",
           "not available", "(no genres listed)", "#n/a", "#ref!", "#value!", "#name?", "(null)", "<na>",
           "nat"}  # what exports write where there is no value; "\\n" is MySQL's \N in small letters
NO_ID = {"nan", "null", "none", "nil", "\\n", "#n/a", "<na>", "undefined", "n/a",
         "(null)"}  # where there is no id
# Markup by its names, for 'x<y then 2>z' is none.
TAGS = (r"</?(?:a|b|i|u|p|br|em|strong|span|div|font|ul|ol|li|h[1-6]|img|table|tr|td|script|style)\b"
        r"[^<>]{0,200}>")
QUOTED = re.compile(r"""(['"])((?:\\.|(?!\1).)*)\1""")  # what stands between two equal quotation marks
NO_TITLE = (NO_ID - {"none", "nil"}) | {"-", "n/a", "#ref!", "(null)"}  # where there is no title


def opened(path):
    """A file or .gz, to read bytes."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def read_lines(path, encoding=None):
    """Non-empty lines of a file or .gz, as bytes or, with an encoding, as text."""
    try:
        with opened(path) as raw:
            file = raw
            if encoding:
                file = io.TextIOWrapper(raw, encoding, errors="replace", newline="")
            line = file.readline(MAX_LINE)
            while line:
                if len(line) == MAX_LINE:
                    raise UserError(f"a line of {path.name} has no end", path, "give one record a line")
                if not line.isspace():
                    yield line
                line = file.readline(MAX_LINE)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path.name}: {error}", path, "fetch it or mend the path") from None


def good(found, parse, path):
    """Yield parse(record) of every record that it can parse; a few others are skipped, the first is shown.

    UserError, after the last record, where more than MAX_BAD of them cannot be parsed.
    """
    count = 0
    bad = 0
    example = None
    for count, record in enumerate(progress(found, path.name, "lines"), 1):
        try:
            yield parse(record)
        except MemoryError:  # the record is not to blame
            raise
        except Exception as error:
            bad += 1
            why = str(error) if isinstance(error, csv.Error) else repr(error)
            example = example or f"record {count}: {why:.150}"
    if bad > MAX_BAD * count:
        raise UserError(f"{bad:,d} of {count:,d} records cannot be read, the first is {example}", path,
                        "mend these lines, or name the right --dataset or columns")
    if bad:
        print(f"{path.name}: skipped {bad:,d} bad of {count:,d} records, the first is {example}")


def exactly(count, cells):
    if len(cells) != count:
        raise ValueError(f"{len(cells)} cells, not {count}")
    return cells


def decoded(line):
    """Text of a line in UTF-8 or, as MovieLens' old files are, in ISO-8859-1."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode("latin-1")


def read_cells(path, separator, count, parse=lambda *cells: cells):
    """parse(*cells) of every line of a file without a header; `count` cells a line."""
    def parse_line(line):
        return parse(*exactly(count, decoded(line).rstrip("\r\n").split(separator)))

    return good(read_lines(path), parse_line, path)


SURROGATE = re.compile("[\udc80-\udcff]")


def encoding_of(path):
    """UTF-16 by its byte order mark, UTF-8 if little of the file is not, else Windows-1252."""
    # What is no UTF-8 becomes a surrogate, a byte each, which no UTF-8 file can hold otherwise.
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    wrong = 0  # bytes that are no UTF-8
    right = 0  # characters beyond ASCII that are
    sample = ""  # the first line that has a wrong one
    try:
        with opened(path) as file:
            part = file.read(2**20)
            if part.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return "utf-16"
            if part.startswith(b"PK\x03\x04"):
                raise UserError(f"{path.name} is a spreadsheet", path, "save it as a csv file in UTF-8")
            while part:
                text = decoder.decode(part)
                unread = len(SURROGATE.findall(text))
                if unread and not sample:  # the first such byte may end the part before: then the next one
                    line = next((line for line in part.splitlines()
                                 if SURROGATE.search(line.decode(errors="surrogateescape"))), b"")
                    sample = line.decode("cp1252", "replace")[:60]
                wrong += unread
                right += len(text) - len(text.encode("ascii", "ignore")) - unread
                part = file.read(2**20)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path.name}: {error}", path, "fetch it or mend the path") from None
    if not wrong:
        return "utf-8-sig"
    if 4 * wrong < right:
        print(f"WARNING: {path.name} has {wrong:,d} bytes that are no UTF-8; they are read as \ufffd")
        return "utf-8-sig"
    print(f"WARNING: {path.name} is not in UTF-8 and read as Windows-1252: '{sample}'. Where this is wrong, "
          "save it in UTF-8")
    return "cp1252"


def csv_records(texts, separator):
    """Yield a list of cells for each record, or the csv.Error where there is none.

    A quoted cell may hold line breaks: lines are added until Python's csv reader finds a record. A quote that
    is never closed costs its own line alone, for the lines after it are put back into `again`, unless one of
    the next MAX_BREAKS lines happens to close it.
    """
    texts = iter(texts)
    again = []  # lines to be read once more, the next one last
    width = None  # cells of the header
    mark = None  # pattern of a separator between two cells
    while True:
        line = again.pop() if again else next(texts, None)
        if line is None:
            return
        record = [line]
        found = None
        while found is None:
            try:
                found = next(csv.reader(record, delimiter=separator, strict=True, skipinitialspace=True))
            except csv.Error as error:
                goes_on = "unexpected end" in str(error) and len(record) < MAX_BREAKS
                line = None
                if goes_on:
                    line = again.pop() if again else next(texts, None)
                if line is None:
                    found = error
                    if len(record) == MAX_BREAKS:
                        found = csv.Error(f"a quoted cell goes on for {MAX_BREAKS} lines or more")
                    again.extend(reversed(record[1:]))
                else:
                    record.append(line)
        # Where each line, the first included, has as many cells as the header, these were records of their
        # own, and the quotation mark that joined them is stray. (A comma of a text has a blank behind it.)
        is_joined = isinstance(found, list) and len(record) > 1 and width
        if is_joined and all(len(mark.findall(line)) + 1 >= width for line in record):
            found = csv.Error("a quotation mark is never closed")
            again.extend(reversed(record[1:]))
        if width is None:
            width = len(found) if isinstance(found, list) else 0
            blank_follows = f"{separator} " in record[0]
            mark = re.compile(re.escape(separator) + ("" if blank_follows else "(?! )"))
        yield found


def read_table(path, columns, parse=lambda *cells: cells):
    """parse(*cells of these columns) of every record of a csv file; its header tells the separator."""
    texts = read_lines(path, encoding_of(path))
    header = next(texts, "").rstrip("\r\n")
    if header.lower().startswith("sep="):  # a hint for spreadsheets
        header = next(texts, "").rstrip("\r\n")
    if header.lstrip().startswith(("#", "--", "{", "[")):
        raise UserError(f"{path.name} begins with '{header.strip()[:40]}', which is no header", path,
                        "take comments out, or convert JSON to csv")
    if not header or "\0" in header:
        raise UserError(f"{path.name} is empty or no text", path, "give a csv file in UTF-8 with a header")

    def columns_found(mark):
        names = {name.strip(' "') for name in header.split(mark)}
        return len(names & set(columns)), header.count(mark)

    # The separator under which most of the wanted columns are found, among equals the commonest.
    separator = max(",;|\t", key=columns_found)
    records = csv_records(itertools.chain([header], texts), separator)
    names = next(records, [])
    # Spreadsheets leave rows of empty cells at the end.
    records = (record for record in records if isinstance(record, csv.Error) or any(record))
    if isinstance(names, csv.Error):
        raise UserError(f"the header of {path.name} cannot be read: {names}", path, "give a header line")
    names = [name.strip() for name in names]
    missing = [column for column in columns if column not in names]
    if missing:
        what = f"{path.name} has no column {', '.join(missing)}; it has {', '.join(names)[:200] or 'none'}"
        todo = "with --dataset csv name the columns by the --...-col flags (of --items-file: --item-id-col)"
        if any(re.fullmatch(r"-?\d+(\.\d+)?", name) for name in names):
            todo = "its first line looks like data: put a header line with the columns' names above it"
        elif missing == ["rating"]:
            todo += "; without ratings add a column: 1 for what a user took, 0 for what they saw and left"
        raise UserError(what, path, todo)
    twice = [column for column in columns if names.count(column) > 1]
    if twice:
        raise UserError(f"{path.name} has the column {twice[0]} twice", path, "rename one of them")
    places = [names.index(column) for column in columns]

    def parse_wanted(record):
        if isinstance(record, csv.Error):
            raise record
        row = exactly(len(names), record)
        return parse(*[row[place].strip() for place in places])

    return good(records, parse_wanted, path)


def raw_id(value):
    """An id as text. Raises ValueError for what cannot be one."""
    text = str(value).strip()
    if type(value) not in (str, int) or not 0 < len(text) <= LONGEST_ID or not text.isprintable():
        raise ValueError(f"{value!r:.40} is no id")
    if text.lower() in NO_ID:
        raise ValueError(f"{text!r} is no id: it says that one is missing")
    if re.fullmatch(r"\d[.,]\d+E\+?\d+|\dE\+\d+", text, re.I):
        raise ValueError(f"{text!r} is no id: a spreadsheet rounded it; export ids as text")
    return text


def check_joined(source, raw_ids):
    """Are the ids of rated items those of described items? A spreadsheet drops leading zeros or adds a .0.

    UserError where items are described but no rated one is, or where more than half of the rated ones would
    be described but for such a difference; a WARNING where fewer would be.
    """
    def plain(raw):
        return re.sub(r"\.0+$", "", raw).lstrip("0").lower()

    described = source.titles.keys() | source.attributes.keys()
    by_plain = {plain(raw): raw for raw in described}
    strangers = [raw for raw in raw_ids if raw not in described]
    pairs = [(raw, by_plain[plain(raw)]) for raw in strangers if plain(raw) in by_plain]
    if described and len(strangers) == len(raw_ids):
        rated, listed = pairs[0] if pairs else (raw_ids[0], min(described))
        raise UserError(f"no rated item has a description: '{rated}' is rated, '{listed}' is described",
                        "the two files' item ids", "write the ids alike in both files, for leading zeros, a "
                        "final .0 and capitals count; or name another --item-id-col")
    if not pairs:
        return
    rated, listed = pairs[0]
    what = (f"{len(pairs):,d} of {len(raw_ids):,d} rated items have no description, but '{rated}' looks like "
            f"'{listed}', which has")
    todo = "write the ids alike in both files: leading zeros, a final .0 and capitals count"
    if 2 * len(pairs) > len(raw_ids):
        raise UserError(what, "the two files' item ids", todo)
    print(f"WARNING: {what}; {todo}")


def clean_text(text):
    """One line of plain text, at most MAX_TITLE long: no entities, markup or control characters."""
    longest = 20 * MAX_TITLE  # much more, for markup and entities will go
    text = html.unescape(str(text)[:longest])
    text = re.sub(TAGS, " ", text, flags=re.I)
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return text if len(text) <= MAX_TITLE else text[:MAX_TITLE].rsplit(" ", 1)[0]


def values_of(cell, separator):
    """The values in a cell, each once: between separators, or a list as JSON, Python or numpy writes it."""
    text = str(cell).strip()
    if text.lower() in MISSING or re.fullmatch(NUMBER, text):
        # One value: a slash would split n/a, a comma 1,5. A year that went through pandas is 1997.0.
        parts = [re.sub(r"^(\d+)\.0$", r"\1", text)]
    elif is_list(text):
        parts = listed_values(text)
    else:
        parts = text.split(separator)
    values = {}
    for part in parts:
        value = clean_text(part).lower()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1].strip()
        if value not in MISSING:
            values[value] = True
    return list(values)


def is_list(text):
    """Did a program write a list, tuple, set or array into this cell? (comedy)|(drama) and (5) are none."""
    ends = text[:1] + text[-1:]
    if ends not in ("[]", "()", "{}"):
        return False
    try:
        return isinstance(ast.literal_eval(text), (list, tuple, set, dict, str))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass  # no Python literal, but perhaps a list as numpy or JSON writes it, or without quotation marks
    # It is one if the first bracket closes at the end.
    depth = 0
    for place, char in enumerate(text):
        depth += (char == ends[0]) - (char == ends[1])
        if not depth:
            return place == len(text) - 1 and (ends != "()" or "," in text)
    return False


def listed_values(text):
    """The texts in a list, tuple, set or array that a program wrote into a cell.

    Where it holds records, as {'id': 18, 'name': 'Drama'}, the name of each, or the first text in it.
    """
    found = None
    parsers = (json.loads, ast.literal_eval)
    if re.search(r"""['"]\s+['"]""", text):  # numpy's ['Action' 'Drama'], which Python would join
        parsers = ()  # quoted texts are looked for instead
    for parse in parsers:
        try:
            found = parse(text)
            break
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    if isinstance(found, set):
        found = sorted(found, key=str)
    if found is None:
        return [match[1].replace("\\'", "'") for match in QUOTED.findall(text)] or text[1:-1].split(",")
    if not isinstance(found, (list, tuple)):
        found = [found]
    texts = []
    for part in found:
        if isinstance(part, dict):
            by_key = {str(key).lower(): value for key, value in part.items()}
            words = [value for value in by_key.values() if isinstance(value, str)]
            part = by_key.get("name", words[0] if words else "")
        texts.append(part)
    return texts


ARTICLES = "The|A|An|Il|La|Le|Les|L'|Das|Der|Die|El|Los|Las|Un|Une|Det|Den"


def clean_title(text):
    """('The Matrix', 1999) from 'Matrix, The (1999)'; without a year (title, None).

    Series have the years from and to, or an open end: (1975-1979), (2007-); the first counts.
    """
    title, year = re.fullmatch(r"(.*?)\s*(?:\((\d{4})(?:[-\u2013](?:\d{4})?\s*)?\))?\s*", text).groups()
    title = re.sub(rf"^(.+?), ({ARTICLES})(?= \(|$)", r"\2 \1", title)
    return " ".join(title.split()), int(year) if year else None


def era_of(year):
    """[the decade of a year from 1920 to 2029, as one word that could stand in theta's place], else []."""
    words = ("twenties thirties forties fifties sixties seventies eighties nineties noughties "
             "twenty-tens twenty-twenties").split()  # from 1920 on
    return [words[year // 10 - 192]] if year and 1920 <= year < 2030 else []


GROUPLENS = "https://files.grouplens.org/datasets/movielens/"


def download(name, needed):
    """The folder data/<name> of GroupLens' archive, fetched unless the file `needed` is in it."""
    url = f"{GROUPLENS}{name}.zip"
    target = Path("data", name)
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
        if (target / needed).exists():  # another command has fetched it meanwhile
            return target
        raise UserError(f"cannot download {name}: {error}", url,
                        f"give the folder of {needed} as --data-dir") from None
    return target


# -------- products: Amazon, Yelp, NETE

RELEASES = {  # what to fetch, patterns of the reviews and the products file
    "amazon": ("reviews and meta_*.jsonl.gz of a category from amazon-reviews-2023.github.io",
               r"(?!meta_).*\.jsonl?(\.gz)?", r"meta_.*\.jsonl?(\.gz)?"),
    "yelp": ("*review.json and *business.json from www.yelp.com/dataset",
             r".*review\.json(\.gz)?", r".*business\.json(\.gz)?"),
    "nete": ("reviews.pickle, item.json from github.com/lileipisces/NETE", r"reviews\.pickle", r"item\.json"),
}
YELP_PRICES = {"1": "cheap", "2": "moderate", "3": "expensive", "4": "luxurious"}
# A short text with a price, or with a range of which the first counts: 'from $14.99', '1,299.00 - 1,500.00'
PRICE_TEXT = re.compile(
    r"[^\d{}<>:]{0,12}(?P<number>\d[\d,]*(?:\.\d+)?)(?:\s*(?:-|\u2013|to)\s*[^\d{}]{0,4}\d[\d,.]*)?[^\d{}<>]{0,12}")


def load_release(args):
    """Amazon (2014, 2018, 2023), Yelp's academic files, or the NETE / PEPLER release."""
    folder = args.data_dir or Path("data", args.dataset)
    what, reviews_pattern, products_pattern = RELEASES[args.dataset]
    names = sorted(path for path in folder.glob("*") if path.is_file() and not path.name.startswith("."))
    reviews = [path for path in names if re.fullmatch(reviews_pattern, path.name)]
    products = [path for path in names if re.fullmatch(products_pattern, path.name)]
    if len(reviews) != 1 or len(products) != 1:
        several = []
        for files in (reviews, products):
            if len(files) > 1:
                several += [path.name for path in files]
        todo = f"fetch {what}, or change --data-dir"
        if several:
            todo = f"leave one of {', '.join(several)}" + ("" if reviews and products else f"; {todo}")
        raise UserError(f"{len(reviews)} files of reviews and {len(products)} of products, not one each",
                        folder, todo)
    profiles = (BRAND, PRICE)
    task_prompt = BOUGHT
    if args.dataset == "yelp":
        profiles = (PLACE, PLACE_PRICE)
        task_prompt = VISITED
    source = collect(good(records(reviews[0]), parse_review, reviews[0]), profiles, task_prompt)
    known = set(source.item_ids)
    facts = {}
    unrated = None  # one of the products that nobody has reviewed
    for fact in good(records(products[0]), parse_product, products[0]):
        if fact["id"] in known:
            earlier = facts.setdefault(fact["id"], fact)
            for key, value in fact.items():  # a second line of a product fills in what the first lacks
                earlier[key] = earlier[key] or value
        else:
            unrated = fact["id"]
    if known and unrated is not None and not facts:
        reviewed = source.item_ids[0]
        raise UserError(f"no reviewed product is described: '{reviewed}' is reviewed, '{unrated}' described",
                        folder, "take the reviews and the products of one category")
    source.titles, source.attributes = describe_products(facts)
    return source


class PlainUnpickler(pickle.Unpickler):
    """Builds plain data; a pickle that names a class or function is refused, not run."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}")


def records(path):
    """The records of a pickled list or JSON array; of any other file its lines, still to be parsed."""
    try:
        if path.suffix == ".pickle":
            found = PlainUnpickler(path.open("rb")).load()
        elif path.suffix == ".json" and path.open("rb").read(1) == b"[":
            found = json.loads(path.read_text("utf-8"))
        else:
            return read_lines(path)
        wrong = f"holds a {type(found).__name__}, not a list"
    except MemoryError:
        raise
    except Exception as error:
        found = None
        wrong = f"cannot be read: {error}"
    if not isinstance(found, list):
        raise UserError(f"{path.name} {wrong}", path.parent, "use the file as published")
    return found


def parse_record(line):
    """A record from the line that holds it: JSON or, in Amazon 2014, a Python literal, which is not run."""
    try:
        return json.loads(line) if isinstance(line, bytes) else line
    except ValueError:
        return ast.literal_eval(line.decode().strip())


def first(record, *keys):
    """The first of these entries that is neither empty nor NaN, which alone is not itself; else ''."""
    return next((record[key] for key in keys if record.get(key) and record[key] == record[key]), "")


def parse_review(line):
    """rating() of a review in any release's spelling."""
    record = parse_record(line)
    # Yelp has dates. Their digits, year to second, sort as seconds do, and times are for sorting alone.
    date = re.sub(r"\D", "", str(first(record, "date")))[:14]
    return rating(
        first(record, "reviewerID", "user_id", "user"),
        first(record, "parent_asin", "asin", "business_id", "item"),
        first(record, "overall", "rating", "stars"), first(record, "unixReviewTime", "timestamp") or date)


BYLINE = re.compile(r"\s*by\s*\n")  # before some brands of Amazon's files of 2018: "by" and a new line
AUTHOR_PAGE = re.compile(r"\s*Visit Amazon's (.+) Page\s*")  # what they have in place of an author's name
# What stands behind a name in the files of 2023, which took it from a page: "(Author)", "Format: Audio CD"
CREDIT = re.compile(r"""(?<!\s)(\s*\((Actor|Artist|Author|Composer|Conductor|Contributor|Creator|Director|
    Editor|Illustrator|Narrator|Orchestra|Performer|Photographer|Producer|Translator|Writer)\b
    |(\A|\s{2,})(Format|Rated):).*""", re.S | re.X)
# A comma between two of Yelp's categories, and none within Books, Mags, Music & Video; Beer, Wine & Spirits;
# Used, Vintage & Consignment; Wills, Trusts, & Probates
BETWEEN_CATEGORIES = re.compile(
    r",(?!\s*(?:Mags|Music & Video|Wine & Spirits|Vintage & Consignment|Trusts, & Probates|& Probates)\b)")
SOURCE_CODE = re.compile(r"getTime\(\)|<!doctype", re.I)  # some titles there are the source of a web page


def parse_product(line):
    """{id, title, brand, categories, price, level}, None or empty where missing."""
    record = parse_record(line)
    # Amazon lists a path from the root to a leaf, in 2014 several, and the leaf is taken; Yelp and NETE write
    # names into one text, separated by commas. At most three are kept.
    found = first(record, "categories", "category") or [""]
    path = found[0] if isinstance(found[0], list) else found
    names = BETWEEN_CATEGORIES.split(path) if isinstance(path, str) else path
    cleaned = [clean_text(name).lower() for name in names]
    categories = [name for name in cleaned if name not in MISSING]  # a leaf may be markup alone
    details = record.get("attributes")  # of Yelp, with a price range from 1 to 4
    price_range = details.get("RestaurantsPriceRange2") if isinstance(details, dict) else None
    brand = BYLINE.sub("", str(first(record, "brand", "store")), count=1)
    on_a_page = AUTHOR_PAGE.fullmatch(brand)
    brand = clean_text(CREDIT.sub("", on_a_page[1] if on_a_page else brand)).lower()
    title = str(first(record, "title", "name"))
    return {
        "id": raw_id(first(record, "parent_asin", "asin", "business_id", "item", "id")),
        "title": "" if SOURCE_CODE.search(title) else clean_text(title),
        "brand": "" if brand in MISSING else brand,
        "categories": categories[:3] if isinstance(path, str) else categories[-1:],
        "price": price_of(first(record, "price")),
        "level": YELP_PRICES.get(re.sub(r"\D", "", str(price_range)))}


def price_of(value):
    """The price that a number or a short text names, or None."""
    found = PRICE_TEXT.fullmatch(str(value).strip())
    if not found:
        return None
    number = found["number"]
    if re.fullmatch(r"\d+,\d{1,2}", number):  # a decimal comma
        return float(number.replace(",", "."))
    return float(number.replace(",", ""))


def level_of(price, low, high):
    """Is a price cheap, ordinary or luxurious? low, high: the bounds of the middle third; where one price
    fills it, both are this price, which is ordinary."""
    if price > high:
        return "luxurious"
    if price > low or price == high:
        return "ordinary"
    return "cheap"


def describe_products(facts):
    """(titles, attributes) of {id: product}: brand or else categories as the hobby, price as the background.

    A price is a word, cheap, ordinary or luxurious: it tells in which third of its category's prices it lies,
    or of all prices where the category has fewer than 9. The prices are those of all reviewed products, in
    whatever split their reviews are: a shop's prices say nothing of what a user liked.
    """
    prices_of = {}  # of each category
    everything = []
    for fact in facts.values():
        if fact["price"] is not None:
            prices_of.setdefault(tuple(fact["categories"][-1:]), []).append(fact["price"])
            everything.append(fact["price"])
    bounds = {}
    for category, prices in prices_of.items():
        enough = prices if len(prices) >= 9 else everything
        bounds[category] = np.quantile(enough, (1 / 3, 2 / 3))
    titles = {}
    attributes = {}
    for raw, fact in facts.items():
        level = fact["level"]  # Yelp's own word; there are no prices
        if fact["price"] is not None:
            level = level_of(fact["price"], *bounds[tuple(fact["categories"][-1:])])
        titles[raw] = fact["title"]
        attributes[raw] = {"hobby": [fact["brand"]] if fact["brand"] else fact["categories"],
                           "background": [level] if level else []}
    return titles, attributes


# -------- main

LOADERS = {"demo": load_demo, "ml-100k": load_movielens, "ml-1m": load_movielens, "amazon": load_release,
           "nete": load_release, "yelp": load_release, "csv": load_csv}


def main():
    args = parse_arguments()
    reads = args.ratings_file or args.data_dir or f"data/{args.dataset}"
    announce("01 prepare data", args, "nothing: the demo is made up" if args.dataset == "demo" else reads)
    source = LOADERS[args.dataset](args)
    check_ratings(source.ratings, args.positive_above)
    dataset, truth = build(source, args)
    dropped = sorted(set(source.user_ids) - set(dataset.users))
    facts = save(args.run, dataset, truth, args, dropped)
    show(dataset, facts)
    planted = "" if truth is None else " truth.npy"
    print(f"\nwrote dataset.json interactions.npy users.json items.json dropped_users.json{planted} to "
          f"{args.run}\nnext: python 02_infer_profiles.py --run {args.run}")


if __name__ == "__main__":
    guarded(main, "cut the files to fewer rows")
