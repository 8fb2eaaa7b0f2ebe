"""Run the studies behind the tables of docs/RESULTS.md, and write the tables.

    python tools/tables.py demo demo7 --write          # run what is missing, write the tables
    python tools/tables.py ml-100k ml-100k-cold --data-dir PATH --write
    python tools/tables.py demo --again                # run it anew: after a change of the code

A repetition is one of everything that is random after the data: seed s makes the tiny LM, theta, the
codebooks, the random and shuffled codes and the recommenders: RECOMMENDERS are trained, and a repetition's
figures are their means (beside RecSysLLM the first one's). In a study of folds, seed s makes the split and
the cold users too. Studies of ONE_THETA repeat stages 03 and 04 alone, for 02 is dear there. A study is a
list of variants; where a variant's flags for stage 01 or 02 are None, it takes the artifacts of the same
repetition from the first variant, or from the first variant of the study that stands in FROM. Where
tools/baselines.py scores pairs by itself, its rows stand beside those of the recommender.

p: paired t-test over the repetitions; Holm: the same, corrected for all rows of the table that are no
controls; [ ]: 95% bootstrap interval, in which repetitions and users are drawn anew, a user once for all
repetitions.

Writes: runs/studies/NAME/VARIANT/s (run folders), docs/results/NAME.json (all that a table needs) and, with
        --write, docs/RESULTS.md
"""

import argparse
import datetime
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import controls
import numpy as np
import scipy.stats
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from stages import ROOT, common

CODE = ("01_prepare_data.py", "02_infer_profiles.py", "03_quantize.py", "04_train_ctr.py", "common.py",
        "tools/controls.py", "tools/baselines.py", "tools/lm_both.py", "tools/recsysllm.py",
        "tools/next_item.py")
PAGE = ROOT / "docs" / "RESULTS.md"
KEPT = ROOT / "docs" / "results"
MADE_BY = {1: ("dataset.json", "interactions.npy", "users.json", "items.json", "truth.npy"),
           2: ("profiles.npy", "profiles.json", "profiles_users.json", "space.pt", "lm-tiny")}
BOOTSTRAP = 400
RECOMMENDERS = 3  # trained in each repetition: their AUC on one inference has an sd of .002 to .015
NO_CLAIMS = ("none", "random", "shuffled", "planted", "metadata", "text", "hidden", "template", "generosity",
             "mf", "kar-text0", "matrix factorization of the same width", "rella, another user: 10 titles",
             "rella, recent: 0 titles")  # rows to be beaten; words is 03 --quantizer words, ours
RIVALS = ("metadata", "text", "hidden", "template", "words", "generosity", "mf", "kar", "kar-text",
          "pepler")  # of userip
ROWS = "none,random,shuffled,metadata,text,words,userip"


def variant(first, second, third="", controls="", fourth="", **more):
    """Flags of stages 01 to 04, the names for tools/controls.py and, if given, more of it.

    first, second: None for the first variant's artifacts. second and third None: no bank of codes; neither 02
    nor 03 is run, and nothing of 02 is taken. names: prompts in the place of the profiles'. words: if the
    profiles keep theirs. baselines: methods of tools/baselines.py. lm_both: if tools/lm_both.py is run on the
    first variant. source: a folder in the first variant that artifacts are taken from. once: controls that
    the first repetition makes for all, for they ask a large LLM. recsysllm: flags of tools/recsysllm.py.
    after: the variant whose stages this one shares. most: repetitions at most.
    """
    defaults = {"names": None, "words": True, "baselines": "", "lm_both": False, "source": None, "once": "",
                "recsysllm": None, "after": None, "most": None}
    return {"flags": (first, second, third, fourth), "controls": controls, **defaults, **more}


def own(third, fourth="--ids userip"):
    return variant(None, None, third, "", fourth)


def demo(flags):
    return {"default": variant(flags, "", "", "metadata text words", f"--ids {ROWS},planted")}


def baselines(fourth="--ids", tiny=""):
    """The paper's three LLM baselines beside ours, with an LM that reads both ways and with rated titles."""
    return {
        "default": variant(None, None, "", "metadata", f"{fourth} none,random,metadata,kar,kar-text,"
                           "kar-text0,pepler,userip", baselines="kar pepler"),
        "KAR's theta in our codebooks": variant(None, None, "--no-llm-loss", "", f"{fourth} userip",
                                                source="kar"),
        "an LM of both directions": variant(None, "--lm {first}/lm-both", "", "", f"{fourth} kar,kar-text,"
                                            "kar-text0,userip", lm_both=True, baselines="kar"),
        "rated titles": variant(None, f"{tiny} --history rated", "", "", f"{fourth} userip",
                                baselines="rella")}


NONSENSE = ("This user's zorp is", ". This user quells xans that are")  # prompts
ASKED = "text hidden words template"  # controls that ask a large LLM: made once, for all repetitions
REAL_ROWS = "--ids none,random,shuffled,metadata,text,hidden,template,words,userip,planted"


def real(first, second, third="--quantizer kmeans"):
    """A real LLM on a part of the demo."""
    return variant(first, second, third, f"metadata {ASKED}", REAL_ROWS, once=ASKED)


def ablation(second, words=True):
    """The same users and LLM under other flags of stage 02."""
    return variant(None, f"--lm smollm2 {second}", "--quantizer kmeans", "", "--ids userip", words=words)


def trained(flags, first="", second="", after=None, most=3):
    """RecSysLLM under these flags of its own, beside a DCN; second None: a DCN without codes alone."""
    if second is None:
        return variant(first, None, None, "", "--ids none", recsysllm=flags, after=after, most=most)
    return variant(first, second, "--no-llm-loss", "", "--ids none,userip", recsysllm=flags, after=after,
                   most=most)


