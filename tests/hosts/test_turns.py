"""The order of downloads, by hand."""

from esjax.hosts.turns import WAITING, Turns


def test_tokens_take_turns_and_so_do_their_connections() -> None:
    turns: Turns[str] = Turns()
    for name in ("a1", "a2", "a3"):
        turns.add("a", b"greedy", name)
    turns.add("a", b"other", "a4")
    turns.add("b", b"host", "b1")
    turns.add("c", b"host", "c1")
    order = []
    while turns:
        order.append(turns.take())
        if order[-1] == "b1":
            turns.add("b", b"host", "b2")
    assert order == ["a1", "b1", "c1", "a4", "b2", "a2", "a3"]


def test_of_a_connection_only_the_newest_requests_wait() -> None:
    turns: Turns[int] = Turns()
    for number in range(100):
        turns.add("a", b"greedy", number)
    assert [turns.take() for _ in range(WAITING)] == [96, 97, 98, 99]
    assert not turns
