import subprocess
import sys

import pytest

from crocuta.errors import TokenizerError
from crocuta.tokenizers.bytes import ByteTokenizer
from crocuta.tokenizers.dna import DNATokenizer
from crocuta.tokenizers.load import load_tokenizer, make_tokenizer

VARIANTS = [
    ByteTokenizer(),
    ByteTokenizer(vocab_size=256),
    DNATokenizer(),
    DNATokenizer(vocab_size=12),
    DNATokenizer(case="strict"),
    DNATokenizer(unknown="error"),
]


@pytest.mark.parametrize("tokenizer", VARIANTS, ids=repr)
def test_spec_and_folder_give_an_equal_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "run")
    for copy in (make_tokenizer(tokenizer.spec()), load_tokenizer(tmp_path / "run")):
        assert copy == tokenizer
        assert copy.content_hash() == tokenizer.content_hash()


def test_hashes_tell_all_variants_apart():
    assert len({tokenizer.content_hash() for tokenizer in VARIANTS}) == len(VARIANTS)


def test_hash_of_the_evo_tokenizer_never_changes():
    # Token files on disk carry it: sha256 of {"type":"bytes","vocab_size":512}.
    expected = "e55a2e2a8d5605a5a21d66eafd88d965ae2dff16b954aeb0f59d3cfcd25f53ad"
    assert ByteTokenizer().content_hash() == expected


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"type": "words"}, ["'words'", "bytes, dna, pieces"]),
        ({}, ["None", "bytes, dna, pieces"]),
        ({"type": ["bytes"]}, ["['bytes']", "bytes, dna, pieces"]),
        ({"type": "bytes", "vocabsize": 512}, ["vocabsize", "did you mean 'vocab_size'"]),
        ({"type": "bytes", "vocab_size": "512"}, ["vocab_size", "wrong type"]),
        ({"type": "dna", "case": "lower"}, ["case", "'upper' or 'strict'"]),
        ({"type": "pieces", "file": "absent/tokenizer.json"}, ["absent/tokenizer.json", "No such file"]),
        ([], ["list"]),
    ],
)
def test_bad_specs_say_what_is_wrong(spec, words):
    with pytest.raises(TokenizerError) as failure:
        make_tokenizer(spec)
    for word in words:
        assert word in str(failure.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[" * 50_000, "not JSON"),
        ("[]", "object"),
        (b"\xff\xfe", "not JSON"),
        ('{"tokenizer_class": "LlamaTokenizer"}', "unknown type"),
        (" " * ((1 << 20) + 1), "too large"),
    ],
)
def test_broken_folders_name_the_file_and_the_reason(tmp_path, text, reason):
    path = tmp_path / "tokenizer_config.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TokenizerError) as failure:
        load_tokenizer(tmp_path)
    assert str(path) in str(failure.value)
    assert reason in str(failure.value)


def test_tokenizers_and_data_import_neither_torch_nor_the_rust_package():
    names = "crocuta.tokenizers.load, crocuta.data.prepare, crocuta.data.loader, crocuta.data.genome"
    code = f"import sys, {names}; sys.exit(bool({{'torch', 'tokenizers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