ML = "--dataset ml-100k"
ATTRIBUTES = "--fields attributes --ids none,random,shuffled,metadata,text,generosity,words,userip"
COLD = "--fields ids+attributes --ids"
TINY = "--lm tiny --rank 32 --alpha 64 --lr 0.005 --epochs 20 --test-users 400 --rows 1500"
SMOL = "--lm smollm2 --lr 0.002 --epochs 4 --batch-size 8 --test-users 80 --rows 300"
FEW = "--lm smollm2 --lr 0.002 --epochs 4 --batch-size 8 --test-users 12 --rows 200"
STUDIES = {  # name: {variant: flags}
    "demo": demo(""), "demo7": demo("--seed 7"), "nosignal": demo("--signal 0"),
    "demo-models": {"default": variant(None, None, "", "", "--models all --ids none,random,shuffled,userip")},
    "demo-ablations": {
        "default": variant(None, None, "", "", "--ids none,random,userip,planted"),
        "without VQ: theta through a projection (Table 3)": own(
            "", "--ids random,shuffled,userip --profile-input embedding"),
        "plain k-means": own("--quantizer kmeans"), "no likelihood in the joint loss": own("--no-llm-loss"),
        "EM, codes as soft tokens": own("--assign likelihood"),
        "the words, asked": own("--quantizer words"), "the paper's literal settings": own("--paper"),
        "plain causal mask": variant(None, "--mask causal", fourth="--ids userip"),
        "k-means++ in place of the words": own("--start kmeans"),
        "all directions kept (paper)": variant(None, "--rank 0", fourth="--ids userip"),
        "all directions, fixed task prompt (paper)": variant(
            None, "--rank 0 --task-steps 0", fourth="--ids userip"),
        "the words' space": variant(None, "--space words --prior 1", fourth="--ids userip"),
        "fixed task prompt": variant(None, "--task-steps 0", fourth="--ids userip"),
        "rank 1": variant(None, "--rank 1", fourth="--ids userip"),
        "rank 4": variant(None, "--rank 4", fourth="--ids userip"),
        "rank 16": variant(None, "--rank 16", fourth="--ids userip"),
        "a prior": variant(None, "--prior 1", fourth="--ids userip"),
        "40 steps": variant(None, "--steps 40", fourth="--ids userip"),
        "history of all titles": variant(None, "--history all", fourth="--ids userip"),
        "nonsense profile names": variant("", "--lm {base}/lm-tiny", fourth="--ids userip",
                                          names=NONSENSE)},
    "demo-codes": {"K = 4,3": variant(None, None, "", "", "--ids none,random,userip,planted"), **{
        f"K = {sizes}": own(f"--codes {sizes}", "--ids none,random,userip")
        for sizes in ("2,3", "8,3", "16,3", "4,9", "4,27")}},
    "ml-100k": {"default": variant(ML, "--lm tiny", "", "metadata text generosity words",
                                   f"--ids {ROWS},generosity")},
    "ml-100k-attributes": {
        "liked titles": variant(None, None, "", "metadata text generosity words", ATTRIBUTES),
        "EM": own("--assign likelihood", "--fields attributes --ids userip"),
        "rated titles and a critic": variant(f"{ML} --critic", "--lm tiny --history rated", "", "",
                                             "--fields attributes --ids none,random,shuffled,userip")},
    "ml-100k-cold": {
        "liked titles": variant(f"{ML} --cold-users 0.2", "--lm tiny", "",
                                "metadata text generosity mf words", f"{COLD} {ROWS},generosity,mf"),
        "EM": own("--assign likelihood", f"{COLD} userip")},
    "ml-100k-cold-em": {
        "EM on 50 liked titles": variant(
            f"{ML} --cold-users 0.2", "--lm tiny --max-history 50", "--assign likelihood", "metadata",
            f"{COLD} none,random,shuffled,metadata,userip")},
    "ml-100k-cold-rated": {
        "rated titles and a critic": variant(
            f"{ML} --cold-users 0.2 --critic", "--lm tiny --history rated", "", "metadata generosity",
            f"{COLD} none,random,metadata,generosity,userip")},
    "real-demo": {
        "SmolLM2": real("--subsample-users 600", "--lm smollm2"),
        "SmolLM2, joint VQ": own("--no-llm-loss"),
        "SmolLM2, another world": real("--subsample-users 600 --seed 7", "--lm smollm2"),
        "Gemma": real("--subsample-users 600", "--lm gemma3-270m"),
        "Gemma, another world": real("--subsample-users 600 --seed 7", "--lm gemma3-270m")},
    "real-ablations": {
        "default": variant("--subsample-users 300", "--lm smollm2", "--quantizer kmeans", "",
                           "--ids none,random,userip,planted"),
        "all directions kept (paper)": ablation("--rank 0"),
        "all directions, fixed task prompt (paper)": ablation("--rank 0 --task-steps 0"),
        "fixed task prompt": ablation("--task-steps 0"),
        "the words' space": ablation("--space words --prior 1"),
        "words of the LLM itself": ablation("", words=False),
        "rank 1": ablation("--rank 1"), "rank 3": ablation("--rank 3"), "rank 16": ablation("--rank 16"),
        "a prior": ablation("--prior 1"), "1 step": ablation("--steps 1"), "6 steps": ablation("--steps 6")},
    "real-ml-100k": {
        "SmolLM2": variant(f"{ML} --cold-users 0.2", "--lm smollm2 --prior 1", "--quantizer kmeans",
                           "metadata text generosity",
                           f"{COLD} none,random,shuffled,metadata,text,generosity,userip"),
        "SmolLM2, joint VQ": own("--no-llm-loss", f"{COLD} userip"),
        "SmolLM2, theta itself": own("--quantizer kmeans", f"{COLD} userip --profile-input embedding")},
    "demo-baselines": baselines(), "ml-100k-baselines": baselines(tiny="--lm tiny"),
    "ml-100k-cold-baselines": baselines(COLD, "--lm tiny"),
    "recsysllm-demo": {
        "tiny LM": trained(TINY),
        "tiny LM, without training": trained(f"{TINY} --rank 0", after="tiny LM"),
        "tiny LM, no intra-positions": trained(f"{TINY} --no-intra", after="tiny LM"),
        "tiny LM, causal mask": trained(f"{TINY} --attention causal", after="tiny LM"),
        "SmolLM2": trained(SMOL, "--subsample-users 600", None, most=1),
        "SmolLM2, without training": trained(f"{SMOL} --rank 0", after="SmolLM2", most=1),
        "SmolLM2, no intra-positions": trained(f"{SMOL} --no-intra", after="SmolLM2", most=1),
        "SmolLM2, causal mask": trained(f"{SMOL} --attention causal", after="SmolLM2", most=1),
        "SmolLM2, causal mask, without training": trained(
            f"{SMOL} --attention causal --rank 0", after="SmolLM2", most=1)},
    "recsysllm-ml-100k": {
        "tiny LM": trained(TINY, ML, "--lm tiny", most=1),
        "tiny LM, without training": trained(f"{TINY} --rank 0", after="tiny LM", most=1),
        "tiny LM, no intra-positions": trained(f"{TINY} --no-intra", after="tiny LM", most=1),
        "tiny LM, causal mask": trained(f"{TINY} --attention causal", after="tiny LM", most=1),
        "SmolLM2": trained(FEW, f"{ML} --subsample-users 100", None, most=1),
        "SmolLM2, without training": trained(f"{FEW} --rank 0", after="SmolLM2", most=1)},
}
FROM = {"demo-models": "demo", "demo-ablations": "demo", "demo-codes": "demo", "demo-baselines": "demo",
        "ml-100k-attributes": "ml-100k", "ml-100k-baselines": "ml-100k",
        "ml-100k-cold-baselines": "ml-100k-cold"}
