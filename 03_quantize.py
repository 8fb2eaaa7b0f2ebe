"""Stage 03: turn theta into one small id per profile, under a recommender's supervision. Paper: sections 2.4 and 2.6.

    l_vec = sum_m ||sg[theta^m] - v_c^m||^2 + beta ||theta^m - sg[v_c^m]||^2 + BCE(y, Rec^s(v_c^1, ..., v_c^M, E_obs, i))   Eq. (5)
    c_m   = argmin_k ||theta^m - v_k^m||^2                                                                          Eq. (6)
    L     = l_llm + alpha l_vec                                                                                     Eq. (7)

The paper's way (--quantizer vq, the default): the codebooks start from k-means over all theta; a surrogate DCN is warmed up on
these codes; then minibatches of users update theta, codebooks and surrogate together (Algorithm 1). --quantizer kmeans stops
at the start. --assign likelihood (--quantizer em) is EM proper, in which the codes themselves are the soft tokens.

Reads:  dataset.json interactions.npy users.json items.json truth.npy (01; truth for the evaluation alone), profiles.npy profiles.json lm-tiny/ (02)
Writes: codebooks.pt (M tensors (K_m, d) and what assigns a new user), feature_bank.npy int16 (U, M), feature_bank.csv, feature_bank.user
        (RecBole's atomic file), quantize.json

Run:
    python 03_quantize.py                                      # the demo: 15 s
    python 03_quantize.py --assign likelihood                  # EM with codes as soft tokens
    python 03_quantize.py --run runs/ml-100k --codes 8,4
    python 03_quantize.py --keep-codebooks                     # after 02 --users: new users get codes, nobody else's changes
"""

import argparse
import contextlib
import csv
import importlib
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import sklearn.cluster
import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from torch import nn
from tqdm import tqdm

from common import (DCN, TRAIN, Dataset, Field, Parser, UserError, announce, at_least, atomic, check_same, fingerprint,
                    guarded, load, load_dataset, load_truth, one_run_at_a_time, parameter_counts, pick_device, save_json,
                    save_npy, save_torch, seeded)

infer = importlib.import_module("02_infer_profiles")

# ---------------------------------------------------------------- settings

COMBINATIONS = 64  # EM enumerates up to this many code combinations a user
PAPER = {"alpha": 1e-3, "beta": 1e-3, "lr": 1e-3, "batch_users": 128, "start": "random", "warm_up": 0, "llm_loss": True}  # section 3.4


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument("--codes", help="codebook sizes K_1,K_2,... (default: what stage 01 wrote; paper: 4,3)")
    parser.add_argument("--quantizer", choices=QUANTIZERS, help="vq: Algorithm 1; kmeans: its start alone; em: codes as soft tokens "
                        "(default: vq, with --assign likelihood em)")
    parser.add_argument("--assign", choices=("nearest", "likelihood"),
                        help="a user's code: the nearest to theta, Eq. 6, or the one under which the LLM finds the history likeliest (em)")
    parser.add_argument("--epochs", type=at_least(0), default=3, help="vq: joint epochs over all users; em: rounds")
    parser.add_argument("--batch-users", type=at_least(1), default=128, help="users a minibatch (paper: 128)")
    parser.add_argument("--lr", type=at_least(1e-12, float), default=0.02,
                        help="step size of theta and codebooks in units of the slot's spread (paper: 0.001, unscaled)")
    parser.add_argument("--start", choices=("kmeans", "random"), default="kmeans",
                        help="vq, em: first codebook, k-means++ over all theta, or U(-1/K, 1/K) as in the authors' code")
    parser.add_argument("--alpha", type=at_least(0, float), default=1.0, help="vq: weight of l_vec beside l_llm, Eq. 7 (paper: 0.001)")
    parser.add_argument("--beta", type=at_least(0, float), default=0.25, help="vq: weight of the commitment term, Eq. 5 (paper: 0.001)")
    parser.add_argument("--llm-loss", action=argparse.BooleanOptionalAction, default=True,
                        help="vq: keep the LLM's likelihood in the joint objective, Eq. 7")
    parser.add_argument("--warm-up", type=at_least(0), default=10, help="vq: epochs of the surrogate alone, codes and theta frozen")
    parser.add_argument("--paper", action="store_true",
                        help="other defaults, the literal settings of section 3.4: " + " ".join(f"{k}={v}" for k, v in PAPER.items()))
    parser.add_argument("--keep-codebooks", action="store_true", help="learn nothing: users who have no code yet get one from codebooks.pt")
    if "--paper" in sys.argv:
        parser.set_defaults(**PAPER)
    args = parser.parse_args()
    args.quantizer = args.quantizer or ("em" if args.assign == "likelihood" else "vq")
    args.assign = args.assign or ("likelihood" if args.quantizer == "em" else "nearest")
    if (args.assign == "likelihood") != (args.quantizer == "em"):
        parser.error(f"--assign {args.assign} does not go with --quantizer {args.quantizer}; leave one of them out")
    return args


