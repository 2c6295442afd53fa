"""Online least squares with non-negative coefficients, for a machine whose speed may change."""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

_Vector = npt.NDArray[np.float64]
_Mask = npt.NDArray[np.bool_]
_Matrix = npt.NDArray[np.float64]

_WIDTH: Final = 10.0
"""Standard deviation of a coefficient whose speed has just been guessed, in units of that guess."""

_FORGETTING: Final = 0.99
"""Weight of the past per record: a memory of about a hundred records."""

_NOISE_RANGE: Final = (0.02, 0.5)
"""Relative noise of a measurement is estimated within these bounds."""

_NOISE_WEIGHT: Final = 0.05
_LEAST_SHARE: Final = 0.1
"""Neither the scale of the noise nor a new term's part is taken as less of a measurement than this."""

_OUTLIER: Final = 3.0
"""Standard deviations beyond which a residual loses weight."""

_CHANGE_RUN: Final = 5
"""So many unexplained records in a row, on one side, are no outliers but another speed."""


class LinearFit:
    """y ≈ coefficients · features, every coefficient ≥ 0.

    Recursive least squares with relative measurement noise. The prior gives the proportions, the first record
    that uses a term gives its speed; the width around that guess is the ridge, so that collinear terms move
    together and unseen ones stay. Only the terms that a record uses are forgotten: a worker that decodes for
    an hour still knows what prefill costs. One outlier counts little; a run of them starts over at the new
    speed. Owned by one thread; `coefficients` and `predict` may be used from another.
    """

    def __init__(self, prior: Sequence[float], coefficients: Sequence[float] | None = None) -> None:
        """`prior` are the expected coefficients, all positive; `coefficients` are earlier results."""
        self._prior: _Vector = np.asarray(prior, dtype=np.float64)
        if not bool(np.all(self._prior > 0.0)):
            raise ValueError(f"every prior coefficient must be positive, got {list(prior)}")
        self._coefficients: _Vector = np.array(
            prior if coefficients is None else coefficients, dtype=np.float64
        )
        self._unit = self._prior.copy()
        self._known: _Mask = np.zeros(len(self._prior), dtype=np.bool_)
        self._covariance: _Matrix = np.eye(len(self._prior)) * _WIDTH**2
        self._noise = _NOISE_RANGE[1]
        self._runs: npt.NDArray[np.int64] = np.zeros(len(self._prior), dtype=np.int64)

    @property
    def coefficients(self) -> tuple[float, ...]:
        return tuple(self._coefficients.tolist())

    def predict(self, features: Sequence[float]) -> float:
        """Never negative, for features that are not."""
        # A few terms: plain floats are several times faster than a vector, and routers predict a lot.
        terms = zip(self._coefficients.tolist(), features, strict=True)
        return float(sum(coefficient * feature for coefficient, feature in terms))

    def observe(self, features: Sequence[float], value: float) -> float:
        """Learn that `features` (≥ 0, not all 0) took `value` > 0; returns the relative error before it."""
        raw: _Vector = np.asarray(features, dtype=np.float64)
        used: _Mask = raw > 0.0
        error = abs(self.predict(features) - value) / value
        new: _Mask = used & ~self._known
        if bool(new.any()):
            self._rescale(new, raw, value)
        side = self._update(raw, used, value)
        self._noise += _NOISE_WEIGHT * (min(max(error, _NOISE_RANGE[0]), _NOISE_RANGE[1]) - self._noise)
        self._runs[used] = np.where(self._runs[used] * side > 0, self._runs[used], 0) + side
        if int(np.abs(self._runs[used]).max()) >= _CHANGE_RUN:
            self._rescale(used, raw, value)
        return error

    def _rescale(self, terms: _Mask, raw: _Vector, value: float) -> None:
        """Take the speed of `terms` from this record, keep their proportions, open them to what follows."""
        rest = float(np.dot(self._coefficients[~terms], raw[~terms]))
        share = max(value - rest, _LEAST_SHARE * value)
        known = float(np.dot(self._coefficients[terms], raw[terms]))
        expected = float(np.dot(self._prior[terms], raw[terms]))
        unit, coefficients, covariance = self._unit.copy(), self._coefficients.copy(), self._covariance.copy()
        unit[terms] = self._prior[terms] * (share / expected)
        coefficients[terms] = coefficients[terms] * (share / known) if known > 0.0 else unit[terms]
        covariance[terms, :] = 0.0
        covariance[:, terms] = 0.0
        covariance[terms, terms] = _WIDTH**2
        self._unit, self._coefficients, self._covariance = unit, coefficients, covariance
        self._known = self._known | terms
        self._runs[terms] = 0

    def _update(self, raw: _Vector, used: _Mask, value: float) -> int:
        """One filter step; 1 or -1 where it cannot explain the record (too slow, too fast), else 0."""
        # Divided by what the units alone predict, records of every size are alike.
        size = float(np.dot(raw, self._unit))
        x, measured = raw * self._unit / size, value / size
        state: _Vector = self._coefficients / self._unit
        predicted = float(np.dot(state, x))
        residual = measured - predicted
        # The smaller of the two scales the noise: one slow record must not outweigh all that follow it.
        noise = self._noise * max(min(predicted, measured), _LEAST_SHARE * measured)
        covariance = _forget(self._covariance, used)
        direction: _Vector = covariance @ x
        spread = float(np.dot(x, direction))
        variance = spread + noise**2
        # An outlier is taken as so noisy that it is just none.
        variance = max(variance, (residual / _OUTLIER) ** 2)
        gain = direction / variance
        self._covariance = _updated(covariance, gain, x, variance - spread)
        state = _non_negative(state + gain * residual, self._covariance)
        self._coefficients = state * self._unit
        unexplained = measured - float(np.dot(state, x))
        return int(math.copysign(1, unexplained)) if abs(unexplained) > _OUTLIER * noise else 0


def _forget(covariance: _Matrix, used: _Mask) -> _Matrix:
    """Widen the used terms, at most to the first width; a congruence, so the result is a covariance."""
    widest = np.maximum(_WIDTH / np.sqrt(np.diagonal(covariance)), 1.0)
    factors = np.where(used, np.minimum(_FORGETTING**-0.5, widest), 1.0)
    widened: _Matrix = covariance * np.outer(factors, factors)
    return widened


def _updated(covariance: _Matrix, gain: _Vector, x: _Vector, noise_variance: float) -> _Matrix:
    """Joseph's form of the measurement update: a covariance whatever rounding does."""
    rest = np.eye(len(x)) - np.outer(gain, x)
    updated: _Matrix = rest @ covariance @ rest.T + np.outer(gain, gain) * noise_variance
    return updated


def _non_negative(state: _Vector, covariance: _Matrix) -> _Vector:
    """Set negative coefficients to zero and move the others as the covariance says, so that the fit stays."""
    for _ in range(len(state)):
        worst = int(np.argmin(state))
        if state[worst] >= 0.0:
            break
        state = state - covariance[:, worst] * (state[worst] / covariance[worst, worst])
        state[worst] = 0.0
    clamped: _Vector = np.maximum(state, 0.0)
    return clamped
