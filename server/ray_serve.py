"""The server as a Ray Serve application: many replicas behind Ray's proxies, each with its own engine.

Needs the extra ``ray``. ``deploy/ray/serve.yaml`` runs :func:`build_app`; its options (replicas, resources,
limits, routing) are set there.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingContext
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from slr_core.errors import ConfigError, SLRError

from .app import create_app
from .errors import Conflict, NotFound, send_error
from .service import Service
from .settings import ServerSettings

LIVE = ("max_iterations", "min_iterations", "convergence")
"""Settings of a checkpoint's ``loop`` that ``user_config`` can change while replicas run."""


@serve.deployment
@serve.ingress()
class LatentServer:
    """One replica: the application of :mod:`slr_server.app` and its engine.

    Args:
        settings: of the server, see :func:`replica_settings`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.application = create_app(replica_settings(settings))
        self.service: Service = self.application.state.service
        self.service.load()
        self._checkpoint = self.service.check().reasoner.config
        # The innermost: only requests with a valid key load anything.
        self.application.user_middleware.append(Middleware(AdapterSetLoader, load=self._load_set))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self.application

    def check_health(self) -> None:
        """Called by Ray, which replaces the replica after three failures.

        Raises:
            Unavailable: the engine is stopped, or makes no progress.
        """
        self.service.check()

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Ray with the deployment's ``user_config``, at the start and when it changes.

        Requests that are prepared already keep their parameters.

        Args:
            user_config: some of :data:`LIVE`, as in the checkpoint's ``loop``. What it lacks is the checkpoint's.

        Raises:
            ConfigError: a name is unknown, or a value invalid.
        """
        unknown = user_config.keys() - set(LIVE)
        if unknown:
            raise ConfigError(f"user_config may have {', '.join(LIVE)}, got {', '.join(sorted(unknown))}")
        config, reasoner = self._checkpoint.replace(loop=user_config), self.service.check().reasoner
        reasoner.check_token_ids(config)
        reasoner.config = config

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray for :func:`scale_on_answers`."""
        engine = self.service.check()
        return {"answers": float(engine.queued + engine.in_flight), "slots": float(engine.slots)}

    @serve.multiplexed(max_num_models_per_replica=4)  # type: ignore[untyped-decorator]
    async def _load_set(self, name: str) -> LoadedAdapterSet:
        if name not in self.service.model_names():  # the served model, or loaded by an administrator
            await self.service.load_loop_set(name)
        return LoadedAdapterSet(self.service, name)


def replica_settings(settings: dict[str, Any]) -> ServerSettings:
    """The settings of this process's replica.

    By default with as many threads as Ray assigns CPUs to it, and for any host: Ray's proxies listen, not the replica.
    """
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)  # type: ignore[no-untyped-call]
    return ServerSettings(**{"threads": max(1, int(cpus)), "allowed_hosts": "*", **settings})


class LoadedAdapterSet:
    """A loop adapter set of a replica. Ray awaits ``__del__`` when it makes room for another set."""

    def __init__(self, service: Service, name: str) -> None:
        self._service, self._name = service, name

    async def __del__(self) -> None:
        with suppress(Conflict, NotFound):  # the served model; an administrator has removed it
            await self._service.remove_loop_set(self._name)


class AdapterSetLoader:
    """Loads the loop adapter set that the header ``serve_multiplexed_model_id`` names, before the request is run.

    Ray routes by this header to replicas that have the set. The body's ``loop_set`` or ``model`` must name it, too.
    """

    def __init__(self, app: ASGIApp, load: Any) -> None:
        self._app, self._load = app, load

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and (name := serve.get_multiplexed_model_id()):
            try:
                await self._load(name)
            except SLRError as error:
                await send_error(error, scope, receive, send)
                return
        await self._app(scope, receive, send)


def scale_on_answers(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Replicas such that 0.7 of their slots hold an answer, counting those that wait. Ray's policy interface.

    A replica that has not reported counts as one at this target: a lost report does not look like no load. Requests
    that wait in Ray's proxies count as one answer each.
    """
    metrics = context.aggregated_metrics or {}
    answers, slots = metrics.get("answers", {}), metrics.get("slots", {})
    if not slots:
        return context.target_num_replicas, {}
    target = 0.7 * max(slots.values())
    unknown = max(0, context.current_num_replicas - len(answers))
    load = sum(answers.values()) + target * unknown + (context.total_queued_requests or 0)
    wanted = math.ceil(load / target)
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(least, min(most, wanted)), {}


def build_app(settings: dict[str, Any]) -> serve.Application:
    """The application, for ``serve run`` and ``import_path``.

    Args:
        settings: of :class:`slr_server.settings.ServerSettings`, the ``args`` of the application's YAML.

    Raises:
        ValidationError: a setting is unknown or invalid.
    """
    ServerSettings(**settings)
    deployment: serve.Deployment = LatentServer  # type: ignore[assignment]
    return deployment.bind(settings)
