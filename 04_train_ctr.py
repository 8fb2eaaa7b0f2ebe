"""Stage 04: train recommenders with the ids of the feature bank as ordinary sparse features. Paper: sections 2.5 and 3.

    y_hat = Rec[i, c_1, ..., c_M, E_obs]                                                             Eq. (8)
    loss  = -sum_n [y_n log(y_hat_n) + (1 - y_n) log(1 - y_hat_n)]                                    Eq. (9), completed

No LLM is loaded: the profile of a user is M small integers. Every table has the controls that decide whether an id says
anything: `none` (no ids), `random` (a uniform code per user) and `shuffled` (the real codes, permuted over users).

Reads:  dataset.json interactions.npy users.json items.json (01), feature_bank.npy quantize.json (03),
        truth.npy for --ids planted, profiles.npy for --profile-input embedding
Writes: results.json (a row per model x ids x seed, and their summary), ctr_<model>.pt and .json (state dict of the best epoch, what it
        was trained on), predictions/ (test probabilities of each row of the table); with --score scores.csv

Run:
    python 04_train_ctr.py                                                        # the demo, DCN, 5 seeds: 1 min
    python 04_train_ctr.py --models all --ids none,random,shuffled,userip         # Tables 2 and 4
    python 04_train_ctr.py --score pairs.csv                                      # user_id,item_id -> probability, by ctr_dcn.pt
"""

import contextlib
import copy
import csv
import datetime
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.stats  # comes with scikit-learn
import sklearn
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import (DCN, TEST, TRAIN, VALIDATION, Field, FieldEmbedding, Parser, UserError, announce, at_least, atomic, auc, check_same,
                    fingerprint, guarded, linear, load, load_dataset, load_truth, logloss, mean_sd, mlp, one_run_at_a_time,
                    parameter_counts, pick_device, save_json, save_npy, save_torch, seeded)

# ---------------------------------------------------------------- settings

IDS = ("none", "random", "shuffled", "userip", "planted")
FIELDS = ("ids", "ids+attributes", "attributes")
CHUNK = 2**22      # rows of interactions.npy in memory at once
BOOTSTRAP = 200    # resamples of the test rows


