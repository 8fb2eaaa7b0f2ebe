"""Run the studies behind the README's tables, and write the tables from the artifacts.

    python docs/tables.py demo demo7 nosignal --write      # run the four scripts where results are missing, then fill the README
    python docs/tables.py demo=runs/mine                   # print the table of a run of your own
    python docs/tables.py ml-100k ml-100k-ablations --data-dir PATH --write
    python docs/tables.py demo-codes                       # codebook sizes, Figs. 5 and 6

A study that was interrupted goes on with what is missing; remove a row's folder under runs/ to run it again after a change of code. Each
table stands in the README between `<!-- table NAME -->` and `<!-- end NAME -->`; the artifacts behind those of a single run are kept in
docs/results, so that anyone can make the table again.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import scipy.stats

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
STAGES = ("01_prepare_data.py", "02_infer_profiles.py", "03_quantize.py", "04_train_ctr.py")
RESULTS, KEPT = ROOT / "docs" / "results", ("dataset.json", "profiles.json", "quantize.json", "results.json")
MADE_BY = {1: ("dataset.json", "interactions.npy", "users.json", "items.json", "truth.npy"),
           2: ("profiles.npy", "profiles.json", "profiles_users.json", "lm-tiny")}

DATA = {  # name: flags of stages 01 and 02
    "demo": ("", ""), "demo7": ("--seed 7", ""), "nosignal": ("--signal 0", ""),
    "ml-100k": ("--dataset ml-100k", "--lm tiny"),
}
ABLATIONS = {  # row: flags of stages 01 (None: as the base has it), 02 (None: likewise), 03 and 04
    "the default": (None, None, "", ""),
    "without VQ: theta through a projection (Table 3)": (None, None, "", "--profile-input embedding"),
    "plain k-means": (None, None, "--quantizer kmeans", ""),
    "no likelihood in the joint loss": (None, None, "--no-llm-loss", ""),
    "EM, codes as soft tokens": (None, None, "--assign likelihood", ""),
    "the paper's literal settings": (None, None, "--paper", ""),
    "plain causal mask": (None, "--mask causal", "", ""),
    "theta starts as noise": (None, "--init random", "", ""),
    "no prior": (None, "--prior 0", "", ""),
    "history of all titles": (None, "--history all", "", ""),
    "nonsense profile names": ("--profile-words zorp,quell", "--lm {base}/lm-tiny", "", ""),
}
CODES = {f"K = {sizes}": (None, None, f"--codes {sizes}", "") for sizes in
         ("2,3", "4,3", "8,3", "16,3", "32,3", "64,3", "4,9", "4,27", "4,81")}
CONTROLS = "--ids none,random,shuffled,userip"  # rows with data or fields of their own need controls of their own
MODELS = {"all models": (None, None, "", f"--models all {CONTROLS}")}
ATTRIBUTES = {  # item id + attributes + profile ids, no user id
    "liked titles, K = 4,3": (None, None, "", f"--fields attributes {CONTROLS}"),
    "liked titles, K = 8,4": (None, None, "--codes 8,4", f"--fields attributes {CONTROLS}"),
    "liked titles, K = 4,3, EM": (None, None, "--assign likelihood", f"--fields attributes {CONTROLS}"),
    "liked titles, K = 4,3, EM of 8 rounds": (None, None, "--assign likelihood --epochs 8", f"--fields attributes {CONTROLS}"),
    "50 liked titles, K = 4,3, EM of 8 rounds": (None, "--max-history 50", "--assign likelihood --epochs 8", f"--fields attributes {CONTROLS}"),
    "rated titles and a critic, 20 titles": ("--critic", "--history rated", "", f"--fields attributes {CONTROLS}"),
    "rated titles and a critic, 50 titles": ("--critic", "--history rated --max-history 50", "", f"--fields attributes {CONTROLS}"),
    **{f"rated, critic, {n} rows a user": (f"--critic --max-per-user {n}", "--history rated", "", f"--fields attributes {CONTROLS}")
       for n in (8, 15, 30)},
    "user id too, K = 4,3": (None, None, "", f"--fields ids+attributes {CONTROLS}"),
}
STUDIES = {f"{data}-{name}": (data, rows) for data in ("demo", "demo7", "ml-100k") for name, rows in
           (("ablations", ABLATIONS), ("codes", CODES), ("attributes", ATTRIBUTES), ("models", MODELS)) if data == "ml-100k" or name != "attributes"}


def fail(message):
    """One line on stderr, exit 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def stage(number, run, flags):
    command = [STAGES[number - 1], "--run", str(run.relative_to(ROOT)), *flags.split()]
    print("$ python " + " ".join(command), flush=True)
    if subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, cwd=ROOT).returncode:
        fail(f"{STAGES[number - 1]} failed ({run}); see its message above")


