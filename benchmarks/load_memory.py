#!/usr/bin/env python3
"""Memory that loading takes: a GGUF file and a sharded synthetic checkpoint, packed and dense.

    python benchmarks/load_memory.py [MODEL] [--shards 12] [--shard-megabytes 171] [--skip-synthetic] [--json OUT]

Every figure comes from a fresh process and from the kernel's own accounts in /proc/self/status (Linux only):

    peak      VmHWM: the most that was resident at any moment, of everything: interpreter, libraries, anonymous memory
              and pages of mapped files, those that the system could drop at once included. Reset before loading begins.
    growth    peak less what was resident before loading, that is without the interpreter and its libraries
    anonymous RssAnon at the end: memory that is the process's own and no copy of a file
    file      RssFile at the end: resident pages of mapped files

`load` opens the checkpoint, checks every number to be finite, and builds the decoder; `forward` then runs some tokens,
which reads every weight. MODEL is a pulled model's name or a GGUF path. The synthetic checkpoint is written to a
temporary directory and removed.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HIDDEN, VOCABULARY = 1024, 2048
RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    args = parse_args()
    if args.worker:
        print(json.dumps(measure(args)), flush=True)
        return 0
    if not Path("/proc/self/status").exists():
        raise SystemExit("load_memory: /proc/self/status is not there; this benchmark needs Linux")
    runs = [run(args, args.model, how) for how in ("packed", "dense")]
    if not args.skip_synthetic:
        with tempfile.TemporaryDirectory(prefix="load-memory-") as directory:
            write_checkpoint(Path(directory), args.shards, args.shard_megabytes * 10**6)
            runs += [run(args, directory, how) for how in ("open", "packed", "dense")]
    from machine import machine

    report = {
        "benchmark": "load_memory",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "runs": runs,
        "machine": machine(),
    }
    show(report)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", metavar="MODEL")
    parser.add_argument("--shards", type=int, default=12, help="of the synthetic checkpoint (default 12)")
    parser.add_argument("--shard-megabytes", type=int, default=171, help="of each, about (default 171: 2 GB in all)")
    parser.add_argument("--skip-synthetic", action="store_true", help="measure MODEL only")
    today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    parser.add_argument(
        "--json",
        type=Path,
        metavar="OUT",
        nargs="?",
        const=RESULTS / f"{today}_load_memory.json",
        help="write the figures, dated, with the machine in them (default: benchmarks/results)",
    )
    parser.add_argument("--tokens", type=int, default=8, help="of the forward pass after loading")
    parser.add_argument("--worker", choices=("open", "packed", "dense"), help=argparse.SUPPRESS)
    return parser.parse_args()


def run(args: argparse.Namespace, model: str, how: str) -> dict[str, Any]:
    """What a fresh process measures."""
    words = [sys.executable, __file__, model, "--worker", how, "--tokens", str(args.tokens)]
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, "1")}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"load_memory: the process for {model}, {how}, ended with code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The worker: load in one way, then run a few tokens."""
    import numpy as np

    from ferrum_ref.interfaces.forward import ForwardBatch
    from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory, KvShape
    from ferrum_ref.models.checkpoint import open_checkpoint
    from ferrum_ref.models.decoder import Decoder
    from ferrum_ref.models.decoder_weights import read_decoder_weights
    from ferrum_ref.models.source import resolve_model
    from ferrum_ref.numpy_backend import make_backend
    from ferrum_ref.types.devices import DataType

    path, backend = resolve_model(args.model), make_backend()
    before = reset_peak()
    began_s = time.perf_counter()
    with open_checkpoint(path) as checkpoint:
        report: dict[str, Any] = {
            "model": "synthetic" if path.is_dir() else path.name,
            "how": args.worker,
            "file_bytes": checkpoint.num_bytes,
            "before": before,
        }
        if args.worker == "open":
            return report | {"load": memory(began_s, before)}
        stored = {entry.dtype for entry in checkpoint.tensors.values()}
        dtype = DataType.BF16 if stored == {"BF16"} else DataType.FP32
        weights = read_decoder_weights(checkpoint, backend, dtype, num_threads=1, packed=args.worker == "packed")
        decoder = Decoder(checkpoint.config, weights, backend)
        report |= {"weights_bytes": weights.num_bytes(), "load": memory(began_s, before)}
        config = checkpoint.config
    began_s = time.perf_counter()
    shape = KvShape(config.num_layers, config.num_kv_heads, config.head_dim, decoder.dtype, decoder.device)
    caches = ContiguousKvFactory(backend, shape, decoder.max_tokens)
    batch = ForwardBatch.build([np.arange(args.tokens).tolist()], [0])
    decoder.forward(batch, caches.bind([caches.new_cache()], batch.lengths))
    return report | {"forward": memory(began_s, before)}


