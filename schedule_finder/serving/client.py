"""Asks a server for answers over HTTP and measures the time to the first token."""

from __future__ import annotations

import base64
import http.client
import io
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from schedule_finder.errors import InputError
from schedule_finder.samples import Sample
from schedule_finder.serving.server import MODEL_NAME

_TIMEOUT = 600


@dataclass(frozen=True)
class ServedAnswer:
    """A server's answer.

    Attributes:
        text: of the answer.
        prompt_tokens: as the server counts them.
        first_token: seconds until the first token, from when the request was sent.
    """

    text: str
    prompt_tokens: int
    first_token: float


def request_body(sample: Sample, max_new_tokens: int, system_prompt: str | None = None) -> bytes:
    """The chat request of a sample: its images, then its question. Raises `InputError` for videos."""
    if sample.videos:
        raise InputError(f"{sample.id}: the serving check sends images only; use a run without videos")
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _data_url(image)}} for image in sample.images
    ]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [*content, {"type": "text", "text": sample.question}]}
    ]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return json.dumps(
        {
            "model": MODEL_NAME,
            "messages": messages,
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


def replay(url: str, bodies: Sequence[bytes], concurrency: int) -> tuple[list[ServedAnswer], float]:
    """All answers in order, at most ``concurrency`` requests at a time, and the seconds that they took together."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda body: ask(url, body), bodies))
    return answers, time.perf_counter() - begin


def ask(url: str, body: bytes) -> ServedAnswer:
    """Send one request. Raises `InputError` where the server refuses it."""
    address = urlsplit(url)
    assert address.hostname is not None
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=_TIMEOUT)
    begin = time.perf_counter()
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise InputError(f"the server refused a request ({response.status}): {_message(response.read())}")
        text, prompt_tokens, first = "", 0, None
        for event in _events(response):
            if event.get("usage"):
                prompt_tokens = event["usage"]["prompt_tokens"]
            for choice in event["choices"]:
                part = choice["delta"].get("content") or ""
                if first is None and (part or choice.get("finish_reason")):
                    first = time.perf_counter() - begin
                text += part
    finally:
        connection.close()
    return ServedAnswer(text.strip(), prompt_tokens, first or time.perf_counter() - begin)


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The documents of an event stream."""
    for line in response:
        data = line.decode().strip().removeprefix("data: ")
        if data and data != "[DONE]":
            yield json.loads(data)


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:200]


def _data_url(image: Any) -> str:
    png = io.BytesIO()
    image.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
