"""Stage 04: train recommenders with the feature bank's codes as sparse features. Paper: sections 2.5, 3.

    y_hat = Rec[i, c_1, ..., c_M, E_obs]                               Eq. (8)
    loss  = -sum_n [y_n log(y_hat_n) + (1 - y_n) log(1 - y_hat_n)]     Eq. (9)

i is the item's id, c_m the user's code of profile m, E_obs the other fields: the user's id, the item's
attributes or both (--fields). No LLM is loaded: a user's profiles are M small integers. The paper prints
Eq. (9) without its second term: DEVIATION(1). DEVIATION(k): row k of README's differences.

A *bank* holds M codes of every user. --ids names the banks that are compared, one row of the results each:
`userip` (ours), `none` (no codes), `random` (uniform codes), `shuffled` (our codes on other users), `planted`
(the demo's truth) or NAME, a bank of your own: feature_bank_NAME.npy, int (U, M'), and feature_bank_NAME.json
with codes [K_1, ...], dataset_fingerprint, made_by (what to call to make it again) and, where the bank
depends on stage 02, profiles_fingerprint. random-NAME and shuffled-NAME are its controls. A repetition draws
anew: random codes, the shuffle, first weights, dropout, the order of rows.
Cold users (01 --cold-users) have codes, inferred from SUPPORT rows, but no training rows: what codes are
worth for users whom the recommender has never seen is measured on their other rows (cold_auc and so on).

What stands where; each part begins with a line of dashes:
    data, models, loss and train  fields and ids; LR, DCNv2 (DCN: common.py); Eq. (9); what random
                                  and shuffled are. Read them first, after DCN and Field in common.py.
    variants                      more models: a class and an entry in MODELS each
    running it                    flags, banks of codes, the table, files, main. Skip it at first.

Reads:  01's files, for `planted` with truth.npy; feature_bank.npy quantize.json (03), feature_bank_NAME.npy
        .json; profiles.json (02); for --profile-input embedding profiles.npy (02)
Writes: results.json, an entry for each model, bank and repetition, and a summary; predictions/, of test and
        cold rows; ctr_<model>.pt, the weights of repetition 0 with userip (else the first of --ids) at the
        best epoch, and ctr_<model>.json, what they were made from; until the table is shown also rows-*/, a
        file for each entry

Run:
    python 04_train_ctr.py  # demo, DCN, 5 seeds: 1 min
    python 04_train_ctr.py --models all --ids none,random,shuffled,userip  # Tables 2 and 4
"""

import argparse
import contextlib
import copy
import inspect
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sklearn
import torch
from torch import nn

import common
from common import (
    COLD, DCN, TEST, TRAIN, VALIDATION, Field, FieldEmbedding, Parser, UserError, announce, at_least, auc,
    check_same, count_parameters, do_all, fingerprint, gauc, guarded, linear, load, load_dataset, load_truth,
    logloss, mlp, pick_device, save_json, save_npy, save_torch, seeded, together)


# -------- data
#
# A model sees a pair of a user and an item as one row of numbers, ids (n, columns): the user's id, a code for
# each profile, the item's id, the numbers of its attributes. A Field(name, size, columns=1), see common.py,
# describes one of these: its ids are 0 to size - 1, and `size` means unknown or no value. ids_name is
# something else: one of --ids, the name of a bank of codes.

def attribute_table(dataset, name):
    """(int64 (I + 1, width), size): the numbers of an attribute's values for each item.

    The number `size` stands for no value. It fills up the rows of items that have fewer values than others,
    and the last row, which is for an unseen item.
    """
    values_of = [item["attributes"].get(name, []) for item in dataset.items]
    values_of.append([])
    number_of = {value: number for number, value in enumerate(sorted(set().union(*values_of)))}
    width = max(len(values) for values in values_of)
    table = np.full((len(values_of), width), len(number_of))
    for row, values in zip(table, values_of):
        row[:len(values)] = [number_of[value] for value in values]
    return table, len(number_of)


def build_features(dataset, observed, codes, sizes, z=None):
    """(fields, lookup): lookup(users, items) gives the pairs' ids (n, columns).

    User number U and item number I are unseen ones. observed: --fields. codes: None or int (U, M). sizes:
    K_m. z: None, or theta's coordinates, float (U, M, r), in the place of codes.
    """
    user_numbers = np.arange(len(dataset.users) + 1)[:, None]
    item_numbers = np.arange(len(dataset.items) + 1)[:, None]
    user_tables = []  # pairs (field, table (U + 1, its columns)): table[user] are the user's ids
    item_tables = []
    if observed != "attributes":
        user_tables.append((Field("user", len(dataset.users)), user_numbers))
    if z is not None:
        nobody = np.zeros_like(z[:1])
        vectors = torch.tensor(np.vstack([z, nobody]))  # Shape: (U + 1, M, r)
        for m in range(vectors.shape[1]):
            # An id is here the user's number; its embedding is a learned projection of the user's z.
            field = Field(f"profile_{m}", len(user_numbers), vectors=vectors[:, m])
            user_tables.append((field, user_numbers))
    elif codes is not None:
        # Codes are 0 to K_m - 1; K_m is the unknown code, of unseen users and of those without a history. The
        # rows of the latter train it like any other code, so the field's size is K_m + 1. The id K_m + 1, by
        # which this Field itself would mean unknown, never occurs.
        table = np.vstack([codes, sizes]).astype(np.int64)
        for m, size in enumerate(sizes):
            user_tables.append((Field(f"profile_{m}", size + 1), table[:, m:m + 1]))
    item_tables.append((Field("item", len(dataset.items)), item_numbers))
    if observed != "ids":
        for profile in dataset.profiles:  # attributes of items have the names of profiles: hobby, background
            table, size = attribute_table(dataset, profile["name"])
            if size:  # no item has a value for the critic, a profile of 01 --critic
                field = Field(f"item_{profile['name']}", size, columns=table.shape[1])
                item_tables.append((field, table))

    def lookup(users, items):
        parts = [table[users] for _, table in user_tables]
        parts += [table[items] for _, table in item_tables]
        return torch.from_numpy(np.hstack(parts))

    return [field for field, _ in user_tables + item_tables], lookup