def run_all(name, data_dir):
    """The four scripts for one data set, unless its results are there. Returns the run directory."""
    run, (first, second) = ROOT / "runs" / name, DATA[name]
    if not (run / "results.json").exists():
        stage(1, run, first + (f" --data-dir {data_dir}" if data_dir and "--dataset" in first else ""))
        stage(2, run, second)
        stage(3, run, "")
        stage(4, run, "")
    return run


def run_study(name, data_dir):
    """Every row of a study in a run directory of its own beside the base's. Returns {row: run directory}."""
    data, rows = STUDIES[name]
    base, runs = run_all(data, data_dir), {}
    for row, (first, second, third, fourth) in rows.items():
        slug = re.sub(r"[^a-z0-9]+", "-", row.lower()).strip("-")
        runs[row] = run = base.parent / f"{data}-study" / slug
        if (run / "results.json").exists():
            continue
        run.mkdir(parents=True, exist_ok=True)
        for number in (1, 2):
            for file in MADE_BY[number] if (first, second)[number - 1] is None else ():
                if (base / file).is_dir():
                    shutil.copytree(base / file, run / file, dirs_exist_ok=True)
                elif (base / file).exists():
                    shutil.copy(base / file, run / file)
        if first is not None:
            stage(1, run, f"{DATA[data][0]} {first}" + (f" --data-dir {data_dir}" if data_dir and "--dataset" in DATA[data][0] else ""))
        if second is not None:
            if "--lm" not in second and (base / "lm-tiny").exists():  # the same LM where its training text is the same
                shutil.copytree(base / "lm-tiny", run / "lm-tiny", dirs_exist_ok=True)
            stage(2, run, second.format(base=base.relative_to(ROOT)) if "--lm" in second else f"{DATA[data][1]} {second}")
        stage(3, run, third)
        stage(4, run, fourth if "--ids" in fourth else f"--ids userip {fourth}")
    return runs


def study_table(name, data_dir):
    """Markdown: a row a variant; differences are paired by seed with `none` and `random` of the base run."""
    runs = run_study(name, data_dir)
    if STUDIES[name][1] is MODELS:
        return results_table(runs["all models"])
    base = read(ROOT / "runs" / STUDIES[name][0], "results.json")
    planted = base["summary"]["dcn"].get("planted") if STUDIES[name][1] is not ATTRIBUTES else None
    truth = read(ROOT / "runs" / STUDIES[name][0], "quantize.json").get("nmi_truth") is not None
    used = []
    lines = ["| variant | test AUC | AUC - none | AUC - random |" + " planted lift |" * bool(planted) + " perplexity |" + " NMI |" * truth
             + " NLL own / population / shuffled |", "|---" * (6 + bool(planted) + truth) + "|"]
    for row, run in runs.items():
        results, quantized, profiles = (read(run, f"{file}.json") for file in ("results", "quantize", "profiles"))
        if "date" not in results:
            fail(f"results.json is too old ({run}); remove the folder and run the study again")
        used += [results["fields"]] * (results["fields"] not in used)
        found = {entry["seed"]: entry["test_auc"] for entry in results["rows"] if entry["ids"] == "userip"}
        rows = results["rows"] if "random" in results["summary"]["dcn"] else base["rows"]
        controls = [{entry["seed"]: entry["test_auc"] for entry in rows if entry["ids"] == ids} for ids in ("none", "random")]
        cells = [row, spread(list(found.values()))]
        for control in controls:
            differences = [value - control[seed] for seed, value in found.items()]
            p = f", p {scipy.stats.ttest_1samp(differences, 0).pvalue:.2g}" if len(differences) > 1 and len(set(differences)) > 1 else ""
            cells.append(spread(differences, True) + p)
        if planted:
            floor = base["summary"]["dcn"]["none"]["test_auc"]["mean"]
            cells.append(f"{(statistics.mean(found.values()) - floor) / (planted['test_auc']['mean'] - floor):.0%}")
        cells.append(" / ".join(f"{profile['perplexity']:.2f}" for profile in quantized["profiles"]))
        if truth:
            cells.append(" / ".join(f"{value:.2f}" for value in quantized["nmi_truth"]))
        cells.append(" / ".join(f"{value:.4f}" for value in profiles["heldout_nll"].values()))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"DCN, mean ± sd of {len(found)} seeds, fields {', '.join(f'`{name}`' for name in used)}; "
                      f"run on {results['date']} by `python docs/tables.py {name}`."])