ONE_THETA = ("ml-100k", "ml-100k-attributes", "ml-100k-baselines", "real-demo", "real-ablations")
FOLDS = ("ml-100k-cold", "ml-100k-cold-em", "ml-100k-cold-rated", "ml-100k-cold-baselines",
         "real-ml-100k")  # of the data


# ---------------------------------------------------------------- run

def code_fingerprint():
    return common.fingerprint([(ROOT / name).read_text(encoding="utf-8") for name in CODE])


def call(script, run, flags, log, threads=1):
    """Run a script; its output goes to the log. A failure ends the study with its last line."""
    command = [sys.executable, script, "--run", str(run), *shlex.split(flags)]
    with open(log, "a", encoding="utf-8") as file:
        result = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if result.returncode:
        last = log.read_text(encoding="utf-8").strip().rsplit("\n", 1)[-1]
        raise common.UserError(f"{script} failed: {last.removeprefix('error: ')}", run, f"see {log}")


def settings_fingerprint(study, name, data_dir=None):
    """Of the flags that make a repetition of this variant, of those from which it takes artifacts, and of the
    names and sizes of the data's files."""
    own = STUDIES[study][name]
    sources = [next(iter(STUDIES[place].values())) for place in (study, FROM.get(study, study))]
    if own["after"]:
        sources.append(STUDIES[study][own["after"]])
    settings = [own, sources, RECOMMENDERS]
    if data_dir and any("--dataset" in (source["flags"][0] or "") for source in (own, *sources)):
        settings.append(sorted((path.name, path.stat().st_size) for path in Path(data_dir).glob("*")))
    return common.fingerprint(settings)


def marks_in(run):
    """What code.json and begun.json of a run folder say, where they are: {file: {"code", "settings"}}."""
    found = {}
    for path in (run / "code.json", run / "begun.json"):
        if path.exists():
            mark = json.loads(path.read_text(encoding="utf-8"))
            # An earlier version wrote the code alone.
            found[path.name] = mark if isinstance(mark, dict) else {"code": mark, "settings": None}
    return found


def codes_in(run):
    """Fingerprints of the code by which a run folder, and what it has from others, was made or begun."""
    found = set()
    for mark in marks_in(run).values():
        found |= {mark["code"], *mark.get("sources", ())}  # an earlier version wrote no sources
    return found


def when_made(runs):
    """{"date": the days on which these run folders were done, "code": fingerprints of their code}, texts."""
    days = set()
    fingerprints = set()
    for run in runs:
        days.add(datetime.date.fromtimestamp((run / "code.json").stat().st_mtime).isoformat())
        fingerprints |= {code[:12] for code in codes_in(run)}
    span = min(days) if len(days) == 1 else f"{min(days)} to {max(days)}"
    return {"date": span, "code": ", ".join(sorted(fingerprints))}


def repeat(study, name, seed, data_dir, threads=1):
    """One repetition of one variant, unless its results are there; threads: of a process.

    code.json stands for a repetition that is done, begun.json for one that was killed: the code with which it
    was begun, its settings and, when it is done, the code of the runs from which it has artifacts (sources).
    Where today's settings are others, it is made anew.
    """
    run = folder(study, name, seed)
    begun = run / "begun.json"
    mark = {"code": code_fingerprint(), "settings": settings_fingerprint(study, name, data_dir)}
    marks = marks_in(run)
    if any(other["settings"] != mark["settings"] for other in marks.values()):
        print(f"{run}: other flags made it, so it is made anew", file=sys.stderr)
        shutil.rmtree(run)
    elif "code.json" in marks:
        return
    run.mkdir(parents=True, exist_ok=True)
    if not begun.exists():
        common.save_json(begun, mark)
    settings = STUDIES[study][name]
    if settings["after"]:
        shared = folder(study, settings["after"], seed)
        not_shared = shutil.ignore_patterns("recsysllm.*", "epochs-*", "code.json", "begun.json", "log.txt")
        shutil.copytree(shared, run, dirs_exist_ok=True, ignore=not_shared)
        sources = codes_in(shared)
    else:
        sources = run_stages(study, name, seed, data_dir, threads)
    if settings["recsysllm"]:
        flags = f"{settings['recsysllm']} --seed {seed}"
        call("tools/recsysllm.py", run, flags, run / "log.txt", threads)
    common.save_json(run / "code.json", common.load(run, "begun.json") | {"sources": sorted(sources)})
    begun.unlink()


