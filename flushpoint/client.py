"""The client library: `Client` and `AsyncClient` with the same methods, both made from `flushpoint.calls`.

    with connect() as flushpoint:
        job = flushpoint.submit(JobSpec(source="/images/db.qcow2", target="nbd://backup/db"))
        job = flushpoint.wait(job.id)

Every method raises the errors of `coordinator.model.errors`: what the API refuses comes back as the class it was
there, an API that does not answer is an UnavailableError.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator
from contextlib import aclosing, closing
from typing import Any, Generic, ParamSpec, Self, TypeVar, overload

import httpx
from pydantic import ValidationError

from coordinator.model.errors import UnavailableError, UsageError
from flushpoint import calls, embedded
from flushpoint.calls import Call, Conversation, Item

P = ParamSpec("P")
T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 10.0
"""For an answer beyond the wait that was agreed on; a server under load may need some of it."""
PATIENCE_S = 15.0
"""How long a client that was answered once keeps asking: a coordinator that is restarted is a normal day."""
RETRY_FIRST_S = 0.05
RETRY_MOST_S = 1.0


def connect() -> Client:
    """A client of $FLUSHPOINT_API, else of the embedded stack, which is started if it does not run."""
    return Client(embedded.api_address())


class _Method(Generic[P, T]):
    """A method that gives one answer: awaited in `AsyncClient`, plain in `Client`."""

    def __init__(self, converse: Callable[P, Conversation[T]]) -> None:
        self._converse = converse
        self.__doc__ = converse.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Client, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: AsyncClient, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, client: Client | AsyncClient | None, owner: type) -> Any:
        if client is None:
            return self
        run = client.first_of

        def call(*args: P.args, **kwargs: P.kwargs) -> T | Coroutine[Any, Any, T]:
            return run(self._converse(*args, **kwargs))

        return call


class _Stream(Generic[P, T]):
    """A method that gives many answers: an async iterator in `AsyncClient`, an iterator in `Client`."""

    def __init__(self, converse: Callable[P, Conversation[T]]) -> None:
        self._converse = converse
        self.__doc__ = converse.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Client, owner: type) -> Callable[P, Iterator[T]]: ...
    @overload
    def __get__(self, client: AsyncClient, owner: type) -> Callable[P, AsyncIterator[T]]: ...
    def __get__(self, client: Client | AsyncClient | None, owner: type) -> Any:
        if client is None:
            return self
        run = client.all_of

        def call(*args: P.args, **kwargs: P.kwargs) -> Iterator[T] | AsyncIterator[T]:
            return run(self._converse(*args, **kwargs))

        return call


def _once(describe: Callable[P, Call[T]]) -> _Method[P, T]:
    """The method of a single call."""

    def converse(*args: P.args, **kwargs: P.kwargs) -> Conversation[T]:
        answer: T = yield describe(*args, **kwargs)
        yield Item(answer)

    converse.__doc__ = describe.__doc__
    return _Method(converse)


class _Methods:
    """What both clients can do."""

    submit = _once(calls.submit)
    job = _once(calls.job)
    pause = _once(calls.pause)
    resume = _once(calls.resume)
    set_speed = _once(calls.set_speed)
    complete = _once(calls.complete)
    cancel = _once(calls.cancel)
    finalize = _once(calls.finalize)
    dismiss = _once(calls.dismiss)
    health = _once(calls.health)
    wait = _Method(calls.wait)
    repositories = _once(calls.repositories)
    point_groups = _once(calls.point_groups)
    apply_group = _once(calls.apply_group)
    group = _once(calls.group)
    groups = _once(calls.groups)
    remove_group = _once(calls.remove_group)
    act_on_group = _once(calls.act_on_group)
    ask_for_checkpoint = _once(calls.ask_for_checkpoint)
    checkpoint = _Method(calls.checkpoint)
    ask_to_complete_group = _once(calls.ask_to_complete_group)
    completion = _Method(calls.completion)
    jobs = _Stream(calls.jobs)
    points = _Stream(calls.points)
    events = _Stream(calls.events)
    watch = _Stream(calls.watch)

    def __init__(self, address: str) -> None:
        self.address = address
        self._answered = False

    def _parse(self, call: Call[T], response: httpx.Response) -> T:
        self._answered = True
        if not response.is_success:
            raise calls.error_of(self.address, response.status_code, response.content)
        try:
            return call.parse(response.content)
        except ValidationError as error:
            raise calls.no_api(self.address, f"{call.method} {call.path}: {error.errors()[0]['msg']}") from error

    def _retry(self, call: Call[Any]) -> _Retry:
        return _Retry(self.address, call, PATIENCE_S if self._answered else 0.0)


class Client(_Methods):
    """Client of one API at `address`: http(s)://host:port or unix:///path. Close it, or use it in a `with`."""

    def __init__(self, address: str, *, transport: httpx.BaseTransport | None = None) -> None:
        super().__init__(address)
        base_url, socket_path = _endpoint(address)
        if socket_path:
            # No TLS over a unix socket: loading the certificates would cost tens of ms.
            transport = transport or httpx.HTTPTransport(uds=socket_path, verify=False)
        self._http = httpx.Client(base_url=base_url, transport=transport)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def all_of(self, conversation: Conversation[T]) -> Generator[T, None, None]:
        """Execute `conversation`, and give what it has for its caller."""
        answer: Any = None
        with closing(conversation):
            while True:
                try:
                    step = conversation.send(answer)
                except StopIteration:
                    return
                if isinstance(step, Item):
                    yield step.value
                    answer = None
                else:
                    answer = self._answer(step)

    def first_of(self, conversation: Conversation[T]) -> T:
        with closing(self.all_of(conversation)) as answers:
            return next(answers)

    def _answer(self, call: Call[T]) -> T:
        retry = self._retry(call)
        while True:
            try:
                return self._parse(call, self._http.send(_request(self._http, call)))
            except (httpx.TransportError, UnavailableError) as error:
                time.sleep(retry.delay_after(error))


