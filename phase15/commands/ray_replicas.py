# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The work of `phase15 serve-ray`: a Ray Serve application whose replicas each have lanes."""

import hashlib
import json
from collections.abc import AsyncIterator

import ray
import torch
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from phase15.serving.arguments import Phase15ServerArguments, RayArguments
from phase15.serving.openai_api import Server, build_app, busy_error, to_api_error
from phase15.serving.openai_requests import ApiError


APPLICATION = "phase15"
REPLICA = "Lanes"
MAX_TRIES = 4  # to have a request answered, if replicas die before they begin


class Replica:
    """Lanes in a process of their own."""

    def __init__(self, arguments: dict):
        self.server = Server.load(Phase15ServerArguments(**arguments))
        self.server.worker.start()

    def check_health(self):
        """Raises if the replica must be replaced. Ray calls this method."""
        if not self.server.is_alive():
            raise RuntimeError("the thread of the lanes has ended")

    async def state(self, action: str, argument: dict | str, salt: bytes) -> dict:
        """
        Calls `read_state`, `get_state` or `delete_state` of the server. Returns its result as "result", or the
        arguments of an `ApiError` as "error".
        """
        try:
            return {"result": await getattr(self.server, action)(argument, salt)}
        except Exception as error:
            return {"error": to_api_error(error).arguments}

    async def events(self, body: dict, kind: str, salt: bytes) -> AsyncIterator[str | dict]:
        """
        Yields an empty text once the request is in the queue, then the events of its [`Answer`]. An error is a dict,
        the arguments of `ApiError`, since Ray wraps exceptions in a type of its own.
        """
        await self.claim_conversation(serve.get_multiplexed_model_id())
        try:
            answer = await self.server.open(body, kind, salt)
        except ApiError as error:
            yield error.arguments
            return
        try:
            yield ""
            async for text in answer.events():
                yield text
        except Exception as error:
            yield to_api_error(error).arguments
        finally:
            answer.cancel()

    async def claim_conversation(self, conversation: str) -> str:
        raise NotImplementedError  # made by `make_application`: Ray's decorator takes the number of conversations


class RemoteAnswer:
    """
    An [`Answer`] of a replica.

    Args:
        stream (`DeploymentResponseGenerator`): the rest of `Replica.events`.
        is_streamed (`bool`): as in [`Answer`].
    """

    def __init__(self, stream, is_streamed: bool):
        self.stream = stream
        self.is_streamed = is_streamed

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
    """
    A [`Server`] whose answers come from replicas.

    Args:
        arguments (`Phase15ServerArguments`): arguments of the replicas.
        keys (`list[str]`): API keys, one of which clients must send; none if they need none.
        num_replicas (`int`): maximum number of replicas.
    """

    def __init__(self, arguments: Phase15ServerArguments, keys: list[str], num_replicas: int):
        self.arguments = arguments
        self.keys = keys
        self.num_replicas = num_replicas
        self.replicas = serve.get_deployment_handle(REPLICA, APPLICATION)

    async def start(self):
        pass  # Ray starts the replicas

    async def stop(self):
        pass

    def is_alive(self) -> bool:
        return True

    def metrics(self) -> bytes:
        return b"# Ray has the metrics of its replicas: docs.ray.io/en/latest/serve/monitoring.html\n"

    async def read_state(self, body: dict, salt: bytes) -> dict:
        """See [`Server.read_state`]."""
        return await self.call_state("read_state", body, salt)

    async def get_state(self, state_id: str, salt: bytes) -> dict:
        """See [`Server.get_state`]."""
        return await self.call_state("get_state", state_id, salt)

    async def delete_state(self, state_id: str, salt: bytes) -> dict:
        """See [`Server.delete_state`]."""
        return await self.call_state("delete_state", state_id, salt)

    async def call_state(self, action: str, argument: dict | str, salt: bytes) -> dict:
        """
        Calls a replica.

        Raises:
            ApiError: if the request cannot be honoured, or if replicas could not find each other's states.
        """
        if self.num_replicas > 1 and self.arguments.state_dir is None:
            raise ApiError("several replicas share states only with --state_dir: start the server with it.", "state")
        try:
            reply = await self.replicas.state.remote(action, argument, salt)
        except BackPressureError:
            raise busy_error(self.arguments) from None
        if "error" in reply:
            raise ApiError(**reply["error"])
        return reply["result"]

    async def open(self, body: dict, kind: str, salt: bytes) -> RemoteAnswer:
        """
        Sends a request to a replica. See [`Server.open`].

        Raises:
            ApiError: if the request cannot be honoured, or the waiting queue is full.
        """
        replicas = self.replicas.options(stream=True, multiplexed_model_id=conversation_id(body))
        for number in range(MAX_TRIES):
            stream = replicas.events.remote(body, kind, salt)
            try:
                first = await anext(stream)
                break
            except BackPressureError:
                raise busy_error(self.arguments) from None
            except RayActorError:  # the replica died, and Ray starts another
                if number == MAX_TRIES - 1:
                    raise
        if isinstance(first, dict):
            raise ApiError(**first)
        return RemoteAnswer(stream, is_streamed=bool(body.get("stream")))


def conversation_id(body: dict) -> str:
    """Returns a hash of the beginning that all turns of a conversation share: the messages up to the user's first."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        messages = [body.get("prompt")]
    beginning = []
    for message in messages:
        beginning.append(message)
        if isinstance(message, dict) and message.get("role") == "user":
            break
    return hashlib.sha256(json.dumps(beginning).encode()).hexdigest()


def make_application(arguments: RayArguments) -> serve.Application:
    """Returns a deployment of replicas, with another in front of it that answers over HTTP."""
    replica_arguments = {name: getattr(arguments, name) for name in Phase15ServerArguments.__annotations__}
    replica_arguments["api_key"] = None  # the front checks it
    keys = arguments.read_keys()

    class ConversationReplica(Replica):
        # Ray sends a request with the id of a "multiplexed model" to a replica that has loaded that model. A
        # conversation is such a model here, so that its turns go to the replica with its soft prompt.
        @serve.multiplexed(max_num_models_per_replica=max(arguments.max_kept_conversations, 1))
        async def claim_conversation(self, conversation: str) -> str:
            return conversation

    replicas = serve.deployment(
        ConversationReplica,
        name=REPLICA,
        ray_actor_options={"num_gpus": int(torch.cuda.is_available())},
        max_ongoing_requests=arguments.num_lanes,
        max_queued_requests=arguments.max_waiting,
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": arguments.num_lanes,
        },
    )

    @serve.ingress(
        lambda: build_app(Replicas(Phase15ServerArguments(**replica_arguments), keys, arguments.max_replicas))
    )
    class Front:
        def __init__(self, replicas):
            pass  # Ray deploys only what is bound to the front

    front = serve.deployment(Front, name="Front", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=10_000)
    return front.bind(replicas.bind(replica_arguments))


def serve_replicas(arguments: RayArguments):
    """Serves until it is stopped."""
    ray.init(arguments.address, log_to_driver=True)
    serve.start(http_options={"host": arguments.host, "port": arguments.port})
    serve.run(make_application(arguments), name=APPLICATION, route_prefix="/", blocking=True)


__all__ = ["serve_replicas"]
