"""The controls a reviewer asks for: ids made without descending for a user, as banks for stage 04's table.

    python tools/controls.py --run runs/demo                         # all of them
    python tools/controls.py --run runs/demo metadata generosity     # these
    python 04_train_ctr.py --run runs/demo --ids none,random,metadata,userip

metadata    no LLM: k-means, K_m a profile, over the shares of the liked items' true attribute values
text        no inference: k-means of the history's mean word vector, twice: a column of K_1 x ... x K_M
            clusters, as many as userip tells apart, and one of K_1
hidden      an encoder: the same with the mean of the LLM's last hidden states over the history
words       no descent: the profile's K_m most frequent words, asked (03 --quantizer words); and what they
            predict of validation titles
template    nothing learned: words, asked with the prompt's own text in the place of the learned task prompt
generosity  one number: eight quantiles of the share of likes
mf          no text: k-means of a truncated SVD of the centred labels; K_1 x ... x K_M clusters

All read training and support rows alone. A user of whom these say nothing (no history; for metadata no liked
item with a value; for generosity and mf no row) gets the unknown code K. hidden and words stand behind stage
02's learned task prompt.
Reads:  stage 01's files, truth.npy for evaluation alone; quantize.json (03), where it is, for the numbers of
        codes; text, hidden, words and template what 03 reads, for they look at the LLM of stage 02
Writes: feature_bank_NAME.npy int16 (U, M'), feature_bank_NAME.json {codes, dataset_fingerprint, made_by; of
        words heldout_nll and heldout_error, of the differences to own}
"""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import sklearn.cluster
import sklearn.decomposition
import torch
from scipy.sparse import csr_matrix
from stages import common, infer, quantize

LEVELS = 8  # codes of generosity
FACTORS = 16  # of the truncated SVD


def clusters(vectors, known, size, seed):
    """k-means over the rows of known users: int (U,), the code `size` for all others."""
    if size > 32766:  # int16; clusters of a pair of profiles have as many codes as their product
        raise common.UserError(f"{size:,d} codes are too many", "--codes",
                               "give smaller ones to 03, or to tools/controls.py")
    codes = np.full(len(known), size)
    size_found = min(size, len(np.unique(vectors[known], axis=0)))
    found = sklearn.cluster.KMeans(size_found, n_init=10, random_state=seed)
    codes[known] = found.fit_predict(vectors[known])
    return codes


def metadata(problem, sizes, device, seed):
    """Shares of each attribute value among the liked items, a profile at a time; unknown if there is none."""
    if not any(any(item["attributes"].values()) for item in problem.dataset.items):
        raise common.UserError("no item has a value for any profile", "items.json", "leave metadata out")
    columns = []
    for profile, size in zip(problem.dataset.profiles, sizes):
        counts = [Counter() for _ in problem.dataset.users]
        for user, item, label in problem.dataset.rows(common.SEEN).tolist():
            if label:
                counts[user].update(problem.dataset.items[item]["attributes"].get(profile["name"], []))
        values = sorted(set().union(*counts))
        shares = np.zeros((len(counts), len(values)))
        for column, value in enumerate(values):
            shares[:, column] = [count[value] for count in counts]
        known = shares.sum(1) > 0
        shares /= np.maximum(shares.sum(1, keepdims=True), 1)
        columns.append((clusters(shares, known, size, seed) if values else np.full(len(counts), size), size))
    return columns


def text_clusters(vectors, sizes, seed):
    """vectors (U, d), NaN where a user has no history: columns of K_1 x ... x K_M and of K_1 clusters."""
    known = np.isfinite(vectors).all(1)
    wanted = dict.fromkeys((math.prod(sizes), sizes[0]))  # of a single profile these are one number
    return [(clusters(vectors, known, size, seed), size) for size in wanted]


def text(problem, sizes, device, seed):
    """The mean of the word vectors of a history."""
    likelihood, histories, _, _ = problem.open_likelihood(device)
    words = likelihood.vectors().cpu().numpy()
    vectors = [words[ids].mean(0) if len(ids) else words[0] * np.nan for ids in histories]
    return text_clusters(np.array(vectors), sizes, seed)


@torch.no_grad()
def hidden(problem, sizes, device, seed):
    """The mean of the last hidden states over a history, behind one prompt for everybody."""
    likelihood, histories, space, _ = problem.open_likelihood(device)
    start = space.origin
    vectors = np.full((len(histories), start.shape[1]), np.nan)
    prompt = likelihood.prompt_length
    budget = infer.token_budget_of(likelihood)
    for users in infer.make_blocks(histories, None, budget, prompt):
        ids, lengths = infer.pad(histories, users, device)
        states = likelihood.hidden(start.expand(len(users), -1, -1), ids)[:, prompt:].float()
        real = (torch.arange(ids.shape[1], device=device) < lengths[:, None])[..., None]
        vectors[users] = ((states * real).sum(1) / lengths[:, None]).cpu().numpy()
        if not np.isfinite(vectors[users]).all():
            raise common.UserError("a hidden state is not finite", str(likelihood.dtype),
                                   "run 02 with --dtype bf16 or fp32, or leave hidden out")
    return text_clusters(vectors, sizes, seed)


