"""A few hundred of the requests of ``python -m tests.hostile churn``."""

import pytest

from tests.hostile.churn import churn


@pytest.mark.slow
def test_churn():
    result = churn(requests=300)
    assert result.violations == []
    assert sum(n for name, n in result.outcomes.items() if name.endswith(": 200")) > 50
    assert len(result.events) >= 5, result.events
