"""The results of `bench`."""

from __future__ import annotations

from typing import Any

from rich.markup import escape

from schedule_finder.cli.terminal import make_table, screen, show_table


def show_benchmark(document: dict[str, Any]) -> None:
    """Two tables per batch size: speed, and the parts of the time to the first token."""
    from schedule_finder.benchmark import ran_on

    rows = benchmark_rows(document)
    described = [document["backbone"]["name"], *([document["note"]] if document["note"] else [])]
    prompt, last = document["prompt"], document["lengths"][-1]
    fast = any(result["fast"] for result in document["results"])
    path = ["path"] if fast else []
    for batch, (speed, parts) in rows.items():
        rounds = next(result["rounds"] for result in document["results"] if result["batch"] == batch)
        whole = sum(row["new_tokens"] == last for row in rounds)
        title = f"batch {batch}: {prompt['vision_tokens']} vision + {prompt['text_tokens']} text tokens, "
        title += f"{len(rounds)} rounds, {whole} of them with {last} new tokens"
        shown = make_table(
            title, "ms", "proc.", "dec.", "%", *path, "FLOPs", "first", "token", str(last), "faster"
        )
        for row in speed:
            shown.add_row(*row)
        show_table(shown)
        shown = make_table("ms to the first token, and MB", "ms", "tower", "proj.", "layers", "scor.", "drop.", "head",
                       "other", "MB", "cache")  # fmt: skip
        for row in parts:
            shown.add_row(*row)
        show_table(shown)
    columns = {
        "proc.": "vision tokens processed, in %",
        "dec.": "decoder prefill with scoring and dropping, also in % of unpruned",
        **({"path": "in % of unpruned on the same path"} if fast else {}),
        "FLOPs": "of the decoder prefill, in %",
        "first": "time to the first token",
        "token": "time per further token",
        str(last): "total time for so many tokens",
        "faster": "range of new tokens in which it is faster than unpruned",
        "roofline": "lower bound of the schedule's layers at the measured rates",
        **({"*": "included in layers: a captured graph cannot be divided"} if fast else {}),
        "MB": "peak memory beyond the weights",
        "cache": "of the prompt, MB",
    }
    screen.print(
        "Medians over rounds; parts are means over the middle half. "
        + "; ".join(f"{name}: {meaning}" for name, meaning in columns.items())
    )
    for one in document["failed"]:
        screen.print(
            escape(f"left out: batch {one['batch']}, {one['baseline']}: {one['reason']}"), soft_wrap=True
        )
    screen.print(
        f"{', '.join(described)}; {document['environment']['dtype']} on {ran_on(document)}", soft_wrap=True
    )
    screen.print(f"schedule: {document['schedule']['source']}", soft_wrap=True)


def benchmark_rows(document: dict[str, Any]) -> dict[int, tuple[list[list[str]], list[list[str]]]]:
    """The rows of both tables of `show_benchmark`, by batch size."""
    from schedule_finder.benchmark import PREFILL_PARTS, faster_text

    last = str(document["lengths"][-1])
    fast = any(result["fast"] for result in document["results"])
    shown: dict[int, tuple[list[list[str]], list[list[str]]]] = {}
    bounds = {
        result["batch"]: result["roofline_ms"]
        for result in document["results"]
        if result["baseline"] == "schedule"
    }
    for result in document["results"]:
        speed, parts = shown.setdefault(result["batch"], ([], []))
        token, same = result["token_ms"], result["same_path_ratio"]
        speed.append(
            [
                result["baseline"],
                _percent(result["processed"]),
                _ms(result["decoder_ms"]["median"]),
                _percent(result["decoder_ratio"]["median"]),
                *([_percent(same["median"]) if same else ""] if fast else []),
                _percent(result["flops_ratio"]),
                _ms(result["first_token_ms"]["median"]),
                "" if token is None else _ms(token["median"]),
                _ms(result["total_ms"][last]["median"]),
                faster_text(result["faster"]),
            ]
        )
        parts.append(
            [
                result["baseline"],
                *(
                    "*" if (spent := result["prefill"][part]) is None else _ms(spent)
                    for part in PREFILL_PARTS
                ),
                f"{result['peak_bytes'] / 1e6:.0f}",
                f"{result['cache_bytes'] / 1e6:.1f}",
            ]
        )
    for batch, bound in bounds.items():
        speed = shown[batch][0]
        speed.append(["roofline", "", _ms(bound), *[""] * (len(speed[0]) - 3)])
    return shown


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f}" if percent >= 99.95 else f"{percent:.1f}"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
