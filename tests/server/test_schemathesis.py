"""All of schemathesis' checks of the API against its description.

A body that matches the schema may still get 400: a schema cannot express that a prompt must not be blank and must fit,
that a minimum must not exceed a maximum, or that a criterion needs a halting head.
"""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from slr_core.engine import Engine
from slr_server.app import create_app
from slr_server.settings import ServerSettings
from tests import tiny

ADMIN = "a" * 20
HEADERS = {"Authorization": f"Bearer {ADMIN}"}
ALLOWED = ["2xx", "400", "401", "403", "404", "409"]
RELAXED = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


SETTINGS = ServerSettings(api_keys="k" * 20, admin_key=ADMIN)


class Served:
    """The application. Until there is an engine, it only serves its description."""

    app = create_app(SETTINGS)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":  # each call starts and ends one
            for event in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{event}.complete"})
        else:
            await self.app(scope, receive, send)


SERVED = Served()


def described():
    schema = schemathesis.openapi.from_asgi("/openapi.json", SERVED, headers=HEADERS)
    schema.config.checks.positive_data_acceptance.expected_statuses = ALLOWED
    schema.config.checks.negative_data_rejection.expected_statuses = ["400", "401", "404", "405", "413", "415", "422"]
    return schema


schema, random_alone = described(), described()
random_alone.config.phases.coverage.enabled = False  # hundreds of cases, made when the tests are collected


@pytest.fixture(scope="module", autouse=True)
def _served():
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    made = tiny.reasoner(text={"chat_template": template, "max_new_tokens": 4})
    with Engine(made, threads=1) as engine:
        SERVED.app = create_app(SETTINGS, engine)
        yield


@random_alone.parametrize()
@settings(max_examples=5, deadline=None, suppress_health_check=RELAXED)
def test_some_of_everything(case):
    case.call_and_validate(headers=HEADERS)


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=300, deadline=None, suppress_health_check=RELAXED)
def test_much_of_everything(case):
    case.call_and_validate(headers=HEADERS)
