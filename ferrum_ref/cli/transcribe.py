"""`ferrum-ref transcribe FILE.wav`: speech to text with times.  Clauses: FM-CLI-4..5 (specs/audio.md)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferrum_ref.cli.cache import add_cache_option, cache_dir

if TYPE_CHECKING:
    from ferrum_ref.interfaces.families_data import PcmSamples, TranscriptSegment
    from ferrum_ref.models.whisper_transcriber import WhisperTranscriber


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "transcribe",
        help="write down what is said in a WAV file",
        description="Write down what is said in a WAV file, with the time of each sentence, by a Whisper model."
        " Channels are mixed and the rate is changed as needed.",
    )
    parser.add_argument("file", metavar="FILE.wav", type=Path, help="PCM of 8 to 32 bits or floats, any rate")
    parser.add_argument("--model", default="whisper-base", help="a pulled model's name (whisper-base) or a directory")
    parser.add_argument("--language", metavar="CODE", help="en, de, ... (default: the model decides)")
    parser.add_argument("--backend", default="numpy", help="numpy (default), torch, or another installed backend")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_cache_option(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Read, load, listen, print.  [FM-CLI-4..5]"""
    from ferrum_ref.families import load_transcriber
    from ferrum_ref.formats.byte_source import FileBytes
    from ferrum_ref.formats.wav import read_wav
    from ferrum_ref.models.audio.resample import resample

    source = FileBytes(args.file)
    try:
        sound = read_wav(source)
    finally:
        source.close()
    transcriber = load_transcriber(args.model, args.backend, args.device, cache_dir=cache_dir(args))
    pcm = resample(sound.mono(), sound.sample_rate, transcriber.sample_rate)
    language, segments = listen(transcriber, pcm, args.language)
    if args.json:
        facts = {
            "model": args.model,
            "file": str(args.file),
            "language": language,
            "duration_s": len(sound.frames) / sound.sample_rate,
            "text": " ".join(each.text for each in segments),
            "segments": [
                {"start_s": round(each.start_sec, 2), "end_s": round(each.end_sec, 2), "text": each.text}
                for each in segments
            ],
        }
        print(json.dumps(facts, ensure_ascii=False))
    else:
        for each in segments:
            print(f"{_clock(each.start_sec)} - {_clock(each.end_sec)}  {each.text}")
    return 0


def listen(
    transcriber: WhisperTranscriber, pcm: PcmSamples, language: str | None
) -> tuple[str | None, list[TranscriptSegment]]:
    """The language and the segments, under a progress bar where standard error is a terminal.  [FM-CLI-4]"""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    segments: list[TranscriptSegment] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("listening", total=len(pcm))
        for window in transcriber.windows(pcm, language):
            segments += window.segments
            language = window.language
            progress.update(task, completed=window.heard_samples)
    return language, segments


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds * 100), 6000)
    return f"{minutes:02d}:{rest / 100:05.2f}"