def names_of(known):
    """argparse type: a comma-separated choice of known names, or all."""
    def parse(text):
        names = list(known) if text == "all" else [name.strip().lower() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise ValueError(f"unknown {', '.join(unknown) or 'empty list'}; known: {', '.join(known)}")
        return list(dict.fromkeys(names))
    return parse


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument("--models", default="dcn", help=f"comma-separated, or all; known: {', '.join(MODELS)}")
    parser.add_argument("--ids", default=None, help=f"comma-separated of {','.join(IDS)} (default: all that the run has)")
    parser.add_argument("--seeds", type=at_least(1), default=5, help="number of repetitions, paired over --ids")
    parser.add_argument("--fields", choices=FIELDS, default="ids",
                        help="ids: user + item id (the paper's); ids+attributes: item attributes too; attributes: item id + attributes, no user")
    parser.add_argument("--profile-input", choices=("codes", "embedding"), default="codes",
                        help="what userip feeds: the codes, or theta itself through a learned projection (Table 3, without VQ)")
    parser.add_argument("--epochs", type=at_least(1), default=60, help="most epochs")
    parser.add_argument("--patience", type=at_least(1), default=5, help="stop after this many epochs without a better validation AUC")
    parser.add_argument("--batch-size", type=at_least(2), help="rows per step (default: 1/160 of the training rows, within 128-1024)")
    parser.add_argument("--lr", type=at_least(1e-12, float), default=1e-3, help="Adam step size (paper: 0.001)")
    parser.add_argument("--weight-decay", type=at_least(0, float), default=1e-4, help="L2 penalty in Adam (paper: not said)")
    parser.add_argument("--score", type=Path, help="CSV with the columns user_id,item_id: write its probabilities to scores.csv, train nothing")
    args = parser.parse_args()
    for flag, known in (("models", MODELS), ("ids", IDS)):
        if getattr(args, flag) is not None:
            try:
                setattr(args, flag, names_of(known)(getattr(args, flag)))
            except ValueError as error:
                parser.error(f"--{flag}: {error}")
    return args


# ---------------------------------------------------------------- data

def attribute_table(dataset, name):
    """(int64 (I, width) value indices padded with the number of values, number of values) of one item attribute."""
    values = sorted({value for item in dataset.items for value in item["attributes"].get(name, [])})
    index = {value: i for i, value in enumerate(values)}
    width = max([len(item["attributes"].get(name, [])) for item in dataset.items] + [1])
    table = np.full((len(dataset.items), width), len(values), dtype=np.int64)
    for row, item in zip(table, dataset.items):
        found = [index[value] for value in item["attributes"].get(name, [])]
        row[:len(found)] = found
    return table, len(values)


def build_features(dataset, kind, codes, sizes, theta=None):
    """(fields, lookup) where lookup(users, items) gives the (n, columns) ids of those pairs; index U or I is an unseen user or item.

    kind: ids | ids+attributes | attributes. codes: None or int (U, M); sizes: K_m, the code that means unknown. theta: None or
    float (U, M, d), then the profile fields are projections of theta instead of codes.
    """
    n_users, n_items = len(dataset.users), len(dataset.items)
    user_fields, user_tables = [], [np.zeros((n_users + 1, 0), dtype=np.int64)]
    if kind != "attributes":
        user_fields.append(Field("user", n_users))
        user_tables.append(np.arange(n_users + 1)[:, None])
    if theta is not None:
        theta = np.concatenate([theta, np.zeros_like(theta[:1])])
        user_fields += [Field(f"profile_{m}", n_users + 1, vectors=torch.tensor(theta[:, m])) for m in range(theta.shape[1])]
        user_tables.append(np.tile(np.arange(n_users + 1)[:, None], (1, theta.shape[1])))
    elif codes is not None:
        user_fields += [Field(f"profile_{m}", size + 1) for m, size in enumerate(sizes)]  # K_m codes and the unknown one
        user_tables.append(np.concatenate([codes, [sizes]]).astype(np.int64))
    item_fields, item_tables = [Field("item", n_items)], [np.arange(n_items + 1)[:, None]]
    if kind != "ids":
        for profile in dataset.profiles:
            table, size = attribute_table(dataset, profile["name"])
            if size:  # a profile of people only, such as the critic, is no attribute of items
                item_fields.append(Field(f"item_{profile['name']}", size, table.shape[1]))
                item_tables.append(np.concatenate([table, np.full((1, table.shape[1]), size)]))
    user_table, item_table = np.concatenate(user_tables, axis=1), np.concatenate(item_tables, axis=1)

    def lookup(users, items):
        return torch.from_numpy(np.concatenate([user_table.take(users, axis=0), item_table.take(items, axis=0)], axis=1))

    return user_fields + item_fields, lookup


class Rows:
    """The rows of one split as tensors (ids (n, columns), labels (n,)), CHUNK rows of the memory-mapped file at a time.

    What fits into one chunk is looked up once and kept.
    """

    def __init__(self, dataset, split, lookup, device):
        self.interactions, self.split, self.lookup, self.device = dataset.interactions, split, lookup, device
        self.starts = np.arange(0, len(self.interactions), CHUNK)
        self.kept = self.read(0) if len(self.starts) == 1 else None

    def read(self, start):
        part = self.interactions[start:start + CHUNK]
        users, items, labels, _ = part[part[:, 3] == self.split].T
        return self.lookup(users, items).to(self.device), torch.tensor(labels, dtype=torch.float32, device=self.device)

    def chunks(self):
        for start in self.starts:
            yield self.kept or self.read(start)

    def shuffled_chunks(self):
        """Chunks in random order and, within each, rows in random order: a step is then a slice, not a gather."""
        for start in np.array(self.starts)[torch.randperm(len(self.starts)).numpy()]:
            ids, labels = self.kept or self.read(start)
            order = torch.randperm(len(ids), device=ids.device)
            yield ids[order], labels[order]


def codes_of(ids, bank, sizes, truth, rng):
    """What a row of the results table uses: (codes int (U, M), sizes K_m), or (None, None) for `none`."""
    if ids == "none":
        return None, None
    if ids == "planted":
        return truth, (truth.max(axis=0) + 1).tolist()
    if ids == "random":  # as many codes as the real ones, uniform: what a meaningless id does
        return np.stack([rng.integers(size, size=len(bank)) for size in sizes], axis=1), sizes
    return bank[rng.permutation(len(bank))] if ids == "shuffled" else bank, sizes  # shuffled: the real usage counts on the wrong users


# ---------------------------------------------------------------- models: logit = f(field embeddings), shapes (B, F, D) -> (B,)
#
# F fields, D = 8, MLP 16-16 with dropout .2 for all (section 3.4). e_i is field i's embedding; pairs run over i < j.
# P = F (F - 1) / 2 is the number of pairs. "first order" is b + sum_i w_i, a field embedding of width 1.

class Recommender(nn.Module):
    """What the models below share: field embeddings, the first-order term, and the F (F - 1) / 2 pairs of fields."""

    def __init__(self, fields, dim=8, per_id=1, first_order=True, std=0.05):
        """per_id: embeddings of width dim for each id (none, one, or in the field-aware models one for each field)."""
        super().__init__()
        self.F, self.D = len(fields), dim
        if per_id:
            self.embed = FieldEmbedding(fields, per_id * dim, std)
        if first_order:
            self.weights, self.bias = FieldEmbedding(fields, 1), nn.Parameter(torch.zeros(1))
        left, right = torch.triu_indices(self.F, self.F, 1)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)

    def first_order(self, ids):
        return self.weights(ids).sum((1, 2)) + self.bias

    def towards(self, ids):
        """Field-aware embeddings (B, F, F, D): [:, i, j] is what field i shows to field j."""
        return self.embed(ids).view(-1, self.F, self.F, self.D)

    def field_aware_pairs(self, towards):
        """<e_i towards j, e_j towards i> of all pairs: (B, P)."""
        return (towards[:, self.left, self.right] * towards[:, self.right, self.left]).sum(2)