def rows_of(dataset, split, lookup, device, unknown_user=None):
    """A split's ids (n, columns), labels (n,). unknown_user: None, or the id in the place of all users'."""
    users, items, labels = dataset.rows(split).T
    ids = lookup(users, items)
    if unknown_user is not None:
        ids[:, 0] = unknown_user  # the column of the user; the codes stay
    return ids.to(device), torch.tensor(labels, dtype=torch.float32, device=device)


# -------- models: ids (B, columns) -> logits (B,)
#
# DCN, the recommender of the paper's tables, stands in common.py, with FieldEmbedding (ids (B, columns) ->
# (B, F, D); of a field with several columns the mean), mlp and linear. B rows of a batch, F fields, D = 8,
# MLP 16-16 with dropout .2 (section 3.4). e_i: field i's embedding; first order: b + sum_i w_i, w_i an
# embedding of width 1.

class Recommender(nn.Module):
    """What models share: field embeddings, first order."""

    def __init__(self, fields, dim=8, per_id=1, with_first_order=True, std=0.05):
        """per_id: how many embeddings an id has: 0, 1, or, in field-aware models, one for each field."""
        super().__init__()
        self.F = len(fields)
        self.D = dim
        if per_id:
            self.embed = FieldEmbedding(fields, per_id * dim, std)
        if with_first_order:
            self.weights = FieldEmbedding(fields, 1)
            self.bias = nn.Parameter(torch.zeros(1))

    def first_order(self, ids):
        return self.weights(ids).sum((1, 2)) + self.bias


class LR(Recommender):
    """Logistic regression: first order alone, the other models' floor.

    Note: the logit is eight times the sum. An id has one number here, which moves little in a step of Adam;
    times eight it moves the logit faster, and the L2 penalty on the number weighs less.
    """

    def __init__(self, fields):
        super().__init__(fields, per_id=0)

    def forward(self, ids):
        return 8 * self.first_order(ids)


