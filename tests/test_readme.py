"""The README speaks of what is there."""

import importlib
import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, call_stage, copy_run, load_script, ok, run_stage
from test_prepare import write_ml_100k

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = ["01_prepare_data.py", "02_infer_profiles.py", "03_quantize.py", "04_train_ctr.py"]


def test_every_flag_it_names_exists():
    foreign = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--ntasks-per-node", "--help"}  # torchrun's, argparse's
    others = ["docs/explain.py", "docs/tables.py", "docs/figures.py", "tests/bench_infer.py", "tests/bench_ctr.py", "tests/bench_serving.py"]
    offered = "".join(ok(run_stage(name, "--help")).stdout for name in (*SCRIPTS, *others))
    missing = [flag for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", TEXT)) - foreign if not re.search(rf"{flag}[\s,\]]", offered)]
    assert not missing


def test_every_deviation_has_its_row_and_its_mark():
    marked = set(re.findall(r"DEVIATION\((\d+)\)", "".join((ROOT / name).read_text() for name in (*SCRIPTS, "common.py"))))
    section = TEXT[TEXT.index("## Differences"):TEXT.index("## Symbols")]
    assert marked == set(re.findall(r"^\| (\d+) \|", section, re.M))


def test_every_name_of_the_symbol_table_exists():
    sources = "".join((ROOT / name).read_text() for name in (*SCRIPTS, "common.py"))
    table = TEXT[TEXT.index("## Symbols"):TEXT.index("## Swap")]
    names = [name for cell in re.findall(r"^\|[^|]*\|([^|]*)\|", table, re.M) for name in re.findall(r"`(\w+)", cell)]
    assert len(names) > 10 and all(re.search(rf"\b{name}\b", sources) for name in names)


def test_the_commands_it_shows_run(tmp_path, monkeypatch):
    """Every line of its bash blocks that calls a script, in their order and from one folder, with short settings added."""
    small = {"01_prepare_data": ["--subsample-users", 100], "02_infer_profiles": ["--tiny-sentences", 320, "--steps", 2],
             "03_quantize": ["--epochs", 1, "--warm-up", 1], "04_train_ctr": ["--seeds", 1, "--epochs", 2]}
    rng = np.random.default_rng(0)
    rated = [(u, i, rng.integers(1, 6), 1000 * u + rng.integers(900)) for u in range(1, 61) for i in rng.choice(np.arange(1, 31), 12, replace=False)]
    write_ml_100k(tmp_path / "ml-100k", rated, [f"Film {i} ({1930 + 2 * i})" for i in range(30)])
    (tmp_path / "r.csv").write_text("who,what,stars\n" + "".join(f"{u},{i},{stars}\n" for u, i, stars, _ in rated))
    (tmp_path / "i.csv").write_text("what,name,genre\n" + "".join(f"{i},Film {i},genre {i % 3}\n" for i in range(1, 31)))
    monkeypatch.chdir(tmp_path)
    blocks = "".join(re.findall(r"```bash\n(.*?)```", TEXT, re.S))
    lines = [line.split(" #")[0].split() for line in blocks.split("\n") if line.startswith("python ")]
    assert len(lines) >= 15
    for _, script, *flags in lines:
        name = script.removesuffix(".py")
        module = load_script(name.removeprefix("docs/")) if "/" in name else importlib.import_module(name)
        if "--user" in flags:  # one of the smaller world's
            flags[flags.index("--user") + 1] = json.loads((tmp_path / "runs/demo/users.json").read_text())[0]
        if "--score" in flags:
            users, items = (json.loads((tmp_path / f"runs/demo/{name}.json").read_text()) for name in ("users", "items"))
            (tmp_path / "pairs.csv").write_text(f"user_id,item_id\n{users[0]},{items[0]['id']}\nnobody,{items[1]['id']}\n")
        call_stage(module, *flags, *small.get(name, []), *(["--data-dir", "ml-100k"] if "ml-100k" in flags else []))
    for name in ("demo", "ml-100k"):
        assert json.loads((tmp_path / "runs" / name / "results.json").read_text())["rows"]
    assert (tmp_path / "runs/demo/scores.csv").read_text().count("\n") == 3 and (tmp_path / "runs/demo/figures/attention.png").exists()


def test_the_code_it_quotes_is_the_code():
    quoted = re.findall(r"```python\n# (\d\w+\.py)\n(.*?)```", TEXT, re.S)
    assert [name for name, _ in quoted] == SCRIPTS
    for name, excerpt in quoted:
        source, at = (ROOT / name).read_text(encoding="utf-8"), 0
        for line in filter(None, excerpt.split("\n")):  # every line of it, in this order
            at = source.find(line + "\n", at) + 1
            assert at, (name, line)


