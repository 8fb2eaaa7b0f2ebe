"""README.md and docs/RESULTS.md speak of what is there."""

import importlib
import json
import re

import numpy as np
import pytest
from conftest import ROOT, call_stage, copy_run, fork_stage, load_script, ok
from test_prepare import write_ml_100k

import common

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
CLASSROOM = (ROOT / "tests" / "assignments" / "README.md").read_text(encoding="utf-8")
SCRIPTS = ["01_prepare_data.py", "02_infer_profiles.py", "03_quantize.py", "04_train_ctr.py"]
OTHERS = [*(f"tools/{name}.py" for name in ("baselines", "controls", "explain", "figures", "lm_both",
                                            "recsysllm", "score", "tables")),
          *(f"tests/bench/bench_{name}.py" for name in ("ctr", "infer", "serving", "prepare")),
          "tests/mutants.py"]
FOREIGN = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--ntasks-per-node", "--help",
           "--no-deps", "--index-url"}


def test_every_flag_they_name_exists():
    offered = "".join(ok(fork_stage(name, "--help")).stdout for name in (*SCRIPTS, *OTHERS))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", TEXT + PAGE + CLASSROOM)) - FOREIGN
    assert len(named) > 20 and not [flag for flag in named if not re.search(rf"{flag}[\s,\]]", offered)]


def test_every_deviation_has_its_row_and_its_mark():
    sources = "".join((ROOT / name).read_text() for name in (*SCRIPTS, "common.py"))
    section = TEXT[TEXT.index("## Differences"):TEXT.index("## Troubleshooting")]
    marked = set(re.findall(r"DEVIATION\((\d+)\)", sources))
    assert len(marked) >= 10 and marked == set(re.findall(r"^\| (\d+) \|", section, re.M))
    other = "".join((ROOT / "tools" / name).read_text() for name in ("recsysllm.py", "next_item.py"))
    marked = set(re.findall(r"DEVIATION\((R\d+)\)", other))
    assert len(marked) >= 5 and marked == set(re.findall(r"^\| (R\d+) \|", PAGE, re.M))


def test_every_name_of_the_symbol_table_exists():
    sources = "".join((ROOT / name).read_text() for name in (*SCRIPTS, "common.py"))
    table = TEXT[TEXT.index("## Symbols"):TEXT.index("## Differences")]
    cells = re.findall(r"^\|[^|]*\|([^|]*)\|", table, re.M)
    names = [name for cell in cells for name in re.findall(r"`(\w+)", cell)]
    assert len(names) > 10 and all(re.search(rf"\b{name}\b", sources) for name in names)


def small_files(folder):
    """MovieLens and csv files that the shown commands read."""
    rng = np.random.default_rng(0)
    rated = [(u, i, rng.integers(1, 6), 1000 * u + rng.integers(900))
             for u in range(1, 61) for i in rng.choice(np.arange(1, 31), 12, replace=False)]
    write_ml_100k(folder / "ml-100k", rated, [f"Film {i} ({1930 + 2 * i})" for i in range(30)])
    ratings = "".join(f"{u},{i},{stars}\n" for u, i, stars, _ in rated)
    (folder / "r.csv").write_text("who,what,stars\n" + ratings)
    items = "".join(f"{i},Film {i},genre {i % 3}\n" for i in range(1, 31))
    (folder / "i.csv").write_text("what,name,genre\n" + items)


def test_the_commands_it_shows_run(tmp_path, monkeypatch):
    """Every line of its bash blocks that calls a script, in order, in one folder, with short settings."""
    small = {"01_prepare_data": ["--subsample-users", 100], "03_quantize": ["--epochs", 1, "--warm-up", 1],
             "02_infer_profiles": ["--tiny-sentences", 320, "--steps", 2, "--task-steps", 4],
             "04_train_ctr": ["--seeds", 1, "--epochs", 2],
             "tools/recsysllm": ["--epochs", 1, "--test-users", 5, "--rows", 40]}
    small_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "tiny_sizes", lambda items: (64, 768, 320))
    blocks = "".join(re.findall(r"```bash\n(.*?)```", TEXT, re.S))
    lines = [line.split(" #")[0].split() for line in blocks.split("\n") if line.startswith("python ")]
    assert len(lines) >= 15
    for _, script, *flags in lines:
        name = script.removesuffix(".py")
        module = load_script(name.removeprefix("tools/")) if "/" in name else importlib.import_module(name)
        if "--user" in flags:  # one of the smaller world's
            flags[flags.index("--user") + 1] = json.loads((tmp_path / "runs/demo/users.json").read_text())[0]
        if "pairs.csv" in flags:
            users, items = (json.loads((tmp_path / f"runs/demo/{part}.json").read_text())
                            for part in ("users", "items"))
            pairs = f"{users[0]},{items[0]['id']}\nnobody,{items[1]['id']}\n"
            (tmp_path / "pairs.csv").write_text("user_id,item_id\n" + pairs)
        data = ["--data-dir", "ml-100k"] if "ml-100k" in flags else []
        call_stage(module, *flags, *small.get(name, []), *data)
    for name in ("demo", "ml-100k"):
        assert json.loads((tmp_path / "runs" / name / "results.json").read_text())["rows"]
    assert len(common.load_dataset(tmp_path / "runs" / "cold").rows(common.COLD))
    assert (tmp_path / "runs/demo/scores.csv").read_text().count("\n") == 3
    assert (tmp_path / "runs/demo/figures/attention.png").exists()