class DCNv2(Recommender):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l beside an MLP. Wang et al. 2021, Eq. (1)."""

    def __init__(self, fields, layers=3):
        super().__init__(fields, with_first_order=False)
        width = self.F * self.D
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.deep = mlp(width)
        self.head = linear(width + 16, 1)

    def forward(self, ids):
        x0 = self.embed(ids).flatten(1)
        x = x0
        for layer in self.cross:
            x = x0 * layer(x) + x
        return self.head(torch.hstack([x, self.deep(x0)])).squeeze(1)


# -------- loss and train

@torch.no_grad()
def predict(model, ids, batch=16384):
    """Probabilities of rows of ids: float32 (n,)."""
    model.eval()
    return torch.cat([model(part).sigmoid() for part in ids.split(batch)]).cpu().numpy()


def adam(model, args):
    """Adam with an L2 penalty on the embedding tables alone. DEVIATION(8): the paper names no penalty."""
    tables = [part.table.weight for part in model.modules() if isinstance(part, FieldEmbedding)]
    of_tables = set(map(id, tables))
    others = [weight for weight in model.parameters() if id(weight) not in of_tables]
    groups = [{"params": tables, "weight_decay": args.weight_decay}, {"params": others}]
    return torch.optim.Adam(groups, lr=args.lr, fused=True)


def train(model, train_rows, validation_rows, unknown_user, args):
    """Adam on Eq. (9) until validation AUC minus logloss stops rising.

    train_rows, validation_rows: (ids (n, columns), labels (n,)); unknown_user: the id that hides a user in
    column 0, None where that column is no user. Returns (the best epoch and its figures, its weights).
    """
    ids, labels = train_rows
    validation_labels = validation_rows[1].cpu()
    optimizer = adam(model, args)
    best_score = -np.inf
    seconds = 0
    for epoch in range(1, args.epochs + 1):
        model.train()
        start = time.perf_counter()
        order = torch.randperm(len(ids), device=ids.device)
        epoch_ids = ids[order]
        epoch_labels = labels[order]
        if unknown_user is not None and args.user_dropout:
            # DEVIATION(10): user dropout. The id of the user is hidden in some rows, the codes stay. Else the
            # model memorizes users by their id and ignores the codes.
            is_hidden = torch.rand(len(ids), device=ids.device) < args.user_dropout
            epoch_ids[is_hidden, 0] = unknown_user
        # The range ends one early: a last row that is alone is left out, for BatchNorm of some models.
        for at in range(0, len(ids) - 1, args.batch_size):
            batch = slice(at, at + args.batch_size)
            logits = model(epoch_ids[batch])
            # Eq. (9), as a mean. DEVIATION(1): with the (1 - y) log(1 - y_hat) term that the paper lacks.
            loss = nn.functional.binary_cross_entropy_with_logits(logits, epoch_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if ids.is_cuda:
            torch.cuda.synchronize()  # else the clock would stop before the GPU does
        seconds += time.perf_counter() - start
        scores = predict(model, validation_rows[0])
        if not np.isfinite(scores).all():
            name = type(model).__name__
            raise UserError(f"{name}: a score is not finite", f"epoch {epoch}, --lr {args.lr}", "lower --lr")
        found = {"val_auc": auc(validation_labels, scores), "val_logloss": logloss(validation_labels, scores)}
        score = found["val_auc"] - found["val_logloss"]  # AUC alone may keep badly calibrated probabilities
        if score > best_score:
            best = {**found, "best_epoch": epoch}
            best_score = score
            state = copy.deepcopy(model.state_dict())
        elif epoch - best["best_epoch"] >= args.patience:
            break
    model.load_state_dict(state)
    return {**best, "train_samples_per_second": round(epoch * len(ids) / seconds)}, state


def bank_name(ids_name):
    """The bank behind a name of --ids: of random and shuffled userip, of random-NAME NAME, else itself."""
    control, _, name = ids_name.partition("-")
    return (name or "userip") if control in ("random", "shuffled") else ids_name


def codes_of(ids_name, banks, rng):
    """(codes int (U, M), sizes K_m) of a name of --ids, of `none` None. banks: {name: (codes, sizes)}."""
    codes, sizes = banks.get(bank_name(ids_name), (None, None))
    if bank_name(ids_name) == ids_name:  # no control
        return codes, sizes
    if ids_name.startswith("random"):  # as many codes, uniform: what a meaningless id does
        return np.stack([rng.integers(size, size=len(codes)) for size in sizes], axis=1), sizes
    return rng.permutation(codes), sizes  # real codes, on other users


def run_one(dataset, model_name, ids_name, repetition, inputs, args, device):
    """One training: {"row": its figures, "state": its weights, "test" and "cold": probabilities}.

    inputs: an Inputs (below), whose of() calls codes_of() and, with --profile-input embedding, adds z.
    """
    codes, sizes, z = inputs.of(ids_name, (args.seed, repetition, 4))  # 4, and 5 below, keep draws apart
    fields, lookup = build_features(dataset, args.fields, codes, sizes, z)
    unknown_user = len(dataset.users) if args.fields != "attributes" else None
    # Which rows hide their user, by the unknown id in column 0? Cold ones do, for their own id was never
    # trained. Where there are some, validation rows do, too, so that the epoch is chosen for unknown users.
    # Test rows never do: so with cold users val_* and test_* figures are not to be compared.
    has_cold = len(dataset.rows(COLD)) > 0
    hidden = {VALIDATION: unknown_user, COLD: unknown_user} if has_cold else {}
    data = {split: rows_of(dataset, split, lookup, device, hidden.get(split))
            for split in (TRAIN, VALIDATION, TEST, COLD)}
    # Of torch: first weights, dropout, the order of rows. Note: userip and its controls, random and shuffled,
    # share these draws, for their embedding tables have one size. The bank `none` has a smaller table and so
    # gets other draws.
    seeded(args.seed, repetition, 5)
    model = MODELS[model_name](fields).to(device)
    facts, state = train(model, data[TRAIN], data[VALIDATION], unknown_user, args)
    # The key "seed" holds the number of the repetition, whose draws come from it and --seed.
    row = {"model": model_name, "ids": ids_name, "fields": args.fields, "seed": repetition, **facts}
    evaluated = {"test": TEST}  # looked at once, at the best validation epoch
    if has_cold:
        evaluated["cold"] = COLD
    probabilities = {}
    for name, split in evaluated.items():
        users, _, labels = dataset.rows(split).T
        scores = predict(model, data[split][0])
        probabilities[name] = torch.from_numpy(scores)
        row[f"{name}_auc"] = auc(labels, scores)
        row[f"{name}_gauc"] = gauc(users, labels, scores)
        row[f"{name}_logloss"] = logloss(labels, scores)
    row["parameters"] = count_parameters(model)
    return {"row": row, "state": state, **probabilities}


# -------- here the method ends; variants: more models
#
# Note: the papers of FFM, AFN and AutoInt have no first-order term; it is added here, as to the others. And
# AFN's paper has no bias inside exp, AutoInt's no division by the root of a head's width.

class PairRecommender(Recommender):
    """A Recommender that knows the P = F (F - 1) / 2 pairs of fields i < j."""

    def __init__(self, fields, **more):
        super().__init__(fields, **more)
        left, right = torch.triu_indices(self.F, self.F, 1)  # the fields of each pair. Shape: (P,)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)

    def towards(self, ids):
        """Field-aware embeddings (B, F, F, D): [:, i, j] is e_ij, what field i shows to field j."""
        return self.embed(ids).unflatten(2, (self.F, -1))

    def field_aware_pairs(self, towards):
        """<e_ij, e_ji> of all pairs: (B, P)."""
        return (towards[:, self.left, self.right] * towards[:, self.right, self.left]).sum(2)


class FFM(PairRecommender):
    """first order + sum_{i<j} <e_ij, e_ji>: F times the memory. Juan et al. 2016, Eq. (4)."""

    def __init__(self, fields):
        super().__init__(fields, per_id=len(fields))

    def forward(self, ids):
        return self.first_order(ids) + self.field_aware_pairs(self.towards(ids)).sum(1)


def factorization(e):
    """sum_{i<j} <e_i, e_j> = (||sum_i e_i||^2 - sum_i ||e_i||^2) / 2, Rendle 2010. (B, F, D) -> (B,)."""
    return (e.sum(1).pow(2) - e.pow(2).sum(1)).sum(1) / 2


class AFM(PairRecommender):
    """first order + p . sum_{i<j} a_ij (e_i * e_j), a = softmax(h . ReLU(W (e_i * e_j) + b)).

    Xiao et al. 2017, section 3.
    """

    def __init__(self, fields, attention=8):
        super().__init__(fields)
        self.W = linear(self.D, attention)
        self.h = nn.Linear(attention, 1, bias=False)
        self.p = nn.Linear(self.D, 1, bias=False)
        nn.init.ones_(self.p.weight)
        self.dropout = nn.Dropout(0.2)

    def forward(self, ids):
        e = self.embed(ids)
        products = e[:, self.left] * e[:, self.right]  # Shape: (B, P, D)
        attention = self.h(self.W(products).relu()).softmax(dim=1)  # Shape: (B, P, 1)
        return self.first_order(ids) + self.p(self.dropout((attention * products).sum(1))).squeeze(1)


class DeepFM(Recommender):
    """first order + FM + MLP on the same embeddings. Guo et al. 2017, Eq. (1)-(4)."""

    def __init__(self, fields):
        super().__init__(fields)
        self.deep = nn.Sequential(mlp(self.F * self.D), linear(16, 1))

    def forward(self, ids):
        e = self.embed(ids)
        return self.first_order(ids) + factorization(e) + self.deep(e.flatten(1)).squeeze(1)


class PNN(PairRecommender):
    """MLP on embeddings and inner products <e_i, e_j> (IPNN). Qu et al. 2016, Eq. (2)-(7)."""

    def __init__(self, fields, per_id=1):
        super().__init__(fields, per_id=per_id, with_first_order=False)
        self.deep = nn.Sequential(mlp(self.F * self.D + len(self.left)), linear(16, 1))

    def forward(self, ids):
        e = self.embed(ids)
        inner = (e[:, self.left] * e[:, self.right]).sum(2)
        return self.deep(torch.hstack([e.flatten(1), inner])).squeeze(1)


class ONN(PNN):
    """PNN with an embedding for each operation: e_ii is copied, e_ij multiplied.

    Yang et al. 2020, Eq. (5)-(8).
    """

    def __init__(self, fields):
        super().__init__(fields, per_id=len(fields))

    def forward(self, ids):
        towards = self.towards(ids)
        copies = towards.diagonal(dim1=1, dim2=2).mT  # Shape: (B, F, D)
        return self.deep(torch.hstack([copies.flatten(1), self.field_aware_pairs(towards)])).squeeze(1)


class AFN(Recommender):
    """first order + MLP on exp(sum_i w_ik ln|e_i|), learned powers. Cheng et al. 2020, Eq. (6)-(8).

    Note: |e| >= 1e-4, for ln blows up at 0; BatchNorm holds ln and exp in range.
    """

    def __init__(self, fields, neurons=32):
        super().__init__(fields)
        self.powers = nn.Linear(self.F, neurons)
        self.log_norm = nn.BatchNorm1d(self.F * self.D, eps=0.1)  # a smaller eps lets a constant field drift
        self.exp_norm = nn.BatchNorm1d(neurons * self.D)
        self.deep = nn.Sequential(mlp(neurons * self.D), linear(16, 1))

    def forward(self, ids):
        logs = self.embed(ids).abs().clamp(min=1e-4).log()
        logs = self.log_norm(logs.flatten(1)).view_as(logs)
        crossed = self.powers(logs.mT).exp()  # Shape: (B, D, neurons)
        return self.first_order(ids) + self.deep(self.exp_norm(crossed.flatten(1))).squeeze(1)


class AutoInt(Recommender):
    """first order + a linear logit on layers of attend(). Song et al. 2019, Eq. (5)-(9)."""

    def __init__(self, fields, layers=2):
        super().__init__(fields)
        self.layers = nn.ModuleList(attention_layer(self.D) for _ in range(layers))
        self.head = linear(self.F * self.D, 1)

    def forward(self, ids):
        e = self.embed(ids)
        for layer in self.layers:
            e = attend(e, layer)
        return self.first_order(ids) + self.head(e.flatten(1)).squeeze(1)


def attention_layer(dim):
    return nn.Linear(dim, 4 * dim, bias=False)  # query, key, value, W


def attend(e, layer, heads=2):
    """ReLU(multi-head dot-product self-attention over fields + W e). (B, F, D) -> (B, F, D)."""
    def by_head(part):
        return part.unflatten(2, (heads, -1)).transpose(1, 2)  # Shape: (B, heads, F, D / heads)

    query, key, value, skip = layer(e).chunk(4, dim=2)
    query = by_head(query)
    key = by_head(key)
    value = by_head(value)
    weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)  # Shape: (B, heads, F, F)
    mixed = (weights @ value).transpose(1, 2).flatten(2)  # Shape: (B, F, D)
    return (mixed + skip).relu()


class DIFM(Recommender):
    """FM with w_i and e_i times m_i, which is learned from all fields. Lu et al. 2020, Eq. (7)-(12).

    m_i says how much field i counts in this row: m = from_vectors, made of the embeddings by attention, +
    from_bits, made of all their numbers by an MLP. Note: starts at m = 1, a plain FM; m near 0 would stop
    every gradient.
    """

    def __init__(self, fields):
        super().__init__(fields, std=0.01)  # from .05 it overfits
        self.attention = attention_layer(self.D)
        self.deep = mlp(self.F * self.D)
        self.from_vectors = nn.Linear(self.F * self.D, self.F)
        self.from_bits = nn.Linear(16, self.F, bias=False)
        nn.init.ones_(self.from_vectors.bias)

    def forward(self, ids):
        e = self.embed(ids)
        m = self.from_vectors(attend(e, self.attention).flatten(1))  # Shape: (B, F)
        m = m + self.from_bits(self.deep(e.flatten(1)))
        return (m * self.weights(ids).squeeze(2)).sum(1) + self.bias + factorization(m.unsqueeze(2) * e)


class FiBiNET(PairRecommender):
    """first order + MLP on bilinear pairs (e_i W_ij) * e_j of embeddings before and after SENET.

    Huang et al. 2019, Eq. (3)-(9). Note: embeddings start at .005 and W near 5 times the identity. With .05
    and 1 the L2 penalty shrinks the products, all that the MLP sees, to 0.
    """

    def __init__(self, fields):
        super().__init__(fields, std=0.005)
        pairs = len(self.left)
        squeezed = max(1, self.F // 2)
        self.squeeze = linear(self.F, squeezed)
        self.excite = linear(squeezed, self.F)
        nn.init.ones_(self.excite.bias)  # Note: else ReLU keeps a field that starts at 0 shut
        self.W = nn.Parameter(5 * (torch.eye(self.D) + 0.1 * torch.randn(2, pairs, self.D, self.D)))
        self.deep = nn.Sequential(mlp(2 * pairs * self.D), linear(16, 1))

    def forward(self, ids):
        e = self.embed(ids)
        gates = self.excite(self.squeeze(e.mean(2)).relu()).relu()  # Shape: (B, F)
        pairs = []  # of the embeddings before SENET and after it
        for v, W in zip((e, gates.unsqueeze(2) * e), self.W):
            left = torch.einsum("bpd,pdk->bpk", v[:, self.left], W)  # Shape: (B, P, D)
            pairs.append(left * v[:, self.right])
        return self.first_order(ids) + self.deep(torch.hstack(pairs).flatten(1)).squeeze(1)


MODELS = {"lr": LR, "ffm": FFM, "afm": AFM, "fibinet": FiBiNET, "difm": DIFM, "afn": AFN,
          "deepfm": DeepFM, "autoint": AutoInt, "onn": ONN, "pnn": PNN, "dcn": DCN, "dcnv2": DCNv2}


# -------- running it: the flags

IDS = ("none", "random", "shuffled", "userip", "planted")
FIELDS = ("ids", "ids+attributes", "attributes")
SPARSE = 30  # training rows a user; with fewer a model overfits the user id


def nonempty_names(text):
    """argparse type: comma-separated names, each once."""
    names = [name.strip() for name in text.split(",")]
    names = [name for name in names if name]
    if not names:
        raise argparse.ArgumentTypeError("give one name or more, separated by commas")
    return list(dict.fromkeys(names))


def parse_arguments():
    parser = Parser(__doc__, "cpu")  # a GPU is slower here
    add = parser.add_argument
    add("--models", type=nonempty_names, default="dcn", help=f"all, or of {', '.join(MODELS)}")
    add("--ids", type=nonempty_names,
        help=f"banks of codes: {','.join(IDS)} (default: those that there are), or the NAME of your own")
    add("--seeds", type=at_least(1), default=5, help="repetitions, with the same seeds for each of --ids")
    add("--fields", choices=FIELDS, default="ids",
        help="ids: of user and item (paper); attributes: item id and attributes, no user id")
    add("--profile-input", choices=("codes", "embedding"), default="codes",
        help="what userip and its controls feed: codes, or theta's coordinates z, projected (Table 3)")
    add("--user-dropout", type=at_least(0, float, 1), help="share of training rows whose user is hidden "
        f"(default: 0.85 below {SPARSE} rows a user, else 0; at least 0.5 with cold users)")
    add("--epochs", type=at_least(1), default=60, help="most epochs")
    add("--patience", type=at_least(1), default=10, help="stop after so many epochs without a better one")
    add("--batch-size", type=at_least(2), help="default: training rows / 80, within 128-1024 (paper: 128)")
    add("--lr", type=at_least(1e-12, float), default=3e-3, help="Adam step size (paper: 0.001)")
    add("--weight-decay", type=at_least(0, float), default=1e-3, help="L2 of embeddings (paper: none)")
    args = parser.parse_args()
    if args.models == ["all"]:
        args.models = list(MODELS)
    unknown = [name for name in args.models if name not in MODELS]
    if unknown:
        parser.error(f"--models: unknown {', '.join(unknown)}; known: {', '.join(MODELS)}")
    if args.user_dropout and args.fields == "attributes":
        parser.error("--fields attributes goes without --user-dropout: there is no user id to hide")
    return args


# -------- banks of codes

@dataclass
class Inputs:
    """banks: {name: (codes int (U, M), sizes K_m)}; z: theta's coordinates, float (U, M, r), or None."""

    banks: dict
    z: np.ndarray | None = None

    def of(self, ids_name, seeds):
        """A row's (codes, sizes, z).

        With --profile-input embedding userip gets its z, random Gaussian noise of z's shape, shuffled another
        user's z; other banks keep their codes. Noise and not random codes: r real numbers are different for
        every user and so could work as a user id, and the control must have this chance, too.
        """
        rng = np.random.default_rng(seeds)
        codes, sizes = codes_of(ids_name, self.banks, rng)
        z = self.z if bank_name(ids_name) == "userip" else None
        if z is not None and ids_name != "userip":
            noise = rng.standard_normal(z.shape, dtype=np.float32)
            noise *= z.any(axis=0)  # a profile of few words has directions of length 0
            z = noise if "random" in ids_name else rng.permutation(z)
        return codes, sizes, z

    def fingerprints(self, dataset):
        """Fingerprints by name: "dataset", "bank NAME" of each, "z" if given."""
        found = {"dataset": dataset.fingerprint()}
        for name, bank in self.banks.items():
            found[f"bank {name}"] = fingerprint(*bank)
        if self.z is not None:
            found["z"] = fingerprint(self.z)
        return found