def words(problem, sizes, device, seed, quantizer=quantize.Words):
    """03 --quantizer words."""
    codes, _ = quantizer(problem, sizes, SimpleNamespace(seed=seed), device).fit()
    bank = quantize.bank_of(codes, problem.inferred, sizes)
    return [(bank[:, m], size) for m, size in enumerate(sizes)]


class WordsOfTemplate(quantize.Words):
    """Words behind the text of D_task."""

    def open(self):
        super().open()
        tuned = self.likelihood  # behind the task prompt that stage 02 learned
        # A new one begins with the text.
        self.likelihood = infer.ProfileLikelihood(tuned.model, tuned.segments, tuned.mask, tuned.chunk)
        if torch.equal(tuned.task, self.likelihood.task):
            raise common.UserError("the task prompt is its text still", "space.pt",
                                   "leave template out: words is the same")


def template(problem, sizes, device, seed):
    """What asking tells before anything is learned."""
    return words(problem, sizes, device, seed, WordsOfTemplate)


def generosity(problem, sizes, device, seed):
    """Quantiles of (likes + 1) / (rows + 2): a user of one row is not yet at an end of the scale."""
    rows = problem.dataset.rows(common.SEEN)
    users = len(problem.dataset.users)
    seen = np.bincount(rows[:, 0], minlength=users)
    liked = np.bincount(rows[:, 0], rows[:, 2], minlength=users)
    share = (liked + 1) / (seen + 2)
    level = np.searchsorted(np.quantile(share[seen > 0], np.arange(1, LEVELS) / LEVELS), share, side="right")
    return [(np.where(seen > 0, level, LEVELS), LEVELS)]


def mf(problem, sizes, device, seed):
    """Truncated SVD of (label - mean label) over the seen rows, 0 elsewhere: U S of each user."""
    rows = problem.dataset.rows(common.SEEN)
    shape = (len(problem.dataset.users), len(problem.dataset.items))
    if min(shape) < 2:
        raise common.UserError("there is nothing to factorize for mf",
                               f"{shape[0]} users, {shape[1]} items", "leave it out")
    matrix = csr_matrix((rows[:, 2] - rows[:, 2].mean(), (rows[:, 0], rows[:, 1])), shape=shape)
    svd = sklearn.decomposition.TruncatedSVD(min(FACTORS, min(shape) - 1), random_state=seed)
    known = np.bincount(rows[:, 0], minlength=shape[0]) > 0
    size = math.prod(sizes)
    return [(clusters(svd.fit_transform(matrix), known, size, seed), size)]


SHARES = (0.25, 0.5, 1.0)  # of the way to the word: a whole word may be too much


def nll_of_words(problem, columns, device):
    """What asking predicts: (nats per token of validation titles, standard errors of the difference to own).

    own: under the user's theta of the descent, as stage 02 says; and for each of SHARES under a theta so far
    on the way from the mean user's to the word that a user got by asking. The word stands there itself, also
    where it lies outside the space.
    """
    likelihood, _, space, tokenizer = problem.open_likelihood(device)
    texts = infer.history_texts(problem.dataset, common.VALIDATION, SimpleNamespace(**problem.facts))
    histories = infer.tokenize_histories(tokenizer, texts, likelihood.room)
    mean = problem.space.origin.numpy()  # Shape: (M, d)
    asked = np.zeros((len(texts), *mean.shape), np.float32)
    for m, (codes, size) in enumerate(columns):
        known = codes < size
        asked[known, m] = problem.space.vectors[m].numpy()[codes[known]] - mean[m]
    variants = {"own": problem.theta()}
    for share in SHARES:
        variants[f"{share:g}"] = mean + share * asked
    theta_itself = SimpleNamespace(theta=lambda theta: theta)
    means, errors, _ = infer.nll_per_token(
        likelihood, theta_itself, lambda block: {name: theta[block] for name, theta in variants.items()},
        infer.only(histories, np.flatnonzero(problem.inferred)))
    return means, errors


def said_of_words(card):
    """What nll_of_words() found, in words. card: heldout_nll and heldout_error."""
    texts = [f"own {card['heldout_nll']['own']:.4f}"]
    for share, nll in card["heldout_nll"].items():
        if share != "own":
            error = card["heldout_error"].get(share)
            texts.append(f"{share} of the way to the word {nll:.4f}" + (f" ± {error:.4f}" if error else ""))
    return ", ".join(texts)


