#!/usr/bin/env python3
"""`make run`: the whole idea in a few minutes, on a real model. Every command shown can be typed by hand."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent
QUESTION = "What is the capital of France?"


def say(text: str) -> None:
    print(text, flush=True)


def chapter(number: int, title: str, *lines: str) -> None:
    say(f"\n=== {number}. {title} ===")
    for line in lines:
        say(line)


def command(line: str, notes_last: bool = False) -> str:
    """Run one command as a user would, its output on the screen as it comes; returns its standard output.

    notes_last keeps its remarks (standard error) back until its answer is on the screen.
    """
    words = shlex.split(line)
    say(f"\n$ {line}")
    process = subprocess.Popen(
        [str(BIN / words[0]), *words[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE if notes_last else None
    )
    out = bytearray()
    if process.stdout is None:
        raise RuntimeError("standard output was not captured")
    while piece := process.stdout.read1():
        out += piece
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    if process.stderr is not None:
        say(process.stderr.read().decode("utf-8").rstrip())
    if process.wait() != 0:
        say(f"\nThe tour stops here: '{line}' ended with exit code {process.returncode}.")
        sys.exit(process.returncode)
    return out.decode("utf-8")


def main() -> int:
    started = time.monotonic()
    say("ferrum-ref says exactly what an LLM inference engine's contracts mean, and proves it.")
    say("This tour has four parts; nothing in it is canned: each part runs the command you see.")

    chapter(
        1,
        "A real language model",
        "SmolLM2-135M: 134.5 million weights, packed at about 4 bits each in one 98 MB GGUF file.",
        "It is fetched once, checked by its SHA-256, and kept in your cache directory.",
    )
    path = command("ferrum-ref pull smollm2-135m").strip()
    say(f"(the model is {Path(path).stat().st_size / 1e6:.1f} MB on disk)")
    command("ferrum-ref inspect smollm2-135m")

    chapter(
        2,
        "The same question, answered twice",
        "First by the numpy reference, whose every operation is defined by a numbered clause in specs/;",
        "then by the torch backend: other code, the same model definition. Temperature 0: always the likeliest word.",
    )
    answers = [
        command(
            f'ferrum-ref generate smollm2-135m "{QUESTION}" --chat --temperature 0 --backend {name}', notes_last=True
        )
        for name in ("numpy", "torch")
    ]
    for name, answer in zip(("numpy", "torch"), answers, strict=True):
        if "Paris" not in answer:
            say(f"The {name} answer does not contain 'Paris': something is wrong.")
            return 1
    say(f"(both say Paris; the texts are {'identical' if answers[0] == answers[1] else 'different'})")

    chapter(
        3,
        "The judge",
        "Is the torch backend *right*? Every operation, in 32- and 16-bit arithmetic, is compared with its value in",
        "64-bit arithmetic. The allowed error is derived from the arithmetic itself (a bound), never typed in by hand:",
        "the table shows the worst error divided by that bound; 1.00 would be the edge, above it a proof of a bug.",
    )
    command("ferrum-ref parity --backend torch")

    chapter(
        4,
        "The simulator",
        "The scheduler and the paged KV cache that just served the model also run against a virtual clock, with a",
        "cost model of one H100 in place of the arithmetic. Which is better: at most 512 tokens a step, or 2048?",
        "Both face the very same 2,400 made-up requests. TTFT = time to first token; TPOT = time per further token.",
    )
    command("ferrum-sim compare --vary max-num-batched-tokens=512,2048")

    took_s = time.monotonic() - started
    say(f"\nThe tour took {took_s:.0f} s. README.md tells what to try next; specs/ holds the semantics.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
