"""Prompts to token ids. No JAX in here."""

from sdjax.text.byte_vocabulary import byte_vocabulary
from sdjax.text.tokenizer import Encoded, Tokenizer, read_tokenizer_files

__all__ = ["Encoded", "Tokenizer", "byte_vocabulary", "read_tokenizer_files"]
