"""Questions to an OpenAI-compatible server, with deadlines, retries and a limit of requests in flight."""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

_REFUSED = (401, 403, 404)  # of every request alike
_RETRIED = (408, 409, 425, 429)  # and all from 500 on
_LONGEST_PAUSE_S = 60.0


class RequestFailed(Exception):
    """A question that got no answer."""


class RequestsRefused(RuntimeError):
    """The server refuses every question: its address, the model's name or the key is wrong."""


class ChatClient:
    """Asks a chat model over HTTP; may be called from several threads.

    Args:
        base_url: of the server, with its version, such as "http://localhost:8000/v1".
        timeout_s: seconds for one attempt.
        max_retries: further attempts after one that failed by the network, a time-out, or a busy server.
        backoff_s: seconds before the first of them; doubled each time, and varied by up to a half.
        api_key_env: environment variable with the key, which is read for each request and kept nowhere.
    """

    def __init__(
        self, base_url: str, timeout_s: float, max_retries: int, backoff_s: float, api_key_env: str | None
    ) -> None:
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.timeout_s, self.max_retries, self.backoff_s = timeout_s, max_retries, backoff_s
        self.api_key_env = api_key_env

    def ask(self, body: Mapping[str, Any], deadline: float) -> tuple[str, int]:
        """The text of the answer, and how many attempts failed before it.

        Args:
            body: of the request.
            deadline: moment by `time.monotonic` after which nothing is tried any more.

        Raises:
            RequestFailed: no answer in time, or none at all.
            RequestsRefused: no request of this kind will be answered.
        """
        for attempt in range(self.max_retries + 1):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise RequestFailed("the deadline has passed")
            try:
                return self._attempt(body, min(self.timeout_s, left_s)), attempt
            except urllib.error.HTTPError as error:
                reason, pause_s = self._reason(error), _seconds(error.headers.get("Retry-After"))
                if error.code in _REFUSED:
                    raise RequestsRefused(f"{self.url} answers {reason}") from None
                if error.code not in _RETRIED and error.code < 500:
                    raise RequestFailed(reason) from None
            except (OSError, http.client.HTTPException) as error:
                reason, pause_s = f"{type(error).__name__}: {error}", None
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise RequestFailed(f"no chat completion came back: {type(error).__name__}") from None
            pause_s = self.backoff_s * 2**attempt * random.uniform(1, 1.5) if pause_s is None else pause_s
            if attempt < self.max_retries:
                time.sleep(max(0.0, min(pause_s, _LONGEST_PAUSE_S, deadline - time.monotonic())))
        raise RequestFailed(f"{self.max_retries + 1} attempts failed, the last one by {reason}")

    def _attempt(self, body: Mapping[str, Any], timeout_s: float) -> str:
        headers = {"Content-Type": "application/json"}
        if self.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(self.api_key_env, '')}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            text = json.loads(response.read())["choices"][0]["message"]["content"]
        if not isinstance(text, str):
            raise TypeError("the answer is no text")
        return text

    def _reason(self, error: urllib.error.HTTPError) -> str:
        """What the server says, without the key, which some repeat."""
        try:
            said = error.read(500).decode(errors="replace")
        except OSError:
            said = ""
        key = os.environ.get(self.api_key_env or "", "")
        return f"{error.code} {error.reason}: {said.replace(key, '***') if key else said}"


def check_base_url(base_url: str) -> None:
    """Refuse an address that is none, or that holds a password, which would stand in every log.

    Raises:
        ValueError: what is wrong.
    """
    parts = urllib.parse.urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url must be an address such as 'http://localhost:8000/v1', got {base_url!r}")
    if parts.username or parts.password:
        raise ValueError("base_url must hold no user and no password; put a key into a variable named by api_key_env")


def _seconds(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:  # a date
        return None
