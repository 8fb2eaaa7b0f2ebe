"""Draw what a finished run found, from its artifacts, into RUN/figures.

    python tools/figures.py --run runs/demo
    python tools/figures.py --run runs/demo --codes   # and the sweep over codebook sizes (Figs. 5, 6)
    python tools/figures.py --run runs/demo --tables  # and the tables of docs/RESULTS.md, a row a dot

Reads:  what 03 reads, feature_bank.npy quantize.json (03), results.json (04); with --codes and --tables what
        tools/tables.py left in docs/results
Writes: figures/NAME.png for likelihood, attention, mask, recsysllm (the mask of tools/recsysllm.py), theta,
        usage, results; codes; demo and cold
"""

import re
from types import SimpleNamespace

import numpy as np
import torch
from sklearn.decomposition import PCA
import recsysllm
from stages import ROOT, common, infer, quantize, read_results
try:
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # "$$" may be a price level, and no formula
    import matplotlib.pyplot as plt
except ImportError:
    common.fail("error: matplotlib is missing (tools/figures.py); "
                "pip install -r requirements-dev.txt -c constraints.txt")

# Okabe and Ito, safe for the colour-blind
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000"]
KEPT = ROOT / "docs" / "results"
SWEEP = "demo-codes"               # the study of tools/tables.py behind --codes
PICTURES = {  # name: (studies, metric, title) of its panels, behind --tables; userip alone of later studies
    "demo": (("demo", "test_auc", "demo"), ("demo7", "test_auc", "demo, another world (--seed 7)")),
    "cold": (("ml-100k-cold ml-100k-cold-em ml-100k-cold-rated", "cold_auc", "over all pairs of rows"),
             ("ml-100k-cold ml-100k-cold-em ml-100k-cold-rated", "cold_gauc", "within a user"))}
FILLERS = ("The", "user", "likes")  # the sentence of Fig. 7 begins with these and goes on with titles
STAGES = {"\u03b8 is noise": "theta is noise", "mean word": "mean word", "\u03b8 inferred": "inferred"}


def mask_figure(problem, likelihood, tokenizer, histories):
    """Fig. 4 with token labels: row i may look at the dark columns."""
    user = next(user for user, ids in enumerate(histories) if len(ids))
    segments = likelihood.segments + [infer.Segment("history", histories[user][:6].tolist())]
    labels = []
    for segment in segments:
        if segment.kind == "theta":
            labels.append(f"\u03b8{segment.profile + 1}")
        else:
            labels += [tokenizer.decode([token]).strip() or "\u21b5" for token in segment.ids]
    figure, axes = plt.subplots(figsize=(7, 7))
    visible = infer.build_visibility(segments, problem.facts["mask"]).numpy()
    axes.imshow(visible, cmap="Blues", vmin=0, vmax=1.4)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_title(f"{problem.facts['mask']} mask: a row sees the dark columns")
    return figure


def blanks_figure(dataset, tokenizer, vocabulary):
    """RecSysLLM's mask and each token's two positions. Of two rows one lacks its title, one its verdict."""
    texts = recsysllm.Texts(tokenizer, dataset, vocabulary)
    wording = recsysllm.SEEN_WORDINGS[1]
    pieces = texts.sentence(0, 1, wording) + texts.sentence(1, 0, wording)
    example = recsysllm.blank(pieces, [range(0, 1), range(6, 7)], texts)
    names = {texts.marks["entity"]: "[MASK]", texts.marks["start"]: "[START]"}
    labels = []
    for token, inter, intra in zip(example.ids, example.inter, example.intra):
        label = names.get(token) or tokenizer.decode([token]).strip()
        labels.append(f"{label}   {inter} / {intra}")
    size = len(labels)
    visible = recsysllm.build_visibility(torch.tensor([example.corrupted]), size, "two-way")[0].numpy()
    figure, axes = plt.subplots(figsize=(6.4, 5.2))
    axes.imshow(visible, cmap="Blues", vmin=0, vmax=1.4)
    axes.axhline(example.corrupted - 0.5, color="gray", linewidth=1)
    axes.axvline(example.corrupted - 0.5, color="gray", linewidth=1)
    axes.set_xticks([])
    axes.set_yticks(range(size), labels, fontsize=8)
    axes.set_ylabel("token   inter- / intra-position")
    axes.set_title("a row sees the dark columns: the corrupted text, then the spans", fontsize=10)
    return figure


