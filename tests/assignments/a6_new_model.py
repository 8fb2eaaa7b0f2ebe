"""Assignment 6: a recommender of your own.                                     pytest -m a6 tests/assignments

Stage 04 knows a model by one line in `MODELS`: a class that takes the list of fields and maps ids (B,
columns) to logits (B,). Add the ancestor of half of them, the factorization machine (Rendle 2010):

    logit = b + sum_i w_i + sum_{i<j} <e_i, e_j>

w_i is a number and e_i a vector of width 8 for the id in field i. The base class `Recommender` gives you
both: `self.first_order(ids)` is the first two terms, (B,), and `self.embed(ids)` the vectors, (B, F, 8), with
F fields.

The sum over pairs costs F (F - 1) / 2 inner products as written; find the identity that needs F. The tests
compare with explicit loops, count on a model that is fast with 400 fields, and train it, through stage 04's
own loop, on a world where every user likes exactly one of two kinds of items and no first-order term helps:
logistic regression stays at chance there.

When you have passed, put it into a script of your own beside the stages, mine.py:

    from tests.assignments.a6_new_model import FM, ctr
    ctr.MODELS["fm"] = FM
    ctr.guarded(ctr.main)

and try, in a copy (`cp -r runs/demo runs/try`), `python mine.py --run runs/try --models fm,deepfm --ids
none,random,userip`. What does the deep half of DeepFM add?
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
ctr = importlib.import_module("04_train_ctr")


class FM(ctr.Recommender):
    """b + sum_i w_i + sum_{i<j} <e_i, e_j>. Rendle 2010, Eq. (1) and Lemma 3.1."""

    def forward(self, ids):
        """ids long (B, columns) -> logits (B,)."""
        raise NotImplementedError("a6: two terms from the base class, one of your own")
