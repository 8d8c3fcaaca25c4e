import pytest
from hypothesis import given
from hypothesis import strategies as st

from crocuta.data.genome import Interval, reverse_complement
from crocuta.errors import InputError

INVOLUTIVE = "ACGTRYSWKMBDHVNacgtryswkmbdhvn-*."


@given(st.text(INVOLUTIVE))
def test_reverse_complement_is_its_own_inverse(sequence):
    assert reverse_complement(reverse_complement(sequence)) == sequence


@given(st.text(INVOLUTIVE), st.text(INVOLUTIVE))
def test_reverse_complement_swaps_the_order_of_parts(a, b):
    assert reverse_complement(a + b) == reverse_complement(b) + reverse_complement(a)


@given(st.text(INVOLUTIVE))
def test_reverse_complement_of_bytes_is_that_of_text(sequence):
    assert reverse_complement(sequence.encode()) == reverse_complement(sequence).encode()


def test_reverse_complement_by_hand():
    assert reverse_complement("AACgtRYKMBDHVSWN-u") == "a-NWSBDHVKMRYacGTT"


@pytest.mark.parametrize(("sequence", "position"), [("ACE", 2), ("Aé", 1), (b"AC\x00", 2), ("A C", 1)])
def test_letters_without_complement_are_named(sequence, position):
    with pytest.raises(InputError, match=f"position {position} "):
        reverse_complement(sequence)


@given(st.text("chrX:_1", min_size=1), st.integers(0, 10**9), st.integers(1, 10**6))
def test_parse_inverts_region(contig, start, length):
    interval = Interval(contig, start, start + length)
    assert Interval.parse(interval.region) == interval
    assert len(interval) == length


def test_regions_are_one_based_inclusive_and_intervals_half_open():
    assert Interval.parse("chr1:1,001-2,000", "-") == Interval("chr1", 1000, 2000, "-")
    assert Interval.parse("HLA-A*01:01:1-1") == Interval("HLA-A*01:01", 0, 1)


@pytest.mark.parametrize("region", ["chr1", "chr1:", "chr1:5", "chr1:0-5", "chr1:6-5", ":1-5", "chr1:-1-5", "c 1:1-2"])
def test_bad_regions_are_refused(region):
    with pytest.raises(InputError, match="not a region"):
        Interval.parse(region)


@pytest.mark.parametrize("arguments", [("c", 5, 5), ("c", -1, 5), ("", 0, 5), ("c", 0, 5, ".")])
def test_impossible_intervals_are_refused(arguments):
    with pytest.raises(InputError, match="interval"):
        Interval(*arguments)


def test_extract_follows_the_strand_and_the_bounds():
    assert Interval("c", 1, 4).extract("AACGT") == "ACG"
    assert Interval("c", 1, 4, "-").extract(b"AACGT") == b"CGT"
    with pytest.raises(InputError, match="c:3-6 runs past"):
        Interval("c", 2, 6).extract("AACGT")