def spread(values, signed=False):
    return figures({"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}, signed)


def read(run, name):
    path = Path(run) / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def figures(values, signed=False):
    return f"{values['mean']:{'+' if signed else ''}.4f} ± {values['sd']:.4f}"


def difference(values):
    """A paired difference: mean, sd over seeds, p of the paired t-test, bootstrap interval over the test rows."""
    text = figures(values, True)
    text += f", p {values['p']:.2g}" if values.get("p") is not None else ""
    return text + (" [{:+.4f}, {:+.4f}]".format(*values["interval"]) if values.get("interval") else "")


def results_table(run):
    """Markdown: what stages 02 to 04 of one run found, with seeds and versions."""
    results, dataset = read(run, "results.json"), read(run, "dataset.json")
    profiles, quantized = read(run, "profiles.json"), read(run, "quantize.json")
    if results is None or dataset is None or "date" not in results:
        fail(f"results.json or dataset.json is missing or too old ({run}); run the four stages with --run {run}")
    planted = any("share_of_planted_lift" in entry for entries in results["summary"].values() for entry in entries.values())
    lines = ["| model | ids | test AUC | logloss | AUC - none | AUC - random |" + (" planted lift regained |" if planted else ""),
             "|---|---|---|---|---|---|" + ("---|" if planted else "")]
    for model, entries in results["summary"].items():
        for ids, entry in entries.items():
            cells = [model.upper(), ids, figures(entry["test_auc"]), figures(entry["test_logloss"])]
            cells += [difference(entry[key]) if key in entry else "" for key in ("auc_minus_none", "auc_minus_random")]
            cells += [f"{entry['share_of_planted_lift']:.0%}"] if planted else []
            lines.append("| " + " | ".join(cells) + " |")
    lines.append(f"| constant | base rate | 0.5000 | {results['base_rate_logloss']:.4f} | | |" + (" |" if planted else ""))
    notes = []
    best = results["improvements"]
    if best and len(results["summary"]) > 1:
        gains = [f"{model} {entries['userip']['auc']:+.2%} (random {entries['random']['auc']:+.2%})" for model, entries in best["relative"].items()
                 if {"userip", "random"} <= entries.keys()]
        notes.append(f"Eq. 10 against the best baseline, {best['baseline']} at {best['test_auc']:.4f}: " + ", ".join(gains))
    if profiles and profiles["heldout_nll"]:
        notes.append("validation NLL per token " + ", ".join(f"{name} {value:.4f}" for name, value in profiles["heldout_nll"].items()))
    if quantized:
        usage = [f"{profile['name']} {profile['active']} codes, perplexity {profile['perplexity']:.2f}" for profile in quantized["profiles"]]
        notes.append("; ".join(usage))
        if "nmi_truth" in quantized:
            notes.append("NMI with the truth " + " / ".join(f"{value:.2f}" for value in quantized["nmi_truth"])
                         + ", across profiles " + " / ".join(f"{value:.4f}" for value in quantized["nmi_across"]))
    seeds = len({row["seed"] for row in results["rows"]})
    notes.append(f"mean ± sd of {seeds} seeds, fields `{results['fields']}`, data seed {dataset['seed']}; run on {results['date']}; "
                 + ", ".join(f"{name} {version}" for name, version in results["versions"].items()))
    return "\n".join([*lines, "", ". ".join(notes) + "."])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", default=["demo"], metavar="NAME",
                        help=f"{', '.join(DATA)}, or a study ({', '.join(STUDIES)}); NAME=DIR takes a finished run")
    parser.add_argument("--data-dir", type=lambda text: Path(text).resolve(), help="of the real data sets, for stage 01")
    parser.add_argument("--write", action="store_true", help="replace the tables in README.md instead of printing them")
    args = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    for item in args.tables:
        name, _, run = item.partition("=")
        if name in STUDIES and run:
            fail(f"a study runs in a folder of its own (docs/tables.py {item}); leave ={run} out")
        if not run and name not in DATA and name not in STUDIES:
            fail(f"no such table (docs/tables.py {name}); known: {', '.join([*DATA, *STUDIES])}")
        pattern = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.S)
        if args.write and not pattern.search(text):
            fail(f"no markers for the table {name} (README.md); add <!-- table {name} --> and <!-- end {name} -->")
        table = study_table(name, args.data_dir) if name in STUDIES else results_table(run or run_all(name, args.data_dir))
        if not args.write:
            print(f"{name}\n\n{table}\n")
            continue
        if name in DATA:
            (RESULTS / name).mkdir(parents=True, exist_ok=True)
            for source in (Path(run or ROOT / "runs" / name) / file for file in KEPT):
                if source.exists():  # a run with --ids none alone has no codes
                    shutil.copy(source, RESULTS / name / source.name)
        text = pattern.sub(lambda match, table=table: match[1] + table + "\n" + match[2], text)
        README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
