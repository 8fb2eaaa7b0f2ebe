"""Explain users of a finished run (RQ4): the words near a profile, who shares its code, what the LLM now expects of the user.

    python docs/explain.py --run runs/demo --user u0000 u0001     # a card for each: history, words, codes, similar users, continuation
    python docs/explain.py --run runs/demo --all                  # over all users: how well own theta explains, how often a word is right
"""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
common, prepare, infer, quantize = (importlib.import_module(name) for name in ("common", "01_prepare_data", "02_infer_profiles", "03_quantize"))

SAMPLE = 500  # users of --all whose histories are scored under another user's theta


class Lexicon:
    """What theta is compared with [Table 5]: the LLM's whole words and the words of the items' attributes that it writes in several pieces,
    joined (their mean), before the pieces. A stop word is marked with *, a piece with a - in front.

    labels: list of n strings; vectors: (n, d), unit length; whole: bool (n,), false for the pieces.
    """

    def __init__(self, likelihood, tokenizer, dataset):
        table = likelihood.words.weight.detach().float().cpu()
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        texts = [tokenizer.decode([index]).strip() for index in range(len(tokens))]
        begins = [token is not None and token[0] in "\u0120\u2581" and text.isalpha() for token, text in zip(tokens, texts)]
        whole = [index for index, begin in enumerate(begins) if begin]
        parts = [index for index, begin in enumerate(begins) if not begin and texts[index].isalpha() and index not in tokenizer.all_special_ids]
        known = {texts[index] for index in whole}
        said = sorted({word for item in dataset.items for values in item["attributes"].values() for value in values
                       for word in value.split() if word.isalpha()} - known)
        joined = [table[ids].mean(0) for ids in infer.pieces(tokenizer, [f" {word}" for word in said])] if said else []
        self.labels = [self.mark(texts[index]) for index in whole] + [self.mark(word) for word in said] + [f"-{texts[index]}" for index in parts]
        self.vectors = torch.nn.functional.normalize(torch.stack([*table[whole], *joined, *table[parts]]), dim=1)
        self.whole = torch.arange(len(self.labels)) < len(whole) + len(said)

    @staticmethod
    def mark(word):
        return word + "*" * (word.lower() in ENGLISH_STOP_WORDS)

    def nearest(self, vectors, count=4):
        """The `count` labels of the largest cosine for each row of vectors (n, d), whole words before pieces: n lists."""
        cosine = torch.nn.functional.normalize(torch.as_tensor(vectors).float(), dim=1) @ self.vectors.T
        order = (cosine - 4 * ~self.whole).topk(min(count, len(self.labels)), dim=1).indices  # Note: a cosine is at most 1, so a piece comes last
        return [[self.labels[index] for index in row] for row in order.tolist()]


def similar_users(theta, population, known, user, count):
    """[(cosine, user)] of the users whose theta, all profiles together and centred on the population (M, d), point the same way."""
    centred = (theta - population).reshape(len(theta), -1)
    cosine = centred @ centred[user] / np.maximum(np.linalg.norm(centred, axis=1) * np.linalg.norm(centred[user]), 1e-12)
    cosine[~known] = -np.inf
    cosine[user] = -np.inf
    return [(float(cosine[other]), int(other)) for other in np.argsort(-cosine, kind="stable")[:count]]


