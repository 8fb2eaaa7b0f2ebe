"""tools/controls.py: each control against the long way round, and what it may read."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    assert_bytes_equal, call_stage, copy_run, ctr, fork_stage, infer, load_script, ok, prepare, quantize)
from test_pipeline import poisoned

import common
from common import COLD, SEEN, SUPPORT, TEST, TRAIN, VALIDATION

controls = load_script("controls")
CPU = torch.device("cpu")


@pytest.fixture
def clustered(monkeypatch):
    """[(vectors, known, size)] that the controls hand to k-means."""
    seen, original = [], controls.clusters

    def clusters(vectors, known, size, seed):
        seen.append((vectors, known, size))
        return original(vectors, known, size, seed)

    monkeypatch.setattr(controls, "clusters", clusters)
    return seen


def toy(rows, attributes=None, users=5, items=6):
    """A Problem of rows (user, item, label, split); attributes: {item: {profile: values}}."""
    titles = [{"id": str(item), "title": str(item), "attributes": (attributes or {}).get(item, {})}
              for item in range(items)]
    profiles = [{"name": "hobby", "prompt": ""}, {"name": "background", "prompt": ""}]
    interactions = np.array(rows, dtype=np.int32)
    names = list(map(str, range(users)))
    return SimpleNamespace(dataset=common.Dataset(interactions, names, titles, profiles, ""))


def test_k_means_of_the_known_alone_and_of_fewer_vectors_than_codes():
    vectors = np.array([[0.0], [9.0], [0.1], [9.1], [9.2], [np.nan]])
    known = np.isfinite(vectors[:, 0])
    codes = controls.clusters(vectors, known, 2, 0)
    assert codes[5] == 2 and codes[0] == codes[2] != codes[1] == codes[3] == codes[4]
    vectors, known = np.array([[1.0], [1.0], [2.0], [0.0]]), np.array([True, True, True, False])
    codes = controls.clusters(vectors, known, 7, 0)
    assert codes[0] == codes[1] != codes[2] and codes[3] == 7


def test_metadata_clusters_the_shares_of_the_liked_items_attribute_values(clustered, world):
    dataset, sizes = world[0], [4, 3]
    found = controls.metadata(SimpleNamespace(dataset=dataset), sizes, CPU, 0)
    for m, (codes, size) in enumerate(found):
        name, (vectors, known, _) = dataset.profiles[m]["name"], clustered[m]
        values = sorted({value for item in dataset.items for value in item["attributes"][name]})
        counts = np.zeros((len(dataset.users), len(values)))
        for user, item, label, split in dataset.interactions.tolist():
            if label == 1 and split == TRAIN:
                for value in dataset.items[item]["attributes"][name]:
                    counts[user, values.index(value)] += 1
        for user, count in enumerate(counts):
            assert known[user] == (count.sum() > 0) == (codes[user] < size)
            assert not known[user] or vectors[user].tolist() == pytest.approx((count / count.sum()).tolist())
        centres = np.stack([vectors[codes == code].mean(0) for code in range(size)])
        nearest = [((vector - centres) ** 2).sum(1).argmin() for vector in vectors[known]]
        assert np.mean(nearest == codes[known]) > 0.95 and size == sizes[m]


def test_metadata_of_many_values_and_of_a_profile_that_no_item_has(clustered):
    attributes = {0: {"hobby": ["a", "b"]}, 1: {"hobby": ["a"]}, 2: {"hobby": ["c"]}, 3: {}}
    rows = [(0, 0, 1, TRAIN), (0, 1, 1, TRAIN), (1, 2, 1, TRAIN), (1, 2, 1, SUPPORT), (2, 1, 0, TRAIN),
            (2, 0, 1, VALIDATION), (3, 3, 1, TRAIN), (4, 0, 1, SUPPORT), (4, 1, 1, COLD), (4, 2, 0, SUPPORT)]
    (codes, _), (none, size) = controls.metadata(toy(rows, attributes), [3, 2], CPU, 0)
    assert clustered[0][0][[0, 1, 4]].tolist() == [pytest.approx([2 / 3, 1 / 3, 0]), [0, 0, 1], [0.5, 0.5, 0]]
    assert len({codes[0], codes[1], codes[4]}) == 3 and codes[[2, 3]].tolist() == [3, 3]
    assert none.tolist() == [2] * 5 and size == 2


def test_text_is_the_mean_word_vector_of_a_history_in_k_and_in_k_1_clusters(clustered, inferred):
    problem, _ = quantize.read_problem(inferred)
    found = controls.text(problem, [4, 3], CPU, 0)
    assert [size for _, size in found] == [12, 4] and [size for *_, size in clustered] == [12, 4]
    model, tokenizer = common.load_language_model(problem.facts["lm"], torch.float32, CPU)
    words, dataset = model.get_input_embeddings().weight.numpy(), problem.dataset
    liked = {user: [] for user in range(len(dataset.users))}
    for user, item, label, split in dataset.interactions.tolist():
        if label == 1 and split == TRAIN:
            liked[user].append(f" {dataset.items[item]['title']};")
    vectors, known, _ = clustered[0]
    for user, titles in liked.items():
        ids = [token for text in titles[-20:] for token in tokenizer.encode(text)]
        assert known[user] == bool(ids) and all((codes[user] < size) == bool(ids) for codes, size in found)
        assert not ids or np.allclose(vectors[user], words[ids].mean(axis=0), atol=1e-6)


def test_hidden_is_the_mean_last_state_over_a_history_whoever_is_in_the_block(clustered, inferred):
    problem, _ = quantize.read_problem(inferred)
    found = controls.hidden(problem, [4, 3], CPU, 0)
    assert [size for _, size in found] == [12, 4]
    likelihood, histories, space, _ = problem.open_likelihood(CPU)
    vectors, known, _ = clustered[0]
    for user in (0, 7, 31, 60):
        with torch.no_grad():
            states = likelihood.hidden(space.origin[None], torch.from_numpy(histories[user])[None].long())[0]
        assert known[user] and len(states) == likelihood.prompt_length + len(histories[user])
        assert np.allclose(vectors[user], states[-len(histories[user]):].mean(0).numpy(), atol=1e-4)
    assert known.tolist() == [len(ids) > 0 for ids in histories]


def test_generosity_grows_with_the_share_of_likes(world):
    rng = np.random.default_rng(0)
    rows = [(user, 0, int(rng.random() < user / 50), rng.choice([TRAIN, SUPPORT, VALIDATION, COLD]))
            for user in range(50) for _ in range(12)] + [(50, 0, 1, TEST)]
    (codes, size), = controls.generosity(toy(rows, users=51), [4, 3], CPU, 0)
    seen = [[label for owner, _, label, split in rows if owner == user and split in SEEN]
            for user in range(50)]
    share = [(sum(labels) + 1) / (len(labels) + 2) for labels in seen]
    for one in range(50):
        for two in range(50):
            assert share[one] > share[two] or codes[one] <= codes[two]
    assert size == 8 and codes[50] == 8 and set(codes[:50].tolist()) == set(range(8))
    assert np.bincount(codes[:50]).max() <= 12


def test_mf_clusters_the_factors_of_the_centred_labels(clustered):
    rng, pairs = np.random.default_rng(0), [(user, item) for user in range(40) for item in range(12)]
    rows = [(user, item, int((user % 2 == item % 2) ^ (rng.random() < 0.05)), rng.choice([TRAIN, SUPPORT]))
            for user, item in pairs if rng.random() < 0.8]
    held = [(*pair, 1, split) for pair in pairs for split in (VALIDATION, TEST, COLD)]
    (codes, size), = controls.mf(toy(rows + held, users=41, items=12), [2, 1], CPU, 0)
    assert size == 2 and codes[40] == 2
    assert np.mean(codes[:40:2] == codes[0]) > 0.9 and np.mean(codes[1:40:2] == 1 - codes[0]) > 0.9
    matrix, mean = np.zeros((41, 12)), np.mean([label for _, _, label, _ in rows])
    for user, item, label, _ in rows:
        matrix[user, item] = label - mean
    left, scale, _ = np.linalg.svd(matrix)
    factors = left[:, :11] * scale[:11]
    assert np.allclose(clustered[0][0] @ clustered[0][0].T, factors @ factors.T, atol=1e-6)  # signs aside


def test_mf_of_one_item_is_one_line():
    with pytest.raises(common.UserError, match="8 users, 1 items"):
        controls.mf(toy([(user, 0, user % 2, TRAIN) for user in range(8)], users=8, items=1), [2, 1], CPU, 0)


def test_words_is_03_with_words(inferred, tmp_path):
    run = copy_run(inferred, tmp_path / "run")
    call_stage(controls, "--run", run, "words", "--codes", "3,2")
    call_stage(quantize, "--run", run, "--quantizer", "words", "--codes", "3,2")
    assert_bytes_equal(run / "feature_bank_words.npy", run / "feature_bank.npy")


def test_template_is_words_where_stage_02_learned_no_task_prompt(inferred, prepared, lm_folders, tmp_path):
    run, fixed = copy_run(inferred, tmp_path / "run"), copy_run(prepared, tmp_path / "fixed")
    call_stage(controls, "--run", run, "words", "template", "--codes", "3,2")
    call_stage(infer, "--run", fixed, "--lm", lm_folders["gpt2"], "--steps", 1, "--task-steps", 0)
    call_stage(controls, "--run", fixed, "words", "--codes", "3,2")
    assert_bytes_equal(run / "feature_bank_template.npy", fixed / "feature_bank_words.npy")
    asked = [np.load(run / f"feature_bank_{name}.npy") for name in ("words", "template")]
    assert (asked[0] != asked[1]).any()
    with pytest.raises(common.UserError, match="words is the same"):
        call_stage(controls, "--run", fixed, "template")


def test_what_asking_predicts_is_the_nll_of_validation_titles_on_the_way_to_the_word(inferred, tmp_path):
    run = copy_run(inferred, tmp_path / "run")
    call_stage(controls, "--run", run, "words")
    found = common.load(run, "feature_bank_words.json")["heldout_nll"]
    assert found["own"] == pytest.approx(common.load(run, "profiles.json")["heldout_nll"]["own"], rel=1e-5)
    problem, _ = quantize.read_problem(run)
    likelihood, _, space, tokenizer = problem.open_likelihood(CPU)
    facts = SimpleNamespace(**problem.facts)
    texts = infer.history_texts(problem.dataset, VALIDATION, facts)
    histories = infer.tokenize_histories(tokenizer, texts, likelihood.room)
    bank = np.load(run / "feature_bank_words.npy")
    total, tokens = 0.0, 0
    for user in np.flatnonzero(problem.inferred):
        if len(histories[user]):
            words = torch.stack([space.vectors[m][bank[user, m]] for m in range(2)])
            theta = space.origin + 0.25 * (words - space.origin)
            with torch.no_grad():
                total += likelihood(theta[None], *infer.pad(histories, [user], CPU)).item()
            tokens += len(histories[user])
    assert found["0.25"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["0.5"] != found["1"] != found["0.25"]
    errors = common.load(run, "feature_bank_words.json")["heldout_error"]
    assert set(errors) == {"0.25", "0.5", "1"} and min(errors.values()) > 0


@pytest.fixture(scope="module")
def cold_runs(tmp_path_factory, lm_folders):
    """{name: run folder} with all banks: clean; poison where nobody may look; poison in support rows."""
    top = tmp_path_factory.mktemp("cold")
    call_stage(prepare, "--run", top / "clean", "--subsample-users", 100, "--min-interactions", 2,
               "--cold-users", 0.3)
    poisoned(top / "clean", top / "poisoned", (VALIDATION, TEST, COLD))
    poisoned(top / "clean", top / "support", (SUPPORT,))
    for run in top.iterdir():
        call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 1, "--task-steps", 1)
        call_stage(quantize, "--run", run, "--quantizer", "kmeans", "--codes", "3,2")
        call_stage(controls, "--run", run)
    return {run.name: run for run in top.iterdir()}


def test_every_control_reads_training_and_support_rows_alone(cold_runs):
    dataset = common.load_dataset(cold_runs["clean"])
    cold = np.isin(np.arange(len(dataset.users)), dataset.rows(SUPPORT)[:, 0])
    for name in controls.CONTROLS:
        assert_bytes_equal(*(cold_runs[run] / f"feature_bank_{name}.npy" for run in ("clean", "poisoned")))
        one, two = (np.load(cold_runs[run] / f"feature_bank_{name}.npy") for run in ("clean", "support"))
        assert (one[cold] != two[cold]).any(), name  # support rows are seen
        sizes = common.load(cold_runs["clean"], f"feature_bank_{name}.json")["codes"]
        liked = dataset.rows(SUPPORT)
        known = np.unique(liked[liked[:, 2] == 1][:, 0])
        assert (one[known] < sizes).any(1).all(), name  # cold users have codes


def test_each_bank_has_its_card_and_stage_04_takes_it(cold_runs, tmp_path):
    run = copy_run(cold_runs["clean"], tmp_path / "run")
    sizes = {"metadata": [3, 2], "text": [6, 3], "hidden": [6, 3], "words": [3, 2], "template": [3, 2],
             "generosity": [8], "mf": [6]}
    for name, wanted in sizes.items():  # the sizes are those of the feature bank
        card, bank = common.load(run, f"feature_bank_{name}.json"), np.load(run / f"feature_bank_{name}.npy")
        assert card["codes"] == wanted and name in card["made_by"] and bank.dtype == np.int16
        assert card["dataset_fingerprint"] == common.load_dataset(run).fingerprint()
        assert bank.shape == (len(common.load(run, "users.json")), len(wanted))
    call_stage(ctr, "--run", run, "--seeds", 1, "--epochs", 1, "--ids", ",".join(["none", *sizes]))
    assert [row["ids"] for row in common.load(run, "results.json")["rows"]] == ["none", *sizes]


def test_a_bank_that_the_llm_made_is_of_the_stage_02_of_then(cold_runs, tmp_path):
    """Its prompt and mask are stage 02's. Banks without an LLM stay."""
    run = copy_run(cold_runs["clean"], tmp_path / "run")
    facts = common.load(run, "profiles.json")
    common.save_json(run / "profiles.json", facts | {"fingerprint": "of another run"})
    for name in ("metadata", "generosity", "mf", "text", "hidden", "words", "template"):
        flags = ["--run", run, "--seeds", 1, "--epochs", 1, "--ids", f"none,{name}"]
        if name in controls.WITHOUT_LLM:
            call_stage(ctr, *flags)
        else:
            with pytest.raises(common.UserError, match=f"feature_bank_{name}.npy was made from another"):
                call_stage(ctr, *flags)


