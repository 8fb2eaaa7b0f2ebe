"""Stage 03: turn theta into one small id per profile, under a recommender's supervision. Paper: sections 2.4 and 2.6.

    l_vec = sum_m ||sg[theta^m] - v_c^m||^2 + beta ||theta^m - sg[v_c^m]||^2 + BCE(y, Rec^s(v_c^1, ..., v_c^M, E_obs, i))   Eq. (5)
    c_m   = argmin_k ||theta^m - v_k^m||^2                                                                          Eq. (6)
    L     = l_llm + alpha l_vec                                                                                     Eq. (7)

The codebooks start from k-means over all theta; a surrogate DCN is warmed up on these codes; then minibatches of users
update theta, codebooks and surrogate together (Algorithm 1). --assign likelihood replaces the three by EM, in which the
codes themselves are the soft tokens.

Reads:  dataset.json interactions.npy users.json items.json truth.npy (01; truth for the evaluation alone), profiles.npy profiles.json lm-tiny/ (02)
Writes: codebooks.pt (M tensors (K_m, d) and what assigns a new user), feature_bank.npy int16 (U, M) and .csv, quantize.json

Run:
    python 03_quantize.py                                      # the demo: 20 s
    python 03_quantize.py --assign likelihood                  # EM with codes as soft tokens
    python 03_quantize.py --run runs/ml-100k --codes 8,4
"""

import argparse
import csv
import importlib
import itertools
import math
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from torch import nn
from tqdm import tqdm

from common import (DCN, TRAIN, Field, Parser, UserError, announce, at_least, atomic, check_same, fingerprint, guarded, load, load_dataset,
                    load_truth, one_run_at_a_time, parameter_counts, pick_device, save_json, save_npy, save_torch, seeded)

infer = importlib.import_module("02_infer_profiles")

# ---------------------------------------------------------------- settings

COMBINATIONS = 64  # EM enumerates up to this many code combinations a user
PAPER = {"alpha": 1e-3, "beta": 1e-3, "lr": 1e-3, "batch_users": 128, "start": "random", "warm_up": 0, "llm_loss": True}  # section 3.4


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument("--codes", help="codebook sizes K_1,K_2,... (default: what stage 01 wrote; paper: 4,3)")
    parser.add_argument("--alpha", type=at_least(0, float), default=1.0, help="weight of l_vec beside l_llm, Eq. 7 (paper: 0.001)")
    parser.add_argument("--beta", type=at_least(0, float), default=0.25, help="weight of the commitment term, Eq. 5 (paper: 0.001)")
    parser.add_argument("--llm-loss", action=argparse.BooleanOptionalAction, default=True,
                        help="keep the LLM's likelihood in the joint objective, Eq. 7")
    parser.add_argument("--assign", choices=("nearest", "likelihood"), default="nearest",
                        help="nearest: Eq. 6; likelihood: EM, the code under which the LLM finds the history likeliest")
    parser.add_argument("--start", choices=("kmeans", "random"), default="kmeans",
                        help="first codebook: k-means++ over all theta, or U(-1/K, 1/K) as in the authors' code")
    parser.add_argument("--epochs", type=at_least(0), default=3, help="joint epochs over all users (EM: rounds); 0 keeps plain k-means")
    parser.add_argument("--warm-up", type=at_least(0), default=10, help="epochs of the surrogate alone, codes and theta frozen")
    parser.add_argument("--lr", type=at_least(1e-12, float), default=0.02,
                        help="step size of theta and codebooks in units of the slot's spread (paper: 0.001, unscaled)")
    parser.add_argument("--batch-users", type=at_least(1), default=128, help="users a minibatch (paper: 128)")
    parser.add_argument("--paper", action="store_true",
                        help="the literal settings of section 3.4: " + " ".join(f"{k}={v}" for k, v in PAPER.items()))
    args = parser.parse_args()
    if args.paper:
        vars(args).update(PAPER)
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