def test_the_code_it_quotes_is_the_code():
    quoted = re.findall(r"```python\n# (\d\w+\.py)\n(.*?)```", TEXT, re.S)
    assert [name for name, _ in quoted] == SCRIPTS
    for name, excerpt in quoted:
        source, at = (ROOT / name).read_text(encoding="utf-8"), 0
        for line in filter(None, excerpt.split("\n")):  # every line of it, in this order
            at = source.find(line + "\n", at) + 1
            assert at, (name, line)


SWAPS = re.findall(r"```python\n# swap (.*?): python mine\.py ?(.*?)\n(.*?)```", CLASSROOM, re.S)


def test_every_part_has_an_example_of_a_swap():
    assert [part for part, *_ in SWAPS] == ["the prompt", "the mask", "the LLM", "the quantizer",
                                            "the recommender", "the data set"]


@pytest.mark.parametrize("part, flags, code", SWAPS, ids=[part for part, *_ in SWAPS])
def test_a_part_can_be_swapped_as_it_says(part, flags, code, inferred, lm_folders, tmp_path):
    """Each example runs as a file of its own on a small run, and what it makes differs from what was."""
    run = copy_run(inferred, tmp_path / "run")
    (tmp_path / "mine.py").write_text(code.replace("runs/demo/lm-tiny", str(lm_folders["gpt2"])))
    lm = [] if "--lm" in flags else ["--lm", lm_folders["gpt2"]]
    as_it_was = ["--steps", 3, "--task-steps", 1]  # as `inferred`: so that the swap alone makes a difference
    small = {"prompt": [*lm, *as_it_was], "mask": [*lm, *as_it_was], "LLM": as_it_was,
             "quantizer": [], "recommender": ["--seeds", 1, "--epochs", 2], "data set": []}
    (tmp_path / "plays").mkdir()
    plays = "".join(f"{user}\t{artist}\t{3 * user % 17 * artist + 1}\n"
                    for user in range(1, 31) for artist in range(1, 16))
    (tmp_path / "plays" / "plays.tsv").write_text("user\tartist\tplays\n" + plays)
    artists = "".join(f"{artist}\tBand {artist}\t{'rock|indie' if artist % 2 else 'unknown'}\n"
                      for artist in range(1, 16))
    (tmp_path / "plays" / "artists.tsv").write_text("artist\tname\ttags\n" + artists)
    ok(fork_stage(tmp_path / "mine.py", "--run", run, *flags.split(), *small[part.removeprefix("the ")],
                  cwd=tmp_path))
    if "recommender" in part:
        assert json.loads((run / "results.json").read_text())["rows"][0]["model"] == "wide_deep"
    elif "data set" in part:
        dataset = common.load_dataset(run)
        assert len(dataset.users) == 30 and dataset.items[0]["title"] == "Band 1"
        assert dataset.profiles[0]["words"] == {"indie": 8, "rock": 8}
    else:
        changed = "feature_bank.npy" if "quantizer" in part else "profiles.npy"
        assert (run / changed).read_bytes() != (inferred / changed).read_bytes()


def test_ids_of_ones_own_enter_as_it_says(inferred, tmp_path):
    code = re.search(r"```python\n# bring your own ids: python mine\.py\n(.*?)```", TEXT, re.S)[1]
    run = copy_run(inferred, tmp_path / "runs" / "demo")
    (tmp_path / "mine.py").write_text(code)
    ok(fork_stage(tmp_path / "mine.py", cwd=tmp_path))
    flags = re.search(r"`python 04_train_ctr\.py (--ids [^`]*random-mine[^`]*)`", TEXT)[1].split()
    ok(fork_stage("04_train_ctr.py", "--run", run, *flags, "--seeds", 1, "--epochs", 1))
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert [row["ids"] for row in rows] == ["none", "random", "userip", "random-mine", "mine"]


def test_the_bank_joins_to_a_table_of_ones_own_as_it_says(inferred, tmp_path):
    code = re.search(r"```python\n# join the bank: python mine\.py\n(.*?)```", TEXT, re.S)[1]
    copy_run(inferred, tmp_path / "runs" / "demo")
    known = json.loads((inferred / "users.json").read_text())[0]
    (tmp_path / "mine.py").write_text(code.replace("u0000", known))
    printed = ok(fork_stage(tmp_path / "mine.py", cwd=tmp_path)).stdout
    assert f"'user_id': '{known}', 'clicks': 3, 'hobby': '" in printed
    assert printed.count("unknown") == 2  # of somebody new


def places_of(page):
    """What a link can name behind its #: the titles of a page, as its readers' sites write them."""
    titles = [line.lstrip("# ") for line in page.split("\n") if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_every_file_and_place_they_link_to_exists():
    for text, folder in ((TEXT, ROOT), (PAGE, ROOT / "docs"), (CLASSROOM, ROOT / "tests" / "assignments")):
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            file, _, place = target.partition("#")
            assert not file or (folder / file).exists(), target
            page = (folder / file).read_text(encoding="utf-8") if place and file else text
            assert not place or place in places_of(page), target


def test_lines_of_the_lesson_are_short():
    fence, long = False, []
    for line in [*TEXT.split("\n"), *CLASSROOM.split("\n")]:
        fence ^= line.startswith("```")
        long += [line] if len(line) > 120 and not fence and not line.startswith("|") else []
    assert not long


def test_the_tables_are_those_of_the_kept_figures():
    tables = load_script("tables")
    found = re.findall(r"<!-- table (\S+) -->\n(.*?)<!-- end \1 -->", PAGE, re.S)
    assert {name for name, _ in found} >= {"demo", "demo7"}
    for name, text in found:
        draw = tables.table_recsysllm if tables.is_recsysllm(name) else tables.table
        assert text == draw(json.loads((tables.KEPT / f"{name}.json").read_text())) + "\n", name
