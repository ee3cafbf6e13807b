"""Print the JSON Schema of a plan: ``python -m compressor.plan.schema > docs/plan.schema.json``."""

from __future__ import annotations

import json

from compressor.plan.document import json_schema


def schema_text() -> str:
    """The schema as it is published."""
    return json.dumps(json_schema(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