def read_inputs(args):
    """(dataset, theta (U, M, d), known bool (U,), stage 02's facts, truth or None), checked to belong together.

    known: users whose theta was inferred; the others hold the population profile.
    """
    dataset = load_dataset(args.run)
    facts = load(args.run, "profiles.json", (*infer.RECORDED, "spread", "dataset_fingerprint", "lm_fingerprint", "fingerprint"))
    theta = np.array(load(args.run, "profiles.npy"))
    check_same(args.run, "profiles.npy", "dataset", facts["dataset_fingerprint"], dataset.fingerprint(), "02_infer_profiles.py")
    check_same(args.run, "profiles.npy", "profiles.json", fingerprint(theta), facts["fingerprint"], "02_infer_profiles.py")
    known = np.zeros(len(dataset.users), dtype=bool)
    known[load(args.run, "profiles_users.json", ("inferred",))["inferred"]] = True
    return dataset, theta, known, facts, load_truth(args.run)


def open_likelihood(dataset, facts, args, device):
    """(likelihood of Eq. 4, histories, theta_0 (M, d), spread (M,)): stage 02 as it was run."""
    settings = SimpleNamespace(**{**facts, "run": args.run, "logit_chunk": 4096})
    likelihood, tokenizer, _ = infer.open_model(dataset, settings, device, made_with=facts)
    texts = infer.history_texts(dataset, TRAIN, facts["history"], facts["max_history"])
    histories = infer.tokenize_histories(tokenizer, texts, infer.room_for_history(likelihood))
    start, spread = infer.starting_point(likelihood, facts["init"], seeded(facts["seed"], 3))
    return likelihood, histories, start, spread


def rows_by_user(rows, n_users):
    """(rows sorted by user, offsets): the training rows of user u are rows[offsets[u]:offsets[u + 1]]."""
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    return rows, np.searchsorted(rows[:, 0], np.arange(n_users + 1))


# ---------------------------------------------------------------- model

