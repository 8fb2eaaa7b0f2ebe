"""Score pairs of raw ids with a model that stage 04 trained.

    python tools/score.py --run runs/demo pairs.csv                   # by ctr_dcn.pt
    python tools/score.py --run runs/demo --model deepfm pairs.csv

pairs.csv has the columns user_id,item_id; a line without both is left out and counted. An unseen user has the
unknown codes, a cold user (whom stage 04 did not train on) their own; to the recommender both are the unknown
user. An unseen item is the unknown item.

Reads:  ctr_<model>.json ctr_<model>.pt (04) and what 04 reads
Writes: scores.csv, a line user_id,item_id,probability a pair
"""

import csv
import itertools
from pathlib import Path

import numpy as np
from stages import common, ctr

BATCH = 2**16  # pairs in memory at once


def open_model(args, device):
    """(dataset, name of the ids, predict) of ctr_<model>.pt, checked to belong to this run.

    predict: user and item indices (n,), (n,) -> probabilities (n,); the index U or I is an unseen one.
    """
    name = f"ctr_{args.model}"
    remedy = f"run: python 04_train_ctr.py --run {args.run} --models {args.model}"
    for ending in ("json", "pt"):
        if not (args.run / f"{name}.{ending}").exists():
            raise common.UserError(f"{name}.{ending} is missing", args.run, remedy)
    facts = common.load(args.run, f"{name}.json", ("ids", "fields", "profile_input", "seed", "fingerprints"))
    args.ids = [facts["ids"]]
    args.profile_input = facts["profile_input"]
    remedy += f" --ids {facts['ids']} --fields {facts['fields']} --profile-input {facts['profile_input']}"
    dataset, inputs = ctr.read_inputs(args)
    found = inputs.fingerprints(dataset)
    made_from = {key: facts["fingerprints"].get(key) for key in found}
    if found != made_from:
        raise common.UserError(f"{name}.pt was made from another feature bank or dataset", args.run, remedy)
    row = inputs.of(facts["ids"], (facts["seed"], 0, 4))  # run_one's of the repetition that is kept
    fields, lookup = ctr.build_features(dataset, facts["fields"], *row)
    model = ctr.MODELS[args.model](fields).to(device)
    try:
        model.load_state_dict(common.load(args.run, f"{name}.pt"))
    except (AttributeError, RuntimeError, TypeError) as error:
        raise common.UserError(f"{name}.pt holds another model than {name}.json says: {error}", args.run,
                               remedy) from None
    stranger = len(dataset.users)
    cold = np.isin(np.arange(stranger + 1), dataset.rows((common.SUPPORT, common.COLD))[:, 0])

    def predict(users, items):
        ids = lookup(users, items)
        if fields[0].name == "user":
            ids[cold[users], 0] = stranger  # as stage 04 evaluates cold users
        return ctr.predict(model, ids.to(device))

    return dataset, facts["ids"], predict


def read_pairs(source, path):
    """Lists of at most BATCH (user, item) pairs of raw ids; what is not there is an empty text."""
    # strict: a quotation mark that is never closed would else swallow the rest of the file.
    reader = csv.DictReader(source, strict=True, skipinitialspace=True)
    if not {"user_id", "item_id"} <= set(reader.fieldnames or ()):
        raise common.UserError("the columns user_id and item_id are missing", path,
                               "begin the file with the line user_id,item_id")
    pairs = (((row["user_id"] or "").strip(), (row["item_id"] or "").strip()) for row in reader)
    return iter(lambda: list(itertools.islice(pairs, BATCH)), [])


def score(source, target, path, dataset, predict):
    """Read pairs, write their probabilities: (pairs, unseen users, unseen items, lines left out)."""
    user_of = {str(raw): user for user, raw in enumerate(dataset.users)}
    item_of = {str(item["id"]): number for number, item in enumerate(dataset.items)}
    unseen_users = set()
    unseen_items = set()
    scored = 0
    left_out = 0
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(["user_id", "item_id", "probability"])
    for batch in common.progress(read_pairs(source, path), "scoring", "batch"):
        pairs = [pair for pair in batch if all(pair)]
        left_out += len(batch) - len(pairs)
        if pairs:
            unseen_users.update({user for user, _ in pairs} - user_of.keys())
            unseen_items.update({item for _, item in pairs} - item_of.keys())
            users = np.array([user_of.get(user, len(user_of)) for user, _ in pairs])  # U: an unseen user
            items = np.array([item_of.get(item, len(item_of)) for _, item in pairs])
            for pair, value in zip(pairs, predict(users, items)):
                writer.writerow([*pair, f"{value:.6f}"])
            scored += len(pairs)
    return scored, len(unseen_users), len(unseen_items), left_out


def main():
    parser = common.Parser(__doc__, seed=False)
    parser.add_argument("pairs", type=Path, metavar="PAIRS.csv", help="the columns user_id and item_id")
    parser.add_argument("--model", choices=ctr.MODELS, default="dcn", help="whose ctr_<model>.pt")
    args = parser.parse_args()
    common.announce("score", args, f"{args.pairs} ctr_{args.model}.json ctr_{args.model}.pt in {args.run}")
    dataset, ids, predict = open_model(args, common.pick_device(args.device))
    try:
        with open(args.pairs, newline="", encoding="utf-8-sig") as source, \
                common.atomic(args.run / "scores.csv") as temporary, \
                open(temporary, "w", newline="", encoding="utf-8") as target:
            scored, users, items, left_out = score(source, target, args.pairs, dataset, predict)
    except (UnicodeDecodeError, csv.Error) as error:
        raise common.UserError(f"the pairs cannot be read: {error}", args.pairs,
                               "give a CSV file in UTF-8 with the columns user_id,item_id") from None
    print(f"{scored} pairs scored by {args.model} with {ids} ids; unseen: {users} users, {items} items"
          + (f"; {left_out} lines without both ids left out" if left_out else ""))
    print(f"wrote scores.csv to {args.run}")


if __name__ == "__main__":
    common.guarded(main)
