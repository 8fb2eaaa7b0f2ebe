"""Stage 03: turn theta into one small id per profile, supervised by a recommender. Paper: sections 2.4, 2.6.

    l_vec = sum_m ||sg[theta^m] - v_c^m||^2 + beta ||theta^m - sg[v_c^m]||^2
            + BCE(y, Rec^s(v_c^1, ..., v_c^M, E_obs, i))      Eq. (5)
    c_m   = argmin_k ||theta^m - v_k^m||^2                    Eq. (6)
    L     = l_llm + alpha l_vec                               Eq. (7)

vq (Algorithm 1): codebooks start from k-means over theta; a surrogate DCN is warmed up on these codes; then
minibatches of users update theta, codebooks and surrogate. kmeans is the start alone. em learns codes that
are soft tokens, words takes the LLM's own words: a user's code is then the likeliest given his history.

Reads:  01's files, truth.npy for evaluation alone; profiles.npy .json profiles_users.json lm-tiny/ (02)
Writes: codebooks.pt, M tensors (K_m, d) and what assigns a new user;  quantize.json;
        feature_bank.npy int16 (U, M), .csv

Run:
    python 03_quantize.py  # the demo: 15 s
"""

import argparse
import csv
import importlib
import itertools
import math
import sys
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

infer = importlib.import_module("02_infer_profiles")

# -------- settings

