"""A tiny LM that reads in both directions, for methods that ask with the history in front (KAR).

    python tools/lm_both.py --run runs/demo                               # after 02 with --lm tiny
    python 02_infer_profiles.py --run runs/demo --lm runs/demo/lm-both   # then tools/baselines.py kar, 03, 04

The tiny LM of 02 has read "x^m word ... history" alone, so that "history x^m" is strange to it. Here a third
of the invented people have their history first, then each profile's name and word; all else is as in 02, but
that people may have 20 titles (at most --max-history) where no user has.

Prints: of the run's LM and of the new one, how many nats a token a wrong word costs the history, and
        somebody else's history the word
Reads:  what 03 reads
Writes: lm-both/
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from stages import common, infer, quantize

SHARE = 3  # of so many sentences one has the history first


def history_first(tokenizer, traits, people):
    """Pairs (token ids of "history x^1 word x^2 word", place of the last word) of common.make_sentences()."""
    names = common.pieces_of(tokenizer, [trait.prompt for trait in traits])
    texts = set()
    for words, titles in people:
        texts.update(titles)
        texts.update(f" {word}" for word in words.values())
    texts = sorted(texts)
    ids_of = dict(zip(texts, common.pieces_of(tokenizer, texts)))
    rows = []
    for words, titles in people:
        ids = []
        for text in titles:
            ids += ids_of[text]
        for m, word in words.items():
            place = len(ids) + len(names[m])
            ids = ids + names[m] + ids_of[f" {word}"]
        rows.append((ids, place))
    return rows


def shortened(tokenizer, traits, people, room):
    """people with as many first titles of each as fit `room` tokens beside the longest words."""
    texts = sorted(set().union(*(titles for _, titles in people)))
    cost = {text: len(ids) for text, ids in zip(texts, common.pieces_of(tokenizer, texts))}
    for trait in traits:
        words = common.pieces_of(tokenizer, [f" {word}" for word in trait.words])
        room -= max(map(len, words), default=0)
    fitting = []
    for words, titles in people:
        ends = np.cumsum([cost[text] for text in titles])
        fitting.append((words, titles[:int((ends <= room).sum())]))
    return fitting


def padded(rows, value):
    return nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True, padding_value=value)


@torch.no_grad()
def word_sensitivity(model, tokenizer, traits, people, rng):
    """{profile: nats a token that a word loses behind the history of somebody with another word}."""
    lost = {}
    for m, trait in enumerate(traits):
        told = [(words[m], titles) for words, titles in people if m in words]
        if len({word for word, _ in told}) < 2:
            continue  # one word alone, or none, tells nobody apart
        own = []
        swapped = []  # the same word behind the history of somebody with another word
        for word, titles in told:
            others = [found for other, found in told if other != word]
            own.append(({m: word}, titles))
            swapped.append(({m: word}, others[rng.integers(len(others))]))
        lost[trait.name] = (word_loss(model, tokenizer, traits, swapped)
                            - word_loss(model, tokenizer, traits, own))
    return lost


def word_loss(model, tokenizer, traits, people):
    """Nats a token of the last word behind each person's history."""
    ids = []
    targets = []
    for row, place in history_first(tokenizer, traits, people):
        ids.append(row)
        targets.append([-100 for _ in row[:place]] + row[place:])
    return float(common.next_token_loss(model, padded(ids, 0), padded(targets, -100)))


def main():
    parser = common.Parser(__doc__, device=False)
    parser.add_argument("--tiny-sentences", type=common.at_least(64), help="how many (default: as 02)")
    args = parser.parse_args()
    problem, _ = quantize.read_problem(args.run)
    dataset = problem.dataset
    facts = problem.facts
    if facts["lm"] != "tiny":
        raise common.UserError(f"this run's LM is {facts['lm']}", args.run, "run 02 with --lm tiny")
    likelihood, _, _, tokenizer = problem.open_likelihood(torch.device("cpu"))
    items = [dataset.items[item] for item in np.unique(dataset.rows(common.TRAIN)[:, 1])]
    traits = [common.Trait(profile, items) for profile in dataset.profiles]
    rng = common.seeded(args.seed, 9)
    rated = facts["history"] == "rated"
    texts = infer.history_texts(dataset, common.TRAIN, SimpleNamespace(**facts))
    length = min(facts["max_history"], max(20, *map(len, texts)))
    count = args.tiny_sentences or facts["tiny_sentences"] or common.tiny_sizes(len(items))[2]
    people = shortened(tokenizer, traits, common.make_sentences(traits, items, count, length, rng, rated),
                       likelihood.room)
    ids, targets, _ = common.encode_sentences(tokenizer, traits, dataset.task_prompt, people)
    rows = [row[real].tolist() for row, real in zip(ids, targets != -100)]
    # Drawn: with three profiles people come in a cycle of six, of which every third would be of one kind.
    turned = np.random.default_rng((args.seed, 10)).permutation(len(people))[:len(people) // SHARE]
    for number, row in zip(turned, history_first(tokenizer, traits, [people[at] for at in turned])):
        rows[number] = row[0]
    torch.manual_seed(args.seed)
    model = type(likelihood.model)(likelihood.model.config)
    common.fit_tiny(model, padded(rows, 0), padded(rows, -100), rng)
    fresh = common.make_sentences(traits, items, common.FRESH_SENTENCES, length, rng, rated)
    found = {}
    fresh = shortened(tokenizer, traits, fresh, likelihood.room)
    for name, some in (("the run's LM", likelihood.model), ("lm-both", model.eval())):
        found[name] = {
            "a wrong word": common.sensitivity(
                some, tokenizer, traits, dataset.task_prompt, fresh, common.seeded(args.seed, 12)),
            "another history": word_sensitivity(some, tokenizer, traits, fresh, common.seeded(args.seed, 12))}
        for what, lost in found[name].items():
            of_what = "the history" if what == "a wrong word" else "the word"
            print(f"{name}, nats a token that {what} costs {of_what}: "
                  + ", ".join(f"{key} {lost[key]:.4f}" for key in lost))
    common.save_tiny(args.run / "lm-both", model, tokenizer, {
        "sensitivity": found["lm-both"]["a wrong word"], "both": found})
    history = " --history rated" if rated else ""
    print(f"next: python 02_infer_profiles.py --run {args.run} --lm {args.run / 'lm-both'}{history}")


if __name__ == "__main__":
    common.guarded(main)
