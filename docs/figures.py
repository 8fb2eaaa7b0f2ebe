"""Draw what a finished run found, from its artifacts, into RUN/figures.

    python docs/figures.py --run runs/demo
    python docs/figures.py --run runs/demo --codes       # and the sweep over codebook sizes that docs/tables.py demo-codes ran (Figs. 5, 6)
"""

import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from sklearn.decomposition import PCA

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
common, infer, quantize = (importlib.import_module(name) for name in ("common", "02_infer_profiles", "03_quantize"))
try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit(common.complain("matplotlib is missing (docs/figures.py); pip install -r requirements-dev.txt -c constraints.txt"))

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000"]  # Okabe and Ito, colour-blind-safe


def mask_figure(problem, likelihood, tokenizer, histories):
    """Fig. 4 with token labels: row i may look at the dark columns."""
    user = next(user for user, ids in enumerate(histories) if len(ids))
    segments = likelihood.segments + [infer.Segment("history", histories[user][:6].tolist())]
    labels = [f"\u03b8{segment.profile + 1}" if segment.kind == "theta" else tokenizer.decode([token]).strip() or "\u21b5"
              for segment in segments for token in segment.ids]
    figure, axes = plt.subplots(figsize=(7, 7))
    axes.imshow(infer.build_visibility(segments, problem.facts["mask"]).numpy(), cmap="Blues", vmin=0, vmax=1.4)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_title(f"{problem.facts['mask']} mask: a row sees the dark columns")
    return figure


