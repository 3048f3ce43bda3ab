"""The Redis servers that tests run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from helpers import BOUND
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry
from redis_server import SERVERS, RedisServer, redis_server

pytestmark = pytest.mark.skipif(not SERVERS, reason="neither Redis nor Valkey is installed")


@pytest.fixture(params=SERVERS, ids=os.path.basename)
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with redis_server(request.param) as running:
        yield running


@contextmanager
def connected(server: RedisServer, timeout: float) -> Iterator[Redis]:
    with Redis.from_url(server.url, socket_timeout=timeout, retry=Retry(NoBackoff(), 0)) as client:
        yield client


@pytest.fixture
def client(server: RedisServer) -> Iterator[Redis]:
    with connected(server, BOUND) as client:
        yield client


def test_a_killed_server_refuses_connections_and_is_empty_on_the_same_port_after_a_restart(
    server: RedisServer, client: Redis
) -> None:
    killed = server.pid
    client.set("key", "value")
    server.kill()
    with pytest.raises(RedisConnectionError):
        client.get("key")
    server.restart()
    assert client.get("key") is None
    assert server.pid != killed


def test_a_suspended_server_answers_nothing_until_it_is_resumed(
    server: RedisServer, client: Redis
) -> None:
    client.set("key", "value")
    server.suspend()
    with connected(server, 0.1) as impatient, pytest.raises(RedisTimeoutError):
        impatient.get("key")
    server.resume()
    assert client.get("key") == b"value"


def test_servers_end_with_their_block(server: RedisServer) -> None:
    with redis_server(SERVERS[0]) as other:
        assert other.url != server.url
        server.suspend()
    with pytest.raises(ProcessLookupError):
        os.kill(other.pid, 0)
