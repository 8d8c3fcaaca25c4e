import json
import struct
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crocuta.data import megatron
from crocuta.data.megatron import MegatronDataset, token_dtype, write_megatron
from crocuta.errors import InputError, SequenceFormatError, TokenizerError
from crocuta.tokenizers.bytes import ByteTokenizer
from crocuta.tokenizers.dna import DNATokenizer


def write(prefix, documents, tokenizer=None, **options):
    with write_megatron(prefix, tokenizer or ByteTokenizer(), **options) as writer:
        for document in documents:
            writer.append(np.array(document, np.int64))
            writer.end_document()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def hand_written_index(code, lengths, offsets, documents):
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
    arrays = struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(offsets)}q", *offsets)
    return header + arrays + struct.pack(f"<{len(documents)}q", *documents)


def test_files_are_megatron_byte_for_byte(tmp_path):
    write(tmp_path / "x", [[1, 2, 3], [], [255]])
    assert (tmp_path / "x.bin").read_bytes() == bytes([1, 2, 3, 255])
    assert (tmp_path / "x.idx").read_bytes() == hand_written_index(1, [3, 0, 1], [0, 3, 3], [0, 1, 2, 3])


def test_a_wider_vocabulary_is_stored_wider(tmp_path, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "num_ids", 300)
    write(tmp_path / "x", [[1, 299], [2]])
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<3H", 1, 299, 2)
    assert (tmp_path / "x.idx").read_bytes() == hand_written_index(8, [2, 1], [0, 4], [0, 1, 2])


@pytest.mark.parametrize(
    ("num_ids", "dtype"), [(1, "<u1"), (256, "<u1"), (257, "<u2"), (65536, "<u2"), (65537, "<i4"), (2**31, "<i4")]
)
def test_token_types_at_their_bounds(num_ids, dtype):
    assert token_dtype(num_ids) == np.dtype(dtype)


@given(st.lists(st.lists(st.integers(0, 255), max_size=9), min_size=1).filter(any), st.integers(1, 4))
def test_read_inverts_write_also_where_long_documents_are_cut(tmp_path_factory, documents, longest):
    prefix = tmp_path_factory.mktemp("megatron") / "x"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron, "_MAX_SEQUENCE", longest)  # stands for 2^31 - 1
        write(prefix, documents)
    dataset = MegatronDataset(prefix)
    assert [dataset.document(i).tolist() for i in range(len(dataset))] == documents
    assert dataset.tokens.tolist() == list(chain(*documents))
    assert not dataset.tokens.flags.writeable


def test_a_document_longer_than_a_sequence_can_be_becomes_several(tmp_path, monkeypatch):
    monkeypatch.setattr(megatron, "_MAX_SEQUENCE", 2)
    write(tmp_path / "x", [[1, 2, 3, 4, 5], [6, 7]])
    assert (tmp_path / "x.idx").read_bytes() == hand_written_index(1, [2, 2, 1, 2], [0, 2, 4, 5], [0, 3, 4])


def test_documents_of_several_sequences_are_read(tmp_path):
    (tmp_path / "x.bin").write_bytes(struct.pack("<5i", 7, 8, 9, 70000, 11))
    (tmp_path / "x.idx").write_bytes(hand_written_index(4, [2, 1, 2], [0, 8, 12], [0, 2, 3]))
    dataset = MegatronDataset(tmp_path / "x")
    assert [dataset.document(i).tolist() for i in range(len(dataset))] == [[7, 8, 9], [70000, 11]]
    assert dataset.info is None


def test_the_sidecar_says_what_the_ids_mean(tmp_path):
    write(tmp_path / "x", [[7, 8], [9]], DNATokenizer(), sources=["genome.fa"], append_eos=True)
    info = MegatronDataset(tmp_path / "x").info
    assert info is not None
    assert (info.documents, info.tokens, info.sources, info.append_eos) == (2, 3, ("genome.fa",), True)
    assert info.tokenizer == DNATokenizer().spec()
    assert info.tokenizer_hash == DNATokenizer().content_hash()


def test_another_tokenizer_is_refused(tmp_path):
    write(tmp_path / "x", [[7, 8]], DNATokenizer())
    MegatronDataset(tmp_path / "x").check_tokenizer(DNATokenizer())
    with pytest.raises(TokenizerError, match=r"another tokenizer.*dna.*bytes"):
        MegatronDataset(tmp_path / "x").check_tokenizer(ByteTokenizer())