COMBINATIONS = 100  # most that EM tries a user
PAPER = {"alpha": 1e-3, "beta": 1e-3, "lr": 1e-3, "warm_up": 0}  # section 3.4


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--codes", help="codebook sizes K_1,K_2,... (default: stage 01's; paper: 4,3)")
    add("--quantizer", choices=QUANTIZERS, help="default: vq (Algorithm 1), with --assign likelihood em")
    add("--assign", choices=("nearest", "likelihood"), help="nearest to theta, Eq. 6; em, words: likelihood")
    add("--epochs", type=at_least(0), default=3, help="vq: joint epochs; em: rounds")
    add("--batch-users", type=at_least(1), default=128, help="users a minibatch (paper: 128)")
    add("--lr", type=at_least(1e-12, float, 1e6), default=0.02, help="in units of the spread (paper: 0.001)")
    add("--start", choices=("kmeans", "random", "words"), default="kmeans",
        help="first codebooks; random: U(-1/K, 1/K), the authors'; words: for em")
    add("--alpha", type=at_least(0, float, 1e6), default=1.0, help="of l_vec, Eq. 7 (paper: 0.001)")
    add("--beta", type=at_least(0, float, 1e6), default=0.25, help="of commitment (paper: 0.001)")
    add("--llm-loss", action=argparse.BooleanOptionalAction, default=True, help="vq: l_llm in Eq. 7")
    add("--warm-up", type=at_least(0), default=10, help="vq: epochs of the surrogate alone")
    add("--paper", action="store_true", help=f"section 3.4: theta unscaled, {PAPER}")
    add("--keep-codebooks", action="store_true", help="learn nothing, give new users codes")
    if "--paper" in sys.argv:
        parser.set_defaults(**PAPER)
    args = parser.parse_args()
    if args.keep_codebooks and (args.codes or args.quantizer):
        parser.error("--keep-codebooks keeps K_m and quantizer")
    args.quantizer = args.quantizer or ("em" if args.assign == "likelihood" else "vq")
    fitting = "likelihood" if args.quantizer in ("em", "words") else "nearest"
    args.assign = args.assign or fitting
    if args.assign != fitting:
        parser.error(f"--assign {args.assign} does not go with --quantizer {args.quantizer}")
    if args.start == "words" and fitting == "nearest":
        parser.error("--start words goes with --quantizer em")
    return args


def parse_codes(text, profiles):
    """[K_1, ..., K_M] from '4,3', by default stage 01's."""
    try:
        sizes = [profile["codes"] for profile in profiles] if text is None else [*map(int, text.split(","))]
        if len(sizes) == len(profiles) and 2 <= min(sizes) <= max(sizes) <= 32766:
            return sizes
    except ValueError:
        pass
    raise UserError(f"'{text}' does not give {len(profiles)} codebook sizes of 2 to 32766", "--codes",
                    "give them for " + ", ".join(profile["name"] for profile in profiles))


# -------- data

@dataclass
class Problem:
    """What a quantizer may look at: no truth. theta float32 (U, M, d); known bool (U,): whose theta was
    inferred; facts: 02's settings."""

    run: Path
    dataset: Dataset
    theta: np.ndarray
    known: np.ndarray
    facts: dict

    def open_likelihood(self, device):
        """As 02 was run: (likelihood, histories, theta_0 (M, d), spread (M,), tokenizer)."""
        settings = argparse.Namespace(run=self.run, **self.facts)
        likelihood, tokenizer, lm = infer.open_model(self.dataset, settings, device, None)
        check_same(self.run, "profiles.npy", "LLM", lm["fingerprint"], settings.lm_fingerprint)
        texts = infer.history_texts(self.dataset, SEEN, settings)
        histories = infer.tokenize_histories(tokenizer, texts, likelihood.room)
        start, spread = torch.tensor(settings.start), torch.tensor(settings.spread)
        return likelihood, histories, start.to(device), spread.to(device), tokenizer

    def made_with(self):
        """What decides the space of theta and codebooks."""
        return [str(self.facts[key]) for key in (*infer.RECORDED, "lm_fingerprint", "start")]


def read_problem(run):
    """(Problem, truth or None), checked to belong together."""
    dataset, (facts, theta, owners) = load_dataset(run), infer.read_profiles(run)
    check_same(run, "profiles.npy", "dataset", facts["dataset_fingerprint"], dataset.fingerprint())
    known = np.isin(np.arange(len(theta)), owners["inferred"])
    return Problem(run, dataset, np.array(theta), known, facts), load_truth(run)


def rows_by_user(rows, n_users):
    """Rows (user, item, label) of each user: U arrays (n_u, 3)."""
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    return np.split(rows, np.searchsorted(rows[:, 0], np.arange(1, n_users)))


# -------- model

@torch.no_grad()
def nearest(theta, codebook):
    """Eq. (6): c = argmin_k ||theta - v_k||^2. theta (B, d), codebook (K, d) -> (B,)."""
    return torch.cdist(theta, codebook, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)


class VectorQuantizer(nn.Module):
    """A codebook of K codes (van den Oord et al. 2017)."""

    def __init__(self, codebook):
        super().__init__()
        self.codebook = nn.Parameter(codebook.clone())

    def forward(self, theta):
        """(B, d) -> v_c (B, d), its gradient straight to theta; Eq. (5)'s two terms (B,), summed over d."""
        chosen = self.codebook[nearest(theta, self.codebook)]
        codebook_term = ((theta.detach() - chosen) ** 2).sum(1)  # moves v_c only
        commitment = ((theta - chosen.detach()) ** 2).sum(1)     # moves theta only
        straight_through = theta + (chosen - theta).detach()     # value v_c, gradient of the identity
        return straight_through, codebook_term, commitment


class Surrogate(nn.Module):
    """Rec^s of Eq. (5): a DCN on user id, item id and the quantized profiles, projected."""

    def __init__(self, n_users, n_items, profiles, d, dim=8):
        super().__init__()
        self.dcn = DCN([Field("user", n_users), Field("item", n_items)], dim, extra_fields=profiles)
        self.projections = nn.ModuleList(nn.Linear(d, dim) for _ in range(profiles))

    def forward(self, ids, quantized):
        """ids (n, 2), quantized (n, M, d) -> logits (n,)."""
        profiles = [project(quantized[:, m]) for m, project in enumerate(self.projections)]
        return self.dcn.logit(torch.cat([self.dcn.embed(ids), torch.stack(profiles, dim=1)], dim=1))


def first_codebooks(theta, sizes, start, seed):
    """M codebooks (K_m, d): k-means++ over theta (n, M, d), or U(-1/K, 1/K). DEVIATION(6)."""
    codebooks = []
    for m, size in enumerate(sizes):
        if start == "kmeans":
            count = len(np.unique(theta[:, m], axis=0))
            if size > count:
                raise UserError(f"{size} codes for {count} distinct theta^{m + 1}", "--codes", "choose fewer")
            found = cluster.KMeans(size, n_init=10, random_state=seed).fit(theta[:, m]).cluster_centers_
        else:
            found = np.random.default_rng((seed, m)).uniform(-1 / size, 1 / size, (size, theta.shape[2]))
        codebooks.append(torch.tensor(found).float())
    return codebooks


# -------- loss and train

def vec_loss(theta, rows, quantizers, surrogate, beta):
    """Eq. (5), l_vec, of a minibatch: (loss, {part: sum over a user's evidence, mean over users}).

    theta (B, M, d) in the units of --lr; rows: B arrays (n_u, 3) user, item, label.
    """
    quantized, codebook, commitment = zip(*(quantizer(theta[:, m]) for m, quantizer in enumerate(quantizers)))
    owner = np.repeat(np.arange(len(rows)), list(map(len, rows)))
    quantized = torch.stack(quantized, dim=1)[owner]  # Shape: (n, M, d)
    batch = torch.from_numpy(np.concatenate(rows)).long().to(theta.device)
    logits = surrogate(batch[:, :2], quantized)
    rec = F.binary_cross_entropy_with_logits(logits, batch[:, 2].float(), reduction="sum") / len(rows)
    codebook, commitment = sum(codebook).mean(), sum(commitment).mean()
    parts = {"codebook": codebook.item(), "commitment": commitment.item(), "rec": rec.item()}
    return codebook + beta * commitment + rec, parts


def warm_up(surrogate, rows, quantized, epochs, rng):
    """Train the surrogate on rows (n, 3) with fixed quantized (U, M, d)."""
    optimizer = torch.optim.Adam(surrogate.parameters(), lr=1e-3)
    rows = torch.from_numpy(rows).long().to(quantized.device)
    size = min(1024, max(128, len(rows) // 160))
    for _ in progress(range(epochs), "warming up the surrogate", "epoch"):
        for batch in torch.from_numpy(rng.permutation(len(rows))).split(size):
            logits = surrogate(rows[batch, :2], quantized[rows[batch, 0]])
            loss = F.binary_cross_entropy_with_logits(logits, rows[batch, 2].float())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def train_jointly(z, quantizers, surrogate, rows, users, llm, args, rng):
    """Algorithm 1: minibatches of users update theta (their rows only), codebooks and surrogate.

    z: float (U, M, d), theta in JointVQ's units, moved in place; llm: of JointVQ.llm_loss. Returns the log.
    """
    books, squares = list(quantizers.parameters()), torch.zeros_like(z)
    optimizers = [torch.optim.AdamW(books, lr=args.lr, weight_decay=0.0),
                  torch.optim.AdamW(surrogate.parameters(), lr=1e-3, weight_decay=0.0)]
    log, codes = [], assign_all(z[users], books)
    for epoch in range(1, args.epochs + 1):
        sums = {}
        batches = np.array_split(rng.permutation(users), math.ceil(len(users) / args.batch_users))
        for batch in progress(batches, f"joint epoch {epoch}", "batch"):
            own = z[batch].requires_grad_()  # Shape: (B, M, d)
            loss, parts = vec_loss(own, [rows[user] for user in batch], quantizers, surrogate, args.beta)
            # Eq. (7): the gradients of its terms add up. DEVIATION(7): alpha is a weight, no step size.
            (args.alpha * loss).backward()
            if llm:
                parts["llm"] = llm(own, batch)  # adds its gradient
            if not math.isfinite(sum(parts.values()) + own.grad.sum()):
                raise UserError(f"training diverged in epoch {epoch}", f"--lr {args.lr}", "lower --lr")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            # DEVIATION(7): Adagrad's step size depends on a user's own steps alone, Adam's on all
            squares[batch] += own.grad ** 2
            z[batch] -= args.lr * own.grad / (squares[batch].sqrt() + 1e-10)
            sums = {key: sums.get(key, 0.0) + part * len(batch) / len(users) for key, part in parts.items()}
        before, codes = codes, assign_all(z[users], books)
        figures = {"epoch": epoch, **sums, "ids_changed": int((codes != before).any(1).sum())}
        used = [round(perplexity(codes[:, m], len(book)), 3) for m, book in enumerate(books)]
        print(*(f"{name} {value:.4g}" for name, value in figures.items()), f"perplexity {used}")
        log.append({**figures, "perplexity": used})
    return log


# -------- quantizers: fit learns, assign applies

def assign_all(theta, books):
    """theta (U, M, d), M codebooks (K_m, d) -> int (U, M)."""
    return torch.stack([nearest(theta[:, m], book) for m, book in enumerate(books)], dim=1).cpu().numpy()


class KMeans:
    """k-means over theta, the start of vq and em: no recommender, no LLM."""

    books = None  # M tensors (K_m, d) in the space of theta, on the CPU
    log_weights = None  # em, words: M tensors (K_m,), log of how common a code is
    words = None  # words: M lists of K_m names

    def __init__(self, problem, sizes, args, device):
        self.problem, self.sizes, self.args, self.device = problem, sizes, args, device

    def fit(self):
        """Learn self.books. Returns (codes (U, M), log: a dict an epoch)."""
        theta = self.problem.theta[self.problem.known]
        self.books = first_codebooks(theta, self.sizes, self.args.start, self.args.seed)
        return self.assign(), []

    def assign(self):
        """Codes (U, M) of all users; nothing is learned."""
        return assign_all(torch.tensor(self.problem.theta), self.books)


class JointVQ(KMeans):
    """Algorithm 1: VQ layers under the surrogate's and the LLM's loss, Eq. (5)-(7)."""

    def fit(self):
        """As KMeans.fit; problem.theta moves too."""
        args, problem, device, dataset = self.args, self.problem, self.device, self.problem.dataset
        theta, known = problem.theta, problem.known
        # DEVIATION(5): theta is centred and divided by the spread of the LLM's words for the slot: lr,
        # alpha and beta then mean the same for every LLM.
        centre, unit = torch.tensor(theta[known].mean(0)), torch.tensor(problem.facts["spread"])[:, None]
        if args.paper:
            centre, unit = torch.zeros_like(centre), torch.ones_like(unit)
        z = (torch.tensor(theta) - centre) / unit
        books = first_codebooks(z[known].numpy(), self.sizes, args.start, args.seed)
        llm = self.llm_loss(centre.to(device), unit.to(device)) if args.llm_loss and args.epochs else None
        rng, z = seeded(args.seed, 6), z.to(device)
        quantizers = nn.ModuleList(map(VectorQuantizer, books)).to(device)
        surrogate = Surrogate(len(theta), len(dataset.items), *theta.shape[1:]).to(device)
        rows = rows_by_user(dataset.rows(TRAIN), len(theta))
        print(f"parameters: trainable theta {z.numel():,d}, codebooks "
              f"{count_parameters(quantizers):,d}, surrogate {count_parameters(surrogate):,d}; LLM frozen")
        if args.epochs:
            quantized = [quantizer(z[:, m])[0].detach() for m, quantizer in enumerate(quantizers)]
            warm_up(surrogate, np.concatenate(rows), torch.stack(quantized, dim=1), args.warm_up, rng)
        log = train_jointly(z, quantizers, surrogate, rows, np.flatnonzero(known), llm, args, rng)
        # Note: stage 02's file stays; a new user is assigned by what 02 infers for him.
        problem.theta = (centre + unit * z.cpu()).numpy()
        self.books = [origin + size * quantizer.codebook.detach().cpu()
                      for origin, size, quantizer in zip(centre, unit, quantizers)]
        return self.assign(), log

    def llm_loss(self, centre, unit):
        """A function (z (B, M, d), users (B,)) -> mean l_llm with prior, which adds its gradient to z's."""
        likelihood, histories, start, spread, _ = self.problem.open_likelihood(self.device)
        budget, prior = infer.token_budget_of(likelihood), self.problem.facts["prior"]

        def llm(z, users):
            total, own = 0.0, [histories[user] for user in users]
            for block in infer.make_blocks(own, None, budget, likelihood.prompt_length):
                theta = centre + unit * z[block]
                # Eq. (4) and the prior, DEVIATION(4)
                nll = likelihood(theta, *infer.pad(own, block, self.device))
                nll = nll + prior / 2 * (((theta - start) / spread[:, None]) ** 2).sum((1, 2))
                (nll.sum() / len(users)).backward()
                total += nll.sum().item() / len(users)
            return total

        return llm


class SoftCodeEM(KMeans):
    """EM for  p(y) = sum_c prod_m pi^m_c P_LLM(y | v^1_c1, ..., v^M_cM):  a mixture of soft tokens.

    Codebooks start as --start says; theta is not used after that. A round: an E-step over all users, then an
    M-step: weights pi in closed form, codes by AdamW on -log P(y | c), c drawn from the responsibilities.
    The likeliest round is kept.
    """

    def open(self):
        """Open the LLM; list combinations of codes (C, M) and blocks of users."""
        count = math.prod(self.sizes)
        if count > COMBINATIONS:
            raise UserError(f"{count} combinations are too many for EM", "--codes",
                            f"choose a product of at most {COMBINATIONS}, or --quantizer vq")
        opened = self.problem.open_likelihood(self.device)
        self.likelihood, self.histories, _, self.spread, self.tokenizer = opened
        self.combinations = torch.tensor(list(itertools.product(*map(range, self.sizes))))
        budget = infer.token_budget_of(self.likelihood)
        self.blocks = infer.make_blocks(self.histories, None, budget, self.likelihood.prompt_length)

    def theta(self, codes):
        """codes (B, M) -> their soft tokens (B, M, d) on the LLM's device."""
        return torch.stack([book[codes[:, m]] for m, book in enumerate(self.books)], dim=1).to(self.device)

    @torch.no_grad()
    def log_joint(self, users):
        """log pi_c + log P(y_u | c): float (B, C), a forward pass a column."""
        padded = infer.pad(self.histories, users, self.device)
        weights = sum(weight[self.combinations[:, m]] for m, weight in enumerate(self.log_weights))  # (C,)
        columns = [-self.likelihood(self.theta(codes.expand(len(users), -1)), *padded)
                   for codes in self.combinations]
        return weights + torch.stack(columns, dim=1).cpu()

    def e_step(self, codes):
        """(mean log-likelihood, likeliest codes (U, M), codes drawn from the responsibilities (U, M),
        M tensors of expected counts (K_m,)). Users without a history keep their codes."""
        codes = torch.tensor(codes)
        drawn, total, usage = codes.clone(), 0.0, [torch.zeros(size) for size in self.sizes]
        for users in progress(self.blocks, "E-step", "block"):
            joint = self.log_joint(users)
            share = joint.softmax(1)  # the responsibilities p(c | y_u). Shape: (B, C)
            codes[users] = self.combinations[joint.argmax(1)]
            drawn[users] = self.combinations[torch.multinomial(share, 1).squeeze(1)]
            total += float(joint.logsumexp(1).double().sum())
            for m, counts in enumerate(usage):
                counts.index_add_(0, self.combinations[:, m], share.sum(0))
        return total / sum(map(len, self.blocks)), codes.numpy(), drawn, usage

    def take_words(self):
        """Codes: the LLM's K_m likeliest words after x^m; weights: how likely. Returns the words."""
        self.books, self.log_weights, words = [], [], []
        for m, size in enumerate(self.sizes):
            probability, index = self.likelihood.next_word(m).topk(size)
            self.books.append(self.likelihood.vectors(index).cpu())
            self.log_weights.append((probability / probability.sum()).log().cpu())
            words.append([self.tokenizer.decode([token]).strip() for token in index.tolist()])
        return words

    def fit(self):
        args, theta, known = self.args, self.problem.theta, self.problem.known
        self.open()
        seeded(args.seed, 7)
        if args.start == "words":
            self.take_words()  # they will move: no names
        else:
            self.books = first_codebooks(theta[known], self.sizes, args.start, args.seed)
            self.log_weights = [torch.full((size,), -math.log(size)) for size in self.sizes]
        bases, log, rounds = self.books, [], []
        shifts = [torch.zeros_like(base).requires_grad_() for base in bases]  # Note: in units of the spread
        optimizer = torch.optim.AdamW(shifts, lr=args.lr, weight_decay=0.0)

        def move():
            self.books = [base + unit * shift for base, unit, shift in zip(bases, self.spread.cpu(), shifts)]

        codes = assign_all(torch.tensor(theta), bases)
        for number in range(args.epochs + 1):
            before, (evidence, codes, drawn, usage) = codes, self.e_step(codes)
            changed = int((codes != before).any(1).sum())
            log.append({"epoch": number, "log_likelihood": evidence, "ids_changed": changed})
            print(f"round {number}: log-likelihood a user {evidence:.4f}, ids changed {changed}")
            rounds.append((evidence, codes, [book.detach() for book in self.books], self.log_weights))
            if number == args.epochs:
                break
            # The M-step: pi in closed form, a gradient step a block
            self.log_weights = [((count + 1) / (count + 1).sum()).log() for count in usage]
            order = np.random.default_rng((args.seed, number)).permutation(len(self.blocks))
            for users in progress([self.blocks[index] for index in order], "M-step", "block"):
                move()
                optimizer.zero_grad()
                padded = infer.pad(self.histories, users, self.device)
                nll = self.likelihood(self.theta(drawn[users]), *padded)
                nll.mean().backward()
                optimizer.step()
            move()
        _, codes, self.books, self.log_weights = max(rounds, key=lambda found: found[0])
        return codes, log

    def assign(self):
        """K_1 x ... x K_M forward passes a user; no gradient."""
        self.open()
        return self.e_step(KMeans.assign(self))[1]


class Words(SoftCodeEM):
    """No descent: Bayes' rule over the LLM's own words. Every code has a name.

    c = argmax_c P_LLM(y | words c) prod_m P_LLM(word c_m | x^m)
    """

    def fit(self):
        self.open()
        self.words = self.take_words()
        evidence, codes, *_ = self.e_step(KMeans.assign(self))
        return codes, [{"epoch": 0, "log_likelihood": evidence}]


QUANTIZERS = {"vq": JointVQ, "kmeans": KMeans, "em": SoftCodeEM, "words": Words}


# -------- evaluate

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
    ami, nmi = metrics.adjusted_mutual_info_score, metrics.normalized_mutual_info_score
    return {"ami_truth": list(map(ami, truth.T, codes.T)), "nmi_truth": list(map(nmi, truth.T, codes.T)),
            "nmi_across": [nmi(one, other) if np.ptp(one) else 0.0  # sklearn: two constants agree
                           for one, other in itertools.combinations(codes.T, 2)]}


def show(report, agreed):
    """Code usage, with warnings."""
    for profile in report:
        counts = profile["counts"]
        print("{name}: {active} of {size} codes active, perplexity {perplexity:.2f}, largest share "
              "{max_share:.2f}".format(size=len(counts), **profile))
        names = profile.get("words", range(len(counts)))
        print("   ", *(f"{name}: {count:,d}" for name, count in zip(names, counts)), sep="  ")
        if profile["perplexity"] < 1.5 or profile["max_share"] > 0.9:
            print(f"    WARNING: the codebook of {profile['name']} has collapsed")
    if agreed:
        ami, nmi, across = (" ".join(f"{value:.3f}" for value in values) for values in agreed.values())
        print(f"with the planted truth: adjusted MI {ami}, NMI {nmi}; NMI across profiles {across}")


# -------- save

def bank_of(codes, known, sizes):
    """int16 (U, M): codes; without a history the unknown code K_m, as for an unseen user."""
    return np.where(known[:, None], codes, sizes).astype(np.int16)


def save(run, problem, bank, quantizer, facts):
    """Write codebooks, bank and the facts."""
    names, users = [profile["name"] for profile in problem.dataset.profiles], problem.dataset.users
    with together(run, "quantize.json") as aside:
        save_torch(aside / "codebooks.pt", {
            "codebooks": quantizer.books, "log_weights": quantizer.log_weights, "words": quantizer.words,
            "profiles": names, "users": users, "bank": torch.from_numpy(bank), "facts": facts,
            "made_with": problem.made_with()})
        save_npy(aside / "feature_bank.npy", bank)
        with open(aside / "feature_bank.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([["user_id", *names], *([user, *row] for user, row in zip(users, bank))])
        save_json(aside / "quantize.json", facts | {
            "fingerprint": fingerprint(bank),
            "codebooks_fingerprint": fingerprint(*map(np.asarray, quantizer.books))})


def saved_quantizer(problem, args, device):
    """--keep-codebooks: (the last quantizer, its settings, {raw user id: his codes then})."""
    saved = load(args.run, "codebooks.pt", (
        "codebooks", "log_weights", "words", "users", "bank", "facts", "made_with"))
    if saved["made_with"] != problem.made_with():
        raise UserError("codebooks.pt was made with another LLM or 02 flags", args.run, "run 03_quantize.py")
    books, facts = saved["codebooks"], saved["facts"]
    name = facts["quantizer"]
    if name not in QUANTIZERS or len(books) != problem.theta.shape[1]:
        raise UserError(f"codebooks.pt has {len(books)} books of {name}", args.run, "drop --keep-codebooks")
    quantizer = QUANTIZERS[name](problem, list(map(len, books)), args, device)
    quantizer.books, quantizer.log_weights, quantizer.words = books, saved["log_weights"], saved["words"]
    return quantizer, facts, dict(zip(saved["users"], saved["bank"].tolist()))


# -------- main

def main():
    args = parse_arguments()
    device = pick_device(args.device)
    problem, truth = read_problem(args.run)
    dataset, known = problem.dataset, problem.known
    announce("03 quantize", args, "stage 01's files, profiles.npy .json")
    if args.keep_codebooks:
        quantizer, facts, then = saved_quantizer(problem, args, device)
        sizes, codes = quantizer.sizes, quantizer.assign()
        for user, raw in enumerate(dataset.users):
            if then.get(raw, sizes) != sizes:  # sizes: the unknown code
                codes[user] = then[raw]
        facts["keep_codebooks"] = True
    else:
        sizes = parse_codes(args.codes, dataset.profiles)
        quantizer = QUANTIZERS[args.quantizer](problem, sizes, args, device)
        codes, log = quantizer.fit()
        if not torch.cat(list(quantizer.books)).isfinite().all():
            raise UserError("a code is not finite", args.quantizer, "lower --lr or mend fit()")
        facts = {key: value for key, value in vars(args).items() if key not in ("run", "device")}
        facts["loss"] = log
    report = health(codes[known], sizes, dataset.profiles)
    for profile, words in zip(report, quantizer.words or ()):
        profile["words"] = words
    agreed = {} if truth is None else agreement(codes[known], truth[known])
    facts |= {"codes": sizes, "profiles": report, **agreed, "dataset_fingerprint": dataset.fingerprint(),
              "profiles_fingerprint": problem.facts["fingerprint"]}
    save(args.run, problem, bank_of(codes, known, sizes), quantizer, facts)
    show(report, agreed)
    print(f"\nwrote codebooks.pt feature_bank.npy .csv quantize.json to {args.run}\n"
          f"next: python 04_train_ctr.py --run {args.run}")


if __name__ == "__main__":
    guarded(main)
