"""What every actor says of itself in a Report: its host, its versions, its link. What it counts is its own affair.

How reports are asked for and read is survey.py.
"""

from __future__ import annotations

import platform
import socket
from collections.abc import Mapping

from mqinfer import __version__
from mqinfer.link import now_s
from mqinfer.messages import Report
from mqinfer.plan import Plan
from mqinfer.transports.base import Transport


def make_report(
    role: str,
    actor: str,
    plan: Plan,
    values: Mapping[str, float],
    facts: Mapping[str, str] | None = None,
    *,
    stage: int = -1,
) -> Report:
    """To be called in the actor's event loop: the report has its clock."""
    return Report(
        role=role,
        id=actor,
        host=socket.gethostname(),
        stage=stage,
        clock_s=now_s(),
        values=values,
        facts=actor_facts(plan, facts),
    )


def actor_facts(plan: Plan, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What every actor says of itself in words, with `more` of its own."""
    return {"version": __version__, "python": platform.python_version(), "plan": plan.digest, **(more or {})}


def link_values(transport: Transport) -> dict[str, float]:
    """Whether and how long the broker keeps this link from publishing."""
    blockage = transport.blockage()
    return {"blocked": float(bool(blockage.reason)), "blocked_s": blockage.total_s}
