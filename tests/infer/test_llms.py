"""Architectures beside GPT-2, Llama and OPT: what opens is used rightly, what cannot be used is one line."""

import pytest
import torch
import transformers
from conftest import infer, likelihood_of, make_lm, make_tokenizer, random_theta, settings, space_of

import common

CPU = torch.device("cpu")
ROTARY = {"intermediate_size": 64, "num_key_value_heads": 1, "max_position_embeddings": 512,
          "initializer_range": 0.2}
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
OLD = {"n_embd": 32, "n_layer": 2, "n_positions": 512, "rotary_dim": 4, "initializer_range": 0.2}
KINDS = {  # name of the classes: settings
    "Gemma": WIDTH | ROTARY | {"head_dim": 16},
    "BioGpt": WIDTH | {"intermediate_size": 64, "initializer_range": 0.2, "hidden_dropout_prob": 0.0},
    "GPTNeo": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 512,
               "attention_types": [[["global", "local"], 1]], "window_size": 256, "initializer_range": 0.2},
    "GPTJ": OLD | {"n_head": 2}, "CodeGen": OLD | {"n_head": 4},
    "Mistral": WIDTH | ROTARY | {"sliding_window": 64},
    "Rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 512},
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2},
    "Falcon": WIDTH | {"alibi": True, "initializer_range": 0.2},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2},
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """folder_of(kind): a tiny random model of this architecture, as save_pretrained writes it."""
    def make(kind):
        folder, tokenizer = tmp_path_factory.mktemp(kind), make_tokenizer()
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=0, eos_token_id=0, **KINDS[kind])
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder
    return make


def opened(folder, dataset, dtype="fp32"):
    """What stage 02 opens: (likelihood, tokenizer, facts)."""
    return infer.open_model(dataset, settings(lm=str(folder), dtype=dtype, run=folder), CPU, None)


@pytest.mark.parametrize("kind", ["Gemma", "BioGpt"])
def test_vectors_are_what_the_llm_makes_of_words(kind, folder_of, world):
    """These LLMs scale after the table: a space of the raw weights would be 5 times too small."""
    likelihood, *_ = opened(folder_of(kind), world[0])
    ids, table = torch.tensor([5, 9, 17]), likelihood.word_table.weight
    assert torch.equal(likelihood.vectors(ids), likelihood.word_table(ids))
    assert torch.allclose(likelihood.vectors()[ids], 32 ** 0.5 * table[ids], rtol=1e-4)
    space, plain = space_of(likelihood, make_tokenizer(), world[0]), table[common.pieces_of(
        make_tokenizer(), [" music"])[0]].mean(0)
    music = space.words[0].index("music")
    vector = space.origin[0] + space.word_z(0)[music] @ space.basis[0]
    assert torch.allclose(vector, 32 ** 0.5 * plain, atol=1e-3)


@pytest.mark.parametrize("kind", ["GPTNeo", "GPTJ", "CodeGen"])
def test_an_architecture_without_fused_attention_is_opened_with_the_plain_one(kind, folder_of, world):
    """And infers: a profile's states see its own name alone, by the Jacobian."""
    likelihood, *_ = opened(folder_of(kind), world[0])
    theta, ids = random_theta(likelihood, 1).requires_grad_(), torch.tensor([[5, 6, 7]])
    places = [at for at, segment in enumerate(
        [segment for segment in likelihood.segments for _ in segment.ids]) if segment.kind == "theta"]
    states = likelihood.hidden(theta, ids)[0]
    for m, place in enumerate(places):
        gradient, = torch.autograd.grad(states[place, 3], theta, retain_graph=True)
        assert gradient[0, m].norm() > 1e-4 and gradient[0, 1 - m].norm() == 0
    assert torch.autograd.grad(states[-1, 3], theta)[0].norm(dim=2).min() > 1e-6


@pytest.mark.parametrize("kind, dtype, words", [
    ("Rwkv", "fp32", "sees through the mask"), ("Mamba", "fp32", "this LLM"), ("Mamba", "bf16", "this LLM"),
    ("Falcon", "fp32", "this LLM"), ("Falcon", "bf16", "this LLM"), ("Bloom", "bf16", "this LLM")])
def test_an_llm_that_cannot_be_used_is_refused_in_one_line(kind, dtype, words, folder_of, world):
    with pytest.raises(common.UserError, match=words) as error:
        opened(folder_of(kind), world[0], dtype)
    assert "change --lm" in str(error.value) and kind.lower() in str(error.value)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("leak", ["profile", "future"])
def test_a_model_that_ignores_its_mask_is_refused(leak, kind, world):
    """It takes causality alone for its mask, or none at all but for profiles."""
    likelihood = likelihood_of(*make_lm(kind), world[0])
    assert infer.find_flaw(likelihood) is None
    body, visible = likelihood.body, likelihood.layout(4)[0] == 0
    causal = torch.ones_like(visible).tril()
    later = visible | ~causal
    later[:, :, :likelihood.prompt_length] = visible[:, :, :likelihood.prompt_length]
    other = infer.additive_mask((causal if leak == "profile" else later)[0, 0], torch.float32)

    def leaking(*inputs, **rest):
        return body(*inputs, **(rest | {"attention_mask": other} if "attention_mask" in rest else rest))

    likelihood.body = leaking
    assert infer.find_flaw(likelihood) == "this LLM sees through the mask"


def test_an_llm_that_overflows_is_no_flaw_of_its_architecture(world):
    """Stage 02 then says that the likelihood is not finite, and which --dtype to take."""
    model, tokenizer = make_lm("llama")
    model.model.layers[0].mlp.down_proj.weight.data.fill_(torch.inf)
    likelihood = likelihood_of(model, tokenizer, world[0])
    theta, ids = random_theta(likelihood, 1), torch.arange(3)[None]
    assert likelihood(theta, ids, torch.tensor([3])).isnan().all() and infer.find_flaw(likelihood) is None


def test_a_bug_in_one_s_own_mask_is_raised(lm_folders, world, monkeypatch):
    """And not taken for a flaw of the LLM."""
    def build_visibility(segments, mask):
        return segments[99999]

    monkeypatch.setattr(infer, "build_visibility", build_visibility)
    with pytest.raises(IndexError):
        opened(lm_folders["gpt2"], world[0])


def test_a_history_ends_where_the_sliding_window_would_begin_to_hide_it(folder_of, world):
    """The 4-D mask overrides the window, so a history must fit into it."""
    likelihood, tokenizer, _ = opened(folder_of("Mistral"), world[0])
    assert likelihood.room == 64 - likelihood.prompt_length
    found = infer.tokenize_histories(tokenizer, [[" Guitar;"] * 60], likelihood.room)[0]
    assert 0 < len(found) <= likelihood.room
    likelihood, *_ = opened(folder_of("GPTNeo"), world[0])  # its name for the same
    assert likelihood.room == 256 - likelihood.prompt_length


def test_the_fingerprint_of_an_llm_sees_weights_and_words():
    model, tokenizer = make_lm("gpt2")
    before = common.lm_fingerprint(model, tokenizer)
    assert before == common.lm_fingerprint(*make_lm("gpt2"))
    more = make_tokenizer()
    more.add_tokens(["zorp"])
    assert before != common.lm_fingerprint(model, more)
    for name, weight in model.named_parameters():
        kept = weight.data.clone()
        weight.data += 0.01
        assert common.lm_fingerprint(model, tokenizer) != before, name
        weight.data = kept
    assert common.lm_fingerprint(model, tokenizer) == before