CONTROLS = {control.__name__: control
            for control in (metadata, text, hidden, words, template, generosity, mf)}
WITHOUT_LLM = ("metadata", "generosity", "mf")  # these need stage 01 alone


def open_run(run, names):
    """(Problem, truth or None). Without stage 02, or where no LLM is needed, the data set is the problem."""
    common.finish(run)  # of a stage 02 that was killed at its end
    alone = bool(names) and set(names) <= set(WITHOUT_LLM)
    if alone or (not names and not (run / "profiles.json").exists()):
        return SimpleNamespace(dataset=common.load_dataset(run), z=None), common.load_truth(run)
    return quantize.read_problem(run)


def save_bank(run, name, columns, dataset, made_by, **more):
    """Write feature_bank_NAME.npy and .json of M' pairs (codes (U,), size). Returns the bank (U, M').

    more: what else the .json is to hold.
    """
    bank = np.stack([codes for codes, _ in columns], axis=1).astype(np.int16)
    (run / f"feature_bank_{name}.json").unlink(missing_ok=True)
    common.save_npy(run / f"feature_bank_{name}.npy", bank)
    common.save_json(run / f"feature_bank_{name}.json", {
        "codes": [int(size) for _, size in columns], "dataset_fingerprint": dataset.fingerprint(),
        "made_by": made_by, **more})
    used = " / ".join(f"{quantize.perplexity(bank[:, m], size + 1):.2f}"
                      for m, (_, size) in enumerate(columns))
    print(f"feature_bank_{name}.npy: codes {[size for _, size in columns]}, perplexity {used}")
    return bank


def sizes_of(run, dataset, codes=None):
    """K_m of --codes, else of the run's quantize.json if it is of this data set, else of stage 01."""
    if codes is None and (run / "quantize.json").exists():
        facts = common.load(run, "quantize.json", ("codes", "dataset_fingerprint"))
        if facts["dataset_fingerprint"] == dataset.fingerprint():
            codes = ",".join(map(str, facts["codes"]))
    return quantize.parse_codes(codes, dataset.profiles)


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CONTROLS)} (default: all)")
    parser.add_argument("--codes", help="sizes K_1,K_2,... (default: feature_bank.npy's, else stage 01's)")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - CONTROLS.keys())
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; known: {', '.join(CONTROLS)}")
    problem, truth = open_run(args.run, args.names)
    device = common.pick_device(args.device)
    sizes = sizes_of(args.run, problem.dataset, args.codes)
    given = f" --codes {args.codes}" if args.codes else ""
    made = {}  # sizes of each bank
    for name in dict.fromkeys(args.names or CONTROLS):
        if problem.z is None and name not in WITHOUT_LLM:
            print(f"WARNING: {name} is left out, for stage 02 has not run: python 02_infer_profiles.py "
                  f"--run {args.run}")
            continue
        try:
            columns = CONTROLS[name](problem, sizes, device, args.seed)
            # What the LLM made is of its prompt and mask, which stage 02 may change when it runs again.
            more = {} if name in WITHOUT_LLM else {"profiles_fingerprint": problem.facts["fingerprint"]}
            # After 02 --users the theta of the first run's users may have seen what are validation rows now.
            if name == "words" and not problem.facts["rows_kept"]:
                more["heldout_nll"], more["heldout_error"] = nll_of_words(problem, columns, device)
        except common.UserError as error:
            if args.names:
                raise
            print(f"WARNING: {name} is left out: {error}")
            continue
        made[name] = [size for _, size in columns]
        bank = save_bank(args.run, name, columns, problem.dataset,
                         f"tools/controls.py {name} --seed {args.seed}{given}", **more)
        if more.get("heldout_nll"):
            print(f"    validation NLL per token: {said_of_words(more)}")
        # text and hidden have columns of another meaning
        if truth is not None and bank.shape == truth.shape and [size for _, size in columns] == sizes:
            known = (bank < sizes).all(1)
            agreed = quantize.agreement(bank[known], truth[known])["nmi_truth"]
            print("    NMI with the planted truth " + " / ".join(f"{nmi:.2f}" for nmi in agreed))
    ids = ["none"]
    if (args.run / "feature_bank.npy").exists():
        ids += ["random", "userip"]
    userip_sizes = sizes_of(args.run, problem.dataset) if "userip" in ids else None
    for name, bank_sizes in made.items():
        # A random control has as many codes as what is compared with it; `random` has as many as userip.
        ids += [name] if bank_sizes == userip_sizes else [f"random-{name}", name]
    print(f"next: python 04_train_ctr.py --run {args.run} --ids {','.join(ids)}")


if __name__ == "__main__":
    common.guarded(main)
