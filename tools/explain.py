"""Explain users of a finished run (RQ4): words near a profile, who shares its code, what the LLM now expects.

    python tools/explain.py --run runs/demo --user u0000 u0001   # a card each
    python tools/explain.py --run runs/demo --all                # all users: NLL under own, another's theta
                                                                # (of 500), how far z tells what they like,
                                                                # (demo) how often the planted word is near
    python tools/explain.py --run runs/demo --mask               # the mask of the prompt (Fig. 4) as a grid

Reads:  what 03 reads, and feature_bank.npy codebooks.pt quantize.json (03)
"""

from types import SimpleNamespace

import numpy as np
import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold, cross_val_predict
from torch.nn.functional import normalize
from stages import common, infer, prepare, quantize

SAMPLE = 500  # users of --all whose histories are scored under another user's theta
SAID = 40     # tokens of a continuation
COMMONEST = 12  # values of an attribute for which --all says how far z tells who likes them


class Lexicon:
    """What theta is compared with [Table 5]: the LLM's whole words and, joined (their mean), words of the
    items' attributes that it writes in several pieces, if they are letters alone; then its pieces. A * marks
    a stop word, a - a piece.

    labels: list of n strings; vectors: (n, d); whole: bool (n,), false for the pieces.
    """

    def __init__(self, likelihood, tokenizer, dataset):
        table = likelihood.vectors().detach().cpu()
        tokens = tokenizer.convert_ids_to_tokens(range(min(len(tokenizer), len(table))))
        texts = [tokenizer.decode([index]).strip() for index in range(len(tokens))]
        begins = [(token or "")[:1] in ("\u0120", "\u2581") and text.isalpha()
                  for token, text in zip(tokens, texts)]
        whole = [index for index, begin in enumerate(begins) if begin]
        special = set(tokenizer.all_special_ids)
        parts = [index for index, begin in enumerate(begins)
                 if not begin and texts[index].isalpha() and index not in special]
        known = {texts[index] for index in whole}
        said = set()  # words of the items' attributes
        for item in dataset.items:
            for values in item["attributes"].values():
                said.update(" ".join(values).split())
        said = sorted(word for word in said - known if word.isalpha())
        pieces = common.pieces_of(tokenizer, [f" {word}" for word in said])
        joined = [table[ids].mean(0) for ids in pieces]
        self.labels = [*(self.mark(texts[index]) for index in whole), *map(self.mark, said),
                       *(f"-{texts[index]}" for index in parts)]
        self.vectors = torch.stack([*table[whole], *joined, *table[parts]])
        self.whole = torch.arange(len(self.labels)) < len(whole) + len(said)

    @staticmethod
    def mark(word):
        return word + "*" * (word.lower() in ENGLISH_STOP_WORDS)

    def nearest(self, moves, origin, count=4):
        """Labels towards which each row of moves (n, d) leads from origin (d,), pieces last: n lists."""
        directions = normalize(self.vectors - torch.as_tensor(origin), dim=1)
        cosine = normalize(torch.as_tensor(moves).float(), dim=1) @ directions.T
        cosine = cosine - 4 * ~self.whole  # Note: a cosine is at most 1, so a piece comes last
        order = cosine.topk(min(count, len(self.labels)), dim=1).indices
        return named(order, self.labels)


def named(order, labels):
    """Indices (n, k) -> n lists of k labels."""
    found = []
    for row in order.tolist():
        found.append([labels[index] for index in row])
    return found


def similar_users(z, known, user, count):
    """[(cosine, user)]: whose z (U, M, r), 0 for the population, points the same way as this user's."""
    rows = z.reshape(len(z), -1)
    lengths = np.linalg.norm(rows, axis=1)
    cosine = rows @ rows[user] / np.maximum(lengths * lengths[user], 1e-12)
    cosine[~known] = -np.inf
    cosine[user] = -np.inf
    return [(float(cosine[other]), int(other)) for other in np.argsort(-cosine, kind="stable")[:count]
            if known[other] and other != user]