def run_stages(study, name, seed, data_dir, threads):
    """Stages 01 to 04 of a repetition, and what stands between them.

    Returns the fingerprints of the code of the runs from which it took artifacts.
    """
    sources = set()
    run = folder(study, name, seed)
    log = run / "log.txt"
    settings = STUDIES[study][name]
    origin = FROM.get(study, study)
    flags = settings["flags"]
    base = folder(origin, next(iter(STUDIES[origin])), seed)
    first_run = folder(study, next(iter(STUDIES[study])), seed)
    if study in ONE_THETA and seed and flags[1] is not None:
        base = folder(study, name, 0)
        flags = (None, None, *flags[2:])
    base = first_run / settings["source"] if settings["source"] else base
    has_bank = flags[2] is not None
    for number in (1, 2) if has_bank else (1,):
        if flags[number - 1] is not None:
            continue
        sources |= codes_in(base)
        for file in MADE_BY[number]:
            if (base / file).is_dir():
                shutil.copytree(base / file, run / file, dirs_exist_ok=True)
            elif (base / file).exists():
                shutil.copy(base / file, run / file)
    first = next(iter(STUDIES[origin].values()))["flags"][0]
    if flags[0] is not None:
        words = flags[0] if flags[0] == first else f"{first} {flags[0]}"
        words += f" --data-dir {shlex.quote(str(data_dir))}" if data_dir and "--dataset" in words else ""
        call("01_prepare_data.py", run, f"{words} --seed {seed}" if study in FOLDS else words, log, threads)
    if settings["names"] or not settings["words"]:
        change_profiles(run, settings["names"], settings["words"])
    if flags[1] is not None:
        if settings["lm_both"]:
            sources |= codes_in(first_run)
            call("tools/lm_both.py", first_run, f"--seed {seed}", log, threads)
        if "--lm" not in flags[1] and (base / "lm-tiny").exists():  # the same LM if its text is the same
            shutil.copytree(base / "lm-tiny", run / "lm-tiny", dirs_exist_ok=True)
            sources |= codes_in(base)
        words = flags[1].format(base=shlex.quote(str(base)), first=shlex.quote(str(first_run)))
        call("02_infer_profiles.py", run, f"{words} --seed {seed}", log, threads)
    if has_bank:
        call("03_quantize.py", run, f"{flags[2]} --seed {seed}", log, threads)
    controls = settings["controls"].split()
    if seed and study in ONE_THETA:
        for control in settings["once"].split():
            controls.remove(control)
            for path in folder(study, name, 0).glob(f"feature_bank_{control}.*"):
                shutil.copy(path, run / path.name)
            sources |= codes_in(folder(study, name, 0))
    if controls:
        call("tools/controls.py", run, f"{' '.join(controls)} --seed {seed}", log, threads)
    for method in settings["baselines"].split():
        call("tools/baselines.py", run, f"{method} --seed {seed}", log, threads)
    call("04_train_ctr.py", run, f"{flags[3]} --seed {seed} --seeds {RECOMMENDERS}", log, threads)
    return sources


def change_profiles(run, names, keeps_words):
    """Give the profiles of a prepared run other prompts, or take their words from them."""
    facts = common.load(run, "dataset.json")
    dataset = common.load_dataset(run)
    for m, profile in enumerate(dataset.profiles):
        if names:
            profile["prompt"] = names[m]
        if not keeps_words:
            profile["words"] = {}
    facts |= {"profiles": dataset.profiles, "fingerprint": dataset.fingerprint()}
    common.save_json(run / "dataset.json", facts)


def folder(study, name, seed):
    return ROOT / "runs" / "studies" / study / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") / str(seed)


def look_for_old_runs(study, again):
    """Say which runs are older than the code; with `again`, forget the study's own."""
    if again:
        shutil.rmtree(ROOT / "runs" / "studies" / study, ignore_errors=True)
    code = code_fingerprint()
    for place in dict.fromkeys((study, FROM.get(study, study))):  # what it takes from another study, too
        old = 0
        for run in (ROOT / "runs" / "studies" / place).glob("*/*"):
            old += bool(codes_in(run) - {code})
        if old:
            print(f"WARNING: {old} runs of {place} are older than the code; {place} --again makes them "
                  "anew", file=sys.stderr)


def repetitions_of(study, name, seeds):
    """Numbers of a variant's repetitions."""
    return range(min(seeds, STUDIES[study][name]["most"] or seeds))


def run_study(study, seeds, jobs, data_dir, again):
    """All repetitions of all variants, `jobs` side by side; a repetition's first variant before others."""
    look_for_old_runs(study, again)
    origin = FROM.get(study, study)
    first, *others = STUDIES[study]
    alone = [name for name in others if not STUDIES[study][name]["after"]]
    after = [name for name in others if STUDIES[study][name]["after"]]
    threads = max(1, os.cpu_count() // jobs)
    stopped = threading.Event()  # after a failure or Ctrl-C: what has not begun is not to begin

    def attempt(place, name, seed):
        if stopped.is_set():
            return
        try:
            repeat(place, name, seed, data_dir, threads)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(jobs) as pool:
        # Each wave takes artifacts from those before it; of one theta, from the first repetition.
        waves = ((origin, list(STUDIES[origin])[:1]), (study, [first]), (study, alone), (study, after))
        for place, names in waves:
            for is_first in (True, False):
                wave = []
                for name in names:
                    for seed in repetitions_of(place, name, seeds):
                        if (seed == 0) == is_first:
                            wave.append(pool.submit(attempt, place, name, seed))
                try:
                    for repetition in wave:
                        repetition.result()
                except BaseException:
                    stopped.set()
                    raise


# ---------------------------------------------------------------- figures

def weighted_auc(ranks, labels, weights):
    """AUC with a weight for each row; ranks: dense integer rank of each row's score, ties alike."""
    positive = np.bincount(ranks, weights * labels)
    negative = np.bincount(ranks, weights * (1 - labels))
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / (positive.sum() * negative.sum()))


def bootstrap(repetitions, seed=0):
    """95% interval of the mean over repetitions of AUC(first) - AUC(second), users and repetitions resampled.

    repetitions: a list of (users, labels, first, second), arrays over the n evaluated rows; first and second
    may be scores of several recommenders, (k, n), the mean of whose AUCs is taken. None where most resamples
    hold one class alone. Note: a user is drawn for all repetitions alike. They often have the same rows, and
    which users these are is then one chance, which does not shrink with more repetitions.
    """
    def mean_auc(ranks, labels, weights):
        return np.mean([weighted_auc(of_one, labels, weights) for of_one in ranks])

    rng = np.random.default_rng(seed)
    prepared = []
    differences = []
    everybody = np.unique(np.concatenate([users for users, *_ in repetitions]))
    for users, labels, first, second in repetitions:
        users = np.searchsorted(everybody, users)
        both = []
        for scores in (first, second):
            both.append([np.unique(of_one, return_inverse=True)[1] for of_one in np.atleast_2d(scores)])
        prepared.append((users, np.asarray(labels), *both))
    for _ in range(BOOTSTRAP):
        found = []
        drawn = rng.integers(len(everybody), size=len(everybody))
        times_drawn = np.bincount(drawn, minlength=len(everybody)).astype(float)
        for at in rng.integers(len(prepared), size=len(prepared)):
            users, labels, first, second = prepared[at]
            weights = times_drawn[users]  # of each row
            if 0 < (weights * labels).sum() < weights.sum():
                found.append(mean_auc(first, labels, weights) - mean_auc(second, labels, weights))
        differences += [np.mean(found)] if found else []
    return np.quantile(differences, (0.025, 0.975)).tolist() if len(differences) > BOOTSTRAP // 2 else None


