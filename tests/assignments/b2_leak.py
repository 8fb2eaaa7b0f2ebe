"""Find the planted bug 2: "the ids win on every data set".                     pytest -m b2 tests/assignments

Below is the whole road from a table of interactions to the AUC of a recommender with profile ids, in small: a
user's profile is the share of what he liked in each category, k-means makes K codes of it, and the
recommender predicts the mean label of the training rows with the same code and category. Run it to see why a
referee sent the paper back:

    python tests/assignments/b2_leak.py

    a world with taste:   AUC without ids 0.493, with random ids 0.499, with profile ids 0.762
    labels are coin flips: AUC without ids 0.502, with random ids 0.506, with profile ids 0.685

In the second world no id can know anything, and the random ids duly win nothing. All rows of the table are
trained on the same split, `evaluate` learns from training labels alone, and the codes were made before any
model was trained. Find the function and mend it inside. (Validation rows train nothing either: they choose
the epoch, in stage 04.) How much of the lift in the first world was real?

Then find the guard against this bug in the project: which test poisons what, and which files must not change
by a bit?
"""

import importlib
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
common, quantize = (importlib.import_module(name) for name in ("common", "03_quantize"))
CATEGORIES, K = 3, 8


def make_world(taste, seed=0, users=3000, each=20):
    """int (N, 4) user, category, label, split, as stage 01 writes them; taste 0: labels are coin flips."""
    rng = np.random.default_rng(seed)
    user, category = np.repeat(np.arange(users), each), rng.integers(CATEGORIES, size=users * each)
    odds = taste * rng.choice([-1, 1], size=(users, CATEGORIES))[user, category]
    split = np.full(len(user), common.TRAIN)
    order = rng.permutation(len(user))
    split[order[: len(user) // 10]] = common.VALIDATION
    split[order[len(user) // 10: len(user) // 5]] = common.TEST
    label = rng.random(len(user)) < 1 / (1 + np.exp(-odds))
    return np.stack([user, category, label, split], axis=1).astype(int)


def profile_codes(interactions):
    """int (U,): k-means codes of the users' shares of likes a category; half where a user met none of it."""
    users = interactions[:, 0].max() + 1
    cell = interactions[:, 0] * CATEGORIES + interactions[:, 1]
    met = np.bincount(cell, minlength=users * CATEGORIES)
    liked = np.bincount(cell, interactions[:, 2], minlength=users * CATEGORIES)
    theta = np.where(met > 0, liked / np.maximum(met, 1), 0.5)
    theta = theta.reshape(users, 1, CATEGORIES).astype(np.float32)
    books = quantize.first_codebooks(theta, [K], "kmeans", 0)
    return quantize.assign_all(quantize.torch.tensor(theta), books)[:, 0]


def evaluate(interactions, codes):
    """Test AUC of the mean training label for each (code, category), one like and one dislike added."""
    train, test = (interactions[interactions[:, 3] == split] for split in (common.TRAIN, common.TEST))
    cell = codes[train[:, 0]] * CATEGORIES + train[:, 1]
    size = (codes.max() + 1) * CATEGORIES
    rate = (np.bincount(cell, train[:, 2], minlength=size) + 1) / (np.bincount(cell, minlength=size) + 2)
    return common.auc(test[:, 2], rate[codes[test[:, 0]] * CATEGORIES + test[:, 1]])


def show():
    for name, taste in (("a world with taste:  ", 1.0), ("labels are coin flips:", 0.0)):
        interactions = make_world(taste)
        users = interactions[:, 0].max() + 1
        random = np.random.default_rng(1).integers(K, size=users)
        found = [evaluate(interactions, codes)
                 for codes in (np.zeros(users, int), random, profile_codes(interactions))]
        print(f"{name} AUC without ids {found[0]:.3f}, with random ids {found[1]:.3f}, "
              f"with profile ids {found[2]:.3f}")


if __name__ == "__main__":
    show()
