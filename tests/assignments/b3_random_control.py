"""Find the planted bug 3: "our ids beat random ids".                           pytest -m b3 tests/assignments

Below is a table in small, as stage 04 makes it: a recommender with each user's two ids, beside three
controls. `none` has no ids, `random` a uniform random code a user, `shuffled` the real codes on the wrong
users. In the first world a user's type decides what he likes; in the second it decides nothing. Run it:

    python tests/assignments/b3_random_control.py

    types decide:  AUC none 0.658, random 0.613, shuffled 0.637, profile 0.688
    types are air: AUC none 0.651, random 0.600, shuffled 0.629, profile 0.628

The authors point at the last line: profile ids beat random ids by .03, and on every seed by something, so
there must be something in them. There cannot be. Nothing leaks (`evaluate` learns from training rows alone),
all four are trained on the same split, and a meaningless id may well cost a little, for it cuts the training
rows into smaller cells. But two controls that know nothing should cost the same.

Find the function, say in a sentence what its control differs in beside knowing nothing, and mend it inside.
What is left of the authors' claim? Then look for the guard in the project: where do the code counts of
`random` come from in stage 04's `codes_of`, and which count does a bank of your own (assignment a7) get?
"""

import importlib
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
common = importlib.import_module("common")
ITEMS, SIZES = 40, (24, 2)


def make_world(taste, seed=0, users=2000, each=15):
    """(interactions int (N, 4) user, item, label, split; codes (U, 2)): codes are the users' true types."""
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(size, size=users) for size in SIZES], axis=1)
    user, item = np.repeat(np.arange(users), each), rng.integers(ITEMS, size=users * each)
    liking = [taste * rng.normal(size=(size, ITEMS))[codes[user, m], item] for m, size in enumerate(SIZES)]
    odds = rng.normal(0, 0.5, ITEMS)[item] + sum(liking)
    label = rng.random(len(user)) < 1 / (1 + np.exp(-odds))
    split = np.where(rng.random(len(user)) < 0.8, common.TRAIN, common.TEST)
    return np.stack([user, item, label, split], axis=1).astype(int), codes


def shuffled_codes(codes, sizes, rng):
    """Control: the real codes (U, M), permuted over users."""
    return codes[rng.permutation(len(codes))]


def random_codes(codes, sizes, rng):
    """Control: a uniform random code for each user and profile, (U, M). sizes: each profile's code count."""
    return rng.integers(max(sizes), size=codes.shape)


def evaluate(interactions, codes):
    """Test AUC of naive Bayes: the item's log odds of a like, plus what each of the user's codes adds."""
    train, test = (interactions[interactions[:, 3] == split] for split in (common.TRAIN, common.TEST))

    def log_odds(cell, size):  # one like and one dislike added to each cell
        return np.log((np.bincount(cell, train[:, 2], minlength=size) + 1)
                      / (np.bincount(cell, 1 - train[:, 2], minlength=size) + 1))

    alone = log_odds(train[:, 1], ITEMS)
    score = alone[test[:, 1]]
    for column in codes.T:
        cells = log_odds(column[train[:, 0]] * ITEMS + train[:, 1], (column.max() + 1) * ITEMS)
        score = score + cells[column[test[:, 0]] * ITEMS + test[:, 1]] - alone[test[:, 1]]
    return common.auc(test[:, 2], score)


def table(taste, seed=0):
    """{row: test AUC}."""
    interactions, codes = make_world(taste, seed)
    rng = np.random.default_rng(seed + 100)
    rows = {"none": codes[:, :0], "random": random_codes(codes, SIZES, rng),
            "shuffled": shuffled_codes(codes, SIZES, rng), "profile": codes}
    return {name: evaluate(interactions, own) for name, own in rows.items()}


def show():
    for name, taste in (("types decide: ", 0.5), ("types are air:", 0.0)):
        print(f"{name} AUC " + ", ".join(f"{row} {auc:.3f}" for row, auc in table(taste).items()))


if __name__ == "__main__":
    show()
