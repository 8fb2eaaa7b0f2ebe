"""Assignment 5: from soft tokens to a feature bank, Eq. (6), and its health.   pytest -m a5 tests/assignments

A recommender does not want 4,096 numbers a user but one small id for each profile:

    c_m = argmin_k ||theta^m - v_k^m||^2

The ids of all users wait in the feature bank, int16 (U, M). A user without a history has no theta of his own;
give him the code K_m of each profile, one beyond the codebook, which means unknown, and which the
recommender's embedding table has a row for.

Then measure the codebook. One that starts far from every theta may end with a single code in use, and nobody
sees it who only looks at a loss. Perplexity, exp of the entropy (in nats) of how often each code is used,
says how many codes are at work: 1 when all users share one, K when all are used alike. Codes that nobody uses
count as zero, not as NaN.

The tests compare with brute force over users and codes, check that a user's id depends on him and the
codebooks alone (not on who else is in the batch), ties (the lowest code wins), the unknown code, and
perplexity at both ends and between.
"""


def feature_bank(theta, books, known):
    """int16 (U, M). theta: float32 array (U, M, d); books: M arrays (K_m, d); known: bool array (U,)."""
    raise NotImplementedError("a5: nearest code for those who are known, K_m for those who are not")


def perplexity(codes, size):
    """exp of the entropy of the usage of codes 0 .. size - 1; codes: int array (n,)."""
    raise NotImplementedError("a5: how many codes are at work?")