class VectorQuantizer(nn.Module):
    """One codebook C^m with K codes v_k (van den Oord et al. 2017). All distances are squared norms summed over d."""

    def __init__(self, codebook):
        super().__init__()
        self.codebook = nn.Parameter(codebook.clone())

    def assign(self, theta):
        """Eq. (6): c = argmin_k ||theta - v_k||^2. (B, d) -> (B,)."""
        return torch.cdist(theta, self.codebook).argmin(dim=1)

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
    """EM with the codes as soft tokens: p(y) = sum over combinations c of prod_m pi^m_c * P_LLM(y | v^1_c1, ..., v^M_cM).

    likelihood: Eq. (4); books: M tensors (K_m, d) in the space of theta; weights: M tensors log pi^m (K_m,).
    Up to COMBINATIONS combinations are enumerated; beyond, one profile is updated at a time with the others at their best code.
    """

    def __init__(self, likelihood, books, weights, histories):
        self.likelihood, self.books, self.weights, self.histories = likelihood, books, weights, histories
        self.sizes = [len(book) for book in books]
        self.all = torch.tensor(list(itertools.product(*map(range, self.sizes)))) if math.prod(self.sizes) <= COMBINATIONS else None

    def theta(self, codes):
        """(B, M) codes -> (B, M, d)."""
        return torch.stack([book[codes[:, m]] for m, book in enumerate(self.books)], dim=1)

    @torch.no_grad()
    def log_joint(self, users, candidates):
        """log pi_c + log P(y_u | c) for candidates (B, C, M): float (B, C), a forward pass for each of the C columns."""
        ids, lengths = infer.pad(self.histories, users, self.likelihood.device)
        columns = []
        for codes in candidates.to(ids.device).unbind(1):
            prior = sum(weight[codes[:, m]] for m, weight in enumerate(self.weights))
            columns.append(prior - self.likelihood(self.theta(codes), ids, lengths))
        return torch.stack(columns, dim=1)

    def responsibilities(self, users, codes):
        """E-step: (candidates (B, C, M), responsibilities (B, C), log-likelihood (B,), best codes (B, M)).

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


def first_codebooks(theta, sizes, start, seed):
    """A codebook (K, d) for each profile: k-means++ with restarts over all given theta (n, M, d), or U(-1/K, 1/K) noise."""
    codebooks = []
    for m, size in enumerate(sizes):
        distinct = len(np.unique(theta[:, m], axis=0))
        if size > distinct:
            raise UserError(f"{size} codes for {distinct} distinct theta", "--codes", f"choose at most {distinct} for profile {m + 1}")
        if start == "kmeans":
            codebooks.append(KMeans(size, n_init=10, random_state=seed).fit(theta[:, m]).cluster_centers_)
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
    """Eq. (7) for a minibatch: (loss, {part: mean a user}). theta (B, M, d) in the units of --lr; llm: None or theta -> (B,)."""
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
        loss = loss + parts["llm"]  # Eq. (7)
    return loss, {name: float(part.detach()) for name, part in parts.items()}


def train_jointly(theta, quantizers, surrogate, rows, offsets, users, llm, args, rng):
    """Algorithm 1: minibatches of users update theta (their rows only), codebooks and surrogate. Returns the log, one entry an epoch.

    theta: nn.Embedding (U, M * d) with sparse gradients, so that an absent user's row and optimiser state stay as they are.
    """
    shape = (-1, len(quantizers), theta.weight.shape[1] // len(quantizers))
    optimizers = [torch.optim.SparseAdam([theta.weight], lr=args.lr), torch.optim.AdamW(quantizers.parameters(), lr=args.lr, weight_decay=0.0),
                  torch.optim.AdamW(surrogate.parameters(), lr=1e-3, weight_decay=0.0)]
    log, before = [], assign_all(theta.weight.detach().view(shape), quantizers)
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
        codes = assign_all(theta.weight.detach().view(shape), quantizers)
        log.append({"epoch": epoch, **sums, "ids_changed": int((codes != before)[users].any(1).sum())})
        before = codes
        tqdm.write(f"epoch {epoch}: " + " ".join(f"{name} {value:.4g}" for name, value in log[-1].items() if name != "epoch"))
    return log


@torch.no_grad()
def assign_all(theta, quantizers):
    """Eq. (6) over all users: theta (U, M, d) -> int (U, M)."""
    return torch.stack([quantizer.assign(theta[:, m]) for m, quantizer in enumerate(quantizers)], dim=1).cpu().numpy()


def quantize_likelihood(dataset, theta, known, sizes, facts, args, device):
    """EM (--assign likelihood). Returns (codes (U, M), codebooks, weights, log); the codebooks start as quantize_nearest's do.

    A round is an E-step over all users and an M-step: the weights in closed form, the codes by AdamW on -log P(y | c) with c drawn
    from the responsibilities, an unbiased gradient of the expected log-likelihood. Of all rounds the likeliest codebooks are kept.
    """
    seeded(args.seed, 7)
    likelihood, histories, _, spread = open_likelihood(dataset, facts, args, device)
    books = first_codebooks(theta[known], sizes, args.start, args.seed)
    # Note: a code is moved in units of the slot's spread, like theta in stage 02.
    shifts = [torch.zeros_like(book, device=device).requires_grad_() for book in books]
    bases = [book.to(device) for book in books]
    mixture = CodeMixture(likelihood, bases, [torch.full((size,), -math.log(size), device=device) for size in sizes], histories)
    optimizer = torch.optim.AdamW(shifts, lr=args.lr, weight_decay=0.0)
    blocks = infer.make_blocks(histories, args.batch_users, infer.token_budget_of(likelihood), likelihood.prompt_length)
    codes = torch.tensor(assign_all(torch.tensor(theta), [VectorQuantizer(book) for book in books]))
    log, best = [], None
    for round_ in range(args.epochs + 1):
        drawn, total, before, usage = {}, 0.0, codes.clone(), [torch.zeros(size) for size in sizes]
        for block in tqdm(blocks, desc=f"E-step {round_}", unit="block", leave=False):
            candidates, share, evidence, codes[block] = mixture.responsibilities(block, codes[block])
            drawn[tuple(block)] = candidates[torch.arange(len(block)), torch.multinomial(share, 1).squeeze(1)]
            total += float(evidence.double().sum())
            for m, size in enumerate(sizes):
                usage[m] += torch.zeros(size).index_add(0, candidates[:, :, m].flatten(), share.flatten())
        users = sum(map(len, blocks))
        log.append({"epoch": round_, "log_likelihood": total / users, "ids_changed": int((codes != before).any(1).sum())})
        tqdm.write(f"round {round_}: log-likelihood a user {log[-1]['log_likelihood']:.4f}, ids changed {log[-1]['ids_changed']}")
        if best is None or log[-1]["log_likelihood"] > best[0]:
            best = (log[-1]["log_likelihood"], codes.clone(), [book.detach().clone() for book in mixture.books], mixture.weights)
        if round_ == args.epochs:
            break
        mixture.weights = [((count + 1) / (count + 1).sum()).log().to(device) for count in usage]
        for index in tqdm(np.random.default_rng((args.seed, round_)).permutation(len(blocks)), desc="M-step", unit="block", leave=False):
            block = blocks[index]
            mixture.books = [base + unit * shift for base, unit, shift in zip(bases, spread, shifts)]
            ids, lengths = infer.pad(histories, block, device)
            loss = likelihood(mixture.theta(drawn[tuple(block)].to(device)), ids, lengths).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        mixture.books = [(base + unit * shift).detach() for base, unit, shift in zip(bases, spread, shifts)]
    _, codes, books, weights = best
    return codes.numpy(), [book.cpu() for book in books], [weight.cpu() for weight in weights], log


def quantize_nearest(dataset, theta, known, sizes, facts, args, device):
    """The paper's way, Algorithm 1. Returns (codes (U, M), codebooks in the space of theta, None, log)."""
    rng = seeded(args.seed, 6)
    users = np.flatnonzero(known)
    likelihood = None
    if args.llm_loss and args.epochs:
        likelihood, histories, start, spread = open_likelihood(dataset, facts, args, device)
        budget = infer.token_budget_of(likelihood)
    # Note: theta is centred and divided by the spread of the LLM's own slot words, one number a profile: lr, alpha and beta then
    # mean the same for every LLM. DEVIATION(5). --paper works on theta as it is.
    centre = torch.zeros(theta.shape[1:]) if args.paper else torch.tensor(theta[known].mean(0))
    unit = torch.ones(theta.shape[1]) if args.paper else torch.tensor(facts["spread"])
    z = (torch.tensor(theta) - centre) / unit[:, None]
    codebooks = first_codebooks(z[known].numpy(), sizes, args.start, args.seed)
    quantizers = nn.ModuleList(VectorQuantizer(codebook) for codebook in codebooks).to(device)
    table = nn.Embedding(len(z), z[0].numel(), sparse=True, _weight=z.flatten(1).clone()).to(device)
    surrogate = Surrogate(len(dataset.users), len(dataset.items), theta.shape[1], theta.shape[2]).to(device)
    rows, offsets = rows_by_user(dataset.rows(TRAIN), len(dataset.users))
    trainable = {"theta": table.weight.numel(), "codebooks": parameter_counts(quantizers)[0], "surrogate": parameter_counts(surrogate)[0]}
    print("parameters: trainable " + ", ".join(f"{name} {count:,d}" for name, count in trainable.items())
          + f"; frozen LLM {0 if likelihood is None else parameter_counts(likelihood.model)[1]:,d}")

    def llm(batch_z, batch):
        """l_llm of stage 02, prior included, at the current theta."""
        batch_theta = centre.to(device) + unit.to(device)[:, None] * batch_z
        prior = ((batch_theta - start) / spread[:, None]).pow(2).sum((1, 2))
        # A block of tokens at a time: its gradient is taken at once and its graph freed, then handed on to the joint loss.
        leaf, nll = batch_theta.detach().requires_grad_(), torch.zeros(len(batch), device=device)
        for rows in infer.make_blocks([histories[user] for user in batch], None, budget, likelihood.prompt_length):
            nll[rows] = likelihood(leaf[rows], *infer.pad([histories[batch[row]] for row in rows], range(len(rows)), device))
            nll.sum().backward()
            nll = nll.detach()
        return nll + (leaf.grad * (batch_theta - batch_theta.detach())).sum((1, 2)) + facts["prior"] / 2 * prior

    if args.epochs:
        with torch.no_grad():
            quantized = torch.stack([quantizer(z[:, m].to(device))[0] for m, quantizer in enumerate(quantizers)], dim=1)
        warm_up(surrogate, rows, quantized, args.warm_up, device, rng)
    log = train_jointly(table, quantizers, surrogate, torch.from_numpy(rows.astype(np.int64)).to(device), offsets, users,
                        llm if likelihood is not None else None, args, rng)
    codes = assign_all(table.weight.detach().view(z.shape), quantizers)
    books = [centre[m] + unit[m] * quantizer.codebook.detach().cpu() for m, quantizer in enumerate(quantizers)]
    return codes, books, None, log


