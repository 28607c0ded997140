"""JSON over HTTP with what a long evaluation needs: retries, time limits, and a key that stays put.

The standard library is enough: a request takes seconds to minutes, so what a connection costs does
not matter, and no library has to be there in the right version.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from extend.errors import RecipeError, ServerError

_LONGEST_WAIT_SECONDS = 60.0
_SHOWN_CHARACTERS = 400  # of an answer, in a message
_AGAIN = (408, 425, 429, 500, 502, 503, 504)  # the same request may succeed later
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Rejected(ServerError):
    """A request that the server refuses and would refuse again.

    Attributes:
        status: of HTTP.
        text: the beginning of the answer, without the key.
    """

    def __init__(self, where: str, status: int, text: str):
        super().__init__(f"{where}: status {status}: {text}")
        self.status, self.text = status, text


class _Passing(Exception):
    """A failure that may be over when the request is sent again, after `wait` seconds or more."""

    def __init__(self, cause: str, wait: float = 0.0):
        super().__init__(cause)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would take the key along to whatever host a redirect names."""

    def redirect_request(self, *args: Any) -> None:
        return None


class JsonClient:
    """Asks one server. Safe to use from several threads.

    Args:
        url: `http://host:port`, with or without a path and a last `/v1`. Name and password, and
            what follows a `?`, are refused: the address is written into results.
        key_variable: environment variable that holds the server's API key; where it is unset or
            empty, no key is sent.
        timeout_seconds: for one request. One that takes longer is not sent again, since the server
            would then have two to work on.
        retries: how often a request is sent again after a lost connection, a broken answer, or a
            status that says to try later.
        backoff_seconds: before the first of them; doubled each time, at most a minute.

    Raises:
        RecipeError: an address that is not one of HTTP, or a key that no header can hold.
    """

    def __init__(self, url: str, *, key_variable: str = "OPENAI_API_KEY",
                 timeout_seconds: float = 3600.0, retries: int = 5, backoff_seconds: float = 1.0):
        self.root = _root(url)
        self._variable, self._key = key_variable, os.environ.get(key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise RecipeError(f"the API key in the environment variable {key_variable} holds "
                              "characters that no HTTP header may; set it again")
        self._timeout, self._retries, self._backoff = timeout_seconds, retries, backoff_seconds
        handlers: list[Any] = [_NoRedirect()]
        if urlsplit(self.root).hostname in _LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def get(self, path: str) -> Any:
        """The JSON at `path`; errors as for `post`."""
        return self._request(path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that the server answers to `body`.

        Raises:
            Rejected: it refuses the request.
            ServerError: it refuses the key, takes too long, or fails again and again.
        """
        return self._request(path, json.dumps(body, separators=(",", ":")).encode())

    def _request(self, path: str, body: bytes | None) -> Any:
        where, failure = self.root + path, ""
        for attempt in range(self._retries + 1):
            try:
                return self._once(where, body)
            except _Passing as error:
                failure, wait = str(error), max(error.wait, self._backoff * 2 ** attempt)
            if attempt < self._retries:
                time.sleep(min(wait, _LONGEST_WAIT_SECONDS))
        raise ServerError(f"{where}: failed {self._retries + 1} times, at last with {failure}; see "
                          "whether the server runs and what its log says. Finished cells are "
                          "kept: the same command goes on from there")

    def _once(self, where: str, body: bytes | None) -> Any:
        headers = {"Content-Type": "application/json", "User-Agent": "extend-context"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(where, data=body, headers=headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                data = answer.read()
        except urllib.error.HTTPError as error:
            raise self._explain(where, error) from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, TimeoutError):
                raise ServerError(f"{where}: no answer within {self._timeout:g} s; give a longer "
                                  "time limit, or ask fewer prompts at once") from None
            raise _Passing(self._hide(f"{type(cause).__name__}: {cause}")) from None
        try:
            return json.loads(data)
        except ValueError as error:
            raise _Passing(f"an answer that is no JSON ({error})") from None

    def _explain(self, where: str, error: urllib.error.HTTPError) -> Exception:
        try:
            text = error.read(100_000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        text = " ".join(self._hide(text).split())[:_SHOWN_CHARACTERS] or error.reason
        if error.code in (401, 403):
            state = "was sent" if self._key else "is unset, so none was sent"
            return ServerError(f"{where}: status {error.code}, the server wants another API key; "
                               f"that of the environment variable {self._variable} {state}")
        if error.code in _AGAIN:
            return _Passing(f"status {error.code}: {text}", _seconds(error.headers))
        return Rejected(where, error.code, text)

    def _hide(self, text: str) -> str:
        """Servers quote a wrong key in their answers."""
        return text.replace(self._key, "[key]") if self._key else text


def _root(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host:
        raise RecipeError(f"server: {url!r} is no address of HTTP; give one like "
                          "http://localhost:8000")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise RecipeError(f"server: the address of {host} holds a name, a password or a query, "
                          "which would be written into the results; give the bare address, and a "
                          "key in an environment variable")
    return urlunsplit((parts.scheme, parts.netloc,
                       parts.path.rstrip("/").removesuffix("/v1").rstrip("/"), "", ""))


def _seconds(headers: Any) -> float:
    """What `Retry-After` asks for, where it is a number."""
    try:
        return max(0.0, float(headers.get("Retry-After", 0)))
    except (TypeError, ValueError):
        return 0.0
