"""An HTTP server that is asked again and again, and does not always answer.

What goes wrong is of three kinds:

    away    connection refused, no such host, 429, 502, 503: a server that starts, restarts or is busy. It is waited
            for, `patience` seconds at most; Retry-After is obeyed. A person is told once each time.
    faulty  time-outs, 500, 504, a connection that breaks, an answer that is cut or is not what was asked for. The
            request is sent again, `retries` times at most.
    refused any other status: one line with the server's message.

Waits double from `pause` to 30 s, times a factor from 0.5 to 1 that depends on the request and the attempt alone. Only
the standard library is used: no redirect is followed, no proxy is asked, certificates are checked.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from email.utils import parsedate_to_datetime
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from llama2cli import console
from llama2cli.errors import DataError, Misuse

KEY_NAME = "LLAMA2_API_KEY"  # the environment variable that holds the key; a flag would be read by everybody's ps
CONNECT = 10.0  # seconds for a connection
LONGEST_WAIT = 30.0
MAX_BODY = 64 << 20
BUSY = (429, 502, 503)
AGAIN = (408, 425, 500, 504)
T = TypeVar("T")


class Away(Exception):
    """The server is not there, or takes nothing now. pause: how long it asks to be left alone."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class Faulty(Exception):
    """This answer is no answer; another attempt may bring one. `read` functions raise it too."""


class Refused(DataError):
    """The server will not do this, however often it is asked."""

    def __init__(self, status: int, said: str, *place: object) -> None:
        super().__init__(f"{answers(status)}: {said}", *place)
        self.status, self.said = status, said


def answers(status: int) -> str:
    """A status in words."""
    return f"answers {status} {http.client.responses.get(status, '')}".rstrip()


class Stopped(Exception):
    """The work that this request was for has ended."""


class Reply(NamedTuple):
    """Status, Retry-After in seconds (0: not given), where a redirect goes, and the body."""

    status: int
    pause: float
    location: str
    body: bytes


