"""One load on several servers of one model and its adapters, in turn: Fader, vLLM, llama.cpp.

The servers run already; while one is loaded the others idle. Each must list the adapters among its
models, or at /lora-adapters (llama.cpp), under the same names. No figure unless every adapter is
seen to change the base's answer there and every request came out at its exact lengths. How many
answers amid the load were the answers alone is counted for each, and told beside the figures.

    python -m bench.beside_servers --server fader=http://127.0.0.1:8000 --server vllm=http://… \\
        [--adapters a00,a01,…] [--concurrency 1,8] [--rounds 3] [--json FILE]
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.side_by_side import Load, Settings, Side, compare
from fader_server.bench.figures import across
from fader_server.bench.machine import machine_facts
from fader_server.errors import ConfigInvalid


def show(sides: Sequence[Side], loads: Sequence[Load], console: Console) -> None:
    """A table a load, or the faults and no figure."""
    faults = [(side.name, model, fault) for side in sides for model, fault in side.faults]
    for name, model, fault in faults[:16]:
        console.print(f"{name}: {model}: {fault.kind}: {fault.detail}", markup=False)
    if faults:
        console.print("FAILED, no figures")
        return
    for load in map(str, loads):
        table = Table("server", title=load, title_justify="left")
        for column in ("output tokens/s", "TTFT, ms", "TPOT, ms", "answers as alone"):
            table.add_column(column, justify="right", no_wrap=True)
        for side in sides:
            own = across(side.repeats[load])
            cells = [
                f"{own[key].median:.{d}f} ({own[key].low:.{d}f} … {own[key].high:.{d}f})"
                for key, d in (("output_tokens_per_s", 1), ("ttft_ms_p50", 0), ("tpot_ms_p50", 1))
                if key in own
            ]
            kept = side.kept[load]
            table.add_row(side.name, *cells, f"{kept.same} of {kept.asked}")
        console.print(table)


def document(settings: Settings, sides: Sequence[Side], notes: Sequence[str]) -> dict[str, Any]:
    """What was run and found. Without figures where anything failed."""
    told: dict[str, Any] = {
        "command": [Path(sys.executable).name, "-m", "bench.beside_servers", *sys.argv[1:]],
        "machine": machine_facts(),
        "notes": list(notes),
        "settings": asdict(settings),
        "ok": not any(side.faults for side in sides),
        "servers": {
            side.name: side.served.facts | {"faults": [asdict(f) for _, f in side.faults]}
            for side in sides
        },
    }
    if told["ok"]:
        told["loads"] = {
            str(load): {
                side.name: {key: asdict(s) for key, s in across(side.repeats[str(load)]).items()}
                | {"answers_as_alone": asdict(side.kept[str(load)])}
                for side in sides
            }
            for load in settings.loads
        }
    return told


def main() -> None:
    """Read the command line, run, print. Exit codes: 1 for a failed run, 2 for a bad one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", action="append", required=True, metavar="NAME=URL")
    parser.add_argument("--adapters", default="", help="names with commas between")
    parser.add_argument("--concurrency", default="1,8", help="numbers with commas between")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2, help="of each lane, a round")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--note", action="append", default=[], help="of how servers run")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        settings = Settings(
            adapters=tuple(name for name in args.adapters.split(",") if name),
            concurrencies=tuple(int(number) for number in args.concurrency.split(",")),
            rounds=args.rounds,
            requests=args.requests,
            prompt_tokens=args.prompt_tokens,
            output_tokens=args.output_tokens,
        )
        sides = asyncio.run(compare(settings, dict(s.split("=", 1) for s in args.server)))
    except ConfigInvalid as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    show(sides, settings.loads, Console(width=110))
    if args.json:
        args.json.write_text(json.dumps(document(settings, sides, args.note), indent=1) + "\n")
    if any(side.faults for side in sides):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
