"""Assignment 7: bring your own ids.                                            pytest -m a7 tests/assignments

Stage 04 does not care where an id comes from. Beside feature_bank.npy it takes any bank that lies in the
run's folder under a name of yours, with a card that says what it is:

    feature_bank_NAME.npy    int16 (U, M'): M' codes of each user, by user index
    feature_bank_NAME.json   {"codes": [K_1, ..., K_M'], "dataset_fingerprint": ..., "made_by": ...}

A code of column m is one of 0 ... K_m - 1; the value K_m means unknown, and nothing else does. Think of
something that a user's rows say about him: the decade he likes, his share of likes in eight steps, the item
he likes most, clusters of whatever you can count. Write it, put it into the table, see whether it wins. In
the project's folder:

    python
    >>> from pathlib import Path
    >>> from tests.assignments.a7_own_ids import write_bank
    >>> write_bank(Path("runs/demo"), "NAME")
    >>> exit()
    python 04_train_ctr.py --run runs/demo --ids none,random-NAME,NAME,userip

`random-NAME` is your bank's own control: uniform codes, as many as yours. An id that does not beat it says
nothing.

The rules of evidence are the same for everybody, and the tests hold you to them:

  * codes are made from training and support rows alone (common.SEEN). Support rows are training rows of users
    whom the recommender will not meet: they must not end up as unknown, for these users are where an id pays;
  * a user without such a row has the unknown code in every column, and a user who likes something among these
    rows has it in none (what you cannot tell of him may have a code of its own);
  * the same rows give the same codes: seed what is random, and two users with the same rows have equal codes;
  * whatever happens to the user, label or item of a validation, test or cold row, no code changes;
  * the card carries the fingerprint of the data set that the codes were made from, so that stage 04 can
    refuse a bank that was made from another.

When you have passed: tools/controls.py holds seven such banks. Which of them does yours have to beat
before you may say that it has found out something about people?
"""


def make_bank(dataset):
    """(codes, sizes): an integer array (U, M') of your codes and the list of their counts [K_1, ..., K_M'].

    dataset: common.Dataset, as stage 01 wrote it. dataset.interactions is int (N, 4): user, item, label,
    split; dataset.rows(splits) gives the rows user, item, label of some splits; dataset.items has titles and
    attributes.
    """
    raise NotImplementedError("a7: two columns or one, but know what you look at")


def write_bank(run, name):
    """Make the bank of a run folder (a Path), and write feature_bank_NAME.npy and its .json into it."""
    raise NotImplementedError("a7: common.load_dataset, common.save_npy and common.save_json do most of it")
