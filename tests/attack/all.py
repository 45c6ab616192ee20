"""All attacks by name."""

from __future__ import annotations

from attack.harness import Attack
from attack.saves import Saves

ATTACKS: dict[str, type[Attack]] = {
    "saves": Saves,
}