def factorization(e):
    """sum_{i<j} <e_i, e_j> = (||sum_i e_i||^2 - sum_i ||e_i||^2) / 2, Rendle 2010. (B, F, D) -> (B,)."""
    return (e.sum(1).pow(2) - e.pow(2).sum(1)).sum(1) / 2


class LR(Recommender):
    """Logistic regression: the first-order term alone. The floor that every other model must clear.

    Note: eight times the stored weights. Nothing else moves the logit here, and at Adam's 1e-3 a weight of 2 would take 60 epochs.
    """

    def __init__(self, fields):
        super().__init__(fields, per_id=0)

    def forward(self, ids):
        return 8 * self.first_order(ids)


class FFM(Recommender):
    """first order + sum_{i<j} <e_i towards j, e_j towards i>. Juan et al. 2016, Eq. (4). Memory F times that of the others."""

    def __init__(self, fields):
        super().__init__(fields, per_id=len(fields))

    def forward(self, ids):
        return self.first_order(ids) + self.field_aware_pairs(self.towards(ids)).sum(1)


class AFM(Recommender):
    """first order + p . sum_{i<j} a_ij (e_i * e_j), a = softmax(h . ReLU(W (e_i * e_j) + b)). Xiao et al. 2017, Eq. (5)-(7)."""

    def __init__(self, fields, attention=8, dropout=0.2):
        super().__init__(fields)
        self.W, self.h, self.p = linear(self.D, attention), nn.Linear(attention, 1, bias=False), nn.Linear(self.D, 1, bias=False)
        nn.init.ones_(self.p.weight)  # Note: starts as a plain FM; from noise the sign of half of the dimensions must be unlearned first
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids):
        e = self.embed(ids)
        products = e[:, self.left] * e[:, self.right]  # Shape: (B, P, D)
        attention = torch.softmax(self.h(torch.relu(self.W(products))), dim=1)  # Shape: (B, P, 1)
        return self.first_order(ids) + self.p(self.dropout((attention * products).sum(1))).squeeze(1)


class DeepFM(Recommender):
    """first order + FM + MLP on the same embeddings. Guo et al. 2017, Eq. (1)-(4)."""

    def __init__(self, fields):
        super().__init__(fields)
        self.deep = nn.Sequential(mlp(self.F * self.D, (16, 16), 0.2), linear(16, 1))

    def forward(self, ids):
        e = self.embed(ids)
        return self.first_order(ids) + factorization(e) + self.deep(e.flatten(1)).squeeze(1)


class PNN(Recommender):
    """MLP on the embeddings and the inner products <e_i, e_j> of all pairs (IPNN). Qu et al. 2016, Eq. (2)-(7)."""

    def __init__(self, fields):
        super().__init__(fields, first_order=False)
        self.deep = nn.Sequential(mlp(self.F * self.D + len(self.left), (16, 16), 0.2), linear(16, 1))

    def forward(self, ids):
        e = self.embed(ids)
        inner = (e[:, self.left] * e[:, self.right]).sum(2)
        return self.deep(torch.cat([e.flatten(1), inner], dim=1)).squeeze(1)


class ONN(Recommender):
    """MLP on each field's own embedding and the field-aware inner products of all pairs. Yang et al. 2020, Eq. (5)-(8).

    An id has an embedding for each operation it takes part in: [i, i] is the copy, [i, j] the product with field j.
    """

    def __init__(self, fields):
        super().__init__(fields, per_id=len(fields), first_order=False)
        self.deep = nn.Sequential(mlp(self.F * self.D + len(self.left), (16, 16), 0.2), linear(16, 1))

    def forward(self, ids):
        towards = self.towards(ids)
        copies = towards.diagonal(dim1=1, dim2=2).transpose(1, 2)  # Shape: (B, F, D)
        return self.deep(torch.cat([copies.flatten(1), self.field_aware_pairs(towards)], dim=1)).squeeze(1)


