"""The server as an application of Ray Serve: replicas on many machines, which Ray looks after.

  serve run pallas_paged.engine.serve.on_ray:app model=FOLDER num_replicas=2

Ray routes requests, checks replicas, replaces those that have ended, and scales their number. What
may follow is in `ray_options`.
"""

import asyncio
import logging
import os
from typing import Any

from fastapi import FastAPI
from ray import serve

from pallas_paged.engine.async_llm import AsyncLLM
from pallas_paged.engine.serve.app import make_app
from pallas_paged.engine.serve.options_for import log_requests, options_for
from pallas_paged.engine.serve.ray_options import RayOptions, ray_options
from pallas_paged.engine.serve.service import Service
from pallas_paged.models import command_line

logger = logging.getLogger(__name__)

NAME = "pallas-paged"
"""Of the deployment."""
_POLL_S = 0.25


class Replica:
    """An engine and its server, in an actor of Ray's.

    Attributes:
      llm: the engine.
    """

    def __init__(self, options: RayOptions):
        """Loads the model; raises `ValueError` for options that are wrong where it runs."""
        logging.getLogger("pallas_paged").setLevel(logging.INFO)
        command_line.settle_jax()
        log_requests(options.log_requests)
        self.llm = AsyncLLM(**options.engine)
        own = (
            None if self.llm.tokenizer is None else self.llm.tokenizer.implementation.chat_template
        )
        served = options_for(options.engine["model"], own, **options.server)
        self._asgi = make_app(Service(self.llm, served))

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Returns the application that answers; Ray asks for it, in the event loop of requests."""
        self._watching = asyncio.ensure_future(self._end_with_the_engine())
        return self._asgi

    async def _end_with_the_engine(self) -> None:
        """Ends the process soon after its engine, which Ray sees before three checks have failed.

        Until then it would get most of the requests, for it refuses them faster than others serve.
        """
        while not self.llm.errored:
            await asyncio.sleep(_POLL_S)
        logger.critical("this replica ends: %s", self.llm.dead_error)
        await asyncio.sleep(_POLL_S)  # for answers that are on their way
        os._exit(1)

    async def check_health(self) -> None:
        """Raises `EngineDeadError` if the engine has ended, so that Ray replaces the replica."""
        await self.llm.check_health()

    async def __del__(self) -> None:
        """Ends the engine; Ray calls it when the requests have ended, or their time is over."""
        if hasattr(self, "_watching"):  # else it was not loaded
            self._watching.cancel()
            await self.llm.shutdown()


def app(args: dict[str, Any]) -> serve.Application:
    """Returns the application that arguments describe, see `ray_options`.

    Raises:
      ValueError: one of them is not known, or not usable.
    """
    return application_of(Replica, ray_options(args))


def application_of(replica: type[Replica], options: RayOptions) -> serve.Application:
    """Returns the application whose replicas are of a class."""
    served = serve.deployment(serve.ingress()(replica))
    return served.options(name=NAME, **options.deployment).bind(options)
