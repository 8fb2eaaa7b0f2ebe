"""Assignment 8: the AUC within a user.                                         pytest -m a8 tests/assignments

AUC is the probability that a row that was liked gets a higher score than one that was not, over all pairs of
rows. Most of these pairs stand between two users. A recommender never chooses there: it ranks items for one
user at a time. GAUC (Zhu et al. 2017) asks within each user and averages, with the users' rows
as weights:

    GAUC = sum_u n_u AUC_u / sum_u n_u        over users with a like and a dislike among their n_u rows

A user of one label has no pair, hence no AUC, and does not count, neither above nor below. Where no user
counts there is no GAUC: return None. A pair of equal scores counts one half. Users are any integers, in any
order of rows.

Write it as you like; the project's own (`common.gauc`) does without a loop over users. The tests compare with
an explicit loop over users and scikit-learn, with ties, with users of one label, with weights that matter,
and check what must not matter: the order of the rows, the users' names, and any shift of one user's scores.

And a question. In `make_world` below users differ in two ways: how much they like at all, and which of two
kinds of items they like. Two recommenders:

    A  scores a row by the user's share of likes and looks at no item
    B  knows which kind each user likes and nothing of how much he likes at all

Guess first, then run `python tests/assignments/a8_gauc.py`, and fill in ANSWER. Then, on paper: the ids of a
`critic` or of `generosity` (tools/controls.py) lift the AUC of a model without the user id. Which decision of
a shop gets better by it?
"""

import numpy as np

ANSWER = {
    "AUC prefers": None,   # "A" or "B"
    "GAUC prefers": None,  # "A" or "B"
    "GAUC of A": None,     # a number, and why no other
}


def gauc(users, labels, scores):
    """float or None. users int (n,), labels 0 or 1 (n,), scores float (n,): arrays of numpy."""
    raise NotImplementedError("a8: an AUC a user, then the mean by rows")


def make_world(seed=0, users=400, each=30):
    """(users, labels, A's scores, B's scores), (n,) each."""
    rng = np.random.default_rng(seed)
    user, kind = np.repeat(np.arange(users), each), rng.integers(2, size=users * each)
    generosity, taste = rng.normal(0, 1.5, users)[user], rng.choice([-1, 1], users)[user] * (2 * kind - 1)
    label = (rng.random(len(user)) < 1 / (1 + np.exp(-generosity - 0.7 * taste))).astype(int)
    share = np.bincount(user, label) / each
    return user, label, share[user], taste.astype(float)


def show():
    from sklearn.metrics import roc_auc_score
    user, label, a, b = make_world()
    for name, scores in (("A", a), ("B", b)):
        print(f"{name}: AUC {roc_auc_score(label, scores):.3f}, GAUC {gauc(user, label, scores):.3f}")


if __name__ == "__main__":
    show()
