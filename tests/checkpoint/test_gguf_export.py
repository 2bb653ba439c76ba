"""``slr export --to gguf``: a checkpoint without a loop as a file that llama.cpp runs."""

import re
import sys
from copy import deepcopy
from importlib.util import find_spec
from typing import get_args

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

from slr_core.checkpoint.gguf_export import export_gguf
from slr_core.checkpoint.gguf_layout import ARCHITECTURES, TensorType
from slr_core.checkpoint.init import init_checkpoint
from slr_core.checkpoint.pretrained import packaged_file
from slr_core.checkpoint.publish import publish_checkpoint
from slr_core.checkpoint.read import load_checkpoint
from slr_core.checkpoint.write import save_checkpoint
from slr_core.cli.export import GgufType
from slr_core.engine import Engine
from slr_core.errors import ConfigError
from slr_core.reasoner import LatentReasoner
from tests import tiny
from tests.checkpoint.gguf_file import write_gguf

LORA = {"kind": "shared", "covers": "all", "rank": 2}
LOOP = {"lora": LORA, "max_iterations": 0}
IDS = torch.tensor([[5, 6, 7, 8, 30, 9]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def saved(folder, kind="llama", plain=None, loop=LOOP, **top):
    """A checkpoint whose adapter matters, and its reasoner."""
    made = tiny.reasoner(kind, loop, plain=plain, **top)
    save_checkpoint(made, folder)
    return made


def wide(**config):
    """A tiny Llama whose rows have a multiple of 32 values."""
    torch.manual_seed(0)
    values = tiny.base().config.to_dict() | {"intermediate_size": 64} | config
    return LlamaForCausalLM(LlamaConfig.from_dict(values)).eval()


def write_base(file, architecture="llama", **options):
    return write_gguf(file, architecture, tokens=list(tiny.WORDS), **options)


def read(file):
    """The tensors and the metadata of a file."""
    reader = gguf.GGUFReader(file)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return {tensor.name: tensor for tensor in reader.tensors}, fields


def load(file, **config):
    """The model in a file, by transformers' own reader."""
    options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True), **config}
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options).eval()


def test_import_of_the_file(tmp_path, run):
    """`slr init` of the written file computes what base and adapter computed; the rest is the base's."""
    write_gguf(tmp_path / "base.gguf")
    (tmp_path / "loop.yaml").write_text("lora: {kind: shared, covers: all, rank: 2}\nmax_iterations: 0\n")
    made = init_checkpoint(str(tmp_path / "base.gguf"), tmp_path / "run", tmp_path / "loop.yaml")
    before = logits(made.base)
    tiny.shake(made)
    template = "{{ messages[0].content }}"
    made.config = made.config.replace(trained=True, text={"chat_template": template, "prompt_suffix": "\n"})
    save_checkpoint(made, tmp_path / "run")
    out = tmp_path / "new" / "my model.gguf"
    code, printed, _ = run(
        "export",
        "--model",
        tmp_path / "run",
        "--to",
        "gguf",
        "--base",
        tmp_path / "base.gguf",
        "--out",
        out,
        "--gguf-type",
        "F32",
    )
    assert code == 0
    first, note, command = printed.splitlines()
    assert first.startswith(f"Wrote {out}, 0.")
    assert note == "Not in the file, for its client to apply: text.prompt_suffix '\\n'"
    assert command == f"    llama-server -m '{out}'"
    again = init_checkpoint(str(out), tmp_path / "again")
    torch.testing.assert_close(logits(again.base), logits(made.base), rtol=1e-4, atol=1e-4)
    assert (logits(again.base) - before).abs().max() > 0.1
    assert again.tokenizer.get_vocab() == made.tokenizer.get_vocab()
    assert again.tokenizer.chat_template == template
    (old, old_fields), (new, new_fields) = read(tmp_path / "base.gguf"), read(out)
    assert list(old) == list(new)
    changed = {key for key in old_fields.keys() | new_fields.keys() if old_fields.get(key) != new_fields.get(key)}
    assert {key: new_fields.get(key) for key in changed} == {
        "general.name": "my model",
        "general.organization": None,
        "general.base_model.count": 1,
        "general.base_model.0.name": "Tiny",
        "general.base_model.0.organization": "Someone",
        "general.file_type": gguf.LlamaFileType.ALL_F32,
        "general.quantization_version": 2,
        "tokenizer.ggml.add_bos_token": True,  # as llama.cpp does by default
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": template,
    }
    for key in ("blk.0.attn_norm.weight", "token_embd.weight"):
        assert np.array_equal(old[key].data, new[key].data)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_architecture(kind, tmp_path):
    plain = tiny.base(kind)
    write_base(tmp_path / "base.gguf", ARCHITECTURES[kind], plain=plain)
    made = saved(tmp_path / "run", kind)
    exported = export_gguf(str(tmp_path / "run"), tmp_path / "out.gguf", str(tmp_path / "base.gguf"), "F32")
    assert exported == ([], 0.0)
    # transformers reads no head_dim of this architecture.
    written = load(tmp_path / "out.gguf", **({"head_dim": 8} if kind == "qwen3" else {}))
    torch.testing.assert_close(logits(written), logits(made.base), rtol=1e-4, atol=1e-4)
    assert (logits(written) - logits(plain)).abs().max() > 0.1