def test_a_bank_is_made_again_to_the_byte_and_with_other_sizes(cold_runs, tmp_path, capsys):
    run = copy_run(cold_runs["clean"], tmp_path / "run")
    before = (run / "feature_bank_mf.npy").read_bytes()
    (run / "feature_bank_text.npy").unlink()
    call_stage(controls, "--run", run, "mf", "metadata")
    assert (run / "feature_bank_mf.npy").read_bytes() == before
    assert not (run / "feature_bank_text.npy").exists()
    assert "--ids none,random,userip,random-mf,mf,metadata\n" in capsys.readouterr().out
    call_stage(controls, "--run", run, "mf", "metadata", "--codes", "2,2")
    assert common.load(run, "feature_bank_mf.json")["codes"] == [4]
    assert "userip,random-mf,mf,random-metadata,metadata\n" in capsys.readouterr().out  # userip has others


def test_only_columns_of_the_planted_profiles_are_compared_with_the_truth(inferred, tmp_path, capsys):
    for name, compared in (("metadata", True), ("words", True), ("text", False), ("mf", False)):
        call_stage(controls, "--run", copy_run(inferred, tmp_path / "run"), name)
        assert ("NMI with the planted truth" in capsys.readouterr().out) == compared, name


def test_controls_without_an_llm_need_stage_01_alone(prepared, tmp_path, capsys):
    """And are the same as beside stage 02; those that need it are named, one at a time an error."""
    run = copy_run(prepared, tmp_path / "run")
    call_stage(controls, "--run", run, "metadata", "generosity", "mf")
    banks = {path.name: path.read_bytes() for path in run.glob("feature_bank_*.npy")}
    shown = "ids none,random-metadata,metadata,random-generosity,generosity,random-mf,mf"
    assert len(banks) == 3 and shown in capsys.readouterr().out
    call_stage(controls, "--run", run)
    text = capsys.readouterr().out
    for name in ("text", "hidden", "words", "template"):
        assert f"WARNING: {name} is left out, for stage 02 has not run" in text
        with pytest.raises(common.UserError, match="run: python 02_infer_profiles.py"):
            call_stage(controls, "--run", run, name)
    assert {path.name: path.read_bytes() for path in run.glob("feature_bank_*.npy")} == banks


