"""A stand-in for Ray: actors are threads of this process, and can be killed. It has only what the service uses."""

from __future__ import annotations

import threading
import types
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class RayError(Exception):
    pass


class RayActorError(RayError):
    pass


class OutOfMemoryError(RayError):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _KilledError(BaseException):
    """Ends the thread of an actor that was killed."""


class Ref:
    def __init__(self) -> None:
        self._future: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self._future

    def settle(self, value: Any = None, error: BaseException | None = None) -> None:
        if not self._future.done():
            self._future.set_result(value) if error is None else self._future.set_exception(error)


class Actor:
    """An actor; it dies with the actor that started it."""

    def __init__(self, ray: FakeRay, cls: type, threads: int, arguments: tuple[Any, ...]) -> None:
        self._ray, self.cls, self.dead = ray, cls, False
        self.children: list[Actor] = []
        self._pool = ThreadPoolExecutor(threads)
        self._waiting: set[Ref] = set()
        self._ready = threading.Event()
        self._pool.submit(self._make, cls, arguments)

    def __getattr__(self, name: str) -> Any:
        return types.SimpleNamespace(remote=lambda *arguments: self._call(name, arguments))

    def at_work(self) -> bool:
        """Whether a call to it is not answered yet."""
        return bool(self._waiting)

    def kill(self) -> None:
        self.dead = True
        for child in self.children:
            child.kill()
        for ref in list(self._waiting):
            ref.settle(error=RayActorError("the actor died"))
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _make(self, cls: type, arguments: tuple[Any, ...]) -> None:
        self._ray.here.actor = self
        self.instance = cls(*arguments)
        self._ready.set()

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Ref:
        self._ray.check_alive()
        ref = Ref()
        self._waiting.add(ref)
        if self.dead:
            ref.settle(error=RayActorError("the actor is dead"))
        else:
            self._pool.submit(self._run, ref, name, arguments)
        return ref

    def _run(self, ref: Ref, name: str, arguments: tuple[Any, ...]) -> None:
        self._ray.here.actor = self
        self._ready.wait()
        try:
            given = [one.future().result() if isinstance(one, Ref) else one for one in arguments]
            ref.settle(getattr(self.instance, name)(*given))
        except _KilledError:
            pass
        except Exception as error:
            ref.settle(error=RayTaskError(error))
        finally:
            self._waiting.discard(ref)


class FakeRay(types.ModuleType):
    """Replaces the module `ray`.

    Attributes:
      actors: all actors that were started.
    """

    def __init__(self, cpus: int = 4) -> None:
        super().__init__("ray")
        self.exceptions = types.SimpleNamespace(
            RayError=RayError, RayActorError=RayActorError, OutOfMemoryError=OutOfMemoryError, RayTaskError=RayTaskError
        )
        self.actors: list[Actor] = []
        self.here = threading.local()  # the actor whose thread this is
        self._cpus = cpus

    def remote(self, cls: type) -> Any:
        def options(max_concurrency: int = 1, **_: Any) -> Any:
            return types.SimpleNamespace(remote=lambda *arguments: self._start(cls, max_concurrency, arguments))

        return types.SimpleNamespace(options=options)

    def put(self, value: Any) -> Ref:
        ref = Ref()
        ref.settle(value)
        return ref

    def get(self, ref: Ref) -> Any:
        return ref.future().result()

    def kill(self, actor: Actor) -> None:
        actor.kill()

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": float(self._cpus)}}]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self._cpus)}

    available_resources = cluster_resources

    def of(self, cls: type) -> list[Actor]:
        """The living actors of a class."""
        return [actor for actor in self.actors if actor.cls is cls and not actor.dead]

    def close(self) -> None:
        for actor in self.actors:
            actor.kill()

    def check_alive(self) -> None:
        """End the thread of an actor that was killed."""
        actor = getattr(self.here, "actor", None)
        if actor is not None and actor.dead:
            raise _KilledError

    def _start(self, cls: type, threads: int, arguments: tuple[Any, ...]) -> Actor:
        self.check_alive()
        actor = Actor(self, cls, threads, arguments)
        self.actors.append(actor)
        if (owner := getattr(self.here, "actor", None)) is not None:
            owner.children.append(actor)
        return actor
