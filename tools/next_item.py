"""Which item does a user like next? The task, its metrics and rivals that train no LLM; for recsysllm.py.

Each user's last liked row of a split is to be found among all items that the user has in no training row.
Rivals: chance, popularity, popularity among the items of the user's commonest attributes, the title most
similar to the last one that was liked, and SASRec, a small self-attentive sequence model without text.
"""

import contextlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from stages import common, quantize

EPOCHS = 200  # of SASRec, at most

# -------- the task and its metrics

def ranks_of(scores, targets, excluded, rng):
    """Rank, from 1, of each user's target among the items that are not excluded; ties by chance.

    scores: float (n, I); targets: int (n,); excluded: a list of item arrays.
    """
    found = []
    for row, target, known in zip(scores, targets, excluded):
        open_items = np.setdiff1d(np.arange(len(row)), known)
        others = row[open_items[open_items != target]]
        ties = int((others == row[target]).sum())
        found.append(1 + int((others > row[target]).sum()) + int(rng.integers(ties + 1)))
    return np.array(found)


def ranking_figures(ranks):
    """HR@1, 5, 10 and NDCG@5, 10 of one relevant item each, at these ranks."""
    gain = 1 / np.log2(ranks + 1)
    figures = {f"hr@{k}": float((ranks <= k).mean()) for k in (1, 5, 10)}
    return figures | {f"ndcg@{k}": float(np.where(ranks <= k, gain, 0).mean()) for k in (5, 10)}


@dataclass
class NextItem:
    """The task: users, the item that each is to be found, the rows (n, 3) that each is known by."""

    users: np.ndarray
    targets: np.ndarray
    known: list

    def figures(self, scores, seed):
        """Of scores (n, I); items that a user has in a known row are left out. UserError if one is NaN."""
        if np.isnan(scores).any():
            raise common.UserError("a score is no number", "the next item",
                                   "take --dtype fp32 or a lower --lr")
        known = [rows[:, 1] for rows in self.known]
        return ranking_figures(ranks_of(scores, self.targets, known, np.random.default_rng((seed, 22))))


def next_item_task(dataset, split, most, seed):
    """Each user's last liked row of a split is to be found, for at most `most` users drawn by chance.

    DEVIATION(R5): the paper follows Geng et al. 2022, who leave each user's last item out. 01's split is
    drawn by chance, so that training rows may be later than the target.
    """
    training = quantize.rows_by_user(dataset.rows(common.TRAIN), len(dataset.users))
    last = {}
    for user, item, label in dataset.rows(split).tolist():
        if label and len(training[user]):
            last[user] = item
    if not last:
        raise common.UserError("no user has both a training row and a liked row to be found",
                               "interactions.npy", "give more data")
    users = np.random.default_rng((seed, 21)).permutation(sorted(last))[:most]
    return NextItem(users, np.array([last[user] for user in users]), [training[user] for user in users])


# -------- rivals

def popularity(dataset):
    """Likes of each item in training rows: float (I,)."""
    _, items, labels = dataset.rows(common.TRAIN).T
    return np.bincount(items, labels, len(dataset.items))


def popularity_by_attributes(dataset, known):
    """Popularity among the items that have the user's commonest value of each profile: float (n, I).

    known: the rows (n, 3) of each user. More such values count before popularity does.
    """
    popular = popularity(dataset)
    has = {}  # (profile, value): which items have it
    for profile in dataset.profiles:
        for number, item in enumerate(dataset.items):
            for value in item["attributes"].get(profile["name"], []):
                has.setdefault((profile["name"], value), np.zeros(len(popular)))[number] = 1
    scores = []
    for rows in known:
        score = popular / (1 + popular.max())
        for profile in dataset.profiles:
            counts = Counter()
            for item in liked_items(rows, len(rows)):
                counts.update(dataset.items[item]["attributes"].get(profile["name"], []))
            if counts:
                value = min(counts, key=lambda value: (-counts[value], value))
                score = score + has[profile["name"], value]
        scores.append(score)
    return np.array(scores)


@torch.no_grad()
def title_vectors(likelihood, begin, titles):
    """Mean last hidden states of the titles (token lists) in the LLM as it is: float32 (I, d), length 1."""
    vectors = []
    for ids in titles:
        tokens = torch.tensor([begin + ids], device=likelihood.device)
        states = likelihood.body(tokens, use_cache=False).last_hidden_state[0, len(begin):]
        vectors.append(states.float().mean(0))
    return nn.functional.normalize(torch.stack(vectors), dim=1).cpu().numpy()


