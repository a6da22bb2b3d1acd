"""When requests arrive: a Poisson process, or one that is more or less regular."""

import math

import numpy as np


def arrival_times(num_requests: int, rate: float, burstiness: float, seed: int) -> np.ndarray:
    """Returns the seconds at which requests arrive, f64[num_requests], ascending.

    The gaps, also the one before the first request, are independent and gamma distributed with
    mean `1 / rate` and shape `burstiness`: 1 is a Poisson process, less comes in bursts, more is
    more regular. The same seed gives the same arrivals at any rate, stretched.

    Args:
      num_requests: how many.
      rate: requests per second; infinity lets all arrive at 0.
      burstiness: the gamma distribution's shape; the gaps' variance is `1 / (burstiness * rate^2)`.
      seed: of the gaps.

    Raises:
      ValueError: `rate` or `burstiness` is not positive, or `burstiness` is infinite.
    """
    if not rate > 0:
        raise ValueError(f"request_rate={rate} must be positive; inf lets all arrive at once")
    if not 0 < burstiness < math.inf:
        raise ValueError(f"burstiness={burstiness} must be positive and finite; 1 is Poisson")
    if math.isinf(rate):
        return np.zeros(num_requests)
    # With the lengths' own stream, which has the same seed, gaps and lengths would go together.
    gaps = np.random.default_rng([seed, 1]).gamma(burstiness, 1 / burstiness, num_requests)
    return np.cumsum(gaps) / rate
