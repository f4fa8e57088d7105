"""Figures of a long command, written whenever there is a new one, so that another command can go on from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.tables import machine
from conformance.terminal import refuse, write_json


class Missing(Exception):
    """A run is not there, and none is to be made."""


class Records:
    """All figures, by groups. closed: no run is to be made."""

    def __init__(self, path: Path | None, before: Mapping[str, Any] | None = None, *, closed: bool = False) -> None:
        self.path, self.closed = path, closed
        self.result: dict[str, Any] = {"machine": machine(), "runs": [], "races": [], "refused": [], **(before or {})}

    def add(self, group: str, record: dict[str, Any]) -> dict[str, Any]:
        """Keep one more."""
        self.result[group].append(record)
        write_json(self.path, self.result)
        return record

    def found(self, group: str, **key: Any) -> Iterator[dict[str, Any]]:
        """Those with these values."""
        return (record for record in self.result[group] if key.items() <= record.items())

    def drop(self, group: str, **key: Any) -> None:
        """Forget those with these values."""
        gone = list(self.found(group, **key))
        self.result[group] = [record for record in self.result[group] if record not in gone]


def read(path: Path) -> dict[str, Any]:
    """Figures of an earlier command; none where there is no file yet."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        refuse(f"{path} does not hold figures of this command: {error}")