def holm(p_values):
    """Holm's correction of a list of p values (None stays None)."""
    known = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    corrected = list(p_values)
    largest = 0.0
    for place in range(len(known)):
        p, at = known[place]
        largest = max(largest, min(1.0, p * (len(known) - place)))
        corrected[at] = largest
    return corrected


def improvements(entries):
    """Eq. (10) against the model that is best without ids: {model: {ids: share by which AUC - .5 is larger}}.

    entries: {(model, ids): mean AUC}. None where no baseline beats chance.
    """
    baselines = {model: auc for (model, ids), auc in entries.items() if ids == "none"}
    best = max(baselines, key=baselines.get, default=None)
    if best is None or baselines[best] <= 0.5:
        return None
    relative = {}
    for pair, auc in entries.items():
        model, ids = pair
        if ids not in ("none", "planted"):
            relative.setdefault(model, {})[ids] = (auc - 0.5) / (baselines[best] - 0.5) - 1
    return {"baseline": best, "test_auc": baselines[best], "relative": relative}


def is_recsysllm(study):
    """Is it a study of tools/recsysllm.py, whose tables are others?"""
    return any(settings["recsysllm"] for settings in STUDIES[study].values())


RANKING = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10")


def collect_recsysllm(study, seeds):
    """Everything that a table of RecSysLLM needs: of each variant the repetitions' recsysllm.json."""
    found = {}
    flags = {}
    runs = []
    for name, settings in STUDIES[study].items():
        flags[name] = settings["recsysllm"]
        found[name] = []
        for seed in repetitions_of(study, name, seeds):
            runs.append(folder(study, name, seed))
            found[name].append(common.load(runs[-1], "recsysllm.json"))
    return {"study": study, "variants": found, "flags": flags, **when_made(runs)}


def table_recsysllm(data):
    """Markdown from what collect_recsysllm() found: rows of each variant, and once of its rivals."""
    titles = ["LM and variant", "row", *(metric.upper() for metric in RANKING), "AUC", "GAUC"]
    lines = [titles]
    costs = []
    rivals_shown = set()
    for name, runs in data["variants"].items():
        rows = {}
        for kind in ("next_item", "rating"):
            for row in runs[0][kind]:
                rows.setdefault(row, {})[kind] = [run[kind][row] for run in runs]
        for row, kinds in rows.items():
            is_rival = not row.startswith("RecSysLLM")
            if is_rival and name.split(",")[0] in rivals_shown:
                continue
            line = [name.split(",")[0] if is_rival else name, row.removeprefix("RecSysLLM, ")]
            for kind, metrics in (("next_item", RANKING), ("rating", ("auc", "gauc"))):
                for metric in metrics:
                    values = [figures[metric] for figures in kinds.get(kind, ())]
                    line.append(spread(values) if values else "")
            lines.append(line)
        rivals_shown.add(name.split(",")[0])
        answers = []
        for kind, what in (("next_item", "a next item"), ("rating", "a verdict")):
            figures = runs[0][kind]["RecSysLLM, seen wording"]
            answers.append(f"{figures['passes']:.0f} passes and {figures['seconds']:.2f} s {what}")
        first = runs[0]
        costs.append(f"{name}: {first['trained_parameters']:,d} parameters trained in "
                     f"{np.mean([run['seconds'] for run in runs]):.0f} s; {', '.join(answers)}; "
                     f"{first['users']} users, {first['items']} items, {first['rows']} rows, repetitions: "
                     f"{len(runs)}; `tools/recsysllm.py {data['flags'][name]}`")
    body = ["| " + " | ".join(line) + " |" for line in lines]
    notes_below = [*costs, f"`python tools/tables.py {data['study']}` on {when_of(data)}"]
    return "\n".join([body[0], "|---" * len(titles) + "|", *body[1:], "",
                      *(f"- {line}." for line in notes_below)])


def collect(study, seeds):
    """Everything a table needs, from the run folders: a JSON-able dict."""
    rows = []
    runs = {}
    costs = {}
    both = []
    for name, seed in itertools.product(STUDIES[study], range(seeds)):
        run = folder(study, name, seed)
        results = common.load(run, "results.json")
        runs[name, seed] = results
        quantized = common.load(run, "quantize.json")
        profiles = common.load(run, "profiles.json")
        for row in mean_rows(results["rows"]):
            rows.append({**row, "variant": name, "seed": seed})
        if len(results["rows"]) and "userip" in {row["ids"] for row in results["rows"]}:
            rows[-1] |= {"health": {
                "perplexity": [profile["perplexity"] for profile in quantized["profiles"]],
                "nmi": quantized.get("nmi_truth"), "heldout_nll": profiles["heldout_nll"]}}
        if STUDIES[study][name]["lm_both"]:
            lm = common.load(folder(study, next(iter(STUDIES[study])), seed if study not in ONE_THETA else 0)
                             / "lm-both", "tiny.json")
            both.append(lm["both"])
        if STUDIES[study][name]["baselines"]:
            passes = profiles["steps"] + 1
            if quantized["quantizer"] == "vq" and quantized["llm_loss"]:
                passes += quantized["epochs"]  # stage 03's joint loss asks the LLM, too
            costs.setdefault(f"userip ({name})", []).append((passes, "user", profiles["seconds"]))
        for method in STUDIES[study][name]["baselines"].split():
            for row in common.load(run, f"baselines_{method}.json")["rows"]:
                costs.setdefault(f"{row['ids']} ({name})", []).append(
                    (row["lm_passes"] / row["of"], row["unit"], row["seconds"]))
                if "test_auc" in row:  # scores of its own
                    rows.append({**row, "variant": name, "seed": seed, "model": rows[-1]["model"]})
    first = next(iter(STUDIES[study]))
    metric = "cold" if "cold_auc" in rows[0] else "test"
    counts = set()
    for results in runs.values():
        counts.add(len({row["seed"] for row in results["rows"]}))
    if len(counts) > 1:
        raise common.UserError(f"its runs have different numbers of recommenders: {sorted(counts)}", study,
                               "run it anew with --again")
    recommenders, = counts
    warn_of_mixture(study, runs)
    base_rates = {}
    for name in STUDIES[study]:
        of_runs = [base_rate_logloss(folder(study, name, seed), metric) for seed in range(seeds)]
        base_rates[name] = float(np.mean(of_runs))
    return {"study": study, "metric": metric, "rows": rows, "base_rate_logloss": base_rates,
            "intervals": intervals(study, rows, seeds, metric, recommenders),
            "stability": stability(study, seeds),
            "lm_both": mean_of_all(both), "costs": mean_costs(costs), "banks": what_banks_say(study),
            "versions": runs[first, 0]["versions"], "fields": runs[first, 0]["fields"],
            "recommenders": recommenders,
            "user_dropout": runs[first, 0]["user_dropout"],
            **when_made(folder(study, name, seed) for name, seed in runs)}


