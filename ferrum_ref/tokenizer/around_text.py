"""What stands around every text: a token before it, a token behind it.  [TK-ENCODE-2]"""

from __future__ import annotations

from tokenizers import Tokenizer, processors


def put_around(backend: Tokenizer, begin: str | None, end: str | None) -> None:
    """Make `backend` put these tokens of its vocabulary around a text.  Mutates `backend`.

    Raises ValueError on a token that the library's templates cannot spell.
    """
    around = [text for text in (begin, end) if text is not None]
    if not around:
        return
    single = [] if begin is None else [f"{begin}:0"]
    single.append("$A:0")
    if end is not None:
        single.append(f"{end}:0")
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(text, backend.token_to_id(text)) for text in dict.fromkeys(around)]
    )
