"""GraFx has every fault there is, one after the other and several at a time: no order fails of it."""

from __future__ import annotations

from pathlib import Path

from torture import both_outages

SEED = 20260801


def test_no_order_fails_in_an_outage(tmp_path: Path) -> None:
    """With and without --once; each fault lasts up to 0.6 s, and all pauses are as short."""
    print(both_outages(tmp_path, 60, 0.6, SEED, lambda line: None))