class AFN(Recommender):
    """Logarithmic neurons exp(sum_i w_ik ln|e_i|): products of fields with learned powers. Cheng et al. 2020, Eq. (6)-(8).

    Note: |e| is kept above 1e-4, for ln and its gradient blow up at 0; BatchNorm after ln and after exp holds both in range.
    """

    def __init__(self, fields, neurons=32):
        super().__init__(fields)
        self.powers = nn.Linear(self.F, neurons)
        self.log_norm, self.exp_norm = nn.BatchNorm1d(self.F * self.D), nn.BatchNorm1d(neurons * self.D)
        self.deep = nn.Sequential(mlp(neurons * self.D, (16, 16), 0.2), linear(16, 1))

    def forward(self, ids):
        logs = self.log_norm(self.embed(ids).abs().clamp(min=1e-4).log().flatten(1)).view(-1, self.F, self.D)
        crossed = self.powers(logs.transpose(1, 2)).exp()  # Shape: (B, D, neurons)
        return self.first_order(ids) + self.deep(self.exp_norm(crossed.flatten(1))).squeeze(1)


class AutoInt(Recommender):
    """Layers e <- ReLU(self-attention over fields + W e), then a linear logit. Song et al. 2019, Eq. (5)-(9)."""

    def __init__(self, fields, layers=2, heads=2):
        super().__init__(fields)
        self.heads = heads
        self.layers = nn.ModuleList(nn.ModuleDict({name: nn.Linear(self.D, self.D, bias=False) for name in ("query", "key", "value", "skip")})
                                    for _ in range(layers))
        self.head = linear(self.F * self.D, 1)

    def forward(self, ids):
        e = self.embed(ids)
        for layer in self.layers:
            e = torch.relu(attend(e, layer, self.heads) + layer["skip"](e))
        return self.first_order(ids) + self.head(e.flatten(1)).squeeze(1)


def attend(e, layer, heads):
    """Multi-head scaled dot-product self-attention over the fields, written out. (B, F, D) -> (B, F, D)."""
    query, key, value = (layer[name](e).unflatten(2, (heads, -1)).transpose(1, 2) for name in ("query", "key", "value"))  # (B, heads, F, D')
    weights = torch.softmax(query @ key.transpose(2, 3) / query.shape[-1] ** 0.5, dim=-1)  # Shape: (B, heads, F, F)
    return (weights @ value).transpose(1, 2).flatten(2)


class DIFM(Recommender):
    """FM whose weights and embeddings are rescaled by m_i = attention's factor + MLP's factor. Lu et al. 2020, Eq. (7)-(12)."""

    def __init__(self, fields, heads=2):
        super().__init__(fields, std=0.01)  # Note: with .05 it overfits within three epochs (MovieLens-100K: test AUC .75 instead of .785)
        self.heads = heads
        self.attention = nn.ModuleDict({name: nn.Linear(self.D, self.D, bias=False) for name in ("query", "key", "value", "skip")})
        self.deep = mlp(self.F * self.D, (16, 16), 0.2)
        self.from_vectors, self.from_bits = nn.Linear(self.F * self.D, self.F), nn.Linear(16, self.F, bias=False)
        nn.init.ones_(self.from_vectors.bias)  # Note: m = 1, a plain FM, is the start; a factor near 0 would stop every gradient

    def forward(self, ids):
        e = self.embed(ids)
        vectors = torch.relu(attend(e, self.attention, self.heads) + self.attention["skip"](e))
        m = self.from_vectors(vectors.flatten(1)) + self.from_bits(self.deep(e.flatten(1)))  # Shape: (B, F)
        return (m * self.weights(ids).squeeze(2)).sum(1) + self.bias + factorization(m.unsqueeze(2) * e)


