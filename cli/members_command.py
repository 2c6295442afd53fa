"""`pdserve members`: who is in the cluster, and changes to that at run time."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdserve.cli.connection import DEFAULT_TARGET, Target
from pdserve.cli.credentials import CREDENTIALS, credentials
from pdserve.cli.gathering import gathers

if TYPE_CHECKING:
    from pdserve.cli.admin_client import AdminClient
    from pdserve.proto import admin_pb2 as pb

Admin = Annotated[str | None, typer.Option(help="host:port of the membership service itself.")]
Worker = Annotated[str, typer.Argument(help="The worker's name, see `pdserve members list`.")]
Grace = Annotated[
    float | None, typer.Option(help="Seconds to finish in.", show_default="the cluster's --drain-grace")
]

members = typer.Typer(no_args_is_help=True, help="List workers, add, drain and remove them, change roles.")


@members.command("list")
@gathers("security", CREDENTIALS)
def list_members(security: Mapping[str, Any], target: Target = DEFAULT_TARGET, admin: Admin = None) -> None:
    """List the workers of the cluster."""
    with _connect(target, admin, security) as client:
        _print_members(client.list_members())


@members.command("add")
@gathers("security", CREDENTIALS)
def add_member(
    security: Mapping[str, Any],
    role: Annotated[str, typer.Argument(help="prefill, decode or mixed.")],
    model: Annotated[str, typer.Option(help="Needed only where several are served.")] = "",
    target: Target = DEFAULT_TARGET,
    admin: Admin = None,
) -> None:
    """Start a worker and wait until it is ready."""
    with _connect(target, admin, security) as client:
        _print_members((client.add(role, model),))


@members.command("drain")
@gathers("security", CREDENTIALS)
def drain_member(
    security: Mapping[str, Any],
    worker: Worker,
    grace: Grace = None,
    target: Target = DEFAULT_TARGET,
    admin: Admin = None,
) -> None:
    """Place nothing more on a worker and let it finish what it has."""
    with _connect(target, admin, security) as client:
        _report("drained", worker, client.drain(worker, grace))


@members.command("remove")
@gathers("security", CREDENTIALS)
def remove_member(
    security: Mapping[str, Any],
    worker: Worker,
    grace: Grace = None,
    target: Target = DEFAULT_TARGET,
    admin: Admin = None,
) -> None:
    """Drain a worker, then end it."""
    with _connect(target, admin, security) as client:
        _report("removed", worker, client.remove(worker, grace))


@members.command("role")
@gathers("security", CREDENTIALS)
def set_role(
    security: Mapping[str, Any],
    worker: Worker,
    weight: Annotated[float, typer.Argument(min=0.0, max=1.0, help="1 prefills only, 0 decodes only.")],
    target: Target = DEFAULT_TARGET,
    admin: Admin = None,
) -> None:
    """Change what a worker's token budget is spent on; running sequences stay."""
    with _connect(target, admin, security) as client:
        client.set_role_weight(worker, weight)
    typer.echo(f"{worker} now has role weight {weight:g}")


def _connect(target: str, admin: str | None, security: Mapping[str, Any]) -> "AdminClient":
    from pdserve.cli.admin_client import AdminClient, find_admin

    proof = credentials(security)
    return AdminClient(admin or find_admin(target, **proof), **proof)


def _report(done: str, worker: str, failed_requests: int) -> None:
    typer.echo(f"{worker} is {done}; {failed_requests} requests failed")


def _print_members(found: "tuple[pb.Member, ...]") -> None:
    from pdserve.cli.tables import print_table

    texts = ("worker", "role", "state", "endpoint", "incarnation", "model")
    print_table(texts, ("weight", "pid", "restarts"), map(_row, found))


def _row(member: "pb.Member") -> tuple[str, ...]:
    return (
        member.worker,
        member.role,
        member.state,
        member.endpoint,
        member.incarnation,
        member.model,
        f"{member.role_weight:g}",
        str(member.pid),
        str(member.restarts),
    )