# ---------------------------------------------------------------- evaluate

def health(codes, sizes, names):
    """Per profile over all known users: active codes, perplexity exp(entropy), largest share, counts."""
    report = []
    for m, size in enumerate(sizes):
        counts = np.bincount(codes[:, m], minlength=size)
        share = counts / counts.sum()
        entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
        report.append({"name": names[m], "active": int((counts > 0).sum()), "perplexity": float(np.exp(entropy)),
                       "max_share": float(share.max()), "counts": counts.tolist()})
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
              f"largest share {profile['max_share']:.2f}")
        for code, count in enumerate(profile["counts"]):
            print(f"    {code:3d} {count:7,d} {'#' * round(50 * count / max(profile['counts']))}")
        if profile["perplexity"] < 1.5 or profile["max_share"] > 0.9:
            print(f"    WARNING: the codebook of {profile['name']} has collapsed; try --start kmeans, fewer --epochs or a smaller --lr")
    if agreed:
        print("with the planted truth: adjusted MI " + " ".join(f"{value:.3f}" for value in agreed["ami_truth"]) + ", NMI "
              + " ".join(f"{value:.3f}" for value in agreed["nmi_truth"])
              + "; NMI across profiles " + " ".join(f"{value:.4f}" for value in agreed["nmi_across"]))