def read_bank(run, name, dataset):
    """(codes (U, M), sizes) of truth.npy (planted), feature_bank.npy (userip) or feature_bank_NAME.npy."""
    if name == "planted":
        truth = load_truth(run)
        if truth is None:
            raise UserError("this run has no planted truth", run, "leave planted out of --ids")
        return truth, (truth.max(axis=0) + 1).tolist()
    bank = f"feature_bank_{name}.npy"
    card = f"feature_bank_{name}.json"
    if name == "userip":
        bank = "feature_bank.npy"
        card = "quantize.json"
    elif not (run / bank).exists():
        raise UserError(f"there are no ids called {name}", run,
                        f"known: {','.join(IDS)}; or write {bank}, {card}")
    elif not (run / card).exists():
        raise UserError(f"{card} is missing", run,
                        f"write it: codes and dataset_fingerprint of {bank}, see README")
    facts = load(run, card, ("codes", "dataset_fingerprint"))
    again = None
    if name != "userip":  # what made it is known to its card alone
        maker = str(facts.get("made_by") or "what made it")
        again = f"make it again, by {maker}"
        if maker.startswith("tools/"):
            again = f"run: python {maker} --run {run}"
    codes = np.array(load(run, bank))
    sizes = facts["codes"] if isinstance(facts["codes"], list) else [facts["codes"]]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise UserError(f"{card} has codes {facts['codes']}", run,
                        "give for each column how many codes it has, as in [4, 3]")
    check_same(run, bank, "dataset", facts["dataset_fingerprint"], dataset.fingerprint(), again)
    if name == "userip":
        check_same(run, bank, card, fingerprint(codes), facts.get("fingerprint"))
    elif "profiles_fingerprint" in facts:  # a rival that stage 02's LLM made
        profiles = load(run, "profiles.json", ("fingerprint",))
        check_same(run, bank, "profiles.npy", facts["profiles_fingerprint"], profiles["fingerprint"], again)
    shape = (len(dataset.users), len(sizes))
    if codes.dtype.kind not in "iu" or codes.shape != shape or ((codes < 0) | (codes > sizes)).any():
        raise UserError(f"{bank} holds {codes.dtype} {codes.shape}; wanted are integers {shape} from 0 to "
                        f"{facts['codes']}", run, f"write it anew; K (in {card}) means unknown")
    return codes, sizes