@pytest.mark.parametrize("args, words", [(["metadata", "magic"], "unknown magic"),
                                         (["--codes", "4"], "codebook sizes"),
                                         (["mf", "--codes", "256,128"], "32,768 codes are too many"),
                                         (["--run", "/nowhere"], "dataset.json is missing")])
def test_controls_that_cannot_be_made_are_one_line(args, words, inferred, tmp_path, capsys):
    run = copy_run(inferred, tmp_path / "run")
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(SystemExit) as stop:
        common.guarded(lambda: call_stage(controls, "--run", run, *args))
    message, = capsys.readouterr().err.strip().split("\n")
    assert stop.value.code == 2 and message.startswith("error: ") and words in message
    assert sorted(path.name for path in run.iterdir()) == before


def test_one_control_with_too_many_codes_leaves_the_others(prepared, tmp_path, capsys):
    run = copy_run(prepared, tmp_path / "run")
    call_stage(controls, "--run", run, "--codes", "256,128")
    said = capsys.readouterr().out
    assert "WARNING: mf is left out: 32,768 codes are too many" in said
    assert {path.name for path in run.glob("feature_bank_*.npy")} == {
        "feature_bank_metadata.npy", "feature_bank_generosity.npy"}
    assert common.load(run, "feature_bank_metadata.json")["made_by"].endswith("--codes 256,128")


