"""The scripts that explain and draw: each figure against the long way round."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (call_stage, copy_run, infer, likelihood_of, load_script, ok, random_theta,
                      fork_stage)

import common

explain, figures = load_script("explain"), load_script("figures")


def test_cached_decoding_equals_the_full_forward_pass(lm, world):
    likelihood = likelihood_of(*lm, world[0])
    theta, ids = random_theta(likelihood, 1), []
    for _ in range(9):  # the whole prompt and all that was said so far, anew for each token
        with torch.no_grad():
            states = likelihood.hidden(theta, torch.tensor([ids], dtype=torch.long))
        ids.append(int(likelihood.head(states[0, -1]).argmax()))
    assert explain.continue_greedily(likelihood, theta[0], 9) == ids and len(set(ids)) > 1


def test_the_continuation_depends_on_theta(lm, world):
    likelihood = likelihood_of(*lm, world[0])
    first, second = random_theta(likelihood, 2) * 3
    said = [explain.continue_greedily(likelihood, theta, 12) for theta in (first, second)]
    assert said[0] != said[1]


def test_lexicon_whole_words_before_pieces_joined_words_and_stop_words(lm, world):
    model, tokenizer = lm
    likelihood = likelihood_of(model, tokenizer, world[0])
    lexicon = explain.Lexicon(likelihood, tokenizer, world[0])
    whole = [label for label, is_whole in zip(lexicon.labels, lexicon.whole) if is_whole]
    pieces = [label for label, is_whole in zip(lexicon.labels, lexicon.whole) if not is_whole]
    assert "is*" in whole and all(label[0] == "-" for label in pieces)
    assert {"music", "ordinary"} <= set(whole)  # also where the tokenizer cuts them in pieces
    values = ("luxurious", "fishing", "cheap")
    word, ids = next((value, ids) for value, ids in zip(
        values, common.pieces_of(tokenizer, [f" {value}" for value in values])) if len(ids) > 1)
    origin = torch.randn(32)
    assert lexicon.nearest(likelihood.word_table.weight[ids].mean(0)[None] - origin, origin)[0][0] == word
    piece = lexicon.vectors[~lexicon.whole][0] - origin
    cosine = torch.nn.functional.cosine_similarity(lexicon.vectors[lexicon.whole] - origin, piece)
    assert lexicon.nearest(piece[None], origin, 3)[0] == [whole[index] for index in cosine.topk(3).indices]


def test_attention_to_theta_is_the_average_over_layers_and_heads(world, lm):
    """Against attention by hand from GPT-2's own projections; the weights of a row add up to at most 1."""
    model, tokenizer = lm
    likelihood = likelihood_of(model, tokenizer, world[0])
    theta, ids = random_theta(likelihood, 3), [5, 9, 17, 30]
    found = figures.attention_to_theta(likelihood, theta, ids)
    assert found.shape == (3, 2, 4) and (found > 0).all() and (found.sum(1) < 1).all()
    assert model.config._attn_implementation == "sdpa"
    if model.config.model_type != "gpt2":
        return
    inputs = []
    hooks = [block.attn.register_forward_pre_hook(lambda module, args, kwargs: inputs.append(args[0]),
                                                  with_kwargs=True) for block in model.transformer.h]
    likelihood.hidden(theta, torch.tensor([ids]).expand(3, -1))
    for hook in hooks:
        hook.remove()
    mask, _ = likelihood.layout(4)
    layers = []
    for block, states in zip(model.transformer.h, inputs):
        query, key, _ = block.attn.c_attn(states).split(32, dim=2)
        query, key = (part.unflatten(2, (2, 16)).transpose(1, 2) for part in (query, key))
        layers.append((query @ key.transpose(2, 3) / 4 + mask).softmax(-1).mean(1))
    segments = likelihood.segments
    place = [sum(len(before.ids) for before in segments[:at])
             for at, segment in enumerate(segments) if segment.kind == "theta"]
    assert torch.allclose(found, torch.stack(layers).mean(0)[:, -4:, place].transpose(1, 2), atol=1e-5)


