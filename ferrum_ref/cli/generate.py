"""`ferrum-ref generate MODEL "prompt"`: stream a model's answer.  Clauses: EN-GENERATE-1..6 (specs/generate.md)."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ferrum_ref.cli.cache import add_cache_option, cache_dir
from ferrum_ref.errors import RequestValidationError, UnsupportedError

if TYPE_CHECKING:
    from ferrum_ref.assembly import LoadedModel
    from ferrum_ref.interfaces.llm import DecoderOnlyLLM
    from ferrum_ref.types.requests import InferenceRequest
    from ferrum_ref.types.sampling import SamplingParams

STEP_TOKENS = 512  # prompts longer than this are taken in chunks


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "generate",
        help="stream a model's answer to a prompt",
        description="Stream a model's answer to standard output; its speed goes to standard error. Greedy unless"
        " --temperature is given; the same --seed gives the same text.",
    )
    parser.add_argument("model", metavar="MODEL", help="a pulled model's name, a GGUF file or a Hugging Face directory")
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue, or with --chat the question to answer")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message (implies --chat)")
    parser.add_argument("--backend", default="numpy", help="numpy (default), torch, or another installed backend")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument(
        "--packed",
        action="store_true",
        help="keep weights packed as in the file: less memory; slower with numpy and torch, faster with numba-cpu",
    )
    parser.add_argument(
        "--decode",
        choices=("auto", "step", "kernels"),
        default="auto",
        help="step: the backend's own decode step; kernels: one kernel after another;"
        " auto (default): the step where backend and model have one, else kernels",
    )
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest answer (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): always the likeliest")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens of mass P"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P times the likeliest one")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: repeat less")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws; the same seed, the same text")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of streaming")
    add_cache_option(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Load, generate, stream.  [EN-GENERATE-1..6]

    Raises FerrumError subclasses: parameters and an empty prompt before anything is loaded.
    """
    params = sampling_params(args)
    loaded = _load(args)
    request = build_request(args, loaded, params)
    llm = stepped_llm(loaded, args.decode)
    answer = asyncio.run(_stream(loaded, request, llm, quiet=args.json))
    if args.json:
        print(json.dumps(answer.to_dict(args.model), ensure_ascii=False))
    print(answer.speed(loaded), file=sys.stderr)
    return 0


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The options as parameters.  Raises RequestValidationError naming a bad one, InvalidParameterError. Pure."""
    from ferrum_ref.types.sampling import SamplingParams

    if not args.prompt:
        raise RequestValidationError("generate: the prompt is empty; give at least one character")
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop_sequences=list(args.stop),
    )
    params.validate()
    return params


def build_request(args: argparse.Namespace, loaded: LoadedModel, params: SamplingParams) -> InferenceRequest:
    """The prompt, in the chat template if asked for. Pure.  Raises UnsupportedError: the model has no template."""
    from ferrum_ref.interfaces.tokenizer import ChatMessage
    from ferrum_ref.types.requests import InferenceRequest

    prompt, is_chat = args.prompt, args.chat or args.system is not None
    if is_chat:
        system = [] if args.system is None else [ChatMessage.system(args.system)]
        prompt = loaded.tokenizer.apply_chat_template([*system, ChatMessage.user(prompt)], add_generation_prompt=True)
    request = InferenceRequest.new(prompt, loaded.info.model_id).with_sampling_params(params)
    return request.with_metadata("add_special_tokens", False) if is_chat else request


def stepped_llm(loaded: LoadedModel, decode: str) -> DecoderOnlyLLM | None:
    """The model with its backend's decode step, or None: decode by kernels.  [EN-GENERATE-5..6]

    Raises UnsupportedError, saying why, where `decode` is "step" and there is none.
    """
    if decode == "kernels":
        return None
    try:
        return loaded.new_stepped_llm()
    except UnsupportedError as error:
        if decode == "step":
            raise UnsupportedError(f"generate: --decode step: {error.message}; or take --decode kernels") from error
        return None


@dataclass(slots=True)
class Answer:
    """What came out, and when."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str = ""
    num_prompt_tokens: int = 0
    started_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    decode: str = "kernels"

    def to_dict(self, model: str) -> dict[str, Any]:
        """The part that a second run with the same seed repeats, ready for JSON."""
        return {
            "model": model,
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": len(self.token_ids),
            "decode": self.decode,
        }

    def speed(self, loaded: LoadedModel) -> str:
        """One line: counts, time to first token, the rate of the tokens after it, and what decoded them."""
        num_tokens, span_s = len(self.token_ids), self.last_s - self.first_s
        rate = f"{(num_tokens - 1) / span_s:.1f} tokens/s" if num_tokens > 1 and span_s > 0 else "no rate"
        return (
            f"{self.num_prompt_tokens} prompt tokens, {num_tokens} generated; first token after"
            f" {self.first_s - self.started_s:.2f} s, then {rate}"
            f" ({loaded.backend.name()} on {loaded.info.device}, decoded by {self.decode};"
            f" ended by {self.finish_reason})"
        )


async def _stream(loaded: LoadedModel, request: InferenceRequest, llm: DecoderOnlyLLM | None, quiet: bool) -> Answer:
    """Generate, writing each piece as it comes.  Mutates standard output."""
    from ferrum_ref.serving import build_engine, build_llm_engine

    num_tokens = request.sampling_params.max_tokens + len(loaded.tokenizer.encode(request.prompt, True))
    num_tokens = min(num_tokens, loaded.info.max_sequence_length)
    num_blocks = -(-num_tokens // 16)
    if llm is None:
        engine = build_engine(loaded, num_blocks=num_blocks, max_num_batched_tokens=STEP_TOKENS, max_num_seqs=1)
    else:
        limits = {"num_blocks": num_blocks, "max_num_batched_tokens": STEP_TOKENS, "max_num_seqs": 1}
        engine = build_llm_engine(loaded, llm, **limits)
    answer = Answer(started_s=time.perf_counter(), decode="kernels" if llm is None else "step")
    token_ids: list[int] = []
    try:
        async for chunk in await engine.infer_stream(request):
            if chunk.token is not None:
                answer.last_s = time.perf_counter()
                answer.first_s = answer.first_s or answer.last_s
                token_ids.append(int(chunk.token))
            answer.text += chunk.text
            if chunk.text and not quiet:
                write(chunk.text)
            if chunk.finish_reason is not None:
                answer.finish_reason = chunk.finish_reason.value
                answer.num_prompt_tokens = chunk.usage.prompt_tokens if chunk.usage is not None else 0
    finally:
        await engine.shutdown()
    if not quiet and not answer.text.endswith("\n"):
        write("\n")
    answer.token_ids = tuple(token_ids)
    return answer


def write(text: str) -> None:
    """Text to standard output at once; what its encoding cannot express is written as ?."""
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _load(args: argparse.Namespace) -> LoadedModel:
    """The model, with a bar on a terminal's standard error."""
    from rich.console import Console
    from rich.progress import Progress

    from ferrum_ref.assembly import load_model

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("loading weights", total=None)
        return load_model(
            args.model,
            args.backend,
            args.device,
            cache_dir=cache_dir(args),
            packed=args.packed,
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