def read_inputs(args):
    """(dataset, Inputs), checked to belong together and to have both labels; fills in args.ids."""
    run = args.run
    dataset = load_dataset(run)
    truth = load_truth(run)
    for split, name in ((TRAIN, "training"), (VALIDATION, "validation"), (TEST, "test"), (COLD, "cold")):
        labels = dataset.rows(split)[:, 2]
        if len(np.unique(labels)) < 2 and (split != COLD or len(labels)):
            raise UserError(f"all {name} labels are equal", run, "give more data or another --positive-above")
    args.ids = args.ids or [name for name in IDS if name != "planted" or truth is not None]
    for name in args.ids:
        if name != "none" and bank_name(name) == "none":
            raise UserError(f"{name} would be a control of no codes", "--ids", "take random or shuffled")
        is_taken = name in IDS or name != bank_name(name)
        if is_taken and (run / f"feature_bank_{name}.npy").exists():
            raise UserError(f"a bank may not be called {name}: stage 04 has a row of this name", run,
                            f"rename feature_bank_{name}.npy and .json")
    names = dict.fromkeys(bank_name(name) for name in args.ids if name != "none")
    banks = {name: read_bank(run, name, dataset) for name in names}
    if "userip" in names:
        load(run, "quantize.json", ("quantizer",))  # which the table will name
        if (run / "profiles.json").exists():
            check_theta(run)
    z = None
    if args.profile_input == "embedding":
        if "userip" not in names:
            raise UserError("embedding is theta in the place of userip's codes, and no row has these",
                            "--profile-input", "add userip to --ids")
        z = np.array(load(run, "profiles.npy"))
        expected = load(run, "quantize.json", ("profiles_fingerprint",))["profiles_fingerprint"]
        check_same(run, "quantize.json", "profiles.npy", fingerprint(z), expected)
        z = standardized(z)
    return dataset, Inputs(banks, z)


