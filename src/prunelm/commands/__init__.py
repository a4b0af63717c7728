"""The commands: each is one library call and the printing of its result. stdout carries results only."""

from collections.abc import Callable

from . import (
    calibrate,
    compare,
    demo,
    evaluate,
    export,
    finalize,
    inspect,
    listing,
    plan,
    prune,
    repair,
    report,
    transfer,
)

COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect.inspect,
    "prune": prune.prune,
    "plan": plan.plan,
    "calibrate": calibrate.calibrate,
    "repair": repair.repair,
    "evaluate": evaluate.evaluate,
    "compare": compare.compare,
    "list": listing.list_,
    "demo": demo.demo,
    "export": export.export,
    "finalize": finalize.finalize,
    "report": report.report,
    "transfer": transfer.transfer,
}
"""By name, in the order in which help shows them."""