class FiBiNET(Recommender):
    """first order + MLP on bilinear pairs (e_i W_ij) * e_j of the embeddings and of the same after SENET. Huang et al. 2019, Eq. (3)-(9)."""

    def __init__(self, fields):
        # Note: the MLP sees products of embeddings only. From .05 and W near 1 they stay where L2 shrinks them to 0; from .005 and W near 5 they
        # grow in a few epochs, and later than the first order term, which keeps them from overfitting (MovieLens-100K: .776 instead of .759).
        super().__init__(fields, std=0.005)
        pairs, squeezed = len(self.left), max(1, self.F // 2)
        self.squeeze, self.excite = linear(self.F, squeezed), linear(squeezed, self.F)
        nn.init.ones_(self.excite.bias)  # Note: every field is let through at first; ReLU would keep a field that starts at 0 shut for good
        self.W = nn.Parameter(5 * (torch.eye(self.D) + 0.1 * torch.randn(2, pairs, self.D, self.D)))  # one set for each of the two
        self.deep = nn.Sequential(mlp(2 * pairs * self.D, (16, 16), 0.2), linear(16, 1))

    def forward(self, ids):
        e = self.embed(ids)
        gates = torch.relu(self.excite(torch.relu(self.squeeze(e.mean(2)))))  # Shape: (B, F)
        pairs = [torch.einsum("bpd,pdk->bpk", v[:, self.left], W) * v[:, self.right] for v, W in zip((e, gates.unsqueeze(2) * e), self.W)]
        return self.first_order(ids) + self.deep(torch.cat(pairs, dim=1).flatten(1)).squeeze(1)


class DCNv2(Recommender):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l beside an MLP. Wang et al. 2021, Eq. (1)."""

    def __init__(self, fields, layers=3):
        super().__init__(fields, first_order=False)
        width = self.F * self.D
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.deep = mlp(width, (16, 16), 0.2)
        self.head = linear(width + 16, 1)

    def forward(self, ids):
        x = x0 = self.embed(ids).flatten(1)
        for layer in self.cross:
            x = x0 * layer(x) + x
        return self.head(torch.cat([x, self.deep(x0)], dim=1)).squeeze(1)


# A class built from a list of Fields; forward: (B, columns) ids -> (B,) logits
MODELS = {"lr": LR, "ffm": FFM, "afm": AFM, "fibinet": FiBiNET, "difm": DIFM, "afn": AFN, "deepfm": DeepFM, "autoint": AutoInt, "onn": ONN,
          "pnn": PNN, "dcn": DCN, "dcnv2": DCNv2}


# ---------------------------------------------------------------- loss and train

@torch.no_grad()
def predict(model, ids, batch=16384):
    """Probabilities, float32 (n,), of the rows of ids."""
    model.eval()
    return torch.cat([torch.sigmoid(model(ids[start:start + batch])) for start in range(0, len(ids), batch)]).cpu().numpy()


def evaluate(model, rows):
    """(labels, probabilities), each (n,), of a split."""
    labels, probabilities = zip(*[(labels.cpu().numpy(), predict(model, ids)) for ids, labels in rows.chunks() if len(ids)])
    return np.concatenate(labels), np.concatenate(probabilities)


def train(model, splits, args):
    """Adam on Eq. (9) until validation AUC stops rising. Returns (result row, state dict of the best epoch, test probabilities).

    splits: {TRAIN | VALIDATION | TEST: Rows}. The test split is looked at once, at the best epoch.
    """
    # DEVIATION(8): an L2 penalty, of which the paper says nothing.
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    best, seconds, samples = {"val_auc": -1.0, "best_epoch": 0}, 0.0, 0
    for epoch in range(1, args.epochs + 1):
        model.train()
        start = time.perf_counter()
        for ids, labels in splits[TRAIN].shuffled_chunks():
            for at in range(0, len(ids) - 1, args.batch_size):  # a last batch of one row is left out: BatchNorm needs two
                # Eq. (9). DEVIATION(1): with the (1 - y) log(1 - y_hat) term that the paper's formula lacks.
                loss = F.binary_cross_entropy_with_logits(model(ids[at:at + args.batch_size]), labels[at:at + args.batch_size])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            samples += len(ids)
        seconds += time.perf_counter() - start
        if not torch.isfinite(loss):
            raise UserError(f"the loss is {loss.item()} in epoch {epoch}", f"--lr {args.lr}", "lower --lr")
        score = auc(*evaluate(model, splits[VALIDATION]))
        if score > best["val_auc"]:
            best = {"val_auc": score, "best_epoch": epoch}
            state = copy.deepcopy(model.state_dict())
        elif epoch - best["best_epoch"] >= args.patience:
            break
    model.load_state_dict(state)
    labels, probabilities = evaluate(model, splits[TEST])
    best |= {"test_auc": auc(labels, probabilities), "test_logloss": logloss(labels, probabilities),
             "train_samples_per_second": round(samples / seconds), "parameters": parameter_counts(model)[0]}
    return best, state, probabilities


def run_one(dataset, model_name, ids, seed, inputs, args, device):
    """Build features and model for one cell of the table and train it; seeds are paired: the same for every --ids."""
    codes = codes_of(ids, inputs.bank, inputs.sizes, inputs.truth, np.random.default_rng((args.seed, seed, 4)))
    fields, lookup = build_features(dataset, args.fields, *codes, inputs.theta if ids == "userip" else None)
    splits = {split: Rows(dataset, split, lookup, device) for split in (TRAIN, VALIDATION, TEST)}
    seeded(args.seed, seed, 5)
    result, state, probabilities = train(MODELS[model_name](fields).to(device), splits, args)
    return {"model": model_name, "ids": ids, "fields": args.fields, "seed": seed, **result}, state, probabilities


# ---------------------------------------------------------------- evaluate

def weighted_auc(ranks, labels, weights):
    """AUC with a weight for each row; ranks: dense integer rank of each row's score (equal scores, equal ranks)."""
    positive, negative = np.bincount(ranks, weights * labels), np.bincount(ranks, weights * (1 - labels))
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / (positive.sum() * negative.sum()))


