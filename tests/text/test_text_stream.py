"""Bytes of tokens, and text that comes out piece by piece, against the tokenizers library's own decoding."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from treadle_engine.bases import pip_folder
from treadle_gateway.text.text_stream import TextStream
from treadle_gateway.text.token_bytes import UnknownDecoder, decoder_ops
from treadle_gateway.text.tokenizer import BaseTokenizer, TokenizerFacts

PIP = BaseTokenizer(TokenizerFacts("pip", (pip_folder() / "tokenizer.json").read_bytes()))
PIP_ITSELF = Tokenizer.from_file(str(pip_folder() / "tokenizer.json"))


def sentencepiece() -> Tokenizer:
    """Returns a tokenizer in the manner of Llama 2 and Gemma: spaces as characters, unknown ones as byte tokens."""
    words = ["▁Hello", "▁world", "▁", "!", "▁the", "é"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {w: 256 + i for i, w in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token=None))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    return tokenizer


LLAMA_ITSELF = sentencepiece()
LLAMA = BaseTokenizer(TokenizerFacts("llama", LLAMA_ITSELF.to_str().encode()))


def streamed(tokenizer: BaseTokenizer, tokens: list[int], stops=()) -> tuple[str, list[int], list[str]]:
    """Returns text, tokens that were given back, and the pieces."""
    stream = TextStream[int](stops)
    pieces = [stream.push(token, tokenizer.token_bytes(token)) for token in tokens]
    pieces.append(stream.finish())
    return "".join(p.text for p in pieces), [t for p in pieces for t in p.tokens], [p.text for p in pieces]


@given(st.lists(st.integers(0, 1023), max_size=40))
def test_any_tokens_of_a_byte_level_vocabulary_decode_as_the_library_decodes_them(tokens):
    text, given_back, _ = streamed(PIP, tokens)
    assert text == PIP_ITSELF.decode(tokens, skip_special_tokens=False) == PIP.decode(tokens)
    assert given_back == tokens


@given(st.text(max_size=30))
def test_a_character_is_never_shown_in_part(text):
    """However many tokens it takes: no piece has a replacement character that the text has not."""
    for tokenizer, itself in ((PIP, PIP_ITSELF), (LLAMA, LLAMA_ITSELF)):
        tokens = itself.encode(text, add_special_tokens=False).ids
        wanted = text.replace("\0", "\0") if tokenizer is PIP else None
        whole, given_back, pieces = streamed(tokenizer, tokens)
        assert wanted in (None, whole)
        assert given_back == tokens
        assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_a_vocabulary_with_byte_tokens_decodes_as_the_library_does():
    """But for the one space that a whole text loses at its beginning, and a continuation does not."""
    tokens = [256, 257, *"👋".encode(), 259, 261, 258, *"ü".encode()]
    text, _, pieces = streamed(LLAMA, tokens)
    assert text == " " + LLAMA_ITSELF.decode(tokens) == " Hello world👋!é ü"
    assert pieces[2:6] == ["", "", "", "👋"]


def test_what_never_becomes_a_character_shows_at_once_and_at_the_end():
    stream = TextStream[int](())
    assert [stream.push(n, bytes([b])).text for n, b in enumerate([0xF0, 0x9F, 0x41, 0x80])] == [
        "",
        "",
        "\ufffdA",
        "\ufffd",
    ]
    assert stream.push(9, b"\xe2\x82").text == ""
    assert stream.finish().text == "\ufffd"


@given(
    st.text("abc", min_size=0, max_size=25), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3)
)
def test_a_stop_string_is_found_wherever_token_borders_lie(text, stops):
    """At the token that completes one the text ends before the first, and nothing of it is shown too early."""
    for size in (1, 2, 5):
        parts = [text[at : at + size] for at in range(0, len(text), size)]
        wanted, so_far = text, ""
        for part in parts:
            so_far += part
            if places := [place for stop in stops if (place := so_far.find(stop)) >= 0]:
                wanted = so_far[: min(places)]
                break
        stream = TextStream[int](stops)
        shown = ""
        for number, part in enumerate(parts):
            shown += stream.push(number, part.encode()).text
            assert wanted.startswith(shown)
            assert stream.stopped == any(stop in "".join(parts[: number + 1]) for stop in stops)
        assert shown + stream.finish().text == wanted


def test_tokens_come_with_the_text_that_they_complete():
    stream = TextStream[str](["END"])
    assert stream.push("a", b"one").tokens == ["a"]
    assert stream.push("b", b"two E").tokens == []  # its end may be the beginning of a stop
    last = stream.push("c", b"ND more")
    assert (last.text, last.tokens, stream.stopped) == ("", ["b"], True)
    assert stream.push("d", b"more").tokens == ()


def test_a_decoder_without_bytes_is_refused_by_name():
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(UnknownDecoder, match="no decoder"):
        BaseTokenizer(TokenizerFacts("w", tokenizer.to_str().encode()))
    with pytest.raises(UnknownDecoder, match="WordPiece"):
        decoder_ops({"type": "WordPiece", "prefix": "##", "cleanup": True})


def test_the_byte_alphabet_is_that_of_the_library():
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), vocab_size=256)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator([], trainer)
    made = BaseTokenizer(TokenizerFacts("b", json.dumps(json.loads(tokenizer.to_str())).encode()))
    found = {made.token_bytes(token) for token in range(256)}
    assert found == {bytes([byte]) for byte in range(256)}
