"""Measures the demo through a running server, over HTTP; starts none itself.

PYTHONPATH=server python -m bench.demo.evaluate --url http://127.0.0.1:8000 [--out demo.json]

Exits 1 when a row misses its bar, 2 when the server cannot be asked.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.demo.conditions import Condition, Result, conditions, measure
from bench.demo.world import Item
from fader_server.demo import SERVED_NAME

MAX_TOKENS = 64
PACKAGES = ("fader", "torch", "transformers", "bitsandbytes", "httpx")


@dataclass(frozen=True, slots=True)
class HttpAnswers:
    """Answers rows of questions by POST /v1/chat/completions, ``parallel`` at a time."""

    client: httpx.Client
    parallel: int

    def __call__(self, condition: Condition) -> list[str]:
        """Greedy answers, in the order of the questions."""
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(lambda item: self._ask(condition, item), condition.items))

    def _ask(self, condition: Condition, item: Item) -> str:
        reply = self.client.post("/v1/chat/completions", json=request_body(condition, item))
        if reply.status_code != httpx.codes.OK:
            raise ServerRefusedError(f"{condition.label}: {reply.status_code} {reply.text}")
        return reply.json()["choices"][0]["message"]["content"]


class ServerRefusedError(Exception):
    """The server answered a question with an error."""


def request_body(condition: Condition, item: Item) -> dict[str, Any]:
    """One adapter at γ = 1 is asked for by name; everything else as a blend on the base."""
    system = [{"role": "system", "content": condition.system}] if condition.system else []
    body: dict[str, Any] = {
        "model": SERVED_NAME,
        "messages": [*system, {"role": "user", "content": item.question}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
    }
    if len(condition.terms) == 1 and condition.terms[0][1] == 1.0:
        body["model"] = condition.terms[0][0]
    elif condition.terms:
        body["adapters"] = [{"name": name, "weight": weight} for name, weight in condition.terms]
    return body


def bar(condition: Condition) -> str:
    """The bar as the table shows it."""
    if condition.at_least is not None:
        return f"≥ {condition.at_least:.0%}"
    return f"≤ {condition.at_most:.0%}" if condition.at_most is not None else ""


def table(results: list[Result]) -> Table:
    """One line a row, with one answer."""
    out = Table("what", "γ", "right", "bar", "exact", "n", "for example")
    for result in results:
        condition = result.condition
        gammas = " ".join(f"{name}:{weight:g}" for name, weight in condition.terms)
        colour = "green" if condition.passes(result.share) else "bold red"
        count, shown = str(len(condition.items)), escape(result.samples[0][1])
        share = f"[{colour}]{result.share:.1%}[/]"
        out.add_row(
            condition.label, gammas, share, bar(condition), f"{result.exact:.1%}", count, shown
        )
    return out


def report(results: list[Result], url: str, seconds: float) -> dict[str, Any]:
    """Everything needed to judge and repeat the run."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench.demo.evaluate", *sys.argv[1:]]),
        "url": url,
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"python": platform.python_version()} | {p: installed(p) for p in PACKAGES},
        "seconds": round(seconds, 1),
        "passed": all(r.condition.passes(r.share) for r in results),
        "rows": [row(result) for result in results],
    }


def row(result: Result) -> dict[str, Any]:
    """One result as JSON."""
    condition = result.condition
    return {
        "label": condition.label,
        "adapters": [{"name": name, "weight": weight} for name, weight in condition.terms],
        "system": condition.system,
        "effects": condition.effects,
        "questions": len(condition.items),
        "right": round(result.share, 4),
        "exact": round(result.exact, 4),
        "plain": round(result.plain, 4),
        "at_least": condition.at_least,
        "at_most": condition.at_most,
        "passed": condition.passes(result.share),
        "samples": [{"question": q, "answer": a} for q, a in result.samples],
    }


def cpu_name() -> str:
    """The processor of the asking machine, which is the serving one on localhost."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((n.split(":")[1].strip() for n in lines if n.startswith("model name")), "unknown")


def installed(package: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--only", default="", help="rows whose label contains this")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    console = Console()
    headers = {"Authorization": f"Bearer {args.api_key}"}
    rows = [condition for condition in conditions() if args.only in condition.label]
    began = time.perf_counter()
    try:
        with httpx.Client(base_url=args.url, timeout=120.0, headers=headers) as client:
            answers = HttpAnswers(client, args.parallel)
            results = [measure(condition, answers) for condition in rows]
    except (httpx.HTTPError, ServerRefusedError) as error:
        console.print(f"cannot ask {args.url}: {error}", style="bold red")
        return 2
    written = report(results, args.url, time.perf_counter() - began)
    console.print(table(results))
    console.print(f"{written['seconds']} s, {'all bars met' if written['passed'] else 'FAILED'}")
    if args.out is not None:
        text = json.dumps(written, indent=2, ensure_ascii=False)
        args.out.write_text(f"{text}\n", encoding="utf-8")
    return 0 if written["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