def test_the_card_and_the_figures_over_all_users(inferred):
    users = json.loads((inferred / "users.json").read_text())
    printed = ok(fork_stage("tools/explain.py", "--run", inferred, "--user", users[3], "--all")).stdout
    bank = np.load(inferred / "feature_bank.npy")
    assert all(part in printed for part in (f"user {users[3]}", f"code {bank[3, 0]}", "greedily",
                                            "hobby: planted word nearest"))
    explainer = explain.Explainer(inferred, torch.device("cpu"))
    theta = explainer.problem.theta()
    ids, lengths = infer.pad(explainer.histories, [3], torch.device("cpu"))
    expected = float(explainer.likelihood(torch.tensor(theta[5:6]), ids, lengths)) / int(lengths)
    assert explainer.nll(3, theta[5]) == pytest.approx(expected, rel=1e-5)
    assert f"under own theta {explainer.nll(3, theta[3]):.4f}" in printed
    for flags, message in ((["--user", "nobody"], "no user has the id nobody"), ([], "say what to explain")):
        refused = fork_stage("tools/explain.py", "--run", inferred, *flags)
        assert refused.returncode == 2 and message in refused.stderr


def test_who_has_a_theta_and_no_title_is_in_no_likelihood(inferred, monkeypatch, capsys):
    """As after 02 --users, for which 01 has split the rows anew."""
    explainer = explain.Explainer(inferred, torch.device("cpu"))
    sampled = explainer.statistics(np.random.default_rng(0))
    user = int(np.flatnonzero(explainer.problem.inferred)[0])
    open_likelihood = explain.quantize.Problem.open_likelihood

    def without_one(problem, device):
        likelihood, histories, *more = open_likelihood(problem, device)
        problem.facts["rows_kept"] = 1
        histories = [ids[:0] if place == user else ids for place, ids in enumerate(histories)]
        return likelihood, histories, *more

    monkeypatch.setattr(explain.quantize.Problem, "open_likelihood", without_one)
    emptied = explain.Explainer(inferred, torch.device("cpu"))
    what = next(name for name in sampled if name.startswith("nats"))
    found = emptied.statistics(np.random.default_rng(0))[what]
    assert found["users"] == sampled[what]["users"] - 1 and found["under own theta"] > 0
    assert "nats per token" not in "\n".join(emptied.card(user))
    call_stage(explain, "--run", inferred, "--user", emptied.problem.dataset.users[user])
    assert "WARNING: stage 02 ran with --users" in capsys.readouterr().out


def test_statistics_find_a_planted_word_that_is_there(inferred):
    """With z put at half the planted words, the top word is always right and chance is not."""
    explainer = explain.Explainer(inferred, torch.device("cpu"))
    for m, planted in enumerate((explain.prepare.DEMO_HOBBIES, explain.prepare.DEMO_BACKGROUNDS)):
        places = [explainer.space.words[m].index(word) for word in planted]
        vectors = explainer.space.word_z(m)[places].numpy()
        explainer.problem.z[:, m] = vectors[explainer.truth[:, m]] / 2
    found = explainer.statistics(np.random.default_rng(0))
    for name in ("hobby", "background"):
        assert found[name]["planted word nearest"] == 1
        assert found[name]["planted word nearest by chance"] < 0.6


def test_tastes_are_what_z_and_its_move_towards_a_word_tell(inferred):
    """z is planted: along one word's direction it is the share of that word, elsewhere noise."""
    explainer = explain.Explainer(inferred, torch.device("cpu"))
    dataset, known = explainer.problem.dataset, np.flatnonzero(explainer.problem.inferred)
    rng = np.random.default_rng(0)
    rows = dataset.rows(common.SEEN)
    word = explainer.space.words[0][1]
    shares = np.zeros(len(dataset.users))
    for user in known:
        items = rows[(rows[:, 0] == user) & (rows[:, 2] == 1), 1]
        shares[user] = np.mean([word in dataset.items[item]["attributes"]["hobby"] for item in items])
    direction = explainer.space.word_z(0)[1].numpy()
    z = rng.normal(0, 0.05, explainer.problem.z.shape)
    z[:, 0] += shares[:, None] * direction / np.linalg.norm(direction)
    explainer.problem.z = z.astype(np.float32)
    read, towards = explainer.tastes(0)[word]
    assert read > 0.9 and towards > 0.9
    explainer.problem.z = rng.normal(size=z.shape).astype(np.float32)
    read, towards = explainer.tastes(0)[word]
    assert abs(towards) < 0.4 and read < 0.4


