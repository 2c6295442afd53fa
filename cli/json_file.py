"""How commands write what they measured."""

import json
from pathlib import Path
from typing import Any

from pdserve.core.errors import Unavailable


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Raises Unavailable where the file cannot be written."""
    try:
        file.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise Unavailable(f"{file} cannot be written: {error.strerror}") from error
