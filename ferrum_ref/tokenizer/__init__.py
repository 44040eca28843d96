"""Tokenizers: the adapter over Hugging Face `tokenizers`, streaming detokenisation, chat templates."""

from ferrum_ref.tokenizer.hugging_face import HuggingFaceTokenizer
from ferrum_ref.tokenizer.load import load_tokenizer

__all__ = ["HuggingFaceTokenizer", "load_tokenizer"]
