"""tools/baselines.py, tools/lm_both.py: each stand-in against the long way round, and what it may read."""

import hashlib
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_bytes_equal, call_stage, ctr, infer, load_script, prepare, quantize
from test_pipeline import poisoned

import common
from common import COLD, SEEN, TEST, TRAIN, VALIDATION

baselines, lm_both = load_script("baselines"), load_script("lm_both")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two rated runs with cold users and a tiny LM: clean, and poisoned where only evaluation may look."""
    top = tmp_path_factory.mktemp("baselines")
    call_stage(prepare, "--run", top / "clean", "--subsample-users", 100, "--min-interactions", 2,
               "--cold-users", 0.2)
    poisoned(top / "clean", top / "poisoned", (TEST, COLD))
    for run in (top / "clean", top / "poisoned"):
        call_stage(infer, "--run", run, "--lm", "tiny", "--tiny-sentences", 300, "--steps", 1,
                   "--task-steps", 1, "--history", "rated")
    return top


@pytest.fixture(scope="module")
def world(runs):
    return baselines.World(SimpleNamespace(run=runs / "clean", device="cpu", seed=0, rows=None))


def digest(world):
    state = world.likelihood.model.state_dict().values()
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state)).hexdigest()


def test_kar_slot_is_the_expected_word_behind_history_and_name(world):
    history = world.histories[3]
    assert len(history)
    for m, name in enumerate(world.names):
        logits = world.likelihood.model(torch.tensor([[*history.tolist(), *name]])).logits[0, -1]
        probability, index = logits.softmax(0).topk(baselines.SLOT_WORDS)
        vectors = world.likelihood.word_table.weight[index]
        expected = (probability[:, None] * vectors).sum(0) / probability.sum()
        assert np.allclose(baselines.kar_slot(world, [history, history[:2]])[0, m], expected, atol=1e-4)


def test_kar_text_is_the_mean_state_over_history_question_and_greedy_answer(world):
    histories = [world.histories[3], np.array([], dtype=np.int32), world.histories[5][:4]]
    for answer in (0, 3):
        found = baselines.kar_text(world, histories, answer)
        assert np.isnan(found[1]).all()
        for at in (0, 2):
            ids = [*histories[at].tolist(), *world.names[0]]
            for _ in range(answer):
                ids.append(int(world.likelihood.model(torch.tensor([ids])).logits[0, -1].argmax()))
            states = world.likelihood.body(torch.tensor([ids])).last_hidden_state[0]
            assert np.allclose(found[at], states.mean(0).numpy(), atol=1e-4)


@pytest.mark.parametrize("begin", [[], [7]])
def test_pepler_moves_the_rows_of_its_batch_alone_and_adds_the_title_s_likelihood(begin, world, monkeypatch):
    monkeypatch.setattr(world, "begin", begin)
    torch.manual_seed(0)
    model = baselines.Pepler(5, 6, world.start.shape[1])
    titles = common.pieces_of(world.tokenizer, [f" {item['title']};" for item in world.dataset.items[:6]])
    users, items, labels = torch.tensor([1, 3]), torch.tensor([0, 5]), torch.tensor([1.0, 0.0])
    loss = baselines.pepler_loss(model, world, titles, users, items, labels)
    loss.backward()
    for table, rows in ((model.user, [1, 3]), (model.item, [0, 5])):
        moved = table.weight.grad.to_dense().abs().sum(1)
        assert torch.equal(moved > 0, torch.isin(torch.arange(len(moved)), torch.tensor(rows)))
    total, tokens, bce = 0.0, 0, 0.0
    for user, item, label in zip(users, items, labels):
        u, i = model.user.weight[user], model.item.weight[item]
        logit = (u[:-1] @ i[:-1]) / (len(u) - 1) ** 0.5 + u[-1] + i[-1]
        bce += float(torch.nn.functional.softplus(-logit if label else logit).detach()) / 2
        ids = torch.tensor(titles[item])
        first = world.likelihood.vectors(begin)
        embedded = torch.cat([first, torch.stack([u[:-1], i[:-1]]), world.likelihood.word_table(ids)])[None]
        log_p = world.likelihood.model(inputs_embeds=embedded).logits[0].log_softmax(1)
        before = len(begin) + 1  # the place of phi_i, which tells the title's first token
        total -= sum(float(log_p[before + at, token].detach()) for at, token in enumerate(ids))
        tokens += len(ids)
    assert float(loss.detach()) == pytest.approx(total / tokens + baselines.WEIGHT * bce, rel=1e-4)
    alone = baselines.pepler_loss(model, world, titles, users, items, labels, with_lm=False)
    assert float(alone.detach()) == pytest.approx(baselines.WEIGHT * bce, rel=1e-4)


def test_pepler_is_refused_in_fp16_which_would_round_its_gradients(world, monkeypatch):
    monkeypatch.setattr(world.likelihood, "dtype", torch.float16)
    with pytest.raises(common.UserError, match="gradients to 0.*run 02 with --dtype bf16 or fp32"):
        baselines.pepler(world)


def test_a_mean_state_may_leave_out_the_begin_token(world):
    ids = world.histories[3].tolist()
    states = world.likelihood.body(torch.tensor([[7, *ids]])).last_hidden_state[0]
    found = world.states([[7, 8], [7, *ids]], "mean", skip=1)
    assert np.allclose(found[1], states[1:].mean(0).detach().numpy(), atol=1e-4)


def test_a_state_that_is_not_finite_is_one_line(world, monkeypatch):
    def body(ids, **_):
        return SimpleNamespace(last_hidden_state=torch.full((*ids.shape, world.start.shape[1]), torch.nan))

    monkeypatch.setattr(world.likelihood, "body", body)
    with pytest.raises(common.UserError, match="a hidden state is not finite"):
        world.states([[3, 4]], "last")


def test_the_epoch_is_that_of_the_best_validation_figure(world, monkeypatch):
    validation, states, quality = world.dataset.rows(VALIDATION), [], iter((0.5, 0.9, 0.6, 0.7, 0.95))

    def scores(model, dataset, rows):
        assert np.array_equal(rows, validation)
        states.append({name: table.clone() for name, table in model.state_dict().items()})
        right = next(quality)
        return np.where(rows[:, 2] == 1, right, 1 - right)

    monkeypatch.setattr(baselines, "pepler_scores", scores)
    monkeypatch.setattr(baselines, "PATIENCE", 2)
    titles = [[1]] * len(world.dataset.items)
    kept = baselines.fit_pepler(world, titles, False).state_dict()
    assert len(states) == 4  # the second is the best, two more are waited for
    assert all(torch.equal(kept[name], states[1][name]) for name in kept)
    assert not torch.equal(states[0]["user.weight"], states[1]["user.weight"])


def test_a_user_without_training_rows_is_nobody_to_pepler(world):
    model = baselines.Pepler(len(world.dataset.users), len(world.dataset.items), 4)
    rows = world.dataset.rows(COLD)
    found = baselines.pepler_scores(model, world.dataset, rows)
    expected = torch.sigmoid(model.item.weight[torch.from_numpy(rows[:, 1]).long(), -1]).detach().numpy()
    assert np.allclose(found, expected)


def test_rella_retrieves_what_brute_force_does_and_never_the_target():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    own = [[int(item), 1] for item in rng.permutation(20)[:12]]
    target = own[4][0]
    others = [at for at in range(12) if at != 4]
    best = sorted(others, key=lambda at: -float(vectors[own[at][0]] @ vectors[target]))[:3]
    assert baselines.retrieve(vectors, target, own, 3, "similar") == sorted(best)
    assert baselines.retrieve(vectors, target, own, 3, "recent") == [9, 10, 11]
    assert baselines.retrieve(vectors, own[11][0], own, 3, "recent") == [8, 9, 10]
    assert baselines.retrieve(vectors, target, own, 0, "recent") == []
    assert baselines.retrieve(vectors, target, own[:2], 3, "similar") == [0, 1]


def test_rella_s_score_is_plus_against_minus_after_the_whole_text(world):
    texts = [common.pieces_of(world.tokenizer, [f" {item['title']}{mark}" for item in world.dataset.items])
             for mark in (" -;", " +;", "")]
    rows = world.dataset.rows(VALIDATION)[:4]
    with torch.no_grad():
        found = baselines.rella_scores(world, rows, "recent", 2, None, texts, None)
    seen = world.dataset.rows(SEEN)
    for score, (user, item, _) in zip(found, rows.tolist()):
        own = [row for row in seen.tolist() if row[0] == user and row[1] != item][-2:]
        said = "".join(f" {world.dataset.items[i]['title']} {'-+'[label]};" for _, i, label in own)
        parts = common.pieces_of(world.tokenizer, [
            world.dataset.task_prompt, said, f" {world.dataset.items[item]['title']}", " +;", " -;"])
        logits = world.likelihood.model(torch.tensor([sum(parts[:3], [])])).logits[0, -1]
        assert parts[3][0] != parts[4][0]  # else the marks part later
        assert score == pytest.approx(float(logits[parts[3][0]] - logits[parts[4][0]]), abs=1e-3)


def test_rella_leaves_out_the_oldest_titles_that_do_not_fit_into_the_window(world, monkeypatch):
    texts = [common.pieces_of(world.tokenizer, [f" {item['title']}{mark}" for item in world.dataset.items])
             for mark in (" -;", " +;", "")]
    rows = world.dataset.rows(VALIDATION)[:6]
    asked = []

    def expected(prompts, of_logits):
        asked.append(prompts)
        return torch.zeros(len(prompts), 2)

    monkeypatch.setattr(world, "expected", expected)
    baselines.rella_scores(world, rows, "recent", 10, None, texts, None)
    whole = asked.pop()
    window = sorted(map(len, whole))[3] - 1
    monkeypatch.setattr(baselines.infer, "window_of", lambda model: window)
    baselines.rella_scores(world, rows, "recent", 10, None, texts, None)
    starts = len(world.begin + world.task)
    pieces = {len(ids) for some in texts[:2] for ids in some}
    cut = 0
    seen = world.dataset.rows(SEEN).tolist()
    for (user, item, _), long, short in zip(rows.tolist(), whole, asked.pop()):
        own = [row for row in seen if row[0] == user and row[1] != item][-10:]
        told = sum((texts[label][other] for _, other, label in own), [])
        assert long[starts:starts + len(told)] == told
        assert len(short) <= window and short[:starts] == long[:starts]
        assert short[starts:] == long[len(long) - len(short) + starts:]
        left_out = len(long) - len(short)
        assert (left_out > 0) == (len(long) > window)
        cut += left_out > 0
        if left_out:  # and no more than had to be: the next title would be too many
            assert len(short) + max(pieces) > window
    assert cut


def test_banks_and_scores_see_no_test_row_and_leave_the_lm_as_it_was(runs, world, monkeypatch):
    monkeypatch.setattr(baselines, "EPOCHS", 2)
    untouched = digest(world)
    for method in ("kar", "pepler", "rella"):
        for run in (runs / "clean", runs / "poisoned"):
            call_stage(baselines, method, "--run", run)
    assert digest(baselines.World(world.args)) == untouched
    assert_bytes_equal(*(runs / run / "kar" / "profiles.npy" for run in ("clean", "poisoned")))
    for name in ("kar", "kar-text", "kar-text0", "pepler"):
        assert_bytes_equal(*(runs / run / f"feature_bank_{name}.npy" for run in ("clean", "poisoned")))
        card = common.load(runs / "clean", f"feature_bank_{name}.json")
        assert card["codes"] == ([4, 3] if name == "kar" else [12])
        method, = [method for method in ("kar", "pepler") if name.startswith(method)]
        assert card["made_by"] == f"tools/baselines.py {method} --seed 0"  # a command
    rows_of = {method: common.load(runs / "clean", f"baselines_{method}.json")["rows"]
               for method in ("kar", "pepler", "rella")}
    for method, count in (("pepler", 2), ("rella", 4)):
        rows = rows_of[method]
        assert len(rows) == count and all(0 < row["test_auc"] < 1 and 0 < row["cold_auc"] < 1 for row in rows)
    users, trained, asked = (len(world.dataset.users), len(world.dataset.rows(TRAIN)),
                             [len(world.dataset.rows(split)) for split in (VALIDATION, TEST, COLD)])
    histories = sum(map(bool, map(len, world.histories)))
    costs = [(row["lm_passes"], row["of"], row["unit"]) for rows in rows_of.values() for row in rows]
    titles, answers = len(world.dataset.items), baselines.ANSWER
    assert costs == [
        (2 * users, users, "user"), ((1 + answers) * histories, users, "user"), (histories, users, "user"),
        (0, trained, "pair"), (2 * trained, trained, "pair"),
        (titles + sum(asked), sum(asked), "pair"), *[(sum(asked), sum(asked), "pair")] * 3]


def test_platt_s_scale_is_of_validation_rows(runs, world, monkeypatch):
    seen, fit = [], baselines.LogisticRegression.fit

    def spy(self, scores, labels):
        seen.append(labels)
        return fit(self, scores, labels)

    monkeypatch.setattr(baselines.LogisticRegression, "fit", spy)
    call_stage(baselines, "rella", "--run", runs / "clean")
    assert len(seen) == 4
    assert all(np.array_equal(labels, world.dataset.rows(VALIDATION)[:, 2]) for labels in seen)


def test_validation_rows_do_not_reach_a_user(runs, tmp_path):
    """Titles and labels of validation rows change no bank but PEPLER's epoch."""
    poisoned(runs / "clean", tmp_path / "run", (VALIDATION,))
    call_stage(infer, "--run", tmp_path / "run", "--lm", "tiny", "--tiny-sentences", 300, "--steps", 1,
               "--task-steps", 1, "--history", "rated")
    for run in (runs / "clean", tmp_path / "run"):
        call_stage(baselines, "kar", "--run", run)
    for name in ("kar", "kar-text", "kar-text0"):
        assert_bytes_equal(*(run / f"feature_bank_{name}.npy" for run in (runs / "clean", tmp_path / "run")))


