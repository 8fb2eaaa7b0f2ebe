"""Write the README's results tables from the artifacts of finished runs.

    python docs/tables.py                                        # print the table of runs/demo
    python docs/tables.py demo=runs/demo demo7=runs/demo7 --write    # put each table between its markers in README.md

A table NAME stands in the README between the lines `<!-- table NAME -->` and `<!-- end NAME -->`.
"""

import argparse
import json
import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def read(run, name):
    path = Path(run) / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def figures(values, signed=False):
    return f"{values['mean']:{'+' if signed else ''}.4f} ± {values['sd']:.4f}"


def results_table(run):
    """Markdown: what stages 02 to 04 of one run found, with seeds and versions."""
    results, dataset = read(run, "results.json"), read(run, "dataset.json")
    profiles, quantized = read(run, "profiles.json"), read(run, "quantize.json")
    if results is None or dataset is None:
        sys.exit(f"error: results.json or dataset.json is missing ({run}); run the four stages with --run {run}")
    planted = any("share_of_planted_lift" in entry for entries in results["summary"].values() for entry in entries.values())
    lines = ["| model | ids | test AUC | logloss | AUC - none | AUC - random |" + (" planted lift regained |" if planted else ""),
             "|---|---|---|---|---|---|" + ("---|" if planted else "")]
    for model, entries in results["summary"].items():
        for ids, entry in entries.items():
            cells = [model.upper(), ids, figures(entry["test_auc"]), figures(entry["test_logloss"])]
            cells += [figures(entry[key], True) if key in entry else "" for key in ("auc_minus_none", "auc_minus_random")]
            cells += [f"{entry['share_of_planted_lift']:.0%}"] if planted else []
            lines.append("| " + " | ".join(cells) + " |")
    lines.append(f"| constant | base rate | 0.5000 | {results['base_rate_logloss']:.4f} | | |" + (" |" if planted else ""))
    notes = []
    if profiles and profiles["heldout_nll"]:
        notes.append("validation NLL per token " + ", ".join(f"{name} {value:.4f}" for name, value in profiles["heldout_nll"].items()))
    if quantized:
        usage = [f"{profile['name']} {profile['active']} codes, perplexity {profile['perplexity']:.2f}" for profile in quantized["profiles"]]
        notes.append("; ".join(usage))
        if "nmi_truth" in quantized:
            notes.append("NMI with the truth " + " / ".join(f"{value:.2f}" for value in quantized["nmi_truth"])
                         + ", across profiles " + " / ".join(f"{value:.4f}" for value in quantized["nmi_across"]))
    seeds = len({row["seed"] for row in results["rows"]})
    notes.append(f"mean ± sd of {seeds} seeds, fields `{results['fields']}`, data seed {dataset['seed']}; "
                 + ", ".join(f"{name} {version}" for name, version in results["versions"].items()))
    return "\n".join([*lines, "", ". ".join(notes) + "."])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", default=["demo=runs/demo"], help="NAME=RUN_DIRECTORY")
    parser.add_argument("--write", action="store_true", help="replace the tables in README.md instead of printing them")
    args = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    for item in args.tables:
        name, _, run = item.partition("=")
        table = results_table(run or f"runs/{name}")
        if not args.write:
            print(f"{name}\n\n{table}\n")
            continue
        pattern = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.S)
        if not pattern.search(text):
            sys.exit(f"error: no markers for the table {name} (README.md); add <!-- table {name} --> and <!-- end {name} -->")
        text = pattern.sub(lambda match, table=table: match[1] + table + "\n" + match[2], text)
    if args.write:
        README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
