# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The work of `phase15 serve-ray`: a Ray Serve application whose replicas each have lanes."""

import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import asdict

import ray
import torch
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from phase15.commands.serve_ray import RayArguments
from phase15.serving.arguments import Phase15ServerArguments
from phase15.serving.openai_api import Server, build_app, busy, error_of
from phase15.serving.openai_requests import ApiError


APPLICATION = "phase15"
REPLICA = "Lanes"
TRIES = 4  # of a request that no replica has begun to answer


class Replica:
    """Lanes in a process of its own."""

    def __init__(self, arguments: dict):
        self.server = Server.load(Phase15ServerArguments(**arguments))
        self.server.worker.start()

    def check_health(self):
        if not self.server.is_alive():
            raise RuntimeError("the thread of the lanes has ended")

    async def events(self, body: dict, kind: str) -> AsyncIterator[str | dict]:
        """First an empty text, or the error as the arguments of `ApiError`; then the answer's events."""
        await self.keep(serve.get_multiplexed_model_id())
        try:
            answer = await self.server.open(body, kind)
        except ApiError as error:
            yield error.arguments
            return
        try:
            yield ""
            async for text in answer.events():
                yield text
        except Exception as error:
            yield error_of(error).arguments
        finally:
            answer.cancel()

    async def keep(self, conversation: str) -> str:
        raise NotImplementedError  # Ray's decorator needs the number of conversations


class RemoteAnswer:
    """An [`Answer`] of a replica."""

    def __init__(self, stream, is_streamed: bool):
        self.stream, self.is_streamed = stream, is_streamed

    def cancel(self):
        self.stream.cancel()

    async def events(self) -> AsyncIterator[str]:
        try:
            async for item in self.stream:
                if isinstance(item, dict):
                    raise ApiError(**item)
                yield item
        finally:
            self.cancel()


class Replicas:
    """A [`Server`] whose answers come from replicas."""

    def __init__(self, arguments: Phase15ServerArguments, key: str | None):
        self.arguments, self.key = arguments, key
        self.replicas = serve.get_deployment_handle(REPLICA, APPLICATION)

    async def start(self):
        pass

    async def stop(self):
        pass

    def is_alive(self) -> bool:
        return True

    def metrics(self) -> bytes:
        return b"# Ray has the metrics of its replicas: docs.ray.io/en/latest/serve/monitoring.html\n"

    async def open(self, body: dict, kind: str) -> RemoteAnswer:
        """
        Raises:
            ApiError: for what cannot be honoured, and when too many requests wait.
        """
        replicas = self.replicas.options(stream=True, multiplexed_model_id=conversation_of(body))
        for number in range(TRIES):
            stream = replicas.events.remote(body, kind)
            try:
                first = await anext(stream)
                break
            except BackPressureError:
                raise busy(self.arguments) from None
            except RayActorError:  # the replica has died, and Ray starts another
                if number == TRIES - 1:
                    raise
        if isinstance(first, dict):
            raise ApiError(**first)
        return RemoteAnswer(stream, bool(body.get("stream")))


def conversation_of(body: dict) -> str:
    """Returns a digest of what all turns of a conversation share: up to the first message of the user."""
    messages = body.get("messages")
    first = []
    for message in messages if isinstance(messages, list) else [body.get("prompt")]:
        first.append(message)
        if isinstance(message, dict) and message.get("role") == "user":
            break
    return hashlib.sha256(json.dumps(first).encode()).hexdigest()


def make_application(arguments: RayArguments) -> serve.Application:
    """A deployment of replicas, and before it one that speaks HTTP."""
    names = Phase15ServerArguments.__annotations__
    key = arguments.read_key()
    shared = {name: value for name, value in asdict(arguments).items() if name in names}
    shared["api_key"] = None  # the application before the replicas asks for it

    class KeepingReplica(Replica):
        @serve.multiplexed(max_num_models_per_replica=max(arguments.max_kept_conversations, 1))
        async def keep(self, conversation: str) -> str:
            """Ray sends what it calls a model to a replica that has it. A conversation is such a model here."""
            return conversation

    replicas = serve.deployment(
        KeepingReplica,
        name=REPLICA,
        ray_actor_options={"num_gpus": int(torch.cuda.is_available())},
        max_ongoing_requests=arguments.num_lanes,
        max_queued_requests=arguments.max_waiting,
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": arguments.num_lanes,
        },
    ).bind(shared)

    @serve.ingress(lambda: build_app(Replicas(Phase15ServerArguments(**shared), key)))
    class Front:
        def __init__(self, replicas):
            pass

    return serve.deployment(Front, name="Front", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=10_000).bind(
        replicas
    )


def serve_replicas(arguments: RayArguments):
    """Serves until it is stopped."""
    ray.init(arguments.address, log_to_driver=True)
    serve.start(http_options={"host": arguments.host, "port": arguments.port})
    serve.run(make_application(arguments), name=APPLICATION, route_prefix="/", blocking=True)


__all__ = ["serve_replicas"]