class Endpoint:
    """One server. url: http(s)://HOST[:PORT][/PATH]; without a path it is /v1. Several threads may ask at once.

    Raises Misuse for what is no such address. Plain http to another machine is told: who listens reads everything.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        retries: int = 5,
        patience: float = 300.0,
        pause: float = 0.5,
    ) -> None:
        self.scheme, self.host, self.port, self.path = parse(url)
        self.url = f"{self.scheme}://{netloc(self.host, self.port)}{self.path}"
        self.timeout, self.retries, self.patience, self.pause = timeout, retries, patience, pause
        self.headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "llama2cli"}
        if api_key:
            if not api_key.isascii() or not api_key.isprintable() or " " in api_key:
                raise Misuse("holds what no key holds (a space, a line end, a letter beyond ASCII)", KEY_NAME)
            self.headers["Authorization"] = f"Bearer {api_key}"
        if self.scheme == "http" and not is_local(self.host):
            what = "the key, the prompts and the answers" if api_key else "the prompts and the answers"
            console.warn(f"{self.url}: plain http: whoever is on the way reads {what}; https is safe")
        self.context = ssl.create_default_context() if self.scheme == "https" else None
        self.lock = threading.Lock()
        self.idle: list[http.client.HTTPConnection] = []
        self.busy: set[http.client.HTTPConnection] = set()
        self.heard = 0.0  # when the last good answer came
        self.closed = False
        self.outage: tuple[str, float] | None = None  # why it is waited for, and since when

    def ask(
        self,
        method: str,
        path: str,
        read: Callable[[Any], T],
        body: dict[str, Any] | None = None,
        *,
        stop: threading.Event | None = None,
    ) -> T:
        """What `read` makes of the JSON that the server answers. path: below the endpoint's own, or "/..." at its root.

        Raises DataError when it is given up (Refused where the server says no), Stopped once `stop` is set.
        """
        stop = stop or threading.Event()
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        key = blake2b(data or path.encode(), digest_size=16).digest()
        began, faults, attempt = time.monotonic(), 0, 0
        while not stop.is_set():
            try:
                value = read(self._json(self._send(method, path, data)))
            except (Away, Faulty) as e:
                if stop.is_set():
                    break
                if isinstance(e, Away):
                    pause = self._wait(e, max(began, self.heard), attempt, key)
                else:
                    faults += 1
                    if faults > self.retries:
                        raise DataError(f"{e} ({faults} attempts)", self.url) from None
                    console.warn(f"{self.url}: {e}; asking again", f"requests that were sent again: {self.url}")
                    pause = self._pause(faults - 1, key)
            else:
                self._answered()
                return value
            attempt += 1
            stop.wait(pause)
        raise Stopped

    def close(self) -> None:
        """Break the connections; a request that is under way fails."""
        with self.lock:
            self.closed = True
            for connection in (*self.idle, *self.busy):
                if connection.sock is not None:
                    with suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)
            for connection in self.idle:
                connection.close()
            self.idle.clear()

    # --- waiting --------------------------------------------------------------------------------------------------

    def _pause(self, attempt: int, key: bytes) -> float:
        """Seconds before the next attempt."""
        draw = blake2b(key + attempt.to_bytes(4, "little"), digest_size=4).digest()
        u = int.from_bytes(draw, "little") / 2**32
        return min(LONGEST_WAIT, self.pause * 2 ** min(attempt, 20)) * (0.5 + 0.5 * u)

    def _wait(self, away: Away, since: float, attempt: int, key: bytes) -> float:
        """How long to leave the server alone. Raises DataError when patience is at its end."""
        waited = time.monotonic() - since
        if away.pause > self.patience:
            raise DataError(f"{away} and asks to be left alone for {console.duration(away.pause)}", self.url)
        if waited > self.patience:
            what = f"{away}, for {console.duration(waited)} now; start it, and the same command goes on"
            raise DataError(what, self.url)
        with self.lock:
            new = self.outage is None
            if new:
                self.outage = (str(away), time.monotonic())
        if new:
            limit = console.duration(self.patience)
            console.warn(f"{self.url}: {away}; waiting for it, {limit} at most", f"waits for {self.url}")
        jitter = self._pause(attempt, key)
        return max(away.pause + min(jitter, 1.0), jitter) if away.pause else jitter

    def _answered(self) -> None:
        with self.lock:
            self.heard = time.monotonic()
            outage, self.outage = self.outage, None
        if outage is not None and "refused" in outage[0]:
            console.say(f"{self.url}: answers again after {console.duration(self.heard - outage[1])}")

    # --- one request ----------------------------------------------------------------------------------------------

    def _send(self, method: str, path: str, data: bytes | None) -> Reply:
        """One request. A kept connection that the server has closed meanwhile is replaced."""
        with self.lock:
            connection = self.idle.pop() if self.idle else None
        if connection is not None:
            try:
                return self._exchange(connection, method, path, data)
            except ConnectionError:
                pass
        try:
            return self._exchange(self._connect(), method, path, data)
        except http.client.RemoteDisconnected:
            raise Faulty("closed the connection without an answer") from None
        except ConnectionError as e:
            raise Faulty(f"the connection broke ({e.strerror or e})") from None

    def _connect(self) -> http.client.HTTPConnection:
        """A new connection. Raises Away, DataError for what time does not mend, Stopped after `close`."""
        if self.closed:
            raise Stopped
        make: Any = http.client.HTTPSConnection if self.context else http.client.HTTPConnection
        options = {"context": self.context} if self.context else {}
        connection: http.client.HTTPConnection = make(self.host, self.port, timeout=CONNECT, **options)
        try:
            connection.connect()
        except ssl.SSLCertVerificationError as e:
            fix = "SSL_CERT_FILE=FILE names the authority to trust"
            raise DataError(f"its certificate is not trusted ({e.verify_message}); {fix}", self.url) from None
        except ssl.SSLError as e:
            raise DataError(f"does not speak TLS ({e.reason or e}); is it http://?", self.url) from None
        except TimeoutError:
            raise Away(f"no connection within {CONNECT:g} s") from None
        except socket.gaierror as e:
            raise Away(f'no address for "{self.host}" ({e.strerror})') from None
        except OSError as e:
            raise Away((e.strerror or str(e)).lower()) from None
        return connection

    def _exchange(self, connection: http.client.HTTPConnection, method: str, path: str, data: bytes | None) -> Reply:
        """One request over one connection, which is kept where the server keeps it."""
        sock = connection.sock
        deadline = time.monotonic() + self.timeout
        keep = False
        with self.lock:
            self.busy.add(connection)
        try:
            sock.settimeout(self.timeout)
            target = path if path.startswith("/") else f"{self.path}/{path}"
            connection.request(method, target, data, self.headers)
            response = connection.getresponse()
            body = read_body(response, sock, deadline)
            keep = not response.will_close
            pause = retry_after(response.getheader("Retry-After"))
            return Reply(response.status, pause, response.getheader("Location") or "", body)
        except TimeoutError:
            raise Faulty(f"no answer within {self.timeout:g} s") from None
        except ConnectionError:
            raise
        except http.client.IncompleteRead:
            raise Faulty("the answer was cut") from None
        except http.client.HTTPException as e:
            raise Faulty(f"the answer is no HTTP ({type(e).__name__} {e})") from None
        except OSError as e:
            raise Faulty(f"the connection broke ({e.strerror or e})") from None
        finally:
            with self.lock:
                self.busy.discard(connection)
                if keep:
                    self.idle.append(connection)
            if not keep:
                connection.close()

    def _json(self, reply: Reply) -> Any:
        """The value that a reply holds. Raises by its status: Away, Faulty, Refused."""
        if reply.status == 200:
            try:
                return json.loads(reply.body)
            except (ValueError, RecursionError):
                raise Faulty(f"the answer is not JSON, or cut: {short(reply.body)}") from None
        said = message(reply.body)
        if reply.status in BUSY:
            raise Away(f"{answers(reply.status)} ({said})", reply.pause)
        if reply.status in AGAIN or reply.status >= 500:
            raise Faulty(f"{answers(reply.status)} ({said})")
        if 300 <= reply.status < 400:
            raise Refused(reply.status, f"it moved; name {reply.location or 'the new address'} instead", self.url)
        if reply.status in (401, 403):
            has = "does not take the key in" if "Authorization" in self.headers else "wants a key; put it into"
            raise Refused(reply.status, f"{said}; it {has} the environment variable {KEY_NAME}", self.url)
        raise Refused(reply.status, said, self.url)


def parse(url: str) -> tuple[str, str, int, str]:
    """(scheme, host, port, path) of an address as people write it; the path has no "/" at its end. Raises Misuse."""
    hint = "expected http(s)://HOST[:PORT][/PATH], as http://localhost:8000/v1"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise Misuse(f'"{url}" is no address; {hint}') from None
    if parts.username is not None or parts.password is not None:
        raise Misuse(f"a name or key in the address ends in logs; put the key into {KEY_NAME}")
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise Misuse(f'"{url}" is no address; {hint}')
    path = parts.path.rstrip("/").removesuffix("/completions").removesuffix("/chat").rstrip("/")
    return parts.scheme, host, port or (443 if parts.scheme == "https" else 80), path or "/v1"


def netloc(host: str, port: int) -> str:
    """HOST:PORT, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_local(host: str) -> bool:
    """Whether what is sent to a host stays on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header (a number or a date); 0 where there is none that can be read."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value)) if value.strip()[0].isdigit() else _until(value)
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0


def _until(date: str) -> float:
    return max(0.0, parsedate_to_datetime(date).timestamp() - time.time())


def read_body(response: http.client.HTTPResponse, sock: socket.socket, deadline: float) -> bytes:
    """The body, before the deadline however slowly it trickles. Raises TimeoutError; Faulty where it is too long."""
    parts, size = [], 0
    while not response.isclosed():  # the socket of one that is closed has no time-out to set
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)
        part = response.read1(1 << 16)
        if not part:
            break
        parts.append(part)
        size += len(part)
        if size > MAX_BODY:
            raise Faulty(f"the answer is longer than {MAX_BODY:,} bytes")
    if response.length:  # read1 does not tell a body that ends too early
        raise http.client.IncompleteRead(b"", response.length)
    response.close()  # else the connection takes no further request
    return b"".join(parts)


def message(body: bytes) -> str:
    """What an error's body says, in one short line: of vLLM, SGLang, llama.cpp and OpenAI, or as it is."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return short(body)
    if isinstance(value, dict):
        inner = value.get("error", value)
        for key in ("message", "detail", "error"):
            if isinstance(inner, dict) and inner.get(key):
                found = inner[key]
                return short((found if isinstance(found, str) else json.dumps(found)).encode())
        if isinstance(inner, str):
            return short(inner.encode())
    return short(body)


def short(body: bytes) -> str:
    """The beginning of a body as one printable line."""
    text = " ".join(body[:2000].decode("utf-8", "replace").split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    return (text[:297] + "...") if len(text) > 300 else text or "nothing more is said"
