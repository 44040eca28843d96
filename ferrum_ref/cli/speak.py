"""`ferrum-ref speak TEXT --out x.wav`: text or phonemes to speech.  Clauses: FM-CLI-6..7 (specs/audio.md)."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferrum_ref.cli.cache import add_cache_option, cache_dir
from ferrum_ref.errors import RequestValidationError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ferrum_ref.models.audio.phonemes import Utterance
    from ferrum_ref.models.vits_speech import VitsSpeech


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "speak",
        help="speak a text into a WAV file",
        description="Speak a text, or phonemes (IPA), into a WAV file by a VITS voice. Plain text for a Piper voice"
        " needs the program espeak-ng; phonemes need nothing.",
    )
    parser.add_argument("text", metavar="TEXT", nargs="?", help="what to say; [[...]] inside it holds phonemes")
    parser.add_argument("--phonemes", metavar="IPA", help="phonemes instead of text: 'həlˈoʊ wˈɜːld.'")
    parser.add_argument("--out", metavar="FILE.wav", type=Path, required=True, help="the WAV file to write")
    parser.add_argument("--model", default="piper-joe", help="a pulled voice's name (piper-joe), a file or a directory")
    parser.add_argument("--speed", type=float, default=1.0, help="2 is twice as fast (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the voice's randomness (default: 0)")
    parser.add_argument("--backend", default="numpy", help="numpy (default), torch, or another installed backend")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_cache_option(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Load, speak, write, print.  [FM-CLI-6..7]  Raises RequestValidationError unless there is one thing to say."""
    from ferrum_ref.families import load_speech
    from ferrum_ref.formats.wav import wav_bytes
    from ferrum_ref.models.vits import SpeechControls

    if (args.text is None) == (args.phonemes is None):
        raise RequestValidationError("speak: give either a text or --phonemes, and not both")
    if not 0 <= args.seed < 2**63:
        raise RequestValidationError(f"speak: seed {args.seed}, expected 0 to 2^63 - 1")
    controls = SpeechControls(speed=args.speed)
    speech = load_speech(
        args.model, args.backend, args.device, seed=args.seed, controls=controls, cache_dir=cache_dir(args)
    )
    utterance = speech.reader.read(args.text) if args.phonemes is None else _phonemes(speech, args.phonemes)
    samples = spoken(speech, utterance)
    args.out.write_bytes(wav_bytes(samples, speech.sample_rate))
    if utterance.ignored:
        sys.stderr.write(f"ferrum-ref: note: the voice has no sound for {' '.join(utterance.ignored)}\n")
    facts = {
        "model": args.model,
        "file": str(args.out),
        "sample_rate": speech.sample_rate,
        "num_samples": len(samples),
        "duration_s": len(samples) / speech.sample_rate,
        "num_sentences": len(utterance.sentences),
        "ignored": list(utterance.ignored),
    }
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        print(f"{args.out}: {facts['duration_s']:.2f} s at {speech.sample_rate} Hz")
    return 0


def _phonemes(speech: VitsSpeech, phonemes: str) -> Utterance:
    """Raises UnsupportedError for a voice that reads letters."""
    from ferrum_ref.models.audio.phonemes import PhonemeReader

    if not isinstance(speech.reader, PhonemeReader):
        raise UnsupportedError("speak: --phonemes: this voice reads letters, expected a text")
    return speech.reader.read_phonemes(phonemes)


def spoken(speech: VitsSpeech, utterance: Utterance) -> NDArray[np.float32]:
    """All sentences, under a progress bar where standard error is a terminal.  [FM-CLI-6]"""
    import numpy as np
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    pieces = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("speaking", total=2 * len(utterance.sentences) - 1)
        for piece in speech.pieces(utterance):
            pieces.append(piece)
            progress.advance(task)
    return np.concatenate(pieces)
