"""Connections to web servers, kept for the next request: GET, and nothing else.

By the standard library's http.client, as hundreds of small files wait for Python: httpx takes
0.42 ms of it for a request, this 0.15. Certificates and proxies are found as httpx finds them.
"""

from __future__ import annotations

import base64
import contextlib
import re
import socket
import ssl
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from http.client import (HTTPConnection, HTTPException, HTTPMessage, HTTPResponse,
                         HTTPSConnection)
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

BLOCK = 1 << 18  # bytes asked of the system at a time
_BUFFER = 1 << 16  # holds the head of an answer and what comes with it: a small file's all
_IDLE_S = 5  # seconds; what was idle for longer has often been closed at the other end
_AGENT = "t1w-t2w-cyclegan"
_PLAIN = re.compile("[!-~]*")  # what may stand in a request as it is
_SAFE = "".join(map(chr, range(33, 127)))


class Broken(Exception):
    """The network failed; `nobody`: there was no connection, or no answer in time."""

    def __init__(self, error: Exception, connecting: bool = False):
        silent = isinstance(error, TimeoutError)
        super().__init__("no answer in time" if silent else str(error) or type(error).__name__)
        self.nobody = connecting or silent


@dataclass(frozen=True)
class Answer:
    """What a server answers; names of headers are in lower case."""

    url: str
    status_code: int
    headers: dict[str, str]
    body: HTTPResponse

    def blocks(self) -> Iterator[bytes]:
        """The body as it comes, of which nothing is decoded; its end may come too early."""
        try:
            while block := self.body.read1(BLOCK):
                yield block
        except (OSError, HTTPException) as error:
            raise Broken(error) from error


class _Roomy:
    """A socket whose file has a larger buffer than http.client gives it."""

    def __init__(self, sock: socket.socket):
        self._sock = sock

    def makefile(self, mode: str) -> Any:
        """What http.client reads an answer from."""
        return self._sock.makefile("rb", _BUFFER)


class _Response(HTTPResponse):
    def __init__(self, sock: Any, *args: Any, **kwargs: Any):
        super().__init__(_Roomy(sock), *args, **kwargs)  # type: ignore[arg-type]


class Connections:
    """As many connections as there are requests at a time. Any thread may ask."""

    def __init__(self) -> None:
        self._idle: defaultdict[tuple[str, str], list[tuple[HTTPConnection, float]]] = (
            defaultdict(list))
        self._proxies: dict[tuple[str, str], SplitResult | None] = {}

    def close(self) -> None:
        """Close those that are idle."""
        for kept in list(self._idle.values()):
            with contextlib.suppress(IndexError):
                while True:
                    kept.pop()[0].close()

    @contextlib.contextmanager
    def get(self, url: str, headers: dict[str, str], *, connect_s: float,
            silence_s: float) -> Iterator[Answer]:
        """Open an address; redirects are not followed.

        Parameters
        ----------
        connect_s, silence_s : seconds to wait for a connection, and for a byte

        Raises
        ------
        Broken : here, or from the answer's `blocks`
        ValueError : no address that can be opened, or by no proxy that is known here
        """
        parts = urlsplit(url)
        connection, found = self._ask(parts, headers, connect_s, silence_s)
        try:
            yield Answer(url, found.status, _by_name(found.headers), found)
        except BaseException:
            found.close()
            connection.close()
            raise
        ended = found.length == 0 or found.chunked and found.isclosed()
        found.close()
        if ended and not found.will_close:
            self._idle[parts.scheme, parts.netloc].append((connection, time.monotonic()))
        else:
            connection.close()

    def _ask(self, parts: SplitResult, headers: dict[str, str], connect_s: float,
             silence_s: float) -> tuple[HTTPConnection, HTTPResponse]:
        """Ask over a connection that was kept, else over a new one."""
        place = parts.scheme, parts.netloc
        if place not in self._proxies:
            self._proxies[place] = _proxy(parts)
        proxy, target = self._proxies[place], _target(parts)
        headers = {"User-Agent": _AGENT, **_sign("Authorization", parts), **headers}
        if proxy and parts.scheme == "http":
            target = f"http://{parts.netloc.rpartition('@')[2]}{target}"
            headers |= _sign("Proxy-Authorization", proxy)
        while True:
            kept = self._take_idle(place)
            connection = kept or self._open(parts, proxy, connect_s, silence_s)
            try:
                connection.request("GET", target, headers=headers)
                return connection, connection.getresponse()
            except (OSError, HTTPException, ValueError) as error:
                connection.close()
                if not kept or isinstance(error, TimeoutError):
                    raise Broken(error) from error
                # The other end had closed it meanwhile: another one.
            except BaseException:
                connection.close()
                raise

    def _take_idle(self, place: tuple[str, str]) -> HTTPConnection | None:
        kept = self._idle[place]
        with contextlib.suppress(IndexError):
            while True:
                connection, since = kept.pop()
                if time.monotonic() - since < _IDLE_S:
                    return connection
                connection.close()
        return None

    def _open(self, parts: SplitResult, proxy: SplitResult | None, connect_s: float,
              silence_s: float) -> HTTPConnection:
        """Connect; through a proxy to a secure server, or to a proxy."""
        secure = parts.scheme == "https"
        try:
            host, port = (proxy or parts).hostname or "", (proxy or parts).port
            port = port or (443 if secure and not proxy else 80)
        except ValueError as error:  # a port that is none
            raise Broken(error) from error
        connection = (HTTPSConnection(host, port, timeout=connect_s, context=self._tls) if secure
                      else HTTPConnection(host, port, timeout=connect_s))
        connection.response_class = _Response
        if proxy and secure:
            connection.set_tunnel(parts.hostname or "", parts.port or 443,
                                  _sign("Proxy-Authorization", proxy))
        try:
            connection.connect()
            connection.sock.settimeout(silence_s)
        except (OSError, HTTPException, ValueError) as error:
            connection.close()
            raise Broken(error, connecting=True) from error
        return connection

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        """Whom to trust; loading the certificates takes a while."""
        context = httpx.create_ssl_context()
        context.set_alpn_protocols(["http/1.1"])
        return context


def _by_name(headers: HTTPMessage) -> dict[str, str]:
    """The headers; of several of a name the first, as http.client takes them."""
    pairs = reversed([*headers.raw_items()])
    return {name.lower(): value for name, value in pairs}


def _target(parts: SplitResult) -> str:
    """What is asked for of a server."""
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return target if _PLAIN.fullmatch(target) else quote(target, safe=_SAFE)


def _proxy(parts: SplitResult) -> SplitResult | None:
    """The proxy that the environment, or the system, has for an address."""
    known = getproxies()
    found = known.get(parts.scheme) or known.get("all")
    if not found or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    proxy = urlsplit(found if "://" in found else f"http://{found}")
    if proxy.scheme != "http":
        raise ValueError(f"a proxy at {proxy.scheme}:// is not known here, only http://")
    return proxy


def _sign(header: str, parts: SplitResult) -> dict[str, str]:
    """The header for the user and password of an address, none where it has no user."""
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {header: f"Basic {base64.b64encode(pair.encode()).decode()}"}
