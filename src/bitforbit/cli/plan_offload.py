"""The part of ``plan`` about settings that do not fit: blocks elsewhere, and how fast they can follow each other."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from bitforbit.cli import output
from bitforbit.errors import PlanError

if TYPE_CHECKING:
    from bitforbit.planner import OffloadRow, Plan, Request

_HEADINGS = ("mode", "KV", "total", "blocks kept", "slots", "host", "disk", "tokens/s, pred.", "/ bf16")


def beside(request: Request, host: str | None, link: float | None, disk: float | None) -> Request:
    """The request with what the options say of host memory (``"64GB"``), link and disk (GB/s). Raises PlanError."""
    from bitforbit.planner.gpus import parse_size

    for name, value in (("--link", link), ("--disk", disk)):
        if value is not None and not value > 0:
            raise PlanError(f"{name}: expected GB/s above 0, got {value:g}")
    nbytes = None if host is None else parse_size(host)
    if host is not None and nbytes is None:
        raise PlanError(f"--host: expected a size such as 64GB or 64GiB, got {host!r}")
    usual = request.beside
    return replace(
        request,
        elsewhere=replace(
            usual,
            host=nbytes,
            link=usual.link if link is None else link * 1e9,
            disk=usual.disk if disk is None else disk * 1e9,
        ),
    )


def facts(plan: Plan) -> dict[str, Any]:
    """For ``--json``."""
    elsewhere = plan.request.beside
    return {
        "host_bytes": elsewhere.host,
        "link_bytes_per_second": elsewhere.link,
        "disk_bytes_per_second": elsewhere.disk,
        "offload": [_row_facts(row) for row in plan.offload],
    }


def _row_facts(row: OffloadRow) -> dict[str, Any]:
    offload = row.offload
    return {
        "mode": offload.method,
        "kv": offload.kv,
        "context": offload.context,
        "blocks": offload.blocks,
        "resident_blocks": list(offload.resident),
        "streamed_blocks": offload.streamed,
        "slots": offload.slots,
        "slot_bytes": offload.slot_bytes,
        **{f"{name}_bytes": value for name, value in asdict(offload.memory).items()},
        "total_bytes": offload.memory.total,
        "host_bytes": offload.host_bytes,
        "disk_bytes": offload.disk_bytes,
        "disk_blocks": offload.disk_blocks,
        "tokens_per_second_prediction": offload.speed,
        "over_bf16": row.over_bf16,
    }


def show(plan: Plan) -> None:
    """The table of what does not fit; nothing if everything does."""
    if not plan.offload:
        return
    output.print_line()
    output.print_table(_HEADINGS, [_cells(row) for row in plan.offload], left=2)
    output.print_line()
    where = "on the fullest GPU" if plan.request.gpu.tiles else "in memory"
    output.print_line(f"Offload, where the whole does not fit {where}: blocks that are not kept stream in as they run.")
    output.print_line(f"tokens/s: predicted from {_speeds(plan.request)}; bf16 as accelerate fetches it, at use.")


def _speeds(request: Request) -> str:
    from bitforbit.planner import DISK

    elsewhere, found = request.beside, []
    if request.gpu.tiles:
        sheet = " (data sheet)" if elsewhere.link == request.gpu.link else ""
        found.append(
            "a link of unknown speed (--link)" if elsewhere.link is None else _speed("link", elsewhere.link) + sheet
        )
    if elsewhere.disk is not None:
        found.append(_speed("disk", elsewhere.disk) + (" (assumed)" if elsewhere.disk == DISK else ""))
    return ", ".join(found)


def _speed(name: str, bandwidth: float) -> str:
    return f"{name} {bandwidth / 1e9:g} GB/s"


def _cells(row: OffloadRow) -> list[str]:
    offload = row.offload
    slots = f"{offload.slots}: {output.size(offload.slot_bytes)}"
    speed = "-" if offload.speed is None else f"{offload.speed:,.2f}"
    ratio = "-" if row.over_bf16 is None else f"{row.over_bf16:.2f}x"
    sizes = [output.size(offload.host_bytes), output.size(offload.disk_bytes)]
    total, kept = output.size(offload.memory.total), f"{sum(offload.resident)} of {offload.blocks}"
    return [offload.method, offload.kv, total, kept, slots, *sizes, speed, ratio]