def bootstrap(labels, first, second, seed=0):
    """95% interval of AUC(first) - AUC(second), each a list of test probabilities a seed; the test rows are resampled, the seeds averaged.

    None where most resamples hold one class alone.
    """
    rng, differences = np.random.default_rng(seed), []
    ranks = [[np.unique(scores, return_inverse=True)[1] for scores in side] for side in (first, second)]
    for _ in range(BOOTSTRAP):
        weights = np.bincount(rng.integers(len(labels), size=len(labels)), minlength=len(labels)).astype(float)
        if not 0 < (weights * labels).sum() < weights.sum():  # only one class was drawn: no AUC
            continue
        one, two = ([weighted_auc(rank, labels, weights) for rank in side] for side in ranks)
        differences.append(np.mean(one) - np.mean(two))
    return [float(bound) for bound in np.quantile(differences, (0.025, 0.975))] if len(differences) > BOOTSTRAP // 2 else None


def summarize(rows, labels=None, predictions=None):
    """Per model and ids: mean and sd over seeds; differences to `none` and to `random`, paired by seed, with the paired t-test's p over
    the seeds and, given test labels (n,) and predictions {(model, ids, seed): (n,)}, the bootstrap's 95% interval over the test rows."""
    table, cells = {}, {}
    for row in rows:
        cells.setdefault((row["model"], row["ids"]), {})[row["seed"]] = row
    for (model, ids), by_seed in cells.items():
        entry = {metric: dict(zip(("mean", "sd"), mean_sd([row[metric] for row in by_seed.values()])))
                 for metric in ("val_auc", "test_auc", "test_logloss")}
        for control in ("none", "random"):
            other = cells.get((model, control))
            if other and ids != control:
                differences = [row["test_auc"] - other[seed]["test_auc"] for seed, row in by_seed.items()]
                entry[f"auc_minus_{control}"] = found = dict(zip(("mean", "sd"), mean_sd(differences)))
                found["p"] = float(scipy.stats.ttest_1samp(differences, 0).pvalue) if len(differences) > 1 and found["sd"] > 0 else None
                if predictions:
                    found["interval"] = bootstrap(labels, *([predictions[model, name, seed] for seed in by_seed] for name in (ids, control)))
        table.setdefault(model, {})[ids] = entry
    for entries in table.values():  # share of the lift that the planted truth gives (demo)
        if {"none", "planted"} <= entries.keys():
            floor, ceiling = entries["none"]["test_auc"]["mean"], entries["planted"]["test_auc"]["mean"]
            for entry in entries.values() if ceiling - floor > 0.01 else ():  # a share of no lift says nothing (--signal 0)
                entry["share_of_planted_lift"] = (entry["test_auc"]["mean"] - floor) / (ceiling - floor)
    return table


def improvements(summary):
    """Eq. (10) and (11) of each model with ids against the best baseline, the model that is best without them; None without one that beats chance."""
    baselines = {model: entries["none"] for model, entries in summary.items() if "none" in entries}
    if not baselines:
        return None
    best = max(baselines, key=lambda model: baselines[model]["test_auc"]["mean"])
    auc_0, logloss_0 = (baselines[best][metric]["mean"] for metric in ("test_auc", "test_logloss"))
    if auc_0 <= 0.5:  # nothing is relative to a baseline that is no better than chance
        return None
    relative = {}
    for model, entries in summary.items():
        for ids in entries.keys() - {"none", "planted"}:
            found, loss = entries[ids]["test_auc"]["mean"], entries[ids]["test_logloss"]["mean"]
            relative.setdefault(model, {})[ids] = {"auc": (found - 0.5) / (auc_0 - 0.5) - 1, "logloss": (logloss_0 - loss) / loss}
    return {"baseline": best, "test_auc": auc_0, "test_logloss": logloss_0, "relative": relative}


def markdown(summary, base_logloss):
    """The results table as markdown lines."""
    lines = ["| model | ids | test AUC | logloss | AUC - none | AUC - random | share of planted lift |", "|---|---|---|---|---|---|---|"]

    def pm(entry, key, sign=""):
        if key not in entry:
            return ""
        p = entry[key].get("p")
        return f"{entry[key]['mean']:{sign}.4f} ± {entry[key]['sd']:.4f}" + (f", p {p:.2g}" if p is not None else "")

    for model, entries in summary.items():
        for ids, entry in entries.items():
            share = entry.get("share_of_planted_lift")
            lines.append(f"| {model} | {ids} | {pm(entry, 'test_auc')} | {pm(entry, 'test_logloss')} | {pm(entry, 'auc_minus_none', '+')} | "
                         f"{pm(entry, 'auc_minus_random', '+')} | {'' if share is None else f'{share:.0%}'} |")
    lines.append(f"| constant | base rate | 0.5000 | {base_logloss:.4f} | | | |")
    return "\n".join(lines)