class AsyncClient(_Methods):
    """`Client` for asyncio: the same methods, awaited or iterated with `async for`."""

    def __init__(self, address: str, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        super().__init__(address)
        base_url, socket_path = _endpoint(address)
        if socket_path:
            transport = transport or httpx.AsyncHTTPTransport(uds=socket_path, verify=False)
        self._http = httpx.AsyncClient(base_url=base_url, transport=transport)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def all_of(self, conversation: Conversation[T]) -> AsyncGenerator[T, None]:
        """Execute `conversation`, and give what it has for its caller."""
        answer: Any = None
        with closing(conversation):
            while True:
                try:
                    step = conversation.send(answer)
                except StopIteration:
                    return
                if isinstance(step, Item):
                    yield step.value
                    answer = None
                else:
                    answer = await self._answer(step)

    async def first_of(self, conversation: Conversation[T]) -> T:
        async with aclosing(self.all_of(conversation)) as answers:
            return await anext(answers)

    async def _answer(self, call: Call[T]) -> T:
        retry = self._retry(call)
        while True:
            try:
                return self._parse(call, await self._http.send(_request(self._http, call)))
            except (httpx.TransportError, UnavailableError) as error:
                await asyncio.sleep(retry.delay_after(error))


class _Retry:
    """Decides, after each failure of one call, when to try it again or that it is over."""

    def __init__(self, address: str, call: Call[Any], patience_s: float) -> None:
        self._address = address
        self._call = call
        self._deadline = time.monotonic() + call.wait_s + patience_s
        self._patient = patience_s > 0
        self._delay_s = RETRY_FIRST_S

    def delay_after(self, error: httpx.TransportError | UnavailableError) -> float:
        """Seconds to wait before the next try; raises UnavailableError when there is none."""
        # A connection that was not made has carried no request, so that any call may be made again.
        may_repeat = self._call.repeatable or isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        if not self._patient or not may_repeat or time.monotonic() + self._delay_s > self._deadline:
            raise self._final(error) from error
        delay_s = self._delay_s
        self._delay_s = min(2 * delay_s, RETRY_MOST_S)
        return delay_s

    def _final(self, error: httpx.TransportError | UnavailableError) -> UnavailableError:
        if isinstance(error, UnavailableError):
            return UnavailableError(error.message, error.remedy)
        reason = str(error) or type(error).__name__
        return UnavailableError(
            f"the API at {self._address} does not answer: {reason}",
            "check $FLUSHPOINT_API and that the coordinator runs (flushpoint doctor)",
        )


def _endpoint(address: str) -> tuple[str, str]:
    """Base URL and path of the unix socket, "" for TCP."""
    scheme, _, rest = address.partition("://")
    if scheme == "unix" and rest.startswith("/"):
        return "http://flushpoint", rest
    if scheme in ("http", "https") and _is_url_of_host(address):
        return address.rstrip("/"), ""
    raise UsageError(
        f"{address!r} is no address of an API",
        "set FLUSHPOINT_API to http://host:port or unix:///path/to/api.sock",
    )


def _is_url_of_host(address: str) -> bool:
    try:
        url = httpx.URL(address)
        url.host.encode("idna")  # as the resolver will do, which says so in no error of httpx
    except (httpx.InvalidURL, UnicodeError):
        return False
    return url.host != "" and (url.port is None or 0 < url.port < 65536)


def _request(http: httpx.Client | httpx.AsyncClient, call: Call[Any]) -> httpx.Request:
    headers = {"Accept": "application/json", **call.headers}
    if call.body is not None:
        headers["Content-Type"] = "application/json"
    return http.build_request(
        call.method,
        call.path,
        params=dict(call.params),
        content=call.body,
        headers=headers,
        timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, read=ANSWER_TIMEOUT_S + call.wait_s),
    )
