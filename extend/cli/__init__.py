"""The command line: arguments to options, then one call.

Result paths go to stdout, progress to stderr; `--json` prints one JSON object on stdout instead.
Exit codes: 0 done, 1 a mistake of the user's (one message), 2 wrong usage.
"""

from extend.cli import (  # noqa: F401  (each registers its subcommands with `main`)
    adapters,
    doctor,
    eval_prompt,
    evaluation,
    export,
    importing,
    lineage,
    plan,
    publish,
    recipes,
    search,
    shell,
    stages,
    transfer,
)
from extend.cli.group import main

__all__ = ["main"]
