"""Explain users of a finished run: history, codes, who shares them, nearest words, most similar users.

    python docs/explain.py --run runs/demo --user u0000 u0001
"""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
common, infer, quantize = (importlib.import_module(name) for name in ("common", "02_infer_profiles", "03_quantize"))


def similar_users(theta, known, user, count):
    """[(cosine, user)] of the users whose theta, all profiles together and centred on the population, point the same way."""
    centred = (theta - theta[known].mean(axis=0)).reshape(len(theta), -1)
    cosine = centred @ centred[user] / np.maximum(np.linalg.norm(centred, axis=1) * np.linalg.norm(centred[user]), 1e-12)
    cosine[~known] = -np.inf
    cosine[user] = -np.inf
    return [(float(cosine[other]), int(other)) for other in np.argsort(-cosine, kind="stable")[:count]]


def card(problem, bank, books, likelihood, tokenizer, user):
    """The lines that describe one user."""
    dataset, theta = problem.dataset, problem.theta
    settings = SimpleNamespace(**problem.facts)
    history = infer.history_texts(dataset, common.TRAIN, settings)[user]
    lines = [f"user {dataset.users[user]}", "  history:" + ("".join(history) or " none, so theta is the population's")]
    for m, profile in enumerate(dataset.profiles):
        code = int(bank[user, m])
        lines.append(f"  {profile['name']}:")
        lines.append("    words near theta    " + " | ".join(infer.nearest_words(likelihood.words.weight, theta[None, user, m], tokenizer)[0]))
        if code == len(books[m]):
            lines.append("    code                unknown")
            continue
        sharing = int((bank[:, m] == code).sum())
        lines.append(f"    code {code}              shared by {sharing:,d} of {len(bank):,d} users ({sharing / len(bank):.0%})")
        lean = books[m][None, code].numpy() - theta[problem.known, m].mean(axis=0)  # what sets this code apart from the average user
        lines.append("    the code leans to   " + " | ".join(infer.nearest_words(likelihood.words.weight, lean, tokenizer)[0]))
    lines.append("  most similar users:" + " none, nothing is known of this one" * (not problem.known[user]))
    for cosine, other in similar_users(theta, problem.known, user, 3) if problem.known[user] else ():
        texts = infer.history_texts(dataset, common.TRAIN, settings)[other]
        lines.append(f"    {dataset.users[other]} (cosine {cosine:.2f}, codes {' '.join(map(str, bank[other]))}):{''.join(texts[-4:])}")
    return lines


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("--user", nargs="+", required=True, help="raw user ids")
    args = parser.parse_args()
    problem, _ = quantize.read_problem(args.run)
    facts = common.load(args.run, "quantize.json", ("profiles_fingerprint",))
    common.check_same(args.run, "feature_bank.npy", "profiles.json", facts["profiles_fingerprint"], problem.facts["fingerprint"], "03_quantize.py")
    bank, books = np.array(common.load(args.run, "feature_bank.npy")), common.load(args.run, "codebooks.pt")["codebooks"]
    index = {str(raw): user for user, raw in enumerate(problem.dataset.users)}
    strangers = [raw for raw in args.user if raw not in index]
    if strangers:
        raise common.UserError(f"no user has the id {strangers[0]}", "--user", f"take one of feature_bank.csv, for example {next(iter(index))}")
    likelihood, *_, tokenizer = problem.open_likelihood(common.pick_device(args.device))
    for raw in args.user:
        print("\n".join(card(problem, bank, books, likelihood, tokenizer, index[raw])), end="\n\n")


if __name__ == "__main__":
    common.guarded(main)