def check_theta(run):
    """UserError where stage 02 has run again since 03 made the bank; a WARNING where it ran with --users."""
    profiles = load(run, "profiles.json", ("fingerprint", "rows_kept"))
    made_from = load(run, "quantize.json", ("profiles_fingerprint",))["profiles_fingerprint"]
    if made_from != profiles["fingerprint"]:
        keep = " --keep-codebooks" if profiles["rows_kept"] else ""
        raise UserError("feature_bank.npy was made from another profiles.npy", run,
                        f"run: python 03_quantize.py --run {run}{keep}")
    if profiles["rows_kept"]:
        print("WARNING: stage 02 ran with --users: theta of the first run's users is of another split and "
              "may have seen what are test rows now. Serve this bank; measure with one that is inferred anew")


def standardized(z):
    """z (U, M, r) centred, each profile's mean square 1: the scale of the noise that is its control.

    Users without a history (z = 0) do not count, and keep 0, which an unseen user has too.
    """
    has_history = z.any((1, 2))
    z = np.where(has_history[:, None, None], z - z[has_history].mean(axis=0), 0)
    varies = z.any(axis=0)  # a profile of few words has directions of length 0. Shape: (M, r)
    mean_square = (z ** 2).sum((0, 2)) / np.maximum(1, has_history.sum() * varies.sum(1))
    return (z / np.maximum(mean_square ** 0.5, 1e-12)[:, None]).astype(np.float32)


