"""Wrong solutions that the tests must catch: WRONG=1 pytest -m a7 runs the tests of a7 on each of these."""

import functools
import importlib
from types import SimpleNamespace

import numpy as np
import torch
from assignments import b3_random_control, reference
from sklearn.metrics import roc_auc_score

common = importlib.import_module("common")


# ---------------------------------------------------------------- a3

def quantize_by(distance, theta, codebook):
    codes = distance(theta[:, None] - codebook).argmin(1)
    chosen = codebook[codes]
    return (theta + (chosen - theta).detach(), codes, ((theta.detach() - chosen) ** 2).sum(1),
            ((theta - chosen.detach()) ** 2).sum(1))


def detached_the_other_way_round(theta, codebook):
    quantized, codes, codebook_term, commitment = reference.quantize_one(theta, codebook)
    return quantized, codes, commitment, codebook_term


a3 = {"nearest by one coordinate": functools.partial(quantize_by, lambda apart: apart[..., 0].abs()),
      "nearest by absolute values": functools.partial(quantize_by, lambda apart: apart.abs().sum(-1)),
      "terms changed over": detached_the_other_way_round}
a3 = {name: SimpleNamespace(quantize=quantize) for name, quantize in a3.items()}


# ---------------------------------------------------------------- a4

def cross_detached(x0, weights, biases):
    x = x0
    for w, b in zip(weights, biases):
        x = x0 * (x.detach() @ w)[:, None] + b + x
    return x


def cross_rebuilt(x0, weights, biases):
    return torch.tensor(reference.cross(x0, weights, biases).tolist())


def cross_from_the_last(x0, weights, biases):
    x = x0
    for w, b in zip(weights, biases):
        x = x * (x @ w)[:, None] + b + x
    return x


a4 = {"x detached": cross_detached, "numbers without a graph": cross_rebuilt,
      "x_l in the place of x_0": cross_from_the_last}
a4 = {name: SimpleNamespace(cross=cross) for name, cross in a4.items()}


# ---------------------------------------------------------------- a7

def write_as(make_bank, run, name, dtype=np.int16, **card):
    dataset = common.load_dataset(run)
    codes, sizes = make_bank(dataset)
    facts = {"codes": sizes, "dataset_fingerprint": dataset.fingerprint(), "made_by": "somebody"}
    common.save_npy(run / f"feature_bank_{name}.npy", codes.astype(dtype))
    common.save_json(run / f"feature_bank_{name}.json", {**facts, **card})


def share_of_likes(splits, unknown, dataset):
    """Eight levels of the share of likes among the rows of these splits; users without one get `unknown`."""
    rows, users = dataset.rows(splits), len(dataset.users)
    seen = np.bincount(rows[:, 0], minlength=users)
    level = (7.99 * np.bincount(rows[:, 0], rows[:, 2], minlength=users) / np.maximum(seen, 1)).astype(int)
    return np.where(seen > 0, level, unknown)[:, None], [8]


def solution(splits=common.SEEN, unknown=8, make=None, **card):
    make = make or functools.partial(share_of_likes, splits, unknown)
    return SimpleNamespace(make_bank=make, write_bank=functools.partial(write_as, make, **card))


def share_of_one(dataset):
    """Eight steps, and a ninth: whoever likes everything gets 8, which means unknown."""
    rows, users = dataset.rows(common.SEEN), len(dataset.users)
    seen = np.bincount(rows[:, 0], minlength=users)
    share = np.bincount(rows[:, 0], rows[:, 2], minlength=users) / np.maximum(seen, 1)
    return np.where(seen > 0, (8 * share).astype(int), 8)[:, None], [8]


def constant(dataset):
    """0 for whom there is a row, unknown for the others: right in form, and says nothing."""
    codes, _ = share_of_likes(common.SEEN, 8, dataset)
    return np.where(codes == 8, 2, 0), [2]


def count_of_rows(splits, dataset):
    """Column 1: the share of likes among rows that may be seen; column 2: how many rows of these splits."""
    codes, sizes = share_of_likes(common.SEEN, 8, dataset)
    count = np.bincount(dataset.rows(splits)[:, 0], minlength=len(dataset.users))
    count = np.where(codes[:, 0] == 8, 16, np.minimum(count, 15))
    return np.stack([codes[:, 0], count], axis=1), [*sizes, 16]


