#!/usr/bin/env python3
"""Decode and prefill speed of the numpy reference beside another engine: same weights, same threads, same run.

    python benchmarks/decode_cpu.py [MODEL] [--threads N] [--rounds 5] [--json OUT]     beside transformers
    python benchmarks/decode_cpu.py [MODEL] --backend numba-cpu [--threads N] ...       beside a backend

Each engine lives in a process of its own, so its peak memory is its own, and all take turns round by round, so a
busy machine slows all. They run the bare forward loop with greedy choice; transformers under `inference_mode` with
its default attention and the logits of the last position only; a backend by its own decode step, once for each format
of weights that it offers, its prefill being the decoder on that backend and the handing over. Figures are medians over
the rounds; a ratio is the median of the rounds' ratios. Decoding reads every weight once a token, so the speed at which
memory is read bounds every engine; it is measured and printed. Beside a backend follow the norms and the paged decode
attention of `kernels_cpu.py`, same threads, same number of rounds.
MODEL is a pulled model's name or a path; its weights are dequantised once and handed to all.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine, read_bandwidth

BASE = "numpy"
TRANSFORMERS = "transformers"
FACTORIES = {"numba-cpu": "ferrum_numba.cpu:make_backend"}  # known without being registered
PAUSE_S = 0.2  # lets the other engine's idle threads go to sleep


def main() -> int:
    args = parse_args()
    if args.worker:
        return work(args)
    engines = engines_of(args)
    load_s = [ask_once(args, BASE)["load_s"] for _ in range(args.rounds)]
    workers = {engine: Worker(args, engine) for engine in engines}
    try:
        loads = {engine: worker.read() for engine, worker in workers.items()}
        rounds: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
        for number in range(args.rounds + 1):
            for engine in engines if number % 2 else reversed(engines):
                time.sleep(PAUSE_S)
                found = workers[engine].ask("round")
                if number:  # the first round warms up
                    rounds[engine].append(found)
        memory = {engine: workers[engine].ask("memory") for engine in engines}
        bandwidth = workers[BASE].ask("bandwidth")["bytes_per_s"]
    finally:
        for worker in workers.values():
            worker.stop()
    report = summarise(args, load_s, loads, rounds, memory, bandwidth)
    show(report)
    if args.backend:
        report["kernels"] = kernels(args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def engines_of(args: argparse.Namespace) -> tuple[str, ...]:
    """numpy first, then what it is measured beside: "transformers", or "BACKEND FORMAT" for each format of weights."""
    if not args.backend:
        return BASE, TRANSFORMERS
    return BASE, *(f"{args.backend} {weights_format}" for weights_format in args.weights)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", metavar="MODEL")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each engine (default: all cores)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures, dated, with the machine in them")
    parser.add_argument("--backend", metavar="NAME", help="measure this backend's decode step instead of transformers")
    parser.add_argument(
        "--weights",
        nargs="+",
        default=["float32", "int8", "q8_0", "q4_0"],
        metavar="FORMAT",
        help="formats of the backend's weights (default: float32 int8 q8_0 q4_0); stored: packed, as in the file",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


class Worker:
    """One engine's process: a line of text in, a line of JSON out."""

    def __init__(self, args: argparse.Namespace, engine: str, *options: str) -> None:
        words = [sys.executable, __file__, args.model, "--worker", engine, *options]
        words += ["--prompt-tokens", str(args.prompt_tokens), "--new-tokens", str(args.new_tokens)]
        words += ["--threads", str(args.threads)]
        names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(names, str(args.threads))}
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, command: str) -> dict[str, Any]:
        self._process.stdin.write(command + "\n")  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]
        return self.read()

    def read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise SystemExit(f"benchmark: a worker ended with code {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def stop(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()


def ask_once(args: argparse.Namespace, engine: str) -> dict[str, Any]:
    """What a fresh process says after loading."""
    worker = Worker(args, engine, "--once")
    try:
        return worker.read()
    finally:
        worker.stop()


def work(args: argparse.Namespace) -> int:
    """The worker's loop."""
    import numpy as np

    kinds = {BASE: NumpyEngine, TRANSFORMERS: TransformersEngine}
    engine = kinds.get(args.worker, BackendEngine)(args)
    say({"load_s": engine.load_s, "weights_bytes": engine.weights_bytes})
    if args.once:
        return 0
    prompt = np.random.default_rng(0).integers(0, engine.vocab_size, args.prompt_tokens).tolist()
    for line in sys.stdin:
        if line.strip() == "memory":
            say({"peak_bytes": peak_bytes()})
            continue
        if line.strip() == "bandwidth":
            say({"bytes_per_s": read_bandwidth(args.threads)})
            continue
        began_s = time.perf_counter()
        token = engine.prefill(prompt)
        prefilled_s = time.perf_counter()
        tokens = [token]
        for _ in range(args.new_tokens):
            tokens.append(engine.decode(tokens[-1]))
        ended_s = time.perf_counter()
        say({"prefill_s": prefilled_s - began_s, "decode_s": ended_s - prefilled_s, "tokens": tokens})
    return 0


class NumpyEngine:
    """The reference: contiguous K/V, one sequence."""

    def __init__(self, args: argparse.Namespace) -> None:
        from ferrum_ref.assembly import load_model

        began_s = time.perf_counter()
        loaded = load_model(args.model)
        self.load_s = time.perf_counter() - began_s
        self.weights_bytes = loaded.decoder.weights.num_bytes()
        self.vocab_size = loaded.config.vocab_size
        self._llm = loaded.new_llm()
        self._position = 0

    def prefill(self, prompt: list[int]) -> int:
        self._llm.reset()
        self._position = len(prompt)
        return int(self._llm.prefill("a", prompt).argmax())

    def decode(self, token: int) -> int:
        self._position += 1
        return int(self._llm.decode("a", token, self._position - 1).argmax())


class BackendEngine:
    """A backend: the decoder on it for the prompt, its own decode step from there on."""

    def __init__(self, args: argparse.Namespace) -> None:
        from ferrum_ref.assembly import load_model
        from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory
        from ferrum_ref.models.transformer_weights import DecoderTransformerWeights
        from ferrum_ref.plugins import load_backend

        name, _, weights_format = args.worker.rpartition(" ")
        began_s = time.perf_counter()
        backend = load_backend(FACTORIES.get(name, name))
        loaded = load_model(args.model, backend, packed=weights_format == "stored")
        weights = DecoderTransformerWeights.of_decoder(loaded.decoder)
        self._decode = backend.make_decode_backend(weights, weights_format=weights_format)  # type: ignore[attr-defined]
        self.load_s = time.perf_counter() - began_s
        self.weights_bytes = self._decode.weights_bytes
        self.vocab_size = loaded.config.vocab_size
        self._decoder = loaded.decoder
        self._caches = ContiguousKvFactory(backend, loaded.kv_shape, loaded.decoder.max_tokens)
        self._position = 0

    def prefill(self, prompt: list[int]) -> int:
        from ferrum_ref.interfaces.forward import ForwardBatch
        from ferrum_ref.kv_cache.storage_contiguous import rows_of

        count = self._position = len(prompt)
        cache = self._caches.new_cache()
        bound = self._caches.bind([cache], [count])
        logits = self._decoder.forward(ForwardBatch.build([prompt], [0]), bound).to_numpy()
        bound.commit()
        pairs = zip(cache.keys, cache.values, strict=True)
        self._decode.init_kv_cache("a", [(rows_of(k, 0, count), rows_of(v, 0, count)) for k, v in pairs], count)
        return int(logits[-1].argmax())

    def decode(self, token: int) -> int:
        self._position += 1
        return int(self._decode.decode_step(token, self._position - 1, "a").to_numpy().argmax())


class TransformersEngine:
    """LlamaForCausalLM in float32 with the same dequantised weights."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from ferrum_ref.models.checkpoint import open_checkpoint
        from ferrum_ref.models.source import resolve_model

        torch.set_num_threads(args.threads)
        self._torch = torch
        began_s = time.perf_counter()
        with open_checkpoint(resolve_model(args.model)) as checkpoint:
            config = checkpoint.config
            self._model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=config.vocab_size,
                    hidden_size=config.hidden_size,
                    intermediate_size=config.intermediate_size,
                    num_hidden_layers=config.num_layers,
                    num_attention_heads=config.num_heads,
                    num_key_value_heads=config.num_kv_heads,
                    head_dim=config.head_dim,
                    max_position_embeddings=config.max_position_embeddings,
                    rms_norm_eps=config.rms_norm_eps,
                    rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                    tie_word_embeddings=config.tie_word_embeddings,
                    attention_bias=config.attention_bias,
                    mlp_bias=config.mlp_bias,
                )
            ).eval()
            with torch.no_grad():
                for name, parameter in self._model.named_parameters():
                    parameter.copy_(torch.from_numpy(checkpoint.read(name)))
        self.load_s = time.perf_counter() - began_s
        self.weights_bytes = sum(p.numel() * p.element_size() for p in self._model.parameters())
        self.vocab_size = config.vocab_size
        self._cache: Any = None

    def prefill(self, prompt: list[int]) -> int:
        self._cache = None
        return self._forward([prompt])

    def decode(self, token: int) -> int:
        return self._forward([[token]])

    def _forward(self, ids: list[list[int]]) -> int:
        torch = self._torch
        with torch.inference_mode():
            out = self._model(torch.tensor(ids), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._cache = out.past_key_values
            return int(out.logits[0, -1].argmax())


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def summarise(
    args: argparse.Namespace,
    load_s: list[float],
    loads: dict[str, dict[str, Any]],
    rounds: dict[str, list[dict[str, Any]]],
    memory: dict[str, dict[str, Any]],
    bandwidth: float,
) -> dict[str, Any]:
    engines = {}
    for engine, found in rounds.items():
        prefill = [args.prompt_tokens / one["prefill_s"] for one in found]
        decode = [args.new_tokens / one["decode_s"] for one in found]
        engines[engine] = {
            "prefill_tokens_per_s": statistics.median(prefill),
            "decode_tokens_per_s": statistics.median(decode),
            "prefill_rounds": prefill,
            "decode_rounds": decode,
            "load_s": statistics.median(load_s) if engine == BASE else loads[engine]["load_s"],
            "weights_bytes": loads[engine]["weights_bytes"],
            "peak_memory_bytes": memory[engine]["peak_bytes"],
        }
    said = {engine: found[0]["tokens"] for engine, found in rounds.items()}
    return {
        "benchmark": "decode_cpu",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": Path(args.model).name,
        "threads": args.threads,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        "engines": engines,
        **ratios(engines),
        # each token reads every weight once, so no float32 engine can pass this
        "decode_ceiling_tokens_per_s": bandwidth / engines[BASE]["weights_bytes"],
        "read_bytes_per_s": bandwidth,
        "same_tokens": all(one["tokens"] == said[BASE] for found in rounds.values() for one in found),
        "tokens_as_numpy": {engine: agreed(tokens, said[BASE]) for engine, tokens in said.items()},
        "machine": machine(*(("torch", "transformers") if TRANSFORMERS in engines else ("numba", "llvmlite"))),
    }


def kernels(args: argparse.Namespace) -> dict[str, Any]:
    """Norms and paged decode attention of the backend beside numpy's, by `kernels_cpu.py`, which prints them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.json"
        words = [sys.executable, str(Path(__file__).with_name("kernels_cpu.py")), "--backend", args.backend]
        words += ["--threads", str(args.threads), "--rounds", str(args.rounds), "--json", str(out)]
        subprocess.run([*words, "--only", "norm 512x4096", "residual 512x4096", "paged decode"], check=True)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))["kernels"]
        return found