def parse_codes(text, profiles):
    """[K_1, ..., K_M] from '4,3' or from stage 01's defaults. Raises UserError unless there is one integer above 1 a profile."""
    try:
        sizes = [profile["codes"] for profile in profiles] if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"'{text}' is not a list of integers", "--codes", "write for example --codes 4,3") from None
    if len(sizes) != len(profiles):
        raise UserError(f"{len(sizes)} codebook sizes for {len(profiles)} profiles", f"--codes {text}",
                        "give one size for each of " + ", ".join(profile["name"] for profile in profiles))
    if min(sizes) < 2 or max(sizes) > 32766:
        raise UserError("a codebook needs 2 to 32766 codes", f"--codes {text}", "give other sizes")
    return sizes


# ---------------------------------------------------------------- data

@dataclass
class Problem:
    """What a quantizer may look at. theta float32 (U, M, d); known bool (U,): its theta was inferred, the others hold the
    population profile; facts: stage 02's settings. No truth in here."""

    run: Path
    dataset: Dataset
    theta: np.ndarray
    known: np.ndarray
    facts: dict

    def open_likelihood(self, device):
        """(likelihood of Eq. 4, histories, theta_0 (M, d), spread (M,), tokenizer): stage 02 as it was run."""
        settings = SimpleNamespace(**{**self.facts, "run": self.run, "logit_chunk": 4096})
        likelihood, tokenizer, _ = infer.open_model(self.dataset, settings, device, made_with=self.facts)
        texts = infer.history_texts(self.dataset, TRAIN, settings)
        histories = infer.tokenize_histories(tokenizer, texts, infer.room_for_history(likelihood))
        start, spread = infer.starting_point(likelihood, self.facts["init"], seeded(self.facts["seed"], 3))
        return likelihood, histories, start, spread, tokenizer


def read_problem(run):
    """(Problem, truth or None), checked to belong together."""
    dataset = load_dataset(run)
    facts = load(run, "profiles.json", (*infer.RECORDED, "spread", "dataset_fingerprint", "lm_fingerprint", "fingerprint"))
    theta = np.array(load(run, "profiles.npy"))
    check_same(run, "profiles.npy", "dataset", facts["dataset_fingerprint"], dataset.fingerprint(), "02_infer_profiles.py")
    check_same(run, "profiles.npy", "profiles.json", fingerprint(theta), facts["fingerprint"], "02_infer_profiles.py")
    known = np.zeros(len(dataset.users), dtype=bool)
    known[load(run, "profiles_users.json", ("inferred",))["inferred"]] = True
    return Problem(run, dataset, theta, known, facts), load_truth(run)


def rows_by_user(rows, n_users):
    """(rows sorted by user, offsets): the training rows of user u are rows[offsets[u]:offsets[u + 1]]."""
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    return rows, np.searchsorted(rows[:, 0], np.arange(n_users + 1))


# ---------------------------------------------------------------- model

@torch.no_grad()
def nearest(theta, codebook):
    """Eq. (6): theta (B, d), codebook (K, d) -> index of the nearest code (B,)."""
    return torch.cdist(theta, codebook).argmin(dim=1)


class VectorQuantizer(nn.Module):
    """One codebook C^m with K codes v_k (van den Oord et al. 2017). All distances are squared norms summed over d."""

    def __init__(self, codebook):
        super().__init__()
        self.codebook = nn.Parameter(codebook.clone())

    def assign(self, theta):
        """Eq. (6): c = argmin_k ||theta - v_k||^2. (B, d) -> (B,)."""
        return nearest(theta, self.codebook)

    def forward(self, theta):
        """(B, d) -> quantized (B, d) that passes its gradient straight to theta, codes (B,), and Eq. (5)'s terms (B,), (B,)."""
        codes = self.assign(theta)
        chosen = self.codebook[codes]
        codebook_term = ((theta.detach() - chosen) ** 2).sum(1)  # moves v_c only
        commitment = ((theta - chosen.detach()) ** 2).sum(1)     # moves theta only
        straight_through = theta + (chosen - theta).detach()     # value v_c, gradient of the identity
        return straight_through, codes, codebook_term, commitment