def when_of(data):
    """When a table's runs were done, and, if not with one, with how many versions of the code."""
    count = len(data["code"].split(","))
    return data["date"] + f", with {count} versions of the code" * (count > 1)


def warn_of_mixture(study, runs):
    """A WARNING where these runs are of several versions of a library, or of several number formats."""
    formats = {}  # those of each LLM, for a study may have several LLMs
    for name, seed in runs:
        facts = common.load(folder(study, name, seed), "profiles.json")
        formats.setdefault(facts.get("lm"), set()).add(str(facts.get("dtype")))
    versions = {json.dumps(results["versions"], sort_keys=True) for results in runs.values()}
    if len(versions) > 1 or any(len(found) > 1 for found in formats.values()):
        all_formats = sorted(set().union(*formats.values()))
        print(f"WARNING: {study}: its runs are of {len(versions)} sets of versions and of the number formats "
              f"{', '.join(all_formats)}; the table names the first's", file=sys.stderr)


def what_banks_say(study):
    """{variant: {ids: {"nmi": of each profile, "heldout_nll", "heldout_error"}}} of the controls' banks.

    All of the first repetition. nmi: with the planted truth, of banks with a column for each profile; of text
    and hidden that of their last column, which has as many codes as the first profile, with each profile.
    heldout_nll, heldout_error: of asking, see nll_of_words() in tools/controls.py.
    """
    found = {}
    for name in STUDIES[study]:
        run = folder(study, name, 0)
        truth = common.load_truth(run)
        found[name] = {}
        for path in sorted(run.glob("feature_bank_*.npy")):
            ids = path.stem.removeprefix("feature_bank_")
            card = common.load(run, f"{path.stem}.json", ("codes",))
            said = {key: card[key] for key in ("heldout_nll", "heldout_error") if card.get(key)}
            has_columns = truth is not None and len(card["codes"]) == truth.shape[1]
            if has_columns and (ids in ("text", "hidden") or
                                card["codes"] == common.load(run, "quantize.json", ("codes",))["codes"]):
                said["nmi"] = nmi_of_bank(np.load(path), card["codes"], truth, ids in ("text", "hidden"))
            if said:
                found[name][ids] = said
    return found


def nmi_of_bank(bank, codes, truth, by_last_column):
    """NMI of a bank's columns, or of its last one, with each profile's planted values (U, M)."""
    nmi = []
    for m, planted in enumerate(truth.T):
        column = len(codes) - 1 if by_last_column else m
        known = bank[:, column] < codes[column]
        nmi.append(normalized_mutual_info_score(planted[known], bank[known, column]))
    return nmi


def mean_rows(rows):
    """One row for each model and name of ids: means over its recommenders (best_epoch is the first one's)."""
    found = {}
    for row in rows:
        found.setdefault((row["model"], row["ids"]), []).append(row)
    means = []
    for some in found.values():
        row = dict(some[0])
        for key, value in row.items():
            if isinstance(value, float):
                row[key] = float(np.mean([other[key] for other in some]))
        means.append(row)
    return means


def mean_of_all(both):
    """{LM: {what: {profile: nats}}}, means over a list of such dicts."""
    if not both:
        return {}
    means = {}
    for lm, by_what in both[0].items():
        means[lm] = {}
        for what, lost in by_what.items():
            means[lm][what] = {}
            for profile in lost:
                means[lm][what][profile] = float(np.mean([some[lm][what][profile] for some in both]))
    return means


def mean_costs(costs):
    """{name: [unit, forward passes, seconds]}, means over lists of (passes, unit, seconds)."""
    means = {}
    for name, found in costs.items():
        passes = np.mean([passes for passes, _, _ in found])
        seconds = np.mean([seconds for _, _, seconds in found])
        means[name] = [found[0][1], passes, seconds]
    return means


def base_rate_logloss(run, metric):
    """Logloss of a constant, the share of likes in training, on the rows that the table evaluates."""
    dataset = common.load_dataset(run)
    labels = dataset.rows(common.COLD if metric == "cold" else common.TEST)[:, 2]
    return common.logloss(labels, np.full(len(labels), dataset.rows(common.TRAIN)[:, 2].mean()))


def references_of(rows, metric):
    """What differences are taken to: none, and random or, for cold users, clusters of attributes."""
    has_metadata = any(row["ids"] == "metadata" for row in rows)
    return ("none", "metadata") if has_metadata and metric == "cold" else ("none", "random")


def intervals(study, rows, seeds, metric, recommenders):
    """{"variant|model|ids": {control: interval}} for the rows that claim something."""
    first = next(iter(STUDIES[study]))
    found = {}
    split, ending = (common.COLD, "-cold") if metric == "cold" else (common.TEST, "")

    def scores(name, model, ids, seed):
        predictions = folder(study, name, seed) / "predictions"
        return np.stack([np.load(predictions / f"{model}-{ids}-{number}{ending}.npy")
                         for number in range(recommenders)])

    for name, model, ids in dict.fromkeys((row["variant"], row["model"], row["ids"]) for row in rows):
        if ids in NO_CLAIMS or not (folder(study, name, 0) / "predictions" / f"{model}-{ids}-0.npy").exists():
            continue  # scores of tools/baselines.py are not kept by the row
        for control in references_of(rows, metric):
            repetitions = []
            for seed in range(seeds):
                run = folder(study, name, seed)
                where = name if (run / "predictions" / f"{model}-{control}-0.npy").exists() else first
                dataset = common.load_dataset(run)
                users, _, labels = dataset.rows(split).T
                raw_ids = np.array(dataset.users)[users]  # the same in all repetitions
                repetitions.append((raw_ids, labels, scores(name, model, ids, seed),
                                    scores(where, model, control, seed)))
            found.setdefault(f"{name}|{model}|{ids}", {})[control] = bootstrap(repetitions)
    return found


