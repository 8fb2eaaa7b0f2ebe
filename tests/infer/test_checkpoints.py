"""Checkpoints as people bring them: weights, tokenizers and configs that do not fit each other."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import call_stage, copy_run, infer, likelihood_of, make_lm, make_tokenizer, prepare
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import common

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    """folder(kind, change): a checkpoint whose tensors {name: tensor} are changed after it was saved."""
    def make(kind="llama", change=None, tokenizer=True):
        model, words = make_lm(kind)
        model.save_pretrained(tmp_path / kind)
        if tokenizer:
            words.save_pretrained(tmp_path / kind)
        if change:
            path = tmp_path / kind / "model.safetensors"
            save_file(change(load_file(path)), path, metadata={"format": "pt"})
        return tmp_path / kind

    return make


def opened(path):
    return common.load_language_model(str(path), torch.float32, CPU)


# -------- weights

def prefixed(tensors):
    return {f"student.{name}": tensor for name, tensor in tensors.items()}


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize("kind, change, count", [
    ("llama", prefixed, None), ("llama", without("layers.1."), 9), ("llama", without("mlp.up_proj"), 2),
    ("llama", without("lm_head"), 1), ("gpt2", without("h.0.attn.c_attn.bias"), 1)])
def test_weights_that_the_files_lack_are_named_and_never_made_up(folder, kind, change, count):
    with pytest.raises(common.UserError) as error:
        opened(folder(kind, change))
    assert "tensors are not in the files, among them " in str(error.value) and kind in str(error.value)
    assert count is None or str(error.value).startswith(f"{count} of the model's")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_a_whole_checkpoint_lacks_nothing_also_where_the_head_is_tied(folder, kind):
    model, _ = opened(folder(kind))
    expected, _ = make_lm(kind)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_tensors_that_the_model_does_not_know_are_no_harm(folder):
    opened(folder(change=lambda tensors: tensors | {"value_head.weight": torch.ones(3)}))


# -------- tokenizers

@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_a_folder_without_a_tokenizer_is_one_line(folder, kind):
    """transformers raises for some architectures, and makes an empty tokenizer for others."""
    with pytest.raises(common.UserError, match="tokenizer"):
        opened(folder(kind, tokenizer=False))


def test_a_tokenizer_of_more_words_than_the_model_has_is_one_line(folder):
    path = folder(tokenizer=False)
    words = make_tokenizer()
    words.add_tokens([f"zorp{number}" for number in range(50)])
    words.save_pretrained(path)
    with pytest.raises(common.UserError, match="tokenizer knows [0-9,]+ tokens, the model [0-9,]+ "):
        opened(path)


@pytest.mark.parametrize("token", ["Guitar", "music", "Zorp", "bought"])
def test_a_text_of_a_token_that_the_model_lacks_is_one_line(token, folder, prepared, tmp_path, monkeypatch):
    """A few tokens more than the model has are no harm, unless a title, word or prompt is written in them."""
    path = folder(tokenizer=False)
    words = make_tokenizer(bos=True)
    words.add_tokens([token])
    words.save_pretrained(path)
    texts = infer.history_texts

    def with_a_zorp(dataset, split, args):  # in the validation rows
        return [lines + [" Zorp;"] * (split == common.VALIDATION) for lines in texts(dataset, split, args)]

    monkeypatch.setattr(infer, "history_texts", with_a_zorp)
    monkeypatch.setattr(infer, "solve", None)  # before anybody is inferred
    with pytest.raises(common.UserError, match="the tokenizer writes tokens that the model does not have"):
        call_stage(infer, "--run", copy_run(prepared, tmp_path / "run"), "--lm", path)


def test_a_word_without_a_token_is_one_line(prepared, lm_folders, tmp_path, monkeypatch):
    """Some tokenizers write nothing for letters that they do not know."""
    pieces_of = infer.pieces_of
    monkeypatch.setattr(infer, "pieces_of", lambda tokenizer, texts: [
        [] if text == " music" else ids for text, ids in zip(texts, pieces_of(tokenizer, texts))])
    with pytest.raises(common.UserError, match="no token for 1 words, among them 'music'"):
        call_stage(infer, "--run", copy_run(prepared, tmp_path / "run"), "--lm", lm_folders["gpt2"])


def merging(*pairs):
    """A tokenizer of characters that merges these pairs."""
    tokens = sorted(set("abcdefghijklmnopqrstuvwxyz 1;,.\n")) + ["".join(pair) for pair in pairs]
    vocabulary = {text: number for number, text in enumerate(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, list(pairs))))


def test_a_text_that_an_anchor_would_swallow_is_encoded_behind_another():
    """Here '1' and ',' are one token: without a check the comma was lost."""
    tokenizer = merging(("1", ","))
    assert len(tokenizer.encode(" 1, and")) == len(" 1, and") - 1
    ids, other = common.pieces_of(tokenizer, [", and", " or"])
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == ", and"
    assert "".join(tokenizer.convert_ids_to_tokens(other)) == " or"


def test_the_prompt_begins_as_its_tokenizer_begins_a_text(prepared):
    """Llama-2's writes a space before a text, but not before what goes on in the middle of one."""
    dataset = common.load_dataset(prepared)
    prompts = [profile["prompt"] for profile in dataset.profiles]
    letters = sorted(set("\u2581".join([*prompts, dataset.task_prompt, *common.ANCHORS, "any text"])))
    plain = Tokenizer(models.BPE({text: number for number, text in enumerate(letters)}, []))
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    texts = ["".join(tokenizer.convert_ids_to_tokens(segment.ids)).replace("\u2581", " ")
             for segment in infer.prompt_segments(tokenizer, dataset) if segment.kind != "theta"]
    assert texts == [" " + prompts[0], *prompts[1:], dataset.task_prompt]


