"""The order of downloads, by hand."""

from esjax.hosts.turns import Turns


def test_tokens_take_turns_and_so_do_their_connections() -> None:
    turns: Turns[str] = Turns()
    for name in ("a1", "a2", "a3"):
        turns.add("a", name.encode(), name)
    turns.add("b", b"host", "b1")
    turns.add("c", b"host", "c1")
    order = []
    while turns:
        order.append(turns.take())
        if order[-1] == "a1":
            turns.add("a", b"a1", "a4")
        if order[-1] == "b1":
            turns.add("b", b"host", "b2")
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


def test_of_a_connection_the_newest_request_is_answered_at_the_turn_of_the_first() -> None:
    turns: Turns[str] = Turns()
    turns.add("a", b"host", "asked")
    turns.add("a", b"other", "other")
    turns.add("a", b"host", "asked again")
    assert [turns.take(), turns.take()] == ["asked again", "other"]
    assert not turns