def stability(study, seeds):
    """Per variant and profile: adjusted MI of two repetitions' codes, mean over pairs; None for folds."""
    if study in FOLDS or seeds < 2:
        return None
    found = {}
    for name in STUDIES[study]:
        banks = [np.load(folder(study, name, seed) / "feature_bank.npy") for seed in range(seeds)]
        pairs = list(itertools.combinations(banks, 2))
        found[name] = []
        for m in range(banks[0].shape[1]):
            agreed = [adjusted_mutual_info_score(one[:, m], other[:, m]) for one, other in pairs]
            found[name].append(float(np.mean(agreed)))
    return found


# ---------------------------------------------------------------- tables

def spread(values, sign=""):
    """'mean ± sd'; a single value has no sd."""
    mean = f"{np.mean(values):{sign}.4f}"
    return f"{mean} ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else mean


def differences_of(cells, references, metric):
    """{((variant, model, ids), control): AUC of the row minus its control's, a list over the repetitions}."""
    first = next(iter(cells))[0]
    found = {}
    for key, by_seed in cells.items():
        name, model, ids = key
        for control in references:
            other = cells.get((name, model, control)) or cells[first, model, control]
            if ids != control:
                found[key, control] = [row[f"{metric}_auc"] - other[seed][f"{metric}_auc"]
                                       for seed, row in by_seed.items()]
    return found


def p_value(values):
    """Of the paired t-test, whether the mean is 0; None where it says nothing."""
    if len(values) < 2 or np.ptp(values) < 1e-12:  # equal, but for rounding
        return None
    return float(scipy.stats.ttest_1samp(values, 0).pvalue)


def compared(values, p, corrected, interval):
    """A difference with all that says whether it is one."""
    text = spread(values, "+")
    text += f", p {p:.2g}" if p is not None else ""
    text += f" (Holm {corrected:.2g})" if corrected is not None else ""
    return text + (" [{:+.4f}, {:+.4f}]".format(*interval) if interval else "")


def table(data):
    """Markdown from what collect() found."""
    metric = data["metric"]
    cells = {}
    for row in data["rows"]:
        cells.setdefault((row["variant"], row["model"], row["ids"]), {})[row["seed"]] = row
    first = next(iter(cells))[0]
    many = len({model for _, model, _ in cells}) > 1
    references = references_of(data["rows"], metric)
    differences = differences_of(cells, references, metric)
    p_values = {key: p_value(values) for key, values in differences.items()}
    claims = [key for key in p_values if key[0][2] not in NO_CLAIMS]
    corrected = dict(zip(claims, holm([p_values[key] for key in claims])))
    shown = {f"{metric}_auc": "AUC", f"{metric}_gauc": "GAUC", f"{metric}_logloss": "logloss"}
    shown |= {"test_auc": "warm AUC"} if metric == "cold" else {}
    model_column = ["model"] if many else []
    titles = [*model_column, "ids", *shown.values(), *(f"AUC - {control}" for control in references)]
    lines = [titles]
    for key, by_seed in cells.items():
        name, model, ids = key
        line = [model] if many else []
        line.append(ids if name == first else f"{ids}: {name}")
        for value in shown:
            line.append(spread([row[value] for row in by_seed.values()]))
        for pair in ((key, control) for control in references):
            interval = data["intervals"].get("|".join(key), {}).get(pair[1])
            line.append(compared(differences[pair], p_values[pair], corrected.get(pair), interval)
                        if pair in differences else "")
        lines.append(line)
    shown_rates = set()
    for name, rate in data["base_rate_logloss"].items():
        if rate not in shown_rates:  # a variant of other rows has another one
            what = "constant: base rate" + ("" if name == first else f": {name}")
            lines.append([*("" for _ in model_column), what, "0.5000", "0.5000", f"{rate:.4f}"])
            shown_rates.add(rate)
    body = []
    for line in lines:
        line += ["" for _ in titles[len(line):]]
        body.append("| " + " | ".join(line) + " |")
    return "\n".join([body[0], "|---" * len(titles) + "|", *body[1:], "", notes(data, cells)])


def notes(data, cells):
    """What stands below a table: repetitions, codes, likelihoods, versions."""
    seeds = len({row["seed"] for row in data["rows"]})
    found = []
    first = data["rows"][0]["variant"]
    means = {}
    for cell, by_seed in cells.items():
        name, model, ids = cell
        if name == first:
            means[model, ids] = np.mean([row["test_auc"] for row in by_seed.values()])
    many = len({model for model, _ in means}) > 1
    best = improvements(means) if many else None
    if best:
        gains = ", ".join(f"{model} {gain['userip']:+.2%} (random {gain['random']:+.2%})"
                          for model, gain in best["relative"].items())
        found.append(f"Eq. (10) against the best baseline, {best['baseline']} at {best['test_auc']:.4f}: "
                     + gains)
    found += shares_of_lift(cells)
    for name in dict.fromkeys(row["variant"] for row in data["rows"]):
        health = [row["health"] for row in data["rows"] if row["variant"] == name and "health" in row]
        if health:
            found.append(f"{name}: " + health_of(health, data["stability"] and data["stability"][name]))
    found += against_rivals(cells, data["metric"])
    found += lines_of_banks(data.get("banks", {}))
    if data.get("costs"):
        found.append("Cost in forward passes of the LM (pepler's go back as often, userip's once less; "
                     "without the task prompt), and seconds (userip's are stage 02's): " + "; ".join(
            f"{name} {passes:.1f} a {unit}, {seconds:.0f} s"
            for name, (unit, passes, seconds) in data["costs"].items()))
    for lm, by_what in data.get("lm_both", {}).items():
        texts = []
        for what, lost in by_what.items():
            texts.append(f"{what}: " + ", ".join(f"{name} {value:.2f}" for name, value in lost.items()))
        found.append(f"{lm}, nats a token lost under " + "; ".join(texts))
    kind = "folds" if data["study"] in FOLDS else "repetitions"
    kind += " of stages 03 and 04 on one θ" * (data["study"] in ONE_THETA)
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    recommenders = data.get("recommenders", 1)
    kind += f" with {recommenders} recommenders each" * (recommenders > 1)
    found.append("mean ± sd of " * (seeds > 1) + f"{seeds} {kind}, fields `{data['fields']}`, user dropout "
                 f"{data['user_dropout']}; `python tools/tables.py {data['study']} --seeds {seeds}` on "
                 f"{when_of(data)}, {versions}")
    return "\n".join(f"- {line}." for line in found)