class Surrogate(nn.Module):
    """Rec^s of Eq. (5): a DCN on user id, item id and the quantized profiles, each projected from d to the embedding width."""

    def __init__(self, n_users, n_items, profiles, d, dim=8):
        super().__init__()
        self.dcn = DCN([Field("user", n_users), Field("item", n_items)], dim, extra_fields=profiles)
        self.projections = nn.ModuleList(nn.Linear(d, dim) for _ in range(profiles))

    def forward(self, ids, quantized):
        """ids (n, 2) user, item; quantized (n, M, d) -> logits (n,)."""
        profiles = [project(quantized[:, m]) for m, project in enumerate(self.projections)]
        return self.dcn.logit(torch.cat([self.dcn.embed(ids), torch.stack(profiles, dim=1)], dim=1))


class CodeMixture:
    """p(y) = sum over combinations c of prod_m pi^m_c * P_LLM(y | v^1_c1, ..., v^M_cM): a mixture whose components are soft tokens.

    likelihood: Eq. (4); books: M tensors (K_m, d) in the space of theta; log_weights: M tensors log pi^m (K_m,); histories: U arrays of token ids.
    Up to COMBINATIONS combinations are enumerated; beyond, one profile is updated at a time with the others at their best code.
    """

    def __init__(self, likelihood, books, log_weights, histories):
        self.likelihood, self.books, self.log_weights, self.histories = likelihood, books, log_weights, histories
        self.sizes = [len(book) for book in books]
        self.all = torch.tensor(list(itertools.product(*map(range, self.sizes)))) if math.prod(self.sizes) <= COMBINATIONS else None

    def blocks(self):
        return infer.make_blocks(self.histories, None, infer.token_budget_of(self.likelihood), self.likelihood.prompt_length)

    def theta(self, codes):
        """(B, M) codes -> (B, M, d)."""
        return torch.stack([book[codes[:, m]] for m, book in enumerate(self.books)], dim=1)

    @torch.no_grad()
    def log_joint(self, users, candidates):
        """log pi_c + log P(y_u | c) for candidates (B, C, M): float (B, C), a forward pass for each of the C columns."""
        ids, lengths = infer.pad(self.histories, users, self.likelihood.device)
        columns = []
        for codes in candidates.to(ids.device).unbind(1):
            prior = sum(weight[codes[:, m]] for m, weight in enumerate(self.log_weights))
            columns.append(prior - self.likelihood(self.theta(codes), ids, lengths))
        return torch.stack(columns, dim=1)

    def responsibilities(self, users, codes):
        """(candidates (B, C, M), responsibilities (B, C), log-likelihood (B,), best codes (B, M)) of a block of users.

        codes: the users' present best codes, from which the coordinate updates start.
        """
        if self.all is not None:
            candidates = self.all.expand(len(users), -1, -1)
            joint = self.log_joint(users, candidates)
            best = self.all[joint.argmax(1).cpu()]
        else:
            best = codes.clone()
            for m, size in enumerate(self.sizes):
                candidates = best[:, None].repeat(1, size, 1)  # Shape: (B, K_m, M)
                candidates[:, :, m] = torch.arange(size)
                joint = self.log_joint(users, candidates)
                best[:, m] = joint.argmax(1).cpu()
        return candidates, joint.softmax(1).cpu(), joint.logsumexp(1).cpu(), best

    def e_step(self, codes):
        """Over all users with a history: (mean log-likelihood, best codes (U, M), codes drawn from the responsibilities (U, M),
        usage: M tensors of expected counts (K_m,)). codes (U, M): the best so far."""
        codes = torch.tensor(codes)
        drawn, total, usage, blocks = codes.clone(), 0.0, [torch.zeros(size) for size in self.sizes], self.blocks()
        for users in tqdm(blocks, desc="E-step", unit="block", leave=False):
            candidates, share, evidence, codes[users] = self.responsibilities(users, codes[users])
            drawn[users] = candidates[torch.arange(len(users)), torch.multinomial(share, 1).squeeze(1)]
            total += float(evidence.double().sum())
            for m, size in enumerate(self.sizes):
                usage[m] += torch.zeros(size).index_add(0, candidates[:, :, m].flatten(), share.flatten())
        return total / sum(map(len, blocks)), codes.numpy(), drawn, usage