def likelihood_figure(problem):
    """What descends, the training histories' nats per token; and what came of it on held-out titles."""
    figure, grid = plt.subplots(1, 2, figsize=(9, 3.2))
    left, right = grid
    steps = problem.facts["train_nll_steps"]
    values = problem.facts["heldout_nll"] or {}
    left.plot(range(len(steps)), steps, color=COLOURS[0], marker="o", markersize=3)
    left.set(xlabel="gradient step", ylabel="nats per token", title="the users' training histories")
    left.xaxis.get_major_locator().set_params(integer=True)
    right.bar(list(values), list(values.values()), color=COLOURS[:len(values)])
    if values:
        low = min(values.values())
        high = max(values.values())
        margin = max(high - low, 1e-6)
        right.set_ylim(low - margin, high + 0.3 * margin)
    right.set(ylabel="nats per token", title="their held-out titles, by whose \u03b8 (lower is better)")
    return figure


@torch.no_grad()
def attention_to_theta(likelihood, theta, ids):
    """How much each token of a sentence attends to each theta^m: (n, M, tokens), mean over layers and heads.

    theta (n, M, d); ids: the sentence's token ids, which follow the prompt. theta stands before the sentence,
    so it is the words that look at it.
    """
    model = likelihood.model
    used = likelihood.model.config._attn_implementation
    mask, positions = likelihood.layout(len(ids))
    embedded = likelihood.embeddings(theta, torch.tensor([ids]).expand(len(theta), -1))
    model.set_attn_implementation("eager")  # the one implementation that hands out its weights
    layers = likelihood.body(inputs_embeds=embedded, attention_mask=mask, position_ids=positions,
                             use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(used)
    ends = np.cumsum([len(segment.ids) for segment in likelihood.segments])
    columns = [int(end) - 1 for end, segment in zip(ends, likelihood.segments) if segment.kind == "theta"]
    weights = torch.stack(layers).float().mean((0, 2))  # Shape: (n, S, S)
    return weights[:, likelihood.prompt_length:, columns].transpose(1, 2)


def attention_by_word(problem, likelihood, tokenizer, start):
    """How much the words of a sentence about one user's titles look at theta^m, for up to seven users.

    Returns (users, words, weights): weights[m][s] is (users, words), each row of sum 1, for s one of STAGES:
    theta as noise (the authors' start), the mean of the words (ours), and theta inferred.
    """
    known = np.flatnonzero(problem.inferred)
    texts = infer.history_texts(problem.dataset, common.SEEN, SimpleNamespace(**problem.facts))
    longest = max(known, key=lambda user: len(texts[user]))
    words = [*FILLERS, *"".join(texts[longest][-3:]).replace(";", " ;").split()]
    parts = common.pieces_of(tokenizer, [" " + word if word != ";" else word for word in words])
    owner = np.repeat(np.arange(len(words)), [len(ids) for ids in parts])
    users = [int(longest), *known[:: max(1, len(known) // 6)][:6].tolist()]
    inferred = problem.theta()[users]
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, inferred.shape).astype(np.float32)
    first = start.cpu().numpy()[None].repeat(len(users), 0)
    weights = [[] for _ in problem.dataset.profiles]
    for theta in (noise, first, inferred):
        by_token = attention_to_theta(likelihood, torch.as_tensor(theta), sum(parts, [])).numpy()
        for m, found in enumerate(weights):
            by_word = np.stack([np.bincount(owner, row) for row in by_token[:, m]]) / np.bincount(owner)
            found.append(by_word / by_word.sum(1, keepdims=True))  # by_word: the mean over a word's pieces
    return users, words, weights


def attention_figure(problem, likelihood, tokenizer, start):
    """Fig. 7 before and after inference: (figure, {profile: for each of STAGES the weight's share of filler
    words, of words of titles and of the marks between them}, the number of words of these three kinds)."""
    _, words, weights = attention_by_word(problem, likelihood, tokenizer, start)
    kinds = np.ones(len(words), int)  # 1: a word of a title
    kinds[:len(FILLERS)] = 0
    kinds[np.isin(words, (";", "+", "-"))] = 2
    figure, axes = plt.subplots(figsize=(6, 3.2))
    shares = {}
    width = 0.8 / len(problem.dataset.profiles)
    for m, profile in enumerate(problem.dataset.profiles):
        shares[profile["name"]] = []
        for by_word in weights[m]:
            by_kind = [float(by_word[:, kinds == kind].sum(1).mean()) for kind in range(3)]
            shares[profile["name"]].append(by_kind)
        places = np.arange(len(STAGES)) + m * width
        axes.bar(places, [share[0] for share in shares[profile["name"]]], 0.9 * width, label=profile["name"],
                 color=COLOURS[m % len(COLOURS)])
    axes.axhline((kinds == 0).mean(), color="gray", linestyle="--", linewidth=1)  # as much as any other word
    axes.set_xticks(np.arange(len(STAGES)) + 0.4 - width / 2, STAGES)
    axes.set(ylabel="share", title=f"attention to \u03b8 that comes from \"{' '.join(FILLERS)}\"")
    axes.legend(fontsize=8)
    return figure, shares, np.bincount(kinds, minlength=3).tolist()


def theta_figure(problem, bank, truth):
    """z of each profile in its first two principal components, by code and, on the demo, by truth."""
    colourings = [("code", bank)] + ([("planted", truth)] if truth is not None else [])
    profiles = problem.dataset.profiles
    known = problem.inferred
    figure, grid = plt.subplots(len(profiles), len(colourings), squeeze=False,
                                figsize=(4.2 * len(colourings), 3.6 * len(profiles)))
    for m, profile in enumerate(profiles):
        z = np.pad(problem.z[known, m], ((0, 0), (0, 1)))  # two words have one direction
        points = PCA(2, random_state=0).fit_transform(z)
        for place, colouring in enumerate(colourings):
            axes = grid[m, place]
            name, values = colouring
            if m >= values.shape[1]:  # a critic is not planted
                axes.set_axis_off()
                continue
            found = np.unique(values[known, m])
            for value in found:
                chosen = values[known, m] == value
                axes.scatter(*points[chosen].T, s=5, alpha=0.6, color=COLOURS[value % len(COLOURS)],
                             label=f"{name} {value}")
            axes.set(title=f"z of {profile['name']} by {name}", xlabel="first principal component",
                     ylabel="second")
            axes.locator_params(nbins=5)
            if len(found) <= 8:
                axes.legend(markerscale=3, fontsize=8)
    return figure


def usage_figure(quantized):
    """How many users have each code."""
    profiles = quantized["profiles"]
    figure, grid = plt.subplots(1, len(profiles), figsize=(4 * len(profiles), 3), squeeze=False)
    for axes, profile in zip(grid[0], profiles):
        names = profile.get("words") or list(map(str, range(len(profile["counts"]))))
        axes.bar(range(len(names)), profile["counts"], color=COLOURS[0])
        axes.set_xticks(range(len(names)), names)
        title = f"{profile['name']}: perplexity {profile['perplexity']:.2f}"
        axes.set(title=title, xlabel="code", ylabel="users")
    return figure


def results_figure(results):
    """Test AUC of each row, mean and sd over the seeds."""
    names = []
    values = []
    colours = []
    for model, entries in results["summary"].items():
        for number, ids in enumerate(entries):
            names.append(f"{model} {ids}")
            values.append(entries[ids]["test_auc"])
            colours.append(COLOURS[number % len(COLOURS)])
    figure, axes = plt.subplots(figsize=(6, 1 + 0.32 * len(names)))
    means = [value["mean"] for value in values]
    sds = [value["sd"] or 0 for value in values]  # of a single repetition there is none
    axes.barh(names, means, xerr=sds, color=colours, capsize=3)
    axes.set_xlim(np.subtract(means, sds).min() - 0.01)
    axes.invert_yaxis()
    seeds = len({row["seed"] for row in results["rows"]})
    axes.set(xlabel="test AUC", title=f"mean and sd of {seeds} seeds")
    return figure


def kept_study(name):
    """What tools/tables.py found in a study."""
    if not (KEPT / f"{name}.json").exists():
        raise common.UserError(f"the study {name} was not run", KEPT, f"run: python tools/tables.py {name}")
    return common.load(KEPT, f"{name}.json", ("rows",))


def tables_figure(panels):
    """A table as a picture: in each panel the mean of a metric and its sd over repetitions, a row a dot."""
    figure, grid = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), squeeze=False)
    for axes, panel in zip(grid[0], panels):
        studies, metric, title = panel
        first, *others = studies.split()
        rows = list(kept_study(first)["rows"])
        for other in others:
            rows += [row for row in kept_study(other)["rows"] if row["ids"] == "userip"]
        cells = {}
        for row in rows:
            own = row["variant"] == rows[0]["variant"]
            name = row["ids"] if own else f"{row['ids']}, {row['variant']}"
            cells.setdefault(name, []).append(row[metric])
        for place, name in enumerate(cells):
            values = cells[name]
            ours = name.startswith(("userip", "words"))
            axes.errorbar(np.mean(values), place, xerr=np.std(values, ddof=min(1, len(values) - 1)), fmt="o",
                          capsize=3, color=COLOURS[5 if ours else 0], markersize=6 if ours else 4)
        axes.axvline(np.mean(cells["none"]), color="gray", linestyle="--", linewidth=1)
        axes.set_yticks(range(len(cells)), cells)
        axes.invert_yaxis()
        axes.set(xlabel=f"{'GAUC' if 'gauc' in metric else 'AUC'}, mean and sd", title=title)
    return figure


def codes_figure():
    """Figs. 5 and 6: test AUC over codebook sizes, of our codes and of random ones with as many codes."""
    found = {}  # (ids, K_1, K_2): AUCs
    for row in kept_study(SWEEP)["rows"]:
        sizes = map(int, re.fullmatch(r"K = (\d+),(\d+)", row["variant"]).groups())
        found.setdefault((row["ids"], *sizes), []).append(row["test_auc"])
    figure, grid = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axes, own, other, fixed in zip(grid, ("hobby", "background"), ("background", "hobby"), (3, 4)):
        for ids, colour in zip(("userip", "none", "random"), COLOURS):
            place = 1 if own == "hobby" else 2
            chosen = {key[place]: values for key, values in found.items()
                      if key[0] == ids and key[3 - place] == fixed}
            sizes = sorted(chosen)
            values = [chosen[size] for size in sizes]
            spread = [np.std(value, ddof=1) if len(value) > 1 else 0.0 for value in values]
            axes.errorbar(sizes, [np.mean(value) for value in values], spread, color=colour, marker="o",
                          capsize=3, label=ids, linestyle="-" if ids == "userip" else "--")
        axes.set(xscale="log", xlabel=f"codes of {own} ({other}: {fixed})", title=f"codebook size of {own}")
        axes.set_xticks(sizes, sizes)
        axes.minorticks_off()
    grid[0].set_ylabel("test AUC, mean and sd")
    grid[0].legend()
    return figure


def main():
    parser = common.Parser(__doc__, device=False, seed=False)
    parser.add_argument("--codes", action="store_true", help="also draw the sweep over codebook sizes")
    parser.add_argument("--tables", action="store_true", help="also draw the tables of the kept studies")
    args = parser.parse_args()
    problem, truth = quantize.read_problem(args.run)
    common.load(args.run, "profiles.json", ("train_nll_steps", "heldout_nll"))
    quantized, bank = quantize.read_quantized(problem)
    results = read_results(args.run, problem.dataset)
    likelihood, histories, space, tokenizer = problem.open_likelihood(torch.device("cpu"))
    attention, shares, words = attention_figure(problem, likelihood, tokenizer, space.words_mean)
    figures = {"likelihood": likelihood_figure(problem), "attention": attention,
               "mask": mask_figure(problem, likelihood, tokenizer, histories),
               "recsysllm": blanks_figure(problem.dataset, tokenizer, len(likelihood.word_table.weight)),
               "theta": theta_figure(problem, bank, truth), "usage": usage_figure(quantized),
               "results": results_figure(results)}
    if args.codes:
        figures["codes"] = codes_figure()
    if args.tables:
        figures |= {name: tables_figure(panels) for name, panels in PICTURES.items()}
    for name, figure in figures.items():
        figure.tight_layout()
        with common.atomic(args.run / "figures" / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    print(f"attention to theta on fillers / words of titles / marks ({' / '.join(map(str, words))} of them):")
    for name, values in shares.items():
        texts = []
        for when, parts in zip(STAGES.values(), values):
            texts.append(f"{when} " + " / ".join(f"{share:.2f}" for share in parts))
        print(f"    {name}: " + ", ".join(texts))
    print("wrote " + " ".join(f"{name}.png" for name in figures) + f" to {args.run / 'figures'}")


if __name__ == "__main__":
    common.guarded(main)
