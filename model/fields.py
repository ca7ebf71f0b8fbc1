"""Reading typed values out of what a file says about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tilewise.model.config import ModelError

__all__ = ["Fields"]

_REQUIRED = object()


@dataclass(frozen=True)
class Fields:
    """A mapping from a file, whose values may be missing or of any type.

    Args:
        values: what the file says.
        within: what messages put before a key.
    """

    values: Mapping[str, Any]
    within: str = ""

    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        """An int, or the default where the key is missing or null."""
        return self._typed(key, default, (int,), "an integer")

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """An int or a float, or the default."""
        return self._typed(key, default, (int, float), "a number")

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        """A str, or the default."""
        return self._typed(key, default, (str,), "a string")

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        """A bool, or the default."""
        return self._typed(key, default, (bool,), "a boolean")

    def section(self, key: str) -> Fields:
        """The mapping under a key; empty where it is missing or null."""
        return Fields(self._typed(key, {}, (dict,), "an object"), f"{self.within}{key}.")

    def _typed(self, key: str, default: Any, types: tuple[type, ...], wanted: str) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ModelError(f"{self.within}{key} is missing")
            return default
        # bool is a subclass of int, but true is no integer.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ModelError(f"{self.within}{key} must be {wanted}, got {value!r:.80}")
        return value