def ratios(engines: dict[str, Any]) -> dict[str, Any]:
    """How many times as fast: numpy over transformers, or each format of a backend over numpy."""

    def over(one: str, two: str) -> dict[str, float]:
        return {
            what: statistics.median(
                a / b for a, b in zip(engines[one][f"{what}_rounds"], engines[two][f"{what}_rounds"], strict=True)
            )
            for what in ("decode", "prefill")
        }

    if TRANSFORMERS in engines:
        return {"numpy_over_transformers": over(BASE, TRANSFORMERS)}
    return {"over_numpy": {engine: over(engine, BASE) for engine in engines if engine != BASE}}


def agreed(tokens: list[int], others: list[int]) -> int:
    """How many tokens agree before the first that does not."""
    return next((index for index, pair in enumerate(zip(tokens, others, strict=True)) if len({*pair}) > 1), len(tokens))


def show(report: dict[str, Any]) -> None:
    print(f"{report['model']}, {report['threads']} threads, medians of {report['rounds']} rounds taken in turn")
    print(f"{'':22}{'decode tok/s':>14}{'prefill tok/s':>15}{'load s':>9}{'peak MB':>10}{'as numpy':>10}")
    for engine, found in report["engines"].items():
        print(
            f"{engine:22}{found['decode_tokens_per_s']:14.1f}{found['prefill_tokens_per_s']:15.0f}"
            f"{found['load_s']:9.2f}{found['peak_memory_bytes'] / 1e6:10.0f}{report['tokens_as_numpy'][engine]:10}"
        )
    shown = report.get("over_numpy") or {"numpy / transformers": report["numpy_over_transformers"]}
    for name, ratio in shown.items():
        label = name if " / " in name else f"{name} / numpy"
        print(f"{label:30}{ratio['decode']:6.2f}{ratio['prefill']:15.2f}")
    print(
        f"memory is read at {report['read_bytes_per_s'] / 1e9:.1f} GB/s, so no engine can decode these float32 weights"
        f" faster than {report['decode_ceiling_tokens_per_s']:.1f} tokens/s here"
    )
    if "over_numpy" not in report:
        print(f"same greedy tokens in every round of both: {'yes' if report['same_tokens'] else 'NO'}")


if __name__ == "__main__":
    sys.exit(main())
