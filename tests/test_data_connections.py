"""Connections to servers that close them, break off, and stand behind proxies."""

import contextlib
import socket
import threading

import pytest

from data.connections import Broken, Connections

WAITS = {"connect_s": 5, "silence_s": 0.5}
HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Name: a\r\nx-name: b\r\n\r\nhello"


@contextlib.contextmanager
def listening(serve):
    """A server on loopback that gives each connection to `serve` in a thread; yields host:port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        def accept():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def read_head(sock):
    """A request, up to its empty line; b"" where the client has gone."""
    head = b""
    while not head.endswith(b"\r\n\r\n") and (block := sock.recv(4096)):
        head += block
    return head


def answering(answer, heads, times=100):
    """Give the same answer to every request, and hang up after so many."""
    def serve(sock):
        with sock:
            for _ in range(times):
                if not (head := read_head(sock)):
                    return
                heads.append((sock.getpeername(), head.decode()))
                sock.sendall(answer)

    return serve


def get(connections, url, **headers):
    with connections.get(url, headers, **WAITS) as answer:
        return answer, b"".join(answer.blocks())


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def connections():
    found = Connections()
    yield found
    found.close()


def test_a_connection_is_kept_and_headers_are_found_by_lower_case(connections):
    heads = []
    with listening(answering(HELLO, heads)) as there:
        for _ in range(3):
            answer, body = get(connections, f"http://{there}/a?b=c", Range="bytes=1-")
            assert (answer.status_code, body, answer.headers["x-name"]) == (200, b"hello", "a")
    assert len({peer for peer, _ in heads}) == 1
    assert heads[0][1].startswith(f"GET /a?b=c HTTP/1.1\r\nHost: {there}\r\n")
    assert "Accept-Encoding: identity" in heads[0][1] and "Range: bytes=1-" in heads[0][1]


def test_a_connection_that_the_server_closed_while_idle_is_replaced(connections):
    heads = []
    with listening(answering(HELLO, heads, times=1)) as there:
        for _ in range(3):
            assert get(connections, f"http://{there}/")[1] == b"hello"
    assert len({peer for peer, _ in heads}) == 3


def test_a_body_that_was_not_read_does_not_precede_the_next_one(connections):
    heads = []
    with listening(answering(HELLO, heads)) as there:
        with connections.get(f"http://{there}/", {}, **WAITS):
            pass
        with pytest.raises(KeyError), connections.get(f"http://{there}/", {}, **WAITS):
            raise KeyError
        assert get(connections, f"http://{there}/")[1] == b"hello"
    assert len({peer for peer, _ in heads}) == 3


@pytest.mark.parametrize("answer, body", [
    (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello", b"hello"),  # the length tells
    (b"HTTP/1.1 200 OK\r\n\r\nhello", b"hello")])
def test_a_body_that_ends_early_is_given_as_far_as_it_came(connections, answer, body):
    with listening(answering(answer, [], times=1)) as there:
        assert [get(connections, f"http://{there}/")[1] for _ in range(2)] == [body, body]


@pytest.mark.parametrize("answer, nobody", [
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhello", False),
    (b"hello", False), (b"", False)])
def test_an_answer_that_is_none_is_a_broken_connection(connections, answer, nobody):
    with listening(answering(answer, [], times=1)) as there, pytest.raises(Broken) as caught:
        get(connections, f"http://{there}/")
    assert caught.value.nobody == nobody


def test_silence_and_a_closed_port_are_nobody(connections):
    with listening(answering(b"", [])) as there, pytest.raises(Broken) as silent:
        get(connections, f"http://{there}/")
    assert silent.value.nobody and str(silent.value) == "no answer in time"
    with pytest.raises(Broken) as closed:
        get(connections, "http://127.0.0.1:9/")
    assert closed.value.nobody and "refused" in str(closed.value)


def test_addresses_may_have_spaces_letters_of_any_alphabet_and_a_user(connections):
    heads = []
    with listening(answering(HELLO, heads)) as there:
        get(connections, f"http://me:a%20b@{there}/ä b%20c?d=e f")
    assert heads[0][1].startswith("GET /%C3%A4%20b%20c?d=e%20f HTTP/1.1\r\n")
    assert f"Host: {there}\r\n" in heads[0][1]
    assert "Authorization: Basic bWU6YSBi" in heads[0][1]


def test_a_proxy_of_the_environment_is_asked_unless_the_host_is_excepted(connections, monkeypatch):
    heads = []
    with listening(answering(HELLO, heads)) as proxy:
        monkeypatch.setenv("http_proxy", f"http://me:pw@{proxy}")
        assert get(connections, "http://a.invalid/b?c")[1] == b"hello"
        assert heads[0][1].startswith("GET http://a.invalid/b?c HTTP/1.1\r\nHost: a.invalid\r\n")
        assert "Proxy-Authorization: Basic bWU6cHc=" in heads[0][1]
        monkeypatch.setenv("no_proxy", "b.invalid")
        with pytest.raises(Broken):
            get(connections, "http://b.invalid/")
        assert len(heads) == 1


def test_a_secure_server_is_reached_through_a_proxys_tunnel(connections, monkeypatch):
    heads = []
    with listening(answering(b"HTTP/1.1 403 No\r\n\r\n", heads, times=1)) as proxy:
        monkeypatch.setenv("all_proxy", proxy)
        with pytest.raises(Broken, match="403") as caught:
            get(connections, "https://a.invalid/secret")
    assert caught.value.nobody and heads[0][1].startswith("CONNECT a.invalid:443 HTTP/1.")
    assert "secret" not in heads[0][1]


def test_a_proxy_of_another_kind_is_said_not_to_be_known(connections, monkeypatch):
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
    with pytest.raises(ValueError, match="socks5"):
        get(connections, "http://a.invalid/")
