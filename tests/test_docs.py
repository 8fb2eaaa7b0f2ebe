"""The scripts that explain and draw: each figure against the long way round."""

import json

import numpy as np
import pytest
import torch
from conftest import copy_run, infer, likelihood_of, load_script, ok, random_theta, run_stage


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
    assert explain.continue_greedily(likelihood, first, 12) != explain.continue_greedily(likelihood, second, 12)


def test_lexicon_whole_words_before_pieces_joined_words_and_stop_words(lm, world):
    model, tokenizer = lm
    likelihood = likelihood_of(model, tokenizer, world[0])
    lexicon = explain.Lexicon(likelihood, tokenizer, world[0])
    whole = [label for label, is_whole in zip(lexicon.labels, lexicon.whole) if is_whole]
    assert "is*" in whole and all(label[0] == "-" for label, is_whole in zip(lexicon.labels, lexicon.whole) if not is_whole)
    assert {"music", "student"} <= set(whole)  # also where the tokenizer cuts them in pieces
    word = next(value for value in ("wealthy", "fishing", "student") if len(infer.pieces(tokenizer, [f" {value}"])[0]) > 1)
    ids = infer.pieces(tokenizer, [f" {word}"])[0]
    assert lexicon.nearest(likelihood.words.weight[ids].mean(0)[None])[0][0] == word
    piece = lexicon.vectors[~lexicon.whole][0]
    assert lexicon.nearest(piece[None], 3)[0] == [whole[index] for index in (lexicon.vectors[lexicon.whole] @ piece).topk(3).indices]


def test_attention_to_theta_is_the_average_over_layers_and_heads(world, lm):
    """Against attention computed by hand from GPT-2's own projections; and the weights of a row add up to at most 1."""
    model, tokenizer = lm
    likelihood = likelihood_of(model, tokenizer, world[0])
    theta, ids = random_theta(likelihood, 3), [5, 9, 17, 30]
    found = figures.attention_to_theta(likelihood, theta, ids)
    assert found.shape == (3, 2, 4) and (found > 0).all() and (found.sum(1) < 1).all() and model.config._attn_implementation == "sdpa"
    if model.config.model_type != "gpt2":
        return
    inputs = []
    hooks = [block.attn.register_forward_pre_hook(lambda module, args, kwargs: inputs.append(args[0]), with_kwargs=True)
             for block in model.transformer.h]
    likelihood.hidden(theta, torch.tensor([ids]).expand(3, -1))
    for hook in hooks:
        hook.remove()
    mask, _ = likelihood.layout(4)
    layers = []
    for block, states in zip(model.transformer.h, inputs):
        query, key, _ = block.attn.c_attn(states).split(32, dim=2)
        query, key = (part.unflatten(2, (2, 16)).transpose(1, 2) for part in (query, key))
        layers.append((query @ key.transpose(2, 3) / 4 + mask).softmax(-1).mean(1))
    place = [sum(len(before.ids) for before in likelihood.segments[:at]) for at, segment in enumerate(likelihood.segments) if segment.kind == "theta"]
    assert torch.allclose(found, torch.stack(layers).mean(0)[:, -4:, place].transpose(1, 2), atol=1e-5)


def test_the_card_and_the_figures_over_all_users(inferred):
    users = json.loads((inferred / "users.json").read_text())
    printed = ok(run_stage("docs/explain.py", "--run", inferred, "--user", users[3], "--all")).stdout
    bank = np.load(inferred / "feature_bank.npy")
    assert f"user {users[3]}" in printed and f"code {bank[3, 0]}" in printed and "greedily" in printed and "hobby: planted word nearest" in printed
    explainer = explain.Explainer(inferred, torch.device("cpu"))
    theta = explainer.problem.theta
    ids, lengths = infer.pad(explainer.histories, [3], torch.device("cpu"))
    assert explainer.nll(3, theta[5]) == pytest.approx(float(explainer.likelihood(torch.tensor(theta[5:6]), ids, lengths)) / int(lengths), rel=1e-5)
    assert f"under own theta {explainer.nll(3, theta[3]):.4f}" in printed
    for flags, message in ((["--user", "nobody"], "no user has the id nobody"), ([], "say whom to explain")):
        refused = run_stage("docs/explain.py", "--run", inferred, *flags)
        assert refused.returncode == 2 and message in refused.stderr


def test_statistics_find_a_planted_word_that_is_there(inferred):
    """With theta put on the planted words themselves, the top word is always right and chance is not."""
    explainer = explain.Explainer(inferred, torch.device("cpu"))
    for m, planted in enumerate((explain.prepare.DEMO_HOBBIES, explain.prepare.DEMO_BACKGROUNDS)):
        vectors = np.stack([explainer.lexicon.vectors[explainer.lexicon.labels.index(word)].numpy() for word in planted])
        explainer.problem.theta[:, m] = vectors[explainer.truth[:, m]]
    found = explainer.statistics(np.random.default_rng(0))
    for name in ("hobby", "background"):
        assert found[name]["planted word nearest"] == 1 and found[name]["planted word nearest by chance"] < 0.6


def test_figures_are_drawn_and_a_missing_artifact_is_said(inferred, tmp_path):
    run = copy_run(inferred, tmp_path / "run")
    refused = run_stage("docs/figures.py", "--run", run)
    assert refused.returncode == 2 and "results.json is missing" in refused.stderr and not (run / "figures").exists()
    ok(run_stage("04_train_ctr.py", "--run", run, "--seeds", 1, "--epochs", 1))
    assert "attention to theta on fillers / words of titles / marks (3 / " in ok(run_stage("docs/figures.py", "--run", run)).stdout
    drawn = {path.stem: path.read_bytes() for path in (run / "figures").iterdir()}
    assert set(drawn) == {"likelihood", "attention", "mask", "theta", "usage", "results"} and all(data[:4] == b"\x89PNG" for data in drawn.values())
    facts = json.loads((run / "profiles.json").read_text())
    del facts["train_nll_steps"]  # as a run of an earlier version
    (run / "profiles.json").write_text(json.dumps(facts))
    refused = run_stage("docs/figures.py", "--run", run)
    assert refused.returncode == 2 and "lacks train_nll_steps" in refused.stderr and "Traceback" not in refused.stderr