def test_a_tokenizer_that_merges_a_text_with_everything_is_refused():
    tokenizer = merging(("1", ","), ("a", ","), ("\n", ","), (";", ","))
    with pytest.raises(common.UserError, match="this tokenizer merges ', and'"):
        common.pieces_of(tokenizer, [", and"])


def test_a_word_tokenizer_that_knows_no_anchor_still_tells_texts_apart():
    vocabulary = {"[UNK]": 0, "drum": 1, "lure": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    assert common.pieces_of(tokenizer, [" drum", " lure"]) == [[1], [2]]


# -------- architectures

def test_a_mask_for_one_user_that_does_not_serve_two_is_refused(world):
    likelihood = likelihood_of(*make_lm("llama"), world[0])
    body = likelihood.body

    def for_one(*inputs, **rest):
        if "attention_mask" in rest and len(rest["inputs_embeds"]) != len(rest["attention_mask"]):
            raise ValueError("Attention mask should be of size (2, 1, 9, 9), but is (1, 1, 9, 9)")
        return body(*inputs, **rest)

    likelihood.body = for_one
    with pytest.raises(ValueError):
        infer.find_flaw(likelihood)  # open_model turns it into one line


@pytest.mark.parametrize("mask, refused", [("strict", True), ("causal", False)])
def test_an_llm_that_ignores_positions_is_refused_where_they_matter(mask, refused, world):
    """Under the strict mask each profile begins at the same position, else they are not exchangeable."""
    likelihood = likelihood_of(*make_lm("llama"), world[0], mask)
    assert infer.find_flaw(likelihood) is None
    body = likelihood.body

    def ignoring(*inputs, **rest):
        rest.pop("position_ids", None)
        return body(*inputs, **rest)

    likelihood.body = ignoring
    flaw = infer.find_flaw(likelihood)
    assert ("ignores positions" in (flaw or "")) == refused


def test_window_and_layers_are_those_of_the_language_part(world, monkeypatch):
    """Wrappers of several modalities hold the LLM's settings one level deeper."""
    model, tokenizer = make_lm("llama", context=100)
    inner = model.config
    outer = SimpleNamespace(get_text_config=lambda: inner, model_type="wrapper")
    model.config = outer
    likelihood = likelihood_of(model, tokenizer, world[0])
    assert likelihood.room == 100 - likelihood.prompt_length
    likelihood.device = SimpleNamespace(type="cuda")
    memory = SimpleNamespace(total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    assert infer.token_budget_of(likelihood) > 2048


def test_a_checkpoint_with_a_missing_layer_ends_stage_02_in_one_line(folder, prepared, tmp_path, capsys):
    run, path = copy_run(prepared, tmp_path / "run"), folder("llama", without("layers.1."))
    capsys.readouterr()  # what saving it printed
    with pytest.raises(SystemExit) as stop:
        common.guarded(lambda: call_stage(infer, "--run", run, "--lm", path))
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1
    assert not list(run.glob("blocks-*"))


# -------- new users

def test_users_whom_stage_01_dropped_are_named_with_its_flag_and_the_others_are_served(
        tmp_path, monkeypatch, capsys):
    """02 --users with a file of four: one is new, one dropped, one unknown, one inferred before."""
    run = tmp_path / "run"
    model, tokenizer = make_lm("gpt2")
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    flags = ["--run", run, "--lm", tmp_path / "lm", "--steps", 1, "--task-steps", 1]
    call_stage(prepare, "--run", run, "--subsample-users", 120)
    call_stage(infer, *flags)
    before = json.loads((run / "users.json").read_text())
    call_stage(prepare, "--run", run, "--subsample-users", 140, "--max-per-user", 60)
    users = json.loads((run / "users.json").read_text())
    new = next(raw for raw in users if raw not in before)
    dropped = json.loads((run / "dropped_users.json").read_text())[0]
    (run / "some.txt").write_text("\n".join([new, dropped, "nobody", before[0]]) + "\n")
    capsys.readouterr()
    call_stage(infer, *flags, "--users", run / "some.txt")
    text = capsys.readouterr().out
    said = "(--min-interactions 4, --subsample-users 140, --max-per-user 60)"
    assert f"among them '{dropped}': stage 01 dropped them {said}" in text
    assert "among them 'nobody': they are not in the data set; run 01 with their rows" in text
    inferred = json.loads((run / "profiles_users.json").read_text())["inferred"]
    assert users.index(new) in inferred
    infer.warn_of({"nobody"}, "some.txt", "gone")
    assert capsys.readouterr().out.count("WARNING") == 1
    monkeypatch.setattr(infer, "PROCESS", 1)  # one process alone says so
    infer.warn_of({"nobody"}, "some.txt", "gone")
    assert not capsys.readouterr().out
    (run / "some.txt").write_text("\n\n")
    with pytest.raises(common.UserError, match="names no user"):
        call_stage(infer, *flags, "--users", run / "some.txt")


def test_no_block_is_larger_than_asked_for_where_theta_is_judged_either(
        prepared, lm_folders, tmp_path, monkeypatch):
    run = copy_run(prepared, tmp_path / "run")
    sizes = []

    def spy(*args):
        blocks = make_blocks(*args)
        sizes.extend(map(len, blocks))
        return blocks

    make_blocks = infer.make_blocks
    monkeypatch.setattr(infer, "make_blocks", spy)
    call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 1, "--task-steps", 1,
               "--block-size", 3)
    assert len(sizes) > 100 and max(sizes) == 3


def test_a_task_prompt_that_nobody_learns_has_no_judges(prepared, lm_folders, tmp_path, monkeypatch):
    run = copy_run(prepared, tmp_path / "run")
    monkeypatch.setattr(infer, "fit_task", None)
    call_stage(infer, "--run", run, "--lm", lm_folders["gpt2"], "--steps", 1, "--task-steps", 0)
    assert len(infer.open_space(run, "cpu").task)


def test_a_new_user_without_a_title_to_read_is_named(lm_folders, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--run", run, "--lm", lm_folders["gpt2"], "--steps", 1, "--task-steps", 1]
    call_stage(prepare, "--run", run, "--subsample-users", 60, "--min-interactions", 1, "--max-per-user", 5,
               "--positive-above", 4)
    call_stage(infer, *flags)
    users = json.loads((run / "users.json").read_text())
    inferred = json.loads((run / "profiles_users.json").read_text())["inferred"]
    without = next(raw for user, raw in enumerate(users) if user not in inferred)
    (run / "some.txt").write_text(f"{without}\n{users[inferred[0]]}\n")
    capsys.readouterr()
    call_stage(infer, *flags, "--users", run / "some.txt")
    text = capsys.readouterr().out
    assert f"1 users of {run}/some.txt get no profile, among them '{without}': they have no title" in text


def test_gpt2_of_the_hub_s_kind_with_a_prefix_opens(folder):
    """GPT-2's own files name the body without 'transformer.': transformers knows this prefix."""
    path = folder("gpt2", lambda tensors: {
        name.removeprefix("transformer."): tensor for name, tensor in tensors.items()})
    model, _ = opened(path)
    expected, _ = make_lm("gpt2")
    assert torch.equal(model.transformer.h[1].mlp.c_fc.weight, expected.transformer.h[1].mlp.c_fc.weight)
    assert isinstance(model, transformers.GPT2LMHeadModel)