def first_codebooks(theta, sizes, start, seed):
    """A codebook (K, d) for each profile: k-means++ with restarts over all given theta (n, M, d), or U(-1/K, 1/K) noise. DEVIATION(6)."""
    codebooks = []
    for m, size in enumerate(sizes):
        distinct = len(np.unique(theta[:, m], axis=0))
        if size > distinct:
            raise UserError(f"{size} codes for {distinct} distinct theta", "--codes", f"choose at most {distinct} for profile {m + 1}")
        if start == "kmeans":
            codebooks.append(sklearn.cluster.KMeans(size, n_init=10, random_state=seed).fit(theta[:, m]).cluster_centers_)
        else:
            codebooks.append(np.random.default_rng((seed, m)).uniform(-1 / size, 1 / size, (size, theta.shape[2])))
    return [torch.tensor(codebook, dtype=torch.float32) for codebook in codebooks]


# ---------------------------------------------------------------- loss and train

def warm_up(surrogate, rows, quantized, epochs, device, rng):
    """Train the surrogate on fixed codes with ordinary minibatches of rows; quantized float (U, M, d)."""
    optimizer = torch.optim.Adam(surrogate.parameters(), lr=1e-3)
    rows = torch.from_numpy(rows.astype(np.int64)).to(device)
    surrogate.train()
    for _ in tqdm(range(epochs), desc="warming up the surrogate", unit="epoch", disable=epochs == 0):
        for batch in torch.from_numpy(rng.permutation(len(rows))).to(device).split(min(1024, max(128, len(rows) // 160))):
            users, labels = rows[batch, 0], rows[batch, 2].float()
            loss = F.binary_cross_entropy_with_logits(surrogate(rows[batch, :2], quantized[users]), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def joint_loss(theta, users, quantizers, surrogate, rows, offsets, llm, args):
    """Eq. (7) for a minibatch: (loss, {part: mean a user}).

    theta (B, M, d) in the units of --lr; users numpy (B,); rows long (n, 3) user, item, label, sorted by user; offsets numpy (U + 1,), see
    rows_by_user; llm: None or a function (theta, users) -> (B,).
    """
    outputs = [quantizer(theta[:, m]) for m, quantizer in enumerate(quantizers)]
    quantized = torch.stack([output[0] for output in outputs], dim=1)  # Shape: (B, M, d)
    codebook_term, commitment = sum(output[2] for output in outputs), sum(output[3] for output in outputs)
    counts = offsets[users + 1] - offsets[users]
    owner = np.repeat(np.arange(len(users)), counts)
    index = torch.from_numpy(np.concatenate([np.arange(offsets[user], offsets[user + 1]) for user in users] or [[]]).astype(np.int64))
    batch = rows[index.to(rows.device)]
    rec = F.binary_cross_entropy_with_logits(surrogate(batch[:, :2], quantized[torch.from_numpy(owner).to(rows.device)]),
                                             batch[:, 2].float(), reduction="sum")
    # Every term is a sum over one user's evidence (nats for the two likelihoods), averaged over the users of the batch.
    parts = {"codebook": codebook_term.mean(), "commitment": commitment.mean(), "rec": rec / len(users)}
    vec = parts["codebook"] + args.beta * parts["commitment"] + parts["rec"]  # Eq. (5)
    loss = args.alpha * vec
    if llm is not None:
        parts["llm"] = llm(theta, users).mean()
        loss = loss + parts["llm"]  # Eq. (7). DEVIATION(7): alpha is the weight alone, not Algorithm 1's step size too.
    return loss, {name: float(part.detach()) for name, part in parts.items()}


def train_jointly(theta, quantizers, surrogate, rows, offsets, users, llm, args, rng):
    """Algorithm 1: minibatches of users update theta (their rows only), codebooks and surrogate. Returns the log, one entry an epoch.

    theta: nn.Embedding (U, M * d) with sparse gradients, so that an absent user's row and optimiser state stay as they are.
    """
    shape = (-1, len(quantizers), theta.weight.shape[1] // len(quantizers))
    optimizers = [torch.optim.SparseAdam([theta.weight], lr=args.lr), torch.optim.AdamW(quantizers.parameters(), lr=args.lr, weight_decay=0.0),
                  torch.optim.AdamW(surrogate.parameters(), lr=1e-3, weight_decay=0.0)]
    log, before = [], assign_all(theta.weight.detach().view(shape), [quantizer.codebook for quantizer in quantizers])
    for epoch in range(1, args.epochs + 1):
        surrogate.train()
        sums, batches = {}, np.array_split(rng.permutation(users), math.ceil(len(users) / args.batch_users))
        for batch in tqdm(batches, desc=f"joint epoch {epoch}", unit="batch", leave=False):
            batch_theta = theta(torch.from_numpy(batch).to(theta.weight.device)).view(shape)
            loss, parts = joint_loss(batch_theta, batch, quantizers, surrogate, rows, offsets, llm, args)
            if not torch.isfinite(loss):
                raise UserError(f"the joint loss is {loss.item()} in epoch {epoch}", f"--lr {args.lr}", "lower --lr or --alpha")
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            for name, part in parts.items():
                sums[name] = sums.get(name, 0.0) + part * len(batch) / len(users)
        codes = assign_all(theta.weight.detach().view(shape), [quantizer.codebook for quantizer in quantizers])
        log.append({"epoch": epoch, **sums, "ids_changed": int((codes != before)[users].any(1).sum()),
                    "perplexity": [round(perplexity(codes[users, m], len(quantizer.codebook)), 3) for m, quantizer in enumerate(quantizers)]})
        before = codes
        tqdm.write(" ".join(f"{name} {value if isinstance(value, list) else f'{value:.4g}'}" for name, value in log[-1].items()))
    return log


# ---------------------------------------------------------------- quantizers: fit learns, assign is a pure function of what was learned

def assign_all(theta, books):
    """Eq. (6) over all users and profiles: theta (U, M, d), M codebooks (K_m, d) -> int (U, M)."""
    return torch.stack([nearest(theta[:, m], book) for m, book in enumerate(books)], dim=1).cpu().numpy()


class KMeans(nn.Module):
    """Plain k-means over theta: no recommender, no LLM. What the two below start from."""

    def __init__(self, problem, sizes, args, device):
        super().__init__()
        self.problem, self.sizes, self.args, self.device = problem, sizes, args, device
        self.books, self.log_weights = None, None

    def fit(self):
        """Learn self.books, M tensors (K_m, d) in the space of theta. Returns (codes (U, M), log: a dict an epoch)."""
        self.books = first_codebooks(self.problem.theta[self.problem.known], self.sizes, "kmeans", self.args.seed)
        return self.assign(), []

    def assign(self):
        """Codes (U, M) of all users; nothing is learned."""
        return assign_all(torch.tensor(self.problem.theta), self.books)


class JointVQ(KMeans):
    """The paper's way, Algorithm 1: VQ layers trained with the surrogate recommender's and the LLM's loss, Eq. (5)-(7)."""

    def fit(self):
        """As above; the theta of self.problem moves too, and the codes are those nearest to the moved theta."""
        args, problem, device = self.args, self.problem, self.device
        rng = seeded(args.seed, 6)
        theta, known, dataset = problem.theta, problem.known, problem.dataset
        # Note: theta is centred and divided by the spread of the LLM's own slot words, one number a profile: lr, alpha and beta then
        # mean the same for every LLM. DEVIATION(5). --paper works on theta as it is.
        centre = torch.zeros(theta.shape[1:]) if args.paper else torch.tensor(theta[known].mean(0))
        unit = torch.ones(theta.shape[1]) if args.paper else torch.tensor(problem.facts["spread"])
        z = (torch.tensor(theta) - centre) / unit[:, None]
        quantizers = nn.ModuleList(map(VectorQuantizer, first_codebooks(z[known].numpy(), self.sizes, args.start, args.seed))).to(device)
        table = nn.Embedding(len(z), z[0].numel(), sparse=True, _weight=z.flatten(1).clone()).to(device)
        surrogate = Surrogate(len(dataset.users), len(dataset.items), theta.shape[1], theta.shape[2]).to(device)
        rows, offsets = rows_by_user(dataset.rows(TRAIN), len(dataset.users))
        llm = self.likelihood_of(centre.to(device), unit.to(device)) if args.llm_loss and args.epochs else None
        print(f"parameters: trainable theta {table.weight.numel():,d}, codebooks {parameter_counts(quantizers)[0]:,d}, surrogate "
              f"{parameter_counts(surrogate)[0]:,d}; the LLM is frozen")
        if args.epochs:
            quantized = torch.stack([quantizer(z[:, m].to(device))[0].detach() for m, quantizer in enumerate(quantizers)], dim=1)
            warm_up(surrogate, rows, quantized, args.warm_up, device, rng)
        log = train_jointly(table, quantizers, surrogate, torch.from_numpy(rows.astype(np.int64)).to(device), offsets,
                            np.flatnonzero(known), llm, args, rng)
        problem.theta = (centre + unit[:, None] * table.weight.detach().cpu().view(z.shape)).numpy()
        self.books = [centre[m] + unit[m] * quantizer.codebook.detach().cpu() for m, quantizer in enumerate(quantizers)]
        return self.assign(), log

    def likelihood_of(self, centre, unit):
        """l_llm of stage 02, prior included, as a function (z (B, M, d), users (B,)) -> (B,) with theta = centre + unit * z."""
        likelihood, histories, start, spread, _ = self.problem.open_likelihood(self.device)
        budget, weight = infer.token_budget_of(likelihood), self.problem.facts["prior"] / 2

        def llm(z, users):
            theta = centre + unit[:, None] * z
            # A block of tokens at a time: its gradient is taken at once and its graph freed. What is returned has the value nll and, as its
            # gradient with respect to theta, that stored one: the term with leaf.grad is 0 in value.
            leaf, nll = theta.detach().requires_grad_(), torch.zeros(len(users), device=z.device)
            for rows in infer.make_blocks([histories[user] for user in users], None, budget, likelihood.prompt_length):
                part = likelihood(leaf[rows], *infer.pad([histories[users[row]] for row in rows], range(len(rows)), z.device))
                part.sum().backward()
                nll[rows] = part.detach()
            return nll + (leaf.grad * (theta - theta.detach())).sum((1, 2)) + weight * ((theta - start) / spread[:, None]).pow(2).sum((1, 2))

        return llm


class SoftCodeEM(KMeans):
    """EM with the codes as soft tokens (CodeMixture). The codebooks start from k-means; a user's own theta is not used after that.

    A round is an E-step over all users and an M-step: the weights in closed form, the codes by AdamW on -log P(y | c) with c drawn
    from the responsibilities, an unbiased gradient of the expected log-likelihood. Of all rounds the likeliest codebooks are kept.
    """

    def fit(self):
        args = self.args
        seeded(args.seed, 7)
        likelihood, histories, _, spread, _ = self.problem.open_likelihood(self.device)
        bases = [book.to(self.device) for book in first_codebooks(self.problem.theta[self.problem.known], self.sizes, args.start, args.seed)]
        shifts = [torch.zeros_like(base).requires_grad_() for base in bases]  # Note: in units of the slot's spread, like theta in stage 02
        mixture = CodeMixture(likelihood, bases, [torch.full((size,), -math.log(size), device=self.device) for size in self.sizes], histories)
        optimizer = torch.optim.AdamW(shifts, lr=args.lr, weight_decay=0.0)
        codes, log, best = assign_all(torch.tensor(self.problem.theta, device=self.device), bases), [], None
        for round_ in range(args.epochs + 1):
            before, (evidence, codes, drawn, usage) = codes, mixture.e_step(codes)
            log.append({"epoch": round_, "log_likelihood": evidence, "ids_changed": int((codes != before).any(1).sum())})
            tqdm.write(f"round {round_}: log-likelihood a user {evidence:.4f}, ids changed {log[-1]['ids_changed']}")
            if best is None or evidence > best[0]:
                best = evidence, codes, [book.cpu() for book in mixture.books], [weight.cpu() for weight in mixture.log_weights]
            if round_ < args.epochs:
                mixture.log_weights = [((count + 1) / (count + 1).sum()).log().to(self.device) for count in usage]
                blocks = mixture.blocks()
                for index in tqdm(np.random.default_rng((args.seed, round_)).permutation(len(blocks)), desc="M-step", unit="block", leave=False):
                    mixture.books = [base + unit * shift for base, unit, shift in zip(bases, spread, shifts)]
                    ids, lengths = infer.pad(histories, blocks[index], self.device)
                    loss = likelihood(mixture.theta(drawn[blocks[index]].to(self.device)), ids, lengths).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                mixture.books = [(base + unit * shift).detach() for base, unit, shift in zip(bases, spread, shifts)]
        _, codes, self.books, self.log_weights = best
        return codes, log

    def assign(self):
        """K_1 x ... x K_M forward passes a user and no gradient; theta is used only beyond COMBINATIONS, to start from."""
        likelihood, histories, *_ = self.problem.open_likelihood(self.device)
        books, weights = ([tensor.to(self.device) for tensor in tensors] for tensors in (self.books, self.log_weights))
        nearest_codes = assign_all(torch.tensor(self.problem.theta, device=self.device), books)
        return CodeMixture(likelihood, books, weights, histories).e_step(nearest_codes)[1]


QUANTIZERS = {"vq": JointVQ, "kmeans": KMeans, "em": SoftCodeEM}


def made_with(problem):
    """What decides the space that theta and codebooks live in: the LLM and stage 02's settings, not the data set."""
    return [str(problem.facts[key]) for key in (*infer.RECORDED, "lm_fingerprint")]


def keep_codebooks(problem, args, device):
    """(codes (U, M), sizes, quantizer): --keep-codebooks. Users with a code keep it; the others are assigned by what was learned."""
    saved = load(args.run, "codebooks.pt", ("codebooks", "log_weights", "made_with"))
    if saved["made_with"] != made_with(problem):
        raise UserError("codebooks.pt was made with another LLM or other settings of stage 02", args.run,
                        f"run: python 03_quantize.py --run {args.run}")
    if args.codes:
        raise UserError("--codes does not go with --keep-codebooks", f"--codes {args.codes}", "leave one of them out")
    sizes, earlier = [len(book) for book in saved["codebooks"]], {}
    with contextlib.suppress(FileNotFoundError), open(args.run / "feature_bank.csv", newline="", encoding="utf-8") as file:
        try:
            earlier = {row[0]: list(map(int, row[1:])) for row in list(csv.reader(file))[1:]}
        except (ValueError, IndexError, csv.Error) as error:
            raise UserError(f"feature_bank.csv cannot be read: {error}", args.run, f"run: python 03_quantize.py --run {args.run}") from None
    quantizer = QUANTIZERS[args.quantizer](problem, sizes, args, device)
    quantizer.books, quantizer.log_weights = saved["codebooks"], saved["log_weights"]
    codes = quantizer.assign()
    for user, raw in enumerate(problem.dataset.users):
        if str(raw) in earlier and earlier[str(raw)] != sizes:
            codes[user] = earlier[str(raw)]
    return codes, sizes, quantizer


# ---------------------------------------------------------------- evaluate

def perplexity(codes, size):
    """exp(entropy) of the codes' usage: 1 when all users share one code, K when all codes are used alike."""
    share = np.bincount(codes, minlength=size) / max(1, len(codes))
    return float(np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()))


def health(codes, theta, books, names):
    """Per profile over all users given: active codes, perplexity, largest share, counts, and the mean of ||theta - nearest code|| over
    ||theta - second nearest||: near 1 the codes are arbitrary cuts through one cloud, near 0 the users fall into groups."""
    report = []
    for m, book in enumerate(books):
        counts = np.bincount(codes[:, m], minlength=len(book))
        distances = torch.cdist(torch.as_tensor(theta[:, m]), book).topk(2, largest=False).values
        report.append({"name": names[m], "active": int((counts > 0).sum()), "perplexity": perplexity(codes[:, m], len(book)),
                       "max_share": float(counts.max() / counts.sum()), "counts": counts.tolist(),
                       "distance_ratio": float((distances[:, 0] / distances[:, 1].clamp(min=1e-12)).mean())})
    return report


def agreement(codes, truth):
    """Adjusted MI and NMI of each profile's codes with the planted values, and NMI across profiles (should be 0)."""
    M = codes.shape[1]
    return {"ami_truth": [float(adjusted_mutual_info_score(truth[:, m], codes[:, m])) for m in range(M)],
            "nmi_truth": [float(normalized_mutual_info_score(truth[:, m], codes[:, m])) for m in range(M)],
            "nmi_across": [float(normalized_mutual_info_score(codes[:, a], codes[:, b])) for a, b in itertools.combinations(range(M), 2)]}


def show(report, agreed):
    """Code usage as a histogram in text, with warnings."""
    for profile in report:
        print(f"{profile['name']}: {profile['active']} of {len(profile['counts'])} codes active, perplexity {profile['perplexity']:.2f}, "
              f"largest share {profile['max_share']:.2f}, distance ratio first / second {profile['distance_ratio']:.2f}")
        for code, count in enumerate(profile["counts"]):
            print(f"    {code:3d} {count:7,d} {'#' * round(50 * count / max(profile['counts']))}")
        if profile["perplexity"] < 1.5 or profile["max_share"] > 0.9:
            print(f"    WARNING: the codebook of {profile['name']} has collapsed; try --start kmeans, fewer --epochs or a smaller --lr")
    if agreed:
        print("with the planted truth: adjusted MI " + " ".join(f"{value:.3f}" for value in agreed["ami_truth"]) + ", NMI "
              + " ".join(f"{value:.3f}" for value in agreed["nmi_truth"])
              + "; NMI across profiles " + " ".join(f"{value:.4f}" for value in agreed["nmi_across"]))


# ---------------------------------------------------------------- save

def bank_of(codes, known, sizes):
    """int16 (U, M): the codes (U, M); users without a history, like users unseen, get the unknown code K_m."""
    return np.where(known[:, None], codes, sizes).astype(np.int16)


def save(run, problem, codes, quantizer, facts):
    """Write bank, codebooks and facts."""
    dataset, sizes = problem.dataset, facts["codes"]
    bank = bank_of(codes, problem.known, sizes)
    (run / "quantize.json").unlink(missing_ok=True)
    names = [profile["name"] for profile in dataset.profiles]
    save_torch(run / "codebooks.pt", {"codebooks": quantizer.books, "log_weights": quantizer.log_weights, "quantizer": facts["quantizer"],
                                      "profiles": names, "made_with": made_with(problem)})
    save_npy(run / "feature_bank.npy", bank)
    for name, delimiter, header in (("feature_bank.csv", ",", ["user_id", *names]),
                                    ("feature_bank.user", "\t", [f"{field}:token" for field in ("user_id", *names)])):
        with atomic(run / name) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
            writer.writerow(header)
            writer.writerows([user, *row] for user, row in zip(dataset.users, bank.tolist()))
    save_json(run / "quantize.json", {**facts, "fingerprint": fingerprint(bank)})


# ---------------------------------------------------------------- main

def main():
    args = parse_arguments()
    device = pick_device(args.device)
    problem, truth = read_problem(args.run)
    facts, known, names = problem.facts, problem.known, [profile["name"] for profile in problem.dataset.profiles]
    sizes = parse_codes(args.codes, problem.dataset.profiles)
    announce("03 quantize", args, f"dataset.json interactions.npy users.json items.json profiles.npy profiles.json in {args.run}")
    with one_run_at_a_time(args.run):
        settings = {key: value for key, value in vars(args).items() if key not in ("run", "device", "codes")}
        if args.keep_codebooks:
            earlier = load(args.run, "quantize.json", (*settings, "loss"))
            settings, log = {key: earlier[key] for key in settings} | {"keep_codebooks": True}, earlier["loss"]
            args.quantizer, args.assign = settings["quantizer"], settings["assign"]
            codes, sizes, quantizer = keep_codebooks(problem, args, device)
        else:
            quantizer = QUANTIZERS[args.quantizer](problem, sizes, args, device)
            codes, log = quantizer.fit()
        report = health(codes[known], problem.theta[known], quantizer.books, names)
        agreed = None if truth is None else agreement(codes[known], truth[known])
        save(args.run, problem, codes, quantizer, {
            **settings, "codes": sizes, "profiles": report, "loss": log, **(agreed or {}), "dataset_fingerprint": problem.dataset.fingerprint(),
            "profiles_fingerprint": facts["fingerprint"], "added_users": facts.get("added_users")})
    show(report, agreed)
    print(f"\nwrote codebooks.pt feature_bank.npy feature_bank.csv feature_bank.user quantize.json to {args.run}\n"
          f"next: python 04_train_ctr.py --run {args.run}")


if __name__ == "__main__":
    guarded(main)