def test_trained_base_without_adapter(tmp_path):
    """Weights come from the checkpoint, whatever the base's file holds."""
    write_base(tmp_path / "base.gguf", seed=1)
    made = saved(tmp_path / "run", loop={**LOOP, "lora": {"kind": "none"}})
    export_gguf(str(tmp_path / "run"), tmp_path / "out.gguf", str(tmp_path / "base.gguf"), "F32")
    torch.testing.assert_close(logits(load(tmp_path / "out.gguf")), logits(made.base), rtol=1e-4, atol=1e-4)


def test_biases(tmp_path):
    """Those of queries and keys are reordered with their rows. transformers does not read them of a Llama's file."""
    plain = wide(attention_bias=True)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
    write_base(tmp_path / "base.gguf", plain=plain)
    saved(tmp_path / "run", plain=plain, loop={**LOOP, "lora": {"kind": "none"}})
    export_gguf(str(tmp_path / "run"), tmp_path / "out.gguf", str(tmp_path / "base.gguf"), "F32")
    (old, _), (new, _) = read(tmp_path / "base.gguf"), read(tmp_path / "out.gguf")
    assert "blk.1.attn_k.bias" in new
    assert all(np.array_equal(old[key].data, tensor.data) for key, tensor in new.items())


def test_number_formats(tmp_path):
    """Matrices get the chosen format, vectors stay in fp32."""
    write_base(tmp_path / "base.gguf", plain=wide(), dtype=np.float16)
    made = saved(tmp_path / "run", plain=wide())
    for chosen, error in (("F32", 1e-4), ("F16", 0.01), ("BF16", 0.1), ("Q8_0", 0.1), ("Q4_0", 2.0)):
        out = tmp_path / f"{chosen}.gguf"
        exported = export_gguf(str(tmp_path / "run"), out, str(tmp_path / "base.gguf"), chosen)
        tensors, fields = read(out)
        formats = {(x.tensor_type.name, len(x.shape)) for x in tensors.values()}
        assert formats == {(chosen, 2), ("F32", 1)}
        assert fields["general.file_type"] == gguf.LlamaFileType[f"{'ALL' if chosen == 'F32' else 'MOSTLY'}_{chosen}"]
        assert (logits(load(out)) - logits(made.base)).abs().max() < error
        assert exported.rounding < error
    assert get_args(GgufType) == get_args(TensorType)


