"""Stage 03: turn theta into one small id, a code, per profile, supervised by a recommender. Paper: 2.4, 2.6.

Stage 02 gave each user a soft token theta^m for each profile m. Here a profile gets K_m code vectors v_k^m,
numbered by k; the number of the one nearest to theta^m is the user's code c_m, and v_c^m is that code vector.

    l_vec = sum_m [||sg[theta^m] - v_c^m||^2 + beta ||theta^m - sg[v_c^m]||^2]
            + BCE(y, Rec^s(v_c^1, ..., v_c^M, E_obs, i))      Eq. (5), DEVIATION(14)
    c_m   = argmin_k ||theta^m - v_k^m||^2                    Eq. (6)
    L     = l_llm + alpha l_vec                               Eq. (7)

sg: a value through which no gradient flows; y: whether the user liked item i; Rec^s: a surrogate recommender;
E_obs: its other fields, here the user's id; l_llm: stage 02's loss, at theta; alpha, beta: weights.

Theta and v are held by r coordinates in the profile's space, 02's Space: theta = origin + (shrink z) basis.
The coordinates of a user are called z; a code vector has r coordinates, too, and all code vectors of a
profile are its codebook. The directions in `basis` are orthogonal and of one length (but under 02's --space
words), so the code nearest to z is the one nearest to theta before it is shrunk. DEVIATION(k): row k of
README's differences.

--quantizer vq: codebooks start from k-means, begun at the profile's words (stage 01: values of items, such
as music) that most items have, and a surrogate DCN is warmed up on these codes, DEVIATION(6); then Algorithm
1: minibatches of users update z and codebooks, and the surrogate learns along. kmeans: that start alone. em,
words: the LLM itself judges which code suits a user (variants). A code is named after the word of the
direction most like its own.

Sizes: U users, M profiles, r coordinates, K_m codes of profile m; B users of a minibatch, n rows (user, item,
label), n_u of one user.

What stands where; each part begins with a line of dashes:
    (common.py          Field, FieldEmbedding and DCN, its first part: the Surrogate is this recommender)
    model, loss, train  Eq. (6), the VQ layer, Eq. (5), Algorithm 1
    quantizers          k-means and the joint VQ: fit() learns, assign() applies. Read up to here first.
    data                what a quantizer may look at, a Problem; l_llm of Eq. (7) in blocks of users
    variants            EM with soft codes; asking for words
    running it          flags, how codes are used and called, files, main. Skip it at first.

Reads:  01's files, truth.npy for evaluation alone; profiles.npy .json profiles_users.json space.pt (02) and
        02's LLM; with --keep-codebooks codebooks.pt
Writes: codebooks.pt, M tensors (K_m, r) and what assigns a new user;  quantize.json;
        feature_bank.npy int16 (U, M), feature_bank.csv with the codes' names

Run:
    python 03_quantize.py  # the demo: 15 s
"""

import argparse
import csv
import importlib
import itertools
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn import cluster, metrics
from torch import nn

from common import (
    DCN, SEEN, TRAIN, Dataset, Field, Parser, UserError, announce, at_least, check_same,
    count_parameters, fingerprint, guarded, load, load_dataset, load_truth, pick_device, progress, save_json,
    save_npy, save_torch, seeded, together)

infer = importlib.import_module("02_infer_profiles")  # `import` takes no name that begins with a digit


# -------- model

@torch.no_grad()
def nearest(z, codebook):
    """Eq. (6): c = argmin_k ||z - v_k||^2. z (B, r), codebook (K, r) -> (B,)."""
    # Note: torch's faster way, |z|^2 + |v|^2 - 2 z v, loses its digits where users lie close together.
    return torch.cdist(z, codebook, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)


def assign_all(z, codebooks):
    """z (U, M, r), M codebooks (K_m, r) -> codes int (U, M)."""
    codes = [nearest(z[:, m], codebook) for m, codebook in enumerate(codebooks)]
    return torch.stack(codes, dim=1).cpu().numpy()


class VectorQuantizer(nn.Module):
    """A codebook: K code vectors (van den Oord et al. 2017)."""

    def __init__(self, codebook):
        super().__init__()
        self.codebook = nn.Parameter(codebook.clone())

    def forward(self, z):
        """z (B, r) -> (v_c (B, r), whose gradient goes to z unchanged; codebook term (B,); commitment (B,)).

        The terms are Eq. (5)'s first two, the second without its weight beta.

        Note: argmin has no gradient. So the recommender's gradient is handed to z as if no code stood between
        them. It never reaches the codebook: the recommender moves z, and z pulls its code vector along.
        """
        chosen = self.codebook[nearest(z, self.codebook)]
        # Two terms of one value: they differ in what they move.
        codebook_term = ((z.detach() - chosen) ** 2).sum(1)  # moves v_c only
        commitment = ((z - chosen.detach()) ** 2).sum(1)     # moves z only
        straight_through = z + (chosen - z).detach()         # value v_c, gradient of the identity
        return straight_through, codebook_term, commitment