# ---------------------------------------------------------------- use: score pairs of raw ids

def score(args, dataset, inputs, device):
    """Write scores.csv: the probability of each user_id,item_id pair of a CSV file under a trained model. Unseen ids are counted; an
    unseen user has the unknown codes, and the embedding of any unseen id is 0."""
    model_name = args.models[0]
    facts = load(args.run, f"ctr_{model_name}.json", ("ids", "fields", "fingerprints"))
    check_same(args.run, f"ctr_{model_name}.pt", "feature bank or dataset", inputs.fingerprints(dataset), facts["fingerprints"], "04_train_ctr.py")
    codes = codes_of(facts["ids"], inputs.bank, inputs.sizes, inputs.truth, np.random.default_rng((facts["seed"], 0, 4)))
    fields, lookup = build_features(dataset, facts["fields"], *codes, inputs.theta if facts["ids"] == "userip" else None)
    model = MODELS[model_name](fields).to(device)
    model.load_state_dict(load(args.run, f"ctr_{model_name}.pt"))
    users, items = ({str(raw): i for i, raw in enumerate(known)} for known in (dataset.users, [item["id"] for item in dataset.items]))
    unseen, count = [set(), set()], 0
    try:
        with open(args.score, newline="", encoding="utf-8-sig") as source, atomic(args.run / "scores.csv") as temporary, \
                open(temporary, "w", newline="", encoding="utf-8") as target:
            reader, writer = csv.DictReader(source), csv.writer(target, lineterminator="\n")
            if not {"user_id", "item_id"} <= set(reader.fieldnames or ()):
                raise UserError("the columns user_id and item_id are missing", args.score, "begin the file with the line user_id,item_id")
            writer.writerow(["user_id", "item_id", "probability"])
            while batch := list(itertools.islice(reader, 2**16)):
                pairs = [(row["user_id"], row["item_id"]) for row in batch]
                for seen, known, raws in zip(unseen, (users, items), zip(*pairs)):
                    seen.update(set(raws) - known.keys())
                ids = lookup(*np.array([[users.get(user, len(users)), items.get(item, len(items))] for user, item in pairs]).T)
                writer.writerows([*pair, f"{value:.6f}"] for pair, value in zip(pairs, predict(model, ids.to(device))))
                count += len(pairs)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the pairs or write scores.csv: {error}", args.score,
                        "give a CSV file with the columns user_id,item_id, and room on the disk") from None
    print(f"{count} pairs scored by {model_name} with {facts['ids']} ids; unseen: {len(unseen[0])} users, {len(unseen[1])} items\n"
          f"wrote scores.csv to {args.run}")


# ---------------------------------------------------------------- main

@dataclass
class Inputs:
    """What the rows of the table are made from: bank int (U, M), K_m, planted truth int (U, M), theta float (U, M, d) or None each."""

    bank: np.ndarray | None = None
    sizes: list | None = None
    truth: np.ndarray | None = None
    theta: np.ndarray | None = None

    def fingerprints(self, dataset):
        return fingerprint(dataset.fingerprint(), *(value for value in (self.bank, self.truth, self.theta) if value is not None))


def read_inputs(args):
    """(dataset, Inputs), all checked to belong together; fills in args.ids."""
    dataset, truth = load_dataset(args.run), load_truth(args.run)
    for split, name in ((TRAIN, "training"), (VALIDATION, "validation"), (TEST, "test")):
        if len(np.unique(dataset.rows(split)[:, 2])) < 2:
            raise UserError(f"all labels of the {name} split are equal, so there is no AUC", args.run,
                            "give more data or another --positive-above in 01")
    args.ids = args.ids or [ids for ids in IDS if ids != "planted" or truth is not None]
    if "planted" in args.ids and truth is None:
        raise UserError("this data set has no planted truth", args.run / "truth.npy", "leave planted out of --ids")
    if args.ids == ["none"]:
        return dataset, Inputs()
    facts = load(args.run, "quantize.json", ("dataset_fingerprint", "profiles_fingerprint", "fingerprint", "codes"))
    bank = np.array(load(args.run, "feature_bank.npy"))
    check_same(args.run, "feature_bank.npy", "dataset", facts["dataset_fingerprint"], dataset.fingerprint(), "02_infer_profiles.py")
    check_same(args.run, "feature_bank.npy", "quantize.json", fingerprint(bank), facts["fingerprint"], "03_quantize.py")
    if bank.shape != (len(dataset.users), len(facts["codes"])) or bank.min() < 0 or (bank > facts["codes"]).any():
        raise UserError("feature_bank.npy holds a code beyond its codebook", args.run, f"run: python 03_quantize.py --run {args.run}")
    if facts.get("added_users"):
        print("WARNING: stage 02 ran with --users: old users' theta has seen rows of the earlier split, so test figures may be too good")
    theta = None
    if args.profile_input == "embedding":
        theta = np.array(load(args.run, "profiles.npy"))
        check_same(args.run, "profiles.npy", "quantize.json", fingerprint(theta), facts["profiles_fingerprint"], "03_quantize.py")
        spread = theta.std(axis=(0, 2), keepdims=True)  # one scale a profile; the projection learns the rest
        theta = (theta - theta.mean(axis=0)) / np.maximum(spread, 1e-12)
    return dataset, Inputs(bank, facts["codes"], truth, theta)