def test_figures_are_drawn_and_a_missing_artifact_is_said(inferred, tmp_path):
    run = copy_run(inferred, tmp_path / "run")
    refused = fork_stage("tools/figures.py", "--run", run)
    assert refused.returncode == 2 and "results.json is missing" in refused.stderr
    assert not (run / "figures").exists()
    ok(fork_stage("04_train_ctr.py", "--run", run, "--seeds", 1, "--epochs", 1))
    printed = ok(fork_stage("tools/figures.py", "--run", run)).stdout
    assert "attention to theta on fillers / words of titles / marks (3 / " in printed
    drawn = {path.stem: path.read_bytes() for path in (run / "figures").iterdir()}
    assert set(drawn) == {"likelihood", "attention", "mask", "recsysllm", "theta", "usage", "results"}
    assert all(data[:4] == b"\x89PNG" for data in drawn.values())
    facts = json.loads((run / "profiles.json").read_text())
    del facts["train_nll_steps"]  # as a run of an earlier version
    (run / "profiles.json").write_text(json.dumps(facts))
    refused = fork_stage("tools/figures.py", "--run", run)
    assert refused.returncode == 2 and "lacks train_nll_steps" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_card_says_towards_which_word_theta_moved_and_calls_codes_by_their_names(inferred):
    words = [profile["words"] for profile in json.loads((inferred / "quantize.json").read_text())["profiles"]]
    explainer = explain.Explainer(inferred, torch.device("cpu"))
    user = int(np.flatnonzero(explainer.problem.inferred)[0])
    bank, z = explainer.bank, explainer.problem.z[user]
    lines = explainer.card(user)
    of_codes = [line for line in lines if line.startswith("    code ")]
    of_words = [line for line in lines if "theta moved towards" in line]
    assert len(of_codes) == len(of_words) == 2  # one of each for a profile
    for m, line in enumerate(of_codes):
        assert line.startswith(f"    code {bank[user, m]} ") and f" {words[m][bank[user, m]]}, shared" in line
    for m, line in enumerate(of_words):
        words_z = explainer.space.word_z(m)
        cosine = torch.nn.functional.cosine_similarity(torch.tensor(z[m])[None], words_z)
        assert line.split()[3].rstrip(",") == explainer.space.words[m][int(cosine.argmax())]
        moved = z[m] @ explainer.space.basis[m].numpy()  # before it is shrunk
        vectors = explainer.space.vectors[m].numpy()
        apart = np.linalg.norm(vectors - explainer.space.words_mean[m].numpy(), axis=1).mean()
        assert f", {np.linalg.norm(moved) / apart:.0%} of a word's distance" in line
    assert explainer.codes(user) == " ".join(words[m][code] for m, code in enumerate(bank[user]))
    explainer.bank[user] = [len(book) for book in words]
    assert any(line.startswith("    code                unknown") for line in explainer.card(user))
    assert explainer.codes(user) == "unknown unknown"


def test_a_bank_of_other_codes_is_refused(inferred, tmp_path):
    run = copy_run(inferred, tmp_path / "run")
    np.save(run / "feature_bank.npy", np.load(run / "feature_bank.npy")[::-1])
    with pytest.raises(common.UserError, match="feature_bank.npy was made from another quantize.json"):
        explain.Explainer(run, torch.device("cpu"))


def test_figures_of_a_bank_or_results_of_another_run_are_refused(inferred, tmp_path):
    run = copy_run(inferred, tmp_path / "run")
    ok(fork_stage("04_train_ctr.py", "--run", run, "--seeds", 1, "--epochs", 1))
    facts = common.load(run, "results.json")
    for made_from, name in (("dataset", "dataset"), ("bank userip", "feature_bank.npy")):
        common.save_json(run / "results.json", facts | {
            "fingerprints": facts["fingerprints"] | {made_from: "another"}})
        refused = fork_stage("tools/figures.py", "--run", run)
        assert refused.returncode == 2 and f"results.json was made from another {name}" in refused.stderr
    np.save(run / "feature_bank.npy", np.load(run / "feature_bank.npy")[::-1])
    refused = fork_stage("tools/figures.py", "--run", run)
    assert refused.returncode == 2 and "feature_bank.npy was made from another" in refused.stderr
    assert not (run / "figures").exists()


