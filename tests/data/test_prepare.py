import json
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from crocuta.data import prepare as prepare_module
from crocuta.data.megatron import MegatronDataset
from crocuta.data.prepare import prepare, prepare_documents, tokenize
from crocuta.data.text import Document
from crocuta.errors import InputError, SequenceFormatError, TokenizerError
from crocuta.tokenizers.bytes import ByteTokenizer
from crocuta.tokenizers.dna import DNATokenizer
from crocuta.tokenizers.pieces import PiecesTokenizer

DOCUMENTS = st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5)
WORDS = PiecesTokenizer(Tokenizer(models.WordLevel({"ab": 0, "c": 1}, unk_token="c")).to_str())


@given(DOCUMENTS, st.integers(1, 5))
def test_token_files_and_memory_hold_every_document_and_its_end(tmp_path_factory, texts, size):
    tokenizer = ByteTokenizer()
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    prefix = tmp_path_factory.mktemp("prepare") / "x"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "_SLICE", size)
        summary = prepare_documents(documents, tokenizer, prefix)
        source = tokenize(documents, tokenizer)
    dataset = MegatronDataset(prefix)
    expected = [[*text.encode(), 0] for text in texts]
    assert [dataset.document(i).tolist() for i in range(len(dataset))] == expected
    assert source.read(0, len(source)).tolist() == list(chain(*expected))
    assert source.document_offsets.tolist() == dataset.document_offsets.tolist()
    assert (summary.documents, summary.tokens) == (len(texts), len(dataset.tokens))
    assert summary.bytes == summary.tokens


def test_inputs_of_all_kinds_with_their_names(tmp_path):
    (tmp_path / "a.fa").write_text(">r1\nacgt\n>r2\nNN\n")
    (tmp_path / "b.jsonl").write_text('{"text": "CC"}\n')
    summary = prepare([tmp_path / "a.fa", tmp_path / "b.jsonl"], DNATokenizer(), tmp_path / "x", append_eos=True)
    dataset = MegatronDataset(tmp_path / "x")
    assert dataset.tokens.tolist() == [7, 8, 9, 10, 1, 11, 11, 1, 8, 8, 1]
    assert dataset.info is not None
    assert dataset.info.sources == (str(tmp_path / "a.fa"), str(tmp_path / "b.jsonl"))
    assert dataset.info.append_eos
    assert summary.tokenizer_hash == DNATokenizer().content_hash()
    assert (summary.documents, summary.tokens, summary.bytes) == (3, 11, 11)


def test_the_end_of_sequence_is_an_option(tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    prepare(tmp_path / "a.txt", ByteTokenizer(), tmp_path / "x", append_eos=False)
    dataset = MegatronDataset(tmp_path / "x")
    assert dataset.tokens.tolist() == [97, 98]
    assert json.loads((tmp_path / "x.json").read_text())["append_eos"] is False


def test_a_tokenizer_without_end_of_sequence_adds_none_unless_asked(tmp_path):
    documents = [Document("1", "ab"), Document("2", "c")]
    assert tokenize(documents, WORDS).read(0, 2).tolist() == [0, 1]
    with pytest.raises(TokenizerError, match="append_eos"):
        tokenize(documents, WORDS, append_eos=True)


def test_pieces_are_never_cut_by_slices(monkeypatch):
    monkeypatch.setattr(prepare_module, "_SLICE", 1)
    assert tokenize([Document("1", "ab")], WORDS).read(0, 1).tolist() == [0]


def test_broken_input_writes_nothing(tmp_path):
    (tmp_path / "a.fa").write_text(">r1\nACGT\n>r2\nAC!T\n")
    with pytest.raises(SequenceFormatError, match=r"a\.fa:4"):
        prepare(tmp_path / "a.fa", DNATokenizer(), tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["a.fa"]


def test_text_that_the_tokenizer_refuses_names_the_document(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "_SLICE", 4)
    with pytest.raises(TokenizerError, match=r"document 'chr9': the letter at position 1 .*counted from 4.*'R'"):
        prepare_documents([Document("chr9", "ACGTARGT")], DNATokenizer(unknown="error"), tmp_path / "x")


def test_nothing_to_tokenize():
    with pytest.raises(InputError, match="no tokens"):
        tokenize([], ByteTokenizer())
    with pytest.raises(InputError, match="no tokens"):
        tokenize([Document("1", "")], ByteTokenizer(), append_eos=False)


def test_memory_holds_the_small_type():
    source = tokenize([Document("1", "ACGT" * 100)], ByteTokenizer())
    assert source._arrays[0].dtype == np.uint8
