"""The alignment of two tokenizations: the same bytes at the same place, or not at all."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from revocabulary import byte_level, permuted, sentence_pieces, unigram

from kdjax import models
from kdjax.data.alignment import align, share, teacher_rows
from kdjax.data.tokenizer import load_tokenizer
from kdjax.errors import ConfigError

ENGLISH = ["the theory of the thing there then", "it is what it is and that is that"] * 4
OTHERS = ["😀"] * 40 + [
    "日本語の文字と中文字符",
    "naïve café été",
    "😀😃😄😀😃 e\u0301e\u0301",
    "isthatit thatis",
] * 4
KINDS = {
    "english": lambda out: byte_level(out, ENGLISH, 300),
    "others": lambda out: byte_level(out, OTHERS, 400),
    "pieces": lambda out: sentence_pieces(out, ENGLISH + OTHERS[39:41], 330),
    "unigram": lambda out: unigram(out, ENGLISH + OTHERS, 60),
}
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from([*ENGLISH[:2], *OTHERS[39:], "👩\u200d🚀", "\u0e01\u0e33", "a\u0308", "▁"]),
    ),
    max_size=5,
).map("".join)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: load_tokenizer(make(folder / name)) for name, make in KINDS.items()}


def cuts(tokenizer, ids) -> list[tuple[bytes, bytes]]:
    """Of each token (all bytes before it, its own), by joining from the start each time."""
    spelled = [tokenizer.spelling().bytes_of[i] for i in ids]
    return [(b"".join(spelled[:n]), piece) for n, piece in enumerate(spelled)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_tokens_are_the_text(made, kind):
    """Joined, the bytes of a text's tokens are that text's, whatever it is; a literal letter that
    stands for a space alone is read as one, as the tokenizer itself does."""
    spelling = made[kind].spelling()

    @settings(deadline=None, max_examples=80, database=None, derandomize=True)
    @given(text=TEXTS)
    def check(text):
        pieces = [spelling.bytes_of[i] for i in spelling.encode(text)]
        if None in pieces:  # letters that a vocabulary without bytes has not
            assert kind == "unigram"
            return
        expected = text if kind in ("english", "others") else text.replace("▁", " ")
        assert b"".join(pieces) == expected.encode()

    check()


@pytest.mark.parametrize(("one", "other"), [("english", "others"), ("english", "pieces")])
def test_pairs_are_the_same_bytes_and_no_pair_is_missed(made, one, other):
    """The pairs are those of all that begin and end at the same bytes, found by brute force; seen
    from the other side they are the same."""
    first, second = made[one], made[other]
    there, back = share(first, second), share(second, first)

    @settings(deadline=None, max_examples=120, database=None, derandomize=True)
    @given(text=TEXTS.filter(lambda text: "▁" not in text))
    def check(text):
        ids = first.spelling().encode(text)
        theirs, places = align(first, second, there, ids)
        assert theirs == second.spelling().encode(text)
        own, others = cuts(first, ids), cuts(second, theirs)
        expected = [others.index(cut) if cut in others else -1 for cut in own]
        assert places.tolist() == expected
        again, from_there = align(second, first, back, theirs)
        assert again == ids
        pairs = {(t, u) for t, u in enumerate(places.tolist()) if u >= 0}
        assert pairs == {(t, u) for u, t in enumerate(from_there.tolist()) if t >= 0}

    check()


def test_any_ids_of_a_student_are_aligned_by_their_bytes(made):
    """Ids that no text is cut into, with characters in pieces and bytes that are no UTF-8: what is
    aligned has the same bytes before it on both sides, and is the same bytes."""
    first, second = made["english"], made["others"]
    shared = share(first, second)
    letters = [i for i, b in enumerate(first.spelling().bytes_of) if b]

    @settings(deadline=None, max_examples=150, database=None, derandomize=True)
    @given(ids=st.lists(st.sampled_from(letters), max_size=12), text=TEXTS)
    def check(ids, text):
        ids = [*first.spelling().encode(text), *ids]
        theirs, places = align(first, second, shared, ids)
        own, others = cuts(first, ids), cuts(second, theirs)
        for t, u in enumerate(places):
            assert u < 0 or own[t] == others[u]
        assert b"".join(p for _, p in own).startswith(b"".join(p for _, p in others))

    check()


def test_characters_that_are_split_are_aligned_at_their_ends_alone(made):
    """One tokenizer has the emoji in one token, the other in bytes: neither is aligned with a part
    of it, and what follows is aligned again. Both in bytes: each byte is."""
    whole, parts = made["others"], made["english"]
    text = "a😀b"
    assert [len(t.spelling().encode(text)) for t in (parts, whole)] == [6, 3]
    ids = parts.spelling().encode(text)
    assert align(parts, whole, share(parts, whole), ids)[1].tolist() == [0, -1, -1, -1, -1, 2]
    cut = parts.spelling().encode("a\u05d0b")
    assert align(parts, whole, share(parts, whole), cut)[1].tolist() == [0, 1, 2, 3]


def test_a_response_cut_within_a_character(made):
    """Of a truncated response the last bytes are no character, and not aligned; the rest is."""
    first, second = made["english"], made["pieces"]
    ids = first.spelling().encode("a😀")[:-2]
    theirs, places = align(first, second, share(first, second), ids)
    assert second.decode(theirs) == "a"
    assert places.tolist() == [0, -1, -1]


def test_bytes_that_are_no_text(made):
    """Bytes that no character begins with are tokens of one byte on both sides, and what follows
    is aligned; a vocabulary without bytes can't read on."""
    first, letters = made["english"], made["unigram"]
    wrong = [first.spelling().of_byte[byte] for byte in (0xFF, 0xC3, 0x28)]
    ids = [*first.spelling().encode("a"), *wrong, *first.spelling().encode("b")]
    for name in ("others", "pieces"):
        theirs, places = align(first, made[name], share(first, made[name]), ids)
        spelled = [made[name].spelling().bytes_of[i] for i in theirs]
        assert spelled == [b"a", b"\xff", b"\xc3", b"(", b"b"]
        assert places.tolist() == [0, 1, 2, 3, 4]
    assert align(first, letters, share(first, letters), ids)[1].tolist() == [0, -1, -1, -1, -1]