class Surrogate(nn.Module):
    """Rec^s of Eq. (5): a DCN on user id, item id and the quantized profiles, projected. DEVIATION(13)."""

    def __init__(self, n_users, n_items, n_profiles, rank, dim=8):
        super().__init__()
        self.dcn = DCN([Field("user", n_users), Field("item", n_items)], dim, extra_fields=n_profiles)
        self.projections = nn.ModuleList(nn.Linear(rank, dim) for _ in range(n_profiles))

    def forward(self, pairs, quantized):
        """pairs (n, 2) of user and item, quantized (n, M, r) -> logits (n,)."""
        projected = [project(quantized[:, m]) for m, project in enumerate(self.projections)]
        fields = torch.cat([self.dcn.embed(pairs), torch.stack(projected, dim=1)], dim=1)
        return self.dcn.logit(fields)


def first_codebooks(z, sizes, start, seed, word_z=None):
    """M codebooks (K_m, r) with which training starts; the paper does not say where: DEVIATION(6).

    z: numpy (users, M, r); word_z: M tensors (n_words, r), the words' own z, the word of the most items
    first. Start "words": k-means over z that begins at the first K_m words, by k-means++ where there are too
    few; "kmeans": by k-means++; "random": uniform numbers within +-1/K, the authors' start, and no k-means.
    """
    codebooks = []
    for m, size in enumerate(sizes):
        if start == "random":
            found = np.random.default_rng((seed, m)).uniform(-1 / size, 1 / size, (size, z.shape[2]))
        else:
            check_users_differ(z[:, m], size, m)
            init = "k-means++"
            attempts = 10
            if start == "words" and size <= len(word_z[m]):
                init = word_z[m][:size].numpy()
                attempts = 1
            kmeans = cluster.KMeans(size, init=init, n_init=attempts, random_state=seed)
            found = kmeans.fit(z[:, m]).cluster_centers_
        codebooks.append(torch.tensor(found).float())
    return codebooks


# -------- loss and train

def vec_loss(z, user_rows, vq_layers, surrogate, beta):
    """Eq. (5), l_vec, of a minibatch: (loss, its parts as numbers).

    The two distances are summed over a user's profiles, BCE over the user's rows; of each, the mean over
    users is taken: a data point is a user, where the paper's is a pair of user and item, DEVIATION(9).
    z (B, M, r); user_rows: B arrays (n_u, 3) of user, item, label; vq_layers: M VectorQuantizers.
    """
    code_vectors = []
    codebook_terms = torch.zeros(len(z), device=z.device)  # of each user
    commitment_terms = torch.zeros(len(z), device=z.device)
    for m, layer in enumerate(vq_layers):
        straight_through, codebook_term, commitment_term = layer(z[:, m])
        code_vectors.append(straight_through)
        codebook_terms = codebook_terms + codebook_term
        commitment_terms = commitment_terms + commitment_term
    codebook_loss = codebook_terms.mean()
    commitment_loss = commitment_terms.mean()
    rows = torch.from_numpy(np.concatenate(user_rows)).long().to(z.device)  # Shape: (n, 3)
    user_of_row = np.repeat(np.arange(len(z)), [len(own) for own in user_rows])  # a place in the minibatch
    quantized = torch.stack(code_vectors, dim=1)  # Shape: (B, M, r)
    logits = surrogate(rows[:, :2], quantized[user_of_row])
    labels = rows[:, 2].float()
    rec_loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(z)
    parts = {"codebook": codebook_loss.item(), "commitment": commitment_loss.item(), "rec": rec_loss.item()}
    return codebook_loss + beta * commitment_loss + rec_loss, parts


