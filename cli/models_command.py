"""`pdserve models`: what model files hold, and whether this machine can serve them."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdserve.core.errors import PdserveError

if TYPE_CHECKING:
    from pdserve.workers.models.report import ModelReport

POOL_BLOCKS = 1024


def models(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Model folders, .gguf files or ids.")
    ] = None,
    pool_blocks: Annotated[
        int, typer.Option(min=1, help="KV blocks of 16 tokens per worker to reckon with.")
    ] = POOL_BLOCKS,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """Say what models hold and need in memory; without a MODEL, list those on this machine."""
    if not names:
        _print_list(_on_this_machine(), as_json)
        return
    from pdserve.workers.models.report import describe

    answers: list[ModelReport | PdserveError] = []
    for name in names:
        try:
            answers.append(describe(name, pool_blocks))
        except PdserveError as error:
            answers.append(error)
    if as_json:
        rows = [
            {"model": name, "error": answer.message} if isinstance(answer, PdserveError) else answer.to_dict()
            for name, answer in zip(names, answers, strict=True)
        ]
        typer.echo(json.dumps(rows))
    else:
        for answer in answers:
            if isinstance(answer, PdserveError):
                typer.echo(f"pdserve: {answer.message}\n", err=True)
            else:
                _print_report(answer)
    if any(isinstance(answer, PdserveError) for answer in answers):
        raise typer.Exit(1)


def _on_this_machine() -> list[dict[str, Any]]:
    """The demo model, where it is installed, and the hub's cache; what cannot be served says why."""
    from pdserve.core.catalog import DEMO_MODEL, cached_models, resolve_model
    from pdserve.workers.models.load_config import load_config

    rows: list[dict[str, Any]] = []
    try:
        demo = resolve_model(DEMO_MODEL)
        size = demo.stat().st_size
        rows.append({"model": DEMO_MODEL, "path": str(demo), "bytes": size})
    except PdserveError as error:
        rows.append({"model": DEMO_MODEL, "path": None, "bytes": 0, "error": error.message})
    for cached in cached_models():
        rows.append({"model": cached.model_id, "path": str(cached.path), "bytes": cached.num_bytes})
    for row in rows:
        if row["path"] is None:
            continue
        try:
            row["architecture"] = load_config(resolve_model(row["path"])).architecture
        except PdserveError as error:
            row["error"] = error.message
    return rows


def _print_list(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows))
        return
    from pdserve.cli.tables import print_table

    cells = (
        (
            row["model"],
            row.get("architecture") or f"cannot be served: {row['error']}",
            row["path"] or "",
            _size(row["bytes"]),
        )
        for row in rows
    )
    print_table(("model", "architecture", "path"), ("size",), cells)


def _print_report(report: "ModelReport") -> None:
    from pdserve.cli.tables import print_table

    said = report.to_dict()
    windows = said["sliding_windows"]
    window = f", windows of {', '.join(map(str, windows))}" if windows else ""
    types = ", ".join(f"{t.kind} ({t.tensors}, {_size(t.num_bytes)})" for t in report.source_types)
    lines = {
        "model": said["model"],
        "path": said["path"],
        "architecture": f"{said['architecture']}, {said['layers']} layers, hidden {said['hidden_size']}",
        "attention": f"{said['heads']} heads on {said['kv_heads']} kv heads of {said['head_dim']}{window}",
        "context": f"{said['context_tokens']} tokens",
        "vocabulary": f"{said['vocabulary']} ids, {said['tokenizer_ids']} of them the tokenizer's",
        "tokenizer": said["tokenizer_digest"],
        "chat template": "yes" if said["chat_template"] else "no: messages are refused, prompts are not",
        "tensors": types,
        "files": ", ".join(f"{name} ({_size(size)})" for name, size in report.files),
    }
    for name, text in lines.items():
        typer.echo(f"{name:<14} {text}")
    pool = report.needs[0].pool_blocks
    numbers = ("weights", "KV / token", "KV / block", f"{pool} blocks", "one worker")
    rows = (
        (
            need.dtype,
            "fits" if report.fits(need) else "does not fit",
            _size(need.weight_bytes),
            _size(need.kv_token_bytes),
            _size(need.kv_block_bytes),
            _size(need.pool_bytes),
            _size(need.total_bytes),
        )
        for need in report.needs
    )
    print_table(("dtype", f"in {_size(report.available_bytes)} available"), numbers, rows)


def _size(num_bytes: int) -> str:
    """Decimal units, three digits."""
    value, units = float(num_bytes), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 1000 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{num_bytes} B" if unit == "B" else f"{value:.3g} {unit}"
