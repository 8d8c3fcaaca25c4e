"""From a run's description to the token streams it trains and is measured on."""

from __future__ import annotations

from crocuta.data.prepare import tokenize
from crocuta.data.text import read_documents
from crocuta.data.windows import TokenSource, split
from crocuta.tokenizers.base import Tokenizer
from crocuta.training.config import DataConfig


def open_data(config: DataConfig, tokenizer: Tokenizer, vocab_size: int) -> tuple[TokenSource, TokenSource]:
    """(train, held-out) streams of ``config``, checked against the model's vocabulary.

    Raises:
        InputError, SequenceFormatError, TokenizerError: whatever is wrong with the files.
    """
    if config.format == "tokens":
        source = TokenSource.open(config.files, tokenizer)
    else:
        documents = read_documents(config.files, config.format, field=config.field, case=config.case)
        source = tokenize(documents, tokenizer)
    source.check_ids(vocab_size)
    return split(source, config.held_out, config.split_by)