def shares_of_lift(cells):
    """A line for each variant that has the planted truth: how much of its lift in AUC over none rows have."""
    lines = []
    first = next(iter(cells))[0]
    for name in dict.fromkeys(name for name, _, _ in cells):
        auc = {}
        for (variant, model, ids), by_seed in cells.items():
            if (variant, model) == (name, "dcn"):
                auc[ids] = np.mean([row["test_auc"] for row in by_seed.values()])
        lift = auc.get("planted", 0) - auc.get("none", 1)
        if lift > 0.01:  # a share of no lift says nothing (--signal 0)
            shares = [f"{ids} {(value - auc['none']) / lift:.0%}" for ids, value in auc.items()
                      if ids not in ("none", "planted")]
            whose = "" if name == first else f"{name}: "
            lines.append(f"{whose}Share of the planted lift: " + ", ".join(shares))
    return lines


def lines_of_banks(banks):
    """A line for each variant whose controls were compared with the planted truth, or asked."""
    lines = []
    for name, by_ids in banks.items():
        texts = []
        for ids, said in by_ids.items():
            if "nmi" in said:
                texts.append(f"{ids} " + " / ".join(f"{value:.2f}" for value in said["nmi"]))
        text = "NMI with the truth: " + ", ".join(texts) if texts else ""
        words = by_ids.get("words", {})
        if "heldout_nll" in words:
            text += ("; " if text else "") + f"validation NLL of asking: {controls.said_of_words(words)}"
        if text:
            lines.append(f"{name}, first repetition: {text}")
    return lines


def against_rivals(cells, metric):
    """A line for each variant in which userip has rivals beside it: AUC of userip minus that of each."""
    lines = []
    for cell, by_seed in cells.items():
        name, model, ids = cell
        others = {other: cells[name, model, other] for other in RIVALS if (name, model, other) in cells}
        if ids == "userip" and others:
            found = []
            for other, rows in others.items():
                values = [row[f"{metric}_auc"] - rows[seed][f"{metric}_auc"] for seed, row in by_seed.items()]
                found.append(f"{other} {compared(values, p_value(values), None, None)}")
            lines.append(f"{name}: AUC of userip minus that of " + "; ".join(found))
    return lines


def health_of(health, stability):
    """How codes and likelihoods of a variant look, means over its repetitions."""
    def listed(values):
        return " / ".join(f"{value:.2f}" for value in values)

    text = "perplexity " + listed(np.mean([entry["perplexity"] for entry in health], axis=0))
    if health[0]["nmi"]:
        text += ", NMI with the truth " + listed(np.mean([entry["nmi"] for entry in health], axis=0))
    if health[0]["heldout_nll"]:
        means = {}
        for key in health[0]["heldout_nll"]:
            means[key] = np.mean([entry["heldout_nll"][key] for entry in health])
        text += ", validation NLL " + " / ".join(f"{key} {value:.4f}" for key, value in means.items())
    return text + (f", adjusted MI between two repetitions' codes {listed(stability)}" if stability else "")


def markers(study):
    """(text of the page, pattern of a study's place in it). Raises UserError where there is none."""
    page = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- table {re.escape(study)} -->\n).*?(<!-- end {re.escape(study)} -->)", re.S)
    if not pattern.search(page):
        raise common.UserError(f"no markers for {study}", PAGE,
                               f"add <!-- table {study} --> and <!-- end {study} -->")
    return page, pattern


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("studies", nargs="+", metavar="NAME", help=f"of {', '.join(STUDIES)}")
    parser.add_argument("--seeds", type=common.at_least(1), help="repetitions (default: 5)")
    parser.add_argument("--jobs", type=common.at_least(1), help="side by side (default: the cores)")
    parser.add_argument("--data-dir", type=lambda text: Path(text).resolve(),
                        help="of the real data sets, for stage 01")
    parser.add_argument("--again", action="store_true", help="run a study anew")
    parser.add_argument("--kept", action="store_true", help="run nothing: tables from docs/results")
    parser.add_argument("--write", action="store_true", help="put the tables in docs/RESULTS.md, print none")
    parser.error = lambda text: common.fail(f"error: {text} (tools/tables.py); see: tools/tables.py --help")
    args = parser.parse_args()
    needs_runs = [f"--{key}" for key in ("again", "seeds", "jobs", "data_dir") if getattr(args, key)]
    if args.kept and needs_runs:
        parser.error(f"--kept runs nothing: leave out {needs_runs[0].replace('_', '-')}")
    seeds = args.seeds or 5
    for study in args.studies:  # all that can be said at once, before hours of work
        if study not in STUDIES:
            raise common.UserError(f"no such table: {study}", "tools/tables.py",
                                   f"known: {', '.join(STUDIES)}")
        if args.kept and not (KEPT / f"{study}.json").exists():
            raise common.UserError(f"{study}.json is missing", KEPT, f"run: python tools/tables.py {study}")
        if args.write:
            markers(study)
    for study in args.studies:
        gather, draw = (collect_recsysllm, table_recsysllm) if is_recsysllm(study) else (collect, table)
        if not args.kept:
            run_study(study, seeds, args.jobs or os.cpu_count(), args.data_dir, args.again)
            common.save_json(KEPT / f"{study}.json", gather(study, seeds))
        text = draw(common.load(KEPT, f"{study}.json"))
        if args.write:
            page, pattern = markers(study)
            page = pattern.sub(lambda match, text=text: match[1] + text + "\n" + match[2], page)
            with common.atomic(PAGE) as temporary:
                temporary.write_text(page, encoding="utf-8")
        else:
            print(f"{study}\n\n{text}\n")


if __name__ == "__main__":
    common.guarded(main)