def test_sizes_are_not_those_of_a_bank_of_another_data_set(inferred, tmp_path):
    run = copy_run(inferred, tmp_path / "run")
    dataset = common.load_dataset(run)
    facts = common.load(run, "quantize.json")
    common.save_json(run / "quantize.json", facts | {"codes": [7, 6]})
    assert controls.sizes_of(run, dataset) == [7, 6]
    common.save_json(run / "quantize.json", facts | {"codes": [7, 6], "dataset_fingerprint": "another"})
    assert controls.sizes_of(run, dataset) == [4, 3]


def test_metadata_where_no_item_has_a_value_is_one_line():
    rows = [(0, 0, 1, TRAIN), (1, 1, 1, TRAIN)]
    with pytest.raises(common.UserError, match="no item has a value for any profile"):
        controls.metadata(toy(rows, {0: {}, 1: {}}), [3, 2], CPU, 0)


def test_what_it_shows_as_next_runs_after_stage_01_alone(prepared, tmp_path, capsys):
    run = copy_run(prepared, tmp_path / "run")
    call_stage(controls, "--run", run, "metadata")
    command = capsys.readouterr().out.strip().split("\n")[-1].split("next: python ")[1].split()
    ok(fork_stage(*command, "--seeds", 1, "--epochs", 1))
    rows = common.load(run, "results.json")["rows"]
    assert [row["ids"] for row in rows] == ["none", "random-metadata", "metadata"]
