"""How far predictions were off, lately."""

_RECORDS_FOR_ERROR = 8
_ERROR_WEIGHT = 0.05
"""Weight of the newest relative error in the running mean, once there are enough for it to be one."""


class RunningError:
    """Mean relative error of predictions made before their outcome was known; newer ones weigh more."""

    def __init__(self, mean: float | None = None) -> None:
        """`mean`: where an earlier one stood; None where there was none."""
        self._mean = mean if mean is not None else 0.0
        self._records = _RECORDS_FOR_ERROR if mean is not None else 0

    @property
    def mean(self) -> float | None:
        """None before there are enough records to speak of a mean."""
        return self._mean if self._records >= _RECORDS_FOR_ERROR else None

    def add(self, error: float) -> None:
        self._records += 1
        self._mean += (error - self._mean) * max(_ERROR_WEIGHT, 1.0 / self._records)
