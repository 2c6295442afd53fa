"""Whether a cluster's workers fit on this machine, asked before any of them starts."""

from pdserve.core.catalog import resolve_model
from pdserve.core.config import ServeConfig
from pdserve.workers.models.available_memory import available_memory
from pdserve.workers.models.footprint import footprint, require_memory
from pdserve.workers.models.load_config import load_config


def require_fit(config: ServeConfig) -> None:
    """All workers together, where all of them start here; elsewhere each worker asks for itself.

    Raises:
        ConfigError: no such model, one that cannot be served, or too little memory (with the numbers).
    """
    model = load_config(resolve_model(config.model))
    if config.ray_address is not None or config.engine.device != "cpu":
        return
    need = footprint(model, config.dtype, config.engine.pool_blocks)
    workers = config.prefill + config.decode + config.mixed
    require_memory(need, available_memory(), model=config.model, workers=workers)