def test_text_that_the_teacher_changes(made, tmp_path):
    """A teacher that reads everything in small letters has read another text from the first capital
    on, though its tokens stand at the same places: nothing more is aligned, the stop neither."""
    first = made["english"]
    out = shutil.copytree(made["others"].folder, tmp_path / "small")
    fields = json.loads((out / "tokenizer.json").read_text())
    fields["normalizer"] = {"type": "Lowercase"}
    (out / "tokenizer.json").write_text(json.dumps(fields))
    second = load_tokenizer(out)
    ids = [*first.spelling().encode("a+B+c"), first.stop_ids[0]]
    theirs, places = align(first, second, share(first, second), ids)
    assert second.decode(theirs) == "a+b+c"
    assert places.tolist() == [0, 1, -1, -1, -1, -1]


def test_an_unknown_letter_is_no_text(made, tmp_path):
    """The unknown token has no bytes, also where it is an ordinary piece: a letter that the teacher
    does not know ends what is aligned."""
    first = made["english"]
    out = shutil.copytree(made["unigram"].folder, tmp_path / "letters")
    fields = json.loads((out / "tokenizer.json").read_text())
    fields["added_tokens"] = [t for t in fields["added_tokens"] if t["content"] != "<unk>"]
    (out / "tokenizer.json").write_text(json.dumps(fields))
    second = load_tokenizer(out)
    unknown = fields["model"]["unk_id"]
    assert second.spelling().encode("a\u2603b")[1] == unknown
    assert second.spelling().bytes_of[unknown] is None
    ids = first.spelling().encode("a\u2603b")
    assert align(first, second, share(first, second), ids)[1].tolist() == [0, -1, -1, -1, -1]


def test_bytes_that_two_tokens_spell(made):
    """SentencePiece has the letter t and the byte of t: text is cut into the letter, which is the
    shared one; the byte, where a student draws it, is another token."""
    first, second = made["pieces"], made["english"]
    spelling, shared = first.spelling(), share(first, second)
    letter, byte = spelling.names.index("t"), spelling.names.index("<0x74>")
    assert spelling.bytes_of[letter] == spelling.bytes_of[byte] == b"t"
    assert align(first, second, shared, [letter, letter])[1].tolist() == [0, 1]
    assert align(first, second, shared, [letter, byte])[1].tolist() == [0, -1]


def test_stops_are_one_event_at_the_end(made):
    """A finished response's stop is aligned with what follows the teacher's last token; text after
    which the student stops early is not finished."""
    first, second = made["english"], made["others"]
    shared = share(first, second)
    ids = [*first.spelling().encode("the 日"), first.stop_ids[0]]
    theirs, places = align(first, second, shared, ids)
    assert places[-1] == len(theirs) == len(second.spelling().encode("the 日"))
    assert align(first, second, shared, ids[-1:])[1].tolist() == [0]


def test_control_tokens_end_what_is_aligned(made):
    """A control token within a response is no text for the other tokenizer, which reads what stands
    before it; the text of one is text."""
    first, second = made["english"], made["others"]
    shared = share(first, second)
    control = first.encode("<|pad|>")
    assert len(control) == 1
    ids = [*first.spelling().encode("it"), *control, *first.spelling().encode("it")]
    theirs, places = align(first, second, shared, ids)
    assert second.decode(theirs) == "it"
    assert set(places[-2:].tolist()) == {-1}
    assert len(first.spelling().encode("<|pad|>")) > 1


def test_no_space_is_put_before_a_response(made):
    """SentencePiece puts a space before a text; within an answer there is none, and one that is
    there stays."""
    spelling = made["pieces"].spelling()
    for text in ("that", " that", "  that"):
        assert b"".join(spelling.bytes_of[i] for i in spelling.encode(text)).decode() == text


def test_another_order_of_one_vocabulary(tokenizer_folder, tmp_path):
    """All tokens are shared, with the ids that the new order gives, and every id of any response
    is aligned, also where no text is cut so."""
    new = permuted(models.find("kdjax:teacher"), tmp_path / "other")
    first, second = load_tokenizer(tokenizer_folder), load_tokenizer(tmp_path / "other")
    shared = share(first, second)
    assert shared.teacher_of_v.tolist() == new.tolist()
    assert shared.renumbered
    assert shared.stops == ((), ())
    ids = np.random.default_rng(0).integers(0, first.size - 5, 20).tolist()
    theirs, places = align(first, second, shared, [*ids, first.stop_ids[0]])
    assert theirs == [new[i] for i in ids]
    assert places.tolist() == [*range(21)]


def test_vocabularies_by_hand(made):
    """Shared are exactly the tokens of equal bytes; control tokens by name; stops, which have other
    names, by their role."""
    first, second = made["english"], made["pieces"]
    shared = share(first, second)
    theirs = dict(enumerate(second.spelling().bytes_of))
    for own, (data, other) in enumerate(
        zip(first.spelling().bytes_of, shared.teacher_of_v, strict=True)
    ):
        if data is not None:
            assert (theirs[other] == data) if other >= 0 else data not in theirs.values()
        elif other >= 0:
            assert first.token(own) == second.token(int(other)) == "<|pad|>"
    assert shared.stops == (first.stop_ids, second.stop_ids)
    assert (shared.teacher_of_v[list(first.stop_ids)] == -1).all()
    assert len({*shared.teacher_of_v.tolist()} - {-1}) == (shared.teacher_of_v >= 0).sum()


def test_rows_of_a_teacher(made):
    """Prompt, response, padding; a slot is the place before its token; a row that is too long is
    cut, and what no longer has a slot is not aligned."""
    first, second = made["english"], made["others"]
    shared = share(first, second)
    response = [*first.spelling().encode("it is"), first.stop_ids[0]]
    theirs, places = align(first, second, shared, response)
    for width in (12, 4):
        rows = teacher_rows(
            first, second, shared, [[7, 8, 9], [5]], [response, []], width=width, length=9
        )
        assert rows.tokens_bs[0].tolist() == [*[7, 8, 9, *theirs], *[0] * 12][:width]
        expected = [2 + u if u >= 0 and 2 + u < width else -1 for u in places] + [-1] * 9
        assert rows.slot_bt[0].tolist() == expected[:9]
        assert rows.slot_bt[1].tolist() == [-1] * 9


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece", "BPE with </w>"])
def test_tokens_that_are_no_bytes_are_refused_by_name(made, tmp_path, kind):
    """One line names the folder and the kind of tokenizer."""
    out = shutil.copytree(made["english"].folder, tmp_path / "other")
    fields = json.loads((out / "tokenizer.json").read_text())
    model = fields["model"]
    if kind == "BPE with </w>":
        model["end_of_word_suffix"] = "</w>"
    else:
        fields["model"] = {"type": kind, "vocab": model["vocab"], "unk_token": "a"}
        fields["decoder"] = None
        if kind == "WordPiece":
            fields["model"] |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 9}
            fields["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": False}
    (out / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=rf"other.*{kind.split()[0]}.*can't be aligned; take"):
        share(made["others"], load_tokenizer(out))