def test_a_killed_kar_leaves_the_run_of_the_kar_before(runs, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(runs / "clean", run)
    call_stage(baselines, "kar", "--run", run)
    (run / "kar" / "quantize.json").write_text("{}")  # of an earlier visit
    before = (run / "kar" / "profiles.npy").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "save_json", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        call_stage(baselines, "kar", "--run", run)
    assert (run / "kar" / "profiles.npy").read_bytes() == before and (run / "kar" / "quantize.json").exists()
    call_stage(baselines, "kar", "--run", run)  # and what the killed one left is in nobody's way
    assert not (run / "kar" / "quantize.json").exists() and not (run / "kar-unfinished").exists()


def test_rows_bound_what_rella_scores_and_unrated_runs_are_refused(runs, inferred):
    call_stage(baselines, "rella", "--run", runs / "clean")
    whole = common.load(runs / "clean", "baselines_rella.json")["rows"][1]["lm_passes"]
    call_stage(baselines, "rella", "--run", runs / "clean", "--rows", 12)
    assert common.load(runs / "clean", "baselines_rella.json")["rows"][1]["lm_passes"] == 36 < whole
    with pytest.raises(common.UserError, match="the scored rows have one label alone .--rows 1."):
        call_stage(baselines, "rella", "--run", runs / "clean", "--rows", 1)
    with pytest.raises(common.UserError, match="has not read rated titles"):
        call_stage(baselines, "rella", "--run", inferred)


def test_banks_have_as_many_codes_as_stage_03_gave(runs, tmp_path):
    run = shutil.copytree(runs / "clean", tmp_path / "run")
    dataset = common.load_dataset(run)
    assert baselines.controls.sizes_of(run, dataset) == [profile["codes"] for profile in dataset.profiles]
    call_stage(quantize, "--run", run, "--quantizer", "kmeans", "--codes", "2,5")
    call_stage(baselines, "kar", "--run", run)
    assert common.load(run, "feature_bank_kar.json")["codes"] == [2, 5]


def test_test_rows_of_one_label_end_pepler_in_one_line_before_it_works(runs, tmp_path, monkeypatch):
    run = shutil.copytree(runs / "clean", tmp_path / "run")
    rows = np.load(run / "interactions.npy")
    rows[rows[:, 3] == TEST, 2] = 1
    dataset = common.load_dataset(run)
    one_label = type(dataset)(**{**vars(dataset), "interactions": rows})
    read = quantize.read_problem(run)
    read[0].dataset = one_label
    monkeypatch.setattr(quantize, "read_problem", lambda _: read)
    monkeypatch.setattr(baselines, "fit_pepler", None)
    with pytest.raises(common.UserError, match="the scored rows have one label alone"):
        call_stage(baselines, "pepler", "--run", run)


def test_stages_take_kar_s_theta_for_theirs(runs, world):
    call_stage(baselines, "kar", "--run", runs / "clean")
    call_stage(quantize, "--run", runs / "clean" / "kar", "--quantizer", "kmeans")
    call_stage(ctr, "--run", runs / "clean" / "kar", "--profile-input", "embedding", "--ids", "none,userip",
               "--seeds", 1, "--epochs", 1)
    problem, _ = quantize.read_problem(runs / "clean" / "kar")
    theta = torch.from_numpy(baselines.kar_slot(world, world.histories))
    # What no direction of the words' space can say.
    gap = (theta - torch.from_numpy(problem.theta()))[torch.from_numpy(problem.inferred)]
    assert problem.z.any() and torch.einsum("umd,mrd->umr", gap, problem.space.basis).abs().max() < 1e-3
    assert not (runs / "clean" / "kar" / "kar").exists()


def test_kar_s_theta_is_0_for_whom_nothing_was_inferred(world, tmp_path, monkeypatch):
    monkeypatch.setattr(world.args, "run", tmp_path)
    monkeypatch.setattr(world.problem, "inferred", np.arange(len(world.histories)) != 2)
    baselines.save_theta(world, baselines.kar_slot(world, world.histories))
    z = np.load(tmp_path / "kar" / "profiles.npy")
    assert not z[2].any() and z[[1, 3]].any((1, 2)).all()


def test_the_lm_for_both_directions_reads_no_more_than_its_window_holds(runs, tmp_path, monkeypatch):
    run = shutil.copytree(runs / "clean", tmp_path / "run")
    original, seen = common.make_sentences, []
    monkeypatch.setattr(common, "make_sentences", lambda traits, items, count, *rest: [
        (words, 60 * titles) for words, titles in original(traits, items, min(count, 60), *rest)])
    monkeypatch.setattr(common, "fit_tiny", lambda model, ids, targets, rng: seen.extend([model, ids]))
    call_stage(lm_both, "--run", run, "--tiny-sentences", 64)  # its evaluation reads them too
    model, ids = seen
    assert 0.9 * model.config.n_positions < ids.shape[1] <= model.config.n_positions


def test_a_third_of_the_sentences_of_the_lm_for_both_directions_is_turned_round(runs, world, tmp_path,
                                                                                monkeypatch):
    run = shutil.copytree(runs / "clean", tmp_path / "run")
    seen = []
    monkeypatch.setattr(common, "fit_tiny", lambda model, ids, targets, rng: seen.extend([ids, targets]))
    call_stage(lm_both, "--run", run, "--tiny-sentences", 90)
    ids, targets = seen
    texts = [world.tokenizer.decode(row[real]) for row, real in zip(ids, targets != -100)]
    names = [profile["prompt"] for profile in world.dataset.profiles]
    turned = [text for text in texts if not text.startswith(tuple(names))]
    assert len(texts) == 90 and len(turned) == 30
    for text in texts:
        assert (world.dataset.task_prompt in text) != (text in turned)
        assert any(name in text for name in names)
    assert len({text.split(names[0])[-1] for text in turned if names[0] in text}) > 1
    call_stage(infer, "--run", run, "--lm", run / "lm-both", "--steps", 1, "--task-steps", 1,
               "--history", "rated", "--fresh")
    with pytest.raises(common.UserError, match="run 02 with --lm tiny"):
        call_stage(lm_both, "--run", run)


def test_the_lm_for_both_directions_has_the_sizes_of_02(runs, tmp_path, monkeypatch):
    run = shutil.copytree(runs / "clean", tmp_path / "run")
    made = []

    def make(traits, items, count, length, *_):
        made.append((count, length))
        raise KeyboardInterrupt

    call_stage(infer, "--run", run, "--lm", "tiny", "--tiny-sentences", 300, "--steps", 1, "--task-steps", 1,
               "--history", "rated", "--fresh")
    problem, truth = quantize.read_problem(run)
    texts = infer.history_texts(problem.dataset, TRAIN, SimpleNamespace(**problem.facts))
    problem.facts["max_history"] = 400  # more than anybody has, and than its context holds
    monkeypatch.setattr(quantize, "read_problem", lambda _: (problem, truth))
    monkeypatch.setattr(common, "make_sentences", make)
    with pytest.raises(KeyboardInterrupt):
        call_stage(lm_both, "--run", run)
    assert made == [(300, max(20, *map(len, texts)))]


def test_invented_people_have_as_many_titles_as_the_lm_has_room_for(world):
    """The longest words count too; who fits keeps all, and what comes first stays."""
    traits = [common.Trait(profile, world.dataset.items) for profile in world.dataset.profiles]
    people = [({0: "music", 1: "student"}, [" Basic Guitar;"] * 9), ({1: "family"}, [" Pan;", " Pot;"])]

    def tokens(text):
        return len(common.pieces_of(world.tokenizer, [text])[0])

    words = sum(max(tokens(f" {word}") for word in trait.words) for trait in traits)
    for spare in (0, tokens(" Basic Guitar;") - 1):
        room = words + 4 * tokens(" Basic Guitar;") + spare
        assert lm_both.shortened(world.tokenizer, traits, people, room) == [
            (people[0][0], [" Basic Guitar;"] * 4), people[1]]
    assert lm_both.shortened(world.tokenizer, traits, people, 1000) == people


def test_kar_scores_no_rows(runs, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["baselines.py", "kar", "--rows", "5"])
    with pytest.raises(SystemExit) as stop:
        baselines.main()
    assert stop.value.code == 2 and "leave out --rows" in capsys.readouterr().err


def test_history_first_is_the_text_turned_round_and_knows_where_the_word_begins(world):
    traits = [common.Trait(profile, world.dataset.items) for profile in world.dataset.profiles]
    people = [({0: "music", 1: "student"}, [" A;", " B b;"]), ({1: "engineer"}, [" C;"])]
    for (words, titles), (ids, at) in zip(people, lm_both.history_first(world.tokenizer, traits, people)):
        said = "".join(f"{traits[m].prompt} {word}" for m, word in words.items())
        assert world.tokenizer.decode(ids) == "".join(titles) + said
        assert world.tokenizer.decode(ids[at:]) == " " + list(words.values())[-1]


def test_the_loss_under_another_history_is_that_of_its_words_alone(world):
    """Against one text at a time; two people, so that the other history is the other's."""
    traits = [common.Trait(profile, world.dataset.items) for profile in world.dataset.profiles]
    people = [({0: "music"}, [" Basic Guitar;"]), ({0: "cooking"}, [" Basic Pan;", " Pot;"])]
    found = lm_both.word_sensitivity(world.likelihood.model, world.tokenizer, traits, people,
                                     np.random.default_rng(0))

    def loss(titles, word):
        first = sum(common.pieces_of(world.tokenizer, [*titles, traits[0].prompt]), [])
        answer, = common.pieces_of(world.tokenizer, [f" {word}"])
        logits = world.likelihood.model(torch.tensor([first + answer])).logits[0].log_softmax(1)
        return -sum(float(logits[len(first) - 1 + at, token]) for at, token in enumerate(answer)), len(answer)

    losses = [[loss(people[owner][1], people[at][0][0]) for at, owner in pairs]
              for pairs in (((0, 0), (1, 1)), ((0, 1), (1, 0)))]
    own, other = (sum(nll for nll, _ in pairs) / sum(count for _, count in pairs) for pairs in losses)
    assert found == {"hobby": pytest.approx(other - own, abs=1e-4)}
