"""Values inside and outside what a JSON schema of /openapi.json allows, and whether a value is inside."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

Schema = Mapping[str, Any]

MOST = 4
"""Items and letters of drawn values, where their schema allows more."""
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.sampled_from(["", "base", "sql", "\x00", "../..", "\ud800", "ｓｑｌ", "x" * 5000, "__class__", "1" * 400]),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


class Shapes:
    """The schemas of one document, whose references it follows."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.known: Mapping[str, Schema] = document["components"]["schemas"]

    def whole(self, schema: Schema) -> Schema:
        """A schema, not the reference to it."""
        reference = schema.get("$ref")
        return self.known[reference.rpartition("/")[2]] if reference else schema

    def inside(self, schema: Schema) -> st.SearchStrategy[Any]:
        """Values that it allows, its bounds among them."""
        schema = self.whole(schema)
        if "anyOf" in schema:
            return st.one_of([self.inside(one) for one in schema["anyOf"]])
        if "const" in schema or "enum" in schema:
            return st.sampled_from(schema.get("enum") or [schema["const"]])
        draw = {
            "object": self._object,
            "array": self._array,
            "string": _string,
            "integer": _integer,
            "number": _number,
            "boolean": lambda _: st.booleans(),
            "null": lambda _: st.none(),
        }
        return draw[schema["type"]](schema) if "type" in schema else ANYTHING

    def _object(self, schema: Schema) -> st.SearchStrategy[Any]:
        fields = {name: self.inside(one) for name, one in schema.get("properties", {}).items()}
        if not fields:
            if "propertyNames" in schema:
                names = self.inside({"type": "string", **schema["propertyNames"]})
                return st.dictionaries(names, ANYTHING, max_size=MOST)
            [(pattern, value)] = schema.get("patternProperties", {"^[a-z]{1,8}$": {}}).items()
            return st.dictionaries(st.from_regex(pattern, fullmatch=True), self.inside(value), max_size=MOST)
        needed = {name: fields.pop(name) for name in schema.get("required", ())}
        return st.fixed_dictionaries(needed, optional=fields)

    def _array(self, schema: Schema) -> st.SearchStrategy[Any]:
        least = schema.get("minItems", 0)
        return st.lists(self.inside(schema["items"]), min_size=least, max_size=min(schema.get("maxItems", MOST), MOST))

    def allows(self, schema: Schema, value: Any) -> bool:
        """Whether a value is inside."""
        schema = self.whole(schema)
        if "anyOf" in schema:
            return any(self.allows(one, value) for one in schema["anyOf"])
        if "const" in schema or "enum" in schema:
            fine = schema.get("enum") or [schema["const"]]
            return any(type(one) is type(value) and one == value for one in fine)  # 0 is not false
        if "type" not in schema:
            return True
        if isinstance(value, dict) and schema["type"] == "object":
            return self._allows_fields(schema, value)
        if isinstance(value, list) and schema["type"] == "array":
            within = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf)
            return within and all(self.allows(schema["items"], one) for one in value)
        return _allows_scalar(schema, value)

    def _allows_fields(self, schema: Schema, value: Mapping[str, Any]) -> bool:
        fields, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        if not set(schema.get("required", ())) <= set(value) or len(value) > schema.get("maxProperties", math.inf):
            return False
        named = {"type": "string", **schema.get("propertyNames", {})}
        for name, one in value.items():
            if not _allows_scalar(named, name):
                return False
            found = fields.get(name) or next(
                (of for pattern, of in patterns.items() if re.fullmatch(pattern.strip("^$"), name)), None
            )
            if found is None and patterns:
                return False
            rest = schema.get("additionalProperties", True) if found is None else found
            if rest is False or (rest is not True and not self.allows(rest, one)):
                return False
        return True


def _allows_scalar(schema: Schema, value: Any) -> bool:
    kinds = {"string": str, "boolean": bool, "null": type(None), "integer": int, "number": int | float}
    kind = schema["type"]
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON schema's integers may be written with a point
    if kind not in kinds or not isinstance(value, kinds[kind]):
        return False
    if isinstance(value, str):
        pattern = schema.get("pattern")
        within = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf)
        written = not any("\ud800" <= letter <= "\udfff" for letter in value)  # halves of a pair are no text
        return written and within and (not pattern or bool(re.fullmatch(pattern.strip("^$"), value)))
    if kind in ("integer", "number"):
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
        return not isinstance(value, bool) and low <= value <= high and above < value < below
    return True


def _string(schema: Schema) -> st.SearchStrategy[str]:
    if "pattern" in schema:
        return st.from_regex(schema["pattern"], fullmatch=True)
    least = schema.get("minLength", 0)
    return st.text(min_size=least, max_size=max(least, MOST))


def _integer(schema: Schema) -> st.SearchStrategy[int]:
    low = schema.get("minimum", schema.get("exclusiveMinimum", -(2**63) - 1) + 1)
    high = schema.get("maximum", schema.get("exclusiveMaximum", 2**63) - 1)
    return st.integers(int(low), int(high))


def _number(schema: Schema) -> st.SearchStrategy[float]:
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    low, high = schema.get("minimum", above), schema.get("maximum", below)
    return st.floats(
        low, high, exclude_min=above is not None, exclude_max=below is not None, allow_nan=False, allow_infinity=False
    )


def elsewhere(body: Any, place: int, value: Any) -> Any:
    """A body with one of its parts, counted from the outside in, replaced by a value."""
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        keys = part.keys() if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
        for key in keys:
            places.append((part, key))
            walk(part[key])

    walk(body)
    if not places:
        return value
    part, key = places[place % len(places)]
    part[key] = value
    return body
