"""The schema of a manifest, its document, and the code that reads it know the same things."""

import json
import re
from pathlib import Path

from jsonschema import Draft202012Validator

from stepfuse.fuse.backbones.guidance import GUIDANCE
from stepfuse.fuse.rules.schedules import SCHEDULES
from stepfuse.fuse.sets.manifest import FORMAT_VERSION, SCHEMA

ROOT = Path(__file__).parents[1]
VALUES = json.loads(SCHEMA.read_text())


def test_the_schema_is_one_and_of_the_version_that_is_read():
    Draft202012Validator.check_schema(VALUES)
    assert VALUES["properties"]["format_version"] == {"const": FORMAT_VERSION}


def test_it_has_every_variance_schedule_with_its_fields():
    *known, other = VALUES["$defs"]["variance"]["oneOf"]
    kinds = {one["properties"]["kind"]["const"]: set(one["properties"]) for one in known}
    assert kinds == {kind: {"kind", *SCHEDULES[kind].field_names()} for kind in SCHEDULES}
    assert other["properties"]["kind"]["not"]["enum"] == list(SCHEDULES)
    assert tuple(VALUES["$defs"]["guidance"]["enum"]) == GUIDANCE


def test_the_document_explains_every_key():
    text = (ROOT / "docs" / "adapter-set.md").read_text()
    named = set(re.findall(r"`(\w+)`", text))
    for part in (VALUES, *(VALUES["$defs"][name] for name in ("base", "adapter"))):
        assert set(part["properties"]) <= named
        required = {key for key in part["properties"] if f"`{key}`\\*" in text}
        assert set(part["required"]) <= required
