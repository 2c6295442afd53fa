"""What every object of one answer begins with."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Heading:
    """`id` is also the request's name in the cluster, for `pdserve trace`."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str

    def fields(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def opening(self, kind: str) -> str:
        """JSON of `fields` without its closing brace."""
        return json.dumps(self.fields(kind), separators=(",", ":"))[:-1]