SWAPS = re.findall(r"```python\n# swap (.*?): python mine\.py ?(.*?)\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("part, flags, code", SWAPS, ids=[part for part, *_ in SWAPS])
def test_a_part_can_be_swapped_as_it_says(part, flags, code, inferred, lm_folders, tmp_path):
    """Each example runs as a file of its own on a small run, and what it makes differs from what was there."""
    assert len(SWAPS) == 5
    run = copy_run(inferred, tmp_path / "run")
    (tmp_path / "mine.py").write_text(code.replace("runs/demo/lm-tiny", str(lm_folders["gpt2"])))
    lm = [] if "--lm" in flags else ["--lm", lm_folders["gpt2"]]
    small = {"prompt": [*lm, "--steps", 3], "mask": [*lm, "--steps", 3], "LLM": ["--steps", 3], "quantizer": [],
             "recommender": ["--seeds", 1, "--epochs", 2]}
    ok(run_stage(tmp_path / "mine.py", "--run", run, *flags.split(), *small[part.removeprefix("the ")], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}))
    if "recommender" in part:
        assert json.loads((run / "results.json").read_text())["rows"][0]["model"] == "wide_deep"
    else:
        changed = "feature_bank.npy" if "quantizer" in part else "profiles.npy"
        assert (run / changed).read_bytes() != (inferred / changed).read_bytes()


def test_every_file_and_place_it_links_to_exists():
    for target in re.findall(r"\]\(([^)#\s]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target
    anchors = {re.sub(r"[^\w -]", "", line.lstrip("# ")).strip().lower().replace(" ", "-") for line in TEXT.split("\n") if line.startswith("#")}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors


def load_tables():
    return load_script("tables")


def test_every_study_uses_flags_of_its_stage():
    tables = load_tables()
    for data, rows in tables.STUDIES.values():
        for flags in [(*tables.DATA[data], "", ""), *rows.values()]:
            for number, text in enumerate(flags):
                source = (ROOT / SCRIPTS[number]).read_text() + (ROOT / "common.py").read_text()
                assert all(f'"{flag.replace("--no-", "--")}"' in source for flag in re.findall(r"--[a-z-]+", text or "")), (number, text)


def test_a_study_runs_what_is_missing_and_pairs_with_its_base(inferred, lm_folders, tmp_path, monkeypatch):
    tables, flags = load_tables(), "--seeds 2 --epochs 2"
    base = tmp_path / "runs" / "demo"
    shutil.copytree(inferred, base)
    ok(run_stage("04_train_ctr.py", "--run", base, *flags.split()))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    for name in (*SCRIPTS, "common.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    lm = str(lm_folders["gpt2"])
    monkeypatch.setattr(tables, "STUDIES", {"demo-ablations": ("demo", {
        "the default": (None, None, "", flags), "plain k-means": (None, None, "--quantizer kmeans", flags),
        "causal": (None, f"--lm {lm} --steps 2 --mask causal", "", flags)})})
    table = tables.study_table("demo-ablations", None)
    study = tmp_path / "runs" / "demo-study"
    assert json.loads((study / "causal" / "profiles.json").read_text())["mask"] == "causal"
    assert json.loads((study / "plain-k-means" / "quantize.json").read_text())["quantizer"] == "kmeans"
    means = {ids: json.loads((path / "results.json").read_text())["summary"]["dcn"][ids]["test_auc"]["mean"]
             for ids, path in (("userip", study / "plain-k-means"), ("none", base))}
    row = next(line for line in table.splitlines() if line.startswith("| plain k-means |"))
    assert f"| {means['userip']:.4f} ±" in row and f"| {means['userip'] - means['none']:+.4f} ±" in row and "2 seeds" in table


def test_tables_are_written_between_their_markers(inferred, tmp_path, monkeypatch, capsys):
    tables = load_tables()
    run = tmp_path / "run"
    shutil.copytree(inferred, run)
    ok(run_stage("04_train_ctr.py", "--run", run, "--seeds", 2, "--epochs", 2))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table demo -->\nold\n<!-- end demo -->\nafter\n")
    monkeypatch.setattr(tables, "README", readme)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("sys.argv", ["tables.py", f"demo={run}", "--write"])
    tables.main()
    text = readme.read_text()
    mean = json.loads((run / "results.json").read_text())["summary"]["dcn"]["userip"]["test_auc"]["mean"]
    assert tables.results_table(tmp_path / "results" / "demo") in text
    assert "old" not in text and f"| DCN | userip | {mean:.4f}" in text and text.endswith("<!-- end demo -->\nafter\n") and "2 seeds" in text
    monkeypatch.setattr("sys.argv", ["tables.py", f"other={run}", "--write"])
    with pytest.raises(SystemExit, match="2"):
        tables.main()
    assert capsys.readouterr().err.startswith("error: no markers for the table other")


def test_its_tables_are_those_of_the_artifacts():
    """Of single runs; the rows of the studies, too many to keep, say what ran them and when."""
    tables, found = load_tables(), re.findall(r"<!-- table (\S+) -->\n(.*?)<!-- end \1 -->", TEXT, re.S)
    assert {name for name, _ in found} >= {*tables.DATA, *tables.STUDIES} - {"demo7-ablations", "demo7-codes", "demo7-models"}
    for name, text in found:
        if name in tables.DATA:
            assert text == tables.results_table(tables.RESULTS / name) + "\n"
        else:
            assert re.search(r"run on 20\d\d-\d\d-\d\d", text), name
        for row in tables.STUDIES[name][1] if name in tables.STUDIES and not name.endswith("models") else ():
            assert f"| {row} |" in text, (name, row)