def test_adapter_that_is_rounded_away(tmp_path, run):
    """Weights of a 4-bit file lie on its grid: what a small adapter adds is rounded away, which the export says."""
    write_base(tmp_path / "fine.gguf", plain=wide())
    saved(tmp_path / "plain", plain=wide(), loop={**LOOP, "lora": {"kind": "none"}})
    export_gguf(str(tmp_path / "plain"), tmp_path / "base.gguf", str(tmp_path / "fine.gguf"), "Q4_1")
    made = tiny.reasoner(plain=load(tmp_path / "base.gguf"), loop=LOOP)
    with torch.no_grad():
        for name, parameter in made.base.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.1)
    save_checkpoint(made, tmp_path / "run")
    common = ("export", "--model", tmp_path / "run", "--to", "gguf", "--base", tmp_path / "base.gguf")
    code, printed, _ = run(*common, "--gguf-type", "Q4_1", "--out", tmp_path / "4.gguf")
    assert code == 0
    assert re.search(
        r"Rounding to Q4_1 changed the weights [\d.]+ times as much as the adapter did: .* Choose F16 or F32\.\n",
        printed,
    )
    code, printed, _ = run(*common, "--out", tmp_path / "16.gguf")
    assert (code, len(printed.splitlines())) == (0, 2)


def test_base_of_the_config(package, tmp_path):
    """A checkpoint that refers to `smollm2` needs no --base; one with a copy of its base does."""
    (tmp_path / "loop.yaml").write_text("lora: {kind: shared, covers: all, rank: 2}\n")
    init_checkpoint("smollm2", tmp_path / "run", tmp_path / "loop.yaml")
    with pytest.raises(ConfigError, match="--base: name the GGUF file of this checkpoint's base model, a path or smol"):
        export_gguf(str(tmp_path / "run"), tmp_path / "out.gguf")
    publish_checkpoint(str(tmp_path / "run"), tmp_path / "published", "smollm2")
    export_gguf(str(tmp_path / "published"), tmp_path / "out.gguf")
    # An untrained loop is off: the file is the base's.
    (old, _), (new, _) = read(packaged_file("smollm2")), read(tmp_path / "out.gguf")
    assert all(np.array_equal(old[key].data.astype(x.data.dtype), x.data) for key, x in new.items())


# -- refused ---------------------------------------------------------------------------------------------