# ---------------------------------------------------------------- save

def save(run, dataset, codes, books, weights, sizes, known, facts):
    """Write bank, codebooks and facts; users without a history, like users unseen, get the unknown code K_m."""
    bank = np.where(known[:, None], codes, np.array(sizes)).astype(np.int16)
    (run / "quantize.json").unlink(missing_ok=True)
    names = [profile["name"] for profile in dataset.profiles]
    save_torch(run / "codebooks.pt", {"codebooks": books, "log_weights": weights, "assign": facts["assign"], "profiles": names})
    save_npy(run / "feature_bank.npy", bank)
    with atomic(run / "feature_bank.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", *names])
        writer.writerows([user, *row] for user, row in zip(dataset.users, bank.tolist()))
    save_json(run / "quantize.json", {**facts, "fingerprint": fingerprint(bank)})


# ---------------------------------------------------------------- main

def main():
    args = parse_arguments()
    device = pick_device(args.device)
    dataset, theta, known, facts, truth = read_inputs(args)
    sizes = parse_codes(args.codes, dataset.profiles)
    announce("03 quantize", args, f"dataset.json interactions.npy users.json items.json profiles.npy profiles.json in {args.run}")
    with one_run_at_a_time(args.run):
        quantize = {"nearest": quantize_nearest, "likelihood": quantize_likelihood}[args.assign]
        codes, books, weights, log = quantize(dataset, theta, known, sizes, facts, args, device)
        names = [profile["name"] for profile in dataset.profiles]
        report = health(codes[known], sizes, names)
        agreed = None if truth is None else agreement(codes[known], truth[known])
        settings = {key: value for key, value in vars(args).items() if key not in ("run", "device", "codes")}
        save(args.run, dataset, codes, books, weights, sizes, known, {**settings, "codes": sizes, "profiles": report, "loss": log, **(agreed or {}),
             "dataset_fingerprint": dataset.fingerprint(), "profiles_fingerprint": facts["fingerprint"], "added_users": facts.get("added_users")})
    show(report, agreed)
    print(f"\nwrote codebooks.pt feature_bank.npy feature_bank.csv quantize.json to {args.run}\nnext: python 04_train_ctr.py --run {args.run}")


if __name__ == "__main__":
    guarded(main)
