import builtins
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from crocuta.errors import MissingExtraError, TokenizerError
from crocuta.tokenizers.load import load_tokenizer, make_tokenizer
from crocuta.tokenizers.pieces import PiecesTokenizer


def byte_level_definition() -> str:
    """A byte-level BPE that knows a few words and, as a trap, adds specials, truncates and pads by itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat, the hat sat too"] * 5, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=16, pad_id=1, pad_token="</s>")
    return backend.to_str()


DEFINITION = byte_level_definition()
TOKENIZER = PiecesTokenizer(DEFINITION, eos="</s>", bos="<s>")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decode_inverts_encode_without_truncation_padding_or_special_tokens(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert not {0, 1} & set(ids.tolist())


def test_words_become_pieces():
    assert len(TOKENIZER.encode("the cat sat on the mat")) < 12


def test_written_out_special_tokens_stay_text():
    ids = TOKENIZER.encode("the</s>cat")
    assert TOKENIZER.eos_id not in ids
    assert TOKENIZER.decode(ids) == "the</s>cat"


@given(st.text("the cat éß日本🙂", max_size=30))
def test_incremental_decoder_gives_the_same_text(text):
    decoder = TOKENIZER.incremental_decoder()
    pieces = [decoder.feed(token) for token in TOKENIZER.encode(text).tolist()]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + decoder.finish() == text


def test_incremental_decoder_keeps_the_spaces_that_a_sentencepiece_decoder_strips():
    backend = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2}, unk_token="c"))
    backend.decoder = decoders.Metaspace()
    decoder = (tokenizer := PiecesTokenizer(backend.to_str())).incremental_decoder()
    ids = [0, 1, 0, 2, 1]
    assert "".join([decoder.feed(token) for token in ids]) + decoder.finish() == tokenizer.decode(ids) == "a b ac b"


def test_special_ids_and_missing_pieces():
    assert (TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id) == (0, 1, 1)
    with pytest.raises(TokenizerError, match=r"piece for eos.*<end>"):
        PiecesTokenizer(DEFINITION, eos="<end>")


def test_save_and_load_keep_the_file_and_the_hash(tmp_path):
    TOKENIZER.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text(encoding="utf-8") == DEFINITION
    assert loaded.content_hash() == TOKENIZER.content_hash()
    assert loaded.encode("the cat").tolist() == TOKENIZER.encode("the cat").tolist()
    assert (loaded.eos_id, loaded.bos_id) == (1, 0)


def test_hash_depends_on_the_definition_and_not_on_its_path(tmp_path):
    (tmp_path / "one.json").write_text(DEFINITION, encoding="utf-8")
    spec = {"type": "pieces", "file": str(tmp_path / "one.json"), "eos": "</s>", "bos": "<s>"}
    assert make_tokenizer(spec).content_hash() == TOKENIZER.content_hash()
    other = json.loads(DEFINITION)
    other["truncation"] = None
    assert PiecesTokenizer(json.dumps(other), eos="</s>", bos="<s>").content_hash() != TOKENIZER.content_hash()


def test_loading_does_not_leave_the_folder(tmp_path):
    (tmp_path / "secret.json").write_text(DEFINITION, encoding="utf-8")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text('{"type": "pieces", "file": "../secret.json"}')
    with pytest.raises(TokenizerError, match="leaves the folder"):
        load_tokenizer(folder)


@pytest.mark.parametrize("text", ["", "{}", "not json", '{"version": "1.0", "model": {"type": "Magic"}}'])
def test_broken_definitions(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        PiecesTokenizer.from_file(tmp_path / "tokenizer.json")


def test_bytes_that_are_not_utf8_are_refused_with_their_position():
    with pytest.raises(TokenizerError, match="position 2"):
        TOKENIZER.encode(b"ab\xff")


def test_a_panic_of_the_rust_package_is_an_ordinary_error(capfd):
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with pytest.raises(TokenizerError, match="cannot encode"):
        PiecesTokenizer(backend.to_str()).encode("a" * 60 + "b")
    capfd.readouterr()  # Rust writes its stack to stderr


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "tokenizers":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"pip install 'crocuta\[tokenizers\]'"):
        PiecesTokenizer(DEFINITION)
