from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from rbee.errors import BadInputError, InsufficientError
from rbee.models.child import error_line, log_tail, told_error
from rbee.models.gguf import TORCH_EXTRAS, open_reader
from rbee.models.inspect import inspect_model

needs_torch = pytest.mark.skipif(
    not all(find_spec(name) for name in ("torch", "transformers", "gguf", "accelerate")),
    reason="torch, transformers, gguf or accelerate is not installed (extra cpu)",
)


def run_gguf(source: Path, target: Path, log: Path) -> int:
    argv = [sys.executable, "-m", "rbee.models.gguf", str(source), str(target)]
    with log.open("wb") as output:
        return subprocess.run(argv, stdout=output, stderr=subprocess.STDOUT, check=False).returncode


def write_gguf(path: Path, architecture: str) -> Path:
    import gguf
    import numpy

    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_tensor("token_embd.weight", numpy.zeros((4, 32), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_error_passes_through_the_log_whole(tmp_path: Path) -> None:
    log = tmp_path / "log"
    told = InsufficientError("too big", code="insufficient_memory", hint="h", required=2)
    log.write_text("noise\n" + error_line(told))
    got = told_error(log)
    assert isinstance(got, InsufficientError)
    assert (got.message, got.code, got.hint) == ("too big", "insufficient_memory", "h")
    assert got.details == {"required": 2}


@pytest.mark.parametrize("text", ["", "noise\n", '{"error": 5}\n', '{"error":{"code"\n'])
def test_a_log_without_an_error_line_tells_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "log").write_text(text)
    assert told_error(tmp_path / "log") is None
    assert told_error(tmp_path / "gone") is None


def test_the_tail_is_the_last_lines_that_say_something(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 50_000 + b"\n" + b"\n\n".join(b"%d" % n for n in range(30)) + b"\n\xff")
    assert log_tail(log, 3) == "28\n29\n\N{REPLACEMENT CHARACTER}"


@needs_torch
@pytest.mark.slow
@pytest.mark.vllm
def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "odd.gguf", "unheardof")
    assert run_gguf(source, tmp_path / "out", tmp_path / "log") == 1
    error = told_error(tmp_path / "log")
    assert isinstance(error, BadInputError)
    assert error.code == "unknown_architecture"
    assert "'unheardof'" in error.message
    assert "llama" in error.message
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "odd.gguf"]


@pytest.mark.skipif(not find_spec("gguf"), reason="gguf is not installed (extra cpu)")
@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGUF" + b"\xff" * 100, b"no GGUF" * 100])
def test_a_file_that_is_no_gguf_is_corrupt(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(BadInputError, match=r"x\.gguf is corrupt or no GGUF"):
        open_reader(tmp_path / "x.gguf")


@needs_torch
@pytest.mark.slow
@pytest.mark.vllm
def test_a_llama_gguf_becomes_a_loadable_directory(tmp_path: Path, tiny: Path) -> None:
    from safetensors.numpy import load_file

    source = write_llama_gguf(tiny, tmp_path / "tiny.gguf")
    out, log = tmp_path / "out", tmp_path / "log"
    assert run_gguf(source, out, log) == 0, log_tail(log)
    found, made_of = inspect_model(out), inspect_model(tiny)
    assert found.architecture == "LlamaForCausalLM"
    assert found.dtype == "float32"
    assert found.context == made_of.context
    assert found.has_chat_template
    assert (out / "generation_config.json").is_file()
    weights, wanted = load_file(out / "model.safetensors"), load_file(tiny / "model.safetensors")
    assert weights.keys() == wanted.keys()
    assert all((weights[name] == wanted[name]).all() for name in wanted)
    ours, original = tokens_of("Hello, world!", out, tiny)
    assert ours == original


def tokens_of(text: str, *directories: Path) -> list[str]:
    """Encode with the tokenizers that an engine would load, in a process of its own."""
    program = (
        "import sys\n"
        f"for name in {TORCH_EXTRAS!r}: sys.modules[name] = None\n"
        "from transformers import AutoTokenizer\n"
        "for directory in sys.argv[2:]:\n"
        "    t = AutoTokenizer.from_pretrained(directory)\n"
        "    chat = t.apply_chat_template([{'role': 'user', 'content': 'Hi'}], tokenize=False)\n"
        "    print(t(sys.argv[1]).input_ids, repr(chat))"
    )
    argv = [sys.executable, "-c", program, text, *map(str, directories)]
    told = subprocess.run(argv, capture_output=True, check=True, text=True).stdout
    return told.splitlines()


def write_llama_gguf(model: Path, path: Path) -> Path:
    """Write the tiny model as a GGUF, rows permuted as llama.cpp wants them."""
    import gguf
    from safetensors.numpy import load_file

    from rbee.testing import tiny_model as tiny

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(tiny.CONTEXT)
    writer.add_embedding_length(tiny.HIDDEN)
    writer.add_block_count(tiny.LAYERS)
    writer.add_feed_forward_length(tiny.INTERMEDIATE)
    writer.add_head_count(tiny.HEADS)
    writer.add_head_count_kv(tiny.KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(tiny.HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(tiny.VOCABULARY)
    add_tokenizer(writer, model)
    for name, value in load_file(str(model / "model.safetensors")).items():
        heads = {"q_proj": tiny.HEADS, "k_proj": tiny.KV_HEADS}.get(name.split(".")[-2], 0)
        writer.add_tensor(gguf_name(name), permute(value, heads) if heads else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: object, model: Path) -> None:
    import json

    import gguf

    from rbee.testing import tiny_model as tiny

    assert isinstance(writer, gguf.GGUFWriter)
    told = json.loads((model / "tokenizer.json").read_text())["model"]
    tokens = sorted(told["vocab"], key=told["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tiny.SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in told["merges"]])
    writer.add_bos_token_id(tiny.BOS)
    writer.add_eos_token_id(tiny.EOS)
    writer.add_chat_template(tiny.CHAT_TEMPLATE)


def gguf_name(name: str) -> str:
    swaps = {
        "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm",
        "model.layers": "blk", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for theirs, ours in swaps.items():
        name = name.replace(theirs, ours)
    return name


def permute(value, heads: int):  # type: ignore[no-untyped-def]
    rows, columns = value.shape
    return (
        value.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )
