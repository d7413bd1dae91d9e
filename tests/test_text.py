"""The text of a reply in progress."""

import itertools
import random

import pytest

from langchain_stars.text import Text


def bytes_of(token_ids: object) -> str:
    """Decode tokens that are bytes."""
    return bytes(token_ids).decode(errors="replace")  # type: ignore[call-overload, no-any-return]


def in_pieces(data: bytes, cuts: list[int], **settings: object) -> list[Text]:
    texts = [Text()]
    for begin, end in itertools.pairwise([0, *cuts, len(data)]):
        if texts[-1].finished:
            break
        texts.append(
            texts[-1].extended(
                list(data[begin:end]),
                decode=bytes_of,
                final=end == len(data),
                **settings,  # type: ignore[arg-type]
            )
        )
    return texts


def test_a_character_is_shown_when_it_is_complete() -> None:
    texts = in_pieces("né€🙂!".encode(), list(range(1, 10)))
    assert [text.text for text in texts[1:]] == (
        ["n", "n", "né", "né", "né", "né€", "né€", "né€", "né€", "né€🙂!"]
    )


def test_an_incomplete_character_is_written_at_the_end_and_only_there() -> None:
    start = Text().extended(list("a€".encode())[:-1], decode=bytes_of)
    assert (start.text, start.exact) == ("a", False)
    final = start.extended([], decode=bytes_of, final=True)
    assert (final.text, final.exact) == ("a\ufffd", True)


def test_bytes_that_can_never_be_a_character_are_written_once_more_than_three_wait() -> None:
    text = Text().extended([0xFF] * 5, decode=bytes_of)
    assert text.text == "\ufffd\ufffd"
    assert text.extended([65], decode=bytes_of).text == "\ufffd" * 5 + "A"


def test_text_only_grows_and_pieces_add_up_whatever_the_cuts() -> None:
    random.seed(0)
    alphabet = ["a", "é", "€", "🙂", "\n"]
    for _ in range(300):
        data = "".join(random.choices(alphabet, k=12)).encode()
        data += random.choice([b"", b"\xe2\x82", b"\xff", b"\xf0\x9f"])
        cuts = sorted(random.sample(range(1, len(data)), k=4))
        texts = in_pieces(data, cuts)
        for before, after in itertools.pairwise(texts):
            assert after.text.startswith(before.text)
            assert after.token_ids[: len(before.token_ids)] == before.token_ids
        assert texts[-1].text == data.decode(errors="replace")


def test_a_stop_string_cuts_the_reply_wherever_the_segments_end() -> None:
    data = b"one two END three"
    for cuts in itertools.combinations(range(1, len(data)), 2):
        texts = in_pieces(data, list(cuts), stop=("END",))
        assert texts[-1].text == "one two "
        assert texts[-1].finished
        assert texts[-1].stopped
        assert not texts[-1].exact
        assert bytes(texts[-1].token_ids) == b"one two END"


def test_the_beginning_of_a_stop_string_is_not_shown_before_it_is_known_to_be_none() -> None:
    stop = ("END", "\n\n")
    text = Text().extended(list(b"a EN"), decode=bytes_of, stop=stop)
    assert (text.text, text.showable(stop)) == ("a EN", "a ")
    text = text.extended(list(b"T\n"), decode=bytes_of, stop=stop)
    assert (text.text, text.showable(stop)) == ("a ENT\n", "a ENT")
    ended = text.extended([], decode=bytes_of, stop=stop, finished=True)
    assert ended.showable(stop) == "a ENT\n"


def test_what_is_shown_never_needs_to_be_taken_back() -> None:
    random.seed(1)
    stop = ("aba", "bb")
    for _ in range(400):
        data = bytes(random.choices(b"abc", k=14))
        cuts = sorted(random.sample(range(1, 14), k=5))
        shown = ""
        texts = in_pieces(data, cuts, stop=stop)
        for text in texts:
            assert text.showable(stop).startswith(shown)
            shown = text.showable(stop)
        by_token = in_pieces(data, list(range(1, 14)), stop=stop)
        assert by_token[-1].text == texts[-1].text
        assert not any(string in texts[-1].text for string in stop)


@pytest.mark.parametrize("finished", [True, False])
def test_a_candidate_extends_a_text_without_touching_it(finished: bool) -> None:
    text = Text().extended(list(b"ab"), decode=bytes_of)
    copy = Text().extended(list(b"ab"), decode=bytes_of)
    text.extended(list(b"cd"), decode=bytes_of, finished=finished)
    assert text == copy


def test_a_decoder_that_gives_up_whole_runs_of_bytes_does_not_shrink_the_text() -> None:
    """As those of tokenizers with byte fallback (Llama 2, Gemma), for each run that is invalid."""

    def decode(token_ids: object) -> str:
        data = bytes(token_ids)  # type: ignore[call-overload]
        try:
            return data.decode()  # type: ignore[no-any-return]
        except UnicodeDecodeError:
            return "\ufffd" * len(data)

    random.seed(2)
    for _ in range(300):
        whole = "".join(random.choices(["😀", "é", "€", "a"], k=6))
        data = whole.encode()
        cuts = sorted(random.sample(range(1, len(data)), k=min(5, len(data) - 1)))
        text, shown = Text(), ""
        for begin, end in itertools.pairwise([0, *cuts, len(data)]):
            text = text.extended(list(data[begin:end]), decode=decode, final=end == len(data))
            assert text.showable().startswith(shown)
            shown = text.showable()
        assert shown == whole