def status() -> dict[str, int]:
    """The kernel's accounts of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    pairs = (line.split(":", 1) for line in lines)
    return {name: int(value.split()[0]) * 1024 for name, value in pairs if value.endswith("kB")}


def reset_peak() -> dict[str, int]:
    """Make the peak what is resident now, and say what that is."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    found = status()
    return {"resident_bytes": found["VmRSS"], "anonymous_bytes": found["RssAnon"], "file_bytes": found["RssFile"]}


def memory(began_s: float, before: dict[str, int]) -> dict[str, float]:
    found = status()
    return {
        "seconds": time.perf_counter() - began_s,
        "peak_bytes": found["VmHWM"],
        "growth_bytes": found["VmHWM"] - before["resident_bytes"],
        "anonymous_bytes": found["RssAnon"],
        "file_bytes": found["RssFile"],
    }


def write_checkpoint(directory: Path, num_shards: int, shard_bytes: int, hidden: int = HIDDEN) -> None:
    """A Llama in BF16 of `num_shards` files, each a few layers; the numbers are small and repeat."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    inner, heads = 4 * hidden, hidden // 64
    shapes = {f"self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    layer_bytes = 2 * sum(rows * columns for rows, columns in shapes.values())
    layers_each = max(1, round(shard_bytes / layer_bytes))
    pattern = (np.random.default_rng(0).standard_normal(1 << 20) * 0.02).astype(ml_dtypes.bfloat16)
    config = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": num_shards * layers_each,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        tensors = {}
        for layer in range(shard * layers_each, (shard + 1) * layers_each):
            for name, shape in shapes.items():
                tensors[f"model.layers.{layer}.{name}.weight"] = np.resize(pattern, shape)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(hidden, ml_dtypes.bfloat16)
        if shard == 0:
            tensors["model.embed_tokens.weight"] = np.resize(pattern, (VOCABULARY, hidden))
            tensors["model.norm.weight"] = np.ones(hidden, ml_dtypes.bfloat16)
        file_name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file(tensors, directory / file_name)
        weight_map |= dict.fromkeys(tensors, file_name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def show(report: dict[str, Any]) -> None:
    heads = (("files MB", 9), ("peak MB", 9), ("growth", 8), ("anon", 7), ("file", 7), ("peak/file", 11))
    print(" " * 40 + "".join(f"{head:>{width}}" for head, width in (*heads, ("growth/file", 12))))
    for each in report["runs"]:
        for step in ("load", "forward"):
            if step not in each:
                continue
            found, size = each[step], each["file_bytes"]
            columns = (found[name] / 1e6 for name in ("peak_bytes", "growth_bytes", "anonymous_bytes", "file_bytes"))
            peak, growth, anonymous, mapped = columns
            print(
                f"{each['model'][:28] + ' ' + each['how']:36}{step if each['how'] != 'open' else '':8}{size / 1e6:5.0f}"
                f"{peak:9.0f}{growth:8.0f}{anonymous:7.0f}{mapped:7.0f}"
                f"{found['peak_bytes'] / size:11.2f}{found['growth_bytes'] / size:12.2f}"
            )


if __name__ == "__main__":
    sys.exit(main())