def likelihood_figure(problem):
    """What descends: nats per token of the training histories before each step; and what came of it, on held-out titles."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    steps = problem.facts["train_nll_steps"]
    left.plot(range(len(steps)), steps, color=COLOURS[0], marker="o", markersize=3)
    left.set(xlabel="AdamW step", ylabel="nats per token", title="the users' training histories")
    left.xaxis.get_major_locator().set_params(integer=True)
    values = problem.facts["heldout_nll"] or {}
    right.bar(list(values), list(values.values()), color=COLOURS[:3])
    if values:
        low, high = min(values.values()), max(values.values())
        right.set_ylim(low - (high - low), high + 0.3 * (high - low))
    right.set(ylabel="nats per token", title="their held-out titles, by whose \u03b8 (lower is better)")
    return figure


FILLERS = ("The", "user", "likes")  # the sentence of Fig. 7 begins with these and goes on with titles


@torch.no_grad()
def attention_to_theta(likelihood, theta, ids):
    """How much each token of a sentence attends to each theta^m: (n, M, tokens), the mean over all layers and heads.

    theta (n, M, d); ids: the sentence's token ids, which follow the prompt. theta stands before the sentence, so it is the words that look at it.
    """
    model, used = likelihood.model, likelihood.model.config._attn_implementation
    model.set_attn_implementation("eager")  # the one implementation that hands out its weights
    mask, positions = likelihood.layout(len(ids))
    embedded = likelihood.embeddings(theta, torch.tensor([ids]).expand(len(theta), -1))
    layers = likelihood.body(inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(used)
    at = np.cumsum([len(segment.ids) for segment in likelihood.segments])
    columns = [int(end) - 1 for end, segment in zip(at, likelihood.segments) if segment.kind == "theta"]
    return torch.stack(layers).float().mean((0, 2))[:, likelihood.prompt_length:, columns].transpose(1, 2)


def attention_figure(problem, bank, likelihood, tokenizer, start):
    """Fig. 7: how much the words of a sentence about one user's titles look at theta^m, for seven users: where theta is noise (the paper's
    start), where it is theta_0 (ours), and after inference.

    Returns (figure, {profile: three times the weight's shares on filler words, on the words of titles, and on the marks between them}); a row of
    the picture sums to 1.
    """
    facts, known = problem.facts, np.flatnonzero(problem.known)
    texts = infer.history_texts(problem.dataset, common.TRAIN, SimpleNamespace(**facts))
    longest = max(known, key=lambda user: len(texts[user]))
    words = [*FILLERS, *"".join(texts[longest][-3:]).replace(";", " ;").split()]
    parts = infer.pieces(tokenizer, [" " + word if word != ";" else word for word in words])
    owner = np.repeat(np.arange(len(words)), [len(ids) for ids in parts])
    sizes = np.bincount(owner)
    seven = [int(longest), *known[:: max(1, len(known) // 6)][:6].tolist()]
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, problem.theta[seven].shape).astype(np.float32)
    weighed = [attention_to_theta(likelihood, torch.as_tensor(theta), [token for ids in parts for token in ids]).numpy()
               for theta in (noise, start.cpu().numpy()[None].repeat(len(seven), 0), problem.theta[seven])]
    kinds = np.array([0 if at < len(FILLERS) else 2 if word in (";", "+", "-") else 1 for at, word in enumerate(words)])
    figure, grid = plt.subplots(len(problem.dataset.profiles), 3, figsize=(13, 3.2 * len(problem.dataset.profiles)), squeeze=False)
    shares = {}
    for m, (row, profile) in enumerate(zip(grid, problem.dataset.profiles)):
        for axes, weights, name in zip(row, weighed, ("\u03b8 is noise", "\u03b8\u2080", "\u03b8 inferred")):
            by_word = np.stack([np.bincount(owner, weights[user, m]) / sizes for user in range(len(seven))])  # mean over a word's pieces
            by_word /= by_word.sum(1, keepdims=True)
            shares.setdefault(profile["name"], []).append([float(by_word[:, kinds == kind].sum(1).mean()) for kind in range(3)])
            axes.imshow(by_word, cmap="Blues", vmin=0, aspect="auto")
            axes.set_xticks(range(len(words)), words, rotation=60, ha="right", fontsize=8)
            axes.set_yticks(range(len(seven)), [f"{problem.dataset.users[user]}: {bank[user, m]}" for user in seven], fontsize=8)
            axes.set_title(f"{profile['name']}, {name}: {shares[profile['name']][-1][0]:.0%} on \"{' '.join(FILLERS)}\"", fontsize=10)
        row[0].set_ylabel("user: code")
    return figure, {"words": np.bincount(kinds, minlength=3).tolist(), **shares}


def theta_figure(problem, bank, truth):
    """theta of each profile in its first two principal components, coloured by code and, where there is one, by the planted truth."""
    colourings = [("code", bank)] + ([("planted", truth)] if truth is not None else [])
    profiles = problem.dataset.profiles
    figure, grid = plt.subplots(len(profiles), len(colourings), figsize=(4.2 * len(colourings), 3.6 * len(profiles)), squeeze=False)
    for m, profile in enumerate(profiles):
        points = PCA(2, random_state=0).fit_transform(problem.theta[problem.known, m])
        for axes, (name, values) in zip(grid[m], colourings):
            for value in np.unique(values[problem.known, m]):
                chosen = values[problem.known, m] == value
                axes.scatter(*points[chosen].T, s=5, alpha=0.6, color=COLOURS[value % len(COLOURS)], label=f"{name} {value}")
            axes.set(title=f"\u03b8 of {profile['name']} by {name}", xlabel="first principal component", ylabel="second")
            axes.locator_params(nbins=5)
            if len(np.unique(values[problem.known, m])) <= 8:
                axes.legend(markerscale=3, fontsize=8)
    return figure


def usage_figure(quantized):
    figure, grid = plt.subplots(1, len(quantized["profiles"]), figsize=(4 * len(quantized["profiles"]), 3), squeeze=False)
    for axes, profile in zip(grid[0], quantized["profiles"]):
        axes.bar([str(code) for code in range(len(profile["counts"]))], profile["counts"], color=COLOURS[0])
        axes.set(title=f"{profile['name']}: perplexity {profile['perplexity']:.2f}", xlabel="code", ylabel="users")
    return figure


def results_figure(results):
    """Test AUC of each row, mean and sd over the seeds."""
    cells = [(f"{model} {ids}", entry["test_auc"], COLOURS[number % len(COLOURS)]) for model, entries in results["summary"].items()
             for number, (ids, entry) in enumerate(entries.items())]
    figure, axes = plt.subplots(figsize=(6, 1 + 0.32 * len(cells)))
    names, values, colours = zip(*cells)
    axes.barh(names, [value["mean"] for value in values], xerr=[value["sd"] for value in values], color=colours, capsize=3)
    axes.set_xlim(min(value["mean"] - value["sd"] for value in values) - 0.01)
    axes.invert_yaxis()
    axes.set(xlabel="test AUC", title=f"mean and sd of {len({row['seed'] for row in results['rows']})} seeds")
    return figure


def codes_figure(run):
    """Figs. 5 and 6: test AUC over codebook sizes, from the runs that docs/tables.py made beside this one."""
    found = {}
    for path in run.parent.glob(f"{run.name}-study/k-*/results.json"):
        first, second = map(int, re.fullmatch(r"k-(\d+)-(\d+)", path.parent.name).groups())
        found[first, second] = json.loads(path.read_text())["summary"]["dcn"]["userip"]["test_auc"]
    if not found:
        raise common.UserError("no sweep over codebook sizes was run", run, f"run: python docs/tables.py {run.name}-codes")
    controls = json.loads((run / "results.json").read_text())["summary"]["dcn"]
    figure, grid = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axes, own, fixed, names in zip(grid, (0, 1), (3, 4), (("hobby", "background"), ("background", "hobby"))):
        sizes = sorted(size[own] for size in found if size[1 - own] == fixed)
        values = [found[(size, fixed) if own == 0 else (fixed, size)] for size in sizes]
        axes.errorbar(sizes, [value["mean"] for value in values], [value["sd"] for value in values], color=COLOURS[0], marker="o", capsize=3)
        for colour, control in zip(COLOURS[1:], ("none", "random")):
            axes.axhline(controls[control]["test_auc"]["mean"], color=colour, linestyle="--", label=control)
        axes.set(xscale="log", xlabel=f"codes of {names[0]} ({names[1]}: {fixed})", title=f"codebook size of {names[0]}")
        axes.set_xticks(sizes, sizes)
        axes.minorticks_off()
    grid[0].set_ylabel("test AUC, mean and sd")
    grid[0].legend()
    return figure


def main():
    parser = common.Parser(__doc__, device=False)
    parser.add_argument("--codes", action="store_true", help="also draw the sweep over codebook sizes")
    args = parser.parse_args()
    problem, truth = quantize.read_problem(args.run)
    common.load(args.run, "profiles.json", ("train_nll_steps",))
    quantized, bank = common.load(args.run, "quantize.json", ("profiles",)), np.array(common.load(args.run, "feature_bank.npy"))
    likelihood, histories, start, _, tokenizer = problem.open_likelihood(torch.device("cpu"))
    attention, shares = attention_figure(problem, bank, likelihood, tokenizer, start)
    figures = {"likelihood": likelihood_figure(problem), "attention": attention,
               "mask": mask_figure(problem, likelihood, tokenizer, histories), "theta": theta_figure(problem, bank, truth),
               "usage": usage_figure(quantized), "results": results_figure(common.load(args.run, "results.json", ("summary", "rows")))}
    if args.codes:
        figures["codes"] = codes_figure(args.run)
    (args.run / "figures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.tight_layout()
        with common.atomic(args.run / "figures" / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    print(f"attention to theta on fillers / words of titles / marks ({' / '.join(map(str, shares.pop('words')))} of them):")
    for name, values in shares.items():
        print(f"    {name}: " + ", ".join(f"{when} " + " / ".join(f"{share:.2f}" for share in parts)
                                          for when, parts in zip(("theta is noise", "theta_0", "inferred"), values)))
    print("wrote " + " ".join(f"{name}.png" for name in figures) + f" to {args.run / 'figures'}")


if __name__ == "__main__":
    common.guarded(main)