def finished_cells(path, settings):
    """Rows that an interrupted run of the same settings has finished, else none."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found["rows"] if found["settings"] == settings else []
    return []


def main():
    args = parse_arguments()
    device = pick_device(args.device)
    if args.score:
        facts = load(args.run, f"ctr_{args.models[0]}.json", ("ids", "fields", "profile_input", "seed"))
        args.ids, args.profile_input = [facts["ids"]], facts["profile_input"]
    dataset, inputs = read_inputs(args)
    announce("04 train CTR", args, f"dataset.json interactions.npy users.json items.json feature_bank.npy quantize.json in {args.run}")
    if args.score:
        return score(args, dataset, inputs, device)
    train_rows = dataset.rows(TRAIN)
    args.batch_size = args.batch_size or min(1024, max(128, len(train_rows) // 160))
    rate, labels = train_rows[:, 2].mean(), dataset.rows(TEST)[:, 2]
    with one_run_at_a_time(args.run):
        partial, predictions = args.run / "results.partial.json", args.run / "predictions"
        settings = [inputs.fingerprints(dataset), {key: str(value) for key, value in vars(args).items()}]
        rows = [row for row in finished_cells(partial, settings) if (predictions / "{model}-{ids}-{seed}.npy".format(**row)).exists()]
        done = {(row["model"], row["ids"], row["seed"]) for row in rows}
        cells = [(model, ids, seed) for model in args.models for seed in range(args.seeds) for ids in args.ids]
        kept = "userip" if "userip" in args.ids else args.ids[0]  # whose best epoch becomes ctr_<model>.pt
        for model, ids, seed in (bar := tqdm([cell for cell in cells if cell not in done], desc="training", unit="run")):
            bar.set_postfix_str(f"{model} {ids} seed {seed}")
            row, state, probabilities = run_one(dataset, model, ids, seed, inputs, args, device)
            if seed == 0 and ids == kept:
                save_torch(args.run / f"ctr_{model}.pt", state)
                save_json(args.run / f"ctr_{model}.json", {
                    "model": model, "ids": ids, "fields": args.fields, "profile_input": args.profile_input, "seed": args.seed,
                    "fingerprints": (inputs if ids != "none" else Inputs()).fingerprints(dataset)})
            predictions.mkdir(exist_ok=True)
            save_npy(predictions / f"{model}-{ids}-{seed}.npy", probabilities)
            rows.append(row)
            save_json(partial, {"settings": settings, "rows": rows})
        base_logloss = logloss(labels, np.full(len(labels), rate))
        summary = summarize(rows, labels, {cell: load(predictions, "{}-{}-{}.npy".format(*cell)) for cell in cells})
        improved = improvements(summary)
        save_json(args.run / "results.json", {
            "rows": rows, "summary": summary, "improvements": improved, "base_rate_logloss": base_logloss, "fields": args.fields,
            "profile_input": args.profile_input, "dataset_fingerprint": dataset.fingerprint(), "command": "python " + " ".join(sys.argv),
            "date": datetime.date.today().isoformat(),
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__, "scikit-learn": sklearn.__version__}})
        partial.unlink()
    print("\n" + markdown(summary, base_logloss))
    if improved:
        print(f"\nbest baseline without ids: {improved['baseline']}, AUC {improved['test_auc']:.4f}; against it, Eq. (10) and (11):")
        for model, entries in improved["relative"].items():
            print(f"    {model:8s} " + "; ".join(f"{ids} AUC {entry['auc']:+.2%}, logloss {entry['logloss']:+.2%}"
                                                 for ids, entry in sorted(entries.items())))
    files = " ".join(["results.json", *(f"ctr_{model}.pt" for model in args.models)])
    print(f"\n{args.seeds} seeds, fields {args.fields}; wrote {files} to {args.run}")


if __name__ == "__main__":
    guarded(main)