def order_in_place_of_rank(dataset):
    """argsort says who stands at a place, not at which place somebody stands: codes of other users."""
    rows, users = dataset.rows(common.SEEN), len(dataset.users)
    seen = np.bincount(rows[:, 0], minlength=users)
    share = np.bincount(rows[:, 0], rows[:, 2], minlength=users) / np.maximum(seen, 1)
    return np.where(seen > 0, share.argsort() * 8 // users, 8)[:, None], [8]


def users_of_the_rows(dataset):
    """As many users as the rows know: the last ones may have none."""
    codes, sizes = share_of_likes(common.SEEN, 8, dataset)
    return codes[:dataset.rows(common.SEEN)[:, 0].max() + 1], sizes


a7 = {"looks at every row": solution(splits=range(5)),
      "counts every row": solution(make=functools.partial(count_of_rows, range(5))),
      "counts test rows": solution(make=functools.partial(count_of_rows, (common.TEST,))),
      "leaves cold users unknown": solution(splits=(common.TRAIN,)),
      "gives strangers code 0": solution(unknown=0),
      "a share of one is unknown": solution(make=share_of_one),
      "a constant": solution(make=constant),
      "an order in the place of a rank": solution(make=order_in_place_of_rank),
      "as many users as the rows know": solution(make=users_of_the_rows),
      "floats": solution(dtype=np.float32),
      "a card of no data set": solution(dataset_fingerprint="mine")}


# ---------------------------------------------------------------- a8

def auc_by_pairs(labels, scores, tie=0.5):
    """Share of the pairs of a liked and another row in the right order; a tie counts as `tie` of a pair."""
    liked = scores[labels == 1][:, None]
    other = scores[labels == 0]
    return ((liked > other) + tie * (liked == other)).mean()


def each_user(users, labels, scores, tie=0.5):
    """(rows, AUC) of each user who has both labels."""
    for user in np.unique(users):
        own = users == user
        if 0 < labels[own].sum() < own.sum():
            yield own.sum(), auc_by_pairs(labels[own], scores[own], tie)


def plain_mean(users, labels, scores):
    found = [auc for _, auc in each_user(users, labels, scores)]
    return float(np.mean(found)) if found else None


def one_label_counts_half(users, labels, scores):
    found = list(each_user(users, labels, scores))
    left = len(users) - sum(rows for rows, _ in found)
    return float((sum(rows * auc for rows, auc in found) + left / 2) / len(users))


def ties_lost(users, labels, scores):
    found = list(each_user(users, labels, scores, tie=0))
    rows = sum(rows for rows, _ in found)
    return float(sum(own * auc for own, auc in found) / rows) if found else None


def over_all(users, labels, scores):
    return float(roc_auc_score(labels, scores)) if 0 < labels.sum() < len(labels) else None


a8 = {"users count alike": plain_mean, "users of one label count one half": one_label_counts_half,
      "a tie is lost": ties_lost, "AUC over all pairs": over_all}
a8 = {name: SimpleNamespace(**{**vars(reference.a8), "gauc": gauc}) for name, gauc in a8.items()}


# ---------------------------------------------------------------- a9

def weights_without_roots(vectors, counts, rank):
    return reference.prior_of_words(vectors, counts ** 2, rank)


def directions_of_length_1(vectors, counts, rank):
    origin, basis, coordinates = reference.prior_of_words(vectors, counts, rank)
    length = basis.norm(dim=1, keepdim=True)
    return origin, basis / length, coordinates * length.T


def not_centred(vectors, counts, rank):
    origin, _, _ = reference.prior_of_words(vectors, counts, rank)
    share = counts.sqrt() / counts.sqrt().sum()
    rank = min(rank, len(vectors) - 1)
    left, size, directions = (part[..., :rank] for part in (share.sqrt()[:, None] * vectors).svd())
    return origin, size[:, None] * directions.T, left / share.sqrt()[:, None]


def the_shortest_first(vectors, counts, rank):
    origin, basis, coordinates = reference.prior_of_words(vectors, counts, rank)
    return origin, basis.flip(0), coordinates.flip(1)


def coordinates_of_all_directions(vectors, counts, rank):
    """Each longer by what was left out."""
    origin, basis, coordinates = reference.prior_of_words(vectors, counts, rank)
    left_out = (len(vectors) - 1) / basis.shape[0]
    return origin, basis, left_out * coordinates


def prior_forgotten(gradient, basis, z, prior):
    return gradient @ basis.T


def origin_of_two_dimensions(vectors, counts, rank):
    origin, basis, coordinates = reference.prior_of_words(vectors, counts, rank)
    return origin[None], basis, coordinates


a9 = {"origin (1, d)": {"prior_of_words": origin_of_two_dimensions},
      "weights are the counts": {"prior_of_words": weights_without_roots},
      "directions of length 1": {"prior_of_words": directions_of_length_1},
      "words not centred": {"prior_of_words": not_centred},
      "the shortest direction first": {"prior_of_words": the_shortest_first},
      "coordinates too long where directions are left out": {"prior_of_words": coordinates_of_all_directions},
      "the prior forgotten": {"gradient_in_z": prior_forgotten}}
a9 = {name: SimpleNamespace(**{**vars(reference.a9), **change}) for name, change in a9.items()}


# ---------------------------------------------------------------- b3

def drawn(counts):
    return lambda codes, sizes, rng: rng.integers(counts(np.array(sizes)), size=codes.shape)


def one_draw_for_all_profiles(codes, sizes, rng):
    return rng.integers(max(sizes), size=(len(codes), 1)) % sizes


b3 = {"the smallest count for all": drawn(min), "the last code never drawn": drawn(lambda sizes: sizes - 1),
      "the codes permuted": b3_random_control.shuffled_codes, "one draw for all": one_draw_for_all_profiles}
b3 = {name: SimpleNamespace(**{**vars(b3_random_control), "random_codes": draw}) for name, draw in b3.items()}