@torch.no_grad()
def continue_greedily(likelihood, theta, tokens):
    """Ids of the `tokens` likeliest next tokens after the prompt under one user's theta (M, d), one by one.

    The keys and values of what went before are cached: a step sends one token through the LLM. Its mask row
    is all 0, for the history sees everything; its position follows the last one.
    """
    device = likelihood.device
    cache = None
    ids = []
    mask, positions = likelihood.layout(0)
    nothing = torch.empty(1, 0, dtype=torch.long, device=device)
    embedded = likelihood.embeddings(torch.as_tensor(theta)[None].to(device), nothing)
    for _ in range(tokens):
        output = likelihood.body(inputs_embeds=embedded, attention_mask=mask, position_ids=positions,
                                 past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        ids.append(int(likelihood.head(output.last_hidden_state[0, -1]).argmax()))
        embedded = likelihood.word_table(torch.tensor([ids[-1:]], device=device))
        positions = positions[:, -1:] + 1
        size = likelihood.prompt_length + len(ids)
        mask = torch.zeros(1, 1, 1, size, dtype=likelihood.dtype, device=device)
    return ids


class Explainer:
    """A finished run opened for questions: problem (03), bank (U, M), books, the likelihood of Eq. (4),
    histories, space, lexicon, names (M lists of the codes' names)."""

    def __init__(self, run, device):
        self.problem, self.truth = quantize.read_problem(run)
        quantized, self.bank = quantize.read_quantized(self.problem)
        self.names = [profile["words"] for profile in quantized["profiles"]]
        self.books = common.load(run, "codebooks.pt", ("codebooks",))["codebooks"]
        self.likelihood, self.histories, space, self.tokenizer = self.problem.open_likelihood(device)
        settings = SimpleNamespace(**self.problem.facts)
        self.texts = infer.history_texts(self.problem.dataset, common.SEEN, settings)
        self.lexicon = Lexicon(self.likelihood, self.tokenizer, self.problem.dataset)
        self.space = self.problem.space
        self.theta = self.problem.theta()
        self.population = space.origin.cpu().numpy()  # the mean user, (M, d)
        # After 02 --users and a new split somebody may have a theta, and no title of a training row.
        self.has_history = np.array([len(ids) > 0 for ids in self.histories])

    def words_of(self, z, m):
        """The profile's own words for each row of z (n, r), the one towards which it lies first: n lists."""
        coordinates = normalize(self.space.word_z(m), dim=1)
        order = (torch.as_tensor(z) @ coordinates.T).argsort(dim=1, descending=True)
        return named(order, self.space.words[m])

    def moved_to(self, z, m, count=4):
        """The words of the LLM's whole vocabulary towards which each row of z (n, r) leads: n lists.

        Here and in a card's other words theta is that of the descent, before it is shrunk; what the LLM says
        next and the likelihoods are under the shrunk one.
        """
        return self.lexicon.nearest(torch.as_tensor(z) @ self.space.basis[m], self.population[m], count)

    @torch.no_grad()
    def nll(self, user, theta):
        """Nats per token of one user's training history under theta (M, d)."""
        ids, lengths = infer.pad(self.histories, [user], self.likelihood.device)
        theta = torch.as_tensor(theta, device=self.likelihood.device)[None]
        return float(self.likelihood(theta, ids, lengths)) / int(lengths)

    def profile_lines(self, user, m):
        """What is to say of a user's profile m: the words towards which theta moved, and its code."""
        code = int(self.bank[user, m])
        book = self.books[m].numpy()
        z = self.problem.z[None, user, m]
        lines = [f"  {self.problem.dataset.profiles[m]['name']}:"]
        if code == len(book):
            return [*lines, "    code                unknown: nothing was inferred of this user"]
        sharing = int((self.bank[:, m] == code).sum())
        share = f"shared by {sharing:,d} of {len(self.bank):,d} users ({sharing / len(self.bank):.0%})"
        near = self.words_of(z, m)[0][:4]
        # How far theta lies from the mean user, in units of how far the words lie from their mean.
        of_words = (self.space.vectors[m] - self.space.words_mean[m]).norm(dim=1).mean()
        distance = float((torch.as_tensor(z) @ self.space.basis[m]).norm() / of_words)
        moved = f"{near[0]}, {distance:.0%} of a word's distance; then {' | '.join(near[1:])}"
        return [*lines, f"    theta moved towards {moved}",
                "    in the vocabulary   " + " | ".join(self.moved_to(z, m)[0]),
                f"    {'code ' + str(code):19s} {self.names[m][code]}, {share}",
                "    the code leads to   " + " | ".join(self.moved_to(book[None, code], m)[0])]

    def codes(self, user):
        """All codes of a user by name."""
        return " ".join(names[code] if code < len(names) else "unknown"
                        for names, code in zip(self.names, self.bank[user].tolist()))

    def card(self, user):
        """The lines that describe one user."""
        dataset = self.problem.dataset
        theta = self.theta
        known = self.problem.inferred
        history = "".join(self.texts[user]) or " none"
        lines = [f"user {dataset.users[user]}", "  history:" + history]
        for m in range(len(dataset.profiles)):
            lines += self.profile_lines(user, m)
        if not known[user]:
            return [*lines, "  most similar users: none is known, for theta is the population's"]
        lines.append("  most similar users:")
        for cosine, other in similar_users(self.problem.z, known, user, 3):
            lines.append(f"    {dataset.users[other]} (cosine {cosine:.2f}, codes {self.codes(other)}):"
                         + "".join(self.texts[other][-4:]))
        said = continue_greedily(self.likelihood, theta[user], min(SAID, self.likelihood.room))
        said = self.tokenizer.decode(said).replace("\n", "\\n")
        lines += ["  what the LLM says next, greedily:", "    under theta:     " + said]
        if not self.has_history[user]:
            return lines
        whose = {"own theta": theta[user], "the population's": self.population}
        others = np.setdiff1d(np.flatnonzero(known), user)
        if len(others):
            different = (self.bank[others] != self.bank[user]).sum(1)  # how many codes are others
            stranger = others[different.argmax()]
            whose[f"{dataset.users[stranger]}'s"] = theta[stranger]
        scores = ", ".join(f"under {name} {self.nll(user, under):.4f}" for name, under in whose.items())
        return [*lines, "  nats per token of this history: " + scores]

    def tastes(self, m):
        """How far z tells what users like: {value of profile m: (read from z, towards the word)}.

        Both are correlations, over users who have a profile, with the value's share among their liked items:
        of a ridge regression on all z, each fifth of the users predicted from the others; and of the move of
        theta towards the value's own word, for which nothing was fitted. The liked items are those of
        training and support rows, the latest of which theta was inferred from: this says what z holds, and
        not what it predicts.
        """
        dataset = self.problem.dataset
        rows = dataset.rows(common.SEEN)
        liked = rows[rows[:, 2] == 1]
        count = np.bincount(liked[:, 0], minlength=len(dataset.users))
        known = np.flatnonzero(self.problem.inferred & (count > 0))
        z = self.problem.z[known].reshape(len(known), -1)
        words = normalize(self.space.word_z(m), dim=1).numpy()
        found = {}
        for place, value in enumerate(self.space.words[m][:COMMONEST]):
            name = dataset.profiles[m]["name"]
            has = np.array([value in item["attributes"].get(name, []) for item in dataset.items], float)
            hits = np.bincount(liked[:, 0], has[liked[:, 1]], minlength=len(dataset.users))
            share = hits[known] / count[known]
            if np.ptp(share) == 0 or len(known) < 10:
                continue
            folds = KFold(5, shuffle=True, random_state=0)
            read = cross_val_predict(RidgeCV(np.logspace(-2, 4, 13)), z, share, cv=folds)
            towards = self.problem.z[known, m] @ words[place]
            found[value] = tuple(float(np.corrcoef(guess, share)[0, 1]) for guess in (read, towards))
        return found

    def statistics(self, rng):
        """Figures over users who have a profile: {name: {what: value}}. Those of words need a truth.

        Likelihoods are of a sample of SAMPLE users.
        """
        theta = self.theta
        known = np.flatnonzero(self.problem.inferred)
        found = {}
        sample = rng.permutation(known[self.has_history[known]])[:SAMPLE]
        own = np.array([self.nll(user, theta[user]) for user in sample])
        what = "nats per token of the histories that theta was fitted to"
        found[what] = {"users": len(sample)}
        if len(sample):  # after 02 --users on another split there may be nobody
            found[what] |= {"under own theta": float(own.mean())}
        if len(sample) > 1:
            pairs = zip(sample, np.roll(sample, 1))
            other = np.array([self.nll(user, theta[stranger]) for user, stranger in pairs])
            found[what] |= {
                "under another user's": float(other.mean()),
                "share of users for whom the other's is worse": float((other > own).mean())}
        if self.truth is None:
            return found
        planted = (prepare.DEMO_HOBBIES, prepare.DEMO_BACKGROUNDS)
        for m, values in enumerate(planted):
            near = self.words_of(self.problem.z[known, m], m)
            words = np.array(list(values))[self.truth[known, m]]
            chance = rng.permutation(words)  # the same words on other users
            figures = {}
            for place, count in (("nearest", 1), ("among the nearest two", 2)):
                for kind, whose in (("", words), (" by chance", chance)):
                    hits = [word in labels[:count] for word, labels in zip(whose, near)]
                    figures[f"planted word {place}{kind}"] = float(np.mean(hits))
            found[self.problem.dataset.profiles[m]["name"]] = figures
        return found


def mask_grid(likelihood, tokenizer, history):
    """Lines of the mask over the prompt and these history tokens: row i attends to the columns marked #."""
    segments = likelihood.segments + [infer.Segment("history", list(history))]
    visible = infer.build_visibility(segments, likelihood.mask)
    labels = []
    for segment in segments:
        if segment.kind == "theta":
            labels.append(f"<theta^{segment.profile + 1}>")
        else:
            labels += [repr(tokenizer.decode([token]))[1:-1] for token in segment.ids]
    width = max(map(len, labels))
    lines = []
    for label, cells in zip(labels, visible.tolist()):
        lines.append(f"{label:>{width}s} |" + "".join(" #" if cell else " ." for cell in cells))
    return lines


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("--user", nargs="+", action="extend", default=[],
                        help="raw user ids, a card for each (--user=ID where one begins with -)")
    parser.add_argument("--all", action="store_true", help="figures over all users")
    parser.add_argument("--mask", action="store_true", help="the mask of a user's prompt")
    args = parser.parse_args()
    if not (args.user or args.all or args.mask):
        parser.error("say what to explain: --user ID ..., --all or --mask")
    explainer = Explainer(args.run, common.pick_device(args.device))
    index = {str(raw): user for user, raw in enumerate(explainer.problem.dataset.users)}
    strangers = [raw for raw in args.user if raw not in index]
    if strangers:
        raise common.UserError(f"no user has the id {strangers[0]}", "--user",
                               f"take one of feature_bank.csv, for example {next(iter(index))}")
    if explainer.problem.facts["rows_kept"]:
        print("WARNING: stage 02 ran with --users: theta of the first run's users was fitted to the rows of "
              "another split, so their likelihoods say less of them here")
    if args.mask:
        longest = max(explainer.histories, key=len)
        print("\n".join(mask_grid(explainer.likelihood, explainer.tokenizer, longest[:12].tolist())))
    for raw in args.user:
        print("\n".join(explainer.card(index[raw])), end="\n\n")
    if args.all:
        for name, values in explainer.statistics(common.seeded(args.seed, 8)).items():
            texts = []
            for key, value in values.items():
                texts.append(f"{key} {value}" if isinstance(value, int) else f"{key} {value:.4f}")
            print(f"{name}: " + ", ".join(texts))
        for m, profile in enumerate(explainer.problem.dataset.profiles):
            texts = [f"{value} {read:.2f} ({towards:.2f})"
                     for value, (read, towards) in explainer.tastes(m).items()]
            if texts:
                print(f"{profile['name']}, correlation of z (its move towards the word) with the share of "
                      "the liked titles: " + ", ".join(texts))


if __name__ == "__main__":
    common.guarded(main)
