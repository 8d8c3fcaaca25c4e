import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crocuta.errors import TokenizerError
from crocuta.tokenizers.bytes import ByteTokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXT)
def test_decode_inverts_encode(text):
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


@given(st.binary())
def test_ids_are_the_byte_values(data):
    ids = ByteTokenizer().encode(data)
    assert ids.dtype == np.int64
    assert ids.tolist() == list(data)
    assert ByteTokenizer().decode_bytes(ids) == data


@given(TEXT, TEXT)
def test_encoding_is_additive(a, b):
    encode = ByteTokenizer().encode
    assert encode(a + b).tolist() == [*encode(a), *encode(b)]


@given(st.lists(st.integers(0, 511)))
def test_incremental_decoder_gives_the_same_text_and_never_half_a_character(ids):
    tokenizer = ByteTokenizer()
    decoder = tokenizer.incremental_decoder()
    pieces = [decoder.feed(token) for token in ids]
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(ids)


@given(TEXT)
def test_incremental_decoder_waits_for_the_whole_character(text):
    tokenizer = ByteTokenizer()
    decoder = tokenizer.incremental_decoder()
    pieces = [decoder.feed(token) for token in tokenizer.encode(text)]
    assert [piece for piece in pieces if piece] == list(text)
    assert decoder.finish() == ""


def test_evo_special_ids_and_padding_ids():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (512, 0, 1, None)
    assert tokenizer.num_ids == 256
    assert tokenizer.decode([65, 300, 66]) == "AB"


def test_invalid_utf8_is_shown_as_replacement():
    assert ByteTokenizer().decode([0x41, 0xC3, 0x41]) == "A\ufffdA"


@pytest.mark.parametrize("ids", [[512], [-1], [[65]], [6.5]])
def test_ids_outside_the_vocabulary_are_refused(ids):
    with pytest.raises(TokenizerError, match=r"vocabulary|integers"):
        ByteTokenizer().decode(ids)


def test_the_position_of_a_bad_id_is_named():
    with pytest.raises(TokenizerError, match=r"position 2 .*got 999; expected 0 to 511"):
        ByteTokenizer().decode([65, 66, 999])


def test_lone_surrogate_is_refused_with_its_position():
    with pytest.raises(TokenizerError, match="position 3"):
        ByteTokenizer().encode("abc\ud800")


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(TokenizerError, match="255"):
        ByteTokenizer(vocab_size=255)


def test_complement_of_nucleotides_in_both_cases_and_of_nothing_else():
    table = ByteTokenizer().complement_ids
    assert table.shape == (512,)
    pairs = dict(zip("ACGTRYSWKMBDHVNacgtryswkmbdhvn", "TGCAYRSWMKVHDBNtgcayrswmkvhdbn"))
    for base, partner in pairs.items():
        assert chr(table[ord(base)]) == partner
    assert chr(table[ord("U")]) == "A"
    others = [i for i in range(512) if chr(i) not in set(pairs) | set("Uu")]
    assert (table[others] == others).all()
    assert not table.flags.writeable
