"""Text in and out of a model: tokenizer, chat template, incremental detokenizer. No torch, no tensors."""

from pdserve.core.text.chat_template import ChatMessage
from pdserve.core.text.detokenizer import IncrementalDetokenizer
from pdserve.core.text.tokenizer import Tokenizer

__all__ = ["ChatMessage", "IncrementalDetokenizer", "Tokenizer"]