def default_user_dropout(dataset):
    """--user-dropout where none is given: .85 on sparse data, else 0, and at least .5 with cold users."""
    users = dataset.rows(TRAIN)[:, 0]
    dropout = 0.85 if len(users) < SPARSE * len(np.unique(users)) else 0.0
    return max(dropout, 0.5) if len(dataset.rows(COLD)) else dropout


# -------- evaluate

def mean_sd(values):
    """{mean, sd} of a sample; a single value has no sd: None."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": sd}


def summarize(rows):
    """{model: {ids: entry}}. An entry holds mean_sd over repetitions of each metric, and of its differences,
    repetition by repetition, to the rows `none` and `random` of the same model.
    """
    table = {}
    rows_of_key = {}
    for row in rows:
        rows_of_key.setdefault((row["model"], row["ids"]), {})[row["seed"]] = row
    metrics = [key for key in rows[0] if key.endswith(("auc", "logloss")) and rows[0][key] is not None]
    for key, by_repetition in rows_of_key.items():
        model, ids_name = key
        entry = {}
        for metric in metrics:
            entry[metric] = mean_sd([row[metric] for row in by_repetition.values()])
        for control in ("none", "random"):
            reference = rows_of_key.get((model, control))
            # Of a bank of your own random-NAME is the better reference, for it has as many codes.
            own_control = f"random-{bank_name(ids_name)}"
            if control == "random" and ids_name != own_control:
                reference = rows_of_key.get((model, own_control), reference)
            if reference is None or ids_name == control:
                continue
            for metric in metrics:
                differences = [row[metric] - reference[repetition][metric]
                               for repetition, row in by_repetition.items()]
                entry[f"{metric.removeprefix('test_')}_minus_{control}"] = mean_sd(differences)
        table.setdefault(model, {})[ids_name] = entry
    return table


def show(summary, base_logloss):
    """The table in text. base_logloss: of the test rows, where all get the share of likes in training."""
    def formatted(entry, key):
        if key not in entry:
            return ""
        mean = entry[key]["mean"]
        sd = entry[key]["sd"]
        return f"{mean:7.4f}" if sd is None else f"{mean:7.4f} ± {sd:.4f}"

    titles = "test_auc test_gauc test_logloss cold_auc cold_gauc auc_minus_none auc_minus_random".split()
    measured = set()
    for by_ids in summary.values():
        for entry in by_ids.values():
            measured.update(entry)
    columns = [key for key in titles if key in measured]
    print(f"\n{'model':11s}{'ids':16s}" + "".join(f"{key:18s}" for key in columns))
    for model, by_ids in summary.items():
        for ids_name, entry in by_ids.items():
            values = "".join(f"{formatted(entry, key):18s}" for key in columns)
            print(f"{model:11s}{ids_name:16s}{values}")
    constant = dict.fromkeys(("test_auc", "test_gauc", "cold_auc", "cold_gauc"), " 0.5000")
    constant["test_logloss"] = f"{base_logloss:7.4f}"
    line = f"{'constant':11s}{'base rate':16s}" + "".join(f"{constant.get(key, ''):18s}" for key in columns)
    print(line.rstrip())


# -------- save

def save(args, dataset, inputs, files):
    """Write results.json, models and predictions from files {(model, name of ids, repetition): path}.

    Warns of rows that may have learned nothing from their codes. Returns (summary, logloss of the base rate).
    """
    rows = []
    kept = "userip" if "userip" in args.ids else args.ids[0]  # whose weights are in ctr_<model>.pt
    for key, path in files.items():
        model, ids_name, repetition = key
        result = load(path.parent, path.name, ("row", "state"))
        row = result["row"]
        rows.append(row)
        for split, ending in (("test", ""), ("cold", "-cold")):
            if split in result:
                name = f"{model}-{ids_name}-{repetition}{ending}.npy"
                save_npy(args.run / "predictions" / name, result[split].numpy())
        if repetition == 0 and ids_name == kept:
            with together(args.run) as aside:  # weights and the settings to which they belong
                save_torch(aside / f"ctr_{model}.pt", result["state"])
                save_json(aside / f"ctr_{model}.json", {
                    "model": model, "ids": ids_name, "fields": args.fields,
                    "profile_input": args.profile_input, "seed": args.seed,
                    "fingerprints": inputs.fingerprints(dataset)})
        is_real_bank = ids_name != "none" and bank_name(ids_name) == ids_name
        if is_real_bank and row["best_epoch"] <= 2:
            print(f"WARNING: {model} with {ids_name} ids, repetition {repetition}, was best in epoch "
                  f"{row['best_epoch']}: it hardly learned what codes and items have to do with each other; "
                  "a smaller --lr, more --user-dropout or more data may help")
    quantizer = None  # the --quantizer of 03 that made userip
    if "userip" in args.ids:
        quantizer = load(args.run, "quantize.json", ("quantizer",))["quantizer"]
    summary = summarize(rows)
    share = dataset.rows(TRAIN)[:, 2].mean()  # of likes
    base_logloss = {}  # of each split that has rows
    for split in (TEST, COLD):
        labels = dataset.rows(split)[:, 2]
        base_logloss[split] = logloss(labels, np.full(len(labels), share)) if len(labels) else None
    save_json(args.run / "results.json", {
        "rows": rows, "summary": summary, "base_rate_logloss": base_logloss[TEST],
        "cold_base_rate_logloss": base_logloss[COLD], "fields": args.fields,
        "user_dropout": args.user_dropout, "profile_input": args.profile_input,
        "quantizer": quantizer, "fingerprints": inputs.fingerprints(dataset),
        "command": "python " + " ".join(sys.argv),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                     "numpy": np.__version__, "scikit-learn": sklearn.__version__}})
    return summary, base_logloss[TEST]


# -------- main

def files_of_code():
    """The files of code on which rows depend: a model of yours may stand in one of yours."""
    files = {__file__, common.__file__, getattr(sys.modules["__main__"], "__file__", __file__)}
    for model in MODELS.values():
        with contextlib.suppress(TypeError, OSError):  # a model of a notebook has no file
            files.add(inspect.getfile(model))
    return [path for path in sorted(map(Path, files)) if path.is_file()]


def main():
    args = parse_arguments()
    device = pick_device(args.device)
    dataset, inputs = read_inputs(args)
    args.batch_size = args.batch_size or min(1024, max(128, len(dataset.rows(TRAIN)) // 80))
    if args.fields == "attributes":
        args.user_dropout = 0.0  # there is no user id to hide
    elif args.user_dropout is None:
        args.user_dropout = default_user_dropout(dataset)
    vectors = ", profiles.npy" if args.profile_input == "embedding" else ""
    announce("04 train CTR", args, f"stage 01's files, the banks and their cards{vectors}")
    # A finished row is a file in a folder that is named after all on which rows depend: data, banks, flags,
    # code. So a killed run goes on, and an edited model (DCN stands in common.py) begins anew.
    # These flags choose which rows are trained and do not change what is in a row, so they are not part of
    # the name. (The banks that --ids needs are.)
    varied = ("run", "models", "ids", "seeds")
    settings = {key: str(value) for key, value in vars(args).items() if key not in varied}
    sources = [path.read_text("utf-8") for path in files_of_code()]
    work = args.run / f"rows-{fingerprint(inputs.fingerprints(dataset), settings, sources)[:12]}"
    files = {}
    for model, repetition, ids_name in itertools.product(args.models, range(args.seeds), args.ids):
        files[model, ids_name, repetition] = work / f"{model}-{ids_name}-{repetition}.pt"
    # do_all() writes run_one(dataset, model, ids_name, repetition, ...) to each path that is not there.
    pieces = [(path, run_one, dataset, *key, inputs, args, device) for key, path in files.items()]
    do_all(pieces, "training", "run", device)
    show(*save(args, dataset, inputs, files))
    for path in files.values():
        for own in [path, *work.glob(f".{path.name}.*")]:  # and what a killed process left of it
            own.unlink(missing_ok=True)
    others = len(list(work.iterdir()))  # of a command for other --models, --ids or --seeds
    if others:
        print(f"unfinished: {work} has {others} rows of another command, which goes on with them")
    else:
        work.rmdir()
    for other in sorted(set(args.run.glob("rows-*")) - {work}):
        print(f"unfinished: {other} is of other flags, banks or code; delete it if nobody goes on with it")
    print(f"\n{args.seeds} seeds, fields {args.fields}; wrote results.json ctr_*.pt .json predictions/ to "
          f"{args.run}")
    if (args.run / "feature_bank.csv").exists():
        print(f"next: python tools/explain.py --run {args.run} --all")


if __name__ == "__main__":
    guarded(main, "lower --batch-size, or set OMP_NUM_THREADS=1, which trains one model at a time")
