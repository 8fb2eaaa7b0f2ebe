"""Assignment 9: from words to a prior, as in 02 --space words.                 pytest -m a9 tests/assignments

Somebody's hobby is music, or fishing, or something between and beside them. The LLM has a vector for each of
these words, so a soft token for "hobby" should lie where such words lie: near their mean, and away from it
in the directions in which they differ. That is a Gaussian, fitted to the words' vectors e_w with weights p_w
(the roots of how common the words are, so that a rare one counts too; they add up to 1):

    origin     = sum_w p_w e_w
    covariance = sum_w p_w (e_w - origin) (e_w - origin)^T  =  basis^T basis
    theta      = origin + z basis,    z ~ N(0, I)

n words span at most n - 1 directions: a user is a few numbers z and not d of them. The rows of the basis are
the principal directions, each as long as the standard deviation along it, the longest first. (By default
stage 02 begins at the same origin, but moves in all d coordinates and keeps those directions in which users
turn out to differ, DEVIATION(4): what do words miss that users have?)

You write two functions. The tests compare your covariance with one made by loops, ask for each word's z
(which puts theta on the point nearest to the word; with n - 1 directions that is the word itself), and hold
your gradient against finite differences: since theta is linear in z, the likelihood's gradient in theta is
all that the LLM has to give.

Then, on paper: what does `--space words --rank 1` leave of four hobbies? What does a word that is in the list
twice do?
"""


def prior_of_words(vectors, counts, rank):
    """(origin (d,), basis (r, d), coordinates (n, r)), r = min(rank, n - 1); vectors (n, d), counts (n,).

    All are torch tensors of float, or of double where the test's are.
    """
    raise NotImplementedError("a9: a singular value decomposition of sqrt(p_w) (e_w - origin) has it all")


def gradient_in_z(gradient, basis, z, prior):
    """Gradient (B, r) of nll(theta(z)) + prior / 2 ||z||^2. gradient (B, d): of nll in theta; z (B, r)."""
    raise NotImplementedError("a9: the chain rule, and the prior's own pull")