def test_a_failure_leaves_what_was_there(tmp_path):
    write(tmp_path / "x", [[1, 2]])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TokenizerError):
        write(tmp_path / "x", [[9], [256]], overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_overwriting_must_be_asked_for(tmp_path):
    write(tmp_path / "x", [[1, 2]])
    with pytest.raises(InputError, match=r"x\.idx exists"):
        write(tmp_path / "x", [[3]])
    write(tmp_path / "x", [[3]], overwrite=True)
    assert MegatronDataset(tmp_path / "x").tokens.tolist() == [3]
    assert names(tmp_path) == ["x.bin", "x.idx", "x.json"]


def test_a_crash_between_the_renames_leaves_no_index(tmp_path, monkeypatch):
    write(tmp_path / "x", [[1, 2]])
    monkeypatch.setattr(megatron, "encode", lambda value: 1 / 0)  # fails after the tokens, before json and idx
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "x", [[3]], overwrite=True)
    with pytest.raises(InputError, match=r"x\.idx"):
        MegatronDataset(tmp_path / "x")


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_no_tokens_no_files(tmp_path, documents):
    with pytest.raises(InputError, match="no tokens"):
        write(tmp_path / "x", documents)
    assert names(tmp_path) == []


@pytest.mark.parametrize("wrong", [-1, 256, 511])
def test_ids_outside_the_vocabulary_are_not_written(tmp_path, wrong):
    with pytest.raises(TokenizerError, match=f"got {wrong}; expected 0 to 255"):
        write(tmp_path / "x", [[1, wrong]])
    assert names(tmp_path) == []


def index(code=1, lengths=(2, 1), offsets=(0, 2), documents=(0, 1, 2)):
    return hand_written_index(code, lengths, offsets, documents)


HUGE = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 1, 2**63, 2**62)
BROKEN = {
    "empty": (b"", "no Megatron index"),
    "magic": (b"X" + index()[1:], "no Megatron index"),
    "short": (index()[:20], "no Megatron index"),
    "version": (index()[:9] + b"\x02" + index()[10:], "unknown version: got 2"),
    "code": (index(code=9), "unknown token type: got code 9"),
    "float": (index(code=6), "unknown token type: got code 6"),
    "huge": (HUGE, "size that its header says"),
    "cut": (index()[:-1], "size that its header says"),
    "longer": (index() + b"\0\0", "size that its header says"),
    "negative": (index(lengths=(4, -1)), "negative length at sequence 1: got -1"),
    "offset": (index(offsets=(0, 1)), "wrong offset at sequence 1: got 1; expected 2"),
    "offset-0": (index(offsets=(1, 3)), "wrong offset at sequence 0"),
    "documents-start": (index(documents=(1, 2)), "broken document index"),
    "documents-end": (index(documents=(0, 1)), "broken document index"),
    "documents-fall": (index(documents=(0, 2, 1, 2)), "broken document index"),
    "documents-none": (index(documents=()), "broken document index"),
    "type": (index(code=8, offsets=(0, 4)), "does not have the size that its index says: got 3 bytes; expected 6"),
    "tokens": (index(lengths=(2, 2)), "does not have the size that its index says: got 3 bytes; expected 4"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_name_the_file_and_the_reason(tmp_path, name):
    content, reason = BROKEN[name]
    (tmp_path / "x.bin").write_bytes(bytes(3))
    (tmp_path / "x.idx").write_bytes(content)
    with pytest.raises(SequenceFormatError) as failure:
        MegatronDataset(tmp_path / "x")
    assert str(tmp_path / "x.") in str(failure.value)
    assert reason in str(failure.value)


def test_the_unbroken_index_is_read(tmp_path):
    (tmp_path / "x.bin").write_bytes(bytes(3))
    (tmp_path / "x.idx").write_bytes(index())
    assert len(MegatronDataset(tmp_path / "x")) == 2


def test_files_without_tokens_are_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / "x.idx").write_bytes(index(lengths=(), offsets=(), documents=(0,)))
    with pytest.raises(SequenceFormatError, match="holds no tokens"):
        MegatronDataset(tmp_path / "x")


@given(st.data())
def test_no_mutation_of_the_index_gets_past_with_other_tokens(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("mutation")
    (folder / "x.bin").write_bytes(bytes(3))
    content = bytearray(index())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    (folder / "x.idx").write_bytes(content)
    try:
        dataset = MegatronDataset(folder / "x")
    except SequenceFormatError:
        return
    assert len(dataset.tokens) == 3
    assert dataset.document_offsets[0] == 0
    assert dataset.document_offsets[-1] == 3
    # What one byte can change unseen: int8 for uint8, and where the first document ends.
    assert position in (17, *range(len(content) - 16, len(content) - 8))


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_missing_file_is_an_input_error(tmp_path, suffix):
    write(tmp_path / "x", [[1, 2]])
    (tmp_path / f"x.{suffix}").unlink()
    with pytest.raises(InputError, match=rf"x\.{suffix}: got No such file"):
        MegatronDataset(tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens": 4}, "belongs to other token files: got 2 documents, 4 tokens"),
        ({"documents": "2"}, "documents has the wrong type"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"format": "crocuta-tokens-9"}, "unknown value"),
    ],
)
def test_a_broken_sidecar_is_refused(tmp_path, change, reason):
    write(tmp_path / "x", [[1, 2], [3]])
    path = tmp_path / "x.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SequenceFormatError) as failure:
        MegatronDataset(tmp_path / "x")
    assert str(path) in str(failure.value)
    assert reason in str(failure.value)