def test_a_code_may_be_called_by_dollars(tmp_path):
    profile = {"name": "price", "words": ["$", "$$", "$$$"], "counts": [3, 2, 1], "perplexity": 2.7}
    figure = figures.usage_figure({"profiles": [profile]})
    figure.tight_layout()
    figure.savefig(tmp_path / "usage.png")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["$", "$$", "$$$"]


def test_ids_that_begin_with_a_dash_are_given_one_by_one(monkeypatch, capsys):
    problem = SimpleNamespace(dataset=SimpleNamespace(users=["-7", "--all"]), facts={"rows_kept": 0})
    explainer = SimpleNamespace(problem=problem, card=lambda user: [f"card of {user}"])
    monkeypatch.setattr(explain, "Explainer", lambda run, device: explainer)
    call_stage(explain, "--user=-7", "--user=--all")
    assert capsys.readouterr().out.split("\n\n")[:2] == ["card of 0", "card of 1"]


def test_nobody_is_compared_with_themselves(inferred):
    """Where one user alone has a profile, there is no other whose theta could be tried."""
    explainer = explain.Explainer(inferred, torch.device("cpu"))
    user = int(np.flatnonzero(explainer.problem.inferred)[0])
    explainer.problem.inferred = np.arange(len(explainer.bank)) == user
    assert explainer.card(user)[-1].count("under ") == 2
    statistics = explainer.statistics(np.random.default_rng(0))
    figures = statistics["nats per token of the histories that theta was fitted to"]
    assert set(figures) == {"users", "under own theta"}
    explainer.has_history[:] = False
    statistics = explainer.statistics(np.random.default_rng(0))
    assert statistics["nats per token of the histories that theta was fitted to"] == {"users": 0}


def test_the_sweep_is_drawn_from_the_kept_study(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "KEPT", tmp_path)
    with pytest.raises(common.UserError, match="demo-codes was not run .*python tools/tables.py demo-codes"):
        figures.codes_figure()
    rows = [{"variant": f"K = {first},{second}", "ids": ids, "test_auc": 0.5 + first / 100 + seed / 1000}
            for first, second in ((4, 3), (2, 3), (16, 3), (4, 27)) for ids in ("none", "random", "userip")
            for seed in range(2)]
    common.save_json(tmp_path / "demo-codes.json", {"rows": rows})
    axes = figures.codes_figure().axes
    for panel, sizes in zip(axes, ([2, 4, 16], [3, 27])):
        assert all(line.get_xdata().tolist() == sizes for line in panel.lines if len(line.get_xdata()) > 1)
    assert axes[0].containers[0][0].get_ydata() == pytest.approx([0.5205, 0.5405, 0.6605])


def test_a_table_is_drawn_a_row_a_dot_with_its_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "KEPT", tmp_path)
    rows = [{"variant": variant, "ids": ids, "test_auc": value + seed / 50}
            for variant, ids, value in (("default", "none", 0.5), ("default", "userip", 0.7),
                                        ("EM", "userip", 0.6))
            for seed in range(2)]
    common.save_json(tmp_path / "demo.json", {"rows": rows})
    axes, = figures.tables_figure([("demo", "test_auc", "a world")]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["none", "userip", "userip, EM"]
    dots = [container[0].get_xdata()[0] for container in axes.containers]
    assert dots == pytest.approx([0.51, 0.71, 0.61])
    low, high = axes.containers[1][2][0].get_segments()[0][:, 0]
    assert (high - low) / 2 == pytest.approx(np.std([0.7, 0.72], ddof=1))
    other = [{"variant": "rated", "ids": ids, "test_auc": 0.8} for ids in ("none", "userip")]
    common.save_json(tmp_path / "rated.json", {"rows": other})  # of a later study our row alone
    axes, = figures.tables_figure([("demo rated", "test_auc", "a world")]).axes
    assert [label.get_text() for label in axes.get_yticklabels()][2:] == ["userip, EM", "userip, rated"]


def test_the_mask_is_shown_as_a_grid(inferred, capsys):
    call_stage(explain, "--run", inferred, "--mask")
    grid = [line for line in capsys.readouterr().out.splitlines() if " |" in line]
    first, second = (line.split("|")[1].split() for line in grid if "<theta^" in line)
    last = grid.index(next(line for line in grid if "<theta^2>" in line))
    assert first.count("#") + second.count("#") == last + 1  # each sees its own name and itself
    assert grid[-1].count("#") == len(grid)
