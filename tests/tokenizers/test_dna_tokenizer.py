import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crocuta.data.genome import reverse_complement
from crocuta.errors import TokenizerError
from crocuta.tokenizers.dna import DNATokenizer

DNA = st.text("ACGTN")


@given(DNA)
def test_decode_inverts_encode(text):
    assert DNATokenizer().decode(DNATokenizer().encode(text)) == text


def test_ids_are_those_of_hyenadna():
    ids = DNATokenizer().encode("ACGTN")
    assert ids.dtype == np.int64
    assert ids.tolist() == [7, 8, 9, 10, 11]
    tokenizer = DNATokenizer()
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, 4, 16)


@given(st.text("ACGTNacgtn"))
def test_upper_case_policy(text):
    assert DNATokenizer().encode(text).tolist() == DNATokenizer().encode(text.upper()).tolist()


def test_strict_case_policy_makes_lower_case_unknown():
    assert DNATokenizer(case="strict").encode("Aa").tolist() == [7, 6]


@given(st.text())
def test_one_id_a_character_whatever_the_text(text):
    ids = DNATokenizer().encode(text)
    assert len(ids) == len(text)
    assert all((token == 6) == (letter not in "ACGTNacgtn") for token, letter in zip(ids, text))


@pytest.mark.parametrize(("text", "position", "letter"), [("ACRT", 2, "R"), ("Aé", 1, r"\\xe9"), (b"AC-", 2, "-")])
def test_unknown_letters_can_be_errors(text, position, letter):
    with pytest.raises(TokenizerError, match=rf"position {position} .*{letter}"):
        DNATokenizer(unknown="error").encode(text)


def test_strict_errors_say_that_upper_case_is_needed():
    with pytest.raises(TokenizerError, match=r"position 1.*upper case"):
        DNATokenizer(case="strict", unknown="error").encode("Aa")


def test_decoding_leaves_out_special_tokens_and_shows_unknown_as_n():
    assert DNATokenizer().decode([0, 2, 7, 6, 10, 1, 4, 5, 3, 12, 15]) == "ANT"


def test_ids_of_the_padding_exist_only_in_the_padded_vocabulary():
    with pytest.raises(TokenizerError, match="0 to 11"):
        DNATokenizer(vocab_size=12).decode([12])


@given(st.text("ACGTN"))
def test_complement_table_agrees_with_reverse_complement(text):
    tokenizer = DNATokenizer()
    other = tokenizer.complement_ids[tokenizer.encode(text)[::-1]]
    assert tokenizer.decode(other) == reverse_complement(text)


def test_complement_table_keeps_special_tokens():
    table = DNATokenizer(vocab_size=12).complement_ids
    assert table.tolist() == [0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11]


@given(st.lists(st.integers(0, 15)))
def test_incremental_decoder_gives_the_same_text(ids):
    decoder = DNATokenizer().incremental_decoder()
    assert "".join([decoder.feed(token) for token in ids]) + decoder.finish() == DNATokenizer().decode(ids)


@pytest.mark.parametrize("options", [{"vocab_size": 13}, {"case": "lower"}, {"unknown": "drop"}])
def test_unknown_options_are_refused(options):
    with pytest.raises(TokenizerError, match=next(iter(options))):
        DNATokenizer(**options)