@torch.no_grad()
def continue_greedily(likelihood, theta, tokens):
    """Ids of the `tokens` likeliest next tokens after the prompt under one user's theta (M, d), each put in before the next is asked for.

    The keys and values of what went before are cached: a step sends one token through the LLM. Its mask row is all 0, for the history sees
    everything; its position follows the last one, which is not the number of tokens so far (build_positions).
    """
    theta = torch.as_tensor(theta)[None].to(likelihood.device)
    mask, positions = likelihood.layout(0)
    embedded, cache, ids = likelihood.embeddings(theta, torch.empty(1, 0, dtype=torch.long, device=likelihood.device)), None, []
    for _ in range(tokens):
        output = likelihood.body(inputs_embeds=embedded, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        ids.append(int(likelihood.head(output.last_hidden_state[0, -1]).argmax()))
        embedded = likelihood.words(torch.tensor([ids[-1:]], device=likelihood.device))
        positions = positions[:, -1:] + 1
        mask = torch.zeros(1, 1, 1, likelihood.prompt_length + len(ids), dtype=likelihood.dtype, device=likelihood.device)
    return ids


class Explainer:
    """A finished run opened for questions: problem (03), bank (U, M), books, the likelihood of Eq. (4), histories, lexicon, population theta."""

    def __init__(self, run, device):
        self.problem, self.truth = quantize.read_problem(run)
        made_from = common.load(run, "quantize.json", ("profiles_fingerprint",))["profiles_fingerprint"]
        common.check_same(run, "feature_bank.npy", "profiles.json", made_from, self.problem.facts["fingerprint"], "03_quantize.py")
        self.bank, self.books = np.array(common.load(run, "feature_bank.npy")), common.load(run, "codebooks.pt", ("codebooks",))["codebooks"]
        self.likelihood, self.histories, _, _, self.tokenizer = self.problem.open_likelihood(device)
        self.texts = infer.history_texts(self.problem.dataset, common.TRAIN, SimpleNamespace(**self.problem.facts))
        self.lexicon = Lexicon(self.likelihood, self.tokenizer, self.problem.dataset)
        self.population = self.problem.theta[self.problem.known].mean(axis=0)

    def nll(self, user, theta):
        """Nats per token of one user's training history under theta (M, d)."""
        return infer.mean_nll(self.likelihood, lambda block: theta[None], self.histories, [user], 4096)

    def card(self, user):
        """The lines that describe one user."""
        dataset, theta, known, lexicon = self.problem.dataset, self.problem.theta, self.problem.known, self.lexicon
        lines = [f"user {dataset.users[user]}", "  history:" + ("".join(self.texts[user]) or " none, so theta is the population's")]
        for m, profile in enumerate(dataset.profiles):
            code = int(self.bank[user, m])
            lines.append(f"  {profile['name']}:")
            lines.append("    words near theta    " + " | ".join(lexicon.nearest(theta[None, user, m])[0]))
            if code == len(self.books[m]):
                lines.append("    code                unknown")
                continue
            sharing = int((self.bank[:, m] == code).sum())
            lines.append(f"    code {code}              shared by {sharing:,d} of {len(self.bank):,d} users ({sharing / len(self.bank):.0%})")
            lines.append("    words near the code " + " | ".join(lexicon.nearest(self.books[m][None, code])[0]))
            lean = self.books[m][None, code].numpy() - self.population[m]  # what sets this code apart from the average user
            lines.append("    the code leans to   " + " | ".join(lexicon.nearest(lean)[0]))
        if not known[user]:
            return [*lines, "  most similar users: none, nothing is known of this one"]
        lines.append("  most similar users:")
        for cosine, other in similar_users(theta, self.population, known, user, 3):
            codes = " ".join(map(str, self.bank[other]))
            lines.append(f"    {dataset.users[other]} (cosine {cosine:.2f}, codes {codes}):{''.join(self.texts[other][-4:])}")
        continuation = self.tokenizer.decode(continue_greedily(self.likelihood, theta[user], min(40, infer.room_for_history(self.likelihood))))
        lines += ["  what the LLM says next, greedily:", "    under theta:     " + continuation.replace("\n", "\\n")]
        # The first user who shares the fewest codes; himself where nobody else is known.
        stranger = max(np.flatnonzero(known), key=lambda other: ((self.bank[other] != self.bank[user]).sum(), -other))
        lines.append("  nats per token of this history: " + ", ".join(f"under {name} {self.nll(user, under):.4f}" for name, under in (
            ("own theta", theta[user]), ("the population's", self.population), (f"{dataset.users[stranger]}'s", theta[stranger]))))
        return lines

    def statistics(self, rng):
        """Figures over all users whose profile was inferred: {name: value}. The word figures need the planted truth."""
        theta, known, found = self.problem.theta, np.flatnonzero(self.problem.known), {}
        sample = rng.permutation(known)[:SAMPLE]
        own, other = (np.array([self.nll(user, theta[whose]) for user, whose in zip(sample, whom)]) for whom in (sample, np.roll(sample, 1)))
        found["nats per token"] = {"users": len(sample), "under own theta": float(own.mean()), "under another user's": float(other.mean()),
                                   "share of users for whom the other's is worse": float((other > own).mean())}
        if self.truth is None:
            return found
        for m, (profile, planted) in enumerate(zip(self.problem.dataset.profiles, (prepare.DEMO_HOBBIES, prepare.DEMO_BACKGROUNDS))):
            near = [[label.rstrip("*") for label in labels] for labels in self.lexicon.nearest(theta[known, m], 3)]
            words = np.array(list(planted))[self.truth[known, m]]
            found[profile["name"]] = {
                f"planted word {place}{chance}": float(np.mean([word in labels[:top] for word, labels in zip(whose, near)]))
                for top, place in ((1, "nearest"), (3, "among the nearest three"))
                for whose, chance in ((words, ""), (rng.permutation(words), " by chance"))}  # chance: the same words on other users
        return found


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("--user", nargs="+", default=[], help="raw user ids, a card for each")
    parser.add_argument("--all", action="store_true", help="figures over all users")
    args = parser.parse_args()
    if not args.user and not args.all:
        parser.error("say whom to explain: --user ID ... or --all")
    explainer = Explainer(args.run, common.pick_device(args.device))
    index = {str(raw): user for user, raw in enumerate(explainer.problem.dataset.users)}
    strangers = [raw for raw in args.user if raw not in index]
    if strangers:
        raise common.UserError(f"no user has the id {strangers[0]}", "--user", f"take one of feature_bank.csv, for example {next(iter(index))}")
    for raw in args.user:
        print("\n".join(explainer.card(index[raw])), end="\n\n")
    for name, values in explainer.statistics(common.seeded(args.seed, 8)).items() if args.all else ():
        print(f"{name}: " + ", ".join(f"{key} {value if isinstance(value, int) else f'{value:.3f}'}" for key, value in values.items()))


if __name__ == "__main__":
    common.guarded(main)