def warm_up(surrogate, rows, quantized, epochs, rng):
    """Train the surrogate on rows (n, 3) with fixed quantized (U, M, r)."""
    optimizer = torch.optim.Adam(surrogate.parameters(), lr=1e-3)
    rows = torch.from_numpy(rows).long().to(quantized.device)
    size = min(1024, max(128, len(rows) // 160))  # some 160 batches an epoch, of 128 to 1,024 rows
    for _ in progress(range(epochs), "warming up the surrogate", "epoch"):
        for batch in torch.from_numpy(rng.permutation(len(rows))).split(size):
            logits = surrogate(rows[batch, :2], quantized[rows[batch, 0]])
            loss = F.binary_cross_entropy_with_logits(logits, rows[batch, 2].float())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def train_jointly(z, vq_layers, surrogate, user_rows, users, add_llm_gradient, args, rng):
    """Algorithm 1: minibatches of users update the z of these users and the codebooks. DEVIATION(15).

    The surrogate learns along; of how it is trained the paper says nothing.
    z: float (U, M, r), moved in place; user_rows: U arrays (n_u, 3); users: who has a history;
    add_llm_gradient: a function of (z_batch, batch) that adds the gradient of l_llm to z_batch.grad and
    returns l_llm, see Problem.open_llm_loss; or None. Returns the log, a dict for each epoch.
    """
    codebooks = [layer.codebook for layer in vq_layers]
    squares = torch.zeros_like(z)  # sums of z's squared gradients, for Adagrad
    optimizers = [torch.optim.Adam(codebooks, lr=args.lr), torch.optim.Adam(surrogate.parameters(), lr=1e-3)]
    log = []
    codes = assign_all(z[users], codebooks)
    for epoch in range(1, args.epochs + 1):
        means = Counter()  # over the users of the epoch
        batches = np.array_split(rng.permutation(users), math.ceil(len(users) / args.batch_users))
        for batch in progress(batches, f"joint epoch {epoch}", "batch"):
            z_batch = z[batch].requires_grad_()  # Shape: (B, M, r)
            rows = [user_rows[user] for user in batch]
            loss, parts = vec_loss(z_batch, rows, vq_layers, surrogate, args.beta)
            # Eq. (7): z gets the gradients of l_llm and of alpha l_vec, and alpha weighs the two. Codebooks
            # and surrogate get that of alpha l_vec alone, for l_llm does not depend on them; as Adam divides
            # a gradient by its size, alpha changes nothing for them, if it is not 0.
            (args.alpha * loss).backward()
            if add_llm_gradient:
                parts["llm"] = add_llm_gradient(z_batch, batch)
            if not math.isfinite(sum(parts.values()) + z_batch.grad.sum()):  # it is not if one part is not
                raise UserError(f"training diverged in epoch {epoch}", f"--lr {args.lr}",
                                "lower --lr, or run 02 with --dtype bf16 if its LLM is in fp16")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            # DEVIATION(7): Adagrad by hand, so that a user's step depends on the user's own past gradients.
            # Adam over all of z would also move users who are not in the batch, by its momentum.
            squares[batch] += z_batch.grad ** 2
            z[batch] -= args.lr * z_batch.grad / (squares[batch].sqrt() + 1e-10)
            share = len(batch) / len(users)
            for key, part in parts.items():
                means[key] += part * share
        before = codes
        codes = assign_all(z[users], codebooks)
        figures = {**means, "users_changed": int((codes != before).any(1).sum())}
        log.append(epoch_report(epoch, figures, codes, codebooks))
    return log


# -------- quantizers: fit learns, assign applies

class Quantizer:
    """What all quantizers have in common: fit() learns codebooks, assign() applies them."""

    assigns = "nearest"  # the --assign that it goes with: "nearest" to z, or by the LLM's "likelihood"
    codebooks = None  # M tensors (K_m, r) in the coordinates of profiles.npy, on the CPU
    # Of EM and words: M tensors (K_m,), added to a code's log-likelihood. A quantizer of your own may keep
    # here what its assign() needs, for codebooks.pt holds it.
    log_weights = None

    def __init__(self, problem, sizes, args, device):
        self.problem = problem  # a Problem (below): z numpy (U, M, r), who has one, the data set, ...
        self.sizes = sizes
        self.args = args
        self.device = device

    def starting_codebooks(self):
        """The codebooks with which learning begins."""
        z = self.problem.z[self.problem.inferred]
        space = self.problem.space
        word_z = [space.word_z(m) for m in range(z.shape[1])]  # each word's embedding, as coordinates
        return first_codebooks(z, self.sizes, self.args.start, self.args.seed, word_z)

    def needs_llm(self):
        """Does fit() open the LLM of stage 02?"""
        return self.assigns == "likelihood"

    def fit(self):
        """Learn self.codebooks. Returns (codes (U, M), log: a dict an epoch)."""
        raise NotImplementedError

    def assign(self):
        """Codes (U, M) of all users; nothing is learned. Of users without a z they mean nothing."""
        return self.nearest_codes()

    def nearest_codes(self):
        """Codes (U, M) by Eq. (6)."""
        return assign_all(torch.tensor(self.problem.z), self.codebooks)


class KMeans(Quantizer):
    """The codebooks with which vq and em begin, and no more: no recommender, no LLM."""

    def fit(self):
        self.codebooks = self.starting_codebooks()
        return self.assign(), []


class JointVQ(Quantizer):
    """Algorithm 1: VQ layers under the surrogate's and the LLM's loss, Eq. (5)-(7)."""

    def needs_llm(self):
        return self.args.llm_loss and self.args.epochs > 0

    def fit(self):
        """As Quantizer.fit. problem.z becomes the trained z: these users get their codes by it."""
        args = self.args
        problem = self.problem
        device = self.device
        # DEVIATION(5): distances are between coordinates, whose unit is the words' spread (and which nothing
        # shrinks). So the same lr, alpha and beta suit LLMs of any scale.
        z = torch.tensor(problem.z, device=device)
        add_llm_gradient = None
        if self.needs_llm():
            add_llm_gradient = problem.open_llm_loss(device)
        rng = seeded(args.seed, 6)  # seeds torch too; 6 keeps these draws apart from other ones of --seed
        vq_layers = nn.ModuleList(map(VectorQuantizer, self.starting_codebooks())).to(device)
        n_users, n_profiles, rank = z.shape
        surrogate = Surrogate(n_users, len(problem.dataset.items), n_profiles, rank).to(device)
        user_rows = rows_by_user(problem.dataset.rows(TRAIN), len(z))
        print(f"parameters: trainable z {z.numel():,d}, codebooks {count_parameters(vq_layers):,d}, "
              f"surrogate {count_parameters(surrogate):,d}; LLM frozen")
        # Note: only these users train the surrogate. The others have z = 0 and mostly no liked row: they
        # would teach it that the code nearest to 0 means dislike.
        users = np.flatnonzero(problem.inferred)
        if args.epochs:
            quantized = [layer(z[:, m])[0].detach() for m, layer in enumerate(vq_layers)]
            rows = np.concatenate([user_rows[user] for user in users])
            warm_up(surrogate, rows, torch.stack(quantized, dim=1), args.warm_up, rng)
        log = train_jointly(z, vq_layers, surrogate, user_rows, users, add_llm_gradient, args, rng)
        # Note: the trained z is not saved, only the codes that it gives. A user who comes later
        # (--keep-codebooks) was not trained here: stage 02's z tells this user's code.
        problem.z = z.cpu().numpy()
        self.codebooks = [layer.codebook.detach().cpu() for layer in vq_layers]
        return self.assign(), log


# -------- here the method ends (l_llm of Eq. (7) is open_llm_loss below); data: what a quantizer may look at

@dataclass
class Problem:
    """What a quantizer may look at: of the rows those of TRAIN and SEEN alone, and not the planted truth."""

    run: Path
    dataset: Dataset
    z: np.ndarray  # float32 (U, M, r)
    inferred: np.ndarray  # bool (U,): who has a z
    facts: dict  # stage 02's settings
    space: infer.Space  # what turns z into theta

    def open_likelihood(self, device):
        """(likelihood, histories, Space, tokenizer) as stage 02 had them.

        The histories are of rows that profiles may be inferred from, SEEN; the likelihood has the task prompt
        that stage 02 learned.
        """
        settings = argparse.Namespace(run=self.run, **self.facts)
        likelihood, tokenizer, lm = infer.open_model(self.dataset, settings, device, None)
        check_same(self.run, "profiles.npy", "LLM", lm["fingerprint"], settings.lm_fingerprint)
        prompt = infer.prompt_fingerprint(likelihood)
        recorded = self.facts.get("prompt_fingerprint", prompt)  # an earlier version recorded none
        check_same(self.run, "profiles.npy", "prompt or mask", prompt, recorded)
        texts = infer.history_texts(self.dataset, SEEN, settings)
        histories = infer.tokenize_histories(tokenizer, texts, likelihood.room)
        space = infer.open_space(self.run, device)
        likelihood.task = space.task
        return likelihood, histories, space, tokenizer

    def open_llm_loss(self, device):
        """A function of (z (B, M, r), users (B,)) that returns stage 02's loss, a mean over users.

        It also adds the loss's gradient to z.grad, block by block: a graph of all would not fit into memory.
        The loss is l_llm and, where stage 02 had one, its prior (none by default).
        """
        likelihood, histories, space, _ = self.open_likelihood(device)
        budget = infer.token_budget_of(likelihood)
        settings = argparse.Namespace(**self.facts)
        # The prior is on coordinates of the space in which stage 02 descended: its 0 is the words' mean.
        wide = infer.whole_space(space) if settings.prior and infer.is_squeezed(settings) else space

        def add_llm_gradient(z, users):
            total = 0.0
            some = [histories[user] for user in users]
            # Blocks of places in `some`, as many users at once as memory or a CPU's cache allows (None: no
            # other limit).
            for block in infer.make_blocks(some, None, budget, likelihood.prompt_length):
                # Stage 02's Eq. (4), summed over the tokens of a user's history.
                theta = space.theta(z[block])
                loss = likelihood(theta, *infer.pad(some, block, device))
                if settings.prior:
                    loss = loss + settings.prior / 2 * (wide.project(theta) ** 2).sum((1, 2))
                infer.check_finite(loss, "the likelihood of a history", likelihood.dtype)
                (loss.sum() / len(users)).backward()
                total += loss.sum().item() / len(users)
            return total

        return add_llm_gradient

    def theta(self):
        """The users' soft tokens: float32 (U, M, d)."""
        return self.space.theta(torch.from_numpy(self.z)).numpy()


def rows_by_user(rows, n_users):
    """Rows (user, item, label) of each user: U arrays (n_u, 3)."""
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    # Where the rows of user 1, 2, ... begin.
    return np.split(rows, np.searchsorted(rows[:, 0], np.arange(1, n_users)))


def check_users_differ(z, size, m):
    """UserError where profile m has fewer distinct z (users, r) than codes."""
    count = len(np.unique(z, axis=0))
    if size > count:
        todo = "choose fewer" if count > 1 else "give more data: these users look the same"
        what = f"{size} codes are more than the {count} distinct theta^{m + 1}"
        raise UserError(what, "--codes", todo)


def epoch_report(epoch, figures, codes, codebooks):
    """Print an epoch's figures and how many codes are at work; return them for the log."""
    used = [round(perplexity(codes[:, m], len(codebook)), 3) for m, codebook in enumerate(codebooks)]
    figures = {"epoch": epoch, **figures}
    print(*(f"{name} {value:.4g}" for name, value in figures.items()), f"perplexity {used}")
    return {**figures, "perplexity": used}


# -------- variants: codes that the LLM itself judges

COMBINATIONS = 100  # of codes that em and words try for each user, at most


class SoftCodeEM(Quantizer):
    """EM for  p(y) = sum_c (prod_m pi^m_{c_m}) P_LLM(y | v^1_{c_1}, ..., v^M_{c_M}),  a mixture.

    c runs over the C = K_1 x ... x K_M combinations of codes, pi^m_k tells how common code k of profile m is,
    y is here the text of the user's titles, as in Eq. (4), and not Eq. (5)'s label. Codebooks start as
    --start says; the users' z tell nothing after that. The E-step asks for the responsibilities p(c | y) of
    all users. The M-step sets the weights pi in closed form and moves the code vectors by Adam. An exact one
    would weigh -log P(y | c) of all combinations by p(c | y), C passes through the LLM; instead one c is
    drawn from p(c | y) for each user: one pass, and right on average. The likeliest round is kept. A user's
    codes are the likeliest ones, pi included.
    """

    assigns = "likelihood"

    def open(self):
        """Open the LLM; list combinations of codes (C, M) and blocks of users."""
        count = math.prod(self.sizes)
        if count > COMBINATIONS:
            raise UserError(f"{count} combinations of codes are too many to try", "--codes",
                            f"choose a product of at most {COMBINATIONS}, or --quantizer vq")
        self.likelihood, self.histories, self.space, _ = self.problem.open_likelihood(self.device)
        self.combinations = torch.tensor(list(itertools.product(*map(range, self.sizes))))
        budget = infer.token_budget_of(self.likelihood)
        # Note: after 02 --users somebody may have a history and no z. Nothing is learned from such users.
        known = infer.only(self.histories, np.flatnonzero(self.problem.inferred))
        self.blocks = infer.make_blocks(known, None, budget, self.likelihood.prompt_length)

    def theta(self, codes):
        """codes (B, M) -> their soft tokens (B, M, d) on the LLM's device."""
        z = torch.stack([codebook[codes[:, m]] for m, codebook in enumerate(self.codebooks)], dim=1)
        return self.space.theta(z.to(self.device))

    @torch.no_grad()
    def log_likelihood(self, users):
        """log P(y_u | c): float (B, C). Each column takes a forward pass."""
        padded = infer.pad(self.histories, users, self.device)
        columns = [-self.likelihood(self.theta(codes.expand(len(users), -1)), *padded)
                   for codes in self.combinations]
        found = torch.stack(columns, dim=1).cpu()
        infer.check_finite(found, "the likelihood of a history", self.likelihood.dtype)
        return found

    def log_weight_of_combinations(self):
        """log pi_c of each combination of codes: float (C,)."""
        return sum(weight[self.combinations[:, m]] for m, weight in enumerate(self.log_weights))

    def e_step(self, codes, asked=None):
        """(mean log-likelihood, likeliest codes (U, M), codes drawn from the responsibilities (U, M), usage).

        usage: M tensors (K_m,), how many users each code is expected to have. codes (U, M): those of before,
        which users without a history keep. asked: log P(y_u | c) (B, C) of each block, where it need not be
        asked for again.
        """
        codes = torch.tensor(codes)
        drawn = codes.clone()
        total = 0.0
        usage = [torch.zeros(size) for size in self.sizes]
        for number, users in enumerate(progress(self.blocks, "E-step", "block")):
            log_likelihood = self.log_likelihood(users) if asked is None else asked[number]
            joint = self.log_weight_of_combinations() + log_likelihood
            share = joint.softmax(1)  # the responsibilities p(c | y_u). Shape: (B, C)
            codes[users] = self.combinations[joint.argmax(1)]
            drawn[users] = self.combinations[torch.multinomial(share, 1).squeeze(1)]
            total += float(joint.logsumexp(1).double().sum())
            for m, counts in enumerate(usage):  # the share of a combination counts for each of its codes
                counts.index_add_(0, self.combinations[:, m], share.sum(0))
        return total / sum(map(len, self.blocks)), codes.numpy(), drawn, usage

    def fit(self):
        args = self.args
        self.open()
        seeded(args.seed, 7)
        self.codebooks = [codebook.requires_grad_() for codebook in self.starting_codebooks()]
        self.log_weights = [torch.full((size,), -math.log(size)) for size in self.sizes]
        optimizer = torch.optim.Adam(self.codebooks, lr=args.lr)
        log = []
        rounds = []
        codes = self.nearest_codes()
        for number in range(args.epochs + 1):
            before = codes
            log_likelihood, codes, drawn, usage = self.e_step(codes)
            changed = int((codes != before).any(1).sum())
            log.append({"epoch": number, "log_likelihood": log_likelihood, "users_changed": changed})
            print(f"round {number}: log-likelihood a user {log_likelihood:.4f}, users changed {changed}")
            codebooks = [codebook.detach().clone() for codebook in self.codebooks]
            rounds.append((log_likelihood, codes, codebooks, self.log_weights))
            if number == args.epochs:
                break
            # The M-step: pi in closed form, smoothed by one user a code; then a gradient step for each block.
            self.log_weights = [((count + 1) / (count + 1).sum()).log() for count in usage]
            order = np.random.default_rng((args.seed, number)).permutation(len(self.blocks))
            for users in progress([self.blocks[index] for index in order], "M-step", "block"):
                optimizer.zero_grad()
                padded = infer.pad(self.histories, users, self.device)
                nll = self.likelihood(self.theta(drawn[users]), *padded)
                nll.mean().backward()
                optimizer.step()
        _, codes, self.codebooks, self.log_weights = max(rounds, key=lambda found: found[0])
        return codes, log

    def assign(self):
        """The likeliest codes (U, M): C forward passes a user, no gradient."""
        self.open()
        return self.e_step(self.nearest_codes())[1]


class Words(SoftCodeEM):
    """No descent: the LLM is asked. Codes are the K_m most frequent words of a profile; put in theta's place,
    some make a user's titles likelier than others do, and the user gets those.

    c = argmax_c [log P_LLM(y | the words of c) + sum_m w^m_{c_m}].  An LLM may like a word whatever the
    history is, and would give it to everybody: w^m_k is minus the mean of log P under word k, over all users
    and the other profiles' words. log_weights holds w, where EM has log pi: so the log's "log_likelihood" is
    of these corrected scores, and no likelihood. The word itself is asked; codebooks holds its coordinates.
    """

    def theta(self, codes):
        """codes (B, M) -> the words' own vectors (B, M, d), which need not lie in the space."""
        vectors = self.space.vectors
        return torch.stack([table[codes[:, m].to(table.device)] for m, table in enumerate(vectors)], dim=1)

    def fit(self):
        self.open()
        seeded(self.args.seed, 7)
        for m, size in enumerate(self.sizes):
            count = len(self.problem.space.words[m])
            if size > count:
                raise UserError(f"{size} codes are more than the {count} words of profile {m + 1}", "--codes",
                                "choose fewer, or another --quantizer")
        self.codebooks = [self.problem.space.word_z(m)[:size] for m, size in enumerate(self.sizes)]
        asked = [self.log_likelihood(users) for users in progress(self.blocks, "asking", "block")]
        mean = torch.cat(asked).mean(0)  # of each combination. Shape: (C,)
        self.log_weights = []
        for m, size in enumerate(self.sizes):
            by_word = [mean[self.combinations[:, m] == code].mean() for code in range(size)]
            self.log_weights.append(-torch.stack(by_word))
        log_likelihood, codes, _, _ = self.e_step(self.nearest_codes(), asked)
        return codes, [{"epoch": 0, "log_likelihood": log_likelihood}]


QUANTIZERS = {"vq": JointVQ, "kmeans": KMeans, "em": SoftCodeEM, "words": Words}


# -------- running it: the flags

# The values of section 3.4. It gives none for alpha, which gets that of the other weights here; it has no
# warm-up; and it does not say where codebooks start, so --start keeps its default.
PAPER = {"alpha": 1e-3, "beta": 1e-3, "lr": 1e-3, "warm_up": 0}


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--codes", help="codebook sizes K_1,K_2,... (default: stage 01's; paper: 4,3)")
    add("--quantizer", choices=QUANTIZERS, help="default: vq (Algorithm 1), or em if --assign likelihood")
    add("--assign", choices=("nearest", "likelihood"),
        help="vq, kmeans: nearest to z, Eq. 6; em, words: likelihood")
    add("--epochs", type=at_least(0), default=3, help="vq: joint epochs; em: rounds")
    add("--batch-users", type=at_least(1), default=128, help="vq: users a minibatch (paper: 128 rows)")
    add("--lr", type=at_least(1e-12, float, 1e6), default=0.02,
        help="vq, em: step of z, code vectors (paper: .001)")
    add("--start", choices=("words", "kmeans", "random"), default="words",
        help="vq, kmeans, em: first codebooks by k-means from the words or by k-means++; random: "
             "U(-1/K, 1/K), the authors'")
    add("--alpha", type=at_least(0, float, 1e6), default=1.0,
        help="vq: weight of l_vec beside l_llm, Eq. 7 (paper: not given)")
    add("--beta", type=at_least(0, float, 1e6), default=0.25,
        help="vq: weight of the commitment term (paper: 0.001)")
    add("--llm-loss", action=argparse.BooleanOptionalAction, default=True, help="vq: l_llm in Eq. 7")
    add("--warm-up", type=at_least(0), default=10, help="vq: epochs of the surrogate alone")
    add("--paper", action="store_true", help=f"section 3.4: {PAPER}")
    add("--keep-codebooks", action="store_true", help="learn nothing, give new users codes")
    if "--paper" in sys.argv:  # before parsing, so that a flag given beside it wins
        parser.set_defaults(**PAPER)
    args = parser.parse_args()
    if args.keep_codebooks:
        beside = [key for key, value in vars(args).items() if value != parser.get_default(key)
                  and key not in ("run", "device", "keep_codebooks")]
        if beside:
            parser.error(f"--keep-codebooks goes without --{beside[0].replace('_', '-')}: it learns nothing "
                         "anew, and assigns as before")
    if args.quantizer is None:
        args.quantizer = {"nearest": "vq", "likelihood": "em"}[args.assign or "nearest"]
    assigns = QUANTIZERS[args.quantizer].assigns
    if args.assign not in (None, assigns):
        parser.error(f"--quantizer {args.quantizer} goes with --assign {assigns} alone")
    args.assign = assigns
    return args


def parse_codes(text, profiles):
    """[K_1, ..., K_M] from '4,3', by default stage 01's."""
    if text is None:
        return [profile["codes"] for profile in profiles]
    parts = [part.strip() for part in text.split(",")]
    sizes = [int(part) for part in parts if part.isascii() and part.isdecimal()]
    fits = len(parts) == len(sizes) == len(profiles)
    if not fits or min(sizes) < 2 or max(sizes) > 32766:  # int16 must hold the unknown code K_m
        raise UserError(f"'{text}' does not give {len(profiles)} codebook sizes of 2 to 32766", "--codes",
                        "give one each for " + ", ".join(profile["name"] for profile in profiles))
    return sizes


# -------- how codes are called and used

def bank_of(codes, inferred, sizes):
    """int16 (U, M): codes; of whom nothing was inferred the unknown code K_m, as for an unseen user."""
    return np.where(inferred[:, None], codes, sizes).astype(np.int16)


def name_codes(codebooks, word_z, word_texts, centre):
    """M lists of K_m names: the word whose direction is most that of the code, seen from the users' mean.

    codebooks, word_z: M tensors (K_m, r), (n_words, r); word_texts: M lists; centre (M, r): the users' mean,
    from which a code's direction is seen. A word's direction is its z, seen from the origin, where stage 02
    put the mean of the users who told the directions (under --rank 0 and --space words the words' mean). A
    second code of the same word is called "word 2".
    """
    code_names = []
    for codebook, vectors, texts, mean in zip(codebooks, word_z, word_texts, centre):
        cosine = F.normalize(codebook - mean, dim=1) @ F.normalize(vectors, dim=1).T  # Shape: (K_m, n_words)
        names = []
        for index in cosine.argmax(1).tolist():
            name = texts[index]
            number = 1
            while name in names or (number > 1 and name in texts):  # "model 2" may be a word, too
                number += 1
                name = f"{texts[index]} {number}"
            names.append(name)
        code_names.append(names)
    return code_names


def perplexity(codes, size):
    """exp(entropy) of the usage: 1 when all share one code, K when all are used alike."""
    share = np.bincount(codes, minlength=size) / max(1, len(codes))
    return float(np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()))


def health(codes, sizes, profiles):
    """How the codes (U, M) are used: a dict a profile."""
    report = []
    for profile, size, own in zip(profiles, sizes, codes.T):
        counts = np.bincount(own, minlength=size)
        report.append({
            "name": profile["name"], "active": int((counts > 0).sum()), "perplexity": perplexity(own, size),
            "max_share": float(counts.max() / counts.sum()), "counts": counts.tolist()})
    return report


def agreement(codes, truth):
    """AMI and NMI of codes with planted values; NMI across profiles (should be 0)."""
    ami = metrics.adjusted_mutual_info_score
    nmi = metrics.normalized_mutual_info_score
    across = []
    for one, other in itertools.combinations(codes.T, 2):
        # Note: for scikit-learn two constants agree wholly (with one that varies a constant has 0).
        across.append(nmi(one, other) if np.ptp(one) else 0.0)
    return {"ami_truth": [ami(planted, found) for planted, found in zip(truth.T, codes.T)],
            "nmi_truth": [nmi(planted, found) for planted, found in zip(truth.T, codes.T)],
            "nmi_across": across}


def show(report, agreed):
    """Code usage, with warnings."""
    for profile in report:
        counts = profile["counts"]
        print("{name}: {active} of {size} codes active, perplexity {perplexity:.2f}, largest share "
              "{max_share:.2f}".format(size=len(counts), **profile))
        print("   ", *(f"{name}: {count:,d}" for name, count in zip(profile["words"], counts)), sep="  ")
        if profile["perplexity"] < 1.5 or profile["max_share"] > 0.9:
            print(f"    WARNING: the codebook of {profile['name']} has collapsed: {profile['max_share']:.0%} "
                  "of the users have one code")
    if agreed:
        def listed(name):
            return " ".join(f"{value:.3f}" for value in agreed[name])

        print(f"with the planted truth: adjusted MI {listed('ami_truth')}, NMI {listed('nmi_truth')}; "
              f"NMI across profiles {listed('nmi_across')}")


# -------- files

def read_problem(run):
    """(Problem, truth or None), checked to belong together."""
    dataset = load_dataset(run)
    facts, z, owners = infer.read_profiles(run)
    check_same(run, "profiles.npy", "dataset", facts["dataset_fingerprint"], dataset.fingerprint())
    if facts.get("method") != infer.METHOD:  # its z may mean something else
        raise UserError("profiles.npy is of an earlier stage 02", run, "run 02 again")
    inferred = np.isin(np.arange(len(z)), owners["inferred"])
    space = infer.open_space(run, "cpu")
    return Problem(run, dataset, np.array(z), inferred, facts, space), load_truth(run)


def read_quantized(problem):
    """(quantize.json, feature_bank.npy (U, M)) of a finished run, checked to be of this problem's theta."""
    run = problem.run
    facts = load(run, "quantize.json", ("profiles", "profiles_fingerprint", "fingerprint"))
    bank = np.array(load(run, "feature_bank.npy"))
    check_same(run, "feature_bank.npy", "profiles.npy", facts["profiles_fingerprint"],
               problem.facts["fingerprint"])
    check_same(run, "feature_bank.npy", "quantize.json", fingerprint(bank), facts["fingerprint"])
    return facts, bank


def meaning_of_z(facts):
    """The settings that decide what a coordinate means."""
    return [str(facts[key]) for key in (*infer.RECORDED, "lm_fingerprint", "space_fingerprint")]


def save(run, problem, bank, quantizer, code_names, facts):
    """Write codebooks, bank and the facts. code_names: M lists of K_m."""
    profile_names = [profile["name"] for profile in problem.dataset.profiles]
    users = problem.dataset.users
    with together(run) as aside:
        save_torch(aside / "codebooks.pt", {
            "codebooks": quantizer.codebooks, "log_weights": quantizer.log_weights, "words": code_names,
            "profiles": profile_names, "users": users, "bank": torch.from_numpy(bank), "facts": facts,
            "made_with": meaning_of_z(problem.facts)})
        save_npy(aside / "feature_bank.npy", bank)
        with open(aside / "feature_bank.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["user_id", *profile_names])
            for user, codes in zip(users, bank.tolist()):
                # The code K_m, of users of whom nothing was inferred, has no name.
                labels = [names[code] if code < len(names) else "unknown"
                          for names, code in zip(code_names, codes)]
                writer.writerow([user, *labels])
        save_json(aside / "quantize.json", facts | {
            "fingerprint": fingerprint(bank),
            "codebooks_fingerprint": fingerprint_of(quantizer.codebooks)})


def fingerprint_of(codebooks):
    """What tells these codebooks from others."""
    return fingerprint(*map(np.asarray, codebooks))


def saved_quantizer(problem, args, device):
    """--keep-codebooks: (the last quantizer, its codes' names, its settings, {raw user id: codes then})."""
    saved = load(args.run, "codebooks.pt", (
        "codebooks", "log_weights", "words", "users", "bank", "facts", "made_with"))
    if saved["made_with"] != meaning_of_z(problem.facts):
        raise UserError("codebooks.pt was made with another LLM or other flags of stage 02", args.run,
                        "run 03 without --keep-codebooks")
    codebooks = saved["codebooks"]
    facts = saved["facts"]
    name = facts["quantizer"]
    if name not in QUANTIZERS:
        raise UserError(f"codebooks.pt is of --quantizer {name}, which there is no more", args.run,
                        "run 03 without --keep-codebooks")
    if len(codebooks) != problem.z.shape[1]:
        raise UserError(f"codebooks.pt has {len(codebooks)} codebooks, not one for each profile", args.run,
                        "run 03 without --keep-codebooks")
    known = load(args.run, "quantize.json", ("codebooks_fingerprint",))["codebooks_fingerprint"]
    check_same(args.run, "codebooks.pt", "quantize.json", fingerprint_of(codebooks), known,
               "run 03 without --keep-codebooks")
    as_then = argparse.Namespace(**{**vars(args), **facts})
    quantizer = QUANTIZERS[name](problem, [len(codebook) for codebook in codebooks], as_then, device)
    quantizer.codebooks = codebooks
    quantizer.log_weights = saved["log_weights"]
    return quantizer, saved["words"], facts, dict(zip(saved["users"], saved["bank"].tolist()))


# -------- main

def main():
    args = parse_arguments()
    device = pick_device(args.device)
    problem, truth = read_problem(args.run)
    dataset = problem.dataset
    inferred = problem.inferred
    reads = "stage 01's files, profiles.npy .json, profiles_users.json, space.pt"
    if truth is not None:
        reads += ", truth.npy to evaluate"
    if args.keep_codebooks:
        quantizer, code_names, facts, then = saved_quantizer(problem, args, device)
        sizes = quantizer.sizes
        shown = argparse.Namespace(run=args.run, keep_codebooks=True, quantizer=facts["quantizer"],
                                   codes=",".join(map(str, sizes)))
        lm = ", the LLM of stage 02" if quantizer.assigns == "likelihood" else ""
        announce("03 quantize", shown, f"{reads}, codebooks.pt{lm}")
        codes = quantizer.assign()
        unknown = sizes  # K_m is the unknown code of profile m
        for user, raw in enumerate(dataset.users):
            if raw in then and then[raw] != unknown:  # who had codes keeps them
                codes[user] = then[raw]
        facts["keep_codebooks"] = True
    else:
        sizes = parse_codes(args.codes, dataset.profiles)
        shown = argparse.Namespace(**{**vars(args), "codes": ",".join(map(str, sizes))})
        quantizer = QUANTIZERS[args.quantizer](problem, sizes, args, device)
        if quantizer.needs_llm():
            reads += ", the LLM of stage 02"
        announce("03 quantize", shown, reads)
        codes, log = quantizer.fit()
        if quantizer.codebooks is None:
            raise UserError("fit() left no codebooks", f"--quantizer {args.quantizer}",
                            "let it set self.codebooks, M tensors (K_m, r)")
        if not torch.cat(list(quantizer.codebooks)).isfinite().all():
            raise UserError("a code vector is not finite", f"--quantizer {args.quantizer}", "lower --lr")
        facts = {key: value for key, value in vars(args).items() if key not in ("run", "device")}
        facts["loss"] = log
        centre = torch.tensor(problem.z[inferred].mean(0))  # of vq's trained z, else of stage 02's
        word_z = [problem.space.word_z(m) for m in range(len(sizes))]
        if isinstance(quantizer, Words):  # code k is the k-th word
            code_names = [texts[:size] for size, texts in zip(sizes, problem.space.words)]
        else:
            code_names = name_codes(quantizer.codebooks, word_z, problem.space.words, centre)
    report = health(codes[inferred], sizes, dataset.profiles)
    for profile, names in zip(report, code_names):
        profile["words"] = names
    agreed = {} if truth is None else agreement(codes[inferred], truth[inferred])
    facts |= {"codes": sizes, "profiles": report, **agreed, "dataset_fingerprint": dataset.fingerprint(),
              "profiles_fingerprint": problem.facts["fingerprint"]}
    save(args.run, problem, bank_of(codes, inferred, sizes), quantizer, code_names, facts)
    show(report, agreed)
    print(f"\nwrote codebooks.pt feature_bank.npy .csv quantize.json to {args.run}\n"
          f"next: python 04_train_ctr.py --run {args.run}")


if __name__ == "__main__":
    guarded(main, "take --quantizer kmeans or --device cpu, or with vq a lower --batch-users")