class SASRec(nn.Module):
    """Self-attention over a user's last titles; the next by inner product. Kang and McAuley 2018."""

    def __init__(self, items, length, width=32):
        super().__init__()
        self.item = nn.Embedding(items + 1, width, padding_idx=items)
        self.place = nn.Embedding(length, width)
        for table in (self.item, self.place):
            nn.init.normal_(table.weight, std=0.05)
        layer = nn.TransformerEncoderLayer(width, 2, width, 0.2, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, sequences):
        """int (B, L), padded on the right, -> what follows each place, logits (B, L, I)."""
        embedded = self.item(sequences) + self.place.weight[:sequences.shape[1]]
        causal = nn.Transformer.generate_square_subsequent_mask(sequences.shape[1])
        return self.blocks(embedded, mask=causal, is_causal=True) @ self.item.weight[:-1].T


def liked_items(rows, most):
    """The user's last liked items, at most `most`."""
    return rows[rows[:, 2] == 1, 1][-most:].tolist() if most else []


def padded_sequences(sequences, filler):
    return nn.utils.rnn.pad_sequence(list(map(torch.tensor, sequences)), True, filler)


@torch.no_grad()
def sasrec_scores(model, known, length):
    """What follows each user's liked rows: float (n, I); 0 for users who liked nothing."""
    model.eval()
    count = len(model.item.weight) - 1
    found = np.zeros((len(known), count), np.float32)
    for user, rows in enumerate(known):
        items = liked_items(rows, length)
        if items:
            found[user] = model(torch.tensor([items]))[0, -1].numpy()
    return found


def fit_sasrec(dataset, seed, length=50, epochs=None, patience=20, batch=128):
    """Cross entropy over all items, Adam; the epoch of the best NDCG@10 on validation rows.

    epochs: at most, None: EPOCHS. Returns None where no user has two liked rows.
    """
    rng = common.seeded(seed, 23)
    count = len(dataset.items)
    histories = quantize.rows_by_user(dataset.rows(common.TRAIN), len(dataset.users))
    sequences = [liked_items(rows, length + 1) for rows in histories]
    sequences = [items for items in sequences if len(items) > 1]
    task = None
    with contextlib.suppress(common.UserError):  # no liked validation row: the last epoch is kept
        task = next_item_task(dataset, common.VALIDATION, 1000, seed)
    if not sequences:
        return None
    model = SASRec(count, length)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    found = []
    for _ in common.progress(range(epochs or EPOCHS), "SASRec", "epoch"):
        model.train()
        order = rng.permutation(len(sequences))
        for at in range(0, len(order), batch):
            chosen = [sequences[number] for number in order[at:at + batch]]
            logits = model(padded_sequences([items[:-1] for items in chosen], count))
            targets = padded_sequences([items[1:] for items in chosen], -100)
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
            optimizer.step()
        figure = 0.0
        if task:
            figure = task.figures(sasrec_scores(model, task.known, length), seed)["ndcg@10"]
        found.append(figure)
        if found[-1] == max(found):
            state = {name: value.clone() for name, value in model.state_dict().items()}
        elif max(found) > max(found[-patience:]):
            break
    model.load_state_dict(state)
    return model


def rival_scores(dataset, task, vectors, seed):
    """{name: scores (n, I)} of what needs no LLM trained to recommend.

    SASRec, which cannot start from nothing, falls back on popularity. On validation rows it is favoured: its
    epoch is chosen on them.
    """
    n_items = len(dataset.items)
    chance = np.zeros((len(task.users), n_items))
    similar = np.zeros_like(chance)
    for place, rows in enumerate(task.known):
        liked = liked_items(rows, 1)
        if liked:
            similar[place] = vectors @ vectors[liked[0]]  # cosines
    popular = np.tile(popularity(dataset), (len(task.users), 1))
    sasrec = popular
    model = fit_sasrec(dataset, seed)
    if model is not None:
        knows_likes = np.array([bool(liked_items(rows, 1)) for rows in task.known])
        found = sasrec_scores(model, task.known, len(model.place.weight))
        sasrec = np.where(knows_likes[:, None], found, popular)
    return {"chance": chance, "popularity": popular,
            "popularity by attributes": popularity_by_attributes(dataset, task.known),
            "the title most similar to the last": similar, "SASRec": sasrec}
