"""`ferrum-ref generate` on a tiny model whose tokens are bytes: whatever it says, the text must be right."""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from typing import Any

import pytest
from safetensors.numpy import save_file

from ferrum_ref.cli import generate, main
from ferrum_ref.errors import FerrumError, RequestValidationError

END, BEGIN = 256, 257  # the tokens after the 256 bytes; the tokenizer puts BEGIN before a plain prompt
SPEED = re.compile(
    r"\d+ prompt tokens, \d+ generated; first token after \d+\.\d\d s, then (\d+\.\d tokens/s|no rate)"
    r" \(numpy on cpu, decoded by kernels; ended by (EOS|Length|Stop)\)\n"
)


@pytest.fixture(scope="module")
def model(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(directory, the tiny model): 256 byte tokens and an end token, with a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    path = tmp_path_factory.mktemp("bytes-model")
    tiny = tiny_llama(11, vocab_size=258, max_position_embeddings=64, eos_token_ids=(END,))
    alphabet = byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|end|>", "<|begin|>")])
    tokenizer.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", BEGIN)])
    tokenizer.save(str(path / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    settings = {"eos_token": "<|end|>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = tiny.config
    hf = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": 258, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "rms_norm_eps": config.rms_norm_eps, "rope_theta": config.rope_theta, "tie_word_embeddings": False,
        "eos_token_id": END,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(hf))
    save_file(tiny.tensors, path / "model.safetensors")
    return path, tiny


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def greedy(tiny: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """transformers' greedy continuation, in float64."""
    ids = list(prompt)
    while len(ids) < len(prompt) + num_tokens and ids[-1] != END:
        ids.append(int(tiny.logits(ids, True)[-1].argmax()))
    return ids[len(prompt) :]


def text_of(ids: list[int]) -> str:
    return bytes(token for token in ids if token < END).decode(errors="replace")


def said(capsys: Any, *words: object) -> tuple[str, str]:
    assert main.main(["generate", *map(str, words)]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.mark.clause("EN-GENERATE-1", "EN-GENERATE-2")
@pytest.mark.parametrize("prompt", ["Hello", "é", "日本"])
def test_the_streamed_text_is_the_greedy_continuation(model: Any, capsys: Any, prompt: str) -> None:
    path, tiny = model
    expected = greedy(tiny, [BEGIN, *prompt.encode()], 30)
    out, err = said(capsys, path, prompt, "--max-tokens", 30)
    text = text_of(expected)
    assert out == text + ("" if text.endswith("\n") else "\n")
    assert SPEED.fullmatch(err)
    found = json.loads(said(capsys, path, prompt, "--max-tokens", 30, "--json")[0])
    assert found == {
        "model": str(path),
        "text": text,
        "token_ids": expected,
        "finish_reason": "EOS" if expected[-1] == END else "Length",
        "prompt_tokens": 1 + len(prompt.encode()),
        "completion_tokens": len(expected),
        "decode": "kernels",
    }


@pytest.mark.clause("EN-GENERATE-2")
@pytest.mark.parametrize(("options", "prefix"), [(["--chat"], ""), (["--system", "Be brief."], "system:Be brief.\n")])
def test_chat_uses_the_models_template(model: Any, capsys: Any, options: list[str], prefix: str) -> None:
    path, tiny = model
    found = json.loads(said(capsys, path, "Hi", *options, "--json", "--max-tokens", 5)[0])
    prompt = f"{prefix}user:Hi\nA:".encode()
    assert found["prompt_tokens"] == len(prompt)
    assert found["token_ids"] == greedy(tiny, list(prompt), 5)


@pytest.mark.clause("EN-GENERATE-3")
def test_a_seed_repeats_the_text(model: Any, capsys: Any) -> None:
    path, _ = model
    options = ("--temperature", 1.5, "--top-k", 200, "--top-p", 0.99, "--min-p", 0.001, "--repetition-penalty", 1.1)
    texts = [said(capsys, path, "Hi", *options, "--seed", seed, "--json")[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.clause("EN-GENERATE-1")
def test_a_stop_text_ends_the_answer_before_it(model: Any, capsys: Any) -> None:
    path, tiny = model
    whole = text_of(greedy(tiny, [BEGIN, *b"Hello"], 30))
    stop = whole[6:8]
    found = json.loads(said(capsys, path, "Hello", "--max-tokens", 30, "--json", "--stop", "never", "--stop", stop)[0])
    assert found["text"] == whole[: whole.index(stop)]
    assert found["finish_reason"] == "Stop"
    assert said(capsys, path, "Hello", "--max-tokens", 30, "--stop", stop)[0] == found["text"] + "\n"


@pytest.mark.clause("EN-GENERATE-1")
def test_pieces_are_flushed_as_they_come(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder(io.StringIO):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def flush(self) -> None:
            self.seen.append(self.getvalue())

    recorder = Recorder()
    monkeypatch.setattr(sys, "stdout", recorder)
    assert main.main(["generate", str(model[0]), "Hello", "--max-tokens", "20"]) == 0
    assert len(set(recorder.seen)) >= 4
    assert all(recorder.getvalue().startswith(piece) for piece in recorder.seen)


@pytest.mark.clause("EN-GENERATE-1")
def test_a_terminal_that_knows_ascii_only_gets_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    generate.write("naïve 日本")
    assert raw.getvalue() == b"na?ve ??"


@pytest.mark.clause("EN-GENERATE-4")
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["", "--chat"], "prompt is empty"),
        (["x", "--top-p", "0"], "top_p must be in (0, 1]"),
        (["x", "--temperature", "-1"], "temperature must be"),
        (["x", "--temperature", "nan"], "temperature must be"),
        (["x", "--max-tokens", "0"], "max_tokens must be >= 1"),
        (["x", "--max-tokens", "-1"], "max_tokens must be in [0"),
        (["x", "--top-k", "0"], "top_k must be"),
        (["x", "--stop", ""], "stop_sequences must be"),
        (["x", "--seed", "-1"], "seed must be"),
    ],
)
def test_bad_options_are_told_before_anything_is_loaded(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], text: str
) -> None:
    def load(args: argparse.Namespace) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(generate, "_load", load)
    assert main.main(["generate", "nothing-here", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert text in captured.err


@pytest.mark.clause("EN-GENERATE-4")
def test_a_prompt_longer_than_the_context(model: Any, capsys: Any) -> None:
    assert main.main(["generate", str(model[0]), "x" * 63]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "64 tokens and the context 64" in captured.err
    assert said(capsys, model[0], "x" * 62, "--max-tokens", 9)[1].startswith("63 prompt tokens, 1 generated")


@pytest.mark.clause("EN-GENERATE-4")
def test_unknown_backend_and_device(model: Any, capsys: Any) -> None:
    for words, text in ((["--backend", "zzz"], "expected one of"), (["--device", "cuda"], "cuda")):
        assert main.main(["generate", str(model[0]), "x", *words]) == 2
        assert text in capsys.readouterr().err


@pytest.mark.clause("EN-GENERATE-4")
def test_errors_have_names() -> None:
    parser = argparse.ArgumentParser()
    generate.add_parser(parser.add_subparsers())
    with pytest.raises(RequestValidationError) as caught:
        generate.run(parser.parse_args(["generate", "m", ""]))
    assert isinstance(caught.value, FerrumError)


@pytest.mark.clause("EN-GENERATE-1")
def test_the_speed_line_counts_the_tokens_after_the_first() -> None:
    class Loaded:
        class backend:
            name = staticmethod(lambda: "numpy")

        class info:
            device = "cpu"

    answer = generate.Answer("x", tuple(range(11)), "EOS", 7, started_s=1.0, first_s=3.5, last_s=5.5)
    loaded: Any = Loaded
    assert answer.speed(loaded) == (
        "7 prompt tokens, 11 generated; first token after 2.50 s, then 5.0 tokens/s"
        " (numpy on cpu, decoded by kernels; ended by EOS)"
    )
    answer.decode = "step"
    assert "(numpy on cpu, decoded by step; ended by EOS)" in answer.speed(loaded)
    assert "no rate" in generate.Answer("x", (1,), "EOS", 7, 1.0, 3.5, 3.5).speed(loaded)


class Steps:
    """Counts the steps of every backend that numba-cpu or torch makes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[Any]) -> None:
        self.count = 0
        plain = kind.decode_step

        def counted(this: Any, token_id: int, position: int, cache_key: str) -> Any:
            self.count += 1
            return plain(this, token_id, position, cache_key)

        monkeypatch.setattr(kind, "decode_step", counted)


def decode_backend(name: str) -> type[Any]:
    """The class of a backend's decode step; skips where the backend cannot be had."""
    module, kind = {
        "torch": ("ferrum_torch.decode", "TorchDecodeBackend"),
        "numba-cpu": ("ferrum_numba.cpu.decode", "NumbaDecodeBackend"),
    }[name]
    found: type[Any] = getattr(pytest.importorskip(module), kind)
    return found


@pytest.mark.clause("EN-GENERATE-5", "LM-LOAD-5")
@pytest.mark.parametrize("backend", ["torch", "numba-cpu"])
@pytest.mark.parametrize(
    ("options", "decode"), [([], "step"), (["--decode", "step"], "step"), (["--decode", "kernels"], "kernels")]
)
def test_what_decodes_the_tokens(
    model: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch, backend: str, options: list[str], decode: str
) -> None:
    path, tiny = model
    steps = Steps(monkeypatch, decode_backend(backend))
    out, err = said(capsys, path, "Hello", "--backend", backend, "--max-tokens", 20, "--json", *options)
    found = json.loads(out)
    assert found["token_ids"] == greedy(tiny, [BEGIN, *b"Hello"], 20)
    assert found["decode"] == decode
    assert f"({backend} on cpu, decoded by {decode}; ended by" in err
    assert steps.count == (len(found["token_ids"]) - 1 if decode == "step" else 0)


@pytest.mark.clause("EN-GENERATE-3", "EN-GENERATE-5")
def test_a_prompt_of_many_chunks_is_stepped_after(model: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """41 tokens of prompt, 8 a forward: the last one alone, which is the first step."""
    path, tiny = model
    steps = Steps(monkeypatch, decode_backend("torch"))
    monkeypatch.setattr(generate, "STEP_TOKENS", 8)
    found = json.loads(said(capsys, path, "x" * 40, "--backend", "torch", "--max-tokens", 9, "--json")[0])
    assert found["token_ids"] == greedy(tiny, [BEGIN, *b"x" * 40], 9)
    assert steps.count == len(found["token_ids"])
    options = ("Hi", "--backend", "torch", "--temperature", 1.5, "--seed", 4, "--json", "--max-tokens", 20)
    assert said(capsys, path, *options)[0] == said(capsys, path, *options)[0]


@pytest.mark.clause("EN-GENERATE-6", "LM-LOAD-5")
def test_a_step_that_is_not_offered(model: Any, capsys: Any) -> None:
    assert main.main(["generate", str(model[0]), "x", "--decode", "step"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "backend 'numpy' offers no decode step" in captured.err
    assert "--decode kernels" in captured.err
    assert json.loads(said(capsys, model[0], "x", "--max-tokens", 1, "--json")[0])["decode"] == "kernels"


@pytest.mark.clause("EN-GENERATE-5", "EN-GENERATE-6", "LM-LOAD-5")
def test_a_model_beyond_the_step_is_decoded_by_kernels(model: Any, capsys: Any, tmp_path: Any) -> None:
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model[0] / name).read_bytes())
    config = json.loads((model[0] / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = (tmp_path, "Hello", "--backend", "torch", "--max-tokens", 5)
    assert json.loads(said(capsys, *words, "--json")[0])["decode"] == "kernels"
    assert main.main(["generate", *map(str, words), "--decode", "step"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "'llama' with rope:" in captured.err


@pytest.mark.clause("EN-GENERATE-5")
def test_another_word_for_decode_is_refused(capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["generate", "m", "x", "--decode", "fast"])
    assert caught.value.code == 2
    assert "invalid choice: 'fast'" in capsys.readouterr().err


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.clause("EN-GENERATE-5", "LM-LLM-12")
@pytest.mark.parametrize("options", [[], ["--packed"]])
def test_smollm2_says_the_same_by_steps_and_by_kernels(smollm2_path: Any, capsys: Any, options: list[str]) -> None:
    """On numpy, torch and numba-cpu; packed weights are stepped by numba-cpu alone."""
    pytest.importorskip("numba")
    words = (smollm2_path, "The capital of France is", "--max-tokens", 16, "--json", *options)
    wanted = json.loads(said(capsys, *words)[0])
    for backend, stepped in (("torch", not options), ("numba-cpu", True)):
        for decode in ("kernels", "auto"):
            found = json.loads(said(capsys, *words, "--backend", backend, "--decode", decode)[0])
            assert found.pop("decode") == ("step" if stepped and decode == "auto" else "kernels")
            assert found == {key: value for key, value in wanted.items() if key != "decode"}