CHECKPOINTS = {
    "loop": ({"lora": LORA, "max_iterations": 3}, r"loop\.max_iterations is 3: .* it must be 0"),
    "per iteration": ({"max_iterations": 0}, r"loop\.lora: the adapter loop_01 .* \{kind: shared, covers: all\}"),
    "loop alone": ({**LOOP, "lora": {"kind": "shared"}}, r"loop\.lora: the adapter loop_01"),
    "decode": ({**LOOP, "lora": {"kind": "none", "decode_rank": 2}}, r"loop\.lora: the adapter decode"),
    "token": ({**LOOP, "workspace": "token"}, r"loop\.workspace `token`.* append, block or prompt"),
    "latent decoder": (
        {**LOOP, "decoder": {"answers": "latent_decoder", "latent_decoder": tiny.LATENT_DECODER}},
        r"loop\.decoder\.answers `latent_decoder` .* must be lm_head",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_refused_checkpoints(case, tmp_path):
    loop, message = CHECKPOINTS[case]
    write_base(tmp_path / "base.gguf")
    saved(tmp_path / "run", loop=loop)
    with pytest.raises(ConfigError, match=message):
        export_gguf(str(tmp_path / "run"), tmp_path / "out.gguf", str(tmp_path / "base.gguf"))


BASES = {
    "heads": ({"attention__head_count": 2}, r"its llama\.attention\.head_count is 2, that of the .* base 4"),
    "layers": ({"block_count": 3}, r"llama\.block_count is 3"),
    "norm": ({"attention__layer_norm_rms_epsilon": 1e-5}, "layer_norm_rms_epsilon is .*e-0[56], .* 1e-06"),
    "rope": ({"rope__freq_base": 5e5}, r"rope\.freq_base is 500000\.0, .* 10000\.0"),
    "architecture": ({"architecture": "qwen3"}, "its architecture is qwen3, that of the checkpoint's base llama"),
    "values": ({"attention__value_length": 16}, r"attention\.value_length is 16, that of the .* base 8"),
    "rotated": ({"rope__dimension_count": 4}, r"rope\.dimension_count is 4, .* 8"),
    "experts": ({"expert_count": 4}, r"llama\.expert_count is 4, .* 0"),
    "tokens": ({"tokens": ["<pad>", "<eos>", "<unk>", "other", *tiny.WORDS[4:]]}, "its token 3 is 'other', .* 'w0'"),
    "fewer tokens": ({"tokens": list(tiny.WORDS[:-1])}, "its token 39 is None, .* 'w36'"),
}


@pytest.mark.parametrize("case", BASES)
def test_refused_bases(case, tmp_path):
    options, message = BASES[case]
    write_gguf(tmp_path / "base.gguf", **{"tokens": list(tiny.WORDS), **options})
    saved(tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        export_gguf(str(tmp_path / "run"), tmp_path / "out.gguf", str(tmp_path / "base.gguf"))


def test_refused_tensors(tmp_path):
    """Other shapes, tensors that only one side has, and an architecture that is not known."""
    run, base, out = str(tmp_path / "run"), str(tmp_path / "base.gguf"), tmp_path / "out.gguf"
    saved(run)
    biased = wide(intermediate_size=48, attention_bias=True)
    tied = wide(intermediate_size=48, tie_word_embeddings=True)
    for plain, message in (
        (wide(), r"its blk\.0\.ffn_gate\.weight has shape \[64, 32\], .*gate_proj\.weight .* \[48, 32\]"),
        (biased, r"its tensor blk\.0\.attn_q\.bias is not in the checkpoint's base"),
        (tied, r"it has no tensor output\.weight for lm_head\.weight of the checkpoint"),
    ):
        write_base(base, plain=plain)
        with pytest.raises(ConfigError, match=message):
            export_gguf(run, out, base)
    # A tied head fits both a file with a head of its own and one without.
    write_base(tmp_path / "tied.gguf", plain=tied)
    write_base(base)
    saved(tmp_path / "tied", plain=tied)
    export_gguf(str(tmp_path / "tied"), out, base)
    export_gguf(str(tmp_path / "tied"), tmp_path / "without.gguf", str(tmp_path / "tied.gguf"))
    assert read(out)[0].keys() - read(tmp_path / "without.gguf")[0].keys() == {"output.weight"}
    saved(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ConfigError, match=r"written of llama, mistral, qwen2, qwen3, not of this gpt2"):
        export_gguf(str(tmp_path / "gpt2"), tmp_path / "gpt2.gguf", base)


def test_scaled_positions(tmp_path):
    write_base(tmp_path / "base.gguf")
    plain = tiny.base()
    plain.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    saved(tmp_path / "run", plain=plain)
    with pytest.raises(ConfigError, match="rope scaling"):
        export_gguf(str(tmp_path / "run"), tmp_path / "out.gguf", str(tmp_path / "base.gguf"))


def test_what_the_base_file_says_of_its_own_weights_is_left_out(tmp_path):
    """And a chat template that the checkpoint has not, or has under a name alone, is none of the file."""
    said = {
        "general.uuid": "a",
        "general.quantized_by": "b",
        "general.base_model.1.name": "c",
        "quantize.imatrix.file": "d",
    }
    write_base(tmp_path / "base.gguf", strings={**said, "tokenizer.chat_template": "{{ base }}"})
    made = saved(tmp_path / "run")
    made.tokenizer = deepcopy(made.tokenizer)  # all tests share one
    for number, template in enumerate((None, {"rag": "{{ x }}", "tool_use": "{{ y }}"})):
        made.tokenizer.chat_template = template
        save_checkpoint(made, tmp_path / "run")
        out = tmp_path / f"{number}.gguf"
        export_gguf(str(tmp_path / "run"), out, str(tmp_path / "base.gguf"))
        assert not read(out)[1].keys() & {*said, "tokenizer.chat_template"}


def test_nothing_is_left(tmp_path):
    """An existing file stays, and of one that cannot be written whole nothing is left."""
    base, run, out = tmp_path / "base.gguf", str(tmp_path / "run"), tmp_path / "new" / "out.gguf"
    write_base(base)
    made = saved(run)
    with pytest.raises(ConfigError, match="expected a new file"):
        export_gguf(run, base, str(base))
    with pytest.raises(
        ConfigError, match=r"--gguf-type: Q8_0 has blocks of 32 values, .* 48 of a row of blk\.0\.ffn_d"
    ):
        export_gguf(run, out, str(base), "Q8_0")
    with torch.no_grad():
        made.base.model.layers[1].mlp.up_proj.base_layer.weight[0, 0] = 1e5
    save_checkpoint(made, run)
    with pytest.raises(ConfigError, match=r"blk\.1\.ffn_up\.weight holds values up to 1e\+05, too large for F16"):
        export_gguf(run, out, str(base), "F16")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="the file cannot be written"):
        export_gguf(run, tmp_path / "file" / "out.gguf", str(base))
    for length in (254, 300):
        with pytest.raises(ConfigError, match="the file cannot be written"):
            export_gguf(run, tmp_path / ("a" * length), str(base))
    assert not out.parent.exists()
    export_gguf(run, out, str(base), "BF16")
    assert [file.name for file in out.parent.iterdir()] == ["out.gguf"]


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"GGUF" + bytes(100), b"PK" + bytes(100)])
def test_no_gguf_file(content, tmp_path):
    saved(tmp_path / "run")
    if content is not None:
        (tmp_path / "base.gguf").write_bytes(content)
    message = "expected a GGUF file or smollm2" if content is None else "not a readable GGUF file"
    with pytest.raises(ConfigError, match=f"--base: .*base.gguf: {message}"):
        export_gguf(str(tmp_path / "run"), tmp_path / "out.gguf", str(tmp_path / "base.gguf"))


