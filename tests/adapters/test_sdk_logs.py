"""A followed log: whatever breaks, every octet comes once and in order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.adapters.sdk_peer import TOKEN, LogScript, Peer, running_peer
from tidemill.errors import NotFound
from tidemill.sdk import Client, JobUpdate, LogChunk
from tidemill.sdk.streams import EventParser, offsets_of


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with running_peer() as running:
        yield running


def read_all(peer: Peer, script: LogScript) -> tuple[dict[int, str], list[str]]:
    """What each rank wrote, and the states that were told of."""
    peer.log = script
    texts = dict.fromkeys(script.texts, "")
    states = []
    with Client(peer.url, TOKEN) as client:
        for part in client.logs("hello"):
            if isinstance(part, LogChunk):
                assert part.offset == len(texts[part.rank].encode())
                texts[part.rank] += part.text
            elif isinstance(part, JobUpdate):
                states.append(part.job.state)
    return texts, states


texts = st.dictionaries(st.integers(0, 2), st.text(max_size=60), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=texts, piece=st.integers(1, 20), cuts=st.lists(st.integers(0, 900), max_size=3), ignores=st.booleans())
def test_no_gap_and_no_repeat_wherever_the_connection_breaks(peer, texts, piece, cuts, ignores):
    read, states = read_all(peer, LogScript(texts, piece=piece, cuts=cuts, ignores_last_id=ignores))
    assert read == texts
    assert states[0] == "running"
    assert states[-1] == "succeeded"
    assert len(states) == 2, "a new connection begins with the state; that is not news"


def test_a_peer_that_repeats_itself_is_noticed(peer):
    """The property above has teeth: without a memory of offsets, a repeating peer would show."""
    script = LogScript({0: "one\ntwo\n"}, piece=4, ignores_last_id=True)
    whole = script.octets("")
    cut = whole.index(b": ping")
    events = [event for event in EventParser().feed(whole[:cut] + whole) if event.type == "log"]
    assert len(events) > 2


def test_going_on_after_an_exception_from_outside_loses_nothing(peer):
    peer.log = LogScript({0: "0123456789" * 20}, piece=3)
    read = ""
    with Client(peer.url, TOKEN) as client:
        chunks = client.logs("hello")
        for _ in range(10):
            part = next(chunks)
            read += part.text if isinstance(part, LogChunk) else ""
        chunks._feed.close()
        for part in chunks:
            read += part.text if isinstance(part, LogChunk) else ""
    assert read == "0123456789" * 20


def test_a_job_that_is_not_there_is_an_error_at_once(peer):
    peer.routes["GET", "/v1/jobs/gone/logs"] = lambda *_, **__: (404, {"code": "not_found", "detail": "gone"})
    with Client(peer.url, TOKEN) as client, pytest.raises(NotFound):
        list(client.logs("gone"))


@given(data=st.data())
def test_events_are_the_same_however_they_are_cut(data):
    whole = LogScript({0: "añ\r\n\r\n:x"}, piece=2).octets("").replace(b"\n", b"\r\n")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    parser, events = EventParser(), []
    for start, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        events += parser.feed(whole[start:stop])
    assert events == list(EventParser().feed(whole))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2:0=123,1=456", {(2, 0): 123, (2, 1): 456}),
        ("1:0=1,2:0=5", {(1, 0): 1, (2, 0): 5}),
        ("", {}),
        ("nonsense", {}),
    ],
)
def test_ids_name_offsets(text, found):
    assert offsets_of(text) == found