def test_without_the_extra(tmp_path, monkeypatch):
    saved(tmp_path / "run")
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match="a GGUF file needs the extra `gguf`"):
        export_gguf(str(tmp_path / "run"), tmp_path / "out.gguf", str(tmp_path / "base.gguf"))


# -- llama.cpp ---------------------------------------------------------------------------------------------

PROMPTS = ("The capital of France is", "Once upon a time", "Water boils at", "To make bread, you need")
NEW = 12


@pytest.mark.slow
def test_llama_cpp(smollm2, tmp_path):
    """Greedy completions and chats of llama.cpp, in half precision, against those of the reference."""
    if find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed")
    import xllamacpp

    base, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2 / "base"), AutoTokenizer.from_pretrained(smollm2)
    config = tiny.config({"lora": {"kind": "shared", "covers": "all", "rank": 4}, "max_iterations": 0})
    torch.manual_seed(0)  # of the adapters' other half
    made = LatentReasoner(base, tokenizer, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.base.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    save_checkpoint(made, tmp_path / "run")
    export_gguf(str(tmp_path / "run"), tmp_path / "out.gguf", "smollm2", "F16")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(tmp_path / "out.gguf")
    parameters.n_parallel, parameters.n_ctx, parameters.n_gpu_layers, parameters.verbosity = 1, 256, 0, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(parameters)
    body = {"max_tokens": NEW, "temperature": 0.0}
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    completions = [server.handle_completions({"prompt": prompt, **body})["choices"][0]["text"] for prompt in PROMPTS]
    answers = [
        server.handle_chat_completions({"messages": chat, **body})["choices"][0]["message"]["content"] for chat in chats
    ]
    with Engine(made, threads=1) as engine:
        ours = [result.text for result in engine.generate(list(PROMPTS), max_new_tokens=NEW)]
        ours += [result.text for result in engine.chat(chats, max_new_tokens=NEW)]
    with Engine(load_checkpoint(LatentReasoner, smollm2), threads=1) as engine:
        plain = [result.text for result in engine.generate(list(PROMPTS), max_new_tokens=NEW)]
    # In half precision, a tie may fall the other way.
    assert sum(a == b for a, b in zip([*completions, *answers], ours, strict=True)) >= 7
    assert ours[: len(PROMPTS)] != plain
